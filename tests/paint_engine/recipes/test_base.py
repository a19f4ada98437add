"""What every recipe declares, and that nothing outside of them asks for one by its name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import paint_engine
from paint_engine.config.plugins import plugin_names
from paint_engine.config.schema import Config
from paint_engine.config.toml import LEAVES
from paint_engine.recipes import Recipe, draws, recipe_of, recipe_that_recorded
from paint_engine.recipes.base import ATTRIBUTE, PACKAGE, recipe_class
from paint_engine.recipes.grpo import Grpo
from paint_engine.recipes.grpo_paint import GrpoPaint
from paint_engine.recipes.paint import Paint
from paint_engine.recipes.sampled_token import SampledToken
from paint_engine.recipes.sft import Sft

CLASSES: dict[str, type[Recipe]] = {
    "grpo": Grpo,
    "grpo_paint": GrpoPaint,
    "paint": Paint,
    "sampled_token": SampledToken,
    "sft": Sft,
}
SOURCES = Path(paint_engine.__file__).parent


def recipe(name: str, **sections: dict[str, object]) -> Recipe:
    return recipe_of(Config.model_validate({"objective": {"name": name}, **sections}))


def test_the_built_in_recipes_are_found_by_their_files_names() -> None:
    assert plugin_names(PACKAGE, ATTRIBUTE) == tuple(CLASSES)
    assert {name: type(recipe(name)) for name in CLASSES} == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_keys_of_a_recipe_are_keys_of_the_configuration(name: str) -> None:
    for key in recipe_class(name).keys:
        section, _, rest = key.partition(".")
        is_section = rest == "*" and section in Config.model_fields
        assert is_section or key in LEAVES, key


def test_what_the_recipes_need() -> None:
    assert [name for name, cls in CLASSES.items() if not cls.samples] == ["sft"]
    second = {name: recipe(name).second_pass for name in CLASSES}
    taught = ("grpo_paint", "paint", "sampled_token")
    assert second == dict.fromkeys(CLASSES) | dict.fromkeys(taught, "teacher")
    for name, cls in CLASSES.items():
        assert cls.uses_teacher == (second[name] == "teacher")
        assert recipe(name).needs_solution == (name != "grpo")
        assert recipe(name).needs_answer == ("grpo" in name)
        if "grpo" not in name:
            assert (recipe(name).group_size, recipe(name).num_updates) == (1, 1)
    grpo = recipe("grpo", grpo={"kl_weight": 0.1, "group_size": 4, "num_updates": 3})
    assert (grpo.second_pass, grpo.group_size, grpo.num_updates) == ("base", 4, 3)


def test_only_a_run_without_rollouts_and_evaluations_draws_nothing() -> None:
    for name in CLASSES:
        for enabled in (True, False):
            config = Config.model_validate(
                {"objective": {"name": name}, "eval": {"enabled": enabled}}
            )
            assert draws(config) == (name != "sft" or enabled)


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("paint", {"loss", "token_kl", "accuracy"}),
        ("sampled_token", {"loss", "sampled_kl", "importance_weight", "accuracy"}),
        ("grpo", {"loss", "ratio", "reward", "zero_variance_groups", "accuracy"}),
        ("grpo_paint", {"loss", "distill_loss", "ratio", "reward", "token_kl", "accuracy"}),
        # A step whose groups were all left out.
        ("grpo", {"loss", "reward", "zero_variance_groups", "accuracy"}),
        ("sft", {"loss", "student_entropy", "truncation_rate"}),
    ],
)
def test_a_recipe_is_known_by_what_its_runs_record(name: str, recorded: set[str]) -> None:
    found = recipe_that_recorded(recorded)
    assert type(found) is CLASSES[name] and found.config.objective.name == name


def test_declarations_are_read_without_pytorch() -> None:
    """Refusals, `--help` and `--print-config` do not wait for its import."""
    program = """
import sys
from paint_engine.config.command_line import load_config, preset_names
from paint_engine.recipes import recipe_of
for name in preset_names():
    recipe = recipe_of(load_config(["--preset", name]).config)
    recipe.display, recipe.notes(), recipe.second_pass, recipe.group_size, recipe.num_updates
assert preset_names()
print([name for name in ("torch", "transformers", "paint_kernels") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def asked_by_name(source: str) -> Iterator[int]:
    """Lines of Python that compare `objective.name` with anything, anything with the name of a
    built-in recipe, or look something up by such a name."""
    names = set(CLASSES)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        elif isinstance(node, ast.Match):
            operands = [node.subject]
        elif isinstance(node, ast.Dict):
            operands = [key for key in node.keys if key is not None]
        else:
            continue
        parts = [part for operand in operands for part in ast.walk(operand)]
        constants = {part.value for part in parts if isinstance(part, ast.Constant)}
        if names & constants or any(
            isinstance(part, ast.Attribute) and ast.unparse(part).endswith("objective.name")
            for part in parts
        ):
            yield node.lineno


@pytest.mark.parametrize(
    "line",
    [
        "x = config.objective.name == other",
        "x = self.objective.name != other",
        "x = run.config.objective.name in (a, b)",
        "x = name == 'sft'",
        "x = name not in {'paint', 'opsd'}",
        "x = {'grpo': 1}[name]",
        "match name:\n    case 'sampled_token': pass",
        "match objective.name:\n    case other: pass",
    ],
)
def test_a_question_for_a_name_is_seen(line: str) -> None:
    assert list(asked_by_name(line))


def test_nothing_but_recipes_asks_for_a_recipes_name() -> None:
    files = [file for file in SOURCES.rglob("*.py") if "recipes" not in file.parts]
    assert len(files) > 50
    asking = [
        f"{file.relative_to(SOURCES)}:{line}"
        for file in files
        for line in asked_by_name(file.read_text(encoding="utf-8"))
    ]
    assert asking == []
