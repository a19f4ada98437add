"""Which numbers of GPUs an engine can span, without vLLM."""

import pytest
from transformers import MambaConfig, Qwen3Config

from paint_engine.rollout.vllm_engine import check_heads


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_gpus_that_share_the_heads(size: int) -> None:
    """Up to 8 they share the key-value heads too; beyond, two have a copy of each."""
    check_heads(Qwen3Config(num_attention_heads=32, num_key_value_heads=8), size)
    check_heads(MambaConfig(), size)


@pytest.mark.parametrize(
    ("num_heads", "num_keys", "size"), [(32, 8, 3), (32, 8, 5), (14, 2, 4), (12, 6, 4)]
)
def test_heads_that_cannot_be_shared_are_refused(num_heads: int, num_keys: int, size: int) -> None:
    config = Qwen3Config(num_attention_heads=num_heads, num_key_value_heads=num_keys)
    with pytest.raises(ValueError, match=r"needs a divisor of the first, .* change it") as refused:
        check_heads(config, size)
    got = f"is {size} with {num_heads} attention heads and {num_keys} key-value heads"
    assert got in str(refused.value)
