"""Kernels: one public function per operation."""

from mooer_jax.kernels.attention import attention as attention
