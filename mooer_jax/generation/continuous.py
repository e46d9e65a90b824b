"""Decoding of batch after batch: a row that ends takes the next utterance.

A batch is prefilled as a whole and waits; its utterances take the place of those that have ended.
Prefill, admission and the loop of decode steps are compiled apart, so that only the prefill is
compiled anew for another length of audio.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import search
from mooer_jax.generation.generate import GenerateOutput, output_of, pad_scale
from mooer_jax.generation.options import GenerationConfig
from mooer_jax.generation.steps import Rows, Steps, row_keys
from mooer_jax.sharding import batch_sharding, constrain_rows, in_mesh, row_parts
from mooer_jax.speech_llm import Batch, pad_rows

T = TypeVar("T")

_MOST_RESULTS = 64
_STATIC = ("config", "options", "mesh")


@functools.partial(jax.jit, static_argnames=_STATIC)
@in_mesh
def _prefill(params, batch: Batch, config, options, *, key, lora_scale, mesh) -> Rows:
  """Rows of a batch with their first token."""
  batch = constrain_rows(batch, mesh)
  inputs_BSD, valid_BS = speech_llm.prompt(params, batch, config)
  rows = valid_BS.shape[0]
  if lora_scale is not None and not jnp.ndim(lora_scale):
    lora_scale = jnp.full(rows, lora_scale, jnp.float32)  # an entry of each row moves with it
  return Steps(params, config, options, mesh).prefill(
    inputs_BSD,
    valid_BS,
    keys_B=row_keys(key, rows),
    lora_scale=lora_scale,
    padding_B=batch.frames[0] == 0,
  )[0]


@functools.partial(jax.jit, static_argnames=("rows", "prompt_slots", *_STATIC))
@in_mesh
def _empty(prefilled: Rows, config, options, *, rows: int, prompt_slots: int, mesh) -> Rows:
  """Rows that have all ended, with an empty cache, on the devices of `prefilled`."""
  steps = Steps({}, config, options, mesh)
  nothing_B = jnp.zeros(rows, jnp.int32)
  return steps.place(
    Rows(
      state=search.start(rows, options, jnp.ones(rows, bool)),
      cache=config.decoder.empty_cache(
        rows=rows, slots=prompt_slots + steps.ring_slots, dtype=config.compute.jnp_dtype
      ),
      prompt_B=nothing_B,
      keys_B=jnp.broadcast_to(prefilled.keys_B[:1], (rows,)),
      begin_B=nothing_B,
      clock=prefilled.clock,
      lora_scale=jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:])), prefilled.lora_scale),
    )
  )


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="rows")
@in_mesh
def _admit(rows: Rows, prefilled: Rows, source_B, config, options, *, mesh) -> Rows:
  """Replaces row b by row source_B[b] of `prefilled`, where source_B[b] is not negative."""
  steps = Steps({}, config, options, mesh)

  def replaced(old, new):
    new = new[jnp.maximum(source_B, 0)]
    if old.ndim > 1 and old.shape[1] > new.shape[1]:
      # The ring is cleared, too: what a masked slot contains must be finite.
      new = jnp.pad(new, [(0, 0), (0, old.shape[1] - new.shape[1])] + [(0, 0)] * (new.ndim - 2))
    return jnp.where((source_B >= 0).reshape(-1, *[1] * (old.ndim - 1)), new, old)

  cache = rows.cache.replace(  # type: ignore[attr-defined]
    layers=jax.tree.map(replaced, rows.cache.layers, prefilled.cache.layers),
    valid_BS=replaced(rows.cache.valid_BS, prefilled.cache.valid_BS),
  )
  return steps.place(
    Rows(
      state=jax.tree.map(replaced, rows.state, prefilled.state),
      cache=cache,
      prompt_B=replaced(rows.prompt_B, prefilled.prompt_B),
      keys_B=replaced(rows.keys_B, prefilled.keys_B),
      begin_B=jnp.where(source_B >= 0, rows.clock % steps.ring, rows.begin_B),
      clock=rows.clock,
      lora_scale=jax.tree.map(replaced, rows.lora_scale, prefilled.lora_scale),
    )
  )


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="rows")
@in_mesh
def _run(params, rows: Rows, most_open, config, options, *, mesh):
  """Decodes until at most `most_open` rows have not ended: (rows, which have ended, output)."""
  steps = Steps(params, config, options, mesh)
  rows = jax.lax.while_loop(
    lambda rows: (~rows.state.done_B).sum() > most_open, lambda rows: steps.step(rows)[0], rows
  )
  return steps.place(rows), rows.state.done_B, output_of(rows.state, options)


def decode_batches(
  params: dict,
  batches: Iterable[tuple[T, Batch | None]],
  config: SpeechLLMConfig,
  options: GenerationConfig,
  *,
  key: jax.Array,
  prompt_slots: int = 0,
  lora_scale: float | Callable[[T], jax.Array | np.ndarray | None] | None = None,
  mesh: jax.sharding.Mesh | None = None,
  live: bool = False,
  stop: threading.Event | None = None,
) -> Generator[tuple[T, GenerateOutput]]:
  """Generates text for batch after batch; a row that ends takes the next utterance.

  As many utterances are decoded at a time as the largest batch has rows. A thread makes the next
  batch meanwhile, and another one, already prefilled, waits. The tokens are those of `generate` for
  each batch, but where two candidates have almost the same score.

  Close the generator to stop early: it waits for the batch that is being made, and makes no other.

  Args:
    params, config, options, mesh: as in `generate`.
    batches: (value that is passed on, batch) pairs; iterated in a thread. Its exceptions are raised
      here, after the results of the batches before. If a batch is None, so is its output.
    key: PRNG key; batch n uses fold_in(key, n).
    prompt_slots: slots for the longest prompt. For a longer one, as for a batch of more rows, all
      rows end first, and the loop is compiled anew.
    lora_scale: scalar for all batches; or a function that returns the scale of each row of a batch,
      [B] or [B, rank] (`Adapters.scale`), given the value that comes with the batch.
    live: decode the rows that there are while the next batch is not ready. Results come sooner;
      which rows are decoded together then depends on timing, and with it the rounding of sums.
    stop: set when the generator ends, before it waits for its thread.

  Yields:
    (the value that came with the batch, output in NumPy), in the order of the batches. Results that
    wait for that of an earlier batch are kept, of 64 batches at most.

  Raises:
    ValueError: as `generate`; for return_hidden.
  """
  if options.return_hidden:
    raise ValueError("generation.return_hidden=True is only for mooer_jax.generate")
  Steps(params, config, options).check(key=key)
  scheduler = _Scheduler(params, config, options, prompt_slots, mesh=mesh)
  results: collections.deque[_Result] = collections.deque()
  failure: Exception | None = None
  thread = concurrent.futures.ThreadPoolExecutor(1, "next batch")
  with thread, contextlib.ExitStack() as cleanup:
    iterator, numbers = iter(batches), itertools.count()
    coming: concurrent.futures.Future | None = thread.submit(next, iterator, None)
    cleanup.callback(stop.set if stop is not None else lambda: None)
    while coming is not None or results:
      is_next = coming is not None and not scheduler.queue and len(results) < _MOST_RESULTS
      waits = is_next and live and not coming.done() and scheduler.is_busy  # type: ignore[union-attr]
      if is_next and not waits:
        try:
          item = coming.result()  # type: ignore[union-attr]
        except Exception as error:
          failure, item = error, None
        coming = None if item is None else thread.submit(next, iterator, None)
        if item is not None:
          results.append(_Result.empty(item[0], item[1], options))
          if item[1] is not None:
            scale = lora_scale(item[0]) if callable(lora_scale) else lora_scale
            of_batch = jax.random.fold_in(key, next(numbers))
            scheduler.add(results[-1], item[1], key=of_batch, lora_scale=scale)
            scheduler.admit()
        del item
      if scheduler.queue or waits or coming is None or len(results) >= _MOST_RESULTS:
        scheduler.run(to_the_end=coming is None and not scheduler.queue)
        scheduler.admit()
      while results and not results[0].missing:
        result = results.popleft()
        yield result.value, result.output  # type: ignore[misc]  # None without a batch
  if failure is not None:
    raise failure


def compile_batch(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  options: GenerationConfig,
  *,
  rows: Iterable[int],
  prompt_slots: int = 0,
  lora_scale: jax.Array | np.ndarray | float | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> None:
  """Compiles the programs that `decode_batches` runs for batches of this shape.

  They go into the persistent compilation cache of JAX. The batch is prefilled once for each number
  of rows, but no further token is decoded.

  Args:
    rows: numbers of rows that are decoded at a time.
    params, batch, config, options, prompt_slots, mesh: as in `decode_batches`; each row of the
      batch must have audio.
    lora_scale: scalar, or the scale of each row of the batch.
  """
  for number in sorted({*rows}):
    scheduler = _Scheduler(params, config, options, prompt_slots, mesh=mesh)
    result = _Result.empty(None, batch, options)
    scheduler.add(result, batch, key=jax.random.key(0), lora_scale=lora_scale)
    scheduler.admit(at_least=number)
    scheduler.run(to_the_end=False, steps=False)


@dataclasses.dataclass
class _Result:
  """The output of a batch in NumPy, that of a padding row where `missing` rows are not done yet."""

  value: Any
  output: GenerateOutput | None
  missing: int

  @classmethod
  def empty(cls, value, batch: Batch | None, options: GenerationConfig) -> "_Result":
    if batch is None:
      return cls(value, None, 0)
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


class _Scheduler:
  """The rows that are being decoded, and the batch whose utterances wait for a row.

  `queue` has those that wait, each the result that it belongs to and its place there.
  """

  def __init__(self, params, config, options, prompt_slots, *, mesh):
    self._params = params
    self._static = dict(config=config, options=options, mesh=mesh)
    self._prompt_slots = prompt_slots
    self.queue: collections.deque[tuple[_Result, int]] = collections.deque()
    self._owners: list[tuple[_Result, int] | None] = []  # of each row
    self._rows: Rows | None = None
    self._waiting: Rows | None = None

  @property
  def is_busy(self) -> bool:
    """Whether there are rows to decode."""
    return any(owner is not None for owner in self._owners)

  def add(self, result: _Result, batch: Batch, *, key: jax.Array, lora_scale) -> None:
    """Prefills a batch; none may wait."""
    mesh = self._static["mesh"]
    lora_scale = pad_scale(lora_scale, batch.frames[0].shape[0], row_parts(mesh))
    padded = pad_rows(batch, row_parts(mesh))
    if mesh is not None:
      padded = jax.device_put(padded, batch_sharding(mesh))
    self._waiting = _prefill(self._params, padded, key=key, lora_scale=lora_scale, **self._static)
    self.queue.extend((result, int(row)) for row in np.flatnonzero(np.asarray(batch.frames[0])))

  def admit(self, *, at_least: int = 0) -> None:
    """Gives free rows to utterances that wait; if need be, makes rows, `at_least` as many."""
    if not self.queue:
      return
    waiting = self._waiting
    assert waiting is not None
    slots, size = waiting.cache.valid_BS.shape[1], max(waiting.prompt_B.shape[0], at_least)
    if self._rows is not None and (slots > self._prompt_slots or size > len(self._owners)):
      self.run(to_the_end=True)
      self._rows = None
    if self._rows is None:
      self._prompt_slots = max(self._prompt_slots, slots)
      size = max(size, len(self._owners))
      self._owners = [None] * (size + -size % row_parts(self._static["mesh"]))
      shape = dict(rows=len(self._owners), prompt_slots=self._prompt_slots)
      self._rows = _empty(waiting, **shape, **self._static)
    source_B = np.full(len(self._owners), -1, np.int32)
    for row, owner in enumerate(self._owners):
      if owner is None and self.queue:
        self._owners[row] = next_one = self.queue.popleft()
        source_B[row] = next_one[1]
    if source_B.max() >= 0:
      self._rows = _admit(self._rows, waiting, source_B, **self._static)
    if not self.queue:
      self._waiting = None

  def run(self, *, to_the_end: bool, steps: bool = True) -> None:
    """Decodes until some rows end, or all, and fills in their results.

    With `steps` False, nothing is decoded.
    """
    taken = sum(owner is not None for owner in self._owners)
    if not taken:
      return
    # An admission reads the whole cache, so that of many rows waits until several are free.
    most_open = 0 if to_the_end else max(0, taken - max(1, len(self._owners) // 8))
    if not steps:
      most_open = len(self._owners)
    self._rows, done_B, output = _run(
      params=self._params, rows=self._rows, most_open=np.int32(most_open), **self._static
    )
    done_B, output = jax.device_get((done_B, output))
    for row, owner in enumerate(self._owners):
      if owner is not None and done_B[row]:
        owner[0].fill(owner[1], output, row)
        self._owners[row] = None
