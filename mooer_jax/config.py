"""Configurations: ConfigDict in, frozen dataclasses out; named sizes; the model's JSON form."""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from mooer_jax.audio.decode import Channel
from mooer_jax.audio.frontend import Frontend, FrontendConfig, num_frames
from mooer_jax.audio.frontend import width as frontend_width
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.connectors.qformer import QFORMER_SIZES, QFormerConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.beats import BEATS_FRONTEND, BEATS_SIZES, BEATsConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.encoders.whisper import WHISPER_SIZES, WhisperConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.prompts import TASKS, TEMPLATES

Encoder = SANMConfig | WhisperConfig | BEATsConfig
Connector = LinearConfig | QFormerConfig
ENCODERS: dict[str, Encoder] = {"sanm_large": SANMConfig(), **WHISPER_SIZES, **BEATS_SIZES}
CONNECTORS: dict[str, Connector] = {"linear": LinearConfig(), **QFORMER_SIZES}
_LLAMA = LLMConfig(
  vocab_size=32000,
  hidden_size=4096,
  layers=32,
  heads=32,
  kv_heads=32,
  intermediate_size=11008,
  rope_theta=1e4,
  norm_eps=1e-5,
  qkv_bias=False,
)
DECODERS = {
  "qwen2_7b": LLMConfig(),
  "qwen2_1.5b": LLMConfig(
    vocab_size=151936,
    hidden_size=1536,
    heads=12,
    kv_heads=2,
    intermediate_size=8960,
    tie_word_embeddings=True,
  ),
  "qwen2_0.5b": LLMConfig(
    vocab_size=151936,
    hidden_size=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_dim=64,
    intermediate_size=4864,
    tie_word_embeddings=True,
  ),
  "vicuna_7b": _LLAMA,  # v1.5
  "vicuna_13b": dataclasses.replace(  # v1.1
    _LLAMA,
    hidden_size=5120,
    layers=40,
    heads=40,
    kv_heads=40,
    intermediate_size=13824,
    norm_eps=1e-6,
  ),
  "smollm2_135m": LLMConfig(
    vocab_size=49152,
    hidden_size=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    rope_theta=1e5,
    norm_eps=1e-5,
    qkv_bias=False,
    tie_word_embeddings=True,
  ),
}
_PARTS = (SANMConfig, WhisperConfig, BEATsConfig, LinearConfig, QFormerConfig, LLMConfig)
KINDS = {c.kind: c for c in _PARTS}
_FRONTENDS: dict[str, type[Frontend]] = {c.kind: c for c in (FrontendConfig, LogMelConfig)}


@dataclasses.dataclass(frozen=True)
class SpeechLLMConfig:
  """What the model is (travels with the checkpoint) and how it is run (`compute`, does not).

  Attributes:
    encoders: of different kinds; their frames stand side by side, on the channel axis.
    encoder_norm: whether each encoder's frames pass a LayerNorm of their own (SALMONN).
    frontends: how each encoder's features are made, in the order of encoders.
    chat_template: a name in prompts.TEMPLATES; where the speech stands in the prompt.
    max_audio_s: longest clip that the model takes, seconds.
    min_audio_s: silence follows shorter clips up to this length, seconds (SALMONN: 1).
    channel: what is heard of a clip with several: their "mean", or the "first" (SALMONN).
    prompts: (task, prompt) pairs; what the model is asked unless it is told otherwise.
  """

  RENAMED: ClassVar = {"template": "chat_template"}
  encoders: tuple[Encoder, ...] = (SANMConfig(),)
  connector: Connector = LinearConfig()
  decoder: LLMConfig = LLMConfig()
  frontends: tuple[Frontend, ...] = (FrontendConfig(),)
  encoder_norm: bool = False
  chat_template: str = "mooer"
  max_audio_s: float = 30.0
  min_audio_s: float = 0.0
  channel: Channel = "mean"
  prompts: tuple[tuple[str, str], ...] = tuple(TASKS.items())
  compute: ExecutionConfig = ExecutionConfig()

  def __post_init__(self):
    kinds = [encoder.kind for encoder in self.encoders]
    if not kinds or len(set(kinds)) < len(kinds):
      raise ValueError(f"model.encoders={kinds}: give one or more, each of a kind of its own")
    rates = {frontend.sample_rate_hz for frontend in self.frontends}
    if len(rates) > 1:
      raise ValueError(f"all front ends must use the same sample rate; got {sorted(rates)} Hz")
    heard = 0  # encoder frames of the longest clip
    for encoder, frontend in zip(self.encoders, self.frontends, strict=True):
      if encoder.input_width != frontend_width(frontend):
        raise ValueError(
          f"{encoder.kind}.input_width={encoder.input_width}, but its features are"
          f" {frontend_width(frontend)} wide; set both alike"
        )
      longest = num_frames(int(self.max_audio_s * frontend.sample_rate_hz), frontend)
      if encoder.max_frames is not None and longest > encoder.max_frames:
        raise ValueError(
          f"model.max_audio_s={self.max_audio_s:g} makes {longest} frames, but {encoder.kind} takes"
          f" {encoder.max_frames}; lower max_audio_s"
        )
      heard = max(heard, encoder.num_outputs(longest))
    if not self.connector.num_tokens(heard):
      name = "window" if isinstance(self.connector, QFormerConfig) else "stack"
      raise ValueError(
        f"{self.connector.kind}.{name}={getattr(self.connector, name)} is longer than the audio:"
        f" model.max_audio_s={self.max_audio_s:g} makes {heard} encoder frames and no speech token;"
        f" lower {self.connector.kind}.{name}, or raise max_audio_s"
      )
    if self.chat_template not in TEMPLATES:
      raise ValueError(
        f"model.chat_template={self.chat_template!r}: choose one of {sorted(TEMPLATES)}"
      )

  @property
  def sample_rate_hz(self) -> int:
    """Sample rate of the waveforms; all front ends share it."""
    return self.frontends[0].sample_rate_hz

  def pad_to_min_duration(self, waveform_N: np.ndarray) -> np.ndarray:
    """Appends silence to a clip shorter than min_audio_s."""
    missing = round(self.min_audio_s * self.sample_rate_hz) - len(waveform_N)
    return np.pad(waveform_N, (0, missing)) if missing > 0 else waveform_N

  def replace(self, **changes) -> "SpeechLLMConfig":
    return dataclasses.replace(self, **changes)

  def with_compute(self, **changes) -> "SpeechLLMConfig":
    return self.replace(compute=dataclasses.replace(self.compute, **changes))


def model_config(model: Mapping[str, Any], compute: Mapping[str, Any] | None = None):
  """Reads the `model` and `compute` sections of a config into a SpeechLLMConfig.

  `model.encoders`, `.connector` and `.decoder` are named sizes; sections named after a kind
  (`model.sanm`, `model.linear`, `model.llm`) override single values of them, and those in
  `model.frontends`, named after the encoder, of its features.

  Raises:
    ValueError: for an unknown name or key, a wrong type, or sizes that do not fit together.
  """
  fields = dict(with_new_names(model, SpeechLLMConfig.RENAMED, "model"))
  sections = {name: fields.pop(name, {}) for name in (*KINDS, "frontends")}
  parts = [field.name for field in dataclasses.fields(SpeechLLMConfig)]
  known = [name for name in parts if name not in ("frontends", "compute")]
  for key in fields:
    if key not in known:
      raise ValueError(unknown_key(f"model.{key}", [*known, *sections]))
  for key in ("encoders", "connector", "decoder"):
    if key not in fields:
      raise ValueError(f"model.{key} is missing: name a size")
  names = fields["encoders"]
  if isinstance(names, str):
    raise ValueError(f"model.encoders={names!r}: a tuple of names, such as ({names!r},)")
  fields["encoders"] = tuple(_named(ENCODERS, n, "model.encoders", sections) for n in names)
  fields["connector"] = _named(CONNECTORS, fields["connector"], "model.connector", sections)
  fields["decoder"] = _named(DECODERS, fields["decoder"], "model.decoder", sections)
  for kind in sections["frontends"]:
    if kind not in (allowed := [encoder.kind for encoder in fields["encoders"]]):
      raise ValueError(unknown_key(f"model.frontends.{kind}", allowed))
  fields["frontends"] = tuple(
    build(type(base), sections["frontends"].get(e.kind, {}), f"model.frontends.{e.kind}", base)
    for e, base in ((e, default_frontend(e)) for e in fields["encoders"])
  )
  fields["compute"] = build(ExecutionConfig, compute or {}, "compute")
  if "prompts" in fields:
    fields["prompts"] = tuple(dict(fields["prompts"]).items())
  return build(SpeechLLMConfig, fields, "model")


def default_frontend(encoder: Encoder) -> Frontend:
  """The features that an encoder was made for."""
  if isinstance(encoder, WhisperConfig):
    frontend = LogMelConfig(bins=encoder.input_width)
    samples = encoder.max_frames * frontend.hop_length
    return dataclasses.replace(frontend, chunk_s=samples / frontend.sample_rate_hz)
  if isinstance(encoder, BEATsConfig):
    return BEATS_FRONTEND
  return FrontendConfig()


def _named(table, name, where, sections):
  if not isinstance(name, str) or name not in table:
    raise ValueError(f"{where}={name!r}: choose one of {sorted(table)}")
  base = table[name]
  return build(type(base), sections[base.kind], f"model.{base.kind}", base)


def part_to_json(part: Encoder | Connector | LLMConfig | Frontend) -> dict[str, Any]:
  """An encoder, its features, a connector or decoder as it stands in config.json."""
  return {**dataclasses.asdict(part), "kind": part.kind}


def part_from_json(section: Mapping[str, Any], name: str) -> Any:
  """Inverse of part_to_json; `name` is the section's, for messages.

  Raises:
    ValueError: for an unknown kind, an unknown key or a wrong type.
  """
  return _from_kind(KINDS, section, name)


def frontend_from_json(section: Mapping[str, Any], name: str) -> Frontend:
  """Inverse of part_to_json for what makes an encoder's features; raises as part_from_json."""
  # Checkpoints of version 0.1 named no kind; there was only this one.
  return _from_kind(_FRONTENDS, {"kind": FrontendConfig.kind, **section}, name)


def _from_kind(kinds: Mapping[str, type], section: Mapping[str, Any], name: str) -> Any:
  section = dict(section)
  kind = section.pop("kind", None)
  if kind not in kinds:
    raise ValueError(f"{name}.kind={kind!r}: this version knows {sorted(kinds)}")
  section = dict(with_new_names(section, getattr(kinds[kind], "RENAMED", {})))
  return build(kinds[kind], section, name)


def to_json(config: SpeechLLMConfig) -> dict[str, Any]:
  """The model's part of a checkpoint's config.json; `compute` stays out."""
  fields = dataclasses.asdict(dataclasses.replace(config, compute=ExecutionConfig()))
  del fields["compute"]
  for name in ("encoders", "frontends"):
    fields[name] = tuple(part_to_json(part) for part in getattr(config, name))
  fields["connector"] = part_to_json(config.connector)
  fields["decoder"] = part_to_json(config.decoder)
  fields["prompts"] = dict(config.prompts)
  return fields


def from_json(fields: Mapping[str, Any], compute: ExecutionConfig | None = None) -> SpeechLLMConfig:
  """Inverse of to_json.

  Raises:
    ValueError: for a part of unknown kind, an unknown key or a wrong type.
  """
  fields = dict(fields)
  for name in ("encoders", "frontends", "connector", "decoder", "prompts"):
    if name not in fields:
      raise ValueError(
        f"config.json has no {name!r}: it is of a part of a speech LLM ({', '.join(fields)}), or"
        " is damaged"
      )
  fields["encoders"] = tuple(
    part_from_json(section, f"encoders[{i}]") for i, section in enumerate(fields["encoders"])
  )
  fields["frontends"] = tuple(
    frontend_from_json(section, f"frontends[{i}]") for i, section in enumerate(fields["frontends"])
  )
  for name in ("connector", "decoder"):
    fields[name] = part_from_json(fields[name], name)
  fields["prompts"] = tuple(fields["prompts"].items())
  fields = with_new_names(fields, SpeechLLMConfig.RENAMED)
  return build(SpeechLLMConfig, {**fields, "compute": compute or ExecutionConfig()}, "config.json")


def differences(a: SpeechLLMConfig, b: SpeechLLMConfig) -> dict[str, tuple[Any, Any]]:
  """What two models differ in: {path in config.json: (a's value, b's value)}."""
  return json_differences(to_json(a), to_json(b))


def json_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """What two config.json differ in: {path: (a's value, b's value)}."""
  of_a, of_b = _leaves(a), _leaves(b)
  paths = sorted({*of_a, *of_b})
  return {p: (of_a.get(p), of_b.get(p)) for p in paths if of_a.get(p) != of_b.get(p)}


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
  if not isinstance(value, (dict, list, tuple)):
    return {path: value}
  items = value.items() if isinstance(value, dict) else enumerate(value)
  found: dict[str, Any] = {}
  for key, inner in items:
    found |= _leaves(inner, f"{path}/{key}" if path else str(key))
  return found


T = TypeVar("T")


def build(cls: type[T], section: Mapping[str, Any], name: str, base: T | None = None) -> T:
  """Makes a frozen dataclass from a config section, checking every key and type.

  Args:
    cls: the dataclass.
    section: ConfigDict or dict; nested sections fill nested dataclasses.
    name: dotted name of the section, for error messages.
    base: where the values come from that the section does not name; default: cls's defaults.

  Raises:
    ValueError: for an unknown key (with the closest match), a wrong type, or whatever cls refuses.
  """
  section = with_new_names(section, getattr(cls, "RENAMED", {}), name)
  hints = typing.get_type_hints(cls)
  allowed = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
  values = {}
  for key, value in section.items():
    if key not in allowed:
      raise ValueError(unknown_key(f"{name}.{key}", allowed))
    current = getattr(cls if base is None else base, key, None)  # cls: the default value
    values[key] = _convert(hints[key], value, f"{name}.{key}", current)
  if base is not None:
    return dataclasses.replace(base, **values)  # type: ignore[type-var]
  try:
    return cls(**values)
  except TypeError as error:
    raise ValueError(f"{name}: {error}") from error


def with_new_names(
  section: Mapping[str, Any], renamed: Mapping[str, str], name: str = ""
) -> Mapping[str, Any]:
  """A section whose deprecated keys are replaced by their new names.

  Values under an old name win, since a section that was made from defaults also has the new one.

  Args:
    section: of a config, or of a saved file.
    renamed: {old key: new key}.
    name: of the section, for a warning about each old key; "" for none, since the user of a saved
      file cannot change its names.
  """
  old_keys = [key for key in section if key in renamed]
  if not old_keys:
    return section
  result = {key: value for key, value in section.items() if key not in renamed}
  for key in old_keys:
    result[renamed[key]] = section[key]
    if name not in ("", "generation"):
      print(f"{name}.{key} is deprecated; use {name}.{renamed[key]}", file=sys.stderr)
  return result


def unknown_key(key: str, allowed: Sequence[str]) -> str:
  """The message about a config key that nobody reads, with the closest one that exists."""
  close = difflib.get_close_matches(key.rsplit(".", 1)[-1], allowed, 1)
  hint = f"; did you mean {close[0]!r}?" if close else ""
  return f"unknown config key {key!r}{hint} Allowed: {', '.join(allowed)}"


def _convert(hint, value, name, current=None):
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    if hasattr(value, "items"):  # a ConfigDict is no Mapping
      return build(hint, value, name, current)
  elif origin in (typing.Union, types.UnionType):
    if value is None and type(None) in args:
      return None
    for arg in (a for a in args if a is not type(None)):
      try:
        return _convert(arg, value, name)
      except ValueError:
        continue
  elif origin is Literal:
    if value in args:
      return value
  elif origin is tuple and isinstance(value, (list, tuple)):
    items = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
    if len(items) == len(value):
      return tuple(_convert(a, v, f"{name}[{i}]") for i, (a, v) in enumerate(zip(items, value)))
  elif origin is dict and hasattr(value, "items"):
    return {key: _convert(args[1], item, f"{name}.{key}") for key, item in value.items()}
  elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value)
  elif isinstance(hint, type) and isinstance(value, hint):
    if hint is bool or not isinstance(value, bool):  # True is an int to Python
      return value
  expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
  raise ValueError(f"{name}={value!r} ({type(value).__name__}): expected {expected}")
