"""PSNR, SSIM and accuracy of a trained network at every noise level, and the network used on your own pictures.

    python eval.py                                        # runs/train/best.pt on the data it was trained for
    python eval.py --checkpoint runs/train/best.pt --data my_images --split test
    python eval.py --data CBSD68 --split all --sigmas 15/255 25/255 50/255 --noise-protocol literature
    python eval.py --input holiday.jpg                    # denoise and classify a picture, or a folder of them

Reads a checkpoint of train.py. Writes metrics.json, table.txt and grid.png, or with --input the denoised pictures
and predictions.json, to --output-dir. `psnr`, `ssim` and `to_8bit` need torch only and work when this file is copied
alone.

The protocol is that of Markhorst, van Gemert and Kayhan ("Pushing Joint Image Denoising and Classification to
the Edge", 2024): Gaussian noise of sigma 0, 0.1 ... 1.0 on images in [0, 1], and the mean over the levels.
"""

import argparse
import contextlib
import copy
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIGMAS = tuple(level / 10 for level in range(11))
WINDOW, WINDOW_SIGMA = 11, 1.5  # of SSIM: pixels

# -----------------------------------------------------------------------------------------------------------
# Metrics


def psnr(image: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: two (B, C, H, W) -> (B,); infinite where the two are equal.

    Over all channels (RGB, not luma, which is about 2 dB higher). Raises ValueError when the shapes differ.
    """
    image, reference = _pair(image, reference)
    return 10 * torch.log10(data_range ** 2 / _image_mean((image - reference).square()))


def ssim(image: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each image: two (B, C, H, W), 11 pixels or larger -> (B,), at most 1; differentiable.

    Wang, Bovik, Sheikh and Simoncelli 2004: Gaussian window 11x11 of sigma 1.5, K 0.01 and 0.03, population
    covariance, only where the window fits, per channel, then the mean. In float64 it equals scikit-image
    (gaussian_weights=True, sigma=1.5, use_sample_covariance=False) to 1e-10. Raises ValueError when the shapes
    differ or are too small.
    """
    image, reference = _pair(image, reference)
    if min(image.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of {WINDOW}x{WINDOW} pixels or more, not "
                         f"{image.shape[-2]}x{image.shape[-1]}.")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _blur(image), _blur(reference)  # (B, C, H - 10, W - 10)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    covariance = _blur(image * reference) - product
    variances = _blur(image.square() + reference.square()) - squares  # of both images, added
    return _image_mean((2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2)))


def to_8bit(image: Tensor) -> Tensor:
    """What a PNG file keeps of an image: clamped to [0, 1] and rounded to multiples of 1/255."""
    return image.clamp(0, 1).mul(255).round().div(255)


def luma(image: Tensor) -> Tensor:
    """Y of YCbCr, as the super-resolution literature measures it: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [16, 235] / 255.

    ITU-R 601 in studio range, MATLAB's rgb2ycbcr, not rounded to 8 bit. Raises ValueError where there are not three channels.
    """
    if image.shape[1] != 3:
        raise ValueError(f"The luma of an image needs its 3 channels, not {image.shape[1]}; measure a grey image as it is.")
    weights = torch.tensor((65.481, 128.553, 24.966), dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
    return ((image * weights).sum(1, keepdim=True) + 16) / 255


def _pair(image: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != reference.shape or image.dim() != 4:
        raise ValueError("PSNR and SSIM need two (B, C, H, W) images of one shape, not "
                         f"{tuple(image.shape)} and {tuple(reference.shape)}.")
    if not (image.is_floating_point() and reference.is_floating_point()):
        raise ValueError(f"PSNR and SSIM need floating point images, not {image.dtype}, {reference.dtype}.")
    # Half precision (a network under AMP) has too few digits for the variances of SSIM.
    half = (torch.float16, torch.bfloat16)
    return tuple(x.float() if x.dtype in half else x for x in (image, reference))


def _image_mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,), summed in an order that does not depend on B: every batch size gives the same digits."""
    return x.contiguous().mean(3).mean(2).mean(1)


class _Blur(torch.autograd.Function):
    """The separable Gaussian window of SSIM where it fits: (B, C, H, W) -> (B, C, H - 10, W - 10).

    Written as sums of shifted images, because a depthwise convolution in float64 on a CPU is 2 to 10 times slower,
    and because AMP and TF32, which would spoil the digits, leave sums alone. Left to itself, autograd would make a
    padded image of every shift; but the window is symmetric, so that the gradient is the same sum over a padded gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        weights = [math.exp(-((k - WINDOW // 2) / WINDOW_SIGMA) ** 2 / 2) for k in range(WINDOW)]
        for dim in (2, 3):
            size = x.shape[dim] - WINDOW + 1
            total = x.narrow(dim, 0, size) * (weights[0] / sum(weights))
            for k in range(1, WINDOW):
                total.add_(x.narrow(dim, k, size), alpha=weights[k] / sum(weights))
            x = total
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _blur(F.pad(gradient, [WINDOW - 1] * 4))


_blur = _Blur.apply

# -----------------------------------------------------------------------------------------------------------
# Evaluation


@torch.inference_mode()
def evaluate(network: nn.Module, loader, *, sigmas=SIGMAS, device: torch.device | str = "cpu", seed: int = 0,
             clip: bool = False, noise: str = "gaussian", protocol: str = "own", shave: int = 0, y_only: bool = False,
             progress: bool = True) -> dict:
    """Measure a network (already on `device`) on a loader of (uint8 (B, C, H, W), labels (B,)) at every noise level.

    noise: one of data.NOISES; protocol: one of data.PROTOCOLS. Where the images are pairs (data.split_pair) their own noise
    is the only level, with the sigma "real". shave: so many pixels at each border, and y_only: all but `luma`, are left out
    of PSNR and SSIM.

    Returns {"images", "labelled_images", "ssim_images", "num_classes", "chance_accuracy", "protocol", "levels": one
    record per sigma, "means": {"all_levels", "noisy_levels" (sigma > 0)}}. A record has, each a mean over the
    images, `accuracy` and `top5_accuracy` (0 to 1; the latter with more than 5 classes), `psnr_db` and `ssim` of the
    denoised image, clamped and rounded to 8 bit, and `input_psnr_db` and `input_ssim` of the noisy image as the
    network gets it. None stands for what cannot be measured: accuracy without labels or without a classifier, PSNR
    and SSIM without a denoiser, SSIM of images below 11 pixels, a mean over levels of which one is infinite.

    The noise belongs to the image's place in the loader, which must not shuffle, and is scaled by sigma: it is the
    same in every run, for every batch size, every network and every choice of levels. The values of all images are
    summed exactly, in float64. The network is in eval mode meanwhile and gets its own mode back.
    """
    from tqdm import tqdm

    from data import NOISES, is_paired, rank_and_world, split_labels
    from models import run, scale_of

    rank, world = rank_and_world()
    sigmas = ("real",) if is_paired(getattr(loader, "dataset", None)) else sigmas
    was_training = network.training
    network.eval()
    levels = [defaultdict(list) for _ in sigmas]  # per level: name -> one value per image
    count, num_classes, channels, scale = 0, None, 3, scale_of(network)
    try:
        for images, labels in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not progress):
            places = [rank + (count + i) * world for i in range(len(images))]
            clean, noisy_at = clean_and_noisy(images, places, device, seed, clip, noise, protocol, scale)  # (B, C, H, W)
            reference, (labels, boxes) = clean.double(), split_labels(labels, device)
            channels = clean.shape[1]
            for sigma, values in zip(sigmas, levels):
                noisy = noisy_at(sigma)
                image, logits = run(network, noisy, boxes)
                if image is not None:
                    _add_quality(values, "", to_8bit(image.float()).double(), reference, shave, y_only)
                    _add_quality(values, "input_", enlarged(noisy, scale).double(), reference, shave, y_only)
                if logits is not None:
                    num_classes = logits.shape[1]
                    _add_hits(values, logits[labels >= 0], labels[labels >= 0])
            count += len(images)
    finally:
        network.train(was_training)
    if world > 1:
        count, num_classes, levels = _gather(count, num_classes, levels)
    if not count:
        raise ValueError("There is no image to evaluate on.")

    real = sigmas == ("real",)
    records = [{"sigma": sigma if real else float(sigma), **{name: _mean(values[name]) for name in COLUMNS}}
               for sigma, values in zip(sigmas, levels)]
    return {"images": count, "labelled_images": len(levels[0]["accuracy"]), "ssim_images": len(levels[0]["ssim"]),
            "num_classes": num_classes, "chance_accuracy": 1 / num_classes if num_classes else None,
            "protocol": {"colour": "Y (ITU-R 601, 16 to 235)" if y_only else "grey" if channels == 1 else "RGB",
                         "shaved_px": shave, "self_ensemble": isinstance(network, SelfEnsemble),
                         "noise": "real, of the pictures themselves" if real else NOISES[noise][1],
                         "noise_protocol": None if real else protocol, "noise_clipped": clip and not real,
                         "noise_seed": seed if protocol == "own" and not real else None,
                         "output": "clamped to [0, 1], rounded to 8 bit",
                         "scale": scale,
                         "input": ("as in its file" if real else f"bicubic x{scale}" if scale > 1 else
                                   "clipped to [0, 1], not rounded" if clip else "not clipped, not rounded"),
                         "psnr": "per image, then the mean; inf where two images are equal",
                         "ssim": "Gaussian 11x11, sigma 1.5, valid region; per image, then the mean"},
            "levels": records,
            "means": {"all_levels": _level_means(records),
                      "noisy_levels": _level_means([record for record in records if real or record["sigma"] > 0])}}


def _gather(count: int, num_classes: int | None, levels: list[dict]) -> tuple[int, int | None, list[dict]]:
    """The values of the images of all processes. (The mean of them is summed exactly, so that their order does not matter.)"""
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (count, num_classes, [dict(values) for values in levels]))
    merged = [defaultdict(list) for _ in levels]
    for _, _, others in parts:
        for values, other in zip(merged, others):
            for name, more in other.items():
                values[name] += more
    return sum(part[0] for part in parts), max((part[1] for part in parts if part[1]), default=None), merged


def clean_and_noisy(images: Tensor, places: list[int], device: torch.device | str, seed: int = 0, clip: bool = False,
                    noise: str = "gaussian", protocol: str = "own", scale: int = 1):
    """The images of a loader, uint8 (B, C, H, W), at these places of a split: (clean in [0, 1] on the device, noisy).

    noisy(sigma), with a number or (B,), gives the images with noise; of pairs (B, 2, C, H, W) those with their own, always.
    With `scale` these are so many times smaller (data.shrink), and the clean ones are cut to a multiple of it.
    """
    from data import cut_to_multiple, evaluation_draw, shrink, split_pair, to_float

    clean, real = split_pair(images)
    clean = to_float(clean, device)
    if real is not None:
        real = to_float(real, device)
        return clean, lambda sigma: real
    clean = cut_to_multiple(clean, scale)
    draw = evaluation_draw(shrink(clean, scale), places, seed, noise, protocol)
    return clean, lambda sigma: draw(sigma).clamp(0, 1) if clip else draw(sigma)


def enlarged(noisy: Tensor, scale: int) -> Tensor:
    """What a network's image is compared with: its input, or the bicubic enlargement of a small one, rounded to 8 bit."""
    if scale == 1:
        return noisy
    from hinas import enlarge

    return to_8bit(enlarge(noisy, scale))


def _add_quality(values: dict, prefix: str, image: Tensor, reference: Tensor, shave: int, y_only: bool) -> None:
    if shave:
        if min(image.shape[-2:]) <= 2 * shave:
            raise ValueError(f"--shave {shave} leaves nothing of an image of {image.shape[-1]}x{image.shape[-2]} pixels; "
                             "give less.")
        image, reference = (x[..., shave:-shave, shave:-shave] for x in (image, reference))
    if y_only:
        image, reference = luma(image), luma(reference)
    values[prefix + "psnr_db"] += psnr(image, reference).tolist()
    if min(image.shape[-2:]) >= WINDOW:
        values[prefix + "ssim"] += ssim(image, reference).tolist()


def _add_hits(values: dict, logits: Tensor, labels: Tensor) -> None:
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5), best first
    values["accuracy"] += hits[:, 0].tolist()
    if logits.shape[1] > 5:
        values["top5_accuracy"] += hits.any(1).tolist()


def _mean(values: list) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _level_means(records: list[dict]) -> dict:
    means = {}
    for name in COLUMNS:
        mean = _mean([record[name] for record in records if record[name] is not None])
        means[name] = None if mean == math.inf else mean
    return means


class SelfEnsemble(nn.Module):
    """A denoiser whose image is the mean over the eight flips and quarter turns of its input, each turned back.

    The logits are those of the upright image: objects are not learned upside down.
    """

    def __init__(self, network: nn.Module):
        from models import channels_of, scale_of

        super().__init__()
        if not network.denoises:
            raise ValueError("The network only classifies, so there are no images to average: leave --self-ensemble out.")
        self.network = network
        self.denoises, self.classifies, self.channels = True, network.classifies, channels_of(network)
        self.takes_boxes, self.scale = getattr(network, "takes_boxes", False), scale_of(network)
        self.train(network.training)

    @staticmethod
    def turn(image: Tensor, way: int) -> Tensor:
        """(..., H, W) turned by `way` % 4 quarters, mirrored from way 4 on."""
        image = image.rot90(way % 4, (-2, -1))
        return image.flip(-1) if way >= 4 else image

    @staticmethod
    def turn_back(image: Tensor, way: int) -> Tensor:
        """What `turn` did, undone."""
        return (image.flip(-1) if way >= 4 else image).rot90(-(way % 4), (-2, -1))

    def forward(self, x: Tensor, boxes: Tensor | None = None):
        from models import Output, run

        image, logits = run(self.network, x, boxes)
        others = (self.turn_back(self.network(self.turn(x, way)).image, way) for way in range(1, 8))
        return Output((image + sum(others)) / 8, logits)


# -----------------------------------------------------------------------------------------------------------
# Reports

EVAL_FORMAT, EVAL_VERSION = "joint-eval", 1
PREDICTIONS_FORMAT, PREDICTIONS_VERSION = "joint-predictions", 1

# The measured values in the order of the table: name -> (heading, format of a number).
COLUMNS = {"input_psnr_db": ("input PSNR", "{:.2f}"), "psnr_db": ("PSNR", "{:.2f}"),
           "input_ssim": ("input SSIM", "{:.4f}"), "ssim": ("SSIM", "{:.4f}"),
           "accuracy": ("accuracy", "{:.1%}"), "top5_accuracy": ("top-5", "{:.1%}")}


def strict_json(content):
    """A copy that strict JSON can hold: an infinite number becomes the string "inf" (float("inf") reads it back)."""
    if isinstance(content, dict):
        return {name: strict_json(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [strict_json(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def format_table(metrics: dict) -> str:
    """A table to read, from what `evaluate` returns; with main's `network` and `latency` records also their lines."""
    names = [name for name in COLUMNS if any(record[name] is not None for record in metrics["levels"])]
    real = metrics["levels"][0]["sigma"] == "real"
    rows = [("noise" if real else "sigma", {name: COLUMNS[name][0] for name in names})]
    means = metrics["means"]
    for label, record in [*((_level(record["sigma"]), record) for record in metrics["levels"]),
                          *(() if real else (("mean, sigma > 0", means["noisy_levels"]),
                                             ("mean, all levels", means["all_levels"])))]:
        rows.append((label, {name: _cell(name, record[name]) for name in names}))
    lines = [f"{label:<17}" + "".join(f"{cells[name]:>{max(6, len(COLUMNS[name][0])) + 2}}" for name in names)
             for label, cells in rows]
    rule = "-" * len(lines[0])
    lines = [lines[0], rule, *lines[1:], ""] if real else [lines[0], rule, *lines[1:-2], rule, *lines[-2:], ""]

    images = f"{metrics['images']:,} images"
    if metrics["chance_accuracy"] and metrics["labelled_images"]:
        images += f"; accuracy by chance {metrics['chance_accuracy']:.1%} ({metrics['num_classes']} classes)"
    if "psnr_db" in names and metrics["ssim_images"] < metrics["images"]:
        images += f"; SSIM of the {metrics['ssim_images']:,} that are {WINDOW} pixels or larger"
    lines.append(images)
    if "network" in metrics:
        record = metrics["network"]
        lines.append(f"{record['parameters']:,} parameters, {record['macs'] / 1e6:,.1f} M multiply-accumulates at "
                     f"{record['size_px']}x{record['size_px']}")
    if metrics.get("latency"):
        record = metrics["latency"]
        threads = f", threads: {record['threads']}" if record["threads"] else ""
        lines.append(f"latency {record['median_ms']:.2f} ms per batch of {record['batch']} at {record['size']}x"
                     f"{record['size']} ({record['p10_ms']:.2f} to {record['p90_ms']:.2f}, 10 to 90 % of "
                     f"{record['count']} runs) on {record['device']}{threads}")
    protocol = metrics["protocol"]
    if "psnr_db" in names:
        colour, shaved = protocol["colour"], protocol.get("shaved_px")
        colour += f" without {shaved} pixels at each border" if shaved else ""
        lines.append(f"PSNR (dB) and SSIM on {colour}: output {protocol['output']}; noisy input {protocol['input']}")
    if protocol.get("self_ensemble"):  # a file of an older version says nothing of it
        lines.append("self-ensemble: the image is the mean of eight passes, over flips and quarter turns; latency and "
                     "multiply-accumulates are those of one")
    noise = protocol["noise"]
    if not real:
        noise += ", clipped to [0, 1]; " if protocol["noise_clipped"] else ", not clipped; "
        noise += "numpy's RandomState(0) for every image, as in the literature" if protocol["noise_seed"] is None else \
            f"seed {protocol['noise_seed']}"
    lines.append(f"noise: {noise}")
    return "\n".join(lines)


def _level(sigma: float | str) -> str:
    """A noise level in a table: its number, or "real"."""
    return sigma if isinstance(sigma, str) else f"{sigma:g}"


def _cell(name: str, value: float | str | None) -> str:
    if value is None:
        return "-"
    text = COLUMNS[name][1].format(float(value))  # float: "inf" where it comes from a JSON file
    return text[1:] if text == "-0.00" else text


def to_picture(image: Tensor):
    """(3, H, W) or (1, H, W) in [0, 1], clamped if not, or uint8 -> Pillow image, RGB or L."""
    from PIL import Image

    pixels = image if image.dtype == torch.uint8 else to_8bit(image.float()).mul(255).round().byte()
    pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().cpu().numpy())


TILE, GAP, LINE = 192, 8, 20  # of the picture grid: pixels
RIGHT, WRONG, INK = (0, 110, 40), (190, 0, 0), (0, 0, 0)


@torch.inference_mode()
def save_grid(path: str | Path, network: nn.Module, dataset, *, sigmas=(0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
              device: torch.device | str = "cpu", seed: int = 0, clip: bool = False, noise: str = "gaussian",
              protocol: str = "own", classes: list[str] | None = None) -> None:
    """Save a picture, one row per sigma: noisy | denoised | clean, below it PSNR and the predicted class.

    PSNR is of the whole picture and all channels. The examples are drawn from the dataset by the seed and carry the same
    noise as in `evaluate`. Small images are enlarged without smoothing, of large ones the middle 384 pixels are shown. The
    network must be in eval mode.
    """
    from PIL import Image, ImageDraw, ImageFont

    from data import split_labels
    from models import run, scale_of, write_file

    font = ImageFont.load_default(size=14)
    rows, scale = [], scale_of(network)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    for number, sigma in enumerate(sigmas):
        index = order[number % len(order)]
        pixels, label = dataset[index]
        clean, noisy_at = clean_and_noisy(pixels[None], [index], device, seed, clip, noise, protocol, scale)
        noisy = noisy_at(sigma)
        labels, boxes = split_labels(torch.as_tensor(label)[None], device)
        image, logits = run(network, noisy, boxes)
        noisy = enlarged(noisy, scale)
        tiles = {"noisy" if scale == 1 else "bicubic": noisy, "denoised" if scale == 1 else "enlarged": image, "clean": clean}
        quality = "real noise" if sigma == "real" else f"sigma {_level(sigma)}"
        if image is not None:
            before, after = (psnr(x.double(), clean.double()).item() for x in (noisy, to_8bit(image.float())))
            quality += f": PSNR {before:.1f} -> {after:.1f} dB"
        texts = [(quality, INK)]
        if logits is not None:
            texts += [_verdict(row, label, classes) for row, label in zip(logits, labels.tolist())]
        rows.append(({name: _tile(x[0]) for name, x in tiles.items() if x is not None}, texts))

    columns = list(rows[0][0])
    tile_width = max(tile.width for tiles, _ in rows for tile in tiles.values())
    heights = [max(tile.height for tile in tiles.values()) + len(texts) * LINE + 2 * GAP for tiles, texts in rows]
    canvas = Image.new("RGB", (GAP + len(columns) * (tile_width + GAP), LINE + GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((GAP + column * (tile_width + GAP), GAP // 2), name, fill=INK, font=font)
    y = LINE + GAP
    for (tiles, texts), height in zip(rows, heights):
        for column, tile in enumerate(tiles.values()):
            canvas.paste(tile, (GAP + column * (tile_width + GAP), y))
        for line, (text, colour) in enumerate(texts):
            while font.getlength(text) > canvas.width - 2 * GAP:  # long class names
                text = text[:-4] + "..."
            draw.text((GAP, y + height - 2 * GAP - (len(texts) - line) * LINE + 2), text, fill=colour, font=font)
        y += height
    write_file(path, lambda temporary: canvas.save(temporary, format="PNG"))


def _tile(image: Tensor):
    from PIL import Image

    top, left = (max(0, (side - 2 * TILE) // 2) for side in image.shape[-2:])
    picture = to_picture(image[:, top:top + 2 * TILE, left:left + 2 * TILE])
    scale = max(1, round(TILE / min(picture.size))) if max(picture.size) < TILE else 1
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _verdict(logits: Tensor, label: int, classes: list[str] | None) -> tuple[str, tuple[int, int, int]]:
    """The text below a row, and its colour: the predicted class, its probability, and the true class where known."""
    probability, index = (value.item() for value in logits.float().softmax(0).max(0))
    text = f"predicted {_class_name(index, classes)} ({probability:.0%})"
    if label < 0:
        return text, INK
    if index == label:
        return f"{text}: right", RIGHT
    return f"{text}: wrong, it is {_class_name(label, classes)}", WRONG


def _class_name(index: int, classes: list[str] | None) -> str:
    return classes[index] if classes else f"class {index}"


# -----------------------------------------------------------------------------------------------------------
# The user's own pictures


TILE_CORE, TILE_MARGIN = 1024, 384  # pixels; multiples of any network's stride; the margin is as far as k5 blocks see


class _Reached(Exception):
    """A layer has seen what it needs; the rest of the pass is not wanted."""


class _WholePool(nn.Module):
    """Stands for the average pool of a squeeze-and-excitation while a picture goes through a network in tiles.

    First it adds up the cores of the tiles that reach it, then it gives their mean, that of the whole picture.
    """

    def __init__(self):
        super().__init__()
        self.total, self.count, self.core = 0.0, 0, None

    def forward(self, x: Tensor) -> Tensor:
        if self.core is None:
            return (self.total / self.count).to(x.dtype)
        tile_height, tile_width, top, bottom, left, right = self.core  # a core at the picture's edge goes on to the map's
        rows, columns = tile_height // x.shape[2], tile_width // x.shape[3]
        part = x[:, :, top // rows:None if bottom is None else bottom // rows,
                 left // columns:None if right is None else right // columns].double()
        self.total, self.count = self.total + part.sum((2, 3), keepdim=True), self.count + part.shape[2] * part.shape[3]
        raise _Reached


@torch.inference_mode()
def denoise_tiled(network: nn.Module, image: Tensor, device: torch.device | str = "cpu", core: int = TILE_CORE,
                  margin: int = TILE_MARGIN) -> Tensor:
    """Denoise a large picture in tiles: (1, C, H, W), uint8 or float in [0, 1], on the CPU -> (1, C, H, W) uint8 on the CPU,
    `scale` times larger where the network enlarges.

    Each tile is computed with `margin` pixels around its core (both multiples of 32), so that there are no seams; what
    squeeze-and-excitation pools over the whole picture is collected by passes over all tiles before. The memory needed is that
    of a tile, and of the picture in 8 bit. Of a SelfEnsemble the whole picture is turned, and the mean is of 8-bit images.
    The network must be in eval mode.
    """
    from torchvision.ops import SqueezeExcitation

    from data import to_float
    from models import ENCODER_STRIDE, scale_of

    if isinstance(network, SelfEnsemble):
        total: Tensor | int = 0
        for way in range(8):
            turned = denoise_tiled(network.network, network.turn(image, way), device, core, margin)
            total = network.turn_back(turned, way).to(torch.int16) + total
        return (total + 4).div_(8, rounding_mode="floor").byte()
    network = copy.copy(getattr(network, "denoiser", network))  # of a sequential network only the first half is needed
    if hasattr(network, "decoder"):
        network.classifies = False
    height, width = image.shape[-2:]
    scale, stride = scale_of(network), getattr(network, "multiple", ENCODER_STRIDE)
    places = [(max(0, y - margin), min(height, y + core + margin), max(0, x - margin), min(width, x + core + margin), y, x)
              for y in range(0, height, core) for x in range(0, width, core)]

    def run(place):
        top, bottom, left, right, _, _ = place
        tile = image[..., top:bottom, left:right]
        return network(to_float(tile, device) if tile.dtype == torch.uint8 else tile.to(device)).image

    squeezes: list[nn.Module] = []  # in the order in which they are called
    handles = [module.register_forward_hook(lambda module, *_: squeezes.append(module))
               for module in network.modules() if isinstance(module, SqueezeExcitation)]
    network(torch.zeros(1, image.shape[1], 64, 64, device=device))
    for handle in handles:
        handle.remove()
    pools = [module.avgpool for module in squeezes]
    try:
        for squeeze in squeezes:
            squeeze.avgpool = pool = _WholePool()
            for place in places:
                top, bottom, left, right, y, x = place
                padded = [-(-side // stride) * stride for side in (bottom - top, right - left)]
                pool.core = (*padded, y - top, None if y + core >= height else y + core - top,
                             x - left, None if x + core >= width else x + core - left)
                with contextlib.suppress(_Reached):
                    run(place)
            pool.core = None
        result = torch.empty(*image.shape[:2], scale * height, scale * width, dtype=torch.uint8)
        for place in places:
            top, _, left, _, y, x = (scale * value for value in place)
            tile = run(place)[..., y - top:y - top + scale * core, x - left:x - left + scale * core]
            result[..., y:y + scale * core, x:x + scale * core] = to_8bit(tile.float()).mul(255).round().byte().cpu()
    finally:
        for squeeze, pool in zip(squeezes, pools):
            squeeze.avgpool = pool
    return result


@torch.inference_mode()
def denoise_paths(network: nn.Module, paths: list[Path], output_dir: str | Path, *, size: int,
                  device: torch.device | str = "cpu", classes: list[str] | None = None, sigma: float = 0.0,
                  clip: bool = False, seed: int = 0, noise: str = "gaussian",
                  protocol: str = "own") -> tuple[list[dict], list[dict]]:
    """Denoise and classify image files of any size; returns a record per picture and one per file that failed.

    A network of one channel sees them in grey. Writes `<output_dir>/<name>_denoised.png`, and `<name>_noisy.png` where
    `sigma` > 0 adds noise; a second file of the same name counts up, `<name>_2_denoised.png`. The whole picture is denoised
    at full resolution, in tiles where it is larger than one (`denoise_tiled`). Its class comes from the same pass where both
    sides are within a factor of 2 of `size`, the training size in pixels; otherwise from a second pass on a copy whose short
    side is `size`, because a classifier knows objects at the scale it was trained on. A file that cannot be read is reported
    and skipped. The network must be in eval mode.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor
    from tqdm import tqdm

    from data import MODES, load_image, to_float
    from models import channels_of, write_file

    output_dir = Path(output_dir)
    pictures, failures = [], []
    progress = tqdm(list(zip(paths, _output_names(paths))), desc="pictures", unit="file", leave=False,
                    disable=None if len(paths) > 1 else True)
    for index, (path, name) in enumerate(progress):
        try:
            mode = MODES[channels_of(network)]
            pixels = pil_to_tensor(load_image(path).convert(mode))[None]  # (1, C, H, W) uint8
            height, width = pixels.shape[-2:]
            # A large one stays in 8 bit and on the CPU as a whole. (Group norms would see a tile, not the picture.)
            large = height * width > (TILE_CORE + 2 * TILE_MARGIN) ** 2 and not any(
                isinstance(module, nn.GroupNorm) for module in network.modules())
            noisy = pixels if large else to_float(pixels, device)
            if sigma:
                noisy = clean_and_noisy(pixels, [index], "cpu" if large else device, seed, clip, noise, protocol)[1](sigma)
            seen = _classifier_view(noisy, size)
            image = logits = None
            if large and network.denoises:
                image = denoise_tiled(network, noisy, device, TILE_CORE, TILE_MARGIN)
            elif not large and (network.denoises or seen is noisy):
                image, logits = network(noisy)
            if network.classifies and (logits is None or seen is not noisy):
                logits = network(to_float(seen, device) if seen.dtype == torch.uint8 else seen.to(device)).logits
        except (ValueError, OSError) as error:
            failures.append({"file": str(path), "error": str(error)})
            progress.write(f"{path}: skipped: {error}", file=sys.stderr)
            continue
        except (torch.OutOfMemoryError, MemoryError):
            failures.append({"file": str(path), "error": "too large for the memory of the device"})
            progress.write(f"{path}: skipped: too large for the memory of {device}; try --device cpu.", file=sys.stderr)
            continue
        record = {"file": str(path), "width_px": width, "height_px": height}
        text = f"{path} ({width}x{height})"
        for kind, result in (("noisy", noisy if sigma else None), ("denoised", image)):
            if result is not None:
                file = output_dir / f"{name}_{kind}.png"
                picture = to_picture(result[0])
                write_file(file, lambda temporary: picture.save(temporary, format="PNG"))
                record[kind] = str(file)
        if logits is not None:
            best = logits[0].float().softmax(0).topk(min(5, logits.shape[1]))
            record["classified_at_px"] = list(seen.shape[-2:])  # height, width
            record["classes"] = [{"name": _class_name(i, classes), "probability": p}
                                 for p, i in zip(best.values.tolist(), best.indices.tolist())]
            text += ": " + ", ".join(f"{c['name']} {c['probability']:.1%}" for c in record["classes"][:3])
        progress.write(text + (f" -> {record['denoised']}" if "denoised" in record else ""))
        pictures.append(record)
    return pictures, failures


def _output_names(paths: list[Path]) -> list[str]:
    """The stem of each path, counted up where another one has it: a.jpg and a.png must not write one file."""
    names, taken = [], set()
    for path in paths:
        name, number = path.stem, 1
        while name.lower() in taken:  # some file systems do not tell upper case from lower case
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def _classifier_view(image: Tensor, size: int) -> Tensor:
    """The image itself where both sides lie within a factor of 2 of `size`, or a copy whose short side is `size`."""
    sides = image.shape[-2:]
    if min(sides) * 2 >= size and max(sides) <= size * 2:
        return image
    resized = [max(1, round(side * size / min(sides))) for side in sides]
    return F.interpolate(image, size=resized, mode="bilinear", align_corners=False, antialias=True)


# -----------------------------------------------------------------------------------------------------------

FROM_CHECKPOINT = "what the checkpoint was trained for"


def build_parser() -> argparse.ArgumentParser:
    from data import NOISES, PROTOCOLS, add_data_arguments, number, whole
    from latency import default_device

    parser = argparse.ArgumentParser(
        prog="eval.py", usage="python eval.py [options]  (--help lists them)",
        description="Measure PSNR, SSIM and accuracy of a trained network at every noise level, beside those of the\n"
                    "noisy input, and its latency on this machine; or, with --input, denoise and classify your own\n"
                    "pictures. --data and --size are those of the training unless you give others.",
        epilog="examples:\n"
               "  python eval.py --checkpoint runs/train/best.pt\n"
               "  python eval.py --data my_images --split test --sigmas 0 0.1 0.2 --batch-size 8 --no-latency\n"
               "  python eval.py --input holiday_pictures --output-dir denoised",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/train/best.pt", metavar="FILE",
                        help="checkpoint that train.py wrote (default: %(default)s)")
    parser.add_argument("--output-dir", default="runs/eval", metavar="DIR",
                        help="folder for the results (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--threads", type=whole(1), metavar="N",
                        help="threads of torch on a CPU; the latency is that of the search's setting (default: torch's own)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N",
                        help="seed of the noise; data is split by the checkpoint's own seed (default: %(default)s)")
    parser.add_argument("--clip", action="store_true",
                        help="clip the noisy images to [0, 1], as a sensor does (default: not clipped)")
    parser.add_argument("--noise", choices=NOISES,
                        help="kind of the noise, see train.py --help (default: what the checkpoint was trained with)")
    parser.add_argument("--noise-protocol", choices=PROTOCOLS, default="own",
                        help="literature: every image gets numpy's RandomState(0).normal(0, sigma, (H, W, C)), as in the "
                             "published tables of Gaussian denoising; own: each image its own, from --seed "
                             "(default: %(default)s)")
    parser.add_argument("--self-ensemble", action="store_true",
                        help="denoise by the mean of eight passes, over flips and quarter turns of the image, each turned "
                             "back; the class is that of the upright image (default: one pass)")

    add_data_arguments(parser, training=False)
    # Training images are not needed: none is drawn for nothing. Grey is what the network takes.
    parser.set_defaults(data=FROM_CHECKPOINT, data_root=None, train_images=1)

    group = parser.add_argument_group("evaluation")
    group.add_argument("--split", choices=("val", "test", "all"), default="val",
                       help="part of the data to evaluate on; all: every picture below a folder, whole and without labels, "
                            "for test sets (default: %(default)s)")
    group.add_argument("--sigmas", type=number(0, 100), nargs="+", metavar="SIGMA",
                       help="noise levels, standard deviations on images in [0, 1], also as fractions: 25/255; pictures with "
                            "real noise have no others (default: 0 0.1 0.2 ... 1.0; for super-resolution 0)")
    group.add_argument("--shave", type=whole(0, 4096), metavar="PIXELS",
                       help="pixels left out of PSNR and SSIM at each border (default: 0; for super-resolution the factor)")
    group.add_argument("--luma", action=argparse.BooleanOptionalAction,
                       help="PSNR and SSIM of Y of YCbCr alone (ITU-R 601, 16 to 235), as in the super-resolution "
                            "literature; about 2 dB higher (default: all channels; for super-resolution in colour Y)")
    group.add_argument("--batch-size", type=whole(1), default=32, metavar="N",
                       help="images per batch, of no influence on the numbers; whole pictures of different sizes go "
                            "one by one (default: %(default)s)")
    group.add_argument("--no-latency", action="store_true",
                       help="do not measure the latency (in the setting of the search, or at batch 32 on CUDA, 1 on a CPU)")

    group = parser.add_argument_group("your own pictures")
    group.add_argument("--input", metavar="FILE_OR_DIR",
                       help="picture, or folder of pictures, to denoise and classify instead of an evaluation: at "
                            "full resolution, any size. The class comes from the same pass where both sides are "
                            "within a factor of 2 of the training size, otherwise from a copy whose short side is "
                            "the training size")
    group.add_argument("--sigma", type=number(0, 100), default=0.0, metavar="SIGMA",
                       help="standard deviation of noise to add to --input, on images in [0, 1], also as 25/255 (default: 0, "
                            "none)")
    return parser


def main(argv: list[str] | None = None) -> None:
    from data import SCENES, check_protocol, join_processes, load_data, load_everything, split_labels
    from latency import check_device
    from models import channels_of, check_fits, load_checkpoint, scale_of

    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = torch.device(check_device(join_processes(args.device)))
        if args.threads:
            torch.set_num_threads(args.threads)
        network, checkpoint = load_checkpoint(args.checkpoint, device)
        scale = scale_of(network)
        if args.sigmas is None:
            args.sigmas = list(SIGMAS) if scale == 1 else [0.0]
        if args.shave is None:
            args.shave = 0 if scale == 1 else scale
        if args.luma is None:
            args.luma = scale > 1 and channels_of(network) == 3
        size, flags = args.size or checkpoint["size"], checkpoint.get("flags", {})
        grey = channels_of(network) == 1
        check_protocol(args.noise or flags.get("noise", "gaussian"), args.noise_protocol)
        if args.self_ensemble:
            network = SelfEnsemble(network)
        how = dict(device=device, seed=args.seed, clip=args.clip, noise=args.noise or flags.get("noise", "gaussian"),
                   protocol=args.noise_protocol)
        if args.input is not None:
            failures = _run_input(network, checkpoint["classes"], Path(args.input), Path(args.output_dir), size=size,
                                  sigma=args.sigma, how=how,
                                  about={"checkpoint": args.checkpoint, "epoch": checkpoint["epoch"]})
            sys.exit(1 if failures else 0)
        name = checkpoint["data"] if args.data == FROM_CHECKPOINT else args.data
        if args.split == "all":
            data = load_everything(name, size=size, grey=grey)
        else:
            if grey and name in SCENES:
                raise ValueError(f"The network takes grey images, and {name} is drawn in colour; give an image folder with "
                                 "--data.")
            root = args.data_root if args.data_root is not None else flags.get("data_root", "data")
            folders = args.train_folders or (flags.get("train_folders") if name == checkpoint["data"] else None)
            data = load_data(name, root=root, size=size, seed=checkpoint["seed"], augment=False,
                             train_images=args.train_images, val_images=args.val_images, grey=grey, train_folders=folders)
        dataset = data.test if args.split == "test" else data.val
        _check_data(network, checkpoint["classes"], data, dataset, args)
        if data.classes is not None:
            boxes = split_labels(torch.as_tensor(dataset[0][1])[None], device)[1]
            check_fits(network, checkpoint["record"]["model"], data.size // scale, boxes)
        _run_evaluation(network, checkpoint["classes"], dataset, Path(args.output_dir), size=size, sigmas=args.sigmas,
                        shave=args.shave, y_only=args.luma, batch_size=args.batch_size, workers=args.workers,
                        latency_setting=None if args.no_latency else _latency_setting(checkpoint, args.device, size // scale),
                        about={"checkpoint": args.checkpoint, "epoch": checkpoint["epoch"], "data": data.name,
                               "split": args.split, "data_seed": checkpoint["seed"]}, how=how)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"\nStopped; what is in {args.output_dir} may be from an earlier run.", file=sys.stderr)
        sys.exit(130)


def _latency_setting(checkpoint: dict, device: str, size: int):
    """The setting that the network was searched for, so that the latency compares with its target, or the default."""
    from latency import this_setting

    found = checkpoint["record"].get("latency", {}).get("setting", {})
    if found.get("device_type") != torch.device(device).type:
        found = {}
    return this_setting(device, size=size, num_classes=len(checkpoint["classes"] or []), batch=found.get("batch"),
                        threads=found.get("threads", 1), dtype=found.get("dtype", "float32"),
                        mode=found.get("mode", "eager"))


def _check_data(network: nn.Module, classes: list[str] | None, data, dataset, args: argparse.Namespace) -> None:
    """ValueError where the network cannot be measured on the data, or not in the way that is asked for."""
    from data import is_paired
    from models import scale_of

    if dataset is None:
        raise ValueError(f"The data {data.name} has no {args.split} split; use --split val.")
    if scale_of(network) > 1 and is_paired(dataset):
        raise ValueError(f"{data.name} holds pairs of one size, noisy and clean, and the network makes images larger; give a folder "
                         "of clean images.")
    if args.luma and data.channels != 3:
        raise ValueError("--luma is of colour images, and the network is for grey ones: leave it out.")
    if not network.classifies:
        return
    if data.classes is None:
        if not network.denoises:
            raise ValueError(f"The data {data.name} has no labels, and the network can do nothing but classify; "
                             "give a folder of class folders with --data.")
    elif classes is None:
        print("note: the network was trained without labels; its accuracy means nothing.", file=sys.stderr)
    elif len(data.classes) != len(classes):
        raise ValueError(f"The network knows {len(classes)} classes but the data {data.name} has "
                         f"{len(data.classes)}; give the data it was trained for with --data.")
    elif list(data.classes) != list(classes):
        print(f"note: the classes of {data.name} have other names than those the network was trained for; they are "
              "compared in their order.", file=sys.stderr)


def _run_evaluation(network: nn.Module, classes: list[str] | None, dataset, output_dir: Path, *, size: int,
                    sigmas: list[float], shave: int, y_only: bool, batch_size: int, workers: int, latency_setting,
                    about: dict, how: dict) -> None:
    """Measure the network, write metrics.json, table.txt and grid.png, print the table.

    how: device, seed, clip, noise and protocol of `evaluate` and `save_grid`.
    """
    from data import is_paired, make_loader, rank_and_world
    from latency import device_name
    from models import count_macs, count_parameters, provenance, scale_of, write_file, write_json

    output_dir.mkdir(parents=True, exist_ok=True)  # fail before the work, not after
    device = how["device"]
    loader = make_loader(dataset, batch_size, workers=workers, device=device)
    first = rank_and_world()[0] == 0
    measured = evaluate(network, loader, sigmas=sigmas, shave=shave, y_only=y_only, progress=first and sys.stderr.isatty(),
                        **how)
    if not first:
        return
    one_pass = network.network if isinstance(network, SelfEnsemble) else network
    metrics = {"format": EVAL_FORMAT, "version": EVAL_VERSION, "made": provenance(device_name(device), how["seed"]), **about,
               **measured,
               "network": {"parameters": count_parameters(one_pass), "macs": count_macs(one_pass, size // scale_of(network)),
                           "size_px": size // scale_of(network)},
               "latency": None}
    if latency_setting is not None:
        from latency import measure_network

        timing = measure_network(one_pass, latency_setting)
        metrics["latency"] = {**vars(timing), **vars(latency_setting)}

    table = format_table(metrics)
    write_json(output_dir / "metrics.json", strict_json(metrics))
    write_file(output_dir / "table.txt", lambda temporary: temporary.write_text(table + "\n"))
    shown = sorted({sigma for sigma in sigmas if sigma > 0} or {0.0})
    rows = min(5, len(shown))
    shown = [shown[round(row * (len(shown) - 1) / max(1, rows - 1))] for row in range(rows)]
    if is_paired(dataset):
        shown = ["real"] * min(5, len(dataset))
    save_grid(output_dir / "grid.png", network, dataset, sigmas=shown, classes=classes, **how)
    print(table)
    print(f"wrote metrics.json, table.txt and grid.png to {output_dir}")


def _run_input(network: nn.Module, classes: list[str] | None, source: Path, output_dir: Path, *, size: int,
               sigma: float, about: dict, how: dict) -> list[dict]:
    """Denoise and classify the file or the folder `source`, write predictions.json; returns the files that failed.

    how: device, seed, clip, noise and protocol of `denoise_paths`.
    """
    from data import list_images
    from latency import device_name
    from models import provenance, write_json

    if source.is_dir():
        paths = [path for path in list_images(source) if output_dir.resolve() not in path.resolve().parents]
    elif source.exists():
        paths = [source]
    else:
        raise ValueError(f"There is no file or folder {source}; give a picture or a folder of pictures with --input.")
    if not paths:
        raise ValueError(f"The folder {source} holds no picture (those in --output-dir are left out); give another "
                         "--input.")
    output_dir.mkdir(parents=True, exist_ok=True)
    pictures, failures = denoise_paths(network, paths, output_dir, size=size, classes=classes, sigma=sigma, **how)
    write_json(output_dir / "predictions.json", {
        "format": PREDICTIONS_FORMAT, "version": PREDICTIONS_VERSION,
        "made": provenance(device_name(how["device"]), how["seed"]), **about, "sigma_added": sigma, "noise": how["noise"],
        "noise_protocol": how["protocol"], "noise_clipped": how["clip"], "self_ensemble": isinstance(network, SelfEnsemble),
        "training_size_px": size,
        "pictures": pictures, "failures": failures})
    print(f"wrote predictions.json and the pictures to {output_dir}")
    if failures:
        print(f"{len(failures)} of {len(paths)} files could not be used: {', '.join(f['file'] for f in failures)}",
              file=sys.stderr)
    return failures


if __name__ == "__main__":
    main()
