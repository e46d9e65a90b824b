"""Configurations: from a ConfigDict or JSON to frozen dataclasses, and back to JSON."""

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import jax
import numpy as np

from mooer_jax import connectors, decoders, encoders
from mooer_jax.audio import frontend as frontends
from mooer_jax.audio.decode import Channel
from mooer_jax.audio.frontend import Frontend, FrontendConfig
from mooer_jax.connectors import Connector
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders import Encoder
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.prompts import TEMPLATES, TEXT_TASKS
from mooer_jax.vocoders import SpeechOutputConfig


def part_kinds() -> dict[str, Any]:
  """The config class of each kind of encoder, connector and decoder, by its name."""
  kinds: tuple[Any, ...] = (*encoders.KINDS, *connectors.KINDS, *decoders.KINDS)
  return {kind.kind: kind for kind in kinds}


@dataclasses.dataclass(frozen=True)
class SpeechLLMConfig:
  """Architecture of a speech LLM, which checkpoints store, and `compute`, which they do not.

  Attributes:
    encoders: configs of different kinds; their frames are concatenated on the channel axis.
    connector: config of the connector.
    decoder: config of the LLM.
    frontends: feature extraction for each encoder, in the order of `encoders`.
    encoder_norm: apply a LayerNorm to the frames of each encoder (SALMONN).
    chat_template: name in prompts.TEMPLATES.
    max_audio_s: longest clip, seconds.
    min_audio_s: shorter clips are padded with silence to this length, seconds (SALMONN: 1).
    channel: signal of a clip with several channels: their "mean", or the "first" (SALMONN).
    prompts: (task, default prompt) pairs.
    speech_output: the parts that make speech; None for a model whose answers are text.
    compute: how the model is executed.
  """

  RENAMED: ClassVar = {"template": "chat_template"}
  RUN_FIELDS: ClassVar = ("prompts", "chat_template", "max_audio_s")
  encoders: tuple[Encoder, ...] = (SANMConfig(),)
  connector: Connector = LinearConfig()
  decoder: LLMConfig = LLMConfig()
  frontends: tuple[Frontend, ...] = (FrontendConfig(),)
  encoder_norm: bool = False
  chat_template: str = "mooer"
  max_audio_s: float = 30.0
  min_audio_s: float = 0.0
  channel: Channel = "mean"
  prompts: tuple[tuple[str, str], ...] = tuple(TEXT_TASKS.items())
  speech_output: SpeechOutputConfig | None = None
  compute: ExecutionConfig = ExecutionConfig()

  def __post_init__(self):
    kinds = [encoder.kind for encoder in self.encoders]
    if not kinds or len(set(kinds)) < len(kinds):
      raise ValueError(f"model.encoders={kinds}: give one or more, of different kinds")
    if not 0 <= self.min_audio_s <= self.max_audio_s < math.inf:
      raise ValueError(
        f"model.min_audio_s={self.min_audio_s:g} and model.max_audio_s={self.max_audio_s:g}: must"
        " be finite, and satisfy 0 <= min_audio_s <= max_audio_s"
      )
    rates = {frontend.sample_rate_hz for frontend in self.frontends}
    if len(rates) > 1:
      raise ValueError(f"all front ends must use the same sample rate; got {sorted(rates)} Hz")
    if len(self.frontends) != len(kinds):
      raise ValueError(f"{len(kinds)} encoders, but {len(self.frontends)} frontends: each has one")
    encoder_frames = 0  # of the longest clip
    for encoder, frontend in zip(self.encoders, self.frontends, strict=True):
      if encoder.input_width != frontend.width:
        raise ValueError(
          f"{encoder.kind}.input_width={encoder.input_width}, but its features have"
          f" {frontend.width} values a frame; change one of them"
        )
      longest = frontend.num_frames(int(self.max_audio_s * frontend.sample_rate_hz))
      if encoder.max_frames is not None and longest > encoder.max_frames:
        raise ValueError(
          f"model.max_audio_s={self.max_audio_s:g} makes {longest} frames, but {encoder.kind} takes"
          f" {encoder.max_frames}; lower max_audio_s"
        )
      encoder_frames = max(encoder_frames, encoder.num_outputs(longest))
    if not self.connector.num_tokens(encoder_frames):
      raise ValueError(
        f"model.max_audio_s={self.max_audio_s:g} makes {encoder_frames} encoder frames, but model."
        f"{self.connector.kind} needs {self.connector.min_frames} for one speech token; raise"
        f" max_audio_s, or change model.{self.connector.kind} to need fewer"
      )
    if self.chat_template not in TEMPLATES:
      raise ValueError(
        f"model.chat_template={self.chat_template!r}: choose one of {sorted(TEMPLATES)}"
      )
    speech = self.speech_output
    if speech is not None and speech.vocoder.input_width != self.decoder.hidden_size:
      raise ValueError(
        f"speech_output.vocoder.input_width={speech.vocoder.input_width}, but the LLM's hidden"
        f" states have {self.decoder.hidden_size} values; they must be equal"
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
  """Read the `model` and `compute` sections of a config into a SpeechLLMConfig.

  `model.encoders`, `.connector` and `.decoder` are names of sizes. Sections named after a kind
  (`model.sanm`, `model.linear`, `model.llm`) override single values, and sections of
  `model.frontends`, named after an encoder, values of its features.

  Raises:
    ValueError: for an unknown name or key, a wrong type, or sizes that do not fit together.
  """
  check_section(model, "model")
  fields = dict(with_new_names(model, SpeechLLMConfig.RENAMED, "model"))
  sections = {name: fields.pop(name, {}) for name in (*part_kinds(), "frontends")}
  for name, section in sections.items():
    check_section(section, f"model.{name}")
  others = ("frontends", "compute")
  known = [f.name for f in dataclasses.fields(SpeechLLMConfig) if f.name not in others]
  for key in fields:
    if key not in known:
      raise ValueError(unknown_key(f"model.{key}", [*known, *sections]))
  for key in ("encoders", "connector", "decoder"):
    if key not in fields:
      raise ValueError(f"model.{key} is missing: name a size")
  names = fields["encoders"]
  if not isinstance(names, (list, tuple)):
    raise ValueError(f"model.encoders={names!r}: a tuple of names, such as ('sanm_large',)")
  parts = tuple(_part(encoders.KINDS, name, sections, key="encoders") for name in names)
  fields["encoders"] = parts
  fields["connector"] = _part(connectors.KINDS, fields["connector"], sections, key="connector")
  fields["decoder"] = _part(decoders.KINDS, fields["decoder"], sections, key="decoder")
  used = {part.kind for part in (*parts, fields["connector"], fields["decoder"])}
  for kind in sections:
    if kind not in (*used, "frontends") and sections[kind]:
      raise ValueError(
        f"model.{kind} has no effect: the model consists of {', '.join(sorted(used))}; remove the"
        " section or name the part in model.encoders, .connector or .decoder"
      )
  defaults = {part.kind: part.frontend() for part in parts}
  for kind in sections["frontends"]:
    if kind not in defaults:
      raise ValueError(unknown_key(f"model.frontends.{kind}", [*defaults]))
  fields["frontends"] = tuple(
    build(type(base), sections["frontends"].get(kind, {}), f"model.frontends.{kind}", base=base)
    for kind, base in defaults.items()
  )
  fields["compute"] = build(ExecutionConfig, compute or {}, "compute")
  if "prompts" in fields:
    check_section(fields["prompts"], "model.prompts")
    fields["prompts"] = tuple(dict(fields["prompts"]).items())
  return build(SpeechLLMConfig, fields, "model")


def _part(kinds, name, sections, *, key):
  """The named size of one of the kinds, with the values that the section of its kind changes."""
  sizes = {name: size for kind in kinds for name, size in kind.SIZES.items()}
  if not isinstance(name, str) or name not in sizes:
    raise ValueError(f"model.{key}={name!r}: choose one of {sorted(sizes)}")
  base = sizes[name]
  return build(type(base), sections[base.kind], f"model.{base.kind}", base=base)


def part_to_json(part: Any) -> dict[str, Any]:
  """A part, or the features of an encoder, as a section of config.json."""
  return {**dataclasses.asdict(part), "kind": part.kind}


def part_from_json(section: Mapping[str, Any], name: str) -> Any:
  """Inverse of part_to_json for a part; `name` of the section begins errors (ValueError)."""
  return _from_kind(part_kinds(), section, name)


def frontend_from_json(section: Mapping[str, Any], name: str) -> Frontend:
  """Inverse of part_to_json for features, as part_from_json."""
  # Checkpoints of version 0.1 have no kind, as there was only one.
  kinds = {kind.kind: kind for kind in frontends.KINDS}
  return _from_kind(kinds, section, name, default=FrontendConfig.kind)


def _from_kind(kinds: Mapping[str, type], section: Any, name: str, *, default: Any = None) -> Any:
  check_section(section, name)
  values = dict(section)
  kind = values.pop("kind", default)
  if not isinstance(kind, str) or kind not in kinds:
    raise ValueError(f"{name}.kind={kind!r}: this version knows {sorted(kinds)}")
  return build(kinds[kind], with_new_names(values, getattr(kinds[kind], "RENAMED", {})), name)


def to_json(config: SpeechLLMConfig) -> dict[str, Any]:
  """Content of a checkpoint's config.json, without `compute`."""
  fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  del fields["compute"]
  for name in ("encoders", "frontends"):
    fields[name] = tuple(map(part_to_json, fields[name]))
  for name in ("connector", "decoder"):
    fields[name] = part_to_json(fields[name])
  if speech := fields.pop("speech_output"):
    fields["speech_output"] = dataclasses.asdict(speech)
  return {**fields, "prompts": dict(config.prompts)}


def from_json(
  fields: Mapping[str, Any],
  compute: ExecutionConfig | None = None,
  *,
  path: str | Path = "config.json",
) -> SpeechLLMConfig:
  """Inverse of to_json; `path` of the file begins errors (ValueError)."""
  try:
    for name in ("encoders", "frontends", "connector", "decoder", "prompts"):
      if name not in fields:
        found = f"a part of a speech LLM ({', '.join(fields)})"
        raise ValueError(f"has no {name!r}: it describes {found}, or is damaged")
    values = dict(with_new_names(fields, SpeechLLMConfig.RENAMED))
    for name, read in (("encoders", part_from_json), ("frontends", frontend_from_json)):
      values[name] = tuple(read(part, f"{name}[{i}]") for i, part in enumerate(values[name]))
    for name in ("connector", "decoder"):
      values[name] = part_from_json(values[name], name)
    values["prompts"] = tuple(values["prompts"].items())
    values["compute"] = compute or ExecutionConfig()
    return build(SpeechLLMConfig, values, "model")
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def run_fields(config: SpeechLLMConfig) -> set[str]:
  """Paths in config.json that may differ between a checkpoint and a run that starts from it."""
  parts: dict[str, Any] = {"": config, "connector/": config.connector, "decoder/": config.decoder}
  if config.speech_output is not None:
    parts["speech_output/"] = config.speech_output
  for name in ("encoders", "frontends"):
    parts |= {f"{name}/{n}/": part for n, part in enumerate(getattr(config, name))}
  return {f"{path}{field}" for path, part in parts.items() for field in part.RUN_FIELDS}


def differences(a: SpeechLLMConfig, b: SpeechLLMConfig) -> dict[str, tuple[Any, Any]]:
  """Differences between two models: {path in config.json: (a's value, b's value)}."""
  return json_differences(to_json(a), to_json(b))


def json_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Differences between the contents of two config.json: {path: (a's value, b's value)}."""
  of_a, of_b = _leaves(a), _leaves(b)
  paths = sorted({*of_a, *of_b})
  return {p: (of_a.get(p), of_b.get(p)) for p in paths if of_a.get(p) != of_b.get(p)}


def _leaves(value: Any) -> dict[str, Any]:
  found, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is None)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


T = TypeVar("T")


def build(cls: type[T], section: Mapping[str, Any], name: str, *, base: T | None = None) -> T:
  """Build a frozen dataclass from a config section; every key and type is checked.

  Args:
    cls: the dataclass.
    section: ConfigDict or dict; nested sections fill nested dataclasses.
    name: dotted name of the section in errors.
    base: instance with the values of missing keys; default: the defaults of cls.

  Raises:
    ValueError: for an unknown key, a value of another type, or one that cls refuses.
  """
  check_section(section, name)
  section = with_new_names(section, getattr(cls, "RENAMED", {}), name)
  hints = typing.get_type_hints(cls)
  allowed = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
  values = {}
  for key, value in section.items():
    if key not in allowed:
      raise ValueError(unknown_key(f"{name}.{key}", allowed))
    current = getattr(cls if base is None else base, key, None)  # cls: the default value
    values[key] = convert(hints[key], value, f"{name}.{key}", current=current)
  if base is not None:
    return dataclasses.replace(base, **values)  # type: ignore[type-var]
  try:
    return cls(**values)
  except TypeError as error:
    raise ValueError(f"{name}: {error}") from error


def with_new_names(
  section: Mapping[str, Any], renamed: Mapping[str, str], name: str = ""
) -> Mapping[str, Any]:
  """A section in which the new names replace deprecated keys.

  In a config, values of deprecated keys override those of new names, which may be defaults.

  Args:
    section: of a config, or of a saved file.
    renamed: {old key: new key}.
    name: of the section, for the warning about a deprecated key; "" for a saved file, without a
      warning.

  Raises:
    ValueError: if a saved file, where nothing is a default, has both names of a key.
  """
  old_keys = [key for key in section if key in renamed]
  if not old_keys:
    return section
  result = {key: value for key, value in section.items() if key not in renamed}
  for key in old_keys:
    if not name and renamed[key] in result:
      raise ValueError(
        f"both {renamed[key]!r} and its deprecated name {key!r} are set; remove {key!r}"
      )
    result[renamed[key]] = section[key]
    if name not in ("", "generation"):
      print(f"{name}.{key} is deprecated; use {name}.{renamed[key]}", file=sys.stderr)
  return result


def unknown_key(key: str, allowed: Sequence[str]) -> str:
  """Error message for an unknown config key, with the closest allowed one."""
  close = difflib.get_close_matches(key.rsplit(".", 1)[-1], allowed, 1)
  hint = f"; did you mean {close[0]!r}?" if close else "."
  return f"unknown config key {key!r}{hint} Allowed: {', '.join(allowed)}"


def check_section(section: Any, name: str) -> None:
  """Raises ValueError unless a section is a dict or a ConfigDict (which is no Mapping)."""
  if not hasattr(section, "items"):
    raise ValueError(
      f"{name}={section!r} ({type(section).__name__}): expected a section of keys and values"
    )


def convert(hint: Any, value: Any, name: str, *, current: Any = None) -> Any:
  """Check the type of a value, and convert sections to dataclasses and lists to tuples.

  Args:
    hint: type of the value; floats must be finite.
    value: from a config or a JSON file.
    name: dotted name of the value in errors.
    current: for a dataclass, the instance with the values of missing keys.

  Raises:
    ValueError: if the value, or one in it, has another type.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    if hasattr(value, "items"):  # a ConfigDict is no Mapping
      return build(hint, value, name, base=current)
  elif origin in (typing.Union, types.UnionType):
    if value is None and type(None) in args:
      return None
    kinds = [arg for arg in args if arg is not type(None)]
    if len(kinds) == 1:
      return convert(kinds[0], value, name, current=current)
    for arg in kinds:
      try:
        return convert(arg, value, name)
      except ValueError:
        continue
  elif origin is Literal:
    if value in args:
      return value
    raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, args))}")
  elif origin is tuple and isinstance(value, (list, tuple)):
    items = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
    if len(items) == len(value):
      return tuple(convert(a, v, f"{name}[{i}]") for i, (a, v) in enumerate(zip(items, value)))
  elif origin is dict and hasattr(value, "items"):
    return {key: convert(args[1], item, f"{name}.{key}") for key, item in value.items()}
  elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    if not abs(value) <= sys.float_info.max:  # JSON has integers of any size
      raise ValueError(f"{name}={value!r}: must be a finite number")
    return float(value)
  elif isinstance(hint, type) and isinstance(value, hint):
    if hint is bool or not isinstance(value, bool):  # True is an int to Python
      return value
  expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
  raise ValueError(f"{name}={value!r} ({type(value).__name__}): expected {expected}")
