"""benchmark.py: in its smallest form, every part runs and its numbers fit together."""

import json

import pytest
import torch

import benchmark
import files
import latency
import metrics
import models
import superkernel
import tfnas
from fake_table import fake_table, quick_compare


def test_benchmark_runs_and_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    # A real table takes a minute.
    monkeypatch.setattr(latency, "build_table",
                        lambda setting, space: fake_table(space.operations, setting.size))
    interleave = latency.interleave
    monkeypatch.setattr(latency, "interleave", lambda *args, **how: interleave(
        *args, **how | {"min_rounds": 2, "seconds": 0}))
    quick_compare(monkeypatch)
    path, arch = tmp_path / "b.json", models.named_arch("dcnas-k3-e3-shallow", 10)
    files.write_json(tmp_path / "arch.json", files.make_record("tfnas", arch.to_dict(), {}))
    benchmark.main(["--arch", str(tmp_path / "arch.json"), "--modes", "folded", "--size", "32",
                    "--batch-size", "4", "--space", "4", "--seconds", "1", "--networks", "2",
                    "--threads", "1", "--device", "cpu", "--output", str(path)])
    out, content = capsys.readouterr().out, json.loads(path.read_text())
    rows = {row["what"]: row for row in content["rows"]}
    for name in ("search: weight step", "search: alpha step", "search: images", "training: images, amp off"):
        assert rows[name]["plain"] > 0 and rows[name]["ours"] > 0 and name in out
    iteration = rows["search: iteration (weight + half an alpha step)"]
    assert iteration["ours"] == rows["search: weight step"]["ours"] + rows["search: alpha step"]["ours"] / 2
    assert rows["search: images"]["ours"] == pytest.approx(4e3 / iteration["ours"])
    memory = [rows[f"memory: alpha step, {size} px, --recompute"] for size in (32, 224)]
    assert all(row["plain"] > row["ours"] > 0 for row in memory)
    assert memory[0]["ours"] * 49 == pytest.approx(memory[1]["ours"], rel=0.05)  # in proportion to the pixels
    macs = models.count_macs(models.make_network(arch), 32)
    assert rows["rate: matrix product, folded"]["plain"] > 0
    assert rows["rate: matrix product, folded"]["ours"] == pytest.approx(
        2e-6 * macs / rows["inference: folded, batch 1"]["ours"])
    assert rows["prediction: median error of 2 networks"]["plain"] > 0
    assert rows["prediction: median error of 2 networks"]["table_seconds"] > 0
    assert content["format"] == "joint-benchmark" and "peak memory" in out


def test_each_part_of_a_network_runs_alone_through_onnxruntime():
    pytest.importorskip("onnxruntime")
    setting = latency.this_setting("cpu", size=32, num_classes=10, mode="onnx")
    with latency.prepared(models.make_network(models.named_arch("dcnas-k3-e3-shallow", 10)),
                          setting) as (traced, images), torch.no_grad():
        decoder, given = traced.network.decoder, []
        decoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
        image = traced.network(images).image
        found = benchmark.alone_in_onnxruntime(decoder, given[0], 1)()[0]
        torch.testing.assert_close(torch.from_numpy(found)[..., :32, :32], image, rtol=0, atol=1e-5)
        assert benchmark.naive_sum_ms(traced.network, [decoder], images, setting) > 0


@pytest.mark.parametrize("name", superkernel.PRESETS)
def test_a_superkernel_supernet_keeps_little_more_than_its_largest_network(name):
    """The paper's selling point."""
    space, images = superkernel.PRESETS[name], torch.empty(4, 3, 128, 128, device="meta")
    with torch.device("meta"):
        networks = space.network(space.largest_design()), superkernel.SuperNet(space)
    largest, ours = (benchmark.kept_gib(network, images) for network in networks)
    assert largest <= ours <= 1.3 * largest


def test_the_naive_sum_times_each_part_alone(monkeypatch):
    timed = []
    monkeypatch.setattr(latency, "measure",
                        lambda run, *_, **__: timed.append(run()) or latency.Timing(2.0, 2, 2, 1))
    network = models.Network(models.named_arch("dcnas-k3-e3", 3)).eval()
    parts = [part for _, part in tfnas.Space(num_classes=3).parts(network)]
    with torch.inference_mode():
        total = benchmark.naive_sum_ms(network, parts, torch.rand(1, 3, 32, 32),
                                       latency.this_setting("cpu", size=32, num_classes=3))
    assert len(timed) == 1 + 19 + 2 and total == 2.0 * len(timed)  # stem, blocks, decoder and head


def test_both_ways_of_ssim_agree():
    image, reference = torch.rand(2, 3, 24, 31), torch.rand(2, 3, 24, 31)
    torch.testing.assert_close(benchmark.plain_ssim(image, reference), metrics.ssim(image, reference))


def test_wrong_usage_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--device", "nonsense"])
    assert stopped.value.code == 2 and "cannot be used here" in capsys.readouterr().err


def test_the_report_of_a_gpu_goes_on_past_what_fails_or_hangs(tmp_path, monkeypatch):
    report = benchmark.Report(tmp_path, "cpu")
    assert report.command("good", "-c", "print('here')", seconds=60)
    assert not report.command("bad", "-c", "raise SystemExit(3)", seconds=60)
    assert not report.command("endless", "-c", "import time; time.sleep(99)", seconds=10)
    monkeypatch.setattr(benchmark, "REPORT_MINUTES", 0.0)
    assert not report.command("late", "-c", "print('here')", seconds=60)
    assert (tmp_path / "good.log").read_text() == "here\n" and not (tmp_path / "late.log").exists()
    report.values |= {"search: target missed by %": 1.0, "inference: graph, batch 32, ratio": 1.4}
    report.rows.append(benchmark.make_row("some step", "ms", 3.0, 2.0))
    report.write()
    text, content = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert [step["result"] for step in content["steps"]] == ["ok", "failed", "stopped after 10 s",
                                                             "left out: no time"]
    for line in ("| search: target missed by % | at most 3 | 1.00 | yes |",
                 "| inference: graph, batch 32, ratio | at least 1.5 | 1.40 | no |",
                 "| latency table, graph: median error % | at most 2 | - | no |",
                 "| some step, ms | 3.00 | 2.00 | 1.50 |"):
        assert line in text


@pytest.mark.parametrize("flags", (["--gpu-report"], ["--parts", "peak"], ["--parts", "streams"]))
def test_what_needs_a_gpu_says_so(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*flags, "--device", "cpu"])
    assert stopped.value.code == 2 and "needs a CUDA device" in capsys.readouterr().err
