"""Networks that denoise and classify, their records, and the supernet to search them in.

    from models import Network, named_arch
    image, logits = Network(named_arch("dcnas-k3-e3", num_classes=10))(torch.rand(1, 3, 64, 64))

C-NAS classifies, D-NAS denoises, DC-NAS does both with one encoder (Markhorst, van Gemert and Kayhan,
"Pushing Joint Image Denoising and Classification to the Edge", 2024). Search space and supernet: TF-NAS (Hu,
Wu and He, 2020). Reads and writes no files. Needs torch and torchvision only and works when copied alone.
"""

from __future__ import annotations

import copy
import math
from collections import namedtuple
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation, StochasticDepth, roi_align

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
MODELS = ("cnas", "dnas", "dcnas", "dcnas-seq")
DECODERS = ("sharp", "conv", "mb", "mb-1", "mb-3level")

class Output(NamedTuple):
    """What every network returns: `image` (B, 3, H, W) or None, `logits` (B, num_classes) or None."""
    image: Tensor | None
    logits: Tensor | None

# --- Blocks ----------------------------------------------------------------------------------------------
class Depthwise(torch.autograd.Function):
    """Depthwise convolution of (B, C, H, W) by (C, 1, k, k), padded by half the kernel. On a CPU oneDNN has
    fast code for the gradient of at most three columns of a kernel, and of maps that are larger than it; all
    else takes 2 to 10 times as long. So here that gradient is computed by three columns at a time."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        stride, kernel, radius = ctx.stride, weight.shape[-1], weight.shape[-1] // 2
        def convolution(x: Tensor, weight: Tensor, padding: list[int], wanted: int) -> Tensor:
            """The gradient of the input (wanted 0) or of the weight (1)."""
            return torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], len(weight),
                [wanted == 0, wanted == 1, False])[wanted]

        of_x = convolution(x, weight, [radius] * 2, 0) if ctx.needs_input_grad[0] else None
        height, width = ((side - 1) * stride for side in gradient.shape[-2:])  # the last place of the kernel
        small, of_weight = x.shape[-2] < kernel, torch.empty_like(weight)
        rows = [radius, height + kernel - radius - x.shape[-2]] if small else [0, 0]
        for first in sorted({*range(0, kernel - 2, 3), kernel - 3}):
            left = radius - first
            part = F.pad(x, [left, width + 3 - left - x.shape[-1], *rows])  # what these columns meet
            of_weight[..., first:first + 3] = convolution(
                part, weight[..., first:first + 3], [0 if small else radius, 0], 1)
        return of_x, of_weight, None

def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """`Depthwise` where that is faster than PyTorch's convolution, else that; the same to rounding."""
    kernel = weight.shape[-1]
    if (weight.requires_grad and torch.is_grad_enabled() and (kernel > 3 or max(x.shape[-2:]) < kernel > 1)
            and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")):
        return Depthwise.apply(x, weight, stride)
    return F.conv2d(x, weight, None, stride, kernel // 2, groups=len(weight))

class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution without bias."""
    def __init__(self, channels: int, kernel: int, stride: int):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.weight, self.stride[0]) if self.training else super().forward(x)

class MBConv(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, squeeze-and-excitation (SE), 1x1 projection.
    (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), sizes rounded up. No expansion where
    mid_channels equals in_channels; a residual where the shape stays, and training then drops the block for
    a sample with probability `drop_connect`. Only SE has biases, random at first (TF-NAS: zero). A residual
    block begins as the identity, since depth then costs no learning: its last norm has weight 0 (TF-NAS: 1,
    see train.begin_as_papers). `fused`: one k x k convolution in place of the expansion and the depthwise one
    (Tan and Le 2021, EfficientNetV2): more multiply-accumulates, but on large maps of few channels fast."""
    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, kernel_size=3, stride=1,
                 se_channels=0, activation="relu", fused=False, drop_connect=0.0, norm_layer=nn.BatchNorm2d):
        super().__init__()
        if mid_channels < in_channels:
            raise ValueError(f"mid_channels ({mid_channels}) must be at least in_channels ({in_channels}).")
        act = ACTIVATIONS[activation]
        layer = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=act)
        expands = mid_channels > in_channels and not fused
        self.expand = layer(in_channels, mid_channels, 1) if expands else nn.Identity()
        spatial = (nn.Conv2d(in_channels, mid_channels, kernel_size, stride, kernel_size // 2, bias=False)
                   if fused else DepthwiseConv(mid_channels, kernel_size, stride))
        self.depthwise = nn.Sequential(spatial, norm_layer(mid_channels), act(inplace=True))
        self.se = SqueezeExcitation(mid_channels, se_channels, act) if se_channels else nn.Identity()
        self.project = layer(mid_channels, out_channels, 1, activation_layer=None)
        self.drop_connect = StochasticDepth(drop_connect, "row") if drop_connect else nn.Identity()
        self.residual = stride == 1 and in_channels == out_channels
        if self.residual and getattr(self.project[1], "affine", False):
            nn.init.zeros_(self.project[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.se(self.depthwise(self.expand(x))))
        return x + self.drop_connect(out) if self.residual else out

class UpConv(nn.ConvTranspose2d):
    """2x2 transposed convolution of stride 2, (B, C, H, W) -> (B, out_channels, 2 H, 2 W), computed as a 1x1
    convolution whose outputs are spread over 2x2 pixels: the same weights and result, but faster."""
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 2, stride=2)

    def layer_by_layer(self, x: Tensor, then: nn.Conv2d | None = None) -> Tensor:
        """The result of `forward` as the paper describes it, to count operations and to compare speed."""
        return super().forward(x) if then is None else then(super().forward(x))

    def forward(self, x: Tensor, then: nn.Conv2d | None = None) -> Tensor:
        """`then`: a 1x1 convolution of the result; as both are linear, their weights are multiplied."""
        weight, bias = self.weight, self.bias  # (in, out, 2, 2), (out,)
        if then is not None:
            mix = then.weight[:, :, 0, 0]
            weight, bias = torch.einsum("iojk,po->ipjk", weight, mix), mix @ bias + then.bias
        batch, channels, height, width = x.shape
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # other runtimes are faster with it
            return F.conv_transpose2d(x, weight, bias, 2)
        weight = weight.permute(2, 3, 1, 0).reshape(-1, channels, 1, 1)
        out = F.conv2d(x, weight, bias.repeat(4)).permute(0, 2, 3, 1)  # (B, H, W, 2 * 2 * out)
        out = out.reshape(batch, height, width, 2, -1).transpose(2, 3)  # (B, H, 2, W, 2 * out)
        return out.reshape(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)

def enlarge(x: Tensor, scale: int) -> Tensor:
    """Bilinear interpolation, (B, C, H, W) -> (B, C, scale * H, scale * W). On a CPU, where gradients follow,
    by two matrices: the same to rounding. A step of D-NAS at 64 px takes a tenth less time."""
    wanted = x.requires_grad and max(x.shape[-2:]) <= 64  # for larger maps matrices take longer
    if x.device.type != "cpu" or not wanted or torch.is_autocast_enabled("cpu"):
        return F.interpolate(x, scale_factor=scale, mode="bilinear")
    down, right = (F.interpolate(torch.eye(side, dtype=x.dtype)[None], scale_factor=scale, mode="linear")[0]
                   for side in x.shape[-2:])
    return down.T @ (x.contiguous() @ right)

class NoiseLevel(nn.Module):
    """An estimate of log(variance of the noise): (B, 3, H, W), images in [0, 1] plus noise -> (B, 1, 1, 1).
    White noise has its own variance in the diagonal detail (Donoho and Johnstone 1994), and pictures have
    little. Here it is the fifth difference along both axes, of `taps` pixels each; in records without the
    field the first, of 2x2 pixels, which finds more in textures. Its mean square is taken over each 8x8
    pixels. Of what is texture, the image of half the size has more, of white noise less: by that the share of
    noise is told. The mean is of 1/sigma: squares full of texture count little. Nothing is learned. What is
    beyond a multiple of 8 is left out. `scales` 1, in records without the field: the mean of the logarithm,
    and all detail is noise."""
    FLOOR = 1e-5  # of the variance: 0.8/255, about the rounding of 8 bit
    TEXTURE = 8.0  # detail at half the size over that at full size, where white noise is counted to have 1
    LEAST = 0.04  # of a square's detail is noise at least: its contrast is no proof that it has none

    def __init__(self, scales: int = 2, taps: int = 6):
        super().__init__()
        self.scales = scales
        row = torch.tensor([(-1.0)**place * math.comb(taps - 1, place) for place in range(taps)])
        detail = torch.outer(row, row) / row.square().sum()  # of white noise it has the variance
        self.register_buffer("detail", detail.repeat(3, 1, 1, 1), persistent=False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)  # over a whole picture also where denoise.py takes it in tiles

    def energy(self, x: Tensor, side: int) -> Tensor:
        """The mean square of the detail over squares of so many details."""
        beyond = self.detail.shape[-1] // 2 - 1  # mirrored, so that any taps give maps of the same size
        x = F.pad(x, [beyond] * 4, mode="reflect") if beyond else x
        detail = F.conv2d(x, self.detail, stride=2, groups=len(self.detail))
        return F.avg_pool2d(detail.square().mean(1, keepdim=True), side)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.energy(x, 4)
        if self.scales == 1:
            return self.avgpool((fine + self.FLOOR).log())
        coarse = 4 * self.energy(F.avg_pool2d(x, 2), 2)  # of white noise as much as `fine`
        variance = torch.maximum((self.TEXTURE * fine - coarse) / (self.TEXTURE - 1), self.LEAST * fine)
        return -2 * self.avgpool((variance + self.FLOOR).rsqrt()).log()

class Gate(nn.Module):
    """The least at full resolution, ours: an image y with a feature (B, 4, H, W) and the noisy image n
    (B, 3, H, W) -> for each pixel a mixture of n and y, by a sigmoid of the feature and of `level`, the
    NoiseLevel of n."""
    FEATURES = 1

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1, 1, 1, 1), -2.0))

    def forward(self, x: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        own = torch.sigmoid(x[:, 3:] + self.slope * (level + 4))  # -4: sigma 0.14
        return own * noisy + (1 - own) * x[:, :3]

NEARBY = 2, 8, 32  # sides of blocks; interpolated between them, each mean reaches over twice as many pixels

def means_nearby(x: Tensor) -> list[Tensor]:
    """The means over blocks of NEARBY pixels, (B, C, H, W) -> for each (B, C, H / side, W / side), rounded
    up, since the border may cut off the last blocks."""
    result = []
    for side, finer in zip(NEARBY, (1, *NEARBY)):
        x = F.avg_pool2d(x, side // finer, ceil_mode=True)  # means of means
        result.append(x)
    return result

def region_fits(noisy: Tensor, mask: Tensor, weights: list[Tensor], least: float = 1e-3) -> Tensor:
    """The noisy image n (B, 3, H, W) as far as a mask m (B, 1, H, W) explains it: a m + b, by least squares
    over the pixels nearby, summed over NEARBY with as many weights (B, 1, H, W). a and b are as in the guided
    filter of He et al. 2010 (eq. 5 and 6), with m as the guide. The filter then averages them over windows;
    here each pixel has its own, from interpolated means of n, m, m n and m^2. `least` is the epsilon there:
    where m is even the fit is the mean of n. Computed in 32 bit at least, since variances are differences."""
    (height, width), dtype, total = noisy.shape[-2:], noisy.dtype, 0.0
    n, m = (x.to(torch.promote_types(dtype, torch.float32)) for x in (noisy, mask))
    for side, part, weight in zip(NEARBY, means_nearby(torch.cat((n, m, m * n, m * m), 1)), weights):
        of_n, of_m, of_mn, of_mm = enlarge(part, side)[..., :height, :width].split((3, 1, 3, 1), 1)
        slope = (m - of_m) / (of_mm - of_m * of_m + least)
        total = total + weight * (of_n + slope * (of_mn - of_m * of_n))
    return total.to(dtype)

def region_means(noisy: Tensor, mask: Tensor, weights: list[Tensor], power: int, others: float) -> Tensor:
    """In place of `region_fits` in older records: the means of two regions, painted where their masks are, m
    and 1 - m. A pixel counts by this power of the mask, and a share of all others nearby is added, since a
    region may have none."""
    (height, width), masks, total = noisy.shape[-2:], (mask, 1 - mask), 0.0
    counted = F.pad(noisy, (0, 0, 0, 0, 0, 1), value=1.0)  # the mean of the fourth channel is an area
    parts = torch.cat([each**power * counted for each in masks], 1)
    parts = F.pad(parts, (0, padding_to(width, NEARBY[-1]), 0, padding_to(height, NEARBY[-1])))  # of area 0
    for side, part, weight in zip(NEARBY, means_nearby(parts), weights):
        regions = part.split(4, 1)
        every = others * (regions[0] + regions[1])
        means = enlarge(torch.cat([region + every for region in regions], 1), side)[..., :height, :width]
        for each, mean in zip(masks, means.split(4, 1)):
            total = total + weight * each / mean[:, 3:] * mean[:, :3]
    return total

REGIONS = {"fits": region_fits, "squares": partial(region_means, power=2, others=0.001),
           "masks": partial(region_means, power=1, others=0.01)}

class FullResolution(nn.Module):
    """The branch at full resolution, ours: an image y with features (B, 3 + FEATURES, H, W) and the noisy
    image n (B, 3, H, W) -> image. Each pixel is a mixture of n, of fits to n, and of y, by a softmax of the
    features and of `level`, the NoiseLevel of n: a clean picture comes out as it went in. The fits, one for
    each scale, keep the colours that noise hides: a learned mask parts two regions, as strokes and ground,
    and `regions`, one of REGIONS, tells their colours by the pixels nearby. A correction, two 3x3
    convolutions of mixture, y and features, is added to the mixture; it begins at 0 and is weak where there
    is little noise: each channel between the two, of `hidden`, from another level on."""
    FEATURES = 10  # 16 channels go into the first convolution, the step of vector units

    def __init__(self, hidden: int = 12, regions: str = "fits"):
        super().__init__()
        self.regions = regions
        self.slope = nn.Parameter(torch.tensor([-2.0, *[0.0] * len(NEARBY), 0.0]).view(1, -1, 1, 1))
        fade = torch.linspace(5, 8, hidden)  # a channel has half its strength at sigma 21/255 ... 5/255
        # So the first half, the slice that a narrow branch has of a supernet, has all levels too.
        self.fade = nn.Parameter(torch.cat((fade[::2], fade[1::2])).view(-1, 1, 1))
        self.mix = nn.Conv2d(6 + self.FEATURES, hidden, 3, padding=1)
        self.rest = nn.Conv2d(hidden, 3, 3, padding=1)
        nn.init.zeros_(self.rest.weight)
        nn.init.zeros_(self.rest.bias)

    def forward(self, x: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        count = len(NEARBY) + 2
        logits, masks = x[:, 3:5 + count].split((count, 2), 1)
        logits = (logits + self.slope * (level + 4)).split(1, 1)  # -4: sigma 0.14
        top = reduce(torch.maximum, logits)  # a softmax channel by channel, since onnxruntime's takes long
        powers = [(logit - top).exp() for logit in logits]
        own, *nearby, decoded = (power / sum(powers[1:], powers[0]) for power in powers)
        mask = torch.sigmoid(2 * (masks[:, :1] - masks[:, 1:]).to(noisy.dtype))  # 2: regions part sooner
        mixed = own * noisy + REGIONS[self.regions](noisy, mask, nearby) + decoded * x[:, :3]
        hidden = F.relu(self.mix(torch.cat((mixed, x), 1))) * (2 * torch.sigmoid(level + self.fade))
        return mixed + self.rest(hidden)

class Decoder(nn.Module):
    """The decoder of D-NAS and DC-NAS: levels 4 to 1, then a 1x1 convolution.
    forward: outputs of stages 2 to 6, noisy image, its `level_of` -> image. `kind`: "conv": two 3x3
    convolutions a level; "sharp" (ours): those, level 1 also takes the noisy image, 2x2 pixels as channels,
    and `FullResolution` follows; "mb": two MB-k3-e3; "mb-1": one; "mb-3level": two, level 4 none (Markhorst
    2024, table 6). The papers do not state widths and activation; here a level has the width of the encoder
    stage of its size, and ReLU. `levels`: of 4 to 1 (channels, kernel sizes), where they are searched.
    `branch`: channels of FullResolution; 0: `Gate` in its place. `noise_scales`, `noise_taps`: of NoiseLevel;
    `regions`: of FullResolution."""
    def __init__(self, stage_channels: list[int], norm_layer=nn.BatchNorm2d, kind: str = "conv", levels=(),
                 branch: int = 12, noise_scales: int = 2, regions: str = "fits", noise_taps: int = 6):
        super().__init__()
        def level(in_channels: int, channels: int, out_channels: int, kernels: tuple) -> nn.ModuleDict:
            convs = [MBConv(source, 3 * source, channels, norm_layer=norm_layer) if kind.startswith("mb")
                     else Conv2dNormActivation(source, channels, kernel, norm_layer=norm_layer)
                     for source, kernel in zip((in_channels, channels), kernels)]
            up = UpConv(channels if kernels else in_channels, out_channels)
            return nn.ModuleDict({"convs": nn.Sequential(*convs), "up": up})
        s2, s3, s4, s5, s6 = stage_channels
        pixels = 3 * 2 * 2 if kind == "sharp" else 0
        kernels = {"mb-1": [(3,)] * 4, "mb-3level": [(), *[(3, 3)] * 3]}.get(kind, [(3, 3)] * 4)
        (l4, l3, l2, l1), kernels = zip(*(levels or zip((s5, s4, s3, s2), kernels)))
        widths = ((s6, l4, l3), (l3 + s4, l3, l2), (l2 + s3, l2, l1), (l1 + s2 + pixels, l1, l1))
        self.levels = nn.ModuleList(level(*width, each) for width, each in zip(widths, kernels))
        self.full = self.noise_level = None
        if kind == "sharp":
            self.full = FullResolution(branch, regions) if branch else Gate()
            self.noise_level = NoiseLevel(noise_scales, noise_taps)
        self.image = nn.Conv2d(l1, 3 + (self.full.FEATURES if self.full else 0), 1)

    def level_of(self, noisy: Tensor) -> Tensor | None:
        """The NoiseLevel of the whole noisy image, where `FullResolution` or `Gate` needs it."""
        return None if self.full is None else self.noise_level(pad_to_multiple(noisy, ENCODER_STRIDE))

    def forward(self, features: list[Tensor], noisy: Tensor, noise_level: Tensor | None) -> Tensor:
        s2, s3, s4, _, x = features
        if self.full is not None:
            noisy = pad_to_multiple(noisy, ENCODER_STRIDE)
            pixels = torch.eye(12, dtype=noisy.dtype, device=noisy.device).view(12, 3, 2, 2)
            s2 = torch.cat((s2, F.conv2d(noisy, pixels, stride=2)), 1)  # as pixel_unshuffle, but faster
        for level, skip, then in zip(self.levels, (None, s4, s3, s2), (None, None, None, self.image)):
            x = level.convs(x if skip is None else torch.cat((x, skip), 1))
            x = level.up(x, then)
        return x if self.full is None else self.full(x, noisy, noise_level)

class MultiscaleStem(Conv2dNormActivation):
    """Ours: a 3x3 convolution of stride 2 on the image and on its means over squares of SCALES pixels, which
    show what noise hides; (B, 3, H, W) -> (B, channels, H / 2, W / 2), sizes rounded up."""
    SCALES = 2, 4, 8, 16

    def __init__(self, channels: int, norm_layer=nn.BatchNorm2d):
        super().__init__(3 + 3 * len(self.SCALES), channels, 3, 2, norm_layer=norm_layer)

    def maps(self, x: Tensor) -> Tensor:
        (height, width), small, result = x.shape[-2:], pad_to_multiple(x, self.SCALES[-1]), [x]
        for scale in self.SCALES:
            small = F.avg_pool2d(small, 2)  # means of means
            result.append(F.interpolate(small, scale_factor=scale)[..., :height, :width])
        return torch.cat(result, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.maps(x))

class Means(nn.Sequential):
    """Ours: the means of encoder outputs, normalised, through a linear map that begins at 0 -> (B, K). Beside
    a Head they shorten the way from the class to the encoder: a short training learns it sooner."""
    def __init__(self, channels: int, num_classes: int, norm_layer=nn.BatchNorm2d):
        super().__init__(norm_layer(channels, affine=False), nn.Conv2d(channels, num_classes, 1, bias=False),
                         nn.Flatten())
        nn.init.zeros_(self[1].weight)

    def forward(self, features: list[Tensor]) -> Tensor:
        return super().forward(torch.cat([x.mean((2, 3), keepdim=True) for x in features], 1))

class Head(nn.Sequential):
    """1x1 convolution, average pool, dropout, linear with random first bias (TF-NAS: zero) -> (B, K)."""
    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout=0.0,
                 norm_layer=nn.BatchNorm2d):
        conv = Conv2dNormActivation(in_channels, channels, 1, norm_layer=norm_layer, activation_layer=nn.SiLU)
        super().__init__(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout),
                         nn.Linear(channels, num_classes))

def padding_to(side: int, multiple: int) -> int:
    """Pixels from `side` to the next multiple. In this form torch.export can simplify sizes; with a remainder
    exporting takes twice as long."""
    return (side + multiple - 1) // multiple * multiple - side

def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the right and bottom to multiples: mirrored, or repeated where it is too small."""
    bottom, right = (padding_to(side, multiple) for side in x.shape[-2:])
    if isinstance(bottom, int) and not bottom and not right:  # no symbol of torch.export, which always pads
        return x
    mirrored = bottom < x.shape[-2] and right < x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), mode="reflect" if mirrored else "replicate")

def add_normalisation(network: nn.Module) -> None:
    """Give a network the buffers `mean` and `std` (1, 3, 1, 1): those of ImageNet, for any data."""
    for name, values in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
        network.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

@torch.no_grad()
def begin_smooth(network: nn.Module) -> None:
    """Give half of the variance of every fresh k x k kernel (k > 1) to its mean; the total variance stays.
    Not in the papers. Kernels of independent weights lose what noise hides: with them 25 epochs ended with
    grey digits. `Network` applies it to stem, stage 2 and decoder where it denoises (without in stem and
    stage 2, 8 epochs of Imagenette had 44.4 % instead of 48.2 %); a supernet of smooth blocks did not learn
    to classify. C-NAS, UNet, DC-Net and the networks of baselines.py start without, but for the decoder of
    MobileNets."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            mean, k = module.weight.mean((2, 3), keepdim=True), module.kernel_size[0]
            rest = (module.weight - mean) * (k / math.sqrt(k * k - 1))
            module.weight.copy_((rest + k * mean) * math.sqrt(0.5))

# --- Networks --------------------------------------------------------------------------------------------
LAST_ENCODER_STAGE = 6  # D-NAS ends here; in DC-NAS the decoder and the classification branch start here
MEANS = 4, 5, 6  # the stages whose outputs Means takes
ENCODER_STRIDE = 16

class Network(nn.Module):
    """C-NAS, D-NAS or DC-NAS from its record (Markhorst 2024, fig. 7).
    forward: (B, 3, H, W), images in [0, 1] plus noise, any H and W -> image (B, 3, H, W), logits (B, K). It
    pads, normalises and crops: PSNR is measured on [0, 1]. Images of a `grey` record are (B, 1, H, W);
    the layers get three equal channels, and their mean comes out. Drop-connect of block i of n: drop_connect
    * i / n, i = 0 in stage 2 (TF-NAS: 1). `make_block(block, drop_connect)`: the supernet gives its own."""
    def __init__(self, arch: Arch, dropout=0.0, drop_connect=0.0, make_block=None, norm_layer=nn.BatchNorm2d):
        super().__init__()
        self.arch, self.denoises, self.classifies = arch, arch.denoises, arch.classifies
        self.channels = 1 if arch.grey else 3
        self.parallel = False  # True (in a CUDA graph): decoder and classifier at once, on two streams
        add_normalisation(self)
        self.stem = (MultiscaleStem(arch.stem_channels, norm_layer) if arch.multiscale else
                     Conv2dNormActivation(3, arch.stem_channels, 3, 2, norm_layer=norm_layer))
        stages: dict[int, nn.Sequential] = {}
        for index, block in enumerate(arch.blocks):
            module = (make_block or build_block)(block, drop_connect * index / len(arch.blocks))
            stages.setdefault(block.stage, nn.Sequential()).append(module)
        self.encoder = nn.ModuleList(stages[number] for number in stages if number <= LAST_ENCODER_STAGE)
        self.tail = nn.ModuleList(stages[number] for number in stages if number > LAST_ENCODER_STAGE)
        self.decoder = self.head = self.means = None
        widths = {block.stage: block.out_channels for block in arch.blocks}
        if arch.denoises:
            outputs = [*widths.values()][:len(self.encoder)]
            self.decoder = Decoder(outputs, norm_layer, arch.decoder, arch.levels, arch.branch,
                                   arch.noise_scales, arch.regions, arch.noise_taps)
            begin_smooth(nn.ModuleList([self.stem, self.encoder[0], self.decoder.levels]))
        if arch.classifies:
            last = arch.blocks[-1].out_channels
            self.head = Head(last, arch.head_channels, arch.num_classes, dropout, norm_layer)
            if arch.multiscale:
                self.means = Means(sum(widths[stage] for stage in MEANS), arch.num_classes, norm_layer)

    def blocks(self) -> list[nn.Module]:
        """The blocks in the order of `arch.blocks`."""
        return [block for stage in (*self.encoder, *self.tail) for block in stage]

    def forward(self, x: Tensor) -> Output:
        level = self.noise_level(x)  # first, since a picture in tiles needs a pass of its own up to here
        return self.from_stem(self.encode_stem(x), x, level=level)

    def noise_level(self, noisy: Tensor) -> Tensor | None:
        """See Decoder.level_of."""
        return self.decoder.level_of(self.coloured(noisy)) if self.denoises else None

    def coloured(self, x: Tensor) -> Tensor:
        """The images with three channels."""
        return x.expand(-1, 3, -1, -1) if self.arch.grey else x

    def encode_stem(self, x: Tensor) -> Tensor:
        """Stem and stage 2, which TF-NAS does not search: (B, 3, H, W) -> (B, C, H / 2, W / 2)."""
        x = self.coloured(x)
        x = pad_to_multiple(x, ENCODER_STRIDE) if self.denoises else x
        return self.encoder[0](self.stem((x - self.mean) / self.std))

    def from_stem(self, x: Tensor, noisy: Tensor, choices: list[tuple] | None = None,
                  level: Tensor | None = None) -> Output:
        """The other layers, from what `encode_stem` made of `noisy`; `choices`: what stages take beside x;
        `level`: the `noise_level` of `noisy` where it is known."""
        level = self.noise_level(noisy) if level is None else level
        (height, width), noisy = noisy.shape[-2:], self.coloured(noisy)
        stages, split, features = [*self.encoder[1:], *self.tail], len(self.encoder) - 1, [x]
        steps = list(zip(stages, choices or [()] * len(stages), strict=True))
        for stage, choice in steps[:split]:  # down to (B, C, H / 16, W / 16)
            features.append(stage(features[-1], *choice))
        def denoise() -> Tensor | None:
            if not self.denoises:
                return None
            image = self.decoder(features, noisy, level)[..., :height, :width]
            return image.mean(1, keepdim=True) if self.arch.grey else image
        def classify(x: Tensor) -> Tensor | None:
            if not self.classifies:  # or not asked to, as in tiles of a large picture
                return None
            for stage, choice in steps[split:]:  # down to (B, C, H / 32, W / 32)
                x = stage(x, *choice)
            taken = [features[stage - 2] for stage in MEANS]  # the first features are of stage 2
            return self.head(x) if self.means is None else self.head(x) + self.means(taken)
        if not (self.parallel and x.is_cuda and self.denoises and self.classifies):
            return Output(denoise(), classify(features[-1]))
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            image = denoise()
        logits = classify(features[-1])
        main.wait_stream(side)
        for feature in (*features, noisy):  # keeps their memory until both streams have finished with them
            feature.record_stream(side)
        image.record_stream(main)
        return Output(image, logits)

class SequentialNetwork(nn.Module):
    """A classifier on the image of a denoiser (Markhorst 2024, fig. 2.i, 7.iv), trained as one network."""
    denoises, classifies = True, True

    def __init__(self, denoiser: nn.Module, classifier: nn.Module):
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier
        self.takes_boxes, self.channels = getattr(classifier, "takes_boxes", False), channels_of(denoiser)

    def forward(self, x: Tensor, *boxes: Tensor) -> Output:
        image = self.denoiser(x).image
        return Output(image, self.classifier(image, *boxes).logits)

def make_network(arch: Arch, dropout: float = 0.0, drop_connect: float = 0.0) -> nn.Module:
    """The network of a record with fresh weights."""
    if arch.model == "dcnas-seq":
        parts = (Network(arch.with_model(model), dropout, drop_connect) for model in ("dnas", "cnas"))
        return SequentialNetwork(*parts)
    return Network(arch, dropout, drop_connect)

def build_block(block: Block, drop_connect: float = 0.0, norm_layer=nn.BatchNorm2d) -> MBConv:
    """The MBConv that a record's block describes."""
    return MBConv(*astuple(block)[1:], drop_connect, norm_layer)

# --- UNet and DC-Net of the controlled study (Markhorst 2024, section 3 and supplement A) ----------------
DIGIT = 28  # pixels, height and width of a digit of MNIST
group_norm = partial(nn.GroupNorm, 1)  # one group fits every width; the paper does not state the number

def cut_out(x: Tensor, boxes: Tensor, size: int, stride: int = 1) -> Tensor:
    """Cut boxes (left, top, right, bottom in px of the image; a map pixel covers stride x stride of them) out
    of maps, interpolating between map pixels: (B, C, H, W), (B, D, 4) -> (B * D, C, size, size)."""
    boxes = boxes.float()  # half precision cannot count images
    image = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1) + torch.zeros_like(boxes[..., :1])
    rows = torch.cat((image, boxes), 2).flatten(0, 1)
    return roi_align(x.float(), rows, size, 1 / stride, sampling_ratio=1, aligned=True).to(x.dtype)

def study_mbconv(in_channels: int, out_channels: int, expansion: float) -> nn.Sequential:
    """The study's MBConv: always with expansion and biases. The paper does not say where it is normalised."""
    mid = round(expansion * in_channels)
    return nn.Sequential(nn.Conv2d(in_channels, mid, 1), group_norm(mid), nn.ReLU(),
                         nn.Conv2d(mid, mid, 3, padding=1, groups=mid), group_norm(mid), nn.ReLU(),
                         nn.Conv2d(mid, out_channels, 1))

class UNet(nn.Module):
    """UNet(b, d, m, c): d levels, level i of int(b * m**i) channels, c 3x3 convolutions a level (fig. 2).
    Max pool down, 2x2 transposed convolution up, concatenation, 1x1 convolution; (B, 3, H, W) of any size.
    No norm is stated; here batch norm and ReLU follow each convolution, or `study_mbconv` of `expansion`.
    `residual` (ours): the image is added to the input, and begins as it."""
    denoises, classifies = True, False

    def __init__(self, b: int, d: int, m: float, c: int, expansion: float | None = None, residual=False):
        super().__init__()
        self.residual = residual
        self.widths = [int(b * m**level) for level in range(d)]
        if min(self.widths, default=0) < 1 or c < 1:
            raise ValueError(f"A UNet needs b, d and c of 1 or more, not b {b}, d {d}, m {m}, c {c}.")
        def level(in_channels: int, channels: int) -> nn.Sequential:
            layers = []
            for source in (in_channels, *[channels] * (c - 1)):
                conv = (nn.Conv2d(source, channels, 3, padding=1) if expansion is None
                        else study_mbconv(source, channels, expansion))
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            return nn.Sequential(*layers)
        self.down = nn.ModuleList(map(level, [3, *self.widths], self.widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deeper, width, 2, stride=2)
                                for width, deeper in zip(self.widths, self.widths[1:]))
        self.merge = nn.ModuleList(level(2 * width, width) for width in self.widths[:-1])
        self.image = nn.Conv2d(self.widths[0], 3, 1)
        for parameter in self.image.parameters() if residual else ():
            nn.init.zeros_(parameter)
        self.pool = nn.MaxPool2d(2)
        self.stride = 2 ** (d - 1)  # of the deepest features

    def encode(self, x: Tensor) -> list[Tensor]:
        """The features of every level, finest first; H and W must be multiples of `stride`."""
        features = [self.down[0](x)]
        for level in self.down[1:]:
            features.append(level(self.pool(features[-1])))
        return features

    def decode(self, features: list[Tensor]) -> Tensor:
        """The image (B, 3, H, W) from the features of every level."""
        x = features[-1]
        for skip, up, merge in reversed(list(zip(features, self.up, self.merge))):
            x = merge(torch.cat((up(x), skip), 1))
        return self.image(x)

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        image = self.decode(self.encode(pad_to_multiple(x, self.stride)))[..., :height, :width]
        return Output(x + image if self.residual else image, None)

# --- The search space and the record (Markhorst 2024, supplement B; TF-NAS, table 1) ---------------------
Stage = namedtuple("Stage", "number out_channels blocks stride activation")  # stride: of its first block
STAGES = (Stage(3, 24, 2, 2, "relu"), Stage(4, 40, 3, 2, "silu"), Stage(5, 80, 4, 2, "silu"),
          Stage(6, 112, 4, 1, "silu"), Stage(7, 192, 4, 2, "silu"), Stage(8, 320, 1, 1, "silu"))
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280

@dataclass(frozen=True)
class Operation:
    """A candidate of a searched block: an MBConv of a kernel size and expansion, with SE or without."""
    kernel_size: int
    expansion: int
    se: bool = False
    name = property(lambda self: f"k{self.kernel_size}-e{self.expansion}" + "-se" * self.se)

    def start_width(self, in_channels: int) -> int:
        """Mid channels at the start of the search: 3x or 6x the input."""
        return self.expansion * in_channels

    def max_width(self, in_channels: int) -> int:
        """The largest mid channels of the width fit: 4x or 8x the input (TF-NAS, elasticity scaling)."""
        return self.expansion * in_channels * 4 // 3

_PLAIN, _SE = (tuple(Operation(k, e, se) for k in (3, 5) for e in (3, 6)) for se in (False, True))
SPACES = {4: _PLAIN, 6: _PLAIN + _SE[:2], 8: _PLAIN + _SE}
WIDTH_STEP = 8  # mid channels are multiples of this, as vector units and tensor cores prefer
MIN_WIDTH = 1.25  # smallest mid channels, as a multiple of the input channels

def round_width(channels: float, step: int = WIDTH_STEP) -> int:
    """The nearest multiple of `step`, at least one step."""
    return max(step, int(channels / step + 0.5) * step)

def width_range(operation: Operation, in_channels: int, min_width: float = MIN_WIDTH) -> tuple[int, int]:
    """Smallest and largest mid channels of `operation` on `in_channels`, both inclusive.
    The smallest is `min_width` times the input, and more than the input, so that the expansion stays. In
    TF-NAS it is half the largest; its fit stops there and misses low targets."""
    steps = max(math.ceil(min_width * in_channels / WIDTH_STEP), in_channels // WIDTH_STEP + 1)
    return steps * WIDTH_STEP, max(steps * WIDTH_STEP, round_width(operation.max_width(in_channels)))

COUNTS = range(1, 65537)
LEVEL_KERNELS = ((1,), (3,), (1, 3), (3, 3))
ALLOWED = {"model": MODELS, "decoder": DECODERS, "multiscale": (True, False), "noise_scales": (1, 2),
           "noise_taps": (2, 6), "regions": (*REGIONS,), "grey": (False, True), "fused": (False, True),
           "activation": (*ACTIVATIONS,),
           "kernel_size": (1, 3, 5, 7), "stride": (1, 2),
           **dict.fromkeys(("se_channels", "num_classes", "branch"), range(65537))}  # else: COUNTS

@dataclass(frozen=True)
class Block:
    """One MBConv of a network with all its numbers. `se_channels` 0 means no squeeze-and-excitation; records
    without `fused` have none."""
    stage: int
    in_channels: int
    mid_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    se_channels: int
    activation: str
    fused: bool = False

@dataclass(frozen=True)
class Arch:
    """A complete C-NAS, D-NAS, DC-NAS or sequential DC-NAS network: the content of `arch.json`.
    `blocks` are in order from stage 2; those after stage 6 exist only in a classifier, and a "dcnas-seq" has
    the others twice. `levels`, `branch`: see Decoder; `grey`: see Network. ValueError where the blocks do not
    fit together."""
    model: str
    blocks: tuple[Block, ...]
    num_classes: int = 0
    stem_channels: int = STEM_CHANNELS
    head_channels: int = HEAD_CHANNELS
    decoder: str = DECODERS[0]
    levels: tuple[tuple[int, tuple[int, ...]], ...] = ()
    branch: int = 12
    multiscale: bool = True
    noise_scales: int = 2
    regions: str = "fits"
    grey: bool = False
    noise_taps: int = 6
    denoises = property(lambda self: self.model != "cnas")
    classifies = property(lambda self: self.model != "dnas")

    def __post_init__(self):
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"The architecture is not valid: {message}.")
        def require_allowed(part: Arch | Block, where: str = "") -> None:
            for name, value in vars(part).items():
                allowed = ALLOWED.get(name, COUNTS)
                if name in ("blocks", "levels") or type(value) is type(allowed[0]) and value in allowed:
                    continue
                words = (f"a whole number from {allowed[0]} to {allowed[-1]}" if isinstance(allowed, range)
                         else f"one of {', '.join(map(str, allowed))}")
                require(False, f"{where}{name} must be {words}, not {value!r:.40}")
        require_allowed(self)
        fine = all(type(width) is int and width in COUNTS and kernels in LEVEL_KERNELS
                   for width, kernels in self.levels)
        require(fine and len(self.levels) in (0, 4), "levels must be 4 pairs of channels and kernel sizes")
        require((self.num_classes > 0) == self.classifies, f"its num_classes does not fit a {self.model}")
        require(0 < len(self.blocks) <= 256, "it needs 1 to 256 blocks")
        channels, stage = self.stem_channels, 2
        for number, block in enumerate(self.blocks):
            where = f"block {number}: "
            require_allowed(block, where)
            require(block.in_channels == channels, f"{where}in_channels must be {channels}")
            require(block.mid_channels >= block.in_channels, f"{where}mid_channels is below in_channels")
            require(block.stage in (stage, stage + 1), f"{where}stage must be {stage} or {stage + 1}")
            channels, stage = block.out_channels, block.stage
        last = LAST_ENCODER_STAGE if self.model == "dnas" else STAGES[-1].number
        require(self.blocks[0].stage == 2 and stage == last, f"a {self.model} has the stages 2 to {last}")
        for number in range(2, LAST_ENCODER_STAGE + 1) if self.denoises else ():
            stride = math.prod(block.stride for block in self.blocks if block.stage == number)
            wanted = 1 if number in (2, 6) else 2  # the decoder doubles the size once per level
            require(stride == wanted, f"the strides of stage {number} must multiply to {wanted}")

    def to_dict(self) -> dict:
        content = asdict(self) | {"levels": [[width, [*kernels]] for width, kernels in self.levels]}
        return content | {"blocks": list(content.pop("blocks"))}  # the longest field comes last

    @classmethod
    def from_dict(cls, content: dict) -> Arch:
        """The architecture in a record; ValueError in one sentence where a field is missing or wrong."""
        try:
            blocks = tuple(Block(**block) for block in content["blocks"])
            return cls(content["model"], blocks, content["num_classes"], content["stem_channels"],
                       content["head_channels"], content.get("decoder", "conv"),  # the oldest have none
                       tuple((width, tuple(kernels)) for width, kernels in content.get("levels", ())),
                       content.get("branch", 12), content.get("multiscale", False),
                       content.get("noise_scales", 1),
                       content.get("regions", "squares" if content.get("pure_regions") else "masks"),
                       content.get("grey", False), content.get("noise_taps", 2))
        except (KeyError, TypeError) as error:
            raise ValueError(f"The architecture is not valid; wrong blocks or fields: {error}.") from None

    def with_model(self, model: str) -> Arch:
        """The same encoder as another model: D-NAS keeps the blocks up to stage 6, DC-NAS gets a decoder."""
        keep = tuple(block for block in self.blocks if model != "dnas" or block.stage <= LAST_ENCODER_STAGE)
        return replace(self, model=model, blocks=keep, num_classes=0 if model == "dnas" else self.num_classes)

    def widened(self, factor: float) -> Arch:
        """All channels but the branch's times `factor`, in steps of WIDTH_STEP (thesis, table 4)."""
        def wider(part: Arch | Block) -> dict[str, int]:
            return {name: round_width(factor * value) for name, value in vars(part).items()
                    if name.endswith("_channels") and value}
        levels = tuple((round_width(factor * channels), kernels) for channels, kernels in self.levels)
        blocks = tuple(replace(block, **wider(block)) for block in self.blocks)
        return replace(self, blocks=blocks, levels=levels, **wider(self))

STAGE_2 = Block(2, STEM_CHANNELS, STEM_CHANNELS, 16, 3, 1, 8, "relu")

def searched_positions(model: str) -> list[Block]:
    """The searched blocks of a model in order; kernel_size, mid_channels, se_channels are 0 until `fill`."""
    positions, channels = [], STAGE_2.out_channels
    stages = STAGES[:LAST_ENCODER_STAGE - 2] if model == "dnas" else STAGES
    for number, width, blocks, stride, activation in stages:
        for index in range(blocks):
            positions.append(Block(number, channels, 0, width, 0, 1 if index else stride, 0, activation))
            channels = width
    return positions

def fill(position: Block, operation: Operation, mid_channels: int | None = None) -> Block:
    """`position` with `operation` in it, by default at its starting width. SE has as many channels as the
    input at expansion 3, and twice as many at 6 (TF-NAS)."""
    channels = position.in_channels
    mid = operation.start_width(channels) if mid_channels is None else mid_channels
    se_channels = operation.expansion // 3 * channels if operation.se else 0
    return replace(position, kernel_size=operation.kernel_size, mid_channels=mid, se_channels=se_channels)

def make_arch(model: str, blocks: list[Block], num_classes: int = 0, decoder: str = DECODERS[0]) -> Arch:
    """The architecture of `model` with these blocks after stage 2; papers' decoders come with their stem."""
    return Arch(model, (STAGE_2, *blocks), 0 if model == "dnas" else num_classes, decoder=decoder,
                multiscale=decoder == "sharp")

# --- The supernet ----------------------------------------------------------------------------------------
# Batch norm of the search, as a layer and as a function: statistics of the batch, no affine part.
SearchNorm = partial(nn.BatchNorm2d, affine=False, track_running_stats=False)
_search_norm = partial(F.batch_norm, running_mean=None, running_var=None, training=True)

class ElasticMBConv(nn.Module):
    """The search form of MBConv: weights at the largest width, of which the first `width` channels are used.
    The same computation as MBConv with SearchNorm, so that weights can be copied into the found network.
    `gain`: a residual branch is multiplied by one number per channel, which begins at 0 and is the weight of
    the found network's last norm; without it the branch has full strength (TF-NAS)."""
    def __init__(self, position: Block, operation: Operation, min_width: float = MIN_WIDTH, gain=False):
        super().__init__()
        self.position, self.operation = position, operation
        self.width = operation.start_width(position.in_channels)
        self.trained = self.width  # so many channels have been in use; those behind them are as at first
        largest = width_range(operation, position.in_channels, min_width)[1]
        full = build_block(fill(position, operation, largest))
        self.expand_weight = full.expand[0].weight  # (mid, in, 1, 1)
        self.depthwise_weight = full.depthwise[0].weight  # (mid, 1, k, k)
        self.project_weight = full.project[0].weight  # (out, mid, 1, 1)
        self.se = full.se if operation.se else None
        self.residual = full.residual
        self.gain = nn.Parameter(torch.zeros(position.out_channels, 1, 1)) if gain and full.residual else None
        self.activation = F.relu_ if position.activation == "relu" else F.silu  # norms keep their input only

    block = property(lambda self: fill(self.position, self.operation, self.width))  # as in a record

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.width, self.trained])

    def set_extra_state(self, state: Tensor) -> None:
        self.width, self.trained = state.expand(2).tolist()  # older checkpoints hold the width only

    def _by_channel(self) -> list[tuple[nn.Parameter, int]]:
        """Every parameter that has mid channels, and their dimension in it."""
        pairs = [(self.expand_weight, 0), (self.depthwise_weight, 0), (self.project_weight, 1)]
        if self.se is not None:
            pairs += [(self.se.fc1.weight, 1), (self.se.fc2.weight, 0), (self.se.fc2.bias, 0)]
        return pairs

    def _used(self) -> list[Tensor]:
        """The same parameters, cut to the present width."""
        return [parameter.narrow(dim, 0, self.width) for parameter, dim in self._by_channel()]

    @torch.no_grad()
    def set_width(self, mid_channels: int) -> list[nn.Parameter]:
        """Keep the `mid_channels` channels whose depthwise kernels have the largest L1 norm (TF-NAS).
        They are moved to the front. Returns the parameters whose channels changed places. Channels that were
        never in use come last (in TF-NAS they compete, and win: what is trained has shrunk), and begin with
        the smallest norm in use, which the batch norm behind it makes harmless."""
        norm, fresh = self.depthwise_weight.abs().sum(dim=(1, 2, 3)), slice(self.trained, mid_channels)
        self.depthwise_weight[fresh] *= norm[:self.trained].min() / norm[fresh].view(-1, 1, 1, 1)
        norm[self.trained:] = -torch.arange(1.0, len(norm) - self.trained + 1, device=norm.device)
        self.trained = max(self.trained, mid_channels)
        kept = torch.zeros_like(norm, dtype=torch.bool).index_fill_(0, norm.topk(mid_channels).indices, True)
        self.width = mid_channels
        if kept[:mid_channels].all():
            return []
        order = torch.cat((kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]))
        for parameter, dim in self._by_channel():
            parameter.copy_(parameter.index_select(dim, order))
        return [parameter for parameter, _ in self._by_channel()]

    def forward(self, x: Tensor) -> Tensor:
        expand, kernel, project, *se = self._used()
        out = self.activation(_search_norm(F.conv2d(x, expand)))  # (B, mid, H, W)
        out = depthwise(out, kernel, self.position.stride)
        out = self.activation(_search_norm(out))  # (B, mid, H / stride, W / stride)
        if se:
            squeeze, excite, bias = se  # 1x1 convolutions of single pixels: matrices
            scale = self.activation(F.linear(out.mean((2, 3)), squeeze[:, :, 0, 0], self.se.fc1.bias))
            out = out * torch.sigmoid(F.linear(scale, excite[:, :, 0, 0], bias))[:, :, None, None]
        out = _search_norm(F.conv2d(out, project))  # (B, out, H / stride, W / stride)
        out = out if self.gain is None else out * self.gain
        return x + out if self.residual else out

    @torch.no_grad()
    def inherit(self, larger: ElasticMBConv) -> None:
        """Copy the centre of a larger candidate's kernels, and its strongest channels where it has more.
        SE stays as it is: at first it scales all channels about equally, which the norm removes."""
        norm = larger.depthwise_weight[:larger.width].abs().sum(dim=(1, 2, 3))
        self.trained = self.width
        source, size = norm.topk(self.width).indices, self.operation.kernel_size
        edge = (larger.operation.kernel_size - size) // 2
        expand, depthwise, project = self._used()[:3]
        expand.copy_(larger.expand_weight[source])
        depthwise.copy_(larger.depthwise_weight[source, :, edge:edge + size, edge:edge + size])
        project.copy_(larger.project_weight[:, source])
        if self.gain is not None:
            self.gain.copy_(larger.gain)

    @torch.no_grad()
    def copy_to(self, block: MBConv) -> None:
        """Copy the used weights into an MBConv of the same shape."""
        targets = [block.expand[0].weight, block.depthwise[0].weight, block.project[0].weight]
        if self.se is not None:
            targets += [block.se.fc1.weight, block.se.fc2.weight, block.se.fc2.bias]
            block.se.fc1.bias.copy_(self.se.fc1.bias)
        for target, weight in zip(targets, self._used(), strict=True):
            target.copy_(weight)
        if self.residual and block.project[1].affine:
            block.project[1].weight.copy_(torch.ones(()) if self.gain is None else self.gain[:, 0, 0])

class MixedOp(nn.Module):
    """All candidates of a block; with `recompute`, a sum of them computes each again in the backward pass."""
    def __init__(self, position: Block, operations: tuple[Operation, ...], min_width: float, recompute: bool,
                 gain: bool = False):
        super().__init__()
        self.candidates = nn.ModuleList(ElasticMBConv(position, op, min_width, gain) for op in operations)
        self.recompute = recompute

    def forward(self, x: Tensor, choice: int | Tensor) -> Tensor:
        """`choice`: the index of one candidate, or weights (O,) to sum all of them with."""
        if isinstance(choice, int):
            return self.candidates[choice](x)
        call = partial(recomputed, use_reentrant=False) if self.recompute else nn.Module.__call__
        return sum(weight * call(candidate, x) for weight, candidate in zip(choice, self.candidates))

class SearchStage(nn.Sequential):
    """The MixedOps of a stage; with learned depth, the sum of their outputs weighted by softmax(beta).
    `beta` (blocks,): log probabilities that a block is the last, None where the depth is fixed. At first the
    last block has e^2 times the probability of any other, so that only a latency above the target takes
    blocks away; a uniform start (TF-NAS) is already below most targets, and noise decides. TF-NAS also
    weighs the stage's input where it has the output's shape; in this backbone it never has."""
    def __init__(self, *blocks: MixedOp, learned_depth: bool):
        super().__init__(*blocks)
        beta = F.log_softmax(torch.tensor([*[0.0] * (len(blocks) - 1), 2.0]), 0)
        self.beta = nn.Parameter(beta) if learned_depth and len(blocks) > 1 else None

    def forward(self, x: Tensor, choices: list[int] | list[Tensor]) -> Tensor:
        weights, total = [None] * len(self) if self.beta is None else F.softmax(self.beta, 0), 0.0
        for weight, block, choice in zip(weights, self, choices, strict=True):
            x = block(x, choice)
            total = x if weight is None else total + weight * x
        return total

class SuperNet(nn.Module):
    """Every network of the space at once: weights, and log probabilities `alpha` (blocks, operations).
    `model`: "cnas" for a search by classification alone (the papers' best, table 4), "dcnas" by both losses,
    "dnas" without labels. `depth`: "fixed" (Markhorst 2024) or "learned", how many blocks each stage keeps
    (TF-NAS). `gain`: see ElasticMBConv. forward: (B, 3, H, W) and a path (one operation per block) or weights
    (blocks, operations)."""
    def __init__(self, model: str, space: int = 4, num_classes: int = 0, min_width: float = MIN_WIDTH,
                 depth: str = "fixed", recompute: bool = False, gain: bool = False,
                 decoder: str = DECODERS[0], grey: bool = False):
        super().__init__()
        self.space, self.min_width, self.operations = space, min_width, SPACES[space]
        blocks = [fill(position, self.operations[0]) for position in searched_positions(model)]
        make_block = lambda block, _: (build_block(block, norm_layer=SearchNorm) if block.stage == 2 else
                                       MixedOp(block, self.operations, min_width, recompute, gain))
        arch = replace(make_arch(model, blocks, num_classes, decoder), grey=grey)
        self.network = Network(arch, 0.0, 0.0, make_block, SearchNorm)
        for part, first in ((self.network.encoder, 1), (self.network.tail, 0)):
            for index in range(first, len(part)):
                part[index] = SearchStage(*part[index], learned_depth=depth == "learned")
        self.stages = [*self.network.encoder[1:], *self.network.tail]  # the same modules as in the network
        self.mixed = self.network.blocks()[1:]  # in the order of alpha's rows
        self.alpha = nn.Parameter(torch.full((len(blocks), space), -math.log(space)))
        self.betas = [stage.beta for stage in self.stages if stage.beta is not None]

    def weight_parameters(self) -> list[nn.Parameter]:
        return [weight for name, weight in self.network.named_parameters() if not name.endswith(".beta")]

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alpha, *self.betas]

    def keep_probability(self) -> Tensor:
        """The probability that a block is kept, (blocks,): it or a later one is the last of its stage."""
        return torch.cat([self.alpha.new_ones(len(stage)) if stage.beta is None
                          else F.softmax(stage.beta, 0).flip(0).cumsum(0).flip(0) for stage in self.stages])

    def kept(self) -> list[bool]:
        """Whether the likeliest network keeps each block: those up to argmax(beta) of their stage."""
        return [stage.beta is None or index <= int(stage.beta.argmax())
                for stage in self.stages for index in range(len(stage))]

    def forward(self, x: Tensor, choice: list[int] | Tensor) -> Output:
        return self.from_stem(self.encode_stem(x), choice, x)

    def encode_stem(self, x: Tensor) -> Tensor:
        """The layers that are not searched: to be computed once for several choices."""
        return self.network.encode_stem(x)

    def from_stem(self, x: Tensor, choice: list[int] | Tensor, noisy: Tensor) -> Output:
        """The other layers, from the result of `encode_stem` for the images `noisy`."""
        rows = iter([row for row, _ in zip(choice, self.mixed, strict=True)])
        choices = [([next(rows) for _ in stage],) for stage in self.stages]
        return self.network.from_stem(x, noisy, choices)

    def _gumbel(self, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty(self.alpha.shape).exponential_(generator=generator)  # CPU: equal on all devices
        return -noise.log().to(self.alpha.device)

    def sample_path(self, generator: torch.Generator | None = None) -> list[int]:
        """One operation per block by Gumbel softmax, whose argmax does not depend on the temperature."""
        return (self.alpha.detach() + self._gumbel(generator)).argmax(1).tolist()

    def other_path(self, path: list[int], generator: torch.Generator | None = None) -> list[int]:
        """One of the other operations per block, uniformly: the second half of TF-NAS's bi-sampling."""
        steps = torch.randint(1, self.space, (len(path),), generator=generator).tolist()
        return [(index + step) % self.space for index, step in zip(path, steps)]

    def largest_path(self) -> list[int]:
        """The plain operation with the largest kernel and expansion in every block."""
        largest = max(self.operations, key=lambda op: (not op.se, op.kernel_size, op.expansion))
        return [self.operations.index(largest)] * len(self.mixed)

    def inherit_(self) -> None:
        """Give every candidate the weights of the largest one of its block, as far as they fit."""
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
        return -(log_p.exp() * log_p).sum(1) / math.log(self.space)

    def candidate_blocks(self) -> list[list[Block]]:
        """Each candidate in a record, at its present width: one list per block."""
        return [[candidate.block for candidate in mixed.candidates] for mixed in self.mixed]

    def best_path(self) -> list[int]:
        return self.alpha.argmax(1).tolist()

    def arch(self, path: list[int] | None = None) -> Arch:
        """The architecture of a path (default: the likeliest) at the present widths."""
        rows = zip(self.candidate_blocks(), path or self.best_path(), self.kept(), strict=True)
        blocks = [row[index] for row, index, kept in rows if kept]
        return replace(self.network.arch, blocks=(STAGE_2, *blocks))

    def set_widths(self, path: list[int], mid_channels: list[int]) -> list[nn.Parameter]:
        """Set the widths of the operations on `path` (elasticity scaling); returns reordered parameters."""
        return [parameter for mixed, index, mid in zip(self.mixed, path, mid_channels, strict=True)
                for parameter in mixed.candidates[index].set_width(mid)]

    @torch.no_grad()
    def copy_to(self, network: Network, path: list[int]) -> None:
        """Copy the weights of one path, at its present widths, into the network built from `arch(path)`."""
        targets = iter(network.blocks()[1:])  # without stage 2
        for mixed, index, kept in zip(self.mixed, path, self.kept(), strict=True):
            if kept:
                mixed.candidates[index].copy_to(next(targets))
        fixed = {name: v for name, v in self.network.state_dict().items() if ".candidates." not in name}
        network.load_state_dict(fixed, strict=False)

# --- Named architectures, and what the scripts ask of any network -----------------------------------------
FUSED_STAGES = 2, 3, 4  # on the largest maps, where depthwise convolutions take most of the time

def _uniform(model: str, operation: Operation, form: str, num_classes: int) -> Arch:
    """All searched blocks have this operation at its starting width; "shallow": one block a stage; "fused":
    that, and those of FUSED_STAGES are fused."""
    places = [place for place in searched_positions(model)
              if not form or place.in_channels != place.out_channels]  # the first of its stage
    arch = make_arch(model, [fill(place, operation) for place in places], num_classes)
    return replace(arch, blocks=tuple(replace(block, fused=form == "fused" and block.stage in FUSED_STAGES)
                                      for block in arch.blocks))

UNIFORM = {"-".join(filter(None, (model, operation.name, form))): partial(_uniform, model, operation, form)
           for form in ("", "shallow", "fused") for model in MODELS for operation in SPACES[4]}

def named_arch(name: str, num_classes: int = 0) -> Arch:
    """The architecture of a named network of the search space; ValueError with the names if unknown."""
    if name not in UNIFORM:
        raise ValueError(f"There is no model named {name!r}; possible are {', '.join(UNIFORM)}.")
    return UNIFORM[name](num_classes)

def channels_of(network: nn.Module) -> int:
    """The channels of the images that a network takes: its `channels`, or 3."""
    return getattr(network, "channels", 3)

def scale_of(network: nn.Module) -> int:
    """How many times larger than its input the image is that a network returns: its `scale`, or 1."""
    scale = getattr(network, "scale", 1)  # a network may have a parameter of this name
    return scale if isinstance(scale, int) else 1

def apply_network(network: nn.Module, images: Tensor, boxes: Tensor | None = None) -> Output:
    """The network's output; boxes (B, D, 4) are given to networks that classify places of an image."""
    takes_boxes = boxes is not None and getattr(network, "takes_boxes", False)
    return network(images, boxes) if takes_boxes else network(images)

def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

def count_macs(network: nn.Module, size: int) -> int:
    """Multiply-accumulates (the papers' FLOPs) of a (channels, size, size) image; RuntimeError: too small."""
    counted = copy.deepcopy(network).to("meta").eval()  # shapes only: nothing is computed
    for module in counted.modules():
        if isinstance(module, UpConv):
            module.forward = module.layer_by_layer
        for name, child in module.named_children():  # they count nothing, and take half of the time here
            if isinstance(child, (nn.BatchNorm2d, nn.ReLU, nn.SiLU)):
                setattr(module, name, nn.Identity())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted(torch.empty(1, channels_of(network), size, size, device="meta"))
    return counter.get_total_flops() // 2  # the counter counts 2 per multiply-accumulate
