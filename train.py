"""Trains a found or named network to denoise and classify.

    python train.py                                        # what search.py found, in runs/search/arch.json
    python train.py --model dcnas-k3-e3 --data mnist --epochs 5
    python train.py --resume runs/train                    # go on where a run stopped

Reads a record of a network and data (see data.py); writes into --output-dir: last.pt (everything needed to go
on), best.pt (the network with the lowest validation loss), summary.csv (a row per epoch). Source: Markhorst
2024, sections 3 and 4; TF-NAS, superkernels and HiNAS for what they find; see docs/differences.md.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data as data_module
import files
import latency
import metrics
import models
import registry
import run
from data import Parser, number, whole
from muon import Muon

LOSSES = ("both", "cls", "den")
VALIDATION_SEED = 1  # of the noise of validation images; eval.py's default is 0
VALIDATION_WORK = 0.3  # what a batch costs without backward pass, in batches of training
OPTIMIZERS = {  # name: (function of parameters, lr, weight decay; default lr; default weight decay)
    "muon": (Muon, 4e-3, 1e-2),
    "adamw": (lambda p, lr, decay: torch.optim.AdamW(p, lr, weight_decay=decay, fused=True), 1.5e-3, 1e-2),
    "adam": (lambda p, lr, decay: torch.optim.Adam(p, lr, weight_decay=decay, fused=True), 1e-3, 0.0),
    "sgd": (lambda p, lr, decay: torch.optim.SGD(p, lr, 0.9, weight_decay=decay, fused=True), 0.15, 1e-5),
}
RECIPES = {  # flags that go together, besides the TRAIN_DEFAULTS of each search method
    "short": {},
    "study": {  # Markhorst 2024, section 3: the controlled study on mnist-pairs
        "epochs": 100, "batch_size": 64, "optimizer": "adam", "lr": 1e-3, "schedule": "plateau",
        "warmup_epochs": 0, "denoising_loss": "charbonnier", "sigma": 1.0, "sigma_levels": 11,
        "label_smoothing": 0.0, "dropout": 0.0, "drop_connect": 0.0},
    "paper": {  # Markhorst 2024, section 4, and TF-NAS: found networks on ImageNet-100
        "epochs": 250, "batch_size": 512, "optimizer": "sgd", "lr": 0.2, "warmup_epochs": 5, "dropout": 0.2,
        "drop_connect": 0.2},
}


# --- Losses ------------------------------------------------------------------------------------------------

def charbonnier(image: Tensor, clean: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean over pixels of sqrt(error^2 + eps^2). The thesis's eq. 3.3 has the mean inside and no eps."""
    return ((image - clean).square() + eps * eps).sqrt().mean()


def denoising_loss(image: Tensor, clean: Tensor) -> Tensor:
    """L_Den = 0.8 * Charbonnier + 0.2 * (1 - SSIM) of images (B, 3, H, W) (Markhorst 2024, eq. 2)."""
    return 0.8 * charbonnier(image, clean) + 0.2 * (1 - metrics.ssim(image, clean).mean())


def log_ssim(image: Tensor, clean: Tensor, weight: float = 0.6, floor: float = 0.01) -> Tensor:
    """MSE + weight * log10(1 / SSIM) (Zhang 2020, section 3.4) of images of 6 pixels or more, mirrored at
    their borders. SSIM can be 0 or less: below `floor` the logarithm goes on as its tangent."""
    ssim = metrics.ssim(*(F.pad(each, (metrics.WINDOW // 2,) * 4, "reflect") for each in (image, clean)))
    log = ssim.clamp(min=floor).log10() + (ssim - floor).clamp(max=0) / (floor * math.log(10))
    return F.mse_loss(image, clean) - weight * log.mean()


DENOISING_LOSSES = {
    "mixed": denoising_loss, "charbonnier": charbonnier,  # sections 4 and 3 of Markhorst 2024
    "log-ssim": log_ssim, "mse": F.mse_loss,  # HiNAS, and its table 4 without the SSIM
}


def task_loss(output: models.Output, clean: Tensor, labels: Tensor, loss: str, label_smoothing: float = 0.1,
              denoising: str = "mixed") -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a network's output in float32 (Markhorst 2024, eq. 1 and 3), and its parts for the log."""
    parts = {}
    if loss != "den":
        parts["ce"] = F.cross_entropy(output.logits.float(), labels, label_smoothing=label_smoothing)
    if loss != "cls":
        parts["den"] = DENOISING_LOSSES[denoising](output.image.float(), clean)
    total = 0.1 * parts["ce"] + 0.9 * parts["den"] if loss == "both" else sum(parts.values())
    return total, {name: part.detach() for name, part in parts.items()}


def taught_loss(output: models.Output, answer: models.Output, clean: Tensor, labels: Tensor, loss: str,
                denoising: str = "mixed") -> Tensor:
    """The loss of a network's output against what another one answers; what that lacks, against the truth."""
    image = clean if answer.image is None else answer.image.float()
    labels = labels if answer.logits is None else answer.logits.float().softmax(1)
    return task_loss(output, image, labels, loss, 0.0, denoising)[0]


class Teacher:
    """A trained network whose images and logits another one learns, beside the true ones.

    Distillation (Hinton et al. 2015). `weight`: share of the loss against the teacher's. What it does not
    make is learned from the truth. ValueError in one sentence where it does not fit the network.
    """

    def __init__(self, path: str, weight: float, network: nn.Module, classes: list[str] | None,
                 device: torch.device):
        self.network, content = files.load_checkpoint(path, device)
        self.weight, kind = weight, lambda network: (models.channels_of(network), models.scale_of(network))
        if kind(self.network) != kind(network):
            raise ValueError(f"The teacher {path} takes images of other channels or of another scale.")
        if network.classifies and self.network.classifies and content["classes"] != classes:
            raise ValueError(f"The teacher {path} knows other classes: {str(content['classes'])[:100]}.")

    def loss(self, output: models.Output, noisy: Tensor, clean: Tensor, labels: Tensor, boxes, recipe: Recipe,
             device: torch.device) -> Tensor:
        """The loss of an output against what the teacher makes of the same noisy images."""
        with torch.no_grad(), run.autocast(device, recipe.amp):
            image, logits = models.apply_network(self.network, noisy, boxes)
        return taught_loss(output, models.Output(image, logits), clean, labels, recipe.loss,
                           recipe.denoising_loss)


def choose_loss(network, labelled: bool, loss: str | None = None) -> str:
    """The loss asked for, or else the one that fits; ValueError in one sentence where it does not fit."""
    if network.classifies and not labelled and (not network.denoises or loss != "den"):
        raise ValueError("These images have no labels, and the network classifies: give a folder with one "
                         "folder per class in train/ and val/, or a denoiser (--model dnas-k3-e3, or search "
                         "with --model dnas)" + (", or --loss den." if network.denoises else "."))
    possible = [name for name in LOSSES
                if (name == "den" or network.classifies) and (name == "cls" or network.denoises)]
    if loss is not None and loss not in possible:
        raise ValueError(f"The loss {loss!r} does not fit this network; possible: {', '.join(possible)}.")
    return loss or possible[0]


# --- The loop ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """How a network is trained, with the defaults of the command line; names as those of its flags."""

    loss: str  # one of LOSSES
    denoising_loss: str = "mixed"  # one of DENOISING_LOSSES
    epochs: int = 8
    optimizer: str = "muon"
    lr: float | None = None  # None: that of the optimizer
    weight_decay: float | None = None  # None: that of the optimizer
    schedule: str = "cosine"
    warmup_epochs: float | None = None  # None: a tenth of all, at most 5
    label_smoothing: float = 0.1
    grad_clip: float = 5.0
    ema: float = 0.0
    amp: str = "off"
    nonfinite: str = "stop"
    save_minutes: float = 10.0
    seed: int = 0


def make_schedule(optimizer, recipe: Recipe, steps_per_epoch: int):
    """"cosine": linear warm-up, then a cosine to 0, by batches. "plateau": a fifth of the learning rate after
    five epochs without a better validation loss (the paper has no numbers), by epochs."""
    if recipe.schedule == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=5)
    epochs = min(5, recipe.epochs / 10) if recipe.warmup_epochs is None else recipe.warmup_epochs
    warmup = max(1, round(epochs * steps_per_epoch))
    rise = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.epochs * steps_per_epoch - warmup))
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])


@torch.inference_mode()
def validate(network: nn.Module, loader, *, loss: str, device: torch.device, noise: data_module.Noise,
             amp: str = "off", denoising: str = "mixed", seed: int = VALIDATION_SEED,
             each=lambda: None) -> dict:
    """Mean loss, accuracy over labels (None without classifier) and PSNR (None without denoiser) of a split.

    The noise is the same in every epoch and run, see Noise.validation_sigma; pairs have their own. `each` is
    called before each batch.
    """
    sums = run.Sums(dict.fromkeys(("loss", "accuracy", "psnr_db"), (0.0, 0)))
    (rank, world), count, was_training = run.rank_and_world(), 0, network.training
    network.eval()
    for images, labels in loader:
        each()
        labels, boxes = data_module.split_labels(labels, device)
        places = [rank + (count + i) * world for i in range(len(images))]  # of these images in the split
        clean, noisy = data_module.clean_and_noisy(images, places, device, noise, seed)
        sigma = torch.tensor([noise.validation_sigma(place) for place in places], device=device)
        inputs = noisy(sigma)  # not in 16 bit
        with run.autocast(device, amp):
            output = models.apply_network(network, inputs, boxes)
        total, _ = task_loss(output, clean, labels, loss, label_smoothing=0.0, denoising=denoising)
        sums.add("loss", float(total * len(clean)), len(clean))
        if loss != "den":
            sums.add("accuracy", float((output.logits.argmax(1) == labels).sum()), len(labels))
        if loss != "cls":
            psnr = metrics.psnr(output.image.float().clamp(0, 1), clean).clamp(max=metrics.EQUAL_DB)
            sums.add("psnr_db", float(psnr.sum()), len(clean))
        count += len(clean)
    network.train(was_training)
    return sums.means()


class Training:
    """A network in training, from `state` on where that is the content of a last.pt; `steps`: in an epoch."""

    def __init__(self, network: nn.Module, recipe: Recipe, steps: int, device: torch.device, state=None,
                 teacher: Teacher | None = None):
        make_optimizer, lr, decay = OPTIMIZERS[recipe.optimizer]
        self.network = network.to(device, memory_format=torch.channels_last)
        self.recipe, self.device, self.average, self.teacher = recipe, device, None, teacher
        self.optimizer = make_optimizer(network.parameters(), lr if recipe.lr is None else recipe.lr,
                                        decay if recipe.weight_decay is None else recipe.weight_decay)
        self.schedule = make_schedule(self.optimizer, recipe, steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "float16")
        if recipe.ema:
            averages = get_ema_multi_avg_fn(recipe.ema)
            self.average = AveragedModel(network, multi_avg_fn=averages, use_buffers=True)
        self.rows, self.best, self.first, self.sums = [], None, 0, run.Sums()
        self.steps = recipe.epochs * steps  # of the schedule; beyond them a cosine would rise again
        if state is not None:
            self.steps = state.get("steps") or self.steps
            for name in ("network", "optimizer", "schedule", "scaler"):
                getattr(self, name).load_state_dict(state[name])
            if self.average is not None:
                self.average.module.load_state_dict(state["ema"])
                self.average.n_averaged.fill_(state["averaged"])
            self.rows, self.best, self.first = state["rows"], state["best"], state["step"]
            self.sums = run.Sums({name: (total, state["count"]) for name, total in state["sums"].items()}
                                 if "count" in state else state["sums"])  # older checkpoints have one count
        self.lr = (state or {}).get("lr", self.optimizer.param_groups[0]["lr"])  # of the latest step
        self.start = time.perf_counter() - (state or {}).get("seconds", 0.0)  # of the epoch

    def weights(self) -> dict:
        """What a checkpoint holds of the network."""
        return {"network": self.network.state_dict(),
                "ema": None if self.average is None else self.average.module.state_dict()}

    def state_dict(self, step: int) -> dict:
        """What is needed to go on from `step` steps into the epoch after rows[-1]; asked on every process."""
        return {"epoch": len(self.rows), **self.weights(), "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(),
                "averaged": 0 if self.average is None else int(self.average.n_averaged), "rows": self.rows,
                "best": self.best, "step": step, "sums": self.sums.gather(), "steps": self.steps,
                "lr": self.lr, "seconds": time.perf_counter() - self.start}

    def take_step(self, batch, guard: run.Guard, where: str) -> None:
        """One step with a batch (noisy, clean, labels)."""
        (noisy, clean, labels), recipe = batch, self.recipe
        self.lr = self.optimizer.param_groups[0]["lr"]
        guard.remember(self.network)
        labels, boxes = data_module.split_labels(labels, self.device)
        with run.autocast(self.device, recipe.amp):
            output = models.apply_network(self.network, noisy, boxes)
        total, parts = task_loss(output, clean, labels, recipe.loss, recipe.label_smoothing,
                                 recipe.denoising_loss)
        if self.teacher is not None:
            taught = self.teacher.loss(output, noisy, clean, labels, boxes, recipe, self.device)
            total = (1 - self.teacher.weight) * total + self.teacher.weight * taught
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        if run.take_step(total, self.network.parameters(), self.optimizer, self.scaler, guard,
                         recipe.grad_clip, where, self.network.buffers()):
            if self.average is not None:
                self.average.update_parameters(self.network)
            for name, part in {"loss": total.detach(), **parts}.items():
                self.sums.add(name, part * len(clean), len(clean))
        if recipe.schedule != "plateau" and self.schedule.last_epoch < self.steps:
            self.schedule.step()

    def end_epoch(self, held_out: dict) -> bool:
        """Add the row of an epoch; whether it is the best one."""
        losses = [held_out["loss"], math.inf if self.best is None else self.best["val_loss"]]
        loss, least = (each if math.isfinite(each) else math.inf for each in losses)
        if self.recipe.schedule == "plateau":
            self.schedule.step(loss)
        self.rows.append({"epoch": len(self.rows) + 1, "lr": self.lr,
                          **{f"train_{name}": value for name, value in self.sums.means().items()},
                          **{f"val_{name}": value for name, value in held_out.items()},
                          "seconds": time.perf_counter() - self.start})
        self.start = time.perf_counter()
        better = self.best is None or loss < least
        self.best, self.first, self.sums = self.rows[-1] if better else self.best, 0, run.Sums()
        return better


def train(network: nn.Module, train_loader, val_loader, recipe: Recipe, *, noise: data_module.Noise,
          output_dir: str | Path, about: dict, device: torch.device, state: dict | None = None,
          teacher: Teacher | None = None) -> dict:
    """Train a network, writing last.pt, best.pt and summary.csv after each epoch; the best epoch's row.

    about: goes into the checkpoints. state: the content of a last.pt to go on from; it is also written every
    `save_minutes` and after a signal. The loaders hold the images of this process. Raises as run.Guard does.
    """
    with files.reading("The checkpoint of the stopped training"):
        training = Training(network, recipe, len(train_loader), device, state, teacher)
    output_dir = Path(output_dir)
    rank, steps, epochs = run.rank_and_world()[0], len(train_loader), recipe.epochs
    batches = data_module.NoisyBatches(train_loader, device, noise, recipe.seed, rank)
    work = steps + VALIDATION_WORK * len(val_loader)  # of an epoch
    forecast = run.Forecast("training", (epochs - len(training.rows)) * work - training.first)

    def save(step: int) -> None:
        content = training.state_dict(step)
        if rank == 0:
            files.save_checkpoint(output_dir / "last.pt", {**about, **content})

    with run.Guard(recipe.nonfinite, recipe.save_minutes) as guard:
        for epoch in range(len(training.rows), epochs):
            network.train()
            progress = run.track(batches.epoch(epoch, training.first), f"epoch {epoch + 1}/{epochs}", steps,
                                 training.first, "batch", forecast=forecast)
            for step, batch in enumerate(progress, training.first):
                torch.manual_seed(data_module.mix_seeds(recipe.seed, epoch, step, rank))  # of dropout
                training.take_step(batch, guard, f"epoch {epoch + 1}, batch {step + 1}")
                progress.set_postfix(loss=f"{training.sums.local_mean('loss'):.4f}", lr=f"{training.lr:.2g}")
                guard.end_of_step(lambda: save(step + 1))
            trained = network if training.average is None else training.average.module
            held_out = validate(trained, val_loader, loss=recipe.loss, device=device, noise=noise,
                                amp=recipe.amp, denoising=recipe.denoising_loss,
                                seed=VALIDATION_SEED if about.get("splits") != 1 else 0,
                                each=lambda epoch=epoch: guard.between(lambda: save(steps)))
            forecast.done(work - steps)
            guard.end_of_epoch(epoch + 1, "loss" in training.sums.pairs)
            if training.end_epoch(held_out) and rank == 0:
                content = {**about, "epoch": epoch + 1, **training.weights()}
                files.save_checkpoint(output_dir / "best.pt", content)
            guard.save(lambda: save(0))
            if rank == 0:
                write_summary(output_dir / "summary.csv", training.rows)
            left = f", about {run.format_duration(forecast.left_s())} left" if epoch + 1 < epochs else ""
            run.say(format_row(training.rows[-1], epochs) + left)
            if epoch + 1 < epochs:
                guard.after_epoch()
    return training.best


def write_summary(path: Path, rows: list[dict]) -> None:
    """One CSV row per epoch."""
    lines = [rows[0], *(("" if value is None else str(value) for value in row.values()) for row in rows)]
    text = "".join(",".join(line) + "\n" for line in lines)
    files.write_file(path, lambda temporary: temporary.write_text(text))


def format_row(row: dict, epochs: int) -> str:
    """An epoch in one line."""
    accuracy, psnr = row["val_accuracy"], row["val_psnr_db"]
    losses = f"train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
    return (f"epoch {row['epoch']:>3}/{epochs}  {losses}"
            + ("" if accuracy is None else f"  accuracy {100 * accuracy:.1f} %")
            + ("" if psnr is None else f"  PSNR {psnr:.2f} dB") + f"  {row['seconds']:.0f} s")


# --- Command line ------------------------------------------------------------------------------------------

def check_images(data: data_module.Data, loss: str, channels: int = 3, scale: int = 1) -> None:
    """ValueError in one sentence where images do not fit a network of `channels` that enlarges by `scale`."""
    for wrong, sentence in (
            (scale > 1 and data_module.is_paired(data.train),
             f"{data.name} holds pairs of one size, noisy and clean, and the network makes images {scale} "
             "times larger; give a folder of clean images."),
            (data.size % scale, f"For super-resolution x{scale} --size must be a multiple of {scale}, not "
             f"{data.size}: it is that of the large image."),
            (data.channels != channels, f"The network takes images of {channels} channel"
             f"{'s' * (channels > 1)}, and those of {data.name} are read with {data.channels}: "
             f"{'give' if channels == 1 else 'leave out'} --grey, or take another network."),
            (len(data.train) < 2, f"{data.name} has {len(data.train)} training image; give at least 2."),
            (loss != "cls" and data.size < metrics.WINDOW, f"--size {data.size} is too small for the "
             f"denoising loss: SSIM needs {metrics.WINDOW} pixels.")):
        if wrong:
            raise ValueError(sentence)
    if loss != "cls" and getattr(data.val, "whole", False):
        side, file = data_module.smallest(data.val)
        if side < metrics.WINDOW * scale:
            raise ValueError(f"{file} has a side of {side} pixels, and SSIM needs {metrics.WINDOW * scale}: "
                             "remove it.")


def modify_record(record: dict, model: str | None = None, decoder: str | None = None,
                  widen: float | None = None, plain: bool = False, grey: bool | None = None) -> dict:
    """The record, without its latency and the weights that no longer fit, of the same encoder as another
    model, with another decoder, wider channels, for `grey` images or, `plain`, with the papers' stem and
    head. Networks of other kinds can be made wider only; ValueError where more is asked of them."""
    same = model is decoder is widen is None and not plain  # the weights still fit
    joint = record["method"] in registry.JOINT
    if same and (not joint or grey in (None, record.get("grey", False))):
        return record
    kept = {name: value for name, value in record.items()
            if name != "latency" and (same or name != "weights")}
    if record["method"] == "named" and model is decoder is None:
        return {**kept, "widen": widen}
    if not joint:
        raise ValueError("--train-as, --decoder and --widen are for C-NAS, D-NAS and DC-NAS, not for "
                         f"{record['model']}.")
    arch = models.Arch.from_dict(record)
    if model not in (None, "dnas") and not arch.classifies:
        raise ValueError("The record is of a dnas, which has no classifier; it cannot be trained so.")
    arch = arch if model is None else arch.with_model(model)
    if decoder is not None:
        arch = replace(arch, decoder=decoder, multiscale=arch.multiscale and decoder == "sharp")
    arch = replace(arch, multiscale=False) if plain else arch
    arch = arch if grey is None else replace(arch, grey=grey)
    arch = arch if widen is None else arch.widened(widen)
    return {**kept, **arch.to_dict()}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py", allow_abbrev=False, usage="python train.py [options]  (--help lists them)",
        description="Train a found or named network to denoise and classify. With --arch, the flags\n"
                    "of data and noise have the values of the search by default.",
        epilog="examples:\n  python train.py\n  python train.py --arch runs/search/arch.json --epochs 5\n"
               "  python train.py --model dcnas-k3-e3 --data photos --epochs 250 --batch-size 512 --size 224",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("network", "what is trained").add_argument
    add("--arch", default="runs/search/arch.json", metavar="FILE",
        help="record of the network, from search.py, or a checkpoint, with whose weights it begins "
             "(default: %(default)s)")
    add("--model", type=registry.model_name, metavar="NAME",
        help="a named model, python registry.py lists them (default: the network of --arch)")
    add("--train-as", choices=models.MODELS, help="train the encoder as another model (default: as found)")
    add("--decoder", choices=models.DECODERS, help="another decoder; conv: that of the papers; sharp: that "
        "with the noisy image and a branch at full resolution; mb: two MBConvs a level; mb-1: one; "
        "mb-3level: two, none at level 4 (default: as found; with --recipe paper conv)")
    add("--widen", type=number(0.1, 16), metavar="X", help="multiply all channels by X (default: 1)")
    add("--from-scratch", action="store_true", help="begin with random weights (default: with those of the "
        "search or of a checkpoint, where there are some)")
    add("--loss", choices=LOSSES,
        help="both: 0.1 cross-entropy + 0.9 denoising; cls, den: one (default: what the network can)")
    add("--dropout", type=number(0, 0.9), default=0.0, metavar="P", help="probability of dropout before the "
        "last layer of a searched network; the papers: 0.2, for long runs (default: %(default)s)")
    add("--drop-connect", type=number(0, 0.9), default=0.0, metavar="P",
        help="probability to skip a block of a searched network in training; grows with depth from 0 to "
             "this; the papers: 0.2 (default: %(default)s)")
    data_module.add_data_arguments(parser)
    data_module.add_noise_arguments(parser)
    add = parser.add_argument_group("recipe", "how it is trained").add_argument
    add("--recipe", choices=(*RECIPES, *registry.METHODS),
        help="defaults of the flags below: short; study: the papers' controlled study; paper: the papers' on "
             "ImageNet-100, but with crops of 25 %% of an image or more (papers: 8 %%) and colour jitter 0.2 "
             "(papers: 0.4); or those of a search method (default: of the record's method, else short)")
    add("--denoising-loss", choices=DENOISING_LOSSES, default="mixed", help="mixed: 0.8 Charbonnier + 0.2 "
        "(1 - SSIM); charbonnier; log-ssim: MSE + 0.6 log10(1 / SSIM); mse (default: %(default)s)")
    add("--epochs", type=whole(1, 100000), default=8, metavar="N",
        help="passes over the images; the papers: 250 (default: %(default)s)")
    add("--batch-size", type=whole(2, 65536), default=16, metavar="N",
        help="images per step, of all processes together; the papers: 512 (default: %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="muon",
        help="muon learns most in few epochs; sgd, with momentum 0.9, is the papers' (default: %(default)s)")
    add("--lr", type=number(1e-8, 100), metavar="LR",
        help="peak learning rate; the papers: 0.2 (default: 0.004 for muon, 0.0015 for adamw, 0.001 for "
             "adam, 0.15 for sgd)")
    add("--schedule", choices=("cosine", "plateau"), default="cosine",
        help="learning rate: warm-up and cosine, or a fifth at each plateau (default: %(default)s)")
    add("--warmup-epochs", type=number(0, 1000), metavar="N",
        help="epochs of linear warm-up before the cosine (default: a tenth of all, at most 5)")
    add("--weight-decay", type=number(0, 1), metavar="WD",
        help="weight decay; the papers: 1e-5 (default: 0.01 for muon and adamw, 0 for adam, 1e-5 for sgd)")
    add("--label-smoothing", type=number(0, 0.99), default=0.1, metavar="E",
        help="probability that is spread over all classes (default: %(default)s)")
    add("--grad-clip", type=number(1e-6, 1e6), default=5.0, metavar="NORM",
        help="largest norm of the gradient (default: %(default)s)")
    add("--ema", type=number(0, 0.999999), default=0.0, metavar="DECAY",
        help="decay of averaged weights, which are then kept; 0: no average (default: %(default)s)")
    add("--teacher", metavar="CHECKPOINT",
        help="a trained network, whose images and logits are learned as well (default: none)")
    add("--teacher-weight", type=number(0, 1), default=0.5, metavar="X",
        help="share of the loss against the teacher's images and logits (default: %(default)s)")
    run.add_run_arguments(parser, "runs/train")
    return parser


def searched_flags(record: dict, given: dict) -> dict:
    """The flags of data and noise in a record, without what a `given` --data changes."""
    images = record.get("images")
    flags = data_module.image_flags(defaultdict(lambda: None, images if isinstance(images, dict) else {}))
    if given.get("data", record.get("data")) != record.get("data"):
        flags |= {"crops": None, "train_folders": None, "leave_out": None}
    return {**flags, **{name: record.get(name) for name in ("data", "data_root", "size")}}


def read_command(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple:
    """(values of the flags, the record or {} for a named model, the checkpoint to go on with or None)."""
    given = run.given_flags(parser, argv)
    if "resume" in given:
        state, folder = run.resume_state(given["resume"], "last.pt", "optimizer")
        files.check_fields(given["resume"], state, files.TRAINING)
        files.check_fields(given["resume"], state["record"], files.RECORD)
        files.check_fields(given["resume"], state["best"] or {"val_loss": 0.0}, {"val_loss": (float, int)})
        args = run.resolve(parser, argv, {**state["flags"], "output_dir": str(folder)})
        run.check_resumed(state["flags"], vars(args))
        return args, state["record"], state
    record = {} if "model" in given else files.load_record(given.get("arch", parser.get_default("arch")))
    method = record["method"] if record.get("method") in registry.METHODS else "short"
    name = given.get("recipe", method)
    recipe = RECIPES[name] if name in RECIPES else registry.method_module(name).TRAIN_DEFAULTS
    layers = [{**recipe, "recipe": name}, searched_flags(record, given)]
    if "recipe" in given:  # what was asked for goes before the record
        layers.reverse()
    return run.resolve(parser, argv, *layers), record, None


def check_best(path: Path, state: dict | None, epochs: int) -> None:
    """Of a run that goes on, forget its best epoch where best.pt does not hold it; ValueError in one sentence
    where no epoch is left that could be better."""
    if state is None or not state["rows"] or run.rank_and_world()[0] > 0:
        return
    epoch, best = (state["best"] or {}).get("epoch"), files.read_checkpoint(path) if path.is_file() else {}
    holds = epoch is not None and files.fits(best.get("epoch"), range(epoch, 2**31))
    if not holds or best.get("record") != state["record"]:
        if len(state["rows"]) >= epochs:
            raise ValueError(f"{path} does not hold the best network of this run; put it back or start anew.")
        run.say(f"note: {path} does not hold the best network so far; that of the epochs to come is kept.")
        state["best"] = None


def make_network(args: argparse.Namespace, record: dict, data: data_module.Data) -> tuple[nn.Module, str]:
    """(the network of a record, its loss); ValueError in one sentence where they do not fit the images."""
    network = registry.build_network(record, args.dropout, args.drop_connect)
    if args.recipe == "paper":
        begin_as_papers(network)
    if network.classifies and data.classes and record["num_classes"] != len(data.classes):
        raise ValueError(f"{args.arch} is a network for {record['num_classes']} classes but {args.data} has "
                         f"{len(data.classes)}; search again with --data {args.data}.")
    loss, scale = choose_loss(network, data.classes is not None, args.loss), models.scale_of(network)
    check_images(data, loss, models.channels_of(network), scale)
    boxes = data_module.split_labels(torch.as_tensor(data.train[0][1])[None], "cpu")[1]
    registry.check_fits(network, record["model"], data.size // scale, boxes)
    return network, loss


def begin_as_found(network: nn.Module, record: dict, arch: str) -> None:
    """Give a fresh network the weights that its record names, of its search or of a checkpoint; say so, or
    why not."""
    if not record.get("weights"):
        run.say("note: the changed network begins with random weights.")
        return
    path = Path(arch).with_name(Path(str(record["weights"])).name)
    if not path.is_file():
        run.say(f"note: {path} is not there, so that the training begins from scratch.")
        return
    with files.reading(path):
        network.load_state_dict(files.load_checkpoint(path)[0].state_dict())
    run.say(f"It begins with the weights in {path}; --from-scratch: without.")


def begin_as_papers(network: nn.Module) -> None:
    """Let the residual branches of fresh MBConvs begin at full strength, as in the papers."""
    for module in network.modules():
        if isinstance(module, models.MBConv) and module.residual and module.project[1].affine:
            nn.init.ones_(module.project[1].weight)


def say_plan(network: nn.Module, record: dict, data: data_module.Data, noise, loss: str) -> None:
    """Print what is trained, and on which images."""
    size, paired = data.size // models.scale_of(network), data_module.is_paired(data.train)
    crops = getattr(data.train, "crops", 1)
    run.say(f"{record['model']}: {models.count_parameters(network):,} parameters, "
            f"{models.count_macs(network, size) / 1e6:.1f} M MACs at {size} px; {len(data.train):,} training "
            f"and {len(data.val):,} validation images of {data.name}; loss {loss}\n"
            f"images of {data.size} px, {crops} crop{'s' * (crops > 1)} of each an epoch, "
            + ("pairs with real noise" if paired else noise.describe()) + "\n"
            + "; ".join(f"{split}: {source}" for split, source in data.sources.items()))


RESULTS = ("last.pt", "best.pt", "summary.csv")  # what a run writes into its folder


def main(argv: list[str] | None = None) -> None:
    parser, start = build_parser(), time.perf_counter()
    with run.Command(parser, "last.pt") as command:
        args, record, state = read_command(parser, argv)
        command.resumed = state is not None
        command.folder = run.resumed_folder(args.resume) if command.resumed else args.output_dir
        device = run.prepare_device(args.device, args.threads, args.seed)
        args.amp = run.choose_amp(device, args.amp)
        splits = data_module.VERSION if state is None else state.get("splits") or 1
        if splits < data_module.VERSION:
            run.say("note: this run began with an older version; it keeps the splits of its data.")
        if state is None and record and not record.get("images"):
            run.say("note: the record does not hold the noise of its search; that below is of the flags.")
        run.check_output(args.data, args.output_dir)
        values = {**vars(args), "test_images": 1}  # the test images take no part
        data = run.in_turn(lambda: data_module.data_from(values, run.kept_splits(state, args.accept_changes)))
        run.check_images(data, state, args.accept_changes)
        run.fill_sigma(vars(args), data)
        made = files.provenance(latency.device_name(device), args.seed)
        if not record:  # without labels choose_loss says what to do
            record = registry.named_record(args.model, len(data.classes or []) or 1, made)
        begins = state is None and record.get("weights") and not args.from_scratch
        if state is None:
            papers = args.recipe == "paper" and record["method"] in registry.JOINT
            if papers and (args.train_as or record["model"]) != "cnas":
                args.decoder = args.decoder or "conv"
            record = modify_record(record, args.train_as, args.decoder, args.widen, papers,
                                   data.channels == 1)
        network, loss = make_network(args, record, data)
        if begins:
            begin_as_found(network, record, args.arch)
        noise = data_module.noise_from(vars(args), models.scale_of(network))
        teacher = None
        if args.teacher:
            teacher = Teacher(args.teacher, args.teacher_weight, network, data.classes, device)
        batch_size = run.split_batch_size(args.batch_size)
        run.begin_folder(args.output_dir, RESULTS, state and args.resume)
        check_best(Path(args.output_dir) / "best.pt", state, args.epochs)
        command.folder = args.output_dir
        say_plan(network, record, data, noise, loss)
        rank, world = run.rank_and_world()
        how = dict(seed=args.seed, workers=args.workers, device=device, rank=rank, world=world)
        about = {"record": record, "classes": data.classes, "size": data.size, "data": args.data,
                 "seed": args.seed, "loss": loss, "made": made, "flags": run.run_flags(vars(args)),
                 "splits": splits, "images": data.files}
        values = {**vars(args), "loss": loss}
        loaders = [data_module.make_loader(images, batch_size, shuffle=training, drop_last=training, **how)
                   for images, training in ((data.train, True), (data.val, False))]
        recipe = Recipe(**{field.name: values[field.name] for field in fields(Recipe)})
        best = train(network, *loaders, recipe, noise=noise, output_dir=args.output_dir, about=about,
                     device=device, state=state, teacher=teacher)
    run.say(f"best epoch {best['epoch']} (validation loss {best['val_loss']:.4f}) in "
            f"{args.output_dir}/best.pt, after {time.perf_counter() - start:.0f} s; next:\n"
            f"  python eval.py --checkpoint {os.path.join(args.output_dir, 'best.pt')}")


if __name__ == "__main__":
    main()
