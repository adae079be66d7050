"""Is it worth searching on your data, at your latency? Found networks beside random ones and known ones.

    python judge.py --target 4 --data photos --size 64
    python judge.py --target 4,8 --found 3 --random 3 --search "--epochs 6" --train "--epochs 8"
    python judge.py --target 4 --model dnas --data photos --size 64 --eval "--data kodak --split all"

For each target: N searches with N seeds, N random networks of the same space and cost, and networks made by
hand, widened until they have that cost too. All are trained alike and evaluated on test images. In the wide
space networks from all over it are trained as well: does the first supernet put them in the right order?
Writes into --output-dir judge.txt, judge.json and, with matplotlib, judge.png, the front: after each run of
what is there so far. Runs that are there are not repeated, stopped ones go on. Start the same command again
beside it, on as many cores as you like: each takes runs that no other one has. Sources: Yang et al. 2020,
"NAS evaluation is frustratingly hard" (relative improvement over random).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import data as data_module
import files
import latency
import models
import registry
import search
import train
from data import Parser, number, whole
from run import (SIGMAS, Busy, Command, default_device, lock_folder, prepare_device, run_command, say,
                 unlock_folder)

FORMAT, VERSION = "joint-judge", 2
WITHIN = 0.03  # of the target, the cost of a network made by hand
DENOISERS = {"UNet": {"unet-b16-d4-m2-c2-res": 1.0}, "DnCNN": {"dncnn": 1.0},
             "grey DnCNN": {"dncnn-grey": 1.0}}
HAND = {  # made by hand, by --model: named models, and the share of the target that each of them gets
    "dcnas": {
        "one block a stage": {"dcnas-k3-e6-fused": 1.0},
        "DC-Net with a tail": {"dcnet-s-tail": 1.0},
        "MobileNetV2 and decoder": {"mobilenet-v2-decoder": 1.0},
        "MobileNetV3 and decoder": {"mobilenet-v3-small-decoder": 1.0},
        "MobileNetV3 and UNet": {"mobilenet-v3-small": 0.25, "unet-b16-d4-m2-c2": 0.75}},  # one task each
    "cnas": {"one block a stage": {"cnas-k3-e6-fused": 1.0}, "MobileNetV2": {"mobilenet-v2": 1.0},
             "MobileNetV3": {"mobilenet-v3-small": 1.0}},
    "dnas": {"one block a stage": {"dnas-k3-e6-fused": 1.0}, **DENOISERS}}
TWO_TASKS = ("dcnas", "dcnas-seq")  # --model that denoises and classifies
PLAIN = "no search"  # the network of --strategy plain, where a method has that, whatever it costs
MEASURES = {  # column -> (more is better, how it is written)
    "accuracy %": (True, "{:.2f}"), "PSNR dB": (True, "{:.2f}"), "SSIM": (True, "{:.4f}"),
    "joint loss": (False, "{:.4f}")}
ORDER = ("joint loss", "PSNR dB", "accuracy %")  # the first one that a network has tells how good it is
RANKED = "ranked"  # networks that the search of seed 0 compared, from all over the space
SAME = ("model", "data", "size", "train_images", "test_images", "target", "target_macs", "space", "mode",
        "search", "train", "eval")  # flags that all runs in a folder share


@dataclass(frozen=True)
class Contender:
    """One row's network of one seed: `group` is "found", "random", PLAIN, a key of HAND, or RANKED."""

    group: str
    target: float
    seed: int


# --- Statistics --------------------------------------------------------------------------------------------

def interval(values: list[float], others: list[float] | None = None, draws: int = 10_000) -> tuple:
    """The 95 % bootstrap interval of a mean, or of the mean of `values` minus that of `others` (Efron
    1979); of fewer than five values it is too narrow."""
    rng = random.Random(0)
    def mean(sample: list[float]) -> float:
        return statistics.fmean(rng.choices(sample, k=len(sample)))
    means = sorted(mean(values) - (mean(others) if others else 0.0) for _ in range(draws))
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def summarise(values: list[float]) -> dict:
    """Mean, standard deviation, 95 % interval and number of some values."""
    low, high = interval(values)
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            "low": low, "high": high, "count": len(values), "values": values}


def better_by(ours: list[float], theirs: list[float], more_is_better: bool) -> dict:
    """By how much ours are better: the difference of the means with its interval, None where one of the two
    has a single value, and the relative difference, None where theirs is 0."""
    sign, low, high = 1 if more_is_better else -1, None, None
    if min(len(ours), len(theirs)) > 1:
        low, high = interval([sign * value for value in ours], [sign * value for value in theirs])
    mean = statistics.fmean(theirs)
    difference = sign * (statistics.fmean(ours) - mean)
    return {"difference": difference, "low": low, "high": high,
            "relative_percent": 100 * difference / abs(mean) if mean else None}


def kendall_tau(first: list[float], second: list[float]) -> float:
    """Kendall's tau-a of two orders of the same things: 1 the same, 0 unrelated, -1 reversed."""
    pairs = [(a, b) for a in range(len(first)) for b in range(a)]
    sign = lambda x: (x > 0) - (x < 0)
    agree = [sign(first[a] - first[b]) * sign(second[a] - second[b]) for a, b in pairs]
    return sum(agree) / len(pairs)


def image_words(values: dict) -> list[str]:
    """The flags of images and noise (data.image_flags) as words of a command."""
    words = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-"))
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


# --- Runs --------------------------------------------------------------------------------------------------

class Judge:
    """Makes the runs by the flags of this command."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.output_dir)
        self.targets = args.target or [args.target_macs]
        self.unit = "ms" if args.target else "MACs M"
        spaces = [name for method in search.methods_of(args.model) for name in getattr(method, "SPACES", ())]
        if args.space not in (None, *spaces):
            raise ValueError(f"--space {args.space} is not for --model {args.model}; leave it out.")
        args.space = args.space or (spaces[0] if spaces else None)
        args.mode = args.mode if args.target else None
        self.data = ["--data", args.data, "--data-root", args.data_root]
        for flag, value in (("--size", args.size or (64 if spaces else None)),
                            ("--train-images", args.train_images)):
            self.data += [flag, str(value)] if value else []
        self.searched = ["--model", args.model, *self.data, *(["--space", args.space] if spaces else []),
                         *shlex.split(args.search)]
        self.train = shlex.split(args.train)
        flags, _ = search.read_command([*self.searched, *self.limit(self.targets)])
        self.method = search.method_of(args.model, vars(flags))
        data = data_module.data_from({**vars(flags), "train_images": 1, "val_images": 1, "test_images": 1})
        space = self.method.plan(data, **vars(flags))["space"]  # ValueError where the images do not fit
        self.classes, self.channels, args.size = len(data.classes or []) or 1, data.channels, data.size
        self.images = data_module.image_flags(vars(flags))  # which a record keeps, for its training
        self.one_for_all = "target" in getattr(self.method, "FREE_FLAGS", ())
        self.by_hand = {} if models.scale_of(space) > 1 else {
            name: networks for name, networks in HAND.get(args.model.removesuffix("-seq"), DENOISERS).items()
            if name not in args.skip and all(self.takes(network) for network in networks)}

    def named(self, name: str, factor: float = 1.0) -> nn.Module:
        """A named model for these images, with its channels times a factor."""
        record = registry.named_record(name, self.classes, {})
        return registry.build_network(train.modify_record(record, widen=factor, grey=self.channels == 1))

    def takes(self, name: str) -> bool:
        """Whether a named model takes images of so many channels."""
        with torch.device("meta"):
            return models.channels_of(self.named(name)) == self.channels

    def limit(self, targets: list[float]) -> list[str]:
        """The flags of search.py that name targets, and the table for them."""
        named = ",".join(f"{target:g}" for target in targets)
        return ["--target", named, "--mode", self.args.mode] if self.args.target else ["--target-macs", named]

    def command(self, script: str, *flags: str) -> None:
        run_command(script, *flags, device=self.args.device, threads=self.args.threads)

    @functools.cached_property
    def table(self) -> latency.Table:
        """The latency table, made where it is missing; while another process makes it, this one waits."""
        path = self.folder / "latency.json"
        while not path.exists():
            try:
                lock_folder(self.folder)
            except Busy:
                time.sleep(5)
                continue
            self.command("search.py", *self.searched, "--range", "--mode", self.args.mode, "--output-dir",
                         str(self.folder / "table"))
            os.replace(self.folder / "table" / "latency.json", path)
        return latency.load_table(path)

    def where(self, contender: Contender) -> Path:
        return self.folder / f"target_{contender.target:g}" / contender.group.replace(" ", "-") \
            / f"seed_{contender.seed}"

    def cost(self, network: nn.Module) -> float:
        """What a network costs: MACs, or its latency at the speed of the table, in turn with the table's
        reference."""
        if not self.args.target:
            return models.count_macs(network, self.input_size(network)) / 1e6
        table = self.table
        with latency.prepared(table.reference_network(), table.setting) as (reference, images), \
                latency.prepared(network, table.setting) as (timed, _):
            times = latency.interleave([lambda: reference(images), lambda: timed(images)],
                                       table.setting.device_type, min_rounds=9, seconds=2.0)
        return times.ratios[1] * table.reference_ms

    def input_size(self, network: nn.Module) -> int:
        return self.args.size // models.scale_of(network)

    def widened(self, name: str, target: float) -> float:
        """The factor for a named model's channels that brings it nearest to a cost."""
        path = self.folder / f"target_{target:g}" / f"{name}.json"
        if not path.exists():
            factor, tried = 1.0, {}
            while factor not in tried and len(tried) < 8:
                tried[factor] = self.cost(self.named(name, factor))
                if abs(tried[factor] / target - 1) < WITHIN / 3:
                    break
                # Between 1, where most time does not depend on the channels, and 2, their square.
                factor = round(min(max(factor * (target / tried[factor]) ** (1 / 1.5), 0.1), 16.0), 3)
            factor = min(tried, key=lambda each: abs(tried[each] - target))
            if abs(tried[factor] / target - 1) > WITHIN:
                say(f"note: {name} comes no nearer to {target:g} {self.unit} than {tried[factor]:.3f}.")
            if not path.exists():  # of another process, which took its first run
                files.write_json(path, {"widen": factor, self.unit: tried[factor]})
        return json.loads(path.read_text())["widen"]

    def together(self, contender: Contender) -> bool:
        """Whether one supernet serves all targets, as in the wide space. The largest target sets its scale,
        and that of random networks."""
        return self.one_for_all and len(self.targets) > 1 and contender.group != RANKED

    def record_path(self, contender: Contender) -> Path:
        """Where the search of a found or a random network leaves its record."""
        if self.together(contender):
            return self.folder / f"{contender.group}_of_all_targets" / f"seed_{contender.seed}" \
                / f"target_{contender.target:g}" / "arch.json"
        return self.where(contender) / "search" / "arch.json"

    def record(self, contender: Contender) -> Path:
        """The record of a found or a random network, made where it is missing; Busy where another process
        searches for it."""
        path, together = self.record_path(contender), self.together(contender)
        folder = path.parent.parent if together else path.parent
        if contender.group == RANKED and not path.exists():
            self.record(Contender("found", contender.target, 0))  # writes what it compared
            row = [row for row in self.compared(contender.target) if row["spread"]][contender.seed]
            made = files.provenance(latency.device_name(self.args.device), 0)
            folder.mkdir(parents=True, exist_ok=True)
            files.write_json(path, files.make_record(self.method.__name__, row, made))
        if not path.exists():
            lock_folder(folder.with_name(f"{folder.name}_begun"))  # the search holds its own
        if not path.exists():
            strategy = {"random": "random", PLAIN: "plain"}.get(contender.group)
            how = ["--strategy", strategy] if strategy else []
            again = ["--resume", str(folder)] if (folder / "search.pt").exists() else []
            limit = self.limit(self.targets if together else [contender.target])
            limit += ["--table", str(self.folder / "latency.json")] if self.args.target else []
            self.command("search.py", *self.searched, *([] if contender.group == PLAIN else limit), "--seed",
                         str(contender.seed), "--output-dir", str(folder), *how, *again)
        return path

    def compared(self, target: float) -> list[dict]:
        """The networks that the search of seed 0 compared, with the losses that its supernet has for them;
        empty before it has ended."""
        path = self.record_path(Contender("found", target, 0)).with_name("compared.json")
        return json.loads(path.read_text())["networks"] if path.exists() else []

    def order(self, target: float, results: dict[Contender, dict]) -> dict[str, dict]:
        """Kendall's tau between the losses in the supernet of seed 0 and what training gives: of networks
        from all over the space, and of the random ones, which have one latency."""
        key = models.Arch.from_dict
        known = {key(row): 0.1 * row.get("ce", 0.0) + 0.9 * row.get("den", 0.0)
                 for row in self.compared(target)}
        pairs: dict[str, list] = {RANKED: [], "random": []}
        for one, run in results.items():
            if known and one.target == target and one.group in pairs:
                trained = self.where(one) / "network_0" / "best.pt"
                record = key(files.read_checkpoint(trained)["record"])
                if record in known:
                    name = next(name for name in ORDER if name in run)
                    pairs[one.group].append((known[record], -run[name] if MEASURES[name][0] else run[name]))
        return {group: {"tau": kendall_tau(*zip(*some)), "networks": len(some)}
                for group, some in pairs.items() if len(some) > 1}

    def networks(self, contender: Contender) -> list[list[str]]:
        """The flags of train.py that name the networks of a contender: one, or one for each task."""
        if contender.group not in self.by_hand:
            return [["--arch", str(self.record(contender)), "--from-scratch"]]  # as all others
        recipe = [] if self.args.model in models.MODELS else ["--recipe", self.args.model]
        images = {name: value for name, value in self.images.items()
                  if name not in SIGMAS or "--sigma" not in self.args.train}
        return [["--model", name, "--widen", f"{self.widened(name, share * contender.target):g}", "--size",
                 str(self.args.size), *image_words(images), *recipe]
                for name, share in self.by_hand[contender.group].items()]

    def measure(self, contender: Contender) -> None:
        """Train and evaluate a contender, as far as that was not done, and write its numbers."""
        result, total = {}, 0.0
        for number_, which in enumerate(self.networks(contender)):
            folder = self.where(contender) / f"network_{number_}"
            best, metrics = folder / "best.pt", folder / "eval" / "metrics.json"
            if not metrics.exists():
                again = ["--resume", str(folder)] if (folder / "last.pt").exists() else []
                self.command("train.py", *which, *self.data, "--seed", str(contender.seed), "--output-dir",
                             str(folder), *self.train, *again)
                self.command("eval.py", "--checkpoint", str(best), "--output-dir", str(metrics.parent),
                             "--test-images", str(self.args.test_images), "--no-latency",
                             *shlex.split(self.args.eval))
            network, checkpoint = files.load_checkpoint(best, self.args.device)
            means = json.loads(metrics.read_text())["means"]
            macs = models.count_macs(network, self.input_size(network)) / 1e6
            result["MACs M"] = result.get("MACs M", 0.0) + macs
            if self.args.target:
                result["ms"] = result.get("ms", 0.0) + self.cost(network)
            if network.classifies:
                result["accuracy %"] = 100 * means["all_levels"]["accuracy"]
            if network.denoises:
                some = means["noisy_levels"] if means["noisy_levels"]["psnr_db"] else means["all_levels"]
                result |= {"PSNR dB": some["psnr_db"], "SSIM": some["ssim"]}
            if self.args.model in TWO_TASKS:
                which = train.choose_loss(network, labelled=True)
                total += {"both": 1.0, "cls": 0.1, "den": 0.9}[which] * self.loss(network, checkpoint, which)
        if self.args.model in TWO_TASKS:
            result["joint loss"] = total
        files.write_json(self.where(contender) / "result.json", result)

    def loss(self, network: nn.Module, checkpoint: dict, which: str) -> float:
        """The loss of training (Markhorst 2024, eq. 1), or a part of it, of the noisy test images."""
        flags = {**checkpoint["flags"], "seed": checkpoint["seed"], "train_images": 1, "val_images": 1,
                 "test_images": self.args.test_images, "data": self.args.data,
                 "data_root": self.args.data_root}
        loader = data_module.make_loader(data_module.data_from(flags).test, 50, shuffle=False)
        return train.validate(network, loader, loss=which, device=torch.device(self.args.device),
                              noise=data_module.noise_from(flags), seed=2)["loss"]

    def contenders(self) -> list[Contender]:
        """All contenders, one seed of each group after the other."""
        plain = [PLAIN] * ("plain" in getattr(self.method, "STRATEGIES", ()) and PLAIN not in self.args.skip)
        counts = {"found": self.args.found, "random": self.args.random,
                  **dict.fromkeys([*plain, *self.by_hand], self.args.hand)}
        rows = [Contender(group, target, seed) for seed in range(max(counts.values()))
                for target in self.targets for group, count in counts.items() if seed < count]
        ranked = self.args.ranked if self.one_for_all else 0
        return rows + [Contender(RANKED, self.targets[0], seed) for seed in range(ranked)]

    def results(self) -> dict[Contender, dict]:
        """The numbers of the runs that are there, target by target."""
        paths = {one: self.where(one) / "result.json"
                 for one in sorted(self.contenders(), key=lambda one: one.target)}
        return {one: json.loads(path.read_text()) for one, path in paths.items() if path.exists()}

    def check_flags(self) -> None:
        """ValueError where the verdict in the folder is of other flags: its runs are taken as they are."""
        path = self.folder / "judge.json"
        if not path.exists():
            return
        before = files.read_json(path, FORMAT, VERSION, "name another --output-dir").get("flags", {})
        # Elsewhere than in the wide space, each target has searches of its own.
        names = [name for name in SAME if "target" not in name or self.one_for_all]
        differ = [f"--{name.replace('_', '-')}" for name in names if before[name] != getattr(self.args, name)]
        if differ:
            raise ValueError(f"{self.folder} has runs of other {', '.join(differ)}: name another "
                             "--output-dir.")

    def run_all(self) -> None:
        """Make all runs that no other process has made or is making; wait for what others do. After each run
        the verdict is written, of what is there so far."""
        self.check_flags()
        if self.args.target:
            _ = self.table
        while left := [one for one in self.contenders() if not (self.where(one) / "result.json").exists()]:
            done = 0
            for contender in left:
                try:
                    lock_folder(self.where(contender))
                    if not (self.where(contender) / "result.json").exists():
                        self.measure(contender)
                        self.write_verdict()
                except Busy:  # another process makes it, or searches for it
                    unlock_folder(self.where(contender))
                    continue
                done += 1
            if not done:
                time.sleep(10)

    def write_verdict(self) -> str:
        """Write judge.txt, judge.json and judge.png; what to print."""
        args, results = self.args, self.results()
        made = files.provenance(latency.device_name(args.device))
        wide = self.targets if self.one_for_all else ()
        verdict = {**judge(results), "order": {target: self.order(target, results) for target in wide}}
        mode = f"latency: {args.mode}; " * bool(args.target)
        text = (f"{args.model}, {args.data}, {args.size} px; {mode}{made['device']}, torch "
                f"{made['torch']}, {made['date'][:10]}; means over seeds, 95 % intervals\n\n"
                f"{format_verdict(verdict, self.unit)}\n")
        path = self.folder / "judge.txt"
        files.write_file(path, lambda temporary: temporary.write_text(text))
        files.write_json(path.with_suffix(".json"), {
            "format": FORMAT, "version": VERSION, "made": made, "flags": vars(args), **verdict})
        drawn = plot(path.with_suffix(".png"), results, self.unit)
        return (f"\n{text}\nwrote {path}, {path.with_suffix('.json')}"
                + (f", {path.with_suffix('.png')}" if drawn else ""))


# --- The verdict -------------------------------------------------------------------------------------------

def judge(results: dict[Contender, dict]) -> dict:
    """Rows for each target and group, and by how much the found networks are better than each other group."""
    rows, comparisons, groups = [], [], {}
    for one, run in results.items():
        if one.group != RANKED:
            groups.setdefault((one.target, one.group), []).append(run)
    for (target, group), runs in groups.items():
        columns = {name: summarise([run[name] for run in runs]) for name in runs[0]}
        rows.append({"target": target, "group": group, "columns": columns})
        ours = groups.get((target, "found"))
        for name in MEASURES if ours and group != "found" else ():
            if name in columns:
                gain = better_by([run[name] for run in ours], [run[name] for run in runs], MEASURES[name][0])
                comparisons.append({"target": target, "group": group, "column": name, **gain})
    return {"rows": rows, "found_minus": comparisons}


def format_verdict(verdict: dict, unit: str = "ms") -> str:
    """What `judge` returns, to read; `unit`: of the targets."""
    there, short = {name for row in verdict["rows"] for name in row["columns"]}, unit.split()[-1]
    names = [name for name in ("ms", "MACs M", *MEASURES) if name in there]
    lines = [f"{'target':>8}  {'networks':<26}{'n':>3}" + "".join(f"{name:>26}" for name in names)]
    for row in verdict["rows"]:
        cells = []
        for name in names:
            cell, form = row["columns"].get(name), MEASURES.get(name, (0, "{:.2f}"))[1]
            text = form.format(cell["mean"]) if cell else "-"
            if cell and cell["count"] > 1 and name in MEASURES:
                text += f" ({form.format(cell['low'])} to {form.format(cell['high'])})"
            cells.append(f"{text:>26}")
        count = row["columns"]["MACs M"]["count"]
        lines.append(f"{row['target']:>5g} {short:<2}  {row['group']:<26}{count:>3}{''.join(cells)}")
    lines.append("\nFound networks are better by (95 % bootstrap interval; % of the others' mean):")
    for row in verdict["found_minus"]:
        form = MEASURES[row["column"]][1].replace("{:", "{:+")
        between = " (no interval: a single run)"
        if row["low"] is not None:
            between = f" ({form.format(row['low'])} to {form.format(row['high'])})"
        lines.append(f"{row['target']:>5g} {short:<2}  {row['group']:<26}{row['column']:<12}"
                     f"{form.format(row['difference']):>10}{between}"
                     + (f", {row['relative_percent']:+.1f} %" if row['relative_percent'] is not None else ""))
    for target, order in verdict["order"].items():
        for group, found in order.items():
            where = "all over the space" if group == RANKED else f"of {target:g} {unit}"
            lines.append(f"Kendall's tau between supernet and training, {found['networks']} networks "
                         f"{where}: {found['tau']:.2f}")
    return "\n".join(lines)


def plot(path: Path, results: dict[Contender, dict], unit: str = "ms") -> bool:
    """Draw the front: PSNR and accuracy over the cost, a point for each network; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = [name for name in ("PSNR dB", "accuracy %") if any(name in run for run in results.values())]
    figure = Figure(figsize=(6 * len(names), 4.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for group in dict.fromkeys(one.group for one in results if one.group != RANKED):
            runs = [run for one, run in results.items() if one.group == group and name in run]
            marker = {"found": "*", "random": "."}.get(group, "o")
            axis.scatter([run[unit] for run in runs], [run[name] for run in runs], label=group, marker=marker,
                         s=40 if marker == "o" else 110, alpha=0.7, zorder=3 if marker == "*" else 2)
        axis.set(xlabel=unit, ylabel=name)
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    files.write_file(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))
    return True


# --- The command -------------------------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="judge.py", usage="python judge.py --target MS [options]  (--help lists them)",
                    description="Compare found networks with random ones and with known ones of the same "
                                "latency, trained alike, on test images.",
                    epilog="examples: python judge.py --target 4 --data photos; python judge.py --target 4,8 "
                           "--found 3 --random 3; python judge.py --target 4 --search '--epochs 6'")
    add = parser.add_argument
    cost = parser.add_mutually_exclusive_group(required=True)
    cost.add_argument("--target", type=search.milliseconds, metavar="MS", help="latency, or several: 4,8")
    cost.add_argument("--target-macs", type=number(1e-6, 1e9), metavar="M", help="instead: millions of "
                      "multiply-accumulates, where the model's search takes them (default: a latency)")
    add("--model", choices=search.MODELS, default="dcnas", help="as in search.py (default: %(default)s)")
    add("--found", type=whole(1, 1000), default=8, metavar="N", help="searches (default: %(default)s)")
    add("--random", type=whole(1, 1000), default=8, metavar="N",
        help="random networks (default: %(default)s)")
    add("--ranked", type=whole(0, 24), default=20, metavar="N",
        help="networks from all over the space, for the order in the supernet (default: %(default)s)")
    add("--hand", type=whole(1, 1000), default=2, metavar="N",
        help="seeds of each network made by hand (default: %(default)s)")
    names = list(dict.fromkeys(name for some in (*HAND.values(), DENOISERS, [PLAIN]) for name in some))
    add("--skip", nargs="+", choices=names, default=[], metavar="NAME",
        help=f"leave out: {', '.join(names)} (default: none)")
    add("--space", choices=("wide", "4", "6", "8"), help="as in search.py (default: wide, if there)")
    add("--search", default="", metavar="FLAGS", help="more flags of search.py, in quotes (default: none)")
    add("--train", default="", metavar="FLAGS", help="more flags of train.py, in quotes (default: none)")
    add("--eval", default="", metavar="FLAGS", help="more flags of eval.py, in quotes: other test images, "
        "other noise; the joint loss stays that of --data (default: none)")
    add("--mode", choices=latency.MODES, help="form of the network that is timed (default: onnx where "
        "onnxruntime is installed and the device is a CPU, else folded)")
    add("--data", default="digits", metavar="NAME", help="as in search.py (default: %(default)s)")
    add("--data-root", default="data", metavar="DIR", help="as in search.py (default: %(default)s)")
    add("--size", type=whole(16, 65536), metavar="N", help="pixels (default: 64, or that of the method)")
    add("--train-images", type=whole(2), metavar="N", help="of search and training (default: all)")
    add("--test-images", type=whole(1), default=4000, metavar="N",
        help="at most; of 1,000 an accuracy has a standard error of 1.6 %%, of 4,000 of 0.8 %% "
        "(default: %(default)s)")
    add("--threads", type=whole(1, 4096), metavar="N", help="torch's threads (default: torch's own)")
    add("--device", default=default_device(), help="cuda or cpu (default: cuda if there is one)")
    add("--output-dir", default="runs/judge", metavar="DIR", help="folder of the runs (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with Command(parser, stopped="the same command goes on"):
        prepare_device(args.device, args.threads, 0)
        args.mode = args.mode or latency.fast_mode(args.device)
        runs = Judge(args)
        runs.run_all()
        say(runs.write_verdict())


if __name__ == "__main__":
    main()
