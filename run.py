"""The life of a run: processes and device, messages and forecasts, steps, flags, folders, stopping, going on.

What search.py, train.py and eval.py share. Every optimizer's step goes through `take_step` and its `Guard`.
"""

from __future__ import annotations

import argparse
import atexit
import datetime
import errno
import itertools
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

import files
from data import number, whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AMP_DTYPES = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESUME_ME = 75  # exit code of a run that was asked to stop and can go on: EX_TEMPFAIL, "try again"
OF_THIS_CALL = {"resume", "output_dir", "accept_changes"}  # flags that a checkpoint does not keep
FREE_FLAGS = OF_THIS_CALL | {"device", "threads", "workers", "data_root", "table", "nonfinite",
                             "save_minutes"}  # a resumed run may change these
OF_USAGE = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP)
SIGMAS = ("sigma", "sigma_levels", "sigmas")  # flags of one choice
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


# --- Processes and devices ---------------------------------------------------------------------------------

def run_script(line: list[str]) -> int:
    """The exit code of a command. Ctrl-C and SIGTERM reach it too; it saves before this goes on."""
    process = subprocess.Popen(line)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()  # a terminal's Ctrl-C has reached it, another signal to this process has not
        process.wait()
        raise


def run_command(script: str, *flags: str, device: str | None = None, threads: int | None = None) -> None:
    """Run a script of this project; OSError names the command where it fails."""
    line = [*flags, *(["--device", device] if device else [])]
    if threads and script != "latency.py":  # a table has one thread on a CPU
        line += ["--threads", str(threads)]
    text = shlex.join(["python", script, *line])
    print(f"$ {text}", flush=True)
    if run_script([sys.executable, str(Path(__file__).resolve().parent / script), *line]):
        raise OSError("This command failed; mend what it says and start again, what was done is kept: "
                      f"{text}")


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are: (0, 1) without torchrun."""
    running = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if running else (0, 1)


def join_processes(device: str) -> str:
    """Join the processes of torchrun, if there are any; the device of this one (NCCL on CUDA, else gloo)."""
    if "LOCAL_RANK" not in os.environ or "MASTER_ADDR" not in os.environ or distributed.is_initialized():
        return device
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # Long, since the others wait while the first one times a device.
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    if not cuda:  # gloo's threads abort when Python ends before them; NCCL would wait for failed processes
        atexit.register(distributed.destroy_process_group)
    return device


def from_first(make):
    """make() of the first process, on all of them."""
    rank, world = rank_and_world()
    result = [make() if rank == 0 else None]
    if world > 1:
        distributed.broadcast_object_list(result)
    return result[0]


def in_turn(make):
    """make() of every process; the first one ends before the others begin: it downloads what they read."""
    rank, world = rank_and_world()
    try:
        result = make() if rank == 0 else None
    finally:
        if world > 1:
            distributed.barrier()
    return result if rank == 0 else make()


def sum_over_processes(values: list[float]) -> list[float]:
    """Each value's sum over all processes."""
    if rank_and_world()[1] == 1:
        return values
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.tolist()


def split_batch_size(batch_size: int) -> int:
    """One process's part of a batch; ValueError in one sentence where the batch cannot be split."""
    world = rank_and_world()[1]
    part, rest = divmod(batch_size, world)
    if rest or part < 2:
        raise ValueError(f"--batch-size {batch_size} is that of all {world} processes together; it must be a "
                         f"multiple of {world}, of 2 images each or more.")
    if world > 1:
        say(f"{world} processes of {part} images, {batch_size} a step; the learning rate is for {batch_size}")
    return part


def default_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> str:
    """The device's name if torch can use it; ValueError in one sentence if not."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda can be timed")
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # "cuda" means this one from here on
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"The device {name!r} cannot be used here ({reason}); use --device cpu.") from None
    return name


def prepare_device(device: str, threads: int | None, seed: int) -> torch.device:
    """Set torch's threads and seed, join the processes of torchrun; the device of this one."""
    if threads:
        torch.set_num_threads(threads)
    result = torch.device(check_device(join_processes(device)))
    torch.manual_seed(seed)
    return result


def choose_amp(device: torch.device, amp: str | None) -> str:
    """The mixed precision asked for, a name of AMP_DTYPES; None: bfloat16 on CUDA, off on a CPU."""
    return amp or ("bfloat16" if device.type == "cuda" else "off")


def autocast(device: torch.device, amp: str):
    """The context in which a network computes: mixed precision, or none."""
    return torch.autocast(device.type, AMP_DTYPES[amp]) if amp != "off" else nullcontext()


# --- What the user is told ---------------------------------------------------------------------------------

class Command:
    """The frame of a script: with Command(parser) as command. What ends it early is said in one sentence.

    Exit codes: 2 for wrong usage or files (ValueError), 1 for what failed, RESUME_ME for a run that was
    stopped and can go on from its `checkpoint` in `folder`, 130 where there is none. SIGTERM and SIGHUP end
    it as Ctrl-C does; a closed stdout does not.
    """

    def __init__(self, parser: argparse.ArgumentParser, checkpoint: str | None = None,
                 stopped: str = "nothing was written"):
        self.parser, self.checkpoint, self.stopped = parser, checkpoint, stopped
        self.folder, self.started, self.resumed = ".", time.time(), False

    def __enter__(self) -> Command:
        _prepare_streams_and_signals()
        return self

    def __exit__(self, _, error, __) -> None:
        for child in multiprocessing.active_children() if error is not None else ():
            child.kill()  # workers of loaders, which ignore SIGTERM; Python would wait for them
            sys.unraisablehook = lambda *_: None  # which their loader would complain about
        if error is not None and "Too many open files" in str(error):
            sys.exit(f"{self.parser.prog}: too many files are open: take fewer --workers, or a higher limit "
                     "(ulimit -n).")
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            self._stopped(getattr(error, "folder", self.folder))
        elif isinstance(error, (ValueError, argparse.ArgumentTypeError)):
            self.parser.error(" ".join(str(error).split("\n")))
        elif isinstance(error, OSError) and error.errno in OF_USAGE:
            name = str(error.filename)[:100]
            self.parser.error(f"{name} cannot be used ({error.strerror}); name another one.")
        elif isinstance(error, (TrainingError, OSError)):
            sys.exit(f"{self.parser.prog}: {error}")
        elif error is not None and files.lacks_memory(error):
            reason = f"{str(error).strip() or 'MemoryError'}".splitlines()[0][:120]
            sys.exit(f"{self.parser.prog}: there is not enough memory ({reason}): take a smaller "
                     "--batch-size or --size, fewer images, or a smaller network.")
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().splitlines()[0][:200]
            sys.exit(f"{self.parser.prog}: torch.compile failed ({reason}): it needs a C++ compiler on a "
                     "CPU; take another --mode.")

    def _stopped(self, folder: str | Path) -> None:
        """Say how to go on, and exit."""
        path, command = Path(folder) / (self.checkpoint or ""), f"python {self.parser.prog}"
        going = self.checkpoint and (
            rank_and_world()[0] > 0 or
            path.exists() and (self.resumed or path.stat().st_mtime >= self.started))
        say("\nStopped" + (f". Go on with: {command} --resume {shlex.quote(str(folder))}" if going else
                           " before there was anything to go on from." if self.checkpoint else
                           f"; {self.stopped}."), err=True)
        sys.exit(RESUME_ME if going else 130)


def _prepare_streams_and_signals() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # a file's name may have bytes that the locale cannot print
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
        for name in SIGNALS:
            if signal.getsignal(name) == signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(name, signal.default_int_handler)


def say(text: str, err: bool = False) -> None:
    """Print a line, of the first process only; at once, also into a file or a pipe. err: to stderr."""
    if rank_and_world()[0] == 0:
        stream = sys.stderr if err else sys.stdout
        try:
            tqdm.write(text, file=stream)  # above the progress bars
            stream.flush()
        except OSError as error:  # who read it has gone, a pipe or a terminal; the work goes on
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            setattr(sys, "stderr" if err else "stdout", open(os.devnull, "w"))


def format_duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Forecast:
    """Says once how long `total` work in any unit takes, after 10 s and three parts of it, or after 20 s.

    The first part is often slower: where there are more, it does not count in the estimate.
    """

    def __init__(self, what: str, total: float):
        self.what, self.total, self.start = what, total, time.monotonic()
        self.work, self.parts, self.said = 0.0, 0, False

    def done(self, work: float = 1.0) -> None:
        """Count a part of the work as done."""
        self.latest, self.work, self.parts = time.monotonic(), self.work + work, self.parts + 1
        if self.parts == 1:
            self.first_end, self.first_work = self.latest, work
        passed = self.latest - self.start
        if not self.said and (passed >= 20 or passed >= 10 and self.parts >= 3):
            self.said = True
            if self.left_s() >= 5:
                say(f"{self.what}: about {format_duration(passed + self.left_s())} in all")

    def left_s(self) -> float:
        """How many seconds the rest takes; 0 before anything is done."""
        since, before = (self.first_end, self.first_work) if self.parts > 1 else (self.start, 0.0)
        rest, work = max(0.0, self.total - self.work), self.work - before
        return rest * (self.latest - since) / work if work > 0 else 0.0


def track(iterable, what: str, total: int, first: int = 0, unit: str = "it", work: float = 1.0,
          forecast: Forecast | None = None) -> tqdm:
    """Iterate with a progress bar (on a terminal, first process) and a forecast.

    Of the `total` items the `first` ones do not come. forecast: one that goes on over several loops, whose
    items take `work` each.
    """
    forecast = forecast or Forecast(what, total - first)

    def items():
        for item in iterable:
            yield item
            forecast.done(work)

    return tqdm(items(), what, total, initial=first, leave=False, unit=unit,
                disable=True if rank_and_world()[0] else None)


class Sums:
    """Sums and counts of named values of this process; what is read from it is over all processes.

    state: what `gather` returned before the run was stopped, {name: [sum, count]}.
    """

    def __init__(self, state: dict | None = None):
        first = rank_and_world()[0] == 0  # it goes on with all, the others with nothing
        self.pairs = {name: list(pair) if first else [0.0, 0] for name, pair in (state or {}).items()}

    def add(self, name: str, value, count: int = 1) -> None:
        """Add the sum of `count` values: a number, or a tensor of one element."""
        total, before = self.pairs.get(name, (0.0, 0))
        self.pairs[name] = [total + value, before + count]

    def local_mean(self, name: str) -> float:
        """The mean of what this process added, 0 of nothing, for a progress bar."""
        total, count = self.pairs.get(name, (0.0, 0))
        return float(total) / max(1, count)

    def gather(self) -> dict[str, list]:
        """{name: [sum, count]} over all processes, for a checkpoint; the first one goes on with it."""
        flat = sum_over_processes([float(value) for pair in self.pairs.values() for value in pair])
        result = {name: flat[2 * n:2 * n + 2] for n, name in enumerate(self.pairs)}
        self.pairs = Sums(result).pairs
        return result

    def means(self) -> dict[str, float]:
        """The mean of each value over all processes, None of nothing."""
        return {name: total / count if count else None for name, (total, count) in self.gather().items()}


# --- Steps -------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite."""


class Guard:
    """Watches for signals to stop, checkpoints that are due, losses that are not finite; all processes agree.

    Within it, SIGTERM, SIGINT and SIGHUP let the step in progress end; `end_of_step` then saves and raises
    Stopped. A second SIGINT stops at once, unless it comes within two seconds: torchrun repeats what its
    processes got.
    """

    SKIPS = 10  # so many steps in a row may be skipped

    def __init__(self, nonfinite: str = "stop", save_minutes: float = 10.0):
        self.nonfinite, self.save_seconds = nonfinite, 60 * save_minutes
        self.asked = self.stop = self.due = False
        self.skipped, self.saved, self.what = 0, time.monotonic(), ""
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Guard:
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            for name in SIGNALS:
                if name == signal.SIGINT or signal.getsignal(name) != signal.SIG_IGN:  # nohup: SIGHUP
                    self.handlers[name] = signal.signal(name, self._note)
        return self

    def __exit__(self, *_) -> None:
        for name, handler in self.handlers.items():
            signal.signal(name, handler)

    def _note(self, number: int, _) -> None:
        if self.asked and number == signal.SIGINT and time.monotonic() > self.asked_at + 2:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.asked_at = True, time.monotonic()

    def remember(self, network: nn.Module) -> None:
        """Before a step that may be skipped: keep the statistics of batch norms, which a bad batch spoils."""
        if self.nonfinite == "skip":
            self.buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]

    def reduce(self, parameters, loss: Tensor, buffers=()) -> bool:
        """After backward: average gradients and buffers (statistics of batch norms, which each process has of
        its own images) over the processes; whether the loss is finite on all."""
        self.loss = loss.item()  # waits for the device
        rank, world = rank_and_world()
        due = rank == 0 and time.monotonic() - self.saved > self.save_seconds  # one clock, so that all save
        flags = [float(not math.isfinite(self.loss)), float(self.asked), float(due)]
        if world > 1:
            # No gradient: not on the path of this step of a search, which is the same on all processes.
            tensors = [parameter.grad for parameter in parameters if parameter.grad is not None]
            tensors += [buffer for buffer in buffers if buffer.is_floating_point()]
            flat = torch.cat([*(tensor.flatten() for tensor in tensors), loss.new_tensor(flags)])
            distributed.all_reduce(flat)
            *sums, last = flat.split([*(tensor.numel() for tensor in tensors), len(flags)])
            flags = last.tolist()
            for tensor, total in zip(tensors, sums):
                tensor.copy_(total.view(tensor.shape) / world)
        bad, self.stop, self.due = (flag > 0 for flag in flags)
        return not bad

    def allows_step(self, finite: bool, where: str, lr: float) -> bool:
        """Whether the step may be taken; TrainingError where it is not finite and must not be skipped."""
        if finite:
            self.skipped = 0
            return True
        self.skipped += 1
        self.what = "gradient is not finite" if math.isfinite(self.loss) else f"loss is {self.loss}"
        if self.nonfinite == "stop" or self.skipped > self.SKIPS:
            mend = ("--resume with --nonfinite skip goes on from the last checkpoint, which is good."
                    if self.nonfinite == "stop" else f"{self.SKIPS} steps in a row were skipped before.")
            raise TrainingError(f"The {self.what} at {where} (learning rate {lr:.2g}): try a smaller --lr or "
                                f"--amp off in a new run. {mend}")
        for buffer, value in self.buffers:
            buffer.copy_(value)
        say(f"skipped {where}: the {self.what} (learning rate {lr:.2g})")
        return False

    def end_of_step(self, save) -> None:
        """Save when it is time or when the run was asked to stop; raise Stopped in the latter case."""
        if self.stop or self.due:
            self.save(save)
        self._leave()

    def _leave(self) -> None:
        if self.stop:
            if rank_and_world()[1] > 1:
                distributed.barrier()  # torchrun ends all when one leaves: not before the first one has saved
            raise Stopped

    def between(self, save) -> None:
        """In a validation: save and raise Stopped when the run was asked to stop. Several processes, which
        have numbers of batches of their own, end the validation first."""
        if self.asked and rank_and_world()[1] == 1:
            self.stop = True
            self.end_of_step(save)

    def after_epoch(self) -> None:
        """Raise Stopped when a process was asked to stop since the last step; all has been saved."""
        self.stop = sum_over_processes([float(self.asked)])[0] > 0
        self._leave()

    def end_of_epoch(self, number: int, taken: bool) -> None:
        """TrainingError where no step of the epoch was taken."""
        if not taken:
            raise TrainingError(f"Every step of epoch {number} was skipped, since the {self.what} each time: "
                                "try a smaller --lr or --amp off in a new run.")

    def save(self, save) -> None:
        """Call `save()`, on every process."""
        save()
        self.saved = time.monotonic()


def take_step(loss: Tensor, parameters, optimizer, scaler, guard: Guard, grad_clip: float, where: str,
              buffers=()) -> bool:
    """After backward: average over processes, clip the norm, step. Whether it was taken, as Guard says."""
    parameters = list(parameters)
    finite = guard.reduce(parameters, loss, buffers)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip)
    finite = finite and (scaler.is_enabled() or math.isfinite(norm))  # a scaler skips such steps by itself
    taken = guard.allows_step(finite, where, optimizer.param_groups[0]["lr"])
    if taken:
        scaler.step(optimizer)
    scaler.update()
    return taken


@contextmanager
def frozen(parameters: list):
    """Within it no gradients of these parameters are computed."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


# --- Flags -------------------------------------------------------------------------------------------------

def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """The flags that search.py and train.py share."""
    add = parser.add_argument_group("run", "where it computes and writes, how it goes on").add_argument
    add("--output-dir", default=output_dir, metavar="DIR", help="folder of results (default: %(default)s)")
    add("--resume", metavar="PATH",
        help="folder or checkpoint of a stopped run to go on with, with its flags (default: a new run)")
    add("--accept-changes", action="store_true", help="with --resume: go on with the images that are there "
        "although some have come, gone or changed since the run began (default: refuse)")
    add("--seed", type=whole(0), default=0, metavar="N",
        help="seed of weights, order, splits and noise (default: %(default)s)")
    add("--device", default=default_device(), help="cuda or cpu (default: cuda if there is one)")
    add("--threads", type=whole(1, 4096), metavar="N", help="torch's threads on a CPU (default: torch's own)")
    add("--nonfinite", choices=("stop", "skip"), default="stop", help="if a loss or gradient is not finite: "
        f"stop, or skip the step, {Guard.SKIPS} times in a row at most (default: %(default)s)")
    add("--save-minutes", type=number(0, 1e6), default=10.0, metavar="MIN",
        help="minutes between the checkpoints within an epoch (default: %(default)s)")
    add("--amp", choices=AMP_DTYPES, help="mixed precision (default: bfloat16 on CUDA, off on a CPU)")


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """The flags that the command line gives, by name, without defaults."""
    unset = object()
    empty = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    return {name: value for name, value in vars(parser.parse_args(argv, empty)).items() if value is not unset}


def resolve(parser: argparse.ArgumentParser, argv: list[str] | None, *layers: dict) -> argparse.Namespace:
    """Every flag's value: of the command line, else of the last layer that has one, else the default.

    A layer is a dictionary by flags' names, of a recipe, a record or a checkpoint. Names that are not flags
    and values None are ignored; other values must fit their flags (see check_value). SIGMAS are one choice: a
    layer or command line that sets one of them gives the others their defaults.
    """
    actions = {action.dest: action for action in parser._actions if action.default != argparse.SUPPRESS}
    values, given = {name: action.default for name, action in actions.items()}, given_flags(parser, argv)
    for layer in (*layers, given):
        known = {name: value if layer is given else check_value(actions[name], value)
                 for name, value in layer.items() if name in actions and value is not None}
        if not known.keys().isdisjoint(SIGMAS):  # a method may have a default for sigmas
            values |= {name: actions[name].default for name in SIGMAS[:2]} | {"sigmas": None}
        values |= known
    return argparse.Namespace(**values)


def fill_sigma(flags: dict, data) -> None:
    """Set --sigma where none was given: it depends on the images."""
    if flags["sigma"] is None:
        flags["sigma"] = 1.0 if data.classes else 55 / 255


def check_value(action: argparse.Action, value):
    """A value from a file as its flag would parse it; ValueError in one sentence if it cannot."""
    def parse(one):
        text = ",".join(map(str, one)) if isinstance(one, list) else str(one)  # for a type that splits
        one = action.type(text) if action.type else text
        if action.choices is not None and one not in action.choices:
            raise ValueError(f"possible are {', '.join(map(str, action.choices))}")
        return one

    kind = {0: bool, "+": (list, tuple), "*": (list, tuple)}.get(action.nargs, object)
    try:
        if not isinstance(value, kind):
            raise TypeError("true or false is needed" if kind is bool else "a list is needed")
        return value if kind is bool else parse(value) if kind is object else [*map(parse, value)]
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{action.option_strings[0]} of the record or checkpoint must not be "
                         f"{str(value)[:60]!r} ({error}).") from None


def run_flags(values: dict) -> dict:
    """The flags that make a run what it is, for its checkpoints."""
    return {name: value for name, value in values.items() if name not in OF_THIS_CALL}


# --- Folders, stopping, going on ---------------------------------------------------------------------------

def resume_state(path: str | Path, checkpoint: str, *needed: str) -> tuple[dict, Path]:
    """The content of a stopped run's `checkpoint`, by its folder or path, and the folder; ValueError in one
    sentence where there are no flags and step, or not what is `needed` besides."""
    path = Path(path)
    path = path / checkpoint if path.is_dir() else path
    state = files.read_checkpoint(path)
    if not {"flags", "step", *needed} <= set(state):
        raise ValueError(f"{path} is not a {checkpoint} that a run can go on from.")
    files.check_fields(path, state, files.STOPPED)
    files.check_fields(path, state["sums"], dict.fromkeys(state["sums"], (float, int, [(float, int)])))
    best = state.get("best")
    if best and not any(row["epoch"] == best["epoch"] and row.keys() == best.keys() for row in state["rows"]):
        raise ValueError(f"{path} is not valid: its best epoch is none of its epochs.")
    return state, path.parent


def check_resumed(before: dict, values: dict) -> None:
    """ValueError in one sentence where a flag differs from the stopped run's, and is none of FREE_FLAGS."""
    if values.get("sigma") is None:  # --sigmas and --sigma-levels unset it; it depends on the images
        values["sigma"] = before.get("sigma")
    changed = [f"--{name.replace('_', '-')}" for name, value in before.items()
               if name in values.keys() - FREE_FLAGS and values[name] != value]
    if changed:
        raise ValueError(f"A resumed run keeps its settings, but {', '.join(changed)} differ: leave them "
                         "out, or start a new run in another --output-dir.")
    if before.get("threads") != values.get("threads"):
        say("note: the run began with another --threads; its last digits may differ from those of a run "
            "without a stop.")


def resumed_folder(path: str | Path) -> Path:
    """The folder of a run that is resumed by its folder or its checkpoint."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def check_output(data: str, output_dir: str) -> None:
    """ValueError in one sentence where results would lie among the images, and be taken for a class later."""
    images, results = os.path.realpath(data), os.path.realpath(output_dir)
    if os.path.isdir(data) and os.path.commonpath([images, results]) == images:
        raise ValueError(f"--output-dir {output_dir} lies in the folder of the images, {data}; name one "
                         "outside.")


def kept_splits(state: dict | None, accept: bool) -> dict | None:
    """What data.load_data keeps of a stopped run: its splits, which new images join if changes are accepted.
    """
    return state and {"splits": state.get("splits"), "images": state.get("images"), "accept": accept}


def check_images(data, state: dict | None, accept: bool) -> None:
    """ValueError in one sentence where the images of a resumed run are not those that it began with."""
    classes = (state or {}).get("classes", data.classes)
    if data.classes != classes:
        raise ValueError(f"The classes of {data.name} are others than when the run began: "
                         f"{str(data.classes)[:200]}, not {str(classes)[:200]}; start a new run.")
    if data.changes and accept:
        say(f"note: images of {data.name} have changed: {data.changes}. Schedules stay as they were planned.")
    elif data.changes:
        raise ValueError(f"The images of {data.name} are others than when the run began: {data.changes}. Put "
                         "them back, or go on with those that are there: --accept-changes.")


def make_folder(path: str | Path) -> None:
    """Make the folder of the results before the work starts; ValueError in one sentence where that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The folder {path} cannot be made ({error.strerror}); name another one.") from None


_locks: dict[Path, object] = {}  # open files of the folders that this process holds


class Busy(ValueError):
    """Another process holds the folder."""


def lock_folder(path: str | Path) -> None:
    """Make the folder and hold it until this process ends or unlocks it.

    ValueError in one sentence where that fails; it is Busy where another process holds the folder.

    Temporary files of a killed run in it are removed.
    """
    make_folder(path)
    folder = Path(path).resolve()
    if fcntl is None or folder in _locks or rank_and_world()[0] > 0:
        return
    try:
        file = open(folder / ".lock", "a")
    except OSError as error:
        raise ValueError(f"The folder {path} cannot be written to ({error.strerror}): mend that, or name "
                         "another --output-dir.") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers of a killed run would keep that of flock
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"The folder {path} cannot be locked ({error.strerror}): name another "
                             "--output-dir, on another disk.") from None
        raise Busy(f"Another run is writing into {path}: wait, or name another --output-dir.") from None
    _locks[folder] = file
    for left in folder.glob(".*.tmp"):  # those of files.write_file, and no file of the user
        if re.fullmatch(r"\..+\.(pt|json|jsonl|csv|png|svg|txt)\.\d+\.tmp", left.name):
            left.unlink(missing_ok=True)


def unlock_folder(path: str | Path) -> None:
    """Leave the folder to other processes, where this one holds it."""
    file = _locks.pop(Path(path).resolve(), None)
    if file is not None:
        file.close()


def begin_folder(path: str | Path, results: tuple[str, ...], resumed: str | Path | None = None) -> None:
    """Hold the folder of a run, for its `results`, file names; ValueError in one sentence where that fails.

    What another run has left is moved into a folder previous-N: none of it may be taken for a result of this
    one. A run that is `resumed` from elsewhere, its folder or checkpoint, brings its results.
    """
    lock_folder(path)
    folder = Path(path)
    if rank_and_world()[0] > 0:
        return
    before = None if resumed is None else resumed_folder(resumed)
    if before is not None and before.resolve() == folder.resolve():
        return
    if left := [folder / name for name in results if (folder / name).exists()]:
        aside = next(folder / f"previous-{n}" for n in itertools.count(1)
                     if not (folder / f"previous-{n}").exists())
        aside.mkdir()
        for file in left:
            file.rename(aside / file.name)
        say(f"note: {folder} holds an earlier run, which is now in {aside}.")
    if before is not None:
        for name in results:
            if (before / name).exists():
                files.write_file(folder / name, lambda temporary: shutil.copy(before / name, temporary))
