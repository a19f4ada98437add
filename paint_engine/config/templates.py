"""Prompt templates: texts in which {problem} and other names are replaced for each problem.

Only these names are replaced. Braces of LaTeX are text, also those in a problem. (str.format would
interpret both.)
"""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Annotated

from pydantic import AfterValidator

_REFERENCE = (
    "Problem: {problem}\n\n"
    "Here is a {part_of}reference solution to this problem:\n"
    "=== Reference Solution Begin ===\n"
    "{solution}\n"
    "=== Reference Solution End ===\n"
)
STUDENT = "Problem: {problem}\n\n{instruction}"
OPSD_EVALUATION = "{problem}\n\n{instruction}"
"""the student's message in OPSD's evaluation: its training has "Problem: " before the problem"""
TEACHER = (
    _REFERENCE + "{rationale}"
    "After reading the reference solution above, derive the same final answer in your own words.\n"
    "{instruction}"
)
RATIONALE = (
    "Here is an explanation of its key steps:\n"
    "=== Explanation Begin ===\n"
    "{rationale}\n"
    "=== Explanation End ===\n"
)
# The instruction about the answer's format is left out on purpose: this prompt asks for no answer.
REASON = (
    _REFERENCE
    + "Go through the reference solution above and explain its key steps: what each of them does "
    "and why it works. Keep to that solution and do not solve the problem in another way."
)
_SIBLING = (
    "Problem: {problem}\n\n"
    "Here is {part_of}a correct solution to this problem:\n"
    "=== Correct Solution Begin ===\n"
    "{solution}\n"
    "=== Correct Solution End ===\n"
)
SIBLING_TEACHER = (
    _SIBLING + "{rationale}"
    "After reading the correct solution above, derive the same final answer in your own words.\n"
    "{instruction}"
)
SIBLING_REASON = (
    _SIBLING
    + "Go through the correct solution above and explain its key steps: what each of them does "
    "and why it works. Keep to that solution and do not solve the problem in another way."
)
_FEEDBACK = (
    "Problem: {problem}\n\n"
    "Here is {part_of}the feedback on an earlier attempt:\n"
    "=== Feedback Begin ===\n"
    "{solution}\n"
    "=== Feedback End ===\n"
)
FEEDBACK_TEACHER = (
    _FEEDBACK + "{rationale}"
    "After reading the feedback above, solve the problem in your own words.\n"
    "{instruction}"
)
FEEDBACK_REASON = (
    _FEEDBACK
    + "Go through the feedback above and explain what it says about the solution of the problem. "
    "Keep to the feedback and do not solve the problem."
)
_ANSWER = "Problem: {problem}\n\nThe final answer is {solution}.\n"
ANSWER_TEACHER = _ANSWER + "{rationale}Derive this final answer in your own words.\n{instruction}"
ANSWER_REASON = (
    _ANSWER
    + "Explain the key steps that lead to this final answer: what each of them does and why "
    "it works."
)
PART_OF = "part of "
"""the value of {part_of} if part of the shown text is hidden; "" if it is whole"""

_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f]")
# LaTeX commands that start with \n, without the n; any other \n was meant as a line break.
_COMMANDS_IN_N = (
    "e eq eg ot otin i u abla ewline mid parallel exists leq geq less gtr sim cong prec"
)
_COMMANDS_IN_N += " earrow warrow atural orm rightarrow leftarrow Rightarrow Leftarrow"
_SPELLED_BREAK = re.compile(rf"\\n(?!(?:{'|'.join(_COMMANDS_IN_N.split())})(?![A-Za-z]))")
_DOUBLED = re.compile(r"\{\{\s*\w*\s*\}\}")
# Group 1 is set if the braces belong to LaTeX: after a command, after } and ], after ^ and _.
_IN_BRACES = re.compile(r"(\\[A-Za-z]+\*?|(?<=[}\]^_]))?\{\s*(\w+)\s*\}")
_ARGUMENT = re.compile(r"(?:\\[A-Za-z]+\*?|[\^_])\{(\w+)\}")


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces every {name} of `values` in the template, in one pass. A {name} inside a value
    stays."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


def template_check(*required: str, optional: tuple[str, ...] = ()) -> Callable[[str], str]:
    """Returns a function that validates a template and returns it unchanged.

    The function raises ValueError with the part of the message that says what is needed. It does so
    if a required name is missing, if a word in braces is not one of the names, and if the text
    shows that it was quoted wrongly.
    """
    names = (*required, *optional)
    listing = ", ".join(f"{{{name}}}" for name in names)

    def check(template: str) -> str:
        _check_quoting(template)
        for found in _ARGUMENT.finditer(template):
            if found[1] in names:
                raise ValueError(
                    f"a second pair of braces around {{{found[1]}}}, whose own are replaced, "
                    f"and has {found[0]}; write an argument of LaTeX as in "
                    rf"\boxed{{ {{{found[1]}}} }}"
                )
        # Without its names, a template has only braces of LaTeX.
        rest = fill(template, dict.fromkeys(names, "\0"))
        for found in _IN_BRACES.finditer(rest):
            if found[1] is None:
                near = get_close_matches(found[2].lower(), names, n=1, cutoff=0.7)
                raise ValueError(
                    f"no word in braces but {listing}, and has {found[0]}"
                    + (f" (did you mean {{{near[0]}}}?)" if near else "")
                    + r"; braces of LaTeX are text, as in \boxed{answer} and x^{n}"
                )
        for name in required:
            if f"{{{name}}}" not in template:
                raise ValueError(f"{{{name}}} in it, at the place of the {name}, and has none")
        return template

    return check


def _check_quoting(template: str) -> None:
    if found := _CONTROL.search(template):
        raise ValueError(
            f"text, and has the control character {found[0]!r}; in double quotes TOML reads \\b, "
            r"\f, \r and \t as control characters, so put LaTeX between ''' and '''; line ends "
            r"of Windows contain \r, so save the file with those of Unix"
        )
    if _SPELLED_BREAK.search(template):
        raise ValueError(
            r"line breaks, and has \n as two letters; in a shell, break the line inside the quotes"
        )
    if found := _DOUBLED.search(template):
        raise ValueError(f"single braces, and has {found[0]}; \\boxed{{}} needs no escaping")


check_student = template_check("problem", optional=("instruction",))
Student = Annotated[str, AfterValidator(check_student)]
# That a context which shows something has a place for it is checked beside the context.
Teacher = Annotated[
    str,
    AfterValidator(
        template_check("problem", optional=("solution", "part_of", "rationale", "instruction"))
    ),
]
Reason = Annotated[
    str, AfterValidator(template_check("problem", "solution", optional=("part_of", "instruction")))
]
Rationale = Annotated[str, AfterValidator(template_check("rationale"))]
