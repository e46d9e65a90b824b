"""Training and evaluation, each readable from top to bottom."""
