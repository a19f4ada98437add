"""The model: loading, LoRA, sharding, packed sequences and their attention, forward passes to
hidden states, and the teachers."""
