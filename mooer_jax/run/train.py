"""Training, from a config to a checkpoint; read it from top to bottom."""

import contextlib
import dataclasses
import itertools
import re
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from mooer_jax import checkpoint, speech_llm, tree
from mooer_jax.audio.cmvn import estimate, read_mvn
from mooer_jax.audio.frontend import width
from mooer_jax.config import SpeechLLMConfig, build, differences, from_json, to_json
from mooer_jax.data.batching import Batcher
from mooer_jax.data.config import DataConfig
from mooer_jax.data.pipeline import train_batches
from mooer_jax.generation import GenerationOptions
from mooer_jax.run.monitor import Monitor, StopRequest
from mooer_jax.run.program import CompiledStep, jitted_step, stored
from mooer_jax.run.setup import (
  TrainConfig,
  check_sections,
  check_vocabulary,
  prepare_process,
  prompt_for,
  read_model,
  read_tokenizer,
  section,
)
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.training.optimizer import OptimizerConfig, make_optimizer
from mooer_jax.training.sharding import (
  MeshConfig,
  batch_sharding,
  make_mesh,
  param_shardings,
)
from mooer_jax.training.state import TrainState, create, state_shardings
from mooer_jax.training.step import check_finite

CMVN_BATCHES = 32


@dataclasses.dataclass(frozen=True)
class Run:
  """A config, read and checked."""

  model: SpeechLLMConfig
  data: DataConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  mesh: MeshConfig
  generation: GenerationOptions
  trainable: tuple[str, ...]
  workdir: Path
  seed: int
  init_from: Path | None

  @classmethod
  def read(cls, config: ConfigDict) -> "Run":
    """Raises ValueError for anything that is unknown, mistyped or does not fit."""
    check_sections(config)
    if jax.process_count() > 1:
      raise ValueError(
        f"{jax.process_count()} processes: this version trains in one process, on all its devices"
      )
    init_from = _initial_checkpoint(config.get("init_from"))
    model = read_model(config, scan=True)
    seed = config.get("seed", 0)
    if "seed" in config["data"]:
      raise ValueError("data.seed: one seed decides everything; set config.seed")
    run = cls(
      model=model,
      data=section(config, "data", DataConfig, seed=seed),
      optimizer=section(config, "optimizer", OptimizerConfig),
      train=section(config, "train", TrainConfig),
      mesh=section(config, "mesh", MeshConfig),
      generation=_generation(config, init_from),
      trainable=tuple(config["trainable"]),
      workdir=Path(config["workdir"]),
      seed=seed,
      init_from=init_from,
    )
    if run.data.batch_size % run.train.accumulation:
      raise ValueError(
        f"data.batch_size={run.data.batch_size} does not divide into"
        f" train.accumulation={run.train.accumulation} micro-batches"
      )
    if run.optimizer.decay != "constant" and run.train.steps > run.optimizer.total_steps:
      raise ValueError(
        f"train.steps={run.train.steps} goes on after optimizer.total_steps="
        f"{run.optimizer.total_steps}, where the learning rate is 0; set both alike"
      )
    if not init_from and not run.train.cmvn:
      raise ValueError(
        "train.cmvn='' takes the CMVN of init_from, but there is none; set train.cmvn='estimate' or"
        " the path of an am.mvn"
      )
    if init_from and run.train.cmvn:
      raise ValueError(
        f"train.cmvn={run.train.cmvn!r}, but the encoder of init_from was trained with its own"
        " CMVN; set train.cmvn=''"
      )
    if run.data.max_s > model.max_audio_s:
      raise ValueError(
        f"data.max_s={run.data.max_s} is longer than model.max_audio_s={model.max_audio_s}"
      )
    return run


def _initial_checkpoint(path: str | None) -> Path | None:
  if not path:
    return None
  folder = checkpoint.find(path)
  if folder != Path(path):
    # A fine-tune points to its base for good, and a run that goes on deletes its older steps.
    raise ValueError(f"init_from={path} is the folder of a run; name the checkpoint: {folder}")
  return folder


def _generation(config: ConfigDict, init_from: Path | None) -> GenerationOptions:
  """Decoding defaults that the run's checkpoints get: the config's, over those of init_from."""
  inherited = checkpoint.describe(init_from).generation if init_from else {}
  return build(GenerationOptions, {**inherited, **config.get("generation", {})}, "generation")


def train(config: ConfigDict) -> Path:
  """Trains as the config says and returns the folder of the last checkpoint.

  A workdir that holds checkpoints is gone on with, bit for bit; Ctrl-C or SIGTERM saves first.

  Raises:
    ValueError, FileNotFoundError: for a bad config, data set or initial checkpoint.
    NotFiniteError: when the loss or a gradient is NaN, with the step number.
  """
  prepare_process()
  run = Run.read(config)
  mesh = make_mesh(**dataclasses.asdict(run.mesh))
  _check_rows(run, mesh)
  resumed = checkpoint.latest(run.workdir)
  start_from = resumed or run.init_from
  base = _base_of(resumed, run.init_from) if resumed else run.init_from
  tokenizer = read_tokenizer(config, start_from)
  check_vocabulary(tokenizer, run.model)

  prompt = prompt_for(run.model, run.data.task)
  dataset = train_batches(run.data, tokenizer, prompt, run.model.frontends)
  params = initial_params(
    run, mesh, start_from, exactly=bool(resumed), base=base if resumed else None
  )
  if run.train.cmvn and not resumed:
    params["frontend"] = measure_cmvn(run, dataset, params["frontend"])
  tx = make_optimizer(run.optimizer)
  state, frozen, shardings = initial_state(run, params, tx, mesh)
  del params
  batches = iter(dataset)
  if resumed:
    target = dataclasses.replace(state, trainable=None)  # these came with the weights
    rest, data_state = checkpoint.load_train_state(resumed, target)
    state = dataclasses.replace(rest, trainable=state.trainable)
    batches.set_state(data_state)

  jitted = jitted_step(
    run.model,
    run.optimizer,
    accumulation=run.train.accumulation,
    mesh=mesh,
    shardings=shardings,
  )
  first = int(state.step)
  stop = StopRequest()
  folder = resumed
  pending = None
  monitor = Monitor(run.workdir, first, run.train.steps, run.train.log_every)
  with contextlib.closing(batches), monitor, stop:
    shapes = Batcher(run.data, tokenizer, prompt, run.model.frontends).shapes()
    train_step = CompiledStep(jitted, state, frozen, shapes, monitor.message)
    for step in range(first + 1, run.train.steps + 1):
      host_batch = next(batches)
      batch = jax.device_put(host_batch.batch, batch_sharding(mesh))
      state, metrics = train_step(state, frozen, batch)
      if pending:  # read one step late, so that the device never waits for the host
        check_finite(pending[0])
        monitor.record(*pending)
      pending = (metrics, host_batch)
      last = step == run.train.steps or stop.requested
      if last or step % run.train.save_every == 0:
        check_finite(metrics)
        monitor.record(*pending)
        pending = None
        folder = save(run, state, frozen, tokenizer, batches.get_state(), base)
        monitor.message(f"saved {folder}")
      if last:
        break
  if stop.requested:
    print(f"stopped at step {step}; the same command goes on from there")
  assert folder is not None
  return folder


def _base_of(resumed: Path, init_from: Path | None) -> Path | None:
  """A run keeps the base that it began with; init_from says where it lies if it moved since."""
  try:
    return checkpoint.describe(resumed).base
  except FileNotFoundError:
    if init_from is None:
      raise
    return checkpoint.describe(resumed, base=init_from).base


def _check_rows(run: Run, mesh):
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if run.data.batch_size % (run.train.accumulation * ways):
    raise ValueError(
      f"data.batch_size={run.data.batch_size} does not divide into train.accumulation="
      f"{run.train.accumulation} micro-batches of rows for mesh.data={mesh.shape['data']} x"
      f" mesh.fsdp={mesh.shape['fsdp']} devices; make it a multiple of"
      f" {run.train.accumulation * ways}"
    )


def initial_params(
  run: Run, mesh, start_from: Path | None, *, exactly: bool, base: Path | None = None
) -> dict:
  """Params with stacked layers on the mesh: from a checkpoint, or fresh.

  Args:
    run: the config.
    mesh: where they go.
    start_from: checkpoint folder or None.
    exactly: whether the checkpoint must be of this very model. If not, prompts, limits and dropout
      may differ, and LoRA that the checkpoint lacks starts fresh.
    base: where the base of that checkpoint lies.

  Raises:
    ValueError: if the checkpoint holds another model, or something frozen would be random.
  """
  key = jax.random.fold_in(jax.random.key(run.seed), 0)
  wanted = jax.eval_shape(lambda: speech_llm.init(key, run.model))
  trained = tree.flatten(tree.partition(wanted, run.trainable)[0]).keys()
  dtype = run.model.compute.jnp_dtype
  have: dict = {}
  if start_from is not None:
    saved = checkpoint.describe(start_from, base=base)
    _check_same_model(from_json(saved.config), run.model, start_from, exactly)
    shardings = param_shardings(mesh, saved.params)
    loaded = checkpoint.load(start_from, shardings=shardings, base=base).params
    stacked = jax.eval_shape(tree.stack_layers, loaded)
    placed = param_shardings(mesh, stacked)
    stack = lambda params: stored(tree.stack_layers(params), trained, dtype)  # noqa: E731
    have = jax.jit(stack, out_shardings=placed)(loaded)
  missing = tree.flatten(wanted).keys() - tree.flatten(have).keys()
  if not missing:
    return have
  random = sorted(p for p in missing if p not in trained and not p.startswith("frontend/"))
  if random:
    raise ValueError(
      f"{random[0]} and {len(random) - 1} others would be random and frozen: set init_from to a"
      " checkpoint that has them, or train them (config.trainable)"
    )

  def fresh():
    flat = tree.flatten(stored(speech_llm.init(key, run.model), trained, dtype))
    return tree.unflatten({path: flat[path] for path in missing})

  placed = param_shardings(mesh, jax.eval_shape(fresh))
  return tree.merge(have, jax.jit(fresh, out_shardings=placed)())


def _check_same_model(saved: SpeechLLMConfig, wanted: SpeechLLMConfig, folder: Path, exactly):
  free = "" if exactly else r"(prompts|template|max_audio_s).*|.*dropout"
  if not exactly and not saved.decoder.lora_rank:
    free += r"|decoder/lora_.*"
  different = {p: v for p, v in differences(saved, wanted).items() if not re.fullmatch(free, p)}
  if different:
    said = "; ".join(f"{p} is {a!r}, the config says {b!r}" for p, (a, b) in different.items())
    raise ValueError(f"{folder} holds another model than the config describes: {said}")


def measure_cmvn(run: Run, dataset, frontends: dict) -> dict:
  """Shift and scale of the features: read from a file, or measured on the first batches."""
  if run.train.cmvn != "estimate":
    shift_F, scale_F = read_mvn(run.train.cmvn, width=width(run.model.frontends[0]))
  else:
    with contextlib.closing(iter(dataset)) as batches:
      first = itertools.islice(batches, CMVN_BATCHES)
      shift_F, scale_F = estimate(clip for host_batch in first for clip in _clips(host_batch.batch))
  (name,) = frontends
  values = {"shift": np.asarray(shift_F), "scale": np.asarray(scale_F)}
  return {name: jax.device_put(values, jax.tree.map(lambda x: x.sharding, frontends[name]))}


def _clips(batch):
  for x_TF, frames in zip(batch.features[0], batch.frames[0], strict=True):
    yield x_TF[:frames]


def initial_state(run: Run, params, tx, mesh):
  """Cuts params in two and adds the optimizer's state.

  Returns:
    (TrainState, frozen params, (state shardings, frozen shardings)).
  """
  trainable, frozen = tree.partition(params, run.trainable)
  key = jax.random.fold_in(jax.random.key(run.seed), 1)
  abstract = jax.eval_shape(lambda t: create(t, tx, key), trainable)
  shardings = state_shardings(abstract, tx, param_shardings(mesh, trainable))
  state = jax.jit(lambda t: create(t, tx, key), out_shardings=shardings)(trainable)
  return state, frozen, (shardings, param_shardings(mesh, frozen))


def save(
  run: Run, state: TrainState, frozen, tokenizer: Tokenizer, data_state, base: Path | None
) -> Path:
  """Writes a checkpoint folder that a user can run, and that training can go on from.

  With a base only the trained parameters are written, beside a pointer to it.
  """
  step = int(state.step)
  params = state.trainable if base else tree.merge(state.trainable, frozen)
  folder = checkpoint.save(
    checkpoint.step_folder(run.workdir, step),
    params=jax.jit(tree.unstack_layers)(params),  # jit: eager slicing needs all shards here
    config_json=to_json(run.model),
    tokenizer=tokenizer.save,
    generation=dataclasses.asdict(run.generation),
    base=base,
    train_state=dataclasses.replace(state, trainable=None),
    data_state=data_state,
  )
  checkpoint.keep_last(run.workdir, run.train.keep)
  return folder
