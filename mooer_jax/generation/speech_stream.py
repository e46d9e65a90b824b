"""Text and speech of one utterance while it is decoded.

The LLM decodes until the vocoder has a chunk of states and their context; the vocoder then runs on
a window of a fixed size. So there are three programs (prefill, decode steps, vocoder), and the cost
of a chunk does not grow with the answer.
"""

import functools
from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation.generate import NOT_FINITE, output_of
from mooer_jax.generation.options import GenerationConfig
from mooer_jax.generation.speech import speech_span, with_states
from mooer_jax.generation.steps import Steps, row_keys

CHUNK_FRAMES = 16  # 0.74 s of MooER-omni, whose windows then have 26 states
_NO_SAMPLES = np.zeros(0, np.float32)


class SpeechPiece(NamedTuple):
  """What decoding has added since the last piece.

  Attributes:
    tokens: new tokens of the answer: text, start token, audio tokens, eos.
    waveform_N: float32, new samples in [-1, 1].
  """

  tokens: list[int]
  waveform_N: np.ndarray = _NO_SAMPLES


def stream_speech(
  params: dict,
  inputs_BSD: jax.Array,
  valid_BS: jax.Array,
  config: SpeechLLMConfig,
  options: GenerationConfig,
  speaker_BE: jax.Array | np.ndarray,
  *,
  start_id: int,
  chunk_frames: int = CHUNK_FRAMES,
  key: jax.Array | None = None,
) -> Generator[SpeechPiece]:
  """Generates text and speech of one utterance; yields them as they are decoded.

  Text comes token by token. After the start token, a chunk of `chunk_frames` states is decoded at a
  time, and its samples are yielded. The last `drop_last` states are held back, as are those in
  which the vocoder looks ahead (`HiFiGANConfig.context`). Joined, the tokens and samples are those
  of `generate_speech`.

  Args:
    params, inputs_BSD, valid_BS, config, speaker_BE, start_id, key: as in `generate_speech_from`;
      one row.
    options: decoding options with num_beams=1: a beam search may replace tokens later.
    chunk_frames: states per chunk of samples, at least 1.

  Raises:
    ValueError: as `generate_speech_from`, before anything is decoded; for several rows, beams, or
      a chunk_frames below 1.
  """
  if options.num_beams > 1:
    raise ValueError(
      f"generation.num_beams={options.num_beams}: a stream needs num_beams=1, as a beam search may"
      " replace tokens later"
    )
  if len(inputs_BSD) != 1:
    raise ValueError(f"{len(inputs_BSD)} utterances: stream_speech takes one")
  if chunk_frames < 1:
    raise ValueError(f"chunk_frames={chunk_frames}: must be at least 1")
  options = with_states(options)
  Steps(params, config, options).check(key=key)
  prompt = inputs_BSD, valid_BS
  return _stream(params, prompt, config, options, speaker_BE, start_id, chunk_frames, key)


def _stream(params, prompt, config, options, speaker_BE, start_id, chunk, key):
  llm, vocoder = {"decoder": params["decoder"]}, {"vocoder": params["vocoder"]}
  speech = config.speech_output
  context, per_frame = speech.vocoder.context, speech.vocoder.samples_per_frame
  window = context + chunk + context
  rows, states_BSD = _begin(llm, *prompt, config, options, key=key, spare=window)
  told, spoken, steps, has_ended = 0, 0, 1, False
  while not has_ended:
    rows, states_BSD, output = _decode(llm, rows, states_BSD, np.int32(steps), config, options)
    output, read = jax.device_get((output, rows.clock))
    if not np.isfinite(output.scores_B[0]):
      raise ValueError(NOT_FINITE)
    length = int(output.lengths_B[0])
    has_ended = read == length  # while decoding goes on, the last token has not been read
    yield SpeechPiece(output.tokens_BS[0, told:length].tolist())
    told = length
    start_B, frames_B = speech_span(
      output.tokens_BS, output.lengths_B, start_id=start_id, drop_last=speech.drop_last
    )
    start, steps = int(start_B[0]), 1
    frames = min(int(frames_B[0]), int(read) - start)  # those that are sure to become speech
    if start == length:
      continue
    while frames >= spoken + chunk + context or (has_ended and frames > spoken):
      first = max(0, spoken - context)
      waveform_BN = _speak_window(
        vocoder,
        states_BSD,
        np.int32(start + first),
        np.array([min(frames - first, window)], np.int32),
        speaker_BE,
        config,
        window,
      )
      end = min(spoken + chunk, frames)
      samples = slice((spoken - first) * per_frame, (end - first) * per_frame)
      yield SpeechPiece([], np.asarray(waveform_BN)[0, samples])
      spoken = end
    steps = max(1, spoken + chunk + context - frames)


@functools.partial(jax.jit, static_argnames=("config", "options", "spare"))
def _begin(params, inputs_BSD, valid_BS, config, options, *, key, spare: int):
  """A row with its first token, and room for its hidden states and `spare` more."""
  steps = Steps(params, config, options)
  rows, hidden_BSD = steps.prefill(inputs_BSD, valid_BS, keys_B=row_keys(key, 1))
  rows = rows.replace(cache=rows.cache.grow(steps.ring_slots))
  return rows, jnp.zeros((1, steps.ring + spare, hidden_BSD.shape[-1]), hidden_BSD.dtype)


@functools.partial(
  jax.jit, static_argnames=("config", "options"), donate_argnames=("rows", "states_BSD")
)
def _decode(params, rows, states_BSD, most, config, options):
  """Reads at most `most` tokens and chooses those that follow: (rows, states, tokens so far)."""
  steps = Steps(params, config, options)
  end = rows.clock + most

  def step(carry):
    rows, states_BSD = carry
    now = rows.clock
    rows, hidden_BRD = steps.step(rows)
    return rows, jax.lax.dynamic_update_slice_in_dim(states_BSD, hidden_BRD, now, axis=1)

  def is_unread(carry):
    clock = carry[0].clock
    return (clock < end) & (clock < carry[0].state.step_B[0])  # the last token is read, too

  rows, states_BSD = jax.lax.while_loop(is_unread, step, (rows, states_BSD))
  return rows, states_BSD, output_of(rows.state, options)


@functools.partial(jax.jit, static_argnames=("config", "window"))
def _speak_window(params, states_BSD, first, frames_B, speaker_BE, config, window: int):
  """The waveform of `window` states from `first` on, of which frames_B are valid."""
  states_BTD = jax.lax.dynamic_slice_in_dim(states_BSD, first, window, axis=1)
  return speech_llm.speak(params, states_BTD, frames_B, speaker_BE, config)
