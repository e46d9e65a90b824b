"""LoRA adapters of one base side by side: each row of a batch is decoded with its own."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import checkpoint, tree
from mooer_jax.checkpoint import Checkpoint, CheckpointError
from mooer_jax.config import SpeechLLMConfig, from_json
from mooer_jax.decoders.llm import LLMConfig


class Adapters(NamedTuple):
  """Adapters in one LoRA whose rank is the sum of theirs.

  Attributes:
    ranks, scales: {name: rank} and {name: scale of training}, in the order of the blocks; None is
      the name of a LoRA of the base itself.
  """

  ranks: dict[str | None, int]
  scales: dict[str | None, float]

  def scale(self, names: Sequence[str | None]) -> np.ndarray:
    """The `lora_scale` of a batch, float32 [B, sum of ranks].

    Args:
      names: of the adapter of each row; None is the base as it is.

    Raises:
      ValueError: for an unknown name.
    """
    if unknown := sorted({name for name in names if name is not None} - self.ranks.keys()):
      known = ", ".join(filter(None, self.ranks))
      raise ValueError(f"no adapter {unknown[0]!r}; there are {known}")
    return np.array(
      [[(n == name) * self.scales[n] for n, r in self.ranks.items() for _ in range(r)]
       for name in names],
      np.float32,
    )  # fmt: skip


def add_adapters(
  params: dict, model: SpeechLLMConfig, base: Checkpoint, folders: Mapping[str, str | Path]
) -> tuple[dict, SpeechLLMConfig, Adapters]:
  """Adds the LoRA of several fine-tunes to the params of their base.

  A rank of one adapter is multiplied by 0 in the rows of the others, which costs little beside the
  base: ranks are small. An adapter replaces a LoRA of the base, since it was trained from that. A
  call without `lora_scale` computes the base without any LoRA.

  Args:
    params, model: the base, per layer, its LoRA not merged.
    base: its checkpoint.
    folders: {name: folder of a checkpoint or run whose trained parameters are all LoRA}.

  Raises:
    FileNotFoundError, CheckpointError: for a folder that is not such a checkpoint; for a base that
      was saved in int8.
  """
  base.check_not_quantized()
  opened = {}
  for name, folder in folders.items():
    try:
      opened[name] = checkpoint.describe(checkpoint.find(folder), base=base.folder)
    except CheckpointError as error:
      raise CheckpointError(
        f"adapter {name!r}: {folder} is not a fine-tune of {base.folder} ({error})"
      ) from error
  for name, about in opened.items():
    if odd := [path for path in about.trained if "/lora_" not in path]:
      raise CheckpointError(
        f"adapter {name!r}: {about.folder} has trained {odd[0]} besides the LoRA; an adapter must"
        " be a LoRA alone (trainable = ('.*lora_.*',)). Load the checkpoint by itself"
      )
  leaves = tree.flatten(params)
  configs: dict[str | None, LLMConfig] = {
    name: from_json(about.config, path=about.folder / "config.json").decoder
    for name, about in opened.items()
  }
  found: dict[str | None, dict] = {
    name: checkpoint.read_leaves(about, [p for p in tree.flatten(about.params) if "/lora_" in p])
    for name, about in opened.items()
  }
  if model.decoder.lora_rank:
    configs = {None: model.decoder, **configs}
    found = {None: {p: np.asarray(x) for p, x in leaves.items() if "/lora_" in p}, **found}
  ranks = {name: config.lora_rank for name, config in configs.items()}
  for layer in sorted({path.rsplit("/", 1)[0] for of in found.values() for path in of}):
    kernel = leaves[f"{layer}/kernel"]
    for part, axis in ("lora_a", 1), ("lora_b", 0):
      blocks = [
        of.get(f"{layer}/{part}", np.zeros(_shape(kernel, ranks[name], axis), np.float32))
        for name, of in found.items()
      ]
      leaves[f"{layer}/{part}"] = jnp.asarray(np.concatenate(blocks, axis), kernel.dtype)
  decoder = dataclasses.replace(
    model.decoder,
    lora_rank=sum(ranks.values()),
    lora_alpha=0.0,
    lora_targets=tuple(sorted({target for c in configs.values() for target in c.lora_targets})),
  )
  model = dataclasses.replace(model, decoder=decoder)
  adapters = Adapters(ranks, {name: config.lora_scale for name, config in configs.items()})
  return tree.unflatten(leaves), model, adapters


def _shape(kernel: jax.Array, rank: int, axis: int) -> tuple[int, int]:
  return (kernel.shape[0], rank) if axis else (rank, kernel.shape[1])
