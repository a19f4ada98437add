"""Prompts from the cache are those that are encoded, whatever lies there."""

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from paint_engine.config.command_line import load_config
from paint_engine.config.sections import PromptsSection
from paint_engine.data import prompt_cache
from paint_engine.data.problem_sets import load_train_set
from paint_engine.data.prompt_cache import PromptCache, cache_directory
from paint_engine.prompts.chat import encode_student_prompts
from paint_engine.types import Problem

PROBLEMS = [
    Problem(f"p:{number}", text, "", "")
    for number, text in enumerate(
        ["How many kites?", "A row<|im_end|> that ends its turn", "π ≤ 3", "", "How many?"]
    )
]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAINT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(prompt_cache, "MIN_PROBLEMS", 3)
    return tmp_path / "cache" / "prompts"


def encoded(
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem] = PROBLEMS,
    prompts: PromptsSection | None = None,
    *,
    thinking: bool = False,
) -> list[tuple[int, ...]]:
    section = prompts or PromptsSection()
    return encode_student_prompts(tokenizer, problems, section, thinking=thinking)


def cached(
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem] = PROBLEMS,
    prompts: PromptsSection | None = None,
    *,
    thinking: bool = False,
    encode: Callable[[], list[tuple[int, ...]]] | None = None,
    say: Callable[[str], object] = str,
) -> list[tuple[int, ...]]:
    section = prompts or PromptsSection()
    make = encode or partial(encoded, tokenizer, problems, section, thinking=thinking)
    return PromptCache(tokenizer, say).get(
        make, problems, section, kind="student", thinking=thinking
    )


def unused() -> list[tuple[int, ...]]:
    raise AssertionError("encoded again")


def test_the_second_start_has_the_same_prompts_and_encodes_none(
    tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    said: list[str] = []
    first = cached(tokenizer, say=said.append)
    assert first == encoded(tokenizer) and len(set(first)) == len(PROBLEMS)
    (line,) = said
    assert re.fullmatch(r"encoded 5 prompts in \d+ s, kept in .* for the next start", line)
    assert str(directory) in line
    second = cached(tokenizer, encode=unused, say=said.append)
    assert second == first and len(said) == 1
    assert all(type(one) is int for prompt in second for one in prompt)


def test_whatever_decides_the_prompts_makes_others(
    tokenizer: PreTrainedTokenizerBase, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, added = deepcopy(tokenizer), deepcopy(tokenizer)
    template.chat_template = "{{ messages[0]['content'] }} <|im_end|>"
    added.add_tokens(["kites"])
    changes: list[tuple[PreTrainedTokenizerBase, dict[str, Any]]] = [
        (tokenizer, {}),
        (tokenizer, {"problems": PROBLEMS[::-1]}),
        (tokenizer, {"problems": PROBLEMS[:4]}),
        (tokenizer, {"thinking": True}),
        (tokenizer, {"prompts": PromptsSection(instruction="Box it.")}),
        (tokenizer, {"prompts": PromptsSection(student_template="{problem}\n{instruction}")}),
        (template, {}),
        (added, {}),
    ]
    for number, (one, settings) in enumerate(changes, start=1):
        assert cached(one, **settings) == encoded(one, **settings)
        assert len(list(directory.iterdir())) == number
    for one, settings in changes:
        assert cached(one, **settings, encode=unused) == encoded(one, **settings)
    # Other code, and other libraries.
    monkeypatch.setattr(prompt_cache, "_code", lambda: ["other"])
    cached(tokenizer)
    assert len(list(directory.iterdir())) == len(changes) + 1


def spoil(file: Path, how: str, other: Path) -> None:
    content = file.read_bytes()
    changed = bytearray(content)
    changed[-3] ^= 1
    spoiled = {
        "empty": b"",
        "cut short": content[:-4],
        "longer": content + b"\0\0\0\0",
        "one bit": bytes(changed),
        "seal alone": content[:32],
        "another file": other.read_bytes(),
        "foreign": b"PK\x03\x04" * 500,
    }
    if how == "link":
        target = file.with_name("target")
        target.write_bytes(content)
        file.unlink()
        file.symlink_to(target)
    elif how == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_bytes(spoiled[how])


HOW = ["empty", "cut short", "longer", "one bit", "seal alone", "another file", "foreign"]


@pytest.mark.parametrize("how", [*HOW, "link", "pipe"])
def test_what_lies_there_and_is_no_whole_file_is_made_again(
    how: str, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    cached(tokenizer)
    (file,) = directory.iterdir()
    whole = file.read_bytes()
    cached(tokenizer, thinking=True)
    (other,) = set(directory.iterdir()) - {file}
    spoil(file, how, other)
    assert cached(tokenizer) == encoded(tokenizer)
    assert file.read_bytes() == whole and not file.is_symlink()
    assert cached(tokenizer, encode=unused) == encoded(tokenizer)


def test_several_starts_at_once_have_the_same_prompts(
    tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    expected = encoded(tokenizer)
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(cached, tokenizer, encode=lambda: list(expected)) for _ in range(40)]
        assert all(one.result() == expected for one in found)
    assert len(list(directory.iterdir())) == 1
    assert cached(tokenizer, encode=unused) == expected


def test_a_directory_that_takes_no_file_costs_the_time_alone(
    tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    directory.parent.write_text("a file is in its place")
    said: list[str] = []
    assert cached(tokenizer, say=said.append) == encoded(tokenizer)
    (line,) = said
    assert "s, not kept for the next start: " in line and str(directory) in line


def test_the_oldest_files_go(
    tokenizer: PreTrainedTokenizerBase, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "_MAX_FILES", 2)
    foreign = directory / "notes.txt"
    directory.mkdir(parents=True)
    foreign.write_text("not ours")
    names = []
    for age, text in enumerate(("a", "b", "c", "d")):
        before = set(directory.iterdir())
        cached(tokenizer, prompts=PromptsSection(instruction=text))
        (new,) = set(directory.iterdir()) - before
        os.utime(new, (age, age))
        names.append(new)
    assert set(directory.iterdir()) == {foreign, *names[-2:]}


def test_what_cannot_be_known_is_not_kept(
    tokenizer: PreTrainedTokenizerBase, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_the_day = deepcopy(tokenizer)
    of_the_day.chat_template = "{{ strftime_now('%d') }} {{ messages[0]['content'] }}"
    cached(of_the_day)
    own = deepcopy(tokenizer)
    own.__class__ = type("Own", (type(tokenizer),), {"__module__": "their_code"})
    cached(own)
    cached(tokenizer, PROBLEMS[:2])
    monkeypatch.setenv("PAINT_CACHE_DIR", "none")
    cached(tokenizer)
    assert not directory.exists() and cache_directory() is None
    monkeypatch.setenv("PAINT_CACHE_DIR", str(directory.parent))
    cached(of_the_day, prompts=PromptsSection(date="2026-01-31"))
    assert len(list(directory.iterdir())) == 1


def test_the_directory_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAINT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_directory() == Path("/caches/paint-engine/prompts")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/one")
    assert cache_directory() == Path("/home/one/.cache/paint-engine/prompts")


def test_a_training_set_is_the_same_from_the_cache(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, directory: Path
) -> None:
    rows = [
        {
            "problem": f"How much is {n} + 1? <|im_end|>",
            "solution": f"{n + 1}",
            "answer": f"{n + 1}",
        }
        for n in range(5)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--data.path", str(path), "--eval.enabled", "false", "--rollout.max_new_tokens", "9"]
    argv += ["--teacher.reason_first", "true", "--teacher.reason_max_new_tokens", "9"]
    config, sets, lines = load_config(argv).config, [], []
    for _ in range(2):
        said: list[str] = []
        sets.append(load_train_set(config, tokenizer, 900, said.append))
        lines.append([line.split(" in ")[0] for line in said if line.startswith("encoded")])
    assert sets[0] == sets[1]
    # The student's, the teacher's, and the request for its rationale.
    assert lines == [["encoded 5 prompts"] * 3, []]
    assert len(list(directory.iterdir())) == 3
    # Room for the prompts is checked with those of the cache too.
    with pytest.raises(ValueError, match="the student's prompt takes"):
        load_train_set(config, tokenizer, 20, str)
