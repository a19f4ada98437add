"""The checkpoints of a run: listed, the best marked, a manifest that tells every change."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from saved_runs import Trained

from paint_engine.checkpoint.directory import (
    best_checkpoint,
    find_damage,
    list_checkpoints,
    mark_best,
)
from paint_engine.files import ReadFailed


def test_a_step_that_is_not_saved_is_not_marked_best(tmp_path: Path, trained: Trained) -> None:
    with pytest.raises(AssertionError, match="step-7"):
        mark_best(tmp_path, 7)
    shutil.rmtree(tmp_path / "checkpoints/step-1")
    mark_best(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints/step-2")
    assert best_checkpoint(tmp_path) is None


def test_no_single_bit_of_the_manifest_can_change_unseen(tmp_path: Path, trained: Trained) -> None:
    newest = tmp_path / "checkpoints/step-2"
    manifest = newest / "manifest.json"
    content = manifest.read_bytes()
    rng = random.Random(0)
    assert find_damage(newest) is None
    for _ in range(300):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        manifest.write_bytes(changed)
        assert find_damage(newest) is not None, bytes(changed)


def test_checkpoints_that_cannot_be_listed_are_not_absent(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With none, a run would begin again."""

    def refuse(path: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ReadFailed, match="checkpoints could not be read"):
        list_checkpoints(tmp_path)


def test_a_manifest_names_files_of_its_checkpoint_alone(tmp_path: Path, trained: Trained) -> None:
    newest = tmp_path / "checkpoints/step-2"
    manifest = json.loads((newest / "manifest.json").read_text())
    (tmp_path / "file").write_text("x")
    outside = ("../../file", str(tmp_path / "file"), "trainer/../manifest.json", "./x")
    for name in (*outside, "a\0b", "\ud800", "a" * 300):
        (newest / "manifest.json").write_text(json.dumps(manifest | {name: [1, "0"]}))
        assert f"lists {name!r}, which is no file of a checkpoint" in str(find_damage(newest))
    for text in ("[]", "{}", '{"trainer_state.json": 3}', 100_000 * "[", "NaN"):
        (newest / "manifest.json").write_text(text)
        assert "manifest.json" in str(find_damage(newest)), text
    (newest / "manifest.json").unlink()
    os.mkfifo(newest / "manifest.json")
    assert "named pipe" in str(find_damage(newest))
