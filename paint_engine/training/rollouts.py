"""The rollouts of one step and what the loss needs beside them: the teacher's view of each, or its
advantage; and the reference solutions in their place."""

from collections.abc import Sequence
from dataclasses import replace

from paint_engine.config.schema import Config
from paint_engine.data.problem_sets import Request, batch_requests, step_requests
from paint_engine.distributed import gather_objects, merge_shares
from paint_engine.prompts.anchors import overlap
from paint_engine.prompts.chat import encode_teacher_prompt
from paint_engine.prompts.masking import mask_ratio, mask_solution
from paint_engine.prompts.rationale import encode_reason_prompt, read_rationale
from paint_engine.recipes.losses import group_advantages
from paint_engine.rollout.engine import sampling_params
from paint_engine.rollout.sampler import to_rollout
from paint_engine.seeds import request_rng, request_seed
from paint_engine.training.run import Run
from paint_engine.types import PrivilegedRollout, Rollout


def sample_step(run: Run, step: int) -> tuple[list[PrivilegedRollout], int]:
    """The step's rollouts, all ranks', in the batch's order; and how many steps old the student's
    weights were.

    step: from 0.
    """
    config, seed = run.config, run.config.train.seed
    if config.objective.name == "sft":
        requests = batch_requests(config, run.train_set, step)
        return [reference_rollout(run, request) for request in requests], 0
    sampled = run.sampler.take(step, config.train.num_steps)
    requests = step_requests(config, run.train_set, step, run.world)
    mine = [
        judge(run, to_rollout(run.tokenizer, request.problem, request.prompt_ids, completion))
        for request, completion in zip(requests, sampled.completions, strict=True)
    ]
    if config.uses_teacher:
        mine = [
            reveal(run, item, ("mask", seed, step, item.rollout.problem.problem_id, request.index))
            for item, request in zip(mine, requests, strict=True)
        ]
        if config.teacher.reason_first:
            mine = reason(run, mine, [("reason", seed, step, r.index) for r in requests])
    gathered = merge_shares(gather_objects(mine))
    run.reward.check_some_judged([item.check_error for item in gathered], f"step {step + 1}")
    if config.objective.name == "grpo":
        gathered = with_advantages(config, gathered)
    return gathered, step - sampled.weights_version


def reference_rollout(run: Run, request: Request) -> PrivilegedRollout:
    """The verified solution in a rollout's place, as the student would have written it: its tokens
    and the stop token, cut where a rollout would be."""
    problem, limit = request.problem, run.config.rollout.max_new_tokens
    stop = run.tokenizer.eos_token_id
    assert isinstance(stop, int), "a tokenizer without one is refused before training"
    ids = (*run.tokenizer.encode(problem.solution, add_special_tokens=False), stop)
    truncated = len(ids) > limit
    rollout = Rollout(problem, request.prompt_ids, ids[:limit], (), truncated, problem.solution)
    return PrivilegedRollout(rollout, False, None, 0.0, 0.0, "", request.prompt_ids)


def judge(run: Run, rollout: Rollout) -> PrivilegedRollout:
    """The rollout with its verdict, its reward and its overlap with the reference; a teacher would
    see what the student saw."""
    verdict = run.reward.judge(rollout.problem, rollout.text)
    return PrivilegedRollout(
        rollout,
        verdict.correct,
        verdict.error,
        overlap(rollout.text, rollout.problem.solution),
        0.0,
        "",
        rollout.prompt_ids,
        reward=verdict.reward,
    )


def reveal(run: Run, item: PrivilegedRollout, seed: Sequence[object]) -> PrivilegedRollout:
    """With what the teacher sees: more of the solution is hidden the more the rollout overlaps with
    it (Eq. 4 to 6).

    seed: of a placement that is drawn.
    """
    masking, problem = run.config.masking, item.rollout.problem
    rho = mask_ratio(item.overlap, masking.rho_wrong, masking.rho_correct)
    partial_solution = mask_solution(
        problem.solution,
        rho,
        placement=masking.placement,
        generator=request_rng(*seed),
        marker=masking.marker,
    )
    return _prompted(run, replace(item, mask_ratio=rho), partial_solution, None)


def _prompted(
    run: Run, item: PrivilegedRollout, partial_solution: str, rationale: str | None
) -> PrivilegedRollout:
    teacher_prompt_ids, shown = encode_teacher_prompt(
        run.tokenizer,
        item.rollout.problem,
        partial_solution,
        run.config.prompts,
        max_tokens=run.max_teacher_prompt,
        marker=run.config.masking.marker,
        rationale=rationale,
    )
    return replace(
        item,
        partial_solution=shown,
        shortened=item.shortened or shown != partial_solution,
        teacher_prompt_ids=teacher_prompt_ids,
        rationale=rationale or "",
    )


def reason(
    run: Run, items: Sequence[PrivilegedRollout], seeds: Sequence[Sequence[object]]
) -> list[PrivilegedRollout]:
    """With a rationale in the teacher's prompts, which the teacher writes from what it is shown of
    the solutions. A collective of all ranks."""
    config = run.config
    limit = config.teacher.reason_max_new_tokens
    params = replace(
        sampling_params(config.rollout, run.model, run.tokenizer), max_new_tokens=limit
    )
    prompts = [
        encode_reason_prompt(
            run.tokenizer,
            item.rollout.problem,
            item.partial_solution,
            config.prompts,
            # A thought that the limit cuts short would be taken for the rationale.
            thinking=False,
            max_tokens=run.max_context - limit,
            marker=config.masking.marker,
        )[0]
        for item in items
    ]
    # A live teacher is the student; the engines know any other as the base.
    completions = run.sampler.complete(
        prompts,
        [request_seed(*seed) for seed in seeds],
        params,
        base=config.teacher.weights != "live",
    )
    return [
        _prompted(
            run, item, item.partial_solution, read_rationale(run.tokenizer, completion.token_ids)
        )
        for item, completion in zip(items, completions, strict=True)
    ]


def with_advantages(config: Config, items: Sequence[PrivilegedRollout]) -> list[PrivilegedRollout]:
    """With each rollout's advantage over its group, the rollouts of one problem."""
    advantages = group_advantages(
        [item.reward for item in items],
        config.grpo.group_size,
        scale_by_std=config.grpo.scale_by_std,
    )
    return [
        replace(item, advantage=advantage)
        for item, advantage in zip(items, advantages, strict=True)
    ]


def groups(config: Config, items: Sequence[PrivilegedRollout]) -> list[Sequence[PrivilegedRollout]]:
    """GRPO's groups, in the batch's order."""
    size = config.grpo.group_size
    return [items[start : start + size] for start in range(0, len(items), size)]


def has_equal_rewards(group: Sequence[PrivilegedRollout]) -> bool:
    """Whether a group says nothing about which of its rollouts are better."""
    return len({item.reward for item in group}) == 1


def trained_rollouts(
    config: Config, items: Sequence[PrivilegedRollout]
) -> Sequence[PrivilegedRollout]:
    """Those that go through the models: all, or all whose group's rewards differ."""
    if config.objective.name == "grpo" and config.grpo.skip_zero_variance:
        kept = [group for group in groups(config, items) if not has_equal_rewards(group)]
        return [item for group in kept for item in group]
    return items


def rollout_metrics(config: Config, items: Sequence[PrivilegedRollout]) -> dict[str, float]:
    """Means over the step's rollouts of what the loss does not see."""
    count = len(items)

    def mean(values: list[float]) -> float:
        return sum(values) / count

    metrics = {
        "truncation_rate": mean([item.rollout.truncated for item in items]),
        "completion_length": mean([len(item.rollout.completion_ids) for item in items]),
    }
    if config.objective.name == "sft":
        return metrics
    metrics |= {
        "overlap": mean([item.overlap for item in items]),
        "accuracy": mean([item.correct for item in items]),
        "checker_errors": sum(item.check_error is not None for item in items),
    }
    if config.uses_teacher:
        metrics["mask_ratio"] = mean([item.mask_ratio for item in items])
        metrics["shortened_solutions"] = mean([item.shortened for item in items])
    if config.objective.name == "grpo":
        metrics["reward"] = mean([item.reward for item in items])
        metrics["zero_variance_groups"] = sum(map(has_equal_rewards, groups(config, items)))
    return metrics
