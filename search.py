"""Searches a network within a latency that you name.

    python search.py --target 12                 # milliseconds per batch of the whole network, on this device
    python search.py --target 12 --data mnist
    python search.py --target 6,8,12             # three networks, and a table that compares them
    python search.py --range                     # the latencies that the space can reach

Reads images (data.py) and a latency table (latency.py), which it makes itself when none is given. Writes into
--output-dir: arch.json (the found network, for train.py), log.jsonl (a line per epoch), latency.json (the
table), search.pt (to go on with --resume), and what the method adds. What is searched, and how, are files of
their own, which registry.METHODS lists; docs/add-a-method.md says what such a file answers.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

import data as data_module
import files
import latency
import models
import registry
import run
import timing
from data import Parser, number, whole
from train import check_images, task_loss, validate

TOLERANCE = 0.03  # the measured latency may be this far from the target before table and fit are corrected
DRAWS = 50  # of a random network that costs nearly the target


# ------------------------------------------------------------------------------------------------------------
# Costs and the fit to the target


class Costs(NamedTuple):
    """What the networks of a space cost: ms by a latency table, or millions of multiply-accumulates.

    `parts`: cost of each part; `rest`: of all else; `target`: the most that the found network may cost, or
    None.
    """

    parts: dict
    rest: float
    unit: str
    target: float | None = None
    table: latency.Table | None = None


def costs_of_table(table: latency.Table, supernet: nn.Module, space, target: float | None = None) -> Costs:
    return Costs(table.costs, table.rest(space.kinds(supernet.likeliest())), "ms", target, table)


def obtain_table(space, setting: latency.Setting, *, file: str | None, state: dict | None, output_dir: Path,
                 seed: int, results: tuple[str, ...]) -> latency.Table:
    """The table in a file, that of the resumed run, or a new one, which is written to output_dir; there the
    `results` of an earlier run move aside."""
    path = output_dir / "latency.json"
    if state is not None and file == state["flags"].get("table"):
        file = None  # the checkpoint holds it, also where the file has gone
    if file or state is not None:
        table = latency.load_table(file) if file else latency.read_table(state["table"])
        if table.elsewhere:  # nothing is measured here, so that only the rest must be as wanted
            setting = replace(setting, device=table.setting.device, runtime=table.setting.runtime)
        latency.require_setting(table, setting, file or "of this run")
    else:
        run.say(f"Timing the operations on this device ({setting.device}, {setting.size} px, batch "
                f"{setting.batch}) into {path}; use it again with --table.")
        run.lock_folder(output_dir)

        def make() -> dict:
            content = latency.build_table(setting, space, seed=seed)
            run.begin_folder(output_dir, (*results, path.name))
            files.write_json(path, content)
            return content

        table = latency.read_table(run.from_first(make))
    if "check" in table.content:
        check = table.content["check"]
        run.say(f"The table's error on {check['networks']} random networks: {latency.format_error(check)}.")
    if "conditions" in table.content:
        run.say(timing.format_conditions(table.content["conditions"]))
    return table


def fit(supernet: nn.Module, costs: Costs):
    """The likeliest design within the target."""
    own = getattr(supernet, "fit", None) or partial(latency.fit, supernet)
    return own(costs.parts, costs.rest, costs.target)


def fit_and_measure(supernet: nn.Module, space, costs: Costs, within_reach: bool, correct: bool) -> tuple:
    """The likeliest network, fitted to the target where that is within reach, and measured, on its device.

    With `correct`, a measurement more than 3 % from the target scales the whole table by measured /
    predicted, and the fit is repeated; not where other work disturbed the measurement. Without, the same
    table gives the same network. Returns (design, latencies, costs).
    """
    for attempt in range(3):
        design = fit(supernet, costs) if within_reach else supernet.likeliest()
        if costs.table is None:
            return design, {}, costs
        if costs.table.elsewhere:
            return design, {"target_ms": costs.target, "predicted_ms": costs.table.predict_ms(design)}, costs
        result = {"target_ms": costs.target, **latency.compare(costs.table, design)}
        error = result["measured_ms"] / costs.target - 1
        below = result["predicted_ms"] < (1 - TOLERANCE) * costs.target  # as it was meant to be
        met = error <= TOLERANCE and (error >= -TOLERANCE or below)
        if met or not within_reach or not correct or attempt == 2 or timing.disturbance(result):
            return design, result, costs
        costs = costs_of_table(latency.corrected(costs.table, result), supernet, space, costs.target)


# ------------------------------------------------------------------------------------------------------------
# The schedule of a supernet that runs as a whole


class Alternating:
    """Trains weights and structure of a supernet; the schedule of every method that has none of its own.

    `training` is what the method says of it: optimizers, learning rate schedule, warm-up. Without an
    `arch_optimizer` one step on the same images trains both (Mozejko 2020). Otherwise the structure takes a
    step of its own on held-out images after each weight step, from epoch `warmup_epochs` on (Zhang 2020). The
    supernet with the best PSNR on validation images is kept.

    While the likeliest network costs more than the target, the gradient of the expected cost is added to that
    of the loss, `latency_weight` times as large. (A weight on the cost itself, as in TF-NAS, has no good
    value: a denoising loss changes with the structure by orders of magnitude less than a latency does.)
    """

    GRAD_CLIP = 5.0
    EXPLANATION = "Entropy is 1 while the choices of the search are open and 0 when they are decided."

    def __init__(self, supernet: nn.Module, space, costs: Costs, training: dict, *, device: torch.device,
                 validate, denoising_loss: str, latency_weight: float | None, seed: int, amp: str, **_):
        self.supernet = supernet.to(device, memory_format=torch.channels_last)
        self.space, self.costs, self.device, self.validate = space, costs, device, validate
        self.denoising, self.seed, self.amp, self.guard = denoising_loss, seed, amp, run.Guard()
        self.pressure = 1.0 if latency_weight is None else latency_weight
        self.weight_optimizer, self.arch_optimizer = training["weight_optimizer"], training["arch_optimizer"]
        self.lr_schedule, self.temperature = training["lr_schedule"], training["temperature"]
        self.warmup_epochs, self.keep_from = training["warmup_epochs"], training["keep_from"]
        self.together = self.arch_optimizer is None
        self.weights, self.arch = supernet.weight_parameters(), supernet.arch_parameters()
        self.scalers = [torch.amp.GradScaler(device.type, enabled=amp == "float16") for _ in range(2)]

    def work(self, epoch: int) -> float:
        """How long an epoch takes beside one of the weights alone, for the forecast."""
        return 1.0 if self.together or epoch < self.warmup_epochs else 2.0

    def begin_epoch(self, epoch: int, first_step: int) -> None:
        self.epoch, self.warm = epoch, epoch < self.warmup_epochs
        self.supernet.train()
        if self.temperature is not None:
            self.supernet.set_temperature(self.temperature(epoch))

    def held_out_before(self, step: int) -> int:
        """How many held-out batches the steps of this epoch before `step` took."""
        return 0 if self.together or self.warm else step

    def step(self, batch, step: int, held_out: HeldOut, where: str) -> dict[str, float]:
        """One step; returns its losses by name, or nothing where it was skipped."""
        torch.manual_seed(data_module.mix_seeds(self.seed, self.epoch, step))  # the same on all processes
        self.guard.remember(self.supernet)
        if self.together:
            values = self._take("weight_loss", batch, self.weights + self.arch, 0, where, with_cost=True)
        else:
            with run.frozen(self.arch):
                values = self._take("weight_loss", batch, self.weights, 0, where)
        self.lr_schedule.step()
        if not self.together and not self.warm:
            with run.frozen(self.weights):
                values |= self._take("arch_loss", held_out.next(), self.arch, 1, where, with_cost=True)
        return values

    def _take(self, name: str, batch, parameters: list, which: int, where: str,
              with_cost: bool = False) -> dict:
        noisy, clean, labels = batch
        with run.autocast(self.device, self.amp):
            output = self.supernet(noisy)
        loss, _ = task_loss(output, clean, labels, "den", denoising=self.denoising)
        self.supernet.zero_grad(set_to_none=True)
        self.scalers[which].scale(loss).backward()
        if with_cost and self.costs.target is not None and self.likeliest_cost() > self.costs.target:
            self._press()
        optimizer = (self.weight_optimizer, self.arch_optimizer)[which]
        taken = run.take_step(loss.detach(), parameters, optimizer, self.scalers[which], self.guard,
                              self.GRAD_CLIP, where, self.supernet.buffers())
        return {name: loss.item()} if taken else {}

    def _press(self) -> None:
        """Add the gradient of the expected cost to that of the structure."""
        gradients = torch.autograd.grad(self.expected_cost(), self.arch, allow_unused=True)
        used = [(parameter, gradient) for parameter, gradient in zip(self.arch, gradients)
                if gradient is not None and parameter.grad is not None]
        own, others = (torch.stack([x.norm() for x in gradients]).norm()
                       for gradients in zip(*((parameter.grad, gradient) for parameter, gradient in used)))
        for parameter, gradient in used if others > 0 else ():
            parameter.grad.add_(gradient * (self.pressure * own / others))

    def expected_cost(self) -> Tensor:
        return self.supernet.expected_cost(self.costs.parts, self.costs.rest)

    def likeliest_cost(self) -> float:
        return self.space.cost(self.supernet.likeliest(), self.costs.parts, self.costs.rest)

    def end_epoch(self) -> dict:
        """After an epoch: what else its row of the log holds."""
        # An epoch that is too early to be kept is not validated (Zhang 2020, 4.1).
        late = self.epoch >= self.keep_from
        held_out = self.validate(self.supernet) if late else {"psnr_db": None, "loss": None}
        with torch.no_grad():
            expected = self.expected_cost().item()
        entropy = self.supernet.entropy()
        return {"val_psnr_db": held_out["psnr_db"], "val_loss": held_out["loss"], "expected_cost": expected,
                "found_cost": self.likeliest_cost(), "cost_unit": self.costs.unit,
                "entropy_mean": entropy.mean().item(), "entropy": [round(v, 4) for v in entropy.tolist()],
                "found": self.supernet.likeliest().to_dict()}

    def better(self, row: dict, best: dict | None) -> bool:
        """Whether the supernet of this row is kept: one within the target first, then the higher PSNR."""
        def rank(row: dict) -> tuple:
            met = self.costs.target is None or row["found_cost"] <= self.costs.target
            return met, row["val_psnr_db"] if math.isfinite(row["val_psnr_db"]) else -math.inf
        return row["val_psnr_db"] is not None and (best is None or rank(row) > rank(best))

    def format_row(self, row: dict) -> str:
        """An epoch in words."""
        text = f"weight loss {row['weight_loss']:.4f}  "
        text += f"structure loss {row['arch_loss']:.4f}  " if "arch_loss" in row else ""
        text += f"validation PSNR {row['val_psnr_db']:.2f} dB  " if row["val_psnr_db"] is not None else ""
        return (f"{text}likeliest network {row['found_cost']:.4g} {row['cost_unit']}  "
                f"entropy {row['entropy_mean']:.3f}")

    def _parts(self) -> dict:
        return {"supernet": self.supernet, "weight_optimizer": self.weight_optimizer,
                "arch_optimizer": self.arch_optimizer, "schedule": self.lr_schedule}

    def state_dict(self) -> dict:
        return {**{name: part and part.state_dict() for name, part in self._parts().items()},
                "scalers": [scaler.state_dict() for scaler in self.scalers]}

    def load_state_dict(self, state: dict) -> None:
        pairs = [(part, state[name]) for name, part in self._parts().items() if part is not None]
        for part, saved in [*pairs, *zip(self.scalers, state["scalers"])]:
            part.load_state_dict(saved)


# ------------------------------------------------------------------------------------------------------------
# The epochs


class HeldOut:
    """The held-out batches of one epoch, from the `first` on; where they are too few, another tour in another
    order begins."""

    def __init__(self, batches: data_module.NoisyBatches, epoch: int, first: int):
        self.batches, self.epoch = batches, epoch
        self.tour, place = divmod(first, len(batches))
        self.iterator = batches.epoch(self.epoch * 1000 + self.tour, place)

    def next(self):
        batch = next(self.iterator, None)
        if batch is None:
            self.tour += 1
            self.iterator = self.batches.epoch(self.epoch * 1000 + self.tour)
            batch = next(self.iterator)
        return batch


def split_dataset(dataset, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Two lists of indices of images: data.stratified_split, with all crops of an image on one side."""
    crops = getattr(dataset, "crops", 1)
    count = len(dataset) // crops
    return tuple([crop * count + place for crop in range(crops) for place in part]
                 for part in data_module.stratified_split(dataset.targets[:count], fraction, seed))


def write_log(path: Path, rows: list[dict]) -> None:
    """A line of JSON per epoch."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    files.write_file(path, lambda temporary: temporary.write_text(text))


def search_epochs(schedule, weight_batches, arch_batches, *, epochs: int, output_dir: Path, about: dict,
                  nonfinite: str = "stop", save_minutes: float = 10.0, patience: int = 0,
                  state: dict | None = None) -> tuple[list[dict], dict | None]:
    """Run a schedule's epochs: (a row per epoch, as in log.jsonl; the row of the kept supernet, or None).

    Writes search.pt, all that is needed to go on (its content is `state`, `about` goes into it), and
    supernet.pt where the schedule keeps its best one. `patience`: end after so many epochs without a better.
    """
    rows, best, first, sums, seconds = [], None, 0, run.Sums(), 0.0
    steps, is_first = len(weight_batches), run.rank_and_world()[0] == 0
    with run.Guard(nonfinite, save_minutes) as guard:
        schedule.guard = guard
        if state is not None:
            with files.reading("The checkpoint of the stopped search"):
                schedule.load_state_dict(state["searcher"])
                rows, best, first, sums = state["rows"], state["best"], state["step"], run.Sums(state["sums"])
                seconds = state.get("seconds") or 0.0

        def save(step: int) -> None:
            """search.pt: all that is needed to go on from `step` steps into the epoch after rows[-1]."""
            totals = sums.gather()
            if is_first:
                files.save_checkpoint(output_dir / "search.pt", {
                    "searcher": schedule.state_dict(), "rows": rows, "best": best, "step": step,
                    "sums": totals, **about, "seconds": time.perf_counter() - start if step else 0.0})

        work = [schedule.work(epoch) for epoch in range(epochs)]
        rest = steps * sum(work[len(rows):]) - first * sum(work[len(rows):len(rows) + 1])
        forecast = run.Forecast("search", rest)
        for epoch in range(len(rows), epochs):
            if patience and best is not None and len(rows) - best["epoch"] >= patience:
                run.say(f"{patience} epochs were no better than epoch {best['epoch']}: the search ends.")
                break
            start = time.perf_counter() - seconds  # of this epoch, before the run was stopped
            schedule.begin_epoch(epoch, first)
            held_out = HeldOut(arch_batches, epoch, schedule.held_out_before(first))
            progress = run.track(weight_batches.epoch(epoch, first), f"search {epoch + 1}/{epochs}", steps,
                                 first, "step", work=work[epoch], forecast=forecast)
            for step, batch in enumerate(progress, first):
                losses = schedule.step(batch, step, held_out, f"epoch {epoch + 1}, step {step + 1}")
                for name, value in losses.items():
                    sums.add(name, value)
                progress.set_postfix({name: f"{sums.local_mean(name):.3f}" for name in sums.pairs})
                guard.end_of_step(lambda: save(step + 1))
            guard.end_of_epoch(epoch + 1, "weight_loss" in sums.pairs)
            row = {"epoch": epoch + 1, **sums.means(), **schedule.end_epoch()}
            rows.append({**row, "seconds": time.perf_counter() - start})
            if schedule.better(rows[-1], best):
                best = rows[-1]
                if is_first:
                    files.save_checkpoint(output_dir / "supernet.pt",
                                          {"epoch": epoch + 1, "supernet": schedule.supernet.state_dict()})
            first, sums, seconds = 0, run.Sums(), 0.0
            guard.save(lambda: save(0))
            if is_first:
                write_log(output_dir / "log.jsonl", rows)
            run.say(f"epoch {epoch + 1:>3}/{epochs}  {schedule.format_row(rows[-1])}  "
                    f"{rows[-1]['seconds']:.0f} s, about {run.format_duration(forecast.left_s())} left")
            guard.after_epoch()
    return rows, best


# ------------------------------------------------------------------------------------------------------------
# From the flags to the files


class Job(NamedTuple):
    """One command: its method, what the method plans, the values of its flags, the images, where it runs."""

    method: object
    plan: dict
    flags: dict
    data: data_module.Data
    device: torch.device
    state: dict | None

    @property
    def space(self):
        return self.plan["space"]

    @property
    def one_for_all(self) -> bool:
        """Whether one supernet serves every target."""
        return "target" in getattr(self.method, "FREE_FLAGS", ())

    @property
    def input_size(self) -> int:
        """Pixels, the side of what the network takes."""
        return self.data.size // models.scale_of(self.space)

    def supernet(self) -> nn.Module:
        torch.manual_seed(self.flags["seed"])  # whether or not a table was made: the same weights
        return self.method.make_supernet(self.space, **self.flags)


def obtain_costs(job: Job, supernet: nn.Module, argv: list[str]) -> tuple[Costs, float]:
    """What the space costs, and its dearest network; prints the range from the cheapest to the dearest one.

    ValueError in one sentence where a target is below the cheapest.
    """
    flags, space, output_dir = job.flags, job.plan["table_space"], Path(job.flags["output_dir"])
    targets = flags["target"] or [flags.get("target_macs")]
    if flags["target"] or flags["range"]:
        setting = latency.this_setting(
            flags["device"], size=job.input_size, num_classes=getattr(space, "num_classes", 0),
            batch=flags["batch"], threads=flags["latency_threads"], dtype=flags["dtype"], mode=flags["mode"])
        table = obtain_table(space, setting, file=flags["table"], state=job.state, output_dir=output_dir,
                             seed=flags["seed"], results=() if flags["range"] else RESULTS)
        costs = costs_of_table(table, supernet, job.space)
    else:
        costs = Costs(*latency.part_macs(space, job.input_size), "M MACs")
    try:
        low, high = supernet.cost_range(costs.parts, costs.rest)
    except (KeyError, ValueError) as error:
        why = f"It has no {error}." if isinstance(error, KeyError) else str(error)
        raise ValueError(f"The latency table is for another space or version. {why} Make one with: "
                         f"{latency.table_command(setting, space.table_flags())}") from None
    if low <= 0:
        raise ValueError("By the latency table a network takes no time at all; make a new one with: "
                         f"{latency.table_command(setting, space.table_flags())}")
    where = f" per batch of {setting.batch}, by the table" if costs.table else ""
    reach = f"The networks of --model {flags['model']} take {low:.4g} to {high:.4g} {costs.unit}{where}."
    if not flags["range"] and targets[0] is not None and min(targets) < low:
        changed = {"--target" if flags["target"] else "--target-macs": _round_up(1.05 * low)}
        if costs.table:
            changed["--table"] = flags["table"] or str(output_dir / "latency.json")
        raise ValueError(f"The target of {min(targets):g} {costs.unit} is below the cheapest network. "
                         f"{reach} This would work: {_command_with(argv, changed)}")
    run.say(reach)
    return costs, high


def explain_open_decisions(supernet: nn.Module, design, rows: list[dict]) -> list[str]:
    """A note to the user where most decisions of a search stayed open."""
    values = supernet.entropy().tolist()
    weak = sum(value > 0.95 for value in values)
    return [] if weak <= len(values) / 2 else [
        f"note: {weak} of {len(values)} decisions stayed open (entropy above 0.95): the choice there is "
        "weak. More epochs or images decide more."]


def search_targets(job: Job, argv: list[str]) -> None:
    """The searches of all targets of a command, and their comparison."""
    flags, output_dir = job.flags, Path(job.flags["output_dir"])
    costs, high = obtain_costs(job, job.supernet(), argv)
    if flags["range"]:
        return
    found, targets = [], flags["target"] or [flags.get("target_macs")]
    if hasattr(job.space, "scaled_to") and flags["scale"] is None:
        space = job.space.scaled_to(costs.parts, costs.rest, targets)
        job = job._replace(plan={**job.plan, "space": space}, flags={**flags, "scale": space.scale})
    folders = [output_dir / f"target_{target:g}" if len(targets) > 1 else output_dir for target in targets]
    run.lock_folder(output_dir)
    homes = [output_dir] if job.one_for_all else folders  # of the supernets
    for folder in homes:  # all before the first search: what lies there later is of this run
        run.begin_folder(folder, RESULTS, job.state and flags["resume"])
    for folder in folders if job.one_for_all else ():
        run.begin_folder(folder, () if job.state else RESULTS)
    supernet = None
    for target, folder in zip(targets, folders):
        costs = costs._replace(target=target)
        within_reach = target is not None and target < high
        if target is not None and not within_reach:
            run.say(f"The target of {target:g} {costs.unit} is above that: every network meets it, and the "
                    "cost has no influence on the search.")
        try:
            if supernet is None or not job.one_for_all:
                home = output_dir if job.one_for_all else folder
                supernet, rows = trained_supernet(job, costs, home, within_reach)
            record, costs = find_network(job, supernet, rows, costs, folder, within_reach)
        except (KeyboardInterrupt, run.Stopped) as stop:
            stop.folder, rest = folder, targets[len(found) + 1:]  # the one to go on with, and what is left
            if job.one_for_all:
                stop.folder = output_dir
            elif rest:
                where = output_dir if len(rest) > 1 else folders[-1]
                command = _command_with(argv, {"--target": ",".join(f"{one:g}" for one in rest), "--table":
                                               flags["table"] or str(output_dir / "latency.json"),
                                               "--output-dir": str(where)})
                run.say(f"note: after this one, the other targets: {command}", err=True)
            raise
        found.append((record, folder / "arch.json"))
    if costs.table and not flags["table"] and run.rank_and_world()[0] == 0:
        files.write_json(output_dir / "latency.json", costs.table.content)  # with what was corrected
    if len(found) > 1:
        run.say(f"\n{'target':>8} {'predicted':>10} {'measured':>10} {'parameters':>12} {'MACs':>9}  record")
    for record, path in found if len(found) > 1 else ():
        result = record["latency"]
        measured = f"{result['measured_ms']:.3f} ms" if "measured_ms" in result else "-"
        run.say(f"{result['target_ms']:>5g} ms {result['predicted_ms']:>7.3f} ms {measured:>10} "
                f"{record['parameters']:>12,} {record['macs'] / 1e6:>7.1f} M  {path}")


def trained_supernet(job: Job, costs: Costs, folder: Path, within_reach: bool) -> tuple:
    """A supernet after its search, or as the strategy wants it, and a row per epoch."""
    flags, supernet = job.flags, job.supernet()
    if flags["strategy"] == "random":
        draw_random(job, supernet, costs, within_reach)
    elif flags["strategy"] == "plain":
        supernet.set_design(job.space.plain_design())
    else:
        rows, best = train_supernet(job, supernet, costs, folder, within_reach)
        if best is not None and run.rank_and_world()[0] == 0:
            with files.reading(folder / "supernet.pt"):
                kept = files.read_checkpoint(folder / "supernet.pt", job.device)
                supernet.load_state_dict(kept["supernet"])
                run.say(f"The supernet was best after epoch {kept['epoch']}.")
        return supernet, rows
    return supernet, []


def draw_random(job: Job, supernet: nn.Module, costs: Costs, within_reach: bool) -> None:
    """Make a random network the likeliest. The fit to a target can only make some networks cheaper: one that
    costs less than 97 % of it is drawn again; where all draws do, the dearest is taken."""
    seeds, dearest = [job.flags["seed"]], (-math.inf, job.flags["seed"])
    if within_reach:
        seeds += [data_module.mix_seeds(job.flags["seed"], draw) for draw in range(1, DRAWS)]
    for seed in seeds:
        supernet.draw_random(seed)
        if not within_reach:
            return
        cost = job.space.cost(fit(supernet, costs), costs.parts, costs.rest)
        if cost >= (1 - TOLERANCE) * costs.target:
            return
        dearest = max(dearest, (cost, seed))
    run.say(f"note: none of {DRAWS} random networks costs {100 * (1 - TOLERANCE):g} % of the target or more; "
            f"the dearest, {dearest[0]:.4g} {costs.unit}, is taken.")
    supernet.draw_random(dearest[1])


def find_network(job: Job, supernet: nn.Module, rows: list[dict], costs: Costs, folder: Path,
                 within_reach: bool) -> tuple[dict, Costs]:
    """The network of a target, from a supernet to its files. Returns (record, costs as corrected)."""
    flags, is_first, start = job.flags, run.rank_and_world()[0] == 0, time.perf_counter()
    supernet.cpu()

    def on_first() -> tuple:
        correct = flags["table"] is None
        design, result, new = fit_and_measure(supernet, job.space, costs, within_reach, correct)
        return design, result, new.table and new.table.content

    design, result, content = run.from_first(on_first)
    if content is not None and content != costs.table.content:
        costs = costs_of_table(latency.read_table(content), supernet, job.space, costs.target)
    record = make_record(job, supernet, design, result, costs)
    if is_first:
        trained = supernet.export(design) if rows else None
        if trained is not None:
            files.save_checkpoint(folder / "distilled.pt", {
                "record": record, "classes": job.data.classes if trained.classifies else None,
                "size": job.data.size, "data": flags["data"], "seed": flags["seed"],
                "loss": job.plan["loss"], "made": record["made"], "flags": run.run_flags(flags),
                "epoch": len(rows), "splits": splits_of(job.state), "images": job.data.files,
                "network": trained.state_dict(), "ema": None})
        more = []
        if costs.table and costs.table.elsewhere:
            more.append(str(folder / "network.onnx"))
            latency.write_network(job.space.network(design), costs.table.setting, more[0])
        if getattr(supernet, "compare", None):
            more.append(str(folder / "compared.json"))
            files.write_json(more[-1], {"format": "joint-compared", "version": 1,
                                        "networks": supernet.compare.rows(costs.parts, costs.rest)})
        if rows and hasattr(job.method, "write_picture"):
            more += job.method.write_picture(folder, design, supernet, rows)
        files.write_json(folder / "arch.json", record)  # the last one: where it lies, all others do
        report(job, supernet, design, record, costs, within_reach)
        explain = getattr(job.method, "explain_choice", explain_open_decisions)
        for note in explain(supernet, design, rows) if rows else ():
            run.say(note)
        memory, names = latency.peak_memory_mib(flags["device"]), [str(folder / "arch.json"), *more]
        seconds = time.perf_counter() - start + sum(row["seconds"] for row in rows)
        run.say(f"found in {run.format_duration(seconds)}"
                + (f", peak memory {memory:,.0f} MiB" if memory else "") + f": {', '.join(names)}\nnext:"
                + (f"\n  python eval.py --checkpoint {shlex.quote(str(folder / 'distilled.pt'))}" if trained
                   else "") + f"\n  python train.py --arch {shlex.quote(names[0])}")
    return record, costs


def train_supernet(job: Job, supernet: nn.Module, costs: Costs, folder: Path, within_reach: bool) -> tuple:
    """The epochs of one search, as search_epochs; prints what is searched on which images."""
    flags, data, plan, device = job.flags, job.data, job.plan, job.device
    rank, world = run.rank_and_world()
    noise = data_module.noise_from(flags, models.scale_of(job.space))
    if flags.get("search_images") == "clean":
        noise = data_module.Noise(0.0)
    share, parts = plan["weight_share"], [data.train, data_module.with_own_epoch(data.train)]
    if share < 1:
        halves = split_dataset(data.train, share, flags["seed"])
        parts = [Subset(images, half) for images, half in zip(parts, halves)]
    if min(len(part) for part in parts) < 2:
        raise ValueError(f"{len(data.train)} training images are too few for a search; give more.")
    batch_size = run.split_batch_size(flags["batch_size"])
    how = {"seed": flags["seed"], "workers": flags["workers"], "device": device, "rank": rank, "world": world}
    loaders = [data_module.make_loader(part, batch_size, shuffle=True, drop_last=True, **how)
               for part in parts]
    steps, settings = len(loaders[0]), {**flags, "device": device}
    if hasattr(job.method, "Schedule"):
        schedule = job.method.Schedule(supernet, costs, steps=steps, within_reach=within_reach,
                                       loss=plan["loss"], **settings)
    else:
        val_loader = data_module.make_loader(data.val, batch_size, **how)
        schedule = Alternating(
            supernet, job.space, costs, job.method.training(supernet, steps, **flags), **settings,
            validate=lambda network: validate(network, val_loader, loss="den", device=device, noise=noise,
                                              amp=flags["amp"], denoising=flags["denoising_loss"]))
    goal = "" if costs.target is None else f" within {costs.target:g} {costs.unit}"
    run.say(f"Searching {flags['model']}{goal} on {data.name}: {len(parts[0]):,} images for the weights, "
            f"{len(parts[1]):,} for the architecture{'' if share < 1 else ' (the same)'}; "
            f"{noise.describe()}; {flags['epochs']} epochs of {steps} steps, of which "
            f"{min(schedule.warmup_epochs, flags['epochs'])} train the weights only.\n"
            f"train: {data.sources['train']}; val: {data.sources['val']}; test: {data.sources['test']}\n"
            f"{schedule.EXPLANATION}")
    batches = [data_module.NoisyBatches(loader, device, noise, flags["seed"] + part, rank)
               for part, loader in enumerate(loaders)]
    own = {"target": [costs.target]} if costs.table and not job.one_for_all else {}
    about = {"flags": run.run_flags(flags) | own,
             "table": costs.table and costs.table.content, "images": data.files,
             "splits": splits_of(job.state), "classes": data.classes}
    result = search_epochs(schedule, *batches, epochs=flags["epochs"], output_dir=folder, about=about,
                           nonfinite=flags["nonfinite"], save_minutes=flags["save_minutes"],
                           patience=flags.get("patience", 0), state=job.state)
    if hasattr(schedule, "end"):
        schedule.end(batches[1])
    return result


def splits_of(state: dict | None) -> int:
    """The version of the splits of a run: that of the run that is resumed, or the present one."""
    return data_module.VERSION if state is None else state["splits"]


def make_record(job: Job, supernet: nn.Module, design, result: dict, costs: Costs) -> dict:
    """The content of arch.json: the network, how it was found, and what its training needs to know."""
    flags, network, more = job.flags, job.space.network(design), {}
    if job.one_for_all and getattr(supernet, "compare", None):
        more["weights"] = "distilled.pt"  # train.py begins with them
    if result:
        more["latency"] = {**result, "table_hash": costs.table.hash, "setting": asdict(costs.table.setting)}
    return files.make_record(
        job.method.__name__, job.method.record_content(design),
        files.provenance(latency.device_name(flags["device"]), flags["seed"]), data=flags["data"],
        data_root=flags["data_root"], size=job.data.size, images=data_module.image_flags(flags),
        parameters=models.count_parameters(network), macs=models.count_macs(network, job.input_size),
        decisions=supernet.decisions(), **more)


def report(job: Job, supernet: nn.Module, design, record: dict, costs: Costs, within_reach: bool) -> None:
    """Print the network and its cost, and what a user must know where that is not what was asked for."""
    ms = (costs.parts, costs.rest) if costs.table else ()
    run.say(f"\n{supernet.describe(design, *ms)}\n\n{record['parameters']:,} parameters, "
            f"{record['macs'] / 1e6:,.1f} M multiply-accumulates at {job.input_size} px")
    if costs.table:
        result, setting = record["latency"], costs.table.setting
        expected = f"target {costs.target:g} ms, predicted {result['predicted_ms']:.3f} ms"
    if costs.table and costs.table.elsewhere:
        run.say(f"{expected} per batch of {setting.batch} on {setting.device}, {setting.runtime}\nnote: this "
                "is another device, so the latency was not measured. To measure it, copy network.onnx there, "
                "beside timing.py: python timing.py network.onnx")
    elif costs.table:
        measured = timing.format_ms(result["measured_ms"], result["slowdown"])
        run.say(f"{expected}, measured {measured} per batch of {setting.batch} (10-90 %: "
                f"{result['p10_ms']:.3f}-{result['p90_ms']:.3f} ms) on {setting.device}")
        error = result["measured_ms"] / result["slowdown"] / costs.target - 1
        if error > TOLERANCE or within_reach and error < -TOLERANCE:
            run.say(f"note: at the table's speed the latency is {100 * error:+.1f} % from the target.")
        if setting.mode != "onnx" and (
                deployed := latency.through_onnxruntime(job.space.network(design), setting)):
            took = timing.format_ms(deployed.median_ms, result["slowdown"])
            run.say(f"through onnxruntime {took}, what --mode onnx searches for")
        for note in timing.notes(result):
            run.say(note)
    cost = job.space.cost(design, costs.parts, costs.rest)
    if costs.target is not None and cost > costs.target * (1 + 1e-6):
        run.say(f"note: no network was found within the target of {costs.target:g} {costs.unit}; this is the "
                "nearest.")


# ------------------------------------------------------------------------------------------------------------
# Command line


def milliseconds(text: str) -> list[float]:
    """A type for argparse: one target or several, separated by commas."""
    targets = [number(1e-6, 1e9)(part) for part in text.split(",")]
    if len({f"{target:g}" for target in targets}) < len(targets):  # their folders have these names
        raise argparse.ArgumentTypeError(f"two targets are the same to six digits in {text}")
    return targets


MODELS = {model: method for method, names in registry.METHODS.items() for model in names}  # --model -> method


def methods_of(model: str) -> list:
    """The modules of the methods that search a model, the default last."""
    return [registry.method_module(method) for method, names in registry.METHODS.items() if model in names]


def method_of(model: str, values: dict):
    """The module of the method that searches a model, by the `values` of --space and --strategy."""
    modules = methods_of(model)
    for flag, names in (("space", "SPACES"), ("strategy", "STRATEGIES")):
        fitting = [one for one in modules if str(values.get(flag)) in getattr(one, names, ())]
        modules = fitting or modules
    return modules[-1]


def build_parser(model: str = "dcnas", method=None) -> argparse.ArgumentParser:
    """The parser of the flags that all methods share, and of those of a method, or of this model's own."""
    method = method or method_of(model, {})
    others = ", ".join(name for name, other in MODELS.items() if other != MODELS[model])
    parser = Parser(
        prog="search.py", allow_abbrev=False,
        usage="python search.py --target MS [options]  (--help lists them)",
        description=f"Search a network within a latency. These are the flags of --model {model}; of the "
                    f"others ({others}): python search.py --model NAME --help",
        epilog="examples:\n  python search.py --target 12\n"
               "  python search.py --target 6 --data mnist --output-dir runs/mnist\n"
               "  python search.py --range --data photos --size 96",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to search")
    what.add_argument("--target", type=milliseconds, metavar="MS",
                      help="latency of the whole network, in milliseconds per batch; 6,8,12 searches one "
                           "after the other, with one table, into target_6, target_8 ... below --output-dir "
                           "(default: no limit, where the method allows that)")
    what.add_argument("--range", action="store_true",
                      help="only print the latencies within reach, by --table or a new one (default: search)")
    what.add_argument("--model", choices=MODELS, default=model,
                      help="cnas classifies, dnas denoises, dcnas does both, dcnas-seq one after the other; "
                           "the other names are files of this project (default: dcnas)")
    strategies = getattr(method, "STRATEGIES", ("gradient", "random"))
    what.add_argument("--strategy", default=strategies[0], choices=strategies,
                      help="gradient: train a supernet and its structure; evolution: train a supernet, then "
                           "compare its networks; random: draw a network within the target, what a search "
                           "must beat; plain: the network without a search (default: %(default)s)")
    cost = parser.add_argument_group("latency", "the setting that --target is for")
    cost.add_argument("--table", metavar="FILE", help="latency table of this device, or of another one by "
                      "latency.py --read-times (default: one of this device is made)")
    cost.add_argument("--batch", type=whole(1, 65536), metavar="N",
                      help="images per batch of the latency (default: 32 on CUDA, 1 on a CPU)")
    cost.add_argument("--latency-threads", type=whole(1, 4096), default=1, metavar="N",
                      help="threads of torch that the latency is for, on a CPU (default: %(default)s)")
    cost.add_argument("--dtype", choices=latency.DTYPES, default="float32",
                      help="number format of the latency (default: %(default)s)")
    cost.add_argument("--mode", choices=latency.MODES, help="form of the network, see latency.py --help "
                      "(default: that of --table, else eager)")
    if "gradient" in strategies:
        cost.add_argument("--latency-weight", type=number(0, 1e6), metavar="X",
                          help="strength of the latency's gradient (default: that of the method)")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=whole(1, 100000), default=7, metavar="N",
                        help="passes over the images (default: %(default)s)")
    recipe.add_argument("--batch-size", type=whole(2, 65536), default=32, metavar="N",
                        help="images per step, of all processes together (default: %(default)s)")
    recipe.add_argument("--lr", type=number(1e-8, 100), default=5e-2, metavar="LR",
                        help="learning rate of the weights (default: %(default)s)")
    if "gradient" in strategies:
        recipe.add_argument("--arch-lr", type=number(1e-8, 100), default=1e-2, metavar="LR",
                            help="learning rate of the architecture (default: %(default)s)")
    method.add_arguments(parser, model)
    data_module.add_data_arguments(parser, validation=not hasattr(method, "Schedule"))
    data_module.add_noise_arguments(parser)
    run.add_run_arguments(parser, "runs/search")
    parser.set_defaults(**method.search_defaults({"model": model}))
    return parser


def read_command(argv: list[str]) -> tuple[argparse.Namespace, dict | None]:
    """The values of the flags, and the checkpoint of the run to go on with.

    Values: default < method < stopped run < command line. ValueError in one sentence where they do not fit.
    """
    early = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--model", "--resume", "--space", "--strategy"):
        early.add_argument(flag)
    named, _ = early.parse_known_args(argv)
    state, before = None, {}
    if named.resume is not None:
        state, folder = run.resume_state(named.resume, "search.pt", "searcher")
        before = {**state["flags"], "output_dir": str(folder)}
        # Older checkpoints do not say their splits. Version 2 came together with --range.
        state["splits"] = state.get("splits") or (2 if "range" in before else 1)
        if state["splits"] < data_module.VERSION:
            run.say("note: this run began with an older version; it keeps the splits of its data.")
    model = before.get("model", "dcnas") if named.model is None else named.model
    chosen = {**before, **{name: value for name, value in vars(named).items() if value is not None}}
    method = method_of(model, chosen) if model in MODELS else None
    parser = build_parser(model if model in MODELS else "dcnas", method)
    for word in parser.parse_known_args(argv)[1]:
        def takes(*search) -> bool:
            return word.split("=")[0] in build_parser(*search)._option_string_actions
        for other in methods_of(model):
            if takes(model, other):
                spaces = ", ".join(other.SPACES)
                raise ValueError(f"{word} is for --space {spaces}; leave it out, or name one of these.")
        has = [name for name in MODELS if takes(name)]
        if has:
            raise ValueError(f"{word} is for --model {', '.join(has)}, not for {model}; leave it out.")
    checked = vars(run.resolve(parser, [], before))  # a value of a wrong type is refused here
    given = {**{name: checked[name] for name in before if name in checked}, **run.given_flags(parser, argv)}
    args = run.resolve(parser, argv, method.search_defaults(given), before)
    free = getattr(method, "FREE_FLAGS", ())
    if state is not None:
        run.check_resumed({name: value for name, value in before.items() if name not in free}, vars(args))
    if args.table and not (args.target or args.range):
        raise ValueError("--table is for a --target in milliseconds; give one, or leave the table out.")
    if args.target and getattr(args, "target_macs", None):
        raise ValueError("--target and --target-macs are two limits; give one of them.")
    if args.mode is None:
        args.mode = latency.load_table(args.table).setting.mode if args.table else "eager"
    return args, state


RESULTS = ("search.pt", "supernet.pt", "arch.json", "distilled.pt", "network.onnx", "log.jsonl", "alpha.png",
           "compared.json", "network.svg")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with run.Command(build_parser(), "search.pt") as command:
        args, state = read_command(argv)
        command.resumed = state is not None
        command.folder = run.resumed_folder(args.resume) if command.resumed else args.output_dir
        device = run.prepare_device(args.device, args.threads, args.seed)
        run.check_output(args.data, args.output_dir)
        flags = {**vars(args), "device": str(device), "amp": run.choose_amp(device, args.amp)}
        unused = {"val_images": flags.get("val_images", 1), "test_images": 1}  # those that take no part
        kept = run.kept_splits(state, args.accept_changes)
        data = run.in_turn(lambda: data_module.data_from({**flags, **unused}, kept))
        run.check_images(data, state, args.accept_changes)
        run.fill_sigma(flags, data)
        method = method_of(args.model, vars(args))
        plan = method.plan(data, **flags)
        check_images(data, plan["loss"], plan["space"].channels, models.scale_of(plan["space"]))
        search_targets(Job(method, plan, flags, data, device, state), argv)


def _command_with(argv: list[str], changed: dict[str, str]) -> str:
    """The command that was given, with other values of some flags."""
    rest, words = [], iter(argv)
    for word in words:
        if word in changed:
            next(words, None)
        elif word.split("=")[0] not in changed:
            rest.append(word)
    return shlex.join(["python", "search.py", *(word for pair in changed.items() for word in pair), *rest])


def _round_up(cost: float) -> str:
    """Two digits, rounded up."""
    scale = 10 ** (math.floor(math.log10(cost)) - 1)
    return f"{math.ceil(cost / scale) * scale:.6g}"


if __name__ == "__main__":
    main()
