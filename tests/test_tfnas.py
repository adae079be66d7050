"""tfnas.py: costs of the space, the fit to a target, steps of weights and alpha, and what steers them."""

import argparse
import random
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import latency
import models
import run
import search
import tfnas
from fake_table import fake_table

CPU = torch.device("cpu")
one_hot = torch.nn.functional.one_hot


def make(model="dcnas", searched="cnas", operations=4, depth="fixed", cost=None, size=32):
    """A supernet, a made-up table of its space, and (costs of the parts, rest)."""
    space = tfnas.Space(operations, models.MIN_WIDTH, 10, model, searched, depth)
    supernet = tfnas.SuperNet(space)
    table = latency.Table(fake_table(operations, size=size, cost=cost))
    return supernet, table, search.costs_of_table(table, supernet, supernet.plan)[:2]


def set_alpha(supernet, rows):
    with torch.no_grad():
        supernet.alpha.copy_(rows)
        supernet.normalize_()


def random_structure(supernet, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in supernet.arch_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    supernet.normalize_()


# --- What the networks cost --------------------------------------------------------------------------------


@pytest.mark.parametrize("operations", [4, 6, 8])
@pytest.mark.parametrize("model, searched", [("cnas", "cnas"), ("dcnas", "cnas"), ("dcnas", "dcnas"),
                                             ("dnas", "cnas"), ("dnas", "dnas"), ("dcnas-seq", "cnas")])
def test_expected_cost_of_a_one_hot_supernet_is_the_prediction_for_the_export(model, searched, operations):
    supernet, table, costs = make(model, searched, operations)
    path = supernet.sample_path(torch.Generator().manual_seed(operations))
    widths = [models.width_range(supernet.operations[i], m.candidates[i].position.in_channels)[n % 2]
              for n, (m, i) in enumerate(zip(supernet.mixed, path))]
    supernet.set_widths(path, widths)
    set_alpha(supernet, 1e3 * one_hot(torch.tensor(path), len(supernet.operations)).float())
    exported = supernet.arch(path).with_model(model)
    assert supernet.likeliest() == exported
    assert supernet.expected_cost(*costs).item() == pytest.approx(table.predict_ms(exported), rel=1e-5)
    assert supernet.plan.cost(exported, *costs) == pytest.approx(table.predict_ms(exported), rel=1e-9)


def test_gradient_of_the_expected_cost_agrees_with_finite_differences():
    supernet, _, costs = make(operations=8)
    supernet = supernet.double()
    set_alpha(supernet, torch.randn(supernet.alpha.shape, dtype=torch.float64,
                                    generator=torch.Generator().manual_seed(0)))
    term = tfnas.latency_loss("hinge", 0.5, None)

    def loss():
        return term(supernet.expected_cost(*costs))

    loss().backward()
    gradient = supernet.alpha.grad.clone()
    for block, operation in ((0, 0), (5, 3), (17, 7), (9, 4)):
        step, values = 1e-5, []
        with torch.no_grad():
            for sign in (1, -1):
                supernet.alpha[block, operation] += sign * step
                values.append(loss().item())
                supernet.alpha[block, operation] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert gradient[block, operation].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("model", ["cnas", "dcnas", "dcnas-seq"])
def test_expected_cost_of_one_hot_depths_is_the_prediction_for_the_export(model):
    supernet, table, costs = make(model, depth="learned")
    path = supernet.sample_path(torch.Generator().manual_seed(0))
    set_alpha(supernet, 1e3 * one_hot(torch.tensor(path), 4).float())
    for index, beta in enumerate(supernet.betas):  # stages 3 to 7, of 2, 3, 4, 4, 4 blocks
        with torch.no_grad():
            beta.copy_(1e3 * one_hot(torch.tensor(index % len(beta)), len(beta)).float())
    exported = supernet.likeliest()
    assert exported == supernet.arch(path).with_model(model)
    depths = [sum(block.stage == stage for block in exported.blocks) for stage in range(3, 9)]
    assert depths == [1, 2, 3, 4, 1, 1]
    assert supernet.expected_cost(*costs).item() == pytest.approx(table.predict_ms(exported), rel=1e-5)


def test_expected_cost_of_depths_is_the_sum_over_ends_of_the_paper():
    """LAT of a stage = sum over b of softmax(beta)_b * LAT(blocks 1 to b)."""
    supernet, _, (costs, rest) = make("cnas", depth="learned")
    random_structure(supernet, 0)
    curves = tfnas.Curves(costs)
    table = torch.tensor([[curves.cost(tfnas.part_of(block)) for block in row]
                          for row in supernet.candidate_blocks()])
    blocks = (supernet.alpha.softmax(1) * table).sum(1)
    fixed = {tfnas.part_of(block) for block in models.named_arch("cnas-k3-e3", 10).blocks if block.stage == 2}
    total = rest + sum(ms for part, ms in costs.items() if part.place in ("stem", "head") or part in fixed)
    start = 0
    for stage in models.STAGES:
        part = blocks[start:start + stage.blocks]
        ends = supernet.betas[stage.number - 3].softmax(0) if stage.blocks > 1 else torch.ones(1)
        total += sum(end * part[:b + 1].sum() for b, end in enumerate(ends))
        start += stage.blocks
    torch.testing.assert_close(supernet.expected_cost(costs, rest), total)
    supernet.expected_cost(costs, rest).backward()
    # The first end costs least, the last one most.
    assert all(beta.grad[0] < 0 < beta.grad[-1] for beta in supernet.betas)


def test_a_sequential_network_pays_twice_for_its_encoder():
    table, arch = latency.Table(fake_table(4)), models.named_arch("dcnas-k3-e3", 10)
    parts = [table.predict_ms(arch.with_model(model)) for model in ("dnas", "cnas")]
    assert table.predict_ms(arch.with_model("dcnas-seq")) == pytest.approx(sum(parts))
    assert [tfnas.Space(model="dcnas-seq").passes(stage) for stage in (3, 6, 7)] == [2, 2, 1]


def test_a_dnas_costs_nothing_beyond_stage_6():
    supernet, _, costs = make("dnas", "cnas")
    tail = torch.tensor([row[0].stage > 6 for row in supernet.candidate_blocks()])
    random_structure(supernet, 0)
    supernet.expected_cost(*costs).backward()
    assert tail.sum() == 5
    assert torch.equal((supernet.alpha.grad == 0).all(1), tail)
    assert (supernet.alpha.grad[~tail] != 0).all()


def test_latency_losses_by_hand():
    hinge, absolute = (tfnas.latency_loss(kind, 10.0, None) for kind in ("hinge", "absolute"))
    assert hinge(torch.tensor(12.0)).item() == pytest.approx(0.5 * 0.2)
    assert hinge(torch.tensor(8.0)).item() == 0
    assert absolute(torch.tensor(12.0)).item() == pytest.approx(0.1 * 0.2)
    assert absolute(torch.tensor(8.0)).item() == pytest.approx(0.1 * 0.2)
    assert tfnas.latency_loss("hinge", 10.0, 2.0)(torch.tensor(15.0)).item() == pytest.approx(1.0)


# --- The fit to the target ---------------------------------------------------------------------------------


def fit(supernet, costs, target):
    """(path, design) of a fit; the design's widths lie within those of its operations."""
    path = latency.fit_state(supernet, *costs, target)
    widths = supernet.fit_widths(path, *costs, target)
    design = supernet.settle(path, *costs, target)
    assert design == latency.fit(supernet, *costs, target)
    for index, width, mixed in zip(path, widths, supernet.mixed):
        channels = mixed.candidates[index].position.in_channels
        low, high = models.width_range(supernet.operations[index], channels)
        assert low <= width <= high and width % models.WIDTH_STEP == 0
    return path, design


@pytest.mark.parametrize("operations", [4, 8])
@pytest.mark.parametrize("prefer", ["random", "cheapest", "dearest"])
def test_the_fit_meets_any_reachable_target_within_one_percent(operations, prefer):
    """From both sides: cheap operations must be exchanged for dear ones, and dear ones for cheap ones."""
    supernet, table, costs = make(operations=operations)
    if prefer == "random":
        random_structure(supernet, 3)
    else:
        ends = supernet._ends(*costs[:1])
        choose = (lambda row: min(range(len(row)), key=lambda i: row[i][1])) if prefer == "cheapest" else (
            lambda row: max(range(len(row)), key=lambda i: row[i][0]))
        set_alpha(supernet, 3.0 * one_hot(torch.tensor([choose(row) for row in ends]), operations))
    low, high = supernet.cost_range(*costs)
    exchanged = []
    for share in (0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0):
        target = low + share * (high - low)
        path, design = fit(supernet, costs, target + 1e-9)
        assert 0.99 * target <= table.predict_ms(design) <= target + 1e-6
        exchanged.append(list(path) != supernet.best_path())
    assert any(exchanged[:1] if prefer == "dearest" else exchanged[-1:])  # widths alone would not do


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_the_fit_meets_the_target_with_learned_depth(share):
    supernet, table, (costs, rest) = make("dcnas", depth="learned")
    random_structure(supernet, 1)
    low, high = supernet.cost_range(costs, rest)
    narrow, wide = (supernet._base(costs, rest)
                    + sum(f(pair[end] for pair in row)
                          for row, keep in zip(supernet._ends(costs), supernet.kept()) if keep)
                    for f, end in ((min, 0), (max, 1)))
    assert low <= narrow < wide <= high and not all(supernet.kept())
    target = narrow + share * (wide - narrow) + 1e-9
    _, design = fit(supernet, (costs, rest), target)
    assert 0.99 * target <= table.predict_ms(design) <= target + 1e-6
    assert len([block for block in design.blocks if block.stage > 2]) == sum(supernet.kept())


def test_the_fit_does_not_stall_at_half_the_width():
    supernet, _, costs = make()
    set_alpha(supernet, 3.0 * one_hot(torch.zeros(18, dtype=torch.int64), 4))
    target = supernet.cost_range(*costs)[0] * 1.02
    path = latency.fit_state(supernet, *costs, target)
    widths = supernet.fit_widths(path, *costs, target)
    halves = [supernet.operations[i].max_width(m.candidates[i].position.in_channels) / 2
              for i, m in zip(path, supernet.mixed)]
    assert sum(width < half for width, half in zip(widths, halves)) > 12


def test_the_fit_keeps_the_operations_where_widths_reach_far_enough():
    supernet, table, costs = make()
    random_structure(supernet, 4)
    target = table.predict_ms(supernet.likeliest())
    assert supernet.exchanges(tuple(supernet.best_path()), *costs, target) == []
    path, _ = fit(supernet, costs, target)
    assert list(path) == supernet.best_path()


def test_a_random_network_follows_its_seed():
    drawn = []
    for seed in (1, 1, 2):
        supernet, _, costs = make(depth="learned")
        supernet.draw_random(seed)
        drawn.append((supernet.best_path(), supernet.kept()))
        torch.testing.assert_close(supernet.alpha.detach().exp().sum(1), torch.ones(18))
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[2][0] and drawn[0][1] != drawn[2][1]


# --- The two steps -----------------------------------------------------------------------------------------


def batch_of(size=32, count=4):
    clean = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return clean + 0.1, clean, torch.arange(count) % 10


@pytest.fixture
def schedule():
    supernet, _, costs = make()
    return tfnas.Schedule(supernet, search.Costs(*costs, "ms"), steps=4, device=CPU, lr=0.02)


def test_a_weight_step_changes_only_the_sampled_operations(schedule):
    supernet = schedule.supernet
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    path = supernet.sample_path(torch.Generator().manual_seed(0))
    assert schedule.weight_step(batch_of(), bi_sampling=False)["weight_loss"] > 0
    names = {id(parameter): name for name, parameter in supernet.named_parameters()}
    for block, mixed in enumerate(supernet.mixed):
        for index, candidate in enumerate(mixed.candidates):
            name = names[id(candidate.project_weight)]
            assert torch.equal(before[name], candidate.project_weight) == (index != path[block])
    assert torch.equal(before["alpha"], supernet.alpha)


def test_bi_sampling_adds_the_losses_of_two_paths(schedule):
    supernet = schedule.supernet.double()  # exact enough to compare two orders of summation
    schedule.weight_optimizer.step = lambda: None
    schedule.GRAD_CLIP = 1e9
    noisy, clean, labels = batch_of()
    batch = noisy.double(), clean.double(), labels
    schedule.weight_step(batch, bi_sampling=True)
    found = [None if p.grad is None else p.grad.clone() for p in schedule.weights]
    generator = torch.Generator().manual_seed(0)
    first = supernet.sample_path(generator)
    second = supernet.other_path(first, generator)
    supernet.zero_grad(set_to_none=True)
    total = sum(torch.nn.functional.cross_entropy(supernet(batch[0], path).logits.float(), labels,
                                                  label_smoothing=0.1) for path in (first, second))
    total.backward()
    for ours, parameter in zip(found, schedule.weights):
        assert (ours is None) == (parameter.grad is None)
        if ours is not None:
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-8, atol=1e-10)


def test_an_alpha_step_moves_alpha_only_and_leaves_log_probabilities(schedule):
    supernet = schedule.supernet
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    for _ in range(3):
        schedule.arch_step([batch_of()], 5.0)
    assert all(torch.equal(value, before[name])
               for name, value in supernet.state_dict().items() if name != "alpha")
    assert not torch.equal(before["alpha"], supernet.alpha)
    torch.testing.assert_close(supernet.alpha.exp().sum(1), torch.ones(18))
    assert all(p.grad is None and p.requires_grad for p in schedule.weights)  # none was computed


def test_an_alpha_step_takes_the_mean_gradient_of_its_batches():
    gradients = []
    for batches in ([0], [1], [0, 1]):
        torch.manual_seed(0)
        supernet, _, costs = make()
        made = tfnas.Schedule(supernet, search.Costs(*costs, "ms"), steps=4, device=CPU)
        noisy, clean, labels = batch_of()
        made.GRAD_CLIP = 1e9
        supernet.mixture = lambda temperature, generator, supernet=supernet: supernet.alpha.softmax(1)
        made.arch_step([(noisy * (1 + one), clean, labels) for one in batches], 5.0)
        gradients.append(supernet.alpha.grad)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)
    made = tfnas.Schedule(supernet, search.Costs(*costs, "ms"), steps=4, device=CPU, arch_every=1,
                          arch_batches=3)
    made.begin_epoch(5, 0)
    assert made.held_out_before(7) == 21


def test_a_loss_that_is_not_finite_stops_the_search_at_its_step(schedule):
    noisy, clean, labels = batch_of()
    with pytest.raises(run.TrainingError, match="nan at epoch 3, step 7"):
        schedule.weight_step((noisy * float("nan"), clean, labels), True, where="epoch 3, step 7")


def test_where_channels_changed_places_momentum_begins_anew(schedule):
    supernet, path = schedule.supernet, schedule.supernet.largest_path()
    schedule.weight_step(batch_of(), bi_sampling=False, path=path)
    weights = {name: weight for name, weight in supernet.named_parameters()
               if weight in schedule.weight_optimizer.state}
    before = {name: weight.clone() for name, weight in weights.items()}

    def moving():
        return {name for name, weight in weights.items()
                if schedule.weight_optimizer.state[weight]["momentum_buffer"].any()}

    had = moving()
    widths = [width - models.WIDTH_STEP for width in supernet.present_widths(path)]
    schedule.set_widths(path, widths)
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert changed and had - moving() == changed and supernet.present_widths(path) == widths


def test_when_weights_and_alpha_are_trained():
    supernet, _, costs = make()
    how = {"steps": 4, "device": CPU}

    def schedule(**flags):
        return tfnas.Schedule(supernet, search.Costs(*costs, "ms"), **how, **flags)

    assert [schedule(epochs=epochs).warmup_epochs for epochs in (2, 9, 90)] == [1, 3, 10]
    made = schedule(epochs=90, warmup="sampled")
    assert made.warmup_epochs == 10 and made.work(10) > made.work(9)
    for epoch, tau, taken in ((0, 5.0, 0), (10, 5.0, 3), (89, 5 * 0.96 ** 79, 3)):  # papers: 5.0 to 0.2
        made.begin_epoch(epoch, 0)
        assert made.tau == pytest.approx(tau) and made.held_out_before(7) == taken
    made = schedule(epochs=9, warmup_epochs=0, temperature=2.0, temperature_decay=0.5)
    made.begin_epoch(2, 0)
    assert made.tau == 0.5 and not made.warm


# --- A table with known costs steers the search ------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    images = data.load_data("digits", size=16, train_images=40, val_images=1, test_images=1).train
    halves = search.split_dataset(images, 0.8, 0)
    loaders = [data.make_loader(torch.utils.data.Subset(images, half), 8, shuffle=True, drop_last=True)
               for half in halves]
    return [data.NoisyBatches(loader, CPU, data.Noise(), part) for part, loader in enumerate(loaders)]


def run_search(batches, share, cost, folder, epochs=6, kind="absolute", depth="fixed"):
    """A short search in which the alpha steps see the latency term almost alone (weight 50)."""
    torch.manual_seed(0)
    supernet, _, costs = make(cost=cost, size=16, depth=depth)
    low, high = supernet.cost_range(*costs)
    costs = search.Costs(*costs, "ms", low + share * (high - low))
    schedule = tfnas.Schedule(supernet, costs, steps=len(batches[0]), device=CPU, within_reach=True,
                              epochs=epochs, arch_lr=0.3, warmup_epochs=1, temperature_decay=0.96,
                              latency_loss=kind, latency_weight=50.0)
    rows, _ = search.search_epochs(schedule, *batches, epochs=epochs, output_dir=folder, about={})
    return supernet, rows


def kernel_cost(block):
    return 0.01 + 1e-5 * block.mid_channels + (1.0 if block.kernel_size == 5 else 0.0)


@pytest.mark.parametrize("share, wanted", [(0.05, 3), (0.95, 5)])
def test_costs_of_kernels(share, wanted, digits, tmp_path):
    """5x5 costs a hundred times as much as 3x3: alpha goes to 3x3 for a low target, else to 5x5."""
    supernet, rows = run_search(digits, share, kernel_cost, tmp_path)
    probability = supernet.alpha.softmax(1)
    wanted_probability = sum(probability[:, index] for index, operation in enumerate(supernet.operations)
                             if operation.kernel_size == wanted)
    assert wanted_probability.min() > 0.8
    assert {supernet.operations[index].kernel_size for index in supernet.best_path()} == {wanted}
    assert (rows[-1]["expected_ms"] < rows[0]["expected_ms"]) == (wanted == 3)


def test_costs_of_widths_and_depths(digits, tmp_path):
    """Blocks cost by their widths: for a low target they get narrow and few, else wide and many."""
    found = {}
    for share in (0.05, 0.95):
        supernet, _ = run_search(digits, share, lambda block: 1e-3 * block.mid_channels, tmp_path,
                                 epochs=8, depth="learned")
        widths = [width / mixed.candidates[0].position.in_channels
                  for width, mixed in zip(supernet.present_widths(supernet.best_path()), supernet.mixed)]
        found[share] = (sum(widths) / 18, supernet.keep_probability().mean().item(), sum(supernet.kept()))
    assert found[0.05][0] < 3 and found[0.95][0] > 6
    assert found[0.05][1] < 0.5 and found[0.95][1] > 0.8
    assert found[0.05][2] <= 9 and found[0.95][2] >= 15


def test_the_hinge_does_not_press_below_the_target(digits, tmp_path):
    supernet, rows = run_search(digits, 1.0, kernel_cost, tmp_path, epochs=3, kind="hinge")
    assert abs(rows[-1]["expected_ms"] / rows[0]["expected_ms"] - 1) < 0.5
    assert supernet.entropy().mean() > 0.7


# --- What search.py asks -----------------------------------------------------------------------------------


def test_an_alpha_that_is_undecided_or_collapsed_is_reported():
    supernet, _, _ = make()
    assert all(block == {"entropy": 1.0, "margin": 0.0} for block in supernet.decisions())
    (note,) = tfnas.explain_choice(supernet, supernet.likeliest(), [])
    assert "undecided in 18 of 18 blocks" in note
    set_alpha(supernet, torch.tensor([[0.0, 9.0, 0.0, 0.0]] * 18))
    assert all(block["entropy"] < 0.1 and block["margin"] > 0.9 for block in supernet.decisions())
    (note,) = tfnas.explain_choice(supernet, supernet.likeliest(), [])
    assert f"every block prefers {supernet.operations[1].name}" in note
    set_alpha(supernet, torch.tensor([[0.0, 9.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]] * 9))
    assert tfnas.explain_choice(supernet, supernet.likeliest(), []) == []
    supernet, _, _ = make(depth="learned")
    random_structure(supernet, 1)
    note = tfnas.explain_choice(supernet, supernet.likeliest(), [])[-1]
    assert f"keeps {sum(supernet.kept())} of 18" in note


def test_the_picture_is_optional(tmp_path, monkeypatch, capsys):
    supernet, _, _ = make()
    rows = [{"epoch": epoch, "alpha": [[0.25] * 4] * 18} for epoch in (1, 2)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert tfnas.write_picture(tmp_path, supernet.likeliest(), supernet, rows) == []
    assert "install matplotlib" in capsys.readouterr().out
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert tfnas.write_picture(tmp_path, supernet.likeliest(), supernet, rows) == ["alpha.png"]
    assert (tmp_path / "alpha.png").stat().st_size > 1000


def flags_of(*words):
    parser = argparse.ArgumentParser()
    tfnas.add_arguments(parser, "dcnas")
    assert "None" not in parser.format_help()
    return vars(parser.parse_args(words)) | {"target": [5.0], "range": False}


def test_flags_and_images_say_what_is_searched():
    digits = SimpleNamespace(name="digits", train=[], channels=3, classes=["a", "b", "c"])
    photos = SimpleNamespace(name="photos", train=[], channels=3, classes=None)
    for model, words, searched, loss in (("dcnas", (), "cnas", "cls"), ("dcnas-seq", (), "cnas", "cls"),
                                         ("cnas", (), "cnas", "cls"), ("dnas", (), "cnas", "cls"),
                                         ("dcnas", ("--search-loss", "both"), "dcnas", "both"),
                                         ("dnas", ("--search-loss", "den"), "dnas", "den")):
        plan = tfnas.plan(digits, model=model, **flags_of(*words))
        assert plan["space"] == tfnas.Space(4, models.MIN_WIDTH, 3, model, searched) and plan["loss"] == loss
        assert plan["weight_share"] == 0.8
    plan = tfnas.plan(photos, model="dnas", **flags_of("--space", "8", "--depth", "learned"))
    assert plan["space"] == tfnas.Space(8, models.MIN_WIDTH, 10, "dnas", "dnas", "learned")
    assert plan["loss"] == "den"
    supernet = tfnas.make_supernet(plan["space"], **flags_of("--recompute"))
    assert supernet.mixed[0].recompute and len(supernet.betas) == 4
    assert plan["table_space"].table_flags() == "--classes 10 --space 8 --min-width 1.25"
    for images, model, words, sentence in (
            (digits, "cnas", ("--search-loss", "both"), "--search-loss both does not go with --model cnas"),
            (photos, "dcnas", (), "no labels"),
            (photos, "dnas", ("--search-loss", "cls"), "does not go with")):
        with pytest.raises(ValueError, match=sentence):
            tfnas.plan(images, model=model, **flags_of(*words))
    with pytest.raises(ValueError, match="--target 12"):
        tfnas.plan(digits, model="dcnas", **flags_of() | {"target": None})
    assert tfnas.plan(digits, model="dcnas", **flags_of() | {"target": None, "range": True})["loss"] == "cls"


def test_a_network_is_described_with_what_its_parts_cost():
    supernet, table, costs = make()
    design = supernet.plan.random_design(random.Random(0))
    lines = supernet.describe(design, *costs).splitlines()
    shown = [float(line.split()[-1]) for line in lines[1:]]
    assert sum(shown) == pytest.approx(table.predict_ms(design), abs=0.02)
    assert len(lines) == 1 + 4 + len(design.blocks)
    assert len(supernet.describe(design).splitlines()) == len(lines) - 1
