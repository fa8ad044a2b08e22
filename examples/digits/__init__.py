"""Distil a small digit detector with `frs_kernels.fsr_loss`: `python -m examples.digits`."""
