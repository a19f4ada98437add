"""The prompts of Fig. 2: their parts in order, the thinking switch, a rationale, and
what goes when too long."""

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import PromptsSection
from paint_engine.prompts.chat import (
    encode_chat,
    encode_student_prompt,
    encode_teacher_prompt,
    student_text,
    teacher_text,
)
from paint_engine.prompts.masking import mask_solution
from paint_engine.types import Problem

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPTS = PromptsSection()
MARKER = "...(omitted)..."
SOLUTION = " ".join(f"Step {i}: we add ${i} + {i} = {2 * i}$." for i in range(1, 25))
PROBLEM = Problem("p:0", "Mia adds. What is it?", f"{SOLUTION} So $\\boxed{{48}}$.", "48")
PARTIAL = mask_solution(PROBLEM.solution, 0.35, marker=MARKER)
OPENING = "<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def _text(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def _teacher(
    tokenizer: PreTrainedTokenizerBase,
    partial: str = PARTIAL,
    *,
    max_tokens: int | None = None,
    suffix: str = "",
    marker: str = MARKER,
) -> tuple[int, ...]:
    ids, shown = encode_teacher_prompt(
        tokenizer,
        PROBLEM,
        partial,
        PromptsSection(teacher_suffix=suffix),
        max_tokens=max_tokens,
        marker=marker,
    )
    # What is recorded as shown is what stands in the prompt.
    assert f"Begin ===\n{shown}\n=== Reference Solution End" in _text(tokenizer, ids)
    return ids


def test_the_student_sees_the_problem_and_the_instruction_alone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = encode_student_prompt(tokenizer, PROBLEM, PROMPTS, thinking=False)
    expected = f"{OPENING}Problem: Mia adds. What is it?\n\n{INSTRUCTION}{ANSWER}{EMPTY_THOUGHT}"
    assert _text(tokenizer, ids) == expected


def test_the_teachers_message_has_the_parts_of_figure_2_in_order() -> None:
    text = teacher_text(PROBLEM.problem, PARTIAL, PROMPTS, whole=False)
    parts = (
        "Problem: Mia adds. What is it?",
        "Here is a part of reference solution to this problem:",
        "=== Reference Solution Begin ===",
        PARTIAL,
        "=== Reference Solution End ===",
        "After reading the reference solution above",
        INSTRUCTION,
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert [text.count(part) for part in parts] == [1] * len(parts)
    assert text.endswith(INSTRUCTION)
    whole = teacher_text(PROBLEM.problem, PROBLEM.solution, PROMPTS, whole=True)
    assert "Here is a reference solution to this problem:" in whole
    assert "a part of" not in whole


def test_only_an_unmasked_solution_is_called_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "a part of reference solution" in _text(tokenizer, _teacher(tokenizer, PARTIAL))
    assert "a part of" not in _text(tokenizer, _teacher(tokenizer, PROBLEM.solution))


@pytest.mark.parametrize("thinking", [True, False])
def test_each_role_has_its_own_thinking_switch(
    thinking: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    student = encode_student_prompt(tokenizer, PROBLEM, PROMPTS, thinking=thinking)
    teacher, _ = encode_teacher_prompt(
        tokenizer, PROBLEM, PARTIAL, PromptsSection(teacher_thinking=not thinking), marker=MARKER
    )
    tails = (ANSWER + EMPTY_THOUGHT, ANSWER)
    assert _text(tokenizer, student).endswith(tails[thinking])
    assert _text(tokenizer, teacher).endswith(tails[not thinking])


def test_the_suffix_stands_right_after_the_generation_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = _text(tokenizer, _teacher(tokenizer, suffix="<think>\n\n</think>\n\nFirst,"))
    assert text.endswith(f"{ANSWER}{EMPTY_THOUGHT}<think>\n\n</think>\n\nFirst,")
    # Special tokens of template and suffix are ids, not spelled out.
    (im_start,) = tokenizer.encode("<|im_start|>")
    assert _teacher(tokenizer).count(im_start) == 2


def test_a_template_without_the_switch_takes_both_values(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    monkeypatch.setattr(tokenizer, "chat_template", plain)
    ids = [encode_chat(tokenizer, "Hi", thinking=thinking) for thinking in (True, False)]
    assert _text(tokenizer, ids[0]) == _text(tokenizer, ids[1]) == "[user] Hi\n[assistant]"


def test_a_prompt_that_fits_is_not_touched(tokenizer: PreTrainedTokenizerBase) -> None:
    free = _teacher(tokenizer)
    assert _teacher(tokenizer, max_tokens=len(free)) == free
    assert PARTIAL in _text(tokenizer, free)


@pytest.mark.parametrize("room", [1, 2, 7, 20, 60, 150])
@pytest.mark.parametrize("partial", [PARTIAL, PROBLEM.solution], ids=["masked", "whole"])
def test_a_prompt_too_long_loses_the_end_of_the_solution_alone(
    partial: str, room: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    bare = _teacher(tokenizer, MARKER, suffix="So")
    limit = len(bare) + room
    ids = _teacher(tokenizer, partial, max_tokens=limit, suffix="So")
    text = _text(tokenizer, ids)
    assert len(ids) <= limit
    before, _, rest = text.partition("=== Reference Solution Begin ===\n")
    shown, _, after = rest.partition("\n=== Reference Solution End ===")
    assert f"{OPENING}Problem: {PROBLEM.problem}\n\nHere is a part of reference" in before
    assert after.endswith(f"{INSTRUCTION}{ANSWER}{EMPTY_THOUGHT}So")
    assert shown.endswith(MARKER)
    kept = shown.removesuffix(MARKER)
    assert partial.startswith(kept)
    assert MARKER not in kept
    # As long as possible: no longer beginning of the solution fits either.
    for longer in range(len(kept) + 1, len(partial)):
        whole = replace(PROBLEM, solution=partial)
        text = teacher_text(whole.problem, partial[:longer] + MARKER, PROMPTS, whole=False)
        assert len(encode_chat(tokenizer, text, thinking=False, suffix="So")) > limit


def test_the_tightest_limit_shows_the_marker_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = _teacher(tokenizer, MARKER)
    assert _teacher(tokenizer, PROBLEM.solution, max_tokens=len(bare)) == bare


@pytest.mark.parametrize("partial", [PARTIAL, "", MARKER])
def test_a_prompt_that_cannot_fit_is_refused_with_both_lengths(
    partial: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    limit = len(encode_student_prompt(tokenizer, PROBLEM, PROMPTS, thinking=False))
    with pytest.raises(ValueError, match=r"^p:0: the teacher's prompt takes") as caught:
        _teacher(tokenizer, partial, max_tokens=limit)
    assert f"leaves room for only {limit}" in str(caught.value)
    assert "--rollout.max_new_tokens" in str(caught.value)


# ---- with a rationale ----------------------------------------------------------------------------

RATIONALE = " ".join(f"Adding {i} twice doubles it, for {i} + {i} = 2 * {i}." for i in range(1, 12))


def _with_rationale(
    tokenizer: PreTrainedTokenizerBase, rationale: str | None, max_tokens: int | None = None
) -> tuple[str, str, int]:
    """The prompt, the solution that it is said to show, and its length in tokens."""
    ids, shown = encode_teacher_prompt(
        tokenizer,
        PROBLEM,
        PARTIAL,
        PromptsSection(teacher_thinking=True, teacher_suffix="So"),
        max_tokens=max_tokens,
        marker=MARKER,
        rationale=rationale,
    )
    return _text(tokenizer, ids), shown, len(ids)


def _sections(text: str) -> tuple[str, str | None]:
    """The solution and the rationale between their fences; everything around them is checked."""
    solution, end, rest = text.removeprefix(
        "<|im_start|>user\nProblem: Mia adds. What is it?\n\n"
        "Here is a part of reference solution to this problem:\n"
        "=== Reference Solution Begin ===\n"
    ).partition("\n=== Reference Solution End ===\n")
    assert end and solution != text
    tail = (
        "After reading the reference solution above, derive the same final answer in your own "
        "words.\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>assistant\nSo"
    )
    assert rest.endswith(tail)
    explanation = rest.removesuffix(tail)
    if not explanation:
        return solution, None
    begin, end = (
        "Here is an explanation of its key steps:\n=== Explanation Begin ===\n",
        "\n=== Explanation End ===\n",
    )
    assert explanation.startswith(begin) and explanation.endswith(end)
    return solution, explanation.removeprefix(begin).removesuffix(end)


@pytest.mark.parametrize("rationale", [None, ""])
def test_without_a_rationale_the_prompt_is_this_very_text(
    rationale: str | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    text, shown, _ = _with_rationale(tokenizer, rationale)
    assert shown == PARTIAL
    assert text == (
        "<|im_start|>user\nProblem: Mia adds. What is it?\n\n"
        "Here is a part of reference solution to this problem:\n"
        "=== Reference Solution Begin ===\n"
        f"{PARTIAL}\n"
        "=== Reference Solution End ===\n"
        "After reading the reference solution above, derive the same final answer in your own "
        "words.\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>assistant\nSo"
    )


def test_with_a_rationale_the_prompt_is_this_very_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text, shown, _ = _with_rationale(tokenizer, "Doubling is adding twice.")
    assert shown == PARTIAL
    assert text == (
        "<|im_start|>user\nProblem: Mia adds. What is it?\n\n"
        "Here is a part of reference solution to this problem:\n"
        "=== Reference Solution Begin ===\n"
        f"{PARTIAL}\n"
        "=== Reference Solution End ===\n"
        "Here is an explanation of its key steps:\n"
        "=== Explanation Begin ===\n"
        "Doubling is adding twice.\n"
        "=== Explanation End ===\n"
        "After reading the reference solution above, derive the same final answer in your own "
        "words.\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>assistant\nSo"
    )


def test_the_rationale_is_shortened_before_the_solution_is(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """At every length: first the rationale's end goes, then its section, then the solution's."""
    _, _, longest = _with_rationale(tokenizer, RATIONALE)
    _, _, without = _with_rationale(tokenizer, None)
    shortest = without - len(tokenizer.encode(PARTIAL)) + len(tokenizer.encode(MARKER)) + 2
    seen = set()
    for limit in range(longest, shortest, -7):
        text, shown, length = _with_rationale(tokenizer, RATIONALE, limit)
        assert length <= limit
        solution, rationale = _sections(text)
        assert solution == shown
        if rationale is None:
            assert limit < without or length == without
            assert limit >= without or solution.endswith(MARKER)
            assert PARTIAL.startswith(solution.removesuffix(MARKER))
            seen.add("solution cut" if solution != PARTIAL else "section left out")
        else:
            assert solution == PARTIAL
            seen.add("whole" if rationale == RATIONALE else "rationale cut")
            if rationale != RATIONALE:
                assert rationale.endswith(MARKER)
                assert RATIONALE.startswith(rationale.removesuffix(MARKER))
    assert seen == {"whole", "rationale cut", "section left out", "solution cut"}


def test_a_rationale_does_not_move_the_length_below_which_a_prompt_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    def refused(rationale: str | None) -> str:
        with pytest.raises(ValueError, match=r"^p:0: the teacher's prompt takes") as caught:
            _with_rationale(tokenizer, rationale, 20)
        return str(caught.value)

    assert refused(RATIONALE) == refused(None)


# --------------------------------------------------------------------------------------------------


def test_student_text_is_what_both_training_and_evaluation_ask() -> None:
    assert student_text("2+2?", PromptsSection(instruction="Go.")) == "Problem: 2+2?\n\nGo."


# ---- by templates of one's own -------------------------------------------------------------------

OWN = PromptsSection(
    instruction="Box it.",
    student_template="Q: {problem} {instruction}",
    teacher_template=(
        "A {part_of}proof of {problem}: [{solution}] {rationale}{instruction} \\boxed{}"
    ),
    rationale_template="Why: <{rationale}> ",
)


def test_the_students_template_makes_the_students_message(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = encode_student_prompt(tokenizer, PROBLEM, OWN, thinking=True)
    assert _text(tokenizer, ids) == f"{OPENING}Q: Mia adds. What is it? Box it.{ANSWER}"


@pytest.mark.parametrize(
    ("partial", "rationale", "expected"),
    [
        ("Add.", "", "A part of proof of 1+1?: [Add.] Box it. \\boxed{}"),
        ("Add. It is 2.", None, "A proof of 1+1?: [Add. It is 2.] Box it. \\boxed{}"),
        ("Add.", "Sums.", "A part of proof of 1+1?: [Add.] Why: <Sums.> Box it. \\boxed{}"),
        # Nothing is left, and the marker is empty: what stands around it stays.
        ("", None, "A part of proof of 1+1?: [] Box it. \\boxed{}"),
    ],
)
def test_the_teachers_template_makes_the_teachers_message(
    partial: str, rationale: str | None, expected: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    problem = Problem("p:1", "1+1?", "Add. It is 2.", "2")
    thinking = OWN.model_copy(update={"teacher_thinking": True})
    ids, shown = encode_teacher_prompt(
        tokenizer, problem, partial, thinking, marker="", rationale=rationale
    )
    assert shown == partial
    assert _text(tokenizer, ids) == f"{OPENING}{expected}{ANSWER}"


def test_a_solution_of_which_nothing_is_left_leaves_the_text_around_it() -> None:
    text = teacher_text("1+1?", "", PROMPTS, whole=False)
    assert "Begin ===\n\n=== Reference Solution End ===\nAfter reading" in text


def test_a_template_without_a_place_for_the_rationale_shows_none(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    bare = PromptsSection(teacher_template="{problem} {solution}")
    plain, reasoned = (
        encode_teacher_prompt(tokenizer, PROBLEM, PARTIAL, bare, marker=MARKER, rationale=rationale)
        for rationale in (None, RATIONALE)
    )
    assert plain == reasoned


def test_a_prompt_by_another_template_is_shortened_the_same_way(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    free, _ = encode_teacher_prompt(tokenizer, PROBLEM, PARTIAL, OWN, marker=MARKER)
    ids, shown = encode_teacher_prompt(
        tokenizer, PROBLEM, PARTIAL, OWN, marker=MARKER, max_tokens=len(free) - 40
    )
    assert len(free) - 43 <= len(ids) <= len(free) - 40
    assert shown.endswith(MARKER) and PARTIAL.startswith(shown.removesuffix(MARKER))
    assert f"What is it?: [{shown}] Box it. \\boxed{{}}" in _text(tokenizer, ids)
