"""Attention: one public function, several implementations behind it."""

from mooer_jax.kernels.attention import attention as attention
