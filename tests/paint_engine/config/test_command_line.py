"""The command line: presets, files, overrides, resume, help and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from paint_engine.config import command_line as cli
from paint_engine.config.command_line import load_config, preset_names, read_toml
from paint_engine.config.schema import Config
from paint_engine.config.toml import LEAVES, to_toml, toml_value, value_of
from paint_engine.files import BadFile

PAPER_PRESETS = ("paint-qwen3-1.7b", "paint-qwen3-4b", "paint-qwen3-8b")


def message_of(*argv: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(argv)
    return str(caught.value)


def test_nothing_given_is_the_tiny_preset() -> None:
    line = load_config([])
    assert line.preset == "tiny"
    assert (line.dry_run, line.print_config, line.resume) == (False, False, None)
    assert line.config == load_config(["--preset", "tiny"]).config
    assert (
        line.config.model.name_or_path == line.config.data.path == line.config.eval.path == "tiny"
    )
    assert line.config.eval.thinking is False


def test_flags() -> None:
    line = load_config(["--dry-run", "--print-config", "--preset=paint-qwen3-8b"])
    assert (line.dry_run, line.print_config, line.preset) == (True, True, "paint-qwen3-8b")


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_paper_presets_hold_appendix_b(name: str) -> None:
    config = load_config(["--preset", name]).config
    assert config.model.name_or_path.lower() == f"qwen/{name.removeprefix('paint-')}"
    # The paper names Qwen3's seven linear layers; the default is all that a model has.
    assert config.lora.model_copy(update={"target_modules": ("all-linear",)}) == Config().lora
    assert len(config.lora.target_modules) == 7
    assert config.masking == Config().masking
    assert config.rollout == Config().rollout
    assert config.objective == Config().objective
    assert config.optim == Config().optim
    assert (config.train.num_steps, config.train.batch_size) == (100, 32)
    assert config.data.path == "siyanzhao/Openthoughts_math_30k_opsd"
    assert (config.eval.path, config.eval.split) == ("HuggingFaceH4/aime_2024", "train")
    assert config.eval.num_problems is None
    assert config.eval.thinking is True
    assert (config.eval.max_new_tokens, config.eval.num_samples) == (38912, 12)
    assert (config.eval.every, config.checkpoint.every) == (20, 20)


def test_tiny_gives_a_reason_for_each_departure_from_the_paper() -> None:
    tiny, paper = load_config([]).config, Config()
    departures = {key for key in LEAVES if value_of(tiny, key) != value_of(paper, key)}
    assert departures
    section, before = "", ""
    for line in (
        Path(cli.__file__).with_name("presets").joinpath("tiny.toml").read_text().split("\n")
    ):
        if line.startswith("["):
            section = line.strip("[]")
        key = f"{section}.{line.split(' = ')[0]}"
        if key in departures:
            assert before.startswith("# "), key
            departures.remove(key)
        before = line
    assert not departures


def test_a_file_lies_over_the_preset_that_it_extends(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('extends = "opsd-qwen3-4b"\n[masking]\nrho_correct = 0.25\n')
    line = load_config(["--config", str(file), "--train.num_steps", "9"])
    assert line.preset is None
    # From opsd-qwen3-8b, which the preset extends, and from its own file.
    assert (line.config.masking.rho_wrong, line.config.masking.rho_correct) == (0.0, 0.25)
    assert line.config.model.name_or_path == "Qwen/Qwen3-4B"
    assert (line.config.train.num_steps, line.config.eval.max_new_tokens) == (9, 38912)


def test_a_refused_value_is_named_with_the_preset_that_it_comes_from(
    presets: Callable[..., None],
) -> None:
    presets(low="[train]\nseed = 1.5\n", high='extends = "low"\n')
    assert "preset low: train.seed: got 1.5" in message_of("--preset", "high")


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts presets of these names and texts in the place of the package's."""

    def write(**texts: str) -> None:
        for name, text in texts.items():
            (tmp_path / f"{name}.toml").write_text(text)
        monkeypatch.setattr(cli, "_PRESETS", tmp_path)

    return write


@pytest.mark.parametrize(
    ("texts", "chain"),
    [
        ({"a": 'extends = "a"\n'}, "a -> a"),
        ({"a": 'extends = "b"\n', "b": 'extends = "c"\n', "c": 'extends = "b"\n'}, "b -> c -> b"),
    ],
)
def test_presets_that_extend_each_other_in_a_circle_are_refused(
    presets: Callable[..., None], texts: dict[str, str], chain: str
) -> None:
    presets(**texts)
    message = message_of("--preset", "a")
    assert chain in message
    assert "needs a preset that does not" in message


def test_a_run_s_record_that_extends_a_preset_is_refused(run_dir: Path) -> None:
    (run_dir / "config.toml").write_text('extends = "tiny"\n')
    assert "needs every value in the file itself" in message_of("--resume", str(run_dir))


@pytest.mark.parametrize("joined", [False, True])
def test_overrides_in_both_spellings(joined: bool) -> None:
    given = {
        "optim.learning_rate": "1e-4",
        "eval.top_k": "-1",
        "lora.target_modules": '["q_proj", "v_proj"]',
        "objective.pointwise_clip": "none",
        "lora.enabled": "false",
        "data.columns.problem": "prompt",
    }
    argv = []
    for key, value in given.items():
        argv += [f"--{key}={value}"] if joined else [f"--{key}", value]
    config = load_config(argv).config
    assert config.optim.learning_rate == 1e-4
    assert config.eval.top_k == -1
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.objective.pointwise_clip is None
    assert config.lora.enabled is False
    assert config.data.columns.problem == "prompt"
    assert config.train.num_steps == load_config([]).config.train.num_steps


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024", "2024"),
        ("true", "true"),
        ("2024-05-01", "2024-05-01"),
        ("inf", "inf"),
        ('"quoted"', "quoted"),
        ('"\\N"', '"\\N"'),
        ("a b # c", "a b # c"),
        ("[x", "[x"),
        ("1e3", "1e3"),
        ("x\ny = 1", "x\ny = 1"),
        ("None", None),
    ],
)
def test_text_fields_keep_their_text(text: str, value: str | None) -> None:
    assert load_config([f"--run.dir={text}"]).config.run.dir == value


@pytest.mark.parametrize(("text", "value"), [(".5", 0.5), ("1.", 1.0), ("2", 2.0), ("5E-1", 0.5)])
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert load_config(["--eval.temperature", text]).config.eval.temperature == value


@pytest.mark.parametrize(("text", "value"), [("True", True), ("false", False)])
def test_booleans_as_python_writes_them(text: str, value: bool) -> None:
    assert load_config(["--run.overwrite", text]).config.run.overwrite is value


def test_a_value_that_begins_with_dashes_takes_the_equals_sign() -> None:
    assert load_config(["--prompts.teacher_suffix=--x"]).config.prompts.teacher_suffix == "--x"
    assert "--section.key=value" in message_of("--prompts.teacher_suffix", "--x")


def test_the_last_of_two_values_wins() -> None:
    argv = ["--train.seed", "1", "--train.seed=2"]
    assert load_config(argv).config.train.seed == 2


def test_file_lies_over_the_defaults_and_overrides_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        "[train]\nnum_steps = 7\nseed = 3\n[data.columns]\nproblem = 'q'\n[eval.columns]\n"
    )
    line = load_config(["--config", str(file), "--train.num_steps", "9"])
    assert line.preset is None
    assert (line.config.train.num_steps, line.config.train.seed) == (9, 3)
    assert line.config.data.columns.problem == "q"
    # The defaults, not the tiny preset.
    assert line.config.eval.max_new_tokens == 38912


@pytest.mark.parametrize("name", preset_names())
def test_presets_round_trip_through_a_file(name: str, tmp_path: Path) -> None:
    config = load_config(["--preset", name]).config
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(["--config", str(file)]).config == config


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--optim.lr", "1e-4"], ["--optim.lr", "did you mean optim.learning_rate?"]),
        (["--optim.lr=1e-4"], ["--optim.lr", "[optim] has optim.learning_rate, "]),
        (["--learning_rate", "1"], ["--learning_rate", "did you mean optim.learning_rate?"]),
        (["--lr", "1e-4"], ["unknown key 'lr'", "did you mean optim.learning_rate?"]),
        (["--steps", "3"], ["unknown key 'steps'", "did you mean train.num_steps?"]),
        (["--bs=8"], ["unknown key 'bs'", "did you mean train.batch_size?"]),
        (["--trian.num_steps", "1"], ["--trian.num_steps", "did you mean train.num_steps?"]),
        (["--dryrun"], ["--dryrun", "did you mean dry-run?"]),
        (["--train", "1"], ["--train", "needs a key that --help lists"]),
        (["tiny"], ["got the argument 'tiny'", "needs --section.key value", "--help"]),
        (["--train.seed"], ["--train.seed", "expected one argument", "--help"]),
        (
            ["--preset", "tniy"],
            ["'tniy'", "needs one of grpo-paint-qwen3-1.7b", "did you mean tiny?"],
        ),
        (["--preset", "tiny", "--config", "x.toml"], ["--preset and --config", "at most one"]),
        (["--resume", "x", "--preset", "tiny"], ["--preset and --resume", "at most one"]),
        (["--config", "absent.toml"], ["absent.toml: no such file", "needs", "--preset"]),
        (["--resume", "absent"], ["--resume absent", "needs the directory", "check the path"]),
        (
            ["--train.num_steps", "x"],
            ["command line: train.num_steps: got 'x'", "needs a valid integer"],
        ),
        (["--data.max_rows", "1e3"], ["data.max_rows: got 1000.0", "needs a valid integer"]),
    ],
)
def test_refused_command_lines(argv: list[str], parts: list[str]) -> None:
    message = message_of(*argv)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("argv", [("--epochs", "3"), ("--preset", "xyzzy"), ("--s", "1")])
def test_what_resembles_nothing_gets_no_guess(argv: tuple[str, ...]) -> None:
    message = message_of(*argv)
    assert argv["--preset" in argv].lstrip("-") in message
    assert "did you mean" not in message


def test_prefixes_of_keys_are_not_taken_for_keys() -> None:
    assert "unknown key 'train.num'" in message_of("--train.num", "3")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[optim]\nlr = 1.0\n", ["my.toml", "'optim.lr'", "did you mean optim.learning_rate?"]),
        ("[optimiser]\neps = 1.0\n", ["my.toml", "'optimiser.eps'", "did you mean optim.eps?"]),
        ("[optimiser]\n", ["my.toml", "'optimiser'"]),
        ("seed = 1\n", ["my.toml", "'seed'", "did you mean train.seed?"]),
        ('extend = "tiny"\n', ["my.toml", "'extend'", "did you mean extends?"]),
        ('extends = "opsd-tyni"\n', ["my.toml: extends: got", "did you mean opsd-tiny?"]),
        ("extends = 3\n", ["my.toml: extends: got 3", "needs a preset's name"]),
        (
            '[train]\nextends = "tiny"\n',
            ["my.toml: got extends in the section [train]", "needs it above the first section"],
        ),
        ('[data.columns]\nextends = "tiny"\n', ["[data.columns]", "move the line to the top"]),
        ("train = 1\n", ["my.toml", "'train'"]),
        ("[train.seed]\nx = 1\n", ["my.toml", "'train.seed.x'", "did you mean train.seed?"]),
        ("[[train]]\nseed = 1\n", ["my.toml", "'train'"]),
        ("[train.seed]\n", ["my.toml: train.seed: got {}", "needs a valid integer"]),
        ("[train]\nseed = \n", ["my.toml: not valid TOML", "line 2", "needs lines such as"]),
        ("[train]\nseed = 1.5\n", ["my.toml: train.seed: got 1.5", "needs a valid integer"]),
    ],
)
def test_refused_files(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text)
    message = message_of("--config", str(file))
    for part in parts:
        assert part in message


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_bytes("[run]\ndir = 'é'\n".encode("latin-1"))
    assert "my.toml: not valid TOML" in message_of("--config", str(file))


def test_a_file_that_the_user_names_may_be_a_link_and_one_of_a_run_may_not(tmp_path: Path) -> None:
    file, run_dir = tmp_path / "my.toml", tmp_path / "run"
    file.write_text("[train]\nseed = 7\n")
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    assert load_config(["--config", str(link)]).config.train.seed == 7
    run_dir.mkdir()
    (run_dir / "config.toml").symlink_to(file)
    with pytest.raises(BadFile, match=r"config\.toml is a symbolic link"):
        read_toml(run_dir / "config.toml")


def test_help_lists_presets_and_every_key_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for key, field in LEAVES.items():
        assert f"--{key} " in text
        assert field.description is not None and field.description in text
    assert "usage: python -m paint_engine.train " in text
    assert "(default: 5e-06)" in text
    assert "--lora.enabled true|false\n" in text and "--objective.name VALUE" in text
    assert "--objective.divergence forward_kl|reverse_kl|jsd\n" in text
    assert "--train.seed VALUE\n" in text or "--train.seed VALUE " in text
    assert all(name in text for name in preset_names())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = load_config(["--preset", "paint-qwen3-4b", "--run.dir", "elsewhere"]).config
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return tmp_path


def test_resume_takes_the_recorded_configuration_and_its_own_directory(run_dir: Path) -> None:
    line = load_config(["--resume", str(run_dir)])
    assert line.resume == run_dir
    assert line.preset is None
    assert line.config.run.dir == str(run_dir)
    assert line.config.model.name_or_path == "Qwen/Qwen3-4B"
    assert line.config.train.num_steps == 100


def test_resume_lets_what_does_not_change_the_training_differ(run_dir: Path) -> None:
    allowed = {
        "train.num_steps": "200",
        "checkpoint.keep": "9",
        "eval.num_samples": "4",
        "eval.columns.problem": "q",
        "run.samples_per_step": "0",
        "run.tensorboard": "true",
        # As it was: not a change.
        "optim.learning_rate": "5e-6",
    }
    argv = [part for key, value in allowed.items() for part in (f"--{key}", value)]
    config = load_config(["--resume", str(run_dir), *argv]).config
    assert (config.train.num_steps, config.checkpoint.keep) == (200, 9)
    assert (config.eval.num_samples, config.eval.columns.problem) == (4, "q")
    assert (config.run.samples_per_step, config.run.tensorboard) == (0, True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.learning_rate", "1e-4"),
        ("train.seed", "1"),
        ("data.max_rows", "3"),
        ("run.dir", "y"),
    ],
)
def test_resume_refuses_another_training(run_dir: Path, key: str, value: str) -> None:
    message = message_of("--resume", str(run_dir), f"--{key}", value)
    assert message.startswith(f"--{key} with --resume: got ")
    assert "because a resumed run continues the same training" in message
    assert f"--config {run_dir / 'config.toml'} --run.dir none --{key}" in message


def test_resume_refuses_a_damaged_configuration(run_dir: Path) -> None:
    (run_dir / "config.toml").write_text("[train]\nnum_stepz = 1\n")
    assert "did you mean train.num_steps?" in message_of("--resume", str(run_dir))


def test_the_examples_in_messages_are_values_that_the_command_line_takes() -> None:
    argv = [f"--{key}={toml_value(field.default)}" for key, field in LEAVES.items()]
    assert load_config(argv).config == Config()
