"""Networks that denoise and classify within a latency, the supernet that finds them, and their record on disk.

    python models.py                 # every named model: parameters, MACs at its paper's input size
    python models.py --json          # the same for programs

    from models import Network, named_arch
    image, logits = Network(named_arch("dcnas-k3-e3", num_classes=10))(torch.rand(1, 3, 64, 64))

C-NAS classifies, D-NAS denoises, DC-NAS does both with one encoder (Markhorst, van Gemert and Kayhan, "Pushing
Joint Image Denoising and Classification to the Edge", 2024, fig. 7). The search space and the way the supernet is
trained come from TF-NAS (Hu, Wu and He, 2020). This file needs torch and torchvision only and works when copied alone.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib
import json
import math
import os
import platform
import random
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint as recomputed
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation, StochasticDepth

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
MODELS = ("cnas", "dnas", "dcnas", "dcnas-seq")
DECODERS = ("conv", "mb", "mb-1", "mb-3level")


class Output(NamedTuple):
    """What every network returns: `image` (B, 3, H, W) or None, `logits` (B, num_classes) or None."""

    image: Tensor | None
    logits: Tensor | None


# ---------------------------------------------------------------------------------------------------------------
# The search space (Markhorst 2024, supplement B; TF-NAS, table 1)


@dataclass(frozen=True)
class Stage:
    """One stage of the backbone; the papers number the stem convolution stage 1."""

    number: int
    out_channels: int
    blocks: int
    stride: int  # of the first block
    activation: str


STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
STAGES = (  # the searched ones; stage 2 is fixed
    Stage(3, 24, 2, 2, "relu"),
    Stage(4, 40, 3, 2, "silu"),
    Stage(5, 80, 4, 2, "silu"),
    Stage(6, 112, 4, 1, "silu"),
    Stage(7, 192, 4, 2, "silu"),
    Stage(8, 320, 1, 1, "silu"),
)
LAST_ENCODER_STAGE = 6  # D-NAS ends here; in DC-NAS the decoder and the classification branch part here
ENCODER_STRIDE = 16


@dataclass(frozen=True)
class Operation:
    """One candidate of a searched block: an MBConv of a kernel size, an expansion and perhaps squeeze-and-excitation."""

    kernel_size: int
    expansion: int
    se: bool = False

    @property
    def name(self) -> str:
        return f"k{self.kernel_size}-e{self.expansion}" + ("-se" if self.se else "")

    def start_width(self, in_channels: int) -> int:
        """Mid channels at the start of the search: 3x or 6x the input."""
        return self.expansion * in_channels

    def max_width(self, in_channels: int) -> int:
        """The widest the width fit may go: 4x or 8x the input (TF-NAS, elasticity scaling)."""
        return self.expansion * in_channels * 4 // 3

    def se_channels(self, in_channels: int) -> int:
        """Squeeze width: the input channels at expansion 3, twice that at 6 (TF-NAS)."""
        return self.expansion // 3 * in_channels if self.se else 0


_PLAIN, _SE = (tuple(Operation(k, e, se) for k in (3, 5) for e in (3, 6)) for se in (False, True))
SPACES = {4: _PLAIN, 6: _PLAIN + _SE[:2], 8: _PLAIN + _SE}

WIDTH_STEP = 8  # mid channels are multiples of this: what vector units and tensor cores like
MIN_WIDTH = 1.25  # smallest mid channels, as a multiple of the input channels


def round_width(channels: float) -> int:
    """The nearest multiple of WIDTH_STEP, at least one step."""
    return max(WIDTH_STEP, int(channels / WIDTH_STEP + 0.5) * WIDTH_STEP)


def width_range(operation: Operation, in_channels: int, min_width: float = MIN_WIDTH) -> tuple[int, int]:
    """Smallest and largest mid channels of `operation` on `in_channels`, inclusive.

    TF-NAS's floor is half the maximum, where its fit stalls and a low target is silently missed. Here the floor is
    `min_width` times the input, and always more than the input, so that the expansion convolution stays.
    """
    smallest = max(math.ceil(min_width * in_channels / WIDTH_STEP), in_channels // WIDTH_STEP + 1) * WIDTH_STEP
    return smallest, max(smallest, round_width(operation.max_width(in_channels)))


# ---------------------------------------------------------------------------------------------------------------
# The architecture record


@dataclass(frozen=True)
class Block:
    """One MBConv of a network, with nothing left to look up. `se_channels` 0 means no squeeze-and-excitation."""

    stage: int
    in_channels: int
    mid_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    se_channels: int
    activation: str


@dataclass(frozen=True)
class Arch:
    """A C-NAS, D-NAS, DC-NAS or sequential DC-NAS network, complete: the content of `arch.json`.

    `blocks` run in order from stage 2; those after stage 6 exist only where the network classifies. In a "dcnas-seq" stages 2
    to 6 are there twice, in the denoiser and in the classifier behind it. `decoder`: see `Decoder`. Raises ValueError when
    the blocks do not fit together.
    """

    model: str
    blocks: tuple[Block, ...]
    num_classes: int = 0
    stem_channels: int = STEM_CHANNELS
    head_channels: int = HEAD_CHANNELS
    decoder: str = "conv"

    def __post_init__(self):
        def require(condition, message):
            if not condition:
                raise ValueError(f"The architecture is not valid: {message}.")

        require(self.model in MODELS, f"model must be one of {', '.join(MODELS)}, not {self.model!r}")
        require(self.decoder in DECODERS, f"decoder must be one of {', '.join(DECODERS)}, not {self.decoder!r}")
        for name in ("stem_channels", "head_channels"):
            require(_is_count(getattr(self, name)), f"{name} must be a whole number from 1 to 65536")
        require(_is_count(self.num_classes) if self.classifies else self.num_classes == 0,
                f"num_classes of a {self.model} must be " + ("from 1 to 65536" if self.classifies else "0"))
        require(0 < len(self.blocks) <= 256, "it needs 1 to 256 blocks")
        channels, stage = self.stem_channels, 2
        for number, block in enumerate(self.blocks):
            where = f"block {number}"
            for name in ("stage", "in_channels", "mid_channels", "out_channels", "kernel_size", "stride"):
                require(_is_count(getattr(block, name)), f"{where}: {name} must be a whole number from 1 to 65536")
            require(block.se_channels == 0 or _is_count(block.se_channels), f"{where}: se_channels must be 0 or more")
            require(block.in_channels == channels, f"{where} takes {block.in_channels} channels but gets {channels}")
            require(block.mid_channels >= block.in_channels, f"{where}: mid_channels is below in_channels")
            require(block.kernel_size in (1, 3, 5, 7), f"{where}: kernel_size must be 1, 3, 5 or 7")
            require(block.stride in (1, 2), f"{where}: stride must be 1 or 2")
            require(block.activation in tuple(ACTIVATIONS), f"{where}: activation must be {' or '.join(ACTIVATIONS)}")
            require(block.stage in (stage, stage + 1), f"{where}: stage {block.stage} does not follow stage {stage}")
            channels, stage = block.out_channels, block.stage
        last = LAST_ENCODER_STAGE if self.model == "dnas" else STAGES[-1].number
        require(self.blocks[0].stage == 2 and stage == last, f"a {self.model} has the stages 2 to {last}")
        if self.denoises:
            for number in range(2, LAST_ENCODER_STAGE + 1):
                strides = [block.stride for block in self.blocks if block.stage == number]
                expected = 1 if number in (2, 6) else 2  # the decoder doubles the size once per level
                require(math.prod(strides) == expected, f"stage {number} must have a stride of {expected} in all")

    @property
    def denoises(self) -> bool:
        return self.model != "cnas"

    @property
    def classifies(self) -> bool:
        return self.model != "dnas"

    def to_dict(self) -> dict:
        return {"model": self.model, "num_classes": self.num_classes, "stem_channels": self.stem_channels,
                "head_channels": self.head_channels, "decoder": self.decoder, "blocks": [asdict(block) for block in self.blocks]}

    @classmethod
    def from_dict(cls, content: dict) -> Arch:
        """The architecture in a record; raises ValueError in one sentence when a field is missing or wrong."""
        try:
            blocks = content["blocks"]
            if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
                raise ValueError("The architecture is not valid: blocks must be a list of objects.")
            names = {field.name for field in fields(Block)}
            unknown = {name for block in blocks for name in block if name not in names}
            if unknown:
                raise ValueError(f"The architecture is not valid: unknown block fields {', '.join(sorted(unknown))}.")
            return cls(content["model"], tuple(Block(**{name: block[name] for name in names}) for block in blocks),
                       content["num_classes"], content["stem_channels"], content["head_channels"],
                       content.get("decoder", "conv"))  # records of the first days have none
        except KeyError as error:
            raise ValueError(f"The architecture is not valid: the field {error} is missing.") from None

    def with_model(self, model: str) -> Arch:
        """The same encoder as another model: D-NAS keeps the blocks up to stage 6, DC-NAS gets a decoder."""
        keep = tuple(block for block in self.blocks if model != "dnas" or block.stage <= LAST_ENCODER_STAGE)
        return replace(self, model=model, blocks=keep, num_classes=0 if model == "dnas" else self.num_classes)

    def widened(self, factor: float) -> Arch:
        """All channels times `factor`, in steps of WIDTH_STEP: a larger network of the same form (thesis, table 4)."""
        def width(channels: int) -> int:
            return round_width(factor * channels)

        blocks = tuple(replace(block, in_channels=width(block.in_channels), out_channels=width(block.out_channels),
                               mid_channels=max(width(block.mid_channels), width(block.in_channels)),
                               se_channels=width(block.se_channels) if block.se_channels else 0) for block in self.blocks)
        return replace(self, blocks=blocks, stem_channels=width(self.stem_channels),
                       head_channels=width(self.head_channels))


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65536


def searched_positions(model: str) -> list[Block]:
    """The searched blocks of a model in order, with kernel_size, mid_channels and se_channels still to be filled (0)."""
    positions, channels = [], 16
    for stage in STAGES:
        if model == "dnas" and stage.number > LAST_ENCODER_STAGE:
            break
        for index in range(stage.blocks):
            positions.append(Block(stage.number, channels, 0, stage.out_channels, 0, stage.stride if index == 0 else 1,
                                   0, stage.activation))
            channels = stage.out_channels
    return positions


def fill(position: Block, operation: Operation, mid_channels: int | None = None) -> Block:
    """`position` with `operation` in it, at its starting width unless `mid_channels` says otherwise."""
    mid = operation.start_width(position.in_channels) if mid_channels is None else mid_channels
    return replace(position, kernel_size=operation.kernel_size, mid_channels=mid,
                   se_channels=operation.se_channels(position.in_channels))


STAGE_2 = Block(2, STEM_CHANNELS, STEM_CHANNELS, 16, 3, 1, 8, "relu")


def make_arch(model: str, blocks: list[Block], num_classes: int = 0) -> Arch:
    """The architecture of `model` with these searched blocks behind the fixed stage 2."""
    return Arch(model, (STAGE_2, *blocks), 0 if model == "dnas" else num_classes)


# ---------------------------------------------------------------------------------------------------------------
# Blocks


class MBConv(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection.

    (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), sizes rounded up. There is no expansion when
    mid_channels equals in_channels, and a residual when the shape stays. Convolutions have no bias (TF-NAS).
    `drop_connect` is the probability of dropping the block for a sample in training. Source: MobileNetV2; squeeze
    width given explicitly as in TF-NAS (torchvision's own MBConv fixes it, and its activation).
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1,
                 se_channels: int = 0, activation: str = "relu", drop_connect: float = 0.0,
                 norm_layer=nn.BatchNorm2d):
        super().__init__()
        if mid_channels < in_channels:
            raise ValueError(f"mid_channels ({mid_channels}) must be at least in_channels ({in_channels}).")
        layer = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=ACTIVATIONS[activation])
        self.expand = layer(in_channels, mid_channels, 1) if mid_channels > in_channels else nn.Identity()
        self.depthwise = layer(mid_channels, mid_channels, kernel_size, stride, groups=mid_channels)
        self.se = (SqueezeExcitation(mid_channels, se_channels, ACTIVATIONS[activation]) if se_channels
                   else nn.Identity())
        self.project = Conv2dNormActivation(mid_channels, out_channels, 1, norm_layer=norm_layer,
                                            activation_layer=None)
        self.drop_connect = StochasticDepth(drop_connect, "row") if drop_connect else nn.Identity()
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.se(self.depthwise(self.expand(x))))
        return x + self.drop_connect(out) if self.residual else out


def _search_norm(x: Tensor) -> Tensor:
    """Batch norm as the search has it: statistics of the batch, no affine part, nothing remembered."""
    return F.batch_norm(x, None, None, training=True)


class SearchNorm(nn.Module):
    """`_search_norm` for the fixed layers of the supernet; takes the place of nn.BatchNorm2d(channels)."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return _search_norm(x)


class ElasticMBConv(nn.Module):
    """The search form of MBConv: weights at the largest width, of which the kept mid channels take part.

    Same computation as MBConv with batch statistics and without the affine part of its norms, so that weights can be
    copied into the exported network (`copy_to`). The kept channels are the first `width`, so that their weights are slices.
    """

    def __init__(self, position: Block, operation: Operation, min_width: float = MIN_WIDTH):
        super().__init__()
        self.position, self.operation = position, operation
        _, width = width_range(operation, position.in_channels, min_width)
        full = MBConv(position.in_channels, width, position.out_channels, operation.kernel_size, position.stride,
                      operation.se_channels(position.in_channels), position.activation)
        self.expand_weight = full.expand[0].weight  # (mid, in, 1, 1)
        self.depthwise_weight = full.depthwise[0].weight  # (mid, 1, k, k)
        self.project_weight = full.project[0].weight  # (out, mid, 1, 1)
        self.se = full.se if operation.se else None
        self.residual = full.residual
        self.activation = F.relu_ if position.activation == "relu" else F.silu  # the norm before it needs its input only
        self.width = operation.start_width(position.in_channels)

    @property
    def block(self) -> Block:
        """What this candidate is in a record, at its present width."""
        return fill(self.position, self.operation, self.width)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.width)

    def set_extra_state(self, state: Tensor) -> None:
        self.width = int(state)

    @torch.no_grad()
    def set_width(self, mid_channels: int) -> list[nn.Parameter]:
        """Keep the `mid_channels` channels whose depthwise kernels have the largest L1 norm (TF-NAS).

        They are brought to the front. Returns the parameters whose channels changed places.
        """
        norm = self.depthwise_weight.abs().sum(dim=(1, 2, 3))
        order = norm.topk(mid_channels).indices.sort().values
        rest = torch.ones_like(norm, dtype=torch.bool).index_fill_(0, order, False).nonzero()[:, 0]
        self.width = mid_channels
        if torch.equal(order, torch.arange(mid_channels, device=order.device)):
            return []
        order = torch.cat((order, rest))
        moved = [(self.expand_weight, 0), (self.depthwise_weight, 0), (self.project_weight, 1)]
        if self.se is not None:
            moved += [(self.se.fc1.weight, 1), (self.se.fc2.weight, 0), (self.se.fc2.bias, 0)]
        for parameter, dim in moved:
            parameter.copy_(parameter.index_select(dim, order))
        return [parameter for parameter, _ in moved]

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.expand_weight[:self.width], self.depthwise_weight[:self.width], self.project_weight[:, :self.width]

    def forward(self, x: Tensor) -> Tensor:
        expand, depthwise, project = self._weights()
        out = self.activation(_search_norm(F.conv2d(x, expand)))  # (B, mid, H, W)
        # On a map of n x n pixels, what lies n or more off the kernel's centre meets nothing but padding.
        radius = self.operation.kernel_size // 2
        beyond = max(0, radius - max(out.shape[-2:]) + 1)
        depthwise = depthwise[..., beyond:depthwise.shape[-2] - beyond, beyond:depthwise.shape[-1] - beyond]
        out = F.conv2d(out, depthwise, stride=self.position.stride, padding=radius - beyond, groups=len(depthwise))
        out = self.activation(_search_norm(out))  # (B, mid, H / stride, W / stride)
        if self.se is not None:
            fc1, fc2, kept = self.se.fc1, self.se.fc2, slice(self.width)  # 1x1 convolutions of single pixels: matrices
            scale = self.activation(F.linear(out.mean((2, 3)), fc1.weight[:, kept, 0, 0], fc1.bias))
            scale = torch.sigmoid(F.linear(scale, fc2.weight[kept, :, 0, 0], fc2.bias[kept]))
            out = out * scale[:, :, None, None]
        out = _search_norm(F.conv2d(out, project))  # (B, out, H / stride, W / stride)
        return x + out if self.residual else out

    @torch.no_grad()
    def inherit(self, larger: ElasticMBConv) -> None:
        """Take over the centre of a larger candidate's kernels, and its strongest channels where it has more."""
        norm = larger.depthwise_weight[:larger.width].abs().sum(dim=(1, 2, 3))
        source = norm.topk(self.width).indices
        size, edge = self.operation.kernel_size, (larger.operation.kernel_size - self.operation.kernel_size) // 2
        self.expand_weight[:self.width] = larger.expand_weight[source]
        self.depthwise_weight[:self.width] = larger.depthwise_weight[source, :, edge:edge + size, edge:edge + size]
        self.project_weight[:, :self.width] = larger.project_weight[:, source]

    @torch.no_grad()
    def copy_to(self, block: MBConv) -> None:
        """Copy the kept weights into an MBConv of the same shape."""
        expand, depthwise, project = self._weights()
        block.expand[0].weight.copy_(expand)
        block.depthwise[0].weight.copy_(depthwise)
        block.project[0].weight.copy_(project)
        if self.se is not None:
            block.se.fc1.weight.copy_(self.se.fc1.weight[:, :self.width])
            block.se.fc1.bias.copy_(self.se.fc1.bias)
            block.se.fc2.weight.copy_(self.se.fc2.weight[:self.width])
            block.se.fc2.bias.copy_(self.se.fc2.bias[:self.width])


class UpConv(nn.ConvTranspose2d):
    """2x2 transposed convolution of stride 2: (B, C, H, W) -> (B, out_channels, 2 H, 2 W).

    Computed as a 1x1 convolution whose outputs are then spread over 2x2 pixels: the same weights and result, sooner. (Not by
    F.pixel_shuffle, which wants the channels in another order and is slow in channels-last.)
    """

    plain = False  # True: layer by layer, as the paper describes it; for counting and comparing

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor, then: nn.Conv2d | None = None) -> Tensor:
        """`then`: a 1x1 convolution to apply to the result. Both are linear, so that they are one: the product of the weights."""
        if self.plain:
            return super().forward(x) if then is None else then(super().forward(x))
        weight, bias = self.weight, self.bias  # (in, out, 2, 2), (out,)
        if then is not None:
            mix = then.weight[:, :, 0, 0]
            weight, bias = torch.einsum("iojk,po->ipjk", weight, mix), mix @ bias + then.bias
        batch, channels, height, width = x.shape
        out = F.conv2d(x, weight.permute(2, 3, 1, 0).reshape(-1, channels, 1, 1), bias.repeat(4))  # (B, 2 * 2 * out, H, W)
        out = out.permute(0, 2, 3, 1).reshape(batch, height, width, 2, -1).transpose(2, 3)  # (B, H, 2, W, 2 * out)
        return out.reshape(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


class DecoderLevel(nn.Module):
    """Concatenate the skip, some convolutions, one 2x2 transposed convolution that doubles the size."""

    def __init__(self, convs: list[nn.Module], channels: int, out_channels: int):
        super().__init__()
        self.convs = nn.Sequential(*convs)
        self.up = UpConv(channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None, then: nn.Conv2d | None = None) -> Tensor:
        return self.up(self.convs(x if skip is None else torch.cat((x, skip), 1)), then)


class Decoder(nn.Module):
    """The decoder of D-NAS and DC-NAS: levels 4..1 and a 1x1 convolution to the image; it is not searched.

    Takes the outputs of stages 2 to 6 and returns the image. `kind`: "conv": two 3x3 convolutions a level; "mb": two
    MB-k3-e3; "mb-1": one of them; "mb-3level": two, but level 4 keeps only its transposed convolution (Markhorst 2024,
    table 6). The papers do not state its widths; here each level has the width of the encoder stage of its size, and hands
    up the width of the next one (112 -> 80 -> 40 -> 24 -> 16).
    """

    def __init__(self, stage_channels: list[int], norm_layer=nn.BatchNorm2d, kind: str = "conv"):
        super().__init__()
        s2, s3, s4, s5, s6 = stage_channels

        def level(in_channels: int, channels: int, out_channels: int) -> DecoderLevel:
            sources = [in_channels] if kind == "mb-1" else [in_channels, channels]
            convs = [Conv2dNormActivation(source, channels, 3, norm_layer=norm_layer) if kind == "conv"
                     else MBConv(source, 3 * source, channels, norm_layer=norm_layer) for source in sources]
            return DecoderLevel(convs, channels, out_channels)

        self.levels = nn.ModuleList([DecoderLevel([], s6, s4) if kind == "mb-3level" else level(s6, s5, s4),
                                     level(s4 + s4, s4, s3), level(s3 + s3, s3, s2), level(s2 + s2, s2, s2)])
        self.image = nn.Conv2d(s2, 3, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        s2, s3, s4, _, x = features
        for level, skip in zip(self.levels, (None, s4, s3)):
            x = level(x, skip)
        return self.levels[-1](x, s2, then=self.image)


# ---------------------------------------------------------------------------------------------------------------
# Networks


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the right and the bottom to multiples of `multiple`: mirrored, or repeated where too small."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    if not bottom and not right:
        return x
    mirrored = bottom < x.shape[-2] and right < x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), mode="reflect" if mirrored else "replicate")


def add_normalisation(network: nn.Module) -> None:
    """Give a network the buffers `mean` and `std`, ImageNet's: what the papers' pipelines use, and near enough for others."""
    network.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
    network.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)


@torch.no_grad()
def begin_smooth(network: nn.Module) -> None:
    """Give half of the variance of every fresh k x k kernel (k > 1) to its mean; the whole variance stays.

    Not in the papers. A kernel of independent weights passes on no more of a smooth image than of white noise, and after a few
    such layers what the noise hides is gone: of the colours of the default data, a linear map of the last features of a
    fresh decoder finds at most 1 % of the variance, and 7 to 24 % after this. 25 epochs then learn them, which else stay grey
    (README, differences from the papers). Classification wants the opposite: a supernet whose blocks all began like this did
    not learn to classify.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            mean, k = module.weight.mean((2, 3), keepdim=True), module.kernel_size[0]
            rest = (module.weight - mean) * (k / math.sqrt(k * k - 1))
            module.weight.copy_((rest + k * mean) * math.sqrt(0.5))


class Head(nn.Sequential):
    """1x1 convolution, average pool, dropout, linear: (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.0,
                 norm_layer=nn.BatchNorm2d):
        super().__init__(Conv2dNormActivation(in_channels, channels, 1, norm_layer=norm_layer, activation_layer=nn.SiLU),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, num_classes))


class Network(nn.Module):
    """C-NAS, D-NAS or DC-NAS from its record (Markhorst 2024, fig. 7).

    forward: (B, 3, H, W), clean images in [0, 1] plus noise, any H and W, -> Output(image (B, 3, H, W), logits (B, K)).
    Padding and cropping happen inside, and so does the normalisation, after the noise, so that PSNR is measured on
    [0, 1]. `make_block(block, drop_connect)` builds one block: the supernet passes its own.
    """

    def __init__(self, arch: Arch, dropout: float = 0.0, drop_connect: float = 0.0, make_block=None,
                 norm_layer=nn.BatchNorm2d):
        super().__init__()
        self.arch = arch
        self.denoises, self.classifies = arch.denoises, arch.classifies
        self.parallel = False  # denoising and classification branch at the same time, on two CUDA streams; see `fast`
        make_block = make_block or build_block
        add_normalisation(self)
        self.stem = Conv2dNormActivation(3, arch.stem_channels, 3, 2, norm_layer=norm_layer)
        stages: dict[int, list[nn.Module]] = {}
        for index, block in enumerate(arch.blocks):
            rate = drop_connect * index / len(arch.blocks)  # grows with depth
            stages.setdefault(block.stage, []).append(make_block(block, rate))
        modules = {number: nn.Sequential(*blocks) for number, blocks in stages.items()}
        self.encoder = nn.ModuleList(m for number, m in modules.items() if number <= LAST_ENCODER_STAGE)
        self.tail = nn.ModuleList(m for number, m in modules.items() if number > LAST_ENCODER_STAGE)
        channels = {block.stage: block.out_channels for block in arch.blocks}
        self.decoder = (Decoder([channels[number] for number in range(2, LAST_ENCODER_STAGE + 1)], norm_layer, arch.decoder)
                        if arch.denoises else None)
        self.head = (Head(arch.blocks[-1].out_channels, arch.head_channels, arch.num_classes, dropout, norm_layer)
                     if arch.classifies else None)
        if arch.denoises:  # what the image goes through at the size of stage 2
            begin_smooth(nn.ModuleList([self.stem, self.encoder[0], self.decoder]))

    def blocks(self) -> list[nn.Module]:
        """The blocks in the order of `arch.blocks`."""
        return [block for stage in (*self.encoder, *self.tail) for block in stage]

    def forward(self, x: Tensor) -> Output:
        return self.finish(self.begin(x), *x.shape[-2:])

    def begin(self, x: Tensor) -> Tensor:
        """Stem and stage 2, which are not searched: (B, 3, H, W) -> (B, 16, H / 2, W / 2)."""
        if self.decoder is not None:
            x = pad_to_multiple(x, ENCODER_STRIDE)
        return self.encoder[0](self.stem((x - self.mean) / self.std))

    def finish(self, x: Tensor, height: int, width: int) -> Output:
        """The rest of the network, for an image of height x width, from what `begin` returned."""
        features = [x]
        for stage in self.encoder[1:]:  # down to (B, 112, H / 16, W / 16)
            x = stage(x)
            features.append(x)
        if not (self.parallel and x.is_cuda and self.denoises and self.classifies):
            image = self._denoise(features, height, width) if self.denoises else None
            return Output(image, self._classify(x) if self.classifies else None)
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            image = self._denoise(features, height, width)
        logits = self._classify(x)
        main.wait_stream(side)
        for feature in features:  # the allocator must not hand them on before both streams are done with them
            feature.record_stream(side)
        image.record_stream(main)
        return Output(image, logits)

    def _denoise(self, features: list[Tensor], height: int, width: int) -> Tensor:
        return self.decoder(features)[..., :height, :width]

    def _classify(self, x: Tensor) -> Tensor:
        for stage in self.tail:  # (B, 320, H / 32, W / 32)
            x = stage(x)
        return self.head(x)


class SequentialNetwork(nn.Module):
    """A classifier on the image that a denoiser returns (Markhorst 2024, fig. 2.i and 7.iv); trained as one network."""

    denoises, classifies = True, True

    def __init__(self, denoiser: nn.Module, classifier: nn.Module):
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier
        self.takes_boxes = getattr(classifier, "takes_boxes", False)

    def forward(self, x: Tensor, *boxes: Tensor) -> Output:
        image = self.denoiser(x).image
        return Output(image, self.classifier(image, *boxes).logits)


def make_network(arch: Arch, dropout: float = 0.0, drop_connect: float = 0.0) -> nn.Module:
    """The network of a record with fresh weights."""
    if arch.model != "dcnas-seq":
        return Network(arch, dropout, drop_connect)
    return SequentialNetwork(Network(arch.with_model("dnas"), dropout, drop_connect),
                             Network(arch.with_model("cnas"), dropout, drop_connect))


def build_block(block: Block, drop_connect: float = 0.0, norm_layer=nn.BatchNorm2d) -> MBConv:
    """The MBConv that a record's block describes."""
    return MBConv(block.in_channels, block.mid_channels, block.out_channels, block.kernel_size, block.stride,
                  block.se_channels, block.activation, drop_connect, norm_layer)


# ---------------------------------------------------------------------------------------------------------------
# The network as fast as it can be

MODES = ("eager", "folded", "compile", "graph")


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norms are folded into the convolutions that they follow in a Sequential; it computes the
    same."""
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        for index in reversed(range(len(module) - 1 if isinstance(module, nn.Sequential) else 0)):
            if isinstance(module[index], nn.Conv2d) and isinstance(module[index + 1], nn.BatchNorm2d):
                module[index] = fuse_conv_bn_eval(module[index], module[index + 1])
                del module[index + 1]
    return folded


class Graphed(nn.Module):
    """A network captured in a CUDA graph for inputs of one shape and type; others run as they are.

    The outputs are overwritten by the next call: clone what must live longer.
    """

    def __init__(self, network: nn.Module, example: Tensor):
        super().__init__()
        self.network, self.input = network, example.clone()
        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries choose their kernels before the capture
                for _ in range(3):
                    network(self.input)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = network(self.input)

    def forward(self, x: Tensor) -> Output:
        if x.shape != self.input.shape or x.dtype != self.input.dtype:
            return self.network(x)
        self.input.copy_(x)
        self.graph.replay()
        return self.output


def fast(network: nn.Module, mode: str = "folded", example: Tensor | None = None) -> nn.Module:
    """A copy of a trained network for inference: the same outputs, sooner. Channels-last, on the network's device.

    "eager": as it is; "folded": batch norms folded, and on CUDA the two branches of a DC-NAS on two streams; "compile": that
    through torch.compile (needs a C++ compiler on a CPU, takes minutes); "graph": that in a CUDA graph for inputs like
    `example` (B, 3, H, W). Raises ValueError when the mode cannot be had here.
    """
    if mode not in MODES:
        raise ValueError(f"There is no mode {mode!r}; possible: {', '.join(MODES)}.")
    if mode == "graph" and (example is None or not example.is_cuda):
        raise ValueError("A CUDA graph needs a network and an example input on a CUDA device; use the mode folded.")
    if mode == "eager":
        return copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
    network = fold_batch_norm(network).to(memory_format=torch.channels_last)
    network.parallel = mode != "compile"  # streams are not for the compiler
    if mode == "compile":
        from torch._dynamo import config

        # All networks share the code of `forward`; beyond the limit, 8, further ones would silently run as they are.
        config.recompile_limit = max(config.recompile_limit, 1024)
        return torch.compile(network)
    return Graphed(network, example) if mode == "graph" else network


# ---------------------------------------------------------------------------------------------------------------
# The supernet


class MixedOp(nn.Module):
    """All candidates of one block. `choice` is the index of one of them, or weights (O,) to sum all of them with."""

    def __init__(self, position: Block, operations: tuple[Operation, ...], min_width: float = MIN_WIDTH):
        super().__init__()
        self.candidates = nn.ModuleList(ElasticMBConv(position, op, min_width) for op in operations)
        self.choice: int | Tensor = 0
        self.recompute = False  # forget what the candidates of a sum computed, and compute it again in the backward pass

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.choice, int):
            return self.candidates[self.choice](x)
        run = partial(recomputed, use_reentrant=False) if self.recompute else lambda candidate, x: candidate(x)
        return sum(weight * run(candidate, x) for weight, candidate in zip(self.choice, self.candidates))


class SinkStage(nn.Sequential):
    """The blocks of a stage, each of which may be its last: the sum of their outputs, weighted by softmax(beta) (TF-NAS).

    `beta` (blocks,) holds log probabilities. TF-NAS has the stage's input among them where it keeps the shape; in this
    backbone no first block does.
    """

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.beta = nn.Parameter(torch.full((len(blocks),), -math.log(len(blocks))))

    def forward(self, x: Tensor) -> Tensor:
        total = 0.0
        for weight, block in zip(F.softmax(self.beta, 0), self):
            x = block(x)
            total = total + weight * x
        return total


class SuperNet(nn.Module):
    """Every network of the space at once: weights, and a log probability `alpha` (blocks, operations).

    `model` says which parts the supernet has: "cnas" for a search by classification alone (the papers' best, table 4),
    "dcnas" for a search by both losses, "dnas" where there are no labels. `depth` "fixed" keeps all blocks (Markhorst 2024);
    "learned" searches how many each stage keeps (TF-NAS), by a log probability `beta` (blocks of the stage,) per stage.
    forward: (B, 3, H, W) and a choice: a list of one operation index per block, or weights (blocks, operations).
    """

    def __init__(self, model: str, space: int = 4, num_classes: int = 0, min_width: float = MIN_WIDTH,
                 depth: str = "fixed"):
        super().__init__()
        self.space, self.min_width = space, min_width
        self.operations = SPACES[space]
        positions = searched_positions(model)
        template = make_arch(model, [fill(position, self.operations[0]) for position in positions], num_classes)

        mixed: list[MixedOp] = []

        def make_block(block: Block, _) -> nn.Module:
            if block.stage == 2:
                return build_block(block, norm_layer=SearchNorm)
            mixed.append(MixedOp(positions[len(mixed)], self.operations, min_width))
            return mixed[-1]

        self.network = Network(template, make_block=make_block, norm_layer=SearchNorm)
        self.mixed = mixed  # the same modules as inside the network, in the order of alpha's rows
        self.alpha = nn.Parameter(torch.full((len(mixed), len(self.operations)), -math.log(len(self.operations))))
        self.betas: list[nn.Parameter] = []  # in the order of the stages with more than one block
        if depth == "learned":
            for stages in (self.network.encoder, self.network.tail):
                for index, stage in enumerate(stages):
                    if len(stage) > 1:
                        stages[index] = SinkStage(*stage)
                        self.betas.append(stages[index].beta)

    def weight_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.network.named_parameters() if not name.endswith(".beta")]

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alpha, *self.betas]

    def keep_probability(self) -> Tensor:
        """The probability that a block is kept, (blocks,): that the last block of its stage is this one or a later one."""
        values, betas = [], iter(self.betas)
        for stage in (*self.network.encoder, *self.network.tail):
            if isinstance(stage, SinkStage):
                values.append(F.softmax(next(betas), 0).flip(0).cumsum(0).flip(0))
            elif isinstance(stage[0], MixedOp):
                values.append(self.alpha.new_ones(len(stage)))
        return torch.cat(values)

    def kept(self) -> list[bool]:
        """The blocks that the found network keeps: those up to argmax(beta) in their stage."""
        result = []
        for stage in (*self.network.encoder, *self.network.tail):
            if isinstance(stage[0], MixedOp):
                last = int(stage.beta.argmax()) if isinstance(stage, SinkStage) else len(stage) - 1
                result += [index <= last for index in range(len(stage))]
        return result

    def forward(self, x: Tensor, choice: list[int] | Tensor) -> Output:
        return self.finish(self.begin(x), choice, *x.shape[-2:])

    def begin(self, x: Tensor) -> Tensor:
        """What no choice changes, to be computed once for several choices."""
        return self.network.begin(x)

    def finish(self, x: Tensor, choice: list[int] | Tensor, height: int, width: int) -> Output:
        """The rest of the supernet, for images of height x width, from what `begin` returned."""
        for mixed, chosen in zip(self.mixed, choice, strict=True):
            mixed.choice = chosen
        return self.network.finish(x, height, width)

    def _gumbel(self, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty(self.alpha.shape).exponential_(generator=generator)  # on the CPU: the same on any device
        return -noise.log().to(self.alpha.device)

    def sample_path(self, generator: torch.Generator | None = None) -> list[int]:
        """One operation per block by Gumbel softmax. (The largest is the same at every temperature.)"""
        return (self.alpha.detach() + self._gumbel(generator)).argmax(1).tolist()

    def other_path(self, path: list[int], generator: torch.Generator | None = None) -> list[int]:
        """One of the remaining operations per block, uniformly: the second half of TF-NAS's bi-sampling."""
        steps = torch.randint(1, len(self.operations), (len(path),), generator=generator).tolist()
        return [(index + step) % len(self.operations) for index, step in zip(path, steps)]

    def largest_path(self) -> list[int]:
        """The plain operation with the largest kernel and expansion in every block."""
        sizes = [(not operation.se, operation.kernel_size, operation.expansion) for operation in self.operations]
        return [sizes.index(max(sizes))] * len(self.mixed)

    def inherit_(self) -> None:
        """Give every candidate the weights of the largest one of its block, as far as they fit.

        Squeeze-and-excitation keeps its first weights: it scales all channels about alike, which the norm undoes.
        """
        for mixed, largest in zip(self.mixed, self.largest_path()):
            for index, candidate in enumerate(mixed.candidates):
                if index != largest:
                    candidate.inherit(mixed.candidates[largest])

    def mixture(self, temperature: float, generator: torch.Generator | None = None) -> Tensor:
        """Gumbel-softmax weights (blocks, operations) for the step of alpha, differentiable."""
        return F.softmax((self.alpha + self._gumbel(generator)) / temperature, 1)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Make alpha and beta log probabilities again, as TF-NAS does after each step."""
        for parameter in self.arch_parameters():
            parameter.copy_(F.log_softmax(parameter, -1))

    def entropy(self) -> Tensor:
        """Entropy of each block's softmax(alpha) divided by its maximum, log(operations): 1 undecided, 0 decided."""
        log_p = F.log_softmax(self.alpha.detach(), 1)
        return -(log_p.exp() * log_p).sum(1) / math.log(len(self.operations))

    def candidate_blocks(self) -> list[list[Block]]:
        """What each candidate is in a record, at its present width: one list per block."""
        return [[candidate.block for candidate in mixed.candidates] for mixed in self.mixed]

    def expected_latency(self, latency_ms: Tensor, base_ms: float) -> Tensor:
        """LAT = base + sum over blocks of sum_i softmax(alpha)_i * LAT(op_i), in ms (thesis, eq. 3.10).

        `latency_ms` (blocks, operations) holds the table's value of each candidate. TF-NAS's code weighs with the Gumbel
        sample of the outputs instead; softmax(alpha) is the thesis's form and has no sampling noise. With learned depth a
        stage's is the sum over b of softmax(beta)_b * LAT(blocks 1 to b), that is, each block counts as it is likely kept.
        """
        return base_ms + ((F.softmax(self.alpha, 1) * latency_ms).sum(1) * self.keep_probability()).sum()

    def best_path(self) -> list[int]:
        return self.alpha.argmax(1).tolist()

    def arch(self, path: list[int] | None = None) -> Arch:
        """The record of one path, the likeliest by default, at the present widths, as the supernet's own model."""
        path = self.best_path() if path is None else path
        blocks = [row[index] for row, index, kept in zip(self.candidate_blocks(), path, self.kept(), strict=True) if kept]
        return make_arch(self.network.arch.model, blocks, self.network.arch.num_classes)

    def set_widths(self, path: list[int], mid_channels: list[int]) -> list[nn.Parameter]:
        """Set the widths of the operations on `path` (elasticity scaling); returns the parameters that were reordered."""
        moved = []
        for mixed, index, mid in zip(self.mixed, path, mid_channels, strict=True):
            moved += mixed.candidates[index].set_width(mid)
        return moved

    @torch.no_grad()
    def copy_to(self, network: Network, path: list[int]) -> None:
        """Copy the weights of one path, at its present widths, into the network built from `arch(path)`."""
        targets = iter(network.blocks()[1:])  # without stage 2
        for mixed, index, kept in zip(self.mixed, path, self.kept(), strict=True):
            if kept:
                mixed.candidates[index].copy_to(next(targets))
        fixed = {name: value for name, value in self.network.state_dict().items() if ".candidates." not in name}
        network.load_state_dict(fixed, strict=False)


# ---------------------------------------------------------------------------------------------------------------
# Named models


def _uniform(model: str, operation: Operation, num_classes: int) -> Arch:
    return make_arch(model, [fill(position, operation) for position in searched_positions(model)], num_classes)


# One entry per model: name -> function of num_classes that returns its record. "dcnas-k5-e6" is a DC-NAS whose every
# searched block is MB-k5-e6 at its starting width: the corners of the space, to train and time without a search.
NAMED = {f"{model}-{operation.name}": partial(_uniform, model, operation)
         for model in MODELS for operation in SPACES[4]}


def random_arch(model: str, space: int, rng: random.Random, num_classes: int = 0, min_width: float = MIN_WIDTH) -> Arch:
    """A network drawn from the space: operations uniformly, widths uniformly from their range in steps."""
    blocks = []
    for position in searched_positions(model):
        operation = rng.choice(SPACES[space])
        low, high = width_range(operation, position.in_channels, min_width)
        blocks.append(fill(position, operation, rng.randrange(low, high + 1, WIDTH_STEP)))
    return make_arch(model, blocks, num_classes)


PAPER_SIZE = 224  # pixels, the input of Markhorst 2024, section 4


def named_arch(name: str, num_classes: int = 0) -> Arch:
    """The record of a named model; raises ValueError with the names when it is unknown."""
    if name not in NAMED:
        raise ValueError(f"There is no model named {name!r}; python models.py lists them: {', '.join(NAMED)}.")
    return NAMED[name](num_classes)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, size: int) -> int:
    """Multiply-accumulates of one (3, size, size) image, what the papers call FLOPs: convolutions and linear layers."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = copy.deepcopy(network).to("meta").eval()  # shapes only: nothing is computed
    for module in counted.modules():
        if isinstance(module, UpConv):
            module.plain = True
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted(torch.empty(1, channels_of(network), size, size, device="meta"))
    return counter.get_total_flops() // 2  # the counter counts 2 per multiply-accumulate


# ---------------------------------------------------------------------------------------------------------------
# Files: JSON that describes itself, and checkpoints

ARCH_FORMAT, ARCH_VERSION = "joint-arch", 1
CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "joint-checkpoint", 1


def provenance(device_name: str, seed: int | None = None) -> dict:
    """How a file was made: command, date (UTC), seed, commit of this code if it is a checkout, versions, device."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "seed": seed,
            "commit": commit, "torch": str(torch.__version__), "python": platform.python_version(),
            "device": device_name}


def write_file(path: str | Path, write) -> None:
    """Call `write(temporary_path)` and rename, so that `path` holds the old content or all of the new one, whatever happens."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # on the disk before the old content goes: a crash of the machine must not lose both
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: dict) -> None:
    """Write strict JSON (no NaN) beside and rename."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text))


def read_json(path: str | Path, format: str | tuple[str, ...], version: int, remedy: str) -> dict:
    """The object in a JSON file of this format (or one of these) and version; ValueError in one sentence, ending in `remedy`,
    if not."""
    formats = (format,) if isinstance(format, str) else format
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); {remedy}.") from None
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not valid JSON; {remedy}.") from None
    if not isinstance(content, dict) or content.get("format") not in formats:
        raise ValueError(f"{path} is not a {' or '.join(formats)} file; {remedy}.")
    if content.get("version") != version:
        raise ValueError(f"{path} has version {content.get('version')!r} of {content['format']}, and this code reads "
                         f"version {version}; {remedy}.")
    return content


def make_record(arch: Arch, made: dict, **more) -> dict:
    """A record as it goes to disk: format, version, method, how it was made, anything `more`, and the architecture."""
    return {"format": ARCH_FORMAT, "version": ARCH_VERSION, "method": "tfnas", "made": made, **more, **arch.to_dict()}


def design_record(method: str, design, made: dict, **more) -> dict:
    """The record of a design of superkernel.py or hinas.py."""
    return {"format": ARCH_FORMAT, "version": ARCH_VERSION, "method": method, "made": made, "model": method, **more,
            "design": design.to_dict()}


def load_record(path: str | Path) -> dict:
    """Read and check an `arch.json`; ValueError in one sentence when it is missing, damaged or not valid."""
    record = read_json(path, ARCH_FORMAT, ARCH_VERSION, "make one with: python search.py --target 12")
    try:
        build_network(record)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None  # a name in it may have a line break
    return record


# One entry per search method: the record's `method` -> function of (record, dropout, drop_connect) -> network.
METHODS = {
    "tfnas": lambda record, dropout, drop_connect: make_network(Arch.from_dict(record), dropout, drop_connect),
    "named": lambda record, dropout, drop_connect: _baseline(record),
    "superkernel": lambda record, dropout, drop_connect: _of_file("superkernel", record),
    "hinas": lambda record, dropout, drop_connect: _of_file("hinas", record),
}


def _of_file(method: str, record: dict) -> nn.Module:
    """The network of a record that another file of this project reads."""
    module = importlib.import_module(method)
    if not isinstance(record.get("design"), dict):
        raise ValueError(f"The record of a {method} network needs a design.")
    return module.build(module.Design.from_dict(record["design"]))


def _baseline(record: dict) -> nn.Module:
    """A network made by hand: its record has a name in baselines.py and the number of classes."""
    from baselines import build_baseline

    if not isinstance(record.get("model"), str) or not _is_count(record.get("num_classes")):
        raise ValueError("The record of a named model needs a model and num_classes.")
    try:
        return build_baseline(record["model"], record["num_classes"])
    except KeyError:
        raise ValueError(f"There is no model named {record['model']!r}; python models.py lists them.") from None


def named_record(name: str, num_classes: int, made: dict) -> dict:
    """The record of a named model, of the search space or made by hand."""
    if name in NAMED:
        return make_record(named_arch(name, num_classes), made)
    return {"format": ARCH_FORMAT, "version": ARCH_VERSION, "method": "named", "made": made, "model": name,
            "num_classes": num_classes}


def model_name(text: str) -> str:
    """A type for argparse: the name of a model."""
    if text not in NAMED:
        from baselines import find_baseline

        try:
            find_baseline(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"there is no model {text!r}; python models.py lists them") from None
    return text


def channels_of(network: nn.Module) -> int:
    """The channels of the images that a network takes: 3 where it does not say."""
    return getattr(network, "channels", 3)


def scale_of(network: nn.Module) -> int:
    """How many times larger than its input the image is that a network returns: its `scale`, if that is a whole number."""
    scale = getattr(network, "scale", 1)  # a network may have a parameter of this name
    return scale if isinstance(scale, int) else 1


def run(network: nn.Module, images: Tensor, boxes: Tensor | None = None) -> Output:
    """The network's output, with boxes (B, D, 4) for those that look at places of an image."""
    return network(images, boxes) if boxes is not None and getattr(network, "takes_boxes", False) else network(images)


@torch.no_grad()
def check_fits(network: nn.Module, name: str, size: int, boxes: Tensor | None = None) -> None:
    """ValueError in one sentence where a network cannot take images (channels, size, size), or their boxes (1, D, 4)."""
    was_training = network.training
    device = next(network.parameters()).device
    try:
        output = run(network.eval(), torch.zeros(1, channels_of(network), size, size, device=device), boxes)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(f"The model {name} cannot take images of {size}x{size} pixels ({reason}); try another "
                         "--size.") from None
    finally:
        network.train(was_training)
    digits = 1 if boxes is None else boxes.shape[1]
    if output.logits is not None and len(output.logits) != digits:
        raise ValueError(f"The model {name} classifies whole images, but these have {digits} digits each; take one that "
                         "looks at boxes, such as dcnet-s, or other --data.")


def build_network(record: dict, dropout: float = 0.0, drop_connect: float = 0.0) -> nn.Module:
    """The network that a record describes, with fresh weights."""
    method = record.get("method") if isinstance(record, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"The search method {method!r} is unknown; known are {', '.join(METHODS)}.")
    return METHODS[method](record, dropout, drop_connect)


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write tensors, numbers, strings, lists and dicts beside, read it back, and rename.

    OSError in one sentence when it cannot be written (a full disk, say); what was at `path` is then still there.
    """
    content = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, **content}

    def write(temporary):
        try:
            torch.save(content, temporary)
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeErrors
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            raise OSError(f"The checkpoint {path} could not be written ({reason}); the one before it is intact: make room, "
                          "and go on with --resume.") from None

    write_file(path, write)


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Load a checkpoint without running anything in it; ValueError in one sentence when it is not one of ours."""
    if not Path(path).is_file():
        raise ValueError(f"There is no checkpoint at {path}; train one with: python train.py")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything, though it runs nothing
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({reason[:120]}).") from None
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project.")
    if content.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"{path} has checkpoint version {content.get('version')!r}, and this code reads version "
                         f"{CHECKPOINT_VERSION}; train again or use the code that wrote it.")
    return content


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The network of a checkpoint that train.py wrote (its averaged weights where there are any), in eval mode."""
    checkpoint = read_checkpoint(path, device)
    try:
        network = build_network(checkpoint["record"])
        network.load_state_dict(checkpoint.get("ema") or checkpoint["network"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} does not hold a trained network ({reason[:160]}).") from None
    return network.to(device, memory_format=torch.channels_last).eval(), checkpoint


# ---------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="models.py", usage="python models.py [options]",
        description="List every named model: parameters, and multiply-accumulates at its paper's input size.",
        epilog="examples:\n  python models.py\n  python models.py --json\n  python models.py --classes 10 --input 64",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--classes", type=int, default=100, metavar="N", help="classes of the classifiers (default: 100)")
    parser.add_argument("--input", type=int, default=None, metavar="PIXELS",
                        help="height and width of the input (default: the size in each model's paper)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    for flag in ("classes", "input"):
        if getattr(args, flag) is not None and not 1 <= getattr(args, flag) <= 65536:
            parser.error(f"--{flag} must be from 1 to 65536.")
    from baselines import BASELINES, paper_flops

    rows = []
    for name in (*NAMED, *BASELINES):
        network = build_network(named_record(name, args.classes, {}))
        paper = BASELINES.get(name)
        size = args.input or (paper.size if paper else PAPER_SIZE)
        counted = None
        if paper and paper.flops:  # of ten digits at the size in the paper, as the paper has them
            counted = paper_flops(paper.build(10), paper.size)
        try:
            macs = count_macs(network, size)
        except RuntimeError as error:
            parser.error(f"{name} cannot take an input of {size} pixels ({str(error).splitlines()[0][:80]}); give a larger "
                         "--input.")
        rows.append({"name": name, "denoises": network.denoises, "classifies": network.classifies, "input_px": size,
                     "parameters": count_parameters(network), "macs": macs,
                     "paper_flops": paper.flops if paper else None, "counted_flops": counted})
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'model':<18} {'denoises':>8} {'classifies':>10} {'input':>6} {'parameters':>12} {'MACs':>11} "
          f"{'paper FLOPs':>12} {'counted so':>12}")
    for row in rows:
        flops = "".join(f" {value / 1e6:>10.3f} M" if value else f" {'-':>12}" for value in
                        (row["paper_flops"], row["counted_flops"]))
        print(f"{row['name']:<18} {'yes' if row['denoises'] else '-':>8} {'yes' if row['classifies'] else '-':>10} "
              f"{row['input_px']:>6} {row['parameters']:>12,} {row['macs'] / 1e6:>9.2f} M{flops}")
    print("A UNet of any parameters: unet-b8-d4-m1.5-c2, and with MBConvs unet-b8-d4-m1.5-c2-mb. The papers' FLOPs have biases "
          "and max pools in them.")


if __name__ == "__main__":
    main()
