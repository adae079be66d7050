"""latency.py: the timing, the table, its prediction; small and with made-up times, so that it is the same everywhere."""

import copy
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import latency
import models
from fake_table import fake_table, quick_compare

ROOT = Path(latency.__file__).parent


def build():
    """A real table of this machine, as small as it gets."""
    setting = latency.this_setting("cpu", size=32, num_classes=3)
    with pytest.MonkeyPatch.context() as patch:
        quick_compare(patch)
        return latency.build_table(setting, space=4, min_width=models.MIN_WIDTH, rounds=1)


@pytest.fixture(scope="module")
def built():
    return build()


def test_timing_is_the_median_with_its_spread():
    timing = latency.Timing.of([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (timing.median_ms, timing.p10_ms, timing.p90_ms, timing.count) == (3.0, 1.0, 100.0, 5)


def test_measure_times_what_it_is_given():
    timing = latency.measure(lambda: time.sleep(0.004), "cpu", warmup=1, repeats=5)
    assert timing.median_ms >= 4 and timing.count == 5


def test_interleaving_cancels_what_disturbs_all(monkeypatch):
    """A device whose clock drifts fourfold: times are useless, their ratio is exact."""
    clock, costs = [1.0], {"a": 2.0, "b": 3.0}

    def drifting(run, device, **_):
        clock[0] *= 1.1
        return latency.Timing(costs[run] * clock[0] ** 0.001 * (2 if 1.5 < clock[0] < 3 else 1), 0, 0, 1)
    monkeypatch.setattr(latency, "measure", drifting)
    result = latency.interleave(["a", "b"], "cpu", min_rounds=9)
    assert result.ratios == pytest.approx([1.0, 1.5], rel=0.001) and max(result.uncertainty) < 0.001
    assert result.timings[1].p90_ms > 1.9 * result.timings[1].p10_ms


def test_interleaving_goes_on_until_it_knows_or_time_is_up(monkeypatch):
    values = iter([1.0, 2.0, 1.0, 4.0] * 1000)
    monkeypatch.setattr(latency, "measure", lambda *_, **__: latency.Timing(next(values), 0, 0, 1))
    result = latency.interleave(["a", "b"], "cpu", min_rounds=4, seconds=0.05)
    assert result.rounds > 4 and result.uncertainty[0] == 0 and result.uncertainty[1] > 0.01


def test_the_table_reports_its_own_error_on_other_networks(built):
    check = built["check"]
    assert check["networks"] == 7 and 0 < check["median_percent"] <= check["p95_percent"] <= check["worst_percent"]
    assert 0.5 < built["correction"] < 2


def test_a_built_table_is_positive_never_decreasing_and_covers_the_space(built):
    table = latency.LatencyTable(built)
    for widths, ms in table.curves.values():
        assert len(widths) >= 4 and min(ms) > 0 and ms == sorted(ms) and widths == sorted(set(widths))
    import random
    for seed in range(20):
        arch = models.random_arch("dcnas", 4, random.Random(seed), 3)
        assert table.predict_ms(arch) > table.base_ms("dcnas") > 0
    with pytest.raises(ValueError, match="does not cover"):
        table.predict_ms(models.random_arch("dcnas", 8, random.Random(0), 3))


def test_a_built_table_predicts_this_machine(built):
    """A loose bound, since other work may run here: far off means that the method broke, not the machine."""
    errors = []
    for attempt in range(3):
        table = latency.LatencyTable(build() if attempt else built)
        errors += [latency.compare(table, models.named_arch("dcnas-k3-e6", 3), seconds=0.1)["error_percent"] for _ in range(2)]
        if min(map(abs, errors[-2:])) < 40:
            return
    raise AssertionError(errors)


def test_a_table_says_how_it_was_made(built):
    assert list(built)[:4] == ["format", "version", "made", "setting"]
    assert built["made"]["torch"] == torch.__version__ and built["made"]["date"]
    assert built["setting"]["threads"] == 1 and built["setting"]["batch"] == 1
    assert json.loads(json.dumps(built, allow_nan=False)) == built


def test_interpolation_between_widths_by_hand():
    content = fake_table(space=4)
    row = next(r for r in content["operations"] if r["stage"] == 5 and r["in_channels"] == 80 and r["kernel_size"] == 5)
    row["mid_channels"], row["ms"] = [104, 200, 640], [1.0, 2.0, 10.0]
    table = latency.LatencyTable(content)
    block = models.Block(5, 80, 0, 80, 5, 1, 0, "silu")
    for mid, ms in ((104, 1.0), (152, 1.5), (200, 2.0), (420, 6.0), (640, 10.0)):
        assert table.block_ms(replace(block, mid_channels=mid)) == pytest.approx(ms)
    for mid in (96, 641):
        with pytest.raises(ValueError, match="does not cover"):
            table.block_ms(replace(block, mid_channels=mid))


def test_prediction_is_the_sum_of_the_parts():
    table = latency.LatencyTable(fake_table(space=8))
    arch = models.named_arch("dnas-k3-e3")
    expected = sum(table.fixed_ms["dnas"].values()) + sum(table.block_ms(block) for block in arch.blocks[1:])
    assert table.predict_ms(arch) == pytest.approx(expected, rel=1e-12)


def test_group_factors_are_found_from_whole_networks():
    """A mode in which stage 7 takes half the time and the decoder a third, seen only through whole networks."""
    import random
    table = latency.LatencyTable(fake_table(space=4))
    truth = {"stage 7": 0.5, "decoder": 1 / 3}

    def run(arch):
        parts = {"stem": 0.1} | ({"decoder": 0.9} if arch.denoises else {}) | ({"head": 0.3} if arch.classifies else {})
        parts |= {f"block {index}": 0.2 if block.stage == 2 else table.block_ms(block)
                  for index, block in enumerate(arch.blocks)}
        return arch, parts, sum(ms * truth.get(latency._group(arch, name), 1.0) for name, ms in parts.items())

    archs = [models.random_arch(model, 4, random.Random(seed), 0 if model == "dnas" else 3)
             for seed in range(30) for model in ("dcnas", "cnas", "dnas")]
    factors = latency._group_factors([run(arch) for arch in archs], stiffness=1e-6)
    assert factors["stage 7"] == pytest.approx(0.5, abs=0.05) and factors["decoder"] == pytest.approx(1 / 3, abs=0.05)
    assert factors["stage 5"] == pytest.approx(1, abs=0.05)
    errors = []
    for arch in archs[:9]:
        _, parts, whole = run(arch)
        errors.append(abs(sum(ms * factors[latency._group(arch, name)] for name, ms in parts.items()) / whole - 1))
    assert max(errors) < 0.01
    few = latency._group_factors([run(arch) for arch in archs[:3]])  # fewer networks than groups: still sane
    assert all(0.2 < factor < 1.5 for factor in few.values())


def test_the_carriers_hold_every_operation_at_every_width():
    import random
    carriers = latency._carriers(random.Random(0), 8, 3, models.MIN_WIDTH, rounds=2)
    assert [arch.model for arch in carriers[:3]] == ["cnas", "dnas", "dcnas"]
    held = {(latency._key(block), block.mid_channels) for arch in carriers for block in arch.blocks[1:]}
    for shape in set(models.searched_positions("dcnas")):
        assert {(latency._key(b), b.mid_channels)
                for b in latency._width_grid(shape, models.SPACES[8], models.MIN_WIDTH)} <= held


def test_a_table_of_a_mode_without_parts(monkeypatch):
    """The compiler stands in for a mode whose parts cannot be timed; it is replaced by the folded network itself."""
    monkeypatch.setattr(torch, "compile", lambda network: network)
    quick_compare(monkeypatch)
    setting = latency.this_setting("cpu", size=32, num_classes=3, mode="compile")
    content = latency.build_table(setting, space=4, min_width=models.MIN_WIDTH, rounds=1)
    assert content["setting"]["mode"] == "compile" and content["check"]["networks"] == 2
    table = latency.LatencyTable(content)
    with pytest.raises(ValueError, match="mode is 'compile' there and 'eager' here"):
        latency.require_setting(table, replace(setting, mode="eager"), "t.json")


def test_the_correction_scales_everything():
    table = latency.LatencyTable(fake_table(space=4))
    arch = models.named_arch("dcnas-k5-e3", 3)
    assert table.scaled(1.25).predict_ms(arch) == pytest.approx(1.25 * table.predict_ms(arch))
    assert table.scaled(1.25).scaled(0.8).predict_ms(arch) == pytest.approx(table.predict_ms(arch))


def test_pooling_gives_the_nearest_sequence_that_never_decreases():
    assert latency._non_decreasing([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert latency._non_decreasing([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert latency._non_decreasing([1.0, 2.0]) == [1.0, 2.0]


@pytest.mark.parametrize("change", [
    lambda t: t.pop("setting"),
    lambda t: t["setting"].pop("threads"),
    lambda t: t["setting"].update(colour=1),
    lambda t: t.update(operations={}) or t.update(operations=[{}]),
    lambda t: t.update(fixed_ms=[]),
    lambda t: t.update(fixed_ms={}),
    lambda t: t["fixed_ms"].pop("dcnas"),
    lambda t: t.pop("space"),
    lambda t: t.update(correction=0),
    lambda t: t["fixed_ms"]["dcnas"].update(stem=-1),
    lambda t: t["fixed_ms"]["dcnas"].update(stem=float("nan")),
    lambda t: t["operations"][0]["ms"].__setitem__(0, "fast"),
    lambda t: t["operations"][0]["ms"].__setitem__(0, -0.24),
    lambda t: t["operations"][0]["ms"].__setitem__(0, 1e6),
    lambda t: t["operations"][0]["mid_channels"].reverse(),
    lambda t: t["operations"][0]["ms"].pop(),
])
def test_wrong_tables_are_refused_in_one_sentence(change):
    content = copy.deepcopy(fake_table(space=4))
    change(content)
    with pytest.raises(ValueError, match="table is not valid") as caught:
        latency.LatencyTable(content)
    assert "\n" not in str(caught.value)


def test_a_table_of_another_setting_is_refused_with_the_command_that_makes_the_right_one():
    table = latency.LatencyTable(fake_table(space=4))
    for change in ({"device": "another CPU"}, {"size": 128}, {"batch": 7}, {"threads": 9}, {"dtype": "bfloat16"}):
        wanted = replace(table.setting, **change)
        with pytest.raises(ValueError) as caught:
            latency.require_setting(table, wanted, "t.json")
        assert next(iter(change)) in str(caught.value)
        command = str(caught.value).split("python latency.py ")[1].split()
        args = latency.build_parser().parse_args(command)  # the printed command asks for just what is wanted
        assert (args.size, args.batch, args.threads, args.dtype) == (wanted.size, wanted.batch, wanted.threads, wanted.dtype)
    latency.require_setting(table, table.setting, "t.json")


def test_networks_and_threads_are_left_as_they_were():
    network = nn.Sequential(nn.Conv2d(3, 4, 3)).train()
    weight = network[0].weight.detach().clone()
    threads = torch.get_num_threads()
    setting = latency.this_setting("cpu", size=16, num_classes=1, dtype="bfloat16", threads=1)
    with latency.prepared(network, setting) as (inside, images):
        assert not inside.training and images.dtype == torch.bfloat16 and torch.get_num_threads() == 1
    assert network.training and torch.equal(network[0].weight, weight) and torch.get_num_threads() == threads


def test_parts_add_up_to_the_whole():
    network = models.Network(models.named_arch("dcnas-k3-e3", 3))
    with latency.prepared(network, latency.this_setting("cpu", size=64, num_classes=3)) as (network, images):
        parts = latency._named_parts(network)
        network(images)
        shares = []
        for _ in range(10):
            with latency.PartTimer(parts, torch.device("cpu")) as timer:
                start = time.perf_counter()
                network(images)
                whole = (time.perf_counter() - start) * 1e3
            shares.append(sum(timer.medians_ms().values()) / whole)
    assert 0.5 < max(shares) <= 1.0  # the rest: normalisation, hooks
    assert not network.stem._forward_hooks and not network.stem._forward_pre_hooks


def test_command_line_builds_prints_and_compares(tmp_path, capsys, monkeypatch):
    quick_compare(monkeypatch)
    table = tmp_path / "t.json"
    latency.main(["--output", str(table), "--size", "32", "--space", "4", "--rounds", "1", "--classes", "3"])
    assert "dcnas fixed parts" in capsys.readouterr().out
    models.write_json(tmp_path / "arch.json", models.make_record(models.named_arch("dcnas-k3-e3", 3), {}))
    latency.main(["--table", str(table), "--arch", str(tmp_path / "arch.json"), "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["predicted_ms"] > 0 and row["measured_ms"] > 0
    latency.main(["--table", str(table), "--check", "2", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert len(result["networks"]) == 2
    row = result["networks"][0]
    assert abs(row["error_percent"]) < 100 and row["uncertainty_percent"] >= 0
    worst = max(abs(row["error_percent"]) for row in result["networks"])
    assert result["error_percent"]["worst_percent"] == worst


@pytest.mark.parametrize("argv, word", [
    (["--table", "missing.json"], "missing.json"),
    (["--check", "3"], "--table"),
    (["--size", "0"], "--size"),
    (["--device", "quantum"], "quantum"),
])
def test_wrong_usage_ends_in_one_sentence(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        latency.main(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and word in error and "Traceback" not in error


def test_latency_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "latency.py", tmp_path)
    code = ("import torch, latency; s = latency.this_setting('cpu', size=8, num_classes=1);"
            "print(latency.measure_network(torch.nn.Conv2d(3, 4, 3), s, repeats=3, seconds=0).count)")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "3", run.stderr


@pytest.mark.parametrize("spill", (0.0, 0.3))
def test_a_table_learns_what_parts_cost_each_other(spill):
    """Whole networks that take `spill` ms per million weights more than their parts, and 0.1 ms less altogether."""
    content = fake_table(space=8)
    for parts in content["fixed_ms"].values():
        del parts["rest"]
    before = {model: sum(parts.values()) for model, parts in content["fixed_ms"].items()}
    parts_alone, rng = latency.LatencyTable(content), random.Random(0)

    def whole_ms(arch):
        return parts_alone.predict_ms(arch) + spill * sum(latency._weights(block) for block in arch.blocks) / 1e6 - 0.1

    archs = [models.random_arch("dcnas", 8, rng, 10).with_model(model) for _ in range(20) for model in ("cnas", "dnas", "dcnas")]
    runs = [(arch, whole_ms(arch)) for arch in archs]
    latency._add_what_is_shared(content, runs)
    table = latency.LatencyTable(content)
    for arch in (models.random_arch(model, 8, rng, 0 if model == "dnas" else 10) for model in ("cnas", "dnas", "dcnas")):
        assert table.predict_ms(arch) == pytest.approx(whole_ms(arch), abs=1e-3)
    assert all(table.base_ms(model) < ms for model, ms in before.items())
