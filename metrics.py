"""PSNR, SSIM, luma and rounding to 8 bit of batches of images; copy this file alone, it needs torch only.

    from metrics import psnr, ssim
    psnr(denoised, clean), ssim(denoised, clean)  # two (B, C, H, W) in [0, 1] -> (B,) in dB, (B,) at most 1
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, WINDOW_SIGMA = 11, 1.5  # of SSIM: pixels
EQUAL_DB = 100  # what equal images count as in a mean; one value of a 64 px image changed by 1/255 has 89 dB


def psnr(image: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: two (B, C, H, W) -> (B,); inf where they are equal.

    Over all channels (RGB, not luma, which is about 2 dB higher). Raises ValueError when the shapes differ.
    """
    image, reference = _checked_pair(image, reference)
    return 10 * torch.log10(data_range ** 2 / _image_mean((image - reference).square()))


def ssim(image: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each image: two (B, C, H, W), 11 pixels or larger -> (B,); differentiable.

    Wang, Bovik, Sheikh and Simoncelli 2004: Gaussian window 11x11 of sigma 1.5, K 0.01 and 0.03, population
    covariance, only where the window fits, per channel, then the mean. In float64 it equals scikit-image
    (gaussian_weights=True, sigma=1.5, use_sample_covariance=False) to 1e-10. Raises ValueError when the
    shapes differ or are too small.
    """
    image, reference = _checked_pair(image, reference)
    if min(image.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of {WINDOW}x{WINDOW} pixels or more, not "
                         f"{image.shape[-2]}x{image.shape[-1]}.")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _blur(image), _blur(reference)  # (B, C, H - 10, W - 10)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    covariance = _blur(image * reference) - product
    variances = _blur(image.square() + reference.square()) - squares  # of both images, added
    return _image_mean((2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2)))


def to_8bit(image: Tensor) -> Tensor:
    """What a PNG file keeps of an image: clamped to [0, 1] and rounded to multiples of 1/255."""
    return image.clamp(0, 1).mul(255).round().div(255)


def luma(image: Tensor) -> Tensor:
    """Y of YCbCr: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [16, 235] / 255, as super-resolution is measured.

    ITU-R 601 in studio range, MATLAB's rgb2ycbcr, not rounded to 8 bit. Raises ValueError where there are not
    three channels.
    """
    if image.shape[1] != 3:
        raise ValueError(f"The luma of an image needs its 3 channels, not {image.shape[1]}; "
                         "measure a grey image as it is.")
    weights = torch.tensor((65.481, 128.553, 24.966), dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
    return ((image * weights).sum(1, keepdim=True) + 16) / 255


def _checked_pair(image: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != reference.shape or image.dim() != 4:
        raise ValueError("PSNR and SSIM need two (B, C, H, W) images of one shape, not "
                         f"{tuple(image.shape)} and {tuple(reference.shape)}.")
    if not (image.is_floating_point() and reference.is_floating_point()):
        raise ValueError(f"PSNR and SSIM need floating point images, not {image.dtype}, {reference.dtype}.")
    # Half precision (a network under AMP) has too few digits for the variances of SSIM.
    half = (torch.float16, torch.bfloat16)
    return tuple(x.float() if x.dtype in half else x for x in (image, reference))


def _image_mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,), summed in an order that does not depend on B: one result for all batch sizes."""
    return x.contiguous().mean(3).mean(2).mean(1)


class _Blur(torch.autograd.Function):
    """The separable Gaussian window of SSIM where it fits: (B, C, H, W) -> (B, C, H - 10, W - 10).

    Sums of shifted images: a depthwise convolution in float64 on a CPU is 2 to 10 times slower, and AMP and
    TF32 would change its digits. The window is symmetric, so the gradient is the same sum over a padded
    gradient; autograd alone would keep a padded image for every shift.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        weights = [math.exp(-((k - WINDOW // 2) / WINDOW_SIGMA) ** 2 / 2) for k in range(WINDOW)]
        for dim in (2, 3):
            size = x.shape[dim] - WINDOW + 1
            total = x.narrow(dim, 0, size) * (weights[0] / sum(weights))
            for k in range(1, WINDOW):
                total.add_(x.narrow(dim, k, size), alpha=weights[k] / sum(weights))
            x = total
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _blur(F.pad(gradient, [WINDOW - 1] * 4))


_blur = _Blur.apply
