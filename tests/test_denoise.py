"""denoise.py: large pictures in tiles, the self-ensemble, the user's own pictures through eval.py --input."""

import os
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.ops import SqueezeExcitation

import data
import denoise
import eval as evaluation
import files
import models
import registry
import weights


def smooth_picture(height, width):
    """Waves and noise, uint8 (1, 3, height, width)."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    waves = torch.stack([torch.sin(y / 37 + k) * torch.cos(x / 53 - k) for k in range(3)])
    picture = 0.5 + 0.3 * waves + 0.1 * torch.randn(3, height, width, generator=generator)
    return picture.clamp(0, 1).mul(255).byte()[None]


def make_network(name):
    """A network of random weights and statistics."""
    torch.manual_seed(0)
    if name == "lopsided":
        return Lopsided().eval()
    if name == "squeezed":  # D-NAS with squeeze-and-excitation in every block
        positions = models.searched_positions("dnas")
        arch = models.make_arch("dnas", [models.fill(p, models.Operation(3, 3, True)) for p in positions])
    else:
        arch = models.named_arch(name, 10)
    network = models.make_network(arch)
    network(torch.rand(4, 3, 64, 64))  # statistics of batch norms
    return network.eval()


class Lopsided(nn.Module):
    """A convolution that treats every direction differently; its classes look at the upper left corner."""

    denoises = classifies = True

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return models.Output(self.layer(x).sigmoid(), x[:, 0, :2, 0])


# --- Tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("dcnas-k3-e3", "squeezed", "dcnas-seq-k3-e3"))
def test_tiles_compute_what_the_whole_picture_does(name):
    """The margin covers what the encoder sees, so that only rounding is left."""
    network, picture, shares = make_network(name), smooth_picture(210 if name == "squeezed" else 410, 505), []
    kinds = SqueezeExcitation, models.NoiseLevel
    modules = [module for module in network.modules() if isinstance(module, kinds)]
    pools = [module.avgpool for module in modules]
    with torch.inference_mode():
        whole = network(data.to_float(picture, "cpu")).image.clamp(0, 1)
    if name == "dcnas-k3-e3":
        network.tail[0].register_forward_pre_hook(lambda *_: pytest.fail("the classifier ran in a tile"))
    tiled = denoise.denoise_tiled(network, picture, "cpu", 128, 256, shares.append).float() / 255
    assert (tiled - whole).abs().max() < 0.5 / 255 + 1e-3
    assert sum(shares) == pytest.approx(1) and shares[-1] == max(shares)
    assert name != "squeezed" or len(shares) == 8 * (len(pools) + 1)
    assert network.classifies == name.startswith("dcnas")  # the network is as it was
    assert all(module.avgpool is pool for module, pool in zip(modules, pools))


def test_squeeze_and_excitation_averages_over_what_it_saw_in_training():
    """Then a picture in tiles needs one pass, and that up to the noise level."""
    network, picture, shares = make_network("squeezed"), smooth_picture(210, 505), []
    local = denoise.localised(network, 64)
    small = data.to_float(smooth_picture(64, 64), "cpu")
    with torch.inference_mode():
        torch.testing.assert_close(local(small), network(small))  # of the training's size it is the same
        whole = local(data.to_float(picture, "cpu")).image.clamp(0, 1)
        assert not torch.allclose(whole, network(data.to_float(picture, "cpu")).image.clamp(0, 1))
    tiled = denoise.denoise_tiled(local, picture, "cpu", 128, 256, shares.append).float() / 255
    assert (tiled - whole).abs().max() < 0.5 / 255 + 1e-3 and len(shares) == 8 * 2
    bare = torch.nn.Linear(1, 1)
    assert denoise.localised(bare, 64) is bare


def test_margins_are_no_smaller_than_the_images_of_the_training(tmp_path, small_tiles, monkeypatch):
    def denoise_tiled(network, noisy, device, core, margin, done):
        margins.append(margin)
        return noisy

    network, margins = make_network("dnas-k3-e3"), []
    monkeypatch.setattr(denoise, "denoise_tiled", denoise_tiled)
    denoise.to_picture(smooth_picture(150, 170)[0]).save(tmp_path / "p.png")
    for size in (20, 100):
        denoise.denoise_paths(network, [tmp_path / "p.png"], tmp_path / f"out{size}", size=size)
    assert margins == [64, 128]


def test_a_local_mean_stays_inside_the_map():
    x = torch.rand(2, 3, 9, 12, dtype=torch.float64)
    local = denoise.LocalMean(4)(x)
    assert local.shape == x.shape
    for row, start in ((0, 0), (2, 0), (4, 2), (8, 5)):  # 2 before, itself and 1 after, where there are
        torch.testing.assert_close(local[..., row, 6], x[..., start:start + 4, 4:8].mean((2, 3)))
    assert denoise.LocalMean(9)(x).shape == (2, 3, 1, 12)
    torch.testing.assert_close(denoise.LocalMean(12)(x), x.mean((2, 3), keepdim=True))


def test_tiles_of_a_network_without_squeeze_and_excitation():
    torch.manual_seed(0)
    network = registry.build_network(registry.named_record("dcnet-s", 10, {})).eval()
    picture = smooth_picture(300, 290)
    with torch.inference_mode():
        whole = network(data.to_float(picture, "cpu")).image.clamp(0, 1)
    tiled = denoise.denoise_tiled(network, picture, core=96, margin=64).float() / 255
    assert (tiled - whole).abs().max() < 0.5 / 255 + 1e-3


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(denoise, "TILE_CORE", 64)
    monkeypatch.setattr(denoise, "TILE_MARGIN", 32)


@pytest.mark.parametrize("name", ("dcnas-k3-e3", "cnas-k3-e3"))
def test_a_large_picture_of_the_training_size_is_classified_too(name, tmp_path, small_tiles):
    network, picture = make_network(name), smooth_picture(150, 170)
    denoise.to_picture(picture[0]).save(tmp_path / "p.png")
    records, failures = denoise.denoise_paths(network, [tmp_path / "p.png"], tmp_path / "out", size=120)
    with torch.inference_mode():
        expected = network(data.to_float(picture, "cpu")).logits[0].softmax(0).max().item()
    assert not failures and records[0]["classes"][0]["probability"] == pytest.approx(expected, rel=1e-4)


def test_what_does_not_fit_into_memory_is_reported(tmp_path, monkeypatch, capsys):
    def forward(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    network = Lopsided().eval()
    monkeypatch.setattr(network, "forward", forward)
    denoise.to_picture(smooth_picture(20, 20)[0]).save(tmp_path / "p.png")
    records, failures = denoise.denoise_paths(network, [tmp_path / "p.png"], tmp_path, size=20)
    assert not records and "too large for the memory" in failures[0]["error"]
    assert "skipped: too large for the memory of cpu" in capsys.readouterr().err


# --- Self-ensemble ------------------------------------------------------------------------------------------


def test_the_self_ensemble_is_the_mean_over_eight_turns():
    network, x = make_network("lopsided"), torch.rand(2, 3, 8, 11)
    image, logits = denoise.SelfEnsemble(network)(x)
    expected = []
    for mirrored in (False, True):
        for quarters in range(4):
            turned = np.rot90(x.numpy()[..., ::-1] if mirrored else x.numpy(), quarters, (2, 3)).copy()
            out = np.rot90(network(torch.from_numpy(turned)).image.detach().numpy(), -quarters, (2, 3))
            expected.append(out[..., ::-1] if mirrored else out)
    torch.testing.assert_close(image, torch.from_numpy(np.mean(expected, 0)))
    assert not torch.allclose(image, network(x).image, atol=1e-3)
    assert torch.equal(logits, network(x).logits)  # of the upright image
    turn, turn_back = denoise.SelfEnsemble.turn, denoise.SelfEnsemble.turn_back
    assert len({turn(x, way).numpy().tobytes() for way in range(8)}) == 8
    assert all(torch.equal(turn_back(turn(x, way), way), x) for way in range(8))


@pytest.mark.parametrize("name", ("lopsided", "dcnas-k3-e3", "dcnas-seq-k3-e3"))
def test_the_self_ensemble_in_tiles_is_that_of_the_whole_picture(name):
    network, picture, shares = make_network(name), smooth_picture(200, 290), []
    ensemble = denoise.SelfEnsemble(network)
    with torch.inference_mode():
        image = data.to_float(picture, "cpu")
        turned = [ensemble.turn_back(network(ensemble.turn(image, way)).image, way) for way in range(8)]
        assert torch.allclose(ensemble(image).image, sum(turned) / 8, atol=1e-5)
        whole = sum(each.clamp(0, 1) for each in turned) / 8  # of 8-bit images, which hold nothing else
    tiled = denoise.denoise_tiled(ensemble, picture, "cpu", 128, 256, shares.append).float() / 255
    assert (tiled - whole).abs().max() < 1.01 / 255  # eight images in 8 bit, and their mean
    assert sum(shares) == pytest.approx(8)
    if name == "lopsided":  # the others, untrained, give much the same from every side
        assert whole.std() > 5 / 255 and (tiled - whole.flip(-1)).abs().max() > 5 / 255


# --- The user's own pictures, by python eval.py --input -----------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of untrained networks, as train.py writes them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for model in ("cnas", "dnas", "dcnas"):
        torch.manual_seed(0)
        arch = models.named_arch(f"{model}-k3-e3", 0 if model == "dnas" else 10)
        files.save_checkpoint(folder / f"{model}.pt", {
            "record": files.make_record("tfnas", arch.to_dict(), {}),
            "network": models.Network(arch).state_dict(), "flags": None, "made": files.provenance("cpu"),
            "seed": 0, "classes": None if model == "dnas" else list("abcdefghij"), "size": 32, "epoch": 3})
    return folder


def run(checkpoint, source, folder, *flags):
    """Run eval.py in this process: the exit code and predictions.json."""
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--checkpoint", str(checkpoint), "--input", str(source), "--output-dir", str(folder),
                         *map(str, flags)])
    path = Path(folder, "predictions.json")
    return stopped.value.code, json.loads(path.read_text()) if path.exists() else None


@pytest.fixture
def pictures(tmp_path):
    """Grey, RGBA, odd sizes, two files of one stem, and a damaged one."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for name, shape in (("grey.png", (37, 61)), ("alpha.png", (30, 40, 4)), ("twin.png", (33, 201, 3)),
                        ("twin.bmp", (5, 3, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "bad.jpg").write_bytes(b"not a picture")
    return folder


def test_own_pictures(checkpoints, pictures, tmp_path, capsys):
    code, result = run(checkpoints / "dcnas.pt", pictures, tmp_path / "out")
    printed = capsys.readouterr()
    assert code == 1 and "bad.jpg" in printed.err and "1 of 5" in printed.err
    assert "Traceback" not in printed.err
    assert (result["format"], result["version"], result["sigma_added"]) == ("joint-predictions", 1, 0)
    assert list(result)[:3] == ["format", "version", "made"] and result["epoch"] == 3
    assert [Path(failure["file"]).name for failure in result["failures"]] == ["bad.jpg"]
    sizes = {}
    for record in result["pictures"]:
        denoised = Image.open(record["denoised"])
        original = Image.open(record["file"])
        assert denoised.mode == original.mode and denoised.size == original.size
        if original.mode == "RGBA":
            assert denoised.getchannel("A").tobytes() == original.getchannel("A").tobytes()
        assert len(record["classes"]) == 5 and record["classes"][0]["probability"] > 0.1
        assert f": {record['classes'][0]['name']} " in printed.out
        sizes[Path(record["file"]).name] = record["classified_at_px"]
    # Trained at 32 pixels: from 16 to 64 a picture is classified as it is, others with a short side of 32.
    assert sizes == {"alpha.png": [30, 40], "grey.png": [37, 61], "twin.bmp": [53, 32], "twin.png": [32, 195]}
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "alpha_denoised.png", "grey_denoised.png", "twin_2_denoised.png", "twin_denoised.png"]


def test_noise_and_the_self_ensemble(checkpoints, pictures, tmp_path):
    for name, flags in (("one", ()), ("eight", ("--self-ensemble",))):
        code, result = run(checkpoints / "dcnas.pt", pictures / "grey.png", tmp_path / name,
                           "--sigma", "25.5/255", *flags)
        assert code == 0 and result["self_ensemble"] == bool(flags)
        assert result["sigma_added"] == 0.1 and result["noise"] == "gaussian"
    clean, noisy = (np.array(Image.open(path).convert("RGB")) / 255
                    for path in (pictures / "grey.png", tmp_path / "one" / "grey_noisy.png"))
    inside = (clean > 0.3) & (clean < 0.7)
    assert np.std((noisy - clean)[inside]) == pytest.approx(0.1, rel=0.1)
    one, eight = (np.array(Image.open(tmp_path / name / "grey_denoised.png")) for name in ("one", "eight"))
    assert (one != eight).any()


def test_networks_that_only_denoise_or_only_classify(checkpoints, pictures, tmp_path):
    (pictures / "bad.jpg").unlink()
    for flags in ((), ("--overwrite",)):  # pictures of an earlier run are not taken again
        code, result = run(checkpoints / "dnas.pt", pictures, pictures / "out", *flags)
        assert code == 0 and len(list((pictures / "out").glob("*.png"))) == len(result["pictures"]) == 4
        assert not any("classes" in record for record in result["pictures"])
    code, result = run(checkpoints / "cnas.pt", pictures / "twin.png", tmp_path / "c")
    assert "denoised" not in result["pictures"][0] and result["pictures"][0]["classes"]
    assert code == 0 and not list((tmp_path / "c").glob("*.png"))


def test_a_picture_larger_than_a_tile_goes_through_the_command(checkpoints, tmp_path, small_tiles):
    denoise.to_picture(smooth_picture(150, 260)[0]).save(tmp_path / "large.png")
    for flags, name in (((), "plain"), (("--sigma", 0.2), "noisy")):
        code, result = run(checkpoints / "dcnas.pt", tmp_path / "large.png", tmp_path / name,
                           "--size", 48, *flags)
        record = result["pictures"][0]
        assert code == 0 and result["training_size_px"] == 48 and record["classified_at_px"] == [48, 83]
        assert (record["width_px"], record["height_px"]) == (260, 150) == Image.open(record["denoised"]).size
        assert ("noisy" in record) == bool(flags)


def test_nothing_is_written_over_unless_told(checkpoints, pictures, capsys):
    (pictures / "grey_denoised.png").write_bytes(b"the user's own")
    code, result = run(checkpoints / "dnas.pt", pictures / "grey.png", pictures)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (code, result) == (2, None)
    assert "grey_denoised.png is already there" in error and "--overwrite" in error
    assert (pictures / "grey_denoised.png").read_bytes() == b"the user's own"
    assert len(list(pictures.iterdir())) == 6


def test_every_picture_stands_for_itself(checkpoints, pictures, tmp_path, capsys):
    odd = {"link.png": None, "x" * 244 + ".png": (20, 20), os.fsdecode(b"\xe9.png"): (20, 20),
           "dot.png": (1, 1)}
    for name, size in odd.items():
        if size is None:
            (pictures / name).symlink_to(pictures / name)
        else:
            Image.new("RGB", size, "grey").save(pictures / name)
    (pictures / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    code, result = run(checkpoints / "dcnas.pt", pictures, tmp_path / "out")
    assert code == 1 and "3 of 10" in capsys.readouterr().err
    assert sorted(Path(failure["file"]).name for failure in result["failures"]) == [
        "bad.jpg", "link.png", "script.png"]
    assert all(Path(record["denoised"]).exists() for record in result["pictures"])


@pytest.mark.parametrize("source, sentence", [("nowhere", "nowhere"), ("empty", "holds no picture")])
def test_no_picture_ends_in_one_sentence(checkpoints, tmp_path, capsys, source, sentence):
    (tmp_path / "empty").mkdir()
    assert run(checkpoints / "dcnas.pt", tmp_path / source, tmp_path / "out") == (2, None)
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ("L", "LA", "RGB", "RGBA"))
def test_a_picture_keeps_its_mode_and_what_is_transparent(mode):
    values = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    original = Image.fromarray(values).convert(mode)
    if "A" in mode:
        alpha = np.full((9, 11), 128, np.uint8)
        alpha[0], alpha[1] = 255, 0
        original.putalpha(Image.fromarray(alpha))
    found = denoise.like_original(data.over_white(original), original)  # as of a network that changes nothing
    assert found.mode == mode and found.size == (11, 9)
    difference = np.abs(np.asarray(found, int) - np.asarray(original, int))
    assert difference.max() <= 2 and not difference[:2].any()
    grey = denoise.like_original(original.convert("L").resize((22, 18)), original)  # of a grey network
    assert grey.size == (22, 18) and grey.mode == mode.replace("RGB", "L")


@pytest.mark.parametrize("mode, is_grey, read_as", (
    ("1", True, "L"), ("L", True, "L"), ("LA", True, "LA"), ("I;16", True, "L"), ("F", True, "L"),
    ("P", False, "RGB"), ("RGB", False, "RGB"), ("RGBA", False, "RGBA"), ("CMYK", False, "RGB"),
    ("LAB", False, "RGB")))
def test_grey_is_told_from_colour(tmp_path, mode, is_grey, read_as):
    path = tmp_path / ("a.tif" if mode in ("F", "CMYK", "LAB") else "a.png")
    Image.new(mode, (5, 4)).save(path)
    assert data.is_grey(path) == is_grey and data.load_original(path).mode == read_as
    assert data.is_grey(tmp_path / "missing.png") is None


def test_the_denoiser_that_comes_with_the_project(checkpoints, pictures, tmp_path, monkeypatch, capsys):
    """--input without a checkpoint takes the packed network, in 16 bit; damage to its file is found."""
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    (pictures / "bad.jpg").unlink()
    def evaluate(name, *flags):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(["--input", str(pictures / "twin.png"), "--output-dir", name, *flags])
        return stopped.value.code, capsys.readouterr()
    code, printed = evaluate("none")
    assert code == 2 and "runs/train/best.pt" in printed.err
    weights.main(["--add", str(checkpoints / "dnas.pt"), "--name", "colour", "--about", "made for a test"])
    assert "made for a test" in capsys.readouterr().out
    code, printed = evaluate("packed")
    assert code == 0 and "colour.pt" in printed.err
    assert evaluate("own", "--checkpoint", str(checkpoints / "dnas.pt"))[0] == 0
    one, other = (np.asarray(Image.open(tmp_path / name / "twin_denoised.png"), int)
                  for name in ("packed", "own"))
    assert np.abs(one - other).max() <= 1
    assert weights.find("grey") is None
    grey = {"record": registry.named_record("dncnn-grey", 10, {}), "network": registry.build_network(
        registry.named_record("dncnn-grey", 10, {})).state_dict(), "made": files.provenance("cpu"),
        "seed": 0, "classes": None, "size": 32, "epoch": 3}
    files.save_checkpoint(tmp_path / "grey.pt", grey)
    weights.main(["--add", str(tmp_path / "grey.pt"), "--name", "grey", "--about", "made for a test"])
    assert [entry["name"] for entry in weights.entries()] == ["colour", "grey"]
    Image.open(pictures / "twin.png").convert("L").save(pictures / "twin.png")
    (pictures / "grey.jpg").write_bytes(b"damaged")
    code, printed = evaluate("of grey pictures")
    assert code == 0 and "grey.pt" in printed.err
    capsys.readouterr()
    grey["network"] = {name: value * 1e6 for name, value in grey["network"].items()}
    files.save_checkpoint(tmp_path / "large.pt", grey)
    for broken, reason in ((tmp_path / "large.pt", "16 bit"), (checkpoints / "cnas.pt", "does not denoise")):
        with pytest.raises(SystemExit) as stopped:
            weights.main(["--add", str(broken), "--name", "grey", "--about", "x"])
        assert stopped.value.code == 2 and reason in capsys.readouterr().err
    assert evaluate("as before")[0] == 0
    Image.new("RGB", (9, 9)).save(pictures / "twin.png")
    with open(tmp_path / "weights" / "colour.pt", "ab") as file:
        file.write(b"x")
    code, printed = evaluate("damaged")
    assert code == 2 and "damaged" in printed.err


@pytest.mark.parametrize("flags", (["--add", "x.pt"], ["--name", "x"], ["--add", "x.pt", "--name", "x"],
                                   ["--add", "x.pt", "--name", "a/b", "--about", "x"]))
def test_what_is_added_needs_a_name_and_its_terms(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        weights.main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and ("belong together" in error or "a/b" in error)


def test_names_never_collide():
    paths = [Path(name) for name in ("a/x.png", "b/x.jpg", "b/X.bmp", "b/x_2.png")]
    names = denoise.output_names(paths)
    assert names == ["x", "x_2", "X_3", "x_2_2"] and len({name.lower() for name in names}) == 4
