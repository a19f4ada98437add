"""A teacher's server with the tests' own random model, and the flags of a run with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from scoring_server import ScoringServer

from paint_engine.rollout import http


@pytest.fixture
def teacher(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScoringServer]:
    # A second is long for a server that returns in a fifth of one.
    monkeypatch.setattr(http, "_POLL_S", 0.05)
    server = ScoringServer(model_dir)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def served(teacher: ScoringServer) -> list[str]:
    """The arguments that make it the teacher of a run."""
    return ["--teacher.url", teacher.url, "--objective.temperature", "1.0"]
