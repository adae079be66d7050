"""baselines.py: FLOPs and parameters of papers, cut-outs, and all commands with a model added in one line."""

import json

import pytest
import torch
from torch import nn

import baselines
import eval as evaluation
import files
import latency
import models
import registry
import train
from models import Output

SMALL = 0.05  # UNet-S and the reduced DC-Nets: the paper's own numbers fit no canvas to 1 %


def build(name, num_classes=10):
    return registry.find_named(name).build(num_classes)


@pytest.mark.parametrize("name", [name for name, entry in registry.NAMED.items() if entry.flops])
def test_flops_are_those_of_the_paper(name):
    entry = registry.NAMED[name]
    counted = baselines.paper_flops(entry.build(10), entry.size)
    bound = SMALL if name in ("unet-s", "dcnet-s", "dcnet-s-seq") else 0.01
    assert counted == pytest.approx(entry.flops, rel=bound)


@pytest.mark.parametrize("name, counted", (("conv-l", 447_090), ("mb1-s", 177_012), ("mb4-l", 423_972)))
def test_flops_of_classifiers_by_hand(name, counted):
    """conv-l: 784 * (9 + 1) * 10 + 196 * 4 * 10 + 196 * (90 + 1) * 20 + 49 * 4 * 20 + (20 + 1) * 10."""
    assert baselines.paper_flops(build(name), 28) == counted


@pytest.mark.parametrize("name, parameters", (
    ("lpienet-0.25x", 10_784), ("lpienet-0.5x", 36_252), ("lpienet", 133_652),
    ("efficientnet-v2-b0", 7_139_704), ("efficientnet-v2-b1", 8_141_052), ("resnet18", 11_689_512),
    ("dncnn", 669_379), ("dncnn-grey", 640 + 15 * (64 * 64 * 9 + 128) + 577), ("ircnn", 188_163),
    ("ffdnet", 852_108), ("drunet", 32_640_960), ("nafnet-32", 29_159_715)))
def test_parameters_are_the_published_ones(name, parameters):
    assert models.count_parameters(build(name, 1000)) == parameters


@pytest.mark.parametrize("name", (*registry.NAMED, "unet-b4-d3-m1.5-c1", "unet-b4-d2-m2-c2-mb"))
def test_every_baseline_takes_any_size_and_trains(name):
    if name in ("unet-original", "nafnet-32"):
        pytest.skip("30 million parameters, and the code is that of others here")
    torch.manual_seed(0)
    network = build(name, 7)
    images = torch.rand(2, models.channels_of(network), 45, 61)
    if name in ("ircnn", "ffdnet", "drunet", "nafnet-16"):
        assert network(images[..., :5, :7]).image.shape == (2, 3, 5, 7)
    output = network(images)
    assert (output.image is not None) == network.denoises
    assert (output.logits is not None) == network.classifies
    if network.denoises:
        assert output.image.shape == images.shape
    if network.classifies:
        assert output.logits.shape == (2, 7)
    sum(part.square().mean() for part in output if part is not None).backward()
    idle = [n for n, p in network.named_parameters() if p.grad is None]
    assert not idle


@pytest.mark.parametrize("name, left", (("unet-s", 0), ("dncnn", 0), ("dcnet-s-tail", 0), ("mobilenet-v2", 0),
                                        ("resnet18", 17)))
def test_folded_baselines_compute_the_same(name, left):
    """`left`: the batch norms that do not stand behind their convolution in a Sequential."""
    torch.manual_seed(0)
    network = build(name, 5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    folded, x = latency.fast(network), torch.rand(2, 3, 64, 64)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left
    with torch.inference_mode():
        for ours, theirs in zip(folded(x), network.eval()(x)):
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_cut_out_at_full_resolution_is_the_pixels():
    x = torch.rand(2, 3, 40, 50)
    boxes = torch.tensor([[[3, 5, 31, 33], [20, 11, 48, 39]], [[0, 0, 28, 28], [22, 12, 50, 40]]])
    cut = models.cut_out(x, boxes, 28)
    for index, (left, top, right, bottom) in enumerate(boxes.flatten(0, 1).tolist()):
        torch.testing.assert_close(cut[index], x[index // 2, :, top:bottom, left:right])


def test_a_cut_out_in_half_precision_is_of_the_right_image():
    """bfloat16 counts exactly to 256 only: the 300th image must not give the 298th one's pixels."""
    x = torch.arange(301).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).bfloat16()
    cut = models.cut_out(x, torch.tensor([[[0, 0, 2, 2]]]).expand(301, 1, 4), 2)
    assert cut.dtype == torch.bfloat16 and torch.equal(cut[:, 0, 0, 0], x[:, 0, 0, 0])


def test_a_cut_out_of_features_is_the_place_of_the_box():
    """A ramp, of which a map of stride 8 holds the values at its pixels' centres, cut between them."""
    centres = torch.arange(12) * 8 + 3.5  # pixel centres that a map pixel covers, on average
    features = centres.expand(1, 1, 12, 12)
    cut = models.cut_out(features, torch.tensor([[[10, 20, 38, 48]]]), 4, stride=8)
    expected = (10 + 7 * torch.arange(4) + 3.0).expand(4, 4)  # 28 pixels in four of 7
    torch.testing.assert_close(cut[0, 0], expected)


def test_boxes_decide_what_is_classified():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 96, 96)
    boxes = torch.tensor([[[0, 0, 28, 28], [60, 60, 88, 88]]] * 2)
    for name in ("conv-s", "dcnet-s", "dcnet-s-seq"):
        network = build(name).eval()
        logits = models.apply_network(network, images, boxes).logits
        assert logits.shape == (4, 10)
        swapped = models.apply_network(network, images, boxes.flip(1)).logits
        torch.testing.assert_close(swapped.view(2, 2, 10).flip(1).flatten(0, 1), logits)
    takes_no_boxes = build("unet-s")
    assert models.apply_network(takes_no_boxes, images, boxes).logits is None


def test_wrong_names_and_parameters():
    with pytest.raises(KeyError):
        build("unet-b8")
    with pytest.raises(ValueError, match="needs b, d and c of 1 or more"):
        models.UNet(0, 4, 2, 2)
    with pytest.raises(ValueError, match="no model named"):
        registry.build_network({"method": "named", "model": "nonsense", "num_classes": 3})
    with pytest.raises(ValueError, match="needs a model and num_classes"):
        registry.build_network({"method": "named", "model": "unet-s", "num_classes": "many"})


class Toy(nn.Module):
    denoises, classifies = True, True

    def __init__(self, num_classes):
        super().__init__()
        self.image, self.logits = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, num_classes)

    def forward(self, x):
        return Output(self.image(x), self.logits(x.mean((2, 3))))


def test_a_model_added_in_one_line_is_in_every_harness(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(registry.NAMED, "toy", registry.Named(Toy))
    trained, small = tmp_path / "train", ["--size", "24", "--train-images", "20", "--val-images", "10"]
    train.main(["--model", "toy", "--epochs", "1", "--batch-size", "10", *small,
                "--output-dir", str(trained)])
    evaluation.main(["--checkpoint", str(trained / "best.pt"), "--output-dir", str(tmp_path / "eval"),
                     "--sigmas", "0", "0.5", "--test-images", "10"])
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert metrics["means"]["all_levels"]["psnr_db"] > 0 and metrics["latency"]["median_ms"] > 0
    capsys.readouterr()
    latency.main(["--model", "toy", "--size", "24", "--device", "cpu", "--json"])
    assert json.loads(capsys.readouterr().out)["median_ms"] > 0
    monkeypatch.setattr(registry, "UNIFORM", {})
    monkeypatch.setattr(registry, "NAMED", {name: registry.NAMED[name] for name in ("unet-s", "toy")})
    registry.main(["--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["toy"]["parameters"] == 84 + 400


@pytest.mark.parametrize("arguments, message", (
    (["--model", "resnet18", "--data", "digit-pairs"], "classifies whole images"),
    (["--model", "nonsense"], "there is no model 'nonsense'"),
    (["--model", "unet-s", "--loss", "cls"], "does not fit this network"),
    (["--model", "unet-s", "--decoder", "mb"], "are for C-NAS"),
    (["--model", "conv-s", "--size", "11"], None),
    (["--model", "unet-b8-d8-m1-c2", "--size", "16"], None),
    (["--model", "dnas-k3-e3", "--train-as", "cnas"], "has no classifier"),
    (["--data", "digit-pairs", "--model", "dcnet-s", "--size", "40"], "two digits need images of 56 pixels"),
))
def test_what_does_not_fit_is_said_before_training(arguments, message, tmp_path, capsys):
    """None: unusual, but it works."""
    command = [*arguments, "--output-dir", str(tmp_path / "run"), "--train-images", "12", "--val-images", "4",
               "--epochs", "1", "--batch-size", "6"]
    if message is None:
        train.main(command)
        return
    with pytest.raises(SystemExit) as stopped:
        train.main(command)
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_network_that_cannot_take_the_size_says_so():
    network = nn.Sequential(nn.Conv2d(3, 4, 7))
    message = r"The model tiny cannot take images of 5x5 pixels \(.*\); try another --size"
    with pytest.raises(ValueError, match=message):
        registry.check_fits(network, "tiny", 5)


def test_the_study_recipe_sets_its_flags_and_each_can_be_given(tmp_path, capsys):
    train.main(["--model", "mb1-s", "--data", "digit-pairs", "--recipe", "study", "--epochs", "2",
                "--train-images", "40", "--val-images", "10", "--batch-size", "20",
                "--output-dir", str(tmp_path)])
    state = files.read_checkpoint(tmp_path / "last.pt")
    flags = state["flags"]
    assert (flags["schedule"], flags["sigma_levels"], flags["batch_size"]) == ("plateau", 11, 20)
    assert state["epoch"] == 2 and "num_bad_epochs" in state["schedule"]
    evaluation.main(["--checkpoint", str(tmp_path / "best.pt"), "--output-dir", str(tmp_path / "eval"),
                     "--test-images", "10", "--no-latency"])
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert metrics["images"] == 10 and metrics["labelled_images"] == 20
