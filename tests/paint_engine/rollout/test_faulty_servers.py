"""Servers whose replies are wrong, too long, too late or no replies: an engine fault with the
server's name, bounded in time and memory."""

import re
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import EvalSection, RolloutSection
from paint_engine.distributed import World
from paint_engine.rollout import vllm_server
from paint_engine.rollout.engine import EngineDied, SamplingParams, sampling_params
from paint_engine.rollout.vllm_server import ServerEngine

WORLD = World(0, 1, 0, torch.device("cpu"))
PARAMS = SamplingParams(1.0, 1.0, -1, 8, (2, 5), 340)
PROMPTS, SEEDS = [(7, 8, 9), (10,), (11, 12)], [0, 3, 16]
MIB = 1 << 20
DEADLINE_S = 0.4

# What the message says of each fault.
FAULTS = {
    "NaN": r"token_logprobs\.0: got nan; Input should be a finite number",
    "null": r"token_logprobs\.0: got None; Input should be a valid number",
    "wrong type": r"token_ids: got many; Input should be a valid array",
    "id out of range": r"token_ids\.0: got 1000000; needs an id from 0 to 339",
    "too long": "got 9 token_ids and 9 token_logprobs; needs as many of both, from 1 to 8",
    "too short": "'length' after 7 tokens; needs all 8 .* --max-model-len",
    "missing key": r"choices\.0\.logprobs is missing",
    "changed prompt": "got 4 ids, of which the first 3 are right; needs the 3 ids that were sent",
    "no tokens": "got 0 token_ids",
    "one log-probability less": "token_ids and . token_logprobs; needs as many",
    "true for an id": r"token_ids\.0: got True; Input should be a valid integer",
    "a float for an id": r"token_ids\.0: got 20\.0; Input should be a valid integer",
    "a text for an id": r"token_ids\.0: got 20; Input should be a valid integer",
    "a negative id": r"token_ids\.0: got -1; needs an id",
    "an id of 400 digits": r"token_ids\.0: got 10000.*\.\.\..*; needs an id",
    "a positive log-probability": r"token_logprobs\.0: got 0\.5; needs .* at most 0",
    "minus infinity": r"token_logprobs\.0: got -inf; Input should be a finite number",
    "vLLM's minus infinity": r"token_logprobs\.0: got -9999\.0; needs .* can be sampled",
    "a number beyond float": r"token_logprobs\.0: got 10000.*; Input should be a finite number",
    "a text for a log-probability": r"token_logprobs\.0: got -0\.5; Input should be a valid number",
    "no token ids": r"token_ids is missing; the server's vLLM may be too old for it",
    "null for token ids": r"token_ids: got None; Input should be a valid array",
    "aborted": "finish_reason: got abort; Input should be 'stop' or 'length'",
    "no finish reason": "finish_reason: got None",
    "stopped by nothing": r"'stop' after the token 20; needs one of the stop tokens .* \[2, 5\]",
    "past a stop token": r"needs an end at the first stop token \(one of \[2, 5\]\)",
    "nested lists": r"choices\.0\.logprobs: got \[\[\[\[\]\]\]\]; Input should be an object",
    "no JSON": r"the reply: got <html>\\x1b\[31m.*; Invalid JSON",
    "nothing": "the reply: got ; Invalid JSON: EOF",
    "a list": r"the reply: got \[\]; Input should be an object",
    "no choices": "choices: got .*at least 1 item",
    "two choices": r"choices\.0\.finish_reason is missing",
    "nested too deep": "recursion limit exceeded",
    "no UTF-8": "Invalid JSON: invalid unicode",
    "a number of 5000 digits": "Invalid JSON: number out of range",
    "an error with status 200": "choices is missing",
    "a million wrong types": r"choices\.0: got None; Input should be an object",
    "300 MB": "the reply has 314572800 bytes; needs at most 10568",
    "300 MB announced": "the reply has 314572800 bytes; needs at most 10568",
    "slow drip": r"is gone \(TimeoutError: no whole reply within 0\.4 s\)",
    "slow headers": r"is gone \(TimeoutError: no whole reply within 0\.4 s\)",
    "5 MB error": r"status 500: \\x1b\[31m\\x1b\]0;title\\x07.*\.\.\.\)",
    "many headers": r"is gone \(HTTPException: got more than 100 headers\)|longer than anything",
    "endless chunks": "the reply has more than 10568.. bytes",
    "tiny chunks": "longer than anything that was asked for|no whole reply within",
    "a chunk of 1 EB": r"is gone \(IncompleteRead",
    "a negative chunk": "chunks are not HTTP's",
    "ends early": r"is gone \(ConnectionError: the reply ended 988 bytes early\)",
    "redirect": r"status 307 \(a redirect, which is not followed\)",
    "refused": r"refused a request \(status 400: .*too many tokens",
    "an echo of the headers": "refused a request .status 401: ",
    "no HTTP": r"is gone \(BadStatusLine: .*x1b",
}


@pytest.fixture
def engine(
    server: Any, lora_model: PeftModel, model_dir: Path, tmp_path: Path
) -> Iterator[ServerEngine]:
    engine = ServerEngine(
        [server.url],
        lora_model,
        str(model_dir),
        WORLD,
        max_sequences=2,
        adapter_dir=str(tmp_path),
    )
    engine.sync(0)
    yield engine
    engine.close()


def test_every_fault_is_here(all_faults: tuple[str, ...]) -> None:
    assert sorted(all_faults) == sorted(FAULTS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loads_adapters": False}, "does not load adapters while it runs; start it with: VLLM_"),
        ({"fault": "no token ids"}, "token_ids is missing; the server's vLLM may be too old"),
        ({"fault": "a low log-probability"}, "returns raw log-probabilities"),
        (
            {"served": b'{"data": [{"id": 5}]}'},
            r"\(data\.0\.id: got 5; Input should be a",
        ),
        ({"served": b'{"data": []}'}, "got no model without a parent"),
        (
            {"served": b'{"data": [{"id": "\\u001b[31m"}]}'},
            r"serves \\x1b\[31m, but the student",
        ),
        ({"served": b" " * (2 << 20)}, "the reply has 2097152 bytes; needs at most 1048576"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(
    fields: dict[str, Any], message: str, server: Any, lora_model: PeftModel, model_dir: Path
) -> None:
    for name, value in fields.items():
        setattr(server, name, value)
    with pytest.raises(ValueError, match=message) as raised:
        ServerEngine([server.url], lora_model, str(model_dir), WORLD, max_sequences=2)
    assert str(raised.value).isprintable()


def test_good_replies(engine: ServerEngine) -> None:
    completions = engine.generate(PROMPTS, SEEDS, PARAMS)
    assert [len(c.token_ids) for c in completions] == [1, 4, 1]
    assert [c.token_ids[-1] for c in completions] == [2, 2, 2]
    assert not any(c.truncated for c in completions)
    (cut,) = engine.generate([(1,)], [7], PARAMS)
    assert cut.truncated and len(cut.token_ids) == 8 and cut.logprobs == (-0.5,) * 8


def test_an_answer_of_an_evaluation_is_asked_for_without_log_probabilities(
    engine: ServerEngine, server: Any, tokenizer: PreTrainedTokenizerBase, lora_model: PeftModel
) -> None:
    """And what comes without them is checked as before."""
    for section, asked in ((RolloutSection(), 0), (EvalSection(), None)):
        params = sampling_params(section, lora_model, tokenizer)
        server.asked.clear()
        completions = engine.generate(
            PROMPTS, SEEDS, replace(PARAMS, logprobs=params.logprobs), base=asked is None
        )
        assert [request["logprobs"] for request in server.requests] == [asked] * 3
        lengths = [1, 4, 1]
        assert [len(c.token_ids) for c in completions] == lengths
        assert [len(c.logprobs) for c in completions] == (lengths if asked == 0 else [0] * 3)
    for fault in ("id out of range", "too short", "changed prompt", "past a stop token"):
        server.fault = fault
        with pytest.raises(EngineDied, match=FAULTS[fault]):
            engine.generate([(7, 8, 9)], [7], replace(PARAMS, logprobs=False))


def test_each_fault_is_told_in_time_and_in_little_memory(
    engine: ServerEngine, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "_ANSWER_TIMEOUT_S", DEADLINE_S)
    monkeypatch.setattr(vllm_server, "_TOKEN_TIMEOUT_S", 0.0)
    failures = []
    tracemalloc.start()
    for fault, message in FAULTS.items():
        server.fault, server.num_sent = fault, 0
        tracemalloc.reset_peak()
        before, began = tracemalloc.get_traced_memory()[0], time.monotonic()
        with pytest.raises(EngineDied) as raised:
            engine.generate([PROMPTS[0]], [16 + 7], PARAMS)
        seconds = time.monotonic() - began
        peak_mib = (tracemalloc.get_traced_memory()[1] - before) / MIB
        text = str(raised.value)
        told = text.startswith(f"the server at {server.url} ") and re.search(message, text)
        if not told or not text.isprintable() or len(text) > 500 or seconds > 2 or peak_mib > 30:
            failures.append((fault, text[:600], seconds, peak_mib))
    tracemalloc.stop()
    assert not failures, "\n".join(map(str, failures))
