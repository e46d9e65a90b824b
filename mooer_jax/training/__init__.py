"""Training: schedules, optimizer, mesh and shardings, the train step and its state."""
