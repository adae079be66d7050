"""export.py: the files compute what the network computes, at any size; what is no such file is refused."""

import builtins
import contextlib
import importlib.util
import io
import json
import random
import re
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.ops import SqueezeExcitation

import denoise
import eval as evaluation
import export
import files
import hinas
import latency
import models
import registry
import superkernel
import tfnas
import timing
from fake_table import fake_table, quick_compare

TFNAS = tfnas.Space(8, num_classes=5)
KINDS = {"hinas": ("denoise", 1, 1), "hinas, twice as large": ("sr", 2, 3)}  # task, scale, channels
CELLS = {name: hinas.Space(*kind, layers=1, nodes=2, base_width=3) for name, kind in KINDS.items()}


def short(arch):
    """The first block of each stage: exporting takes as long as there are layers."""
    return replace(arch, blocks=tuple(b for b in arch.blocks if b.in_channels != b.out_channels))


NETWORKS = {  # name -> function that makes one
    "tfnas": lambda: TFNAS.network(short(TFNAS.random_design(random.Random(0)))),
    **{name: lambda space=space: space.network(space.random_design(random.Random(0)))
       for name, space in {"superkernel": superkernel.Space("skipinit", 3, 1), **CELLS}.items()},
    **{name: lambda name=name: registry.build_network(registry.named_record(name, 5, {}))
       for name in ("unet-s", "dcnet-s", "dncnn", "lpienet", "mobilenet-v3-small")}}
QUICK = ("unet-s", "dcnet-s", "hinas")
CONTENT = {"record": {"model": "some"}, "classes": None, "size": 64, "seed": 0, "epoch": 1}  # of a checkpoint


def network(name):
    made = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # a fresh denoiser gives back its input, whatever is wrong in it
            parameter.add_(0.03 * torch.randn(parameter.shape))
    return made


def inputs(made):
    return [export.example_inputs(made, *size) for size in export.SHAPES]


def test_examples_of_pairs_are_their_clean_pictures(tmp_path):
    for kind, value in (("noisy", 90), ("clean", 150)):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (40, 33), (value,) * 3).save(tmp_path / kind / "0.png")
    ((image,),) = export.pictures(str(tmp_path), NETWORKS["unet-s"]())
    assert image.shape == (1, 3, 33, 40) and image.mean().item() == pytest.approx(150 / 255, abs=0.01)


@pytest.mark.parametrize("name", QUICK)
def test_a_program_computes_what_the_network_does_at_any_size(name):
    made = network(name)
    program = export.export_program(made).module()
    assert export.largest_difference(made, program, inputs(made)) < 1e-5
    before, broken = inputs(made), network(name)
    assert export.largest_difference(broken, program, before) > 1e-3  # the comparison can fail


def test_a_program_of_a_branch_takes_pictures_smaller_than_its_blocks():
    made = network("tfnas")
    program, small = export.export_program(made).module(), [(1, 12, 40), (1, 16, 16)]
    images = [export.example_inputs(made, *shape) for shape in small]
    assert made.decoder.full is not None and export.largest_difference(made, program, images) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_an_onnx_file_computes_what_the_network_does_at_any_size(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made, path = network(name), tmp_path / "network.onnx"
    about = export.describe(made, CONTENT)
    export.write_onnx(export.export_program(made), path, export.output_names(made), about)
    read = export.OnnxNetwork(path)
    assert export.largest_difference(made, read, inputs(made)) < 1e-5
    assert (read.denoises, read.classifies, read.scale) == (made.denoises, made.classifies, about["scale"])
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]  # of one piece
    assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()


class Squeezed(nn.Module):
    """What tiles of their own would change: three modules that look at the whole picture."""

    denoises, classifies = True, True

    def __init__(self):
        super().__init__()
        self.begin, self.middle = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.squeezes = nn.ModuleList([SqueezeExcitation(16, 4), SqueezeExcitation(16, 4)])
        self.noise_level, self.end = models.NoiseLevel(), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x):
        out = self.squeezes[1](self.middle(self.squeezes[0](self.begin(x)).relu()))
        image = torch.sigmoid(self.end(out) + self.noise_level(x) + 4)
        return models.Output(image, out.mean((2, 3)))


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory):
    """A network and its ONNX file."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    made, path = Squeezed().eval(), tmp_path_factory.mktemp("squeezed") / "network.onnx"
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    export.write_onnx(export.export_program(made), path, ["image", "logits"], export.describe(made, CONTENT))
    return made, path


def uneven_picture(height=160, width=208):  # multiples of 16, as Squeezed does not pad
    """Dark at the left, bright and noisy at the right, uint8 (1, 3, height, width)."""
    ramp = torch.linspace(0, 1, width).expand(3, height, width)
    return (ramp * (0.5 + 0.5 * torch.rand(3, height, width))).mul(255).byte()[None]


def test_tiles_of_an_onnx_file_compute_what_the_whole_picture_does(squeezed):
    made, path = squeezed
    picture, read = uneven_picture(), export.OnnxNetwork(path)
    with torch.inference_mode():
        whole = made(picture / 255).image * 255
    tiled = denoise.denoise_tiled(read, picture, core=64, margin=32).float()
    assert (tiled - whole).abs().max() < 0.51
    parts = read.in_parts()
    assert len(parts.pools) == 3  # not the mean of the classes
    parts.pools = nn.ModuleList()
    read.in_parts = lambda: parts
    assert (denoise.denoise_tiled(read, picture, core=64, margin=32) - whole).abs().max() > 5  # it can fail


@pytest.mark.parametrize("form, most", [("half", 0.01), ("int8", 0.3)])
def test_smaller_forms_compute_nearly_the_same(squeezed, tmp_path, form, most):
    made, path = squeezed
    noisy = [export.example_inputs(made, 1, 64, 64, seed) for seed in range(6)]
    export.write_form(form, path, tmp_path / "small.onnx", types.SimpleNamespace(calibration=lambda: noisy))
    small = export.OnnxNetwork(tmp_path / "small.onnx")
    assert small.about == {**export.OnnxNetwork(path).about, "form": form}
    assert 0 < export.largest_difference(made, small, noisy) < most
    picture = uneven_picture()
    with torch.inference_mode():
        whole = small(picture / 255).image * 255
    tiled = denoise.denoise_tiled(small, picture, core=64, margin=32).float()
    assert (tiled - whole).abs().max() < (0.51 if form == "half" else 8)  # a mean may fall on another step


def test_what_is_not_finite_has_no_difference():
    made = Squeezed().eval()
    broken = lambda x: made(x)._replace(image=x * float("nan"))
    assert export.largest_difference(made, broken, [(torch.rand(1, 3, 8, 8),)]) is None


def save_checkpoint(path, data="digits"):
    record, made = registry.named_record("unet-s", 5, {}), network("unet-s")
    files.save_checkpoint(path, {
        "record": record, "network": made.state_dict(), "classes": None, "size": 32, "seed": 0,
        "data": data, "loss": "den", "epoch": 1, "flags": {"sigma": 0.5}})
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "best.pt")


def run(*arguments, script=export):
    with pytest.raises(SystemExit) as stop:
        script.main([str(argument) for argument in arguments])
        raise SystemExit(0)
    return stop.value.code


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with best.pt and what the command wrote of it, and what it printed."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, out = tmp_path_factory.mktemp("exported"), io.StringIO()
    save_checkpoint(folder / "best.pt")
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "CALIBRATION_IMAGES", 6)
        patch.setattr(export, "TEST_IMAGES", 4)
        assert run("--checkpoint", folder / "best.pt", "--output-dir", folder, "--forms", "int8", "half",
                   "--sizes", "48x32") == 0
    return folder, out.getvalue()


def test_the_command_writes_checks_and_times_all_files(exported):
    folder, out = exported
    report = files.read_json(folder / "export.json", "joint-export", 1, "")
    forms = {row["form"]: row for row in report["forms"]}
    assert list(forms) == ["eager", "folded", "torch.export", "onnxruntime", "int8", "half"]
    assert all(row["ms"] > 0 and row["form"] in out for row in report["forms"])
    assert all(0 <= forms[name]["difference"] < 1e-4 for name in ("torch.export", "onnxruntime"))
    assert 1e-5 < forms["half"]["difference"] < 0.1 < forms["eager"]["psnr_db"]
    assert forms["eager"]["psnr_db"] == pytest.approx(forms["onnxruntime"]["psnr_db"], abs=1e-3)
    assert forms["eager"]["psnr_db"] != forms["int8"]["psnr_db"]
    assert forms["int8"]["bytes"] < forms["onnxruntime"]["bytes"] > 1.5 * forms["half"]["bytes"]
    about = export.OnnxNetwork(folder / "network.onnx").about
    assert (about["classes"], about["size"], about["sigma"], about["multiple"]) == (None, 32, 0.5, 16)
    size, = report["sizes"]
    assert (size["width_px"], size["height_px"], size["tiled"]) == (48, 32, False) and "48x32" in out
    assert size["ms"] > 0 and (size["memory_mib"] is None or 0 < size["memory_mib"] < 500)


def test_the_command_fails_where_a_file_computes_something_else(exported, tmp_path, monkeypatch):
    for name in ("export_program", "write_program", "write_onnx"):
        monkeypatch.setattr(export, name, lambda *_: None)
    row = {"form": "onnxruntime", "ms": 1.0, "bytes": 1, "file": "f"}
    for wrong, words in ((0.1, "differ from PyTorch's by more than 0.0001"), (None, "are not finite")):
        monkeypatch.setattr(export, "compare", lambda *_: [{**row, "difference": wrong}])
        assert words in str(run("--checkpoint", exported[0] / "best.pt", "--output-dir", tmp_path))


def test_eval_uses_an_onnx_file_as_the_checkpoint(exported, tmp_path, capsys):
    folder, pictures = exported[0], tmp_path / "pictures"
    pictures.mkdir()
    denoise.to_picture(uneven_picture(70, 45)[0]).save(pictures / "a.png")
    found = {}
    for flag, file in (("--checkpoint", "best.pt"), ("--onnx", "network.onnx")):
        common = (flag, folder / file, "--threads", 1)
        assert run(*common, "--input", pictures, "--sigma", 0.1, "--output-dir", tmp_path / flag,
                   script=evaluation) == 0
        assert run(*common, "--test-images", 3, "--output-dir", tmp_path / "table", script=evaluation) == 0
        metrics = files.read_json(tmp_path / "table" / "metrics.json", "joint-eval", 2, "")
        found[flag] = (np.array(Image.open(tmp_path / flag / "a_denoised.png")).astype(int), metrics)
    (ours, expected), (theirs, metrics) = found.values()
    assert np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 0.01
    for level, wanted in zip(metrics["levels"], expected["levels"], strict=True):
        assert level["sigma"] == wanted["sigma"]
        assert level["psnr_db"] == pytest.approx(wanted["psnr_db"], abs=0.01)
    assert (metrics["network"], metrics["data"]) == (expected["network"], "digits")
    assert metrics["latency"]["mode"] == "onnx" and metrics["checkpoint"].endswith("network.onnx")
    assert run("--onnx", folder / "best.pt", "--input", pictures, script=evaluation) == 2
    assert "is not an ONNX file of export.py" in capsys.readouterr().err


def test_smaller_forms_are_not_calibrated_on_other_pictures_unless_told(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = save_checkpoint(tmp_path / "best.pt", data=str(tmp_path / "nowhere"))
    assert run("--checkpoint", path, "--output-dir", tmp_path / "out", "--forms", "int8") == 2
    assert "nowhere is not here: name a folder with --images." in capsys.readouterr().err


def test_an_older_torch_is_named_in_one_sentence(checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(torch.export, "export", lambda module, args, dynamic_shapes: None)
    assert run("--checkpoint", checkpoint, "--output-dir", tmp_path / "out") == 2
    assert "export.py needs torch 2.9 or later, and this is " in capsys.readouterr().err


def test_a_missing_package_is_named_in_one_sentence(checkpoint, tmp_path, capsys, monkeypatch):
    plain = builtins.__import__
    monkeypatch.setattr(export.importlib, "import_module", lambda name: plain("no_package_of_this_name"))
    assert run("--checkpoint", checkpoint, "--output-dir", tmp_path / "out") == 2
    assert "The package onnx is not installed; install it with: pip install -r requirements-optional.txt" in (
        capsys.readouterr().err)
    assert run("--onnx", tmp_path / "network.onnx", script=evaluation) == 2
    assert "The package onnxruntime is not installed; install it with: pip" in capsys.readouterr().err


def test_what_is_no_onnx_file_of_this_project_is_refused_in_one_sentence(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "network.onnx"
    with pytest.raises(ValueError, match="cannot be read"):
        export.OnnxNetwork(path)
    path.write_bytes(b"\x08\x07damaged")
    with pytest.raises(ValueError, match="is not an ONNX file of export.py"):
        export.OnnxNetwork(path)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "g", [value("x", 1, [1])],
                                   [value("y", 1, [1])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    ours = {"format": export.FORMAT, "version": export.VERSION, "model": "m", "channels": "three"}
    for about, words in ((None, "is not an ONNX file of export"), ([1], "is not an ONNX file of export"),
                         ({"format": "other"}, "is not joint-onnx"), (ours, "its channels is 'three'")):
        if about:
            onnx.helper.set_model_props(model, {"joint": json.dumps(about)})
        Path(path).write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=words):
            export.OnnxNetwork(path)


@pytest.mark.parametrize("name", ("tfnas", "superkernel", "hinas"))
def test_every_part_of_a_network_has_a_time_in_onnxruntime(name):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    space = {"tfnas": TFNAS, "superkernel": superkernel.Space("skipinit", 3, 1), **CELLS}[name]
    made = space.network(space.random_design(random.Random(3))).eval()
    setting = latency.this_setting("cpu", size=64, num_classes=5, mode="onnx")
    assert setting.runtime.startswith("onnxruntime ") and setting.threads == 1
    with latency.prepared(made, setting) as (traced, images):
        for ours, theirs in zip(export.made(made(images)), traced(images), strict=True):
            torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-3, atol=1e-5)
        parts, modules = zip(*space.parts(traced.network))
        times = latency.time_parts(traced, modules, images, torch.device("cpu"), runs=5)
        whole = latency.measure(lambda: traced(images), "cpu").median_ms
        before = traced.session
        traced.restart()
        assert traced.session is not before
    assert len(times) == len(parts) and min(times) > 0
    assert sum(times) < 2 * whole  # no node counts twice; other work may run here


def test_a_table_is_made_of_what_another_device_times_alone(tmp_path, capsys, monkeypatch):
    """Networks are written, timed by the copy of timing.py in their folder, and the times read."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    quick_compare(monkeypatch)
    space = hinas.Space(layers=1, nodes=1, base_width=3)
    monkeypatch.setattr(latency, "space_of", lambda args: space)

    class Plan(latency.Plan):  # with fewer networks
        def __init__(self, *args):
            super().__init__(*args)
            self.to_correct, self.to_check = self.to_correct[:1], self.to_check[:1]
            self.designs = [*self.carriers, *self.to_correct, *self.to_check]
    monkeypatch.setattr(latency, "Plan", Plan)
    folder, table = tmp_path / "board", tmp_path / "table.json"
    latency.main(["--mode", "onnx", "--size", "16", "--rounds", "1", "--write-networks", str(folder)])
    out, own = capsys.readouterr().out, sum(path.stat().st_size for path in folder.glob("network*.onnx"))
    assert "python timing.py\n" in out and f"{len(list(folder.glob('network*.onnx')))} networks" in out
    there = importlib.util.spec_from_file_location("timing_there", folder / "timing.py")
    script = importlib.util.module_from_spec(there)
    there.loader.exec_module(script)
    script.PATIENCE_S, interleave = 0.0, script.interleave
    script.interleave = lambda bursts, **_: interleave(bursts, min_rounds=3)
    script.main([])
    assert f"{folder / 'times.json'}: take it back" in capsys.readouterr().out and own < 5e6
    latency.main(["--read-times", str(folder / "times.json"), "--output", str(table)])
    made = latency.load_table(table)
    assert set(made.costs) >= space.possible_parts() and made.reference_ms > 0 and made.content["timed"]
    assert not made.elsewhere  # it was timed here after all
    content = made.content
    content["setting"]["device"] = "a board"
    made = latency.Table(content)
    assert made.elsewhere and not latency.Table({**content, "timed": None}).elsewhere
    latency.write_network(made.reference_network(), made.setting, folder / "found.onnx")
    capsys.readouterr()
    script.main([str(folder / "found.onnx")])
    assert re.search(r"found.onnx: .* ms .*for an input of 1x1x16x16 .*threads: 1", capsys.readouterr().out)
    for network, words in (("none.onnx", "onnxruntime cannot run"), (None, "networks.json cannot be read")):
        (folder / "networks.json").unlink(missing_ok=True)
        with pytest.raises(SystemExit):
            script.main([network] if network else [])
        assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_networks_that_share_their_weights_compute_with_weights_of_the_same_size(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    values = {"a": torch.randn(64, 64) / 8, "b": torch.randn(64, 32) / 8, "zeros": torch.zeros(32, 64),
              "ones": torch.ones(64, 64), "small": torch.ones(1)}
    nodes = [onnx.helper.make_node("MatMul", [left, right], [out]) for left, right, out in (
        ("noisy", "a", "1"), ("1", "b", "2"), ("2", "zeros", "3"), ("1", "ones", "4"))]
    nodes.append(onnx.helper.make_node("Add", ["4", "small"], ["5"]))
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g", [value("noisy", 1, [1, 64])], [value(name, 1, None) for name in "235"],
        [onnx.numpy_helper.from_array(each.numpy(), name) for name, each in values.items()])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    weights = export.SharedWeights(tmp_path)
    for name in ("one.onnx", "two.onnx"):
        weights.write(model.SerializeToString(), name)
    weights.finish()
    found = {each.name: onnx.numpy_helper.to_array(each)
             for each in onnx.load(tmp_path / "two.onnx").graph.initializer}
    assert 0.7 < found["a"].std() * 8 < 1.42 and 0.7 < found["b"].std() * 8 < 1.42
    assert not set(found["a"].ravel()) & set(found["b"].ravel()) and not found["zeros"].any()
    assert (found["ones"] == 1).all() and found["small"] == 1
    assert {path.name: path.stat().st_size for path in tmp_path.glob("*.bin")} == {
        "weights-0.125.bin": 4 * (4096 + 2048), "weights-0.bin": 4 * 2048}
    assert len(timing.one_run(timing.start_session(str(tmp_path / "one.onnx"), 1))()) == 3


def test_a_network_that_the_tracing_exporter_cannot_write_has_no_time_and_stops_nothing(capfd):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    made, setting = network("hinas, twice as large"), latency.this_setting("cpu", size=16, num_classes=0)
    assert latency.through_onnxruntime(made, setting) is None
    assert latency.through_onnxruntime(network("hinas"), setting).median_ms > 0
    with pytest.raises(ValueError, match="The mode onnx cannot time this network"):
        latency.measure_network(made, replace(setting, mode="onnx"))


def test_a_setting_of_onnxruntime_is_for_the_cpu_and_holds_its_version():
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="is for --device cpu and --dtype float32"):
        latency.this_setting("cpu", size=64, num_classes=5, mode="onnx", dtype="bfloat16")
    setting = latency.this_setting("cpu", size=32, num_classes=10, mode="onnx")
    table = latency.Table({**fake_table(4, 32, 10), "setting": vars(setting)})
    latency.require_setting(table, setting, "t.json")
    with pytest.raises(ValueError, match="runtime is .* there and 'onnxruntime 0' here.*--mode onnx"):
        latency.require_setting(table, replace(setting, runtime="onnxruntime 0"), "t.json")
