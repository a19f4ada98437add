"""A step's rollouts: what the teacher sees of the solution, groups and their advantages, reference
solutions, rationales."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.contexts import ContextFailed
from paint_engine.data.problem_sets import batch_requests
from paint_engine.distributed import World
from paint_engine.model.packing import build_batch
from paint_engine.recipes import StepContext, recipe_of
from paint_engine.recipes.paint import Paint
from paint_engine.recipes.teacher_view import add_teacher_view
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.engine import Completion
from paint_engine.training import step as step_module
from paint_engine.training.build import build_run
from paint_engine.training.rollouts import check_views, judge, sample_step, step_context
from paint_engine.training.run import Run
from paint_engine.training.step import score, train_step
from paint_engine.types import Problem, Request, Rollout, TeacherView, TrainExample, Verdict

Build = Callable[..., Run]
WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def build(command: list[str], tmp_path: Path) -> Build:
    """A run of the command with these overrides, not yet trained, in a directory of its own."""
    directories = count()

    def build(**overrides: object) -> Run:
        overrides = {"run.dir": tmp_path / f"run-{next(directories)}", **overrides}
        flags = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
        return build_run(load_config([*command, *flags]), WORLD)

    return build


@pytest.fixture
def run(build: Build) -> Run:
    return build()


def viewed(run: Run, problem: Problem, text: str, step: int = 0) -> TrainExample:
    """A rollout of that text with its verdict and the teacher's view."""
    example = judge(run, Rollout(problem, (1,), (2,), (0.0,), False, text))
    request = Request(0, problem, (1,), 0)
    assert run.recipe.context is not None
    context = step_context(run, step, [request], [example])
    return add_teacher_view(run.recipe.context, context, example, request)


def view_of(example: TrainExample) -> TeacherView:
    assert example.teacher_view is not None
    return example.teacher_view


def is_correct(example: TrainExample) -> bool:
    assert example.verdict is not None
    return example.verdict.correct


def test_more_overlap_hides_more_of_the_solution(run: Run) -> None:
    problem = Problem("p", "How many?", "First $3 + 4 = 7$. So $\\boxed{7}$." * 4, "7")

    nothing, everything = viewed(run, problem, "no idea"), viewed(run, problem, problem.solution)
    assert (nothing.overlap, everything.overlap) == (0.0, 1.0)
    assert (is_correct(nothing), is_correct(everything)) == (False, True)
    views = view_of(nothing), view_of(everything)
    assert [view.mask_ratio for view in views] == [0.3, pytest.approx(0.4)]
    hidden = [
        len(problem.solution) - len(view.shown.removesuffix("...(omitted)...")) for view in views
    ]
    assert hidden == [round(0.3 * len(problem.solution)), round(0.4 * len(problem.solution))]
    # The verdict is logged and decides nothing: a wrong box over the same anchors hides as much.
    wrong = viewed(run, problem, problem.solution + " \\boxed{8}")
    assert not is_correct(wrong)
    assert view_of(wrong).shown == views[1].shown
    shown = run.tokenizer.decode(list(views[1].prompt_ids))
    assert views[1].shown in shown


def test_a_solution_too_long_for_the_context_is_cut_and_nothing_else(run: Run) -> None:
    def prompt(solution: str) -> tuple[int, ...]:
        problem = Problem("p", "How many kites has Mia?", solution, "7")
        return view_of(viewed(run, problem, "no idea")).prompt_ids

    short, long = prompt("So $\\boxed{7}$."), prompt("First $3 + 4 = 7$. " * 400)
    # All that is left beside the longest completion is used: a character more is a token at most.
    room = run.max_context - run.config.rollout.max_new_tokens
    assert room - 3 <= len(long) <= room == 1024 - 12
    text, whole = (run.tokenizer.decode(list(ids)) for ids in (long, short))
    tail = whole[whole.index("\n=== Reference Solution End") :]
    assert text.endswith(tail) and tail.endswith("</think>\n\n")
    assert text.startswith("<|im_start|>user\nProblem: How many kites has Mia?\n")


def test_the_teachers_suffix_is_the_end_of_its_prompts_alone(build: Build) -> None:
    tail, suffix = "<|im_start|>assistant\n<think>\n\n</think>\n\n", "Let me see."
    for reason_first in ("false", "true"):
        settings = {"teacher.reason_first": reason_first, "teacher.reason_max_new_tokens": 7}
        run = build(**settings, **{"prompts.teacher_suffix": suffix})
        for item in sample_step(run, 0)[0]:
            teacher, student = (
                run.tokenizer.decode(list(ids))
                for ids in (view_of(item).prompt_ids, item.rollout.prompt_ids)
            )
            assert teacher.endswith(tail + suffix) and student.endswith(tail)


class Forgetful(Paint):
    """A recipe that makes no view of the last rollout."""

    def prepare(self, context: StepContext, examples: Sequence[TrainExample]) -> list[TrainExample]:
        *others, last = super().prepare(context, examples)
        return [*others, replace(last, teacher_view=None)]


def test_a_rollout_without_the_view_that_it_needs_is_refused(run: Run) -> None:
    forgetful = Forgetful(run.config)
    run.recipe = forgetful
    needed = r"objective\.name: paint: prepare made no teacher view of a rollout of .*add it in"
    with pytest.raises(ContextFailed, match=needed):
        sample_step(run, 0)


@pytest.mark.parametrize(
    ("name", "section"), [("paint", {"context": "sibling"}), ("grpo", {}), ("sft", {})]
)
def test_a_rollout_that_needs_no_view_may_lack_it(name: str, section: dict[str, str]) -> None:
    config = Config.model_validate({"objective": {"name": name}, "teacher": section})
    rollout = Rollout(Problem("p", "", "", ""), (1,), (2,), (0.0,), False, "")
    check_views(recipe_of(config), [TrainExample(rollout)])


@pytest.mark.parametrize(
    ("placement", "shown"),
    [
        ("suffix", "One. Two <gap>"),
        ("prefix", "<gap>wo three."),
        ("middle", "One.<gap>hree."),
        ("sentence_suffix", "One. <gap>"),
    ],
)
def test_each_placement_hides_its_own_part(placement: str, shown: str, build: Build) -> None:
    # 15 characters and no anchor: 0.4 of them are 6.
    run = build(
        **{
            "masking.placement": placement,
            "masking.rho_wrong": 0.4,
            "masking.rho_correct": 0.4,
            "masking.marker": "<gap>",
        }
    )
    view = view_of(viewed(run, Problem("p", "How many?", "One. Two three.", "3"), "no idea"))
    assert view.shown == shown
    assert shown in run.tokenizer.decode(list(view.prompt_ids))


def test_a_random_placement_depends_on_its_seed_alone(build: Build) -> None:
    run = build(**{"masking.placement": "random", "masking.marker": "<gap>"})
    problem = Problem("p", "How many?", "abcdefghijklmnopqrstuvwxyz" * 4, "3")
    # The step is a part of the seed.
    shown = [view_of(viewed(run, problem, "no idea", step)).shown for step in (0, 1, 2, 0)]
    assert shown[0] == shown[3] and len(set(shown)) == 3
    # 0.3 of 104 characters are 31, wherever they are.
    assert all(len(text) == 104 - 31 + len("<gap>") for text in shown)


GRPO = {
    "objective.name": "grpo",
    "train.batch_size": 6,
    "grpo.group_size": 3,
    "rollout.top_p": 1.0,
    "rollout.top_k": -1,
}


def test_groups_are_consecutive_rollouts_of_one_problem(build: Build) -> None:
    run = build(**GRPO)
    requests = batch_requests(run.config, run.train_set, 0)
    names = [request.problem.problem_id for request in requests]
    assert names[:3] == names[:1] * 3 and names[3:] == names[3:4] * 3 and names[0] != names[3]
    assert len({request.seed for request in requests}) == 6
    rollouts, _ = sample_step(run, 0)
    assert [item.rollout.problem.problem_id for item in rollouts] == names
    assert len({item.rollout.completion_ids for item in rollouts}) > 2
    for item in rollouts:
        assert item.teacher_view is None and item.verdict is not None


def rewarded(run: Run, rewards: list[float]) -> list[TrainExample]:
    rollouts, _ = sample_step(run, 0)
    items = [
        replace(item, verdict=Verdict(reward, reward > 0))
        for item, reward in zip(rollouts, rewards, strict=True)
    ]
    return list(run.recipe.prepare_batch(items))


def test_advantages_are_of_the_group_and_equal_rewards_can_be_left_out(build: Build) -> None:
    run = build(**GRPO)
    items = rewarded(run, [1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    # Rewards 1, 0, 0: mean 1/3, sample standard deviation sqrt(1/3).
    deviation = 3**-0.5 + 1e-4
    expected = [2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation, 0.0, 0.0, 0.0]
    assert [item.advantage for item in items] == pytest.approx(expected)
    assert list(run.recipe.trained(items)) == items[:3]
    metrics = run.recipe.metrics(items)
    assert metrics["zero_variance_groups"] == 1 and metrics["reward"] == pytest.approx(4 / 6)
    assert "mask_ratio" not in metrics
    # The last has a gradient in every group, of the KL to the base.
    for setting in ({"grpo.skip_zero_variance": "false"}, {"grpo.kl_weight": 0.04}):
        assert len(build(**GRPO, **setting).recipe.trained(items)) == 6


def test_advantages_need_not_be_scaled(build: Build) -> None:
    run = build(**GRPO, **{"grpo.scale_by_std": "false"})
    items = rewarded(run, [1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    expected = [2 / 3, -1 / 3, -1 / 3, 0.0, 0.0, 0.0]
    assert [item.advantage for item in items] == pytest.approx(expected)


@pytest.mark.parametrize("answer", ["7", "8"])
@pytest.mark.parametrize("reward", ["math", "first_box"])
def test_the_reward_is_of_the_last_box_or_of_the_first(
    reward: str, answer: str, build: Build
) -> None:
    run = build(**GRPO, **{"reward.function": reward})
    problem = Problem("p", "How many?", "First $3 + 4 = 7$.", answer)
    text = "It is \\boxed{8}. No: $3 + 4 = 7$, so \\boxed{7}."
    item = judge(run, Rollout(problem, (1,), (2,), (0.0,), False, text))
    # The verdict, which is logged, is the answer check's under either reward.
    assert item.verdict is not None and item.verdict.correct == (answer == "7")
    assert item.verdict.reward == float(answer == {"math": "7", "first_box": "8"}[reward])


# What is of the whole batch, with and without passes of groups of equal rewards.
SAME = (
    *("loss", "reward", "zero_variance_groups", "accuracy", "completion_length", "truncation_rate"),
    *("overlap", "num_loss_tokens", "grad_norm", "skipped_steps", "learning_rate"),
)


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [1.0] * 6])
def test_leaving_out_groups_of_equal_rewards_changes_no_gradient(
    rewards: list[float], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, logged = [], []
    for skip in ("true", "false"):
        run = build(**GRPO, **{"grpo.skip_zero_variance": skip})
        items = rewarded(run, rewards)
        monkeypatch.setattr(step_module, "sample_step", lambda run, step, items=items: (items, 0))
        steps = [train_step(run, step)[0] for step in range(2)]
        norms = [metrics["grad_norm"] for metrics in steps]
        logged.append([{name: metrics[name] for name in SAME} for metrics in steps])
        # The weights would magnify rounding: AdamW divides each entry by its own gradient's size.
        moments = [run.optimizer.state[p]["exp_avg"].clone() for p in run.parameters]
        trained.append((norms, moments))
    (norms, moments), (other_norms, others) = trained
    for left_out, whole in zip(*logged, strict=True):
        assert left_out == pytest.approx(whole, rel=1e-5, abs=1e-7)
    assert norms == pytest.approx(other_norms, rel=1e-5)
    assert (norms[0] > 0) == (len(set(rewards)) == 2)
    for moment, other in zip(moments, others, strict=True):
        assert bool(other.any()) == (norms[0] > 0)
        torch.testing.assert_close(moment, other, rtol=0.0, atol=1e-4 * float(other.abs().max()))


def test_updates_after_the_first_have_ratios_that_are_not_one(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**GRPO, "optim.learning_rate": 1e-2, "optim.max_grad_norm": 1.0}
    once, twice = (build(**settings, **{"grpo.num_updates": number}) for number in (1, 2))
    # Answers of random weights are never right.
    items = rewarded(once, [1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    monkeypatch.setattr(step_module, "sample_step", lambda run, step: (items, 0))
    first, second = (train_step(run, 0)[0] for run in (once, twice))
    assert first["ratio"] == pytest.approx(1.0, abs=1e-6) and first["ratio_clipped_share"] == 0
    # Half of it is the first update's 1.
    assert second["ratio"] != pytest.approx(1.0, abs=1e-4)
    assert second["num_loss_tokens"] == first["num_loss_tokens"]
    moved = [
        (p - q).abs().max().item() for p, q in zip(once.parameters, twice.parameters, strict=True)
    ]
    assert max(moved) > 1e-3


def test_reference_solutions_take_the_rollouts_place(build: Build) -> None:
    run = build(**{"objective.name": "sft", "rollout.max_new_tokens": 200})
    items, lag = sample_step(run, 0)
    assert lag == 0 and len(items) == run.config.train.batch_size
    for item in items:
        ids, problem = item.rollout.completion_ids, item.rollout.problem
        assert ids[-1] == run.tokenizer.eos_token_id and not item.rollout.truncated
        assert run.tokenizer.decode(list(ids[:-1])) == problem.solution
    metrics, samples = train_step(run, 0)
    assert "accuracy" not in metrics and "rollout_logprob_diff" not in metrics
    assert metrics["loss"] > 0 and metrics["num_loss_tokens"] == sum(
        len(item.rollout.completion_ids) for item in items
    )
    assert samples[0]["solution"] == items[0].rollout.problem.solution


def test_a_reference_solution_is_cut_where_a_rollout_would_be(build: Build) -> None:
    run = build(**{"objective.name": "sft", "rollout.max_new_tokens": 3})
    item = sample_step(run, 0)[0][0]
    whole = run.tokenizer.encode(item.rollout.problem.solution)
    assert item.rollout.completion_ids == tuple(whole[:3]) and item.rollout.truncated


def test_the_running_mean_follows_the_steps(build: Build) -> None:
    run = build(**{"teacher.weights": "ema", "teacher.ema_decay": 0.5, "optim.learning_rate": 0.01})
    states = [[p.detach().clone() for p in run.parameters]]
    for step in range(2):
        train_step(run, step)
        states.append([p.detach().clone() for p in run.parameters])
    for mean, start, once, twice in zip(run.teacher.kept, *states, strict=True):
        torch.testing.assert_close(mean, 0.25 * start + 0.25 * once + 0.5 * twice)
    assert any(not torch.equal(a, b) for a, b in zip(run.teacher.kept, states[2], strict=True))


@pytest.mark.parametrize("weights", ["fixed", "ema", "live"])
def test_only_a_live_teacher_agrees_with_a_student_that_has_moved(
    weights: str, build: Build
) -> None:
    """Without a solution in its prompt a teacher differs from the student by its weights alone."""
    run = build(**{"teacher.weights": weights, "optim.learning_rate": 0.01})
    train_step(run, 0)
    items = [
        replace(item, teacher_view=replace(view_of(item), prompt_ids=item.rollout.prompt_ids))
        for item in sample_step(run, 1)[0]
    ]
    output = score(run, build_batch(items), items, len(items)).output
    divergence = output.per_token["token_kl"].mean().item()
    assert (divergence < 1e-9) == (weights == "live"), divergence


def test_a_rationale_stands_in_the_prompt_of_the_teacher_that_wrote_it(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(**{"teacher.reason_first": "true", "teacher.reason_max_new_tokens": 7})
    asked = []
    original = BuiltinEngine.generate

    def generate(self, prompts, seeds, params, *, base=False, on_batch=None):
        if not base:
            return original(self, prompts, seeds, params, base=base, on_batch=on_batch)
        asked.append(([run.tokenizer.decode(list(p)) for p in prompts], params))
        stop = run.tokenizer.eos_token_id
        ids = [(*run.tokenizer.encode(f"because {n}"), stop) for n in range(len(prompts))]
        return [Completion(one, (0.0,) * len(one), False) for one in ids]

    monkeypatch.setattr(BuiltinEngine, "generate", generate)
    items, _ = sample_step(run, 0)
    ((prompts, params),) = asked
    assert params.max_new_tokens == 7 and params.temperature == run.config.rollout.temperature
    for number, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        view = view_of(item)
        assert view.shown in prompt and view.rationale == f"because {number}"
        text = run.tokenizer.decode(list(view.prompt_ids))
        assert view.shown in text
        assert text.index(view.shown) < text.index(f"because {number}")


def test_each_teacher_writes_its_rationales_with_its_own_weights(build: Build) -> None:
    """A mean that keeps nothing of the past is the student as its last step left it."""
    reason = {"teacher.reason_first": "true", "teacher.reason_max_new_tokens": 12}
    written = {}
    for weights, decay in (("fixed", 0.999), ("live", 0.999), ("ema", 0.0)):
        run = build(**reason, **{"teacher.weights": weights, "teacher.ema_decay": decay})
        before = [view_of(item).rationale for item in sample_step(run, 0)[0]]
        train_step(run, 0)
        written[weights] = before, [view_of(item).rationale for item in sample_step(run, 1)[0]]
    fixed, live, ema = written.values()
    # The same step of the same student: before it all three are the base.
    assert fixed[0] == live[0] == ema[0] and all(fixed[0])
    assert ema[1] == live[1]
    assert all(one != other for one, other in zip(fixed[1], live[1], strict=True))


def test_a_solution_without_room_is_told_apart_from_a_masked_one(run: Run) -> None:
    short, long = (
        viewed(run, Problem("p", "How many?", text, "7"), "no idea")
        for text in ("First $3 + 4 = 7$.", "First $3 + 4 = 7$. " * 400)
    )
    assert (view_of(short).shortened, view_of(long).shortened) == (False, True)
    assert run.recipe.metrics([short, long])["shortened_solutions"] == 0.5


def test_rewards_need_no_solutions(build: Build, tmp_path: Path) -> None:
    rows = [{"problem": f"How much is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # All answers are wrong, and are trained all the same, so that there are samples.
    settings = {"data.path": path, "grpo.skip_zero_variance": "false"}
    metrics, samples = train_step(build(**GRPO, **settings), 0)
    assert metrics["reward"] == 0 and samples[0]["solution"] == ""
    with pytest.raises(ValueError, match="training needs one"):
        build(**{"data.path": path})
