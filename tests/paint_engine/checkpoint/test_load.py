"""Loading: everything restored bit for bit, damage passed over, what does not fit refused.
At several ranks: test_checkpoint_ranks.py."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_runs import ALONE, Trained, build, flip_bit, load, save, take_step, trainable
from torch import Tensor

from paint_engine.checkpoint import directory as checkpoint_files
from paint_engine.checkpoint.directory import list_checkpoints
from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.files import BadFile, ReadFailed, unfinished_path


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_resumes_bit_for_bit_from_a_checkpoint(
    tied: bool, lora: bool, model_dir: Path, untied_model_dir: Path, tmp_path: Path
) -> None:
    directory = model_dir if tied else untied_model_dir
    model, optimizer = build(directory, lora=lora)
    for seed in (1, 2):
        take_step(model, optimizer, seed)
    save(tmp_path, model, optimizer, 2)
    at_two = trainable(model)
    for seed in (3, 4):
        take_step(model, optimizer, seed)
    expected = trainable(model)

    # Other initial adapters: they must all come from the checkpoint.
    resumed, its_optimizer = build(directory, lora=lora, seed=5)
    state = load_checkpoint(tmp_path, resumed, its_optimizer, world=ALONE, warn=pytest.fail)
    assert state == {"step": 2, "seconds_train": 0.1, "data": {"epoch": 1}}
    for name, tensor in trainable(resumed).items():
        assert torch.equal(tensor, at_two[name]), name
    for seed in (3, 4):
        take_step(resumed, its_optimizer, seed)
    for name, tensor in trainable(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    assert not all(torch.equal(expected[name], at_two[name]) for name in expected)
    moments = [s for s in its_optimizer.state.values() if s["exp_avg_sq"].any()]
    assert len(moments) > len(expected) // 2
    assert {s["step"].item() for s in moments} == {4.0}


def test_a_checkpoint_before_the_first_step_has_no_moments(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=True)
    save(tmp_path, model, optimizer, 0)
    resumed, its_optimizer = build(model_dir, lora=True, seed=7)
    take_step(resumed, its_optimizer, 9)
    assert load(tmp_path, resumed, its_optimizer) == (0, [])
    assert not its_optimizer.state
    for model_of_run, optimizer_of_run in ((model, optimizer), (resumed, its_optimizer)):
        take_step(model_of_run, optimizer_of_run, 1)
    for name, tensor in trainable(resumed).items():
        assert torch.equal(tensor, trainable(model)[name]), name


def _truncate(file: Path) -> None:
    # A text's last character may be a newline that nobody misses.
    file.write_bytes(file.read_bytes()[:-2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [_truncate, _empty, flip_bit, Path.unlink])
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(
    spoil: Callable[[Path], None], model_dir: Path, tmp_path: Path, trained: Trained
) -> None:
    model, optimizer = build(model_dir, lora=True)
    assert load(tmp_path, model, optimizer) == (2, [])
    newest = tmp_path / "checkpoints/step-2"
    spared = shutil.copytree(newest, tmp_path / "copy")
    names = checkpoint_files.file_names(newest)
    assert len(names) == 6
    for name in names:
        spoil(newest / name)
        step, warned = load(tmp_path, model, optimizer)
        assert step == 1, name
        assert len(warned) == 1
        assert str(newest) in warned[0]
        # A changed checksum in the manifest speaks against the file that it is of.
        assert name in warned[0] or (name == "manifest.json" and "not what was" in warned[0])
        shutil.rmtree(newest)
        shutil.copytree(spared, newest)
    assert load(tmp_path, model, optimizer) == (2, [])


def test_without_an_intact_checkpoint_nothing_can_be_resumed(
    tmp_path: Path, trained: Trained
) -> None:
    for path in list_checkpoints(tmp_path):
        _empty(path / "trainer_state.json")
    with pytest.raises(ValueError, match=r"no intact checkpoint: step-1, step-2.*overwrite"):
        load(tmp_path, *trained)


def test_a_run_without_a_checkpoint_has_nothing_to_restore(model_dir: Path, tmp_path: Path) -> None:
    unfinished_path(tmp_path / "checkpoints/step-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-1-old").mkdir()
    assert load(tmp_path, *build(model_dir, lora=True)) == (None, [])


@pytest.mark.parametrize(
    ("lora", "rank", "what"),
    [(True, 2, r"\(4, 48\) in the checkpoint, \(2, 48\) in this"), (False, 4, "absent")],
)
def test_a_checkpoint_of_another_model_is_refused_and_not_passed_over(
    lora: bool, rank: int, what: str, model_dir: Path, tmp_path: Path, trained: Trained
) -> None:
    with pytest.raises(ValueError, match=rf"step-2 is of another model.*{what}"):
        load(tmp_path, *build(model_dir, lora=lora, rank=rank))


def refusing(file: Path, number: int) -> Callable[..., int]:
    """`os.open` as the system refuses one file: no rights, a stale handle, a faulty disk."""
    original = os.open

    def refuse(path: str | Path, *arguments: int) -> int:
        if Path(path) == file:
            raise OSError(number, os.strerror(number))
        return original(path, *arguments)

    return refuse


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["manifest.json", "trainer_state.json"])
def test_a_file_that_the_system_refuses_is_no_damage(
    name: str, number: int, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is neither passed over nor replaced; it is there when the file can be read."""
    newest = tmp_path / "checkpoints/step-2"
    content = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    said = rf"{name} could not be read.*{os.strerror(number)}"
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing(newest / name, number))
        for use in (lambda: load(tmp_path, *trained), lambda: save(tmp_path, *trained, 2)):
            with pytest.raises(ReadFailed, match=said):
                use()
    assert content == {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    assert load(tmp_path, *trained) == (2, [])


def reseal(checkpoint: Path) -> None:
    """As one who crafts a checkpoint sees to its checksums."""
    (checkpoint / "manifest.json").unlink()
    sealed = checkpoint_files.seal(checkpoint, checkpoint_files.file_names(checkpoint))
    (checkpoint / "manifest.json").write_text(json.dumps(sealed))


def _rename(tensors: dict[str, Tensor]) -> None:
    tensors["weight/of nothing"] = tensors.pop(min(tensors))


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] = torch.zeros(3, 3)


def _round(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] = tensors[min(tensors)].bfloat16()


def _forget(tensors: dict[str, Tensor]) -> None:
    del tensors[min(name for name in tensors if name.startswith("exp_avg_sq/"))]


@pytest.mark.parametrize(
    ("craft", "said"),
    [
        *((_rename, "another model"), (_reshape, "needs"), (_round, "needs")),
        (_forget, "has no exp_avg_sq"),
    ],
)
def test_a_crafted_shard_is_refused_by_tensor(
    craft: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path, trained: Trained
) -> None:
    newest = tmp_path / "checkpoints/step-2"
    (shard,) = (newest / "trainer").iterdir()
    tensors = load_file(shard)
    craft(tensors)
    save_file(tensors, shard)
    reseal(newest)
    with pytest.raises(ValueError, match=said):
        load(tmp_path, *trained)


@pytest.mark.parametrize(
    ("kind", "value", "needed"),
    [
        *((kind, value, "finite") for kind in ("weight", "exp_avg") for value in ("nan", "inf")),
        *(("exp_avg_sq", value, "at least 0") for value in ("nan", "-1.0")),
        *(("step", value, "count of steps") for value in ("-1.0", "nan", "inf", "0.5")),
    ],
)
def test_crafted_values_are_refused_by_tensor(
    kind: str, value: str, needed: str, tmp_path: Path, trained: Trained
) -> None:
    """NaN would reach the sampler, and a count of -1 the optimizer's division by zero."""
    newest = tmp_path / "checkpoints/step-2"
    (shard,) = (newest / "trainer").iterdir()
    tensors = load_file(shard)
    name = min(name for name in tensors if name.startswith(kind + "/"))
    tensors[name].view(-1)[-1] = float(value)
    save_file(tensors, shard)
    reseal(newest)
    with pytest.raises(
        BadFile, match=rf"trainer: '{kind}/.* holds {value}; needs .*{needed}.*copy"
    ):
        load(tmp_path, *trained)


_HUGE = (1 << 62).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize("content", [b"", b"\0", _HUGE, (2).to_bytes(8, "little") + b"[]"])
@pytest.mark.parametrize("name", ["trainer/*.safetensors", "rng-0.safetensors"])
def test_a_crafted_safetensors_file_is_refused_by_name(
    name: str, content: bytes, tmp_path: Path, trained: Trained
) -> None:
    newest = tmp_path / "checkpoints/step-2"
    (file,) = newest.glob(name)
    file.write_bytes(content)
    reseal(newest)
    with pytest.raises(BadFile, match=r"step-2.* cannot be read \(.*from a copy"):
        load(tmp_path, *trained)
    # Whole, and without what belongs in it.
    save_file({"torch": torch.zeros(3)}, file)
    reseal(newest)
    with pytest.raises(ValueError, match="step-2"):
        load(tmp_path, *trained)
