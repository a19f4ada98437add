"""A revision of a model on the hub: read from exactly that commit, recorded, and used again."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from paint_engine import evaluate
from paint_engine.checkpoint import find_base
from paint_engine.config.schema import Config
from paint_engine.config.sections import ModelSection
from paint_engine.model import hub_commit, load_base, load_tokenizer, meta_model, resolve_model

OLD, NEW, TORN = "a" * 40, "b" * 40, "c" * 40
NAME = "someone/model"


@pytest.fixture
def cache(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As the hub's: two commits of a model, with other weights and another context, a tag for the
    older, and a third commit of which only the configuration was fetched."""
    cache = tmp_path / "hub" / "models--someone--model"
    for commit in (OLD, NEW):
        shutil.copytree(model_dir, cache / "snapshots" / commit)
    file = cache / "snapshots" / NEW / "model.safetensors"
    save_file({n: 2 * t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((file.parent / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 777}))
    torn = cache / "snapshots" / TORN
    torn.mkdir()
    shutil.copy(model_dir / "config.json", torn)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(NEW)
    (cache / "refs" / "v1").write_text(OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.parametrize(
    ("revision", "commit"), [(OLD, OLD), ("v1", OLD), (NEW, NEW), ("main", NEW), (None, NEW)]
)
def test_everything_is_read_from_the_named_commit(
    revision: str | None, commit: str, cache: Path
) -> None:
    section = ModelSection(name_or_path=NAME, revision=revision)
    model = load_base(section, torch.device("cpu"))
    stored = load_file(cache / "snapshots" / commit / "model.safetensors")
    assert torch.equal(model.get_parameter("model.norm.weight"), stored["model.norm.weight"])
    context = 777 if commit == NEW else 1024
    assert model.config.max_position_embeddings == context
    assert meta_model(Config(model=section)).config.max_position_embeddings == context  # pyright: ignore[reportAttributeAccessIssue]
    assert load_tokenizer(section).chat_template
    assert hub_commit(section) == commit
    # What peft records as the adapter's base is no place in this machine's cache.
    assert model.name_or_path == NAME
    if revision is not None:
        assert Path(resolve_model(section)) == cache / "snapshots" / commit


@pytest.mark.usefixtures("cache")
def test_a_revision_that_there_is_not_and_one_of_a_directory_are_refused(model_dir: Path) -> None:
    unknown = ModelSection(name_or_path=NAME, revision="v2")
    for read in (load_tokenizer, resolve_model, lambda s: meta_model(Config(model=s))):
        with pytest.raises(ValueError, match=r"revision 'v2' of the model 'someone/model' could"):
            read(unknown)
    for local in ("tiny", str(model_dir)):
        section = ModelSection(name_or_path=local, revision="v1")
        assert hub_commit(section) is None
        with pytest.raises(ValueError, match=r"model.revision: got 'v1' .* a local directory"):
            load_tokenizer(section)
    with pytest.raises(ValueError, match=r"has no tokenizer"):
        load_tokenizer(ModelSection(name_or_path=NAME, revision=TORN))


def test_a_run_records_its_commit_and_goes_on_from_no_other(
    command: list[str],
    cache: Path,
    run_main: Callable[[Sequence[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (cache / "refs" / "main").write_text(OLD)
    argv = [*command, "--model.name_or_path", NAME, "--train.num_steps", "1"]
    assert run_main([*argv, "--eval.enabled", "false"]) == 0
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "versions.json").read_text())["model_commit"] == OLD
    adapter = json.loads((run_dir / "checkpoints/step-1/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, OLD)

    # Someone pushes to the model.
    (cache / "refs" / "main").write_text(NEW)
    resume = ["--resume", str(run_dir), "--train.num_steps", "2"]
    capsys.readouterr()
    assert run_main(resume) == 2
    printed = capsys.readouterr().out
    assert f"is at commit {NEW}, and {run_dir} was started with {OLD}" in printed
    assert f"give --model.revision {OLD}" in printed
    assert run_main([*resume, "--model.revision", OLD]) == 0

    base = find_base(run_dir / "checkpoints/step-2", None)
    assert (base.name_or_path, base.revision) == (NAME, OLD)
    assert find_base(run_dir / "checkpoints/step-2", None, "v1").revision == "v1"
    shutil.copytree(run_dir / "checkpoints/step-2", tmp_path / "elsewhere" / "adapter")
    assert find_base(tmp_path / "elsewhere" / "adapter", None).revision == OLD

    arguments = [
        *("--adapter", str(run_dir), "--benchmarks", str(tmp_path / "test.jsonl")),
        *("--num-samples", "1", "--max-new-tokens", "4", "--engine", "builtin", "--device", "cpu"),
    ]
    for revision, commit in ((), OLD), (("--revision", NEW), NEW):
        output = tmp_path / commit
        evaluate.main([*arguments, *revision, "--output", str(output)])
        subject = json.loads((output / "results.json").read_text())["subject"]
        assert (subject["model"], subject["commit"]) == (NAME, commit)
        assert subject["weights"] is None
