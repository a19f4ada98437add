"""Several servers: equal shares, one that dies in the middle of a batch, one that returns, one in
its place with another model."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from paint_engine.distributed import World
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_server import ServerEngine

PARAMS = SamplingParams(1.0, 1.0, -1, 8, (2, 5), 340)

Start = Callable[..., Any]
Kill = Callable[[Any], None]


def engine_on(
    servers: list[Any], model: PeftModel, model_dir: Path, directory: Path, **options: Any
) -> ServerEngine:
    options = {"world": World(0, 1, 0, torch.device("cpu")), "max_sequences": 2} | options
    return ServerEngine(
        [server.url for server in servers],
        model,
        str(model_dir),
        adapter_dir=str(directory),
        restart_timeout_s=10.0,
        **options,
    )


@pytest.fixture
def servers(start_server: Start) -> list[Any]:
    return [start_server(), start_server()]


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def engine(
    servers: list[Any],
    lora_model: PeftModel,
    model_dir: Path,
    tmp_path: Path,
    warnings: list[str],
) -> Iterator[ServerEngine]:
    engine = engine_on(servers, lora_model, model_dir, tmp_path, warn=warnings.append)
    engine.sync(0)
    forget(servers)
    yield engine
    engine.close()


def forget(servers: list[Any]) -> None:
    for server in servers:
        server.asked.clear()


def counts(servers: list[Any]) -> list[int]:
    """The completions that each server was asked for."""
    return [sum(path.endswith("/completions") for path, _ in s.asked) for s in servers]


def adapters(server: Any, action: str = "load") -> list[str]:
    asked = [body for path, body in server.asked if path == f"/v1/{action}_lora_adapter"]
    return [body["lora_name"] for body in asked if body["lora_name"]]


def sample(engine: ServerEngine, count: int, first_seed: int = 0) -> list[Completion]:
    prompts = [(7, place % 50) for place in range(count)]
    return engine.generate(prompts, range(first_seed, first_seed + count), PARAMS)


@pytest.fixture
def expected(
    start_server: Start, lora_model: PeftModel, model_dir: Path, tmp_path: Path
) -> Callable[[int], list[Completion]]:
    """The completions of a batch by one server that never fails."""

    def of(count: int) -> list[Completion]:
        alone = engine_on([start_server()], lora_model, model_dir, tmp_path)
        alone.sync(0)
        completions = sample(alone, count)
        alone.close()
        return completions

    return of


def test_each_has_the_adapter_and_an_equal_share(
    engine: ServerEngine,
    servers: list[Any],
    expected: Callable[[int], list[Completion]],
    warnings: list[str],
) -> None:
    assert sample(engine, 41) == expected(41)
    assert sorted(counts(servers)) == [20, 21]
    # The one more goes to the other server in the next batch.
    sample(engine, 41)
    assert counts(servers) == [41, 41]
    for _ in range(20):
        sample(engine, 3)
    assert counts(servers) == [71, 71]
    assert engine._written is not None
    for server in servers:
        models = {body["model"] for path, body in server.asked if path.endswith("/completions")}
        assert models == {engine._written.name}
    before = engine._written.name
    engine.sync(1)
    for server in servers:
        assert adapters(server) == [engine._written.name]
        assert adapters(server, "unload") == [before]
    engine.close()
    assert [adapters(server, "unload")[1:] for server in servers] == [[engine._written.name]] * 2
    assert warnings == []


def test_ranks_begin_with_different_servers(
    servers: list[Any], lora_model: PeftModel, model_dir: Path, tmp_path: Path
) -> None:
    """With one request each, two ranks use both servers."""
    for rank in (0, 1):
        world = World(rank, 2, rank, torch.device("cpu"))
        engine = engine_on(servers, lora_model, model_dir, tmp_path, world=world)
        forget(servers)
        engine.generate([(7,)], [0], PARAMS, base=True)
        assert counts(servers) == [1 - rank, rank]
        engine.close()


def test_one_that_dies_in_a_batch_loses_none_of_it(
    engine: ServerEngine,
    servers: list[Any],
    kill_server: Kill,
    expected: Callable[[int], list[Completion]],
    warnings: list[str],
) -> None:
    whole = expected(60)
    stays, dies = servers
    num_answered = 0

    def applies(request: dict[str, Any]) -> bool:
        nonlocal num_answered
        num_answered += 1
        if num_answered == 5:
            kill_server(dies)
        return num_answered >= 5

    dies.fault, dies.applies = "dead", applies
    finished: list[int] = []
    prompts = [(7, place % 50) for place in range(60)]
    completions = engine.generate(
        prompts, range(60), PARAMS, on_batch=lambda indices, _: finished.extend(indices)
    )
    assert completions == whole and sorted(finished) == list(range(60))
    assert counts([stays])[0] == 60 - 4
    (warning,) = warnings
    assert f"the server at {dies.url} is gone" in warning and "go to the other servers" in warning
    # It is not asked again before the next step, and the step works without it.
    num_asked = len(dies.asked)
    sample(engine, 6)
    engine.sync(1)
    assert sample(engine, 60) == whole
    assert len(dies.asked) == num_asked and len(warnings) == 1


def test_one_that_returns_gets_the_adapter_before_requests(
    engine: ServerEngine,
    servers: list[Any],
    start_server: Start,
    kill_server: Kill,
    warnings: list[str],
) -> None:
    kill_server(servers[1])
    sample(engine, 4)
    engine.sync(1)
    servers[1] = start_server(servers[1].server_port)
    sample(engine, 4)
    assert servers[1].asked == []
    engine.sync(2)
    forget([servers[0]])
    sample(engine, 40)
    assert warnings[1:] == [f"the server at {servers[1].url} has returned, and gets requests again"]
    # Its replies are checked as at the start, then it loads, then it samples.
    assert engine._written is not None
    paths = [path for path, _ in servers[1].asked]
    loaded = paths.index("/v1/load_lora_adapter", 2)
    assert adapters(servers[1]) == [engine._written.name]
    assert paths[:loaded] == ["/v1/load_lora_adapter", "/v1/completions"]
    assert counts([servers[0]])[0] == counts([servers[1]])[0] - 1 == 20


def test_another_model_in_its_place_gets_no_requests(
    engine: ServerEngine,
    servers: list[Any],
    start_server: Start,
    kill_server: Kill,
    warnings: list[str],
) -> None:
    kill_server(servers[1])
    sample(engine, 4)
    other = start_server(servers[1].server_port, model="someone/else")
    for version in (1, 2):
        engine.sync(version)
        sample(engine, 4)
    assert counts([other]) == [0] and adapters(other) == []
    assert len(warnings) == 2 and "serves someone/else, but the student is" in warnings[1]


def test_another_model_is_refused_at_the_start(
    start_server: Start, lora_model: PeftModel, model_dir: Path, tmp_path: Path
) -> None:
    fits, other = start_server(), start_server(model="someone/else")
    with pytest.raises(ValueError) as refused:
        engine_on([fits, other], lora_model, model_dir, tmp_path)
    assert f"the server at {other.url} serves someone/else, but the student is" in str(
        refused.value
    )
    assert f"--port {other.server_port}" in str(refused.value)
    assert fits.url not in str(refused.value)


def test_when_none_is_left_the_run_waits_for_one(
    engine: ServerEngine, servers: list[Any], start_server: Start, kill_server: Kill
) -> None:
    for server in servers:
        kill_server(server)
    with pytest.raises(EngineDied) as died:
        sample(engine, 4)
    assert all(f"the server at {server.url} is gone" in str(died.value) for server in servers)
    with pytest.raises(EngineDied, match="is gone"):
        engine.sync(1)
    servers[0] = start_server(servers[0].server_port)
    engine.restart()
    assert engine._written is not None and adapters(servers[0]) == [engine._written.name]
    forget(servers)
    assert len(sample(engine, 4)) == 4
    assert counts(servers) == [4, 0]


def test_one_that_is_not_fit_does_not_end_the_wait_for_the_others(
    engine: ServerEngine, servers: list[Any], start_server: Start, kill_server: Kill
) -> None:
    for server in servers:
        kill_server(server)
    with pytest.raises(EngineDied):
        sample(engine, 4)
    other = start_server(servers[0].server_port, model="someone/else")
    late = threading.Timer(2.0, lambda: start_server(servers[1].server_port))
    late.start()
    engine.restart()
    late.join()
    assert len(sample(engine, 4)) == 4 and counts([other]) == [0]


def test_the_wait_ends_where_all_answer_and_none_is_fit(
    engine: ServerEngine, servers: list[Any], start_server: Start, kill_server: Kill
) -> None:
    for server in servers:
        kill_server(server)
    with pytest.raises(EngineDied):
        sample(engine, 4)
    for server in servers:
        start_server(server.server_port, model="someone/else")
    with pytest.raises(EngineDied, match="serves someone/else, but the student is"):
        engine.restart()
