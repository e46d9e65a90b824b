"""Connectors: encoder frames in, speech tokens of the LLM's width out."""
