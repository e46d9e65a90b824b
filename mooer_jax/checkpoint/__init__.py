"""The checkpoint folder: weights and everything that is needed to run them.

    config.json       the model, from `config.to_json`
    generation.json   decoding defaults
    tokenizer/        files of the tokenizer
    weights/          all leaves, per layer (Orbax) — or, for a fine-tune,
    trainable/        only the trained leaves; checkpoint.json has the path and hash of the base
    train_state/      arrays and the position in the data, while training
    source/           for converted weights: other contents of the original files
    kept_by/          runs that are fine-tuned from it, which prevent its deletion
    checkpoint.json   format, hash, paths, shapes and dtypes of the leaves; size and SHA-256 of
                      all other files

A folder is written as `.tmp-NAME` and renamed when it is complete. With several processes, all of
them call `save` (or `start_save`) and `load` on a shared file system. A checkpoint at a URL is
copied to each host.
"""

# ruff: noqa: F401  (the names are the interface of the package)
from mooer_jax.checkpoint.leaves import CheckpointError, LazyArray, SaveError, as_lazy
from mooer_jax.checkpoint.mirror import Mirror, check_writing, restore
from mooer_jax.checkpoint.reading import (
  Checkpoint,
  check_leaves,
  describe,
  find_damage,
  has_base,
  load,
  load_train_state,
  read_leaves,
)
from mooer_jax.checkpoint.remote import find, local_folder, locate, url_of
from mooer_jax.checkpoint.steps import (
  all_steps,
  enclosing,
  keep_for,
  keep_last,
  latest,
  step_folder,
  step_of,
)
from mooer_jax.checkpoint.writing import put_in_place, save, start_save
