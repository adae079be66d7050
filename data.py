"""Images for joint denoising and classification: drawn digits, MNIST scenes, image folders, noise, loaders.

    python data.py --data digits --output preview.png     # look at the images and their noisy versions
    python data.py --data path/to/images --size 128       # check that a folder of your own is understood

Reads the image files of a folder (or MNIST), writes nothing but the preview. Everything random comes from a
seed: the same seed gives the same images, splits, order, crops and noise. Works when copied alone into
another project (torch, torchvision, numpy, Pillow). Scenes and noise follow Markhorst 2024: a coloured digit,
or as there two white ones, on a constant grey background from [0.1, 0.3]; sigma ~ U[0, 1] per image, not clipped.
Signal-dependent noise, and folders of pictures with real noise beside clean ones, are there too.
"""
import argparse
import atexit
import copy
import datetime
import functools
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision import datasets, utils
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

MAX_PIXELS = 200_000_000  # a larger image is more likely a mistake (or an attack) than a photograph
CACHE_BYTES = 2 * 2**30  # decoded images kept in memory
DIGIT = 28  # pixels, height and width of a digit of MNIST
SUPERSAMPLING = 4  # digits are drawn this many times larger, then averaged down
LAYOUTS = ("these layouts work: DIR/train/CLASS/ and DIR/val/CLASS/, or DIR/CLASS/ with two or more classes, "
           "or, without labels, images directly in DIR/train (and DIR/val, DIR/test) or in DIR; or, for real noise, in "
           "each of these, instead of images, noisy/ and clean/ with the same file names, or x_noisy.png beside x_clean.png")
# Files of a pair differ in one word of their names: that of the noisy one, that of the clean one.
PAIR_WORDS = (("real", "mean"), ("noisy", "clean"), ("noisy", "gt"))
MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels; L is ITU-R 601 luma, (299 R + 587 G + 114 B) / 1000


class DataError(ValueError):
    """A mistake in the user's data, told in one sentence."""

    def __init__(self, message):
        # A worker process of a loader wraps the sentence in its traceback; keep the sentence.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


@dataclass
class Data:
    """Datasets of one source: dataset[i] -> (uint8 (C, H, W), label or -1); dataset.targets is a list.

    Of pairs (clean, noisy) the images are uint8 (2, C, H, W), see split_pair.
    """
    name: str
    train: Dataset | None
    val: Dataset
    test: Dataset | None
    classes: list[str] | None  # None: no labels, fit for denoisers only
    size: int  # side of the training images in pixels
    channels: int = 3


def mix(*numbers):
    """One well mixed seed in [0, 2**63) from several integers."""
    sequence = np.random.SeedSequence([number % 2**32 for number in numbers])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


# --- Processes ----------------------------------------------------------------------------------------------

def join_processes(device):
    """Join the processes that torchrun started, if it did; returns the device of this one (NCCL on CUDA, gloo on CPUs).

    All but the first print nothing.
    """
    if "LOCAL_RANK" not in os.environ or "MASTER_ADDR" not in os.environ or dist.is_initialized():
        return device
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # The others wait while the first one times a device, which can take longer than the default of ten minutes.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    if not cuda:  # else Python may end before gloo's threads, and abort; NCCL's end would wait for processes that may have failed
        atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def rank_and_world():
    """The number of this process and how many there are: (0, 1) without torchrun."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def from_first(make):
    """make() of the first process, on all of them."""
    rank, world = rank_and_world()
    result = [make() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(result)
    return result[0]


# --- Noise --------------------------------------------------------------------------------------------------

def sample_sigma(count, low, high, generator, device, levels=0):
    """Noise levels ~ U[low, high], one per image: (count,) float32 on device (images in [0, 1]).

    levels: of so many values, evenly spaced from low to high, instead (0: of all).
    """
    how = dict(generator=generator, device=generator.device if generator else device)
    unit = torch.randint(levels, (count,), **how) / max(1, levels - 1) if levels else torch.rand(count, **how)
    return (low + (high - low) * unit).to(device)


def _gaussian(images, sigma, normal, poisson):
    """images + sigma * N(0, 1)."""
    return images + sigma * normal


def _poisson_gaussian(images, sigma, normal, poisson):
    """a * Poisson(x / a) + b * N(0, 1): photons and the noise of reading them; variance a * x + b^2 (Foi et al. 2008).

    a = 0.9 sigma^2 and b^2 = 0.1 sigma^2, so that sigma is the standard deviation at white (our choice: the thesis, 3.2.1,
    describes the noise and gives no numbers). Of x below 0 no photons come.
    """
    sigma = torch.as_tensor(sigma, dtype=images.dtype, device=images.device)
    # Below 0.001 the photons are those of 0.001, scaled: so many are as good as Gaussian, and more overflow on CUDA.
    least = sigma.clamp(min=1e-3)
    gain, light = 0.9 * least.square(), images.clamp(min=0)
    shot = (gain * poisson(light / gain) - light) * (sigma / least)
    return images + shot + 0.1 ** 0.5 * sigma * normal


# name -> (function of images (B, C, H, W), sigma (a number or (B, 1, 1, 1)), standard normal noise, a function that draws
# photons around a rate, of the shape of the images; words for reports)
NOISES = {"gaussian": (_gaussian, "Gaussian, sigma on [0, 1]"),
          "poisson-gaussian": (_poisson_gaussian, "Poisson-Gaussian, sigma on [0, 1] that of white")}


def _column(sigma):
    """sigma of each image (B,) as (B, 1, 1, 1); a number stays one."""
    return sigma.view(-1, 1, 1, 1) if isinstance(sigma, torch.Tensor) and sigma.ndim else sigma


def add_noise(images, sigma, generator=None, clip=False, kind="gaussian"):
    """images with noise of a kind of NOISES, drawn on the device of images or of the generator.

    images (B, C, H, W) float in [0, 1]; sigma a number or (B,). The result is clipped to [0, 1] only when
    asked for: the paper does not say; here the noise stays as it is by default.
    """
    device = generator.device if generator else images.device
    # empty_like keeps channels-last, so that the sum needs no change of layout
    normal = torch.empty_like(images, device=device).normal_(generator=generator).to(images.device)
    if isinstance(sigma, torch.Tensor):
        sigma = _column(sigma.to(images))
    noisy = NOISES[kind][0](images, sigma, normal,
                            lambda rate: torch.poisson(rate.to(device), generator=generator).to(rate.device))
    return noisy.clamp_(0, 1) if clip else noisy


@dataclass(frozen=True)
class Noise:
    """The noise of a training or a search: sigma ~ U[0, sigma_max] per image, for images in [0, 1]; ValueError for a bad one.

    levels: of so many values, evenly spaced from 0 to sigma_max, instead (0: of all). sigmas: one of these instead of
    both; a single one is a fixed level. kind: one of NOISES. scale: the input is also so many times smaller than the clean
    image (super-resolution; see shrink), before there is noise.
    """
    sigma_max: float = 1.0
    levels: int = 0
    sigmas: tuple[float, ...] = ()
    kind: str = "gaussian"
    scale: int = 1

    def __post_init__(self):
        if self.kind not in NOISES:
            raise ValueError(f"the noise {self.kind!r} is unknown; known are {', '.join(NOISES)}")
        if min(self.sigma_max, *self.sigmas, self.levels) < 0:
            raise ValueError("sigmas and levels must not be negative")
        if self.levels == 1:
            raise ValueError("a single noise level, evenly spaced, would be 0: give --sigmas instead of --sigma-levels 1")

    def __bool__(self):
        """Whether there is any noise."""
        return max(self.sigmas, default=self.sigma_max) > 0

    def sample(self, count, generator, device):
        """The noise levels of `count` images: (count,) float32 on device."""
        if not self.sigmas:
            return sample_sigma(count, 0.0, self.sigma_max, generator, device, self.levels)
        how = dict(generator=generator, device=generator.device if generator else device)
        places = torch.randint(len(self.sigmas), (count,), **how)
        return torch.tensor(self.sigmas, dtype=torch.float32, device=places.device)[places].to(device)

    def validation_sigma(self, place):
        """The level of the validation image at a place of its split: `sigmas` in turn, or 11 even steps of [0, sigma_max]."""
        return self.sigmas[place % len(self.sigmas)] if self.sigmas else self.sigma_max * (place % 11) / 10

    def add(self, images, sigma, generator=None, clip=False):
        """As add_noise, of this kind."""
        return add_noise(images, sigma, generator, clip, self.kind)


def shrink(images, scale):
    """images (B, C, H, W) in [0, 1], made smaller by a whole factor as the super-resolution literature does: H, W / scale.

    MATLAB's imresize: bicubic (a = -0.5), antialiased, mirrored at the borders, rounded to 8 bit. H and W must be multiples.
    """
    if scale == 1:
        return images
    if images.shape[-2] % scale or images.shape[-1] % scale:
        raise ValueError(f"an image of {images.shape[-1]} x {images.shape[-2]} pixels cannot be made {scale} times smaller")
    edge = 2 * scale  # as far as the kernel reaches; Pillow and torch cut it off there instead
    for dim in (-2, -1):
        side = images.shape[dim]
        places = torch.arange(-edge, side + edge, device=images.device) % (2 * side)
        images = images.index_select(dim, torch.minimum(places, 2 * side - 1 - places))
    small = torch.nn.functional.interpolate(images, scale_factor=1 / scale, mode="bicubic", align_corners=False,
                                            antialias=True)[..., 2:-2, 2:-2]
    return small.clamp(0, 1).mul(255).round().div(255)


def cut_to_multiple(images, scale):
    """images (B, C, H, W) without the last rows and columns that make H and W no multiples of scale."""
    height, width = (side - side % scale for side in images.shape[-2:])
    return images[..., :height, :width]


def evaluation_noise(shape, index, seed=0):
    """Standard normal noise of evaluation image `index`: (C, H, W) float32 on the CPU.

    Depends on nothing but (shape, index, seed), so neither on batch size nor on device; numpy's generator
    gives the same numbers on every kind of processor.
    """
    rng = np.random.default_rng(mix(seed, index))
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def literature_noise(shape, index=0, seed=0):
    """The fixed test noise of the denoising literature: numpy's RandomState(0) for every image, drawn as (H, W, C).

    (C, H, W) float32 on the CPU, standard normal. index and seed have no influence.
    """
    channels, height, width = shape
    return torch.from_numpy(np.random.RandomState(0).normal(0, 1, (height, width, channels))).permute(2, 0, 1).float()


PROTOCOLS = {"own": evaluation_noise, "literature": literature_noise}  # name -> the noise of an evaluation image


def check_protocol(kind, protocol):
    """ValueError where a kind of noise and a protocol do not go together."""
    if protocol != "own" and kind != "gaussian":
        raise ValueError(f"The noise protocol {protocol!r} is of Gaussian noise: take --noise gaussian, or "
                         "--noise-protocol own.")


def evaluation_draw(images, places, seed=0, kind="gaussian", protocol="own"):
    """Noise for the images (B, C, H, W), 8-bit values in [0, 1], at these places of a split.

    Returns a function of sigma, a number or (B,), that gives the noisy images. The noise is the same for every batch
    size and device, and scaled by sigma where it is Gaussian. ValueError as in check_protocol.
    """
    check_protocol(kind, protocol)
    normal = torch.stack([PROTOCOLS[protocol](images.shape[1:], place, seed) for place in places])
    add, _ = NOISES[kind]
    if kind == "gaussian":
        normal = normal.to(images.device, memory_format=torch.channels_last)
        return lambda sigma: add(images, _column(sigma), normal, None)
    # On the CPU and from the 8-bit values: the last digit of a rate may differ on another device.
    pixels = images.cpu().mul(255).round().div(255)

    def noisy(sigma):
        generators = [np.random.default_rng(mix(seed, place, 1)) for place in places]

        def poisson(rates):
            return torch.stack([torch.from_numpy(generator.poisson(rate.numpy()))
                                for generator, rate in zip(generators, rates.contiguous())]).float()
        sigma = _column(sigma.cpu()) if isinstance(sigma, torch.Tensor) else sigma
        return add(pixels, sigma, normal, poisson).to(images.device, memory_format=torch.channels_last)
    return noisy


# --- Splits -------------------------------------------------------------------------------------------------

def _by_class(targets, seed):
    """Indices of each class in a seeded random order."""
    targets = np.asarray(targets, dtype=np.int64)
    rng = np.random.default_rng(mix(seed, len(targets)))
    return [rng.permutation(np.flatnonzero(targets == label)) for label in np.unique(targets)]


def stratified_split(targets, fraction, seed):
    """Split range(len(targets)) into two disjoint sorted lists, with `fraction` of each class in the first.

    A class with two or more members has at least one on either side. Unlabelled images (-1) are one class.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction of a split must lie between 0 and 1, not {fraction}")
    first, second = [], []
    for members in _by_class(targets, seed):
        count = int(fraction * len(members) + 0.5)
        if len(members) >= 2:
            count = min(max(count, 1), len(members) - 1)
        first += members[:count].tolist()
        second += members[count:].tolist()
    return sorted(first), sorted(second)


def _choose(targets, count, seed):
    """Sorted indices of `count` images (None: all), in proportion to the classes; fewer are part of more."""
    if count is None or count >= len(targets):
        return list(range(len(targets)))
    if count < 1:
        raise DataError(f"the number of images must be at least 1, not {count}")
    # Rank 0 of every class comes first, so that each class is there once before the proportions rule.
    ranked = [(rank / len(members), int(index)) for members in _by_class(targets, seed)
              for rank, index in enumerate(members)]
    return sorted(index for _, index in sorted(ranked, key=lambda pair: pair[0])[:count])


# --- Scenes: one digit on a grey background -----------------------------------------------------------------

def _curve(*points):
    """Smooth curve through points (Catmull-Rom spline): (n, 2)."""
    p = np.array([points[0], *points, points[-1]])
    t = np.linspace(0, 1, 6, endpoint=False)[:, None]
    a, b, c, d = (p[i:len(p) - 3 + i, None] for i in range(4))  # (segments, 1, 2)
    parts = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.concatenate([parts.reshape(-1, 2), p[-1:]])


def _line(*points):
    """Straight lines between points, in steps short enough to be bent by the distortion: (n, 2)."""
    t = np.linspace(0, 1, 5, endpoint=False)[:, None]
    parts = [np.array(a) + (np.array(b) - np.array(a)) * t for a, b in zip(points, points[1:])]
    return np.concatenate([*parts, np.array(points[-1:], dtype=float)])


def _arc(cx, cy, rx, ry, start, stop):
    """Part of an ellipse, angles in degrees, clockwise from the right: (n, 2)."""
    angle = np.radians(np.linspace(start, stop, max(3, int(abs(stop - start) / 14))))
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


@functools.cache
def _digit_strokes():
    """For each digit its ways of writing: lists of strokes, (n, 2) points (x, y), 0 <= y <= 1 downwards."""
    bowl_of_3 = _curve((.28, .46), (.58, .54), (.68, .74), (.54, .94), (.27, 1), (.02, .88))
    bowl_of_5 = _curve((.10, .46), (.36, .36), (.62, .48), (.67, .71), (.53, .93), (.26, 1), (.02, .90))
    loop_of_9 = _arc(.33, .28, .29, .28, 0, -360)
    return [
        [[_arc(.35, .5, .33, .5, -100, 260)]],
        [[_line((.35, 0), (.35, 1))],
         [_line((.10, .27), (.36, 0), (.36, 1))],
         [_line((.10, .25), (.36, 0), (.36, 1)), _line((.06, 1), (.66, 1))]],
        [[_curve((.04, .24), (.13, .07), (.35, 0), (.59, .09), (.63, .30), (.48, .56), (.24, .80), (.03, 1)),
          _line((.03, 1), (.68, 1))],
         [_curve((.05, .20), (.18, .04), (.40, 0), (.60, .12), (.60, .34), (.42, .64), (.20, .92), (.06, .98),
                 (.04, .86), (.16, .82), (.36, .93), (.54, 1), (.72, .92))]],
        [[_curve((.05, .14), (.28, 0), (.56, .08), (.60, .29), (.28, .46)), bowl_of_3],
         [_line((.04, 0), (.62, 0), (.28, .46)), bowl_of_3]],
        [[_line((.52, 1), (.52, 0), (.02, .68), (.74, .68))],
         [_line((.14, .02), (.05, .58), (.70, .58)), _line((.54, .06), (.50, 1))]],
        [[_line((.64, 0), (.15, 0), (.10, .46)), bowl_of_5]],
        [[_curve((.56, 0), (.28, .17), (.08, .48), (.05, .76), (.17, .96), (.38, 1), (.60, .88), (.64, .67),
                 (.48, .51), (.26, .53), (.07, .72))]],
        [[_line((.02, 0), (.66, 0), (.26, 1))],
         [_line((.02, 0), (.66, 0), (.26, 1)), _line((.20, .52), (.62, .52))]],
        [[_arc(.35, .235, .26, .235, 90, 450), _arc(.35, .735, .33, .265, -90, 270)],
         [_curve((.58, .12), (.38, 0), (.14, .10), (.14, .30), (.36, .47), (.60, .66), (.60, .90), (.34, 1),
                 (.08, .88), (.10, .66), (.34, .48), (.56, .30), (.60, .12), (.56, .06))]],
        [[loop_of_9, _line((.62, .22), (.56, 1))],
         [loop_of_9, _curve((.62, .24), (.63, .60), (.52, .90), (.28, 1), (.06, .92))]],
    ]


def _distort(points, rng):
    """Points (n, 2) after a random elastic displacement and affine map (rotation up to 15 degrees)."""
    # Elastic: three sine waves of random direction, each about one period per digit
    waves = rng.uniform(-1, 1, (2, 3)) * 1.2
    shift = np.sin(2 * np.pi * (points @ waves + rng.random(3)))  # (n, 3)
    points = points - (0.35, 0.5) + shift @ rng.normal(0, 0.025, (3, 2))
    angle, shear, stretch = rng.uniform((-15, -0.25, 0.85), (15, 0.25, 1.2))
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    affine = np.array([[stretch, shear], [0, 1]]) @ np.array([[cos, -sin], [sin, cos]])
    return points @ affine.T


def _draw_digit(label, height, limit, rng):
    """A digit as if handwritten: coverage (h, w) uint8 with h = height, less where w would exceed `limit`."""
    ways = _digit_strokes()[label]
    strokes = ways[rng.integers(len(ways))]
    points = _distort(np.concatenate(strokes), rng)  # all strokes together, so that they stay joined
    pen = rng.uniform(0.08, 0.17) * height
    low, extent = points.min(0), np.ptp(points, 0)
    scale = min((height - pen) / extent[1], (limit - pen) / extent[0])
    width, height = np.ceil(extent * scale + pen).astype(int)
    points = ((points - low) * scale + pen / 2) * SUPERSAMPLING
    stroke_width = max(1, round(pen * SUPERSAMPLING))
    radius = (stroke_width - 1) / 2  # Pillow's ellipse covers both ends of its box
    mask = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for stroke in np.split(points, np.cumsum([len(s) for s in strokes])[:-1]):
        draw.line(stroke.ravel().tolist(), fill=255, width=stroke_width)
        for box in np.concatenate([stroke - radius, stroke + radius], axis=1).tolist():
            draw.ellipse(box, fill=255)  # round ends and joints
    return np.asarray(mask.reduce(SUPERSAMPLING))


def _fit_digit(digit, height, limit):
    """An MNIST digit (28, 28) uint8, cut to its ink and resized: (h, w) uint8, sizes as in _draw_digit."""
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    digit = digit[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    scale = min(height / digit.shape[0], limit / digit.shape[1])
    size = [max(1, round(side * scale)) for side in digit.shape[::-1]]
    return np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC))


def _render_scene(digit_mask, size, rng):
    """One scene, (3, size, size) uint8; digit_mask(height, limit) gives the coverage of the digit."""
    height = max(6, round(rng.uniform(0.45, 0.85) * size))
    background, brightness, saturation = rng.uniform((0.1, 0.7, 0), (0.3, 1.0, 0.9))
    tint = rng.random(3)
    ink = brightness * (1 - saturation * (1 - tint / tint.max()))  # (3,), its maximum is `brightness`
    x, y = rng.random(2)
    mask = digit_mask(height, round(0.85 * size))  # (h, w)
    top, left = int(y * (size - mask.shape[0] + 1)), int(x * (size - mask.shape[1] + 1))
    scene = np.full((3, size, size), round(255 * background), dtype=np.uint8)
    paint = (background * 255 + 0.5) + mask * (ink - background)[:, None, None]  # + 0.5: rounded, not cut
    scene[:, top:top + mask.shape[0], left:left + mask.shape[1]] = paint
    return scene


class Scenes(Dataset):
    """Scenes kept in memory: images uint8 (N, 3, size, size), targets a list of N labels."""

    def __init__(self, images, targets):
        self.images, self.targets = images, targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


class Pairs(Dataset):
    """Scenes with two digits: images uint8 (N, 1, size, size), rows int64 (N, 2, 5): label, left, top, right, bottom.

    dataset[i] -> (uint8 (3, size, size), its rows (2, 5)); see split_labels. targets: the label of the first digit.
    """

    def __init__(self, images, rows):
        self.images, self.rows = images, rows
        self.targets = rows[:, 0, 0].tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index].expand(3, -1, -1), self.rows[index]


def _render_pair(digits, labels, size, rng):
    """Two digits, (28, 28) uint8, at random places on one grey: scene (1, size, size) uint8, rows (2, 5).

    Markhorst 2024, section 3: a constant grey from [0.1, 0.3], no overlap of the digits' boxes.
    """
    background = rng.uniform(0.1, 0.3)
    scene = np.full((1, size, size), round(255 * background), dtype=np.uint8)
    while True:
        corners = rng.integers(0, size - DIGIT + 1, (2, 2))  # (left, top) of each
        if np.abs(corners[0] - corners[1]).max() >= DIGIT:
            break
    for digit, (left, top) in zip(digits, corners):
        scene[0, top:top + DIGIT, left:left + DIGIT] = (background * 255 + 0.5) + digit * (1 - background)
    return scene, [[label, left, top, left + DIGIT, top + DIGIT] for label, (left, top) in zip(labels, corners)]


def _make_pairs(count, size, seed, split, two_digits):
    """Scenes of these counts, each by (seed, split, index) alone. two_digits(rng) -> ([mask, mask], [label, label])."""
    if size < 2 * DIGIT:
        raise DataError(f"two digits of {DIGIT} pixels need images of {2 * DIGIT} pixels or more, not {size}")
    images, rows = torch.empty(count, 1, size, size, dtype=torch.uint8), torch.empty(count, 2, 5, dtype=torch.int64)
    for index in range(count):
        rng = np.random.default_rng([seed % 2**32, split, index])
        scene, row = _render_pair(*two_digits(rng), size, rng)
        images[index], rows[index] = torch.from_numpy(scene), torch.tensor(np.array(row))
    return Pairs(images, rows)


def _framed(digit):
    """A drawn digit in the middle of (28, 28), as in MNIST."""
    frame = np.zeros((DIGIT, DIGIT), dtype=np.uint8)
    top, left = (DIGIT - digit.shape[0]) // 2, (DIGIT - digit.shape[1]) // 2
    frame[top:top + digit.shape[0], left:left + digit.shape[1]] = digit
    return frame


def _load_digit_pairs(root, size, seed, train_images, val_images):
    """Pairs of drawn digits: 4,000 scenes for training and 1,000 for validation unless stated."""
    def two_digits(rng):
        labels = rng.integers(0, 10, 2).tolist()
        return [_framed(_draw_digit(label, 20, 20, rng)) for label in labels], labels
    return (_make_pairs(train_images or 4000, size, seed, 2, two_digits),
            _make_pairs(val_images or 1000, size, seed, 3, two_digits))


def _load_mnist_pairs(root, size, seed, train_images, val_images):
    """Pairs of MNIST digits: 25,000 scenes from its training set and 5,000 from its test set unless stated.

    Markhorst 2024 makes 30,000 scenes and does not say how they are split; here no digit is in both parts.
    """
    def split(number, count):
        digits, targets = _read_mnist(root, train=number == 2)

        def two_digits(rng):
            chosen = rng.integers(0, len(targets), 2).tolist()
            return [digits[i] for i in chosen], [targets[i] for i in chosen]
        return _make_pairs(count, size, seed, number, two_digits)
    return split(2, train_images or 25000), split(3, val_images or 5000)


def _make_scenes(targets, indices, size, seed, split, masks):
    """Scenes of these indices, each by (seed, split, index) alone. masks(index, rng) -> digit_mask."""
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    for image, index in zip(images.numpy(), indices):
        rng = np.random.default_rng([seed % 2**32, split, index])
        image[:] = _render_scene(masks(index, rng), size, rng)
    return Scenes(images, [int(targets[i]) for i in indices])


def _load_digits(root, size, seed, train_images, val_images):
    """Drawn digits, the classes in turn: 4,000 for training and 1,000 for validation unless stated."""
    def split(number, count, default):
        count = default if count is None else count
        if count < 1:
            raise DataError(f"the number of images must be at least 1, not {count}")
        return _make_scenes([i % 10 for i in range(count)], range(count), size, seed, number,
                            lambda i, rng: functools.partial(_draw_digit, i % 10, rng=rng))
    return split(0, train_images, 4000), split(1, val_images, 1000)


def _read_mnist(root, train):
    """MNIST's training or test set: digits (N, 28, 28) uint8, a list of labels."""
    if not (Path(root) / "MNIST").is_dir():
        from_first(lambda: _open_mnist(root, train) and None)  # one process downloads
    return _open_mnist(root, train)


def _open_mnist(root, train):
    try:
        try:
            mnist = datasets.MNIST(root, train=train)
        except RuntimeError:  # not there yet
            mnist = datasets.MNIST(root, train=train, download=True)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise DataError(f"MNIST was not found under {root} and could not be downloaded ({reason[0]}): "
                        "give its folder with --data-root, or use --data digits") from None
    return mnist.data.numpy(), mnist.targets.tolist()


def _load_mnist(root, size, seed, train_images, val_images):
    """The same scenes from MNIST: for training from its training set, for validation from its test set."""
    def split(number, count):
        digits, targets = _read_mnist(root, train=number == 0)
        return _make_scenes(targets, _choose(targets, count, seed), size, seed, number,
                            lambda i, rng: functools.partial(_fit_digit, digits[i]))
    return split(0, train_images), split(1, val_images)


# One entry per source of scenes: name -> (function of root, size, seed, training and validation images; default size)
SCENES = {"digits": (_load_digits, 64), "mnist": (_load_mnist, 64),
          "digit-pairs": (_load_digit_pairs, 96), "mnist-pairs": (_load_mnist_pairs, 96)}


# --- Image folders ------------------------------------------------------------------------------------------

def load_image(path):
    """Read any image file as an upright 8-bit RGB PIL image; DataError names a missing, damaged or huge file.

    Transparent pixels are composited over white, as most viewers and web pages show them. 16-bit grey is
    divided by 257; floating-point pixels are taken as [0, 1] and clipped. Of an animation, the first frame.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no image file {path}")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's limit is lower than ours
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"the image {path} has {image.width} x {image.height} pixels, more than the "
                                f"{MAX_PIXELS // 10**6} million that are read: make it smaller or remove it")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds: OSError, SyntaxError ...
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"the image {path} is damaged or of an unknown kind ({reason}): "
                        "replace or remove it") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(image):
    """8-bit RGB of a loaded PIL image of any mode."""
    if image.mode.startswith("I"):  # 16 bits (some kept in 32); Pillow's conversion would turn them white
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray((grey.clip(0, 255) + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image), nan=0.0).clip(0, 1) * 255
        return Image.fromarray((grey + 0.5).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def list_images(folder, recursive=False):
    """Image files of a folder, sorted, without hidden ones; DataError when there is no such folder.

    Links are followed, but none that leads to where one was already, or to a folder that holds this one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    found, seen, above = [], set(), set(folder.resolve().parents)
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in seen or real in above:
            subfolders.clear()
            continue
        seen.add(real)
        # changing the list in place is how os.walk is told where to go on
        subfolders[:] = [s for s in subfolders if recursive and not s.startswith(".")]
        found += [Path(parent, name) for name in files
                  if name.lower().endswith((*IMG_EXTENSIONS, ".gif")) and not name.startswith(".")]
    return sorted(found)


class Pictures(Dataset):
    """Image files read when asked for: transform(PIL image) -> uint8 (C, H, W); None: the whole image.

    noisy: the files of the same pictures with real noise; items are then uint8 (2, C, H, W), (clean, noisy), both
    transformed alike. crops: each picture comes so many times an epoch. A random transform depends on (seed, epoch,
    index) alone, whatever the number of workers; see set_epoch. Decoded images are kept in memory as long as they fit
    into CACHE_BYTES (of all workers together).
    """

    def __init__(self, paths, targets=None, transform=None, seed=0, channels=3, noisy=None, crops=1):
        self.paths, self.noisy, self.crops = list(paths), noisy, crops
        self.targets = ([-1] * len(self.paths) if targets is None else list(targets)) * crops
        self.transform, self.seed, self.mode = transform or v2.PILToTensor(), seed, MODES[channels]
        self.whole = transform is None  # images keep their own sizes, so they cannot share a batch
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # running workers see it change
        self.decoded, self.decoded_bytes = {}, [0]  # shared by twins, the count too

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        label, images = self.targets[index], self._load(index % len(self.paths))
        with torch.random.fork_rng(devices=[]):
            for place, image in enumerate(images):
                # not torch.manual_seed, which would also reset the generator of the GPU
                torch.default_generator.manual_seed(mix(self.seed, int(self.epoch), index))
                images[place] = self.transform(image)
        return images[0] if self.noisy is None else torch.stack(images), label

    def _load(self, index):
        """The picture, or the clean and the noisy one, as a list."""
        images = self.decoded.get(index)
        if images is None:
            files = [self.paths[index], *([] if self.noisy is None else [self.noisy[index]])]
            images = [load_image(file).convert(self.mode) for file in files]
            if len({image.size for image in images}) > 1:
                (width, height), (other_width, other_height) = (image.size for image in images)
                raise DataError(f"the noisy image {files[1]} has {other_width} x {other_height} pixels and its clean one "
                                f"{width} x {height}: make them alike or remove both")
            worker, size = get_worker_info(), sum(len(image.getbands()) * image.width * image.height for image in images)
            if self.decoded_bytes[0] + size <= CACHE_BYTES // (worker.num_workers if worker else 1):
                self.decoded[index] = images
                self.decoded_bytes[0] += size
        return list(images)


class _ResizeAndCrop:
    """Shrink the short side to size * 256/224 and cut the centre.

    An image below that is not enlarged to it, only to `size` if it is even smaller: enlarged images are
    smooth, too easy for a denoiser.
    """

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        short = min(max(min(image.size), self.size), round(self.size * 256 / 224))
        return v2.functional.center_crop(v2.functional.resize(image, short), self.size)


def _transpose(image):
    """A PIL image mirrored at its diagonal; with the two flips that makes all quarter turns."""
    return image.transpose(Image.Transpose.TRANSPOSE)


def _transform(size, labelled, augment):
    """What a folder's images go through on their way to uint8 (C, H, W); None: nothing, the whole image.

    Without labels: crops of size x size, flips and quarter turns.

    Milder than the papers' on ImageNet: crops of 25 % of the area or more (torchvision's default is 8 %, but
    much enlarged crops are smooth, too easy for a denoiser), brightness, contrast and saturation jitter 0.2.
    """
    if labelled and augment:
        steps = [v2.RandomResizedCrop(size, scale=(0.25, 1)), v2.RandomHorizontalFlip(),
                 v2.ColorJitter(0.2, 0.2, 0.2)]
    elif labelled:
        steps = [_ResizeAndCrop(size)]
    elif augment:
        steps = [v2.RandomCrop(size, pad_if_needed=True, padding_mode="reflect"), v2.RandomHorizontalFlip(),
                 v2.RandomVerticalFlip(), v2.RandomApply([_transpose])]
    else:
        return None
    return v2.Compose([*steps, v2.PILToTensor()])


class Part(NamedTuple):
    """What a folder holds."""
    paths: list[Path]
    targets: list[int]  # a label each, or -1
    classes: list[str] | None
    noisy: list[Path] | None  # the same pictures with real noise

    def take(self, indices):
        """The images of these places."""
        return Part([self.paths[i] for i in indices], [self.targets[i] for i in indices], self.classes,
                    None if self.noisy is None else [self.noisy[i] for i in indices])


def _subfolders(folder):
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _without(path, word):
    """The stem of a file with the last `word` in it, whatever its case, as "|", or None where it is not there by itself."""
    stem = path.stem.lower()
    found = list(re.finditer(rf"(?<![a-z]){word}(?![a-z])", stem)) if word in stem else []
    return f"{stem[:found[-1].start()]}|{stem[found[-1].end():]}" if found else None


def _by_name(named):
    """{name: file} of (name, file); DataError where two files of one kind have the same name."""
    files = {}
    for name, path in named:
        if name in files:
            raise DataError(f"{files[name]} and {path} are the same side of one pair of images: remove one")
        files[name] = path
    return files


def _find_pairs(folder):
    """(clean files, noisy files) of a folder of pairs, see LAYOUTS, or None; DataError names a file without a partner."""
    images = list_images(folder)
    if _subfolders(folder) == ["clean", "noisy"] and not images:
        clean, noisy = ([(path.stem, path) for path in list_images(folder / kind)] for kind in ("clean", "noisy"))
    else:
        for words in PAIR_WORDS:
            noisy, clean = ([(_without(path, word), path) for path in images if _without(path, word)] for word in words)
            if dict(noisy).keys() & dict(clean).keys():
                break
        else:
            return None
        clean += [(path, path) for path in sorted(set(images) - {path for _, path in clean + noisy})]
    clean, noisy = _by_name(clean), _by_name(noisy)
    if not clean and not noisy:
        return None
    for files, others, kind in ((clean, noisy, "noisy"), (noisy, clean, "clean")):
        for name, path in files.items():
            if name not in others:
                raise DataError(f"{folder} holds pairs of noisy and clean images, but {path} has no {kind} one: add that, or "
                                "remove this")
    names = sorted(clean, key=clean.get)
    return [clean[name] for name in names], [noisy[name] for name in names]


def _scan(folder):
    """The Part of a folder that holds class folders, images directly, or pairs."""
    pairs = _find_pairs(folder)
    if pairs:
        return Part(pairs[0], [-1] * len(pairs[0]), None, pairs[1])
    images, classes = list_images(folder), _subfolders(folder)
    if images and classes:
        raise DataError(f"{folder} holds both images and folders; {LAYOUTS}")
    if images:
        return Part(images, [-1] * len(images), None, None)
    if len(classes) < 2:
        holds = f"only one folder ({classes[0]})" if classes else "no images"
        raise DataError(f"{folder} holds {holds}; {LAYOUTS}")
    paths, targets = [], []
    for label, name in enumerate(classes):
        found = list_images(folder / name, recursive=True)
        if not found:
            raise DataError(f"the class folder {folder / name} holds no images: add some or remove it")
        paths += found
        targets += [label] * len(found)
    return Part(paths, targets, classes, None)


def _find_parts(folder, train_folders):
    """{"train": Part, and "val", "test" where there are such folders}; with train_folders no "val", see load_data."""
    trains = list(dict.fromkeys(train_folders or ["train"]))
    for name in trains if train_folders else ():
        if not (folder / name).is_dir():
            raise DataError(f"--train-folders: there is no folder {folder / name}")
    others = [name for name in (("test",) if train_folders else ("val", "test")) if name not in trains]
    scans = {name: _scan(folder / name) for name in (*trains, *others) if (folder / name).is_dir()}
    if not scans:
        return {"train": _scan(folder)}
    if trains[0] not in scans:
        raise DataError(f"{folder} holds {' and '.join(scans)} but no train folder; {LAYOUTS}")
    first = scans[trains[0]]
    for name, part in scans.items():
        where = f"{folder / trains[0]} and {folder / name}"
        if (part.classes is None) != (first.classes is None):
            raise DataError(f"of {where} one holds class folders, the other images; {LAYOUTS}")
        if part.classes != first.classes:
            differing = ", ".join(sorted(set(part.classes) ^ set(first.classes))[:5])
            raise DataError(f"the classes of {where} differ ({differing}): give both the same class folders")
        if (part.noisy is None) != (first.noisy is None):
            raise DataError(f"of {where} one holds pairs of noisy and clean images, the other single images; {LAYOUTS}")
    parts = {name: scans[name] for name in others if name in scans}
    together = [scans[name] for name in trains]
    parts["train"] = Part(*(sum((part[field] for part in together), []) for field in range(2)), first.classes,
                          None if first.noisy is None else sum((part.noisy for part in together), []))
    return parts


def _existing(name):
    folder = Path(name)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: --data is {', '.join(SCENES)} or an image folder; {LAYOUTS}")
    return folder


def _load_folder(name, size, seed, train_images, val_images, augment, channels, crops, train_folders):
    """Datasets of an image folder, see LAYOUTS. Without a val folder, a tenth of each class is held back."""
    folder = _existing(name)
    parts = _find_parts(folder, train_folders)
    classes = parts["train"].classes
    if "val" not in parts:
        kept, held = stratified_split(parts["train"].targets, 0.9, seed)
        if not held:
            raise DataError(f"{folder} holds too few images to hold some back for validation; {LAYOUTS}")
        parts["train"], parts["val"] = parts["train"].take(kept), parts["train"].take(held)

    def dataset(split, count, augment, crops=1):
        if split not in parts:
            return None
        part = parts[split].take(_choose(parts[split].targets, count, seed))
        return Pictures(part.paths, part.targets, _transform(size, classes is not None, augment), seed, channels,
                        part.noisy, crops)
    return (dataset("train", train_images, augment, crops if classes is None else 1), dataset("val", val_images, False),
            dataset("test", None, False), classes)


# --- Entry points -------------------------------------------------------------------------------------------

def load_data(name, *, root="data", size=None, seed=0, train_images=None, val_images=None, augment=True, grey=False,
              crops=1, train_folders=None):
    """Data named `digits`, `mnist`, `digit-pairs`, `mnist-pairs` (MNIST is found under root, or downloaded), or the
    path of an image folder.

    size: side in pixels (None: 64 for scenes, 96 for pairs, 224 for a folder). train_images, val_images: limits, chosen by
    the seed in proportion to the classes. augment=False gives the training images of a folder the validation
    transform. Where there is no val folder the split follows the seed, so evaluate with the seed of the
    training. Of a folder, grey: one channel (MODES); crops: random crops of each training image an epoch, without
    labels; train_folders: names of the folders in it that training images come from, all together, of which a tenth is
    held back for validation. DataError says what is wrong.
    """
    load, default_size = SCENES.get(name, (None, 224))
    size = default_size if size is None else size
    if size < 8:
        raise DataError(f"the image size must be at least 8 pixels, not {size}")
    test, classes, channels = None, [str(digit) for digit in range(10)], 1 if grey else 3
    if load is not None:
        for flag, given in (("--grey", grey), ("--train-folders", train_folders)):
            if given:
                raise DataError(f"{flag} is for image folders, and {name} is drawn: leave it out")
        train, val = load(root, size, seed, train_images, val_images)
    else:
        train, val, test, classes = _load_folder(name, size, seed, train_images, val_images, augment, channels, crops,
                                                 train_folders)
    return Data(str(name), train, val, test, classes, size, channels)


def load_everything(name, *, size=None, grey=False):
    """Every picture below a folder, whole and without its label, as `val` of Data: a test set such as CBSD68.

    Pairs are understood in the folder itself and in train, val and test in it, and are then all that is taken.
    """
    if name in SCENES:
        raise DataError(f"all splits together are for image folders, and {name} is drawn: take one split")
    folder = _existing(name)
    channels = 1 if grey else 3
    found = [pairs for pairs in map(_find_pairs, [folder, *(folder / split for split in ("train", "val", "test")
                                                           if (folder / split).is_dir())]) if pairs]
    paths = sum((clean for clean, _ in found), []) or list_images(folder, recursive=True)
    if not paths:
        raise DataError(f"{folder} holds no images; {LAYOUTS}")
    pictures = Pictures(paths, channels=channels, noisy=sum((noisy for _, noisy in found), []) or None)
    return Data(str(name), None, pictures, None, None, size or 224, channels)


def _source(dataset):
    """The dataset below any number of torch.utils.data.Subset."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


class Order(Sampler):
    """The order of a dataset in an epoch: shuffled by (seed, epoch) or as it is, from image `start` of this process on.

    With several processes (torchrun) each has every `world`-th image, beginning with its rank. In training all get the same
    number, so that none waits for another; in evaluation no image is left out or comes twice.
    """

    def __init__(self, count, shuffle, seed, equal):
        self.count, self.shuffle, self.seed = count, shuffle, seed
        self.rank, self.world = rank_and_world()
        self.epoch = self.start = 0
        self.last = count - count % self.world if equal else count

    def __len__(self):
        return len(range(self.rank, self.last, self.world))

    def __iter__(self):
        order = list(range(self.count))
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
            order = torch.randperm(self.count, generator=generator).tolist()
        return iter(order[self.rank:self.last:self.world][self.start:])


def _ignore_signals(_):
    """In a worker process: signals to a whole job are for the main process, which ends its workers when it has saved."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def make_loader(dataset, batch_size, *, shuffle=False, seed=0, workers=0, drop_last=False, device="cpu"):
    """Loader of (uint8 (B, C, H, W), int64 (B,)), in an order of its own, see Order and set_epoch.

    Of pairs the images are (B, 2, C, H, W), see split_pair.

    Whole images (unlabelled validation) differ in size, so they come one by one whatever batch_size is.
    drop_last is ignored when no batch would be left. batch_size is that of one process.
    """
    if getattr(_source(dataset), "whole", False):
        batch_size = 1
    order = Order(len(dataset), shuffle, seed, equal=drop_last)
    return DataLoader(
        dataset, batch_size, sampler=order, drop_last=drop_last and len(order) >= batch_size,
        pin_memory=torch.device(device).type == "cuda", num_workers=workers, persistent_workers=workers > 0,
        worker_init_fn=_ignore_signals, generator=torch.Generator())  # of the workers' seeds; not the global one


def set_epoch(loader, epoch, batches=0):
    """Make order and crops those of (seed, epoch), so that a resumed run sees what an unbroken one would.

    batches: how many of this epoch's batches were seen already; none of their images is read.
    """
    loader.sampler.epoch, loader.sampler.start = epoch, batches * loader.batch_size
    source = _source(loader.dataset)
    if isinstance(source, Pictures):
        source.epoch.fill_(epoch)


def twin(dataset):
    """The same images with an epoch of their own, for a second loader whose epochs must not move this one's crops."""
    other = copy.copy(dataset)
    if isinstance(other, Pictures):
        other.epoch = torch.zeros_like(dataset.epoch).share_memory_()
    return other


def split_dataset(dataset, fraction, seed):
    """stratified_split of a dataset's images, with all crops of one on the same side: two sorted lists of indices."""
    crops = getattr(dataset, "crops", 1)
    count = len(dataset) // crops
    return tuple([crop * count + place for crop in range(crops) for place in part]
                 for part in stratified_split(dataset.targets[:count], fraction, seed))


def split_labels(labels, device):
    """Labels of a loader on a device: ((B,), None); of pairs ((B * 2,), boxes (B, 2, 4): left, top, right, bottom)."""
    labels = labels.to(device, non_blocking=True)
    return (labels, None) if labels.ndim == 1 else (labels[..., 0].flatten(), labels[..., 1:])


def split_pair(images):
    """Images of a loader as (clean, noisy), each (B, C, H, W); noisy is None where noise is still to be added."""
    return images.unbind(1) if images.ndim == 5 else (images, None)


def is_paired(dataset):
    """Whether a dataset's images are pairs, (clean, noisy)."""
    return getattr(_source(dataset), "noisy", None) is not None


def to_float(images, device):
    """uint8 (B, C, H, W) to float32 in [0, 1], channels-last, on device."""
    images = images.to(device, non_blocking=True)  # moved as bytes, a quarter of the traffic
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def whole(low, high=2**31 - 1):
    """A type for argparse: a whole number in [low, high]."""
    def convert(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text}")
        return value
    convert.__name__ = "whole number"
    return convert


def number(low, high):
    """A type for argparse: a number in [low, high], or a fraction such as 25/255; nan is refused."""
    def convert(text):
        above, *below = (float(part) for part in text.split("/"))
        if len(below) > 1 or below == [0.0]:
            raise ValueError
        value = above / below[0] if below else above
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return value
    convert.__name__ = "number"
    return convert


def add_data_arguments(parser, training=True):
    """Add the flags that search.py, train.py and eval.py share, and those of training images alone, see data_from."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="digits", metavar="NAME",
                       help="digits (drawn, no download), mnist, digit-pairs, mnist-pairs (two digits, as in the "
                       "papers' controlled study), or the path of an image folder (default: %(default)s)")
    group.add_argument("--data-root", default="data", metavar="DIR",
                       help="folder that holds MNIST, or that it is downloaded to (default: %(default)s)")
    group.add_argument("--size", type=whole(8, 65536), metavar="PIXELS",
                       help="side of the training images in pixels, that of the crops of a folder without labels "
                       "(default: 64 for digits and mnist, 96 for pairs, 224 for a folder)")
    group.add_argument("--train-images", type=whole(1), metavar="N",
                       help="number of training images (default: 4000 drawn digits, 25000 mnist-pairs, else all)")
    group.add_argument("--val-images", type=whole(1), metavar="N",
                       help="number of validation images (default: 1000 drawn digits, 5000 mnist-pairs, else all)")
    group.add_argument("--train-folders", nargs="+", metavar="NAME",
                       help="folders in --data whose images are for training, all together, a tenth of them held back for "
                       "validation instead of a val folder (default: train, and val where there is one; together for "
                       "a denoiser of search.py --model hinas)")
    group.add_argument("--workers", type=whole(0, 1024), default=0, metavar="N",
                       help="processes that read images, 0: the main one reads (default: %(default)s)")
    if training:
        group.add_argument("--grey", action=argparse.BooleanOptionalAction, default=False,
                           help="read the images of a folder as one channel, ITU-R 601 luma, for grey networks "
                           "(default: RGB; grey for a denoiser of search.py --model hinas)")
        group.add_argument("--crops", type=whole(1, 100000), default=1, metavar="N",
                           help="random crops of each training image an epoch, of a folder without labels; others come once "
                           "(default: %(default)s)")


def data_from(args):
    """The Data that the flags of add_data_arguments ask for, split by --seed."""
    return load_data(args.data, root=args.data_root, size=args.size, seed=args.seed, train_images=args.train_images,
                     val_images=args.val_images, grey=args.grey, crops=args.crops, train_folders=args.train_folders)


def add_noise_arguments(parser):
    """Add the flags of the noise in a training, see Noise."""
    group = parser.add_argument_group("noise")
    group.add_argument("--noise", choices=NOISES, default="gaussian",
                       help="gaussian; or poisson-gaussian: photons and the noise of reading them, of standard deviation "
                       "sigma at white, less in the dark (default: %(default)s)")
    group.add_argument("--sigma", type=number(0, 10), default=1.0, metavar="S",
                       help="sigma is drawn from U[0, S] per image, for images in [0, 1]; 0: clean; 25/255 is understood "
                       "too, here and below (default: %(default)s)")
    group.add_argument("--sigma-levels", type=whole(0, 1000), default=0, metavar="N",
                       help="draw sigma from N evenly spaced values in [0, S] instead; 0: from all (default: %(default)s)")
    group.add_argument("--sigmas", type=number(0, 10), nargs="+", metavar="S",
                       help="draw sigma from these values instead of both; one: a fixed level (default: not given)")


def noise_from(args, scale=1):
    """The Noise that the flags of add_noise_arguments ask for, for a network that makes images `scale` times larger."""
    return Noise(args.sigma, args.sigma_levels, tuple(args.sigmas or ()), args.noise, scale)


IMAGE_FLAGS = ("grey", "crops", "train_folders", "noise", "sigma", "sigma_levels", "sigmas")


def image_flags(args):
    """What flags say of images and noise, as a record keeps it, so that the training sees what the search saw."""
    return {name: getattr(args, name) for name in IMAGE_FLAGS}


def without_what_changed(images, words, same_data):
    """The images of a record without what other flags on a command line (its words) take the place of."""
    given = {word.split("=")[0] for word in words}
    dropped = {"sigmas"} if given & {"--sigma", "--sigma-levels"} else set()
    dropped |= set() if same_data else {"crops", "train_folders"}
    return {name: value for name, value in images.items() if name not in dropped} if isinstance(images, dict) else images


def as_command_line(images):
    """The same as words of a command line; what a record holds besides is left out."""
    words = []
    for name in IMAGE_FLAGS:
        value = images.get(name) if isinstance(images, dict) else None
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, value) if isinstance(value, list)
                                                       else [str(value)])]
    return words


def preview(data, path, seed=0, columns=10, sigmas=(0, 0.2, 0.5, 1.0)):
    """Write a PNG: one training image of each of the first classes, a row for each noise level, or clean and noisy."""
    targets = data.train.targets
    firsts = [targets.index(label) for label in sorted(set(targets))] if data.classes else range(len(targets))
    images, noisy = split_pair(torch.stack([data.train[i][0] for i in firsts[:columns]]))
    images, generator = to_float(images, "cpu"), torch.Generator().manual_seed(seed)
    rows = ([images, to_float(noisy, "cpu")] if noisy is not None else
            [add_noise(images, sigma, generator, clip=True) for sigma in sigmas])  # a picture cannot but clip
    grid = utils.make_grid(torch.cat(rows), nrow=len(images), padding=2, pad_value=1)
    beside = Path(f"{path}.part")
    v2.functional.to_pil_image(grid).save(beside, format="PNG")
    os.replace(beside, path)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="data.py", usage="python data.py [options]",
        description="Show what a source of images holds, and write a picture of it with noise added.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="""examples:
  python data.py --output preview.png
  python data.py --data mnist --data-root data --train-images 1000
  python data.py --data path/to/images --size 128 --output images.png""")
    add_data_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output", default="preview.png", metavar="FILE",
                       help="PNG to write: a column for each class, a row each for sigma 0, 0.2, 0.5, 1.0, "
                       "clipped, or for clean and noisy images of pairs (default: %(default)s)")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N",
                       help="seed of images, splits and noise (default: %(default)s)")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        data = data_from(args)
        preview(data, args.output, args.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{'split':<8}{'images':>8}{'classes':>9}  size")
    for split in ("train", "val", "test"):
        dataset = getattr(data, split)
        if dataset is not None:
            size = "whole images" if getattr(dataset, "whole", False) else f"{data.size} x {data.size}"
            print(f"{split:<8}{len(dataset):>8}{len(set(dataset.targets) - {-1}):>9}  {size}")
    print(f"classes: {', '.join(data.classes)}" if data.classes else "no labels: for denoisers only")
    rows = "clean above noisy" if is_paired(data.train) else "sigma 0, 0.2, 0.5, 1.0 from top to bottom"
    print(f"wrote {args.output}: {rows}")


if __name__ == "__main__":
    main()
