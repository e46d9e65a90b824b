"""Speech output of decoding: the states of the audio tokens to waveforms, without a second pass."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import speech_llm, vocoders
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation.generate import GenerateOutput, generate, generate_from
from mooer_jax.generation.options import GenerationConfig
from mooer_jax.speech_llm import Batch

_SHORTEST = 32  # states of the shortest program of the vocoder; the others have 64, 128, …
_generate_from = jax.jit(generate_from, static_argnames=("config", "options", "mesh"))


class SpeechOutput(NamedTuple):
  """Answers with speech, in NumPy.

  Attributes:
    output: tokens of the answers, without hidden states.
    text_lengths_B: int32, number of tokens before the start token, or of all tokens without one.
    frames_B: int32, number of states that became speech; 0 without a start token.
    waveform_BN: float32 [B, N] in [-1, 1], `samples_per_frame` samples per state; 0 after the end.
  """

  output: GenerateOutput
  text_lengths_B: np.ndarray
  frames_B: np.ndarray
  waveform_BN: np.ndarray


def speech_span(
  tokens_BS: np.ndarray, lengths_B: np.ndarray, *, start_id: int, drop_last: int
) -> tuple[np.ndarray, np.ndarray]:
  """Place and number of the states that become speech.

  They begin with that at the first start token; the last `drop_last` of the answer, that at its eos
  included, are left out.

  Args:
    tokens_BS: int, generated tokens.
    lengths_B: int, number of tokens of each answer, eos included.
    start_id: id of the start token.
    drop_last: states that are left out (`SpeechOutputConfig`).

  Returns:
    (place of the start token, number of states), int32 [B]; (length, 0) without a start token.

  Source: the slice that MooER-omni passes to its vocoder.
  """
  is_start_BS = tokens_BS == start_id
  is_start_BS &= np.arange(tokens_BS.shape[1]) < lengths_B[:, None]
  start_B = np.where(is_start_BS.any(1), is_start_BS.argmax(1), lengths_B)
  frames_B = np.maximum(lengths_B - drop_last - start_B, 0)
  return start_B.astype(np.int32), frames_B.astype(np.int32)


def generate_speech(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  options: GenerationConfig,
  speaker_BE: jax.Array | np.ndarray,
  *,
  start_id: int,
  key: jax.Array | None = None,
  lora_scale: jax.Array | float | None = None,
) -> SpeechOutput:
  """Generates text and speech for a batch.

  The hidden states that the vocoder takes are collected while tokens are decoded. The vocoder is
  compiled for a few lengths: 32, 64, 128, … states.

  Args:
    params: as in `generate`, with params["vocoder"].
    batch, config, options, key, lora_scale: as in `generate`; the config has speech output.
    speaker_BE: vectors of the voices, or one, [1, E], for all rows (`speech_llm.speaker_vector`).
    start_id: id of config.speech_output.start_token.

  Raises:
    ValueError: as `generate`; for num_return_sequences above 1.
  """
  options = with_states(options)
  arguments = dict(key=key, lora_scale=lora_scale)
  output = generate(_without_speech(params), batch, config, options, **arguments)
  return _speech_of(params, output, config, speaker_BE, start_id)


def generate_speech_from(
  params: dict,
  inputs_BSD: jax.Array,
  valid_BS: jax.Array,
  config: SpeechLLMConfig,
  options: GenerationConfig,
  speaker_BE: jax.Array | np.ndarray,
  *,
  start_id: int,
  key: jax.Array | None = None,
) -> SpeechOutput:
  """`generate_speech` for prompts given as embeddings, as in `generate_from`."""
  options = with_states(options)
  output = _generate_from(_without_speech(params), inputs_BSD, valid_BS, config, options, key=key)
  return _speech_of(params, output, config, speaker_BE, start_id)


def with_states(options: GenerationConfig) -> GenerationConfig:
  """The options with return_hidden; raises ValueError for num_return_sequences above 1."""
  if options.num_return_sequences > 1:
    raise ValueError(
      f"generation.num_return_sequences={options.num_return_sequences}: speech is generated for one"
      " sequence; set it to 1"
    )
  return dataclasses.replace(options, return_hidden=True)


def _without_speech(params: dict) -> dict:
  return {name: part for name, part in params.items() if name not in vocoders.PARTS}


def _speech_of(params, output: GenerateOutput, config, speaker_BE, start_id: int) -> SpeechOutput:
  assert config.speech_output is not None and output.hidden_BRSD is not None
  hidden_BSD = output.hidden_BRSD[:, 0]
  output = jax.device_get(dataclasses.replace(output, hidden_BRSD=None))
  start_B, frames_B = speech_span(
    np.asarray(output.tokens_BS),
    np.asarray(output.lengths_B),
    start_id=start_id,
    drop_last=config.speech_output.drop_last,
  )
  waveform_BN = np.zeros((len(frames_B), 0), np.float32)
  if longest := int(frames_B.max(initial=0)):
    length = max(_SHORTEST, 1 << (longest - 1).bit_length())
    padded_BN = _speak(
      {"vocoder": params["vocoder"]}, hidden_BSD, start_B, frames_B, speaker_BE, config, length
    )
    samples = longest * config.speech_output.vocoder.samples_per_frame
    waveform_BN = np.asarray(padded_BN)[:, :samples]
  return SpeechOutput(output, start_B, frames_B, waveform_BN)


@functools.partial(jax.jit, static_argnames=("config", "length"))
def _speak(params, hidden_BSD, start_B, frames_B, speaker_BE, config, length: int):
  """Waveforms of `length` states from start_B on, of which frames_B are valid."""
  states_BTD = vocoders.segment(hidden_BSD, start_B, length)
  speaker_BE = jnp.broadcast_to(speaker_BE, (len(start_B), speaker_BE.shape[-1]))
  return speech_llm.speak(params, states_BTD, frames_B, speaker_BE, config)
