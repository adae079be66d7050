"""The command lines as a newcomer meets them: the documents' commands, the first run made small,
--help."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import files
import latency
import registry
from fake_table import fake_table, quick_compare

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("registry", "data", "latency", "timing", "search", "train", "eval", "export", "benchmark",
           "reproduce", "hinas", "weights", "leaks")
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "REPRODUCE.md", *sorted((ROOT / "docs").glob("*.md"))]
SEARCHED = [model for names in registry.METHODS.values() for model in names]  # --model of search.py

# What makes each command small: appended flags, by script.
SMALLEST = {
    "search": "--target 1000 --space 4 --min-width 3 --size 16 --train-images 60 --epochs 1 --batch-size 8",
    "train": "--size 16 --train-images 40 --val-images 20 --epochs 1 --batch-size 8",
    "eval": "--test-images 12 --sigmas 0 0.5",
}


def commands(text):
    """Every `python <script>.py ...` line of the shell blocks, also behind torchrun, without comments."""
    found = []
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:python|torchrun .*?) (\w+)\.py\b[^#$&|;]*", line.split("#")[0])
            if match and match[1] in SCRIPTS:
                found.append(match[0][match.start(1) - match.start():].strip())
    return list(dict.fromkeys(found))


def parser_of(script, words=()):
    """The parser of a script; search.py has one for each method, which --model chooses."""
    build = importlib.import_module(script).build_parser
    if script != "search":
        return build()
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--model", "--space", "--strategy"):
        early.add_argument(flag, default="dcnas" if flag == "--model" else None)
    values = vars(early.parse_known_args(words)[0])
    method_of = importlib.import_module("search").method_of
    return build(values["model"], method_of(values["model"], values))


def call(command, folder, **how):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=600,
                          **how)


def test_the_readme_names_every_script_and_its_numbers_stand_beside_commands():
    named = {command.split()[0] for command in commands(README)}
    assert {f"{script}.py" for script in ("search", "train", "eval", "latency", "registry", "data")} <= named
    assert "search.py --target 12" in commands(README)


def test_every_script_stands_in_a_command_of_the_documents():
    named = {command.split()[0] for document in DOCUMENTS for command in commands(document.read_text())}
    assert named == {f"{script}.py" for script in SCRIPTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_command_of_the_documents_parses(document):
    """Flags, choices and numbers of every command, with the parser of its script: the long ones too."""
    wrong = []
    for command in commands(document.read_text()):
        script, *words = shlex.split(command)
        try:
            parser_of(script.removesuffix(".py"), words).parse_args(words)
        except SystemExit:
            wrong.append(command)
    assert not wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an image folder and pictures, where the README's commands run."""
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


def test_the_first_run_of_the_readme_works_in_its_smallest_form(folder, monkeypatch):
    """Search, with a table of its own, train, evaluate, denoise: each on what the one before wrote."""
    monkeypatch.chdir(folder)
    quick_compare(monkeypatch)
    build = latency.build_table
    monkeypatch.setattr(latency, "build_table", lambda *args, **how: build(*args, **how | {"rounds": 1}))
    first = commands(README.split("## First run")[1].split("\n## ")[0])
    assert [command.split()[0] for command in first] == ["search.py", "train.py", "eval.py"]
    for command in first:
        script, *words = shlex.split(command)
        name = script.removesuffix(".py")
        importlib.import_module(name).main([*words, *SMALLEST[name].split()])
    metrics = json.loads((folder / "runs" / "eval" / "metrics.json").read_text())
    assert metrics["format"] == "joint-eval" and metrics["images"] == 12
    assert (folder / "runs" / "eval" / "grid.png").stat().st_size > 500
    run = call([str(ROOT / "eval.py"), "--input", "my_pictures", "--output-dir", "denoised"], folder)
    assert run.returncode == 0, run.stderr
    assert {p.name for p in (folder / "denoised").iterdir()} >= {"grey_denoised.png", "clear_denoised.png"}


@pytest.mark.parametrize("grey", ([], ["--grey"]), ids=("colour", "grey"))
def test_own_data_from_search_to_evaluation(grey, folder, monkeypatch):
    monkeypatch.chdir(folder)
    own = f"own{len(grey)}"
    small = ["--size", "16", "--batch-size", "4", "--epochs", "1"]
    files.write_json(folder / "latency.json", fake_table(4, 16, 2))  # a real one is made by the first run
    for script, *words in (
            ["search", "--target", "50", "--table", "latency.json", "--data", "photos",
             "--output-dir", f"{own}/search", *small, *grey],
            ["train", "--arch", f"{own}/search/arch.json", "--output-dir", f"{own}/train", *small],
            ["eval", "--checkpoint", f"{own}/train/best.pt", "--sigmas", "0.2",
             "--output-dir", f"{own}/eval"]):
        importlib.import_module(script).main(words)
    metrics = json.loads((folder / own / "eval" / "metrics.json").read_text())
    assert metrics["num_classes"] == 2 and metrics["images"] == 8
    assert metrics["protocol"]["colour"] == ("grey" if grey else "RGB")


@pytest.mark.parametrize("script, model", [(script, None) for script in SCRIPTS if script != "search"]
                         + [("search", model) for model in SEARCHED])
def test_help_has_every_flag_explained_and_three_examples(script, model, capsys):
    parser = parser_of(script, ["--model", model] if model else [])
    assert [action.dest for action in parser._actions if not action.help or not action.help.strip()] == []
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and text.count(f"python {script}.py") >= 1 + 3  # of the usage, and examples
    assert re.findall(r"[^()]*\(default:?\s+None\)", text) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_ends_in_one_sentence(script, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(script).main(["--no-such-flag"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "--no-such-flag" in error and len(error.strip().splitlines()) <= 2


@pytest.mark.parametrize("name", ("superkernel", "metrics", "muon", "scenes", "timing"))
def test_a_file_works_alone_in_an_empty_folder(name, tmp_path):
    """Those without a command, or whose command needs none; the tests beside the others run theirs alone."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = call(["-c", f"import {name}"], tmp_path, env=environment)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_files_that_work_alone_are_documented():
    text = (ROOT / "docs" / "elsewhere.md").read_text()
    assert set(re.findall(r"^\| `(\w+)\.py` \|", text, re.M)) == {
        "models", "superkernel", "hinas", "data", "scenes", "latency", "timing", "metrics", "muon"}


def test_only_the_list_of_methods_names_those_of_other_papers():
    """A further method is a file of its own and a line in registry.METHODS; the others learn of it there."""
    lines = (ROOT / "registry.py").read_text().splitlines()
    line = next(line for line in lines if line.startswith("METHODS = "))
    assert all(f'"{method}"' in line for method in registry.METHODS)
    methods = set(registry.METHODS) - {"tfnas"}  # the first method, whose name others may say
    named = [f"{path.name}: {text.strip()}" for path in sorted(ROOT.glob("*.py")) if path.stem not in methods
             for text in path.read_text().splitlines() if text != line
             for method in methods if re.search(rf"\b{method}\b", text)]
    assert named == []


def test_the_gate_runs_the_test_command_of_the_readme():
    command = "pip install -r requirements.txt && python -m pytest"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()
