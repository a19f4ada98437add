"""JSON Lines: reading, appending whole lines, truncating."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from paint_engine.files.atomic import write_atomic
from paint_engine.files.failures import writing


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
