"""search.py, the driver of all methods: flags, targets, tables, going on, records, and what follows them."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import denoise
import eval as evaluation
import files
import hinas
import latency
import metrics
import models
import registry
import run
import search
import superkernel
import tfnas
import train
from fake_table import fake_parts, fake_table, quick_compare, stopped_after

ROOT = Path(search.__file__).parent
CPU = torch.device("cpu")
SPACES = {"superkernel": superkernel.Space("skipinit", 3, 3),
          "hinas": hinas.Space(layers=2, nodes=2, base_width=3, channels=3)}
ON_CPU = ["--size", "16", "--epochs", "2", "--device", "cpu", "--threads", "1"]
JOINT = [*ON_CPU, "--train-images", "40", "--batch-size", "8"]
SMALL = [*ON_CPU, "--batch-size", "4", "--width", "3", "--sigmas", "25/255", "--crops", "1"]
GREY_HINAS = ["--model", "hinas", "--search-width", "2", *SMALL]
HINAS = [*GREY_HINAS, "--no-grey"]
SUPERKERNEL = ["--model", "superkernel", *SMALL]


def supernet_of(flags):
    space = SPACES[flags[1]]
    return hinas.SuperNet(space, 2) if flags[1] == "hinas" else superkernel.SuperNet(space)


def command(*arguments):
    search.main([str(argument) for argument in arguments])


def record_of(folder):
    return files.load_record(folder / "arch.json")


def log_of(folder, *without):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few drawn images where a command names no number, and small cells."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("digits", "digit-pairs"):
            size, _, numbers = data.SCENES[name]
            patch.setitem(data.SCENES, name, (size, (40, 20, 20), numbers))
        patch.setitem(hinas.PRESETS, "denoise", replace(hinas.PRESETS["denoise"], layers=2, nodes=2))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A flat folder of pictures of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(12):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((30 + number, 27), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.png")
    return str(folder)


def write_table(path, **options):
    files.write_json(path, fake_table(**{"size": 16, **options}))
    return str(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table") / "t.json")


def compare_by(factor=1.0, content=None, share=1.0):
    """Stands in for latency.compare: measured is `factor` times what the table (or `content`) predicts."""
    def compare(table, design):
        true = latency.Table(content) if content else table
        return {"predicted_ms": table.predict_ms(design), "measured_ms": factor * true.predict_ms(design),
                "p10_ms": 1.0, "p90_ms": 1.0, "bursts": 1, "runs": 1, "slowdown": factor, "cpu_share": share}
    return compare


@pytest.fixture
def quick_measurement(monkeypatch):
    """Measuring takes seconds; where the numbers do not matter the table's stand in."""
    monkeypatch.setattr(latency, "compare", compare_by())


@pytest.fixture(scope="module")
def joint(table, tmp_path_factory):
    """The folder of a finished joint search with noise of its own; what it printed is in out.txt."""
    folder = tmp_path_factory.mktemp("joint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "compare", compare_by())
        said = []
        patch.setattr(run, "say", lambda text, err=False: said.append(text))
        command("--target", 2.5, "--table", table, "--output-dir", folder, *JOINT, "--sigma", 0.2)
    (folder / "out.txt").write_text("\n".join(said))
    return folder


@pytest.fixture(scope="module")
def denoiser(photos, tmp_path_factory):
    """The folder of a finished search of superkernels."""
    folder = tmp_path_factory.mktemp("denoiser")
    command(*SUPERKERNEL, "--data", photos, "--output-dir", folder)
    return folder


# --- From a command to the files ---------------------------------------------------------------------------


def test_a_joint_search_writes_what_it_found(joint, table):
    record = record_of(joint)
    arch = models.Arch.from_dict(record)
    assert arch.model == "dcnas" and arch.num_classes == 10
    assert record["parameters"] == models.count_parameters(registry.build_network(record))
    found = record["latency"]
    assert found["target_ms"] == 2.5 and found["table_hash"] == latency.load_table(table).hash
    assert found["measured_ms"] > 0 and 0.99 * 2.5 <= found["predicted_ms"] <= 2.5
    assert found["setting"]["size"] == 16 and len(record["decisions"]) == 18
    rows = log_of(joint)
    assert (
        [row["epoch"] for row in rows] == [1, 2] and "arch_loss" not in rows[0] and rows[1]["arch_loss"] > 0
    )
    assert len(rows[1]["entropy"]) == 18 and len(rows[1]["alpha"][0]) == 4
    assert (joint / "search.pt").is_file()
    assert not (joint / "latency.json").exists()  # the table was given
    out = (joint / "out.txt").read_text()
    assert "python train.py --arch" in out and "target 2.5 ms, predicted" in out
    images = re.search(r"(\d+) images for the weights, (\d+) for the architecture", out).groups()
    assert "sigma in [0, 0.2]" in out and sum(map(int, images)) == 40
    assert "Its entropy is 1 while" in out  # explained where it is first printed


def test_a_training_has_the_noise_of_its_search(joint, tmp_path):
    assert record_of(joint)["images"]["sigma"] == 0.2
    train.main(
        [
            "--arch",
            str(joint / "arch.json"),
            "--epochs",
            "1",
            "--train-images",
            "16",
            "--val-images",
            "4",
            "--threads",
            "1",
            "--device",
            "cpu",
            "--output-dir",
            str(tmp_path),
        ]
    )
    assert files.read_checkpoint(tmp_path / "last.pt")["flags"]["sigma"] == 0.2


def test_same_seed_and_table_give_the_same_architecture(joint, table, tmp_path, quick_measurement):
    command("--target", 2.5, "--table", table, "--output-dir", tmp_path, *JOINT, "--sigma", 0.2)
    one, other = record_of(joint), record_of(tmp_path)
    for record in (one, other):
        del record["made"]
    assert one == other and log_of(joint, "seconds") == log_of(tmp_path, "seconds")


@pytest.mark.parametrize("model, flags", (
    ("cnas", ["--search-loss", "cls"]), ("dnas", ["--search-loss", "cls", "--search-images", "clean"]),
    ("dnas", ["--search-loss", "den"]), ("dcnas", ["--search-loss", "both"]), ("dcnas-seq", []),
    ("dcnas", ["--depth", "learned"]), ("dnas", ["--depth", "learned"]),
    ("dcnas", ["--strategy", "random", "--seed", "4"])))
def test_every_model_and_loss_finds_a_network_within_the_target(
    model, flags, table, tmp_path, quick_measurement
):
    target = {"dcnas": 2.5, "dcnas-seq": 4.5, "dnas": 1.7, "cnas": 1.5}[model]
    command("--target", target, "--model", model, "--table", table, "--output-dir", tmp_path, *JOINT, *flags)
    record = record_of(tmp_path)
    assert record["model"] == model and 0.9 * target < record["latency"]["predicted_ms"] <= target
    network = registry.build_network(record)
    assert models.Arch.from_dict(record).num_classes == (0 if model == "dnas" else 10)
    assert network(torch.rand(2, 3, 16, 16))._fields == ("image", "logits")
    assert (tmp_path / "log.jsonl").exists() == ("random" not in flags)
    if "learned" in flags:
        assert [len(beta) for beta in log_of(tmp_path)[-1]["beta"]] == [2, 3, 4, 4, 4]


@pytest.mark.parametrize("flags", (
    [*SUPERKERNEL, "--structure", "filterwise", "--two-level", "--form", "separate"], GREY_HINAS,
    [*HINAS, "--network", "sr-x2", "--one-cell", "--cells", "unshared"], SUPERKERNEL))
def test_from_a_folder_to_a_measured_network(flags, photos, denoiser, tmp_path, capsys):
    enlarges, distils = "sr-x2" in flags, flags[1] == "superkernel"
    if enlarges:  # without noise
        flags = [flag for flag in flags if flag not in ("--sigmas", "25/255")]
    found = denoiser if flags is SUPERKERNEL else tmp_path / "search"
    if found != denoiser:
        command(*flags, "--data", photos, "--output-dir", found)
        out, parameters = capsys.readouterr().out, record_of(found)["parameters"]
        assert f"{parameters:,} parameters" in out
    record, rows = record_of(found), log_of(found)
    assert record["parameters"] == models.count_parameters(registry.build_network(record))
    assert [row["epoch"] for row in rows] == [1, 2] and np.isfinite(rows[1]["val_psnr_db"])
    # HiNAS keeps its supernet, and validates, after 60 % of the epochs only.
    assert np.isfinite(rows[0]["val_psnr_db"]) if distils else rows[0]["val_psnr_db"] is None
    assert (found / "distilled.pt").exists() == distils
    if distils:  # what was found is the best supernet, distilled
        distilled, _ = files.load_checkpoint(found / "distilled.pt")
        best = max(rows, key=lambda row: row["val_psnr_db"])
        assert record["design"] == best["found"]
        measured = train.validate(
            distilled, data.make_loader(data.load_data(photos, size=16).val, 1), loss="den", device=CPU,
            noise=data.Noise(sigmas=(25 / 255,)), denoising="charbonnier")
        assert measured["psnr_db"] == pytest.approx(best["val_psnr_db"], abs=1e-3)
    train.main(["--arch", str(found / "arch.json"), "--epochs", "1", "--batch-size", "4", "--threads", "1",
                "--device", "cpu", "--output-dir", str(tmp_path / "train")])
    trained = files.read_checkpoint(tmp_path / "train/last.pt")["flags"]
    assert trained["recipe"] == flags[1] and trained["size"] == 16  # the images of the search
    assert trained["grey"] == (flags is GREY_HINAS)
    assert trained["denoising_loss"] == ("charbonnier" if distils else "log-ssim")
    assert trained["sigma"] == 0 if enlarges else trained["sigmas"] == [25 / 255]
    if enlarges:
        with pytest.raises(SystemExit) as done:
            denoise_or_eval = ["--checkpoint", str(tmp_path / "train/best.pt"), "--input", photos]
            evaluation.main([*denoise_or_eval, "--output-dir", str(tmp_path / "in")])
        assert done.value.code == 0
        with Image.open(tmp_path / "in/0_denoised.png") as picture:
            assert picture.size == (60, 54)
    else:
        evaluation.main(
            [
                "--checkpoint",
                str(tmp_path / "train/best.pt"),
                "--no-latency",
                "--split",
                "all",
                "--data",
                photos,
                "--output-dir",
                str(tmp_path / "eval"),
                "--self-ensemble",
                "--sigmas",
                "25/255",
            ]
        )
        measured = json.loads((tmp_path / "eval/metrics.json").read_text())
        assert measured["images"] == 12 and len(measured["levels"]) == 1


@pytest.mark.parametrize("model", ("superkernel", "hinas"))
def test_drawn_digits_do_too(model, tmp_path):
    command(
        "--model",
        model,
        *SMALL,
        "--epochs",
        1,
        "--train-images",
        16,
        "--val-images",
        2,
        "--output-dir",
        tmp_path,
    )
    assert record_of(tmp_path)["data"] == "digits"


@pytest.mark.parametrize("strategy", ("random", "plain"))
def test_networks_to_compare_with(strategy, photos, tmp_path):
    (tmp_path / "distilled.pt").write_text("of another network")
    command(*SUPERKERNEL, "--strategy", strategy, "--data", photos, "--output-dir", tmp_path)
    design = superkernel.Design.from_dict(record_of(tmp_path)["design"])
    sizes = {layer.kernel_size for block in design.blocks for layer in block}
    assert sizes == ({3} if strategy == "plain" else {3, 5}) and not (tmp_path / "distilled.pt").exists()


def test_random_networks_follow_their_seed_and_have_random_depths(table, tmp_path, quick_measurement):
    drawn = {}
    for name, seed in (("a", 1), ("again", 1), ("b", 2), ("c", 3), ("d", 4)):
        command("--target", 2.5, "--table", table, "--output-dir", tmp_path / name, "--strategy", "random",
                "--depth", "learned", *JOINT, "--seed", seed)
        drawn[name] = models.Arch.from_dict(record_of(tmp_path / name))
    assert drawn["a"] == drawn["again"] != drawn["b"]
    depths = {len(arch.blocks) for arch in drawn.values()}
    assert len(depths) > 1 and max(depths) > 8


def test_the_search_ends_when_nothing_gets_better(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search.Alternating, "better", lambda self, row, best: row["epoch"] <= 2)
    command(*SUPERKERNEL, "--data", photos, "--epochs", 6, "--patience", 1, "--output-dir", tmp_path)
    assert len(log_of(tmp_path)) == 3 and "no better than epoch 2: the search ends" in capsys.readouterr().out


# --- Going on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, steps",
    (
        ([*JOINT, "--target", "2.5", "--epochs", "3"], 7),
        ([*JOINT, "--target", "2.5", "--warmup", "sampled"], 4),
        (SUPERKERNEL, 3),
        ([*SUPERKERNEL, "--two-level", "--structure", "attention", "--crops", "2"], 3),
        ([*HINAS, "--warmup-epochs", "0", "--crops", "2"], 3),
    ),
    ids=("joint", "joint-papers", "superkernel", "two-level", "hinas"),
)
def test_a_stopped_search_goes_on_to_the_last_bit(flags, steps, photos, table, tmp_path, monkeypatch,
                                                  quick_measurement):
    flags = [*flags, *(("--table", table) if "--target" in flags else ("--data", photos))]
    command(*flags, "--output-dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_after(patch, steps)
        with pytest.raises(SystemExit) as stop:
            command(*flags, "--output-dir", tmp_path / "part")
        assert stop.value.code == run.RESUME_ME and not (tmp_path / "part/arch.json").exists()
    command("--resume", tmp_path / "part")
    whole, part = (files.read_checkpoint(tmp_path / name / "search.pt") for name in ("whole", "part"))
    assert whole["searcher"]["supernet"].keys() == part["searcher"]["supernet"].keys()
    assert all(torch.equal(value, part["searcher"]["supernet"][name])
               for name, value in whole["searcher"]["supernet"].items())
    one, other = record_of(tmp_path / "whole"), record_of(tmp_path / "part")
    for record in (one, other):
        del record["made"]
    assert one == other
    assert log_of(tmp_path / "whole", "seconds") == log_of(tmp_path / "part", "seconds")


def sentence(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        command(*argv)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert caught.value.code == 2 and "Traceback" not in captured.err
    assert lines[-1].startswith("search.py: error: ") and len(lines) <= 2  # a line of usage at most
    return lines[-1]


def test_a_finished_search_keeps_its_settings(joint, tmp_path, capsys, quick_measurement):
    for flags in (["--epochs", "3"], ["--seed", "1"], ["--target", "3"], ["--lr", "0.1"], ["--sigma", "0.3"]):
        message = sentence(["--resume", joint, *flags], capsys)
        assert flags[0] in message and "keeps its settings" in message
    before = (joint / "log.jsonl").read_text()
    command("--resume", joint, "--output-dir", tmp_path)  # fitted again, nothing trained
    assert "python train.py" in capsys.readouterr().out
    assert (
        record_of(tmp_path)["blocks"] == record_of(joint)["blocks"]
        and before == (joint / "log.jsonl").read_text()
    )


def test_a_finished_search_goes_on_into_another_folder(denoiser, tmp_path):
    command("--resume", denoiser / "search.pt", "--output-dir", tmp_path)
    assert record_of(tmp_path)["design"] == record_of(denoiser)["design"]
    assert (tmp_path / "distilled.pt").exists()


def test_a_resumed_search_counts_the_time_before(photos, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)  # of 2 steps an epoch
        with pytest.raises(SystemExit):
            command(*SUPERKERNEL, "--data", photos, "--output-dir", tmp_path)
    state = files.read_checkpoint(tmp_path / "search.pt")
    assert state["step"] == 1 and len(state["rows"]) == 1 and 0 < state["seconds"] < 600
    state["rows"][0]["seconds"], state["seconds"] = 3600, 7200
    files.save_checkpoint(tmp_path / "search.pt", state)
    command("--resume", tmp_path)
    assert "found in 3.0 h" in capsys.readouterr().out
    assert 7200 < log_of(tmp_path)[1]["seconds"] < 7800


# --- Targets and tables ------------------------------------------------------------------------------------


def test_the_table_is_corrected_by_what_is_measured_only_where_it_may_be(monkeypatch):
    """The device takes 10 % longer than the table says, whatever the network."""
    content = fake_table()
    monkeypatch.setattr(latency, "compare", compare_by(1.1, content))
    space = tfnas.Space()
    supernet, table = tfnas.SuperNet(space), latency.Table(content)
    costs = search.costs_of_table(table, supernet, space, 2.5)
    first, result, same = search.fit_and_measure(supernet, space, costs, True, correct=False)
    assert result["predicted_ms"] == pytest.approx(2.5, rel=0.01) and same is costs
    assert result["measured_ms"] == pytest.approx(2.75, rel=0.01)
    assert search.fit_and_measure(supernet, space, costs, True, correct=False)[0] == first
    _, result, new = search.fit_and_measure(supernet, space, costs, True, correct=True)
    assert result["measured_ms"] == pytest.approx(2.5, rel=0.02) and new.target == 2.5
    assert new.table.content["correction"] == pytest.approx(1.1) and new.table.hash != table.hash
    monkeypatch.setattr(latency, "compare", compare_by(1.1, content, share=0.5))  # what a busy minute says
    assert search.fit_and_measure(supernet, space, costs, True, correct=True)[2] is costs
    monkeypatch.setattr(latency, "compare", compare_by(1.1, content))
    # The corrected table, as it goes to disk, gives the same network at once.
    again = search.costs_of_table(latency.read_table(new.table.content), supernet, space, 2.5)
    _, result, _ = search.fit_and_measure(supernet, space, again, True, correct=False)
    assert result["measured_ms"] == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize("flags", (SUPERKERNEL, HINAS))
def test_a_target_in_multiply_accumulates_is_met(flags, photos, tmp_path, capsys):
    low, high = supernet_of(flags).cost_range(*latency.part_macs(SPACES[flags[1]], 16))
    target = 0.7 * low + 0.3 * high
    command(*flags, "--data", photos, "--target-macs", target, "--output-dir", tmp_path)
    assert record_of(tmp_path)["macs"] / 1e6 <= target * (1 + 1e-6)
    message = sentence(
        [*flags, "--data", photos, "--target-macs", 0.5 * low, "--output-dir", tmp_path / "low"], capsys
    )
    assert "below the cheapest" in message and "This would work: python search.py --target-macs" in message
    assert "--table" not in message and not (tmp_path / "low").exists()


@pytest.mark.parametrize("flags", (SUPERKERNEL, HINAS))
def test_a_target_in_milliseconds_uses_the_table(flags, photos, tmp_path, monkeypatch):
    quick_compare(monkeypatch)
    path = tmp_path / "table.json"
    files.write_json(path, fake_parts(SPACES[flags[1]]))
    table = latency.load_table(path)
    middle = table.predict_ms(SPACES[flags[1]].random_design(random.Random(3)))
    found = []
    for name in ("a", "b"):
        command(
            *flags, "--data", photos, "--target", middle, "--table", path, "--output-dir", tmp_path / name
        )
        found.append(record_of(tmp_path / name))
    assert found[0]["design"] == found[1]["design"]  # the same seed and table
    result, network = found[0]["latency"], registry.build_network(found[0])
    assert result["predicted_ms"] <= middle * (1 + 1e-6) and result["measured_ms"] > 0
    assert result["predicted_ms"] == pytest.approx(models.count_macs(network, 16) / 1e6, rel=1e-3)


def test_a_target_moves_the_structure(photos, tmp_path):
    """With a weight that outweighs all else the expected cost falls, and without a target it does not."""
    low, _ = supernet_of(SUPERKERNEL).cost_range(*latency.part_macs(SPACES["superkernel"], 16))
    rows = {}
    for name, more in (("free", []), ("priced", ["--target-macs", 1.01 * low, "--latency-weight", "10"])):
        command(
            *SUPERKERNEL,
            "--data",
            photos,
            "--epochs",
            3,
            "--arch-lr",
            0.2,
            *more,
            "--output-dir",
            tmp_path / name,
        )
        rows[name] = [row["expected_cost"] for row in log_of(tmp_path / name)]
    assert rows["priced"][-1] < 0.9 * rows["free"][-1] and rows["priced"][-1] < rows["priced"][0]


@pytest.mark.parametrize("flags", (SUPERKERNEL, HINAS))
def test_a_machine_slower_than_its_table_still_gets_a_network(flags, photos, tmp_path, monkeypatch, capsys):
    """Measured is 1.2 times predicted, and the target is as near to the cheapest as a refusal proposes."""
    content = fake_parts(SPACES[flags[1]])
    monkeypatch.setattr(latency, "build_table", lambda *_, **__: content)
    monkeypatch.setattr(latency, "compare", compare_by(1.2, content))
    table = latency.Table(content)
    target = 1.05 * supernet_of(flags).cost_range(table.costs, table.rest(["network"]))[0]
    command(*flags, "--data", photos, "--target", target, "--output-dir", tmp_path)
    out = capsys.readouterr().out
    assert (
        "this is the nearest" in out and "now takes 1.20 times as long" in out and "% from the target" in out
    )
    assert record_of(tmp_path)["latency"]["measured_ms"] > target
    assert latency.load_table(tmp_path / "latency.json").content["correction"] > 1.1  # as it was corrected


def test_a_search_with_the_table_of_another_device_measures_nothing(tmp_path, monkeypatch, capsys):
    content = fake_table(size=16)
    content["setting"].update(device="a board", runtime="onnxruntime 9")
    files.write_json(tmp_path / "board.json", content)
    monkeypatch.setattr(latency.Table, "elsewhere", True)
    monkeypatch.setattr(latency, "compare", None)
    monkeypatch.setattr(latency, "write_network", lambda network, setting, path: Path(path).touch())
    given = ["--table", tmp_path / "board.json", *JOINT, "--strategy", "random", "--output-dir", tmp_path]
    command("--target", "2.5,1000", *given)
    out, found = capsys.readouterr().out, record_of(tmp_path / "target_2.5")["latency"]
    assert "on a board, onnxruntime 9\nnote: this is another device" in out and " - " in out.splitlines()[-1]
    assert 0 < found["predicted_ms"] <= 2.5 and "measured_ms" not in found
    assert "timing.py network.onnx" in out and (tmp_path / "target_2.5" / "network.onnx").exists()
    content["setting"]["size"] = 32
    files.write_json(tmp_path / "board.json", content)
    assert "size is 32 there" in sentence(["--target", "5", *given], capsys)


def test_a_target_above_the_dearest_has_no_influence_and_the_network_is_measured(
    table, photos, tmp_path, capsys
):
    command("--target", 1000, "--table", table, "--output-dir", tmp_path, *JOINT, "--strategy", "random")
    assert "above that: every network meets it, and the cost has no influence" in capsys.readouterr().out
    found = record_of(tmp_path)["latency"]
    assert (
        found["p10_ms"] <= found["measured_ms"] <= found["p90_ms"]
        and found["runs"] >= 50
        and found["slowdown"] > 0
    )
    command(
        *HINAS,
        "--strategy",
        "random",
        "--data",
        photos,
        "--target-macs",
        1000,
        "--output-dir",
        tmp_path / "macs",
    )
    assert "1000 M MACs is above that: every network meets it" in capsys.readouterr().out


def test_a_learned_depth_that_is_too_small_for_the_target_is_said(table, tmp_path, capsys, quick_measurement,
                                                                  monkeypatch):
    make = tfnas.make_supernet

    def shallow(*args, **flags):
        supernet = make(*args, **flags)
        for beta in supernet.betas:
            beta.data[0] = 5.0
        supernet.normalize_()
        return supernet

    monkeypatch.setattr(tfnas, "make_supernet", shallow)
    command("--target", 2.57, "--table", table, "--output-dir", tmp_path, "--model", "dnas", "--depth",
            "learned", *JOINT)
    out = capsys.readouterr().out
    assert "note: the learned depth keeps" in out and "% from the target" in out


def test_several_targets_are_searched_with_one_table_and_compared(table, tmp_path, capsys, quick_measurement):
    command("--target", "2.6,3", "--table", table, "--output-dir", tmp_path / "family", *JOINT, "--epochs", 1)
    records = [record_of(tmp_path / "family" / f"target_{name}") for name in ("2.6", "3")]
    for record, target in zip(records, (2.6, 3.0)):
        assert (
            record["latency"]["target_ms"] == target
            and 0.99 * target <= record["latency"]["predicted_ms"] <= target
        )
    out = capsys.readouterr().out.splitlines()
    assert (
        out[-3].split()[0] == "target"
        and "target_2.6/arch.json" in out[-2]
        and "target_3/arch.json" in out[-1]
    )
    command("--target", "3", "--table", table, "--output-dir", tmp_path / "alone", *JOINT, "--epochs", 1)
    assert record_of(tmp_path / "alone")["blocks"] == records[1]["blocks"]
    message = sentence(
        ["--target", "2,0.001", "--table", table, "--output-dir", tmp_path / "none", *JOINT], capsys
    )
    assert "below the cheapest" in message and not (tmp_path / "none").exists()


def test_a_stop_in_the_first_of_two_targets_says_how_to_get_both(table, tmp_path, monkeypatch, capsys):
    stopped_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        command("--target", "2.6,3", "--table", table, "--output-dir", tmp_path, *JOINT)
    error = capsys.readouterr().err
    assert f"--resume {tmp_path}/target_2.6" in error
    (rest,) = [line for line in error.splitlines() if "the other targets" in line]
    assert all(words in rest for words in (
        "--target 3 ", f"--table {table}", f"--output-dir {tmp_path}/target_3"))


def test_a_table_made_before_or_not_the_weights_start_the_same(
    table, tmp_path, monkeypatch, quick_measurement
):
    def build(*_, **__):
        torch.rand(5)  # as building does
        return fake_table(4, size=16)

    monkeypatch.setattr(latency, "build_table", build)
    for name, flags in (("made", []), ("given", ["--table", table])):
        command("--target", 2.5, "--output-dir", tmp_path / name, *JOINT, "--epochs", 1, *flags)
    assert log_of(tmp_path / "made", "seconds") == log_of(tmp_path / "given", "seconds")
    assert latency.load_table(tmp_path / "made/latency.json").hash == latency.load_table(table).hash


def test_a_search_times_networks_in_the_form_that_its_table_is_for(table, tmp_path, capsys):
    content = fake_table(size=16)
    files.write_json(tmp_path / "t.json", {**content, "setting": {**content["setting"], "mode": "folded"}})
    flags = ["--range", *JOINT, "--train-images", "8", "--output-dir", str(tmp_path), "--table"]
    command(*flags, tmp_path / "t.json")
    assert search.read_command([*flags, table])[0].mode == "eager"
    message = sentence([*flags, str(tmp_path / "t.json"), "--mode", "eager"], capsys)
    assert "mode is 'folded' there and 'eager' here" in message


@pytest.mark.parametrize("model", ("dcnas", "dnas", "superkernel", "hinas"))
def test_the_range_is_printed_and_nothing_searched(model, table, tmp_path, capsys, monkeypatch):
    flags = {"superkernel": SUPERKERNEL, "hinas": HINAS}.get(model, ["--model", model, *JOINT])
    flags = [*flags, "--train-images", "8", "--range", "--output-dir", tmp_path / "out"]
    monkeypatch.setattr(search, "trained_supernet", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/arch.json").write_text("of an earlier run")
    if model in SPACES:  # without --table one is made, and kept
        content = fake_parts(SPACES[model])
        monkeypatch.setattr(latency, "build_table", lambda *_, **__: content)
        supernet = supernet_of(["", model])
    else:
        content, flags = (
            fake_table(size=16),
            [*flags, "--table", table, "--target", "0.001"],
        )  # no matter how low
        supernet = tfnas.SuperNet(tfnas.Space(model=model))
    command(*flags)
    space = SPACES.get(model) or supernet.plan
    low, high = supernet.cost_range(*search.costs_of_table(latency.Table(content), supernet, space)[:2])
    assert f"{low:.4g} to {high:.4g} ms per batch of 1" in capsys.readouterr().out
    assert (tmp_path / "out/arch.json").exists()
    assert {path.name for path in tmp_path.rglob("*.*")} - {".lock", "arch.json"} == (
        {"latency.json"} if model in SPACES else set()
    )


def test_the_command_that_a_refusal_suggests_keeps_the_flags_and_works(
    tmp_path, capsys, monkeypatch, quick_measurement
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "build_table", lambda *_, **__: fake_table(4, size=16))
    message = sentence(["--target=0.01", "--output-dir", "my runs", "--strategy", "random", *JOINT], capsys)
    words = shlex.split(message.split("This would work: ")[1])
    assert (
        words[:2] == ["python", "search.py"] and words[words.index("--table") + 1] == "my runs/latency.json"
    )
    assert words[words.index("--output-dir") + 1] == "my runs" and words.count("--target") == 1
    monkeypatch.delattr(latency, "build_table")
    command(*words[2:])
    assert record_of(Path("my runs"))["latency"]["target_ms"] > float(message.split(" take ")[1].split()[0])
    made = shlex.split(
        search._command_with(["--target", "1", "--data", "my photos", "--model=dnas"], {"--target": "4"})
    )
    assert made == ["python", "search.py", "--target", "4", "--data", "my photos", "--model=dnas"]


# --- The schedule of a supernet that runs as a whole -------------------------------------------------------


def alternating(target=None):
    space = SPACES["superkernel"]
    supernet = superkernel.SuperNet(space)
    how = superkernel.training(supernet, 2, epochs=2, lr=1e-3, arch_lr=1e-2)
    costs = search.Costs(*latency.part_macs(space, 16), "M MACs", target)
    return search.Alternating(
        supernet,
        space,
        costs,
        how,
        device=CPU,
        validate=None,
        denoising_loss="charbonnier",
        latency_weight=0.5,
        seed=0,
        amp="off",
    )


def test_the_gradient_of_the_cost_is_as_large_as_told():
    schedule = alternating()
    generator = torch.Generator().manual_seed(0)
    for parameter in schedule.arch:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = [parameter.grad.clone() for parameter in schedule.arch]
    schedule._press()
    added = torch.cat([(parameter.grad - old).flatten() for parameter, old in zip(schedule.arch, before)])
    own = torch.cat([old.flatten() for old in before])
    assert added.norm().item() == pytest.approx(0.5 * own.norm().item(), rel=1e-4)
    cost = torch.cat([g.flatten() for g in torch.autograd.grad(schedule.expected_cost(), schedule.arch)])
    assert torch.cosine_similarity(added, cost, dim=0).item() == pytest.approx(1, abs=1e-4)


def test_the_supernet_that_is_kept():
    row = {"found_cost": 5.0, "val_psnr_db": 30.0}
    free, bound = alternating(), alternating(target=4.0)
    assert free.better(row, None) and not free.better(row, row)
    assert free.better(row | {"val_psnr_db": 31.0, "found_cost": 9.0}, row)
    assert bound.better(row | {"found_cost": 3.0, "val_psnr_db": 10.0}, row)  # within the target first
    assert not bound.better(row | {"val_psnr_db": 31.0}, row | {"found_cost": 3.0})
    assert not free.better(row | {"val_psnr_db": None}, None)
    assert not free.better(row | {"val_psnr_db": float("nan")}, row)


def test_held_out_batches_go_on_in_another_order():
    class Batches:
        def __len__(self):
            return 3

        def epoch(self, number, first=0):
            return iter([(number, place) for place in range(3)][first:])

    held_out = search.HeldOut(Batches(), 2, 0)
    taken = [held_out.next() for _ in range(7)]
    assert taken == [(number, place) for number in (2000, 2001, 2002) for place in range(3)][:7]
    later = search.HeldOut(Batches(), 2, 5)
    assert [later.next(), later.next()] == taken[5:]


# --- Flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", search.MODELS)
def test_every_flag_of_every_model_is_described_with_its_default(model):
    parser = search.build_parser(model)
    text = parser.format_help()
    assert "None" not in text and text.count("python search.py") >= 3
    for action in parser._actions[1:]:
        assert action.help and "default: " in action.help, action.option_strings
        assert action.nargs == 0 or action.metavar or action.choices or action.dest in ("device", "grey")
    assert ("(default: 20)" in text) == (model in SPACES)  # the epochs of this method


def test_a_flag_works_or_is_refused(photos, capsys, tmp_path):
    for flags, words in (
        (
            ["--target", "5", "--val-images", "5"],
            "--val-images is for --model superkernel, hinas, not for dcnas",
        ),
        ([*SUPERKERNEL, "--warmup-epochs", "2"], "--warmup-epochs is for --two-level"),
        (["--target", "5", "--width", "3"], "--width is for --model superkernel, hinas"),
        ([*SUPERKERNEL, "--search-images", "clean"], "--search-images is for --model cnas, dnas, dcnas"),
        ([*HINAS, "--structure", "filterwise"], "leave it out"),
        ([*HINAS, "--temperature=3"], "leave it out"),
        ([*SUPERKERNEL, "--recompute"], "leave it out"),
        ([*HINAS, "--table", "t.json"], "leave the table out"),
        # --net sr-x2 would have the defaults of a denoiser
        (["--model", "hinas", "--net", "sr-x2"], "unrecognized arguments: --net"),
        ([*SUPERKERNEL, "--network", "denoise"], "skipinit-1"),
        ([*HINAS, "--network", "sr-x3"], "multiple of 3"),  # of 16
        ([*HINAS, "--strategy", "plain"], "--strategy"),
        (["--target", "5", "--strategy", "plain"], "--strategy"),
        ([*SUPERKERNEL, "--target", "1", "--target-macs", "2"], "two limits; give one"),
    ):
        assert words in sentence([*flags, "--data", photos, "--output-dir", tmp_path], capsys), flags
    assert not any(tmp_path.iterdir())


def test_wrong_usage_ends_in_one_sentence(table, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--target" in sentence([], capsys)
    for target in ("0", "-3", "nan", "x", "inf", "5,", "5,0"):
        assert "--target" in sentence(["--target", target], capsys)
    assert "--model" in sentence(["--target", "5", "--model", "nas"], capsys)
    below = sentence(["--target", "0.01", "--table", table, *JOINT], capsys)
    assert "below the cheapest" in below and "--table" in below
    assert "latency.py" in sentence(["--target", "5", "--table", "missing.json", *JOINT], capsys)
    Path("bad.json").write_text('{"format": "joint-lat')
    assert "bad.json" in sentence(["--target", "5", "--table", "bad.json", *JOINT], capsys)
    files.write_json(Path("v.json"), fake_table(size=16) | {"version": 7})
    assert "7" in sentence(["--target", "5", "--table", "v.json", *JOINT], capsys)
    other = fake_table(size=16)
    other["setting"]["device"] = "a phone"
    files.write_json(Path("phone.json"), other)
    message = sentence(["--target", "5", "--table", "phone.json", *JOINT], capsys)
    assert "a phone" in message and "python latency.py" in message
    message = sentence(["--target", "5", "--table", table, "--space", "8", *JOINT], capsys)
    assert "for another space" in message and "python latency.py" in message and "--space 8" in message
    assert "nowhere" in sentence(["--target", "5", "--data", "nowhere"], capsys)
    assert "--search-loss" in sentence(
        ["--target", "5", "--model", "cnas", "--search-loss", "both", *JOINT], capsys
    )
    assert "too few" in sentence(["--target", "5", "--table", table, *JOINT, "--train-images", "2"], capsys)
    pairs = ["--data", "digit-pairs", "--train-images", "8"]
    assert "has two digits in each image" in sentence(["--target", "3", *pairs], capsys)
    assert "bad.json" in sentence(["--resume", "bad.json"], capsys)
    Path("file").write_text("")
    beside = ["--target", "2.5", "--table", table, "--output-dir", "file/x", *JOINT]
    assert "file/x cannot be made" in sentence(beside, capsys)
    Path("runs/search/.lock").unlink(missing_ok=True)
    assert not list(Path(".").rglob("arch.json"))


def test_the_defaults_of_a_denoiser_are_the_papers_data(photos, tmp_path):
    """Zhang 2020, section 4.1: grey images of train and val together, three levels of noise."""
    for name in ("train", "val", "test"):
        shutil.copytree(photos, tmp_path / "photos" / name)

    def defaults(*flags):
        return search.read_command(["--model", "hinas", *flags])[0]

    args = defaults("--data", str(tmp_path / "photos"))
    assert (
        args.grey and args.train_folders == ["train", "val"] and args.sigmas == [30 / 255, 50 / 255, 70 / 255]
    )
    loaded = data.data_from(vars(args))
    assert (
        loaded.channels == 1
        and len(loaded.train) == 8 * (24 - len(loaded.val))
        and 0 < len(loaded.val) < 6
        and len(loaded.test) == 12
    )
    args = defaults("--data", photos, "--sigma", "0.1", "--no-grey")
    assert not args.grey and args.train_folders is None and args.sigmas is None and args.sigma == 0.1
    args = defaults("--data", str(tmp_path / "photos"), "--network", "sr-x3")
    assert not args.grey and args.train_folders is None and args.sigmas is None and args.sigma == 0
    assert not defaults().grey and not defaults("--data", "digits").grey  # drawn in colour


def test_flags_of_a_training_take_the_place_of_those_of_the_search(denoiser):
    args = train.read_command(
        train.build_parser(), ["--arch", str(denoiser / "arch.json"), "--sigma", "0.5"]
    )[0]
    assert args.sigma == 0.5 and args.sigmas is None and args.size == 16


def test_importing_does_nothing(tmp_path):
    modules = "benchmark, search, train, eval, latency, data, models, superkernel, hinas"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {modules}"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "") and not list(
        tmp_path.iterdir()
    )


# --- What the images of a search need besides --------------------------------------------------------------


@pytest.mark.parametrize("scale", (2, 3, 4))
def test_shrinking_is_pillows_away_from_the_border_and_matlabs_at_it(scale):
    images = torch.rand(1, 1, 10 * scale, 12 * scale)
    small = data.shrink(images, scale)

    def by_pillow(image, size, cut):
        shrunk = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(shrunk))[cut:-cut, cut:-cut].clamp(0, 1).mul(255).round().div(255)

    assert small.shape == (1, 1, 10, 12)
    expected = by_pillow(images[0, 0].numpy(), (12, 10), 2)
    torch.testing.assert_close(small[0, 0, 2:-2, 2:-2], expected, atol=1.01 / 255, rtol=0)
    mirrored = np.pad(images[0, 0].numpy(), 6 * scale, mode="symmetric")  # MATLAB's border, far enough out
    expected = by_pillow(mirrored, (12 + 12, 10 + 12), 6)
    torch.testing.assert_close(small[0, 0], expected, atol=1.01 / 255, rtol=0)
    with pytest.raises(ValueError, match="times smaller"):
        data.shrink(images[..., 1:], scale)


def test_shrinking_a_constant_image_of_any_size_leaves_it():
    for side in (2, 4, 6):
        image = torch.full((1, 3, side, side), 51 / 255)
        torch.testing.assert_close(data.shrink(image, 2), torch.full((1, 3, side // 2, side // 2), 51 / 255))


def test_tiles_of_an_enlarging_network_and_of_one_with_channel_attention_have_no_seams():
    torch.manual_seed(0)
    enlarging = hinas.build(hinas.Space("sr", 2, base_width=2, channels=3).random_design(random.Random(0)))
    torch.nn.init.normal_(enlarging.end[-1].weight, std=0.02)  # it begins at zero
    for network in (enlarging, superkernel.build(superkernel.Space("attention", 4, 1).plain_design())):
        image = torch.rand(1, 3, 200, 170)
        with torch.no_grad():
            whole = network.eval()(image).image
        tiled = denoise.denoise_tiled(network, image, core=64, margin=64)
        assert tiled.shape == whole.shape
        assert (tiled.float() / 255 - whole.clamp(0, 1)).abs().max() < 0.5 / 255 + 1e-3


def test_the_loss_of_hinas_is_finite_for_any_image():
    image = torch.rand(1, 1, 16, 16).requires_grad_()
    for clean in (image.detach(), 1 - image.detach(), torch.zeros(1, 1, 16, 16), torch.rand(1, 1, 16, 16)):
        loss = train.log_ssim(image, clean)
        (gradient,) = torch.autograd.grad(loss, image)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert train.log_ssim(image.detach(), image.detach()).item() == pytest.approx(0, abs=1e-6)
    unlike = (1 - image.detach()).requires_grad_()  # SSIM below 0: more than the MSE shows the way back
    assert metrics.ssim(unlike, image).item() < 0
    whole, mse = (torch.autograd.grad(function(unlike, image.detach()), unlike)[0]
                  for function in (train.log_ssim, torch.nn.functional.mse_loss))
    assert (whole - mse).norm() > 0.1 * mse.norm()
    shifted = (image + 0.1).detach()
    mirrored = [torch.nn.functional.pad(each, (5, 5, 5, 5), "reflect") for each in (shifted, image)]
    ssim = metrics.ssim(*mirrored).item()
    assert train.log_ssim(shifted, image).item() == pytest.approx(0.01 + 0.6 * np.log10(1 / ssim), rel=1e-4)


def test_the_loss_of_hinas_sees_the_border_as_well_as_the_middle():
    clean = torch.rand(8, 1, 1, 1).expand(8, 1, 32, 32)
    noisy = (clean + 0.2 * torch.randn(clean.shape)).requires_grad_()
    pull = torch.autograd.grad(train.log_ssim(noisy, clean), noisy)[0].square().mean((0, 1)).sqrt()
    border = torch.cat((pull[0], pull[-1], pull[:, 0], pull[:, -1])).mean()
    assert 0.5 < border / pull[8:-8, 8:-8].mean() < 2
