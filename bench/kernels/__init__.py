"""Time, memory and accuracy of `paint_loss` beside bare GEMMs, plain PyTorch and the peers.

Also what its Triton kernels compile to, and the bytes that they move.
"""
