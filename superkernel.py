"""Superkernels: convolutions that find their own kernel size and number of filters while they are trained.

    python search.py --model superkernel --data photos            # searches a denoising U-Net; see search.py --help

    from superkernel import SuperConv2d                           # in a network of your own, with this file alone:
    layer = SuperConv2d.from_conv(nn.Conv2d(64, 64, 5, padding=2), kernel_sizes=(1, 3, 5), filters=(16, 32, 64))
    ...                                                           # train as ever; every step draws another slice
    plain = layer.distill(same_width=True)                        # an nn.Conv2d with what was found

One maximal kernel is trained, and smaller ones are slices of it: its centre, and some of its filters. Which slice is drawn
from a distribution whose parameters are trained with the weights, by Gumbel softmax and relaxed Bernoulli samples of masks.
The memory is that of the largest network, not of all of them. Reads and writes no files. Needs torch and torchvision only.
Source: Mozejko et al. 2020, Superkernel Neural Architecture Search for Image Denoising (numbers below are its sections).
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

# ---------------------------------------------------------------------------------------------------------------
# Distributions over the slices of a kernel
#
# A slice is a kernel size and a set of filters. What a convolution needs of a sample is one matrix, (K, C): how much of
# kernel size k filter c has. A one-hot sample has ones in one row, at the filters that it keeps.


class Sample:
    """A relaxed sample: Gumbel softmax and relaxed Bernoulli at a temperature (4.5.1). Random numbers are torch's own."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    def softmax(self, logits: Tensor) -> Tensor:
        return F.gumbel_softmax(logits, self.temperature)

    def bernoulli(self, logits: Tensor) -> Tensor:
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        return torch.sigmoid((logits + uniform.log() - (-uniform).log1p()) / self.temperature)


class Mean:
    """The expectation instead of a sample."""

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def bernoulli(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


class Likeliest:
    """The one slice that is kept in the end (4.5.5): the likeliest option, filters of probability above 0.5, at least one.

    The paper keeps filters "if its logit was greater than 0.5"; we take it that a probability was meant.
    """

    def softmax(self, logits: Tensor) -> Tensor:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)

    def bernoulli(self, logits: Tensor) -> Tensor:
        return ((logits > 0) | (torch.arange(len(logits), device=logits.device) == logits.argmax())).to(logits)


class Choice(NamedTuple):
    """A slice: the place of its size among `kernel_sizes`, and the places of its filters, ascending."""

    kernel: int
    kept: tuple[int, ...]


class Structure(nn.Module):
    """A distribution over the slices of a kernel with these sizes and numbers of filters."""

    def __init__(self, kernel_sizes: tuple[int, ...], filters: tuple[int, ...]):
        super().__init__()
        self.kernel_sizes, self.filters = kernel_sizes, filters
        first = torch.arange(filters[-1]) < torch.tensor(filters)[:, None]
        self.register_buffer("first", first.float(), persistent=False)  # (F, C): the first 16, 32, 64 filters

    def weights(self, draw) -> Tensor:
        """How much of kernel size k filter c has, (K, C), by a Sample, Mean or Likeliest."""
        raise NotImplementedError

    def logits(self) -> list[Tensor]:
        """The logits of each softmax, (N,), and of each Bernoulli, (C,), as these are in the structure."""
        raise NotImplementedError

    def options(self, present: Choice) -> list[tuple[Choice, float]]:
        """The slices that are one exchange away from `present`, and how much log probability each exchange costs."""
        raise NotImplementedError

    def choice(self) -> Choice:
        """The likeliest slice."""
        kept = self.weights(Likeliest()) > 0  # (K, C)
        kernel = int(kept.any(1).nonzero()[0])
        return Choice(kernel, tuple(kept[kernel].nonzero()[:, 0].tolist()))

    @torch.no_grad()
    def set_choice(self, choice: Choice, logit: float = 30.0) -> None:
        """Make one slice all but certain; its filters must be ones that this structure can keep."""
        raise NotImplementedError

    def grid(self) -> tuple[int, ...]:
        """The numbers of filters between which costs are interpolated."""
        return self.filters

    def probabilities(self) -> Tensor:
        """The probability of each kernel size with each number of filters of `grid`, (K, G)."""
        raise NotImplementedError


class Joint(Structure):
    """One softmax over pairs of kernel size and number of filters (4.1)."""

    def __init__(self, kernel_sizes, filters):
        super().__init__(kernel_sizes, filters)
        self.theta = nn.Parameter(torch.zeros(len(kernel_sizes), len(filters)))

    def weights(self, draw):
        return draw.softmax(self.theta.flatten()).view_as(self.theta) @ self.first

    def logits(self):
        return [self.theta.flatten()]

    def probabilities(self):
        return self.theta.flatten().softmax(0).view_as(self.theta)

    def options(self, present):
        log_p = self.probabilities().detach().double().clamp(min=1e-300).log()
        here = log_p[present.kernel, self.filters.index(len(present.kept))]
        return [(Choice(k, tuple(range(count))), float(here - log_p[k, f]))
                for k in range(len(self.kernel_sizes)) for f, count in enumerate(self.filters)]

    @torch.no_grad()
    def set_choice(self, choice, logit=30.0):
        self.theta.zero_()
        self.theta[choice.kernel, self.filters.index(len(choice.kept))] = logit


class Factorized(Joint):
    """A softmax over kernel sizes and one over numbers of filters (4.2)."""

    def __init__(self, kernel_sizes, filters):
        Structure.__init__(self, kernel_sizes, filters)
        self.theta_kernel = nn.Parameter(torch.zeros(len(kernel_sizes)))
        self.theta_filters = nn.Parameter(torch.zeros(len(filters)))

    def weights(self, draw):
        return draw.softmax(self.theta_kernel)[:, None] * (draw.softmax(self.theta_filters) @ self.first)

    def logits(self):
        return [self.theta_kernel, self.theta_filters]

    def probabilities(self):
        return self.theta_kernel.softmax(0)[:, None] * self.theta_filters.softmax(0)

    @torch.no_grad()
    def set_choice(self, choice, logit=30.0):
        self.theta_kernel.zero_()[choice.kernel] = logit
        self.theta_filters.zero_()[self.filters.index(len(choice.kept))] = logit


class Filterwise(Structure):
    """A softmax over kernel sizes, and each filter kept or not by a Bernoulli of its own (4.3)."""

    def __init__(self, kernel_sizes, filters):
        super().__init__(kernel_sizes, filters)
        self.theta_kernel = nn.Parameter(torch.zeros(len(kernel_sizes)))
        self.theta_filters = nn.Parameter(torch.zeros(filters[-1]))

    def filter_logits(self) -> Tensor:
        return self.theta_filters

    def weights(self, draw):
        return draw.softmax(self.theta_kernel)[:, None] * draw.bernoulli(self.filter_logits())

    def logits(self):
        return [self.theta_kernel, self.filter_logits()]

    def grid(self):
        return (1, *(count for count in self.filters if count > 1))

    def probabilities(self):
        # The expected number of filters lies between two of the grid: the nearer one has the larger share. What costs are
        # made of, products of kernel areas and channels, is linear in each number, so nothing is lost by this.
        count = self.filter_logits().sigmoid().sum()
        grid = torch.tensor(self.grid(), dtype=count.dtype, device=count.device)
        return self.theta_kernel.softmax(0)[:, None] * interpolate(count, grid)

    def options(self, present):
        log_p = self.theta_kernel.detach().double().log_softmax(0)
        logits = self.filter_logits().detach()
        result = [(Choice(k, present.kept), float(log_p[present.kernel] - log_p[k])) for k in range(len(self.kernel_sizes))]
        if len(present.kept) > 1:
            weakest = min(present.kept, key=lambda c: float(logits[c]))
            result.append((Choice(present.kernel, tuple(c for c in present.kept if c != weakest)), float(logits[weakest])))
        return result

    @torch.no_grad()
    def set_choice(self, choice, logit=30.0):
        self.theta_kernel.zero_()[choice.kernel] = logit
        self.theta_filters.fill_(-logit)[list(choice.kept)] = logit


class FilterwiseAttention(Filterwise):
    """Filterwise, with logits that are averages over all filters, weighted by the likeness of their keys (4.4, eq. 1).

    The paper does not state the length of the keys; here it is 8.
    """

    KEY = 8

    def __init__(self, kernel_sizes, filters):
        super().__init__(kernel_sizes, filters)
        self.keys = nn.Parameter(torch.randn(filters[-1], self.KEY))

    def filter_logits(self):
        return (self.keys @ self.keys.T).softmax(1) @ self.theta_filters

    @torch.no_grad()
    def set_choice(self, choice, logit=30.0):
        super().set_choice(choice, logit)
        # Keys that are far from each other but for those of filters that go together: two groups, two corners.
        corners = torch.where(self.theta_filters[:, None] > 0, 1.0, -1.0)
        self.keys.copy_(corners * self.keys.new_ones(self.KEY))


STRUCTURES = {"joint": Joint, "factorized": Factorized, "filterwise": Filterwise, "attention": FilterwiseAttention}
FORMS = ("full", "separate")


def interpolate(value: Tensor, grid: Tensor) -> Tensor:
    """The shares (G,) of the ascending `grid` values that make up `value`, linearly between two; the ends beyond the grid."""
    if len(grid) == 1:
        return torch.ones_like(grid)
    value = value.clamp(grid[0], grid[-1])
    left = int((value.detach() >= grid[1:-1]).sum())
    share = (value - grid[left]) / (grid[left + 1] - grid[left])
    places = torch.arange(len(grid), device=grid.device)
    return torch.where(places == left, 1 - share, torch.where(places == left + 1, share, torch.zeros_like(share)))


# ---------------------------------------------------------------------------------------------------------------
# The superkernel


class SuperConv2d(nn.Module):
    """A convolution whose kernel size and filters are drawn anew at every step: (B, in, H, W) -> (B, filters[-1], H', W').

    `kernel_sizes` are odd and ascending, `filters` ascending. `activation` follows, if given; it must leave zero at zero, as
    ReLU and PReLU do. `form` "full": one convolution with the kernel times the averaged mask (eq. 4, right side); "separate":
    one for each kernel size, and the average behind the activation (eq. 5, left side; filters that share a kernel size share
    its convolution, which gives the same). Both are the same without an activation.

    The bias of a filter is scaled by how much of the filter is drawn, whatever the kernel size. (The paper averages the
    kernel's mask, by which a 3x3 slice of a 5x5 kernel would have 9/25 of its bias: a one-hot sample would not be the slice.)
    In eval mode, and at `temperature` None, the likeliest slice is computed. Filters that are not kept are zero.
    """

    def __init__(self, in_channels: int, kernel_sizes: tuple[int, ...], filters: tuple[int, ...], structure: str = "joint",
                 form: str = "full", stride: int = 1, bias: bool = True, activation: nn.Module | None = None):
        super().__init__()
        kernel_sizes, filters = tuple(kernel_sizes), tuple(filters)
        for name, values in (("kernel sizes", kernel_sizes), ("numbers of filters", filters)):
            if not values or list(values) != sorted(set(values)) or values[0] < 1:
                raise ValueError(f"The {name} must be positive and ascending, not {values}.")
        if any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"The kernel sizes must be odd, so that they have one centre, not {kernel_sizes}.")
        if structure not in STRUCTURES or form not in FORMS:
            raise ValueError(f"The structure must be one of {', '.join(STRUCTURES)} and the form one of {', '.join(FORMS)}, "
                             f"not {structure!r} and {form!r}.")
        self.kernel_sizes, self.filters, self.form, self.stride = kernel_sizes, filters, form, stride
        largest = nn.Conv2d(in_channels, filters[-1], kernel_sizes[-1], stride, kernel_sizes[-1] // 2, bias=bias)
        self.weight, self.bias = largest.weight, largest.bias
        self.structure = STRUCTURES[structure](kernel_sizes, filters)
        self.activation = activation
        self.temperature: float | None = 1.0
        reach = (torch.arange(kernel_sizes[-1]) - kernel_sizes[-1] // 2).abs()
        reach = torch.maximum(reach[:, None], reach)  # distance from the centre, (k, k)
        inside = reach <= torch.tensor(kernel_sizes)[:, None, None] // 2
        self.register_buffer("inside", inside.float(), persistent=False)  # (K, k, k)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, kernel_sizes: tuple[int, ...], filters: tuple[int, ...] | None = None,
                  **how) -> SuperConv2d:
        """A superkernel in place of a convolution, with its weights. ValueError where it is not one that this can stand for.

        The largest kernel size must be that of `conv`, and the largest number of filters its out_channels (the default:
        only the kernel size is searched). `how`: structure, form, activation.
        """
        filters = filters or (conv.out_channels,)
        size = kernel_sizes[-1]
        if (conv.kernel_size != (size, size) or filters[-1] != conv.out_channels or conv.groups != 1
                or conv.dilation != (1, 1) or conv.stride[0] != conv.stride[1] or conv.padding_mode != "zeros"
                or conv.padding not in ((size // 2,) * 2, "same")):
            raise ValueError(f"A superkernel of sizes {kernel_sizes} and {filters} filters cannot stand for {conv}: it needs one "
                             "group, no dilation, padding of half the kernel with zeros, and the convolution's own size as the "
                             "largest.")
        layer = cls(conv.in_channels, kernel_sizes, filters, stride=conv.stride[0], bias=conv.bias is not None, **how)
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.to(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        draw = Sample(self.temperature) if self.training and self.temperature is not None else Likeliest()
        weights = self.structure.weights(draw).to(self.weight.dtype)  # (K, C)
        if self.form == "full":
            mask = torch.einsum("kc,kij->cij", weights, self.inside)[:, None]  # (C, 1, k, k)
            bias = None if self.bias is None else self.bias * weights.sum(0)
            return self._act(F.conv2d(x, self.weight * mask, bias, self.stride, self.kernel_sizes[-1] // 2))
        parts = []
        for size, share in zip(self.kernel_sizes, weights):
            y = F.conv2d(x, centre(self.weight, size), self.bias, self.stride, size // 2)
            parts.append(share[:, None, None] * self._act(y))
        return sum(parts)

    def _act(self, x: Tensor) -> Tensor:
        return x if self.activation is None else self.activation(x)

    @torch.no_grad()
    def distill(self, choice: Choice | None = None, same_width: bool = False) -> nn.Conv2d:
        """The convolution of a slice, the likeliest unless stated, with copied weights (4.5.5); without the activation.

        It has as many filters as the slice: what follows must lose the inputs of the others (`choice.kept` are those that
        stay). With `same_width` it has all of them, those that are not kept being zero.
        """
        choice = self.structure.choice() if choice is None else choice
        size, kept = self.kernel_sizes[choice.kernel], list(choice.kept)
        conv = nn.Conv2d(self.weight.shape[1], self.filters[-1] if same_width else len(kept), size, self.stride, size // 2,
                         bias=self.bias is not None, device=self.weight.device, dtype=self.weight.dtype)
        for old, new in ((centre(self.weight, size), conv.weight), (self.bias, conv.bias)):
            if old is not None:
                new.zero_()
                new[kept if same_width else slice(None)] = old[kept]
        return conv


def centre(weight: Tensor, size: int) -> Tensor:
    """The middle `size` x `size` of kernels (out, in, k, k)."""
    edge = (weight.shape[-1] - size) // 2
    return weight[..., edge:weight.shape[-1] - edge, edge:weight.shape[-1] - edge]


# ---------------------------------------------------------------------------------------------------------------
# The spaces and what is found in them


class Layer(NamedTuple):
    """One of the two searched convolutions of a block."""

    kernel_size: int
    filters: int


class Part(NamedTuple):
    """What the cost of a convolution in a block depends on. `layer` 1 and 2 are searched, 3 brings the channels back."""

    level: int  # 0: full resolution, 1: half ...
    layer: int
    kernel_size: int
    in_channels: int
    out_channels: int


@dataclass(frozen=True)
class Family:
    """What the networks of a family share: kernel sizes, growth rates (filters per channel of the block), shape."""

    kernel_sizes: tuple[int, ...]
    growths: tuple[float, ...]
    blocks: int  # dense blocks in a row, at each level of the encoder and of the decoder
    doubling: bool  # channels double from level to level, or grow by the base width each
    skipinit: bool  # residual branches begin at zero
    attention: bool  # channel attention in the decoder, and before the end


FAMILIES = {
    "skipinit": Family((3, 5), (0.2, 0.4, 0.6), 2, False, True, False),  # 3.2, 5.2
    "attention": Family((3, 5, 7), (0.25, 0.5, 1.0), 1, True, False, True),  # 3.1, 5.3.1
}


@dataclass(frozen=True)
class Space:
    """A family at a width: the space that is searched.

    `base_width`: channels at full resolution; `levels`: how often it is halved; `subnetworks`: U-Nets side by side
    ("attention"); `channels` of the image: 1, 3, 4 (packed raw) or any.
    """

    family: str = "skipinit"
    base_width: int = 32
    levels: int = 3
    subnetworks: int = 1
    channels: int = 3

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"There is no family {self.family!r}; possible: {', '.join(FAMILIES)}.")
        for name, high in (("base_width", 1024), ("levels", 8), ("subnetworks", 64), ("channels", 1024)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise ValueError(f"{name} must be a whole number from 1 to {high}, not {value!r}.")

    @property
    def rules(self) -> Family:
        return FAMILIES[self.family]

    def block_levels(self) -> list[int]:
        """The level of each dense block, in the order of the network: down, then up, subnetwork by subnetwork."""
        down = list(range(self.levels + 1))
        return [level for level in down + down[-2::-1] for _ in range(self.rules.blocks)] * self.subnetworks

    def channels_at(self, level: int) -> int:
        return self.base_width * 2 ** level if self.rules.doubling else self.base_width * (level + 1)

    def filters_at(self, level: int) -> tuple[int, ...]:
        """The numbers of filters to choose from at a level."""
        return tuple(sorted({max(1, round(growth * self.channels_at(level))) for growth in self.rules.growths}))

    def design(self, choose) -> Design:
        """The design whose layers are choose(kernel sizes, numbers of filters) -> Layer."""
        return Design(self, tuple(tuple(choose(self.rules.kernel_sizes, self.filters_at(level)) for _ in range(2))
                                  for level in self.block_levels()))

    def plain_design(self) -> Design:
        """3x3 kernels and the middle number of filters everywhere: the "no superkernel" of tables 1 to 4, as we take it.

        The paper does not state its baseline; in the attention family this is the network that it modifies (its [26]).
        """
        return self.design(lambda sizes, filters: Layer(sizes[0], filters[len(filters) // 2]))

    def largest_design(self) -> Design:
        return self.design(lambda sizes, filters: Layer(sizes[-1], filters[-1]))

    def random_design(self, rng: random.Random) -> Design:
        return self.design(lambda sizes, filters: Layer(rng.choice(sizes), rng.choice(filters)))

    # What latency.py times: networks that hold all parts, and the parts of a network.

    def identity(self) -> dict:
        """What a table is for, as JSON."""
        return {"method": "superkernel", **asdict(self)}

    def _count_grid(self, level: int) -> tuple[int, ...]:
        return tuple(sorted({1, *self.filters_at(level)}))  # 1: of filterwise structures

    def possible_parts(self) -> set[Part]:
        """Every part that costs are interpolated between."""
        parts = set()
        for level in set(self.block_levels()):
            channels, counts = self.channels_at(level), self._count_grid(level)
            for a in counts:
                parts |= {Part(level, 1, size, channels, a) for size in self.rules.kernel_sizes}
                for b in counts:
                    parts |= {Part(level, 2, size, channels + a, b) for size in self.rules.kernel_sizes}
                    parts.add(Part(level, 3, 3, channels + a + b, channels))
        return parts

    def carriers(self, rng: random.Random, rounds: int) -> list[Design]:
        """Designs that together hold every part `rounds` times or more."""
        decks: dict[int, list] = {}

        def deal(level: int) -> tuple[Layer, Layer]:
            if not decks.get(level):
                counts, sizes = self._count_grid(level), self.rules.kernel_sizes
                # Every second layer comes with every number of filters before it; kernel sizes of the first go round.
                pairs = [(Layer(sizes[(i + j + k) % len(sizes)], a), Layer(size, b)) for i, a in enumerate(counts)
                         for j, b in enumerate(counts) for k, size in enumerate(sizes)]
                decks[level] = rng.sample(pairs, len(pairs))
            return decks[level].pop()

        levels = self.block_levels()
        needed = max(math.ceil(rounds * len(self._count_grid(level)) ** 2 * len(self.rules.kernel_sizes) / levels.count(level))
                     for level in set(levels))
        return [Design(self, tuple(deal(level) for level in levels)) for _ in range(needed)]

    def holds(self, design: Design) -> bool:
        return design.space == self

    def network(self, design: Design) -> ResidualUNet:
        return build(design)

    def parts(self, network: ResidualUNet) -> list[tuple[Part, nn.Module]]:
        """The convolutions of a derived network's blocks."""
        parts = []
        for block, level, layers in zip(network.blocks(), self.block_levels(), network.design.blocks):
            channels = self.channels_at(level)
            for number, (layer, module) in enumerate(zip(layers, block.layers), 1):
                parts.append((Part(level, number, layer.kernel_size, channels, layer.filters), module))
                channels += layer.filters
            parts.append((Part(level, 3, 3, channels, self.channels_at(level)), block.output))
        return parts

    def cost(self, design: Design, costs: dict[Part, float], rest: float) -> float:
        """The cost of a design from those of all parts; numbers of filters between those of `possible_parts` are interpolated."""
        tables, total = CostTables(self, costs), rest
        for level, layers in zip(self.block_levels(), design.blocks):
            total += float(tables.block(level, *(tables.certain(level, layer) for layer in layers)))
        return total


@dataclass(frozen=True)
class Design:
    """A network of a space: the two searched layers of every dense block, in the order of Space.block_levels."""

    space: Space
    blocks: tuple[tuple[Layer, Layer], ...]

    def to_dict(self) -> dict:
        return {**asdict(self.space),
                "blocks": [{"level": level, "layers": [layer._asdict() for layer in layers]}
                           for level, layers in zip(self.space.block_levels(), self.blocks)]}

    @classmethod
    def from_dict(cls, record: dict) -> Design:
        """From a record; ValueError in one sentence when something in it is wrong."""
        try:
            space = Space(**{field.name: record[field.name] for field in fields(Space)})
            levels = space.block_levels()
            if [block["level"] for block in record["blocks"]] != levels:
                raise ValueError(f"its blocks must be at the levels {levels}")
            blocks = tuple(tuple(Layer(**layer) for layer in block["layers"]) for block in record["blocks"])
        except KeyError as error:
            raise ValueError(f"The record is not valid: the field {error} is missing.") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"The record is not valid: {str(error).rstrip('.')}.") from None
        for level, layers in zip(levels, blocks):
            most = space.filters_at(level)[-1]
            if len(layers) != 2 or not all(_is_int(layer.filters) and 1 <= layer.filters <= most and _is_int(layer.kernel_size)
                                           and layer.kernel_size in space.rules.kernel_sizes for layer in layers):
                raise ValueError(f"The record is not valid: a block at level {level} has two layers with kernels of "
                                 f"{space.rules.kernel_sizes} and 1 to {most} filters, not {layers}.")
        return cls(space, blocks)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Networks of the paper; another base width makes one smaller.
PRESETS = {
    "skipinit-1": Space("skipinit", 32, 3),  # model 1 of tables 1 and 2
    "skipinit-2": Space("skipinit", 64, 2),  # model 2
    # Tables 3 and 4. Width and levels are not stated; these are ours.
    **{f"attention-{n}": Space("attention", 32, 3, n) for n in (1, 3, 6)},
}


# ---------------------------------------------------------------------------------------------------------------
# Networks


class Output(NamedTuple):
    """What a network returns. `logits` is None: these networks do not classify."""

    image: Tensor | None
    logits: Tensor | None = None


class DenseBlock(nn.Module):
    """Densely connected residual block (fig. 3 and 4): two searched convolutions, each of which sees all before it, and a 3x3
    that brings the channels back; all with ReLU. With `skipinit` the branch is multiplied by a scalar that begins at zero."""

    def __init__(self, channels: int, layers: list[nn.Module], grown: int, skipinit: bool):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.output = nn.Sequential(nn.Conv2d(channels + grown, channels, 3, padding=1), nn.ReLU())
        self.scale = nn.Parameter(torch.zeros(())) if skipinit else None

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for layer in self.layers:
            features = torch.cat((features, layer(features)), 1)
        branch = self.output(features)
        return x + (branch if self.scale is None else self.scale * branch)


class UNet(nn.Module):
    """One subnetwork (fig. 2): (B, channels, H, W), H and W multiples of 2^levels, -> (B, base_width, H, W).

    Encoder: a 3x3 convolution, of stride 2 below full resolution, with ReLU, then dense blocks. Decoder: a 1x1 convolution
    and a pixel shuffle, the skip beside it, channel attention in the attention family, a 3x3 convolution with ReLU, dense
    blocks. (The paper does not say how channels change beside a strided convolution and a shuffle; this is ours.)
    """

    def __init__(self, space: Space, blocks: list[DenseBlock]):
        super().__init__()
        blocks, count, widths = iter(blocks), space.rules.blocks, [space.channels_at(n) for n in range(space.levels + 1)]

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, 1), nn.ReLU(),
                                 *(next(blocks) for _ in range(count)))

        self.down = nn.ModuleList(stage(source, width, 1 if level == 0 else 2)
                                  for level, (source, width) in enumerate(zip([space.channels, *widths], widths)))
        self.up, self.joined = nn.ModuleList(), nn.ModuleList()
        for below, width in zip(widths[:0:-1], widths[-2::-1]):
            self.up.append(nn.Sequential(nn.Conv2d(below, 4 * width, 1), nn.PixelShuffle(2)))
            attention = [channel_attention(2 * width)] if space.rules.attention else []
            self.joined.append(nn.Sequential(*attention, *stage(2 * width, width, 1)))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for up, joined in zip(self.up, self.joined):
            x = joined(torch.cat((skips.pop(), up(x)), 1))
        return x


def channel_attention(channels: int) -> SqueezeExcitation:
    """The channel attention block of RCAN (the paper's [39]), which squeezes 16 channels into one."""
    return SqueezeExcitation(channels, max(1, channels // 16))


class ResidualUNet(nn.Module):
    """A denoiser: (B, channels, H, W), images in [0, 1] plus noise, any H and W, -> Output(image (B, channels, H, W)).

    `make_layer(in_channels, kernel_sizes, filters, layer)` builds a searched layer with its activation: a superkernel, or
    the convolution of a design.
    """

    denoises, classifies = True, False

    def __init__(self, design: Design, make_layer=None):
        super().__init__()
        self.design, space = design, design.space
        self.channels, self.multiple = space.channels, 2 ** space.levels
        make_layer = make_layer or plain_layer
        blocks = []
        for level, (first, second) in zip(space.block_levels(), design.blocks):
            channels, choices = space.channels_at(level), (space.rules.kernel_sizes, space.filters_at(level))
            blocks.append(DenseBlock(channels, [make_layer(channels, *choices, first),
                                                make_layer(channels + first.filters, *choices, second)],
                                     first.filters + second.filters, space.rules.skipinit))
        each = len(blocks) // space.subnetworks
        self.subnetworks = nn.ModuleList(UNet(space, blocks[n * each:(n + 1) * each]) for n in range(space.subnetworks))
        joined = space.base_width * space.subnetworks
        self.attention = channel_attention(joined) if space.rules.attention else nn.Identity()
        self.image = nn.Conv2d(joined, space.channels, 3, padding=1)

    def blocks(self) -> list[DenseBlock]:
        """The dense blocks in the order of `design.blocks`."""
        return [block for unet in self.subnetworks for stage in (*unet.down, *unet.joined) for block in stage
                if isinstance(block, DenseBlock)]

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        mirrored = bottom < height and right < width  # too small an image is repeated at its border instead
        padded = F.pad(x, (0, right, 0, bottom), mode="reflect" if mirrored else "replicate")
        features = torch.cat([unet(padded) for unet in self.subnetworks], 1)
        residual = self.image(self.attention(features))
        return Output(x + residual[..., :height, :width])


def plain_layer(in_channels: int, kernel_sizes: tuple[int, ...], filters: tuple[int, ...], layer: Layer) -> nn.Sequential:
    """The convolution of a design, with ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, layer.filters, layer.kernel_size, padding=layer.kernel_size // 2), nn.ReLU())


def build(design: Design) -> ResidualUNet:
    """The network of a design with fresh weights."""
    return ResidualUNet(design)


# ---------------------------------------------------------------------------------------------------------------
# The supernet


class SuperNet(nn.Module):
    """The largest network of a space with superkernels in it: every step of training draws another network.

    forward: as ResidualUNet; in eval mode, the likeliest network. `temperature` is that of all samples.
    """

    denoises, classifies = True, False

    def __init__(self, space: Space, structure: str = "joint", form: str = "full"):
        super().__init__()
        self.space, self.channels = space, space.channels
        self.network = ResidualUNet(space.largest_design(), lambda channels, sizes, filters, _: SuperConv2d(
            channels, sizes, filters, structure, form, activation=nn.ReLU()))

    def forward(self, x: Tensor) -> Output:
        return self.network(x)

    def superkernels(self) -> list[SuperConv2d]:
        """Two for each block, in the order of the blocks."""
        return [layer for block in self.network.blocks() for layer in block.layers]

    def set_temperature(self, temperature: float | None) -> None:
        for layer in self.superkernels():
            layer.temperature = temperature

    def arch_parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.superkernels() for parameter in layer.structure.parameters()]

    def weight_parameters(self) -> list[nn.Parameter]:
        structural = {id(parameter) for parameter in self.arch_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in structural]

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """How undecided each superkernel is: the mean over its distributions of entropy / largest possible entropy."""
        return torch.tensor([entropy_of(layer.structure) for layer in self.superkernels()])

    def expected_cost(self, costs: dict[Part, float], rest: float) -> Tensor:
        """The expected cost of the distilled network, differentiable; all slices are drawn independently.

        Exact for joint and factorized structures. For filterwise ones it is the cost at the expected number of filters,
        interpolated: exact for costs that are linear in it, as multiply-accumulates are.
        """
        tables = CostTables(self.space, costs)
        total = torch.as_tensor(float(rest))
        for level, block in zip(self.space.block_levels(), self.network.blocks()):
            total = total + tables.block(level, *(tables.spread(level, layer.structure) for layer in block.layers))
        return total

    def choices(self) -> list[Choice]:
        """The likeliest slice of each superkernel."""
        return [layer.structure.choice() for layer in self.superkernels()]

    def derive(self, choices: list[Choice] | None = None) -> Design:
        """What is found: the design of the likeliest slices, or of those given."""
        layers = [Layer(layer.kernel_sizes[choice.kernel], len(choice.kept))
                  for layer, choice in zip(self.superkernels(), choices or self.choices())]
        return Design(self.space, tuple(zip(layers[::2], layers[1::2])))

    def fit(self, costs: dict[Part, float], rest: float, target: float) -> list[Choice]:
        """The slices of a network within a target cost: the likeliest ones, exchanged until it is met, or none is cheaper.

        Each exchange is the one that loses the least log probability per cost.
        """
        choices, layers, tables = self.choices(), self.superkernels(), CostTables(self.space, costs)
        levels = self.space.block_levels()

        def block_cost(block: int, first: Choice, second: Choice) -> float:
            pair = (Layer(layer.kernel_sizes[choice.kernel], len(choice.kept))
                    for layer, choice in zip(layers[2 * block:2 * block + 2], (first, second)))
            return float(tables.block(levels[block], *(tables.certain(levels[block], layer) for layer in pair)))

        present = [block_cost(block, *choices[2 * block:2 * block + 2]) for block in range(len(levels))]
        exchanges: dict[int, list] = {}  # of each block whose choices have not changed since
        while rest + sum(present) > target:
            for block in range(len(levels)):
                if block in exchanges:
                    continue
                exchanges[block] = []
                pair = choices[2 * block:2 * block + 2]
                for place in range(2):
                    for choice, loss in layers[2 * block + place].structure.options(pair[place]):
                        cost = block_cost(block, *(pair[:place] + [choice] + pair[place + 1:]))
                        if present[block] - cost > 1e-9:
                            exchanges[block].append((loss / (present[block] - cost), block, place, choice, cost))
            best = min((exchange for found in exchanges.values() for exchange in found), default=None)
            if best is None:
                break
            _, block, place, choice, cost = best
            choices[2 * block + place], present[block] = choice, cost
            del exchanges[block]
        return choices

    @torch.no_grad()
    def distill(self, choices: list[Choice] | None = None) -> ResidualUNet:
        """A plain network of the likeliest slices, or of those given, with copied weights: the same outputs (4.5.5)."""
        choices = choices or self.choices()
        network = build(self.derive(choices)).to(next(self.parameters()).device)
        state = self.network.state_dict()
        shared = {name: value for name, value in state.items() if name in network.state_dict()
                  and value.shape == network.state_dict()[name].shape and ".layers." not in name}
        network.load_state_dict(shared, strict=False)
        for number, (source, block) in enumerate(zip(self.network.blocks(), network.blocks())):
            inputs = list(range(block.output[0].out_channels))  # of the next layer, among those of the largest block
            start = len(inputs)
            for layer, choice, target in zip(source.layers, choices[2 * number:], block.layers):
                conv = layer.distill(choice)
                target[0].weight.copy_(conv.weight[:, inputs])
                target[0].bias.copy_(conv.bias)
                inputs += [start + place for place in choice.kept]
                start += layer.filters[-1]
            block.output[0].weight.copy_(source.output[0].weight[:, inputs])
        return network.train(self.training)

    def cost_range(self, costs: dict[Part, float], rest: float) -> tuple[float, float]:
        """The costs of the networks with the smallest and the largest kernels and numbers of filters."""
        fewest = {block[0].filters[-1]: block[0].structure.grid()[0] for block in (b.layers for b in self.network.blocks())}
        least = self.space.design(lambda sizes, filters: Layer(sizes[0], fewest[filters[-1]]))
        return self.space.cost(least, costs, rest), self.space.cost(self.space.largest_design(), costs, rest)

    def found(self, costs: dict[Part, float], rest: float, target: float | None) -> tuple[Design, ResidualUNet]:
        """The likeliest design, within a target cost unless that is None, and its network with copied weights."""
        choices = self.choices() if target is None else self.fit(costs, rest, target)
        return self.derive(choices), self.distill(choices)

    def describe(self, design: Design) -> str:
        """A design as a table to read: kernel size x filters of the two searched layers of each block, by level."""
        lines = [f"{'level':>5} {'channels':>8}   searched layers: kernel size x filters"]
        for level, layers in zip(self.space.block_levels(), design.blocks):
            text = "   ".join(f"{layer.kernel_size}x{layer.kernel_size} x {layer.filters:<4}" for layer in layers)
            lines.append(f"{level:>5} {self.space.channels_at(level):>8}   {text}")
        return "\n".join(lines)

    @torch.no_grad()
    def set_design(self, design: Design, logit: float = 30.0) -> None:
        """Make a design all but certain, the first filters of each superkernel being those that it keeps."""
        for layer, wanted in zip(self.superkernels(), (layer for block in design.blocks for layer in block)):
            choice = Choice(layer.kernel_sizes.index(wanted.kernel_size), tuple(range(wanted.filters)))
            layer.structure.set_choice(choice, logit)


def entropy_of(structure: Structure) -> float:
    """The mean over a structure's distributions of entropy / largest possible entropy: 1 undecided, 0 decided."""
    values = []
    for index, logits in enumerate(structure.logits()):
        if isinstance(structure, Filterwise) and index == 1:
            p = logits.double().sigmoid()
            values.append(float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean() / math.log(2)))
        elif len(logits) > 1:
            p = logits.double().softmax(0)
            values.append(float(-torch.xlogy(p, p).sum() / math.log(len(logits))))
    return sum(values) / len(values) if values else 0.0


class CostTables:
    """The costs of a block's three convolutions as arrays over kernel sizes and numbers of filters, level by level."""

    def __init__(self, space: Space, costs: dict[Part, float]):
        self.space, self.sizes = space, space.rules.kernel_sizes
        self.counts, self.levels = {}, {}
        for level in set(space.block_levels()):
            channels, counts = space.channels_at(level), space._count_grid(level)
            first = [[costs[Part(level, 1, size, channels, a)] for a in counts] for size in self.sizes]
            second = [[[costs[Part(level, 2, size, channels + a, b)] for b in counts] for a in counts] for size in self.sizes]
            third = [[costs[Part(level, 3, 3, channels + a + b, channels)] for b in counts] for a in counts]
            self.counts[level] = torch.tensor(counts, dtype=torch.float32)
            self.levels[level] = tuple(torch.tensor(array, dtype=torch.float32) for array in (first, second, third))

    def block(self, level: int, first: Tensor, second: Tensor) -> Tensor:
        """The expected cost of a block whose layers are distributed as `first` and `second`, each (K, G), independently."""
        one, two, three = self.levels[level]
        before = first.sum(0)  # over the numbers of filters of the first layer
        return ((first * one).sum() + torch.einsum("kb,a,kab->", second, before, two)
                + torch.einsum("a,b,ab->", before, second.sum(0), three))

    def spread(self, level: int, structure: Structure) -> Tensor:
        """A structure's probabilities over all kernel sizes and the level's grid of numbers of filters."""
        p = structure.probabilities().cpu()
        places = [self.counts[level].tolist().index(count) for count in structure.grid()]
        return torch.zeros(len(self.sizes), len(self.counts[level]), dtype=p.dtype).index_add(1, torch.tensor(places), p)

    def certain(self, level: int, layer: Layer) -> Tensor:
        """The same for one layer of a design."""
        shares = interpolate(torch.tensor(float(layer.filters)), self.counts[level])
        return F.one_hot(torch.tensor(self.sizes.index(layer.kernel_size)), len(self.sizes))[:, None] * shares
