"""Originals in PyTorch beside our checkpoints."""
