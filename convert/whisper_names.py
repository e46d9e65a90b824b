"""What Whisper's encoder is called by Hugging Face, openai-whisper and CTranslate2."""

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from .errors import Problems
from .readers import Source, Tensor
from .rules import Rule, Table
from .transforms import CONVOLUTION, IDENTITY, TRANSPOSE, Transform

ROOT = "encoders/whisper"
PREFIX = "model.encoder."
# What stands before the encoder's names: in a whole model, in one without its head, in the encoder.
PREFIXES = (PREFIX, "encoder.", "")
# (ours, Hugging Face, openai-whisper, CTranslate2)
_MODULES = (
  ("conv{x:1|2}", "conv{x:1|2}", "conv{x:1|2}", "conv{x:1|2}"),
  ("layers_{n}/attention_norm", "layers.{n}.self_attn_layer_norm", "blocks.{n}.attn_ln",
   "layer_{n}/self_attention/layer_norm"),
  ("layers_{n}/attention/q", "layers.{n}.self_attn.q_proj", "blocks.{n}.attn.query", None),
  ("layers_{n}/attention/k", "layers.{n}.self_attn.k_proj", "blocks.{n}.attn.key", None),
  ("layers_{n}/attention/v", "layers.{n}.self_attn.v_proj", "blocks.{n}.attn.value", None),
  ("layers_{n}/attention/out", "layers.{n}.self_attn.out_proj", "blocks.{n}.attn.out",
   "layer_{n}/self_attention/linear_1"),
  ("layers_{n}/mlp_norm", "layers.{n}.final_layer_norm", "blocks.{n}.mlp_ln",
   "layer_{n}/ffn/layer_norm"),
  ("layers_{n}/mlp/up", "layers.{n}.fc1", "blocks.{n}.mlp.0", "layer_{n}/ffn/linear_0"),
  ("layers_{n}/mlp/down", "layers.{n}.fc2", "blocks.{n}.mlp.2", "layer_{n}/ffn/linear_1"),
  ("final_norm", "layer_norm", "ln_post", "layer_norm"),
)  # fmt: skip
_POSITIONS = ("embed_positions.weight", "positional_embedding", "position_encodings/encodings")
_FUSED = re.compile(r"encoder/layer_(0|[1-9]\d*)/self_attention/linear_0/(weight|bias)")
HEADS = "encoder/num_heads"


def table(prefix: str = PREFIX, *, openai: bool = False) -> Table:
  """The rules for Hugging Face's names behind a prefix, or for openai-whisper's."""
  column = 2 if openai else 1
  rules = [Rule(prefix + _POSITIONS[column - 1], f"{ROOT}/positions")]
  for module in _MODULES:
    ours, theirs = f"{ROOT}/{module[0]}".replace("{x:1|2}", "{x}"), f"{prefix}{module[column]}"
    leaf, transform = _weight(module[0])
    rules.append(Rule(f"{theirs}.weight", f"{ours}/{leaf}", transform))
    if not ours.endswith("/k"):
      rules.append(Rule(f"{theirs}.bias", f"{ours}/bias"))
  return Table(rules)


def _weight(module: str) -> tuple[str, Transform]:
  if module.endswith("norm"):
    return "scale", IDENTITY
  return "kernel", CONVOLUTION if module.startswith("conv") else TRANSPOSE


def _renaming() -> Table:
  """CTranslate2's names to Hugging Face's, but for the fused q, k and v."""
  rules = [Rule(f"encoder/{_POSITIONS[2]}", f"{PREFIX}{_POSITIONS[0]}")]
  for ours, theirs, _, fast in _MODULES:
    if fast is not None:
      names = ("gamma", "beta") if ours.endswith("norm") else ("weight", "bias")
      theirs = theirs.replace("{x:1|2}", "{x}")
      for name, other in zip(names, ("weight", "bias")):
        rules.append(Rule(f"encoder/{fast}/{name}", f"{PREFIX}{theirs}.{other}"))
  return Table(rules)


def find_format(source: Source) -> tuple[str, str] | None:
  """("hf", prefix), ("openai", prefix) or ("ctranslate2", prefix): by the names, else None."""
  names = source.tensors
  # The first layer as well as the convolution, for speech models of other families have the latter.
  if {"encoder/conv1/weight", "encoder/layer_0/self_attention/layer_norm/gamma"} <= names.keys():
    return "ctranslate2", "encoder/"
  if {"encoder.conv1.weight", "encoder.blocks.0.attn_ln.weight"} <= names.keys():
    return "openai", "encoder."
  for prefix in PREFIXES:
    if {f"{prefix}conv1.weight", f"{prefix}layers.0.self_attn_layer_norm.weight"} <= names.keys():
      return "hf", prefix
  return None


def split_ctranslate2(source: Source, problems: Problems) -> Source:
  """CTranslate2's encoder under Hugging Face's names, q, k and v by themselves."""
  renaming = _renaming()

  def entries() -> Iterator[tuple[Tensor, Any]]:
    for name, tensor in source.tensors.items():
      if not name.startswith("encoder/") or name == HEADS:
        continue
      fused = _FUSED.fullmatch(name)
      if fused is None or not tensor.shape or tensor.shape[0] % 3:
        known = renaming.to_jax(name)
        yield dataclasses.replace(tensor, name=known[0] if known else name), _rows(source, name)
        continue
      width = tensor.shape[0] // 3
      for n, part in enumerate("qkv"):
        rows = _rows(source, name, slice(n * width, (n + 1) * width))
        if (part, fused[2]) == ("k", "bias"):
          if rows().any():
            problems.add(
              f"{source.path}: {name} gives the keys a bias, which Whisper does not have"
            )
          continue
        theirs = f"{PREFIX}layers.{fused[1]}.self_attn.{part}_proj.{fused[2]}"
        yield dataclasses.replace(tensor, name=theirs, shape=(width, *tensor.shape[1:])), rows

  return Source(source.path, entries(), notes=source.notes)


def _rows(source: Source, name: str, rows: slice = slice(None)):
  return partial(_read_rows, source, name, rows)


def _read_rows(source: Source, name: str, rows: slice) -> np.ndarray:
  array = source.read(name)
  return array[rows] if array.ndim else array
