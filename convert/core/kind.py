"""`Kind`, the record of a published format, and the results of its functions."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mooer_jax.checkpoint import Checkpoint, LazyArray
from mooer_jax.config import SpeechLLMConfig, part_to_json
from mooer_jax.text.tokenizer import Tokenizer

from ..readers import Source
from .errors import Problems
from .options import Options

# Values of a clip by stage, such as "features" [T, F] and "encoder" [T, D].
Stages = dict[str, np.ndarray]
Writer = Callable[[Path], Any]  # writes files into a folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
  """An opened source; no tensor is read.

  Attributes:
    leaves: path -> leaf.
    style: choices in the layout of the files, which an export repeats.
    tokenizer: writes the files of tokenizer/.
    kept: folder below source/ -> files to copy there, or a function that writes them.
    ignored: names of tensors and entries that are not converted.
    notes: sentences for the user.
  """

  leaves: dict[str, LazyArray]
  style: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer: Writer = lambda folder: None
  kept: dict[str, tuple[Path, ...] | Writer] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened(_Source):
  """A source as a checkpoint: content of config.json and generation.json, and its base."""

  config: dict[str, Any]
  generation: dict[str, Any] = dataclasses.field(default_factory=dict)
  base: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(_Source):
  """An encoder with its front end, or a language model without."""

  config: Any
  frontend: Any = None

  def alone(self) -> Opened:
    """Returns the part as a checkpoint of its own."""
    config: dict[str, Any] = {"decoder": part_to_json(self.config)}
    if self.frontend is not None:
      config = {"encoders": [part_to_json(self.config)], "frontends": [part_to_json(self.frontend)]}
    shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(_Source)}
    return Opened(config=config, **shared)


def combine(parts: Sequence[Part], *sources: Source) -> dict[str, Any]:
  """Returns the fields of `Opened` that parts of a model, and further files, have in common."""
  origins: list[Part | Source] = [*sources, *parts]
  return {
    "style": {name: value for part in parts for name, value in part.style.items()},
    "kept": {name: files for part in parts for name, files in part.kept.items()},
    "ignored": tuple(name for origin in origins for name in origin.ignored),
    "notes": tuple(note for origin in origins for note in origin.notes),
  }


@dataclasses.dataclass(frozen=True)
class Request:
  """A comparison: a checkpoint, its source with further files, and clips, float32 [N] each."""

  about: Checkpoint
  config: SpeechLLMConfig
  tokenizer: Tokenizer | None
  src: Path
  options: Options
  waveforms: Sequence[np.ndarray]
  max_new_tokens: int

  @property
  def eos_id(self) -> int | None:
    return None if self.tokenizer is None else self.tokenizer.eos_id


@dataclasses.dataclass(frozen=True)
class Original:
  """Results of the original model.

  Attributes:
    clips: stages of each clip, in the order of computation; one entry for an LLM alone.
    prompt: token ids before and after the speech, for our side.
    voice: waveform of the voice of speech output, 16 kHz, for our side; None without it.
    notes: sentences for the user.
  """

  clips: list[Stages]
  prompt: tuple[Sequence[int], Sequence[int]] = ((), ())
  notes: tuple[str, ...] = ()
  voice: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
  """A published format. The file of the format defines it; kinds.py lists it.

  Attributes:
    name: name on the command line.
    open: maps a source to leaves. It adds to the problems what does not fit, and raises ValueError
      (ConversionError with all reasons) where it cannot go on.
    export: writes (checkpoint, folder, bytes per file of weights); None: import only.
    sharded: whether `export` writes several files of that size.
    recognises: (path, names of its tensors) to a description, or None if it is another kind.
    files: weights in a folder that has them in several places; empty for other paths.
    options: fields of `Options` that `open` uses.
    parts: beginnings of the paths that every checkpoint of this kind has.
    reference: runs the original; None if the files are not a whole model.
    needs, takes: options that `reference` requires, and uses if given.
  """

  name: str
  open: Callable[[Path, Options, Problems], Opened]
  export: Callable[[Checkpoint, Path, int], None] | None = None
  sharded: bool = False
  recognises: Callable[[Path, Collection[str]], str | None] = lambda path, names: None
  files: Callable[[Path], list[Path]] = lambda path: []
  options: tuple[str, ...] = ()
  parts: tuple[str, ...] = ()
  reference: Callable[[Request], Original] | None = None
  needs: tuple[str, ...] = ()
  takes: tuple[str, ...] = ()

  @property
  def takes_audio(self) -> bool:
    """Whether the model has an encoder."""
    return any(part.startswith("encoders/") for part in self.parts)
