"""What this project writes to disk: JSON that describes itself, records of networks, checkpoints.

A file is written beside its place and renamed: it holds its old content or all of the new one.
Checkpoints hold tensors, numbers, strings, lists and dicts only; loading one runs nothing in it. What is read
is checked: the checksums of checkpoints, and the types and ranges of what is used of a record.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import models
import registry

CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "joint-checkpoint", 1
MOST_PARAMETERS = 2**28
TEXT, PIXELS, SEED, MS = (str, None), range(1, 65537), range(2**63), (float, int, None)
SETTING = {"device_type": str, "batch": PIXELS, "threads": range(4097), "dtype": str, "mode": TEXT}
RECORD = {"model": str, "data": TEXT, "data_root": TEXT, "size": (PIXELS, None), "images": (dict, None),
          "latency": ({"setting": (SETTING, None), "measured_ms": MS, "slowdown": MS}, None)}
SPLIT_LISTS = {"train": str, "val": str, "test": str}
SPLITS = {"splits": (range(1, 4), None), "images": (SPLIT_LISTS, None)}
TRAINING = {  # in checkpoints of a network; what old ones do not have may be missing
    "record": dict, "classes": ([str], None), "size": PIXELS, "data": TEXT, "seed": SEED, "loss": TEXT,
    "network": dict, "ema": (dict, None), "flags": (dict, None), **SPLITS}
CHECKPOINT = {**TRAINING, "epoch": range(1, 2**31)}
STOPPED = {  # in checkpoints of a run that can go on
    "flags": dict, "step": range(2**63), "rows": [{"epoch": range(1, 2**31), "seconds": (float, int)}],
    "best": ({"epoch": range(1, 2**31)}, None), "sums": dict, "seconds": (float, int, None),
    "steps": (range(2**63), None), **SPLITS}


def provenance(device_name: str, seed: int | None = None) -> dict:
    """How a file was made: command, date (UTC), seed, commit of this checkout or None, versions, device."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "date": date, "seed": seed,
            "commit": commit, "torch": str(torch.__version__), "python": platform.python_version(),
            "device": device_name}


def write_file(path: str | Path, write) -> None:
    """Call `write(temporary_path)` and rename: `path` holds the old content or all of the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # on the disk before the old content goes: a crash must not lose both
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: str | Path) -> None:
    """ValueError in one sentence where no file can be written into the folder of `path`: before the work."""
    folder = Path(path).resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / f".{os.getpid()}.test", lambda temporary: temporary.write_text("test"))
        (folder / f".{os.getpid()}.test").unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); name another file.") from None


@contextmanager
def reading(path: str | Path):
    """Around code that uses the content of a file: ValueError in one sentence where it is not as expected."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ValueError) as error:
        if lacks_memory(error) or isinstance(error, NotImplementedError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} does not hold what it should ({reason[:160]}).") from None


def fits(value, kind) -> bool:
    """Whether a value from a file is of a kind: a type, a range of whole numbers, None (or missing), [kind]:
    a list, {name: kind}: a dict that has these, or a tuple of kinds: one of them."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(name), one) for name, one in kind.items())
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(one, kind[0]) for one in value)
    if isinstance(kind, range):
        return type(value) is int and value in kind
    return value is None if kind is None else isinstance(value, kind) and not isinstance(value, bool)


def check_fields(path: str | Path, content: dict, kinds: dict) -> None:
    """ValueError in one sentence that names a field of a file that is not of its kind, see `fits`."""
    for name, kind in kinds.items():
        if not fits(content.get(name), kind):
            raise ValueError(f"{path} is not valid: its {name} is {str(content.get(name))[:60]!r}.")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is one of too little memory, of Python or of torch."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("allocate memory", "size calculation overflowed"))


def write_json(path: str | Path, content: dict) -> None:
    """Write strict JSON (no NaN) beside and rename."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text))


def read_json(path: str | Path, formats: str | tuple[str, ...], version: int | tuple[int, ...],
              remedy: str) -> dict:
    """The object in a JSON file of one of these formats and versions.

    ValueError in one sentence, ending in `remedy`, where the file is missing, damaged or something else.
    """
    formats = (formats,) if isinstance(formats, str) else formats
    versions = (version,) if isinstance(version, int) else version
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); {remedy}.") from None
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not valid JSON; {remedy}.") from None
    if not isinstance(content, dict) or content.get("format") not in formats:
        raise ValueError(f"{path} is not a {' or '.join(formats)} file; {remedy}.")
    if content.get("version") not in versions:
        raise ValueError(f"{path} has version {content.get('version')!r} of {content['format']}, and this "
                         f"code reads version {' and '.join(map(str, versions))}; {remedy}.")
    return content


def make_record(method: str, content: dict, made: dict, **more) -> dict:
    """The record of a network of a search method; `content` is what the method builds it from.

    Of the joint method that is arch.to_dict(), of the others {"model": method, "design": design.to_dict()}.
    """
    return {**registry.RECORD, "method": method, "made": made, **more, **content}


def load_record(path: str | Path) -> dict:
    """Read and check an `arch.json`, or the record in a checkpoint, whose `weights` are then its own;
    ValueError in one sentence when it is missing, damaged or not valid."""
    if Path(path).suffix == ".pt":
        return {**load_checkpoint(path)[1]["record"], "weights": Path(path).name}
    record = read_json(path, *registry.RECORD.values(), "make one with: python search.py --target 12")
    check_fields(path, record, RECORD)
    try:
        with torch.device("meta"):  # a record can ask for more memory than there is
            count = models.count_parameters(registry.build_network(record))
        if count > MOST_PARAMETERS:
            raise ValueError(f"the network has {count:,} parameters, more than any of this project")
    except ValueError as error:  # a name in it may have a line break
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return record


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write tensors, numbers, strings, lists and dicts beside, read it back, and rename.

    OSError in one sentence when it cannot be written (a full disk, say); `path` is then as it was.
    """
    content = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, **content}

    def write(temporary):
        try:
            torch.save(content, temporary)
            check_archive(temporary)
        except (OSError, RuntimeError, ValueError) as error:  # torch's own writer raises RuntimeErrors
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            kept = "; the one before it is intact" if Path(path).exists() else ""
            raise OSError(f"The checkpoint {path} could not be written ({reason}){kept}: make room, and "
                          f"{'go on with --resume' if kept else 'start again'}.") from None

    write_file(path, write)


def check_archive(path: str | Path) -> None:
    """ValueError where a part of a checkpoint is not what was written; torch does not compare checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if (any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                    or sum(entry.file_size for entry in entries) > os.path.getsize(path)):
                raise ValueError("it is compressed")  # so a small file can need any amount of memory
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(str(error)) from None
    if damaged:
        raise ValueError(f"the checksum of {damaged} is wrong")


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Load a checkpoint without running anything in it; ValueError in one sentence if it is not ours."""
    if not Path(path).is_file():
        raise ValueError(f"There is no checkpoint at {path}; train.py and search.py write them.")
    try:
        check_archive(path)
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything, though it runs nothing
        if lacks_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({reason[:120]}).") from None
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project.")
    if content.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"{path} has checkpoint version {content.get('version')!r}, and this code reads "
                         f"version {CHECKPOINT_VERSION}; train again or use the code that wrote it.")
    return content


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The network of a checkpoint of train.py, in eval mode, with averaged weights if any; its content."""
    checkpoint = read_checkpoint(path, device)
    check_fields(path, checkpoint, CHECKPOINT)
    check_fields(path, checkpoint["record"], RECORD)
    with reading(path):
        network = registry.build_network(checkpoint["record"])
        network.load_state_dict(checkpoint.get("ema") or checkpoint["network"])
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            raise ValueError("a weight is not finite")
    return network.to(device, memory_format=torch.channels_last).eval(), checkpoint
