"""judge.py: its statistics against values by hand, equal latencies, and the smallest whole comparison."""

import json
import statistics
from pathlib import Path

import pytest
from PIL import Image

import files
import hinas
import judge
import models
import run
import superkernel
from fake_table import fake_parts, fake_table, fake_wide, quick_compare, quick_elastic


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_where_that_holds():
    values = [statistics.NormalDist(10, 2).inv_cdf((i + 0.5) / 400) for i in range(400)]
    low, high = judge.interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * 2 / 20, rel=0.05)  # 1.96 sd / sqrt(n)
    assert (low + high) / 2 == pytest.approx(10, abs=0.02)


def test_an_interval_of_few_values_by_hand():
    """The means of two draws from (0, 1) are 0, 0.5, 1 with probabilities 1/4, 1/2, 1/4."""
    assert judge.interval([0.0, 1.0]) == (0.0, 1.0)
    assert judge.interval([3.0]) == (3.0, 3.0)
    assert judge.interval([5.0, 5.0], [2.0, 2.0]) == (3.0, 3.0)


def test_better_is_more_accuracy_and_less_loss():
    gain = judge.better_by([80.0, 84.0], [78.0, 82.0], more_is_better=True)
    assert gain["difference"] == pytest.approx(2.0)
    assert gain["relative_percent"] == pytest.approx(2.5)
    assert gain["low"] < 0 < gain["high"]
    gain = judge.better_by([0.1, 0.1], [0.2, 0.2], more_is_better=False)
    assert (gain["low"], gain["difference"], gain["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert gain["relative_percent"] == pytest.approx(50.0)
    gain = judge.better_by([2.0, 3.0], [0.0], more_is_better=True)
    assert gain == {"difference": 2.5, "low": None, "high": None, "relative_percent": None}


def test_kendalls_tau_by_hand():
    assert judge.kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert judge.kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert judge.kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # one of six pairs turned


@pytest.fixture
def quick(monkeypatch, in_this_process):
    """A network takes a millisecond for every million MACs."""
    monkeypatch.setattr(judge.Judge, "cost",
                        lambda self, network: models.count_macs(network, self.args.size) / 1e6)
    quick_compare(monkeypatch)


def arguments(folder, *flags):
    return ["--target", "10", "--data", "digits", "--size", "32", "--train-images", "40", "--test-images",
            "10", "--threads", "1", "--device", "cpu", "--mode", "eager", "--output-dir", str(folder), *flags]


@pytest.mark.parametrize("group", ("MobileNetV2 and decoder", "MobileNetV3 and UNet"))
def test_networks_made_by_hand_get_the_same_latency(group, tmp_path, quick):
    files.write_json(tmp_path / "latency.json", fake_table())
    flags = arguments(tmp_path, "--space", "4")
    runs, total = judge.Judge(judge.build_parser().parse_args(flags)), 0.0
    for flags in runs.networks(judge.Contender(group, 12.0, 0)):
        name, factor = flags[1], float(flags[3])
        record = judge.train.modify_record(judge.registry.named_record(name, 10, {}), widen=factor)
        total += models.count_macs(judge.registry.build_network(record), 32) / 1e6
    assert total == pytest.approx(12.0, rel=0.08)


def test_random_networks_come_from_the_space_of_the_found_ones(tmp_path, monkeypatch):
    """The largest target sets the scale of the wide space."""
    def command(_, script, *flags):
        asked.append(flags)
        folder = Path(flags[flags.index("--output-dir") + 1])
        for target in (5, 10):
            (folder / f"target_{target}").mkdir(parents=True)
            (folder / f"target_{target}" / "arch.json").touch()

    asked = []
    monkeypatch.setattr(judge.Judge, "command", command)
    flags = arguments(tmp_path, "--space", "wide", "--target", "5,10", "--search", "--scale 0.7")
    runs = judge.Judge(judge.build_parser().parse_args(flags))
    for group in ("found", "random"):
        assert runs.record(judge.Contender(group, 5.0, 1)).parent.name == "target_5"
    assert [flags[flags.index("--target") + 1] for flags in asked] == ["5,10", "5,10"]
    assert "random" in asked[1] and "random" not in asked[0]
    assert all("--scale 0.7" in " ".join(flags) for flags in asked)
    assert runs.networks(judge.Contender("found", 5.0, 1))[0][-1] == "--from-scratch"  # as the others


@pytest.mark.parametrize("space", ("4", "wide"))
def test_a_whole_comparison_goes_on_and_ends_with_a_verdict(space, tmp_path, quick, capsys, monkeypatch):
    files.write_json(tmp_path / "latency.json", fake_table() if space == "4" else fake_wide())
    quick_elastic(monkeypatch)
    skip = [name for name in judge.HAND["dcnas"] if name != "MobileNetV3 and UNet"]
    drawn = "1" if space == "4" else "2"
    flags = arguments(tmp_path, "--space", space, "--found", "1", "--random", drawn, "--ranked", "2",
                      "--hand", "1", "--skip", *skip, "--search", "--epochs 1 --batch-size 8", "--train",
                      "--epochs 1 --batch-size 20 --val-images 10")
    judge.main(flags)
    printed = capsys.readouterr().out
    assert "Found networks are better by" in printed
    content = json.loads((tmp_path / "judge.json").read_text())
    assert [row["group"] for row in content["rows"]] == ["found", "random", "MobileNetV3 and UNet"]
    if space == "wide":
        assert content["order"]["10.0"]["ranked"]["networks"] == 2
        assert content["order"]["10.0"]["random"]["networks"] == 2
        assert "Kendall's tau between supernet and training, 2 networks all over the space" in printed
    else:
        assert content["order"] == {}
    pair = content["rows"][2]["columns"]
    assert set(pair) == {"ms", "MACs M", *judge.MEASURES}  # of both networks
    assert pair["joint loss"]["mean"] > 0
    monkeypatch.setattr(run, "run_script", lambda line: pytest.fail("a run was repeated"))
    judge.main(flags)


@pytest.mark.parametrize("space, limit, unit, groups, small", (
    (superkernel.Space("skipinit", 4, 3), "--target-macs", "M ", ["found", "random", judge.PLAIN, "UNet"],
     "--width 4"),
    (hinas.Space(base_width=2), "--target", "ms", ["found", "random", "grey DnCNN"],
     "--width 2 --search-width 1")), ids=("superkernel", "hinas"))
def test_denoisers_are_compared_too(space, limit, unit, groups, small, tmp_path, quick, capsys):
    """By PSNR and SSIM, at one cost, all trained with the images and the noise of the search."""
    (tmp_path / "photos").mkdir()
    for place in range(12):
        Image.effect_noise((40, 40), 50).save(tmp_path / "photos" / f"{place}.png")
    if unit == "ms":
        files.write_json(tmp_path / "latency.json", fake_parts(space, 24))
    model = space.identity()["method"]
    target = sum(judge.registry.method_module(model).SuperNet(space).cost_range(
        *judge.latency.part_macs(space, 24))) / 2
    judge.main(["--model", model, limit, f"{target:.3f}", "--data", str(tmp_path / "photos"), "--size", "24",
                "--threads", "1", "--device", "cpu", "--mode", "eager", "--found", "1", "--random", "1",
                "--hand", "1", "--skip", "DnCNN", "--output-dir", str(tmp_path), "--search",
                f"{small} --epochs 1 --crops 2 --batch-size 4 --sigmas 0.1", "--train",
                "--epochs 1 --batch-size 4 --crops 1"])
    printed, content = capsys.readouterr().out, json.loads((tmp_path / "judge.json").read_text())
    assert [row["group"] for row in content["rows"]] == groups and content["order"] == {}
    assert f" {unit}  found" in printed
    for row in content["rows"]:
        assert {*row["columns"]} == {"MACs M", "PSNR dB", "SSIM", *(["ms"] if unit == "ms" else [])}
    assert content["rows"][-1]["columns"]["MACs M"]["mean"] == pytest.approx(target, rel=0.1)
    folder = tmp_path / f"target_{target:.3f}".rstrip("0") / groups[-1].replace(" ", "-")
    flags = files.read_checkpoint(folder / "seed_0" / "network_0" / "best.pt")["flags"]
    assert flags["sigmas"] == [0.1] and flags["grey"] is (model == "hinas")
    assert flags["recipe"] == model and flags["crops"] == 1


def test_networks_made_by_hand_see_the_images_and_the_noise_of_the_search(tmp_path, monkeypatch):
    """Also where the size and the noise are the method's own; --train has the last word."""
    (tmp_path / "photos").mkdir()
    for place in range(4):
        Image.effect_noise((140, 140), 50).convert("RGB").save(tmp_path / "photos" / f"{place}.png")
    monkeypatch.setattr(judge.Judge, "widened", lambda *_: 0.5)

    def made(*flags):
        return judge.Judge(judge.build_parser().parse_args(["--data", str(tmp_path / "photos"), *flags]))

    runs = made("--model", "superkernel", "--target-macs", "1400", "--search", "--width 16 --sigmas 0.1")
    words = runs.networks(judge.Contender("UNet", 1400.0, 0))[0]
    assert words[words.index("--size") + 1] == "128" and words[words.index("--sigmas") + 1] == "0.1"
    assert words[-2:] == ["--recipe", "superkernel"]
    asked = []
    monkeypatch.setattr(judge.Judge, "command", lambda self, script, *flags: asked.append(flags))
    monkeypatch.setattr(judge, "lock_folder", lambda folder: None)
    for group in (judge.PLAIN, "random"):  # the network without a search has its own cost
        runs.record(judge.Contender(group, 1400.0, 0))
    assert ["--target-macs" in flags for flags in asked] == [False, True]
    runs = made("--model", "superkernel", "--target-macs", "1400", "--train", "--sigma 0.2", "--skip",
                judge.PLAIN)
    assert "--sigmas" not in runs.networks(judge.Contender("UNet", 1400.0, 0))[0]
    assert judge.PLAIN not in {one.group for one in runs.contenders()}
    runs = judge.Judge(judge.build_parser().parse_args(
        ["--model", "dcnas-seq", "--target", "4", "--mode", "eager"]))
    assert runs.by_hand == judge.HAND["dcnas"] and runs.args.space == "4"


def test_flags_as_words_are_the_flags_again():
    values = {"grey": False, "crops": 3, "train_folders": ["a", "b"], "leave_out": None, "sigmas": [0.1, 0.2]}
    assert judge.image_words(values) == ["--no-grey", "--crops", "3", "--train-folders", "a", "b", "--sigmas",
                                         "0.1", "0.2"]
    assert judge.image_words({"grey": True}) == ["--grey"]


def test_processes_share_the_runs(tmp_path, quick, monkeypatch):
    """Another one makes the table, holds the first run, and searches for the second, which stays open to
    both. After each run the verdict of what is there is written."""
    flags = arguments(tmp_path, "--space", "4", "--found", "1", "--random", "1", "--skip",
                      *judge.HAND["dcnas"])
    runs = judge.Judge(judge.build_parser().parse_args(flags))
    taken, other = (runs.where(judge.Contender(group, 10.0, 0)) for group in ("found", "random"))
    made, left = [], []
    numbers = dict.fromkeys(["ms", "MACs M", *judge.MEASURES], 1.0)

    def lock(folder):
        if folder in (tmp_path, taken):
            raise run.Busy("Another run is writing.")

    def wait(_):  # what the other process has done meanwhile
        if not (tmp_path / "latency.json").exists():
            files.write_json(tmp_path / "latency.json", fake_table())
        elif not made:
            assert left == [taken, other]
            made.append("search")
        else:
            so_far = json.loads((tmp_path / "judge.json").read_text())
            assert [row["group"] for row in so_far["rows"]] == ["random"]
            files.write_json(taken / "result.json", numbers)

    def measure(self, contender):
        if not made:
            raise run.Busy("Another run is searching.")
        made.append(contender.group)
        files.write_json(self.where(contender) / "result.json", numbers)

    monkeypatch.setattr(judge, "lock_folder", lock)
    monkeypatch.setattr(judge, "unlock_folder", left.append)
    monkeypatch.setattr(judge.time, "sleep", wait)
    monkeypatch.setattr(judge.Judge, "measure", measure)
    runs.run_all()
    assert made == ["search", "random"]
    again = arguments(tmp_path, "--space", "4", "--found", "2")
    judge.Judge(judge.build_parser().parse_args(again)).check_flags()
    other = judge.build_parser().parse_args([*again, "--size", "48", "--train", "--epochs 3"])
    with pytest.raises(ValueError, match="runs of other --size, --train: name another"):
        judge.Judge(other).check_flags()


def test_images_without_labels_are_refused(tmp_path, capsys):
    for index in range(4):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "photos" / f"{index}.png")
    with pytest.raises(SystemExit) as stop:
        judge.main(["--target", "4", "--data", str(tmp_path / "photos"), "--output-dir", str(tmp_path / "j")])
    assert stop.value.code == 2
    assert "have no labels" in capsys.readouterr().err
