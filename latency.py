"""Times networks and their parts on your device; predicts the latency of the networks of a search space.

    python latency.py --output latency.json            # this device, 8 operations per block, 64 x 64 pixels
    python latency.py --table latency.json --check 20  # predicted against measured, on 20 random networks

    python latency.py --mode onnx --write-networks DIR # to time on another device, by timing.py in DIR
    python latency.py --read-times DIR/times.json      # the table of that device

Reads and writes the latency table (JSON). Copied alone it times networks (`measure_network`) and makes them
fast (`fast`); tables need the other files of the project.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import platform
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

MISSING = None
try:
    import files
    import registry
    import timing
    from data import Parser, number, whole
    from run import Command, check_device, say, track
except ImportError as error:  # this file alone; of the command only --help works
    MISSING, Parser, number, whole = error, argparse.ArgumentParser, lambda *_: None, lambda *_: None

FORMAT, VERSION = "joint-latency", 2
FORMAT_OF_PARTS = "joint-latency-parts"  # of the methods besides tfnas, version 1
FIELDS = {  # of a table, and their kinds, see files.fits
    "made": {"date": str}, "space": dict, "rest_ms": dict, "reference": dict, "parts": [dict],
    "check": ({"networks": int, "median_percent": float, "p95_percent": float, "worst_percent": float}, None),
    "conditions": ({"p10_ms": float, "p90_ms": float, "cpu_share": (float, None), "load": (float, None)},
                   None),
    "timed": ({"device": str, "date": str}, None),  # of a table of another device
    "setting": {"device": str, "device_type": str, "threads": range(4097), "batch": range(1, 65537),
                "dtype": str, "size": range(1, 65537), "memory_format": str, "num_classes": range(65537)}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("eager", "folded", "compile", "graph", "onnx")


@dataclass(frozen=True)
class Timing:
    """The median, 10th and 90th percentile of `count` runs, in milliseconds per batch.
    cpu_share: CPU time by wall time, 1 on a quiet CPU. None on a GPU, and where threads wait for others."""
    median_ms: float
    p10_ms: float
    p90_ms: float
    count: int
    cpu_share: float | None = None

    @classmethod
    def of(cls, samples_ms, cpu_share: float | None = None) -> Timing:
        values = sorted(samples_ms)
        p10, p90 = (values[round(share * (len(values) - 1))] for share in (0.1, 0.9))
        return cls(statistics.median(values), p10, p90, len(values), cpu_share)


@dataclass(frozen=True)
class Setting:
    """What a latency depends on besides the network; a table holds for one setting."""
    device: str  # name of the GPU or CPU
    device_type: str  # "cuda" or "cpu"
    threads: int  # of torch on a CPU while timing; 0 on a GPU
    dtype: str
    batch: int
    size: int  # pixels, height and width
    memory_format: str  # always "channels_last"
    num_classes: int
    mode: str = "eager"  # one of MODES, see `fast`
    runtime: str = ""  # of the mode onnx: onnxruntime and its version

    def __post_init__(self):
        if self.dtype not in DTYPES or self.mode not in MODES:
            raise ValueError(f"A latency has no number format {self.dtype!r:.40} or mode {self.mode!r:.40}.")


def device_name(device: torch.device | str) -> str:
    """The name of the GPU, or of the CPU model."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine() if MISSING else timing.device_name()


def this_setting(device: str, *, size: int, num_classes: int, batch: int | None = None, threads: int = 1,
                 dtype: str = "float32", mode: str = "eager") -> Setting:
    """A setting on this device; the default batch is 32 on a GPU (the papers' protocol) and 1 on a CPU."""
    kind, runtime = torch.device(device).type, ""
    if mode == "onnx":
        if kind != "cpu" or dtype != "float32":
            raise ValueError("The mode onnx is for --device cpu and --dtype float32.")
        from export import optional
        runtime = f"onnxruntime {optional('onnxruntime').__version__}"
    return Setting(device_name(device), kind, threads if kind == "cpu" else 0, dtype,
                   batch or (32 if kind == "cuda" else 1), size, "channels_last", num_classes, mode, runtime)


def fast_mode(kind: str) -> str:
    """The form to deploy on "cpu" or "cuda": "onnx" on a CPU where that is installed, else "folded"."""
    packages = ("onnx", "onnxruntime")
    return "onnx" if kind == "cpu" and all(map(importlib.util.find_spec, packages)) else "folded"


# --- Fast forms of a network -------------------------------------------------------------------------------

def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy in eval mode; in a Sequential, norms are folded into a convolution before, or 1x1 behind."""
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        for index in reversed(range(len(module) - 1 if isinstance(module, nn.Sequential) else 0)):
            one, other = module[index], module[index + 1]
            if isinstance(one, nn.Conv2d) and isinstance(other, nn.BatchNorm2d):
                module[index] = fuse_conv_bn_eval(one, other)
                del module[index + 1]
            elif isinstance(one, nn.BatchNorm2d) and not one.affine and isinstance(other, nn.Conv2d) and (
                    other.kernel_size, other.padding, other.groups, other.bias) == ((1, 1), (0, 0), 1, None):
                weight = other.weight * (one.running_var + one.eps).rsqrt().view(1, -1, 1, 1)
                other.weight, other.bias = map(nn.Parameter, (weight, -weight[..., 0, 0] @ one.running_mean))
                del module[index]
    return folded


class Graphed(nn.Module):
    """A network in a CUDA graph; each call overwrites the outputs of the last."""

    def __init__(self, network: nn.Module, example: Tensor):
        super().__init__()
        self.network, self.input, stream = network, example.clone(), torch.cuda.Stream()
        with torch.no_grad():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries choose their kernels before the capture
                for _ in range(3):
                    network(self.input)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = network(self.input)

    def forward(self, x: Tensor):
        if x.shape != self.input.shape or x.dtype != self.input.dtype:
            return self.network(x)
        self.input.copy_(x)
        self.graph.replay()
        return self.output


def fast(network: nn.Module, mode: str = "folded", example: Tensor | None = None) -> nn.Module:
    """A copy of a trained network for inference: same outputs, same device, channels-last.
    "folded": batch norms folded. "compile": that compiled (takes minutes; needs a C++ compiler on a CPU).
    "graph": that in a CUDA graph, the branches of a DC-NAS on two streams, for inputs like `example`
    (B, C, H, W). "onnx": through onnxruntime, for such inputs, with torch's threads; returns arrays."""
    if mode not in MODES:
        raise ValueError(f"There is no mode {mode!r}; possible: {', '.join(MODES)}.")
    if mode == "graph" and (example is None or not example.is_cuda):
        raise ValueError("A CUDA graph needs an example input on a CUDA device; use the mode folded.")
    if mode == "eager":
        return copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
    if mode == "onnx":
        from export import Traced
        return Traced(network, example, torch.get_num_threads())
    network = fold_batch_norm(network).to(memory_format=torch.channels_last)
    network.parallel = mode == "graph"  # launched one by one, kernels on two streams take no less time
    if mode == "compile":
        from torch._dynamo import config

        # All networks share the code of `forward`; above the limit, 8, further ones would not be compiled.
        config.recompile_limit = max(config.recompile_limit, 1024)
        return torch.compile(network)
    return Graphed(network, example) if mode == "graph" else network


# --- Timing ------------------------------------------------------------------------------------------------

def _now(device: torch.device):
    """A mark in time: seconds on a CPU; on CUDA an event that the device passes after the work before it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start, stop) -> float:
    if isinstance(start, float):
        return (stop - start) * 1e3
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(run, device: torch.device | str, *, warmup: int = 5, repeats: int = 30,
            seconds: float = 0.0) -> Timing:
    """Time `run()` at least `repeats` times and for at least `seconds`, after `warmup` runs, synchronised."""
    device, samples, cpu = torch.device(device), [], 0.0
    for _ in range(warmup):
        run()
    end = time.perf_counter() + seconds
    while len(samples) < repeats or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cpu_start, start = time.thread_time(), _now(device)
        run()
        samples.append(_elapsed_ms(start, _now(device)))
        cpu += time.thread_time() - cpu_start
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return Timing.of(samples, min(1.0, 1e3 * cpu / sum(samples)) if one_thread else None)


def peak_memory_mib(device: torch.device | str) -> float | None:
    """Peak memory of this process in MiB: torch's on a GPU, the resident size on a CPU; None on Windows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration):  # on Linux; getrusage has the peak of who started it
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def interleave(runs: list, device: torch.device | str, *, burst: int = 3, warmup: int = 1,
               min_rounds: int = 5, seconds: float = 0.0, tolerance: float = 0.01) -> timing.InTurn:
    """Time `runs` in turn, `burst` times each, see `timing.interleave`."""
    bursts = [lambda run=run: measure(run, device, warmup=warmup, repeats=burst) for run in runs]
    return timing.interleave(bursts, min_rounds=min_rounds, seconds=seconds, tolerance=tolerance)


@contextlib.contextmanager
def prepared(network: nn.Module, setting: Setting):
    """Yield a copy of the network for inference and random images; then restore the number of threads.
    One thread is the default of a setting: at batch 1 a second one gains little, and on a busy machine
    OpenMP's threads wait for each other, so that a network can seem hundreds of times slower."""
    how, layout = dict(device=setting.device_type, dtype=DTYPES[setting.dtype]), torch.channels_last
    network = copy.deepcopy(network).to(**how, memory_format=layout).eval()
    shape = setting.batch, getattr(network, "channels", 3), setting.size, setting.size
    images = torch.rand(shape, **how).contiguous(memory_format=layout)
    threads = torch.get_num_threads()
    if setting.threads:
        torch.set_num_threads(setting.threads)
    try:
        with torch.inference_mode():
            yield (network if setting.mode == "eager" else fast(network, setting.mode, images)), images
    finally:
        torch.set_num_threads(threads)


def measure_network(network: nn.Module, setting: Setting, *, warmup: int = 10, repeats: int = 50,
                    seconds: float = 1.0) -> Timing:
    """Milliseconds per batch of a network in inference form, in a setting (see `this_setting`)."""
    with prepared(network, setting) as (ready, images):
        return measure(lambda: ready(images), setting.device_type, warmup=warmup, repeats=repeats,
                       seconds=seconds)


def through_onnxruntime(network: nn.Module, setting: Setting) -> Timing | None:
    """The latency of a network in a setting, but through onnxruntime; None where that cannot be measured."""
    if setting.device_type != "cpu" or setting.dtype != "float32":
        return None
    try:
        return measure_network(network, replace(setting, mode="onnx"))
    except ValueError:
        return None


def time_parts(network: nn.Module, parts: list[nn.Module], images: Tensor, device: torch.device, runs: int,
               queued: bool = False) -> list[float]:
    """The median milliseconds of each of the `parts` of a network inside `runs` forward passes, by hooks.
    `queued`: on CUDA, without the time of the launches, as in a CUDA graph."""
    if hasattr(network, "time_parts"):
        return network.time_parts(parts, images, runs)
    marks, handles = [([], []) for _ in parts], []
    for part, (starts, stops) in zip(parts, marks):
        handles += [part.register_forward_pre_hook(lambda *_, to=starts: to.append(_now(device))),
                    part.register_forward_hook(lambda *_, to=stops: to.append(_now(device)))]
    for _ in range(runs):
        if queued and device.type == "cuda":
            torch.cuda._sleep(50_000_000)  # cycles: meanwhile the whole pass gets into the queue
        network(images)
    for handle in handles:
        handle.remove()
    return [statistics.median(map(_elapsed_ms, *pair)) for pair in marks]


# --- The table ----------------------------------------------------------------------------------------------

def _number(value, low: float = -1e9) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < 1e9:
        raise ValueError(f"{value!r} is not a number from {low:g} to 1e9")
    return float(value)


def _as_version_2(content: dict) -> dict:
    """The content of a table of version 1 or 2 as one of version 2, with the same predictions."""
    kind = content["format"], content["version"]
    if kind == (FORMAT, VERSION):
        return content
    if kind == (FORMAT, 1):
        return registry.method_module("tfnas").table_of_version_1(content)
    if kind != (FORMAT_OF_PARTS, 1):
        raise ValueError(f"its format and version are {kind}")
    return {**content, "format": FORMAT, "version": VERSION, "rest_ms": {"network": content["rest_ms"]},
            "reference": {"model": content["space"]["method"], "design": content["reference"]},
            "parts": [{**row, "ms": max(0.0, _number(row["ms"]))} for row in content["parts"]]}


class Table:
    """The content of a table file; `predict_ms(design)` adds up the latencies of a network's parts.
    `parts` have the fields of the space's Part and `ms`; `rest_ms` is the time outside of them, by kind of
    network, and may be negative (see `_shared_costs`); `correction` is a factor for all."""

    def __init__(self, content: dict):
        try:
            self._read(_as_version_2(content))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            reason = f"the field {reason} is missing" if isinstance(error, KeyError) else reason
            raise ValueError(f"The latency table is not valid: {reason}.") from None

    def _read(self, content: dict) -> None:
        for name, kind in FIELDS.items():
            if not files.fits(content.get(name), kind):
                raise ValueError(f"the field {name} is missing or not what it should be")
        self.content, self.setting = content, Setting(**content["setting"])
        self.method = content["space"]["method"]
        module = registry.method_module(self.method)
        self.space, part = module.Space.from_identity(content["space"]), module.Part
        self.network, self.random_design = self.space.network, self.space.random_design
        self.reference = module.design_of(content["reference"])
        self.reference_ms = _number(content["reference_ms"], 1e-9)
        self.correction = _number(content["correction"], 1e-9)
        self.rest_ms = {kind: _number(ms) for kind, ms in content["rest_ms"].items()}
        self.rest(self.space.kinds(self.reference))
        times = {part(*(row[name] for name in part._fields)): _number(row["ms"], 0.0)
                 for row in content["parts"]}
        missing = self.space.possible_parts() - set(times) - getattr(self.space, "newer_parts", set())
        if missing:
            raise ValueError(f"{len(missing)} parts are missing, {next(iter(missing))} among them")
        if hasattr(self.space, "smooth") and self.space.smooth(times) != times:
            raise ValueError("the time of an operation must not decrease with its width")
        self.costs = {part: ms * self.correction for part, ms in times.items()}

    @property
    def hash(self) -> str:
        """Identifies the table in the records of what was searched with it."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    def scaled(self, factor: float) -> Table:
        return Table({**self.content, "correction": self.correction * factor})

    def rest(self, kinds: list[str]) -> float:
        """The milliseconds outside of the parts of a network of these kinds, one after the other."""
        return sum(self.rest_ms[kind] for kind in kinds) * self.correction

    def predict_ms(self, design) -> float:
        """Milliseconds per batch of a design's network; ValueError where the table does not cover it."""
        try:
            return self.space.cost(design, self.costs, self.rest(self.space.kinds(design)))
        except (KeyError, ValueError):
            raise ValueError(self._not_covered(self.method, design)) from None

    def error_percent(self, design, ratio: float) -> float:
        """How far the prediction is from a measured `ratio`, a multiple of the reference network's time."""
        return 100 * (self.predict_ms(design) / (ratio * self.reference_ms) - 1)

    @property
    def elsewhere(self) -> bool:
        """Whether the table is of another device than this one, whose times were read (`read_times`)."""
        if self.content.get("timed") is None:
            return False
        here = this_setting("cpu", size=1, num_classes=0, mode="onnx")
        return (self.setting.device, self.setting.runtime) != (here.device, here.runtime)

    def reference_network(self) -> nn.Module:
        """The network that is timed beside others, to see how fast the device is at the moment."""
        return self.network(self.reference)

    def read_record(self, record: dict):
        """The design in the content of an arch.json; ValueError where the table does not cover it."""
        method = record["method"]
        design = None if method == "named" else registry.method_module(method).design_of(record)
        if method != self.method or not self.space.holds(design):
            raise ValueError(self._not_covered(method, design))
        return design

    def _not_covered(self, method: str, design) -> str:
        own = {name: getattr(design, name, None) for name in ("base_width", "channels", "num_classes")}
        own |= {"operations": 8, "min_width": 1.0}  # the largest space of tfnas
        spaces = spaces_of(method, own) if design else {}  # a named model has none
        for space in [design.space] if hasattr(design, "space") else spaces.values():
            with contextlib.suppress(KeyError, ValueError):
                if space.holds(design):
                    space.cost(design, dict.fromkeys(space.possible_parts(), 0.0), 0.0)
                    return ("This latency table does not cover the network; make one that does with: "
                            f"{table_command(self.setting, space.table_flags())}")
        return "No latency table covers the network; train it and time it with eval.py."


read_table = Table  # content of a file -> its table


def load_table(path: str | Path) -> Table:
    """Read a table file; ValueError in one sentence where it is missing, damaged or too new."""
    name = "NEW.json" if Path(path).exists() else path  # whatever that is, it must not be written over
    remedy = f"make a new one with: python latency.py --output {name}"
    return Table(files.read_json(path, (FORMAT, FORMAT_OF_PARTS), (1, VERSION), remedy))


def require_setting(table: Table, wanted: Setting, path) -> None:
    """Raise ValueError, with the command that makes the right table, where a table is for another setting."""
    there, here = asdict(table.setting), asdict(wanted)
    wrong = [f"{name} is {there[name]!r} there and {value!r} here"
             for name, value in here.items() if there[name] != value]
    if wrong:
        raise ValueError(f"The latency table {path} is not for this setting ({'; '.join(wrong)}); make one "
                         f"with: {table_command(wanted, table.space.table_flags())}")


def table_command(setting: Setting, space_flags: str) -> str:
    """The command that makes a table for a setting and a space (Space.table_flags)."""
    threads = f" --threads {setting.threads}" if setting.threads else ""
    return (f"python latency.py --device {setting.device_type} --mode {setting.mode}{threads} --dtype "
            f"{setting.dtype} --batch {setting.batch} --size {setting.size} {space_flags} --output NEW.json")


def spaces_of(method: str, values: dict) -> dict:
    """The spaces of a method by name of the network, with other `values` of those fields that they have."""
    module = registry.method_module(method)
    values = {field.name: values[field.name] for field in fields(module.Space) if values.get(field.name)}
    presets = getattr(module, "PRESETS", {"": module.Space()})
    return {name: replace(space, **values) for name, space in presets.items()}


def space_of(args: argparse.Namespace):
    """The space that the flags of the command name."""
    spaces = spaces_of(args.method, dict(
        operations=args.space, min_width=args.min_width, num_classes=args.classes, base_width=args.width,
        channels={None: None, True: 1, False: 3}[args.grey]))
    network = args.network or next(iter(spaces))
    if network not in spaces:
        raise ValueError(f"There is no --network {network}; use one of: {', '.join(spaces)}")
    return spaces[network]


# --- Building a table --------------------------------------------------------------------------------------

class Plan:
    """The networks that a table of a space is made from; the seed draws them.
    `carriers` hold each part `rounds` times or more; parts are timed inside of them, since alone they would
    find their weights in the cache. The first `wholes` of them are also timed as a whole. `to_correct` and
    `to_check` are other networks, which say how far off the sums of parts are."""

    def __init__(self, setting: Setting, space, rounds: int = 3, seed: int = 0):
        self.setting, self.space, self.rounds, self.seed = setting, space, rounds, seed
        self.carriers = space.carriers(random.Random(seed), rounds)
        slow = setting.mode == "compile"  # such networks take long to make
        self.wholes = 2 * rounds if slow else len(self.carriers)
        correct, check = random.Random(seed + 1), random.Random(seed + 2)
        self.to_correct = [space.random_design(correct) for _ in range((1 if slow else 4) * rounds)]
        self.to_check = [space.random_design(check) for _ in range((2 if slow else 7) * rounds)]
        self.designs = [*self.carriers, *self.to_correct, *self.to_check]

    def record_content(self, design) -> dict:
        return registry.method_module(self.space.identity()["method"]).record_content(design)

    def how(self, index: int) -> dict:
        """How often the network `index` of `designs` is timed in turn with the reference, see timing.Job."""
        return dict(rounds=3, seconds=0.0) if index < len(self.carriers) else dict(rounds=17, seconds=1.0)

    def to_dict(self) -> dict:
        """What `from_dict` makes the same plan from, also in another version of this project, or refuses."""
        designs = json.dumps([self.record_content(design) for design in self.designs], sort_keys=True)
        return {"setting": asdict(self.setting), "space": self.space.identity(), "rounds": self.rounds,
                "seed": self.seed, "designs": hashlib.sha256(designs.encode()).hexdigest()[:16]}

    @classmethod
    def from_dict(cls, content: dict, **device) -> Plan:
        """The plan of `to_dict`; device: fields of the setting that are known only where it was timed."""
        module = registry.method_module(content["space"]["method"])
        plan = cls(Setting(**content["setting"] | device), module.Space.from_identity(content["space"]),
                   content["rounds"], content["seed"])
        if plan.to_dict()["designs"] != content["designs"]:
            raise ValueError("its networks are of another version of this project: write them again")
        return plan


def build_table(setting: Setting, space, rounds: int = 3, seed: int = 0) -> dict:
    """Time the parts of a space on this device and return the content of a table file."""
    plan = Plan(setting, space, rounds, seed)
    return table_from(plan, time_here(plan))


def time_here(plan: Plan) -> dict:
    """Time the networks of a plan on this device, see timing.time_networks.
    A reference network is timed in turn with them: in multiples of its time a disturbance cancels out. A
    compiled network or a CUDA graph has no parts to time; those of the folded network are."""
    setting, space, device = plan.setting, plan.space, torch.device(plan.setting.device_type)
    has_parts = setting.mode in ("eager", "folded", "onnx")
    in_parts, last = setting if has_parts else replace(setting, mode="folded"), len(plan.carriers)

    def jobs(images, references):
        designs = track(plan.designs, "latency table", len(plan.designs), unit="network")
        for index, design in enumerate(designs):
            network, whole, parts = space.network(design), None, None
            for reference in references if setting.mode == "onnx" else ():
                reference.restart()  # an old session is faster than the network's new one
            with contextlib.ExitStack() as stack:
                if index < plan.wholes or index >= last:
                    as_set, _ = stack.enter_context(prepared(network, setting))
                    whole = lambda: measure(lambda: as_set(images), device, warmup=1, repeats=3)
                if index < last:
                    timed = as_set if has_parts else stack.enter_context(prepared(network, in_parts))[0]
                    folded = timed.network if setting.mode == "onnx" else timed
                    modules = [part for _, part in space.parts(folded)]
                    parts = lambda: time_parts(timed, modules, images, device, 7, queued=not has_parts)
                yield timing.Job(whole, parts, **plan.how(index))

    network = space.network(space.reference_design())
    with prepared(network, in_parts) as (timed, images), prepared(network, setting) as (as_set, _):
        measure(lambda: as_set(images), device, seconds=1.0)  # warm the clocks
        return timing.time_networks(
            jobs(images, (timed, as_set)),
            lambda: measure(lambda: as_set(images), device, warmup=1, repeats=3),
            lambda: measure(lambda: timed(images), device, warmup=1, repeats=5), say)


def table_from(plan: Plan, times: dict, **more) -> dict:
    """The content of a table file, from the times of a plan's networks (timing.time_networks)."""
    setting, space, rows = plan.setting, plan.space, times["networks"]
    reference_ms, samples, carriers = _number(times["conditions"]["median_ms"], 1e-9), defaultdict(list), []
    for design, row in zip(plan.carriers, rows):
        with torch.device("meta"):
            parts, modules = zip(*space.parts(space.network(design)))
        sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
        pace, ratio = _number(row["pace_ms"], 1e-9), row.get("ratio")
        shares = [_number(ms, 0.0) / pace for ms in row["parts_ms"]]
        carriers.append((space.kinds(design), list(zip(parts, sizes, shares, strict=True)),
                         None if ratio is None else _number(ratio, 1e-9)))
    wholes = carriers[:plan.wholes]
    factors = _group_factors(wholes) if setting.mode in ("compile", "graph") else {}
    sizes = {part: size for _, parts, _ in carriers for part, size, _ in parts}
    for _, parts, _ in carriers:
        for part, _, share in parts:
            samples[part].append(share * reference_ms * factors.get(part[0], 1.0))
    if hasattr(space, "fit_costs"):  # parts are pieces of networks, which costs of units add up to
        whole = [(design, share * reference_ms) for design, (_, _, share) in zip(plan.carriers, wholes)]
        costs, rest = space.fit_costs(samples, whole)
        parts = [{**part._asdict(), "ms": float(f"{ms:.6g}")} for part, ms in costs.items()]
    else:
        timings = {part: Timing.of(values) for part, values in sorted(samples.items())}
        costs = {part: found.median_ms for part, found in timings.items()}
        costs = space.smooth(costs) if hasattr(space, "smooth") else costs
        spill, rest = _shared_costs(wholes, costs, reference_ms)
        parts = [{**part._asdict(), "ms": round(costs[part] + spill * sizes[part], 6),
                  "p10_ms": round(found.p10_ms, 6), "p90_ms": round(found.p90_ms, 6)}
                 for part, found in timings.items()]
    content = {"format": FORMAT, "version": VERSION, "made": files.provenance(setting.device, plan.seed),
               **more, "setting": asdict(setting), "space": space.identity(), "networks_timed": len(carriers),
               "conditions": times["conditions"], "reference": plan.record_content(space.reference_design()),
               "reference_ms": reference_ms, "correction": 1.0, "rest_ms": rest, "parts": parts}

    def errors(designs, rows):
        table = Table(content)
        return [table.error_percent(design, _number(row["ratio"], 1e-9))
                for design, row in zip(designs, rows, strict=True)]

    # A common factor is left over. The errors that are then reported are those of other networks.
    first, last = len(carriers), len(carriers) + len(plan.to_correct)
    content["correction"] = 1 / (1 + statistics.median(errors(plan.to_correct, rows[first:last])) / 100)
    return content | {"check": {
        "networks": len(plan.to_check), **summary(errors(plan.to_check, rows[last:])),
        "uncertainty": 100 * statistics.median(_number(row["uncertainty"], 0.0) for row in rows[last:])}}


def write_network(network: nn.Module, setting: Setting, path: str | Path) -> None:
    """Write a network as an ONNX file that timing.py times; its input has the shape of the setting."""
    with prepared(network, setting) as (traced, _):
        files.write_file(path, lambda temporary: temporary.write_bytes(traced.content))


def write_networks(plan: Plan, folder: Path) -> None:
    """Write what another device needs to time a plan: networks in ONNX, what to time, and timing.py."""
    from export import SharedWeights
    weights, rows = SharedWeights(folder), []
    designs = [plan.space.reference_design(), *plan.designs]
    for index, design in enumerate(track(designs, "networks", len(designs), unit="network"), -1):
        row = {"file": f"network-{index:03d}.onnx" if index >= 0 else "reference.onnx", **plan.how(index)}
        with prepared(plan.space.network(design), plan.setting) as (traced, _):
            if 0 <= index < len(plan.carriers):
                modules = [part for _, part in plan.space.parts(traced.network)]
                row |= {"parts": [traced.paths[module] for module in modules], "fused": traced.fused}
            weights.write(traced.content, row["file"])
        rows.append(row)
    weights.finish()
    files.write_file(folder / "timing.py", lambda temporary: shutil.copy(timing.__file__, temporary))
    files.write_json(folder / timing.NETWORKS, {
        "format": timing.FORMAT_OF_NETWORKS, "version": timing.VERSION,
        "made": files.provenance(device_name("cpu"), plan.seed), **plan.to_dict(),
        "reference": rows[0]["file"], "networks": rows[1:]})


def read_times(path: str | Path) -> dict:
    """The content of a table, from the times that timing.py took on another device."""
    remedy = "time the networks again with timing.py"
    content = files.read_json(path, timing.FORMAT, timing.VERSION, remedy)
    files.check_fields(path, content, {"made": {"device": str, "runtime": str, "date": str}, "plan": {
        "setting": dict, "space": dict, "rounds": range(1, 65537), "seed": range(2**63), "designs": str},
        "conditions": dict, "networks": [dict]})
    with files.reading(path):
        made = content["made"]
        plan = Plan.from_dict(content["plan"], device=made["device"], runtime=made["runtime"])
        return Table(table_from(plan, content, timed=made)).content


def _shared_costs(carriers: list[tuple], times: dict, reference_ms: float) -> tuple[float, dict[str, float]]:
    """What parts cost each other, in ms per parameter, and the rest of each kind of network, in ms.
    The more weights a network has, the more of them have left the cache when they are needed: without this,
    large networks are predicted 8 % too fast. Both are by least squares of the relative errors. Parts had
    some of this cost when they were timed, so rests are mostly negative."""
    names = sorted({kind for kinds, _, _ in carriers for kind in kinds})
    whole, left, rows = [], [], []
    for kinds, parts, share in carriers:
        whole.append(share * reference_ms)
        left.append(whole[-1] - sum(times[part] for part, _, _ in parts))
        rows.append([*(kinds.count(name) for name in names), sum(size for _, size, _ in parts) / 1e6])
    whole, left, rows = (torch.tensor(values, dtype=torch.float64) for values in (whole, left, rows))
    spill = 0.0
    if len(rows) >= 20:  # fewer say nothing about a slope
        solution = torch.linalg.lstsq(rows / whole[:, None], (left / whole)[:, None]).solution
        spill = max(0.0, solution[-1].item())
    left -= spill * rows[:, -1]
    rest = {name: left[rows[:, index] > 0].median().item() for index, name in enumerate(names)}
    return spill / 1e6, {name: round(ms, 6) for name, ms in rest.items()}


def _group_factors(carriers: list[tuple], stiffness: float = 1e-3) -> dict[str, float]:
    """How much longer each group of parts (Part's first field) takes in whole networks than timed as parts.
    Ridge regression of the relative errors towards one common factor: few networks are enough, and groups
    with a small share are not fitted to noise."""
    groups = sorted({part[0] for _, parts, _ in carriers for part, _, _ in parts})
    shares = torch.tensor([[sum(share for part, _, share in parts if part[0] == group) / whole
                            for group in groups] for _, parts, whole in carriers], dtype=torch.float64)
    common, pull = 1 / shares.sum(1).median(), stiffness ** 0.5 * torch.eye(len(groups), dtype=shares.dtype)
    target = torch.cat((torch.ones_like(shares[:, 0]), common * pull.sum(1)))
    factors = torch.linalg.lstsq(torch.cat((shares, pull)), target[:, None]).solution[:, 0].clamp(min=0.05)
    return dict(zip(groups, factors.tolist()))


def part_macs(space, size: int) -> tuple[dict, float]:
    """Million multiply-accumulates of each part of a space and of the rest, for size x size pixels."""
    costs: dict = {}
    for design in space.carriers(random.Random(0), 1):
        network, counted = space.network(design).to("meta").eval(), {}

        def count(module, inputs, output):
            counted[module] = output.shape[-2:].numel() * module.weight.numel() / 1e6

        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        with torch.no_grad():  # on meta tensors: nothing is computed
            network(torch.empty(1, getattr(network, "channels", 3), size, size, device="meta"))
        macs = [(part, sum(counted.get(inner, 0.0) for inner in module.modules()))
                for part, module in space.parts(network)]
        costs |= macs
    return costs, sum(counted.values()) - sum(value for _, value in macs)


# --- Using a table ------------------------------------------------------------------------------------------

@torch.no_grad()
def fit_state(supernet, costs: dict, rest: float, target: float):
    """The state of a supernet's likeliest network within a target cost, or of the cheapest one reached.
    From each start, the exchange that loses the least log probability per cost is made while there is one."""
    ends = []
    for log_p, state in supernet.starts():
        while exchanges := supernet.exchanges(state, costs, rest, target):
            loss, _, state = min(exchanges, key=lambda exchange: exchange[0] / exchange[1])
            log_p -= loss
        cost = supernet.state_cost(state, costs, rest)
        ends.append((cost <= target, log_p if cost <= target else -cost, len(ends), state))
    return max(ends)[-1]


@torch.no_grad()
def fit(supernet, costs: dict, rest: float, target: float):
    """The design of the state that `fit_state` returns."""
    return supernet.settle(fit_state(supernet, costs, rest, target), costs, rest, target)


def compare(table: Table, design, *, seconds: float = 5.0) -> dict:
    """Predicted and measured latency of one network, timed in turn with the table's reference network.
    `slowdown`: how much longer the reference takes now than when the table was made. `error_percent` compares
    multiples of the reference's time; `uncertainty_percent`: half the 95 % interval of the measured one."""
    predicted, burst = table.predict_ms(design), 3
    with prepared(table.reference_network(), table.setting) as (reference, images), \
            prepared(table.network(design), table.setting) as (network, _):
        times = interleave([lambda: reference(images), lambda: network(images)], table.setting.device_type,
                           burst=burst, min_rounds=17, seconds=seconds)
    found = Timing.of(times.times_ms[1], times.cpu_share)
    return {"predicted_ms": predicted, "measured_ms": found.median_ms, "p10_ms": found.p10_ms,
            "p90_ms": found.p90_ms, "cpu_share": found.cpu_share, "bursts": found.count,
            "runs": burst * found.count, "slowdown": times.medians_ms[0] / table.reference_ms,
            "error_percent": table.error_percent(design, times.ratios[1]),
            "uncertainty_percent": 100 * times.uncertainty[1]}


def ms_at_table(searched: dict, setting: Setting) -> float | None:
    """The milliseconds that a search measured (`latency` of its record), at the speed of its table; None
    where it measured nothing, or in another setting."""
    there = {**(searched.get("setting") or {}), "num_classes": setting.num_classes}
    measured, slowdown = (searched.get(name) or math.nan for name in ("measured_ms", "slowdown"))
    return measured / slowdown if there == asdict(setting) and 0 < measured / slowdown < 1e9 else None


def corrected(table: Table, result: dict) -> Table:
    """A table scaled by what `compare` measured; by 0.8 to 1.25, since more would be noise."""
    return table.scaled(min(max(result["measured_ms"] / result["predicted_ms"], 0.8), 1.25))


def check(table: Table, count: int, seed: int = 1000) -> dict:
    """Predict and measure `count` random networks that the table was not made from; errors are in percent."""
    rng = random.Random(seed)
    rows = [compare(table, table.random_design(rng), seconds=1.0)
            for _ in track(range(count), "check of the table", count, unit="network")]
    now = Timing.of([row["slowdown"] * table.reference_ms for row in rows],
                    timing.mean_share(row["cpu_share"] for row in rows))  # of the reference network
    return {"networks": rows, "error_percent": summary([row["error_percent"] for row in rows]),
            "uncertainty_percent": statistics.median(row["uncertainty_percent"] for row in rows),
            "reference": {**asdict(now), "slowdown": now.median_ms / table.reference_ms}}


def summary(errors: list[float]) -> dict:
    """Errors in percent, without their signs, in a few numbers."""
    sizes = sorted(map(abs, errors))
    within = {f"within_{most}_percent": 100 * sum(size <= most for size in sizes) / len(sizes)
              for most in (5, 10)}
    return {"median_percent": statistics.median(sizes), "worst_percent": sizes[-1],
            "p95_percent": sizes[math.ceil(0.95 * len(sizes)) - 1], **within}


# --- The command --------------------------------------------------------------------------------------------

def format_table(table: Table, times: bool = True) -> str:
    """A table for people, with or without the `times` of the parts."""
    setting, content = table.setting, table.content
    date = content.get("timed", content["made"])["date"]
    lines = [f"{setting.device} ({setting.device_type}, {setting.threads} threads), {setting.dtype}, "
             f"{setting.mode}, batch {setting.batch}, {setting.size} px, {date}"]
    if "check" in content:
        lines.append(f"predicted against measured on {content['check']['networks']} random networks: "
                     f"{format_error(content['check'])}")
    if "conditions" in content:  # older tables have none
        lines.append(timing.format_conditions(content["conditions"]))
    for part, ms in table.costs.items() if times else ():
        fields_of_part = ", ".join(f"{name} {value}" for name, value in part._asdict().items())
        lines.append(f"{ms:>9.3f} ms  {fields_of_part}")
    rest = ", ".join(f"{kind} {table.rest([kind]):.3f} ms" for kind in table.rest_ms)
    return "\n".join([*lines, f"all else: {rest}"])


def format_result(result: dict) -> str:
    """What `compare` or `check` returned, for people."""
    lines = [" predicted   measured         10-90 % slowdown   error known to"]
    for row in result.get("networks", [result]):
        spread = f"{row['p10_ms']:.2f}-{row['p90_ms']:.2f}"
        lines.append(f"{row['predicted_ms']:>7.3f} ms {row['measured_ms']:>7.3f} ms {spread:>15} "
                     f"{row['slowdown']:>8.2f} {row['error_percent']:>+6.1f}% "
                     f"{row['uncertainty_percent']:>7.1f}%")
    if "networks" in result:
        lines.append(f"error {format_error(result['error_percent'])}")
    elif timing.is_another_speed(result["slowdown"]):
        lines.append(f"measured {timing.format_ms(result['measured_ms'], result['slowdown'])}")
    return "\n".join([*lines, *timing.notes(result.get("reference", result))])


def format_error(error: dict) -> str:
    shares = [f", {error[name]:.0f} % within {most} %" for most in (5, 10)  # older tables have none
              if (name := f"within_{most}_percent") in error]
    return (f"median {error['median_percent']:.1f} %, 95th percentile {error['p95_percent']:.1f} %, "
            f"worst {error['worst_percent']:.1f} %" + "".join(shares))


def build_parser() -> argparse.ArgumentParser:
    count = dict(type=whole(1, 65536), metavar="N")
    parser = Parser(
        prog="latency.py", usage="python latency.py [options]  (--help lists them)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Build the latency table of this device, or compare a table with measurements.",
        epilog="examples:\n  python latency.py --output latency.json\n"
               "  python latency.py --device cuda --size 224 --classes 100 --output gpu.json\n"
               "  python latency.py --table latency.json --check 20\n"
               "  python latency.py --mode onnx --write-networks board")
    add = parser.add_argument_group("what to do", "without these flags, a table is built").add_argument
    add("--output", default="latency.json", metavar="FILE", help="table to write (default: %(default)s)")
    add("--table", metavar="FILE", help="table to print, check or compare (default: build one)")
    add("--check", **count, help="predict and measure N random networks of --table (default: no check)")
    add("--arch", metavar="FILE", help="predict and measure the network of an arch.json (default: none)")
    add("--model", metavar="NAME", help="only measure a model that python registry.py lists (default: none)")
    add("--write-networks", metavar="DIR", help="for a table of another device, with --mode onnx: write the "
        "networks that are timed, and timing.py, which times them there (default: time them here)")
    add("--read-times", metavar="FILE", help="make the table from the times.json that timing.py wrote on "
        "another device (default: time the networks here)")
    add("--json", action="store_true", help="print JSON (default: text)")
    add = parser.add_argument_group("setting", "what a table holds for, besides the space").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu (default: cuda if there is one)")
    add("--threads", type=whole(1, 4096), metavar="N", default=1,
        help="threads on a CPU; 1 is disturbed least (default: %(default)s)")
    add("--size", **count, default=64, help="height and width of the images, pixels (default: %(default)s)")
    add("--batch", **count, help="images per batch (default: 32 on CUDA, 1 on a CPU)")
    add("--classes", **count, default=10, help="classes of the head (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="number format (default: %(default)s)")
    add("--mode", choices=MODES, default="eager", help="form of the network: as trained; batch norms folded; "
        "that by torch.compile, or in a CUDA graph; onnx: through onnxruntime (default: %(default)s)")
    add = parser.add_argument_group("space", "the networks that a table is for").add_argument
    add("--method", choices=("tfnas",) if MISSING else tuple(registry.METHODS), default="tfnas",
        help="search method (default: %(default)s)")
    add("--space", type=int, choices=(4, 6, 8), default=8,
        help="of tfnas: operations per block; a table of 8 serves all (default: %(default)s)")
    add("--min-width", type=number(1, 3), default=1.25, metavar="X",
        help="of tfnas: smallest mid channels, in multiples of a block's input (default: %(default)s)")
    add("--network", metavar="NAME", help="of other methods: network, as in search.py (default: the first)")
    add("--width", **count, help="of other methods: base width, channels (default: the network's own)")
    add("--grey", action=argparse.BooleanOptionalAction, help="of other methods: images of one channel, "
        "or with --no-grey of three (default: as in the method's own search of a folder)")
    add("--rounds", **count, default=3, help="networks that hold each part, at least (default: %(default)s)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the random networks (default: 0)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args, start = parser.parse_args(argv), time.perf_counter()
    if (args.check or args.arch) and not args.table:
        parser.error("--check and --arch compare with a table: name it with --table FILE.")
    if args.write_networks and args.mode != "onnx":
        parser.error("--write-networks is for --mode onnx.")
    if MISSING:
        parser.error(f"this needs the other files of the project, and {MISSING.name} is not here.")
    with Command(parser):
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):  # forecasts are not JSON
            setting = this_setting(check_device(args.device), size=args.size, num_classes=args.classes,
                                   batch=args.batch, threads=args.threads, dtype=args.dtype, mode=args.mode)
            if args.table:
                table = load_table(args.table)
                text, result = format_table(table), table.content
                if args.check or args.arch:
                    here = device_name(check_device(table.setting.device_type))
                    require_setting(table, replace(table.setting, device=here), args.table)
                    result = (check(table, args.check) if args.check else
                              compare(table, table.read_record(files.load_record(args.arch))))
                    text = format_result(result)
            elif args.model:
                record = registry.named_record(registry.model_name(args.model), args.classes, {})
                network = registry.build_network(record)
                registry.check_fits(network, args.model, args.size)
                time_ms = measure_network(network, setting)
                result = {"model": args.model, **asdict(time_ms), "setting": asdict(setting)}
                text = "\n".join([f"{args.model}: {time_ms.median_ms:.3f} ms per batch of {setting.batch} at "
                                  f"{args.size} px, {args.mode}, on {setting.device}",
                                  *timing.notes(asdict(time_ms))])
            elif args.write_networks:
                space, folder = space_of(args), Path(args.write_networks)
                files.check_folder(folder / timing.NETWORKS)
                setting = replace(setting, num_classes=getattr(space, "num_classes", 0))
                plan = Plan(setting, space, args.rounds, args.seed)
                write_networks(plan, folder)
                size = sum(path.stat().st_size for path in folder.iterdir())
                result = {"networks": len(plan.designs), "bytes": size, "folder": str(folder)}
                text = (f"{folder}: {len(plan.designs)} networks, {size / 1e6:.0f} MB\n"
                        "next, in a copy of the folder on the device:\n  pip install numpy onnxruntime\n"
                        f"  python timing.py\nthen, with its {timing.TIMES}, here:\n"
                        f"  python latency.py --read-times {timing.TIMES} --output table.json")
            else:
                files.check_folder(args.output)  # fail before the work
                if args.read_times:
                    result = read_times(args.read_times)
                else:
                    space = space_of(args)
                    setting = replace(setting, num_classes=getattr(space, "num_classes", 0))
                    result = build_table(setting, space, args.rounds, args.seed)
                files.write_json(args.output, result)
                took = "" if args.read_times else f", timed in {time.perf_counter() - start:.0f} s"
                text = (f"{format_table(Table(result), times=False)}\n{args.output}: "
                        f"{len(result['parts'])} parts{took}")
        say(json.dumps(result, indent=1) if args.json else text)


if __name__ == "__main__":
    main()
