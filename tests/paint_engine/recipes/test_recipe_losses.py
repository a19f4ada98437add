"""Divergences, sampled tokens and SFT against plain PyTorch on full logits in float64."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from paint_engine.config.schema import Config
from paint_engine.config.sections import GrpoSection, ObjectiveSection
from paint_engine.recipes import LossInputs, LossOutput, SecondPass
from paint_engine.recipes.base import recipe_class
from paint_engine.training.record import metric_sums
from paint_engine.types import Problem, Rollout, TrainExample

VOCAB_SIZE, NUM_PADDING_ROWS, HIDDEN_SIZE = 11, 2, 5
LENGTHS = (4, 0, 3, 1, 5)
NAMES = ("paint", "sampled_token", "grpo", "grpo_paint", "sft")
_PAINT = {"token_kl", "clipped_mass", "clipped_token_share", "teacher_entropy", "selected"}
_GRPO = {"logprobs", "ratio", "ratio_clipped_share", "importance_weight"}
TOKENS_OF = {
    "paint": _PAINT,
    "sampled_token": {"sampled_kl", "importance_weight", "teacher_entropy"},
    "grpo": _GRPO | {"base_kl"},
    "grpo_paint": _PAINT | _GRPO,
    "sft": set(),
}


@dataclass(frozen=True)
class Batch:
    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor | None
    token_ids: Tensor
    lengths: tuple[int, ...]
    sampler: Tensor
    advantages: Tensor

    def part(self, first: int, last: int) -> "Batch":
        """Rollouts `first` to `last`, the latter left out."""
        tokens = slice(sum(self.lengths[:first]), sum(self.lengths[:last]))
        return replace(
            self,
            hidden=self.hidden[tokens],
            teacher_hidden=self.teacher_hidden[tokens],
            token_ids=self.token_ids[tokens],
            sampler=self.sampler[tokens],
            lengths=self.lengths[first:last],
            advantages=self.advantages[first:last],
        )


def make_batch(
    lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float64, seed: int = 5
) -> Batch:
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    num_tokens, num_rows = sum(lengths), VOCAB_SIZE + NUM_PADDING_ROWS
    return Batch(
        hidden=noise(num_tokens, HIDDEN_SIZE).requires_grad_(),
        head=noise(num_rows, HIDDEN_SIZE).requires_grad_(),
        teacher_hidden=noise(num_tokens, HIDDEN_SIZE),
        teacher_head=noise(num_rows, HIDDEN_SIZE),
        token_ids=torch.randint(VOCAB_SIZE, (num_tokens,), generator=draw),
        lengths=lengths,
        sampler=noise(num_tokens) - 2.5,
        advantages=noise(len(lengths)),
    )


def run(name: str, batch: Batch, section: ObjectiveSection, denominator: int) -> LossOutput:
    """Unchecked: the sections say nothing of how the rollouts were sampled."""
    grpo = GrpoSection(kl_weight=0.2 if name == "grpo" else 0.0)
    config = Config.model_construct(objective=section, grpo=grpo)
    recipe = recipe_class(name)(config)
    assert (recipe.second_pass is None) == (name == "sft")
    parts = zip(
        batch.token_ids.split(batch.lengths),
        batch.sampler.split(batch.lengths),
        batch.advantages.tolist(),
        strict=True,
    )
    examples = [
        make_example(ids.tolist(), sampled.tolist() if recipe.samples else [], advantage)
        for ids, sampled, advantage in parts
    ]
    second = SecondPass(batch.teacher_hidden, batch.teacher_head)
    inputs = LossInputs(
        student_hidden_states=batch.hidden,
        lm_head_weight=batch.head,
        second_passes=() if name == "sft" else (second,),
        completion_ids=batch.token_ids,
        cu_seqlens=torch.tensor([0, *accumulate(batch.lengths)], dtype=torch.int32),
        examples=examples,
        old_logprobs=None,
        vocab_size=VOCAB_SIZE,
        denominator=denominator,
    )
    return recipe.loss(inputs)


def make_example(token_ids: list[int], logprobs: list[float], advantage: float) -> TrainExample:
    problem = Problem("p", "", "", "")
    rollout = Rollout(problem, (0,), tuple(token_ids), tuple(logprobs), False, "")
    return TrainExample(rollout, advantage=advantage)


def log_p(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    return F.log_softmax((hidden @ head.T)[:, :VOCAB_SIZE] / temperature, dim=-1)


def teacher_log_p(batch: Batch, temperature: float) -> Tensor:
    assert batch.teacher_head is not None
    return log_p(batch.teacher_hidden, batch.teacher_head, temperature)


def reduced(token_loss: Tensor, section: ObjectiveSection) -> Tensor:
    if section.reduction == "token_mean":
        return token_loss.mean()
    means = [part.mean() for part in token_loss.split(LENGTHS) if len(part)]
    return torch.stack(means).sum() / len(LENGTHS)


def assert_same(
    actual: Tensor, expected: Tensor, batch: Batch, error: Callable[[Tensor, Tensor], float]
) -> None:
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    leaves = (batch.hidden, batch.head)
    pairs = zip(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True
    )
    for one, other in pairs:
        assert error(one, other) < 1e-12


def count(section: ObjectiveSection) -> int:
    return len(LENGTHS) if section.reduction == "sequence_mean" else sum(LENGTHS)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_against_their_closed_forms(
    divergence: str,
    clip: float | None,
    reduction: str,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    section = ObjectiveSection.model_validate(
        {
            "divergence": divergence,
            "jsd_weight": 0.3,
            "pointwise_clip": clip,
            "interpolation_weight": 0.0,
            "reduction": reduction,
        }
    )
    batch = make_batch()
    own = log_p(batch.hidden, batch.head, section.temperature)
    target = teacher_log_p(batch, section.temperature)
    mixture = (0.3 * target.exp() + 0.7 * own.exp()).log()
    terms = {
        "forward_kl": target.exp() * (target - own),
        "reverse_kl": own.exp() * (own - target),
        "jsd": 0.3 * target.exp() * (target - mixture) + 0.7 * own.exp() * (own - mixture),
    }[divergence]
    if clip is not None:
        assert (terms > clip).any() and (terms < clip).any()
        terms = terms.clamp(max=clip)
    output = run("paint", batch, section, count(section))
    assert_same(output.loss, reduced(terms.sum(-1), section), batch, relative_error)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("cap", [None, 0.9])
def test_sampled_tokens_gradient_is_the_policy_gradient_of_the_log_ratio(
    cap: float | None, reduction: str, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    section = ObjectiveSection.model_validate(
        {"name": "sampled_token", "reduction": reduction, "importance_cap": cap, "temperature": 0.9}
    )
    batch = make_batch()
    rows = torch.arange(sum(LENGTHS))
    own = log_p(batch.hidden, batch.head, 0.9)[rows, batch.token_ids]
    target = teacher_log_p(batch, 0.9)[rows, batch.token_ids]
    advantage, weight = (target - own).detach(), torch.ones(len(rows), dtype=torch.float64)
    if cap is not None:
        uncapped = own.detach().exp() / batch.sampler.exp()
        assert (uncapped > cap).any() and (uncapped < cap).any()
        weight = uncapped.clamp(max=cap)
    output = run("sampled_token", batch, section, count(section))
    policy = reduced(-weight * advantage * own, section)
    leaves = (batch.hidden, batch.head)
    pairs = zip(
        torch.autograd.grad(output.loss, leaves), torch.autograd.grad(policy, leaves), strict=True
    )
    for actual, expected in pairs:
        assert relative_error(actual, expected) < 1e-12
    value = reduced(-weight * advantage, section).item()
    assert output.loss.item() == pytest.approx(value, rel=1e-12)
    assert torch.allclose(output.per_token["sampled_kl"], -advantage, rtol=1e-12, atol=1e-14)
    assert torch.allclose(output.per_token["importance_weight"], weight, rtol=1e-12, atol=0)


def test_sampled_tokens_mean_over_the_vocabulary_is_the_reverse_kl(
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    section = ObjectiveSection(
        divergence="reverse_kl",
        pointwise_clip=None,
        interpolation_weight=0.0,
        temperature=0.9,
        reduction="token_mean",
    )
    positions = make_batch((3,))
    # One rollout for each token that the student could have sampled at the three positions.
    every = replace(
        positions,
        hidden=positions.hidden.repeat(VOCAB_SIZE, 1),
        teacher_hidden=positions.teacher_hidden.repeat(VOCAB_SIZE, 1),
        token_ids=torch.arange(VOCAB_SIZE).repeat_interleave(3),
        lengths=(3,) * VOCAB_SIZE,
        sampler=positions.sampler.repeat(VOCAB_SIZE),
        advantages=positions.advantages.repeat(VOCAB_SIZE),
    )
    own = log_p(positions.hidden, positions.head, 0.9)
    target = teacher_log_p(positions, 0.9)
    kl = (own.exp() * (own - target)).sum()
    of_paint = run("paint", positions, section, 1).loss

    def expectation(leaf: Tensor) -> Tensor:
        total = torch.zeros_like(leaf)
        for token in range(VOCAB_SIZE):
            one = every.part(token, token + 1)
            for row in range(3):
                place = replace(
                    one,
                    hidden=one.hidden[row : row + 1],
                    teacher_hidden=one.teacher_hidden[row : row + 1],
                    token_ids=one.token_ids[row : row + 1],
                    sampler=one.sampler[row : row + 1],
                    lengths=(1,),
                )
                loss = run("sampled_token", place, section, 1).loss
                total += own[row, token].exp().item() * torch.autograd.grad(loss, leaf)[0]
        return total

    for leaf in (positions.hidden, positions.head):
        mean = expectation(leaf)
        assert relative_error(mean, torch.autograd.grad(kl, leaf, retain_graph=True)[0]) < 1e-12
        paints = torch.autograd.grad(of_paint, leaf, retain_graph=True)[0]
        assert relative_error(mean, paints) < 1e-12
    sampled = run("sampled_token", every, section, 1).per_token["sampled_kl"]
    weights = own.exp().T.flatten()
    assert (weights * sampled).sum().item() == pytest.approx(kl.item(), rel=1e-12)


def test_the_teacher_may_share_the_students_head(
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    batch = make_batch()
    shared = replace(batch, teacher_head=batch.head.detach())
    section = ObjectiveSection()
    for name in ("paint", "sampled_token", "grpo", "grpo_paint"):
        own_head = run(name, shared, section, 5)
        no_head = run(name, replace(batch, teacher_head=None), section, 5)
        assert_same(no_head.loss, own_head.loss, batch, relative_error)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_sft_is_cross_entropy(
    reduction: str, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    section = ObjectiveSection.model_validate({"reduction": reduction, "temperature": 0.8})
    batch = make_batch()
    logits = (batch.hidden @ batch.head.T)[:, :VOCAB_SIZE] / 0.8
    if reduction == "token_mean":
        expected = F.cross_entropy(logits, batch.token_ids)
    else:
        rows = zip(logits.split(LENGTHS), batch.token_ids.split(LENGTHS), strict=True)
        means = [F.cross_entropy(part, ids) for part, ids in rows if len(ids)]
        expected = torch.stack(means).sum() / len(LENGTHS)
    output = run("sft", batch, section, count(section))
    assert_same(output.loss, expected, batch, relative_error)


@pytest.mark.parametrize("token_weights", ["uniform", "entropy", "position"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(
    name: str,
    reduction: str,
    token_weights: str,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    section = ObjectiveSection.model_validate(
        {
            "reduction": reduction,
            "importance_cap": 1.3,
            "top_fraction": 0.3,
            "token_weights": token_weights,
        }
    )
    batch, denominator = make_batch(), count(section)
    leaves = (batch.hidden, batch.head)
    whole = run(name, batch, section, denominator)
    whole_sums = metric_sums(whole)
    whole_grads = torch.autograd.grad(whole.loss, leaves)
    sums: Counter[str] = Counter()
    parts: list[LossOutput] = []
    # The second has no token at all.
    for first, last in ((0, 1), (1, 2), (2, 4), (4, 5)):
        parts.append(run(name, batch.part(first, last), section, denominator))
        sums.update(metric_sums(parts[-1]))
    grads = torch.autograd.grad(torch.stack([part.loss for part in parts]).sum(), leaves)
    for part, all_at_once in zip(grads, whole_grads, strict=True):
        assert relative_error(part, all_at_once) < 1e-12
    assert sums.keys() == whole_sums.keys()
    for key, value in whole_sums.items():
        assert sums[key] == pytest.approx(value, rel=1e-12), key


@pytest.mark.parametrize("name", NAMES)
def test_tokens_values_are_detached_and_named(name: str) -> None:
    batch = make_batch(dtype=torch.float32)
    output = run(name, batch, ObjectiveSection(), 5)
    assert output.loss.requires_grad and output.loss.dtype == torch.float32
    assert set(output.per_token) == {"token_loss", "student_entropy"} | TOKENS_OF[name]
    for key, values in output.per_token.items():
        boolean = key in ("selected", "clipped_token_share", "ratio_clipped_share")
        assert values.dtype == (torch.bool if boolean else torch.float32), key
        assert values.shape == (sum(LENGTHS),) and not values.requires_grad, key
    means = [part.mean() for part in output.per_token["token_loss"].split(LENGTHS) if len(part)]
    assert output.loss.item() == pytest.approx(torch.stack(means).sum().item() / 5, rel=1e-5)
    left_out = {"token_loss", "logprobs", "selected"}
    losses = {"loss", *output.parts}
    assert metric_sums(output).keys() == losses | set(output.per_token) - left_out
    assert tuple(output.parts) == recipe_class(name).loss_parts
