"""The compiled program of a training run; `benchmarks.aot` compiles it without devices."""

import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from mooer_jax import speech_llm, tree, vocoders
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.sharding import batch_sharding, param_shardings
from mooer_jax.speech_llm import Batch
from mooer_jax.training import vocoder as vocoder_training
from mooer_jax.training.optimizer import VECTORS, OptimizerConfig, learning_rate, make_optimizer
from mooer_jax.training.step import create, jit_train_step, make_train_step, state_shardings
from mooer_jax.training.vocoder import VocoderTrainingConfig

COMPILERS = 4  # compilations at a time; each of a 7B step takes about 2 GB


@functools.lru_cache(maxsize=8)  # a second run of the same model in a process is not traced again
def jitted_step(
  model: SpeechLLMConfig,
  optimizer: OptimizerConfig,
  *,
  trainable: tuple[str, ...],
  accumulation: int,
  mesh: jax.sharding.Mesh,
  max_loss_ratio: float = 0.0,
  vocoder: VocoderTrainingConfig | None = None,
):
  """The train step (state, frozen, batch) -> (state, metrics), jitted for a mesh.

  Args:
    model: with compute.scan, as training runs it.
    trainable: patterns of the paths of trained parameters.
    accumulation: micro-batches per batch.
    mesh: its devices may be those of a topology description.
    max_loss_ratio: as for `make_train_step`.
    vocoder: how the vocoder is trained; None: the answers are.
  """
  _, shardings = abstract_state(model, optimizer, trainable=trainable, mesh=mesh, vocoder=vocoder)

  def loss_fn(trainable, frozen, batch, key):
    params, rows = tree.merge(trainable, frozen), batch_sharding(mesh)
    if vocoder is not None:
      return vocoder_training.loss(params, batch, model, vocoder, rows=rows)
    return speech_llm.loss(params, batch, model, dropout_key=key, rows=rows)

  step = make_train_step(
    loss_fn,
    make_optimizer(optimizer),
    schedule=learning_rate(optimizer),
    accumulation=accumulation,
    max_loss_ratio=max_loss_ratio,
  )
  return jit_train_step(step, mesh, shardings)


def compile_step(
  step, *, state, frozen, batches: Sequence[Batch], message: Callable[[str], None]
) -> Callable:
  """Compile a step (from `jitted_step`) for the shapes of all `batches`, several at a time.

  Batches are of `ShapeDtypeStruct`s; `message` prints the progress. Returns the step for them.
  """
  lowered = {_shape(batch): step.lower(state, frozen, batch) for batch in batches}
  unit = "samples" if any(batch.has_waveforms for batch in batches) else "frames"
  compiled = {}
  with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
    futures = {pool.submit(program.compile): shape for shape, program in lowered.items()}
    for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
      shape = futures[future]
      compiled[shape] = future.result()
      lengths = " and ".join(map(str, shape[0]))
      message(f"compiled {number} of {len(futures)}: {lengths} {unit}, {shape[1]} answer tokens")
  return lambda state, frozen, batch: compiled[_shape(batch)](state, frozen, batch)


def _shape(batch: Batch) -> tuple[tuple[int, ...], int]:
  return tuple(x.shape[1] for x in batch.features), batch.labels_BS.shape[1]


def cast_params(params: dict, trained: Iterable[str], dtype) -> dict:
  """Cast params: float32 if trained or of speech output, else matrices to the compute dtype."""
  trained, flat = set(trained), tree.flatten(params)
  for path, x in flat.items():
    vector = path.rsplit("/", 1)[-1] in VECTORS  # small, and rounding CMVN or norms is costly
    exact = vector or path.partition("/")[0] in vocoders.PARTS
    flat[path] = x.astype(jnp.float32 if path in trained or exact else dtype)
  return tree.unflatten(flat)


def init_params(
  key: jax.Array, model: SpeechLLMConfig, vocoder: VocoderTrainingConfig | None = None
) -> dict:
  """Initial parameters of a model and, to train its vocoder, of the discriminators."""
  params = speech_llm.init(key, model)
  if vocoder is not None:
    module = vocoder.discriminators.module()
    waveform_BN = jnp.zeros((1, max(vocoder.discriminators.periods, default=1)))
    made = module.init(jax.random.fold_in(key, 1), waveform_BN)
    params = {**params, vocoders.DISCRIMINATORS: made["params"]}
  return params


def abstract_state(
  model: SpeechLLMConfig,
  optimizer: OptimizerConfig,
  *,
  trainable: Iterable[str],
  mesh,
  vocoder: VocoderTrainingConfig | None = None,
):
  """(TrainState and frozen params as `ShapeDtypeStruct`s, their shardings); creates no array."""
  key = jax.random.key(0)
  wanted = jax.eval_shape(lambda: init_params(key, model, vocoder))
  trained = tree.flatten(tree.partition(wanted, trainable)[0])
  kept = jax.eval_shape(lambda p: cast_params(p, trained, model.compute.jnp_dtype), wanted)
  to_train, frozen = tree.partition(kept, trainable)
  tx = make_optimizer(optimizer)
  state = jax.eval_shape(lambda t: create(t, tx, key), to_train)
  of_state = state_shardings(state, tx, param_shardings(mesh, to_train))
  return (state, frozen), (of_state, param_shardings(mesh, frozen))
