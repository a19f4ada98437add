"""What each rank does in `test_vllm_ranks`: python -m torch.distributed.run ... vllm_ranks.py
MODEL_DIR OUTPUT_DIR"""

import json
import sys
from pathlib import Path

import torch

from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import barrier, close_world, init_world
from paint_engine.model.forward import hidden_states, lm_head_weight
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import pack_sequences
from paint_engine.rollout.engine import EngineDied, SamplingParams
from paint_engine.rollout.vllm_engine import VllmEngine


def main(model_dir: str, output: Path) -> None:
    world = init_world(torch.device("cpu"))
    base = load_base(ModelSection(name_or_path=model_dir), world.device)
    model = add_lora(base, LoraSection(rank=4, alpha=8), seed=0)
    engine = VllmEngine(
        model,
        model_dir,
        world,
        max_model_len=256,
        max_sequences=8,
        gpu_memory_utilization=0.1,
        tensor_parallel_size=world.size,
        adapter_dir=str(output),
    )
    vocab_size = lm_head_weight(model).shape[0] - 6
    params = SamplingParams(0.8, 1.0, -1, 12, (5,), vocab_size)
    # Shares of different sizes, one of them empty at the second step.
    differences = []
    for step, shares in enumerate([(3, 2), (2, 0)]):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        engine.sync(step)
        prompts = [(40 + i, 41 + world.rank, 42) for i in range(shares[world.rank])]
        completions = engine.generate(prompts, range(len(prompts)), params)
        for prompt, completion in zip(prompts, completions, strict=True):
            with torch.no_grad():
                packed = pack_sequences([prompt], [completion.token_ids])
                states = hidden_states(model, packed, attention="padded")
                logits = (states @ lm_head_weight(model).T)[:, :vocab_size] / params.temperature
            tokens = torch.tensor(completion.token_ids)[:, None]
            expected = torch.log_softmax(logits, -1).gather(1, tokens).squeeze(1)
            differences.append((expected - torch.tensor(completion.logprobs)).abs().mean().item())
    died = None
    try:
        engine.restart()
    except EngineDied as death:
        died = str(death)
    result = {"differences": differences, "died": died}
    (output / f"rank-{world.rank}.json").write_text(json.dumps(result))
    barrier()
    engine.close()
    close_world()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
