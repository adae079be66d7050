"""Two gloo processes: the same gradients, alpha and metrics as one process that sees all images.

As a script this file is one of the processes.
"""

import atexit
import importlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import eval as evaluation
import files
import latency
import models
import run
import tfnas
import train

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
STEPS = 6


def two_processes(*command, folder):
    """Run a command by two processes that meet each other, as torchrun starts them; what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "WORLD_SIZE": "2"}
    processes = [subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, text=True,
                                  env={**common, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE) for rank in "01"]
    results = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    return [types.SimpleNamespace(stdout=out, stderr=err, returncode=code) for out, err, code in results]


def torchrun(*command, folder):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen([*words, *map(str, command)], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


# --- gradients ---------------------------------------------------------------------------------------------


def make_schedule():
    """Of a supernet in double precision, with a target that its likeliest network exceeds."""
    torch.manual_seed(0)
    space = tfnas.Space(4, models.MIN_WIDTH, 10, "cnas", "cnas", "learned")
    parts, rest = latency.part_macs(space, 32)
    costs = types.SimpleNamespace(parts=parts, rest=rest, target=1.0)
    return tfnas.Schedule(tfnas.make_supernet(space).double(), costs, steps=STEPS, device=CPU,
                          within_reach=True, lr=1e-3, arch_lr=1e-3, seed=3)


def make_batch(step):
    """A batch of 8 (norms of fewer images amplify the last digit); the first half is the first process's."""
    generator = torch.Generator().manual_seed(step)
    clean = torch.rand(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return clean + 0.3 * noise, clean, torch.arange(8) % 10


def half(batch, rank):
    if isinstance(batch, list):
        return [half(one, rank) for one in batch]
    return tuple(part[4 * rank:4 * rank + 4] for part in batch)


def take_steps(schedule, take):
    """Weight steps, and an alpha step after every second one: take(method, batch, *arguments)."""
    for step in range(STEPS):
        take(schedule.weight_step, make_batch(step), True)
        if step % 2:
            take(schedule.arch_step, [make_batch(1000 + step)], 5.0)


def take_half_batches(folder):
    """As one of the processes: its half of every batch."""
    atexit.register(lambda: print("left:", not torch.distributed.is_initialized(), flush=True))  # runs last
    torch.set_num_threads(1)
    run.join_processes("cpu")
    rank, world = run.rank_and_world()
    assert world == 2
    schedule = make_schedule()
    take_steps(schedule, lambda method, batch, *arguments: method(half(batch, rank), *arguments))
    torch.save(schedule.supernet.state_dict(), Path(folder) / f"{rank}.pt")
    run.say(f"of the first process: {run.from_first(lambda: rank)}")
    sys.exit(3)


def test_two_processes_equal_one_that_averages_two_half_batches(tmp_path, monkeypatch):
    """And they leave before Python ends: with the group still there, one exit in seven aborted in gloo's
    threads ("terminate called", signal 6)."""
    first, second = two_processes(Path(__file__), "gradients", tmp_path, folder=tmp_path)
    assert (first.returncode, first.stdout) == (3, "of the first process: 0\nleft: True\n"), first.stderr
    assert (second.returncode, second.stdout) == (3, "left: True\n"), second.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())  # every bit

    schedule, waiting, real = make_schedule(), [], run.take_step
    before = {name: value.clone() for name, value in schedule.supernet.state_dict().items()}

    def wait(loss, parameters, *others):
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        waiting.append((gradients, (loss, parameters, *others)))
        return False

    def one_after_the_other(method, batch, *arguments):
        state = schedule.generator.get_state()
        monkeypatch.setattr(run, "take_step", wait)
        for rank in (0, 1):
            schedule.generator.set_state(state)  # the same path for both halves
            method(half(batch, rank), *arguments)
        (gradients, call), (others, _) = waiting
        for parameter, gradient, other in zip(call[1], gradients, others):
            parameter.grad = None if gradient is None else (gradient + other) / 2
        real(*call)
        schedule.supernet.normalize_()
        waiting.clear()

    take_steps(schedule, one_after_the_other)
    for name, value in schedule.supernet.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before["alpha"], first["alpha"])


# --- the commands ------------------------------------------------------------------------------------------


TRAIN = ("--model dcnas-k3-e3 --widen 0.25 --size 16 --train-images 96 --val-images 21 --epochs 2 "
         "--batch-size 8 --device cpu --output-dir")
EVAL = "--checkpoint whole/best.pt --test-images 21 --sigmas 0 0.3 --no-latency --device cpu --output-dir"
SEARCH = ("--model hinas --search-width 2 --width 3 --size 16 --train-images 16 --val-images 2 --epochs 2 "
          "--batch-size 4 --warmup-epochs 0 --device cpu --threads 1 --output-dir new")


def run_commands(commands):
    """As one of the processes: commands one after the other; to start Python takes longer than they do."""
    for text in commands:
        name, *words = shlex.split(text)
        print(f"@{name}", flush=True)
        importlib.import_module(name).main(words)
        torch.distributed.barrier()  # the first one has written what the next command reads


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A training that torchrun is told to stop, and goes on; one without a stop; an evaluation; a search.

    Returns the folder, what each of the two processes printed in each command, and the processes' results.
    """
    folder = tmp_path_factory.mktemp("two")
    process = torchrun(ROOT / "train.py", *TRAIN.split(), "part", "--save-minutes", "0", folder=folder)
    deadline = time.monotonic() + 100
    while not (folder / "part/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    stopped = files.read_checkpoint(folder / "part/last.pt")
    assert process.returncode != 0 and "Go on with: python train.py --resume part" in error
    assert 0 < stopped["step"] <= 12 and len(stopped["rows"]) < 2
    both = two_processes(Path(__file__), "commands", "train --resume part", f"train {TRAIN} whole",
                         f"eval {EVAL} two", f"search {SEARCH}", folder=folder)
    return folder, [each.stdout.split("@")[1:] for each in both], both


def test_a_training_that_is_stopped_ends_with_the_same_weights(ran):
    folder, ((_, output, *_), (resumed, whole, *_)), _ = ran
    assert output.count("2 processes of 4 images, 8 a step") == output.count("best epoch") == 1
    assert resumed == whole == "train\n"  # the second process prints nothing
    whole, part = (files.read_checkpoint(folder / name / "last.pt") for name in ("whole", "part"))
    assert all(torch.equal(value, part["network"][name]) for name, value in whole["network"].items())
    for one, other in zip(whole["rows"], part["rows"], strict=True):
        assert abs(one["train_loss"] - other["train_loss"]) < 1e-6 and one["val_loss"] == other["val_loss"]


def test_an_evaluation_gives_every_digit_of_one_by_a_single_process(ran, monkeypatch):
    folder, _, both = ran
    monkeypatch.chdir(folder)
    evaluation.main([*EVAL.split(), "one"])
    two, one = (json.loads((folder / name / "metrics.json").read_text()) for name in ("two", "one"))
    assert two["images"] == one["images"] == 21, both[0].stderr
    assert two["levels"] == one["levels"] and two["means"] == one["means"]


def test_a_search_of_denoisers_ends(ran):
    """In a fresh folder, with batch norms."""
    folder, (first, second), both = ran
    assert both[0].returncode == both[1].returncode == 0, both[0].stderr
    assert first[3].count("found in") == 1 and second[3] == "search\n"
    assert files.load_record(folder / "new/arch.json")["method"] == "hinas"


def test_validation_in_training_counts_every_image_once(monkeypatch):
    """What the processes add up is what one sums alone: of 21 images 11 and 10."""
    digits = data.load_data("digits", size=32, train_images=4, val_images=21, test_images=1)
    network = models.Network(models.named_arch("dcnas-k3-e3", 10))
    how = dict(loss="both", device=CPU, noise=data.Noise(1.0))
    whole, parts = train.validate(network, data.make_loader(digits.val, 4), **how), []
    monkeypatch.setattr(run, "sum_over_processes", lambda values: parts.append(values) or values)
    for rank in (0, 1):
        monkeypatch.setattr(run, "rank_and_world", lambda rank=rank: (rank, 2))
        train.validate(network, data.make_loader(digits.val, 4, rank=rank, world=2), **how)
    loss, count, hits, labels, psnr, images = (a + b for a, b in zip(*parts))
    assert count == labels == images == 21
    for total, name in ((loss, "loss"), (hits, "accuracy"), (psnr, "psnr_db")):
        assert abs(total / 21 - whole[name]) < 1e-6 * max(1, abs(whole[name]))


def test_each_process_has_its_share_in_the_same_order():
    digits = data.load_data("digits", size=16, train_images=23, val_images=1, test_images=1)

    def order(batch_size, training, **how):
        return list(data.make_loader(digits.train, batch_size, shuffle=training, seed=1, drop_last=training,
                                     **how).sampler)

    whole, shares = order(4, True), []
    for rank in (0, 1):
        shares.append(order(2, True, rank=rank, world=2))
        assert sorted(order(4, False, rank=rank, world=2)) == list(range(rank, 23, 2))  # each image once
    assert len(shares[0]) == len(shares[1]) == 11
    assert [index for pair in zip(*shares) for index in pair] == whole[:22]


if __name__ == "__main__":
    take_half_batches(sys.argv[2]) if sys.argv[1] == "gradients" else run_commands(sys.argv[2:])
