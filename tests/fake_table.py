"""A latency table with made-up times, for tests that must not depend on the machine, and a quick way to make a real one."""

import random
from dataclasses import asdict

import latency
import models


def fake_table(space=4, size=32, num_classes=10, cost=None, min_width=models.MIN_WIDTH):
    """The content of a table; cost(block) gives a block's ms (default: proportional to its multiply-accumulates)."""
    def default_cost(block):
        return 1e-3 + 1e-6 * block.mid_channels * (block.in_channels + block.out_channels + block.kernel_size**2)

    cost = cost or default_cost
    rows = {}
    for shape in dict.fromkeys(models.searched_positions("dcnas")):
        for block in latency._width_grid(shape, models.SPACES[space], min_width):
            row = rows.setdefault(latency._key(block), {**dict(zip(latency.KEY_FIELDS, latency._key(block))),
                                                        "mid_channels": [], "ms": []})
            row["mid_channels"].append(block.mid_channels)
            row["ms"].append(cost(block))
    fixed = {"stem": 0.1, "stage_2": 0.2, "rest": 0.05}
    return {"format": latency.FORMAT, "version": latency.VERSION, "made": {"torch": "none", "date": "never"},
            "setting": asdict(latency.this_setting("cpu", size=size, num_classes=num_classes)), "space": space,
            "min_width": min_width, "reference": latency.REFERENCE, "reference_ms": 1.0, "correction": 1.0,
            "fixed_ms": {"cnas": {**fixed, "head": 0.3}, "dnas": {**fixed, "decoder": 0.9},
                         "dcnas": {**fixed, "head": 0.3, "decoder": 0.9}},
            "operations": list(rows.values())}


def fake_parts(space, size=16):
    """A table in which every million multiply-accumulates takes a millisecond."""
    costs, rest = latency.part_macs(space, size)
    return {"format": latency.PARTS_FORMAT, "version": latency.VERSION, "made": {"torch": "none", "date": "never"},
            "setting": vars(latency.this_setting("cpu", size=size, num_classes=0)), "space": space.identity(),
            "reference": space.random_design(random.Random(0)).to_dict(), "reference_ms": 1.0, "correction": 1.0, "rest_ms": rest,
            "parts": [{**part._asdict(), "ms": max(ms, 1e-6)} for part, ms in costs.items()]}


def quick_compare(monkeypatch):
    """Let every comparison of predicted and measured latencies take the fewest runs there are."""
    real = latency.compare
    monkeypatch.setattr(latency, "compare", lambda *args, seconds=0.0: real(*args, seconds=0.0))
