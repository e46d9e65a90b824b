"""A speech LLM: four pure functions in a row.

    features ─ encode ─▶ frames ─ connect ─▶ speech tokens ─ splice ─▶ embeddings ─ decode ─▶ hidden

Every function takes the whole parameter tree and the config; there is no state.
"""

import bisect
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import tree
from mooer_jax.audio.frontend import features_jax, num_frames
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.linear import LinearConfig, LinearConnector
from mooer_jax.connectors.qformer import QFormerConfig, WindowedQFormer
from mooer_jax.decoders.llm import LLM, KVCache, Placement
from mooer_jax.encoders.beats import BEATsConfig, BEATsEncoder
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder
from mooer_jax.encoders.whisper import WhisperConfig, WhisperEncoder
from mooer_jax.nn.layers import LayerNorm

Array = jax.Array | np.ndarray  # batches are made in NumPy
ENCODERS = {SANMConfig: SANMEncoder, WhisperConfig: WhisperEncoder, BEATsConfig: BEATsEncoder}
_FRAMES = 16  # that `init` traces with, or more
CONNECTORS = {LinearConfig: LinearConnector, QFormerConfig: WindowedQFormer}


@flax.struct.dataclass
class Batch:
  """A batch of utterances with prompts and, for training, answers.

  Attributes:
    features: one array per encoder: float32 [B, T, F] features before CMVN, or waveforms [B, N] in
      [-1, 1], whose features are then computed inside the step.
    frames: one array per encoder: int32 [B], valid feature frames (or samples).
    before_BS: int32, prompt tokens before the speech; below 0 is padding, on the left.
    after_BS: int32, prompt tokens after the speech, padded the same way.
    answer_BS: int32, answer and eos; below 0 is padding, on the right. A row of padding only has
      0 frames and no answer.
    task_B: int32, which of config.prompts a row answers, -1 for padding; None where nobody asks.
    encoded: whether `features` are the encoders' frames [B, T, D] already, from a cache.
  """

  features: tuple[Array, ...]
  frames: tuple[Array, ...]
  before_BS: Array
  after_BS: Array
  answer_BS: Array
  task_B: Array | None = None
  encoded: bool = flax.struct.field(pytree_node=False, default=False)


def encoder_modules(config: SpeechLLMConfig):
  """{name: encoder module}, in the order of config.encoders."""
  return {c.kind: ENCODERS[type(c)](c, config.compute) for c in config.encoders}


def connector_module(config: SpeechLLMConfig):
  return CONNECTORS[type(config.connector)](
    config.connector, config.decoder.hidden_size, config.compute
  )


def num_speech_tokens(samples: int, config: SpeechLLMConfig) -> int:
  """Speech tokens that a clip of so many samples becomes; 0 for a clip that is too short."""
  frames = [
    encoder.num_outputs(steps)
    for encoder, frontend in zip(config.encoders, config.frontends, strict=True)
    if (steps := num_frames(samples, frontend))
  ]
  return config.connector.num_tokens(max(frames)) if len(frames) == len(config.encoders) else 0


def shortest_s(config: SpeechLLMConfig) -> float:
  """Length of the shortest clip that the model hears anything of, seconds."""
  rate_hz = config.sample_rate_hz
  samples = range(int(config.max_audio_s * rate_hz) + 1)
  return bisect.bisect_left(samples, 1, key=lambda n: num_speech_tokens(n, config)) / rate_hz


def decoder_module(config: SpeechLLMConfig) -> LLM:
  return LLM(config.decoder, config.compute)


def init(key: jax.Array, config: SpeechLLMConfig) -> dict:
  """Fresh parameters, float32; layers stacked where config.compute.scan, else one by one.

  CMVN starts as the identity; `audio.cmvn` reads or estimates the real one.
  """
  key_encoders, key_connector, key_decoder = jax.random.split(key, 3)
  params: dict = {"frontend": {}, "encoders": {}}
  frames = _FRAMES
  while not config.connector.num_tokens(
    max(encoder.num_outputs(frames) for encoder in config.encoders)
  ):
    frames += 1  # few frames are quick to trace; the config has made sure that there are enough
  streams = {}
  for number, (name, module) in enumerate(encoder_modules(config).items()):
    # The first encoder keeps the key that it had in version 0.1.
    key = jax.random.fold_in(key_encoders, number) if number else key_encoders
    width = module.config.input_width
    x_BTF, valid_BT = jnp.zeros((1, frames, width)), jnp.ones((1, frames), bool)
    streams[name], variables = module.init_with_output(key, x_BTF, valid_BT)
    params["encoders"][name] = variables["params"]
    if config.frontends[number].normalised:
      params["frontend"][name] = {"shift": jnp.zeros(width), "scale": jnp.ones(width)}
  if config.encoder_norm:
    params["encoder_norms"] = {
      name: {"scale": jnp.ones(x_BTD.shape[-1]), "bias": jnp.zeros(x_BTD.shape[-1])}
      for name, (x_BTD, _) in streams.items()
    }
  (speech_BSD, speech_valid_BS), variables = connector_module(config).init_with_output(
    key_connector, *join(params, streams, config)
  )
  params["connector"] = variables["params"]
  decoder = decoder_module(config).init(
    key_decoder, speech_BSD, speech_valid_BS, method=LLM.everything
  )
  return {**params, "decoder": decoder["params"]}


def param_shapes(config: SpeechLLMConfig) -> dict:
  """The `ShapeDtypeStruct`s of the parameters, one by one for each layer; computes nothing."""
  config = config.with_compute(scan=True)  # traces one layer for all
  key = jax.random.key(0)
  return jax.eval_shape(lambda: tree.unstack_layers(init(key, config)))


def encode(params: dict, batch: Batch, config: SpeechLLMConfig, rngs: dict | None = None):
  """Normalises features, runs the encoders and joins their frames: ([B, T, D], valid [B, T])."""
  return join(params, encode_each(params, batch, config, rngs), config)


def encode_each(params: dict, batch: Batch, config: SpeechLLMConfig, rngs: dict | None = None):
  """Each encoder's frames by its name: {name: ([B, T, D], valid [B, T])}."""
  streams = {}
  for number, (name, module) in enumerate(encoder_modules(config).items()):
    features, frames_B = jnp.asarray(batch.features[number]), jnp.asarray(batch.frames[number])
    if features.ndim == 2:
      features, frames_B = features_jax(features, frames_B, config.frontends[number])
    valid_BT = jnp.arange(features.shape[1])[None] < frames_B[:, None]
    if batch.encoded:
      streams[name] = features.astype(config.compute.jnp_dtype), valid_BT
      continue
    if config.frontends[number].normalised:
      cmvn = params["frontend"][name]
      features = (features + cmvn["shift"]) * cmvn["scale"]
    features = jnp.where(valid_BT[..., None], features, 0)
    variables = {"params": params["encoders"][name]}
    streams[name] = module.apply(variables, features, valid_BT, rngs=rngs)
  return streams


def join(params: dict, streams: Mapping[str, Any], config: SpeechLLMConfig):
  """Puts the frames of all encoders side by side: ([B, T, sum of D], valid [B, T]).

  Each stream passes its LayerNorm if the model has them; the shorter ones end in zeros. A frame is
  valid where any encoder heard something.

  Args:
    params: of the whole model.
    streams: name of the encoder -> (frames [B, T, D], valid [B, T]).
    config: the model.
  """
  if config.encoder_norm:
    norms = params["encoder_norms"]
    streams = {
      name: (LayerNorm().apply({"params": norms[name]}, x_BTD), valid_BT)
      for name, (x_BTD, valid_BT) in streams.items()
    }
  if len(streams) == 1:
    return next(iter(streams.values()))
  longest = max(valid_BT.shape[1] for _, valid_BT in streams.values())
  frames, valid = [], []
  for x_BTD, valid_BT in streams.values():
    missing = longest - valid_BT.shape[1]
    x_BTD = jnp.where(valid_BT[..., None], x_BTD, 0)
    frames.append(jnp.pad(x_BTD, ((0, 0), (0, missing), (0, 0))))
    valid.append(jnp.pad(valid_BT, ((0, 0), (0, missing))))
  return jnp.concatenate(frames, axis=-1), functools.reduce(jnp.logical_or, valid)


def connect(
  params: dict,
  frames_BTD: jax.Array,
  valid_BT: jax.Array,
  config: SpeechLLMConfig,
  rngs: dict | None = None,
):
  """Encoder frames to speech tokens: ([B, S, D of the LLM], valid [B, S])."""
  module = connector_module(config)
  return module.apply({"params": params["connector"]}, frames_BTD, valid_BT, rngs=rngs)


def splice(params, batch: Batch, speech_BSD, speech_valid_BS, config: SpeechLLMConfig):
  """Puts the speech tokens where the template says: ([B, S, D], valid [B, S]).

  Raises:
    ValueError: if no token follows the speech; the answer is read off the prompt's last slot, and
      padded speech ends in an empty one.
  """
  if batch.after_BS.shape[1] == 0:
    raise ValueError(
      "the prompt ends with the speech; at least one token must follow, off which the answer is"
      f" read (the model's template is {config.chat_template!r})"
    )
  before_BSD, after_BSD = (embed(params, t, config) for t in (batch.before_BS, batch.after_BS))
  inputs_BSD = jnp.concatenate([before_BSD, speech_BSD, after_BSD], axis=1)
  valid_BS = jnp.concatenate([batch.before_BS >= 0, speech_valid_BS, batch.after_BS >= 0], axis=1)
  return inputs_BSD, valid_BS


def embed(params: dict, tokens_BS: Array, config: SpeechLLMConfig) -> jax.Array:
  """Token embeddings [B, S, D]."""
  variables = {"params": params["decoder"]}
  return decoder_module(config).apply(variables, tokens_BS, method=LLM.embed_tokens)  # type: ignore[return-value]


def decode(
  params: dict,
  inputs_BSD: jax.Array,
  valid_BS: jax.Array,
  config: SpeechLLMConfig,
  *,
  cache: KVCache | None = None,
  lora_scale: jax.Array | float | None = None,
  placement: Placement | None = None,
  rngs: dict | None = None,
):
  """Embeddings to hidden states: ([B, S, D], cache); see `LLM.__call__`."""
  return decoder_module(config).apply(
    {"params": params["decoder"]}, inputs_BSD, valid_BS, cache, lora_scale, placement, rngs=rngs
  )


def logits(params: dict, hidden_BSD: jax.Array, config: SpeechLLMConfig) -> jax.Array:
  """Float32 [B, S, V]."""
  variables = {"params": params["decoder"]}
  return decoder_module(config).apply(variables, hidden_BSD, method=LLM.logits)  # type: ignore[return-value]


def prompt(params: dict, batch: Batch, config: SpeechLLMConfig, rngs: dict | None = None):
  """Everything up to the answer, as the LLM reads it: ([B, S, D], valid [B, S])."""
  frames_BTD, valid_BT = encode(params, batch, config, rngs)
  speech_BSD, speech_valid_BS = connect(params, frames_BTD, valid_BT, config, rngs)
  return splice(params, batch, speech_BSD, speech_valid_BS, config)


def answer_logits(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  *,
  lora_scale: jax.Array | float | None = None,
  dropout_key: jax.Array | None = None,
  rows: jax.sharding.Sharding | None = None,
) -> jax.Array:
  """Teacher-forced logits of the answer tokens, float32 [B, A, V], and of no others.

  `rows` says how rows lie on a mesh; without it XLA may take over the embedding table's split of
  the width, and then every chip holds all rows of every layer.
  """
  rngs = None if dropout_key is None else {"dropout": dropout_key}
  inputs_BSD, valid_BS = prompt(params, batch, config, rngs)
  first = inputs_BSD.shape[1] - 1  # the last slot of the prompt predicts the first answer token
  given_BA = batch.answer_BS[:, :-1]
  answer_BAD = embed(params, given_BA, config)
  inputs_BSD = jnp.concatenate([inputs_BSD, answer_BAD.astype(inputs_BSD.dtype)], axis=1)
  valid_BS = jnp.concatenate([valid_BS, given_BA >= 0], axis=1)
  if rows is not None:
    inputs_BSD = jax.lax.with_sharding_constraint(inputs_BSD, rows)
  hidden_BSD, _ = decode(params, inputs_BSD, valid_BS, config, lora_scale=lora_scale, rngs=rngs)
  return logits(params, hidden_BSD[:, first:], config)


def loss(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  *,
  lora_scale: jax.Array | float | None = None,
  dropout_key: jax.Array | None = None,
  rows: jax.sharding.Sharding | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of answer and eos, averaged over the answer tokens of the batch.

  Args: as of `answer_logits`.

  Returns:
    (mean loss, sums to aggregate over batches: "loss_sum" in nats, "tokens", "correct"; with
      batch.task_B also "task_sums" [tasks, 3], the same three for each of config.prompts).
  """
  logits_BAV = answer_logits(
    params, batch, config, lora_scale=lora_scale, dropout_key=dropout_key, rows=rows
  )
  target_BA = batch.answer_BS
  counted_BA = target_BA >= 0
  picked_BA = jnp.take_along_axis(logits_BAV, jnp.maximum(target_BA, 0)[..., None], axis=-1)[..., 0]
  nats_BA = jax.nn.logsumexp(logits_BAV, axis=-1) - picked_BA
  correct_BA = (logits_BAV.argmax(-1) == target_BA) & counted_BA
  nats_BA = jnp.where(counted_BA, nats_BA, 0)
  sums = {
    "loss_sum": nats_BA.sum(),
    "tokens": counted_BA.sum(),
    "correct": correct_BA.sum(),
  }
  if batch.task_B is not None:
    of_task_NB = batch.task_B == jnp.arange(len(config.prompts))[:, None]
    columns_3B = jnp.stack(
      [x_BA.astype(jnp.float32).sum(1) for x_BA in (nats_BA, counted_BA, correct_BA)]
    )
    sums["task_sums"] = jnp.where(of_task_NB[:, None], columns_3B, 0).sum(-1)
  return sums["loss_sum"] / jnp.maximum(sums["tokens"], 1), sums
