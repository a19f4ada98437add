"""The command line of a run.

[--preset NAME | --config FILE.toml | --resume RUN_DIR] [--section.key value ...]
[--dry-run] [--print-config] [--allow-changed-data]

A preset or a file overrides the defaults, or the preset that its first line `extends`;
`--section.key value` overrides both. Without arguments the preset is tiny.
"""

import argparse
import difflib
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from paint_engine.config.schema import Config
from paint_engine.config.toml import (
    LEAVES,
    build_config,
    recorded_config,
    toml_value,
    value_of,
)
from paint_engine.config.trust import check_granted, run_directory_of, trust_flags
from paint_engine.files import (
    CONFIG_FILE,
    FILE_FAILURES,
    ReadFailed,
    WriteFailed,
    argument_path,
    check_links,
    read_tables,
    shown,
)
from paint_engine.files.terminal import Terminal

DEFAULT_PRESET = "tiny"
_PRESETS = Path(__file__).with_name("presets")
_EXTENDS = "extends"
_LEAST_LIKENESS = 0.7
"""lowest similarity (0 to 1) at which a name is suggested; below it, likeness is coincidence"""
_OPTIONS = (
    *("preset", "config", "resume", "dry-run", "print-config", "allow-changed-data", "help"),
)
_SECTIONS = tuple(dict.fromkeys(key.rsplit(".", 1)[0] for key in LEAVES))
# Keys that change how a step is computed but not what it computes. Rows are compared by their
# digest, so that their file may be moved, and models of the hub by their commit.
_MAY_DIFFER_ON_RESUME = (
    "train.num_steps",
    "train.max_tokens_per_microbatch",
    "train.device",
    "data.path",
    "data.revision",
    "model.revision",
    "teacher.revision",
    "model.attention",
    "rollout.engine",
    "rollout.url",
    "rollout.max_sequences",
    "rollout.gpu_memory_utilization",
    "rollout.tensor_parallel_size",
    "rollout.adapter_dir",
    "teacher.url",
    "reward.timeout_s",
    "optim.max_skipped_steps",
    "run.samples_per_step",
    "run.samples_per_evaluation",
    "run.tensorboard",
    "run.wandb_project",
    "run.push_to_hub",
    "run.auto_resume",
)
_SECTIONS_MAY_DIFFER_ON_RESUME = ("checkpoint.", "eval.", "parallel.")


@dataclass(frozen=True)
class CommandLine:
    """What the user asked for.

    CommandLine(config, preset="tiny", dry_run=False, print_config=False, resume=None)

    preset: None if `--config` or `--resume` was given.
    resume: the run directory to resume; `config.run.dir` is then that directory.
    allow_changed_data: resume although the data is not what the run was started with.
    """

    config: Config
    preset: str | None
    dry_run: bool
    print_config: bool
    resume: Path | None
    allow_changed_data: bool = False


@contextmanager
def user_errors(console: Terminal, rank: int = 0) -> Iterator[None]:
    """Ends the program with one message: with exit code 2 on a ValueError, which is a user's
    mistake, and with 1 where the system refused a file or another process took the directory."""
    try:
        yield
    except (ValueError, *FILE_FAILURES) as error:
        # The mistake may have been found on this rank alone, whose console is quiet.
        where = Terminal(stderr=True) if rank else console
        prefix = f"rank {rank}: " if rank else ""
        lines = [f"{prefix}error: {error}"]
        if isinstance(error, WriteFailed | ReadFailed):
            lines.append("safe: all that was there before; give the same command again")
        where.say(*lines, style="red")
        sys.exit(2 if isinstance(error, ValueError) else 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(
            f"{message}; needs --section.key value, or --section.key=value where the value begins "
            "with a dash; --help lists every key"
        )


def _metavar(annotation: Any) -> str:
    if annotation is bool:
        return "true|false"
    return "|".join(get_args(annotation)) if get_origin(annotation) is Literal else "VALUE"


def _parser(prog: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--preset NAME | --config FILE.toml | --resume RUN_DIR] "
        "[--section.key value ...] [--dry-run] [--print-config] [--allow-changed-data]",
        description=f"Without arguments, runs the preset {DEFAULT_PRESET!r}. The defaults below "
        "are the paper's; a\npreset or a file overrides them; --section.key value overrides both.",
        epilog=f"presets:\n{_preset_listing()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="a published recipe for a model, from the list at the end"
    )
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        type=argument_path,
        help=f'sections as TOML tables; {_EXTENDS} = "NAME" above them starts from a preset',
    )
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        type=argument_path,
        help="resume a run from its last checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved TOML and stop"
    )
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="resume although rows of the data, or data.* keys, have changed; not recorded",
    )
    groups = {section: parser.add_argument_group(section) for section in _SECTIONS}
    for key, field in LEAVES.items():
        text = f"{field.description} (default: {toml_value(field.default)})".replace("%", "%%")
        groups[key.rsplit(".", 1)[0]].add_argument(
            f"--{key}", metavar=_metavar(field.annotation), default=argparse.SUPPRESS, help=text
        )
    return parser


def preset_names() -> tuple[str, ...]:
    """Returns the names that `--preset` accepts, sorted."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.toml")))


def _preset_listing() -> str:
    """Returns one line per preset: its name, and the first line of its file."""
    width = max(map(len, preset_names()))
    firsts = ((_PRESETS / f"{name}.toml").read_text().splitlines()[0] for name in preset_names())
    lines = zip(preset_names(), firsts, strict=True)
    return "\n".join(f"  {name:{width}}  {first.lstrip('# ')}" for name, first in lines)


_MAX_GUESSED_CHARS = 100
"""a longer name is no misspelled one, and comparing it would take long"""


def _guess(name: str, candidates: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the candidate most similar to `name`, or "" if none is
    similar. Compares the whole name and its last dotted part, which may be one word of it or its
    initials (lr for learning_rate)."""
    if len(name) > _MAX_GUESSED_CHARS:
        return ""
    last = name.split(".")[-1]

    def likeness(candidate: str) -> tuple[float, float]:
        part = candidate.split(".")[-1]
        words = part.split("_")
        initials = "".join(word[0] for word in words)
        is_short = last in (*words, initials) and len(last) > 1
        in_part = 1.0 if is_short else difflib.SequenceMatcher(None, last, part).ratio()
        return difflib.SequenceMatcher(None, name, candidate).ratio(), in_part

    nearest = max(candidates, key=lambda candidate: sum(likeness(candidate)))
    return f"; did you mean {nearest}?" if max(likeness(nearest)) >= _LEAST_LIKENESS else ""


def _refuse_unknown(key: str, source: str, candidates: Iterable[str]) -> NoReturn:
    section = key.split(".")[0]
    inside = [leaf for leaf in LEAVES if leaf.startswith(f"{section}.")]
    listing = f"; [{section}] has {', '.join(inside)}" if inside else ""
    raise ValueError(
        f"{source}: got the unknown key {shown(key)}; needs a key that --help lists{listing}"
        f"{_guess(key, candidates)}"
    )


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested tables as dotted keys. An empty table is kept as a key."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        flat |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return flat


def _read_file(path: Path, *, is_recorded: bool) -> tuple[str | None, dict[str, Any]]:
    """Returns the preset that a configuration file extends, and its own dotted keys and values.

    is_recorded: it is a run directory's and no link. What the user names may be one.

    Raises ValueError with the file and the line, or with an unknown key and the most similar one.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; needs a TOML configuration; check the path, "
            f"or name a preset: --preset {'|'.join(preset_names())}"
        )
    remedy = "restore it from a copy" if is_recorded else "correct it there"
    table = read_tables(path, remedy=remedy, follow_link=not is_recorded)
    parent = table.pop(_EXTENDS, None)
    if parent is not None and not isinstance(parent, str):
        raise ValueError(
            f"{path}: {_EXTENDS}: got {shown(parent)}; needs a preset's name in quotes, such as "
            f'{_EXTENDS} = "{DEFAULT_PRESET}"; --help lists them'
        )
    flat = flatten(table)
    for key in flat:
        section, _, last = key.rpartition(".")
        if section and last == _EXTENDS:
            raise ValueError(
                f"{path}: got {_EXTENDS} in the section [{section[:60]}]; needs it above the first "
                "section, since it applies to the whole file; move the line to the top"
            )
        if key not in LEAVES and not (flat[key] == {} and key in _SECTIONS):
            _refuse_unknown(key, str(path), (*LEAVES, _EXTENDS))
    return parent, {key: value for key, value in flat.items() if key in LEAVES}


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the dotted keys and values of a run's recorded configuration, which extends no
    preset.

    Raises ValueError with the file and the line, or with an unknown key and the most similar one.
    """
    parent, flat = _read_file(path, is_recorded=True)
    if parent is not None:
        raise ValueError(
            f"{path}: got {_EXTENDS} = {shown(parent)}; needs every value in the file itself, "
            f"since a preset may change after the run; start a new run with --config {path}"
        )
    return flat


def _layers(
    source: str, path: Path, followed: tuple[str, ...] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """Returns the layers of a file and of the presets that it extends, as (source, dotted keys and
    values) pairs, overridden ones first.

    followed: the presets on the way to this file.
    """
    parent, flat = _read_file(path, is_recorded=False)
    if parent is None:
        return [(source, flat)]
    below = _preset_path(parent, f"{path}: {_EXTENDS}")
    if parent in followed:
        raise ValueError(
            f"{path}: {_EXTENDS}: got {parent!r}, which makes a cycle "
            f"({' -> '.join((*followed, parent))}); needs a preset that does not lead back; name "
            "another"
        )
    return [*_layers(f"preset {parent}", below, (*followed, parent)), (source, flat)]


def _takes_text(annotation: Any) -> bool:
    if get_origin(annotation) in (Literal, tuple):
        return False
    return annotation is str or any(_takes_text(part) for part in get_args(annotation))


def parse_value(text: str, key: str) -> Any:
    """Returns the value of `text` if it is TOML, else `text`. In a text field, 2024 and true stay
    text."""
    takes_text = _takes_text(LEAVES[key].annotation)
    # Lower case accepts Python's True and False.
    for attempt in (text,) if takes_text else (text, text.lower()):
        with suppress(tomllib.TOMLDecodeError, RecursionError):
            value = tomllib.loads(f"value = {attempt}")["value"]
            return text if takes_text and not isinstance(value, str) else value
    if not takes_text:
        # Python accepts .5 and 1. as numbers, TOML does not.
        with suppress(ValueError):
            return float(text)
    return text


def _check_resumed(
    run_dir: Path, config: Config, recorded: Config, keys: Iterable[str], *, allow_data: bool
) -> None:
    for key in keys:
        before, now = value_of(recorded, key), value_of(config, key)
        scheduled = key == "train.num_steps" and recorded.optim.schedule != "constant"
        if scheduled and before != now:
            raise ValueError(
                f"--{key} with --resume: got {shown(now)}, but the run was started with "
                f"{shown(before)} and "
                f"a {recorded.optim.schedule} schedule, which depends on the number of steps; "
                "needs the same value; start a new run instead"
            )
        if key == "teacher.url" and before != now and None in (before, now):
            raise ValueError(
                f"--{key} with --resume: got {shown(now)}, but the run was started with "
                f"{shown(before)}; needs a server if the run was started with one, and none "
                "otherwise, because a resumed run keeps its teacher; start a new run instead"
            )
        free = key in _MAY_DIFFER_ON_RESUME or key.startswith(_SECTIONS_MAY_DIFFER_ON_RESUME)
        free = free or (allow_data and key.startswith("data."))
        if not free and before != now:
            # Only what this command line grants is repeated, never what the directory asks for.
            data_too = " (with --allow-changed-data, data.* too)" * key.startswith("data.")
            raise ValueError(
                f"--{key} with --resume: got {shown(now)}, but the run was started with "
                f"{shown(before)}; "
                "needs the same value, because a resumed run continues the same training: only "
                f"{', '.join(_MAY_DIFFER_ON_RESUME)}, checkpoint.*, eval.* and parallel.* may "
                f"change{data_too}; start a new run instead: --config {run_dir / CONFIG_FILE} "
                f"--run.dir none{trust_flags(config, but=key)} --{key} VALUE"
            )


def check_same_run(run_dir: Path, config: Config, *, allow_data: bool = False) -> None:
    """Raises ValueError if the run in the directory was started with another value of a setting
    that changes what it computes.

    allow_data: other values of data.* are accepted.
    """
    # The command line alone says what is imported, so that nothing in the directory is.
    recorded = recorded_config([(str(run_dir), read_toml(run_dir / CONFIG_FILE))])
    keys = (key for key in LEAVES if key not in ("run.dir", "run.overwrite"))
    _check_resumed(run_dir, config, recorded, keys, allow_data=allow_data)


def _resume(run_dir: Path, overrides: Mapping[str, Any], *, allow_data: bool) -> Config:
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"--resume {run_dir}: no {CONFIG_FILE} there; needs the directory of an earlier run; "
            "check the path, or start a new run without --resume"
        )
    check_links(run_dir)
    # The run directory may have been moved since.
    layers = [(str(path), read_toml(path)), ("--resume", {"run.dir": str(run_dir)})]
    recorded, layers = recorded_config(layers), [*layers, ("command line", overrides)]
    asked = recorded_config(layers)
    check_granted(asked, overrides, f"--resume {run_dir}", resumes=True)
    _check_resumed(run_dir, asked, recorded, overrides, allow_data=allow_data)
    return build_config(layers)


def _read_config(path: Path, overrides: Mapping[str, Any]) -> Config:
    """Reads the file of `--config`: the user's own, or one of a run directory."""
    layers = [*_layers(str(path), path), ("command line", overrides)]
    if (run_dir := run_directory_of(path)) is not None:
        source = f"--config {path} (of the run directory {run_dir})"
        check_granted(recorded_config(layers), overrides, source, resumes=False)
    return build_config(layers)


def _preset_path(name: str, asked_by: str) -> Path:
    names = preset_names()
    if name not in names:
        raise ValueError(
            f"{asked_by}: got {shown(name)}; needs one of {', '.join(names)}{_guess(name, names)}"
        )
    return _PRESETS / f"{name}.toml"


def load_config(argv: Sequence[str], *, prog: str = "python -m paint_engine.train") -> CommandLine:
    """Parses a command line and checks every value; `-h` prints all keys and exits.

    argv: without the program's name, such as ["--preset", "tiny", "--train.num_steps", "10"].
    prog: the command's name in `--help`.

    Raises ValueError with a line for each refused value: what it is, what is needed, what to do.
    """
    parser = _parser(prog)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if name.startswith("--"):
            _refuse_unknown(name[2:], name, (*LEAVES, *_OPTIONS))
        parser.error(f"got the argument {name!r} outside of any key")
    given = [name for name in ("preset", "config", "resume") if getattr(flags, name) is not None]
    if len(given) > 1:
        raise ValueError(
            f"got --{' and --'.join(given)}; needs at most one of them, since each is a whole "
            "configuration; keep one and set single values with --section.key value"
        )
    texts = {key: value for key, value in vars(flags).items() if key in LEAVES}
    overrides = {key: parse_value(text, key) for key, text in texts.items()}
    preset = None
    if flags.resume is not None:
        config = _resume(flags.resume, overrides, allow_data=flags.allow_changed_data)
    elif flags.config is not None:
        config = _read_config(flags.config, overrides)
    else:
        preset = DEFAULT_PRESET if flags.preset is None else flags.preset
        layers = _layers(f"preset {preset}", _preset_path(preset, "--preset"), (preset,))
        config = build_config([*layers, ("command line", overrides)])
    if flags.allow_changed_data and flags.resume is None and not config.run.auto_resume:
        raise ValueError(
            "--allow-changed-data: got it for a new run, whose data is compared with nothing; "
            "leave it out, or resume a run with --resume RUN_DIR"
        )
    return CommandLine(
        config,
        preset,
        flags.dry_run,
        flags.print_config,
        flags.resume,
        flags.allow_changed_data,
    )
