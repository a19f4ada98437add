"""The recipe and the reward of `examples/` together, with each kind of teacher, on the bundled
model: the teacher is the one that was asked for."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_server import ScoringServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.custom_reward import reward
from paint_engine.config.bundled import TINY_BASE
from paint_engine.files import read_jsonl, read_tables
from paint_engine.tiny.problems import load_split
from paint_engine.types import Problem

Main = Callable[[Sequence[str]], int]
NUM_STEPS, BATCH_SIZE = 2, 8
TOP_K = 64
# What rows are routed by, in the order of the mixture's and the routes' models.
DOMAINS = ("sums", "stories")
KINDS = ("fixed", "live", "ema", "refreshed", "external", "mixed", "routed", "served")


def teacher_section(kind: str, other: Path, url: str) -> dict[str, Any]:
    """What is set of [teacher]. other: another model than the base."""
    both = {"weights": "external", "models": ["tiny", str(other)]}
    return {
        "fixed": {},
        "live": {"weights": "live"},
        "ema": {"weights": "ema", "ema_decay": 0.5},
        "refreshed": {"refresh_every": 1},
        "external": {"weights": "external", "model": str(other)},
        "mixed": both | {"model_weights": [1, 3]},
        "routed": both | {"route_column": "domain", "model_names": list(DOMAINS)},
        "served": {"url": url, "served_top_k": TOP_K},
    }[kind]


@dataclass(frozen=True)
class Trained:
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    teacher: dict[str, Any]

    def first(self) -> dict[int, list[float]]:
        """The token losses of the first step's rollouts."""
        return {s["place"]: s["token_loss"] for s in self.samples if s["step"] == 1}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with noise on its weights."""
    directory = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        parameter.data += 0.2 * parameter.data.std() * noise
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def server(other: Path) -> Iterator[ScoringServer]:
    stand_in = ScoringServer(other)
    stand_in.start()
    yield stand_in
    stand_in.kill()


@pytest.fixture(scope="module")
def runs(
    other: Path,
    server: ScoringServer,
    tmp_path_factory: pytest.TempPathFactory,
    run_main: Main,
) -> dict[str, Trained]:
    root = tmp_path_factory.mktemp("runs")
    rows = [
        {"problem": p.problem, "solution": p.solution, "answer": p.answer, "domain": DOMAINS[i % 2]}
        for i, p in enumerate(load_split("train", 24))
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "objective.name": "examples.custom_recipe:EarlyTokens",
        "reward.function": "examples.custom_reward:reward",
        # So that the reward matters: about half of the rollouts are cut or wrong.
        "objective.on": "wrong",
        # As a server's log-probabilities are.
        "objective.temperature": 1.0,
        "data.path": root / "rows.jsonl",
        "train.num_steps": NUM_STEPS,
        "train.batch_size": BATCH_SIZE,
        "train.device": "cpu",
        "rollout.max_new_tokens": 100,
        "optim.learning_rate": 1e-3,
        "eval.enabled": "false",
        "run.samples_per_step": BATCH_SIZE,
        "checkpoint.every": 0,
    }
    found = {}
    for kind in KINDS:
        asked = teacher_section(kind, other, server.url)
        flags = settings | {"run.dir": root / kind}
        flags |= {
            f"teacher.{key}": json.dumps(value) if isinstance(value, list) else value
            for key, value in asked.items()
        }
        argv = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
        assert run_main(["--preset", "paint-tiny", *argv]) == 0, kind
        found[kind] = Trained(
            read_jsonl(root / kind / "metrics.jsonl"),
            read_jsonl(root / kind / "samples.jsonl"),
            read_tables(root / kind / "config.toml")["teacher"],
        )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_on_what_the_reward_calls_wrong(
    kind: str, runs: dict[str, Trained], other: Path, server: ScoringServer
) -> None:
    run = runs[kind]
    assert [step["step"] for step in run.metrics] == [1, 2]
    for step in run.metrics:
        assert step["grad_norm"] > 0 and step["token_kl"] > 0
        taught = sum(sample["step"] == step["step"] for sample in run.samples)
        assert step["taught_share"] == taught / BATCH_SIZE
        assert step["accuracy"] == 1 - step["taught_share"]
    assert any(0 < step["taught_share"] < 1 for step in run.metrics)
    for sample in run.samples:
        problem = Problem(*(sample[k] for k in ("problem_id", "problem", "solution", "answer")))
        text = "".join(sample["tokens"]).removesuffix("<|im_end|>")
        assert not reward(problem, text).correct and not sample["correct"]
    # The run directory says whose teacher it was.
    asked = teacher_section(kind, other, server.url)
    assert {key: run.teacher[key] for key in asked} == asked
    assert (run.teacher.get("served_model") == str(other)) == (kind == "served")


def test_the_student_s_own_weights_are_those_of_the_right_step(runs: dict[str, Trained]) -> None:
    fixed, live, ema, refreshed = (
        [step["loss"] for step in runs[kind].metrics]
        for kind in ("fixed", "live", "ema", "refreshed")
    )
    # The base, as which all of them start.
    assert fixed[0] == pytest.approx(live[0]) == pytest.approx(ema[0])
    assert fixed[0] == pytest.approx(refreshed[0])
    # After the first step they differ, but for the one that is the student after each.
    for one, two in ((fixed[1], live[1]), (fixed[1], ema[1]), (live[1], ema[1])):
        assert one != pytest.approx(two, rel=1e-3)
    assert refreshed[1] == pytest.approx(live[1])


def test_other_models_are_themselves_mixed_and_routed(runs: dict[str, Trained]) -> None:
    """On the same rollouts, those of the first step."""
    base, own = runs["fixed"].first(), runs["external"].first()
    mixed, routed = runs["mixed"].first(), runs["routed"].first()
    assert base.keys() == own.keys() == mixed.keys() == routed.keys() and len(base) > 1
    chosen = set()
    for sample in runs["routed"].samples[: len(routed)]:
        place = sample["place"]
        assert own[place] != pytest.approx(base[place], rel=0.1)
        weighed = [0.25 * b + 0.75 * o for b, o in zip(base[place], own[place], strict=True)]
        assert mixed[place] == pytest.approx(weighed, rel=1e-3, abs=1e-5)
        domain = (int(sample["problem_id"].rpartition(":")[2]) - 1) % 2
        assert routed[place] == pytest.approx((base, own)[domain][place], rel=1e-3, abs=1e-5)
        chosen.add(domain)
    assert chosen == {0, 1}


def test_the_server_was_asked_and_gives_nearly_the_loss_of_its_model(
    runs: dict[str, Trained], server: ScoringServer
) -> None:
    served, own = runs["served"].metrics[0], runs["external"].metrics[0]
    # Each rollout that is trained once, and the trial at the start.
    num_trained = len(runs["served"].samples)
    assert 0 < num_trained < NUM_STEPS * BATCH_SIZE
    assert len(server.asked) == num_trained + 1
    assert {request["prompt_logprobs"] for request in server.asked[1:]} == {TOP_K}
    # Nearly the divergence over the whole vocabulary, and below it.
    assert 0.98 * own["token_kl"] < served["token_kl"] < own["token_kl"]
    assert served["token_kl"] != pytest.approx(runs["fixed"].metrics[0]["token_kl"], rel=0.1)
