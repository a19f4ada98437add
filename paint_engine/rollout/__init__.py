"""Sampling: the engine protocol, the built-in sampler and vLLM (in the process, in its own process,
or as a server), and the weights handed to vLLM."""
