"""The counted operations of a step, against those that PyTorch runs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_cases import PLAIN, hand_examples
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from paint_engine.config.schema import Config
from paint_engine.config.sections import LoraSection
from paint_engine.estimate.arithmetic import (
    Scoring,
    backward_flops,
    forward_flops,
    head_flops,
    rollout_flops,
    sampling_flops,
    scoring_of,
)
from paint_engine.estimate.lengths import PromptLengths
from paint_engine.estimate.model_shape import ModelShape, shape_of
from paint_engine.model.forward import causal_lm
from paint_engine.model.lora import add_lora
from paint_engine.recipes import LossInputs, SecondPass, recipe_of
from paint_engine.types import Problem, TopK

NUM_TOKENS, VOCAB, HIDDEN, WIDE, LISTED = 3, 400, 32, 48, 4
SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 192,
}


def student(*, lora: bool = True) -> Any:
    return add_lora(Qwen3ForCausalLM(Qwen3Config(**SIZES)), LoraSection(enabled=lora, rank=4), 0)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_operations_of_the_layers_are_those_that_pytorch_counts(
    lora: bool, checkpointing: bool
) -> None:
    model, length = student(lora=lora), 8
    ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        states = causal_lm(model).base_model(input_ids=ids, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        states.sum().backward()
    shape = shape_of(model)
    # Of an attention this short nearly nothing; the first layer's inputs need no gradient.
    counted = forward_flops(shape, length, adapters=True)
    assert counted == pytest.approx(forward.get_total_flops(), rel=0.05)
    back = backward_flops(shape, length, checkpointing=checkpointing) - checkpointing * counted
    assert back == pytest.approx(backward.get_total_flops(), rel=0.05)


# ---- the losses ----------------------------------------------------------------------------------


def config_with(name: str, lora: bool, **sections: dict[str, Any]) -> Config:
    objective = {"name": name, **PLAIN, **sections.pop("objective", {})}
    if name.startswith("grpo"):
        sections["grpo"] = {"group_size": 2, **sections.get("grpo", {})}
    return Config.model_validate({"objective": objective, "lora": {"enabled": lora}, **sections})


def run_loss(config: Config, num_passes: int) -> dict[str, float]:
    """The operations of the loss and its backward pass, by the kind of product."""
    recipe, generator = recipe_of(config), torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    head = normal(VOCAB, HIDDEN).requires_grad_(not config.lora.enabled)
    base = recipe.second_pass == "base"
    seconds = [
        SecondPass(
            normal(NUM_TOKENS, HIDDEN if base else WIDE),
            None if base else normal(VOCAB, WIDE),
            1 / num_passes,
        )
        for _ in range(num_passes)
    ]
    examples = list(recipe.prepare_batch(hand_examples()))
    if recipe.served_top_k is not None:
        width = recipe.served_top_k + 1
        for place, example in enumerate(examples):
            own = example.rollout.completion_ids
            ids = torch.tensor([[token, *range(9, 8 + width)] for token in own], dtype=torch.int32)
            served = TopK(ids, torch.full(ids.shape, -3.0))
            examples[place] = replace(example, served=served)

    def step() -> None:
        inputs = LossInputs(
            student_hidden_states=normal(NUM_TOKENS, HIDDEN).requires_grad_(),
            lm_head_weight=head,
            second_passes=tuple(seconds),
            completion_ids=torch.tensor([0, 1, 0]),
            cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32),
            examples=examples,
            old_logprobs=None,
            vocab_size=VOCAB,
            denominator=2,
        )
        recipe.loss(inputs).loss.backward()

    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as found:
        step()
    kinds = ("aten::mm", "aten::addmm", "aten::bmm")
    flops = {event.key: float(event.flops) for event in found.key_averages()}
    return {kind.removeprefix("aten::"): flops.get(kind, 0.0) for kind in kinds}


SERVED = {"url": "http://127.0.0.1:1", "served_top_k": LISTED - 1}
CASES: dict[str, tuple[str, int, dict[str, dict[str, Any]]]] = {
    "paint": ("paint", 1, {}),
    "two teachers": ("paint", 2, {}),
    "weights of tokens": ("paint", 1, {"objective": {"token_weights": "position"}}),
    "the example of a recipe": ("examples.custom_recipe:EarlyTokens", 1, {}),
    "sampled_token": ("sampled_token", 1, {}),
    "two teachers, sampled_token": ("sampled_token", 2, {}),
    "grpo": ("grpo", 0, {}),
    "grpo, KL": ("grpo", 1, {"grpo": {"kl_weight": 0.1}}),
    "grpo_paint": ("grpo_paint", 1, {}),
    "grpo_paint, two teachers": ("grpo_paint", 2, {}),
    "grpo_paint, on wrong": ("grpo_paint", 1, {"objective": {"on": "wrong"}}),
    "grpo_paint, two teachers, on wrong": ("grpo_paint", 2, {"objective": {"on": "wrong"}}),
    # No rollout here has a sibling's text; the teacher scores all of them, as the counts have it.
    "grpo_paint, sibling": ("grpo_paint", 1, {"teacher": {"context": "sibling"}}),
    "sft": ("sft", 0, {}),
    "teacher_top_k": ("paint", 1, {"objective": {"teacher_top_k": LISTED}}),
    "served": ("paint", 0, {"teacher": SERVED}),
    "served, renormalise": ("paint", 0, {"teacher": {**SERVED, "tail": "renormalise"}}),
    "served, sampled_token": ("sampled_token", 0, {"teacher": {"url": SERVED["url"]}}),
    "served, grpo_paint": ("grpo_paint", 0, {"teacher": SERVED}),
}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_products_with_the_heads_are_those_that_pytorch_runs(
    case: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch counts its own products alone, not those in oneDNN.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    name, num_passes, sections = CASES[case]
    config = config_with(name, lora, **sections)
    work, found = recipe_of(config).head_work(num_passes), run_loss(config, num_passes)
    own, wide = 2 * NUM_TOKENS * VOCAB * HIDDEN, 2 * NUM_TOKENS * VOCAB * WIDE
    second = own if recipe_of(config).second_pass == "base" else wide
    assert found["mm"] + found["addmm"] == work.student * own + work.second * num_passes * second
    # Rows of a trained head get their gradient one by one, and not by a product.
    if lora:
        assert found["bmm"] == work.rows * 2 * NUM_TOKENS * HIDDEN


# ---- a rollout -----------------------------------------------------------------------------------


def shape_with(**sizes: Any) -> ModelShape:
    with torch.device("meta"):
        return shape_of(Qwen3ForCausalLM(Qwen3Config(**SIZES | sizes)))


def flops(config: Config, scoring: Sequence[Scoring], shape: ModelShape) -> dict[str, float]:
    return rollout_flops(config, shape, student_prompt=10, completion=20, scoring=scoring)


def external(num_teachers: int, *, routed: bool = False) -> dict[str, Any]:
    names = [f"teacher-{place}" for place in range(num_teachers)]
    return {
        "weights": "external",
        "models": names,
        "route_column": "domain" if routed else None,
    }


def test_each_teacher_scores_its_rollouts_at_its_own_size() -> None:
    shape, teachers = shape_of(student()), [shape_with(hidden_size=96), shape_with(hidden_size=32)]
    lengths = PromptLengths([10], [30, 40, 40], [[30], [40, 40]])
    passes = [
        forward_flops(one, n, adapters=False) for one, n in zip(teachers, (50, 60), strict=True)
    ]
    heads = [head_flops(one, 20) for one in teachers]
    own = head_flops(shape, 20)

    problems = [Problem(str(i), "", "", "", route=f"teacher-{int(i > 0)}") for i in range(4)]
    routed = config_with("paint", True, teacher=external(2, routed=True))
    found = flops(routed, scoring_of(routed, shape, lengths, problems, teachers), shape)
    assert found["teacher"] == passes[0] / 4 + passes[1] * 3 / 4
    assert found["loss"] == 2 * own + heads[0] / 4 + heads[1] * 3 / 4

    problems = [Problem(str(i), "", "", "") for i in range(4)]
    for name, student_products in (("paint", 4), ("sampled_token", 2), ("grpo_paint", 6)):
        mixed = config_with(name, True, teacher=external(2))
        found = flops(mixed, scoring_of(mixed, shape, lengths, problems, teachers), shape)
        assert found["teacher"] == sum(passes)
        assert found["loss"] == student_products * own + sum(heads)
    assert found["rollout"] == sampling_flops(shape, 10, 20)
    assert found["backward"] == backward_flops(shape, 30, checkpointing=False)


def test_a_teacher_with_adapters_of_its_own_runs_them() -> None:
    shape, lengths = shape_of(student()), PromptLengths([10], [30], [[30]])
    cases = ({}, False), ({"weights": "live"}, True), ({"weights": "ema"}, True)
    for section, adapters in (*cases, ({"refresh_every": 5}, True)):
        config = config_with("paint", True, teacher=section)
        found = flops(config, scoring_of(config, shape, lengths, [], []), shape)
        assert found["teacher"] == forward_flops(shape, 50, adapters=adapters)


def test_what_a_server_scores_is_not_the_trainer_s_work() -> None:
    shape, lengths = shape_of(student()), PromptLengths([10], [30], [[30]])
    config = config_with("paint", True, teacher=SERVED)
    scoring = scoring_of(config, shape, lengths, [], [])
    assert scoring == []
    found = flops(config, scoring, shape)
    assert set(found) == {"rollout", "student", "loss", "backward"}
    # The tail takes all logits and a product back; the listed tokens their rows of the head.
    assert found["loss"] == 2 * head_flops(shape, 20) + LISTED * 2 * shape.hidden * 20


def test_updates_repeat_all_but_the_sampling() -> None:
    shape = shape_of(student())
    scoring = [Scoring(shape, 10)]
    once, thrice = (
        config_with("grpo", True, grpo={"kl_weight": 0.1, "num_updates": n}) for n in (1, 3)
    )
    found = flops(once, scoring, shape), flops(thrice, scoring, shape)
    assert set(found[0]) == {"rollout", "teacher", "student", "loss", "backward"}
    for name, size in found[0].items():
        assert found[1][name] == size * (1 if name == "rollout" else 3)
    sft = flops(config_with("sft", True), [], shape)
    assert set(sft) == {"student", "loss", "backward"}
    assert found[0]["loss"] == sft["loss"] + head_flops(shape, 20)


def test_a_rationale_is_sampled_after_its_request() -> None:
    shape = shape_of(student())
    section = {"reason_first": True, "reason_max_new_tokens": 100}
    config = config_with("paint", True, teacher=section)
    found = flops(config, [Scoring(shape, 130)], shape)
    # Prompt and rationale go through the model once; a hundred tokens go through the head.
    assert found["rationale"] == sampling_flops(shape, 30, 100)
