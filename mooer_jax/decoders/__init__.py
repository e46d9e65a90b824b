"""Language models and their KV cache."""
