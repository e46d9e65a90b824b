"""Counts floating-point operations: of a traced program, and of a model by hand."""

import math
from collections.abc import Callable
from typing import Any

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.beats import BEATsConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.speech_llm import Batch


def traced(jaxpr) -> int:
  """FLOPs of all matrix products and convolutions in a jaxpr, a loop's body as often as it runs.

  XLA's own cost analysis counts the body of a loop once, so it cannot be used for scanned layers.

  Raises:
    ValueError: if a matrix product stands in a loop whose length is not known.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS:
      total += _PRODUCTS[name](equation)
      continue
    inner = [traced(sub) for value in params.values() for sub in _jaxprs(value)]
    if name == "while" and sum(inner):
      raise ValueError("a while loop holds a matrix product; its FLOPs depend on the data")
    repeats = params["length"] if name == "scan" else 1
    total += repeats * (max(inner, default=0) if name == "cond" else sum(inner))
  return total


def _dot(equation) -> int:
  ((contracted, _), _) = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  depth = math.prod(left[axis] for axis in contracted)
  return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation) -> int:
  """What meets the zeros of the padding counts too."""
  kernel, outputs = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}


def _jaxprs(value):
  if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
    yield value
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from _jaxprs(item)


def _transformer(c: SANMConfig | WhisperConfig | BEATsConfig, tokens: int) -> int:
  """The layers of an encoder over one row: four projections, feed-forward, scores."""
  weights = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
  return c.layers * (2 * tokens * weights + 4 * tokens**2 * c.hidden_size)


def _sanm(c: SANMConfig, frames: int) -> int:
  widening = 3 * (c.input_width - c.hidden_size) * c.hidden_size  # q, k, v of the first layer
  return _transformer(c, frames) + 2 * frames * widening


def _whisper(c: WhisperConfig, frames: int) -> int:
  """Whatever the features' length, the whole context is computed."""
  del frames
  taps = 3
  convolutions = (
    2 * taps * (c.max_frames * c.input_width * c.hidden_size + c.context * c.hidden_size**2)
  )
  return _transformer(c, c.context) + convolutions


def _beats(c: BEATsConfig, frames: int) -> int:
  tokens = c.num_outputs(frames)
  patches = (
    c.patch**2 * c.patch_width + (c.patch_width != c.hidden_size) * c.patch_width * c.hidden_size
  )
  positions = c.conv_pos * c.hidden_size**2 // c.conv_pos_groups
  gates = c.layers * c.hidden_size * 8
  return _transformer(c, tokens) + 2 * tokens * (patches + positions + gates)


def _linear(c: LinearConfig, frames: int, width: int, output_width: int) -> tuple[int, int]:
  reading = 2 * c.num_tokens(frames) * c.stack * width * c.hidden_size
  return reading, reading + 2 * c.num_tokens(frames) * c.hidden_size * output_width


def _qformer(c: QFormerConfig, frames: int, width: int, output_width: int) -> tuple[int, int]:
  tokens = c.num_tokens(frames)
  reading = c.layers * 2 * (tokens // c.queries * c.window) * 2 * width * c.hidden_size
  # Among the queries q, k, v, out; to the window q, out; feed-forward.
  weights = 6 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
  scores = 4 * tokens * (c.queries + c.window) * c.hidden_size
  layers = c.layers * (2 * tokens * weights + scores)
  return reading, reading + layers + 2 * tokens * c.hidden_size * output_width


_ENCODERS: dict[type, Callable[[Any, int], int]] = {
  SANMConfig: _sanm,
  WhisperConfig: _whisper,
  BEATsConfig: _beats,
}
_CONNECTORS: dict[type, Callable[[Any, int, int, int], tuple[int, int]]] = {
  LinearConfig: _linear,
  QFormerConfig: _qformer,
}


def _decoder(c: LLMConfig, length: int, answer: int) -> int:
  """Forward, and backward to inputs and LoRA, of one row."""
  q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
  shapes = {
    "q": (c.hidden_size, q),
    "k": (c.hidden_size, kv),
    "v": (c.hidden_size, kv),
    "o": (q, c.hidden_size),
    "gate": (c.hidden_size, c.intermediate_size),
    "up": (c.hidden_size, c.intermediate_size),
    "down": (c.intermediate_size, c.hidden_size),
  }
  weights = sum(a * b for a, b in shapes.values())
  lora = sum(c.lora_rank * sum(shapes[name]) for name in c.lora_targets)
  scores = 4 * length**2 * q
  layers = c.layers * (2 * length * (2 * weights + 3 * lora) + 3 * scores)
  return layers + 2 * answer * 2 * c.hidden_size * c.vocab_size


def train_step(config: SpeechLLMConfig, batch: Batch) -> int:
  """FLOPs that an update needs: 2 N tokens forward, the same for input gradients, no recomputation.

  Trained are the connector, LoRA and the norms behind the encoders, where there are any. Frozen
  weights have no gradient and the encoders no backward pass at all; the connector's input has a
  gradient only if it comes out of norms. Attention scores count in full, although causal.

  Args:
    config: of the model.
    batch: arrays or their shapes; padding counts in full.
  """
  lengths = [x.shape[1] for x in batch.features]
  hearing = 0
  if not batch.encoded:
    pairs = list(zip(config.encoders, lengths, strict=True))
    hearing = sum(_ENCODERS[type(encoder)](encoder, frames) for encoder, frames in pairs)
    lengths = [encoder.num_outputs(frames) for encoder, frames in pairs]
  frames, width = max(lengths), sum(encoder.hidden_size for encoder in config.encoders)
  connector = config.connector
  reading, connecting = _CONNECTORS[type(connector)](
    connector, frames, width, config.decoder.hidden_size
  )
  connecting = 3 * connecting - (0 if config.encoder_norm else reading)
  rows, answer = batch.answer_BS.shape
  prompt = batch.before_BS.shape[1] + connector.num_tokens(frames) + batch.after_BS.shape[1]
  return rows * (hearing + connecting + _decoder(config.decoder, prompt + answer - 1, answer))
