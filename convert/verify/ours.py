"""Our side of `convert verify`: the stages of a checkpoint on clips, and their errors."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import speech_llm, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.speaker_mel import speaker_mel
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import GenerationConfig, weights
from mooer_jax.generation.generate import generate, generate_from
from mooer_jax.inputs import encoder_inputs, extract_features
from mooer_jax.nn.compute import ExecutionConfig

from ..core.kind import Original, Request
from .bounds import with_bounds
from .report import Report, accuracy, same_tokens, stage_errors

# Rows of the last table: (name, dtype of the weights, dtype of the computation).
DTYPES = (
  ("bfloat16 weights", "bfloat16", "float32"),
  ("bfloat16 compute", "bfloat16", "bfloat16"),
  ("int8 weights", "int8", "float32"),
)


def load_clips(files: Sequence[Path], config: SpeechLLMConfig) -> list[np.ndarray]:
  """Decodes audio files at the model's sample rate: float32 [N] each.

  Raises ValueError if one is too short or too long for an encoder, before PyTorch would cut it.
  """
  rate_hz = config.sample_rate_hz
  clips = [load_audio(file, sample_rate_hz=rate_hz, channel=config.channel) for file in files]
  for file, clip_N in zip(files, clips, strict=True):
    extract_features(clip_N, config, name=str(file))
  return clips


def compare(request: Request, original: Original) -> Report:
  """Compares all stages of both sides, and the tokens; our side computes the clips in one batch."""
  params, clips, config = request.about.params, request.waveforms, request.config
  theirs = {
    stage: np.concatenate([clip[stage] for clip in original.clips]) for stage in original.clips[0]
  }
  stages = functools.partial(_stages, config=config, original=original)
  ours, bounds = with_bounds(stages, params, clips)
  errors, notes = stage_errors(ours, theirs, bounds), [*original.notes]
  if "tokens" not in theirs:
    return Report(errors, notes=notes)
  tokens = _generate(request, original)
  same = same_tokens(tokens, [clip["tokens"].tolist() for clip in original.clips])
  costs = []
  for name, stored, computed in DTYPES:
    rounded, model = rounded_to(stored, params, config)
    other = model.replace(compute=ExecutionConfig(dtype=computed))
    logits_AV = _logits(rounded, clips, config=other, original=original)
    costs.append(accuracy(name, ours["logits"], logits_AV))
  return Report(errors, same, costs, notes)


def rounded_to(dtype: str, params: dict, config: SpeechLLMConfig) -> tuple[dict, SpeechLLMConfig]:
  """The model with rounded weights, as loading with that dtype or quantization rounds them.

  Args:
    dtype: "bfloat16", of all matrices; or "int8", of those of the LLM after its LoRA is merged.
    params: float32; they stay as they are.
  """
  if dtype == "int8":
    decoder = jax.tree.map(jnp.copy, params["decoder"])  # `weights` deletes what it replaces
    merged, config = weights.merge_lora({**params, "decoder": decoder}, config)
    return weights.quantize(merged), config
  leaves = tree.flatten(params)
  rounded = {path: x if x.ndim < 2 else x.astype(dtype) for path, x in leaves.items()}
  return tree.unflatten(rounded), config


def _stages(params, clips, *, config: SpeechLLMConfig, original: Original) -> dict[str, np.ndarray]:
  """Valid rows of every stage: float32 [rows, D]."""
  values, has_llm = {}, "tokens" in original.clips[0]
  if clips:
    found = _speech_stages(params, _batch(clips, config, original), config, has_llm=has_llm)
    values = {name: np.asarray(x)[np.asarray(valid)] for name, (x, valid) in found.items()}
  if has_llm:
    values["logits"] = _logits(params, clips, config=config, original=original)
  if original.voice is not None:
    values |= _speech_output(params, clips, config=config, original=original)
  return values


def _speech_output(params, clips, *, config: SpeechLLMConfig, original: Original) -> dict[str, Any]:
  """The voice and the waveform of the hidden states of each clip: float32 [states, samples]."""
  assert original.voice is not None
  mel_BTF = speaker_mel(original.voice)[None]
  batch = _batch(clips, config, original)
  speaker_BE, waveform_BN = _spoken(params, batch, mel_BTF, config)
  states_BA = batch.labels_BS >= 0
  waveform_BAN = np.asarray(waveform_BN).reshape(*states_BA.shape, -1)
  return {
    "voice": np.repeat(np.asarray(speaker_BE)[:1], len(clips), axis=0),
    "waveform": waveform_BAN[states_BA],
  }


@functools.partial(jax.jit, static_argnames="config")
def _spoken(params, batch, mel_BTF, config: SpeechLLMConfig) -> tuple[jax.Array, jax.Array]:
  hidden_BAD = speech_llm.answer_hidden(params, batch, config)
  speaker_BE = speech_llm.speaker_vector(params, mel_BTF, config)
  speaker_BE = jnp.repeat(speaker_BE, len(hidden_BAD), axis=0)
  frames_B = (batch.labels_BS >= 0).sum(1)
  return speaker_BE, speech_llm.speak(params, hidden_BAD, frames_B, speaker_BE, config)


def _logits(params, clips, *, config: SpeechLLMConfig, original: Original) -> np.ndarray:
  """Logits with the original's tokens as input: float32 [A, V]."""
  if clips:
    batch = _batch(clips, config, original)
    return np.asarray(_answer_logits(params, batch, config))[batch.labels_BS >= 0]
  prompt_S = original.prompt[0]
  given_BS = np.array([[*prompt_S, *original.clips[0]["tokens"][:-1]]])
  return np.asarray(_text_logits(params, given_BS, config))[0, len(prompt_S) - 1 :]


def _generate(request: Request, original: Original) -> list[list[int]]:
  """Greedy tokens of each clip, or of the text prompt."""
  params, config = request.about.params, request.config
  eos_token_id = () if request.eos_id is None else (request.eos_id,)
  options = GenerationConfig(max_new_tokens=request.max_new_tokens, eos_token_id=eos_token_id)
  if request.waveforms:
    batch = _batch(request.waveforms, config, original)
    tokens_BS = generate(params, batch, config, options).tokens_BS
  else:
    prompt_BS = np.array([original.prompt[0]])
    tokens_BS = _generate_text(params, prompt_BS, config, options=options)
  return [[int(token) for token in row_S if token >= 0] for row_S in np.asarray(tokens_BS)]


def _batch(clips, config: SpeechLLMConfig, original: Original) -> speech_llm.Batch:
  features, frames = encoder_inputs([extract_features(clip_N, config) for clip_N in clips])
  tokens = [clip.get("tokens", np.zeros(0)) for clip in original.clips]
  columns = [*itertools.zip_longest(*tokens, fillvalue=-1)]
  prefix_BS, suffix_BS = (
    np.tile(np.array(part_S, np.int32), (len(clips), 1)) for part_S in original.prompt
  )
  return speech_llm.Batch(
    features=features,
    frames=frames,
    prefix_BS=prefix_BS,
    suffix_BS=suffix_BS,
    labels_BS=np.array(columns, np.int32).reshape(-1, len(clips)).T,
  )


_answer_logits = jax.jit(speech_llm.answer_logits, static_argnames="config")


@functools.partial(jax.jit, static_argnames=("config", "has_llm"))
def _speech_stages(params, batch, config: SpeechLLMConfig, *, has_llm: bool) -> dict[str, Any]:
  """Stages before the LLM, as (values, which of them are not padding)."""
  streams = speech_llm.encode_each(params, batch, config)
  stages = {}
  for number, (name, stream) in enumerate(streams.items()):
    of = f"{name} " if len(streams) > 1 else ""
    normed_BTF = jnp.asarray(batch.features[number])
    if config.frontends[number].normalised:
      cmvn = params["frontend"][name]
      normed_BTF = (normed_BTF + cmvn["shift"]) * cmvn["scale"]
    valid_BT = jnp.arange(normed_BTF.shape[1]) < jnp.asarray(batch.frames[number])[:, None]
    stages[f"{of}features"] = normed_BTF, valid_BT
    stages[f"{of}encoder"] = stream
  if has_llm:
    frames_BTD, valid_BT = speech_llm.join(params, streams, config)
    speech_BSD, valid_BS = speech_llm.connect(params, frames_BTD, valid_BT, config)
    stages["adapter"] = speech_BSD, valid_BS
    stages["prompt"] = speech_llm.splice(params, batch, speech_BSD, valid_BS, config)
  return stages


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _generate_text(params, tokens_BS, config: SpeechLLMConfig, *, options: GenerationConfig):
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  valid_BS = jnp.ones(tokens_BS.shape, bool)
  return generate_from(params, inputs_BSD, valid_BS, config, options).tokens_BS


@functools.partial(jax.jit, static_argnames="config")
def _text_logits(params, tokens_BS, config: SpeechLLMConfig):
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, jnp.ones(tokens_BS.shape, bool), config)
  return speech_llm.logits(params, hidden_BSD, config)
