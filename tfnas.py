"""The joint method: searches C-NAS, D-NAS or DC-NAS, networks that denoise and classify within a latency.

    python search.py --target 12                       # a dcnas; search.py runs this file
    python search.py --model cnas --help               # the flags of this method

TF-NAS (Hu, Wu and He 2020) as changed by Markhorst, van Gemert and Kayhan 2024, section 4. The networks and
the bare supernet are in models.py. Here are the costs of the space, the fit of operations and widths to a
target, and how the supernet's weights and its architecture `alpha` are trained.

Differences from TF-NAS's code: the optimizers keep their state over epochs (there they are made anew), alpha
learns from augmented images (there from centre crops), the momentum of an operation that was not sampled
stays as it is.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import files
import latency
import models
import run
from data import Pairs, number, whole
from models import Arch, Block
from train import task_loss

TABLE_DECODERS = ("sharp", "conv")  # those that a latency table holds
TRAIN_DEFAULTS: dict = {}
SPACES, STRATEGIES = ("4", "6", "8"), ("gradient", "random")  # names for --space and --strategy
LATENCY_LOSSES = {  # name: (function of latency / target, default weight)
    "hinge": (lambda ratio: (ratio - 1).clamp(min=0), 0.5),  # thesis, eq. 3.11
    "absolute": (lambda ratio: (ratio - 1).abs(), 0.1),  # TF-NAS
}
SEARCH_LOSSES = {"cls": "cnas", "both": "dcnas", "den": "dnas"}  # loss of the search -> model of the supernet


# ------------------------------------------------------------------------------------------------------------
# The space and what its networks cost


class Part(NamedTuple):
    """What a network's cost is made of: "stem", a block of "stage 2" to "stage 8", "decoder" or "head"."""

    place: str
    in_channels: int = 0
    mid_channels: int = 0
    out_channels: int = 0
    kernel_size: int = 0
    stride: int = 0
    se_channels: int = 0
    activation: str = ""

    @property
    def is_searched(self) -> bool:
        return self.place.startswith("stage") and self.place != "stage 2"


def part_of(block: Block) -> Part:
    return Part(f"stage {block.stage}", *(getattr(block, name) for name in Part._fields[1:]))


def parts_of(arch: Arch) -> list[Part]:
    """The parts that an image goes through; those of stages 2 to 6 twice in a "dcnas-seq"."""
    if arch.model == "dcnas-seq":
        return parts_of(arch.with_model("dnas")) + parts_of(arch.with_model("cnas"))
    decoder = "decoder" if arch.decoder == "conv" else f"decoder {arch.decoder}"
    head = [Part("head", arch.blocks[-1].out_channels, arch.head_channels)] if arch.classifies else []
    stem = "multiscale stem" if arch.multiscale else "stem"
    return [Part(stem, out_channels=arch.stem_channels), *map(part_of, arch.blocks),
            *([Part(decoder)] if arch.denoises else []), *head]


class Curves:
    """The cost of a part at any width between the known ones, by linear interpolation in `mid_channels`."""

    def __init__(self, costs: dict[Part, float]):
        self.points: dict[Part, list[tuple[int, float]]] = {}  # part of width 0 -> [(width, cost)]
        for part, cost in sorted(costs.items()):
            self.points.setdefault(part._replace(mid_channels=0), []).append((part.mid_channels, cost))

    def cost(self, part: Part) -> float:
        """ValueError where the costs do not cover the part."""
        points, width = self.points.get(part._replace(mid_channels=0)), part.mid_channels
        if points is None or not points[0][0] <= width <= points[-1][0]:
            raise ValueError(f"The latency table does not cover {part}.")
        for (low, low_cost), (high, high_cost) in zip(points, points[1:]):
            if width <= high:
                return low_cost + (width - low) / (high - low) * (high_cost - low_cost)
        return points[0][1]  # a curve of one width


@dataclass(frozen=True)
class Space:
    """The networks of a search: `model` is exported, `searched` is the model of the supernet.

    `operations`: candidates per block, 4, 6 or 8. `min_width`: smallest mid channels, in multiples of the
    input. `depth`: "fixed" or "learned". `decoder`: one of TABLE_DECODERS. `grey`: images of one channel. A
    latency table depends on operations, min_width and num_classes only.
    """

    operations: int = 4
    min_width: float = models.MIN_WIDTH
    num_classes: int = 10
    model: str = "dcnas"
    searched: str = "cnas"
    depth: str = "fixed"
    decoder: str = models.DECODERS[0]
    grey: bool = False
    channels = property(lambda self: 1 if self.grey else 3)
    newer_parts = frozenset({  # which older tables lack; they serve without
        Part("decoder sharp"), Part("multiscale stem", out_channels=models.STEM_CHANNELS)})

    def identity(self) -> dict:
        return {"method": "tfnas", "operations": self.operations, "min_width": self.min_width,
                "num_classes": self.num_classes}

    @classmethod
    def from_identity(cls, identity: dict) -> Space:
        space = cls(*(identity[name] for name in ("operations", "min_width", "num_classes")))
        if space.operations not in models.SPACES:
            raise ValueError(f"operations must be one of {list(models.SPACES)}, not {space.operations!r}")
        return space

    def table_flags(self) -> str:
        """The flags of latency.py that make a table of this space."""
        return f"--classes {self.num_classes} --space {self.operations} --min-width {self.min_width:g}"

    def passes(self, stage: int) -> int:
        """How often an image goes through a stage of the exported network."""
        if stage > models.LAST_ENCODER_STAGE:
            return int(self.model != "dnas")
        return 2 if self.model == "dcnas-seq" else 1

    def grid(self, position: Block) -> list[Block]:
        """The blocks to time at a position: each operation at its smallest, starting and largest width and
        between.

        Operations without squeeze-and-excitation differ in width only: k3-e3 and k3-e6 share one curve.
        """
        blocks = set()
        for operation in models.SPACES[self.operations]:
            low, high = models.width_range(operation, position.in_channels, self.min_width)
            middle = [models.round_width(factor * position.in_channels) for factor in (2, 3, 4, 6)]
            widths = {low, high, *(width for width in middle if low < width < high)}
            blocks |= {models.fill(position, operation, width) for width in widths}
        key = "in_channels out_channels kernel_size stride se_channels activation mid_channels".split()
        return sorted(blocks, key=lambda block: [getattr(block, name) for name in key])

    def possible_parts(self) -> set[Part]:
        """Every part that costs are interpolated between."""
        positions = set(models.searched_positions("dcnas"))
        fixed = {part for decoder in TABLE_DECODERS for part in parts_of(self.reference_design(decoder))
                 if not part.is_searched}
        return fixed | {part_of(block) for position in positions for block in self.grid(position)}

    def reference_design(self, decoder: str = models.DECODERS[0]) -> Arch:
        _, *blocks = models.named_arch("dcnas-k3-e3", self.num_classes).blocks
        return models.make_arch("dcnas", blocks, self.num_classes, decoder)

    def random_design(self, rng: random.Random) -> Arch:
        """A DC-NAS: operations drawn uniformly, widths uniformly from their range in steps."""
        blocks = []
        for position in models.searched_positions("dcnas"):
            operation = rng.choice(models.SPACES[self.operations])
            low, high = models.width_range(operation, position.in_channels, self.min_width)
            blocks.append(models.fill(position, operation, rng.randrange(low, high + 1, models.WIDTH_STEP)))
        return models.make_arch("dcnas", blocks, self.num_classes)

    def carriers(self, rng: random.Random, rounds: int) -> list[Arch]:
        """Networks that together hold every block of the grids `rounds` times or more.

        They are DC-NAS of one decoder and the other in turn; the first ones also come as C-NAS and D-NAS, for
        what is left over in those.
        """
        positions, carriers = models.searched_positions("dcnas"), []
        choices = {shape: self.grid(shape) for shape in dict.fromkeys(positions)}
        for _ in range(rounds):
            decks: dict = {}
            for _ in range(max(map(len, choices.values()))):
                blocks = []
                for shape in positions:
                    if not decks.get(shape):
                        decks[shape] = rng.sample(choices[shape], len(choices[shape]))
                    blocks.append(decks[shape].pop())
                decoder = TABLE_DECODERS[len(carriers) % len(TABLE_DECODERS)]
                carriers.append(models.make_arch("dcnas", blocks, self.num_classes, decoder))
        first, others = carriers[:4 * rounds], carriers[4 * rounds:]
        return [arch.with_model(model) for arch in first for model in ("cnas", "dnas", "dcnas")] + others

    network = staticmethod(models.make_network)

    def parts(self, network: models.Network) -> list[tuple[Part, nn.Module]]:
        """The parts of a network with their modules."""
        modules = [network.stem, *network.blocks(), network.decoder, network.head]
        modules = [module for module in modules if module is not None]
        return list(zip(parts_of(network.arch), modules, strict=True))

    def smooth(self, costs: dict[Part, float]) -> dict[Part, float]:
        """The nearest costs (least squares) that never fall with the width: pool adjacent violators."""
        result = dict(costs)
        for curve, points in Curves(costs).points.items():
            pools: list[tuple[float, int]] = []  # (sum, number of widths)
            for _, cost in points:
                pools.append((cost, 1))
                while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
                    pools[-2:] = [(pools[-2][0] + pools[-1][0], pools[-2][1] + pools[-1][1])]
            values = [total / count for total, count in pools for _ in range(count)]
            result |= {curve._replace(mid_channels=width): value for (width, _), value in zip(points, values)}
        return result

    def kinds(self, design: Arch) -> list[str]:
        """The keys of a table's `rest`: what is left over in a network of each model."""
        return ["dnas", "cnas"] if design.model == "dcnas-seq" else [design.model]

    def holds(self, design: Arch) -> bool:
        return not design.levels  # else of the wide space; `cost` says what a table does not cover

    def cost(self, design: Arch, costs: dict[Part, float], rest: float) -> float:
        """The cost of a network from those of its parts; ValueError where the costs do not cover it."""
        curves = Curves(costs)
        return rest + sum(curves.cost(part) for part in parts_of(design))


def table_of_version_1(content: dict) -> dict:
    """A table file of version 1 in today's form; every network is predicted as before.

    Version 1 timed the fixed parts for each model. Here they become what is left over.
    """
    space = Space(content["space"], content["min_width"], content["setting"]["num_classes"])
    parts = [{**part._asdict(), "ms": 0.0} for part in sorted(space.possible_parts() - space.newer_parts)
             if not part.is_searched]
    for row in content["operations"]:
        part = Part(f"stage {row['stage']}", *(row[name] for name in Part._fields[1:]))
        for width, ms in zip(row["mid_channels"], row["ms"], strict=True):
            parts.append({**part._replace(mid_channels=width)._asdict(), "ms": ms})
    names = ("made", "setting", "reference_ms", "correction", "check", "networks_timed", "reference_spread")
    return {"format": latency.FORMAT, "version": latency.VERSION, "space": space.identity(), "parts": parts,
            **{name: content[name] for name in names if name in content},
            "reference": replace(models.named_arch(content["reference"], space.num_classes),
                                 decoder="conv", multiscale=False).to_dict(),
            "rest_ms": {model: sum(ms.values()) for model, ms in content["fixed_ms"].items()}}


design_of, record_content = Arch.from_dict, Arch.to_dict


# ------------------------------------------------------------------------------------------------------------
# The supernet with its costs


class SuperNet(models.SuperNet):
    """models.SuperNet of a space, with what its networks cost and how they are brought to a target.

    A state of the fit is a path: the index of one operation per block.
    """

    def __init__(self, space: Space, recompute: bool = False, gain: bool = False):
        classes = 0 if space.searched == "dnas" else space.num_classes
        super().__init__(space.searched, space.operations, classes, space.min_width, space.depth, recompute,
                         gain, space.decoder, space.grey)
        self.plan = space

    def _base(self, costs: dict[Part, float], rest: float) -> float:
        """The cost of all that is not searched in the exported network."""
        arch = self.plan.reference_design(self.plan.decoder).with_model(self.plan.model)
        fixed = [part for part in parts_of(arch) if not part.is_searched]
        if lacking := {*fixed} - costs.keys():
            raise ValueError(f"The latency table has no {min(lacking).place}, it is of an older version: "
                             "make a new one with latency.py, or search with --decoder conv.")
        return rest + sum(costs[part] for part in fixed)

    def _block_cost(self, curves: Curves, block: Block, width: int | None = None) -> float:
        """The cost of a block in the exported network, at its own width or another."""
        passes, part = self.plan.passes(block.stage), part_of(block)
        part = part if width is None else part._replace(mid_channels=width)
        return passes * curves.cost(part) if passes else 0.0

    def _ranges(self) -> list[list[tuple[int, int]]]:
        """The smallest and the largest width of every candidate, [block][operation]."""
        return [[models.width_range(operation, row[0].in_channels, self.min_width)
                 for operation in self.operations] for row in self.candidate_blocks()]

    def _ends(self, costs: dict[Part, float]) -> list[list[tuple[float, float]]]:
        """The cost of every candidate at its narrowest and its widest, [block][operation]."""
        curves = Curves(costs)
        return [[tuple(self._block_cost(curves, block, width) for width in ends)
                 for block, ends in zip(row, ranges)]
                for row, ranges in zip(self.candidate_blocks(), self._ranges())]

    def expected_cost(self, costs: dict[Part, float], rest: float) -> Tensor:
        """LAT = base + sum over blocks of sum_i softmax(alpha)_i * LAT(op_i) at the present widths (thesis,
        eq. 3.10).

        TF-NAS's code weighs with the Gumbel sample of the outputs; softmax(alpha) has no sampling noise. With
        learned depth each block counts by the probability that it is kept.
        """
        curves = Curves(costs)
        table = self.alpha.new_tensor([[self._block_cost(curves, block) for block in row]
                                       for row in self.candidate_blocks()])  # (blocks, operations)
        blocks = (self.alpha.softmax(1) * table).sum(1) * self.keep_probability()
        return self._base(costs, rest) + blocks.sum()

    def cost_range(self, costs: dict[Part, float], rest: float) -> tuple[float, float]:
        """The costs of the fastest and the slowest network of the space."""
        ends, stages = self._ends(costs), [row[0].stage for row in self.candidate_blocks()]
        # With learned depth one block a stage is enough.
        needed = [not self.betas or stage not in stages[:number] for number, stage in enumerate(stages)]
        base = self._base(costs, rest)
        return (base + sum(min(narrow for narrow, _ in row) for row, need in zip(ends, needed) if need),
                base + sum(max(wide for _, wide in row) for row in ends))

    def starts(self) -> list[tuple[float, tuple[int, ...]]]:
        return [(0.0, tuple(self.best_path()))]

    def exchanges(self, path: tuple[int, ...], costs: dict[Part, float], rest: float, target: float) -> list:
        """Exchanges of one operation, (log probability lost, cost gained, path), while widths alone cannot
        reach.

        Down while the path at its narrowest is above the target, up while it is below at its widest. A larger
        operation must fit at its narrowest. Blocks beyond the learned depth cost nothing and stay.
        """
        ends, kept = self._ends(costs), self.kept()
        forms = [row[index] for row, index, keep in zip(ends, path, kept) if keep]
        narrowest, widest = (self._base(costs, rest) + sum(form[end] for form in forms) for end in (0, 1))
        if narrowest <= target <= widest:
            return []
        end, sign = (0, -1) if narrowest > target else (1, 1)
        room, options = max(0.0, target - narrowest), []
        log_p = torch.log_softmax(self.alpha.detach().double(), 1).tolist()
        for block, (row, now) in enumerate(zip(ends, path)):
            for other, form in enumerate(row) if kept[block] else ():
                gain = sign * (form[end] - row[now][end])
                if gain > 1e-9 and form[0] - row[now][0] <= room:
                    options.append((log_p[block][now] - log_p[block][other], gain,
                                    (*path[:block], other, *path[block + 1:])))
        return options

    def state_cost(self, path: tuple[int, ...], costs: dict[Part, float], rest: float) -> float:
        """The cost of a path at its narrowest, which is where the widths begin."""
        return self._base(costs, rest) + sum(row[index][0] for row, index, keep in
                                             zip(self._ends(costs), path, self.kept()) if keep)

    def fit_widths(self, path: tuple[int, ...], costs: dict[Part, float], rest: float,
                   target: float) -> list[int]:
        """The mid channels of each block that bring a path nearest to the target, never above it.

        All widths are scaled by one factor, then single steps of models.WIDTH_STEP channels use up what is
        left.
        """
        curves, base, kept = Curves(costs), self._base(costs, rest), self.kept()
        blocks = [row[index] for row, index in zip(self.candidate_blocks(), path)]
        bounds = [row[index] for row, index in zip(self._ranges(), path)]
        starts = [self.operations[index].start_width(block.in_channels) for index, block in zip(path, blocks)]

        def total(widths: list[int]) -> float:
            return base + sum(self._block_cost(curves, block, width)
                              for block, width, keep in zip(blocks, widths, kept) if keep)

        def scaled(factor: float) -> list[int]:
            return [min(max(models.round_width(factor * start), low), high)
                    for start, (low, high) in zip(starts, bounds)]

        low, high = 0.0, 2.0  # the floor of every width, and above the ceiling of every width
        if total(scaled(high)) <= target:
            low = high
        for _ in range(30 if low < high else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if total(scaled(middle)) <= target else (low, middle)
        widths = scaled(low)
        present = total(widths)
        while present <= target:
            options = []
            for place, (block, width) in enumerate(zip(blocks, widths)):
                if kept[place] and width + models.WIDTH_STEP <= bounds[place][1]:
                    more = (self._block_cost(curves, block, width + models.WIDTH_STEP)
                            - self._block_cost(curves, block, width))
                    if more and present + more <= target:
                        # The largest that fits, then the one that is most reduced.
                        options.append((more, -width / starts[place], place))
            if not options:
                break
            widths[max(options)[2]] += models.WIDTH_STEP
            present = total(widths)
        return widths

    def _exported(self, path: tuple[int, ...], widths: list[int]) -> Arch:
        """The network of a path with these mid channels."""
        rows = zip(self.candidate_blocks(), path, widths, self.kept())
        blocks = [replace(row[index], mid_channels=width) for row, index, width, keep in rows if keep]
        return replace(self.network.arch, blocks=(models.STAGE_2, *blocks)).with_model(self.plan.model)

    def settle(self, path: tuple[int, ...], costs: dict[Part, float], rest: float, target: float) -> Arch:
        return self._exported(path, self.fit_widths(path, costs, rest, target))

    def present_widths(self, path) -> list[int]:
        return [mixed.candidates[index].width for mixed, index in zip(self.mixed, path)]

    def likeliest(self) -> Arch:
        """The likeliest network, at its present widths."""
        path = tuple(self.best_path())
        return self._exported(path, self.present_widths(path))

    @torch.no_grad()
    def draw_random(self, seed: int) -> None:
        """Draw alpha and beta at random: what a search must beat."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.arch_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.normalize_()

    def export(self, design: Arch) -> None:
        """There are no weights to hand on: a found network is trained from the beginning."""

    def decisions(self) -> list[dict]:
        """Of each block the entropy of alpha (1 undecided, 0 decided), and by how much probability the
        likeliest operation leads."""
        best = self.alpha.detach().softmax(1).topk(2, 1).values
        return [{"entropy": round(entropy, 4), "margin": round(margin, 4)}
                for entropy, margin in zip(self.entropy().tolist(), (best[:, 0] - best[:, 1]).tolist())]

    def describe(self, design: Arch, costs: dict[Part, float] | None = None, rest: float = 0.0) -> str:
        """A network as a table to read, with the ms of each part where costs are given."""
        curves, lines = Curves(costs or {}), [f"{'part':>15} {'kernel':>6} {'in':>4} {'mid':>5} {'out':>4} "
                                              f"{'stride':>6} {'SE':>4} {'ms':>7}"]
        for part in parts_of(design):
            cells = [part.kernel_size, part.in_channels, part.mid_channels, part.out_channels, part.stride,
                     part.se_channels] if part.place.startswith("stage") else [0] * 6
            text = " ".join(f"{value or '-':>{width}}" for value, width in zip(cells, (6, 4, 5, 4, 6, 4)))
            lines.append(f"{part.place:>15} {text} " + (f"{curves.cost(part):>7.3f}" if costs else ""))
        return "\n".join([*lines, f"{'the rest':>15} {'':<34} {rest:>7.3f}"] if costs else lines)


# ------------------------------------------------------------------------------------------------------------
# What search.py asks: flags, plan, supernet


def add_arguments(parser, model: str) -> None:
    """The flags of this method."""
    space = parser.add_argument_group("search space and loss")
    space.add_argument("--space", type=int, choices=sorted(models.SPACES), default=4,
                       help="operations per block, or wide, whose flags --space wide --help lists (default: "
                            "%(default)s, which the papers found most stable)")
    space.add_argument("--depth", choices=("fixed", "learned"), default="fixed",
                       help="fixed: all blocks are kept, as in Markhorst 2024; learned: the search decides "
                            "how many each stage keeps, as in TF-NAS (default: %(default)s)")
    space.add_argument("--min-width", type=number(1, 3), default=models.MIN_WIDTH, metavar="X",
                       help="smallest mid channels, in multiples of a block's input (default: %(default)s)")
    space.add_argument("--decoder", choices=TABLE_DECODERS,
                       help="conv: that of the papers; sharp: that with the noisy image and a branch at "
                            "full resolution (default: sharp; with --warmup sampled, as in the papers, conv)")
    space.add_argument("--search-images", choices=("noisy", "clean"), default="noisy",
                       help="images during the search (default: %(default)s)")
    space.add_argument("--search-loss", choices=tuple(SEARCH_LOSSES),
                       help="cls searches the classifier and attaches the decoder afterwards, both the "
                            "whole dcnas, den the dnas (default: cls, or den without labels)")
    space.add_argument("--latency-loss", choices=LATENCY_LOSSES, default="hinge",
                       help="hinge: max(latency / target - 1, 0); absolute: |latency / target - 1| "
                            "(default: %(default)s)")
    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--warmup-epochs", type=whole(0, 100000), metavar="N",
                          help="first epochs, which train the weights only (default: a third of --epochs, "
                               "at most 10, the papers' number)")
    schedule.add_argument("--warmup", choices=("inherit", "sampled"), default="inherit",
                          help="inherit: train the largest operations first, then all take over their "
                               "weights; sampled: random paths, as in the papers, for long searches "
                               "(default: %(default)s)")
    schedule.add_argument("--temperature", type=number(1e-3, 1e3), default=5.0, metavar="T",
                          help="first temperature of the Gumbel softmax (default: %(default)s)")
    schedule.add_argument("--temperature-decay", type=number(1e-3, 1), metavar="X",
                          help="factor per epoch (default: what ends at the papers' last temperature, 0.2)")
    schedule.add_argument("--arch-every", type=whole(1, 1000), default=2, metavar="N",
                          help="weight steps for each step of alpha (default: %(default)s, as in the papers)")
    schedule.add_argument("--arch-batches", type=whole(1, 1000), default=1, metavar="N",
                          help="held-out batches whose mean gradient a step of alpha takes; with more of "
                               "them noise decides less (default: %(default)s, as in the papers)")
    schedule.add_argument("--recompute", action="store_true",
                          help="compute the operations of an alpha step again for its backward pass instead "
                               "of keeping their results: slower, for GPUs with little memory (default: "
                               "keep)")


def search_defaults(given: dict) -> dict:
    return {}


def check_asked(data, model: str, target, range: bool) -> None:
    """ValueError in one sentence where there is nothing to search for, or the images do not fit the model."""
    if not target and not range:
        raise ValueError("name the latency you want, in milliseconds per batch, for example --target 12")
    if isinstance(data.train, Pairs):
        raise ValueError(f"{data.name} has two digits in each image, for the controlled study of train.py; "
                         "search with --data mnist or --data digits.")
    if data.classes is None and model != "dnas":
        raise ValueError(f"These images have no labels, and a {model} classifies: search with --model dnas, "
                         "or give a folder with one folder per class in train/ and val/.")


def default_decoder(warmup: str) -> str:
    """With the papers' warm-up also the papers' decoder."""
    return "conv" if warmup == "sampled" else "sharp"


def plan(data, /, *, model: str, search_loss: str | None, space: int, min_width: float, depth: str, target,
         range: bool, decoder: str | None = None, warmup: str = "inherit", **_) -> dict:
    """What is searched on these images; ValueError in one sentence where flags and images do not go together.

    The classifier is searched by L_Cls and the decoder attached afterwards, which the papers found best
    (table 4). With "both" the whole of DC-NAS is the supernet. D-NAS keeps stages 1 to 6 of what C-NAS's
    search finds; on images without labels it is searched by L_Den (the papers do not say how; ours).
    """
    check_asked(data, model, target, range)
    labelled = data.classes is not None
    loss = search_loss or ("cls" if labelled else "den")
    allowed = {"cnas": ("cls",), "dcnas": ("cls", "both"), "dcnas-seq": ("cls",),
               "dnas": ("cls", "den") if labelled else ("den",)}[model]
    if loss not in allowed:
        raise ValueError(f"--search-loss {loss} does not go with --model {model} on these images; possible: "
                         f"{', '.join(allowed)}.")
    result = Space(space, min_width, len(data.classes or []) or 10, model, SEARCH_LOSSES[loss], depth,
                   decoder or default_decoder(warmup), data.channels == 1)
    return {"space": result, "table_space": result, "loss": loss, "weight_share": 0.8}


def make_supernet(space: Space, /, *, recompute: bool = False, warmup: str = "sampled", **_) -> SuperNet:
    return SuperNet(space, recompute, gain=warmup == "inherit")


# ------------------------------------------------------------------------------------------------------------
# The schedule


def latency_loss(kind: str, target: float, weight: float | None):
    """The latency term of alpha's loss, a function of the expected latency; weight None: the default of the
    kind."""
    function, default = LATENCY_LOSSES[kind]
    return lambda expected: (default if weight is None else weight) * function(expected / target)


class Schedule:
    """The weights and alpha in turn (TF-NAS, Markhorst 2024).

    The first epochs train weights only, one path a step: with `warmup` "sampled" by Gumbel softmax, as in
    TF-NAS; with "inherit" the largest operations, whose weights all others then take over. (Through random
    paths a supernet learns its first features many times slower: a long search can afford that, a short one
    would choose by noise.)

    Then alpha takes a step on held-out images after every `arch_every` weight steps, with the mean gradient
    of `arch_batches` batches, and the temperature falls by a factor an epoch. Where the target is within
    reach, alpha's loss has the latency term, and after each epoch the likeliest path is scaled in width to
    the target. Weights: SGD, momentum 0.9, weight decay 1e-5, clip 5, cosine. alpha: Adam, betas (0.5,
    0.999), weight decay 5e-4. `costs`: parts, rest and target. `flags`: others of search.py.
    """

    GRAD_CLIP, LABEL_SMOOTHING = 5.0, 0.1
    EXPLANATION = ("alpha holds the log probability of each operation. Its entropy is 1 while the search is "
                   "undecided and 0 when it is decided. Expected ms: the mean latency under alpha.")

    def __init__(self, supernet: nn.Module, costs, *, steps: int, device: torch.device, loss: str = "cls",
                 within_reach: bool = False, epochs: int = 10, lr: float = 5e-2, arch_lr: float = 1e-2,
                 seed: int = 0, **flags):
        self.supernet = supernet.to(device, memory_format=torch.channels_last).train()
        self.costs, self.within_reach, self.device, self.loss = costs, within_reach, device, loss
        self.guard, self.amp, self.flags = run.Guard(), flags.get("amp") or "off", flags
        warmup, decay = flags.get("warmup_epochs"), flags.get("temperature_decay")
        self.warmup_epochs = min(10, round(epochs / 3)) if warmup is None else warmup
        self.decay = decay or 0.96 ** (79 / max(1, epochs - self.warmup_epochs - 1))
        self.inherits = flags.get("warmup", "inherit") == "inherit"
        self.arch_every, self.arch_batches = flags.get("arch_every", 2), flags.get("arch_batches", 1)
        self.weights, self.arch = supernet.weight_parameters(), supernet.arch_parameters()
        self.weight_optimizer = torch.optim.SGD(self.weights, lr, 0.9, weight_decay=1e-5, fused=True)
        for weight in self.weights:  # where momentum starts; the fused step needs it there
            self.weight_optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        self.arch_optimizer = torch.optim.Adam(self.arch, arch_lr, (0.5, 0.999), weight_decay=5e-4)
        self.lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.weight_optimizer, epochs * steps)
        self.scaler, self.arch_scaler = (torch.amp.GradScaler(device.type, enabled=self.amp == "float16")
                                         for _ in range(2))
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same paths everywhere

    def _stem(self, batch) -> Tensor:
        with run.autocast(self.device, self.amp):
            return self.supernet.encode_stem(batch[0])

    def _loss(self, stem: Tensor, batch, choice) -> Tensor:
        noisy, clean, labels = batch
        with run.autocast(self.device, self.amp):
            output = self.supernet.from_stem(stem, choice, noisy)
        return task_loss(output, clean, labels, self.loss, self.LABEL_SMOOTHING)[0]

    def weight_step(self, batch, bi_sampling: bool, path: list[int] | None = None,
                    where: str = "this step") -> dict:
        """One step of the weights: a path by Gumbel softmax (or the one given), then, with `bi_sampling`, one
        of the other operations of every block drawn uniformly, over the same batch; the losses are added
        (TF-NAS).

        Returns {"weight_loss": mean over the paths}, or {} for a step that was skipped.
        """
        self.weight_optimizer.zero_grad(set_to_none=True)  # operations that were not sampled stay as they are
        path = self.supernet.sample_path(self.generator) if path is None else path
        paths = (path, self.supernet.other_path(path, self.generator)) if bi_sampling else (path,)
        total, stem = 0.0, self._stem(batch)
        start = stem.detach().requires_grad_()  # both paths start from here, and their gradients meet here
        for choice in paths:
            loss = self._loss(start, batch, choice)
            self.scaler.scale(loss).backward()  # each at once: the graph of one path in memory, not of two
            total = total + loss.detach()
        stem.backward(start.grad)
        loss = total / len(paths)
        taken = run.take_step(loss, self.weights, self.weight_optimizer, self.scaler, self.guard,
                              self.GRAD_CLIP, where)
        return {"weight_loss": loss.item()} if taken else {}

    def arch_step(self, batches: list, temperature: float, where: str = "this step") -> dict:
        """One step of alpha: every operation, summed with Gumbel-softmax weights (drawn for each batch), plus
        the latency term."""
        self.arch_optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch in batches:
            with run.frozen(self.weights):
                mixture = self.supernet.mixture(temperature, self.generator)
                loss = total = self._loss(self._stem(batch), batch, mixture)
                if self.within_reach:
                    term = latency_loss(self.flags.get("latency_loss", "hinge"), self.costs.target,
                                        self.flags.get("latency_weight"))
                    total = loss + term(self.expected_cost())
                self.arch_scaler.scale(total / len(batches)).backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        taken = run.take_step(loss, self.arch, self.arch_optimizer, self.arch_scaler, self.guard,
                              self.GRAD_CLIP, where)
        self.supernet.normalize_()
        return {"arch_loss": loss.item()} if taken else {}

    def expected_cost(self) -> Tensor:
        return self.supernet.expected_cost(self.costs.parts, self.costs.rest)

    def work(self, epoch: int) -> float:
        """How long an epoch takes beside a warm-up epoch, for the forecast (measured at 64 px on a CPU)."""
        return 1.0 if epoch < self.warmup_epochs else 1.3 + self.arch_batches / self.arch_every

    def begin_epoch(self, epoch: int, first_step: int) -> None:
        self.warm = epoch < self.warmup_epochs
        if self.inherits and epoch == self.warmup_epochs > 0 and first_step == 0:
            self.supernet.inherit_()
        self.tau = self.flags.get("temperature", 5.0) * self.decay ** max(0, epoch - self.warmup_epochs)

    def held_out_before(self, step: int) -> int:
        """How many held-out batches the steps of this epoch before `step` took."""
        return 0 if self.warm else step // self.arch_every * self.arch_batches

    def step(self, batch, step: int, held_out, where: str) -> dict[str, float]:
        path = self.supernet.largest_path() if self.warm and self.inherits else None
        values = self.weight_step(batch, bi_sampling=not self.warm, path=path, where=where)
        self.lr_schedule.step()
        if not self.warm and (step + 1) % self.arch_every == 0:
            batches = [held_out.next() for _ in range(self.arch_batches)]
            values |= self.arch_step(batches, self.tau, where)
        return values

    def end_epoch(self) -> dict:
        """Scale the widths of the likeliest path; returns what else the epoch's row of the log holds."""
        supernet, costs = self.supernet, self.costs
        if self.within_reach and not self.warm:
            path = tuple(supernet.best_path())
            fitted = latency.fit_state(supernet, costs.parts, costs.rest, costs.target)
            widths = supernet.fit_widths(fitted, costs.parts, costs.rest, costs.target)
            places = zip(path, fitted, widths, supernet.present_widths(path))
            # Only of the operations that the search itself prefers.
            self.set_widths(path, [new if old == other else present for old, other, new, present in places])
        entropy = supernet.entropy()
        return {"expected_ms": self.expected_cost().item(), "temperature": None if self.warm else self.tau,
                "entropy_mean": entropy.mean().item(), "entropy": [round(v, 4) for v in entropy.tolist()],
                "path": [supernet.operations[index].name for index in supernet.best_path()],
                "alpha": [[round(v, 5) for v in row] for row in supernet.alpha.softmax(1).tolist()],
                "beta": [[round(v, 5) for v in beta.softmax(0).tolist()] for beta in supernet.betas]}

    def set_widths(self, path, mid_channels: list[int]) -> None:
        """Set the widths of a path; where channels changed places, momentum starts anew."""
        for parameter in self.supernet.set_widths(path, mid_channels):
            self.weight_optimizer.state[parameter]["momentum_buffer"].zero_()

    def format_row(self, row: dict) -> str:
        """An epoch in words."""
        alpha = f"alpha loss {row['arch_loss']:.3f}" if "arch_loss" in row else "(weights only)  "
        return (f"weight loss {row['weight_loss']:.3f}  {alpha}  expected {row['expected_ms']:.2f} ms  "
                f"entropy {row['entropy_mean']:.3f}")

    def better(self, row: dict, best: dict | None) -> bool:
        return False  # the supernet of the last epoch is taken

    def _parts(self) -> dict:
        return {"supernet": self.supernet, "weight_optimizer": self.weight_optimizer,
                "arch_optimizer": self.arch_optimizer, "scaler": self.scaler, "arch_scaler": self.arch_scaler,
                "schedule": self.lr_schedule}

    def state_dict(self) -> dict:
        return {**{name: part.state_dict() for name, part in self._parts().items()},
                "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())


# ------------------------------------------------------------------------------------------------------------
# Results


def explain_choice(supernet: SuperNet, design: Arch, rows: list[dict]) -> list[str]:
    """What a user must know about an alpha that stayed undecided or collapsed, and about a learned depth."""
    notes, blocks, kept = [], supernet.decisions(), supernet.kept()
    weak = sum(block["entropy"] > 0.95 and block["margin"] < 0.05 for block in blocks)
    if weak > len(blocks) / 2:
        notes.append(f"note: alpha stayed undecided in {weak} of {len(blocks)} blocks (entropy above 0.95, "
                     "the two likeliest operations less than 5 % apart): the choice there is weak. "
                     "--arch-every 1 --arch-batches 4, more epochs or more images decide more.")
    names = {supernet.operations[index].name for index in supernet.best_path()}
    if len(names) == 1 and all(block["margin"] > 0.5 for block in blocks):
        notes.append(f"note: alpha collapsed: every block prefers {names.pop()} by far. log.jsonl says when; "
                     "a lower --arch-lr or a longer warm-up helps.")
    if not all(kept):
        notes.append(f"note: the learned depth keeps {sum(kept)} of {len(kept)} blocks; --depth fixed keeps "
                     "all.")
    return notes


def write_picture(folder: Path, design: Arch, supernet: SuperNet, rows: list[dict]) -> list[str]:
    """alpha.png: how softmax(alpha) of every block moved over the epochs, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        run.say("note: install matplotlib for alpha.png, a picture of how alpha moved.")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    positions, columns = models.searched_positions("dcnas")[:len(rows[0]["alpha"])], 6
    figure, axes = pyplot.subplots(math.ceil(len(positions) / columns), columns, figsize=(14, 7), sharex=True,
                                   sharey=True, squeeze=False)
    for axis in axes.flat[len(positions):]:
        axis.axis("off")
    for index, (axis, position) in enumerate(zip(axes.flat, positions)):
        lines = axis.plot([row["epoch"] for row in rows], [row["alpha"][index] for row in rows])
        number_in_stage = 1 + sum(p.stage == position.stage for p in positions[:index])
        axis.set_title(f"stage {position.stage}, block {number_in_stage}", fontsize=9)
    figure.supxlabel("epoch")
    figure.supylabel("softmax(alpha)")
    figure.legend(lines, [f"MB-{operation.name}" for operation in supernet.operations], loc="upper center",
                  ncols=len(supernet.operations))
    figure.tight_layout(rect=(0.01, 0, 1, 0.95))
    files.write_file(folder / "alpha.png", lambda temporary: figure.savefig(temporary, dpi=80, format="png"))
    pyplot.close(figure)
    return ["alpha.png"]
