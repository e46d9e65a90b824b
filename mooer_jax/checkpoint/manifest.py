"""checkpoint.json: the hash, leaves and files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from mooer_jax import storage
from mooer_jax.checkpoint import sums

FORMAT = 1
MANIFEST = "checkpoint.json"
_TYPES: dict[str, Any] = {"hash": str, "leaves": dict}  # of the values
_TYPES |= dict.fromkeys(("base", "train_state", "files"), (dict, type(None)))


def manifest_fault(about: dict) -> str | None:
  """What is wrong with the content of a checkpoint.json; None if it is valid."""
  if about.get("format") != FORMAT:
    return f"has format={about.get('format')!r:.80}"
  if missing := sorted(_TYPES.keys() - {"files"} - about.keys()):
    return f"lacks {', '.join(missing)}"
  for name, kind in _TYPES.items():
    if not isinstance(value := about.get(name), kind):
      return f"has {name}={value!r:.80}"
  if (base := about["base"]) is not None and not {"path", "hash"} <= base.keys():
    return f"has base={base}, without path and hash"
  recorded = about.get("files")
  if recorded is not None and (lost := sorted(set(sums.EDITABLE) - recorded.keys())):
    return f"has no size and sum of {', '.join(lost)}"
  for name, entry in (recorded or {}).items():
    if Path(name).is_absolute() or ".." in Path(name).parts:
      return f"has a sum of {name}, which is not in the checkpoint"
    if not isinstance(entry, list) or [type(value) for value in entry] != [int, str]:
      return f"has no size and sum of {name}: {entry!r}"
  return None


def read_remote(url: str) -> dict[str, Any]:
  """The checkpoint.json of a URL; raises ValueError if it is damaged."""
  try:
    about = json.loads(storage.read_bytes(url))
    fault = manifest_fault(about) if isinstance(about, dict) else "holds no object"
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    about, fault = {}, f"is not JSON ({error})"
  if fault:
    raise ValueError(f"{url} {fault}")
  return about
