"""Audio in, text out: the class behind `mooer-jax transcribe`."""

import contextlib
import dataclasses
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mooer_jax.audio.decode import SILENCE
from mooer_jax.config import SpeechLLMConfig, build
from mooer_jax.generation import NOT_FINITE, GenerationConfig, compile_batch, decode_batches
from mooer_jax.generation.loading import load_model
from mooer_jax.inputs import encoder_inputs, extract_features, padded_lengths
from mooer_jax.nn.compute import ExecutionConfig, Features
from mooer_jax.prompts import (
  check_prompt_suffix,
  check_question,
  encode_prompt,
  fill_template,
  split_answer,
  task_prompt,
)
from mooer_jax.sharding import mesh_of
from mooer_jax.speech_llm import Batch, shortest_s
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.transcribe.clips import load_clips, raise_first
from mooer_jax.transcribe.transcript import Transcript, join_transcripts

# Each length is compiled once; padding wastes at most 41 % of the encoder's work.
_BUCKET_GROWTH = 2**0.5
_SMALLEST_BUCKET = 32
FREE = "prompt"  # the task in results for which only a prompt is given


class Transcriber:
  """A loaded checkpoint that transcribes audio.

  transcriber = mooer_jax.Transcriber.from_checkpoint("out/demo/train")
  [result] = transcriber.transcribe(["clip.wav"])
  print(result.text)
  """

  def __init__(
    self,
    params: dict,
    config: SpeechLLMConfig,
    tokenizer: Tokenizer,
    options: GenerationConfig = GenerationConfig(),
  ):
    """Takes per-layer params, on one device or a mesh; most users call `from_checkpoint`."""
    self.params = params
    self.mesh = mesh_of(params)
    self.config = config.with_compute(scan=False)
    self.tokenizer = tokenizer
    self.options = dataclasses.replace(
      options, eos_token_id=options.eos_token_id or (tokenizer.eos_id,)
    )
    longest = config.frontends[0].num_frames(round(config.max_audio_s * config.sample_rate_hz))
    lengths = [_SMALLEST_BUCKET]
    while lengths[-1] < longest:
      lengths.append(min(longest, int(lengths[-1] * _BUCKET_GROWTH)))
    self.buckets = padded_lengths(lengths, config)

  @classmethod
  def from_checkpoint(
    cls,
    path: str | Path,
    *,
    dtype: str | None = None,
    base_checkpoint: str | Path | None = None,
    quantization: Literal["none", "int8"] = "none",
    features: Features = "host",
    mesh: jax.sharding.Mesh | None = None,
  ) -> "Transcriber":
    """Loads a checkpoint folder, or the newest checkpoint of a training workdir.

    Args:
      path, base_checkpoint: as in `load_model`, and raises as it does.
      dtype: "float32" or "bfloat16"; default: float32 on CPU, bfloat16 on accelerators.
      quantization: "int8" rounds the matrices of the LLM to 8 bits: half the memory of bfloat16.
      features: where features are computed: "host" (NumPy) or "device" (the compiled program).
      mesh: devices that share the model and the clips of a batch, from
        `mooer_jax.make_mesh(data=1, tensor=4)`; default: one device.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    compute = ExecutionConfig(dtype=dtype, quantization=quantization, features=features)
    return cls(*load_model(path, compute, base_checkpoint=base_checkpoint, mesh=mesh))

  def transcribe(
    self,
    audio: Iterable[str | os.PathLike | bytes | np.ndarray],
    *,
    task: str | None = None,
    prompt: str | None = None,
    question: str | None = None,
    chat_template: str | None = None,
    chunk_length_s: float | None = None,
    batch_size: int = 8,
    seed: int | None = None,
    progress: bool = False,
    errors: Literal["raise", "return"] = "raise",
    **generation: Any,
  ) -> list[Transcript]:
    """Transcribes clips and returns the results in the same order.

    Args:
      audio: paths, bytes of audio files, or float arrays [samples] at the model's sample rate in
        [-1, 1].
      task: one of the model's tasks; default: its only one, else "asr".
      prompt: prompt instead of the task's own; `task` then only determines how the generated text
        is split into transcript and translation.
      question: text that replaces `{}` in the prompt; required if the prompt has it, and only then.
      chat_template: a name in prompts.TEMPLATES instead of the model's.
      chunk_length_s: split longer clips at pauses into chunks of at most this many seconds; each
        chunk gets the same prompt, and the texts are joined. Silent chunks are skipped. Default: a
        clip longer than the model's limit is an error.
      batch_size: chunks decoded together; it changes no result, unless tokens are sampled.
      seed: seed of sampling, 0 to 2**32 - 1; default: 0.
      progress: show a progress bar.
      errors: "raise" raises for clips that cannot be used, before any is transcribed; "return"
        returns a Transcript with `error` for each of them and transcribes the others.
      generation: fields of `GenerationConfig` that override the checkpoint's, such as num_beams=4.

    Raises:
      FileNotFoundError: if the only clip that cannot be used is a missing file.
      ValueError: for a clip that cannot be used, by name, or for which the model's scores are not
        finite; for an unknown task or template; for a prompt that does not have exactly one place
        for the speech, or ends with it; for a question that is missing, empty or not asked for; for
        an argument of a wrong type, out of range or without effect.
    """
    if isinstance(audio, (str, os.PathLike, bytes, np.ndarray)) or not isinstance(audio, Iterable):
      raise ValueError(
        f"audio: {type(audio).__name__}; transcribe takes a list of clips: transcribe([clip])"
      )
    audio = list(audio)
    _check_types(numbers.Real, "a number", chunk_length_s=chunk_length_s)
    _check_types(numbers.Integral, "an int", seed=seed)
    if errors not in ("raise", "return"):
      raise ValueError(f"errors={errors!r}: must be 'raise' or 'return'")
    _check_batch_size(batch_size)
    task, sides = self._encode_prompt(task, prompt, question=question, template=chat_template)
    options = self._options(generation)
    if seed is not None and not 0 <= seed < 2**32:
      raise ValueError(f"seed={seed}: must be between 0 and 2**32 - 1")
    options.check_effect([*generation, *([] if seed is None else ["seed"])])
    clips = load_clips(audio, self.config, chunk_length_s=chunk_length_s)
    if errors == "raise":
      raise_first(clips)
    chunks = [chunk_N for clip in clips if isinstance(clip, list) for chunk_N in clip]
    transcripts = self._transcribe_chunks(
      chunks,
      task,
      sides=sides,
      options=options,
      batch_size=batch_size,
      seed=seed or 0,
      progress=progress,
    )
    results = []
    for index, (source, clip) in enumerate(zip(audio, clips, strict=True)):
      path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
      if isinstance(clip, list):
        result = join_transcripts(transcripts[: len(clip)])
        transcripts = transcripts[len(clip) :]
        if not math.isfinite(result.score):
          name = f"audio[{index}]" if path is None else os.fsdecode(path)
          clip = ValueError(f"{name}: {NOT_FINITE}")
          if errors == "raise":
            raise clip
      if isinstance(clip, Exception):
        result = Transcript("", [], 0.0, task, finished=False, error=str(clip))
      results.append(dataclasses.replace(result, path=path))
    return results

  def warmup(
    self,
    *,
    task: str | None = None,
    prompt: str | None = None,
    question: str | None = None,
    chat_template: str | None = None,
    batch_size: int = 8,
    max_audio_s: float | None = None,
    progress: bool = False,
    **generation: Any,
  ) -> int:
    """Compiles the programs that `transcribe` runs with the same arguments; returns their number.

    There is one for each number of rows and each length that inputs are padded to. They go into the
    persistent compilation cache of JAX, if it is on, where later processes find them.

    Args:
      task, prompt, question, chat_template, batch_size, progress, generation: as in `transcribe`.
      max_audio_s: longest clip (or chunk), seconds; default: the limit of the model.

    Raises:
      ValueError: for arguments as in `transcribe`; for a max_audio_s out of range.
    """
    from rich.progress import track

    _check_types(numbers.Real, "a number", max_audio_s=max_audio_s)
    _check_batch_size(batch_size)
    _, sides = self._encode_prompt(task, prompt, question=question, template=chat_template)
    options = self._options(generation)
    options.check_effect(generation)
    shortest, longest = shortest_s(self.config), self.config.max_audio_s
    seconds = longest if max_audio_s is None else max_audio_s
    if not shortest <= seconds <= longest:
      raise ValueError(
        f"max_audio_s={seconds:g}: must be between {shortest:g} and {longest:g} (the limit of this"
        " model) seconds"
      )
    silence_N = np.zeros(round(seconds * self.config.sample_rate_hz), np.float32)
    clip, cases = extract_features(silence_N, self.config), []
    for bucket in self.buckets:
      cut = tuple(x[:length] for x, length in zip(clip, bucket, strict=True))
      rows = {min(batch_size, 1 << n) for n in range(batch_size.bit_length() + 1)}
      cases += [[cut] * n for n in sorted(rows)]
      if all(map(np.array_equal, cut, clip)):
        break
    for clips in track(cases, "compiling", disable=not progress):
      batch = self._batch(clips, sides, batch_size)
      compile_batch(self.params, batch, self.config, options, mesh=self.mesh)
    return len(cases)

  def _options(self, generation: Mapping[str, Any]) -> GenerationConfig:
    """The checkpoint's options, overridden; raises ValueError for those that have no effect."""
    options = build(
      GenerationConfig, {**dataclasses.asdict(self.options), **generation}, "generation"
    )
    if options.num_return_sequences > 1:
      raise ValueError(
        f"generation.num_return_sequences={options.num_return_sequences}: transcribe returns"
        " one result per clip; call mooer_jax.generate for more"
      )
    if generation.get("return_hidden"):
      raise ValueError("return_hidden=True has no effect on transcribe; call mooer_jax.generate")
    return options

  def _encode_prompt(
    self, task: str | None, prompt: str | None, *, question: str | None, template: str | None
  ) -> tuple[str, tuple[list[int], list[int]]]:
    """(task, tokens before and after the speech); arguments as in `transcribe`."""
    texts = dict(task=task, prompt=prompt, question=question, chat_template=template)
    _check_types(str, "a str", **texts)
    prompts = dict(self.config.prompts)
    if task is None:
      own = next(iter(prompts)) if len(prompts) == 1 else "asr"
      task = own if prompt is None else FREE
    prompt = task_prompt(task, prompts) if prompt is None else prompt
    check_question(prompt, question, task)
    template = self.config.chat_template if template is None else template
    sides = encode_prompt(self.tokenizer, fill_template(template, prompt, question or ""))
    check_prompt_suffix(len(sides[1]), prompt, template)
    return task, sides

  def _transcribe_chunks(
    self,
    chunks: Sequence[np.ndarray],
    task: str,
    *,
    sides: tuple[list[int], list[int]],
    options: GenerationConfig,
    batch_size: int,
    seed: int,
    progress: bool,
  ) -> list[Transcript]:
    """Transcripts of the chunks, in order; silent chunks are skipped and have no text."""
    from rich.progress import track

    def transcript(chunk_N, tokens=(), **outcome):
      text = self.tokenizer.decode(tokens)
      seconds = len(chunk_N) / self.config.sample_rate_hz
      parts = split_answer(task, text)._asdict()
      return Transcript(text, list(tokens), seconds, task, **outcome, **parts)

    transcripts = [transcript(chunk_N) for chunk_N in chunks]
    loud = [i for i, chunk_N in enumerate(chunks) if np.abs(chunk_N).max() >= SILENCE]
    loud.sort(key=lambda i: len(chunks[i]))
    groups = [loud[i : i + batch_size] for i in range(0, len(loud), batch_size)]
    batches = (
      (
        group,
        self._batch([extract_features(chunks[i], self.config) for i in group], sides, batch_size),
      )
      for group in groups
    )
    key = jax.random.key(seed)
    outputs = decode_batches(self.params, batches, self.config, options, key=key, mesh=self.mesh)
    shown = track(outputs, "transcribing", total=len(groups), disable=not progress)
    with contextlib.closing(outputs):
      for group, output in shown:
        for row, i in enumerate(group):
          transcripts[i] = transcript(
            chunks[i],
            output.tokens_BS[row, : output.lengths_B[row]].tolist(),
            score=float(output.scores_B[row]),
            finished=bool(output.finished_B[row]),
          )
    return transcripts

  def _batch(self, clips, sides, batch_size: int) -> Batch:
    rows = min(batch_size, 1 << (len(clips) - 1).bit_length())  # few shapes, little padding
    features, frames = encoder_inputs(clips, rows=rows, buckets=self.buckets)
    prefix_BS, suffix_BS = (np.tile(np.asarray(side, np.int32), (rows, 1)) for side in sides)
    labels_BS = np.full((rows, 1), -1, np.int32)
    return Batch(features, frames, prefix_BS, suffix_BS, labels_BS)


def _check_batch_size(batch_size: int) -> None:
  _check_types(numbers.Integral, "an int", batch_size=batch_size)
  if batch_size is None or batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: must be at least 1")


def _check_types(kind: type, name: str, **values: Any) -> None:
  for argument, value in values.items():
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
      raise ValueError(f"{argument}={value!r} ({type(value).__name__}): must be {name}")
