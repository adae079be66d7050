"""The denoisers that come with the project, and how a checkpoint becomes one of them.

    python eval.py --input photo.jpg     # uses them where runs/train/best.pt is not there
    python weights.py                    # lists them
    python weights.py --add runs/train/best.pt --name colour --about "BSDS500, train and test; research use"

The folder `weights` holds checkpoints with numbers of 16 bit, and weights.json: how each was trained, on
which data under which terms, its size and its checksum.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch

import files
import models
from data import Parser
from run import Command, say

FOLDER, FORMAT, VERSION = Path(__file__).resolve().with_name("weights"), "joint-weights", 1
REMEDY = "take the folder weights of this project again"
ENTRY = {"name": str, "file": str, "sha256": str, "channels": range(1, 5), "parameters": int, "about": str,
         "command": str}


def known() -> list[dict]:
    """The entries of weights.json; none where the folder is not there, as beside a copied file."""
    path = FOLDER / "weights.json"
    if not path.exists():
        return []
    content = files.read_json(path, FORMAT, VERSION, REMEDY)
    for entry in content.get("weights", ()):
        files.check_fields(path, entry, ENTRY)
    return content["weights"]


def find(channels: int) -> Path | None:
    """The checkpoint for pictures of so many channels; ValueError where it is damaged."""
    for entry in known():
        if entry["channels"] == channels:
            path = FOLDER / entry["file"]
            if not path.is_file() or checksum(path) != entry["sha256"]:
                raise ValueError(f"{path} is missing or damaged; {REMEDY}.")
            return path
    return None


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add(source: str | Path, name: str, about: str) -> dict:
    """Write the network of a checkpoint, in 16 bit, as weights/NAME.pt, and its entry."""
    network, content = files.load_checkpoint(source)
    if not network.denoises:
        raise ValueError(f"The network of {source} makes no images; give a denoiser.")
    flags = {flag: content["flags"].get(flag) for flag in ("noise", "sigma", "sigmas", "train_folders")}
    state = {key: value.half() if value.is_floating_point() else value
             for key, value in network.cpu().state_dict().items()}
    path = FOLDER / f"{name}.pt"
    files.save_checkpoint(path, {
        **{key: content.get(key) for key in ("classes", "size", "seed", "loss", "epoch", "made", "splits")},
        "record": content["record"], "data": None, "flags": flags, "network": state})
    entry = {"name": name, "file": path.name, "sha256": checksum(path), "bytes": path.stat().st_size,
             "channels": models.channels_of(network), "parameters": models.count_parameters(network),
             "about": about, **content["made"]}
    entries = [one for one in known() if one["name"] != name]
    files.write_json(FOLDER / "weights.json", {"format": FORMAT, "version": VERSION,
                                               "weights": [*entries, entry]})
    return entry


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="weights.py", usage="python weights.py [options]  (--help lists them)",
                    description="List the denoisers that come with the project, or add one.")
    parser.add_argument("--add", metavar="FILE", help="a checkpoint of train.py (default: list them)")
    parser.add_argument("--name", metavar="NAME", help="of what is added: weights/NAME.pt")
    parser.add_argument("--about", metavar="TEXT", help="the data that it learned from, and their terms")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with Command(parser):
        if len({bool(flag) for flag in (args.add, args.name, args.about)}) > 1:
            raise ValueError("--add, --name and --about belong together.")
        if args.add:
            with torch.inference_mode():
                add(args.add, args.name, args.about)
        for entry in known():
            say("{name}: {parameters:,} parameters, {file}, {bytes:,} bytes; {command}; {date:.10}, torch "
                "{torch}; {about}".format(**entry))


if __name__ == "__main__":
    main()
