"""Runs with external, mixed, routed and refreshed teachers: a step by hand, two ranks, resuming."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contents import assert_same
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from paint_engine.config.command_line import load_config
from paint_engine.distributed import World
from paint_engine.files import read_jsonl
from paint_engine.model.forward import causal_lm
from paint_engine.report.samples import choose_samples
from paint_engine.training import step as step_module
from paint_engine.training.build import build_run, plan_run
from paint_engine.training.rollouts import sample_step
from paint_engine.training.run import Run
from paint_engine.training.step import train_step
from paint_engine.types import TrainExample

Main = Callable[[Sequence[str]], int]
RunRanks = Callable[[int, Sequence[Sequence[object]]], None]
WORLD = World(0, 1, 0, torch.device("cpu"))
NUM_STEPS = 4
DOMAINS = ("sums", "kites")
TIMING = ("seconds", "tokens_per_s", "rollout_logprob_diff")
PLAIN = ("--objective.pointwise_clip", "none", "--objective.interpolation_weight", "0")


# Every second completion is said to be right; the others get feedback.
JUDGED = ("--reward.function", "own_functions:judge")
# Of one of the first step's two problems none is right, so its group has no siblings.
GROUPS = ("--reward.function", "own_functions:judge_some", "--train.seed", "1")


def flags_of(teachers: Sequence[Path]) -> dict[str, list[str]]:
    """The flags of each kind of run, by its name."""
    models = ["--teacher.models", json.dumps([str(path) for path in teachers])]
    external = ["--teacher.weights", "external"]
    routed = ["--teacher.route_column", "domain", "--teacher.model_names", json.dumps(DOMAINS)]
    refreshed = ["--teacher.refresh_every", "2"]
    both = ["--objective.name", "grpo_paint", "--grpo.group_size", "5"]
    weighed = ["--objective.token_weights", "position"]
    sibling = ["--teacher.context", "sibling", *JUDGED]
    feedback = ["--teacher.context", "feedback", *JUDGED]
    return {
        "external": [*external, "--teacher.model", str(teachers[0])],
        "external, all weights": [
            *(*external, "--teacher.model", str(teachers[0]), "--lora.enabled", "false")
        ],
        "mixed": [*external, *models, "--teacher.model_weights", "[1, 3]"],
        "routed": [*external, *models, *routed],
        "routed, sampled token": [*external, *models, *routed, "--objective.name", "sampled_token"],
        # Of one problem at each step, so that the other teacher is idle on both ranks.
        "routed, with rewards": [*external, *models, *routed, *both, *weighed],
        "external, sibling": [
            *(*external, "--teacher.model", str(teachers[0])),
            *("--teacher.context", "sibling", "--teacher.group_size", "5", *GROUPS),
            *("--train.batch_size", "10"),
        ],
        "mixed, feedback": [*external, *models, "--teacher.model_weights", "[1, 3]", *feedback],
        # Each has a policy gradient, and some have a divergence: to the one teacher or the other.
        "routed, sibling, with rewards": [*external, *models, *routed, *sibling, *both],
        "routed, feedback, with rewards": [*external, *models, *routed, *feedback, *both],
        "refreshed": refreshed,
        "refreshed, all weights": [*refreshed, "--lora.enabled", "false"],
    }


# What two ranks train; a mixture has all that one teacher has.
NAMES = tuple(name for name in flags_of((Path("a"), Path("b"))) if name != "external")


@pytest.fixture(scope="module")
def settings(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory, write_rows: Callable[..., Path]
) -> list[str]:
    path = write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # Of seven rows, so that a rank has no rollout for one of the teachers in some micro-batch.
    lines = [json.dumps(row | {"domain": DOMAINS[i % 3 == 0]}) for i, row in enumerate(rows)]
    path.write_text("".join(f"{line}\n" for line in lines))
    values = {
        "model.name_or_path": model_dir,
        "data.path": path,
        "eval.enabled": "false",
        "train.num_steps": NUM_STEPS,
        "train.batch_size": 5,
        "train.max_tokens_per_microbatch": 300,
        "train.device": "cpu",
        "rollout.max_new_tokens": 12,
        "lora.rank": 4,
        "lora.alpha": 8,
        "optim.learning_rate": 1e-3,
        "checkpoint.every": 0,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def commands(settings: list[str], teacher_dirs: tuple[Path, Path]) -> dict[str, list[str]]:
    return {name: [*settings, *flags] for name, flags in flags_of(teacher_dirs).items()}


def built(argv: Sequence[str], directory: Path) -> Run:
    return build_run(load_config([*argv, "--run.dir", str(directory)]), WORLD)


# ---- a step by hand ------------------------------------------------------------------------------


def divergences(run: Run, items: Sequence[TrainExample], teachers: Sequence[Path]) -> list[Tensor]:
    """Of each rollout, KL(teacher, student) of its tokens by each teacher that scores it, from
    models and prompts of their own, in float64."""
    found = []
    models = [AutoModelForCausalLM.from_pretrained(path).double() for path in teachers]
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in teachers]
    size, temperature = len(run.tokenizer), run.config.objective.temperature

    def log_p(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :size]
        return (rows.double() / temperature).log_softmax(-1)

    for item in items:
        view, rollout = item.teacher_view, item.rollout
        assert view is not None
        own = log_p(causal_lm(run.model), rollout.prompt_ids, rollout.completion_ids)
        rows = []
        for place, prompt in view.prompts.items():
            text = tokenizers[place].decode(prompt)
            # Its own template wrote it, with what the mask has left.
            assert ("<|im_start|>user: " in text) == (place == 1)
            assert view.shown in text
            target = log_p(models[place], prompt, rollout.completion_ids)
            rows.append((target.exp() * (target - own)).sum(-1))
        found.append(torch.stack(rows))
    return found


HAND = ["external", "mixed", "routed", "external, sibling", "mixed, feedback"]


@pytest.mark.parametrize("name", HAND)
def test_the_loss_of_a_step_is_that_of_float64_by_hand(
    name: str,
    commands: dict[str, list[str]],
    teacher_dirs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = built([*commands[name], *PLAIN], tmp_path / "run")
    items = sample_step(run, 0)[0]
    monkeypatch.setattr(step_module, "sample_step", lambda run, step: (items, 0))
    shown = [item for item in items if item.teacher_view is not None]
    scorers = [item.teacher_view.scorers for item in shown]
    if name == "routed":
        domains = [DOMAINS.index(item.rollout.problem.route) for item in items]
        assert scorers == [(domain,) for domain in domains] and set(domains) == {0, 1}
    else:
        assert scorers == [(0, 1) if "mixed" in name else (0,)] * len(shown)
    weights = torch.tensor([0.25, 0.75] if "mixed" in name else [1.0], dtype=torch.float64)
    by_hand = [(weights[:, None] * rows).sum(0) for rows in divergences(run, shown, teacher_dirs)]
    metrics, samples = train_step(run, 0)
    # A rollout that is shown nothing is in the denominator.
    assert run.recipe.context is not None and len(shown) > 0
    assert (len(shown) < len(items)) == run.recipe.context.is_optional
    loss = torch.stack([tokens.mean() for tokens in by_hand]).sum().item() / len(items)
    assert loss > 0.1
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["token_kl"] == pytest.approx(torch.cat(by_hand).mean().item(), rel=1e-4)
    assert samples[0]["token_kl"] == pytest.approx(by_hand[0].tolist(), rel=1e-3)


def test_the_base_as_an_external_teacher_is_the_fixed_teacher(
    settings: list[str], model_dir: Path, tmp_path: Path, run_main: Main
) -> None:
    external = ["--teacher.weights", "external", "--teacher.model", str(model_dir)]
    for name, flags in (("fixed", []), ("external", external)):
        assert run_main([*settings, *flags, "--run.dir", str(tmp_path / name)]) == 0
    fixed, own = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("fixed", "external"))
    for step, other in zip(fixed, own, strict=True):
        for key, value in step.items():
            if not key.startswith(TIMING):
                assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-9), key
    report = (tmp_path / "external" / "report.html").read_text()
    assert f"teacher <b>{model_dir}" in report or str(model_dir) in report


def test_the_refreshed_teacher_is_the_student_of_step_two(
    commands: dict[str, list[str]], tmp_path: Path
) -> None:
    run = built(commands["refreshed"], tmp_path / "run")
    students = []
    for step in range(3):
        train_step(run, step)
        students.append([parameter.detach().clone() for parameter in run.parameters])
    assert all(map(torch.equal, run.teacher.kept, students[1]))
    assert not all(map(torch.equal, students[1], students[2]))


# ---- two ranks, and resuming ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    commands: dict[str, list[str]],
    tmp_path_factory: pytest.TempPathFactory,
    run_ranks: RunRanks,
    run_main: Main,
) -> tuple[Path, Path]:
    """The directories of the runs of one process and of two, a run by its name."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for name in NAMES:
        assert run_main([*commands[name], "--run.dir", str(one / name)]) == 0
    run_ranks(2, [[*commands[name], "--run.dir", two / name] for name in NAMES])
    return one, two


def weights_of(run: Path) -> dict[str, Tensor]:
    (file,) = (run / "checkpoints" / f"step-{NUM_STEPS}").glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_as_one_process_does(name: str, runs: tuple[Path, Path]) -> None:
    one, two = (directory / name for directory in runs)
    expected, actual = (read_jsonl(run / "metrics.jsonl") for run in (one, two))
    assert len(expected) == len(actual) == NUM_STEPS
    for step, other in zip(expected, actual, strict=True):
        assert other.keys() == step.keys()
        for key, value in step.items():
            if not key.startswith(TIMING):
                assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    weights, others = weights_of(one), weights_of(two)
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        assert torch.allclose(others[key], tensor, rtol=0, atol=1e-5), key
    assert len({step["loss"] for step in expected}) == NUM_STEPS


@pytest.mark.parametrize(
    "name",
    [
        "external, all weights",
        "mixed",
        "routed",
        "external, sibling",
        "mixed, feedback",
        "routed, feedback, with rewards",
        "refreshed",
        "refreshed, all weights",
    ],
)
def test_three_steps_and_one_more_are_four(
    name: str,
    commands: dict[str, list[str]],
    runs: tuple[Path, Path],
    tmp_path: Path,
    run_main: Main,
) -> None:
    # Cut between two refreshes.
    argv = [*commands[name], "--train.num_steps", "3", "--run.dir", str(tmp_path)]
    assert run_main(argv) == 0
    # A run directory cannot allow modules of a user's own.
    reward = [place for place, flag in enumerate(argv) if flag == "--reward.function"]
    own = [part for place in reward for part in argv[place : place + 2]]
    resumed = ["--resume", str(tmp_path), "--train.num_steps", str(NUM_STEPS), *own]
    assert run_main(resumed) == 0
    expected = assert_same(tmp_path, runs[0] / name, NUM_STEPS)
    kept = [key for key in expected if ":refreshed/" in key]
    assert bool(kept) == ("refreshed" in name)


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["routed", "mixed", "refreshed"])
def test_the_samples_and_the_report_say_which_teacher_scored_a_rollout(
    name: str,
    runs: tuple[Path, Path],
    settings: list[str],
    teacher_dirs: tuple[Path, Path],
) -> None:
    rows = read_jsonl(Path(settings[settings.index("--data.path") + 1]))
    domains = {f"train.jsonl:{line}": row["domain"] for line, row in enumerate(rows, start=1)}
    names = [str(path) for path in teacher_dirs]
    for directory in (run / name for run in runs):
        samples = read_jsonl(directory / "samples.jsonl")
        if name == "routed":
            expected = [[domains[sample["problem_id"]]] for sample in samples]
            assert {domain for (domain,) in expected} == set(DOMAINS)
        else:
            expected = [names if name == "mixed" else None] * len(samples)
        assert [sample.get("scored_by") for sample in samples] == expected
        page = (directory / "report.html").read_text()
        chosen = [sample.get("scored_by") for sample in choose_samples(samples)]
        shown = re.findall(r"Scored by the teachers? ([^<]*)\.</p>", page)
        assert shown == [", ".join(who) for who in chosen if who]


# ---- before a run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Four of the seven rows name the first teacher.
    ("name", "scored"),
    [("mixed", ("5", "5")), ("routed", ("2.86", "2.14"))],
)
def test_a_dry_run_shows_the_teachers_and_their_prompts(
    name: str,
    scored: tuple[str, str],
    commands: dict[str, list[str]],
    teacher_dirs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    said: list[str] = []
    plan_run(load_config([*commands[name], "--run.dir", str(tmp_path / "run")]), said.append)
    text = "\n".join(said)
    names = DOMAINS if name == "routed" else tuple(map(str, teacher_dirs))
    for path, own, number in zip(teacher_dirs, names, scored, strict=True):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
        assert (
            f"# teacher {own}: {size:,} parameters, frozen; it scores {number} of a step's 5"
            in text
        )
    shown = [own for own in names if f"# teacher {own}'s prompt of the same problem" in text]
    assert len(shown) == (2 if name == "mixed" else 1)
    assert "teachers' weights" in text
    assert not (tmp_path / "run").exists()


def test_a_teacher_s_prompt_must_fit_its_own_context(
    commands: dict[str, list[str]], tmp_path: Path
) -> None:
    """The second teacher has 512 tokens, the student 1024."""
    argv = [*commands["mixed"], "--rollout.max_new_tokens", "490"]
    with pytest.raises(ValueError, match=r"the teacher's prompt takes \d+ tokens, but the model's"):
        built(argv, tmp_path / "run")


def test_a_row_that_names_no_teacher_is_refused(
    commands: dict[str, list[str]], tmp_path: Path
) -> None:
    names = ["--teacher.model_names", '["sums", "boats"]']
    with pytest.raises(
        ValueError,
        match=r"train.jsonl:1: no teacher: the column 'domain' holds 'kites'; needs one of sums, "
        "boats; correct",
    ):
        built([*commands["routed"], *names], tmp_path / "run")
