"""Audio in, text out: the class behind `mooer-jax transcribe`."""

import collections
import contextlib
import dataclasses
import numbers
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import GenerationConfig, compile_batch, decode_batches
from mooer_jax.generation.adapters import Adapters
from mooer_jax.generation.loading import load_model
from mooer_jax.inputs import encoder_inputs, extract_features, padded_lengths
from mooer_jax.nn.compute import ExecutionConfig, Features
from mooer_jax.prompts import split_answer
from mooer_jax.sharding import mesh_of
from mooer_jax.speech_llm import Batch, prompt_slots, shortest_s
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.transcribe.clips import Clip, raise_first, read_windows
from mooer_jax.transcribe.settings import (
  Settings,
  check_audio,
  check_batch_size,
  check_types,
  decoding_options,
  make_settings,
  prompt_sides,
  with_adapters,
)
from mooer_jax.transcribe.transcript import Transcript

# Each length is compiled once; padding wastes at most 19 % of the work before the first token.
_BUCKET_GROWTH = 2**0.25
_SMALLEST_BUCKET = 32


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
    adapters: Adapters | None = None,
  ):
    """Takes per-layer params, on one device or a mesh; most users call `from_checkpoint`."""
    self.params = params
    self.adapters = adapters
    self.mesh = mesh_of(params)
    self.config = config.with_compute(scan=False)
    self.tokenizer = tokenizer
    self.options = dataclasses.replace(
      options, eos_token_id=options.eos_token_id or (tokenizer.eos_id,)
    )
    self.buckets = input_buckets(config)

  @classmethod
  def from_checkpoint(
    cls,
    path: str | Path,
    *,
    dtype: str | None = None,
    base_checkpoint: str | Path | None = None,
    quantization: Literal["none", "int8"] = "none",
    features: Features = "host",
    adapters: Mapping[str, str | Path] | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ) -> "Transcriber":
    """Loads a checkpoint folder, or the newest checkpoint of a training workdir.

    Args:
      path, base_checkpoint: as in `load_model`, and raises as it does.
      dtype: "float32" or "bfloat16"; default: float32 on CPU, bfloat16 on accelerators.
      quantization: "int8" rounds the matrices of the LLM to 8 bits: half the memory of bfloat16.
      features: where features are computed: "host" (NumPy) or "device" (the compiled program).
      adapters: {name: folder} of fine-tunes of this checkpoint that trained a LoRA alone; `adapter`
        of `transcribe` chooses among them. To use one alone, pass its folder as `path`: merged, it
        decodes faster.
      mesh: devices that share the model and the clips of a batch, from
        `mooer_jax.make_mesh(data=1, tensor=4)`; default: one device.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    compute = ExecutionConfig(dtype=dtype, quantization=quantization, features=features)
    loaded = load_model(
      path, compute, base_checkpoint=base_checkpoint, adapters=adapters, mesh=mesh
    )
    return cls(
      loaded.params, loaded.model, loaded.tokenizer, loaded.generation, adapters=loaded.adapters
    )

  def transcribe(
    self,
    audio: Iterable[str | os.PathLike | bytes | np.ndarray],
    *,
    task: str | None = None,
    prompt: str | None = None,
    question: str | None = None,
    chat_template: str | None = None,
    adapter: str | Iterable[str | None] | None = None,
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
      adapter: a name in `adapters` of `from_checkpoint` for all clips, or a list of one per clip;
        None is the checkpoint without an adapter.
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
        an unknown adapter, or another number of them than clips; for an argument of a wrong type,
        out of range or without effect.
    """
    check_audio(audio)
    if errors not in ("raise", "return"):
      raise ValueError(f"errors={errors!r}: must be 'raise' or 'return'")
    clips = list(with_adapters(audio, adapter, self.adapters))
    settings = self._settings(
      task=task,
      prompt=prompt,
      question=question,
      chat_template=chat_template,
      chunk_length_s=chunk_length_s,
      batch_size=batch_size,
      seed=seed,
      **generation,
    )
    stop = threading.Event()
    windows: Iterable = read_windows(clips, self.config, stop=stop, **settings.reading_options)
    if errors == "raise":
      windows = [*windows]
      raise_first([clip.failure for window in windows for clip in window])
    results = []
    with progress_bar(progress) as on_chunk:
      found = self._stream(windows, settings, stop=stop, on_chunk=on_chunk)
      with contextlib.closing(found):
        for result in found:
          if result.error and errors == "raise":
            raise ValueError(result.error)
          results.append(result)
    return results

  def stream(
    self,
    audio: Iterable[str | os.PathLike | bytes | np.ndarray],
    *,
    adapter: str | Iterable[str | None] | None = None,
    on_chunk: Callable[[Transcript], object] = lambda chunk: None,
    **options: Any,
  ) -> Generator[Transcript]:
    """Transcribes any number of clips; yields the results in the same order, once they are ready.

    Clips are read in a thread while others are decoded, those of 8 batches at a time (with
    chunk_length_s, of one), so that the memory does not depend on their number. A clip that cannot
    be used gives a Transcript with `error`.

    Args:
      audio: as in `transcribe`; may be endless. Its exceptions are raised after the clips before.
      adapter: as in `transcribe`; names for endless audio come from an iterator of their own.
      on_chunk: called with the result of each chunk, in the order in which they are decoded.
      options: the other arguments of `transcribe`, but for `errors` and `progress`.

    Raises:
      ValueError: for arguments as in `transcribe`, before anything is read; for names of adapters
        that do not come from a list, after the clips before.
    """
    check_audio(audio)
    for name in {"errors", "progress"} & options.keys():
      raise TypeError(
        f"stream() has no argument {name!r}: failed clips give results with an error, and on_chunk"
        " reports progress"
      )
    settings = self._settings(**options)
    clips = with_adapters(audio, adapter, self.adapters)
    stop = threading.Event()
    windows = read_windows(clips, self.config, stop=stop, **settings.reading_options)
    return self._stream(windows, settings, stop=stop, on_chunk=on_chunk, live=True)

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
    """Compiles the programs that `transcribe` runs with the same arguments.

    There is a prefill for each number of rows and each length that inputs are padded to. They go
    into the persistent compilation cache of JAX, if it is on, where later processes find them.

    Args:
      task, prompt, question, chat_template, batch_size, progress, generation: as in `transcribe`.
      max_audio_s: longest clip (or chunk), seconds; default: the limit of the model.

    Returns:
      The number of shapes of batches.

    Raises:
      ValueError: for arguments as in `transcribe`; for a max_audio_s out of range.
    """
    check_types(numbers.Real, "a number", max_audio_s=max_audio_s)
    check_batch_size(batch_size)
    texts = dict(task=task, prompt=prompt, question=question, chat_template=chat_template)
    _, sides = prompt_sides(self.config, self.tokenizer, **texts)
    options = decoding_options(self.options, generation)
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
      rows = {_padded_rows(n, batch_size) for n in range(1, batch_size + 1)}
      cases += [[cut] * n for n in sorted(rows)]
      if all(map(np.array_equal, cut, clip)):
        break
    bar = Progress(console=Console(stderr=True), redirect_stdout=False, disable=not progress)
    with bar:
      self._compile(bar.track(cases, description="compiling"), sides, options, batch_size)
    return len(cases)

  def _compile(self, cases: Iterable[list], sides, options, batch_size: int) -> None:
    for clips in cases:
      batch = self._batch(clips, sides, batch_size)
      compile_batch(
        self.params,
        batch,
        self.config,
        options,
        rows=(len(clips), batch_size),  # alone, or as the last of several batches
        prompt_slots=self._prompt_slots(sides),
        lora_scale=self._lora_scale([None] * batch.frames[0].shape[0]),
        mesh=self.mesh,
      )

  def _settings(self, **arguments: Any) -> Settings:
    return make_settings(self.config, self.tokenizer, self.options, **arguments)

  def _lora_scale(self, names: Sequence[str | None]) -> np.ndarray | None:
    """The scale of the adapter of each row."""
    return None if self.adapters is None else self.adapters.scale(names)

  def _stream(
    self,
    windows: Iterable[list[Clip]],
    settings: Settings,
    *,
    stop: threading.Event,
    on_chunk: Callable[[Transcript], object],
    live: bool = False,
  ) -> Generator[Transcript]:
    """Transcripts of the clips of all windows, in order; sets `stop` when it is closed."""
    pending: collections.deque[Clip] = collections.deque()  # in order, also those that are done

    def batches():
      for window in windows:
        pending.extend(window)
        parts = [(clip, n) for clip in window for n in clip.loud]
        parts.sort(key=lambda part: -len(part[0].chunks[part[1]]))
        del window  # so that only what is left to do is in memory while the next one is read
        yield [], None  # clips without speech wait for nothing
        while parts:
          group, parts = parts[: settings.batch_size], parts[settings.batch_size :]
          features = [extract_features(clip.take(n), self.config) for clip, n in group]
          yield group, self._batch(features, settings.sides, settings.batch_size)

    def lora_scale(group):
      rows = _padded_rows(len(group), settings.batch_size)
      names = [clip.adapter for clip, _ in group]
      return self._lora_scale([*names, *[None] * (rows - len(names))])

    outputs = decode_batches(
      self.params,
      batches(),
      self.config,
      settings.options,
      key=jax.random.key(settings.seed),
      prompt_slots=self._prompt_slots(settings.sides),
      lora_scale=lora_scale,
      mesh=self.mesh,
      live=live,
      stop=stop,
    )
    with contextlib.closing(outputs):
      for group, output in outputs:
        for row, (clip, n) in enumerate(group):
          tokens = output.tokens_BS[row, : output.lengths_B[row]].tolist()
          text = self.tokenizer.decode(tokens)
          clip.fill(
            n,
            text=text,
            tokens=tokens,
            score=float(output.scores_B[row]),
            finished=bool(output.finished_B[row]),
            **split_answer(settings.task, text)._asdict(),
          )
          on_chunk(clip.parts[n])
        while pending and not pending[0].missing:
          yield pending.popleft().transcript()

  def _prompt_slots(self, sides: tuple[list[int], list[int]]) -> int:
    """Slots of the prompt of the longest clip."""
    trailing = () if self.config.compute.features == "device" else (1,)
    features = tuple(np.empty((1, length, *trailing), np.float32) for length in self.buckets[-1])
    prefix_BS, suffix_BS = (np.empty((1, len(side)), np.int32) for side in sides)
    return prompt_slots(Batch(features, (), prefix_BS, suffix_BS, prefix_BS), self.config)

  def _batch(self, clips, sides, batch_size: int) -> Batch:
    rows = _padded_rows(len(clips), batch_size)
    return prompt_batch(clips, sides, buckets=self.buckets, rows=rows)


def input_buckets(config: SpeechLLMConfig) -> list[tuple[int, ...]]:
  """Lengths that the inputs of clips are padded to, up to the longest clip (`padded_lengths`)."""
  longest = config.frontends[0].num_frames(round(config.max_audio_s * config.sample_rate_hz))
  lengths = [_SMALLEST_BUCKET]
  while lengths[-1] < longest:
    lengths.append(min(longest, int(lengths[-1] * _BUCKET_GROWTH)))
  return padded_lengths(lengths, config)


def prompt_batch(clips, sides, *, buckets: Sequence[tuple[int, ...]], rows: int) -> Batch:
  """A batch of clips, from `extract_features`, with the same prompt; see `encoder_inputs`."""
  features, frames = encoder_inputs(clips, rows=rows, buckets=buckets)
  prefix_BS, suffix_BS = (np.tile(np.asarray(side, np.int32), (rows, 1)) for side in sides)
  labels_BS = np.full((rows, 1), -1, np.int32)
  return Batch(features, frames, prefix_BS, suffix_BS, labels_BS)


@contextlib.contextmanager
def progress_bar(enabled: bool) -> Iterator[Callable[[Transcript], None]]:
  """Shows on stderr how much audio was transcribed; yields what to call with each chunk."""
  columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
  console = Console(stderr=True)
  # Redirected, stdout would come out on the console, that is on stderr.
  bar = Progress(*columns, console=console, redirect_stdout=False, disable=not enabled)
  seconds = 0.0
  with bar:
    task = bar.add_task("transcribing", total=None)

    def on_chunk(chunk: Transcript) -> None:
      nonlocal seconds
      seconds += chunk.seconds
      bar.update(task, description=f"transcribed {seconds / 60:.1f} min of audio")

    yield on_chunk


def _padded_rows(clips: int, batch_size: int) -> int:
  """Rows for a number of clips: 1, 2, 3, 4, 6, 8, 12, … are few shapes and little padding."""
  power = 1 << (clips - 1).bit_length()
  return min(batch_size, power * 3 // 4 if clips <= power * 3 // 4 and power > 2 else power)
