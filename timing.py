"""Times networks in turn with a reference network, and watches whether the device is quiet meanwhile.

    python latency.py --mode onnx --write-networks DIR    # where the project is: networks and this file
    python timing.py                  # in that folder, on any device: times them, writes times.json
    python timing.py network.onnx     # there: one network, beside the reference network if that is there

The command needs Python 3.9, numpy and onnxruntime, and no other file of the project. latency.py makes its
tables with the functions.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

FORMAT, FORMAT_OF_NETWORKS, VERSION = "joint-times", "joint-networks", 1
NETWORKS, TIMES = "networks.json", "times.json"  # the files of a folder: what to time, and the times
QUIET_SHARE, QUIET_SPREAD = 0.95, 0.15  # with less of the processor or more spread something else runs
STEADY = 0.1  # the reference network may differ so much from the last time before it is timed again
PATIENCE_S, PAUSE_S = 60.0, 2.0  # to wait in all for a quiet device, and between two tries


# --- Is the device quiet? ----------------------------------------------------------------------------------

def disturbance(times: dict) -> str:
    """What says that other work disturbed these times (`p10_ms`, `p90_ms`, `cpu_share`), in words, or "".
    On a quiet CPU one thread has the processor all the time, and runs take equally long."""
    share, low, high = times.get("cpu_share"), times["p10_ms"], times["p90_ms"]
    words = [f"had {100 * share:.0f} % of the processor's time"] if _is_low(share) else []
    if high > (1 + QUIET_SPREAD) * low:
        words.append(f"took {low:.4g} to {high:.4g} ms, 10-90 %")
    return " and ".join(words)


def _is_low(share: float | None) -> bool:
    return share is not None and share < QUIET_SHARE


def format_conditions(conditions: dict) -> str:
    """How far a table can be trusted that was made under these conditions: one sentence."""
    low, high, load = conditions["p10_ms"], conditions["p90_ms"], conditions.get("load")
    if words := disturbance(conditions):
        words = f"the reference network {words}" + ("" if load is None else f"; the load was {load:.1f}")
        if _is_low(conditions.get("cpu_share")):
            return ("Do not trust the milliseconds of this table: something else ran on the device when it "
                    f"was made ({words}).")
        return (f"Trust the milliseconds of this table to about {100 * (high / low - 1):.0f} % only: "
                f"something else ran on the device when it was made, or its clock changed ({words}).")
    return ("The device was quiet when this table was made: the reference network took "
            f"{low:.4g} to {high:.4g} ms, 10-90 %.")


def is_another_speed(slowdown: float | None) -> bool:
    """Whether a slowdown, a multiple of the time that was taken when the table was made, is above 5 %."""
    return slowdown is not None and not 0.95 < slowdown < 1.05


def format_ms(ms: float, slowdown: float | None, digits: int = 3) -> str:
    """A latency in words; where the device has another speed than for the table, at both speeds."""
    if not is_another_speed(slowdown):
        return f"{ms:.{digits}f} ms"
    return f"{ms:.{digits}f} ms now, {ms / slowdown:.{digits}f} ms at the table's speed"


def notes(times: dict) -> list[str]:
    """What to know before one believes a latency: a sentence or none. times: `p10_ms`, `p90_ms`, `cpu_share`,
    and `slowdown` where one is known."""
    words, slowdown = disturbance(times), times.get("slowdown")
    cause = "something else runs on this device"
    if not words and is_another_speed(slowdown) and slowdown < 1:
        cause = "something else ran on it then"
    cause += "" if _is_low(times.get("cpu_share")) else ", or its clock changed"
    cause += f" (the network {words})" if words else ""
    if is_another_speed(slowdown):
        return [f"note: the device now takes {slowdown:.2f} times as long as when the table was made: "
                f"{cause}."]
    return [f"note: do not believe this latency: {cause}."] if words else []


# --- Timing in turn ----------------------------------------------------------------------------------------

class Burst(NamedTuple):
    """A few runs one after the other; `cpu_share`: CPU time by wall time of one thread, None for several."""
    median_ms: float
    cpu_share: float | None


def burst(run: Callable, threads: int = 1, repeats: int = 3) -> Burst:
    """Time `run()`, which computes on the CPU, after one run that does not count."""
    run()
    samples, cpu = [], 0.0
    for _ in range(repeats):
        cpu_start, start = time.thread_time(), time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
        cpu += time.thread_time() - cpu_start
    return Burst(1e3 * statistics.median(samples), min(1.0, cpu / sum(samples)) if threads == 1 else None)


def percentile(times: list[float], percent: int) -> float:
    return sorted(times)[round(percent / 100 * (len(times) - 1))]


def mean_share(shares) -> float | None:
    known = [share for share in shares if share is not None]
    return statistics.fmean(known) if known else None


class InTurn(NamedTuple):
    """Several things timed in turn, the first of which is the reference."""
    times_ms: list  # for each thing, its time in each round
    ratios: list  # medians over the rounds of (time / time of the first)
    uncertainty: list  # half the 95 % interval of the ratio, relative
    cpu_share: float | None

    @property
    def medians_ms(self) -> list[float]:
        return [statistics.median(times) for times in self.times_ms]


def interleave(bursts: list, *, min_rounds: int = 5, seconds: float = 0.0, tolerance: float = 0.01) -> InTurn:
    """Call functions that return a Burst in turn: what disturbs the device then affects all of them alike.
    Stops after `min_rounds` rounds once all ratios are known to `tolerance` or `seconds` have passed."""
    end, rounds, shares = time.perf_counter() + seconds, [], []
    while True:
        found = [run() for run in bursts]
        rounds.append([each.median_ms for each in found])
        shares += [each.cpu_share for each in found]
        if len(rounds) < min_rounds:
            continue
        ratios = [[row[index] / row[0] for row in rounds] for index in range(len(bursts))]
        quartiles = [statistics.quantiles(values, n=4, method="inclusive") for values in ratios]
        known_to = [1.58 * (high - low) / math.sqrt(len(rounds)) / median  # McGill, Tukey and Larsen 1978
                    for low, median, high in quartiles]
        if max(known_to) <= tolerance or time.perf_counter() >= end:
            return InTurn([list(times) for times in zip(*rounds)], [median for _, median, _ in quartiles],
                          known_to, mean_share(shares))


class Job(NamedTuple):
    """A network to time."""
    whole: Callable | None  # returns a Burst of the whole network; None: only its parts are timed
    parts: Callable | None  # returns the milliseconds of each part; None: only the whole is timed
    rounds: int = 3  # in turn with the reference network, see `interleave`
    seconds: float = 0.0


def time_networks(jobs, reference: Callable, pace: Callable, say: Callable) -> dict:
    """Time networks, each in turn with the reference network, and again while the device is not quiet.
    pace: a Burst of the reference network in the form whose parts are timed. Waits PATIENCE_S in all, so
    that it ends on a device that is always busy. Returns `networks`, a dict for each job, and `conditions`.
    """
    rows, before, left = [], {}, PATIENCE_S
    for job in itertools.chain([Job(reference, None)], jobs):  # waits before the first network, where it must
        while True:
            start, row = time.monotonic(), _time_job(job, reference, pace)
            doubt = _doubt(row, before)
            before = row
            if not doubt or left <= 0:
                break
            if left == PATIENCE_S:
                say(f"The device is not quiet ({doubt}): waiting for it, {PATIENCE_S:.0f} s in all.")
            time.sleep(min(PAUSE_S, left))
            left -= time.monotonic() - start
        rows.append(row)
    del rows[0]
    times = [row["reference_ms"] for row in rows if "reference_ms" in row]
    loads = [row.pop("load") for row in rows]
    return {"networks": rows, "conditions": {
        "median_ms": statistics.median(times), "p10_ms": percentile(times, 10),
        "p90_ms": percentile(times, 90), "cpu_share": mean_share(row["cpu_share"] for row in rows),
        "load": None if None in loads else statistics.fmean(loads), "waited_s": PATIENCE_S - max(0.0, left)}}


def _time_job(job: Job, reference: Callable, pace: Callable) -> dict:
    row, shares = {}, []
    if job.whole:
        found = interleave([reference, job.whole], min_rounds=job.rounds, seconds=job.seconds)
        row |= {"reference_ms": found.medians_ms[0], "ratio": found.ratios[1],
                "uncertainty": found.uncertainty[1]}
        shares.append(found.cpu_share)
    if job.parts:
        found = pace()
        row |= {"pace_ms": found.median_ms, "parts_ms": job.parts()}
        shares.append(found.cpu_share)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
    return row | {"cpu_share": mean_share(shares), "load": load}


def _doubt(row: dict, before: dict) -> str:
    """Why the times of a network are better taken again, or ""."""
    if _is_low(row["cpu_share"]):
        return f"this process had the processor for {100 * row['cpu_share']:.0f} % of the time"
    for name in ("reference_ms", "pace_ms"):
        if name in row and name in before and not 1 / (1 + STEADY) < row[name] / before[name] < 1 + STEADY:
            return f"its reference network took {before[name]:.4g} ms and then {row[name]:.4g} ms"
    return ""


# --- onnxruntime -------------------------------------------------------------------------------------------

def start_session(network: bytes | str, threads: int, profile: Path | None = None):
    """A session of onnxruntime on the CPU; its threads do not spin, so that other work can run beside it.
    network: the content of an ONNX file, or its path."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return runtime.InferenceSession(network, options, providers=["CPUExecutionProvider"])


def _onnxruntime():
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("The package onnxruntime is not installed; install it with: pip install onnxruntime"
                         ) from None
    return onnxruntime


def part_times(network: bytes | str, threads: int, images: np.ndarray, parts: list[str], fused: dict,
               runs: int = 7) -> list[float]:
    """The median milliseconds of each part in `runs` passes, by onnxruntime's profile of its nodes.
    parts: how the names of their nodes begin, the path of a module; a node without a path is a change of
    layout for the node before. fused: activation -> the convolution that takes it in."""
    with tempfile.TemporaryDirectory() as folder:
        session = start_session(network, threads, Path(folder) / "profile")
        for _ in range(runs):
            session.run(None, {"noisy": images})
        events = json.loads(Path(session.end_profiling()).read_text())
    times = defaultdict(list)  # node -> microseconds of each run
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = re.sub(r"(_output_\d+)?(_nchwc)?_kernel_time$", "", event["name"])
            is_convolution = event["args"]["op_name"].endswith("Conv")  # named as what it took in
            times[fused.get(name, name) if is_convolution else name].append(event["dur"])
    totals, owner = [0.0] * len(parts), None
    for node, values in times.items():
        if node.startswith("/"):
            owner = next((index for index, path in enumerate(parts) if node.startswith(path)), None)
        if owner is not None:
            totals[owner] += statistics.median(values) / 1e3
    return totals


# --- The command: a folder of networks on this device ------------------------------------------------------

def device_name() -> str:
    """The name of the board or of the CPU model."""
    for path, pattern in (("/proc/device-tree/model", r"([^\0]+)"),
                          ("/proc/cpuinfo", r"model name\s*: (.+)")):
        try:
            if match := re.search(pattern, Path(path).read_text(errors="replace")):
                return match[1].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()


def read_json(path: Path, kind: str, remedy: str) -> dict:
    """The object in a file of this format; ValueError in one sentence where it is something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}.") from None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (kind, VERSION):
        raise ValueError(f"{path} is not {kind} version {VERSION}; {remedy}.")
    return content


class Folder:
    """A folder that `latency.py --write-networks` wrote."""

    def __init__(self, path: Path):
        self.path = path
        self.plan = read_json(path / NETWORKS, FORMAT_OF_NETWORKS, "write the folder again with: "
                              "python latency.py --mode onnx --write-networks DIR")
        self.threads = self.plan["setting"]["threads"]
        self.start_reference()

    def start_reference(self) -> None:
        """Begin a new session of the reference network."""
        self.reference = one_run(start_session(str(self.path / self.plan["reference"]), self.threads))

    def time_reference(self, repeats: int = 3) -> Burst:
        return burst(self.reference, self.threads, repeats)

    def jobs(self):
        """A job for each network; its session is there while it is timed."""
        start, networks = time.monotonic(), self.plan["networks"]
        for index, row in enumerate(networks):
            self.start_reference()  # an old session is faster than the network's new one
            path = str(self.path / row["file"])
            session = start_session(path, self.threads)
            run, images = one_run(session), random_images(session)
            yield Job(lambda: burst(run, self.threads),
                      (lambda: part_times(path, self.threads, images, row["parts"], row["fused"]))
                      if "parts" in row else None, row["rounds"], row["seconds"])
            left = (time.monotonic() - start) / (index + 1) * (len(networks) - index - 1)
            print(f"\r{index + 1} of {len(networks)} networks, about {left:.0f} s left   ", end="",
                  flush=True)
        print()

    def time(self) -> dict:
        """Time all networks; the content of times.json."""
        self.time_reference(max(3, round(1e3 / self.time_reference().median_ms)))  # a second: warm the clocks
        times = time_networks(self.jobs(), self.time_reference, lambda: self.time_reference(5), print)
        plan = {name: value for name, value in self.plan.items()
                if name not in ("format", "version", "networks", "reference")}
        made = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "device": device_name(), "runtime": f"onnxruntime {_onnxruntime().__version__}",
                "system": platform.platform(), "python": platform.python_version()}
        return {"format": FORMAT, "version": VERSION, "made": made, "plan": plan, **times}


def random_images(session) -> np.ndarray:
    """Images for the one input of a network, of its own shape or of that in its metadata."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ValueError(f"The network has {len(inputs)} inputs, and only one, the images, can be timed.")
    shape = inputs[0].shape
    if not all(isinstance(side, int) for side in shape):  # of export.py: any batch, height and width
        about = json.loads(session.get_modelmeta().custom_metadata_map.get("joint", "{}"))
        side = about.get("size", 64) // about.get("scale", 1)
        shape = [1, about.get("channels", 3), side, side]
    return np.random.default_rng(0).random(shape, np.float32)


def one_run(session) -> Callable:
    """A function that runs a session once on random images."""
    inputs = {session.get_inputs()[0].name: random_images(session)}
    return lambda: session.run(None, inputs)


def time_file(path: str, folder: Path) -> str:
    """The latency of the network in an ONNX file, in words; with the folder's reference network, if any."""
    known = Folder(folder) if (folder / NETWORKS).exists() else None
    threads = known.threads if known else 1
    session = start_session(path, threads)
    run = one_run(session)
    bursts = [lambda: burst(run, threads)]
    found = interleave([known.time_reference, *bursts] if known else bursts, min_rounds=17, seconds=5.0)
    times = found.times_ms[-1]
    p10, p90 = percentile(times, 10), percentile(times, 90)
    row = {"p10_ms": p10, "p90_ms": p90, "cpu_share": found.cpu_share}
    if known and (folder / TIMES).exists():
        at_table = read_json(folder / TIMES, FORMAT, "make it again with: python timing.py")["conditions"]
        row["slowdown"] = found.medians_ms[0] / at_table["median_ms"]
    shape = "x".join(map(str, random_images(session).shape))
    text = (f"{path}: {format_ms(found.medians_ms[-1], row.get('slowdown'))} for an input of {shape} "
            f"(10-90 %: {p10:.3f}-{p90:.3f} ms), threads: {threads}, on {device_name()}, "
            f"onnxruntime {_onnxruntime().__version__}")
    return "\n".join([text, *notes(row)])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timing.py", usage="python timing.py [NETWORK]  (--help says more)",
        description="Time the networks that latency.py --write-networks wrote into this file's folder, "
                    "through onnxruntime on this device, for a latency table; or time one network.",
        epilog="examples: python timing.py; python timing.py network.onnx; python timing.py reference.onnx")
    parser.add_argument("network", nargs="?", metavar="NETWORK",
                        help=f"an ONNX file to time alone (default: all of {NETWORKS}, into {TIMES})")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args, folder = parser.parse_args(argv), Path(__file__).resolve().parent
    try:
        if args.network:
            print(time_file(args.network, folder))
            return
        content, path = Folder(folder).time(), folder / TIMES
        temporary = path.with_name(f".{TIMES}.tmp")
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, path)
        print(f"{format_conditions(content['conditions'])}\n{path}: take it back, and make the table with: "
              f"python latency.py --read-times {TIMES} --output table.json")
    except KeyboardInterrupt:
        sys.exit("timing.py: stopped; nothing was written")
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except Exception as error:  # onnxruntime has an exception of its own for each kind of damage
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        parser.error(f"onnxruntime cannot run a network ({' '.join(str(error).split())[:160]})")


if __name__ == "__main__":
    main()
