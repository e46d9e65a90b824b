"""MooER: funasr's encoder, the adapter, its LLM with LoRA, and the parts of speech output."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from mooer_jax.audio.decode import load_audio
from mooer_jax.prompts import fill_template, task_prompt

from ...core.errors import ConversionError
from ...core.kind import Original, Request, Stages
from ...readers import open_source
from . import vocoder
from .language_model import generate_greedily, load_llm, state_of, with_lora_of
from .paraformer import run_sanm_encoder


def run(
  request: Request,
  task: str,
  *,
  encoder: Path,
  adapter: Path,
  llm: Path,
  lora: Path | None,
  notes: Sequence[str] = (),
) -> Original:
  """Runs a task of a release, with its files and folders.

  Tensors of an encoder in adapter_project.pt replace those in the file of the encoder, as the
  original loads one file after the other.
  """
  prompt = task_prompt(task, dict(request.config.prompts))
  tokenizer = request.tokenizer
  assert tokenizer is not None
  before_S, after_S = (
    tokenizer.encode(text) for text in fill_template(request.config.chat_template, prompt)
  )
  if before_S:
    raise ConversionError(f"template {request.config.chat_template!r}: MooER's speech comes first")
  tuned = state_of(open_source(adapter), "encoder.model.")
  clips = run_sanm_encoder(encoder, encoder.with_name("am.mvn"), request.waveforms, tuned=tuned)
  model = load_llm(llm)
  if lora is not None:
    model = with_lora_of(model, lora)
  for clip in clips:
    clip["adapter"] = run_adapter(adapter, clip)
    clip |= generate_greedily(request, model, before_S, after_S, speech_SD=clip["adapter"])
  return Original(clips, prompt=(before_S, after_S), notes=tuple(notes))


def run_speech(request: Request, original: Original, generator: Path, speaker: Path, voice: Path):
  """Adds the voice and the waveform of all hidden states of each clip to a text `Original`."""
  voice_N = load_audio(voice, sample_rate_hz=16000) if voice.exists() else request.waveforms[0]
  encoder = state_of(open_source(speaker, "speaker_encoder"))
  weights = state_of(open_source(generator, "generator"))
  with torch.no_grad():
    mel_FT = vocoder.speaker_mel(torch.tensor(voice_N, dtype=torch.float64)).float()
    vector_BE = vocoder.speaker_vector(encoder, mel_FT[None])
    for clip in original.clips:
      hidden_AD = torch.tensor(clip["hidden"])
      clip["voice"] = vector_BE.numpy()
      waveform_BN = vocoder.generate(weights, hidden_AD[None], vector_BE)
      clip["waveform"] = waveform_BN.reshape(len(hidden_AD), -1).numpy()
  return dataclasses.replace(original, voice=voice_N)


def run_adapter(adapter: Path, clip: Stages):
  """Runs MooER's adapter on the frames of a clip: [S, D of the LLM]."""
  weight = state_of(open_source(adapter), "encoder_projector.")
  frames_TD = torch.tensor(clip["encoder"])
  stack = weight["linear1.weight"].shape[1] // frames_TD.shape[1]
  whole = len(frames_TD) // stack
  x = frames_TD[: whole * stack].reshape(whole, -1)
  linear = torch.nn.functional.linear
  x = torch.relu(linear(x, weight["linear1.weight"], weight["linear1.bias"]))
  return linear(x, weight["linear2.weight"], weight["linear2.bias"]).numpy()
