"""Your denoiser beside those of the field: PSNR, size, and the time that each takes on this device.

    python eval.py --benchmark CBSD68 Kodak24 McMaster     # eval.py reads the flags

The PSNR of the others is published, of colour pictures at sigma 15, 25 and 50 of 255; yours is measured in
the same protocol. All times are measured here, in turn. Pairs with real noise get a column of their own.
Writes field.txt, field.json and, with matplotlib, field.png.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import nn

import data
import eval as evaluation
import files
import latency
import models
import registry
from denoise import SelfEnsemble, localised
from run import say

FORMAT, VERSION = "joint-field", 1
LEVELS, SIZE = (15, 25, 50), 512  # of 255; pixels of the picture that is timed
SOURCE = "published, as in the tables of the repositories cszn/DPIR and cszn/FFDNet (Urban100: a later copy)"
# Name -> (name in registry.py, {folder: PSNR in dB at each level}).
FIELD = {
    "DnCNN": ("dncnn", {"CBSD68": (33.90, 31.24, 27.95), "Kodak24": (34.60, 32.14, 28.95),
                        "McMaster": (33.45, 31.52, 28.62)}),
    "IRCNN, one network a level": ("ircnn", {
        "CBSD68": (33.86, 31.16, 27.86), "Kodak24": (34.69, 32.18, 28.93), "McMaster": (34.58, 32.18, 28.91),
        "Urban100": (33.78, 31.20, 27.70)}),
    "FFDNet": ("ffdnet", {"CBSD68": (33.87, 31.21, 27.96), "Kodak24": (34.63, 32.13, 28.98),
                          "McMaster": (34.66, 32.35, 29.18), "Urban100": (33.83, 31.40, 28.05)}),
    "DRUNet": ("drunet", {"CBSD68": (34.30, 31.69, 28.51), "Kodak24": (35.31, 32.89, 29.86),
                          "McMaster": (35.40, 33.14, 30.08), "Urban100": (34.81, 32.60, 29.61)}),
    "NAFNet, width 16": ("nafnet-16", {}),  # NAFNet is published for real noise only
    "NAFNet, width 32": ("nafnet-32", {}),
}


def report(network: nn.Module, checkpoint: dict, size: int, folders: list[str], output_dir: Path, about: dict,
           device: torch.device) -> None:
    """Measure a colour denoiser (eval mode, on `device`; `size`: pixels of its training) on these folders,
    time all, write and print. The checkpoint tells its name and which pictures it has seen."""
    if not network.denoises or models.channels_of(network) != 3 or models.scale_of(network) != 1:
        raise ValueError("--benchmark is of networks that denoise colour pictures; give such a --checkpoint.")
    sets = {Path(folder).resolve().name: data.load_everything(folder).test for folder in folders}
    if len(sets) < len(folders):
        raise ValueError("Two folders of --benchmark have the same name; rename one.")
    name = checkpoint["record"]["model"]
    evaluation.say_leaks(dict(zip(folders, sets.values())), checkpoint)
    networks = [network, *(registry.find_named(model).build(1) for model, _ in FIELD.values())]
    costs, setting = time_all(networks, device)
    local = localised(network, size)
    one, eight = (measure(each, sets, device) for each in (local, SelfEnsemble(local)))
    own, *others = costs
    ensemble = {**own, "ms": 8 * own["ms"], "macs": 8 * own["macs"]}
    rows, clean = [], {where.lower(): where for where in sets if not data.is_paired(sets[where])}
    for title, cost, found, column in (("noisy", dict.fromkeys(own), one, "input_psnr_db"),
                                       (name, own, one, "psnr_db"),
                                       (f"{name}, self-ensemble", ensemble, eight, "psnr_db")):
        rows.append({"network": title, "source": "measured", **cost, "psnr_db": {
            where: {level: record[column] for level, record in found[where].items()} for where in found}})
    for (title, (model, published)), cost in zip(FIELD.items(), others, strict=True):
        rows.append({"network": title, "model": model, "source": SOURCE, **cost, "psnr_db": {
            clean[where.lower()]: dict(zip(map(str, LEVELS), values))
            for where, values in published.items() if where.lower() in clean}})
    content = {"format": FORMAT, "version": VERSION, **about, "folders": folders, "setting": vars(setting),
               "rows": rows}
    text = format_field(content)
    files.write_json(output_dir / "field.json", content)
    files.write_file(output_dir / "field.txt", lambda temporary: temporary.write_text(
        f"{text}\n", encoding="utf-8", errors="backslashreplace"))
    drawn = plot(output_dir / "field.png", rows)
    say(f"{text}\nwrote field.txt, field.json{' and field.png' if drawn else ''} to {output_dir}"
        + ("" if drawn else "; install matplotlib for a picture"))


def measure(network: nn.Module, sets: dict, device: torch.device) -> dict[str, dict[str, dict]]:
    """What eval.py measures of a network, by folder and by level, or "real"."""
    found, protocol = {}, evaluation.Protocol(tuple(level / 255 for level in LEVELS),
                                              noise_protocol="literature")
    for where, pictures in sets.items():
        loader = data.make_loader(pictures, 1, device=device)
        levels = evaluation.evaluate(network, loader, protocol, device=device)["levels"]
        names = map(str, LEVELS) if len(levels) == len(LEVELS) else ("real",)
        found[where] = dict(zip(names, levels))
    return found


def time_all(networks: list[nn.Module], device: torch.device) -> tuple[list[dict], latency.Setting]:
    """Parameters, multiply-accumulates and milliseconds of each for a picture of SIZE x SIZE pixels, through
    onnxruntime where it is installed and the device is a CPU, else with folded batch norms."""
    setting = latency.this_setting(str(device), size=SIZE, num_classes=1, batch=1,
                                   mode=latency.fast_mode(device.type))
    say(f"Timing {len(networks)} networks in turn for a picture of {SIZE}x{SIZE} pixels; the slowest takes "
        "about ten seconds on one core.")
    with contextlib.ExitStack() as stack:
        ready = [stack.enter_context(latency.prepared(network, setting)) for network in networks]
        runs = [lambda made=made, images=images: made(images) for made, images in ready]
        times = latency.interleave(runs, device, burst=1, warmup=0,
                                   min_rounds=5 if device.type == "cpu" else 25)
    return [{"parameters": models.count_parameters(network), "macs": models.count_macs(network, SIZE),
             "ms": ms} for network, ms in zip(networks, times.medians_ms)], setting


def format_field(content: dict) -> str:
    """The table to read."""
    rows, setting = content["rows"], content["setting"]
    columns = [(where, level) for where, values in rows[0]["psnr_db"].items() for level in values]
    anchor = next(row["ms"] for row in rows if row["network"] == "DnCNN")
    wide = max(len(row["network"]) for row in rows) + 2
    lines = [f"{'':<{wide}}{'parameters':>12}{'GMACs':>8}{'ms':>9}{'of DnCNN':>10}"
             + "".join(f"{f'{where} {level}':>14}" for where, level in columns)]
    for row in rows:
        mark = "" if row["source"] == "measured" else "*"
        values = [row["psnr_db"].get(where, {}).get(level) for where, level in columns]
        cost = f"{'-':>12}{'-':>8}{'-':>9}{'-':>10}"
        if row["ms"]:
            ms = f"{row['ms']:,.0f}" if row["ms"] >= 100 else f"{row['ms']:.3g}"
            cost = f"{row['parameters']:>12,}{row['macs'] / 1e9:>8.1f}{ms:>9}{row['ms'] / anchor:>10.2f}"
        lines.append(f"{row['network']:<{wide}}{cost}" + "".join(
            f"{'-' if value is None else f'{value:.2f}{mark}':>14}" for value in values))
    return "\n".join([
        *lines, "", "PSNR in dB on RGB at sigma / 255 (real: of pairs). Noise not clipped, by numpy's "
        "RandomState(0) for every picture.", f"*: {SOURCE}; one pass, not measured here.",
        f"GMACs and ms are of one picture of {SIZE}x{SIZE} pixels on {setting['device']}, {setting['mode']}, "
        f"threads: {setting['threads']}; a self-ensemble is eight passes."])


def plot(path: Path, rows: list[dict]) -> bool:
    """Draw PSNR over ms, an axis for each folder that others have values of, or for all where they have none;
    False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows, folders = [row for row in rows if row["ms"]], list(rows[0]["psnr_db"])
    others = {where for row in rows if row["source"] != "measured" for where in row["psnr_db"]}
    folders = [where for where in folders if where in others] or folders
    least, most = (edge(row["ms"] for row in rows) for edge in (min, max))
    ticks = [step * 10**power for power in range(-1, 6) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if least / 1.5 < tick < most * 1.5]
    figure = Figure(figsize=(6 * len(folders), 4.8), layout="constrained")
    for axis, where in zip(figure.subplots(1, len(folders), squeeze=False)[0], folders):
        for row in (row for row in rows if where in row["psnr_db"]):
            values, ours = row["psnr_db"][where], row["source"] == "measured"
            axis.scatter([row["ms"]] * len(values), list(values.values()), label=row["network"],
                         marker="*" if ours else "o", s=110 if ours else 40)
            for level, value in values.items():
                axis.annotate(level, (row["ms"], value), xytext=(6, -3), textcoords="offset points",
                              fontsize=8)
        axis.set(xlabel=f"ms for {SIZE}x{SIZE} pixels", ylabel="PSNR dB", xscale="log", title=where)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    pairs = [pair for axis in figure.axes for pair in zip(*axis.get_legend_handles_labels())]
    handles = {label: handle for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    files.write_file(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))
    return True
