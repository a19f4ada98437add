"""What widens trust comes from the command line, and never from a run directory's own file."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from paint_engine.checkpoint.run_dir import (
    lock_run_dir,
    prepare_run_dir,
    resume_again,
    start_again,
)
from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.config.toml import LEAVES, flag, toml_value, value_of
from paint_engine.config.trust import check_granted, run_directory_of, trust_flags

# Of each setting, a value that widens trust. The module of the recipe stands in `hostile`.
HOSTILE: Mapping[str, object] = {
    "model.trust_remote_code": True,
    "model.name_or_path": "their/model",
    "model.revision": "refs/pr/13",
    "objective.name": "MODULE:Theirs",
    "teacher.context": "MODULE:Shows",
    "objective.token_weights": "MODULE:weights",
    "reward.function": "MODULE:judge",
    "rollout.url": ("http://127.0.0.1:9",),
    "rollout.adapter_dir": "/home/victim",
    "teacher.url": "http://127.0.0.1:9/teacher",
    "eval.base_cache": "/home/victims",
    "run.wandb_project": "theirs",
    "run.push_to_hub": "their/adapter",
}
# Of teachers that are other models, which do not go with a server; tried below.
EXTERNAL = ("teacher.model", "teacher.models", "teacher.revision")
# Text that names rows or weights to read, columns of rows, layers, or prompts.
DATA = re.compile(
    r"(data|eval)\.(path|revision|split|columns\.\w+)|eval\.benchmarks|prompts\.\w+|masking\.marker"
    r"|teacher\.(route_column|model_names|served_model)"
    r"|lora\.target_modules"
)


def takes_text(annotation: Any) -> bool:
    return annotation is str or any(takes_text(part) for part in get_args(annotation))


def test_each_setting_that_takes_text_is_data_or_widens_trust() -> None:
    """A new one has to be decided."""
    texts = {k for k, f in LEAVES.items() if takes_text(f.annotation) and not is_choice(f)}
    undecided = {key for key in texts if not DATA.fullmatch(key)}
    others = {"run.dir", *EXTERNAL}
    assert undecided == HOSTILE.keys() - {"model.trust_remote_code"} | others


def is_choice(field: Any) -> bool:
    return all(isinstance(part, str) for part in get_args(field.annotation)) and bool(
        get_args(field.annotation)
    )


@pytest.fixture
def hostile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """A run directory whose file asks for everything, and which is the working directory, as after
    `cd` into an unpacked archive. Its module leaves `imported` there when it is run."""
    run_dir, name = tmp_path / "their run", "theirs_" + re.sub(r"\W", "_", request.node.name)
    run_dir.mkdir()
    (run_dir / f"{name}.py").write_text(
        "from pathlib import Path\nfrom paint_engine.recipes.paint import Paint as Theirs\n"
        "from paint_engine.contexts.answer import Answer as Shows\n"
        "Path(__file__).with_name('imported').touch()\n"
        "def weights(tokens): return tokens.position\n"
    )
    # A server has no other temperature.
    values = {**values_of(run_dir), "objective.temperature": 1.0}
    write_config(run_dir / "config.toml", values)
    monkeypatch.chdir(run_dir)
    monkeypatch.syspath_prepend(run_dir)
    return run_dir


def values_of(run_dir: Path) -> dict[str, object]:
    (module,) = run_dir.glob("theirs_*.py")
    return {
        key: value.replace("MODULE", module.stem) if isinstance(value, str) else value
        for key, value in HOSTILE.items()
    }


def write_config(file: Path, values: Mapping[str, object]) -> None:
    tables: dict[str, list[str]] = {}
    for key, value in values.items():
        section, name = key.rsplit(".", 1)
        tables.setdefault(section, [f"[{section}]"]).append(f"{name} = {toml_value(value)}")
    file.write_text("\n".join("\n".join(lines) for lines in tables.values()))


def in_a_message(value: object) -> str:
    return toml_value(value) if isinstance(value, tuple) else repr(value)


def refusal(*argv: object) -> str:
    with pytest.raises(ValueError) as caught:
        load_config([str(part) for part in argv])
    assert not Path("imported").exists()
    return str(caught.value)


def test_resume_names_every_setting_and_the_flags_that_allow_it(hostile: Path) -> None:
    message = refusal("--resume", hostile, "--dry-run")
    assert message.startswith(f"--resume {hostile}: needs --model.trust_remote_code true --model.")
    for key, value in values_of(hostile).items():
        assert f"{key} {in_a_message(value)} (" in message and flag(key, value) in message
    assert refusal("--resume", hostile, "--print-config") == message
    flags = message.partition("needs ")[2].partition(" on this command line")[0]
    config = load_config(["--resume", str(hostile), *shlex.split(flags)]).config
    assert config.rollout.url == HOSTILE["rollout.url"]
    assert Path("imported").exists()


@pytest.mark.parametrize("key", HOSTILE)
def test_each_setting_is_asked_for(hostile: Path, key: str) -> None:
    """Also where the command line gives all of the others."""
    values = values_of(hostile)
    others = [part for k, v in values.items() if k != key for part in shlex.split(flag(k, v))]
    assert refusal("--resume", hostile, *others).count(" (") == 1
    assert flag(key, values[key]) in refusal("--resume", hostile, *others)


def test_the_flag_has_to_be_the_recorded_value(hostile: Path) -> None:
    flags = {**values_of(hostile), "model.name_or_path": "my/model"}
    argv = [part for k, v in flags.items() for part in shlex.split(flag(k, v))]
    message = refusal("--resume", hostile, *argv)
    assert message.startswith("--model.name_or_path with --resume: got 'my/model', but the run was")


@pytest.mark.parametrize(
    "key", ["rollout.url", "rollout.adapter_dir", "eval.base_cache", "run.wandb_project"]
)
def test_places_and_servers_may_be_left_out_of_a_resumed_run(hostile: Path, key: str) -> None:
    write_config(hostile / "config.toml", {key: HOSTILE[key]})
    assert "none = " in refusal("--resume", hostile)
    config = load_config(["--resume", str(hostile), f"--{key}", "none"]).config
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) is None


@pytest.mark.parametrize(
    "external",
    [
        {"teacher.model": "their/teacher", "teacher.revision": "refs/pr/14"},
        {"teacher.models": ("their/teacher", "another/one")},
    ],
)
def test_external_teachers_with_code_are_asked_for(
    tmp_path: Path, external: Mapping[str, object]
) -> None:
    values = {"model.trust_remote_code": True, "teacher.weights": "external", **external}
    write_config(tmp_path / "config.toml", values)
    message = refusal("--resume", tmp_path)
    assert all(flag(key, value) in message for key, value in external.items())
    config = load_config(["--resume", str(tmp_path), *shlex.split(flags_of(message))]).config
    assert {key: value_of(config, key) for key in external} == external
    # Without code, they are weights to read.
    del values["model.trust_remote_code"]
    write_config(tmp_path / "config.toml", values)
    assert trust_flags(load_config(["--resume", str(tmp_path)]).config) == ""


def test_built_in_names_need_no_flag(tmp_path: Path) -> None:
    values = {"objective.name": "grpo", "reward.function": "first_box", "data.path": "x.jsonl"}
    write_config(tmp_path / "config.toml", {**values, "model.name_or_path": "their/model"})
    config = load_config(["--resume", str(tmp_path)]).config
    assert (config.objective.name, config.model.name_or_path) == ("grpo", "their/model")
    assert trust_flags(config) == ""


@pytest.mark.parametrize(
    "disguise", ["itself", "renamed", "linked", "below", "checkpoints", "CONFIG"]
)
def test_a_run_directory_s_file_is_none_of_the_user_s_own(hostile: Path, disguise: str) -> None:
    """Whatever it is called in the directory, and whatever the directory leaves out."""
    file = hostile / "config.toml"
    if disguise in ("renamed", "below"):
        given = hostile / ("below/mine.toml" if disguise == "below" else "mine.toml")
        given.parent.mkdir(exist_ok=True)
        given.write_bytes(file.read_bytes())
    elif disguise == "linked":
        given = hostile.parent / "mine.toml"
        given.symlink_to(file)
    elif disguise == "checkpoints":
        given = file.rename(hostile / "mine.toml")
        (hostile / "checkpoints" / "step-4").mkdir(parents=True)
    elif disguise == "CONFIG":
        # As on a file system that does not tell capital letters.
        given = file.rename(hostile / "Config.TOML")
    else:
        given = file
    assert run_directory_of(given) == hostile
    message = refusal("--config", given)
    assert message.startswith(f"--config {given} (of the run directory {hostile}): needs --model.")
    for key, value in values_of(hostile).items():
        assert f"{key} {in_a_message(value)} (" in message
    assert "a file of your own may set all of this, if it is not named config.toml" in message
    given = given.relative_to(Path.cwd()) if disguise != "linked" else given
    assert "needs --model.trust_remote_code true" in refusal("--config", given)
    load_config(["--config", str(given), *shlex.split(flags_of(message))])


def flags_of(message: str) -> str:
    return message.partition(": needs ")[2].partition(" on this command line")[0]


def test_a_run_s_file_neither_says_where_to_write_nor_deletes(hostile: Path) -> None:
    write_config(hostile / "config.toml", {"run.dir": "/home/victim/best", "run.overwrite": True})
    message = refusal("--config", hostile / "config.toml")
    assert "needs --run.dir none --run.overwrite false on this command line" in message
    assert "run.dir '/home/victim/best' (writes there" in message
    config = load_config(["--config", "config.toml", *shlex.split(flags_of(message))]).config
    assert (config.run.dir, config.run.overwrite) == (None, False)
    config = load_config(["--resume", str(hostile)]).config
    assert config.run.dir == str(hostile)


def test_a_file_of_the_user_s_own_may_set_everything(hostile: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine" / "paint.toml"
    own.parent.mkdir()
    (hostile / "config.toml").rename(own)
    assert run_directory_of(own) is None
    config = load_config(["--config", str(own)]).config
    assert config.reward.function == values_of(hostile)["reward.function"]


def choose_run_dir(config: Config, name: str) -> tuple[Path, bool]:
    """The run's directory, and whether training resumes there, as for a command without
    `--resume`."""
    lock = lock_run_dir(config, name, resume=False)
    try:
        return lock.directory, prepare_run_dir(config, name, lock.directory)
    finally:
        lock.release()


def test_the_same_command_resumes_by_itself(hostile: Path) -> None:
    """`run.auto_resume`, and a restart by torchrun, take everything from the command line. The
    record is compared with it, and not imported."""
    (hostile / "versions.json").write_text('{"preset": "run"}')
    again = ["--run.dir", str(hostile), "--run.auto_resume", "true", "--model.name_or_path"]
    plain = load_config(["--preset", "tiny", *again, "their/model"]).config
    with pytest.raises(ValueError, match=r"needs the same value") as caught:
        choose_run_dir(plain, "tiny")
    assert not Path("imported").exists()
    # The command did not allow the model's code: it is not told to.
    advice = str(caught.value).partition("start a new run")[2]
    assert "--model.trust_remote_code VALUE" in advice and "true" not in advice
    same = load_config(shlex.split(start_again(hostile, record_of(hostile)))).config
    assert choose_run_dir(same, "run") == (hostile, False)


def record_of(run_dir: Path) -> Config:
    values = values_of(run_dir)
    argv = [part for k, v in values.items() for part in shlex.split(flag(k, v))]
    return load_config(["--resume", str(run_dir), *argv]).config


def test_the_commands_that_are_printed_work_when_they_are_pasted(hostile: Path) -> None:
    config = record_of(hostile)
    assert load_config(shlex.split(resume_again(hostile, config))).config == config
    for overwrite in (False, True):
        again = load_config(shlex.split(start_again(hostile, config, overwrite=overwrite))).config
        assert again.run.dir == str(hostile) and again.objective == config.objective
        assert (again.run.overwrite, again.run.auto_resume) == (overwrite, not overwrite)
    new = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": False})})
    with pytest.raises(ValueError, match="exists already") as caught:
        choose_run_dir(new, "run")
    pasted = re.search(r"resume it with (.*), choose another", str(caught.value))
    assert pasted is not None
    assert load_config(shlex.split(pasted[1])).config == config


@pytest.mark.parametrize(
    "text",
    [
        *("module:f; touch x", "$(touch x)", "-x", "--resume", "it's", '"quoted"', "'quoted'"),
        *("\x1b[2J\x07", "a\nb", "\u202eevil", "\x9b31m", "a\\nb", "emoji \U0001f600", ' "a" # b'),
    ],
)
def test_a_flag_reads_back_as_the_value_and_can_be_printed(text: str) -> None:
    given = flag("run.wandb_project", text)
    assert given.isprintable()
    assert load_config(shlex.split(given)).config.run.wandb_project == text


def test_a_message_has_no_control_characters_of_the_file(tmp_path: Path) -> None:
    write_config(tmp_path / "config.toml", {"reward.function": "\x1b]0;theirs\x07\u202e:f"})
    config = load_config(["--reward.function", '"\\u001b]0;theirs\\u0007\u202e:f"']).config
    assert config.reward.function.startswith("\x1b]0;")
    with pytest.raises(ValueError) as caught:
        check_granted(config, (), "--resume x", resumes=True)
    assert str(caught.value).isprintable()
