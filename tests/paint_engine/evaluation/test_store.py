"""Evaluations that draw the same random numbers however they are cut, and the files they are kept
in."""

import io
import json
import random
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paint_engine import evaluate as command_line
from paint_engine.config.benchmarks import benchmark_name
from paint_engine.config.sections import EvalSection, PromptsSection
from paint_engine.distributed import World
from paint_engine.evaluation.accuracy import correct_matrix
from paint_engine.evaluation.answers import all_requests, evaluate
from paint_engine.evaluation.store import (
    EvalSample,
    Header,
    SampleFiles,
    evaluation_settings,
    fingerprints,
    read_evaluation,
    read_finished,
    read_unfinished,
)
from paint_engine.files import BadFile, WriteFailed, append_lines, read_jsonl
from paint_engine.rewards.math import MathReward
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.engine import Completion, sampling_params
from paint_engine.types import Problem

WORLD = World(0, 1, 0, torch.device("cpu"))
PROBLEMS = [Problem(f"p:{i}", "q", "", "3") for i in range(4)]
SECTION = EvalSection(num_samples=3, max_new_tokens=8)
PROMPTS = PromptsSection(instruction="Go.")


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    indices: list[int],
    *,
    seed: int = 0,
    max_sequences: int = 5,
    requests: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[EvalSample], list[EvalSample]]:
    seen: list[EvalSample] = []
    prompts = [tuple(range(10, 14 + 3 * i)) for i in range(4)]
    problems = [PROBLEMS[i] for i in indices]
    samples = evaluate(
        BuiltinEngine(model, lambda: nullcontext(model), max_sequences),
        tokenizer,
        problems,
        [prompts[i] for i in indices],
        all_requests(problems, SECTION.num_samples) if requests is None else requests,
        sampling_params(SECTION, model, tokenizer),
        MathReward(5.0),
        seed=seed,
        base=False,
        on_samples=seen.extend,
    )
    return samples, seen


def test_samples_come_in_the_problems_order_and_are_all_reported(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    samples, seen = _evaluate(base, tokenizer, [3, 1, 2, 0])
    names = [(s.problem_id, s.sample_index) for s in samples]
    assert names == [(f"p:{i}", j) for i in (3, 1, 2, 0) for j in range(3)]
    assert sorted(seen, key=samples.index) == samples
    assert all(1 <= s.num_tokens <= 8 for s in samples)
    assert all(s.num_tokens == 8 for s in samples if s.truncated)


def test_a_sample_depends_on_seed_problem_and_index_alone(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    samples, _ = _evaluate(base, tokenizer, [0, 1, 2, 3])
    alone, _ = _evaluate(base, tokenizer, [2], max_sequences=1)
    assert alone == samples[6:9]
    assert len({s.text for s in alone}) > 1
    other, _ = _evaluate(base, tokenizer, [2], seed=1)
    assert [s.text for s in other] != [s.text for s in alone]


def test_a_part_of_an_evaluation_is_what_the_whole_has_there(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, _ = _evaluate(base, tokenizer, [0, 1, 2, 3])
    requests = [(3, 1), (0, 2), (2, 0)]
    part, seen = _evaluate(base, tokenizer, [0, 1, 2, 3], requests=requests)
    assert part == [whole[10], whole[2], whole[6]]
    assert len(seen) == 3
    assert _evaluate(base, tokenizer, [0, 1, 2, 3], requests=[]) == ([], [])


def test_answers_are_checked_against_their_own_problem(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {3: "so $\\boxed{3}$", 4: "so $\\boxed{4}$", 5: "no box"}
    rng = random.Random(0)

    def planted(self, prompts, seeds, params, *, base, on_batch) -> list[Completion]:
        order = list(range(len(prompts)))
        rng.shuffle(order)
        done = [
            Completion(tuple(tokenizer.encode(texts[len(prompt)])), (), len(prompt) == 5)
            for prompt in prompts
        ]
        on_batch(order, [done[i] for i in order])
        return done

    monkeypatch.setattr(BuiltinEngine, "generate", planted)
    problems = [Problem("a", "q", "", "3"), Problem("b", "q", "", "3"), Problem("c", "q", "", "3")]
    samples = evaluate(
        BuiltinEngine(base, lambda: nullcontext(base), 5),
        tokenizer,
        problems,
        [(1,) * 3, (1,) * 4, (1,) * 5],
        all_requests(problems, SECTION.num_samples),
        sampling_params(SECTION, base, tokenizer),
        MathReward(5.0),
        seed=0,
        base=False,
        on_samples=lambda group: None,
    )
    assert correct_matrix(samples).tolist() == [[True] * 3, [False] * 3, [False] * 3]
    assert [s.extracted for s in samples[::3]] == ["3", "4", None]
    assert [s.truncated for s in samples[::3]] == [False, False, True]
    assert all(s.error is None for s in samples)


HEADER = Header(
    "bench",
    evaluation_settings(SECTION, 0, PROMPTS),
    {"model": "m"},
    fingerprints(PROBLEMS),
)
REQUESTS = all_requests(PROBLEMS, SECTION.num_samples)


def _answer(request: tuple[int, int]) -> EvalSample:
    i, j = request
    return EvalSample(f"p:{i}", j, "text\n", 5 + i, "3", (i + j) % 2 == 0, False, None)


def _open(directory: Path, header: Header = HEADER, *, replace: bool = False) -> SampleFiles:
    return SampleFiles(directory, "bench", header, WORLD, replace=replace)


def _whole(directory: Path) -> bytes:
    files = _open(directory)
    files.append([_answer(request) for request in files.share(REQUESTS)])
    files.finish(1.0)
    return (directory / "bench.jsonl").read_bytes()


def test_each_group_is_written_at_once_and_a_stopped_evaluation_resumes(tmp_path: Path) -> None:
    expected = _whole(tmp_path / "whole")
    directory, partial = tmp_path / "cut", tmp_path / "cut" / "bench.rank-0.jsonl"
    for size in (4, 3):
        files = _open(directory)
        before = len(read_jsonl(partial))
        left = files.share(REQUESTS)
        files.append([_answer(request) for request in reversed(left[-size:])])
        # Before anything is closed.
        assert len(read_jsonl(partial)) == before + size
        # A kill in the middle of a line.
        with partial.open("ab") as file:
            file.write(b'{"problem_id": "p:0", "sam')
        assert read_finished(directory, "bench", HEADER) is None
        assert not (directory / "bench.jsonl").exists()
        files.close()
    files = _open(directory)
    assert files.share(REQUESTS) == REQUESTS[:5]
    files.append([_answer(request) for request in REQUESTS[:5]])
    assert files.missing(REQUESTS) == []
    evaluation = files.finish(2.5)
    assert (directory / "bench.jsonl").read_bytes() == expected
    assert [(s.problem_id, s.sample_index) for s in evaluation.samples] == [
        (f"p:{i}", j) for i, j in REQUESTS
    ]
    assert read_finished(directory, "bench", HEADER) == evaluation
    assert not list(directory.glob("*.rank-*"))


def test_another_number_of_ranks_resumes(tmp_path: Path) -> None:
    """What three ranks left, in a file each, is not done again by one."""
    expected = _whole(tmp_path / "whole")
    directory, shares = tmp_path / "cut", []
    for rank in range(3):
        world = World(rank, 3, rank, torch.device("cpu"))
        # Outside of a process group a rank other than the first hears of no sample before.
        files = SampleFiles(directory, "bench", HEADER, world, replace=False)
        shares.append(files.share(REQUESTS) if rank else REQUESTS[::3])
        files.append([_answer(request) for request in shares[rank][:2]])
        files.close()
    assert sorted(request for share in shares for request in share) == REQUESTS
    files = _open(directory)
    left = files.share(REQUESTS)
    assert sorted([*left, *(r for share in shares for r in share[:2])]) == REQUESTS
    files.append([_answer(request) for request in left])
    files.finish(1.0)
    assert (directory / "bench.jsonl").read_bytes() == expected


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(HEADER, subject={"model": "n"}), "model 'm' and not 'n'"),
        (
            replace(HEADER, settings=HEADER.settings | {"temperature": 0.5}),
            r"temperature 1\.0 and not 0\.5",
        ),
        (replace(HEADER, problems=fingerprints(PROBLEMS[:3])), "with other problems"),
        (
            replace(HEADER, problems=fingerprints([replace(p, answer="4") for p in PROBLEMS])),
            "with other problems",
        ),
    ],
)
def test_samples_of_another_evaluation(tmp_path: Path, other: Header, message: str) -> None:
    """Refused while they are few and when they are all there; or replaced, during a training."""
    files = _open(tmp_path)
    files.append([_answer((0, 0))])
    files.close()
    with pytest.raises(ValueError, match=message):
        _open(tmp_path, other)
    again = _open(tmp_path, other, replace=True)
    assert again.finished == []
    again.close()
    again = _open(tmp_path, replace=True)
    assert again.finished == []
    again.append([_answer(request) for request in REQUESTS])
    again.finish(1.0)
    with pytest.raises(ValueError, match=message):
        read_finished(tmp_path, "bench", other)


def test_a_file_whose_first_line_was_cut_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "bench.rank-0.jsonl").write_bytes(b'{"header": {"benchm')
    files = _open(tmp_path)
    assert files.finished == []
    files.append([_answer((0, 0))])
    files.close()
    first, second = read_jsonl(tmp_path / "bench.rank-0.jsonl")
    assert first["header"]["benchmark"] == "bench"
    assert second["problem_id"] == "p:0"


def test_a_name_with_the_characters_of_a_pattern_resumes_too(tmp_path: Path) -> None:
    for left in (12, 7):
        files = SampleFiles(tmp_path, "aime[24]", HEADER, WORLD, replace=False)
        requests = files.share(REQUESTS)
        assert len(requests) == left
        files.append([_answer(request) for request in requests[:5]])
        files.close()
    with pytest.raises(ValueError, match="model 'm' and not 'n'"):
        read_unfinished(tmp_path, "aime[24]", replace(HEADER, subject={"model": "n"}))
    # Of another evaluation, which the pattern would mean.
    other = tmp_path / "aime2.rank-0.jsonl"
    other.write_text("kept")
    files = SampleFiles(tmp_path, "aime[24]", HEADER, WORLD, replace=False)
    files.append([_answer(request) for request in files.share(REQUESTS)])
    files.finish(1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "aime2.rank-0.jsonl",
        "aime[24].json",
        "aime[24].jsonl",
    ]
    assert other.read_text() == "kept"


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """The write that meets the limit is short, and the next one fails."""
    expected = _whole(tmp_path / "whole")
    partial = tmp_path / "cut" / "bench.rank-0.jsonl"
    files = _open(partial.parent)
    files.append([_answer(request) for request in REQUESTS[:3]])
    before = partial.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 200, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.append([_answer(request) for request in REQUESTS[3:8]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert partial.read_bytes() == before
    assert files.missing(REQUESTS) == REQUESTS[3:]
    files.append([_answer(request) for request in REQUESTS[3:8]])
    files.close()
    files = _open(partial.parent)
    assert files.missing(REQUESTS) == REQUESTS[8:]
    files.append([_answer(request) for request in REQUESTS[8:]])
    files.finish(1.0)
    assert (partial.parent / "bench.jsonl").read_bytes() == expected


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    class Short(io.FileIO):
        def write(self, data: Any, /) -> int:
            return super().write(data[:7])

    file = tmp_path / "lines"
    file.write_bytes(b"first\n")
    with Short(file, "a") as opened:
        append_lines(opened, b"second, and longer\n")
    assert file.read_bytes() == b"first\nsecond, and longer\n"


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed, match=r"file could not be written \(File exists"):
        _open(tmp_path / "file")


def test_what_tells_problems_apart() -> None:
    marks = fingerprints([Problem("a", "q", "s", "3"), Problem("b", "q", "", "3")])
    assert marks["a"] == marks["b"]
    other = fingerprints([Problem("a", "q", "", "4"), Problem("b", "r", "", "3")])
    assert len({marks["a"], *other.values()}) == 3
    with pytest.raises(ValueError, match="two problems have the id a"):
        fingerprints([Problem("a", "q", "", "3"), Problem("a", "r", "", "4")])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/aime_2024.jsonl", "aime_2024"),
        ("tiny", "tiny"),
        ("MathArena/aime_2025", "aime_2025"),
        ("openai/gsm8k:main", "gsm8k"),
    ],
)
def test_names_of_benchmarks(path: str, name: str) -> None:
    assert benchmark_name(path) == name


def test_what_the_settings_leave_out() -> None:
    """What only schedules an evaluation, and how many are decoded at once, decide nothing."""
    section = EvalSection(every=5, at_start=False, max_sequences=3)
    settings = evaluation_settings(section, 0, PROMPTS)
    assert settings == evaluation_settings(EvalSection(), 0, PROMPTS)
    assert settings != evaluation_settings(EvalSection(), 1, PROMPTS)
    assert settings != evaluation_settings(EvalSection(), 0, PromptsSection(instruction="Stop."))
    assert json.loads(json.dumps(settings)) == settings


def test_the_live_share_is_of_the_answers_before_a_kill_too(
    model_dir: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four of six were there, marked correct; the random model's two more are wrong."""
    rows, out = write_rows(tmp_path / "rows.jsonl", 3), tmp_path / "out"
    arguments = [
        *("--model", str(model_dir), "--benchmarks", str(rows), "--num-samples", "2"),
        *("--max-new-tokens", "6", "--engine", "builtin", "--device", "cpu", "--output", str(out)),
    ]
    command_line.main(arguments)
    assert "6/6 samples  correct 0.0%" in capsys.readouterr().out
    header = json.loads((out / "rows.json").read_text())
    del header["seconds"]
    kept = [row | {"correct": True} for row in read_jsonl(out / "rows.jsonl")[:4]]
    shutil.rmtree(out)
    out.mkdir()
    lines = [json.dumps(row) + "\n" for row in ({"header": header}, *kept)]
    (out / "rows.rank-0.jsonl").write_text("".join(lines))
    command_line.main(arguments)
    assert "2/2 samples  correct 66.7%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_samples", "seconds", "said"),
    [
        (10**9, 1.0, r"bench\.json: settings: num_samples: got 1000000000; needs"),
        (
            10**5,
            1.0,
            r"bench\.jsonl has 12 samples; needs each of the 100000 samples of 4 problems",
        ),
        (2, 1.0, r"bench\.jsonl has 12 samples; needs each of the 2 samples"),
        (3, 1e308, r"bench\.json: seconds: .*got 1e\+308; needs"),
        (3, -1.0, r"bench\.json: seconds: .*got -1\.0; needs"),
    ],
)
def test_a_header_that_promises_other_samples_is_refused_by_their_number(
    num_samples: int, seconds: float, said: str, tmp_path: Path
) -> None:
    _whole(tmp_path)
    head = tmp_path / "bench.json"
    assert len(read_evaluation(head).samples) == 12
    fields = json.loads(head.read_text()) | {"seconds": seconds}
    fields["settings"]["num_samples"] = num_samples
    head.write_text(json.dumps(fields))
    start = time.perf_counter()
    with pytest.raises(BadFile, match=said):
        read_evaluation(head)
    assert time.perf_counter() - start < 2.0
