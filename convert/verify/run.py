"""`convert verify KIND SRC CKPT`: compares the original and a checkpoint on the same clips."""

from collections.abc import Sequence
from pathlib import Path

from mooer_jax import checkpoint, tree
from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import SpeechLLMConfig, from_json
from mooer_jax.text.tokenizer import Tokenizer

from ..core.errors import ConversionError
from ..core.folders import encoder_of
from ..core.kind import Kind, Request
from ..core.options import DESCRIPTIONS, Options, flag
from ..kinds import find_kind
from ..parts.language_model import decoder_of
from .ours import compare, load_clips
from .report import Report


def verify(
  kind: str,
  src: Path,
  folder: Path,
  *,
  audio: Sequence[Path] = (),
  options: Options = Options(),
  base: Path | None = None,
  max_new_tokens: int = 40,
) -> Report:
  """Runs the original, clip by clip, and the checkpoint, in one batch, in float32.

  Compares the values of every stage (logits with the original's output as input), and the tokens
  that each side generates greedily.

  Args:
    src: the imported source; `options` are its further files.
    folder: the checkpoint, or a run folder with its latest checkpoint.
    audio: clips, for kinds with an encoder.
    base: base checkpoint of a fine-tune, if it has moved.

  Raises:
    ConversionError, ValueError: for a missing option, or a part that the checkpoint lacks.
    FileNotFoundError: for a path.
  """
  found = find_kind(kind)
  if found.reference is None:
    raise ConversionError(
      f"verify cannot run {kind}: its files are not a whole model. Export the imported checkpoint"
      " with the kind mooer, and verify that folder"
    )
  _check_options(found, audio, options)
  folder = checkpoint.find(folder)
  base = None if base is None else checkpoint.find(base)
  about = checkpoint.describe(folder, base=base)
  about.check_not_quantized()
  leaves = tree.flatten(about.params)
  for part in found.parts:
    if not any(path.startswith(part) for path in leaves):
      hint = "; import it with --base-checkpoint CKPT" if kind == "peft" else ""
      raise ConversionError(
        f"{folder} has no {part.rstrip('/')} to verify as {kind}; it holds"
        f" {', '.join(about.config)}{hint}"
      )
  for path in (src, *options.paths()):
    if not path.exists():  # transformers would look for a missing path on the Hub
      raise FileNotFoundError(f"{path}: no such file or folder")
  config = _model(found, about)
  tokenizer = Tokenizer.from_folder(about.tokenizer) if any(about.tokenizer.iterdir()) else None
  waveforms = load_clips(audio, config) if audio else []
  about = checkpoint.load(folder, dtype="float32", base=base)
  request = Request(about, config, tokenizer, src, options, waveforms, max_new_tokens)
  return compare(request, found.reference(request))


def _check_options(kind: Kind, audio: Sequence[Path], options: Options) -> None:
  if kind.takes_audio and not audio:
    raise ConversionError(f"verify {kind.name} needs clips: --audio FILE")
  if audio and not kind.takes_audio:
    raise ValueError(f"--audio has no effect on verify {kind.name}")
  given = options.given()
  for name in kind.needs:
    if name not in given:
      raise ConversionError(f"verify {kind.name} needs {flag(name)}: {DESCRIPTIONS[name]}")
  for name in given:
    if name not in (*kind.needs, *kind.takes):
      raise ValueError(f"{flag(name)} has no effect on verify {kind.name}")


def _model(kind: Kind, about: Checkpoint) -> SpeechLLMConfig:
  """Returns the model, or a model of which only the verified part is used."""
  if "connector/" in kind.parts:
    return from_json(about.config)
  if not kind.takes_audio:
    return SpeechLLMConfig(decoder=decoder_of(about))
  encoder, frontend = encoder_of(about, kind.parts[0].split("/")[1])
  longest_s = getattr(frontend, "chunk_s", SpeechLLMConfig.max_audio_s)
  return SpeechLLMConfig(encoders=(encoder,), frontends=(frontend,), max_audio_s=longest_s)
