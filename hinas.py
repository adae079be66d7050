"""HiNAS: denoisers and super-resolution networks whose cells and widths are found by gradient descent.

    python search.py --model hinas --data photos                        # searches; --help lists the flags
    python hinas.py --arch runs/search/arch.json --output network.svg   # draws what was found
    python hinas.py --arch runs/search/arch.json --change R1 --output r1/arch.json

    image, _ = build(SuperNet(Space()).likeliest())(torch.rand(1, 1, 64, 64))

Zhang et al., "Memory-Efficient Hierarchical Neural Architecture Search for Image Restoration", 2020.
The file needs torch only and works when copied alone; its command reads records with files.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TRAIN_DEFAULTS = {"epochs": 20, "batch_size": 24, "optimizer": "muon", "lr": 4e-3,
                  "denoising_loss": "log-ssim"}
TASKS = {"denoise": (3, 4), "sr": (2, 3)}  # task -> layers, nodes of a cell (section 4.1)
SCALES = {"denoise": (1,), "sr": (2, 3, 4)}
WIDTH_FACTORS = (1.0, 1.5, 2.0)  # gamma of eq. 4; the text also says 2^i, the authors' code has these
SEARCH_WIDTH, FOUND_WIDTH = 10, 20  # base width W of the supernet, and of the found network
STEM_CHANNELS, HIGH_CHANNELS, LOW_CHANNELS = 64, 128, 48


class Output(NamedTuple):
    """What every network returns: `image` (B, C, scale * H, scale * W); there are no logits."""
    image: Tensor
    logits: Tensor | None = None


# --- Operations (section 3.1) -----------------------------------------------------------------------------
def conv(in_channels: int, channels: int, size: int, affine=True, dilation=1, separable=False) -> nn.Module:
    """LeakyReLU(0.2), convolution, batch norm: (B, in_channels, H, W) -> (B, channels, H, W).

    `affine`: in the found network only. Zeros are the padding (the paper states none).
    """
    how = {"padding": dilation * (size // 2), "dilation": dilation, "bias": False}
    convolutions = [nn.Conv2d(in_channels, channels, size, **how)] if not separable else [
        nn.Conv2d(in_channels, in_channels, size, groups=in_channels, **how),
        nn.Conv2d(in_channels, channels, 1, bias=False)]
    return nn.Sequential(nn.LeakyReLU(0.2), *convolutions, nn.BatchNorm2d(channels, affine=affine))


OPERATIONS = {  # name -> function of (channels, affine)
    "conv3": lambda c, affine: conv(c, c, 3, affine),
    "sep3": lambda c, affine: nn.Sequential(*(conv(c, c, 3, affine, separable=True) for _ in range(2))),
    "sep5": lambda c, affine: nn.Sequential(*(conv(c, c, 5, affine, separable=True) for _ in range(2))),
    "dil3": lambda c, affine: conv(c, c, 3, affine, dilation=2),
    "dil5": lambda c, affine: conv(c, c, 5, affine, dilation=2),
    "skip": lambda c, affine: nn.Identity()}
CHOICES = (*OPERATIONS, "none")  # alpha's last dimension; "none" returns zero, and is never found


def edges_of(node: int) -> slice:
    """The rows of alpha of the edges into a node: from the cell's two inputs, then from earlier nodes."""
    return slice(node * (node + 3) // 2, (node + 1) * (node + 4) // 2)


# --- Designs and their space ------------------------------------------------------------------------------
class Part(NamedTuple):
    """One timed part: an operation of a cell, or a 1x1 convolution ("pointwise") between widths."""
    operation: str
    in_channels: int
    out_channels: int


class Edge(NamedTuple):
    """An operation and its input: source 0 is the layer before, 1 the one before that, 2 + i is node i."""
    source: int
    operation: str


@dataclass(frozen=True)
class Design:
    """A network. Widths are channels per node; a cell has two edges into each node, in order of sources."""
    task: str
    scale: int
    channels: int
    base_width: int
    residual: bool
    widths: tuple[int, ...]
    cells: tuple[tuple[tuple[Edge, Edge], ...], ...]

    @property
    def nodes(self) -> int:
        return len(self.cells[0])

    def parts(self) -> list[Part]:
        """The searched parts of the network, in its order."""
        parts, before, two_before = [], *[self.nodes * self.base_width] * 2
        for width, nodes in zip(self.widths, self.cells):
            parts += [Part("pointwise", before, width), Part("pointwise", two_before, width)]
            parts += [Part(edge.operation, width, width) for node in nodes for edge in node]
            before, two_before = self.nodes * width, before
        return [*parts, Part("pointwise", before, HIGH_CHANNELS)]

    def edges(self) -> dict[tuple[int, int, int], Edge]:
        """The edges by their places: layer, node, 0 or 1."""
        return {(number, index, place): edge for number, nodes in enumerate(self.cells)
                for index, node in enumerate(nodes) for place, edge in enumerate(node)}

    def with_edges(self, edges: dict[tuple[int, int, int], Edge]) -> Design:
        """The design with other edges at some places."""
        new = self.edges() | edges
        return replace(self, cells=tuple(tuple(
            tuple(sorted((new[number, index, 0], new[number, index, 1]))) for index in range(self.nodes))
            for number in range(len(self.cells))))

    def to_dict(self) -> dict:
        """For JSON."""
        return {name: getattr(self, name) for name in FRAME} | {"layers": [
            {"width": width, "nodes": [[edge._asdict() for edge in node] for node in nodes]}
            for width, nodes in zip(self.widths, self.cells)]}


FRAME = {"task": tuple(TASKS), "scale": range(1, 5), "channels": (1, 3), "base_width": range(1, 1025),
         "residual": (False, True)}  # what a design and a space have in common
LAYER = {"width": range(1, 4097), "nodes": [[{"source": range(18), "operation": tuple(OPERATIONS)}]]}


def _fits(value, schema) -> bool:
    """Whether a value is as a schema has it: a dict or a list of schemas, or the values of one type."""
    if isinstance(schema, dict):
        known = isinstance(value, dict) and value.keys() == schema.keys()
        return known and all(_fits(value[name], schema[name]) for name in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and 0 < len(value) <= 64 and all(_fits(x, schema[0]) for x in value)
    return type(value) is type(schema[0]) and value in schema


def _check(what: str, values: dict, schema: dict) -> None:
    """ValueError in one sentence that names the fields which do not fit."""
    wrong = [str(x) for x in schema | values if x not in schema or not _fits(values.get(x), schema[x])]
    if wrong or values["scale"] not in SCALES[values["task"]]:
        names = ", ".join(wrong or ["scale"])
        raise ValueError(f"The {what} is not valid: wrong, missing or unknown: {names[:80]}.")


def design_of(record: dict) -> Design:
    """The design of a record; ValueError in one sentence where it has none or a wrong one."""
    content = record.get("design")
    _check("design", content if isinstance(content, dict) else {}, FRAME | {"layers": [LAYER]})
    cells = tuple(tuple(tuple(Edge(**edge) for edge in node) for node in layer["nodes"])
                  for layer in content["layers"])
    paired = all(len(node) == 2 and node[0].source < node[1].source < index + 2
                 for nodes in cells for index, node in enumerate(nodes))
    if not paired or len(set(map(len, cells))) > 1:
        raise ValueError("The design is not valid: all layers must have the same number of nodes, and every "
                         "node two edges, from ascending sources before it.")
    widths = tuple(layer["width"] for layer in content["layers"])
    return Design(**{name: content[name] for name in FRAME}, widths=widths, cells=cells)


def record_content(design: Design) -> dict:
    """What a record says of a design (JSON)."""
    return {"model": "hinas", "design": design.to_dict()}


@dataclass(frozen=True)
class Space:
    """What can be found; ValueError in one sentence where that is not possible.

    `layers`, `nodes`: None for the paper's (TASKS). `widths`: a factor per layer, or None for searched ones.
    """
    task: str = "denoise"
    scale: int = 1
    channels: int = 1
    base_width: int = FOUND_WIDTH
    residual: bool = True
    layers: int | None = None
    nodes: int | None = None
    widths: tuple[float, ...] | None = None

    def __post_init__(self):
        for name, default in zip(("layers", "nodes"), TASKS.get(str(self.task), (1, 1))):
            object.__setattr__(self, name, default if getattr(self, name) is None else getattr(self, name))
        values = {name: value for name, value in vars(self).items() if name != "widths"}
        _check("space", values, FRAME | {"layers": range(1, 65), "nodes": range(1, 17)})
        widths = (1.0,) * self.layers if self.widths is None else self.widths
        if len(widths) != self.layers or not all(0.1 <= x <= 16 for x in widths):
            raise ValueError(f"The space is not valid: widths must be {self.layers} numbers from 0.1 to 16.")

    def identity(self) -> dict:
        """What the space is, for JSON."""
        return {"method": "hinas", **vars(self), "widths": self.widths and list(self.widths)}

    @classmethod
    def from_identity(cls, identity: dict) -> Space:
        """The space of what `identity` returned."""
        values = {**identity, "widths": identity["widths"] and tuple(identity["widths"])}
        return cls(**{name: value for name, value in values.items() if name != "method"})

    def table_flags(self) -> str:
        """The flags with which latency.py makes a table of this space."""
        same = {"base_width": self.base_width, "channels": self.channels}
        names = [name for name, preset in PRESETS.items() if replace(preset, **same) == self]
        network = f" --network {names[0]} --width {self.base_width}" if names else ""
        return f"--method hinas{network}" + (" --grey" if self.channels == 1 else " --no-grey")

    def widths_of(self, number: int) -> list[int]:
        """The possible widths of a layer (-1: of the stem) in channels per node, narrowest first."""
        fixed = self.widths and (1.0, *self.widths)[number + 1:number + 2]
        return [max(1, int(self.base_width * x + 0.5)) for x in fixed or WIDTH_FACTORS[:number + 2]]

    def inputs(self, number: int, index: int, back: int) -> list[tuple[int, Part]]:
        """(width index there, 1x1 convolution) of the inputs of a layer from `back` (1, 2) layers before."""
        there, here = self.widths_of(max(number - back, -1)), self.widths_of(number)[index]
        return [(source, Part("pointwise", self.nodes * width, here)) for source, width in enumerate(there)
                if abs(source - index) <= back]

    def paths(self) -> list[tuple[int, ...]]:
        """Every path of widths, one index per layer; a step changes the index by at most 1."""
        paths = itertools.product(*(range(len(self.widths_of(number))) for number in range(self.layers)))
        return [path for path in paths if all(abs(a - b) <= 1 for a, b in zip((0, *path), path))]

    def design(self, path, cells) -> Design:
        """The design with a width index and a cell per layer."""
        widths = tuple(self.widths_of(number)[index] for number, index in enumerate(path))
        return Design(*(getattr(self, name) for name in FRAME), widths, tuple(cells))

    def random_design(self, rng: random.Random) -> Design:
        """A design whose widths (step by step), sources and operations are drawn uniformly."""
        path, cells = [0], []
        for number in range(self.layers):
            indices = range(len(self.widths_of(number)))
            path.append(rng.choice([index for index in indices if abs(index - path[-1]) <= 1]))
            cells.append(random_nodes(self.nodes, rng))
        return self.design(path[1:], cells)

    def reference_design(self) -> Design:
        """Always the same random design: its time tells how fast a device is at the moment."""
        return self.random_design(random.Random(0))

    def possible_parts(self) -> set[Part]:
        """Every part that a network of this space can have."""
        parts = {Part("pointwise", self.nodes * w, HIGH_CHANNELS) for w in self.widths_of(self.layers - 1)}
        for number in range(self.layers):
            for index, width in enumerate(self.widths_of(number)):
                parts |= {Part(name, width, width) for name in OPERATIONS}
                parts |= {part for back in (1, 2) for _, part in self.inputs(number, index, back)}
        return parts

    def carriers(self, rng: random.Random, rounds: int) -> list[Design]:
        """Random designs such that each possible part is in at least `rounds` of them."""
        counts, chosen = Counter(dict.fromkeys(self.possible_parts(), 0)), []
        while min(counts.values()) < rounds:
            design = self.random_design(rng)
            if any(counts[part] < rounds for part in design.parts()):
                chosen.append(design)
                counts.update({*design.parts()})
        return chosen

    def holds(self, design: Design) -> bool:
        """Whether a latency table of this space has all parts of a design."""
        alike = (design.channels, design.scale) == (self.channels, self.scale)
        return alike and {*design.parts()} <= self.possible_parts()

    def cost(self, design: Design, costs: dict[Part, float], rest: float) -> float:
        return sum(costs[part] for part in design.parts()) + rest

    def kinds(self, design: Design) -> list[str]:
        return ["network"]

    def network(self, design: Design) -> HinasNetwork:
        return HinasNetwork(design)

    def parts(self, network: HinasNetwork) -> list[tuple[Part, nn.Module]]:
        """Each searched part of a network with its module; the rest is the stem, `low` and the end."""
        modules = [x for cell in network.cells for x in (*cell.inputs, *itertools.chain(*cell.nodes))]
        return list(zip(network.design.parts(), (*modules, network.high), strict=True))


PRESETS = {  # HiNAS-ws, -w40, -wm (table 3), and super-resolution
    "denoise": Space(), "denoise-w40": Space(widths=(2.0,) * 3), "denoise-wm": Space(widths=(1.0, 2.0, 4.0)),
    **{f"sr-x{scale}": Space("sr", scale, channels=3) for scale in (2, 3, 4)}}


def random_nodes(nodes: int, rng: random.Random) -> tuple[tuple[Edge, Edge], ...]:
    """The edges of a cell, drawn uniformly."""
    pairs = (sorted(rng.sample(range(node + 2), 2)) for node in range(nodes))
    return tuple(tuple(Edge(source, rng.choice(tuple(OPERATIONS))) for source in pair) for pair in pairs)


# --- The found network ------------------------------------------------------------------------------------
class Cell(nn.Module):
    """A found cell (eq. 3) of outputs (B, first, H, W), (B, second, H, W) of the two layers before it."""

    def __init__(self, width: int, edges: tuple[tuple[Edge, Edge], ...], first: int, second: int):
        super().__init__()
        self.width, self.edges = width, edges
        self.inputs = nn.ModuleList(conv(channels, width, 1) for channels in (first, second))
        self.nodes = nn.ModuleList(nn.ModuleList(OPERATIONS[edge.operation](width, True) for edge in node)
                                   for node in edges)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        states = [self.inputs[0](first), self.inputs[1](second)]  # (B, width, H, W) each
        for node, edges in zip(self.nodes, self.edges):
            states.append(sum(operation(states[edge.source]) for operation, edge in zip(node, edges)))
        return torch.cat(states[2:], 1)  # (B, nodes * width, H, W)


def enlarge(x: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement, a = -0.5, as MATLAB and Pillow do it (torch does so with `antialias` only)."""
    return F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False, antialias=True)


class Frame(nn.Module):
    """What is around the cells (fig. 2 and 4) of the supernet and of the found network.

    The end sees the last cell ("high") and the last of base width, or else the stem ("low"). Sizes are the
    authors' code's. The paper states no norms; here only the last convolution has none. A residual is added
    to the input or its bicubic enlargement (section 3.3). It begins at zero: a short search does not unlearn
    the noise of random weights.
    """
    denoises, classifies = True, False

    def __init__(self, plan: Design | Space, base_width: int, affine: bool):
        super().__init__()
        self.channels, self.scale, self.residual = plan.channels, plan.scale, plan.residual
        width, first = plan.nodes * base_width, conv(self.channels, STEM_CHANNELS, 3, affine)[1:]
        self.stem = nn.Sequential(*first, conv(STEM_CHANNELS, width, 3, affine))
        self.low = conv(width, LOW_CHANNELS, 1, affine)
        self.end = nn.Sequential(
            *(conv(x, 128, 3, affine, separable=True) for x in (HIGH_CHANNELS + LOW_CHANNELS, 128)),
            nn.LeakyReLU(0.2), nn.Conv2d(128, self.channels * self.scale ** 2, 3, padding=1))
        for parameter in self.end[-1].parameters() if self.residual else ():
            nn.init.zeros_(parameter)

    def to_image(self, x: Tensor, high: Tensor, low: Tensor) -> Output:
        """The end, of (B, C, H, W), (B, 128, H, W) and (B, nodes * base_width, H, W)."""
        image = self.end(torch.cat((high, self.low(low)), 1))  # (B, C * scale^2, H, W)
        image = F.pixel_shuffle(image, self.scale)  # (B, C, scale * H, scale * W)
        if self.residual:
            image = (x if self.scale == 1 else enlarge(x, self.scale)) + image
        return Output(image)


class HinasNetwork(Frame):
    """The network of a `Design`; layer 0 takes the stem twice.

    forward: (B, C, H, W) in [0, 1], any H and W -> Output(image (B, C, scale * H, scale * W)), not clamped.
    """

    def __init__(self, design: Design):
        super().__init__(design, design.base_width, affine=True)
        self.design = design
        widths = (design.base_width, design.base_width, *design.widths)  # stem, stem, layers
        channels = [design.nodes * width for width in widths]
        self.cells = nn.ModuleList(map(Cell, design.widths, design.cells, channels[1:], channels))
        self.high = conv(channels[-1], HIGH_CHANNELS, 1)

    def forward(self, x: Tensor) -> Output:
        second = first = low = self.stem(x)
        for cell in self.cells:
            first, second = cell(first, second), first  # (B, nodes * width, H, W)
            low = first if cell.width == self.design.base_width else low
        return self.to_image(x, self.high(first), low)


build = HinasNetwork  # what all methods call it


def count_parameters(make, *how) -> int:
    """The parameters of the module that `make(*how)` returns."""
    with torch.device("meta"):  # shapes only
        return sum(parameter.numel() for parameter in make(*how).parameters())


# --- The supernet -----------------------------------------------------------------------------------------
def weighted(weights: Tensor, features: list[Tensor]) -> Tensor:
    """The sum of n features of one shape, times weights (n,)."""
    return sum(weight * feature for weight, feature in zip(weights, features, strict=True))


class SuperCell(nn.Module):
    """All cells of one width (eq. 1, 2), from two inputs (B, width, H, W) and weights (edges, 7)."""

    def __init__(self, nodes: int, width: int):
        super().__init__()
        self.nodes = nn.ModuleList(nn.ModuleList(  # node, edge, operation
            nn.ModuleList(make(width, False) for make in OPERATIONS.values()) for _ in range(node + 2))
            for node in range(nodes))

    def forward(self, first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        states = [first, second]
        for index, node in enumerate(self.nodes):
            edges = zip(node, states, weights[edges_of(index)])
            states.append(sum(weight * operation(state) for operations, state, row in edges
                              for operation, weight in zip(operations, row)))  # zip drops "none"
        return torch.cat(states[2:], 1)  # (B, nodes * width, H, W)


class SuperLayer(nn.Module):
    """The cells of a layer, one per width, and the 1x1 convolutions that bring their inputs to that width.

    `share_cells`: a cell takes the weighted sum of its inputs (eq. 5); else it is one for each width of the
    layer before (eq. 6). forward: the outputs of the two layers before, one per width, and their weights
    (widths there, widths here).
    """

    def __init__(self, space: Space, number: int, share_cells: bool, recompute: bool):
        super().__init__()
        self.share_cells, self.recompute, widths = share_cells, recompute, space.widths_of(number)
        inputs = [[space.inputs(number, index, back) for index in range(len(widths))] for back in (1, 2)]
        self.sources = [[[source for source, _ in row] for row in rows] for rows in inputs]
        self.inputs = nn.ModuleList(nn.ModuleList(nn.ModuleList(  # 1 or 2 layers before, width here, there
            conv(part.in_channels, part.out_channels, 1, affine=False) for _, part in row) for row in rows)
            for rows in inputs)
        self.cells = nn.ModuleList(nn.ModuleList(  # width here; and there, where cells are not shared
            SuperCell(space.nodes, width) for _ in (row[:1] if share_cells else row))
            for width, row in zip(widths, inputs[0]))

    def forward(self, first: list[Tensor], second: list[Tensor], before, two_before, weights) -> list[Tensor]:
        outputs = []
        for index, cells in enumerate(self.cells):
            here, there = self.sources[0][index], self.sources[1][index]
            ones = [convolution(first[source]) for source, convolution in zip(here, self.inputs[0][index])]
            twos = [convolution(second[source]) for source, convolution in zip(there, self.inputs[1][index])]
            two = weighted(two_before[there, index], twos)  # (B, width, H, W)
            if self.share_cells:
                ones = [weighted(before[here, index], ones)]
            features = [checkpoint(cell, one, two, weights, use_reentrant=False) if self.recompute
                        else cell(one, two, weights) for cell, one in zip(cells, ones)]
            outputs.append(features[0] if self.share_cells else weighted(before[here, index], features))
        return outputs  # (B, nodes * width, H, W) each


class SuperNet(Frame):
    """All networks of a space at once: weights, and logits `alpha` (layers, edges, 7), `beta` (layers, 3, 3).

    softmax(alpha) weighs the operations of an edge; `layerwise=False` has one alpha for all layers (LWAS,
    table 1). softmax(beta[layer, width before]) are the probabilities of the widths at most a step from the
    one before; the stem has width 0. A space with fixed widths has no beta. `recompute` computes cells again
    in the backward pass: less memory, the same gradients (statistics of the norms move twice per step).

    Eq. 5 leaves open how beta is normalised, and takes the second input from a cell of the same width, which
    a path need not have. Here inputs are weighted with P(width there | this width), and the end adds the last
    widths by P(width), where the paper concatenates. So a decided supernet equals the network it stands for.
    """

    def __init__(self, space: Space, base_width: int = SEARCH_WIDTH, share_cells: bool = True,
                 layerwise: bool = True, recompute: bool = False):
        super().__init__(space, base_width, affine=False)
        self.space = space
        self.own_space = replace(space, base_width=base_width)  # of what the supernet itself computes
        self.layers = nn.ModuleList(SuperLayer(self.own_space, number, share_cells, recompute)
                                    for number in range(space.layers))
        self.high = nn.ModuleList(conv(space.nodes * width, HIGH_CHANNELS, 1, affine=False)
                                  for width in self.own_space.widths_of(space.layers - 1))
        edges = edges_of(space.nodes).start
        self.alpha = nn.Parameter(torch.zeros(space.layers if layerwise else 1, edges, len(CHOICES)))
        self.beta = nn.Parameter(torch.zeros(space.layers, 3, 3)) if space.widths is None else None

    def weight_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if name not in ("alpha", "beta")]

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alpha] if self.beta is None else [self.alpha, self.beta]

    def _alphas(self) -> list[Tensor]:
        """alpha (edges, 7) of each layer."""
        return [self.alpha[number % len(self.alpha)] for number in range(self.space.layers)]

    def _alike(self, number: int) -> range:
        """The layers that share the alpha of a layer."""
        return range(number % len(self.alpha), self.space.layers, len(self.alpha))

    def log_steps(self) -> list[Tensor]:
        """Per layer: log P(width | width before), (widths there, widths here); -inf: no such step."""
        beta = self.alpha.new_zeros(self.space.layers, 3, 3) if self.beta is None else self.beta
        index = torch.arange(3, device=beta.device)
        beta = beta.masked_fill((index[:, None] - index).abs() > 1, -math.inf)
        counts = [len(self.space.widths_of(number)) for number in range(-1, self.space.layers)]
        return [step[:there, :here].log_softmax(1) for step, there, here in zip(beta, counts, counts[1:])]

    def width_probabilities(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per layer: P(width), (widths,); P(width one layer before | width) and two, (widths there, here)."""
        log_p, p, before, two_before = self.alpha.new_zeros(1), [], [], []
        for step in self.log_steps():
            joint = log_p[:, None] + step
            log_p = joint.logsumexp(0)
            p.append(log_p.exp())
            before.append(joint.softmax(0))
            two_before.append(before[-2] @ before[-1] if len(before) > 1 else before[-1])  # 0: the stem twice
        return p, before, two_before

    def forward(self, x: Tensor) -> Output:
        second = first = low = [self.stem(x)]  # low: the last feature of base width on the way to each width
        p, before, two_before = self.width_probabilities()
        for number, (layer, alpha) in enumerate(zip(self.layers, self._alphas())):
            weights = (before[number], two_before[number], F.softmax(alpha, 1))
            first, second = layer(first, second, *weights), first
            widths = self.own_space.widths_of(number)
            low = [feature if width == self.own_space.base_width
                   else weighted(before[number][sources, index], [low[source] for source in sources])
                   for index, (feature, width, sources) in enumerate(zip(first, widths, layer.sources[0]))]
        high = [convolution(feature) for convolution, feature in zip(self.high, first)]
        return self.to_image(x, weighted(p[-1], high), weighted(p[-1], low))

    def entropy(self) -> Tensor:
        """The entropy of each operation, then each width: 1 undecided, 0 decided."""
        log_p = F.log_softmax(self.alpha.detach(), 2).flatten(0, 1)
        values = [-(log_p.exp() * log_p).sum(1) / math.log(len(CHOICES))]
        for step in self.log_steps() if self.beta is not None else ():
            values.append(torch.special.entr(step.detach().exp()).sum(1) / (step > -math.inf).sum(1).log())
        return torch.cat(values)

    def decisions(self) -> list[dict]:
        return [{"entropy": round(value, 4)} for value in self.entropy().tolist()]

    def expected_cost(self, costs: dict[Part, float], rest: float = 0.0) -> Tensor:
        """The expected cost of the found network, differentiable (the paper has none); its cost once all is
        decided. KeyError where `costs` lacks a part."""
        space, total = self.space, self.alpha.new_tensor(rest)
        p, *earlier = self.width_probabilities()
        for number, alpha in enumerate(self._alphas()):
            kept = kept_operations(alpha, space.nodes)
            for index, width in enumerate(space.widths_of(number)):
                operations = kept.new_tensor([costs[Part(name, width, width)] for name in OPERATIONS])
                cost = (kept * operations).sum()
                for back in (1, 2):
                    for source, part in space.inputs(number, index, back):
                        cost = cost + earlier[back - 1][number][source, index] * costs[part]
                if number == space.layers - 1:
                    cost = cost + costs[Part("pointwise", space.nodes * width, HIGH_CHANNELS)]
                total = total + p[number][index] * cost
        return total

    def cost_range(self, costs: dict[Part, float], rest: float) -> tuple[float, float]:
        """The costs of the cheapest and the dearest network of the space."""
        def extreme(best, design: Design) -> float:
            edges = design.edges()
            for place, (source, _) in edges.items():
                widths = [design.widths[number] for number in self._alike(place[0])]
                price = lambda name: sum(costs[Part(name, w, w)] for w in widths)
                edges[place] = Edge(source, best(OPERATIONS, key=price))
            return self.space.cost(design.with_edges(edges), costs, rest)
        return tuple(best(extreme(best, design) for _, design in self.starts()) for best in (min, max))

    def likeliest(self, path=None) -> Design:
        """The design of the strongest edges on a path of widths (default: the likeliest)."""
        path = likeliest_path(self.log_steps()) if path is None else path
        return self.space.design(path, [strongest_edges(alpha, self.space.nodes) for alpha in self._alphas()])

    # What latency.fit asks for: from each path of widths, operations are exchanged; a state is a design.
    @torch.no_grad()
    def starts(self) -> list[tuple[float, Design]]:
        """The likeliest design of each path of widths, with the path's log probability."""
        steps = self.log_steps()
        return [(sum(float(step[there, here]) for step, there, here in zip(steps, (0, *path), path)),
                 self.likeliest(path=path)) for path in self.space.paths()]

    @torch.no_grad()
    def exchanges(self, state: Design, costs: dict[Part, float], rest: float, target: float) -> list[tuple]:
        """(lost log probability, saved cost, design) of each cheaper operation, exchanged in all layers that
        share their alpha; [] within the target."""
        options, edges = [], state.edges() if self.state_cost(state, costs, rest) > target else {}
        for (number, node, place), (source, old) in edges.items():
            if number >= len(self.alpha):
                break
            alike = self._alike(number)
            log_p = F.log_softmax(self.alpha[number, edges_of(node)][source], 0).tolist()
            for name in sorted(OPERATIONS):
                gain = sum(costs[Part(old, w, w)] - costs[Part(name, w, w)]
                           for w in (state.widths[layer] for layer in alike))
                if gain > 1e-9:
                    loss = log_p[CHOICES.index(old)] - log_p[CHOICES.index(name)]
                    changed = {(layer, node, place): Edge(source, name) for layer in alike}
                    options.append((loss, gain, state.with_edges(changed)))
        return options

    def state_cost(self, state: Design, costs: dict[Part, float], rest: float) -> float:
        return self.space.cost(state, costs, rest)

    def settle(self, state: Design, costs: dict[Part, float], rest: float, target: float) -> Design:
        return state

    @torch.no_grad()
    def set_design(self, design: Design, logit: float = 30.0) -> None:
        """Make a design of the space all but certain; without layer-wise alpha, its first cell."""
        self.alpha.zero_()[..., -1] = logit
        for (number, node, _), edge in design.edges().items():
            if number < len(self.alpha):
                row = self.alpha[number, edges_of(node)][edge.source]
                row[-1], row[CHOICES.index(edge.operation)] = 0.0, logit
        before = 0
        for number, width in enumerate(design.widths if self.beta is not None else ()):
            index = self.space.widths_of(number).index(width)
            self.beta[number].zero_()[before, index], before = logit, index

    def draw_random(self, seed: int) -> None:
        """Make a random design of the space all but certain."""
        self.set_design(self.space.random_design(random.Random(seed)))

    def describe(self, design: Design, costs: dict[Part, float] | None = None, rest: float = 0.0) -> str:
        """A table to read: the two edges of each node, and what they cost."""
        lines = ["layer  width  node  operation <- source"]
        for number, (width, nodes) in enumerate(zip(design.widths, design.cells)):
            for index, node in enumerate(nodes):
                names = ("layer before", "two layers before", *(f"node {n}" for n in range(index)))
                text = "   ".join(f"{operation:<5} <- {names[source]:<17}" for source, operation in node)
                cost = sum(costs[Part(edge.operation, width, width)] for edge in node) if costs else ""
                lines.append(f"{number:>5}  {width:>5}  {index:>4}  {text}   {cost:.5}".rstrip())
        return "\n".join(lines)

    def export(self, design: Design) -> None:
        """None: the found network is trained from the beginning."""


def strongest_edges(alpha: Tensor, nodes: int) -> tuple[tuple[Edge, Edge], ...]:
    """Each node's two edges with the likeliest operations but "none", from alpha (edges, 7)."""
    strengths, pairs = F.log_softmax(alpha.detach(), 1)[:, :-1].amax(1), []
    best = alpha[:, :-1].argmax(1).tolist()
    for rows in map(edges_of, range(nodes)):
        sources = sorted(strengths[rows].topk(2).indices.tolist())
        pairs.append(tuple(Edge(source, CHOICES[best[rows.start + source]]) for source in sources))
    return tuple(pairs)


def kept_operations(alpha: Tensor, nodes: int) -> Tensor:
    """The probability that a cell has an operation on an edge, (edges, 6).

    A pair of edges is kept in proportion to the product of their strengths, the probabilities of their best
    operations but "none": the likeliest pair is that of `strongest_edges`.
    """
    strengths, kept = F.log_softmax(alpha, 1)[:, :-1].amax(1), []
    for rows in (strengths[edges_of(node)] for node in range(nodes)):
        pairs = torch.combinations(torch.arange(len(rows), device=rows.device))  # (pairs, 2)
        p = rows[pairs].sum(1).softmax(0)
        kept.append(torch.zeros_like(rows).index_add(0, pairs.flatten(), p.repeat_interleave(2)))
    return torch.cat(kept)[:, None] * F.softmax(alpha[:, :-1], 1)


@torch.no_grad()
def likeliest_path(log_steps: list[Tensor]) -> list[int]:
    """The likeliest width index of each layer together (Viterbi), from SuperNet.log_steps()."""
    score, paths = log_steps[0][0], [[index] for index in range(log_steps[0].shape[1])]  # by the last width
    for step in log_steps[1:]:
        score, before = (score[:, None] + step).max(0)
        paths = [[*paths[there], here] for here, there in enumerate(before.tolist())]
    return paths[int(score.argmax())]


# --- How search.py searches -------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """Add this method's own flags to those of search.py."""
    from data import number, whole
    from train import DENOISING_LOSSES

    group = parser.add_argument_group("hinas", "Cells and widths (Zhang 2020), and how they are searched.")
    add, width = group.add_argument, {"type": whole(1, 1024), "metavar": "N"}
    add("--network", choices=PRESETS,
        help="denoise: searched widths; w40, wm: all 40, or 20, 40, 80 (table 3); sr: super-resolution "
             "(default: denoise)")
    add("--width", **width, help=f"base width of the found network in channels (default: {FOUND_WIDTH})")
    add("--search-width", **width, default=SEARCH_WIDTH, help="that of the supernet (default: %(default)s)")
    add("--target-macs", type=number(1e-6, 1e9), metavar="M",
        help="instead of --target: millions of multiply-accumulates for one image (default: no limit)")
    add("--cells", choices=("shared", "unshared"), default="shared",
        help="one for all widths of the layer before (eq. 5), or one each (eq. 6; default: %(default)s)")
    add("--one-cell", action="store_true", help="the same operations in all layers (default: each its own)")
    add("--no-residual", action="store_true", help="return the output itself (default: added to the input)")
    add("--optimizer", choices=("muon", "sgd"), default="muon",
        help="of the weights; sgd is the paper's, with --lr 0.025 (default: %(default)s)")
    add("--warmup-epochs", type=whole(0, 100000), metavar="N",
        help="first epochs, which train the weights only (default: a fifth of --epochs)")
    add("--denoising-loss", choices=DENOISING_LOSSES, default="log-ssim",
        help="log-ssim is MSE + 0.6 log10(1 / SSIM) (eq. 7; default: %(default)s)")
    add("--patience", type=whole(0), default=0, metavar="N",
        help="stop after N epochs without a better validation PSNR; 0: never (default: %(default)s)")
    add("--recompute", action="store_true",
        help="compute cells again in the backward pass: slower, for small GPUs (default: keep features)")


def search_defaults(given: dict) -> dict:
    """Defaults of search.py's common flags, for minutes on a CPU; `given`: the flags on the command line.

    Data, noise and batches of super-resolution are those of section 4.1. Its patches are of the large image;
    the paper does not say of which.
    """
    from data import SCENES

    network, data = given.get("network") or "denoise", given.get("data")
    defaults = {"size": 64, "batch_size": 8, "epochs": 20, "crops": 8, "lr": 4e-3, "arch_lr": 1e-3}
    if network.startswith("sr-"):
        return defaults | {"sigma": 0.0, "batch_size": 24, "size": 66 if network == "sr-x3" else 64}
    if data and data not in SCENES:
        defaults["grey"] = True
        if all((Path(data) / name).is_dir() for name in ("train", "val")):
            defaults["train_folders"] = ["train", "val"]
    return defaults | {"sigmas": [30 / 255, 50 / 255, 70 / 255]}


def plan(data, /, *, network: str | None = None, width: int | None = None, no_residual=False, **_) -> dict:
    """What is searched on `data` (with `channels`); half of the images train the structure (section 4.1)."""
    space = replace(PRESETS[network or "denoise"], channels=data.channels, base_width=width or FOUND_WIDTH)
    return {"space": replace(space, residual=not no_residual), "table_space": space, "loss": "den",
            "weight_share": 0.5}


def make_supernet(space, *, search_width=SEARCH_WIDTH, cells="shared", one_cell=False, recompute=False, **_):
    return SuperNet(space, search_width, cells == "shared", not one_cell, recompute)


def training(supernet: SuperNet, steps: int, *, epochs: int, lr: float, arch_lr: float, optimizer="muon",
             warmup_epochs: int | None = None, **_) -> dict:
    """How a supernet is trained, in epochs of `steps` steps (section 4.1; docs/differences.md).

    The weights have Muon, which needs fewer steps than the paper's SGD, and a cosine over steps (the paper
    does not say of what). The paper's weight decay of alpha and beta comes with its SGD only: in a short
    search it balances their gradients, and little is decided. alpha and beta learn from a fifth of the
    epochs on. From three fifths on the supernet of the highest validation PSNR is kept; the paper names no
    measure.
    """
    from muon import Muon

    weights, structure = supernet.weight_parameters(), supernet.arch_parameters()
    as_paper = optimizer == "sgd"
    weight_optimizer = (torch.optim.SGD(weights, lr, 0.9, weight_decay=3e-4, fused=True) if as_paper
                        else Muon(weights, lr))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(weight_optimizer, epochs * steps, lr / 25)
    return {"weight_optimizer": weight_optimizer, "lr_schedule": cosine, "temperature": None,
            "arch_optimizer": torch.optim.Adam(structure, arch_lr, weight_decay=1e-3 * as_paper),
            "warmup_epochs": round(epochs / 5) if warmup_epochs is None else warmup_epochs,
            "keep_from": int(0.6 * epochs)}


def write_picture(folder: Path, design: Design, supernet: SuperNet, rows: list[dict] | None) -> list[str]:
    """Draw the found network into network.svg; returns the names of the files."""
    from files import write_file

    write_file(Path(folder) / "network.svg", lambda temporary: temporary.write_text(draw_network(design)))
    return ["network.svg"]


# --- The paper's tables, which reproduce.py makes ----------------------------------------------------------

PAPER_SCALES = {  # flags by scale; one network serves three noise levels, where the paper trains three
    "full": {"search": "--epochs 100 --optimizer sgd --lr 0.025",
             "train": "--optimizer sgd --lr 0.05 --crops 8 --epochs 4000"},
    "small": {"data": "--size 48 --batch-size 4 --crops 4", "train": "--epochs 12", "val": 6,
              "search": "--width 8 --search-width 4 --epochs 8 --warmup-epochs 2 --arch-lr 0.03"},
    "tiny": {"data": "--size 24 --batch-size 4 --crops 1", "train": "--epochs 1", "test": 2,
             "search": "--width 2 --search-width 1 --epochs 1"}}
_AT = ("30/255", "50/255", "70/255")
_DENOISED = ("parameters M", *(f"{name} at {level}" for level in _AT for name in ("PSNR", "SSIM")))
_ENLARGED = ("parameters M", "PSNR dB", "SSIM")


def _paper(columns: tuple[str, ...], *values: float | None) -> dict:
    return {column: value for column, value in zip(columns, values) if value is not None}


PAPER_TABLES = {  # the columns of super-resolution are the paper's for BSD100, x4
    "zhang-1": {
        "title": "Layer-wise sharing of cells (LWAS) and residual learning: denoising", "columns": _DENOISED,
        "paper": "Zhang 2020: table 1", "rows": {
            "neither": {"search": "--one-cell --no-residual",
                        "paper": _paper(_DENOISED, 0.29, 29.13, 0.8356, 26.77, 0.7584, 25.36, 0.6995)},
            "LWAS": {"search": "--no-residual",
                     "paper": _paper(_DENOISED, 0.34, 29.16, 0.8392, 26.82, 0.7647, 25.45, 0.7072)},
            "residual": {"search": "--one-cell",
                         "paper": _paper(_DENOISED, 0.29, 29.22, 0.8420, 26.83, 0.7631, 25.41, 0.7074)},
            "both": {"search": "",
                     "paper": _paper(_DENOISED, 0.34, 29.25, 0.8420, 26.84, 0.7654, 25.46, 0.7076)}},
        "claims": [("both", other, "PSNR at 50/255") for other in ("neither", "LWAS", "residual")]},
    "zhang-2": {
        "title": "Layer-wise sharing of cells (LWAS) and residual learning: super-resolution x4",
        "paper": "Zhang 2020: table 2", "columns": _ENLARGED, "rows": {
            "neither": {"search": "--network sr-x4 --one-cell --no-residual",
                        "paper": _paper(_ENLARGED, None, 26.86, 0.7342)},
            "LWAS": {"search": "--network sr-x4 --no-residual",
                     "paper": _paper(_ENLARGED, None, 27.05, 0.7375)},
            "residual": {"search": "--network sr-x4 --one-cell",
                         "paper": _paper(_ENLARGED, None, 27.31, 0.7455)},
            "both": {"search": "--network sr-x4", "paper": _paper(_ENLARGED, None, 27.35, 0.7467)}},
        "claims": [("both", other, "PSNR dB") for other in ("neither", "LWAS", "residual")]},
    "zhang-3": {
        "title": "Searched widths beside set ones", "paper": "Zhang 2020: table 3", "columns": _DENOISED,
        "rows": {
            "searched": {"search": "", "paper": _paper(_DENOISED, 0.34, 29.25, 0.8420)},
            "all 40": {"search": "--network denoise-w40", "paper": _paper(_DENOISED, 0.57, 29.14, 0.8409)},
            "20, 40, 80": {"search": "--network denoise-wm",
                           "paper": _paper(_DENOISED, 0.75, 29.19, 0.8413)}},
        "claims": [("searched", other, "PSNR at 30/255") for other in ("all 40", "20, 40, 80")]},
    "zhang-4": {
        "title": "The SSIM term of the loss: denoising", "paper": "Zhang 2020: table 4", "columns": _DENOISED,
        "rows": {
            "MSE and SSIM": {"search": "",
                             "paper": _paper(_DENOISED, None, 29.14, 0.8403, 26.77, 0.7635, 25.48, 0.7129)},
            "MSE": {"of": "MSE and SSIM", "train": "--denoising-loss mse",
                    "paper": _paper(_DENOISED, None, 29.03, 0.8254, 26.77, 0.7498, 25.42, 0.6962)}},
        "claims": [("MSE and SSIM", "MSE", f"{name} at 30/255") for name in ("PSNR", "SSIM")]},
    "zhang-5": {
        "title": "The SSIM term of the loss: super-resolution x4", "paper": "Zhang 2020: table 5",
        "columns": _ENLARGED, "rows": {
            "MSE and SSIM": {"search": "--network sr-x4", "paper": _paper(_ENLARGED, None, 27.35, 0.7467)},
            "MSE": {"of": "MSE and SSIM", "train": "--denoising-loss mse",
                    "paper": _paper(_ENLARGED, None, 27.38, 0.7367)}},
        "claims": [("MSE and SSIM", "MSE", "SSIM"), ("MSE", "MSE and SSIM", "PSNR dB")]},
    "zhang-6": {
        "title": "The found cells, other convolutions (R1), other edges (R2): denoising",
        "paper": "Zhang 2020: table 6", "columns": _DENOISED, "rows": {
            "found": {"search": "", "paper": _paper(_DENOISED, None, 29.25, 0.8420)},
            "R1": {"of": "found", "change": "R1", "paper": _paper(_DENOISED, None, 29.21, 0.8418)},
            "R2": {"of": "found", "change": "R2", "paper": _paper(_DENOISED, None, 29.12, 0.8304)},
            "random cells (ours)": {"of": "found", "change": "random"}},
        "claims": [("found", other, "PSNR at 30/255") for other in ("R1", "R2", "random cells (ours)")]},
    "zhang-7": {
        "title": "The found cells, other convolutions (R1), other edges (R2): super-resolution x4",
        "paper": "Zhang 2020: table 7", "columns": _ENLARGED, "rows": {
            "found": {"search": "--network sr-x4", "paper": _paper(_ENLARGED, None, 27.35, 0.7467)},
            "R1": {"of": "found", "change": "R1", "paper": _paper(_ENLARGED, None, 27.34, 0.7458)},
            "R2": {"of": "found", "change": "R2", "paper": _paper(_ENLARGED, None, 27.13, 0.7312)},
            "random cells (ours)": {"of": "found", "change": "random"}},
        "claims": [("found", other, "PSNR dB") for other in ("R1", "R2", "random cells (ours)")]}}


# --- Designs to compare a found one with (section 4.2.4), its picture, and the command --------------------
def perturb(design: Design, strength: str, rng: random.Random) -> Design:
    """A design with two changes: "R1", two other convolutions; "R2", two edges from elsewhere (tables 6, 7).

    The paper shows them in pictures only: two, drawn uniformly, is our choice. ValueError if there are fewer.
    """
    edges = design.edges()
    if strength == "R1":
        places = [place for place, edge in edges.items() if edge.operation != "skip"]
    else:  # node 0 takes both of its sources; of any other node one edge can move
        places = [place for place in edges if place[1] > 0]
    if strength not in ("R1", "R2") or len({place[:3 if strength == "R1" else 2] for place in places}) < 2:
        raise ValueError(f"The design has too few convolutions or nodes to be perturbed by {strength}.")
    chosen = rng.sample(places, 2)
    while strength == "R2" and chosen[0][:2] == chosen[1][:2]:
        chosen = rng.sample(places, 2)
    for number, node, place in chosen:
        source, operation = edges[number, node, place]
        if strength == "R1":
            operation = rng.choice([name for name in OPERATIONS if name not in (operation, "skip")])
        else:
            taken = [edge.source for edge in design.cells[number][node]]
            source = rng.choice([other for other in range(node + 2) if other not in taken])
        edges[number, node, place] = Edge(source, operation)
    return design.with_edges(edges)


def random_cells(design: Design, rng: random.Random, tolerance: float = 0.05) -> Design:
    """Random cells of the same widths, with as many parameters as the design within `tolerance`.

    Single operations are drawn again until that is so; ValueError where it never is.
    """
    drawn = replace(design, cells=tuple(random_nodes(design.nodes, rng) for _ in design.cells))
    edges, target = drawn.edges(), count_parameters(build, design)
    off = count_parameters(build, drawn) - target
    sizes = {(name, width): count_parameters(OPERATIONS[name], width, True)
             for name, width in itertools.product(OPERATIONS, design.widths)}
    for _ in range(20000):
        if abs(off) <= tolerance * target:
            return drawn.with_edges(edges)
        place, name = rng.choice(list(edges)), rng.choice(tuple(OPERATIONS))
        width, edge = design.widths[place[0]], edges[place]
        change = sizes[name, width] - sizes[edge.operation, width]
        if abs(off + change) < abs(off):
            edges[place], off = Edge(edge.source, name), off + change
    raise ValueError(f"No random cells with {target} parameters within {tolerance:.0%} were found.")


def draw_network(design: Design) -> str:
    """A network as SVG text: of each layer a bar as long as its width, and its cell as a graph of dots and
    arcs, which are as high as they are long, so no names overlap."""
    xs, y, body = [80 + 96 * column for column in range(max(design.nodes + 2, 5))], 28, []

    def text(kind, x, y, words):
        body.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>')

    text("title", 20, y, f"HiNAS: {design.task} x{design.scale}, {design.channels} channels, base width "
                         f"{design.base_width}")
    names = ["stem", "stem", *(f"layer {number}" for number in range(len(design.cells)))]
    for number, (width, nodes) in enumerate(zip(design.widths, design.cells)):
        text("title", 20, y + 36, f"layer {number}: width {width}")
        body.append(f'<rect x="150" y="{y + 26}" width="{4 * width}" height="12"/>')
        arcs = [(edge.source, index + 2, edge.operation) for index, node in enumerate(nodes) for edge in node]
        y += 70 + 30 * max(end - start for start, end, _ in arcs)  # of the dots
        for start, end, _ in arcs:
            left, right, peak = xs[start] + 5, xs[end] - 5, y - 6 - 40 * (end - start)  # of its handles
            body.append(f'<path d="M{left} {y - 6} C{left} {peak} {right} {peak} {right} {y - 6}"/>')
        for start, end, operation in arcs:  # over all arcs
            text("name", (xs[start] + xs[end]) / 2, y - 2 - 30 * (end - start), operation)
        for x, name in zip(xs, (names[number + 1], names[number], *(f"node {n}" for n in range(len(nodes))))):
            body.append(f'<circle cx="{x}" cy="{y}" r="6"/>')
            text("dot", x, y + 24, name)
        y += 24
    style = ("text{font:12px sans-serif;text-anchor:middle} .title{text-anchor:start;font-weight:bold} "
             "path{fill:none;stroke:#47a} circle,rect{fill:#47a} .name{stroke:#fff;stroke-width:5px;"
             "paint-order:stroke}")
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" width="{xs[-1] + 60}" height="{y + 20}">',
                      f"<style>{style}</style>", *body, "</svg>", ""])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hinas.py", usage="python hinas.py [options]",
        epilog="examples: python hinas.py; python hinas.py --arch runs/hinas/arch.json --output network.svg; "
               "python hinas.py --change random --seed 1 --output random.json",
        description="Draw a found network, or make another one out of it to compare it with.")
    parser.add_argument("--arch", default="runs/search/arch.json", metavar="FILE",
                        help="record of the network, from search.py --model hinas (default: %(default)s)")
    parser.add_argument("--change", choices=("R1", "R2", "random"),
                        help="write a changed network: R1, two other convolutions; R2, two edges from "
                             "elsewhere (our reading of tables 6 and 7); random, other cells of about the "
                             "same size (default: draw the network)")
    parser.add_argument("--output", metavar="FILE",
                        help="picture or record to write (default of a picture: network.svg)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of a change (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    output, rng = args.output or "network.svg", random.Random(args.seed or 0)  # "--seed=--" gives []
    if args.output is None and args.change:
        parser.error("name the record to write with --output FILE.")
    try:
        import files

        record = files.load_record(args.arch)
        if record["method"] != "hinas":
            raise ValueError(f"{args.arch} is of {record['method']}; run: python search.py --model hinas")
        design = design_of(record)
        if args.change is None:
            files.write_file(output, lambda temporary: temporary.write_text(draw_network(design)))
        else:
            new = random_cells(design, rng) if args.change == "random" else perturb(design, args.change, rng)
            kept = {x: value for x, value in record.items()
                    if x not in ("latency", "macs", "decisions", "weights")}
            files.write_json(output, kept | record_content(new) | {
                "made": files.provenance("none", args.seed), "parameters": count_parameters(build, new)})
            print(f"{count_parameters(build, design):,} parameters before, "
                  f"{count_parameters(build, new):,} after")
    except ImportError as error:
        parser.error(f"to read records, files.py and registry.py must lie beside hinas.py ({error}).")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
