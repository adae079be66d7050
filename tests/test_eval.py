"""eval.py: the metrics against values computed by hand, the evaluation, the reports, the user's own pictures."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import eval as evaluation
import models

ROOT = Path(evaluation.__file__).parent


class Identity(nn.Module):
    """Gives back its input as the denoised image."""

    denoises, classifies = True, False

    def forward(self, x):
        return models.Output(x, None)


class Oracle(nn.Module):
    """Classifies images whose grey level is (label + 1) / 20: the true class comes `rank` places behind the best."""

    denoises, classifies = False, True

    def __init__(self, rank=0, num_classes=10):
        super().__init__()
        self.rank, self.num_classes = rank, num_classes

    def forward(self, x):
        label = (x.mean((1, 2, 3)) * 20 - 1).round().long()
        best_first = torch.arange(self.num_classes, dtype=torch.float32)
        distance = (torch.arange(self.num_classes) - label[:, None] + self.rank) % self.num_classes
        return models.Output(None, -best_first[distance])


def grey_images(count=20, size=16):
    labels = [i % 10 for i in range(count)]
    return data.Scenes(torch.stack([torch.full((3, size, size), round(255 * (y + 1) / 20), dtype=torch.uint8)
                                    for y in labels]), labels)


def random_images(count=6, size=24):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return data.Scenes(images, [-1] * count)


def measure(network, dataset, batch_size=4, **options):
    return evaluation.evaluate(network, data.make_loader(dataset, batch_size), progress=False, **options)


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")
    return json.loads(text, parse_constant=refuse)


# --- Metrics


def test_psnr_by_hand():
    black, half = torch.zeros(2, 3, 5, 7), torch.full((2, 3, 5, 7), 0.5)
    half[1] = 0.1
    assert evaluation.psnr(black, half).tolist() == pytest.approx([20 * math.log10(2), 20], abs=1e-5)
    assert evaluation.psnr(black * 255, half * 255, data_range=255).tolist() == pytest.approx([6.0206, 20], abs=1e-4)
    assert evaluation.psnr(half, half).tolist() == [math.inf, math.inf]
    one_channel = black.double().clone()
    one_channel[:, 0] = 0.3  # the error is shared by three channels: RGB, not luma
    assert evaluation.psnr(one_channel, black.double())[0].item() == pytest.approx(10 * math.log10(3 / 0.09), abs=1e-12)


def test_ssim_of_constant_images_is_the_closed_form():
    a, b, c1 = 0.2, 0.7, 0.01 ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)  # no variance: the second factor is 1
    x, y = torch.full((2, 3, 16, 11), a, dtype=torch.float64), torch.full((2, 3, 16, 11), b, dtype=torch.float64)
    assert evaluation.ssim(x, y).tolist() == pytest.approx([expected] * 2, abs=1e-12)
    assert evaluation.ssim(x * 255, y * 255, data_range=255).tolist() == pytest.approx([expected] * 2, abs=1e-12)
    assert evaluation.ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-12)


def naive_ssim(x, y):
    """The definition of Wang et al. 2004, window by window, two passes over each window."""
    row, column = np.mgrid[-5:6, -5:6]
    weight = np.exp(-(row ** 2 + column ** 2) / (2 * 1.5 ** 2))
    weight /= weight.sum()
    values = []
    for channel in range(x.shape[0]):
        for top in range(x.shape[1] - 10):
            for left in range(x.shape[2] - 10):
                a, b = (z[channel, top:top + 11, left:left + 11] for z in (x, y))
                mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
                var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
                covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a ** 2 + mean_b ** 2 + 1e-4)
                values.append(luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4))
    return np.mean(values)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    clean = rng.random((2, 3, 14, 19))
    return clean, clean + 0.3 * rng.standard_normal(clean.shape)


def test_ssim_equals_the_definition(pair):
    clean, noisy = pair
    expected = [naive_ssim(a, b) for a, b in zip(noisy, clean)]
    noisy, clean = torch.from_numpy(noisy), torch.from_numpy(clean)
    assert evaluation.ssim(noisy, clean).tolist() == pytest.approx(expected, abs=1e-10)
    in_float32 = evaluation.ssim(noisy.float().to(memory_format=torch.channels_last), clean.float())
    assert in_float32.dtype == torch.float32
    assert in_float32.tolist() == pytest.approx(expected, abs=1e-5)


def test_metrics_equal_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics")
    clean, noisy = pair
    for quality, theirs in (
            (evaluation.psnr, lambda a, b: metrics.peak_signal_noise_ratio(b, a, data_range=1)),
            (evaluation.ssim, lambda a, b: metrics.structural_similarity(
                a, b, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False))):
        ours = quality(torch.from_numpy(noisy), torch.from_numpy(clean)).tolist()
        assert ours == pytest.approx([theirs(a, b) for a, b in zip(noisy, clean)], abs=1e-10)


def test_ssim_is_a_loss(pair):
    clean, noisy = (torch.from_numpy(x) for x in pair)
    small = noisy[:1, :, :12, :12].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: evaluation.ssim(x, clean[:1, :, :12, :12]), small)
    flat = torch.zeros(1, 3, 12, 12, requires_grad=True)  # equal and constant images: no division by zero
    evaluation.ssim(flat, torch.zeros(1, 3, 12, 12)).sum().backward()
    assert torch.isfinite(flat.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # AMP must not touch the digits
        single, double = evaluation.ssim(noisy.float(), clean.float()), evaluation.ssim(noisy, clean)
    assert single.tolist() == pytest.approx(double.tolist(), abs=1e-5)
    assert evaluation.ssim(noisy.bfloat16(), clean.float()).dtype == torch.float32


@pytest.mark.parametrize("x, y, words", [
    (torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40), "11x11"),
    (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17), "one shape"),
    (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), "one shape"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16), "floating point"),
])
def test_ssim_refuses(x, y, words):
    with pytest.raises(ValueError, match=words):
        evaluation.ssim(x, y)


def test_to_8bit():
    values = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0])
    assert (evaluation.to_8bit(values) * 255).tolist() == pytest.approx([0, 0, 0, 1, 255, 255])


def test_metrics_work_when_copied_alone(tmp_path):
    shutil.copy(ROOT / "eval.py", tmp_path / "quality.py")
    code = ("import torch, quality; x = torch.rand(2, 3, 16, 16)\n"
            "print(quality.psnr(x, x + 0.1).round().tolist(), quality.ssim(x, x).round().tolist())")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.split("\n")[0] == "[20.0, 20.0] [1.0, 1.0]", result.stderr


# --- evaluate


def test_identity_reproduces_the_noisy_input():
    """A network that does nothing has the input's numbers, but for the clamp and the rounding of its output."""
    mid_grey = data.Scenes(torch.full((8, 3, 32, 32), 128, dtype=torch.uint8), [-1] * 8)
    metrics = measure(Identity(), mid_grey, sigmas=(0, 0.05, 0.1, 0.5))
    exact, fine, low, high = metrics["levels"]
    for level, sigma in ((fine, 0.05), (low, 0.1), (high, 0.5)):
        assert level["input_psnr_db"] == pytest.approx(-20 * math.log10(sigma), abs=0.15)
    assert fine["psnr_db"] == pytest.approx(fine["input_psnr_db"], abs=0.02)  # nothing clamped, only rounded
    assert fine["ssim"] == pytest.approx(fine["input_ssim"], abs=1e-3)
    assert high["psnr_db"] > high["input_psnr_db"] + 1  # clamping alone helps at much noise
    assert exact["psnr_db"] == exact["input_psnr_db"] == math.inf and exact["ssim"] == pytest.approx(1)
    assert high["accuracy"] is None and metrics["labelled_images"] == 0 and metrics["chance_accuracy"] is None

    clipped = measure(Identity(), mid_grey, sigmas=(0.5,), clip=True)["levels"][0]
    assert clipped["psnr_db"] == pytest.approx(clipped["input_psnr_db"], abs=0.01)
    assert clipped["psnr_db"] == pytest.approx(high["psnr_db"], abs=1e-9)


def test_means_leave_the_infinite_out():
    metrics = measure(Identity(), random_images(), sigmas=(0, 0.1, 0.3))
    noisy, everything = metrics["means"]["noisy_levels"], metrics["means"]["all_levels"]
    levels = metrics["levels"]
    assert noisy["input_psnr_db"] == pytest.approx((levels[1]["input_psnr_db"] + levels[2]["input_psnr_db"]) / 2)
    assert everything["input_psnr_db"] is None and everything["psnr_db"] is None
    assert everything["ssim"] == pytest.approx(sum(level["ssim"] for level in levels) / 3)
    text = json.dumps(evaluation.strict_json(metrics), allow_nan=False)
    assert strict(text)["levels"][0]["input_psnr_db"] == "inf"
    assert evaluation.format_table(strict(text)) == evaluation.format_table(metrics)  # the file is enough for the table
    only_clean = measure(Identity(), random_images(), sigmas=(0,))
    assert only_clean["means"]["noisy_levels"]["psnr_db"] is None and "inf" in evaluation.format_table(only_clean)


@pytest.mark.parametrize("network", [Identity(), Oracle()])
def test_same_numbers_for_every_batch_size(network):
    dataset = random_images(7) if network.denoises else grey_images(7)
    first = measure(network, dataset, batch_size=1, sigmas=(0.1, 0.7))
    for batch_size in (2, 3, 7):
        assert measure(network, dataset, batch_size=batch_size, sigmas=(0.1, 0.7)) == first
    alone, other_seed = (measure(network, dataset, sigmas=(0.7,), seed=seed)["levels"][0] for seed in (0, 1))
    assert alone == first["levels"][1]  # whatever the other levels are
    assert other_seed != alone or not network.denoises


@pytest.mark.parametrize("rank, top1, top5", [(0, 1, 1), (1, 0, 1), (4, 0, 1), (5, 0, 0)])
def test_accuracy(rank, top1, top5):
    metrics = measure(Oracle(rank), grey_images(), sigmas=(0, 0.05))
    for level in (*metrics["levels"], metrics["means"]["all_levels"]):
        assert (level["accuracy"], level["top5_accuracy"]) == (top1, top5)
        assert level["psnr_db"] is None and level["input_ssim"] is None
    assert metrics["chance_accuracy"] == pytest.approx(0.1) and metrics["labelled_images"] == 20


def test_top5_needs_more_than_five_classes():
    images = grey_images(4)
    metrics = measure(Oracle(num_classes=5), images, sigmas=(0,))
    assert metrics["levels"][0]["accuracy"] == 1 and metrics["levels"][0]["top5_accuracy"] is None
    assert "top-5" not in evaluation.format_table(metrics)


def test_network_gets_its_mode_back():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Identity()).train()
    measure(network, random_images(2), sigmas=(0.1,))
    assert network.training and network[0].training


def test_small_images_have_no_ssim():
    metrics = measure(Identity(), random_images(3, size=10), sigmas=(0.1,))
    assert metrics["levels"][0]["ssim"] is None and metrics["levels"][0]["psnr_db"] > 19
    assert metrics["ssim_images"] == 0 and metrics["images"] == 3
    assert "SSIM of the 0" in evaluation.format_table(metrics)


# --- Command line


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of untrained networks, one per kind, as train.py writes them."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    for model in models.MODELS:
        torch.manual_seed(0)
        arch = models.named_arch(f"{model}-k3-e3", 0 if model == "dnas" else 10)
        classes = None if model == "dnas" else [str(digit) for digit in range(10)]
        paths[model] = folder / f"{model}.pt"
        models.save_checkpoint(paths[model], {
            "record": models.make_record(arch, made={}), "network": models.Network(arch).state_dict(),
            "classes": classes, "size": 32, "epoch": 3, "data": "digits", "seed": 5})
    return paths


def run(*argv):
    """Run main in this process, return its exit code."""
    try:
        evaluation.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize("model, columns", [("dcnas", 3), ("dnas", 3), ("cnas", 2)])
def test_evaluation_writes_its_files(checkpoints, tmp_path, capsys, model, columns):
    assert run("--checkpoint", checkpoints[model], "--val-images", 4, "--sigmas", 0, 0.2, "--output-dir", tmp_path) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "table.txt").read_text()
    assert table in printed
    metrics = strict((tmp_path / "metrics.json").read_text())
    assert list(metrics)[:3] == ["format", "version", "made"]
    assert (metrics["format"], metrics["version"]) == ("joint-eval", 1)
    assert metrics["data"] == "digits" and metrics["data_seed"] == 5 and metrics["images"] == 4
    assert metrics["network"]["parameters"] > 100_000 and metrics["latency"]["median_ms"] > 0
    level = metrics["levels"][1]
    assert (level["psnr_db"] is None) == (model == "cnas") and (level["accuracy"] is None) == (model == "dnas")
    for words, there in (("PSNR", model != "cnas"), ("by chance 10.0%", model != "dnas"), ("latency", True),
                         ("not clipped", True), ("multiply-accumulates", True)):
        assert (words in table) == there, words
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width == 8 + columns * (192 + 8) and len(set(grid.convert("L").tobytes())) > 50


def test_grid_shows_noisy_denoised_clean(tmp_path):
    class Joint(nn.Module):
        denoises = classifies = True

        def forward(self, x):
            return models.Output(torch.zeros_like(x), torch.tensor([[0.0, 9.0]]))

    white = data.Scenes(torch.full((2, 3, 64, 64), 255, dtype=torch.uint8), [1, 0])
    evaluation.save_grid(tmp_path / "grid.png", Joint(), white, sigmas=(0.5, 0.5), classes=["cat", "a dog " * 40])
    grid = np.array(Image.open(tmp_path / "grid.png"))
    top, left, step = 28, 8, 200
    tiles = [grid[top:top + 192, left + i * step:left + i * step + 192] for i in range(3)]
    assert grid.shape == (28 + 2 * (192 + 2 * 20 + 16), 8 + 3 * 200, 3)
    assert (tiles[1] == 0).all() and (tiles[2] == 255).all() and 20 < tiles[0].std()
    assert (tiles[0][0::3, 0::3] == tiles[0][2::3, 2::3]).all()  # 64 pixels, each shown as 3x3
    text = grid[top + 192:top + 192 + 48].reshape(-1, 3).astype(int)
    second = grid[top + 248 + 192:].reshape(-1, 3).astype(int)
    assert ((text[:, 1] - text[:, 0]) > 60).any() and not ((text[:, 0] - text[:, 1]) > 60).any()  # right: green
    assert ((second[:, 0] - second[:, 1]) > 60).any()  # wrong: red


@pytest.fixture
def pictures(tmp_path):
    """Grey, RGBA, odd sizes, two files of one stem, and a damaged one."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()

    def noise(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(noise(37, 61)).save(folder / "grey.png")
    Image.fromarray(noise(30, 40, 4)).save(folder / "alpha.png")
    Image.fromarray(noise(33, 201, 3)).save(folder / "twin.png")
    Image.fromarray(noise(5, 3, 3)).save(folder / "twin.bmp")
    (folder / "bad.jpg").write_bytes(b"not a picture")
    return folder


def test_own_pictures(checkpoints, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--checkpoint", checkpoints["dcnas"], "--input", pictures, "--output-dir", out) == 1  # one was bad
    printed = capsys.readouterr()
    assert "bad.jpg" in printed.err and "1 of 5" in printed.err and "Traceback" not in printed.err
    result = strict((out / "predictions.json").read_text())
    assert (result["format"], result["version"], result["sigma_added"]) == ("joint-predictions", 1, 0)
    assert [Path(failure["file"]).name for failure in result["failures"]] == ["bad.jpg"]
    sizes = {}
    for record in result["pictures"]:
        denoised = Image.open(record["denoised"])
        assert denoised.mode == "RGB" and denoised.size == (record["width_px"], record["height_px"])
        assert len(record["classes"]) == 5 and record["classes"][0]["probability"] > 0.1
        assert record["classes"][0]["name"] in printed.out
        sizes[Path(record["file"]).name] = record["classified_at_px"]
    # Trained at 32 pixels: from 16 to 64 a picture is classified as it is, others with a short side of 32.
    assert sizes == {"alpha.png": [30, 40], "grey.png": [37, 61], "twin.bmp": [53, 32], "twin.png": [32, 195]}
    assert sorted(path.name for path in out.glob("*.png")) == [
        "alpha_denoised.png", "grey_denoised.png", "twin_2_denoised.png", "twin_denoised.png"]


def test_own_picture_with_noise(checkpoints, pictures, tmp_path):
    command = ("--checkpoint", checkpoints["dcnas"], "--input", pictures / "grey.png", "--output-dir", tmp_path / "out")
    assert run(*command, "--sigma", 0.1) == 0
    clean, noisy = (np.array(Image.open(path).convert("RGB")) / 255
                    for path in (pictures / "grey.png", tmp_path / "out" / "grey_noisy.png"))
    inside = (clean > 0.3) & (clean < 0.7)
    assert np.std((noisy - clean)[inside]) == pytest.approx(0.1, rel=0.1)


def test_own_pictures_denoised_only_and_classified_only(checkpoints, pictures, tmp_path, capsys):
    picture = pictures / "twin.png"
    assert run("--checkpoint", checkpoints["dnas"], "--input", picture, "--output-dir", tmp_path / "d") == 0
    assert "classes" not in strict((tmp_path / "d" / "predictions.json").read_text())["pictures"][0]
    assert run("--checkpoint", checkpoints["cnas"], "--input", picture, "--output-dir", tmp_path / "c") == 0
    record = strict((tmp_path / "c" / "predictions.json").read_text())["pictures"][0]
    assert "denoised" not in record and record["classes"] and not list((tmp_path / "c").glob("*.png"))


def test_names_never_collide():
    paths = [Path(name) for name in ("a/x.png", "b/x.jpg", "b/X.bmp", "b/x_2.png")]
    names = evaluation._output_names(paths)
    assert names == ["x", "x_2", "X_3", "x_2_2"] and len({name.lower() for name in names}) == 4


def test_pictures_of_an_earlier_run_are_not_taken_again(checkpoints, pictures):
    (pictures / "bad.jpg").unlink()
    for _ in range(2):
        assert run("--checkpoint", checkpoints["dnas"], "--input", pictures, "--output-dir", pictures / "out") == 0
    assert len(list((pictures / "out").glob("*.png"))) == 4


def test_whole_unlabelled_pictures_of_different_sizes(checkpoints, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for size in ((40, 33), (9, 50)):
            Image.new("RGB", size, (90, 120, 60)).save(tmp_path / split / f"{size[0]}.png")
    assert run("--checkpoint", checkpoints["dcnas"], "--data", tmp_path, "--sigmas", 0.2, "--no-latency",
               "--output-dir", tmp_path / "out") == 0
    metrics = strict((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["images"] == 2 and metrics["ssim_images"] == 1 and metrics["latency"] is None
    level = metrics["levels"][0]
    assert level["accuracy"] is None and level["input_psnr_db"] == pytest.approx(14, abs=0.5)


@pytest.mark.parametrize("words, sentence", [
    (["--checkpoint", "none.pt"], "no checkpoint"),
    (["--input", "nowhere"], "nowhere"),
    (["--input", "empty"], "holds no picture"),
    (["--split", "test"], "no test split"),
    (["--data", "missing"], "missing"),
    (["--data", "two"], "10 classes"),
    (["--data", "plain", "--checkpoint", "cnas"], "no labels"),
    (["--sigmas", "-1"], "from 0 to 100, not -1"),
    (["--sigmas", "nan"], "from 0 to 100, not nan"),
    (["--sigma", "x"], "--sigma"),
    (["--batch-size", "0"], "--batch-size"),
    (["--device", "nonsense"], "nonsense"),
])
def test_wrong_usage_ends_in_one_sentence(checkpoints, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "two/train/a", "two/train/b", "two/val/a", "two/val/b", "plain/train", "plain/val"):
        Path(folder).mkdir(parents=True)
        if folder != "empty":
            Image.new("RGB", (32, 32)).save(Path(folder) / "image.png")
    words = [str(checkpoints.get(word, word)) for word in words]
    assert run("--checkpoint", checkpoints["dcnas"], *words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert sentence in error[-1] and error[-1].startswith(("eval.py: error:", f"{Path(sys.argv[0]).name}: error:"))
    assert not Path("runs").exists()  # refused before any work


def test_help_is_complete(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for flag in ("--checkpoint", "--data", "--split", "--sigmas", "--input", "--sigma", "--clip", "--batch-size",
                 "--seed", "--threads", "--device", "--output-dir", "--no-latency", "--val-images", "examples:"):
        assert flag in text


def test_the_gradient_of_ssim_is_that_of_its_formula():
    """The window has a gradient of its own; in float64 it must agree with finite differences."""
    torch.manual_seed(0)
    image, reference = torch.rand(1, 2, 13, 14, dtype=torch.float64), torch.rand(1, 2, 13, 14, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: evaluation.ssim(x, reference), (image.requires_grad_(),))


# --- Large pictures in tiles ---------------------------------------------------------------------------------


def smooth_picture(height, width):
    """Waves and noise, uint8 (1, 3, height, width)."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    waves = torch.stack([torch.sin(y / 37 + k) * torch.cos(x / 53 - k) for k in range(3)])
    picture = 0.5 + 0.3 * waves + 0.1 * torch.randn(3, height, width, generator=generator)
    return picture.clamp(0, 1).mul(255).byte()[None]


@pytest.mark.parametrize("arch", ("dcnas-k3-e3", "dnas with squeeze-and-excitation everywhere", "dcnas-seq-k3-e3"))
def test_tiles_compute_what_the_whole_picture_does(arch):
    """Random weights and statistics; the margin covers what the encoder sees, so that only rounding is left."""
    torch.manual_seed(0)
    if arch.startswith("dnas"):
        positions = models.searched_positions("dnas")
        arch = models.make_arch("dnas", [models.fill(p, models.Operation(3, 3, True)) for p in positions])
    else:
        arch = models.named_arch(arch, 10)
    network = models.make_network(arch)
    network(torch.rand(4, 3, 64, 64))  # statistics of batch norms
    network.eval()
    picture = smooth_picture(410, 505)
    with torch.inference_mode():
        whole = network(data.to_float(picture, "cpu")).image.clamp(0, 1)
    tiled = evaluation.denoise_tiled(network, picture, core=128, margin=256).float() / 255
    assert (tiled - whole).abs().max() < 0.5 / 255 + 1e-3
    assert network(torch.rand(1, 3, 32, 32)).image is not None  # the network is as it was


def test_tiles_of_a_baseline_without_squeeze_and_excitation():
    torch.manual_seed(0)
    network = models.build_network(models.named_record("dcnet-s", 10, {})).eval()
    picture = smooth_picture(300, 290)
    with torch.inference_mode():
        whole = network(data.to_float(picture, "cpu")).image.clamp(0, 1)
    tiled = evaluation.denoise_tiled(network, picture, core=96, margin=64).float() / 255
    assert (tiled - whole).abs().max() < 0.5 / 255 + 1e-3


@pytest.mark.parametrize("model", ("dcnas-k3-e3", "cnas-k3-e3"))
def test_a_large_picture_of_the_training_size_is_classified_too(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "TILE_CORE", 64)
    monkeypatch.setattr(evaluation, "TILE_MARGIN", 32)
    network = models.build_network(models.make_record(models.named_arch(model, 3), {})).eval()
    picture = smooth_picture(150, 170)
    evaluation.to_picture(picture[0]).save(tmp_path / "p.png")
    records, failures = evaluation.denoise_paths(network, [tmp_path / "p.png"], tmp_path / "out", size=120)
    with torch.inference_mode():
        expected = network(data.to_float(picture, "cpu")).logits[0].softmax(0).max().item()
    assert not failures and records[0]["classes"][0]["probability"] == pytest.approx(expected, rel=1e-4)


def test_a_whole_image_classifier_on_pairs_is_refused(tmp_path, capsys):
    record = models.make_record(models.named_arch("cnas-k3-e3", 10), {})
    models.save_checkpoint(tmp_path / "c.pt", {"record": record, "network": models.build_network(record).state_dict(), "ema": None,
                                               "classes": [str(d) for d in range(10)], "size": 64, "epoch": 1, "data": "digits",
                                               "seed": 0})
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--checkpoint", str(tmp_path / "c.pt"), "--data", "digit-pairs", "--val-images", "4", "--output-dir",
                         str(tmp_path / "out")])
    assert stopped.value.code == 2 and "classifies whole images" in capsys.readouterr().err


def test_a_picture_larger_than_a_tile_goes_through_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "TILE_CORE", 64)
    monkeypatch.setattr(evaluation, "TILE_MARGIN", 32)
    record = models.make_record(models.named_arch("dcnas-k3-e3", 10), {})
    models.save_checkpoint(tmp_path / "c.pt", {"record": record, "network": models.build_network(record).state_dict(),
                                               "ema": None, "classes": list("abcdefghij"), "size": 48, "epoch": 1})
    picture = smooth_picture(150, 260)
    evaluation.to_picture(picture[0]).save(tmp_path / "large.png")
    for flags, name in (([], "plain"), (["--sigma", "0.2"], "noisy")):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(["--checkpoint", str(tmp_path / "c.pt"), "--input", str(tmp_path / "large.png"), "--output-dir",
                             str(tmp_path / name), *flags])
        assert stopped.value.code == 0
        result = json.loads((tmp_path / name / "predictions.json").read_text())["pictures"][0]
        assert result["classified_at_px"] == [48, 83] and (result["width_px"], result["height_px"]) == (260, 150)
        assert Image.open(result["denoised"]).size == (260, 150) and ("noisy" in result) == bool(flags)


# --- Protocols of the literature ------------------------------------------------------------------------------


def test_luma_is_matlabs():
    colours = torch.tensor([[0., 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)[..., None, None]
    expected = [16, 235, 16 + 65.481, 16 + 128.553, 16 + 24.966]
    assert (evaluation.luma(colours).flatten() * 255).tolist() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        evaluation.luma(torch.zeros(1, 1, 4, 4))


def test_luma_and_shave_reach_the_report():
    dataset, sigma = random_images(3, size=24), 0.1
    plain, shaved, y = (measure(Identity(), dataset, sigmas=(sigma,), **how) for how in ({}, {"shave": 3}, {"y_only": True}))
    clean = dataset.images.float() / 255
    noisy = torch.stack([image + sigma * data.evaluation_noise(image.shape, place) for place, image in enumerate(clean)])
    clean, noisy = clean.double(), noisy.double()
    inner = evaluation.psnr(noisy[..., 3:21, 3:21], clean[..., 3:21, 3:21]).mean().item()
    assert shaved["levels"][0]["input_psnr_db"] == pytest.approx(inner, abs=1e-5) and shaved["protocol"]["shaved_px"] == 3
    levels = torch.tensor((65.481, 128.553, 24.966), dtype=torch.float64) / 255
    error = ((noisy - clean).permute(0, 2, 3, 1) @ levels).square().mean((1, 2))
    assert y["levels"][0]["input_psnr_db"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-5)
    assert y["levels"][0]["input_psnr_db"] > plain["levels"][0]["input_psnr_db"] + 2
    assert "on RGB:" in evaluation.format_table(plain) and "RGB without 3 pixels" in evaluation.format_table(shaved)
    assert "Y (ITU-R 601, 16 to 235)" in evaluation.format_table(y)
    assert y["levels"][0]["ssim"] != plain["levels"][0]["ssim"] != shaved["levels"][0]["ssim"]
    with pytest.raises(ValueError, match="--shave 12 leaves nothing of an image of 24x24"):
        measure(Identity(), dataset, sigmas=(sigma,), shave=12)


def test_the_protocol_of_the_literature_gives_every_image_the_same_noise():
    clean = random_images(3, size=20)
    metrics = measure(Identity(), clean, sigmas=(50 / 255,), protocol="literature", seed=7)
    noise = np.random.RandomState(0).normal(0, 50 / 255, (20, 20, 3))
    expected = -10 * math.log10(np.square(noise).mean())
    assert metrics["levels"][0]["input_psnr_db"] == pytest.approx(expected, abs=1e-4)
    assert "RandomState(0)" in evaluation.format_table(metrics) and metrics["protocol"]["noise_seed"] is None
    assert "seed 0" in evaluation.format_table(measure(Identity(), clean, sigmas=(0.2,)))


def test_signal_dependent_noise_is_less_in_the_dark():
    psnr = []
    for brightness in (0, 255):
        scene = data.Scenes(torch.full((4, 3, 32, 32), brightness, dtype=torch.uint8), [-1] * 4)
        metrics = measure(Identity(), scene, sigmas=(0.2,), noise="poisson-gaussian")
        psnr.append(metrics["levels"][0]["input_psnr_db"])
        for batch_size in (1, 4):
            again = measure(Identity(), scene, batch_size=batch_size, sigmas=(0.1, 0.2), noise="poisson-gaussian")
            assert again["levels"][1] == metrics["levels"][0]
    assert psnr == pytest.approx([-10 * math.log10(0.04 * share) for share in (0.1, 1)], abs=0.15)
    assert "Poisson-Gaussian" in evaluation.format_table(metrics)


# --- Self-ensemble ---------------------------------------------------------------------------------------------


class Lopsided(nn.Module):
    """A convolution that treats every direction differently; its classes look at the upper left corner."""

    denoises = classifies = True

    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.channels = nn.Conv2d(channels, channels, 3, padding=1), channels

    def forward(self, x):
        return models.Output(self.layer(x).sigmoid(), x[:, 0, :2, 0])


def test_the_self_ensemble_is_the_mean_over_eight_turns():
    network, x = Lopsided().eval(), torch.rand(2, 3, 8, 11)
    image, logits = evaluation.SelfEnsemble(network)(x)
    expected = []
    for mirrored in (False, True):
        for quarters in range(4):
            turned = np.rot90(x.numpy()[..., ::-1] if mirrored else x.numpy(), quarters, (2, 3)).copy()
            out = np.rot90(network(torch.from_numpy(turned)).image.detach().numpy(), -quarters, (2, 3))
            expected.append(out[..., ::-1] if mirrored else out)
    torch.testing.assert_close(image, torch.from_numpy(np.mean(expected, 0)))
    assert not torch.allclose(image, network(x).image, atol=1e-3)
    assert torch.equal(logits, network(x).logits)  # of the upright image
    ways = {evaluation.SelfEnsemble.turn(x, way).numpy().tobytes() for way in range(8)}
    assert len(ways) == 8
    for way in range(8):
        assert torch.equal(evaluation.SelfEnsemble.turn_back(evaluation.SelfEnsemble.turn(x, way), way), x)


@pytest.mark.parametrize("model", ("lopsided", "dcnas-k3-e3", "dcnas-seq-k3-e3"))
def test_the_self_ensemble_in_tiles_is_that_of_the_whole_picture(model):
    torch.manual_seed(0)
    network = Lopsided() if model == "lopsided" else models.make_network(models.named_arch(model, 10))
    network(torch.rand(4, 3, 64, 64))
    ensemble = evaluation.SelfEnsemble(network.eval())
    picture = smooth_picture(200, 290)
    with torch.inference_mode():
        image = data.to_float(picture, "cpu")
        turned = [ensemble.turn_back(network(ensemble.turn(image, way)).image, way) for way in range(8)]
        assert torch.allclose(ensemble(image).image, sum(turned) / 8, atol=1e-5)
        whole = sum(each.clamp(0, 1) for each in turned) / 8  # of 8-bit images, which hold nothing else
    tiled = evaluation.denoise_tiled(ensemble, picture, core=128, margin=256).float() / 255
    assert (tiled - whole).abs().max() < 1.01 / 255  # eight images in 8 bit, and their mean
    if model == "lopsided":  # the others, untrained, give much the same from every side
        assert whole.std() > 5 / 255 and (tiled - whole.flip(-1)).abs().max() > 5 / 255


def test_a_network_that_only_classifies_has_no_self_ensemble(checkpoints, capsys):
    assert run("--checkpoint", checkpoints["cnas"], "--self-ensemble", "--val-images", 2) == 2
    assert "leave --self-ensemble out" in capsys.readouterr().err


def test_the_self_ensemble_through_the_command(checkpoints, tmp_path, capsys):
    command = ("--checkpoint", checkpoints["dcnas"], "--val-images", 3, "--sigmas", "25/255", "--no-latency")
    assert run(*command, "--output-dir", tmp_path / "one") == 0
    assert run(*command, "--output-dir", tmp_path / "eight", "--self-ensemble") == 0
    assert "mean of eight passes" in capsys.readouterr().out
    one, eight = (strict((tmp_path / name / "metrics.json").read_text()) for name in ("one", "eight"))
    assert eight["protocol"]["self_ensemble"] and not one["protocol"]["self_ensemble"]
    assert eight["levels"][0]["psnr_db"] != one["levels"][0]["psnr_db"]
    assert eight["levels"][0]["accuracy"] == one["levels"][0]["accuracy"] and eight["network"] == one["network"]
    assert one["levels"][0]["sigma"] == 25 / 255
    Image.new("RGB", (40, 30), (90, 120, 60)).save(tmp_path / "p.png")
    command = ("--checkpoint", checkpoints["dcnas"], "--input", tmp_path / "p.png", "--sigma", "50/255")
    for name, flags in (("a", []), ("b", ["--self-ensemble"])):
        assert run(*command, *flags, "--output-dir", tmp_path / name) == 0
    pictures = [np.array(Image.open(tmp_path / name / "p_denoised.png")) for name in "ab"]
    assert (pictures[0] != pictures[1]).any()
    result = strict((tmp_path / "b" / "predictions.json").read_text())
    assert result["self_ensemble"] and result["sigma_added"] == 50 / 255 and result["noise"] == "gaussian"


# --- Grey networks, pairs, whole folders ------------------------------------------------------------------------


class Grey(nn.Module):
    """A denoiser of one channel that halves its input."""

    channels, denoises, classifies = 1, True, False

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        assert x.shape[1] == 1
        return models.Output(x * self.scale, None)


@pytest.fixture
def grey(tmp_path, monkeypatch):
    """A checkpoint of a grey network."""
    monkeypatch.setitem(models.METHODS, "grey", lambda *_: Grey())
    models.save_checkpoint(tmp_path / "grey.pt", {
        "record": {"method": "grey", "model": "grey"}, "network": Grey().state_dict(), "classes": None, "size": 32,
        "epoch": 1, "data": "nowhere", "seed": 0, "flags": {"noise": "poisson-gaussian"}})
    return tmp_path / "grey.pt"


def colours(folder, count, size=(40, 33)):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", size, (200, 20 * index, 60)).save(folder / f"{index}.png")


def test_a_grey_network_makes_grey_pictures_of_colour_photos(grey, tmp_path):
    colours(tmp_path / "in", 2)
    assert run("--checkpoint", grey, "--input", tmp_path / "in", "--output-dir", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "1_denoised.png") as image:
        assert image.mode == "L" and image.size == (40, 33)
        assert image.getpixel((3, 3)) == round((0.299 * 200 + 0.587 * 20 + 0.114 * 60) / 2)


def test_a_grey_network_on_colour_images_is_measured_in_grey(grey, tmp_path, capsys):
    colours(tmp_path / "in", 5)
    command = ("--checkpoint", grey, "--data", tmp_path / "in", "--split", "all", "--sigmas", 0, 0.2)
    assert run(*command, "--output-dir", tmp_path / "out") == 0
    table = capsys.readouterr().out
    assert "on grey:" in table and "Poisson-Gaussian" in table and "RGB" not in table  # the noise of its training
    metrics = strict((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["images"] == 5 and metrics["latency"]["median_ms"] > 0
    halved = [(0.299 * 200 + 0.587 * 20 * index + 0.114 * 60) / 2 / 255 for index in range(5)]
    expected = np.mean([-20 * math.log10(value) for value in halved])
    assert metrics["levels"][0]["psnr_db"] == pytest.approx(expected, abs=0.1)
    assert Image.open(tmp_path / "out" / "grid.png").width == 8 + 3 * (6 * 40 + 8)  # 33 pixels high, six times enlarged
    assert run(*command, "--output-dir", tmp_path / "out", "--noise", "gaussian") == 0
    assert "noise: Gaussian" in capsys.readouterr().out


@pytest.mark.parametrize("words, sentence", [
    (["--luma"], "--luma is of colour images"),
    (["--noise-protocol", "literature"], "take --noise gaussian"),
    (["--data", "digits", "--split", "val"], "takes grey images, and digits is drawn"),
    (["--shave", "16"], "--shave 16 leaves nothing"),
    (["--split", "all", "--data", "digits"], "take one split"),
])
def test_wrong_usage_of_a_grey_network_ends_in_one_sentence(grey, tmp_path, capsys, words, sentence):
    colours(tmp_path / "in", 3, (32, 32))
    command = ["--checkpoint", grey, "--data", tmp_path / "in", "--split", "all", "--output-dir", tmp_path / "out"]
    assert run(*command, *words) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_pairs_are_measured_with_their_own_noise(checkpoints, tmp_path, capsys):
    rng = np.random.default_rng(0)
    clean = rng.integers(60, 190, (6, 33, 40, 3))
    for index, picture in enumerate(clean):
        for kind, pixels in (("mean", picture), ("real", picture + 5 * (-1) ** index)):
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{index}_{kind}.png")
    command = ("--checkpoint", checkpoints["dnas"], "--data", tmp_path, "--split", "all", "--no-latency")
    assert run(*command, "--output-dir", tmp_path / "out", "--sigmas", 0.1, 0.2) == 0
    table = capsys.readouterr().out
    assert "\nreal " in table and "sigma" not in table and "noise: real" in table and "mean" not in table
    metrics = strict((tmp_path / "out" / "metrics.json").read_text())
    (level,) = metrics["levels"]
    assert level["sigma"] == "real" and metrics["images"] == 6
    assert level["input_psnr_db"] == pytest.approx(20 * math.log10(255 / 5), abs=1e-4)
    assert metrics["means"]["all_levels"]["input_psnr_db"] == metrics["means"]["noisy_levels"]["input_psnr_db"] > 30
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert grid.shape[1] == 8 + 3 * (6 * 40 + 8) and len(np.unique(grid)) > 50


def test_all_pictures_of_a_folder_and_the_training_folders_of_the_checkpoint(checkpoints, tmp_path):
    checkpoint = models.read_checkpoint(checkpoints["dnas"])
    for split, count in (("train", 9), ("val", 4), ("test", 11)):
        colours(tmp_path / "in" / split, count, (32, 32))
    models.save_checkpoint(tmp_path / "c.pt", {**checkpoint, "data": str(tmp_path / "in"),
                                               "flags": {"train_folders": ["train", "test"]}})

    def images(*flags):
        command = ("--checkpoint", tmp_path / "c.pt", "--sigmas", 0.1, "--no-latency", "--output-dir", tmp_path / "out")
        assert run(*command, *flags) == 0
        return strict((tmp_path / "out" / "metrics.json").read_text())["images"]
    assert images() == 2  # a tenth of train and test was held back in the training
    assert images("--split", "all") == 24
    assert images("--data", tmp_path / "in" / "val", "--split", "all") == 4
    assert run("--checkpoint", tmp_path / "c.pt", "--split", "test") == 2  # it was trained on
