"""What a run leaves, without its times: two runs with equal ends have computed the same, bit for
bit."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

from safetensors import safe_open

from paint_engine.checkpoint.directory import find_damage
from paint_engine.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    VERSIONS_FILE,
)

End = dict[str, str]
"""of each file, by its path in the run directory, a digest of what it says"""
_PLACES = "DCP_SHARDING_INFO"
_HOW_STARTED = {"overwrite", "auto_resume"}


def end_of(run_dir: Path) -> End:
    """Returns the digests of all files and links of a run."""
    paths = sorted(path for path in run_dir.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(run_dir)): _digest(path) for path in paths}


def differences(expected: End, actual: End) -> list[str]:
    """Returns the paths whose content differs, and those that only one of the runs has."""
    names = sorted(expected.keys() | actual.keys())
    return [
        name if name in expected and name in actual else f"{name} (only one run has it)"
        for name in names
        if expected.get(name) != actual.get(name)
    ]


def _digest(path: Path) -> str:
    return hashlib.sha256(_content(path)).hexdigest()


def _content(path: Path) -> bytes:
    if path.is_symlink():
        return str(path.readlink()).encode()
    if path.name == REPORT_FILE:  # a page with times; what it is drawn from is compared
        return b"report"
    if path.name == MANIFEST_FILE:  # checksums of files with times
        return str(find_damage(path.parent)).encode()
    if path.name == CONFIG_FILE and path.suffix == ".toml":
        settings = tomllib.loads(path.read_text())
        settings["run"] = {k: v for k, v in settings["run"].items() if k not in _HOW_STARTED}
        return json.dumps(settings).encode()
    if path.name == VERSIONS_FILE:
        return _canonical([json.loads(path.read_text()) | {"command": None}])
    if path.name == ADAPTER_CONFIG_FILE:  # peft lists the names of a set in any order
        settings = json.loads(path.read_text()).items()
        return _canonical([{k: sorted(v) if isinstance(v, list) else v for k, v in settings}])
    if path.suffix == ".json":
        return _canonical([json.loads(path.read_text())])
    if path.suffix == ".jsonl":
        return _canonical(json.loads(line) for line in path.read_text().splitlines())
    if path.suffix == ".safetensors" and path.name != ADAPTER_FILE:
        return _tensors(path)
    return path.read_bytes()


def _canonical(records: Any) -> bytes:
    return "\n".join(json.dumps(_without_times(record)) for record in records).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not _is_time(k)}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _is_time(key: str) -> bool:
    return key.startswith("seconds") or key == "tokens_per_s"


def _tensors(path: Path) -> bytes:
    """Returns tensors and metadata by name: the headers of shards and of the random generators list
    them in any order."""
    parts = []
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        # Of a shard, where each tensor lies.
        parts += [f"{k} {v} ".encode() for k, v in sorted(metadata.items()) if k != _PLACES]
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            parts += [f"{name} {tensor.dtype} {tensor.shape} ".encode(), tensor.tobytes()]
    return b"".join(parts)
