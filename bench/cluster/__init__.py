"""The time of a training step on 1 to 64 GPUs, predicted from counted parts and published rates,
and the same prediction beside measured steps of 1, 2 and 4 processes on a CPU."""
