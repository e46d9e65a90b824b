"""Encoders, connectors, language models and LoRA: one published format a file."""
