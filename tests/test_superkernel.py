"""superkernel.py: above all that a decided superkernel is its slice, in value, gradient, network and cost."""

import argparse
import copy
import functools
import importlib.util
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import latency
import models
import search
import superkernel
from superkernel import BlockCosts, Design, Slice, Space, SuperConv2d, SuperNet

ROOT = Path(superkernel.__file__).resolve().parent
KINDS = list(superkernel.STRUCTURES)
SMALL = {"skipinit": Space("skipinit", 5, 1), "attention": Space("attention", 4, 1, 2, channels=1)}
part_macs = functools.cache(latency.part_macs)


def random_structure(module, seed=0):
    """Structural parameters that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in [module] if isinstance(module, SuperConv2d) else module.superkernels():
            for parameter in layer.structure.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def random_supernet(space, kind, seed=0):
    """With a random structure, and residual branches that do something: fresh ones begin at zero."""
    torch.manual_seed(0)
    supernet = random_structure(SuperNet(space, kind), seed)
    with torch.no_grad():
        for block in supernet.network.blocks():
            if block.scale is not None:
                block.scale.fill_(0.7)
    return supernet


def decide(supernet, design):
    """Make a design certain with the filters that `export` keeps; returns the supernet."""
    for layer, chosen in zip(supernet.superkernels(), sum(design.blocks, ())):
        layer.structure.set_choice(chosen.kernel_size, layer.structure.kept(chosen.filters))
    return supernet


# --- one superkernel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", superkernel.FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_decided_superkernel_is_the_sliced_convolution_in_value_and_gradient(kind, form):
    torch.manual_seed(0)
    layer = SuperConv2d(2, (1, 3, 5), (2, 3, 6), kind, form, activation=nn.ReLU()).double().train()
    kept = [0, 2, 3] if isinstance(layer.structure, superkernel.Filterwise) else [0, 1, 2]
    layer.structure.set_choice(3, kept, 60.0)
    assert layer.structure.likeliest() == (3, 3) and layer.structure.kept(3) == kept
    layer.temperature = 0.05  # of a sample, which a logit of 60 decides
    weight = layer.weight.detach()[kept][:, :, 1:4, 1:4].clone().requires_grad_()
    bias = layer.bias.detach()[kept].clone().requires_grad_()
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    expected = F.relu(F.conv2d(x, weight, bias, padding=1))
    result = layer(x)
    torch.testing.assert_close(result[:, kept], expected)
    others = [channel for channel in range(6) if channel not in kept]
    assert result[:, others].abs().max() < 1e-12
    probe = torch.randn_like(result)
    (result * probe).sum().backward()
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
        torch.testing.assert_close(full.eval()(x), separate.eval()(x))  # decided: one summand


def test_the_separate_form_is_the_sum_over_all_slices():
    """Filters that share a kernel size share its convolution: as one per slice (eq. 5, left side)."""
    torch.manual_seed(0)
    layer = random_structure(SuperConv2d(3, (1, 3, 5), (2, 4, 7), "joint", "separate", activation=nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    torch.manual_seed(1)
    share = superkernel.sample(layer.structure.theta.flatten(), 1.0).view(3, 3)
    expected = 0.0
    for k, size in enumerate((1, 3, 5)):
        for f, count in enumerate((2, 4, 7)):
            weight = superkernel.centre(layer.weight, size)[:count]
            y = F.conv2d(x, weight, layer.bias[:count], padding=size // 2)
            expected = expected + F.pad(F.relu(share[k, f] * y), (0, 0, 0, 0, 0, 7 - count))
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_shares_and_their_mean_is_the_probability(kind):
    torch.manual_seed(0)
    structure = random_structure(SuperConv2d(1, (3, 5), (2, 4), kind)).structure
    samples = torch.stack([structure.weights(0.1) for _ in range(3000)])  # (N, K, C)
    assert samples.min() >= 0 and samples.sum(1).max() <= 1 + 1e-5
    grid = structure.probabilities()
    if isinstance(structure, superkernel.Filterwise):
        mean = structure.theta_kernel.softmax(0)[:, None] * structure.filter_logits().sigmoid()
    else:
        mean = grid @ structure.first
    assert (samples.mean(0) - mean).abs().max() < 0.06  # at a low temperature a sample is a draw
    assert samples.std(0).max() > 0.1
    assert grid.sum().item() == pytest.approx(1, abs=1e-5)
    counts = torch.tensor(structure.grid(), dtype=torch.float32)
    assert (grid * counts).sum().item() == pytest.approx(max(1, mean.sum().item()), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_structure_learns_and_its_entropy_says_how_decided_it_is(kind):
    layer = SuperConv2d(1, (3, 5), (2, 4), kind)
    assert layer.structure.entropy() == pytest.approx(1)
    with torch.no_grad():
        for parameter in layer.structure.parameters():
            parameter.add_(0.1)
    layer(torch.randn(1, 1, 6, 6)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.structure.parameters())
    layer.structure.set_choice(5, range(2))
    assert layer.structure.entropy() == pytest.approx(0, abs=1e-6)


def test_a_filterwise_structure_keeps_at_least_one_filter_and_the_likeliest_ones():
    layer = SuperConv2d(1, (3,), (4,), "filterwise")
    with torch.no_grad():
        layer.structure.theta_filters.copy_(torch.tensor([-3.0, -1.0, -2.0, -4.0]))
    assert layer.structure.likeliest() == (3, 1) and layer.distill().weight.shape == (1, 1, 3, 3)
    assert [layer.structure.kept(count) for count in (1, 2, 3)] == [[1], [1, 2], [0, 1, 2]]
    assert layer.structure.options(Slice(3, 2))[-1] == (Slice(3, 1), -2.0)


def test_attention_is_equation_1():
    structure = random_structure(SuperConv2d(1, (3,), (5,), "attention")).structure
    keys, base = structure.keys, structure.theta_filters
    shares = [(keys[i] @ keys.T).exp() / (keys[i] @ keys.T).exp().sum() for i in range(5)]
    expected = torch.stack([sum(share[j] * base[j] for j in range(5)) for share in shares])
    torch.testing.assert_close(structure.filter_logits(), expected)


def test_any_convolution_becomes_a_superkernel_and_back():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    plain = copy.deepcopy(network)
    network[0] = SuperConv2d.from_conv(network[0], (3, 5), (4, 8))
    network[0].structure.set_choice(5, range(8))
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(network.eval()(x), plain(x))
    network[0].structure.set_choice(3, range(4))
    expected = network(x)
    network[0] = network[0].distill(same_width=True)
    torch.testing.assert_close(network(x), expected)
    double = SuperConv2d.from_conv(nn.Conv2d(2, 4, 3, padding=1).double(), (1, 3))
    assert double(torch.rand(1, 2, 5, 5, dtype=torch.float64)).dtype == torch.float64
    for conv in (nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 5, padding=2),
                 nn.Conv2d(4, 8, 3, padding=2, dilation=2),
                 nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(ValueError, match="cannot stand for"):
            SuperConv2d.from_conv(conv, (1, 3))


@pytest.mark.parametrize("sizes, filters, kind, word", [
    ((2, 3), (4,), "joint", "odd"), ((3,), (), "joint", "filters"), ((5, 3), (4,), "joint", "ascending"),
    ((3,), (0, 4), "joint", "positive"), ((3,), (4,), "other", "structure must be one of joint")])
def test_impossible_superkernels_are_refused(sizes, filters, kind, word):
    with pytest.raises(ValueError, match=word):
        SuperConv2d(3, sizes, filters, kind)


# --- networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_network_is_the_decided_supernet_in_value_and_gradient(family, kind):
    supernet = random_supernet(SMALL[family], kind, seed=3).eval()
    network = supernet.export(supernet.likeliest())
    assert network.design == supernet.likeliest() and not network.training
    assert superkernel.build(network.design).state_dict().keys() == network.state_dict().keys()
    x = torch.rand(2, supernet.channels, 11, 14)
    outputs = [model(x).image for model in (network, supernet)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert (outputs[0] - x).abs().max() > 1e-3
    for output in outputs:
        output.square().mean().backward()
    for pick in (lambda net: net.image.weight, lambda net: net.subnetworks[0].down[0][0].weight):
        torch.testing.assert_close(pick(network).grad, pick(supernet.network).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_expected_macs_of_a_decided_supernet_are_those_of_the_exported_network(family, kind):
    space = SMALL[family]
    costs, rest = part_macs(space, 16)
    assert set(costs) >= space.possible_parts()
    supernet = random_supernet(space, kind, seed=5)
    design = supernet.likeliest()
    assert decide(supernet, design).likeliest() == design
    macs = models.count_macs(supernet.export(design), 16) / 1e6
    assert supernet.expected_cost(costs, rest).item() == pytest.approx(macs, rel=1e-5)
    assert space.cost(design, costs, rest) == pytest.approx(macs, rel=1e-5)
    with pytest.raises(KeyError):  # a table of another space
        supernet.cost_range({part: cost for part, cost in costs.items() if part.level == 0}, rest)


@pytest.mark.parametrize("kind", KINDS)
def test_expected_macs_are_the_mean_of_samples_and_differentiable(kind):
    space = Space("skipinit", 24, 1)  # so many filters that hardly a draw has none
    costs, rest = part_macs(space, 8)
    supernet = random_supernet(space, kind)
    tables = [BlockCosts(space, level, costs) for level in space.block_levels()]
    known, rng, total, count = [{} for _ in tables], random.Random(0), 0.0, 400
    ways = []  # of each superkernel: a function that draws a slice
    for structure in (layer.structure for layer in supernet.superkernels()):
        if isinstance(structure, superkernel.Filterwise):
            kernels = structure.theta_kernel.softmax(0).tolist()
            p = structure.filter_logits().sigmoid().tolist()
            ways.append(lambda kernels=kernels, p=p: Slice(
                rng.choices((3, 5), kernels)[0], max(1, sum(rng.random() < each for each in p))))
        else:
            p, slices = structure.probabilities().flatten().tolist(), [
                Slice(size, filters) for size in structure.kernel_sizes for filters in structure.filters]
            ways.append(lambda slices=slices, p=p: rng.choices(slices, p)[0])
    for _ in range(count):  # draw slices, independently
        for block, (table, seen) in enumerate(zip(tables, known)):
            slices = (ways[2 * block](), ways[2 * block + 1]())
            seen[slices] = seen[slices] if slices in seen else table.of(slices)
            total += seen[slices] / count
    expected = supernet.expected_cost(costs, rest)
    assert expected.item() == pytest.approx(rest + total, rel=0.04)
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
def test_a_fit_meets_the_target_loses_little_probability_and_keeps_the_weights(kind):
    space = SMALL["skipinit"]
    costs, rest = part_macs(space, 16)
    supernet = random_supernet(space, kind).eval()
    low, high = supernet.cost_range(costs, rest)
    likeliest = supernet.likeliest()
    cost = space.cost(likeliest, costs, rest)
    assert low <= cost <= high
    target = (low + cost) / 2
    design = latency.fit(supernet, costs, rest, target)
    assert space.cost(design, costs, rest) <= target * (1 + 1e-6)
    changed = [a != b for a, b in zip(sum(design.blocks, ()), sum(likeliest.blocks, ()))]
    assert 0 < sum(changed) < len(changed)
    assert latency.fit(supernet, costs, rest, high) == likeliest
    cheapest = latency.fit(supernet, costs, rest, 0.9 * low)  # without a network for it: the cheapest
    assert space.cost(cheapest, costs, rest) == pytest.approx(low, rel=1e-5)
    x, network = torch.rand(1, 3, 8, 8), supernet.export(design)
    torch.testing.assert_close(network(x).image, decide(supernet, design)(x).image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exchange_costs_what_it_says_and_none_in_its_block_is_better(kind):
    space = SMALL["skipinit"]
    costs, rest = part_macs(space, 16)
    supernet = random_supernet(space, kind)
    ((log_p, state),) = supernet.starts()
    assert log_p == 0 and supernet.settle(state, costs, rest, 0.0) == supernet.likeliest()
    before = supernet.state_cost(state, costs, rest)
    assert before == space.cost(supernet.likeliest(), costs, rest)
    assert supernet.exchanges(state, costs, rest, before) == []
    exchanges = supernet.exchanges(state, costs, rest, 0.0)
    assert len(exchanges) == len(supernet.likeliest().blocks)
    for loss, gain, after in exchanges:
        assert supernet.state_cost(after, costs, rest) == pytest.approx(before - gain, rel=1e-5) and gain > 0
        (number,) = [number for number, (old, new) in enumerate(zip(state[0], after[0])) if old != new]
        (first, second), ratios = state[0][number], []
        layers = [layer.structure for layer in supernet.network.blocks()[number].layers]
        neighbours = [((chosen, second), lost) for chosen, lost in layers[0].options(first)]
        neighbours += [((first, chosen), lost) for chosen, lost in layers[1].options(second)]
        for slices, lost in neighbours:
            blocks = (*state[0][:number], slices, *state[0][number + 1:])
            saved = before - space.cost(Design(space, blocks), costs, rest)
            ratios += [lost / saved] if saved > 1e-9 else []
        assert loss / gain == pytest.approx(min(ratios), rel=1e-3)


def test_the_number_of_superkernels_is_that_of_the_paper():
    presets = superkernel.PRESETS
    models_1_and_2 = [presets["skipinit-1"], presets["skipinit-2"]]
    assert [2 * len(space.block_levels()) for space in models_1_and_2] == [28, 20]  # 5.2.1
    assert [presets[f"attention-{n}"].subnetworks for n in (1, 3, 6)] == [1, 3, 6]
    space = presets["skipinit-1"]
    assert [space.channels_at(level) for level in range(4)] == [32, 64, 96, 128]
    assert space.filters_at(0) == (6, 13, 19)


@pytest.mark.parametrize("space", SMALL.values(), ids=list(SMALL))
def test_the_carriers_hold_every_part(space):
    held = {}
    for design in space.carriers(random.Random(0), 2):
        for part, _ in space.parts(space.network(design).to("meta")):
            held[part] = held.get(part, 0) + 1
    assert min(held[part] for part in space.possible_parts()) >= 2


@pytest.mark.parametrize("height, width", [(1, 1), (5, 7), (16, 33)])
def test_any_size_and_number_of_channels(height, width):
    for channels in (1, 3, 4):
        network = superkernel.build(Space("skipinit", 5, 2, channels=channels).plain_design())
        x = torch.rand(1, channels, height, width)
        assert network(x).image.shape == x.shape and network(x).logits is None


def test_a_fresh_skipinit_network_has_blocks_that_do_nothing():
    block = superkernel.build(SMALL["skipinit"].plain_design()).blocks()[0]
    x = torch.rand(1, 5, 4, 4)
    assert torch.equal(block(x), x)


def test_the_names_in_a_checkpoint_stay():
    """Files of earlier versions have these."""
    names = list(SuperNet(Space("attention", 4, 1), "attention").state_dict())
    assert names[:10] == [f"network.subnetworks.0.down.0.{name}" for name in (
        "0.weight", "0.bias", "2.layers.0.weight", "2.layers.0.bias", "2.layers.0.structure.theta_kernel",
        "2.layers.0.structure.theta_filters", "2.layers.0.structure.keys", "2.layers.1.weight",
        "2.layers.1.bias", "2.layers.1.structure.theta_kernel")]
    others = [name for name in SuperNet(Space("skipinit", 4, 1)).state_dict() if "down" not in name]
    assert others[:7] == [f"network.subnetworks.0.{name}" for name in (
        "up.0.0.weight", "up.0.0.bias", "joined.0.0.weight", "joined.0.0.bias", "joined.0.2.scale",
        "joined.0.2.layers.0.weight", "joined.0.2.layers.0.bias")]
    assert "network.subnetworks.0.joined.0.2.output.0.weight" in others and others[-1] == "network.image.bias"
    plain = list(superkernel.build(Space("skipinit", 4, 1).plain_design()).state_dict())
    assert "subnetworks.0.joined.0.2.layers.0.0.weight" in plain


# --- records and identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [*SMALL.values(), superkernel.PRESETS["attention-3"]])
def test_a_record_gives_the_same_design_and_an_identity_the_same_space(space):
    design = space.random_design(random.Random(1))
    record = superkernel.record_content(design)
    assert record["model"] == "superkernel" and superkernel.design_of(record) == design
    assert Space.from_identity(space.identity()) == space and space.identity()["method"] == "superkernel"
    assert space.kinds(design) == ["network"] and space.holds(design)
    assert space.holds(space.reference_design())
    assert superkernel.Part._fields[0] == "level"  # what gains alike from a mode


def test_the_flags_of_a_table_name_its_space():
    assert Space("attention", 8, 3, 3, channels=1).table_flags() == (
        "--method superkernel --network attention-3 --width 8 --grey")
    assert superkernel.PRESETS["skipinit-2"].table_flags().endswith("--network skipinit-2 --width 64")
    assert Space("skipinit", 5, 1).table_flags() == "--method superkernel"  # not one of the paper's


def broken():
    good = SMALL["skipinit"].plain_design().to_dict()
    yield {name: value for name, value in good.items() if name != "levels"}
    for name, value in (("family", "other"), ("base_width", 0), ("base_width", "5"), ("levels", 9),
                        ("levels", True), ("channels", 1.5), ("blocks", []), ("blocks", None),
                        ("blocks", [1] * 6)):
        yield {**good, name: value}
    for field, value in (("filters", 0), ("filters", 99), ("filters", "2"), ("kernel_size", 7),
                         ("kernel_size", None), ("other", 1)):
        damaged = copy.deepcopy(good)
        damaged["blocks"][0]["layers"][0][field] = value
        yield damaged
    damaged = copy.deepcopy(good)
    damaged["blocks"][0]["layers"].pop()
    yield damaged


@pytest.mark.parametrize("design", [*broken(), None])
def test_a_damaged_record_is_refused_in_one_sentence(design):
    with pytest.raises(ValueError, match="not valid|needs a design") as error:
        superkernel.design_of({"design": design})
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


# --- the calls of search.py ---------------------------------------------------------------------------------


def parsed(*words):
    parser = argparse.ArgumentParser()
    superkernel.add_arguments(parser, "superkernel")
    assert "None" not in parser.format_help()
    return vars(parser.parse_args(words))


def test_flags_give_the_space_and_the_images_of_weights_and_structure():
    flags = parsed()
    assert (flags["structure"], flags["denoising_loss"], flags["patience"]) == ("joint", "charbonnier", 30)
    data = SimpleNamespace(channels=1)
    plan = superkernel.plan(data, **flags, data="digits")
    space = replace(superkernel.PRESETS["skipinit-1"], channels=1)
    assert plan == {"space": space, "table_space": space, "loss": "den", "weight_share": 1.0}
    words = ("--network", "attention-3", "--width", "8", "--two-level", "--warmup-epochs", "3")
    plan = superkernel.plan(data, **parsed(*words))
    assert plan["space"] == Space("attention", 8, 3, 3, 1) and plan["weight_share"] == 0.5
    with pytest.raises(ValueError, match="--warmup-epochs is for --two-level"):
        superkernel.plan(data, **parsed("--warmup-epochs", "3"))
    flags = parsed("--structure", "filterwise", "--form", "separate")
    layer = superkernel.make_supernet(SMALL["skipinit"], **flags).superkernels()[0]
    assert type(layer.structure) is superkernel.Filterwise and layer.form == "separate"
    assert superkernel.search_defaults({})["sigma"] == 55 / 255


def test_weights_and_structure_are_trained_in_one_step_or_in_two():
    supernet = SuperNet(SMALL["skipinit"])
    weights, structure = supernet.weight_parameters(), supernet.arch_parameters()
    assert {id(p) for p in (*weights, *structure)} == {id(p) for p in supernet.parameters()}
    assert len(weights) + len(structure) == len(list(supernet.parameters()))
    how = {"epochs": 5, "lr": 1e-3, "arch_lr": 1e-2}
    one = superkernel.training(supernet, 7, **how, **parsed())
    assert [(len(group["params"]), group["lr"]) for group in one["weight_optimizer"].param_groups] == [
        (len(weights), 1e-3), (len(structure), 1e-2)]
    assert one["arch_optimizer"] is None and one["warmup_epochs"] == one["keep_from"] == 0
    assert [one["temperature"](epoch) for epoch in (0, 4)] == [1, pytest.approx(0.1)]
    flags = parsed("--two-level", "--warmup-epochs", "2", "--temperature", "3", "--temperature-decay", "0.5")
    two = superkernel.training(supernet, 7, **how, **flags)
    assert [len(two[name].param_groups[0]["params"]) for name in ("weight_optimizer", "arch_optimizer")] == [
        len(weights), len(structure)]
    assert two["warmup_epochs"] == 2 and [two["temperature"](epoch) for epoch in (0, 2)] == [3, 0.75]
    for made in (one, two):
        made["weight_optimizer"].step()
        made["lr_schedule"].step()
        assert made["weight_optimizer"].param_groups[0]["lr"] == 1e-3
    supernet.set_temperature(0.3)
    assert {layer.temperature for layer in supernet.superkernels()} == {0.3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_network_is_drawn_by_its_seed_and_a_decided_one_needs_no_note(kind):
    space = SMALL["skipinit"]
    supernet = SuperNet(space, kind)
    (note,) = search.explain_open_decisions(supernet, supernet.likeliest(), [{}])
    assert note.startswith("note: 12 of 12 decisions stayed open") and "--arch-lr" not in note
    assert supernet.decisions()[0] == {"entropy": 1.0}
    supernet.draw_random(4)
    design = space.random_design(random.Random(4))
    assert supernet.likeliest() == design
    assert search.explain_open_decisions(supernet, design, [{}]) == []
    lines = supernet.describe(design, {}, 0.0).splitlines()
    first = design.blocks[0][0]
    assert len(lines) == 1 + len(design.blocks)
    assert f"{first.kernel_size}x{first.kernel_size} x {first.filters}" in lines[1]


# --- a search whose answer is known -------------------------------------------------------------------------


def planted(kind, wide, steps=250):
    """A single superkernel learns a target filter of 3x3, or of 5x5 with weight at its rim; its choice."""
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
    return layer.structure.likeliest().kernel_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_needs_5x5_gets_5x5_and_one_that_does_not_3x3(kind):
    assert planted(kind, wide=True) == 5
    assert planted(kind, wide=False) == 3


def test_it_works_alone_in_an_empty_folder(tmp_path, monkeypatch):
    """Without the other files, which can then not be imported. (test_cli.py imports it in a new process.)"""
    for path in ROOT.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(
        path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests"))])
    shutil.copy(ROOT / "superkernel.py", tmp_path)
    assert importlib.util.find_spec("data") is None
    alone = importlib.import_module("superkernel")
    assert Path(alone.__file__).parent == tmp_path
    x = torch.rand(1, 3, 9, 9)
    layer = alone.SuperConv2d.from_conv(nn.Conv2d(3, 4, 5, padding=2), (1, 3, 5), filters=(2, 4))
    layer(x).mean().backward()
    assert layer.distill(same_width=True)(x).shape == (1, 4, 9, 9)
    supernet = alone.SuperNet(alone.Space("skipinit", 4, 1))
    supernet(x).image.mean().backward()
    assert supernet.eval().export(supernet.likeliest())(x).image.shape == x.shape
