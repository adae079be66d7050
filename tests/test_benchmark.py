"""benchmark.py: in its smallest form, every part runs and its numbers fit together."""

import json

import pytest
import torch

import benchmark
import eval as evaluation
import latency
import models
import superkernel
from fake_table import quick_compare


def test_benchmark_runs_and_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    real = latency.build_table
    monkeypatch.setattr(latency, "build_table", lambda *args, **kwargs: real(*args, **kwargs, rounds=1))
    quick_compare(monkeypatch)
    path = tmp_path / "b.json"
    benchmark.main(["--size", "32", "--batch-size", "4", "--space", "4", "--seconds", "1", "--networks", "2", "--threads", "1",
                    "--output", str(path)])
    out = capsys.readouterr().out
    content = json.loads(path.read_text())
    rows = {row["what"]: row for row in content["rows"]}
    for name in ("search: weight step", "search: alpha step", "search: images", "training: images"):
        assert rows[name]["plain"] > 0 and rows[name]["ours"] > 0 and name in out
    iteration = rows["search: iteration (weight + half an alpha step)"]
    assert iteration["ours"] == rows["search: weight step"]["ours"] + rows["search: alpha step"]["ours"] / 2
    assert rows["search: images"]["ours"] == pytest.approx(4e3 / iteration["ours"])
    memory = [rows[f"memory: alpha step, {size} px{how}"] for size in (32, 224) for how in ("", ", --recompute")]
    assert all(row["plain"] > row["ours"] > 0 for row in memory)
    assert memory[0]["ours"] * 49 == pytest.approx(memory[2]["ours"], rel=0.05)  # in proportion to the pixels
    for name in superkernel.PRESETS:  # the paper's selling point: a supernet for the memory of its largest network
        row = rows[f"memory: superkernel {name}, beside its largest network"]
        assert row["plain"] <= row["ours"] <= 1.3 * row["plain"]
    assert rows["memory: hinas denoise, cells shared"]["ratio"] > 1.5 and rows["hinas: training step, cells shared"]["ours"] > 0
    saving = content["saving"]
    assert 0 < saving["percent_of_epoch"] == pytest.approx(saving["seconds"] * rows["training: images"]["ours"] / 40)
    assert "checkpoints and log" in out
    assert content["format"] == "joint-benchmark" and content["table"]["table_seconds"] > 0 and "peak memory" in out


def test_the_naive_sum_times_each_part_alone(monkeypatch):
    timed = []
    monkeypatch.setattr(latency, "measure", lambda run, *_, **__: timed.append(run()) or latency.Timing(2.0, 2, 2, 1))
    network = models.Network(models.named_arch("dcnas-k3-e3", 3)).eval()
    with torch.inference_mode():
        total = benchmark.naive_sum_ms(network, torch.rand(1, 3, 32, 32), torch.device("cpu"))
    assert len(timed) == 1 + 19 + 2 and total == 2.0 * len(timed)  # stem, blocks, decoder and head


def test_both_ways_of_ssim_agree():
    torch.manual_seed(0)
    image, reference = torch.rand(2, 3, 24, 31), torch.rand(2, 3, 24, 31)
    torch.testing.assert_close(benchmark.plain_ssim(image, reference), evaluation.ssim(image, reference))
