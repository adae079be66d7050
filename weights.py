"""The denoisers that come with the project, and how a checkpoint becomes one of them.

    python eval.py --input photo.jpg     # uses colour or grey where runs/train/best.pt is not there
    python weights.py                    # lists them
    python weights.py --add runs/train/best.pt --name colour --about "BSDS500, train and test; research use"

The folder `weights` holds checkpoints with numbers of 16 bit, and weights.json: how each was trained, on
which data under which terms, its size and its checksum.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path

import files
import models
from data import Parser
from run import Command, say

FOLDER, FORMAT, VERSION = Path(__file__).resolve().with_name("weights"), "joint-weights", 1
REMEDY = "take the folder weights of this project again"
ENTRY = {"name": str, "file": str, "sha256": str, "bytes": int, "channels": range(1, 5), "parameters": int,
         "about": str, "command": str, "date": str, "torch": str}


def entries() -> list[dict]:
    """The entries of weights.json; none where it is not there, as beside a copied file."""
    path = FOLDER / "weights.json"
    if not path.exists():
        return []
    content = files.read_json(path, FORMAT, VERSION, REMEDY)
    files.check_fields(path, content, {"weights": [ENTRY]})
    return content["weights"]


def find(name: str) -> Path | None:
    """The checkpoint of that name, or None where there is none; ValueError where it is damaged."""
    for entry in entries():
        if entry["name"] == name:
            path = FOLDER / entry["file"]
            if not path.is_file() or checksum(path) != entry["sha256"]:
                raise ValueError(f"{path} is missing or damaged; {REMEDY}.")
            return path
    return None


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add(source: str | Path, name: str, about: str) -> None:
    """Write the network of a checkpoint, in 16 bit, as weights/NAME.pt, and its entry, in place of one of
    that name. ValueError where it is no denoiser or its numbers need more than 16 bit."""
    network, content = files.load_checkpoint(source)
    made, flags = content.get("made"), content.get("flags") or {}
    if not network.denoises or models.scale_of(network) != 1:
        raise ValueError(f"The network of {source} does not denoise; give a denoiser.")
    if not made:
        raise ValueError(f"{source} does not say how it was trained; give a checkpoint of train.py.")
    state = {key: value.half() if value.is_floating_point() else value
             for key, value in network.state_dict().items()}
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{source} has a weight that 16 bit cannot hold.")
    path = FOLDER / f"{name}.pt"
    files.save_checkpoint(path, {
        **{key: content.get(key) for key in ("classes", "size", "seed", "loss", "epoch", "made", "splits")},
        "record": content["record"], "data": None, "network": state,
        "flags": {flag: flags.get(flag) for flag in ("noise", "sigma", "sigmas")}})
    entry = {"name": name, "file": path.name, "sha256": checksum(path), "bytes": path.stat().st_size,
             "channels": models.channels_of(network), "parameters": models.count_parameters(network),
             "about": about, **made}
    kept = [one for one in entries() if one["name"] != name]
    files.write_json(FOLDER / "weights.json", {"format": FORMAT, "version": VERSION,
                                               "weights": [*kept, entry]})


def plain_name(text: str) -> str:
    """A type for argparse: the name of a file without a folder."""
    if not re.fullmatch(r"[\w-]{1,40}", text):
        raise argparse.ArgumentTypeError(f"must be letters, digits, - and _, not {text!r}")
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="weights.py", usage="python weights.py [options]  (--help lists them)",
                    description="List the denoisers that come with the project, or add one.",
                    epilog="examples:\n  python weights.py\n"
                           "  python weights.py --add colour/best.pt --name colour --about 'my photos, CC0'\n"
                           "  python weights.py --add grey/best.pt --name grey --about 'my photos, CC0'",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", metavar="FILE", help="a checkpoint of train.py (default: list them)")
    parser.add_argument("--name", type=plain_name, metavar="NAME", help="of what is added: weights/NAME.pt")
    parser.add_argument("--about", metavar="TEXT", help="the data that it learned from, and their terms")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with Command(parser):
        if len({bool(flag) for flag in (args.add, args.name, args.about)}) > 1:
            raise ValueError("--add, --name and --about belong together.")
        if args.add:
            add(args.add, args.name, args.about)
        listed = entries()
        for entry in listed:
            say("{name}: {parameters:,} parameters, {file}, {bytes:,} bytes; {command}; {date:.10}, torch "
                "{torch}; {about}".format(**entry))
        if not listed:
            say(f"There are none in {FOLDER}.")


if __name__ == "__main__":
    main()
