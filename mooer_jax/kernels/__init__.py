"""Kernels: one public function per operation."""

from mooer_jax.kernels.attention import attention as attention
from mooer_jax.kernels.attention import decode_attention as decode_attention
from mooer_jax.kernels.attention import window_attention as window_attention
