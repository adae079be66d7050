"""Runs that are killed, stopped, starved of disk or fed nonsense: nothing is lost, and a resumed run
ends with the same weights.

    python -m pytest tests/test_faults.py            # the short form
    python -m pytest tests/test_faults.py --slow     # 200 kills, 6,000 odd and damaged files, folders, flags
"""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import files
import fuzz
import latency
import models
import registry
import run
import search
import train
from fake_table import fake_parts, fake_table, quick_compare

ROOT = Path(train.__file__).parent
ALIKE = ["--size", "16", "--batch-size", "8", "--epochs", "3", "--threads", "1", "--device", "cpu",
         "--save-minutes", "0.002"]
TRAIN = ["train.py", "--model", "dcnas-k3-e3", "--train-images", "160", "--val-images", "10", "--ema", "0.9",
         *ALIKE]
SEARCH = ["search.py", "--target", "2.5", "--depth", "learned", "--train-images", "80",
          "--warmup-epochs", "1", *ALIKE]
SELDOM = ["--save-minutes", "10"]  # for runs that nothing disturbs: writing takes longer than computing
SMALL = ["--model", "cnas-k3-e3", "--size", "16", "--train-images", "40", "--val-images", "10",
         "--batch-size", "8", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(command, folder, **how):
    words = [sys.executable, str(ROOT / command[0]), *command[1:], "--output-dir", str(folder)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
                            **how)


def complete(command, folder):
    """Run to the end in this process; the weights and, of a search, the architecture."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        quick_compare(monkeypatch)
        {"train.py": train, "search.py": search}[command[0]].main(
            [*command[1:], *SELDOM, "--output-dir", str(folder)])
    return result(command, folder)


def in_shell(line, folder):
    return subprocess.run(["bash", "-c", line], cwd=folder, env=ENVIRONMENT, text=True, capture_output=True,
                          timeout=200)


def result(command, folder):
    if command[0] == "train.py":
        state = files.read_checkpoint(folder / "last.pt")
        return {f"{part}.{name}": value for part in ("network", "ema") for name, value in state[part].items()}
    record = files.load_record(folder / "arch.json")
    design = registry.method_module(record["method"]).design_of(record)
    return {**files.read_checkpoint(folder / "search.pt")["searcher"]["supernet"], "design": design}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items())


def await_checkpoint(process, path):
    """Wait until this process has written the checkpoint, or has ended."""
    since = time.time()
    while process.poll() is None and not (path.exists() and path.stat().st_mtime > since):
        assert time.time() - since < 120
        time.sleep(0.05)


def assert_says_how_to_go_on(command, error):
    assert f"python {command[0]} --resume" in error and "Traceback" not in error, error


def disturbed(command, checkpoint, folder, disturbances, rng, how, seconds=None):
    """Start again and again, each time disturbed after random `seconds` (by default: within half a second of
    its first checkpoint), then let it end; how many were."""
    hit, began = 0, time.monotonic()
    while True:
        more = ["--resume", str(folder)] if (folder / checkpoint).exists() else []
        process = start([*command, *more, *(SELDOM if hit == disturbances else [])], folder)
        if hit < disturbances:
            if seconds is None:
                await_checkpoint(process, folder / checkpoint)
            time.sleep(rng.uniform(*seconds or (0.0, 0.5)))
            hit += process.poll() is None
            process.send_signal(how)
        output = process.communicate(timeout=600)
        allowed = {0, -how} | ({run.RESUME_ME, 130} if how != signal.SIGKILL else set())
        assert process.returncode in allowed, output
        if process.returncode == run.RESUME_ME:
            assert_says_how_to_go_on(command, output[1])
        if process.returncode == 0:
            return hit
        assert time.monotonic() - began < 3000


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    table = tmp_path_factory.mktemp("table") / "t.json"
    files.write_json(table, fake_table(size=16))
    small = {"superkernel": "--train-images 240", "hinas": "--train-images 48 --search-width 1"}
    others = {name: (["search.py", "--model", name, "--width", "2", "--val-images", "20", *words.split(),
                      *ALIKE], "search.pt") for name, words in small.items()}
    return {"train": (TRAIN, "last.pt"), "search": ([*SEARCH, "--table", str(table)], "search.pt"), **others}


@pytest.mark.parametrize("name, how", (("train", signal.SIGKILL), pytest.param(
    "search", signal.SIGINT, marks=pytest.mark.slow)))
def test_a_run_that_is_disturbed_ends_as_one_that_is_not(name, how, commands, tmp_path):
    command, checkpoint = commands[name]
    assert disturbed(command, checkpoint, tmp_path / "run", 1, random.Random(how), how) == 1
    assert same(result(command, tmp_path / "run"), complete(command, tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("train", "search", "superkernel", "hinas"))
def test_kills(name, commands, tmp_path, capsys):
    """48 kills of each, over as many runs as that takes; each ends with the weights of an undisturbed one."""
    command, checkpoint = commands[name]
    whole, rng, kills, runs = complete(command, tmp_path / "whole"), random.Random(7), 0, 0
    while kills < 48:
        kills += disturbed(command, checkpoint, tmp_path / str(runs), 8, rng, signal.SIGKILL, (2.0, 7.0))
        assert same(result(command, tmp_path / str(runs)), whole)
        runs += 1
    with capsys.disabled():
        print(f"\n{name}: {kills} kills over {runs} runs, 0 lost")


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_with_the_same_weights(tmp_path, capsys):
    """kill -9 of torchrun and both of its processes at random moments; the run ends as an undisturbed one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "train.py"), *SMALL, "--train-images", "640", "--epochs", "3", "--threads", "1",
               "--save-minutes", "0.002", "--output-dir"]

    def begin(name, *more):
        return subprocess.Popen([*command, str(tmp_path / name), *more], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)

    assert (process := begin("whole")).communicate() and process.returncode == 0
    rng, kills = random.Random(5), 0
    while True:
        resumable = (tmp_path / "part/last.pt").exists()
        process = begin("part", *(["--resume", str(tmp_path / "part")] if resumable else []))
        if kills < 8:
            await_checkpoint(process, tmp_path / "part/last.pt")
            time.sleep(rng.uniform(0.0, 0.5))
            if process.poll() is None:
                kills += 1
                for entry in Path("/proc").glob("[0-9]*/cmdline"):  # each has a session of its own
                    with contextlib.suppress(OSError):
                        if str(tmp_path / "part").encode() in entry.read_bytes():
                            os.kill(int(entry.parent.name), signal.SIGKILL)
        output = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    whole, part = (files.read_checkpoint(tmp_path / name / "last.pt")["network"]
                   for name in ("whole", "part"))
    assert kills >= 5 and all(torch.equal(value, part[name]) for name, value in whole.items())
    with capsys.disabled():
        print(f"\ntwo processes: {kills} kills, 0 lost")


def test_two_runs_into_one_folder_are_refused_and_a_killed_one_is_not_in_the_way(commands, tmp_path):
    command = [*commands["train"][0], "--workers", "2"]  # they live on for a moment, and must hold no lock
    first = start(command, tmp_path / "run")
    await_checkpoint(first, tmp_path / "run/last.pt")
    first.send_signal(signal.SIGSTOP)  # so that it cannot end before the second begins
    second = start(command, tmp_path / "run")
    _, error = second.communicate(timeout=120)
    assert second.returncode == 2 and "Another run is writing into" in error
    assert len(error.strip().splitlines()) <= 2
    first.kill()
    first.communicate()
    third = start([*command, *SELDOM, "--resume", str(tmp_path / "run")], tmp_path / "run")
    _, error = third.communicate(timeout=300)
    assert third.returncode == 0, error


def test_a_signal_in_a_validation_is_heard_there(tmp_path, monkeypatch, capsys):
    command, real, asked = [*SMALL, "--epochs", "2", "--output-dir"], train.task_loss, []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup

    def interrupt(*args, **how):
        if how.get("label_smoothing") == 0 and not asked:  # the first batch of the first validation
            asked.append(os.kill(os.getpid(), signal.SIGHUP))
        return real(*args, **how)

    train.main([*command, str(tmp_path / "whole")])
    monkeypatch.setattr(train, "task_loss", interrupt)
    with pytest.raises(SystemExit) as stopped:
        train.main([*command, str(tmp_path / "part")])
    assert stopped.value.code == run.RESUME_ME and "--resume" in capsys.readouterr().err
    assert files.read_checkpoint(tmp_path / "part/last.pt")["rows"] == []
    train.main(["--resume", str(tmp_path / "part")])
    whole, part = (files.read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "part"))
    assert same(whole["network"], part["network"])


def test_a_signal_before_the_first_step_ends_in_a_sentence(tmp_path):
    """While data are drawn; and a closed stderr and a reader that has gone do not end a run."""
    drawing = start(["train.py", *SMALL, "--train-images", "2000000"], tmp_path / "drawing")
    words = f"{sys.executable} {ROOT / 'train.py'} {' '.join(SMALL)} --epochs 1 --output-dir deaf"
    deaf = in_shell(f"{words} 2>&- | head -n 1", tmp_path)
    assert deaf.stdout.count("\n") == 1 and (tmp_path / "deaf/best.pt").exists(), deaf
    drawing.send_signal(signal.SIGTERM)  # by now it has begun
    _, error = drawing.communicate(timeout=100)
    assert drawing.returncode == 130 and error.strip() == "Stopped before there was anything to go on from."


def test_too_few_open_files_for_the_workers_end_in_a_sentence(tmp_path):
    fuzz.make_photos(tmp_path)
    flags = "--model dncnn-grey --data photos --grey --size 16 --batch-size 2 --workers 4 --device cpu"
    result = in_shell(f"ulimit -n 30; {sys.executable} {ROOT / 'train.py'} {flags}", tmp_path)
    assert result.returncode == 1 and "take fewer --workers" in result.stderr.splitlines()[-1]


# --- Folders of runs, images that change --------------------------------------------------------------------


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_new_run_sets_an_earlier_one_aside_and_a_resumed_one_brings_its_own(tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    train.main([*SMALL, "--epochs", "2", "--output-dir", str(first)])
    (first / ".last.pt.123.tmp").touch()  # of a killed run
    run._locks.clear()
    content = (first / "best.pt").read_bytes()
    train.main(["--resume", str(first), "--output-dir", str(second)])  # where the best epoch is past
    (second / "best.pt").rename(second / "mine.pt")
    with pytest.raises(SystemExit):
        train.main(["--resume", str(second)])  # all epochs are done
    assert "does not hold the best network of this run" in capsys.readouterr().err
    (second / "mine.pt").rename(second / "best.pt")
    train.main(["--resume", str(second)])
    assert (second / "best.pt").read_bytes() == content and (second / "summary.csv").exists()
    assert "second/best.pt" in capsys.readouterr().out
    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:  # before its first checkpoint
        train.main([*SMALL, "--output-dir", str(first)])
    assert stopped.value.code == 130 and "holds an earlier run, which is now in" in capsys.readouterr().out
    assert sorted(path.name for path in first.iterdir()) == [".lock", "previous-1"]
    assert (first / "previous-1/best.pt").read_bytes() == content


def test_a_run_whose_images_have_changed_is_refused_or_goes_on_as_told(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (20, 20), (9 * number, 0, 200 * (name == "dog"))).save(
                tmp_path / "data" / name / f"{number}.png")
    train.main([*SMALL, "--data", str(tmp_path / "data"), "--epochs", "2", "--output-dir",
                str(tmp_path / "run")])

    def refused(script, *argv):
        with pytest.raises(SystemExit) as stopped:
            script.main([*map(str, argv)])
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    for old, new in (("cat", "was"), ("dog", "cat"), ("was", "dog")):  # the same names, other pictures
        (tmp_path / "data" / old).rename(tmp_path / "data" / new)
    assert "24 changed" in refused(train, "--resume", tmp_path / "run")
    for old, new in (("cat", "was"), ("dog", "cat"), ("was", "dog")):
        (tmp_path / "data" / old).rename(tmp_path / "data" / new)
    train.main(["--resume", str(tmp_path / "run")])
    listed = files.read_checkpoint(tmp_path / "run/best.pt")["images"]
    gone = listed["test"].splitlines()[0].split(" ", 1)[1]
    (tmp_path / "data" / gone).rename(tmp_path / "data/dog/other.png")
    error = refused(train, "--resume", tmp_path / "run")
    assert gone in error and "dog/other.png" in error and "--accept-changes" in error
    train.main(["--resume", str(tmp_path / "run"), "--accept-changes"])
    capsys.readouterr()
    evaluation.main(["--checkpoint", str(tmp_path / "run/best.pt"), "--no-latency", "--sigmas", "0",
                     "--output-dir", str(tmp_path / "eval")])
    assert f"1 gone ({gone}), 1 new (dog/other.png)" in capsys.readouterr().err
    measured = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert measured["images"] == len(listed["test"].splitlines()) - 1  # the new one may be of the training


def test_what_a_record_says_is_data_and_never_a_flag(tmp_path, capsys):
    images = dict.fromkeys(("noise", "sigma", "sigma_levels", "grey", "crops", "train_folders"))
    record = registry.named_record("mb1-s", 10, files.provenance("a CPU", 0)) | {
        "images": {**images, "sigmas": ["0.1", "--output-dir", str(tmp_path / "elsewhere")]}}
    files.write_json(tmp_path / "arch.json", record)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--arch", str(tmp_path / "arch.json"), "--output-dir", str(tmp_path / "run")])
    assert stopped.value.code == 2 and "--sigmas of the record" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("script, words, code, sentence", [
    ("train", "--model cnas-k3-e3 --size 65536", 1, "there is not enough memory"),
    ("train", f"--model cnas-k3-e3 --data {'x' * 5000}", 2, "cannot be used"),
    ("train", f"--resume {'x' * 5000}", 2, "cannot be used"),
    ("train", "--model cnas-k3-e3 --data mnist --data-root .", 2, "MNIST was not found"),
    ("train", "--arch huge.json", 2, "parameters, more than any of this project"),
    ("train", "--epochs=--", 2, "a value is missing"),
    ("search", "--target 2.5000001,2.5000002", 2, "two targets are the same"),
    ("latency", "--output huge.json/t.json", 2, "cannot be written"),
    ("latency", "--threads 65536", 2, "--threads"),
    ("eval", "--checkpoint none.pt", 2, "train.py and search.py write them"),
])
def test_what_cannot_work_is_refused_before_the_work(script, words, code, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"MNIST/raw/{name}-ubyte").write_bytes(b"abc")
    arch = models.named_arch("cnas-k3-e3", 65536).to_dict() | {"head_channels": 65536}
    files.write_json("huge.json", files.make_record("tfnas", arch, files.provenance("a CPU", 0)))
    error = io.StringIO()
    assert fuzz.call(script, *words.split(), error=error) == code
    assert sentence in error.getvalue().splitlines()[-1]


# --- Checkpoints with wrong bytes ---------------------------------------------------------------------------


def test_every_changed_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "c.pt"
    files.save_checkpoint(path, {"weights": torch.randn(4000), "number": 3})
    good, rng = path.read_bytes(), random.Random(0)
    with zipfile.ZipFile(path) as archive:
        tensor = max(archive.infolist(), key=lambda entry: entry.file_size)
    start = good.index(torch.load(path)["weights"].numpy().tobytes())
    for place in rng.sample(range(start, start + tensor.file_size), 50):
        damaged = bytearray(good)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="checksum of .* is wrong"):
            files.read_checkpoint(path)
    path.write_bytes(good[:start] + bytes(5000) + good[start + 5000:])
    with pytest.raises(ValueError, match="checksum of .* is wrong"):
        files.read_checkpoint(path)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """A file of 300 kB that would need 256 MB."""
    files.save_checkpoint(tmp_path / "c.pt", {"weights": torch.zeros(2**26)})
    with zipfile.ZipFile(tmp_path / "c.pt") as archive, zipfile.ZipFile(
            tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in archive.infolist():
            small.writestr(entry.filename, archive.read(entry))
    assert (tmp_path / "small.pt").stat().st_size < 1e6
    with pytest.raises(ValueError, match="it is compressed"):
        files.read_checkpoint(tmp_path / "small.pt")


def test_a_run_stopped_after_the_last_step_of_an_epoch_goes_on(tmp_path, monkeypatch):
    """Between its last step and its validation: nothing of the epoch is left to do but that."""
    command = [*SMALL, "--epochs", "2", "--output-dir"]
    train.main([*command, str(tmp_path / "whole")])
    steps, real = [], run.Guard.end_of_step

    def stop_at_five(guard, save):  # of 40 images in batches of 8
        steps.append(1)
        guard.stop = guard.stop or len(steps) == 5
        real(guard, save)

    monkeypatch.setattr(run.Guard, "end_of_step", stop_at_five)
    with pytest.raises(SystemExit) as stopped:
        train.main([*command, str(tmp_path / "part")])
    assert stopped.value.code == run.RESUME_ME
    assert files.read_checkpoint(tmp_path / "part/last.pt")["step"] == 5
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "part")])
    whole, part = (files.read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "part"))
    assert same(whole["network"], part["network"]) and len(part["rows"]) == 2


def test_a_value_that_no_run_writes_ends_in_a_sentence(tmp_path, capsys):
    train.main([*SMALL, "--epochs", "1", "--output-dir", str(tmp_path)])
    setting = {"device_type": "cpu", "batch": 1, "threads": 1, "dtype": "float99", "mode": "eager"}
    for name, script, argv, changed, sentence in (
            ("best.pt", evaluation, ["--checkpoint"], {"record": {"latency": {"setting": setting}}},
             "latency"),
            ("last.pt", train, ["--resume"], {"best": {"epoch": 1}}, "its best epoch is none of its epochs")):
        content = files.read_checkpoint(tmp_path / name)
        content |= {key: {**content[key], **value} if key == "record" else value
                    for key, value in changed.items()}
        files.save_checkpoint(tmp_path / "odd.pt", content)
        with pytest.raises(SystemExit) as stopped:
            script.main([*argv, str(tmp_path / "odd.pt"), "--output-dir", str(tmp_path / "out")])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    for epoch in (None, "x", 0):
        content = files.read_checkpoint(tmp_path / "best.pt")
        files.save_checkpoint(tmp_path / "best.pt", content | {"epoch": epoch})
        with pytest.raises(SystemExit):
            train.main(["--resume", str(tmp_path)])
        assert "does not hold the best network of this run" in capsys.readouterr().err


def test_a_resumed_search_does_not_need_the_file_of_its_table(tmp_path, monkeypatch, capsys):
    quick_compare(monkeypatch)
    files.write_json(tmp_path / "t.json", fake_table(size=16))
    search.main([*SEARCH[1:], "--table", str(tmp_path / "t.json"), "--output-dir", str(tmp_path / "run")])
    found = files.load_record(tmp_path / "run/arch.json")
    for name in ("t.json", "run/arch.json"):
        (tmp_path / name).unlink()
    search.main(["--resume", str(tmp_path / "run")])
    assert files.load_record(tmp_path / "run/arch.json")["blocks"] == found["blocks"]


def test_a_compiler_that_is_missing_is_said_in_a_sentence(monkeypatch, capsys):
    from torch._inductor.exc import InvalidCxxCompiler

    monkeypatch.setattr(latency, "measure_network", lambda *_: (_ for _ in ()).throw(InvalidCxxCompiler()))
    with pytest.raises(SystemExit) as stopped:
        latency.main(["--model", "mb1-s", "--mode", "compile"])
    assert "it needs a C++ compiler" in stopped.value.code


@pytest.mark.parametrize("script", ["registry.py", "data.py"])
def test_a_reader_who_has_gone_ends_no_command_in_a_traceback(script, tmp_path):
    done = in_shell(f"set -o pipefail; python {Path(data.__file__).with_name(script)} | true", tmp_path)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


def test_a_checkpoint_of_an_older_version_ends_in_a_sentence(tmp_path, capsys):
    files.save_checkpoint(tmp_path / "last.pt", {"flags": {}, "optimizer": {}, "rows": []})
    with pytest.raises(SystemExit) as stopped:
        train.main(["--resume", str(tmp_path)])
    assert stopped.value.code == 2 and "not a last.pt that a run can go on from" in capsys.readouterr().err
    files.save_checkpoint(tmp_path / "search.pt", {"flags": {}, "step": 0, "optimizer": {}})  # of a training
    with pytest.raises(SystemExit) as stopped:
        search.main(["--resume", str(tmp_path)])
    assert stopped.value.code == 2 and "not a search.pt that a run can go on from" in capsys.readouterr().err


def test_a_signal_to_the_whole_job_with_workers_is_saved(tmp_path):
    command = ["train.py", *SMALL, "--train-images", "800", "--epochs", "50", "--workers", "2"]
    process = start(command, tmp_path, start_new_session=True)
    await_checkpoint(process, tmp_path / "last.pt")
    os.killpg(process.pid, signal.SIGTERM)  # as timeout and systemd do
    _, error = process.communicate(timeout=120)
    assert process.returncode == run.RESUME_ME
    assert_says_how_to_go_on(command, error)


# --- A full disk, a loss that is not finite -----------------------------------------------------------------


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    real, saved = torch.save, []

    def full(content, path):
        real(content, path)
        saved.append(path)
        if len(saved) <= 2:  # best.pt and last.pt of the first epoch
            return
        Path(path).write_bytes(Path(path).read_bytes()[:1000])  # as far as the disk went
        raise RuntimeError("[enforce fail at inline_container.cc:595] . PytorchStreamWriter failed writing")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        train.main([*SMALL, "--epochs", "2", "--output-dir", str(tmp_path)])
    assert "could not be written" in str(stopped.value.code) and "intact" in str(stopped.value.code)
    monkeypatch.undo()
    assert len(files.read_checkpoint(tmp_path / "last.pt")["rows"]) == 1 and not list(tmp_path.glob(".*.tmp"))
    train.main(["--resume", str(tmp_path)])
    assert len(files.read_checkpoint(tmp_path / "last.pt")["rows"]) == 2


def test_a_checkpoint_that_cannot_be_read_back_does_not_replace_the_last_one(tmp_path, monkeypatch):
    files.save_checkpoint(tmp_path / "c.pt", {"number": 1})
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda content, path: (
        real(content, path), Path(path).write_bytes(b"PK\3\4 half")))
    with pytest.raises(OSError, match="could not be written"):
        files.save_checkpoint(tmp_path / "c.pt", {"number": 2})
    monkeypatch.undo()
    assert files.read_checkpoint(tmp_path / "c.pt")["number"] == 1


def spoil(monkeypatch, steps, value=float("nan")):
    """The training loss of these steps, counted from 1, is multiplied by `value`."""
    real, calls = train.task_loss, []

    def bad(output, *args, **kwargs):
        total, parts = real(output, *args, **kwargs)
        if output.logits.requires_grad:
            calls.append(1)
            if len(calls) in steps:
                total = total * value
        return total, parts

    monkeypatch.setattr(train, "task_loss", bad)


def test_steps_that_are_not_finite_are_skipped_when_told(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {2, 3, 7})
    train.main([*SMALL, "--epochs", "2", "--nonfinite", "skip", "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("skipped epoch") == 3 and "skipped epoch 2, batch 2: the loss is nan" in out
    state = files.read_checkpoint(tmp_path / "last.pt")
    assert all(torch.isfinite(value).all() for value in state["network"].values()) and state["epoch"] == 2


def test_skipping_has_a_limit(tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(3, 100)))
    with pytest.raises(SystemExit) as stopped:
        train.main([*SMALL, "--train-images", "200", "--epochs", "2", "--nonfinite", "skip", "--output-dir",
                    str(tmp_path)])
    message = str(stopped.value.code)
    assert "The loss is nan at epoch 1, batch 13" in message and "10 steps in a row" in message


def test_an_epoch_of_which_every_step_was_skipped_ends_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(6, 11)))
    with pytest.raises(SystemExit) as stopped:
        train.main([*SMALL, "--epochs", "3", "--nonfinite", "skip", "--output-dir", str(tmp_path)])
    assert "Every step of epoch 2 was skipped, since the loss is nan" in str(stopped.value.code)
    assert files.read_checkpoint(tmp_path / "last.pt")["epoch"] == 1


def test_a_bad_batch_does_not_spoil_the_statistics_of_batch_norms(tmp_path, monkeypatch):
    real, calls = data.to_float, []

    def bad(images, device):
        calls.append(1)
        return real(images, device) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(data, "to_float", bad)
    train.main([*SMALL, "--epochs", "1", "--nonfinite", "skip", "--output-dir", str(tmp_path)])
    state = files.read_checkpoint(tmp_path / "last.pt")
    assert len(calls) > 5 and all(torch.isfinite(value).all() for value in state["network"].values())


# --- What is odd or damaged ---------------------------------------------------------------------------------


def test_what_is_odd_or_damaged_ends_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "build_table", lambda setting, space, **_: fake_parts(space, setting.size))
    tried, failures = fuzz.run(tmp_path, 42, seed=0)
    assert not failures, "\n\n".join(failures[:5])
    assert {code for _, code in tried.counts} >= {0, 2}


@pytest.mark.slow
def test_six_thousand_cases(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tried, failures = fuzz.run(tmp_path, 6000, seed=1)
    with capsys.disabled():
        print(f"\nseed 1, {sum(tried.counts.values()):,} cases by kind and exit code: {dict(tried.counts)}; "
              f"{len(failures)} failures")
    assert not failures, "\n\n".join(failures[:10])
