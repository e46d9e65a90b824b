"""What single papers train or measure; imported by the entry points only."""
