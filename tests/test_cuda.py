"""On a GPU: whole commands of every method, the numbers of the CPU, precisions, graphs, going on."""

import json
import math
import random
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import denoise
import elastic
import eval as evaluation
import files
import hinas
import latency
import models
import registry
import run
import search
import superkernel
import tfnas
import train
from fake_table import fake_parts, fake_table, fake_wide, quick_compare, quick_elastic, stopped_after

pytestmark = pytest.mark.cuda
ROOT = Path(train.__file__).parent
DIGITS = ["--data", "digits", "--size", "32", "--train-images", "32", "--batch-size", "8", "--epochs", "1",
          "--device", "cuda"]
TRAIN = [*DIGITS, "--val-images", "16"]
NAMED = ["--model", "dcnas-k3-e3-shallow", *TRAIN]
SMALL_CELLS = hinas.Space(layers=2, nodes=2, base_width=4, channels=3)
METHODS = {  # method -> a table of its space, flags of its search
    "tfnas": (lambda: fake_table(8), []),
    "elastic": (fake_wide, ["--strategy", "evolution"]),
    "superkernel": (lambda: fake_parts(superkernel.Space("skipinit", 4, 3), 32),
                    ["--model", "superkernel", "--width", "4"]),
    "hinas": (lambda: fake_parts(SMALL_CELLS, 32),
              ["--model", "hinas", "--width", "4", "--search-width", "2", "--no-grey"])}


@pytest.mark.parametrize("method", METHODS)
def test_a_search_a_training_and_an_evaluation(method, tmp_path, monkeypatch):
    quick_compare(monkeypatch)
    quick_elastic(monkeypatch)
    monkeypatch.setitem(hinas.PRESETS, "denoise", replace(hinas.PRESETS["denoise"], layers=2, nodes=2))
    make_table, flags = METHODS[method]
    path, found, trained = tmp_path / "table.json", tmp_path / "search", tmp_path / "train"
    content = make_table()
    setting = latency.this_setting("cuda", size=32, num_classes=content["setting"]["num_classes"])
    files.write_json(path, {**content, "setting": asdict(setting)})
    table, rng = latency.load_table(path), random.Random(0)
    middle = statistics.median(table.predict_ms(table.random_design(rng)) for _ in range(15))
    search.main([*flags, *DIGITS, "--target", f"{middle:.3f}", "--table", str(path), "--output-dir",
                 str(found)])
    record = files.load_record(found / "arch.json")
    assert record["method"] == method and record["latency"]["measured_ms"] > 0
    train.main(["--arch", str(found / "arch.json"), *TRAIN, "--output-dir", str(trained)])
    evaluation.main(["--checkpoint", str(trained / "best.pt"), "--device", "cuda", "--test-images", "8",
                     "--output-dir", str(trained / "eval")])
    means = json.loads((trained / "eval" / "metrics.json").read_text())["means"]
    assert math.isfinite(means["noisy_levels"]["psnr_db"])


@pytest.mark.parametrize("method", registry.METHODS)
def test_a_small_table_is_made(method, tmp_path, monkeypatch):
    quick_compare(monkeypatch)
    monkeypatch.setattr(latency.Plan, "how", lambda *_: {"rounds": 2, "seconds": 0.0})
    space = next(iter(latency.spaces_of(method, {"base_width": 4}).values()))
    setting = latency.this_setting("cuda", size=32, num_classes=getattr(space, "num_classes", 0), batch=4,
                                   mode="graph" if method == "elastic" else "eager")
    table = latency.Table(latency.build_table(setting, space, rounds=1))
    assert table.setting.device == torch.cuda.get_device_name() and table.reference_ms > 0


def gradients(network, device, output):
    """The gradients of the mean square of what `output(network)` returns, in double precision."""
    network = network.double().to(device)
    result = output(network)
    (result.image.square().mean() + result.logits.square().mean()).backward()
    return {name: weight.grad.cpu() for name, weight in network.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("method, recompute", [("tfnas", False), ("tfnas", True), ("elastic", False)])
def test_the_supernet_has_the_gradients_of_the_cpu(method, recompute):
    images = torch.rand(8, 3, 64, 64, dtype=torch.float64)  # with few, batch norms magnify rounding errors
    def make():
        torch.manual_seed(0)
        if method == "elastic":
            space = elastic.Space(3, scale=0.5)
            return elastic.SuperNet(space), lambda net, x: net(x, space.arch(space.uniform(1, 1, 1, 1)))
        supernet = tfnas.SuperNet(tfnas.Space(4, num_classes=3, searched="dcnas"), recompute).train()
        path = supernet.sample_path(torch.Generator().manual_seed(0))
        return supernet, lambda net, x: net(x, path)
    results = []
    for device in ("cpu", "cuda"):
        supernet, output = make()
        torch.manual_seed(1)
        results.append(gradients(supernet, device, lambda net: output(net, images.to(device))))
    assert results[0].keys() == results[1].keys() and len(results[0]) > 50
    for name, ours in results[1].items():
        error, size = (ours - results[0][name]).abs().max(), results[0][name].abs().max()
        assert error <= 1e-9 * size + 1e-12, (name, error, size)


@pytest.mark.parametrize("mode", ["folded", "compile", "graph"])
def test_fast_forms_compute_the_same(mode):
    network = models.Network(models.named_arch("dcnas-k3-e3-shallow", 6)).cuda().eval()
    images = torch.rand(4, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        fast = latency.fast(network, mode, images)
        for _ in range(3):
            images = torch.rand_like(images)
            for ours, theirs in zip(fast(images), network(images)):
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("amp", run.AMP_DTYPES)
def test_training_in_every_precision(amp, tmp_path):
    train.main([*NAMED, "--amp", amp, "--output-dir", str(tmp_path)])
    state = files.read_checkpoint(tmp_path / "last.pt")
    assert math.isfinite(state["rows"][0]["train_loss"]) and (tmp_path / "best.pt").is_file()


def test_a_stopped_training_goes_on(tmp_path, monkeypatch):
    how = [*NAMED, "--epochs", "2", "--amp", "off", "--output-dir"]
    train.main([*how, str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stopped_after(patch, 6)
        train.main([*how, str(tmp_path / "stopped")])
    train.main(["--resume", str(tmp_path / "stopped"), "--device", "cuda"])
    losses = [[row["train_loss"] for row in files.read_checkpoint(tmp_path / name / "last.pt")["rows"]]
              for name in ("whole", "stopped")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # sums on a GPU have no fixed order


def test_a_training_under_torchrun(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    done = subprocess.run([*words, "train.py", *NAMED, "--output-dir", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "best.pt").is_file()


def test_a_picture_in_tiles_is_that_of_the_cpu():
    network = models.Network(models.named_arch("dcnas-k3-e3-shallow", 6)).eval()
    picture = torch.rand(1, 3, 200, 330)
    here, there = (denoise.denoise_tiled(network.to(device), picture, device, core=64, margin=32).float()
                   for device in ("cpu", "cuda"))
    assert (here - there).abs().max() <= 2  # of 255
