"""reproduce.py: the tables fit together, and the smallest of each kind runs, goes on, and says what holds."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

import files
import latency
import registry
import reproduce
import search
import tfnas
from fake_table import fake_table

PAPER = [f"table-{number}" for number in range(1, 11)] + ["figure-5", "figure-6", "figure-9"]
OTHERS = ["mozejko-1", "mozejko-3", *(f"zhang-{number}" for number in range(1, 8))]
TINY = ["--scale", "tiny", "--threads", "1", "--device", "cpu"]


def test_every_table_and_figure_of_the_papers_is_there_and_fits():
    assert list(reproduce.TABLES) == PAPER + OTHERS
    runs = {}
    for table in reproduce.TABLES.values():
        assert len({label for label, _, _ in table.rows}) == len(table.rows)
        for _, run, published in table.rows:
            assert runs.setdefault(run.name, run) == run  # one name, one run
            assert set(published) <= {*table.columns}
            if run.kind in reproduce.STUDY:
                assert registry.find_named(run.name)
        complete = {label: dict.fromkeys(table.columns, index)
                    for index, (label, _, _) in enumerate(table.rows, 1)}
        for text, claim, (least, most) in table.claims:  # KeyError where it names a row that is not there
            assert text and isinstance(claim(complete), (int, float)) and least < most
    for run in runs.values():
        assert run.from_run is None or runs[run.from_run].search
        assert (bool(run.search) == (run.target is not None)) or run.kind in registry.METHODS


def test_the_interval_of_student_by_hand():
    """sd 1, 2 degrees of freedom: 4.303 / sqrt(3); of the same values it has no width."""
    assert reproduce.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-4)
    assert reproduce.interval([5.0, 5.0]) == (5.0, 5.0)


def test_claims_are_judged_by_the_interval_of_their_values():
    rows = [("a", [{"x": 3.0}, {"x": 5.0}, {"x": 4.0}], {}), ("b", [{"x": 2.0}, {"x": 2.0}, {"x": 2.0}], {}),
            ("c", None, {})]
    claims = (reproduce.beats("a", "b", "x"), reproduce.beats("a", "b", "x", -1),
              reproduce.beats("a", "c", "x"), reproduce.beats("b", "a", "x", 1),
              reproduce.is_close("a", "b", "x", 9), reproduce.is_close("a", "b", "x", 2))
    verdicts = reproduce.judge_claims(claims, reproduce.summarise(("x",), rows)[1])
    assert [v["verdict"] for v in verdicts] == ["undecided", "holds", "not run", "does not hold", "holds",
                                                "undecided"]
    assert [v["values"] for v in verdicts[:3]] == [[1, 3, 2], [1, 3, 2], []]
    assert [reproduce.format_claim(v).strip() for v in verdicts[:3]] == [
        "undecided: x of a > x of b (+2, -0.484 to +4.48)", "holds: x of a > x of b -1 (+2, -0.484 to +4.48)",
        "not run: x of a > x of c"]
    single = [(label, seeds and seeds[:1], {}) for label, seeds, _ in rows]
    verdicts = reproduce.judge_claims(claims, reproduce.summarise(("x",), single)[1])
    assert [v["verdict"] for v in verdicts] == ["one seed for", "one seed for", "not run", "one seed against",
                                                "one seed for", "one seed for"]
    assert reproduce.format_claim(verdicts[0]).strip() == "one seed for: x of a > x of b (+1)"


def test_a_table_shows_means_spreads_the_papers_numbers_and_what_was_not_run():
    rows = [("one", [{"PSNR dB": 20.0}, {"PSNR dB": 21.0}], {"PSNR dB": 25.4}), ("two", None, {}),
            ("three", [{}], {})]
    text, records = reproduce.summarise(("PSNR dB",), rows)
    lines = text.splitlines()
    assert "20.50 ±0.5 (25.4)" in lines[1] and "not run" in lines[2] and lines[3].split() == ["three", "-"]
    assert records[0]["ours"]["PSNR dB"] == {"mean": 20.5, "half_range": 0.5, "values": [20.0, 21.0]}


def test_a_table_of_the_study_runs_and_is_not_run_again(tmp_path, capfd, in_this_process):
    command = ["table-1", *TINY, "--digits", "--skip", "dcnet", "dcnet-seq", "--output-dir", str(tmp_path)]
    reproduce.main(command)
    out = capfd.readouterr().out
    assert "scaled down" in out and "not run: PSNR dB of Integrated, baseline > " in out
    content = json.loads((tmp_path / "tiny/table-1.json").read_text())
    rows = {row["label"]: row for row in content["rows"]}
    assert rows["Integrated, reduced"]["ours"]["MACs M"]["mean"] == pytest.approx(49.17, abs=0.01)
    assert rows["Integrated, baseline"]["ours"] == {}
    assert rows["Integrated, reduced"]["paper"]["PSNR dB"] == 29.9
    measured = json.loads((tmp_path / "tiny/digit-pairs/dcnet-s/seed-0/eval/metrics.json").read_text())
    assert measured["split"] == "test" and measured["images"] == 10
    reproduce.main(command)
    assert "$ python" not in capfd.readouterr().out


def test_a_searched_table_runs(tmp_path, capfd, in_this_process):
    for split, count in (("train", 12), ("val", 6)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 40), (40 * index % 256, 90 * number, 50)).save(folder / f"{index}.png")
    # A real table takes half a minute.
    files.write_json(tmp_path / "runs/tiny/photos/latency.json", fake_table(8, 32, 2))
    reproduce.main(["table-6", *TINY, "--data", str(tmp_path / "photos"), "--skip", "dcnas-m-clean-mb",
                    "dcnas-m-clean-mb-3level", "--output-dir", str(tmp_path / "runs")])
    out = capfd.readouterr().out
    assert "MBConv, 1 operation" in out
    assert out.count("$ python search.py") == 1  # both rows train what one search found
    trained = files.read_checkpoint(tmp_path / "runs/tiny/photos/dcnas-m-clean-mb-1/seed-0/train/best.pt")
    assert trained["record"]["decoder"] == "mb-1"


@pytest.mark.parametrize("names, runs", (
    (["mozejko-1"], {"superkernel-skipinit-1-strategy-plain", "superkernel-skipinit-1-structure-filterwise"}),
    (["zhang-6", "zhang-7"], {"hinas", "zhang-6-r2", "hinas-sr-x4", "zhang-7-r1"})))
def test_a_table_of_another_paper_runs(names, runs, tmp_path, capfd, in_this_process):
    for split in ("train", "val", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for index in range(6):
            Image.effect_noise((48, 48), 50).convert("RGB").save(tmp_path / "photos" / split / f"{index}.png")
    every = {run.name for name in names for _, run, _ in reproduce.TABLES[name].rows}
    command = [*names, *TINY, "--data", str(tmp_path / "photos"), "--skip", *sorted(every - runs),
               "--output-dir", str(tmp_path / "runs")]
    reproduce.main(command)
    out = capfd.readouterr().out
    assert out.count("$ python search.py") == 2 and out.count("$ python train.py") == len(runs)
    for name in names:
        content = json.loads((tmp_path / f"runs/tiny/{name}.json").read_text())
        rows = [row for row in content["rows"] if row["seeds"]]
        assert len(rows) == 2
        for row in rows:  # all that the paper has, we have, and for superkernels what was distilled
            assert {*row["ours"]} >= {*row["paper"]}
            assert ("distilled PSNR dB x8" in row["ours"]) == ("superkernel" not in row["label"]
                                                               and name == "mozejko-1")
    if "zhang-6" in names:
        records = [files.load_record(tmp_path / "runs/tiny/photos" / place)
                   for place in ("hinas/seed-0/search/arch.json", "zhang-6-r2/seed-0/arch.json")]
        assert records[0]["design"] != records[1]["design"]
    reproduce.main(command)
    assert "$ python" not in capfd.readouterr().out


def test_targets_are_of_the_networks_that_the_searches_look_for(tmp_path, monkeypatch):
    """At full scale --warmup sampled takes the papers' decoder, which is faster than ours."""
    monkeypatch.setattr(reproduce, "load_data", lambda *_, **__: SimpleNamespace(classes=["cat", "dog"]))
    run, targets = reproduce.searched("some", 0.5, "--model", "dcnas"), []
    content = fake_table(8, 32, 2)
    for part in content["parts"]:
        part["ms"] *= 2 if part["place"] == "decoder sharp" else 1
    table = latency.Table(content)
    for decoder, warmup in (("conv", "--warmup sampled"), ("sharp", "")):
        runner = reproduce.Runner(reproduce.build_parser().parse_args(["table-3", "--data", str(tmp_path)]))
        monkeypatch.setattr(reproduce.Runner, "table", lambda *_: table)
        runner.scale = {**runner.scale, "natural": {**runner.scale["natural"], "search": warmup}}
        supernet = tfnas.SuperNet(tfnas.Space(num_classes=2, model="dcnas", decoder=decoder))
        costs = search.costs_of_table(table, supernet, supernet.plan)
        low, high = supernet.cost_range(costs.parts, costs.rest)
        targets.append(runner.target_ms(run))
        assert targets[-1] == pytest.approx((low + high) / 2)
    assert targets[0] < targets[1]


@pytest.mark.parametrize("arguments, message", (
    (["table-3"], "needs natural images"), (["table-99"], "invalid choice"),
    (["table-1", "--device", "nonsense"], "cannot be used here")))
def test_wrong_usage(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main([*arguments, "--output-dir", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_command_that_fails_is_named(tmp_path, capfd):
    """Here in a process of its own."""
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["table-2", *TINY, "--data", str(tmp_path / "photos"), "--output-dir",
                        str(tmp_path / "runs")])
    assert "This command failed" in str(stopped.value.code) and "python train.py" in str(stopped.value.code)


def test_without_a_name_it_lists_what_there_is(capsys):
    reproduce.main([])
    out = capsys.readouterr().out
    assert all(name in out for name in PAPER + OTHERS)
