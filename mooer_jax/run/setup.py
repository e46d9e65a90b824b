"""What training and evaluation have in common: reading a config, preparing the process."""

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mooer_jax.config import SpeechLLMConfig, build, model_config
from mooer_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop.

  Attributes:
    steps: updates in all.
    accumulation: micro-batches an update; data.batch_size is for all of them together.
    log_every: updates between two lines of metrics.
    save_every: updates between two checkpoints; the last update always saves.
    keep: checkpoints that are kept, the newest ones.
    cmvn: "estimate" from the first batches, a path of an `am.mvn`, or "" for what the
      initial checkpoint has.
  """

  steps: int = 100_000
  accumulation: int = 1
  log_every: int = 20
  save_every: int = 1000
  keep: int = 3
  cmvn: str = ""

  def __post_init__(self):
    for name in ("steps", "accumulation", "log_every", "save_every", "keep"):
      if getattr(self, name) < 1:
        raise ValueError(f"train.{name}={getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """What a run measures of itself as it trains: perplexities of reference answers, by task.

  Attributes:
    shards: test set, each utterance with its own task; "" measures nothing.
    instructions: tasks whose prompts are given; besides, always none.
    every: updates between two measurements; the models that the run starts from and ends with are
      measured, too.
    batch_size: utterances at a time.
  """

  shards: str = ""
  instructions: tuple[str, ...] = ()
  every: int = 1
  batch_size: int = 16

  def __post_init__(self):
    for name in ("every", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"probe.{name}={getattr(self, name)}: must be at least 1")


SECTIONS = {
  "model", "compute", "data", "optimizer", "train", "mesh", "generation", "eval", "activation",
  "probe", "seed", "workdir", "init_from", "trainable",
  "tokenizer", "characters", "specials", "eos",
}  # fmt: skip


def check_sections(config: Mapping[str, Any]):
  """Raises ValueError for a section that nobody reads, or one that is missing."""
  for name in config:
    if name not in SECTIONS:
      close = difflib.get_close_matches(name, SECTIONS, 1)
      hint = f"; did you mean {close[0]!r}?" if close else ""
      raise ValueError(f"unknown config section {name!r}{hint} Allowed: {sorted(SECTIONS)}")
  for name in ("model", "data", "workdir", "trainable"):
    if name not in config:
      raise ValueError(f"the config has no {name!r}")
  if isinstance(config["trainable"], str):
    raise ValueError(f"trainable={config['trainable']!r}: give a tuple of patterns, not a string")


def section(config: Mapping[str, Any], name: str, cls: type, **extra):
  """One section of a config as its dataclass; a section that is absent gives the defaults."""
  return build(cls, {**dict(config.get(name, {})), **extra}, name)


def read_model(config: Mapping[str, Any], **compute) -> SpeechLLMConfig:
  """The model of a config; keyword arguments override the `compute` section."""
  return model_config(config["model"], {**dict(config.get("compute", {})), **compute})


def read_tokenizer(config: Mapping[str, Any], initial: Path | None = None) -> Tokenizer:
  """The tokenizer: a folder, the initial checkpoint's, or one made of `config.characters`."""
  if config.get("tokenizer"):
    return Tokenizer.from_folder(config["tokenizer"])
  made = None
  if config.get("characters"):
    made = Tokenizer.from_characters(
      config["characters"], tuple(config["specials"]), eos=config["eos"]
    )
  if initial is not None:
    saved = Tokenizer.from_folder(initial / "tokenizer")
    if made is not None and made.vocabulary() != saved.vocabulary():
      raise ValueError(
        f"config.characters and specials make another tokenizer than that of {initial}; set"
        " config.characters='' to take the checkpoint's"
      )
    return saved
  if made is not None:
    return made
  raise ValueError("no tokenizer: set config.tokenizer to a folder, or init_from, or characters")


def check_vocabulary(tokenizer: Tokenizer, model: SpeechLLMConfig):
  """Raises ValueError if the tokenizer has ids beyond the embedding table."""
  if tokenizer.vocab_size > model.decoder.vocab:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} tokens but llm.vocab={model.decoder.vocab};"
      " set model.llm.vocab to at least that"
    )


def prepare_process():
  """Turns on the persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR says where."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mooer_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
