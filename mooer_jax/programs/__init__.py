"""The programs behind `train.py`, `eval.py`, `mooer-jax train` and `mooer-jax eval`."""
