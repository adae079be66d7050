"""eval.py: the evaluation and its protocols, the reports, the command line."""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import eval as evaluation
import files
import models
import registry
from eval import psnr, ssim


class Identity(nn.Module):
    """Gives back its input as the denoised image."""

    denoises, classifies = True, False

    def forward(self, x):
        return models.Output(x, None)


class Oracle(nn.Module):
    """Classifies images of grey level (label + 1) / 20: the true class is `rank` places behind the best."""

    denoises, classifies = False, True

    def __init__(self, rank=0, num_classes=10):
        super().__init__()
        self.rank, self.num_classes = rank, num_classes

    def forward(self, x):
        label = (x.mean((1, 2, 3)) * 20 - 1).round().long()
        best_first = torch.arange(self.num_classes, dtype=torch.float32)
        distance = (torch.arange(self.num_classes) - label[:, None] + self.rank) % self.num_classes
        return models.Output(None, -best_first[distance])


def grey_images(labels, size=16):
    levels = torch.tensor([round(255 * (label + 1) / 20) for label in labels], dtype=torch.uint8)
    return data.Scenes(levels.view(-1, 1, 1, 1).repeat(1, 3, size, size), list(labels))


def random_images(count=6, size=24):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return data.Scenes(images, [-1] * count)


def measure(network, dataset, batch_size=4, classes=None, **protocol):
    loader = data.make_loader(dataset, batch_size)
    return evaluation.evaluate(network, loader, evaluation.Protocol(**protocol), classes=classes)


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")
    return json.loads(text, parse_constant=refuse)


def read_metrics(folder):
    return strict((Path(folder) / "metrics.json").read_text())


# --- evaluate -----------------------------------------------------------------------------------------------


def test_identity_reproduces_the_noisy_input():
    """A network that does nothing has the input's numbers, but for clamp and rounding of its output."""
    mid_grey = data.Scenes(torch.full((8, 3, 32, 32), 128, dtype=torch.uint8), [-1] * 8)
    metrics = measure(Identity(), mid_grey, sigmas=(0, 0.05, 0.1, 0.5))
    exact, fine, low, high = metrics["levels"]
    for level, sigma in ((fine, 0.05), (low, 0.1), (high, 0.5)):
        assert level["input_psnr_db"] == pytest.approx(-20 * math.log10(sigma), abs=0.15)
    assert fine["psnr_db"] == pytest.approx(fine["input_psnr_db"], abs=0.02)  # nothing clamped, only rounded
    assert fine["ssim"] == pytest.approx(fine["input_ssim"], abs=1e-3)
    assert high["psnr_db"] > high["input_psnr_db"] + 1  # clamping alone helps at much noise
    assert exact["psnr_db"] == exact["input_psnr_db"] == 100 and exact["ssim"] == pytest.approx(1)
    assert high["accuracy"] is None and metrics["labelled_images"] == 0 and metrics["class_accuracy"] == {}
    assert metrics["chance_accuracy"] is None and "always answering" not in evaluation.format_table(metrics)

    clipped = measure(Identity(), mid_grey, sigmas=(0.5,), clip=True)["levels"][0]
    assert clipped["psnr_db"] == pytest.approx(clipped["input_psnr_db"], abs=0.01)
    assert clipped["psnr_db"] == pytest.approx(high["psnr_db"], abs=1e-9)


def test_means_are_over_levels_and_equal_images_count_as_100_db():
    metrics = measure(Identity(), random_images(), sigmas=(0, 0.1, 0.3))
    levels, means = metrics["levels"], metrics["means"]
    for name in ("input_psnr_db", "psnr_db", "ssim"):
        values = [level[name] for level in levels]
        assert means["noisy_levels"][name] == pytest.approx(sum(values[1:]) / 2)
        assert means["all_levels"][name] == pytest.approx(sum(values) / 3)
    assert levels[0]["psnr_db"] == 100
    text = json.dumps(metrics, allow_nan=False)
    assert evaluation.format_table(strict(text)) == evaluation.format_table(metrics)  # the file is enough
    only_clean = measure(Identity(), random_images(), sigmas=(0,))
    assert only_clean["means"]["noisy_levels"]["psnr_db"] is None
    assert "100.00" in evaluation.format_table(only_clean)


@pytest.mark.parametrize("network", [Identity(), Oracle()])
def test_same_numbers_for_every_batch_size(network):
    dataset = random_images(7) if network.denoises else grey_images(range(7))
    first = measure(network, dataset, batch_size=1, sigmas=(0.1, 0.7))
    for batch_size in (2, 3, 7):
        assert measure(network, dataset, batch_size=batch_size, sigmas=(0.1, 0.7)) == first
    alone, other_seed = (measure(network, dataset, sigmas=(0.7,), seed=seed)["levels"][0] for seed in (0, 1))
    assert alone == first["levels"][1]  # whatever the other levels are
    assert other_seed != alone or not network.denoises


@pytest.mark.parametrize("rank, top1, top5", [(0, 1, 1), (1, 0, 1), (4, 0, 1), (5, 0, 0)])
def test_accuracy(rank, top1, top5):
    metrics = measure(Oracle(rank), grey_images([*range(10)] * 2), sigmas=(0, 0.05))
    for level in (*metrics["levels"], metrics["means"]["all_levels"]):
        assert (level["accuracy"], level["top5_accuracy"]) == (top1, top5)
        assert level["psnr_db"] is None and level["input_ssim"] is None
    assert metrics["labelled_images"] == 20 and metrics["num_classes"] == 10
    record = {"accuracy": top1, "images": 2}
    assert metrics["class_accuracy"] == {f"class {label}": record for label in range(10)}


def test_chance_is_the_share_of_the_commonest_class():
    class First(Oracle):
        """Always answers class 0."""

        def forward(self, x):
            return models.Output(None, torch.eye(10)[:1].expand(len(x), -1))

    labels = [0] * 5 + [1] * 3 + [7] * 2 + [-1] * 2  # the last two are not known
    metrics = measure(First(), grey_images(labels), classes=[*"abcdefghij"], sigmas=(0, 0.1))
    assert metrics["chance_accuracy"] == 0.5 == metrics["levels"][1]["accuracy"]
    assert metrics["images"] == 12 and metrics["labelled_images"] == 10 and metrics["commonest_class"] == "a"
    assert metrics["class_accuracy"] == {"a": {"accuracy": 1, "images": 5}, "b": {"accuracy": 0, "images": 3},
                                         "h": {"accuracy": 0, "images": 2}}
    table = evaluation.format_table(metrics)
    assert "always answering the commonest class, a, gives 50.0 % (10 classes)" in table
    assert [line.split() for line in table.splitlines() if line[:2] in ("a ", "b ", "h ")] == [
        ["a", "100.0%", "5"], ["b", "0.0%", "3"], ["h", "0.0%", "2"]]
    metrics = measure(Oracle(), grey_images([3, 3, 4, 4]), sigmas=(0,))
    assert metrics["chance_accuracy"] == 0.5 and metrics["commonest_class"] is None
    assert "always answering one class gives 50.0 %" in evaluation.format_table(metrics)


def test_the_mean_over_levels_of_each_class():
    class Dark(Oracle):
        """Right where there is no noise, else class 0."""

        def forward(self, x):
            clean = x.std((2, 3)).max() < 0.01
            return super().forward(x) if clean else models.Output(None, torch.eye(10)[:1].expand(len(x), -1))

    metrics = measure(Dark(), grey_images([0, 1, 1]), sigmas=(0, 0.3, 0.5, 0.7))
    assert [metrics["class_accuracy"][f"class {label}"]["accuracy"] for label in (0, 1)] == [1, 0.25]


def test_the_classes_of_many_are_in_the_file_only():
    metrics = measure(Oracle(num_classes=21), grey_images([*range(19)] * 2), sigmas=(0,))
    assert len(metrics["class_accuracy"]) == 19 and "\nclass 18 " in evaluation.format_table(metrics)
    metrics["class_accuracy"] |= {"x": {"accuracy": 1, "images": 1}, "y": {"accuracy": 1, "images": 1}}
    assert "\nclass 18 " not in evaluation.format_table(metrics)


def test_top5_needs_more_than_five_classes():
    metrics = measure(Oracle(num_classes=5), grey_images(range(4)), sigmas=(0,))
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


def test_luma_and_shave_reach_the_report():
    dataset, sigma = random_images(3, size=24), 0.1
    plain, shaved, y = (measure(Identity(), dataset, sigmas=(sigma,), **how)
                        for how in ({}, {"shave": 3}, {"y_only": True}))
    clean = dataset.images.float() / 255
    noisy = torch.stack([image + sigma * torch.from_numpy(data.PROTOCOLS["own"](image.shape, place, 0))
                         for place, image in enumerate(clean)])
    clean, noisy = clean.double(), noisy.double()
    inner = psnr(noisy[..., 3:21, 3:21], clean[..., 3:21, 3:21]).mean().item()
    assert shaved["levels"][0]["input_psnr_db"] == pytest.approx(inner, abs=1e-5)
    assert shaved["protocol"]["shaved_px"] == 3
    assert plain["levels"][0]["input_ssim"] == pytest.approx(ssim(noisy, clean).mean().item(), abs=1e-5)
    levels = torch.tensor((65.481, 128.553, 24.966), dtype=torch.float64) / 255
    error = ((noisy - clean).permute(0, 2, 3, 1) @ levels).square().mean((1, 2))
    assert y["levels"][0]["input_psnr_db"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-5)
    assert y["levels"][0]["input_psnr_db"] > plain["levels"][0]["input_psnr_db"] + 2
    assert "on RGB:" in evaluation.format_table(plain)
    assert "RGB without 3 pixels" in evaluation.format_table(shaved)
    assert "Y (ITU-R 601, 16 to 235)" in evaluation.format_table(y)
    assert y["levels"][0]["ssim"] != plain["levels"][0]["ssim"] != shaved["levels"][0]["ssim"]
    with pytest.raises(ValueError, match="--shave 12 leaves nothing of an image of 24x24"):
        measure(Identity(), dataset, sigmas=(sigma,), shave=12)


def test_the_protocol_of_the_literature_gives_every_image_the_same_noise():
    clean = random_images(3, size=20)
    metrics = measure(Identity(), clean, sigmas=(50 / 255,), noise_protocol="literature", seed=7)
    noise = np.random.RandomState(0).normal(0, 50 / 255, (20, 20, 3))
    expected = -10 * math.log10(np.square(noise).mean())
    assert metrics["levels"][0]["input_psnr_db"] == pytest.approx(expected, abs=1e-4)
    assert "RandomState(0)" in evaluation.format_table(metrics) and metrics["protocol"]["noise_seed"] is None
    assert "seed 0" in evaluation.format_table(measure(Identity(), clean, sigmas=(0.2,)))


def test_signal_dependent_noise_is_less_in_the_dark():
    found = []
    for brightness in (0, 255):
        scene = data.Scenes(torch.full((4, 3, 32, 32), brightness, dtype=torch.uint8), [-1] * 4)
        metrics = measure(Identity(), scene, sigmas=(0.2,), noise="poisson-gaussian")
        found.append(metrics["levels"][0]["input_psnr_db"])
        for batch_size in (1, 4):
            again = measure(Identity(), scene, batch_size, sigmas=(0.1, 0.2), noise="poisson-gaussian")
            assert again["levels"][1] == metrics["levels"][0]
    assert found == pytest.approx([-10 * math.log10(0.04 * share) for share in (0.1, 1)], abs=0.15)
    assert "Poisson-Gaussian" in evaluation.format_table(metrics)


def test_levels_are_printed_as_they_are_typed():
    levels = [15 / 255, 25 / 255, 0.2]
    rows = evaluation.format_table(measure(Identity(), random_images(2), sigmas=levels)).splitlines()[2:5]
    assert [row.split()[0] for row in rows] == ["15/255", "25/255", "51/255"]
    rows = evaluation.format_table(measure(Identity(), random_images(2), sigmas=[0, 0.1])).splitlines()[2:4]
    assert [row.split()[0] for row in rows] == ["0", "0.1"]


def test_grid_shows_noisy_denoised_clean(tmp_path):
    class Joint(nn.Module):
        denoises = classifies = True

        def forward(self, x):
            return models.Output(torch.zeros_like(x), torch.tensor([[0.0, 9.0]]))

    white = data.Scenes(torch.full((2, 3, 64, 64), 255, dtype=torch.uint8), [1, 0])
    evaluation.save_grid(tmp_path / "grid.png", Joint(), white, evaluation.Protocol(sigmas=(0, 0.5, 0.6)),
                         classes=["cat", "a dog " * 40])
    grid = np.array(Image.open(tmp_path / "grid.png"))
    top, left, step = 28, 8, 200
    tiles = [grid[top:top + 192, left + i * step:left + i * step + 192] for i in range(3)]
    assert grid.shape == (28 + 2 * (192 + 2 * 20 + 16), 8 + 3 * 200, 3)
    assert (tiles[1] == 0).all() and (tiles[2] == 255).all() and 20 < tiles[0].std()
    assert (tiles[0][0::3, 0::3] == tiles[0][2::3, 2::3]).all()  # 64 pixels, each shown as 3x3
    text = grid[top + 192:top + 192 + 48].reshape(-1, 3).astype(int)
    second = grid[top + 248 + 192:].reshape(-1, 3).astype(int)
    assert ((text[:, 1] - text[:, 0]) > 60).any()  # right: green
    assert not ((text[:, 0] - text[:, 1]) > 60).any()
    assert ((second[:, 0] - second[:, 1]) > 60).any()  # wrong: red


# --- Command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of untrained networks, one per kind, as train.py writes them."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    for model in ("cnas", "dnas", "dcnas"):
        torch.manual_seed(0)
        arch = models.named_arch(f"{model}-k3-e3", 0 if model == "dnas" else 10)
        paths[model] = folder / f"{model}.pt"
        files.save_checkpoint(paths[model], {
            "record": files.make_record("tfnas", arch.to_dict(), {}),
            "network": models.Network(arch).state_dict(),
            "classes": None if model == "dnas" else [*"0123456789"],
            "size": 32, "epoch": 3, "data": "digits", "seed": 5, "splits": 2})
    return paths


def run(*argv):
    """Run main in this process, return its exit code."""
    try:
        evaluation.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def change(checkpoint, path, without="", **content):
    """Write a checkpoint with other content, and without one entry."""
    content = {**files.read_checkpoint(checkpoint), **content}
    files.save_checkpoint(path, {name: value for name, value in content.items() if name != without})
    return path


@pytest.mark.parametrize("model, columns", [("dcnas", 3), ("dnas", 3), ("cnas", 2)])
def test_evaluation_writes_its_files(checkpoints, tmp_path, capsys, model, columns):
    flags = () if model == "dcnas" else ("--no-latency",)
    assert run("--checkpoint", checkpoints[model], "--test-images", 5, "--sigmas", 0, 0.2, *flags,
               "--output-dir", tmp_path) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "table.txt").read_text()
    assert table in printed and "test: " in printed
    metrics = read_metrics(tmp_path)
    assert list(metrics)[:3] == ["format", "version", "made"] and metrics["split"] == "test"
    assert (metrics["format"], metrics["version"]) == ("joint-eval", 2)
    assert metrics["data"] == "digits" and metrics["data_seed"] == 5 and metrics["images"] == 5
    assert metrics["network"]["parameters"] > 100_000
    assert metrics["latency"]["median_ms"] > 0 if model == "dcnas" else metrics["latency"] is None
    level = metrics["levels"][1]
    assert (level["psnr_db"] is None) == (model == "cnas")
    assert (level["accuracy"] is None) == (model == "dnas")
    for words, there in (("PSNR", model != "cnas"), ("one class gives 20.0 %", model != "dnas"),
                         ("latency", model == "dcnas"), ("not clipped", True),
                         ("multiply-accumulates", True)):
        assert (words in table) == there, words
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width == 8 + columns * (192 + 8) and len(set(grid.convert("L").tobytes())) > 50


def test_the_latency_is_that_of_the_setting_of_the_search(checkpoints, tmp_path, monkeypatch):
    quick = functools.partial(evaluation.measure_network, warmup=0, repeats=2, seconds=0)
    monkeypatch.setattr(evaluation, "measure_network", quick)
    record = files.read_checkpoint(checkpoints["dcnas"])["record"]
    for device_type, batch in (("cpu", 3), ("cuda", 1)):
        setting = vars(evaluation.this_setting("cpu", size=32, num_classes=0, batch=3, mode="folded"))
        found = {"setting": {**setting, "device_type": device_type}, "measured_ms": 3e6, "slowdown": 3.0}
        changed = change(checkpoints["dcnas"], tmp_path / "c.pt", record={**record, "latency": found})
        assert run("--checkpoint", changed, "--test-images", 1, "--sigmas", 0, "--device", "cpu",
                   "--output-dir", tmp_path) == 0
        metrics, text = read_metrics(tmp_path)["latency"], (tmp_path / "table.txt").read_text()
        assert metrics["batch"] == batch and 0 < metrics["cpu_share"] <= 1
        # The network of the search is its own reference.
        assert metrics.get("slowdown") == (metrics["median_ms"] / 1e6 if batch == 3 else None)
        assert (" ms now, 1000000.00 ms at the table's speed per batch" in text) == (batch == 3)
        assert ("note: the device now takes 0.00 times" in text) == (batch == 3)


def test_the_split_is_that_of_the_training(checkpoints, tmp_path):
    """test and val are different images; a checkpoint without "splits" has the val of its time as test."""
    found = {}
    old = change(checkpoints["dnas"], tmp_path / "old.pt", without="splits")
    for name, flags in (("test", ("--test-images", 3)), ("val", ("--split", "val", "--val-images", 3)),
                        ("old test", ("--test-images", 3, "--checkpoint", old)),
                        ("old val", ("--split", "val", "--val-images", 3, "--checkpoint", old))):
        assert run("--checkpoint", checkpoints["dnas"], "--sigmas", 0.1, "--no-latency", *flags,
                   "--output-dir", tmp_path) == 0
        metrics = read_metrics(tmp_path)
        assert metrics["images"] == 3 and metrics["split"] == name.split()[-1]
        found[name] = metrics["levels"]
    assert found["val"] != found["test"] == found["old test"] == found["old val"]


def test_whole_unlabelled_pictures_of_different_sizes(checkpoints, tmp_path):
    for split in ("train", "val"):
        for size in ((40, 33), (9, 50)):
            (tmp_path / split).mkdir(exist_ok=True)
            Image.new("RGB", size, (90, 120, 60)).save(tmp_path / split / f"{size[0]}.png")
    assert run("--checkpoint", checkpoints["dcnas"], "--data", tmp_path, "--sigmas", 0.2, "--no-latency",
               "--output-dir", tmp_path / "out") == 0
    metrics = read_metrics(tmp_path / "out")
    assert metrics["images"] == 2 and metrics["ssim_images"] == 1 and metrics["latency"] is None
    level = metrics["levels"][0]
    assert level["accuracy"] is None and level["input_psnr_db"] == pytest.approx(14, abs=0.5)


def test_other_names_of_classes_are_told(checkpoints, tmp_path, capsys):
    for split in ("train", "test"):
        for name in "abcdefghij":
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (32, 32)).save(tmp_path / split / name / f"{index}.png")
    assert run("--checkpoint", checkpoints["dcnas"], "--data", tmp_path, "--sigmas", 0, "--no-latency",
               "--test-images", 10, "--output-dir", tmp_path / "out") == 0
    assert "have other names" in capsys.readouterr().err
    assert read_metrics(tmp_path / "out")["labelled_images"] == 10
    changed = change(checkpoints["dcnas"], tmp_path / "c.pt", classes=list("jabcdefghi"))
    assert run("--checkpoint", changed, "--data", tmp_path, "--sigmas", 0, "--no-latency",
               "--output-dir", tmp_path / "out") == 2  # counted by their order, a would be b
    assert "are in another order than in the training" in capsys.readouterr().err


@pytest.mark.parametrize("words, sentence", [
    (["--checkpoint", "none.pt"], "no checkpoint"),
    (["--data", "missing"], "missing"),
    (["--data", "two"], "10 classes"),
    (["--data", "plain", "--checkpoint", "cnas"], "no labels"),
    (["--sigmas", "-1"], "from 0 to 100, not -1"),
    (["--sigmas", "nan"], "from 0 to 100, not nan"),
    (["--sigma", "x"], "--sigma"),
    (["--sigma", "0.2"], "--sigma is for --input; an evaluation takes --sigmas"),
    (["--overwrite"], "--overwrite is for --input; leave it out"),
    (["--split", "train"], "--split"),
    (["--batch-size", "0"], "--batch-size"),
    (["--device", "nonsense"], "nonsense"),
    (["--checkpoint", "cnas", "--self-ensemble"], "leave --self-ensemble out"),
    (["--checkpoint", "cnas", "--data", "digit-pairs", "--size", "64", "--test-images", "2"],
     "classifies whole images"),
    (["--noise", "poisson-gaussian", "--noise-protocol", "literature", "--input", "."],
     "take --noise gaussian"),
])
def test_wrong_usage_ends_in_one_sentence(checkpoints, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    for folder in ("two/train/a", "two/train/b", "two/val/a", "two/val/b", "plain/train", "plain/val"):
        Path(folder).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (32, 32)).save(Path(folder) / f"{index}.png")
    words = [str(checkpoints.get(word, word)) for word in words]
    assert run("--checkpoint", checkpoints["dcnas"], *words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    names = ("eval.py: error:", f"{Path(sys.argv[0]).name}: error:")
    assert sentence in error[-1] and error[-1].startswith(names)
    assert not Path("runs").exists()  # refused before any work


def test_help_is_complete(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for flag in ("--checkpoint", "--data", "--split", "--sigmas", "--input", "--sigma", "--clip", "--seed",
                 "--batch-size", "--threads", "--device", "--output-dir", "--no-latency", "--test-images",
                 "examples:"):
        assert flag in text
    assert "None" not in text and " ".join(text.split()).count("that of the checkpoint's training") >= 5
    parser = evaluation.build_parser()
    assert all("default" in action.help for action in parser._actions if action.dest != "help")


def test_the_self_ensemble_through_the_command(checkpoints, tmp_path, capsys):
    command = ("--checkpoint", checkpoints["dcnas"], "--test-images", 3, "--sigmas", "25/255", "--no-latency")
    assert run(*command, "--output-dir", tmp_path / "one") == 0
    assert run(*command, "--output-dir", tmp_path / "eight", "--self-ensemble") == 0
    printed = capsys.readouterr().out
    assert "mean of eight passes" in printed and "\n25/255 " in printed
    one, eight = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "eight")
    assert eight["protocol"]["self_ensemble"] and not one["protocol"]["self_ensemble"]
    assert eight["levels"][0]["psnr_db"] != one["levels"][0]["psnr_db"]
    assert eight["levels"][0]["accuracy"] == one["levels"][0]["accuracy"]
    assert eight["network"] == one["network"]
    assert one["levels"][0]["sigma"] == 25 / 255


# --- Grey networks, larger images, pairs, whole folders -----------------------------------------------------


class Halved(nn.Module):
    """A denoiser that halves its input."""

    denoises, classifies = True, False

    def __init__(self, channels, scale):
        super().__init__()
        self.channels, self.scale = channels, scale
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        assert x.shape[1] == self.channels
        return models.Output(data.enlarge(x, self.scale) * self.factor, None)


@pytest.fixture
def halved(tmp_path, monkeypatch):
    """A function of (channels, scale): a checkpoint of such a network."""
    def make(channels=1, scale=1):
        monkeypatch.setitem(registry.NAMED, "halved", registry.Named(lambda _: Halved(channels, scale)))
        files.save_checkpoint(tmp_path / "halved.pt", {
            "record": registry.named_record("halved", 1, {}), "network": Halved(channels, scale).state_dict(),
            "classes": None, "size": 32, "epoch": 1, "data": "nowhere", "seed": 0,
            "flags": {"noise": "poisson-gaussian"}})
        return tmp_path / "halved.pt"
    return make


def colours(folder, count, size=(40, 33)):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", size, (200, 20 * index, 60)).save(folder / f"{index}.png")


def test_a_grey_network_makes_grey_pictures_of_colour_photos(halved, tmp_path):
    colours(tmp_path / "in", 2)
    assert run("--checkpoint", halved(), "--input", tmp_path / "in", "--output-dir", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "1_denoised.png") as image:
        assert image.mode == "L" and image.size == (40, 33)
        assert image.getpixel((3, 3)) == round((0.299 * 200 + 0.587 * 20 + 0.114 * 60) / 2)


def test_a_grey_network_on_colour_images_is_measured_in_grey(halved, tmp_path, capsys):
    colours(tmp_path / "in", 5)
    command = ("--checkpoint", halved(), "--data", tmp_path / "in", "--split", "all", "--sigmas", 0, 0.2,
               "--no-latency")
    assert run(*command, "--output-dir", tmp_path / "out") == 0
    table = capsys.readouterr().out
    assert "on grey:" in table and "RGB" not in table
    assert "Poisson-Gaussian" in table  # the noise of its training
    metrics = read_metrics(tmp_path / "out")
    halves = [(0.299 * 200 + 0.587 * 20 * index + 0.114 * 60) / 2 / 255 for index in range(5)]
    assert metrics["images"] == 5
    expected = np.mean([-20 * math.log10(half) for half in halves])
    assert metrics["levels"][0]["psnr_db"] == pytest.approx(expected, abs=0.1)
    assert Image.open(tmp_path / "out" / "grid.png").width == 8 + 3 * (6 * 40 + 8)  # six times enlarged
    assert run(*command, "--output-dir", tmp_path / "out", "--noise", "gaussian") == 0
    assert "noise: Gaussian" in capsys.readouterr().out


def test_super_resolution_has_defaults_of_its_own(halved, tmp_path, capsys):
    colours(tmp_path / "in", 2, (41, 33))
    command = ("--checkpoint", halved(3, 2), "--data", tmp_path / "in", "--split", "all", "--no-latency",
               "--output-dir", tmp_path / "out")
    assert run(*command) == 0
    metrics = read_metrics(tmp_path / "out")
    protocol = metrics["protocol"]
    assert [level["sigma"] for level in metrics["levels"]] == [0]
    assert protocol["shaved_px"] == protocol["scale"] == 2
    assert protocol["colour"].startswith("Y") and protocol["input"] == "bicubic x2"
    assert metrics["network"]["size_px"] == 16 and metrics["levels"][0]["input_psnr_db"] == 100
    assert run(*command, "--no-luma", "--shave", 0, "--sigmas", 0.1) == 0
    protocol = read_metrics(tmp_path / "out")["protocol"]
    assert (protocol["colour"], protocol["shaved_px"]) == ("RGB", 0)


@pytest.mark.parametrize("words, sentence", [
    (["--luma"], "--luma is of colour images"),
    (["--noise-protocol", "literature"], "take --noise gaussian"),
    (["--data", "digits", "--split", "val"], "takes grey images, and digits is drawn"),
    (["--shave", "16"], "--shave 16 leaves nothing"),
    (["--split", "all", "--data", "digits"], "take one split"),
])
def test_wrong_usage_of_a_grey_network_ends_in_one_sentence(halved, tmp_path, capsys, words, sentence):
    colours(tmp_path / "in", 3, (32, 32))
    command = ("--checkpoint", halved(), "--data", tmp_path / "in", "--split", "all", "--output-dir",
               tmp_path / "out")
    assert run(*command, *words) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_pairs_are_measured_with_their_own_noise(checkpoints, halved, tmp_path, capsys):
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    clean = rng.integers(60, 190, (6, 33, 40, 3))
    for index, picture in enumerate(clean):
        for kind, pixels in (("mean", picture), ("real", picture + 5 * (-1) ** index)):
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}_{kind}.png")
    command = ("--checkpoint", checkpoints["dnas"], "--data", folder, "--split", "all", "--no-latency")
    assert run(*command, "--output-dir", tmp_path / "out", "--sigmas", 0.1, 0.2) == 0
    table = capsys.readouterr().out
    assert "\nreal " in table and "sigma" not in table and "noise: real" in table and "mean" not in table
    metrics = read_metrics(tmp_path / "out")
    (level,) = metrics["levels"]
    assert level["sigma"] == "real" and metrics["images"] == 6
    assert level["input_psnr_db"] == pytest.approx(20 * math.log10(255 / 5), abs=1e-4)
    assert metrics["means"]["all_levels"] == metrics["means"]["noisy_levels"]
    assert metrics["means"]["all_levels"]["input_psnr_db"] > 30
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert grid.shape[1] == 8 + 3 * (6 * 40 + 8) and len(np.unique(grid)) > 50
    assert run(*command, "--checkpoint", halved(3, 2), "--output-dir", tmp_path / "out") == 2
    assert "pairs of one size" in capsys.readouterr().err


def test_all_pictures_of_a_folder_and_the_training_folders_of_the_checkpoint(checkpoints, tmp_path):
    for split, count in (("train", 9), ("val", 4), ("test", 11)):
        colours(tmp_path / "in" / split, count, (32, 32))
    changed = change(checkpoints["dnas"], tmp_path / "c.pt", without="splits", data=str(tmp_path / "in"),
                     flags={"train_folders": ["train", "test"]})

    def images(*flags):
        command = ("--checkpoint", changed, "--sigmas", 0.1, "--no-latency", "--output-dir", tmp_path / "out")
        assert run(*command, *flags) == 0
        return read_metrics(tmp_path / "out")["images"]
    assert images() == images("--split", "val") == 2  # a tenth of train and test was held back
    assert images("--split", "all") == 24
    assert images("--data", tmp_path / "in" / "val", "--split", "all") == 4
