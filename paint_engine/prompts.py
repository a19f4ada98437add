"""Chat prompts of student and teacher (Fig. 2), as token ids.

Both roles ask the same question and close with the same instruction; the teacher's prompt also
shows the verified solution, or the part of it that the mask leaves.
"""

from transformers import PreTrainedTokenizerBase

from paint_engine.masking import mask_solution
from paint_engine.types import Problem

_SOLUTION_BEGIN = "=== Reference Solution Begin ==="
_SOLUTION_END = "=== Reference Solution End ==="
_TRANSITION = (
    "After reading the reference solution above, derive the same final answer in your own words."
)


def student_text(problem: str, instruction: str) -> str:
    """The user's message as the student sees it, at training and at evaluation."""
    return f"Problem: {problem}\n\n{instruction}"


def teacher_text(problem: str, partial_solution: str, instruction: str, *, whole: bool) -> str:
    """The user's message as the teacher sees it.

    whole: the solution is shown unmasked, and the text does not call it a part.
    """
    heading = (
        "Here is a reference solution to this problem:"
        if whole
        else "Here is a part of reference solution to this problem:"
    )
    return "\n".join(
        (
            f"Problem: {problem}\n",
            heading,
            _SOLUTION_BEGIN,
            partial_solution,
            _SOLUTION_END,
            _TRANSITION,
            instruction,
        )
    )


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, user_text: str, *, thinking: bool, suffix: str = ""
) -> tuple[int, ...]:
    """Token ids of one user message with the generation prompt, and `suffix` after it.

    thinking: the chat template's `enable_thinking`; templates without the switch ignore it.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": user_text}],
        add_generation_prompt=True,
        enable_thinking=thinking,
        tokenize=False,
    )
    assert isinstance(text, str)
    return tuple(tokenizer.encode(text + suffix, add_special_tokens=False))


def encode_student_prompt(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, instruction: str, *, thinking: bool
) -> tuple[int, ...]:
    """The student's prompt for one problem."""
    return encode_chat(tokenizer, student_text(problem.problem, instruction), thinking=thinking)


def encode_teacher_prompt(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    partial_solution: str,
    instruction: str,
    *,
    thinking: bool,
    suffix: str = "",
    max_tokens: int | None = None,
    marker: str,
) -> tuple[tuple[int, ...], str]:
    """The teacher's prompt for one problem and what the mask left of its solution, and the solution
    as it stands there.

    A prompt above `max_tokens` shortens the solution from its end (the marker takes the place of
    what goes), never the question or the template's tail.

    Raises ValueError where the prompt does not fit even without the solution.
    """
    whole = partial_solution == problem.solution

    def encode(num_hidden: int) -> tuple[tuple[int, ...], str]:
        ratio = num_hidden / len(partial_solution) if partial_solution else 0.0
        shown = mask_solution(partial_solution, ratio, marker=marker)
        text = teacher_text(problem.problem, shown, instruction, whole=whole and num_hidden == 0)
        return encode_chat(tokenizer, text, thinking=thinking, suffix=suffix), shown

    uncut = encode(0)
    if max_tokens is None or len(uncut[0]) <= max_tokens:
        return uncut
    fewest, most = 1, len(partial_solution)
    shortest, _ = encode(most)
    if len(shortest) > max_tokens:
        raise ValueError(
            f"{problem.problem_id}: the teacher's prompt takes {len(shortest)} tokens with the "
            f"whole solution hidden, but only {max_tokens} are left beside the completion: drop "
            "the problem with --data.max_prompt_tokens or lower --rollout.max_new_tokens"
        )
    while fewest < most:
        middle = (fewest + most) // 2
        if len(encode(middle)[0]) <= max_tokens:
            most = middle
        else:
            fewest = middle + 1
    return encode(most)
