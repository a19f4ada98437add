"""The evaluations' flags: the one that was meant is said."""

import pytest

from paint_engine.config.command_line import load_config
from paint_engine.config.templates import STUDENT
from paint_engine.evaluation.flags import (
    own_flags,
    parse_arguments,
    parse_command,
    prompts_of,
    section_of,
)

GIVEN = ["--model", "tiny", "--benchmarks", "tiny"]


@pytest.mark.parametrize(
    ("extra", "meant"),
    [
        (["--num_samples", "2"], "--num-samples"),
        (["--num_samples=2"], "--num-samples"),
        (["--max_new_token", "9"], "--max-new-tokens"),
        (["--num_samples", "2", "--Top_P", "1"], "--num-samples, --top-p"),
    ],
)
def test_the_flag_that_was_meant(extra: list[str], meant: str) -> None:
    with pytest.raises(ValueError, match="unrecognized arguments: --") as refused:
        parse_arguments([*GIVEN, *extra])
    assert f"{' '.join(extra)}; did you mean {meant}? --help lists" in str(refused.value)


@pytest.mark.parametrize("extra", [["--zzzz"], ["stray"]])
def test_nothing_is_guessed_for_what_is_like_no_flag(extra: list[str]) -> None:
    with pytest.raises(ValueError, match="unrecognized arguments") as refused:
        parse_arguments([*GIVEN, *extra])
    assert "did you mean" not in str(refused.value)


def test_flags_become_the_section_with_its_checks() -> None:
    section = section_of(parse_arguments([*GIVEN, "--num-samples", "2", "--answer-column", "gold"]))
    assert (section.num_samples, section.columns.answer) == (2, "gold")
    with pytest.raises(ValueError, match=r"--num-samples: got 0; should be greater than 0"):
        section_of(parse_arguments([*GIVEN, "--num-samples", "0"]))


@pytest.mark.parametrize(
    "given",
    [
        "Q {problem}\n{instruction}",
        '"Q {problem}\\n\\\\frac{1}{2}"',
        "'Q {problem}'",
        '"Q" {problem}',
    ],
)
def test_a_message_is_read_as_a_training_reads_it(given: str) -> None:
    flags = ("--prompts.student_template", given, "--prompts.instruction", "'Go.'")
    trained = load_config([*flags, "--objective.name", "paint"]).config.prompts
    own = parse_arguments([*GIVEN, "--student-template", given, "--instruction", "'Go.'"])
    assert (own.student_template, own.instruction) == (trained.student_template, "Go.")


def test_an_instruction_without_a_place_is_refused() -> None:
    template, instruction = ["--student-template", "Q {problem}"], ["--instruction", "Go."]
    assert prompts_of(parse_arguments([*GIVEN, *instruction])).instruction == "Go."
    assert prompts_of(parse_arguments([*GIVEN, *template])).student_template == "Q {problem}"
    with pytest.raises(
        ValueError, match=r"--instruction: got 'Go\.' with .* no {instruction}; leave"
    ):
        prompts_of(parse_arguments([*GIVEN, *template, *instruction]))


def test_messages_name_flags_and_not_keys_of_a_configuration() -> None:
    assert own_flags("needs --model.name_or_path and eval.top_p") == "needs --model and --top-p"
    assert own_flags("data.jsonl is damaged") == "data.jsonl is damaged"


def test_opsd_s_message_has_a_name() -> None:
    flags = ["--model", "tiny", "--benchmarks", "tiny"]
    command = parse_command([*flags, "--prompt", "opsd"])
    assert command.prompts.student_template == "{problem}\n\n{instruction}"
    assert parse_command(flags).prompts.student_template == STUDENT
    with pytest.raises(ValueError, match=r"got 'opsd' with --student-template 'Solve: \{"):
        parse_command([*flags, "--prompt", "opsd", "--student-template", "Solve: {problem}"])
