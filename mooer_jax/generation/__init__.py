"""Decoding: from prompts to tokens."""

from mooer_jax.generation.continuous import compile_batch as compile_batch
from mooer_jax.generation.continuous import decode_batches as decode_batches
from mooer_jax.generation.generate import NOT_FINITE as NOT_FINITE
from mooer_jax.generation.generate import GenerateOutput as GenerateOutput
from mooer_jax.generation.generate import generate as generate
from mooer_jax.generation.generate import generate_from as generate_from
from mooer_jax.generation.options import GenerationConfig as GenerationConfig
