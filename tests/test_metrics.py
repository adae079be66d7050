"""metrics.py: PSNR, SSIM, luma and rounding against values by hand, the definition and scikit-image."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
from metrics import luma, psnr, ssim, to_8bit


def test_psnr_by_hand():
    black, half = torch.zeros(2, 3, 5, 7), torch.full((2, 3, 5, 7), 0.5)
    half[1] = 0.1
    assert psnr(black, half).tolist() == pytest.approx([20 * math.log10(2), 20], abs=1e-5)
    assert psnr(black * 255, half * 255, data_range=255).tolist() == pytest.approx([6.0206, 20], abs=1e-4)
    assert psnr(half, half).tolist() == [math.inf, math.inf]
    one_channel = black.double().clone()
    one_channel[:, 0] = 0.3  # the error is shared by three channels: RGB, not luma
    assert psnr(one_channel, black.double())[0].item() == pytest.approx(10 * math.log10(3 / 0.09), abs=1e-12)


def test_ssim_of_constant_images_is_the_closed_form():
    a, b, c1 = 0.2, 0.7, 0.01 ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)  # no variance: the second factor is 1
    x, y = (torch.full((2, 3, 16, 11), value, dtype=torch.float64) for value in (a, b))
    assert ssim(x, y).tolist() == pytest.approx([expected] * 2, abs=1e-12)
    assert ssim(x * 255, y * 255, data_range=255).tolist() == pytest.approx([expected] * 2, abs=1e-12)
    assert ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-12)


def naive_ssim(x, y):
    """The definition of Wang et al. 2004, window by window, two passes over each window."""
    row, column = np.mgrid[-5:6, -5:6]
    weight = np.exp(-(row ** 2 + column ** 2) / (2 * 1.5 ** 2))
    weight /= weight.sum()
    values = []
    for channel in range(x.shape[0]):
        for top in range(x.shape[1] - 10):
            for left in range(x.shape[2] - 10):
                a, b = (z[channel, top:top + 11, left:left + 11] for z in (x, y))
                mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
                var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
                covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a ** 2 + mean_b ** 2 + 1e-4)
                values.append(luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4))
    return np.mean(values)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    clean = rng.random((2, 3, 14, 19))
    return clean, clean + 0.3 * rng.standard_normal(clean.shape)


def test_ssim_equals_the_definition(pair):
    clean, noisy = pair
    expected = [naive_ssim(a, b) for a, b in zip(noisy, clean)]
    noisy, clean = torch.from_numpy(noisy), torch.from_numpy(clean)
    assert ssim(noisy, clean).tolist() == pytest.approx(expected, abs=1e-10)
    in_float32 = ssim(noisy.float().to(memory_format=torch.channels_last), clean.float())
    assert in_float32.dtype == torch.float32 and in_float32.tolist() == pytest.approx(expected, abs=1e-5)


def test_metrics_equal_scikit_image(pair):
    theirs = pytest.importorskip("skimage.metrics")
    clean, noisy = pair
    for ours, other in ((psnr, lambda a, b: theirs.peak_signal_noise_ratio(b, a, data_range=1)),
                        (ssim, lambda a, b: theirs.structural_similarity(
                            a, b, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5,
                            use_sample_covariance=False))):
        measured = ours(torch.from_numpy(noisy), torch.from_numpy(clean)).tolist()
        assert measured == pytest.approx([other(a, b) for a, b in zip(noisy, clean)], abs=1e-10)


def test_ssim_is_a_loss(pair):
    """Its window has a gradient of its own, which must agree with finite differences in float64."""
    clean, noisy = (torch.from_numpy(x) for x in pair)
    small = noisy[:1, :2, :13, :14].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ssim(x, clean[:1, :2, :13, :14]), small)
    flat = torch.zeros(1, 3, 12, 12, requires_grad=True)  # equal and constant images: no division by zero
    ssim(flat, torch.zeros(1, 3, 12, 12)).sum().backward()
    assert torch.isfinite(flat.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # AMP must not touch the digits
        single, double = ssim(noisy.float(), clean.float()), ssim(noisy, clean)
    assert single.tolist() == pytest.approx(double.tolist(), abs=1e-5)
    assert ssim(noisy.bfloat16(), clean.float()).dtype == torch.float32


@pytest.mark.parametrize("x, y, words", [
    (torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40), "11x11"),
    (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17), "one shape"),
    (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), "one shape"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16), "floating point"),
])
def test_ssim_refuses(x, y, words):
    with pytest.raises(ValueError, match=words):
        ssim(x, y)


def test_to_8bit():
    values = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0])
    assert (to_8bit(values) * 255).tolist() == pytest.approx([0, 0, 0, 1, 255, 255])


def test_luma_is_matlabs():
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    expected = [16, 235, 16 + 65.481, 16 + 128.553, 16 + 24.966]
    assert (luma(colours[..., None, None]).flatten() * 255).tolist() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        luma(torch.zeros(1, 1, 4, 4))


def test_metrics_work_when_copied_alone(tmp_path):
    shutil.copy(Path(metrics.__file__), tmp_path / "quality.py")
    code = ("import torch, quality; x = torch.rand(2, 3, 16, 16)\n"
            "print(quality.psnr(x, x + 0.1).round().tolist(), quality.ssim(x, x).round().tolist(),\n"
            "      quality.to_8bit(quality.luma(x)).shape, quality.WINDOW)")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True,
                            text=True)
    assert result.stdout == "[20.0, 20.0] [1.0, 1.0] torch.Size([2, 1, 16, 16]) 11\n", result.stderr
