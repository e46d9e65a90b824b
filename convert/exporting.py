"""`convert export KIND CKPT OUT`: a checkpoint becomes files of PyTorch."""

from collections.abc import Callable
from pathlib import Path

from mooer_jax.checkpoint import Checkpoint, describe, find
from mooer_jax.config import part_from_json
from mooer_jax.decoders.llm import LLMConfig

from .core.errors import ConversionError
from .core.folders import beside, keep_apart, kept_json, style_of
from .families import mooer, salmonn
from .parts import beats, language_model, lora, paraformer, peft, whisper

SHARD_BYTES = 5 * 10**9


def export_checkpoint(
  kind: str,
  checkpoint: Path,
  out: Path,
  *,
  base: Path | None = None,
  shard_bytes: int = SHARD_BYTES,
  overwrite: bool = False,
) -> Path:
  """Writes files of PyTorch, tensor by tensor.

  Args:
    kind: a name in KINDS.
    checkpoint: a checkpoint's folder or that of a run, imported before or trained here.
    out: the folder to make; it is complete when it is there.
    base: where the base of a fine-tune lies, if it moved.
    shard_bytes: size that a file of an LLM does not exceed unless one tensor does.
    overwrite: replace what is there.

  Raises:
    FileNotFoundError, FileExistsError: for the checkpoint and the target.
    ConversionError, ValueError: if the checkpoint holds no such part, or it has no place there.
  """
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r}: choose one of {sorted(KINDS)}")
  about = describe(find(checkpoint), base=None if base is None else find(base))
  keep_apart(out, (about.folder, about.base))
  with beside(out, overwrite=overwrite) as folder:
    KINDS[kind](about, folder, shard_bytes)
  return out


def _decoder(about: Checkpoint) -> LLMConfig:
  if "decoder" not in about.config:
    raise ConversionError(f"{about.folder} has no LLM; it holds {', '.join(about.config)}")
  return part_from_json(about.config["decoder"], "decoder")


def _language_model(kind: str) -> Callable[[Checkpoint, Path, int], None]:
  def run(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
    config = _decoder(about)
    if config.qkv_bias != (kind == "qwen2"):
      other = "qwen2" if config.qkv_bias else "llama"
      raise ConversionError(f"{about.folder}: this LLM is of the kind {other}, not {kind}")
    if config.lora_rank:
      raise ConversionError(
        f"{about.folder}: its LoRA has no place in a plain {kind} folder; export it with the kind"
        " peft (its base with this one), or import with --merge-lora"
      )
    language_model.export_folder(about, config, folder, shard_bytes=shard_bytes)

  return run


def _peft(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  if "lora" in about.config:
    config = lora.from_json(about.config["lora"])
  else:
    config = _decoder(about)
  peft.export(
    about,
    config,
    folder,
    style=style_of(about, "peft"),
    original=kept_json(about, "lora", lora.CONFIG_FILE),
  )


def _paraformer(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  prefix = style_of(about, "paraformer").get("prefix", "encoder.")
  paraformer.export_folder(about, folder, prefix=prefix)


def _whisper(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  sections = [s for s in about.config.get("encoders", ()) if s.get("kind") == "whisper"]
  if not sections:
    raise ConversionError(f"{about.folder}: no Whisper encoder in it")
  config = part_from_json(sections[0], "encoders")
  prefix = style_of(about, "whisper").get("prefix", whisper.PREFIX)
  whisper.export(about, config, folder, prefix=prefix, shard_bytes=shard_bytes)


def _beats(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  beats.export(about, folder / beats.FILE)


def _mooer(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  mooer.export(about, folder, shard_bytes=shard_bytes)


def _salmonn(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  salmonn.export(about, folder, shard_bytes=shard_bytes)


KINDS: dict[str, Callable[[Checkpoint, Path, int], None]] = {
  "mooer": _mooer,
  "qwen2": _language_model("qwen2"),
  "llama": _language_model("llama"),
  "peft": _peft,
  "paraformer": _paraformer,
  "whisper": _whisper,
  "beats": _beats,
  "salmonn": _salmonn,
}
