"""JSON Lines: reading, appending whole lines, truncating.

What is written is appended in place, so neither a link nor a second name of the file is accepted:
the lines would end up in a file outside of the run directory.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from paint_engine.files.failures import BadFile, reading, writing
from paint_engine.files.links import open_regular
from paint_engine.files.records import parse_json

_BLOCK_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 28
"""a longer line is refused: the longest sample of a rollout takes a hundredth of that"""
_REPAIR = "Remove or repair that line."


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, in order; a last line that a crash cut short is left out.

    Raises:
        BadFile: another line is not a JSON object, or is too long; names the file and the line. Or
            it is no regular file.
        ReadFailed: the system refuses to read it; FileMissing: there is none.
    """
    records = []
    with reading(path), open(path, "rb", opener=_open_regular) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if line.strip() and (record := _record(line, f"{path}:{number}")) is not None:
                records.append(record)
    return records


def _record(line: bytes, where: str) -> dict[str, Any] | None:
    """The object of a line; None if a crash has cut it short, so that its end is missing. Raises
    BadFile."""
    if len(line) > MAX_LINE_BYTES:
        raise BadFile(
            f"{where} is longer than {MAX_LINE_BYTES:,} bytes; each line must hold one JSON "
            f"object. {_REPAIR}"
        )
    try:
        record = parse_json(line)
    except ValueError as error:  # covers undecodable bytes as well as malformed JSON
        if not line.endswith(b"\n"):
            return None
        raise BadFile(
            f"{where} is not valid JSON ({error}); each line must hold one JSON object. {_REPAIR}"
        ) from error
    if not isinstance(record, dict):
        raise BadFile(
            f"{where} holds {type(record).__name__}; each line must hold one JSON object. {_REPAIR}"
        )
    return record


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


# ---- appending -----------------------------------------------------------------------------------


def open_jsonl(path: Path) -> FileIO:
    """The file, new or not, opened for `append_lines`; a last line that a kill cut short is
    removed. Unbuffered, so that a line survives the process as soon as it is written.

    Raises WriteFailed, and BadFile if it is a link, has a second name or is no regular file.
    """
    with writing(path), ExitStack() as stack:
        file = stack.enter_context(_open_appended(path))
        start, line = next(_lines_from_the_end(file, path), (0, b"\n"))
        if not line.endswith(b"\n"):
            file.truncate(start)
        stack.pop_all()
        return file


def _open_appended(path: Path) -> FileIO:
    file = FileIO(path, "ab+", opener=_open_regular)
    if os.fstat(file.fileno()).st_nlink > 1:
        file.close()
        raise BadFile(
            f"{path} has another name too (a hard link), and what is appended here would be "
            "appended there; needs a file of its own; make it one with: "
            f"cp {path} {path}.copy && mv {path}.copy {path}"
        )
    return file


def _open_regular(path: str, flags: int) -> int:
    return open_regular(Path(path), flags)


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


# ---- from the end --------------------------------------------------------------------------------


def _lines_from_the_end(file: FileIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the offset and the bytes of each line, the last one first, reading block by block."""
    end = start = file.seek(0, os.SEEK_END)
    parts: list[bytes] = []
    while start > 0:
        size = min(_BLOCK_BYTES, start)
        start -= size
        block = os.pread(file.fileno(), size, start)
        # The line break before `end` is that line's own.
        at = block.rfind(b"\n", 0, len(block) - 1 if start + len(block) == end else len(block))
        while at >= 0:
            parts.append(block[at + 1 :])
            yield start + at + 1, b"".join(reversed(parts))
            end, parts, block = start + at + 1, [], block[: at + 1]
            at = block.rfind(b"\n", 0, len(block) - 1)
        parts.append(block)
        if end - start > MAX_LINE_BYTES:
            raise BadFile(
                f"{path}: the line that ends at byte {end:,} is longer than {MAX_LINE_BYTES:,} "
                f"bytes; each line must hold one JSON object. {_REPAIR}"
            )
    if end > 0:
        yield 0, b"".join(reversed(parts))


def truncate_jsonl(path: Path, last_step: int) -> dict[str, Any]:
    """Removes the objects of steps after `last_step`, and a line that is cut off; returns the last
    object that is left, empty for none. The steps of the lines never decrease, so only the end of
    the file is read. It is cut in place: a disk may have no room for a second copy.

    Raises BadFile for a line that it reads and that is no object with a step, and WriteFailed.
    """
    with writing(path), _open_appended(path) as file:
        end, line, last = 0, b"", {}
        for start, line in _lines_from_the_end(file, path):
            where = f"{path}: the line at byte {start:,}"
            record = _record(line, where) if line.strip() else None
            if record is not None and _step(record, where) <= last_step:
                end, last = start + len(line), record
                break
        if end < os.fstat(file.fileno()).st_size:
            file.truncate(end)
        elif not line.endswith(b"\n"):
            # Only its line break was cut off.
            file.write(b"\n" if line else b"")
        os.fsync(file.fileno())
        return last


def _step(record: Mapping[str, Any], where: str) -> int:
    step = record.get("step")
    if type(step) is not int:
        raise BadFile(
            f"{where}: step: got {str(step)[:60]!r}; needs the number of a step, an integer. "
            f"{_REPAIR}"
        )
    return step
