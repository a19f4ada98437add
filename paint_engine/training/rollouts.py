"""Samples the rollouts of one step, judges them and lets the recipe prepare them.

A recipe that does not sample gets the reference solutions instead."""

from collections.abc import Sequence
from dataclasses import replace

from paint_engine.contexts import ContextFailed
from paint_engine.data import batch_requests
from paint_engine.distributed import gather_objects, merge_shares, my_share, together
from paint_engine.prompts.anchors import overlap
from paint_engine.prompts.target import encode_target
from paint_engine.prompts.template import BadTemplate
from paint_engine.recipes import Recipe, StepContext
from paint_engine.rollout import to_rollout
from paint_engine.scoring import Scorer
from paint_engine.training.run import Run
from paint_engine.types import Request, Rollout, TrainExample


def sample_step(run: Run, step: int) -> tuple[list[TrainExample], int]:
    """Returns the examples of all ranks in the order of the batch, and the lag: how many steps old
    the weights were that sampled them.

    step: counts from 0.

    Raises EngineDied, RewardFailed, and on every rank BadTemplate, and ContextFailed, also for a
    rollout without a view that the teacher needs.
    """
    config = run.config
    if not run.recipe.samples:
        requests = batch_requests(config, run.train_set, step)
        return [reference_example(run, request) for request in requests], 0
    sampled = run.sampler.take(step, config.train.num_steps)
    judged = [
        judge(run, to_rollout(run.tokenizer, request.problem, request.prompt_ids, completion))
        for request, completion in zip(sampled.requests, sampled.completions, strict=True)
    ]
    # A teacher may be shown what rollouts of other ranks are.
    batch = merge_shares(gather_objects(judged))
    errors = [example.verdict.error for example in batch if example.verdict is not None]
    run.reward.check_some_judged(errors, f"step {step + 1}")
    context = step_context(run, step, sampled.requests, batch)
    # A template or a context may fail for what this step has, and then on one rank alone.
    kinds = (BadTemplate, ContextFailed)
    prepared = together(lambda: run.recipe.prepare(context, judged), kinds)
    # A second time: each rank renders the prompts of its own rollouts alone, and the micro-batches
    # are planned by the lengths of all.
    gathered = merge_shares(gather_objects(list(prepared)))
    batch = list(run.recipe.prepare_batch(gathered))
    check_views(run.recipe, batch)
    if run.scorer is not None:
        batch = add_scores(run, run.scorer, batch)
    return batch, step - sampled.weights_version


def check_views(recipe: Recipe, batch: Sequence[TrainExample]) -> None:
    """Raises ContextFailed if a recipe of the user's own has made no teacher view of a rollout that
    it trains. The batch is that of all ranks, so that they all raise."""
    may_lack = recipe.context is not None and recipe.context.is_optional
    if may_lack or (recipe.second_pass != "teacher" and recipe.served_top_k is None):
        return
    lacking = [e.rollout.problem for e in recipe.trained(batch) if e.teacher_view is None]
    if lacking:
        config = recipe.config
        raise ContextFailed(
            f"objective.name: {config.objective.name}: prepare made no teacher view of a rollout "
            f"of {lacking[0].problem_id}; the teacher needs one of each rollout that is trained "
            f"(teacher.context {config.teacher.context!r}); add it in prepare, leave the rollout "
            "out in trained, or use a context with is_optional = True"
        )


def add_scores(run: Run, scorer: Scorer, batch: Sequence[TrainExample]) -> list[TrainExample]:
    """Returns the batch with the scores of the teacher's server for the rollouts that the recipe
    trains. The server is not asked for the others. The ranks share the requests. A collective
    call; raises TeacherDied on every rank."""
    trained = {id(example) for example in run.recipe.trained(batch)}
    places = [place for place, example in enumerate(batch) if id(example) in trained]
    scored = scorer.add_scores([batch[place] for place in my_share(places, run.world)])
    by_place = dict(zip(places, merge_shares(gather_objects(scored)), strict=True))
    return [by_place.get(place, example) for place, example in enumerate(batch)]


def step_context(
    run: Run, step: int, requests: Sequence[Request], batch: Sequence[TrainExample]
) -> StepContext:
    """Builds what the recipe may use to prepare this rank's rollouts.

    batch: the judged rollouts of all ranks.
    """

    def complete(
        prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, max_new_tokens: int, base: bool
    ) -> list[tuple[int, ...]]:
        params = replace(run.sampler.params, max_new_tokens=max_new_tokens)
        completions = run.sampler.complete(prompts, seeds, params, base=base)
        return [completion.token_ids for completion in completions]

    return StepContext(
        step=step,
        requests=requests,
        tokenizer=run.tokenizer,
        max_context=run.teacher_context,
        complete=complete,
        batch=batch,
        group_size=run.recipe.group_size,
        problems=run.train_set.problems,
        teachers=run.readers,
    )


def reference_example(run: Run, request: Request) -> TrainExample:
    """Returns the reference solution as an example: its tokens and the one that ends a turn,
    truncated at the limit for rollouts."""
    problem, limit = request.problem, run.config.rollout.max_new_tokens
    ids = encode_target(run.tokenizer, problem.solution, run.config.prompts)
    truncated = len(ids) > limit
    rollout = Rollout(problem, request.prompt_ids, ids[:limit], (), truncated, problem.solution)
    return TrainExample(rollout)


def judge(run: Run, rollout: Rollout) -> TrainExample:
    """Adds the verdict and the overlap with the reference solution to a rollout. Without a
    reference answer there is no verdict."""
    has_answer = rollout.problem.answer != ""
    verdict = run.reward.judge(rollout.problem, rollout.text) if has_answer else None
    return TrainExample(rollout, verdict, overlap(rollout.text, rollout.problem.solution))
