"""The counted work of the losses on a GPU, and the time that follows from published rates.

Nothing runs. `bench.kernels` measures.
"""
