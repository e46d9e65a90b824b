"""PyTorch checkpoints in and out of mooer_jax.

Runs as `python -m convert` from a checkout and ships as `mooer_jax.convert`, so imports within this
folder are relative. Only this folder, tests/ and benchmarks/ may import torch.
"""
