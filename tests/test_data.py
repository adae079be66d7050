"""data.py: noise, splits, scenes, image files, folders, loaders, flags, its own command; CPU, no network."""
import argparse
import functools
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
import search


def write_images(folder, count, size=(20, 16), seed=0, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03}{suffix}")


def write_folders(root, *folders, empty=(), count=2):
    for folder in folders:
        write_images(root / folder, count)
    for folder in empty:
        (root / folder).mkdir(parents=True)


def write_pairs(folder, count, names, size=(30, 20)):
    """Pictures that are each other's negatives: names(number, "noisy" or "clean") -> file below folder."""
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        for kind, image in (("clean", pixels), ("noisy", 255 - pixels)):
            path = folder / names(number, kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def load(folder, size=16, **options):
    return data.load_data(str(folder), size=size, **options)


def files(dataset):
    return [str(Path(*file[0].parts[-2:])) for file in dataset.files]


def counts(loaded):
    return tuple(len(getattr(loaded, split)) for split in data.SPLITS)


def check_apart(*datasets):
    """No file is in two of the datasets."""
    every = [file for dataset in datasets for pair in dataset.files for file in pair]
    assert len(set(every)) == len(every)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Scenes -------------------------------------------------------------------------------------------------

@functools.cache
def digits(name="digits", splits=data.VERSION, **options):
    return data.load_data(name, **{"train_images": 20, "val_images": 10, "test_images": 10,
                                   "kept": {"splits": splits}, **options})


def test_digits_have_ten_classes_and_the_stated_shape():
    scenes = digits()
    image, label = scenes.train[13]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and label == 3
    assert scenes.train.targets == [i % 10 for i in range(20)] and counts(scenes) == (20, 10, 10)
    assert scenes.classes == list("0123456789") and scenes.size == 64 and scenes.channels == 3
    assert digits(size=96).train[0][0].shape == (3, 96, 96)


@pytest.mark.parametrize("name", ["digits", "digit-pairs"])
def test_scenes_follow_the_seed_and_fewer_are_a_prefix_of_more(name):
    first, again = digits(name), data.load_data(name, train_images=20, val_images=10, test_images=10)
    other, fewer = digits(name, seed=1).train, digits(name, train_images=7).train
    for split in data.SPLITS:
        assert torch.equal(getattr(first, split).images, getattr(again, split).images)
    assert all(not torch.equal(a, b) for a, b in zip(first.train.images, other.images))
    assert torch.equal(first.train.images[:7], fewer.images)
    assert torch.equal(torch.as_tensor(first.train.labels)[:7], torch.as_tensor(fewer.labels))


def test_folders_that_are_in_no_split_are_named(tmp_path):
    for name in ("train/cat", "train/dog", "bus", "empty"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4 if name != "empty" else 0):
            Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    sources = data.load_data(str(tmp_path), size=8).sources
    assert sources["train"].endswith("/train, without bus")


@pytest.mark.parametrize("name", ["digits", "digit-pairs"])
def test_no_scene_is_in_two_splits_and_what_is_test_now_was_val(name):
    scenes, old = digits(name), digits(name, splits=1)
    images = torch.cat([getattr(scenes, split).images for split in data.SPLITS]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 40
    for split, was in (("train", "train"), ("test", "val"), ("test", "test")):
        assert torch.equal(getattr(scenes, split).images, getattr(old, was).images)
    assert list(scenes.sources) == list(data.SPLITS)


def test_random_numbers_of_the_scenes_are_those_of_before_there_were_three_splits():
    """Computed by the code of that time; another release or machine must not change them."""
    old = digits("digit-pairs", splits=1, seed=3)
    assert old.train.labels[0].tolist() == [[8, 51, 67, 79, 95], [0, 66, 7, 94, 35]]
    assert old.val.labels[7].tolist() == [[0, 68, 53, 96, 81], [6, 8, 40, 36, 68]]
    scenes = digits(size=32, seed=3, splits=1)
    greys = torch.cat([scenes.train.images[:6, 0], scenes.val.images[:6, 0]]).flatten(1).mode().values
    assert greys.tolist() == [38, 46, 49, 53, 67, 55, 46, 66, 62, 70, 72, 27]


def test_a_scene_is_a_brighter_digit_on_constant_grey():
    images = digits(train_images=100).train.images
    for image in images:
        corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        background = corners.flatten().mode().values
        assert 25 <= background <= 77  # 0.1 ... 0.3
        ink = (image != background).any(0)  # (H, W)
        assert 0.4 * 64 <= ink.any(1).sum() <= 0.87 * 64 and 0.01 < ink.float().mean() < 0.5
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


def fake_mnist(monkeypatch, count=30, classes=3):
    class Fake:  # as torchvision's MNIST, without files; the test set has other labels
        def __init__(self, root, train, download=False):
            digit = torch.zeros(28, 28, dtype=torch.uint8)
            digit[4:24, 10:14] = 255
            self.data = digit.expand(count, 28, 28)
            self.targets = torch.arange(count) % classes + (0 if train else classes)
    monkeypatch.setattr(data.datasets, "MNIST", Fake)


def test_mnist_scenes_are_placed_digits_and_val_is_a_tenth_of_the_training_set(tmp_path, monkeypatch):
    fake_mnist(monkeypatch)
    scenes = data.load_data("mnist", root=tmp_path)
    assert counts(scenes) == (27, 3, 30)  # all by default
    assert sorted(scenes.val.targets) == [0, 1, 2] and set(scenes.test.targets) == {3, 4, 5}
    ink = (scenes.train[0][0] != scenes.train[0][0].flatten().mode().values).any(0)
    assert abs(int(ink.any(1).sum()) / int(ink.any(0).sum()) - 5) < 1.0  # 20 x 4 pixels, enlarged
    fewer, again = (data.load_data("mnist", root=tmp_path, train_images=9, val_images=2) for _ in range(2))
    assert sorted(fewer.train.targets) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(fewer.val) == 2  # in proportion
    assert torch.equal(fewer.train.images, again.train.images)
    old = data.load_data("mnist", root=tmp_path, kept={"splits": 1})
    assert counts(old) == (30, 30, 30) and torch.equal(old.val.images, scenes.test.images)
    # the labels tell which digits are used
    blank = np.zeros((3, 64, 64), dtype=np.uint8)
    monkeypatch.setattr(data.scenes, "render_scene", lambda index, *_: (blank, index))
    scenes = data.load_data("mnist", root=tmp_path, train_images=20)
    assert not set(scenes.train.targets) & set(scenes.val.targets)
    assert scenes.val.targets == data.load_data("mnist", root=tmp_path, train_images=1).val.targets
    assert "a tenth of MNIST's training set" == scenes.sources["val"] and "test set" in scenes.sources["test"]


def test_val_of_mnist_pairs_has_digits_that_train_does_not_use(tmp_path, monkeypatch):
    monkeypatch.setitem(data.SCENES, "mnist-pairs", (96, (200, 40, 5), (2, 5, 3)))
    fake_mnist(monkeypatch, 3000, 3000)

    def used(**options):
        scenes = data.load_data("mnist-pairs", root=tmp_path, **options)
        return [set(getattr(scenes, split).labels[..., 0].flatten().tolist()) for split in data.SPLITS]
    train, val, test = used()
    assert not train & val and min(test) >= 3000 > max(train | val) and len(val) > 70
    fewer, same_val, _ = used(train_images=20)
    assert fewer < train and same_val == val
    more, other_val, _ = used(train_images=600)
    assert train < more and not more & other_val
    fake_mnist(monkeypatch)
    with pytest.raises(data.DataError, match="leave no digit for val"):
        used()


def test_mnist_without_files_and_network_is_one_sentence(tmp_path, monkeypatch):
    def missing(root, train, download=False):
        raise RuntimeError("Dataset not found." if not download else "no\nnetwork")
    monkeypatch.setattr(data.datasets, "MNIST", missing)
    with pytest.raises(data.DataError, match=r"MNIST was not found under .*\(network\).*--data-root"):
        data.load_data("mnist", root=tmp_path)


def test_pairs_do_not_overlap_and_boxes_hold_the_digits():
    pairs = digits("digit-pairs", train_images=60)
    assert pairs.size == 96 and len(pairs.classes) == 10 and isinstance(pairs.train, data.Pairs)
    seen = set()
    for image, rows in pairs.train:
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        outside = torch.ones(96, 96, dtype=torch.bool)
        for label, left, top, right, bottom in rows.tolist():
            assert (right - left, bottom - top) == (28, 28) and min(left, top) >= 0 >= max(right, bottom) - 96
            assert outside[top:bottom, left:right].all()  # no overlap
            outside[top:bottom, left:right] = False
            assert image[0, top:bottom, left:right].max() > 150
            seen.add(label)
        background = image[0][outside].unique()
        assert len(background) == 1 and 25 <= background.item() <= 77
    images, rows = next(iter(data.make_loader(pairs.train, 4)))
    labels, boxes = data.split_labels(rows, "cpu")
    assert images.shape == (4, 3, 96, 96) and boxes.shape == (4, 2, 4)
    assert labels.tolist() == pairs.train.labels[:4, :, 0].flatten().tolist()
    plain, none = data.split_labels(torch.tensor([3, 1]), "cpu")
    assert plain.tolist() == [3, 1] and none is None
    assert seen == set(range(10)) and pairs.train.targets == pairs.train.labels[:, 0, 0].tolist()
    with pytest.raises(data.DataError, match="two digits need images of 56 pixels or more, not 50"):
        data.load_data("digit-pairs", size=50)


# --- Noise --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", data.NOISES)
def test_training_noise_has_the_sigma_of_each_image(kind):
    noise = data.Noise(sigmas=(0.0, 0.1, 0.5, 1.0), kind=kind)
    images = torch.ones(40, 3, 64, 128).contiguous(memory_format=torch.channels_last)
    images[:, :, :20] = -0.2
    before = images.clone()
    noisy = noise.add_random(images, generator(1))
    assert torch.equal(images, before) and noisy.is_contiguous(memory_format=torch.channels_last)
    levels, error = noise.sample_sigmas(40, generator(1)), noisy - images  # sigma is drawn first
    assert levels.unique().tolist() == torch.tensor(noise.sigmas).tolist()
    assert torch.equal(noisy[levels == 0], images[levels == 0]) and torch.isfinite(noisy).all()
    if kind == "camera":
        levels = levels * ((2 * 0.78**2 + 0.62**2) / 3) ** 0.5
    assert torch.allclose(error[:, :, 22:].std((1, 2, 3)), levels, rtol=0.05)
    dark = 1 if kind == "gaussian" else 0.1**0.5  # below 0 there is read noise alone
    assert torch.allclose(error[:, :, :18].std((1, 2, 3)), dark * levels, rtol=0.06)
    assert (error.mean((1, 2, 3)).abs() < 0.05).all() and noisy.min() < -1 and noisy.max() > 2  # not clipped
    assert torch.equal(noisy, noise.add_random(images, generator(1)))
    assert not torch.equal(noisy, noise.add_random(images, generator(2)))
    assert data.Noise(0.0, kind=kind).add_random(images, generator()) is images


def test_noise_levels_are_uniform_even_or_chosen():
    def draw(noise, count=3000):
        sigma = noise.sample_sigmas(count, generator())
        assert sigma.shape == (count,) and sigma.dtype == torch.float32
        return sigma
    everything = draw(data.Noise(0.5))
    assert 0 <= everything.min() < 0.01 and 0.49 < everything.max() <= 0.5 and len(everything.unique()) > 2000
    assert abs(float(everything.mean()) - 0.25) < 0.01
    assert draw(data.Noise(0.5, levels=3)).unique().tolist() == [0, 0.25, 0.5]
    values, times = draw(data.Noise(1.0, 11), 4000).unique(return_counts=True)  # evenly distributed
    torch.testing.assert_close(values, torch.arange(11) / 10)
    assert times.min() > 4000 / 11 * 0.8
    chosen = draw(data.Noise(sigmas=(0.1, 0.3, 0.7)))
    assert chosen.unique().tolist() == pytest.approx([0.1, 0.3, 0.7])
    assert all(abs(float((chosen == level).float().mean()) - 1 / 3) < 0.05 for level in chosen.unique())
    fixed = draw(data.Noise(levels=3, sigmas=(25 / 255,)))
    assert fixed.unique().tolist() == pytest.approx([25 / 255])


def test_validation_levels_whether_there_is_noise_and_wrong_noise():
    assert [data.Noise(0.5).validation_sigma(place) for place in (0, 1, 10, 11)] == [0, 0.05, 0.5, 0]
    assert [data.Noise(sigmas=(0.1, 0.3)).validation_sigma(place) for place in range(3)] == [0.1, 0.3, 0.1]
    assert data.Noise() and data.Noise(0.0, sigmas=(0, 0.1))
    assert not data.Noise(0.0) and not data.Noise(sigmas=(0.0,))
    with pytest.raises(ValueError, match="'salt' is unknown; known are gaussian, poisson-gaussian, camera"):
        data.Noise(kind="salt")
    for wrong in (data.Noise, lambda x: data.Noise(sigmas=(0.1, x)), lambda x: data.Noise(levels=int(x))):
        with pytest.raises(ValueError, match="negative"):
            wrong(-1.0)
    with pytest.raises(ValueError, match="give --sigmas, not --sigma-levels 1"):
        data.Noise(levels=1)


def test_noise_and_its_levels_in_words():
    assert data.format_sigmas([0, 0.1, 0.25, 1.0]) == ["0", "0.1", "0.25", "1"]
    assert data.format_sigmas([15 / 255]) == ["15/255"] and data.format_sigmas([51 / 255]) == ["0.2"]
    assert data.format_sigmas([0, 15 / 255, 0.2, 0.1]) == ["0/255", "15/255", "51/255", "25.5/255"]
    assert data.format_sigmas([0.12345, 0.2]) == ["0.12345", "0.2"]  # no whole number of 255 levels
    for level in (15 / 255, 0.1, 0.125, 0.12345, 70 / 255):  # what is printed can be typed
        assert data.number(0, 1)(data.format_sigmas([level])[0]) == pytest.approx(level, abs=1e-7)
    assert data.Noise().describe() == "gaussian noise, sigma in [0, 1]"
    noise = data.Noise(sigmas=(15 / 255, 25 / 255), kind="poisson-gaussian")
    assert noise.describe() == "poisson-gaussian noise, sigma 15/255 or 25/255"
    assert data.Noise(0.0).describe() == "no noise"


def fixed(images, places, seed=0, kind="gaussian", **options):
    return data.Noise(kind=kind).add_fixed(images, places, seed, **options)


@pytest.mark.parametrize("kind", data.NOISES)
def test_fixed_noise_belongs_to_its_image(kind):
    images = data.to_float(torch.randint(256, (5, 3, 20, 24), dtype=torch.uint8), "cpu")
    sigma, before = torch.linspace(0, 1, 5), images.clone()
    together = fixed(images, [3, 4, 5, 6, 7], 2, kind)
    clipped = fixed(images, [3, 4, 5, 6, 7], 2, kind, clip=True)(0.5)
    assert torch.equal(clipped, together(0.5).clamp(0, 1)) and clipped.min() == 0 and clipped.max() == 1
    assert torch.equal(together(0), images) and together(0.5).is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(123)
    for place in range(5):  # the same for every batch size, and for one sigma or many
        alone = fixed(images[place:place + 1], [3 + place], 2, kind)
        assert torch.equal(together(sigma)[place], alone(sigma[place:place + 1])[0])
        assert torch.allclose(together(sigma)[place], alone(float(sigma[place]))[0], atol=1e-6)
    assert torch.equal(together(0.5), together(0.5))
    for places, seed in (([4, 5, 6, 7, 8], 2), ([3, 4, 5, 6, 7], 1)):
        assert not torch.equal(together(0.5)[0], fixed(images, places, seed, kind)(0.5)[0])
    error = fixed(torch.ones(2, 3, 60, 72), [3, 4], 2, kind)(0.5) - 1
    assert abs(torch.corrcoef(error.flatten(1))[0, 1]) < 0.1  # no part of it comes twice
    assert torch.equal(images, before)  # the input is left alone


def test_fixed_noise_is_that_which_was_once_written_down():
    """Another release or machine must not change published figures."""
    image = torch.full((1, 1, 1, 3), 128 / 255)
    gaussian, poisson, camera = (fixed(image, [0], kind=kind)(0.5).flatten().tolist() for kind in data.NOISES)
    assert gaussian[0] == pytest.approx(128 / 255 - 0.5 * 0.2864522337913513, abs=1e-6)
    assert poisson == pytest.approx([0.85470790, 0.10589665, 0.16972978], abs=1e-6)
    assert camera == pytest.approx([0.77982676, 0.18716106, 0.16334644], abs=1e-6)
    # and that of the literature is numpy's
    for shape, sigma in (((3, 9, 13), 25 / 255), ((1, 8, 8), 50 / 255)):
        channels, height, width = shape
        expected = np.random.RandomState(0).normal(0, sigma, (height, width, channels)).transpose(2, 0, 1)
        images = torch.zeros(2, *shape)
        for noisy in fixed(images, [0, 7], seed=5, protocol="literature")(sigma):
            np.testing.assert_allclose(noisy, expected, atol=1e-7)
    with pytest.raises(ValueError, match="take --noise gaussian"):
        fixed(images, [0, 1], kind="poisson-gaussian", protocol="literature")


@pytest.mark.parametrize("down", (0, 1))
@pytest.mark.parametrize("right", (0, 1))
def test_a_mosaic_becomes_colours_by_interpolation(down, right):
    ramps = torch.stack([torch.arange(12.0).expand(9, 12), torch.arange(9.0)[:, None].expand(9, 12),
                         torch.full((9, 12), 5.0)])[None]
    places = torch.tensor([[down, right]])
    found = data.demosaic(ramps, places)
    torch.testing.assert_close(found[..., 2:-2, 2:-2], ramps[..., 2:-2, 2:-2])  # slopes stay
    images, seen = torch.rand(1, 3, 8, 10), torch.zeros(1, 3, 8, 10)
    colours = data.demosaic(images, places)
    up, left = 1 - down, 1 - right
    for colour, y, x in ((0, down, right), (1, down, left), (1, up, right), (2, up, left)):
        site = slice(None), colour, slice(y, None, 2), slice(x, None, 2)
        torch.testing.assert_close(colours[site], images[site])
        seen[site] = images[site]
    torch.testing.assert_close(data.demosaic(seen, places), colours)  # one colour a pixel is all it takes


def test_the_noise_of_a_camera_spreads_over_pixels_and_colours():
    images = torch.full((8, 3, 96, 96), 128 / 255)
    for kind, near, colours, spread in (("poisson-gaussian", 0, (0, 0), (1, 1, 1)),
                                        ("camera", 0.58, (0.42, 0.22), (0.78, 0.62, 0.78))):
        noise = (fixed(images, range(8), kind=kind)(0.2) - images).transpose(0, 1)
        beside = torch.stack((noise[..., :-1].flatten(), noise[..., 1:].flatten()))
        assert torch.corrcoef(beside)[0, 1].item() == pytest.approx(near, abs=0.02)
        assert torch.corrcoef(noise.flatten(1))[0, 1:].tolist() == pytest.approx(colours, abs=0.03)
        sensor = 0.2 * (0.9 * 128 / 255 + 0.1) ** 0.5
        assert (noise.flatten(1).std(1) / sensor).tolist() == pytest.approx(spread, rel=0.03)
    grey = fixed(images[:, :1], range(8), kind="camera")(0.2) - images[:, :1]
    assert (grey.std() / sensor).item() == pytest.approx(0.66, rel=0.03)
    for size in ((1, 1), (1, 5), (2, 1)):  # too small for a mosaic
        assert fixed(torch.rand(1, 3, *size), [0], kind="camera")(0.2).isfinite().all()


def add_in_training(images, sigma):
    return data.Noise(sigmas=(sigma,), kind="poisson-gaussian").add_random(images, generator())


def add_in_evaluation(images, sigma):
    return fixed(images, range(len(images)), kind="poisson-gaussian")(sigma)


@pytest.mark.parametrize("add", [add_in_training, add_in_evaluation])
def test_poisson_gaussian_noise_has_the_stated_mean_variance_and_skewness(add):
    for sigma in (1.0, 0.2, 2e-4):
        for brightness in (0, 51, 128, 255):
            images = torch.full((4, 3, 96, 96), brightness / 255)
            error = (add(images, sigma) - images).double()
            expected = sigma**2 * (0.9 * brightness / 255 + 0.1)
            assert error.var().item() == pytest.approx(expected, rel=0.04)
            assert abs(error.mean().item()) < 4 * (expected / error.numel()) ** 0.5
        assert error.std().item() == pytest.approx(sigma, rel=0.02)  # at white
    images = torch.full((1, 3, 64, 64), 128 / 255)
    assert torch.equal(add(images, 0.0), images)
    skew = ((add(images, 1.0) - images) ** 3).mean()
    assert skew == pytest.approx(0.9**2 * 128 / 255, rel=0.25)  # a^2 x, of photons; Gaussian noise has none


@pytest.mark.cuda
def test_noise_on_the_gpu():
    there, images = torch.Generator("cuda").manual_seed(0), torch.ones(2, 3, 128, 128, device="cuda")
    for kind in data.NOISES:
        for sigma in (1.0, 0.1, 1e-4, 1e-6):
            noisy = data.Noise(sigmas=(sigma,), kind=kind).add_random(images, there)
            assert noisy.is_cuda  # 1e-6: float32 has no more digits at 1
            left = ((2 * 0.78**2 + 0.62**2) / 3) ** 0.5 if kind == "camera" else 1
            assert (noisy - 1).std().item() == pytest.approx(left * sigma, rel=0.05, abs=1e-7)
        pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        here, far = (fixed(data.to_float(pixels, device), [0, 1], kind=kind)(0.3).cpu()
                     for device in ("cpu", "cuda"))
        assert torch.allclose(here, far, atol=1e-6)


def test_scale_makes_the_input_smaller_before_there_is_noise():
    images = data.to_float(torch.randint(256, (2, 3, 12, 18), dtype=torch.uint8), "cpu")
    noise, small = data.Noise(sigmas=(0.1,), scale=3), data.shrink(images, 3)
    assert torch.equal(small, (small * 255).round() / 255)  # 8-bit values
    assert small.shape == (2, 3, 4, 6) and data.enlarge(small, 3).shape == images.shape
    assert torch.equal(data.Noise(0.0, scale=3).add_random(images, generator()), small)
    assert torch.equal(noise.add_random(images, generator()),
                       data.Noise(sigmas=(0.1,)).add_random(small, generator()))
    assert torch.equal(noise.add_fixed(images, [4, 5])(0.2), fixed(small, [4, 5])(0.2))
    pixels = images.mul(255).to(torch.uint8)[:, :, :11, :17]
    clean, noisy = data.clean_and_noisy(pixels, [4, 5], "cpu", noise, seed=3, clip=True)
    assert clean.shape == (2, 3, 9, 15) and noisy(0.1).shape == (2, 3, 3, 5) and noisy(1.0).max() == 1
    with pytest.raises(ValueError, match="17 x 11 pixels cannot be made 3 times smaller"):
        data.shrink(images[:, :, :11, :17], 3)


# --- Splits -------------------------------------------------------------------------------------------------

def test_stratified_split_is_disjoint_seeded_and_proportional():
    targets = [0] * 50 + [1] * 20 + [2] * 2 + [3] + [-1] * 10
    first, second = data.stratified_split(targets, 0.8, seed=0)
    assert sorted(first + second) == list(range(len(targets))) and not set(first) & set(second)
    count = {label: sum(targets[i] == label for i in first) for label in set(targets)}
    assert count == {0: 40, 1: 16, 2: 1, 3: 1, -1: 8}
    assert (first, second) == data.stratified_split(targets, 0.8, seed=0)
    assert first != data.stratified_split(targets, 0.8, seed=1)[0]
    for fraction in (0, 1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            data.stratified_split([0, 1], fraction, 0)


def touch(root, **folders):
    """Empty files, which are enough to split."""
    for name, count in folders.items():
        for i in range(count):
            path = root / name.replace("__", "/") / f"{i:02}.png"
            if i == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def test_the_side_of_an_image_depends_on_itself(tmp_path):
    touch(tmp_path, a=200, b=300, c=3, d=2)
    images = load(tmp_path)
    check_apart(images.train, images.val, images.test)
    assert all(35 < count < 65 for count in counts(images)[1:]) and sum(counts(images)) == 505
    for split in data.SPLITS:  # the class of two is in train and test
        count = [getattr(images, split).targets.count(label) for label in range(4)]
        assert count[2:] == ([1, 0] if split == "val" else [1, 1]) and count[0] and count[1]
    other = load(tmp_path, seed=1)
    assert files(other.val) == files(images.val) and files(other.test) == files(images.test)
    assert images.sources["test"] == images.sources["val"] == f"a tenth of {tmp_path}"
    for name in ("a/07.png", "b/100.png", files(images.test)[0]):
        (tmp_path / name).unlink()
    touch(tmp_path, e=40)
    fewer = load(tmp_path)
    for split in data.SPLITS:
        left = set(files(getattr(fewer, split)))
        assert {file for file in left if file[0] != "e"} == {
            file for file in files(getattr(images, split)) if (tmp_path / file).exists()}


def test_the_files_of_a_folder_are_listed_and_what_has_changed_is_said(tmp_path):
    write_images(tmp_path / "a", 30)
    write_images(tmp_path / "b", 30, size=(24, 20))
    images = load(tmp_path)
    again = load(tmp_path, kept={"splits": 3, "images": images.files})
    assert again.changes == "" and again.files == images.files
    assert all(files(getattr(images, split)) == files(getattr(again, split)) for split in data.SPLITS)
    gone = images.test.files[0][0]
    gone.unlink()
    images.train.files[0][0].write_bytes(images.train.files[1][0].read_bytes() + b"more")
    write_images(tmp_path / "new", 1)
    (tmp_path / "new" / "000.png").rename(tmp_path / "a" / "new.png")
    (tmp_path / "new").rmdir()
    changed = load(tmp_path, kept={"splits": 3, "images": images.files})
    gone, other = gone.relative_to(tmp_path), images.train.files[0][0].relative_to(tmp_path)
    assert changed.changes == f"1 gone ({gone}), 1 new (a/new.png), 1 changed ({other})"
    assert files(changed.test) == files(images.test)[1:] and files(changed.val) == files(images.val)
    accepted = load(tmp_path, kept={"splits": 3, "images": images.files, "accept": True})
    assert sum(counts(accepted)) == 60 and accepted.changes == changed.changes
    for split in data.SPLITS:  # each image that was there is where it was
        assert set(files(getattr(changed, split))) <= set(files(getattr(accepted, split)))
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / "a")
    write_images(tmp_path / "b", 30)  # other classes under the same names
    assert "60 changed" in load(tmp_path, kept={"splits": 3, "images": images.files}).changes
    for path in (tmp_path / "a", tmp_path / "b"):
        shutil.rmtree(path)
        write_images(path / "else", 5)
    with pytest.raises(data.DataError, match="has lost all images of a split"):
        load(tmp_path, kept={"splits": 3, "images": images.files})


@pytest.mark.parametrize("train, val, test", [
    ("Train", "Valid", "TEST"), ("training", "validation", "testing")])
def test_usual_names_of_folders_are_recognised(tmp_path, train, val, test):
    for name, count in ((train, 9), (val, 4), (test, 5)):
        for label in ("cat", "dog"):
            touch(tmp_path / name, **{label: count})
            touch(tmp_path / name, **{f"{label}__@eaDir": 3})
        for other in ("@eaDir", "__MACOSX", ".hidden"):
            (tmp_path / name / other).mkdir()
            (tmp_path / name / other / "0.png").touch()
    images = load(tmp_path)
    assert counts(images) == (18, 8, 10) and images.classes == ["cat", "dog"]
    assert images.sources == {"train": f"{tmp_path}/{train}", "val": f"{tmp_path}/{val}",
                              "test": f"{tmp_path}/{test}"}
    (tmp_path / "val").mkdir(exist_ok=True)
    with pytest.raises(data.DataError, match=f"{val} and val, each for val: keep one of them|val and {val}"):
        load(tmp_path)


def test_class_folders_of_older_versions(tmp_path):
    touch(tmp_path, a=20, b=30, c=3, d=2)
    images, old = load(tmp_path, kept={"splits": 2}), load(tmp_path, kept={"splits": 1})
    count = [[getattr(images, split).targets.count(label) for label in range(4)] for split in data.SPLITS]
    assert count == [[16, 24, 1, 1], [2, 3, 1, 0], [2, 3, 1, 1]]  # the class of two is in train and test
    check_apart(images.train, images.val, images.test)
    assert files(old.val) == files(images.test) == files(old.test)
    assert " ".join(files(old.val)) == "a/00.png a/01.png b/18.png b/21.png b/27.png c/02.png d/01.png"
    assert set(files(old.train)) == set(files(images.train) + files(images.val)) and len(old.train) == 48
    assert files(load(tmp_path, seed=1, kept={"splits": 2}).val) != files(images.val)
    assert files(load(tmp_path, seed=1, kept={"splits": 2}).test) != files(images.test)


@pytest.mark.parametrize("layout", ["train", "."])
def test_images_without_labels(tmp_path, layout):
    write_images(tmp_path / layout, 20, size=(40, 24))
    images = load(tmp_path)
    assert images.classes is None and sum(counts(images)) == 20 and min(counts(images)) > 0
    check_apart(images.train, images.val, images.test)
    assert set(images.train.targets + images.val.targets) == {-1}
    assert images.train[0][0].shape == (3, 16, 16) and images.train[0][1] == -1
    whole = images.test[0][0]
    assert np.array_equal(whole.permute(1, 2, 0), data.load_image(images.test.files[0][0]))
    images, old = load(tmp_path, kept={"splits": 2}), load(tmp_path, kept={"splits": 1})
    assert [Path(file).name for file in files(old.val)] == ["007.png", "008.png"]
    assert files(old.val) == files(images.test) and counts(images) == (16, 2, 2)


def test_folders_that_are_there_become_splits(tmp_path):
    touch(tmp_path, train=20, val=5)
    check_apart(*(getattr(load(tmp_path), split) for split in data.SPLITS))
    images, old = load(tmp_path, kept={"splits": 2}), load(tmp_path, kept={"splits": 1})
    assert files(load(tmp_path).test) == files(images.test)
    assert counts(images) == (18, 2, 5) and counts(old) == (20, 5, 5)
    assert files(images.test) == files(old.val) and old.sources["val"] == str(tmp_path / "val")
    check_apart(images.train, images.val, images.test)
    touch(tmp_path, test=7)
    assert counts(load(tmp_path)) == counts(load(tmp_path, kept={"splits": 1})) == (20, 5, 7)
    shutil.rmtree(tmp_path / "val")
    images, old = load(tmp_path, kept={"splits": 2}), load(tmp_path, kept={"splits": 1})
    assert counts(images) == (18, 2, 7) and files(images.val) == files(old.val)
    assert list(images.sources.values()) == [f"the rest of {tmp_path}/train",
                                             f"a tenth of {tmp_path}/train", f"{tmp_path}/test"]


def test_training_folders_are_put_together_and_val_is_left_for_test(tmp_path):
    touch(tmp_path, train=12, val=5, test=8, more=18)

    def load_folders(*names, **options):
        images = load(tmp_path, train_folders=list(names), **{"kept": {"splits": 2}, **options})
        check_apart(images.train, images.val, *([] if options else [images.test]))
        parts = (images.train, images.val, images.test)
        return images, [{file.split("/")[0] for file in files(part)} for part in parts]
    images, where = load_folders("train", "more")  # two with val and test beside them
    assert counts(images) == (27, 3, 8) and where[0] == {"train", "more"} >= where[1] and where[2] == {"test"}
    images, where = load_folders("train", "test")
    assert counts(images) == (18, 2, 5) and where[0] | where[1] == {"train", "test"} and where[2] == {"val"}
    old, _ = load_folders("train", "test", kept={"splits": 1})
    assert files(old.train) == files(images.train) and files(old.val) == files(images.val) == files(old.test)
    assert files(old.val) == ["train/07.png", "train/08.png"]
    images, where = load_folders("val", "more", "test", "train", "val")  # nothing is left
    assert counts(images) == (35, 4, 4) and where[0] | where[1] | where[2] == {"train", "val", "test", "more"}
    plain, slashed = load_folders("train", "test"), load_folders("train/", "./test/", "test")
    assert files(plain[0].train) == files(slashed[0].train) and plain[1] == slashed[1]
    with pytest.raises(data.DataError, match="--train-folders: there is no folder .*absent"):
        load_folders("train", "absent")
    touch(tmp_path, c__train__a=3, c__train__b=3, c__more__a=3, c__more__b=3, c__other__a=3, c__other__c=3)
    images = load(tmp_path / "c", train_folders=["train", "more"])
    assert images.classes == ["a", "b"] and sum(counts(images)) == 12
    with pytest.raises(data.DataError, match=r"classes of .*train and .*other differ \(b, c\)"):
        load(tmp_path / "c", train_folders=["train", "other"])


def test_few_images_of_a_class(tmp_path):
    for count in (1, 2):
        touch(tmp_path, one=count)
        with pytest.raises(data.DataError, match=r"one holds too few images for all splits \(a class needs"):
            load(tmp_path / "one")
    touch(tmp_path, one=3, classes__a=1, classes__b=1)
    assert counts(load(tmp_path / "one")) == (1, 1, 1)
    with pytest.raises(data.DataError, match="too few images"):
        load(tmp_path / "classes")
    touch(tmp_path / "two", **{f"class {index}": 2 for index in range(10)})  # two of each class
    images = load(tmp_path / "two")
    assert counts(images) == (10, 5, 5) and len(set(images.train.targets)) == 10
    images, old = load(tmp_path / "two", kept={"splits": 2}), load(tmp_path / "two", kept={"splits": 1})
    assert counts(images) == (10, 5, 5) and counts(old) == (10, 10, 10)
    assert len(set(images.train.targets)) == 10 and files(images.train) == files(old.train)
    check_apart(images.train, images.val, images.test)
    touch(tmp_path / "many", **{f"class {index}": 2 for index in range(1500)})  # not read before it is needed
    assert counts(load(tmp_path / "many")) == (1500, 750, 750)


def test_limits_choose_in_proportion_and_wrong_values_are_refused(tmp_path):
    touch(tmp_path, train__a=16, train__b=8, val__a=4, val__b=4, test__a=4, test__b=4)
    images = load(tmp_path, train_images=6, val_images=2, test_images=3)
    assert images.train.targets == [0, 0, 0, 0, 1, 1] and images.val.targets == [0, 1]
    assert counts(images) == (6, 2, 3)
    assert set(files(images.train)) <= set(files(load(tmp_path, train_images=9).train))
    assert files(images.train) != files(load(tmp_path, train_images=6, seed=1).train)
    assert len(load(tmp_path, train_images=1000).train) == 24
    for name in ("digits", str(tmp_path)):
        with pytest.raises(data.DataError, match="number of images must be at least 1"):
            data.load_data(name, val_images=-2)
        with pytest.raises(data.DataError, match="at least 8 pixels, not 0"):
            data.load_data(name, size=0)
    for options, flag in (({"grey": True}, "--grey"), ({"train_folders": ["a"]}, "--train-folders")):
        with pytest.raises(data.DataError, match=f"{flag} is for image folders, and mnist-pairs is drawn"):
            data.load_data("mnist-pairs", **options)


# --- Image files --------------------------------------------------------------------------------------------

def pixel(path):
    """The one colour of a loaded image."""
    colours = data.load_image(path).getcolors()
    assert len(colours) == 1
    return colours[0][1]


def test_colour_modes_and_rotation(tmp_path):
    def save(image, expected, name="image.png", **options):
        image.save(tmp_path / name, **options)
        assert pixel(tmp_path / name) == expected
    white, palette = (255, 255, 255), Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    save(Image.new("L", (4, 3), 100), (100, 100, 100))
    save(Image.new("1", (4, 3), 1), white)
    save(palette, (10, 20, 30))
    # transparent pixels are composited over white
    save(Image.new("RGBA", (2, 2), (0, 100, 200, 0)), white)
    save(Image.new("RGBA", (2, 2), (0, 100, 200, 255)), (0, 100, 200))
    save(Image.new("LA", (2, 2), (0, 51)), (204, 204, 204))
    save(palette, white, transparency=1)
    save(Image.new("RGB", (2, 2), (1, 2, 3)), white, transparency=(1, 2, 3))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = pixel(tmp_path / "cmyk.jpg")
    assert red > 245 and green < 10 and blue < 10
    image, exif = Image.new("RGB", (3, 2), "black"), Image.Exif()
    image.putpixel((0, 0), (255, 0, 0))
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = data.load_image(tmp_path / "turned.png")
    assert loaded.size == (2, 3) and loaded.getpixel((1, 0)) == (255, 0, 0)


def png(header, pixels=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def tiff(pixels, order="<", deflated=False, sample_format=None):
    """A TIFF of pixels (H, W, C) of unsigned integers, with the byte order "<" or ">"."""
    (height, width, channels), bits = pixels.shape, 8 * pixels.dtype.itemsize
    body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    body = zlib.compress(body) if deflated else body
    body += bytes(len(body) % 2)
    tags = {256: width, 257: height, 258: bits, 259: 8 if deflated else 1, 262: 1 if channels == 1 else 2,
            273: 8, 277: channels, 278: height, 279: len(body), 338: 2, 339: sample_format}
    tags = {tag: value for tag, value in tags.items() if value is not None and (tag != 338 or channels == 4)}
    end = 8 + len(body) + 2 + 12 * len(tags) + 4  # there the bits of each channel are
    rows = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items()]
    if channels > 1:
        rows[2] = struct.pack(f"{order}HHII", 258, 3, channels, end)
    return ((b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body)) + body
            + struct.pack(f"{order}H", len(rows)) + b"".join(rows) + bytes(4)
            + struct.pack(f"{order}{channels}H", *[bits] * channels))


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colours_are_rounded_and_not_cut(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 30, channels), dtype=np.uint16)
    pixels[0, :, 0] = np.arange(30) * 257 + 128  # the last value that is rounded down
    pixels[1, :, 0] = np.arange(30) * 257 + 129
    pixels[..., 3:] = 65535  # opaque
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    (tmp_path / "deep.png").write_bytes(png((30, 40, 16, 2 if channels == 3 else 6), rows))
    for order in "<>":
        for deflated in (False, True):
            (tmp_path / f"{ord(order)}{deflated}.tif").write_bytes(tiff(pixels, order, deflated))
    expected = np.floor(pixels[..., :3] / 257 + 0.5)
    assert expected[0, 5, 0] == 5 and expected[1, 5, 0] == 6
    assert (expected != pixels[..., :3] >> 8).mean() > 0.2  # where the low byte is cut off
    for path in tmp_path.iterdir():
        assert np.array_equal(np.asarray(data.load_image(path)), expected), path


def test_deep_grey_and_floating_point_are_scaled(tmp_path):
    def grey(name, pixels=None):
        if pixels is not None:
            Image.fromarray(pixels).save(tmp_path / name)
        return np.asarray(data.load_image(tmp_path / name))[0, :, 0].tolist()
    for suffix in ("png", "tif"):
        values = np.array([[0, 128, 128 * 257, 128 * 257 + 128, 128 * 257 + 129, 65535]], dtype=np.uint16)
        assert grey(f"deep.{suffix}", values) == [0, 0, 128, 128, 129, 255]
    (tmp_path / "deep.pgm").write_bytes(b"P5 1 1 65535\n" + struct.pack(">H", 200 * 257))
    assert grey("deep.pgm") == [200]
    assert grey("float.tif", np.array([[-1, 0.2, 2, np.nan]], dtype=np.float32)) == [0, 51, 255, 0]
    # 32-bit integers: 16 bits of them, 20 bits, all of them, signed and unsigned
    assert grey("int.tif", np.array([[-5, 0, 128 * 257, 65535]], dtype=np.int32)) == [0, 0, 128, 255]
    assert grey("int.tif", np.array([[-5, 2**19, 2**20 - 1]], dtype=np.int32)) == [0, 128, 255]
    for bits, sample_format in ((31, 2), (32, 1), (32, None)):
        values = np.array([[[0], [2**(bits - 1)], [2**bits - 1], [2**(bits - 2)]]], dtype=np.uint32)
        (tmp_path / "int.tif").write_bytes(tiff(values, sample_format=sample_format))
        assert grey("int.tif") == [0, 128, 255, 64]


@pytest.mark.filterwarnings("error")
def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    for suffix in ("png", "jpg", "bmp", "tif"):
        write_images(tmp_path, 1, size=(64, 64), suffix=f".{suffix}")
        path = tmp_path / f"000.{suffix}"
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(data.DataError, match=f"{path.name} is damaged"):
            data.load_image(path)
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing.png")
    for name in ("link.png", "absent.png"):
        with pytest.raises(data.DataError, match=f"no image file .*{name}"):
            data.load_image(tmp_path / name)
    write_images(tmp_path, 1, size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit does not count
    assert data.load_image(tmp_path / "000.png").size == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 1000  # and is left as it was
    (tmp_path / "huge.png").write_bytes(png((20000, 20000, 8, 2)))
    with pytest.raises(data.DataError, match="huge.png has 20000 x 20000 pixels, more than the 200 million"):
        data.load_image(tmp_path / "huge.png")


def test_images_are_listed_sorted_without_the_rest_and_without_circles(tmp_path):
    write_images(tmp_path, 2)
    shutil.copy(tmp_path / "000.png", tmp_path / "B.JPG")
    for name in (".hidden.png", "._000.png", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in data.list_images(tmp_path)] == ["000.png", "001.png", "B.JPG"]
    with pytest.raises(data.DataError, match="no folder"):
        data.list_images(tmp_path / "absent")
    # links are followed, but not in circles
    touch(tmp_path, photos__a=4, photos__b=4, elsewhere=3)
    (tmp_path / "photos/a/again").symlink_to(tmp_path / "photos")  # all of b would be a's
    (tmp_path / "photos/b/self").symlink_to(tmp_path / "photos/b")
    assert sum(counts(load(tmp_path / "photos"))) == 8
    (tmp_path / "photos/b/more").symlink_to(tmp_path / "elsewhere")
    assert sum(counts(load(tmp_path / "photos"))) == 11


# --- Folders ------------------------------------------------------------------------------------------------

def test_class_folders_with_train_val_and_test(tmp_path):
    write_folders(tmp_path, "train/cat", "train/dog/more", "val/cat", "val/dog", "test/cat", "test/dog",
                  "train/.ipynb_checkpoints")
    for name in ("train/cat/Thumbs.db", "train/labels.csv"):
        (tmp_path / name).touch()
    images = load(tmp_path)
    assert images.classes == ["cat", "dog"] and images.size == 16 and counts(images) == (4, 4, 4)
    assert images.train.targets == images.val.targets == images.test.targets == [0, 0, 1, 1]
    image, label = images.train[3]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and label == 1
    assert data.load_data(str(tmp_path)).size == 224
    assert counts(load(tmp_path, crops=3)) == (4, 4, 4)  # crops are of images without labels


@pytest.mark.parametrize("name, lines, expected", [
    ("classes.txt", ["n02\tdog, domestic", "n01 cat", "n77,bird"], ["cat", "dog, domestic"]),
    ("labels.txt", ["n01,  cat", "", "n02,dog"], ["cat", "dog"]),
    ("class_names.txt", ["\ufeffgrey cat", " dog "], ["grey cat", "dog"]),
    ("classes.txt", ["n02", "n01"], ["n01", "n02"]),  # the folders themselves, in another order
    ("classes.txt", ["n01 crane", "n02 crane"], ["crane (n01)", "crane (n02)"]),
    ("readme.txt", ["a", "b"], ["n01", "n02"]),
    ("classes.txt", ["cat"], None), ("classes.txt", ["n01 cat", "dog"], None),
    ("labels.txt", ["n03 a", "n01 b"], None),
])
def test_names_of_classes(tmp_path, name, lines, expected):
    touch(tmp_path, n01=3, n02=3)
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    if expected is not None:
        assert load(tmp_path).classes == expected
        return
    with pytest.raises(data.DataError, match=f"{name} does not fit the folders of .*\"n01 NAME\"") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folders, empty, message", [
    ([], [], "holds no images; these layouts work"),
    (["train/a", "train/b", "val/a", "val/b"], ["train/c", "val/c"], "folder .*train.c holds no images"),
    (["train/a", "train/b", "val/a"], ["val/b"], "class folder .*val.b holds no images"),
    (["a"], ["b"], "class folder .*b holds no images"),
    (["b"], ["a"], "class folder .*a holds no images"),
    (["a"], [], r"holds only one folder \(a\); these layouts work"),
    ([".", "a"], [], "both images and folders; these layouts work"),
    (["train", "train/a"], [], "train holds both images and folders; these layouts work"),
    (["val/a", "val/b"], [], "holds val but no train folder; these layouts work"),
    (["train/a", "train/b", "val/a", "val/c"], [], r"classes of .*train and .*val differ \(b, c\)"),
    (["train/a", "train/b", "val"], [], "train and .*val hold class folders and single images; these"),
    (["train"], ["val"], "val holds no images; these layouts work"),
])
def test_other_layouts_are_refused_in_one_sentence(tmp_path, folders, empty, message):
    write_folders(tmp_path, *folders, empty=empty)
    with pytest.raises(data.DataError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(data.DataError, match="no folder .*absent: --data is digits, mnist, digit-pairs"):
        load(tmp_path / "absent")


def test_unlabelled_splits_and_small_images_are_padded(tmp_path):
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        write_images(tmp_path / split, count, size=(9, 5))
    images = load(tmp_path, size=32)
    assert counts(images) == (4, 3, 2)
    padded = images.train[0][0]
    assert padded.shape == (3, 32, 32) and padded[:, :, 0].float().std() > 20  # reflected, not black
    assert images.test[0][0].shape == (3, 5, 9)
    batches = list(data.make_loader(images.val, 8))  # sizes may differ, so one by one
    assert [tuple(batch.shape) for batch, _ in batches] == [(1, 3, 5, 9)] * 3
    for size in (8, 17):
        assert load(tmp_path, size=size).train[0][0].shape == (3, size, size)


def test_validation_transform_shrinks_cuts_the_centre_and_does_not_enlarge(tmp_path):
    touch(tmp_path, a=3, b=3)
    transform = load(tmp_path, size=56).val.transform
    ramp = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (128, 1))).convert("RGB")
    kept = transform(ramp.crop((0, 0, 60, 60)))  # between 56 and 64: only cut
    assert kept.shape == (3, 56, 56) and kept[0, 0].tolist() == list(range(2, 58))
    shrunk = transform(ramp)[0, 0].float()  # 128 -> 64, then 4 pixels off either side
    assert abs(shrunk[0] - 8.5) <= 1 and abs(shrunk[-1] - 118.5) <= 1
    enlarged = transform(ramp.crop((0, 0, 28, 28)))[0, 0].float()  # 28 -> 56, nothing cut
    assert enlarged[0] == 0 and enlarged[-1] == 27


def test_augment_changes_with_the_epoch_and_can_be_turned_off(tmp_path):
    write_folders(tmp_path, "a", "b", count=4)
    train = load(tmp_path).train
    state = torch.get_rng_state()
    first = train[0][0]
    assert torch.equal(first, train[0][0])  # of this epoch
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    data.set_epoch(data.make_loader(train, 2), 1)
    assert not torch.equal(first, train[0][0])
    plain = load(tmp_path, augment=False).train
    still = plain[0][0]
    data.set_epoch(data.make_loader(plain, 2), 1)
    assert torch.equal(still, plain[0][0])


def test_odd_pictures_in_folders_of_any_script_are_read(tmp_path):
    cats, others = tmp_path / "\u732b", tmp_path / "\u05e9\u05dc\u05d5\u05dd"
    write_folders(tmp_path, cats.name, others.name, count=3)
    for size in ((1, 20000), (20000, 1), (1, 1)):
        Image.new("RGB", size).save(cats / f"{size}.png")
    Image.new("CMYK", (20, 20)).save(cats / "cmyk.jpg")
    frames = [Image.new("P", (20, 20), 3)]
    Image.new("P", (20, 20)).save(cats / "moving.gif", save_all=True, append_images=frames)
    images = load(tmp_path)
    assert sum(counts(images)) == 11
    for split in data.SPLITS:
        assert all(image.shape == (3, 16, 16) for image, _ in getattr(images, split))


def test_everything_below_a_folder(tmp_path):
    for name, count in (("train", 3), ("val/deep", 2), (".", 1)):
        write_images(tmp_path / name, count, size=(20, 15))
    images = data.load_everything(tmp_path)
    assert len(images.test) == 6 and images.classes is images.train is images.val is None
    assert images.test[0][0].shape == (3, 15, 20) and images.sources == {"test": f"all of {tmp_path}"}
    (tmp_path / "empty").mkdir()
    for name, message in ((tmp_path / "empty", "holds no images"), (tmp_path / "absent", "no folder"),
                          ("digits", "take one")):
        with pytest.raises(data.DataError, match=message):
            data.load_everything(name)


def test_grey_is_the_luma_of_itu_r_601(tmp_path):
    for place, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)]):
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"{place}.png")
    Image.fromarray(np.full((9, 9), 200 * 257, dtype=np.uint16)).save(tmp_path / "4.png")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "5.png")
    grey = data.load_everything(tmp_path, grey=True)
    assert grey.channels == 1 and grey.test[0][0].shape == (1, 9, 9) and grey.test[0][0].dtype == torch.uint8
    values = [int(image.unique()) for image, _ in grey.test]
    assert values == [round(0.299 * 255), round(0.587 * 255), round(0.114 * 255), 90, 200, 255]


@pytest.mark.parametrize("labelled", [False, True])
def test_grey_folders(tmp_path, labelled):
    for name in ("a", "b") if labelled else (".",):
        write_images(tmp_path / name, 6, size=(40, 30))
    images = load(tmp_path, grey=True)
    assert images.train[0][0].shape == (1, 16, 16) and images.channels == 1
    assert images.val[0][0].shape == ((1, 16, 16) if labelled else (1, 30, 40))
    data.preview(images, tmp_path / "preview.png", columns=2)
    assert len(set(Image.open(tmp_path / "preview.png").convert("RGB").tobytes())) > 100


# --- Pairs of noisy and clean images ------------------------------------------------------------------------

PAIR_NAMES = {
    "folders": lambda number, kind: f"{kind}/{number}.png",
    "cc15": lambda number, kind: f"d600_iso3200_{number}_{'real' if kind == 'noisy' else 'mean'}.png",
    "words": lambda number, kind: f"{number}_{kind}.png",
    "sidd": lambda number, kind: f"{number:04}_{'NOISY' if kind == 'noisy' else 'GT'}_SRGB_010.PNG",
}


@pytest.mark.parametrize("names", PAIR_NAMES.values(), ids=PAIR_NAMES)
def test_pairs_are_found_and_transformed_alike(tmp_path, names):
    write_pairs(tmp_path, 20, names)
    images = load(tmp_path, kept={"splits": 2})
    assert images.classes is None and counts(images) == (16, 2, 2)
    check_apart(images.train, images.val, images.test)
    assert data.is_paired(images.train) and data.is_paired(torch.utils.data.Subset(images.val, [0]))
    seen, noise = set(), data.Noise()
    for epoch in range(3):
        loader = data.make_loader(images.train, 8, shuffle=True)
        data.set_epoch(loader, epoch)
        for batch, labels in loader:
            assert batch.shape == (8, 2, 3, 16, 16) and batch.dtype == torch.uint8 and (labels == -1).all()
            assert torch.equal(batch[:, 0], 255 - batch[:, 1])
            seen |= {image.numpy().tobytes() for image in batch[:, 0]}
    assert len(seen) > 40  # of 48: every epoch cuts elsewhere, now and then where it did before
    clean, noisy = data.clean_and_noisy(batch, range(8), "cpu", noise)  # their own noise, whatever sigma
    assert clean.is_contiguous(memory_format=torch.channels_last) and clean.dtype == torch.float32
    assert torch.equal(clean, batch[:, 0].float() / 255) and torch.equal(noisy(0.3), noisy("real"))
    assert torch.allclose(noisy(0.3), 1 - clean, atol=1e-6)
    noisy, clean, _ = next(data.NoisyBatches(loader, torch.device("cpu"), noise, 0).epoch(0))
    assert torch.allclose(noisy, 1 - clean, atol=1e-6)
    whole, expected = images.val[0][0], np.asarray(data.load_image(images.val.files[0][0]))
    assert np.array_equal(whole[0].permute(1, 2, 0), expected)
    assert np.array_equal(whole[1].permute(1, 2, 0), 255 - expected)
    assert load(tmp_path, grey=True).train[0][0].shape == (2, 1, 16, 16)


def test_pairs_in_splits_and_single_images_beside_them(tmp_path):
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        write_pairs(tmp_path / split, count, PAIR_NAMES["folders"])
    images = load(tmp_path)
    assert counts(images) == (4, 3, 2) and data.is_paired(images.test) and not data.is_paired(digits().train)
    everything = data.load_everything(tmp_path)
    assert len(everything.test) == 9 and data.is_paired(everything.test)
    shutil.rmtree(tmp_path / "val")
    write_images(tmp_path / "val", 3)
    with pytest.raises(data.DataError, match="hold pairs of noisy and clean images and single images; these"):
        load(tmp_path)


@pytest.mark.parametrize("names", PAIR_NAMES.values(), ids=PAIR_NAMES)
def test_a_missing_partner_is_named(tmp_path, names):
    write_pairs(tmp_path, 4, names)
    for kind, other in (("noisy", "clean"), ("clean", "noisy")):
        (tmp_path / names(2, kind)).rename(tmp_path / "away")
        with pytest.raises(data.DataError, match=f"{names(2, other)} has no {kind} one") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)
        (tmp_path / "away").rename(tmp_path / names(2, kind))


def test_a_stray_a_double_and_a_differing_size_are_named(tmp_path):
    write_pairs(tmp_path, 4, PAIR_NAMES["words"])
    shutil.copy(tmp_path / "1_noisy.png", tmp_path / "stray.png")
    with pytest.raises(data.DataError, match="stray.png has no noisy one"):
        load(tmp_path)
    (tmp_path / "stray.png").rename(tmp_path / "1_noisy.bmp")
    with pytest.raises(data.DataError, match="1_noisy.bmp and .*1_noisy.png are the same side of one pair"):
        load(tmp_path)
    (tmp_path / "1_noisy.bmp").unlink()
    Image.new("RGB", (30, 21)).save(tmp_path / "1_noisy.png")
    images = data.load_everything(tmp_path).test
    with pytest.raises(data.DataError, match="1_noisy.png has 30 x 21 pixels and its clean one 30 x 20"):
        images[1]
    assert images[0][0].shape == (2, 3, 20, 30)


def test_words_in_names_that_are_no_pairs(tmp_path):
    for name in ("surreal", "surmean", "realm", "meanm", "real_1", "mean_2", "clean"):
        (tmp_path / f"{name}.png").touch()
    images = load(tmp_path)
    assert not data.is_paired(images.train) and sum(counts(images)) == 7
    touch(tmp_path, classes__clean=3, classes__noisy=3, classes__other=3)
    assert load(tmp_path / "classes").classes == ["clean", "noisy", "other"]


# --- Crops, kept images -------------------------------------------------------------------------------------

def test_several_crops_of_an_image_are_different_and_follow_the_epoch(tmp_path):
    write_images(tmp_path, 12, size=(60, 50))
    once, often = (load(tmp_path, size=12, crops=crops, kept={"splits": 2}) for crops in (1, 4))
    assert counts(once) == (10, 1, 1) and counts(often) == (40, 1, 1)  # val and test: whole images, once
    once, often = once.train, often.train
    assert len(often.targets) == 40 and torch.equal(once[3][0], often[3][0])  # the first are those of one
    crops = [often[index][0].numpy().tobytes() for index in range(40)]
    assert len(set(crops)) == 40
    source = np.asarray(data.load_image(often.files[3][0])).reshape(-1, 3)
    assert all((often[index][0].flatten(1).T.numpy()[:, None] == source).all(2).any(1).all()
               for index in (3, 13, 23, 33))
    data.set_epoch(data.make_loader(often, 4), 1)
    assert not {often[index][0].numpy().tobytes() for index in range(40)} & set(crops)
    with pytest.raises(IndexError):
        often[40]
    first, second = search.split_dataset(often, 0.8, seed=0)  # all crops of an image are on one side
    assert sorted(first + second) == list(range(40)) and len(second) == 2 * 4
    assert not {index % 10 for index in first} & {index % 10 for index in second}
    scenes = digits().train
    assert search.split_dataset(scenes, 0.8, 0) == data.stratified_split(scenes.targets, 0.8, 0)


def test_unlabelled_images_come_in_all_eight_positions(tmp_path):
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10, :10], pixels[:10, 10:] = 255, 100
    for index in range(3):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    train = load(tmp_path, size=20).train
    seen = set()
    for epoch in range(100):
        train.epoch.fill_(epoch)
        image = train[0][0][0]
        seen.add((image[0, 0].item(), image[0, -1].item(), image[-1, 0].item(), image[-1, -1].item()))
    assert seen == {(255, 100, 0, 0), (100, 255, 0, 0), (0, 0, 255, 100), (0, 0, 100, 255),
                    (255, 0, 100, 0), (100, 0, 255, 0), (0, 255, 0, 100), (0, 100, 0, 255)}


def test_decoded_images_are_kept_as_long_as_they_fit(tmp_path, monkeypatch):
    for index in range(4):
        Image.new("RGB", (10, 10), (60 * index, 0, 0)).save(tmp_path / f"{index}.png")
    pictures = data.load_everything(tmp_path).test
    other = data.with_own_epoch(pictures)
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 300)
    first = [pictures[index][0] for index in range(4)]
    reads, original = [], data.load_image
    monkeypatch.setattr(data, "load_image", lambda path: reads.append(path.name) or original(path))
    assert all(torch.equal(pictures[index][0], first[index]) for index in range(4))
    assert reads == ["2.png", "3.png"]  # the first two were kept
    assert torch.equal(other[0][0], first[0]) and len(reads) == 2  # and are shared, but not the epoch
    other.epoch.fill_(3)
    assert pictures.epoch == 0 and other.decoded_bytes[0] == pictures.decoded_bytes[0] == 600


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
    data.set_epoch(resumed, 1, batches=2)
    assert order(resumed) == one[8:]
    assert order(data.make_loader(numbered(), 4, shuffle=True, seed=6)) != zero
    assert order(data.make_loader(numbered(), 4)) == list(range(12))
    # a set smaller than one batch is not dropped altogether
    for count, drop, sizes in ((10, False, [4, 4, 2]), (10, True, [4, 4]), (3, True, [3])):
        loader = data.make_loader(numbered(count), 4, drop_last=drop)
        assert [len(labels) for _, labels in loader] == sizes


def test_processes_share_the_images_of_a_loader():
    for equal, sizes in ((True, [3, 3, 3]), (False, [4, 4, 3])):
        loaders = [data.make_loader(numbered(11), 2, shuffle=True, drop_last=equal, rank=rank, world=3)
                   for rank in range(3)]
        parts = [list(loader.sampler) for loader in loaders]
        assert [len(part) for part in parts] == [len(loader.sampler) for loader in loaders] == sizes
        whole = list(data.make_loader(numbered(11), 2, shuffle=True).sampler)
        assert parts == [whole[:9 if equal else 11][rank::3] for rank in range(3)]


def test_noisy_batches_follow_seed_epoch_batch_and_process():
    scenes, cpu = digits().train, torch.device("cpu")

    def batches(epoch=0, first=0, seed=1, rank=0):
        loader = data.make_loader(scenes, 8, shuffle=True, seed=1)
        return list(data.NoisyBatches(loader, cpu, data.Noise(), seed, rank).epoch(epoch, first))
    run = batches()
    assert [len(labels) for *_, labels in run] == [8, 8, 4] and run[0][0].shape == (8, 3, 64, 64)
    for one, other in zip(run[1:], batches(first=1), strict=True):  # as after a resume
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    for changed in (batches(seed=2), batches(rank=1)):  # the same images with other noise
        assert torch.equal(run[0][1], changed[0][1]) and not torch.equal(run[0][0], changed[0][0])
    assert not torch.equal(run[0][1], batches(epoch=1)[0][1])
    errors = [torch.nn.functional.normalize((noisy - clean).flatten(1)) for noisy, clean, _ in run[:2]]
    assert not torch.allclose(*errors, atol=1e-3)


def test_workers_give_the_same_images_in_every_epoch(tmp_path):
    write_folders(tmp_path, "a", "b", count=4)

    def epochs(workers):
        subset = torch.utils.data.Subset(load(tmp_path).train, [3, 0, 1])  # as search.py splits
        loader = data.make_loader(subset, 2, shuffle=True, workers=workers)
        for epoch in range(2):
            data.set_epoch(loader, epoch)
            yield torch.cat([images for images, _ in loader])
    for alone, helped in zip(epochs(0), epochs(2), strict=True):
        assert torch.equal(alone, helped)


def test_a_worker_names_a_damaged_file_in_one_sentence(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"damaged")
    with pytest.raises(data.DataError, match=f"^the image {tmp_path}.bad.png is damaged.*it$") as error:
        try:
            data.load_everything(tmp_path).test[0]
        except data.DataError:  # what a worker does; a real one that has failed takes torch 5 s to end
            torch._utils.ExceptionWrapper(where="in DataLoader worker process 0").reraise()
    assert "\n" not in str(error.value)


# --- Flags and the command ----------------------------------------------------------------------------------

def parse(*words, **which):
    parser = argparse.ArgumentParser()
    data.add_data_arguments(parser, **which)
    data.add_noise_arguments(parser)
    for action in parser._actions[1:]:  # each with a description and a true default
        assert "default: " in action.help and "None" not in parser.format_help()
    parser.add_argument("--seed", type=int, default=0)
    return vars(parser.parse_args(words))


@pytest.mark.parametrize("words", [
    "--sigma 1/0", "--sigma 1/2/3", "--sigma 25/", "--sigmas a/255", "--sigma -1/255", "--sigma 0/0",
    "--sigma nan", "--sigma 11", "--sigmas", "--noise salt", "--size 7", "--crops 1.5", "--val-images 0"])
def test_wrong_values_are_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words.split())
    assert stop.value.code == 2 and words.split()[0] in capsys.readouterr().err


def test_flags_of_noise_and_data(tmp_path):
    assert data.noise_from({**parse(), "sigma": 1.0}) == data.Noise()
    words = ["--noise", "poisson-gaussian", "--sigma", "50/255", "--sigma-levels", "5"]
    assert data.noise_from(parse(*words), 2) == data.Noise(50 / 255, 5, (), "poisson-gaussian", 2)
    assert data.noise_from({**parse("--sigmas", "30/255", "0.2"), "sigma": 1.0}).sigmas == (30 / 255, 0.2)
    touch(tmp_path, train=4, more=6, val=3)
    words = ["--data", str(tmp_path), *"--size 16 --grey --crops 3 --val-images 1 --seed 2".split(),
             "--train-folders", "train", "more"]
    images = data.data_from(parse(*words))
    assert counts(images) == (27, 1, 3) and images.channels == 1 and images.train.seed == 2
    assert counts(data.data_from(parse(*words), kept={"splits": 1})) == (27, 1, 1)
    kept = data.image_flags(parse(*words, "--sigmas", "25/255"))
    assert kept == {"grey": True, "crops": 3, "train_folders": ["train", "more"], "leave_out": None,
                    "noise": "gaussian", "sigma": None, "sigma_levels": 0, "sigmas": [25 / 255]}
    evaluation, search = parse(training=False), parse(validation=False)
    assert {"test_images", "val_images"} <= evaluation.keys()
    assert not {"grey", "crops", "train_images"} & evaluation.keys()
    assert "train_images" in search and not {"val_images", "test_images"} & search.keys()
    assert counts(data.data_from({**search, "data": str(tmp_path), "size": 16})) == (3, 1, 3)


def test_data_py_works_alone_in_an_empty_folder(tmp_path):
    """With scenes.py, for drawn digits; without it, for image folders."""
    shutil.copy(data.__file__, tmp_path)
    write_images(tmp_path / "photos", 9)
    code = "import data; print(len(data.load_data('photos', size=16).train)); data.main(['--data', 'digits'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": ""})
    assert run.returncode == 2 and run.stdout.strip().isdigit() and "copy it too" in run.stderr
    shutil.rmtree(tmp_path / "photos")
    shutil.copy(data.scenes.__file__, tmp_path)
    command = [sys.executable, "data.py", "--train-images", "20", "--val-images", "10", "--size", "32"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr
    rows = [line.split()[:6] for line in run.stdout.splitlines()]
    assert rows[1:4] == [["train", "20", "10", "32", "x", "32"], ["val", "10", "10", "32", "x", "32"],
                         ["test", "1000", "10", "32", "x", "32"]]
    with Image.open(tmp_path / "preview.png") as image:
        assert image.size == (10 * 34 + 2, 4 * 34 + 2)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert names == ["data.py", "preview.png", "scenes.py"]


def test_main_shows_a_folder_and_pairs(tmp_path, capsys):
    write_images(tmp_path / "in", 20)
    write_pairs(tmp_path / "pairs", 12, PAIR_NAMES["cc15"])

    def show(name):
        data.main(["--data", str(tmp_path / name), "--size", "16", "--output", str(tmp_path / "out.png")])
        return capsys.readouterr().out, np.asarray(Image.open(tmp_path / "out.png")).astype(float)
    out, rows = show("in")
    assert f"train         17        0  16 x 16       the rest of {tmp_path / 'in'}" in out
    assert f"test           1        0  whole images  a tenth of {tmp_path}/in" in out and "no labels" in out
    assert np.abs(rows[2:18, 2:18] - rows[2 + 3 * 18:18 + 3 * 18, 2:18]).mean() > 60  # sigma 1 below sigma 0
    out, rows = show("pairs")
    assert "clean above noisy" in out and rows.shape[0] == 2 * 18 + 2
    assert np.array_equal(rows[2:18, 2:18], 255 - rows[20:36, 2:18])


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
    scenes = data.load_data("mnist", root=root, train_images=50, val_images=20, test_images=30)
    assert len(set(scenes.train.targets)) == 10 and counts(scenes) == (50, 20, 30)
    images = data.load_data(str(root / "imagenette112"), size=96, train_images=20, val_images=10)
    assert len(images.classes) == 10 and sorted(set(images.train.targets)) == list(range(10))
    batch, labels = next(iter(data.make_loader(images.val, 10)))
    assert batch.shape == (10, 3, 96, 96) and labels.tolist() == list(range(10))
