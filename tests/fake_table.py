"""Latency tables with made-up times, for tests that must not depend on the machine, and quick real ones."""

import random
from dataclasses import asdict

import latency
import models
import registry
import run
import timing


def block_of(part):
    """The block that a tfnas.Part of a stage stands for."""
    return models.Block(int(part.place.split()[1]), *part[1:])


def fake_table(space=4, size=32, num_classes=10, cost=None, min_width=models.MIN_WIDTH):
    """The content of a table of the joint space; cost(block) gives a block's ms (default: by its work)."""
    import tfnas

    def default_cost(block):
        weights = block.mid_channels * (block.in_channels + block.out_channels + block.kernel_size**2)
        return 1e-3 + 1e-6 * weights

    joint, cost = tfnas.Space(space, min_width, num_classes), cost or default_cost
    fixed = {"stem": 0.1, "multiscale stem": 0.1, "stage 2": 0.2, "head": 0.3, "decoder": 0.9,
             "decoder sharp": 0.9}
    times = {part: fixed[part.place] if part.place in fixed else cost(block_of(part))
             for part in sorted(joint.possible_parts())}
    rest_ms = {"cnas": 0.05, "dnas": 0.05, "dcnas": 0.05}
    return content_of(joint, times, rest_ms, joint.reference_design(), size)


def fake_parts(space, size=16):
    """The content of a table in which every million multiply-accumulates takes a millisecond."""
    costs, rest = latency.part_macs(space, size)
    times = {part: max(ms, 1e-6) for part, ms in costs.items()}
    return content_of(space, times, {"network": rest}, space.random_design(random.Random(0)), size)


def fake_wide(num_classes=10, size=32, dear=""):
    """The content of a table of the wide space, in which units whose names have `dear` in them cost 10,000
    times as much as the others."""
    import elastic

    space, rest_ms = elastic.Space(num_classes), {"cnas": 0.05, "dnas": 0.05, "dcnas": 0.05}
    times = {part: 200.0 if dear and dear in " ".join(part) else 0.02
             for part in sorted(space.possible_parts())}
    return content_of(space, times, rest_ms, space.reference_design(), size)


def quick_elastic(monkeypatch):
    """Let a search of the wide space compare few networks."""
    import elastic
    for name, value in {"ROUNDS": 2, "CHILDREN": 3, "DRAWN": 4, "PLAIN": 2, "SPREAD": 3,
                        "TRIES": 50}.items():
        monkeypatch.setattr(elastic, name, value)


def content_of(space, times, rest_ms, reference, size):
    """The content of a table of a space with these times of its parts."""
    module = registry.method_module(space.identity()["method"])
    setting = latency.this_setting("cpu", size=size, num_classes=getattr(space, "num_classes", 0))
    return {"format": latency.FORMAT, "version": latency.VERSION, "made": {"torch": "none", "date": "never"},
            "setting": asdict(setting), "space": space.identity(),
            "reference": module.record_content(reference), "reference_ms": 1.0, "correction": 1.0,
            "rest_ms": rest_ms, "parts": [{**part._asdict(), "ms": ms} for part, ms in times.items()]}


def quick_compare(monkeypatch):
    """Let every comparison of predicted and measured latencies, and what warms a device, take few runs."""
    interleave, measure = timing.interleave, latency.measure
    monkeypatch.setattr(timing, "PATIENCE_S", 0.0)
    monkeypatch.setattr(latency, "measure", lambda *args, **how: measure(*args, **how | {"seconds": 0.0}))
    monkeypatch.setattr(timing, "interleave", lambda bursts, **how: interleave(
        bursts, **how | {"min_rounds": min(5, how.get("min_rounds", 5)), "seconds": 0.0}))


def stopped_after(monkeypatch, steps):
    """Let a run be asked to stop at the end of a step, as by a signal."""
    real, seen = run.Guard.end_of_step, []

    def end_of_step(self, save):
        seen.append(1)
        self.stop = len(seen) == steps
        real(self, save)

    monkeypatch.setattr(run.Guard, "end_of_step", end_of_step)
