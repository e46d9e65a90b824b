"""Decoding of batch after batch: a row that ends takes the next utterance.

A batch is prefilled as a whole and waits; its utterances take the place of those that have ended.
Prefill, admission and the loop of decode steps are compiled apart, so that only the prefill is
compiled anew for another length of audio.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import search
from mooer_jax.generation.generate import GenerateOutput, output_of
from mooer_jax.generation.options import GenerationConfig
from mooer_jax.generation.steps import Rows, Steps, row_keys
from mooer_jax.sharding import batch_sharding, constrain_rows, in_mesh, row_parts
from mooer_jax.speech_llm import Batch, pad_rows

T = TypeVar("T")

_STATIC = ("config", "options", "mesh")


@functools.partial(jax.jit, static_argnames=_STATIC)
@in_mesh
def _prefill(params, batch: Batch, config, options, *, key, lora_scale, mesh) -> Rows:
  """Rows of a batch with their first token."""
  batch = constrain_rows(batch, mesh)
  inputs_BSD, valid_BS = speech_llm.prompt(params, batch, config)
  steps = Steps(params, config, options, lora_scale, mesh)
  keys_B = row_keys(key, valid_BS.shape[0])
  padding_B = batch.frames[0] == 0
  return steps.prefill(inputs_BSD, valid_BS, keys_B=keys_B, padding_B=padding_B)[0]


@functools.partial(jax.jit, static_argnames=("rows", "prompt_slots", *_STATIC))
@in_mesh
def _empty(config, options, *, rows: int, prompt_slots: int, mesh) -> Rows:
  """Rows that have all ended, with an empty cache."""
  steps = Steps({}, config, options, mesh=mesh)
  nothing_B = jnp.zeros(rows, jnp.int32)
  return steps.place(
    Rows(
      state=search.start(rows, options, jnp.ones(rows, bool)),
      cache=config.decoder.empty_cache(
        rows=rows, slots=prompt_slots + steps.ring_slots, dtype=config.compute.jnp_dtype
      ),
      prompt_B=nothing_B,
      keys_B=row_keys(None, rows),
      begin_B=nothing_B,
    )
  )


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="rows")
@in_mesh
def _admit(rows: Rows, begun: Rows, source_B, clock, config, options, *, mesh) -> Rows:
  """Puts row source_B[b] of `begun` in the place of row b, where source_B[b] is not negative."""
  steps = Steps({}, config, options, mesh=mesh)

  def put(old, new):
    new = new[jnp.maximum(source_B, 0)]
    if old.ndim > 1 and old.shape[1] > new.shape[1]:
      # The ring is cleared, too: what a masked slot contains must be finite.
      new = jnp.pad(new, [(0, 0), (0, old.shape[1] - new.shape[1])] + [(0, 0)] * (new.ndim - 2))
    return jnp.where((source_B >= 0).reshape(-1, *[1] * (old.ndim - 1)), new, old)

  cache = rows.cache.replace(  # type: ignore[attr-defined]
    layers=jax.tree.map(put, rows.cache.layers, begun.cache.layers),
    valid_BS=put(rows.cache.valid_BS, begun.cache.valid_BS),
  )
  begin_B = jnp.where(source_B >= 0, clock % steps.ring, rows.begin_B)
  put_all = functools.partial(jax.tree.map, put)
  return steps.place(
    Rows(
      state=put_all(rows.state, begun.state),
      cache=cache,
      prompt_B=put(rows.prompt_B, begun.prompt_B),
      keys_B=put(rows.keys_B, begun.keys_B),
      begin_B=begin_B,
    )
  )


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="rows")
@in_mesh
def _run(params, rows: Rows, clock, most_open, config, options, *, lora_scale, mesh):
  """Decodes until at most `most_open` rows have not ended: (rows, clock, output)."""
  steps = Steps(params, config, options, lora_scale, mesh)

  def step(carry):
    rows, clock = carry
    return steps.step(rows, clock)[0], clock + 1

  def is_open(carry):
    return (~carry[0].state.done_B).sum() > most_open

  rows, clock = jax.lax.while_loop(is_open, step, (rows, clock))
  return rows, clock, rows.state.done_B, output_of(rows.state, options)


def decode_batches(
  params: dict,
  batches: Iterable[tuple[T, Batch]],
  config: SpeechLLMConfig,
  options: GenerationConfig,
  *,
  key: jax.Array,
  rows: int | None = None,
  prompt_slots: int = 0,
  lora_scale: float | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Generator[tuple[T, GenerateOutput]]:
  """Generates text for batch after batch; a row that ends takes the next utterance.

  A thread makes the next batch while the device decodes. At most three batches are in memory: one
  that is made, one that waits and one whose rows are decoded. The results are those of `generate`
  for each batch, but for the rounding of sums. Close the generator to stop early: it waits for the
  batch that is being made, and makes no other.

  Args:
    params, config, options, lora_scale, mesh: as in `generate`; lora_scale is a scalar.
    batches: (value that is passed on, batch) pairs; iterated in a thread. Its exceptions are raised
      here.
    key: PRNG key; batch n uses fold_in(key, n).
    rows: utterances that are decoded at a time; default: the rows of the first batch.
    prompt_slots: slots for the longest prompt. If a prompt has more, all rows end before it begins,
      and the loop is compiled anew.

  Yields:
    (the value that came with the batch, output in NumPy), in the order of the batches.

  Raises:
    ValueError: as `generate`; for return_hidden.
  """
  if options.return_hidden:
    raise ValueError("generation.return_hidden=True is only for mooer_jax.generate")
  Steps(params, config, options).check(key=key)
  work = _Work(params, config, options, rows, prompt_slots, lora_scale=lora_scale, mesh=mesh)
  results: collections.deque[_Result] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(1, "next batch") as thread:
    iterator, numbers = iter(batches), itertools.count()
    coming: concurrent.futures.Future | None = thread.submit(next, iterator, None)
    while True:
      while not work.queue and coming is not None:
        if (item := coming.result()) is None:
          coming = None
          continue
        coming = thread.submit(next, iterator, None)
        results.append(_Result.empty(item[0], item[1], options))
        work.add(results[-1], item[1], jax.random.fold_in(key, next(numbers)))
      work.admit()
      if not work.queue and coming is not None:
        continue  # rows should not wait for a prefill
      work.run()
      while results and not results[0].missing:
        done = results.popleft()
        yield done.value, done.output
      if not results and coming is None:
        return


def compile_batch(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  options: GenerationConfig,
  *,
  rows: Iterable[int],
  prompt_slots: int = 0,
  mesh: jax.sharding.Mesh | None = None,
) -> None:
  """Compiles the programs that `decode_batches` runs for batches of this shape.

  They go into the persistent compilation cache of JAX. The prompts are read; no step is decoded.

  Args:
    rows: numbers of rows of `decode_batches`.
    params, batch, config, options, prompt_slots, mesh: as in `decode_batches`; each row of the
      batch must have audio.
  """
  for number in sorted({*rows}):
    work = _Work(params, config, options, number, prompt_slots, lora_scale=None, mesh=mesh)
    work.add(_Result.empty(None, batch, options), batch, jax.random.key(0))
    work.admit()
    work.run(steps=False)


@dataclasses.dataclass
class _Result:
  """The output of a batch in NumPy, that of a padding row where `missing` rows are not done yet."""

  value: Any
  output: GenerateOutput
  missing: int

  @classmethod
  def empty(cls, value, batch: Batch, options: GenerationConfig) -> "_Result":
    shape = batch.frames[0].shape[0], options.num_return_sequences
    arrays: dict[str, Any] = {
      "tokens_BRS": np.full((*shape, options.max_new_tokens), search.PAD, np.int32),
      "lengths_BR": np.zeros(shape, np.int32),
      "scores_BR": np.zeros(shape, np.float32),
      "finished_BR": np.ones(shape, bool),
    }
    return cls(value, GenerateOutput(**arrays), int((np.asarray(batch.frames[0]) > 0).sum()))

  def fill(self, row: int, output: GenerateOutput, place: int) -> None:
    for ours, new in zip(jax.tree.leaves(self.output), jax.tree.leaves(output), strict=True):
      ours[row] = new[place]
    self.missing -= 1


class _Work:
  """The rows that are being decoded, and the batch whose rows wait for a place.

  `queue` has those that wait, each the result that it belongs to and its row there.
  """

  def __init__(self, params, config, options, rows, prompt_slots, *, lora_scale, mesh):
    self._model = dict(params=params, lora_scale=lora_scale)
    self._static = dict(config=config, options=options, mesh=mesh)
    self._size, self._prompt_slots = rows, prompt_slots
    self.queue: collections.deque[tuple[_Result, int]] = collections.deque()
    self._places: list[tuple[_Result, int] | None] = []
    self._rows: Rows | None = None
    self._waiting: Rows | None = None
    self._clock = jnp.int32(0)

  def add(self, result: _Result, batch: Batch, key: jax.Array) -> None:
    """Prefills a batch; none may wait."""
    mesh = self._static["mesh"]
    padded = pad_rows(batch, row_parts(mesh))
    if mesh is not None:
      padded = jax.device_put(padded, batch_sharding(mesh))
    self._waiting = _prefill(batch=padded, key=key, **self._model, **self._static)
    self.queue.extend((result, int(row)) for row in np.flatnonzero(np.asarray(batch.frames[0])))

  def admit(self) -> None:
    """Gives free places to rows that wait."""
    if not self.queue:
      return
    assert self._waiting is not None
    slots = self._waiting.cache.valid_BS.shape[1]
    if self._rows is not None and slots > self._prompt_slots:
      self.run(to_the_end=True)
      self._rows = None
    if self._rows is None:
      self._prompt_slots = max(self._prompt_slots, slots)
      size = self._size or self._waiting.prompt_B.shape[0]
      self._size = size + -size % row_parts(self._static["mesh"])
      self._places = [None] * self._size
      self._rows = _empty(rows=self._size, prompt_slots=self._prompt_slots, **self._static)
    source_B = np.full(self._size, -1, np.int32)
    for place, taken in enumerate(self._places):
      if taken is None and self.queue:
        self._places[place] = owner = self.queue.popleft()
        source_B[place] = owner[1]
    if source_B.max() >= 0:
      self._rows = _admit(self._rows, self._waiting, source_B, self._clock, **self._static)
    if not self.queue:
      self._waiting = None

  def run(self, *, to_the_end: bool = False, steps: bool = True) -> None:
    """Decodes until rows end, and fills in their results.

    Until all end if none waits or `to_the_end`. With `steps` False, nothing is decoded.
    """
    taken = sum(place is not None for place in self._places)
    if not taken:
      return
    # An admission reads the whole cache, so that of many rows waits until several are free.
    most_open = taken - max(1, self._size // 8) if self.queue and not to_the_end else 0
    most_open = max(0, most_open) if steps else self._size
    self._rows, self._clock, done_B, output = _run(
      rows=self._rows,
      clock=self._clock,
      most_open=np.int32(most_open),
      **self._model,
      **self._static,
    )
    done_B, output = jax.device_get((done_B, output))
    for place, owner in enumerate(self._places):
      if owner is not None and done_B[place]:
        owner[0].fill(owner[1], output, place)
        self._places[place] = None
