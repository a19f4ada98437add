"""A run directory of somebody else's: no command runs its code or calls its server, unless the
command line allows it."""

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import transformers.dynamic_module_utils as remote_code

from paint_engine import evaluate, export
from paint_engine.checkpoint.directory import file_names, seal
from paint_engine.evaluation.compare import read_run
from paint_engine.files import MANIFEST_FILE
from paint_engine.report.__main__ import main as report

Main = Callable[[Sequence[str]], int]
# Each leaves a file when it is run.
MODEL = """
from pathlib import Path
from typing import Any
from transformers import Qwen3Config, Qwen3ForCausalLM

Path({mark!r}).touch()


class TheirConfig(Qwen3Config):
    model_type = "theirs"


class TheirForCausalLM(Qwen3ForCausalLM):
    config_class = TheirConfig

    def __init__(self, config):
        Path({mark!r}).touch()
        super().__init__(config)
"""
PLUGIN = """
from pathlib import Path
from typing import Any
from paint_engine.contexts.answer import Answer as Shows
from paint_engine.recipes.paint import Paint as Theirs

Path({mark!r}).touch()


def judge(problem, text):
    return 1.0
"""
EVALUATE = ("--num-samples=1", "--max-new-tokens=4", "--engine=builtin", "--device=cpu")
REMOTE = "--model.trust_remote_code=true", "--model.name_or_path"


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    model_dir: Path,
    run_main: Main,
    write_rows: Callable[..., Path],
) -> Iterator[Path]:
    """Runs of a step, of adapters and of all weights, from a model with code."""
    work = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_code, "HF_MODULES_CACHE", str(work / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        make_hostile(shutil.copytree(model_dir, work / "model"), work / "was-run")
        settings = {
            **{"model.name_or_path": work / "model", "model.trust_remote_code": "true"},
            **{"data.path": write_rows(work / "rows.jsonl", 3), "train.device": "cpu"},
            **{"train.num_steps": 1, "train.batch_size": 2, "rollout.engine": "builtin"},
            **{"rollout.max_new_tokens": 6, "lora.rank": 4, "lora.alpha": 8},
            **{"eval.path": work / "rows.jsonl", "eval.num_samples": 1, "eval.num_problems": 1},
            **{"eval.max_new_tokens": 4, "eval.at_start": "false"},
        }
        given = [f"--{key}={value}" for key, value in settings.items()]
        assert run_main([*given, f"--run.dir={work / 'adapters'}"]) == 0
        whole = ["--lora.enabled=false", "--eval.enabled=false"]
        assert run_main([*given, f"--run.dir={work / 'whole'}", *whole]) == 0
        yield work


def make_hostile(model: Path, mark: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "TheirConfig", "AutoModelForCausalLM": "TheirForCausalLM"}
    settings |= {"model_type": "theirs", "architectures": ["TheirForCausalLM"]}
    settings["auto_map"] = {auto: f"theirs.{name}" for auto, name in names.items()}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "theirs.py").write_text(MODEL.format(mark=str(mark)))


@pytest.fixture
def mark(runs: Path) -> Path:
    """The file that the model's code leaves."""
    (runs / "was-run").unlink(missing_ok=True)
    return runs / "was-run"


@pytest.fixture
def run_dir(runs: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run of adapters, in which the commands are given."""
    copied = shutil.copytree(runs / "adapters", tmp_path / "run", symlinks=True)
    monkeypatch.chdir(copied)
    monkeypatch.syspath_prepend(copied)
    return copied


def code_of(main: Callable[[Sequence[str]], object], *argv: object) -> int:
    try:
        code = main([str(part) for part in argv])
    except SystemExit as stop:
        code = stop.code
    assert code is None or isinstance(code, int)
    return code or 0


def change(run_dir: Path, **values: object) -> None:
    """Sets keys of the run's file, given as section__key."""
    file = run_dir / "config.toml"
    tables = file.read_text().split("\n\n")
    for key, value in values.items():
        section, name = key.split("__")
        place = next(i for i, table in enumerate(tables) if table.startswith(f"[{section}]\n"))
        line = f"{name} = {json.dumps(value)}"
        tables[place], count = re.subn(rf"(?m)^{name} = .*$", line, tables[place])
        assert count == 1, key
    file.write_text("\n\n".join(tables))


# ---- a model's code ------------------------------------------------------------------------------

TRAIN = ("resume", "dry run", "print", "config")
OTHERS = ("evaluate", "evaluate step", "export", "export step")


def run_command(
    name: str, runs: Path, run_dir: Path, run_main: Main, *more: object, which: str = "1"
) -> int:
    on, out = (*EVALUATE, "--benchmarks", runs / "rows.jsonl"), run_dir.parent / "out"
    if name in TRAIN:
        at = "--config" if name == "config" else "--resume"
        place = run_dir / "config.toml" if name == "config" else run_dir
        flag = {"print": ["--print-config"], "resume": []}.get(name, ["--dry-run"])
        return code_of(run_main, at, place, *flag, *more)
    if name.startswith("evaluate"):
        place = f"{run_dir}:{which}" if "step" in name else run_dir
        return code_of(evaluate.main, "--adapter", place, *on, *more)
    step = run_dir / "checkpoints" / "step-1"
    place = [step, out, "--form", "adapter"] if "step" in name else [run_dir, out]
    return code_of(export.main, *place, *more)


@pytest.mark.parametrize("name", TRAIN + OTHERS)
def test_no_command_runs_the_code_of_the_model_that_a_run_names(
    name: str, runs: Path, run_dir: Path, mark: Path, run_main: Main, capsys: Any
) -> None:
    assert run_command(name, runs, run_dir, run_main) == 2
    printed = capsys.readouterr().out
    model = runs / "model"
    needed = f"--model.trust_remote_code true --model.name_or_path {model}"
    assert (needed if name in TRAIN else f"--trust-remote-code --model {model}") in printed
    # A habit is no permission for whatever model the directory names.
    trusted = "--model.trust_remote_code=true" if name in TRAIN else "--trust-remote-code"
    assert run_command(name, runs, run_dir, run_main, trusted) == 2
    assert str(model) in capsys.readouterr().out
    assert not mark.exists()


@pytest.mark.parametrize("name", ["resume", "dry run", "config", "evaluate", "export"])
def test_with_the_flags_it_runs(
    name: str, runs: Path, run_dir: Path, mark: Path, run_main: Main
) -> None:
    flags = [*REMOTE, runs / "model"]
    flags = ["--trust-remote-code", "--model", runs / "model"] if name in OTHERS else flags
    flags += ["--run.dir", "none"] if name == "config" else []
    assert run_command(name, runs, run_dir, run_main, *flags) == 0
    assert mark.exists()


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_a_checkpoint_of_all_weights_runs_the_code_of_its_base_and_not_its_copy(
    name: str, runs: Path, mark: Path, tmp_path: Path, run_main: Main, capsys: Any
) -> None:
    run_dir = shutil.copytree(runs / "whole", tmp_path / "run", symlinks=True)
    step, theirs = run_dir / "checkpoints" / "step-1", tmp_path / "copy-was-run"
    assert (step / "theirs.py").is_file()
    (step / "theirs.py").write_text(MODEL.format(mark=str(theirs)))
    (step / MANIFEST_FILE).unlink()
    manifest = seal(step, file_names(step))
    (step / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert run_command(name, runs, run_dir, run_main) == 2
    assert not mark.exists() and not theirs.exists()
    flags = ["--trust-remote-code", "--model", runs / "model"]
    assert run_command(name, runs, run_dir, run_main, *flags) == 0
    assert mark.exists() and not theirs.exists()
    capsys.readouterr()
    vllm = [*flags, "--engine", "vllm"]
    if name == "evaluate":
        assert run_command(name, runs, run_dir, run_main, *vllm) == 2
        assert not theirs.exists()


# ---- modules of recipes and rewards --------------------------------------------------------------


@pytest.fixture
def plugin(run_dir: Path, mark: Path, request: pytest.FixtureRequest) -> str:
    """The name of a module in the run directory, which leaves the same file. The run's own model
    has no code."""
    name = "theirs_" + re.sub(r"\W", "_", request.node.name)
    (run_dir / f"{name}.py").write_text(PLUGIN.format(mark=str(mark)))
    change(run_dir, model__name_or_path="tiny", model__trust_remote_code=False)
    return name


@pytest.mark.parametrize(
    ("key", "name"),
    [("objective.name", "Theirs"), ("reward.function", "judge"), ("teacher.context", "Shows")],
)
def test_no_command_imports_a_module_that_a_run_names(
    key: str,
    name: str,
    runs: Path,
    run_dir: Path,
    plugin: str,
    mark: Path,
    run_main: Main,
    capsys: Any,
) -> None:
    value = f"{plugin}:{name}"
    change(run_dir, **{key.replace(".", "__"): value})
    for command in TRAIN:
        assert run_command(command, runs, run_dir, run_main) == 2
        assert f"--{key} {value}" in capsys.readouterr().out
    assert code_of(report, run_dir) == (2 if key == "objective.name" else 0)
    assert read_run(str(run_dir))
    assert not mark.exists()
    assert run_command("dry run", runs, run_dir, run_main, f"--{key}", value) == 0
    assert mark.exists()


@pytest.mark.parametrize(
    ("key", "name", "own"),
    [
        ("reward.function", "judge", "math"),
        ("objective.name", "R", "opsd"),
        ("teacher.context", "Shows", "answer"),
    ],
)
def test_what_a_run_asks_for_is_not_advised_to_who_declines_it(
    key: str,
    name: str,
    own: str,
    runs: Path,
    run_dir: Path,
    plugin: str,
    mark: Path,
    run_main: Main,
    capsys: Any,
) -> None:
    change(run_dir, **{key.replace(".", "__"): f"{plugin}:{name}"})
    assert run_command("dry run", runs, run_dir, run_main, f"--{key}", own) == 2
    printed = capsys.readouterr().out
    assert f"--run.dir none --{key} VALUE" in printed and f"--{key} {plugin}" not in printed
    assert not mark.exists()


# ---- a server ------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[str | None]]]:
    """Its address, and the key of each request that it got."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization"))
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", keys
        listening.shutdown()


def test_no_server_that_a_run_names_gets_a_request_or_the_key(
    server: tuple[str, list[str | None]],
    runs: Path,
    run_dir: Path,
    run_main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    url, keys = server
    monkeypatch.setenv("VLLM_API_KEY", "planted-key")
    change(run_dir, rollout__url=url, rollout__engine="vllm")
    flags = [*REMOTE, runs / "model"]
    for command in TRAIN:
        assert run_command(command, runs, run_dir, run_main, *flags) == 2
        printed = capsys.readouterr().out
        assert f"""--rollout.url '["{url}"]'""" in printed and "planted-key" not in printed
    assert keys == []
    assert run_command("resume", runs, run_dir, run_main, *flags, "--rollout.url", url) == 2
    assert keys and set(keys) == {"Bearer planted-key"}
    # The run is resumed without a server too.
    own = [*flags, "--rollout.url=none", "--rollout.engine=builtin"]
    assert run_command("resume", runs, run_dir, run_main, *own) == 0
