"""The teacher view of a rollout: what its context shows, the mask over it, and the rationale of a
teacher that reasons first."""

from collections.abc import Sequence
from dataclasses import replace

from paint_engine.config.external import scorers
from paint_engine.contexts import Context, shown_by
from paint_engine.prompts.anchors import overlap
from paint_engine.prompts.chat import encode_teacher_prompt
from paint_engine.prompts.masking import mask_ratio, mask_solution
from paint_engine.prompts.rationale import encode_reason_prompt, read_rationale
from paint_engine.recipes.base import StepContext
from paint_engine.seeds import mask_generator, rationale_seed
from paint_engine.types import Problem, Reader, Request, TeacherView, TrainExample


def add_teacher_view(
    shows: Context, context: StepContext, example: TrainExample, request: Request
) -> TrainExample:
    """Adds the teacher view to an example, and the overlap that decided how much is hidden. Without
    anything to show, there is no view.

    The more the rollout overlaps with a text that is masked, the more of it is hidden (Eq. 4 to 6).
    """
    shown, problem = shown_by(shows, example, request, context), example.rollout.problem
    if shown is None or not shows.is_masked:
        example = replace(example, overlap=None)
    if shown is None:
        return example
    view = TeacherView(
        (), shown.text, 0.0, context=shows.name, source=shown.source, text=shown.text
    )
    if shows.is_masked:
        alpha = example.overlap
        if alpha is None or shown.text != problem.solution:
            alpha = overlap(example.rollout.text, shown.text)
        example = replace(example, overlap=alpha)
        view = _masked(shows, context, request, view, alpha)
    return replace(example, teacher_view=_with_prompt(shows, context, problem, view))


def add_rationales(
    shows: Context, context: StepContext, examples: Sequence[TrainExample]
) -> list[TrainExample]:
    """Adds a rationale to the teacher's prompts. The teacher writes it from what it is shown; where
    it is shown nothing, there is none. A collective call."""
    config, prompts, seeds = shows.config, [], []
    limit = config.teacher.reason_max_new_tokens
    for example, request in zip(examples, context.requests, strict=True):
        view = example.teacher_view
        if view is None:
            continue
        prompt, _ = encode_reason_prompt(
            context.tokenizer,
            example.rollout.problem,
            view.shown,
            shows.prompts,
            text=view.text,
            # A thought that the limit truncates would be taken for the rationale.
            thinking=False,
            max_tokens=context.max_context - limit,
            marker=config.masking.marker,
        )
        prompts.append(prompt)
        seeds.append(rationale_seed(config.train.seed, context.step, request.index))
    # A live teacher is the student. The engines treat any other teacher as the base.
    base = config.teacher.weights != "live"
    completions = iter(context.complete(prompts, seeds, max_new_tokens=limit, base=base))
    return [
        _with_rationale(
            shows, context, example, read_rationale(context.tokenizer, next(completions))
        )
        if example.teacher_view is not None
        else example
        for example in examples
    ]


def _masked(
    shows: Context, context: StepContext, request: Request, view: TeacherView, alpha: float
) -> TeacherView:
    """Hides the part of the text that the overlap `alpha` asks for."""
    config = shows.config
    masking, problem = config.masking, request.problem
    rho = mask_ratio(alpha, masking.rho_wrong, masking.rho_correct)
    shown = mask_solution(
        view.text,
        rho,
        placement=masking.placement,
        generator=mask_generator(
            config.train.seed, context.step, problem.problem_id, request.index
        ),
        marker=masking.marker,
    )
    return replace(view, shown=shown, mask_ratio=rho)


def _with_rationale(
    shows: Context, context: StepContext, example: TrainExample, rationale: str
) -> TrainExample:
    assert example.teacher_view is not None
    view = replace(example.teacher_view, rationale=rationale)
    return replace(
        example, teacher_view=_with_prompt(shows, context, example.rollout.problem, view)
    )


def _with_prompt(
    shows: Context, context: StepContext, problem: Problem, view: TeacherView
) -> TeacherView:
    """Adds the prompts to the teacher view. That of each teacher is shortened if it does not fit
    beside the longest completion; `shown` is what the first of them has."""
    config = shows.config
    readers = context.teachers or (Reader(context.tokenizer, context.max_context),)
    places = scorers(config, problem.route)
    encoded = [
        encode_teacher_prompt(
            readers[place].tokenizer,
            problem,
            view.shown,
            shows.prompts,
            text=view.text,
            max_tokens=readers[place].max_context - config.rollout.max_new_tokens,
            marker=config.masking.marker,
            rationale=view.rationale,
        )
        for place in places
    ]
    (prompt_ids, shown), *others = encoded
    return replace(
        view,
        prompt_ids=prompt_ids,
        shown=shown,
        shortened=view.shortened or any(text != view.shown for _, text in encoded),
        scorers=places,
        other_prompt_ids=tuple(ids for ids, _ in others),
    )
