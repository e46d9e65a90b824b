"""GGUF files of LLaMA and Qwen2 models, under the names and in the layout of Hugging Face."""

import collections
import re
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from .gguf_header import GGUFHeader, GGUFTensor, read_header
from .safetensors_file import read_span
from .source import BFLOAT16, ReadError, Source, Tensor

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# llama.cpp turns pairs of rows of LLaMA's q and k into its own order of rotation; not Qwen2's.
_PERMUTED = ("llama",)
_PLAIN = {Kind.F32: np.dtype(np.float32), Kind.F16: np.dtype(np.float16), Kind.BF16: BFLOAT16}
_QUANTIZED = (
  Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K,
  Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS,
)  # fmt: skip
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", re.ASCII)
# Metadata under the architecture's name that `gguf_config` uses, or that do not matter.
_KNOWN_KEYS = (
  "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
  "attention.head_count", "attention.head_count_kv", "attention.key_length",
  "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
  "rope.freq_base",
)  # fmt: skip


def open_gguf(path: Path) -> Source:
  """Opens a GGUF file of a LLaMA or Qwen2 model.

  Names, shapes and the order of rows are Hugging Face's. F32, F16 and BF16 keep their bits.
  Quantized tensors are expanded to float32, which a note of the source says.

  Raises:
    ReadError: if the file is broken, of another architecture, or has other tensors or types.
  """
  header = read_header(path)
  config = _config(header)
  entries, quantized = [], collections.Counter[str]()
  for tensor in header.tensors:
    name = _hf_name(path, tensor.name)
    heads, where = _permuted_heads(config, name), f"{path}: tensor {tensor.name!r}"
    if heads and (not tensor.shape or tensor.shape[0] % (2 * heads)):
      raise ReadError(f"{where} of shape {list(tensor.shape)} cannot be cut into {heads} heads")
    if tensor.kind not in (*_PLAIN, *_QUANTIZED):
      supported = ", ".join(kind.name for kind in (*_PLAIN, *_QUANTIZED))
      raise ReadError(f"{where} has the type {tensor.kind.name}; supported are {supported}")
    if tensor.kind in _QUANTIZED:
      quantized[tensor.kind.name] += 1
    dtype = _PLAIN.get(tensor.kind, np.dtype(np.float32))
    described = Tensor(name, tensor.shape, dtype, path)
    entries.append((described, partial(_read, tensor, described, heads)))
  notes = []
  if quantized:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(quantized.items()))
    notes.append(
      f"{path.name}: {kinds} tensors of {len(entries)} are expanded to float32; an export writes"
      " float32"
    )
  return Source(path, entries, notes=notes)


def gguf_config(path: str | Path) -> dict[str, Any]:
  """Returns Hugging Face's config.json. Raises ReadError for settings such as scaled RoPE."""
  return _config(read_header(Path(path)))


def _config(header: GGUFHeader) -> dict[str, Any]:
  path = header.path
  arch = header.get("general.architecture", str)
  if arch not in ARCHITECTURES:
    raise ReadError(f"{path}: architecture {arch!r}; supported are {', '.join(ARCHITECTURES)}")
  _refuse_unknown_settings(header, arch)
  shapes = {tensor.name: tensor.shape for tensor in header.tensors}
  if len(shapes.get("token_embd.weight", ())) != 2:
    raise ReadError(f"{path}: no table of embeddings (token_embd.weight)")

  def whole(key, default=None):
    value = header.get(f"{arch}.{key}", int, default)
    if not 0 < value < 1 << 31:
      raise ReadError(f"{path}: the metadata's {arch}.{key} is {value}")
    return value

  def real(key, default=None):
    # The shortest decimal of a float32: 1e-05 rather than 9.999999747378752e-06.
    return float(str(np.float32(header.get(f"{arch}.{key}", float, default))))

  width, heads = whole("embedding_length"), whole("attention.head_count")
  head_dim = whole("attention.key_length", width // heads)
  for key in ("attention.value_length", "rope.dimension_count"):
    if whole(key, head_dim) != head_dim:
      raise ReadError(
        f"{path}: {arch}.{key} is {whole(key)}, which must be the width of a head, {head_dim}"
      )
  config = {
    "architectures": [ARCHITECTURES[arch]],
    "model_type": arch,
    "vocab_size": shapes["token_embd.weight"][0],
    "hidden_size": width,
    "intermediate_size": whole("feed_forward_length"),
    "num_hidden_layers": whole("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": whole("attention.head_count_kv", heads),
    "head_dim": head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": real("attention.layer_norm_rms_epsilon"),
    "rope_theta": real("rope.freq_base", 10000.0),
    "max_position_embeddings": whole("context_length"),
    "tie_word_embeddings": "output.weight" not in shapes,
  }
  if arch == "llama":
    config["attention_bias"] = "blk.0.attn_q.bias" in shapes
  for name in ("bos", "eos"):
    key = f"tokenizer.ggml.{name}_token_id"
    if key in header.metadata:
      config[f"{name}_token_id"] = header.get(key, int)
  return config


def _refuse_unknown_settings(header: GGUFHeader, arch: str):
  scaling = header.metadata.get(f"{arch}.rope.scaling.type", "none")
  known = {f"{arch}.{key}" for key in _KNOWN_KEYS}
  if scaling == "none":
    known.add(f"{arch}.rope.scaling.type")
  unknown = [
    key
    for key, value in header.metadata.items()
    if key.startswith(f"{arch}.") and key not in known and value not in (0, False, "")
  ]
  unknown += [t.name for t in header.tensors if t.name.startswith("rope_")]
  if unknown:
    raise ReadError(
      f"{header.path}: settings of {arch} that are not supported: {', '.join(unknown[:8])}"
    )


def _hf_name(path: Path, name: str) -> str:
  outer, _, suffix = name.rpartition(".")
  if outer in _OUTER and suffix == "weight":
    return f"{_OUTER[outer]}.weight"
  match = _LAYER_NAME.fullmatch(name)
  if not match or match[2] not in _INNER:
    raise ReadError(f"{path}: tensor {name!r} belongs to no LLaMA or Qwen2 model")
  return f"model.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"


def _permuted_heads(config: dict[str, Any], name: str) -> int:
  """Heads whose rows llama.cpp permuted; 0 for other tensors."""
  if config["model_type"] not in _PERMUTED:
    return 0
  if ".self_attn.q_proj." in name:
    return config["num_attention_heads"]
  return config["num_key_value_heads"] if ".self_attn.k_proj." in name else 0


def _read(tensor: GGUFTensor, described: Tensor, heads: int) -> np.ndarray:
  if tensor.kind in _PLAIN:
    values = read_span(described, tensor.offset)
  else:
    stored = Tensor(tensor.name, (tensor.nbytes,), np.dtype(np.uint8), described.file)
    blocks = read_span(stored, tensor.offset).reshape(*tensor.shape[:-1], -1)
    with np.errstate(all="ignore"):  # `Source.read` names values that are not finite
      values = np.ascontiguousarray(gguf.dequantize(blocks, tensor.kind), np.float32)
  if heads:
    # Within a head, rows of the two halves that rotate together alternate.
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
  return values
