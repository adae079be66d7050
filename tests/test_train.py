"""train.py: the losses by hand, the loop, resuming, what its files hold, and where its flags come from."""

import csv
import math
import re
import sys
import time
import types

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data
import eval as evaluation
import files
import metrics
import models
import registry
import run
import train

CPU = torch.device("cpu")
SMALL = ["--size", "16", "--train-images", "40", "--val-images", "10", "--batch-size", "8"]


def train_on_digits(output_dir, *flags):
    train.main(["--model", "dcnas-k3-e3", "--output-dir", str(output_dir), *SMALL, *flags])
    return files.read_checkpoint(output_dir / "last.pt")


def photos(folder, count=12, size=(40, 30)):
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", size, (20 * index, 90, 10)).save(folder / f"{index}.png")


def sentence(argv, capsys):
    """The one line with which wrong usage ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        train.main([str(word) for word in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and lines[-1].startswith("train.py: error: ") and len(lines) <= 2
    return lines[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of 2 epochs that has ended: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(run, "say", lambda text, err=False: lines.append(text))
        train_on_digits(folder, "--epochs", "2", "--ema", "0.9")
    return folder, "\n".join(lines)


# --- losses ------------------------------------------------------------------------------------------------


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
    den = 0.8 * train.charbonnier(image, clean) + 0.2 * (1 - metrics.ssim(image, clean).mean())
    for loss, expected in (("cls", ce), ("den", den), ("both", 0.1 * ce + 0.9 * den)):
        total, parts = train.task_loss(output, clean, labels, loss)
        assert total.item() == pytest.approx(expected.item(), rel=1e-6)
        assert set(parts) == {"cls": {"ce"}, "den": {"den"}, "both": {"ce", "den"}}[loss]


def test_a_teacher_takes_the_place_of_the_truth_where_it_has_an_answer(trained):
    teacher = str(trained[0] / "best.pt")
    network, content = files.load_checkpoint(teacher)
    student = registry.build_network(registry.named_record("dcnas-k3-e3", 10, {}))
    noisy, clean, labels = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), torch.tensor([1, 4])
    output, recipe = student(noisy), train.Recipe("both")
    made = train.Teacher(teacher, 0.5, student, content["classes"], CPU)
    with torch.no_grad():
        taught = network(noisy)
    den = train.denoising_loss(output.image, taught.image)
    ce = -(taught.logits.softmax(1) * output.logits.log_softmax(1)).sum(1).mean()
    loss = made.loss(output, noisy, clean, labels, None, recipe, CPU)
    torch.testing.assert_close(loss, 0.1 * ce + 0.9 * den)
    made.network.classifies = False  # a denoiser as teacher: the labels stay the true ones
    made.network.head = None
    loss = made.loss(output, noisy, clean, labels, None, recipe, CPU)
    torch.testing.assert_close(loss, 0.1 * F.cross_entropy(output.logits, labels) + 0.9 * den)
    with pytest.raises(ValueError, match="knows other classes"):
        train.Teacher(teacher, 0.5, student, ["cat"] * 10, CPU)
    grey = registry.build_network(registry.named_record("dncnn-grey", 1, {}))
    with pytest.raises(ValueError, match="other channels"):
        train.Teacher(teacher, 0.5, grey, None, CPU)


def test_a_teacher_counts_with_its_weight(trained, tmp_path):
    teacher, weights = ["--teacher", str(trained[0] / "best.pt"), "--teacher-weight"], []
    for number, flags in enumerate(([], [*teacher, "0"], [*teacher, "1"])):
        state = train_on_digits(tmp_path / str(number), "--epochs", "1", *flags)
        weights.append(state["network"]["stem.0.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_loss_follows_network_and_data():
    both, den, cls = (models.Network(models.named_arch(f"{m}-k3-e3", 3)) for m in ("dcnas", "dnas", "cnas"))
    assert (train.choose_loss(both, True), train.choose_loss(den, False), train.choose_loss(cls, True)) == (
        "both", "den", "cls")
    assert train.choose_loss(both, False, "den") == "den"
    for network, labelled, loss in ((cls, False, None), (both, False, None), (cls, True, "den"),
                                    (den, True, "both")):
        with pytest.raises(ValueError):
            train.choose_loss(network, labelled, loss)


# --- the pieces of the loop --------------------------------------------------------------------------------


def test_schedule_warms_up_and_falls_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = train.make_schedule(optimizer, train.Recipe("cls", epochs=10), steps_per_epoch=10)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert 0 < rates[0] < 0.2 and rates[:10] == sorted(rates[:10]) and max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)), abs=0.02) and rates[-1] < 0.01


def test_noise_belongs_to_seed_and_epoch():
    digits = data.load_data("digits", size=16, train_images=20, val_images=4, test_images=1)

    def first(seed, epoch):
        loader = data.make_loader(digits.train, 8, shuffle=True, seed=seed)
        noisy, clean, labels = next(data.NoisyBatches(loader, CPU, data.Noise(1.0), seed).epoch(epoch))
        return noisy
    assert torch.equal(first(0, 3), first(0, 3))
    assert not torch.equal(first(0, 3), first(0, 4)) and not torch.equal(first(0, 3), first(1, 3))
    loader = data.make_loader(digits.train, 8)
    noisy, clean, labels = next(data.NoisyBatches(loader, CPU, data.Noise(0.0), 0).epoch(0))
    assert torch.equal(noisy, clean) and labels.tolist() == digits.train.targets[:8]


def test_batches_have_the_noise_that_is_asked_for():
    scenes = data.Scenes(torch.full((64, 3, 32, 32), 255, dtype=torch.uint8), [0] * 64)
    for noise, at_white, levels in ((data.Noise(sigmas=(0.2,)), 0.2, 1),
                                    (data.Noise(sigmas=(0.1, 0.4)), None, 2),
                                    (data.Noise(sigmas=(0.3,), kind="poisson-gaussian"), 0.3, 1)):
        noisy, clean, _ = next(data.NoisyBatches(data.make_loader(scenes, 64), CPU, noise, 0).epoch(0))
        assert torch.equal(clean, torch.ones_like(clean))
        found = (noisy - clean).std((1, 2, 3))
        assert len((found / 0.1).round().unique()) == levels
        assert at_white is None or found.mean().item() == pytest.approx(at_white, rel=0.02)


def test_validation_is_the_same_for_any_batch_size_and_leaves_the_mode():
    digits = data.load_data("digits", size=16, train_images=10, val_images=13, test_images=1)
    network = models.Network(models.named_arch("dcnas-k3-e3", 10)).train()
    results = [train.validate(network, data.make_loader(digits.val, size), loss="both", device=CPU,
                              noise=data.Noise(1.0)) for size in (4, 13)]
    assert network.training
    for name in ("accuracy", "psnr_db"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5)


class Recorder(torch.nn.Module):
    """Gives back its input, and keeps it."""

    denoises, classifies = True, False

    def forward(self, x):
        self.seen = x
        return models.Output(x, None)


def test_validation_noise_is_not_that_of_the_evaluation():
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    loader, noise, network = data.make_loader(data.Scenes(images, [-1] * 4), 4), data.Noise(1.0), Recorder()
    default = evaluation.build_parser().get_default("seed")
    seen = []
    for seed in ({}, {"seed": train.VALIDATION_SEED}, {"seed": default or 0}):
        result = train.validate(network, loader, loss="den", device=CPU, noise=noise, **seed)
        seen.append(network.seen)
        assert result["accuracy"] is None and result["psnr_db"] > 0
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0][1:], seen[2][1:])


@pytest.mark.parametrize("kind, at_white, in_darkness", [
    ("gaussian", 0.2, 0.2), ("poisson-gaussian", 0.2, 0.2 * 0.1**0.5)])
def test_validation_goes_through_the_levels_of_the_training(kind, at_white, in_darkness):
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    images[2:] = 255
    noise, network = data.Noise(sigmas=(0.0, 0.2), kind=kind), Recorder()
    loader = data.make_loader(data.Scenes(images, [-1] * 4), 4)
    train.validate(network, loader, loss="den", device=CPU, noise=noise)
    found = (network.seen - images / 255).std((1, 2, 3)).tolist()
    assert found == pytest.approx([0, in_darkness, 0, at_white], rel=0.03)


# --- the command -------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_one_that_was_not_stopped(trained, tmp_path, monkeypatch, capsys):
    original = train.write_summary

    def stop_after_one(path, rows):
        original(path, rows)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "write_summary", stop_after_one)
    with pytest.raises(SystemExit) as caught:
        train_on_digits(tmp_path / "part", "--epochs", "2", "--ema", "0.9")
    assert caught.value.code == run.RESUME_ME == 75 and "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "part")])  # every setting comes from the run
    whole, resumed = (files.read_checkpoint(folder / "last.pt") for folder in (trained[0], tmp_path / "part"))
    assert resumed["epoch"] == 2
    for key in ("network", "ema"):
        assert all(torch.equal(resumed[key][name], value) for name, value in whole[key].items())
    losses = [[row["train_loss"] for row in state["rows"]] for state in (whole, resumed)]
    assert losses[0] == losses[1]


def test_files_hold_what_rebuilds_the_network(trained):
    folder, _ = trained
    state = files.read_checkpoint(folder / "last.pt")
    network, checkpoint = files.load_checkpoint(folder / "best.pt")
    assert checkpoint["classes"] == [str(d) for d in range(10)] and checkpoint["size"] == 16
    assert state["splits"] == checkpoint["splits"] == data.VERSION
    assert network.denoises and network.classifies and not network.training
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) == state["rows"][1]["train_loss"]
    assert {"train_ce", "train_den", "val_accuracy", "val_psnr_db", "lr"} <= set(rows[0])


def test_it_says_what_it_trains_on(trained):
    digits = data.load_data("digits", size=16, train_images=40, val_images=10, test_images=1)
    assert ("40 training and 10 validation images of digits; loss both\n"
            "images of 16 px, 1 crop of each an epoch, gaussian noise, sigma in [0, 1]\n") in trained[1]
    assert all(f"{split}: {digits.sources[split]}" in trained[1] for split in ("train", "val", "test"))
    assert re.search(r"epoch   1/2  train loss .* PSNR .* s, about \d+ s left\n", trained[1])
    assert re.search(r"epoch   2/2  .* \d+ s\n", trained[1]) and "note: " not in trained[1]


def test_pictures_that_are_too_small_for_ssim_are_refused_before_the_training(tmp_path, capsys):
    folder = tmp_path / "small"
    folder.mkdir()
    for number in range(9):
        Image.new("RGB", (5, 30), (number, 0, 0)).save(folder / f"{number}.png")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--model", "dncnn", "--data", str(folder), "--size", "16", "--output-dir",
                    str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "has a side of 5 pixels, and SSIM needs 11" in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as stopped:  # results among the images would be taken for a class later
        train.main(["--model", "dncnn", "--data", str(folder), "--output-dir", str(folder / "run")])
    assert stopped.value.code == 2 and "lies in the folder of the images" in capsys.readouterr().err


def test_a_long_training_says_how_long_it_takes(tmp_path, monkeypatch, capsys):
    ticks = iter(range(0, 100000, 4))  # every look at the clock takes four seconds
    monkeypatch.setattr(run, "time", types.SimpleNamespace(
        monotonic=lambda: next(ticks), time=time.time))
    train_on_digits(tmp_path, "--epochs", "3", "--save-minutes", "1000", "--model", "cnas-k3-e3")
    out = capsys.readouterr().out
    assert out.count(" in all") == 1 and out.index(" in all") < out.index("epoch   1/3")
    minutes = int(re.search(r"training: about (\d+) min in all", out)[1])
    assert abs(minutes - 3 * 5.6 * 8 / 60) <= 1  # a batch looks twice; 5 batches, and 2 of validation at 0.3


@pytest.mark.parametrize("optimizer, lr", [("muon", 0.004), ("adamw", 0.003), ("sgd", 0.03)])
def test_training_learns(tmp_path, optimizer, lr):
    """A few images, clean: the loss must fall by a lot, or the loop does not learn."""
    digits = data.load_data("digits", size=32, train_images=10, val_images=10, test_images=1)
    again = data.Scenes(digits.train.images.repeat(14, 1, 1, 1), digits.train.targets * 14)
    loaders = (data.make_loader(again, 10, shuffle=True, drop_last=True), data.make_loader(digits.val, 10))
    network = models.make_network(models.named_arch("cnas-k3-e3", 10).widened(0.5))
    recipe = train.Recipe("cls", epochs=5, optimizer=optimizer, lr=lr, label_smoothing=0.0)
    best = train.train(network, *loaders, recipe, noise=data.Noise(0.0), output_dir=tmp_path, about={},
                       device=CPU)
    rows = files.read_checkpoint(tmp_path / "last.pt")["rows"]
    assert rows[0]["train_loss"] > 0.5 and rows[-1]["train_loss"] < 0.2 and best in rows


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, monkeypatch):
    real, calls = train.task_loss, []

    def bad(*args, **kwargs):
        total, parts = real(*args, **kwargs)
        calls.append(1)
        return (total * float("nan") if len(calls) == 8 else total), parts
    monkeypatch.setattr(train, "task_loss", bad)  # of an epoch: 5 batches, 2 of validation
    with pytest.raises(SystemExit) as caught:
        train_on_digits(tmp_path, "--epochs", "3")
    assert "nan at epoch 2, batch 1" in str(caught.value.code)
    state = files.read_checkpoint(tmp_path / "last.pt")
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["network"].values())


def test_amp_bfloat16_runs_on_the_cpu(tmp_path):
    # 32 px: where the feature maps are 1x1, oneDNN's bfloat16 weight gradient of a strided depthwise
    # convolution is NaN now and then (torch 2.14), at any learning rate.
    state = train_on_digits(tmp_path, "--epochs", "1", "--amp", "bfloat16", "--size", "32")
    assert math.isfinite(state["rows"][0]["train_loss"])
    assert all(value.dtype != torch.bfloat16 for value in state["network"].values())


@pytest.mark.parametrize("argv, word", [
    (["--arch", "missing.json"], "missing.json"),
    (["--model", "nothing"], "nothing"),
    (["--epochs", "0"], "--epochs"),
    (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--model", "cnas-k3-e3", "--train-images", "9", "--loss", "den"], "den"),
    (["--model", "dcnas-k3-e3", "--train-images", "1"], "at least 2"),
    (["--model", "dcnas-k3-e3", "--train-images", "9", "--size", "8"], "SSIM"),
    (["--model", "dcnas-k3-e3", "--device", "meta"], "meta"),
    (["--model", "cnas-k3-e3", "--data", "nowhere"], "nowhere"),
    (["--resume", "nowhere"], "nowhere"),
    (["--model", "cnas-k3-e3", "--device", "quantum"], "quantum"),
    (["--model", "dcnas-k3-e3", "--grey"], "--grey is for image folders"),
    (["--model", "dcnas-k3-e3", "--train-folders", "a"], "--train-folders is for image folders"),
    (["--model", "dcnas-k3-e3", "--sigmas", "11"], "from 0 to 10, not 11"),
    (["--model", "dcnas-k3-e3", "--sigma", "25/0"], "a number from 0 to 10, not 25/0"),
    (["--model", "dcnas-k3-e3", "--noise", "salt"], "--noise"),
])
def test_wrong_usage_ends_in_one_sentence(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in sentence([*argv, *([] if "--val-images" in argv else ["--val-images", "2"])], capsys)
    assert not (tmp_path / "runs").exists()


def test_help_has_a_description_and_a_true_default_for_every_flag():
    parser = train.build_parser()
    assert "None" not in parser.format_help()
    assert all("(default: " in action.help for action in parser._actions[1:])
    recipe = next(action for action in parser._actions if action.dest == "recipe")
    assert "(papers: 8 %%)" in recipe.help and "(papers: 0.4)" in recipe.help


# --- where the flags come from -----------------------------------------------------------------------------


def read(argv):
    return train.read_command(train.build_parser(), argv)[0]


def write_record(path, name="cnas-k3-e3", method="tfnas", **more):
    record = files.make_record(method, models.named_arch(name, 10).to_dict(), {}, **more)
    files.write_json(path, record)
    return record


def test_recipes_and_the_images_of_a_search_are_defaults(tmp_path, monkeypatch):
    assert (read(["--model", "unet-s"]).recipe, read(["--model", "unet-s"]).epochs) == ("short", 8)
    study = read(["--model", "unet-s", "--recipe", "study", "--epochs", "7"])
    assert (study.epochs, study.batch_size, study.optimizer) == (7, 64, "adam")
    assert (study.sigma, study.sigma_levels, study.sigmas) == (1.0, 11, None)
    images = {"grey": False, "crops": 3, "train_folders": ["a"], "noise": "poisson-gaussian", "sigma": 0.3,
              "sigma_levels": 5, "sigmas": None, "lr": 9, "output_dir": "elsewhere"}
    path = str(tmp_path / "arch.json")
    write_record(tmp_path / "arch.json", data="photos", data_root="root", size=48, images=images)
    args = read(["--arch", path])
    assert (args.data, args.data_root, args.size) == ("photos", "root", 48)
    assert (args.crops, args.train_folders) == (3, ["a"])
    assert (args.noise, args.sigma, args.sigma_levels, args.sigmas) == ("poisson-gaussian", 0.3, 5, None)
    assert (args.recipe, args.lr, args.output_dir) == ("tfnas", None, "runs/train")  # no flags of images
    other = read(["--arch", path, "--data", "digits", "--sigmas", "0.1"])  # crops and folders are of photos
    assert (other.data, other.size, other.crops, other.train_folders) == ("digits", 48, 1, None)
    assert (other.noise, other.sigma, other.sigmas) == ("poisson-gaussian", None, [0.1])
    same = read(["--arch", path, "--data", "photos", "--recipe", "study"])
    assert (same.crops, same.sigma, same.sigma_levels, same.noise) == (3, 1.0, 11, "poisson-gaussian")


@pytest.mark.parametrize("images, words", [
    ({"sigma": "loud"}, "--sigma of the record"), ({"crops": -1}, "--crops of the record")])
def test_damaged_flags_of_a_record_end_in_one_sentence(images, words, tmp_path, capsys):
    write_record(tmp_path / "arch.json", images=images)
    assert words in sentence(["--arch", tmp_path / "arch.json"], capsys)


def test_a_found_network_trains_on_the_data_it_was_searched_on(tmp_path, capsys):
    small = ["--arch", str(tmp_path / "arch.json"), "--epochs", "1", "--train-images", "20", "--val-images",
             "10", "--batch-size", "8", "--output-dir", str(tmp_path / "run")]
    for images, note in (({}, True), ({"images": {"noise": "gaussian", "sigmas": [0.2]}}, False)):
        write_record(tmp_path / "arch.json", data="digits", data_root="data", size=16, **images)
        train.main(small)
        assert files.read_checkpoint(tmp_path / "run" / "last.pt")["size"] == 16
        out = capsys.readouterr().out
        assert ("note: the record does not hold the noise of its search" in out) is note
        assert ("gaussian noise, sigma in [0, 1]" if note else "gaussian noise, sigma 0.2") in out


def test_classes_that_do_not_agree_are_refused(tmp_path, capsys):
    files.write_json(tmp_path / "arch.json", registry.named_record("dcnas-k3-e3", 7, {}))
    argv = ["--arch", tmp_path / "arch.json", *SMALL, "--output-dir", tmp_path / "run"]
    assert "7 classes" in sentence(argv, capsys)


def test_the_recipe_of_the_papers_trains_their_network(tmp_path):
    state = train_on_digits(tmp_path, "--recipe", "paper", "--epochs", "1")
    network, _ = files.load_checkpoint(tmp_path / "last.pt")
    assert state["record"]["decoder"] == "conv" and not state["record"]["multiscale"]
    assert network.means is None and network.stem[0].in_channels == 3 and network.decoder.full is None

    # A found C-NAS: its decoder is the papers' too, and nothing is left of the network that was found.
    found = models.named_arch("cnas-k3-e3", 10)
    record = {**files.make_record("tfnas", found.to_dict(), {}), "latency": {"target_ms": 1.0},
              "weights": "distilled.pt"}
    files.write_json(tmp_path / "arch.json", record)
    argv = ["--arch", str(tmp_path / "arch.json"), "--train-as", "dcnas", "--recipe", "paper", *SMALL,
            "--epochs", "1", "--output-dir", str(tmp_path / "as")]
    train.main(argv)
    record = files.read_checkpoint(tmp_path / "as" / "last.pt")["record"]
    assert record["decoder"] == "conv" and not {"latency", "weights"} & record.keys()


def test_what_is_left_out_goes_with_its_data():
    record = {"data": "photos", "images": {"leave_out": ["Set12"], "crops": 4}}
    assert train.searched_flags(record, {})["leave_out"] == ["Set12"]
    assert train.searched_flags(record, {"data": "mnist"})["leave_out"] is None


def test_a_modified_record_drops_its_latency():
    record = {**registry.named_record("dcnas-k3-e3", 3, {}), "latency": {"target_ms": 1}, "data": "digits"}
    assert train.modify_record(record) is record
    other = train.modify_record(record, "dnas", "mb", 2.0)
    arch = models.Arch.from_dict(record).with_model("dnas").widened(2.0)
    assert "latency" not in other and other["data"] == "digits" and other["decoder"] == "mb"
    assert not other["multiscale"]  # that of the papers
    assert models.Arch.from_dict({**other, "decoder": "sharp", "multiscale": True}) == arch
    grey = train.modify_record(record, grey=True)
    assert grey["grey"] and "latency" not in grey and train.modify_record(grey, grey=True) is grey
    for bad, model in ((registry.named_record("unet-s", 3, {}), "dnas"), (other, "cnas")):
        with pytest.raises(ValueError, match="--train-as, --decoder and --widen|has no classifier"):
            train.modify_record(bad, model)


@pytest.mark.parametrize("flags, begins", (
    ([], True), (["--widen", "2"], False), (["--from-scratch"], False)))
def test_a_training_begins_with_the_weights_of_a_checkpoint(flags, begins, trained, tmp_path, capsys):
    given = files.load_checkpoint(trained[0] / "best.pt")[0]
    command = ["--arch", str(trained[0] / "best.pt"), "--data", "digits", "--epochs", "1", "--train-images",
               "8", "--val-images", "8", "--batch-size", "4", "--lr", "1e-8", "--weight-decay", "0",
               "--device", "cpu", "--threads", "1", "--output-dir", str(tmp_path), *flags]
    train.main(command)
    network, out = files.load_checkpoint(tmp_path / "best.pt")[0], capsys.readouterr().out
    pairs = [(one, other) for one, other in zip(network.parameters(), given.parameters()) if one.ndim == 4]
    same = all(one.shape == other.shape and torch.allclose(one, other, atol=1e-5) for one, other in pairs)
    assert same == begins == ("It begins with the weights in" in out)
    assert ("changed network begins with random weights" in out) == ("--widen" in flags)


# --- resuming ----------------------------------------------------------------------------------------------


def test_resuming_with_other_settings_is_refused(trained, capsys):
    folder, _ = trained
    for flags in (["--epochs", "3"], ["--ema", "0.8"], ["--amp", "float16"], ["--seed", "3"],
                  ["--model", "dcnas-k5-e3"]):
        error = sentence(["--resume", folder, *flags], capsys)
        assert flags[0] in error and "keeps its settings" in error
    assert "best.pt" in sentence(["--resume", folder / "best.pt"], capsys)


def test_a_run_of_before_there_were_three_splits_goes_on_as_it_was(trained, tmp_path, monkeypatch, capsys):
    state = files.read_checkpoint(trained[0] / "last.pt")
    for name in ("noise", "sigmas", "grey", "crops", "train_folders"):  # not even these flags
        del state["flags"][name]
    del state["splits"]
    state |= {"rows": state["rows"][:1], "best": state["rows"][0], "step": 3}
    state |= {"sums": {"loss": 40.0}, "count": 20}
    state["flags"]["gone"] = "a flag of before"
    files.save_checkpoint(tmp_path / "last.pt", state)
    seen, load, validate = [], data.load_data, train.validate

    def load_data(*args, **kwargs):
        seen.append(kwargs["kept"].get("splits") or 1)
        return load(*args, **kwargs)

    def record_seed(*args, **kwargs):
        seen.append(kwargs["seed"])
        return validate(*args, **kwargs)

    monkeypatch.setattr(data, "load_data", load_data)
    monkeypatch.setattr(train, "validate", record_seed)
    train.main(["--resume", str(tmp_path)])
    assert seen == [1, 0]  # the old splits, the old validation noise
    assert "it keeps the splits of its data" in capsys.readouterr().out
    ended = files.read_checkpoint(tmp_path / "last.pt")
    assert ended["epoch"] == 2 and ended["splits"] == 1
    assert ended["rows"][1]["train_loss"] > 0.9  # of 36 images: 20 with the 40.0 of before, and 16


def test_flags_that_are_lists_survive_a_checkpoint(tmp_path, capsys):
    for name in ("train", "val", "more"):
        photos(tmp_path / "photos" / name)
    train.main(["--model", "dnas-k3-e3", "--data", str(tmp_path / "photos"), "--size", "16", "--epochs", "1",
                "--batch-size", "4", "--output-dir", str(tmp_path / "run"), "--sigmas", "15/255", "0.2",
                "--train-folders", "train", "more", "--crops", "2", "--noise", "poisson-gaussian"])
    out = capsys.readouterr().out
    assert "44 training and 2 validation images" in out and "2 crops of each" in out  # two crops of 22
    flags = files.read_checkpoint(tmp_path / "run" / "last.pt")["flags"]
    assert flags["sigmas"] == [15 / 255, 0.2] and flags["train_folders"] == ["train", "more"]
    assert (flags["crops"], flags["noise"], flags["sigma"]) == (2, "poisson-gaussian", 55 / 255)
    resume = ["--resume", str(tmp_path / "run")]
    train.main(resume)
    train.main([*resume, "--sigmas", "15/255", "0.2", "--train-folders", "train", "more"])  # the same again
    for words in (["--sigmas", "0.2"], ["--train-folders", "train"], ["--crops", "3"],
                  ["--noise", "gaussian"], ["--grey"]):
        error = sentence([*resume, *words], capsys)
        assert words[0] in error and "keeps its settings" in error


# --- folders -----------------------------------------------------------------------------------------------


def test_a_denoiser_trains_on_images_without_labels(tmp_path):
    photos(tmp_path / "photos" / "train", 6)
    photos(tmp_path / "photos" / "val", 2)
    train.main(["--model", "dnas-k3-e3", "--data", str(tmp_path / "photos"), "--size", "16", "--epochs", "1",
                "--batch-size", "3", "--output-dir", str(tmp_path / "run")])
    _, checkpoint = files.load_checkpoint(tmp_path / "run" / "best.pt")
    assert checkpoint["classes"] is None


def test_a_damaged_image_is_named_and_training_stops(tmp_path, capsys):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            photos(tmp_path / "photos" / split / name, count, (20, 20))
    (tmp_path / "photos" / "train" / "a" / "3.png").write_bytes(b"not a picture")
    argv = ["--model", "cnas-k3-e3", "--data", tmp_path / "photos", "--size", "16", "--batch-size", "2",
            "--output-dir", tmp_path / "run"]
    assert "3.png" in sentence(argv, capsys)


@pytest.mark.parametrize("model, word", [("cnas-k3-e3", "no labels"), ("dcnas-k3-e3", "--loss den")])
def test_unlabelled_images_are_refused_for_classifiers_with_a_clear_word(model, word, tmp_path, capsys):
    photos(tmp_path / "photos", 4)
    assert word in sentence(["--model", model, "--data", tmp_path / "photos", "--size", "16"], capsys)


def test_a_denoiser_trains_on_pairs_with_their_own_noise(tmp_path, capsys):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for index in range(8):
        for kind, level in (("mean", 100), ("real", 130)):
            Image.new("RGB", (40, 30), (level, level, 10 * index)).save(folder / f"{index}_{kind}.png")
    pairs = data.load_data(str(folder), size=16)
    noisy, clean, _ = next(data.NoisyBatches(data.make_loader(pairs.train, 4), CPU, data.Noise(), 0).epoch(0))
    assert ((noisy - clean)[:, :2] * 255).round().unique().tolist() == [30]
    assert torch.equal(noisy[:, 2], clean[:, 2])
    loader = data.make_loader(pairs.val, 1)
    found = train.validate(Recorder(), loader, loss="den", device=CPU, noise=data.Noise())
    assert found["psnr_db"] == pytest.approx(-10 * math.log10((30 / 255)**2 * 2 / 3), abs=1e-3)
    train.main(["--model", "dnas-k3-e3", "--data", str(folder), "--size", "16", "--epochs", "1",
                "--batch-size", "3", "--output-dir", str(tmp_path / "run")])
    assert "pairs with real noise" in capsys.readouterr().out
    assert files.load_checkpoint(tmp_path / "run" / "best.pt")[1]["classes"] is None


class Grey(torch.nn.Module):
    channels, denoises, classifies = 1, True, False

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return models.Output(x - self.layer(x), None)


def test_a_grey_network_of_a_method_trains_on_grey_images_and_on_no_others(tmp_path, monkeypatch, capsys):
    method = types.SimpleNamespace(design_of=lambda record: None, build=lambda design: Grey(),
                                   TRAIN_DEFAULTS={"epochs": 1, "batch_size": 3, "denoising_loss": "mse"})
    monkeypatch.setitem(sys.modules, "a_method", method)
    monkeypatch.setitem(registry.METHODS, "a_method", ("grey",))
    record = files.make_record("a_method", {"model": "grey"}, {}, num_classes=0)
    files.write_json(tmp_path / "arch.json", record)
    photos(tmp_path / "photos")
    command = ["--arch", str(tmp_path / "arch.json"), "--data", str(tmp_path / "photos"), "--size", "16",
               "--output-dir", str(tmp_path / "run")]
    train.main([*command, "--grey"])
    flags = files.read_checkpoint(tmp_path / "run" / "last.pt")["flags"]
    assert (flags["recipe"], flags["epochs"], flags["denoising_loss"]) == ("a_method", 1, "mse")
    assert files.load_checkpoint(tmp_path / "run" / "best.pt")[0].channels == 1
    train.main(["--resume", str(tmp_path / "run")])  # done already: the flag is kept
    named = ["--model", "unet-s", *command[2:], "--grey"]
    for argv, words in (
            (command, "takes images of 1 channel, and those of .* are read with 3: give --grey"),
            (named, "takes images of 3 channels, and those of .* are read with 1: leave out --grey")):
        assert re.search(words, sentence(argv, capsys))
