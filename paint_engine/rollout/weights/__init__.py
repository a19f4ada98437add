"""The trained weights on their way to vLLM: adapters as files, a whole model through memory."""

from paint_engine.rollout.weights.files import WeightFiles, WrittenWeights
from paint_engine.rollout.weights.memory import SharedWeights, WeightMemory, has_shared_memory

__all__ = ["SharedWeights", "WeightFiles", "WeightMemory", "WrittenWeights", "has_shared_memory"]
