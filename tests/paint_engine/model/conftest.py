"""What a packed pass must equal: each sequence alone, in its states and in the gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from paint_engine.model.forward import causal_lm
from paint_engine.types import TrainExample


@pytest.fixture(scope="session")
def states_alone() -> Callable[[nn.Module, Sequence[TrainExample]], Tensor]:
    """Student states, one sequence at a time."""

    def states(model: nn.Module, items: Sequence[TrainExample]) -> Tensor:
        backbone, rows = causal_lm(model).base_model, []
        for item in items:
            ids = torch.tensor([[*item.rollout.prompt_ids, *item.rollout.completion_ids]])
            states = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
            rows.append(states[len(item.rollout.prompt_ids) - 1 : -1])
        return torch.cat(rows)

    return states


@pytest.fixture(scope="session")
def gradients() -> Callable[[nn.Module, Tensor], Tensor]:
    """Of a function of every state that no permutation or leak leaves unchanged."""

    def of_all_parameters(model: nn.Module, states: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        direction = torch.randn(states.shape, generator=generator, dtype=torch.float64)
        model.zero_grad()
        (states * direction.to(states)).sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert grads
        return torch.cat(grads)

    return of_all_parameters
