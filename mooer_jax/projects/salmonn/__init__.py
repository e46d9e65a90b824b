"""SALMONN: activation tuning, the LoRA sweep and the 15-task benchmark suite."""
