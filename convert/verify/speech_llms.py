"""`convert verify` for whole speech LLMs: MooER and SALMONN in PyTorch, clip by clip."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import SpeechLLMConfig, from_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.prompts import QUESTION, SPEECH, encode_prompt, fill_template, task_prompt
from mooer_jax.text.tokenizer import Tokenizer

from ..core.errors import ConversionError, Problems
from ..core.folders import style_of
from ..families import mooer, salmonn, salmonn_options
from ..parts import lora
from ..parts.paraformer import CMVN_FILE, sanm_of
from ..readers import open_source
from . import torch_encoders, torch_models
from .ours import compare_speech, load_clips, stage_prefix
from .torch_models import Stages
from .verdict import Verdict


def verify_mooer(
  about: Checkpoint, src: Path, audio: Sequence[Path], *, llm: Path | None, max_new_tokens: int
) -> Verdict:
  """Runs a release of MooER and a checkpoint of it; arguments as of `verification.verify`."""
  config = from_json(about.config)
  task = _task(config, src)
  added, notes = _lora(about, config, src / task)
  sanm, frontend = sanm_of(about)
  if not isinstance(config.connector, LinearConfig):
    raise ConversionError(f"{about.folder}: its connector is {config.connector.kind}, not MooER's")
  waveforms = load_clips(audio, config)
  problems = Problems()
  llm = llm or mooer.find_llm(src, problems)
  problems.check(str(src))
  assert llm is not None

  folder, adapter = src / mooer.ENCODER_FOLDER, src / task / mooer.ADAPTER_FILE
  weights = folder / mooer.ENCODER_FILE
  tokenizer = Tokenizer.from_folder(about.tokenizer)
  prompt = fill_template(config.template, task_prompt(task, dict(config.prompts)))
  before_S, after_S = (tokenizer.encode(text) for text in prompt)
  if before_S:
    raise ConversionError(f"template {config.template!r}: MooER's speech comes first")
  clips = torch_encoders.hear_sanm(
    weights, folder / CMVN_FILE, sanm, frontend=frontend, waveforms=waveforms, tuned=adapter
  )
  clips = torch_models.adapt(adapter, clips, config.connector.stack)
  model = torch_models.language_model(llm)
  if added is not None:
    model = torch_models.lora_of_folder(model, added)
  limits = dict(eos_id=tokenizer.eos_id, max_new_tokens=max_new_tokens)
  _answer_all(model, clips, (before_S, after_S), **limits)
  del model
  return compare_speech(
    about,
    config,
    waveforms,
    theirs=clips,
    prompt=(before_S, after_S),
    notes=notes,
    **limits,
  )


def verify_salmonn(
  about: Checkpoint,
  src: Path,
  audio: Sequence[Path],
  *,
  whisper: Path,
  llm: Path,
  beats: Path | None,
  lora_config: Path | None,
  max_new_tokens: int,
) -> Verdict:
  """Runs SALMONN, put together from its files, and a checkpoint of it; as `verification.verify`."""
  config = from_json(about.config)
  kinds = [encoder.kind for encoder in config.encoders]
  if kinds not in (["whisper"], ["whisper", "beats"]) or not config.encoder_norm:
    raise ConversionError(f"{about.folder}: its encoders are {kinds}, not SALMONN's")
  if (beats is not None) != ("beats" in kinds):
    hint = "leave out --beats" if beats else "name the file with --beats"
    raise ConversionError(f"{about.folder}: its encoders are {', '.join(kinds)}; {hint}")
  source = open_source(src, part=salmonn.PART)
  problems, notes = Problems(), list[str]()
  options = salmonn_options.read_options(src, problems, notes)
  connector = salmonn.connector_of(source, options, problems)
  told = options
  if lora_config is not None:
    told = lora.read_options(lora.config_file(lora_config), problems) or options
  problems.check(str(src))
  assert connector is not None

  asked = next((text for _, text in config.prompts if QUESTION not in text), None)
  if asked is None:
    raise ConversionError(
      f"{about.folder}: every prompt of it takes a question; verify needs one that takes none"
    )
  waveforms = load_clips(audio, config)
  # The original's are at least a second long.
  padded = [np.pad(waveform_N, (0, max(0, 16000 - len(waveform_N)))) for waveform_N in waveforms]
  tuned = torch_models.state_of(source, salmonn.WHISPER)
  encoder, frontend = config.encoders[0], config.frontends[0]
  assert isinstance(encoder, WhisperConfig) and isinstance(frontend, LogMelConfig)
  heard = [torch_encoders.hear_whisper(whisper, encoder, frontend, waveforms=padded, tuned=tuned)]
  if beats is not None:
    tuned = torch_models.state_of(source, salmonn.BEATS)
    heard.append(torch_encoders.hear_beats(beats, padded, tuned=tuned))
  clips: list[Stages] = []
  for streams in zip(*heard, strict=True):
    frames = {salmonn.NORMS[kind]: stages["encoder"] for kind, stages in zip(kinds, streams)}
    clip = {
      f"{stage_prefix(kind, len(kinds))}{stage}": x
      for kind, stages in zip(kinds, streams)
      for stage, x in stages.items()
    }
    clips.append({**clip, "adapter": torch_models.connect_windows(source, frames, connector)})

  tokenizer = Tokenizer.from_folder(about.tokenizer)
  before, after = options["prompt_template"].format(asked).split(SPEECH)
  model = torch_models.salmonn_llm(source, llm, lora=told, vocab=config.decoder.vocab)
  theirs = encode_prompt(tokenizer, (before, after))
  limits = dict(eos_id=tokenizer.eos_id, max_new_tokens=max_new_tokens)
  _answer_all(model, clips, theirs, **limits)
  del model
  return compare_speech(
    about,
    config,
    waveforms,
    theirs=clips,
    prompt=encode_prompt(tokenizer, fill_template(config.template, asked)),
    notes=notes,
    **limits,
  )


def _answer_all(
  model,
  clips: Sequence[Stages],
  prompt: tuple[Sequence[int], Sequence[int]],
  *,
  eos_id: int,
  max_new_tokens: int,
) -> None:
  """Adds what PyTorch answers to each clip's stages."""
  for clip in clips:
    clip |= torch_models.answer(
      model,
      *prompt,
      speech_SD=clip["adapter"],
      eos_id=eos_id,
      max_new_tokens=max_new_tokens,
    )


def _task(config: SpeechLLMConfig, src: Path) -> str:
  """The task of the checkpoint that the release has a folder of."""
  tasks = [task for task, _ in config.prompts]
  there = [task for task in tasks if (src / task / mooer.ADAPTER_FILE).is_file()]
  if len(there) != 1:
    named = ", ".join(there or tasks)
    what = "several folders" if there else f"no folder with {mooer.ADAPTER_FILE}"
    raise ConversionError(
      f"{src}: {what} for what the checkpoint is asked ({named}); one must be there"
    )
  return there[0]


def _lora(
  about: Checkpoint, config: SpeechLLMConfig, folder: Path
) -> tuple[Path | None, list[str]]:
  """(LoRA of a task's folder if it is in the checkpoint, apart or merged, else None; notes).

  Raises:
    ConversionError: if the checkpoint has one and the folder has not.
  """
  found = mooer.find_lora(folder)
  if found.is_dir():
    if config.decoder.lora_rank or style_of(about, "mooer").get("lora_merged"):
      return found, []
    return None, [f"{found} is not used: the checkpoint was made without it (--no-lora)"]
  if config.decoder.lora_rank:
    raise ConversionError(f"{found}: not found, but the checkpoint has a LoRA")
  return None, []
