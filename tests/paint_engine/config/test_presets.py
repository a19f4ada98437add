"""The presets: what each takes from another, where its values come from, and the tables of
docs/recipes.md that show them."""

import re
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from transformers import Qwen3Config

from paint_engine.config import command_line as cli
from paint_engine.config.command_line import load_config, preset_names
from paint_engine.config.plugins import plugin_names
from paint_engine.config.schema import Config
from paint_engine.config.sections import INSTRUCTION
from paint_engine.config.toml import LEAVES, to_toml, toml_value, value_of
from paint_engine.estimate.memory import GIB, Lengths, estimate_memory
from paint_engine.estimate.model_shape import shape_of
from paint_engine.model.load import meta_model
from paint_engine.prompts.chat import student_text, teacher_text
from paint_engine.recipes.base import ATTRIBUTE, PACKAGE

RECIPES = ("paint", "opsd", "opsd-v1", "grpo", "sft")
MODELS = ("tiny", "qwen3-1.7b", "qwen3-4b", "qwen3-8b")
# Of other teachers, contexts and signals.
VARIANTS = ("opd", "sdpo", "paint-control", "grpo-paint")
NAMES = [f"{recipe}-{model}" for recipe in (*RECIPES, *VARIANTS) for model in MODELS]
PRESETS = Path(cli.__file__).with_name("presets")
PAGE = Path(__file__).parents[3] / "docs" / "recipes.md"
# Of the tiny recipes, each by the same small sweep.
CHOSEN = {"optim.learning_rate"}
# hidden, layers, heads, MLP, tied head
SHAPES = {
    "1.7b": (2048, 28, 16, 6144, True),
    "4b": (2560, 36, 32, 9728, True),
    "8b": (4096, 36, 32, 12288, False),
}
# Rows of the page's tables, beside the keys in which the recipes differ.
SHOWN = (
    *("lora.rank", "lora.alpha", "prompts.teacher_thinking", "objective.name"),
    *("masking.rho_wrong", "masking.rho_correct", "rollout.max_new_tokens", "rollout.temperature"),
    *("objective.pointwise_clip", "objective.top_fraction", "objective.interpolation_weight"),
    *("optim.learning_rate", "optim.max_grad_norm", "train.num_steps", "train.batch_size"),
)
_OF_A_TEACHER = (
    *("masking.", "teacher.", "prompts.teacher_", "objective.divergence"),
    *("objective.pointwise_clip", "objective.top_fraction", "objective.interpolation_weight"),
)
_OF_A_SAMPLER = ("rollout.temperature", "rollout.top_p", "rollout.top_k")
_OF_A_REWARD = ("grpo.", "objective.importance_cap")
UNUSED = {
    "paint": _OF_A_REWARD,
    "grpo": _OF_A_TEACHER,
    "sft": (*_OF_A_TEACHER, *_OF_A_SAMPLER, *_OF_A_REWARD),
}


# By hand, from the paper's Appendix B.
APPENDIX_B = {
    "lora.enabled": True,
    "optim.learning_rate": 5e-6,
    "train.batch_size": 32,
    "lora.rank": 64,
    "lora.alpha": 128,
    "lora.target_modules": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "objective.name": "paint",
    "rollout.temperature": 1.1,
    "rollout.max_new_tokens": 1024,
    "teacher.weights": "fixed",
    "teacher.reason_first": False,
    "masking.placement": "suffix",
    "masking.rho_wrong": 0.30,
    "masking.rho_correct": 0.40,
    "objective.interpolation_weight": 0.03,
    "objective.top_fraction": 0.03,
    "objective.divergence": "forward_kl",
    "objective.pointwise_clip": 0.06,
    "train.num_steps": 100,
    "eval.every": 20,
    "eval.thinking": True,
    "eval.temperature": 1.0,
    "eval.top_p": 0.95,
    "eval.top_k": -1,
    "eval.max_new_tokens": 38_912,
    "eval.num_samples": 12,
}
# Of all recipes alike: adapters and evaluation.
_COMMON = {
    key: value
    for key, value in APPENDIX_B.items()
    if key.startswith(("lora.", "eval.")) and key != "eval.every"
}
# By hand: the paper, and of OPSD the arguments of its scripts (GPUs x batch x accumulation).
PUBLISHED = {
    "paint": APPENDIX_B,
    # "The same training budget and teacher anchoring": the paper's Appendix B.
    "opsd": APPENDIX_B
    | {
        "masking.rho_wrong": 0.0,
        "masking.rho_correct": 0.0,
        "objective.interpolation_weight": 0.0,
    },
    # run_opsd.sh of February 2026, and its README.
    "opsd-v1": _COMMON
    | {
        "optim.learning_rate": 2e-4,
        "train.batch_size": 8 * 1 * 4,
        "train.num_steps": 500,
        "rollout.max_new_tokens": 2048,
        "rollout.temperature": 1.1,
        "rollout.top_p": 0.95,
        "rollout.top_k": 20,
        "objective.divergence": "jsd",
        "objective.jsd_weight": 0.5,
        "objective.pointwise_clip": None,
        "teacher.weights": "fixed",
        "checkpoint.every": 50,
    },
    # run_grpo.sh; the paper's Sec. 4.1: groups of 8, up to 16k tokens.
    "grpo": _COMMON
    | {
        "lora.dropout": 0.05,
        "optim.learning_rate": 2e-5,
        "train.batch_size": 8 * 1 * 4,
        "train.num_steps": 500,
        "data.max_prompt_tokens": 2048,
        "rollout.max_new_tokens": 16_000,
        "rollout.temperature": 1.2,
        "grpo.group_size": 8,
        "grpo.kl_weight": 0.0,
        "grpo.scale_by_std": True,
        "checkpoint.every": 50,
    },
    # run_sft.sh: 4 epochs of 29,434 problems, the last batch filled up.
    "sft": _COMMON
    | {
        "optim.learning_rate": 2e-5,
        "train.batch_size": 8 * 2 * 4,
        "train.num_steps": 1840,
        "rollout.max_new_tokens": 16_000,
        "checkpoint.every": 100,
    },
}


def config_of(name: str) -> Config:
    return load_config(["--preset", name]).config


def differences(first: Config, second: Config) -> dict[str, object]:
    """The second's values where they are not the first's."""
    return {
        key: value_of(second, key)
        for key in LEAVES
        if value_of(first, key) != value_of(second, key)
    }


def own_keys(name: str) -> dict[str, str]:
    """The keys that a preset's file sets, and for each the line above it."""
    section, above, found = "", "", {}
    for line in (PRESETS / f"{name}.toml").read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif " = " in line and not line.startswith(("#", "extends")):
            found[f"{section}.{line.split(' = ')[0]}"] = above
        above = line
    return found


def parent_of(name: str) -> str | None:
    return tomllib.loads((PRESETS / f"{name}.toml").read_text()).get("extends")


def test_every_recipe_is_there_for_every_model() -> None:
    assert sorted([*NAMES, "tiny"]) == list(preset_names())


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_sets_only_what_it_changes_and_says_why(name: str) -> None:
    parent = parent_of(name)
    if parent is None:
        assert name == "paint-qwen3-8b"
        return
    own = own_keys(name)
    assert set(own) == set(differences(config_of(parent), config_of(name)))
    for key, above in own.items():
        assert above.startswith("# ") and len(above) > 8, key


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_begins_with_a_line_for_the_listing(name: str) -> None:
    first = (PRESETS / f"{name}.toml").read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith(".")


@pytest.mark.parametrize("model", [model for model in MODELS if model != "tiny"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_presets_have_the_published_values(recipe: str, model: str) -> None:
    config, published = config_of(f"{recipe}-{model}"), PUBLISHED[recipe]
    assert {key: value_of(config, key) for key in published} == published


@pytest.mark.parametrize("model", MODELS)
def test_dropout_is_on_where_trl_leaves_it_on(model: str) -> None:
    rates = {recipe: config_of(f"{recipe}-{model}").lora.dropout for recipe in RECIPES}
    assert rates == dict.fromkeys(RECIPES, 0.0) | ({"grpo": 0.05} if model != "tiny" else {})


def test_opsd_s_first_teacher_reads_its_parts_in_their_order() -> None:
    prompts = config_of("opsd-v1-qwen3-8b").prompts
    text = teacher_text("What is 2 + 2?", "It is 4.", prompts, whole=True)
    before, _, after = text.partition(
        "What is 2 + 2?\n\nHere is a reference solution to this problem:\nIt is 4.\n\n\n"
    )
    assert before == ""
    assert re.fullmatch(rf"[^\n{{}}]+:\n\n{re.escape(prompts.instruction)}", after)
    assert student_text("What is 2 + 2?", prompts) == f"Problem: What is 2 + 2?\n\n{INSTRUCTION}"


@pytest.mark.parametrize("model", MODELS)
def test_opsd_is_paint_without_its_two_parts(model: str) -> None:
    changed = differences(config_of(f"paint-{model}"), config_of(f"opsd-{model}"))
    chosen = CHOSEN if model == "tiny" else ()
    assert {key: value for key, value in changed.items() if key not in chosen} == {
        "masking.rho_wrong": 0.0,
        "masking.rho_correct": 0.0,
        "objective.interpolation_weight": 0.0,
    }


@pytest.mark.parametrize("model", MODELS)
def test_opsd_as_first_published_has_another_divergence_without_a_clip(model: str) -> None:
    changed = differences(config_of(f"opsd-{model}"), config_of(f"opsd-v1-{model}"))
    both = {
        "objective.divergence": "jsd",
        "objective.pointwise_clip": None,
        "optim.max_grad_norm": 1.0,
    }
    assert both.items() <= changed.items()
    published = {
        "prompts.student_thinking": True,
        "prompts.teacher_template": changed.get("prompts.teacher_template"),
        "rollout.max_new_tokens": 2048,
        "optim.learning_rate": 2e-4,
        "train.num_steps": 500,
        "eval.every": 100,
        "checkpoint.every": 50,
        "checkpoint.keep": 10,
    }
    rest = {key: value for key, value in changed.items() if key not in both}
    assert rest == published if model != "tiny" else rest.keys() <= CHOSEN


def test_the_tiny_recipes_have_one_budget() -> None:
    budgets = {
        (c.train.num_steps, c.train.batch_size, c.rollout.max_new_tokens, c.eval, c.model, c.data)
        for c in (config_of(f"{recipe}-tiny") for recipe in (*RECIPES, *VARIANTS))
    }
    assert len({str(budget) for budget in budgets}) == 1
    assert config_of("paint-tiny") == config_of("tiny")


@pytest.mark.parametrize("model", MODELS)
def test_the_control_is_paint_with_another_problem_s_solution(model: str) -> None:
    changed = differences(config_of(f"paint-{model}"), config_of(f"paint-control-{model}"))
    assert changed == {"teacher.context": "other"}


@pytest.mark.parametrize("model", MODELS)
def test_sdpo_shows_siblings_and_has_a_loss_of_its_own(model: str) -> None:
    changed = differences(config_of(f"paint-{model}"), config_of(f"sdpo-{model}"))
    rate = changed.pop("optim.learning_rate", None)
    assert (rate is not None) == (model == "tiny")
    assert changed == {
        "teacher.context": "sibling",
        "teacher.weights": "ema",
        "teacher.ema_decay": 0.99,
        "masking.rho_wrong": 0.0,
        "masking.rho_correct": 0.0,
        "objective.divergence": "reverse_kl",
        "objective.pointwise_clip": None,
        "objective.interpolation_weight": 0.0,
        "objective.reduction": "token_mean",
    }
    assert config_of(f"sdpo-{model}").teacher.group_size == 8


@pytest.mark.parametrize("model", MODELS)
def test_plain_distillation_has_a_stronger_teacher_on_the_same_prompt(model: str) -> None:
    config = config_of(f"opd-{model}")
    assert (config.teacher.weights, config.teacher.context) == ("external", "none")
    assert config.prompts.teacher_thinking == config.prompts.student_thinking
    if model == "tiny":
        assert config.teacher.model == "tiny-teacher"
        return
    sizes = [
        float(model.rpartition("-")[2].rstrip("B"))
        for model in (config.model.name_or_path, config.teacher.model or "")
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("model", MODELS)
def test_grpo_paint_is_paint_with_rewards(model: str) -> None:
    changed = differences(config_of(f"paint-{model}"), config_of(f"grpo-paint-{model}"))
    rate = changed.pop("optim.learning_rate", None)
    assert (rate is not None) == (model == "tiny")
    assert changed == {
        "objective.name": "grpo_paint",
        "rollout.top_p": 1.0,
        "rollout.top_k": -1,
        "objective.importance_cap": 2.0,
        "grpo.ratio_clip_high": 0.2,
    }


@pytest.mark.parametrize("model", MODELS)
def test_grpo_samples_what_it_can_weigh(model: str) -> None:
    config = config_of(f"grpo-{model}")
    assert (config.rollout.top_p, config.rollout.top_k) == (1.0, -1)
    assert config.rollout.temperature == config.objective.temperature
    assert config.objective.importance_cap == 2.0
    assert (config.grpo.group_size, config.grpo.kl_weight, config.grpo.num_updates) == (8, 0.0, 1)
    assert config.grpo.ratio_clip_low == config.grpo.ratio_clip_high == 0.2
    assert config.grpo.scale_by_std and config.reward.function == "math"


def test_sft_goes_four_times_through_the_data() -> None:
    train = config_of("sft-qwen3-8b").train
    assert 0 <= train.num_steps * train.batch_size - 4 * 29_434 < train.batch_size
    assert config_of("sft-qwen3-8b").objective.temperature == 1.0


@pytest.mark.parametrize("recipe", [*RECIPES, *VARIANTS])
def test_sizes_differ_in_the_model_and_in_how_it_is_split(recipe: str) -> None:
    largest = config_of(f"{recipe}-qwen3-8b")
    for size in ("1.7B", "4B"):
        smaller = config_of(f"{recipe}-qwen3-{size.lower()}")
        changed = differences(largest, smaller)
        if recipe == "opd":
            # Each has a larger teacher than itself.
            assert changed.pop("teacher.model") == smaller.teacher.model
        assert changed == {
            "model.name_or_path": f"Qwen/Qwen3-{size}",
            "parallel.shard": "replicate",
        }


def test_a_run_s_record_is_whole() -> None:
    assert "extends" not in tomllib.loads(to_toml(config_of("opsd-qwen3-4b")))


@pytest.mark.parametrize("num_ranks", [1, 8])
@pytest.mark.parametrize("name", [n for n in NAMES if "qwen3" in n and not n.startswith("opd")])
def test_the_published_recipes_fit_80_gib(name: str, num_ranks: int, tmp_path: Path) -> None:
    hidden, layers, heads, intermediate, tied = SHAPES[name.rpartition("-")[2]]
    Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
    ).save_pretrained(tmp_path)
    options = ("--model.name_or_path", str(tmp_path), "--rollout.engine", "vllm")
    config = load_config(["--preset", name, *options]).config
    estimate = estimate_memory(
        shape_of(meta_model(config)),
        config=config,
        lengths=Lengths(2048, 6000, config.rollout.max_new_tokens),
        num_ranks=num_ranks,
        device_memory_bytes=80 * GIB,
    )
    assert estimate.total_bytes < 80 * GIB


def table(model: str) -> str:
    """The page's table for one model: the shown keys, and those in which the recipes differ."""
    configs = {recipe: config_of(f"{recipe}-{model}") for recipe in RECIPES}
    rows = [["key", *configs], ["---"] * (1 + len(configs))]
    for key in LEAVES:
        if len({str(value_of(c, key)) for c in configs.values()}) == 1 and key not in SHOWN:
            continue
        rows.append([f"`{key}`", *(cell(config, key) for config in configs.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(config: Config, key: str) -> str:
    if key.startswith(UNUSED[config.objective.name]):
        return "-"
    value = value_of(config, key)
    if key.endswith("_template"):
        return "default" if value == LEAVES[key].default else "its own"
    return toml_value(value).strip('"')


@pytest.mark.parametrize("model", ["qwen3-8b", "tiny"])
def test_the_page_s_tables_are_the_presets(model: str) -> None:
    expected = table(model)
    assert expected in PAGE.read_text(), f"{PAGE.name} is to contain:\n{expected}"


def spans(pattern: str) -> Sequence[str]:
    found = re.findall(pattern, PAGE.read_text(), re.MULTILINE)
    assert found
    return found


@pytest.mark.parametrize("options", spans(r"`(--[a-z]+\.[^`]+)`"))
def test_every_override_of_the_page_changes_a_recipe(options: str) -> None:
    recipe = "grpo-tiny" if "--grpo" in options else "paint-tiny"
    argv = shlex.split(options)
    assert load_config(["--preset", recipe, *argv]).config != config_of(recipe)


def toml_examples() -> list[str]:
    return re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("command", spans(r"^python -m paint_engine\.train ?(.*)$"))
def test_every_command_of_the_page_parses(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, example in zip(("mine.toml", "texts.toml"), toml_examples(), strict=True):
        (tmp_path / file).write_text(example)
    assert load_config(shlex.split(command, comments=True)).config is not None


def test_the_page_s_templates_give_the_texts_that_they_look_like(tmp_path: Path) -> None:
    file = tmp_path / "texts.toml"
    file.write_text(toml_examples()[1])
    prompts = load_config(["--config", str(file), "--prompts.instruction", "Go."]).config.prompts
    boxed = "Go. For 1/2 write \\boxed{\\frac{1}{2}}."
    assert student_text("Is $x^{n}$ {even}?", prompts) == f"Is $x^{{n}}$ {{even}}?\n\n{boxed}"
    expected = "Is it?\n\nThis is part of a correct solution:\nIt is.\n\nGo."
    assert teacher_text("Is it?", "It is.", prompts, whole=False) == expected


def test_the_page_names_every_recipe_and_each_value_of_the_keys_with_choices() -> None:
    text = PAGE.read_text()
    assert all(f"`{recipe}`" in text for recipe in RECIPES)
    keys = ("masking.placement", "objective.divergence", "teacher.weights")
    choices = {key: get_args(LEAVES[key].annotation) for key in keys}
    choices["objective.name"] = plugin_names(PACKAGE, ATTRIBUTE)
    for key, values in choices.items():
        assert len(values) > 2
        for value in values:
            assert re.search(rf"[` ]{value}[` ]", text), (key, value)
