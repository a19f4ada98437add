"""Adapters in peft's format: their configuration, and whether they fit their base and vLLM."""
