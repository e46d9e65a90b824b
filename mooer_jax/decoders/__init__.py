"""Decoders: embeddings in, hidden states and logits out. KINDS lists their configs."""

from mooer_jax.decoders.llm import LLMConfig

KINDS: tuple[type[LLMConfig], ...] = (LLMConfig,)
