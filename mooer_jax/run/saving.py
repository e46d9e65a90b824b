"""Checkpoints of a run, saved and copied to its mirror while training goes on."""

import concurrent.futures
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mooer_jax import checkpoint, hosts, tree
from mooer_jax.config import to_json
from mooer_jax.run.config import Run
from mooer_jax.storage import RemoteError
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.training.step import TrainState
from mooer_jax.vocoders import DISCRIMINATORS


def split_state(state: TrainState) -> tuple[dict, TrainState]:
  """(trained weights of the model, the rest of the state, with parameters of training only)."""
  weights = {name: part for name, part in state.trainable.items() if name != DISCRIMINATORS}
  others = {name: part for name, part in state.trainable.items() if name not in weights}
  return weights, dataclasses.replace(state, trainable=others or None)


class Saver:
  """Saves the checkpoints of a run, one at a time, and copies them to the mirror.

  All processes call its methods at the same steps. The end of the block waits for what is being
  saved. If the block has failed, an error of the save is only printed.

  If a save fails in one process, the next call raises an error in all. Threads of the others may
  wait for that process until they end, so nothing waits for these threads.
  """

  def __init__(
    self, run: Run, *, message: Callable[[str], object], failed: Callable[[], object] = lambda: None
  ):
    """Starts to copy the newest checkpoint to the mirror, if a copy was interrupted.

    Args:
      run: the config.
      message: prints a line, from any thread; only called in the first process.
      failed: called as soon as a save of this process has failed, from any thread.
    """
    self._run, self._message, self._failed = run, message, failed
    self._mirror: checkpoint.Mirror | None = None
    if run.train.mirror and hosts.is_first():
      self._mirror = checkpoint.Mirror(run.train.mirror, run.workdir, count=run.train.max_to_keep)
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._folder: Path | None = None
    self._saving: concurrent.futures.Future | None = self._submit(self._complete)

  def __enter__(self) -> "Saver":
    return self

  def __exit__(self, kind, error, frames) -> None:
    if error is None:
      self.wait()
    elif isinstance(error, RemoteError) or (
      isinstance(error, Exception) and not hosts.lost_process(error)
    ):
      if self._saving is not None and (problem := self._saving.exception()) is not None:
        _print_besides(problem)
    self._thread.shutdown(wait=False)

  def start(
    self,
    state: TrainState,
    *,
    frozen: dict,
    tokenizer: Tokenizer,
    base: Path | None,
    data_state: dict[str, Any],
  ) -> None:
    """Starts to save a state, which may be donated as soon as this returns.

    If there is a base, only the trained parameters and a pointer to it are saved.

    Raises:
      SaveError, RemoteError, OtherProcessError: of the save before, for which this waits. The state
        is saved nevertheless, and all processes wait until it is.
    """
    options = {"frozen": frozen, "tokenizer": tokenizer, "base": base, "data_state": data_state}
    try:
      self.wait()
    except Exception:
      self._thread = concurrent.futures.ThreadPoolExecutor(1)  # the one before may be waiting
      self._start(state, **options)
      try:
        self.wait()
      except Exception as error:
        _print_besides(error)
      raise
    self._start(state, **options)

  def _start(self, state, *, frozen, tokenizer, base, data_state) -> None:
    weights, train_state = split_state(state)
    params = weights if base else tree.merge(weights, frozen)
    params = jax.jit(tree.unstack_layers)(params)  # jit: eager slicing needs all shards here
    started = checkpoint.start_save(
      checkpoint.step_folder(self._run.workdir, int(state.step)),
      params=params,
      config_json=to_json(self._run.model),
      tokenizer=tokenizer.save,
      generation=dataclasses.asdict(self._run.decoding_defaults()),
      base=base,
      train_state=train_state,
      data_state=data_state,
    )
    kept = {id(x) for x in jax.tree.leaves((state, frozen))}  # in case jit returns an input
    for copy in jax.tree.leaves(params):
      if id(copy) not in kept:
        copy.delete()  # Orbax refers to it until it is written
    self._saving = self._submit(self._finish, started)

  def wait(self) -> Path | None:
    """Waits for what is being saved; returns the folder of the last save, None before the first.

    Raises:
      SaveError, RemoteError: if it failed; only once.
    """
    saving, self._saving = self._saving, None
    if saving is not None:
      self._folder = hosts.wait_for(saving)
    return self._folder

  def _submit(self, function: Callable, *args) -> concurrent.futures.Future:
    future = self._thread.submit(function, *args)
    future.add_done_callback(lambda done: self._failed() if done.exception() else None)
    return future

  def _complete(self) -> None:
    if self._mirror is not None:
      self._mirror.complete()

  def _finish(self, started: concurrent.futures.Future[Path]) -> Path:
    folder = started.result()
    if hosts.is_first():
      checkpoint.keep_last(self._run.workdir, self._run.train.max_to_keep)
      self._message(f"saved {folder}")
    if self._mirror is not None:
      self._mirror.copy(folder)
    return folder


def _print_besides(error: BaseException) -> None:
  print(f"besides the error that ends the run: {error}", file=sys.stderr)
