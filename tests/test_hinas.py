"""hinas.py: above all that a decided supernet equals what it exports, in output, gradients and cost."""

import argparse
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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import files
import hinas
import latency
import registry
import search
from hinas import Design, Edge, Part, Space, SuperNet
from muon import Muon

ROOT = Path(hinas.__file__).parent
SMALL = Space(layers=3, nodes=2, base_width=4)
WIDE = Space(layers=4, nodes=2, base_width=4)  # every step of widths, one and two layers back
NONE = hinas.CHOICES.index("none")
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
    "w40": (replace(hinas.PRESETS["denoise-w40"], nodes=2), {}),
    "wm": (replace(hinas.PRESETS["denoise-wm"], nodes=2), {}),
}


def random_supernet(space=SMALL, seed=0, **more):
    """A small supernet whose alpha, beta and running statistics are not the initial ones, in eval mode."""
    torch.manual_seed(seed)
    supernet = SuperNet(space, **{"base_width": 2, **more})
    for module in supernet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        for parameter in (*supernet.arch_parameters(), *supernet.end[-1].parameters()):  # zero in a residual
            parameter.normal_()
        for _ in range(2):
            supernet(torch.rand(2, space.channels, 6, 5))
    return supernet.eval()


@torch.no_grad()
def decide(supernet, seed=0, size=200.0):
    """Make the supernet one-hot: a random path of widths, two random edges a node with an operation each."""
    rng, space, path = random.Random(seed), supernet.space, [0]
    for alpha in supernet.alpha.zero_():
        alpha[:, NONE] = size
        for node in range(space.nodes):
            for source in rng.sample(range(node + 2), 2):
                row = alpha[hinas.edges_of(node)][source]
                row[NONE], row[rng.randrange(NONE)] = 0, size
    if supernet.beta is not None:
        supernet.beta.normal_()  # off the path anything may be; it must not matter
        for number in range(space.layers):
            here = rng.choice([i for i in range(len(space.widths_of(number))) if abs(i - path[-1]) <= 1])
            supernet.beta[number, path[-1], here] = size
            path.append(here)
    return path[1:]


@torch.no_grad()
def exported(supernet):
    """The likeliest network at the supernet's base width, with its weights and running statistics."""
    path = hinas.likeliest_path(supernet.log_steps())
    network = hinas.build(supernet.own_space.design(path, supernet.likeliest().cells))
    network = network.to(supernet.alpha).train(supernet.training)
    path = [0, 0, *path]  # stem, stem, layers
    pairs = [(supernet.stem, network.stem), (supernet.low, network.low), (supernet.end, network.end),
             (supernet.high[path[-1]], network.high)]
    for layer, cell, two, one, here in zip(supernet.layers, network.cells, path, path[1:], path[2:]):
        one, two = (rows[here].index(index) for rows, index in zip(layer.sources, (one, two)))
        pairs += zip((layer.inputs[0][here][one], layer.inputs[1][here][two]), cell.inputs)
        supercell = layer.cells[here][0 if layer.share_cells else one]
        pairs += [(node[edge.source][hinas.CHOICES.index(edge.operation)], new)
                  for node, edges, news in zip(supercell.nodes, cell.edges, cell.nodes)
                  for edge, new in zip(edges, news)]
    for source, new in pairs:  # the scale and shift of the new norms stay 1 and 0
        new.load_state_dict({**new.state_dict(), **source.state_dict()})
    return network


def random_costs(space, seed=0):
    rng = random.Random(seed)
    return {part: rng.uniform(0.1, 1.0) * part.out_channels for part in sorted(space.possible_parts())}


def copy_of(design, operation):
    """The design with one operation everywhere."""
    return design.with_edges({place: Edge(edge.source, operation) for place, edge in design.edges().items()})


# --- a decided supernet == the exported network --------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_a_decided_supernet_equals_the_exported_network_and_its_cost_is_the_sum_of_the_parts(case):
    space, more = CASES[case]
    supernet, costs = random_supernet(space, **more), random_costs(space)
    images = torch.rand(2, space.channels, 7, 10)
    with torch.no_grad():
        undecided = (supernet(images).image - exported(supernet)(images).image).abs().max()
    assert undecided > 1e-3
    for seed in range(3):
        path = decide(supernet, seed) or [0] * space.layers
        network, own, found = exported(supernet), supernet.own_space, supernet.likeliest()
        assert not network.training and network.design.cells == found.cells
        assert found.widths == tuple(space.widths_of(n)[index] for n, index in enumerate(path))
        assert network.design.widths == tuple(own.widths_of(n)[index] for n, index in enumerate(path))
        with torch.no_grad():
            ours, theirs = supernet(images), network(images)
        torch.testing.assert_close(ours.image, theirs.image, rtol=0, atol=1e-5)
        assert ours.logits is None and theirs.logits is None
        with torch.device("meta"):
            expected = sum(costs[part] for part, _ in space.parts(space.network(found))) + 0.7
        cost = supernet.double().expected_cost(costs, 0.7).detach()
        assert float(cost) == pytest.approx(expected, rel=1e-9)
        assert space.cost(found, costs, 0.7) == pytest.approx(expected, rel=1e-12)
        assert supernet.float().export(found) is None
    network = exported(supernet.train())
    assert network.training
    torch.testing.assert_close(supernet(images).image, network(images).image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("share_cells", (True, False))
def test_a_decided_supernet_has_the_gradients_of_the_exported_network(share_cells):
    supernet = random_supernet(WIDE, 1, share_cells=share_cells).double()
    decide(supernet, 1)
    network = exported(supernet)
    images = torch.rand(2, 1, 7, 10, dtype=torch.double, requires_grad=True)
    kernels = [parameter for parameter in network.parameters() if parameter.dim() == 4]
    ours, *weights = torch.autograd.grad(supernet(images).image.square().sum(),
                                         [images, *supernet.weight_parameters()], allow_unused=True)
    theirs, *found = torch.autograd.grad(network(images).image.square().sum(), [images, *kernels])
    torch.testing.assert_close(ours, theirs)
    found = [gradient for gradient in found if gradient.abs().max() > 0]
    assert len(found) > 20
    for gradient in found:
        assert any(other is not None and gradient.shape == other.shape and torch.allclose(gradient, other)
                   for other in weights)


def test_recomputing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        supernet = random_supernet(recompute=recompute).train()
        supernet(torch.full((2, 1, 6, 6), 0.5) + torch.arange(6) / 6).image.square().sum().backward()
        gradients.append([parameter.grad for parameter in supernet.parameters()])
    torch.testing.assert_close(*gradients)


def test_parameters_are_weights_and_structure_once_each_and_keep_their_names_on_disk():
    for space in (SMALL, replace(SMALL, widths=(1.0, 2.0, 4.0))):
        with torch.device("meta"):
            supernet = SuperNet(space, 2)
        structure = supernet.arch_parameters()
        assert len(structure) == (2 if space.widths is None else 1)
        both = {id(parameter) for parameter in (*supernet.weight_parameters(), *structure)}
        assert both == {id(parameter) for parameter in supernet.parameters()}
        assert len(both) == len(supernet.weight_parameters()) + len(structure)
    with torch.device("meta"):
        supernet, network = SuperNet(Space()), hinas.build(copy_of(Space().reference_design(), "sep5"))
        assert SuperNet(Space(), layerwise=False).alpha.shape == (1, 14, 7)
    assert supernet.alpha.shape == (3, 14, 7)
    assert {"stem.2.1.weight", "low.1.weight", "end.0.2.weight", "end.3.bias", "alpha", "beta",
            "high.2.1.weight", "layers.2.inputs.1.2.1.1.weight", "layers.2.cells.1.0.nodes.3.4.2.1.2.weight"
            } <= {*supernet.state_dict()}
    assert {"cells.2.inputs.1.1.weight", "cells.0.nodes.3.1.1.3.bias", "high.2.bias"
            } <= {*network.state_dict()}


# --- probabilities of widths, derivation ---------------------------------------------------------------
def all_paths(steps):
    """Every path of widths with its probability, by enumeration."""
    steps = [step.tolist() for step in steps]
    for path in itertools.product(*(range(len(step[0])) for step in steps)):
        yield path, math.exp(sum(step[there][here] for step, there, here in zip(steps, (0, *path), path)))


@pytest.mark.parametrize("layers", (1, 2, 3, 5))
def test_viterbi_finds_the_likeliest_of_all_paths(layers):
    supernet = SuperNet(Space(layers=layers, nodes=1), 1)
    for _ in range(20):
        with torch.no_grad():
            supernet.beta.normal_(0, 3)
        steps = supernet.log_steps()
        paths = dict(all_paths(steps))
        assert sum(paths.values()) == pytest.approx(1, abs=1e-5)
        possible = [path for path in paths if all(abs(a - b) <= 1 for a, b in zip((0, *path), path))]
        assert [path for path in paths if paths[path] > 0] == supernet.space.paths() == possible
        assert tuple(hinas.likeliest_path(steps)) == max(paths, key=paths.get)


def test_the_width_probabilities_are_those_of_all_paths():
    supernet = random_supernet(Space(layers=4, nodes=1, base_width=4))
    paths = dict(all_paths(supernet.log_steps()))
    with torch.no_grad():
        p, before, two_before = supernet.width_probabilities()
    for number, here in [(layer, index) for layer in range(4) for index in range(len(p[layer]))]:
        # stem, stem, layers
        through = {(0, 0, *path): value for path, value in paths.items() if path[number] == here}
        total = sum(through.values())
        assert float(p[number][here]) == pytest.approx(total, abs=1e-6)
        for back, weights in ((1, before[number]), (2, two_before[number])):
            possible = [source for source, _ in supernet.space.inputs(number, here, back)]
            for there in range(len(weights)):
                place = max(number + 2 - back, 1)
                share = sum(value for path, value in through.items() if path[place] == there) / total
                assert float(weights[there, here]) == pytest.approx(share, abs=1e-5)
                assert (share > 0) == (there in possible)


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
    alpha[2, 3], alpha[3, 0], alpha[3, NONE], alpha[4, 1] = 3, 3, 9, 2  # the middle edge is mostly none: weak
    nodes = hinas.strongest_edges(alpha, 2)
    assert nodes == ((Edge(0, "sep5"), Edge(1, "skip")), (Edge(0, "dil3"), Edge(2, "sep3")))
    alpha[3, NONE] = 0
    alpha[3, 0] = 5
    assert hinas.strongest_edges(alpha, 2)[1] == (Edge(0, "dil3"), Edge(1, "conv3"))


def test_entropy_is_one_for_undecided_and_zero_for_decided():
    supernet = SuperNet(SMALL, 2)
    decisions = 3 * 5 + 1 + 2 + 3  # operations on edges; widths, given the one before
    torch.testing.assert_close(supernet.entropy(), torch.ones(decisions))
    (note,) = search.explain_open_decisions(supernet, supernet.likeliest(), [{}])
    assert f"{decisions} of {decisions} decisions stayed open" in note
    assert supernet.decisions() == [{"entropy": 1.0}] * decisions
    with torch.no_grad():
        supernet.alpha[..., 2] = 100
        supernet.beta[..., 1] = 100
    torch.testing.assert_close(supernet.entropy(), torch.zeros(decisions))
    assert search.explain_open_decisions(supernet, supernet.likeliest(), [{}]) == []
    assert len(SuperNet(replace(SMALL, widths=(1, 1, 1)), 2, layerwise=False).entropy()) == 5


# --- expected cost, and the fit to a target ------------------------------------------------------------
def test_the_expected_cost_is_the_mean_over_all_structures():
    """Against a sum over every path of widths, pair of edges and operation."""
    space = Space(layers=2, nodes=2, base_width=4)
    supernet, costs, total = random_supernet(space), random_costs(space), 0.0
    kept = hinas.kept_operations(supernet.alpha[0].detach(), 2)
    for rows in (kept[hinas.edges_of(node)].sum(1) for node in range(2)):  # two edges, however undecided
        assert float(rows.sum()) == pytest.approx(2, abs=1e-5) and rows.max() <= 1 + 1e-6
    for path, p in all_paths(supernet.log_steps()):
        widths = [space.widths_of(number)[index] for number, index in enumerate((0, *path), -1)]
        cost = costs[Part("pointwise", 2 * widths[-1], 128)]
        for number, width in enumerate(widths[1:]):
            alpha = supernet.alpha[number].detach().softmax(1)
            cost += costs[Part("pointwise", 2 * widths[number], width)]
            cost += costs[Part("pointwise", 2 * widths[max(number - 1, 0)], width)]
            for node in range(2):
                pairs = list(itertools.combinations(alpha[hinas.edges_of(node), :NONE], 2))
                weights = [float(a.max() * b.max()) for a, b in pairs]
                for pair, weight in zip(pairs, weights):
                    for row in pair:
                        mean = sum(float(q / row.sum()) * costs[Part(name, width, width)]
                                   for q, name in zip(row, hinas.CHOICES))
                        cost += weight / sum(weights) * mean
        total += p * cost
    assert float(supernet.expected_cost(costs).detach()) == pytest.approx(total, rel=1e-5)


def test_the_gradient_of_the_expected_cost_agrees_with_finite_differences():
    space = Space(nodes=3, base_width=4)
    supernet, costs = random_supernet(space).double(), random_costs(space)
    supernet.expected_cost(costs, 1.0).backward()
    for parameter in supernet.arch_parameters():
        assert parameter.grad.abs().max() > 1e-2
        flat, gradient = parameter.detach().view(-1), parameter.grad.view(-1)
        for place in random.Random(0).sample(range(len(flat)), min(40, len(flat))):
            difference = 0.0
            for step, sign in ((1e-6, 1), (-2e-6, -1)):
                flat[place] += step
                difference += sign * float(supernet.expected_cost(costs, 1.0).detach())
            flat[place] += 1e-6
            assert difference / 2e-6 == pytest.approx(float(gradient[place]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("layerwise", (True, False))
def test_exchanges_are_all_cheaper_operations_with_what_they_lose_and_save(layerwise):
    supernet, costs = random_supernet(SMALL, layerwise=layerwise), random_costs(SMALL)
    starts = supernet.starts()
    log_p = [math.log(p) for _, p in all_paths(supernet.log_steps()) if p > 0]
    assert [start[0] for start in starts] == pytest.approx(log_p, abs=1e-4)
    assert supernet.likeliest() in [state for _, state in starts]
    state, alpha, expected = starts[1][1], supernet.alpha.detach().log_softmax(2), []
    cost = supernet.state_cost(state, costs, 2.0)
    for (number, node, place), edge in state.edges().items():
        alike = [number] if layerwise else range(3)
        row = alpha[number % len(alpha), hinas.edges_of(node)][edge.source].tolist()
        row = dict(zip(hinas.CHOICES, row))
        for name in sorted(hinas.OPERATIONS) if number < len(alpha) else ():
            other = state.with_edges({(n, node, place): Edge(edge.source, name) for n in alike})
            gain = cost - SMALL.cost(other, costs, 2.0)
            if gain > 1e-9:
                expected.append((row[edge.operation] - row[name], gain, other))
    found = supernet.exchanges(state, costs, 2.0, 0.0)
    assert [design for *_, design in found] == [design for *_, design in expected] and len(found) > 10
    assert [pair[:2] for pair in found] == [pytest.approx(pair[:2], abs=1e-5) for pair in expected]
    assert supernet.exchanges(state, costs, 2.0, cost) == []
    assert supernet.settle(state, costs, 2.0, 0.0) == state


@pytest.mark.parametrize("layers, nodes, layerwise", ((2, 1, True), (3, 2, False)))
def test_a_fit_meets_the_target(layers, nodes, layerwise):
    space = Space(layers=layers, nodes=nodes, base_width=4)
    supernet, costs, rest = random_supernet(space, layerwise=layerwise), random_costs(space), 2.0
    low, high = supernet.cost_range(costs, rest)
    likeliest = supernet.likeliest()
    assert low < space.cost(likeliest, costs, rest) <= high * (1 + 1e-9)
    assert latency.fit(supernet, costs, rest, high * (1 + 1e-9)) == likeliest
    for target in (low, (low + high) / 2):
        design = latency.fit(supernet, costs, rest, target * (1 + 1e-9))
        assert design != likeliest or space.cost(likeliest, costs, rest) <= target
        assert space.cost(design, costs, rest) <= target * (1 + 1e-6) and space.holds(design)
        assert layerwise or set(design.cells) == {design.cells[0]}
    cheapest = latency.fit(supernet, costs, rest, 0.9 * low)  # the nearest there is
    assert space.cost(cheapest, costs, rest) == pytest.approx(low)


@pytest.mark.parametrize("space", (SMALL, Space("sr", 2, layers=2, nodes=3, base_width=4),
                                   replace(SMALL, widths=(2.0, 1.0, 1.5))))
def test_a_design_that_is_set_is_the_likeliest(space):
    supernet = random_supernet(space)
    for seed in range(5):
        design = space.random_design(random.Random(seed))
        if seed:
            supernet.set_design(design)
        else:
            supernet.draw_random(seed)
        assert supernet.likeliest() == design
    costs = dict.fromkeys(space.possible_parts(), 0.625)
    texts = supernet.describe(design), supernet.describe(design, costs, 1.0)
    assert all(len(text.splitlines()) == 1 + space.layers * space.nodes for text in texts)
    assert all(edge.operation in text for edge in design.edges().values() for text in texts)
    assert texts[1].count(" 1.25") == space.layers * space.nodes  # of two edges


# --- memory --------------------------------------------------------------------------------------------
def saved_bytes(function, module):
    """Bytes that `function` keeps for the backward pass, each storage once, without the parameters.

    Tensors of the device "meta" have no address, so a storage is known by its object.
    """
    kept = {}

    def pack(tensor):  # keeps it alive, so that no other takes its address
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def test_sharing_a_cell_saves_memory():
    kept = {}
    for share_cells in (True, False):
        with torch.device("meta"):
            supernet, images = SuperNet(Space(), share_cells=share_cells), torch.rand(1, 1, 10, 10)
            feature, weights = (torch.rand(shape, requires_grad=True) for shape in ((1, 15, 10, 10), (14, 7)))
        cells = supernet.layers[2].cells[1]
        kept[share_cells] = (
            saved_bytes(lambda: [cell(feature * 1, feature * 1, weights) for cell in cells], cells),
            saved_bytes(lambda: supernet(images), supernet))
    one_cell, whole = (shared / unshared for shared, unshared in zip(kept[True], kept[False]))
    assert one_cell <= 0.4  # the paper's factor of 3, where a cell has three widths before it
    assert whole <= 0.65  # 8 cells for 14: at the borders a cell has one or two; the layers alone keep less


# --- networks ------------------------------------------------------------------------------------------
def test_the_space_holds_networks_of_the_papers_size():
    rng = random.Random(0)
    sizes = [hinas.count_parameters(hinas.build, Space().random_design(rng)) for _ in range(80)]
    assert any(330_000 <= size <= 350_000 for size in sizes) and max(sizes) > 350_000 and min(sizes) < 290_000


def test_parameters_of_one_network_by_hand():
    nodes = ((Edge(0, "conv3"), Edge(1, "sep5")), (Edge(0, "skip"), Edge(2, "dil5")))
    design = Design("denoise", 1, 1, 10, True, (15,), (nodes,))
    w, wide = 15, 20  # channels of the cell, of the stem
    norm = 2
    stem = 9 * 64 + norm * 64 + 9 * 64 * wide + norm * wide
    cell = (2 * (wide * w + norm * w) + 9 * w * w + norm * w + 2 * (25 * w + w * w + norm * w)
            + 25 * w * w + norm * w)
    end = (2 * w * 128 + norm * 128 + wide * 48 + norm * 48 + 9 * 176 + 176 * 128 + norm * 128
           + 9 * 128 + 128 * 128 + norm * 128 + 9 * 128 + 1)
    assert hinas.count_parameters(hinas.build, design) == stem + cell + end


@pytest.mark.parametrize("task, scale, channels", (
    ("denoise", 1, 1), ("denoise", 1, 3), ("sr", 2, 1), ("sr", 3, 3), ("sr", 4, 1)))
def test_any_size_works_and_sr_enlarges(task, scale, channels):
    space = Space(task, scale, channels, base_width=2)
    for model in (hinas.build(space.reference_design()).eval(), SuperNet(space, 2).eval()):
        for height, width in ((5, 7), (31, 33), (1, 2)):
            with torch.no_grad():
                image, logits = model(torch.rand(2, channels, height, width))
            assert image.shape == (2, channels, scale * height, scale * width) and logits is None
            assert torch.isfinite(image).all()
        assert (model.channels, model.scale) == (channels, scale) and model.denoises and not model.classifies


@pytest.mark.parametrize("space", (SMALL, Space("sr", 3, base_width=4)))
def test_residual_adds_the_input(space):
    design = space.random_design(random.Random(1))
    images = torch.rand(1, 1, 6, 5)
    enlarged = images if design.scale == 1 else hinas.enlarge(images, 3)
    for residual in (True, False):
        network = hinas.build(replace(design, residual=residual)).eval()
        for parameter in network.end[-1].parameters():
            nn.init.zeros_(parameter)
        torch.testing.assert_close(network(images).image, enlarged * residual)


def test_enlarging_has_the_kernel_of_pillow_and_matlab():
    images = torch.rand(1, 1, 9, 8)
    for scale in (2, 3, 4):
        size = (8 * scale, 9 * scale)
        picture = np.array(Image.fromarray(images[0, 0].numpy()).resize(size, Image.Resampling.BICUBIC))
        enlarged = hinas.enlarge(images, scale)[0, 0]
        torch.testing.assert_close(enlarged, torch.from_numpy(picture), atol=1e-5, rtol=0)


def test_operations_keep_the_size_and_reach_as_far_as_their_kernels():
    assert list(hinas.CHOICES) == ["conv3", "sep3", "sep5", "dil3", "dil5", "skip", "none"]
    x, reach = torch.rand(1, 4, 9, 9), {}
    for name, make in hinas.OPERATIONS.items():
        operation = make(4, True).eval()
        point = torch.zeros(1, 4, 21, 21, requires_grad=True)
        operation(point)[0, :, 10, 10].sum().backward()
        touched = point.grad.abs().sum(1)[0].nonzero()
        reach[name] = int(touched.max() - touched.min()) + 1 if len(touched) else 0
        assert operation(x).shape == x.shape
    assert reach == {"conv3": 3, "sep3": 5, "sep5": 9, "dil3": 5, "dil5": 9, "skip": 1}


# --- the space -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("space", (Space(), Space("sr", 4, 3), Space(widths=(1.0, 2.0, 4.0)), WIDE))
def test_carriers_hold_every_part_often_enough(space):
    carriers = space.carriers(random.Random(0), rounds=2)
    counts = Counter(part for design in carriers for part in set(design.parts()))
    assert set(counts) == space.possible_parts() and min(counts.values()) >= 2
    assert all(space.holds(design) and space.kinds(design) == ["network"] for design in carriers)
    assert space.reference_design() == space.reference_design() and space.holds(space.reference_design())
    for change in ({"base_width": 7}, {"channels": 4 - space.channels}, {"task": "sr", "scale": 2}):
        other = replace(space, **change)
        assert not other.holds(carriers[0])
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
        "method": "hinas", "task": "sr", "scale": 3, "channels": 1, "base_width": 20, "residual": True,
        "layers": 2, "nodes": 3, "widths": None}
    for space in (*hinas.PRESETS.values(), replace(WIDE, channels=3, residual=False)):
        assert Space.from_identity(json.loads(json.dumps(space.identity()))) == space
        design = space.random_design(rng)
        assert hinas.design_of(json.loads(json.dumps(hinas.record_content(design)))) == design
    drawn, wm = ({space.random_design(rng).widths for _ in range(300)}
                 for space in (Space(), hinas.PRESETS["denoise-wm"]))
    assert drawn == {path for path in itertools.product((20, 30), (20, 30, 40), (20, 30, 40))
                     if path[:2] != (20, 40) and path[1:] not in ((20, 40), (40, 20))}
    assert len(Space().paths()) == len(drawn) == 12 and wm == {(20, 40, 80)}


@pytest.mark.parametrize("values, word", (
    ({"task": "paint"}, "task"), ({"task": ["sr"]}, "task"), ({"scale": 2}, "scale"),
    ({"task": "sr"}, "scale"), ({"channels": 2}, "channels"), ({"base_width": 0}, "base_width"),
    ({"nodes": 99}, "nodes"), ({"layers": 0}, "layers"), ({"widths": (1.0, 2.0)}, "widths"),
    ({"widths": (1.0, 2.0, math.nan)}, "widths"), ({"widths": ()}, "widths"), ({"residual": 1}, "residual")))
def test_an_impossible_space_is_refused(values, word):
    with pytest.raises(ValueError, match=word):
        Space(**values)


# --- the record ----------------------------------------------------------------------------------------
layer = lambda record: record["layers"][1]
node = lambda record: layer(record)["nodes"][1]
edge = lambda record, place=0: node(record)[place]
BROKEN = (
    lambda r: r.pop("task"), lambda r: r.pop("layers"), lambda r: r.update(colour="red"),
    *(lambda r, value=value: r.update(value) for value in (
        {3: 4}, {"task": "paint"}, {"task": None}, {"task": ["sr"]}, {"task": {}}, {"task": "sr"},
        {"scale": 2}, {"scale": 1.0}, {"scale": True}, {"channels": 2}, {"channels": "1"}, {"base_width": 0},
        {"base_width": 10 ** 9}, {"base_width": 20.0}, {"residual": 1}, {"residual": None}, {"layers": []},
        {"layers": {}}, {"layers": "abc"}, {"layers": None}, {"layers": [1]})),
    lambda r: r.update(layers=r["layers"] * 100), lambda r: layer(r).pop("width"),
    *(lambda r, value=value: layer(r).update(value) for value in (
        {"width": -5}, {"width": 10 ** 12}, {"width": math.nan}, {"width": "20"}, {"x": 1}, {"nodes": []},
        {"nodes": None}, {"nodes": [[1, 2]]})),
    lambda r: layer(r)["nodes"].pop(), lambda r: layer(r).update(nodes=layer(r)["nodes"] * 9),
    lambda r: node(r).pop(), lambda r: node(r).append(edge(r)), lambda r: node(r).reverse(),
    lambda r: node(r).clear(), lambda r: node(r).__setitem__(0, edge(r, 1)),
    *(lambda r, value=value: edge(r).update(value) for value in (
        {"operation": "pool"}, {"operation": "none"}, {"operation": ["conv3"]}, {"operation": {}},
        {"source": -1}, {"source": True}, {"source": "0"}, {"weight": 1.0})),
    lambda r: edge(r, 1).update(source=99), lambda r: edge(r).pop("source"))


def test_broken_records_are_refused_in_one_sentence():
    records = [None, [], 3, "design", {}]
    for breaks in BROKEN:
        records.append(SMALL.reference_design().to_dict())
        breaks(records[-1])
    for record in records:
        with pytest.raises(ValueError) as caught:
            hinas.design_of({"design": record})
            pytest.fail(f"{record} was not refused")
        text = str(caught.value)
        assert text.startswith("The design is not valid: ") and text.endswith(".")
        assert "\n" not in text and len(text) < 200
    with pytest.raises(ValueError, match="The design is not valid"):
        hinas.design_of({})


# --- how search.py searches ----------------------------------------------------------------------------
def test_the_defaults_are_the_papers_data(tmp_path, monkeypatch):
    """Zhang 2020, section 4.1: grey images of train and val together, three levels of noise."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/train", "photos/val", "flat", "digits/train", "digits/val"):
        Path(name).mkdir(parents=True)
    photos, flat, digits, none = (hinas.search_defaults({"data": name} if name else {})
                                  for name in ("photos", "flat", "digits", None))
    assert photos["grey"] and photos["train_folders"] == ["train", "val"]
    assert flat["grey"] and not flat.get("train_folders")
    assert digits == none and "grey" not in none  # drawn in colour, whatever folders there are
    assert photos["sigmas"] == none["sigmas"] == [30 / 255, 50 / 255, 70 / 255] and "sigma" not in none
    large = hinas.search_defaults({"data": "photos", "network": "sr-x3"})
    assert (large["sigma"], large["batch_size"], large["size"]) == (0.0, 24, 66)
    assert not {"grey", "train_folders", "sigmas"} & {*large} and none["batch_size"] == 8
    assert hinas.search_defaults({"network": "sr-x2"})["size"] == 64


def test_flags_plan_a_space_make_its_supernet_and_train_it():
    parser = argparse.ArgumentParser()
    hinas.add_arguments(parser, "hinas")
    assert "None" not in parser.format_help() and all(action.help for action in parser._actions)
    flags = vars(parser.parse_args([])) | {"epochs": 100, "lr": 0.025, "arch_lr": 1e-3, "other": 1}
    space = Space(channels=3)
    assert hinas.plan(SimpleNamespace(channels=3), data="photos", **flags) == {
        "space": space, "table_space": space, "loss": "den", "weight_share": 0.5}
    given = "--network sr-x2 --width 3 --no-residual --search-width 2 --cells unshared --one-cell"
    special = vars(parser.parse_args(given.split()))
    plan = hinas.plan(SimpleNamespace(channels=1), **special)
    assert plan["space"] == Space("sr", 2, base_width=3, residual=False) and plan["table_space"].residual
    supernet = hinas.make_supernet(plan["space"], **special)
    assert supernet.own_space.base_width == 2 and len(supernet.alpha) == 1
    assert len(supernet.layers[1].cells[1]) == 2  # unshared
    assert plan["space"].table_flags() == "--method hinas --grey"  # no preset
    assert plan["table_space"].table_flags() == "--method hinas --network sr-x2 --width 3 --grey"
    for optimizer, kind, decay in (("muon", Muon, 0.0), ("sgd", torch.optim.SGD, 1e-3)):
        how = hinas.training(supernet, 7, **flags | {"optimizer": optimizer})
        weights, structure = how["weight_optimizer"], how["arch_optimizer"]
        trained = [weight for group in weights.param_groups for weight in group["params"]]
        assert type(weights) is kind and {*trained} == {*supernet.weight_parameters()}
        assert structure.param_groups[0]["params"] == supernet.arch_parameters()
        assert (structure.defaults["lr"], structure.defaults["weight_decay"]) == (1e-3, decay)
        assert (how["warmup_epochs"], how["keep_from"], how["temperature"]) == (20, 60, None)
        for rate in (0.013, 0.001):
            for _ in range(350):
                weights.step()
                how["lr_schedule"].step()
            rates = how["lr_schedule"].get_last_lr()
            assert rates == pytest.approx([rate] * len(rates))
    assert hinas.training(supernet, 7, **flags | {"warmup_epochs": 3})["warmup_epochs"] == 3


# --- designs to compare with ---------------------------------------------------------------------------
def test_perturbations_change_what_they_say():
    rng = random.Random(0)
    for _ in range(50):
        design = Space().random_design(rng)
        for strength, moved in (("R1", 0), ("R2", 2)):
            changed = hinas.perturb(design, strength, rng)
            before, after = list(design.edges().values()), list(changed.edges().values())
            lost = Counter(edge.operation for edge in before)
            lost.subtract(edge.operation for edge in after)
            assert lost["skip"] == 0 and sum(lost.values()) == 0
            sources = [[{edge.source for edge in pair} for nodes in each.cells for pair in nodes]
                       for each in (design, changed)]
            assert sum(len(a - b) for a, b in zip(*sources)) == moved
            if moved:
                assert not +lost and not -lost
            else:
                operations = [(a.operation, b.operation) for a, b in zip(before, after) if a != b]
                assert len(operations) == 2 and all(a != b and "skip" not in (a, b) for a, b in operations)
            assert replace(changed, cells=design.cells) == design  # the rest is as it was
            assert hinas.design_of(hinas.record_content(changed)) == changed


def test_perturbations_that_cannot_be_are_refused():
    tiny = Space(layers=1, nodes=1).reference_design()
    for design, strength in ((copy_of(tiny, "skip"), "R1"), (tiny, "R2"), (Space().reference_design(), "R3")):
        with pytest.raises(ValueError):
            hinas.perturb(design, strength, random.Random(0))


def test_random_cells_have_as_many_parameters():
    rng = random.Random(0)
    designs = [Space().random_design(rng) for _ in range(3)]
    designs.append(copy_of(replace(designs[0], widths=(20, 40, 80)), "dil5"))  # as large as can be
    for design in designs:
        others = [hinas.random_cells(design, rng) for _ in range(2)]
        assert others[0] != design and others[0] != others[1]
        for other in others:
            assert hinas.count_parameters(hinas.build, other) == pytest.approx(
                hinas.count_parameters(hinas.build, design), rel=0.05)
            assert other.widths == design.widths and hinas.design_of(hinas.record_content(other)) == other
    with pytest.raises(ValueError):
        hinas.random_cells(SMALL.reference_design(), rng, tolerance=-1.0)


# --- the picture, and the file alone -------------------------------------------------------------------
@pytest.mark.parametrize("space", (
    Space(), Space("sr", 4, 3), Space(widths=(1.0, 2.0, 4.0)), Space(layers=6, nodes=7)))
def test_the_picture_is_xml_and_names_everything_once_in_a_place(space):
    design = space.random_design(random.Random(7))
    root = ElementTree.fromstring(hinas.draw_network(design))
    texts = [element for element in root.iter() if element.tag.endswith("}text")]
    names = Counter(text.text for text in texts if text.get("class") == "name")
    assert names == Counter(edge.operation for edge in design.edges().values())
    for number, width in enumerate(design.widths):
        assert f"layer {number}: width {width}" in [text.text for text in texts]
    assert sum(text.text.startswith("node ") for text in texts) == space.layers * space.nodes
    boxes = []
    for text in texts:  # 12 px sans-serif: a letter is at most 8 px wide, these are 7 on average
        x, y, width = float(text.get("x")), float(text.get("y")), 7 * len(text.text)
        x -= 0 if text.get("class") == "title" else width / 2
        assert 0 <= x and x + width <= float(root.get("width")) and 12 <= y <= float(root.get("height"))
        boxes.append((x, x + width, y - 11, y + 3))
    for a, b in itertools.combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]


def test_the_file_and_its_command_work_alone_and_importing_it_does_nothing(tmp_path):
    shutil.copy(ROOT / "hinas.py", tmp_path)
    code = """
import random, runpy, sys
before = random.getstate()
import hinas, torch
assert random.getstate() == before
assert not {'models', 'files', 'data', 'latency', 'eval', 'train', 'search'} & set(sys.modules)
supernet = hinas.SuperNet(hinas.Space(nodes=2), 2)
network = hinas.build(hinas.design_of(hinas.record_content(supernet.likeliest())))
print(*(tuple(model(torch.rand(1, 1, 8, 8)).image.shape) for model in (supernet, network)))
for sys.argv, code in ((['hinas.py', '--help'], 0), (['hinas.py'], 2)):
    try:
        runpy.run_path('hinas.py', run_name='__main__')
    except SystemExit as stop:
        assert stop.code == code"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 1, 8, 8) (1, 1, 8, 8)\nusage: python hinas.py [options]")
    assert "must lie beside hinas.py" in done.stderr  # to read a record
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["hinas.py"]


def test_the_command_draws_and_changes_a_record(tmp_path, capsys):
    design, arch = SMALL.random_design(random.Random(4)), str(tmp_path / "arch.json")
    files.write_json(arch, files.make_record("hinas", hinas.record_content(design), {}, parameters=1, macs=2))
    hinas.main(["--arch", arch, "--output", str(tmp_path / "n.svg")])
    assert hinas.write_picture(tmp_path, design, None, []) == ["network.svg"]
    for name in ("n.svg", "network.svg"):
        assert (tmp_path / name).read_text() == hinas.draw_network(design)
    for change in ("R1", "R2", "random"):
        hinas.main(["--arch", arch, "--change", change, "--output", str(tmp_path / f"{change}.json")])
        record = files.load_record(tmp_path / f"{change}.json")
        other = hinas.design_of(record)
        assert other != design and "macs" not in record
        assert record["parameters"] == hinas.count_parameters(hinas.build, other)
    assert "parameters before" in capsys.readouterr().out
    files.write_json(arch, registry.named_record("cnas-k3-e3", 3, {}))
    for flags, word in (([], "is of tfnas"), (["--change", "R1"], "--output"), (["--arch", "no"], "no can")):
        with pytest.raises(SystemExit) as stop:
            hinas.main(["--arch", arch, *flags])
        assert stop.value.code == 2 and word in capsys.readouterr().err
