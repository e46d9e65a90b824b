"""JSON from files that may be broken or hostile."""

from __future__ import annotations

import json
from pathlib import Path

from .source import ReadError


def parse_object(where: str, text: bytes | str) -> dict:
  """Returns the JSON object in `text`; `where` begins the error.

  Raises:
    ReadError: if it is not UTF-8, not JSON, not an object, or a key stands in it twice.
  """

  def no_repeats(pairs):
    found: dict = {}
    for key, value in pairs:
      if key in found:
        raise ReadError(f"{where}: the key {key!r} stands in it twice")
      found[key] = value
    return found

  try:
    value = json.loads(text, object_pairs_hook=no_repeats)
  except ReadError:
    raise
  except (ValueError, RecursionError) as error:
    raise ReadError(f"{where}: not JSON: {error}") from error
  if not isinstance(value, dict):
    raise ReadError(f"{where}: must be a JSON object, got {type(value).__name__}")
  return value


def read_object(path: Path) -> dict:
  """Reads a JSON file that holds an object."""
  return parse_object(str(path), path.read_bytes())
