"""Checkpoints: whole or absent, damage found, the newest and the best kept, everything restored bit
for bit. At several ranks: test_checkpoint_ranks.py."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from paint_engine.checkpoint import directory as checkpoint_files
from paint_engine.checkpoint import save as checkpoint
from paint_engine.checkpoint.directory import (
    best_checkpoint,
    find_damage,
    list_checkpoints,
    mark_best,
)
from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.files import BadFile, ReadFailed, WriteFailed, unfinished_path
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, device=CPU)

Trained = tuple[nn.Module, torch.optim.Optimizer]


def build(
    model_dir: Path, *, lora: bool, seed: int = 0, rank: int = 4, device: torch.device = CPU
) -> Trained:
    base = load_base(ModelSection(name_or_path=str(model_dir), dtype="float32"), device)
    model = add_lora(base, LoraSection(enabled=lora, rank=rank, alpha=8), seed)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on a loss that reaches every trainable weight."""
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids.to(next(model.parameters()).device)).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def save(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, keep: int = 2
) -> Path:
    state = {"step": step, "seconds_train": 0.1, "data": {"epoch": 1}}
    return save_checkpoint(run_dir, model, optimizer, state, keep=keep, world=ALONE)


def load(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int | None, list[str]]:
    """The step that was restored, and what was warned of."""
    warned: list[str] = []
    state = load_checkpoint(run_dir, model, optimizer, world=ALONE, warn=warned.append)
    return (None if state is None else state["step"]), warned


@pytest.fixture
def trained(model_dir: Path, tmp_path: Path) -> Trained:
    """A run in tmp_path with step-1 and step-2."""
    model, optimizer = build(model_dir, lora=True)
    for step in (1, 2):
        take_step(model, optimizer, step)
        save(tmp_path, model, optimizer, step)
    return model, optimizer


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


def test_random_generators_continue_where_they_were(model_dir: Path, tmp_path: Path) -> None:
    def draw() -> list[float]:
        # gauss() and normal() keep the second number of a pair for the next call.
        return [torch.rand(()).item(), random.random(), random.gauss(), np.random.normal()]

    model, optimizer = build(model_dir, lora=True)
    draw()
    save(tmp_path, model, optimizer, 1)
    expected = [draw(), draw()]
    assert load(tmp_path, model, optimizer) == (1, [])
    assert [draw(), draw()] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_generator_and_moments_come_back(model_dir: Path, tmp_path: Path) -> None:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))
    model, optimizer = build(model_dir, lora=True, device=world.device)
    take_step(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1, world=world)
    drawn = torch.rand(4, device=world.device)
    resumed, its_optimizer = build(model_dir, lora=True, seed=5, device=world.device)
    load_checkpoint(tmp_path, resumed, its_optimizer, world=world, warn=pytest.fail)
    assert torch.equal(torch.rand(4, device=world.device), drawn)
    states = zip(optimizer.state.values(), its_optimizer.state.values(), strict=True)
    for moments, restored in states:
        for name, moment in moments.items():
            assert torch.equal(moment, restored[name])
            assert moment.device == restored[name].device
    take_step(resumed, its_optimizer, 2)


def test_the_adapter_loads_with_peft_alone(
    model_dir: Path, tmp_path: Path, trained: Trained
) -> None:
    base = load_base(ModelSection(name_or_path=str(model_dir), dtype="float32"), CPU)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "checkpoints/step-2"))
    ids = torch.arange(15)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained[0](input_ids=ids).logits)


def test_the_whole_model_loads_with_transformers_alone(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=False)
    take_step(model, optimizer, 1)
    target = save(tmp_path, model, optimizer, 1)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    ids = torch.arange(15)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_newest_and_the_best_stay(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=True)
    kept = []
    assert best_checkpoint(tmp_path) is None
    for step in (1, 2, 9, 10, 11, 12):
        save(tmp_path, model, optimizer, step)
        if step in (2, 11):
            mark_best(tmp_path, step)
        kept.append([checkpoint_files.checkpoint_step(path) for path in list_checkpoints(tmp_path)])
    assert kept == [[1], [1, 2], [2, 9], [2, 9, 10], [2, 10, 11], [11, 12]]
    link = tmp_path / "checkpoints/best"
    # Relative, so that the run's directory can be moved.
    assert str(link.readlink()) == "step-11"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert best_checkpoint(moved) == moved / "checkpoints/step-11"
    assert load(moved, model, optimizer) == (12, [])


def test_a_step_that_is_not_saved_is_not_marked_best(tmp_path: Path, trained: Trained) -> None:
    with pytest.raises(AssertionError, match="step-7"):
        mark_best(tmp_path, 7)
    shutil.rmtree(tmp_path / "checkpoints/step-1")
    mark_best(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints/step-2")
    assert best_checkpoint(tmp_path) is None


def test_a_checkpoint_cut_short_is_ignored_and_replaced(
    model_dir: Path, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained
    before = trainable(model)
    take_step(model, optimizer, 3)

    def power_cut(unfinished: Path, names: list[str]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Weights and moments are written; the manifest and the rename are yet to come.
        patch.setattr(checkpoint, "seal", power_cut)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, model, optimizer, 3)
    (unfinished,) = (tmp_path / "checkpoints").glob(".step-3.*.unfinished")
    assert (unfinished / "adapter_model.safetensors").exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1", "step-2"]
    resumed, its_optimizer = build(model_dir, lora=True)
    assert load(tmp_path, resumed, its_optimizer) == (2, [])
    assert all(torch.equal(t, before[n]) for n, t in trainable(resumed).items())

    (unfinished / "left-over").write_text("x")
    stale = unfinished_path(tmp_path / "checkpoints/step-1")
    stale.mkdir()
    target = save(tmp_path, model, optimizer, 3)
    assert not unfinished.exists() and not stale.exists()
    assert not (target / "left-over").exists()
    assert load(tmp_path, resumed, its_optimizer) == (3, [])


def test_every_file_is_on_the_disk_before_the_rename(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By inode, which a rename keeps.
    flushed: list[tuple[int, bool]] = []
    target = tmp_path / "checkpoints/step-3"
    original = os.fsync

    def spy(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, target.exists()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    save(tmp_path, *trained, 3)
    written = {path.stat().st_ino for path in (target, *target.rglob("*"))}
    assert {file for file, renamed in flushed if not renamed} == written
    assert [file for file, renamed in flushed if renamed] == [target.parent.stat().st_ino]


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path, trained: Trained) -> None:
    take_step(*trained, 3)
    content = (tmp_path / "checkpoints/step-2/adapter_model.safetensors").read_bytes()
    target = save(tmp_path, *trained, 2)
    assert (target / "adapter_model.safetensors").read_bytes() == content


def test_a_checkpoint_holds_no_pickle(tmp_path: Path, trained: Trained) -> None:
    target = tmp_path / "checkpoints/step-2"
    files = [path for path in target.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    record = json.loads((target / "trainer_state.json").read_text())
    assert record["state"]["step"] == 2 and record["world_size"] == 1
    (shard,) = (target / "trainer").iterdir()
    tensors = load_file(shard)
    # A and B in 14 linear maps: the weight, two moments and the count of steps.
    assert len(tensors) == 28 * 4
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def _truncate(file: Path) -> None:
    # A text's last character may be a newline that nobody misses.
    file.write_bytes(file.read_bytes()[:-2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [_truncate, _empty, _flip_bit, Path.unlink])
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


def test_without_an_intact_checkpoint_nothing_can_be_resumed(
    tmp_path: Path, trained: Trained
) -> None:
    for path in list_checkpoints(tmp_path):
        _empty(path / "trainer_state.json")
    with pytest.raises(ValueError, match=r"no intact checkpoint: step-1, step-2.*overwrite"):
        load(tmp_path, *trained)


def test_a_damaged_checkpoint_is_written_again_when_its_step_comes(
    model_dir: Path, tmp_path: Path, trained: Trained
) -> None:
    expected = trainable(trained[0])
    _flip_bit(tmp_path / "checkpoints/step-2/adapter_model.safetensors")
    model, optimizer = build(model_dir, lora=True)
    assert load(tmp_path, model, optimizer)[0] == 1
    # Of the damaged one nothing is counted: with room for one, the present step is the one.
    save(tmp_path, model, optimizer, 1, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1", "step-2"]
    take_step(model, optimizer, 2)
    save(tmp_path, model, optimizer, 2, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2"]
    resumed, its_optimizer = build(model_dir, lora=True, seed=3)
    assert load(tmp_path, resumed, its_optimizer) == (2, [])
    assert all(torch.equal(t, expected[n]) for n, t in trainable(resumed).items())


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


def test_a_full_disk_is_one_clear_error_and_older_checkpoints_stay_intact(
    small_disk: Path, model_dir: Path
) -> None:
    model, optimizer = build(model_dir, lora=True)
    take_step(model, optimizer, 1)
    save(small_disk, model, optimizer, 1)
    ballast = small_disk / "ballast"
    # Full at once, in the small files, in the shards, and when the adapter is written.
    for room in (0, 12_288, 32_768, 65_536, 98_304):
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
        with pytest.raises(WriteFailed, match=r"step-2 could not be saved.*[Nn]o space.*intact"):
            save(small_disk, model, optimizer, 2)
        assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["step-1"]
        ballast.unlink()
    assert load(small_disk, model, optimizer) == (1, [])
    save(small_disk, model, optimizer, 2, keep=1)
    assert load(small_disk, model, optimizer) == (2, [])


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
    for name in ("../../file", str(tmp_path / "file"), "trainer/../manifest.json", "./x"):
        (newest / "manifest.json").write_text(json.dumps(manifest | {name: [1, "0"]}))
        assert f"lists {name!r}, which is no file of a checkpoint" in str(find_damage(newest))
    for text in ("[]", "{}", '{"trainer_state.json": 3}', 100_000 * "[", "NaN"):
        (newest / "manifest.json").write_text(text)
        assert "manifest.json" in str(find_damage(newest)), text
    (newest / "manifest.json").unlink()
    os.mkfifo(newest / "manifest.json")
    assert "named pipe" in str(find_damage(newest))


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
