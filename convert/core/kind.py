"""The record that describes a published format, and the results that its functions return."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mooer_jax.checkpoint import Checkpoint, Lazy
from mooer_jax.config import SpeechLLMConfig, part_to_json
from mooer_jax.text.tokenizer import Tokenizer

from .errors import Problems
from .options import Options

# Values of a clip at each stage, such as "features" [T, F] and "encoder" [T, D].
Stages = dict[str, np.ndarray]
Writer = Callable[[Path], Any]  # writes files into the folder that it is given


@dataclasses.dataclass(frozen=True)
class Opened:
  """A source that was opened for an import; no tensor is read.

  Attributes:
    config: content of config.json.
    leaves: path -> leaf, to be read later.
    style: how the files were written where that is a choice; an export needs it.
    tokenizer: writes the files of tokenizer/.
    kept: folder below source/ -> files that are copied there.
    generation: content of generation.json.
    base: checkpoint that holds the other leaves.
    ignored: names of tensors and entries that no leaf is made of.
    notes: sentences for the user.
  """

  config: dict[str, Any]
  leaves: dict[str, Lazy]
  style: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer: Writer = lambda folder: None
  kept: dict[str, tuple[Path, ...]] = dataclasses.field(default_factory=dict)
  generation: dict[str, Any] = dataclasses.field(default_factory=dict)
  base: Path | None = None
  ignored: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
  """An encoder or a language model that was opened; fields as in `Opened`.

  Attributes:
    config: config of the part.
    frontend: config of the features that an encoder takes; None for a language model.
  """

  config: Any
  leaves: dict[str, Lazy]
  style: dict[str, Any]
  frontend: Any = None
  tokenizer: Writer = lambda folder: None
  kept: dict[str, tuple[Path, ...]] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  def alone(self) -> Opened:
    """The part as a checkpoint of its own."""
    if self.frontend is None:
      config: dict[str, Any] = {"decoder": part_to_json(self.config)}
    else:
      config = {
        "encoders": [part_to_json(self.config)],
        "frontends": [part_to_json(self.frontend)],
      }
    shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    del shared["config"], shared["frontend"]
    return Opened(config, **shared)


@dataclasses.dataclass(frozen=True)
class Request:
  """A comparison that `verify` asks a reference for.

  Attributes:
    about: the checkpoint that is verified.
    config: its model.
    tokenizer: its tokenizer; None if it has none.
    src: the source that it was imported from.
    options: further files of the original.
    waveforms: clips, float32 [N].
    max_new_tokens: maximum number of generated tokens.
  """

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
    clips: stages of each clip, in the order of computation; of a language model alone, one entry.
    prompt: token ids before and after the speech, as our side takes them.
    notes: sentences for the user.
  """

  clips: list[Stages]
  prompt: tuple[Sequence[int], Sequence[int]] = ((), ())
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kind:
  """A published format. The file of the format defines it; kinds.py lists it.

  Attributes:
    name: the word on the command line.
    open: maps the files of a source to leaves. None if `problems` received a reason.
    export: (checkpoint, folder, bytes per file of weights): writes the files; None: import only.
    recognises: (path, names of the tensors in it): a description if it is of this kind, else None.
    files: the weights in a folder that has them in several places; empty for any other path.
    options: fields of `Options` that `open` uses.
    parts: the leaves that a checkpoint of this kind has, by the beginnings of their paths.
    reference: runs the original; None if the files are not a whole model.
    needs: options without which `reference` cannot run.
    takes: options that `reference` uses if they are given.
  """

  name: str
  open: Callable[[Path, Options, Problems], Opened | None]
  export: Callable[[Checkpoint, Path, int], None] | None = None
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
