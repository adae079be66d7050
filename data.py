"""Images for joint denoising and classification: drawn digits, MNIST scenes, image folders, noise, loaders.

    python data.py --data digits --output preview.png  # look at the images and their noisy versions
    python data.py --data path/to/images --size 128    # check that your own folder is understood

Reads image files (or MNIST), writes the preview; everything random follows a seed. Works when copied alone,
with scenes.py for digits. Scenes and noise follow Markhorst 2024: sigma ~ U[0, 1], not clipped.
The splits share no image: train, val (to choose by) and test (to report)."""
import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import os
import re
import signal
import sys
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision import datasets, utils
from torchvision.transforms import v2

try:
    import scenes
except ImportError:  # this file alone: image folders only
    scenes = None

MAX_PIXELS = 200_000_000  # a larger image is more likely a mistake (or an attack) than a photograph
CACHE_BYTES = 2 * 2**30  # decoded images kept in memory, by all workers of a loader together
SPLITS, VERSION = ("train", "val", "test"), 3  # the version of how they are made, kept in checkpoints
SPLIT_OF = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
            "test": "test", "testing": "test"}  # by the name of a folder, in lower case
NO_CLASS = re.compile(r"\.|(@eadir|__macosx|lost\+found|\$recycle\.bin|system volume information)$", re.I)
KINDS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's; it runs Ghostscript for EPS
LONGEST = 8  # a longer side is cut to so many times the shorter one before an image is resized
LAYOUTS = ("these layouts work: DIR/train/CLASS/ and DIR/val/CLASS/, or DIR/CLASS/ with two or more classes; "
           "without labels, images directly in DIR/train (and DIR/val, DIR/test) or in DIR; for real noise, "
           "instead of images noisy/ and clean/ with the same file names, or x_noisy.png beside x_clean.png")
PAIR_WORDS = (("mean", "real"), ("clean", "noisy"), ("gt", "noisy"))  # in the names of clean and noisy files
CLASS_FILES = ("classes.txt", "labels.txt", "class_names.txt")
MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels; L is ITU-R 601 luma, (299 R + 587 G + 114 B) / 1000
# Pillow keeps the high byte of 16-bit colours; read in the other byte order they give the low one
GREY_MODES = ("1", "L", "LA", "La", "I", "F")
LOW_BYTES = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA", "RGBX")
             for order, other in zip("BLN", "LBB" if sys.byteorder == "little" else "LBL")}


class DataError(ValueError):
    """A mistake in the user's data, in one sentence."""
    def __init__(self, message):  # a worker process of a loader wraps the sentence in its traceback
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


def _refuse(wrong, message):
    if wrong:
        raise DataError(message)


@dataclass
class Data:
    """Datasets of one source: dataset[i] -> (uint8 (C, H, W), or (2, C, H, W) for pairs; label or -1)."""
    name: str
    train: Dataset | None
    val: Dataset | None
    test: Dataset
    classes: list[str] | None  # None: no labels, for denoisers only
    size: int  # side of the training images in pixels
    channels: int = 3
    sources: dict[str, str] = field(default_factory=dict)  # where the images of each split come from
    files: dict[str, str] | None = None  # of a folder: the files of each split, see list_files
    changes: str = ""  # how the folder differs from an earlier list of its files, in words


def mix_seeds(*numbers):
    """One well mixed seed in [0, 2**63) from several integers."""
    sequence = np.random.SeedSequence([number % 2**32 for number in numbers])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


# --- Noise and splits ---------------------------------------------------------------------------------------
def _poisson_gaussian(images, sigma, normal, poisson):
    """a * Poisson(x / a) + b * N(0, 1), a = 0.9 sigma^2, b^2 = 0.1 sigma^2: shot and read noise (Foi 2008).
    sigma is that at white: our choice, the thesis (3.2.1) gives no numbers. Shot noise: none below 0; below
    sigma = 0.001 it is that of 0.001, scaled: nearly Gaussian, and larger counts overflow on CUDA."""
    least, light = sigma.clamp(min=1e-3), images.clamp(min=0)
    gain = 0.9 * least.square()
    return images + (gain * poisson(light / gain) - light) * (sigma / least) + 0.1 ** 0.5 * sigma * normal


def demosaic(images, places):
    """(B, 3, H, W) -> the same: keep the one colour that a sensor sees at each pixel and interpolate the
    others, bilinearly, red and blue less green. It sees squares of red and green above green and blue
    (Bayer), the first of them where places (B, 2), of 0 or 1, say: rows down, pixels to the right."""
    odd = [(torch.arange(side, device=images.device) + place[:, None]) % 2 == 1
           for side, place in zip(images.shape[-2:], places.T)]
    down, right = odd[0][:, :, None], odd[1][:, None]
    sees = torch.stack((~down & ~right, down ^ right, down & right), 1).to(images.dtype)
    beside = sees.new_tensor([[[1, 2, 1], [2, 4, 2], [1, 2, 1]], [[0, 1, 0], [1, 4, 1], [0, 1, 0]]])
    sums = functools.partial(torch.nn.functional.conv2d, weight=beside[[0, 1, 0], None], padding=1, groups=3)
    seen = sums(sees)
    green = (sums(images * sees) / seen)[:, 1:2]
    return green + sums((images - green) * sees) / seen


def _camera(images, sigma, normal, poisson):
    """Poisson-Gaussian noise of what a sensor sees, one colour a pixel, then `demosaic` and a slight blur.
    Ours: the noise of a camera spreads over pixels and colours. Pixels beside each other correlate by 0.58
    here, by 0.53 to 0.75 in the photographs of CC15; colours by 0.2 to 0.4 here, by 0.1 to 0.8 there. sigma
    is that of the sensor at white. Of it 0.78, 0.62 and 0.78 are left in colour; in grey, without a mosaic,
    0.66."""
    noise = _poisson_gaussian(images, sigma, normal, poisson) - images
    if images.shape[1] == 3 and min(images.shape[-2:]) > 1:  # else a colour would not be seen
        noise = demosaic(noise, (normal[:, :2, 0, 0] > 0).long())  # any place, by chance
    row = noise.new_tensor([0.1, 0.8, 0.1])
    blur = torch.outer(row, row).expand(noise.shape[1], 1, 3, 3)
    padded = torch.nn.functional.pad(noise, [1] * 4, mode="replicate")
    return images + torch.nn.functional.conv2d(padded, blur, groups=noise.shape[1])


# name -> (function of images (B, C, H, W), sigma (B or 1, 1, 1, 1), standard normal noise and a function that
# draws Poisson counts of given rates; words for reports)
NOISES = {"gaussian": (lambda images, sigma, normal, _: images + sigma * normal, "Gaussian, sigma on [0, 1]"),
          "poisson-gaussian": (_poisson_gaussian, "Poisson-Gaussian, sigma on [0, 1] that of white"),
          "camera": (_camera, "Poisson-Gaussian of a sensor, spread, sigma on [0, 1] that of white")}
# name -> standard normal noise (C, H, W) of an evaluation image, the same on any processor; literature: as in
# published tables, numpy's RandomState(0) for every image, drawn as (H, W, C)
PROTOCOLS = {
    "own": lambda shape, place, seed: np.random.default_rng(
        mix_seeds(seed, place)).standard_normal(shape, np.float32),
    "literature": lambda shape, place, seed: np.float32(
        np.random.RandomState(0).normal(0, 1, (*shape[1:], shape[0]))).transpose(2, 0, 1)}


def check_protocol(kind, protocol):
    _refuse(protocol != "own" and kind != "gaussian", f"The noise protocol {protocol!r} is Gaussian: "
            "take --noise gaussian, or --noise-protocol own.")


@dataclass(frozen=True)
class Noise:
    """Noise for images in [0, 1], sigma ~ U[0, sigma_max] per image; ValueError for wrong values."""
    sigma_max: float = 1.0
    levels: int = 0  # so many evenly spaced values of sigma in [0, sigma_max]; 0: all
    sigmas: tuple[float, ...] = ()  # these values of sigma instead of both
    kind: str = "gaussian"  # one of NOISES
    scale: int = 1  # first the input is made so many times smaller, see shrink

    def __post_init__(self):
        _refuse(self.kind not in NOISES, f"the noise {self.kind!r} is unknown; known are {', '.join(NOISES)}")
        _refuse(min(self.sigma_max, *self.sigmas, self.levels) < 0, "sigmas and levels must not be negative")
        _refuse(self.levels == 1, "one evenly spaced level would be 0: give --sigmas, not --sigma-levels 1")

    def __bool__(self):
        return max(self.sigmas, default=self.sigma_max) > 0

    def describe(self):  # in words
        levels = " or ".join(format_sigmas(self.sigmas)) or f"in [0, {format_sigmas([self.sigma_max])[0]}]"
        return f"{self.kind} noise, sigma {levels}" if self else "no noise"

    def sample_sigmas(self, count, generator):
        how = {"generator": generator, "device": generator.device}
        if self.sigmas:
            sigmas = torch.tensor(self.sigmas, device=generator.device)
            return sigmas[torch.randint(len(sigmas), (count,), **how)]
        if self.levels:
            return self.sigma_max * (torch.randint(self.levels, (count,), **how) / (self.levels - 1))
        return self.sigma_max * torch.rand(count, **how)

    def validation_sigma(self, place):
        """The level of the validation image at a place: in turn `sigmas`, or 11 steps of [0, sigma_max]."""
        return self.sigmas[place % len(self.sigmas)] if self.sigmas else self.sigma_max * (place % 11) / 10

    def add_random(self, clean, generator):
        """Training noise, of random levels, on clean (B, C, H, W), from a generator on the same device."""
        clean = shrink(clean, self.scale)
        if not self:
            return clean
        sigma = self.sample_sigmas(len(clean), generator).view(-1, 1, 1, 1)
        normal = torch.empty_like(clean).normal_(generator=generator)  # channels-last where clean is
        poisson = functools.partial(torch.poisson, generator=generator)
        return NOISES[self.kind][0](clean, sigma, normal, poisson)

    def add_fixed(self, clean, places, seed=0, protocol="own", clip=False):
        """Evaluation noise on clean (B, C, H, W), 8-bit values: a function of sigma, a number or (B,).
        It follows seed and the images' places in their split, not batch size or device. clip: to [0, 1]."""
        check_protocol(self.kind, protocol)
        pixels = shrink(clean, self.scale)
        if self.kind != "gaussian":  # on the CPU, of exact values: elsewhere a rate's last digit may differ
            pixels = pixels.cpu().mul(255).round().div(255)
        normal = np.stack([PROTOCOLS[protocol](tuple(pixels.shape[1:]), place, seed) for place in places])
        normal = torch.from_numpy(normal).to(pixels.device, memory_format=torch.channels_last)

        def noisy(sigma):
            rngs = [np.random.default_rng(mix_seeds(seed, place, 1)) for place in places]
            sigma = torch.as_tensor(sigma, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1, 1)
            images = NOISES[self.kind][0](pixels, sigma, normal, lambda rates: torch.from_numpy(
                np.stack([rng.poisson(rate) for rng, rate in zip(rngs, rates.numpy())])).float())
            images = images.to(clean.device, memory_format=torch.channels_last)
            return images.clamp(0, 1) if clip else images
        return noisy


def shrink(images, scale):
    """images (B, C, H, W) made smaller by a whole factor; ValueError where their size does not allow it.
    MATLAB's imresize, for super-resolution: bicubic, antialiased, mirrored at borders, rounded to 8 bits."""
    if scale == 1:
        return images
    height, width = images.shape[-2:]
    _refuse(height % scale or width % scale,
            f"an image of {width} x {height} pixels cannot be made {scale} times smaller")
    for dim, side in ((-2, height), (-1, width)):  # mirrored as far as the kernel reaches; Pillow cuts it off
        places = torch.arange(-2 * scale, side + 2 * scale, device=images.device) % (2 * side)
        images = images.index_select(dim, torch.minimum(places, 2 * side - 1 - places))
    return enlarge(images, 1 / scale)[..., 2:-2, 2:-2].clamp(0, 1).mul(255).round().div(255)


def enlarge(images, scale):  # (B, C, H, W) made larger by a whole factor, with the kernel of `shrink`
    return torch.nn.functional.interpolate(images, scale_factor=scale, mode="bicubic", antialias=True)


def format_sigmas(values):
    """Noise levels as they are typed: "0.2"; all as "15/255" if one of them is not told in three decimals."""
    steps = any(value != round(value, 3) and abs(255 * value - round(255 * value)) < 1e-4 for value in values)
    return [f"{255 * value:g}/255" if steps else f"{value:g}" for value in values]


def _by_class(targets, seed):  # the indices of each class, in a seeded random order
    targets = np.asarray(targets, dtype=np.int64)
    rng = np.random.default_rng(mix_seeds(seed, len(targets)))
    return [rng.permutation(np.flatnonzero(targets == label)).tolist() for label in np.unique(targets)]


def stratified_split(targets, fraction, seed):
    """Split range(len(targets)) into two sorted lists, `fraction`, in (0, 1), of each class in the first, but
    at least one of a class of two or more on either side."""
    _refuse(not 0 < fraction < 1, f"the fraction of a split must lie between 0 and 1, not {fraction}")
    first, second = [], []
    for members in _by_class(targets, seed):
        count = int(fraction * len(members) + 0.5)
        count = min(max(count, 1), len(members) - 1) if len(members) >= 2 else count
        first += members[:count]
        second += members[count:]
    return sorted(first), sorted(second)


def _choose(targets, count, seed):
    """Sorted indices of `count` images (None: all), in proportion to the classes; fewer are part of more."""
    if count is None or count >= len(targets):
        return list(range(len(targets)))
    ranked = [(rank / len(members), index) for members in _by_class(targets, seed)
              for rank, index in enumerate(members)]
    return sorted(index for _, index in sorted(ranked, key=lambda pair: pair[0])[:count])


# --- Scenes: one or two digits on a grey background ---------------------------------------------------------
class Scenes(Dataset):
    """Scenes in memory: images uint8 (N, 3, size, size), or (N, 1, size, size) if grey; targets: N labels."""
    def __init__(self, images, targets):
        self.images, self.targets, self.labels = images, targets, targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index].expand(3, -1, -1), self.labels[index]


class Pairs(Scenes):
    """Scenes of two digits; labels int64 (N, 2, 5): label, left, top, right, bottom. targets: the first."""
    def __init__(self, images, labels):
        super().__init__(images, [int(first[0]) for first, _ in labels])
        self.labels = torch.tensor(np.array(labels))


# name -> (default size in pixels, default numbers of images of SPLITS, None: all; their random streams)
SCENES = {"digits": (64, (4000, 1000, 1000), (0, 4, 1)), "mnist": (64, (None,) * 3, (0, 4, 1)), "digit-pairs":
          (96, (4000, 1000, 1000), (2, 5, 3)), "mnist-pairs": (96, (25000, 2500, 5000), (2, 5, 3))}


def _load_scenes(name, root, size, seed, counts, version):
    """[(dataset, words for its source)] of SPLITS; each scene is random by (seed, split, index) alone.
    mnist: val has a tenth of each class of the training set, train the rest. mnist-pairs: val has digits that
    the first 25,000 scenes of train (or all) do not use; Markhorst 2024 does not say how it splits them."""
    mnist, pairs, parts = name.startswith("mnist"), name.endswith("pairs"), []
    _refuse(scenes is None, f"{name} is drawn by scenes.py, which is not beside data.py: copy it too")
    dataset, render = (Pairs, scenes.render_pair) if pairs else (Scenes, scenes.render_scene)
    _refuse(pairs and size < 2 * scenes.DIGIT,
            f"two digits need images of {2 * scenes.DIGIT} pixels or more, not {size}")
    for split, count in zip((0, 2 if version == 1 else 1, 2), counts):  # what is test now was val
        digits, targets, source = None, np.arange(10), "scenes drawn for it"
        if mnist:
            source = f"MNIST's {'training' if split < 2 else 'test'} set"
            try:
                data = datasets.MNIST(root, train=split < 2, download=True)  # if it is not there
            except Exception as error:  # torchvision's reader raises many kinds on a damaged file
                reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                raise DataError(f"MNIST was not found under {root} and could not be downloaded ({reason[0]}"
                                "): give its folder with --data-root, or use --data digits") from None
            digits, targets = data.data.numpy(), data.targets.numpy()
        pool = np.arange(len(targets))
        if name == "mnist" and split < 2 and version > 1:
            pool = np.array(stratified_split(targets, 0.9, seed)[split])
            source = f"{('nine tenths', 'a tenth')[split]} of {source}"
        elif name == "mnist-pairs" and split == 1:
            used = [np.random.default_rng([seed % 2**32, 2, index]).integers(0, len(pool), 2)
                    for index in range(max(SCENES[name][1][0], counts[0] or 0))]
            pool, source = np.setdiff1d(pool, used), f"digits of {source} that train does not use"
            _refuse(not len(pool), "so many scenes leave no digit for val: give fewer --train-images")
        indices = (pool[_choose(targets[pool], count, seed)].tolist() if name == "mnist" else
                   range(count or SCENES[name][1][split]))
        images, labels = torch.empty(len(indices), 1 if pairs else 3, size, size, dtype=torch.uint8), []
        for image, index in zip(images.numpy(), indices):
            rng = np.random.default_rng([seed % 2**32, SCENES[name][2][split], index])
            image[:], label = render(index, rng, size, pool, digits, targets)
            labels.append(label)
        parts.append((dataset(images, labels), source))
    return parts


# --- Image files and folders --------------------------------------------------------------------------------
def load_image(path):
    """An image file as an upright 8-bit RGB PIL image, over white where it is transparent."""
    return over_white(load_original(path))


def over_white(image):
    """A PIL image of `load_original` as RGB, composited over white."""
    if image.mode == "RGB":
        return image
    if "A" in image.getbands():
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextlib.contextmanager
def _opened(path):
    """A PIL image of any size: Pillow's limit is lower than ours, MAX_PIXELS."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=KINDS) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def is_grey(path):
    """Whether an image file has no colours, by its header; a palette counts as colours. None: unreadable."""
    try:
        with _opened(path) as image:
            return image.mode.split(";")[0] in GREY_MODES
    except Exception:  # Pillow's decoders raise a dozen kinds; what reads the whole image names the file
        return None


def load_original(path):
    """Read any image file as an upright PIL image in 8 bit, L, LA, RGB or RGBA; DataError names a missing,
    damaged or huge file. 16 bits are divided by 257, larger integers by the smallest 2**bits - 1 that holds
    them; floating-point pixels are taken as [0, 1]. Of animations the first frame."""
    _refuse(not os.path.isfile(path), f"there is no image file {path}")
    try:
        with _opened(path) as image:
            _refuse(image.width * image.height > MAX_PIXELS,
                    f"the image {path} has {image.width} x {image.height} pixels, more than the "
                    f"{MAX_PIXELS // 10**6} million that are read: make it smaller or remove it")
            tiles = [(tile, *([tile.args] if isinstance(tile.args, str) else tile.args))
                     for tile in image.tile if image.format in ("PNG", "TIFF")]
            if tiles and all(mode in LOW_BYTES for _, mode, *_ in tiles):
                with Image.open(path, formats=KINDS) as low:
                    low.tile = [tile._replace(args=(LOW_BYTES[mode], *rest)) for tile, mode, *rest in tiles]
                    deep = np.asarray(image) * np.uint32(256) + np.asarray(low)
                image.paste(Image.fromarray(((deep + 128) // 257).astype(np.uint8)))  # rounded
            unsigned = image.format == "TIFF" and image.tag_v2.get(339) != (2,)  # 339: SampleFormat
            return _to_8bit(ImageOps.exif_transpose(image), unsigned)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds: OSError, SyntaxError ...
        raise DataError(f"the image {path} is damaged or of an unknown kind ("
                        f"{str(error).strip() or type(error).__name__}): replace or remove it") from None


def _to_8bit(image, unsigned):
    """A PIL image of any mode in 8 bit; unsigned: Pillow took unsigned 32-bit numbers for signed ones."""
    if image.mode.startswith("I"):  # 16 or 32 bits; Pillow's conversion would turn them white
        grey = np.asarray(image).view(np.uint32) if unsigned and image.mode == "I" else np.asarray(image)
        grey = grey / ((2 ** max(16, int(grey.max()).bit_length()) - 1) / 255)
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image), nan=0.0) * 255
        if grey.max() > 2 * 255:
            raise ValueError(f"its floating-point pixels go up to {grey.max() / 255:g} and not to 1")
    else:
        grey, clear = image.mode in GREY_MODES, image.mode in ("RGBA", "RGBa", "LA", "La", "PA")
        if clear or "transparency" in image.info:
            return image.convert("RGBA").convert("LA" if grey else "RGBA")
        return image.convert("L" if grey else "RGB")
    return Image.fromarray((grey.clip(0, 255) + 0.5).astype(np.uint8))


def list_images(folder, recursive=False):
    """Image files of a folder, sorted, without hidden ones; links are followed, but not in circles."""
    _refuse(not Path(folder).is_dir(), f"there is no folder {folder}")
    files, seen = [], set(Path(folder).resolve().parents)
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in seen:
            names = subfolders[:] = []  # a change in place tells os.walk where to go on
        seen.add(real)
        subfolders[:] = [name for name in subfolders if recursive and not NO_CLASS.match(name)]
        files += [Path(parent, name) for name in names if not name.startswith(".")
                  and name.lower().endswith((*datasets.folder.IMG_EXTENSIONS, ".gif"))]
    return sorted(files)


class Pictures(Dataset):
    """Image files, read when asked for: transform(PIL image) -> uint8 (C, H, W); None: the whole image.
    files: a tuple for each picture, (file,), or (clean, noisy) for pairs, (2, C, H, W), transformed alike.
    crops: each comes so often an epoch. Random transforms follow (seed, epoch, index) alone: set_epoch."""
    def __init__(self, files, targets, transform=None, seed=0, channels=3, crops=1):
        self.files, self.targets, self.crops = files, targets * crops, crops
        self.transform, self.seed, self.mode = transform or v2.PILToTensor(), seed, MODES[channels]
        self.whole = transform is None  # images keep their own sizes, so they cannot share a batch
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # running workers see it change
        self.decoded, self.decoded_bytes = {}, [0]  # shared with copies, see with_own_epoch

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        images = list(self._load(index % len(self.files)))
        with torch.random.fork_rng(devices=[]):  # not torch.manual_seed, which resets that of the GPU too
            for place, image in enumerate(images):
                torch.default_generator.manual_seed(mix_seeds(self.seed, int(self.epoch), index))
                images[place] = self.transform(image)
        return torch.stack(images) if len(images) > 1 else images[0], self.targets[index]

    def _load(self, index):
        if index in self.decoded:
            return self.decoded[index]
        images = [load_image(file).convert(self.mode) for file in self.files[index]]
        (width, height), size = images[0].size, images[-1].size
        _refuse(size != (width, height), f"the noisy image {self.files[index][-1]} has {size[0]} x {size[1]} "
                f"pixels and its clean one {width} x {height}: make them alike or remove both")
        worker, count = get_worker_info(), len(images) * len(self.mode) * width * height
        if self.decoded_bytes[0] + count <= CACHE_BYTES // (worker.num_workers if worker else 1):
            self.decoded[index] = images
            self.decoded_bytes[0] += count
        return images


def _resize_and_crop(image, size):
    """The centre of an image with its short side shrunk to size * 256/224, or enlarged to size alone."""
    side = min(image.size)
    image = v2.functional.center_crop(image, [min(LONGEST * side, length) for length in image.size[::-1]])
    short = min(max(side, size), round(size * 256 / 224))
    return v2.functional.center_crop(v2.functional.resize(image, short), size)


def _make_transform(size, labelled, augment):
    """PIL image -> uint8 (C, size, size), or None: whole images. Without labels: crops, flips, quarter turns.
    With labels milder than TF-NAS: crops of 25 % of the area or more (torchvision's default is 8 %, but much
    enlarged images are smooth, easy for a denoiser), jitter of brightness, contrast and saturation 0.2."""
    if labelled and augment:
        steps = [v2.RandomResizedCrop(size, (0.25, 1)), v2.RandomHorizontalFlip(), v2.ColorJitter(.2, .2, .2)]
    elif labelled:
        steps = [functools.partial(_resize_and_crop, size=size)]
    elif augment:
        transpose = functools.partial(Image.Image.transpose, method=Image.Transpose.TRANSPOSE)
        steps = [v2.RandomCrop(size, pad_if_needed=True, padding_mode="reflect"), v2.RandomHorizontalFlip(),
                 v2.RandomVerticalFlip(), v2.RandomApply([transpose])]
    return v2.Compose([*steps, v2.PILToTensor()]) if labelled or augment else None


@dataclass(frozen=True)
class Part:  # image files as in Pictures, labels or -1, classes, what they are and where from, in words
    files: list[tuple[Path, ...]]
    targets: list[int]
    classes: list[str] | None
    kind: str
    source: str

    def take(self, indices, source):
        return replace(self, files=[self.files[i] for i in indices], source=source,
                       targets=[self.targets[i] for i in indices])


def _subfolders(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not NO_CLASS.match(path.name))


def _find_pairs(folder):
    """[(clean file, noisy file)] of a folder of pairs, see LAYOUTS, or []; DataError names one left alone."""
    images, pairs, sides = list_images(folder), {}, ("clean", "noisy")
    if _subfolders(folder) == ["clean", "noisy"] and not images:
        named = [(path.stem, side, path) for side in sides for path in list_images(folder / side)]
    else:
        for words in PAIR_WORDS:  # the name of a pair is what is left of a file's without the last such word
            named = [(match.groups(), side, path) for path in images for side, word in zip(sides, words) if (
                match := re.fullmatch(rf"(.*)(?<![a-z]){word}(?![a-z])(.*)", path.stem.lower(), re.DOTALL))]
            if set.intersection(*({name for name, *at in named if at[0] == side} for side in sides)):
                break
        else:
            return []
        named += [(path, "clean", path) for path in sorted(set(images) - {path for *_, path in named})]
    for name, side, path in named:
        first = pairs.setdefault(name, {}).setdefault(side, path)
        _refuse(first != path, f"{first} and {path} are the same side of one pair of images: remove one")
    for pair in pairs.values():
        (side, path), *others = pair.items()
        _refuse(not others, f"{folder} holds pairs of noisy and clean images, but {path} has no "
                f"{'clean' if side == 'noisy' else 'noisy'} one: add that, or remove this")
    return sorted((pair["clean"], pair["noisy"]) for pair in pairs.values())


def _scan(folder):
    """The Part of a folder that holds class folders, images directly, or pairs."""
    pairs, classes, targets = _find_pairs(folder), _subfolders(folder), []
    files = pairs or [(path,) for path in list_images(folder)]
    if files:
        _refuse(classes and not pairs, f"{folder} holds both images and folders; {LAYOUTS}")
        kind = "pairs of noisy and clean images" if pairs else "single images"
        return Part(files, [-1] * len(files), None, kind, str(folder))
    holds = f"only one folder ({classes[0]})" if classes else "no images"
    _refuse(len(classes) < 2, f"{folder} holds {holds}; {LAYOUTS}")
    for label, name in enumerate(classes):
        files += [(path,) for path in list_images(folder / name, recursive=True)]
        targets += [label] * (len(files) - len(targets))
        _refuse([label] != targets[-1:], f"the class folder {folder / name} holds no images: remove it")
    return Part(files, targets, classes, "class folders", str(folder))


def _find_splits(folder, train_folders):
    """{split: names of its folders}, by SPLIT_OF, those for training by `train_folders` if given; or {}."""
    found, train_folders = {split: [] for split in SPLITS}, [*map(os.path.normpath, train_folders or ())]
    for name in _subfolders(folder):
        if name.lower() in SPLIT_OF and name not in train_folders:
            found[SPLIT_OF[name.lower()]].append(name)
    found["train"] = list(dict.fromkeys(train_folders or found["train"]))
    for name in found["train"]:
        _refuse(not (folder / name).is_dir() or os.path.isabs(name) or name.startswith("."),
                f"--train-folders: there is no folder {name} in {folder}")
    for split, names in found.items():
        _refuse(len(names) > 1 and not (train_folders and split == "train"),
                f"{folder} holds {' and '.join(names)}, each for {split}: keep one of them")
    others = found["val"] + found["test"]
    _refuse(others and not found["train"],
            f"{folder} holds {' and '.join(others)} but no train folder; {LAYOUTS}")
    return found if found["train"] else {}


def _left_alone(folder, names):  # ", without bus, car" where sub-folders with pictures are in no split, or ""
    left = [name for name in _subfolders(folder) if names and name not in sum(names.values(), [])
            and (list_images(folder / name) or _subfolders(folder / name))]
    return f", without {', '.join(left)}"[:200] if left else ""


def _key(files, folder):  # a picture's name in a list of files: the path of its first file
    return files[0].relative_to(folder).as_posix().replace("\n", "?")


def _hold_back(part, names, folder):
    """{name: a tenth of the Part} for `names` ("test", "val"), and "train": the rest.
    An image's side follows from its path below `folder` alone, so it stays when others come or go. But of two
    images of a class the first of `names` has one, and of three or more each has one."""
    digests = [hashlib.sha256(os.fsencode(_key(files, folder))).digest() for files in part.files]
    shares = [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]  # in [0, 1)
    sides, order = {}, sorted(range(len(shares)), key=lambda i: (part.targets[i], shares[i]))
    for _, members in itertools.groupby(order, key=lambda i: part.targets[i]):
        members = [*members]
        for number, name in enumerate(names, 1):
            most = len(members) // (len(names) + 2 - number) or int(len(members) > 1)
            count = min(max(sum(shares[i] < number / 10 for i in members), 1), most)
            sides.setdefault(name, []).extend(members[:count])
            del members[:count]
        sides.setdefault("train", []).extend(members)
    return {name: part.take(sorted(places), f"{'a tenth' if name in names else 'the rest'} of {part.source}")
            for name, places in sides.items()}


def _hold_back_by_seed(part, names, seed):  # in versions 1 and 2; sides change with the number of images
    held, source = {}, part.source
    for name in names:
        kept, places = stratified_split(part.targets, 0.9, seed)
        held[name] = part.take(places, f"a tenth of {source}")
        part = part.take(kept, f"the rest of {source}")
    return {**held, "train": part}


def _split_folder(folder, seed, train_folders, version):
    """The Parts of SPLITS, see load_data. If no class has three images, val and test share what is held back.
    """
    names = _find_splits(folder, train_folders)
    scans = {split: [_scan(folder / name) for name in names[split]] for split in names} or {
        "train": [_scan(folder)], "val": [], "test": []}
    first = scans["train"][0]
    for part in sum(scans.values(), []):
        where = f"{first.source} and {part.source}"
        _refuse(part.kind != first.kind, f"{where} hold {first.kind} and {part.kind}; {LAYOUTS}")
        differing = ", ".join(sorted({*(part.classes or ())} ^ {*(first.classes or ())})[:5])
        _refuse(differing, f"the classes of {where} differ ({differing}): give both the same class folders")
    parts = {split: replace(first, source=" and ".join(part.source for part in some),
                            files=sum((part.files for part in some), []),
                            targets=sum((part.targets for part in some), []))
             for split, some in scans.items() if some}
    parts["train"] = replace(parts["train"], source=parts["train"].source + _left_alone(folder, names))
    if version == 1 and train_folders:
        parts.pop("val", None)
    elif version > 1 and (train_folders or len(parts) < 3):  # the images of val are for reporting
        test = parts.get("test", parts.get("val"))
        parts = {"train": parts["train"], **({"test": test} if test else {})}
    wanted = [name for name in ("test", "val")[version == 1:] if name not in parts]
    if wanted:
        parts |= (_hold_back(parts["train"], wanted, folder) if version > 2 else
                  _hold_back_by_seed(parts["train"], wanted, seed))
    if not parts["val"].files:
        halves = stratified_split([-1] * len(parts["test"].files), 0.5, seed)
        parts |= {name: parts["test"].take(half, f"half of {parts['test'].source}")
                  for name, half in zip(("val", "test"), halves)}
    found = [parts[split] for split in SPLITS if split in parts]
    _refuse(not all(part.files for part in found),
            f"{folder} holds too few images for all splits (a class needs three); {LAYOUTS}")
    return found if len(found) == 3 else [*found, found[1]]  # version 1 chose and reported on the same images


def _without(parts, folders):
    """The Parts of training and val without pictures that are in these folders too, see leaks.py."""
    _refuse(importlib.util.find_spec("leaks") is None, "--leave-out needs leaks.py beside data.py")
    from leaks import files_of, find  # which imports this file
    files = [files[0] for part in parts[:2] for files in part.files]
    same = {other for _, other, _ in find(files_of(folders), files)}
    def rest(part):
        kept = [place for place, files in enumerate(part.files) if files[0] not in same]
        left = len(part.files) - len(kept)
        return part.take(kept, f"{part.source}{f', without {left} of --leave-out' if left else ''}")
    kept = [*map(rest, parts[:2]), *parts[2:]]
    _refuse(not all(part.files for part in kept), "--leave-out leaves no image to train on or to choose by")
    return kept


def _list_files(part, folder):
    """The pictures of a Part as text: a checksum, of size and last 4 KiB, and the path in each line."""
    def checksum(files):
        value = 0
        for path in files:
            _refuse(not path.is_file(), f"{path} is not a file: remove it")  # a pipe would be waited for
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 4096))
                value = zlib.crc32(file.read(), value ^ size % 2**32)
        return value
    return "\n".join(f"{checksum(files):08x} {_key(files, folder)}" for files in part.files)


def _as_listed(parts, listed, folder, version, accept):
    """(the Parts with the splits of an earlier list of files, how the folder differs from it, in words)."""
    everything = replace(parts[0], files=sum((part.files for part in parts), []),
                         targets=sum((part.targets for part in parts), []))
    places = {_key(files, folder): place for place, files in enumerate(everything.files)}
    now = dict(line.split(" ", 1)[::-1] for part in parts for line in _list_files(part, folder).split("\n"))
    before = {one: dict(line.partition(" ")[::-2] for line in listed[one].split("\n")) for one in SPLITS}
    union, words = {**before["train"], **before["val"], **before["test"]}, []
    for what, names in (("gone", union.keys() - now), ("new", now.keys() - union),
                        ("changed", {name for name in now.keys() & union if now[name] != union[name]})):
        if names:
            words.append(f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})")
    for split, part in zip(SPLITS, parts if accept else ()):  # new files: on their own side, or for training
        names = (_key(files, folder) for files in part.files)
        before[split if version > 2 else "train"] |= {name: "" for name in names if name not in union}
    parts = [everything.take([places[name] for name in before[split] if name in places], part.source)
             for split, part in zip(SPLITS, parts)]
    _refuse(not all(part.files for part in parts), f"{folder} has lost all images of a split: put them back")
    return parts, ", ".join(words)


def _name_classes(folder, codes):
    """The names of class folders by one of CLASS_FILES beside them or train, if there is one, else their own.
    Its lines: a class folder, blank, tab or comma, the name; or names alone, as the folders are sorted."""
    places = [where / name for where in (folder, folder / "train") for name in CLASS_FILES]
    path = next((place for place in places if place.is_file()), None)
    if path is None or codes is None:
        return codes
    lines = [line.strip() for line in path.read_text("utf-8-sig", "replace").splitlines() if line.strip()]
    names = dict(re.split(r"[\s,]+", f"{line} ", maxsplit=1) for line in lines)
    if set(codes) <= names.keys():
        lines = [names[code].strip() or code for code in codes]
    else:
        _refuse(len(lines) != len(codes) or set(codes) & names.keys(), f"{path} does not fit the folders "
                f"of {folder}: give each a line, \"{codes[0]} NAME\", or the names alone, in their order")
    return [name if lines.count(name) == 1 else f"{name} ({code})" for name, code in zip(lines, codes)]


def load_data(name, *, root="data", size=None, seed=0, train_images=None, val_images=None, test_images=None,
              augment=True, grey=False, crops=1, train_folders=None, leave_out=None, kept=None):
    """Data of a name in SCENES (MNIST is found under root, or downloaded) or of the path of an image folder.
    size: side in pixels (None: 64 for scenes, 96 for pairs, 224 for a folder). *_images: limits, chosen by
    seed, in proportion to the classes. Of a folder: augment=False, training images get the transform of the
    others; grey, one channel (MODES); crops, of each training image without label an epoch; train_folders,
    names of those for training; leave_out, folders whose pictures are not for training or val. test: the
    folder test, else val, else a tenth of the training images; val: the folder val if there is test too and
    no train_folders, else a tenth of the training images. kept: a checkpoint, or its "splits" (version; in
    1 val was what test is now) and "images", which are kept."""
    version, files = (VERSION, None) if kept is None else (kept.get("splits") or 1, kept.get("images"))
    size = SCENES.get(name, (224,))[0] if size is None else size
    counts = (train_images, val_images, test_images)
    _refuse(size < 8, f"the image size must be at least 8 pixels, not {size}")
    _refuse(any(n is not None and n < 1 for n in counts), "the number of images must be at least 1")
    channels, parts, classes = 1 if grey else 3, [], [str(digit) for digit in range(10)]
    if name in SCENES:
        flag = "--grey" if grey else "--train-folders" if train_folders else "--leave-out"
        _refuse(grey or train_folders or leave_out, f"{flag} is for image folders, and {name} is drawn: "
                "leave it out")
        parts, listed, changes = _load_scenes(name, root, size, seed, counts, version), None, ""
    else:
        _refuse(not Path(name).is_dir(),
                f"there is no folder {name}: --data is {', '.join(SCENES)} or an image folder; {LAYOUTS}")
        found, changes = _split_folder(Path(name), seed, train_folders, version), ""
        if files:
            found, changes = _as_listed(found, files, Path(name), version, kept.get("accept"))
        listed = {split: _list_files(part, Path(name)) for split, part in zip(SPLITS, found)}
        found = _without(found, leave_out) if leave_out else found
        classes = _name_classes(Path(name), found[0].classes)
        for part, count, training in zip(found, counts, (True, False, False)):
            part = part.take(_choose(part.targets, count, seed), part.source)
            transform = _make_transform(size, classes is not None, augment and training)
            repeats = crops if training and classes is None else 1
            images = Pictures(part.files, part.targets, transform, seed, channels, repeats)
            parts.append((images, part.source))
    images, sources = zip(*parts)
    return Data(str(name), *images, classes, size, channels, dict(zip(SPLITS, sources)), listed, changes)


def load_everything(name, *, size=None, grey=False):
    """Every picture below a folder, whole and unlabelled, as `test`; of pairs those in it and in SPLITS."""
    _refuse(name in SCENES, f"all splits together are for image folders, and {name} is drawn: take one split")
    folder, channels = Path(name), 1 if grey else 3
    folders = [folder, *(folder / split for split in SPLITS if (folder / split).is_dir())]
    files = sum(map(_find_pairs, folders), []) or [(path,) for path in list_images(folder, recursive=True)]
    _refuse(not files, f"{folder} holds no images; {LAYOUTS}")
    pictures = Pictures(files, [-1] * len(files), channels=channels)
    return Data(str(name), None, None, pictures, None, size or 224, channels, {"test": f"all of {folder}"})


# --- Loaders ------------------------------------------------------------------------------------------------
def _source(dataset):  # below any number of torch.utils.data.Subset
    return _source(dataset.dataset) if hasattr(dataset, "dataset") else dataset


class Order(Sampler):
    """The order of a dataset in an epoch, from image `start` on: shuffled by (seed, epoch), or as it is.
    equal: all `world` processes have the same number, so that none waits; else every image comes once."""
    def __init__(self, count, shuffle, seed, equal, rank, world):
        self.count, self.shuffle, self.seed, self.epoch, self.start = count, shuffle, seed, 0, 0
        self.places = slice(rank, count - count % world if equal else count, world)

    def __len__(self):
        return len(range(self.count)[self.places])

    def __iter__(self):
        rng = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=rng).tolist() if self.shuffle else range(self.count)
        return iter(order[self.places][self.start:])


def _ignore_signals(_):  # in a worker; the main process ends its workers, when it has saved
    for name in {"SIGTERM", "SIGINT", "SIGHUP"} & signal.Signals.__members__.keys():
        signal.signal(signal.Signals[name], signal.SIG_IGN)


def make_loader(dataset, batch_size, *, shuffle=False, seed=0, workers=0, drop_last=False, device="cpu",
                rank=0, world=1):
    """Loader of (uint8 (B, C, H, W), or (B, 2, C, H, W) for pairs; int64 (B,)) in an Order of its own.
    batch_size: of this process; whole images come one by one. drop_last: where a batch is left."""
    batch_size = 1 if getattr(_source(dataset), "whole", False) else batch_size
    order = Order(len(dataset), shuffle, seed, drop_last, rank, world)
    return DataLoader(
        dataset, batch_size, sampler=order, drop_last=drop_last and len(order) >= batch_size,
        pin_memory=torch.device(device).type == "cuda", num_workers=workers, persistent_workers=workers > 0,
        worker_init_fn=_ignore_signals, generator=torch.Generator())  # of workers' seeds; not the global one


def set_epoch(loader, epoch, batches=0):  # order and crops of (seed, epoch), from batch `batches` on
    loader.sampler.epoch, loader.sampler.start = epoch, batches * loader.batch_size
    if isinstance(_source(loader.dataset), Pictures):
        _source(loader.dataset).epoch.fill_(epoch)


def with_own_epoch(dataset):  # the same images, for a second loader that must not change these crops
    other = copy.copy(dataset)
    other.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
    return other


def split_labels(labels, device):
    """Labels of a loader: ((B,), None); of Pairs ((B * 2,), boxes (B, 2, 4): left, top, right, bottom)."""
    labels = labels.to(device, non_blocking=True)
    return (labels, None) if labels.ndim == 1 else (labels[..., 0].flatten(), labels[..., 1:])


def is_paired(dataset):  # whether its images are pairs, (clean, noisy)
    return len(getattr(_source(dataset), "files", [()])[0]) > 1


def to_float(images, device):
    """uint8 (B, C, H, W) to float32 in [0, 1], channels-last, on device."""
    images = images.to(device, non_blocking=True)  # moved as bytes, a quarter of the traffic
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def smallest(dataset):
    """(shortest side in pixels, file) of the smallest picture of a dataset, by the headers of the files."""
    def short_side(file):
        with _opened(file) as image:
            return min(image.size)
    return min((short_side(file), str(file)) for file, *_ in _source(dataset).files)


def split_pair(images, device):
    """Images of a loader as (clean, noisy), see to_float; noisy: None, unless of pairs (B, 2, C, H, W)."""
    clean, noisy = images.unbind(1) if images.ndim == 5 else (images, None)
    return to_float(clean, device), None if noisy is None else to_float(noisy, device)


def clean_and_noisy(images, places, device, noise, seed=0, clip=False, protocol="own"):
    """Images of a loader, cut to a multiple of noise.scale, and noise.add_fixed on them (or their own)."""
    clean, real = split_pair(images, device)
    if real is not None:
        return clean, lambda sigma: real
    height, width = (side - side % noise.scale for side in clean.shape[-2:])
    clean = clean[..., :height, :width]
    return clean, noise.add_fixed(clean, places, seed, protocol, clip)


class NoisyBatches:
    """Batches (noisy, clean, labels) of an epoch on the device, with `noise`, or for pairs with their own.
    It is drawn on the device, by (seed, epoch, batch, rank of this process): the same in a resumed run."""
    def __init__(self, loader, device, noise, seed, rank=0):
        self.loader, self.device, self.noise, self.seed, self.rank = loader, device, noise, seed, rank
        self.generator = torch.Generator(device=device)

    def __len__(self):
        return len(self.loader)

    def epoch(self, number, first=0):
        set_epoch(self.loader, number, first)
        for index, (images, labels) in enumerate(self.loader, first):
            self.generator.manual_seed(mix_seeds(self.seed, number, index, self.rank))
            clean, noisy = split_pair(images, self.device)  # (B, C, H, W)
            noisy = self.noise.add_random(clean, self.generator) if noisy is None else noisy
            yield noisy, clean, labels.to(self.device, non_blocking=True)


# --- Flags --------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):  # argparse takes "--flag=--" for an empty list
        if any(word.endswith("=--") for word in (sys.argv[1:] if args is None else args)):
            self.error("a value is missing after =")
        return super().parse_known_args(args, namespace)


def number(low, high, kind="number"):
    """A type for argparse: a number in [low, high], or a fraction such as 25/255; nan is refused."""
    def convert(text):
        above, *below = [int(text)] if kind == "whole number" else map(float, text.split("/", 1))
        value = above / (below[0] or np.nan) if below else above
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a {kind} from {low} to {high}, not {text}")
        return value
    convert.__name__ = kind
    return convert


def whole(low, high=2**31 - 1):  # a type for argparse: a whole number in [low, high]
    return number(low, high, "whole number")


def add_data_arguments(parser, training=True, validation=True):
    add = parser.add_argument_group("data").add_argument
    add("--data", default="digits", metavar="NAME", help="digits (drawn, no download), mnist, digit-pairs, "
        "mnist-pairs (two digits, the papers' controlled study), or an image folder (default: %(default)s)")
    add("--data-root", default="data", metavar="DIR", help="where MNIST is, or is put (default: %(default)s)")
    add("--size", type=whole(8, 65536), metavar="PIXELS", help="side of the training images in pixels "
        "(default: 64 for digits and mnist, 96 for pairs, 224 for a folder)")
    for i, wanted in enumerate((training, validation, not training)):
        if wanted:
            add(f"--{SPLITS[i]}-images", type=whole(1), metavar="N", help=f"{SPLITS[i]} images (default: "
                f"{SCENES['digits'][1][i]} drawn, {SCENES['mnist-pairs'][1][i]} mnist-pairs, else all)")
    add("--train-folders", nargs="+", metavar="NAME", help="folders in --data whose images are for training, "
        "all but a tenth for val; test is the folder test or val, or another tenth (default: train)")
    if training:
        add("--leave-out", nargs="+", metavar="DIR", help="folders of test pictures: what is in them, whole "
            "or in part, is not learned from; leaks.py names such pictures (default: none)")
    add("--workers", type=whole(0, 1024), default=0, metavar="N",
        help="processes that read images, 0: the main one reads (default: %(default)s)")
    if training:
        add("--grey", action=argparse.BooleanOptionalAction, default=False, help="read a folder's images as "
            "one channel, ITU-R 601 luma (default: RGB; grey where the search's method says so)")
        add("--crops", type=whole(1, 100000), default=1, metavar="N", help="random crops of each training "
            "image an epoch, of a folder without labels (default: %(default)s)")


def data_from(flags, kept=None):
    """The Data that a dict of the flags of add_data_arguments and --seed asks for; kept: see load_data."""
    names = ("size", "seed", *(f"{split}_images" for split in SPLITS), "grey", "crops", "train_folders",
             "leave_out")
    return load_data(flags["data"], root=flags["data_root"], kept=kept,
                     **{name: flags[name] for name in names if name in flags})


def add_noise_arguments(parser):
    add = parser.add_argument_group("noise", "Of images in [0, 1]; fractions work too, 25/255.").add_argument
    add("--noise", choices=NOISES, default="gaussian", help="gaussian; or poisson-gaussian: shot noise, its "
        "variance proportional to intensity, and read noise, together sigma at white; or camera: such "
        "noise of a sensor that sees one colour a pixel; it spreads over pixels and colours, and 0.73 sigma "
        "is left (default: %(default)s)")
    add("--sigma", type=number(0, 10), metavar="S", help="sigma is drawn from U[0, S] per image; 0: clean "
        "(default: 1; for images without labels, mostly photographs of which a picture is wanted, 55/255)")
    add("--sigma-levels", type=whole(0, 1000), default=0, metavar="N",
        help="draw sigma from N evenly spaced values in [0, S] instead; 0: from all (default: %(default)s)")
    add("--sigmas", type=number(0, 10), nargs="+", metavar="S",
        help="draw sigma from these values instead of both; one: a fixed level (default: as --sigma says)")


def noise_from(flags, scale=1):  # the Noise that flags ask for, of a network that enlarges by `scale`
    return Noise(flags["sigma"], flags["sigma_levels"], tuple(flags["sigmas"] or ()), flags["noise"], scale)


def image_flags(values):
    """The flags of images and noise that a record keeps, so that a training sees what the search saw."""
    return {name: values[name] for name in ("grey", "crops", "train_folders", "leave_out", "noise", "sigma",
                                            "sigma_levels", "sigmas")}


def preview(data, path, seed=0, columns=10, sigmas=(0, 0.2, 0.5, 1.0)):
    """Write a PNG: a column for a training image of each class, rows for noise levels or clean and noisy."""
    targets = data.train.targets
    firsts = [targets.index(label) for label in sorted(set(targets))] if data.classes else range(len(targets))
    images, noisy = split_pair(torch.stack([data.train[place][0] for place in firsts[:columns]]), "cpu")
    noise = Noise().add_fixed(images, range(len(images)), seed, clip=True)  # a picture cannot but clip
    rows = [noise(sigma) for sigma in sigmas] if noisy is None else [images, noisy]
    grid = utils.make_grid(torch.cat(rows), nrow=len(images), padding=2, pad_value=1)
    beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    v2.functional.to_pil_image(grid).save(beside, format="PNG")
    os.replace(beside, path)


def build_parser():
    parser = Parser(prog="data.py", usage="python data.py [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show what a source of images holds, and write a picture of it with noise added.",
        epilog="examples:\n  python data.py --output preview.png\n"
               "  python data.py --data mnist --data-root data --train-images 1000\n"
               "  python data.py --data path/to/images --size 128 --output images.png")
    add_data_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--output", default="preview.png", metavar="FILE", help="PNG to write: a column for each class, a "
        "row each for sigma 0, 0.2, 0.5, 1.0, clipped, or clean and noisy (default: %(default)s)")
    add("--seed", type=whole(0), default=0, metavar="N",
        help="seed of images, splits and noise (default: %(default)s)")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        data = data_from(vars(args))
        preview(data, args.output, args.seed)
        print(f"{'split':<8}{'images':>8}{'classes':>9}  {'size':<14}from")
        for split, source in data.sources.items():
            dataset = getattr(data, split)
            size = "whole images" if getattr(dataset, "whole", False) else f"{data.size} x {data.size}"
            print(f"{split:<8}{len(dataset):>8}{len(set(dataset.targets) - {-1}):>9}  {size:<14}{source}")
        rows = "clean above noisy" if is_paired(data.train) else "sigma 0, 0.2, 0.5, 1.0 from top to bottom"
        print(f"classes: {', '.join(data.classes)}" if data.classes else "no labels: for denoisers only",
              f"wrote {args.output}: {rows}", sep="\n", flush=True)
    except BrokenPipeError:  # the reader has gone, as head does
        sys.stdout = open(os.devnull, "w")
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        parser.error(str(error) or "there is not enough memory")
    except KeyboardInterrupt:
        parser.exit(130, "\nStopped; nothing was written.\n")


if __name__ == "__main__":
    main()
