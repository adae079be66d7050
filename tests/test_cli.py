"""The command lines as a newcomer meets them: the README's commands, in their smallest form, one after the other."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import models
from fake_table import fake_table

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("models", "data", "latency", "search", "train", "eval", "benchmark", "reproduce", "hinas")
README = (ROOT / "README.md").read_text()
REPRODUCE = (ROOT / "REPRODUCE.md").read_text()

# What makes each command small: appended flags, by script. (On a machine that does ten other things, 12 ms can be too few.)
SMALLEST = {
    "search": "--target 1000 --min-width 3 --size 16 --train-images 60 --val-images 20 --epochs 1 --batch-size 8",
    "train": "--size 16 --train-images 40 --val-images 20 --epochs 1 --batch-size 8",
    "eval": "--val-images 12 --sigmas 0 0.5",
    "latency": "--size 16 --rounds 1",
    "models": "",
    "data": "--train-images 20 --val-images 10",
}


def commands(text):
    """Every `python <script>.py ...` line of the shell blocks, without comments and environment set-up."""
    found = []
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("#")[0].strip()
            match = re.search(r"python (\w+)\.py.*", line)
            if match and match[1] in SCRIPTS:
                found.append(match[0])
    return list(dict.fromkeys(found))


def call(command, folder):
    run = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=600)
    return run


def test_the_readme_names_every_script_and_its_numbers_stand_beside_commands():
    named = {command.split()[1] for command in commands(README)}
    assert {f"{script}.py" for script in ("search", "train", "eval", "latency", "models", "data")} <= named
    assert "python search.py --target 12" in commands(README)


@pytest.mark.parametrize("command", list(dict.fromkeys(commands(README) + commands(REPRODUCE))))
def test_every_command_of_the_documents_parses(command):
    """Flags, choices and numbers of every command, with the parser of its script: the long ones too."""
    words = shlex.split(command)
    try:
        importlib.import_module(words[1].removesuffix(".py")).build_parser().parse_args(words[2:])
    except SystemExit:
        pytest.fail(f"{command} is wrong usage")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an image folder, a picture and made-up MNIST beside it, where the README's commands run."""
    from PIL import Image
    folder = tmp_path_factory.mktemp("readme")
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (30, 24), (20 * index, 200 if name == "cat" else 20, 90)).save(
                    folder / "photos" / split / name / f"{index}.png")
    (folder / "my_pictures").mkdir()
    Image.new("L", (41, 27), 90).save(folder / "my_pictures" / "grey.png")
    Image.new("RGBA", (33, 50), (200, 10, 90, 128)).save(folder / "my_pictures" / "clear.png")
    return folder


def test_the_first_run_of_the_readme_works_in_its_smallest_form(folder):
    """Search, train, evaluate, denoise: each on what the one before wrote."""
    first = [c for c in commands(README.split("## First run")[1].split("\n## ")[0])]
    assert [c.split()[1] for c in first] == ["search.py", "train.py", "eval.py"]
    for command in first:
        words = shlex.split(command)[1:]
        run = call([str(ROOT / words[0]), *words[1:], *SMALLEST[words[0].removesuffix(".py")].split()], folder)
        assert run.returncode == 0, f"{command}: {run.stderr}"
    metrics = json.loads((folder / "runs" / "eval" / "metrics.json").read_text())
    assert metrics["format"] == "joint-eval" and (folder / "runs" / "eval" / "grid.png").stat().st_size > 500
    run = call([str(ROOT / "eval.py"), "--input", "my_pictures", "--output-dir", "denoised"], folder)
    assert run.returncode == 0, run.stderr
    assert {p.name for p in (folder / "denoised").iterdir()} >= {"grey_denoised.png", "clear_denoised.png"}


def test_own_data_from_search_to_evaluation(folder):
    small = ["--size", "16", "--batch-size", "4", "--epochs", "1"]
    models.write_json(folder / "latency.json", fake_table(4, 16, 2))  # a real one is made by the first run
    run = call([str(ROOT / "search.py"), "--target", "50", "--table", "latency.json", "--data", "photos", "--output-dir",
                "own/search", *small], folder)
    assert run.returncode == 0, run.stderr
    run = call([str(ROOT / "train.py"), "--arch", "own/search/arch.json", "--output-dir", "own/train", *small], folder)
    assert run.returncode == 0, run.stderr
    run = call([str(ROOT / "eval.py"), "--checkpoint", "own/train/best.pt", "--sigmas", "0.2", "--output-dir", "own/eval"],
               folder)
    assert run.returncode == 0, run.stderr
    metrics = json.loads((folder / "own" / "eval" / "metrics.json").read_text())
    assert metrics["num_classes"] == 2 and metrics["images"] == 8


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_every_flag_explained_and_three_examples(script, capsys):
    parser = importlib.import_module(script).build_parser()
    assert all(action.help for action in parser._actions)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0 and capsys.readouterr().out.count(f"python {script}.py") >= 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_ends_in_one_sentence(script, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(script).main(["--no-such-flag"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "--no-such-flag" in error and len(error.strip().splitlines()) <= 2


def test_the_gate_runs_the_test_command_of_the_readme():
    command = "pip install -r requirements.txt && python -m pytest"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()
