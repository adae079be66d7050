"""PSNR, SSIM and accuracy of a trained network at every noise level; and the network on your own pictures.

    python eval.py                                   # runs/train/best.pt on the test images of its data
    python eval.py --data CBSD68 --split all --sigmas 15/255 25/255 50/255 --noise-protocol literature
    python eval.py --input holiday.jpg               # denoise and classify a picture, or a folder of them
    python eval.py --onnx runs/export/network.onnx   # both also through onnxruntime
    python eval.py --benchmark CBSD68                # beside published denoisers, by field.py

Reads a checkpoint of train.py, or an ONNX file of export.py. Writes metrics.json, table.txt and grid.png; or
with --input the pictures and predictions.json. Levels as in Markhorst 2024: sigma 0, 0.1 ... 1 on images in
[0, 1], and the mean over them.
"""

import argparse
import itertools
import math
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, distributed, nn

import data
import leaks
import registry
import timing
import weights
from data import NOISES, Noise, Parser, is_grey, is_paired, number, split_labels, whole
from denoise import (SelfEnsemble, class_name, denoise_paths, find_pictures, localised, output_names,
                     to_picture)
from files import load_checkpoint, provenance, write_file, write_json
from latency import device_name, measure_network, ms_at_table, this_setting
from metrics import EQUAL_DB, WINDOW, luma, psnr, ssim, to_8bit
from models import apply_network, channels_of, count_macs, count_parameters, scale_of
from run import (Command, check_value, default_device, given_flags, in_turn, make_folder, prepare_device,
                 rank_and_world, say, track)

SIGMAS = tuple(level / 10 for level in range(11))
# The measured values in the order of the table: name -> (heading, format of a number).
COLUMNS = {"input_psnr_db": ("input PSNR", "{:.2f}"), "psnr_db": ("PSNR", "{:.2f}"),
           "input_ssim": ("input SSIM", "{:.4f}"), "ssim": ("SSIM", "{:.4f}"),
           "accuracy": ("accuracy", "{:.1%}"), "top5_accuracy": ("top-5", "{:.1%}")}


# --- Evaluation ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Protocol:
    """How a network is measured. sigmas: noise levels on images in [0, 1]; clip: noisy images to [0, 1].

    noise: one of data.NOISES; noise_protocol: one of data.PROTOCOLS; seed: of the noise. PSNR and SSIM leave
    out `shave` pixels at each border, and are those of `metrics.luma` with y_only.
    """

    sigmas: tuple[float, ...] = SIGMAS
    noise: str = "gaussian"
    noise_protocol: str = "own"
    seed: int = 0
    clip: bool = False
    shave: int = 0
    y_only: bool = False

    def noisy_at(self, images: Tensor, places: list[int], device, scale: int = 1):
        """uint8 images at these places of a split -> (clean in [0, 1], function sigma -> noisy)."""
        return data.clean_and_noisy(images, places, device, Noise(kind=self.noise, scale=scale), self.seed,
                                    self.clip, self.noise_protocol)

    def quality(self, image: Tensor, reference: Tensor, prefix: str = "") -> dict[str, list[float]]:
        """PSNR and, from 11 pixels on, SSIM of each image; ValueError where `shave` leaves nothing."""
        height, width = (side - self.shave for side in image.shape[-2:])
        if min(height, width) <= self.shave:
            raise ValueError(f"--shave {self.shave} leaves nothing of an image of {width + self.shave}x"
                             f"{height + self.shave} pixels; give less.")
        pair = [x.double()[..., self.shave:height, self.shave:width] for x in (image, reference)]
        pair = [luma(x) for x in pair] if self.y_only else pair
        found = {prefix + "psnr_db": psnr(*pair).clamp(max=EQUAL_DB).tolist()}
        return found | ({prefix + "ssim": ssim(*pair).tolist()} if min(pair[0].shape[-2:]) >= WINDOW else {})

    def describe(self, real: bool, channels: int, scale: int) -> dict:
        """The same in words and numbers, for metrics.json; real: the pictures have their own noise."""
        seed = self.seed if self.noise_protocol == "own" else None
        noise = (("real, of the pictures themselves", None, False, None) if real else
                 (NOISES[self.noise][1], self.noise_protocol, self.clip, seed))
        return {"colour": "Y (ITU-R 601, 16 to 235)" if self.y_only else "grey" if channels == 1 else "RGB",
                "shaved_px": self.shave, "scale": scale, "output": "clamped to [0, 1], rounded to 8 bit",
                **dict(zip(("noise", "noise_protocol", "noise_clipped", "noise_seed"), noise)),
                "input": ("as in its file" if real else f"bicubic x{scale}" if scale > 1 else
                          "clipped to [0, 1], not rounded" if self.clip else "not clipped, not rounded"),
                "psnr": f"per image, then the mean; at most {EQUAL_DB} dB, which two equal images have",
                "ssim": "Gaussian 11x11, sigma 1.5, valid region; per image, then the mean"}


@torch.inference_mode()
def evaluate(network: nn.Module, loader, protocol: Protocol, *, classes: list[str] | None = None,
             device: torch.device | str = "cpu") -> dict:
    """Measure a network (already on `device`) on a loader of (uint8 (B, C, H, W), labels (B,)).

    Returns content of metrics.json: "levels", a record of each sigma ("real" where images are pairs, with
    their own noise), "means" over levels, "chance_accuracy" of always answering "commonest_class" and more. A
    record has, each a mean over the images, `accuracy` and `top5_accuracy` (0 to 1), `psnr_db` and `ssim` of
    the denoised image, clamped and rounded to 8 bit, `input_psnr_db` and `input_ssim` of the noisy one as the
    network gets it; None for what cannot be measured.

    The noise belongs to the image's place in the loader, which must not shuffle: it is the same for every
    batch size, network and choice of levels. Sums are exact, in float64. The network gets its own mode back.
    """
    real, scale, was_training = is_paired(loader.dataset), scale_of(network), network.training
    sigmas = ("real",) if real else tuple(map(float, protocol.sigmas))
    levels = [defaultdict(list) for _ in sigmas]  # of each level: name -> a value of each image
    (rank, world), count, num_classes, channels = rank_and_world(), 0, 0, 3
    network.eval()
    try:
        for images, labels in track(loader, "evaluation", len(loader), unit="batch"):
            places = [rank + (count + i) * world for i in range(len(images))]
            clean, noisy_at = protocol.noisy_at(images, places, device, scale)  # (B, C, H, W)
            labels, boxes = split_labels(labels, device)
            count, channels, known = count + len(images), clean.shape[1], labels >= 0
            for sigma, values in zip(sigmas, levels):
                noisy, measured = noisy_at(sigma), {}
                image, logits = apply_network(network, noisy, boxes)
                if image is not None:
                    measured |= protocol.quality(to_8bit(image.float()), clean)
                    measured |= protocol.quality(_enlarged(noisy, scale), clean, "input_")
                if logits is not None:
                    num_classes = logits.shape[1]
                    hits = logits.topk(min(5, num_classes)).indices[known] == labels[known, None]  # (B, 5)
                    measured |= {"label": labels[known].tolist(), "accuracy": hits[:, 0].tolist(),
                                 "top5_accuracy": hits.any(1).tolist() if num_classes > 5 else []}
                for name, more in measured.items():
                    values[name] += more
    finally:
        network.train(was_training)
    if world > 1:  # exact sums do not depend on the order of the images
        parts = [None] * world
        distributed.all_gather_object(parts, (count, num_classes, levels))
        count, num_classes = sum(part[0] for part in parts), max(part[1] for part in parts)
        levels = [{name: sum((values[name] for values in level), []) for name in (*COLUMNS, "label")}
                  for level in zip(*(part[2] for part in parts))]
    if not count:
        raise ValueError("There is no image to evaluate on.")
    records = [{"sigma": sigma, **{name: _mean(values[name]) for name in COLUMNS}}
               for sigma, values in zip(sigmas, levels)]
    how = protocol.describe(real, channels, scale) | {"self_ensemble": isinstance(network, SelfEnsemble)}
    return {"images": count, "labelled_images": len(levels[0]["label"]), "num_classes": num_classes or None,
            "ssim_images": len(levels[0]["ssim"]), **_class_records(levels, classes), "protocol": how,
            "levels": records, "means": {
                "all_levels": _level_means(records),
                "noisy_levels": _level_means([r for r in records if real or r["sigma"] > 0])}}


def _enlarged(noisy: Tensor, scale: int) -> Tensor:
    """What a network's image is compared with: its input, or the bicubic enlargement of it in 8 bit."""
    return noisy if scale == 1 else to_8bit(data.enlarge(noisy, scale))


def _mean(values: list) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _level_means(records: list[dict]) -> dict:
    return {name: _mean([r[name] for r in records if r[name] is not None]) for name in COLUMNS}


def _class_records(levels: list[dict], classes: list[str] | None) -> dict:
    """The share of the commonest class, its name (None of several), the accuracy of each class."""
    counts, most = Counter(levels[0]["label"]), max(Counter(levels[0]["label"]).values(), default=0)
    right = Counter(label for v in levels for label, hit in zip(v["label"], v["accuracy"]) if hit)
    commonest = [class_name(label, classes) for label in counts if counts[label] == most]
    return {"chance_accuracy": most / counts.total() if counts else None,
            "commonest_class": commonest[0] if len(commonest) == 1 else None,
            "class_accuracy": {class_name(label, classes): {
                "accuracy": right[label] / (count * len(levels)), "images": count}
                for label, count in sorted(counts.items())}}


# --- Reports ------------------------------------------------------------------------------------------------

def format_table(metrics: dict) -> str:
    """A table to read, of what `evaluate` returns, or of metrics.json."""
    levels, means = metrics["levels"], metrics["means"]
    names = [name for name in COLUMNS if any(record[name] is not None for record in levels)]
    widths = {name: max(6, len(COLUMNS[name][0])) + 2 for name in names}
    real = levels[0]["sigma"] == "real"
    sigmas = ["real"] if real else data.format_sigmas([record["sigma"] for record in levels])
    lines = [f"{'noise' if real else 'sigma':<17}" + "".join(f"{COLUMNS[n][0]:>{widths[n]}}" for n in names)]
    for label, record in [*zip(sigmas, levels), ("mean, sigma > 0", means["noisy_levels"]),
                          ("mean, all levels", means["all_levels"])][:1 if real else None]:
        lines.append(f"{label:<17}" + "".join(f"{_cell(n, record[n]):>{widths[n]}}" for n in names))
    for place in (1,) if real else (1, -2):
        lines.insert(place, "-" * len(lines[0]))
    if 0 < len(metrics["class_accuracy"]) <= 20:
        width = max(17, *map(len, metrics["class_accuracy"]))
        lines += ["", f"{'class, all levels':<{width}}  accuracy  images"]
        lines += [f"{name:<{width}}{record['accuracy']:>10.1%}{record['images']:>8,}"
                  for name, record in metrics["class_accuracy"].items()]
    return "\n".join([*lines, "", *_notes(metrics, "psnr_db" in names, real)])


def _cell(name: str, value: float | None) -> str:
    text = "-" if value is None else COLUMNS[name][1].format(value)
    return text[1:] if text == "-0.00" else text


def _notes(metrics: dict, denoises: bool, real: bool) -> list[str]:
    """What was measured and how, in sentences."""
    protocol, network, timed = metrics["protocol"], metrics.get("network"), metrics.get("latency")
    notes, name = [f"{metrics['images']:,} images"], metrics["commonest_class"]
    if metrics["chance_accuracy"] is not None:
        notes[0] += (f"; always answering {f'the commonest class, {name},' if name else 'one class'} gives "
                     f"{100 * metrics['chance_accuracy']:.1f} % ({metrics['num_classes']} classes)")
    if denoises and metrics["ssim_images"] < metrics["images"]:
        notes[0] += f"; SSIM of the {metrics['ssim_images']:,} that are {WINDOW} pixels or larger"
    if network:
        notes.append(f"{network['parameters']:,} parameters, {network['macs'] / 1e6:,.1f} M multiply-"
                     "accumulates at {size_px}x{size_px}".format(**network))
    if timed:
        took = timing.format_ms(timed["median_ms"], timed.get("slowdown"), digits=2)
        notes.append(f"latency {took} " + "per batch of {batch} at {size}x{size} ({p10_ms:.2f} to "
                     "{p90_ms:.2f}, 10 to 90 % of {count} runs) on {device}".format(**timed) +
                     (f", threads: {timed['threads']}" if timed["threads"] else ""))
        notes += timing.notes(timed)
    if denoises:
        shaved = f" without {protocol['shaved_px']} pixels at each border" if protocol["shaved_px"] else ""
        notes.append("PSNR (dB, at most {1}) and SSIM on {colour}{0}: output {output}; noisy input "
                     "{input}".format(shaved, EQUAL_DB, **protocol))
    if protocol["self_ensemble"]:
        notes.append("self-ensemble: the image is the mean of eight passes, over flips and quarter turns; "
                     "latency and multiply-accumulates are those of one")
    seed, clip = protocol["noise_seed"], "clipped to [0, 1]" if protocol["noise_clipped"] else "not clipped"
    how = "numpy's RandomState(0) for every image, as in the literature" if seed is None else f"seed {seed}"
    return [*notes, f"noise: {protocol['noise']}" + ("" if real else f", {clip}; {how}")]


TILE, GAP, LINE = 192, 8, 20  # of the picture grid: pixels
RIGHT, WRONG, INK = (0, 110, 40), (190, 0, 0), (0, 0, 0)


@torch.inference_mode()
def save_grid(path: str | Path, network: nn.Module, dataset, protocol: Protocol, *,
              classes: list[str] | None = None, device: torch.device | str = "cpu") -> None:
    """Save a picture with a row for each of up to 5 noise levels: noisy | denoised | clean, PSNR, class.

    PSNR is of whole pictures and all channels. Examples are drawn by the seed, with noise as in `evaluate`.
    Small images are enlarged without smoothing, large ones cut. The network must be in eval mode.
    """
    real, scale, rows = is_paired(dataset), scale_of(network), []
    sigmas = sorted(set(protocol.sigmas) - {0.0}) or [0.0]
    count = min(5, len(dataset) if real else len(sigmas))
    sigmas = [sigmas[round(row * (len(sigmas) - 1) / max(1, count - 1))] for row in range(count)]
    texts = ["real noise"] * count if real else [f"sigma {text}" for text in data.format_sigmas(sigmas)]
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(protocol.seed)).tolist()
    for place, sigma, text in zip(itertools.cycle(order), sigmas, texts):
        pixels, label = dataset[place]
        clean, noisy_at = protocol.noisy_at(pixels[None], [place], device, scale)
        noisy, (labels, boxes) = noisy_at(sigma), split_labels(torch.as_tensor(label)[None], device)
        image, logits = apply_network(network, noisy, boxes)
        noisy = _enlarged(noisy, scale)
        if image is not None:
            before, after = (psnr(x.double(), clean.double()).item() for x in (noisy, to_8bit(image.float())))
            text += f": PSNR {before:.1f} -> {after:.1f} dB"
        lines = [(text, INK)]
        if logits is not None:
            lines += [_verdict(values, label, classes) for values, label in zip(logits, labels.tolist())]
        rows.append(([_tile(x[0]) for x in (noisy, image, clean) if x is not None], lines))
    names = ("noisy", "denoised", "clean") if scale == 1 else ("bicubic", "enlarged", "clean")
    canvas = _draw_grid(names if network.denoises else ("noisy", "clean"), rows)
    write_file(path, lambda temporary: canvas.save(temporary, format="PNG"))


def _draw_grid(names: tuple[str, ...], rows: list[tuple[list, list]]) -> Image.Image:
    """Rows of ([a tile of each name], [(text, colour)]) on white."""
    font, step = ImageFont.load_default(size=14), max(tiles[0].width for tiles, _ in rows) + GAP
    height = LINE + GAP + sum(tiles[0].height + len(lines) * LINE + 2 * GAP for tiles, lines in rows)
    canvas = Image.new("RGB", (GAP + len(names) * step, height), "white")
    draw, y = ImageDraw.Draw(canvas), LINE + GAP
    for column, name in enumerate(names):
        draw.text((GAP + column * step, GAP // 2), name, fill=INK, font=font)
    for tiles, lines in rows:
        for column, tile in enumerate(tiles):
            canvas.paste(tile, (GAP + column * step, y))
        for line, (text, colour) in enumerate(lines):
            while font.getlength(text) > canvas.width - 2 * GAP:  # long class names
                text = text[:-4] + "..."
            draw.text((GAP, y + tiles[0].height + line * LINE + 2), text, fill=colour, font=font)
        y += tiles[0].height + len(lines) * LINE + 2 * GAP
    return canvas


def _tile(image: Tensor) -> Image.Image:
    top, left = (max(0, (side - 2 * TILE) // 2) for side in image.shape[-2:])
    picture = to_picture(image[:, top:top + 2 * TILE, left:left + 2 * TILE])
    scale = max(1, round(TILE / min(picture.size))) if max(picture.size) < TILE else 1
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _verdict(logits: Tensor, label: int, classes: list[str] | None) -> tuple[str, tuple[int, int, int]]:
    """The text of a row and its colour: the predicted class, its probability, the true class if known."""
    probability, index = (value.item() for value in logits.float().softmax(0).max(0))
    text = f"predicted {class_name(index, classes)} ({probability:.0%})"
    if label in (-1, index):
        return (text, INK) if label < 0 else (f"{text}: right", RIGHT)
    return f"{text}: wrong, it is {class_name(label, classes)}", WRONG


# --- Command line -------------------------------------------------------------------------------------------

AS_TRAINED = "that of the checkpoint's training"
WITH_BENCHMARK = {"benchmark", "checkpoint", "output_dir", "device", "threads"}
OF_TRAINING = ("data_root", "noise", "train_folders", "sigma", "sigmas")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="eval.py", usage="python eval.py [options]  (--help lists them)",
        description="Measure PSNR, SSIM, accuracy and latency of a trained network, or use it on pictures.",
        epilog="examples:\n"
               "  python eval.py --checkpoint runs/train/best.pt\n"
               "  python eval.py --data my_images --sigmas 0 15/255 25/255 --batch-size 8 --no-latency\n"
               "  python eval.py --input holiday_pictures --output-dir denoised",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("run", "what is measured, where, and where the results go").add_argument
    add("--checkpoint", default="runs/train/best.pt", metavar="FILE",
        help="checkpoint that train.py wrote (default: %(default)s; where that is not there, for --input, "
             "--data and --benchmark a denoiser that comes with the project)")
    add("--onnx", metavar="FILE",
        help="an ONNX file of export.py instead of a checkpoint, run by onnxruntime on the CPU (default: "
             "none)")
    add("--output-dir", default="runs/eval", metavar="DIR", help="folder of results (default: %(default)s)")
    add("--device", default=default_device(), help="cuda or cpu (default: cuda if there is one)")
    add("--threads", type=whole(1, 4096), metavar="N",
        help="threads of torch on a CPU; the latency has those of the search (default: torch's choice)")
    add("--seed", type=whole(0), default=0, metavar="N",
        help="seed of the noise; data is split by the checkpoint's own seed (default: %(default)s)")
    data.add_data_arguments(parser, training=False)
    parser.set_defaults(data=AS_TRAINED, data_root=AS_TRAINED)
    for action in parser._actions:
        if action.dest in ("size", "train_folders"):
            action.help = f"{action.help.split(' (default')[0]} (default: {AS_TRAINED})"
    add = parser.add_argument_group("evaluation", "images, noise, measures").add_argument
    add("--split", choices=("val", "test", "all"), default="test",
        help="test: images on which no choice was made; val: those on which best.pt was chosen; all: every "
             "picture below a folder, whole and without labels (default: %(default)s)")
    add("--sigmas", type=number(0, 100), nargs="+", metavar="SIGMA",
        help="noise levels, standard deviations on images in [0, 1], also as 25/255; pictures with real "
             "noise have no others (default: those of the training, or 11 steps up to its highest; for "
             "super-resolution 0)")
    add("--noise", choices=NOISES, help=f"kind of the noise, see train.py --help (default: {AS_TRAINED})")
    add("--noise-protocol", choices=data.PROTOCOLS, default="own",
        help="own: each image has own noise, by --seed; literature: all have numpy's RandomState(0).normal("
             "0, sigma, (H, W, C)), as in published tables of Gaussian noise (default: %(default)s)")
    add("--clip", action="store_true", help="clip noisy images to [0, 1], as sensors do (default: not)")
    add("--self-ensemble", action="store_true",
        help="denoise by the mean of eight passes, over flips and quarter turns of the image, each turned "
             "back; the class is that of the upright image (default: one pass)")
    add("--shave", type=whole(0, 4096), metavar="PIXELS",
        help="pixels at each border that PSNR and SSIM leave out (default: 0; super-resolution: its factor)")
    add("--luma", action=argparse.BooleanOptionalAction,
        help="PSNR and SSIM of Y of YCbCr alone (ITU-R 601, 16 to 235), as in super-resolution; about 2 dB "
             "higher (default: all channels; super-resolution in colour: Y)")
    add("--batch-size", type=whole(1), default=32, metavar="N",
        help="images per batch, of no influence on the numbers (default: %(default)s; whole pictures: 1)")
    add("--no-latency", action="store_true",
        help="no latency (default: in the setting of the search, or at batch 32 on CUDA, 1 on a CPU)")
    add = parser.add_argument_group("your own pictures", "instead of an evaluation").add_argument
    add("--input", metavar="FILE_OR_DIR",
        help="picture or folder of pictures, of any size, to denoise and classify; above twice or below half "
             "the training size it is classified as a copy of that size (default: an evaluation)")
    add("--sigma", type=number(0, 100), default=0.0, metavar="SIGMA",
        help="standard deviation of noise to add to --input, on images in [0, 1] (default: 0, none)")
    add("--overwrite", action="store_true",
        help="write over pictures that are already in --output-dir (default: refuse)")
    add = parser.add_argument_group("published denoisers", "instead of an evaluation").add_argument
    add("--benchmark", nargs="+", metavar="DIR",
        help="folders of clean pictures, as CBSD68, or of pairs with real noise: a table of this denoiser "
             "beside published ones, all timed on this device (default: an evaluation)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    with Command(parser) as command:
        args = parser.parse_args(argv)
        command.stopped = f"what is in {args.output_dir} may be of an earlier run"
        given = given_flags(parser, argv)
        network, checkpoint, device = load_network(args, given)
        defaults = as_trained(network, checkpoint)
        folders = defaults.pop("train_folders")
        vars(args).update(defaults | given)
        if is_same_data(args.data, checkpoint.get("data")):
            args.train_folders = args.train_folders or folders
        protocol = Protocol(tuple(args.sigmas), args.noise, args.noise_protocol, args.seed, args.clip,
                            args.shave, args.luma)
        data.check_protocol(args.noise, args.noise_protocol)
        network = SelfEnsemble(network) if args.self_ensemble else network
        about = {"made": provenance(device_name(device), args.seed),
                 "checkpoint": args.onnx or args.checkpoint, "epoch": checkpoint["epoch"]}
        common = {"classes": checkpoint["classes"], "device": device, "size": args.size}
        output_dir = Path(args.output_dir)
        if args.benchmark:
            if others := given.keys() - WITH_BENCHMARK:
                flag = min(others).replace("_", "-")
                raise ValueError(f"--benchmark has a protocol of its own: leave --{flag} out.")
            if rank_and_world()[1] > 1:
                raise ValueError("--benchmark times networks: run it in one process.")
            import field  # which imports this file
            make_folder(output_dir)
            field.report(network, checkpoint, args.size, args.benchmark, output_dir, about, device)
            return
        if args.input is None:
            for flag, instead in (("sigma", "an evaluation takes --sigmas"), ("overwrite", "leave it out")):
                if flag in given:
                    raise ValueError(f"--{flag} is for --input; {instead}.")
        else:
            paths = find_pictures(Path(args.input), output_dir)
            sys.exit(report_pictures(localised(network, args.size), paths, output_dir, protocol, args.sigma,
                                     about, args.overwrite, **common))
        dataset = load_split(network, checkpoint, args.split, protocol, vars(args))
        if getattr(dataset, "whole", False) and rank_and_world()[0] == 0:
            say_leaks({args.data: dataset}, checkpoint)
        about |= {"data": args.data, "split": args.split, "data_seed": checkpoint["seed"]}
        searched = checkpoint["record"].get("latency") or {}
        report_evaluation(network, dataset, output_dir, protocol, about, **common, batch_size=args.batch_size,
                          workers=args.workers, searched=None if args.no_latency else searched)


def load_network(args: argparse.Namespace, given: dict) -> tuple[nn.Module, dict, torch.device]:
    """The network of the checkpoint or of the ONNX file, what is known of its training, and its device."""
    if args.onnx is None:
        device = prepare_device(args.device, args.threads, args.seed)
        asked = {"input", "benchmark", "data"} & given.keys()
        if asked and "checkpoint" not in given and not Path(args.checkpoint).exists():
            args.checkpoint = shipped_checkpoint(args)
        return *load_checkpoint(args.checkpoint, device), device
    if "checkpoint" in given or given.get("device", "cpu") != "cpu":
        raise ValueError("--onnx runs a file of export.py on the CPU: leave --checkpoint and --device out.")
    from export import load_onnx  # which imports this file
    device = prepare_device("cpu", args.threads, args.seed)
    return *load_onnx(args.onnx, torch.get_num_threads()), device


def shipped_checkpoint(args: argparse.Namespace) -> str:
    """The denoiser that comes with the project: the grey one if every picture of --input is grey, else that
    for colours. Where it is not there, --checkpoint: reading that then says so."""
    pictures = [] if args.input is None else find_pictures(Path(args.input), Path(args.output_dir))
    grey = {is_grey(path) for path in pictures} - {None} == {True}
    path = (weights.find("grey") if grey else None) or weights.find("colour")
    if not path:
        return args.checkpoint
    say(f"note: {args.checkpoint} is not there: {path.name}, a denoiser that comes with the project, is "
        "used. python weights.py tells how it was trained.", err=True)
    return str(path)


def as_trained(network: nn.Module, checkpoint: dict) -> dict:
    """The flags of an evaluation that follow the training: data, size, noise, and how quality is measured."""
    trained, scale = checkpoint.get("flags") or {}, scale_of(network)  # the oldest have no flags
    flags = {action.dest: check_value(action, trained[action.dest]) for action in build_parser()._actions
             if action.dest in OF_TRAINING and trained.get(action.dest) is not None}
    return {"data": checkpoint.get("data"), "data_root": flags.get("data_root", "data"),
            "size": checkpoint["size"], "train_folders": flags.get("train_folders"),
            "noise": flags.get("noise", "gaussian"),
            **({"sigmas": trained_sigmas(flags), "shave": 0, "luma": False} if scale == 1 else
               {"sigmas": (0.0,), "shave": scale, "luma": channels_of(network) == 3})}


def trained_sigmas(flags: dict) -> tuple[float, ...]:
    """The levels of an evaluation by the flags of the training: its own, or 11 steps up to its highest."""
    sigmas, highest = flags.get("sigmas"), flags.get("sigma") or 1.0  # also of what saw clean images only
    return tuple(sigmas) if sigmas else tuple(highest * level for level in SIGMAS)


def is_same_data(name: str | None, other: str | None) -> bool:
    """Whether two names of data are one, or two paths of one folder."""
    return name == other or None not in (name, other) and os.path.isdir(name) and (
        os.path.realpath(name) == os.path.realpath(other))


def say_leaks(sets: dict, checkpoint: dict, most: int = 2000) -> None:
    """Name the pictures of test sets, {folder: dataset}, that are among the images of the training, whole or
    in part, where those are there and no more than `most`: for each it takes 20 ms."""
    left_out = (checkpoint.get("flags") or {}).get("leave_out") or ()
    known = (checkpoint.get("data"), *left_out)
    pictures = [clean for name, dataset in sets.items() if not any(is_same_data(name, one) for one in known)
                for clean, *_ in dataset.files]
    folder, listed = Path(str(checkpoint.get("data"))), checkpoint.get("images") or {}
    lines = [line for split in ("train", "val") for line in listed.get(split, "").split("\n")]
    others = [path for line in lines if (path := folder / line.partition(" ")[2]).is_file()]
    for picture, other, _ in leaks.find(pictures, others) if len(others) <= most else ():
        say(f"note: {picture} is the same picture as {other}, of the training, and says nothing about new "
            f"ones; train.py --leave-out {picture.parent} trains without.", err=True)


def load_split(network: nn.Module, checkpoint: dict, split: str, protocol: Protocol, flags: dict):
    """Images to measure on, split as in the training; flags: see add_data_arguments; ValueError if unfit."""
    name, grey, classes = flags["data"], channels_of(network) == 1, checkpoint["classes"]
    if name is None:
        raise ValueError("The checkpoint does not say which images it was trained on; give --data.")
    if grey and protocol.y_only:
        raise ValueError("--luma is of colour images, and the network is for grey ones: leave it out.")
    if split == "all":
        source = data.load_everything(name, size=flags["size"], grey=grey)
    elif grey and name in data.SCENES:
        raise ValueError(f"The network takes grey images, and {name} is drawn in colour; give a folder.")
    else:
        same = is_same_data(name, checkpoint.get("data"))
        kept = {"splits": checkpoint.get("splits"), "images": checkpoint.get("images") if same else None}
        unused = {f"{part}_images": 1 for part in ("train", "val", "test") if part != split}
        source = in_turn(lambda: data.data_from({**flags, **unused, "seed": checkpoint["seed"], "grey": grey},
                                                kept))
        if source.changes:
            say(f"note: the images of {name} are others than in the training: {source.changes}. Those that "
                "are left are on the sides that they had; new ones are not used.", err=True)
    part = "val" if split == "val" else "test"
    dataset, known, scale = getattr(source, part), source.classes, scale_of(network)
    if scale > 1 and is_paired(dataset):
        raise ValueError(f"{name} holds pairs of one size, and the network enlarges; give clean images only.")
    if known is None and not network.denoises:
        raise ValueError(f"{name} has no labels, and the network only classifies; give class folders.")
    if known and network.classifies and known != classes:
        if classes and len(known) != len(classes):
            raise ValueError(f"The network knows {len(classes)} classes, and {name} has {len(known)}.")
        moved = [one for one, other in zip(known, classes or ()) if one != other and one in classes]
        if moved:
            raise ValueError(f"The classes of {name} are in another order than in the training, {moved[0]} "
                             "for example: give the class folders the names that they had.")
        say(f"note: the classes of {name} have other names than in the training; their order counts." if
            classes else "note: the network was trained without labels; its accuracy is chance.", err=True)
    if known:
        device = next(network.parameters(), torch.empty(0)).device
        boxes = split_labels(torch.as_tensor(dataset[0][1])[None], device)[1]
        registry.check_fits(network, checkpoint["record"]["model"], source.size // scale, boxes)
    if getattr(dataset, "whole", False):
        side, file = data.smallest(dataset)
        if side < scale:
            raise ValueError(f"{file} has a side of {side} pixels, and the network enlarges {scale} times.")
        if side < 64:  # larger ones fit all networks
            registry.check_fits(network, f"{checkpoint['record']['model']} on {file}", side // scale)
    if split == "test" and (checkpoint.get("splits") or 1) == 1:
        say("note: the checkpoint is of an older version; these images also chose its epoch.", err=True)
    say(f"{split}: {source.sources[part]}")
    return dataset


def report_evaluation(network: nn.Module, dataset, output_dir: Path, protocol: Protocol, about: dict, *,
                      size: int, classes: list[str] | None, device: torch.device, batch_size: int,
                      workers: int, searched: dict | None) -> None:
    """Measure the network, write and print the reports. searched: the record's latency, in whose setting the
    network is timed; None: it is not timed."""
    make_folder(output_dir)  # fail before the work, not after
    rank, world = rank_and_world()
    loader = data.make_loader(dataset, batch_size, workers=workers, device=device, rank=rank, world=world)
    one_pass = network.network if isinstance(network, SelfEnsemble) else network
    network, size, setting = localised(network, size), size // scale_of(network), None
    if searched is not None:  # the latency compares with the target where the kind of device is the same
        there = searched.get("setting") or {}
        names = ("batch", "threads", "dtype", "mode") if there.get("device_type") == device.type else ()
        setting = this_setting(str(device), size=size, num_classes=len(classes or []),
                               **{name: there[name] for name in names if name in there})
    measured = evaluate(network, loader, protocol, classes=classes, device=device)
    if rank > 0:
        return
    if hasattr(one_pass, "session"):  # of onnxruntime
        cost, timed = one_pass.cost, setting and one_pass.measure(setting)
    else:
        cost = {"parameters": count_parameters(one_pass), "macs": count_macs(one_pass, size), "size_px": size}
        timed = setting and measure_network(one_pass, setting)
    timed = timed and {**vars(timed), **vars(setting)}
    if timed and (at_table := ms_at_table(searched, setting)):
        timed["slowdown"] = timed["median_ms"] / at_table
    metrics = {"format": "joint-eval", "version": 2, **about, **measured, "network": cost, "latency": timed}
    table = format_table(metrics)
    write_json(output_dir / "metrics.json", metrics)
    write_file(output_dir / "table.txt", lambda temporary: temporary.write_text(
        table + "\n", encoding="utf-8", errors="backslashreplace"))
    save_grid(output_dir / "grid.png", network, dataset, protocol, classes=classes, device=device)
    say(f"{table}\nwrote metrics.json, table.txt and grid.png to {output_dir}")


def report_pictures(network: nn.Module, paths: list[Path], output_dir: Path, protocol: Protocol, sigma: float,
                    about: dict, overwrite: bool, *, size: int, classes: list[str] | None,
                    device: torch.device) -> int:
    """Denoise and classify pictures, write predictions.json; 1 if a file could not be read, else 0."""
    make_folder(output_dir)
    written = [output_dir / "predictions.json", *(
        output_dir / f"{name}_{kind}.png" for name in output_names(paths) for kind in ("denoised", "noisy"))]
    there = [] if overwrite else [str(path) for path in written if path.exists()]
    if there:
        raise ValueError(f"{there[0]}{f' and {len(there) - 1} others are' if there[1:] else ' is'} already "
                         "there; write over it with --overwrite, or name another --output-dir.")
    noise = Noise(kind=protocol.noise)
    add_noise = lambda clean, place: noise.add_fixed(
        clean, [place], protocol.seed, protocol.noise_protocol, protocol.clip)(sigma)
    pictures, failures = denoise_paths(network, paths, output_dir, size=size, classes=classes,
                                       add_noise=add_noise if sigma else None, device=device)
    write_json(output_dir / "predictions.json", {
        "format": "joint-predictions", "version": 1, **about, "sigma_added": sigma, "noise": protocol.noise,
        "noise_protocol": protocol.noise_protocol, "noise_clipped": protocol.clip, "training_size_px": size,
        "self_ensemble": isinstance(network, SelfEnsemble), "pictures": pictures, "failures": failures})
    say(f"wrote predictions.json and the pictures to {output_dir}")
    if failures:
        say(f"{len(failures)} of {len(paths)} files could not be used: "
            f"{', '.join(failure['file'] for failure in failures)}", err=True)
    return 1 if failures else 0


if __name__ == "__main__":
    main()
