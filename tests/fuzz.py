"""Odd and damaged files, pictures, folders and flags, for the scripts' main functions."""

import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import traceback
from collections import Counter

import torch
from PIL import Image

import files
import hinas
import run as life
import superkernel
import tfnas
from fake_table import fake_parts, fake_table


def mutate(value, rng):
    """A JSON value with something in it changed: removed, of another type, huge, or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value, key=str))
        action = rng.randrange(4)
        rest = {k: v for k, v in value.items() if k != key}
        if action == 0:
            return rest
        if action == 1:
            return {**rest, f"{key}x": value[key]}
        return {**value, key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        changed = [] if rng.random() < 0.3 else [mutate(value[index], rng)]
        return [*value[:index], *changed, *value[index + 1:]]
    return rng.choice([None, True, -1, 0, 1, 3, 1e308, -5e-324, 10**30, 0.5, "", "k3", "cnas", [], [[]], {},
                       {"a": 1}, "\ud800"])


def mutated_text(content, rng):
    text = json.dumps(content)
    action = rng.randrange(10)
    if action == 0:
        return text[:rng.randrange(len(text))]
    if action == 1:
        place = rng.randrange(len(text))
        return text[:place] + rng.choice('{}[],:"0\\x9eN') + text[place + 1:]
    if action == 2:
        return rng.choice(["", "null", "[]", "NaN", "[" * 5000, '{"format": NaN}', "\x00\x01",
                           text.replace("1", "NaN", 1)])
    for _ in range(rng.choice((1, 1, 2, 5))):
        content = mutate(content, rng)
    return json.dumps(content)


class Payload:
    """What a pickle may call when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class Failed(AssertionError):
    """What a command must never do."""


def call(script, *argv, error=None):
    """Run a script's main in this process: its exit code. Failed where it ends in a traceback, hangs, or does
    not say in one sentence why it has failed."""
    def hang(*_):
        raise Failed(f"hangs: {script} {' '.join(map(str, argv))}")

    handlers = {name: signal.getsignal(name) for name in life.SIGNALS}
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(200)
    error, code = error or io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(script).main([str(word) for word in argv])
    except SystemExit as stopped:
        code = stopped.code or 0
        if isinstance(code, str):
            error.write(code)
            code = 1
    except Failed:
        raise
    except BaseException as raised:
        text = "".join(traceback.format_exception(raised)[-4:])
        raise Failed(f"traceback: {script} {' '.join(map(str, argv))}\n{text}") from None
    finally:
        signal.alarm(0)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        life._locks.clear()
        torch.set_num_threads(1)
    lines = [line for line in error.getvalue().strip().splitlines() if line.strip()]
    told = code in (1, 2) and lines and len(lines[-1]) > 20 and "Traceback" not in error.getvalue()
    if code and not told:
        raise Failed(f"exit code {code}, {lines[-1:]}: {script} {' '.join(map(str, argv))}")
    return code


def damaged_checkpoint(path, good, rng, planted):
    """A checkpoint with something in it changed."""
    action = rng.randrange(6)
    content = bytearray(good.read_bytes())
    if action == 0:
        del content[rng.randrange(len(content)):]
    elif action == 1:
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif action == 2:
        start = rng.randrange(len(content))
        content[start:start + 5000] = bytes(len(content[start:start + 5000]))
    path.write_bytes(content)
    if action == 3:
        torch.save({"format": files.CHECKPOINT_FORMAT, "version": files.CHECKPOINT_VERSION,
                    "network": Payload(planted), "flags": Payload(planted)}, path)
    elif action > 3:
        state = torch.load(good, weights_only=True)
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(sorted(state, key=str))
            state[key] = (mutate(state[key], rng) if rng.random() < 0.7 else
                          rng.choice([None, 3, "x", {}, [1]]))
        if isinstance(state.get("flags"), dict) and "epochs" in state["flags"]:
            state["flags"]["epochs"] = 2  # any number would be right, and take its time
        torch.save(state, path)


def odd_picture(path, rng):
    """A picture of any size and mode, whole or damaged, or no picture at all."""
    size = rng.choice([(1, 1), (2, 400), (300, 3), (5, 7), (33, 24), (64, 64)])
    mode = rng.choice(["RGB", "L", "RGBA", "P", "CMYK", "I;16", "1", "LA", "F", "I"])
    kind = rng.choice(["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM"])
    image = Image.new(mode, size, rng.randrange(1, 2) if mode in ("1", "F") else 0)
    try:
        image.save(path, format=kind)
    except (OSError, ValueError, KeyError):  # a kind that does not have this mode
        image.convert("RGB").save(path, format="PNG")
    content = bytearray(path.read_bytes())
    action = rng.randrange(8)
    if action == 0:
        path.write_bytes(content[:rng.randrange(len(content))])
    elif action == 1:
        for _ in range(rng.randrange(1, 10)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
    elif action == 2:
        path.write_bytes(rng.choice([b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
                                     b"<svg/>", bytes(rng.randrange(256) for _ in range(200))]))
    elif action == 3:
        path.unlink()
        path.symlink_to(path)


def odd_folder(folder, rng):
    """An image folder of one layout or another, with something odd in it."""
    tops = rng.choice([[""], [""], ["train"], ["train", "val"], ["Train", "Valid"], ["training", "test"],
                       ["val"], ["train", "val", "test"], ["train", "Train"]])
    classes = rng.choice([[""], ["cat", "dog"], ["cat", "dog"], ["cat"], ["a b", "\u00e9", ".hidden"],
                          ["@eaDir", "x", "y"], ["noisy", "clean"]])
    for top in tops:
        for name in classes if rng.random() < 0.9 else classes[:1]:
            place = folder / top / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(rng.choice((0, 1, 2, 3, 9))):
                Image.new("RGB", rng.choice([(20, 20), (20, 20), (4, 30)]), rng.randrange(2**24)).save(
                    place / f"{number}.png")
    action = rng.randrange(8)
    if action == 0:
        odd_picture(folder / "odd.png", rng)
    elif action == 1:
        (folder / "classes.txt").write_bytes(rng.choice([b"", b"cat Cat\n", b"\xff\xfe\n\n", b"one\ntwo\n"]))
    elif action == 2:
        (folder / "loop").symlink_to(folder)


TRIED = {
    "train": "--epochs 1 --train-images 8 --val-images 4 --batch-size 2 --size 32 --threads 1 --device cpu",
    "search": "--epochs 1 --train-images 16 --val-images 4 --batch-size 2 --size 16 --model hinas --width 2 "
              "--search-width 1 --threads 1 --device cpu",
    "eval": "--test-images 4 --sigmas 0.1 --no-latency --device cpu",
    "latency": "--model mb1-s --size 28 --device cpu",
    "data": "--train-images 8 --val-images 4 --size 32"}
TRIED = {script: words.split() for script, words in TRIED.items()}
NAMED = ["--model", "mb1-s"]
ODD_WORDS = ["", "-1", "0", "1", "3", "nan", "inf", "1e400", "x", "-", "--", "1/0", "25/255", "\x00", "..",
             "[]", "a" * 5000, "/proc/self/mem", "/root/x", "None", "digits", "0.5", "\ud800", "9" * 20]


def make_photos(folder):
    """Eight grey pictures without labels."""
    (folder / "photos").mkdir()
    for number in range(8):
        Image.new("L", (24, 20), 30 * number).save(folder / "photos" / f"{number}.png")


class Fuzz:
    """Cases for the scripts' main functions: {kind: function that tries one}; good files lie in `folder`."""

    def __init__(self, folder, seed):
        self.folder, self.rng, self.planted = folder, random.Random(seed), folder / "planted"
        self.counts, self.out = Counter(), folder / "out"
        assert not call("train", *TRIED["train"], *NAMED, "--output-dir", folder / "good", "--epochs", "2")
        assert not call("search", *TRIED["search"], "--output-dir", folder / "good", "--epochs", "2")
        make_photos(folder)
        words = "--model dncnn-grey --grey --size 16 --epochs 1 --batch-size 2 --device cpu".split()
        assert not call("train", *words, "--data", folder / "photos", "--output-dir", folder / "grey")
        kernels = superkernel.Space("skipinit", 3, 1)
        cells = hinas.Space(layers=1, nodes=2)
        made = files.provenance("a CPU", 0)
        contents = {"tfnas": tfnas.Space().random_design(self.rng).with_model("cnas").to_dict(),
                    "superkernel": superkernel.record_content(kernels.reference_design()),
                    "hinas": hinas.record_content(cells.random_design(self.rng))}
        self.records = [files.make_record(method, content, made, data="digits", size=16)
                        for method, content in contents.items()]
        self.tables = [fake_table(space=4, size=16), fake_parts(kernels)]

        for script in ("eval", "latency", "data"):  # what is not odd works
            assert not call(script, *TRIED[script], *self.needed(script))

    def needed(self, script):
        """The flags of a script for files and folders."""
        return {"train": [*NAMED, "--output-dir", self.out], "search": ["--output-dir", self.out],
                "eval": ["--checkpoint", self.folder / "good/best.pt", "--output-dir", self.out],
                "data": ["--output", self.folder / "p.png"], "latency": []}[script]

    def record(self):
        path = self.folder / "arch.json"
        path.write_text(mutated_text(self.rng.choice(self.records), self.rng), errors="surrogatepass")
        return call("train", "--arch", path, *TRIED["train"], "--output-dir", self.out)

    def table(self):
        path, content = self.folder / "t.json", self.rng.choice(self.tables)
        path.write_text(mutated_text(content, self.rng), errors="surrogatepass")
        if self.rng.random() < 0.5:
            return call("latency", "--table", path)
        return call("search", *"--range --space 4 --size 16 --train-images 8 --table".split(), path)

    def trained(self):
        damaged_checkpoint(self.folder / "best.pt", self.folder / "good/best.pt", self.rng, self.planted)
        return call("eval", "--checkpoint", self.folder / "best.pt", *TRIED["eval"], "--output-dir", self.out)

    def stopped(self):
        name, script = self.rng.choice((("last.pt", "train"), ("search.pt", "search")))
        damaged_checkpoint(self.folder / name, self.folder / "good" / name, self.rng, self.planted)
        return call(script, "--resume", self.folder / name, "--output-dir", self.out)

    def pictures(self):
        folder = self.folder / "pictures"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number in range(3):
            name = self.rng.choice([str(number), f"{number}{'x' * 200}", os.fsdecode(b"\xe9") + str(number)])
            odd_picture(folder / f"{name}.{self.rng.choice(('png', 'jpg'))}", self.rng)
        before = {path.name: path.read_bytes() for path in folder.iterdir() if not path.is_symlink()}
        code = call("eval", "--checkpoint", self.folder / "grey/best.pt", "--device", "cpu",
                    "--input", folder, "--output-dir", self.rng.choice((self.out, folder)))
        after = {path.name: path.read_bytes() for path in folder.iterdir() if not path.is_symlink()}
        assert before.items() <= after.items()
        return code

    def images(self):
        folder = self.folder / "images"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        odd_folder(folder, self.rng)
        script = self.rng.choice(("data", "data", "train"))
        model = ["--model", self.rng.choice(("mb1-s", "dncnn-grey", "unet-s"))] if script == "train" else []
        odd = self.rng.choice(([], [], ["--grey"], ["--train-folders", "train"], ["--crops", "2"]))
        return call(script, "--data", folder, *TRIED[script], *self.needed(script), *model, *odd)

    def flags(self):
        script = self.rng.choice(sorted(TRIED))
        parser = importlib.import_module(script).build_parser(*(["hinas"] if script == "search" else []))
        action = self.rng.choice([one for one in parser._actions if one.dest not in ("help", "epochs")])
        words = [] if action.nargs == 0 else [self.rng.choice(ODD_WORDS)]
        flag = self.rng.choice(action.option_strings)
        argv = [f"{flag}={words[0]}"] if words and self.rng.random() < 0.3 else [flag, *words]
        return call(script, *TRIED[script], *self.needed(script), *argv)

    KINDS = (record, table, trained, stopped, pictures, images, flags)

    def try_all(self, count):
        """Try `count` cases; Counter of (kind, exit code), and what failed."""
        failures = []
        for number in range(count):
            kind = self.KINDS[number % len(self.KINDS)]
            shutil.rmtree(self.out, ignore_errors=True)
            try:
                self.counts[kind.__name__, kind(self)] += 1
            except AssertionError as failed:
                failures.append(f"{kind.__name__}, case {number}: {failed}")
            if self.planted.exists():
                failures.append(f"{kind.__name__}, case {number}: code was executed")
                self.planted.unlink()
        return failures


def run(folder, count, seed):
    """(The Fuzz after `count` cases, what failed): both files and the work lie in `folder`."""
    tried = Fuzz(folder, seed)
    return tried, tried.try_all(count)
