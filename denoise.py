"""A trained network on pictures of your own, of any size, large ones in tiles; and the self-ensemble.

    python eval.py --input holiday_pictures --output-dir denoised    # eval.py reads the flags
"""

import contextlib
import copy
import ctypes
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from data import MODES, list_images, load_original, over_white, to_float
from files import lacks_memory, write_file
from metrics import to_8bit
from models import (ENCODER_STRIDE, LAST_ENCODER_STAGE, Network, Output, apply_network, channels_of,
                    padding_to, scale_of)
from run import Forecast, say, track

# Pixels, multiples of every stride. A network may see farther than the margin, but hardly: with 384 eight of
# 100,000 values of weights/colour.pt would change, by 1/255. Networks trained on larger images take means
# over as many pixels (`localised`); the margin is at least that.
TILE_CORE, TILE_MARGIN = 896, 128


class SelfEnsemble(nn.Module):
    """A denoiser whose image is the mean over eight flips and quarter turns of its input, each turned back.

    The logits are those of the upright image: objects are not learned upside down.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        if not network.denoises:
            raise ValueError("The network only classifies and makes no images: leave --self-ensemble out.")
        self.network, self.channels, self.scale = network, channels_of(network), scale_of(network)
        self.denoises, self.classifies = True, network.classifies
        self.takes_boxes = getattr(network, "takes_boxes", False)
        self.train(network.training)

    @staticmethod
    def turn(image: Tensor, way: int) -> Tensor:
        """(..., H, W) turned by `way` % 4 quarters, mirrored from way 4 on."""
        image = image.rot90(way % 4, (-2, -1))
        return image.flip(-1) if way >= 4 else image

    @staticmethod
    def turn_back(image: Tensor, way: int) -> Tensor:
        """The inverse of `turn`."""
        return (image.flip(-1) if way >= 4 else image).rot90(-(way % 4), (-2, -1))

    def forward(self, x: Tensor, boxes: Tensor | None = None) -> Output:
        image, logits = apply_network(self.network, x, boxes)
        others = (self.turn_back(self.network(self.turn(x, way)).image, way) for way in range(1, 8))
        return Output((image + sum(others)) / 8, logits)


class LocalMean(nn.Module):
    """The mean of `window` x `window` values around each of a map, inside the map: (B, C, H, W) -> the same
    shape, or 1 in place of H or W where that is no larger than the window."""

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.window // 2, (self.window - 1) // 2
        for dim, window, padding in ((2, (self.window, 1), (0, 0, before, after)),
                                     (3, (1, self.window), (before, after, 0, 0))):
            x = (x.mean(dim, keepdim=True) if x.shape[dim] <= self.window else
                 F.pad(F.avg_pool2d(x, window, 1), padding, mode="replicate"))
        return x


def localised(network: nn.Module, size: int) -> nn.Module:
    """The denoiser for pictures larger than the `size` x `size` pixels of its training: its
    squeeze-and-excitation averages over as many pixels as it did there (Chu et al. 2022, "Improving image
    restoration by revisiting global information aggregation"), not over the picture. A copy, or itself where
    it has none."""
    if not any(isinstance(module, Network) and module.denoises for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    for part in network.modules():
        if isinstance(part, Network) and part.denoises:
            stride = 2  # of the stem
            for module, block in zip(part.blocks(), part.arch.blocks):
                stride *= block.stride
                if block.stage <= LAST_ENCODER_STAGE and block.se_channels:
                    module.se.avgpool = LocalMean(max(1, size // stride))
    return network


class _Collected(Exception):
    """A pool has what it needs of a tile; the rest of the pass is not wanted."""


class _WholePool(nn.Module):
    """A module's average pool, over a picture that is computed in tiles.

    Its first call appends it to `order`. While it has a `core` it adds up the cores of the tiles; then it
    gives their mean, that of the whole picture.
    """

    def __init__(self, order: list[nn.Module]):
        super().__init__()
        self.order, self.core, self.total, self.count = order, None, 0.0, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.core is not None:  # in pixels; at the edges of the picture it may reach beyond the map
            rows, columns = (slice(start * side // padded, end * side // padded)
                             for (start, end, padded), side in zip(self.core, x.shape[2:]))
            part = x[:, :, rows, columns].double()
            self.total = self.total + part.sum((2, 3), keepdim=True)
            self.count += part[0, 0].numel()
            raise _Collected
        if self.mean is not None:
            return self.mean.to(x.dtype)
        self.order.append(self)
        return x.mean((2, 3), keepdim=True)

    @property
    def mean(self) -> Tensor | None:
        """The mean over the whole picture, once it is known."""
        return self.total / self.count if self.core is None and self.count else None


def in_tiles(network: nn.Module, height: int, width: int) -> bool:
    """Whether a picture is processed in tiles: a large one, unless the network has group norms (they would
    see a tile, not the picture) or, in an ONNX file, says that it cannot."""
    return height * width > (TILE_CORE + 2 * TILE_MARGIN) ** 2 and not any(
        isinstance(module, nn.GroupNorm) or getattr(module, "multiple", 1) is None
        for module in network.modules())


@torch.inference_mode()
def denoise_tiled(network: nn.Module, image: Tensor, device: torch.device | str = "cpu",
                  core: int = TILE_CORE, margin: int = TILE_MARGIN, progress=lambda share: None) -> Tensor:
    """Denoise a large picture in tiles: (1, C, H, W) on the CPU, uint8 or in [0, 1] -> uint8 on the CPU.

    The result is `scale` times larger where the network enlarges. Each tile is computed with `margin` pixels
    around its core (both multiples of 32), so there are no seams. Earlier passes over all tiles collect what
    each `avgpool` of a module (squeeze-and-excitation, noise level) averages over the whole picture. The
    memory is that of a tile and of the picture in 8 bit; a SelfEnsemble averages 8-bit images. `progress`
    gets shares of the work, 1 in all (8 of a SelfEnsemble). The network must be in eval mode.
    """
    if isinstance(network, SelfEnsemble):
        total: Tensor | int = 0
        for way in range(8):
            turned = denoise_tiled(network.network, network.turn(image, way), device, core, margin, progress)
            total = network.turn_back(turned, way).to(torch.int16) + total
        return (total + 4).div_(8, rounding_mode="floor").byte()
    network = network.in_parts() if hasattr(network, "in_parts") else network  # of an ONNX file
    network = copy.copy(getattr(network, "denoiser", network))  # the first half of a sequential one is enough
    if hasattr(network, "decoder"):
        network.classifies = False
    scale, stride = scale_of(network), getattr(network, "multiple", ENCODER_STRIDE)
    spans = [[(start, max(0, start - margin), min(side, start + core + margin))
              for start in range(0, side, core)] for side in image.shape[-2:]]
    tiles = [(rows, columns) for rows in spans[0] for columns in spans[1]]  # each (core's start, start, end)
    pooling = [module for module in network.modules()
               if isinstance(getattr(module, "avgpool", None), nn.AdaptiveAvgPool2d)]
    pools, order = [module.avgpool for module in pooling], []

    def compute(tile):
        pixels = image[..., slice(*tile[0][1:]), slice(*tile[1][1:])]
        return network(to_float(pixels, device) if pixels.dtype == torch.uint8 else pixels.to(device)).image

    try:
        for module in pooling:
            module.avgpool = _WholePool(order)
        network(torch.zeros(1, image.shape[1], 64, 64, device=device))
        # A pass to the first pool, the noise level, is short; one to the k-th of n is k - 1 of n parts of a
        # whole one, which comes last.
        work = [max(0.05, number) for number in range(len(order))] + [max(1, len(order))]
        shares = [passed / sum(work) / len(tiles) for passed in work]
        for pool, share in zip(order, shares):
            for tile in tiles:
                pool.core = [(start - low, start - low + core, -(-(high - low) // stride) * stride)
                             for start, low, high in tile]
                with contextlib.suppress(_Collected):
                    compute(tile)
                progress(share)
            pool.core = None
        result = torch.empty(*image.shape[:2], *(scale * n for n in image.shape[-2:]), dtype=torch.uint8)
        side = scale * core
        for tile in tiles:
            (y, top, _), (x, left, _) = ([scale * place for place in span] for span in tile)
            pixels = compute(tile)[..., y - top:y - top + side, x - left:x - left + side].float()
            result[..., y:y + side, x:x + side] = to_8bit(pixels).mul(255).round().byte().cpu()
            progress(shares[-1])
    finally:
        for module, pool in zip(pooling, pools):
            module.avgpool = pool
    return result


def keep_memory() -> None:
    """Let the process keep the memory of freed tensors, where its C library is glibc. That gives large ones
    back after every layer; to get them again took half of the time of a large picture."""
    with contextlib.suppress(OSError, AttributeError):  # another system
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: none of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end before they go back


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) or (1, H, W), uint8, or float, clamped to [0, 1] -> Pillow image, RGB or L."""
    pixels = image if image.dtype == torch.uint8 else to_8bit(image.float()).mul(255).round().byte()
    pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().cpu().numpy())


def like_original(picture: Image.Image, original: Image.Image) -> Image.Image:
    """A network's picture, which may be larger, in the mode of the original: as transparent, and grey if that
    or the picture is. What the network saw over white is parted from the white. Where all is transparent,
    the pixels are those of the original."""
    mode = original.mode.replace("RGB", picture.mode)
    if "A" not in original.getbands():
        return picture.convert(mode)
    original = original.convert("RGBA").resize(picture.size)
    alpha, picture = original.getchannel("A"), picture.convert("RGB")
    if alpha.getextrema()[0] < 255:
        share = np.asarray(alpha, np.float32)[..., None] / 255
        pixels = (np.asarray(picture, np.float32) - 255 * (1 - share)) / share.clip(1 / 255)
        picture = Image.fromarray((pixels.clip(0, 255) + 0.5).astype(np.uint8))
        picture.paste(original.convert("RGB"), mask=alpha.point(lambda value: 255 * (value == 0)))
    picture.putalpha(alpha)
    return picture.convert(mode)


def class_name(index: int, classes: list[str] | None) -> str:
    """The name of a class, or "class 3" where there are no names."""
    return classes[index] if classes else f"class {index}"


def find_pictures(source: Path, output_dir: Path) -> list[Path]:
    """The file `source`, or the pictures of that folder without those in `output_dir`; ValueError if none."""
    if not source.exists():
        raise ValueError(f"There is no file or folder {source}; give a picture or a folder with --input.")
    paths, results = list_images(source) if source.is_dir() else [source], os.path.realpath(output_dir)
    paths = [path for path in paths if path == source or os.path.dirname(os.path.realpath(path)) != results]
    if not paths:
        raise ValueError(f"{source} holds no picture outside --output-dir; give another --input.")
    return paths


def denoise_paths(network: nn.Module, paths: list[Path], output_dir: str | Path, *, size: int, add_noise=None,
                  classes: list[str] | None = None, device="cpu") -> tuple[list[dict], list[dict]]:
    """Denoise and classify image files of any size: a record of each picture, one of each file that failed.

    Writes `<output_dir>/<name>_denoised.png`, or `<name>_2_denoised.png` for a second file of one name, grey
    or in colour and transparent as the file is, in 8 bit.
    add_noise: function of ((1, C, H, W) in [0, 1], place in `paths`), whose result is denoised and written to
    `<name>_noisy.png`. The class comes from the same pass where both sides are within a factor of 2 of the
    training size `size` in pixels, otherwise from a copy whose short side is `size`: a classifier knows
    objects at that scale. A file that cannot be read is skipped. The network must be in eval mode.
    """
    keep_memory()
    pictures, failures, names = [], [], output_names(paths)
    for place, path in enumerate(track(paths, "pictures", len(paths), unit="file")):
        try:
            original = load_original(path)
            noisy, image, logits, seen = _apply_to_picture(network, original, path, place, size, add_noise,
                                                           device)
            record = {"file": str(path), "width_px": noisy.shape[3], "height_px": noisy.shape[2]}
            for kind, result in (("noisy", noisy if add_noise else None), ("denoised", image)):
                if result is not None:
                    record[kind] = str(Path(output_dir) / f"{names[place]}_{kind}.png")
                    picture = to_picture(result[0])
                    picture = like_original(picture, original) if kind == "denoised" else picture
                    write_file(record[kind], lambda temporary: picture.save(temporary, format="PNG"))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # of this picture; the others go on
            reason = (f"too large for the memory of {device}; try --device cpu" if lacks_memory(error) else
                      str(error).strip().splitlines()[0])
            failures.append({"file": str(path), "error": reason})
            say(f"{path}: skipped: {reason}", err=True)
            continue
        text = f"{path} ({record['width_px']}x{record['height_px']})"
        if logits is not None:
            best = logits[0].float().softmax(0).topk(min(5, logits.shape[1]))
            record["classified_at_px"] = list(seen.shape[-2:])  # height, width
            record["classes"] = [{"name": class_name(index, classes), "probability": probability}
                                 for probability, index in zip(best.values.tolist(), best.indices.tolist())]
            text += ": " + ", ".join(f"{c['name']} {c['probability']:.1%}" for c in record["classes"][:3])
        say(text + (f" -> {record['denoised']}" if "denoised" in record else ""))
        pictures.append(record)
    return pictures, failures


@torch.inference_mode()
def _apply_to_picture(network, original, path, place, size, add_noise, device):
    """The network's input (1, C, H, W), its image, its logits, and what it classified; see denoise_paths."""
    pixels = pil_to_tensor(over_white(original).convert(MODES[channels_of(network)]))[None]
    large = in_tiles(network, *pixels.shape[2:])  # it stays in 8 bit and on the CPU as a whole
    noisy = pixels if large and not add_noise else to_float(pixels, "cpu" if large else device)
    noisy = add_noise(noisy, place) if add_noise else noisy
    seen, image, logits = _classifier_view(noisy, size), None, None
    if large and network.denoises:
        forecast = Forecast(str(path), 8 if isinstance(network, SelfEnsemble) else 1)
        margin = max(TILE_MARGIN, size + padding_to(size, 64))
        image = denoise_tiled(network, noisy, device, TILE_CORE, margin, forecast.done)
    elif not large and (network.denoises or seen is noisy):
        image, logits = network(noisy)
    if network.classifies and (logits is None or seen is not noisy):
        logits = network(to_float(seen, device) if seen.dtype == torch.uint8 else seen.to(device)).logits
    return noisy, image, logits, seen


def output_names(paths: list[Path]) -> list[str]:
    """The stem of each path, counted up where another one has it: a.jpg and a.png must not write one file.
    Stems are cut to 60 characters, which have at most 240 bytes: file systems allow 255."""
    names: dict[str, str] = {}  # by lower case: some file systems do not tell it from upper case
    for path in paths:
        name, number, stem = path.stem[:60], 1, path.stem[:60]
        while name.lower() in names:
            name, number = f"{stem}_{number + 1}", number + 1
        names[name.lower()] = name
    return list(names.values())


def _classifier_view(image: Tensor, size: int) -> Tensor:
    """The image where both sides are within a factor of 2 of `size`, or a copy whose short side is `size`."""
    sides = image.shape[-2:]
    if min(sides) * 2 >= size and max(sides) <= size * 2:
        return image
    resized = [max(1, round(side * size / min(sides))) for side in sides]
    return F.interpolate(image, size=resized, mode="bilinear", align_corners=False, antialias=True)
