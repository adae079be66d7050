"""Measures how fast searching, training and inference are here, each beside the plain way of doing it.

    python benchmark.py --threads 1                           # everything at 64 px: about 5 minutes on a CPU
    python benchmark.py --size 224 --latency-batch 32 --amp bfloat16
    python benchmark.py --gpu-report                          # all that is written for CUDA: 9 minutes

The plain way: NCHW, float32, the search loop that TF-NAS published, networks as they were trained, and
latencies that are sums of operations timed alone. Both ways run in turn in one process: their ratio is more
reliable than their times. A product of large matrices is the plain way beside a network's rate. Prints a
table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import files
import latency
import models
import registry
import run
import search
import tfnas
import timing
from data import Parser, whole
from train import charbonnier, task_loss

FORMAT, VERSION = "joint-benchmark", 2
PARTS = ("search", "training", "memory", "inference", "prediction")
CUDA_PARTS = ("peak", "streams")  # memory in use, and two streams, measured on a GPU


def make_batch(batch_size: int, size: int, device: torch.device, layout=torch.channels_last) -> tuple:
    """(noisy, clean, labels), always the same."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(batch_size, 3, size, size, generator=generator)
    noisy = clean + 0.5 * torch.randn(clean.shape, generator=generator)
    labels = torch.randint(10, (batch_size,), generator=generator)
    return *(images.to(device, memory_format=layout) for images in (noisy, clean)), labels.to(device)


def make_row(what: str, unit: str, plain: float, ours: float, **more) -> dict:
    """A line of the table; `ratio` says how many times less ours is."""
    return {"what": what, "unit": unit, "plain": plain, "ours": ours, "ratio": plain / ours, **more}


def time_row(what: str, times) -> dict:
    """The line of the first two of the functions that ran in turn (latency.interleave)."""
    return make_row(what, "ms", *times.medians_ms[:2]) | {
        "ratio": 1 / times.ratios[1], "uncertainty": times.uncertainty[1]}


def time_both(what: str, plain, ours, device: torch.device | str, seconds: float) -> dict:
    """The line of the milliseconds of two functions, which run in turn."""
    return time_row(what, latency.interleave([plain, ours], device, burst=1, seconds=seconds))


def per_second(what: str, count: int, row: dict) -> dict:
    """The line of images per second, from that of the milliseconds for `count` images."""
    return row | {"what": what, "unit": "/s", **{way: 1e3 * count / row[way] for way in ("plain", "ours")}}


def plain_alpha_step(supernet: nn.Module, noisy: torch.Tensor, labels: torch.Tensor) -> None:
    """That of TF-NAS, without the optimizer's step."""
    supernet.zero_grad()
    with run.frozen(supernet.weight_parameters()):
        F.cross_entropy(supernet(noisy, supernet.mixture(5.0)).logits, labels).backward()


def compare_search(operations: int, device, batch_size: int, size: int, amp: str, seconds: float) -> list:
    """A weight step and an alpha step of the C-NAS supernet, and the default search by the images it learns
    from. The plain way is TF-NAS's published loop: both paths in one graph, NCHW, as many operations as
    asked for, and a tenth of the epochs with one path and without alpha."""
    space, paths = tfnas.Space(operations), torch.Generator().manual_seed(0)  # the same paths for both ways
    supernet = tfnas.SuperNet(space).to(device).train()
    optimizer = torch.optim.SGD(supernet.weight_parameters(), 1e-3, 0.9)
    noisy, _, labels = make_batch(batch_size, size, device, torch.contiguous_format)

    def plain_weight_step(bi_sampling=True):
        optimizer.zero_grad()
        path = supernet.sample_path(paths)
        sum(F.cross_entropy(supernet(noisy, choice).logits, labels) for choice in
            (path, supernet.other_path(path, paths))[:1 + bi_sampling]).backward()
        nn.utils.clip_grad_norm_(supernet.weight_parameters(), 5.0)
        optimizer.step()

    def our_steps(operations: int) -> tuple[list, float]:
        """A weight step, an alpha step, and a step of the largest path, with which the default begins; for
        which share of its epochs."""
        own = tfnas.SuperNet(tfnas.Space(operations))
        epochs = search.build_parser("cnas", tfnas).get_default("epochs")
        schedule = tfnas.Schedule(own, None, steps=1, device=device, epochs=epochs, lr=1e-3, amp=amp)
        batch, largest = make_batch(batch_size, size, device), own.largest_path()
        return [lambda: schedule.weight_step(batch, True), lambda: schedule.arch_step([batch], 5.0),
                lambda: schedule.weight_step(batch, False, largest)], schedule.warmup_epochs / epochs

    alpha_step = partial(plain_alpha_step, supernet, noisy, labels)
    (weight_ours, alpha_ours, _), _ = our_steps(operations)
    weight = time_both("search: weight step", plain_weight_step, weight_ours, device, seconds)
    alpha = time_both("search: alpha step", alpha_step, alpha_ours, device, seconds)
    both = make_row("search: iteration (weight + half an alpha step)", "ms",
                    *(weight[way] + alpha[way] / 2 for way in ("plain", "ours")))
    ours, warm = our_steps(4)
    steps = [plain_weight_step, alpha_step, partial(plain_weight_step, False), *ours]
    times = latency.interleave(steps, device, burst=1, seconds=2 * seconds).medians_ms
    default = make_row("", "ms", *(share * alone + (1 - share) * (weights + alphas / 2) for
                                   share, (weights, alphas, alone) in ((0.1, times[:3]), (warm, times[3:]))))
    return [weight, alpha, both, per_second("search: images", batch_size, both),
            per_second("search: images, the default search", batch_size, default)]


def compare_training(device, batch_size: int, size: int, amp: str, seconds: float) -> list[dict]:
    """A training step of DC-NAS with the joint loss."""
    def plain_loss(output, clean, labels, _):
        ssim = plain_ssim(output.image, clean).mean()
        denoising = 0.8 * charbonnier(output.image, clean) + 0.2 * (1 - ssim)
        return 0.1 * F.cross_entropy(output.logits, labels, label_smoothing=0.1) + 0.9 * denoising,

    def make_step(plain: bool):
        layout, loss = (torch.contiguous_format, plain_loss) if plain else (torch.channels_last, task_loss)
        network = models.Network(models.named_arch("dcnas-k3-e3", 10)).to(device, memory_format=layout)
        for level in network.decoder.levels if plain else ():
            level.up.forward = level.up.layer_by_layer
        optimizer = torch.optim.SGD(network.parameters(), 1e-3, 0.9, fused=not plain)
        noisy, clean, labels = make_batch(batch_size, size, device, layout)

        def step():
            with run.autocast(device, "off" if plain else amp):
                output = network(noisy)
            optimizer.zero_grad(set_to_none=True)
            loss(output, clean, labels, "both")[0].backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
        return step

    row = time_both("", make_step(True), make_step(False), device, seconds)
    return [per_second(f"training: images, amp {amp}", batch_size, row)]


def plain_ssim(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """SSIM as it is mostly written, by depthwise convolutions; the same numbers as metrics.ssim."""
    channels = image.shape[1]
    window = torch.exp(-((torch.arange(11) - 5) / 1.5) ** 2 / 2).to(image)
    window = (window / window.sum()).repeat(channels, 1)

    def blur(x):
        return F.conv2d(F.conv2d(x, window.view(channels, 1, 11, 1), groups=channels),
                        window.view(channels, 1, 1, 11), groups=channels)

    mean_x, mean_y = blur(image), blur(reference)
    variance_x, variance_y = blur(image ** 2) - mean_x ** 2, blur(reference ** 2) - mean_y ** 2
    covariance = blur(image * reference) - mean_x * mean_y
    return ((2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
            / ((mean_x ** 2 + mean_y ** 2 + 1e-4) * (variance_x + variance_y + 9e-4))).mean((1, 2, 3))


def compare_inference(network: nn.Module, setting: latency.Setting, modes: list[str],
                      seconds: float) -> list[dict]:
    """The forms of `latency.fast` beside the network as it was trained, and their billions of operations a
    second (two for each multiply-accumulate) beside those of a product of large matrices."""
    side = 8192 if setting.device_type == "cuda" else 1024
    matrix = torch.rand(side, side, device=setting.device_type, dtype=latency.DTYPES[setting.dtype])
    work, rows = 2e-6 * setting.batch * models.count_macs(network, setting.size), []
    for mode in modes:
        with latency.prepared(network, setting) as (eager, images), \
                latency.prepared(network, replace(setting, mode=mode)) as (fast, _):
            runs = [lambda: eager(images), lambda: fast(images), lambda: matrix @ matrix]
            times = latency.interleave(runs, setting.device_type, burst=5, seconds=seconds)
        _, ours, product = times.medians_ms
        rows += [time_row(f"inference: {mode}, batch {setting.batch}", times),
                 make_row(f"rate: matrix product, {mode}", "GFLOP/s", 2e-6 * side**3 / product, work / ours)]
    return rows


def compare_streams(network: nn.Module, setting: latency.Setting, seconds: float) -> list[dict]:
    """A CUDA graph whose two branches, decoder and classifier, are on one stream and on two."""
    with latency.prepared(network, replace(setting, mode="folded")) as (one, images), \
            latency.prepared(network, replace(setting, mode="graph")) as (two, _):
        one = latency.Graphed(one, images)
        return [time_both(f"streams: graph on one and on two, batch {setting.batch}", lambda: one(images),
                          lambda: two(images), setting.device_type, seconds)]


def naive_sum_ms(network: nn.Module, parts: list[nn.Module], images: torch.Tensor,
                 setting: latency.Setting) -> float:
    """The sum of the parts, each timed alone on its input in the network: what most tables hold."""
    inputs = {}
    handles = [part.register_forward_pre_hook(inputs.__setitem__) for part in parts]
    network(images)
    for handle in handles:
        handle.remove()
    runs = [alone_in_onnxruntime(part, inputs[part], setting.threads) if setting.mode == "onnx" else
            lambda part=part: part(*inputs[part]) for part in parts]
    return sum(latency.measure(run, setting.device_type, warmup=5, repeats=15).median_ms for run in runs)


def alone_in_onnxruntime(part: nn.Module, inputs: tuple, threads: int):
    """A function that runs a part of a network through onnxruntime on these inputs."""
    content, tensors = io.BytesIO(), tree_leaves(inputs)
    names = [f"input_{index}" for index in range(len(tensors))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(part, inputs, content, dynamo=False, input_names=names)
    session = timing.start_session(content.getvalue(), threads)
    taken = {each.name for each in session.get_inputs()}
    given = {name: tensor.numpy() for name, tensor in zip(names, tensors) if name in taken}
    return lambda: session.run(None, given)


def compare_prediction(setting: latency.Setting, operations: int, count: int) -> list[dict]:
    """The errors of a naive sum and of a table on `count` random networks, percent."""
    start, space = time.perf_counter(), tfnas.Space(operations, num_classes=setting.num_classes)
    table = latency.Table(latency.build_table(setting, space))
    seconds, rng, errors = time.perf_counter() - start, random.Random(2000), []
    for _ in range(count):
        design = space.random_design(rng)
        ours = latency.compare(table, design, seconds=1.0)["error_percent"]
        with latency.prepared(space.network(design), setting) as (network, images):
            inner = network.network if setting.mode == "onnx" else network
            alone = naive_sum_ms(inner, [part for _, part in space.parts(inner)], images, setting)
            times = latency.interleave([lambda: network(images)], setting.device_type, burst=5)
        errors.append((abs(100 * (alone / times.medians_ms[0] - 1)), abs(ours)))
    functions = {"median": statistics.median,
                 "95th percentile": lambda values: sorted(values)[-(-95 * len(values) // 100) - 1]}
    return [make_row(f"prediction: {name} error of {count} networks", "%", *map(function, zip(*errors)),
                     table_seconds=seconds) for name, function in functions.items()]


def kept_gib(network: nn.Module, images: torch.Tensor, *choice) -> float:
    """The tensors that a forward pass keeps for its backward pass, without the weights, GiB."""
    kept = {weight.untyped_storage()._cdata: (None, 0) for weight in network.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()  # held, so that no other one gets its address meanwhile
        kept.setdefault(storage._cdata, (storage, storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(images, *choice)
    return sum(size for _, size in kept.values()) / 2**30


def compare_memory(operations: int, batch_size: int, sizes: list[int]) -> list[dict]:
    """What an alpha step keeps for its backward pass, in float32: by shapes alone, on no device."""
    rows = []
    for size in sizes:
        images, values = torch.empty(batch_size, 3, size, size, device="meta"), []
        for recompute in (False, True):
            supernet = tfnas.SuperNet(tfnas.Space(operations), recompute).to("meta").train()
            with run.frozen(supernet.weight_parameters()):
                values.append(kept_gib(supernet, images, supernet.mixture(5.0)))
        rows.append(make_row(f"memory: alpha step, {size} px, --recompute", "GiB", *values))
    return rows


def compare_peak_memory(operations: int, device, batch_size: int, size: int, amp: str) -> list[dict]:
    """The memory that an alpha step takes on CUDA beside what is there before it, measured."""
    def peak_gib(step) -> float:
        step()  # libraries take their workspaces
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    supernet = tfnas.SuperNet(tfnas.Space(operations)).to(device).train()
    noisy, _, labels = make_batch(batch_size, size, device, torch.contiguous_format)

    plain = peak_gib(partial(plain_alpha_step, supernet, noisy, labels))
    batch = make_batch(batch_size, size, device)
    schedules = (tfnas.Schedule(tfnas.SuperNet(tfnas.Space(operations), recompute), None, steps=1,
                                device=device, lr=1e-3, amp=amp) for recompute in (False, True))
    return [make_row(f"peak memory: alpha step, {size} px{how}", "GiB", plain,
                     peak_gib(lambda: schedule.arch_step([batch], 5.0)))
            for schedule, how in zip(schedules, ("", ", --recompute"))]


# --- The report of a GPU -----------------------------------------------------------------------------------

REPORT_MINUTES = 9.0  # in all; steps that would begin later are left out
ASKED = {  # value of the report -> its bound, and whether that is the most
    **{f"latency table, {mode}: {what} error %": (bound, True) for mode in ("eager", "folded", "graph")
       for what, bound in (("median", 2.0), ("95th percentile", 5.0))},
    "search: target missed by %": (3.0, True),
    "search: iteration (weight + half an alpha step), ratio": (3.0, False),
    "inference: graph, batch 32, ratio": (1.5, False)}


class Report:
    """What works on this GPU, and how fast: each step is a command of its own, so that the others go on."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device, self.start = folder, device, time.monotonic()
        self.steps, self.rows, self.values = [], [], {}

    def command(self, name: str, *words: str, seconds: float) -> bool:
        """Run a command of this project for at most so many seconds; whether it ended well."""
        left = 60 * REPORT_MINUTES - (time.monotonic() - self.start)
        seconds, start = min(seconds, left), time.monotonic()
        if seconds < 10:
            return self._note(name, words, "left out: no time", 0.0)
        with (self.folder / f"{name}.log").open("w") as file:
            process = subprocess.Popen([sys.executable, *words], cwd=Path(__file__).resolve().parent,
                                       stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                result = "ok" if process.wait(seconds) == 0 else "failed"
            except subprocess.TimeoutExpired:
                result = f"stopped after {seconds:.0f} s"
                os.killpg(process.pid, signal.SIGINT)  # pytest then says what it found
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return self._note(name, words, result, time.monotonic() - start)

    def _note(self, name: str, words, result: str, seconds: float) -> bool:
        run.say(f"{name}: {result}, {seconds:.0f} s")
        self.steps.append({"step": name, "command": " ".join(("python", *words)), "result": result,
                           "seconds": seconds})
        self.write()
        return result == "ok"

    def benchmark(self, name: str, *words: str, seconds: float = 90) -> None:
        """A step of this file's own parts; its rows are kept."""
        output = self.folder / f"{name}.json"
        if self.command(name, "benchmark.py", *words, "--device", self.device, "--size", "224", "--seconds",
                        "3", "--output", str(output), seconds=seconds):
            for row in json.loads(output.read_text())["rows"]:
                self.rows.append(row)
                self.values[f"{row['what']}, ratio"] = row["ratio"]

    def table(self, mode: str) -> None:
        """A latency table of the papers' protocol (batch 32, 224 px, 100 classes), of fewer networks than by
        default, and its error on 7 others."""
        path, name = self.folder / f"table-{mode}.json", f"latency table, {mode}"
        if self.command(name, "latency.py", "--device", self.device, "--batch", "32", "--size", "224",
                        "--classes", "100", "--rounds", "1", "--mode", mode, "--output", str(path),
                        seconds=200):
            error = json.loads(path.read_text())["check"]
            self.values |= {f"{name}: median error %": error["median_percent"],
                            f"{name}: 95th percentile error %": error["p95_percent"]}

    def search(self) -> None:
        """A short search of 100 classes of coloured noise for the latency of a CUDA graph, the steadiest."""
        path, pictures = self.folder / "table-graph.json", self.folder / "pictures"
        found = self.folder / "search"
        if "latency table, graph: median error %" not in self.values:  # a file may be of an earlier report
            return
        table, rng = latency.load_table(path), random.Random(0)
        target = statistics.median(table.predict_ms(table.random_design(rng)) for _ in range(15))
        for place in range(1000):
            image = np.random.default_rng(place).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            (pictures / f"{place % 100:02}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(pictures / f"{place % 100:02}" / f"{place}.png")
        if self.command("search", "search.py", "--target", f"{target:.3f}", "--table", str(path), "--data",
                        str(pictures), "--size", "224", "--epochs", "2", "--batch-size", "32", "--device",
                        self.device, "--output-dir", str(found), seconds=100):
            times = files.load_record(found / "arch.json")["latency"]
            measured = latency.ms_at_table(times, table.setting)
            self.values |= {"search: target ms": target, "search: predicted ms": times["predicted_ms"],
                            "search: measured ms": measured,
                            "search: target missed by %": 100 * abs(measured / target - 1)}

    def run(self) -> None:
        self.benchmark("search steps", "--parts", "search", "peak")
        for amp in ("bfloat16", "float16", "off"):
            self.benchmark(f"training {amp}", "--parts", "training", "--amp", amp)
        forms = "--parts", "inference", "streams", "--modes", "folded", "graph"
        self.benchmark("inference", *forms, "compile", seconds=120)
        self.benchmark("inference of one image", *forms, "--latency-batch", "1")
        self.table("graph")
        self.search()
        self.command("tests", "-m", "pytest", "-m", "cuda", "--durations", "9", "tests", seconds=240)
        self.table("eager")
        self.table("folded")

    def format(self) -> str:
        """The report in Markdown."""
        lines = ["# What works on this GPU, and how fast", "", f"{latency.device_name(self.device)}, torch "
                 f"{torch.__version__}, {files.provenance(self.device)['date'][:10]}. 224 px, batch 32 where "
                 "none is named.", "", "| step | result | s |", "|---|---|---|"]
        lines += [f"| {step['step']} | {step['result']} | {step['seconds']:.0f} |" for step in self.steps]
        lines += ["", "| asked | bound | measured | |", "|---|---|---|---|"]
        for name, (bound, less) in ASKED.items():
            value = self.values.get(name)
            holds = value is not None and (value <= bound if less else value >= bound)
            lines.append(f"| {name} | {'at most' if less else 'at least'} {bound:g} | "
                         f"{'-' if value is None else f'{value:.2f}'} | {'yes' if holds else 'no'} |")
        lines += ["", "| measured | the plain way | ours | ratio |", "|---|---|---|---|"]
        lines += [f"| {row['what']}, {row['unit']} | {row['plain']:.2f} | {row['ours']:.2f} | "
                  f"{row['ratio']:.2f} |" for row in self.rows]
        return "\n".join([*lines, ""])

    def write(self) -> None:
        text = self.format()
        files.write_file(self.folder / "report.md", lambda path: path.write_text(text))
        files.write_json(self.folder / "report.json", {
            "format": "joint-gpu-report", "version": 1, "made": files.provenance(self.device),
            "steps": self.steps, "rows": self.rows, "values": self.values})


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmark.py", usage="python benchmark.py [options]  (--help lists them)",
        epilog="examples: python benchmark.py --threads 1; python benchmark.py --parts memory search; "
               "python benchmark.py --space 4 --output benchmark.json",
        description="Measure how fast searching, training, inference and latency table are here.")
    add, count = parser.add_argument, dict(type=whole(1, 65536), metavar="N")
    add("--parts", nargs="+", choices=(*PARTS, *CUDA_PARTS), default=PARTS,
        help="what to measure; peak and streams on CUDA only (default: the others)")
    add("--space", type=int, choices=models.SPACES, default=8, help="operations per block (default: 8)")
    add("--size", type=whole(16, 65536), default=64, metavar="PX", help="side of the images (default: 64)")
    add("--batch-size", type=whole(2, 65536), default=32, metavar="N",
        help="images per step of search and training (default: %(default)s)")
    add("--latency-batch", **count, help="images per batch of inference (default: 32 on CUDA, 1 on a CPU)")
    add("--networks", **count, default=20, help="random networks to predict (default: %(default)s)")
    add("--modes", nargs="+", choices=latency.MODES[1:], help="forms of the network for inference (default: "
        "folded; graph on CUDA, onnx on a CPU where onnxruntime is installed); onnx alone: also for the "
        "prediction, else of eager networks")
    add("--arch", metavar="FILE", help="record of the network for inference (default: dcnas-k3-e3)")
    add("--gpu-report", nargs="?", const="gpu_report", metavar="DIR", help="run all that is written for "
        "CUDA, with its tests, latency tables and a search, and write report.md and report.json there "
        "(default: gpu_report)")
    add("--seconds", type=whole(1, 86400), default=20, metavar="S",
        help="at most this long for each comparison (default: %(default)s)")
    add("--device", default=run.default_device(), help="cuda or cpu (default: cuda if there is one)")
    add("--threads", **count, help="torch's threads on a CPU; latencies have one (default: torch's own)")
    add("--amp", choices=run.AMP_DTYPES, help="precision of ours (default: bfloat16 on CUDA, off on a CPU)")
    add("--seed", type=whole(0), default=0, metavar="N", help="seed of the weights (default: %(default)s)")
    add("--output", default="benchmark.json", metavar="FILE", help="JSON to write (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with run.Command(parser):
        files.check_folder(args.output)
        device = run.prepare_device(args.device, args.threads, args.seed)
        if args.gpu_report:
            if device.type != "cuda":
                raise ValueError("--gpu-report needs a CUDA device, and there is none here.")
            report = Report(Path(args.gpu_report).resolve(), args.device)
            report.folder.mkdir(parents=True, exist_ok=True)
            report.run()
            print(f"{report.format()}\nwrote {report.folder / 'report.md'}")
            return
        args.amp, threads = run.choose_amp(device, args.amp), torch.get_num_threads()
        set_up = partial(latency.this_setting, args.device, size=args.size, num_classes=10,
                         batch=args.latency_batch)
        setting = set_up()
        how, sizes = (args.batch_size, args.size, args.amp, args.seconds), {args.size, registry.PAPER_SIZE}
        gpu = device.type == "cuda"
        modes = args.modes or [*dict.fromkeys(("folded", *["graph"] * gpu, latency.fast_mode(device.type)))]
        record = (files.load_record(args.arch) if args.arch else
                  registry.named_record("dcnas-k3-e3", setting.num_classes, {}))
        network = registry.build_network(record)
        parts = {"search": lambda: compare_search(args.space, device, *how),
                 "training": lambda: compare_training(device, *how),
                 "memory": lambda: compare_memory(args.space, args.batch_size, sorted(sizes)),
                 "peak": lambda: compare_peak_memory(args.space, device, *how[:3]),
                 "inference": lambda: compare_inference(network, setting, modes, args.seconds),
                 "prediction": lambda: compare_prediction(
                     set_up(mode="onnx" if args.modes == ["onnx"] else "eager"), args.space, args.networks),
                 "streams": lambda: compare_streams(network, setting, args.seconds)}
        if not gpu and (wrong := set(args.parts) & set(CUDA_PARTS)):
            raise ValueError(f"--parts {' '.join(sorted(wrong))} needs a CUDA device, and {device} is none.")
        rows = [row for part in parts if part in args.parts for row in parts[part]()]
        memory = latency.peak_memory_mib(device)
        files.write_json(args.output, {
            "format": FORMAT, "version": VERSION, "made": files.provenance(setting.device, args.seed),
            "setting": asdict(setting), "space": args.space, "batch_size": args.batch_size, "amp": args.amp,
            "threads": threads, "peak_memory_mib": memory, "rows": rows})
    print(f"{setting.device}, {threads} threads for search and training; space {args.space}, batch "
          f"{args.batch_size}, {args.size} px, amp {args.amp}, torch {torch.__version__}\n"
          f"{'':<50} {'plain':>10} {'ours':>10} {'ratio':>7}")
    for row in rows:
        values = f"{row['plain']:>10.2f} {row['ours']:>10.2f} {row['ratio']:>6.2f}x  {row['unit']}"
        print(f"{row['what']:<50} {values}")
    print(f"peak memory, of both ways: {memory or 0:,.0f} MiB\nwrote {args.output}")


if __name__ == "__main__":
    main()
