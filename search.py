"""Searches a network that denoises and classifies within a latency you name.

    python search.py --target 12                       # milliseconds per batch of the whole network on this device
    python search.py --target 12 --data mnist
    python search.py --target 12 --data photos --size 224 --epochs 90 --warmup-epochs 10
    python search.py --target 6,8,12                   # three networks, and a table that compares them

Reads data (see data.py) and a latency table, which it makes itself when none is given; writes into --output-dir:
arch.json (the found network: train.py reads it), log.jsonl (one line per epoch), alpha.png (with matplotlib),
latency.json (the table), search.pt (to go on with --resume).
Source: TF-NAS (Hu et al. 2020) as changed by Markhorst, van Gemert and Kayhan 2024, section 4.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data as data_module
import hinas
import latency
import models
import superkernel
from data import number, whole
from train import (DENOISING_LOSSES, Guard, NoisyBatches, Stopped, TrainingError, add_run_arguments, autocast, bar, check_images,
                   lock_folder, make_folder, parse_or_resume, prepare, run_flags, say_stopped, share, sum_over_processes, task_loss,
                   validate)

LATENCY_LOSSES = {
    # name: (function of LAT / target, default lambda)
    "hinge": (lambda ratio: (ratio - 1).clamp(min=0), 0.5),  # thesis, eq. 3.11
    "absolute": (lambda ratio: (ratio - 1).abs(), 0.1),  # TF-NAS
}
# Searches of denoisers: the supernet is in a file of its own, and run as a whole. Defaults of their flags, for minutes on a CPU.
RESTORATION = {
    "superkernel": {"size": 128, "batch_size": 4, "epochs": 20, "crops": 20, "lr": 1e-3, "sigma": 55 / 255,
                    "denoising_loss": "charbonnier", "temperature": 1.0, "patience": 30},
    "hinas": {"size": 64, "batch_size": 8, "epochs": 20, "crops": 8, "lr": 2e-3, "arch_lr": 1e-3, "sigma": 70 / 255,
              "denoising_loss": "log-ssim"},  # see also set_method_defaults
}
NO_PRESSURE = "The target of {:g} {} is above that: every network meets it, and the search goes on without pressure on the {}."
MEASURE_TOLERANCE = 0.03  # measured latency may be this far from the target before the widths are corrected


# ---------------------------------------------------------------------------------------------------------------
# The supernet's two steps


@contextmanager
def frozen(parameters: list):
    """Within it no gradients of these parameters are computed: they would be much of the work, and thrown away."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def take_step(name: str, loss: Tensor, parameters: list, optimizer, scaler, guard: Guard, grad_clip: float, where: str,
              buffers=()) -> dict[str, float]:
    """After backward: the optimizer's step, with gradients averaged over the processes, if the loss and they are finite.

    Returns the loss by its name, or nothing where the step was skipped.
    """
    finite = guard.reduce(parameters, loss, buffers)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip)
    finite = finite and (scaler.is_enabled() or math.isfinite(norm))
    taken = guard.judge(finite, where, optimizer.param_groups[0]["lr"])
    if taken:
        scaler.step(optimizer)
    scaler.update()
    return {name: loss.item()} if taken else {}


class Searcher:
    """The supernet with its two optimizers: one step for the weights, one for the architecture.

    The supernet is anything with weight_parameters(), arch_parameters(), sample_path(), other_path(), mixture(),
    normalize_(), begin(images) and finish(begun, choice, height, width). Weights: SGD, momentum 0.9, weight decay 1e-5, clip 5.
    alpha: Adam, betas (0.5, 0.999), weight decay 5e-4 (Markhorst 2024 and TF-NAS).
    """

    def __init__(self, supernet: nn.Module, *, device: torch.device, lr: float, arch_lr: float, loss: str, seed: int,
                 amp: str = "off", label_smoothing: float = 0.1, grad_clip: float = 5.0, guard: Guard | None = None):
        self.guard = guard or Guard()
        self.supernet = supernet.to(device, memory_format=torch.channels_last).train()
        self.device, self.loss, self.amp = device, loss, amp
        self.label_smoothing, self.grad_clip = label_smoothing, grad_clip
        self.weights, self.arch = supernet.weight_parameters(), supernet.arch_parameters()
        self.weight_optimizer = torch.optim.SGD(self.weights, lr, 0.9, weight_decay=1e-5, fused=True)
        for weight in self.weights:  # zero is where momentum starts; the fused step wants it there for operations new to it
            self.weight_optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        self.arch_optimizer = torch.optim.Adam(self.arch, arch_lr, (0.5, 0.999), weight_decay=5e-4)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "float16")
        self.arch_scaler = torch.amp.GradScaler(device.type, enabled=amp == "float16")
        self.generator = torch.Generator().manual_seed(seed)  # of the paths, on the CPU: the same on every device

    def _begin(self, batch) -> Tensor:
        with autocast(self.device, self.amp):
            return self.supernet.begin(batch[0])

    def _loss(self, begun: Tensor, batch, choice) -> Tensor:
        noisy, clean, labels = batch
        with autocast(self.device, self.amp):
            output = self.supernet.finish(begun, choice, *noisy.shape[-2:])
        return task_loss(output, clean, labels, self.loss, self.label_smoothing)[0]

    def weight_step(self, batch, bi_sampling: bool, path: list[int] | None = None,
                    where: str = "this step") -> dict[str, float]:
        """One step of the weights: a path by Gumbel softmax (or the one given), then, with `bi_sampling`, one of the other
        operations of every block drawn uniformly, over the same batch; the losses are added (TF-NAS). Empty for a step that
        was skipped."""
        self.weight_optimizer.zero_grad(set_to_none=True)  # operations that were not sampled stay as they are
        path = self.supernet.sample_path(self.generator) if path is None else path
        total, begun = 0.0, self._begin(batch)
        start = begun.detach().requires_grad_()  # both paths start from here, and their gradients meet here
        for choice in (path, self.supernet.other_path(path, self.generator)) if bi_sampling else (path,):
            loss = self._loss(start, batch, choice)
            self.scaler.scale(loss).backward()  # each at once: the graph of one path in memory, not of two
            total = total + loss.detach()
        begun.backward(start.grad)
        return self._step("weight_loss", total / (2 if bi_sampling else 1), self.weights, self.weight_optimizer, self.scaler, where)

    def _step(self, name: str, loss: Tensor, parameters: list, optimizer, scaler, where: str) -> dict[str, float]:
        return take_step(name, loss, parameters, optimizer, scaler, self.guard, self.grad_clip, where)

    def arch_step(self, batch, temperature: float, latency_term=None, where: str = "this step") -> dict[str, float]:
        """One step of alpha: every operation, summed with Gumbel-softmax weights, plus the latency term."""
        with frozen(self.weights):
            loss = self._loss(self._begin(batch), batch, self.supernet.mixture(temperature, self.generator))
            total = loss if latency_term is None else loss + latency_term()
            self.arch_optimizer.zero_grad(set_to_none=True)
            self.arch_scaler.scale(total).backward()
        values = self._step("arch_loss", loss.detach(), self.arch, self.arch_optimizer, self.arch_scaler, where)
        self.supernet.normalize_()
        return values

    def set_widths(self, path: list[int], mid_channels: list[int]) -> None:
        """Set the widths of a path; where channels changed places, momentum starts anew."""
        for parameter in self.supernet.set_widths(path, mid_channels):
            self.weight_optimizer.state[parameter]["momentum_buffer"].zero_()

    def state_dict(self) -> dict:
        return {"supernet": self.supernet.state_dict(), "weight_optimizer": self.weight_optimizer.state_dict(),
                "arch_optimizer": self.arch_optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "arch_scaler": self.arch_scaler.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.supernet.load_state_dict(state["supernet"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.arch_optimizer.load_state_dict(state["arch_optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.arch_scaler.load_state_dict(state["arch_scaler"])
        self.generator.set_state(state["generator"].cpu())


# ---------------------------------------------------------------------------------------------------------------
# Latency of the space, and the fit to the target


class Budget:
    """What a target latency means for a supernet: the table's value of every candidate, in the exported model.

    `model` is what is exported; the parts that only the supernet has cost nothing (the tail of a C-NAS supernet that is
    exported as a D-NAS), and those of a "dcnas-seq" that are there twice cost twice. `target_ms` is for the whole exported
    network per batch, in the table's setting.
    """

    def __init__(self, table: latency.LatencyTable, supernet: models.SuperNet, model: str, target_ms: float):
        self.table, self.supernet, self.model, self.target_ms = table, supernet, model, target_ms

    @property
    def base_ms(self) -> float:
        return self.table.base_ms(self.model)

    def block_ms(self, block: models.Block) -> float:
        """What a block costs in the exported network."""
        passes = latency.passes(self.model, block.stage)
        return passes * self.table.block_ms(block) if passes else 0.0

    def candidates_ms(self) -> Tensor:
        """The latency of every candidate at its present width, if it is kept, (blocks, operations)."""
        return torch.tensor([[self.block_ms(block) for block in row] for row in self.supernet.candidate_blocks()])

    def limits(self) -> list[list[tuple[models.Block, models.Block]]]:
        """The narrowest and the widest form of every candidate."""
        result = []
        for row in self.supernet.candidate_blocks():
            result.append([])
            for block, operation in zip(row, self.supernet.operations):
                low, high = models.width_range(operation, block.in_channels, self.supernet.min_width)
                result[-1].append((replace(block, mid_channels=low), replace(block, mid_channels=high)))
        return result

    def range_ms(self) -> tuple[float, float]:
        """The fastest and the slowest network of the space, by the table."""
        fastest = slowest = self.base_ms
        stages = set()
        for row in self.limits():
            if not self.supernet.betas or row[0][0].stage not in stages:  # with learned depth one block a stage is enough
                fastest += min(self.block_ms(narrow) for narrow, _ in row)
            slowest += max(self.block_ms(wide) for _, wide in row)
            stages.add(row[0][0].stage)
        return fastest, slowest

    def fit(self, path: list[int], target_ms: float | None = None) -> tuple[list[int], list[int]]:
        """Bring a path to the target: (path, mid channels of each block).

        All widths are scaled by one factor, then single steps of models.WIDTH_STEP channels use up what is left, never
        above the target. Where the widths of the path's operations do not reach far enough, operations are exchanged
        first: each time the exchange that costs the least log probability per millisecond. Blocks beyond the learned depth
        cost nothing and stay as they are.
        """
        target_ms = self.target_ms if target_ms is None else target_ms
        limits, rows, kept = self.limits(), self.supernet.candidate_blocks(), self.supernet.kept()
        log_p = torch.log_softmax(self.supernet.alpha.detach().double(), 1).tolist()
        ends = [[tuple(self.block_ms(block) if keep else 0.0 for block in pair) for pair in row]
                for row, keep in zip(limits, kept)]  # [block][operation] -> (narrowest ms, widest ms)
        path = list(path)

        def reach(end: int) -> float:
            return self.base_ms + sum(row[index][end] for row, index in zip(ends, path))

        def exchange(end: int, sign: int) -> bool:
            """The cheapest exchange that moves the narrowest (0) or widest (1) form by `sign`; False if there is none."""
            room = max(0.0, target_ms - reach(0))  # a larger operation must fit at its narrowest
            options = []
            for b, row in enumerate(ends):
                for o, form in enumerate(row):
                    gain = sign * (form[end] - row[path[b]][end])
                    if gain > 1e-9 and form[0] - row[path[b]][0] <= room:
                        options.append(((log_p[b][path[b]] - log_p[b][o]) / gain, b, o))
            if options:
                _, block, operation = min(options)
                path[block] = operation
            return bool(options)

        while reach(0) > target_ms and exchange(0, -1):
            pass
        while reach(1) < target_ms and exchange(1, +1):
            pass

        chosen = [rows[b][o] for b, o in enumerate(path)]
        bounds = [(limits[b][o][0].mid_channels, limits[b][o][1].mid_channels) for b, o in enumerate(path)]
        starts = [self.supernet.operations[o].start_width(block.in_channels) for o, block in zip(path, chosen)]

        def total(widths: list[int]) -> float:
            return self.base_ms + sum(self.block_ms(replace(block, mid_channels=width))
                                      for block, width, keep in zip(chosen, widths, kept) if keep)

        def scaled(factor: float) -> list[int]:
            return [min(max(models.round_width(factor * start), low), high) for start, (low, high) in zip(starts, bounds)]

        low, high = 0.0, 2.0  # the floor of every width, and above the ceiling of every width
        if total(scaled(high)) > target_ms:
            for _ in range(30):
                middle = (low + high) / 2
                low, high = (middle, high) if total(scaled(middle)) <= target_ms else (low, middle)
        else:
            low = high
        widths = scaled(low)
        present = total(widths)
        while present <= target_ms:
            options = []
            for b, width in enumerate(widths):
                if kept[b] and width + models.WIDTH_STEP <= bounds[b][1]:
                    more = (self.block_ms(replace(chosen[b], mid_channels=width + models.WIDTH_STEP))
                            - self.block_ms(replace(chosen[b], mid_channels=width)))
                    if more and present + more <= target_ms:
                        options.append((more, -width / starts[b], b))  # the largest that fits, then the most reduced
            if not options:
                break
            widths[max(options)[2]] += models.WIDTH_STEP
            present = total(widths)
        return path, widths


def latency_loss(kind: str, target_ms: float, weight: float | None):
    """The latency term of alpha's loss as a function of the expected latency in ms (a tensor); weight None: its default."""
    function, default = LATENCY_LOSSES[kind]
    weight = default if weight is None else weight
    return lambda expected_ms: weight * function(expected_ms / target_ms)


# ---------------------------------------------------------------------------------------------------------------
# The search


class Method:
    """A search method, as the loop `search` runs it: a supernet, its optimizers, and what happens in a step and an epoch."""

    supernet: nn.Module

    def watch(self, guard: Guard) -> None:
        """Let every step go through this guard."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int, first: int) -> None:
        """Before an epoch, of which the `first` steps were done before the run was stopped."""

    def held_out_before(self, step: int) -> int:
        """How many held-out batches the steps of this epoch before `step` took."""
        return 0

    def step(self, batch, step: int, held_out: HeldOut, where: str) -> dict[str, float]:
        """One step; returns what is to be averaged over the epoch, or nothing where the step was skipped."""
        raise NotImplementedError

    def end_epoch(self) -> dict:
        """After an epoch: what else its row holds."""
        raise NotImplementedError

    def better(self, row: dict, best: dict | None) -> bool | None:
        """Whether a row is better than the best one so far, so that its supernet is kept; None where the last is taken."""
        return None

    def state_dict(self) -> dict:
        raise NotImplementedError

    def load_state_dict(self, state: dict) -> None:
        raise NotImplementedError


class TFNAS(Method):
    """The weights and alpha in turn (TF-NAS, Markhorst 2024).

    The first `warmup_epochs` train weights only, one path a step: with `warmup` "sampled" by Gumbel softmax, as in TF-NAS;
    with "inherit" the largest operations, whose weights all others then take over. (A supernet learns its first features
    many times slower through random paths: a long search can afford that, a short one would choose by noise.)

    Then alpha takes a step on held-out images after every second weight step, the temperature falls by
    `temperature_decay` an epoch, and after each epoch the likeliest path is scaled in width to the target (only where
    `pressure`: the target is within reach).
    """

    def __init__(self, searcher: Searcher, budget: Budget, *, steps: int, warmup_epochs: int, warmup: str, temperature: float,
                 temperature_decay: float, pressure: bool, latency_term):
        self.searcher, self.supernet, self.budget = searcher, searcher.supernet, budget
        self.warmup_epochs, self.warmup, self.pressure, self.latency_term = warmup_epochs, warmup, pressure, latency_term
        self.temperature, self.temperature_decay = temperature, temperature_decay
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(searcher.weight_optimizer, steps)

    def watch(self, guard: Guard) -> None:
        self.searcher.guard = guard

    def begin_epoch(self, epoch: int, first: int) -> None:
        self.warm = epoch < self.warmup_epochs
        if self.warmup == "inherit" and epoch == self.warmup_epochs > 0 and first == 0:
            self.supernet.inherit_()
        self.tau = self.temperature * self.temperature_decay ** max(0, epoch - self.warmup_epochs)
        self.candidates_ms = self.budget.candidates_ms().to(self.searcher.device)  # widths change between epochs only

    def held_out_before(self, step: int) -> int:
        return 0 if self.warm else step // 2

    def expected_ms(self) -> Tensor:
        return self.supernet.expected_latency(self.candidates_ms, self.budget.base_ms)

    def step(self, batch, step: int, held_out: HeldOut, where: str) -> dict[str, float]:
        values = self.searcher.weight_step(
            batch, bi_sampling=not self.warm, where=where,
            path=self.supernet.largest_path() if self.warm and self.warmup == "inherit" else None)
        self.schedule.step()
        if not self.warm and step % 2 == 1:
            term = (lambda: self.latency_term(self.expected_ms())) if self.pressure else None
            values |= self.searcher.arch_step(held_out.next(), self.tau, term, where=where)
        return values

    def end_epoch(self) -> dict:
        supernet = self.supernet
        if self.pressure and not self.warm:
            path = supernet.best_path()
            fitted, widths = self.budget.fit(path)
            for block, (old, new) in enumerate(zip(path, fitted)):
                if old != new:  # only the widths of what the search itself prefers
                    widths[block] = supernet.mixed[block].candidates[old].width
            self.searcher.set_widths(path, widths)
            self.candidates_ms = self.budget.candidates_ms().to(self.searcher.device)
        entropy = supernet.entropy()
        return {"expected_ms": self.expected_ms().item(), "temperature": None if self.warm else self.tau,
                "entropy_mean": entropy.mean().item(), "entropy": [round(v, 4) for v in entropy.tolist()],
                "path": [supernet.operations[index].name for index in supernet.best_path()],
                "alpha": [[round(v, 5) for v in row] for row in supernet.alpha.softmax(1).tolist()],
                "beta": [[round(v, 5) for v in beta.softmax(0).tolist()] for beta in supernet.betas]}

    def state_dict(self) -> dict:
        return {**self.searcher.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.searcher.load_state_dict(state)
        self.schedule.load_state_dict(state["schedule"])


class Restoration(Method):
    """A supernet that is run as a whole, superkernel or HiNAS: weights, structure, and the PSNR of validation images.

    With `joint` both are trained in one step on the same images (Mozejko 2020); else the structure takes a step of its own on
    held-out images, after each weight step from epoch `warmup_epochs` on (HiNAS; "two-level" in Mozejko's section 7).

    While the likeliest network costs more than the target, the gradient of the expected cost is added to that of the loss,
    `pressure` times as large. (A weight on the cost itself, as in TF-NAS, has no good value: by how much a denoising loss changes
    with the structure differs by orders of magnitude between tasks, and is far below what a latency changes by.)
    """

    def __init__(self, supernet: nn.Module, weight_optimizer, arch_optimizer, schedule, *, device: torch.device, validate,
                 denoising: str, joint: bool, warmup_epochs: int, costs: Costs, pressure: float, seed: int, amp: str,
                 temperature=None, keep_from: int = 0, grad_clip: float = 5.0):
        self.supernet, self.device, self.validate, self.denoising = supernet, device, validate, denoising
        self.weight_optimizer, self.arch_optimizer, self.schedule = weight_optimizer, arch_optimizer, schedule
        self.joint, self.warmup_epochs, self.keep_from = joint, warmup_epochs, keep_from
        self.costs, self.pressure = costs, pressure
        self.seed, self.amp, self.grad_clip, self.temperature = seed, amp, grad_clip, temperature
        self.scalers = [torch.amp.GradScaler(device.type, enabled=amp == "float16") for _ in range(2)]
        self.weights, self.arch = supernet.weight_parameters(), supernet.arch_parameters()

    def watch(self, guard: Guard) -> None:
        self.guard = guard

    def begin_epoch(self, epoch: int, first: int) -> None:
        self.epoch, self.warm = epoch, epoch < self.warmup_epochs
        self.supernet.train()
        if self.temperature is not None:
            self.supernet.set_temperature(self.temperature(epoch))

    def held_out_before(self, step: int) -> int:
        return 0 if self.joint or self.warm else step

    def step(self, batch, step: int, held_out: HeldOut, where: str) -> dict[str, float]:
        # The samples of a step, the same on all processes.
        torch.manual_seed(data_module.mix(self.seed, self.epoch, step))
        self.guard.remember(self.supernet)
        with frozen([] if self.joint else self.arch):
            values = self._step("weight_loss", batch, self.weights + self.arch if self.joint else self.weights,
                                self.weight_optimizer, self.scalers[0], self.joint, where)
        self.schedule.step()
        if not self.joint and not self.warm:
            with frozen(self.weights):
                values |= self._step("arch_loss", held_out.next(), self.arch, self.arch_optimizer, self.scalers[1], True, where)
        return values

    def _step(self, name: str, batch, parameters: list, optimizer, scaler, with_cost: bool, where: str) -> dict[str, float]:
        noisy, clean, labels = batch
        with autocast(self.device, self.amp):
            output = self.supernet(noisy)
        loss, _ = task_loss(output, clean, labels, "den", denoising=self.denoising)
        self.supernet.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if with_cost and self.costs.target is not None and self.costs.of_likeliest(self.supernet) > self.costs.target:
            self._press()
        return take_step(name, loss.detach(), parameters, optimizer, scaler, self.guard, self.grad_clip, where,
                         self.supernet.buffers())

    def _press(self) -> None:
        """Add the gradient of the expected cost to that of the structure."""
        gradients = torch.autograd.grad(self.costs.expected(self.supernet), self.arch, allow_unused=True)
        used = [(parameter, gradient) for parameter, gradient in zip(self.arch, gradients)
                if gradient is not None and parameter.grad is not None]
        own, others = (torch.stack([x.norm() for x in gradients]).norm()
                       for gradients in zip(*((parameter.grad, gradient) for parameter, gradient in used)))
        for parameter, gradient in used if others > 0 else ():
            parameter.grad.add_(gradient * (self.pressure * own / others))

    def end_epoch(self) -> dict:
        # What cannot be the best one is not worth the time, as in the paper (4.1).
        held_out = self.validate(self.supernet) if self.epoch >= self.keep_from else {"psnr_db": None, "loss": None}
        with torch.no_grad():
            expected = self.costs.expected(self.supernet).item()
        entropy = self.supernet.entropy()
        return {"val_psnr_db": held_out["psnr_db"], "val_loss": held_out["loss"], "expected_cost": expected,
                "found_cost": self.costs.of_likeliest(self.supernet), "cost_unit": self.costs.unit,
                "entropy_mean": entropy.mean().item(), "entropy": [round(value, 4) for value in entropy.tolist()],
                "found": self.supernet.derive().to_dict()}

    def better(self, row: dict, best: dict | None) -> bool:
        if row["val_psnr_db"] is None:
            return False

        def rank(row: dict) -> tuple:  # within the target first
            met = self.costs.target is None or row["found_cost"] <= self.costs.target
            return met, row["val_psnr_db"] if math.isfinite(row["val_psnr_db"]) else -math.inf
        return best is None or rank(row) > rank(best)

    def state_dict(self) -> dict:
        return {"supernet": self.supernet.state_dict(), "weight_optimizer": self.weight_optimizer.state_dict(),
                "arch_optimizer": self.arch_optimizer and self.arch_optimizer.state_dict(),
                "scalers": [scaler.state_dict() for scaler in self.scalers], "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.supernet.load_state_dict(state["supernet"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        if self.arch_optimizer is not None:
            self.arch_optimizer.load_state_dict(state["arch_optimizer"])
        for scaler, saved in zip(self.scalers, state["scalers"]):
            scaler.load_state_dict(saved)
        self.schedule.load_state_dict(state["schedule"])


def search(method: Method, weight_batches: NoisyBatches, arch_batches: NoisyBatches, *, epochs: int, output_dir: str | Path,
           flags: dict, table: dict | None, nonfinite: str = "stop", save_minutes: float = 10.0, patience: int = 0,
           state: dict | None = None) -> list[dict]:
    """Run a method's epochs; returns one row per epoch, as in log.jsonl.

    Writes search.pt (all that is needed to go on: `state` is its content), and supernet.pt where the method keeps its best one.
    With `patience`, ends after so many epochs without a better one. `table`: the content of the latency table, for search.pt.
    """
    output_dir = Path(output_dir)
    rows: list[dict] = []
    first, sums, best, seconds = 0, {}, None, 0.0
    steps = len(weight_batches)
    with Guard(nonfinite, save_minutes) as guard:
        method.watch(guard)
        if state is not None:
            method.load_state_dict(state["searcher"])
            rows, first, sums, best = state["rows"], state["step"], state["sums"], state["best"]
            seconds = state.get("seconds", 0.0)
            if data_module.rank_and_world()[0] > 0:
                sums = {name: [0.0, 0] for name in sums}

        def save(step: int) -> None:
            """search.pt: all that is needed to go on from `step` steps into the epoch after rows[-1]."""
            nonlocal sums
            totals = sum_over_processes([value for pair in sums.values() for value in pair])
            sums = {name: totals[2 * n:2 * n + 2] for n, name in enumerate(sums)}
            if data_module.rank_and_world()[0] > 0:  # what has been added up is the first one's from here on
                sums = {name: [0.0, 0] for name in sums}
                return
            models.save_checkpoint(output_dir / "search.pt", {
                "searcher": method.state_dict(), "rows": rows, "best": best, "step": step, "sums": sums, "flags": flags,
                "table": table, "seconds": time.perf_counter() - start if step else 0.0})

        for epoch in range(len(rows), epochs):
            if patience and best is not None and len(rows) - best["epoch"] >= patience:
                print(f"No epoch was better than epoch {best['epoch']} for {patience} epochs: the search ends.")
                break
            start = time.perf_counter() - seconds  # of this epoch, before the run was stopped
            method.begin_epoch(epoch, first)
            held_out = HeldOut(arch_batches, epoch, method.held_out_before(first))
            progress = bar(weight_batches.epoch(epoch, first), f"search {epoch + 1}/{epochs}", steps, first, "step")
            for step, batch in enumerate(progress, first):
                values = method.step(batch, step, held_out, f"epoch {epoch + 1}, step {step + 1}")
                for name, value in values.items():
                    total, count = sums.get(name, (0.0, 0))
                    sums[name] = [total + value, count + 1]
                progress.set_postfix({name: f"{total / max(1, count):.3f}" for name, (total, count) in sums.items()})
                guard.end_of_step(lambda: save(step + 1))
            guard.end_of_epoch(epoch + 1, "weight_loss" in sums)
            totals = sum_over_processes([value for pair in sums.values() for value in pair])
            rows.append({"epoch": epoch + 1, **{name: totals[2 * n] / totals[2 * n + 1] for n, name in enumerate(sums)},
                         **method.end_epoch(), "seconds": time.perf_counter() - start})
            if method.better(rows[-1], best):
                best = rows[-1]
                if data_module.rank_and_world()[0] == 0:
                    models.save_checkpoint(output_dir / "supernet.pt",
                                           {"epoch": epoch + 1, "supernet": method.supernet.state_dict()})
            first, sums, seconds = 0, {}, 0.0
            guard.save(lambda: save(0))
            if data_module.rank_and_world()[0] == 0:
                write_log(output_dir / "log.jsonl", rows)
            tqdm.write(format_row(rows[-1], epochs))
    return rows


def seconds_before(state: dict | None) -> float:
    """How long a run searched before it was stopped, from the content of its search.pt."""
    return 0.0 if state is None else sum(row["seconds"] for row in state["rows"]) + state.get("seconds", 0.0)


class HeldOut:
    """The held-out batches of one epoch, from the `first` on; where they are fewer than are asked for, another tour in
    another order begins."""

    def __init__(self, batches: NoisyBatches, epoch: int, first: int):
        self.batches, self.epoch = batches, epoch
        self.tour, place = divmod(first, len(batches))
        self.iterator = batches.epoch(self._number(), place)

    def _number(self) -> int:
        return self.epoch * 1000 + self.tour

    def next(self):
        batch = next(self.iterator, None)
        if batch is None:
            self.tour += 1
            self.iterator = self.batches.epoch(self._number())
            batch = next(self.iterator)
        return batch


def write_log(path: Path, rows: list[dict]) -> None:
    models.write_file(path, lambda temporary: temporary.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def format_row(row: dict, epochs: int) -> str:
    """An epoch in one line."""
    arch = f"alpha loss {row['arch_loss']:.3f}  " if "arch_loss" in row else "" if "val_psnr_db" in row else "(weights only)    "
    line = f"epoch {row['epoch']:>3}/{epochs}  weight loss {row['weight_loss']:.{4 if 'val_psnr_db' in row else 3}f}  {arch}"
    if "expected_ms" in row:
        line += f"expected {row['expected_ms']:.2f} ms  "
    else:
        line += f"validation PSNR {row['val_psnr_db']:.2f} dB  " if row["val_psnr_db"] is not None else ""
        line += f"likeliest network {row['found_cost']:.4g} {row['cost_unit']}  "
    return line + f"entropy {row['entropy_mean']:.3f}  {row['seconds']:.0f} s"


def derive(supernet: models.SuperNet, budget: Budget, pressure: bool, correct: bool,
           rounds: int = 3) -> tuple[models.Arch, dict]:
    """The likeliest network, with operations and widths fitted to the target by the table (where `pressure`), and measured.

    With `correct`, a measurement more than 3 % from the target scales the whole table by measured / predicted, in
    `budget.table` too, and the fit is repeated. Without, the architecture follows from the table alone, so that the same
    table gives the same architecture. Returns it and {"target_ms", "predicted_ms", "measured_ms", ...}.
    """
    for attempt in range(rounds):
        path = supernet.best_path()
        widths = [supernet.mixed[block].candidates[index].width for block, index in enumerate(path)]
        if pressure:
            path, widths = budget.fit(path)
        blocks = [replace(row[index], mid_channels=width) for row, index, width, kept
                  in zip(supernet.candidate_blocks(), path, widths, supernet.kept()) if kept]
        full = models.make_arch(supernet.network.arch.model, blocks, supernet.network.arch.num_classes)
        arch = full.with_model(budget.model)
        result = {"target_ms": budget.target_ms, **latency.compare(budget.table, arch)}
        met = abs(result["measured_ms"] / budget.target_ms - 1) <= MEASURE_TOLERANCE
        if met or not pressure or not correct or attempt == rounds - 1:
            return arch, result
        budget.table = latency.corrected(budget.table, result)


# ---------------------------------------------------------------------------------------------------------------
# Results


def format_arch(arch: models.Arch, table: latency.LatencyTable) -> str:
    """The found network as a table a person can read."""
    parts = ({f"{part} of {half}": ms for half in ("dnas", "cnas") for part, ms in table.fixed_ms[half].items()}
             if arch.model == "dcnas-seq" else table.fixed_ms[arch.model])
    fixed = {part: ms * table.correction for part, ms in parts.items()}
    lines = [f"{'stage':>5}  {'operation':<14} {'in':>4} {'mid':>5} {'out':>4} {'stride':>6} {'SE':>4} {'ms':>7}"]
    for block in arch.blocks:
        name = f"MBConv k{block.kernel_size} x{block.mid_channels / block.in_channels:.2f}"
        ms = (sum(ms for part, ms in fixed.items() if part.startswith("stage_2")) if block.stage == 2 else
              latency.passes(arch.model, block.stage) * table.block_ms(block))
        lines.append(f"{block.stage:>5}  {name:<14} {block.in_channels:>4} {block.mid_channels:>5} {block.out_channels:>4} "
                     f"{block.stride:>6} {block.se_channels or '-':>4} {ms:>7.3f}")
    for part, ms in fixed.items():
        if not part.startswith("stage_2"):
            lines.append(f"{'':>5}  {part:<14} {'':>4} {'':>5} {'':>4} {'':>6} {'':>4} {ms:>7.3f}")
    return "\n".join(lines)


def plot_alpha(rows: list[dict], operations: list[str], path: Path) -> bool:
    """Draw how softmax(alpha) of every block moved; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    positions = models.searched_positions("dcnas")[:len(rows[0]["alpha"])]
    columns = 6
    figure, axes = pyplot.subplots(math.ceil(len(positions) / columns), columns, figsize=(14, 7), sharex=True, sharey=True,
                                   squeeze=False)
    for axis in axes.flat[len(positions):]:
        axis.axis("off")
    epochs = [row["epoch"] for row in rows]
    for index, (axis, position) in enumerate(zip(axes.flat, positions)):
        for operation, name in enumerate(operations):
            axis.plot(epochs, [row["alpha"][index][operation] for row in rows], label=f"MB-{name}")
        number_in_stage = 1 + sum(p.stage == position.stage for p in positions[:index])
        axis.set_title(f"stage {position.stage}, block {number_in_stage}", fontsize=9)
    axes[0][0].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.supxlabel("epoch")
    figure.supylabel("softmax(alpha)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=len(operations))
    figure.tight_layout(rect=(0.01, 0, 1, 0.95))
    models.write_file(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png"))
    pyplot.close(figure)
    return True


# ---------------------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="search.py", allow_abbrev=False, usage="python search.py --target MS [options]  (--help lists them)",
        description="Search a network that denoises and classifies within a latency.",
        epilog="examples:\n  python search.py --target 12\n"
               "  python search.py --target 6 --data mnist --output-dir runs/mnist\n"
               "  python search.py --target 12 --data photos --size 224 --epochs 90 --warmup-epochs 10 --space 8",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to search")
    what.add_argument("--target", type=milliseconds, metavar="MS",
                      help="latency of the whole exported network, decoder and heads included, in milliseconds per batch; "
                           "6,8,12 searches one after the other, with one table, into target_6, target_8 ... below "
                           "--output-dir")
    what.add_argument("--model", choices=(*models.MODELS, *RESTORATION), default="dcnas",
                      help="cnas classifies, dnas denoises, dcnas does both; superkernel: U-Nets that denoise, hinas: cells and "
                           "widths, for denoising and super-resolution (default: %(default)s)")
    what.add_argument("--space", type=int, choices=sorted(models.SPACES), default=4,
                      help="operations per block (default: %(default)s, the papers' most stable)")
    what.add_argument("--depth", choices=("fixed", "learned"), default="fixed",
                      help="fixed: all blocks are kept; learned: the search finds how many each stage keeps, as TF-NAS does "
                           "(default: %(default)s, which the papers found to be more stable)")
    what.add_argument("--strategy", choices=("gradient", "random", "plain"), default="gradient",
                      help="random: no search, operations are drawn and fitted to the target: what a search must beat; plain: "
                           "superkernel's network without superkernels (default: %(default)s)")
    what.add_argument("--search-images", choices=("noisy", "clean"), default="noisy",
                      help="images during the search (default: %(default)s)")
    what.add_argument("--search-loss", choices=("cls", "both", "den"),
                      help="loss during the search: cls searches the classifier and attaches the decoder afterwards; both "
                           "searches the whole dcnas; den the dnas (default: cls, or den where there are no labels)")
    what.add_argument("--min-width", type=number(1, 3), default=models.MIN_WIDTH, metavar="X",
                      help="smallest mid channels, in multiples of a block's input channels (default: %(default)s)")
    cost = parser.add_argument_group("latency")
    cost.add_argument("--table", metavar="FILE", help="latency table of this device (default: one is made)")
    cost.add_argument("--batch", type=whole(1, 65536), metavar="N",
                      help="images per batch of the latency (default: 32 on CUDA, 1 on a CPU)")
    cost.add_argument("--latency-threads", type=whole(1, 4096), default=1, metavar="N",
                      help="threads of torch that the latency is for, on a CPU (default: %(default)s)")
    cost.add_argument("--dtype", choices=latency.DTYPES, default="float32",
                      help="number format of the latency (default: %(default)s)")
    cost.add_argument("--mode", choices=models.MODES, default="eager",
                      help="form of the network that the latency is for, see latency.py --help (default: %(default)s)")
    cost.add_argument("--latency-loss", choices=LATENCY_LOSSES, default="hinge",
                      help="hinge: max(LAT / target - 1, 0); absolute: |LAT / target - 1| (default: %(default)s)")
    cost.add_argument("--latency-weight", type=number(0, 1e6), metavar="LAMBDA",
                      help="weight of the latency loss (default: 0.5 for hinge, 0.1 for absolute); of superkernel and hinas: how "
                           "many times the loss's gradient that of the latency is, above the target (default: 1)")
    more = parser.add_argument_group("superkernel and hinas")
    more.add_argument("--network", metavar="NAME",
                      help=f"superkernel: {', '.join(superkernel.PRESETS)}; hinas: {', '.join(hinas.PRESETS)} (default: the "
                           "first)")
    more.add_argument("--width", type=whole(1, 1024), metavar="N",
                      help="base width of the network in channels, to make it smaller or larger (default: the paper's)")
    more.add_argument("--target-macs", type=number(1e-6, 1e9), metavar="M",
                      help="instead of --target: multiply-accumulates of the whole network for one image of --size, in millions")
    more.add_argument("--denoising-loss", choices=DENOISING_LOSSES,
                      help="(default: charbonnier for superkernel, log-ssim, which is MSE + 0.6 log10(1 / SSIM), for hinas)")
    more.add_argument("--patience", type=whole(0), default=0, metavar="N",
                      help="stop after N epochs without a better validation PSNR; 0: never (default: %(default)s)")
    more.add_argument("--structure", choices=superkernel.STRUCTURES, default="joint",
                      help="of superkernel: the distribution over kernel sizes and filters (default: %(default)s)")
    more.add_argument("--form", choices=superkernel.FORMS, default="full",
                      help="of superkernel: full, one convolution with an averaged kernel; separate, one per kernel size "
                           "(default: %(default)s)")
    more.add_argument("--search-width", type=whole(1, 1024), default=hinas.SEARCH_WIDTH, metavar="N",
                      help="of hinas: base width of the supernet (default: %(default)s)")
    more.add_argument("--cells", choices=("shared", "unshared"), default="shared",
                      help="of hinas: one cell for the widths that come before it (eq. 5), or one for each (eq. 6; default: "
                           "%(default)s)")
    more.add_argument("--optimizer", choices=("adam", "sgd"), default="adam",
                      help="of hinas, for the weights: adam learns sooner; sgd is the paper's, with --lr 0.025 (default: "
                           "%(default)s)")
    more.add_argument("--one-cell", action="store_true",
                      help="of hinas: the same operations in the cells of all layers (default: each layer its own)")
    more.add_argument("--no-residual", action="store_true",
                      help="of hinas: return the network's output itself (default: added to the input)")
    more.add_argument("--two-level", action="store_true",
                      help="of superkernel: train the structure on held-out images (default: with the weights, as in the paper)")
    data_module.add_data_arguments(parser)
    data_module.add_noise_arguments(parser)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=whole(1, 100000), default=10, metavar="N",
                        help="passes over the images (default: %(default)s; the papers: 90)")
    recipe.add_argument("--warmup-epochs", type=whole(0, 100000), metavar="N",
                        help="first epochs, which train the weights only (default: a third of --epochs, at most the "
                             "papers' 10)")
    recipe.add_argument("--warmup", choices=("inherit", "sampled"), default="inherit",
                        help="inherit: train the largest operations, then give their weights to all; sampled: random paths, "
                             "as in the papers, for long searches (default: %(default)s)")
    recipe.add_argument("--batch-size", type=whole(2, 65536), default=32, metavar="N",
                        help="images per step (default: %(default)s)")
    recipe.add_argument("--lr", type=number(1e-8, 100), default=5e-2, metavar="LR",
                        help="learning rate of the weights (default: %(default)s; the papers: 0.02, superkernel 2e-5, hinas 0.025)")
    recipe.add_argument("--arch-lr", type=number(1e-8, 100), default=1e-2, metavar="LR",
                        help="learning rate of alpha, Adam (default: %(default)s)")
    recipe.add_argument("--recompute", action="store_true",
                        help="compute the operations of an alpha step again in the backward pass instead of keeping what they "
                             "computed: slower, for small GPUs (default: keep)")
    recipe.add_argument("--temperature", type=number(1e-3, 1e3), default=5.0, metavar="T",
                        help="first temperature of the Gumbel softmax (default: %(default)s)")
    recipe.add_argument("--temperature-decay", type=number(1e-3, 1), metavar="X",
                        help="factor per epoch (default: what reaches the papers' last temperature, 5 * 0.96^79 = 0.2)")
    add_run_arguments(parser, "runs/search")
    return parser


def milliseconds(text: str) -> list[float]:
    """A type for argparse: one target or several, separated by commas."""
    return [number(1e-6, 1e9)(part) for part in text.split(",")]


def search_plan(model: str, search_loss: str | None, labelled: bool) -> tuple[str, str]:
    """(supernet's model, loss) of a search; ValueError in one sentence when they do not go together.

    The classifier is searched by L_Cls, and the decoder attached afterwards, which the papers found best (table 4). With
    "both" the whole of DC-NAS is the supernet. D-NAS keeps stages 1 to 6 of what C-NAS's search finds, and is searched by
    L_Den on data without labels (the papers do not say how; ours).
    """
    if not labelled and model != "dnas":
        raise ValueError(f"These images have no labels, and a {model} classifies: search with --model dnas, or give a folder "
                         "with one folder per class in train/ and val/.")
    loss = search_loss or ("cls" if labelled else "den")
    allowed = {"cnas": ("cls",), "dcnas": ("cls", "both"), "dcnas-seq": ("cls",),
               "dnas": ("cls", "den") if labelled else ("den",)}[model]
    if loss not in allowed:
        raise ValueError(f"--search-loss {loss} does not go with --model {model} on these images; "
                         f"possible: {', '.join(allowed)}.")
    return {"cls": "cnas", "both": "dcnas", "den": "dnas"}[loss], loss


def obtain_table(args: argparse.Namespace, setting: latency.Setting, state: dict | None, build):
    """The table named by --table, that of the resumed run, or a new one, made by build() here and said so."""
    path = Path(args.output_dir) / "latency.json"
    if args.table:
        table = latency.load_table(args.table)
        latency.require_setting(table, setting, args.table)
    elif state is not None:
        table = latency.read_table(state["table"])
        latency.require_setting(table, setting, "of this run")
    else:
        print(f"Timing the operations on this device ({setting.device}, {setting.size} px, batch {setting.batch}) into "
              f"{path}; use it again with --table.")
        lock_folder(path.parent)

        def make() -> dict:
            content = build()
            models.write_json(path, content)
            return content

        table = latency.read_table(data_module.from_first(make))
    if "check" in table.content:
        check = table.content["check"]
        print(f"The table's error on {check['networks']} random networks: {latency.format_error(check)}.")
    return table


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    started = time.time()
    try:
        set_method_defaults(parser, argv)
        args, state = parse_or_resume(parser, argv, "search.pt", "searcher")
        check_flags(parser, args)
        run = search_restoration if args.model in RESTORATION else search_joint
        run(args, state, argv)
    except ValueError as error:
        parser.error(str(error))
    except (TrainingError, OSError) as error:
        sys.exit(f"search.py: {error}")
    except (KeyboardInterrupt, Stopped) as stop:
        say_stopped("search.py", getattr(stop, "folder", args.output_dir), "search.pt", started)


def set_method_defaults(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Give the flags the defaults of the method that is named, before they are parsed or printed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--model", "--network", "--data"):
        early.add_argument(flag, default="")
    named, _ = early.parse_known_args(argv)
    parser.set_defaults(**RESTORATION.get(named.model, {}))
    if named.model != "hinas":
        return
    if named.network.startswith("sr-"):
        # Small images without noise, as many as in the paper, of a size that can be divided.
        parser.set_defaults(sigma=0.0, batch_size=24, size=66 if named.network == "sr-x3" else 64)
        return
    images = {"sigmas": [30 / 255, 50 / 255, 70 / 255]}  # the paper's section 4.1, as are the next two
    if named.data and named.data not in data_module.SCENES:
        folders = ["train", "val"]
        images |= {"grey": True, "train_folders": folders if all((Path(named.data) / name).is_dir() for name in folders) else None}
    parser.set_defaults(**data_module.without_what_changed(images, argv, same_data=True))


# Flags that mean something to some models only.
FLAGS_OF = {
    models.MODELS: ("space", "depth", "search_images", "search_loss", "min_width", "latency_loss", "warmup"),
    ("superkernel", "hinas"): ("network", "width", "target_macs", "denoising_loss", "patience"),
    ("superkernel",): ("structure", "form", "two_level"),
    ("hinas",): ("search_width", "cells", "one_cell", "no_residual", "optimizer"),
    (*models.MODELS, "superkernel"): ("temperature", "temperature_decay"),
    (*models.MODELS, "hinas"): ("recompute",),
}


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """ValueError in one sentence for a flag that the model has no use for."""
    for possible, names in FLAGS_OF.items():
        for name in names if args.model not in possible else ():
            if getattr(args, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} is for --model {', '.join(possible)}, not for {args.model}; leave it "
                                 "out.")
    if args.strategy == "plain" and args.model != "superkernel":
        raise ValueError("--strategy plain is for --model superkernel; take random.")
    if args.model in RESTORATION and args.table and not args.target:
        raise ValueError("--table is for a --target in milliseconds; give one, or leave the table out.")


def search_joint(args: argparse.Namespace, state: dict | None, argv: list[str]) -> None:
    """C-NAS, D-NAS or DC-NAS: the searches of all targets, and their comparison."""
    if args.target is None:
        raise ValueError("name the latency you want, in milliseconds per batch, for example --target 12")
    device = prepare(args)
    flags = run_flags(args)
    data = data_module.data_from(args)
    if isinstance(data.train, data_module.Pairs):
        raise ValueError(f"{data.name} has two digits in each image, for the controlled study of train.py; search with "
                         "--data mnist or --data digits.")
    supernet_model, loss = search_plan(args.model, args.search_loss, data.classes is not None)
    check_images(data, loss)
    parts = data_module.split_dataset(data.train, 0.8, args.seed)
    if min(len(part) for part in parts) < 2:
        raise ValueError(f"{len(data.train)} training images are too few to split into weights and alpha; give more.")
    classes = len(data.classes or [])
    setting = latency.this_setting(args.device, size=data.size, num_classes=classes or 10, batch=args.batch,
                                   threads=args.latency_threads, dtype=args.dtype, mode=args.mode)
    batch_size = share(args.batch_size)
    table = obtain_table(args, setting, state, lambda: latency.build_table(
        setting, space=args.space, min_width=args.min_width, seed=args.seed))
    if not isinstance(table, latency.LatencyTable):
        raise ValueError(f"{args.table} is a table for another search; leave --table out, and one is made.")
    slowest = check_targets(args, table, supernet_model, argv)
    lock_folder(args.output_dir)
    found = []
    for target_ms in args.target:
        folder = Path(args.output_dir) / (f"target_{target_ms:g}" if len(args.target) > 1 else "")
        make_folder(folder)
        torch.manual_seed(args.seed)  # whether or not a table was made: the same weights
        supernet = models.SuperNet(supernet_model, args.space, classes, args.min_width, args.depth)
        for mixed in supernet.mixed:
            mixed.recompute = args.recompute
        budget = Budget(table, supernet, args.model, target_ms)
        try:
            found.append(find(args, data, parts, supernet, budget, loss, target_ms <= slowest, device, folder,
                              {**flags, "target": [target_ms]}, state, batch_size))
        except (KeyboardInterrupt, Stopped) as stop:
            stop.folder = folder  # of the several, the one to go on with
            raise
        if budget.table is not table:  # corrected by what was measured
            table = budget.table
            if data_module.rank_and_world()[0] == 0:
                models.write_json(Path(args.output_dir) / "latency.json", table.content)
    if len(found) > 1:
        print(f"\n{'target':>8} {'predicted':>10} {'measured':>10} {'parameters':>12} {'MACs':>9}  record")
        for path, result, network in found:
            print(f"{result['target_ms']:>5g} ms {result['predicted_ms']:>7.3f} ms {result['measured_ms']:>7.3f} ms "
                  f"{models.count_parameters(network):>12,} {models.count_macs(network, data.size) / 1e6:>7.1f} M  {path}")


def check_targets(args: argparse.Namespace, table: latency.LatencyTable, supernet_model: str, argv: list[str]) -> float:
    """The slowest network of the space, ms; ValueError before any training when a target lies below the fastest."""
    supernet = models.SuperNet(supernet_model, args.space, 0 if supernet_model == "dnas" else 1, args.min_width, args.depth)
    try:
        fastest, slowest = Budget(table, supernet, args.model, 1.0).range_ms()
    except ValueError as error:
        raise ValueError(f"{error} Make one with: {_command_for(args, table.setting)}") from None
    reachable = (f"With widths from {args.min_width:g} times the input, a {args.model} of this space takes "
                 f"{fastest:.3f} to {slowest:.3f} ms per batch of {table.setting.batch} here, by the table.")
    if min(args.target) < fastest:
        command = _with_target(argv, _round_up(1.05 * fastest))
        raise ValueError(f"The target of {min(args.target):g} ms is below the fastest network. {reachable} This would work: "
                         f"{command}")
    print(reachable)
    return slowest


def _command_for(args: argparse.Namespace, setting: latency.Setting) -> str:
    return latency.table_command(setting, f"--classes {setting.num_classes} --space {args.space} --min-width {args.min_width:g}")


def find(args: argparse.Namespace, data: data_module.Data, parts, supernet: models.SuperNet, budget: Budget, loss: str,
         pressure: bool, device: torch.device, folder: Path, flags: dict, state: dict | None, batch_size: int) -> tuple:
    """One search from its images to its files; prints what it found. Returns (path of arch.json, latencies, network)."""
    start = time.perf_counter() - seconds_before(state)
    if not pressure:
        print(NO_PRESSURE.format(budget.target_ms, "ms", "latency"))
    how = dict(seed=args.seed, workers=args.workers, device=device, shuffle=True, drop_last=True)
    loaders = [data_module.make_loader(torch.utils.data.Subset(images, part), batch_size, **how)
               for images, part in zip((data.train, data_module.twin(data.train)), parts)]
    warmup_epochs = min(10, round(args.epochs / 3)) if args.warmup_epochs is None else args.warmup_epochs
    decay = args.temperature_decay or 0.96 ** (79 / max(1, args.epochs - warmup_epochs - 1))
    if args.strategy == "random":
        generator = torch.Generator().manual_seed(args.seed)
        with torch.no_grad():
            for parameter in supernet.arch_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            supernet.normalize_()
        return finish(args, data, supernet, budget, pressure, folder, start)
    print(f"Searching {args.model} for {budget.target_ms:g} ms by {loss} on {args.search_images} images of {data.name}: "
          f"{len(parts[0]):,} for the weights, {len(parts[1]):,} for alpha, {args.epochs} epochs, {warmup_epochs} of them for "
          "the weights only.")
    searcher = Searcher(supernet, device=device, lr=args.lr, arch_lr=args.arch_lr, loss=loss, seed=args.seed, amp=args.amp)
    noise = data_module.Noise(0.0) if args.search_images == "clean" else data_module.noise_from(args)
    batches = [NoisyBatches(loader, device, noise, args.seed + part) for part, loader in enumerate(loaders)]
    method = TFNAS(searcher, budget, steps=args.epochs * len(loaders[0]), warmup_epochs=warmup_epochs, warmup=args.warmup,
                   temperature=args.temperature, temperature_decay=decay, pressure=pressure,
                   latency_term=latency_loss(args.latency_loss, budget.target_ms, args.latency_weight))
    rows = search(method, *batches, epochs=args.epochs, output_dir=folder, flags=flags, table=budget.table.content,
                  nonfinite=args.nonfinite, save_minutes=args.save_minutes, state=state)
    return finish(args, data, supernet, budget, pressure, folder, start, rows)


def finish(args: argparse.Namespace, data: data_module.Data, supernet: models.SuperNet, budget: Budget, pressure: bool,
           folder: Path, start: float, rows: list[dict] | None = None) -> tuple:
    """Derive the network, write its files, print it. Returns (path of arch.json, latencies, network)."""
    arch, result, content = data_module.from_first(
        lambda: (*derive(supernet, budget, pressure, correct=args.table is None), budget.table.content))
    if content is not budget.table.content:
        budget.table = latency.LatencyTable(content)
    path, picture, setting = folder / "arch.json", folder / "alpha.png", budget.table.setting
    record = models.make_record(arch, models.provenance(setting.device, args.seed),
                                decisions=decisions(supernet),
                                latency={**result, "table_hash": budget.table.hash, "setting": vars(setting)},
                                data=args.data, data_root=args.data_root, size=data.size)
    first = data_module.rank_and_world()[0] == 0
    if first:
        models.write_json(path, record)
    drawn = first and bool(rows) and plot_alpha(rows, [operation.name for operation in supernet.operations], picture)
    print(f"\n{format_arch(arch, budget.table)}\n")
    print(f"target {budget.target_ms:g} ms, predicted {result['predicted_ms']:.3f} ms, measured {result['measured_ms']:.3f} "
          f"ms per batch of {setting.batch} (median of {result['bursts']} bursts, 10-90 %: {result['p10_ms']:.3f}-"
          f"{result['p90_ms']:.3f} ms) on {setting.device}")
    for line in explain(result, pressure):
        print(line)
    for line in judge_alpha(record["decisions"], [supernet.operations[i].name for i in supernet.best_path()]) if rows else ():
        print(line)
    kept = supernet.kept()
    if pressure and not all(kept) and result["predicted_ms"] < 0.99 * budget.target_ms:
        print(f"note: the learned depth keeps {sum(kept)} of {len(kept)} blocks, and these are at their widest; --depth fixed "
              "keeps all.")
    print(f"found in {time.perf_counter() - start:.0f} s: {path}" + (f", {picture}" if drawn else
          "; install matplotlib for a picture of how alpha moved" if rows else ""))
    print(f"next:\n  python train.py --arch {shlex.quote(str(path))}")
    return path, result, models.build_network(record)


# ---------------------------------------------------------------------------------------------------------------
# Searches of denoisers: superkernel and HiNAS


@dataclass
class Costs:
    """What is held below a target: ms by a latency table, or millions of multiply-accumulates. Without a target nothing is."""

    space: object
    target: float | None
    table: latency.PartTable | None
    parts: dict
    rest: float
    unit: str

    def expected(self, supernet: nn.Module) -> Tensor:
        return supernet.expected_cost(self.parts, self.rest)

    def of_likeliest(self, supernet: nn.Module) -> float:
        return self.space.cost(supernet.derive(), self.parts, self.rest)


def obtain_costs(args: argparse.Namespace, state: dict | None, space, size: int) -> Costs:
    """The costs of a space for inputs of `size`: by a table where there is a --target in ms, else multiply-accumulates."""
    if not args.target:
        return costs_of(space, args.target_macs, None, size)
    setting = latency.this_setting(args.device, size=size, num_classes=0, batch=args.batch, threads=args.latency_threads,
                                   dtype=args.dtype, mode=args.mode)
    table = obtain_table(args, setting, state, lambda: latency.build_part_table(setting, space, seed=args.seed))
    if not isinstance(table, latency.PartTable) or table.space != space:
        raise ValueError(f"{args.table or 'The table of this run'} is for another space; make one with: "
                         f"{latency.table_command(setting, latency.space_flags(space))}")
    return costs_of(space, args.target[0], table)


def costs_of(space, target: float | None, table: latency.PartTable | None, size: int = 0) -> Costs:
    """The costs of a space's parts by a table, or counted in multiply-accumulates for an image of `size`."""
    if table is not None:
        return Costs(space, target, table, table.costs, table.rest_ms, "ms")
    return Costs(space, target, None, *latency.part_macs(space, size), "M MACs")


def search_restoration(args: argparse.Namespace, state: dict | None, argv: list[str]) -> None:
    """A superkernel or HiNAS search, from its images to its files."""
    start = time.perf_counter() - seconds_before(state)
    if args.target is not None and (args.target_macs is not None or len(args.target) > 1):
        raise ValueError(f"--model {args.model} takes one --target, or one --target-macs, or none.")
    joint = args.model == "superkernel" and not args.two_level
    device = prepare(args)
    flags = run_flags(args)
    data = data_module.data_from(args)
    space = latency.make_space(args.model, args.network, args.width, data.channels)
    table_space = space  # a residual costs nothing
    if args.no_residual:
        space = replace(space, residual=False)
    scale = models.scale_of(space)
    noise, size = data_module.noise_from(args, scale), data.size // scale  # of the input
    check_images(data, "den", data.channels, scale)
    parts = [data.train, data_module.twin(data.train)]
    if not joint:
        parts = [torch.utils.data.Subset(images, half)
                 for images, half in zip(parts, data_module.split_dataset(data.train, 0.5, args.seed))]
    batch_size, folder = share(args.batch_size), Path(args.output_dir)
    if min(len(part) for part in parts) < 2:
        raise ValueError(f"{len(data.train)} training images are too few for a search; give more.")
    lock_folder(folder)
    if state is not None and data_module.rank_and_world()[0] == 0:
        before = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        if before.resolve() != folder.resolve() and (before / "supernet.pt").exists():  # the best so far, into the new folder
            models.write_file(folder / "supernet.pt", lambda temporary: shutil.copy(before / "supernet.pt", temporary))
    costs = obtain_costs(args, state, table_space, size)
    torch.manual_seed(args.seed)  # whether or not a table was made: the same weights
    supernet = make_supernet(args, space)
    cheapest, dearest = supernet.cost_range(costs.parts, costs.rest)
    print(f"The networks of this space take {cheapest:.4g} to {dearest:.4g} {costs.unit} for {size} px.")
    if costs.target is not None and costs.target < cheapest:
        raise ValueError(f"The target of {costs.target:g} {costs.unit} is below that; this would work: "
                         f"{_with_target(argv, _round_up(1.05 * cheapest), '--target' if args.target else '--target-macs')}")
    if costs.target is not None and costs.target >= dearest:
        print(NO_PRESSURE.format(costs.target, costs.unit, "cost"))
    if args.strategy != "gradient":
        rng = random.Random(args.seed)
        supernet.set_design(space.random_design(rng) if args.strategy == "random" else space.plain_design())
        if data_module.rank_and_world()[0] == 0:
            finish_restoration(args, data, supernet, costs, folder, start, None)
        return
    how = dict(seed=args.seed, workers=args.workers, device=device)
    loaders = [data_module.make_loader(part, batch_size, shuffle=True, drop_last=True, **how) for part in parts]
    val_loader = data_module.make_loader(data.val, batch_size, **how)
    supernet.to(device, memory_format=torch.channels_last)
    method = make_method(args, supernet, costs, steps=len(loaders[0]), joint=joint, device=device,
                         validate=lambda network: validate(network, val_loader, loss="den", device=device, noise=noise,
                                                           amp=args.amp, denoising=args.denoising_loss))
    print(f"Searching {args.model} on images of {data.name}: {len(parts[0]):,} for the weights"
          + (f", {len(parts[1]):,} for the structure" if not joint else " and the structure")
          + f", {len(data.val):,} for validation; at most {args.epochs} epochs of {len(loaders[0]):,} steps; supernet of "
          f"{models.count_parameters(supernet):,} parameters.")
    batches = [NoisyBatches(loader, device, noise, args.seed + part) for part, loader in enumerate(loaders)]
    rows = search(method, *batches, epochs=args.epochs, output_dir=folder, flags=flags,
                  table=costs.table and costs.table.content, nonfinite=args.nonfinite,
                  save_minutes=args.save_minutes, patience=args.patience, state=state)
    if data_module.rank_and_world()[0] > 0:  # what follows is for the one that writes
        return
    best = models.read_checkpoint(folder / "supernet.pt", device)
    supernet.load_state_dict(best["supernet"])
    print(f"The supernet was best after epoch {best['epoch']}.")
    finish_restoration(args, data, supernet, costs, folder, start, rows)


def make_supernet(args: argparse.Namespace, space) -> nn.Module:
    """The supernet of a space, with the flags of its method."""
    if args.model == "superkernel":
        return superkernel.SuperNet(space, args.structure, args.form)
    return hinas.SuperNet(space, args.search_width, args.cells == "shared", not args.one_cell, args.recompute)


def make_method(args: argparse.Namespace, supernet: nn.Module, costs: Costs, *, steps: int, joint: bool, device: torch.device,
                validate) -> Restoration:
    """How a supernet is trained.

    superkernel: Adam for both, at constant rates (Mozejko 2020, 5.1). HiNAS (Zhang 2020, 4.1): a cosine down to 1/25 of its rate
    for the weights, with SGD in the paper; Adam for the structure, from a fifth of the epochs on; the best supernet after three
    fifths.
    """
    weights, structure = supernet.weight_parameters(), supernet.arch_parameters()
    arch_optimizer, warmup, keep_from, temperature = None, args.warmup_epochs or 0, 0, None
    if args.model == "superkernel":
        groups = [{"params": weights, "lr": args.lr}] + ([{"params": structure, "lr": args.arch_lr}] if joint else [])
        weight_optimizer = torch.optim.Adam(groups, fused=True)
        schedule = torch.optim.lr_scheduler.ConstantLR(weight_optimizer, 1.0)
        if not joint:
            arch_optimizer = torch.optim.Adam(structure, args.arch_lr)
        decay = args.temperature_decay or 0.1 ** (1 / max(1, args.epochs - 1))

        def temperature(epoch: int) -> float:
            return args.temperature * decay ** epoch
    else:
        if args.optimizer == "sgd":
            weight_optimizer = torch.optim.SGD(weights, args.lr, 0.9, weight_decay=3e-4, fused=True)
        else:
            weight_optimizer = torch.optim.Adam(weights, args.lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(weight_optimizer, args.epochs * steps, args.lr / 25)
        arch_optimizer = torch.optim.Adam(structure, args.arch_lr, weight_decay=1e-3)
        warmup = round(args.epochs / 5) if args.warmup_epochs is None else args.warmup_epochs
        keep_from = int(0.6 * args.epochs)
    return Restoration(supernet, weight_optimizer, arch_optimizer, schedule, device=device, validate=validate,
                       denoising=args.denoising_loss, joint=joint, warmup_epochs=warmup, costs=costs,
                       pressure=1.0 if args.latency_weight is None else args.latency_weight, seed=args.seed,
                       amp=args.amp, temperature=temperature, keep_from=keep_from)


def finish_restoration(args: argparse.Namespace, data: data_module.Data, supernet: nn.Module, costs: Costs, folder: Path,
                       start: float, rows: list[dict] | None) -> None:
    """Derive the network within the target, write its files, print it."""
    supernet.cpu()
    result: dict = {}
    for attempt in range(3):
        design, trained = supernet.found(costs.parts, costs.rest, costs.target)
        if costs.table is None:
            break
        result = {"target_ms": costs.target, **latency.compare(costs.table, design)}
        if result["measured_ms"] <= (1 + MEASURE_TOLERANCE) * costs.target or args.table or attempt == 2:
            break
        costs = costs_of(costs.space, costs.target, latency.corrected(costs.table, result))
    network = trained or costs.space.network(design)
    size = data.size // models.scale_of(network)
    macs, parameters = models.count_macs(network, size), models.count_parameters(network)
    made, table = models.provenance(latency.device_name(args.device), args.seed), costs.table
    record = models.design_record(args.model, design, made, data=args.data, data_root=args.data_root, size=data.size,
                                  images=data_module.image_flags(args), parameters=parameters, macs=macs,
                                  decisions=[{"entropy": round(value, 4)} for value in supernet.entropy().tolist()],
                                  **({"latency": {**result, "table_hash": table.hash, "setting": vars(table.setting)}} if table
                                     else {}))
    path = folder / "arch.json"
    models.write_json(path, record)
    for name in ("distilled.pt", "network.svg"):  # of another run, if there are any
        (folder / name).unlink(missing_ok=True)
    if table:
        models.write_json(folder / "latency.json", table.content)
    if trained is not None and rows:
        models.save_checkpoint(folder / "distilled.pt", {
            "record": record, "classes": None, "size": data.size, "data": args.data, "seed": args.seed, "loss": "den",
            "made": made, "flags": run_flags(args), "epoch": len(rows), "network": trained.state_dict(), "ema": None})
    if args.model == "hinas":
        models.write_file(folder / "network.svg", lambda temporary: temporary.write_text(hinas.draw(design)))
    print(f"\n{supernet.describe(design)}\n")
    print(f"{parameters:,} parameters, {macs / 1e6:,.1f} M multiply-accumulates at {size} px")
    if table:
        print(f"target {costs.target:g} ms, predicted {result['predicted_ms']:.3f} ms, measured {result['measured_ms']:.3f} ms per "
              f"batch of {table.setting.batch} (10-90 %: {result['p10_ms']:.3f}-{result['p90_ms']:.3f} ms) on {table.setting.device}")
        for line in explain(result, pressure=result["measured_ms"] > costs.target):
            print(line)
    if costs.target is not None and costs.space.cost(design, costs.parts, costs.rest) > costs.target * (1 + 1e-6):
        print(f"note: no network was found within the target of {costs.target:g} {costs.unit}; this is the nearest.")
    weak = [value > 0.95 for value in supernet.entropy().tolist()]
    if rows and sum(weak) > len(weak) / 2:
        print(f"note: {sum(weak)} of {len(weak)} decisions stayed open (entropy above 0.95): the choice there is weak. More epochs "
              "or images, or a higher --arch-lr, decide more.")
    seconds, memory = time.perf_counter() - start, latency.peak_memory_mib(args.device)
    print(f"found in {seconds:.0f} s ({seconds / 3600:.2f} h)" + (f", peak memory {memory:,.0f} MiB" if memory else "") + f": {path}"
          + (", network.svg" if args.model == "hinas" else ""))
    print("next:" + (f"\n  python eval.py --checkpoint {shlex.quote(str(folder / 'distilled.pt'))}" if trained and rows else "")
          + f"\n  python train.py --arch {shlex.quote(str(path))}")


def decisions(supernet: models.SuperNet) -> list[dict]:
    """How decided alpha is in each block: entropy (1 undecided, 0 decided), and how far the two likeliest operations are apart
    in probability."""
    best = supernet.alpha.detach().softmax(1).topk(2, 1).values
    return [{"entropy": round(entropy, 4), "margin": round(margin, 4)}
            for entropy, margin in zip(supernet.entropy().tolist(), (best[:, 0] - best[:, 1]).tolist())]


def judge_alpha(blocks: list[dict], path: list[str]) -> list[str]:
    """What a user must know about an alpha that stayed undecided, or collapsed to one operation."""
    lines = []
    weak = sum(block["entropy"] > 0.95 and block["margin"] < 0.05 for block in blocks)
    if weak > len(blocks) / 2:
        lines.append(f"note: alpha stayed undecided in {weak} of {len(blocks)} blocks (entropy above 0.95, the two likeliest "
                     "operations less than 5 % apart): the choice there is weak. More epochs or images, or a higher --arch-lr, "
                     "decide more.")
    if len(set(path)) == 1 and all(block["margin"] > 0.5 for block in blocks):
        lines.append(f"note: alpha collapsed: every block prefers {path[0]} by far. See log.jsonl for when; a lower --arch-lr or "
                     "a longer warm-up helps.")
    return lines


def explain(result: dict, pressure: bool) -> list[str]:
    """What a user must know when the measured latency is not what was asked for."""
    lines = []
    error = result["measured_ms"] / result["target_ms"] - 1
    if pressure and abs(error) > MEASURE_TOLERANCE:
        lines.append(f"note: the measured latency is {100 * error:+.1f} % from the target.")
    if not 0.95 < result["slowdown"] < 1.05:
        lines.append(f"note: the reference network now takes {result['slowdown']:.2f} times as long as when the table was "
                     "made: something else runs on this device, or its clock changed.")
    return lines


def _with_target(argv: list[str], target: str, flag: str = "--target") -> str:
    """The command that was given, with another target."""
    rest, words = [], iter(argv)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(flag + "="):
            rest.append(word)
    return shlex.join(["python", "search.py", flag, target, *rest])


def _round_up(ms: float) -> str:
    """Two digits, rounded up."""
    scale = 10 ** (math.floor(math.log10(ms)) - 1)
    return f"{math.ceil(ms / scale) * scale:.6g}"


if __name__ == "__main__":
    main()
