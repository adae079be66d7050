"""Pictures that are in the training and in the test images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data
import eval as evaluation
import field
import files
import leaks
import registry


def photo(seed: int, size: tuple[int, int] = (180, 120)) -> Image.Image:
    """A picture with details of all sizes, the finer the weaker."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for side in (3, 6, 12, 24, 48, 96):
        layer = torch.randn(1, 3, side, side, generator=generator)
        total = total + F.interpolate(layer, size[::-1], mode="bicubic") / side**0.5
    pixels = (0.5 + 0.2 * total[0]).clamp(0, 1).mul(255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@pytest.fixture
def folders(tmp_path):
    """Eight training pictures, the third of which is a test picture too, cut and shrunk; one test picture
    that is a training picture whole, and one that is new."""
    for number in range(8):
        (tmp_path / "photos/train").mkdir(parents=True, exist_ok=True)
        photo(number).save(tmp_path / f"photos/train/{number}.png")
    (tmp_path / "set").mkdir()
    photo(2).crop((40, 6, 144, 110)).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "set/cut.png")
    photo(5).convert("L").save(tmp_path / "set/whole.jpg", quality=60)
    photo(99).save(tmp_path / "set/new.png")
    return tmp_path


def test_what_is_the_same_whole_or_in_part_is_named(folders, capsys):
    leaks.main(["--test", str(folders / "set"), "--train", str(folders / "photos/train")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "2 of 3 pictures are among the 8 others" in lines[2]
    assert "cut.png is in" in lines[0] and "2.png" in lines[0]
    assert "whole.jpg is in" in lines[1] and "5.png" in lines[1]
    with pytest.raises(SystemExit) as stopped:
        leaks.main(["--test", str(folders / "set")])
    assert stopped.value.code == 2 and "Give both" in capsys.readouterr().err
    plain = folders / "plain.png"
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(plain)
    assert leaks.find([plain], [plain]) == [] == leaks.find([], [plain])  # without detail nothing is told


def test_what_is_left_out_is_neither_learned_from_nor_chosen_by(folders):
    left = data.load_data(str(folders / "photos"), size=16, leave_out=[str(folders / "set")])
    names = {path.name for part in (left.train, left.val) for path, *_ in part.files}
    everything = data.load_data(str(folders / "photos"), size=16)
    before = {path.name for part in (everything.train, everything.val) for path, *_ in part.files}
    assert before - names == before & {"2.png", "5.png"} != set()
    assert left.files == everything.files and ", without " in left.sources["train"]
    with pytest.raises(data.DataError, match="--leave-out is for image folders"):
        data.load_data("digits", leave_out=["set"])
    with pytest.raises(data.DataError, match="leaves no image"):
        data.load_data(str(folders / "photos"), size=16, leave_out=[str(folders / "photos/train")])


@pytest.mark.parametrize("left_out", (False, True))
@pytest.mark.parametrize("flags", (["--benchmark"],
                                   ["--split", "all", "--sigmas", "0.1", "--no-latency", "--data"]))
def test_an_evaluation_names_pictures_of_the_training(folders, capsys, monkeypatch, flags, left_out):
    monkeypatch.setattr(field, "SIZE", 16)
    monkeypatch.setattr(field, "FIELD", {"DnCNN": field.FIELD["DnCNN"]})
    photos, network = str(folders / "photos"), registry.named_record("unet-s", 10, {})
    files.save_checkpoint(folders / "best.pt", {
        "record": network, "network": registry.build_network(network).state_dict(), "ema": None,
        "classes": None, "size": 16, "epoch": 1, "seed": 0, "data": photos, "loss": "den",
        "made": files.provenance("cpu"), "splits": data.VERSION,
        "images": data.load_data(photos, size=16).files,
        "flags": {"leave_out": [str(folders / "set")] if left_out else None}})
    evaluation.main(["--checkpoint", str(folders / "best.pt"), "--output-dir", str(folders / "out"), *flags,
                     str(folders / "set")])
    assert ("is the same picture" in capsys.readouterr().err) != left_out
