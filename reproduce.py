"""The tables and figures of the joint papers, each as one command: its runs, its table, its plot.

    python reproduce.py                                              # what there is
    python reproduce.py table-7 --scale small                        # classifiers of the controlled study
    python reproduce.py table-1 table-8 --scale small --seeds 0 1 --skip unet dcnet dcnet-seq
    python reproduce.py table-10 --scale small --data photos         # the searched networks, on a folder of your own

Runs train.py, eval.py, search.py and latency.py into --output-dir, one folder for each run and seed; what is there already is
not run again, what was stopped goes on. Writes NAME.txt, NAME.json and, with matplotlib, NAME.png beside them: our numbers,
the paper's, and whether each of its claims holds here. Numbers of tables and figures are those of Markhorst 2024 and its
supplement; `--help` gives those of the thesis.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import baselines
import latency
import models
import search

HERE = Path(__file__).resolve().parent
FORMAT, VERSION = "joint-table", 1


@dataclass(frozen=True)
class Run:
    """One network: how it is searched (where it is), trained, and on what kind of data it is."""

    name: str
    kind: str  # "classifier", "joint", "sweep": the controlled study; "natural": searched networks and their baselines
    train: tuple[str, ...] = ()
    search: tuple[str, ...] = ()  # flags of search.py; without: a named model
    target: float | None = None  # of the search: 0 the fastest network of the table, 1 the slowest
    from_run: str | None = None  # train what another run has found


@dataclass(frozen=True)
class Table:
    """Rows of (label, run, the paper's numbers by column); claims of (text, function of rows' numbers -> true or false)."""

    title: str
    thesis: str
    rows: tuple[tuple[str, Run, dict], ...]
    claims: tuple[tuple[str, Callable], ...] = ()
    columns: tuple[str, ...] = ("MACs M", "latency ms", "PSNR dB", "SSIM", "accuracy %")


# Sizes of the runs. "full": as in the papers; "small": for a CPU, and said so in every table; "tiny": for the tests.
SCALES = {
    "full": {
        "classifier": (), "joint": (), "sweep": (), "natural": ("--size", "224"),
        "search": ("--epochs", "90", "--warmup", "sampled", "--warmup-epochs", "10", "--lr", "0.02"),
        "train": ("--recipe", "paper")},
    "small": {
        "classifier": ("--epochs", "6"),
        "joint": ("--train-images", "6000", "--val-images", "1000", "--epochs", "10", "--batch-size", "32"),
        "sweep": ("--train-images", "3000", "--val-images", "500", "--epochs", "8", "--batch-size", "32"),
        "natural": ("--size", "64", "--train-images", "3000", "--val-images", "1000"),
        "search": ("--epochs", "8"), "train": ("--epochs", "12")},
    "tiny": {
        **{kind: ("--train-images", "40", "--val-images", "10", "--epochs", "1", "--batch-size", "20")
           for kind in ("classifier", "joint", "sweep")},
        "natural": ("--size", "32", "--train-images", "40", "--val-images", "10"),
        "search": ("--epochs", "2", "--batch-size", "8"), "train": ("--epochs", "1", "--batch-size", "20")},
}


# ---------------------------------------------------------------------------------------------------------------
# The runs


def study(name: str, kind: str) -> Run:
    return Run(name, kind, ("--model", name, "--recipe", "study"))


def searched(name: str, target: float, *flags: str, train: tuple[str, ...] = ()) -> Run:
    return Run(name, "natural", train, flags, target)


def baseline(name: str) -> Run:
    return Run(f"natural-{name}", "natural", ("--model", name))


S, M, L = 0.25, 0.5, 0.75  # where between the fastest and the slowest network; the papers' 6, 8, 12 ms are of their GPU
DC_S, DC_M, DC_L = (searched(f"dcnas-{name}", target, "--model", "dcnas")
                    for name, target in (("s", S), ("m", M), ("l", L)))


def alone(run: Run, model: str) -> Run:
    """The encoder that `run` has found, trained as another model."""
    return Run(f"{run.name}-as-{model}", "natural", ("--train-as", model), from_run=run.name)


def beats(better: str, worse: str, column: str, margin: float = 0.0) -> Callable:
    """The claim that one row has more of a column than another, by `margin`."""
    return lambda rows: rows[better][column] > rows[worse][column] + margin


def close(one: str, other: str, column: str, margin: float) -> Callable:
    """The claim that two rows differ by less than `margin`."""
    return lambda rows: abs(rows[one][column] - rows[other][column]) < margin


def paper(psnr: float | None = None, ssim: float | None = None, accuracy: float | None = None, ms: float | None = None,
          macs: float | None = None) -> dict:
    values = {"MACs M": macs, "latency ms": ms, "PSNR dB": psnr, "SSIM": ssim, "accuracy %": accuracy}
    return {column: value for column, value in values.items() if value is not None}


def unet_name(b: int = 8, d: int = 4, m: float = 2, c: int = 2) -> str:
    return f"unet-b{b}-d{d}-m{m:g}-c{c}"


def _sweep_rows() -> tuple:
    names = [unet_name(b=b) for b in (4, 8, 16, 32, 64)]
    names += [unet_name(b=b, d=d) for b in (8, 16, 32) for d in (2, 3, 5)]
    names += [unet_name(b=b, c=1) for b in (8, 16, 32, 64)] + [unet_name(m=m) for m in (1, 1.5)]
    return tuple((name, study(name, "sweep"), {}) for name in names)


def scales_better(whole: str, narrower: str, other: str) -> Callable:
    """The claim that making UNet `whole` into `narrower` costs less PSNR at sigma 0.8 per halving of MACs than into `other`."""
    def claim(rows: dict) -> bool:
        def slope(name):
            lost = rows[whole]["PSNR at 0.8"] - rows[name]["PSNR at 0.8"]
            return lost / math.log2(rows[whole]["MACs M"] / rows[name]["MACs M"])
        return slope(narrower) < slope(other)
    return claim


ACCURACY = ("MACs M", "latency ms", "accuracy %")
TABLES = {
    "table-1": Table(
        "DC-Net, Integrated and Sequential, baseline and reduced", "table 3",
        (("Integrated, baseline", study("dcnet", "joint"), paper(32.8, 0.97, 88.1, macs=1301.8)),
         ("Sequential, baseline", study("dcnet-seq", "joint"), paper(27.1, 0.95, 89.6, macs=1302.1)),
         ("Integrated, reduced", study("dcnet-s", "joint"), paper(29.9, 0.97, 86.2, macs=51.2)),
         ("Sequential, reduced", study("dcnet-s-seq", "joint"), paper(25.2, 0.92, 87.6, macs=51.5))),
        (("reduced: Integrated denoises better than Sequential", beats("Integrated, reduced", "Sequential, reduced", "PSNR dB")),
         ("reduced: Sequential classifies better", beats("Sequential, reduced", "Integrated, reduced", "accuracy %")),
         ("baseline: Integrated denoises better than Sequential",
          beats("Integrated, baseline", "Sequential, baseline", "PSNR dB")),
         ("baseline: Sequential classifies better", beats("Sequential, baseline", "Integrated, baseline", "accuracy %")))),
    "table-2": Table(
        "Denoisers: D-NAS beside UNets", "table 4",
        (("UNet-S", baseline("unet-s"), paper(25.0, 0.69, ms=9.2)), ("UNet-M", baseline("unet-m"), paper(25.9, 0.72, ms=16.9)),
         ("UNet {64, 5}", baseline("unet-original"), paper(26.6, 0.74, ms=116.5)),
         ("D-NAS S", searched("dnas-s", S, "--model", "dnas"), paper(26.0, 0.72, ms=9.45)),
         ("D-NAS M", searched("dnas-m", M, "--model", "dnas"), paper(25.6, 0.71, ms=11.6)),
         ("D-NAS S, four times as wide", Run("dnas-s-wide", "natural", ("--widen", "4"), from_run="dnas-s"),
          paper(26.5, 0.73, ms=109.8))),
        (("D-NAS S denoises better than UNet-S", beats("D-NAS S", "UNet-S", "PSNR dB")),),
        columns=("MACs M", "latency ms", "PSNR dB", "SSIM")),
    "table-3": Table(
        "DC-NAS of three latencies beside joint models, classifiers and denoisers; its classifier alone", "table 5:3 and 5:5",
        (("DC-NAS S", DC_S, paper(25.4, 0.70, 74.3, 10.3)), ("DC-NAS M", DC_M, paper(25.4, 0.70, 76.0, 13.7)),
         ("DC-NAS L", DC_L, paper(25.2, 0.70, 76.4, 17.9)),
         ("C-NAS S alone", alone(DC_S, "cnas"), paper(accuracy=73.5, ms=5.9)),
         ("C-NAS M alone", alone(DC_M, "cnas"), paper(accuracy=75.5, ms=7.9)),
         ("C-NAS L alone", alone(DC_L, "cnas"), paper(accuracy=76.0, ms=12.0)),
         ("random search, latency of M", searched("random-m", M, "--model", "dcnas", "--strategy", "random"), {}),
         ("DC-Net S", baseline("dcnet-s"), paper(24.5, 0.68, 61.9, 10.0)),
         ("DC-Net S, tail of DC-NAS", baseline("dcnet-s-tail"), paper(24.6, 0.69, 68.6, 10.5)),
         ("MobileNetV3-small", baseline("mobilenet-v3-small"), paper(accuracy=70.4, ms=4.9)),
         ("EfficientNetV2-b0", baseline("efficientnet-v2-b0"), paper(accuracy=75.4, ms=9.0)),
         ("EfficientNetV2-b1", baseline("efficientnet-v2-b1"), paper(accuracy=76.7, ms=11.8)),
         ("LPIENet 0.25x", baseline("lpienet-0.25x"), paper(24.1, 0.65, ms=12.7)),
         ("LPIENet 0.5x", baseline("lpienet-0.5x"), paper(24.7, 0.68, ms=19.8)),
         ("UNet-S", baseline("unet-s"), paper(25.0, 0.69, ms=9.2)),
         ("DnCNN", baseline("dncnn"), {})),
        (("DC-NAS S denoises better than DC-Net S", beats("DC-NAS S", "DC-Net S", "PSNR dB")),
         ("DC-NAS S classifies better than DC-Net S", beats("DC-NAS S", "DC-Net S", "accuracy %")),
         ("DC-NAS S classifies better than DC-Net S with its tail", beats("DC-NAS S", "DC-Net S, tail of DC-NAS", "accuracy %")),
         ("the classifier gains by joint training, S", beats("DC-NAS S", "C-NAS S alone", "accuracy %")),
         ("the classifier gains by joint training, M", beats("DC-NAS M", "C-NAS M alone", "accuracy %")),
         ("search finds a better classifier than chance (ours: not in the papers)",
          beats("DC-NAS M", "random search, latency of M", "accuracy %")),
         ("search finds a better denoiser than chance (ours)", beats("DC-NAS M", "random search, latency of M", "PSNR dB")))),
    "table-4": Table(
        "What DC-NAS is searched by: clean or noisy images, L_Cls or L_Both", "table 5:2",
        (("clean, L_Cls", searched("dcnas-m-clean", M, "--model", "dcnas", "--search-images", "clean"),
          paper(25.4, 0.70, 75.7, 13.9)),
         ("noisy, L_Cls", DC_M, paper(25.4, 0.70, 76.0, 13.7)),
         ("noisy, L_Both", searched("dcnas-m-both", M, "--model", "dcnas", "--search-loss", "both"),
          paper(25.4, 0.70, 75.5, 13.8))),
        (("noisy images find a better classifier than clean ones", beats("noisy, L_Cls", "clean, L_Cls", "accuracy %")),
         ("L_Cls finds a better classifier than L_Both", beats("noisy, L_Cls", "noisy, L_Both", "accuracy %")),
         ("all denoise alike (within 0.1 dB)", close("noisy, L_Cls", "noisy, L_Both", "PSNR dB", 0.1)))),
    "table-5": Table(
        "DC-NAS, Integrated and Sequential, of like latency", "table 5:1",
        (("Sequential", searched("dcnas-seq", 0.0, "--model", "dcnas-seq", "--search-images", "clean"),
          paper(25.0, 0.69, 76.0, 18.3)),
         ("Integrated", searched("dcnas-l-clean", 1.0, "--model", "dcnas", "--search-images", "clean"),
          paper(25.5, 0.70, 76.0, 17.9))),
        (("Integrated denoises better", beats("Integrated", "Sequential", "PSNR dB")),
         ("both classify alike (within 1 %)", close("Integrated", "Sequential", "accuracy %", 1.0)))),
    "table-6": Table(
        "Decoders of DC-NAS M (searched on clean images)", "table 5:4",
        tuple((label, Run(f"dcnas-m-clean-{kind}", "natural", ("--decoder", kind), from_run="dcnas-m-clean"), numbers)
              for label, kind, numbers in (("convolutions", "conv", paper(25.4, 0.70, 75.7, 13.9)),
                                           ("MBConv", "mb", paper(25.8, 0.71, 75.5, 27.7)),
                                           ("MBConv, 1 operation", "mb-1", paper(25.3, 0.70, 75.4, 16.4)),
                                           ("MBConv, 3 levels", "mb-3level", paper(25.4, 0.70, 75.1, 22.1)))),
        (("MBConvs denoise better", beats("MBConv", "convolutions", "PSNR dB")),
         ("and are slower", beats("MBConv", "convolutions", "latency ms")))),
    "table-7": Table(
        "Classifiers of the controlled study", "table 1 and 6",
        tuple((label, study(label.lower(), "classifier"), paper(accuracy=accuracy, macs=kflops / 1e3, ms=ms))
              for label, kflops, ms, accuracy in (
                  ("Conv-L", 447, 0.336, 63.2), ("MB1-S", 177, 0.300, 56.2), ("MB2.5-M", 350, 0.384, 64.1),
                  ("MB4-L", 424, 0.468, 64.9), ("MB2.5-S", 178, 0.390, 58.4), ("MB4-S", 188, 0.403, 56.6),
                  ("Conv-S", 163, 0.281, 55.4), ("Conv-M", 345, 0.317, 61.4))),
        (("MB2.5-M beats Conv-L with fewer FLOPs", beats("MB2.5-M", "Conv-L", "accuracy %")),
         ("MB4-L beats Conv-L with fewer FLOPs", beats("MB4-L", "Conv-L", "accuracy %")),
         ("MB1-S falls far behind Conv-L (by over 3 %)", beats("Conv-L", "MB1-S", "accuracy %", 3.0)),
         ("MB2.5-S beats MB1-S", beats("MB2.5-S", "MB1-S", "accuracy %")),
         ("MB2.5-S beats Conv-S", beats("MB2.5-S", "Conv-S", "accuracy %")),
         ("MB2.5-M beats Conv-M", beats("MB2.5-M", "Conv-M", "accuracy %"))),
        columns=ACCURACY),
    "table-8": Table(
        "UNet, baseline and reduced, at single noise levels", "table 2",
        tuple((label, study(name, "joint"), {"MACs M": macs, **{f"PSNR at {s}": v for s, v in zip((0.2, 0.4, 0.8, 1), values)}})
              for label, name, macs, values in (("UNet", "unet", 1301.8, (33.9, 29.5, 23.8, 22.3)),
                                                ("UNet-S", "unet-s", 51.2, (33.2, 28.7, 23.3, 22.0)))),
        (("UNet-S loses less than 1 dB at sigma 0.8", beats("UNet-S", "UNet", "PSNR at 0.8", -1.0)),),
        columns=("MACs M", "latency ms", "PSNR at 0.2", "PSNR at 0.4", "PSNR at 0.8", "PSNR at 1")),
    "table-9": Table("Candidate operations of the search spaces", "table 7", ()),
    "table-10": Table(
        "Removed (fixed) and learned beta, searched twice each; trained and tested on clean images", "table 8",
        tuple((f"{label} beta, search {number}", searched(f"cnas-{depth}-{number}", S, "--model", "cnas", "--search-images",
                                                          "clean", "--depth", depth, "--seed", str(number),
                                                          train=("--sigma", "0")), {"clean accuracy %": accuracy, "latency ms": ms})
              for label, depth, numbers in (("removed", "fixed", ((86.2, 5.85), (86.4, 5.81))),
                                            ("learned", "learned", ((84.9, 5.04), (83.5, 4.47))))
              for number, (accuracy, ms) in enumerate(numbers, 1)),
        (("removed beta classifies better than learned (means)", lambda rows: statistics.mean(
            rows[f"removed beta, search {n}"]["clean accuracy %"] for n in (1, 2)) > statistics.mean(
            rows[f"learned beta, search {n}"]["clean accuracy %"] for n in (1, 2))),
         ("the two searches agree better with removed beta (latency)", lambda rows: abs(
             rows["removed beta, search 1"]["latency ms"] - rows["removed beta, search 2"]["latency ms"]) < abs(
             rows["learned beta, search 1"]["latency ms"] - rows["learned beta, search 2"]["latency ms"]))),
        columns=("MACs M", "latency ms", "clean accuracy %")),
    "figure-5": Table(
        "Accuracy on clean images by size of the search space, at three latencies", "figure 6",
        tuple((f"{space} operations, {name}", searched(f"cnas-space{space}-{name.lower()}", target, "--model", "cnas", "--space",
                                                       str(space), "--search-images", "clean", train=("--sigma", "0")), {})
              for space in (4, 6, 8) for name, target in (("S", S), ("M", M), ("L", L))),
        (("at the largest latency 4 operations are at least as good as 8",
          beats("4 operations, L", "8 operations, L", "clean accuracy %", -1e-9)),),
        columns=("MACs M", "latency ms", "clean accuracy %")),
    "figure-6": Table(
        "Classifiers of like latency on clean images", "figure 7",
        (("C-NAS M", searched("cnas-m", M, "--model", "cnas", "--search-images", "clean", train=("--sigma", "0")), {}),
         ("TF-NAS (8 operations, learned beta)", searched("tfnas-c", M, "--model", "cnas", "--search-images", "clean", "--space",
                                                         "8", "--depth", "learned", train=("--sigma", "0")), {}),
         ("MobileNetV2", Run("clean-mobilenet-v2", "natural", ("--model", "mobilenet-v2", "--sigma", "0")), {}),
         ("ResNet-18", Run("clean-resnet18", "natural", ("--model", "resnet18", "--sigma", "0")), {})),
        (("C-NAS M beats TF-NAS", beats("C-NAS M", "TF-NAS (8 operations, learned beta)", "clean accuracy %")),
         ("C-NAS M beats ResNet-18", beats("C-NAS M", "ResNet-18", "clean accuracy %"))),
        columns=("MACs M", "latency ms", "clean accuracy %")),
    "figure-9": Table(
        "UNet: width b, depth d, multiplier m and convolutions c", "figure 3", _sweep_rows(),
        (("m scales down better than c (from b 8)", scales_better(unet_name(), unet_name(m=1.5), unet_name(c=1))),
         ("m scales down better than d (from b 8)", scales_better(unet_name(), unet_name(m=1.5), unet_name(d=3))),
         ("b scales down better than c (from b 16)", scales_better(unet_name(b=16), unet_name(), unet_name(b=16, c=1))),
         ("b scales down better than d (from b 16)", scales_better(unet_name(b=16), unet_name(), unet_name(b=16, d=3))),
         ("b 4 breaks the trend: the step from 8 to 4 costs more than that from 16 to 8", lambda rows: (
             rows[unet_name()]["PSNR at 0.8"] - rows[unet_name(b=4)]["PSNR at 0.8"]
             > rows[unet_name(b=16)]["PSNR at 0.8"] - rows[unet_name()]["PSNR at 0.8"]))),
        columns=("MACs M", "PSNR at 0.8")),
}


# ---------------------------------------------------------------------------------------------------------------
# Running


@dataclass
class Workshop:
    """Where the runs lie and how they are made: `scale`, `data` of the natural images, flags for every command."""

    folder: Path
    scale: str
    data: str | None
    data_root: str
    digits: bool
    threads: int | None
    device: str
    costs: dict = field(default_factory=dict)

    def command(self, script: str, *flags: str) -> None:
        """Run a script of this project; RuntimeError names the command when it fails."""
        line = [sys.executable, str(HERE / script), *flags, "--device", self.device]
        if self.threads and script != "latency.py":  # a table takes one thread on a CPU, whatever the trainings take
            line += ["--threads", str(self.threads)]
        print("$ " + shlex.join(["python", script, *line[2:]]), flush=True)
        process = subprocess.Popen(line)
        try:
            failed = process.wait()
        except KeyboardInterrupt:  # it got the signal too, and saves
            process.wait()
            raise
        if failed:
            raise RuntimeError(f"This command failed; mend what it says, and start again, nothing is lost: "
                               f"{shlex.join(['python', script, *line[2:]])}")

    def source(self, kind: str) -> Path:
        """The folder of the runs on one kind of data, by its name: runs on other data are other runs."""
        return self.folder / Path(self.data_flags(kind)[1]).name

    def data_flags(self, kind: str) -> list[str]:
        if kind == "natural":
            if self.data is None:
                raise ValueError("This table needs natural images: name an image folder with class folders by --data.")
            return ["--data", self.data, *SCALES[self.scale]["natural"]]
        source = "digit-pairs" if self.digits else "mnist-pairs"
        return ["--data", source, "--data-root", self.data_root, *SCALES[self.scale][kind]]

    def flag(self, kind: str, name: str) -> str | None:
        flags = self.data_flags(kind)
        return flags[flags.index(name) + 1] if name in flags else None

    def table(self, classes: int) -> latency.LatencyTable:
        """The latency table of the natural images' size, made when it is not there."""
        path = self.source("natural") / "latency.json"
        if not path.exists():
            size = self.flag("natural", "--size")
            self.command("latency.py", "--size", size, "--classes", str(classes), "--output", str(path),
                         *(("--rounds", "1") if self.scale == "tiny" else ()))
        return latency.load_table(path)

    def find(self, run: Run, seed: int) -> Path:
        """The architecture record of a searched run."""
        folder = self.source("natural") / run.name / f"seed-{seed}" / "search"
        if (folder / "arch.json").exists():
            return folder / "arch.json"
        from data import load_data

        classes = len(load_data(self.data, size=8, train_images=1, val_images=1).classes or [])
        table, own = self.table(classes), dict(zip(run.search[::2], run.search[1::2]))
        space, depth = int(own.get("--space", 4)), own.get("--depth", "fixed")
        supernet = models.SuperNet("dnas" if own["--model"] == "dnas" else "cnas", space, 1, depth=depth)
        # Targets are shares of the range of the space of 4 without learned depth, so that all searches of a model share them;
        # a share of 0 is brought just within reach.
        plain = models.SuperNet("dnas" if own["--model"] == "dnas" else "cnas", 4, 1)
        low, high = search.Budget(table, plain, own["--model"], 1.0).range_ms()
        fastest, _ = search.Budget(table, supernet, own["--model"], 1.0).range_ms()
        target = max(low + run.target * (high - low), 1.03 * fastest)
        flags = [*self.data_flags("natural"), *SCALES[self.scale]["search"], "--target", f"{target:.3f}", "--table",
                 str(self.source("natural") / "latency.json"), "--output-dir", str(folder)]
        if "--seed" not in run.search:
            flags += ["--seed", str(seed)]
        if (folder / "search.pt").exists():
            flags += ["--resume", str(folder)]
        self.command("search.py", *flags, *run.search)
        return folder / "arch.json"

    def measure(self, run: Run, seed: int, runs: dict[str, Run]) -> dict:
        """The numbers of a run and a seed, which are made where they are not there."""
        folder = self.source(run.kind) / run.name / f"seed-{seed}"
        metrics = folder / "eval" / "metrics.json"
        if not metrics.exists():
            flags = [*run.train, *self.data_flags(run.kind), "--seed", str(seed), "--output-dir", str(folder / "train")]
            if run.kind == "natural":
                flags += SCALES[self.scale]["train"]
            if run.search:
                flags += ["--arch", str(self.find(run, seed))]
            elif run.from_run:
                flags += ["--arch", str(self.find(runs[run.from_run], seed))]
            if (folder / "train" / "last.pt").exists():
                flags += ["--resume", str(folder / "train")]
            self.command("train.py", *flags)
            # the data of the training, all of its validation images
            count = self.flag(run.kind, "--val-images")
            self.command("eval.py", "--checkpoint", str(folder / "train" / "best.pt"), "--output-dir", str(metrics.parent),
                         *(("--val-images", count) if count else ()), "--no-latency")
        # Latencies are taken when the table is made, one after the other: the runs may be days apart.
        cost = (self.found_cost(folder / "train" / "best.pt") if run.kind == "natural" else self.study_cost(run.name))
        return numbers(json.loads(metrics.read_text())) | cost

    def found_cost(self, checkpoint: Path) -> dict:
        """Latency of a trained network at the size that it was trained for."""
        network, content = models.load_checkpoint(checkpoint, self.device)
        setting = latency.this_setting(self.device, size=content["size"], num_classes=len(content["classes"] or []))
        return {"latency ms": latency.measure_network(network, setting).median_ms}

    def study_cost(self, name: str) -> dict:
        """FLOPs and latency of a network of the controlled study, as the paper has them: of one digit, by its counting."""
        if name not in self.costs:
            entry = baselines.find_baseline(name)
            network = OneDigit(entry.build(10))
            setting = latency.this_setting(self.device, size=entry.size, num_classes=10, batch=1)
            self.costs[name] = {"MACs M": baselines.paper_flops(network.network, entry.size) / 1e6,
                                "latency ms": latency.measure_network(network, setting).median_ms}
        return self.costs[name]


class OneDigit(nn.Module):
    """A network of the controlled study that looks at one digit of the scene, for its latency."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("box", torch.tensor([[[0, 0, baselines.DIGIT, baselines.DIGIT]]]), persistent=False)

    def forward(self, x: torch.Tensor) -> models.Output:
        return models.run(self.network, x, self.box if x.shape[-1] > baselines.DIGIT else None)


def numbers(metrics: dict) -> dict:
    """The columns of a table from metrics.json; None for what the network does not do."""
    means, levels = metrics["means"]["all_levels"], {row["sigma"]: row for row in metrics["levels"]}
    accuracy, clean = means["accuracy"], levels.get(0.0, {}).get("accuracy")
    values = {"MACs M": metrics["network"]["macs"] / 1e6, "parameters": metrics["network"]["parameters"],
              "PSNR dB": means["psnr_db"], "SSIM": means["ssim"], "accuracy %": accuracy and 100 * accuracy,
              "clean accuracy %": clean and 100 * clean}
    return values | {f"PSNR at {sigma:g}": row["psnr_db"] for sigma, row in levels.items()}


def summarise(columns: tuple[str, ...], rows: list[tuple[str, list[dict] | None, dict]]) -> tuple[str, list[dict]]:
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


def judge(claims: tuple, rows: list[tuple[str, list[dict] | None, dict]]) -> list[dict]:
    """Each claim with "holds", "does not hold" or "not run", and for how many of the seeds it holds by themselves."""
    results = []
    for text, claim in claims:
        seeds = min((len(values) for _, values, _ in rows if values), default=0)
        verdicts = []
        mean_rows = {label: _mean(values) for label, values, _ in rows if values}
        try:
            verdict = "holds" if claim(mean_rows) else "does not hold"
            verdicts = [bool(claim({label: values[n] for label, values, _ in rows if values})) for n in range(seeds)]
        except (KeyError, TypeError):  # a row that was not run, or cannot do what is claimed
            verdict = "not run"
        results.append({"claim": text, "verdict": verdict, "seeds_for": sum(verdicts), "seeds": len(verdicts)})
    return results


def _mean(values: list[dict]) -> dict:
    keys = [key for key in values[0] if all(value.get(key) is not None for value in values)]
    return {key: statistics.mean(value[key] for value in values) for key in keys}


def plot(path: Path, title: str, columns: tuple[str, ...], records: list[dict]) -> bool:
    """Each row a point: its cost against its first and last quality column; the paper's numbers beside. False without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cost = "MACs M"
    qualities = [column for column in columns if column not in ("MACs M", "latency ms", "SSIM")]
    figure, axes = pyplot.subplots(1, len(qualities), figsize=(6.5 * len(qualities), 5), squeeze=False)
    for axis, quality in zip(axes[0], qualities):
        for record in records:
            if cost in record["ours"] and quality in record["ours"]:
                x, y = record["ours"][cost]["mean"], record["ours"][quality]
                axis.errorbar(x, y["mean"], y["half_range"], fmt="o", capsize=3)
                axis.annotate(record["label"], (x, y["mean"]), fontsize=7, xytext=(4, 4), textcoords="offset points")
        axis.set_xscale("log")
        axis.set_xlabel("MACs, millions")
        axis.set_ylabel(quality)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    models.write_file(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))
    pyplot.close(figure)
    return True


def operations_table() -> str:
    """Markhorst 2024, table 9."""
    lines = [f"{'operation':<14} {'kernel':>6} {'expansion':>9} {'SE':>4}  in spaces of"]
    for operation in models.SPACES[8]:
        spaces = ", ".join(str(space) for space, members in models.SPACES.items() if operation in members)
        lines.append(f"{'MB-' + operation.name:<14} {operation.kernel_size:>6} {operation.expansion:>9} "
                     f"{'yes' if operation.se else '-':>4}  {spaces}")
    return "\n".join(lines)


def all_runs() -> dict[str, Run]:
    """Every run by its name."""
    return {run.name: run for table in TABLES.values() for _, run, _ in table.rows}


def make_table(name: str, workshop: Workshop, seeds: list[int], skip: list[str]) -> None:
    """Make the runs of a table, and its files; print it."""
    table, runs = TABLES[name], all_runs()
    if not table.rows:
        text, records, claims = operations_table(), [], []
    else:
        rows = []
        for label, run, published in table.rows:
            measured = None if run.name in skip else [workshop.measure(run, seed, runs) for seed in seeds]
            rows.append((label, measured, published))
        text, records = summarise(table.columns, rows)
        claims = judge(table.claims, rows)
    head = f"{name} (thesis: {table.thesis}): {table.title}"
    sources = sorted({workshop.source(run.kind).name for _, run, _ in table.rows})
    about = "; ".join([*sources, f"scale {workshop.scale}" + ("" if workshop.scale == "full" else
                                                              ", scaled down from the paper's"),
                       f"seeds {', '.join(map(str, seeds))}, ± half the range over them"])
    made = models.provenance(latency.device_name(workshop.device))
    lines = [head, f"{about}; {made['device']}, torch {made['torch']}, {made['date'][:10]}", "", text, ""]
    lines += [f"{claim['verdict']:>14}: {claim['claim']}" + (f" ({claim['seeds_for']} of {claim['seeds']} seeds)"
                                                           if claim["seeds"] else "") for claim in claims]
    path = workshop.folder / f"{name}.txt"
    content = "\n".join(lines).rstrip() + "\n"
    models.write_file(path, lambda temporary: temporary.write_text(content))
    models.write_json(path.with_suffix(".json"), {
        "format": FORMAT, "version": VERSION, "made": made, "table": name, "title": table.title, "scale": workshop.scale,
        "flags": {kind: list(flags) for kind, flags in SCALES[workshop.scale].items()}, "data": sources, "seeds": seeds,
        "rows": records,
        "claims": claims})
    drawn = bool(records) and plot(path.with_suffix(".png"), head, table.columns, records)
    print(f"\n{content}\nwrote {path}, {path.with_suffix('.json')}" + (f", {path.with_suffix('.png')}" if drawn else ""))


# ---------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<10} thesis {table.thesis:<18} {table.title}" for name, table in TABLES.items())
    parser = argparse.ArgumentParser(
        prog="reproduce.py", usage="python reproduce.py NAME [NAME ...] [options]",
        description="Run an experiment of the joint papers and print its table beside the paper's.\n\n" + listing +
                    "\n  figure-4 (thesis figure 5), how alpha moves, is alpha.png in the search folders of table-10;\n"
                    "  figures 1-3, 7 and 8 are pictures and drawings: grid.png in the folders of evaluations.",
        epilog="examples:\n  python reproduce.py table-7 --scale small --seeds 0 1\n"
               "  python reproduce.py table-1 --scale small --skip dcnet dcnet-seq\n"
               "  python reproduce.py table-10 --scale full --data imagenet100",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*TABLES, []], metavar="NAME", help="tables and figures, as above")
    parser.add_argument("--scale", choices=SCALES, default="small",
                        help="full: as in the papers; small: fewer images and epochs, smaller (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="one run each (default: 0)")
    parser.add_argument("--skip", nargs="+", default=[], choices=sorted(all_runs()), metavar="RUN",
                        help="runs to leave out, by the name of their folder; their rows say so")
    parser.add_argument("--data", metavar="FOLDER", help="natural images, a folder with class folders, for the searched networks")
    parser.add_argument("--data-root", default="data", metavar="DIR",
                        help="folder that holds MNIST, or that it is downloaded to (default: %(default)s)")
    parser.add_argument("--digits", action="store_true", help="drawn digits instead of MNIST in the controlled study")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch on a CPU (default: torch's own)")
    parser.add_argument("--device", default=latency.default_device(), help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--output-dir", default="runs/reproduce", metavar="DIR",
                        help="folder of the runs; a folder below it for each scale (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.names:
        parser.print_help()
        return
    workshop = Workshop(Path(args.output_dir) / args.scale, args.scale, args.data, args.data_root, args.digits, args.threads,
                        args.device)
    try:
        latency.check_device(args.device)
        for name in args.names:
            make_table(name, workshop, args.seeds, args.skip)
    except ValueError as error:
        parser.error(str(error))
    except (RuntimeError, OSError) as error:
        sys.exit(f"reproduce.py: {error}")
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
