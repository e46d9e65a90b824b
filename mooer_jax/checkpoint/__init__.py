"""The checkpoint folder: weights and everything that is needed to run them, in one place.

    config.json       the model, as `config.to_json` wrote it
    generation.json   decoding defaults
    tokenizer/        the tokenizer's own files
    weights/          every leaf, per layer (Orbax) — or, for a fine-tune,
    trainable/        only the trained leaves; checkpoint.json then names and hashes their base
    train_state/      arrays and the data position, while training
    source/           of converted weights: what their files held besides
    kept_by/          names of the runs that were fine-tuned from it, which keep it from deletion
    checkpoint.json   format, hash, paths, shapes and dtypes of the leaves; size and SHA-256 of
                      every other file

A folder is written beside its place as `.tmp-NAME` and renamed when it is complete, so one that
has its name is whole. With several processes, all call `save` and `load` on a shared file system.
"""

from mooer_jax.checkpoint.leaves import CheckpointError, LazyArray, SaveError
from mooer_jax.checkpoint.reading import (
  Checkpoint,
  check_leaves,
  describe,
  find_damage,
  has_base,
  load,
  load_train_state,
  read_leaves,
  verify,
)
from mooer_jax.checkpoint.steps import (
  all_steps,
  find,
  keep_for,
  keep_last,
  latest,
  step_folder,
  step_of,
)
from mooer_jax.checkpoint.writing import put_in_place, save

__all__ = [
  "Checkpoint",
  "CheckpointError",
  "LazyArray",
  "SaveError",
  "all_steps",
  "check_leaves",
  "describe",
  "find",
  "find_damage",
  "has_base",
  "keep_for",
  "keep_last",
  "latest",
  "load",
  "load_train_state",
  "put_in_place",
  "read_leaves",
  "save",
  "step_folder",
  "step_of",
  "verify",
]
