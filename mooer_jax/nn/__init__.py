"""Layers that every model shares: dense with LoRA, norms, positions."""
