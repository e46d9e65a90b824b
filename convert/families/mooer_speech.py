"""MooER's releases with speech output, MooER-omni and MooER-S2ST: in and out."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path

from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import from_json, to_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.prompts import SPEECH_TASKS
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.vocoders import SpeechOutputConfig

from ..core.errors import ConversionError, Problems
from ..core.folders import check_roundtrip, copier, kept_files, style_of
from ..core.kind import Kind, Opened, Original, Request
from ..core.options import Options
from ..parts import vocoder
from ..parts.tokenizer_files import read_tokenizer
from ..readers import read_object
from ..verify.reference import mooer as reference
from .mooer import (
  ADAPTER_FILE,
  ENCODER_FILE,
  Files,
  check_files,
  chosen_lora,
  known_task,
  open_files,
  released_task,
  write_files,
)

LLM_FOLDER, LORA_FOLDER, PROMPT_FILE = "llm", "lora", "prompt.wav"
VOCODER_FILE, SPEAKER_FILE = "g_00000000", "spk_00000000"  # of our own models; the number is a step

# The original's decoding options; top_k is that of the LLM's generation_config.json.
DECODING = {
  "num_beams": 4,
  "do_sample": True,
  "top_p": 0.85,
  "temperature": 1.0,
  "length_penalty": 1.0,
  "max_new_tokens": 1000,
  "min_length": 1,
  "repetition_penalty": 1.0,
}
TOP_K = 50  # transformers' default


def files_of(folder: Path) -> Files:
  return Files(
    encoder=folder / ENCODER_FILE,
    adapter=folder / ADAPTER_FILE,
    lora=folder / LORA_FOLDER,
    llm=folder / LLM_FOLDER,
  )


def open_release(folder: Path, options: Options, problems: Problems) -> Opened:
  """Opens a folder with all parts in it: g_* and spk_*, llm/, lora/, am.mvn, prompt.wav, …"""
  task = known_task(options.task, SPEECH_TASKS)
  files = files_of(folder)
  check_files([files.encoder, files.adapter, files.llm], files.lora, options, problems)
  vocoder_file = problems.attempt(_numbered, folder, "g")
  speaker_file = problems.attempt(_numbered, folder, "spk")
  problems.check(str(folder))
  assert vocoder_file is not None and speaker_file is not None
  generator = problems.attempt(vocoder.open_generator, vocoder_file, problems)
  speaker = problems.attempt(vocoder.open_speaker, speaker_file, problems)
  opened = problems.attempt(open_files, folder, files, options, problems)
  problems.check(str(folder))
  assert generator is not None and speaker is not None and opened is not None
  vocoder_config, vocoder_leaves = generator
  speaker_config, speaker_leaves, write_buffers = speaker
  output = SpeechOutputConfig(vocoder=vocoder_config, speaker=speaker_config)
  _check_start_token(read_tokenizer(opened.tokenizer), output)
  config = from_json(opened.config).replace(
    prompts=((task, SPEECH_TASKS[task]),), speech_output=output
  )
  style = {
    "task": task,
    "llm": LLM_FOLDER,
    "vocoder": vocoder_file.name,
    "speaker": speaker_file.name,
  }
  prompt = folder / PROMPT_FILE
  kept = {"voice": (prompt,)} if prompt.exists() else {}
  lacking = () if kept else (f"no {PROMPT_FILE}: the checkpoint has no voice of its own",)
  generation_file = files.llm / "generation_config.json"
  described = read_object(generation_file) if generation_file.is_file() else {}
  top_k = described.get("top_k", TOP_K)
  return dataclasses.replace(
    opened,
    config=to_json(config),
    leaves=opened.leaves | vocoder_leaves | speaker_leaves,
    style={**opened.style, "mooer": {**opened.style["mooer"], **style}},
    kept={**opened.kept, **kept, "speaker": write_buffers},
    notes=(*opened.notes, *lacking),
    generation={**DECODING, "top_k": top_k, **opened.generation},
  )


def _numbered(folder: Path, prefix: str) -> Path:
  """Returns the only file PREFIX_NUMBER in a folder. Raises ConversionError if that fails."""
  found = sorted(f for f in folder.iterdir() if re.fullmatch(rf"{prefix}_\d+", f.name))
  if len(found) == 1:
    return found[0]
  have = ", ".join(file.name for file in found) or "none"
  raise ConversionError(f"{folder}: must have one file {prefix}_NUMBER, has {have}")


def _check_start_token(tokenizer: Tokenizer, output: SpeechOutputConfig) -> None:
  if output.start_token not in tokenizer.vocabulary():
    raise ConversionError(
      f"{LLM_FOLDER}: its tokenizer has no {output.start_token}, so the LLM has no audio tokens;"
      " use the llm folder of the release with speech output"
    )


def export(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  """Writes a checkpoint as a release. Raises ConversionError if that cannot express it."""
  config = from_json(about.config)
  if config.speech_output is None:
    raise ConversionError(
      f"{about.folder}: has no speech output; export it with the kind mooer instead"
    )
  task = released_task(about, config, SPEECH_TASKS)
  style = style_of(about, "mooer")
  write_files(about, config, files_of(folder), shard_bytes=shard_bytes)
  vocoder.export_generator(about, folder / style.get("vocoder", VOCODER_FILE))
  vocoder.export_speaker(about, folder / style.get("speaker", SPEAKER_FILE))
  copier(kept_files(about, "voice"))(folder)
  options = Options(task=task, lora=bool(config.decoder.lora_rank))
  check_roundtrip(about, config, lambda p: from_json(open_release(folder, options, p).config))


def run_reference(request: Request) -> Original:
  """Runs the release that a checkpoint was imported from."""
  config, src = request.config, request.src
  if config.speech_output is None or not isinstance(config.connector, LinearConfig):
    raise ConversionError(f"{request.about.folder}: is no model of MooER with speech output")
  task = released_task(request.about, config, SPEECH_TASKS)
  files = files_of(src)
  lora, notes = chosen_lora(request, files.lora)
  original = reference.run(
    request,
    task,
    encoder=files.encoder,
    adapter=files.adapter,
    llm=files.llm,
    lora=lora,
    notes=notes,
  )
  generator, speaker = (_numbered(src, prefix) for prefix in ("g", "spk"))
  return reference.run_speech(request, original, generator, speaker, src / PROMPT_FILE)


def _recognises(path: Path, names: Collection[str]) -> str | None:
  if not path.is_dir() or not (path / ADAPTER_FILE).is_file():
    return None
  return "mooer-speech" if any(path.glob("g_*")) and any(path.glob("spk_*")) else None


def _files(path: Path) -> list[Path]:
  if not path.is_dir() or _recognises(path, ()) is None:
    return []
  files = files_of(path)
  numbered = [f for prefix in ("g", "spk") for f in sorted(path.glob(f"{prefix}_*"))]
  parts = [files.encoder, files.adapter, files.llm, files.lora, *numbered]
  return [part for part in parts if part.exists()]


KIND = Kind(
  name="mooer-speech",
  open=open_release,
  export=export,
  sharded=True,
  recognises=_recognises,
  files=_files,
  options=("task", "lora", "merge_lora"),
  parts=("encoders/sanm/", "connector/", "decoder/", "vocoder/", "speaker/"),
  reference=run_reference,
)
