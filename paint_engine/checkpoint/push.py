"""Pushes a finished run's adapter to the Hugging Face Hub (`run.push_to_hub`)."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCardData, get_token, is_offline_mode

from paint_engine.checkpoint.directory import best_checkpoint, list_checkpoints
from paint_engine.checkpoint.exported import export_adapter
from paint_engine.config.sections import ModelSection
from paint_engine.files import one_line, write_atomic
from paint_engine.model import is_on_hub

_CARD_FILE = "README.md"
_MAX_REASON_CHARS = 400


def check_push(repo: str | None) -> None:
    """Raises ValueError if nothing can be pushed at the end: no token is there, or the hub is
    switched off. What only the hub can tell is told at the end, by `push_adapter`.

    repo: `run.push_to_hub`.
    """
    if repo is None:
        return
    if is_offline_mode():
        raise ValueError(
            f"run.push_to_hub: got {repo} with HF_HUB_OFFLINE set, which keeps this process from "
            "the hub; unset it, or leave the key out and push the exported adapter elsewhere"
        )
    if get_token() is None:
        raise ValueError(
            f"run.push_to_hub: got {repo} and no token of the Hugging Face Hub; needs one that may "
            "write; run `hf auth login`, or set HF_TOKEN, or leave the key out"
        )


def push_adapter(
    run_dir: Path, base: ModelSection, repo: str, title: str, facts: Mapping[str, str]
) -> str:
    """Pushes the newest checkpoint's adapter, with a model card, and that of the best evaluated one
    as `best/` if it is another. A new repository is private. Returns a line for the console.

    base: with the revision that was trained on.
    title, facts: of the model card.

    No failure is an exception: training is over and saved, and everything that may fail here, from
    the network to the right to write, leaves the run as it is. The line then has the reason and the
    commands that push by hand.
    """
    try:
        with TemporaryDirectory() as folder:
            steps = _export_into(Path(folder), run_dir, base)
            card = _card(base, title, facts, steps)
            write_atomic(Path(folder) / _CARD_FILE, card)
            api = HfApi(library_name="paint-engine")
            url = api.create_repo(repo, private=True, exist_ok=True)
            message = f"Adapter after {steps['last']} steps"
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as failure:
        reason = one_line(" ".join(str(failure).split()))[:_MAX_REASON_CHARS]
        return (
            f"note: the adapter was not pushed to {repo}: {type(failure).__name__}: {reason}; the "
            f"run is finished and saved; push it with: {_by_hand(run_dir, repo)}"
        )
    return f"pushed the adapter to {url}"


def _export_into(folder: Path, run_dir: Path, base: ModelSection) -> dict[str, str]:
    """Writes the adapters. Returns the steps of the last and, if it is another, the best."""
    last, best = list_checkpoints(run_dir)[-1], best_checkpoint(run_dir)
    export_adapter(last, folder, base)
    steps = {"last": last.name.removeprefix("step-")}
    if best is not None and best.name != last.name:
        export_adapter(best, folder / "best", base)
        steps["best"] = best.name.removeprefix("step-")
    return steps


def _card(
    base: ModelSection, title: str, facts: Mapping[str, str], steps: Mapping[str, str]
) -> str:
    named = base.name_or_path if is_on_hub(base) else None
    data = ModelCardData(base_model=named, library_name="peft", tags=["lora", "paint"])
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    lines = [
        *("---", data.to_yaml(), "---", "", f"# {title}", ""),
        f"A LoRA adapter of {named or 'a model that is not on the hub'}, after {steps['last']} "
        "steps.",
    ]
    if "best" in steps:
        lines.append(
            f"`best/` has the adapter after {steps['best']} steps, which evaluated best during "
            "training: chosen on the problems that it is measured on."
        )
    return "\n".join([*lines, "", "| | |", "| --- | --- |", *rows, ""])


def _by_hand(run_dir: Path, repo: str) -> str:
    output = f"{run_dir.name}-adapter"
    export = ["python", "-m", "paint_engine.export", str(run_dir), output, "--form", "adapter"]
    return f"{shlex.join(export)} && {shlex.join(['hf', 'upload', '--private', repo, output])}"
