"""The loss to a teacher on a server, beside that of the same teacher in this process."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_server import ScoringServer
from torch import Tensor

from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.distributed import World
from paint_engine.model.packing import build_batch
from paint_engine.recipes import LossInputs, LossOutput, recipe_of, served
from paint_engine.training.build import build_run
from paint_engine.training.microbatches import plan_microbatches
from paint_engine.training.rollouts import sample_step
from paint_engine.training.run import Run
from paint_engine.training.step import score
from paint_engine.types import Problem, Rollout, TopK, TrainExample

Build = Callable[..., Run]
WORLD = World(0, 1, 0, torch.device("cpu"))
# All rows of the head, six of padding among them.
WHOLE = 346


@pytest.fixture
def build(command: list[str], tmp_path: Path) -> Build:
    """A run of the command with these flags, not yet trained, in a directory of its own. Its
    adapters are as after some steps."""
    directories = count()

    def build(*flags: str, **settings: object) -> Run:
        changed = {"run.dir": tmp_path / f"run-{next(directories)}", "eval.enabled": "false"}
        changed |= settings
        given = [part for key, value in changed.items() for part in (f"--{key}", str(value))]
        run = build_run(load_config([*command, *flags, *given]), WORLD)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return run

    return build


def scored(run: Run, examples: list[TrainExample]) -> tuple[LossOutput, Tensor]:
    """The loss of all rollouts as one micro-batch, and its gradients."""
    output = score(run, build_batch(examples), examples, len(examples)).output
    run.model.zero_grad()
    output.loss.backward()
    gradients = [p.grad.flatten() for p in run.parameters if p.grad is not None]
    return output, torch.cat(gradients)


def sampled(run: Run) -> list[TrainExample]:
    return sample_step(run, 0)[0]


def assert_close(found: tuple[LossOutput, Tensor], expected: tuple[LossOutput, Tensor]) -> None:
    (output, gradient), (whole, of_whole) = found, expected
    assert output.loss.item() == pytest.approx(whole.loss.item(), abs=1e-5)
    assert (gradient - of_whole).norm() < 1e-4 * of_whole.norm()
    for name in whole.per_token.keys() & output.per_token.keys():
        one, other = output.per_token[name].float(), whole.per_token[name].float()
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name


LOSSES: dict[str, dict[str, object]] = {
    "as preset": {},
    "reverse": {"objective.divergence": "reverse_kl", "objective.pointwise_clip": "none"},
    "jsd": {"objective.divergence": "jsd", "objective.pointwise_clip": "none"},
    "half interpolated": {"objective.top_fraction": 0.5, "objective.interpolation_weight": 0.4},
    "tokens": {"objective.reduction": "token_mean"},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_with_the_whole_vocabulary_it_is_the_loss_of_the_teacher_in_process(
    loss: str, build: Build, served: list[str]
) -> None:
    own = build(**{"objective.temperature": 1.0, **LOSSES[loss]})
    examples = sampled(own)
    expected = scored(own, examples)
    for tail in ("bucket", "renormalise", "drop"):
        settings = {"teacher.served_top_k": WHOLE, "teacher.tail": tail, **LOSSES[loss]}
        run = build(*served, **settings)
        assert run.scorer is not None
        found = scored(run, run.scorer.add_scores(examples))
        assert_close(found, expected)
        mass = found[0].per_token["served_mass"]
        assert torch.allclose(mass, torch.ones_like(mass), atol=1e-5)
    assert expected[0].loss.item() > 0.01 and expected[1].norm() > 0


def test_another_temperature_is_exact_on_the_listed_tokens(build: Build, served: list[str]) -> None:
    own = build(**{"objective.temperature": 1.3})
    examples = sampled(own)
    run = build(
        *served,
        **{
            "teacher.served_top_k": WHOLE,
            "teacher.tail": "renormalise",
            "objective.temperature": 1.3,
        },
    )
    assert run.scorer is not None
    assert_close(scored(run, run.scorer.add_scores(examples)), scored(own, examples))


def test_sampled_tokens(build: Build, served: list[str], teacher: ScoringServer) -> None:
    """The model's six rows of padding count for the server alone, which lists none of them."""
    name = {"objective.name": "sampled_token"}
    own = build(**{"objective.temperature": 1.0, **name})
    examples = sampled(own)
    run = build(*served, **name)
    assert run.scorer is not None
    found, of_server = scored(run, run.scorer.add_scores(examples))
    assert teacher.asked[-1]["prompt_logprobs"] == 0
    expected, of_own = scored(own, examples)
    apart = found.per_token["sampled_kl"] - expected.per_token["sampled_kl"]
    assert (apart > 0).all()
    assert "teacher_entropy" not in found.per_token
    # Without these rows, it is the same number.
    with torch.no_grad():
        teacher.model.lm_head.bias = torch.nn.Parameter(torch.zeros(WHOLE))
        teacher.model.lm_head.bias[340:] = -1e4
    found, of_server = scored(run, run.scorer.add_scores(examples))
    del found.per_token["token_loss"], expected.per_token["token_loss"]
    assert_close((found, of_server), (expected, of_own))


def test_sixteen_tokens(build: Build, served: list[str]) -> None:
    """docs/recipes.md says how the tails differ from the whole vocabulary: merging the tokens that
    are not listed can only lower a divergence, token by token."""
    plain = {"objective.pointwise_clip": "none", "objective.interpolation_weight": 0}
    own = build(**{"objective.temperature": 1.0, **plain})
    examples = sampled(own)
    whole = scored(own, examples)[0].per_token["token_kl"]
    found = {}
    for tail in ("bucket", "renormalise", "drop"):
        run = build(*served, **{"teacher.served_top_k": 16, "teacher.tail": tail, **plain})
        assert run.scorer is not None
        listed = run.scorer.add_scores(examples)
        found[tail] = scored(run, listed)[0].per_token
    mass = found["bucket"]["served_mass"]
    assert ((mass > 0.05) & (mass < 0.99)).all()
    assert (found["bucket"]["token_kl"] < whole + 1e-6).all()
    assert (found["bucket"]["token_kl"] > 0).all() and (found["renormalise"]["token_kl"] > 0).all()
    # "bucket" has one summand more: (1 - mass) log((1 - mass) / the student's rest).
    rest = found["bucket"]["token_kl"] - found["drop"]["token_kl"]
    assert (rest.abs() > 1e-6).any()
    means = {tail: values["token_kl"].mean().item() for tail, values in found.items()}
    assert 0.1 * whole.mean() < means["bucket"] < whole.mean()


def test_the_teacher_in_this_process_takes_no_memory(build: Build, served: list[str]) -> None:
    run = build(*served, **{"lora.enabled": "false"})
    assert run.base.copy is None and not run.base.exists
    own = build(**{"lora.enabled": "false", "objective.temperature": 1.0})
    assert own.base.copy is not None and own.base.exists
    examples = sampled(run)
    output, gradient = scored(run, examples)
    assert math.isfinite(output.loss.item()) and gradient.norm() > 0


def test_the_teacher_s_prompts_do_not_count_in_micro_batches(
    build: Build, served: list[str]
) -> None:
    run = build(*served)
    examples = sampled(run)
    longest = max(len(e.rollout.prompt_ids) + len(e.rollout.completion_ids) for e in examples)
    (groups,) = plan_microbatches(examples, 3 * longest, 1, padded=True)
    assert len(groups) == 1
    in_process = [replace(example, served=None) for example in examples]
    (groups,) = plan_microbatches(in_process, 3 * longest, 1, padded=True)
    assert len(groups) > 1


def test_the_context_of_the_server_shortens_the_teacher_s_prompt(
    build: Build, served: list[str], teacher: ScoringServer
) -> None:
    whole = sampled(build(*served))
    lengths = [len(e.teacher_view.prompt_ids) for e in whole if e.teacher_view is not None]
    # 12 tokens of a completion, and the one that vLLM samples.
    teacher.max_model_len = max(lengths) - 3 + 12 + 1
    shortened = sampled(build(*served))
    views = [e.teacher_view for e in shortened if e.teacher_view is not None]
    assert any(view.shortened for view in views)
    assert max(len(view.prompt_ids) for view in views) <= max(lengths) - 3
    teacher.max_model_len = 40
    with pytest.raises(ValueError, match=r"the teacher's prompt takes \d+ tokens"):
        build(*served)


def inputs_of(scores: TopK, completion: tuple[int, ...], **settings: Any) -> LossInputs:
    """Of a student whose hidden states are its logits."""
    rollout = Rollout(Problem("p", "", "", ""), (1,), completion, (), False, "")
    return LossInputs(
        student_hidden_states=settings["logits"],
        lm_head_weight=torch.eye(settings["logits"].shape[1], dtype=torch.float64),
        second_passes=(),
        completion_ids=torch.tensor(completion),
        cu_seqlens=torch.tensor([0, len(completion)], dtype=torch.int32),
        examples=[TrainExample(rollout, served=scores)],
        old_logprobs=None,
        vocab_size=settings["logits"].shape[1],
        denominator=1,
    )


TINY = TopK(
    torch.tensor([[2, 0, -1], [1, 3, 0]], dtype=torch.int32),
    torch.tensor([[0.5, 0.25, 0.0], [0.6, 0.2, 0.1]]).log(),
)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        # The student gives each of four tokens 1/4; both tails have the rest.
        (
            "bucket",
            (
                0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5),
                0.6 * math.log(2.4) + 0.2 * math.log(0.8) + (0.1 + 0.1) * math.log(0.4),
            ),
        ),
        (
            "drop",
            (
                0.5 * math.log(2),
                0.6 * math.log(2.4) + 0.2 * math.log(0.8) + 0.1 * math.log(0.4),
            ),
        ),
        (
            "renormalise",
            (
                2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3),
                2 / 3 * math.log(2) + 2 / 9 * math.log(2 / 3) + 1 / 9 * math.log(1 / 3),
            ),
        ),
    ],
)  # fmt: skip
def test_two_tokens_by_hand(tail: str, expected: tuple[float, float]) -> None:
    config = Config.model_validate(
        {
            "teacher": {"url": "http://node7:8000", "tail": tail},
            "objective": {
                "temperature": 1.0,
                "pointwise_clip": None,
                "interpolation_weight": 0.0,
            },
        }
    )
    logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    output = recipe_of(config).loss(inputs_of(TINY, (2, 1), logits=logits))
    assert output.per_token["token_kl"].tolist() == pytest.approx(expected, abs=1e-6)
    assert output.loss.item() == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert output.per_token["served_mass"].tolist() == pytest.approx([0.75, 0.9])
    output.loss.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


def test_a_sampled_token_by_hand() -> None:
    config = Config.model_validate(
        {
            "teacher": {"url": "http://node7:8000"},
            "objective": {"name": "sampled_token", "temperature": 1.0},
        }
    )
    logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    output = recipe_of(config).loss(inputs_of(TINY, (0, 3), logits=logits))
    # The student's 1/4 beside the teacher's 0.25 and 0.2.
    expected = [0.0, math.log(0.25 / 0.2)]
    assert output.per_token["sampled_kl"].tolist() == pytest.approx(expected, abs=1e-6)
    output.loss.backward()
    # Half of the second token's log-ratio, times (one-hot - 1/4).
    by_hand = [-0.25, -0.25, -0.25, 0.75]
    assert logits.grad is not None
    assert logits.grad[1].tolist() == pytest.approx([expected[1] / 2 * x for x in by_hand])


def test_a_temperature_by_hand() -> None:
    """The square of the probabilities, at a half, and then their sum."""
    logprobs = torch.tensor([[0.5, 0.25, 0.0]]).log()
    found = served.at_temperature(logprobs, 0.5).exp()
    assert found[0].tolist() == pytest.approx([0.8, 0.2, 0.0])
