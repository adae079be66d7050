"""latency.py: timing, fast forms, the table, its builder and its command, on small or made-up tables."""

import ast
import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

import files
import hinas
import latency
import models
import registry
import superkernel
import tfnas
import timing
from fake_table import fake_parts, fake_table, quick_compare

SPACES = {"tfnas": tfnas.Space(4, models.MIN_WIDTH, 3), "superkernel": superkernel.Space("skipinit", 3, 1),
          "hinas": hinas.Space(layers=1, nodes=2, base_width=3)}


def build(space=SPACES["tfnas"], size=32, mode="eager"):
    """A real table of this machine, as small as it gets."""
    setting = latency.this_setting("cpu", size=size, num_classes=getattr(space, "num_classes", 0), mode=mode)
    with pytest.MonkeyPatch.context() as patch:
        quick_compare(patch)
        return latency.build_table(setting, space, rounds=1)


@pytest.fixture(scope="module")
def built():
    return build()


# --- A method in one file, for the calls that every method answers ----------------------------------------


class ToyPart(NamedTuple):
    layer: str
    kernel_size: int


@dataclass(frozen=True)
class ToyDesign:
    kernel_sizes: tuple[int, ...]

    def to_dict(self):
        return {"kernel_sizes": list(self.kernel_sizes)}


@dataclass(frozen=True)
class ToySpace:
    """Three convolutions of 8 channels with kernels of 1, 3 or 5."""

    channels: int = 3

    def identity(self):
        return {"method": "toy", "channels": self.channels}

    @classmethod
    def from_identity(cls, identity):
        return cls(identity["channels"])

    def table_flags(self):
        return "--method toy"

    def possible_parts(self):
        return {ToyPart(layer, size) for layer in ("first", "other") for size in (1, 3, 5)}

    def random_design(self, rng):
        return ToyDesign(tuple(rng.choice((1, 3, 5)) for _ in range(3)))

    def reference_design(self):
        return ToyDesign((3, 3, 3))

    def carriers(self, rng, rounds):
        sizes = [(size, other) for size in (1, 3, 5) for other in (1, 3, 5)]
        return [ToyDesign((size, other, other)) for _ in range(rounds) for size, other in sizes]

    def network(self, design):
        first, *others = design.kernel_sizes
        return nn.Sequential(nn.Conv2d(self.channels, 8, first, padding="same"),
                             *(nn.Conv2d(8, 8, size, padding="same") for size in others))

    def parts(self, network):
        return [(ToyPart("other" if index else "first", layer.kernel_size[0]), layer)
                for index, layer in enumerate(network)]

    def cost(self, design, costs, rest):
        return rest + sum(costs[ToyPart("other" if index else "first", size)]
                          for index, size in enumerate(design.kernel_sizes))

    def kinds(self, design):
        return ["network"]

    def holds(self, design):
        return all(size in (1, 3, 5) for size in design.kernel_sizes)


class ToySuperNet:
    """Log probabilities of each layer's kernel sizes; a state is a tuple of sizes."""

    def __init__(self, log_p, starts=((5, 5, 5),)):
        self.log_p, self.first, self.space = log_p, starts, ToySpace()

    def score(self, state):
        return sum(row[size] for row, size in zip(self.log_p, state))

    def starts(self):
        return [(self.score(state), state) for state in self.first]

    def state_cost(self, state, costs, rest):
        return self.space.cost(ToyDesign(state), costs, rest)

    def exchanges(self, state, costs, rest, target):
        if self.state_cost(state, costs, rest) <= target:
            return []
        others = [(*state[:layer], size, *state[layer + 1:]) for layer in range(3) for size in (1, 3, 5)]
        present = self.state_cost(state, costs, rest)
        gains = [(present - self.state_cost(other, costs, rest), other) for other in others]
        return [(self.score(state) - self.score(other), gain, other) for gain, other in gains if gain > 1e-9]

    def settle(self, state, costs, rest, target):
        return ToyDesign(state)


@pytest.fixture
def toy(monkeypatch):
    """The method "toy", as if toy.py lay beside registry.py."""
    module = types.ModuleType("toy")
    module.Space, module.Part, module.Design, module.SuperNet = ToySpace, ToyPart, ToyDesign, ToySuperNet
    module.design_of = lambda record: ToyDesign(tuple(record["design"]["kernel_sizes"]))
    module.build = lambda design: ToySpace().network(design)
    module.record_content = lambda design: {"model": "toy", "design": design.to_dict()}
    monkeypatch.setitem(sys.modules, "toy", module)
    monkeypatch.setitem(registry.METHODS, "toy", ("toy",))
    return module


def test_a_new_method_has_tables_without_a_change_of_this_file(toy, tmp_path, monkeypatch, capsys):
    quick_compare(monkeypatch)
    path, arch = str(tmp_path / "toy.json"), str(tmp_path / "arch.json")
    latency.main(["--method", "toy", "--size", "48", "--output", path])  # 27 networks: spill is fitted
    table = latency.load_table(path)
    assert set(table.costs) == ToySpace().possible_parts() and table.content["check"]["networks"] == 21
    assert table.predict_ms(ToyDesign((5, 5, 5))) > table.predict_ms(ToyDesign((1, 1, 1))) > 0
    files.write_json(arch, files.make_record("toy", toy.record_content(ToyDesign((1, 3, 5))), {}))
    latency.main(["--table", path, "--arch", arch])
    assert "predicted" in capsys.readouterr().out
    assert table.read_record(files.load_record(arch)) == ToyDesign((1, 3, 5))


class Opaque(nn.Module):
    """What a compiler might return: a network without parts."""

    def __init__(self, network):
        super().__init__()
        self.forward = network.forward


@pytest.mark.parametrize("mode, checked", (("folded", 7), ("compile", 2)))
def test_a_table_of_another_mode(mode, checked, toy, monkeypatch):
    monkeypatch.setattr(torch, "compile", Opaque)
    content = build(ToySpace(), 24, mode)
    assert content["setting"]["mode"] == mode and content["check"]["networks"] == checked
    table = latency.Table(content)
    with pytest.raises(ValueError, match=f"mode is '{mode}' there and 'eager' here"):
        latency.require_setting(table, replace(table.setting, mode="eager"), "t.json")


# --- Timing -----------------------------------------------------------------------------------------------


def test_timing_is_the_median_with_its_spread():
    found = latency.Timing.of([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (found.median_ms, found.p10_ms, found.p90_ms, found.count) == (3.0, 1.0, 100.0, 5)


def test_measure_times_what_it_is_given():
    found = latency.measure(lambda: time.sleep(0.004), "cpu", warmup=1, repeats=5)
    assert found.median_ms >= 4 and found.count == 5


def test_interleaving_cancels_what_disturbs_all(monkeypatch):
    """A device whose clock drifts fourfold: times are useless, their ratio is exact."""
    clock, costs = [1.0], {"a": 2.0, "b": 3.0}

    def drifting(run, device, **_):
        clock[0] *= 1.1
        return latency.Timing(costs[run] * clock[0] ** 0.001 * (2 if 1.5 < clock[0] < 3 else 1), 0, 0, 1)
    monkeypatch.setattr(latency, "measure", drifting)
    result = latency.interleave(["a", "b"], "cpu", min_rounds=9)
    assert result.ratios == pytest.approx([1.0, 1.5], rel=0.001) and max(result.uncertainty) < 0.001
    assert max(result.times_ms[1]) > 1.9 * min(result.times_ms[1])


def test_interleaving_goes_on_until_it_knows_or_time_is_up(monkeypatch):
    values = iter([1.0, 2.0, 1.0, 4.0] * 1000)
    monkeypatch.setattr(latency, "measure", lambda *_, **__: latency.Timing(next(values), 0, 0, 1))
    result = latency.interleave(["a", "b"], "cpu", min_rounds=4, seconds=0.05)
    assert len(result.times_ms[0]) > 4 and result.uncertainty[0] == 0 and result.uncertainty[1] > 0.01


def test_networks_and_threads_are_left_as_they_were():
    network = nn.Sequential(nn.Conv2d(3, 4, 3)).train()
    weight = network[0].weight.detach().clone()
    threads = torch.get_num_threads()
    setting = latency.this_setting("cpu", size=16, num_classes=1, dtype="bfloat16", threads=1)
    with latency.prepared(network, setting) as (inside, images):
        assert not inside.training and images.dtype == torch.bfloat16 and torch.get_num_threads() == 1
    assert network.training and torch.equal(network[0].weight, weight) and torch.get_num_threads() == threads


def test_parts_add_up_to_the_whole():
    space, device = SPACES["tfnas"], torch.device("cpu")
    setting = latency.this_setting("cpu", size=64, num_classes=3)
    with latency.prepared(space.network(space.reference_design()), setting) as (network, images):
        modules = [module for _, module in space.parts(network)]
        network(images)
        shares = []
        for _ in range(10):
            start = time.perf_counter()
            parts = latency.time_parts(network, modules, images, device, runs=1)
            shares.append(sum(parts) / (1e3 * (time.perf_counter() - start)))
    assert 0.5 < max(shares) <= 1.0  # the rest: normalisation, hooks
    assert not network.stem._forward_hooks and not network.stem._forward_pre_hooks


# --- Fast forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", models.MODELS)
def test_the_folded_form_computes_the_same_without_batch_norms(model):
    torch.manual_seed(0)
    network = models.make_network(models.named_arch(f"{model}-k5-e3", 0 if model == "dnas" else 6))
    with torch.no_grad():
        for _ in range(3):  # batch norms with statistics and an affine part of their own
            network.train()(torch.rand(4, 3, 48, 48))
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
            if isinstance(module, models.Means):
                module[1].weight.normal_()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        images, folded = torch.rand(2, 3, 33, 50), latency.fast(network)
        for ours, theirs in zip(folded(images), network.eval()(images)):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("convolution, folds", (
    (nn.Conv2d(4, 3, 1, bias=False), True), (nn.Conv2d(4, 3, 1), False),
    (nn.Conv2d(4, 3, 1, padding=1, bias=False), False), (nn.Conv2d(4, 3, 3, bias=False), False),
    (nn.Conv2d(4, 4, 1, groups=2, bias=False), False)))
def test_a_norm_is_folded_into_the_convolution_behind_it_where_that_is_the_same(convolution, folds):
    network, images = nn.Sequential(nn.BatchNorm2d(4, affine=False), convolution), torch.randn(2, 4, 7, 9) + 1
    with torch.no_grad():
        network.train()(images)
        folded = latency.fold_batch_norm(network)
        torch.testing.assert_close(folded(images), network.eval()(images))
    assert len(folded) == (1 if folds else 2)


def test_modes_that_cannot_be_had_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="no mode"):
        latency.fast(nn.Conv2d(3, 3, 1), "warp")
    with pytest.raises(ValueError, match="CUDA"):
        latency.fast(nn.Conv2d(3, 3, 1), "graph", torch.rand(1, 3, 32, 32))


# --- Is the device quiet? ---------------------------------------------------------------------------------


def test_the_share_of_the_processor_is_low_where_something_else_has_it(monkeypatch):
    """Asleep for three quarters of the time, as a process is that waits for its turn."""
    def run():
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass
        time.sleep(0.006)

    for found in (latency.measure(run, "cpu", warmup=0, repeats=3), timing.burst(run)):
        assert 0 < found.cpu_share < 0.5 and found.median_ms >= 8
    assert timing.burst(run, threads=2).cpu_share is None  # threads wait for each other
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert latency.measure(run, "cpu", warmup=0, repeats=1).cpu_share is None


@pytest.mark.parametrize("p90_ms, share, slowdown, shown, note", [
    (8.8, 0.99, 1.04, "16.0 ms", None),
    (8.8, None, None, "16.0 ms", None),
    (8.8, 0.6, None, "16.0 ms", "do not believe this latency: something else runs on this device (the "
                                "network had 60 % of the processor's time)."),
    (16.0, 0.99, None, "16.0 ms", "or its clock changed (the network took 8 to 16 ms, 10-90 %)."),
    (8.8, 0.99, 2.0, "16.0 ms now, 8.0 ms at the table's speed",
     "now takes 2.00 times as long as when the table was made: something else runs on this device, or its"),
    (8.8, 0.99, 0.5, "16.0 ms now, 32.0 ms at the table's speed", "made: something else ran on it then, or"),
    (8.8, 0.6, 0.5, "16.0 ms now, 32.0 ms at the table's speed",
     "now takes 0.50 times as long as when the table was made: something else runs on this device (the")])
def test_a_latency_that_is_not_to_be_believed_says_so(p90_ms, share, slowdown, shown, note):
    notes = timing.notes({"p10_ms": 8.0, "p90_ms": p90_ms, "cpu_share": share, "slowdown": slowdown})
    assert notes == [] if note is None else note in notes[0] and len(notes) == 1
    assert timing.format_ms(16.0, slowdown, digits=1) == shown


@pytest.mark.parametrize("p90_ms, share, words", [
    (8.8, 0.99, "The device was quiet"), (8.8, None, "The device was quiet"),
    (10.0, 0.99, "Trust the milliseconds of this table to about 25 % only"),
    (8.8, 0.6, "Do not trust the milliseconds of this table: .* 60 % of the processor's time; the load was")])
def test_a_table_says_in_one_sentence_how_far_it_can_be_trusted(p90_ms, share, words):
    conditions = {"p10_ms": 8.0, "p90_ms": p90_ms, "cpu_share": share, "load": 3.2}
    sentence = timing.format_conditions(conditions)
    assert re.search(words, sentence) and sentence.count(". ") == 0
    table = latency.Table({**fake_table(4), "conditions": conditions})
    assert sentence in latency.format_table(table, times=False)
    assert "The device was" not in latency.format_table(latency.Table(fake_table(4)))  # an older one


def time_fake_networks(monkeypatch, references, share=1.0, count=3):
    """timing.time_networks on a device whose reference network takes these times, one after the other."""
    said, now, left = [], [0.0], iter(references)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(timing, "interleave", lambda bursts, **_: timing.InTurn(
        [[next(left)]], [1.0, 0.5], [0.0, 0.01], share))
    jobs = [timing.Job(lambda: None, lambda: [1.0], rounds=3) for _ in range(count)]
    times = timing.time_networks(jobs, lambda: None, lambda: timing.Burst(5.0, share), said.append)
    return [row["reference_ms"] for row in times["networks"]], times["conditions"], said, now[0]


def test_networks_are_timed_again_while_the_reference_wanders(monkeypatch):
    rows, conditions, said, waited = time_fake_networks(monkeypatch, [8.0, 8.1, 12.0, 9.0, 8.8, 8.7])
    assert rows == [8.1, 8.8, 8.7] and len(said) == 1 and "took 8.1 ms and then 12 ms" in said[0]
    assert waited == conditions["waited_s"] == 2 * timing.PAUSE_S and conditions["cpu_share"] == 1.0
    assert (conditions["p10_ms"], conditions["median_ms"], conditions["p90_ms"]) == (8.1, 8.7, 8.8)
    assert time_fake_networks(monkeypatch, [8.0, 8.1, 8.2, 8.1])[2:] == ([], 0.0)  # a quiet one waits never


def test_timing_ends_on_a_device_that_is_always_busy(monkeypatch):
    rows, conditions, said, waited = time_fake_networks(monkeypatch, [8.0, 16.0] * 99, share=0.5)
    assert len(rows) == 3 and len(said) == 1 and "50 % of the time" in said[0]
    assert waited == conditions["waited_s"] == timing.PATIENCE_S
    assert "Do not trust" in timing.format_conditions(conditions)


def test_a_result_of_the_search_says_the_speed_of_its_table():
    setting = latency.this_setting("cpu", size=16, num_classes=5)
    searched = {"setting": {**asdict(setting), "num_classes": 9}, "measured_ms": 20.0, "slowdown": 2.5}
    assert latency.ms_at_table(searched, setting) == 8.0
    assert latency.ms_at_table(searched, replace(setting, size=32)) is None
    for change in ({"setting": None}, {"measured_ms": None}, {"slowdown": math.nan}, {"slowdown": math.inf}):
        assert latency.ms_at_table({**searched, **change}, setting) is None


# --- A table of another device ----------------------------------------------------------------------------


def made_up_times(plan, **changes):
    """The content of a times.json: a part takes 1 ms, a network as long as its parts."""
    parts = [len(plan.space.parts(plan.space.network(design))) for design in plan.designs]
    rows = [{"reference_ms": 4.0, "ratio": count / 4, "uncertainty": 0.01, "cpu_share": 1.0, "pace_ms": 4.0,
             "parts_ms": [1.0] * count} for count in parts]
    conditions = {"median_ms": 4.0, "p10_ms": 4.0, "p90_ms": 4.0, "cpu_share": 1.0, "load": None}
    return {"format": timing.FORMAT, "version": 1, "plan": plan.to_dict(), "networks": rows,
            "made": {"device": "a board", "runtime": "onnxruntime 9", "date": "2026"},
            "conditions": conditions, **changes}


def test_a_table_is_made_of_the_times_of_another_device(toy, tmp_path, capsys):
    setting = replace(latency.this_setting("cpu", size=16, num_classes=0), mode="onnx")
    plan = latency.Plan(setting, ToySpace(), 1)
    files.write_json(tmp_path / "times.json", made_up_times(plan))
    latency.main(["--read-times", str(tmp_path / "times.json"), "--output", str(tmp_path / "t.json")])
    out, table = capsys.readouterr().out, latency.load_table(tmp_path / "t.json")
    assert (table.setting.device, table.setting.runtime) == ("a board", "onnxruntime 9") and "a board" in out
    assert table.predict_ms(ToyDesign((1, 3, 5))) == pytest.approx(3.0)
    assert table.content["check"]["worst_percent"] == pytest.approx(0.0, abs=1e-3)
    assert table.content["timed"]["date"] == "2026" and "quiet" in out


@pytest.mark.parametrize("change, words", [
    (lambda times: times.update(version=2), "has version 2.*with timing.py"),
    (lambda times: times["plan"].update(rounds=2), "of another version of this project"),
    (lambda times: times.update(networks=times["networks"][:-1]), "does not hold"),
    (lambda times: times["networks"][0].update(pace_ms=0), "does not hold"),
    (lambda times: times["networks"][0]["parts_ms"].append(1.0), "does not hold"),
    (lambda times: times["networks"][-1].pop("ratio"), "does not hold"),
    (lambda times: times["made"].pop("device"), "its made is"),
    (lambda times: times["plan"]["space"].update(method="os"), "does not hold")])
def test_times_that_do_not_fit_are_refused_in_one_sentence(change, words, toy, tmp_path):
    plan = latency.Plan(latency.this_setting("cpu", size=16, num_classes=0), ToySpace(), 1)
    content = made_up_times(plan)
    change(content)
    files.write_json(tmp_path / "times.json", content)
    with pytest.raises(ValueError, match=words) as caught:
        latency.read_times(tmp_path / "times.json")
    assert "\n" not in str(caught.value)


def test_the_script_for_other_devices_is_valid_python_3_9():
    ast.parse(open(timing.__file__).read(), feature_version=(3, 9))


# --- Building a table -------------------------------------------------------------------------------------


def test_the_table_reports_its_own_error_on_other_networks(built):
    check = built["check"]
    assert check["networks"] == 7
    assert 0 < check["median_percent"] <= check["p95_percent"] <= check["worst_percent"]
    assert 0.5 < built["correction"] < 2


def test_a_built_table_is_positive_never_decreasing_and_covers_the_space(built):
    table, curves = latency.Table(built), {}
    for part, ms in sorted(table.costs.items(), key=lambda item: item[0].mid_channels):
        curves.setdefault(part._replace(mid_channels=0), []).append(ms)
    for part, ms in curves.items():
        searched = part.place.startswith("stage") and part.place != "stage 2"
        assert len(ms) >= (4 if searched else 1) and min(ms) > 0 and ms == sorted(ms)
    for seed in range(20):
        assert table.predict_ms(tfnas.Space(4, num_classes=3).random_design(random.Random(seed))) > 0
    with pytest.raises(ValueError, match="does not cover.*--space 8"):
        table.predict_ms(tfnas.Space(8, num_classes=3).random_design(random.Random(0)))


def test_a_built_table_predicts_this_machine(built):
    """A loose bound, since other work may run here: far off means that the method broke, not the machine."""
    errors = []
    for attempt in range(3):
        table = latency.Table(build() if attempt else built)
        arch = models.named_arch("dcnas-k3-e6", 3)
        errors += [latency.compare(table, arch, seconds=0.1)["error_percent"] for _ in range(2)]
        if min(map(abs, errors[-2:])) < 40:
            return
    raise AssertionError(errors)


def test_a_table_says_how_it_was_made(built):
    assert list(built)[:4] == ["format", "version", "made", "setting"]
    assert built["made"]["torch"] == torch.__version__ and built["made"]["date"]
    assert built["setting"]["threads"] == 1 and built["setting"]["batch"] == 1
    assert built["conditions"]["p10_ms"] <= built["reference_ms"] <= built["conditions"]["p90_ms"]
    assert 0 < built["conditions"]["cpu_share"] <= 1
    assert json.loads(json.dumps(built, allow_nan=False)) == built


@pytest.mark.parametrize("method", ("superkernel", "hinas"))
def test_a_real_table_of_parts_predicts_this_machine(method, tmp_path, capsys):
    space, errors = SPACES[method], []
    for _ in range(3):  # other work may spoil a table while it is made
        table = latency.Table(build(space, 16))
        assert set(table.costs) >= space.possible_parts() and "network" in table.rest_ms
        designs = [space.random_design(random.Random(seed)) for seed in range(5)]
        rows = [latency.compare(table, design, seconds=0.0) for design in designs]
        # In turn with a reference network: a busy machine matters little. Other parts would be far off.
        errors.append(sorted(abs(row["error_percent"]) for row in rows)[2])
        if errors[-1] < 25:
            break
    assert errors[-1] < 25, errors


@pytest.mark.parametrize("space", SPACES.values(), ids=list(SPACES))
def test_the_carriers_hold_every_part(space):
    carriers, held = space.carriers(random.Random(0), 2), Counter()
    for design in carriers:
        held.update(part for part, _ in space.parts(space.network(design)))
    assert all(held[part] >= 2 for part in space.possible_parts())
    if space is SPACES["tfnas"]:
        assert [arch.model for arch in carriers[:3]] == ["cnas", "dnas", "dcnas"]


def made_up_carriers(space, designs, whole_of):
    """Carriers as if timed, with the times of fake_table; whole_of(kinds, parts): the time of the whole."""
    costs = latency.Table(fake_table(space.operations)).costs
    carriers = []
    for design in designs:
        parts = [(part, part.mid_channels * (part.in_channels + part.out_channels + 9), costs[part])
                 for part in tfnas.parts_of(design)]
        carriers.append((space.kinds(design), parts, whole_of(space.kinds(design), parts)))
    return costs, carriers


@pytest.mark.parametrize("spill", (0.0, 0.3))
def test_a_table_learns_what_parts_cost_each_other(spill):
    """Whole networks that take `spill` ms per million weights more than their parts, and 0.1 ms less."""
    def whole_ms(kinds, parts):
        return sum(ms + spill * size / 1e6 for _, size, ms in parts) - 0.1 * len(kinds)

    space = tfnas.Space(8)
    costs, carriers = made_up_carriers(space, space.carriers(random.Random(0), 1), whole_ms)
    found, rest = latency._shared_costs(carriers[::2], costs, 1.0)
    assert set(rest) == {"cnas", "dnas", "dcnas"} and max(rest.values()) < 0
    for kinds, parts, whole in carriers[1::2]:
        predicted = rest[kinds[0]] + sum(costs[part] + found * size for part, size, _ in parts)
        assert predicted == pytest.approx(whole, abs=1e-3)
    assert latency._shared_costs(carriers[:19], costs, 1.0)[0] == 0  # too few for a slope


def test_group_factors_are_found_from_whole_networks():
    """A mode in which stage 7 takes half the time and the decoder a third, seen in whole networks only."""
    truth, space = {"stage 7": 0.5, "decoder": 1 / 3}, tfnas.Space(4)
    _, carriers = made_up_carriers(space, space.carriers(random.Random(0), 8), lambda kinds, parts: sum(
        ms * truth.get(part[0], 1.0) for part, _, ms in parts))
    factors = latency._group_factors(carriers, stiffness=1e-6)
    assert factors["stage 7"] == pytest.approx(0.5, abs=0.05)
    assert factors["decoder"] == pytest.approx(1 / 3, abs=0.05)
    assert factors["stage 5"] == pytest.approx(1, abs=0.05)
    for _, parts, whole in carriers[:9]:
        assert sum(ms * factors[part[0]] for part, _, ms in parts) == pytest.approx(whole, rel=0.01)
    few = latency._group_factors(carriers[:3])  # fewer networks than groups: still sane
    assert all(0.2 < factor < 1.5 for factor in few.values())


@pytest.mark.parametrize("method", ("superkernel", "hinas"))
def test_macs_of_parts_add_up_to_the_networks(method):
    space = SPACES[method]
    costs, rest = latency.part_macs(space, 16)
    for seed in range(3):
        design = space.random_design(random.Random(seed))
        macs = models.count_macs(space.network(design), 16) / 1e6
        assert space.cost(design, costs, rest) == pytest.approx(macs, rel=1e-4)


# --- Using a table ----------------------------------------------------------------------------------------


def test_interpolation_between_widths_by_hand():
    content = fake_table(space=4)
    block = models.Block(5, 80, 0, 80, 5, 1, 0, "silu")
    key = tfnas.part_of(block)._asdict() | {"mid_channels": 0, "ms": 0}
    content["parts"] = [row for row in content["parts"] if row | {"mid_channels": 0, "ms": 0} != key]
    grid = [part.mid_channels for part in tfnas.Space(4).possible_parts() if part._replace(mid_channels=0) ==
            tfnas.part_of(block)]
    widths = sorted({*grid, 200})
    content["parts"] += [key | {"mid_channels": width, "ms": 1e-3 * width**2} for width in widths]
    costs = latency.Table(content).costs
    points = sorted((part.mid_channels, ms) for part, ms in costs.items()
                    if part._replace(mid_channels=0) == tfnas.part_of(block))
    arch = models.named_arch("dcnas-k5-e3", 10)
    place = next(i for i, b in enumerate(arch.blocks) if replace(b, mid_channels=0) == block)
    table = latency.Table(content)

    def ms_at(width):
        blocks = list(arch.blocks)
        blocks[place] = replace(block, mid_channels=width)
        return table.predict_ms(replace(arch, blocks=tuple(blocks)))

    for (low, low_ms), (high, high_ms) in zip(points, points[1:]):
        middle = (low + high) // 2
        expected = low_ms + (middle - low) / (high - low) * (high_ms - low_ms)
        assert ms_at(middle) - ms_at(low) == pytest.approx(expected - low_ms)
        assert ms_at(high) - ms_at(low) == pytest.approx(high_ms - low_ms)
    for width in (points[0][0] - 1, points[-1][0] + 1):
        with pytest.raises(ValueError, match="does not cover|No latency table covers"):
            ms_at(width)


def test_prediction_is_the_sum_of_the_parts():
    table, arch = latency.Table(fake_table(space=8)), models.named_arch("dnas-k3-e3")
    expected = table.rest(["dnas"]) + sum(table.costs[part] for part in tfnas.parts_of(arch))
    assert table.predict_ms(arch) == pytest.approx(expected, rel=1e-12)
    dcnas = models.named_arch("dcnas-k3-e3", 10)
    halves = [table.predict_ms(dcnas.with_model(model)) for model in ("dnas", "cnas")]
    assert table.predict_ms(dcnas.with_model("dcnas-seq")) == pytest.approx(sum(halves))  # two encoders


def test_the_correction_scales_everything():
    table = latency.Table(fake_table(space=4))
    arch = models.named_arch("dcnas-k5-e3", 10)
    assert table.scaled(1.25).predict_ms(arch) == pytest.approx(1.25 * table.predict_ms(arch))
    assert table.scaled(1.25).scaled(0.8).predict_ms(arch) == pytest.approx(table.predict_ms(arch))
    far = {"measured_ms": 3.0, "predicted_ms": 1.0}
    assert latency.corrected(table, far).predict_ms(arch) == pytest.approx(1.25 * table.predict_ms(arch))


def test_the_fit_takes_the_cheapest_exchanges_and_the_best_start():
    ms = {1: 1.0, 3: 2.0, 5: 4.0}
    costs = {part: ms[part.kernel_size] for part in ToySpace().possible_parts()}
    rows = [{5: 0.0, 3: -1.0, 1: -9.0}, {5: 0.0, 3: -5.0, 1: -6.0}, {5: 0.0, 3: -0.1, 1: -9.0}]
    supernet = ToySuperNet(rows)
    for target, expected in ((12.0, (5, 5, 5)), (10.0, (5, 5, 3)), (8.0, (3, 5, 3)), (5.9, (3, 1, 3)),
                             (1.0, (1, 1, 1))):
        assert latency.fit(supernet, costs, 0.0, target) == ToyDesign(expected)
        assert latency.fit(supernet, costs, 0.5, target + 0.5) == ToyDesign(expected)
    assert latency.fit_state(supernet, costs, 0.0, 8.0) == (3, 5, 3)
    # Of two starts the likelier end within the target wins; where none is, the cheaper one.
    both = ToySuperNet(rows, ((1, 1, 1), (5, 5, 5)))
    assert latency.fit(both, costs, 0.0, 8.0) == ToyDesign((3, 5, 3))
    assert latency.fit(ToySuperNet(rows, ((5, 5, 5), (1, 1, 1))), costs, 0.0, 0.5) == ToyDesign((1, 1, 1))


# --- Reading a table --------------------------------------------------------------------------------------


def as_version_1(content):
    """A table as it was written before version 2."""
    old = {**content, "version": 1}
    if content["space"]["method"] != "tfnas":
        return {**old, "format": "joint-latency-parts", "rest_ms": content["rest_ms"]["network"],
                "reference": content["reference"]["design"]}
    fixed, rows = {}, {}
    for row in content["parts"]:
        if row["place"] in ("decoder sharp", "multiscale stem"):
            continue  # there were none
        if row["place"] in ("stem", "stage 2", "head", "decoder"):
            fixed[row["place"].replace(" ", "_")] = row["ms"]
        else:
            shape = {"stage": int(row["place"].split()[1]), **{name: row[name] for name in (
                "in_channels", "out_channels", "kernel_size", "stride", "se_channels", "activation")}}
            curve = rows.setdefault(tuple(shape.values()), {**shape, "mid_channels": [], "ms": []})
            curve["mid_channels"].append(row["mid_channels"])
            curve["ms"].append(row["ms"])
    parts_of = {"cnas": ("stem", "stage_2", "head"), "dnas": ("stem", "stage_2", "decoder"),
                "dcnas": ("stem", "stage_2", "head", "decoder")}
    del old["parts"], old["rest_ms"]
    return {**old, "space": content["space"]["operations"], "min_width": content["space"]["min_width"],
            "reference": "dcnas-k3-e3", "operations": list(rows.values()), "fixed_ms": {
                model: {**{name: fixed[name] for name in names}, "rest": content["rest_ms"][model]}
                for model, names in parts_of.items()}}


@pytest.mark.parametrize("method", SPACES)
def test_tables_of_version_1_predict_as_before(method, tmp_path):
    space = SPACES[method]
    content = fake_table(4, num_classes=3) if method == "tfnas" else fake_parts(space)
    content["correction"] = 1.125
    files.write_json(tmp_path / "old.json", as_version_1(content))
    old, new, rng = latency.load_table(tmp_path / "old.json"), latency.Table(content), random.Random(0)
    for design in [space.random_design(rng) for _ in range(10)]:
        variants = [design]
        if method == "tfnas":
            papers = replace(design, decoder="conv", multiscale=False)
            variants = [papers.with_model(model) for model in models.MODELS]
        for variant in variants:
            assert old.predict_ms(variant) == pytest.approx(new.predict_ms(variant), rel=1e-9)
    assert old.space == new.space and old.scaled(2.0).content["version"] == latency.VERSION
    assert old.predict_ms(old.reference) == pytest.approx(new.predict_ms(old.reference), rel=1e-9)
    old.reference_network()
    if method == "tfnas":  # nothing is known of what came later
        with pytest.raises(ValueError, match="does not cover"):
            old.predict_ms(space.reference_design())
        supernet = tfnas.make_supernet(replace(space, num_classes=3))
        with pytest.raises(ValueError, match="has no decoder sharp, it is of an older version"):
            supernet.cost_range(old.costs, 0.0)


def row(content, **fields):
    """The first row of a table's parts with these fields."""
    return next(part for part in content["parts"] if fields.items() <= part.items())


@pytest.mark.parametrize("change", [
    lambda t: t.pop("setting"),
    lambda t: t["setting"].pop("threads"),
    lambda t: t["setting"].update(colour=1),
    lambda t: t.update(setting={}),
    lambda t: t.update(parts=5),
    lambda t: t.update(parts=[{}]),
    lambda t: t.update(parts=t["parts"][:3]),
    lambda t: t.update(rest_ms=[]),
    lambda t: t.update(rest_ms="1"),
    lambda t: t.update(rest_ms={}),
    lambda t: t["rest_ms"].pop("dcnas"),
    lambda t: t["rest_ms"].update(dcnas=float("nan")),
    lambda t: t.pop("rest_ms"),
    lambda t: t.pop("space"),
    lambda t: t.update(space=None),
    lambda t: t.update(space={"method": "os"}),
    lambda t: t["space"].update(min_width=float("inf")),
    lambda t: t["space"].update(operations=5),
    lambda t: t.update(correction=0),
    lambda t: t.update(reference={}),
    lambda t: t.update(version=3),
    lambda t: row(t, place="stem").update(ms=-1),
    lambda t: row(t, place="stage 5").update(ms="fast"),
    lambda t: row(t, place="stage 5").update(ms=None),
    lambda t: row(t, place="stage 5", mid_channels=104).update(ms=1e6),
    lambda t: row(t, place="stage 5", mid_channels=104).update(mid_channels=[104]),
])
def test_wrong_tables_are_refused_in_one_sentence(change):
    content = copy.deepcopy(fake_table(space=4))
    change(content)
    with pytest.raises(ValueError, match="table is not valid") as caught:
        latency.read_table(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ("tfnas", "hinas"))
def test_wrong_tables_of_version_1_are_refused_in_one_sentence(method):
    good = as_version_1(fake_table(4) if method == "tfnas" else fake_parts(SPACES[method]))
    for name in set(good) - {"made"}:
        without = {key: value for key, value in good.items() if key != name}
        for bad in (without, {**good, name: None}, {**good, name: {}}):
            with pytest.raises(ValueError, match="table is not valid") as caught:
                latency.read_table(bad)
            assert "\n" not in str(caught.value)


def test_a_file_that_is_no_table_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "t.json"
    for content, word in ((None, "cannot be read"), ({"format": "joint-arch", "version": 1}, "is not a"),
                          ({"format": "joint-latency", "version": 3}, "version 3")):
        if content:
            files.write_json(path, content)
        with pytest.raises(ValueError, match=word) as caught:
            latency.load_table(path)
        suggested = "NEW.json" if content else path  # never to write over what is there
        assert f"python latency.py --output {suggested}" in str(caught.value)


def args_of(sentence):
    """The arguments of the command that a sentence ends with."""
    return latency.build_parser().parse_args(str(sentence).split("python latency.py ")[1].split())


def test_a_table_of_another_setting_is_refused_with_the_command_that_makes_the_right_one():
    table = latency.Table(fake_table(space=4))
    for change in ({"device": "another CPU"}, {"size": 128}, {"batch": 7}, {"threads": 9},
                   {"dtype": "bfloat16"}):
        wanted = replace(table.setting, **change)
        with pytest.raises(ValueError) as caught:
            latency.require_setting(table, wanted, "t.json")
        assert next(iter(change)) in str(caught.value)
        args = args_of(caught.value)  # the printed command asks for just what is wanted
        names = ("size", "batch", "threads", "dtype", "mode")
        assert all(getattr(args, name) == getattr(wanted, name) for name in names)
        assert latency.space_of(args).identity() == table.space.identity()
    latency.require_setting(table, table.setting, "t.json")


@pytest.mark.parametrize("space", (
    tfnas.Space(6, 1.5, 7), superkernel.Space("skipinit", 12, 3),
    superkernel.Space("attention", 4, 3, 3, channels=1),
    hinas.Space(channels=1, base_width=6), hinas.Space("sr", 2, channels=3)), ids=str)
def test_the_command_for_a_table_names_its_space(space):
    setting = latency.this_setting("cpu", size=16, num_classes=0)
    args = args_of(latency.table_command(setting, space.table_flags()))
    assert latency.space_of(args).identity() == space.identity()


@pytest.mark.parametrize("flags, channels", (
    ("--method hinas", 1), ("--method hinas --network sr-x2", 3), ("--method hinas --no-grey", 3),
    ("--method superkernel", 3), ("--method superkernel --grey", 1)))
def test_a_table_is_of_the_channels_that_its_search_has_by_default(flags, channels):
    assert latency.space_of(args_of(f"python latency.py {flags}")).channels == channels


@pytest.mark.parametrize("record, flags", [
    (lambda: files.make_record("superkernel", superkernel.record_content(
        superkernel.Space("skipinit", 12, 3).random_design(random.Random(0))), {}),
     ["--method superkernel", "--network skipinit-1", "--width 12"]),
    (lambda: files.make_record("hinas", hinas.record_content(
        hinas.Space(channels=1, base_width=6).random_design(random.Random(0))), {}),
     ["--method hinas", "--network denoise", "--width 6", "--grey"]),
    (lambda: files.make_record(
        "tfnas", tfnas.Space(8, 1.1, 7).random_design(random.Random(0)).to_dict(), {}),
     ["--space 8", "--min-width 1", "--classes 7"]),
])
def test_a_record_of_another_space_is_refused_with_the_command_of_its_table(record, flags):
    content = fake_parts(SPACES["hinas"]) if flags[0] == "--space 8" else fake_table(4, num_classes=7)
    table = latency.Table(content)
    with pytest.raises(ValueError, match="does not cover the network; make one") as caught:
        table.read_record(record())
    assert all(flag in str(caught.value) for flag in flags)
    space, module = latency.space_of(args_of(caught.value)), registry.method_module(record()["method"])
    design = module.design_of(record())
    assert space.cost(design, dict.fromkeys(space.possible_parts(), 1.0), 0.0) > 0


def test_a_record_that_no_table_covers_is_refused_in_one_sentence():
    table = latency.Table(fake_table(4))
    decoder = replace(models.named_arch("dcnas-k3-e3", 10), decoder="mb")
    with pytest.raises(ValueError, match="No latency table covers"):
        table.predict_ms(decoder)
    with pytest.raises(ValueError, match="No latency table covers"):
        table.read_record(registry.named_record("unet-s", 10, {}))


# --- The command ------------------------------------------------------------------------------------------


def test_command_line_builds_prints_and_compares(tmp_path, capsys, monkeypatch, built):
    quick_compare(monkeypatch)
    table, arch = tmp_path / "t.json", tmp_path / "arch.json"
    monkeypatch.setattr(latency, "build_table", lambda setting, space, rounds, seed: {
        **built, "setting": asdict(setting), "space": space.identity(), "asked": [rounds, seed]})
    latency.main(["--output", str(table), "--size", "32", "--space", "4", "--rounds", "1", "--classes", "3"])
    assert f"{table}: " in capsys.readouterr().out
    assert json.loads(table.read_text()) == {**built, "asked": [1, 0]}
    latency.main(["--table", str(table)])
    shown = capsys.readouterr().out
    assert "all else" in shown and shown.count("\n") > len(built["parts"])
    files.write_json(arch, files.make_record("tfnas", models.named_arch("dcnas-k3-e3", 3).to_dict(), {}))
    latency.main(["--table", str(table), "--arch", str(arch), "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["predicted_ms"] > 0 and row["measured_ms"] > 0
    slow = {**row, "measured_ms": 16.0, "slowdown": 2.0, "cpu_share": 0.4}
    assert "16.000 ms now, 8.000 ms at the table's speed\nnote: the device" in latency.format_result(slow)
    latency.main(["--table", str(table), "--check", "2", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert len(result["networks"]) == 2 and result["reference"]["slowdown"] > 0
    assert "note: the device" in latency.format_result({**result, "reference": slow})
    row = result["networks"][0]
    assert abs(row["error_percent"]) < 100 and row["uncertainty_percent"] >= 0
    worst = max(abs(row["error_percent"]) for row in result["networks"])
    assert result["error_percent"]["worst_percent"] == worst and math.isfinite(worst)
    assert result["error_percent"]["within_5_percent"] == 100 * sum(
        abs(row["error_percent"]) <= 5 for row in result["networks"]) / len(result["networks"])


@pytest.mark.parametrize("argv, word", [
    (["--table", "missing.json"], "missing.json"),
    (["--check", "3"], "--table"),
    (["--size", "0"], "--size"),
    (["--batch", "many"], "--batch"),
    (["--min-width", "9"], "--min-width"),
    (["--device", "quantum"], "quantum"),
    (["--method", "os"], "--method"),
    (["--method", "hinas", "--network", "skipinit-1"], "one of: denoise"),
    (["--network", "denoise"], "no --network denoise"),
    (["--model", "no-such"], "no-such"),
    (["--write-networks", "folder"], "--mode onnx"),
    (["--read-times", "missing.json"], "missing.json cannot be read"),
])
def test_wrong_usage_ends_in_one_sentence(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        latency.main(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and word in error and "Traceback" not in error


def test_every_flag_has_a_help_with_its_default():
    for action in latency.build_parser()._actions:
        if action.dest != "help":
            assert "default:" in action.help and str(action.default) != "None" or "(default: " in action.help
            assert "default: None" not in action.help % {"default": action.default}


def test_latency_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(latency.__file__, tmp_path)
    (tmp_path / "use.py").write_text("""
import torch, latency
setting = latency.this_setting("cpu", size=8, num_classes=1, mode="folded")
network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
timing = latency.measure_network(network, setting, repeats=3, seconds=0)
print(timing.count, len(latency.fast(network)))
for argv in (["--help"], ["--table", "t.json"], []):
    try:
        latency.main(argv)
    except SystemExit as stop:
        print("exit", stop.code, flush=True)
""")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True,
                         env=environment)
    lines = run.stdout.splitlines()
    assert lines[0] == "3 1" and "--rounds" in run.stdout, run.stderr
    assert [line for line in lines if line.startswith("exit")] == ["exit 0", "exit 2", "exit 2"]
    assert run.stderr.count("needs the other files of the project") == 2 and "Traceback" not in run.stderr
