"""What people run: training and evaluation, each readable from top to bottom."""
