"""What one process does where there is no process group, and how work is divided among ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.distributed import (
    World,
    any_rank,
    barrier,
    close_world,
    gather_objects,
    init_world,
    merge_shares,
    my_share,
    raise_together,
    sum_gradients,
    sum_over_ranks,
)

CPU = torch.device("cpu")


def test_without_torchrun_there_is_one_process_and_no_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = init_world(CPU)
    assert world == World(0, 1, 0, CPU)
    assert world.is_main and world.writes_for_node
    assert not torch.distributed.is_initialized()
    barrier()
    close_world()


def test_exchanges_of_one_process_are_the_identity() -> None:
    assert gather_objects({"a": 1}) == [{"a": 1}]
    assert any_rank(True) and not any_rank(False)
    assert sum_over_ranks({"loss": 0.1, "kl": 2}) == {"loss": 0.1, "kl": 2}
    raise_together(None)
    with pytest.raises(ValueError, match="no room"):
        raise_together("no room")
    parameter = torch.ones(3, requires_grad=True)
    parameter.grad = torch.full((3,), 2.0)
    sum_gradients([parameter])
    assert parameter.grad.tolist() == [2.0] * 3


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_put_together_are_the_whole(items: list[int], size: int) -> None:
    shares = [my_share(items, World(rank, size, rank, CPU)) for rank in range(size)]
    assert merge_shares(shares) == items
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"2 GPUs.*local rank 2.*lower --nproc-per-node"):
        init_world(torch.device("cuda"))
