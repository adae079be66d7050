"""Networks that denoise and classify, the supernet to search them in, and the registry of named models.

    python models.py                 # lists the named models: parameters, multiply-accumulates
    python models.py --json          # the same as JSON

    from models import Network, named_arch
    image, logits = Network(named_arch("dcnas-k3-e3", num_classes=10))(torch.rand(1, 3, 64, 64))

C-NAS classifies, D-NAS denoises, DC-NAS does both with one encoder (Markhorst, van Gemert and Kayhan, "Pushing Joint
Image Denoising and Classification to the Edge", 2024, fig. 7); UNet and DC-Net are those of its section 3. Search
space and supernet come from TF-NAS (Hu, Wu and He, 2020). Reads and writes no files. Needs torch and torchvision only
and works when copied alone; the registry then has the networks of this file.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation, StochasticDepth, roi_align

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
MODELS = ("cnas", "dnas", "dcnas", "dcnas-seq")
DECODERS = ("conv", "mb", "mb-1", "mb-3level")


class Output(NamedTuple):
    """What every network returns: `image` (B, 3, H, W) or None, `logits` (B, num_classes) or None."""

    image: Tensor | None
    logits: Tensor | None


# --- Blocks -----------------------------------------------------------------------------------------------------


class MBConv(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection.

    (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), sizes rounded up. There is no expansion when
    mid_channels equals in_channels, and a residual when the shape stays. `drop_connect`: probability that training
    drops the block for a sample. Source: MobileNetV2, with the squeeze width and activation of TF-NAS, which
    torchvision's MBConv does not allow. As in TF-NAS only squeeze-and-excitation has biases; they start with torch's
    random values (TF-NAS: zeros). ValueError if mid_channels < in_channels.
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
        self.project = layer(mid_channels, out_channels, 1, activation_layer=None)
        self.drop_connect = StochasticDepth(drop_connect, "row") if drop_connect else nn.Identity()
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.se(self.depthwise(self.expand(x))))
        return x + self.drop_connect(out) if self.residual else out


class UpConv(nn.ConvTranspose2d):
    """2x2 transposed convolution of stride 2: (B, C, H, W) -> (B, out_channels, 2 H, 2 W).

    Computed as a 1x1 convolution whose outputs are spread over 2x2 pixels: the same weights and result, but faster.
    (F.pixel_shuffle needs another order of channels and is slow in channels-last.)
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 2, stride=2)

    def layer_by_layer(self, x: Tensor, then: nn.Conv2d | None = None) -> Tensor:
        """The same result layer by layer, as the paper describes it: to count operations and to compare speed."""
        return super().forward(x) if then is None else then(super().forward(x))

    def forward(self, x: Tensor, then: nn.Conv2d | None = None) -> Tensor:
        """`then`: a 1x1 convolution to apply to the result; as both are linear, their weights are multiplied."""
        weight, bias = self.weight, self.bias  # (in, out, 2, 2), (out,)
        if then is not None:
            mix = then.weight[:, :, 0, 0]
            weight, bias = torch.einsum("iojk,po->ipjk", weight, mix), mix @ bias + then.bias
        batch, channels, height, width = x.shape
        weight = weight.permute(2, 3, 1, 0).reshape(-1, channels, 1, 1)
        out = F.conv2d(x, weight, bias.repeat(4))  # (B, 2 * 2 * out, H, W)
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
    """The decoder of D-NAS and DC-NAS, which is not searched: levels 4 to 1, and a 1x1 convolution to the image.

    forward: outputs of stages 2 to 6 -> image. `kind`: "conv": two 3x3 convolutions a level; "mb": two MB-k3-e3; "mb-1":
    one; "mb-3level": two, but level 4 is only its transposed convolution (Markhorst 2024, table 6). The papers do not
    state widths; here a level has those of the encoder stage of its size and gives the next level its width (112 -> 80
    -> 40 -> 24 -> 16). They do not state the activation either; here it is ReLU.
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


class Head(nn.Sequential):
    """1x1 convolution, average pool, dropout, linear: (B, C, H, W) -> (B, num_classes).

    The bias of the linear layer starts with torch's random values (TF-NAS: zeros).
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.0,
                 norm_layer=nn.BatchNorm2d):
        super().__init__(
            Conv2dNormActivation(in_channels, channels, 1, norm_layer=norm_layer, activation_layer=nn.SiLU),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, num_classes))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the right and bottom to multiples: mirrored, or border repeated if the image is too small."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    if not bottom and not right:
        return x
    mirrored = bottom < x.shape[-2] and right < x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), mode="reflect" if mirrored else "replicate")


def add_normalisation(network: nn.Module) -> None:
    """Give a network the buffers `mean` and `std` (1, 3, 1, 1) of ImageNet, as in the papers, whatever the data."""
    network.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
    network.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)


@torch.no_grad()
def begin_smooth(network: nn.Module) -> None:
    """Give half of the variance of every fresh k x k kernel (k > 1) to its mean; the total variance stays.

    Not in the papers. A kernel of independent weights does not prefer smooth images to white noise, and after a few such
    layers colours hidden by noise are lost: of their variance in the default data, a linear map of the last features of
    a fresh decoder finds at most 1 %, and 7 to 24 % with smooth kernels. Without them 25 epochs end with grey images.
    `Network` applies it to the layers on the image's way where it denoises. All other layers start with torch's own
    kernels: a supernet with smooth blocks did not learn to classify. So do C-NAS, UNet, DC-Net and the networks of
    baselines.py: a comparison of DC-NAS with them compares this start as well.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            mean, k = module.weight.mean((2, 3), keepdim=True), module.kernel_size[0]
            rest = (module.weight - mean) * (k / math.sqrt(k * k - 1))
            module.weight.copy_((rest + k * mean) * math.sqrt(0.5))


# --- Networks ---------------------------------------------------------------------------------------------------

LAST_ENCODER_STAGE = 6  # D-NAS ends here; in DC-NAS the decoder and the classification branch start here
ENCODER_STRIDE = 16


class Network(nn.Module):
    """C-NAS, D-NAS or DC-NAS from its record (Markhorst 2024, fig. 7).

    forward: (B, 3, H, W), images in [0, 1] plus noise, any H and W -> Output(image (B, 3, H, W), logits (B, K)). Padding,
    cropping and the normalisation of the noisy input happen inside, so that PSNR is measured on [0, 1]. The drop-connect
    of block i of n is drop_connect * i / n; i starts at 0 with stage 2 (TF-NAS: at 1). `make_block(block, drop_connect)`
    builds one block: the supernet gives its own.
    """

    def __init__(self, arch: Arch, dropout: float = 0.0, drop_connect: float = 0.0, make_block=None,
                 norm_layer=nn.BatchNorm2d):
        super().__init__()
        self.arch = arch
        self.denoises, self.classifies = arch.denoises, arch.classifies
        self.parallel = False  # decoder and classification branch at the same time on two CUDA streams; latency.fast
        make_block = make_block or build_block
        add_normalisation(self)
        self.stem = Conv2dNormActivation(3, arch.stem_channels, 3, 2, norm_layer=norm_layer)
        stages: dict[int, nn.Sequential] = {}
        for index, block in enumerate(arch.blocks):
            rate = drop_connect * index / len(arch.blocks)
            stages.setdefault(block.stage, nn.Sequential()).append(make_block(block, rate))
        self.encoder = nn.ModuleList(stage for number, stage in stages.items() if number <= LAST_ENCODER_STAGE)
        self.tail = nn.ModuleList(stage for number, stage in stages.items() if number > LAST_ENCODER_STAGE)
        widths = {block.stage: block.out_channels for block in arch.blocks}
        self.decoder = (Decoder([widths[number] for number in range(2, LAST_ENCODER_STAGE + 1)], norm_layer,
                                arch.decoder) if arch.denoises else None)
        self.head = (Head(arch.blocks[-1].out_channels, arch.head_channels, arch.num_classes, dropout, norm_layer)
                     if arch.classifies else None)
        if arch.denoises:  # the layers that the image passes at the size of stage 2
            begin_smooth(nn.ModuleList([self.stem, self.encoder[0], self.decoder]))

    def blocks(self) -> list[nn.Module]:
        """The blocks in the order of `arch.blocks`."""
        return [block for stage in (*self.encoder, *self.tail) for block in stage]

    def forward(self, x: Tensor) -> Output:
        return self.from_stem(self.encode_stem(x), *x.shape[-2:])

    def encode_stem(self, x: Tensor) -> Tensor:
        """Stem and stage 2, which are not searched: (B, 3, H, W) -> (B, 16, H / 2, W / 2)."""
        if self.decoder is not None:
            x = pad_to_multiple(x, ENCODER_STRIDE)
        return self.encoder[0](self.stem((x - self.mean) / self.std))

    def from_stem(self, x: Tensor, height: int, width: int, choices: list[tuple] | None = None) -> Output:
        """The other layers, from the result of `encode_stem`, for an image of height x width pixels.

        `choices`: what each stage from 3 on takes beside its input, a tuple each; in a supernet only.
        """
        in_encoder = len(self.encoder) - 1
        choices = choices or [()] * (in_encoder + len(self.tail))
        features = [x]
        for stage, choice in zip(self.encoder[1:], choices):  # down to (B, 112, H / 16, W / 16)
            x = stage(x, *choice)
            features.append(x)
        choices = choices[in_encoder:]
        if not (self.parallel and x.is_cuda and self.denoises and self.classifies):
            image = self._denoise(features, height, width) if self.denoises else None
            return Output(image, self._classify(x, choices) if self.classifies else None)
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            image = self._denoise(features, height, width)
        logits = self._classify(x, choices)
        main.wait_stream(side)
        for feature in features:  # keeps their memory until both streams have finished with them
            feature.record_stream(side)
        image.record_stream(main)
        return Output(image, logits)

    def _denoise(self, features: list[Tensor], height: int, width: int) -> Tensor:
        return self.decoder(features)[..., :height, :width]

    def _classify(self, x: Tensor, choices: list[tuple]) -> Tensor:
        for stage, choice in zip(self.tail, choices):  # (B, 320, H / 32, W / 32)
            x = stage(x, *choice)
        return self.head(x)


class SequentialNetwork(nn.Module):
    """A classifier on the image that a denoiser returns (Markhorst 2024, fig. 2.i, 7.iv); trained as one network."""

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


# --- UNet and DC-Net of the controlled study (Markhorst 2024, section 3 and supplement A) -------------------------

DIGIT = 28  # pixels, height and width of a digit of MNIST


def cut_out(x: Tensor, boxes: Tensor, size: int, stride: int = 1) -> Tensor:
    """Cut boxes out of maps: (B, C, H, W), (B, D, 4) -> (B * D, C, size, size).

    Boxes are (left, top, right, bottom) in pixels of the image; a map pixel covers `stride` x `stride` of them. Between
    map pixels the values are interpolated; at stride 1 a box of `size` pixels is copied exactly.
    """
    image = torch.arange(len(x), device=x.device).repeat_interleave(boxes.shape[1])
    rows = torch.cat((image[:, None], boxes.flatten(0, 1)), 1).float()  # (B * D, 5); half precision cannot count images
    return roi_align(x.float(), rows, size, 1 / stride, sampling_ratio=1, aligned=True).to(x.dtype)


def group_norm(channels: int) -> nn.Module:
    """Group norm of one group, which fits every width; the paper does not state the number of groups."""
    return nn.GroupNorm(1, channels)


def study_mbconv(in_channels: int, out_channels: int, expansion: float) -> nn.Sequential:
    """The study's MBConv: always with expansion and biases; the paper does not say where it is normalised."""
    mid = round(expansion * in_channels)
    return nn.Sequential(nn.Conv2d(in_channels, mid, 1), group_norm(mid), nn.ReLU(),
                         nn.Conv2d(mid, mid, 3, padding=1, groups=mid), group_norm(mid), nn.ReLU(),
                         nn.Conv2d(mid, out_channels, 1))


class UNet(nn.Module):
    """UNet(b, d, m, c): d levels, level i with int(b * m**i) channels, c 3x3 convolutions a level (fig. 2).

    Max pool down, 2x2 transposed convolution up, concatenation, 1x1 convolution to the image; all padded. (B, 3, H, W)
    of any size -> the same. The paper states no norm; here batch norm and ReLU follow each convolution. `expansion`:
    `study_mbconv` instead of convolutions. ValueError if b, d or c gives no channels or layers.
    """

    denoises, classifies = True, False

    def __init__(self, b: int, d: int, m: float, c: int, expansion: float | None = None):
        super().__init__()
        self.widths = [int(b * m**level) for level in range(d)]
        if min(self.widths, default=0) < 1 or c < 1:
            raise ValueError(f"A UNet needs b, d and c of 1 or more, not b {b}, d {d}, m {m}, c {c}.")

        def level(in_channels: int, channels: int) -> nn.Sequential:
            layers = []
            for source in (in_channels, *[channels] * (c - 1)):
                layers += [nn.Conv2d(source, channels, 3, padding=1) if expansion is None
                           else study_mbconv(source, channels, expansion), nn.BatchNorm2d(channels), nn.ReLU()]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(level(before, width) for before, width in zip([3, *self.widths], self.widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deeper, width, 2, stride=2)
                                for width, deeper in zip(self.widths, self.widths[1:]))
        self.merge = nn.ModuleList(level(2 * width, width) for width in self.widths[:-1])
        self.image = nn.Conv2d(self.widths[0], 3, 1)
        self.pool = nn.MaxPool2d(2)
        self.stride = 2 ** (d - 1)  # of the deepest features

    def encode(self, x: Tensor) -> list[Tensor]:
        """The features of every level, finest first."""
        features = []
        for index, level in enumerate(self.down):
            x = level(self.pool(x) if index else x)
            features.append(x)
        return features

    def decode(self, features: list[Tensor]) -> Tensor:
        """The image (B, 3, H, W) from the features of every level."""
        x = features[-1]
        for skip, up, merge in reversed(list(zip(features[:-1], self.up, self.merge, strict=True))):
            x = merge(torch.cat((up(x), skip), 1))
        return self.image(x)

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        return Output(self.decode(self.encode(pad_to_multiple(x, self.stride)))[..., :height, :width], None)


class DCNet(nn.Module):
    """DC-Net Integrated: a classifier on the deepest features of a UNet (section 3.1, fig. 2.ii).

    forward: (B, 3, H, W) -> image and logits (B, K); with boxes (B, D, 4) each is cut out of the deepest features, and
    the logits are (B * D, K). The paper does not show the branch, and its FLOPs leave little room; here: 1x1 convolution
    to 24 channels, group norm, ReLU, global max pool, linear. `branch`: another module from features to logits.
    """

    denoises, classifies, takes_boxes = True, True, True

    def __init__(self, unet: UNet, num_classes: int = 10, branch: nn.Module | None = None):
        super().__init__()
        self.unet = unet
        self.branch = branch or nn.Sequential(nn.Conv2d(unet.widths[-1], 24, 1), group_norm(24), nn.ReLU(),
                                              nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, num_classes))

    def forward(self, x: Tensor, boxes: Tensor | None = None) -> Output:
        height, width = x.shape[-2:]
        features = self.unet.encode(pad_to_multiple(x, self.unet.stride))
        deepest = features[-1]
        if boxes is not None:
            deepest = cut_out(deepest, boxes, -(-DIGIT // self.unet.stride), self.unet.stride)
        return Output(self.unet.decode(features)[..., :height, :width], self.branch(deepest))


# --- The search space and the record (Markhorst 2024, supplement B; TF-NAS, table 1) ------------------------------


class Stage(NamedTuple):
    """One searched stage of the backbone; the papers number the stem convolution stage 1."""

    number: int
    out_channels: int
    blocks: int
    stride: int  # of the first block
    activation: str


STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
STAGES = (Stage(3, 24, 2, 2, "relu"), Stage(4, 40, 3, 2, "silu"), Stage(5, 80, 4, 2, "silu"),
          Stage(6, 112, 4, 1, "silu"), Stage(7, 192, 4, 2, "silu"), Stage(8, 320, 1, 1, "silu"))


@dataclass(frozen=True)
class Operation:
    """One candidate of a searched block: an MBConv of a kernel size and an expansion, with or without SE."""

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
        """The largest mid channels of the width fit: 4x or 8x the input (TF-NAS, elasticity scaling)."""
        return self.expansion * in_channels * 4 // 3

    def se_channels(self, in_channels: int) -> int:
        """Squeeze width: the input channels at expansion 3, twice that at 6 (TF-NAS)."""
        return self.expansion // 3 * in_channels if self.se else 0


_PLAIN, _SE = (tuple(Operation(k, e, se) for k in (3, 5) for e in (3, 6)) for se in (False, True))
SPACES = {4: _PLAIN, 6: _PLAIN + _SE[:2], 8: _PLAIN + _SE}

WIDTH_STEP = 8  # mid channels are multiples of this, as vector units and tensor cores prefer
MIN_WIDTH = 1.25  # smallest mid channels, as a multiple of the input channels


def round_width(channels: float) -> int:
    """The nearest multiple of WIDTH_STEP, at least one step."""
    return max(WIDTH_STEP, int(channels / WIDTH_STEP + 0.5) * WIDTH_STEP)


def width_range(operation: Operation, in_channels: int, min_width: float = MIN_WIDTH) -> tuple[int, int]:
    """Smallest and largest mid channels of `operation` on `in_channels`, both inclusive.

    The smallest is `min_width` times the input, and more than the input, so that the expansion stays. In TF-NAS it is
    half the largest; its fit stops there and misses low targets.
    """
    smallest = max(math.ceil(min_width * in_channels / WIDTH_STEP), in_channels // WIDTH_STEP + 1) * WIDTH_STEP
    return smallest, max(smallest, round_width(operation.max_width(in_channels)))


@dataclass(frozen=True)
class Block:
    """One MBConv of a network with all its numbers. `se_channels` 0 means no squeeze-and-excitation."""

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
    """A complete C-NAS, D-NAS, DC-NAS or sequential DC-NAS network: the content of `arch.json`.

    `blocks` are in order from stage 2; those after stage 6 exist only in a classifier. A "dcnas-seq" has stages 2 to 6
    twice, in its denoiser and in its classifier. `decoder`: see `Decoder`. ValueError if the blocks do not fit together.
    """

    model: str
    blocks: tuple[Block, ...]
    num_classes: int = 0
    stem_channels: int = STEM_CHANNELS
    head_channels: int = HEAD_CHANNELS
    decoder: str = "conv"

    def __post_init__(self):
        _require(self.model in MODELS, f"model must be one of {', '.join(MODELS)}, not {self.model!r}")
        _require(self.decoder in DECODERS, f"decoder must be one of {', '.join(DECODERS)}, not {self.decoder!r}")
        _require_counts(self, "stem_channels", "head_channels", *["num_classes"] * self.classifies)
        _require(self.classifies or self.num_classes == 0, "num_classes of a dnas must be 0")
        _require(0 < len(self.blocks) <= 256, "it needs 1 to 256 blocks")
        channels, stage = self.stem_channels, 2
        for number, block in enumerate(self.blocks):
            where = f"block {number}: "
            _require_counts(block, "stage", "in_channels", "mid_channels", "out_channels", where=where)
            _require(block.se_channels == 0 or _is_count(block.se_channels), f"{where}se_channels must be 0 or more")
            _require(block.in_channels == channels, f"{where}in_channels is {block.in_channels}, not {channels}")
            _require(block.mid_channels >= block.in_channels, f"{where}mid_channels is below in_channels")
            for name, values in (("kernel_size", (1, 3, 5, 7)), ("stride", (1, 2)), ("activation", (*ACTIVATIONS,))):
                _require(getattr(block, name) in values, f"{where}{name} must be one of {', '.join(map(str, values))}")
            _require(block.stage in (stage, stage + 1), f"{where}stage {block.stage} does not follow stage {stage}")
            channels, stage = block.out_channels, block.stage
        last = LAST_ENCODER_STAGE if self.model == "dnas" else STAGES[-1].number
        _require(self.blocks[0].stage == 2 and stage == last, f"a {self.model} has the stages 2 to {last}")
        for number in range(2, LAST_ENCODER_STAGE + 1) if self.denoises else ():
            stride = math.prod(block.stride for block in self.blocks if block.stage == number)
            expected = 1 if number in (2, 6) else 2  # the decoder doubles the size once per level
            _require(stride == expected, f"stage {number} must have a stride of {expected} in all")

    @property
    def denoises(self) -> bool:
        return self.model != "cnas"

    @property
    def classifies(self) -> bool:
        return self.model != "dnas"

    def to_dict(self) -> dict:
        """The record's content, for JSON."""
        content = asdict(self)
        return content | {"blocks": list(content.pop("blocks"))}

    @classmethod
    def from_dict(cls, content: dict) -> Arch:
        """The architecture in a record; ValueError in one sentence if a field is missing or wrong."""
        try:
            blocks = tuple(Block(**block) for block in content["blocks"])
            return cls(content["model"], blocks, content["num_classes"], content["stem_channels"],
                       content["head_channels"], content.get("decoder", "conv"))  # the oldest records have no decoder
        except KeyError as error:
            raise ValueError(f"The architecture is not valid: the field {error} is missing.") from None
        except TypeError as error:
            raise ValueError(f"The architecture is not valid: blocks must be a list of blocks ({error}).") from None

    def with_model(self, model: str) -> Arch:
        """The same encoder as another model: D-NAS keeps the blocks up to stage 6, DC-NAS gets a decoder."""
        keep = tuple(block for block in self.blocks if model != "dnas" or block.stage <= LAST_ENCODER_STAGE)
        return replace(self, model=model, blocks=keep, num_classes=0 if model == "dnas" else self.num_classes)

    def widened(self, factor: float) -> Arch:
        """All channels times `factor` in steps of WIDTH_STEP: a larger network of the same form (thesis, table 4)."""
        def width(channels: int) -> int:
            return round_width(factor * channels) if channels else 0

        blocks = tuple(replace(block, in_channels=width(block.in_channels), out_channels=width(block.out_channels),
                               mid_channels=max(width(block.mid_channels), width(block.in_channels)),
                               se_channels=width(block.se_channels)) for block in self.blocks)
        return replace(self, blocks=blocks, stem_channels=width(self.stem_channels),
                       head_channels=width(self.head_channels))


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65536


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"The architecture is not valid: {message}.")


def _require_counts(owner: Arch | Block, *names: str, where: str = "") -> None:
    for name in names:
        _require(_is_count(getattr(owner, name)), f"{where}{name} must be a whole number from 1 to 65536")


def searched_positions(model: str) -> list[Block]:
    """The searched blocks of a model in order; their kernel_size, mid_channels and se_channels are 0 until `fill`."""
    positions, channels = [], STAGE_2.out_channels
    for stage in STAGES:
        for index in range(stage.blocks if model != "dnas" or stage.number <= LAST_ENCODER_STAGE else 0):
            stride = stage.stride if index == 0 else 1
            positions.append(Block(stage.number, channels, 0, stage.out_channels, 0, stride, 0, stage.activation))
            channels = stage.out_channels
    return positions


def fill(position: Block, operation: Operation, mid_channels: int | None = None) -> Block:
    """`position` with `operation` in it, at `mid_channels` or else its starting width."""
    mid = operation.start_width(position.in_channels) if mid_channels is None else mid_channels
    return replace(position, kernel_size=operation.kernel_size, mid_channels=mid,
                   se_channels=operation.se_channels(position.in_channels))


STAGE_2 = Block(2, STEM_CHANNELS, STEM_CHANNELS, 16, 3, 1, 8, "relu")


def make_arch(model: str, blocks: list[Block], num_classes: int = 0) -> Arch:
    """The architecture of `model` with these searched blocks after the fixed stage 2."""
    return Arch(model, (STAGE_2, *blocks), 0 if model == "dnas" else num_classes)


def random_arch(model: str, space: int, rng: random.Random, num_classes: int = 0,
                min_width: float = MIN_WIDTH) -> Arch:
    """A network drawn from the space: operations uniformly, widths uniformly from their range in steps."""
    blocks = []
    for position in searched_positions(model):
        operation = rng.choice(SPACES[space])
        low, high = width_range(operation, position.in_channels, min_width)
        blocks.append(fill(position, operation, rng.randrange(low, high + 1, WIDTH_STEP)))
    return make_arch(model, blocks, num_classes)


# --- The supernet -----------------------------------------------------------------------------------------------


class SearchNorm(nn.Module):
    """Batch norm of the search: statistics of the batch, no affine part; replaces nn.BatchNorm2d(channels)."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return _search_norm(x)


def _search_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


class ElasticMBConv(nn.Module):
    """The search form of MBConv: weights at the largest width, of which only the first `width` mid channels are used.

    The same computation as MBConv with batch statistics and norms without affine part, so that weights can be copied
    into the exported network (`copy_to`).
    """

    def __init__(self, position: Block, operation: Operation, min_width: float = MIN_WIDTH):
        super().__init__()
        self.position, self.operation = position, operation
        _, width = width_range(operation, position.in_channels, min_width)
        full = build_block(fill(position, operation, width))
        self.expand_weight = full.expand[0].weight  # (mid, in, 1, 1)
        self.depthwise_weight = full.depthwise[0].weight  # (mid, 1, k, k)
        self.project_weight = full.project[0].weight  # (out, mid, 1, 1)
        self.se = full.se if operation.se else None
        self.residual = full.residual
        self.activation = F.relu_ if position.activation == "relu" else F.silu  # in place: the norm keeps its input only
        self.width = operation.start_width(position.in_channels)

    @property
    def block(self) -> Block:
        """This candidate in a record, at its present width."""
        return fill(self.position, self.operation, self.width)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.width)

    def set_extra_state(self, state: Tensor) -> None:
        self.width = int(state)

    @torch.no_grad()
    def set_width(self, mid_channels: int) -> list[nn.Parameter]:
        """Keep the `mid_channels` channels whose depthwise kernels have the largest L1 norm (TF-NAS), moved to the front.

        Returns the parameters whose channels changed places.
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
        return (self.expand_weight[:self.width], self.depthwise_weight[:self.width],
                self.project_weight[:, :self.width])

    def forward(self, x: Tensor) -> Tensor:
        expand, depthwise, project = self._weights()
        out = self.activation(_search_norm(F.conv2d(x, expand)))  # (B, mid, H, W)
        # On a map of n x n pixels, kernel rows and columns n or more from the centre meet padding only: they are cut.
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
        """Copy the centre of a larger candidate's kernels, and its strongest channels where it has more."""
        norm = larger.depthwise_weight[:larger.width].abs().sum(dim=(1, 2, 3))
        source = norm.topk(self.width).indices
        size, edge = self.operation.kernel_size, (larger.operation.kernel_size - self.operation.kernel_size) // 2
        self.expand_weight[:self.width] = larger.expand_weight[source]
        self.depthwise_weight[:self.width] = larger.depthwise_weight[source, :, edge:edge + size, edge:edge + size]
        self.project_weight[:, :self.width] = larger.project_weight[:, source]

    @torch.no_grad()
    def copy_to(self, block: MBConv) -> None:
        """Copy the kept weights into an MBConv of the same shape."""
        targets = [block.expand[0].weight, block.depthwise[0].weight, block.project[0].weight]
        sources = [*self._weights()]
        if self.se is not None:
            fc1, fc2, kept = self.se.fc1, self.se.fc2, slice(self.width)
            targets += [block.se.fc1.weight, block.se.fc1.bias, block.se.fc2.weight, block.se.fc2.bias]
            sources += [fc1.weight[:, kept], fc1.bias, fc2.weight[kept], fc2.bias[kept]]
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


class MixedOp(nn.Module):
    """All candidates of one block. `recompute`: a sum of all does not keep what they computed for the backward pass,
    which computes it again."""

    def __init__(self, position: Block, operations: tuple[Operation, ...], min_width: float = MIN_WIDTH,
                 recompute: bool = False):
        super().__init__()
        self.candidates = nn.ModuleList(ElasticMBConv(position, op, min_width) for op in operations)
        self.recompute = recompute

    def forward(self, x: Tensor, choice: int | Tensor) -> Tensor:
        """`choice`: the index of one candidate, or weights (O,) to sum all of them with."""
        if isinstance(choice, int):
            return self.candidates[choice](x)
        compute = partial(recomputed, use_reentrant=False) if self.recompute else lambda candidate, x: candidate(x)
        return sum(weight * compute(candidate, x) for weight, candidate in zip(choice, self.candidates))


class SearchStage(nn.Sequential):
    """The MixedOps of a stage, and with learned depth which of them is the last.

    Then the output is the sum of the blocks' outputs weighted by softmax(beta); `beta` (blocks,) holds log probabilities
    and is None where the depth is fixed. TF-NAS includes the stage's input where it has the output's shape; in this
    backbone it never has.
    """

    def __init__(self, *blocks: MixedOp, learned_depth: bool = False):
        super().__init__(*blocks)
        start = torch.full((len(blocks),), -math.log(len(blocks)))
        self.beta = nn.Parameter(start) if learned_depth and len(blocks) > 1 else None

    def forward(self, x: Tensor, choices: list[int] | list[Tensor]) -> Tensor:
        weights = [None] * len(self) if self.beta is None else F.softmax(self.beta, 0)
        total = 0.0
        for weight, block, choice in zip(weights, self, choices, strict=True):
            x = block(x, choice)
            total = x if weight is None else total + weight * x
        return total


class SuperNet(nn.Module):
    """Every network of the space at once: weights, and log probabilities `alpha` (blocks, operations).

    `model` says which parts it has: "cnas" for a search by classification alone (the papers' best, table 4), "dcnas" by
    both losses, "dnas" without labels. `depth`: "fixed" keeps all blocks (Markhorst 2024); "learned" searches how many
    each stage keeps (TF-NAS) by log probabilities `beta` (blocks of the stage,). `recompute`: see `MixedOp`. forward:
    (B, 3, H, W) and a choice: one operation index per block, or weights (blocks, operations).
    """

    def __init__(self, model: str, space: int = 4, num_classes: int = 0, min_width: float = MIN_WIDTH,
                 depth: str = "fixed", recompute: bool = False):
        super().__init__()
        self.space, self.min_width = space, min_width
        self.operations = SPACES[space]
        template = make_arch(model, [fill(position, self.operations[0]) for position in searched_positions(model)],
                             num_classes)

        def make_block(block: Block, _) -> nn.Module:
            if block.stage == 2:
                return build_block(block, norm_layer=SearchNorm)
            return MixedOp(block, self.operations, min_width, recompute)

        self.network = Network(template, make_block=make_block, norm_layer=SearchNorm)
        for stages, first in ((self.network.encoder, 1), (self.network.tail, 0)):
            for index in range(first, len(stages)):
                stages[index] = SearchStage(*stages[index], learned_depth=depth == "learned")
        count = len(self.operations)
        self.alpha = nn.Parameter(torch.full((len(self.mixed), count), -math.log(count)))

    @property
    def stages(self) -> list[SearchStage]:
        """The searched stages in order."""
        return [*self.network.encoder[1:], *self.network.tail]

    @property
    def mixed(self) -> list[MixedOp]:
        """The searched blocks in the order of alpha's rows."""
        return self.network.blocks()[1:]

    @property
    def betas(self) -> list[nn.Parameter]:
        """With learned depth: beta of each stage of more than one block."""
        return [stage.beta for stage in self.stages if stage.beta is not None]

    def weight_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.network.named_parameters() if not name.endswith(".beta")]

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alpha, *self.betas]

    def keep_probability(self) -> Tensor:
        """The probability that a block is kept, (blocks,): that the last block of its stage is this or a later one."""
        return torch.cat([self.alpha.new_ones(len(stage)) if stage.beta is None
                          else F.softmax(stage.beta, 0).flip(0).cumsum(0).flip(0) for stage in self.stages])

    def kept(self) -> list[bool]:
        """Whether the likeliest network keeps each block: those up to argmax(beta) of their stage."""
        lasts = [len(stage) - 1 if stage.beta is None else int(stage.beta.argmax()) for stage in self.stages]
        return [index <= last for stage, last in zip(self.stages, lasts) for index in range(len(stage))]

    def forward(self, x: Tensor, choice: list[int] | Tensor) -> Output:
        return self.from_stem(self.encode_stem(x), choice, *x.shape[-2:])

    def encode_stem(self, x: Tensor) -> Tensor:
        """The layers that are not searched, to compute once for several choices; see `Network.encode_stem`."""
        return self.network.encode_stem(x)

    def from_stem(self, x: Tensor, choice: list[int] | Tensor, height: int, width: int) -> Output:
        """The other layers, from the result of `encode_stem`, for images of height x width pixels."""
        rows = iter(choice)
        choices = [([next(rows) for _ in stage],) for stage in self.stages]
        return self.network.from_stem(x, height, width, choices)

    def _gumbel(self, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty(self.alpha.shape).exponential_(generator=generator)  # on the CPU: the same on any device
        return -noise.log().to(self.alpha.device)

    def sample_path(self, generator: torch.Generator | None = None) -> list[int]:
        """One operation per block by Gumbel softmax, whose largest weight is the same at every temperature."""
        return (self.alpha.detach() + self._gumbel(generator)).argmax(1).tolist()

    def other_path(self, path: list[int], generator: torch.Generator | None = None) -> list[int]:
        """One of the other operations per block, uniformly: the second half of TF-NAS's bi-sampling."""
        steps = torch.randint(1, len(self.operations), (len(path),), generator=generator).tolist()
        return [(index + step) % len(self.operations) for index, step in zip(path, steps)]

    def largest_path(self) -> list[int]:
        """The plain operation with the largest kernel and expansion in every block."""
        sizes = [(not operation.se, operation.kernel_size, operation.expansion) for operation in self.operations]
        return [sizes.index(max(sizes))] * len(self.mixed)

    def inherit_(self) -> None:
        """Give every candidate the weights of the largest one of its block, as far as they fit.

        Squeeze-and-excitation keeps its first weights: it scales all channels about equally, and the norm removes that.
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
        """Entropy of each block's softmax(alpha) / log(operations), (blocks,): 1 undecided, 0 decided."""
        log_p = F.log_softmax(self.alpha.detach(), 1)
        return -(log_p.exp() * log_p).sum(1) / math.log(len(self.operations))

    def candidate_blocks(self) -> list[list[Block]]:
        """Each candidate in a record, at its present width: one list per block."""
        return [[candidate.block for candidate in mixed.candidates] for mixed in self.mixed]

    def best_path(self) -> list[int]:
        """The likeliest operation of each block."""
        return self.alpha.argmax(1).tolist()

    def arch(self, path: list[int] | None = None) -> Arch:
        """The architecture of one path (default: the likeliest) at the present widths, as the supernet's own model."""
        path = self.best_path() if path is None else path
        rows = zip(self.candidate_blocks(), path, self.kept(), strict=True)
        arch = self.network.arch
        return make_arch(arch.model, [row[index] for row, index, kept in rows if kept], arch.num_classes)

    def set_widths(self, path: list[int], mid_channels: list[int]) -> list[nn.Parameter]:
        """Set the widths of the operations on `path` (elasticity scaling); returns the reordered parameters."""
        return [parameter for mixed, index, mid in zip(self.mixed, path, mid_channels, strict=True)
                for parameter in mixed.candidates[index].set_width(mid)]

    @torch.no_grad()
    def copy_to(self, network: Network, path: list[int]) -> None:
        """Copy the weights of one path, at its present widths, into the network built from `arch(path)`."""
        targets = iter(network.blocks()[1:])  # without stage 2
        for mixed, index, kept in zip(self.mixed, path, self.kept(), strict=True):
            if kept:
                mixed.candidates[index].copy_to(next(targets))
        fixed = {name: value for name, value in self.network.state_dict().items() if ".candidates." not in name}
        network.load_state_dict(fixed, strict=False)


# --- The registry -----------------------------------------------------------------------------------------------

RECORD = {"format": "joint-arch", "version": 1}  # how every record begins; files.py reads and writes them
PAPER_SIZE = 224  # pixels, the input of Markhorst 2024, section 4

# One entry per search method: the name of its file -> what search.py --model finds with it.
METHODS = {"tfnas": MODELS, "superkernel": ("superkernel",), "hinas": ("hinas",)}


def method_module(method: str):
    """The module of a search method; ValueError where there is no such method or its file is not here."""
    if method not in METHODS:
        raise ValueError(f"The search method {method!r} is unknown; known are {', '.join(METHODS)}, named.")
    try:
        return importlib.import_module(method)
    except ModuleNotFoundError as error:
        if error.name != method:
            raise
        raise ValueError(f"The method {method} needs {method}.py beside models.py.") from None


@dataclass(frozen=True)
class Named:
    """A network made by hand: `build(num_classes)` makes it; `size`: input in its paper, px; `flops`: the paper's, by
    its own counting (baselines.paper_flops), or None."""

    build: Callable[[int], nn.Module]
    size: int = PAPER_SIZE
    flops: float | None = None


UNET, UNET_M, UNET_S = (32, 4, 2, 2), (16, 4, 2, 2), (8, 4, 1.5, 2)  # b, d, m, c
NAMED = {  # baselines.py adds its own
    "unet": Named(lambda _: UNet(*UNET), 96, 1301.8e6),
    "unet-m": Named(lambda _: UNet(*UNET_M), 96),
    "unet-s": Named(lambda _: UNet(*UNET_S), 96, 51.2e6),
    "unet-original": Named(lambda _: UNet(64, 5, 2, 2)),
    "dcnet": Named(lambda num_classes: DCNet(UNet(*UNET), num_classes), 96, 1301.8e6),
    "dcnet-s": Named(lambda num_classes: DCNet(UNet(*UNET_S), num_classes), 96, 51.2e6),
}
UNET_NAME = re.compile(r"unet-b(\d{1,3})-d([1-8])-m(\d(?:\.\d)?)-c([1-9])(-mb)?")  # a UNet of any b, d, m, c
UNET_MBCONV = 2.5  # expansion in a UNet of MBConvs; the paper does not state it and has 2.5 in its classifier


def _uniform(model: str, operation: Operation, num_classes: int) -> Arch:
    return make_arch(model, [fill(position, operation) for position in searched_positions(model)], num_classes)


# Name -> function of num_classes that returns the architecture. "dcnas-k5-e6" is a DC-NAS with MB-k5-e6 at its starting
# width in every searched block: networks of the space to train and time without a search.
UNIFORM = {f"{model}-{operation.name}": partial(_uniform, model, operation)
           for model in MODELS for operation in SPACES[4]}


def all_named() -> dict[str, Named]:
    """NAMED, after baselines.py has added its networks, where that file lies beside this one."""
    if Path(__file__).with_name("baselines.py").exists():
        importlib.import_module("baselines")
    return NAMED


def find_named(name: str) -> Named:
    """The network made by hand of this name, or of a UNet's parameters ("unet-b8-d4-m1.5-c2", "...-mb"); KeyError if
    there is none."""
    parameters = UNET_NAME.fullmatch(name)
    if not parameters:
        return all_named()[name]
    b, d, m, c, mb = parameters.groups()
    return Named(lambda _: UNet(int(b), int(d), float(m), int(c), UNET_MBCONV if mb else None), 96)


def named_arch(name: str, num_classes: int = 0) -> Arch:
    """The architecture of a named network of the search space; ValueError with the names if it is unknown."""
    if name not in UNIFORM:
        raise ValueError(f"There is no model named {name!r}; python models.py lists them: {', '.join(UNIFORM)}.")
    return UNIFORM[name](num_classes)


def named_record(name: str, num_classes: int, made: dict) -> dict:
    """The record of a named model, of the search space or made by hand. `made`: how, see files.provenance."""
    if name in UNIFORM:
        return {**RECORD, "method": "tfnas", "made": made, **named_arch(name, num_classes).to_dict()}
    return {**RECORD, "method": "named", "made": made, "model": name, "num_classes": num_classes}


def model_name(text: str) -> str:
    """A type for argparse: the name of a model."""
    try:
        return text if text in UNIFORM or find_named(text) else ""
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no model {text!r}; python models.py lists them") from None


def build_network(record: dict, dropout: float = 0.0, drop_connect: float = 0.0) -> nn.Module:
    """The network that a record describes, with fresh weights; ValueError in one sentence if it cannot be built.

    `dropout` and `drop_connect` are for networks of the joint method; others have none or their own.
    """
    method = record.get("method") if isinstance(record, dict) else None
    if method == "tfnas":
        return make_network(Arch.from_dict(record), dropout, drop_connect)
    if method != "named":
        module = method_module(str(method))
        return module.build(module.design_of(record))
    name, num_classes = record.get("model"), record.get("num_classes")
    if not isinstance(name, str) or not _is_count(num_classes):
        raise ValueError("The record of a named model needs a model and num_classes.")
    try:
        named = find_named(name)
    except KeyError:
        raise ValueError(f"There is no model named {name!r}; python models.py lists them.") from None
    return named.build(num_classes)


def channels_of(network: nn.Module) -> int:
    """The channels of the images that a network takes: its `channels`, 3 by default."""
    return getattr(network, "channels", 3)


def scale_of(network: nn.Module) -> int:
    """How many times larger the returned image is than the input: `scale` if that is a whole number, 1 by default."""
    scale = getattr(network, "scale", 1)  # a network may have a parameter of this name
    return scale if isinstance(scale, int) else 1


def apply_network(network: nn.Module, images: Tensor, boxes: Tensor | None = None) -> Output:
    """The network's output; boxes (B, D, 4) are passed to networks that classify places of an image."""
    return network(images, boxes) if boxes is not None and getattr(network, "takes_boxes", False) else network(images)


@torch.no_grad()
def check_fits(network: nn.Module, name: str, size: int, boxes: Tensor | None = None) -> None:
    """ValueError in one sentence where a network cannot take images (channels, size, size) or their boxes (1, D, 4)."""
    was_training = network.training
    device = next(network.parameters()).device
    try:
        images = torch.zeros(1, channels_of(network), size, size, device=device)
        output = apply_network(network.eval(), images, boxes)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(f"The model {name} cannot take images of {size}x{size} pixels ({reason}); try another "
                         "--size.") from None
    finally:
        network.train(was_training)
    digits = 1 if boxes is None else boxes.shape[1]
    if output.logits is not None and len(output.logits) != digits:
        raise ValueError(f"The model {name} classifies whole images, but these have {digits} digits each; take one "
                         "that looks at boxes, such as dcnet-s, or other --data.")


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, size: int) -> int:
    """Multiply-accumulates of one image (channels, size, size) in convolutions and linear layers, layer by layer.

    The papers call them FLOPs. RuntimeError where the network cannot take the size.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counted = copy.deepcopy(network).to("meta").eval()  # shapes only: nothing is computed
    for module in counted.modules():
        if isinstance(module, UpConv):
            module.forward = module.layer_by_layer
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted(torch.empty(1, channels_of(network), size, size, device="meta"))
    return counter.get_total_flops() // 2  # the counter counts 2 per multiply-accumulate


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="models.py", usage="python models.py [options]",
        description="List every named model: parameters, and multiply-accumulates at its paper's input size.",
        epilog="examples:\n  python models.py\n  python models.py --json\n  python models.py --classes 10 --input 64",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table (default: a table)")
    parser.add_argument("--classes", type=int, default=100, metavar="N",
                        help="number of classes of the classifiers (default: %(default)s)")
    parser.add_argument("--input", type=int, metavar="PIXELS",
                        help="height and width of the input, pixels (default: the size in each model's paper)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    for flag, value in (("--classes", args.classes), ("--input", args.input)):
        if value is not None and not _is_count(value):
            parser.error(f"{flag} must be from 1 to 65536.")
    rows = []
    for name in (*UNIFORM, *all_named()):
        network = build_network(named_record(name, args.classes, {}))
        size = args.input or (PAPER_SIZE if name in UNIFORM else NAMED[name].size)
        try:
            macs = count_macs(network, size)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:80]
            parser.error(f"{name} cannot take an input of {size} pixels ({reason}); give a larger --input.")
        rows.append({"name": name, "denoises": network.denoises, "classifies": network.classifies, "input_px": size,
                     "parameters": count_parameters(network), "macs": macs})
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'model':<18} {'denoises':>8} {'classifies':>10} {'input':>6} {'parameters':>12} {'MACs':>11}")
    for row in rows:
        does = ["yes" if row[task] else "-" for task in ("denoises", "classifies")]
        print(f"{row['name']:<18} {does[0]:>8} {does[1]:>10} {row['input_px']:>6} {row['parameters']:>12,} "
              f"{row['macs'] / 1e6:>9.2f} M")
    print("A UNet of any parameters: unet-b8-d4-m1.5-c2, and with MBConvs unet-b8-d4-m1.5-c2-mb.")


if __name__ == "__main__":
    from models import main  # not this copy of it: baselines.py fills the registry of the module `models`

    main()
