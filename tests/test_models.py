"""models.py: the record, the networks, and above all that the supernet is what it exports."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.ops import Conv2dNormActivation
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import models
import registry
import train
from models import Arch, MBConv, Network, SuperNet, make_arch, named_arch

ROOT = Path(models.__file__).parent


def random_alpha(supernet, seed=0):
    with torch.no_grad():
        supernet.alpha.copy_(torch.randn(supernet.alpha.shape, generator=torch.Generator().manual_seed(seed)))
        supernet.normalize_()
    return supernet


# --- one-hot supernet == exported network -----------------------------------------------------------------


@pytest.mark.parametrize("space", [4, 6, 8])
@pytest.mark.parametrize("model", models.MODELS)
def test_one_hot_supernet_equals_the_exported_network_with_copied_weights(model, space):
    torch.manual_seed(space)
    supernet = SuperNet(model, space, 0 if model == "dnas" else 7, gain=space == 6)
    supernet = random_alpha(supernet, seed=space)
    for name, parameter in supernet.named_parameters():
        if name.endswith(".gain"):
            torch.nn.init.normal_(parameter)
    generator = torch.Generator().manual_seed(space)
    path = supernet.other_path(supernet.best_path(), generator)
    widths = [models.width_range(row[index].operation, row[index].position.in_channels)
              for row, index in ((mixed.candidates, i) for mixed, i in zip(supernet.mixed, path))]
    # narrowest, widest, starting width in turn: sliced weights must be the copied ones
    starts = [mixed.candidates[index].width for mixed, index in zip(supernet.mixed, path)]
    supernet.set_widths(path, [(*both, start)[n % 3] for n, (both, start) in enumerate(zip(widths, starts))])
    network = Network(supernet.arch(path))
    supernet.copy_to(network, path)
    images = torch.rand(3, 3, 40, 72, generator=generator)  # no multiples of 16: padded and cropped inside
    one_hot = F.one_hot(torch.tensor(path), len(supernet.operations)).float()
    with torch.no_grad():
        exported = network.train()(images)  # batch statistics, as in the search
        for choice in (path, one_hot):
            found = supernet(images, choice)
            for ours, theirs in zip(found, exported):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        wrong = list(path)
        wrong[3] = (path[3] + 1) % len(supernet.operations)
        different = supernet(images, wrong)
    ours, theirs = (output.logits if network.classifies else output.image for output in (different, exported))
    assert (ours - theirs).abs().max() > 1e-3


def test_exported_record_has_the_kept_widths_and_survives_json():
    supernet = random_alpha(SuperNet("cnas", 8, 5))
    path = supernet.best_path()
    mids = [models.width_range(m.candidates[i].operation, m.candidates[i].position.in_channels)[0]
            for m, i in zip(supernet.mixed, path)]
    supernet.set_widths(path, mids)
    arch = supernet.arch()
    assert [block.mid_channels for block in arch.blocks[1:]] == mids
    assert Arch.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


def test_set_width_keeps_the_largest_depthwise_kernels():
    supernet = SuperNet("cnas", 4, 5)
    candidate = supernet.mixed[2].candidates[0]
    with torch.no_grad():
        candidate.depthwise_weight.zero_()
        strong = torch.tensor([1, 5, 40, 41, 60] + list(range(10, 29)))
        candidate.depthwise_weight[strong] = -1.0
        features = torch.rand(2, candidate.position.in_channels, 8, 8)
        candidate.width = len(candidate.depthwise_weight)
        whole = candidate(features)  # the weak channels are zero, so that the strong ones are all there is
        moved = candidate.set_width(24)
        assert (candidate.depthwise_weight[:24] == -1).all() and (candidate.depthwise_weight[24:] == 0).all()
        torch.testing.assert_close(candidate(features), whole)
    assert [parameter is candidate.expand_weight for parameter in moved] == [True, False, False]
    assert candidate.set_width(24) == []  # in place already


def test_no_channel_is_kept_that_was_never_trained_before_those_that_were():
    torch.manual_seed(0)
    supernet = SuperNet("cnas", 4, 5)
    with torch.no_grad():
        for weight in supernet.weight_parameters():
            weight *= 0.5  # training makes weights of normalised convolutions smaller than fresh ones
    supernet.inherit_()
    features = torch.rand(2, 40, 8, 8)
    for candidate in supernet.mixed[3].candidates:
        inherited, start = candidate.depthwise_weight[:candidate.width].clone(), candidate.width
        with torch.no_grad():
            candidate.depthwise_weight[start:] *= 10
        narrow, wide = models.width_range(candidate.operation, candidate.position.in_channels)
        for width in (narrow, start, narrow):
            candidate.set_width(width)
            kept = candidate.depthwise_weight[:width]
            assert all((kernel == inherited).all((1, 2, 3)).any() for kernel in kept)
        restored = copy.deepcopy(candidate)
        restored.load_state_dict(candidate.state_dict())
        for one in (candidate, restored):  # fresh channels come in when all others are, and as the weakest
            before = one.depthwise_weight.abs().sum((1, 2, 3))[:start].min()
            one.set_width(wide)
            torch.testing.assert_close(one.depthwise_weight.abs().sum((1, 2, 3))[start:wide],
                                       before.expand(wide - start))
            assert one(features).isfinite().all() and one.trained == wide


def test_a_fresh_network_is_the_identity_in_its_residual_blocks_and_the_papers_is_not():
    network = Network(named_arch("cnas-k5-e6", 5))
    blocks = [block for block in network.blocks() if block.residual]
    assert len(blocks) == 12
    for begin, same in ((lambda network: None, True), (train.begin_as_papers, False)):
        begin(network)
        for block in blocks:
            x = torch.rand(2, block.project[0].out_channels, 8, 8)
            assert torch.equal(block(x), x) == same


@pytest.mark.parametrize("model", models.MODELS)
def test_a_shallow_network_has_one_block_a_stage(model):
    arch = named_arch(f"{model}-k5-e6-shallow", 5)
    assert [block.stage for block in arch.blocks] == list(range(2, 7 if model == "dnas" else 9))
    assert {block.kernel_size for block in arch.blocks[1:]} == {5}
    assert {*arch.blocks} < {*named_arch(f"{model}-k5-e6", 5).blocks}
    fused = named_arch(f"{model}-k5-e6-fused", 5)
    assert [block.fused for block in fused.blocks] == [block.stage < 5 for block in arch.blocks]
    assert [replace(block, fused=False) for block in fused.blocks] == [*arch.blocks]
    content = arch.to_dict()
    for block in content["blocks"]:
        del block["fused"]  # as in records of before
    assert Arch.from_dict(content) == arch


def test_a_learned_depth_begins_deep():
    supernet = SuperNet("cnas", 4, 5, depth="learned")
    assert all(supernet.kept()) and supernet.keep_probability().min() > 0.7


def test_supernet_state_survives_other_widths():
    source, target = random_alpha(SuperNet("cnas", 4, 5)), SuperNet("cnas", 4, 5)
    source.set_widths(source.best_path(), [m.candidates[i].block.in_channels * 2
                                           for m, i in zip(source.mixed, source.best_path())])
    target.load_state_dict(source.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = (supernet(images, source.best_path()).logits for supernet in (source, target))
    assert torch.equal(ours, theirs)
    assert target.arch() == source.arch()


# --- sampling ---------------------------------------------------------------------------------------------


def test_paths_follow_alpha_and_the_second_path_never_repeats_the_first():
    supernet = SuperNet("cnas", 4, 5)
    with torch.no_grad():
        supernet.alpha.copy_(torch.tensor([0.7, 0.2, 0.08, 0.02]).log().repeat(len(supernet.mixed), 1))
    generator = torch.Generator().manual_seed(0)
    first, second = [], []
    for _ in range(500):
        path = supernet.sample_path(generator)
        other = supernet.other_path(path, generator)
        assert all(a != b for a, b in zip(path, other))
        first += path
        second += [(b - a) % 4 for a, b in zip(path, other)]
    shares = torch.bincount(torch.tensor(first), minlength=4) / len(first)
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.08, 0.02]), rtol=0, atol=0.02)
    steps = torch.bincount(torch.tensor(second), minlength=4) / len(second)
    torch.testing.assert_close(steps, torch.tensor([0, 1, 1, 1]) / 3, rtol=0, atol=0.02)


def test_mixture_hardens_with_the_temperature():
    supernet = random_alpha(SuperNet("cnas", 4, 5))
    soft = supernet.mixture(100.0, torch.Generator().manual_seed(1))
    hard = supernet.mixture(0.01, torch.Generator().manual_seed(1))
    torch.testing.assert_close(soft.sum(1), torch.ones(len(soft)))
    assert soft.max() < 0.3 and hard.max(1).values.median() > 0.99
    same_gumbel_noise = torch.Generator().manual_seed(1)
    assert hard.argmax(1).tolist() == supernet.sample_path(same_gumbel_noise)


def test_entropy_is_one_for_undecided_and_zero_for_decided():
    supernet = SuperNet("cnas", 4, 5)
    torch.testing.assert_close(supernet.entropy(), torch.ones(18))
    with torch.no_grad():
        supernet.alpha[:, 1] += 100
        supernet.normalize_()
    torch.testing.assert_close(supernet.entropy(), torch.zeros(18), rtol=0, atol=1e-6)


# --- networks ---------------------------------------------------------------------------------------------


def test_decoder_costs_what_the_facts_say_at_224():
    archs = [named_arch("cnas-k3-e3", 100), *(replace(named_arch("dcnas-k3-e3", 100), decoder=decoder)
                                              for decoder in ("conv", "sharp"))]
    cnas, dcnas, full = (models.count_macs(Network(arch), 224) for arch in archs)
    assert (dcnas - cnas) / 1e6 == pytest.approx(222, abs=1)
    # Two 3x3 convolutions, 10 features of 16 channels, the noise level, the noisy image to and in level 1.
    pixel = 9 * (16 * 12 + 12 * 3) + 10 * 16 + 27 * 1.25 + (12 * 12 + 9 * 12 * 16) / 4
    assert full - dcnas == pytest.approx(pixel * 224**2, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.2, 1.0])
def test_the_noise_level_is_that_of_the_noise_and_not_of_the_picture(sigma):
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64).clone()
    ramp[:, 8:24, 8:24] = (torch.arange(256).view(16, 16) % 2).float()  # a little texture
    noisy = ramp + sigma * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = models.NoiseLevel()(noisy).exp().sqrt()
    assert found.shape == (4, 1, 1, 1) and found.sub(sigma).abs().max() < 0.3 * sigma
    flat = models.NoiseLevel()(torch.full((1, 3, 16, 16), 0.3))
    assert flat.item() == pytest.approx(math.log(models.NoiseLevel.FLOOR), abs=0.01)


def test_a_clean_texture_is_not_noise_to_two_scales():
    generator = torch.Generator().manual_seed(0)
    texture = sum(F.interpolate(torch.randn(1, 3, side, side, generator=generator), 128, mode="bilinear")
                  for side in (16, 32, 64)) / 6 + 0.5
    six, two, one = (models.NoiseLevel(*how)(texture).div(2).exp().item() for how in ((), (2, 2), (1, 2)))
    assert six < two < 0.3 * one and one > 0.014
    texture[..., 64:] = 0.5  # half of the picture is plain
    noisy = 0.5 * texture + 0.05 * torch.randn(texture.shape, generator=generator)
    assert models.NoiseLevel()(noisy).div(2).exp().item() == pytest.approx(0.05, rel=0.2)


def test_old_records_keep_their_noise_level_and_region_means():
    content = named_arch("dnas-k3-e3", 0).to_dict()
    decoder = models.make_network(Arch.from_dict(content)).decoder
    assert (decoder.noise_level.scales, decoder.full.regions) == (2, "fits")
    assert decoder.noise_level.detail.shape == (3, 1, 6, 6)
    del content["noise_scales"], content["regions"], content["noise_taps"]
    for pure, regions in ((True, "squares"), (False, "masks")):  # the field before `regions`
        assert Arch.from_dict({**content, "pure_regions": pure}).regions == regions
    decoder, gate = (models.make_network(Arch.from_dict({**content, "branch": branch})).decoder
                     for branch in (12, 0))
    assert decoder.noise_level.scales == 1 == gate.noise_level.scales and decoder.full.regions == "masks"
    assert torch.equal(decoder.noise_level.detail[0, 0], torch.tensor([[0.5, -0.5], [-0.5, 0.5]]))
    with pytest.raises(ValueError, match="noise_scales must be one of 1, 2|a whole number"):
        Arch.from_dict({**content, "noise_scales": 3})


def test_the_image_is_the_noisy_one_where_its_weight_is_one_and_a_clean_one_at_first():
    torch.manual_seed(0)
    network = Network(named_arch("dcnas-k3-e3", 4)).eval()
    clean = F.interpolate(torch.rand(2, 3, 5, 5), 50, mode="bilinear")
    assert (network(clean).image - clean).abs().max() < 0.01
    assert (network(clean + torch.randn(clean.shape)).image - clean).std() < 0.5  # hardly any of the noise
    with torch.no_grad():
        network.decoder.image.bias[3] = 1e6
    noisy = clean + torch.randn(clean.shape)
    torch.testing.assert_close(network(noisy).image, noisy)


def test_a_branch_of_no_channels_is_a_gate_between_the_noisy_image_and_the_decoded_one():
    torch.manual_seed(0)
    network = Network(replace(named_arch("dcnas-k3-e3", 4), branch=0)).eval()
    assert Arch.from_dict(network.arch.to_dict()) == network.arch
    clean = F.interpolate(torch.rand(2, 3, 5, 5), 50, mode="bilinear")
    noisy = clean + torch.randn(clean.shape)
    with torch.no_grad():
        assert (network(clean).image - clean).abs().max() < 0.01 < (network(noisy).image - noisy).std()
        decoded = network.decoder.full(torch.cat((clean, torch.full_like(clean[:, :1], -1e6)), 1), noisy,
                                       network.decoder.level_of(noisy))
        network.decoder.image.bias[3] = 1e6
        torch.testing.assert_close(network(noisy).image, noisy)
    torch.testing.assert_close(decoded, clean)


def test_the_colours_of_a_region_do_not_mix_with_those_beside_it():
    stroke = torch.zeros(1, 1, 40, 72)  # not a multiple of the largest scale
    stroke[..., 10:30, 7:15] = 1
    def paint(mask):
        return mask * torch.tensor([1.0, 0.2, 0.0]).view(1, 3, 1, 1) + (1 - mask) * 0.3
    def told(image, mask, side, regions):
        weights = [torch.full_like(mask, each == side) for each in models.NEARBY]
        return models.REGIONS[regions](image, mask, weights)
    noisy = paint(stroke) + 0.5 * torch.randn(1, 3, 40, 72, generator=torch.Generator().manual_seed(0))
    even, plain = torch.full_like(stroke, 0.5), F.avg_pool2d(paint(stroke), 2)
    soft = F.avg_pool2d(stroke, 3, 1, 1)  # pixels of an edge are of both colours
    worst = {}
    for regions in models.REGIONS:
        wide = told(paint(stroke), stroke, 32, regions) * stroke
        assert (wide - paint(stroke) * stroke).abs().max() < (0.3 if regions == "masks" else 0.03)
        assert (told(noisy, stroke, 32, regions) * stroke - wide).abs().max() < 0.1
        torch.testing.assert_close(told(paint(stroke), even, 2, regions),
                                   F.interpolate(plain, scale_factor=2, mode="bilinear"))
        worst[regions] = ((told(paint(soft), soft, 8, regions) - paint(soft)) * (soft == 1)).abs().max()
    assert worst["fits"] < 0.1 * worst["squares"] < 0.06 * worst["masks"]


def test_a_fit_is_the_least_squares_of_the_pixels_nearby():
    """Of an image that repeats itself every 8 pixels, so that all squares of 8 have the same means."""
    torch.manual_seed(0)
    mask, noisy = torch.rand(1, 1, 8, 8, dtype=torch.float64), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    design = torch.stack((mask.flatten(), torch.ones(64)), 1)
    line = design @ torch.linalg.lstsq(design, noisy[0].flatten(1).T).solution
    mask, noisy = mask.repeat(1, 1, 8, 12), noisy.repeat(1, 1, 8, 12)
    weights = [torch.full_like(mask, side == 8) for side in models.NEARBY]
    fit = models.region_fits(noisy, mask, weights, least=0.0)
    torch.testing.assert_close(fit, line.T.reshape(1, 3, 8, 8).repeat(1, 1, 8, 12))
    mask, noisy = (0.95 + 0.02 * mask).half(), noisy.half()
    half, double = (models.region_fits(noisy.to(kind), mask.to(kind), [weight.to(kind) for weight in weights])
                    for kind in (torch.half, torch.float64))
    torch.testing.assert_close(half.double(), double, atol=1e-3, rtol=0)  # variances need 32 bit


def test_fits_at_the_border_are_of_the_pixels_that_are_there():
    ramp, flat = torch.linspace(0, 1, 80).expand(1, 3, 48, 80), torch.full((1, 1, 48, 80), 0.5)
    widest = models.region_fits(ramp, flat, [torch.full_like(flat, side == 32) for side in models.NEARBY])
    last, before = ramp[..., 64:].mean().item(), ramp[..., 32:64].mean().item()  # the last block is cut off
    assert widest[0, 0, 0, -1].item() == pytest.approx(last + (before - last) / 64, abs=1e-5)


@pytest.mark.parametrize("scale", (2, 8))
def test_enlarging_by_matrices_is_bilinear_interpolation(scale):
    x = torch.rand(2, 8, 3, 5, dtype=torch.float64, requires_grad=True).to(memory_format=torch.channels_last)
    images = models.enlarge(x, scale), F.interpolate(x, scale_factor=scale, mode="bilinear")
    torch.testing.assert_close(*images)
    torch.testing.assert_close(*(torch.autograd.grad(image.square().sum(), x)[0] for image in images))
    assert torch.equal(models.enlarge(x.detach(), scale), images[1])


@pytest.mark.parametrize("then", (None, torch.nn.Conv2d(5, 3, 1)), ids=("alone", "before a 1x1 convolution"))
def test_the_up_convolution_is_a_transposed_convolution(then):
    torch.manual_seed(0)  # `then` was drawn without a seed: in single precision one run in many was not close
    up, x = models.UpConv(6, 5).double(), torch.rand(2, 6, 7, 9, dtype=torch.float64, requires_grad=True)
    then = then and then.double()
    plain = torch.nn.ConvTranspose2d.forward(up, x)
    plain = plain if then is None else then(plain)
    torch.testing.assert_close(up.layer_by_layer(x, then), plain)
    torch.testing.assert_close(up(x, then), plain)
    parameters = (x, *up.parameters(), *(then.parameters() if then else ()))
    gradients = [torch.autograd.grad(out.square().sum(), parameters) for out in (up(x, then), plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kernel, stride, height, width", (
    (5, 1, 16, 16), (5, 2, 15, 9), (5, 1, 4, 4), (5, 2, 4, 4), (5, 2, 3, 7), (5, 1, 2, 2), (5, 2, 1, 1),
    (3, 1, 2, 2), (3, 2, 2, 2), (3, 1, 1, 1), (7, 1, 9, 9), (7, 2, 9, 8)))
def test_gradients_of_a_depthwise_kernel_by_its_columns_are_those_of_all(kernel, stride, height, width):
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
             for shape in ((2, 6, height, width), (6, 1, kernel, kernel))]
    plain = F.conv2d(*given, None, stride, kernel // 2, groups=6)
    ours = models.depthwise(*given, stride)
    assert "Depthwise" in type(ours.grad_fn).__name__ and torch.equal(ours, plain)
    wanted = torch.autograd.grad(plain.square().sum(), given)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), given), wanted)
    frozen = models.depthwise(given[0], given[1].detach(), stride)  # as in a step of alpha
    torch.testing.assert_close(torch.autograd.grad(frozen.square().sum(), given[0])[0], wanted[0])


def test_macs_of_one_mbconv_by_hand():
    block = MBConv(8, 24, 16, 5, stride=2)
    expected = 24 * 8 * 32 * 32 + 24 * 25 * 16 * 16 + 16 * 24 * 16 * 16
    with FlopCounterMode(display=False) as counter:
        block(torch.rand(1, 8, 32, 32))
    assert counter.get_total_flops() == 2 * expected


def test_a_fused_block_has_a_dense_convolution_in_place_of_two():
    block = MBConv(8, 24, 8, 5, se_channels=4, fused=True).eval()
    x = torch.rand(2, 8, 12, 12)
    assert torch.equal(block(x), x)  # at first
    torch.nn.init.ones_(block.project[1].weight)
    features = F.relu(F.conv2d(x, block.depthwise[0].weight, padding=2) / math.sqrt(1 + 1e-5))  # a fresh norm
    expected = F.conv2d(block.se(features), block.project[0].weight) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(block(x), x + expected)
    with FlopCounterMode(display=False) as counter:
        MBConv(8, 24, 16, 5, stride=2, fused=True)(torch.rand(1, 8, 32, 32))
    assert counter.get_total_flops() == 2 * (24 * 8 * 25 + 16 * 24) * 16 * 16


@pytest.mark.parametrize("height, width", [(1, 1), (3, 50), (16, 16), (33, 47), (64, 64)])
def test_any_size_works(height, width):
    network = Network(named_arch("dcnas-k3-e3", 4)).eval()
    output = network(torch.rand(2, 3, height, width))
    assert output.image.shape == (2, 3, height, width) and output.logits.shape == (2, 4)
    assert torch.isfinite(output.image).all() and torch.isfinite(output.logits).all()


def test_padding_mirrors_and_does_not_change_what_fits():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    padded = models.pad_to_multiple(x, 4)
    assert padded.shape == (1, 1, 4, 4) and torch.equal(padded[..., 3, :], x[..., 1, :])
    assert models.pad_to_multiple(padded, 4) is padded


def test_normalisation_is_inside_the_network():
    network = Network(named_arch("cnas-k3-e3", 4)).eval()
    seen = []
    network.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.full((1, 3, 8, 8), 0.485))
    assert seen[0][0, 0].abs().max() < 1e-6


def test_half_of_the_variance_of_fresh_kernels_is_in_their_mean():
    for k in (3, 5):
        conv = torch.nn.Conv2d(64, 64, k)
        before = conv.weight.var().item()
        models.begin_smooth(conv)
        assert conv.weight.var().item() == pytest.approx(before, rel=0.03)
        assert conv.weight.mean((2, 3)).var().item() == pytest.approx(before / 2, rel=0.08)
    network = Network(named_arch("dcnas-k5-e3", 10))
    for part, share in ((network.decoder.levels, 0.5), (network.tail, 1 / 25)):  # the tail's stay as is
        shares = [(weight.mean((2, 3)).var() / weight.var()).item() for weight in part.parameters()
                  if weight.dim() == 4 and weight.shape[-1] > 2 and weight.numel() > 4000]
        assert len(shares) >= 5 and shares == pytest.approx([share] * len(shares), rel=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_a_fresh_decoder_passes_on_colours_that_noise_hides(seed, monkeypatch):
    images = data.load_data("digits", train_images=1, val_images=64).val
    clean = torch.stack([image for image, _ in images]).float() / 255
    noisy = clean + torch.rand(64, 1, 1, 1) * torch.randn(clean.shape)
    colours = F.avg_pool2d(clean - clean.mean(1, keepdim=True), 2).permute(0, 2, 3, 1).reshape(-1, 3)

    def share_found():
        """The share of the colours' variance that a linear map of the decoder's last features finds."""
        torch.manual_seed(seed)
        network, features = Network(named_arch("dcnas-k3-e6", 10)), []
        network.decoder.levels[-1].convs.register_forward_hook(lambda module, args, out: features.append(out))
        with torch.no_grad():
            network(noisy)
        x = features[0].permute(0, 2, 3, 1).flatten(0, 2)
        x = torch.cat((x, torch.ones(len(x), 1)), 1)
        rest = colours - x @ torch.linalg.lstsq(x, colours).solution
        return 1 - (rest.square().sum() / colours.square().sum()).item()

    smooth = share_found()
    monkeypatch.setattr(models, "begin_smooth", lambda network: None)
    assert smooth > 0.05 and smooth > 4 * share_found()


def test_drop_connect_grows_with_depth_and_is_off_in_eval():
    network = Network(named_arch("cnas-k3-e3", 4), drop_connect=0.2)
    rates = [block.drop_connect.p for block in network.blocks()[1:]]
    assert rates == sorted(rates) and rates[0] < 0.02 and 0.18 < rates[-1] < 0.2
    network.eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(network(x).logits, network(x).logits)


# --- the record -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, word", [
    (lambda r: r.update(model="resnet"), "model must be"),
    (lambda r: r.update(num_classes=0), "num_classes"),
    (lambda r: r.update(num_classes=True), "num_classes"),
    (lambda r: r.update(method="magic"), "method"),
    (lambda r: r.pop("blocks"), "blocks"),
    (lambda r: r.update(blocks=[1, 2]), "blocks"),
    (lambda r: r["blocks"][4].pop("stride"), "stride"),
    (lambda r: r["blocks"][4].update(color="red"), "color"),
    (lambda r: r["blocks"][4].update(in_channels=25), "channels"),
    (lambda r: r["blocks"][4].update(mid_channels=2), "mid_channels"),
    (lambda r: r["blocks"][4].update(mid_channels="9"), "mid_channels"),
    (lambda r: r["blocks"][4].update(mid_channels=10**12), "mid_channels"),
    (lambda r: r["blocks"][4].update(kernel_size=4), "kernel_size"),
    (lambda r: r["blocks"][4].update(activation=["relu"]), "activation"),
    (lambda r: r["blocks"][3].update(stride=1), "stage 4"),
    (lambda r: r["blocks"].pop(), "stage"),
])
def test_bad_records_are_refused_in_one_sentence(change, word):
    record = registry.named_record("dcnas-k3-e3", 3, {})
    change(record)
    with pytest.raises(ValueError) as caught:
        registry.build_network(record)
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [None, [], {}, {"method": ["tfnas"]}, {"method": "magic"}])
def test_what_is_no_record_is_refused_in_one_sentence(record):
    with pytest.raises(ValueError, match="^The search method .* is unknown; known are .*tfnas, .*named.$"):
        registry.build_network(record)


def test_records_name_their_method_and_survive_json():
    for name, method in (("dcnas-k5-e6", "tfnas"), ("dcnet-s", "named")):
        record = registry.named_record(name, 3, {"seed": 1})
        assert list(record)[:4] == ["format", "version", "method", "made"] and record["method"] == method
        network = registry.build_network(json.loads(json.dumps(record))).eval()
        assert network(torch.rand(1, 3, 32, 32)).logits.shape == (1, 3)
    assert network.unet.widths == [8, 12, 18, 27]


def test_dnas_keeps_the_encoder():
    arch = named_arch("dcnas-k3-e3", 3)
    assert arch.with_model("dnas") == named_arch("dnas-k3-e3")
    assert arch.with_model("cnas") == named_arch("cnas-k3-e3", 3)


def test_width_range_is_stated_and_keeps_the_expansion():
    operation = models.Operation(3, 6)
    assert models.width_range(operation, 16, 1.0) == (24, 128)
    assert models.width_range(operation, 40) == (56, 320)
    assert models.width_range(models.Operation(3, 3), 24) == (32, 96)


# --- alone ------------------------------------------------------------------------------------------------


def test_models_works_alone_in_an_empty_folder_and_registry_beside_it(tmp_path):
    shutil.copy(ROOT / "models.py", tmp_path)
    (tmp_path / "use.py").write_text("""
import torch, models
network = models.Network(models.named_arch("dcnas-k3-e3", 5)).eval()
print(tuple(network(torch.rand(1, 3, 30, 30)).image.shape))
""")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, text=True, env=environment,
                         capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "(1, 3, 30, 30)\n", "")
    shutil.copy(ROOT / "registry.py", tmp_path)
    (tmp_path / "use.py").write_text("""
import registry
for argv in ([], ["--help"]):
    registry.main(argv)
""")
    run = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, text=True, env=environment,
                         capture_output=True)
    assert (run.returncode, run.stderr) == (0, "")
    _, *table = run.stdout.split("usage: ")[0].splitlines()
    assert [line.split()[0] for line in table[:-1]] == [
        *models.UNIFORM, "unet", "unet-m", "unet-s", "unet-original"]
    assert "--input" in run.stdout and "default" in run.stdout


@pytest.mark.parametrize("arguments, message", [
    (["--input", "2"], "cannot take an input of 2 pixels"),
    (["--input", "0"], "--input must be from 1 to 65536"),
    (["--classes", "65537"], "must be from 1 to 65536"),
    (["--classes", "ten"], "--classes"),
])
def test_wrong_usage_ends_in_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(registry, "UNIFORM", {})  # a UNet is the first that refuses 2 pixels
    with pytest.raises(SystemExit) as stopped:
        registry.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_listing(capsys, monkeypatch):
    registry.main(["--classes", "10", "--input", "64", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {*models.UNIFORM, *registry.NAMED} and {"resnet18", "unet-s"} < set(rows)
    assert rows["dnas-k3-e3"]["classifies"] is False
    network = Network(named_arch("cnas-k3-e6", 10))
    assert rows["cnas-k3-e6"]["parameters"] == sum(p.numel() for p in network.parameters())
    monkeypatch.setattr(registry, "UNIFORM", {"dcnas-k5-e6": models.UNIFORM["dcnas-k5-e6"]})
    monkeypatch.setattr(registry, "NAMED", {"unet-s": registry.NAMED["unet-s"]})
    registry.main([])
    uniform, made_by_hand = capsys.readouterr().out.splitlines()[1:3]
    assert uniform.split()[:4] == ["dcnas-k5-e6", "yes", "yes", "224"]
    parameters = f"{rows['unet-s']['parameters']:,}"
    assert made_by_hand.split() == ["unet-s", "yes", "-", "96", parameters, "48.46", "M"]


def test_mbconv_refuses_too_few_mid_channels():
    with pytest.raises(ValueError, match="mid_channels"):
        MBConv(16, 8, 16)
    with pytest.raises(ValueError, match="mid_channels"):
        make_arch("cnas", [replace(models.searched_positions("cnas")[0], kernel_size=3, mid_channels=8)], 2)


def test_candidates_inherit_the_centre_and_the_strongest_channels_of_the_largest():
    supernet = SuperNet("cnas", 8, 5)
    assert {supernet.operations[index].name for index in supernet.largest_path()} == {"k5-e6"}
    supernet.inherit_()
    mixed = supernet.mixed[4]
    largest = mixed.candidates[supernet.largest_path()[4]]
    small = next(c for c in mixed.candidates if c.operation.name == "k3-e3-se")
    width, norm = small.width, largest.depthwise_weight[:largest.width].abs().sum((1, 2, 3))
    strongest = norm.argsort(descending=True)[:width]
    assert torch.equal(small.depthwise_weight[:width], largest.depthwise_weight[strongest][..., 1:4, 1:4])
    assert torch.equal(small.expand_weight[:width], largest.expand_weight[strongest])
    assert torch.equal(small.project_weight[:, :width], largest.project_weight[:, strongest])
    features = torch.rand(2, 40, 16, 16)
    with_se = next(c for c in mixed.candidates if c.operation.name == "k5-e6-se")
    with torch.no_grad():  # channels in another order, SE near 0.5: almost the same function
        outputs = [candidate(features).flatten(1) for candidate in (largest, with_se)]
    assert F.cosine_similarity(*outputs).min() > 0.9


def test_recomputing_mixed_operations_saves_memory_and_changes_nothing():
    images, results = torch.rand(4, 3, 64, 64), []
    for recompute in (False, True):
        torch.manual_seed(0)
        supernet, kept = SuperNet("cnas", 4, 5, recompute=recompute), {}
        for weight in supernet.weight_parameters():
            weight.requires_grad_(False)
        mixture = supernet.mixture(5.0, torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.__setitem__(t.data_ptr(), t.numel()) or t, lambda t: t):
            loss = supernet(images, mixture).logits.square().mean()
        loss.backward()
        results.append((supernet.alpha.grad.clone(), sum(kept.values())))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[1][1] < 0.5 * results[0][1]


# --- learned depth, other decoders, sequential, wider -----------------------------------------------------


@pytest.mark.parametrize("model", ("cnas", "dcnas"))
def test_a_supernet_with_one_hot_depths_equals_its_export(model):
    torch.manual_seed(0)
    supernet = SuperNet(model, 4, 5, depth="learned").double()
    depths = (1, 3, 2, 4, 1)
    with torch.no_grad():
        for beta, depth in zip(supernet.betas, depths):
            beta.copy_(1e4 * F.one_hot(torch.tensor(depth - 1), len(beta)))
    path = supernet.sample_path()
    arch = supernet.arch(path)
    assert [sum(block.stage == stage for block in arch.blocks) for stage in range(3, 8)] == list(depths)
    make_block = lambda block, _: models.build_block(block, norm_layer=models.SearchNorm)
    exported = Network(arch, norm_layer=models.SearchNorm, make_block=make_block).double()
    supernet.copy_to(exported, path)
    x = torch.rand(4, 3, 64, 64, dtype=torch.float64)
    for ours, theirs in zip(supernet(x, path), exported(x)):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_depth_gets_gradients_and_is_no_weight():
    supernet = SuperNet("cnas", 4, 5, depth="learned")
    weights, searched = ({id(parameter) for parameter in parameters} for parameters in (
        supernet.weight_parameters(), supernet.arch_parameters()))
    assert len(searched) == 6 and not searched & weights
    supernet(torch.rand(2, 3, 32, 32), supernet.mixture(5.0)).logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in supernet.arch_parameters())
    with torch.no_grad():
        supernet.betas[0].add_(3.0)
    supernet.normalize_()
    assert supernet.betas[0].exp().sum().item() == pytest.approx(1)
    fixed = SuperNet("cnas", 4, 5)
    assert fixed.arch_parameters() == [fixed.alpha] and all(fixed.kept())


@pytest.mark.parametrize("decoder", models.DECODERS)
def test_decoders(decoder):
    arch = replace(named_arch("dcnas-k3-e3", 4), decoder=decoder)
    assert Arch.from_dict(arch.to_dict()) == arch
    network = registry.build_network({"method": "tfnas", **arch.to_dict()})
    output = network(torch.rand(2, 3, 50, 41))
    assert output.image.shape == (2, 3, 50, 41)
    output.image.sum().backward()
    assert all(p.grad is not None for p in network.decoder.parameters())
    kinds = [len(level.convs) for level in network.decoder.levels]
    assert kinds == {"mb-1": [1] * 4, "mb-3level": [0, 2, 2, 2]}.get(decoder, [2] * 4)
    assert any(isinstance(m, MBConv) for m in network.decoder.modules()) == decoder.startswith("mb")
    assert (network.decoder.full is not None) == (decoder == "sharp")


def test_an_unknown_decoder_is_refused_and_old_records_have_that_of_the_papers():
    content = named_arch("dcnas-k3-e3", 4).to_dict()
    with pytest.raises(ValueError, match="decoder must be one of sharp, conv, mb"):
        Arch.from_dict({**content, "decoder": "huge"})
    del content["decoder"]
    assert Arch.from_dict(content).decoder == "conv"


@pytest.mark.parametrize("model", ("cnas", "dcnas", "dcnas-seq"))
def test_means_begin_at_zero_and_add_to_the_logits(model):
    arch = named_arch(f"{model}-k3-e3-shallow", 4)
    assert arch.multiscale and Arch.from_dict(arch.to_dict()) == arch
    network, images = models.make_network(arch).train(), torch.rand(3, 3, 64, 48)
    means = getattr(network, "classifier", network).means
    assert means[1].in_channels == 40 + 80 + 112  # of stages 4, 5 and 6
    without = network(images).logits
    without.square().sum().backward()
    assert means[1].weight.grad.abs().min() > 0
    with torch.no_grad():
        means[1].weight[1] = 1.0
    assert torch.equal((network(images).logits != without).any(0), torch.tensor([False, True, False, False]))


def test_the_multiscale_stem_sees_the_image_and_its_means():
    stem, seen = models.MultiscaleStem(8), []
    stem[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(2, 3, 48, 37)
    assert stem(image).shape == (2, 8, 24, 19)
    assert torch.equal(seen[0][:, :3], image)
    for place, size in enumerate((2, 4, 8, 16), 1):
        ours = seen[0][:, 3 * place:3 * place + 3]
        mean = image[..., size:2 * size, size:2 * size].mean((2, 3))
        torch.testing.assert_close(ours[..., size, size], mean)
        assert torch.equal(ours[..., size:2 * size, size], ours[..., size, size:2 * size])  # one square


def test_old_records_and_the_decoder_of_the_papers_have_their_stem_and_head():
    content = named_arch("dcnas-k3-e3", 4).to_dict()
    del content["multiscale"]
    network = models.make_network(Arch.from_dict(content))
    assert network.means is None and type(network.stem) is Conv2dNormActivation
    with pytest.raises(ValueError, match="multiscale must be one of True, False"):
        Arch.from_dict({**content, "multiscale": 1})
    assert SuperNet("dcnas", 4, 5).network.means is not None
    assert SuperNet("dcnas", 4, 5, decoder="conv").network.means is None


def test_a_sequential_network_is_its_parts_in_turn():
    torch.manual_seed(0)
    network = models.make_network(named_arch("dcnas-seq-k3-e3", 4)).eval()
    x = torch.rand(2, 3, 40, 33)
    image, logits = network(x)
    torch.testing.assert_close(image, network.denoiser(x).image)
    torch.testing.assert_close(logits, network.classifier(image).logits)
    logits.sum().backward()
    assert next(network.denoiser.parameters()).grad is not None  # trained as one


def test_widened():
    narrow = replace(named_arch("dnas-k3-e3"), decoder="conv")
    arch = narrow.widened(2.0)
    assert arch.stem_channels == 64 and arch.blocks[-1].out_channels == 224
    assert Network(arch).eval()(torch.rand(1, 3, 32, 32)).image.shape == (1, 3, 32, 32)
    ratio = models.count_macs(Network(arch), 64) / models.count_macs(Network(narrow), 64)
    assert 3 < ratio < 4.2  # the square, but for depthwise convolutions and the image's three channels
    narrow = Network(named_arch("dcnas-k5-e6", 3).widened(0.5)).eval()
    assert narrow(torch.rand(1, 3, 32, 32)).logits.shape == (1, 3)


@pytest.mark.parametrize("name", ("dnas-k3-e3-shallow", "dcnas-k3-e3-shallow", "dcnas-seq-k3-e3-shallow"))
def test_a_grey_network_is_that_of_three_equal_channels(name):
    torch.manual_seed(0)
    arch = models.named_arch(name, 3 if name.startswith("dc") else 0)
    grey = models.make_network(replace(arch, grey=True)).eval()
    colour = models.make_network(arch).eval()
    colour.load_state_dict(grey.state_dict())
    image = torch.rand(2, 1, 33, 47)
    ours, theirs = grey(image), colour(image.expand(-1, 3, -1, -1))
    assert models.channels_of(grey) == 1 and models.channels_of(colour) == 3
    assert ours.image.shape == image.shape
    torch.testing.assert_close(ours.image, theirs.image.mean(1, keepdim=True))
    if name == "dcnas-k3-e3-shallow":
        torch.testing.assert_close(ours.logits, theirs.logits)
