"""Decoding: from a prompt's embeddings to tokens, in one compiled program."""

from mooer_jax.generation.generate import Generated as Generated
from mooer_jax.generation.generate import generate as generate
from mooer_jax.generation.generate import generate_from as generate_from
from mooer_jax.generation.options import GenerationConfig as GenerationConfig
