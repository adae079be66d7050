"""Networks made by hand: those of the controlled study, and the ones that found networks are compared with.

    python models.py                                  # lists them, with their FLOPs beside the paper's
    python train.py --model dcnet-s --data digit-pairs --epochs 5

    from baselines import build_baseline
    image, logits = build_baseline("dcnet-s", num_classes=10)(torch.rand(1, 3, 96, 96))

A network returns models.Output(image, logits) and has the attributes `denoises` and `classifies`; one that can look at
places of an image takes their boxes as a second argument, and has `takes_boxes`. To add a network to training, evaluation and
timing, write the function that builds it and name it in BASELINES. Sources: Markhorst 2024, section 3 and supplement A
(UNet, DC-Net, classifiers); torchvision (ResNet, MobileNets); Tan and Le 2021 (EfficientNetV2); Conde et al. 2023
(LPIENet); Zhang et al. 2017 (DnCNN).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.ops import roi_align

from models import HEAD_CHANNELS, STAGES, Head, MBConv, Output, SequentialNetwork, add_normalisation, pad_to_multiple

DIGIT = 28  # pixels, height and width of a digit of MNIST


def cut_out(x: Tensor, boxes: Tensor, size: int, stride: int = 1) -> Tensor:
    """Cut boxes out of maps: (B, C, H, W), (B, D, 4) -> (B * D, C, size, size).

    Boxes are (left, top, right, bottom) in pixels of the image, of which a map pixel covers `stride` x `stride`. Where a
    box falls between map pixels, they are interpolated; at stride 1 a box of `size` pixels is copied as it is.
    """
    image = torch.arange(len(x), device=x.device).repeat_interleave(boxes.shape[1])
    rows = torch.cat((image[:, None], boxes.flatten(0, 1)), 1).float()  # (B * D, 5); half precision cannot count images
    return roi_align(x.float(), rows, size, 1 / stride, sampling_ratio=1, aligned=True).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# The controlled study: classifiers (supplement A.1)


def _group_norm(channels: int) -> nn.Module:
    """The paper does not say how many groups; here it is one, which fits every width."""
    return nn.GroupNorm(1, channels)


def study_mbconv(in_channels: int, out_channels: int, expansion: float) -> nn.Sequential:
    """The MBConv of the study: it always has its expansion, and biases. The paper does not say where it is normalised."""
    mid = round(expansion * in_channels)
    return nn.Sequential(nn.Conv2d(in_channels, mid, 1), _group_norm(mid), nn.ReLU(),
                         nn.Conv2d(mid, mid, 3, padding=1, groups=mid), _group_norm(mid), nn.ReLU(),
                         nn.Conv2d(mid, out_channels, 1))


class StudyClassifier(nn.Module):
    """Two (3x3 convolution, group norm, max pool, ReLU), global max pool, linear (Markhorst 2024, supplement A.1).

    forward: (B, 3, H, W), averaged to one channel; with boxes (B, D, 4) each is cut out first, and the logits are
    (B * D, num_classes). `expansion`: the second convolution is an MBConv.
    """

    denoises, classifies, takes_boxes = False, True, True

    def __init__(self, first: int, second: int, expansion: float | None = None, num_classes: int = 10):
        super().__init__()
        convolution = (nn.Conv2d(first, second, 3, padding=1) if expansion is None
                       else study_mbconv(first, second, expansion))
        self.layers = nn.Sequential(nn.Conv2d(1, first, 3, padding=1), _group_norm(first), nn.MaxPool2d(2), nn.ReLU(),
                                    convolution, _group_norm(second), nn.MaxPool2d(2), nn.ReLU(),
                                    nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(second, num_classes))

    def forward(self, x: Tensor, boxes: Tensor | None = None) -> Output:
        x = x if boxes is None else cut_out(x, boxes, DIGIT)
        return Output(None, self.layers(x.mean(1, keepdim=True)))


# ---------------------------------------------------------------------------------------------------------------
# The controlled study: UNet (supplement A.2) and DC-Net (section 3.1)


class UNet(nn.Module):
    """UNet(b, d, m, c): d levels, level i with int(b * m**i) channels, c 3x3 convolutions a level (Markhorst 2024, fig. 2).

    Max pool down, 2x2 transposed convolution up, concatenation, 1x1 convolution to the image; all padded. (B, 3, H, W) of any
    size -> the same. The paper names no norm; here batch norm and ReLU follow each convolution. `expansion`: MBConvs (as in
    `study_mbconv`) instead of convolutions.
    """

    denoises, classifies = True, False

    def __init__(self, b: int, d: int, m: float, c: int, expansion: float | None = None):
        super().__init__()
        self.widths = [int(b * m**level) for level in range(d)]
        if min(self.widths, default=0) < 1 or c < 1:
            raise ValueError(f"A UNet needs b, d and c of 1 or more, not b {b}, d {d}, m {m}, c {c}.")

        def level(in_channels: int, channels: int) -> nn.Sequential:
            layers = []
            for index in range(c):
                source = channels if index else in_channels
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
        x = features[-1]
        for skip, up, merge in reversed(list(zip(features[:-1], self.up, self.merge, strict=True))):
            x = merge(torch.cat((up(x), skip), 1))
        return self.image(x)

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        return Output(self.decode(self.encode(pad_to_multiple(x, self.stride)))[..., :height, :width], None)


class DCNet(nn.Module):
    """DC-Net Integrated: a classifier on the deepest features of a UNet (Markhorst 2024, section 3.1, fig. 2.ii).

    forward: (B, 3, H, W) -> image and logits (B, K); with boxes (B, D, 4) each is cut out of the deepest features, and the
    logits are (B * D, K). The paper does not show the branch; its FLOPs leave room for little: here a 1x1 convolution to 24
    channels, group norm, ReLU, global max pool, linear. `branch`: another one, a module from features to logits.
    """

    denoises, classifies, takes_boxes = True, True, True

    def __init__(self, unet: UNet, num_classes: int = 10, branch: nn.Module | None = None):
        super().__init__()
        self.unet = unet
        self.branch = branch or nn.Sequential(nn.Conv2d(unet.widths[-1], 24, 1), _group_norm(24), nn.ReLU(),
                                              nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, num_classes))

    def forward(self, x: Tensor, boxes: Tensor | None = None) -> Output:
        height, width = x.shape[-2:]
        features = self.unet.encode(pad_to_multiple(x, self.unet.stride))
        deepest = features[-1]
        if boxes is not None:
            deepest = cut_out(deepest, boxes, -(-DIGIT // self.unet.stride), self.unet.stride)
        return Output(self.unet.decode(features)[..., :height, :width], self.branch(deepest))


def dcnas_tail(in_channels: int, num_classes: int, expansion: int = 3) -> nn.Sequential:
    """Stages 7, 8 and head of a DC-NAS of MB-k3 operations, on features of another width (thesis, table 5:5)."""
    blocks = []
    for stage in STAGES[-2:]:
        for index in range(stage.blocks):
            blocks.append(MBConv(in_channels, expansion * in_channels, stage.out_channels, 3,
                                 stage.stride if index == 0 else 1, 0, stage.activation))
            in_channels = stage.out_channels
    return nn.Sequential(*blocks, Head(in_channels, HEAD_CHANNELS, num_classes, dropout=0.2))


# ---------------------------------------------------------------------------------------------------------------
# Classifiers and denoisers that everybody knows


class Classifier(nn.Module):
    """A network from normalised images to logits, in the form of this project: images in [0, 1] plus noise go in."""

    denoises, classifies = False, True

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        add_normalisation(self)

    def forward(self, x: Tensor) -> Output:
        return Output(None, self.network((x - self.mean) / self.std))


def _torchvision(name: str, num_classes: int) -> Classifier:
    return Classifier(torchvision.models.get_model(name, num_classes=num_classes))


def efficientnet_v2(depth: float, num_classes: int) -> Classifier:
    """EfficientNetV2-b0 (`depth` 1.0) and -b1 (1.1), of width 1, from torchvision's blocks (Tan and Le 2021, official code)."""
    def repeats(count: int) -> int:
        return -int(-depth * count // 1)

    stages = [FusedMBConvConfig(1, 3, 1, 32, 16, repeats(1)), FusedMBConvConfig(4, 3, 2, 16, 32, repeats(2)),
              FusedMBConvConfig(4, 3, 2, 32, 48, repeats(2)), MBConvConfig(4, 3, 2, 48, 96, repeats(3)),
              MBConvConfig(6, 3, 1, 96, 112, repeats(5)), MBConvConfig(6, 3, 2, 112, 192, repeats(8))]
    return Classifier(EfficientNet(stages, dropout=0.2, num_classes=num_classes, last_channel=1280,
                                   norm_layer=partial(nn.BatchNorm2d, eps=1e-3)))


class LPIENet(nn.Module):
    """LPIENet (Conde et al. 2023) with these widths of its encoder and decoder; (B, 3, H, W) of any size -> the same."""

    denoises, classifies = True, False

    def __init__(self, encoder: tuple[int, ...], decoder: tuple[int, ...]):
        super().__init__()

        def stage(in_channels: int, channels: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), _BaseBlock(channels), _BaseBlock(channels),
                                 _Attention(channels))

        self.down = nn.ModuleList(stage(before, width) for before, width in zip((3, *encoder), encoder))
        self.up, channels = nn.ModuleList(), encoder[-1]
        for width, skip in zip(decoder, encoder[-2::-1], strict=True):
            self.up.append(stage(channels, width))
            channels = width + skip
        self.path = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.ELU(),
                                  nn.Conv2d(3, 3, 1))
        self.shortcut = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.ReLU())
        self.gate = nn.Sequential(nn.Conv2d(3, 3, 7, padding=3), nn.ReLU(), nn.Conv2d(3, 3, 5, padding=2), nn.ReLU(),
                                  nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Output:
        height, width = x.shape[-2:]
        image = out = pad_to_multiple(x, 2 ** len(self.up))
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
        self.space = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                                   nn.ELU(), nn.Conv2d(channels, channels, 1))
        self.channels = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ELU(), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.space(x)
        return x + self.channels(x)


class _Attention(nn.Module):
    """A gate from the mean and the maximum over channels, one from the mean alone; both results to one by a 1x1 convolution."""

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
    """DnCNN (Zhang et al. 2017): convolutions of 64 channels, batch norm, ReLU, which find the noise in the image.

    20 layers for colour (CDnCNN-B), 17 for grey images (DnCNN-S).
    """

    denoises, classifies = True, False

    def __init__(self, layers: int = 20, image_channels: int = 3):
        super().__init__()
        self.channels, channels = image_channels, 64
        inner = [layer for _ in range(layers - 2) for layer in
                 (nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())]
        self.layers = nn.Sequential(nn.Conv2d(image_channels, channels, 3, padding=1), nn.ReLU(), *inner,
                                    nn.Conv2d(channels, image_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Output:
        return Output(x - self.layers(x), None)


# ---------------------------------------------------------------------------------------------------------------
# The registry


@dataclass(frozen=True)
class Baseline:
    """`build(num_classes)` makes the network; `size` is the input in its paper, px; `flops` what the paper states, in the
    paper's counting (`paper_flops`)."""

    build: Callable[[int], nn.Module]
    size: int = 224
    flops: float | None = None


def _classifier(first: int, second: int, expansion: float | None = None) -> Callable[[int], nn.Module]:
    return lambda num_classes: StudyClassifier(first, second, expansion, num_classes)


def _dcnet_sequential(unet: tuple) -> Callable[[int], nn.Module]:
    return lambda num_classes: SequentialNetwork(UNet(*unet), StudyClassifier(10, 30, 2.5, num_classes))


UNET, UNET_M, UNET_S = (32, 4, 2, 2), (16, 4, 2, 2), (8, 4, 1.5, 2)  # b, d, m, c

BASELINES = {
    "conv-l": Baseline(_classifier(10, 20), DIGIT, 447e3),
    "conv-m": Baseline(_classifier(8, 19), DIGIT, 345e3),
    "conv-s": Baseline(_classifier(5, 13), DIGIT, 163e3),
    "mb1-s": Baseline(_classifier(10, 21, 1), DIGIT, 177e3),
    "mb2.5-m": Baseline(_classifier(10, 30, 2.5), DIGIT, 350e3),
    "mb2.5-s": Baseline(_classifier(6, 23, 2.5), DIGIT, 178e3),
    "mb4-l": Baseline(_classifier(10, 21, 4), DIGIT, 424e3),
    "mb4-s": Baseline(_classifier(5, 19, 4), DIGIT, 188e3),
    "unet": Baseline(lambda _: UNet(*UNET), 96, 1301.8e6),
    "unet-m": Baseline(lambda _: UNet(*UNET_M), 96),
    "unet-s": Baseline(lambda _: UNet(*UNET_S), 96, 51.2e6),
    "unet-original": Baseline(lambda _: UNet(64, 5, 2, 2), 224),
    "dcnet": Baseline(lambda num_classes: DCNet(UNet(*UNET), num_classes), 96, 1301.8e6),
    "dcnet-seq": Baseline(_dcnet_sequential(UNET), 96, 1302.1e6),
    "dcnet-s": Baseline(lambda num_classes: DCNet(UNet(*UNET_S), num_classes), 96, 51.2e6),
    "dcnet-s-seq": Baseline(_dcnet_sequential(UNET_S), 96, 51.5e6),
    "dcnet-s-tail": Baseline(lambda num_classes: DCNet(UNet(*UNET_S), branch=dcnas_tail(27, num_classes))),
    "resnet18": Baseline(partial(_torchvision, "resnet18")),
    "mobilenet-v2": Baseline(partial(_torchvision, "mobilenet_v2")),
    "mobilenet-v3-small": Baseline(partial(_torchvision, "mobilenet_v3_small")),
    "efficientnet-v2-b0": Baseline(partial(efficientnet_v2, 1.0)),
    "efficientnet-v2-b1": Baseline(partial(efficientnet_v2, 1.1)),
    "lpienet-0.25x": Baseline(lambda _: LPIENet((4, 8, 16), (8, 4))),
    "lpienet-0.5x": Baseline(lambda _: LPIENet((8, 16, 32), (16, 8))),
    "lpienet": Baseline(lambda _: LPIENet((16, 32, 64), (32, 16))),
    "dncnn": Baseline(lambda _: DnCNN()),
    "dncnn-grey": Baseline(lambda _: DnCNN(17, 1)),
}

UNET_NAME = re.compile(r"unet-b(\d{1,3})-d([1-8])-m(\d(?:\.\d)?)-c([1-9])(-mb)?")  # a UNet of any b, d, m, c
UNET_MBCONV = 2.5  # expansion of a UNet of MBConvs; the paper does not say, and takes 2.5 for its classifier


def find_baseline(name: str) -> Baseline:
    """The baseline of this name, or of a UNet's parameters ("unet-b8-d4-m1.5-c2", "...-mb"); KeyError if there is none."""
    parameters = UNET_NAME.fullmatch(name)
    if not parameters:
        return BASELINES[name]
    b, d, m, c, mb = parameters.groups()
    return Baseline(lambda _: UNet(int(b), int(d), float(m), int(c), UNET_MBCONV if mb else None), 96)


def build_baseline(name: str, num_classes: int = 10) -> nn.Module:
    """The network of this name with fresh weights."""
    return find_baseline(name).build(num_classes)


def paper_flops(network: nn.Module, size: int) -> int:
    """Multiply-accumulates of one image (3, size, size) as the controlled study counts them.

    Convolutions, transposed convolutions and linear layers with their biases, and max pools by kernel area per output (not
    the global one). A network that takes boxes is counted with one digit.
    """
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            per_output = module.weight[0].numel() + (module.bias is not None)
        elif isinstance(module, nn.ConvTranspose2d):  # 2x2 of stride 2: each output has one tap
            per_output = module.in_channels + (module.bias is not None)
        elif isinstance(module, nn.MaxPool2d):
            per_output = module.kernel_size ** 2
        else:
            per_output = 0
        total += per_output * (output.numel() if per_output else 0)

    counted = copy.deepcopy(network).eval()
    for module in counted.modules():
        module.register_forward_hook(count)
    boxes = ()
    if getattr(network, "takes_boxes", False) and size > DIGIT:
        boxes = (torch.tensor([[[0, 0, DIGIT, DIGIT]]]),)
    with torch.no_grad():
        counted(torch.zeros(1, 3, size, size), *boxes)
    return total
