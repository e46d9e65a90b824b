"""Kernels: one public function and one folder per operation.

A folder has the function in its `__init__`, and one file per backend: `xla` (the reference), `tpu`
(Pallas, compiled by Mosaic), `gpu` (Pallas, compiled by Triton). `choice` says which one runs.
"""

from mooer_jax.kernels.attention import attention as attention
from mooer_jax.kernels.decode_attention import decode_attention as decode_attention
from mooer_jax.kernels.window_attention import window_attention as window_attention
