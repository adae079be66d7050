"""The networks by name, and the search methods: what a record names is built here.

    python registry.py               # lists the named models; --json: for programs

    import registry
    network = registry.build_network(registry.named_record("unet-s", num_classes=10, made={}))

Reads and writes no files. Needs models.py; other methods and networks where their files lie beside it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models import (COUNTS, MODELS, UNIFORM, Arch, UNet, apply_network, channels_of, count_macs,
                    count_parameters, make_network, named_arch)

RECORD = {"format": "joint-arch", "version": 1}  # how every record begins; files.py reads and writes them
PAPER_SIZE = 224  # pixels, the input of Markhorst 2024, section 4
# File of a search method: its names for --model. Where two files have a name, the later one is the default.
METHODS = {"elastic": MODELS[:3], "tfnas": MODELS, "superkernel": ("superkernel",), "hinas": ("hinas",)}
JOINT = [method for method, names in METHODS.items() if {*names} <= {*MODELS}]  # their records hold an Arch


def method_module(method: str):
    """The module of a search method; ValueError where there is no such method or file."""
    if method not in METHODS:
        raise ValueError(f"The search method {method!r} is unknown; known are {', '.join(METHODS)}, named.")
    try:
        return importlib.import_module(method)
    except ModuleNotFoundError as error:
        if error.name != method:
            raise
        raise ValueError(f"The search method {method} needs {method}.py beside registry.py.") from None


@dataclass(frozen=True)
class Named:
    """A network made by hand; `flops`: those of its paper, counted as in baselines.paper_flops, or None.
    `widen`: with its channels times a factor, (num_classes, factor) -> network, where that can be built."""
    build: Callable[[int], nn.Module]  # num_classes -> network
    size: int = PAPER_SIZE  # pixels, the input in its paper
    flops: float | None = None
    widen: Callable[[int, float], nn.Module] | None = None


UNET, UNET_M, UNET_S = (32, 4, 2, 2), (16, 4, 2, 2), (8, 4, 1.5, 2)  # b, d, m, c
UNET_NAME = re.compile(r"unet-b(\d{1,3})-d([1-8])-m(\d(?:\.\d)?)-c([1-9])(-mb)?(-res)?")  # any b, d, m, c
EXTENSIONS = ("baselines",)  # files beside this one that add their networks to NAMED when they are imported
NAMED = {
    "unet": Named(lambda _: UNet(*UNET), 96, 1301.8e6),
    "unet-m": Named(lambda _: UNet(*UNET_M), 96),
    "unet-s": Named(lambda _: UNet(*UNET_S), 96, 51.2e6),
    "unet-original": Named(lambda _: UNet(64, 5, 2, 2)),
}


def all_named() -> dict[str, Named]:
    """NAMED, with the networks of those EXTENSIONS that lie beside this file."""
    for name in EXTENSIONS:
        if Path(__file__).with_name(f"{name}.py").exists():
            importlib.import_module(name)
    return NAMED


def find_named(name: str) -> Named:
    """The network made by hand of this name or of a UNet's numbers ("unet-b8-d4-m1.5-c2-mb"); or KeyError."""
    numbers = UNET_NAME.fullmatch(name)
    if not numbers:
        return all_named()[name]
    b, d, m, c, mb, res = numbers.groups()  # the paper states 2.5, the expansion, of a classifier only
    make = lambda _, factor=1.0: UNet(max(1, round(int(b) * factor)), int(d), float(m), int(c),
                                      2.5 if mb else None, bool(res))
    return Named(make, 96, widen=make)


def named_record(name: str, num_classes: int, made: dict) -> dict:
    """The record of a named model, of the search space or made by hand; `made`: see files.provenance."""
    if name in UNIFORM:
        return {**RECORD, "method": "tfnas", "made": made, **named_arch(name, num_classes).to_dict()}
    return {**RECORD, "method": "named", "made": made, "model": name, "num_classes": num_classes}


def model_name(text: str) -> str:
    """A type for argparse: the name of a model."""
    if text in UNIFORM or UNET_NAME.fullmatch(text) or text in all_named():
        return text
    raise argparse.ArgumentTypeError(f"there is no model {text!r}; python registry.py lists them")


def build_network(record: dict, dropout: float = 0.0, drop_connect: float = 0.0) -> nn.Module:
    """The network of a record, with fresh weights; ValueError in one sentence where it cannot be built.
    `dropout` and `drop_connect` are for networks of the joint method; others have their own or none."""
    method = record.get("method") if isinstance(record, dict) else None
    if method in JOINT:
        return make_network(Arch.from_dict(record), dropout, drop_connect)
    if method != "named":
        module = method_module(str(method))
        return module.build(module.design_of(record))
    name, num_classes, factor = record.get("model"), record.get("num_classes"), record.get("widen", 1.0)
    if type(name) is not str or type(num_classes) is not int or num_classes not in COUNTS:
        raise ValueError("The record of a named model needs a model and num_classes.")
    try:
        named = find_named(name)
    except KeyError:
        raise ValueError(f"There is no model named {name!r}; python registry.py lists them.") from None
    if factor == 1:
        return named.build(num_classes)
    if named.widen is None or type(factor) is not float or not 0.1 <= factor <= 16:
        raise ValueError(f"The model {name} cannot be built with its channels times {factor!r:.20}.")
    return named.widen(num_classes, factor)


@torch.no_grad()
def check_fits(network: nn.Module, name: str, size: int, boxes: Tensor | None = None) -> None:
    """ValueError in one sentence where a network cannot take (channels, size, size) images or their boxes."""
    was_training, device = network.training, next(network.parameters(), torch.empty(0)).device
    try:
        images = torch.zeros(1, channels_of(network), size, size, device=device)
        logits = apply_network(network.eval(), images, boxes).logits
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(f"The model {name} cannot take images of {size}x{size} pixels ({reason}); "
                         "try another --size.") from None
    finally:
        network.train(was_training)
    digits = 1 if boxes is None else boxes.shape[1]
    if logits is not None and len(logits) != digits:
        raise ValueError(f"The model {name} classifies whole images, but these have {digits} digits each; "
                         "take one that looks at boxes, such as dcnet-s, or other --data.")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="registry.py", usage="python registry.py [options]",
        epilog="examples: python registry.py; python registry.py --json; python registry.py --classes 10",
        description="List every named model: parameters, and multiply-accumulates at its paper's input size.")
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON (default: a table)")
    add("--classes", type=int, default=100, metavar="N", help="classes of the classifiers (default: 100)")
    add("--input", type=int, metavar="PIXELS", help="height and width, px (default: those of each paper)")
    return parser


def format_rows(rows: list[dict]) -> str:
    """The named models as a table."""
    lines = [f"{'model':<24} {'denoises':>8} {'classifies':>10} {'input':>6} {'parameters':>12} {'MACs':>11}"]
    for name, *tasks, size, parameters, macs in map(dict.values, rows):
        denoises, classifies = ("yes" if task else "-" for task in tasks)
        lines.append(f"{name:<24} {denoises:>8} {classifies:>10} {size:>6} {parameters:>12,} "
                     f"{macs / 1e6:>9.2f} M")
    return "\n".join([*lines, "A UNet of any parameters: unet-b8-d4-m1.5-c2; with MBConvs: -mb at the end; "
                      "added to its input: -res."])


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.classes not in COUNTS or args.input is not None and args.input not in COUNTS:
        parser.error(f"--classes and --input must be from {COUNTS[0]} to {COUNTS[-1]}.")
    rows = []
    for name in (*UNIFORM, *all_named()):
        with torch.device("meta"):  # its numbers are not needed
            network = build_network(named_record(name, args.classes, {}))
        size = args.input or (PAPER_SIZE if name in UNIFORM else NAMED[name].size)
        try:
            macs = count_macs(network, size)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:80]
            parser.error(f"{name} cannot take an input of {size} pixels ({reason}); give a larger --input.")
        rows.append({"name": name, "denoises": network.denoises, "classifies": network.classifies,
                     "input_px": size, "parameters": count_parameters(network), "macs": macs})
    try:
        print(json.dumps(rows, indent=1) if args.json else format_rows(rows), flush=True)
    except BrokenPipeError:  # the reader has gone, as head does
        sys.stdout = open(os.devnull, "w")


if __name__ == "__main__":
    from registry import main  # not this copy of it: baselines.py fills that of the module `registry`
    main()
