"""Write clips and SALMONN annotation files; an interruption leaves no partial file."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile

from demo.synthesize import SAMPLE_RATE_HZ


def write_clip(path: Path, speech: np.ndarray) -> None:
  """Write float samples in [-1, 1] as 16-bit flac, to a temporary file that is then renamed."""
  part = path.with_suffix(".part")
  soundfile.write(part, speech, SAMPLE_RATE_HZ, subtype="PCM_16", format="FLAC")
  os.replace(part, path)


def entry(path: str, task: str, text: str, question: str | None = None) -> dict[str, str]:
  """Return an entry of an annotation file; `path` is relative to the folder of the file."""
  made = {"path": path, "text": text, "task": task}
  return made if question is None else {**made, "Q": question}


def write_annotations(path: Path, entries: Iterable[dict[str, str]]) -> None:
  """Write `{"annotation": [...]}`, one entry a line."""
  lines = ",\n".join(json.dumps(line, ensure_ascii=False) for line in entries)
  part = path.with_suffix(".part")
  part.write_text(f'{{"annotation": [\n{lines}\n]}}\n', encoding="utf-8")
  os.replace(part, path)
