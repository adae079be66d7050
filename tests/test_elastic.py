"""elastic.py: the wide space, its costs, sub-networks, steps, and the comparison of networks."""

import json
import random
import statistics

import pytest
import torch
import torch.nn.functional as F

import elastic
import files
import latency
import models
import search
import train
from fake_table import fake_wide, quick_compare, quick_elastic, stopped_after

CPU = torch.device("cpu")
SMALL = elastic.Space(3, scale=0.5)
SEARCH = ["--strategy", "evolution", "--size", "32", "--epochs", "2", "--device", "cpu", "--threads", "1",
          "--train-images", "40", "--batch-size", "8"]


def costs_of(space=SMALL, dear=""):
    table = latency.Table(fake_wide(space.num_classes, dear=dear))
    return table.costs, table.rest([space.model])


def command(*arguments):
    search.main([str(argument) for argument in arguments])


@pytest.fixture
def quick(monkeypatch):
    """Few networks are compared, and a measurement takes few runs."""
    quick_elastic(monkeypatch)
    quick_compare(monkeypatch)


@pytest.fixture
def table(tmp_path):
    files.write_json(tmp_path / "table.json", fake_wide())
    return tmp_path / "table.json"


# --- The space and its costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ("dcnas", "cnas", "dnas"))
def test_every_choice_is_a_network_whose_record_means_the_same(model):
    space, rng = elastic.Space(3, model, 0.75), random.Random(0)
    known = elastic.Space(3).possible_parts()
    for choices in (space.smallest(), space.largest(), *(space.random_choices(rng) for _ in range(20))):
        arch = space.arch(choices)
        record = json.loads(json.dumps(elastic.record_content(arch)))
        assert elastic.design_of(record) == arch and arch.model == model
        assert {part for piece in elastic.pieces_of(arch) for part in elastic.amounts(piece)} <= known
    image, logits = models.make_network(arch)(torch.rand(2, 3, 33, 47))
    assert (image is None) == (model == "cnas") and (logits is None) == (model == "dnas")


def test_a_network_costs_more_for_each_dearer_option():
    costs, rest = costs_of()
    costs = {part: ms * (part.unit != "residual") for part, ms in costs.items()}  # another width has none
    within = elastic.Within(SMALL, costs, rest, 1.0)
    choices = SMALL.random_choices(random.Random(3))
    for by in (1, -1):
        for place, decision in enumerate(SMALL.decisions):
            other = within.step(choices, place, by)
            assert other is None or not decision.name.endswith("operation")
            assert other is None or by * (within.cost(other) - within.cost(choices)) >= -1e-12, decision.name


def test_positive_least_squares():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(40, 6, generator=generator, dtype=torch.float64)
    truth = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    assert torch.allclose(elastic.positive_least_squares(matrix, matrix @ truth), truth, atol=1e-3)
    worse = matrix @ (truth - torch.tensor([2.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    assert elastic.positive_least_squares(matrix, worse)[0] == 0


def test_a_table_is_fitted_to_times_of_pieces_and_networks():
    """Pieces take 1.25 times as long as in their networks, and 10 us more; weights cost besides."""
    space, rng = elastic.Space(3), random.Random(0)
    truth = {part: rng.uniform(0.005, 0.05) for part in sorted(space.possible_parts())}
    designs, others = ([space.random_design(rng) for _ in range(count)] for count in (80, 30))
    samples = {piece: [1.25 * space.piece_cost(piece, truth) + 0.01] for design in designs
               for piece in elastic.pieces_of(design)}
    ms = lambda design: space.cost(design, truth, 0.3)
    costs, rest = space.fit_costs(samples, [(design, ms(design)) for design in designs])
    assert min(costs.values()) >= 0 and rest.keys() == {"dcnas"}
    errors = [abs(space.cost(design, costs, rest["dcnas"]) / ms(design) - 1) for design in others]
    assert statistics.median(errors) < 0.02 and max(errors) < 0.1


def test_the_scale_follows_the_largest_target():
    costs, rest = costs_of()
    targets = [4.0, 8.0]
    spaces = [SMALL.scaled_to(costs, rest, [target]) for target in targets]
    assert spaces[0].scale < spaces[1].scale == SMALL.scaled_to(costs, rest, targets).scale
    rng = random.Random(5)
    dearer = [spaces[1].cost(spaces[1].arch(spaces[1].random_choices(rng)), costs, rest) > 8.0
              for _ in range(200)]
    assert 0 < statistics.fmean(dearer) < 0.15
    with pytest.raises(ValueError, match="search for 0.0001 ms alone"):
        SMALL.scaled_to(costs, rest, [0.0001, 40.0])


# --- The supernet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, grey", (("dcnas", False), ("cnas", False), ("dnas", False), ("dcnas", True)))
def test_every_sub_network_equals_the_exported_one_with_its_weights(model, grey):
    space, rng = elastic.Space(3, model, 0.5, grey), random.Random(1)
    supernet, images = elastic.SuperNet(space), torch.rand(2, space.channels, 32, 32)
    with torch.no_grad():  # also what is 0 or 1 in a fresh network
        for weight in supernet.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    ends = [space.smallest(), space.largest(), space.uniform(9, 9, 0, 9, 9)]
    for choices in ends + [space.random_choices(rng) for _ in range(8)]:
        arch = space.arch(choices)
        network = models.make_network(arch)
        lacking = network.load_state_dict(supernet.slices(arch), strict=False)
        assert not lacking.unexpected_keys
        assert all("running" in name or "num_batches" in name for name in lacking.missing_keys)
        for ours, exported in zip(supernet(images, arch), network.train()(images)):
            assert ours is exported is None or torch.equal(ours, exported)


def test_slices_are_the_first_channels_blocks_and_sources_and_the_centre_of_kernels():
    supernet = elastic.SuperNet(SMALL)
    largest, arch = SMALL.arch(SMALL.largest()), SMALL.arch(SMALL.uniform(0, 0, 0, 0))
    whole, own = supernet.slices(largest), supernet.slices(arch)
    name = "encoder.2.0.depthwise.0.weight"
    assert torch.equal(own[name], whole[name][:len(own[name]), :own[name].shape[1], 1:4, 1:4])
    name = "decoder.levels.3.convs.0.0.weight"  # from below, from stage 2, the noisy image
    (below, skip), outputs = (arch.levels[3][0], arch.blocks[0].out_channels), len(own[name])
    wide = largest.levels[3][0], largest.blocks[0].out_channels
    places = [*range(below), *range(wide[0], wide[0] + skip), *range(sum(wide), sum(wide) + 12)]
    assert torch.equal(own[name], whole[name][:outputs, places])


@pytest.mark.parametrize("scale", (0.25, 1.0, 1.25, 3.0))
def test_a_fresh_supernet_has_finite_gradients_in_even_networks(scale):
    """The stem and stage 2 can have as many channels in the largest network, and not in others."""
    space = elastic.Space(3, scale=scale)
    supernet = elastic.SuperNet(space)
    schedule, (noisy, clean, labels) = steps_of(supernet)
    for width in range(3):
        supernet.zero_grad()
        arch = schedule._even(width)
        train.task_loss(supernet(noisy, arch), clean, labels, "both")[0].backward()
        norms = [weight.grad.norm() for weight in supernet.weight_parameters() if weight.grad is not None]
        assert 0 < max(norms) < 1e3


def steps_of(supernet, loss="both", **more):
    schedule = elastic.Schedule(supernet, None, steps=4, device=CPU, loss=loss, epochs=2, lr=1e-3, seed=0,
                                prefer=0.5, **more)
    images = torch.rand(4, 3, 32, 32)
    batch = images + 0.1 * torch.randn(images.shape), images, torch.tensor([0, 1, 2, 0])
    return schedule, batch


def test_even_networks_learn_first_then_the_others_with_the_largest():
    supernet = elastic.SuperNet(SMALL)
    schedule, batch = steps_of(supernet, warmup_epochs=1)
    schedule.begin_epoch(0, 0)
    assert schedule.step(batch, 0, None, "").keys() == {"weight_loss"}
    sizes, forward = [], supernet.forward
    supernet.forward = lambda images, arch: sizes.append(images.shape[-1]) or forward(images, arch)
    large = *(F.interpolate(images, scale_factor=3) for images in batch[:2]), batch[2]
    for given in (batch, large):  # half the size, where that leaves a pixel of the last stage
        schedule.step(given, 0, None, "")
    schedule.warm = False
    schedule.step(large, 3, None, "")
    schedule.warm, supernet.forward = True, forward
    assert sizes == [32, 48, 96, 96]
    shares = {name: options for name, options in SMALL.decisions if name.endswith(" width")}
    drawn = [schedule.networks(0)[0][0] for _ in range(12)]
    widths = {(*(width for width, _ in arch.levels), arch.blocks[-1].out_channels) for arch in drawn}
    options = [shares[f"{place} width"] for place in ("level 4", "level 3", "level 2", "level 1", "stage 8")]
    assert widths <= {tuple(each[min(index, len(each) - 1)] for each in options) for index in range(3)}
    assert len(widths) > 1 and len({len(arch.blocks) for arch in drawn}) > 1
    schedule.begin_epoch(1, 0)
    assert schedule.step(batch, 0, None, "").keys() == {"weight_loss", "others_loss"}
    assert schedule.step(batch, 1, None, "").keys() == {"others_loss"}
    assert schedule.networks(3)[1] == (SMALL.arch(SMALL.smallest()), False)
    drawn = {tuple(block.kernel_size for block in schedule._even(elastic.LAST).blocks) for _ in range(5)}
    assert len(drawn) > 1 and schedule._even(elastic.LAST).levels == SMALL.arch(SMALL.largest()).levels


def test_others_learn_the_images_and_logits_of_the_largest():
    """With what the largest answers as the truth, that part of the loss is the loss against the truth."""
    supernet = elastic.SuperNet(SMALL)
    schedule, batch = steps_of(supernet)
    arch, gradients = SMALL.arch(SMALL.smallest()), []
    _, answer = schedule._backward(batch, SMALL.arch(SMALL.largest()), None)
    for taught in (None, answer):
        supernet.zero_grad()
        schedule._backward(batch, arch, taught)
        gradients.append(supernet.weights["stem/0/weight"].grad.clone())
    assert not torch.allclose(*gradients)
    supernet.zero_grad()
    schedule.TAUGHT = 0.0
    schedule._backward(batch, arch, answer)
    assert torch.equal(supernet.weights["stem/0/weight"].grad, gradients[0])


def test_a_step_needs_little_more_memory_than_one_of_the_largest_network():
    class Held:
        def __init__(self, tensor):
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            now[0] += self.size
            now[1] = max(now)

        def __del__(self):
            now[0] -= self.size

    def peak(step):
        now[:] = [0, 0]
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            step()
        return now[1]

    now, supernet = [0, 0], elastic.SuperNet(SMALL)
    schedule, batch = steps_of(supernet, warmup_epochs=0)
    schedule.begin_epoch(0, 0)
    network = models.make_network(schedule._even(elastic.LAST)).train()
    alone = peak(lambda: train.task_loss(network(batch[0]), *batch[1:], "both")[0].backward())
    assert peak(lambda: schedule.step(batch, 0, None, "")) < 1.5 * alone


# --- The comparison ----------------------------------------------------------------------------------------


class Taste(elastic.Comparison):
    """A comparison by a function of the choices."""

    def __init__(self, supernet, taste):
        super().__init__(supernet, [], "den", 0.5, CPU, "off")
        self.taste = taste

    def measure(self, choices):
        self.losses[choices] = {"den": self.taste(choices)}


@pytest.mark.parametrize("dear, decision", (
    ("stage 5 block", "stage 5 depth"), ("stage 7 block", "stage 7 depth"), ("head values", "head"),
    ("stem values", "stem"), ("convolution 3x3 1", "level 1 convolutions"), ("decoder branch", "branch")))
def test_a_table_steers_depth_widths_decoder_and_branch(dear, decision, monkeypatch):
    """Where a unit of cost is dear, the cheapest option of what needs it is taken; else not."""
    for name, value in {"ROUNDS": 3, "DRAWN": 12, "SPREAD": 0, "TRIES": 50}.items():
        monkeypatch.setattr(elastic, name, value)
    space = elastic.Space(3)
    supernet = elastic.SuperNet.__new__(elastic.SuperNet)
    torch.nn.Module.__init__(supernet)
    supernet.space, supernet.seed = space, 0
    place = [one.name for one in space.decisions].index(decision)
    middle, taken = space.uniform(1, 1, 0, 1, 2), {}
    without = (*middle[:place], 0, *middle[place + 1:])
    for name, design in (("", middle), (dear, without)):
        costs, rest = costs_of(space, name)
        target = 1.02 * space.cost(space.arch(design), costs, rest)
        supernet.compare = Taste(supernet, lambda choices: -choices[place] - 1e-3 * sum(choices))
        within = elastic.Within(space, costs, rest, target)
        choices = elastic.search(supernet, within)
        assert 0.9 * target <= within.cost(choices) <= target
        taken[name] = choices[place]
    cheap = 1 if decision == "branch" else 0  # a gate
    assert taken[dear] <= cheap < taken[""]


def test_a_linear_taste_is_predicted_and_found():
    supernet = elastic.SuperNet(SMALL)
    rng = random.Random(0)
    weights = [rng.gauss(0, 1) for _ in SMALL.decisions]
    taste = lambda choices: sum(weight * index for weight, index in zip(weights, choices))
    scores = {choices: taste(choices) for choices in (SMALL.random_choices(rng) for _ in range(400))}
    others = [SMALL.random_choices(rng) for _ in range(50)]
    guesses = elastic.predictor(SMALL, scores)(others)
    pairs = [(guesses[a] - guesses[b]) * (taste(others[a]) - taste(others[b])) > 0
             for a in range(50) for b in range(a)]
    assert statistics.fmean(pairs) > 0.75
    costs, rest = costs_of()
    within = elastic.Within(SMALL, costs, rest, SMALL.cost(SMALL.arch(others[0]), costs, rest))
    supernet.compare = Taste(supernet, taste)
    found = elastic.search(supernet, within)
    drawn = [taste(within.draw(random.Random(seed))) for seed in range(40)]
    assert taste(found) < min(drawn)


def test_what_the_user_prefers_decides():
    compare = elastic.Comparison(None, [], "both", 0.8, CPU, "off")
    compare.losses = {(0,): {"ce": 1.0, "den": 0.02}, (1,): {"ce": 2.0, "den": 0.01}}
    assert min(compare.scores(), key=compare.scores().get) == (0,)
    compare.share = 0.2
    assert min(compare.scores(), key=compare.scores().get) == (1,)
    assert elastic.preference("denoising") < elastic.preference("balanced") == 0.5
    assert elastic.preference("0.3") == 0.3
    with pytest.raises(Exception, match="from 0 to 1"):
        elastic.preference("3")


def test_the_class_is_compared_on_all_images_and_the_picture_on_the_first_batches():
    supernet, choices = elastic.SuperNet(SMALL), SMALL.random_choices(random.Random(1))
    labels = torch.tensor([0, 1, 2, 0])
    batches = [(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32), labels) for _ in "abc"]
    compare = elastic.Comparison(supernet, batches, "both", 0.5, CPU, "off")
    compare.measure(choices)
    with torch.no_grad():
        alone = [train.task_loss(supernet(noisy, SMALL.arch(choices)), clean, labels, "both", 0.0)[1]
                 for noisy, clean, labels in batches]
    losses = compare.losses[choices]
    first = [float(parts["den"]) for parts in alone[:elastic.DENOISED]]
    assert losses["den"] == pytest.approx(statistics.fmean(first), rel=1e-5)
    assert losses["ce"] == pytest.approx(statistics.fmean(float(parts["ce"]) for parts in alone), rel=1e-5)


def test_random_networks_are_near_the_target_and_follow_their_seed():
    costs, rest = costs_of()
    target = SMALL.cost(SMALL.arch(SMALL.uniform(1, 0, 0, 1)), costs, rest)
    supernet, found = elastic.SuperNet(SMALL), []
    for seed in (0, 1, 0):
        supernet.draw_random(seed)
        found.append(supernet.fit(costs, rest, target))
    assert found[0] == found[2] != found[1]
    assert all(0.97 * target <= SMALL.cost(arch, costs, rest) <= target for arch in found)


def test_an_export_has_the_weights_and_calibrated_norms():
    supernet, images = elastic.SuperNet(SMALL), torch.rand(8, 3, 32, 32)
    arch = SMALL.arch(SMALL.uniform(1, 1, 1, 1))
    assert supernet.export(arch) is None
    supernet.compare = elastic.Comparison(supernet, [(images, images, None)], "both", 0.5, CPU, "off")
    network = supernet.export(arch)
    norm, count = network.stem[1], images[0, 0].numel() / 4 * len(images)
    inner = network.stem[0](network.stem.maps((images - network.mean) / network.std))
    assert torch.allclose(norm.running_mean, inner.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, inner.var((0, 2, 3)), rtol=1e-3) and count > 1
    assert not network.training and norm.momentum == 0.1


# --- The command -------------------------------------------------------------------------------------------


def test_one_supernet_serves_all_targets_and_is_asked_again(quick, table, tmp_path, capsys):
    command(*SEARCH, "--target", "2,3", "--table", table, "--output-dir", tmp_path / "s")
    printed = capsys.readouterr().out
    assert printed.count("epoch   2/2") == 1 and "target_3" in printed
    records = [files.load_record(tmp_path / f"s/target_{target}/arch.json") for target in (2, 3)]
    for record, target in zip(records, (2, 3)):
        assert record["method"] == "elastic" and 0.9 * target < record["latency"]["predicted_ms"] <= target
    compared = json.loads((tmp_path / "s/target_2/compared.json").read_text())["networks"]
    assert sum(row["spread"] for row in compared) == 3 and {"ce", "den", "ms", "blocks"} <= compared[0].keys()
    before = (tmp_path / "s/log.jsonl").read_text()
    command("--resume", tmp_path / "s", "--target", "2.5", "--prefer", "denoising")
    assert 2.2 < files.load_record(tmp_path / "s/arch.json")["latency"]["predicted_ms"] <= 2.5
    assert (tmp_path / "s/log.jsonl").read_text() == before
    command("--resume", tmp_path / "s", "--target", "100000")
    assert "every network meets it" in capsys.readouterr().out
    command("--resume", tmp_path / "s", "--target", "2,3")
    assert not (tmp_path / "s/target_3/search.pt").exists()  # that of the supernet lies above
    with pytest.raises(SystemExit):
        command("--resume", tmp_path / "s", "--lr", "0.1")
    assert "--lr differ" in capsys.readouterr().err


def test_the_same_seed_and_table_find_the_same_and_its_weights_are_trained_on(quick, table, tmp_path, capsys):
    for name in ("a", "b"):
        command(*SEARCH, "--target", "2", "--table", table, "--output-dir", tmp_path / name)
    one, other = (files.load_record(tmp_path / name / "arch.json") for name in ("a", "b"))
    assert one["blocks"] == other["blocks"] and one["levels"] == other["levels"]
    network, content = files.load_checkpoint(tmp_path / "a/distilled.pt", CPU)
    assert content["loss"] == "both" and len(content["classes"]) == 10
    assert network(torch.rand(1, 3, 32, 32)).logits.shape == (1, 10)
    flags = ["--arch", str(tmp_path / "a/arch.json"), "--train-images", "8", "--val-images", "8",
             "--batch-size", "4", "--epochs", "1", "--lr", "1e-8", "--weight-decay", "0", "--device", "cpu",
             "--threads", "1", "--output-dir", str(tmp_path / "t")]
    for more, begins_there in (([], True), (["--from-scratch"], False)):
        train.main([*flags, *more])
        trained, _ = files.load_checkpoint(tmp_path / "t/best.pt", CPU)
        same = [torch.allclose(one, other, atol=1e-5)
                for one, other in zip(trained.parameters(), network.parameters()) if one.ndim == 4]
        assert all(same) == begins_there
        assert ("It begins with the weights in" in capsys.readouterr().out) == begins_there
    (tmp_path / "a/distilled.pt").unlink()
    train.main(flags)
    assert "is not there, so that the training begins from scratch" in capsys.readouterr().out


@pytest.mark.parametrize("steps", (2, 5))  # of six; the first three train the largest only
def test_a_stopped_search_goes_on_to_the_last_bit(steps, quick, table, tmp_path, monkeypatch):
    flags = [*SEARCH, "--target", "2", "--table", table, "--warmup-epochs", "1"]
    command(*flags, "--output-dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_after(patch, steps)
        with pytest.raises(SystemExit):
            command(*flags, "--output-dir", tmp_path / "part")
    command("--resume", tmp_path / "part")
    whole, part = (files.read_checkpoint(tmp_path / name / "search.pt")["searcher"]["supernet"]
                   for name in ("whole", "part"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
    one, other = (files.load_record(tmp_path / name / "arch.json") for name in ("whole", "part"))
    assert one["blocks"] == other["blocks"]


@pytest.mark.parametrize("model", ("cnas", "dnas"))
def test_the_other_models_too(model, quick, table, tmp_path):
    command(*SEARCH, "--model", model, "--target", "1.5", "--table", table, "--output-dir", tmp_path)
    record = files.load_record(tmp_path / "arch.json")
    assert record["model"] == model and record["latency"]["predicted_ms"] <= 1.5


@pytest.mark.parametrize("flags, message", (
    (["--target", "0.0001"], "below the cheapest network"),
    (["--target", "2", "--space", "5"], "--space"),
    (["--target", "2", "--prefer", "both"], "--prefer"),
    (["--target", "2", "--depth", "fixed"], "--depth is for --space 4, 6, 8; leave it out, or name one"),
    ([], "name the latency you want")))
def test_wrong_flags_are_refused_in_a_sentence(flags, message, table, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*SEARCH, *flags, *(["--table", table] if flags else []), "--output-dir", tmp_path)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error


def test_the_papers_spaces_are_tfnas_and_the_wide_one_is_not():
    assert search.method_of("dcnas", {"space": 6}).__name__ == "tfnas"
    assert search.method_of("dcnas", {"strategy": "gradient"}).__name__ == "tfnas"
    assert search.method_of("dcnas-seq", {}).__name__ == "tfnas"
    assert search.method_of("dcnas", {"space": "wide", "strategy": "random"}).__name__ == "elastic"
    assert search.method_of("hinas", {}).__name__ == "hinas"
