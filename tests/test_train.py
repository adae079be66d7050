"""train.py: the losses by hand, the loop, resuming, and what its files hold."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import data
import eval as evaluation
import models
import train

CPU = torch.device("cpu")
SMALL = ["--size", "16", "--train-images", "40", "--val-images", "10", "--batch-size", "8"]


# --- losses --------------------------------------------------------------------------------------------------


def test_charbonnier_by_hand():
    clean = torch.zeros(1, 3, 2, 2)
    image = torch.full_like(clean, 0.3)
    assert train.charbonnier(image, clean).item() == pytest.approx(math.sqrt(0.3**2 + 1e-6))
    assert train.charbonnier(clean, clean).item() == pytest.approx(1e-3)


def test_task_losses_are_the_papers_sums():
    generator = torch.Generator().manual_seed(0)
    clean, image = torch.rand(2, 2, 3, 16, 16, generator=generator)
    logits, labels = torch.randn(2, 5, generator=generator), torch.tensor([1, 4])
    output = models.Output(image, logits)
    ce = F.cross_entropy(logits, labels, label_smoothing=0.1)
    den = 0.8 * train.charbonnier(image, clean) + 0.2 * (1 - evaluation.ssim(image, clean).mean())
    for loss, expected in (("cls", ce), ("den", den), ("both", 0.1 * ce + 0.9 * den)):
        assert train.task_loss(output, clean, labels, loss)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_follows_network_and_data():
    both, den, cls = (models.Network(models.named_arch(f"{m}-k3-e3", 3)) for m in ("dcnas", "dnas", "cnas"))
    assert (train.choose_loss(both, True), train.choose_loss(den, False), train.choose_loss(cls, True)) == (
        "both", "den", "cls")
    assert train.choose_loss(both, False, "den") == "den"
    for network, labelled, loss in ((cls, False, None), (both, False, None), (cls, True, "den"), (den, True, "both")):
        with pytest.raises(ValueError):
            train.choose_loss(network, labelled, loss)


# --- the pieces of the loop ----------------------------------------------------------------------------------


def test_schedule_warms_up_and_falls_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = train.make_schedule(optimizer, "cosine", epochs=10, warmup_epochs=1, steps_per_epoch=10)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert 0 < rates[0] < 0.2 and rates[:10] == sorted(rates[:10]) and max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)), abs=0.02) and rates[-1] < 0.01


def test_noise_belongs_to_seed_and_epoch():
    digits = data.load_data("digits", size=16, train_images=20, val_images=4)

    def first(seed, epoch):
        loader = data.make_loader(digits.train, 8, shuffle=True, seed=seed)
        noisy, clean, labels = next(train.NoisyBatches(loader, CPU, data.Noise(1.0), seed).epoch(epoch))
        return noisy
    assert torch.equal(first(0, 3), first(0, 3))
    assert not torch.equal(first(0, 3), first(0, 4)) and not torch.equal(first(0, 3), first(1, 3))
    loader = data.make_loader(digits.train, 8)
    noisy, clean, labels = next(train.NoisyBatches(loader, CPU, data.Noise(0.0), 0).epoch(0))
    assert torch.equal(noisy, clean) and labels.tolist() == digits.train.targets[:8]


def test_validation_is_the_same_for_any_batch_size_and_leaves_the_mode():
    digits = data.load_data("digits", size=16, train_images=10, val_images=13)
    network = models.Network(models.named_arch("dcnas-k3-e3", 10)).train()
    results = [train.validate(network, data.make_loader(digits.val, size), loss="both", device=CPU, noise=data.Noise(1.0))
               for size in (4, 13)]
    assert network.training
    for name in ("accuracy", "psnr_db"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5)


# --- the command ---------------------------------------------------------------------------------------------


def run(output_dir, *flags):
    train.main(["--model", "dcnas-k3-e3", "--output-dir", str(output_dir), *SMALL, *flags])
    return models.read_checkpoint(output_dir / "last.pt")


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, monkeypatch, capsys):
    flags = ["--epochs", "3", "--ema", "0.9"]
    whole = run(tmp_path / "whole", *flags)
    original = train.write_summary

    def stop_after_one(path, rows):
        original(path, rows)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "write_summary", stop_after_one)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "part", *flags)
    assert caught.value.code == train.RESUME_ME == 75 and "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "part")])  # every setting comes from the run
    resumed = models.read_checkpoint(tmp_path / "part" / "last.pt")
    assert resumed["epoch"] == 3
    for key in ("network", "ema"):
        assert all(torch.equal(resumed[key][name], value) for name, value in whole[key].items())
    losses = [[row["train_loss"] for row in state["rows"]] for state in (whole, resumed)]
    assert losses[0] == losses[1]


def test_files_hold_what_rebuilds_the_network(tmp_path):
    state = run(tmp_path, "--epochs", "2")
    network, checkpoint = models.load_checkpoint(tmp_path / "best.pt")
    assert checkpoint["classes"] == [str(d) for d in range(10)] and checkpoint["size"] == 16
    assert network.denoises and network.classifies and not network.training
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) == state["rows"][1]["train_loss"]
    assert {"train_ce", "train_den", "val_accuracy", "val_psnr_db", "lr"} <= set(rows[0])


@pytest.mark.parametrize("optimizer, lr", [("adamw", "0.005"), ("sgd", "0.05")])
def test_training_learns(tmp_path, optimizer, lr):
    """A few images, clean: the loss must fall by a lot, or the loop does not learn."""
    train.main(["--model", "cnas-k3-e3", "--output-dir", str(tmp_path), "--size", "32", "--train-images", "20",
                "--val-images", "10", "--batch-size", "10", "--epochs", "35", "--sigma", "0", "--dropout", "0",
                "--drop-connect", "0", "--optimizer", optimizer, "--lr", lr, "--label-smoothing", "0"])
    rows = models.read_checkpoint(tmp_path / "last.pt")["rows"]
    assert rows[0]["train_loss"] > 1.5 and rows[-1]["train_loss"] < 0.5


def test_a_denoiser_trains_on_images_without_labels(tmp_path):
    from PIL import Image
    for split, count in (("train", 6), ("val", 2)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 30), (40 * index, 90, 10)).save(tmp_path / "photos" / split / f"{index}.png")
    train.main(["--model", "dnas-k3-e3", "--data", str(tmp_path / "photos"), "--size", "16", "--epochs", "1",
                "--batch-size", "3", "--output-dir", str(tmp_path / "run")])
    _, checkpoint = models.load_checkpoint(tmp_path / "run" / "best.pt")
    assert checkpoint["classes"] is None


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, monkeypatch):
    real = train.task_loss
    calls = []

    def bad(*args, **kwargs):
        total, parts = real(*args, **kwargs)
        calls.append(1)
        return (total * float("nan") if len(calls) == 8 else total), parts
    monkeypatch.setattr(train, "task_loss", bad)  # epoch 1: 5 batches and 2 of validation; the 8th is epoch 2, batch 1
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--epochs", "3")
    assert "nan at epoch 2, batch 1" in str(caught.value.code)
    state = models.read_checkpoint(tmp_path / "last.pt")
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["network"].values())


def test_amp_bfloat16_runs_on_the_cpu(tmp_path):
    # 32 px: where the feature maps are 1x1, oneDNN's bfloat16 weight gradient of a strided depthwise convolution is NaN
    # now and then (torch 2.14), at any learning rate.
    state = run(tmp_path, "--epochs", "1", "--amp", "bfloat16", "--size", "32")
    assert math.isfinite(state["rows"][0]["train_loss"])
    assert all(value.dtype != torch.bfloat16 for value in state["network"].values())


@pytest.mark.parametrize("argv, word", [
    (["--arch", "missing.json"], "missing.json"),
    (["--model", "nothing"], "nothing"),
    (["--epochs", "0"], "--epochs"),
    (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--model", "cnas-k3-e3", "--loss", "den"], "den"),
    (["--model", "dcnas-k3-e3", "--train-images", "1"], "at least 2"),
    (["--model", "dcnas-k3-e3", "--size", "8"], "SSIM"),
    (["--model", "dcnas-k3-e3", "--device", "meta"], "meta"),
    (["--model", "cnas-k3-e3", "--data", "nowhere"], "nowhere"),
    (["--resume", "nowhere"], "nowhere"),
    (["--model", "cnas-k3-e3", "--device", "quantum"], "quantum"),
])
def test_wrong_usage_ends_in_one_sentence(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        train.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and word in lines[-1] and lines[-1].startswith("train.py: error: ") and len(lines) <= 2
    assert not (tmp_path / "runs").exists()


def test_a_damaged_image_is_named_and_training_stops(tmp_path, capsys):
    from PIL import Image
    for split, count in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 20), (40 * index, 90, 10)).save(tmp_path / "photos" / split / name / f"{index}.png")
    (tmp_path / "photos" / "train" / "a" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as caught:
        train.main(["--model", "cnas-k3-e3", "--data", str(tmp_path / "photos"), "--size", "16", "--batch-size", "2",
                    "--output-dir", str(tmp_path / "run")])
    assert caught.value.code == 2 and "3.png" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("model, word", [("cnas-k3-e3", "no labels"), ("dcnas-k3-e3", "--loss den")])
def test_unlabelled_images_are_refused_for_classifiers_with_a_clear_word(model, word, tmp_path, capsys):
    from PIL import Image
    for index in range(4):
        Image.new("RGB", (20, 20), (40 * index, 90, 10)).save(tmp_path / f"{index}.png")
    with pytest.raises(SystemExit) as caught:
        train.main(["--model", model, "--data", str(tmp_path), "--size", "16"])
    assert caught.value.code == 2 and word in capsys.readouterr().err


def test_resuming_with_other_settings_is_refused(tmp_path, capsys):
    run(tmp_path, "--epochs", "1")
    for flags in (["--epochs", "2"], ["--ema", "0.9"], ["--amp", "float16"], ["--seed", "3"], ["--model", "dcnas-k5-e3"]):
        with pytest.raises(SystemExit) as caught:
            train.main(["--resume", str(tmp_path), *flags])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and flags[0] in error and "keeps its settings" in error
    with pytest.raises(SystemExit) as caught:
        train.main(["--resume", str(tmp_path / "best.pt")])
    assert caught.value.code == 2 and "best.pt" in capsys.readouterr().err


def test_a_found_network_trains_on_the_data_it_was_searched_on(tmp_path):
    record = models.make_record(models.named_arch("cnas-k3-e3", 10), {}, data="digits", data_root="data", size=16)
    models.write_json(tmp_path / "arch.json", record)
    train.main(["--arch", str(tmp_path / "arch.json"), "--epochs", "1", "--train-images", "20", "--val-images", "10",
                "--batch-size", "8", "--output-dir", str(tmp_path / "run")])
    assert models.read_checkpoint(tmp_path / "run" / "last.pt")["size"] == 16


def test_classes_that_do_not_agree_are_refused(tmp_path, capsys):
    path = tmp_path / "arch.json"
    models.write_json(path, models.make_record(models.named_arch("dcnas-k3-e3", 7), {}))
    with pytest.raises(SystemExit) as caught:
        train.main(["--arch", str(path), *SMALL, "--output-dir", str(tmp_path / "run")])
    assert caught.value.code == 2 and "7 classes" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu_with_amp(tmp_path):
    state = run(tmp_path, "--epochs", "1", "--device", "cuda", "--amp", "float16")
    assert math.isfinite(state["rows"][0]["train_loss"]) and Path(tmp_path / "best.pt").is_file()


# --- kinds of noise, pairs, grey -----------------------------------------------------------------------------


def photos(folder, count=12, size=(40, 30)):
    from PIL import Image
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", size, (20 * index, 90, 10)).save(folder / f"{index}.png")


def test_batches_have_the_noise_that_is_asked_for():
    scenes = data.Scenes(torch.full((64, 3, 32, 32), 255, dtype=torch.uint8), [0] * 64)
    for noise, at_white, levels in ((data.Noise(sigmas=(0.2,)), 0.2, 1), (data.Noise(sigmas=(0.1, 0.4)), None, 2),
                                    (data.Noise(sigmas=(0.3,), kind="poisson-gaussian"), 0.3, 1)):
        noisy, clean, _ = next(train.NoisyBatches(data.make_loader(scenes, 64), CPU, noise, 0).epoch(0))
        assert torch.equal(clean, torch.ones_like(clean))
        found = (noisy - clean).std((1, 2, 3))
        assert len((found / 0.1).round().unique()) == levels
        assert at_white is None or found.mean().item() == pytest.approx(at_white, rel=0.02)


class Recorder(torch.nn.Module):
    """Gives back its input, and keeps it."""

    denoises, classifies = True, False

    def forward(self, x):
        self.seen = x
        return models.Output(x, None)


@pytest.mark.parametrize("kind, at_white, in_darkness", [("gaussian", 0.2, 0.2), ("poisson-gaussian", 0.2, 0.2 * 0.1**0.5)])
def test_validation_goes_through_the_levels_of_the_training(kind, at_white, in_darkness):
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    images[2:] = 255
    noise, network = data.Noise(sigmas=(0.0, 0.2), kind=kind), Recorder()
    train.validate(network, data.make_loader(data.Scenes(images, [-1] * 4), 4), loss="den", device=CPU, noise=noise)
    found = (network.seen - images / 255).std((1, 2, 3)).tolist()
    assert found == pytest.approx([0, in_darkness, 0, at_white], rel=0.03)


def test_a_denoiser_trains_on_pairs_with_their_own_noise(tmp_path, capsys):
    from PIL import Image
    for index in range(8):
        for kind, level in (("mean", 100), ("real", 130)):
            Image.new("RGB", (40, 30), (level, level, 10 * index)).save(tmp_path / f"{index}_{kind}.png")
    pairs = data.load_data(str(tmp_path), size=16)
    noisy, clean, _ = next(train.NoisyBatches(data.make_loader(pairs.train, 4), CPU, data.Noise(), 0).epoch(0))
    assert ((noisy - clean)[:, :2] * 255).round().unique().tolist() == [30] and torch.equal(noisy[:, 2], clean[:, 2])
    found = train.validate(Recorder(), data.make_loader(pairs.val, 1), loss="den", device=CPU, noise=data.Noise())
    assert found["psnr_db"] == pytest.approx(-10 * math.log10((30 / 255)**2 * 2 / 3), abs=1e-3)
    train.main(["--model", "dnas-k3-e3", "--data", str(tmp_path), "--size", "16", "--epochs", "1", "--batch-size", "3",
                "--output-dir", str(tmp_path / "run")])
    assert "pairs with real noise" in capsys.readouterr().out
    assert models.load_checkpoint(tmp_path / "run" / "best.pt")[1]["classes"] is None


class Grey(torch.nn.Module):
    channels, denoises, classifies = 1, True, False

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return models.Output(x - self.layer(x), None)


def test_a_grey_network_trains_on_grey_images_and_on_no_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.METHODS, "grey", lambda *_: Grey())
    models.write_json(tmp_path / "arch.json", {"format": models.ARCH_FORMAT, "version": models.ARCH_VERSION, "method": "grey",
                                               "model": "grey", "num_classes": 0})
    photos(tmp_path / "photos")
    command = ["--arch", str(tmp_path / "arch.json"), "--data", str(tmp_path / "photos"), "--size", "16", "--epochs", "1",
               "--batch-size", "3", "--output-dir", str(tmp_path / "run")]
    train.main([*command, "--grey"])
    assert models.load_checkpoint(tmp_path / "run" / "best.pt")[0].channels == 1
    train.main(["--resume", str(tmp_path / "run")])  # done already: the flag is kept
    named = ["--model", "dnas-k3-e3", *command[2:], "--grey"]
    for words, sentence in ((command, "takes images of 1 channel, and those of .* are read with 3: give --grey"),
                            (named, "takes images of 3 channels, and those of .* are read with 1: leave out --grey")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            train.main(words)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and re.search(sentence, error)


def test_flags_that_are_lists_survive_a_checkpoint(tmp_path, capsys):
    for name in ("train", "val", "more"):
        photos(tmp_path / "photos" / name)
    train.main(["--model", "dnas-k3-e3", "--data", str(tmp_path / "photos"), "--size", "16", "--epochs", "1", "--batch-size",
                "4", "--output-dir", str(tmp_path / "run"), "--sigmas", "15/255", "0.2", "--train-folders", "train", "more",
                "--crops", "2", "--noise", "poisson-gaussian"])
    assert "44 training and 2 validation images" in capsys.readouterr().out  # two crops of 22
    flags = models.read_checkpoint(tmp_path / "run" / "last.pt")["flags"]
    assert flags["sigmas"] == [15 / 255, 0.2] and flags["train_folders"] == ["train", "more"]
    assert (flags["crops"], flags["noise"], flags["sigma"]) == (2, "poisson-gaussian", 1.0)
    resume = ["--resume", str(tmp_path / "run")]
    train.main(resume)
    train.main([*resume, "--sigmas", "15/255", "0.2", "--train-folders", "train", "more"])  # the same again
    for words in (["--sigmas", "0.2"], ["--train-folders", "train"], ["--crops", "3"], ["--noise", "gaussian"], ["--grey"]):
        with pytest.raises(SystemExit) as caught:
            train.main([*resume, *words])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and words[0] in error and "keeps its settings" in error


def test_a_run_of_before_these_flags_can_be_resumed(tmp_path):
    state = run(tmp_path, "--epochs", "2")
    for name in ("noise", "sigmas", "grey", "crops", "train_folders"):
        del state["flags"][name]
    models.save_checkpoint(tmp_path / "last.pt", state)
    train.main(["--resume", str(tmp_path)])
    assert models.read_checkpoint(tmp_path / "last.pt")["epoch"] == 2


@pytest.mark.parametrize("words, sentence", [
    (["--grey"], "--grey is for image folders"),
    (["--train-folders", "a"], "--train-folders is for image folders"),
    (["--sigmas", "11"], "from 0 to 10, not 11"),
    (["--sigma", "25/0"], "invalid number value"),
    (["--noise", "salt"], "--noise"),
])
def test_wrong_usage_of_noise_and_folders(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        train.main(["--model", "dcnas-k3-e3", *words])
    assert caught.value.code == 2 and sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "runs").exists()
