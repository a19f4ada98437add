"""A real vLLM server on loopback as the teacher: its scores are those of the same model here."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3ForCausalLM

from paint_engine.config.sections import TeacherSection
from paint_engine.monitor.timings import Timings
from paint_engine.rollout.http import Refused, Requests
from paint_engine.scoring import Asked, Scorer, TeacherServer, find_teacher
from paint_engine.types import Problem, Rollout, TeacherView, TrainExample

TOP_K = 16


@pytest.fixture(scope="module")
def whole_dir(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The model without its trap: its rows of padding are no likelier than others."""
    directory = tmp_path_factory.mktemp("models") / "teacher"
    model = Qwen3ForCausalLM.from_pretrained(model_dir)
    model.lm_head.weight.data[len(tokenizer) :] /= 20
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def served(
    whole_dir: Path, make_served: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("teacher") / "log.txt"
    served = make_served(
        whole_dir, log, adapters=False, max_logprobs=1000, logprobs_mode="raw_logprobs"
    )
    served.start()
    served.wait()
    yield served
    served.kill()


@pytest.fixture(scope="module")
def model(whole_dir: Path) -> PreTrainedModel:
    return Qwen3ForCausalLM.from_pretrained(whole_dir, dtype=torch.float32).eval()


def make_server(
    served: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top_k: int
) -> TeacherServer:
    section = TeacherSection(url=served.url, served_top_k=max(top_k, 1))
    asked = Asked(top_k, len(tokenizer), model.config.vocab_size)
    return TeacherServer(section, find_teacher(section), asked, restart_timeout_s=240)


@torch.no_grad()
def own_logprobs(
    model: PreTrainedModel, prompt: tuple[int, ...], completion: tuple[int, ...], num_tokens: int
) -> Tensor:
    """(n, V) over the tokens alone."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :num_tokens]
    return torch.log_softmax(logits.float(), dim=-1)


PROMPT, COMPLETION = tuple(range(20, 40)), tuple(range(100, 130))


def test_scores_are_the_model_s(
    served: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """All tokens, where padding is taken out; the likeliest; and the completion's own."""
    expected = own_logprobs(model, PROMPT, COMPLETION, len(tokenizer))
    whole = make_server(served, model, tokenizer, model.config.vocab_size)
    assert whole.unfit() is None
    found = whole.score(PROMPT, COMPLETION, Requests())
    listed = found.token_ids >= 0
    assert listed.sum(1).tolist() == [len(tokenizer)] * len(COMPLETION)
    wanted = expected.gather(1, found.token_ids.clamp(min=0).long())
    assert (found.logprobs - wanted)[listed].abs().max() < 1e-4
    some = make_server(served, model, tokenizer, TOP_K).score(PROMPT, COMPLETION, Requests())
    for place, token in enumerate(COMPLETION):
        ids = set(some.token_ids[place].tolist()) - {-1}
        assert token in ids and len(ids) >= TOP_K - 6
        assert int(expected[place].argmax()) in ids
    own = make_server(served, model, tokenizer, 0).score(PROMPT, COMPLETION, Requests())
    assert own.token_ids.flatten().tolist() == list(COMPLETION)
    # Here the rows of padding stay in.
    apart = own.logprobs[:, 0] - expected[range(len(COMPLETION)), COMPLETION]
    assert (apart < 1e-4).all() and (apart > -0.2).all()


def test_what_the_server_refuses(
    served: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    section = TeacherSection(url=served.url, served_top_k=1001)
    more = TeacherServer(section, find_teacher(section), Asked(1001, len(tokenizer), 2000))
    unfit = more.unfit()
    assert unfit is not None and "refuses to list 1001 tokens" in unfit and "1000" in unfit
    larger = TeacherServer(section, find_teacher(section), Asked(4, 50_000, 50_000))
    unfit = larger.unfit()
    assert unfit is not None and "or the id 49999 (status 400" in unfit
    server = make_server(served, model, tokenizer, 4)
    assert server.model.room(10_000) == 511
    server.score((1,) * 500, (2,) * 11, Requests())
    with pytest.raises(Refused, match="status 400"):
        server.score((1,) * 500, (2,) * 12, Requests())


def test_a_server_that_is_killed_and_started_again(
    served: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    warnings: list[str] = []
    server = make_server(served, model, tokenizer, TOP_K)
    scorer = Scorer(server, timings=Timings(), warn=warnings.append)
    view = TeacherView(PROMPT, "", 0.0)
    examples = []
    for number in range(200):
        completion = tuple((number + place) % 300 for place in range(100))
        rollout = Rollout(Problem("p", "", "", ""), (1,), completion, (), True, "")
        examples.append(TrainExample(rollout, teacher_view=view))
    before = scorer.add_scores(examples)

    def replace_server() -> None:
        served.kill()
        served.start()

    killer = threading.Timer(0.3, replace_server)
    killer.start()
    after = scorer.add_scores(examples)
    killer.join()
    assert warnings and "is gone (" in warnings[0]
    for one, other in zip(before, after, strict=True):
        assert one.served is not None and other.served is not None
        both = one.served.token_ids >= 0
        # Sums of other batches are rounded otherwise, and may exchange ids of equal probability.
        difference = one.served.logprobs[both] - other.served.logprobs[both]
        assert difference.abs().max() < 1e-4
