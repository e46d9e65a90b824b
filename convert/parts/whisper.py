"""Whisper's encoder: folders of Hugging Face, openai-whisper's .pt, faster-whisper's folders."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.checkpoint import Checkpoint
from mooer_jax.encoders.whisper import STRIDE, WhisperConfig

from ..core.engine import map_in, map_out, paths_of, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import copier, encoder_of, kept_files, kept_json, style_of, write_json
from ..core.kind import Kind, Part
from ..core.rules import CONVOLUTION, IDENTITY, TRANSPOSE, Rule, Table
from ..core.shapes import count_layers, encoder_shapes, shape_of
from ..core.writers import write_shards
from ..readers import Source, Tensor, open_source, read_object
from ..readers.torch_file import read_dict
from ..verify.reference import whisper as reference

ROOT = "encoders/whisper"
PREFIX = "model.encoder."
# Prefixes of the encoder's names: in a whole model, in one without its head, in the encoder.
PREFIXES = (PREFIX, "encoder.", "")
# (ours, Hugging Face, openai-whisper, CTranslate2)
_MODULES = (
  ("conv{x:1|2}", "conv{x:1|2}", "conv{x:1|2}", "conv{x:1|2}"),
  ("layers_{n}/attention_norm", "layers.{n}.self_attn_layer_norm", "blocks.{n}.attn_ln",
   "layer_{n}/self_attention/layer_norm"),
  ("layers_{n}/attention/q", "layers.{n}.self_attn.q_proj", "blocks.{n}.attn.query",
   "layer_{n}/self_attention/q"),
  ("layers_{n}/attention/k", "layers.{n}.self_attn.k_proj", "blocks.{n}.attn.key",
   "layer_{n}/self_attention/k"),
  ("layers_{n}/attention/v", "layers.{n}.self_attn.v_proj", "blocks.{n}.attn.value",
   "layer_{n}/self_attention/v"),
  ("layers_{n}/attention/out", "layers.{n}.self_attn.out_proj", "blocks.{n}.attn.out",
   "layer_{n}/self_attention/linear_1"),
  ("layers_{n}/mlp_norm", "layers.{n}.final_layer_norm", "blocks.{n}.mlp_ln",
   "layer_{n}/ffn/layer_norm"),
  ("layers_{n}/mlp/up", "layers.{n}.fc1", "blocks.{n}.mlp.0", "layer_{n}/ffn/linear_0"),
  ("layers_{n}/mlp/down", "layers.{n}.fc2", "blocks.{n}.mlp.2", "layer_{n}/ffn/linear_1"),
  ("final_norm", "layer_norm", "ln_post", "layer_norm"),
)  # fmt: skip
_POSITIONS = ("positions", "embed_positions.weight", "positional_embedding",
              "position_encodings/encodings")  # fmt: skip
# CTranslate2 joins q, k and v; `split_qkv` makes three tensors of them.
_FUSED = re.compile(r"(encoder/layer_\d+/self_attention)/linear_0/(weight|bias)", re.ASCII)
HEADS = "encoder/num_heads"
# Places of the number of heads, by format.
_HEADS = {"hf": "encoder_attention_heads", "openai": "dims with n_audio_head", "ctranslate2": HEADS}
KEPT_FILES = ("config.json", "preprocessor_config.json")
# WhisperConfig's fields as Hugging Face's config.json names them.
_SIZES = {
  "input_width": "num_mel_bins",
  "hidden_size": "d_model",
  "layers": "encoder_layers",
  "heads": "encoder_attention_heads",
  "intermediate_size": "encoder_ffn_dim",
  "positions": "max_source_positions",
}


def table(prefix: str = PREFIX, *, style: str = "hf") -> Table:
  """Rules for names after a prefix: of Hugging Face ("hf"), "openai" or "ctranslate2"."""
  column = ("hf", "openai", "ctranslate2").index(style) + 1
  rules = [Rule(prefix + _POSITIONS[column], f"{ROOT}/{_POSITIONS[0]}")]
  for module in _MODULES:
    ours, theirs = f"{ROOT}/{module[0]}".replace("{x:1|2}", "{x}"), prefix + module[column]
    leaf, transform = "kernel", CONVOLUTION if module[0].startswith("conv") else TRANSPOSE
    names = (".weight", ".bias") if style != "ctranslate2" else ("/weight", "/bias")
    if ours.endswith("norm"):
      leaf, transform = "scale", IDENTITY
      names = names if style != "ctranslate2" else ("/gamma", "/beta")
    rules.append(Rule(theirs + names[0], f"{ours}/{leaf}", transform))
    if not ours.endswith("/k"):
      rules.append(Rule(theirs + names[1], f"{ours}/bias"))
  return Table(rules)


def find_format(names: Collection[str]) -> tuple[str, str] | None:
  """Returns ("hf", prefix), ("openai", prefix) or ("ctranslate2", prefix) by the names, or None."""
  # The first layer as well as the convolution: other families of speech models have the latter.
  for style, prefix, *needed in (
    ("ctranslate2", "encoder/", "conv1/weight", "layer_0/self_attention/layer_norm/gamma"),
    ("openai", "encoder.", "conv1.weight", "blocks.0.attn_ln.weight"),
    *(("hf", p, "conv1.weight", "layers.0.self_attn_layer_norm.weight") for p in PREFIXES),
  ):
    if {prefix + name for name in needed} <= {*names}:
      return style, prefix
  return None


def split_qkv(source: Source, problems: Problems) -> Source:
  """Splits CTranslate2's joint q, k and v, without the zeros that it has as the bias of k."""
  entries: list[tuple[Tensor, Any]] = []
  for name, tensor in source.tensors.items():
    fused = _FUSED.fullmatch(name)
    if fused is None or not tensor.shape or tensor.shape[0] % 3:
      entries.append((tensor, partial(source.read, name)))
      continue
    shape = (tensor.shape[0] // 3, *tensor.shape[1:])
    for n, part in enumerate("qkv"):
      if (part, fused[2]) == ("k", "bias"):
        if _third(source, name, n).any():
          problems.add(f"{source.path}: {name} has a bias of the keys, unlike Whisper")
        continue
      split = dataclasses.replace(tensor, name=f"{fused[1]}/{part}/{fused[2]}", shape=shape)
      entries.append((split, partial(_third, source, name, n)))
  return Source(source.path, entries, notes=source.notes, ignored=source.ignored)


def _third(source: Source, name: str, n: int) -> np.ndarray:
  return np.split(source.read(name), 3)[n]


def open_encoder(src: Path, problems: Problems) -> Part:
  """Maps the encoder of a Whisper model; tensors of the decoder are listed as ignored."""
  source = open_source(src)
  found = find_format(source.tensors)
  if found is None:
    raise ConversionError(
      f"{src}: no Whisper encoder in it: no conv1 and first layer by any known names"
    )
  style, prefix = found
  described: dict[str, Any] = {}
  kept: tuple[Path, ...] = ()
  if style == "ctranslate2":
    heads = int(source.read(HEADS).max(initial=0)) if HEADS in source.tensors else None
    source = split_qkv(source, problems)
  elif style == "openai":
    file = next(iter(source.tensors.values())).file
    heads = (read_dict(file, "dims") or {}).get("n_audio_head")
  else:
    if not (src / "config.json").is_file():
      raise ConversionError(
        f"{src}: no config.json, which holds the number of heads; give the folder"
      )
    described = read_object(src / "config.json")
    heads = described.get(_SIZES["heads"])
    kept = tuple(src / name for name in KEPT_FILES if (src / name).is_file())
  rules = table(prefix, style=style)
  if type(heads) is not int:
    raise ConversionError(
      f"{source.path}: number of heads is {heads!r}; no {_HEADS[style]} beside the weights"
    )
  config = _sizes(source, rules, heads)
  if style == "hf":
    _check_config(described, config, problems)
  frontend = features_of(config)
  if (src / KEPT_FILES[1]).is_file():
    _check_features(read_object(src / KEPT_FILES[1]), frontend, problems)
  names = [name for name in source.tensors if name.startswith(prefix) and name != HEADS]
  outside = [name for name in source.tensors if not name.startswith(prefix)]
  return Part(
    config=config,
    leaves=map_in(source, rules, encoder_shapes(config), problems=problems, names=names).leaves,
    style={"whisper": {"format": style, "prefix": prefix if style == "hf" else PREFIX}},
    frontend=frontend,
    kept={"whisper": kept},
    ignored=(*outside, *source.ignored),
    notes=source.notes,
  )


def features_of(config: WhisperConfig) -> LogMelConfig:
  """The features of an encoder, for clips as long as its positions reach."""
  frontend = LogMelConfig(bins=config.input_width)
  samples = config.positions * STRIDE * frontend.hop_length
  return dataclasses.replace(frontend, chunk_s=samples / frontend.sample_rate_hz)


def _sizes(source: Source, rules: Table, heads: int) -> WhisperConfig:
  """Derives the sizes from the shapes of the tensors, which do not show the number of heads."""
  found = []
  for path, axes in (("conv1/kernel", 3), ("positions", 2), ("layers_0/mlp/up/kernel", 2)):
    name, transform = rules.to_torch(f"{ROOT}/{path}") or ("", IDENTITY)
    found.append(transform.shape(shape_of(source, name, axes)))
  (_, bins, width), (positions, _), (_, intermediate_size) = found
  return WhisperConfig(
    input_width=bins,
    hidden_size=width,
    layers=count_layers(source, rules),
    heads=heads,
    intermediate_size=intermediate_size,
    positions=positions,
    context=positions,
  )


def _check_config(hf: Mapping[str, Any], config: WhisperConfig, problems: Problems) -> None:
  """Refuses options that our encoder does not have, and a config.json of another model."""
  for key, value in (("model_type", "whisper"), ("activation_function", "gelu")):
    if hf.get(key, value) != value:
      problems.add(f"config.json: {key}={hf[key]!r}: only {value!r} can be converted")
  if hf.get("quantization_config"):
    problems.add("config.json: quantization_config: quantized weights cannot be converted")
  for ours, theirs in _SIZES.items():
    if hf.get(theirs) != getattr(config, ours):
      problems.add(
        f"config.json: {theirs}={hf.get(theirs)!r}, but the weights have {getattr(config, ours)}"
      )


def _check_features(described: Mapping[str, Any], ours: LogMelConfig, problems: Problems) -> None:
  wanted = {
    "feature_size": ours.bins,
    "sampling_rate": ours.sample_rate_hz,
    "n_fft": ours.frame_length,
    "hop_length": ours.hop_length,
    "chunk_length": ours.chunk_s,
    "dither": 0,
  }
  for key, value in wanted.items():
    if described.get(key, value) != value:
      problems.add(f"{KEPT_FILES[1]}: {key}={described[key]!r}: only {value!r} fits this encoder")


def hf_config(
  config: WhisperConfig, dtype: np.dtype, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Returns the config.json of a Whisper model with this encoder and matrices of this dtype.

  The imported one (`original`) is kept if it describes the encoder; another has no decoder layers.
  """
  name = np.dtype(dtype).name
  sizes = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
  if original is not None and all(original.get(key) == size for key, size in sizes.items()):
    found = [key for key in ("dtype", "torch_dtype") if key in original]
    return {**original, **dict.fromkeys(found, name)}
  return {
    "architectures": ["WhisperModel"],
    "model_type": "whisper",
    **sizes,
    "decoder_layers": 0,
    "decoder_attention_heads": config.heads,
    "decoder_ffn_dim": config.intermediate_size,
    "activation_function": "gelu",
    "torch_dtype": name,
  }


def export(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  """Writes Hugging Face's files. Raises ConversionError if they cannot express the encoder."""
  config, _ = encoder_of(about, WhisperConfig.kind)
  if config.norm_eps != WhisperConfig.norm_eps:
    raise ConversionError(
      f"{about.folder}: whisper.norm_eps={config.norm_eps}; Hugging Face's is 1e-5"
    )
  prefix = style_of(about, "whisper").get("prefix", PREFIX)
  tensors = map_out(about, table(prefix), paths_of(about, f"{ROOT}/"))
  copier(kept_files(about, "whisper"))(folder)
  original = kept_json(about, "whisper", "config.json")
  dtype = next(tensor.dtype for tensor in tensors if tensor.name == f"{prefix}conv1.weight")
  write_json(folder / "config.json", hf_config(config, dtype, original))
  write_shards(folder, tensors, read_out(about, tensors), shard_bytes=shard_bytes)


KIND = Kind(
  name="whisper",
  open=lambda src, options, problems: open_encoder(src, problems).alone(),
  export=export,
  sharded=True,
  recognises=lambda path, names: "whisper" if find_format(names) else None,
  parts=(f"{ROOT}/",),
  reference=reference.run,
)
