"""The config.json of Hugging Face's Qwen2 and LLaMA, in and out."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mooer_jax.decoders.llm import LLMConfig

from ..core.errors import Problems
from ..core.folders import without_lora

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
}
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
# Names that transformers has used for the same thing.
_DTYPE_KEYS = ("dtype", "torch_dtype")


def llm_config(hf: Mapping[str, Any]) -> LLMConfig:
  """Reads the content of a config.json. Raises ValueError with all that cannot be expressed."""
  kind, problems = hf.get("model_type"), Problems()
  if kind not in ARCHITECTURES:
    raise ValueError(f"model_type={kind!r}: only {', '.join(ARCHITECTURES)} can be converted")
  for name in hf.get("architectures") or ():
    if name != ARCHITECTURES[kind]:
      problems.add(f"architectures={name!r}: only {ARCHITECTURES[kind]} can be converted")
  _refuse(hf, problems)
  # transformers' defaults where a key is absent.
  rope_theta = _rope(hf).get("rope_theta") or hf.get("rope_theta") or 10000.0
  norm_eps = hf.get("rms_norm_eps", 1e-6)
  for key in (*_SIZES.values(), *_OPTIONAL_SIZES):
    size = hf.get(key)
    if (type(size) is not int or size < 1) and not (size is None and key in _OPTIONAL_SIZES):
      problems.add(f"{key}={size!r}: a whole number above 0 is needed")
  for key, value in (("rope_theta", rope_theta), ("rms_norm_eps", norm_eps)):
    if type(value) not in (int, float) or not 0 < value < math.inf:
      problems.add(f"{key}={value!r}: a number above 0 is needed")
  problems.check("config.json")
  sizes = {ours: hf[theirs] for ours, theirs in _SIZES.items()}
  heads = sizes["heads"]
  head_dim = hf.get("head_dim") or sizes["hidden_size"] // heads
  if kind == "qwen2" and head_dim * heads != sizes["hidden_size"]:
    raise ValueError(f"head_dim={head_dim} times num_attention_heads={heads} is not hidden_size")
  return LLMConfig(
    **sizes,
    kv_heads=hf.get("num_key_value_heads") or (32 if kind == "qwen2" else heads),
    head_dim=head_dim,
    rope_theta=float(rope_theta),
    norm_eps=float(norm_eps),
    qkv_bias=kind == "qwen2",
    tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
  )


def _rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
  """transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling."""
  return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _refuse(hf: Mapping[str, Any], problems: Problems) -> None:
  for key in ("rope_parameters", "rope_scaling"):
    rope = hf.get(key) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or any(isinstance(value, dict) for value in rope.values()):
      problems.add(f"{key}={dict(rope)!r}: only unscaled rotary positions can be expressed")
  places = (hf, hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {})
  if any(place.get("partial_rotary_factor", 1) != 1 for place in places):
    problems.add("partial_rotary_factor: only rotation of whole heads can be expressed")
  if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ()):
    problems.add("use_sliding_window: attention in a window cannot be expressed")
  for key in ("attention_bias", "mlp_bias"):
    if hf.get(key):
      problems.add(f"{key}=true: biases other than Qwen2's on q, k, v cannot be expressed")
  if hf.get("hidden_act", "silu") != "silu":
    problems.add(f"hidden_act={hf['hidden_act']!r}: only 'silu' can be expressed")
  if hf.get("quantization_config"):
    method = hf["quantization_config"].get("quant_method")
    problems.add(f"quantization_config ({method}): quantized weights cannot be converted")


def hf_config(
  config: LLMConfig,
  dtype: np.dtype,
  original: Mapping[str, Any] | None = None,
  *,
  eos_id: int | None = None,
) -> dict[str, Any]:
  """Returns the content of config.json for a model with matrices of this dtype.

  The imported one (`original`) is kept if it still describes the model; another names `eos_id`.
  Raises ValueError if neither Qwen2 nor LLaMA has these sizes.
  """
  kind = "qwen2" if config.qkv_bias else "llama"
  name = np.dtype(dtype).name
  try:
    described = None if original is None else llm_config(original)
  except ValueError:
    described = None
  if original is not None and described == without_lora(config):
    found = [key for key in _DTYPE_KEYS if key in original]
    return {**original, **dict.fromkeys(found, name)}
  if kind == "qwen2" and config.head_dim * config.heads != config.hidden_size:
    raise ValueError(
      f"llm.head_dim={config.head_dim} times llm.heads={config.heads} is not llm.hidden_size="
      f"{config.hidden_size}, which Qwen2 requires; there is no Hugging Face model of this shape"
    )
  sizes = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
  extra = {} if kind == "qwen2" else {"head_dim": config.head_dim}
  if eos_id is not None:
    extra["eos_token_id"] = eos_id
  return {
    "architectures": [ARCHITECTURES[kind]],
    "model_type": kind,
    **sizes,
    **extra,
    "num_key_value_heads": config.kv_heads,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tie_word_embeddings,
    "torch_dtype": name,
  }
