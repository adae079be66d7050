"""export.py: the files compute what the network computes, at any size; what is no such file is refused."""

import builtins
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import export
import files
import hinas
import latency
import models
import registry
import superkernel
import tfnas
from fake_table import fake_table

TFNAS = tfnas.Space(8, num_classes=5)
KINDS = {"hinas": ("denoise", 1, 1), "hinas, twice as large": ("sr", 2, 3)}  # task, scale, channels
CELLS = {name: hinas.Space(*kind, layers=1, nodes=2, base_width=3) for name, kind in KINDS.items()}
NETWORKS = {  # name -> function that makes one
    "tfnas": lambda: TFNAS.network(TFNAS.random_design(random.Random(0))),
    **{name: lambda space=space: space.network(space.random_design(random.Random(0)))
       for name, space in {"superkernel": superkernel.Space("skipinit", 3, 1), **CELLS}.items()},
    **{name: lambda name=name: registry.build_network(registry.named_record(name, 5, {}))
       for name in ("unet-s", "dcnet-s", "dncnn", "lpienet", "mobilenet-v3-small")}}
QUICK = ("unet-s", "dcnet-s", "hinas")


def network(name):
    made = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # a fresh denoiser gives back its input, whatever is wrong in it
            parameter.add_(0.03 * torch.randn(parameter.shape))
    return made


def inputs(made):
    return [export.example_inputs(made, *size) for size in export.SIZES]


@pytest.mark.parametrize("name", QUICK)
def test_a_program_computes_what_the_network_does_at_any_size(name):
    made = network(name)
    program = export.export_program(made).module()
    assert export.largest_difference(made, program, inputs(made)) < 1e-5
    before, broken = inputs(made), network(name)
    assert export.largest_difference(broken, program, before) > 1e-3  # the comparison can fail


@pytest.mark.parametrize("name", NETWORKS)
def test_an_onnx_file_computes_what_the_network_does_at_any_size(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made, path = network(name), tmp_path / "network.onnx"
    about = {"format": export.FORMAT, "version": export.VERSION, "channels": models.channels_of(made),
             "scale": models.scale_of(made)}
    export.write_onnx(export.export_program(made), path, export.output_names(made), about)
    read = export.OnnxNetwork(path)
    assert export.largest_difference(made, read, inputs(made)) < 1e-5
    assert (read.denoises, read.classifies, read.scale) == (made.denoises, made.classifies, about["scale"])
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]  # of one piece


@pytest.fixture
def checkpoint(tmp_path):
    record = registry.named_record("unet-s", 5, {})
    made = network("unet-s")
    files.save_checkpoint(tmp_path / "best.pt", {
        "record": record, "network": made.state_dict(), "classes": list("abcde"), "size": 32, "seed": 0,
        "data": "digits", "loss": "den", "epoch": 1, "flags": {"sigma": 0.5}})
    return tmp_path / "best.pt"


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        export.main([str(argument) for argument in arguments])
        raise SystemExit(0)
    return stop.value.code


def test_the_command_writes_checks_and_times_both_files(checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    command = ("--checkpoint", checkpoint, "--output-dir", tmp_path / "out")
    assert run(*command) == 0
    out = capsys.readouterr().out
    report = files.read_json(tmp_path / "out" / "export.json", "joint-export", 1, "")
    forms = {row["form"]: row for row in report["forms"]}
    assert list(forms) == ["eager", "folded", "torch.export", "onnxruntime"]
    assert all(row["ms"] > 0 and row["form"] in out for row in report["forms"])
    assert all(0 <= forms[name]["difference"] < 1e-4 for name in ("torch.export", "onnxruntime"))
    about = export.OnnxNetwork(tmp_path / "out" / "network.onnx").about
    assert (about["classes"], about["size"], about["sigma"]) == (list("abcde"), 32, 0.5)
    monkeypatch.setattr(export, "LARGEST_DIFFERENCE", -1.0)
    assert "differ from PyTorch's by more than" in str(run(*command))


def test_a_missing_package_is_named_in_one_sentence(checkpoint, tmp_path, capsys, monkeypatch):
    plain = builtins.__import__
    monkeypatch.setattr(export.importlib, "import_module", lambda name: plain("no_package_of_this_name"))
    assert run("--checkpoint", checkpoint, "--output-dir", tmp_path / "out") == 2
    assert "The package onnx is not installed; install it with: pip install -r requirements-optional.txt" in (
        capsys.readouterr().err)


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
    for about, words in ((None, "is not an ONNX file of export"), ({"format": "other"}, "is not joint-onnx")):
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
    assert len(times) == len(parts) and min(times) > 0
    assert sum(times) < 2 * whole  # no node counts twice; other work may run here


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
