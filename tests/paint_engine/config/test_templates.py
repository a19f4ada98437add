"""Prompt templates: what is replaced in them, what is refused, and how they travel from the command
line and from files through a run's record."""

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.config import templates
from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.config.sections import PromptsSection
from paint_engine.config.templates import fill
from paint_engine.config.toml import build_config, to_toml

KEYS = ("student_template", "teacher_template", "rationale_template", "reason_template")
TEACHERS = "{problem} {solution}"


def refusal(key: str, template: str) -> str:
    with pytest.raises(ValueError) as caught:
        build_config([("my.toml", {f"prompts.{key}": template})])
    return str(caught.value)


# ---- replacement ---------------------------------------------------------------------------------


def test_names_are_replaced_everywhere_and_nothing_else_is() -> None:
    text = r"{a}{b}{a} {c} {} \boxed{} \boxed{a} {a } {{a}} {A} %s {0}"
    assert fill(text, {"a": "1", "b": ""}) == r"11 {c} {} \boxed{} \boxed1 {a } {1} {A} %s {0}"


@settings(deadline=None, derandomize=True, max_examples=200)
@given(values=st.lists(st.text(alphabet="{}ab\\g1 \n", max_size=8), min_size=2, max_size=2))
def test_what_takes_a_name_s_place_is_not_read(values: list[str]) -> None:
    a, b = values
    assert fill("<{a}|{b}|{a}>", {"a": a, "b": b}) == f"<{a}|{b}|{a}>"


def test_a_problem_may_be_made_of_names() -> None:
    assert fill(templates.STUDENT, {"problem": "{instruction}", "instruction": "{problem}"}) == (
        "Problem: {instruction}\n\n{problem}"
    )


# ---- checks --------------------------------------------------------------------------------------


def test_the_defaults_pass_their_own_checks() -> None:
    defaults = {key: getattr(PromptsSection(), key) for key in KEYS}
    assert PromptsSection(**defaults) == PromptsSection()


@pytest.mark.parametrize(
    ("key", "template", "name"),
    [
        ("student_template", "Solve it. {instruction}", "problem"),
        ("student_template", "", "problem"),
        ("teacher_template", "{solution}", "problem"),
        ("reason_template", "{problem} Explain.", "solution"),
        ("rationale_template", "It explains.", "rationale"),
    ],
)
def test_a_name_that_is_missing_is_asked_for(key: str, template: str, name: str) -> None:
    message = refusal(key, template)
    assert message.startswith(f"my.toml: prompts.{key}: got {template!r}; needs {{{name}}} in it, ")
    assert f"for example --prompts.{key} " in message and "\n" not in message


@pytest.mark.parametrize(
    ("key", "template", "word", "meant"),
    [
        ("student_template", "{problem} {solution}", "{solution}", None),
        ("student_template", "{problme}", "{problme}", "{problem}"),
        ("student_template", "{Problem}", "{Problem}", "{problem}"),
        ("student_template", "{problem}{instructon}", "{instructon}", "{instruction}"),
        ("student_template", "{problem} { instruction }", "{ instruction }", "{instruction}"),
        ("student_template", "{problem} {0}", "{0}", None),
        ("teacher_template", TEACHERS + "{partof}", "{partof}", "{part_of}"),
        ("reason_template", TEACHERS + "{rationale}", "{rationale}", None),
        ("rationale_template", "{rationale} of {problem}", "{problem}", None),
    ],
)
def test_a_word_in_braces_that_is_no_name_is_refused(
    key: str, template: str, word: str, meant: str | None
) -> None:
    message = refusal(key, template)
    assert message.startswith(f"my.toml: prompts.{key}: got {template!r}; needs no word in braces ")
    assert f", and has {word}" in message
    assert re.findall(r"did you mean (\{.*?\})\?", message) == ([meant] if meant else [])


@pytest.mark.parametrize(
    "text",
    [
        *(r"\boxed{}", r"\boxed{answer}", r"\frac{a}{b}", r"\frac{1}{2}", r"\sqrt[3]{n}"),
        *("x^{n}", "x_{max}", r"\{x\}", "{1, 2}", '{"answer": 1}', "{", "}", "100 %"),
        *(r"a \neq b", r"\operatorname*{argmax}", r"\text{if }", r"a \nRightarrow b \nu", "a\n\nb"),
    ],
)
@pytest.mark.parametrize("key", KEYS)
def test_braces_and_backslashes_of_latex_are_text(key: str, text: str) -> None:
    required = {"student_template": "{problem}", "rationale_template": "{rationale}"}
    template = f"{text} {required.get(key, TEACHERS)} {text}"
    config = build_config([("my.toml", {f"prompts.{key}": template})])
    assert getattr(config.prompts, key) == template


@pytest.mark.parametrize(
    ("template", "fault", "remedy"),
    [
        ("{problem} \boxed{}", r"the control character '\x08'", "between ''' and '''"),
        ("{problem} \frac12", r"the control character '\x0c'", "between ''' and '''"),
        ("{problem} \times", r"the control character '\t'", "so put LaTeX between"),
        ("{problem}\r\n{instruction}", r"the control character '\r'", "those of Unix"),
        (r"{problem}\nBox it", r"\n as two letters", "break the line inside the quotes"),
        (r"{problem}\nplease", r"\n as two letters", "break the line inside the quotes"),
        (r"\boxed{problem}", r"and has \boxed{problem}", r"as in \boxed{ {problem} }"),
        ("{problem} x^{problem}", "and has ^{problem}", "a second pair of braces around {problem}"),
        (r"{problem}\n\n{instruction}", r"\n as two letters", "break the line inside the quotes"),
        ("{problem} \\boxed{{}}", "single braces, and has {{}}", r"\boxed{} needs no escaping"),
        ("{{problem}}", "single braces, and has {{problem}}", r"\boxed{} needs no escaping"),
        ("{{ problem }}", "single braces, and has {{ problem }}", r"\boxed{} needs no escaping"),
    ],
)
def test_a_text_that_was_quoted_wrongly_is_refused(template: str, fault: str, remedy: str) -> None:
    message = refusal("student_template", template)
    assert fault in message and remedy in message


@pytest.mark.parametrize("key", KEYS)
def test_the_example_of_a_refusal_can_be_given_to_a_shell(key: str) -> None:
    _, _, example = refusal(key, "").partition("; for example ")
    config = load_config(shlex.split(example)).config
    assert config.prompts == PromptsSection()


def test_a_rationale_needs_a_place() -> None:
    layer = {"prompts.teacher_template": TEACHERS, "teacher.reason_first": True}
    with pytest.raises(ValueError, match=r"with teacher\.reason_first true; needs \{rationale\}"):
        build_config([("my.toml", layer)])
    layer["prompts.teacher_template"] = TEACHERS + "{rationale}"
    assert build_config([("my.toml", layer)]).teacher.reason_first


def test_an_instruction_that_no_template_reads_is_refused() -> None:
    bare = {"prompts.student_template": "{problem}", "prompts.instruction": "Go."}
    for layer in (bare | {"prompts.teacher_template": TEACHERS}, bare | {"objective.name": "grpo"}):
        with pytest.raises(ValueError, match=r"got 'Go\.' with templates that have no \{instruc"):
            build_config([("my.toml", layer)])
    assert build_config([("my.toml", bare)]).prompts.instruction == "Go."


# ---- files, the command line and the record ------------------------------------------------------

FILE = r"""
[prompts]
student_template = '''
Q: {problem}

{instruction} \boxed{\frac{a}{b}}'''
rationale_template = '''
Why:
{rationale}
'''
"""


def _written(tmp_path: Path) -> Config:
    file = tmp_path / "mine.toml"
    file.write_text(FILE)
    return load_config(["--config", str(file)]).config


def test_text_of_several_lines_comes_from_a_file(tmp_path: Path) -> None:
    prompts = _written(tmp_path).prompts
    assert prompts.student_template == "Q: {problem}\n\n{instruction} \\boxed{\\frac{a}{b}}"
    assert prompts.rationale_template == "Why:\n{rationale}\n"
    assert prompts.teacher_template == templates.TEACHER


def test_the_command_line_takes_plain_text_and_toml_s_quotes() -> None:
    texts = (
        ("Q: {problem} \\boxed{}", "Q: {problem} \\boxed{}"),
        ("{problem}\n!", "{problem}\n!"),
        ('"{problem}\\n!"', "{problem}\n!"),
    )
    for given_text, expected in texts:
        prompts = load_config(["--prompts.student_template", given_text]).config.prompts
        assert prompts.student_template == expected


def test_the_record_of_a_run_holds_the_templates_and_a_resumed_run_keeps_them(
    tmp_path: Path,
) -> None:
    config = _written(tmp_path)
    (tmp_path / "config.toml").write_text(to_toml(config))
    resumed = load_config(["--resume", str(tmp_path)]).config
    assert resumed.prompts == config.prompts
    with pytest.raises(ValueError, match=r"--prompts\.student_template with --resume: got"):
        load_config(["--resume", str(tmp_path), "--prompts.student_template", "{problem}"])


def test_a_run_from_before_there_were_templates_resumes(tmp_path: Path) -> None:
    lines = to_toml(Config()).splitlines()
    old = [line for line in lines if not line.split(" = ")[0].endswith("_template")]
    assert len(lines) - len(old) == len(KEYS)
    (tmp_path / "config.toml").write_text("\n".join(old))
    assert load_config(["--resume", str(tmp_path)]).config.prompts == PromptsSection()


def test_the_help_shows_each_template(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--help"])
    shown = capsys.readouterr().out
    for key in KEYS:
        assert f"--prompts.{key} VALUE" in shown
    assert "{solution}" in shown and "{part_of}" in shown
