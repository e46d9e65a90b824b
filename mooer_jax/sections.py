"""Sections of a config become frozen dataclasses, every key and type checked."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

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
