"""files.py: records and checkpoints survive the disk, and damaged ones end in one sentence."""

import json
from pathlib import Path

import pytest
import torch

import files
import models
import registry

ARCH = models.named_arch("dcnas-k5-e6", 3)


def test_a_record_survives_the_disk(tmp_path):
    path, found = tmp_path / "arch.json", {"target_ms": 12}
    files.write_json(path, files.make_record("tfnas", ARCH.to_dict(), {"seed": 1}, latency=found))
    record = files.load_record(path)
    assert models.Arch.from_dict(record) == ARCH
    assert record["made"] == {"seed": 1} and record["latency"] == found
    assert list(record)[:3] == ["format", "version", "method"]


@pytest.mark.parametrize("change, word", [
    ({"version": 99}, "version 99"),
    ({"format": "other"}, "not a joint-arch"),
    ({"method": "magic"}, "'magic' is unknown"),
    ({"num_classes": 0}, "num_classes"),
    ({"model": "a\nb"}, "model must be"),
])
def test_bad_records_are_refused_in_one_sentence(tmp_path, change, word):
    path = tmp_path / "arch.json"
    files.write_json(path, {**files.make_record("tfnas", ARCH.to_dict(), {}), **change})
    with pytest.raises(ValueError) as caught:
        files.load_record(path)
    assert word in str(caught.value) and "arch.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "joint-arch"', "\x00\xff", "[" * 100000])
def test_damaged_json_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "arch.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="arch.json.*; make one with: python search.py"):
        files.load_record(tmp_path / "arch.json")


def test_one_of_several_formats_and_versions(tmp_path):
    path, known = tmp_path / "table.json", (("new", "old"), (1, 2))
    for name, version in (("new", 2), ("old", 1)):
        files.write_json(path, {"format": name, "version": version})
        assert files.read_json(path, *known, "make one")["version"] == version
    for name, version, sentence in (("new", 3, "version 3 of new, .* reads version 1 and 2; make one"),
                                    ("newer", 1, "not a new or old file; make one")):
        files.write_json(path, {"format": name, "version": version})
        with pytest.raises(ValueError, match=sentence):
            files.read_json(path, *known, "make one")
    with pytest.raises(ValueError, match="none.json cannot be read .*; make one"):
        files.read_json(tmp_path / "none.json", *known, "make one")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("No space left on device")
    with pytest.raises(OSError):
        files.write_file(path, fail)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_checkpoints_load_without_running_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))
    path = tmp_path / "last.pt"
    torch.save({"format": "joint-checkpoint", "version": 1, "x": Evil()}, path)
    with pytest.raises(ValueError, match="last.pt"):
        files.load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_checkpoint_errors_name_the_file(tmp_path):
    record, path = registry.named_record("mb1-s", 2, files.provenance("a CPU", 0)), tmp_path / "best.pt"
    network = registry.build_network(record)
    average = {name: value + 1 for name, value in network.state_dict().items()}
    about = {"record": record, "network": network.state_dict(), "ema": None, "classes": None, "size": 28,
             "seed": 0, "epoch": 1}
    files.save_checkpoint(path, {**about, "ema": average})
    loaded, checkpoint = files.load_checkpoint(path)
    assert not loaded.training and checkpoint["record"] == record
    assert all(torch.equal(value, average[name]) for name, value in loaded.state_dict().items())
    whole = path.read_bytes()
    for content in (b"", whole[:len(whole) // 2], b"hello"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="best.pt is damaged"):
            files.load_checkpoint(path)
    with pytest.raises(ValueError, match="no checkpoint at .*none.pt"):
        files.load_checkpoint(tmp_path / "none.pt")
    for more, sentence in (({"version": 7}, "best.pt has checkpoint version 7"),
                           ({"format": "x"}, "best.pt is not a checkpoint"),
                           ({"size": "28"}, "best.pt is not valid: its size is '28'"),
                           ({"record": {**record, "num_classes": 3}}, "best.pt does not hold what it")):
        files.save_checkpoint(path, {**about, **more})
        with pytest.raises(ValueError, match=sentence):
            files.load_checkpoint(path)
