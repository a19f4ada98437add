"""Prompt templates: texts with placeholders such as {problem}.

Known names in braces are replaced and all other text is kept, so LaTeX's braces need no escaping,
in templates and in the values. (str.format would interpret them.)
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
# Without {instruction}, which asks for an answer in a box: a rationale is no answer.
REASON = (
    _REFERENCE
    + "Go through the reference solution above and explain its key steps: what each of them does "
    "and why it works. Keep to that solution and do not solve the problem in another way."
)
PART_OF = "part of "
"""value of {part_of} if a part of the solution is hidden; it is empty for a whole solution"""

_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f]")
# LaTeX commands that begin with \n; after other letters, \n was meant as a line break.
_COMMANDS_IN_N = (
    "e eq eg ot otin i u abla ewline mid parallel exists leq geq less gtr sim cong prec"
)
_COMMANDS_IN_N += " earrow warrow atural orm rightarrow leftarrow Rightarrow Leftarrow"
_SPELLED_BREAK = re.compile(rf"\\n(?!(?:{'|'.join(_COMMANDS_IN_N.split())})(?![A-Za-z]))")
_DOUBLED = re.compile(r"\{\{\s*\w*\s*\}\}")
# Group 1 matches before braces of LaTeX: a command, } or ], ^ or _.
_IN_BRACES = re.compile(r"(\\[A-Za-z]+\*?|(?<=[}\]^_]))?\{\s*(\w+)\s*\}")
_ARGUMENT = re.compile(r"(?:\\[A-Za-z]+\*?|[\^_])\{(\w+)\}")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with every {name} in `values` replaced in one pass, so a {name} inside a value
    is kept."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


def template_check(*required: str, optional: tuple[str, ...] = ()) -> Callable[[str], str]:
    """A check that returns a template unchanged. It raises ValueError, with the part of the message
    after "needs", where a required name is missing, where a word in braces is no known name, and
    where the text was quoted wrongly."""
    names = (*required, *optional)
    listing = ", ".join(f"{{{name}}}" for name in names)

    def check(template: str) -> str:
        _check_quoting(template)
        for found in _ARGUMENT.finditer(template):
            if found[1] in names:
                raise ValueError(
                    f"braces of their own around {{{found[1]}}}, whose braces go with it, "
                    f"and has {found[0]}; for LaTeX's argument write it as in "
                    rf"\boxed{{ {{{found[1]}}} }}"
                )
        # Without its names, a valid template has only braces of LaTeX.
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
                raise ValueError(f"{{{name}}} in place of the {name}, and has none")
        return template

    return check


def _check_quoting(template: str) -> None:
    if found := _CONTROL.search(template):
        raise ValueError(
            f"text, and has the control character {found[0]!r}; TOML takes \\b, \\f, \\r and \\t "
            r"between double quotes for one, so put LaTeX between ''' and '''; line ends of "
            r"Windows have \r, so save the file with those of Unix"
        )
    if _SPELLED_BREAK.search(template):
        raise ValueError(
            r"line breaks, and has \n as two letters; in a shell break the line between the quotes"
        )
    if found := _DOUBLED.search(template):
        raise ValueError(f"every brace once, and has {found[0]}; \\boxed{{}} needs no escaping")


check_student = template_check("problem", optional=("instruction",))
Student = Annotated[str, AfterValidator(check_student)]
Teacher = Annotated[
    str,
    AfterValidator(
        template_check("problem", "solution", optional=("part_of", "rationale", "instruction"))
    ),
]
Reason = Annotated[
    str, AfterValidator(template_check("problem", "solution", optional=("part_of", "instruction")))
]
Rationale = Annotated[str, AfterValidator(template_check("rationale"))]
