"""HiNAS: restoration networks (denoising, super-resolution) whose cells and widths are found by gradient descent.

    supernet = SuperNet(Space())                     # train weight_parameters() and arch_parameters() in turn
    image, _ = build(supernet.derive())(torch.rand(1, 1, 64, 64))

    python search.py --model hinas --data photos                          # searches; see search.py --help
    python hinas.py --arch runs/search/arch.json --output network.svg     # a picture of what was found
    python hinas.py --arch runs/search/arch.json --change R1 --output r1/arch.json

Zhang, Li, Gong, Chen, Bai and Shen, "Memory-Efficient Hierarchical Neural Architecture Search for Image Restoration", 2020.
Where the paper is silent a docstring says so, and what is done here. This file needs torch only and works when copied alone
(its command line reads records, and needs models.py).
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

TASKS = {"denoise": (3, 4), "sr": (2, 3)}  # task -> layers, nodes of a cell (section 4.1)
SCALES = {"denoise": (1,), "sr": (2, 3, 4)}
WIDTH_FACTORS = (1.0, 1.5, 2.0)  # gamma of eq. 4. The text says 2^i too; the authors' code and parameter counts have these
WIDTHS = {"searched": None, "w40": (2.0, 2.0, 2.0), "wm": (1.0, 2.0, 4.0)}  # HiNAS-ws, -w40 (40, 40, 40), -wm (20, 40, 80)
SEARCH_WIDTH, FOUND_WIDTH = 10, 20  # base width W of the supernet, and of the network that is found
STEM_CHANNELS, HIGH_CHANNELS, LOW_CHANNELS = 64, 128, 48


class Output(NamedTuple):
    """What every network returns: `image` (B, C, scale * H, scale * W); there are no logits."""

    image: Tensor
    logits: Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------
# Operations (section 3.1)


def conv(in_channels: int, channels: int, kernel_size: int, affine: bool = True, dilation: int = 1) -> nn.Sequential:
    """LeakyReLU(0.2), convolution without bias, batch norm: (B, in_channels, H, W) -> (B, channels, H, W).

    `affine`: scale and shift in the norm, in the final network only. Zeros at the border (the paper does not say).
    """
    return nn.Sequential(
        nn.LeakyReLU(0.2),
        nn.Conv2d(in_channels, channels, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation, bias=False),
        nn.BatchNorm2d(channels, affine=affine))


def separable(in_channels: int, channels: int, kernel_size: int, affine: bool = True) -> nn.Sequential:
    """The same with a depthwise and a 1x1 convolution in place of the convolution."""
    return nn.Sequential(
        nn.LeakyReLU(0.2),
        nn.Conv2d(in_channels, in_channels, kernel_size, padding=kernel_size // 2, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine))


def separable_twice(channels: int, kernel_size: int, affine: bool) -> nn.Sequential:
    return nn.Sequential(*(separable(channels, channels, kernel_size, affine) for _ in range(2)))


# One entry per operation: name -> function of (channels, affine) that makes it. The seventh is "none": it returns zero, so
# that there is nothing to compute, and a found network never has it.
OPERATIONS = {
    "conv3": lambda channels, affine: conv(channels, channels, 3, affine),
    "sep3": lambda channels, affine: separable_twice(channels, 3, affine),
    "sep5": lambda channels, affine: separable_twice(channels, 5, affine),
    "dil3": lambda channels, affine: conv(channels, channels, 3, affine, dilation=2),
    "dil5": lambda channels, affine: conv(channels, channels, 5, affine, dilation=2),
    "skip": lambda channels, affine: nn.Identity(),
}
CHOICES = (*OPERATIONS, "none")  # in the order of alpha's last dimension


def edges_of(node: int) -> slice:
    """The rows of alpha that hold the edges into a node: from the two inputs of the cell, then from each node before it."""
    start = node * (node + 3) // 2
    return slice(start, start + node + 2)


# ---------------------------------------------------------------------------------------------------------------
# The found network


class Part(NamedTuple):
    """One timed part of a network: an operation of a cell, or a 1x1 convolution ("pointwise") between widths.

    All maps have the size of the input, so that these three fields are all that its work depends on.
    """

    operation: str
    in_channels: int
    out_channels: int


class Cell(nn.Module):
    """A found cell: two 1x1 convolutions, then nodes that add two operations each; the nodes are concatenated (eq. 3).

    forward: outputs (B, first, H, W) of the layer before and (B, second, H, W) of the one before that
    -> (B, nodes * width, H, W).
    """

    def __init__(self, layer: Layer, first: int, second: int):
        super().__init__()
        self.layer, self.in_channels = layer, (first, second)
        self.inputs = nn.ModuleList(conv(channels, layer.width, 1) for channels in (first, second))
        self.nodes = nn.ModuleList(nn.ModuleList(OPERATIONS[edge.operation](layer.width, True) for edge in node)
                                   for node in layer.nodes)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        states = [self.inputs[0](first), self.inputs[1](second)]  # (B, width, H, W) each
        for node, edges in zip(self.nodes, self.layer.nodes):
            states.append(sum(operation(states[edge.source]) for operation, edge in zip(node, edges)))
        return torch.cat(states[2:], 1)

    def parts(self) -> list[tuple[Part, nn.Module]]:
        """Each searched part with its module."""
        width = self.layer.width
        inputs = [(Part("pointwise", channels, width), module) for channels, module in zip(self.in_channels, self.inputs)]
        return inputs + [(Part(edge.operation, width, width), module)
                         for node, edges in zip(self.nodes, self.layer.nodes) for module, edge in zip(node, edges)]


def enlarge(x: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement with the field's kernel, a = -0.5 (torch has that of MATLAB and Pillow with `antialias` only)."""
    return F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False, antialias=True)


class Frame(nn.Module):
    """What is around the cells (fig. 2 and 4), the same for the supernet and what it finds.

    Start: 3x3 convolution to 64, 3x3 to nodes * base_width channels, as a cell of base width has. End: 1x1 to 128 of the
    last cell ("high"), 1x1 to 48 of the last cell of base width, or of the stem where there is none ("low"), concatenated,
    two separable 3x3 to 128, 3x3 to the image. These sizes are the authors' code's; the paper gives neither them nor the
    norms: here every convolution is an operation as in the cells, but that the first has no activation before it and the
    last no norm after it. In residual learning the result is added to the input, or to its bicubic enlargement (section 3.3).
    """

    denoises, classifies = True, False

    def __init__(self, plan: Design | Space, base_width: int, affine: bool):
        super().__init__()
        self.channels, self.scale, self.residual = plan.channels, plan.scale, plan.residual
        width = plan.nodes * base_width
        self.stem = nn.Sequential(*conv(self.channels, STEM_CHANNELS, 3, affine)[1:], conv(STEM_CHANNELS, width, 3, affine))
        self.low = conv(width, LOW_CHANNELS, 1, affine)
        self.end = nn.Sequential(
            separable(HIGH_CHANNELS + LOW_CHANNELS, 128, 3, affine), separable(128, 128, 3, affine),
            nn.LeakyReLU(0.2), nn.Conv2d(128, self.channels * self.scale ** 2, 3, padding=1))
        if self.residual:  # what is added begins at zero: from noise of its own making a short search does not come back
            nn.init.zeros_(self.end[-1].weight)
            nn.init.zeros_(self.end[-1].bias)

    def finish(self, x: Tensor, high: Tensor, low: Tensor) -> Output:
        """The image, from the input (B, C, H, W), (B, 128, H, W) and (B, nodes * base_width, H, W)."""
        image = self.end(torch.cat((high, self.low(low)), 1))  # (B, C * scale^2, H, W)
        image = F.pixel_shuffle(image, self.scale)  # (B, C, scale * H, scale * W)
        if not self.residual:
            return Output(image)
        enlarged = x if self.scale == 1 else enlarge(x, self.scale)
        return Output(enlarged + image)


class HinasNetwork(Frame):
    """The network of a `Design`.

    forward: (B, C, H, W), clean images in [0, 1] plus noise, or small images, any H and W -> Output(image (B, C, scale * H,
    scale * W)), not clamped. Layer 0 takes the stem twice, layer 1 layer 0 and the stem.
    """

    def __init__(self, design: Design):
        super().__init__(design, design.base_width, affine=True)
        self.design = design
        channels = [design.nodes * design.base_width] * 2
        self.cells = nn.ModuleList()
        for layer in design.layers:
            self.cells.append(Cell(layer, channels[-1], channels[-2]))
            channels.append(design.nodes * layer.width)
        self.high = conv(channels[-1], HIGH_CHANNELS, 1)

    def forward(self, x: Tensor) -> Output:
        second = first = low = self.stem(x)
        for cell in self.cells:
            first, second = cell(first, second), first  # (B, nodes * width, H, W)
            low = first if cell.layer.width == self.design.base_width else low
        return self.finish(x, self.high(first), low)

    def parts(self) -> list[tuple[Part, nn.Module]]:
        """Each searched part with its module; the rest is stem, `low` and end."""
        last = Part("pointwise", self.design.nodes * self.design.layers[-1].width, HIGH_CHANNELS)
        return [part for cell in self.cells for part in cell.parts()] + [(last, self.high)]


def build(design: Design) -> HinasNetwork:
    """The network of a design with fresh weights."""
    return HinasNetwork(design)


# ---------------------------------------------------------------------------------------------------------------
# The supernet


def weighted(weights: Tensor, features: list[Tensor]) -> Tensor:
    """Sum of weights (n,) times n features of one shape."""
    return sum(weight * feature for weight, feature in zip(weights, features, strict=True))


class SuperCell(nn.Module):
    """Every cell of one width: each node adds all operations on all its edges (eq. 1 and 2).

    forward: two inputs (B, width, H, W), and the operations' weights (edges, 7) -> (B, nodes * width, H, W).
    """

    def __init__(self, nodes: int, width: int):
        super().__init__()
        self.nodes = nn.ModuleList(
            nn.ModuleList(nn.ModuleList(make(width, False) for make in OPERATIONS.values()) for _ in range(node + 2))
            for node in range(nodes))  # node, edge, operation

    def forward(self, first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        states = [first, second]
        for index, node in enumerate(self.nodes):
            states.append(sum(weight * operation(state) for edge, state, row in zip(node, states, weights[edges_of(index)])
                              for operation, weight in zip(edge, row)))  # without "none", the last weight
        return torch.cat(states[2:], 1)


class SuperLayer(nn.Module):
    """The cells of a layer, one per width, and the 1x1 convolutions that bring what they take to that width.

    With `share_cells` a cell computes once, on the weighted sum of its inputs (eq. 5); else once with weights of its own for
    each width of the layer before, and the results are summed (eq. 6). forward: the outputs of the two layers before, one
    per width, and their weights `before` and `two_before` (widths there, widths here).
    """

    def __init__(self, space: Space, number: int, base_width: int, share_cells: bool):
        super().__init__()
        self.share_cells, self.recompute = share_cells, False
        widths = space.widths_of(number, base_width)
        self.sources = [[space.sources(number, index, back) for index in range(len(widths))] for back in (1, 2)]
        self.inputs = nn.ModuleList()  # one or two layers before, width here, width there
        for back, sources in zip((1, 2), self.sources):
            earlier = space.widths_of(max(number - back, -1), base_width)
            self.inputs.append(nn.ModuleList(
                nn.ModuleList(conv(space.nodes * earlier[source], width, 1, affine=False) for source in row)
                for width, row in zip(widths, sources)))
        self.cells = nn.ModuleList(  # width here; and width there, where they are not shared
            nn.ModuleList(SuperCell(space.nodes, width) for _ in (row[:1] if share_cells else row))
            for width, row in zip(widths, self.sources[0]))

    def forward(self, first: list[Tensor], second: list[Tensor], before: Tensor, two_before: Tensor,
                weights: Tensor) -> list[Tensor]:
        outputs = []
        for index, cells in enumerate(self.cells):
            here, there = self.sources[0][index], self.sources[1][index]
            ones = [convolution(first[source]) for source, convolution in zip(here, self.inputs[0][index])]
            twos = [convolution(second[source]) for source, convolution in zip(there, self.inputs[1][index])]
            two = weighted(two_before[there, index], twos)  # (B, width, H, W)
            if self.share_cells:
                outputs.append(self._run(cells[0], weighted(before[here, index], ones), two, weights))
            else:
                found = [self._run(cell, one, two, weights) for cell, one in zip(cells, ones)]
                outputs.append(weighted(before[here, index], found))  # (B, nodes * width, H, W)
        return outputs

    def _run(self, cell: nn.Module, *inputs: Tensor) -> Tensor:
        return recomputed(cell, *inputs, use_reentrant=False) if self.recompute else cell(*inputs)


class SuperNet(Frame):
    """Every network of a space at once: weights, and the logits `alpha` (layers, edges, 7) and `beta` (layers, 3, 3).

    softmax(alpha) weighs the operations of an edge; `layerwise=False` has one alpha (1, edges, 7) for all layers (LWAS,
    table 1). softmax(beta[layer, width before]) is the probability of each width of a layer, given the one of the layer
    before: a step narrower, the same, or a step wider, from width 0 in the stem, so that layer 0 has two. The rest of beta
    is not used; widths that the space fixes have none.

    forward: like the network that is found. `recompute` forgets what cells computed and computes it again in the backward
    pass: less memory, more time, the same gradients (running statistics of the norms move twice per step).

    The paper's eq. 5 leaves open how beta is normalised, and takes the second input from a cell of the same width two
    layers before, which a path need not have. Here beta says how likely each path of widths is, and a cell's inputs, the
    end's, and the expected cost are weighted with what follows from it: the first input by P(width of the layer before |
    this width), the second by P(width two layers before | this width). The end adds the 1x1 convolutions of the last
    layer's widths by P(width), where the paper concatenates. So a decided supernet is exactly what it exports.

    Sharing saves a factor of 3 (section 3.2) where a cell has three widths before it. In the paper's denoising supernet
    most have one or two: 8 cells stand for 14, and the middle part keeps 0.59 of the memory.
    """

    def __init__(self, space: Space, base_width: int = SEARCH_WIDTH, share_cells: bool = True, layerwise: bool = True,
                 recompute: bool = False):
        super().__init__(space, base_width, affine=False)
        self.space, self.base_width, self.layerwise = space, base_width, layerwise
        self.layers = nn.ModuleList(SuperLayer(space, number, base_width, share_cells) for number in range(space.layers))
        for layer in self.layers:
            layer.recompute = recompute
        self.high = nn.ModuleList(conv(space.nodes * width, HIGH_CHANNELS, 1, affine=False)
                                  for width in space.widths_of(space.layers - 1, base_width))
        edges = edges_of(space.nodes).start
        self.alpha = nn.Parameter(torch.zeros(space.layers if layerwise else 1, edges, len(CHOICES)))
        self.beta = nn.Parameter(torch.zeros(space.layers, 3, 3)) if space.widths is None else None

    def weight_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if name not in ("alpha", "beta")]

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alpha] if self.beta is None else [self.alpha, self.beta]

    def log_steps(self) -> list[Tensor]:
        """Per layer: log P(width | width of the layer before), (widths there, widths here); -inf where there is no step."""
        if self.beta is None:
            return [self.alpha.new_zeros(1, 1)] * self.space.layers
        steps = []
        for number, beta in enumerate(self.beta):
            there, here = (len(self.space.factors(n)) for n in (number - 1, number))
            index = torch.arange(3, device=beta.device)
            apart = (index[:, None] - index).abs()[:there, :here] > 1
            steps.append(beta[:there, :here].masked_fill(apart, -math.inf).log_softmax(1))
        return steps

    def chain(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per layer: P(width), P(width of the layer before | width), P(width two layers before | width).

        The second and third are (widths there, widths here); columns sum to 1.
        """
        log_p, p, before, two_before = self.alpha.new_zeros(1), [], [], []
        for step in self.log_steps():
            joint = log_p[:, None] + step
            log_p = joint.logsumexp(0)
            p.append(log_p.exp())
            before.append(joint.softmax(0))
            two_before.append(before[-2] @ before[-1] if len(before) > 1 else before[-1])  # layer 0: the stem twice
        return p, before, two_before

    def forward(self, x: Tensor) -> Output:
        features, low, p = self.middle(self.stem(x))
        high = weighted(p, [convolution(feature) for convolution, feature in zip(self.high, features)])
        return self.finish(x, high, low)

    def middle(self, stem: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The layers: from the stem's output to the last layer's, one per width, the `low` feature, and P(width)."""
        second = first = low = [stem]  # low: the last feature of base width on the way to each width
        p, before, two_before = self.chain()
        for number, layer in enumerate(self.layers):
            weights = F.softmax(self._alpha(number), 1)
            first, second = layer(first, second, before[number], two_before[number], weights), first
            widths = self.space.widths_of(number, self.base_width)
            low = [feature if width == self.base_width
                   else weighted(before[number][sources, index], [low[source] for source in sources])
                   for index, (feature, width, sources) in enumerate(zip(first, widths, layer.sources[0]))]
        return first, weighted(p[-1], low), p[-1]

    def _alpha(self, number: int) -> Tensor:
        return self.alpha[number if self.layerwise else 0]

    def _alike(self, number: int) -> list[int]:
        """The layers whose cells have the operations of a layer's."""
        return [number] if self.layerwise else list(range(self.space.layers))

    def entropy(self) -> Tensor:
        """Entropy of each searched decision divided by its maximum: 1 undecided, 0 decided. Operations, then widths."""
        log_p = F.log_softmax(self.alpha.detach(), 2).flatten(0, 1)
        values = [-(log_p.exp() * log_p).sum(1) / math.log(len(CHOICES))]
        if self.beta is not None:
            for step in self.log_steps():
                p = step.detach().exp()
                values.append(torch.special.entr(p).sum(1) / (step > -math.inf).sum(1).log())
        return torch.cat(values)

    def expected_cost(self, costs: dict[Part, float], rest: float = 0.0) -> Tensor:
        """The cost of the found network (of the space's base width) to expect, in the unit of `costs`; differentiable.

        Paths of widths count by their probability. A node keeps a pair of edges with a probability proportional to the
        product of their strengths (see `strengths`), so that two edges count in all and the likeliest pair is the one that
        `derive` takes; a kept edge has operation o with softmax(alpha) over all but "none". Where all is decided this is the
        sum of the found network's parts plus `rest`. The paper has no cost in its search. KeyError where `costs` lacks a
        possible part.
        """
        space, nodes = self.space, self.space.nodes
        p, before, two_before = self.chain()
        total = self.alpha.new_tensor(rest)
        widths = [space.widths_of(number) for number in range(-1, space.layers)]  # [0]: the stem
        for number in range(space.layers):
            kept = self.kept_operations(number)
            for index, width in enumerate(widths[number + 1]):
                operations = kept.new_tensor([costs[Part(name, width, width)] for name in OPERATIONS])
                cost = (kept * operations).sum()
                for back, weights in ((1, before[number]), (2, two_before[number])):
                    earlier = widths[max(number + 1 - back, 0)]
                    for source in space.sources(number, index, back):
                        cost = cost + weights[source, index] * costs[Part("pointwise", nodes * earlier[source], width)]
                if number == space.layers - 1:
                    cost = cost + costs[Part("pointwise", nodes * width, HIGH_CHANNELS)]
                total = total + p[number][index] * cost
        return total

    def kept_operations(self, number: int) -> Tensor:
        """The probability that a layer's cell has an operation on an edge, (edges, 6); two per node in all."""
        alpha = self._alpha(number)
        log_strength, kept = strengths(alpha), []
        for node in range(self.space.nodes):
            rows = log_strength[edges_of(node)]
            pairs = torch.combinations(torch.arange(len(rows), device=rows.device))  # (pairs, 2)
            p = rows[pairs].sum(1).softmax(0)
            kept.append(torch.zeros_like(rows).index_add(0, pairs.flatten(), p.repeat_interleave(2)))
        return torch.cat(kept)[:, None] * F.softmax(alpha[:, :-1], 1)

    def derive(self, base_width: int | None = None) -> Design:
        """The found network's design, of the space's base width unless another is given."""
        path = likeliest_path(self.log_steps())
        base_width = self.space.base_width if base_width is None else base_width
        widths = (self.space.widths_of(number, base_width)[index] for number, index in enumerate(path))
        layers = (Layer(width, strongest_edges(self._alpha(number), self.space.nodes)) for number, width in enumerate(widths))
        return self.space.design(tuple(layers), base_width)

    def cost_range(self, costs: dict[Part, float], rest: float) -> tuple[float, float]:
        """The costs of the cheapest and the dearest network of the space."""
        ends = []
        for best in (min, max):
            totals = []
            for path in self.space.paths():
                widths = [self.space.widths_of(number)[index] for number, index in enumerate(path)]
                names = [best(OPERATIONS, key=lambda name: sum(costs[Part(name, widths[each], widths[each])] for each in alike))
                         for alike in map(self._alike, range(len(widths)))]
                totals.append(self.space.cost(self.space.design(tuple(
                    Layer(width, tuple((Edge(0, name), Edge(1, name)) for _ in range(self.space.nodes)))
                    for width, name in zip(widths, names))), costs, rest))
            ends.append(best(totals))
        return ends[0], ends[1]

    @torch.no_grad()
    def fit(self, costs: dict[Part, float], rest: float, target: float) -> Design:
        """The likeliest network within a target cost: of each path of widths, with operations exchanged until it is met.

        Each exchange is the one that loses the least log probability per cost; where all layers share one alpha, it is made in
        all of them. The cheapest where none is within the target.
        """
        steps, found = self.log_steps(), []
        for path in self.space.paths():
            before, score = 0, 0.0
            for number, index in enumerate(path):
                score, before = score + float(steps[number][before, index]), index
            design = self.space.design(tuple(
                Layer(self.space.widths_of(number)[index], strongest_edges(self._alpha(number), self.space.nodes))
                for number, index in enumerate(path)))
            present = self.space.cost(design, costs, rest)
            while present > target:
                exchanges = []
                for place in _places(design):
                    alike = self._alike(place[0])
                    if place[0] != alike[0]:
                        continue
                    edge, widths = _edge(design, place), [design.layers[layer].width for layer in alike]
                    log_p = F.log_softmax(self._alpha(place[0])[edges_of(place[1]).start + edge.source].detach(), 0).tolist()
                    for number, name in enumerate(OPERATIONS):
                        gain = sum(costs[Part(edge.operation, width, width)] - costs[Part(name, width, width)] for width in widths)
                        if gain > 1e-9:
                            loss = log_p[CHOICES.index(edge.operation)] - log_p[number]
                            exchanges.append((loss / gain, place, name, loss, gain))
                if not exchanges:
                    break
                _, place, name, loss, gain = min(exchanges)
                for layer in self._alike(place[0]):
                    here = (layer, *place[1:])
                    design = _with_edge(design, here, replace(_edge(design, here), operation=name))
                present, score = present - gain, score - loss
            found.append((present <= target, score if present <= target else -present, len(found), design))
        return max(found)[3]

    def found(self, costs: dict[Part, float], rest: float, target: float | None) -> tuple[Design, None]:
        """The likeliest design, within a target cost unless that is None; its network is trained from the beginning."""
        return self.derive() if target is None else self.fit(costs, rest, target), None

    @torch.no_grad()
    def set_design(self, design: Design, logit: float = 30.0) -> None:
        """Make a design of the space all but certain; without layer-wise alpha, its first cell."""
        for number, alpha in enumerate(self.alpha):
            alpha.zero_()[:, -1] = logit
            for node, edges in enumerate(design.layers[number].nodes):
                for edge in edges:
                    row = alpha[edges_of(node).start + edge.source]
                    row[-1], row[CHOICES.index(edge.operation)] = 0.0, logit
        before = 0
        for number, layer in enumerate(design.layers if self.beta is not None else ()):
            index = self.space.widths_of(number).index(layer.width)
            self.beta[number].zero_()
            self.beta[number, before, index], before = logit, index

    def describe(self, design: Design) -> str:
        """A design as a table to read: the two edges of each node, by layer."""
        lines = [f"{'layer':>5} {'width':>5}  {'node':>4}  operation <- source"]
        for number, layer in enumerate(design.layers):
            for index, node in enumerate(layer.nodes):
                names = [("the layer before", "the layer two before", *(f"node {n}" for n in range(index)))[edge.source]
                         for edge in node]
                text = "   ".join(f"{edge.operation:<5} <- {name:<20}" for edge, name in zip(node, names))
                head = f"{number:>5} {layer.width:>5}" if index == 0 else " " * 11
                lines.append(f"{head}  {index:>4}  {text}".rstrip())
        return "\n".join(lines)

    @torch.no_grad()
    def export(self) -> HinasNetwork:
        """The found network at the supernet's own base width, with its weights and running statistics."""
        network = build(self.derive(self.base_width)).to(self.alpha.device, self.alpha.dtype).train(self.training)
        path = [0, *likeliest_path(self.log_steps())]
        for name in ("stem", "low", "end"):
            _copy(getattr(self, name), getattr(network, name))
        _copy(self.high[path[-1]], network.high)
        for number, (layer, cell) in enumerate(zip(self.layers, network.cells)):
            here = path[number + 1]
            places = [sources[here].index(path[max(number + 1 - back, 0)])
                      for back, sources in zip((1, 2), layer.sources)]
            for place, convolutions, target in zip(places, layer.inputs, cell.inputs):
                _copy(convolutions[here][place], target)
            supercell = layer.cells[here][0 if layer.share_cells else places[0]]
            for source, target, edges in zip(supercell.nodes, cell.nodes, cell.layer.nodes):
                for edge, operation in zip(edges, target):
                    _copy(source[edge.source][CHOICES.index(edge.operation)], operation)
        return network


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy what `source` has; the scale and shift of the target's norms stay 1 and 0."""
    target.load_state_dict({**target.state_dict(), **source.state_dict()})


# ---------------------------------------------------------------------------------------------------------------
# Derivation: from alpha and beta to a design


def strengths(alpha: Tensor) -> Tensor:
    """Log probability of the best operation but "none" of each edge: (edges, 7) -> (edges,)."""
    return F.log_softmax(alpha, 1)[:, :-1].amax(1)


def strongest_edges(alpha: Tensor, nodes: int) -> tuple[tuple[Edge, Edge], ...]:
    """Each node's two strongest edges, with their best operation but "none", from alpha (edges, 7) of a layer."""
    strength, best = strengths(alpha.detach()), alpha[:, :-1].argmax(1).tolist()
    found = []
    for node in range(nodes):
        rows = edges_of(node)
        sources = sorted(strength[rows].topk(2).indices.tolist())
        found.append(tuple(Edge(source, CHOICES[best[rows.start + source]]) for source in sources))
    return tuple(found)


@torch.no_grad()
def likeliest_path(log_steps: list[Tensor]) -> list[int]:
    """The path of the largest probability (Viterbi), one width index per layer.

    `log_steps`: per layer the log probability of each width given the one before, (widths there, widths here); the first has
    one row, the stem.
    """
    score, choices = log_steps[0][0], []
    for step in log_steps[1:]:
        score, choice = (score[:, None] + step).max(0)
        choices.append(choice.tolist())
    path = [int(score.argmax())]
    for choice in reversed(choices):
        path.append(choice[path[-1]])
    return path[::-1]


# ---------------------------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Edge:
    """An operation and what it takes: source 0 is the output of the layer before, 1 of the one before it, 2 + i is node i."""

    source: int
    operation: str


@dataclass(frozen=True)
class Layer:
    """A cell: `width` channels per node, and the two edges into each node."""

    width: int
    nodes: tuple[tuple[Edge, Edge], ...]


def _valid(what: str, checks) -> None:
    """ValueError in one sentence for the first of the pairs (condition, message) that does not hold."""
    for condition, message in checks:
        if not condition:
            raise ValueError(f"The {what} is not valid: {message}.")


def _is_whole(value, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _frame_checks(plan: Design | Space):
    """The checks that a design and a space have in common."""
    yield isinstance(plan.task, str) and plan.task in TASKS, f"task must be {' or '.join(TASKS)}"
    scales = SCALES[plan.task]
    yield (_is_whole(plan.scale, 1, 4) and plan.scale in scales,
           f"scale of the task {plan.task} must be {' or '.join(map(str, scales))}")
    yield _is_whole(plan.channels, 1, 3) and plan.channels != 2, "channels must be 1 or 3"
    yield _is_whole(plan.base_width, 1, 1024), "base_width must be a whole number from 1 to 1024"
    yield isinstance(plan.residual, bool), "residual must be true or false"


@dataclass(frozen=True)
class Design:
    """A network, complete. `base_width` is that of the stem (times the nodes); each layer has a width of its own.

    Raises ValueError in one sentence when the values do not make a network.
    """

    task: str
    scale: int
    channels: int
    base_width: int
    residual: bool
    layers: tuple[Layer, ...]

    def __post_init__(self):
        _valid("design", self._checks())

    def _checks(self):
        yield from _frame_checks(self)
        yield isinstance(self.layers, tuple) and 1 <= len(self.layers) <= 64, "it needs 1 to 64 layers"
        for number, layer in enumerate(self.layers):
            where = f"layer {number}"
            yield isinstance(layer, Layer), f"{where} is not a layer"
            yield _is_whole(layer.width, 1, 4096), f"{where}: width must be a whole number from 1 to 4096"
            yield isinstance(layer.nodes, tuple) and 1 <= len(layer.nodes) <= 16, f"{where} needs 1 to 16 nodes"
            yield len(layer.nodes) == self.nodes, f"{where} has {len(layer.nodes)} nodes and layer 0 has {self.nodes}"
            for index, node in enumerate(layer.nodes):
                where = f"layer {number}, node {index}"
                yield (isinstance(node, tuple) and len(node) == 2 and all(isinstance(edge, Edge) for edge in node),
                       f"{where} needs two edges")
                for edge in node:
                    yield (isinstance(edge.operation, str) and edge.operation in OPERATIONS,
                           f"{where}: operation must be one of {', '.join(OPERATIONS)}")
                    yield _is_whole(edge.source, 0, index + 1), f"{where}: source must be from 0 to {index + 1}"
                yield node[0].source < node[1].source, f"{where}: the sources of its edges must ascend"

    @property
    def nodes(self) -> int:
        return len(self.layers[0].nodes)

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dicts, for JSON."""
        layers = [{"width": layer.width, "nodes": [[asdict(edge) for edge in node] for node in layer.nodes]}
                  for layer in self.layers]
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "layers": layers}

    @classmethod
    def from_dict(cls, content: dict) -> Design:
        """The design in what `to_dict` made; ValueError in one sentence when a field is missing, unknown or wrong."""
        layers = []
        for number, entry in enumerate(_list(_named(content, cls, "the whole")["layers"], "layers")):
            entry = _named(entry, Layer, f"layer {number}")
            nodes = []
            for index, node in enumerate(_list(entry["nodes"], f"nodes of layer {number}")):
                where = f"layer {number}, node {index}"
                nodes.append(tuple(Edge(**_named(edge, Edge, f"an edge of {where}")) for edge in _list(node, where)))
            layers.append(Layer(entry["width"], tuple(nodes)))
        return cls(**{**content, "layers": tuple(layers)})


def _named(entry, kind: type, where: str) -> dict:
    """`entry`, if it is a dict with the fields of `kind` and no others."""
    names = [field.name for field in fields(kind)]
    _valid("design", [(isinstance(entry, dict), f"{where} must be an object")])
    missing, unknown = [name for name in names if name not in entry], [str(name) for name in entry if name not in names]
    _valid("design", [(not missing, f"{where} lacks {', '.join(missing)}"),
                      (not unknown, f"{where} has unknown fields: {', '.join(unknown)[:80]}")])
    return entry


def _list(entry, where: str) -> list:
    _valid("design", [(isinstance(entry, list) and len(entry) <= 64, f"{where} must be a list of at most 64")])
    return entry


# ---------------------------------------------------------------------------------------------------------------
# The space: what can be found, and what its latency table must hold


@dataclass(frozen=True)
class Space:
    """What can be found: networks of a task, all of one base width.

    `layers`, `nodes`: None for the paper's, 3 and 4 for denoising, 2 and 3 for super-resolution. `widths`: None for searched
    ones, or one factor of the base width per layer (see WIDTHS). Raises ValueError in one sentence.
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
        _valid("space", _frame_checks(self))
        for name, default in zip(("layers", "nodes"), TASKS[self.task]):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        _valid("space", [
            (_is_whole(self.layers, 1, 64), "layers must be a whole number from 1 to 64"),
            (_is_whole(self.nodes, 1, 16), "nodes must be a whole number from 1 to 16"),
            (self.widths is None or isinstance(self.widths, tuple) and len(self.widths) == self.layers
             and all(isinstance(factor, (int, float)) and 0.1 <= factor <= 16 for factor in self.widths),
             f"widths must be {self.layers} numbers from 0.1 to 16, one per layer")])

    def identity(self) -> dict:
        """What space this is, for the head of a file (JSON)."""
        return {"method": "hinas", **asdict(self), "widths": self.widths and list(self.widths)}

    def factors(self, number: int) -> tuple[float, ...]:
        """The possible widths of a layer, in base widths, narrowest first; layer -1 is the stem."""
        if number < 0:
            return (1.0,)
        return WIDTH_FACTORS[:number + 2] if self.widths is None else (self.widths[number],)

    def widths_of(self, number: int, base_width: int | None = None) -> list[int]:
        """The possible widths of a layer in channels per node, at this base width or the space's own."""
        base_width = self.base_width if base_width is None else base_width
        return [max(1, int(base_width * factor + 0.5)) for factor in self.factors(number)]

    def sources(self, number: int, index: int, back: int = 1) -> list[int]:
        """The widths (indices) that the layer `back` (1 or 2) before may have, where layer `number` has width `index`."""
        if back == 2 and number > 0:
            return sorted({source for middle in self.sources(number, index) for source in self.sources(number - 1, middle)})
        return [source for source in range(len(self.factors(number - 1))) if abs(source - index) <= 1]

    def design(self, layers: tuple[Layer, ...], base_width: int | None = None) -> Design:
        """A design of this space with these layers."""
        return Design(self.task, self.scale, self.channels, self.base_width if base_width is None else base_width,
                      self.residual, layers)

    def random_design(self, rng: random.Random) -> Design:
        """A design drawn from the space: widths step by step, sources and operations, each uniformly."""
        index, layers = 0, []
        for number in range(self.layers):
            index = rng.choice([i for i in range(len(self.factors(number))) if index in self.sources(number, i)])
            layers.append(Layer(self.widths_of(number)[index], random_nodes(self.nodes, rng)))
        return self.design(tuple(layers))

    def possible_parts(self) -> set[Part]:
        """Every part that a network of this space can have."""
        found = set()
        for number in range(self.layers):
            for index, width in enumerate(self.widths_of(number)):
                found |= {Part(name, width, width) for name in OPERATIONS}
                for back in (1, 2):
                    earlier = self.widths_of(max(number - back, -1))
                    found |= {Part("pointwise", self.nodes * earlier[source], width)
                              for source in self.sources(number, index, back)}
        return found | {Part("pointwise", self.nodes * width, HIGH_CHANNELS) for width in self.widths_of(self.layers - 1)}

    def paths(self) -> list[list[int]]:
        """Every path of widths, one index per layer."""
        paths = [[]]
        for number in range(self.layers):
            paths = [[*path, index] for path in paths for index in range(len(self.factors(number)))
                     if (path[-1] if path else 0) in self.sources(number, index)]
        return paths

    def holds(self, design: Design) -> bool:
        """Whether a table of this space knows all parts of a design."""
        return set(parts_of(design)) <= self.possible_parts() and design.channels == self.channels

    def cost(self, design: Design, costs: dict[Part, float], rest: float) -> float:
        """The cost of a design's network from those of its parts and all else."""
        return sum(costs[part] for part in parts_of(design)) + rest

    def carriers(self, rng: random.Random, rounds: int) -> list[Design]:
        """Random designs such that each possible part is in at least `rounds` of them."""
        counts, chosen = Counter({part: 0 for part in self.possible_parts()}), []
        while min(counts.values()) < rounds:
            design = self.random_design(rng)
            parts = set(parts_of(design))
            if any(counts[part] < rounds for part in parts):
                chosen.append(design)
                counts.update(parts)
        return chosen

    def network(self, design: Design) -> HinasNetwork:
        return build(design)

    def parts(self, network: HinasNetwork) -> list[tuple[Part, nn.Module]]:
        """Each searched part of a network with its module; what is not in one of them is the rest."""
        return network.parts()


PRESETS = {
    "denoise": Space(),
    "denoise-w40": Space(widths=WIDTHS["w40"]),  # table 3
    "denoise-wm": Space(widths=WIDTHS["wm"]),
    "sr-x2": Space("sr", 2), "sr-x3": Space("sr", 3), "sr-x4": Space("sr", 4),
}


@lru_cache(maxsize=1024)
def parts_of(design: Design) -> tuple[Part, ...]:
    """The searched parts of a design's network, in its order."""
    with torch.device("meta"):  # shapes only
        return tuple(part for part, _ in build(design).parts())


def random_nodes(nodes: int, rng: random.Random) -> tuple[tuple[Edge, Edge], ...]:
    """The edges of a cell: two sources per node and their operations, uniformly."""
    return tuple(tuple(Edge(source, rng.choice(tuple(OPERATIONS))) for source in sorted(rng.sample(range(node + 2), 2)))
                 for node in range(nodes))


# ---------------------------------------------------------------------------------------------------------------
# Designs to compare a found one with (section 4.2.4)


def perturb(design: Design, strength: str, rng: random.Random) -> Design:
    """A found design with two changes of the kind "R1" or "R2" (section 4.2.4, tables 6 and 7).

    R1: two convolutions become others. R2: two edges start elsewhere. The paper shows its changes in pictures only; here they are
    drawn, uniformly, and two is our choice. ValueError where a design has no such change.
    """
    if strength not in ("R1", "R2"):
        raise ValueError(f"There is no perturbation {strength!r}; possible: R1, R2.")
    # Node 0 has two sources and takes both; of any other node one edge can move.
    places = [place for place in _places(design)
              if (_edge(design, place).operation != "skip" if strength == "R1" else place[1] > 0)]
    if len({place[:2] for place in places} if strength == "R2" else places) < 2:
        raise ValueError("The design has too few convolutions or nodes to be perturbed.")
    changed = rng.sample(places, 2)
    while strength == "R2" and changed[0][:2] == changed[1][:2]:
        changed = rng.sample(places, 2)
    for place in changed:
        edge = _edge(design, place)
        if strength == "R1":
            others = [name for name in OPERATIONS if name not in (edge.operation, "skip")]
            design = _with_edge(design, place, replace(edge, operation=rng.choice(others)))
        else:
            layer, node, _ = place
            taken = {other.source for other in design.layers[layer].nodes[node]}
            free = [source for source in range(node + 2) if source not in taken]
            design = _with_edge(design, place, replace(edge, source=rng.choice(free)))
    return design


def _places(design: Design) -> list[tuple[int, int, int]]:
    """Where the edges are: layer, node, 0 or 1."""
    return [(layer, node, edge) for layer in range(len(design.layers)) for node in range(design.nodes) for edge in (0, 1)]


def _edge(design: Design, place: tuple[int, int, int]) -> Edge:
    layer, node, edge = place
    return design.layers[layer].nodes[node][edge]


def _with_edge(design: Design, place: tuple[int, int, int], new: Edge) -> Design:
    """The design with another edge at (layer, node, edge); a node's edges stay in the order of their sources."""
    layer, node, edge = place
    layers = list(design.layers)
    nodes = list(layers[layer].nodes)
    nodes[node] = tuple(sorted((new, nodes[node][1 - edge]), key=lambda each: each.source))
    layers[layer] = replace(layers[layer], nodes=tuple(nodes))
    return replace(design, layers=tuple(layers))


def random_cells(design: Design, rng: random.Random, tolerance: float = 0.05) -> Design:
    """Random cells of the same widths, with the design's number of parameters within `tolerance` of it.

    Drawn uniformly; then single operations are drawn again, and kept where the number comes nearer. ValueError where it
    does not come near enough.
    """
    target, places = count_parameters(design), _places(design)
    with torch.device("meta"):  # shapes only
        sizes = {(name, width): sum(parameter.numel() for parameter in make(width, True).parameters())
                 for name, make in OPERATIONS.items() for width in {layer.width for layer in design.layers}}

    def size(design: Design, place: tuple[int, int, int]) -> int:
        return sizes[_edge(design, place).operation, design.layers[place[0]].width]

    drawn = replace(design, layers=tuple(replace(layer, nodes=random_nodes(design.nodes, rng)) for layer in design.layers))
    off = sum(size(drawn, place) - size(design, place) for place in places)
    for _ in range(20000):
        if abs(off) <= tolerance * target:
            return drawn
        place = rng.choice(places)
        other = _with_edge(drawn, place, replace(_edge(drawn, place), operation=rng.choice(tuple(OPERATIONS))))
        change = size(other, place) - size(drawn, place)
        if abs(off + change) < abs(off):
            drawn, off = other, off + change
    raise ValueError(f"No random cells with {target} parameters within {tolerance:.0%} were found.")


def count_parameters(design: Design) -> int:
    """The parameters of a design's network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(design).parameters())


# ---------------------------------------------------------------------------------------------------------------
# Picture


def draw(design: Design) -> str:
    """A picture of a network as SVG text: the path of widths, then each cell as a graph.

    In a cell, the circles are its inputs (the outputs of the two layers before) and its nodes; an arc carries its operation's
    name at its top. The height of an arc is its length, so that no two names share a place.
    """
    pitch, rise, left = 96, 30, 90
    widths = sorted({design.base_width, *(layer.width for layer in design.layers)})
    columns = max(design.nodes + 3, len(design.layers) + 1)
    page_width = left + pitch * (columns - 1) + 90
    body = []

    def text(x, y, words, anchor="middle", more=""):
        body.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{more}>{words}</text>')

    def circle(x, y, words, kind):
        body.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="16"/>')
        text(x, y + 4, words)

    what = "denoising" if design.task == "denoise" else f"super-resolution x{design.scale}"
    text(20, 28, f"HiNAS, {what}, {design.channels} channel{'s' if design.channels > 1 else ''}, base width "
                 f"{design.base_width}{', residual' if design.residual else ''}", "start", ' font-weight="bold"')
    # The path of widths: one column per layer, one row per width.
    top = 64
    rows = {width: top + 36 * row for row, width in enumerate(reversed(widths))}
    for width, y in rows.items():
        text(left - 50, y + 4, f"width {width}")
        body.append(f'<path class="rule" d="M{left - 16} {y} H{page_width - 20}"/>')
    path = [(left + 20 + pitch * number, rows[width])
            for number, width in enumerate((design.base_width, *(layer.width for layer in design.layers)))]
    body.append('<path class="path" d="M' + " L".join(f"{x} {y}" for x, y in path) + '"/>')
    for number, (x, y) in enumerate(path):
        body.append(f'<circle class="dot" cx="{x}" cy="{y}" r="5"/>')
        text(x, top + 36 * len(widths), f"layer {number - 1}" if number else "stem")
    y = top + 36 * len(widths) + 36
    for number, layer in enumerate(design.layers):
        text(20, y, f"layer {number}: width {layer.width}, {design.nodes * layer.width} channels out", "start",
             ' font-weight="bold"')
        spans = [index + 2 - edge.source for index, node in enumerate(layer.nodes) for edge in node]
        base = y + 34 + rise * max(spans)  # the line of circles
        xs = [left + pitch * column for column in range(design.nodes + 3)]  # two inputs, the nodes, the output
        labels = []
        for index, node in enumerate(layer.nodes):
            for edge in node:
                start, end, span = xs[edge.source] + 5, xs[index + 2] - 5, index + 2 - edge.source
                peak = base - 16 - rise * span / 0.75  # a Bezier curve rises to three quarters of its handles
                body.append(f'<path class="edge" d="M{start} {base - 16} C{start} {peak:g} {end} {peak:g} {end} '
                            f'{base - 18}"/>')
                labels.append(((start + end) / 2, base - 12 - rise * span, edge.operation))
        for x, label_y, name in labels:  # over all arcs
            text(x, label_y, name, more=' class="name"')
        names = ["stem" if number < back else f"layer {number - back}" for back in (1, 2)]
        for column, x in enumerate(xs[:-1]):
            circle(x, base, f"in {column + 1}" if column < 2 else str(column - 2), "input" if column < 2 else "node")
            if column < 2:
                text(x, base + 32, names[column])
            else:  # every node goes to the output
                body.append(f'<path class="rule" d="M{x} {base + 16} V{base + 28} H{xs[-1]} V{base + 18}"/>')
        circle(xs[-1], base, "out", "input")
        y = base + 76
    style = ("text{font:12px sans-serif;fill:#222} .edge{fill:none;stroke:#47a;stroke-width:1.5;marker-end:url(#tip)} "
             ".rule{fill:none;stroke:#bbb} .path{fill:none;stroke:#c52;stroke-width:2.5} .dot{fill:#c52} "
             ".input{fill:#eee;stroke:#888} .node{fill:#dcecff;stroke:#47a} "
             ".name{paint-order:stroke;stroke:#fff;stroke-width:5px}")
    tip = ('<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
           '<path d="M0 0 L8 4 L0 8 z" fill="#47a"/></marker>')
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" width="{page_width}" height="{y - 30:g}" '
                      f'viewBox="0 0 {page_width} {y - 30:g}">', f"<style>{style}</style>", f"<defs>{tip}</defs>",
                      '<rect width="100%" height="100%" fill="#fff"/>', *body, "</svg>", ""])


# ---------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hinas.py", usage="python hinas.py [options]",
        description="Draw a found network, or make another one out of it to compare it with.",
        epilog="examples:\n  python hinas.py --arch runs/search/arch.json --output network.svg\n"
               "  python hinas.py --change R2 --output runs/r2/arch.json\n"
               "  python hinas.py --change random --output runs/random/arch.json",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="runs/search/arch.json", metavar="FILE",
                        help="record of the network, from search.py --model hinas (default: %(default)s)")
    parser.add_argument("--change", choices=("R1", "R2", "random"),
                        help="write the record of a changed network: R1, two other convolutions; R2, two edges from elsewhere "
                             "(tables 6 and 7, as we take them); random, other cells of about the same size (default: draw the "
                             "network)")
    parser.add_argument("--output", metavar="FILE", help="picture or record to write (default of a picture: network.svg)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the change (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    import models

    parser = build_parser()
    args = parser.parse_args(argv)
    if args.output is None and args.change:
        parser.error("name the record to write with --output FILE.")
    args.output = args.output or "network.svg"
    try:
        record = models.load_record(args.arch)
        if record["method"] != "hinas":
            raise ValueError(f"{args.arch} is of {record['method']}; search one with: python search.py --model hinas")
        design, rng = Design.from_dict(record["design"]), random.Random(args.seed)
        if args.change is None:
            models.write_file(args.output, lambda temporary: temporary.write_text(draw(design)))
        else:
            changed = random_cells(design, rng) if args.change == "random" else perturb(design, args.change, rng)
            kept = {name: value for name, value in record.items() if name not in ("latency", "parameters", "macs", "decisions")}
            models.write_json(args.output, {**kept, "made": models.provenance("none", args.seed),
                                            "parameters": count_parameters(changed), "design": changed.to_dict()})
            print(f"{count_parameters(design):,} parameters before, {count_parameters(changed):,} after")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
