"""Where a config file starts: sections with their defaults, so that flags can set any of them."""

import dataclasses

from ml_collections import ConfigDict

from mooer_jax.data.config import DataConfig
from mooer_jax.nn.compute import Compute
from mooer_jax.run.activation import ActivationConfig
from mooer_jax.run.decoding import EvalConfig
from mooer_jax.run.setup import ProbeConfig, TrainConfig
from mooer_jax.training.optimizer import OptimizerConfig
from mooer_jax.training.sharding import MeshConfig

_SECTIONS = {
  "compute": Compute,
  "data": DataConfig,
  "optimizer": OptimizerConfig,
  "train": TrainConfig,
  "mesh": MeshConfig,
  "eval": EvalConfig,
  "activation": ActivationConfig,
  "probe": ProbeConfig,
}
# Decided elsewhere: by training or decoding, by the config's one seed.
_NOT_SET = ("compute.scan", "data.seed")


def default_config() -> ConfigDict:
  """A config for `train.py` and `eval.py` with the defaults of its sections.

  What has no default is absent: a file assigns workdir, trainable, `model` and `data.shards`.
  `generation` holds only what a file sets: in evaluation it goes over the checkpoint's own.
  """
  config = ConfigDict()
  config.seed = 0
  config.init_from = ""
  config.tokenizer = ""
  config.model = ConfigDict()
  config.generation = ConfigDict()
  for name, cls in _SECTIONS.items():
    config[name] = {
      field.name: _default(field)
      for field in dataclasses.fields(cls)
      if _default(field) is not dataclasses.MISSING and f"{name}.{field.name}" not in _NOT_SET
    }
  return config


def _default(field: dataclasses.Field):
  made = field.default_factory
  return field.default if made is dataclasses.MISSING else made()
