"""What docs/security.md says of ports: a run in one process listens on none."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from paint_engine.monitor import MetricsWriter


def listening() -> set[tuple[str, int]]:
    """The addresses on which this process and its children listen."""
    me = psutil.Process()
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_a_store_is_seen_and_listens_on_all_interfaces() -> None:
    """Whatever address it is given, so that an address does not protect torchrun's."""
    before = listening()
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    (opened,) = listening() - before
    assert opened == ("::", store.port) or opened == ("0.0.0.0", store.port)


def test_a_run_in_one_process_listens_on_no_port(
    command: Sequence[str],
    run_main: Callable[[Sequence[str]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a step, while the process that checks answers lives."""
    before, seen, write = listening(), list[set[tuple[str, int]]](), MetricsWriter.write

    def watch(
        writer: MetricsWriter, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        seen.append(listening() - before)
        write(writer, metrics, samples)

    monkeypatch.setattr(MetricsWriter, "write", watch)
    assert run_main([*command, "--train.num_steps", "2"]) == 0
    assert seen == [set(), set()]
