"""All kinds. A new kind is one file that defines its `Kind`, and one line here."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from .core.kind import Kind

# Name -> record. Records are imported on use, so that `--help` needs neither torch nor JAX.
KINDS = {
  "mooer": f"{__package__}.families.mooer:KIND",
  "deepspeed": f"{__package__}.families.mooer_training:KIND",
  "salmonn": f"{__package__}.families.salmonn:KIND",
  "peft": f"{__package__}.parts.peft:KIND",
  "paraformer": f"{__package__}.parts.paraformer:KIND",
  "whisper": f"{__package__}.parts.whisper:KIND",
  "beats": f"{__package__}.parts.beats:KIND",
  "qwen2": f"{__package__}.parts.language_model:QWEN2",
  "llama": f"{__package__}.parts.language_model:LLAMA",
}


def find_kind(name: str) -> Kind:
  """Raises ValueError for an unknown name."""
  if name not in KINDS:
    raise ValueError(f"kind={name!r}: choose one of {', '.join(KINDS)}")
  return pkgutil.resolve_name(KINDS[name])


def all_kinds() -> Iterator[Kind]:
  return map(find_kind, KINDS)
