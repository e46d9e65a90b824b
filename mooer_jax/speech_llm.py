"""A speech LLM as four pure functions.

    features ─ encode ─▶ frames ─ connect ─▶ speech tokens ─ splice ─▶ embeddings ─ decode ─▶ hidden

Every function takes the whole parameter tree and the config; there is no state. With
config.speech_output, a fifth function, `speak`, makes speech of hidden states.
"""

import bisect
import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec as P

from mooer_jax import tree
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.llm import LLM, KVCache, Placement
from mooer_jax.nn.layers import TENSOR, LayerNorm
from mooer_jax.vocoders import SpeechTarget

Array = jax.Array | np.ndarray  # batches are made in NumPy
_LOGITS = 32  # answer positions whose logits are in memory at a time, in training
_INIT_FRAMES = 16  # minimum number of feature frames in `init`; few are quick to trace


@flax.struct.dataclass
class Batch:
  """A batch of utterances with prompts and, for training, answers.

  Attributes:
    features: one array per encoder: float32 [B, T, F] features before CMVN; or one array for all
      encoders: float32 [B, N] waveforms in [-1, 1], whose features the compiled program computes.
    frames: one array for each of `features`: int32 [B], valid frames (or samples).
    prefix_BS: int32, prompt tokens before the speech; padded on the left with negative values.
    suffix_BS: int32, prompt tokens after the speech, padded in the same way.
    labels_BS: int32, answer and eos; padded on the right with negative values. A padding row has
      0 frames and no answer. In training, a row with 0 frames and an answer has no audio.
    task_B: int32, index of each row's task in config.prompts, -1 for a padding row; None if the
      loss per task is not needed.
    target: recordings of the answers, to train a vocoder; None otherwise.
    encoded: `features` are encoder frames [B, T, D], from a cache.
  """

  features: tuple[Array, ...]
  frames: tuple[Array, ...]
  prefix_BS: Array
  suffix_BS: Array
  labels_BS: Array
  task_B: Array | None = None
  target: SpeechTarget | None = None
  encoded: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def has_waveforms(self) -> bool:
    """Whether `features` is one array of waveforms."""
    return self.features[0].ndim == 2


def pad_rows(batch: Batch, multiple: int) -> Batch:
  """Append padding rows, up to a number of rows that is divisible by `multiple`."""
  rows = batch.frames[0].shape[0]
  if not (more := -rows % multiple):
    return batch

  def pad(x, value):
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1), constant_values=value)

  return dataclasses.replace(
    batch,
    features=tuple(pad(x, 0) for x in batch.features),
    frames=tuple(pad(frames_B, 0) for frames_B in batch.frames),
    prefix_BS=pad(batch.prefix_BS, -1),
    suffix_BS=pad(batch.suffix_BS, -1),
    labels_BS=pad(batch.labels_BS, -1),
    task_B=None if batch.task_B is None else pad(batch.task_B, -1),
  )


def num_speech_tokens(samples: int, config: SpeechLLMConfig) -> int:
  """Number of speech tokens for a clip of this many samples; 0 if it is too short."""
  frames = [
    encoder.num_outputs(steps)
    for encoder, frontend in zip(config.encoders, config.frontends, strict=True)
    if (steps := frontend.num_frames(samples))
  ]
  return config.connector.num_tokens(max(frames)) if len(frames) == len(config.encoders) else 0


def prompt_slots(batch: Batch, config: SpeechLLMConfig) -> int:
  """Slots of the prompts of a batch, or of its shapes: text and speech with their padding."""
  frames = [
    encoder.num_outputs(frontend.num_frames(x.shape[1]) if batch.has_waveforms else x.shape[1])
    for encoder, frontend, x in zip(
      config.encoders,
      config.frontends,
      batch.features * (len(config.encoders) if batch.has_waveforms else 1),
      strict=True,
    )
  ]
  text = batch.prefix_BS.shape[1] + batch.suffix_BS.shape[1]
  return text + config.connector.num_tokens(max(frames))


def shortest_s(config: SpeechLLMConfig) -> float:
  """Length of the shortest clip that gives a speech token, seconds."""
  rate_hz = config.sample_rate_hz
  samples = range(int(config.max_audio_s * rate_hz) + 1)
  return bisect.bisect_left(samples, 1, key=lambda n: num_speech_tokens(n, config)) / rate_hz


@functools.partial(jax.jit, static_argnums=1)  # traced once; what init computes besides is left out
def init(key: jax.Array, config: SpeechLLMConfig) -> dict:
  """Initial float32 parameters, CMVN as the identity; layers are stacked if config.compute.scan."""
  key_encoders, key_connector, key_decoder = jax.random.split(key, 3)
  params: dict = {"frontend": {}, "encoders": {}}
  frames = _INIT_FRAMES
  while not config.connector.num_tokens(
    max(encoder.num_outputs(frames) for encoder in config.encoders)
  ):
    frames += 1  # ends, because the config checks that the longest clip gives a token
  streams = {}
  for number, encoder in enumerate(config.encoders):
    # The first encoder keeps the key that it had in version 0.1.
    key = jax.random.fold_in(key_encoders, number) if number else key_encoders
    name, width = encoder.kind, encoder.input_width
    x_BTF, valid_BT = jnp.zeros((1, frames, width)), jnp.ones((1, frames), bool)
    module = encoder.module(config.compute)
    streams[name], variables = module.init_with_output(key, x_BTF, valid_BT)
    params["encoders"][name] = variables["params"]
    if config.frontends[number].normalised:
      params["frontend"][name] = {"shift": jnp.zeros(width), "scale": jnp.ones(width)}
  if config.encoder_norm:
    params["encoder_norms"] = {
      name: {"scale": jnp.ones(x_BTD.shape[-1]), "bias": jnp.zeros(x_BTD.shape[-1])}
      for name, (x_BTD, _) in streams.items()
    }
  connector = config.connector.module(config.decoder.hidden_size, config.compute)
  (speech_BSD, speech_valid_BS), variables = connector.init_with_output(
    key_connector, *join(params, streams, config)
  )
  params["connector"] = variables["params"]
  decoder = config.decoder.module(config.compute).init(
    key_decoder, speech_BSD, speech_valid_BS, method=LLM.init_all_params
  )
  params["decoder"] = decoder["params"]
  if config.speech_output is not None:
    key_vocoder, key_speaker = jax.random.split(jax.random.fold_in(key_decoder, 1))
    vocoder, speaker = config.speech_output.vocoder, config.speech_output.speaker
    mel_BTF = jnp.zeros((1, _INIT_FRAMES, speaker.bins))
    vector_BE, variables = speaker.module().init_with_output(key_speaker, mel_BTF)
    params["speaker"] = variables["params"]
    states_BSD, frames_B = jnp.zeros((1, 1, vocoder.input_width)), jnp.ones(1, jnp.int32)
    params["vocoder"] = vocoder.module().init(key_vocoder, states_BSD, frames_B, vector_BE)[
      "params"
    ]
  return params


def param_shapes(config: SpeechLLMConfig) -> dict:
  """`ShapeDtypeStruct`s of the parameters, layer by layer; nothing is computed."""
  config = config.with_compute(scan=True)  # traces one layer for all
  key = jax.random.key(0)
  return tree.unstack_layers(jax.eval_shape(lambda: init(key, config)))


def encode(params: dict, batch: Batch, config: SpeechLLMConfig, *, rngs: dict | None = None):
  """Normalize features, run the encoders and join their frames: ([B, T, D], valid [B, T])."""
  return join(params, encode_each(params, batch, config, rngs=rngs), config)


@jax.named_scope("encode")
def encode_each(params: dict, batch: Batch, config: SpeechLLMConfig, *, rngs: dict | None = None):
  """Frames of each encoder: {kind: ([B, T, D], valid [B, T])}."""
  streams: dict[str, Any] = {}
  for number, (encoder, frontend) in enumerate(zip(config.encoders, config.frontends, strict=True)):
    name = encoder.kind
    if batch.has_waveforms:
      (waveform_BN,), (samples_B,) = batch.features, batch.frames
      with jax.named_scope("features"):
        features, frames_B = frontend.features_jax(*map(jnp.asarray, (waveform_BN, samples_B)))
    else:
      features, frames_B = jnp.asarray(batch.features[number]), jnp.asarray(batch.frames[number])
    valid_BT = jnp.arange(features.shape[1])[None] < frames_B[:, None]
    if batch.encoded:
      streams[name] = features.astype(config.compute.jnp_dtype), valid_BT
      continue
    if frontend.normalised:
      cmvn = params["frontend"][name]
      features = (features + cmvn["shift"]) * cmvn["scale"]
    features = jnp.where(valid_BT[..., None], features, 0)
    of_encoder = params["encoders"][name]
    # Params for decoding contain stacked layers here, and those of the LLM one by one.
    compute = dataclasses.replace(config.compute, scan=tree.STACK in of_encoder)
    module = encoder.module(compute)
    streams[name] = module.apply({"params": of_encoder}, features, valid_BT, rngs=rngs)
  return streams


def join(params: dict, streams: Mapping[str, Any], config: SpeechLLMConfig):
  """Concatenate the frames of all encoders: ([B, T, sum of D], valid [B, T]).

  Each stream, as from `encode_each`, is normalized if config.encoder_norm. Shorter streams are
  padded with zeros, and a frame is valid if it is valid in any stream.
  """
  if config.encoder_norm:
    norms = params["encoder_norms"]
    streams = {
      name: (LayerNorm(1e-5, dtype=x_BTD.dtype).apply({"params": norms[name]}, x_BTD), valid_BT)
      for name, (x_BTD, valid_BT) in streams.items()
    }
  if len(streams) == 1:
    return next(iter(streams.values()))
  longest = max(valid_BT.shape[1] for _, valid_BT in streams.values())
  frames, valid = [], []
  for x_BTD, valid_BT in streams.values():
    padding = (0, 0), (0, longest - valid_BT.shape[1])
    frames.append(jnp.pad(jnp.where(valid_BT[..., None], x_BTD, 0), (*padding, (0, 0))))
    valid.append(jnp.pad(valid_BT, padding))
  return jnp.concatenate(frames, axis=-1), functools.reduce(jnp.logical_or, valid)


@jax.named_scope("connect")
def connect(
  params: dict,
  frames_BTD: jax.Array,
  valid_BT: jax.Array,
  config: SpeechLLMConfig,
  *,
  rngs: dict | None = None,
):
  """Map encoder frames to speech tokens: ([B, S, D of the LLM], valid [B, S])."""
  module = config.connector.module(config.decoder.hidden_size, config.compute)
  return module.apply({"params": params["connector"]}, frames_BTD, valid_BT, rngs=rngs)


@jax.named_scope("splice")
def splice(params, batch: Batch, speech_BSD, speech_valid_BS, config: SpeechLLMConfig):
  """Insert the speech tokens into the embedded prompt: ([B, S, D], valid [B, S]).

  Raises ValueError if no token follows the speech: the prompt's last position predicts the answer,
  and padded speech ends in an invalid one.
  """
  if batch.suffix_BS.shape[1] == 0:
    raise ValueError(
      "the prompt ends with the speech; at least one token must follow it, which predicts the"
      f" answer (model.chat_template={config.chat_template!r})"
    )
  before_BSD, after_BSD = (embed(params, t, config) for t in (batch.prefix_BS, batch.suffix_BS))
  inputs_BSD = jnp.concatenate([before_BSD, speech_BSD, after_BSD], axis=1)
  valid_BS = jnp.concatenate([batch.prefix_BS >= 0, speech_valid_BS, batch.suffix_BS >= 0], axis=1)
  return inputs_BSD, valid_BS


def embed(params: dict, tokens_BS: Array, config: SpeechLLMConfig) -> jax.Array:
  """Token embeddings [B, S, D]."""
  variables = {"params": params["decoder"]}
  return config.decoder.module(config.compute).apply(variables, tokens_BS, method=LLM.embed_tokens)  # type: ignore[return-value]


@jax.named_scope("decode")
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
  """Map embeddings to hidden states: ([B, S, D], cache); see `LLM.__call__`."""
  options: Any = dict(lora_scale=lora_scale, placement=placement, rngs=rngs)
  variables = {"params": params["decoder"]}
  return config.decoder.module(config.compute).apply(
    variables, inputs_BSD, valid_BS, cache, **options
  )


@jax.named_scope("logits")
def logits(params: dict, hidden_BSD: jax.Array, config: SpeechLLMConfig) -> jax.Array:
  """Float32 [B, S, V]."""
  variables = {"params": params["decoder"]}
  return config.decoder.module(config.compute).apply(variables, hidden_BSD, method=LLM.logits)  # type: ignore[return-value]


@jax.named_scope("speak")
def speak(
  params: dict,
  states_BSD: jax.Array,
  frames_B: jax.Array,
  speaker_BE: jax.Array,
  config: SpeechLLMConfig,
) -> jax.Array:
  """Map hidden states to waveforms in [-1, 1], float32 [B, S * samples per state].

  The vocoder runs in float32.

  Args:
    states_BSD: hidden states of the audio tokens, from `decode`.
    frames_B: int32, valid states of each row, at its beginning.
    speaker_BE: vectors of the voices, from `speaker_vector`.
  """
  assert config.speech_output is not None
  module = config.speech_output.vocoder.module()
  return module.apply({"params": params["vocoder"]}, states_BSD, frames_B, speaker_BE)  # type: ignore[return-value]


def speaker_vector(params: dict, mel_BTF: Array, config: SpeechLLMConfig) -> jax.Array:
  """Map voices (`audio.speaker_mel`, without padding) to vectors of length 1, float32 [B, E]."""
  assert config.speech_output is not None
  module = config.speech_output.speaker.module()
  return module.apply({"params": params["speaker"]}, mel_BTF)  # type: ignore[return-value]


def prompt(params: dict, batch: Batch, config: SpeechLLMConfig, *, rngs: dict | None = None):
  """Embeddings of the prompt, speech included: ([B, S, D], valid [B, S])."""
  frames_BTD, valid_BT = encode(params, batch, config, rngs=rngs)
  speech_BSD, speech_valid_BS = connect(params, frames_BTD, valid_BT, config, rngs=rngs)
  return splice(params, batch, speech_BSD, speech_valid_BS, config)


def answer_logits(params: dict, batch: Batch, config: SpeechLLMConfig, **options) -> jax.Array:
  """Teacher-forced logits of the answer tokens alone, float32 [B, A, V]; see `answer_hidden`."""
  return logits(params, answer_hidden(params, batch, config, **options), config)


def answer_hidden(
  params: dict,
  batch: Batch,
  config: SpeechLLMConfig,
  *,
  lora_scale: jax.Array | float | None = None,
  dropout_key: jax.Array | None = None,
  rows: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
  """Hidden states that predict the answer tokens, [B, A, D].

  `rows` is the sharding of rows on a mesh. Without it, XLA may propagate the sharding of the
  embedding table, so that every chip holds all rows; and attention kernels do not know the mesh.
  """
  mesh: contextlib.AbstractContextManager = contextlib.nullcontext()
  if rows is not None:
    mesh = jax.sharding.use_abstract_mesh(rows.mesh.abstract_mesh)
  rngs = None if dropout_key is None else {"dropout": dropout_key}
  with mesh:
    inputs_BSD, valid_BS = prompt(params, batch, config, rngs=rngs)
    first = inputs_BSD.shape[1] - 1  # the last slot of the prompt predicts the first answer token
    given_BA = batch.labels_BS[:, :-1]
    answer_BAD = embed(params, given_BA, config)
    inputs_BSD = jnp.concatenate([inputs_BSD, answer_BAD.astype(inputs_BSD.dtype)], axis=1)
    valid_BS = jnp.concatenate([valid_BS, given_BA >= 0], axis=1)
    if rows is not None:
      inputs_BSD = jax.lax.with_sharding_constraint(inputs_BSD, rows)
    hidden_BSD, _ = decode(params, inputs_BSD, valid_BS, config, lora_scale=lora_scale, rngs=rngs)
    return hidden_BSD[:, first:]


def loss(
  params: dict, batch: Batch, config: SpeechLLMConfig, **options
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of answer and eos, averaged over the answer tokens of the batch.

  Options are those of `answer_hidden`.

  Returns:
    (mean loss, sums over the batch: "loss_sum" in nats, "tokens", "correct"; with batch.task_B also
      "task_sums" [tasks, 3], the same three for each of config.prompts).
  """
  hidden_BAD = answer_hidden(params, batch, config, **options)
  target_BA = batch.labels_BS
  counted_BA = target_BA >= 0
  nats_BA, is_best_BA = token_losses(
    params, hidden_BAD, target_BA, config, rows=options.get("rows")
  )
  correct_BA = is_best_BA & counted_BA
  nats_BA = jnp.where(counted_BA, nats_BA, 0)
  sums = {"loss_sum": nats_BA.sum(), "tokens": counted_BA.sum(), "correct": correct_BA.sum()}
  if batch.task_B is not None:
    of_task_NB = batch.task_B == jnp.arange(len(config.prompts))[:, None]
    columns_3B = jnp.stack(
      [x_BA.astype(jnp.float32).sum(1) for x_BA in (nats_BA, counted_BA, correct_BA)]
    )
    sums["task_sums"] = jnp.where(of_task_NB[:, None], columns_3B, 0).sum(-1)
  return sums["loss_sum"] / jnp.maximum(sums["tokens"], 1), sums


def token_losses(
  params: dict, hidden_BAD, target_BA, config, *, rows: jax.sharding.NamedSharding | None = None
):
  """(-log p in nats, whether it is the most probable token) of each target, both [B, A].

  With rematerialization, the logits of a few positions at a time are in memory, in the backward
  pass too: of a long answer over a vocabulary of 152k, they would be most of a train step's memory.
  `rows` is the sharding of rows on a mesh, which then gathers the output matrix once for all of
  them.
  """

  def of_block(block):
    hidden_BAD, target_BA = block
    logits_BAV = logits(params, hidden_BAD, config)
    picked_BA1 = jnp.take_along_axis(logits_BAV, jnp.maximum(target_BA, 0)[..., None], axis=-1)
    nats_BA = jax.nn.logsumexp(logits_BAV, axis=-1) - picked_BA1[..., 0]
    return nats_BA, logits_BAV.argmax(-1) == target_BA

  length = target_BA.shape[1]
  if length <= _LOGITS or config.compute.remat == "none":
    return of_block((hidden_BAD, target_BA))
  padded = [
    jnp.pad(x, [(0, 0), (0, -length % _LOGITS)] + [(0, 0)] * (x.ndim - 2))
    for x in (hidden_BAD, target_BA)
  ]
  blocks = tuple(rearrange(x, "B (n A) ... -> n B A ...", A=_LOGITS) for x in padded)
  if rows is not None:
    params = _gather_head(params, rows)
  found = jax.lax.map(jax.checkpoint(of_block), blocks)
  return tuple(rearrange(x, "n B A -> B (n A)")[:, :length] for x in found)


def _gather_head(params: dict, rows: jax.sharding.NamedSharding) -> dict:
  """Params whose output matrix is split over its tokens (`tensor`) only, inside `jit`.

  XLA would gather it for each block of positions: 1.1 GB for Qwen2-7B.
  """
  leaves = tree.flatten(params)
  # The embedding table is the output matrix of an LLM without a head.
  path = "decoder/head/kernel"
  path, spec = (path, P(None, TENSOR)) if path in leaves else ("decoder/embed/embedding", P(TENSOR))
  with jax.named_scope("gather_head"):
    leaves[path] = jax.lax.with_sharding_constraint(
      leaves[path], jax.sharding.NamedSharding(rows.mesh, spec)
    )
  return tree.unflatten(leaves)
