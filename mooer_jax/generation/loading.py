"""Loading a checkpoint for decoding."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mooer_jax import checkpoint, vocoders
from mooer_jax.config import SpeechLLMConfig, build, from_json, with_new_names
from mooer_jax.generation import GenerationConfig, weights
from mooer_jax.generation.adapters import Adapters, add_adapters
from mooer_jax.kernels.choice import check_backend
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.sharding import check_mesh, mesh_of, param_shardings
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.vocoders import SpeechOutputConfig
from mooer_jax.vocoders.hifigan import fold

DEFAULT_VOICE = "prompt.wav"  # as the releases of MooER name it


class Loaded(NamedTuple):
  """A model that was loaded for decoding.

  Attributes:
    params: as `weights.lay_out` returns them; of the LLM, layer by layer.
    model: without LoRA if it was merged, and without speech output.
    generation: with the eos ids.
    adapters: of `load_model`, if it was given any.
  """

  params: dict
  model: SpeechLLMConfig
  tokenizer: Tokenizer
  generation: GenerationConfig
  adapters: Adapters | None = None

  @property
  def mesh(self) -> jax.sharding.Mesh | None:
    """The mesh of the params; None if they are on one device."""
    return mesh_of(self.params)


def merge_options(saved: Mapping[str, Any], given: Mapping[str, Any]) -> GenerationConfig:
  """The options of a checkpoint, overridden by given ones; both may have deprecated names."""
  saved, given = (with_new_names(named, GenerationConfig.RENAMED) for named in (saved, given))
  return build(GenerationConfig, {**saved, **given}, "generation")


def load_model(
  path: str | Path,
  compute: ExecutionConfig,
  *,
  base_checkpoint: str | Path | None = None,
  generation: Mapping[str, Any] | None = None,
  lora_scale: float | None = None,
  merge_lora: bool = True,
  adapters: Mapping[str, str | Path] | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Loaded:
  """Loads a checkpoint folder, or the newest checkpoint of a training workdir, for decoding.

  Parts that make speech are not loaded; see `load_speech`.

  Args:
    path: the folder or its URL.
    compute: how the model runs; its dtype is that of the weight matrices.
    base_checkpoint: base checkpoint path of a fine-tune, if it has moved.
    generation: options that override those of the checkpoint.
    lora_scale: scale at which a LoRA is merged; default: that of training.
    merge_lora: whether to add a LoRA to the weights, which decodes faster. Without it, `generate`
      takes a scale at each call, or one per row.
    adapters: {name: folder} of fine-tunes of this checkpoint that trained a LoRA alone, which are
      kept apart, as is a LoRA of the checkpoint itself. `generate` must be given
      `lora_scale=loaded.adapters.scale(names)`, which says the adapter of each row.
    mesh: from `make_mesh`; each device reads its own part of the weights. Default: one device.

  Raises:
    FileNotFoundError, ValueError: if it is no checkpoint, naming what is missing; for an option
      that is unknown, out of range or without effect; for a mesh whose sizes do not divide the
      weights.
  """
  check_mesh(mesh)
  if not isinstance(path, (str, Path)):
    raise ValueError(f"checkpoint={path!r} ({type(path).__name__}): must be the path of a folder")
  check_backend(compute.attention)
  folder = checkpoint.find(path)
  about = checkpoint.describe(folder, base=base_checkpoint)
  if "connector" not in about.config:
    raise ValueError(
      f"{folder} holds a part of a speech LLM ({', '.join(about.config)}), which cannot generate"
      " text by itself"
    )
  model = from_json(about.config, compute, path=about.folder / "config.json")
  checkpoint.check_leaves(about, weights.saved_shapes(about.params, model))
  model = model.replace(speech_output=None)
  read = {name: part for name, part in about.params.items() if name not in vocoders.PARTS}
  shardings = None if mesh is None else param_shardings(mesh, read)
  loaded = checkpoint.load(
    folder,
    shardings=shardings,
    dtype=compute.dtype,
    base=base_checkpoint,
    without=vocoders.PARTS,
  )
  try:
    merge_options(loaded.generation, {})
  except ValueError as error:
    raise ValueError(f"{loaded.folder / 'generation.json'}: {error}") from error
  options = merge_options(loaded.generation, generation or {})
  options.check_effect(generation or {})
  tokenizer = Tokenizer.from_folder(loaded.tokenizer)
  options = dataclasses.replace(options, eos_token_id=options.eos_token_id or (tokenizer.eos_id,))
  params, side_by_side = loaded.params, None
  if adapters:
    if lora_scale is not None or not merge_lora:
      raise ValueError("lora_scale and merge_lora=False have no effect beside adapters")
    params, model, side_by_side = add_adapters(params, model, loaded, adapters)
    if mesh is not None:
      params = jax.device_put(params, param_shardings(mesh, params))
  elif merge_lora:
    params, model = weights.merge_lora(params, model, lora_scale)
  elif lora_scale is not None:
    raise ValueError(f"lora_scale={lora_scale:g} has no effect with merge_lora=False")
  if compute.quantization == "int8" and not weights.is_quantized(params):
    params = weights.quantize(params)
  return Loaded(weights.lay_out(params, model), model, tokenizer, options, side_by_side)


class LoadedSpeech(NamedTuple):
  """The parts of a model that make speech.

  Attributes:
    params: "vocoder", for inference (`hifigan.fold`), and "speaker"; float32.
    config: their sizes, and the start token.
    voice: recording of the default voice, if the checkpoint has one: `prompt.wav` in `source/`.
  """

  params: dict
  config: SpeechOutputConfig
  voice: Path | None


def load_speech(path: str | Path, *, base_checkpoint: str | Path | None = None) -> LoadedSpeech:
  """Loads the vocoder and the speaker encoder of a checkpoint; arguments as in `load_model`.

  Raises:
    FileNotFoundError, ValueError: if it is no checkpoint, or one without speech output.
  """
  folder = checkpoint.find(path)
  about = checkpoint.describe(folder, base=base_checkpoint)
  if not about.config.get("speech_output"):
    raise ValueError(
      f"{about.folder}: the model has no speech output (no vocoder); transcribe with it, or use a"
      " checkpoint of MooER-omni, MooER-S2ST or a model that was trained for speech"
    )
  model = from_json(about.config, path=about.folder / "config.json")
  checkpoint.check_leaves(about, weights.saved_shapes(about.params, model))
  assert model.speech_output is not None
  others = [name for name in about.params if name not in vocoders.PARTS]
  params = checkpoint.load(folder, dtype="float32", base=base_checkpoint, without=others).params
  params = {**params, "vocoder": fold(params["vocoder"])}
  voices = (voice for source in about.sources for voice in sorted(source.rglob(DEFAULT_VOICE)))
  return LoadedSpeech(params, model.speech_output, next(voices, None))
