"""The tables and figures of the papers: each command makes its runs, its table and its plot.

    python reproduce.py                                              # lists them
    python reproduce.py table-7 --scale small                        # classifiers of the controlled study
    python reproduce.py table-1 table-8 --seeds 0 1 --skip unet dcnet dcnet-seq
    python reproduce.py table-10 --data photos                       # searched networks, on your own folder

Runs have folders in --output-dir; those that are there are not repeated, stopped ones are resumed.
Writes NAME.txt, NAME.json and, with matplotlib, NAME.png: our numbers of the test images, the paper's, and
whether its claims hold here. "table-1" to "figure-9" are those of Markhorst 2024 and its supplement. A search
method of another paper has that paper's tables in its own file (docs/add-a-method.md).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import re
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import baselines
import files
import latency
import models
import registry
import search
import tfnas
from data import Parser, format_sigmas, load_data, whole
from run import Command, check_device, default_device, run_command

FORMAT, VERSION = "joint-table", 2


@dataclass(frozen=True)
class Run:
    """One network: how it is searched and trained, and on which kind of data."""

    name: str
    kind: str  # of SCALES: "classifier", "joint", "sweep" (the controlled study), "natural", or a method
    train: tuple[str, ...] = ()  # flags of train.py
    search: tuple[str, ...] = ()  # flags of search.py; without: a named model
    target: float | None = None  # of the search: 0 the fastest network of the table, 1 the slowest
    from_run: str | None = None  # the run whose found network is trained
    change: str | None = None  # how the method's own command changes that network first


@dataclass(frozen=True)
class Table:
    """Rows of (label, run, the paper's numbers by column); claims of (text, function of the rows, bounds),
    which hold where the function is between the bounds."""

    title: str
    source: str
    rows: tuple[tuple[str, Run, dict], ...]
    claims: tuple[tuple[str, Callable, tuple[float, float]], ...] = ()
    columns: tuple[str, ...] = ("MACs M", "latency ms", "PSNR dB", "SSIM", "accuracy %")


# Flags of the scripts by kind of data: "data" of search.py and train.py, "search" and "train" of one of them;
# "val" and "test": the most validation images of train.py and test images of eval.py. "full": as in the
# papers; "small": for a CPU; "tiny": tests.
STUDY, TINY_STUDY = ("classifier", "joint", "sweep"), "--train-images 40 --epochs 1 --batch-size 20"
SCALES = {
    "full": {
        **dict.fromkeys(STUDY, {}), "natural": {
            "data": "--size 224", "train": "--recipe paper",
            "search": "--epochs 90 --warmup sampled --warmup-epochs 10 --lr 0.02"}},
    "small": {
        "classifier": {"train": "--epochs 6"},
        "joint": {"train": "--train-images 6000 --epochs 10 --batch-size 32", "val": 1000, "test": 1000},
        "sweep": {"train": "--train-images 3000 --epochs 8 --batch-size 32", "val": 500, "test": 500},
        "natural": {"data": "--size 64 --train-images 3000", "search": "--epochs 8", "train": "--epochs 12",
                    "val": 1000, "test": 1000}},
    "tiny": {
        **dict.fromkeys(STUDY, {"train": TINY_STUDY, "val": 10, "test": 10}),
        "natural": {"data": "--size 32 --train-images 40", "search": "--epochs 2 --batch-size 8",
                    "train": "--epochs 1 --batch-size 20", "val": 10, "test": 10}}}


# --- The tables --------------------------------------------------------------------------------------------

def study(name: str, kind: str) -> Run:
    return Run(name, kind, ("--model", name, "--recipe", "study"))


def searched(name: str, target: float, *flags: str, train: tuple[str, ...] = ()) -> Run:
    return Run(name, "natural", train, flags, target)


def baseline(name: str) -> Run:
    return Run(f"natural-{name}", "natural", ("--model", name))


def changed(found: str, name: str, *flags: str) -> Run:
    """The network that the run `found` has found, changed by flags of train.py."""
    return Run(f"{found}-{name}", "natural", flags, from_run=found)


def paper(psnr: float | None = None, ssim: float | None = None, accuracy: float | None = None,
          ms: float | None = None, macs: float | None = None) -> dict:
    values = {"MACs M": macs, "latency ms": ms, "PSNR dB": psnr, "SSIM": ssim, "accuracy %": accuracy}
    return {column: value for column, value in values.items() if value is not None}


MORE = (0.0, math.inf)  # the bounds of a claim that something is more than 0


def difference(one: str, other: str, column: str) -> Callable:
    return lambda rows: rows[one][column] - rows[other][column]


def beats(better: str, worse: str, column: str, margin: float = 0.0) -> tuple:
    """The claim that one row has more of a column than another, by more than `margin`."""
    text = f"{column} of {better} > {column} of {worse}" + (f" {margin:+g}" if margin else "")
    return text, difference(better, worse, column), (margin, math.inf)


def is_close(one: str, other: str, column: str, margin: float) -> tuple:
    """The claim that two rows differ by less than `margin`."""
    text = f"{column} of {one} is that of {other} within {margin:g}"
    return text, difference(one, other, column), (-margin, margin)


def scales_better(unet: str, narrower: str, other: str) -> tuple:
    """The claim that UNet `unet` loses less PSNR per halving of its MACs as `narrower` than as `other`."""
    def loss(rows: dict, name: str) -> float:
        lost = rows[unet]["PSNR at 0.8"] - rows[name]["PSNR at 0.8"]
        return lost / math.log2(rows[unet]["MACs M"] / rows[name]["MACs M"])
    return (f"{unet} loses less per halving of its MACs as {narrower} than as {other}",
            lambda rows: loss(rows, other) - loss(rows, narrower), MORE)


def of_betas(text: str, column: str, by: Callable) -> tuple:
    """The claim that by(removed, learned), the numbers of both searches of table 10 with each beta, is above
    0."""
    return text, lambda rows: by(*([rows[f"{beta} beta, search {number}"][column] for number in (1, 2)]
                                   for beta in ("removed", "learned"))), MORE


S, M, L = 0.25, 0.5, 0.75  # between the fastest and the slowest network; the papers' ms are of their GPU
CNAS, DNAS, DCNAS, DCNAS_SEQ = (("--model", name) for name in ("cnas", "dnas", "dcnas", "dcnas-seq"))
CLEAN, TRAIN_CLEAN, AS_CNAS = ("--search-images", "clean"), ("--sigma", "0"), ("--train-as", "cnas")
DC_S, DC_M, DC_L = (searched(f"dcnas-{name}", target, *DCNAS) for name, target in zip("sml", (S, M, L)))
CLEAN_COLUMNS = ("MACs M", "latency ms", "clean accuracy %")
TABLES = {
    "table-1": Table(
        "DC-Net, Integrated and Sequential, baseline and reduced", "thesis: table 3",
        (("Integrated, baseline", study("dcnet", "joint"), paper(32.8, 0.97, 88.1, macs=1301.8)),
         ("Sequential, baseline", study("dcnet-seq", "joint"), paper(27.1, 0.95, 89.6, macs=1302.1)),
         ("Integrated, reduced", study("dcnet-s", "joint"), paper(29.9, 0.97, 86.2, macs=51.2)),
         ("Sequential, reduced", study("dcnet-s-seq", "joint"), paper(25.2, 0.92, 87.6, macs=51.5))),
        tuple(beats(f"{one}, {size}", f"{other}, {size}", column) for size in ("reduced", "baseline")
              for one, other, column in (("Integrated", "Sequential", "PSNR dB"),
                                         ("Sequential", "Integrated", "accuracy %")))),
    "table-2": Table(
        "Denoisers: D-NAS beside UNets", "thesis: table 4",
        (("UNet-S", baseline("unet-s"), paper(25.0, 0.69, ms=9.2)),
         ("UNet-M", baseline("unet-m"), paper(25.9, 0.72, ms=16.9)),
         ("UNet {64, 5}", baseline("unet-original"), paper(26.6, 0.74, ms=116.5)),
         ("D-NAS S", searched("dnas-s", S, *DNAS), paper(26.0, 0.72, ms=9.45)),
         ("D-NAS M", searched("dnas-m", M, *DNAS), paper(25.6, 0.71, ms=11.6)),
         ("D-NAS S, four times as wide", changed("dnas-s", "wide", "--widen", "4"),
          paper(26.5, 0.73, ms=109.8))),
        (beats("D-NAS S", "UNet-S", "PSNR dB"),), ("MACs M", "latency ms", "PSNR dB", "SSIM")),
    "table-3": Table(
        "DC-NAS beside joint models, classifiers and denoisers; its classifier alone",
        "thesis: table 5:3 and 5:5",
        (("DC-NAS S", DC_S, paper(25.4, 0.70, 74.3, 10.3)),
         ("DC-NAS M", DC_M, paper(25.4, 0.70, 76.0, 13.7)),
         ("DC-NAS L", DC_L, paper(25.2, 0.70, 76.4, 17.9)),
         ("C-NAS S alone", changed("dcnas-s", "as-cnas", *AS_CNAS), paper(accuracy=73.5, ms=5.9)),
         ("C-NAS M alone", changed("dcnas-m", "as-cnas", *AS_CNAS), paper(accuracy=75.5, ms=7.9)),
         ("C-NAS L alone", changed("dcnas-l", "as-cnas", *AS_CNAS), paper(accuracy=76.0, ms=12.0)),
         ("random search, latency of M", searched("random-m", M, *DCNAS, "--strategy", "random"), {}),
         ("DC-Net S", baseline("dcnet-s"), paper(24.5, 0.68, 61.9, 10.0)),
         ("DC-Net S, tail of DC-NAS", baseline("dcnet-s-tail"), paper(24.6, 0.69, 68.6, 10.5)),
         ("MobileNetV3-small", baseline("mobilenet-v3-small"), paper(accuracy=70.4, ms=4.9)),
         ("EfficientNetV2-b0", baseline("efficientnet-v2-b0"), paper(accuracy=75.4, ms=9.0)),
         ("EfficientNetV2-b1", baseline("efficientnet-v2-b1"), paper(accuracy=76.7, ms=11.8)),
         ("LPIENet 0.25x", baseline("lpienet-0.25x"), paper(24.1, 0.65, ms=12.7)),
         ("LPIENet 0.5x", baseline("lpienet-0.5x"), paper(24.7, 0.68, ms=19.8)),
         ("UNet-S", baseline("unet-s"), paper(25.0, 0.69, ms=9.2)),
         ("DnCNN", baseline("dncnn"), {})),
        (beats("DC-NAS S", "DC-Net S", "PSNR dB"), beats("DC-NAS S", "DC-Net S", "accuracy %"),
         beats("DC-NAS S", "DC-Net S, tail of DC-NAS", "accuracy %"),
         beats("DC-NAS S", "C-NAS S alone", "accuracy %"), beats("DC-NAS M", "C-NAS M alone", "accuracy %"),
         # ours, not in the papers: search beats chance
         beats("DC-NAS M", "random search, latency of M", "accuracy %"),
         beats("DC-NAS M", "random search, latency of M", "PSNR dB"))),
    "table-4": Table(
        "What DC-NAS is searched by: clean or noisy images, L_Cls or L_Both", "thesis: table 5:2",
        (("clean, L_Cls", searched("dcnas-m-clean", M, *DCNAS, *CLEAN), paper(25.4, 0.70, 75.7, 13.9)),
         ("noisy, L_Cls", DC_M, paper(25.4, 0.70, 76.0, 13.7)),
         ("noisy, L_Both", searched("dcnas-m-both", M, *DCNAS, "--search-loss", "both"),
          paper(25.4, 0.70, 75.5, 13.8))),
        (beats("noisy, L_Cls", "clean, L_Cls", "accuracy %"),
         beats("noisy, L_Cls", "noisy, L_Both", "accuracy %"),
         is_close("noisy, L_Cls", "noisy, L_Both", "PSNR dB", 0.1))),
    "table-5": Table(
        "DC-NAS, Integrated and Sequential, of like latency", "thesis: table 5:1",
        (("Sequential", searched("dcnas-seq", 0.0, *DCNAS_SEQ, *CLEAN), paper(25.0, 0.69, 76.0, 18.3)),
         ("Integrated", searched("dcnas-l-clean", 1.0, *DCNAS, *CLEAN), paper(25.5, 0.70, 76.0, 17.9))),
        (beats("Integrated", "Sequential", "PSNR dB"),
         is_close("Integrated", "Sequential", "accuracy %", 1.0))),
    "table-6": Table(
        "Decoders of DC-NAS M (searched on clean images)", "thesis: table 5:4",
        tuple((label, changed("dcnas-m-clean", kind, "--decoder", kind), paper(*numbers))
              for label, kind, *numbers in (("convolutions", "conv", 25.4, 0.70, 75.7, 13.9),
                                            ("MBConv", "mb", 25.8, 0.71, 75.5, 27.7),
                                            ("MBConv, 1 operation", "mb-1", 25.3, 0.70, 75.4, 16.4),
                                            ("MBConv, 3 levels", "mb-3level", 25.4, 0.70, 75.1, 22.1),
                                            ("convolutions, noisy image and branch (ours)", "sharp"))),
        (beats("MBConv", "convolutions", "PSNR dB"), beats("MBConv", "convolutions", "latency ms"))),
    "table-7": Table(
        "Classifiers of the controlled study", "thesis: table 1 and 6",
        tuple((label, study(label.lower(), "classifier"), paper(accuracy=accuracy, macs=kflops / 1e3, ms=ms))
              for label, kflops, ms, accuracy in (
                  ("Conv-L", 447, 0.336, 63.2), ("MB1-S", 177, 0.300, 56.2), ("MB2.5-M", 350, 0.384, 64.1),
                  ("MB4-L", 424, 0.468, 64.9), ("MB2.5-S", 178, 0.390, 58.4), ("MB4-S", 188, 0.403, 56.6),
                  ("Conv-S", 163, 0.281, 55.4), ("Conv-M", 345, 0.317, 61.4))),
        (beats("MB2.5-M", "Conv-L", "accuracy %"), beats("MB4-L", "Conv-L", "accuracy %"),
         beats("Conv-L", "MB1-S", "accuracy %", 3.0), beats("MB2.5-S", "MB1-S", "accuracy %"),
         beats("MB2.5-S", "Conv-S", "accuracy %"), beats("MB2.5-M", "Conv-M", "accuracy %")),
        ("MACs M", "latency ms", "accuracy %")),
    "table-8": Table(
        "UNet, baseline and reduced, at single noise levels", "thesis: table 2",
        tuple((label, study(name, "joint"),
               {"MACs M": macs, **{f"PSNR at {s}": v for s, v in zip((0.2, 0.4, 0.8, 1), values)}})
              for label, name, macs, values in (("UNet", "unet", 1301.8, (33.9, 29.5, 23.8, 22.3)),
                                                ("UNet-S", "unet-s", 51.2, (33.2, 28.7, 23.3, 22.0)))),
        (beats("UNet-S", "UNet", "PSNR at 0.8", -1.0),),
        ("MACs M", "latency ms", "PSNR at 0.2", "PSNR at 0.4", "PSNR at 0.8", "PSNR at 1")),
    "table-9": Table("Candidate operations of the search spaces", "thesis: table 7", ()),
    "table-10": Table(
        "Removed (fixed) and learned beta, searched twice each; on clean images", "thesis: table 8",
        tuple((f"{label} beta, search {number}",
               searched(f"cnas-{depth}-{number}", S, *CNAS, *CLEAN, "--depth", depth, "--seed", str(number),
                        train=TRAIN_CLEAN), {"clean accuracy %": accuracy, "latency ms": ms})
              for label, depth, numbers in (("removed", "fixed", ((86.2, 5.85), (86.4, 5.81))),
                                            ("learned", "learned", ((84.9, 5.04), (83.5, 4.47))))
              for number, (accuracy, ms) in enumerate(numbers, 1)),
        (of_betas("removed beta classifies better than learned (means)", "clean accuracy %",
                  lambda removed, learned: sum(removed) - sum(learned)),
         of_betas("the two searches agree better with removed beta (latency)", "latency ms",
                  lambda removed, learned: abs(learned[0] - learned[1]) - abs(removed[0] - removed[1]))),
        CLEAN_COLUMNS),
    "figure-5": Table(
        "Accuracy on clean images by size of the search space, at three latencies", "thesis: figure 6",
        tuple((f"{space} operations, {name}",
               searched(f"cnas-space{space}-{name.lower()}", target, *CNAS, "--space", str(space), *CLEAN,
                        train=TRAIN_CLEAN), {})
              for space in (4, 6, 8) for name, target in (("S", S), ("M", M), ("L", L))),
        (("at the largest latency 4 operations are at least as good as 8",
          *beats("4 operations, L", "8 operations, L", "clean accuracy %", -1e-9)[1:]),), CLEAN_COLUMNS),
    "figure-6": Table(
        "Classifiers of like latency on clean images", "thesis: figure 7",
        (("C-NAS M", searched("cnas-m", M, *CNAS, *CLEAN, train=TRAIN_CLEAN), {}),
         ("TF-NAS (8 operations, learned beta)",
          searched("tfnas-c", M, *CNAS, *CLEAN, "--space", "8", "--depth", "learned", train=TRAIN_CLEAN), {}),
         ("MobileNetV2", Run("clean-mobilenet-v2", "natural", ("--model", "mobilenet-v2", *TRAIN_CLEAN)), {}),
         ("ResNet-18", Run("clean-resnet18", "natural", ("--model", "resnet18", *TRAIN_CLEAN)), {})),
        (beats("C-NAS M", "TF-NAS (8 operations, learned beta)", "clean accuracy %"),
         beats("C-NAS M", "ResNet-18", "clean accuracy %")), CLEAN_COLUMNS),
    "figure-9": Table(
        "UNet: width b, depth d, multiplier m and convolutions c", "thesis: figure 3",
        tuple((f"unet-{name}", study(f"unet-{name}", "sweep"), {}) for name in (
            "b4-d4-m2-c2", "b8-d4-m2-c2", "b16-d4-m2-c2", "b32-d4-m2-c2", "b64-d4-m2-c2",
            *(f"b{b}-d{d}-m2-c2" for b in (8, 16, 32) for d in (2, 3, 5)),
            *(f"b{b}-d4-m2-c1" for b in (8, 16, 32, 64)), "b8-d4-m1-c2", "b8-d4-m1.5-c2")),
        (scales_better("unet-b8-d4-m2-c2", "unet-b8-d4-m1.5-c2", "unet-b8-d4-m2-c1"),
         scales_better("unet-b8-d4-m2-c2", "unet-b8-d4-m1.5-c2", "unet-b8-d3-m2-c2"),
         scales_better("unet-b16-d4-m2-c2", "unet-b8-d4-m2-c2", "unet-b16-d4-m2-c1"),
         scales_better("unet-b16-d4-m2-c2", "unet-b8-d4-m2-c2", "unet-b16-d3-m2-c2"),
         ("b 4 breaks the trend: the step from 8 to 4 costs more than that from 16 to 8", lambda rows: (
             2 * rows["unet-b8-d4-m2-c2"]["PSNR at 0.8"] - rows["unet-b4-d4-m2-c2"]["PSNR at 0.8"]
             - rows["unet-b16-d4-m2-c2"]["PSNR at 0.8"]), MORE)), ("MACs M", "PSNR at 0.8"))}


def tables_of(method: str) -> dict[str, Table]:
    """The tables of a method's own paper, from its file; its scales come into SCALES."""
    module, tables = registry.method_module(method), {}
    for scale, kinds in SCALES.items():
        kinds[method] = getattr(module, "PAPER_SCALES", {}).get(scale, {})
    for table, content in getattr(module, "PAPER_TABLES", {}).items():
        def name(label: str) -> str:
            """Of a run. Rows of the same search, in several tables, are one run."""
            searched = content["rows"][label].get("search")
            words = f"{table} {label}" if searched is None else f"{method} {searched.replace('network', '')}"
            return re.sub("[^a-z0-9]+", "-", words.lower()).strip("-")

        rows = tuple((label, Run(
            name(label), method, tuple(shlex.split(how.get("train", ""))),
            ("--model", method, *shlex.split(how["search"])) if "search" in how else (),
            from_run=name(how["of"]) if "of" in how else None, change=how.get("change")),
            how.get("paper", {})) for label, how in content["rows"].items())
        tables[table] = Table(content["title"], content["paper"], rows,
                              tuple(beats(*claim) for claim in content["claims"]), content["columns"])
    return tables


for _method in registry.METHODS:
    with contextlib.suppress(ValueError):  # where the method's file is not there
        TABLES |= tables_of(_method)
ALL_RUNS = {run.name: run for table in TABLES.values() for _, run, _ in table.rows}


# --- Running -----------------------------------------------------------------------------------------------

class Runner:
    """Makes the runs of tables, by the flags of this command."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.scale = args, SCALES[args.scale]
        self.folder = Path(args.output_dir) / args.scale

    def command(self, script: str, *flags: str) -> None:
        run_command(script, *flags, device=self.args.device, threads=self.args.threads)

    def flags(self, kind: str, part: str) -> list[str]:
        """The flags of a part of this scale."""
        return shlex.split(self.scale[kind].get(part, ""))

    def data_flags(self, kind: str) -> list[str]:
        if kind not in STUDY and self.args.data is None:
            raise ValueError("This table needs natural images: give --data FOLDER"
                             + " with a folder per class." * (kind == "natural"))
        source = "digit-pairs" if self.args.digits else "mnist-pairs"
        where = [self.args.data] if kind not in STUDY else [source, "--data-root", self.args.data_root]
        return ["--data", *where, *self.flags(kind, "data")]

    def held_out(self, kind: str, split: str) -> list[str]:
        """The flag that limits the images of a split at this scale, if there is a limit."""
        count = self.scale[kind].get(split)
        return [f"--{split}-images", str(count)] if count else []

    def source(self, kind: str) -> Path:
        """The folder of the runs on one kind of data, by its name: runs on other data are other runs."""
        return self.folder / Path(self.data_flags(kind)[1]).name

    def table(self, classes: int) -> latency.Table:
        """The latency table for the natural images' size, made where it is missing."""
        path = self.source("natural") / "latency.json"
        if not path.exists():
            self.command("latency.py", *self.flags("natural", "data")[:2], "--classes", str(classes),
                         "--output", str(path), *(("--rounds", "1") if self.args.scale == "tiny" else ()))
        return latency.load_table(path)

    def target_ms(self, run: Run) -> float:
        """The target of a search: a share of the range of its model with 4 operations and fixed depth.

        So all searches of a model have the same targets; a share of 0 is brought just within reach.
        """
        data = load_data(self.args.data, size=8, train_images=1, val_images=1, test_images=1)
        classes, own = len(data.classes or []), dict(zip(run.search[::2], run.search[1::2]))
        table, flags = self.table(classes), self.flags("natural", "search")
        decoder = tfnas.default_decoder(dict(zip(flags[::2], flags[1::2])).get("--warmup", "inherit"))

        def cost_range(**how) -> tuple[float, float]:
            space = tfnas.Space(num_classes=classes, model=own["--model"], decoder=decoder, **how)
            supernet = tfnas.SuperNet(space)
            costs = search.costs_of_table(table, supernet, supernet.plan)
            return supernet.cost_range(costs.parts, costs.rest)

        low, high = cost_range()
        fastest, _ = cost_range(operations=int(own.get("--space", 4)), depth=own.get("--depth", "fixed"))
        return max(low + run.target * (high - low), 1.03 * fastest)

    def find_record(self, run: Run, seed: int) -> Path:
        """The record of the network that a run searches, made where it is missing."""
        source = self.source(run.kind)
        folder = source / run.name / f"seed-{seed}" / "search"
        if not (folder / "arch.json").exists():
            flags = [*self.data_flags(run.kind), *self.flags(run.kind, "search"), "--output-dir", str(folder),
                     *run.search]
            if run.target is not None:
                flags += ["--target", f"{self.target_ms(run):.3f}", "--table", str(source / "latency.json")]
            flags += [] if "--seed" in run.search else ["--seed", str(seed)]
            flags += ["--resume", str(folder)] if (folder / "search.pt").exists() else []
            self.command("search.py", *flags)
        return folder / "arch.json"

    def changed_record(self, run: Run, seed: int, found: Path) -> Path:
        """The record of a found network as the method's own command changes it."""
        path = self.source(run.kind) / run.name / f"seed-{seed}" / "arch.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            run_command(f"{run.kind}.py", "--arch", str(found), "--change", run.change, "--seed", str(seed),
                        "--output", str(path))
        return path

    def measure(self, run: Run, seed: int) -> dict:
        """The numbers of a run with a seed, made where they are missing."""
        folder = self.source(run.kind) / run.name / f"seed-{seed}"
        trained, origin = folder / "train", run if run.search else ALL_RUNS.get(run.from_run)
        if not (folder / "eval" / "metrics.json").exists():
            flags = [*run.train, *self.data_flags(run.kind), *self.held_out(run.kind, "val"),
                     "--seed", str(seed), "--output-dir", str(trained), *self.flags(run.kind, "train")]
            if origin:
                record = self.find_record(origin, seed)
                flags += ["--arch", str(self.changed_record(run, seed, record) if run.change else record)]
            flags += ["--resume", str(trained)] if (trained / "last.pt").exists() else []
            self.command("train.py", *flags)
        numbers, checkpoints = {}, {"": trained / "best.pt"}
        if (folder / "search" / "distilled.pt").exists():  # with the weights of the search
            checkpoints["distilled "] = folder / "search" / "distilled.pt"
        for before, checkpoint in checkpoints.items():
            for after, how in {"": [], " x8": ["--self-ensemble"]}.items():
                if after and not self.scale[run.kind].get("ensemble"):
                    continue
                metrics = folder / f"{before}eval{after}".replace(" ", "_") / "metrics.json"
                if not metrics.exists():
                    self.command("eval.py", "--checkpoint", str(checkpoint), "--output-dir",
                                 str(metrics.parent), *self.held_out(run.kind, "test"), "--no-latency", *how)
                numbers |= {f"{before}{name}{after}": value
                            for name, value in read_numbers(json.loads(metrics.read_text())).items()}
        # Latencies are measured when the table is made, one after the other: the runs may be days apart.
        if run.kind == "natural":
            numbers |= found_cost(trained / "best.pt", self.args.device)
        elif run.kind in STUDY:
            numbers |= study_cost(run.name, self.args.device)
        return numbers


def found_cost(checkpoint: Path, device: str) -> dict:
    """The latency of a trained network at the size that it was trained for."""
    network, content = files.load_checkpoint(checkpoint, device)
    setting = latency.this_setting(device, size=content["size"], num_classes=len(content["classes"] or []))
    return {"latency ms": latency.measure_network(network, setting).median_ms}


@functools.cache
def study_cost(name: str, device: str) -> dict:
    """FLOPs and latency of a network of the controlled study, of one digit, as the paper counts them."""
    named = registry.find_named(name)
    network = baselines.OneDigit(named.build(10))
    setting = latency.this_setting(device, size=named.size, num_classes=10, batch=1)
    return {"MACs M": baselines.paper_flops(network.network, named.size) / 1e6,
            "latency ms": latency.measure_network(network, setting).median_ms}


# --- Tables from numbers -----------------------------------------------------------------------------------

def read_numbers(metrics: dict) -> dict:
    """The columns of a table from metrics.json; None for what the network does not do."""
    means, levels = metrics["means"]["all_levels"], {row["sigma"]: row for row in metrics["levels"]}
    accuracy, clean = means["accuracy"], levels.get(0.0, {}).get("accuracy")
    cost = {f"{name} M": metrics["network"][key] / 1e6 for name, key in (("MACs", "macs"),
                                                                         ("parameters", "parameters"))}
    values = {"PSNR dB": means["psnr_db"], "SSIM": means["ssim"], "accuracy %": accuracy and 100 * accuracy,
              "clean accuracy %": clean and 100 * clean}
    for sigma, text in zip(levels, format_sigmas(list(levels))):
        values |= {f"PSNR at {text}": levels[sigma]["psnr_db"], f"SSIM at {text}": levels[sigma]["ssim"]}
    return cost | values


def summarise(columns: tuple[str, ...], rows: list[tuple[str, list[dict] | None, dict]]) -> tuple[str, list]:
    """The table as text and as records: the mean over seeds, half their range, the paper's number."""
    records, lines = [], [f"{'':<36}" + "".join(f"{column + ' (paper)':>26}" for column in columns)]
    for label, seeds, published in rows:
        record, cells = {"label": label, "seeds": len(seeds or []), "ours": {}, "paper": published}, ""
        for column in columns:
            values = [seed[column] for seed in seeds or [] if seed.get(column) is not None]
            text = "not run" if seeds is None else "-"
            if values:
                mean, half = statistics.mean(values), (max(values) - min(values)) / 2
                record["ours"][column] = {"mean": mean, "half_range": half, "values": values}
                text = f"{mean:.4g}" if mean < 10 else f"{mean:.2f}"
                text += f" ±{half:.2g}" if len(values) > 1 else ""
            cells += f"{text + (f' ({published[column]:g})' if column in published else ''):>26}"
        records.append(record)
        lines.append(f"{label:<36}{cells}")
    return "\n".join(lines), records


T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 1 to 9 degrees of freedom


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two values or more, by Student's t."""
    half = T_95[min(len(values) - 1, len(T_95)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def judge_claims(claims: tuple, records: list[dict]) -> list[dict]:
    """Each claim with its values, one for each seed, and a verdict: "holds" or "does not hold" where the 95 %
    interval of the values lies within the claim's bounds or outside, else "undecided"; of one seed only what
    it speaks for; or "not run"."""
    made, results = [record for record in records if record["seeds"]], []
    count = min((record["seeds"] for record in made), default=0)
    for text, claim, (least, most) in claims:
        result = {"claim": text, "verdict": "not run", "values": [], "low": None, "high": None}
        try:
            values = [claim({row["label"]: {column: cell["values"][seed] for column, cell in
                                            row["ours"].items()} for row in made}) for seed in range(count)]
        except KeyError:  # a row that was not run, or cannot do what is claimed
            values = []
        if len(values) == 1:
            result |= {"verdict": f"one seed {'for' if least < values[0] < most else 'against'}"}
        elif values:
            low, high = interval(values)
            outside = high <= least or low >= most
            result |= {"low": low, "high": high, "verdict": (
                "holds" if least < low and high < most else "does not hold" if outside else "undecided")}
        results.append(result | {"values": values})
    return results


def format_claim(claim: dict) -> str:
    """A claim to read, with its values."""
    text = f"{claim['verdict']:>16}: {claim['claim']}"
    if not claim["values"]:
        return text
    between = "" if claim["low"] is None else f", {claim['low']:+.3g} to {claim['high']:+.3g}"
    return f"{text} ({statistics.mean(claim['values']):+.3g}{between})"


def plot(path: Path, title: str, columns: tuple[str, ...], records: list[dict]) -> bool:
    """Draw the quality columns of all rows over the first column, their size; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    qualities = [column for column in columns if column.startswith(("PSNR", "accuracy", "clean"))]
    figure = Figure(figsize=(6.5 * len(qualities), 5), layout="tight")
    axes = figure.subplots(1, len(qualities), squeeze=False)
    for axis, quality in zip(axes[0], qualities):
        for record in records:
            if quality in record["ours"]:
                x, y = record["ours"][columns[0]]["mean"], record["ours"][quality]
                axis.errorbar(x, y["mean"], y["half_range"], fmt="o", capsize=3)
                axis.annotate(record["label"], (x, y["mean"]), fontsize=7, xytext=(4, 4),
                              textcoords="offset points")
        axis.set(xscale="log", xlabel=columns[0], ylabel=quality)
    figure.suptitle(title, fontsize=10)
    files.write_file(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))
    return True


def operations_table() -> str:
    """Markhorst 2024, table 9."""
    lines = [f"{'operation':<14} {'kernel':>6} {'expansion':>9} {'SE':>4}  in spaces of"]
    for operation in models.SPACES[8]:
        spaces = ", ".join(str(space) for space, members in models.SPACES.items() if operation in members)
        lines.append(f"{'MB-' + operation.name:<14} {operation.kernel_size:>6} {operation.expansion:>9} "
                     f"{'yes' if operation.se else '-':>4}  {spaces}")
    return "\n".join(lines)


def make_table(name: str, args: argparse.Namespace) -> None:
    """Make the runs of a table and its files; print it."""
    table, runner = TABLES[name], Runner(args)
    rows = [(label, None if run.name in args.skip else [runner.measure(run, seed) for seed in args.seeds],
             published) for label, run, published in table.rows]
    text, records = summarise(table.columns, rows) if rows else (operations_table(), [])
    claims, made = judge_claims(table.claims, records), files.provenance(latency.device_name(args.device))
    sources = sorted({runner.source(run.kind).name for _, run, _ in table.rows})
    about = [*sources, f"scale {args.scale}" + ", scaled down from the paper's" * (args.scale != "full"),
             f"seeds {', '.join(map(str, args.seeds))}, ± half the range over them",
             f"{made['device']}, torch {made['torch']}, {made['date'][:10]}"]
    title = f"{name} ({table.source}): {table.title}"
    lines = [title, "; ".join(about), "", text, ""]
    lines += map(format_claim, claims)
    path, content = runner.folder / f"{name}.txt", "\n".join(lines).rstrip() + "\n"
    files.write_file(path, lambda temporary: temporary.write_text(content))
    files.write_json(path.with_suffix(".json"), {
        "format": FORMAT, "version": VERSION, "made": made, "table": name, "title": table.title,
        "scale": args.scale, "flags": runner.scale, "data": sources,
        "seeds": args.seeds, "rows": records, "claims": claims})
    drawn = bool(records) and plot(path.with_suffix(".png"), title, table.columns, records)
    print(f"\n{content}\nwrote {path}, {path.with_suffix('.json')}"
          + (f", {path.with_suffix('.png')}" if drawn else ""))


# --- The command -------------------------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<10} {table.source:<28} {table.title}" for name, table in TABLES.items()]
    lines += ["  figure-4 (thesis figure 5), how alpha moves: alpha.png in the search folders of table-10;",
              "  figures 1-3, 7 and 8 are pictures and drawings: grid.png in the folders of evaluations."]
    parser = Parser(
        prog="reproduce.py", usage="python reproduce.py NAME [NAME ...] [options]",
        description="Run an experiment of a paper and print its table beside the paper's.\n\n"
                    + "\n".join(lines), formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python reproduce.py table-1 --skip dcnet\n  python reproduce.py table-7 "
               "--seeds 0 1\n  python reproduce.py table-10 --scale full --data imagenet100")
    add = parser.add_argument
    add("names", nargs="*", choices=[*TABLES, []], metavar="NAME", help="tables and figures, as above")
    add("--scale", choices=SCALES, default="small",
        help="full: as in the papers; small: fewer images and epochs, smaller (default: %(default)s)")
    add("--seeds", type=whole(0), nargs="+", default=[0], metavar="N", help="one run each (default: 0)")
    add("--skip", nargs="+", default=[], choices=sorted(ALL_RUNS), metavar="RUN",
        help="runs to leave out, by the names of their folders; their rows say so (default: none)")
    add("--data", metavar="FOLDER",
        help="folder with class folders, natural images for the searched networks (default: none)")
    add("--data-root", default="data", metavar="DIR",
        help="folder that holds MNIST, or that it is downloaded to (default: %(default)s)")
    add("--digits", action="store_true", help="drawn digits in the controlled study (default: MNIST)")
    add("--threads", type=whole(1, 4096), metavar="N", help="torch's threads on a CPU (default: torch's own)")
    add("--device", default=default_device(), help="cuda or cpu (default: cuda if there is one)")
    add("--output-dir", default="runs/reproduce", metavar="DIR",
        help="folder of the runs; a folder below it for each scale (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.names:
        parser.print_help()
        return
    with Command(parser, stopped="the same command goes on"):
        check_device(args.device)
        for name in args.names:
            make_table(name, args)


if __name__ == "__main__":
    main()
