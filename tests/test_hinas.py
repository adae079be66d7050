"""hinas.py: above all that a decided supernet is what it exports, in its output, its gradients and its cost."""

import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import hinas
import models
from hinas import Design, Edge, Layer, Part, Space, SuperNet

ROOT = Path(hinas.__file__).parent
SMALL = Space(layers=3, nodes=2, base_width=4)
NONE = hinas.CHOICES.index("none")


def random_supernet(space=SMALL, seed=0, **more):
    """A small supernet whose alpha, beta and running statistics are not the initial ones, in eval mode."""
    torch.manual_seed(seed)
    supernet = SuperNet(space, **{"base_width": 2, **more})
    for module in supernet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        for parameter in (*supernet.arch_parameters(), *supernet.end[-1].parameters()):  # a residual begins at zero
            parameter.normal_()
        for _ in range(2):
            supernet(torch.rand(2, space.channels, 9, 8))
    return supernet.eval()


def decide(supernet, seed=0, size=200.0):
    """Make the supernet one-hot: a random path of widths, two random edges a node with an operation, the others none."""
    rng = random.Random(seed)
    space, index, path = supernet.space, 0, []
    with torch.no_grad():
        supernet.alpha.zero_()
        for alpha in supernet.alpha:
            alpha[:, NONE] = size
            for node in range(space.nodes):
                for source in rng.sample(range(node + 2), 2):
                    row = hinas.edges_of(node).start + source
                    alpha[row, NONE] = 0
                    alpha[row, rng.randrange(NONE)] = size
        if supernet.beta is not None:
            supernet.beta.normal_()  # off the path anything may be; it must not matter
            for number in range(space.layers):
                here = rng.choice([i for i in range(len(space.factors(number))) if index in space.sources(number, i)])
                supernet.beta[number, index, here] = size
                path.append(here)
                index = here
    return path


# --- a decided supernet == the exported network --------------------------------------------------------------

WIDE = Space(layers=4, nodes=2, base_width=4)  # long enough for every step of widths, one and two layers back
CASES = {
    "denoise": (Space(nodes=3, base_width=4), {}),
    "denoise, as in the paper": (Space(), {"base_width": 3}),
    "unshared cells": (WIDE, {"share_cells": False}),
    "four layers": (WIDE, {}),
    "one cell for all layers": (SMALL, {"layerwise": False}),
    "no residual": (replace(SMALL, residual=False), {}),
    "colour": (replace(SMALL, channels=3), {}),
    "sr x2": (Space("sr", 2), {}),
    "sr x3, unshared": (Space("sr", 3, channels=3), {"share_cells": False}),
    "sr x4, no residual": (Space("sr", 4, residual=False), {}),
    "w40": (Space(nodes=2, widths=hinas.WIDTHS["w40"]), {}),
    "wm": (Space(nodes=2, widths=hinas.WIDTHS["wm"]), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_decided_supernet_equals_the_exported_network(case):
    space, more = CASES[case]
    for seed in range(3):
        supernet = random_supernet(space, seed, **more)
        images = torch.rand(2, space.channels, 7, 10)
        with torch.no_grad():
            undecided = (supernet(images).image - supernet.export()(images).image).abs().max()
        path = decide(supernet, seed)
        network = supernet.export()
        assert not network.training and network.design == supernet.derive(supernet.base_width)
        if path:
            assert [layer.width for layer in network.design.layers] == [
                space.widths_of(number, supernet.base_width)[index] for number, index in enumerate(path)]
        with torch.no_grad():
            ours, theirs = supernet(images), network(images)
        torch.testing.assert_close(ours.image, theirs.image, rtol=0, atol=1e-5)
        assert ours.logits is None and theirs.logits is None
        assert undecided > 1e-3


@pytest.mark.parametrize("share_cells", (True, False))
def test_a_decided_supernet_has_the_gradients_of_the_exported_network(share_cells):
    supernet = random_supernet(WIDE, 1, share_cells=share_cells).double()
    decide(supernet, 1)
    network = supernet.export()
    images = torch.rand(2, 1, 7, 10, dtype=torch.double, requires_grad=True)
    ours, = torch.autograd.grad(supernet(images).image.square().sum(), images)
    theirs, = torch.autograd.grad(network(images).image.square().sum(), images)
    torch.testing.assert_close(ours, theirs)
    supernet(images).image.square().sum().backward()
    network(images).image.square().sum().backward()
    weights = [parameter.grad for parameter in supernet.weight_parameters() if parameter.grad is not None]
    found = {name: parameter.grad for name, parameter in network.named_parameters()
             if parameter.dim() == 4 and parameter.grad.abs().max() > 0}
    assert len(found) > 20
    for name, gradient in found.items():
        assert any(gradient.shape == other.shape and torch.allclose(gradient, other) for other in weights), name


def test_a_decided_supernet_equals_the_exported_network_in_training_too():
    supernet = random_supernet(Space(nodes=3), 2)
    decide(supernet, 2)
    network = supernet.train().export()
    images = torch.rand(2, 1, 9, 8)
    assert network.training
    torch.testing.assert_close(supernet(images).image, network(images).image, rtol=0, atol=1e-5)


def test_recomputing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        supernet = random_supernet(recompute=recompute).train()
        supernet(torch.full((2, 1, 6, 6), 0.5) + torch.arange(6) / 6).image.square().sum().backward()
        gradients.append([parameter.grad for parameter in (*supernet.arch_parameters(), *supernet.weight_parameters())])
    torch.testing.assert_close(*gradients)


def test_parameters_are_weights_and_structure_once_each():
    for space in (SMALL, replace(SMALL, widths=(1.0, 2.0, 4.0))):
        supernet = SuperNet(space, 2)
        structure = supernet.arch_parameters()
        assert len(structure) == (2 if space.widths is None else 1)
        both = {id(parameter) for parameter in (*supernet.weight_parameters(), *structure)}
        assert both == {id(parameter) for parameter in supernet.parameters()}
        assert len(both) == len(supernet.weight_parameters()) + len(structure)
    assert SuperNet(Space(), 2).alpha.shape == (3, 14, 7) and SuperNet(Space(), 2, layerwise=False).alpha.shape == (1, 14, 7)


# --- probabilities of widths, derivation ---------------------------------------------------------------------


def all_paths(steps):
    """Every path of widths with its probability, by enumeration."""
    steps = [step.detach() for step in steps]
    for path in itertools.product(*(range(step.shape[1]) for step in steps)):
        places = zip(steps, (0, *path), path)
        yield path, math.exp(sum(float(step[there, here]) for step, there, here in places))


@pytest.mark.parametrize("layers", (1, 2, 3, 5))
def test_viterbi_finds_the_likeliest_of_all_paths(layers):
    for seed in range(20):
        supernet = SuperNet(Space(layers=layers, nodes=1), 1)
        with torch.no_grad():
            supernet.beta.copy_(3 * torch.randn(supernet.beta.shape, generator=torch.Generator().manual_seed(seed)))
        steps = supernet.log_steps()
        paths = dict(all_paths(steps))
        assert sum(paths.values()) == pytest.approx(1, abs=1e-5)
        assert all(paths[path] == 0 for path in paths if any(abs(a - b) > 1 for a, b in zip((0, *path), path)))
        assert tuple(hinas.likeliest_path(steps)) == max(paths, key=paths.get)


def test_the_chain_has_the_probabilities_of_all_paths():
    supernet = random_supernet(Space(layers=4, nodes=1, base_width=4))
    paths = dict(all_paths(supernet.log_steps()))
    with torch.no_grad():
        p, before, two_before = supernet.chain()
    for number in range(4):
        for here in range(len(p[number])):
            through = {(0, 0, *path): value for path, value in paths.items() if path[number] == here}  # stem, stem, layers
            total = sum(through.values())
            assert float(p[number][here]) == pytest.approx(total, abs=1e-6)
            for back, weights in ((1, before[number]), (2, two_before[number])):
                place = max(number + 2 - back, 1)
                for there in range(len(weights)):
                    share = sum(value for path, value in through.items() if path[place] == there) / total
                    assert float(weights[there, here]) == pytest.approx(share, abs=1e-5)
                    assert (share > 0) == (there in supernet.space.sources(number, here, back))


def test_a_beta_that_has_run_far_gives_no_nan():
    supernet = random_supernet()
    with torch.no_grad():
        supernet.beta[:, :, 0] = 1e4
        supernet.alpha[:, :, 0] = 1e4
    image = supernet(torch.rand(1, 1, 8, 8)).image
    cost = supernet.expected_cost(random_costs(supernet.space))
    (image.sum() + cost).backward()
    assert torch.isfinite(image).all() and torch.isfinite(cost)
    assert all(torch.isfinite(parameter.grad).all() for parameter in supernet.arch_parameters())


def test_a_node_keeps_its_two_strongest_edges_with_their_best_operation():
    alpha = torch.zeros(5, 7)  # two nodes: edges 0-1, 2-4
    alpha[0, 2], alpha[1, 5] = 1, 2
    alpha[2, 3], alpha[3, NONE], alpha[4, 1] = 3, 9, 2  # the middle edge is mostly none: weak, though its best is as good
    alpha[3, 0] = 3
    nodes = hinas.strongest_edges(alpha, 2)
    assert nodes == ((Edge(0, "sep5"), Edge(1, "skip")), (Edge(0, "dil3"), Edge(2, "sep3")))
    alpha[3, NONE] = 0
    alpha[3, 0] = 5
    assert hinas.strongest_edges(alpha, 2)[1] == (Edge(0, "dil3"), Edge(1, "conv3"))


def test_entropy_is_one_for_undecided_and_zero_for_decided():
    supernet = SuperNet(SMALL, 2)
    decisions = 3 * 5 + 1 + 2 + 3  # operations on edges; widths, given the one before
    torch.testing.assert_close(supernet.entropy(), torch.ones(decisions))
    with torch.no_grad():
        supernet.alpha[..., 2] = 100
        supernet.beta[..., 1] = 100
    torch.testing.assert_close(supernet.entropy(), torch.zeros(decisions))
    assert len(SuperNet(replace(SMALL, widths=(1, 1, 1)), 2, layerwise=False).entropy()) == 5


# --- expected cost -------------------------------------------------------------------------------------------


def random_costs(space, seed=0):
    rng = random.Random(seed)
    return {part: rng.uniform(0.1, 3) for part in sorted(space.possible_parts())}


@pytest.mark.parametrize("case", CASES)
def test_the_cost_of_a_decided_supernet_is_the_sum_of_the_found_parts(case):
    space, more = CASES[case]
    costs = random_costs(space)
    for seed in range(3):
        supernet = SuperNet(space, **{"base_width": 2, **more}).double()
        decide(supernet, seed)
        network = space.network(supernet.derive())
        expected = sum(costs[part] for part, _ in space.parts(network)) + 0.7
        assert float(supernet.expected_cost(costs, 0.7).detach()) == pytest.approx(expected, rel=1e-9)


def test_the_expected_cost_is_the_mean_over_all_structures():
    """Against a sum over every path of widths, pair of edges and operation, with the probabilities of the docstring."""
    space = Space(layers=2, nodes=2, base_width=4)
    supernet = random_supernet(space)
    costs = random_costs(space)
    total = 0.0
    for path, p in all_paths(supernet.log_steps()):
        widths = [space.widths_of(number)[index] for number, index in enumerate((0, *path), -1)]
        cost = costs[Part("pointwise", 2 * widths[-1], 128)]
        for number, width in enumerate(widths[1:]):
            alpha = supernet.alpha[number].detach().softmax(1)
            cost += costs[Part("pointwise", 2 * widths[number], width)]
            cost += costs[Part("pointwise", 2 * widths[max(number - 1, 0)], width)]
            for node in range(2):
                rows = alpha[hinas.edges_of(node), :NONE]
                pairs = list(itertools.combinations(rows, 2))
                weights = [float(a.max() * b.max()) for a, b in pairs]
                for (a, b), weight in zip(pairs, weights):
                    for row in (a, b):
                        mean = sum(float(q) * costs[Part(name, width, width)] for q, name in zip(row, hinas.CHOICES))
                        cost += weight / sum(weights) * mean / float(row.sum())
        total += p * cost
    assert float(supernet.expected_cost(costs).detach()) == pytest.approx(total, rel=1e-5)


def test_the_gradient_of_the_expected_cost_agrees_with_finite_differences():
    space = Space(nodes=3, base_width=4)
    supernet = random_supernet(space).double()
    costs = random_costs(space)
    supernet.expected_cost(costs, 1.0).backward()
    for parameter in supernet.arch_parameters():
        assert parameter.grad.abs().max() > 1e-2
        flat = parameter.detach().view(-1)
        for place in random.Random(0).sample(range(len(flat)), min(40, len(flat))):
            values = []
            for step in (1e-6, -2e-6):
                flat[place] += step
                values.append(float(supernet.expected_cost(costs, 1.0).detach()))
            flat[place] += 1e-6
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(parameter.grad.view(-1)[place]), rel=1e-4, abs=1e-6)


def test_two_edges_a_node_are_expected_however_undecided():
    supernet = random_supernet(Space())
    kept = supernet.kept_operations(1).detach()
    for node in range(4):
        rows = kept[hinas.edges_of(node)].sum(1)
        assert float(rows.sum()) == pytest.approx(2, abs=1e-5) and rows.max() <= 1 + 1e-6


# --- memory --------------------------------------------------------------------------------------------------


def saved_bytes(function, module):
    """Bytes that `function` keeps for the backward pass, each storage once, without the module's own parameters."""
    own, seen, total = {parameter.data_ptr() for parameter in module.parameters()}, {}, 0

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and storage.data_ptr() not in own:
            seen[storage.data_ptr()] = tensor  # keeps it alive, so that no other takes its address
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    return total


def sharing_ratios():
    """Saved bytes with shared cells over those without: one cell with three widths before it, the middle part, all."""
    sizes = {}
    for share_cells in (True, False):
        supernet = SuperNet(Space(), share_cells=share_cells)
        images = torch.rand(1, 1, 16, 16)
        stem = supernet.stem(images).detach()
        cells = supernet.layers[2].cells[1]
        features, weights = torch.rand(1, 15, 16, 16, requires_grad=True), torch.rand(14, 7, requires_grad=True)
        sizes[share_cells] = (saved_bytes(lambda: [cell(features * 1, features * 1, weights) for cell in cells], cells),
                              saved_bytes(lambda: supernet.middle(stem), supernet),
                              saved_bytes(lambda: supernet(images), supernet))
    return [shared / unshared for shared, unshared in zip(sizes[True], sizes[False])]


def test_sharing_a_cell_saves_memory():
    one_cell, middle, whole = sharing_ratios()
    assert one_cell <= 0.4  # the paper's factor of 3, where a cell has three widths before it
    assert middle <= 0.65 and whole <= 0.65  # 8 cells for 14: at the borders a cell has one or two


# --- networks ------------------------------------------------------------------------------------------------


def test_the_space_holds_networks_of_the_papers_size():
    rng = random.Random(0)
    sizes = [hinas.count_parameters(Space().random_design(rng)) for _ in range(80)]
    assert any(330_000 <= size <= 350_000 for size in sizes) and max(sizes) > 350_000 and min(sizes) < 290_000


def test_parameters_of_one_network_by_hand():
    nodes = ((Edge(0, "conv3"), Edge(1, "sep5")), (Edge(0, "skip"), Edge(2, "dil5")))
    design = Design("denoise", 1, 1, 10, True, (Layer(15, nodes),))
    w, wide = 15, 20  # channels of the cell, of the stem
    norm = 2
    stem = 9 * 64 + norm * 64 + 9 * 64 * wide + norm * wide
    cell = (2 * (wide * w + norm * w) + 9 * w * w + norm * w + 2 * (25 * w + w * w + norm * w) + 25 * w * w + norm * w)
    end = (2 * w * 128 + norm * 128 + wide * 48 + norm * 48 + 9 * 176 + 176 * 128 + norm * 128 + 9 * 128 + 128 * 128
           + norm * 128 + 9 * 128 + 1)
    assert hinas.count_parameters(design) == stem + cell + end
    assert sum(parameter.numel() for parameter in hinas.build(design).parameters()) == stem + cell + end


@pytest.mark.parametrize("height, width", ((5, 7), (31, 33), (1, 2)))
@pytest.mark.parametrize("task, scale, channels", (("denoise", 1, 1), ("denoise", 1, 3), ("sr", 2, 1), ("sr", 3, 3),
                                                   ("sr", 4, 1)))
def test_any_size_works_and_sr_enlarges(task, scale, channels, height, width):
    space = Space(task, scale, channels, base_width=2)
    network = hinas.build(space.random_design(random.Random(0))).eval()
    for model in (network, SuperNet(space, 2).eval()):
        with torch.no_grad():
            image, logits = model(torch.rand(2, channels, height, width))
        assert image.shape == (2, channels, scale * height, scale * width) and logits is None
        assert torch.isfinite(image).all()
        assert (model.denoises, model.classifies, model.channels, model.scale) == (True, False, channels, scale)


@pytest.mark.parametrize("space", (SMALL, Space("sr", 3, base_width=4)))
def test_residual_adds_the_input(space):
    design = space.random_design(random.Random(1))
    images = torch.rand(1, 1, 6, 5)
    enlarged = images if design.scale == 1 else hinas.enlarge(images, 3)
    for residual in (True, False):
        network = hinas.build(replace(design, residual=residual)).eval()
        for parameter in network.end[-1].parameters():
            nn.init.zeros_(parameter)
        torch.testing.assert_close(network(images).image, enlarged if residual else torch.zeros_like(enlarged))


def test_enlarging_has_the_kernel_of_pillow_and_matlab():
    images = torch.rand(1, 1, 9, 8)
    for scale in (2, 3, 4):
        picture = Image.fromarray(images[0, 0].numpy()).resize((8 * scale, 9 * scale), Image.Resampling.BICUBIC)
        torch.testing.assert_close(hinas.enlarge(images, scale)[0, 0], torch.from_numpy(np.array(picture)), atol=1e-5, rtol=0)


def costs_of_everything(space, seed=0):
    rng = random.Random(seed)
    return {part: rng.uniform(0.1, 1.0) * part.out_channels for part in sorted(space.possible_parts())}, 2.0


def test_a_fit_of_one_cell_for_all_layers_keeps_one():
    supernet = random_supernet(SMALL, layerwise=False)
    costs, rest = costs_of_everything(SMALL)
    low, high = supernet.cost_range(costs, rest)
    found = [supernet.fit(costs, rest, target * (1 + 1e-9)) for target in (low, (low + high) / 2, high)]
    for design in found:
        assert all(layer.nodes == design.layers[0].nodes for layer in design.layers)
    assert SMALL.cost(found[0], costs, rest) == pytest.approx(low) and found[2] == supernet.derive() != found[0]
    assert SMALL.cost(found[1], costs, rest) <= (low + high) / 2 * (1 + 1e-6)


def test_a_fit_meets_the_target():
    space = Space(layers=2, nodes=1, base_width=4)
    supernet = random_supernet(space)
    costs, rest = costs_of_everything(space)
    low, high = supernet.cost_range(costs, rest)
    assert low < space.cost(supernet.derive(), costs, rest) <= high
    assert supernet.fit(costs, rest, high) == supernet.derive() == supernet.found(costs, rest, None)[0]
    for target in (low, (low + high) / 2):
        design = supernet.fit(costs, rest, target * (1 + 1e-9))
        assert space.cost(design, costs, rest) <= target * (1 + 1e-6) and space.holds(design)
    assert space.cost(supernet.fit(costs, rest, 0.9 * low), costs, rest) == pytest.approx(low)  # the cheapest there is


@pytest.mark.parametrize("space", (SMALL, Space("sr", 2, layers=2, nodes=3, base_width=4),
                                   replace(SMALL, widths=(2.0, 1.0, 1.5))))
def test_a_design_that_is_set_is_derived(space):
    supernet = random_supernet(space)
    for seed in range(5):
        design = space.random_design(random.Random(seed))
        supernet.set_design(design)
        assert supernet.derive() == design
        text = supernet.describe(design)
        assert all(edge.operation in text for layer in design.layers for node in layer.nodes for edge in node)


def test_the_paths_are_those_that_random_designs_take():
    space = Space()
    drawn = {tuple(space.widths_of(n).index(layer.width) for n, layer in enumerate(space.random_design(random.Random(s)).layers))
             for s in range(300)}
    assert drawn == {tuple(path) for path in space.paths()} and len(space.paths()) == 12


def test_operations_keep_the_size_and_reach_as_far_as_their_kernels():
    assert list(hinas.CHOICES) == ["conv3", "sep3", "sep5", "dil3", "dil5", "skip", "none"]
    x = torch.rand(1, 4, 9, 9)
    reach = {}
    for name, make in hinas.OPERATIONS.items():
        operation = make(4, True).eval()
        point = torch.zeros(1, 4, 21, 21, requires_grad=True)
        operation(point)[0, :, 10, 10].sum().backward()
        touched = point.grad.abs().sum(1)[0].nonzero()
        reach[name] = int(touched.max() - touched.min()) + 1 if len(touched) else 0
        assert operation(x).shape == x.shape
    assert reach == {"conv3": 3, "sep3": 5, "sep5": 9, "dil3": 5, "dil5": 9, "skip": 1}


# --- the space -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", (Space(), Space("sr", 4, 3), Space(widths=(1.0, 2.0, 4.0)), WIDE))
def test_carriers_hold_every_part_often_enough(space):
    carriers = space.carriers(random.Random(0), rounds=2)
    counts = Counter(part for design in carriers for part in set(hinas.parts_of(design)))
    assert set(counts) == space.possible_parts() and min(counts.values()) >= 2
    json.dumps([list(part) for part in counts])


def test_parts_are_the_modules_that_do_the_work_they_name():
    space = Space(nodes=3, base_width=4)
    network = space.network(space.random_design(random.Random(2))).eval()
    parts = space.parts(network)
    assert len(parts) == 3 * (2 + 2 * 3) + 1 and len({id(module) for _, module in parts}) == len(parts)
    seen = []
    for part, module in parts:
        module.register_forward_hook(lambda module, inputs, output, part=part: seen.append(
            (part, inputs[0].shape[1], output.shape[1], sum(p.numel() for p in module.parameters()))))
    network(torch.rand(1, 1, 5, 5))
    assert len(seen) == len(parts)  # once each
    for part, in_channels, out_channels, parameters in seen:
        assert (part.in_channels, part.out_channels) == (in_channels, out_channels)
        twin = (hinas.conv(in_channels, out_channels, 1) if part.operation == "pointwise"
                else hinas.OPERATIONS[part.operation](in_channels, True))
        assert parameters == sum(p.numel() for p in twin.parameters())


def test_a_space_names_itself_and_draws_only_its_own():
    rng = random.Random(0)
    assert json.loads(json.dumps(Space("sr", 3).identity())) == {
        "method": "hinas", "task": "sr", "scale": 3, "channels": 1, "base_width": 20, "residual": True, "layers": 2,
        "nodes": 3, "widths": None}
    paths = Counter(tuple(layer.width for layer in Space().random_design(rng).layers) for _ in range(300))
    assert set(paths) == {path for path in itertools.product((20, 30), (20, 30, 40), (20, 30, 40))
                          if path[:2] != (20, 40) and path[1:] not in ((20, 40), (40, 20))}
    wm = Space(widths=hinas.WIDTHS["wm"]).random_design(rng)
    assert [layer.width for layer in wm.layers] == [20, 40, 80]


@pytest.mark.parametrize("values, word", (
    ({"task": "paint"}, "task"), ({"task": ["sr"]}, "task"), ({"scale": 2}, "scale"), ({"task": "sr"}, "scale"),
    ({"channels": 2}, "channels"), ({"base_width": 0}, "base_width"), ({"nodes": 99}, "nodes"), ({"layers": 0}, "layers"),
    ({"widths": (1.0, 2.0)}, "widths"), ({"widths": (1.0, 2.0, math.nan)}, "widths"), ({"residual": 1}, "residual")))
def test_an_impossible_space_is_refused(values, word):
    with pytest.raises(ValueError, match=word):
        Space(**values)


# --- the record ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", (Space(), Space("sr", 2, 3, residual=False), Space(widths=(2.0, 2.0, 2.0))))
def test_a_design_survives_json(space):
    design = space.random_design(random.Random(5))
    assert Design.from_dict(json.loads(json.dumps(design.to_dict()))) == design


def node(record):
    return record["layers"][1]["nodes"][1]


def layer(record):
    return record["layers"][1]


def edge(record, place=0):
    return node(record)[place]


BROKEN = (
    lambda r: r.pop("task"), lambda r: r.pop("layers"), lambda r: r.update(colour="red"), lambda r: r.update({3: 4}),
    lambda r: r.update(task="paint"), lambda r: r.update(task=None), lambda r: r.update(task=["sr"]),
    lambda r: r.update(task={}), lambda r: r.update(task="sr"),
    lambda r: r.update(scale=2), lambda r: r.update(scale=1.0), lambda r: r.update(scale=True),
    lambda r: r.update(channels=2), lambda r: r.update(channels="1"), lambda r: r.update(base_width=0),
    lambda r: r.update(base_width=10 ** 9), lambda r: r.update(base_width=20.0), lambda r: r.update(residual=1),
    lambda r: r.update(residual=None), lambda r: r.update(layers=[]), lambda r: r.update(layers={}),
    lambda r: r.update(layers="abc"), lambda r: r.update(layers=None), lambda r: r.update(layers=[1]),
    lambda r: r.update(layers=r["layers"] * 100),
    lambda r: layer(r).pop("width"), lambda r: layer(r).update(width=-5), lambda r: layer(r).update(width=10 ** 12),
    lambda r: layer(r).update(width=math.nan), lambda r: layer(r).update(width="20"), lambda r: layer(r).update(x=1),
    lambda r: layer(r).update(nodes=[]), lambda r: layer(r).update(nodes=None), lambda r: layer(r)["nodes"].pop(),
    lambda r: layer(r).update(nodes=layer(r)["nodes"] * 9), lambda r: layer(r).update(nodes=[[1, 2]]),
    lambda r: node(r).pop(), lambda r: node(r).append(edge(r)), lambda r: node(r).reverse(), lambda r: node(r).clear(),
    lambda r: node(r).__setitem__(0, edge(r, 1)), lambda r: edge(r).update(operation="pool"),
    lambda r: edge(r).update(operation="none"), lambda r: edge(r).update(operation=["conv3"]),
    lambda r: edge(r).update(operation={}), lambda r: edge(r, 1).update(source=99), lambda r: edge(r).update(source=-1),
    lambda r: edge(r).update(source=True), lambda r: edge(r).update(source="0"), lambda r: edge(r).pop("source"),
    lambda r: edge(r).update(weight=1.0))


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_broken_records_are_refused_in_one_sentence(number):
    record = Space().random_design(random.Random(0)).to_dict()
    BROKEN[number](record)
    with pytest.raises(ValueError) as caught:
        Design.from_dict(record)
    text = str(caught.value)
    assert text.startswith("The design is not valid: ") and text.endswith(".") and "\n" not in text and len(text) < 200


@pytest.mark.parametrize("record", (None, [], 3, "design", {}))
def test_what_is_no_record_is_refused(record):
    with pytest.raises(ValueError, match="The design is not valid"):
        Design.from_dict(record)


# --- designs to compare with ---------------------------------------------------------------------------------


def all_edges(design):
    return [edge for layer in design.layers for pair in layer.nodes for edge in pair]


def test_perturbations_change_what_they_say():
    rng = random.Random(0)
    for _ in range(50):
        design = Space().random_design(rng)
        for strength, moved in (("R1", 0), ("R2", 2)):
            changed = hinas.perturb(design, strength, rng)
            lost = Counter(edge.operation for edge in all_edges(design))
            lost.subtract(edge.operation for edge in all_edges(changed))
            assert lost["skip"] == 0 and sum(lost.values()) == 0
            sources = [[{edge.source for edge in pair} for layer in each.layers for pair in layer.nodes]
                       for each in (design, changed)]
            assert sum(len(a - b) for a, b in zip(*sources)) == moved
            if moved:
                assert not +lost and not -lost
            else:
                operations = [(a.operation, b.operation) for a, b in zip(all_edges(design), all_edges(changed)) if a != b]
                assert len(operations) == 2 and all(a != b and "skip" not in (a, b) for a, b in operations)
            assert replace(changed, layers=design.layers) == design  # the rest is as it was
            assert [layer.width for layer in changed.layers] == [layer.width for layer in design.layers]
            assert Design.from_dict(changed.to_dict()) == changed


def test_perturbations_that_cannot_be_are_refused():
    design = Space(layers=1, nodes=1).random_design(random.Random(0))
    only_skips = replace(design, layers=(replace(design.layers[0], nodes=((Edge(0, "skip"), Edge(1, "skip")),)),))
    for design, strength in ((only_skips, "R1"), (design, "R2"), (design, "R3")):
        with pytest.raises(ValueError):
            hinas.perturb(design, strength, random.Random(0))


def test_random_cells_have_as_many_parameters():
    rng = random.Random(0)
    largest = tuple(Layer(width, tuple((Edge(0, "dil5"), Edge(1, "dil5")) for _ in range(4))) for width in (20, 40, 80))
    designs = [Space().random_design(rng) for _ in range(3)] + [Space().design(largest)]
    for design in designs:
        others = [hinas.random_cells(design, rng) for _ in range(2)]
        assert others[0] != design and others[0] != others[1]
        for other in others:
            assert hinas.count_parameters(other) == pytest.approx(hinas.count_parameters(design), rel=0.05)
            assert [layer.width for layer in other.layers] == [layer.width for layer in design.layers]
            assert Design.from_dict(other.to_dict()) == other
    with pytest.raises(ValueError):
        hinas.random_cells(replace(design, layers=largest[:1]), rng, tolerance=-1.0)


# --- the picture, and the file alone -------------------------------------------------------------------------


@pytest.mark.parametrize("space", (Space(), Space("sr", 4, 3), Space(widths=(1.0, 2.0, 4.0)), Space(layers=6, nodes=7)))
def test_the_picture_is_xml_and_names_everything_once_in_a_place(space):
    design = space.random_design(random.Random(7))
    root = ElementTree.fromstring(hinas.draw(design))
    texts = [element for element in root.iter() if element.tag.endswith("}text")]
    names = Counter(text.text for text in texts if text.get("class") == "name")
    assert names == Counter(edge.operation for edge in all_edges(design))
    assert {f"width {layer.width}" for layer in design.layers} <= {text.text for text in texts}
    boxes = []
    for text in texts:  # 12 px sans-serif: a letter is at most 8 px wide, these are 7 on average
        x, y, width = float(text.get("x")), float(text.get("y")), 7 * len(text.text)
        x -= width / 2 if text.get("text-anchor") == "middle" else 0
        assert 0 <= x and x + width <= float(root.get("width")) and 12 <= y <= float(root.get("height"))
        boxes.append((x, x + width, y - 11, y + 3))
    for a, b in itertools.combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]


def test_the_file_works_alone_and_importing_it_does_nothing(tmp_path):
    shutil.copy(ROOT / "hinas.py", tmp_path)
    code = ("import sys, random; before = random.getstate(); import hinas; assert random.getstate() == before\n"
            "assert not {'models', 'data', 'latency', 'eval', 'train', 'search', 'numpy.testing'} & set(sys.modules)\n"
            "import torch\n"
            "supernet = hinas.SuperNet(hinas.Space(nodes=2), 2)\n"
            "design = hinas.Design.from_dict(supernet.derive().to_dict())\n"
            "image, _ = hinas.build(design)(torch.rand(1, 1, 8, 8))\n"
            "print(tuple(image.shape))\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "(1, 1, 8, 8)\n" and done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["hinas.py"]


def test_the_command_line_draws_and_changes_a_record(tmp_path, capsys):
    design = SMALL.random_design(random.Random(4))
    models.write_json(tmp_path / "arch.json", models.design_record("hinas", design, {}, parameters=1))
    hinas.main(["--arch", str(tmp_path / "arch.json"), "--output", str(tmp_path / "n.svg")])
    assert (tmp_path / "n.svg").read_text() == hinas.draw(design)
    for change in ("R1", "R2", "random"):
        hinas.main(["--arch", str(tmp_path / "arch.json"), "--change", change, "--output", str(tmp_path / f"{change}.json")])
        record = models.load_record(tmp_path / f"{change}.json")
        other = Design.from_dict(record["design"])
        assert other != design and record["parameters"] == hinas.count_parameters(other)
    assert "parameters before" in capsys.readouterr().out
    models.write_json(tmp_path / "cnn.json", models.make_record(models.named_arch("cnas-k3-e3", 3), {}))
    with pytest.raises(SystemExit) as stop:
        hinas.main(["--arch", str(tmp_path / "cnn.json")])
    assert stop.value.code == 2 and "is of tfnas" in capsys.readouterr().err
