"""Sections, defaults, checks and the TOML form of the configuration."""

import re
import shlex
import tomllib
from itertools import chain
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from paint_engine.config.command_line import load_config
from paint_engine.config.plugins import plugin_names
from paint_engine.config.schema import Config
from paint_engine.config.toml import LEAVES, build_config, recorded_config, to_toml, value_of
from paint_engine.prompts.masking import PLACEMENTS
from paint_engine.recipes.base import ATTRIBUTE, PACKAGE, recipe_class

properties = settings(deadline=None, derandomize=True, max_examples=60)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return table


def flat_toml(text: str) -> dict[str, Any]:
    table = tomllib.loads(text)
    flat = {}
    for key in LEAVES:
        value = table
        for part in key.split("."):
            value = value[part]
        flat[key] = value
    return flat


def test_defaults_are_the_papers() -> None:
    config = Config()
    paper = {
        "lora.rank": 64,
        "lora.alpha": 128,
        "masking.rho_wrong": 0.30,
        "masking.rho_correct": 0.40,
        "masking.placement": "suffix",
        "rollout.temperature": 1.1,
        "rollout.max_new_tokens": 1024,
        "objective.pointwise_clip": 0.06,
        "objective.top_fraction": 0.03,
        "objective.interpolation_weight": 0.03,
        "optim.learning_rate": 5e-6,
        "train.num_steps": 100,
        "train.batch_size": 32,
        "eval.temperature": 1.0,
        "eval.top_p": 0.95,
        "eval.top_k": -1,
        "eval.num_samples": 12,
        "eval.max_new_tokens": 38912,
        "eval.thinking": True,
    }
    assert {key: value_of(config, key) for key in paper} == paper
    # All linear layers: the paper's seven in a Qwen3 model.
    assert config.lora.target_modules == ("all-linear",)


def test_every_key_is_described_in_one_line() -> None:
    assert len(LEAVES) > 60
    for key, field in LEAVES.items():
        assert field.description and "\n" not in field.description, key
        assert len(field.description) < 160, key


def test_config_is_frozen_and_refuses_unknown_keys() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.num_steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Config.model_validate({"train": {"steps": 3}})


def test_toml_holds_every_key_and_none_as_text() -> None:
    flat = flat_toml(to_toml(Config()))
    assert flat["run.dir"] == "none"
    assert flat["data.max_rows"] == "none"
    assert flat["objective.teacher_top_k"] == "none"
    assert flat["lora.target_modules"] == ["all-linear"]
    assert flat["optim.learning_rate"] == 5e-6


# Lone surrogates have no UTF-8 form, and "none" is None by definition.
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda t: t.lower() != "none"
)


@properties
@given(
    flat=st.fixed_dictionaries(
        {},
        optional={
            "prompts.instruction": text,
            "prompts.teacher_suffix": st.text(st.characters(exclude_categories=["Cs"])),
            "data.columns.problem": st.none() | text,
            "run.dir": st.none() | text.filter(lambda t: "\0" not in t and len(t) < 60),
            "lora.target_modules": st.lists(text, min_size=1).map(tuple),
            "lora.enabled": st.booleans(),
            "objective.pointwise_clip": st.none() | st.floats(1e-300, 1e38),
            "optim.learning_rate": st.floats(1e-12, 1e12),
            "train.seed": st.integers(0, 2**32 - 1),
            "eval.top_k": st.just(-1) | st.integers(1, 1000),
        },
    )
)
def test_toml_round_trip(flat: dict[str, Any]) -> None:
    config = Config.model_validate(nested(flat))
    again = build_config([("file", flat_toml(to_toml(config)))])
    assert again == config
    assert to_toml(again) == to_toml(config)


@pytest.mark.parametrize("written", ["all-linear", ["all-linear"]])
def test_all_linear_layers_are_one_word(written: object) -> None:
    config = build_config([("file", {"lora.target_modules": written})])
    assert config.lora.target_modules == ("all-linear",)


def test_placements_are_those_that_masking_has() -> None:
    assert get_args(LEAVES["masking.placement"].annotation) == PLACEMENTS


@pytest.mark.parametrize("spelling", ["none", "None", "NONE"])
def test_none_is_a_word(spelling: str) -> None:
    config = build_config([("file", {"objective.pointwise_clip": spelling, "run.dir": spelling})])
    assert config.objective.pointwise_clip is None
    assert config.run.dir is None
    # A text that may not be None stays the word.
    assert build_config([("file", {"masking.marker": spelling})]).masking.marker == spelling


def test_later_layers_win_and_leave_the_rest() -> None:
    config = build_config(
        [("a", {"train.num_steps": 7, "train.seed": 3}), ("b", {"train.num_steps": 9})]
    )
    assert (config.train.num_steps, config.train.seed, config.train.batch_size) == (9, 3, 32)


@pytest.mark.parametrize(
    ("key", "value", "got", "needed"),
    [
        ("train.num_steps", 0, "got 0", "greater than 0"),
        ("train.num_steps", 40.5, "got 40.5", "a valid integer"),
        ("train.num_steps", True, "got True", "a valid integer"),
        ("train.num_steps", "40", "got '40'", "a valid integer"),
        ("train.batch_size", -1, "got -1", "greater than 0"),
        ("train.seed", -1, "got -1", "greater than or equal to 0"),
        ("lora.rank", 0, "got 0", "greater than 0"),
        ("lora.dropout", 1.0, "got 1.0", "less than 1"),
        ("lora.target_modules", [], "got []", "at least 1 item"),
        ("lora.target_modules", ["q_proj", 3], "got 3", "a valid string"),
        ("lora.target_modules", "q_proj", "got 'q_proj'", "a list of texts"),
        ("lora.target_modules", ["all-linear", "q_proj"], "got ['all-linear', 'q_proj']", "names"),
        ("lora.enabled", "yes", "got 'yes'", "a valid boolean"),
        ("masking.rho_wrong", -0.1, "got -0.1", "greater than or equal to 0"),
        ("masking.rho_correct", 1.1, "got 1.1", "less than or equal to 1"),
        ("masking.placement", "tail", "got 'tail'", "'suffix', 'prefix', 'middle'"),
        ("rollout.top_p", 0.0, "got 0.0", "greater than 0"),
        ("rollout.top_p", 1.5, "got 1.5", "less than or equal to 1"),
        ("rollout.top_k", 0, "got 0", "-1 (all tokens) or a count of at least 1"),
        ("rollout.top_k", -2, "got -2", "-1 (all tokens) or a count of at least 1"),
        ("rollout.temperature", 0.0, "got 0.0", "greater than 0"),
        ("rollout.max_new_tokens", 0, "got 0", "greater than 0"),
        ("rollout.max_sequences", 0, "got 0", "greater than 0"),
        ("objective.name", "", "got ''", "at least 1 character"),
        ("objective.name", 3, "got 3", "a valid string"),
        ("objective.divergence", "kl", "got 'kl'", "'forward_kl', 'reverse_kl' or 'jsd'"),
        ("objective.jsd_weight", 0.0, "got 0.0", "greater than 0"),
        ("objective.importance_cap", 0.0, "got 0.0", "greater than 0"),
        ("teacher.weights", "mean", "got 'mean'", "'fixed', 'ema', 'live' or 'external'"),
        ("teacher.ema_decay", 1.0, "got 1.0", "less than 1"),
        ("teacher.refresh_every", 0, "got 0", "greater than 0"),
        ("teacher.models", "a", "got 'a'", "a list of texts"),
        ("teacher.model_weights", 1.0, "got 1.0", "a list of numbers"),
        ("teacher.model_weights", [1.0, 0.0], "got 0.0", "greater than 0"),
        ("grpo.group_size", 1, "got 1", "greater than or equal to 2"),
        ("grpo.kl_weight", -0.1, "got -0.1", "greater than or equal to 0"),
        ("objective.pointwise_clip", 0.0, "got 0.0", "greater than 0"),
        ("objective.pointwise_clip", float("nan"), "got nan", "a finite number"),
        ("objective.top_fraction", 1.01, "got 1.01", "less than or equal to 1"),
        ("objective.interpolation_weight", -0.01, "got -0.01", "greater than or equal to 0"),
        ("objective.entropy_floor", 0.0, "got 0.0", "greater than 0"),
        ("objective.teacher_top_k", 0, "got 0", "greater than 0"),
        ("optim.learning_rate", float("inf"), "got inf", "a finite number"),
        ("optim.beta2", 1.0, "got 1.0", "less than 1"),
        ("optim.max_grad_norm", 0.0, "got 0.0", "greater than 0"),
        ("optim.warmup_steps", -1, "got -1", "greater than or equal to 0"),
        ("eval.num_samples", 0, "got 0", "greater than 0"),
        ("eval.num_problems", 0, "got 0", "greater than 0"),
        ("eval.every", -1, "got -1", "greater than or equal to 0"),
        ("checkpoint.keep", 0, "got 0", "greater than 0"),
        ("model.dtype", "fp16", "got 'fp16'", "'auto', 'float32' or 'bfloat16'"),
        ("model.name_or_path", "", "got ''", "at least 1 character"),
        ("data.path", 5, "got 5", "a valid string"),
        ("data.on_bad_row", "ignore", "got 'ignore'", "'stop' or 'skip'"),
        ("run.samples_per_step", -1, "got -1", "greater than or equal to 0"),
    ],
)
def test_refused_values_say_got_needed_and_remedy(
    key: str, value: object, got: str, needed: str
) -> None:
    with pytest.raises(ValueError) as caught:
        build_config([("my.toml", {key: value})])
    message = str(caught.value)
    assert message.startswith(f"my.toml: {key}: {got}; needs {needed}")
    assert f"for example --{key} " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "example"),
    [("teacher.models", """'["one", "two"]'"""), ("teacher.model_weights", "'[1.0, 2.0]'")],
)
def test_the_example_of_a_list_that_is_empty_by_default_has_items(key: str, example: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_config([("my.toml", {key: "[a, b]"})])
    assert str(caught.value).endswith(f"for example --{key} {example}")


def test_every_refused_value_has_its_line_and_source() -> None:
    layers = [("a.toml", {"train.num_steps": 0}), ("command line", {"optim.eps": -1.0})]
    with pytest.raises(ValueError) as caught:
        build_config(layers)
    lines = sorted(str(caught.value).splitlines())
    assert len(lines) == 2
    assert lines[0].startswith("a.toml: train.num_steps: got 0;")
    assert lines[1].startswith("command line: optim.eps: got -1.0;")


@pytest.mark.parametrize(
    ("flat", "parts"),
    [
        (
            {"masking.rho_wrong": 0.5, "masking.rho_correct": 0.4},
            ["got 0.4", "rho_wrong 0.5", "needs at least", "swap them"],
        ),
        (
            {"optim.warmup_steps": 6, "train.num_steps": 5},
            ["got 6", "num_steps 5", "needs at most", "lower it"],
        ),
    ],
)
def test_fields_are_checked_against_each_other(flat: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        build_config([("file", flat)])
    for part in parts:
        assert part in str(caught.value)


def test_equal_mask_ratios_and_the_ends_of_ranges_are_allowed() -> None:
    config = build_config(
        [
            (
                "file",
                {
                    "masking.rho_wrong": 0,
                    "masking.rho_correct": 0,
                    "objective.top_fraction": 1,
                    "objective.interpolation_weight": 0.0,
                    "optim.warmup_steps": 100,
                    "rollout.top_p": 1,
                },
            )
        ]
    )
    assert config.masking.rho_wrong == config.masking.rho_correct == 0.0
    assert config.objective.top_fraction == config.rollout.top_p == 1.0


SERVED_TEACHER = {"teacher.url": "http://node7:8000", "objective.temperature": 1.0}
EXTERNAL = {"teacher.weights": "external", "teacher.model": "a"}
TWO = {"teacher.weights": "external", "teacher.models": ["a", "b"]}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ({"objective.name": "grpo", "train.batch_size": 12}, "a multiple of it"),
        ({"objective.name": "grpo", "objective.importance_cap": 2.0}, "rollout.top_p 1.0"),
        ({"objective.name": "sampled_token", "objective.importance_cap": 2.0}, "without trunc"),
        ({"objective.jsd_weight": 0.9}, "--objective.divergence jsd"),
        ({"teacher.ema_decay": 0.9}, "--teacher.weights ema"),
        (
            {"objective.importance_cap": 2.0},
            "^objective.importance_cap: got 2.0 with objective.name 'paint', which does not read "
            "it; set --objective.importance_cap none, or use --objective.name grpo or "
            "grpo_paint or sampled_token$",
        ),
        ({"objective.name": "sft", "rollout.ahead": 1}, "nothing is sampled"),
        (
            {"objective.name": "grpo", "teacher.weights": "ema"},
            "^teacher.weights: got 'ema' with objective.name 'grpo', which does not read it; set "
            "--teacher.weights fixed, or use --objective.name grpo_paint or paint or "
            "sampled_token$",
        ),
        (
            {"objective.name": "sft", "teacher.reason_first": True},
            "^teacher.reason_first: got True with objective.name 'sft', which does not read it; "
            "set --teacher.reason_first false, or use --objective.name grpo_paint or paint or "
            "sampled_token$",
        ),
        ({"teacher.weights": "ema", "lora.enabled": False}, "set --lora.enabled true"),
        (
            {"teacher.reason_first": True, "rollout.ahead": 1, "rollout.engine": "vllm"},
            "use only one of them",
        ),
        (
            {"teacher.tail": "drop"},
            "^teacher.tail: got 'drop' with teacher.url none, so that no server is asked; leave it "
            "out, or name a server with --teacher.url$",
        ),
        *(
            (
                {**SERVED_TEACHER, **values},
                f"^{key}: got .* with teacher.url http://node7:8000; a server has weights of its "
                "own, and no other teacher scores; leave out one of the two$",
            )
            for key, values in {
                "teacher.weights": {**EXTERNAL, "teacher.revision": "v2"},
                "teacher.refresh_every": {"teacher.refresh_every": 5},
                "teacher.ema_decay": {"teacher.ema_decay": 0.9},
                "teacher.model": {"teacher.model": "a"},
                "teacher.models": {"teacher.models": ["a", "b"]},
                "teacher.route_column": {"teacher.route_column": "domain"},
            }.items()
        ),
        ({**SERVED_TEACHER, "teacher.weights": "live"}, "leave out one of the two"),
        ({**SERVED_TEACHER, "teacher.weights": "ema"}, "leave out one of the two"),
        ({**SERVED_TEACHER, "teacher.reason_first": True}, "writes no rationales"),
        (
            {**SERVED_TEACHER, "objective.temperature": 1.1},
            "^objective.temperature: got 1.1 with teacher.url .* use --objective.temperature 1.0, "
            "or --teacher.tail renormalise, which needs the listed tokens alone$",
        ),
        (
            {**SERVED_TEACHER, "objective.name": "sampled_token", "objective.temperature": 0.9},
            "use --objective.temperature 1.0$",
        ),
        (
            {**SERVED_TEACHER, "objective.teacher_top_k": 50},
            "use --teacher.served_top_k 50 --teacher.tail renormalise in its place",
        ),
        (
            {"teacher.refresh_every": 5, "teacher.weights": "live"},
            "^teacher.refresh_every: got 5 with teacher.weights 'live', which is never refreshed; "
            "leave it out, or use --teacher.weights fixed$",
        ),
        (
            {"teacher.models": ["a", "b"]},
            r"^teacher.models: got \['a', 'b'\] with teacher.weights 'fixed', which is the "
            "student's own model; leave it out, or use --teacher.weights external$",
        ),
        ({"teacher.weights": "external"}, "neither teacher.model nor teacher.models"),
        ({**EXTERNAL, "teacher.models": ["a", "b"]}, "teacher.model 'a' and teacher.models"),
        ({**TWO, "teacher.revision": "v2"}, "^teacher.revision: got 'v2' with teacher.models"),
        ({**EXTERNAL, "teacher.reason_first": True}, "^teacher.reason_first: got true with"),
        ({**TWO, "teacher.model_weights": [1.0]}, "got 1 numbers for 2 teacher.models"),
        ({**EXTERNAL, "teacher.model_weights": [1.0]}, "got 1 numbers for 0 teacher.models"),
        (
            {**TWO, "teacher.model_weights": [1.0, 2.0], "teacher.route_column": "domain"},
            "leave out one of the two",
        ),
        ({**TWO, "teacher.model_names": ["x", "y"]}, "without teacher.route_column"),
        ({**EXTERNAL, "teacher.route_column": "domain"}, "needs two or more to choose from"),
        (
            {**TWO, "teacher.route_column": "domain", "teacher.model_names": ["x", "x"]},
            r"no two alike; give --teacher.model_names '\[\"name0\", \"name1\"\]'$",
        ),
        (
            {**TWO, "teacher.route_column": "domain", "teacher.model_names": ["x"]},
            "needs one name for each",
        ),
        (
            {"eval.gpu_memory_utilization": 0.7, "rollout.tensor_parallel_size": 2},
            r"got 0\.7 with rollout\.tensor_parallel_size 2; .*--eval\.gpu_memory_utilization none",
        ),
        (
            {"eval.max_concurrent": 64},
            r"eval\.max_concurrent: got 64 without eval\.gpu_memory_utilization",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(layer: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        build_config([("my.toml", layer)])


RECIPES = plugin_names(PACKAGE, ATTRIBUTE)
# The recipes that read a key, a value which others would ignore, and what makes it fit.
PAINT, GRPO = ("grpo_paint", "paint"), ("grpo", "grpo_paint")
TEACHER = ("grpo_paint", "paint", "sampled_token")
POLICY = ("grpo", "grpo_paint", "sampled_token")
SEVERAL = '--teacher.weights external --teacher.models ["a","b"]'
IDLE = [
    (PAINT, "objective.divergence", "reverse_kl", ""),
    (PAINT, "objective.divergence", "jsd", ""),
    (PAINT, "objective.jsd_weight", "0.9", "--objective.divergence jsd"),
    (PAINT, "objective.pointwise_clip", "0.05", ""),
    (PAINT, "objective.top_fraction", "1.0", ""),
    (PAINT, "objective.interpolation_weight", "0.05", ""),
    (PAINT, "objective.entropy_floor", "1e-4", ""),
    (PAINT, "objective.teacher_top_k", "50", ""),
    (POLICY, "objective.importance_cap", "2.0", "--rollout.top_p 1.0 --rollout.top_k -1"),
    (TEACHER, "data.columns.feedback", "hint", "--teacher.context feedback"),
    (TEACHER, "teacher.context", "answer", ""),
    (TEACHER, "teacher.group_size", "4", "--teacher.context sibling"),
    (TEACHER, "objective.on", "wrong", ""),
    (TEACHER, "objective.token_weights", "entropy", ""),
    (("grpo_paint",), "objective.distill_weight", "0.5", ""),
    (TEACHER, "teacher.weights", "ema", ""),
    (TEACHER, "teacher.weights", "live", ""),
    (TEACHER, "teacher.ema_decay", "0.9", "--teacher.weights ema"),
    (TEACHER, "teacher.refresh_every", "5", ""),
    (TEACHER, "teacher.model", "tiny", "--teacher.weights external"),
    (TEACHER, "teacher.revision", "v2", "--teacher.weights external --teacher.model a/b"),
    (TEACHER, "teacher.models", '["a","b"]', "--teacher.weights external"),
    (TEACHER, "teacher.model_weights", "[1,3]", SEVERAL),
    (TEACHER, "teacher.route_column", "domain", SEVERAL),
    (TEACHER, "teacher.model_names", '["x","y"]', f"{SEVERAL} --teacher.route_column domain"),
    (TEACHER, "teacher.reason_first", "true", ""),
    (TEACHER, "teacher.reason_max_new_tokens", "8", ""),
    (TEACHER, "masking.rho_wrong", "0.2", ""),
    (TEACHER, "masking.rho_correct", "0.5", ""),
    (TEACHER, "masking.placement", "prefix", ""),
    (TEACHER, "masking.marker", "[cut]", ""),
    (GRPO, "grpo.group_size", "4", ""),
    (GRPO, "grpo.ratio_clip_low", "0.1", ""),
    (GRPO, "grpo.ratio_clip_high", "0.2", ""),
    (("grpo",), "grpo.kl_weight", "0.04", ""),
    (GRPO, "grpo.advantage", "negative", ""),
    (GRPO, "grpo.negative_fraction", "0.5", "--grpo.advantage negative"),
    (GRPO, "grpo.scale_by_std", "false", ""),
    (GRPO, "grpo.skip_zero_variance", "false", ""),
    (GRPO, "grpo.num_updates", "2", ""),
]
SERVER = "--teacher.url http://node7:8000 --objective.temperature 1.0"
# Of a teacher on a server.
SERVED = [
    (TEACHER, "teacher.url", "http://node7:8000", "--objective.temperature 1.0"),
    (TEACHER, "teacher.served_model", "Qwen3-32B", SERVER),
    (PAINT, "teacher.served_top_k", "8", SERVER),
    (PAINT, "teacher.tail", "drop", SERVER),
]


@pytest.mark.parametrize(("users", "key", "value", "beside"), SERVED)
@pytest.mark.parametrize("name", RECIPES)
def test_a_key_of_the_server_needs_a_recipe_that_reads_it_and_a_server(
    name: str, users: tuple[str, ...], key: str, value: str, beside: str
) -> None:
    argv = ["--objective.name", name, f"--{key}", value]
    with pytest.raises(ValueError) as caught:
        load_config(argv)
    message = str(caught.value)
    if name in users:
        assert "teacher.url" in message
        config = load_config([*argv, *beside.split()]).config
        assert value_of(config, key) != LEAVES[key].default
        return
    assert message.startswith(f"{key}: got ") and "which does not read it; set --" in message
    assert message.endswith(f" or use --objective.name {' or '.join(users)}")


@pytest.mark.parametrize(("users", "key", "value", "beside"), IDLE)
@pytest.mark.parametrize("name", RECIPES)
def test_a_key_that_the_recipe_has_no_use_for_is_refused(
    name: str, users: tuple[str, ...], key: str, value: str, beside: str
) -> None:
    argv = ["--objective.name", name, f"--{key}", value, *beside.split()]
    if (name, key) == ("grpo_paint", "teacher.group_size"):
        # It has groups of its own.
        with pytest.raises(ValueError, match=r"set --grpo\.group_size 4$"):
            load_config(argv)
        return
    if name in users:
        assert value_of(load_config(argv).config, key) != LEAVES[key].default
        return
    with pytest.raises(ValueError) as caught:
        load_config(argv)
    message = str(caught.value)
    # What goes with it is idle too, where the same recipes read it.
    given = [other for other in LEAVES if other == key or f"--{other} " in beside]
    idle = [other for other in given if not other.startswith("rollout.")]
    assert message.startswith(f"{idle[0]}: got ") and f"with objective.name {name!r}" in message
    assert all(f"{other}: got " in message for other in idle) and "\n" not in message
    # All the ways out that it names are ways out.
    *back, forward = re.findall(r"(--[a-z_.]+) ([^\s,;]+)", message)
    assert [flag for flag, _ in back] == [f"--{other}" for other in idle]
    load_config([*argv, *shlex.split(" ".join(chain.from_iterable(back)))])
    assert forward[0] == "--objective.name"
    assert message.endswith(f" or use --objective.name {' or '.join(users)}")
    for user in users:
        if (user, key) != ("grpo_paint", "teacher.group_size"):
            load_config([*argv, "--objective.name", user])


def test_every_key_that_not_all_recipes_read_is_tried() -> None:
    declared = {
        leaf
        for name in RECIPES
        for key in recipe_class(name).keys
        for leaf in LEAVES
        if leaf == key or (key.endswith("*") and leaf.startswith(key.removesuffix("*")))
    }
    assert {key for _, key, _, _ in (*IDLE, *SERVED)} == declared


def test_idle_keys_are_named_by_who_reads_them() -> None:
    idle = {"teacher.weights": "ema", "masking.rho_correct": 0.5, "grpo.num_updates": 2}
    with pytest.raises(ValueError) as caught:
        build_config([("my.toml", {"objective.name": "sft", **idle})])
    assert str(caught.value).splitlines() == [
        "masking.rho_correct: got 0.5, teacher.weights: got 'ema' with objective.name 'sft', which "
        "does not read them; set --masking.rho_correct 0.4 --teacher.weights fixed, or use "
        "--objective.name grpo_paint or paint or sampled_token",
        "grpo.num_updates: got 2 with objective.name 'sft', which does not read it; set "
        "--grpo.num_updates 1, or use --objective.name grpo or grpo_paint",
    ]


@pytest.mark.parametrize("name", ["sampled_token", "grpo", "sft"])
def test_parts_that_are_switched_off_suit_every_recipe(name: str) -> None:
    off = {
        "objective.interpolation_weight": 0.0,
        "objective.top_fraction": 0.0,
        "objective.pointwise_clip": None,
    }
    config = build_config([("a recipe of opsd", {**off, "objective.name": name})])
    assert {key: value_of(config, key) for key in off} == off


def test_an_importance_cap_needs_only_comparable_probabilities() -> None:
    comparable = {"rollout.top_p": 1.0, "rollout.top_k": -1, "rollout.temperature": 1.1}
    for name in ("grpo", "sampled_token"):
        layer = {"objective.name": name, "objective.importance_cap": 2.0, **comparable}
        assert build_config([("my.toml", layer)]).objective.importance_cap == 2.0


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@node7:8000",
        "http://s3cret@node7",
        "http://node7:8000?key=s3cret",
        "http://node7:8000#s3cret",
        "http://[s3cret@node7",
        "s3cret@node7",
    ],
)
def test_a_secret_in_a_servers_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(
        ValueError, match="got a value that is not shown; needs an address"
    ) as caught:
        build_config([("command line", {"rollout.engine": "vllm", "rollout.url": url})])
    assert "VLLM_API_KEY" in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:
        assert "s3cret" not in str(error)
        error = error.__cause__


@pytest.mark.parametrize(
    "url",
    [
        *("node7:8000", "http://", "ftp://node7", "http://node7:0", "http://node7:99999"),
        *("http://node7\n:8000", "http://node7/a b", "http://nöde7", "http://[x", "http://x:y"),
    ],
)
def test_an_address_that_no_server_has_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"got .*; needs a server's address, such as http://node7"):
        build_config([("command line", {"rollout.engine": "vllm", "rollout.url": url})])


@pytest.mark.parametrize("url", ["http://node7:8000", "https://[::1]/prefix/", "http://127.0.0.1"])
def test_addresses_of_servers(url: str) -> None:
    config = build_config([("command line", {"rollout.engine": "vllm", "rollout.url": url})])
    assert config.rollout.url == (url,)


@pytest.mark.parametrize(
    "given",
    ["http://node7:8000,http://node8:8000", ["http://node7:8000", "http://node8:8000"]],
)
def test_several_servers_are_a_list_or_words(given: object) -> None:
    config = build_config([("mine.toml", {"rollout.url": given})])
    assert config.rollout.url == ("http://node7:8000", "http://node8:8000")
    (printed,) = (line for line in to_toml(config).splitlines() if line.startswith('url = ["http'))
    assert printed == 'url = ["http://node7:8000", "http://node8:8000"]'


@pytest.mark.parametrize(
    "urls",
    [
        [],
        ["http://node7:8000", "http://node7:8000"],
        ["http://node7:8000", "http://NODE7:8000/"],
        [f"http://node7:{port}" for port in range(1, 66)],
    ],
)
def test_servers_are_counted_and_different(urls: list[str]) -> None:
    message = refused("rollout.url", urls)
    assert "needs 1 to 64 addresses, each of another server" in message


def test_each_of_several_addresses_is_checked() -> None:
    message = refused("rollout.url", "http://node7:8000,node8:8000")
    assert "rollout.url: got 'node8:8000'; needs a server's address" in message
    hidden = refused("rollout.url", ["http://node7:8000", "http://user:s3cret@node8:8000"])
    assert "got a value that is not shown" in hidden and "s3cret" not in hidden


def refused(key: str, value: object) -> str:
    with pytest.raises(ValueError, match="their") as caught:
        build_config([("their.toml", {key: value})])
    return str(caught.value)


def numbers() -> list[str]:
    """The keys with a number."""
    names = {key: str(field.annotation) for key, field in LEAVES.items()}
    return [key for key, name in names.items() if "int" in name or "float" in name]


@pytest.mark.parametrize("key", numbers())
@pytest.mark.parametrize(
    "value", [10**30, 16**6000, 10**400, 1e300], ids=["30", "hex", "400", "float"]
)
def test_no_number_is_without_a_bound(key: str, value: float) -> None:
    """10**30 is a float's too, where a bound of 1e38 admits it."""
    is_float = "float" in str(LEAVES[key].annotation)
    if is_float and value == 10**30:
        value = 10**39
    message = refused(key, value)
    assert message.startswith(f"their.toml: {key}: got ") and "; needs " in message
    assert len(message) < 500 and "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("train.num_steps", 10**7), ("train.batch_size", 65_536), ("eval.num_samples", 10_000)),
        *(("rollout.max_new_tokens", 10**7), ("train.seed", 2**32 - 1), ("checkpoint.keep", 10**6)),
        *(("train.max_tokens_per_microbatch", 10**8), ("optim.max_grad_norm", 1e30)),
        *(("run.samples_per_step", 0), ("reward.timeout_s", 86_400.0), ("lora.alpha", 16_384)),
    ],
)
def test_no_run_is_too_large(key: str, value: float) -> None:
    assert value_of(build_config([("mine.toml", {key: value})]), key) == value


PATHS = ("model.name_or_path", "data.path", "eval.path", "rollout.adapter_dir", "run.dir")


@pytest.mark.parametrize("key", (*PATHS, "model.revision", "data.split", "run.wandb_project"))
@pytest.mark.parametrize(
    "path",
    ["/" + 5000 * "a", 256 * "é", 1500 * "a/", 100 * (50 * "a" + "/"), "a\0b", "a\ud800"],
    ids=["long", "long in bytes", "many", "long together", "null", "surrogate"],
)
def test_a_path_that_no_file_system_takes_is_refused(key: str, path: str) -> None:
    message = refused(key, path)
    assert message.startswith(f"their.toml: {key}: got ") and "; needs " in message
    assert len(message) < 600


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("path", [f"/{'/'.join(10 * ['a' * 200])}", f"/{255 * 'a'}", "Qwen/Qwen3"])
def test_a_long_path_that_a_file_system_takes_is_accepted(key: str, path: str) -> None:
    assert value_of(recorded_config([("mine.toml", {key: path})]), key) == path


@pytest.mark.parametrize("host", [70 * "a", "a..b", ".a", f"{'a.' * 150}b", "xn--\u0378"])
def test_a_host_that_no_lookup_takes_is_refused(host: str) -> None:
    message = refused("rollout.url", f"http://{host}:8000")
    assert "their.toml: rollout.url: got 'http://" in message and "1 to 63 characters" in message


@pytest.mark.parametrize("host", [63 * "a", "node7.cluster.example.", "[::1]", "10.0.0.7"])
def test_a_host_that_a_lookup_takes_is_accepted(host: str) -> None:
    url = f"http://{host}:8000"
    assert recorded_config([("mine.toml", {"rollout.url": url})]).rollout.url == (url,)
