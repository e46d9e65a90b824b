"""Training and benchmarks of single papers; imported by the entry points only."""
