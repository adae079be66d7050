"""data.py: scenes, noise, splits, image files, folders, loaders, command line; CPU, no network."""
import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data


def write_images(folder, count, size=(20, 16), seed=0, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}{suffix}")


def pixel(path):
    """The one colour of a loaded image."""
    colours = data.load_image(path).getcolors()
    assert len(colours) == 1
    return colours[0][1]


# --- Scenes -------------------------------------------------------------------------------------------------

def digits(**kwargs):
    return data.load_data("digits", **{"train_images": 20, "val_images": 10, **kwargs})


def test_digits_have_ten_classes_and_the_stated_shape():
    scenes = digits()
    image, label = scenes.train[13]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and label == 3
    assert scenes.train.targets == [i % 10 for i in range(20)] and len(scenes.val) == 10
    assert scenes.classes == list("0123456789") and scenes.size == 64 and scenes.test is None
    assert digits(size=96).train[0][0].shape == (3, 96, 96)


def test_digits_follow_the_seed_and_fewer_are_a_prefix_of_more():
    first, again, other = digits().train, digits().train, digits(seed=1).train
    fewer = digits(train_images=7).train
    assert torch.equal(first.images, again.images)
    assert all(not torch.equal(a, b) for a, b in zip(first.images, other.images))
    assert torch.equal(first.images[:7], fewer.images)
    assert all(not torch.equal(a, b) for a, b in zip(first.images, digits().val.images))  # train is not val


def test_a_scene_is_a_brighter_digit_on_constant_grey():
    images = digits(train_images=100).train.images
    for image in images:
        corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        background = corners.flatten().mode().values
        assert 25 <= background <= 77  # 0.1 ... 0.3
        ink = (image != background).any(0)  # (H, W)
        height = ink.any(1).sum()
        assert 0.4 * 64 <= height <= 0.87 * 64
        assert 0.01 < ink.float().mean() < 0.5
        assert image.max() >= 0.65 * 255  # the strongest channel stands out
        assert (image[:, ~ink] == background).all()
    difference = images.amax((2, 3)).float().std(1)  # between the channels
    assert (difference > 10).float().mean() > 0.5  # tinted


def test_digits_of_a_class_vary_but_agree_more_with_their_own_class():
    scenes = digits(train_images=600, val_images=200, size=32)

    def normalised(dataset):
        rows = []
        for image in dataset.images.float().amax(1):  # (H, W), the strongest channel
            image = image - image.min()
            ink = image > 15
            ys, xs = ink.any(1).nonzero(), ink.any(0).nonzero()
            crop = image[ys.min():ys.max() + 1, xs.min():xs.max() + 1][None, None]
            rows.append(torch.nn.functional.interpolate(crop, (12, 8), mode="area").flatten())
        return torch.nn.functional.normalize(torch.stack(rows))

    train, val = normalised(scenes.train), normalised(scenes.val)
    assert train.unique(dim=0).shape[0] == 600
    nearest = (val @ train.T).argmax(1)
    right = torch.tensor(scenes.train.targets)[nearest] == torch.tensor(scenes.val.targets)
    assert right.float().mean() > 0.85  # labels mean shapes: nearest neighbour after cutting out the digit


def test_mnist_scenes_are_placed_digits(tmp_path, monkeypatch):
    class Fake:  # as torchvision's MNIST, without files
        def __init__(self, root, train, download=False):
            self.data = torch.zeros(30, 28, 28, dtype=torch.uint8)
            self.data[:, 4:24, 10:14] = 255
            self.targets = torch.arange(30) % 3 + (0 if train else 3)
    monkeypatch.setattr(data.datasets, "MNIST", Fake)
    scenes = data.load_data("mnist", root=tmp_path, train_images=9)
    assert len(scenes.train) == 9 and len(scenes.val) == 30  # all by default
    assert sorted(scenes.train.targets) == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # in proportion
    assert set(scenes.val.targets) == {3, 4, 5}
    ink = (scenes.train[0][0] != scenes.train[0][0].flatten().mode().values).any(0)
    height, width = int(ink.any(1).sum()), int(ink.any(0).sum())
    assert abs(height / width - 5) < 1.0  # 20 x 4 pixels, enlarged
    again = data.load_data("mnist", root=tmp_path, train_images=9)
    assert torch.equal(scenes.train.images, again.train.images)


def test_mnist_without_files_and_network_is_one_sentence(tmp_path, monkeypatch):
    def missing(root, train, download=False):
        raise RuntimeError("Dataset not found." if not download else "no\nnetwork")
    monkeypatch.setattr(data.datasets, "MNIST", missing)
    with pytest.raises(data.DataError, match=r"MNIST was not found under .*\(network\).*--data-root"):
        data.load_data("mnist", root=tmp_path)


# --- Noise --------------------------------------------------------------------------------------------------

def test_noise_has_the_sigma_of_each_image():
    images = torch.rand(4, 3, 64, 64)
    sigma = torch.tensor([0.0, 0.1, 0.5, 1.0])
    noisy = data.add_noise(images, sigma, torch.Generator().manual_seed(1))
    error = noisy - images
    assert torch.equal(noisy[0], images[0])
    assert torch.allclose(error.std((1, 2, 3)), sigma, rtol=0.03)
    assert (error.mean((1, 2, 3)).abs() < 0.03).all()
    assert noisy.min() < -1 and noisy.max() > 2  # not clipped
    assert torch.equal(noisy, data.add_noise(images, sigma, torch.Generator().manual_seed(1)))
    assert not torch.equal(noisy, data.add_noise(images, sigma, torch.Generator().manual_seed(2)))


def test_noise_of_one_sigma_clip_and_memory_format():
    images = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    assert torch.equal(data.add_noise(images, 0.0), images)
    noisy = data.add_noise(images, 0.5, torch.Generator().manual_seed(0), clip=True)
    assert noisy.min() == 0 and noisy.max() == 1
    assert noisy.is_contiguous(memory_format=torch.channels_last)
    free = data.add_noise(images, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, free.clamp(0, 1)) and abs(float((free - images).std()) - 0.5) < 0.02
    assert torch.equal(images, before)  # the input is left alone


def test_sample_sigma_is_uniform_and_seeded():
    sigma = data.sample_sigma(4000, 0.2, 0.6, torch.Generator().manual_seed(3), "cpu")
    assert sigma.shape == (4000,) and sigma.dtype == torch.float32
    assert 0.2 <= sigma.min() < 0.21 and 0.59 < sigma.max() <= 0.6 and abs(float(sigma.mean()) - 0.4) < 0.01
    assert torch.equal(sigma, data.sample_sigma(4000, 0.2, 0.6, torch.Generator().manual_seed(3), "cpu"))
    assert (data.sample_sigma(3, 0.5, 0.5, None, "cpu") == 0.5).all()


def test_evaluation_noise_depends_on_index_and_seed_alone():
    noise = data.evaluation_noise((3, 48, 48), 5)
    assert noise.dtype == torch.float32 and noise.shape == (3, 48, 48)
    assert abs(float(noise.std()) - 1) < 0.03 and abs(float(noise.mean())) < 0.05
    torch.manual_seed(123)
    assert torch.equal(noise, data.evaluation_noise((3, 48, 48), 5))
    assert not torch.equal(noise, data.evaluation_noise((3, 48, 48), 6))
    assert not torch.equal(noise, data.evaluation_noise((3, 48, 48), 5, seed=1))
    # a number that was once written down: another release or machine must not change published figures
    assert float(data.evaluation_noise((1,), 0)) == pytest.approx(-0.2864522337913513, abs=1e-6)


def test_evaluation_noise_is_the_same_for_every_batch_size():
    scenes = digits().val

    def noise(batch_size):
        index, rows = 0, []
        for images, _ in data.make_loader(scenes, batch_size):
            rows += [data.evaluation_noise(image.shape, index + i) for i, image in enumerate(images)]
            index += len(images)
        return torch.stack(rows)
    assert torch.equal(noise(1), noise(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_on_the_gpu():
    generator = torch.Generator("cuda").manual_seed(0)
    images = data.to_float(torch.full((2, 3, 64, 64), 128, dtype=torch.uint8), "cuda")
    sigma = data.sample_sigma(2, 0.5, 0.5, generator, "cuda")
    noisy = data.add_noise(images, sigma, generator)
    assert noisy.is_cuda and sigma.is_cuda and abs(float((noisy - images).std()) - 0.5) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_poisson_gaussian_noise_on_the_gpu():
    generator, images = torch.Generator("cuda").manual_seed(0), torch.ones(2, 3, 128, 128, device="cuda")
    for sigma in (1.0, 0.1, 1e-4, 1e-6):
        error = data.Noise(kind="poisson-gaussian").add(images, torch.full((2,), sigma, device="cuda"), generator) - 1
        assert error.std().item() == pytest.approx(sigma, rel=0.05, abs=1e-7)  # 1e-6: float32 has no more digits at 1
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    for kind in data.NOISES:
        here, there = (data.evaluation_draw(data.to_float(pixels, device), [0, 1], kind=kind)(0.3).cpu()
                       for device in ("cpu", "cuda"))
        assert torch.allclose(here, there, atol=1e-6)


# --- Splits -------------------------------------------------------------------------------------------------

def test_stratified_split_is_disjoint_seeded_and_proportional():
    targets = [0] * 50 + [1] * 20 + [2] * 2 + [3] + [-1] * 10
    first, second = data.stratified_split(targets, 0.8, seed=0)
    assert sorted(first + second) == list(range(len(targets))) and not set(first) & set(second)
    count = {label: sum(targets[i] == label for i in first) for label in set(targets)}
    assert count == {0: 40, 1: 16, 2: 1, 3: 1, -1: 8}
    assert (first, second) == data.stratified_split(targets, 0.8, seed=0)
    assert first != data.stratified_split(targets, 0.8, seed=1)[0]


def test_stratified_split_refuses_a_fraction_that_empties_a_side():
    for fraction in (0, 1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            data.stratified_split([0, 1], fraction, 0)


# --- Image files --------------------------------------------------------------------------------------------

def test_grey_palette_and_bilevel(tmp_path):
    Image.new("L", (4, 3), 100).save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png")
    Image.new("1", (4, 3), 1).save(tmp_path / "bilevel.png")
    assert pixel(tmp_path / "grey.png") == (100, 100, 100)
    assert pixel(tmp_path / "palette.png") == (10, 20, 30)
    assert pixel(tmp_path / "bilevel.png") == (255, 255, 255)


def test_transparency_is_composited_over_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 100, 200, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (0, 100, 200, 255)).save(tmp_path / "opaque.png")
    Image.new("LA", (2, 2), (0, 51)).save(tmp_path / "grey_alpha.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "colour_key.png", transparency=(1, 2, 3))
    assert pixel(tmp_path / "clear.png") == (255, 255, 255)
    assert pixel(tmp_path / "opaque.png") == (0, 100, 200)
    assert pixel(tmp_path / "grey_alpha.png") == (204, 204, 204)
    assert pixel(tmp_path / "palette.png") == (255, 255, 255)
    assert pixel(tmp_path / "colour_key.png") == (255, 255, 255)


def test_sixteen_bit_and_floating_point_are_scaled(tmp_path):
    for suffix in ("png", "tif"):
        Image.fromarray(np.full((2, 2), 128 * 257, dtype=np.uint16)).save(tmp_path / f"deep.{suffix}")
        assert pixel(tmp_path / f"deep.{suffix}") == (128, 128, 128)
    (tmp_path / "deep.pgm").write_bytes(b"P5 1 1 65535\n" + struct.pack(">H", 200 * 257))
    assert pixel(tmp_path / "deep.pgm") == (200, 200, 200)
    Image.fromarray(np.array([[-1, 0.2, 2, np.nan]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert np.asarray(data.load_image(tmp_path / "float.tif"))[0, :, 0].tolist() == [0, 51, 255, 0]


def test_cmyk_and_rotation(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = pixel(tmp_path / "cmyk.jpg")
    assert red > 245 and green < 10 and blue < 10
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = data.load_image(tmp_path / "turned.png")
    assert loaded.size == (2, 3) and loaded.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
def test_truncated_file_is_named(tmp_path, suffix):
    write_images(tmp_path, 1, size=(64, 64), suffix=f".{suffix}")
    path = tmp_path / f"000.{suffix}"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(data.DataError, match=f"000.{suffix} is damaged"):
        data.load_image(path)


def test_no_image_and_missing_file_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "empty.jpg"):
        with pytest.raises(data.DataError, match=f"{name} is damaged"):
            data.load_image(tmp_path / name)
    with pytest.raises(data.DataError, match="no image file .*absent.png"):
        data.load_image(tmp_path / "absent.png")


@pytest.mark.filterwarnings("error")
def test_large_images_load_and_huge_ones_are_named(tmp_path, monkeypatch):
    write_images(tmp_path, 1, size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit does not count
    assert data.load_image(tmp_path / "000.png").size == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 1000  # and is left as it was

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(data.DataError, match="huge.png has 20000 x 20000 pixels, more than the 200 million"):
        data.load_image(tmp_path / "huge.png")


def test_list_images_is_sorted_and_ignores_the_rest(tmp_path):
    write_images(tmp_path, 2)
    shutil.copy(tmp_path / "000.png", tmp_path / "B.JPG")
    for name in (".hidden.png", "._000.png", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in data.list_images(tmp_path)] == ["000.png", "001.png", "B.JPG"]
    with pytest.raises(data.DataError, match="no folder"):
        data.list_images(tmp_path / "absent")


# --- Folders ------------------------------------------------------------------------------------------------

def test_class_folders_with_train_and_val(tmp_path):
    write_images(tmp_path / "train/cat", 3, seed=1)
    write_images(tmp_path / "train/dog/more", 2, seed=2)  # nested, as in torchvision
    write_images(tmp_path / "val/cat", 1, seed=3)
    write_images(tmp_path / "val/dog", 2, seed=4)
    write_images(tmp_path / "test/cat", 1, seed=5)
    write_images(tmp_path / "test/dog", 1, seed=6)
    write_images(tmp_path / "train/.ipynb_checkpoints", 1)
    (tmp_path / "train/cat/Thumbs.db").touch()
    (tmp_path / "train/labels.csv").touch()
    images = data.load_data(str(tmp_path), size=16)
    assert images.classes == ["cat", "dog"] and images.size == 16
    assert images.train.targets == [0, 0, 0, 1, 1]
    assert images.val.targets == [0, 1, 1] and images.test.targets == [0, 1]
    image, label = images.train[4]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and label == 1
    assert data.load_data(str(tmp_path)).size == 224


def test_class_folders_alone_are_split_nine_to_one(tmp_path):
    write_images(tmp_path / "a", 20)
    write_images(tmp_path / "b", 10)
    write_images(tmp_path / "c", 2)
    images = data.load_data(str(tmp_path), size=16)
    assert [images.train.targets.count(i) for i in range(3)] == [18, 9, 1]
    assert [images.val.targets.count(i) for i in range(3)] == [2, 1, 1]
    assert not set(images.train.paths) & set(images.val.paths)
    assert images.val.paths == data.load_data(str(tmp_path), size=16).val.paths
    assert images.val.paths != data.load_data(str(tmp_path), size=16, seed=1).val.paths


@pytest.mark.parametrize("layout", ["train", "."])
def test_images_without_labels(tmp_path, layout):
    write_images(tmp_path / layout, 20, size=(40, 24))
    images = data.load_data(str(tmp_path), size=16)
    assert images.classes is None and len(images.train) == 18 and len(images.val) == 2 and images.test is None
    assert set(images.train.targets + images.val.targets) == {-1}
    assert images.train[0][0].shape == (3, 16, 16) and images.train[0][1] == -1
    whole = images.val[0][0]
    assert np.array_equal(whole.permute(1, 2, 0), data.load_image(images.val.paths[0]))


def test_unlabelled_splits_and_small_images_are_padded(tmp_path):
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        write_images(tmp_path / split, count, size=(9, 5))
    images = data.load_data(str(tmp_path), size=32)
    assert (len(images.train), len(images.val), len(images.test)) == (4, 3, 2)
    padded = images.train[0][0]
    assert padded.shape == (3, 32, 32) and padded[:, :, 0].float().std() > 20  # reflected, not black
    assert images.test[0][0].shape == (3, 5, 9)
    batches = list(data.make_loader(images.val, 8))  # sizes may differ, so one by one
    assert [tuple(batch.shape) for batch, _ in batches] == [(1, 3, 5, 9)] * 3


def test_limits_choose_in_proportion(tmp_path):
    write_images(tmp_path / "train/a", 16)
    write_images(tmp_path / "train/b", 8)
    write_images(tmp_path / "val/a", 4)
    write_images(tmp_path / "val/b", 4)
    images = data.load_data(str(tmp_path), size=16, train_images=6, val_images=2)
    assert images.train.targets == [0, 0, 0, 0, 1, 1] and images.val.targets == [0, 1]
    assert set(images.train.paths) <= set(data.load_data(str(tmp_path), size=16, train_images=9).train.paths)
    assert images.train.paths != data.load_data(str(tmp_path), size=16, train_images=6, seed=1).train.paths
    assert len(data.load_data(str(tmp_path), size=16, train_images=1000).train) == 24


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_no_images_asked_for_is_refused(tmp_path, name):
    write_images(tmp_path, 4)
    with pytest.raises(data.DataError, match="at least 1, not 0"):
        data.load_data(name if name == "digits" else str(tmp_path), train_images=0)
    with pytest.raises(data.DataError, match="at least 8 pixels, not 0"):
        data.load_data(name if name == "digits" else str(tmp_path), size=0)


def make(root, *folders, empty=()):
    for folder in folders:
        write_images(root / folder, 2)
    for folder in empty:
        (root / folder).mkdir(parents=True)


@pytest.mark.parametrize("folders, empty, message", [
    ([], [], "holds no images; these layouts work"),
    (["train/a", "train/b", "val/a", "val/b"], ["train/c", "val/c"], "folder .*train.c holds no images"),
    (["train/a", "train/b", "val/a"], ["val/b"], "class folder .*val.b holds no images"),
    (["a"], ["b"], "class folder .*b holds no images"),
    (["a"], [], r"holds only one folder \(a\); these layouts work"),
    ([".", "a"], [], "both images and folders; these layouts work"),
    (["train", "train/a"], [], "train holds both images and folders; these layouts work"),
    (["val/a", "val/b"], [], "holds val but no train folder; these layouts work"),
    (["train/a", "train/b", "val/a", "val/c"], [], r"classes of .*train and .*val differ \(b, c\)"),
    (["train/a", "train/b", "val"], [], "one holds class folders, the other images; these layouts work"),
    (["train"], ["val"], "val holds no images; these layouts work"),
])
def test_other_layouts_are_refused_in_one_sentence(tmp_path, folders, empty, message):
    make(tmp_path, *folders, empty=empty)
    with pytest.raises(data.DataError, match=message) as error:
        data.load_data(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_folder_and_single_image_are_refused(tmp_path):
    with pytest.raises(data.DataError, match="no folder .*absent: --data is digits, mnist, digit-pairs"):
        data.load_data(str(tmp_path / "absent"))
    write_images(tmp_path, 1)
    with pytest.raises(data.DataError, match="too few images"):
        data.load_data(str(tmp_path))


def test_validation_transform_shrinks_cuts_the_centre_and_does_not_enlarge(tmp_path):
    make(tmp_path, "a", "b")
    transform = data.load_data(str(tmp_path), size=56).val.transform
    ramp = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (128, 1))).convert("RGB")
    kept = transform(ramp.crop((0, 0, 60, 60)))  # between 56 and 64: only cut
    assert kept.shape == (3, 56, 56) and kept[0, 0].tolist() == list(range(2, 58))
    shrunk = transform(ramp)[0, 0].float()  # 128 -> 64, then 4 pixels off either side
    assert abs(shrunk[0] - 8.5) <= 1 and abs(shrunk[-1] - 118.5) <= 1
    enlarged = transform(ramp.crop((0, 0, 28, 28)))[0, 0].float()  # 28 -> 56, nothing cut
    assert enlarged[0] == 0 and enlarged[-1] == 27


def test_augment_changes_with_the_epoch_and_can_be_turned_off(tmp_path):
    write_images(tmp_path / "a", 4, size=(48, 48), seed=1)
    write_images(tmp_path / "b", 4, size=(48, 48), seed=2)
    train = data.load_data(str(tmp_path), size=32).train
    state = torch.get_rng_state()
    first = train[0][0]
    assert torch.equal(first, train[0][0])  # of this epoch
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    loader = data.make_loader(train, 2)
    data.set_epoch(loader, 1)
    assert not torch.equal(first, train[0][0])
    plain = data.load_data(str(tmp_path), size=32, augment=False).train
    still = plain[0][0]
    data.set_epoch(data.make_loader(plain, 2), 1)
    assert torch.equal(still, plain[0][0])


# --- Loaders ------------------------------------------------------------------------------------------------

def order(loader):
    return torch.cat([labels for _, labels in loader]).tolist()


def numbered(count=12):
    return data.Scenes(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), list(range(count)))


def test_loader_order_follows_seed_and_epoch():
    loader = data.make_loader(numbered(), 4, shuffle=True, seed=5)
    zero = order(loader)
    data.set_epoch(loader, 1)
    one = order(loader)
    assert sorted(zero) == sorted(one) == list(range(12)) and zero != one != list(range(12))
    resumed = data.make_loader(numbered(), 4, shuffle=True, seed=5)  # a run that starts at epoch 1
    torch.manual_seed(99)
    data.set_epoch(resumed, 1)
    assert order(resumed) == one
    assert order(data.make_loader(numbered(), 4, shuffle=True, seed=6)) != zero
    assert order(data.make_loader(numbered(), 4)) == list(range(12))


def test_loader_batches():
    assert [len(labels) for _, labels in data.make_loader(numbered(10), 4)] == [4, 4, 2]
    assert [len(labels) for _, labels in data.make_loader(numbered(10), 4, drop_last=True)] == [4, 4]
    # a set smaller than one batch is not dropped altogether
    assert [len(labels) for _, labels in data.make_loader(numbered(3), 4, drop_last=True)] == [3]


def test_workers_give_the_same_images_in_every_epoch(tmp_path):
    write_images(tmp_path / "a", 3, size=(24, 24), seed=1)
    write_images(tmp_path / "b", 3, size=(24, 24), seed=2)

    def epochs(workers):
        train = data.load_data(str(tmp_path), size=16).train
        subset = torch.utils.data.Subset(train, [3, 0, 1])  # as search.py splits
        loader = data.make_loader(subset, 2, shuffle=True, workers=workers)
        for epoch in range(2):
            data.set_epoch(loader, epoch)
            yield torch.cat([images for images, _ in loader])
    for alone, helped in zip(epochs(0), epochs(2), strict=True):
        assert torch.equal(alone, helped)


def test_a_worker_names_a_damaged_file_in_one_sentence(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"damaged")
    with pytest.raises(data.DataError) as error:
        try:
            data.Pictures([tmp_path / "bad.png"])[0]
        except data.DataError:  # what a worker does; a real one that has failed takes torch 5 s to end
            torch._utils.ExceptionWrapper(where="in DataLoader worker process 0").reraise()
    sentence = str(error.value)
    assert sentence.startswith(f"the image {tmp_path / 'bad.png'} is damaged") and "\n" not in sentence


def test_to_float():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    out = data.to_float(images, "cpu")
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, images.float() / 255) and out.max() == 1


# --- Command line -------------------------------------------------------------------------------------------

def test_data_py_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(data.__file__, tmp_path)
    command = [sys.executable, "data.py", "--train-images", "20", "--val-images", "10", "--size", "32"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[1].split() == ["train", "20", "10", "32", "x", "32"]
    with Image.open(tmp_path / "preview.png") as image:
        assert image.size == (10 * 34 + 2, 4 * 34 + 2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["data.py", "preview.png"]


def test_main_shows_a_folder(tmp_path, capsys):
    write_images(tmp_path / "in", 20)
    data.main(["--data", str(tmp_path / "in"), "--size", "16", "--output", str(tmp_path / "out.png")])
    out = capsys.readouterr().out
    assert "train         18        0  16 x 16" in out and "val            2        0  whole images" in out
    assert "no labels" in out
    rows = np.asarray(Image.open(tmp_path / "out.png")).astype(float)
    clean, noisy = rows[2:18, 2:18], rows[2 + 3 * 18:18 + 3 * 18, 2:18]
    assert np.abs(clean - noisy).mean() > 60  # sigma 1 below sigma 0


@pytest.mark.parametrize("arguments, message", [
    (["--data", "absent"], "there is no folder absent"),
    (["--size", "0"], "from 8 to 65536, not 0"),
    (["--size", "large"], "invalid whole number"),
    (["--train-images", "-3"], "a whole number from 1 to"),
    (["--train-images", "2", "--val-images", "1", "--output", "absent/a.png"], "No such file or directory"),
])
def test_wrong_usage_ends_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        data.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error.splitlines()[-1] and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("JOINT_DATA" not in os.environ, reason="JOINT_DATA names no folder with real data")
def test_real_data():
    root = Path(os.environ["JOINT_DATA"])
    scenes = data.load_data("mnist", root=root, train_images=50, val_images=20)
    assert [scenes.train.targets.count(i) for i in range(10)] != [0] * 10 and len(scenes.val) == 20
    images = data.load_data(str(root / "imagenette112"), size=96, train_images=20, val_images=10)
    assert len(images.classes) == 10 and sorted(set(images.train.targets)) == list(range(10))
    batch, labels = next(iter(data.make_loader(images.val, 10)))
    assert batch.shape == (10, 3, 96, 96) and labels.tolist() == list(range(10))


def test_decoded_images_are_kept_as_long_as_they_fit(tmp_path, monkeypatch):
    for index in range(4):
        Image.new("RGB", (10, 10), (60 * index, 0, 0)).save(tmp_path / f"{index}.png")
    pictures = data.Pictures(data.list_images(tmp_path))
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 300)
    first = [pictures[index][0] for index in range(4)]
    reads = []
    original = data.load_image
    monkeypatch.setattr(data, "load_image", lambda path: reads.append(path.name) or original(path))
    assert all(torch.equal(pictures[index][0], first[index]) for index in range(4))
    assert reads == ["2.png", "3.png"]  # the first two were kept


# --- Scenes with two digits ---------------------------------------------------------------------------------

def test_pairs_do_not_overlap_and_boxes_hold_the_digits():
    pairs = data.load_data("digit-pairs", train_images=60, val_images=5)
    assert pairs.size == 96 and len(pairs.classes) == 10 and len(pairs.train) == 60
    seen = set()
    for image, rows in pairs.train:
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        outside = torch.ones(96, 96, dtype=torch.bool)
        for label, left, top, right, bottom in rows.tolist():
            assert (right - left, bottom - top) == (28, 28) and 0 <= left and right <= 96 and 0 <= top and bottom <= 96
            assert outside[top:bottom, left:right].all()  # no overlap
            outside[top:bottom, left:right] = False
            assert image[0, top:bottom, left:right].max() > 150
            seen.add(label)
        background = image[0][outside].unique()
        assert len(background) == 1 and 25 <= background.item() <= 77
    assert seen == set(range(10))


def test_pairs_follow_their_seed():
    first, same, other = (data.load_data("digit-pairs", seed=seed, train_images=6, val_images=2) for seed in (1, 1, 2))
    longer = data.load_data("digit-pairs", seed=1, train_images=9, val_images=2)
    assert torch.equal(first.train.images, same.train.images) and torch.equal(first.train.rows, same.train.rows)
    assert torch.equal(first.train.images, longer.train.images[:6])
    assert not torch.equal(first.train.images, other.train.images)


def test_labels_of_pairs_are_split_into_labels_and_boxes():
    pairs = data.load_data("digit-pairs", train_images=4, val_images=2)
    images, rows = next(iter(data.make_loader(pairs.train, 4)))
    labels, boxes = data.split_labels(rows, "cpu")
    assert images.shape == (4, 3, 96, 96) and labels.shape == (8,) and boxes.shape == (4, 2, 4)
    assert labels.tolist() == [label for _, row in pairs.train for label in row[:, 0].tolist()]
    plain, none = data.split_labels(torch.tensor([3, 1]), "cpu")
    assert plain.tolist() == [3, 1] and none is None


# --- Odd folders --------------------------------------------------------------------------------------------

def test_links_that_loop_are_not_followed(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / "photos" / name, 4)
    (tmp_path / "photos/a/again").symlink_to(tmp_path / "photos")  # all of b would be a's
    (tmp_path / "photos/b/self").symlink_to(tmp_path / "photos/b")
    images = data.load_data(str(tmp_path / "photos"), size=16)
    assert len(images.train) + len(images.val) == 8
    write_images(tmp_path / "elsewhere", 3, seed=5)
    (tmp_path / "photos/b/more").symlink_to(tmp_path / "elsewhere")  # a link that does not loop is followed
    images = data.load_data(str(tmp_path / "photos"), size=16)
    assert len(images.train) + len(images.val) == 11


@pytest.mark.parametrize("kind", ("1x20000", "20000x1", "1x1", "cmyk.jpg", "animated.gif", "16 bit"))
def test_odd_pictures_in_folders_of_any_script_are_read(tmp_path, kind):
    for name in ("\u732b", "\u05e9\u05dc\u05d5\u05dd"):
        write_images(tmp_path / name, 4)
    path = tmp_path / "\u732b" / (kind if "." in kind else f"{kind}.png")
    if kind == "animated.gif":
        Image.new("P", (20, 20)).save(path, save_all=True, append_images=[Image.new("P", (20, 20), 3)])
    elif kind == "16 bit":
        Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(path)
    elif kind == "cmyk.jpg":
        Image.new("CMYK", (20, 20)).save(path)
    else:
        Image.new("RGB", tuple(map(int, kind.split("x")))).save(path)
    images = data.load_data(str(tmp_path), size=16)
    assert len(images.train) + len(images.val) == 9
    for split in (images.train, images.val):
        assert all(image.shape == (3, 16, 16) for image, _ in split)


def test_thousands_of_classes_of_two_pictures_each(tmp_path):
    for index in range(1500):
        folder = tmp_path / f"class {index}"
        folder.mkdir()
        for name in "ab":
            (folder / f"{name}.png").touch()  # not read before they are asked for
    images = data.load_data(str(tmp_path), size=16)
    assert len(images.classes) == len(images.train) == len(images.val) == 1500


@pytest.mark.parametrize("what", ("empty file", "link to nothing"))
def test_a_file_that_cannot_be_read_is_named_before_or_while_training(tmp_path, what):
    for name in ("a", "b"):
        write_images(tmp_path / name, 4)
    bad = tmp_path / "a" / "bad.png"
    bad.touch() if what == "empty file" else bad.symlink_to(tmp_path / "nothing.png")
    images = data.load_data(str(tmp_path), size=16)
    with pytest.raises(data.DataError, match="bad.png"):
        for split in (images.train, images.val):
            list(split)


# --- Kinds of noise -----------------------------------------------------------------------------------------

def test_noise_levels_are_uniform_even_or_chosen():
    def draw(noise, count=3000):
        sigma = noise.sample(count, torch.Generator().manual_seed(0), "cpu")
        assert sigma.shape == (count,) and sigma.dtype == torch.float32
        return sigma
    everything = draw(data.Noise(0.5))
    assert 0 <= everything.min() < 0.01 and 0.49 < everything.max() <= 0.5 and len(everything.unique()) > 2000
    even = draw(data.Noise(0.5, levels=3)).unique()
    assert even.tolist() == [0, 0.25, 0.5]
    chosen = draw(data.Noise(sigmas=(0.1, 0.3, 0.7)))
    assert chosen.unique().tolist() == pytest.approx([0.1, 0.3, 0.7])
    assert all(abs(float((chosen == level).float().mean()) - 1 / 3) < 0.05 for level in chosen.unique())
    assert draw(data.Noise(levels=3, sigmas=(25 / 255,))).unique().tolist() == pytest.approx([25 / 255])  # a fixed level


def test_validation_levels_are_those_of_the_training():
    assert [data.Noise(0.5).validation_sigma(place) for place in (0, 1, 10, 11)] == [0, 0.05, 0.5, 0]
    assert [data.Noise(0.5, sigmas=(0.1, 0.3)).validation_sigma(place) for place in range(3)] == [0.1, 0.3, 0.1]


def test_whether_there_is_noise_and_wrong_noise():
    assert data.Noise() and data.Noise(0.0, sigmas=(0, 0.1)) and not data.Noise(0.0) and not data.Noise(sigmas=(0.0,))
    with pytest.raises(ValueError, match="'salt' is unknown; known are gaussian, poisson-gaussian"):
        data.Noise(kind="salt")
    for wrong in (data.Noise, lambda x: data.Noise(sigmas=(0.1, x)), lambda x: data.Noise(levels=int(x))):
        with pytest.raises(ValueError, match="negative"):
            wrong(-1.0)


def add_in_training(images, sigma):
    generator = torch.Generator().manual_seed(0)
    return data.Noise(kind="poisson-gaussian").add(images, torch.full((len(images),), sigma), generator)


def add_in_evaluation(images, sigma):
    return data.evaluation_draw(images, range(len(images)), kind="poisson-gaussian")(sigma)


@pytest.mark.parametrize("add", [add_in_training, add_in_evaluation])
@pytest.mark.parametrize("sigma", [1.0, 0.2, 2e-4])
def test_poisson_gaussian_noise_has_the_stated_mean_and_variance(add, sigma):
    for brightness in (0, 51, 128, 255):
        images = torch.full((4, 3, 96, 96), brightness / 255)
        error = (add(images, sigma) - images).double()
        expected = sigma**2 * (0.9 * brightness / 255 + 0.1)
        assert error.var().item() == pytest.approx(expected, rel=0.04)
        assert abs(error.mean().item()) < 4 * (expected / error.numel()) ** 0.5
    assert error.std().item() == pytest.approx(sigma, rel=0.02)  # at white


@pytest.mark.parametrize("add", [add_in_training, add_in_evaluation])
def test_poisson_gaussian_photons_come_in_whole_numbers_and_none_without_noise(add):
    images = torch.full((1, 3, 64, 64), 128 / 255)
    assert torch.equal(add(images, 0.0), images)
    skew = ((add(images, 1.0) - images) ** 3).mean()
    assert skew == pytest.approx(0.9**2 * 128 / 255, rel=0.25)  # a^2 x, that of photons; Gaussian noise has none


def test_poisson_gaussian_noise_is_seeded_clipped_and_leaves_darkness_and_layout():
    noise, sigma = data.Noise(kind="poisson-gaussian"), torch.tensor([0.5, 1.0])
    images = (torch.rand(2, 3, 32, 32) - 0.2).contiguous(memory_format=torch.channels_last)  # some below 0
    first, again, other = (noise.add(images, sigma, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.isfinite(first).all()
    assert first.is_contiguous(memory_format=torch.channels_last)
    clipped = noise.add(images, sigma, torch.Generator().manual_seed(1), clip=True)
    assert torch.equal(clipped, first.clamp(0, 1))
    dark = images < 0
    assert (first - images)[1][dark[1]].std().item() == pytest.approx(0.1**0.5, rel=0.1)  # no photons, but read noise


@pytest.mark.parametrize("kind", data.NOISES)
def test_evaluation_noise_of_any_kind_belongs_to_its_image(kind):
    images = data.to_float(torch.randint(256, (5, 3, 20, 24), dtype=torch.uint8), "cpu")
    sigma = torch.linspace(0, 1, 5)
    together = data.evaluation_draw(images, [3, 4, 5, 6, 7], 2, kind)
    for place in range(5):
        alone = data.evaluation_draw(images[place:place + 1], [3 + place], 2, kind)
        assert torch.equal(together(sigma)[place], alone(sigma[place:place + 1])[0])
        assert torch.allclose(together(sigma)[place], alone(float(sigma[place]))[0], atol=1e-6)
    assert torch.equal(together(0.5), together(0.5))
    for places, seed in (([4, 5, 6, 7, 8], 2), ([3, 4, 5, 6, 7], 1)):
        assert not torch.equal(together(0.5)[0], data.evaluation_draw(images, places, seed, kind)(0.5)[0])


def test_evaluation_noise_that_was_once_written_down():
    """Another release or machine must not change published figures."""
    image = torch.full((1, 1, 1, 3), 128 / 255)
    gaussian, poisson = (data.evaluation_draw(image, [0], kind=kind)(0.5).flatten().tolist() for kind in data.NOISES)
    assert gaussian[0] == pytest.approx(128 / 255 - 0.5 * 0.2864522337913513, abs=1e-6)
    assert poisson == pytest.approx([0.85470790, 0.10589665, 0.16972978], abs=1e-6)


def test_the_noise_of_the_literature_is_numpys():
    for shape, sigma in (((3, 9, 13), 25 / 255), ((1, 8, 8), 50 / 255)):
        channels, height, width = shape
        expected = np.random.RandomState(0).normal(0, sigma, (height, width, channels)).transpose(2, 0, 1)
        images = torch.zeros(2, *shape)
        for noisy in data.evaluation_draw(images, [0, 7], seed=5, protocol="literature")(sigma):
            np.testing.assert_allclose(noisy, expected, atol=1e-7)
    with pytest.raises(ValueError, match="take --noise gaussian"):
        data.evaluation_draw(images, [0, 1], kind="poisson-gaussian", protocol="literature")


def parse(*words):
    parser = data.argparse.ArgumentParser()
    data.add_noise_arguments(parser)
    return parser.parse_args(words)


def test_flags_of_the_noise():
    assert data.noise_from(parse()) == data.Noise()
    noise = data.noise_from(parse("--noise", "poisson-gaussian", "--sigma", "50/255", "--sigma-levels", "5"))
    assert noise == data.Noise(50 / 255, 5, (), "poisson-gaussian")
    assert data.noise_from(parse("--sigmas", "30/255", "0.2")).sigmas == (30 / 255, 0.2)


@pytest.mark.parametrize("words", [["--sigma", "1/0"], ["--sigma", "1/2/3"], ["--sigma", "25/"], ["--sigmas", "a/255"],
                                   ["--sigma", "-1/255"], ["--sigma", "0/0"], ["--sigmas"], ["--noise", "salt"]])
def test_wrong_noise_is_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


# --- Grey ---------------------------------------------------------------------------------------------------

def test_grey_is_the_luma_of_itu_r_601(tmp_path):
    for place, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)]):
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"{place}.png")
    Image.fromarray(np.full((9, 9), 200 * 257, dtype=np.uint16)).save(tmp_path / "4.png")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "5.png")
    grey = data.load_everything(tmp_path, grey=True)
    assert grey.channels == 1 and grey.val[0][0].shape == (1, 9, 9) and grey.val[0][0].dtype == torch.uint8
    values = [int(image.unique()) for image, _ in grey.val]
    assert values == [round(0.299 * 255), round(0.587 * 255), round(0.114 * 255), 90, 200, 255]


@pytest.mark.parametrize("labelled", [False, True])
def test_grey_folders(tmp_path, labelled):
    for name in ("a", "b") if labelled else (".",):
        write_images(tmp_path / name, 6, size=(40, 30))
    images = data.load_data(str(tmp_path), size=16, grey=True)
    assert images.train[0][0].shape == (1, 16, 16) and images.channels == 1
    assert images.val[0][0].shape == ((1, 16, 16) if labelled else (1, 30, 40))
    data.preview(images, tmp_path / "preview.png", columns=2)
    assert len(set(Image.open(tmp_path / "preview.png").convert("RGB").tobytes())) > 100


@pytest.mark.parametrize("options, flag", [({"grey": True}, "--grey"), ({"train_folders": ["a"]}, "--train-folders")])
def test_what_is_for_folders_is_refused_for_scenes(options, flag):
    with pytest.raises(data.DataError, match=f"{flag} is for image folders, and mnist-pairs is drawn"):
        data.load_data("mnist-pairs", **options)


# --- Pairs of noisy and clean images ------------------------------------------------------------------------

def write_pairs(folder, count, names, size=(30, 20)):
    """Pictures that are each other's negatives: names(number, "noisy" or "clean") -> the file below folder."""
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        for kind, image in (("clean", pixels), ("noisy", 255 - pixels)):
            path = folder / names(number, kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


PAIR_NAMES = {
    "folders": lambda number, kind: f"{kind}/{number}.png",
    "cc15": lambda number, kind: f"d600_iso3200_{number}_{'real' if kind == 'noisy' else 'mean'}.png",
    "words": lambda number, kind: f"{number}_{kind}.png",
    "sidd": lambda number, kind: f"{number:04}_{'NOISY' if kind == 'noisy' else 'GT'}_SRGB_010.PNG",
}


@pytest.mark.parametrize("names", PAIR_NAMES.values(), ids=PAIR_NAMES)
def test_pairs_are_found_and_transformed_alike(tmp_path, names):
    write_pairs(tmp_path, 20, names)
    images = data.load_data(str(tmp_path), size=16)
    assert images.classes is None and (len(images.train), len(images.val)) == (18, 2)
    assert data.is_paired(images.train) and data.is_paired(torch.utils.data.Subset(images.val, [0]))
    seen = set()
    for epoch in range(3):
        loader = data.make_loader(images.train, 6, shuffle=True)
        data.set_epoch(loader, epoch)
        for batch, labels in loader:
            assert batch.shape == (6, 2, 3, 16, 16) and batch.dtype == torch.uint8 and set(labels.tolist()) == {-1}
            clean, noisy = data.split_pair(batch)
            assert torch.equal(clean, 255 - noisy)
            seen |= {image.numpy().tobytes() for image in clean}
    assert len(seen) > 45  # of 54: every epoch cuts elsewhere, now and then where it did before
    whole = images.val[0][0]
    expected = np.asarray(data.load_image(images.val.paths[0]))
    assert np.array_equal(whole[0].permute(1, 2, 0), expected) and np.array_equal(whole[1].permute(1, 2, 0), 255 - expected)
    assert data.load_data(str(tmp_path), size=16, grey=True).train[0][0].shape == (2, 1, 16, 16)


def test_pairs_in_splits_and_single_images_beside_them(tmp_path):
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        write_pairs(tmp_path / split, count, PAIR_NAMES["folders"])
    images = data.load_data(str(tmp_path), size=16)
    assert (len(images.train), len(images.val), len(images.test)) == (4, 3, 2) and data.is_paired(images.test)
    everything = data.load_everything(tmp_path)
    assert len(everything.val) == 9 and data.is_paired(everything.val)
    shutil.rmtree(tmp_path / "val")
    write_images(tmp_path / "val", 3)
    with pytest.raises(data.DataError, match="one holds pairs of noisy and clean images, the other single images"):
        data.load_data(str(tmp_path), size=16)


@pytest.mark.parametrize("names", PAIR_NAMES.values(), ids=PAIR_NAMES)
@pytest.mark.parametrize("kind", ["noisy", "clean"])
def test_a_missing_partner_is_named(tmp_path, names, kind):
    write_pairs(tmp_path, 4, names)
    (tmp_path / names(2, kind)).unlink()
    left = names(2, "clean" if kind == "noisy" else "noisy")
    with pytest.raises(data.DataError, match=f"{left} has no {kind} one") as error:
        data.load_data(str(tmp_path), size=16)
    assert "\n" not in str(error.value)


def test_a_stray_a_double_and_a_differing_size_are_named(tmp_path):
    write_pairs(tmp_path, 4, PAIR_NAMES["words"])
    shutil.copy(tmp_path / "1_noisy.png", tmp_path / "stray.png")
    with pytest.raises(data.DataError, match="stray.png has no noisy one"):
        data.load_data(str(tmp_path))
    (tmp_path / "stray.png").rename(tmp_path / "1_noisy.bmp")
    with pytest.raises(data.DataError, match="1_noisy.bmp and .*1_noisy.png are the same side of one pair"):
        data.load_data(str(tmp_path))
    (tmp_path / "1_noisy.bmp").unlink()
    Image.new("RGB", (30, 21)).save(tmp_path / "1_noisy.png")
    images = data.load_everything(tmp_path).val
    with pytest.raises(data.DataError, match="1_noisy.png has 30 x 21 pixels and its clean one 30 x 20"):
        images[1]
    assert images[0][0].shape == (2, 3, 20, 30)


def test_words_in_names_that_are_no_pairs(tmp_path):
    for name in ("surreal", "surmean", "realm", "meanm", "real_1", "mean_2", "clean"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    images = data.load_data(str(tmp_path), size=16)
    assert not data.is_paired(images.train) and len(images.train) + len(images.val) == 7
    for name in ("clean", "noisy", "other"):  # class folders
        write_images(tmp_path / "classes" / name, 4)
    assert data.load_data(str(tmp_path / "classes"), size=16).classes == ["clean", "noisy", "other"]


def test_the_preview_shows_pairs(tmp_path, capsys):
    write_pairs(tmp_path / "in", 12, PAIR_NAMES["cc15"])
    data.main(["--data", str(tmp_path / "in"), "--size", "16", "--output", str(tmp_path / "out.png")])
    assert "clean above noisy" in capsys.readouterr().out
    rows = np.asarray(Image.open(tmp_path / "out.png"))
    assert rows.shape[0] == 2 * 18 + 2 and np.array_equal(rows[2:18, 2:18], 255 - rows[20:36, 2:18])


# --- Crops and training folders -----------------------------------------------------------------------------

def test_several_crops_of_an_image_are_different_and_follow_the_epoch(tmp_path):
    write_images(tmp_path, 10, size=(60, 50))
    once, often = (data.load_data(str(tmp_path), size=12, crops=crops).train for crops in (1, 4))
    assert len(once) == 9 and len(often) == len(often.targets) == 36
    assert torch.equal(once[3][0], often[3][0])  # the first of them are those that one crop gives
    crops = [often[index][0].numpy().tobytes() for index in range(36)]
    assert len(set(crops)) == 36
    source = np.asarray(data.load_image(often.paths[3])).reshape(-1, 3)
    assert all((often[index][0].flatten(1).T.numpy()[:, None] == source).all(2).any(1).all() for index in (3, 12, 21, 30))
    data.set_epoch(data.make_loader(often, 4), 1)
    assert not {often[index][0].numpy().tobytes() for index in range(36)} & set(crops)
    assert len(data.load_data(str(tmp_path), size=12, crops=4).val) == 1  # whole images, once
    with pytest.raises(IndexError):
        often[36]


def test_labelled_and_drawn_images_come_once_whatever_the_crops(tmp_path):
    make(tmp_path, "a", "b")
    for name in (str(tmp_path), "digits"):
        one, two = (data.load_data(name, size=16, train_images=4, val_images=2, crops=crops).train for crops in (1, 2))
        assert len(one) == len(two)


def test_twins_share_the_room_for_decoded_images(tmp_path, monkeypatch):
    make(tmp_path, *(f"{n}" for n in range(2)))
    train = data.load_data(str(tmp_path), size=16).train
    one, other = train, data.twin(train)
    one[0]
    assert other.decoded_bytes[0] == one.decoded_bytes[0] > 0


def test_unlabelled_images_come_in_all_eight_positions(tmp_path):
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10, :10], pixels[:10, 10:] = 255, 100
    for index in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    train = data.load_data(str(tmp_path), size=20).train
    seen = set()
    for epoch in range(100):
        train.epoch.fill_(epoch)
        image = train[0][0][0]
        seen.add((image[0, 0].item(), image[0, -1].item(), image[-1, 0].item(), image[-1, -1].item()))
    assert seen == {(255, 100, 0, 0), (100, 255, 0, 0), (0, 0, 255, 100), (0, 0, 100, 255),
                    (255, 0, 100, 0), (100, 0, 255, 0), (0, 255, 0, 100), (0, 100, 0, 255)}


def test_crops_of_an_image_stay_on_one_side_of_a_split(tmp_path):
    write_images(tmp_path, 12, size=(30, 30))
    train = data.load_data(str(tmp_path), size=12, crops=3).train
    first, second = data.split_dataset(train, 0.8, seed=0)
    assert sorted(first + second) == list(range(len(train))) and len(second) == 2 * 3
    assert not {index % 11 for index in first} & {index % 11 for index in second}
    digit_scenes = digits().train
    assert data.split_dataset(digit_scenes, 0.8, 0) == data.stratified_split(digit_scenes.targets, 0.8, 0)


@pytest.mark.parametrize("size", [8, 17, 49, 100])
def test_crops_of_any_size(tmp_path, size):
    write_images(tmp_path, 4, size=(64, 48))
    assert data.load_data(str(tmp_path), size=size).train[0][0].shape == (3, size, size)


def test_training_folders_are_put_together_and_val_is_left_alone(tmp_path):
    for place, (name, count) in enumerate((("train", 12), ("val", 5), ("test", 8), ("more", 6))):
        write_images(tmp_path / name, count, seed=place)

    def folders(dataset):
        return {path.parent.name for path in dataset.paths}
    plain = data.load_data(str(tmp_path), size=16)
    assert (len(plain.train), len(plain.val), len(plain.test)) == (12, 5, 8)
    images = data.load_data(str(tmp_path), size=16, train_folders=["train", "test"])
    assert (len(images.train), len(images.val), images.test) == (18, 2, None)
    assert folders(images.train) | folders(images.val) == {"train", "test"}
    assert not set(images.train.paths) & set(images.val.paths)
    assert images.val.paths == data.load_data(str(tmp_path), size=16, train_folders=["train", "test"]).val.paths
    images = data.load_data(str(tmp_path), size=16, train_folders=["val", "more"])
    assert folders(images.train) | folders(images.val) == {"val", "more"} and len(images.test) == 8
    with pytest.raises(data.DataError, match="--train-folders: there is no folder .*absent"):
        data.load_data(str(tmp_path), size=16, train_folders=["train", "absent"])


def test_training_folders_with_classes_must_agree(tmp_path):
    make(tmp_path, "train/a", "train/b", "more/a", "more/b", "other/a", "other/c")
    images = data.load_data(str(tmp_path), size=16, train_folders=["train", "more"])
    assert images.classes == ["a", "b"] and len(images.train) + len(images.val) == 8
    with pytest.raises(data.DataError, match=r"classes of .*train and .*other differ \(b, c\)"):
        data.load_data(str(tmp_path), size=16, train_folders=["train", "other"])


def test_everything_below_a_folder(tmp_path):
    for name, count in (("train", 3), ("val/deep", 2), (".", 1)):
        write_images(tmp_path / name, count, size=(20, 15))
    images = data.load_everything(tmp_path)
    assert len(images.val) == 6 and images.classes is None and images.val[0][0].shape == (3, 15, 20)
    (tmp_path / "empty").mkdir()
    for name, message in ((tmp_path / "empty", "holds no images"), (tmp_path / "absent", "no folder"),
                          ("digits", "take one")):
        with pytest.raises(data.DataError, match=message):
            data.load_everything(name)


def test_what_a_record_holds_of_images_comes_back_as_flags():
    parser = argparse.ArgumentParser()
    data.add_data_arguments(parser)
    data.add_noise_arguments(parser)
    args = parser.parse_args(["--grey", "--crops", "3", "--train-folders", "a", "b", "--sigmas", "25/255", "0.1"])
    kept = json.loads(json.dumps(data.image_flags(args)))
    again = parser.parse_args(data.as_command_line(kept))
    assert data.image_flags(again) == data.image_flags(args) and again.sigmas == [25 / 255, 0.1]
    kept["sigma"] = 0.3
    assert "sigmas" not in data.without_what_changed(kept, ["--sigma=0.5"], True)
    assert set(kept) - set(data.without_what_changed(kept, [], False)) == {"crops", "train_folders"}
    assert data.without_what_changed(kept, ["--epochs", "3"], True) == kept
    assert data.as_command_line({"resume": "x", "grey": False, "crops": None}) == [] == data.as_command_line("nonsense")
