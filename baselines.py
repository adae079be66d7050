"""Networks made by hand to compare found networks with: those of other authors and of the controlled study.

    python registry.py               # lists them
    python train.py --model dcnet-s-seq --data digit-pairs --epochs 5

    import baselines, registry       # the import adds the networks of this file to registry.NAMED
    image, logits = registry.find_named("dcnet-s-seq").build(10)(torch.rand(1, 3, 96, 96))

A network returns models.Output(image, logits) and has the attributes `denoises` and `classifies`. One that
classifies places of an image takes their boxes (B, D, 4) as second argument and has `takes_boxes`. To train,
evaluate and time a network of your own by its name, write the function that builds it and add a line at the
end of this file. UNet and DC-Net are in models.py. Sources: Markhorst 2024, supplement A (classifiers);
torchvision (ResNet, MobileNets); Tan and Le 2021 (EfficientNetV2); Conde et al. 2023 (LPIENet); Zhang et al.
2017, 2017b, 2018, 2021 (DnCNN, IRCNN, FFDNet, DRUNet); Chen et al. 2022 (NAFNet).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

import models
import registry
from models import DIGIT, Output, SequentialNetwork, UNet, group_norm
from registry import UNET, UNET_S, Named


class StudyClassifier(nn.Module):
    """Two (3x3 convolution, group norm, max pool, ReLU), global max pool, linear (supplement A.1).
    forward: (B, 3, H, W), averaged to one channel; with boxes (B, D, 4) each is cut out first, and the logits
    are (B * D, num_classes). `expansion`: the second convolution is an MBConv."""

    denoises, classifies, takes_boxes = False, True, True

    def __init__(self, first: int, second: int, expansion: float | None = None, num_classes: int = 10):
        super().__init__()
        convolution = (nn.Conv2d(first, second, 3, padding=1) if expansion is None
                       else models.study_mbconv(first, second, expansion))
        self.layers = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1), group_norm(first), nn.MaxPool2d(2), nn.ReLU(),
            convolution, group_norm(second), nn.MaxPool2d(2), nn.ReLU(),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(second, num_classes))

    def forward(self, x: Tensor, boxes: Tensor | None = None) -> Output:
        x = x if boxes is None else models.cut_out(x, boxes, DIGIT)
        return Output(None, self.layers(x.mean(1, keepdim=True)))


class DCNet(nn.Module):
    """DC-Net Integrated: a classifier on the deepest features of a UNet (section 3.1, fig. 2.ii).
    forward: (B, 3, H, W) -> image, logits (B, K); boxes (B, D, 4) are cut out of the deepest features: logits
    (B * D, K). The paper does not show the branch, and its FLOPs leave little room; here: 1x1 convolution to
    24 channels, group norm, ReLU, global max pool, linear. `branch`: another one."""
    denoises, classifies, takes_boxes = True, True, True

    def __init__(self, unet: UNet, num_classes: int = 10, branch: nn.Module | None = None):
        super().__init__()
        self.unet = unet
        self.branch = branch or nn.Sequential(
            nn.Conv2d(unet.widths[-1], 24, 1), group_norm(24), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
            nn.Flatten(), nn.Linear(24, num_classes))

    def forward(self, x: Tensor, boxes: Tensor | None = None) -> Output:
        stride, (height, width) = self.unet.stride, x.shape[-2:]
        features = self.unet.encode(models.pad_to_multiple(x, stride))
        deepest = features[-1]
        if boxes is not None:
            deepest = models.cut_out(deepest, boxes, -(-DIGIT // stride), stride)
        return Output(self.unet.decode(features)[..., :height, :width], self.branch(deepest))


def dcnas_tail(in_channels: int, num_classes: int, expansion: int = 3) -> nn.Sequential:
    """Stages 7, 8 and head of a DC-NAS of MB-k3 blocks, on features of another width (thesis, table 5:5)."""
    blocks = []
    for place in models.searched_positions("cnas"):
        if place.stage > models.LAST_ENCODER_STAGE:
            blocks.append(models.MBConv(in_channels, expansion * in_channels, place.out_channels, 3,
                                        place.stride, 0, place.activation))
            in_channels = place.out_channels
    return nn.Sequential(*blocks, models.Head(in_channels, models.HEAD_CHANNELS, num_classes, dropout=0.2))


class Classifier(nn.Module):
    """A network from normalised images to logits, in the form of this project: it takes images in [0, 1] plus
    noise. Fresh kernels are those of the network's own code, without models.begin_smooth."""

    denoises, classifies = False, True

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        models.add_normalisation(self)

    def forward(self, x: Tensor) -> Output:
        return Output(None, self.network((x - self.mean) / self.std))


def from_torchvision(name: str, num_classes: int, factor: float = 1.0) -> Classifier:
    """A classifier of torchvision with fresh weights, by its name there; a MobileNet also with its channels
    times a factor."""
    how = {} if factor == 1 else {"width_mult": factor}
    return Classifier(torchvision.models.get_model(name, num_classes=num_classes, **how))


class MobileNetWithDecoder(nn.Module):
    """A MobileNet of torchvision that also denoises, by the decoder of DC-NAS on its features of the sizes
    1/2 to 1/16: what someone would build who takes a known classifier. (B, 3, H, W) of any size."""

    denoises, classifies = True, True

    def __init__(self, name: str, num_classes: int, factor: float = 1.0):
        super().__init__()
        network = torchvision.models.get_model(name, num_classes=num_classes, width_mult=factor)
        self.features, self.classifier = network.features, network.classifier
        models.add_normalisation(self)
        with torch.no_grad():  # the last layer of each size goes to the decoder
            x, shapes = torch.zeros(2, 3, 64, 64), []
            for layer in self.features:
                x = layer(x)
                shapes.append(tuple(x.shape[1:3]))
        self.taken = [index for index, (_, side) in enumerate(shapes[:-1])
                      if side >= 4 and shapes[index + 1][1] < side]
        s2, s3, s4, s5 = (shapes[index][0] for index in self.taken)
        self.decoder = models.Decoder([s2, s3, s4, s5, s5], kind="sharp")
        models.begin_smooth(self.decoder.levels)

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        noisy, features = models.pad_to_multiple(x, models.ENCODER_STRIDE), []
        x = (noisy - self.mean) / self.std
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taken:
                features.append(x)
        image = self.decoder([*features, features[-1]], noisy, self.decoder.level_of(noisy))
        image = image[..., :height, :width]
        return Output(image, self.classifier(x.mean((2, 3))))


def efficientnet_v2(depth: float, num_classes: int) -> Classifier:
    """EfficientNetV2-b0 (`depth` 1.0) or -b1 (1.1), of torchvision's blocks (Tan and Le 2021, their code)."""
    stages = [FusedMBConvConfig(1, 3, 1, 32, 16, 1), FusedMBConvConfig(4, 3, 2, 16, 32, 2),
              FusedMBConvConfig(4, 3, 2, 32, 48, 2), MBConvConfig(4, 3, 2, 48, 96, 3),
              MBConvConfig(6, 3, 1, 96, 112, 5), MBConvConfig(6, 3, 2, 112, 192, 8)]
    for stage in stages:
        stage.num_layers = math.ceil(depth * stage.num_layers)
    return Classifier(EfficientNet(stages, dropout=0.2, num_classes=num_classes, last_channel=1280,
                                   norm_layer=partial(nn.BatchNorm2d, eps=1e-3)))


class LPIENet(nn.Module):
    """LPIENet (Conde et al. 2023) with these widths of encoder and decoder; (B, 3, H, W) of any size."""

    denoises, classifies = True, False

    def __init__(self, encoder: tuple[int, ...], decoder: tuple[int, ...]):
        super().__init__()
        stage = lambda in_channels, channels: nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1), _BaseBlock(channels), _BaseBlock(channels),
            _Attention(channels))
        self.down = nn.ModuleList(stage(before, width) for before, width in zip((3, *encoder), encoder))
        self.up, channels = nn.ModuleList(), encoder[-1]
        for width, skip in zip(decoder, encoder[-2::-1], strict=True):
            self.up.append(stage(channels, width))
            channels = width + skip
        self.path = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3),
                                  nn.ELU(), nn.Conv2d(3, 3, 1))
        self.shortcut = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.ReLU())
        self.gate = nn.Sequential(nn.Conv2d(3, 3, 7, padding=3), nn.ReLU(), nn.Conv2d(3, 3, 5, padding=2),
                                  nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        image = out = models.pad_to_multiple(x, 2 ** len(self.up))
        skips = []
        for index, stage in enumerate(self.down):
            out = stage(F.max_pool2d(out, 2) if index else out)
            skips.append(out)
        for stage, skip in zip(self.up, skips[-2::-1]):
            out = F.interpolate(stage(out), scale_factor=2, mode="bilinear", align_corners=False)
            out = torch.cat((out, skip), 1)
        out = self.path(out) + self.shortcut(out)
        return Output((image + out * self.gate(out))[..., :height, :width], None)


class _BaseBlock(nn.Module):
    """1x1, depthwise 3x3, ELU, 1x1, add; 1x1, ELU, 1x1, add."""

    def __init__(self, channels: int):
        super().__init__()
        pointwise = lambda: nn.Conv2d(channels, channels, 1)
        depthwise = lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.space = nn.Sequential(pointwise(), depthwise(), nn.ELU(), pointwise())
        self.channels = nn.Sequential(pointwise(), nn.ELU(), pointwise())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.space(x)
        return x + self.channels(x)


class _Attention(nn.Module):
    """Gates from the mean and maximum over channels, and from the mean; a 1x1 convolution joins them."""

    def __init__(self, channels: int):
        super().__init__()
        self.both = nn.Conv2d(2, channels, 3, padding=1)
        self.mean = nn.Sequential(nn.Conv2d(1, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 1))
        self.out = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean, maximum = x.mean(1, keepdim=True), x.amax(1, keepdim=True)  # (B, 1, H, W)
        gates = torch.sigmoid(torch.cat((self.both(torch.cat((mean, maximum), 1)), self.mean(mean)), 1))
        return x + self.out(gates * torch.cat((x, x), 1))


class DnCNN(nn.Module):
    """DnCNN (Zhang et al. 2017): convolutions, batch norm and ReLU that estimate the noise in an image; of 64
    channels, 20 layers for colour (CDnCNN-B), 17 for grey images (DnCNN-S)."""

    denoises, classifies = True, False

    def __init__(self, layers: int = 20, image_channels: int = 3, channels: int = 64):
        super().__init__()
        self.channels = image_channels
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        inner = [layer for _ in range(layers - 2) for layer in
                 (conv(channels, channels, bias=False), nn.BatchNorm2d(channels), nn.ReLU())]
        self.layers = nn.Sequential(conv(image_channels, channels), nn.ReLU(), *inner,
                                    conv(channels, image_channels))

    def forward(self, x: Tensor) -> Output:
        return Output(x - self.layers(x), None)


class IRCNN(nn.Module):
    """IRCNN (Zhang et al. 2017b): 7 convolutions of 64 channels with dilation 1, 2, 3, 4, 3, 2, 1 that
    estimate the noise in an image. Its authors have one network for each noise level. Batch norms are folded
    away, as in the weights that they publish."""

    denoises, classifies = True, False

    def __init__(self):
        super().__init__()
        widths, dilations = (3, *[64] * 6, 3), (1, 2, 3, 4, 3, 2, 1)
        layers = [nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation)
                  for before, after, dilation in zip(widths, widths[1:], dilations)]
        self.layers = _with_relu(layers)

    def forward(self, x: Tensor) -> Output:
        return Output(x - self.layers(x), None)


def noise_map(noise_level: models.NoiseLevel, x: Tensor, like: Tensor) -> Tensor:
    """The standard deviation of the noise in x as a map (B, 1, H, W) of the size of `like`."""
    return (noise_level(models.pad_to_multiple(x, 8)) / 2).exp().expand(-1, -1, *like.shape[-2:])


class FFDNet(nn.Module):
    """FFDNet for colour (Zhang et al. 2018): 12 convolutions of 96 channels on squares of 2x2 pixels and the
    noise level. The level is given in the paper; here it is that of models.NoiseLevel. Odd sizes are
    mirrored."""

    denoises, classifies = True, False

    def __init__(self):
        super().__init__()
        widths, self.noise_level = (4 * 3 + 1, *[96] * 11, 4 * 3), models.NoiseLevel()
        self.layers = _with_relu([nn.Conv2d(*pair, 3, padding=1) for pair in zip(widths, widths[1:])])

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        squares = F.pixel_unshuffle(models.pad_to_multiple(x, 2), 2)
        level = noise_map(self.noise_level, x, squares)
        image = F.pixel_shuffle(self.layers(torch.cat((squares, level), 1)), 2)
        return Output(image[..., :height, :width], None)


class DRUNet(nn.Module):
    """DRUNet for colour (Zhang et al. 2021): a UNet of 64 to 512 channels with four residual blocks a level,
    without biases. The noise level is given in the paper; here it is that of models.NoiseLevel. Sizes that
    are no multiple of 8 are mirrored."""

    denoises, classifies = True, False
    WIDTHS, BLOCKS = (64, 128, 256, 512), 4

    def __init__(self):
        super().__init__()
        conv, pairs = partial(nn.Conv2d, bias=False), list(zip(self.WIDTHS, self.WIDTHS[1:]))
        blocks = lambda width: [_ResidualBlock(width) for _ in range(self.BLOCKS)]
        self.noise_level, self.head = models.NoiseLevel(), conv(3 + 1, self.WIDTHS[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Sequential(*blocks(above), conv(above, below, 2, 2))
                                  for above, below in pairs)
        self.body = nn.Sequential(*blocks(self.WIDTHS[-1]))
        self.up = nn.ModuleList(nn.Sequential(nn.ConvTranspose2d(below, above, 2, 2, bias=False),
                                              *blocks(above)) for above, below in reversed(pairs))
        self.tail = conv(self.WIDTHS[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        padded = models.pad_to_multiple(x, 2 ** len(self.down))
        features = [self.head(torch.cat((padded, noise_map(self.noise_level, padded, padded)), 1))]
        for stage in self.down:
            features.append(stage(features[-1]))
        out = self.body(features[-1])
        for stage, skip in zip(self.up, features[:0:-1]):
            out = stage(out + skip)
        return Output(self.tail(out + features[0])[..., :height, :width], None)


class _ResidualBlock(nn.Sequential):
    """3x3 convolution, ReLU, 3x3 convolution, added to what goes in."""

    def __init__(self, width: int):
        conv = partial(nn.Conv2d, width, width, 3, padding=1, bias=False)
        super().__init__(conv(), nn.ReLU(), conv())

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class NAFNet(nn.Module):
    """NAFNet (Chen et al. 2022) with as many blocks as for real noise: 2, 2, 4, 8 in the encoder, 12 in the
    middle, 2 in each level of the decoder. `width`: channels at full resolution, 32 or 64 in the paper; each
    halving of the size doubles them. Sizes that are no multiple of 16 are mirrored (there: zeros). With 36
    means over the whole picture, tiles take 19 times as long as one pass."""

    denoises, classifies = True, False
    ENCODER, MIDDLE, DECODER = (2, 2, 4, 8), 12, 2

    def __init__(self, width: int = 32):
        super().__init__()
        stage = lambda channels, count: nn.Sequential(*(_NAFBlock(channels) for _ in range(count)))
        widths = [width * 2**level for level in range(len(self.ENCODER))]
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.encoder = nn.ModuleList(map(stage, widths, self.ENCODER))
        self.down = nn.ModuleList(nn.Conv2d(channels, 2 * channels, 2, 2) for channels in widths)
        self.middle = stage(2 * widths[-1], self.MIDDLE)
        self.up = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * channels, 4 * channels, 1, bias=False),
                                              nn.PixelShuffle(2)) for channels in reversed(widths))
        self.decoder = nn.ModuleList(stage(channels, self.DECODER) for channels in reversed(widths))
        self.ending = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        image = models.pad_to_multiple(x, 2 ** len(self.down))
        out, skips = self.intro(image), []
        for stage, down in zip(self.encoder, self.down):
            skips.append(stage(out))
            out = down(skips[-1])
        out = self.middle(out)
        for up, stage in zip(self.up, self.decoder):
            out = stage(up(out) + skips.pop())
        return Output((image + self.ending(out))[..., :height, :width], None)


class _NAFBlock(nn.Module):
    """Two residual branches: layer norm, 1x1, depthwise 3x3, gate, channel attention, 1x1; and layer norm,
    1x1, gate, 1x1. The gate multiplies one half of the channels with the other."""

    def __init__(self, channels: int):
        super().__init__()
        pointwise, norm = partial(nn.Conv2d, kernel_size=1), partial(_ChannelNorm, channels)
        self.space = nn.Sequential(norm(), pointwise(channels, 2 * channels), nn.Conv2d(
            2 * channels, 2 * channels, 3, padding=1, groups=2 * channels))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.attention, self.project = pointwise(channels, channels), pointwise(channels, channels)
        self.wide = nn.Sequential(norm(), pointwise(channels, 2 * channels))
        self.narrow = pointwise(channels, channels)
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1)
        return one * other

    def forward(self, x: Tensor) -> Tensor:
        out = self.gate(self.space(x))
        out = out * self.attention(self.avgpool(out))
        x = x + self.beta * self.project(out)
        return x + self.gamma * self.narrow(self.gate(self.wide(x)))


class _ChannelNorm(nn.LayerNorm):
    """The layer norm over the channels of each pixel of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _with_relu(layers: list[nn.Module]) -> nn.Sequential:
    """The layers with a ReLU between each and the next."""
    return nn.Sequential(*(each for layer in layers for each in (layer, nn.ReLU())))[:-1]


class OneDigit(nn.Module):
    """A network of the controlled study that looks at one digit of the scene."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("box", torch.tensor([[[0, 0, DIGIT, DIGIT]]]), persistent=False)

    def forward(self, x: Tensor) -> Output:
        return models.apply_network(self.network, x, self.box if x.shape[-1] > DIGIT else None)


def paper_flops(network: nn.Module, size: int) -> int:
    """Multiply-accumulates of one image (3, size, size) as the controlled study counts them: convolutions,
    transposed convolutions and linear layers with biases, and max pools by kernel area per output (not the
    global one). A network that takes boxes is counted with one digit."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        per_output = 0
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            per_output = module.weight[0].numel() + (module.bias is not None)
        elif isinstance(module, nn.ConvTranspose2d):  # 2x2 of stride 2: each output has one tap
            per_output = module.in_channels + (module.bias is not None)
        elif isinstance(module, nn.MaxPool2d):
            per_output = module.kernel_size ** 2
        total += per_output * output.numel() if per_output else 0

    counted = OneDigit(copy.deepcopy(network).eval())
    for module in counted.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        counted(torch.zeros(1, 3, size, size))
    return total


def _classifier(first: int, second: int, expansion: float | None, flops: float) -> Named:
    return Named(partial(StudyClassifier, first, second, expansion), DIGIT, flops)


def dcnet_with_tail(num_classes: int, factor: float = 1.0) -> nn.Module:
    """DC-Net S with the tail of DC-NAS as its classifier (thesis, table 5:5); `factor`: of the UNet's b."""
    b, *others = UNET_S
    unet = UNet(max(1, round(b * factor)), *others)
    return DCNet(unet, branch=dcnas_tail(unet.widths[-1], num_classes))


def _dcnet_sequential(unet: tuple, num_classes: int) -> nn.Module:
    return SequentialNetwork(UNet(*unet), StudyClassifier(10, 30, 2.5, num_classes))


def _widened(build: Callable) -> Named:
    return Named(build, widen=build)


registry.NAMED.update({
    "conv-l": _classifier(10, 20, None, 447e3),
    "conv-m": _classifier(8, 19, None, 345e3),
    "conv-s": _classifier(5, 13, None, 163e3),
    "mb1-s": _classifier(10, 21, 1, 177e3),
    "mb2.5-m": _classifier(10, 30, 2.5, 350e3),
    "mb2.5-s": _classifier(6, 23, 2.5, 178e3),
    "mb4-l": _classifier(10, 21, 4, 424e3),
    "mb4-s": _classifier(5, 19, 4, 188e3),
    "dcnet": Named(lambda num_classes: DCNet(UNet(*UNET), num_classes), 96, 1301.8e6),
    "dcnet-s": Named(lambda num_classes: DCNet(UNet(*UNET_S), num_classes), 96, 51.2e6),
    "dcnet-seq": Named(partial(_dcnet_sequential, UNET), 96, 1302.1e6),
    "dcnet-s-seq": Named(partial(_dcnet_sequential, UNET_S), 96, 51.5e6),
    "dcnet-s-tail": _widened(dcnet_with_tail),
    "resnet18": Named(partial(from_torchvision, "resnet18")),
    "mobilenet-v2": _widened(partial(from_torchvision, "mobilenet_v2")),
    "mobilenet-v2-decoder": _widened(partial(MobileNetWithDecoder, "mobilenet_v2")),
    "mobilenet-v3-small": _widened(partial(from_torchvision, "mobilenet_v3_small")),
    "mobilenet-v3-small-decoder": _widened(partial(MobileNetWithDecoder, "mobilenet_v3_small")),
    "efficientnet-v2-b0": Named(partial(efficientnet_v2, 1.0)),
    "efficientnet-v2-b1": Named(partial(efficientnet_v2, 1.1)),
    "lpienet-0.25x": Named(lambda _: LPIENet((4, 8, 16), (8, 4))),
    "lpienet-0.5x": Named(lambda _: LPIENet((8, 16, 32), (16, 8))),
    "lpienet": Named(lambda _: LPIENet((16, 32, 64), (32, 16))),
    "dncnn": _widened(lambda _, factor=1.0: DnCNN(channels=max(1, round(64 * factor)))),
    "dncnn-grey": _widened(lambda _, factor=1.0: DnCNN(17, 1, max(1, round(64 * factor)))),
    "ircnn": Named(lambda _: IRCNN()),
    "ffdnet": Named(lambda _: FFDNet()),
    "drunet": Named(lambda _: DRUNet()),
    "nafnet-16": Named(lambda _: NAFNet(16)),
    "nafnet-32": Named(lambda _: NAFNet(32)),
})
