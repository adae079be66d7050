"""superkernel.py: above all that a decided superkernel is the slice it stands for, in value, gradient, network and cost."""

import copy
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import latency
import models
import superkernel
from superkernel import Choice, Design, Layer, Sample, Space, SuperConv2d, SuperNet

ROOT = Path(superkernel.__file__).parent
KINDS = list(superkernel.STRUCTURES)
SMALL = {"skipinit": Space("skipinit", 5, 2), "attention": Space("attention", 4, 1, 2, channels=1)}


def random_structure(module, seed=0):
    """Structural parameters that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in [module] if isinstance(module, SuperConv2d) else module.superkernels():
            for parameter in layer.structure.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def awake(network):
    """Let the residual branches, which begin at zero, do something."""
    with torch.no_grad():
        for block in network.blocks():
            if block.scale is not None:
                block.scale.fill_(0.7)
    return network


def some_choice(layer):
    kept = (0, 2, 3) if isinstance(layer.structure, superkernel.Filterwise) else tuple(range(3))
    return Choice(1, kept)


# --- one superkernel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", superkernel.FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_decided_superkernel_is_the_sliced_convolution_in_value_and_gradient(kind, form):
    torch.manual_seed(0)
    layer = SuperConv2d(2, (1, 3, 5), (2, 3, 6), kind, form, activation=nn.ReLU()).double().train()
    choice = some_choice(layer)
    layer.structure.set_choice(choice, 60.0)
    layer.temperature = 0.05  # of a sample, which a logit of 60 decides
    kept = list(choice.kept)
    weight = layer.weight.detach()[kept][:, :, 1:4, 1:4].clone().requires_grad_()
    bias = layer.bias.detach()[kept].clone().requires_grad_()
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    expected = F.relu(F.conv2d(x, weight, bias, padding=1))
    found = layer(x)
    torch.testing.assert_close(found[:, kept], expected)
    others = [channel for channel in range(6) if channel not in kept]
    assert found[:, others].abs().max() < 1e-12
    probe = torch.randn_like(found)
    (found * probe).sum().backward()
    (expected * probe[:, kept]).sum().backward()
    torch.testing.assert_close(layer.weight.grad[kept][:, :, 1:4, 1:4], weight.grad)
    torch.testing.assert_close(layer.bias.grad[kept], bias.grad)
    outside = layer.weight.grad.clone()
    outside[kept, :, 1:4, 1:4] = 0
    assert outside.abs().max() < 1e-12  # what is not in the slice is not trained


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_agree_without_an_activation_and_differ_after_a_relu(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    for activation, agree in ((None, True), (nn.ReLU(), False)):
        full = random_structure(SuperConv2d(3, (1, 3), (2, 5), kind, "full", activation=activation))
        separate = SuperConv2d(3, (1, 3), (2, 5), kind, "separate", activation=activation)
        separate.load_state_dict(full.state_dict())
        torch.manual_seed(1)
        one = full(x)
        torch.manual_seed(1)
        other = separate(x)
        assert torch.allclose(one, other, atol=1e-5) == agree
        # an eval mode decides, and then there is one summand
        torch.testing.assert_close(full.eval()(x), separate.eval()(x))


def test_the_separate_form_is_the_sum_over_all_slices():
    """Filters that share a kernel size share its convolution: the same as one convolution per slice (eq. 5, left side)."""
    torch.manual_seed(0)
    layer = random_structure(SuperConv2d(3, (1, 3, 5), (2, 4, 7), "joint", "separate", activation=nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    torch.manual_seed(1)
    share = Sample(1.0).softmax(layer.structure.theta.flatten()).view(3, 3)
    expected = 0.0
    for k, size in enumerate((1, 3, 5)):
        for f, count in enumerate((2, 4, 7)):
            y = F.conv2d(x, superkernel.centre(layer.weight, size)[:count], layer.bias[:count], padding=size // 2)
            expected = expected + F.pad(F.relu(share[k, f] * y), (0, 0, 0, 0, 0, 7 - count))
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_shares_and_their_mean_is_the_probability(kind):
    torch.manual_seed(0)
    layer = random_structure(SuperConv2d(1, (3, 5), (2, 4), kind))
    samples = torch.stack([layer.structure.weights(Sample(0.1)) for _ in range(3000)])  # (N, K, C)
    assert samples.min() >= 0 and samples.sum(1).max() <= 1 + 1e-5
    near = layer.structure.weights(superkernel.Mean())
    assert (samples.mean(0) - near).abs().max() < 0.06  # at a low temperature a sample is a draw
    assert samples.std(0).max() > 0.1
    grid = layer.structure.probabilities()
    assert grid.sum().item() == pytest.approx(1, abs=1e-5)
    counts = torch.tensor(layer.structure.grid(), dtype=torch.float32)
    assert (grid * counts).sum().item() == pytest.approx(max(1, near.sum().item()), rel=1e-4)  # the expected number of filters


@pytest.mark.parametrize("kind", KINDS)
def test_the_structure_learns(kind):
    layer = SuperConv2d(1, (3, 5), (2, 4), kind)
    with torch.no_grad():
        for parameter in layer.structure.parameters():
            parameter.add_(0.1)
    layer(torch.randn(1, 1, 6, 6)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.structure.parameters())


def test_a_filterwise_structure_keeps_at_least_one_filter():
    layer = SuperConv2d(1, (3,), (4,), "filterwise")
    with torch.no_grad():
        layer.structure.theta_filters.copy_(torch.tensor([-3.0, -1.0, -2.0, -4.0]))
    assert layer.structure.choice() == Choice(0, (1,)) and layer.distill().weight.shape == (1, 1, 3, 3)


def test_attention_is_equation_1():
    layer = random_structure(SuperConv2d(1, (3,), (5,), "attention"))
    keys, base = layer.structure.keys, layer.structure.theta_filters
    expected = torch.stack([sum(((keys[i] @ keys.T).exp() / (keys[i] @ keys.T).exp().sum())[j] * base[j] for j in range(5))
                            for i in range(5)])
    torch.testing.assert_close(layer.structure.filter_logits(), expected)


def test_any_convolution_becomes_a_superkernel_and_back():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    plain = copy.deepcopy(network)
    network[0] = SuperConv2d.from_conv(network[0], (3, 5), (4, 8))
    network[0].structure.set_choice(Choice(1, tuple(range(8))))
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(network.eval()(x), plain(x))
    network[0].structure.set_choice(Choice(0, tuple(range(4))))
    expected = network(x)
    network[0] = network[0].distill(same_width=True)
    torch.testing.assert_close(network(x), expected)
    double = SuperConv2d.from_conv(nn.Conv2d(2, 4, 3, padding=1).double(), (1, 3))
    assert double(torch.rand(1, 2, 5, 5, dtype=torch.float64)).dtype == torch.float64
    for conv in (nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, padding=2, dilation=2),
                 nn.Conv2d(4, 8, 5, padding=2), nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(ValueError, match="cannot stand for"):
            SuperConv2d.from_conv(conv, (1, 3))


@pytest.mark.parametrize("sizes, filters, word", [((2, 3), (4,), "odd"), ((3,), (), "filters"), ((5, 3), (4,), "ascending"),
                                                  ((3,), (0, 4), "positive")])
def test_impossible_superkernels_are_refused(sizes, filters, word):
    with pytest.raises(ValueError, match=word):
        SuperConv2d(3, sizes, filters)


# --- networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_the_distilled_network_is_the_decided_supernet(family, kind):
    torch.manual_seed(0)
    supernet = random_structure(SuperNet(SMALL[family], kind), seed=3).eval()
    awake(supernet.network)
    network = supernet.distill()
    assert network.design == supernet.derive() and superkernel.build(network.design).state_dict().keys() == network.state_dict().keys()
    x = torch.rand(2, supernet.channels, 11, 14)
    torch.testing.assert_close(network(x).image, supernet(x).image, rtol=1e-4, atol=1e-5)
    assert (network(x).image - x).abs().max() > 1e-3


def test_a_distilled_network_has_the_gradients_of_the_supernet():
    torch.manual_seed(0)
    supernet = SuperNet(SMALL["skipinit"], "filterwise")
    supernet = random_structure(supernet).eval()
    awake(supernet.network)
    network = supernet.distill()
    x = torch.rand(1, 3, 8, 8)
    for model in (supernet, network):
        model(x).image.square().mean().backward()
    torch.testing.assert_close(network.image.weight.grad, supernet.network.image.weight.grad)
    torch.testing.assert_close(network.subnetworks[0].down[0][0].weight.grad,
                               supernet.network.subnetworks[0].down[0][0].weight.grad)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_expected_macs_of_a_decided_supernet_are_those_of_the_distilled_network(family, kind):
    space = SMALL[family]
    costs, rest = latency.part_macs(space, 16)
    assert set(costs) >= space.possible_parts()
    supernet = random_structure(SuperNet(space, kind), seed=5)
    choices = supernet.choices()
    for layer, choice in zip(supernet.superkernels(), choices):
        layer.structure.set_choice(choice)
    assert supernet.choices() == choices
    macs = models.count_macs(supernet.distill(), 16) / 1e6
    assert supernet.expected_cost(costs, rest).item() == pytest.approx(macs, rel=1e-5)
    assert space.cost(supernet.derive(), costs, rest) == pytest.approx(macs, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_expected_macs_are_the_mean_of_samples_and_differentiable(kind):
    torch.manual_seed(0)
    space = Space("skipinit", 24, 1)  # so many filters that hardly a draw has none
    costs, rest = latency.part_macs(space, 8)
    supernet = random_structure(SuperNet(space, kind))
    rng, total = random.Random(0), 0.0
    tables = superkernel.CostTables(space, costs)
    count = 400
    for _ in range(count):  # draw slices, independently
        layers = []
        for layer in supernet.superkernels():
            if kind in ("filterwise", "attention"):
                kernel = rng.choices(range(2), layer.structure.theta_kernel.softmax(0).tolist())[0]
                number = sum(rng.random() < p for p in layer.structure.filter_logits().sigmoid().tolist())
            else:
                p = layer.structure.probabilities().flatten().tolist()
                kernel, place = divmod(rng.choices(range(len(p)), p)[0], len(layer.filters))
                number = layer.filters[place]
            layers.append(Layer(layer.kernel_sizes[kernel], max(1, number)))
        design = Design(space, tuple(zip(layers[::2], layers[1::2])))
        total += rest + sum(float(tables.block(level, *(tables.certain(level, layer) for layer in block)))
                            for level, block in zip(space.block_levels(), design.blocks))
    expected = supernet.expected_cost(costs, rest)
    assert expected.item() == pytest.approx(total / count, rel=0.04)
    expected.backward()
    leaf = next(iter(supernet.superkernels()[1].structure.parameters()))
    step = 1e-2
    with torch.no_grad():
        leaf.flatten()[0] += step
        up = supernet.expected_cost(costs, rest).item()
        leaf.flatten()[0] -= 2 * step
        down = supernet.expected_cost(costs, rest).item()
    assert leaf.grad.flatten()[0].item() == pytest.approx((up - down) / (2 * step), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_meets_the_target_and_loses_little_probability(kind):
    space = SMALL["skipinit"]
    costs, rest = latency.part_macs(space, 16)
    supernet = random_structure(SuperNet(space, kind))
    low, high = supernet.cost_range(costs, rest)
    likeliest = space.cost(supernet.derive(), costs, rest)
    assert low <= likeliest <= high
    target = (low + likeliest) / 2
    choices = supernet.fit(costs, rest, target)
    assert space.cost(supernet.derive(choices), costs, rest) <= target * (1 + 1e-6)
    changed = [a != b for a, b in zip(choices, supernet.choices())]
    assert 0 < sum(changed) < len(changed)
    assert supernet.fit(costs, rest, high) == supernet.choices()
    cheapest = supernet.derive(supernet.fit(costs, rest, 0.9 * low))  # what there is no network for gets the cheapest
    assert space.cost(cheapest, costs, rest) == pytest.approx(low, rel=1e-5)


def test_the_number_of_superkernels_is_that_of_the_paper():
    assert [len(superkernel.PRESETS[name].block_levels()) * 2 for name in ("skipinit-1", "skipinit-2")] == [28, 20]  # 5.2.1
    assert [superkernel.PRESETS[f"attention-{n}"].subnetworks for n in (1, 3, 6)] == [1, 3, 6]
    space = superkernel.PRESETS["skipinit-1"]
    assert [space.channels_at(level) for level in range(4)] == [32, 64, 96, 128] and space.filters_at(0) == (6, 13, 19)


def test_the_carriers_hold_every_part():
    for space in SMALL.values():
        held = {}
        for design in space.carriers(random.Random(0), 2):
            for part, _ in space.parts(superkernel.build(design)):
                held[part] = held.get(part, 0) + 1
        assert min(held[part] for part in space.possible_parts()) >= 2


@pytest.mark.parametrize("height, width", [(1, 1), (5, 7), (16, 33)])
def test_any_size_and_number_of_channels(height, width):
    for channels in (1, 3, 4):
        network = superkernel.build(replace(SMALL["skipinit"], channels=channels).plain_design())
        x = torch.rand(1, channels, height, width)
        assert network(x).image.shape == x.shape and network(x).logits is None


def test_a_fresh_skipinit_network_has_blocks_that_do_nothing():
    block = superkernel.build(SMALL["skipinit"].plain_design()).blocks()[0]
    x = torch.rand(1, 5, 4, 4)
    assert torch.equal(block(x), x)


# --- the record ---------------------------------------------------------------------------------------------


def test_a_record_gives_the_same_design():
    for space in SMALL.values():
        design = space.random_design(random.Random(1))
        assert Design.from_dict(design.to_dict()) == design


def broken():
    good = SMALL["skipinit"].plain_design().to_dict()
    yield {name: value for name, value in good.items() if name != "levels"}
    for name, value in (("family", "other"), ("base_width", 0), ("base_width", "5"), ("levels", 9), ("levels", True),
                        ("channels", 1.5), ("blocks", []), ("blocks", None), ("blocks", [1] * 10)):
        yield {**good, name: value}
    for field, value in (("filters", 0), ("filters", 99), ("filters", "2"), ("kernel_size", 7), ("kernel_size", None),
                         ("other", 1)):
        damaged = copy.deepcopy(good)
        damaged["blocks"][0]["layers"][0][field] = value
        yield damaged
    damaged = copy.deepcopy(good)
    damaged["blocks"][0]["layers"].pop()
    yield damaged


@pytest.mark.parametrize("record", list(broken()))
def test_a_damaged_record_is_refused_in_one_sentence(record):
    with pytest.raises(ValueError, match="not valid|must be|There is no"):
        Design.from_dict(record)


# --- a search whose answer is known -------------------------------------------------------------------------


def planted(kind, wide, steps=400):
    """A single superkernel learns a target filter of 3x3, or of 5x5 with weight at its rim; returns the size it chose."""
    torch.manual_seed(0)
    target = torch.randn(2, 1, 5, 5)
    if not wide:
        target = F.pad(target[..., 1:4, 1:4], (1, 1, 1, 1))
    layer = SuperConv2d(1, (3, 5), (2,), kind)
    optimizer = torch.optim.Adam([{"params": [layer.weight, layer.bias], "lr": 2e-2},
                                  {"params": layer.structure.parameters(), "lr": 5e-2}])
    for _ in range(steps):
        x = torch.randn(4, 1, 12, 12)
        # a price for area, as a target latency sets it: without one nothing speaks against 5x5
        price = 0.1 * (layer.structure.probabilities().sum(1) * torch.tensor([9.0, 25.0])).sum() / 25
        loss = F.mse_loss(layer(x), F.conv2d(x, target, padding=2)) + price
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer.kernel_sizes[layer.structure.choice().kernel]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_needs_5x5_gets_5x5_and_one_that_does_not_3x3(kind):
    assert planted(kind, wide=True) == 5
    assert planted(kind, wide=False) == 3


def test_it_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "superkernel.py", tmp_path)
    code = ("import torch, superkernel as s; net = s.SuperNet(s.Space('skipinit', 4, 1)); y = net(torch.rand(1, 3, 9, 9)).image; "
            "y.mean().backward(); print(tuple(net.eval().distill()(torch.rand(1, 3, 9, 9)).image.shape))")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "(1, 3, 9, 9)", run.stderr
