"""Measures on your device how fast searching, training and inference are, each beside the plain way of doing it.

    python benchmark.py                                       # everything at 64 px: about 5 minutes on a CPU
    python benchmark.py --threads 1 --space 8 --output benchmark.json
    python benchmark.py --size 224 --latency-batch 32 --amp bfloat16

The plain way: NCHW tensors, every weight with its gradient in every step, float32, networks as they were trained, and a
latency that is the sum of operations timed alone. Both ways run in turn in the same process, so that their ratio can be
trusted where their times cannot. Prints a table, writes it as JSON.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import hinas
import latency
import models
import superkernel
from data import whole
from search import Searcher, frozen
from train import AMP_DTYPES, autocast, charbonnier, prepare, task_loss, write_summary

FORMAT, VERSION = "joint-benchmark", 1


def random_batch(batch_size: int, size: int, device: torch.device, channels_last: bool) -> tuple:
    """(noisy, clean, labels) of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(batch_size, 3, size, size, generator=generator)
    noisy = clean + 0.5 * torch.randn(clean.shape, generator=generator)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    labels = torch.randint(10, (batch_size,), generator=generator)
    return (noisy.to(device, memory_format=layout), clean.to(device, memory_format=layout), labels.to(device))


def compare_search(space: int, batch_size: int, size: int, device: torch.device, amp: str, seconds: float) -> list[dict]:
    """A weight step (two paths) and an alpha step of the C-NAS supernet."""
    plain_net = models.SuperNet("cnas", space, 10).to(device).train()
    optimizer = torch.optim.SGD(plain_net.weight_parameters(), 1e-3, 0.9)
    noisy, _, labels = random_batch(batch_size, size, device, channels_last=False)

    paths = torch.Generator().manual_seed(0)  # the same paths as ours, since some cost more than others

    def plain_weight_step():
        optimizer.zero_grad()
        path = plain_net.sample_path(paths)
        loss = sum(F.cross_entropy(plain_net(noisy, choice).logits, labels)
                   for choice in (path, plain_net.other_path(path, paths)))
        loss.backward()
        nn.utils.clip_grad_norm_(plain_net.weight_parameters(), 5.0)
        optimizer.step()

    def plain_alpha_step():
        plain_net.zero_grad()
        F.cross_entropy(plain_net(noisy, plain_net.mixture(5.0)).logits, labels).backward()

    searcher = Searcher(models.SuperNet("cnas", space, 10), device=device, lr=1e-3, arch_lr=1e-3, loss="cls", seed=0, amp=amp)
    batch = random_batch(batch_size, size, device, channels_last=True)
    rows = []
    for name, plain, ours in (("weight step", plain_weight_step, lambda: searcher.weight_step(batch, bi_sampling=True)),
                              ("alpha step", plain_alpha_step, lambda: searcher.arch_step(batch, 5.0))):
        rows.append({"what": f"search: {name}", "unit": "ms", **in_turn(plain, ours, device, seconds)})
    iteration = {key: rows[0][key] + rows[1][key] / 2 for key in ("plain", "ours")}
    rows.append({"what": "search: iteration (weight + half an alpha step)", "unit": "ms", **iteration,
                 "ratio": iteration["plain"] / iteration["ours"]})
    rows.append({"what": "search: images", "unit": "/s", **{k: 1e3 * batch_size / ms for k, ms in iteration.items()},
                 "ratio": iteration["plain"] / iteration["ours"]})
    return rows


def compare_training(batch_size: int, size: int, device: torch.device, amp: str, seconds: float) -> list[dict]:
    """A training step of DC-NAS with the joint loss."""
    def plain_loss(output, clean, labels):
        denoising = 0.8 * charbonnier(output.image, clean) + 0.2 * (1 - plain_ssim(output.image, clean).mean())
        return 0.1 * F.cross_entropy(output.logits, labels, label_smoothing=0.1) + 0.9 * denoising

    def our_loss(output, clean, labels):
        return task_loss(output, clean, labels, "both")[0]

    steps = []
    for channels_last in (False, True):
        network = models.Network(models.named_arch("dcnas-k3-e3", 10)).to(device).train()
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        else:
            for level in network.decoder.levels:
                level.up.plain = True
        optimizer = torch.optim.SGD(network.parameters(), 1e-3, 0.9, fused=channels_last)
        batch = random_batch(batch_size, size, device, channels_last)

        def step(network=network, optimizer=optimizer, batch=batch, amp=amp if channels_last else "off",
                 loss=our_loss if channels_last else plain_loss):
            noisy, clean, labels = batch
            with autocast(device, amp):
                output = network(noisy)
            optimizer.zero_grad(set_to_none=True)
            loss(output, clean, labels).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
        steps.append(step)
    row = in_turn(*steps, device, seconds)
    return [{"what": "training: images", "unit": "/s", "plain": 1e3 * batch_size / row["plain"],
             "ours": 1e3 * batch_size / row["ours"], "ratio": row["ratio"]}]


def measure_saving(images_per_second: float, folder: Path) -> dict:
    """What train.py writes at the end of an epoch (two checkpoints and the log), as a share of an epoch of the first run."""
    network = models.Network(models.named_arch("dcnas-k3-e3", 10))
    optimizer = torch.optim.AdamW(network.parameters())
    sum(part.square().mean() for part in network(torch.rand(2, 3, 32, 32))).backward()
    optimizer.step()
    rows = [{"epoch": epoch, "train_loss": 1.0} for epoch in range(25)]

    def save():
        models.save_checkpoint(folder / "best.pt", {"network": network.state_dict()})
        models.save_checkpoint(folder / "last.pt", {"network": network.state_dict(), "optimizer": optimizer.state_dict()})
        write_summary(folder / "summary.csv", rows)

    seconds = latency.measure(save, "cpu", warmup=1, repeats=5).median_ms / 1e3
    return {"seconds": seconds, "epoch_images": EPOCH_IMAGES, "percent_of_epoch": 100 * seconds * images_per_second / EPOCH_IMAGES}


EPOCH_IMAGES = 4000  # of the drawn digits


def plain_ssim(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """SSIM as it is mostly written, by depthwise convolutions; the same numbers as eval.ssim."""
    channels = image.shape[1]
    window = torch.exp(-((torch.arange(11) - 5) / 1.5) ** 2 / 2).to(image)
    window = (window / window.sum()).repeat(channels, 1)

    def blur(x):
        return F.conv2d(F.conv2d(x, window.view(channels, 1, 11, 1), groups=channels), window.view(channels, 1, 1, 11),
                        groups=channels)

    mean_x, mean_y = blur(image), blur(reference)
    variance_x, variance_y = blur(image ** 2) - mean_x ** 2, blur(reference ** 2) - mean_y ** 2
    covariance = blur(image * reference) - mean_x * mean_y
    return ((2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
            / ((mean_x ** 2 + mean_y ** 2 + 1e-4) * (variance_x + variance_y + 9e-4))).mean((1, 2, 3))


def compare_inference(setting: latency.Setting, modes: list[str], seconds: float) -> list[dict]:
    """The forms of `models.fast` beside the network as it was trained."""
    network = models.Network(models.named_arch("dcnas-k3-e3", setting.num_classes))
    rows = []
    for mode in modes:
        with latency.prepared(network, setting) as (eager, images), \
                latency.prepared(network, replace(setting, mode=mode)) as (fast, _):
            row = in_turn(lambda: eager(images), lambda: fast(images), setting.device_type, seconds, burst=5)
        rows.append({"what": f"inference: {mode}, batch {setting.batch}", "unit": "ms", **row})
    return rows


def in_turn(plain, ours, device: torch.device | str, seconds: float, burst: int = 1) -> dict:
    """Times of both ways, ms, and how many times as fast ours is."""
    times = latency.interleave([plain, ours], device, burst=burst, seconds=seconds)
    return {"plain": times.timings[0].median_ms, "ours": times.timings[1].median_ms, "ratio": 1 / times.ratios[1],
            "uncertainty": times.uncertainty[1]}


def naive_sum_ms(network: nn.Module, images: torch.Tensor, device: torch.device) -> float:
    """The sum of the parts, each timed alone on the input that it has inside the network: what most tables hold."""
    inputs, parts = {}, latency._named_parts(network)
    handles = [part.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args))
               for name, part in parts.items()]
    network(images)
    for handle in handles:
        handle.remove()
    return sum(latency.measure(lambda: part(*inputs[name]), device, warmup=5, repeats=15).median_ms
               for name, part in parts.items())


def compare_prediction(setting: latency.Setting, space: int, count: int) -> tuple[list[dict], dict]:
    """The median and 95th percentile error, in percent, of a naive sum and of a table on `count` random networks."""
    start = time.perf_counter()
    table = latency.LatencyTable(latency.build_table(setting, space=space, min_width=models.MIN_WIDTH))
    seconds = time.perf_counter() - start
    rng, device = random.Random(2000), torch.device(setting.device_type)
    naive, ours = [], []
    for _ in range(count):
        arch = models.random_arch("dcnas", space, rng, setting.num_classes)
        row = latency.compare(table, arch, seconds=1.0)
        ours.append(abs(row["error_percent"]))
        with latency.prepared(models.Network(arch), setting) as (network, images):
            alone = naive_sum_ms(network, images, device)
            times = latency.interleave([lambda: network(images)], device, burst=5, min_rounds=5)
        naive.append(abs(100 * (alone / times.timings[0].median_ms - 1)))

    def percentile_95(values):
        return sorted(values)[-(-95 * len(values) // 100) - 1]

    rows = [{"what": f"prediction: {name} error of {count} networks", "unit": "%", "plain": f(naive), "ours": f(ours),
             "ratio": f(naive) / f(ours)}
            for name, f in (("median", statistics.median), ("95th percentile", percentile_95))]
    return rows, {"table_seconds": seconds, "networks_timed": table.content["networks_timed"]}


def compare_memory(space: int, batch_size: int, sizes: list[int]) -> list[dict]:
    """What an alpha step keeps from its forward pass for its backward pass, most of its memory, in float32.

    Counted on shapes alone (torch's meta device): the same on every machine, and no GPU of that size is needed.
    """
    rows = []
    for size in sizes:
        supernet = models.SuperNet("cnas", space, 10).to("meta").train()
        images = torch.empty(batch_size, 3, size, size, device="meta")
        plain = kept_gib(supernet, images, supernet.mixture(5.0))
        for recompute in (False, True):
            for mixed in supernet.mixed:
                mixed.recompute = recompute
            with frozen(supernet.weight_parameters()):
                ours = kept_gib(supernet, images, supernet.mixture(5.0))
            rows.append({"what": f"memory: alpha step, {size} px" + (", --recompute" if recompute else ""), "unit": "GiB",
                         "plain": plain, "ours": ours, "ratio": plain / ours})
    return rows


def compare_restoration_memory(batch_size: int = 4, size: int = 128) -> list[dict]:
    """The same of superkernel.py beside the largest network of its space, and of hinas.py beside its supernet with unshared
    cells (eq. 6)."""
    rows = []
    for name, space in superkernel.PRESETS.items():
        images = torch.empty(batch_size, 3, size, size, device="meta")
        plain = kept_gib(superkernel.build(space.largest_design()).to("meta"), images)
        ours = kept_gib(superkernel.SuperNet(space).to("meta"), images)
        rows.append({"what": f"memory: superkernel {name}, beside its largest network", "unit": "GiB", "plain": plain, "ours": ours,
                     "ratio": plain / ours})
    for name in ("denoise", "sr-x2"):
        images = torch.empty(batch_size, 1, size // 2, size // 2, device="meta")
        kept = [kept_gib(hinas.SuperNet(hinas.PRESETS[name], share_cells=shared).to("meta"), images) for shared in (False, True)]
        rows.append({"what": f"memory: hinas {name}, cells shared", "unit": "GiB", "plain": kept[0], "ours": kept[1],
                     "ratio": kept[0] / kept[1]})
    return rows


def compare_hinas(device: torch.device, seconds: float, batch_size: int = 2, size: int = 32) -> list[dict]:
    """A pass forward and back of a HiNAS supernet, with unshared cells and with shared ones."""
    noisy, clean, _ = random_batch(batch_size, size, device, True)
    steps = []
    for shared in (False, True):
        supernet = hinas.SuperNet(hinas.Space(channels=3), share_cells=shared).to(device, memory_format=torch.channels_last)

        def step(supernet=supernet):
            F.mse_loss(supernet(noisy).image, clean).backward()
            supernet.zero_grad(set_to_none=True)
        steps.append(step)
    return [{"what": "hinas: training step, cells shared", "unit": "ms", **in_turn(*steps, device, seconds)}]


def kept_gib(supernet: nn.Module, images: torch.Tensor, *choice) -> float:
    """The tensors that a forward pass saves for its backward pass, without the weights, GiB."""
    kept = {weight.untyped_storage()._cdata: (None, 0) for weight in supernet.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()  # held, so that no other one gets its address meanwhile
        kept.setdefault(storage._cdata, (storage, storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        supernet(images, *choice)
    return sum(size for _, size in kept.values()) / 2**30


def format_rows(rows: list[dict]) -> str:
    lines = [f"{'':<60} {'plain':>10} {'ours':>10} {'ratio':>7}"]
    for row in rows:
        lines.append(f"{row['what']:<60} {row['plain']:>10.2f} {row['ours']:>10.2f} {row['ratio']:>6.2f}x  {row['unit']}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", usage="python benchmark.py [options]  (--help lists them)",
        description="Measure how fast searching, training, inference and the latency table are on this device.",
        epilog="examples:\n  python benchmark.py\n  python benchmark.py --threads 1 --space 8 --output benchmark.json\n"
               "  python benchmark.py --parts search --seconds 60",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: everything)")
    parser.add_argument("--space", type=int, choices=sorted(models.SPACES), default=8,
                        help="operations per block (default: %(default)s)")
    parser.add_argument("--size", type=whole(16, 65536), default=64, metavar="PIXELS",
                        help="height and width of the images (default: %(default)s)")
    parser.add_argument("--batch-size", type=whole(2, 65536), default=32, metavar="N",
                        help="images per step of search and training (default: %(default)s)")
    parser.add_argument("--latency-batch", type=whole(1, 65536), metavar="N",
                        help="images per batch of inference (default: 32 on CUDA, 1 on a CPU)")
    parser.add_argument("--networks", type=whole(1, 10000), default=20, metavar="N",
                        help="random networks to predict (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=models.MODES[1:],
                        help="forms of the network for inference (default: folded, and graph on CUDA)")
    parser.add_argument("--seconds", type=whole(1, 86400), default=20, metavar="S",
                        help="at most this long for each comparison (default: %(default)s)")
    parser.add_argument("--device", default=latency.default_device(), help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--threads", type=whole(1, 4096), metavar="N",
                        help="threads of torch on a CPU for search and training; latencies have one (default: torch's own)")
    parser.add_argument("--amp", choices=AMP_DTYPES,
                        help="mixed precision of ours (default: bfloat16 on CUDA, off on a CPU)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="seed of the weights (default: %(default)s)")
    parser.add_argument("--output", default="benchmark.json", metavar="FILE", help="the JSON to write (default: %(default)s)")
    return parser


PARTS = ("search", "training", "memory", "inference", "prediction")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = prepare(args)
        setting = latency.this_setting(args.device, size=args.size, num_classes=10, batch=args.latency_batch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rows, table, saving = [], None, None
        if "search" in args.parts:
            rows += compare_search(args.space, args.batch_size, args.size, device, args.amp, args.seconds)
            rows += compare_hinas(device, args.seconds)
        if "training" in args.parts:
            rows += compare_training(args.batch_size, args.size, device, args.amp, args.seconds)
            with tempfile.TemporaryDirectory(dir=Path(args.output).resolve().parent) as folder:  # the disk that runs are on
                saving = measure_saving(rows[-1]["ours"], Path(folder))
        memory = latency.peak_memory_mib(device)
        if "memory" in args.parts:
            rows += compare_memory(args.space, args.batch_size, sorted({args.size, models.PAPER_SIZE}))
            rows += compare_restoration_memory()
        if "inference" in args.parts:
            modes = args.modes or (["folded", "graph"] if device.type == "cuda" else ["folded"])
            rows += compare_inference(setting, modes, args.seconds)
        if "prediction" in args.parts:
            more, table = compare_prediction(setting, args.space, args.networks)
            rows += more
        models.write_json(args.output, {
            "format": FORMAT, "version": VERSION, "made": models.provenance(setting.device, args.seed),
            "setting": vars(setting), "space": args.space, "batch_size": args.batch_size, "amp": args.amp,
            "threads": torch.get_num_threads() if device.type == "cpu" else 0, "peak_memory_mib": memory, "table": table,
            "saving": saving, "rows": rows})
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nStopped; nothing was written.", file=sys.stderr)
        sys.exit(130)
    threads = f"{torch.get_num_threads()} threads for search and training, 1 for latency" if device.type == "cpu" else "CUDA"
    print(f"{setting.device}, {threads}; space {args.space}, batch {args.batch_size}, {args.size} px, amp {args.amp}, torch "
          f"{torch.__version__}")
    print(format_rows(rows))
    if memory is not None and {"search", "training"} & set(args.parts):
        print(f"peak memory of search and training, both ways: {memory:,.0f} MiB")
    if saving is not None:
        print(f"checkpoints and log: {saving['seconds']:.2f} s after each epoch, {saving['percent_of_epoch']:.1f} % of one of "
              f"{saving['epoch_images']:,} images")
    if table is not None:
        print(f"latency table: {table['networks_timed']} networks in {table['table_seconds']:.0f} s")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
