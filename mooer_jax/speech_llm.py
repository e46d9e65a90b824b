"""A speech LLM: four pure functions in a row.

    features ─ encode ─▶ frames ─ connect ─▶ speech tokens ─ splice ─▶ embeddings ─ decode ─▶ hidden

Every function takes the whole parameter tree and the config; there is no state.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax.audio.frontend import features_jax
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.linear import LinearConfig, LinearConnector
from mooer_jax.decoders.kv_cache import KVCache
from mooer_jax.decoders.llm import LLM, Placement
from mooer_jax.encoders.sanm import SANMConfig, SANMEncoder

Array = jax.Array | np.ndarray  # batches are made in NumPy
ENCODERS = {SANMConfig: SANMEncoder}
CONNECTORS = {LinearConfig: LinearConnector}


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
  """

  features: tuple[Array, ...]
  frames: tuple[Array, ...]
  before_BS: Array
  after_BS: Array
  answer_BS: Array


def encoder_modules(config: SpeechLLMConfig):
  """{name: encoder module}, in the order of config.encoders."""
  return {c.kind: ENCODERS[type(c)](c, config.compute) for c in config.encoders}


def connector_module(config: SpeechLLMConfig):
  return CONNECTORS[type(config.connector)](config.connector, config.decoder.width, config.compute)


def decoder_module(config: SpeechLLMConfig) -> LLM:
  return LLM(config.decoder, config.compute)


def init(key: jax.Array, config: SpeechLLMConfig) -> dict:
  """Fresh parameters, float32; layers stacked where config.compute.scan, else one by one.

  CMVN starts as the identity; `audio.cmvn` reads or estimates the real one.
  """
  key_encoder, key_connector, key_decoder = jax.random.split(key, 3)
  frames_BTD = jnp.zeros((1, 2, 0))
  encoders, frontends = {}, {}
  for name, module in encoder_modules(config).items():
    width = module.config.input_width
    x_BTF, valid_BT = jnp.zeros((1, 8, width)), jnp.ones((1, 8), bool)
    (frames_BTD, _), variables = module.init_with_output(key_encoder, x_BTF, valid_BT)
    encoders[name] = variables["params"]
    frontends[name] = {"shift": jnp.zeros(width), "scale": jnp.ones(width)}
  (speech_BSD, speech_valid_BS), variables = connector_module(config).init_with_output(
    key_connector, frames_BTD, valid_BT
  )
  decoder = decoder_module(config).init(
    key_decoder, speech_BSD, speech_valid_BS, method=LLM.everything
  )
  return {
    "frontend": frontends,
    "encoders": encoders,
    "connector": variables["params"],
    "decoder": decoder["params"],
  }


def encode(params: dict, batch: Batch, config: SpeechLLMConfig, rngs: dict | None = None):
  """Normalises features and runs the encoder: ([B, T, D], valid [B, T])."""
  (name, module), *_ = encoder_modules(config).items()
  features, frames_B = jnp.asarray(batch.features[0]), jnp.asarray(batch.frames[0])
  if features.ndim == 2:
    features, frames_B = features_jax(features, frames_B, config.frontends[0])
  cmvn = params["frontend"][name]
  normed_BTF = (features + cmvn["shift"]) * cmvn["scale"]
  valid_BT = jnp.arange(features.shape[1])[None] < frames_B[:, None]
  normed_BTF = jnp.where(valid_BT[..., None], normed_BTF, 0)
  return module.apply({"params": params["encoders"][name]}, normed_BTF, valid_BT, rngs=rngs)


def connect(params: dict, frames_BTD: jax.Array, valid_BT: jax.Array, config: SpeechLLMConfig):
  """Encoder frames to speech tokens: ([B, S, D of the LLM], valid [B, S])."""
  module = connector_module(config)
  return module.apply({"params": params["connector"]}, frames_BTD, valid_BT)


def splice(params, batch: Batch, speech_BSD, speech_valid_BS, config: SpeechLLMConfig):
  """Puts the speech tokens where the template says: ([B, S, D], valid [B, S]).

  Raises:
    ValueError: if no token follows the speech; the answer is read off the prompt's last slot, and
      padded speech ends in an empty one.
  """
  if batch.after_BS.shape[1] == 0:
    raise ValueError(
      f"the prompt needs at least one token after the speech; the template {config.template!r}"
      " was filled with an empty prompt"
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
  speech_BSD, speech_valid_BS = connect(params, frames_BTD, valid_BT, config)
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
    (mean loss, sums to aggregate over batches: "loss_sum" in nats, "tokens", "correct").
  """
  logits_BAV = answer_logits(
    params, batch, config, lora_scale=lora_scale, dropout_key=dropout_key, rows=rows
  )
  target_BA = batch.answer_BS
  counted_BA = target_BA >= 0
  picked_BA = jnp.take_along_axis(logits_BAV, jnp.maximum(target_BA, 0)[..., None], axis=-1)[..., 0]
  nats_BA = jax.nn.logsumexp(logits_BAV, axis=-1) - picked_BA
  correct_BA = (logits_BAV.argmax(-1) == target_BA) & counted_BA
  sums = {
    "loss_sum": jnp.where(counted_BA, nats_BA, 0).sum(),
    "tokens": counted_BA.sum(),
    "correct": correct_BA.sum(),
  }
  return sums["loss_sum"] / jnp.maximum(sums["tokens"], 1), sums
