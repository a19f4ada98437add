"""Evaluations during training: an interrupted one is resumed, and no sample is drawn twice."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from exit_codes import exit_code
from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine import evaluate
from paint_engine.checkpoint import save
from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.distributed import World
from paint_engine.evaluation import store
from paint_engine.evaluation.accuracy import avg_at_k, best_step, correct_matrix, pass_at_k
from paint_engine.evaluation.compare import check_pairs, read_run
from paint_engine.evaluation.store import (
    EvalSample,
    Evaluation,
    Header,
    SampleFiles,
    evaluation_settings,
    read_evaluation,
    read_evaluations,
)
from paint_engine.files import read_jsonl
from paint_engine.model import meta_model
from paint_engine.monitor import is_evaluation
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.training import build
from paint_engine.training import evaluations as run_eval
from paint_engine.training import summary as summary_module
from paint_engine.training.parts.sets import load_sets
from paint_engine.training.summary import (
    evaluation_metrics,
    evaluation_row,
    paired_difference,
)

Main = Callable[[Sequence[str]], int]
NUM_SAMPLES = 6  # 3 problems, 2 samples of each


class Killed(BaseException):
    """In the place of SIGKILL, which a test of the evaluations' own command line sends for real."""


def killing(patch: pytest.MonkeyPatch, after: int) -> None:
    """Ends the process right after so many samples were written."""
    original, written = SampleFiles.append, []

    def append(self: SampleFiles, group: Sequence[EvalSample]) -> None:
        original(self, group)
        written.extend(group)
        if len(written) >= after:
            raise Killed

    patch.setattr(SampleFiles, "append", append)


def asked(patch: pytest.MonkeyPatch) -> list[int]:
    """The number of answers that each evaluation draws, from now on."""
    original, found = run_eval.evaluate, []

    def evaluate(*arguments: Any, **options: Any) -> list[EvalSample]:
        found.append(len(arguments[4]))
        return original(*arguments, **options)

    patch.setattr(run_eval, "evaluate", evaluate)
    return found


@pytest.fixture
def arguments(command: list[str]) -> list[str]:
    return [
        *command,
        "--eval.every",
        "2",
        "--eval.max_sequences",
        "2",
        "--rollout.engine",
        "builtin",
    ]


def evaluations(run_dir: Path) -> dict[int, list[EvalSample]]:
    """The samples of a run that is evaluated on one benchmark."""
    found = read_evaluations(run_dir)
    return {step: one.samples for step, of_step in found.items() for one in of_step.values()}


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that are of evaluations, between the steps."""
    lines = read_jsonl(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    return [line for line in lines if is_evaluation(line)]


@pytest.mark.parametrize("after", [2, 10, 14])
def test_a_killed_evaluation_resumes_where_it_was(
    after: int, arguments: list[str], run_main: Main, tmp_path: Path
) -> None:
    """In that of the base, of step 2 or of step 4."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_main([*arguments, "--run.dir", str(whole)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, after)
        with pytest.raises(Killed):
            run_main([*arguments, "--run.dir", str(cut)])
    step = 2 * (after // NUM_SAMPLES)
    partial = cut / "evaluations" / f"step-{step}.rank-0.jsonl"
    assert len(read_jsonl(partial)) == 1 + after % NUM_SAMPLES
    with pytest.MonkeyPatch.context() as patch:
        drawn = asked(patch)
        again = ["--resume", str(cut)]
        if step == 0:
            # Before the first checkpoint there is nothing to resume.
            again = [*arguments, "--run.dir", str(cut), "--run.auto_resume", "true"]
        assert run_main(again) == 0
    assert sum(drawn) == 3 * NUM_SAMPLES - after
    assert evaluations(cut) == evaluations(whole)
    assert logged(cut) == logged(whole)
    for name in ("step-0.jsonl", "step-2.jsonl", "step-4.jsonl"):
        assert (cut / "evaluations" / name).read_bytes() == (
            whole / "evaluations" / name
        ).read_bytes()
    assert not list(cut.glob("evaluations/*.rank-*"))


@pytest.mark.parametrize(
    ("module", "name"), [(run_eval, "mark_best"), (run_eval, "prune"), (save, "prune")]
)
def test_a_kill_before_the_mark_or_the_pruning_changes_nothing(
    module: Any, name: str, arguments: list[str], run_main: Main, tmp_path: Path
) -> None:
    """At the last step, after which no later evaluation or checkpoint comes."""
    arguments = [*arguments, "--checkpoint.keep", "1", "--checkpoint.every", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    original = getattr(module, name)

    def ends(run_dir: Path, *rest: Any) -> None:
        if rest[0] in (4, run_dir / "checkpoints" / "step-4"):
            raise Killed
        original(run_dir, *rest)

    with pytest.MonkeyPatch.context() as patch:
        # Every evaluation is the best so far.
        patch.setattr(run_eval, "best_step", max)
        assert run_main([*arguments, "--run.dir", str(whole)]) == 0
        with pytest.MonkeyPatch.context() as kill, pytest.raises(Killed):
            kill.setattr(module, name, ends)
            run_main([*arguments, "--run.dir", str(cut)])
        assert run_main(["--resume", str(cut)]) == 0
    left = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (whole, cut)]
    assert left == [["best", "step-4"]] * 2
    assert (cut / "checkpoints" / "best").readlink() == Path("step-4")


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_kill_before_the_ranks_files_are_deleted_leaves_none(
    step: int, arguments: list[str], run_main: Main, tmp_path: Path
) -> None:
    original = store.remove_shares

    def ends(directory: Path, name: str) -> None:
        if name == f"step-{step}":
            raise Killed
        original(directory, name)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store, "remove_shares", ends)
        run_main(arguments)
    run = tmp_path / "run"
    assert [path.name for path in run.glob("evaluations/*.rank-*")] == [f"step-{step}.rank-0.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        drawn = asked(patch)
        # Before the first checkpoint there is nothing to resume.
        again = [*arguments, "--run.auto_resume", "true"] if step == 0 else ["--resume", str(run)]
        assert run_main(again) == 0
    assert drawn == [NUM_SAMPLES] * (2 - step // 2)
    assert not list(run.glob("evaluations/*.rank-*"))


def test_with_other_settings_it_starts_afresh(
    arguments: list[str], run_main: Main, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, 10)
        with pytest.raises(Killed):
            run_main(arguments)
    with pytest.MonkeyPatch.context() as patch:
        drawn = asked(patch)
        assert run_main(["--resume", str(run), "--eval.temperature", "0.7"]) == 0
    # The base's too, whose finished evaluation was with the old temperature.
    assert drawn == [NUM_SAMPLES] * 3
    assert {e["test"].settings["temperature"] for e in read_evaluations(run).values()} == {0.7}


def test_other_weights_after_as_many_steps_are_not_mixed_in(
    arguments: list[str], run_main: Main, tmp_path: Path
) -> None:
    """As where the checkpoint was damaged, and the steps before it were done again."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, 10)
        with pytest.raises(Killed):
            run_main(arguments)
    partial = run / "evaluations" / "step-2.rank-0.jsonl"
    first, *samples = partial.read_text().splitlines()
    header = json.loads(first)
    assert len(header["header"]["subject"]["weights"]) == 32
    header["header"]["subject"]["weights"] = "0" * 32
    partial.write_text("\n".join([json.dumps(header), *samples]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        drawn = asked(patch)
        assert run_main(["--resume", str(run)]) == 0
    assert drawn == [NUM_SAMPLES] * 2


def test_the_summary_has_the_best_and_the_last(
    arguments: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(arguments) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    correct = {step: correct_matrix(samples) for step, samples in evaluations(run).items()}
    rows = {row["step"]: row for row in summary["evaluations"]}
    for step, matrix in correct.items():
        assert rows[step]["avg_at_k"] == avg_at_k(matrix)
        assert rows[step]["pass_at_k"] == {"1": pass_at_k(matrix, 1), "2": pass_at_k(matrix, 2)}
    assert summary["last"] == rows[4]
    assert summary["best"] == max((rows[2], rows[4]), key=lambda r: (r["avg_at_k"], r["step"]))
    assert summary["best_step"] == summary["best"]["step"]
    for line, row in zip(logged(run), summary["evaluations"], strict=True):
        assert (line.pop("step"), line.pop("eval_avg_at_k")) == (row["step"], row["avg_at_k"])
        for k, share in row["pass_at_k"].items():
            assert line.pop(f"eval_pass_at_{k}") == share
        # The limit is 6 tokens.
        for budget in ("1", "3", "6"):
            assert line.pop(f"eval_accuracy_within_{budget}") == row["accuracy_within"][budget]
        lengths = ("mean_length", "mean_correct_length", "median_correct_length")
        for name in (*lengths, "tokens_per_correct", "truncation_rate"):
            assert line.pop(f"eval_{name}", None) == row[name]
        assert not line
    printed = capsys.readouterr().out
    assert f"step {summary['best']['step']})" in printed and "last:" in printed


def test_a_run_on_several_benchmarks_stores_each_and_sums_up_their_means(
    arguments: list[str],
    run_main: Main,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The path's evaluations are kept where it becomes one of several."""
    run, other = tmp_path / "run", write_rows(tmp_path / "other.jsonl", 2, shape="aime")
    assert run_main([*arguments, "--train.num_steps", "2"]) == 0
    names = f"{tmp_path / 'test.jsonl'},more={other}"
    with pytest.MonkeyPatch.context() as patch:
        drawn = asked(patch)
        again = ["--resume", str(run), "--train.num_steps", "4", "--eval.benchmarks", names]
        assert run_main(again) == 0
    printed = capsys.readouterr().out
    assert f"eval.benchmarks takes the place of eval.path {tmp_path / 'test.jsonl'}" in printed
    # Of steps 0 and 2 the second benchmark alone; step 2 comes again as the newest checkpoint.
    assert drawn == [4, 4, 6, 4]
    found = read_evaluations(run)
    assert list(found) == [0, 2, 4]
    assert all(sorted(one) == ["more", "test"] for one in found.values())
    assert sorted(path.name for path in (run / "evaluations").glob("*.json")) == [
        *("step-0-more.json", "step-0.json", "step-2-more.json", "step-2.json"),
        *("step-4-more.json", "step-4-test.json"),
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_problems"] == 3 + 2
    for row in summary["evaluations"]:
        averages = {
            name: avg_at_k(correct_matrix(one.samples)) for name, one in found[row["step"]].items()
        }
        assert {name: one["avg_at_k"] for name, one in row["benchmarks"].items()} == averages
        assert row["avg_at_k"] == sum(averages.values()) / 2
    assert summary["avg_at_k_after"] == summary["evaluations"][-1]["avg_at_k"]
    # The base, and step 2 once of one benchmark and once of both; steps never decrease.
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if is_evaluation(line)]
    assert [line["step"] for line in lines] == [0, 2, 2, 4]
    assert ["eval_more_avg_at_k" in line for line in lines] == [False, False, True, True]
    assert lines[2:] == [evaluation_metrics(step, found[step]) for step in (2, 4)]
    # Each value is shown apart, and their means.
    page = (run / "report.html").read_text()
    assert page.count("<td>more</td>") == page.count("<td>macro</td>") == 3
    # Back to one benchmark, nothing is sampled again.
    with pytest.MonkeyPatch.context() as patch:
        drawn = asked(patch)
        assert run_main(["--resume", str(run), "--eval.benchmarks", "[]"]) == 0
    assert drawn == []


def _check_metrics_by_hand(both: dict[str, float], none: dict[str, float]) -> None:
    """both: of the benchmarks with correct answers; none: "b" has no correct one."""
    assert both["step"] == 4
    averages = {name: both[f"eval_{name}avg_at_k"] for name in ("", "a_", "b_")}
    assert averages == {"": (3 / 4 + 1 / 2) / 2, "a_": 3 / 4, "b_": 1 / 2}
    assert (both["eval_a_accuracy_within_8"], both["eval_b_accuracy_within_8"]) == (3 / 4, 1 / 2)
    assert both["eval_a_pass_at_2"] == both["eval_pass_at_2"] == 1.0
    assert (both["eval_a_mean_length"], both["eval_b_mean_length"]) == (5, 3)
    # The same names of each benchmark as of the mean, and no others.
    of_mean = {name for name in both if not name.startswith(("eval_a_", "eval_b_", "step"))}
    assert both.keys() - of_mean == {"step"} | {
        name.replace("eval_", f"eval_{benchmark}_", 1)
        for name in of_mean
        for benchmark in ("a", "b")
    }
    # No mean where one benchmark has no value.
    assert none["eval_a_mean_correct_length"] == 8
    assert not none.keys() & {"eval_mean_correct_length", "eval_b_mean_correct_length"}
    assert none["eval_b_avg_at_k"] == 0.0


def test_means_over_benchmarks_by_hand() -> None:
    """Two problems and one; two answers each; the limit is 8 tokens."""

    def of(name: str, *correct: bool) -> Evaluation:
        samples = [
            EvalSample(f"{name}:{i // 2}", i % 2, "", 2 * (i + 1), None, right, False, None)
            for i, right in enumerate(correct)
        ]
        problems = dict.fromkeys((sample.problem_id for sample in samples), "0")
        settings = {"max_new_tokens": 8, "num_samples": 2}
        return Evaluation(Header(name, settings, {}, problems, 4), 1.0, samples)

    first = {"a": of("a", True, True, False, True), "b": of("b", False, True)}
    row = evaluation_row(4, first)
    assert (row["step"], row["avg_at_k"]) == (4, (3 / 4 + 1 / 2) / 2)
    assert row["pass_at_k"] == {"1": (3 / 4 + 1 / 2) / 2, "2": 1.0}
    # Lengths 2, 4, 6, 8 and 2, 4: correct within 4 tokens are half of each.
    assert row["accuracy_within"]["4"] == 1 / 2
    assert (row["mean_length"], row["truncation_rate"]) == ((5 + 3) / 2, 0.0)
    assert row["mean_correct_length"] == pytest.approx(((2 + 4 + 8) / 3 + 4) / 2)
    none = {"a": of("a", False, False, False, True), "b": of("b", False, False)}
    assert evaluation_row(0, none)["mean_correct_length"] is None
    _check_metrics_by_hand(evaluation_metrics(4, first), evaluation_metrics(0, none))
    difference = paired_difference(none, first)
    assert difference.value == pytest.approx((2 / 4 + 1 / 2) / 2)
    # The mean of the benchmarks decides, though "a" alone is best at step 2.
    better = {"a": of("a", True, True, True, True), "b": of("b", False, False)}
    assert best_step({0: better, 2: better, 4: first}) == 4


FULL = ["--eval.final_num_samples", "3", "--eval.final_max_new_tokens", "8"]


def full(run_dir: Path) -> dict[int, Evaluation]:
    """The evaluations by the full protocol."""
    return {step: found["test"] for step, found in read_evaluations(run_dir, final=True).items()}


def test_the_full_protocol_is_of_the_base_the_last_and_the_best_and_stays_apart(
    arguments: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 2 is made the best. Its full evaluation is of its own weights: the command of
    evaluations gives the same answers for its checkpoint."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_eval, "best_step", lambda found: min(found.keys() - {0}, default=None))
        patch.setattr(summary_module, "best_step", lambda found: 2)
        assert run_main([*arguments, *FULL, "--checkpoint.keep", "5"]) == 0
    found = full(run)
    assert list(found) == [0, 2, 4] and list(read_evaluations(run)) == [0, 2, 4]
    for evaluation in found.values():
        assert evaluation.settings["num_samples"] == 3
        assert evaluation.settings["max_new_tokens"] == 8
        assert len(evaluation.samples) == 9
    short = read_evaluations(run)[2]["test"]
    assert short.settings["num_samples"] == 2 and short.settings["max_new_tokens"] == 6
    assert found[2].header.subject == short.header.subject != found[4].header.subject
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["num_samples"], summary["max_new_tokens"]) == (2, 6)
    final = summary["final"]
    assert (final["num_samples"], final["max_new_tokens"]) == (3, 8)
    for name, step in (("base", 0), ("best", 2), ("last", 4)):
        assert final[name]["step"] == step
        assert final[name]["avg_at_k"] == avg_at_k(correct_matrix(found[step].samples))
    # No line of a full evaluation.
    assert [line["step"] for line in logged(run)] == [0, 2, 4]
    printed = capsys.readouterr().out
    assert "during training, Avg@2 with at most 6 tokens:" in printed
    assert "after training, Avg@3 with at most 8 tokens, not comparable" in printed
    flags = ["--adapter", f"{run}:2", "--benchmarks", str(tmp_path / "test.jsonl")]
    flags += ["--num-samples", "3", "--max-new-tokens", "8", "--thinking", "false"]
    flags += ["--engine", "builtin", "--device", "cpu", "--max-sequences", "2"]
    assert exit_code(evaluate.main, *flags, "--output", tmp_path / "out") == 0
    assert read_evaluation(tmp_path / "out" / "test.json").samples == found[2].samples
    assert read_run(f"{run}:final-last") == {"test": found[4]}
    assert read_run(f"{run}:final-0") == {"test": found[0]}
    with pytest.raises(ValueError, match=r"no complete evaluation 'final-3'.* protocol.: 0, 2, 4"):
        read_run(f"{run}:final-3")
    with pytest.raises(ValueError, match=r"differ in max_new_tokens .6 and 8., num_samples"):
        check_pairs("a", "b", read_run(f"{run}:0"), read_run(f"{run}:final-last"))
    assert "Avg@3 with 8 tokens, after training" in (run / "report.html").read_text()


def test_a_killed_full_evaluation_resumes_where_it_was(
    arguments: list[str], run_main: Main, tmp_path: Path
) -> None:
    """After the three evaluations during training, within that of the last step."""
    run, arguments = tmp_path / "run", [*arguments, *FULL]
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, 3 * NUM_SAMPLES + 4)
        with pytest.raises(Killed):
            run_main(arguments)
    assert full(run) == {}
    with pytest.MonkeyPatch.context() as patch:
        drawn = asked(patch)
        assert run_main(["--resume", str(run)]) == 0
    best = json.loads((run / "summary.json").read_text())["best_step"]
    # The last step's rest, the base, and the best step unless it is the last one.
    assert drawn == [5, 9] + [9] * (best != 4)
    assert list(full(run)) == sorted({0, best, 4})


def test_the_full_protocol_needs_an_evaluation_at_the_end(
    arguments: list[str], run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main([*arguments, *FULL, "--eval.at_end", "false"]) == 2
    assert "eval.at_end: got false with eval.final_num_samples 3" in capsys.readouterr().out
    same = ["--eval.final_num_samples", "2", "--eval.final_max_new_tokens", "6"]
    assert run_main([*arguments, *same, "--eval.at_end", "false", "--print-config"]) == 0


def test_opsd_s_message_is_of_the_evaluations_alone(
    command: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    config = load_config([*command, "--eval.prompt", "opsd"]).config
    train_set, eval_sets, _ = load_sets(
        config, tokenizer, meta_model(config), (), None, lambda _: None
    )
    (held_out,) = eval_sets.values()
    texts = [tokenizer.decode(list(s.prompts[0])) for s in (train_set, held_out)]
    assert "Problem: Mia has" in texts[0]
    assert "Problem: " not in texts[1] and "Mia has 2 kites" in texts[1]
    settings = evaluation_settings(config.eval, 0, config.eval_prompts)
    assert settings["student_template"] == "{problem}\n\n{instruction}"


def test_an_engine_of_the_evaluations_own_is_open_while_they_last(
    arguments: list[str], run_main: Main, tmp_path: Path
) -> None:
    """It has the weights of the step, answers all of it, and is closed before the next step."""
    events: list[tuple[str, int]] = []

    class Own(BuiltinEngine):
        def sync(self, weights_version: int) -> None:
            events.append(("sync", weights_version))

        def close(self) -> None:
            events.append(("close", 0))

    def open_own(config: Config, model: nn.Module, world: World, *, max_model_len: int) -> Own:
        events.append(("open", max_model_len))
        return Own(model, lambda: nullcontext(model), config.eval.max_sequences)

    shared, own = tmp_path / "shared", tmp_path / "own"
    assert run_main([*arguments, "--run.dir", str(shared)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "evaluates_alone", lambda config: True)
        patch.setattr(build, "open_eval_engine", open_own)
        assert run_main([*arguments, "--run.dir", str(own)]) == 0
    assert evaluations(own) == evaluations(shared)
    assert logged(own) == logged(shared)
    lengths = {number for name, number in events if name == "open"}
    # The longest prompt, and an answer of 6 tokens.
    assert len(lengths) == 1 and min(lengths) > 6
    order = [(name, number) for name, number in events if name != "open"]
    assert order == [
        ("sync", 0),
        ("close", 0),
        ("sync", 2),
        ("close", 0),
        ("sync", 4),
        ("close", 0),
    ]


def test_an_engine_of_the_evaluations_own_that_does_not_start_leaves_a_run_that_resumes(
    arguments: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def refuse(config: Config, model: nn.Module, world: World, *, max_model_len: int) -> Any:
        calls.append(max_model_len)
        if len(calls) > 1:
            raise ValueError("vLLM did not start on rank 0; change --eval.gpu_memory_utilization")
        return BuiltinEngine(model, lambda: nullcontext(model), config.eval.max_sequences)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "evaluates_alone", lambda config: True)
        patch.setattr(build, "open_eval_engine", refuse)
        assert run_main([*arguments, "--run.dir", str(tmp_path / "run")]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "vLLM did not start on rank 0; change --eval.gpu_memory_utilization" in printed
    assert "saved" in printed and "--resume" in printed
    assert run_main(["--resume", str(tmp_path / "run")]) == 0
