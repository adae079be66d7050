"""Times the operations of a search space on your device and predicts the latency of whole networks.

    python latency.py --output latency.json                  # this device, the space of 8 operations, 64 x 64 pixels
    python latency.py --size 224 --batch 32 --output gpu.json
    python latency.py --table latency.json --check 20        # predicted against measured, on 20 random networks
    python latency.py --table latency.json --arch runs/search/arch.json

Reads and writes the latency table (JSON, format "joint-latency"). Operations are timed inside whole networks, not alone:
a lone operation finds its weights in the cache, and sums of such times are far too low. `measure` and `measure_network`
work on any module; this file needs torch only and works when copied alone (building a table needs models.py too).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import json
import math
import platform
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

FORMAT, PARTS_FORMAT, VERSION = "joint-latency", "joint-latency-parts", 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """The median and the spread (10th and 90th percentile) of `count` runs, in milliseconds per batch."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    count: int

    @classmethod
    def of(cls, samples_ms: list[float]) -> Timing:
        ordered = sorted(samples_ms)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


@dataclass(frozen=True)
class Setting:
    """What a latency depends on besides the network: the identity of a table."""

    device: str  # name of the GPU or CPU
    device_type: str  # "cuda" or "cpu"
    threads: int  # of torch on a CPU while timing; 0 on a GPU
    dtype: str
    batch: int
    size: int  # pixels, height and width
    memory_format: str  # "channels_last" or "contiguous"
    num_classes: int
    mode: str = "eager"  # of models.fast: "eager", "folded", "compile" or "graph"


def device_name(device: torch.device | str) -> str:
    """The name of the GPU, or of the CPU model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def this_setting(device: str, *, size: int, num_classes: int, batch: int | None = None, threads: int = 1,
                 dtype: str = "float32", memory_format: str = "channels_last", mode: str = "eager") -> Setting:
    """A setting on this device. Batch: the papers' protocol, 32, on a GPU; one image at a time on a CPU."""
    kind = torch.device(device).type
    batch = (32 if kind == "cuda" else 1) if batch is None else batch
    return Setting(device_name(device), kind, threads if kind == "cpu" else 0, dtype, batch, size, memory_format,
                   num_classes, mode)


# ---------------------------------------------------------------------------------------------------------------
# Timing


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(run, device: torch.device | str, *, warmup: int = 5, repeats: int = 30, seconds: float = 0.0) -> Timing:
    """Time `run()` on a device: at least `repeats` runs and `seconds`, after `warmup` runs, synchronised."""
    device = torch.device(device)
    for _ in range(warmup):
        run()
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < repeats or time.perf_counter() < end:
        _synchronize(device)
        start = _now(device)
        run()
        stop = _now(device)
        _synchronize(device)
        samples.append(_elapsed_ms(start, stop))
    return Timing.of(samples)


def _now(device: torch.device):
    """A mark in time: on CUDA an event on the stream, which the device passes when the work before it is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start, stop) -> float:
    return (stop - start) * 1e3 if isinstance(start, float) else start.elapsed_time(stop)


def peak_memory_mib(device: torch.device | str) -> float | None:
    """Peak memory in MiB so far: what torch allocated on a GPU, or the resident size of this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@dataclass(frozen=True)
class Interleaved:
    """Several things timed in turn: each one's own times, and its time as a multiple of the first one's."""

    timings: list[Timing]
    ratios: list[float]  # medians over rounds of (time / time of the first in the same round)
    uncertainty: list[float]  # half the 95 % interval of the ratio, relative
    rounds: int


def interleave(runs: list, device: torch.device | str, *, burst: int = 3, warmup: int = 1, min_rounds: int = 5,
               seconds: float = 0.0, tolerance: float = 0.01) -> Interleaved:
    """Time `runs` in turn, a burst each, so that what disturbs the device disturbs all of them alike.

    Goes on until `min_rounds` are done and every ratio is known to `tolerance`, or until `seconds` have passed. The
    interval of a median is 1.58 * interquartile range / sqrt(rounds) (McGill, Tukey and Larsen 1978).
    """
    end = time.perf_counter() + seconds
    samples: list[list[float]] = [[] for _ in runs]
    ratios: list[list[float]] = [[] for _ in runs]
    while True:
        now = [measure(run, device, warmup=warmup, repeats=burst).median_ms for run in runs]
        for index, ms in enumerate(now):
            samples[index].append(ms)
            ratios[index].append(ms / now[0])
        rounds = len(ratios[0])
        if rounds < min_rounds:
            continue
        centres = [statistics.median(values) for values in ratios]
        uncertainty = [_half_interval(values) / centre for values, centre in zip(ratios, centres)]
        if max(uncertainty) <= tolerance or time.perf_counter() >= end:
            return Interleaved([Timing.of(values) for values in samples], centres, uncertainty, rounds)


def _half_interval(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return 1.58 * (high - low) / math.sqrt(len(values))


@contextmanager
def prepared(network: nn.Module, setting: Setting):
    """Yield (a copy of the network, input) in inference form and in a setting; afterwards threads are as before.

    One thread by default: at batch 1 a second one gains little, and where anything else runs on the cores, OpenMP's threads
    wait for each other so long that a network can seem hundreds of times slower.
    """
    layout = torch.channels_last if setting.memory_format == "channels_last" else torch.contiguous_format
    threads = torch.get_num_threads()
    how = dict(device=setting.device_type, dtype=DTYPES[setting.dtype])
    network = copy.deepcopy(network).to(**how, memory_format=layout).eval()
    shape = setting.batch, getattr(network, "channels", 3), setting.size, setting.size
    images = torch.rand(shape, **how).contiguous(memory_format=layout)
    if setting.threads:
        torch.set_num_threads(setting.threads)
    try:
        with torch.inference_mode():
            if setting.mode != "eager":
                from models import fast

                network = fast(network, setting.mode, images)
            yield network, images
    finally:
        torch.set_num_threads(threads)


def measure_network(network: nn.Module, setting: Setting, *, warmup: int = 10, repeats: int = 50,
                    seconds: float = 1.0) -> Timing:
    """Milliseconds per batch through a network in inference form, in a setting (see `this_setting`)."""
    with prepared(network, setting) as (network, images):
        return measure(lambda: network(images), setting.device_type, warmup=warmup, repeats=repeats, seconds=seconds)


class PartTimer:
    """Times the named parts of a network inside its forward pass, by hooks; on CUDA by events on the stream."""

    def __init__(self, parts: dict[str, nn.Module], device: torch.device):
        self.parts, self.device = parts, device
        self.marks: list[tuple[str, object, object]] = []

    def __enter__(self) -> PartTimer:
        starts = {}

        def before(name):
            def hook(module, inputs):
                starts[name] = _now(self.device)
            return hook

        def after(name):
            def hook(module, inputs, output):
                self.marks.append((name, starts[name], _now(self.device)))
            return hook

        self.handles = [part.register_forward_pre_hook(before(name)) for name, part in self.parts.items()]
        self.handles += [part.register_forward_hook(after(name)) for name, part in self.parts.items()]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def medians_ms(self) -> dict[str, float]:
        """The median of each part over the forward passes so far."""
        _synchronize(self.device)
        samples: dict[str, list[float]] = {name: [] for name in self.parts}
        for name, start, end in self.marks:
            samples[name].append(_elapsed_ms(start, end))
        return {name: statistics.median(values) for name, values in samples.items()}


def time_parts(network: nn.Module, parts: dict, images: torch.Tensor, device: torch.device, runs: int,
               queued: bool = False) -> dict:
    """The median milliseconds of each of the named `parts` of a network, inside `runs` forward passes.

    `queued`: on CUDA, let the device wait until the pass is in its queue, so that what is timed is the work and not the
    launching of it, as in a CUDA graph.
    """
    with PartTimer(parts, device) as timer:
        for _ in range(runs):
            if queued and device.type == "cuda":
                torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
            network(images)
    return timer.medians_ms()


# ---------------------------------------------------------------------------------------------------------------
# The table


def _key(block) -> tuple:
    """All of a block but its width. The stage gives the resolution."""
    return (block.stage, block.in_channels, block.out_channels, block.kernel_size, block.stride, block.se_channels,
            block.activation)


KEY_FIELDS = ("stage", "in_channels", "out_channels", "kernel_size", "stride", "se_channels", "activation")


@contextmanager
def reading_a_table():
    """Whatever its content makes fail within is a ValueError of one sentence."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"The latency table is not valid: the field {error} is missing.") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"The latency table is not valid: {' '.join(str(error).split()).rstrip('.')}.") from None


class LatencyTable:
    """Latencies of the parts of a network: `predict_ms(arch)` adds them up.

    `operations` is a list of records with the fields of KEY_FIELDS, `mid_channels` (ascending) and `ms` (positive, never
    decreasing); widths between them are interpolated linearly. `fixed_ms[model]` holds stem, stage 2, decoder, head and
    the rest of a "cnas", "dnas" or "dcnas"; the rest alone may be negative (see `_add_what_is_shared`). All are multiplied by
    `correction`, which is 1 unless a search has set it to what it measured on whole networks.
    """

    def __init__(self, content: dict):
        """From the JSON object of a table file; raises ValueError in one sentence when something in it is wrong."""
        self.content = content
        with reading_a_table():
            self.setting = Setting(**content["setting"])
            self.fixed_ms = {model: {part: (_number if part == "rest" else _positive)(ms) for part, ms in parts.items()}
                             for model, parts in content["fixed_ms"].items()}
            self.reference_ms, self.correction = _positive(content["reference_ms"]), _positive(content["correction"])
            self.space, self.min_width, self.reference = content["space"], content["min_width"], content["reference"]
            if set(self.fixed_ms) != {"cnas", "dnas", "dcnas"} or not all(self.fixed_ms.values()):
                raise ValueError("fixed_ms must have the parts of cnas, dnas and dcnas")
            self.curves = {}
            for row in content["operations"]:
                widths, ms = row["mid_channels"], [_positive(value) for value in row["ms"]]
                rising = all(a < b for a, b in zip(widths, widths[1:]))
                if not widths or len(widths) != len(ms) or not rising or sorted(ms) != ms:
                    raise ValueError("widths and times must be lists of the same length that do not decrease")
                self.curves[tuple(row[field] for field in KEY_FIELDS)] = (widths, ms)

    def scaled(self, factor: float) -> LatencyTable:
        """The same table with all times multiplied."""
        return LatencyTable({**self.content, "correction": self.correction * factor})

    @property
    def hash(self) -> str:
        """Identifies the table in the records of what was searched with it."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    def block_ms(self, block) -> float:
        """The latency of one searched block; raises ValueError when the table does not cover it."""
        curve = self.curves.get(_key(block))
        if curve is None or not curve[0][0] <= block.mid_channels <= curve[0][-1]:
            raise ValueError(f"The latency table does not cover {block}.")
        widths, ms = curve[0], [value * self.correction for value in curve[1]]
        for left in range(len(widths) - 1):
            if block.mid_channels <= widths[left + 1]:
                share = (block.mid_channels - widths[left]) / (widths[left + 1] - widths[left])
                return ms[left] + share * (ms[left + 1] - ms[left])
        return ms[0]  # a curve of one width

    def base_ms(self, model: str) -> float:
        """The latency of everything that is not searched."""
        if model == "dcnas-seq":
            return self.base_ms("dnas") + self.base_ms("cnas")
        return sum(self.fixed_ms[model].values()) * self.correction

    def reference_network(self) -> nn.Module:
        """The network that tells how fast the device is at the moment."""
        import models

        return models.Network(models.named_arch(self.reference, self.setting.num_classes))

    def network(self, arch) -> nn.Module:
        """The network of a record of this space."""
        import models

        return models.make_network(arch)

    def random_arch(self, rng):
        """A record drawn from the space."""
        import models

        return models.random_arch("dcnas", self.space, rng, self.setting.num_classes, self.min_width)

    def read_arch(self, record: dict):
        """What arch.json holds; ValueError where it is of another search method."""
        import models

        if record["method"] != "tfnas":
            raise ValueError(f"This latency table is for the networks of TF-NAS, and the record is of {record['method']}.")
        return models.Arch.from_dict(record)

    def command(self, setting: Setting) -> str:
        """The command that makes such a table in a setting."""
        return table_command(setting, f"--classes {setting.num_classes} --space {self.space} --min-width {self.min_width:g}")

    def predict_ms(self, arch) -> float:
        """Milliseconds per batch of a whole network, in the table's setting; ValueError for what the table does not hold."""
        if arch.decoder != "conv":
            raise ValueError(f"The latency table holds the decoder of convolutions, not {arch.decoder}; measure that network "
                             "with eval.py.")
        return self.base_ms(arch.model) + sum(passes(arch.model, block.stage) * self.block_ms(block)
                                              for block in arch.blocks if block.stage > 2)


def passes(model: str, stage: int) -> int:
    """How often an image goes through a stage of the encoder: not through the tail of a "dnas", twice through stages 2 to 6
    of a "dcnas-seq", once else."""
    if stage > 6:
        return int(model != "dnas")
    return 2 if model == "dcnas-seq" else 1


def _number(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e9 < value < 1e9:
        raise ValueError(f"a time must be a number of milliseconds, not {value!r}")
    return float(value)


def _positive(value) -> float:
    if _number(value) <= 0:
        raise ValueError(f"a time must be a positive number of milliseconds, not {value!r}")
    return float(value)


def _non_decreasing(values: list[float]) -> list[float]:
    """The nearest sequence (least squares) that never decreases: pool adjacent violators."""
    pools: list[list[float]] = []  # [sum, count]
    for value in values:
        pools.append([value, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    return [total / count for total, count in pools for _ in range(count)]


def _named_parts(network) -> dict[str, nn.Module]:
    """The parts of a models.Network that the table knows: stem, one per block, decoder, head."""
    parts = {"stem": network.stem, **{f"block {index}": block for index, block in enumerate(network.blocks())}}
    return parts | {name: getattr(network, name) for name in ("decoder", "head") if getattr(network, name) is not None}


def build_table(setting: Setting, *, space: int, min_width: float, rounds: int = 3, seed: int = 0) -> dict:
    """Time the space on this device and return the content of a table file.

    Every operation of every block shape is timed at several widths inside whole networks ("carriers") that together hold
    each of them about `rounds` times, so that caches and the launch queue are in the state that they have in use. With each
    carrier a fixed reference network is timed in turn, and the carrier's times are taken as multiples of the reference's: a
    noisy neighbour cancels out.

    Each carrier is also timed as a whole, which says what parts cost each other (`_add_what_is_shared`). A compiled network
    or a CUDA graph has no parts to time. There the parts are timed in the folded network, and whole networks in the mode
    itself say by how much each group of parts differs (`_group_factors`).
    """
    import random

    import models
    from tqdm import tqdm

    device, num_classes = torch.device(setting.device_type), setting.num_classes
    has_parts = setting.mode in ("eager", "folded")
    slow_to_make = setting.mode == "compile"
    carriers = _carriers(random.Random(seed), space, num_classes, min_width, rounds)
    in_parts = setting if has_parts else replace(setting, mode="folded")
    reference_network = models.Network(models.named_arch(REFERENCE, num_classes))
    runs = []  # (arch, ms of each part, ms of the whole or None), all at the pace of the reference
    samples = []
    with prepared(reference_network, in_parts) as (reference, images), \
            prepared(reference_network, setting) as (whole_reference, _):
        measure(lambda: whole_reference(images), device, seconds=1.0)  # warm the clocks
        for index, arch in enumerate(tqdm(carriers, desc="latency table", unit="network", disable=None, leave=False)):
            carrier, times = models.Network(arch), None
            if not slow_to_make or index < 2 * rounds:
                with prepared(carrier, setting) as (network, _):
                    times = interleave([lambda: whole_reference(images), lambda: network(images)], device, min_rounds=3)
                samples.append(times.timings[0].median_ms)
            with prepared(carrier, in_parts) as (network, _):
                pace = measure(lambda: reference(images), device, warmup=1, repeats=5).median_ms
                parts = time_parts(network, _named_parts(network), images, device, runs=7, queued=not has_parts)
            runs.append((arch, {name: ms / pace for name, ms in parts.items()}, times and times.ratios[1]))
    reference_ms = statistics.median(samples)
    runs = [(arch, {name: share * reference_ms for name, share in parts.items()}, whole and whole * reference_ms)
            for arch, parts, whole in runs]
    factors = {} if has_parts else _group_factors(runs)

    fixed: dict[str, dict[str, list[float]]] = {}
    searched: dict[tuple, dict[int, list[float]]] = {}
    for arch, parts, whole in runs:
        parts = {name: ms * factors.get(_group(arch, name), 1.0) for name, ms in parts.items()}
        known = fixed.setdefault(arch.model, {})
        for name in ("stem", "decoder", "head"):
            if name in parts:
                known.setdefault(name, []).append(parts[name])
        for index, block in enumerate(arch.blocks):
            ms = parts[f"block {index}"]
            if block.stage == 2:
                known.setdefault("stage_2", []).append(ms)
            else:
                searched.setdefault(_key(block), {}).setdefault(block.mid_channels, []).append(ms)
    operations = []
    for key in sorted(searched):
        widths = sorted(searched[key])
        timings = [Timing.of(searched[key][width]) for width in widths]
        operations.append({**dict(zip(KEY_FIELDS, key)), "mid_channels": widths,
                           "ms": [round(ms, 6) for ms in _non_decreasing([t.median_ms for t in timings])],
                           "p10_ms": [round(t.p10_ms, 6) for t in timings],
                           "p90_ms": [round(t.p90_ms, 6) for t in timings]})
    content = {"format": FORMAT, "version": VERSION, "made": models.provenance(setting.device, seed),
               "setting": asdict(setting), "space": space, "min_width": min_width, "networks_timed": len(carriers),
               "reference": REFERENCE, "reference_ms": reference_ms, "correction": 1.0,
               "reference_spread": asdict(Timing.of(samples)),
               "fixed_ms": {model: {part: round(statistics.median(ms), 6) for part, ms in parts.items()}
                            for model, parts in sorted(fixed.items())},
               "operations": operations}
    _add_what_is_shared(content, [(arch, whole) for arch, _, whole in runs if whole is not None])
    # What is left over is a factor that all networks share; the errors then reported are of networks it was not fitted on.
    fitted = check(LatencyTable(content), count=(1 if slow_to_make else 4) * rounds, seed=seed + 1)
    content["correction"] = 1 / (1 + statistics.median(row["error_percent"] for row in fitted["networks"]) / 100)
    result = check(LatencyTable(content), count=(2 if slow_to_make else 7) * rounds, seed=seed + 2)
    return content | {"check": {"networks": len(result["networks"]), **result["error_percent"],
                                "uncertainty": result["uncertainty_percent"]}}


def _carriers(rng, space: int, num_classes: int, min_width: float, rounds: int) -> list:
    """Networks that together hold every operation of every block shape at every width of its grid `rounds` times or more.

    They are DC-NAS, and some of them C-NAS and D-NAS too for their fixed parts: what surrounds a part changes its time.
    """
    import models

    positions = models.searched_positions("dcnas")
    choices = {shape: _width_grid(shape, models.SPACES[space], min_width) for shape in set(positions)}
    carriers = []
    for _ in range(rounds):
        decks: dict = {}
        for _ in range(max(len(choice) for choice in choices.values())):
            blocks = []
            for shape in positions:
                if not decks.get(shape):
                    decks[shape] = rng.sample(choices[shape], len(choices[shape]))
                blocks.append(decks[shape].pop())
            carriers.append(models.make_arch("dcnas", blocks, num_classes))
    some = carriers[:4 * rounds]  # each kind among the first: where a network takes long to make no more are timed whole
    return [arch.with_model(model) for arch in some for model in ("cnas", "dnas", "dcnas")] + carriers[len(some):]


def _weights(block) -> int:
    """Weights of a block that change with its width."""
    return block.mid_channels * (block.in_channels + block.out_channels + block.kernel_size ** 2 + 2 * block.se_channels)


def _add_what_is_shared(content: dict, runs: list) -> None:
    """Complete a table of parts by whole networks, runs of (arch, ms): what a block costs the others, and the rest.

    The more weights a network has, the more of them have left the cache when their turn comes: each part is slower in a large
    network than in a small one, by its neighbours' fault. So a block's time gets `spill` ms per weight on top, and each model
    a "rest" (with normalisation and padding), which is mostly negative: what the parts had of this already, in the networks
    they were timed in. Both by least squares of the relative errors; without this, small networks are predicted too slow and
    large ones too fast (on a CPU at 64 px by up to 8 %).
    """
    import models

    table = LatencyTable(content)
    kinds = sorted({arch.model for arch, _ in runs})
    rows = torch.tensor([[*(float(arch.model == kind) for kind in kinds), sum(_weights(block) for block in arch.blocks) / 1e6]
                         for arch, _ in runs], dtype=torch.float64)
    whole = torch.tensor([ms for _, ms in runs], dtype=torch.float64)[:, None]
    left = whole - torch.tensor([table.predict_ms(arch) for arch, _ in runs], dtype=torch.float64)[:, None]
    spill = 0.0
    if len(runs) >= 20:  # fewer say nothing about a slope
        spill = max(0.0, torch.linalg.lstsq(rows / whole, left / whole).solution[-1].item())
    left = left - spill * rows[:, -1:]
    for index, kind in enumerate(kinds):
        parts = content["fixed_ms"][kind]
        rest = left[rows[:, index] == 1].median().item()
        parts["rest"] = round(max(rest, -0.5 * sum(parts.values())), 6)
    for row in content["operations"]:
        shape = {name: row[name] for name in KEY_FIELDS}
        row["ms"] = [round(ms + spill * _weights(models.Block(mid_channels=width, **shape)) / 1e6, 6)
                     for width, ms in zip(row["mid_channels"], row["ms"])]


def _group(arch, part: str) -> str:
    """Parts that are assumed to gain alike from a mode: those of one stage, the decoder, the head."""
    return f"stage {arch.blocks[int(part[6:])].stage}" if part.startswith("block ") else part


def _group_factors(runs: list, stiffness: float = 1e-3) -> dict[str, float]:
    """How much longer each group of parts takes in whole networks than timed as parts: runs of (arch, parts, whole).

    Least squares of the relative errors, drawn towards one common factor with `stiffness` (ridge regression), so that few
    networks are enough and groups with a small share are not fitted to noise; never below a twentieth.
    """
    runs = [(arch, parts, whole) for arch, parts, whole in runs if whole is not None]
    groups = sorted({_group(arch, name) for arch, parts, _ in runs for name in parts})
    shares = torch.zeros(len(runs), len(groups), dtype=torch.float64)
    for row, (arch, parts, whole) in enumerate(runs):
        for name, ms in parts.items():
            shares[row, groups.index(_group(arch, name))] += ms / whole
    common = 1 / shares.sum(1).median()
    pull = stiffness ** 0.5 * torch.eye(len(groups), dtype=torch.float64)
    matrix = torch.cat((shares, pull))
    target = torch.cat((torch.ones(len(runs), dtype=torch.float64), common * pull.sum(1)))
    factors = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0].clamp(min=0.05)
    return dict(zip(groups, factors.tolist()))


REFERENCE = "dcnas-k3-e3"


def _width_grid(shape, operations, min_width: float) -> list:
    """The blocks to time for one block shape: its operations at their smallest, starting and largest widths and between.

    Operations without squeeze-and-excitation differ in width only, so that k3-e3 and k3-e6 share one curve.
    """
    import models

    blocks = set()
    for operation in operations:
        low, high = models.width_range(operation, shape.in_channels, min_width)
        middle = [models.round_width(factor * shape.in_channels) for factor in (2, 3, 4, 6)]
        widths = {low, high, *(width for width in middle if low < width < high)}
        blocks |= {models.fill(shape, operation, width) for width in widths}
    return sorted(blocks, key=lambda block: (_key(block), block.mid_channels))


# ---------------------------------------------------------------------------------------------------------------
# The table of another space: the parts that its own file names

PART_SPACES = ("superkernel", "hinas")  # files with a Space, a Part and a Design


def read_space(identity: dict):
    """(module, space) of what Space.identity() returned; ValueError when it is of no space."""
    method = identity.get("method") if isinstance(identity, dict) else None
    if method not in PART_SPACES:
        raise ValueError(f"the space must be one of {', '.join(PART_SPACES)}, not {method!r}")
    module = importlib.import_module(method)
    return module, module.Space(**{name: tuple(value) if isinstance(value, list) else value
                                   for name, value in identity.items() if name != "method"})


def make_space(method: str, network: str | None, width: int | None, channels: int):
    """The space of a preset (None: the first) of a method's file, at a width (None: its own); ValueError for an unknown one."""
    presets = importlib.import_module(method).PRESETS
    if (network or next(iter(presets))) not in presets:
        raise ValueError(f"There is no --network {network} of {method}; possible: {', '.join(presets)}.")
    preset = presets[network or next(iter(presets))]
    return replace(preset, channels=channels, **({} if width is None else {"base_width": width}))


def space_flags(space) -> str:
    """The flags that make_space needs for a space."""
    method = space.identity()["method"]
    for name, preset in importlib.import_module(method).PRESETS.items():
        if replace(preset, base_width=space.base_width, channels=space.channels) == space:
            return f"--method {method} --network {name} --width {space.base_width}" + (" --grey" if space.channels == 1 else "")
    return f"--method {method}"


class PartTable:
    """Latencies of the parts of a space's networks: `costs` maps each Part to ms, and `predict_ms(design)` adds them up.

    `parts` is a list of records with the fields of the space's Part and `ms`; `rest_ms` is all else, which may be negative
    (parts that were timed one by one overlap). All are multiplied by `correction`, as in LatencyTable.
    """

    def __init__(self, content: dict):
        """From the JSON object of a table file; raises ValueError in one sentence when something in it is wrong."""
        self.content = content
        with reading_a_table():
            self.setting = Setting(**content["setting"])
            self.module, self.space = read_space(content["space"])
            self.reference_ms, self.correction = _positive(content["reference_ms"]), _positive(content["correction"])
            self.reference = self.module.Design.from_dict(content["reference"])
            self.rest_ms = _number(content["rest_ms"]) * self.correction
            names = self.module.Part._fields
            self.costs = {self.module.Part(*(row[name] for name in names)): max(0.0, _number(row["ms"])) * self.correction
                          for row in content["parts"]}
            missing = self.space.possible_parts() - set(self.costs)
            if missing:
                raise ValueError(f"{len(missing)} parts are missing, {next(iter(missing))} among them")

    def scaled(self, factor: float) -> PartTable:
        """The same table with all times multiplied."""
        return PartTable({**self.content, "correction": self.correction * factor})

    hash = LatencyTable.hash

    def reference_network(self) -> nn.Module:
        """The network that tells how fast the device is at the moment."""
        return self.space.network(self.reference)

    def network(self, design) -> nn.Module:
        """The network of a design of this space."""
        return self.space.network(design)

    def random_arch(self, rng):
        """A design drawn from the space."""
        return self.space.random_design(rng)

    def read_arch(self, record: dict):
        """The design of an arch.json; ValueError where it is of another space."""
        method = self.content["space"]["method"]
        design = self.module.Design.from_dict(record["design"]) if record["method"] == method else None
        if design is None or not self.space.holds(design):
            raise ValueError("This latency table is not for the space of that record; search.py makes one for it.")
        return design

    def command(self, setting: Setting) -> str:
        """The command that makes such a table in a setting."""
        return table_command(setting, space_flags(self.space))

    def predict_ms(self, design) -> float:
        """Milliseconds per batch of a whole network, in the table's setting."""
        return self.space.cost(design, self.costs, self.rest_ms)


def build_part_table(setting: Setting, space, *, rounds: int = 2, seed: int = 0) -> dict:
    """Time a space's parts on this device and return the content of a table file.

    As build_table does: inside whole networks that together hold every part `rounds` times or more, beside a reference
    network that is timed in turn.
    """
    import random

    import models
    from tqdm import tqdm

    if setting.mode not in ("eager", "folded"):
        raise ValueError(f"The parts of this space cannot be timed in mode {setting.mode}; use --mode eager or folded.")
    device, rng = torch.device(setting.device_type), random.Random(seed)
    carriers = space.carriers(rng, rounds)
    chosen = carriers[0]
    runs, samples = [], []  # (design, [(part, ms)], ms of the whole), at the pace of the reference
    with prepared(space.network(chosen), setting) as (reference, images):
        measure(lambda: reference(images), device, seconds=1.0)  # warm the clocks
        for design in tqdm(carriers, desc="latency table", unit="network", disable=None, leave=False):
            with prepared(space.network(design), setting) as (network, _):
                times = interleave([lambda: reference(images), lambda: network(images)], device, min_rounds=3)
                samples.append(times.timings[0].median_ms)
                pace = measure(lambda: reference(images), device, warmup=1, repeats=5).median_ms
                named = dict(enumerate(space.parts(network)))
                found = time_parts(network, {name: module for name, (_, module) in named.items()}, images, device, runs=7)
            runs.append((design, [(named[name][0], ms / pace) for name, ms in found.items()], times.ratios[1]))
    reference_ms = statistics.median(samples)
    gathered: dict = {}
    for _, parts, _ in runs:
        for part, share in parts:
            gathered.setdefault(part, []).append(share * reference_ms)
    timings = {part: Timing.of(values) for part, values in sorted(gathered.items())}
    content = {"format": PARTS_FORMAT, "version": VERSION, "made": models.provenance(setting.device, seed),
               "setting": asdict(setting), "space": space.identity(), "networks_timed": len(carriers),
               "reference": chosen.to_dict(), "reference_ms": reference_ms, "correction": 1.0,
               "reference_spread": asdict(Timing.of(samples)), "rest_ms": 0.0,
               "parts": [{**part._asdict(), "ms": round(t.median_ms, 6), "p10_ms": round(t.p10_ms, 6),
                          "p90_ms": round(t.p90_ms, 6)} for part, t in timings.items()]}
    table = PartTable(content)
    left = [whole * reference_ms - table.predict_ms(design) for design, _, whole in runs]
    content["rest_ms"] = round(statistics.median(left), 6)
    result = check(PartTable(content), count=5 * rounds, seed=seed + 2)
    return content | {"check": {"networks": len(result["networks"]), **result["error_percent"],
                                "uncertainty": result["uncertainty_percent"]}}


def part_macs(space, size: int) -> tuple[dict, float]:
    """Multiply-accumulates of each part of a space's networks for one image of size x size, and of all else, in millions.

    Counted in the convolutions of networks that together hold every part, on meta tensors: nothing is computed.
    """
    import random

    costs: dict = {}
    for design in space.carriers(random.Random(0), 1):
        network = space.network(design).to("meta").eval()
        counted: dict[nn.Module, float] = {}

        def count(module, inputs, output):
            counted[module] = output.shape[-2:].numel() * module.weight.numel() / 1e6

        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        with torch.no_grad():
            network(torch.empty(1, network.channels, size, size, device="meta"))
        known = {part: sum(counted.get(module, 0.0) for module in parts.modules()) for part, parts in space.parts(network)}
        costs |= known
        rest = sum(counted.values()) - sum(known[part] for part, _ in space.parts(network))
    return costs, rest


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_table(path) -> LatencyTable | PartTable:
    """Read a table of either kind; ValueError in one sentence when it is missing, damaged or of an unknown version."""
    import models

    return read_table(models.read_json(path, (FORMAT, PARTS_FORMAT), VERSION,
                                       f"make a new one with: python latency.py --output {path}"))


def read_table(content: dict) -> LatencyTable | PartTable:
    """The table of a file's content."""
    return (PartTable if content.get("format") == PARTS_FORMAT else LatencyTable)(content)


def require_setting(table: LatencyTable | PartTable, wanted: Setting, path) -> None:
    """Raise ValueError, with the command that makes the right table, when a table was made in another setting."""
    differences = [f"{name} is {getattr(table.setting, name)!r} there and {getattr(wanted, name)!r} here"
                   for name in wanted.__dataclass_fields__ if getattr(table.setting, name) != getattr(wanted, name)]
    if differences:
        raise ValueError(f"The latency table {path} is not for this setting ({'; '.join(differences)}); make one with: "
                         f"{table.command(wanted)}")


def table_command(setting: Setting, space: str) -> str:
    """The command that makes a table for a setting and a space (its flags)."""
    threads = f"--threads {setting.threads} " if setting.threads else ""
    return (f"python latency.py --device {setting.device_type} --mode {setting.mode} {threads}--dtype {setting.dtype} "
            f"--memory-format {setting.memory_format} --batch {setting.batch} --size {setting.size} {space} --output NEW.json")


def compare(table: LatencyTable | PartTable, arch, *, seconds: float = 5.0) -> dict:
    """Predicted and measured latency of one network, timed in turn with the table's reference network.

    `measured_ms` is what the network takes now; `slowdown` is how much longer the reference takes now than when the table
    was made; `error_percent` compares the prediction with the network's time as a multiple of the reference's, in which a
    change of the device's clock cancels out; `uncertainty_percent` is half the 95 % interval of that multiple.
    """
    with prepared(table.reference_network(), table.setting) as (reference, images), \
            prepared(table.network(arch), table.setting) as (network, _):
        burst = 3
        times = interleave([lambda: reference(images), lambda: network(images)], table.setting.device_type, burst=burst,
                           min_rounds=17, seconds=seconds)
    predicted, (reference_time, timing) = table.predict_ms(arch), times.timings
    return {"predicted_ms": predicted, "measured_ms": timing.median_ms, "p10_ms": timing.p10_ms, "p90_ms": timing.p90_ms,
            "bursts": timing.count, "runs": burst * timing.count, "slowdown": reference_time.median_ms / table.reference_ms,
            "error_percent": 100 * (predicted / (times.ratios[1] * table.reference_ms) - 1),
            "uncertainty_percent": 100 * times.uncertainty[1]}


def corrected(table: LatencyTable | PartTable, result: dict) -> LatencyTable | PartTable:
    """A table scaled by what `compare` measured; not far, lest a burst of noise lead astray."""
    return table.scaled(min(max(result["measured_ms"] / result["predicted_ms"], 0.8), 1.25))


def check(table: LatencyTable | PartTable, count: int, seed: int = 1000) -> dict:
    """Predict and measure `count` random networks that the table was not made from; errors are in percent."""
    import random

    from tqdm import tqdm

    rng = random.Random(seed)
    rows = []
    for _ in tqdm(range(count), desc="check", unit="network", disable=None, leave=False):
        rows.append(compare(table, table.random_arch(rng), seconds=1.0))

    def summary(name):
        sizes = sorted(abs(row[name]) for row in rows)
        return {"median_percent": statistics.median(sizes), "p95_percent": sizes[math.ceil(0.95 * len(sizes)) - 1],
                "worst_percent": sizes[-1]}

    return {"networks": rows, "error_percent": summary("error_percent"),
            "uncertainty_percent": statistics.median(row["uncertainty_percent"] for row in rows)}


# ---------------------------------------------------------------------------------------------------------------


def format_table(table: LatencyTable | PartTable) -> str:
    """A table for people: the setting, and the times of what is searched and of all else."""
    setting, made = table.setting, table.content["made"]
    lines = [f"{setting.device} ({setting.device_type}, {setting.threads} threads), {setting.dtype}, "
             f"{setting.memory_format}, {setting.mode}, batch {setting.batch}, {setting.size} px, torch {made['torch']}, "
             f"{made['date']}"]
    if "check" in table.content:
        check = table.content["check"]
        lines.append(f"predicted against measured on {check['networks']} random networks: {format_error(check)}")
    if isinstance(table, PartTable):
        names = table.module.Part._fields
        lines.append(f"{'  '.join(names)}  ms")
        lines += ["  ".join(f"{str(value):>{len(name)}}" for name, value in zip(names, part)) + f"  {ms:.3f}"
                  for part, ms in table.costs.items()]
        return "\n".join([*lines, f"all else {table.rest_ms:.3f} ms"])
    for model, parts in table.fixed_ms.items():
        text = ", ".join(f"{name} {ms:.3f}" for name, ms in parts.items())
        lines.append(f"{model + ' fixed parts':<20} {sum(parts.values()):7.3f} ms = {text}")
    lines.append(f"{'stage':>5} {'in':>4} {'out':>4} {'kernel':>6} {'stride':>6} {'SE':>4}   ms at mid channels")
    for key, (widths, ms) in table.curves.items():
        stage, in_channels, out_channels, kernel, stride, se, _ = key
        curve = "  ".join(f"{width}: {value:.3f}" for width, value in zip(widths, ms))
        lines.append(f"{stage:>5} {in_channels:>4} {out_channels:>4} {kernel:>6} {stride:>6} {se or '-':>4}   {curve}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    from data import number, whole
    from models import MODES, model_name

    parser = argparse.ArgumentParser(
        prog="latency.py", usage="python latency.py [options]  (--help lists them)",
        description="Build the latency table of this device, or compare a table with measurements.",
        epilog="examples:\n  python latency.py --output latency.json\n"
               "  python latency.py --device cuda --size 224 --classes 100 --output gpu.json\n"
               "  python latency.py --table latency.json --check 20",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    build = parser.add_argument_group("build a table")
    build.add_argument("--output", default="latency.json", metavar="FILE", help="the table to write (default: %(default)s)")
    build.add_argument("--space", type=int, choices=(4, 6, 8), default=8,
                       help="operations per block; a table of 8 serves all (default: %(default)s)")
    build.add_argument("--device", default=default_device(), help="cuda or cpu (default: cuda if there is one)")
    build.add_argument("--threads", type=whole(1, 65536), default=1, metavar="N",
                       help="threads of torch on a CPU (default: %(default)s, what a quiet and a busy machine agree on)")
    build.add_argument("--size", type=whole(1, 65536), default=64, metavar="PIXELS",
                       help="height and width of the images (default: %(default)s)")
    build.add_argument("--batch", type=whole(1, 65536), metavar="N",
                       help="images per batch (default: 32 on CUDA, 1 on a CPU)")
    build.add_argument("--classes", type=whole(1, 65536), default=10, metavar="N",
                       help="classes of the head (default: %(default)s)")
    build.add_argument("--dtype", choices=DTYPES, default="float32", help="number format (default: %(default)s)")
    build.add_argument("--memory-format", choices=("channels_last", "contiguous"), default="channels_last",
                       help="memory layout (default: %(default)s)")
    build.add_argument("--mode", choices=MODES, default="eager",
                       help="form of the network: eager; folded: batch norms folded into convolutions; compile: that through "
                            "torch.compile; graph: that in a CUDA graph (default: %(default)s)")
    build.add_argument("--min-width", type=number(1, 3), metavar="X",
                       help="smallest mid channels, in multiples of a block's input (default: that of search.py, 1.25)")
    build.add_argument("--method", choices=("tfnas", *PART_SPACES), default="tfnas",
                       help="the search that the table is for (default: %(default)s)")
    build.add_argument("--network", metavar="NAME", help="of superkernel and hinas: the network, as in search.py")
    build.add_argument("--width", type=whole(1, 1024), metavar="N", help="of superkernel and hinas: its width (default: its own)")
    build.add_argument("--grey", action="store_true", help="of superkernel and hinas: for images of one channel")
    build.add_argument("--rounds", type=whole(1, 65536), default=3, metavar="N",
                       help="networks that hold each operation; more is slower and steadier (default: %(default)s)")
    build.add_argument("--seed", type=whole(0), default=0, help="for the random networks (default: %(default)s)")
    use = parser.add_argument_group("use a table")
    use.add_argument("--table", metavar="FILE", help="the table to print, check or compare instead of building one")
    use.add_argument("--check", type=whole(1, 65536), metavar="N", help="predict and measure N random networks")
    use.add_argument("--arch", metavar="FILE", help="predict and measure the network of this arch.json")
    use.add_argument("--model", type=model_name, metavar="NAME",
                     help="only measure a named model in the setting above; python models.py lists them")
    use.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: list[str] | None = None) -> None:
    import models

    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.check or args.arch) and not args.table:
        parser.error("--check and --arch compare with a table: name it with --table FILE.")
    try:
        device = check_device(args.device)
        if args.table:
            table = load_table(args.table)
            if args.check or args.arch:
                here = device_name(check_device(table.setting.device_type))
                require_setting(table, replace(table.setting, device=here), args.table)
            if args.arch:
                row = compare(table, table.read_arch(models.load_record(args.arch)))
                print(json.dumps(row, indent=1) if args.json else
                      f"predicted {row['predicted_ms']:.3f} ms, measured {row['measured_ms']:.3f} ms (median of "
                      f"{row['bursts']} bursts, 10-90 %: {row['p10_ms']:.3f}-{row['p90_ms']:.3f}); the device now "
                      f"takes {row['slowdown']:.2f} times as long as when the table was made; beside that the prediction is "
                      f"{row['error_percent']:+.1f} % off, known to {row['uncertainty_percent']:.1f} %")
            if args.check:
                result = check(table, args.check)
                print(json.dumps(result, indent=1) if args.json else format_check(result))
            if not args.check and not args.arch:
                print(json.dumps(table.content, indent=1) if args.json else format_table(table))
            return
        setting = this_setting(device, size=args.size, num_classes=args.classes, batch=args.batch, threads=args.threads,
                               dtype=args.dtype, memory_format=args.memory_format, mode=args.mode)
        if args.method != "tfnas":
            setting = replace(setting, num_classes=0)
        if args.model:
            network = models.build_network(models.named_record(args.model, args.classes, {}))
            models.check_fits(network, args.model, args.size)
            row = {"model": args.model, **asdict(measure_network(network, setting)), "setting": asdict(setting)}
            print(json.dumps(row, indent=1) if args.json else
                  f"{args.model}: {row['median_ms']:.3f} ms per batch of {setting.batch} at {setting.size} px (median of "
                  f"{row['count']} runs, 10-90 %: {row['p10_ms']:.3f}-{row['p90_ms']:.3f}) on {setting.device}, {setting.mode}")
            return
        start = time.perf_counter()
        Path(args.output).resolve().parent.mkdir(parents=True, exist_ok=True)  # fail before the work, not after
        if args.method == "tfnas":
            content = build_table(setting, space=args.space, rounds=args.rounds, seed=args.seed,
                                  min_width=models.MIN_WIDTH if args.min_width is None else args.min_width)
        else:
            space = make_space(args.method, args.network, args.width, 1 if args.grey else 3)
            content = build_part_table(setting, space, rounds=args.rounds, seed=args.seed)
        models.write_json(args.output, content)
        print(json.dumps(content, indent=1) if args.json else format_table(load_table(args.output)))
        print(f"{args.output}: {content['networks_timed']} networks timed in {time.perf_counter() - start:.0f} s",
              file=sys.stderr)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nStopped; nothing was written.", file=sys.stderr)
        sys.exit(130)


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
        raise ValueError(f"The device {name!r} cannot be used here ({str(error).splitlines()[0][:100]}); "
                         "use --device cpu.") from None
    return name


def format_check(result: dict) -> str:
    """One line per network, then the errors."""
    lines = [f"{'predicted':>10} {'measured':>10} {'10-90 %':>15} {'slowdown':>8} {'error':>7} {'known to':>8}"]
    for row in result["networks"]:
        spread = f"{row['p10_ms']:.2f}-{row['p90_ms']:.2f}"
        lines.append(f"{row['predicted_ms']:>7.3f} ms {row['measured_ms']:>7.3f} ms {spread:>15} {row['slowdown']:>8.2f} "
                     f"{row['error_percent']:>+6.1f}% {row['uncertainty_percent']:>7.1f}%")
    return "\n".join([*lines, "error " + format_error(result["error_percent"])])


def format_error(error: dict) -> str:
    """The error of a table in words."""
    return (f"median {error['median_percent']:.1f} %, 95th percentile {error['p95_percent']:.1f} %, worst "
            f"{error['worst_percent']:.1f} %")


if __name__ == "__main__":
    main()
