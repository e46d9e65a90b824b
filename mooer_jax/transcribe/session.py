"""Dialogues of several turns with a model that answers with speech."""

import dataclasses
import math
import time
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import NOT_FINITE, GenerationConfig
from mooer_jax.generation.speech import generate_speech_from
from mooer_jax.generation.speech_stream import CHUNK_FRAMES, SpeechPiece, stream_speech
from mooer_jax.inputs import extract_features
from mooer_jax.prompts import QUESTION, fill_next_turn, fill_template, task_prompt
from mooer_jax.text.tokenizer import REPLACEMENT, Tokenizer
from mooer_jax.transcribe.clips import Audio, read_clip
from mooer_jax.transcribe.response import SpeechChunk, SpeechResponse
from mooer_jax.transcribe.settings import check_types, prompt_sides, sampling_options
from mooer_jax.transcribe.transcriber import prompt_batch
from mooer_jax.vocoders import SpeechOutputConfig

_LINE_BREAK = "\\n"  # two characters in an answer that stand for a line break
_SHORTEST = 64  # slots of the shortest history; the others have 128, 256, …
_NO_SAMPLES = np.zeros(0, np.float32)
_embed_prompt = jax.jit(speech_llm.prompt, static_argnums=2)


@dataclasses.dataclass(frozen=True, eq=False)
class SpeakingModel:
  """A model with speech output, and how its inputs are padded (`transcriber.input_buckets`).

  Attributes:
    params: with folded "vocoder".
    options: with the eos ids.
  """

  params: dict
  config: SpeechLLMConfig
  tokenizer: Tokenizer
  options: GenerationConfig
  buckets: list[tuple[int, ...]]

  @property
  def speech(self) -> SpeechOutputConfig:
    assert self.config.speech_output is not None
    return self.config.speech_output

  @property
  def start_id(self) -> int:
    """Id of the start token."""
    return self.tokenizer.token_id(self.speech.start_token)

  def text_tokens(self, tokens: list[int]) -> list[int]:
    """Those before the start token; all without one."""
    return tokens[: tokens.index(self.start_id)] if self.start_id in tokens else tokens

  def text(self, tokens: list[int]) -> str:
    """The text of an answer."""
    return self.tokenizer.decode(self.text_tokens(tokens)).replace(_LINE_BREAK, "\n")


class Session:
  """A dialogue: each clip is answered after the clips and the text of the answers before it.

  The prompt of a turn is that of a single clip, without the system message from the second turn on.
  The turns before it precede it as embeddings: speech tokens, prompt, the text of the answer
  (without audio tokens) and its eos. A turn that fails, or whose stream is not read to the end, is
  not part of the history.

  Attributes:
    responses: the answers so far.
  """

  def __init__(self, model: SpeakingModel, *, task: str, speaker_BE: np.ndarray):
    """Most users call `SpeechResponder.session`.

    Raises ValueError for an unknown task, or one whose prompt takes a question or text.
    """
    check_types(str, "a str", task=task)
    self._prompt = task_prompt(task, dict(model.config.prompts))
    if QUESTION in self._prompt:
      raise ValueError(
        f"task={task!r}: its prompt {self._prompt!r} takes a question, which answers with speech do"
        " not support; choose another task"
      )
    fill_template(model.config.chat_template, self._prompt)
    self.responses: list[SpeechResponse] = []
    self._model = model
    self._task = task
    self._speaker_BE = speaker_BE
    self._history: list[np.ndarray] = []  # [S, D] of each turn: the answer before it, its prompt
    self._answer: list[int] = []  # the last one

  def __call__(self, audio: Audio, *, seed: int | None = None, **generation: Any) -> SpeechResponse:
    """Answers the next clip; arguments as in a call of `SpeechResponder`."""
    model = self._model
    options, seed = sampling_options(model.options, generation, seed)
    turn_SD, inputs_BSD, valid_BS = self._embed(audio)
    found = generate_speech_from(
      model.params,
      inputs_BSD,
      valid_BS,
      model.config,
      options,
      self._speaker_BE,
      start_id=model.start_id,
      key=jax.random.key(seed),
    )
    if not math.isfinite(found.output.scores_B[0]):
      raise ValueError(NOT_FINITE)
    tokens = found.output.tokens_BS[0, : int(found.output.lengths_B[0])].tolist()
    samples = int(found.frames_B[0]) * model.speech.vocoder.samples_per_frame
    return self._remember(turn_SD, tokens, found.waveform_BN[0, :samples], options)

  def stream(
    self,
    audio: Audio,
    *,
    seed: int | None = None,
    chunk_frames: int = CHUNK_FRAMES,
    **generation: Any,
  ) -> Generator[SpeechChunk]:
    """Answers the next clip as a stream; arguments as in `SpeechResponder.stream`.

    Read it to its end before the next turn. Otherwise, the end of the stream raises ValueError.
    """
    began_s, model = time.monotonic(), self._model
    options, seed = sampling_options(model.options, {"num_beams": 1} | generation, seed)
    turn_SD, inputs_BSD, valid_BS = self._embed(audio)
    pieces = stream_speech(
      model.params,
      inputs_BSD,
      valid_BS,
      model.config,
      options,
      self._speaker_BE,
      start_id=model.start_id,
      chunk_frames=chunk_frames,
      key=jax.random.key(seed),
    )
    return self._chunks(pieces, turn_SD, options, began_s, len(self.responses))

  def _chunks(
    self,
    pieces: Generator[SpeechPiece],
    turn_SD: np.ndarray,
    options: GenerationConfig,
    began_s: float,
    turns: int,
  ) -> Generator[SpeechChunk]:
    tokens: list[int] = []
    waveforms, sent, first_audio_s = [_NO_SAMPLES], "", None
    for piece in pieces:
      tokens += piece.tokens
      elapsed_s = time.monotonic() - began_s
      if len(piece.waveform_N):
        first_audio_s = elapsed_s if first_audio_s is None else first_audio_s
        waveforms.append(piece.waveform_N)
        yield SpeechChunk("", piece.waveform_N, elapsed_s)
      text = self._model.text(tokens)
      if self._model.start_id not in tokens:
        # The rest of a character, or of a line break, may follow.
        text = text.rstrip(REPLACEMENT).removesuffix(_LINE_BREAK[0])
      if len(text) > len(sent):
        yield SpeechChunk(text[len(sent) :], _NO_SAMPLES, elapsed_s)
        sent = text
    if len(self.responses) != turns:
      raise ValueError(
        "another clip was answered while this stream was open, so this turn is not part of the"
        " history; read a stream to its end before the next turn"
      )
    waveform_N = np.concatenate(waveforms)
    response = self._remember(turn_SD, tokens, waveform_N, options, first_audio_s)
    rest = response.text[len(sent) :]
    yield SpeechChunk(rest, _NO_SAMPLES, time.monotonic() - began_s, response)

  def _embed(self, audio: Audio) -> tuple[np.ndarray, Any, Any]:
    """([S, D] of this turn, inputs [1, S, D] of the whole dialogue, valid [1, S])."""
    model = self._model
    if self._history:
      texts = fill_next_turn(model.config.chat_template, self._prompt)
      before, after = map(model.tokenizer.encode, texts)
      before = [*self._answer, *before]
      before = [-1] * (_padded(len(before)) - len(before)) + before
    else:
      _, (before, after) = prompt_sides(
        model.config,
        model.tokenizer,
        task=self._task,
        prompt=None,
        question=None,
        chat_template=None,
      )
    clip = extract_features(read_clip(audio, model.config), model.config)
    batch = prompt_batch([clip], (before, after), buckets=model.buckets, rows=1)
    inputs_BSD, valid_BS = _embed_prompt(model.params, batch, model.config)
    turn_SD = np.asarray(inputs_BSD[0])[np.asarray(valid_BS[0])]
    if not self._history:
      return turn_SD, inputs_BSD, valid_BS
    past_SD = np.concatenate(self._history)
    padding = _padded(len(past_SD)) - len(past_SD)
    past_SD = np.pad(past_SD, [(padding, 0), (0, 0)])
    is_past_S = np.arange(len(past_SD)) >= padding
    inputs_BSD = np.concatenate([past_SD[None], np.asarray(inputs_BSD)], axis=1)
    return turn_SD, inputs_BSD, np.concatenate([is_past_S[None], np.asarray(valid_BS)], axis=1)

  def _remember(
    self,
    turn_SD: np.ndarray,
    tokens: list[int],
    waveform_N: np.ndarray,
    options: GenerationConfig,
    first_audio_s: float | None = None,
  ) -> SpeechResponse:
    """The answer, after it and its clip were added to the history."""
    if not np.isfinite(waveform_N).all():
      raise ValueError("the samples are not finite; the weights of the vocoder are damaged")
    model, eos = self._model, options.eos_token_id
    text_tokens, no_speech = model.text_tokens(tokens), None
    if len(text_tokens) == len(tokens):
      no_speech = f"no speech: the model did not generate {model.speech.start_token!r}"
    elif not len(waveform_N):
      no_speech = (
        f"no speech: the answer has {len(tokens) - len(text_tokens)} tokens from"
        f" {model.speech.start_token!r} on, the last {model.speech.drop_last} of which are left out"
      )
    response = SpeechResponse(
      text=model.text(tokens),
      waveform_N=waveform_N,
      sample_rate_hz=model.speech.vocoder.sample_rate_hz,
      task=self._task,
      tokens=tokens,
      finished=tokens[-1] in eos,
      no_speech=no_speech,
      first_audio_s=first_audio_s,
    )
    self._history.append(turn_SD)
    text_tokens = [token for token in text_tokens if token not in eos]
    self._answer = [*text_tokens, model.tokenizer.eos_id]
    self.responses.append(response)
    return response


def _padded(slots: int) -> int:
  """64, 128, 256, …: few lengths to compile."""
  return max(_SHORTEST, 1 << (slots - 1).bit_length())
