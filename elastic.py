"""The wide space of the joint method: every choice that costs time, searched by evaluation within a latency.

    python search.py --space wide --target 12          # search.py runs this file
    python search.py --space wide --target 6,8,12      # one supernet, three networks

The search chooses the depth and width of each stage, the operation and expansion of each block, the widths
and convolutions of the decoder, its branch at full resolution, the stem and the head. The supernet holds the
weights of the largest network; every other network uses slices of them (slimmable networks, Yu et al. 2019;
once-for-all, Cai et al. 2020). First networks of one width are trained, then the largest and random ones,
which also learn what it answers (sandwich rule and in-place distillation, Yu and Huang 2019; BigNAS, Yu et
al. 2020). At the end networks within the latency are compared on held-out images, by evolution
(Real et al. 2019) whose candidates a linear model of the choices proposes. That model is ours, and the space.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

import models
import run
import tfnas
from data import number, whole
from models import Arch, Block
from muon import Muon
from train import task_loss, taught_loss

# oneDNN computes the convolutions on a CPU and keeps the last 1,024 that it compiled. The space has more: it
# compiled most of them again in each step, a quarter more time. It reads this at the first convolution.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")

design_of, record_content, build = Arch.from_dict, Arch.to_dict, models.make_network
TRAIN_DEFAULTS: dict = {}
SPACES, STRATEGIES = ("wide",), ("evolution", "random")  # names for --space and --strategy
FREE_FLAGS = ("target", "prefer")  # those that a resumed search may change: one supernet serves all


# ------------------------------------------------------------------------------------------------------------
# The space


class Stage(NamedTuple):
    """A stage at scale 1: its widest output, most blocks, the stride of its first block, activation."""

    number: int
    channels: int
    blocks: int
    stride: int
    activation: str


class Operation(NamedTuple):
    """The form of a block: the size of its kernel, and whether it has squeeze-and-excitation (SE)."""

    kernel_size: int
    se: bool


class Piece(NamedTuple):
    """What is timed in a network: its "stem", a block of "stage 2" to "stage 8", its "decoder" or "head"; a
    Block, or for the others the Arch."""

    place: str
    of: Block | Arch
    stride: int = 1  # of its output, a pixel of which covers stride x stride pixels of the image


class Part(NamedTuple):
    """A unit of what a network's cost is made of, as the "depthwise 5x5" of "stage 4"; see `amounts`."""

    place: str
    unit: str


WEIGHTS = Part("network", "million weights")  # those that have left the cache when they are needed


STAGES = (Stage(2, 32, 2, 1, "relu"), Stage(3, 48, 3, 2, "relu"), Stage(4, 64, 3, 2, "silu"),
          Stage(5, 96, 4, 2, "silu"), Stage(6, 128, 4, 1, "silu"), Stage(7, 192, 3, 2, "silu"),
          Stage(8, 256, 2, 1, "silu"))
OPERATIONS = Operation(3, False), Operation(5, False), Operation(3, True), Operation(5, True)
EXPANSIONS, FUSED_EXPANSIONS = (2, 4, 6), (1, 2, 4)  # those of fused blocks, in models.FUSED_STAGES
KERNELS = ((1,), (3,), (3, 3))  # of the convolutions of a level of the decoder
WIDTHS = (0.5, 0.75, 1.0)  # shares of the widest
TAIL, TAIL_STRIDES = 7, (2, 1)  # of the first block of this stage; 1: the classifier keeps larger maps
STEM, HEAD, LEVELS = 32, 1024, (96, 64, 48, 32)  # widest at scale 1; levels 4 to 1 of the decoder
HEADS, BRANCHES = (0.25, 0.5, 1.0), (None, 0, 12, 24)  # channels at full resolution; 0: a Gate; None: nothing
LAST = 9  # as an index: the last option of any decision
SCALES = (0.25, 8.0)  # the smallest and the largest space
round_width = partial(models.round_width, step=16)  # channels are multiples of it, the width of vector units


class Decision(NamedTuple):
    """One choice: its name and its options, from the cheapest to the dearest where they have an order."""

    name: str
    options: tuple


@dataclass(frozen=True)
class Space:
    """The networks of a search. `scale`: factor of all their channels; a latency table is for all scales."""

    num_classes: int = 10
    model: str = "dcnas"
    scale: float = 1.0
    grey: bool = False  # images of one channel; a latency table is for both
    channels = property(lambda self: 1 if self.grey else 3)

    def identity(self) -> dict:
        return {"method": "elastic", "num_classes": self.num_classes}

    @classmethod
    def from_identity(cls, identity: dict) -> Space:
        return cls(identity["num_classes"])

    def table_flags(self) -> str:
        return f"--method elastic --classes {self.num_classes}"

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """All choices, in the order of the indices of a network."""
        rows = [Decision("stem", self.widths(STEM, (0.5, 1.0))), Decision("multiscale", (False, True))]
        for stage in self.stages():
            name = f"stage {stage.number}"
            rows += [Decision(f"{name} width", self.widths(stage.channels)),
                     Decision(f"{name} depth", tuple(range(1, stage.blocks + 1)))]
            rows += [Decision(f"{name} stride", TAIL_STRIDES)] if stage.number == TAIL else []
            expansions = FUSED_EXPANSIONS if stage.number in models.FUSED_STAGES else EXPANSIONS
            for block in range(1, stage.blocks + 1):
                rows += [Decision(f"{name} block {block} operation", OPERATIONS),
                         Decision(f"{name} block {block} expansion", expansions)]
        for level, widest in zip((4, 3, 2, 1), LEVELS) if self.model != "cnas" else ():
            rows += [Decision(f"level {level} width", self.widths(widest)),
                     Decision(f"level {level} convolutions", KERNELS)]
        rows += [Decision("branch", BRANCHES)] if self.model != "cnas" else []
        rows += [Decision("head", self.widths(HEAD, HEADS))] if self.model != "dnas" else []
        return tuple(rows)

    def widths(self, widest: int, shares: tuple[float, ...] = WIDTHS) -> tuple[int, ...]:
        """The different channels that a layer can have."""
        return tuple(dict.fromkeys(round_width(self.scale * share * widest) for share in shares))

    def stages(self) -> tuple[Stage, ...]:
        return STAGES if self.model != "dnas" else STAGES[:models.LAST_ENCODER_STAGE - 1]

    def arch(self, choices: tuple[int, ...]) -> Arch:
        """The network of these choices: an index into the options of each decision."""
        values = {decision.name: decision.options[index] for decision, index in zip(self.decisions, choices)}
        blocks, channels = [], values["stem"]
        for stage in self.stages():
            for index in range(values[f"stage {stage.number} depth"]):
                operation = values[f"stage {stage.number} block {index + 1} operation"]
                mid = round_width(values[f"stage {stage.number} block {index + 1} expansion"] * channels)
                stride = values.get(f"stage {stage.number} stride", stage.stride)
                blocks.append(Block(stage.number, channels, mid, values[f"stage {stage.number} width"],
                                    operation.kernel_size, 1 if index else stride,
                                    round_width(mid / 8) if operation.se else 0, stage.activation,
                                    stage.number in models.FUSED_STAGES))
                channels = values[f"stage {stage.number} width"]
        if self.model == "cnas":
            return Arch("cnas", tuple(blocks), self.num_classes, values["stem"], values["head"],
                        multiscale=values["multiscale"], grey=self.grey)
        levels = tuple((values[f"level {level} width"], values[f"level {level} convolutions"])
                       for level in (4, 3, 2, 1))
        classes, head = self.num_classes, values.get("head", models.HEAD_CHANNELS)
        return Arch(self.model, tuple(blocks), classes * (self.model != "dnas"), values["stem"], head,
                    "conv" if values["branch"] is None else "sharp", levels, values["branch"] or 0,
                    values["multiscale"], grey=self.grey)

    def random_choices(self, rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.randrange(len(decision.options)) for decision in self.decisions)

    def leaning_choices(self, rng: random.Random, shares) -> tuple[int, ...]:
        """Random choices; `shares`, by the last word of a decision: 0 for cheap options, 1 for dear ones."""
        return tuple(rng.randrange(len(options)) if name.endswith("operation")
                     else sum(rng.random() < shares[name.split()[-1]] for _ in options[1:])
                     for name, options in self.decisions)

    def uniform(self, width: int, depth: int, operation: int, expansion: int, branch: int = 2) -> tuple:
        """The choices of a plain network: everywhere the same indices, or the last where there are fewer
        options; two 3x3 convolutions a level, stem and head at several scales, and stride 2 in the tail."""
        wanted = {"width": width, "stem": width, "head": width, "depth": depth, "operation": operation,
                  "expansion": expansion, "convolutions": 2, "branch": branch, "multiscale": 1, "stride": 0}
        return tuple(min(wanted[name.split()[-1]], len(options) - 1) for name, options in self.decisions)

    def largest(self) -> tuple[int, ...]:
        """The choices of the network whose weights all others use slices of."""
        return self.uniform(LAST, LAST, LAST, LAST, LAST)

    def smallest(self) -> tuple[int, ...]:
        return (0,) * len(self.decisions)

    def random_design(self, rng: random.Random) -> Arch:
        """A network of any scale, for the latency table: also what a search finds, as shallow wide ones."""
        space = replace(self, scale=2 ** rng.uniform(-1, 1))
        return space.arch(space.leaning_choices(rng, defaultdict(partial(rng.triangular, 0, 1))))

    def carriers(self, rng: random.Random, rounds: int) -> list[Arch]:
        """Random networks; the first ones also as C-NAS and D-NAS."""
        designs = [self.random_design(rng) for _ in range(24 * rounds)]
        first, others = designs[:3 * rounds], designs[3 * rounds:]
        return [arch.with_model(model) for arch in first for model in ("cnas", "dnas", "dcnas")] + others

    def reference_design(self) -> Arch:
        return self.arch(self.uniform(1, 0, 0, 1))

    network = staticmethod(models.make_network)

    def parts(self, network: models.Network) -> list[tuple[Piece, nn.Module]]:
        """The pieces of a network with their modules."""
        modules = [network.stem, *network.blocks(), network.decoder, network.head]
        return list(zip(pieces_of(network.arch), [one for one in modules if one is not None], strict=True))

    def possible_parts(self) -> set[Part]:
        """Every unit of cost that a network of any scale can have."""
        space = replace(self, scale=1.0)
        plain = [space.uniform(1, 1, operation, 1, branch) for operation in range(len(OPERATIONS))
                 for branch in (1, LAST)]
        pieces = {piece for choices in (space.smallest(), *plain) for piece in pieces_of(space.arch(choices))}
        residual = {Part(f"stage {stage.number}", "residual") for stage in self.stages() if stage.stride == 1}
        return residual | {part for piece in pieces for part in amounts(piece)}

    def fit_costs(self, samples: dict[Piece, list[float]],
                  wholes: list[tuple[Arch, float]]) -> tuple[dict[Part, float], dict[str, float]]:
        """Milliseconds of each Part, and the rest of each kind of network, from times of pieces and networks.

        For each place the least squares of the pieces' relative errors, without negative costs. A piece that
        is timed alone takes longer than in its network, the more so the more layers it has; and weights take
        longer the more of them there are. So each cost is then multiplied by a factor, by ridge regression of
        the networks' relative errors towards one common factor.
        """
        places: dict[str, list] = {}
        for piece, values in samples.items():
            own = {part: amount for part, amount in amounts(piece).items() if part != WEIGHTS}
            places.setdefault(piece.place, []).append((own, max(statistics.median(values), 1e-4)))
        costs = dict.fromkeys(sorted(self.possible_parts()), 0.0)
        for rows in places.values():
            parts = sorted({part for own, _ in rows for part in own})
            matrix = torch.tensor([[own.get(part, 0.0) / ms for part in parts] for own, ms in rows],
                                  dtype=torch.float64)
            costs |= zip(parts, positive_least_squares(matrix, matrix.new_ones(len(rows))).tolist())
        kinds = sorted({design.model for design, _ in wholes})
        rows, units = [], [*costs, *kinds]
        for design, ms in wholes:
            row = dict.fromkeys(units, 0.0) | {design.model: 1 / ms}
            for piece in pieces_of(design):
                for part, amount in amounts(piece).items():
                    row[part] += amount * (1.0 if part == WEIGHTS else costs[part]) / ms
            rows.append(list(row.values()))
        matrix = torch.tensor(rows, dtype=torch.float64)
        free = torch.tensor([unit == WEIGHTS or unit in kinds for unit in units])
        common = 1 / matrix[:, ~free].sum(1).median()
        first = torch.where(free, 0.0, common)
        pull = torch.diag(torch.where(free, 1e-4, 0.03).double())
        left = matrix.T @ (1 - matrix @ first)
        factors = dict(zip(units, (first + torch.linalg.solve(matrix.T @ matrix + pull, left)).tolist()))
        costs = {part: max(0.0, factors[part]) * (1.0 if part == WEIGHTS else ms)
                 for part, ms in costs.items()}
        return costs, {kind: round(factors[kind], 6) for kind in kinds}

    def piece_cost(self, piece: Piece, costs: dict[Part, float]) -> float:
        return sum(amount * costs[part] for part, amount in amounts(piece).items())

    def cost(self, design: Arch, costs: dict[Part, float], rest: float) -> float:
        """The cost of a network; KeyError where it has what no network of this space has."""
        return rest + sum(self.piece_cost(piece, costs) for piece in pieces_of(design))

    def kinds(self, design: Arch) -> list[str]:
        return [design.model]

    def holds(self, design: Arch) -> bool:
        return bool(design.levels) or design.model == "cnas"

    def scaled_to(self, costs: dict[Part, float], rest: float, targets: list[float]) -> Space:
        """The space of whose random networks 5 % cost more than the largest target: its supernet is not much
        larger than what is found. ValueError in one sentence where its cheapest is above the smallest."""
        def most(scale: float) -> float:
            space, rng = replace(self, scale=scale), random.Random(0)
            return sorted(space.cost(space.arch(space.random_choices(rng)), costs, rest)
                          for _ in range(100))[95]
        low, high = map(math.log, SCALES)
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if most(math.exp(middle)) > max(targets) else (middle, high)
        space = replace(self, scale=round(math.exp(low), 3))
        least = space.cost(space.arch(space.smallest()), costs, rest)
        if least > min(targets) and len(targets) > 1:
            raise ValueError(f"The supernet for {max(targets):g} ms has no network below {least:.3g} ms: "
                             f"search for {min(targets):g} ms alone.")
        return space

    def cost_range(self, costs: dict[Part, float], rest: float) -> tuple[float, float]:
        """The costs of the fastest network of the smallest scale and the slowest of the largest."""
        small, large = (replace(self, scale=scale) for scale in SCALES)
        return tuple(space.cost(space.arch(choices), costs, rest)
                     for space, choices in ((small, small.smallest()), (large, large.largest())))


def pieces_of(arch: Arch) -> list[Piece]:
    """What an image goes through, in order: what is timed."""
    stride, pieces = 2, [Piece("stem", arch, 2)]
    for block in arch.blocks:
        stride *= block.stride
        pieces.append(Piece(f"stage {block.stage}", block, stride))
    return [*pieces, *([Piece("decoder", arch)] if arch.denoises else []),
            *([Piece("head", arch, stride)] if arch.classifies else [])]


@lru_cache(4096)
def amounts(piece: Piece) -> dict[Part, float]:
    """How much of each unit a piece of a network costs.

    Convolutions count in thousands of multiply-accumulates, and activations ("values") in numbers, for each
    pixel of the input; what takes its time at any width counts once; weights count without small layers.
    """
    place, of, stride = piece
    if isinstance(of, Block):
        after, before = 1 / stride**2, of.stride**2 / stride**2  # maps' sizes, in pixels of the input
        inner, mid, outer = of.in_channels, of.mid_channels, of.out_channels
        kernel = f"{of.kernel_size}x{of.kernel_size}"
        units = {"block": 1.0, "projection": mid * outer * after / 1e3}
        weights = mid * (inner * (of.kernel_size**2 if of.fused else 1) + 2 * of.se_channels + outer)
        if of.fused:
            units |= {f"convolution {kernel}": of.kernel_size**2 * inner * mid * after / 1e3,
                      "values": mid * after}
        else:
            units[f"depthwise {kernel}"] = mid * after
            if mid > inner:
                units |= {"expansion": inner * mid * before / 1e3, "expanded values": mid * before}
        if of.se_channels:
            units |= {"SE": 1.0, "SE values": mid * after, "SE weights": mid * of.se_channels / 1e6}
        if of.stride == 1 and inner == outer:
            units["residual"] = outer * after
    elif place == "stem":
        units, weights = {"stem": 1.0, "values": of.stem_channels / 4}, 0
        units |= {"multiscale": 1.0} if of.multiscale else {}
    elif place == "head":
        area, weights = 1 / stride**2, of.blocks[-1].out_channels * of.head_channels
        units = {"head": 1.0, "pointwise": weights * area / 1e3,
                 "values": of.head_channels * area}
        units |= {"multiscale": 1.0} if of.multiscale else {}
    else:
        outputs = {block.stage: block.out_channels for block in of.blocks}
        below, units, sharp, weights = outputs[6], {"decoder": 1.0}, of.decoder == "sharp", 0
        skips = {4: 0, 3: outputs[4], 2: outputs[3], 1: outputs[2] + 12 * sharp}
        widths = [width for width, _ in of.levels] + [16 if sharp and of.branch else 3 + sharp]
        for level, (width, kernels), then in zip((4, 3, 2, 1), of.levels, widths[1:]):
            area, source = 1 / 4**level, below + skips[level]
            for kernel, taken in zip(kernels, (source, width)):
                unit, own = f"convolution {kernel}x{kernel} {level}", kernel**2 * taken * width
                units[unit], weights = units.get(unit, 0.0) + own * area / 1e3, weights + own
            units[f"values {level}"] = (source + len(kernels) * width + 4 * then) * area
            units[f"second convolution {level}"] = float(len(kernels) == 2)
            units[f"up {level}"] = width * then * area * 4 / 1e3
            below = then
        if sharp:
            units |= {"branch": 1.0, "branch channels": float(of.branch)} if of.branch else {"gate": 1.0}
    return {**{Part(place, unit): amount for unit, amount in units.items()}, WEIGHTS: weights / 1e6}


def positive_least_squares(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The x without negative numbers for which matrix @ x is nearest to `wanted` (Lawson and Hanson 1974)."""
    size = matrix.norm(dim=0).clamp(min=1e-12)
    share = 1e-3 * torch.eye(len(size), dtype=matrix.dtype)  # alike columns get equal numbers
    matrix = torch.cat((matrix / size, share))
    wanted = torch.cat((wanted, wanted.new_zeros(len(size))))
    x, used = wanted.new_zeros(len(size)), torch.zeros(len(size), dtype=torch.bool)
    for _ in range(10 * len(size)):
        gain = (matrix.T @ (wanted - matrix @ x)).masked_fill(used, -math.inf)
        if gain.max() <= 1e-9:
            break
        used[gain.argmax()] = True
        while True:
            best = torch.zeros_like(x)
            best[used] = torch.linalg.lstsq(matrix[:, used], wanted).solution
            wrong = used & (best <= 0)
            if not wrong.any():
                break
            x = x + (x / (x - best))[wrong].min() * (best - x)  # as far as all stay positive
            used &= x > 1e-12
        x = best
    return x / size


# ------------------------------------------------------------------------------------------------------------
# The supernet


Norm = partial(nn.BatchNorm2d, track_running_stats=False)  # statistics of the batch, also in comparisons


@lru_cache(None)
def _bare_block(place: int, block: Block) -> models.MBConv:
    return models.build_block(block, norm_layer=Norm)


@lru_cache(256)
def _bare_network(arch: Arch) -> models.Network:
    """A network without weights, to be called with those of the supernet. Networks share their blocks: to
    build all of them anew takes a fifth of a training step."""
    places = itertools.count()  # the same block twice in a network must be two modules
    with torch.device("meta"):
        return models.Network(arch, make_block=lambda block, _: _bare_block(next(places), block),
                              norm_layer=Norm).train()


class SuperNet(nn.Module):
    """The weights of the largest network of a space; every other network uses slices of them.

    Of channels the first are used, of kernels the centre, of stages the first blocks, and of what the decoder
    concatenates the first channels of each source. forward: images (B, 3, H, W) and an Arch of the space.
    Batch norms use the statistics of the batch.
    """

    def __init__(self, space: Space):
        super().__init__()
        self.space, self.weights = space, nn.ParameterDict()
        arch = space.arch(space.largest())
        network = models.Network(arch, make_block=lambda block, _: models.build_block(block, norm_layer=Norm),
                                 norm_layer=Norm)
        for stage in (*network.encoder, *network.tail):
            nn.init.ones_(stage[0].project[1].weight)  # where it is no residual, 0 would end the network
        for name, weight in network.named_parameters():
            self.weights[_key(name)] = nn.Parameter(weight.detach().clone())
        for name, buffer in network.named_buffers():
            self.register_buffer(_key(name), buffer, persistent=False)
        self.sources = _sources(arch)
        self.compare: Comparison | None = None  # what networks are compared by, once the weights are trained
        self.seed, self.is_random = 0, False

    def slices(self, arch: Arch) -> dict[str, Tensor]:
        """The weights of a network, by its names."""
        sources, result = _sources(arch), {}
        for name, bare in _bare_network(arch).named_parameters():
            weight = self.weights[_key(name)]
            if name in sources:
                parts = weight[:len(bare)].split(self.sources[name], 1)
                weight = torch.cat([part[:, :count] for part, count in zip(parts, sources[name])], 1)
            for dim, size in enumerate(bare.shape):
                extra = weight.shape[dim] - size
                if extra:
                    weight = weight.narrow(dim, extra // 2 if dim >= 2 else 0, size)
            result[name] = weight
        return result

    def forward(self, x: Tensor, arch: Arch) -> models.Output:
        bare = _bare_network(arch)
        buffers = {name: getattr(self, _key(name)) for name, _ in bare.named_buffers()}
        return functional_call(bare, self.slices(arch) | buffers, (x,))

    def weight_parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    # What search.py asks.

    def cost_range(self, costs: dict[Part, float], rest: float) -> tuple[float, float]:
        return self.space.cost_range(costs, rest)

    def likeliest(self) -> Arch:
        return self.space.arch(self.space.largest())

    def fit(self, costs: dict[Part, float], rest: float, target: float) -> Arch:
        """The best network within the target, or with --strategy random one drawn from those near to it."""
        within = Within(self.space, costs, rest, target)
        if self.is_random:
            return self.space.arch(within.draw(random.Random(self.seed)))
        return self.space.arch(search(self, within))

    def draw_random(self, seed: int) -> None:
        self.is_random, self.seed = True, seed

    @torch.no_grad()
    def export(self, design: Arch) -> models.Network | None:
        """The network with its weights, and batch norms calibrated on the images that it was compared on."""
        if self.compare is None:
            return None
        network = models.make_network(design)
        network.load_state_dict(self.slices(design), strict=False)
        update_bn(self.compare.batches, network, torch.device("cpu"))
        return network.eval()

    def describe(self, design: Arch, costs: dict[Part, float] | None = None, rest: float = 0.0) -> str:
        """A network as a table to read, with the ms of each piece where costs are given."""
        lines = [f"{'part':>8} {'kernel':>6} {'in':>4} {'mid':>5} {'out':>4} {'stride':>6} {'SE':>4} "
                 f"{'ms':>7}"]
        for piece in pieces_of(design):
            (place, of, _), cells = piece, ["-"] * 6
            if isinstance(of, Block):
                cells = [of.kernel_size, of.in_channels, of.mid_channels, of.out_channels, of.stride,
                         of.se_channels or "-"]
            ms = f"{self.space.piece_cost(piece, costs):>7.3f}" if costs else ""
            lines.append(f"{place:>8} " + " ".join(f"{cell:>{width}}" for cell, width
                                                   in zip(cells, (6, 4, 5, 4, 6, 4))) + f" {ms}")
        if design.denoises:
            levels = ", ".join(" and ".join(f"{kernel}x{kernel}" for kernel in kernels) + f" to {width}"
                               for width, kernels in design.levels)
            lines.append(f"decoder levels 4 to 1: {levels} channels; branch at full resolution: "
                         + ("none" if design.decoder == "conv" else
                            f"{design.branch} channels" if design.branch else "a gate"))
        return "\n".join([*lines, *([f"{'the rest':>8} {'':<34} {rest:>7.3f}"] if costs else [])])

    def decisions(self) -> list[dict]:
        """Of each loss by which networks were compared: of how many networks, the least, the median."""
        if self.compare is None or not self.compare.losses:  # none is compared for a target above all
            return []
        columns = {name: [losses[name] for losses in self.compare.losses.values()]
                   for name in self.compare.names}
        return [{"loss": name, "networks": len(values), "least": min(values),
                 "median": statistics.median(values)}
                for name, values in columns.items()]


def _key(name: str) -> str:
    """The supernet's name of a weight or buffer: torch allows no dots in it."""
    return name.replace(".", "/")


def _sources(arch: Arch) -> dict[str, tuple[int, ...]]:
    """The channels that models.Means takes from each stage, and a level of the decoder from below, from the
    encoder and of the noisy image, by the name of the weight that they meet."""
    outputs, sources = {block.stage: block.out_channels for block in arch.blocks}, {}
    if arch.classifies:
        sources["means.1.weight"] = tuple(outputs[stage] for stage in models.MEANS)
    for place, (width, _) in enumerate(arch.levels[1:] if arch.denoises else (), 1):
        noisy = (12,) if place == 3 and arch.decoder == "sharp" else ()
        sources[f"decoder.levels.{place}.convs.0.0.weight"] = (width, outputs[5 - place], *noisy)
    return sources


# ------------------------------------------------------------------------------------------------------------
# The comparison of networks


class Comparison:
    """The losses of networks of a supernet on held-out images; those known are kept.

    `names`: "den", "ce", or both; `share`: the weight of classification where it is both, from 0 to 1.
    """

    def __init__(self, supernet: SuperNet, batches: list[tuple], loss: str, share: float, device, amp: str):
        self.supernet, self.batches, self.loss, self.share = supernet, batches, loss, share
        self.device, self.amp = device, amp
        self.names = {"both": ("ce", "den"), "cls": ("ce",), "den": ("den",)}[loss]
        self.losses: dict[tuple[int, ...], dict[str, float]] = {}  # of choices

    @torch.no_grad()
    def measure(self, choices: tuple[int, ...]) -> None:
        """Compute the losses of a network: of both, the denoising loss of the first batches only. An image
        has thousands of pixels and one class, so its cross-entropy says far less about the network."""
        arch, values = self.supernet.space.arch(choices), {name: [] for name in self.names}
        for place, (noisy, clean, labels) in enumerate(self.batches):
            class_only = self.loss == "both" and place >= DENOISED
            with run.autocast(self.device, self.amp):
                output = self.supernet(noisy, arch.with_model("cnas") if class_only else arch)
            _, parts = task_loss(output, clean, labels, "cls" if class_only else self.loss, 0.0)
            for name, value in parts.items():
                values[name].append(float(value))
        self.losses[choices] = {name: statistics.fmean(each) for name, each in values.items()}

    def rows(self, costs: dict[Part, float], rest: float) -> list[dict]:
        """A row for each network measured: its losses, its cost, and its record."""
        space, spread = self.supernet.space, set(spread_over(self.supernet.space))
        result = []
        for choices, losses in self.losses.items():
            arch = space.arch(choices)
            result.append({**losses, "ms": space.cost(arch, costs, rest), "spread": choices in spread,
                           **record_content(arch)})
        return result

    def scores(self) -> dict[tuple[int, ...], float]:
        """A number for each network measured, less is better: the losses in standard deviations of them all.
        Of shared weights the cross-entropy differs far less than that of networks trained alone."""
        total = dict.fromkeys(self.losses, 0.0)
        for name in self.names:
            share = 1.0 if len(self.names) == 1 else self.share if name == "ce" else 1 - self.share
            values = [losses[name] for losses in self.losses.values()]
            mean, spread = statistics.fmean(values), statistics.pstdev(values) or 1.0
            for choices, losses in self.losses.items():
                total[choices] += share * (losses[name] - mean) / spread
        return total


class Within:
    """The networks of a space whose cost is at most a target, and near to it."""

    NEAR = 0.97  # of the target, the least cost where the space allows that

    def __init__(self, space: Space, costs: dict[Part, float], rest: float, target: float):
        self.space, self.costs, self.rest, self.target = space, costs, rest, target
        ordered = [len(decision.options) if not decision.name.endswith("operation") else 1
                   for decision in space.decisions]
        self.last = [count - 1 for count in ordered]  # the dearest option; decisions without an order stay

    def cost(self, choices: tuple[int, ...]) -> float:
        return self.space.cost(self.space.arch(choices), self.costs, self.rest)

    def step(self, choices: tuple[int, ...], place: int, by: int) -> tuple[int, ...] | None:
        """The choices with the next dearer (1) or cheaper (-1) option of one decision, None where there is
        none."""
        index, last = choices[place] + by, self.last[place]
        return (*choices[:place], index, *choices[place + 1:]) if last and 0 <= index <= last else None

    def adjust(self, choices: tuple[int, ...], rng: random.Random, keep: str = "-") -> tuple[int, ...]:
        """The network made cheaper until it is within the target, then dearer while it stays within, by
        single steps in random order. Where it does not come near, a few are taken back, to try others. The
        decision of the name `keep` stays."""
        names, best = [name for name, _ in self.space.decisions], (-math.inf, choices)
        places = [place for place, last in enumerate(self.last) if last and names[place] != keep]
        cost = self.cost(choices)
        for _ in range(6):
            for by in (-1, 1):
                moved = True
                while moved and (cost > self.target if by < 0 else cost < self.NEAR * self.target):
                    moved = False
                    for place in rng.sample(places, len(places)):
                        if by < 0 and cost <= self.target or by > 0 and cost >= self.NEAR * self.target:
                            break
                        other = self.step(choices, place, by)
                        changed = None if other is None else self.cost(other)
                        if other and (changed < cost if by < 0 else cost < changed <= self.target):
                            cost, choices, moved = changed, other, True
            best = max(best, (cost if cost <= self.target else -cost, choices))
            if best[0] >= self.NEAR * self.target or cost > self.target:
                break
            for place in rng.sample(places, 3):
                choices = self.step(choices, place, -1) or choices
            cost = self.cost(choices)
        return best[1]

    def draw(self, rng: random.Random) -> tuple[int, ...]:
        """A random network that is near to the target by itself; where TRIES draws find none, an adjusted."""
        for _ in range(TRIES):
            choices = self.space.random_choices(rng)
            if self.NEAR * self.target <= self.cost(choices) <= self.target:
                return choices
        return self.adjust(choices, rng)


def spread_over(space: Space) -> list[tuple[int, ...]]:
    """Random networks, each with another share of dear options, so that all sizes are among them."""
    rng = random.Random(0)
    return [space.leaning_choices(rng, defaultdict(lambda: (place + 0.5) / SPREAD))
            for place in range(SPREAD)]


def features(space: Space, choices: tuple[int, ...]) -> list[float]:
    """1 for the option taken in each decision, else 0; a block beyond its stage's depth takes none."""
    result, depth = [], 0
    for (name, options), index in zip(space.decisions, choices):
        words = name.split()
        depth = index + 1 if words[-1] == "depth" else depth
        absent = "block" in words and int(words[3]) > depth
        result += [float(place == index and not absent) for place in range(len(options))]
    return [1.0, *result]


def predictor(space: Space, scores: dict[tuple[int, ...], float]):
    """A function that predicts the score of choices: a linear model of the options, by ridge regression."""
    rows = torch.tensor([features(space, choices) for choices in scores], dtype=torch.float64)
    wanted = torch.tensor(list(scores.values()), dtype=torch.float64)
    pull = 3.0 * torch.eye(rows.shape[1], dtype=torch.float64)
    pull[0, 0] = 1e-6  # not of the mean
    weights = torch.linalg.solve(rows.T @ rows + pull, rows.T @ wanted)

    def predict(many: list[tuple[int, ...]]) -> list[float]:
        return (torch.tensor([features(space, choices) for choices in many], dtype=torch.float64)
                @ weights).tolist()
    return predict


ROUNDS, CHILDREN, PARENTS, DRAWN, PLAIN = 6, 10, 12, 32, 20  # networks, of the evolution
TRIES = 2000  # of a random network near to a target
IMAGES, BATCH = 600, 64  # held-out ones, by which networks are compared; so many at once
DENOISED = 2  # batches of them, by which networks are compared in denoising
SPREAD = 24  # networks from all over the space, whose order judge.py compares with that after training


def search(supernet: SuperNet, within: Within) -> tuple[int, ...]:
    """The choices of the best network within the target, by the supernet's comparison.

    It begins with random networks, near the target and all over the space, and with plain ones. In each
    round the best ones are mutated and crossed. Of many children those are compared that a linear model of
    all known networks prefers, and some others. The best by the mean of its own score and the model's is
    taken: each alone is noisy.
    """
    space, compare, rng = supernet.space, supernet.compare, random.Random(supernet.seed)
    again = len(compare.losses) > 0  # for another target: much is known, and a third of the work is enough
    drawn, plain_ones, rounds = (DRAWN // 4, PLAIN // 3, ROUNDS // 3) if again else (DRAWN, PLAIN, ROUNDS)
    # The branch costs most: few random networks near a low target have it, and an adjusted one loses it.
    plain = [space.uniform(*(rng.randrange(4) for _ in range(4)), branch)
             for branch in range(len(BRANCHES)) for _ in range(plain_ones // len(BRANCHES))]
    # Those of --strategy random with the first seeds, whose order judge.py looks at.
    first = [within.draw(random.Random(seed)) for seed in range(drawn)]
    first += [within.adjust(choices, rng, keep="branch") for choices in plain]
    if again:
        known = sorted(compare.scores().items(), key=lambda pair: pair[1])[:PARENTS]
        first += [within.adjust(choices, rng) for choices, _ in known]
    spread = [] if again else spread_over(space)
    supernet.to(compare.device)
    pool, total = [], len(spread) + len(first) + rounds * CHILDREN
    progress = run.track(range(total), "comparison", total, unit="network")
    steps = iter(progress)

    def measure(many) -> None:
        for choices in dict.fromkeys(many):
            next(steps, None)
            if choices not in compare.losses:
                compare.measure(choices)
            pool.append(choices)

    measure([*spread, *first])
    pool = pool[len(spread):]
    for _ in range(rounds):
        scores = compare.scores()
        parents = sorted(set(pool), key=scores.get)[:PARENTS]
        predict, children = predictor(space, scores), []
        while len(children) < 20 * CHILDREN:
            one, other, fresh = rng.choice(parents), rng.choice(parents), space.random_choices(rng)
            child = tuple(rng.choice(pair) for pair in zip(one, other)) if rng.random() < 0.5 else one
            child = tuple(new if rng.random() < 0.1 else old for old, new in zip(child, fresh))
            children.append(within.adjust(child, rng))
        children = list(dict.fromkeys(child for child in children if child not in compare.losses))
        ranked = [child for _, child in sorted(zip(predict(children), children))]
        some = CHILDREN * 3 // 4
        measure(ranked[:some] + rng.sample(ranked[some:], min(len(ranked) - some, CHILDREN - some)))
    list(steps)  # closes the bar
    supernet.cpu()
    scores = compare.scores()
    costs, least = {choices: within.cost(choices) for choices in pool}, within.NEAR * within.target
    fitting = [choices for choices, cost in costs.items() if cost <= within.target]
    fitting = [choices for choices in fitting if costs[choices] >= least] or fitting or pool
    return min(zip((scores[choices] + guess for choices, guess in
                    zip(fitting, predictor(space, scores)(fitting))), fitting))[1]


# ------------------------------------------------------------------------------------------------------------
# Training


class Schedule:
    """The weights of the supernet; what is chosen is chosen after the last epoch, by `search`.

    The first epochs train even networks: one share of the channels everywhere, the rest drawn (universally
    slimmable networks, Yu and Huang 2019), on images of half the size, in half the time. From networks of
    random widths a supernet learns its first features many times slower. Then every other step trains the
    widest and deepest network and a random one, the steps between two random ones, the smallest among them
    every fourth time. Beside the largest the others learn its images and logits as well. (In the papers every
    step trains the largest, the smallest and two random ones, which is 1.8 times as much work.) Muon, clip 5;
    the learning rate is constant, then a cosine to 0.
    """

    GRAD_CLIP, LABEL_SMOOTHING, TAUGHT, WARM_STEPS = 5.0, 0.1, 0.5, 100
    EXPLANATION = ("All networks share the weights of the largest. After the last epoch networks within the "
                   "latency are compared on the held-out images.")

    def __init__(self, supernet: SuperNet, costs, *, steps: int, device: torch.device, loss: str, epochs: int,
                 lr: float, seed: int, prefer: float, warmup_epochs: int | None = None, amp: str = "off",
                 **_):
        self.supernet, self.device = supernet.to(device, memory_format=torch.channels_last).train(), device
        self.loss, self.seed, self.prefer, self.amp = loss, seed, prefer, amp
        self.guard = run.Guard()
        self.warmup_epochs = round(epochs * 3 / 4) if warmup_epochs is None else warmup_epochs
        self.weights = supernet.weight_parameters()
        self.optimizer = Muon(self.weights, lr)
        warm, all_steps = self.warmup_epochs * steps, max(1, epochs * steps)

        def rate(step: int) -> float:
            fall = max(0.0, (step - warm) / max(1, all_steps - warm))
            return min(1.0, (step + 1) / self.WARM_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))

        self.lr_schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "float16")
        self.rng = random.Random()

    def work(self, epoch: int) -> float:
        """How long an epoch takes beside a warm-up epoch, for the forecast (measured at 64 px on a CPU)."""
        return 1.0 if epoch < self.warmup_epochs else 4.0

    def begin_epoch(self, epoch: int, first_step: int) -> None:
        self.epoch, self.warm = epoch, epoch < self.warmup_epochs

    def held_out_before(self, step: int) -> int:
        return 0

    def _even(self, width: int) -> Arch:
        """A network of one share in all widths, the rest drawn, but for depth and decoder of the widest. All
        have stem and head at several scales, with which the weights learn the class sooner."""
        space = self.supernet.space
        even = space.uniform(width, LAST, LAST, LAST, LAST)
        fixed = ("width", "stem", "head", "multiscale",
                 *(["depth", "convolutions", "branch"] if width == LAST else []))
        return space.arch(tuple(index if name.endswith(fixed) else self.rng.randrange(len(options))
                                for (name, options), index in zip(space.decisions, even)))

    def networks(self, step: int) -> list[tuple[Arch, bool]]:
        """The networks of a step, and whether each is the one that the others learn from."""
        space = self.supernet.space
        if self.warm:
            return [(self._even(self.rng.randrange(len(WIDTHS))), True)]
        others = [(space.arch(space.random_choices(self.rng)), False) for _ in range(2)]
        if step % 2 == 0:
            others[0] = self._even(LAST), True
        elif step % 4 == 3:
            others[1] = space.arch(space.smallest()), False
        return others

    def _backward(self, batch, arch: Arch, taught: models.Output | None) -> tuple[Tensor, models.Output]:
        noisy, clean, labels = batch
        with run.autocast(self.device, self.amp):
            output = self.supernet(noisy, arch)
        loss, _ = task_loss(output, clean, labels, self.loss, self.LABEL_SMOOTHING)
        if taught is not None:
            learned = taught_loss(output, taught, clean, labels, self.loss)
            loss = (1 - self.TAUGHT) * loss + self.TAUGHT * learned
        self.scaler.scale(loss).backward()  # each at once: the graph of one network in memory
        return loss.detach(), models.Output(*(None if each is None else each.detach() for each in output))

    def step(self, batch, step: int, held_out, where: str) -> dict[str, float]:
        self.rng.seed(f"{self.seed} {self.epoch} {step}")  # the same in a resumed run
        if self.warm and min(batch[0].shape[-2:]) >= 4 * models.ENCODER_STRIDE:  # stage 8 keeps a pixel
            batch = *(F.avg_pool2d(images, 2) for images in batch[:2]), batch[2]
        self.optimizer.zero_grad(set_to_none=True)
        total, answer, values = 0.0, None, {}
        for arch, is_largest in self.networks(step):
            loss, own = self._backward(batch, arch, answer)
            answer = own if is_largest else answer
            total, values["weight_loss" if is_largest else "others_loss"] = total + loss, loss.item()
        used = [weight for weight in self.weights if weight.grad is not None]
        taken = run.take_step(total, used, self.optimizer, self.scaler, self.guard, self.GRAD_CLIP, where)
        self.lr_schedule.step()
        return values if taken else {}

    def end_epoch(self) -> dict:
        return {}

    def end(self, batches) -> None:
        """Take the images that networks are compared on, after the last epoch."""
        images, count = [], 0
        for batch in batches.epoch(0):
            images.append(batch)
            count += len(batch[0])
            if count >= (DENOISED * BATCH if self.loss == "den" else IMAGES):
                break
        size = -(-len(images) // max(1, round(count / BATCH)))  # batches of the loader in one of these
        joined = [tuple(map(torch.cat, zip(*images[start:start + size])))
                  for start in range(0, len(images), size)]
        self.supernet.compare = Comparison(self.supernet, joined, self.loss, self.prefer, self.device,
                                           self.amp)
        self.supernet.seed = self.seed

    def format_row(self, row: dict) -> str:
        """An epoch in words."""
        if "others_loss" not in row:
            return f"loss of even networks {row['weight_loss']:.4f}"
        return f"loss of the largest {row['weight_loss']:.4f}  others {row['others_loss']:.4f}"

    def better(self, row: dict, best: dict | None) -> bool:
        return False  # the supernet of the last epoch is taken

    def _parts(self) -> dict:
        return {"supernet": self.supernet, "optimizer": self.optimizer, "scaler": self.scaler,
                "schedule": self.lr_schedule}

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


# ------------------------------------------------------------------------------------------------------------
# What search.py asks: flags, plan, supernet


PREFERENCES = {"denoising": 0.2, "balanced": 0.5, "classification": 0.8}


def preference(text: str) -> float:
    """A type for argparse: a name of PREFERENCES, or the weight of classification."""
    return PREFERENCES[text] if text in PREFERENCES else number(0, 1)(text)


def add_arguments(parser, model: str) -> None:
    """The flags of this method."""
    group = parser.add_argument_group("search")
    group.add_argument("--space", choices=SPACES, default=SPACES[0],
                       help="wide: this method; 4, 6 or 8 operations per block: the papers' spaces, whose "
                            "flags --space 4 --help lists (default: %(default)s)")
    group.add_argument("--prefer", type=preference, default=0.5, metavar="WHAT",
                       help="by what networks are compared: denoising, balanced, classification, or the "
                            "weight of classification from 0 to 1 (default: balanced)")
    group.add_argument("--scale", type=number(*SCALES), metavar="X",
                       help="factor of all channels of the space (default: by the largest target)")
    group.add_argument("--warmup-epochs", type=whole(0, 100000), metavar="N",
                       help="first epochs, which train even networks on images of half the size "
                            "(default: three quarters)")


def search_defaults(given: dict) -> dict:
    return {"epochs": 11, "batch_size": 16, "lr": 4e-3}


def plan(data, /, *, model: str, target, range: bool, scale: float | None = None, **_) -> dict:
    """What is searched on these images; ValueError in one sentence where flags and images do not fit."""
    tfnas.check_asked(data, model, target, range)
    space = Space(len(data.classes or []) or 10, model, scale or 1.0, data.channels == 1)
    loss = {"dcnas": "both", "cnas": "cls", "dnas": "den"}[model]
    return {"space": space, "table_space": replace(space, model="dcnas"), "loss": loss, "weight_share": 0.8}


def make_supernet(space: Space, /, **_) -> SuperNet:
    return SuperNet(space)


def explain_choice(supernet: SuperNet, design: Arch, rows: list[dict]) -> list[str]:
    """How many networks were compared, and how far the found one is from the middle of them."""
    return [f"note: {row['networks']} networks were compared; {row['loss']}: least {row['least']:.4f}, "
            f"median {row['median']:.4f}" for row in supernet.decisions()]
