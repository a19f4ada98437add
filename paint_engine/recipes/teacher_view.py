"""The teacher view of a rollout: the partial solution, and the rationale of a teacher that reasons
first."""

from collections.abc import Sequence
from dataclasses import replace

from paint_engine.config.schema import Config
from paint_engine.prompts.chat import encode_teacher_prompt
from paint_engine.prompts.masking import mask_ratio, mask_solution
from paint_engine.prompts.rationale import encode_reason_prompt, read_rationale
from paint_engine.recipes.base import StepContext
from paint_engine.seeds import mask_generator, rationale_seed
from paint_engine.types import Problem, Request, TeacherView, TrainExample


def add_teacher_view(
    config: Config, context: StepContext, example: TrainExample, request: Request
) -> TrainExample:
    """Adds the teacher view to an example. The more the rollout overlaps with the solution, the
    more of the solution is hidden (Eq. 4 to 6)."""
    masking, problem = config.masking, example.rollout.problem
    assert example.overlap is not None
    rho = mask_ratio(example.overlap, masking.rho_wrong, masking.rho_correct)
    partial_solution = mask_solution(
        problem.solution,
        rho,
        placement=masking.placement,
        generator=mask_generator(
            config.train.seed, context.step, problem.problem_id, request.index
        ),
        marker=masking.marker,
    )
    view = _view(config, context, problem, partial_solution, rho)
    return replace(example, teacher_view=view)


def add_rationales(
    config: Config, context: StepContext, examples: Sequence[TrainExample]
) -> list[TrainExample]:
    """Adds a rationale to the teacher's prompts. The teacher writes it from what it sees of the
    solution. A collective call."""
    limit, prompts = config.teacher.reason_max_new_tokens, []
    for example in examples:
        assert example.teacher_view is not None
        prompt, _ = encode_reason_prompt(
            context.tokenizer,
            example.rollout.problem,
            example.teacher_view.partial_solution,
            config.prompts,
            # A thought that the limit truncates would be taken for the rationale.
            thinking=False,
            max_tokens=context.max_context - limit,
            marker=config.masking.marker,
        )
        prompts.append(prompt)
    seeds = [rationale_seed(config.train.seed, context.step, r.index) for r in context.requests]
    # A live teacher is the student. The engines treat any other teacher as the base.
    base = config.teacher.weights != "live"
    completions = context.complete(prompts, seeds, max_new_tokens=limit, base=base)
    return [
        _with_rationale(config, context, example, read_rationale(context.tokenizer, token_ids))
        for example, token_ids in zip(examples, completions, strict=True)
    ]


def _with_rationale(
    config: Config, context: StepContext, example: TrainExample, rationale: str
) -> TrainExample:
    before = example.teacher_view
    assert before is not None
    view = _view(
        config,
        context,
        example.rollout.problem,
        before.partial_solution,
        before.mask_ratio,
        rationale,
    )
    shortened = before.shortened or view.shortened
    return replace(example, teacher_view=replace(view, shortened=shortened))


def _view(
    config: Config,
    context: StepContext,
    problem: Problem,
    partial_solution: str,
    ratio: float,
    rationale: str = "",
) -> TeacherView:
    """Builds the teacher view. The prompt is shortened if it does not fit beside the longest
    completion.

    ratio: the fraction of the solution that the mask hides.
    """
    prompt_ids, shown = encode_teacher_prompt(
        context.tokenizer,
        problem,
        partial_solution,
        config.prompts,
        max_tokens=context.max_context - config.rollout.max_new_tokens,
        marker=config.masking.marker,
        rationale=rationale,
    )
    return TeacherView(
        prompt_ids=prompt_ids,
        partial_solution=shown,
        mask_ratio=ratio,
        shortened=shown != partial_solution,
        rationale=rationale,
    )
