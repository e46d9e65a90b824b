"""Initial state of a training run on its mesh: parameters, CMVN, optimizer state."""

import contextlib
import functools
import itertools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mooer_jax import checkpoint, hosts, speech_llm, tree, vocoders
from mooer_jax.audio.cmvn import estimate, read_mvn
from mooer_jax.config import (
  SpeechLLMConfig,
  from_json,
  frontend_from_json,
  json_differences,
  part_from_json,
  part_to_json,
  run_fields,
  to_json,
)
from mooer_jax.data.config import DataConfig
from mooer_jax.data.readers.entries import SkippedUtterance
from mooer_jax.data.targets import segment_frames
from mooer_jax.data.utterances import BadDataError
from mooer_jax.run.config import Run
from mooer_jax.sharding import param_shardings
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.training import vocoder
from mooer_jax.training.program import cast_params, init_params
from mooer_jax.training.step import create, state_shardings

CMVN_BATCHES = 32


def initial_params(run: Run, mesh, *, resumed: Path | None, base: str | Path | None) -> dict:
  """Parameters with stacked layers on the mesh: from a checkpoint, or fresh.

  Args:
    run, mesh: config, and mesh of the parameters. From init_from, prompts, limits and dropout may
      differ, and LoRA that it lacks starts fresh.
    resumed: checkpoint to resume instead, whose model must be identical.
    base: base checkpoint of `resumed`.

  Raises:
    ValueError: if the checkpoint holds another model, frozen parameters would be random, or the
      objective does not train some that are selected.
  """
  key = jax.random.fold_in(jax.random.key(run.seed), 0)
  wanted = jax.eval_shape(lambda: init_params(key, run.model, vocoder_of(run)))
  trained = tree.flatten(tree.partition(wanted, trained_patterns(run))[0]).keys()
  if run.train.objective == "vocoder":
    vocoder.check_trainable(trained)
  dtype = run.model.compute.jnp_dtype
  have: dict = {}
  if start_from := resumed or run.init_from:
    saved = checkpoint.describe(start_from, base=base)
    _check_same_model(saved.config, run.model, saved.folder, exactly=bool(resumed))
    checkpoint.check_leaves(saved, _leaves_of(saved, run.model))
    shardings = param_shardings(mesh, saved.params)
    loaded = checkpoint.load(start_from, shardings=shardings, base=base).params
    placed = param_shardings(mesh, jax.eval_shape(tree.stack_layers, loaded))
    stack = lambda params: cast_params(tree.stack_layers(params), trained, dtype)  # noqa: E731
    have = jax.jit(stack, out_shardings=placed)(loaded)
  missing = tree.flatten(wanted).keys() - tree.flatten(have).keys()
  if not missing:
    return have
  if random := sorted(p for p in missing - trained if not p.startswith("frontend/")):
    raise ValueError(
      f"{random[0]} and {len(random) - 1} others would be random and frozen: set init_from to a"
      " checkpoint that has them, or train them (config.trainable)"
    )

  def fresh():
    flat = tree.flatten(cast_params(init_params(key, run.model, vocoder_of(run)), trained, dtype))
    return tree.unflatten({path: flat[path] for path in missing})

  placed = param_shardings(mesh, jax.eval_shape(fresh))
  return tree.merge(have, jax.jit(fresh, out_shardings=placed)())


def _check_same_model(saved: dict, wanted: SpeechLLMConfig, folder: Path, *, exactly: bool):
  """Compares config.json with the config; that of joined parts describes only the parts."""
  free = [] if exactly else [f"{re.escape(path)}(/.*)?" for path in run_fields(wanted)]
  if not exactly and not saved.get("decoder", {}).get("lora_rank"):
    free.append("decoder/lora_.*")
  if not exactly and "speech_output" not in saved:  # a model of text may learn to speak
    free.append("speech_output/.*")
    speech = wanted.speech_output
    if speech is not None and speech.drop_last != vocoders.TRAINED_DROP_LAST:
      raise ValueError(
        f"model.speech_output.drop_last={speech.drop_last} is for a released vocoder; one that is"
        f" trained here takes all states but the last {vocoders.TRAINED_DROP_LAST}: set it to that"
      )
  described = to_json(wanted)
  if "connector" in saved:
    saved = to_json(from_json(saved, path=folder / "config.json"))
  else:
    described = {name: described[name] for name in saved if name in described}
    saved = dict(saved)  # with all keys that this version has
    for name, read in (("encoders", part_from_json), ("frontends", frontend_from_json)):
      saved[name] = [part_to_json(read(part, "config.json")) for part in saved.get(name, ())]
    if "decoder" in saved:
      saved["decoder"] = part_to_json(part_from_json(saved["decoder"], "config.json"))
  found = "; ".join(
    f"{path} is {saved_value!r}, in the config {wanted_value!r}"
    for path, (saved_value, wanted_value) in json_differences(saved, described).items()
    if not re.fullmatch("|".join(free), path)
  )
  if found:
    raise ValueError(f"{folder} holds another model than the config describes: {found}")


def _leaves_of(saved: checkpoint.Checkpoint, wanted: SpeechLLMConfig) -> dict:
  """The parameters that a checkpoint must hold according to its config.json."""
  if "connector" in saved.config:
    model = from_json(saved.config, path=saved.folder / "config.json")
    return speech_llm.param_shapes(model)
  # Encoders or an LLM: those of the wanted model; LoRA and CMVN may start fresh.
  parts = [f"encoders/{encoder['kind']}/" for encoder in saved.config.get("encoders", ())]
  parts += ["decoder/"] if "decoder" in saved.config else []
  have = tree.flatten(saved.params)
  return tree.unflatten(
    {
      path: leaf
      for path, leaf in tree.flatten(speech_llm.param_shapes(wanted)).items()
      if path in have or (path.startswith(tuple(parts)) and "/lora_" not in path)
    }
  )


def measure_cmvn(run: Run, dataset, cmvn: dict) -> dict:
  """CMVN of the features: read from a file, or estimated on the first batches of the first stream.

  Args:
    run, dataset: config and batches of training.
    cmvn: CMVN in the parameters, by encoder; determines the sharding of the result.

  Raises:
    ValueError: if train.cmvn is a file and the features of several encoders are normalised.
  """
  encoders = [encoder.kind for encoder in run.model.encoders]
  if run.train.cmvn != "estimate" and len(cmvn) != 1:
    raise ValueError(
      f"train.cmvn={run.train.cmvn!r} is one file, but the features of {len(cmvn)} encoders"
      f" ({', '.join(cmvn)}) are normalised; set train.cmvn='estimate'"
    )
  values = {}
  shift: Any
  scale: Any
  for name in cmvn:
    number = encoders.index(name)
    if run.train.cmvn == "estimate":
      shift, scale = hosts.on_first(functools.partial(_estimated, dataset, number, run))
    else:
      shift, scale = read_mvn(run.train.cmvn, width=run.model.frontends[number].width)
    values[name] = {"shift": np.asarray(shift, np.float32), "scale": np.asarray(scale, np.float32)}
  return jax.device_put(values, jax.tree.map(lambda x: x.sharding, cmvn))


def _estimated(dataset, number: int, run: Run) -> list[list[float]]:
  """Shift and scale of an encoder's features, as JSON values."""
  return [np.asarray(x).tolist() for x in estimate(_clips(dataset, number, run))]


def _clips(dataset, number: int, run: Run):
  """The features of the first batches for an encoder; BadDataError has all skipped utterances."""
  skipped: list[SkippedUtterance] = []
  from_waveforms = jax.jit(run.model.frontends[number].features_jax)
  with contextlib.closing(iter(dataset.parents[0])) as batches:
    try:
      # A batch of a stream has only a part of the rows.
      streams = run.data.streams or jax.process_count()
      for host in itertools.islice(batches, CMVN_BATCHES * streams):
        skipped += host.skipped
        batch = host.batch
        if batch.has_waveforms:
          features, frames = jax.device_get(from_waveforms(batch.features[0], batch.frames[0]))
        else:
          features, frames = batch.features[number], batch.frames[number]
        yield from (x_TF[:n] for x_TF, n in zip(features, frames, strict=True))
    except BadDataError as error:
      error.skipped = (*skipped, *error.skipped)
      raise


def initial_state(run: Run, params: dict, *, tx, mesh):
  """Returns (TrainState, frozen params) on the mesh."""
  trainable, frozen = tree.partition(params, trained_patterns(run))
  key = jax.random.fold_in(jax.random.key(run.seed), 1)
  abstract = jax.eval_shape(lambda t: create(t, tx, key), trainable)
  shardings = state_shardings(abstract, tx, param_shardings(mesh, trainable))
  state = jax.jit(lambda t: create(t, tx, key), out_shardings=shardings)(trainable)
  return state, frozen


def trained_patterns(run: Run) -> tuple[str, ...]:
  """The patterns of all trained parameters; discriminators are trained with a vocoder."""
  more = () if vocoder_of(run) is None else (f"{vocoders.DISCRIMINATORS}/.*",)
  return *run.trainable, *more


def vocoder_of(run: Run) -> vocoder.VocoderTrainingConfig | None:
  """How the vocoder is trained; None if the run trains answers."""
  return run.vocoder_training if run.train.objective == "vocoder" else None


def check_objective(run: Run) -> None:
  """Raises ValueError for options that do not fit train.objective."""
  if run.train.objective != "vocoder":
    unset = DataConfig()
    names = ("target_audio", "target_s", "voice_s")
    options = [f"data.{name}" for name in names if getattr(run.data, name) != getattr(unset, name)]
    if run.vocoder_training != vocoder.VocoderTrainingConfig():
      options.append("vocoder_training")
    if options:
      raise ValueError(
        f"{options[0]} has no effect with train.objective={run.train.objective!r}; leave it out, or"
        " set train.objective='vocoder'"
      )
    return
  if run.model.speech_output is None:
    raise ValueError("train.objective='vocoder': the model has none; set model.speech_output")
  if not run.data.target_audio:
    raise ValueError(
      "data.target_audio is missing: name the file of the recordings of the answers, `KEY path`"
      " lines"
    )
  if run.perplexity.shards:
    raise ValueError(
      f"perplexity.shards={run.perplexity.shards!r} has no effect with train.objective='vocoder',"
      " which does not change the LLM; leave it out"
    )
  samples = segment_frames(run.data, run.model) * run.model.speech_output.vocoder.samples_per_frame
  if samples < (window := run.vocoder_training.mel_window):
    raise ValueError(
      f"data.target_s={run.data.target_s:g} gives segments of {samples} samples, fewer than"
      f" vocoder_training.mel_window={window}; raise target_s"
    )


def read_tokenizer(run: Run, initial: str | Path | None = None) -> Tokenizer:
  """The tokenizer: a folder, the initial checkpoint's, or one made of `config.characters`.

  Raises:
    ValueError: if the config names none, or two that differ; for ids beyond the embedding table.
  """
  folder = run.tokenizer or (initial and checkpoint.local_folder(initial) / "tokenizer")
  saved = Tokenizer.from_folder(folder) if folder else None
  made = None
  if run.characters and not run.tokenizer:
    made = Tokenizer.from_characters(run.characters, run.specials, eos=run.eos)
  if made and saved and made.vocabulary() != saved.vocabulary():
    raise ValueError(
      f"config.characters and specials make another tokenizer than that of {initial}; set"
      " config.characters='' to take the checkpoint's"
    )
  tokenizer = saved or made
  if tokenizer is None:
    raise ValueError("no tokenizer: set config.tokenizer to a folder, or init_from, or characters")
  if tokenizer.vocab_size > run.model.decoder.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} tokens but llm.vocab_size="
      f"{run.model.decoder.vocab_size}; set model.llm.vocab_size to at least that"
    )
  return tokenizer
