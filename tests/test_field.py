"""field.py: a denoiser beside published ones, through eval.py."""

import importlib.util
import json

import pytest
import torch
from PIL import Image

import eval as evaluation
import field
import files
import registry


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(field, "SIZE", 32)
    monkeypatch.setattr(field, "FIELD", {name: field.FIELD[name] for name in ("DnCNN", "FFDNet")})


def make_pictures(folder, names):
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    for name in names:
        ramp = torch.linspace(60, 190, 24)[:, None, None] + 9 * torch.randn(24, 36, 3, generator=generator)
        Image.fromarray(ramp.clamp(0, 255).byte().numpy()).save(folder / name)
    return str(folder)


def make_checkpoint(path, name="unet-b4-d2-m2-c1-res"):
    torch.manual_seed(0)
    record = registry.named_record(name, 10, {})
    files.save_checkpoint(path, {"record": record, "classes": None, "size": 32, "data": None, "seed": 0,
                                 "loss": "den", "epoch": 1,
                                 "network": registry.build_network(record).state_dict()})
    return str(path)


def test_a_table_of_measured_and_published_numbers(tmp_path, small, capsys):
    clean = make_pictures(tmp_path / "CBSD68", ("a.png", "b.png"))
    pairs = make_pictures(tmp_path / "camera", ("a_mean.png", "a_real.png"))
    checkpoint = make_checkpoint(tmp_path / "best.pt")
    evaluation.main(["--benchmark", clean, pairs, "--checkpoint", checkpoint, "--output-dir",
                     str(tmp_path / "out"), "--device", "cpu", "--threads", "1"])
    content = json.loads((tmp_path / "out" / "field.json").read_text())
    noisy, ours, ensemble, dncnn, ffdnet = content["rows"]
    assert noisy["ms"] is None and noisy["psnr_db"]["CBSD68"]["25"] == pytest.approx(20.17, abs=0.3)
    assert dncnn["psnr_db"] == {"CBSD68": {"15": 33.9, "25": 31.24, "50": 27.95}}
    assert "cszn/DPIR" in dncnn["source"] and ours["source"] == ensemble["source"] == "measured"
    assert ensemble["ms"] == 8 * ours["ms"] and ffdnet["parameters"] == 852_108
    assert set(ours["psnr_db"]["camera"]) == {"real"}
    text = (tmp_path / "out" / "field.txt").read_text(encoding="utf-8")
    assert "33.90*" in text and f"{ours['psnr_db']['CBSD68']['15']:.2f}*" not in text
    assert text in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):  # one axis: nobody else has a value of the pairs
        assert Image.open(tmp_path / "out" / "field.png").width == 600

    # The same numbers as those of an evaluation in the literature's protocol.
    evaluation.main(["--data", clean, "--split", "all", "--sigmas", "15/255", "25/255", "50/255",
                     "--noise-protocol", "literature", "--checkpoint", checkpoint, "--output-dir",
                     str(tmp_path / "eval"), "--device", "cpu", "--threads", "1", "--no-latency"])
    levels = json.loads((tmp_path / "eval" / "metrics.json").read_text())["levels"]
    assert [level["psnr_db"] for level in levels] == list(ours["psnr_db"]["CBSD68"].values())


@pytest.mark.parametrize("network, flags, reason", (
    ("dncnn-grey", [], "denoise colour pictures"),
    ("mobilenet-v3-small", [], "denoise colour pictures"),
    ("unet-b4-d2-m2-c1", ["--self-ensemble"], "leave --self-ensemble out"),
    ("unet-b4-d2-m2-c1", ["--sigmas", "0.5", "--luma"], "leave --luma out")))
def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, small, capsys, network, flags, reason):
    checkpoint = make_checkpoint(tmp_path / "best.pt", network)
    with pytest.raises(SystemExit) as error:
        evaluation.main(["--benchmark", make_pictures(tmp_path / "a", ("a.png",)), *flags, "--checkpoint",
                         checkpoint, "--output-dir", str(tmp_path / "out"), "--device", "cpu"])
    assert error.value.code == 2 and reason in capsys.readouterr().err


def test_two_folders_of_one_name_are_refused(tmp_path, small, capsys):
    folders = [make_pictures(tmp_path / place / "CBSD68", ("a.png",)) for place in ("one", "other")]
    with pytest.raises(SystemExit) as error:
        evaluation.main(["--benchmark", *folders, "--checkpoint", make_checkpoint(tmp_path / "best.pt"),
                         "--output-dir", str(tmp_path / "out"), "--device", "cpu"])
    assert error.value.code == 2 and "same name" in capsys.readouterr().err
