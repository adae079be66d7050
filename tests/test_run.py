"""run.py: where flags get their values, forecasts, sums, and what guards a step."""

import argparse
import errno
import io
import os
import signal
import sys
import types

import pytest
import torch

import data
import files
import run


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when told: `now`."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(run.time, "monotonic", lambda: clock.now)
    return clock


# --- flags -----------------------------------------------------------------------------------------------


def make_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    data.add_data_arguments(parser)
    data.add_noise_arguments(parser)
    parser.add_argument("--epochs", type=data.whole(1, 100), default=25)
    parser.add_argument("--lr", type=data.number(0, 1))
    parser.add_argument("--target", type=lambda text: [float(part) for part in text.split(",")])
    run.add_run_arguments(parser, "runs/x")
    return parser


def values(argv, *layers):
    return run.resolve(make_parser(), argv, *layers)


def test_the_command_line_comes_before_the_layers_and_these_before_the_defaults():
    given = run.given_flags(make_parser(), ["--epochs", "25", "--no-grey", "--target", "6,8"])
    assert given == {"epochs": 25, "grey": False, "target": [6.0, 8.0]}
    args = values(["--epochs", "3"], {"epochs": 5, "lr": 0.1, "seed": 4}, {"seed": 7, "lr": None, "flag": 1})
    assert (args.epochs, args.lr, args.seed, args.output_dir) == (3, 0.1, 7, "runs/x")
    assert not hasattr(args, "flag")
    assert values(["--epochs", "25"], {"epochs": 5}).epochs == 25  # given, though it is the default
    record = {"data": "photos", "train_folders": ["--a", "b c"], "grey": True, "crops": 2,
              "noise": "gaussian", "sigmas": [15 / 255, 0.2], "target": [6.0, 8.0]}
    args = values([], record)
    assert {name: getattr(args, name) for name in record} == record


def test_the_ways_to_give_noise_levels_are_one_choice():
    searched = {"sigma": 0.3, "sigma_levels": 11}
    for argv, layers, expected in (
            ([], [searched], (0.3, 11, None)),
            ([], [searched, {"sigmas": [0.1]}], (None, 0, [0.1])),
            (["--sigma", "0.5"], [{"sigmas": [0.1]}], (0.5, 0, None)),
            (["--sigma-levels", "5"], [{"sigmas": [0.1]}], (None, 5, None)),
            (["--sigmas", "25/255"], [searched], (None, 0, [25 / 255])),
            (["--epochs", "2"], [searched, {"sigma": None}], (0.3, 11, None))):
        args = values(argv, *layers)
        assert (args.sigma, args.sigma_levels, args.sigmas) == expected
    parser = make_parser()
    parser.set_defaults(sigmas=[0.2], sigma=0.7)  # as a search method does
    assert run.resolve(parser, []).sigmas == [0.2]
    args = run.resolve(parser, ["--sigma-levels", "3"])
    assert (args.sigma, args.sigma_levels, args.sigmas) == (0.7, 3, None)


def test_the_noise_depends_on_the_images_where_none_is_asked_for():
    for classes, given, sigma in ((["cat"], None, 1.0), (None, None, 55 / 255), (None, 0.0, 0.0)):
        flags = {"sigma": given}
        run.fill_sigma(flags, types.SimpleNamespace(classes=classes))
        assert flags["sigma"] == sigma


@pytest.mark.parametrize("layer, sentence", [
    ({"sigma": -1}, "--sigma of the record or checkpoint must not be '-1'"),
    ({"sigma": "much"}, "--sigma .* must not be 'much'"),
    ({"sigma": True}, "--sigma "),
    ({"sigma": {"a": 1}}, "--sigma "),
    ({"sigmas": 0.1}, "--sigmas .*a list is needed"),
    ({"sigmas": [0.1, [0.2], "x"]}, "--sigmas "),
    ({"sigma_levels": 2.5}, "--sigma-levels .* must not be '2.5'"),
    ({"noise": "--seed"}, "--noise .*possible are gaussian, poisson-gaussian, camera"),
    ({"grey": "yes"}, "--grey .*true or false is needed"),
    ({"epochs": 101}, "--epochs .*from 1 to 100, not 101"),
])
def test_values_of_a_record_are_checked_as_those_of_a_command_line(layer, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        values([], layer)
    assert "\n" not in str(caught.value)


def test_words_in_a_record_stay_values():
    args = values([], {"data": "--output-dir=elsewhere", "train_folders": ["--seed=3"]})
    assert (args.data, args.train_folders) == ("--output-dir=elsewhere", ["--seed=3"])
    assert (args.output_dir, args.seed) == ("runs/x", 0)


def test_a_resumed_run_keeps_its_settings():
    before = {"epochs": 5, "lr": None, "device": "cuda", "gone": 3}
    run.check_resumed(before, {"epochs": 5, "lr": None, "device": "cpu", "new": 1})
    with pytest.raises(ValueError, match="but --epochs, --lr differ: leave them out"):
        run.check_resumed(before, {"epochs": 6, "lr": 0.1, "device": "cpu"})
    assert run.run_flags({"seed": 1, "resume": None, "output_dir": "x"}) == {"seed": 1}


def test_what_a_run_goes_on_from(tmp_path):
    files.save_checkpoint(tmp_path / "last.pt", {
        "flags": {}, "step": 3, "optimizer": {}, "rows": [], "sums": {}})
    for path in (tmp_path, tmp_path / "last.pt"):
        state, folder = run.resume_state(path, "last.pt", "optimizer")
        assert state["step"] == 3 and folder == tmp_path
    for path, needed in ((tmp_path, "searcher"), (tmp_path / "other.pt", "optimizer")):
        with pytest.raises(ValueError, match="a last.pt that a run can go on from|checkpoint at .*other.pt"):
            run.resume_state(path, "last.pt", needed)


def test_every_flag_of_a_run_has_its_default_in_words():
    parser = argparse.ArgumentParser()
    run.add_run_arguments(parser, "runs/x")
    text = parser.format_help()
    assert "None" not in text and all("(default: " in action.help for action in parser._actions[1:])
    assert all(group.description for group in parser._action_groups[2:])


# --- what the user is told -------------------------------------------------------------------------------


def test_messages_appear_at_once_and_of_the_first_process_only(monkeypatch):
    class Pipe(io.StringIO):
        seen = ""

        def flush(self):
            self.seen = self.getvalue()

    out, err = Pipe(), Pipe()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    run.say("a line")
    run.say("another", err=True)
    assert (out.seen, err.seen) == ("a line\n", "another\n")
    monkeypatch.setattr(run, "rank_and_world", lambda: (1, 2))
    run.say("not this")
    assert out.getvalue() == "a line\n"


def test_a_forecast_is_said_once_within_half_a_minute(clock, capsys):
    forecast = run.Forecast("training", 101)
    assert forecast.left_s() == 0
    clock.now += 6
    forecast.done()  # the first one is slow, and does not count
    for _ in range(2):
        clock.now += 2
        assert capsys.readouterr().out == ""
        forecast.done()
    assert capsys.readouterr().out == "training: about 3 min in all\n"  # 10 s, and 98 parts of 2 s
    assert forecast.left_s() == pytest.approx(98 * 2)
    clock.now += 20
    forecast.done(10)
    assert capsys.readouterr().out == "" and forecast.left_s() == pytest.approx(88 * (4 + 20) / 12)


def test_a_forecast_of_slow_parts_and_of_what_is_nearly_done(clock, capsys):
    for parts, seconds, said in ((1000, 25, "x: about 6.9 h in all\n"), (30, 11, ""), (3, 5, "")):
        forecast = run.Forecast("x", parts)
        for _ in range(1 if seconds > 5 else 3):
            clock.now += seconds
            forecast.done()
        assert capsys.readouterr().out == said, parts


def test_tracked_items_make_a_forecast_without_a_terminal(clock, capsys):
    forecast, seen = run.Forecast("pictures", 110), []
    for item in run.track("abcdef", "pictures", 6, forecast=forecast):
        clock.now += 4
        seen.append(item)
    assert seen == list("abcdef")
    captured = capsys.readouterr()
    assert captured.out == "pictures: about 7 min in all\n" and captured.err == ""  # 110 parts of 4 s
    assert list(run.track(iter("cd"), "rest", 4, first=2)) == ["c", "d"]


@pytest.mark.parametrize("seconds, text", [(3.4, "3 s"), (89, "89 s"), (150, "2 min"), (5300, "88 min"),
                                           (9000, "2.5 h")])
def test_durations_in_words(seconds, text):
    assert run.format_duration(seconds) == text


def test_sums_and_their_means_over_processes(monkeypatch):
    sums = run.Sums()
    for value, count in ((torch.tensor(6.0), 3), (torch.tensor(2.0), 1)):
        sums.add("loss", value, count)
    sums.add("other", 5.0)
    assert sums.local_mean("loss") == 2.0 and sums.local_mean("none") == 0
    assert sums.gather() == {"loss": [8.0, 4], "other": [5.0, 1]}
    assert run.Sums(sums.gather()).means() == {"loss": 2.0, "other": 5.0}  # from a checkpoint
    monkeypatch.setattr(run, "sum_over_processes", lambda values: [2 * value for value in values])
    assert sums.gather() == {"loss": [16.0, 8], "other": [10.0, 2]}  # two processes with the same
    monkeypatch.setattr(run, "rank_and_world", lambda: (1, 2))  # the first one goes on with what was gathered
    assert run.Sums({"loss": [8.0, 4]}).pairs == {"loss": [0.0, 0]}


# --- processes and folders -------------------------------------------------------------------------------


def test_the_first_process_makes_its_part_before_the_others(monkeypatch):
    calls = []
    monkeypatch.setattr(run.distributed, "barrier", lambda: calls.append("barrier"))
    for rank, expected in ((0, ["made", "barrier"]), (1, ["barrier", "made"])):
        monkeypatch.setattr(run, "rank_and_world", lambda rank=rank: (rank, 2))
        calls.clear()
        assert run.in_turn(lambda: calls.append("made") or 3) == 3 and calls == expected
    monkeypatch.setattr(run, "rank_and_world", lambda: (0, 2))
    with pytest.raises(ZeroDivisionError):  # the others do not wait for what failed
        run.in_turn(lambda: 1 / 0)
    assert calls[-1] == "barrier"


def test_a_batch_is_split_among_processes(monkeypatch, capsys):
    assert run.split_batch_size(3) == 3 and capsys.readouterr().out == ""
    monkeypatch.setattr(run, "rank_and_world", lambda: (0, 2))
    assert run.split_batch_size(8) == 4
    assert capsys.readouterr().out == "2 processes of 4 images, 8 a step; the learning rate is for 8\n"
    for size in (7, 2):
        with pytest.raises(ValueError, match=f"--batch-size {size} .* multiple of 2, of 2 images each"):
            run.split_batch_size(size)


def test_a_device_that_torch_cannot_use_is_named():
    assert run.prepare_device("cpu", None, 0) == torch.device("cpu")
    for name in ("meta", "quantum", "cuda:99"):
        with pytest.raises(ValueError, match=f"The device '{name}' cannot be used here"):
            run.check_device(name)
    assert run.choose_amp(torch.device("cpu"), None) == "off"
    assert run.choose_amp(torch.device("cuda"), None) == "bfloat16"
    assert run.choose_amp(torch.device("cuda"), "off") == "off"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/x cannot be made .*; name another one"):
        run.lock_folder(tmp_path / "file" / "x")
    run.lock_folder(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / ".lock").exists()


def test_a_run_resumed_elsewhere_sets_aside_what_lies_there(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("last.pt", "best.pt"):
            (tmp_path / folder / name).write_text(f"{name} of {folder}")
    (tmp_path / "b/summary.csv").write_text("of b")
    run.begin_folder(tmp_path / "a", ("last.pt", "best.pt", "summary.csv"), tmp_path / "a/last.pt")
    assert not (tmp_path / "a/previous-1").exists()  # it goes on there
    run.begin_folder(tmp_path / "b", ("last.pt", "best.pt", "summary.csv"), tmp_path / "a")
    assert (tmp_path / "b/best.pt").read_text() == "best.pt of a"
    assert not (tmp_path / "b/summary.csv").exists() and "earlier run" in capsys.readouterr().out
    assert (tmp_path / "b/previous-1/summary.csv").read_text() == "of b"


def test_only_who_holds_a_folder_removes_temporary_files(tmp_path, monkeypatch):
    (tmp_path / ".last.pt.1.tmp").touch()
    with monkeypatch.context() as held:
        for number, kind, message in ((errno.EAGAIN, run.Busy, "Another run is writing"),
                                      (errno.ENOLCK, ValueError, "cannot be locked .* on another disk")):
            held.setattr(run.fcntl, "lockf", lambda *_, n=number: (_ for _ in ()).throw(OSError(n, "as is")))
            with pytest.raises(kind, match=message):
                run.lock_folder(tmp_path)
    assert (tmp_path / ".last.pt.1.tmp").exists()
    run.lock_folder(tmp_path)
    assert not (tmp_path / ".last.pt.1.tmp").exists()
    run.unlock_folder(tmp_path)
    assert tmp_path.resolve() not in run._locks
    run.unlock_folder(tmp_path)


@pytest.mark.parametrize("number", (errno.EPIPE, errno.EIO))
def test_a_reader_that_has_gone_does_not_end_a_run(number, monkeypatch):
    def gone(*_, **__):
        raise OSError(number, "gone")

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(run.tqdm, "write", gone)
    run.say("a line")
    monkeypatch.undo()
    run.say("a line")


def test_images_and_classes_of_a_resumed_run(capsys):
    same = types.SimpleNamespace(name="photos", classes=["cat", "dog"], changes="")
    run.check_images(same, None, False)
    run.check_images(same, {"classes": ["cat", "dog"]}, False)
    changed = types.SimpleNamespace(name="photos", classes=["cat", "dog"], changes="1 gone (x.png)")
    with pytest.raises(ValueError, match="1 gone .*--accept-changes"):
        run.check_images(changed, {}, False)
    run.check_images(changed, {}, True)
    assert "1 gone" in capsys.readouterr().out
    with pytest.raises(ValueError, match="classes of photos are others"):
        run.check_images(changed, {"classes": ["dog", "zebra"]}, True)


@pytest.mark.parametrize("written, code, text", [(True, 75, "python train.py --resume 'a run'"),
                                                 (False, 130, "before there was anything")])
def test_after_a_signal_it_says_how_to_go_on(written, code, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "last.pt").touch()
    parser = argparse.ArgumentParser("train.py")
    with pytest.raises(SystemExit) as caught, run.Command(parser, "last.pt") as command:
        command.folder = "a run"
        command.started = (tmp_path / "a run" / "last.pt").stat().st_mtime + (0 if written else 1)
        raise run.Stopped
    assert caught.value.code == code and text in capsys.readouterr().err


# --- steps -----------------------------------------------------------------------------------------------


def make_step(lr=0.1):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    return layer, torch.optim.SGD(layer.parameters(), lr, 0.9), torch.amp.GradScaler("cpu", enabled=False)


def test_a_step_is_clipped_and_taken():
    layer, optimizer, scaler = make_step()
    other, plain, _ = make_step()
    for _ in range(3):
        x = torch.randn(4, 3) * 10
        for each, optim in ((layer, optimizer), (other, plain)):
            optim.zero_grad()
            loss = each(x).square().sum()
            loss.backward()
            if each is layer:
                assert run.take_step(loss, layer.parameters(), optimizer, scaler, run.Guard(), 0.5, "a step")
            else:
                torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
                plain.step()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters()))


@pytest.mark.parametrize("spoilt, words", [("loss", "loss is nan"), ("gradient", "gradient is not finite")])
def test_a_step_that_is_not_finite_is_refused_or_skipped(spoilt, words, capsys):
    layer, optimizer, scaler = make_step()
    norm = torch.nn.BatchNorm1d(2)
    before = [value.clone() for value in (*layer.parameters(), *norm.buffers())]

    def step(guard, bad=True):
        guard.remember(norm)
        optimizer.zero_grad()
        loss = norm(layer(torch.randn(4, 3))).square().sum()
        loss = loss * float("nan") if bad and spoilt == "loss" else loss
        loss.backward()
        if bad and spoilt == "gradient":
            layer.weight.grad[0, 0] = float("inf")
        return run.take_step(loss, layer.parameters(), optimizer, scaler, guard, 5.0, "epoch 2, batch 3")

    again = "--resume with --nonfinite skip goes on"
    with pytest.raises(run.TrainingError, match=f"The {words} at epoch 2, batch 3 .*{again}"):
        step(run.Guard())
    norm.reset_running_stats()
    guard = run.Guard("skip")
    for _ in range(guard.SKIPS):
        assert not step(guard)
    line = f"skipped epoch 2, batch 3: the {words} (learning rate 0.1)\n"
    assert capsys.readouterr().out == line * guard.SKIPS
    after = (*layer.parameters(), *norm.buffers())
    assert all(torch.equal(one, other) for one, other in zip(before, after))
    with pytest.raises(run.TrainingError, match="10 steps in a row were skipped"):
        step(guard)
    with pytest.raises(run.TrainingError, match=f"Every step of epoch 4 was skipped, since the {words}"):
        guard.end_of_epoch(4, taken=False)
    norm.reset_running_stats()
    assert step(guard, bad=False) and guard.skipped == 0


def test_a_signal_lets_the_step_end_and_a_second_one_stops_at_once(clock):
    saved, loss, before = [], torch.tensor(1.0), signal.getsignal(signal.SIGINT)  # perhaps ignored
    with pytest.raises(run.Stopped):
        with run.Guard() as guard:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # within two seconds: torchrun repeats it
            guard.reduce([], loss)
            guard.end_of_step(lambda: saved.append(1))
    assert saved == [1]
    with pytest.raises(KeyboardInterrupt):
        with run.Guard():
            os.kill(os.getpid(), signal.SIGINT)
            clock.now += 3
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_is_due_after_its_minutes(clock):
    guard, saved = run.Guard(save_minutes=2), []
    for _ in range(5):
        clock.now += 50
        guard.reduce([], torch.tensor(1.0))
        guard.end_of_step(lambda: saved.append(clock.now))
    assert saved == [250.0]


def test_frozen_parameters_get_no_gradient():
    layer, _, _ = make_step()
    with pytest.raises(ZeroDivisionError):
        with run.frozen([layer.weight]):
            layer(torch.ones(3)).sum().backward()
            raise ZeroDivisionError
    assert layer.weight.grad is None and layer.bias.grad is not None and layer.weight.requires_grad
