"""What an export can say of a model: what importing it again would make of it."""

import dataclasses
import math
from typing import Any

from mooer_jax.config import SpeechLLMConfig, differences
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.decoders.llm import LORA_TARGETS, LLMConfig

from .errors import Problems


def check_same(meant: SpeechLLMConfig, read: SpeechLLMConfig, problems: Problems) -> None:
  """Adds everything in which a model and its exported form, read again, are different models.

  Dropout of encoder and connector, which only training knows, is nobody's business here.
  """
  for path, (ours, theirs) in differences(_essence(meant), _essence(read)).items():
    numbers = isinstance(ours, float) and isinstance(theirs, float)
    if not (numbers and math.isclose(ours, theirs, rel_tol=1e-12)):
      problems.add(
        f"{path} is {ours!r} in config.json, which these files cannot say: who reads them takes"
        f" {theirs!r}; pass on the checkpoint itself, or make a model with that value"
      )


def _essence(config: SpeechLLMConfig) -> SpeechLLMConfig:
  decoder = config.decoder
  if decoder.lora_rank:
    targets = tuple(name for name in LORA_TARGETS if name in decoder.lora_targets)
    decoder = dataclasses.replace(decoder, lora_targets=targets)
  else:
    none: dict[str, Any] = {
      field.name: field.default
      for field in dataclasses.fields(LLMConfig)
      if field.name.startswith("lora_")
    }
    decoder = dataclasses.replace(decoder, **none)
  encoders = tuple(dataclasses.replace(encoder, dropout=0.0) for encoder in config.encoders)
  connector = config.connector
  if isinstance(connector, QFormerConfig):
    connector = dataclasses.replace(connector, dropout=0.0)
  return config.replace(decoder=decoder, encoders=encoders, connector=connector)
