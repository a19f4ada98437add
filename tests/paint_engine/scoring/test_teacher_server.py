"""Servers that do not fit, wrong replies of each kind, and servers that come back."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from scoring_server import BODIES, CHOICES, ScoringServer

from paint_engine.config.sections import TeacherSection
from paint_engine.monitor.timings import Timings
from paint_engine.rollout.http import Requests
from paint_engine.scoring import Asked, Scorer, TeacherDied, TeacherServer, find_teacher
from paint_engine.scoring import server as server_module
from paint_engine.types import TrainExample

NUM_TOKENS, NUM_ROWS = 340, 346
TOP_K = 4

# What the message says of each fault.
FAULTS = {
    "NaN": r"got \{.*'logprob': nan.*; needs a logprob above -9999 and at most 0",
    "null": r"got \{.*'logprob': None.*; needs a logprob",
    "minus infinity": r"got \{.*'logprob': -inf.*; needs a logprob",
    "vLLM's minus infinity": r"got \{.*'logprob': -9999\.0.*; needs a logprob",
    "a positive log-probability": r"got \{.*'logprob': 0\.5.*; needs a logprob",
    "a text for a log-probability": r"got \{.*'logprob': '-0\.5'.*; needs a logprob",
    "true for a log-probability": r"got \{.*'logprob': True.*; needs a logprob",
    "a number beyond float": r"got \{.*'logprob': 1000.*; needs a logprob",
    "too much probability": r"got probabilities with the sum .*; needs at most 1: .* not logits",
    "an id out of range": "got the id 346; needs one from 0 to 345, the student's vocabulary",
    "a negative id": "got the id -1; needs one from 0 to 345",
    "an id with a zero before it": "got the id 007; needs one from 0",
    "an id that is a word": "got the id seven; needs one from 0",
    "an id of 400 digits": r"got the id 1111.*\.\.\.; needs one from 0",
    "probability for padding": "for ids from 340 on, which are no tokens",
    "fewer tokens": r"got [12] tokens; needs the 4 likeliest, and the prompt's own",
    "more tokens": r"got \d\d+ tokens; needs the 4 likeliest",
    "not its own token": r"got no log-probability of the token \d+, which was sent|got 3 tokens",
    "an entry that is a number": r"got -0\.5; needs a logprob",
    "null for a position": "got None; needs log-probabilities by token id",
    "a list for a position": r"got \[\]; needs log-probabilities by token id",
    "a position less": "got 5 positions; needs one for each of the 6 tokens that were sent",
    "a position more": "got 7 positions; needs one for each of the 6 tokens that were sent",
    "no scores": r"prompt_logprobs is missing; the server's vLLM may be too old for it",
    "null for the scores": "prompt_logprobs: got None; Input should be a valid array",
    "changed prompt": "got 7 ids, of which the first 6 are right; needs the 6 ids that were sent",
    "no echo": "prompt_token_ids is missing",
    "no JSON": r"the reply: got <html>\\x1b\[31m; Invalid JSON",
    "nothing": "the reply: got ; Invalid JSON: EOF",
    "no choices": "choices: got .*at least 1 item",
    "two choices": r"choices\.0\.prompt_token_ids is missing",
    "nested too deep": "recursion limit exceeded",
    "longer than asked for": "the reply has 33554432 bytes; needs at most",
}


def section(teacher: ScoringServer, **settings: Any) -> TeacherSection:
    return TeacherSection(url=teacher.url, served_top_k=TOP_K, **settings)


def make_server(teacher: ScoringServer, top_k: int = TOP_K, **options: Any) -> TeacherServer:
    settings = section(teacher)
    asked = Asked(top_k, NUM_TOKENS, NUM_ROWS)
    return TeacherServer(settings, find_teacher(settings), asked, **options)


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def scorer(teacher: ScoringServer, warnings: list[str]) -> Scorer:
    server = make_server(teacher, restart_timeout_s=5.0)
    return Scorer(server, timings=Timings(), warn=warnings.append)


@pytest.fixture
def rollouts(examples: Callable[..., list[TrainExample]]) -> list[TrainExample]:
    """Twelve: more than are asked for at once."""
    return examples((4,) * 12, (3, 2, 9, 5) * 3, (3, 7, 1, 12) * 3)


def test_every_fault_is_here() -> None:
    assert {*CHOICES, *BODIES} == set(FAULTS)


def test_each_fault_is_the_server_s_and_is_told(
    teacher: ScoringServer, scorer: Scorer, rollouts: list[TrainExample], warnings: list[str]
) -> None:
    failures = []
    for fault, message in FAULTS.items():
        teacher.fault, before = fault, teacher.num_scored
        with pytest.raises(TeacherDied) as raised:
            scorer.add_scores(rollouts[:1])
        text = str(raised.value)
        told = text.startswith(f"the server at {teacher.url} sent a wrong reply: ")
        told = told and re.search(message, text) and text.isprintable() and len(text) < 700
        # Each reply is asked for three times.
        if not told or teacher.num_scored - before != 3 or len(warnings) != 2:
            failures.append((fault, text[:700], teacher.num_scored - before, warnings[:]))
        warnings.clear()
    assert not failures, "\n".join(map(str, failures))


def test_one_wrong_reply_costs_one_more_request(
    teacher: ScoringServer, scorer: Scorer, rollouts: list[TrainExample], warnings: list[str]
) -> None:
    expected = scorer.add_scores(rollouts)
    teacher.fault, seen = "null", []
    teacher.applies = lambda request: seen.append(request) is None and len(seen) == 3
    before = teacher.num_scored
    found = scorer.add_scores(rollouts)
    assert_same(found, expected)
    (warning,) = warnings
    assert warning.startswith("the teacher's server failed (the server at ")
    assert warning.endswith("; it is asked again")
    # Replies that were on their way when the wrong one came are asked for again.
    assert len(rollouts) < teacher.num_scored - before <= 2 * len(rollouts)


def assert_same(found: list[TrainExample], expected: list[TrainExample]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.rollout is other.rollout and one.served is not None and other.served is not None
        assert one.served.token_ids.tolist() == other.served.token_ids.tolist()
        assert one.served.logprobs.tolist() == other.served.logprobs.tolist()


def test_a_server_that_is_killed_and_started_again(
    teacher: ScoringServer, scorer: Scorer, rollouts: list[TrainExample], warnings: list[str]
) -> None:
    expected = scorer.add_scores(rollouts)
    teacher.dies_at = len(teacher.asked) + 5
    assert_same(scorer.add_scores(rollouts), expected)
    assert teacher.num_deaths == 1 and 1 <= len(warnings) <= 2
    assert "is gone (" in warnings[0]


def test_a_server_that_does_not_return(
    teacher: ScoringServer, rollouts: list[TrainExample], warnings: list[str]
) -> None:
    server = make_server(teacher, restart_timeout_s=0.3)
    teacher.kill()
    scorer = Scorer(server, timings=Timings(), warn=warnings.append)
    with pytest.raises(TeacherDied, match=r"has not returned within 0 s"):
        scorer.add_scores(rollouts)
    assert len(warnings) == 1


def test_no_rollouts_are_no_request(teacher: ScoringServer, scorer: Scorer) -> None:
    """A rank has none if there are fewer rollouts than ranks."""
    asked = len(teacher.asked)
    assert scorer.add_scores([]) == [] and len(teacher.asked) == asked


def test_the_request_names_the_model_and_asks_for_the_least(
    teacher: ScoringServer, scorer: Scorer, rollouts: list[TrainExample]
) -> None:
    scorer.add_scores(rollouts[:1])
    request, example = teacher.asked[-1], rollouts[0]
    assert example.teacher_view is not None
    sent = [*example.teacher_view.prompt_ids, *example.rollout.completion_ids]
    assert request["prompt"] == sent and request["prompt_logprobs"] == TOP_K
    assert (request["model"], request["max_tokens"]) == (teacher.name, 1)


def test_the_key_goes_to_the_server(
    teacher: ScoringServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    make_server(teacher).score((1,), (2,), Requests())
    assert teacher.headers[-1]["Authorization"] == "Bearer s3cret"


def test_a_model_of_another_name_is_refused(teacher: ScoringServer) -> None:
    with pytest.raises(ValueError, match=r"serves .*, but the teacher is Qwen/Qwen3-32B; ") as told:
        find_teacher(section(teacher, served_model="Qwen/Qwen3-32B"))
    assert (
        f'start it with: VLLM_API_KEY="${{VLLM_API_KEY:?}}" vllm serve Qwen/Qwen3-32B --host '
        f"127.0.0.1 --port {teacher.url.rpartition(':')[2]} --max-logprobs {TOP_K} "
        "--logprobs-mode raw_logprobs"
    ) in str(told.value)
    # On the server's own machine it may lie elsewhere.
    name = teacher.name.rpartition("/")[2]
    assert find_teacher(section(teacher, served_model=f"org/{name}")).name == teacher.name


def test_no_server() -> None:
    nobody = TeacherSection(url="http://127.0.0.1:9", served_top_k=TOP_K)
    with pytest.raises(ValueError, match=r"does not answer as a vLLM server .* vllm serve MODEL "):
        find_teacher(nobody)


def test_a_server_that_lists_fewer_tokens_is_refused_at_the_start(teacher: ScoringServer) -> None:
    teacher.max_logprobs = 3
    unfit = make_server(teacher).unfit()
    assert unfit is not None and "refuses to list 4 tokens (teacher.served_top_k)" in unfit
    assert "greater than max allowed: 3" in unfit and "--max-logprobs 4 " in unfit
    teacher.max_logprobs = 4
    assert make_server(teacher).unfit() is None


def test_a_smaller_vocabulary_is_refused_at_the_start(teacher: ScoringServer) -> None:
    settings = section(teacher)
    larger = TeacherServer(settings, find_teacher(settings), Asked(TOP_K, 400, 406))
    unfit = larger.unfit()
    assert unfit is not None and "or the id 399 (status 400: " in unfit


def test_more_tokens_than_there_are(teacher: ScoringServer) -> None:
    unfit = make_server(teacher, top_k=347).unfit()
    assert unfit == (
        "teacher.served_top_k: got 347; needs at most the 346 rows of the student's head; lower it"
    )


def test_a_server_that_is_faulty_at_the_start(teacher: ScoringServer) -> None:
    teacher.fault = "no scores"
    unfit = make_server(teacher).unfit()
    assert unfit is not None and "does not score tokens (choices.0.prompt_logprobs is" in unfit


def test_the_context_of_the_server_bounds_what_is_scored(teacher: ScoringServer) -> None:
    """vLLM needs room for the one token that it samples."""
    model = find_teacher(section(teacher))
    assert model.max_model_len == 1024
    assert (model.room(1024), model.room(2048), model.room(100)) == (1023, 1023, 100)
    whole = make_server(teacher).score((1,) * 1000, (2,) * 23, Requests())
    assert whole.token_ids.shape == (23, TOP_K + 1)


def test_a_server_that_never_answers(
    teacher: ScoringServer,
    scorer: Scorer,
    rollouts: list[TrainExample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "_ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(server_module, "_TOKEN_TIMEOUT_S", 0.0)
    with teacher.lock, pytest.raises(TeacherDied, match=r"TimeoutError: no whole reply within"):
        scorer.add_scores(rollouts[:2])
