"""Pictures of a test set that are in the training images as well, whole or in part.

    python leaks.py --test Set12 --train BSDS500/train BSDS500/test    # names them
    python train.py --leave-out Set12 ...                              # trains without them

Reads the folders alone. Two pictures are compared by their details (each pixel of a small copy minus the mean
around it): the middle square of the one against every place of the other, at sizes from the whole height down
to half of it. Of BSDS500 and Set5, Set12, Set14 and CBSD68, what is not the same correlates by 0.54 at most,
and the two that are the same, cut and shrunk, by 0.81 and 0.94. A mirrored or turned picture is not found.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import data
from data import Parser
from run import Command, say, track

SIDE, AROUND = 24, 2  # pixels of the middle square, and of its surroundings that are subtracted
SHARES = 1.0, 0.9, 0.8, 0.7, 0.6, 0.5  # of the other picture's short side, that the square may have there
ALIKE = 0.7  # the correlation from which two pictures are the same


def details(picture: Image.Image, side: int) -> Tensor:
    """A grey picture with a short side of `side` pixels, less the means around each pixel: (1, 1, h, w)."""
    scale = side / min(picture.size)
    size = [max(side, round(scale * length)) for length in picture.size]
    small = picture.resize(size, Image.Resampling.BOX)
    pixels = torch.from_numpy(np.asarray(small, np.float32).copy())[None, None]
    around = F.pad(pixels, (AROUND,) * 4, mode="replicate")
    return pixels - F.avg_pool2d(around, 2 * AROUND + 1, 1)


def find(pictures: list[Path], others: list[Path]) -> list[tuple[Path, Path, float]]:
    """(picture, other, correlation) of those that are the same; DataError where a file cannot be read."""
    if not pictures or not others:
        return []
    squares, found = [], []
    for path in pictures:
        small = details(data.load_image(path).convert("L"), SIDE)
        top, left = ((length - SIDE) // 2 for length in small.shape[-2:])
        squares.append(small[..., top:top + SIDE, left:left + SIDE])
    squares = torch.cat(squares)
    squares = squares - squares.mean((2, 3), keepdim=True)
    squares = squares / squares.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1.0)
    ones = torch.ones(1, 1, SIDE, SIDE)
    for other in track(others, "leaks", len(others), unit="file"):
        picture, best = data.load_image(other).convert("L"), torch.zeros(len(pictures))
        for share in SHARES:
            small = details(picture, round(SIDE / share))
            variance = F.conv2d(small.square(), ones) - F.conv2d(small, ones).square() / SIDE**2
            alike = F.conv2d(small, squares) / variance.clamp(min=1.0).sqrt()
            best = torch.maximum(best, alike.amax((0, 2, 3)))
        found += [(pictures[place], other, best[place].item()) for place in (best >= ALIKE).nonzero()[:, 0]]
    return found


def files_of(folders: list[str]) -> list[Path]:
    """Every picture below these folders."""
    return [path for folder in folders for path in data.list_images(folder, recursive=True)]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="leaks.py", usage="python leaks.py --test DIR --train DIR [DIR ...]",
                    description="Name the test pictures that are in the training images, whole or in part.",
                    epilog="examples:\n  python leaks.py --test Set12 --train BSDS500/train BSDS500/test\n"
                           "  python leaks.py --test Set5 --train BSDS500\n"
                           "  python leaks.py --test holiday --train photos/train",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", metavar="DIR", help="the pictures that results are reported on")
    parser.add_argument("--train", nargs="+", metavar="DIR", help="those that are learned from")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with Command(parser):
        if not args.test or not args.train:
            raise ValueError("Give both --test and --train, folders of pictures.")
        pictures, others = files_of([args.test]), files_of(args.train)
        pairs = find(pictures, others)
        for picture, other, correlation in pairs:
            say(f"{picture} is in {other} (correlation {correlation:.2f})")
        say(f"{len({picture for picture, *_ in pairs})} of {len(pictures)} pictures are among the "
            f"{len(others)} others." + (f" To train without: --leave-out {args.test}" if pairs else ""))


if __name__ == "__main__":
    main()
