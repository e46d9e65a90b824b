"""Training, from a config to a checkpoint."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import grain
import jax

from mooer_jax import checkpoint, hosts, tree
from mooer_jax.data.augment import AugmentConfig
from mooer_jax.data.dataset import Batches, merge_states, train_batches
from mooer_jax.data.utterances import BadDataError
from mooer_jax.files import lock_folder
from mooer_jax.run.config import Run
from mooer_jax.run.feed import Feed
from mooer_jax.run.fill_feature_cache import fill_cache
from mooer_jax.run.monitor import Evaluator, Monitor, NoMonitor, SkippedLog
from mooer_jax.run.process import check_profile, prepare_process, profile, stop_request
from mooer_jax.run.saving import Saver, split_state
from mooer_jax.run.start import (
  check_objective,
  initial_params,
  initial_state,
  measure_cmvn,
  read_tokenizer,
  trained_patterns,
  vocoder_of,
)
from mooer_jax.sharding import make_mesh
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.training.optimizer import make_optimizer
from mooer_jax.training.program import compile_step, jitted_step
from mooer_jax.training.step import TrainState, check_step


class MakeEvaluator(Protocol):
  """Makes an evaluator; training starts, or resumes, after step `first`."""

  def __call__(self, run: Run, tokenizer: Tokenizer, *, first: int) -> Evaluator: ...


# Steps of a run that `trace` profiles; those before them compile and warm up.
TRACED = range(3, 6)


def train(run: Run, evaluators: Sequence[MakeEvaluator] = (), *, trace: str | None = None) -> Path:
  """Trains as the config says and returns the folder of the last checkpoint.

  If the workdir contains checkpoints, training resumes from the latest, bit for bit. Ctrl-C or
  SIGTERM, of any process, saves a checkpoint first. All processes of a run (`hosts.initialize`)
  call this; the first one writes the records.

  Args:
    run: the config.
    evaluators: functions that make an evaluator.
    trace: folder for a profile of steps 3 to 5 of this process; default: none.

  Raises:
    ValueError, FileNotFoundError: for a bad config, data set or initial checkpoint; if another
      process trains in the workdir; or for a trace of a run that has fewer steps left.
    BadStepError: when train.max_bad_steps are exceeded, as by a NaN, with the step number.
  """
  prepare_process()
  run.check_training()  # mistakes show before anything is loaded
  check_objective(run)
  if run.init_from is not None:
    run = dataclasses.replace(run, init_from=checkpoint.local_folder(run.init_from))
  mesh = make_mesh(**dataclasses.asdict(run.mesh))
  hosts.check_rows(mesh)
  with contextlib.ExitStack() as held:
    hosts.on_first(lambda: held.enter_context(lock_folder(run.workdir)))
    return _train(run, evaluators, mesh, trace)


def _train(
  run: Run, evaluators: Sequence[MakeEvaluator], mesh: jax.sharding.Mesh, trace: str | None
) -> Path:
  newest = hosts.on_first(lambda: str(restore(run) or ""))
  resumed = Path(newest) if newest else None
  start_from = resumed or run.init_from
  normalised = any(frontend.normalised for frontend in run.model.frontends)
  if start_from is None and normalised and not run.train.cmvn:
    raise ValueError(
      "train.cmvn='' takes the CMVN of init_from, but there is none; set train.cmvn='estimate' or"
      " the path of an am.mvn"
    )
  if resumed:
    hosts.say(f"resuming from {resumed}")
    if checkpoint.step_of(resumed) >= run.train.steps:
      hosts.say(
        f"all train.steps={run.train.steps} are done; for more, raise train.steps and"
        " optimizer.total_steps"
      )
      if evaluators:
        hosts.say("to measure a finished run: eval.py --mode=perplexity")
      with Saver(run, message=hosts.say):
        return resumed
  tokenizer = read_tokenizer(run, start_from)
  first = checkpoint.step_of(resumed) if resumed else 0
  check_profile(trace)
  if trace is not None and run.train.steps - first < TRACED[-1]:
    raise ValueError(
      f"--trace={trace} profiles steps {TRACED[0]} to {TRACED[-1]}, but"
      f" {run.train.steps - first} are left; raise train.steps"
    )
  # Before minutes of loading, since they check their data.
  made = [make(run, tokenizer, first=first) for make in evaluators]
  start = _load(run, mesh, tokenizer, resumed=resumed)
  return _loop(run, start, made, first=first, mesh=mesh, trace=trace)


def restore(run: Run) -> Path | None:
  """The checkpoint to resume from, which comes from the mirror if the workdir has none.

  Raises RemoteError if the mirror cannot be written.
  """
  if run.train.mirror:
    checkpoint.check_writing(run.train.mirror)
    if restored := checkpoint.restore(run.train.mirror, run.workdir):
      print(f"restored {restored} from {run.train.mirror}", flush=True)
  return checkpoint.latest(run.workdir)


class _Start(NamedTuple):
  """Everything that the loop needs; `base` is the checkpoint to which its checkpoints point."""

  tokenizer: Tokenizer
  dataset: Batches
  batches: grain.DatasetIterator
  state: TrainState
  frozen: dict
  step: Callable
  base: Path | None


def _load(
  run: Run, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, *, resumed: Path | None
) -> _Start:
  base = None if run.init_from is None else checkpoint.local_folder(run.init_from)
  if resumed:
    try:
      base = checkpoint.describe(resumed).base
    except FileNotFoundError:  # the base has moved since the run began, to init_from
      if base is None:
        raise
      base = checkpoint.describe(resumed, base=base).base
  # Before minutes of loading, since it checks the data.
  process = jax.process_index(), jax.process_count()
  dataset = train_batches(run.data, tokenizer, run.model, process=process)
  params = initial_params(run, mesh, resumed=resumed, base=base if resumed else None)
  if run.data.cache_features:
    cache = fill_cache(run, params, mesh)
    dataset = train_batches(run.data, tokenizer, run.model, cache=cache, process=process)
  if run.train.cmvn and not resumed:
    try:
      measured = dataset
      if run.data.augment != AugmentConfig():
        plain = dataclasses.replace(run.data, augment=AugmentConfig())
        measured = train_batches(plain, tokenizer, run.model, process=process)
      params["frontend"] = measure_cmvn(run, measured, params["frontend"])
    except BadDataError as error:
      SkippedLog(run.workdir, first=0).add(1, error.skipped)
      raise
  state, frozen = initial_state(run, params, tx=make_optimizer(run.optimizer), mesh=mesh)
  del params
  if all(path.startswith("frontend/") for path in tree.flatten(frozen)):
    base = None  # only its CMVN is left, so checkpoints hold all parameters
  if base is not None and hosts.is_first() and not checkpoint.url_of(base):
    checkpoint.keep_for(base, run.workdir)
  batches = iter(dataset)
  if resumed:
    weights, target = split_state(state)  # the weights came with the checkpoint
    rest, data_states = checkpoint.load_train_state(resumed, target, optional="bad/")
    state = dataclasses.replace(rest, trainable={**weights, **(rest.trainable or {})})
    try:
      batches.set_state(merge_states(data_states))
    except ValueError as error:
      raise ValueError(f"{resumed}/train_state: {error}") from error
  step = jitted_step(
    run.model,
    run.optimizer,
    trainable=trained_patterns(run),
    accumulation=run.train.gradient_accumulation_steps,
    mesh=mesh,
    max_loss_ratio=run.train.max_loss_ratio,
    vocoder=vocoder_of(run),
  )
  return _Start(tokenizer, dataset, batches, state, frozen, step, base)


def _loop(
  run: Run,
  start: _Start,
  evaluators: Sequence[Evaluator],
  *,
  first: int,
  mesh: jax.sharding.Mesh,
  trace: str | None,
) -> Path:
  """Runs the steps after `first`; returns the last checkpoint."""
  state, frozen, batches = start.state, start.frozen, start.batches
  pending = None
  tasks = [task for task, _ in run.model.prompts]
  monitor: Monitor | NoMonitor = NoMonitor()
  if hosts.is_first():
    monitor = Monitor(run.workdir, run.train, first=first, tasks=tasks)
  profiled = contextlib.ExitStack()
  with (
    contextlib.closing(batches),
    monitor,
    profiled,
    stop_request() as stop,
    # A failed save ends the run, on all processes at the same step.
    Saver(run, message=monitor.message, failed=stop.set) as saver,
  ):
    sizes = (sum(x.size for x in jax.tree.leaves(part)) for part in (state.trainable, frozen))
    trained, fixed = (f"{size:,}" for size in sizes)
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    monitor.message(f"{trained} parameters are trained, {fixed} are not, on {devices}")
    train_step = compile_step(
      start.step, state=state, frozen=frozen, batches=start.dataset.shapes, message=monitor.message
    )
    for evaluator in evaluators:
      if evaluator.lacks(first):
        monitor.evaluate(evaluator, first, tree.merge(state.trainable, frozen))
    feed = Feed(start.dataset, batches, mesh, stop)
    for step in itertools.count(first + 1):
      if step - first == TRACED[0]:
        profiled.enter_context(profile(trace))
      try:
        summary, batch, stopping = feed.take()
      except BadDataError as error:
        if pending:
          monitor.record(*pending)
        monitor.skipped.add(step, error.skipped)
        raise
      state, metrics = train_step(state, frozen, batch)
      last = step == run.train.steps or stopping
      if not last:
        feed.refill()
      if trace is not None and step - first == TRACED[-1]:
        jax.block_until_ready(metrics)
        profiled.close()
      if pending:  # read one step late, so that the device never waits for the host
        check_step(pending[0], run.train.max_bad_steps)
        monitor.record(*pending)
      pending = (metrics, summary)
      saves = last or step % run.train.save_every == 0
      due = [e for e in evaluators if (last or step % e.every == 0) and not stopping]
      if saves or due:
        check_step(metrics, run.train.max_bad_steps)
        monitor.record(*pending)
        pending = None
      if saves:
        saver.start(
          state,
          frozen=frozen,
          tokenizer=start.tokenizer,
          base=start.base,
          data_state=feed.state(),
        )
      with feed.paused():
        for evaluator in due:
          monitor.evaluate(evaluator, step, tree.merge(state.trainable, frozen))
      if last:
        break
    folder = saver.wait()
    assert folder is not None  # the last step saves
  if stopping:
    hosts.say(f"stopped at step {step}; rerun the same command to resume")
  return folder
