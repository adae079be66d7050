"""Trains a found or named network to denoise and classify.

    python train.py                                        # what search.py found, in runs/search/arch.json
    python train.py --model dcnas-k3-e3 --data mnist --epochs 5
    python train.py --resume runs/train                    # go on where a run stopped

Reads an architecture record and data (see data.py); writes into --output-dir: last.pt (everything needed to go on),
best.pt (the network with the lowest validation loss), summary.csv (one row per epoch).
Source: Markhorst 2024, section 4, and TF-NAS's recipe for training what it finds.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import data as data_module
import eval as evaluation
import latency
import models
from data import number, whole

LOSSES = ("both", "cls", "den")
AMP_DTYPES = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


OPTIMIZERS = {
    # name: (function of parameters, lr, weight decay; default lr; default weight decay)
    "adamw": (lambda parameters, lr, decay: torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True), 1.5e-3, 1e-2),
    "adam": (lambda parameters, lr, decay: torch.optim.Adam(parameters, lr, weight_decay=decay, fused=True), 1e-3, 0.0),
    "sgd": (lambda parameters, lr, decay: torch.optim.SGD(parameters, lr, 0.9, weight_decay=decay, fused=True), 0.15, 1e-5),
}


# Flags that go together; each can still be given by itself.
RECIPES = {
    "short": {},  # the defaults: good results after minutes
    "study": {  # Markhorst 2024, section 3: the controlled study on mnist-pairs
        "epochs": 100, "batch_size": 64, "optimizer": "adam", "lr": 1e-3, "schedule": "plateau", "warmup_epochs": 0,
        "denoising_loss": "charbonnier", "sigma_levels": 11, "label_smoothing": 0.0, "dropout": 0.0, "drop_connect": 0.0},
    "paper": {  # Markhorst 2024, section 4, and TF-NAS: found networks on ImageNet-100
        "epochs": 250, "batch_size": 512, "optimizer": "sgd", "lr": 0.2, "warmup_epochs": 5},
    # The networks of the other searches, in minutes on a CPU; each is the default for what its search found.
    "superkernel": {"epochs": 20, "batch_size": 4, "optimizer": "adam", "lr": 1e-3, "denoising_loss": "charbonnier"},
    "hinas": {"epochs": 20, "batch_size": 24, "optimizer": "adam", "lr": 2e-3, "denoising_loss": "log-ssim"},
}


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite."""


# ---------------------------------------------------------------------------------------------------------------
# Losses


def charbonnier(image: Tensor, clean: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean over pixels of sqrt(error^2 + eps^2). The thesis's eq. 3.3 puts the mean inside and gives no eps."""
    return ((image - clean).square() + eps * eps).sqrt().mean()


def denoising_loss(image: Tensor, clean: Tensor) -> Tensor:
    """L_Den = 0.8 * Charbonnier + 0.2 * (1 - SSIM) of images (B, 3, H, W) (Markhorst 2024, eq. 2)."""
    return 0.8 * charbonnier(image, clean) + 0.2 * (1 - evaluation.ssim(image, clean).mean())


def log_ssim(image: Tensor, clean: Tensor, weight: float = 0.6, floor: float = 0.01) -> Tensor:
    """MSE + weight * log10(1 / SSIM) (Zhang 2020, section 3.4), finite for any images of 6 pixels or more.

    SSIM can be 0 or less; below `floor` the logarithm goes on as its tangent, so that there is a way back. The SSIM is that of
    images mirrored at their borders: whole windows alone hardly see the outermost pixels, and as the SSIM is most of this
    loss, those stayed noisy (six to ten times the error of the rest, 0.3 to 0.4 dB of four images of BSDS500 at sigma 50).
    """
    ssim = evaluation.ssim(*(F.pad(each, (evaluation.WINDOW // 2,) * 4, "reflect") for each in (image, clean)))
    log = ssim.clamp(min=floor).log10() + (ssim - floor).clamp(max=0) / (floor * math.log(10))
    return F.mse_loss(image, clean) - weight * log.mean()


DENOISING_LOSSES = {
    "mixed": denoising_loss, "charbonnier": charbonnier,  # sections 4 and 3 of Markhorst 2024
    "log-ssim": log_ssim, "mse": F.mse_loss,  # HiNAS, and its table 4 without the SSIM
}


def task_loss(output: models.Output, clean: Tensor, labels: Tensor, loss: str, label_smoothing: float = 0.1,
              denoising: str = "mixed") -> tuple[Tensor, dict[str, Tensor]]:
    """The loss `loss` of a network's output, and its parts for the log.

    "cls": cross-entropy with label smoothing; "den": L_Den; "both": 0.1 * L_CE + 0.9 * L_Den (Markhorst 2024, eq. 1 and 3),
    with L_Den one of DENOISING_LOSSES. Computed in float32 whatever the network computes in.
    """
    parts = {}
    if loss != "den":
        parts["ce"] = F.cross_entropy(output.logits.float(), labels, label_smoothing=label_smoothing)
    if loss != "cls":
        parts["den"] = DENOISING_LOSSES[denoising](output.image.float(), clean)
    total = 0.1 * parts["ce"] + 0.9 * parts["den"] if loss == "both" else parts["ce" if loss == "cls" else "den"]
    return total, {name: part.detach() for name, part in parts.items()}


def choose_loss(network, labelled: bool, loss: str | None = None) -> str:
    """The loss that fits a network and data, or the one asked for; ValueError in one sentence if it does not fit."""
    if network.classifies and not labelled and (not network.denoises or loss != "den"):
        raise ValueError("These images have no labels, and the network classifies: give a folder with one folder per class "
                         "in train/ and val/, or a denoiser (--model dnas-k3-e3, or search with --model dnas)"
                         + (", or --loss den." if network.denoises else "."))
    possible = [name for name, fits in (("both", network.classifies and network.denoises), ("cls", network.classifies),
                                        ("den", network.denoises)) if fits]
    if loss is not None and loss not in possible:
        raise ValueError(f"The loss {loss!r} does not fit this network; possible: {', '.join(possible)}.")
    return loss or possible[0]


# ---------------------------------------------------------------------------------------------------------------
# The loop


def autocast(device: torch.device, amp: str):
    """The context in which the network runs: mixed precision, or nothing."""
    return torch.autocast(device.type, AMP_DTYPES[amp]) if amp != "off" else nullcontext()


class Stopped(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""


class Guard:
    """What can befall a run between two steps: a signal to stop, a checkpoint that is due, a loss that is not finite.

    Within it, SIGTERM and SIGINT let the step in progress end; `end_of_step` then saves and raises Stopped. A second SIGINT
    stops at once, but not one that follows within two seconds: torchrun hands on what its processes got already. All processes
    of a run come to the same verdict at the same step.
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
            for name in (signal.SIGTERM, signal.SIGINT):
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
        """Before a step that may be skipped: the statistics of batch norms, which a bad batch spoils in the forward pass."""
        if self.nonfinite == "skip":
            self.buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]

    def reduce(self, parameters, loss: Tensor, buffers=()) -> bool:
        """After backward: average gradients and buffers over the processes; whether the loss is finite on all of them.

        Only gradients that there are take part; the processes of a search draw the same path, so theirs are the same ones.
        Buffers are the statistics of batch norms, each process's of its own images.
        """
        self.loss = loss.item()  # waits for the device
        rank, world = data_module.rank_and_world()
        due = rank == 0 and time.monotonic() - self.saved > self.save_seconds  # by one clock, so that all save together
        flags = [float(not math.isfinite(self.loss)), float(self.asked), float(due)]
        if world > 1:
            tensors = [parameter.grad for parameter in parameters if parameter.grad is not None]
            tensors += [buffer for buffer in buffers if buffer.is_floating_point()]
            flat = torch.cat([*(tensor.flatten() for tensor in tensors), loss.new_tensor(flags)])
            torch.distributed.all_reduce(flat)
            flags, start = flat[-len(flags):].tolist(), 0
            for tensor in tensors:
                part = flat[start:start + tensor.numel()].view(tensor.shape)
                tensor.copy_(part / world)
                start += tensor.numel()
        bad, self.stop, self.due = (flag > 0 for flag in flags)
        return not bad

    def judge(self, finite: bool, where: str, lr: float) -> bool:
        """Whether a step may be taken. TrainingError for a loss or gradient that is not finite, unless steps are skipped."""
        if finite:
            self.skipped = 0
            return True
        self.skipped += 1
        self.what = what = "gradient is not finite" if math.isfinite(self.loss) else f"loss is {self.loss}"
        if self.nonfinite == "stop" or self.skipped > self.SKIPS:
            raise TrainingError(
                f"The {what} at {where} (learning rate {lr:.2g}); the last checkpoint is good: try a smaller --lr, --amp off"
                + (", or --nonfinite skip." if self.nonfinite == "stop" else f". {self.SKIPS} steps in a row were skipped before."))
        for buffer, value in self.buffers:
            buffer.copy_(value)
        tqdm.write(f"skipped {where}: the {what} (learning rate {lr:.2g})")
        return False

    def end_of_step(self, save) -> None:
        """Save when it is time or when the run was asked to stop; raise Stopped in the latter case."""
        if self.stop or self.due:
            self.save(save)
        if self.stop:
            if data_module.rank_and_world()[1] > 1:
                torch.distributed.barrier()  # torchrun ends all processes when the first one leaves: not before it is saved
            raise Stopped

    def end_of_epoch(self, number: int, taken: bool) -> None:
        """TrainingError where no step of the epoch was taken."""
        if not taken:
            raise TrainingError(f"Every step of epoch {number} was skipped, since the {self.what} each time; the last checkpoint "
                                "is good: try a smaller --lr, or --amp off.")

    def save(self, save) -> None:
        """Call `save()`, on every process."""
        save()
        self.saved = time.monotonic()


def sum_over_processes(values: list[float]) -> list[float]:
    """Each value's sum over all processes."""
    if data_module.rank_and_world()[1] == 1:
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def bar(batches, text: str, total: int, first: int, unit: str) -> tqdm:
    """A progress bar on a terminal, of the first process."""
    return tqdm(batches, text, total, initial=first, leave=False, unit=unit,
                disable=True if data_module.rank_and_world()[0] else None)


class NoisyBatches:
    """Batches (noisy, clean, labels) of one epoch on the device, with `noise`, or with their own where the images are pairs.

    Noise comes from a generator on the training device, seeded by (seed, epoch, batch, process): a run that was stopped and
    resumed sees the same noise as one that was not.
    """

    def __init__(self, loader, device: torch.device, noise: data_module.Noise, seed: int):
        self.loader, self.device, self.noise, self.seed = loader, device, noise, seed
        self.generator = torch.Generator(device=device)

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int, first: int = 0):
        """The batches of one epoch from the `first` on, in that epoch's order and with its noise."""
        data_module.set_epoch(self.loader, number, first)
        for index, (images, labels) in enumerate(self.loader, first):
            self.generator.manual_seed(data_module.mix(self.seed, number, index, data_module.rank_and_world()[0]))
            clean, noisy = data_module.split_pair(images)
            clean = data_module.to_float(clean, self.device)  # (B, C, H, W)
            if noisy is not None:
                noisy = data_module.to_float(noisy, self.device)
            else:
                noisy = data_module.shrink(clean, self.noise.scale)
                if self.noise:
                    noisy = self.noise.add(noisy, self.noise.sample(len(clean), self.generator, self.device), self.generator)
            yield noisy, clean, labels.to(self.device, non_blocking=True)


@torch.inference_mode()
def validate(network: nn.Module, loader, *, loss: str, device: torch.device, noise: data_module.Noise, amp: str = "off",
             denoising: str = "mixed") -> dict:
    """Mean loss, accuracy and PSNR on a split, with noise that is the same in every epoch and run.

    The noise levels go evenly from image to image (Noise.validation_sigma); pairs have their own noise. Means are over images
    (accuracy: over labels), so that a smaller last batch weighs what it holds. PSNR is None for networks that do not denoise,
    accuracy for those that do not classify.
    """
    was_training = network.training
    network.eval()
    sums, count, label_count = dict.fromkeys(("loss", "accuracy", "psnr_db"), 0.0), 0, 0
    rank, world = data_module.rank_and_world()

    def add(name, values):
        sums[name] += float(values)

    for images, labels in loader:
        labels, boxes = data_module.split_labels(labels, device)
        places = [rank + (count + i) * world for i in range(len(images))]  # of these images in the split
        clean, noisy = evaluation.clean_and_noisy(images, places, device, noise=noise.kind, scale=noise.scale)
        sigma = torch.tensor([noise.validation_sigma(place) for place in places], device=device)
        with autocast(device, amp):
            output = models.run(network, noisy(sigma), boxes)
        total, _ = task_loss(output, clean, labels, loss, label_smoothing=0.0, denoising=denoising)
        add("loss", total * len(clean))
        if loss != "den":
            add("accuracy", (output.logits.argmax(1) == labels).sum())
        if loss != "cls":
            add("psnr_db", evaluation.psnr(output.image.float().clamp(0, 1), clean).clamp(max=100).sum())
        count, label_count = count + len(clean), label_count + len(labels)
    network.train(was_training)
    *totals, count, label_count = sum_over_processes([*sums.values(), count, label_count])
    counts = {"loss": count, "accuracy": 0 if loss == "den" else label_count, "psnr_db": 0 if loss == "cls" else count}
    return {name: total / counts[name] if counts[name] else None for name, total in zip(sums, totals)}


SCHEDULES = ("cosine", "plateau")


def make_schedule(optimizer, schedule: str, epochs: int, warmup_epochs: float, steps_per_epoch: int):
    """"cosine": linear warm-up, then a cosine to zero, stepped once per batch. "plateau": a fifth of the learning rate
    after five epochs without a better validation loss, stepped once per epoch (the paper names no numbers)."""
    if schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=5)
    warmup = max(1, round(warmup_epochs * steps_per_epoch))
    rest = max(1, epochs * steps_per_epoch - warmup)
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup),
                  torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rest)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, [warmup])


def train(network: nn.Module, train_loader, val_loader, *, loss: str, epochs: int, output_dir: str | Path, about: dict,
          device: torch.device, optimizer: str = "adamw", lr: float | None = None, weight_decay: float | None = None,
          noise: data_module.Noise = data_module.Noise(), warmup_epochs: float = 5, label_smoothing: float = 0.1,
          grad_clip: float = 5.0, ema: float = 0.0, amp: str = "off", seed: int = 0, schedule: str = "cosine",
          denoising: str = "mixed", nonfinite: str = "stop", save_minutes: float = 10.0, state: dict | None = None) -> dict:
    """Train a network, writing last.pt, best.pt and summary.csv after each epoch; returns the best epoch's row.

    `about` (record, classes, size, data, ...) goes into the checkpoints as it is. `state` is the content of a last.pt to
    go on from, which is also written every `save_minutes` and when the run is asked to stop (see Guard). Gradients are clipped
    by norm; see `make_schedule`. The papers train with SGD for 250 epochs; its steps for the decoder are small, since the
    denoising loss is, so that AdamW is the default. Raises TrainingError, naming the step, when the loss is not finite; what
    was written before stays. Raises Stopped after SIGTERM or SIGINT. With several processes the loaders hold each one's share
    (data.Order), gradients are averaged, and so are the statistics of batch norms, each process's of its own images; the first
    process writes.
    """
    make_optimizer, default_lr, default_decay = OPTIMIZERS[optimizer]
    output_dir = Path(output_dir)
    network = network.to(device, memory_format=torch.channels_last)
    batches = NoisyBatches(train_loader, device, noise, seed)
    optimizer = make_optimizer(network.parameters(), default_lr if lr is None else lr,
                               default_decay if weight_decay is None else weight_decay)
    by_epoch = schedule == "plateau"
    schedule = make_schedule(optimizer, schedule, epochs, warmup_epochs, len(batches))
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "float16")
    average = None
    if ema:
        average = torch.optim.swa_utils.AveragedModel(
            network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema), use_buffers=True)
    rows, best = [], None
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
        if average is not None:
            average.module.load_state_dict(state["ema"])
            average.n_averaged.fill_(state["averaged"])
        rows, best = state["rows"], state["best"]
    rank, _ = data_module.rank_and_world()
    first, sums, count = (state["step"], state["sums"], state["count"]) if state is not None else (0, {}, 0)
    if rank > 0:
        sums, count = dict.fromkeys(sums, 0.0), 0

    def save(step: int) -> None:
        """last.pt: all that is needed to go on from `step` steps into the epoch after rows[-1]."""
        nonlocal sums, count
        *totals, count = sum_over_processes([*(float(value) for value in sums.values()), count])
        sums = dict(zip(sums, totals))
        if rank > 0:  # what has been added up is the first one's from here on
            sums, count = dict.fromkeys(sums, 0.0), 0
            return
        models.save_checkpoint(output_dir / "last.pt", {
            **about, "epoch": len(rows), "network": network.state_dict(),
            "ema": average.module.state_dict() if average is not None else None, "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(), "scaler": scaler.state_dict(),
            "averaged": int(average.n_averaged) if average is not None else 0, "rows": rows, "best": best, "step": step,
            "sums": sums, "count": count})

    with Guard(nonfinite, save_minutes) as guard:
        for epoch in range(len(rows), epochs):
            start = time.perf_counter()
            network.train()
            progress = bar(batches.epoch(epoch, first), f"epoch {epoch + 1}/{epochs}", len(batches), first, "batch")
            rate = optimizer.param_groups[0]["lr"]  # of an epoch that was stopped between its last step and its validation
            for step, (noisy, clean, labels) in enumerate(progress, first):
                rate = optimizer.param_groups[0]["lr"]
                torch.manual_seed(data_module.mix(seed, epoch, step, rank))  # of dropout and drop-connect
                guard.remember(network)
                labels, boxes = data_module.split_labels(labels, device)
                with autocast(device, amp):
                    output = models.run(network, noisy, boxes)
                total, parts = task_loss(output, clean, labels, loss, label_smoothing, denoising)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(total).backward()
                finite = guard.reduce(network.parameters(), total, network.buffers())
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
                finite = finite and (scaler.is_enabled() or math.isfinite(norm))  # the scaler skips steps by itself
                if guard.judge(finite, f"epoch {epoch + 1}, batch {step + 1}", rate):
                    scaler.step(optimizer)
                    if average is not None:
                        average.update_parameters(network)
                    count += len(clean)
                    for name, part in (("loss", total.detach()), *parts.items()):
                        sums[name] = sums.get(name, 0.0) + part * len(clean)
                    progress.set_postfix(loss=f"{float(sums['loss']) / count:.4f}", lr=f"{rate:.2g}")
                scaler.update()
                if not by_epoch:
                    schedule.step()
                guard.end_of_step(lambda: save(step + 1))
            trained = average.module if average is not None else network
            held_out = validate(trained, val_loader, loss=loss, device=device, noise=noise, amp=amp,
                                denoising=denoising)
            if by_epoch:
                schedule.step(_comparable(held_out["loss"]))
            *totals, count = sum_over_processes([*(float(value) for value in sums.values()), count])
            guard.end_of_epoch(epoch + 1, count > 0)
            rows.append({"epoch": epoch + 1, "lr": rate,
                         **{f"train_{name}": value / count for name, value in zip(sums, totals)},
                         **{f"val_{name}": value for name, value in held_out.items()},
                         "seconds": time.perf_counter() - start})
            better = best is None or _comparable(rows[-1]["val_loss"]) < _comparable(best["val_loss"])
            best, first, sums, count = rows[-1] if better else best, 0, {}, 0
            if better and rank == 0:
                models.save_checkpoint(output_dir / "best.pt", {
                    **about, "epoch": epoch + 1, "network": network.state_dict(),
                    "ema": average.module.state_dict() if average is not None else None})
            guard.save(lambda: save(0))
            if rank == 0:
                write_summary(output_dir / "summary.csv", rows)
            tqdm.write(format_row(rows[-1], epochs))
    return best


def _comparable(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def write_summary(path: Path, rows: list[dict]) -> None:
    """One CSV row per epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    models.write_file(path, lambda temporary: temporary.write_text(text.getvalue()))


def format_row(row: dict, epochs: int) -> str:
    """An epoch in one line."""
    line = f"epoch {row['epoch']:>3}/{epochs}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
    if row["val_accuracy"] is not None:
        line += f"  accuracy {100 * row['val_accuracy']:.1f} %"
    if row["val_psnr_db"] is not None:
        line += f"  PSNR {row['val_psnr_db']:.2f} dB"
    return line + f"  {row['seconds']:.0f} s"


# ---------------------------------------------------------------------------------------------------------------
# Command line


def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Flags that search.py and train.py share."""
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", default=output_dir, metavar="DIR", help="folder of the results (default: %(default)s)")
    group.add_argument("--resume", metavar="PATH",
                       help="folder or checkpoint of a stopped run to go on with; its settings hold unless given again")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N",
                       help="seed of weights, order, splits and noise (default: %(default)s)")
    group.add_argument("--device", default=latency.default_device(), help="cuda or cpu (default: cuda if there is one)")
    group.add_argument("--threads", type=whole(1, 4096), metavar="N", help="threads of torch on a CPU (default: torch's own)")
    group.add_argument("--nonfinite", choices=("stop", "skip"), default="stop",
                       help=f"a loss or gradient that is not finite: stop, or skip the step, {Guard.SKIPS} times in a row at most "
                            "(default: %(default)s)")
    group.add_argument("--save-minutes", type=number(0, 1e6), default=10.0, metavar="MIN",
                       help="write a checkpoint within an epoch this often, besides the one at its end (default: %(default)s)")
    group.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision (default: bfloat16 on CUDA, off on a CPU)")


# What may differ from a stopped run when it goes on.
FREE_FLAGS = {"resume", "output_dir", "device", "threads", "workers", "data_root", "table", "nonfinite", "save_minutes"}


def run_flags(args: argparse.Namespace) -> dict:
    """The flags that make a run what it is, for its checkpoints: where it lies and whether it was resumed are left out."""
    return {name: value for name, value in vars(args).items() if name not in ("resume", "output_dir")}


def parse_or_resume(parser: argparse.ArgumentParser, argv: list[str] | None, checkpoint: str, *needed: str) -> tuple:
    """Parse the flags; with --resume the stopped run's are the defaults. Returns (args, the checkpoint or None).

    ValueError in one sentence when there is nothing to go on from (`needed` is what `checkpoint` must hold besides), or when a flag
    is given that would make it another run.
    """
    args = parser.parse_args(argv)
    if args.resume is None:
        return args, None
    path = Path(args.resume)
    path = path / checkpoint if path.is_dir() else path
    state = models.read_checkpoint(path)
    if not {"flags", "step", *needed} <= set(state):
        raise ValueError(f"{path} is not a {checkpoint} that a run can go on from.")
    parser.set_defaults(**{**state["flags"], "output_dir": str(path.parent)})
    args = parser.parse_args(argv)
    changed = [f"--{name.replace('_', '-')}" for name, value in state["flags"].items()
               if name not in FREE_FLAGS and getattr(args, name, None) != value]
    if changed:
        raise ValueError(f"A resumed run keeps its settings, but {', '.join(changed)} differ: leave them out, or start a new "
                         "run in another --output-dir.")
    return args, state


RESUME_ME = 75  # exit code of a run that was asked to stop and can go on: EX_TEMPFAIL, "try again"


def say_stopped(script: str, output_dir: str, checkpoint: str, started: float) -> None:
    """After a signal: how to go on, with exit code RESUME_ME, or 130 where this run has written no checkpoint."""
    if data_module.rank_and_world()[0] > 0:
        sys.exit(RESUME_ME)
    path = Path(output_dir) / checkpoint
    going = path.exists() and path.stat().st_mtime >= started
    print("\nStopped" + (f". Go on with: python {script} --resume {shlex.quote(str(output_dir))}" if going else
                         " before there was anything to go on from."), file=sys.stderr)
    sys.exit(RESUME_ME if going else 130)


def check_images(data: data_module.Data, loss: str, channels: int = 3, scale: int = 1) -> None:
    """ValueError in one sentence where there is too little to train on, or a network of `channels` that makes images `scale`
    times larger cannot take it."""
    if scale > 1 and data_module.is_paired(data.train):
        raise ValueError(f"{data.name} holds pairs of one size, noisy and clean, and the network makes images {scale} times larger; "
                         "give a folder of clean images.")
    if data.size % scale:
        raise ValueError(f"For super-resolution x{scale} --size must be a multiple of {scale}, not {data.size}: it is that of the "
                         "large image.")
    if data.channels != channels:
        mend = "give --grey" if channels == 1 else "leave out --grey"
        raise ValueError(f"The network takes images of {channels} channel{'s' * (channels > 1)}, and those of {data.name} "
                         f"are read with {data.channels}: {mend}, or take another network.")
    if len(data.train) < 2:
        raise ValueError(f"{data.name} has {len(data.train)} training image; give at least 2.")
    if loss != "cls" and data.size < evaluation.WINDOW:
        raise ValueError(f"--size {data.size} is too small for the denoising loss: SSIM needs {evaluation.WINDOW} pixels.")


def vary(record: dict, model: str | None = None, decoder: str | None = None, widen: float | None = None) -> dict:
    """The record of the same encoder as another model, with another decoder or with wider channels; None: as it is.

    ValueError where the record is not of a searched network. A latency in the record is dropped: it is of another network.
    """
    if model is None and decoder is None and widen is None:
        return record
    if record["method"] != "tfnas":
        raise ValueError(f"--train-as, --decoder and --widen are for C-NAS, D-NAS and DC-NAS, not for {record['model']}.")
    arch = models.Arch.from_dict(record)
    if model not in (None, "dnas") and not arch.classifies:
        raise ValueError("The record is of a dnas, which has no classifier; it cannot be trained as another model.")
    arch = arch if model is None else arch.with_model(model)
    arch = arch if decoder is None else replace(arch, decoder=decoder)
    arch = arch if widen is None else arch.widened(widen)
    kept = {name: value for name, value in record.items() if name != "latency"}
    return {**kept, **arch.to_dict()}


def make_folder(path: str | Path) -> None:
    """Make the folder of the results before the work starts; ValueError in one sentence where that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The folder {path} cannot be made ({error.strerror}); name another --output-dir.") from None


_locks: dict[Path, io.TextIOBase] = {}  # of the folders that this process holds


def lock_folder(path: str | Path) -> None:
    """Make the folder and hold it until this process ends, however it ends.

    ValueError in one sentence while another process holds it. Where there is no fcntl (Windows) nothing is locked.
    """
    make_folder(path)
    folder = Path(path).resolve()
    if fcntl is None or folder in _locks or data_module.rank_and_world()[0] > 0:
        return
    try:
        file = open(folder / ".lock", "a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locks[folder] = file
    except BlockingIOError:
        raise ValueError(f"Another run is writing into {path}: wait for it, or name another --output-dir.") from None
    except OSError as error:
        raise ValueError(f"The folder {path} cannot be written to ({error.strerror}); name another --output-dir.") from None


def prepare(args: argparse.Namespace) -> torch.device:
    """Threads, processes, seed and device of a run."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(latency.check_device(data_module.join_processes(args.device)))
    if args.amp is None:
        args.amp = "bfloat16" if device.type == "cuda" else "off"
    torch.manual_seed(args.seed)
    return device


def share(batch_size: int) -> int:
    """A process's part of the batch of all of them; ValueError in one sentence where it cannot be shared."""
    world = data_module.rank_and_world()[1]
    if batch_size % world or batch_size // world < 2:
        raise ValueError(f"--batch-size {batch_size} is that of all {world} processes together; it must be a multiple of {world}, "
                         "of 2 images each or more.")
    if world > 1:
        print(f"{world} processes of {batch_size // world} images, {batch_size} a step; the learning rate is for {batch_size}")
    return batch_size // world


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False, usage="python train.py [options]  (--help lists them)",
        description="Train a found or named network to denoise and classify.",
        epilog="examples:\n  python train.py\n  python train.py --arch runs/search/arch.json --data mnist --epochs 5\n"
               "  python train.py --model dcnas-k3-e3 --data photos --epochs 250 --batch-size 512 --size 224",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("network")
    what.add_argument("--arch", default="runs/search/arch.json", metavar="FILE",
                      help="record of the network, from search.py (default: %(default)s)")
    what.add_argument("--model", type=models.model_name, metavar="NAME",
                      help="a named model instead of --arch; python models.py lists them")
    what.add_argument("--train-as", choices=models.MODELS,
                      help="train the found encoder as another model: the classifier or denoiser of a dcnas alone, or dcnas-seq")
    what.add_argument("--decoder", choices=models.DECODERS,
                      help="another decoder: two MBConvs a level, one, or two without those of level 4 (default: that of the record)")
    what.add_argument("--widen", type=number(0.1, 16), metavar="X", help="multiply all channels (default: 1)")
    what.add_argument("--loss", choices=LOSSES,
                      help="both: 0.1 cross-entropy + 0.9 denoising; cls, den: one of them (default: what the network can)")
    what.add_argument("--dropout", type=number(0, 0.9), default=0.2, metavar="P",
                      help="dropout before the last layer of a searched network (default: %(default)s)")
    what.add_argument("--drop-connect", type=number(0, 0.9), default=0.2, metavar="P",
                      help="chance to skip a block of a searched network in training, growing with depth to this "
                           "(default: %(default)s)")
    data_module.add_data_arguments(parser)
    parser.set_defaults(data=None, data_root=None)  # those of the search, or digits
    data_module.add_noise_arguments(parser)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--recipe", choices=RECIPES,
                        help="defaults for the flags below: short; study: the papers' controlled study; paper: the papers' on "
                             "ImageNet-100; superkernel, hinas: for what these searches find (default: short, or that of the "
                             "search)")
    recipe.add_argument("--denoising-loss", choices=DENOISING_LOSSES, default="mixed",
                        help="mixed: 0.8 Charbonnier + 0.2 (1 - SSIM); charbonnier alone; log-ssim: MSE + 0.6 log10(1 / SSIM); "
                             "mse (default: %(default)s)")
    recipe.add_argument("--epochs", type=whole(1, 100000), default=25, metavar="N",
                        help="passes over the images; the papers train 250 (default: %(default)s)")
    recipe.add_argument("--batch-size", type=whole(2, 65536), default=16, metavar="N",
                        help="images per step (default: %(default)s; the papers: 512)")
    recipe.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw",
                        help="adamw learns sooner; sgd (momentum 0.9) is the papers', for long trainings (default: %(default)s)")
    recipe.add_argument("--lr", type=number(1e-8, 100), metavar="LR",
                        help="peak learning rate (default: 0.0015 for adamw, 0.001 for adam, 0.15 for sgd; the papers: 0.2 at "
                             "batch size 512)")
    recipe.add_argument("--schedule", choices=SCHEDULES, default="cosine",
                        help="learning rate: warm-up and cosine, or less on each plateau (default: %(default)s)")
    recipe.add_argument("--warmup-epochs", type=number(0, 1000), metavar="N",
                        help="epochs of linear warm-up before a cosine (default: 5, but at most a tenth of all)")
    recipe.add_argument("--weight-decay", type=number(0, 1), metavar="WD",
                        help="(default: 0.01 for adamw, 0 for adam, 1e-5, the papers', for sgd)")
    recipe.add_argument("--label-smoothing", type=number(0, 0.99), default=0.1, metavar="E", help="(default: %(default)s)")
    recipe.add_argument("--grad-clip", type=number(1e-6, 1e6), default=5.0, metavar="NORM",
                        help="largest gradient norm (default: %(default)s)")
    recipe.add_argument("--ema", type=number(0, 0.999999), default=0.0, metavar="DECAY",
                        help="also average the weights with this decay, and keep the average; 0: no (default: %(default)s)")
    add_run_arguments(parser, "runs/train")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    try:
        first, words, record = parser.parse_args(argv), sys.argv[1:] if argv is None else argv, {}
        if first.model is None and first.resume is None:  # what the search saw comes first, so that flags can change it
            record = models.load_record(first.arch)
            images = data_module.without_what_changed(record.get("images"), words, first.data in (None, record.get("data")))
            words = [*data_module.as_command_line(images), *words]
        recipe = first.recipe or (record["method"] if record.get("method") in RECIPES else "short")
        parser.set_defaults(**RECIPES[recipe], recipe=recipe)
        args, state = parse_or_resume(parser, words, "last.pt", "optimizer")
        device = prepare(args)
        record = record if state is None else state["record"]
        args.data, args.size = args.data or record.get("data", "digits"), args.size or record.get("size")
        args.data_root = args.data_root or record.get("data_root", "data")
        flags = run_flags(args)
        data = data_module.data_from(args)
        classes = data.classes
        if not record:  # without labels choose_loss says what to do
            record = models.named_record(args.model, len(classes or []) or 1,
                                         models.provenance(latency.device_name(device), args.seed))
        if state is None:
            record = vary(record, args.train_as, args.decoder, args.widen)
        network = models.build_network(record, args.dropout, args.drop_connect)
        if network.classifies and classes and record["num_classes"] != len(classes):
            raise ValueError(f"{args.arch} is a network for {record['num_classes']} classes but {args.data} has "
                             f"{len(classes)}; search again with --data {args.data}.")
        loss, scale = choose_loss(network, classes is not None, args.loss), models.scale_of(network)
        noise = data_module.noise_from(args, scale)
        check_images(data, loss, models.channels_of(network), scale)
        boxes = data_module.split_labels(torch.as_tensor(data.train[0][1])[None], "cpu")[1]
        models.check_fits(network, record["model"], data.size // scale, boxes)
        batch_size = share(args.batch_size)
        lock_folder(args.output_dir)
    except ValueError as error:
        parser.error(str(error))
    print(f"{record['model']}: {models.count_parameters(network):,} parameters, "
          f"{models.count_macs(network, data.size // scale) / 1e6:.1f} M MACs at {data.size // scale} px; "
          f"{len(data.train):,} training and {len(data.val):,} validation images of {data.name}"
          + (", pairs with real noise" if data_module.is_paired(data.train) else "") + f"; loss {loss}")
    how = dict(seed=args.seed, workers=args.workers, device=device)
    loaders = (data_module.make_loader(data.train, batch_size, shuffle=True, drop_last=True, **how),
               data_module.make_loader(data.val, batch_size, **how))
    warmup = min(5, args.epochs / 10) if args.warmup_epochs is None else args.warmup_epochs
    about = {"record": record, "classes": classes, "size": data.size, "data": args.data, "seed": args.seed, "loss": loss,
             "made": models.provenance(latency.device_name(device), args.seed), "flags": flags}
    start, started = time.perf_counter(), time.time()
    try:
        best = train(network, *loaders, loss=loss, epochs=args.epochs, output_dir=args.output_dir, about=about, device=device,
                     optimizer=args.optimizer, lr=args.lr, weight_decay=args.weight_decay, noise=noise,
                     warmup_epochs=warmup, label_smoothing=args.label_smoothing, grad_clip=args.grad_clip, ema=args.ema, amp=args.amp,
                     seed=args.seed, schedule=args.schedule, denoising=args.denoising_loss,
                     nonfinite=args.nonfinite, save_minutes=args.save_minutes, state=state)
    except (KeyboardInterrupt, Stopped):
        say_stopped("train.py", args.output_dir, "last.pt", started)
    except (TrainingError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except ValueError as error:  # a damaged image
        parser.error(str(error))
    print(f"best epoch {best['epoch']} (validation loss {best['val_loss']:.4f}) in {args.output_dir}/best.pt, after "
          f"{time.perf_counter() - start:.0f} s; next:\n"
          f"  python eval.py --checkpoint {os.path.join(args.output_dir, 'best.pt')}")


if __name__ == "__main__":
    main()
