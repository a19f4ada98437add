"""The problems of a run with their prompts, checked against the model's context, and the requests
of each step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from transformers import PreTrainedTokenizerBase

from paint_engine.config.benchmarks import Benchmark
from paint_engine.config.external import scorers, teacher_models
from paint_engine.config.schema import Config
from paint_engine.config.sections import ColumnsSection, PromptsSection
from paint_engine.data.prompt_cache import PromptCache
from paint_engine.data.rows import Routes, load_problems
from paint_engine.distributed import World, my_share
from paint_engine.prompts.chat import encode_hidden_teacher_prompts, encode_student_prompts
from paint_engine.prompts.control import spelled_tokens
from paint_engine.prompts.rationale import encode_hidden_reason_prompts, encode_reason_prompt
from paint_engine.prompts.target import target_text
from paint_engine.recipes import recipe_of
from paint_engine.seeds import problem_order, rollout_seed
from paint_engine.types import Problem, Reader, Request


@dataclass(frozen=True)
class ProblemSet:
    """Problems and the student's prompt ids for each, in the same order.

    `num_skipped` is the number of rows that were skipped because they were bad or too long.
    `commit` is the data set's on the hub, if it is from there and the commit is known.
    """

    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    num_skipped: int
    commit: str | None = None


def _check_length(
    problem: Problem, num_tokens: int, context: int, completion: int, role: str, limit_key: str
) -> None:
    room = context - completion
    if room < 1:
        raise ValueError(
            f"--{limit_key}: got {completion}; needs less than the model's context of {context} "
            f"tokens, because the context also holds the prompt of {num_tokens} tokens; give "
            f"{max(context - num_tokens, 1)} or less"
        )
    if num_tokens > room:
        raise ValueError(
            f"{problem.problem_id}: the {role}'s prompt takes {num_tokens} tokens, but the model's "
            f"context leaves {room} beside a completion; lower --{limit_key}, or leave out this "
            "problem" + ("" if role == "evaluation" else " with --data.max_prompt_tokens")
        )


def _check_teacher_prompts(
    config: Config,
    problems: Sequence[Problem],
    readers: Sequence[Reader],
    say: Callable[[str], object],
) -> None:
    """Checks the problems' teacher prompts with the whole shown text hidden. A prompt that does not
    fit then never fits.

    readers: the teachers.
    """
    shows, marker = recipe_of(config).context, config.masking.marker
    prompts = config.prompts if shows is None else shows.prompts
    completion, key = config.rollout.max_new_tokens, "rollout.max_new_tokens"
    scored_by = {route: scorers(config, route) for route in {p.route for p in problems}}
    for place, reader in enumerate(readers):
        own = [problem for problem in problems if place in scored_by[problem.route]]
        shortest = PromptCache(reader.tokenizer, say).get(
            partial(encode_hidden_teacher_prompts, reader.tokenizer, own, prompts, marker=marker),
            *(own, prompts),
            kind="teacher, all hidden",
            marker=marker,
        )
        for problem, teacher in zip(own, shortest, strict=True):
            _check_length(problem, len(teacher), reader.max_context, completion, "teacher", key)
    if config.teacher.reason_first:
        # The student's model writes them.
        tokenizer, context = readers[0].tokenizer, readers[0].max_context
        requests = PromptCache(tokenizer, say).get(
            partial(
                encode_hidden_reason_prompts,
                *(tokenizer, problems, prompts),
                thinking=False,
                marker=marker,
            ),
            *(problems, prompts),
            kind="reason, all hidden",
            marker=marker,
        )
        rationale, key = config.teacher.reason_max_new_tokens, "teacher.reason_max_new_tokens"
        for problem, request in zip(problems, requests, strict=True):
            _check_length(problem, len(request), context, rationale, "reasoning teacher", key)


def _student_prompts(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: PromptsSection,
    say: Callable[[str], object],
    *,
    thinking: bool,
) -> list[tuple[int, ...]]:
    return PromptCache(tokenizer, say).get(
        partial(encode_student_prompts, tokenizer, problems, prompts, thinking=thinking),
        *(problems, prompts),
        kind="student",
        thinking=thinking,
    )


def _routes(config: Config) -> Routes | None:
    column = config.teacher.route_column
    if column is None:
        return None
    return Routes(column, tuple(model.name for model in teacher_models(config)))


def spelled_note(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    of_texts: Callable[[Problem], Sequence[str]] = lambda problem: (),
) -> list[str]:
    """Returns a note if problems spell control tokens.

    of_texts: the control tokens that a problem's other texts spell which are encoded too.
    """
    found = []
    for problem in problems:
        if spelled := [*spelled_tokens(tokenizer, problem.problem), *of_texts(problem)]:
            found.append((problem.problem_id, spelled[0]))
    if not found:
        return []
    (place, token), count = found[0], len(found)
    return [
        f"{path}: {count} of {len(problems)} rows spell control tokens of the tokenizer, the first "
        f"{place} with {token!r}; they are encoded as ordinary text"
    ]


def _notes(
    config: Config, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> list[str]:
    """Returns notes on what is unusual in the training problems, each once with a count."""
    path, recipe = config.data.path, recipe_of(config)
    targets = {}
    if not recipe.samples:
        targets = {p: target_text(tokenizer, p.solution, config.prompts) for p in problems}

    def of_texts(problem: Problem) -> list[str]:
        if problem in targets:
            return targets[problem].data.spelled
        texts = () if recipe.context is None else recipe.context.texts_of(problem)
        return [token for text in texts for token in spelled_tokens(tokenizer, text)]

    notes = spelled_note(path, tokenizer, problems, of_texts)
    num_unanswered = sum(not problem.answer for problem in problems)
    if num_unanswered:
        notes.append(
            f"{path}: {num_unanswered} of {len(problems)} rows have no answer; they are trained "
            "on, and accuracy leaves them out"
        )
    thoughts = [target.thought for target in targets.values()]
    if dropped := thoughts.count("dropped"):
        notes.append(
            f"{path}: {dropped} of {len(problems)} solutions begin with a thought, which the "
            "prompt closes; what follows it is trained on alone; --prompts.student_thinking true "
            "trains on the thoughts"
        )
    if unclosed := thoughts.count("unclosed"):
        notes.append(
            f"{path}: the prompt opens a thought, which {unclosed} of {len(problems)} solutions do "
            "not close: they are trained on as thoughts without an answer"
        )
    return notes


def load_train_set(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    say: Callable[[str], object],
    teachers: Sequence[Reader] = (),
) -> ProblemSet:
    """Loads the training problems and the student's prompts.

    teachers: those that are other models than the student's, or on a server.

    `say` gets a line on what was left out. Raises ValueError if a prompt leaves no room for a
    completion in the model's context; the teacher's prompt is checked without the solution.
    """
    data, prompts, recipe = config.data, config.prompts, recipe_of(config)
    loaded = load_problems(
        data.path,
        revision=data.revision,
        split=data.split,
        columns=data.columns,
        on_bad_row=data.on_bad_row,
        max_rows=data.max_rows,
        needs_solution=recipe.needs_solution,
        needs_answer=recipe.needs_answer,
        routes=_routes(config),
    )
    limits = context, config.rollout.max_new_tokens
    students = _student_prompts(
        tokenizer, loaded.problems, prompts, say, thinking=prompts.student_thinking
    )
    kept: list[Problem] = []
    kept_prompts: list[tuple[int, ...]] = []
    for problem, student in zip(loaded.problems, students, strict=True):
        if data.max_prompt_tokens is not None and len(student) > data.max_prompt_tokens:
            continue
        _check_length(problem, len(student), *limits, "student", "rollout.max_new_tokens")
        kept.append(problem)
        kept_prompts.append(student)
    if not kept:
        raise ValueError(
            f"{data.path}: all {len(loaded.problems)} problems have prompts longer than "
            f"data.max_prompt_tokens = {data.max_prompt_tokens}; raise it"
        )
    if recipe.context is not None:
        recipe.context.check_problems(kept)
    if recipe.uses_teacher:
        _check_teacher_prompts(config, kept, teachers or (Reader(tokenizer, context),), say)
    num_long = len(loaded.problems) - len(kept)
    if loaded.num_skipped or num_long:
        long = f" and {num_long} with more than {data.max_prompt_tokens} prompt tokens"
        say(
            f"{data.path}: kept {len(kept)} problems, skipped {loaded.num_skipped} bad rows"
            + (long if num_long else "")
        )
    for note in _notes(config, tokenizer, kept):
        say(f"note: {note}")
    num_skipped = loaded.num_skipped + num_long
    return ProblemSet(tuple(kept), tuple(kept_prompts), num_skipped, loaded.commit)


def held_out_notes(config: Config) -> list[str]:
    """Returns notes on a choice of benchmarks that is rarely meant."""
    section, path = config.eval, config.data.path
    if not section.enabled:
        return []
    found, places = [], [source.path for source in section.sources]
    if section.benchmarks and (section.path != "tiny" or section.revision is not None):
        found.append(
            f"eval.benchmarks takes the place of eval.path {section.path}, which is not evaluated"
        )
    if places == ["tiny"] and path != "tiny":
        found.append(
            f"training on {path}, evaluating on the bundled word problems; name held-out problems "
            "of your own with --eval.path, or switch that off with --eval.enabled false"
        )
    if path in places and path != "tiny":
        found.append(
            f"{path} is both trained on and evaluated on; name held-out problems with --eval.path"
        )
    return found


def load_eval_sets(
    config: Config, tokenizer: PreTrainedTokenizerBase, context: int, say: Callable[[str], object]
) -> dict[str, ProblemSet]:
    """Loads the held-out problems and their evaluation prompts, by benchmark. Returns none if
    evaluation is off.

    `say` gets a line on what was left out. Raises ValueError if a prompt leaves no room for an
    answer in the model's context.
    """
    if not config.eval.enabled:
        return {}
    return {
        source.name: _load_eval_set(config, source, tokenizer, context, say)
        for source in config.eval.sources
    }


def _load_eval_set(
    config: Config,
    source: Benchmark,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    say: Callable[[str], object],
) -> ProblemSet:
    section = config.eval
    # The columns are those of the user's data; the bundled benchmark has its own.
    bundled = source.path == "tiny" and bool(section.benchmarks)
    loaded = load_problems(
        source.path,
        revision=source.revision,
        split=source.split,
        columns=ColumnsSection() if bundled else section.columns,
        on_bad_row=config.data.on_bad_row,
        max_rows=section.num_problems,
        section="eval",
    )
    if loaded.num_skipped:
        say(f"{source.path}: skipped {loaded.num_skipped} bad rows")
    for note in spelled_note(source.path, tokenizer, loaded.problems):
        say(f"note: {note}")
    encoded = _student_prompts(
        tokenizer, loaded.problems, config.eval_prompts, say, thinking=section.thinking
    )
    limits = context, section.longest_completion
    is_final = section.longest_completion > section.max_new_tokens
    key = "eval.final_max_new_tokens" if is_final else "eval.max_new_tokens"
    for problem, ids in zip(loaded.problems, encoded, strict=True):
        _check_length(problem, len(ids), *limits, "evaluation", key)
    return ProblemSet(loaded.problems, tuple(encoded), loaded.num_skipped, loaded.commit)


def longest_sequence(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    eval_sets: Mapping[str, ProblemSet],
) -> int:
    """Returns the length in tokens of the longest prompt plus completion over all sampled
    sequences: rollouts, the teacher's rationales, and evaluations."""
    sizes = [max(map(len, train_set.prompts)) + config.rollout.max_new_tokens]
    shows = recipe_of(config).context
    if config.teacher.reason_first and shows is not None:
        # The texts with the most characters may not have the most tokens, so a margin of a quarter
        # is added. A problem may be shown with another one's text.
        problems = train_set.problems
        longest = max(problems, key=lambda p: len(p.problem))
        texts = ((shows.placeholder(p, problems), *shows.texts_of(p)) for p in problems)
        text = max(chain.from_iterable(texts), key=len)
        prompt, _ = encode_reason_prompt(
            tokenizer,
            longest,
            text,
            shows.prompts,
            text=text,
            thinking=False,
            max_tokens=None,
            marker=config.masking.marker,
        )
        num_tokens = (len(prompt) + shows.num_added_tokens) * 5 // 4
        sizes.append(num_tokens + config.teacher.reason_max_new_tokens)
    return max([*sizes, longest_answer(config, eval_sets)])


def longest_answer(config: Config, eval_sets: Mapping[str, ProblemSet]) -> int:
    """Returns the length in tokens of the longest prompt plus answer of the evaluations; 0 without
    any."""
    prompts = [len(prompt) for held_out in eval_sets.values() for prompt in held_out.prompts]
    return max(prompts) + config.eval.longest_completion if prompts else 0


def batch_requests(config: Config, train_set: ProblemSet, step: int) -> list[Request]:
    """Returns the requests of one step, for all ranks. The rollouts of one problem are
    consecutive."""
    seed = config.train.seed
    repeats = recipe_of(config).group_size
    count = config.train.batch_size // repeats
    places = batch_indices(len(train_set.problems), count, seed, step)
    requests = []
    for index in range(config.train.batch_size):
        place = places[index // repeats]
        problem = train_set.problems[place]
        request = rollout_seed(seed, step, problem.problem_id, index)
        requests.append(Request(index, problem, train_set.prompts[place], request))
    return requests


def step_requests(config: Config, train_set: ProblemSet, step: int, world: World) -> list[Request]:
    """Returns this rank's requests of one step."""
    return my_share(batch_requests(config, train_set, step), world)


def batch_indices(num_problems: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Returns the indices of the problems of one step on all ranks. Steps count from 0.

    Steps run through one epoch after another, and no problem repeats within an epoch. The batch in
    which an epoch ends continues with the next one, so it may contain a problem twice.
    """
    assert num_problems > 0, "an epoch without problems never ends"
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // num_problems for position in positions}
    orders = {epoch: problem_order(num_problems, seed, epoch) for epoch in epochs}
    return [orders[p // num_problems][p % num_problems] for p in positions]
