"""Evaluations during training, and the checkpoint that evaluated best."""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from paint_engine.checkpoint.directory import mark_best, prune
from paint_engine.checkpoint.load import load_step
from paint_engine.distributed import any_rank, gather_objects, together
from paint_engine.evaluation.accuracy import best_step
from paint_engine.evaluation.answers import FAILURES, all_requests, check_answers, evaluate
from paint_engine.evaluation.base_cache import (
    base_cache_of,
    cache_header,
    copy_base,
    share_base,
)
from paint_engine.evaluation.store import (
    EvalSample,
    Evaluation,
    Header,
    SampleFiles,
    evaluation_directory,
    evaluation_name,
    evaluation_settings,
    fingerprints,
    remove_shares,
)
from paint_engine.evaluation.target import Target
from paint_engine.files import (
    ADAPTER_FILE,
    FILE_FAILURES,
    MANIFEST_FILE,
    MODEL_FILE,
    BadFile,
    LockLost,
    one_line,
    read_json,
)
from paint_engine.model import compute_dtype
from paint_engine.monitor import Progress
from paint_engine.rollout import EngineDied, RolloutEngine, sampling_params
from paint_engine.rollout.choose import engine_name
from paint_engine.training.interrupt import Stopped, StopRequest
from paint_engine.training.run import Run, save
from paint_engine.training.summary import (
    current_evaluations,
    evaluation_shortenings,
    present_evaluations,
)


def evaluate_at(run: Run, step: int, progress: Progress, stop: StopRequest) -> None:
    """Evaluates the weights after `step` steps on every benchmark: the current ones, or the base at
    step 0.

    A finished evaluation with the same settings is kept; an interrupted one resumes. The weights
    are saved first, so that both parts evaluate the same weights, and are marked as best if no
    earlier ones were better.
    """
    assert run.eval_sets and step in (0, run.step)
    checkpoint = save(run) if step > 0 else None
    missing = _missing(run, step, progress, final=False)
    if _lacks_base(run, step, missing, progress):
        return
    _evaluate_missing(run, missing, step, checkpoint, progress, stop, final=False)
    keep_best(run, step, checkpoint)
    if missing:
        together(lambda: run.world.is_main and note_shortening(run, step, progress), FILE_FAILURES)


def evaluate_finally(run: Run, progress: Progress, stop: StopRequest) -> None:
    """After the last step and its evaluation: evaluates the last step, the base if training began
    with its evaluation, and the step that evaluated best, by the full protocol of
    `eval.final_num_samples` and `eval.final_max_new_tokens`.

    What is finished is kept, and what was interrupted resumes. The run's weights, moments and
    teacher are those of the best step afterwards, with its newest checkpoint saved before.
    """
    last, best = run.step, gather_objects(_best_of(run))[0]
    checkpoint = save(run)
    missing = _missing(run, last, progress, final=True)
    _evaluate_missing(run, missing, last, checkpoint, progress, stop, final=True)
    missing = _missing(run, 0, progress, final=True) if run.config.eval.at_start else []
    if not _lacks_base(run, 0, missing, progress):
        _evaluate_missing(run, missing, 0, None, progress, stop, final=True)
    if best is None or best == last:
        return
    missing, checkpoint = (
        _missing(run, best, progress, final=True),
        checkpoint.with_name(f"step-{best}"),
    )
    if not missing:
        return
    if not gather_objects(checkpoint.is_dir())[0]:
        progress.note(
            f"step {best} evaluated best and is not evaluated by the full protocol: {checkpoint} "
            "is gone"
        )
        return
    load_step(checkpoint, run.model, run.optimizer, world=run.world, teacher=run.teacher)
    _evaluate_missing(run, missing, best, checkpoint, progress, stop, final=True)


def _evaluate_missing(
    run: Run,
    missing: Sequence[str],
    step: int,
    checkpoint: Path | None,
    progress: Progress,
    stop: StopRequest,
    *,
    final: bool,
) -> None:
    """Evaluates the weights on these benchmarks with one engine, whose start counts to the first of
    them."""
    if not missing:
        return
    started = time.monotonic()
    with _answering(run, step) as engine:
        for name in missing:
            _evaluate_on(run, name, step, checkpoint, engine, progress, stop, started, final=final)
            started = time.monotonic()


@contextmanager
def _answering(run: Run, step: int) -> Iterator[RolloutEngine]:
    """Yields the engine that answers, with the run's weights: the rollouts', or one of the
    evaluations' own, for which the rollouts' ends and the trainer gives back what memory it has
    cached. A collective call.

    step: that is evaluated; 0 = the base, which engines have beside the run's weights.
    """
    if run.open_eval_engine is None:
        if step > 0 or run.step == 0:
            run.sampler.sync(step)
        yield run.eval_engine
        return
    with run.sampler.paused():
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        try:
            opened = run.open_eval_engine()
        except ValueError as refusal:
            # As for any other engine that is gone: the run is saved, and can resume.
            raise EngineDied(str(refusal)) from refusal
        with closing(opened) as engine:
            run.sampler.sync(step, engine)
            yield engine


def _best_of(run: Run) -> int | None:
    """The step that evaluated best during training, on the main rank; None without one. A
    collective: raises BadFile and ReadFailed on every rank."""
    return together(
        lambda: best_step(present_evaluations(run)) if run.world.is_main else None, FILE_FAILURES
    )


def _missing(run: Run, step: int, progress: Progress, *, final: bool) -> list[str]:
    """Returns the benchmarks on which these weights are still to be evaluated; an evaluation of the
    base that another run has made is copied. A collective call."""
    present = gather_objects(list(_present(run, final=final).get(step, {})))[0]
    # A kill may have come between an evaluation's last file and these.
    together(
        lambda: run.world.is_main and _remove_shares(run, step, present, final=final), FILE_FAILURES
    )
    missing = [name for name in run.eval_sets if name not in present]
    if step == 0:
        missing = [name for name in missing if not _reuse_base(run, name, progress, final=final)]
    return missing


def _lacks_base(run: Run, step: int, missing: Sequence[str], progress: Progress) -> bool:
    """Whether the base is to be evaluated and the run does not have it any more, which is said."""
    if missing and step == 0 and run.step > 0 and not run.base.exists:
        progress.note(
            "step 0 is not evaluated: with lora.enabled false and teacher.url, teacher.weights "
            "external or teacher.refresh_every, a run keeps no copy of the base, which can be "
            "evaluated before the first step alone; evaluate it with "
            f"python -m paint_engine.evaluate --model {run.config.model.name_or_path}"
        )
        return True
    return False


def _remove_shares(run: Run, step: int, names: Iterable[str], *, final: bool) -> None:
    directory = evaluation_directory(run.run_dir)
    for name in names:
        remove_shares(directory, _files_of(run, step, name, final=final))


def _files_of(run: Run, step: int, name: str, *, final: bool) -> str:
    several, directory = bool(run.config.eval.benchmarks), evaluation_directory(run.run_dir)
    return evaluation_name(directory, step, name, several=several, final=final)


def _evaluate_on(
    run: Run,
    name: str,
    step: int,
    checkpoint: Path | None,
    engine: RolloutEngine,
    progress: Progress,
    stop: StopRequest,
    started: float,
    *,
    final: bool,
) -> None:
    """Evaluates the weights on one benchmark, and resumes an interrupted evaluation of them.

    checkpoint: that of the step; None for the base. started: since when its seconds count, by the
        monotonic clock. final: by the full protocol.
    """
    header, files_name = gather_objects(
        together(
            lambda: (
                (
                    evaluation_header(run, name, step, checkpoint, final=final),
                    _files_of(run, step, name, final=final),
                )
                if run.world.is_main
                else (None, "")
            ),
            FILE_FAILURES,
        )
    )[0]
    assert isinstance(header, Header)
    run.check_lock()
    directory = evaluation_directory(run.run_dir)
    with closing(
        SampleFiles(directory, files_name, header, run.world, replace=True, lock=run.lock)
    ) as files:
        problems = run.eval_sets[name].problems
        mine = files.share(all_requests(problems, run.eval_section(final=final).num_samples))
        failure: Exception | None = None

        def answer() -> bool:
            nonlocal failure
            try:
                requests = files.missing(mine)
                return answer_all(
                    *(run, name, step, files, requests, engine, progress, stop), final=final
                )
            except FAILURES as failed:
                failure = failed
                return True

        finished = run.sampler.guarded(answer, engine)
        check_answers(run.reward, files, failure)
        if any_rank(not finished):
            stop.check_together()
        assert finished
        evaluation = files.finish(time.monotonic() - started)
    if step == 0:
        together(lambda: run.world.is_main and _keep_base(run, evaluation, progress), FILE_FAILURES)


def _base_entry(run: Run, header: Header) -> tuple[Path, Header] | None:
    """Returns where the run's evaluation of the base is shared with other runs, and its header
    there; None where it is not shared: what a server samples with is not known here.

    header: of the run's own evaluation.

    Raises BadFile for files of the base that cannot be read any more.
    """
    config = run.config
    directory = base_cache_of(config.eval.base_cache, run.run_dir)
    if directory is None or engine_name(config) == "server":
        return None
    try:
        identity = Target(config.model).identity(engine_name(config), compute_dtype(run.model))
    except (ValueError, OSError) as error:
        raise BadFile(str(error)) from error
    entry = cache_header(replace(header, subject=identity))
    return None if entry is None else (directory, entry)


def _reuse_base(run: Run, name: str, progress: Progress, *, final: bool) -> bool:
    """Copies the evaluation of the base on a benchmark that another run or command has made, and
    says so. Returns False where there is none. A collective: raises BadFile, ReadFailed,
    WriteFailed and LockLost on every rank."""

    def reuse() -> bool:
        if not run.world.is_main:
            return False
        header = evaluation_header(run, name, 0, None, final=final)
        entry = _base_entry(run, header)
        if entry is None:
            return False
        directory = evaluation_directory(run.run_dir)
        files_name = _files_of(run, 0, name, final=final)
        copy = copy_base(*entry, directory, files_name, header, run.lock)
        if copy is None:
            return False
        progress.note(f"{one_line(name)}: the base's evaluation is reused, from {copy[0]}")
        return True

    return gather_objects(together(reuse, (LockLost, *FILE_FAILURES)))[0]


def _keep_base(run: Run, evaluation: Evaluation, progress: Progress) -> None:
    """Shares the run's evaluation of the base with later runs. The main rank calls it."""
    entry = _base_entry(run, evaluation.header)
    if entry is not None:
        share_base(*entry, evaluation, progress.note, "--eval.base_cache")


def evaluation_header(
    run: Run, name: str, step: int, checkpoint: Path | None, *, final: bool = False
) -> Header:
    """Returns the header of the evaluation on a benchmark after `step` steps.

    checkpoint: holds the evaluated weights; None for the base. final: by the full protocol.
    """
    weights = "base"
    if checkpoint is not None:
        manifest = read_json(checkpoint / MANIFEST_FILE, dict[str, list[int | str]])
        weights = manifest[ADAPTER_FILE if ADAPTER_FILE in manifest else MODEL_FILE][1]
    config, section = run.config, run.eval_section(final=final)
    return Header(
        name,
        evaluation_settings(section, run.eval_seed, config.eval_prompts, config.reward.function),
        {"weights": weights},
        fingerprints(run.eval_sets[name].problems),
        step,
    )


def answer_all(
    run: Run,
    name: str,
    step: int,
    files: SampleFiles,
    requests: list[tuple[int, int]],
    engine: RolloutEngine,
    progress: Progress,
    stop: StopRequest,
    *,
    final: bool = False,
) -> bool:
    """Samples the rest of this rank's share of an evaluation. Returns False if a signal stopped
    it."""
    section, held_out = run.eval_section(final=final), run.eval_sets[name]
    share = "" if run.world.size == 1 else f" (this of {run.world.size} ranks)"
    of = f"{name}: " if len(run.eval_sets) > 1 else ""
    full = ", the full protocol" if final else ""
    title = f"{of}Avg@{section.num_samples} after {step} steps{full}{share}"
    with progress.evaluation(title, len(requests)) as advance:
        record, num_left = files.recorder(advance), len(requests)

        def on_samples(group: list[EvalSample]) -> None:
            nonlocal num_left
            record(group)
            num_left -= len(group)
            if num_left:
                stop.check()

        with suppress(Stopped):
            evaluate(
                engine,
                run.tokenizer,
                held_out.problems,
                held_out.prompts,
                requests,
                sampling_params(section, run.model, run.tokenizer),
                run.reward,
                seed=run.eval_seed,
                base=step == 0 and run.step > 0,
                on_samples=on_samples,
            )
            return True
    return False


def keep_best(run: Run, step: int, checkpoint: Path | None) -> None:
    """Marks the checkpoint that was just evaluated as best if no earlier one was better, and
    deletes the one that was.

    checkpoint: that of the step; None for the base.
    """

    def mark() -> None:
        if run.lock is not None:
            run.lock.check()
        if checkpoint is not None and best_step(present_evaluations(run)) == step:
            mark_best(run.run_dir, step)
            prune(run.run_dir, checkpoint, run.config.checkpoint.keep)

    together(lambda: run.world.is_main and mark(), FILE_FAILURES)


def note_shortening(run: Run, step: int, progress: Progress) -> None:
    """Prints a note if the evaluation after `step` steps has answers that are a quarter shorter
    than the base's, and the one before it has not. The main rank calls it."""
    present = present_evaluations(run)
    found = {shortening.step: shortening for shortening in evaluation_shortenings(present)}
    before = max((other for other in present if other < step), default=None)
    if step in found and before not in found:
        progress.note(f"note: {found[step].note}")


def _present(run: Run, *, final: bool) -> dict[int, dict[str, Evaluation]]:
    """The complete evaluations by step and benchmark on the main rank, none on others. A
    collective: raises BadFile and ReadFailed on every rank."""
    return together(
        lambda: current_evaluations(run, final=final) if run.world.is_main else {}, FILE_FAILURES
    )
