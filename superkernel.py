"""Superkernels: convolutions that learn their own kernel size and number of filters while they are trained.

    python search.py --model superkernel --data photos    # searches a denoising U-Net

    from superkernel import SuperConv2d                   # in a network of your own, with this file alone:
    layer = SuperConv2d.from_conv(nn.Conv2d(64, 64, 5, padding=2), (1, 3, 5), filters=(16, 32, 64))
    ...                                                   # train as usual; every step samples another slice
    plain = layer.distill(same_width=True)                # an nn.Conv2d with the likeliest slice

Only the largest kernel is trained; smaller ones are slices of it: its centre, and some of its filters.
Source: Mozejko et al. 2020, Superkernel Neural Architecture Search for Image Denoising; numbers in docstrings
are its sections, equations and tables.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, fields, replace
from itertools import product, starmap
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

# --- Distributions over the slices of a kernel --------------------------------------------------------------


class Slice(NamedTuple):
    """A kernel size and a number of filters, S_{k,f} in the paper."""
    kernel_size: int
    filters: int


def sample(logits: Tensor, temperature: float | None) -> Tensor:
    """A Gumbel softmax sample of (N,) options (4.5.1); at temperature None the likeliest option, one-hot."""
    if temperature is None:
        return F.one_hot(logits.argmax(), len(logits)).to(logits)
    return F.gumbel_softmax(logits, temperature)


def sample_each(logits: Tensor, temperature: float | None) -> Tensor:
    """Relaxed Bernoulli samples (4.5.1); at temperature None those of probability above 0.5, at least one.

    The paper keeps a filter "if its logit was greater than 0.5" (4.5.5); we take it to mean a probability.
    """
    if temperature is None:
        return torch.where(logits > 0, 1.0, sample(logits, None))
    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((logits + uniform.log() - (-uniform).log1p()) / temperature)


class Structure(nn.Module):
    """A distribution over the slices of a kernel with these sizes and numbers of filters. Subclasses have:

    weights(temperature): a sample (K, C), how much of kernel size k filter c has; a slice at temperature None
    probabilities(): of each kernel size with each number of filters of `grid`, (K, G)
    distributions(): the probabilities of each independent choice, (options,) or (filters, options)
    set_choice(kernel_size, kept, logit): makes the slice with these filters almost certain
    """

    def __init__(self, kernel_sizes: tuple[int, ...], filters: tuple[int, ...]):
        super().__init__()
        self.kernel_sizes, self.filters = kernel_sizes, filters
        first = torch.arange(filters[-1]) < torch.tensor(filters)[:, None]
        self.register_buffer("first", first.float(), persistent=False)  # (F, C): the first 16, 32, 64

    def likeliest(self) -> Slice:
        kept = self.weights(None) > 0  # (K, C)
        kernel = int(kept.any(1).nonzero()[0])
        return Slice(self.kernel_sizes[kernel], int(kept[kernel].sum()))

    def kept(self, count: int) -> list[int]:
        """The filters of a slice with `count` of them, ascending."""
        return list(range(count))

    def grid(self) -> tuple[int, ...]:
        """The numbers of filters between which costs are interpolated."""
        return self.filters

    def options(self, present: Slice) -> list[tuple[Slice, float]]:
        """The slices that are one exchange away from `present`, and the log probability that each loses."""
        values = self.probabilities().detach().double().clamp(min=1e-300).log().flatten().tolist()
        log_p = dict(zip(starmap(Slice, product(self.kernel_sizes, self.filters)), values))
        return [(chosen, log_p[present] - value) for chosen, value in log_p.items()]

    @torch.no_grad()
    def entropy(self) -> float:
        """The mean over the distributions of entropy / largest possible entropy: 1 undecided, 0 decided."""
        values = [float(-torch.xlogy(p, p).sum(-1).mean() / math.log(p.shape[-1]))
                  for p in self.distributions() if p.shape[-1] > 1]
        return sum(values) / len(values) if values else 0.0


class Joint(Structure):
    """One softmax over pairs of kernel size and number of filters (4.1)."""

    def __init__(self, kernel_sizes, filters):
        super().__init__(kernel_sizes, filters)
        self.theta = nn.Parameter(torch.zeros(len(kernel_sizes), len(filters)))

    def weights(self, temperature):
        return sample(self.theta.flatten(), temperature).view_as(self.theta) @ self.first

    def probabilities(self):
        return self.theta.flatten().softmax(0).view_as(self.theta)

    def distributions(self):
        return [self.theta.flatten().double().softmax(0)]

    @torch.no_grad()
    def set_choice(self, kernel_size, kept, logit=30.0):
        self.theta.zero_()[self.kernel_sizes.index(kernel_size), self.filters.index(len(kept))] = logit


class Factorized(Structure):
    """A softmax over kernel sizes and one over numbers of filters (4.2)."""

    def __init__(self, kernel_sizes, filters):
        super().__init__(kernel_sizes, filters)
        self.theta_kernel = nn.Parameter(torch.zeros(len(kernel_sizes)))
        self.theta_filters = nn.Parameter(torch.zeros(len(filters)))

    def weights(self, temperature):
        kernels = sample(self.theta_kernel, temperature)
        return kernels[:, None] * (sample(self.theta_filters, temperature) @ self.first)

    def probabilities(self):
        return self.theta_kernel.softmax(0)[:, None] * self.theta_filters.softmax(0)

    def distributions(self):
        return [self.theta_kernel.double().softmax(0), self.theta_filters.double().softmax(0)]

    @torch.no_grad()
    def set_choice(self, kernel_size, kept, logit=30.0):
        self.theta_kernel.zero_()[self.kernel_sizes.index(kernel_size)] = logit
        self.theta_filters.zero_()[self.filters.index(len(kept))] = logit


class Filterwise(Factorized):
    """A softmax over kernel sizes, and each filter kept or not by a Bernoulli of its own (4.3)."""

    def __init__(self, kernel_sizes, filters):
        super().__init__(kernel_sizes, filters)
        self.theta_filters = nn.Parameter(torch.zeros(filters[-1]))

    def filter_logits(self) -> Tensor:
        return self.theta_filters

    def weights(self, temperature):
        kernels = sample(self.theta_kernel, temperature)
        return kernels[:, None] * sample_each(self.filter_logits(), temperature)

    def ranking(self) -> list[int]:
        """The filters of the likeliest slice, then the others, by probability; of equal ones the last."""
        logits = self.filter_logits().detach()
        ranks = zip(sample_each(logits, None).tolist(), logits.tolist(), range(len(logits)))
        return [number for _, _, number in sorted(ranks, reverse=True)]

    def kept(self, count):
        return sorted(self.ranking()[:count])

    def grid(self):
        return (1, *(count for count in self.filters if count > 1))

    def probabilities(self):
        # The expected number of filters lies between two of the grid; the nearer one has the larger share.
        count = self.filter_logits().sigmoid().sum()
        return self.theta_kernel.softmax(0)[:, None] * interpolate(count, count.new_tensor(self.grid()))

    def distributions(self):
        p = self.filter_logits().double().sigmoid()
        return [self.theta_kernel.double().softmax(0), torch.stack((p, 1 - p), 1)]

    def options(self, present):
        size, count = present
        log_p = dict(zip(self.kernel_sizes, self.theta_kernel.detach().double().log_softmax(0).tolist()))
        result = [(Slice(other, count), log_p[size] - value) for other, value in log_p.items()]
        if count > 1:
            result.append((Slice(size, count - 1), self.filter_logits()[self.ranking()[count - 1]].item()))
        return result

    @torch.no_grad()
    def set_choice(self, kernel_size, kept, logit=30.0):
        self.theta_kernel.zero_()[self.kernel_sizes.index(kernel_size)] = logit
        self.theta_filters.fill_(-logit)[list(kept)] = logit


class FilterwiseAttention(Filterwise):
    """Filterwise, with logits averaged over all filters, weighted by the likeness of keys (4.4, eq. 1).

    The paper does not state the length of the keys and how they begin; here 8, from a normal distribution.
    """

    def __init__(self, kernel_sizes, filters):
        super().__init__(kernel_sizes, filters)
        self.keys = nn.Parameter(torch.randn(filters[-1], 8))

    def filter_logits(self):
        return (self.keys @ self.keys.T).softmax(1) @ self.theta_filters

    @torch.no_grad()
    def set_choice(self, kernel_size, kept, logit=30.0):
        super().set_choice(kernel_size, kept, logit)
        self.keys.copy_(self.theta_filters.sign()[:, None].expand_as(self.keys))  # the two groups stay apart


STRUCTURES = {"joint": Joint, "factorized": Factorized, "filterwise": Filterwise,
              "attention": FilterwiseAttention}
FORMS = ("full", "separate")


def interpolate(value: Tensor, grid: Tensor) -> Tensor:
    """The shares (G,) of the ascending `grid` that make up `value`, of two neighbours or one end."""
    if len(grid) == 1:
        return torch.ones_like(grid)
    value = value.clamp(grid[0], grid[-1])
    left = int((value.detach() >= grid[1:-1]).sum())
    share = (value - grid[left]) / (grid[left + 1] - grid[left])
    return F.pad(torch.stack((1 - share, share)), (left, len(grid) - left - 2))


# --- The superkernel ----------------------------------------------------------------------------------------


class SuperConv2d(nn.Module):
    """A convolution that samples another slice in every step: (B, in, H, W) -> (B, filters[-1], H', W').

    `activation` follows; it must leave zero at zero. `form` "full": one convolution with the kernel times the
    averaged mask (eq. 4, right side); "separate": one for each kernel size, averaged behind the activation
    (eq. 5, left side). In eval mode, or at `temperature` None, the likeliest slice; filters that are not kept
    are zero. The bias is scaled by how much of its filter is sampled. (By 4.5.4 a 3x3 slice of a 5x5 kernel
    would keep 9/25 of it, and a one-hot sample would not be the slice.)
    """

    def __init__(self, in_channels: int, kernel_sizes: tuple, filters: tuple, structure: str = "joint",
                 form: str = "full", stride: int = 1, bias: bool = True, activation: nn.Module | None = None):
        super().__init__()
        self.kernel_sizes, self.filters = kernel_sizes, filters = tuple(kernel_sizes), tuple(filters)
        ascending = all(values and values[0] > 0 and list(values) == sorted(set(values))
                        for values in (kernel_sizes, filters))
        if not ascending or any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"Kernel sizes must be odd, positive and ascending, not {kernel_sizes}; numbers "
                             f"of filters positive and ascending, not {filters}.")
        if structure not in STRUCTURES or form not in FORMS:
            raise ValueError(f"The structure must be one of {', '.join(STRUCTURES)}, and the form one of "
                             f"{', '.join(FORMS)}, not {structure!r} and {form!r}.")
        self.form, self.stride, size = form, stride, kernel_sizes[-1]
        largest = nn.Conv2d(in_channels, filters[-1], size, stride, size // 2, bias=bias)
        self.weight, self.bias = largest.weight, largest.bias
        self.structure = STRUCTURES[structure](kernel_sizes, filters)
        self.activation = nn.Identity() if activation is None else activation
        self.temperature: float | None = 1.0
        inside = [F.pad(torch.ones(each, each), [(size - each) // 2] * 4) for each in kernel_sizes]
        self.register_buffer("inside", torch.stack(inside), persistent=False)  # (K, k, k)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, kernel_sizes: tuple, filters: tuple | None = None, **how):
        """A superkernel in place of a convolution, with its weights; ValueError where it cannot replace it.

        The largest kernel size and number of filters are those of `conv` (default: only the kernel size is
        searched). `how`: structure, form, activation.
        """
        size, filters = kernel_sizes[-1], filters or (conv.out_channels,)
        if (conv.kernel_size != (size, size) or filters[-1] != conv.out_channels or conv.groups != 1
                or conv.dilation != (1, 1) or conv.stride[0] != conv.stride[1] or conv.padding_mode != "zeros"
                or conv.padding not in ((size // 2,) * 2, "same")):
            raise ValueError(f"A superkernel of sizes {kernel_sizes} and {filters} filters cannot stand for "
                             f"{conv}: it needs the same size, one group, no dilation and zeros around.")
        bias = conv.bias is not None
        layer = cls(conv.in_channels, kernel_sizes, filters, stride=conv.stride[0], bias=bias, **how)
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.to(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.structure.weights(self.temperature if self.training else None).to(self.weight.dtype)
        if self.form == "full":  # weights: (K, C)
            mask = torch.einsum("kc,kij->cij", weights, self.inside)[:, None]  # (C, 1, k, k)
            bias = None if self.bias is None else self.bias * weights.sum(0)
            padding = self.kernel_sizes[-1] // 2
            return self.activation(F.conv2d(x, self.weight * mask, bias, self.stride, padding))
        return sum(share[:, None, None] * self.activation(  # filters of one kernel size share its convolution
            F.conv2d(x, centre(self.weight, size), self.bias, self.stride, size // 2))
            for size, share in zip(self.kernel_sizes, weights))

    @torch.no_grad()
    def distill(self, chosen: Slice | None = None, same_width: bool = False) -> nn.Conv2d:
        """The convolution of a slice (None: the likeliest) with copied weights, without activation (4.5.5).

        It has the filters `structure.kept(chosen.filters)`: what follows must lose its other inputs. With
        `same_width` it has all filters, and those that are not kept are zero.
        """
        size, count = chosen or self.structure.likeliest()
        kept, width = self.structure.kept(count), self.filters[-1] if same_width else count
        bias = self.bias is not None
        conv = nn.Conv2d(self.weight.shape[1], width, size, self.stride, size // 2, bias=bias).to(self.weight)
        for old, new in ((centre(self.weight, size), conv.weight), (self.bias, conv.bias)):
            if old is not None:
                new.zero_()[kept if same_width else slice(None)] = old[kept]
        return conv


def centre(weight: Tensor, size: int) -> Tensor:
    """The middle `size` x `size` of kernels (out, in, k, k)."""
    edge = (weight.shape[-1] - size) // 2
    return weight[..., edge:edge + size, edge:edge + size]


# --- The spaces, their designs, and what these cost ---------------------------------------------------------


class Part(NamedTuple):
    """What the cost of a block's convolution depends on; layers 1 and 2 are searched, 3 restores channels."""
    level: int  # 0: full resolution, 1: half ...
    layer: int
    kernel_size: int
    in_channels: int
    out_channels: int


class Family(NamedTuple):
    """What the networks of a family share; growths are numbers of filters per channel of the block."""
    kernel_sizes: tuple[int, ...]
    growths: tuple[float, ...]
    blocks: int  # dense blocks in a row, at each level of the encoder and of the decoder
    doubling: bool  # channels double from level to level, or grow by the base width each
    skipinit: bool  # residual branches begin at zero
    attention: bool  # channel attention in the decoder, and before the end


FAMILIES = {"skipinit": Family((3, 5), (0.2, 0.4, 0.6), 2, False, True, False),  # 3.2, 5.2
            "attention": Family((3, 5, 7), (0.25, 0.5, 1.0), 1, True, False, True)}  # 3.1, 5.3.1


@dataclass(frozen=True)
class Space:
    """A family at a width, the space that is searched; ValueError in one sentence where it is not possible.

    `base_width`: channels at full resolution; `levels`: how often it is halved; `subnetworks`: U-Nets side by
    side ("attention"); `channels` of the image: 1, 3, 4 (packed raw) or any.
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
            if type(value) is not int or not 1 <= value <= high:
                raise ValueError(f"{name} must be a whole number from 1 to {high}, not {value!r}.")

    @property
    def rules(self) -> Family:
        return FAMILIES[self.family]

    def block_levels(self) -> list[int]:
        """The level of each dense block: down, then up, subnetwork by subnetwork."""
        down = list(range(self.levels + 1))
        return [level for level in down + down[-2::-1] for _ in range(self.rules.blocks)] * self.subnetworks

    def channels_at(self, level: int) -> int:
        return self.base_width * 2 ** level if self.rules.doubling else self.base_width * (level + 1)

    def filters_at(self, level: int) -> tuple[int, ...]:
        """The numbers of filters to choose from at a level."""
        channels = self.channels_at(level)
        return tuple(sorted({max(1, round(growth * channels)) for growth in self.rules.growths}))

    def counts_at(self, level: int) -> tuple[int, ...]:
        """The numbers of filters of the parts at a level; a filterwise structure can have as few as 1."""
        return tuple(sorted({1, *self.filters_at(level)}))

    def design(self, choose) -> Design:
        """The design whose searched layers are choose(kernel sizes, numbers of filters) -> Slice."""
        choices = [(self.rules.kernel_sizes, self.filters_at(level)) for level in self.block_levels()]
        return Design(self, tuple((choose(*each), choose(*each)) for each in choices))

    def plain_design(self) -> Design:
        """3x3 kernels and the middle number of filters: what we take for "no superkernel" in tables 1 to 4.

        The paper does not state it; in the attention family this is the network that it modifies ([26]).
        """
        return self.design(lambda sizes, filters: Slice(sizes[0], filters[len(filters) // 2]))

    reference_design = plain_design  # whose time tells how fast a device is at the moment

    def largest_design(self) -> Design:
        return self.design(lambda sizes, filters: Slice(sizes[-1], filters[-1]))

    def random_design(self, rng: random.Random) -> Design:
        return self.design(lambda sizes, filters: Slice(rng.choice(sizes), rng.choice(filters)))

    def network(self, design: Design) -> ResidualUNet:
        return ResidualUNet(design)

    def holds(self, design: Design) -> bool:
        return design.space == self

    def kinds(self, design: Design) -> list[str]:
        """Under which names a table keeps the cost of all else."""
        return ["network"]

    def identity(self) -> dict:
        """What a table is for, as JSON."""
        return {"method": "superkernel", **asdict(self)}

    @classmethod
    def from_identity(cls, identity: dict) -> Space:
        """The space of `identity`; KeyError where a field is missing."""
        return cls(**{field.name: identity[field.name] for field in fields(cls)})

    def table_flags(self) -> str:
        """The flags of latency.py that make a table for this space."""
        network = [f" --network {name} --width {self.base_width}" for name, preset in PRESETS.items()
                   if replace(preset, base_width=self.base_width, channels=self.channels) == self]
        return f"--method superkernel{''.join(network)}" + " --grey" * (self.channels == 1)

    def block_parts(self, level: int) -> tuple[list[Part], ...]:
        """The possible parts of a block's three layers, ordered by kernel size and numbers of filters."""
        sizes, counts, width = self.rules.kernel_sizes, self.counts_at(level), self.channels_at(level)
        return ([Part(level, 1, size, width, a) for size, a in product(sizes, counts)],
                [Part(level, 2, size, width + a, b) for size, a, b in product(sizes, counts, counts)],
                [Part(level, 3, 3, width + a + b, width) for a, b in product(counts, counts)])

    def possible_parts(self) -> set[Part]:
        """Every part that costs are interpolated between."""
        return set().union(*(parts for level in self.block_levels() for parts in self.block_parts(level)))

    def parts(self, network: ResidualUNet) -> list[tuple[Part, nn.Module]]:
        """The convolutions in the blocks of a design's network."""
        parts = []
        for level, block in zip(self.block_levels(), network.blocks()):
            for number, module in enumerate((*block.layers, block.output), 1):
                conv = module[0]
                part = Part(level, number, conv.kernel_size[0], conv.in_channels, conv.out_channels)
                parts.append((part, module))
        return parts

    def carriers(self, rng: random.Random, rounds: int) -> list[Design]:
        """Designs that together hold every part `rounds` times or more."""
        sizes, levels, decks, left = self.rules.kernel_sizes, self.block_levels(), {}, {}
        for level in levels:
            # Every second layer with every number of filters before it; the first's kernel sizes in turn.
            counts = list(enumerate(self.counts_at(level)))
            decks[level] = [(Slice(sizes[(i + j + k) % len(sizes)], a), Slice(size, b))
                            for (i, a), (j, b), (k, size) in product(counts, counts, enumerate(sizes))]

        def deal(level: int) -> tuple[Slice, Slice]:
            left[level] = left.get(level) or rng.sample(decks[level], len(decks[level]))
            return left[level].pop()

        needed = max(math.ceil(rounds * len(deck) / levels.count(level)) for level, deck in decks.items())
        return [Design(self, tuple(map(deal, levels))) for _ in range(needed)]

    def cost(self, design: Design, costs: dict[Part, float], rest: float) -> float:
        """The cost of a design, interpolated between those of possible_parts; KeyError where one lacks."""
        return sum((BlockCosts(self, level, costs).of(slices)
                    for level, slices in zip(self.block_levels(), design.blocks)), rest)


@dataclass(frozen=True)
class Design:
    """A network of a space: the searched layers of every dense block, in the order of Space.block_levels."""

    space: Space
    blocks: tuple[tuple[Slice, Slice], ...]

    def to_dict(self) -> dict:
        blocks = zip(self.space.block_levels(), self.blocks)
        return {**asdict(self.space), "blocks": [
            {"level": level, "layers": [chosen._asdict() for chosen in slices]} for level, slices in blocks]}

    @classmethod
    def from_dict(cls, record: dict) -> Design:
        """From a record; ValueError in one sentence when something in it is wrong."""
        try:
            space = Space.from_identity(record)
            levels, sizes = space.block_levels(), space.rules.kernel_sizes
            if [block["level"] for block in record["blocks"]] != levels:
                raise ValueError(f"its blocks must be at the levels {levels}")
            blocks = tuple(tuple(Slice(**layer) for layer in block["layers"]) for block in record["blocks"])
            for level, slices in zip(levels, blocks):
                most = space.filters_at(level)[-1]
                if len(slices) != 2 or not all(type(size) is type(count) is int and size in sizes
                                               and 1 <= count <= most for size, count in slices):
                    raise ValueError(f"a block at level {level} has two layers, kernels of {sizes} and 1 to "
                                     f"{most} filters, not {slices}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = f"the field {error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise ValueError(f"The record is not valid: {text}.") from None
        return cls(space, blocks)


PRESETS = {  # the paper's networks; another base width makes one smaller. Those of "attention" are ours
    "skipinit-1": Space("skipinit", 32, 3), "skipinit-2": Space("skipinit", 64, 2),  # tables 1 and 2
    **{f"attention-{n}": Space("attention", 32, 3, n) for n in (1, 3, 6)}}  # tables 3 and 4


class BlockCosts:
    """The costs of the three convolutions of a block, as arrays over kernel sizes and numbers of filters."""

    def __init__(self, space: Space, level: int, costs: dict[Part, float]):
        self.sizes, self.counts = space.rules.kernel_sizes, space.counts_at(level)
        tables = [torch.tensor([float(costs[part]) for part in parts]) for parts in space.block_parts(level)]
        count = len(self.counts)
        self.first, self.second, self.third = (
            table.view(shape) for table, shape in zip(tables, ((-1, count), (-1, count, count), (-1, count))))

    def expected(self, first: Tensor, second: Tensor) -> Tensor:
        """The expected cost of a block whose layers are distributed as `first` and `second`, (K, G)."""
        before = first.sum(0)  # over the numbers of filters of the first layer
        return ((first * self.first).sum() + torch.einsum("kb,a,kab->", second, before, self.second)
                + torch.einsum("a,b,ab->", before, second.sum(0), self.third))

    def of(self, slices: tuple[Slice, Slice]) -> float:
        """The cost of a block with these layers."""
        counts = torch.tensor(self.counts, dtype=torch.float32)
        rows = [F.one_hot(torch.tensor(self.sizes.index(size)), len(self.sizes))[:, None]
                * interpolate(torch.tensor(float(count)), counts) for size, count in slices]
        return float(self.expected(*rows))

    def spread(self, structure: Structure) -> Tensor:
        """The probabilities of a structure, whose grid is `counts` or all but its first, 1: (K, G)."""
        probabilities = structure.probabilities().cpu()
        return F.pad(probabilities, (len(self.counts) - probabilities.shape[1], 0))


# --- Networks -----------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """What a network returns. `logits` is None: these networks do not classify."""
    image: Tensor | None
    logits: Tensor | None = None


class DenseBlock(nn.Module):
    """Densely connected residual block (fig. 3, 4): two searched convolutions, which see all before them, and
    a 3x3 that restores the channels, with ReLU; with SkipInit a scalar, first zero, scales the branch."""

    def __init__(self, space: Space, level: int, slices: tuple[Slice, Slice], make_layer):
        super().__init__()
        channels = width = space.channels_at(level)
        self.layers = nn.ModuleList()
        for chosen in slices:
            self.layers.append(make_layer(width, space.rules.kernel_sizes, space.filters_at(level), chosen))
            width += chosen.filters
        self.output = nn.Sequential(nn.Conv2d(width, channels, 3, padding=1), nn.ReLU())
        self.scale = nn.Parameter(torch.zeros(())) if space.rules.skipinit else None

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for layer in self.layers:
            features = torch.cat((features, layer(features)), 1)
        branch = self.output(features)
        return x + (branch if self.scale is None else self.scale * branch)


class UNet(nn.Module):
    """One subnetwork (fig. 2): (B, channels, H, W), H and W multiples of 2^levels, -> (B, base_width, H, W).

    Encoder: a 3x3 convolution, of stride 2 below full resolution, with ReLU, then dense blocks. Decoder: a
    1x1 convolution and a pixel shuffle, the skip beside it, channel attention ([39], squeezes 16 to 1), a 3x3
    convolution with ReLU, dense blocks. (The paper does not say how channels change at strides and shuffles.)
    """

    def __init__(self, space: Space, blocks):  # an iterator of dense blocks
        super().__init__()
        widths = [space.channels_at(level) for level in range(space.levels + 1)]

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, 1), nn.ReLU(),
                                 *(next(blocks) for _ in range(space.rules.blocks)))

        self.down = nn.ModuleList([stage(space.channels, widths[0], 1)])
        self.down.extend(stage(above, width, 2) for above, width in zip(widths, widths[1:]))
        self.up, self.joined = nn.ModuleList(), nn.ModuleList()
        for below, width in zip(widths[:0:-1], widths[-2::-1]):
            self.up.append(nn.Sequential(nn.Conv2d(below, 4 * width, 1), nn.PixelShuffle(2)))
            attention = [SqueezeExcitation(2 * width, max(1, width // 8))] if space.rules.attention else []
            self.joined.append(nn.Sequential(*attention, *stage(2 * width, width, 1)))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for stage in self.down:
            features.append(stage(features[-1]))
        x = features.pop()
        for up, joined in zip(self.up, self.joined):
            x = joined(torch.cat((features.pop(), up(x)), 1))
        return x


def plain_layer(in_channels: int, kernel_sizes: tuple, filters: tuple, chosen: Slice) -> nn.Sequential:
    """The convolution of a design, with ReLU."""
    size, count = chosen
    return nn.Sequential(nn.Conv2d(in_channels, count, size, padding=size // 2), nn.ReLU())


class ResidualUNet(nn.Module):
    """A denoiser for any H, W: (B, channels, H, W), images in [0, 1] plus noise -> Output(image like that).

    `make_layer(in_channels, kernel_sizes, filters, chosen)` builds a searched layer with its activation.
    """

    denoises, classifies = True, False

    def __init__(self, design: Design, make_layer=plain_layer):
        super().__init__()
        self.design, space = design, design.space
        self.channels, self.multiple = space.channels, 2 ** space.levels
        blocks = iter([DenseBlock(space, level, slices, make_layer)
                       for level, slices in zip(space.block_levels(), design.blocks)])
        self.subnetworks = nn.ModuleList(UNet(space, blocks) for _ in range(space.subnetworks))
        width = space.base_width * space.subnetworks
        self.attention = nn.Identity()
        if space.rules.attention:
            self.attention = SqueezeExcitation(width, max(1, width // 16))
        self.image = nn.Conv2d(width, space.channels, 3, padding=1)

    def blocks(self) -> list[DenseBlock]:
        """The dense blocks in the order of `design.blocks`."""
        return [module for module in self.modules() if isinstance(module, DenseBlock)]

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        mirrored = bottom < height and right < width  # too small an image is repeated at its border instead
        padded = F.pad(x, (0, right, 0, bottom), mode="reflect" if mirrored else "replicate")
        features = torch.cat([unet(padded) for unet in self.subnetworks], 1)
        return Output(x + self.image(self.attention(features))[..., :height, :width])


build = ResidualUNet  # the network of a design with fresh weights


# --- The supernet -------------------------------------------------------------------------------------------


class SuperNet(nn.Module):
    """The largest network of a space with superkernels in it: every training step samples another network.

    forward: as ResidualUNet; in eval mode, the likeliest network. Activations are ReLU; the paper used ReLU
    and PReLU (4.5.3), but does not say where.
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
        return [parameter for name, parameter in self.named_parameters() if ".structure." not in name]

    def entropy(self) -> Tensor:
        """How undecided each superkernel is, from 0 to 1."""
        return torch.tensor([layer.structure.entropy() for layer in self.superkernels()])

    def decisions(self) -> list[dict]:
        return [{"entropy": round(value, 4)} for value in self.entropy().tolist()]

    def expected_cost(self, costs: dict[Part, float], rest: float) -> Tensor:
        """The expected cost of the exported network, differentiable; all slices are sampled independently.

        For filterwise structures that at the expected number of filters: exact where costs are linear in it.
        """
        total = torch.as_tensor(float(rest))
        for level, block in zip(self.space.block_levels(), self.network.blocks()):
            table = BlockCosts(self.space, level, costs)
            total = total + table.expected(*(table.spread(layer.structure) for layer in block.layers))
        return total

    def cost_range(self, costs: dict[Part, float], rest: float) -> tuple[float, float]:
        """The costs of the networks with the smallest and with the largest kernels and numbers of filters."""
        least = self._design(lambda structure: Slice(structure.kernel_sizes[0], structure.grid()[0]))
        return self.space.cost(least, costs, rest), self.space.cost(self.space.largest_design(), costs, rest)

    def _design(self, choose) -> Design:
        """The design whose searched layers are choose(structure) -> Slice."""
        return Design(self.space, tuple(tuple(choose(layer.structure) for layer in block.layers)
                                        for block in self.network.blocks()))

    def likeliest(self) -> Design:
        """The design of the likeliest slice of each superkernel (4.5.5)."""
        return self._design(Structure.likeliest)

    # For latency.fit. A state: (the blocks of a design, what this fit has worked out with `_block`).

    def starts(self) -> list[tuple[float, tuple]]:
        """(log probability beside the likeliest network's, state): a fit begins at the likeliest network."""
        return [(0.0, (self.likeliest().blocks, {}))]

    def _block(self, number: int, state: tuple, costs: dict[Part, float]) -> tuple[float, list[tuple]]:
        """A block's cost in a state, and a list of its exchange that loses the least log probability per
        cost, (loss / gain, place, slice, loss, gain, slices of the block); [] where nothing is cheaper."""
        slices, known = state[0][number], state[1]
        if (number, slices) not in known:
            table, exchanges = BlockCosts(self.space, self.space.block_levels()[number], costs), []
            present = table.of(slices)
            for place, layer in enumerate(self.network.blocks()[number].layers):
                for chosen, loss in layer.structure.options(slices[place]):
                    after = (*slices[:place], chosen, *slices[place + 1:])
                    gain = present - table.of(after)
                    if gain > 1e-9:
                        exchanges.append((loss / gain, place, chosen, loss, gain, after))
            known[number, slices] = present, sorted(exchanges)[:1]
        return known[number, slices]

    def state_cost(self, state: tuple, costs: dict[Part, float], rest: float) -> float:
        return rest + sum(self._block(number, state, costs)[0] for number in range(len(state[0])))

    def exchanges(self, state: tuple, costs: dict[Part, float], rest: float, target: float) -> list[tuple]:
        """Each block's best exchange, (log probability lost, cost saved, state); [] at the target."""
        if self.state_cost(state, costs, rest) <= target:
            return []
        blocks, known = state
        return [(loss, gain, ((*blocks[:number], after, *blocks[number + 1:]), known))
                for number in range(len(blocks))
                for _, _, _, loss, gain, after in self._block(number, state, costs)[1]]

    def settle(self, state: tuple, costs: dict[Part, float], rest: float, target: float) -> Design:
        return Design(self.space, state[0])

    @torch.no_grad()
    def export(self, design: Design) -> ResidualUNet:
        """The plain network of a design with copied weights (4.5.5); of `likeliest()`: with the same outputs.

        Filterwise structures keep their likeliest filters, as many as the design has.
        """
        network = build(design).to(next(self.parameters()).device)
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        network.load_state_dict({name: value for name, value in self.network.state_dict().items()
                                 if value.shape == shapes.get(name)}, strict=False)
        for source, block, slices in zip(self.network.blocks(), network.blocks(), design.blocks):
            inputs = list(range(block.output[0].out_channels))  # of the next layer, in the largest block
            for layer, chosen, target in zip(source.layers, slices, block.layers):
                conv = layer.distill(chosen)
                target[0].weight.copy_(conv.weight[:, inputs])
                target[0].bias.copy_(conv.bias)
                before = layer.weight.shape[1]
                inputs += [before + place for place in layer.structure.kept(chosen.filters)]
            block.output[0].weight.copy_(source.output[0].weight[:, inputs])
        return network.train(self.training)

    def set_design(self, design: Design, logit: float = 30.0) -> None:
        """Make a design almost certain, with the first filters of each superkernel."""
        for layer, chosen in zip(self.superkernels(), sum(design.blocks, ())):
            layer.structure.set_choice(chosen.kernel_size, range(chosen.filters), logit)

    def draw_random(self, seed: int) -> None:
        """Make a random design almost certain, for --strategy random."""
        self.set_design(self.space.random_design(random.Random(seed)))

    def describe(self, design: Design, costs: dict[Part, float] | None = None, rest: float = 0.0) -> str:
        """A design as a table to read: the two searched layers of each block, by level."""
        lines = [f"{'level':>5} {'channels':>8}   searched layers: kernel size x filters"]
        for level, slices in zip(self.space.block_levels(), design.blocks):
            text = "   ".join(f"{size}x{size} x {count:<4}" for size, count in slices)
            lines.append(f"{level:>5} {self.space.channels_at(level):>8}   {text}")
        return "\n".join(lines)


# --- How search.py searches ---------------------------------------------------------------------------------

STRATEGIES = ("gradient", "random", "plain")  # plain: the network without superkernels
TRAIN_DEFAULTS = {"epochs": 20, "batch_size": 4, "optimizer": "adam", "lr": 1e-3,
                  "denoising_loss": "charbonnier"}


def add_arguments(parser, model: str) -> None:
    """Add this method's own flags to those of search.py."""
    from data import number, whole
    from train import DENOISING_LOSSES

    add = parser.add_argument_group("superkernel", "U-Nets that denoise, and their search.").add_argument
    add("--network", choices=PRESETS,
        help="skipinit: the paper's models 1 and 2; attention: 1, 3 or 6 subnetworks (default: skipinit-1)")
    add("--width", type=whole(1, 1024), metavar="N",
        help="base width of the network in channels (default: the paper's, 32 or 64)")
    add("--target-macs", type=number(1e-6, 1e9), metavar="M",
        help="instead of --target: multiply-accumulates of the network for one image of --size, in millions "
             "(default: no limit)")
    add("--structure", choices=STRUCTURES, default="joint",
        help="distribution over kernel sizes and filters (default: %(default)s)")
    add("--form", choices=FORMS, default="full",
        help="full: one convolution with an averaged kernel; separate: one per size (default: %(default)s)")
    add("--two-level", action="store_true",
        help="train the structure on half of the images, in its own steps (default: with the weights)")
    add("--warmup-epochs", type=whole(0, 100000), metavar="N",
        help="with --two-level: first epochs, which train the weights only (default: 0)")
    add("--temperature", type=number(1e-3, 1e3), default=1.0, metavar="T",
        help="temperature of the samples in the first epoch (default: %(default)s)")
    add("--temperature-decay", type=number(1e-3, 1), metavar="X",
        help="factor on the temperature per epoch (default: the one that ends at a tenth)")
    add("--denoising-loss", choices=DENOISING_LOSSES, default="charbonnier",
        help="loss of the image (default: %(default)s)")
    add("--patience", type=whole(0), default=30, metavar="N",
        help="stop after N epochs without a better validation PSNR; 0: never (default: %(default)s)")


def search_defaults(given: dict) -> dict:
    """Defaults of search.py's flags, for minutes on a CPU; the paper's patches have 128 px too (5.1)."""
    return {"size": 128, "batch_size": 4, "epochs": 20, "crops": 20, "lr": 1e-3, "sigma": 55 / 255}


def plan(data, /, *, network: str | None = None, width: int | None = None, two_level: bool = False,
         warmup_epochs: int | None = None, **_) -> dict:
    """What is searched on `data` (with `channels`); ValueError in one sentence where flags do not agree."""
    if warmup_epochs and not two_level:
        raise ValueError("--warmup-epochs is for --two-level, the structure's own steps; give both.")
    preset = PRESETS[network or "skipinit-1"]
    space = replace(preset, base_width=width or preset.base_width, channels=data.channels)
    return {"space": space, "table_space": space, "loss": "den", "weight_share": 0.5 if two_level else 1.0}


def make_supernet(space: Space, *, structure: str = "joint", form: str = "full", **_) -> SuperNet:
    return SuperNet(space, structure, form)


def training(supernet: SuperNet, steps: int, *, epochs: int, lr: float, arch_lr: float,
             temperature: float = 1.0, temperature_decay: float | None = None, two_level: bool = False,
             warmup_epochs: int | None = None, **_) -> dict:
    """How a supernet is trained: Adam at constant rates for weights and structure, in one step (5.1, 7).

    The paper's rate is 2e-5. It states no rate for the structure, no loss (here Charbonnier), no initial
    logits (here zero) and no temperature (here it falls by a constant factor per epoch, by default to a tenth
    in the last one). `two_level`, an Adam and images of the structure's own, is the paper's future work.
    """
    weights, structure = supernet.weight_parameters(), supernet.arch_parameters()
    groups = [{"params": weights, "lr": lr}] + ([] if two_level else [{"params": structure, "lr": arch_lr}])
    weight_optimizer = torch.optim.Adam(groups, fused=True)
    decay = temperature_decay or 0.1 ** (1 / max(1, epochs - 1))
    return {"weight_optimizer": weight_optimizer,
            "arch_optimizer": torch.optim.Adam(structure, arch_lr) if two_level else None,
            "lr_schedule": torch.optim.lr_scheduler.ConstantLR(weight_optimizer, 1.0),
            "warmup_epochs": warmup_epochs or 0, "keep_from": 0,
            "temperature": lambda epoch: temperature * decay ** epoch}


# --- The paper's tables, which reproduce.py makes ---------------------------------------------------------

# Flags by scale. The paper evaluates every 1,000 steps: with 288 images and batch 4, 14 crops of each.
PAPER_SCALES = {
    "full": {"search": "--lr 2e-5 --arch-lr 2e-5 --epochs 1000 --crops 14", "ensemble": True,
             "train": "--lr 2e-5 --epochs 1000 --crops 14"},
    "small": {"data": "--sigmas 25/255 --crops 4", "search": "--width 8 --epochs 4", "ensemble": True,
              "train": "--epochs 4", "val": 8},
    "tiny": {"data": "--sigmas 25/255 --size 16 --batch-size 4", "search": "--width 2 --epochs 1 --crops 1",
             "ensemble": True, "train": "--epochs 1 --crops 1", "test": 2}}
_KINDS = {"no superkernel": "--strategy plain", "full": "--form full", "separate": "--form separate",
          "factorized": "--structure factorized", "joint": "--structure joint",
          "filterwise": "--structure filterwise", "filterwise with attention": "--structure attention"}


def _paper_row(label: str, psnr: float, ssim: float, psnr_x8: float, ssim_x8: float) -> tuple[str, dict]:
    """A row: "model 1, full" is skipinit-1, "3 subnetworks, joint" attention-3; x8 is by self-ensemble."""
    network, kind = label.split(", ")
    first, second = network.split()
    place = f"skipinit-{second}" if first == "model" else f"attention-{first}"
    return label, {"search": f"--network {place} {_KINDS[kind]}", "paper": {
        "PSNR dB": psnr, "SSIM": ssim, "PSNR dB x8": psnr_x8, "SSIM x8": ssim_x8}}


_COLUMNS = ("MACs M", "PSNR dB", "SSIM", "PSNR dB x8", "SSIM x8", "distilled PSNR dB", "distilled PSNR dB x8")
PAPER_TABLES = {
    "mozejko-1": {
        "title": "SkipInit residual U-Nets: trained again, and as distilled", "columns": _COLUMNS,
        "paper": "Mozejko 2020: tables 1 and 2", "rows": dict((
            _paper_row("model 1, no superkernel", 52.4937, 0.99157, 52.6738, 0.99170),
            _paper_row("model 1, full", 52.4638, 0.99140, 52.7330, 0.99183),
            _paper_row("model 1, separate", 52.4957, 0.99148, 52.74498, 0.99184),
            _paper_row("model 1, filterwise", 52.4561, 0.99147, 52.6444, 0.99179),
            _paper_row("model 1, filterwise with attention", 52.4239, 0.99138, 52.7059, 0.99173),
            _paper_row("model 2, no superkernel", 52.4490, 0.99140, 52.6883, 0.99170),
            _paper_row("model 2, full", 52.4752, 0.99144, 52.7344, 0.99183),
            _paper_row("model 2, filterwise", 52.4151, 0.99145, 52.6817, 0.99183),
            _paper_row("model 2, filterwise with attention", 52.4278, 0.99152, 52.7053, 0.99191))),
        "claims": [(f"model {number}, full", f"model {number}, no superkernel", "PSNR dB x8")
                   for number in (1, 2)]},
    "mozejko-3": {
        "title": "Multi-attentional residual U-Nets: trained again, and as distilled", "columns": _COLUMNS,
        "paper": "Mozejko 2020: tables 3 and 4", "rows": dict((
            _paper_row("1 subnetwork, no superkernel", 52.3517, 0.99156, 52.4470, 0.99157),
            _paper_row("1 subnetwork, factorized", 52.2690, 0.99124, 52.4998, 0.99157),
            _paper_row("1 subnetwork, joint", 52.3925, 0.99138, 52.5668, 0.99163),
            _paper_row("1 subnetwork, filterwise", 52.2887, 0.99121, 52.5144, 0.99150),
            _paper_row("1 subnetwork, filterwise with attention", 52.2932, 0.99122, 52.5438, 0.99157),
            _paper_row("3 subnetworks, no superkernel", 52.4523, 0.99126, 52.5969, 0.99150),
            _paper_row("3 subnetworks, factorized", 52.3799, 0.99134, 52.6184, 0.99167),
            _paper_row("3 subnetworks, joint", 52.4153, 0.99140, 52.6016, 0.99164),
            _paper_row("3 subnetworks, filterwise", 52.3503, 0.99145, 52.5982, 0.99180),
            _paper_row("3 subnetworks, filterwise with attention", 52.4365, 0.99144, 52.6880, 0.99186),
            _paper_row("6 subnetworks, no superkernel", 52.4833, 0.99136, 52.6642, 0.99159),
            _paper_row("6 subnetworks, factorized", 52.4032, 0.99150, 52.6981, 0.99176),
            _paper_row("6 subnetworks, joint", 52.4118, 0.99147, 52.6189, 0.99159),
            _paper_row("6 subnetworks, filterwise", 52.3516, 0.99131, 52.6654, 0.99163),
            _paper_row("6 subnetworks, filterwise with attention", 52.4195, 0.99119, 52.5943, 0.99150))),
        "claims": [("1 subnetwork, joint", "1 subnetwork, no superkernel", "PSNR dB x8"),
                   ("6 subnetworks, joint", "1 subnetwork, joint", "PSNR dB x8")]}}


def design_of(record: dict) -> Design:
    """The design in an arch.json; ValueError in one sentence where it has none."""
    if not isinstance(record.get("design"), dict):
        raise ValueError("The record of a superkernel network needs a design.")
    return Design.from_dict(record["design"])


def record_content(design: Design) -> dict:
    return {"model": "superkernel", "design": design.to_dict()}
