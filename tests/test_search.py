"""search.py: the two steps, the latency term, the fit to the target, and the search as a whole on made-up tables."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import latency
import models
import search
import train
from fake_table import fake_table

ROOT = Path(search.__file__).parent
CPU = torch.device("cpu")


def make(model="dcnas", supernet="cnas", space=4, target=2.0, cost=None, depth="fixed"):
    supernet = models.SuperNet(supernet, space, 0 if supernet == "dnas" else 10, depth=depth)
    table = latency.LatencyTable(fake_table(space, cost=cost))
    return supernet, search.Budget(table, supernet, model, target)


def set_alpha(supernet, rows):
    with torch.no_grad():
        supernet.alpha.copy_(rows)
        supernet.normalize_()


# --- expected latency ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [4, 6, 8])
@pytest.mark.parametrize("model, supernet", [("cnas", "cnas"), ("dcnas", "cnas"), ("dcnas", "dcnas"), ("dnas", "cnas"),
                                             ("dnas", "dnas"), ("dcnas-seq", "cnas")])
def test_expected_latency_of_a_one_hot_supernet_is_the_prediction_for_the_export(model, supernet, space):
    supernet, budget = make(model, supernet, space)
    generator = torch.Generator().manual_seed(space)
    path = supernet.sample_path(generator)
    widths = [models.width_range(supernet.operations[i], m.candidates[i].position.in_channels)[n % 2]
              for n, (m, i) in enumerate(zip(supernet.mixed, path))]
    supernet.set_widths(path, widths)
    set_alpha(supernet, 1e3 * torch.nn.functional.one_hot(torch.tensor(path), len(supernet.operations)).float())
    expected = supernet.expected_latency(budget.candidates_ms(), budget.base_ms).item()
    exported = supernet.arch(path).with_model(model)
    assert expected == pytest.approx(budget.table.predict_ms(exported), rel=1e-5)


def test_gradient_of_the_expected_latency_agrees_with_finite_differences():
    supernet, budget = make(space=8)
    supernet = supernet.double()
    set_alpha(supernet, torch.randn(supernet.alpha.shape, dtype=torch.float64,
                                    generator=torch.Generator().manual_seed(0)))
    costs = budget.candidates_ms().double()
    term = search.latency_loss("hinge", 0.5, None)

    def loss():
        return term(supernet.expected_latency(costs, budget.base_ms))

    loss().backward()
    gradient = supernet.alpha.grad.clone()
    for block, operation in ((0, 0), (5, 3), (17, 7), (9, 4)):
        step = 1e-5
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                supernet.alpha[block, operation] += sign * step
                values.append(loss().item())
                supernet.alpha[block, operation] -= sign * step
        assert gradient[block, operation].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("model", ["cnas", "dcnas", "dcnas-seq"])
def test_expected_latency_of_one_hot_depths_is_the_prediction_for_the_export(model):
    supernet, budget = make(model, depth="learned")
    path = supernet.sample_path(torch.Generator().manual_seed(0))
    set_alpha(supernet, 1e3 * torch.nn.functional.one_hot(torch.tensor(path), 4).float())
    for index, beta in enumerate(supernet.betas):  # stages 3 to 7, of 2, 3, 4, 4, 4 blocks
        with torch.no_grad():
            beta.copy_(1e3 * torch.nn.functional.one_hot(torch.tensor(index % len(beta)), len(beta)).float())
    exported = supernet.arch(path).with_model(model)
    assert [sum(block.stage == stage for block in exported.blocks) for stage in range(3, 9)] == [1, 2, 3, 4, 1, 1]
    expected = supernet.expected_latency(budget.candidates_ms(), budget.base_ms).item()
    assert expected == pytest.approx(budget.table.predict_ms(exported), rel=1e-5)


def test_expected_latency_of_depths_is_the_sum_over_ends_of_the_paper():
    """LAT of a stage = sum over b of softmax(beta)_b * LAT(blocks 1 to b)."""
    supernet, budget = make("cnas", depth="learned")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in supernet.arch_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    costs = (supernet.alpha.softmax(1) * budget.candidates_ms()).sum(1)
    total, start = budget.base_ms, 0
    for stage in models.STAGES:
        part = costs[start:start + stage.blocks]
        ends = supernet.betas[stage.number - 3].softmax(0) if stage.blocks > 1 else torch.ones(1)
        total += sum(end * part[:b + 1].sum() for b, end in enumerate(ends))
        start += stage.blocks
    torch.testing.assert_close(supernet.expected_latency(budget.candidates_ms(), budget.base_ms), total)
    supernet.expected_latency(budget.candidates_ms(), budget.base_ms).backward()
    assert all(beta.grad[0] < 0 < beta.grad[-1] for beta in supernet.betas)  # the first end costs least, the last most


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_the_fit_meets_the_target_with_learned_depth(share):
    supernet, budget = make("dcnas", depth="learned")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in supernet.arch_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    path, kept = supernet.best_path(), supernet.kept()
    narrow, wide = (budget.base_ms + sum(f(budget.block_ms(pair[end]) for pair in row)
                                         for row, keep in zip(budget.limits(), kept) if keep)
                    for f, end in ((min, 0), (max, 1)))
    assert budget.range_ms()[0] <= narrow < wide <= budget.range_ms()[1]
    target = narrow + share * (wide - narrow) + 1e-9
    path, widths = budget.fit(path, target)
    supernet.set_widths(path, widths)
    assert 0.99 * target <= budget.table.predict_ms(supernet.arch(path).with_model("dcnas")) <= target + 1e-6


def test_a_sequential_network_pays_twice_for_its_encoder():
    table = latency.LatencyTable(fake_table(4))
    arch = models.named_arch("dcnas-k3-e3", 10)
    parts = [table.predict_ms(arch.with_model(model)) for model in ("dnas", "cnas")]
    assert table.predict_ms(arch.with_model("dcnas-seq")) == pytest.approx(sum(parts))


def test_latency_losses_by_hand():
    hinge, absolute = search.latency_loss("hinge", 10.0, None), search.latency_loss("absolute", 10.0, None)
    assert hinge(torch.tensor(12.0)).item() == pytest.approx(0.5 * 0.2) and hinge(torch.tensor(8.0)).item() == 0
    assert absolute(torch.tensor(12.0)).item() == pytest.approx(0.1 * 0.2)
    assert absolute(torch.tensor(8.0)).item() == pytest.approx(0.1 * 0.2)
    assert search.latency_loss("hinge", 10.0, 2.0)(torch.tensor(15.0)).item() == pytest.approx(1.0)


def test_a_dnas_costs_nothing_beyond_stage_6():
    supernet, budget = make("dnas", "cnas")
    costs = budget.candidates_ms()
    tail = [row[0].stage > 6 for row in supernet.candidate_blocks()]
    assert sum(tail) == 5
    assert all((row == 0).all() if beyond else (row > 0).all() for row, beyond in zip(costs, tail))


# --- the two steps -------------------------------------------------------------------------------------------


def batch_of(size=32, count=4):
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(count, 3, size, size, generator=generator)
    return clean + 0.1, clean, torch.arange(count) % 10


def searcher_of(supernet, loss="cls"):
    return search.Searcher(supernet, device=CPU, lr=0.02, arch_lr=0.01, loss=loss, seed=0)


def test_a_weight_step_changes_only_the_sampled_operations():
    supernet = models.SuperNet("cnas", 4, 10)
    searcher = searcher_of(supernet)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    path = supernet.sample_path(torch.Generator().manual_seed(0))
    searcher.weight_step(batch_of(), bi_sampling=False)
    for block, mixed in enumerate(supernet.mixed):
        for index, candidate in enumerate(mixed.candidates):
            name = next(n for n, p in supernet.named_parameters() if p is candidate.project_weight)
            assert torch.equal(before[name], candidate.project_weight) == (index != path[block])
    assert torch.equal(before["alpha"], supernet.alpha)


def test_bi_sampling_adds_the_losses_of_two_paths():
    torch.manual_seed(0)
    supernet = models.SuperNet("cnas", 4, 10).double()  # exact enough to compare two orders of summation
    searcher = searcher_of(supernet)
    searcher.weight_optimizer.step = lambda: None
    searcher.grad_clip = 1e9
    noisy, clean, labels = batch_of()
    batch = noisy.double(), clean.double(), labels
    searcher.weight_step(batch, bi_sampling=True)
    found = [None if p.grad is None else p.grad.clone() for p in searcher.weights]
    generator = torch.Generator().manual_seed(0)
    first = supernet.sample_path(generator)
    second = supernet.other_path(first, generator)
    supernet.zero_grad(set_to_none=True)
    total = sum(torch.nn.functional.cross_entropy(supernet(batch[0], path).logits.float(), labels, label_smoothing=0.1)
                for path in (first, second))
    total.backward()
    for ours, parameter in zip(found, searcher.weights):
        assert (ours is None) == (parameter.grad is None)
        if ours is not None:
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-8, atol=1e-10)


def test_an_alpha_step_moves_alpha_only_and_leaves_log_probabilities():
    supernet = models.SuperNet("cnas", 4, 10)
    searcher = searcher_of(supernet)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    for _ in range(3):
        searcher.arch_step(batch_of(), 5.0)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items() if name != "alpha")
    assert not torch.equal(before["alpha"], supernet.alpha)
    torch.testing.assert_close(supernet.alpha.exp().sum(1), torch.ones(18))
    assert all(p.grad is None and p.requires_grad for p in searcher.weights)  # none was computed


def test_a_loss_that_is_not_finite_stops_the_search_at_its_step():
    supernet = models.SuperNet("cnas", 4, 10)
    noisy, clean, labels = batch_of()
    with pytest.raises(search.TrainingError, match="nan at epoch 3, step 7"):
        searcher_of(supernet).weight_step((noisy * float("nan"), clean, labels), True, where="epoch 3, step 7")


# --- the fit to the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [4, 8])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0])
def test_the_fit_meets_any_reachable_target_within_one_percent(space, share):
    supernet, budget = make(space=space)
    set_alpha(supernet, torch.randn(supernet.alpha.shape, generator=torch.Generator().manual_seed(3)))
    fastest, slowest = budget.range_ms()
    target = fastest + share * (slowest - fastest)
    path, widths = budget.fit(supernet.best_path(), target + 1e-9)
    supernet.set_widths(path, widths)
    predicted = budget.table.predict_ms(supernet.arch(path).with_model("dcnas"))
    assert 0.99 * target <= predicted <= target + 1e-6
    for index, width, mixed in zip(path, widths, supernet.mixed):
        low, high = models.width_range(supernet.operations[index], mixed.candidates[index].position.in_channels)
        assert low <= width <= high and width % models.WIDTH_STEP == 0


def test_the_fit_does_not_stall_at_half_the_width():
    supernet, budget = make(space=4)
    path, widths = budget.fit([0] * 18, budget.range_ms()[0] * 1.02)
    halves = [supernet.operations[i].max_width(m.candidates[i].position.in_channels) / 2
              for i, m in zip(path, supernet.mixed)]
    assert sum(width < half for width, half in zip(widths, halves)) > 12


def test_the_fit_keeps_the_operations_where_widths_reach_far_enough():
    supernet, budget = make(space=4)
    set_alpha(supernet, torch.randn(supernet.alpha.shape, generator=torch.Generator().manual_seed(4)))
    path = supernet.best_path()
    middle = budget.table.predict_ms(supernet.arch(path).with_model("dcnas"))
    assert budget.fit(path, middle)[0] == path


# --- steering ------------------------------------------------------------------------------------------------


def run_search(target, cost, seed=0, epochs=3, output_dir=None, state=None, kind="hinge"):
    """A short search with a made-up table; the alpha steps see the latency term almost alone (weight 50)."""
    torch.manual_seed(seed)
    digits = data.load_data("digits", size=16, train_images=40, val_images=10)
    supernet = models.SuperNet("cnas", 4, 10)
    table = latency.LatencyTable(fake_table(4, size=16, cost=cost))
    ends = search.Budget(table, supernet, "dcnas", 1.0).range_ms()
    budget = search.Budget(table, supernet, "dcnas", target(*ends))
    halves = data.stratified_split(digits.train.targets, 0.8, seed)
    loaders = [data.make_loader(torch.utils.data.Subset(digits.train, half), 8, shuffle=True, drop_last=True, seed=seed)
               for half in halves]
    searcher = search.Searcher(supernet, device=CPU, lr=0.05, arch_lr=0.3, loss="cls", seed=seed)
    method = search.TFNAS(searcher, budget, steps=epochs * len(loaders[0]), warmup_epochs=1, warmup="inherit", temperature=5.0,
                          temperature_decay=0.96, pressure=True, latency_term=search.latency_loss(kind, budget.target_ms, 50.0))
    batches = [train.NoisyBatches(loader, CPU, data.Noise(), seed + part) for part, loader in enumerate(loaders)]
    rows = search.search(method, *batches, epochs=epochs, output_dir=output_dir, flags={}, table=table.content, state=state)
    return supernet, budget, rows


def kernel_cost(block):
    return 0.01 + 1e-5 * block.mid_channels + (1.0 if block.kernel_size == 5 else 0.0)


@pytest.mark.parametrize("share, wanted", [(0.05, 3), (0.95, 5)])
def test_a_table_with_known_costs_steers_the_search(share, wanted, tmp_path):
    """5x5 costs a hundred times as much as 3x3: alpha goes to 3x3 for a low target, and to 5x5 for a high one."""
    supernet, _, rows = run_search(lambda low, high: low + share * (high - low), kernel_cost, epochs=6, kind="absolute",
                                   output_dir=tmp_path)
    probability = supernet.alpha.softmax(1)
    wanted_probability = sum(probability[:, index] for index, operation in enumerate(supernet.operations)
                             if operation.kernel_size == wanted)
    assert wanted_probability.min() > 0.8
    assert {supernet.operations[index].kernel_size for index in supernet.best_path()} == {wanted}
    assert (rows[-1]["expected_ms"] < rows[0]["expected_ms"]) == (wanted == 3)


def test_the_hinge_does_not_press_below_the_target(tmp_path):
    supernet, _, rows = run_search(lambda low, high: high, kernel_cost, epochs=3, output_dir=tmp_path)
    assert abs(rows[-1]["expected_ms"] / rows[0]["expected_ms"] - 1) < 0.5 and supernet.entropy().mean() > 0.7


def test_log_and_resume_give_what_an_unbroken_search_gives(tmp_path):
    def target(low, high):
        return (low + high) / 2
    whole, _, rows = run_search(target, None, output_dir=tmp_path / "whole")
    # stop after two epochs, then go on
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        original = search.write_log

        def stop_after_two(path, log):
            original(path, log)
            if len(log) == 2:
                raise KeyboardInterrupt
        search.write_log = stop_after_two
        try:
            run_search(target, None, output_dir=stopped)
        finally:
            search.write_log = original
    state = models.read_checkpoint(stopped / "search.pt")
    resumed, _, resumed_rows = run_search(target, None, output_dir=stopped, state=state)
    assert torch.equal(whole.alpha, resumed.alpha) and whole.arch() == resumed.arch()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    log = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2, 3] and "arch_loss" not in log[0]
    assert log[2]["alpha"] == rows[2]["alpha"] and len(log[2]["entropy"]) == 18


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def quick_measurement(monkeypatch):
    """Measuring takes seconds; where the numbers do not matter the table's stand in."""
    monkeypatch.setattr(latency, "compare", lambda table, arch: {
        "predicted_ms": table.predict_ms(arch), "measured_ms": table.predict_ms(arch), "p10_ms": 1.0, "p90_ms": 1.0,
        "bursts": 1, "runs": 1, "slowdown": 1.0})


SMALL = ["--size", "16", "--train-images", "60", "--val-images", "10", "--epochs", "2", "--batch-size", "8"]


def write_table(path, **options):
    models.write_json(path, fake_table(**{"size": 16, **options}))
    return str(path)


def test_an_alpha_that_is_undecided_or_collapsed_is_reported():
    supernet = models.SuperNet("cnas", 4, 10)
    undecided = search.decisions(supernet)
    assert all(block == {"entropy": 1.0, "margin": 0.0} for block in undecided)
    assert "undecided in 18 of 18 blocks" in search.judge_alpha(undecided, ["k3-e3", "k5-e3"] * 9)[0]
    set_alpha(supernet, torch.tensor([[0.0, 9.0, 0.0, 0.0]] * 18))
    collapsed = search.decisions(supernet)
    assert all(block["entropy"] < 0.1 and block["margin"] > 0.9 for block in collapsed)
    assert "every block prefers k3-e6" in search.judge_alpha(collapsed, ["k3-e6"] * 18)[0]
    assert search.judge_alpha(collapsed, ["k3-e6", "k5-e3"] * 9) == []


def test_pairs_cannot_be_searched(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        search.main(["--target", "3", "--data", "digit-pairs", "--train-images", "8", "--val-images", "2", "--output-dir",
                     str(tmp_path / "a")])
    assert stopped.value.code == 2 and "has two digits in each image" in capsys.readouterr().err


@pytest.mark.parametrize("flags, model", ((["--depth", "learned"], "dcnas"), (["--strategy", "random", "--seed", "4"], "dcnas"),
                                          (["--model", "dcnas-seq"], "dcnas-seq"),
                                          (["--model", "dnas", "--depth", "learned"], "dnas")))
def test_other_searches_find_a_network_within_the_target(flags, model, tmp_path, capsys, quick_measurement):
    table = write_table(tmp_path / "t.json")
    target = {"dcnas": 2.5, "dcnas-seq": 4.5, "dnas": 1.7}[model]
    search.main(["--target", str(target), "--table", table, "--output-dir", str(tmp_path / "a"), *SMALL, *flags])
    record = models.load_record(tmp_path / "a" / "arch.json")
    network = models.build_network(record)
    assert record["model"] == model and 0.9 * target < record["latency"]["predicted_ms"] <= target
    assert network(torch.rand(2, 3, 16, 16))._fields == ("image", "logits")
    log = tmp_path / "a" / "log.jsonl"
    assert log.exists() == ("random" not in flags)
    if "learned" in flags:
        assert [len(beta) for beta in json.loads(log.read_text().splitlines()[-1])["beta"]] == [2, 3, 4, 4, 4]


def test_a_learned_depth_that_is_too_small_for_the_target_is_said(tmp_path, capsys, quick_measurement):
    table = write_table(tmp_path / "t.json")
    search.main(["--target", "2.57", "--table", table, "--output-dir", str(tmp_path / "a"), "--model", "dnas", "--depth",
                 "learned", *SMALL])
    out = capsys.readouterr().out
    assert "note: the learned depth keeps" in out and "at their widest" in out


def test_random_networks_have_random_depths(tmp_path, quick_measurement):
    table, depths = write_table(tmp_path / "t.json"), set()
    for seed in range(4):
        search.main(["--target", "2.5", "--table", table, "--output-dir", str(tmp_path / "a"), "--strategy", "random", "--depth",
                     "learned", *SMALL, "--seed", str(seed)])
        depths.add(len(models.load_record(tmp_path / "a" / "arch.json")["blocks"]))
    assert len(depths) > 1 and max(depths) > 8


def test_random_networks_follow_their_seed(tmp_path, quick_measurement):
    table, archs = write_table(tmp_path / "t.json"), []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        search.main(["--target", "2.5", "--table", table, "--output-dir", str(tmp_path / name), "--strategy", "random", *SMALL,
                     "--seed", seed])
        archs.append(models.Arch.from_dict(models.load_record(tmp_path / name / "arch.json")))
    assert archs[0] == archs[1] != archs[2]


def test_same_seed_and_table_give_the_same_architecture_in_the_record(tmp_path, capsys, quick_measurement):
    table = write_table(tmp_path / "t.json")
    archs = []
    for name in ("a", "b"):
        search.main(["--target", "2.5", "--table", table, "--output-dir", str(tmp_path / name), *SMALL])
        record = models.load_record(tmp_path / name / "arch.json")
        archs.append(models.Arch.from_dict(record))
    assert archs[0] == archs[1]
    first = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[-1])
    second = json.loads((tmp_path / "b" / "log.jsonl").read_text().splitlines()[-1])
    assert first["alpha"] == second["alpha"]
    assert archs[0].model == "dcnas" and archs[0].num_classes == 10
    found = record["latency"]
    assert found["target_ms"] == 2.5 and found["table_hash"] == latency.load_table(table).hash
    assert found["measured_ms"] > 0 and found["predicted_ms"] > 0 and found["setting"]["size"] == 16
    out = capsys.readouterr().out
    assert "python train.py --arch" in out and "target 2.5 ms, predicted" in out
    assert (tmp_path / "a" / "search.pt").is_file()


def test_derive_corrects_the_table_by_what_it_measures_only_where_it_may(monkeypatch):
    """The device takes 10 % longer than the table says, whatever the network."""
    def compare(table, arch):
        return {"predicted_ms": table.predict_ms(arch), "measured_ms": 1.1 * table.predict_ms(arch) / table.correction,
                "p10_ms": 1, "p90_ms": 1, "bursts": 1, "runs": 1, "slowdown": 1.0}
    monkeypatch.setattr(latency, "compare", compare)
    supernet, budget = make(target=2.5)
    table = budget.table
    first, result = search.derive(supernet, budget, pressure=True, correct=False)
    assert result["predicted_ms"] == pytest.approx(2.5, rel=0.01) and result["measured_ms"] == pytest.approx(2.75, rel=0.01)
    assert search.derive(supernet, budget, pressure=True, correct=False)[0] == first and budget.table is table
    _, result = search.derive(supernet, budget, pressure=True, correct=True)
    assert result["measured_ms"] == pytest.approx(2.5, rel=0.02) and budget.table.correction == pytest.approx(1.1)
    assert budget.table.hash != table.hash
    # the corrected table, as it goes to disk, gives the same network at once
    again, result = search.derive(supernet, budget, pressure=True, correct=False)
    assert result["measured_ms"] == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize("model, loss", [("cnas", "cls"), ("dnas", "cls"), ("dnas", "den"), ("dcnas", "both")])
def test_every_model_and_loss_runs_and_exports(model, loss, tmp_path, quick_measurement):
    table = write_table(tmp_path / "t.json")
    search.main(["--target", "2.5", "--model", model, "--search-loss", loss, "--search-images", "clean", "--table", table,
                 "--output-dir", str(tmp_path / "run"), *SMALL])
    arch = models.Arch.from_dict(models.load_record(tmp_path / "run" / "arch.json"))
    assert arch.model == model and arch.num_classes == (0 if model == "dnas" else 10)


def test_a_target_above_the_slowest_goes_on_without_pressure_and_is_measured(tmp_path, capsys):
    search.main(["--target", "1000", "--table", write_table(tmp_path / "t.json"), "--output-dir", str(tmp_path / "run"),
                 *SMALL])
    assert "without pressure" in capsys.readouterr().out
    found = models.load_record(tmp_path / "run" / "arch.json")["latency"]
    assert found["p10_ms"] <= found["measured_ms"] <= found["p90_ms"] and found["runs"] >= 50 and found["slowdown"] > 0


def sentence(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        search.main(argv)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert caught.value.code == 2 and "Traceback" not in captured.err and lines[-1].startswith("search.py: error: ")
    assert len(lines) <= 2  # a line of usage at most
    return lines[-1]


def test_wrong_usage_ends_in_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "t.json")
    assert "--target" in sentence([], capsys)
    for target in ("0", "-3", "nan", "x", "inf"):
        assert "--target" in sentence(["--target", target], capsys)
    below = sentence(["--target", "0.01", "--table", table, *SMALL], capsys)
    assert "below the fastest" in below and "python search.py --target" in below
    works = float(below.split("python search.py --target ")[1].split()[0])
    assert works > float(below.split(" takes ")[1].split(" to ")[0])
    assert "latency.py" in sentence(["--target", "5", "--table", "missing.json", *SMALL], capsys)
    (tmp_path / "bad.json").write_text('{"format": "joint-lat')
    assert "bad.json" in sentence(["--target", "5", "--table", "bad.json", *SMALL], capsys)
    other = fake_table(size=16)
    other["version"] = 7
    models.write_json(tmp_path / "v.json", other)
    assert "version 7" in sentence(["--target", "5", "--table", "v.json", *SMALL], capsys)
    other = fake_table(size=16)
    other["setting"]["device"] = "a phone"
    models.write_json(tmp_path / "phone.json", other)
    message = sentence(["--target", "5", "--table", "phone.json", *SMALL], capsys)
    assert "a phone" in message and "python latency.py" in message
    assert "does not cover" in sentence(["--target", "5", "--table", table, "--space", "8", *SMALL], capsys)
    assert "nowhere" in sentence(["--target", "5", "--data", "nowhere"], capsys)
    assert "--search-loss" in sentence(["--target", "5", "--model", "cnas", "--search-loss", "both", *SMALL], capsys)
    assert "too few" in sentence(["--target", "5", "--train-images", "2", "--table", table], capsys)
    (tmp_path / "file").write_text("")
    beside = ["--target", "2.5", "--table", table, "--output-dir", "file/x", *SMALL]
    assert "file/x cannot be made" in sentence(beside, capsys)
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_the_suggested_command_keeps_the_other_flags():
    command = search._with_target(["--target", "1", "--data", "my photos", "--model=dnas"], "4.2")
    assert command == "python search.py --target 4.2 --data 'my photos' --model=dnas"


def test_several_targets_are_searched_with_one_table_and_compared(tmp_path, capsys, quick_measurement):
    table = write_table(tmp_path / "t.json")
    search.main(["--target", "2.6,3", "--table", table, "--output-dir", str(tmp_path / "family"), *SMALL])
    records = [models.load_record(tmp_path / "family" / f"target_{name}" / "arch.json") for name in ("2.6", "3")]
    for record, target in zip(records, (2.6, 3.0)):
        assert record["latency"]["target_ms"] == target and 0.99 * target <= record["latency"]["predicted_ms"] <= target
    out = capsys.readouterr().out.splitlines()
    assert out[-3].split()[0] == "target" and "target_2.6/arch.json" in out[-2] and "target_3/arch.json" in out[-1]
    alone = tmp_path / "alone"
    search.main(["--target", "3", "--table", table, "--output-dir", str(alone), *SMALL])
    assert models.Arch.from_dict(models.load_record(alone / "arch.json")) == models.Arch.from_dict(records[1])
    message = sentence(["--target", "2,0.001", "--table", table, "--output-dir", str(tmp_path / "none"), *SMALL], capsys)
    assert "below the fastest" in message and not (tmp_path / "none").exists()


def test_alpha_picture_is_optional(tmp_path, monkeypatch):
    rows = [{"epoch": e, "alpha": [[0.25] * 4] * 18} for e in (1, 2)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert search.plot_alpha(rows, ["a", "b", "c", "d"], tmp_path / "alpha.png") is False
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert search.plot_alpha(rows, ["a", "b", "c", "d"], tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").stat().st_size > 1000


def test_resuming_with_other_settings_is_refused(tmp_path, capsys, quick_measurement):
    table, run = write_table(tmp_path / "t.json"), str(tmp_path / "run")
    search.main(["--target", "2.5", "--table", table, "--output-dir", run, *SMALL])
    for flags in (["--epochs", "3"], ["--seed", "1"], ["--target", "3"], ["--lr", "0.1"]):
        message = sentence(["--resume", run, *flags], capsys)
        assert flags[0] in message and "keeps its settings" in message
    search.main(["--resume", run])  # a finished search: derived again, nothing trained
    assert "python train.py" in capsys.readouterr().out


def test_a_table_made_before_or_not_the_weights_start_the_same(tmp_path, monkeypatch, quick_measurement):
    def build(setting, **_):
        torch.rand(5)  # as building does
        return fake_table(4, size=16)
    monkeypatch.setattr(latency, "build_table", build)
    logs = []
    for name, flags in (("made", []), ("given", ["--table", write_table(tmp_path / "t.json")])):
        search.main(["--target", "2.5", "--output-dir", str(tmp_path / name), *SMALL, *flags])
        logs.append(json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]))
    assert logs[0]["weight_loss"] == logs[1]["weight_loss"]


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import benchmark, search, train, eval, latency, data, models"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "") and not list(tmp_path.iterdir())
