"""Two gloo processes: the same gradients, alpha and metrics as one process that sees all images.

As a script, under torchrun, this file is one of the processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import models
import search
import train

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
STEPS = 20


def make_searcher():
    torch.manual_seed(0)
    supernet = models.SuperNet("cnas", 4, 10, depth="learned").double()
    return search.Searcher(supernet, device=CPU, lr=1e-3, arch_lr=1e-3, loss="cls", seed=3)


def make_batch(step):
    """A batch of 8; the first half is the first process's."""
    generator = torch.Generator().manual_seed(step)
    clean = torch.rand(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    return clean + 0.3 * torch.randn(clean.shape, generator=generator, dtype=torch.float64), clean, torch.arange(8) % 10


def half(batch, rank):
    return tuple(part[4 * rank:4 * rank + 4] for part in batch)


def steps_of(searcher, take):
    """Twenty weight steps, and an alpha step after every second one: take(method, batch, *arguments)."""
    for step in range(STEPS):
        take(searcher.weight_step, make_batch(step), True)
        if step % 2:
            take(searcher.arch_step, make_batch(1000 + step), 5.0, lambda: searcher.supernet.alpha.square().sum() * 0.01)


def process(folder):
    """One of the processes: its half of every batch."""
    torch.set_num_threads(1)
    data.join_processes("cpu")
    rank, world = data.rank_and_world()
    assert world == 2
    searcher = make_searcher()
    steps_of(searcher, lambda method, batch, *arguments: method(half(batch, rank), *arguments))
    torch.save({"supernet": searcher.supernet.state_dict()}, Path(folder) / f"{rank}.pt")


def torchrun(*command, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                          *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=600, env=environment)
    return run


def test_two_processes_equal_one_that_averages_two_half_batches(tmp_path):
    run = torchrun(Path(__file__), tmp_path, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)["supernet"] for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())  # alpha, beta and weights, to the last bit

    searcher, waiting = make_searcher(), []
    real, searcher._step = searcher._step, lambda *arguments: waiting.append(
        ([None if p.grad is None else p.grad.clone() for p in arguments[2]], arguments)) or {}

    def one_after_the_other(method, batch, *arguments):
        state = searcher.generator.get_state()
        for rank in (0, 1):
            searcher.generator.set_state(state)  # the same path for both halves
            method(half(batch, rank), *arguments)
        (gradients, call), (others, _) = waiting
        for parameter, gradient, other in zip(call[2], gradients, others):
            parameter.grad = None if gradient is None else (gradient + other) / 2
        real(*call)
        searcher.supernet.normalize_()
        waiting.clear()

    steps_of(searcher, one_after_the_other)
    for name, value in searcher.supernet.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)


def test_processes_leave_before_python_ends(tmp_path):
    """With the group still there, one exit in seven aborted in gloo's threads ("terminate called", signal 6)."""
    script = ("import atexit, sys; sys.path.insert(0, sys.argv[1]); import data; from torch import distributed\n"
              "atexit.register(lambda: print('left:', not distributed.is_initialized(), flush=True))\n"  # runs last
              "data.join_processes('cpu'); assert distributed.is_initialized()\n"
              "sys.exit(3)\n")
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    run = subprocess.run([sys.executable, "-c", script, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                         env=environment)
    assert (run.returncode, run.stdout) == (3, "left: True\n"), run.stderr


SMALL = ["--size", "32", "--train-images", "96", "--val-images", "21", "--epochs", "2", "--batch-size", "16", "--device", "cpu"]


def test_training_and_evaluation_by_two_processes(tmp_path):
    run = torchrun(ROOT / "train.py", "--model", "dcnas-k3-e3", *SMALL, "--output-dir", "run", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "2 processes of 8 images, 16 a step" in run.stdout and run.stdout.count("best epoch") == 1
    state = models.read_checkpoint(tmp_path / "run/last.pt")
    assert len(state["rows"]) == 2
    flags = ["--checkpoint", "run/best.pt", "--val-images", "21", "--sigmas", "0", "0.3", "--no-latency", "--device", "cpu"]
    run = torchrun(ROOT / "eval.py", *flags, "--output-dir", "two", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    one = subprocess.run([sys.executable, str(ROOT / "eval.py"), *flags, "--output-dir", "one"], cwd=tmp_path,
                         capture_output=True, text=True, timeout=600)
    assert one.returncode == 0, one.stderr
    two, one = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    assert two["images"] == one["images"] == 21
    assert two["levels"] == one["levels"] and two["means"] == one["means"]  # every digit


def test_two_processes_that_are_stopped_go_on_with_the_same_weights(tmp_path):
    command = [ROOT / "train.py", "--model", "cnas-k3-e3", "--size", "16", "--train-images", "160", "--val-images", "10", "--epochs",
               "2", "--batch-size", "8", "--device", "cpu", "--save-minutes", "0", "--output-dir"]  # a checkpoint after every step
    assert torchrun(*command, "whole", folder=tmp_path).returncode == 0
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                                *map(str, command), "part"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 100
    while not (tmp_path / "part/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    stopped = models.read_checkpoint(tmp_path / "part/last.pt")
    assert process.returncode != 0 and "Go on with: python train.py --resume part" in error
    assert 0 < stopped["step"] <= 20 and len(stopped["rows"]) < 2
    run = torchrun(*command, "part", "--resume", "part", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    whole, part = (models.read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "part"))
    assert all(torch.equal(value, part["network"][name]) for name, value in whole["network"].items())
    for one, other in zip(whole["rows"], part["rows"], strict=True):
        assert abs(one["train_loss"] - other["train_loss"]) < 1e-6 and one["val_loss"] == other["val_loss"]


def test_a_search_of_denoisers_by_two_processes(tmp_path):
    """In a fresh folder, with batch norms: it ends, and going on from its middle gives the same supernet."""
    command = [ROOT / "search.py", "--model", "hinas", "--search-width", "2", "--width", "3", "--size", "16", "--train-images", "32",
               "--val-images", "3", "--epochs", "2", "--batch-size", "4", "--warmup-epochs", "0", "--device", "cpu", "--threads", "1"]
    run = torchrun(*command, "--output-dir", "new", folder=tmp_path)
    assert run.returncode == 0 and run.stdout.count("found in") == 1, run.stderr
    assert models.load_record(tmp_path / "new/arch.json")["method"] == "hinas"


def test_validation_in_training_counts_every_image_once():
    """What the processes add up is what one sums alone: of 21 images 11 and 10."""
    digits = data.load_data("digits", size=32, train_images=4, val_images=21)
    torch.manual_seed(0)
    network = models.Network(models.named_arch("dcnas-k3-e3", 10))
    parts = []
    real = train.data_module.rank_and_world, train.sum_over_processes
    try:
        train.sum_over_processes = lambda values: parts.append(values) or values
        for rank in (0, 1):
            data.rank_and_world = lambda rank=rank: (rank, 2)
            train.validate(network, data.make_loader(digits.val, 4), loss="both", device=CPU, noise=data.Noise(1.0))
    finally:
        data.rank_and_world, train.sum_over_processes = real
    whole = train.validate(network, data.make_loader(digits.val, 4), loss="both", device=CPU, noise=data.Noise(1.0))
    loss, hits, psnr, count, labels = (a + b for a, b in zip(*parts))
    assert count == labels == 21
    for total, name in ((loss, "loss"), (hits, "accuracy"), (psnr, "psnr_db")):
        assert abs(total / 21 - whole[name]) < 1e-6 * max(1, abs(whole[name]))


def test_each_process_has_its_share_in_the_same_order(monkeypatch):
    digits = data.load_data("digits", size=16, train_images=23, val_images=1)
    whole = list(iter(data.make_loader(digits.train, 4, shuffle=True, seed=1, drop_last=True).sampler))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(data, "rank_and_world", lambda rank=rank: (rank, 2))
        shares.append(list(iter(data.make_loader(digits.train, 2, shuffle=True, seed=1, drop_last=True).sampler)))
        assert sorted(data.make_loader(digits.train, 4).sampler) == list(range(rank, 23, 2))  # evaluation: none twice, none left
    assert len(shares[0]) == len(shares[1]) == 11
    assert [index for pair in zip(*shares) for index in pair] == whole[:22]


if __name__ == "__main__":
    process(sys.argv[1])
