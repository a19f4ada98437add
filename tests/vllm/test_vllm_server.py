"""A real vLLM server on loopback: rollouts from it, its death, and servers that do not fit."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.distributed import World
from paint_engine.rollout.engine import EngineDied, SamplingParams
from paint_engine.rollout.vllm_server import ServerEngine

Prompts = Sequence[tuple[int, ...]]


@pytest.fixture(scope="module")
def served(
    model_dir: Path, make_served: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    served = make_served(model_dir, tmp_path_factory.mktemp("server") / "log.txt")
    served.start()
    served.wait()
    yield served
    served.kill()


@pytest.fixture(scope="module")
def student(make_student: Callable[..., nn.Module]) -> nn.Module:
    return make_student()


@pytest.fixture
def engine(
    served: Any, student: nn.Module, model_dir: Path, world: World
) -> Iterator[ServerEngine]:
    engine = ServerEngine(
        [served.url], student, str(model_dir), world, max_sequences=8, restart_timeout_s=240
    )
    engine.sync(0)
    yield engine
    engine.close()


def test_token_ids_stops_and_lengths(
    engine: ServerEngine, prompts: Prompts, params: SamplingParams
) -> None:
    batches: list[int] = []
    completions = engine.generate(
        prompts, range(len(prompts)), params, on_batch=lambda indices, _: batches.extend(indices)
    )
    assert sorted(batches) == list(range(len(prompts)))
    assert {c.truncated for c in completions} == {True, False}
    for completion in completions:
        *body, last = completion.token_ids
        assert not set(params.stop_token_ids) & set(body)
        assert (last in params.stop_token_ids) == (not completion.truncated)
        assert len(completion.logprobs) == len(completion.token_ids)
        # Though the head prefers its padding rows.
        assert max(completion.token_ids) < params.vocab_size


def test_special_tokens_go_in_and_come_out_as_ids(
    engine: ServerEngine,
    student: nn.Module,
    params: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    mismatch: Callable[..., float],
) -> None:
    """And no stop token but ours ends an answer: not the tokenizer's, not those of the model's
    generation settings (7 and 8)."""
    special = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    prompt = (*special, *(tokenizer.encode(letter)[0] for letter in "apples"), special[0])
    endless = replace(params, stop_token_ids=())
    completions = engine.generate([prompt] * 160, range(160), endless)
    assert mismatch(student, [prompt] * 160, completions, endless) < 1e-4
    without = [prompt[2:-1]] * 160
    assert mismatch(student, without, completions, endless) > 0.01
    assert all(c.truncated for c in completions)
    assert {len(c.token_ids) for c in completions} == {params.max_new_tokens}
    inside = {token for c in completions for token in c.token_ids[:-1]}
    assert {7, 8, tokenizer.eos_token_id} & inside


def test_five_steps_each_sample_from_their_own_weights(
    engine: ServerEngine,
    student: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
    train_step: Callable[[nn.Module, int], None],
    left_in_shared_memory: Callable[[], list[str]],
) -> None:
    seeds = range(len(prompts))
    base = engine.generate(prompts, seeds, params, base=True)
    assert mismatch(student, prompts, base, params, base=True) < 1e-4
    for step in range(1, 6):
        train_step(student, step)
        engine.sync(step)
        completions = engine.generate(prompts, seeds, params)
        assert mismatch(student, prompts, completions, params) < 1e-4, step
        assert mismatch(student, prompts, completions, params, base=True) > 0.01, step
        (name,) = left_in_shared_memory()
        assert len(list(Path("/dev/shm", name).iterdir())) == 1
    # Only the newest adapter has a name on the server.
    models = engine._replicas[0]._server.request("GET", "/v1/models", timeout_s=10)
    assert models.count(b'"parent":"') == 1


def test_a_server_that_is_killed_and_started_again(
    engine: ServerEngine,
    served: Any,
    student: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
) -> None:
    seeds = range(len(prompts))
    before = engine.generate(prompts, seeds, params)
    killer = threading.Timer(0.3, served.kill)
    killer.start()
    many = 400
    with pytest.raises(EngineDied, match="is gone"):
        engine.generate([prompts[0]] * many, range(many), params)
    killer.join()
    served.start()
    engine.restart()
    after = engine.generate(prompts, seeds, params)
    assert [c.token_ids for c in after] == [c.token_ids for c in before]
    assert mismatch(student, prompts, after, params) < 1e-4


def test_a_server_that_has_forgotten_the_adapter(
    engine: ServerEngine, prompts: Prompts, params: SamplingParams
) -> None:
    """As one that was started again before anybody noticed."""
    assert engine._written is not None
    engine._replicas[0].unload()
    with pytest.raises(EngineDied, match="status 404"):
        engine.generate(prompts, range(len(prompts)), params)
    engine.restart()
    # Every rank restarts by itself: a second one finds the adapter loaded.
    engine.restart()
    assert len(engine.generate(prompts, range(len(prompts)), params)) == len(prompts)


def test_a_directory_that_the_server_does_not_see(
    served: Any, student: nn.Module, model_dir: Path, world: World, tmp_path: Path
) -> None:
    engine = ServerEngine(
        [served.url], student, str(model_dir), world, max_sequences=8, adapter_dir=str(tmp_path)
    )
    write = engine._files.write

    def elsewhere(version: int) -> Any:
        written = write(version)
        written.directory.rename(tmp_path / "moved")
        return written

    engine._files.write = elsewhere
    with pytest.raises(EngineDied, match=r"did not load the adapter in .*--rollout\.adapter_dir"):
        engine.sync(1)
    engine.close()


def test_refused_requests_and_other_models(
    engine: ServerEngine,
    served: Any,
    student: nn.Module,
    make_student: Callable[..., nn.Module],
    model_dir: Path,
    world: World,
    params: SamplingParams,
) -> None:
    with pytest.raises(EngineDied, match="status 400"):
        engine.generate([(1,) * 600], [0], params)
    with pytest.raises(ValueError, match="the student is /other/model; start it with"):
        ServerEngine([served.url], student, "/other/model", world, max_sequences=8)
    with pytest.raises(ValueError, match="trains all weights"):
        ServerEngine([served.url], make_student(lora=False), str(model_dir), world, max_sequences=8)


def test_no_server(student: nn.Module, model_dir: Path, world: World) -> None:
    with pytest.raises(ValueError, match=r"does not answer .* start it with: VLLM_ALLOW_"):
        ServerEngine(["http://127.0.0.1:9"], student, str(model_dir), world, max_sequences=8)
