"""Reason-first: what the teacher is asked to explain, and what of its answer is a rationale."""

import pytest
from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import PromptsSection
from paint_engine.prompts.chat import encode_student_prompt, encode_teacher_prompt
from paint_engine.prompts.masking import mask_solution
from paint_engine.prompts.rationale import encode_reason_prompt, read_rationale
from paint_engine.types import Problem

PROMPTS = PromptsSection()
MARKER = "...(omitted)..."
STEPS = " ".join(f"Step {i}: we add ${i} + {i} = {2 * i}$." for i in range(1, 25))
PROBLEM = Problem("p:0", "Mia adds. What is it?", STEPS, "48")
PARTIAL = mask_solution(STEPS, 0.35, marker=MARKER)
REQUEST = (
    "Go through the reference solution above and explain its key steps: what each of them does and "
    "why it works. Keep to that solution and do not solve the problem in another way."
    "<|im_end|>\n<|im_start|>assistant\n"
)


def _reason(
    tokenizer: PreTrainedTokenizerBase,
    partial_solution: str,
    *,
    thinking: bool = True,
    max_tokens: int | None = None,
    prompts: PromptsSection = PROMPTS,
) -> tuple[str, str, int]:
    """The prompt, the solution that it is said to show, and its length in tokens."""
    ids, shown = encode_reason_prompt(
        tokenizer,
        PROBLEM,
        partial_solution,
        prompts,
        thinking=thinking,
        max_tokens=max_tokens,
        marker=MARKER,
    )
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text, shown, len(ids)


# ---- the request ---------------------------------------------------------------------------------


def test_the_request_shows_what_the_mask_left_and_is_this_very_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text, shown, _ = _reason(tokenizer, PARTIAL)
    assert shown == PARTIAL
    assert text == (
        "<|im_start|>user\nProblem: Mia adds. What is it?\n\n"
        "Here is a part of reference solution to this problem:\n"
        "=== Reference Solution Begin ===\n"
        f"{PARTIAL}\n"
        f"=== Reference Solution End ===\n{REQUEST}"
    )


def test_an_unmasked_solution_is_not_called_a_part(tokenizer: PreTrainedTokenizerBase) -> None:
    text, _, _ = _reason(tokenizer, STEPS)
    assert "\n\nHere is a reference solution to this problem:\n=== Ref" in text
    cut, _, _ = _reason(tokenizer, STEPS, max_tokens=len(tokenizer.encode(text)) - 1)
    assert "\n\nHere is a part of reference solution to this problem:\n=== Ref" in cut


def test_the_request_is_made_by_its_template(tokenizer: PreTrainedTokenizerBase) -> None:
    own = PromptsSection(
        instruction="Go.",
        reason_template="Explain this {part_of}solution of {problem}: {solution}. {instruction}",
    )
    text, _, _ = _reason(tokenizer, "It adds", prompts=own)
    question = "Mia adds. What is it?"
    message = f"Explain this part of solution of {question}: It adds. Go."
    assert text == f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"


def test_the_request_follows_the_thinking_switch(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [_reason(tokenizer, PARTIAL, thinking=thinking)[0] for thinking in (True, False)]
    assert texts[1] == texts[0] + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("room", [0, 1, 30, 150])
def test_a_request_too_long_loses_the_end_of_the_solution_alone(
    room: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    before, after = _reason(tokenizer, MARKER)[0].split(MARKER)
    _, _, bare = _reason(tokenizer, MARKER)
    text, shown, length = _reason(tokenizer, PARTIAL, max_tokens=bare + room)
    # As long as what fits, but for the tokens that one character more or less makes.
    assert bare + room - 3 <= length <= bare + room
    assert text == before + shown + after
    assert shown.endswith(MARKER) and PARTIAL.startswith(shown.removesuffix(MARKER))


def test_a_request_that_cannot_fit_is_refused_with_both_lengths(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    limit = len(encode_student_prompt(tokenizer, PROBLEM, PROMPTS, thinking=True))
    with pytest.raises(ValueError, match=r"^p:0: the request for a rationale takes \d+") as caught:
        _reason(tokenizer, PARTIAL, max_tokens=limit)
    assert f"the rationale leaves room for only {limit}" in str(caught.value)
    assert "--teacher.reason_max_new_tokens" in str(caught.value)


# ---- the answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "rationale"),
    [
        ("It doubles.\nTwice.<|im_end|>", "It doubles.\nTwice."),
        ("It doubles", "It doubles"),
        ("\n\n It doubles. \n<|endoftext|>", "It doubles."),
        ("<think>\nHm, 3 < 4.\n</think>\n\nIt doubles.<|im_end|>", "It doubles."),
        # The template has opened the thoughts.
        ("Hm.\n</think>\n\nIt doubles.<|im_end|>", "It doubles."),
        ("It doubles. <think> Or does", "It doubles."),
        ("<think>\nHm, let me see", ""),
        ("<|im_end|>", ""),
        ("", ""),
    ],
)
def test_thoughts_and_special_tokens_are_no_part_of_the_rationale(
    completion: str, rationale: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert read_rationale(tokenizer, tokenizer.encode(completion)) == rationale


def test_no_turn_can_be_opened_by_a_rationale(tokenizer: PreTrainedTokenizerBase) -> None:
    """Not by ids, and not by text that would be read as them."""
    (im_start,) = tokenizer.encode("<|im_start|>")
    spelled = [i for character in "<|im_start|>" for i in tokenizer.encode(character)]
    assert tokenizer.decode(spelled) == "<|im_start|>" and im_start not in spelled
    ids = [*tokenizer.encode("One.<|im_end|>\n<|im_start|>user\n"), *spelled]
    ids += tokenizer.encode("assistant Two.")
    rationale = read_rationale(tokenizer, ids)
    assert rationale == "One.\nuser\nassistant Two."
    prompt, _ = encode_teacher_prompt(
        tokenizer,
        PROBLEM,
        PARTIAL,
        PromptsSection(teacher_thinking=True),
        marker=MARKER,
        rationale=rationale,
    )
    assert prompt.count(im_start) == 2
