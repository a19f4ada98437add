"""Losses against several teachers, by hand from full logits in float64: mixed, and routed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from examples.custom_recipe import EarlyTokens, decayed_weights
from paint_engine.config.schema import Config
from paint_engine.config.sections import ModelSection, ObjectiveSection
from paint_engine.model.forward import hidden_states, lm_head_weight
from paint_engine.model.load import load_base
from paint_engine.model.packing import build_batch
from paint_engine.recipes import LossInputs, LossOutput, Recipe, SecondPass
from paint_engine.recipes.grpo import Grpo
from paint_engine.recipes.grpo_paint import GrpoPaint
from paint_engine.recipes.paint import Paint
from paint_engine.recipes.sampled_token import SampledToken
from paint_engine.types import TrainExample, Verdict

VOCAB_SIZE = 340
PLAIN = ObjectiveSection(pointwise_clip=None, interpolation_weight=0.0, temperature=1.1)
WEIGHTS = (0.3, 0.7)
# The teacher of each of the four rollouts, where they are routed.
ROUTES = (1, 0, 0, 1)


@pytest.fixture
def teachers(teacher_dirs: tuple[Path, Path]) -> list[PreTrainedModel]:
    models = []
    for directory in teacher_dirs:
        section = ModelSection(name_or_path=str(directory), dtype="float32")
        models.append(load_base(section, torch.device("cpu")))
        nn.Module.to(models[-1], torch.float64)
    return models


def with_prompts(items: Sequence[TrainExample], routed: bool) -> list[TrainExample]:
    """The rollouts with prompts for their teachers, which differ between the two."""
    found = []
    for item, route in zip(items, ROUTES, strict=True):
        assert item.teacher_view is not None
        first = item.teacher_view.prompt_ids
        second = (7, 8, *first)
        view = replace(item.teacher_view, scorers=(0, 1), other_prompt_ids=(second,))
        if routed:
            own = (first, second)[route]
            view = replace(item.teacher_view, scorers=(route,), prompt_ids=own)
        found.append(replace(item, teacher_view=view))
    return found


@dataclass
class Case:
    """What the recipes get, and the log-probabilities that it stands for."""

    student: PreTrainedModel
    teachers: Sequence[PreTrainedModel]
    items: Sequence[TrainExample]
    routed: bool

    def output(self, recipe: Recipe, *, denominator: int | None = None) -> LossOutput:
        batch = build_batch(self.items)
        passes = []
        for place, teacher in enumerate(self.teachers):
            scored = batch.teachers[place]
            with torch.no_grad():
                states = hidden_states(teacher, scored.sequences, attention="padded")
            weight = 1.0 if self.routed else WEIGHTS[place]
            passes.append(SecondPass(states, lm_head_weight(teacher), weight, scored.rollouts))
        student = hidden_states(self.student, batch.student, attention="padded")
        inputs = LossInputs(
            student_hidden_states=student,
            lm_head_weight=lm_head_weight(self.student),
            second_passes=tuple(passes),
            completion_ids=batch.completion_ids,
            cu_seqlens=batch.cu_seqlens,
            examples=self.items,
            old_logprobs=None,
            vocab_size=VOCAB_SIZE,
            denominator=denominator or len(self.items),
        )
        return recipe.loss(inputs)

    def log_p(self, model: PreTrainedModel, prompt: Sequence[int], item: TrainExample) -> Tensor:
        ids = torch.tensor([[*prompt, *item.rollout.completion_ids]])
        rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :VOCAB_SIZE]
        return F.log_softmax(rows / 1.1, dim=-1)

    def rollouts(self) -> list[tuple[Tensor, list[tuple[float, Tensor]]]]:
        """Of each rollout, the student's log-probabilities, and its teachers' with weights."""
        found = []
        for item in self.items:
            assert item.teacher_view is not None
            scored = [
                (
                    1.0 if self.routed else WEIGHTS[place],
                    self.log_p(self.teachers[place], prompt, item).detach(),
                )
                for place, prompt in item.teacher_view.prompts.items()
            ]
            found.append((self.log_p(self.student, item.rollout.prompt_ids, item), scored))
        return found


@pytest.fixture(params=[False, True], ids=["mixed", "routed"])
def case(
    request: pytest.FixtureRequest,
    base: PreTrainedModel,
    teachers: list[PreTrainedModel],
    ragged: list[TrainExample],
) -> Case:
    return Case(base, teachers, with_prompts(ragged, request.param), request.param)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    """KL(teacher, student) of each token."""
    return (log_t.exp() * (log_t - log_s)).sum(-1)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_the_loss_is_the_weighted_sum_of_the_divergences(
    case: Case, reduction: str, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    section = PLAIN.model_copy(update={"reduction": reduction})
    num_tokens = sum(len(item.rollout.completion_ids) for item in case.items)
    by_token = reduction == "token_mean"
    output = case.output(
        Paint(Config(objective=section)), denominator=num_tokens if by_token else 4
    )
    actual = gradient(case.student, output.loss)
    tokens = [sum(w * kl(t, student) for w, t in scored) for student, scored in case.rollouts()]
    expected = (
        torch.cat(tokens).mean() if by_token else torch.stack([t.mean() for t in tokens]).mean()
    )
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert relative_error(actual, gradient(case.student, expected)) < 1e-10
    logged = torch.cat([t.detach() for t in tokens])
    torch.testing.assert_close(output.per_token["token_kl"], logged)
    torch.testing.assert_close(output.per_token["token_loss"], logged)


def test_the_gradient_of_a_mixture_is_that_of_the_mean_distribution(
    case: Case, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    """The gradient of sum_i w_i KL(p_i, p_S) is that of KL(sum_i w_i p_i, p_S)."""
    actual = gradient(case.student, case.output(Paint(Config(objective=PLAIN))).loss)
    losses = []
    for student, scored in case.rollouts():
        mean = sum(weight * log_t.exp() for weight, log_t in scored)
        losses.append(kl(torch.log(mean), student).mean())
    expected = gradient(case.student, torch.stack(losses).mean())
    assert relative_error(actual, expected) < 1e-9


def test_entropies_are_means_over_a_token_s_teachers(case: Case) -> None:
    per_token = case.output(Paint(Config())).per_token
    rows = case.rollouts()
    student = torch.cat([-(s.exp() * s).sum(-1) for s, _ in rows]).detach()
    teacher = torch.cat([sum(w * -(t.exp() * t).sum(-1) for w, t in scored) for _, scored in rows])
    torch.testing.assert_close(per_token["student_entropy"], student)
    torch.testing.assert_close(per_token["teacher_entropy"], teacher)
    assert per_token["selected"].dtype == torch.bool
    # One position at least of each rollout, by each of its teachers.
    lengths = [len(item.rollout.completion_ids) for item in case.items]
    assert all(part.any() for part in per_token["selected"].split(lengths))


def test_the_sampled_token_s_advantage_is_the_weighted_mean(
    case: Case, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    section = ObjectiveSection(
        name="sampled_token", temperature=1.1, pointwise_clip=None, interpolation_weight=0.0
    )
    output = case.output(SampledToken(Config(objective=section)))
    actual = gradient(case.student, output.loss)
    losses, logged = [], []
    for item, (student, scored) in zip(case.items, case.rollouts(), strict=True):
        ids = torch.tensor(item.rollout.completion_ids)[:, None]
        own = student.gather(1, ids)[:, 0]
        teacher = sum(weight * log_t.gather(1, ids)[:, 0] for weight, log_t in scored)
        logged.append((own - teacher).detach())
        losses.append((logged[-1] * own).mean())
    torch.testing.assert_close(output.per_token["sampled_kl"], torch.cat(logged))
    expected = gradient(case.student, torch.stack(losses).mean())
    assert relative_error(actual, expected) < 1e-10


def weighed(case: Case) -> Case:
    """The second and the fourth rollout are right."""
    items = [replace(e, verdict=Verdict(i % 2, i % 2 == 1)) for i, e in enumerate(case.items)]
    return replace(case, items=items)


@pytest.mark.parametrize("on", ["all", "right"])
def test_weights_of_tokens_multiply_the_sum_over_teachers(
    case: Case, on: str, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    case = weighed(case)
    section = PLAIN.model_copy(update={"token_weights": "position", "on": on})
    output = case.output(Paint(Config(objective=section)))
    actual = gradient(case.student, output.loss)
    losses, weights = [], []
    for place, (student, scored) in enumerate(case.rollouts()):
        tokens = sum(w * kl(t, student) for w, t in scored)
        assert isinstance(tokens, Tensor)
        x = (torch.arange(len(tokens), dtype=torch.float64) + 0.5) / len(tokens)
        u = 0.25 + 0.75 * torch.sigmoid((x - 0.3) / 0.1)
        weights.append(u / u.mean() * (on == "all" or place % 2 == 1))
        losses.append((weights[-1] * tokens).mean())
    expected = torch.stack(losses).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(actual, gradient(case.student, expected)) < 1e-6
    torch.testing.assert_close(
        output.per_token["token_weight"].double(), torch.cat(weights), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("token_weights", ["uniform", "position"])
def test_rewards_beside_several_teachers(case: Case, token_weights: str) -> None:
    items = [
        replace(e, advantage=a)
        for e, a in zip(weighed(case).items, (1.0, -1.0, 0.5, -0.5), strict=True)
    ]
    case = replace(case, items=items)
    of_teacher = {"token_weights": token_weights}
    values = {
        GrpoPaint: {"name": "grpo_paint", "distill_weight": 0.7, **of_teacher},
        Grpo: {"name": "grpo"},
        Paint: of_teacher,
    }
    both, policy, divergence = (
        case.output(kind(Config(objective=PLAIN.model_copy(update=update))))
        for kind, update in values.items()
    )
    assert both.parts == {"policy_loss": policy.loss, "distill_loss": divergence.loss}
    assert both.loss.item() == pytest.approx(
        policy.loss.item() + 0.7 * divergence.loss.item(), rel=1e-12
    )
    torch.testing.assert_close(both.per_token["token_kl"], divergence.per_token["token_kl"])


def test_a_recipe_of_one_s_own_gets_the_sum_per_token(case: Case) -> None:
    config = Config(objective=PLAIN)
    output = case.output(EarlyTokens(config))
    bounds = build_batch(case.items).cu_seqlens
    tokens = [sum(w * kl(t, student) for w, t in scored) for student, scored in case.rollouts()]
    expected = (decayed_weights(bounds).double() * torch.cat(tokens)).sum() / len(case.items)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_mean_without_a_denominator_is_refused(case: Case) -> None:
    class Careless(Paint):
        def loss(self, inputs: LossInputs) -> LossOutput:
            return LossOutput(self.divergence(inputs, reduction="token_mean").loss, {})

    with pytest.raises(ValueError, match=r"pass denominator=inputs\.denominator"):
        case.output(Careless(Config()))


def test_one_teacher_over_all_rollouts_is_the_loss_of_one(
    base: PreTrainedModel, teachers: list[PreTrainedModel], ragged: list[TrainExample]
) -> None:
    """A mixture of one is computed as without a mixture, bit for bit."""
    recipe, batch = Paint(Config()), build_batch(ragged)
    assert batch.teacher is not None
    with torch.no_grad():
        states = hidden_states(teachers[0], batch.teacher, attention="padded")
    head, losses = lm_head_weight(teachers[0]), []
    everything = SecondPass(states, head, 1.0, (0, 1, 2, 3))
    for second in (SecondPass(states, head), everything, replace(everything, weight=0.5)):
        inputs = LossInputs(
            student_hidden_states=hidden_states(base, batch.student, attention="padded"),
            lm_head_weight=lm_head_weight(base),
            second_passes=(second,),
            completion_ids=batch.completion_ids,
            cu_seqlens=batch.cu_seqlens,
            examples=ragged,
            old_logprobs=None,
            vocab_size=VOCAB_SIZE,
            denominator=4,
        )
        losses.append(recipe.loss(inputs).loss)
    assert torch.equal(losses[0], losses[1])
    assert losses[2].item() == pytest.approx(losses[0].item() / 2, rel=1e-12)
