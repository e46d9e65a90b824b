"""Counts floating-point operations: of a traced program, and of a model by hand."""

import math

from mooer_jax.config import SpeechLLMConfig


def traced(jaxpr) -> int:
  """FLOPs of all matrix products in a jaxpr, a loop's body as often as it runs.

  XLA's own cost analysis counts the body of a loop once, so it cannot be used for scanned layers.

  Raises:
    ValueError: if a matrix product stands in a loop whose length is not known.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      total += _dot(equation)
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


def _jaxprs(value):
  if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
    yield value
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from _jaxprs(item)


def matrix_sizes(config: SpeechLLMConfig) -> dict[str, int]:
  """Weights that take part in matrix products, by what runs over them."""
  llm, (encoder,), connector = config.decoder, config.encoders, config.connector
  q, kv = llm.heads * llm.head_width, llm.kv_heads * llm.head_width
  shapes = {
    "q": (llm.width, q),
    "k": (llm.width, kv),
    "v": (llm.width, kv),
    "o": (q, llm.width),
    "gate": (llm.width, llm.mlp_width),
    "up": (llm.width, llm.mlp_width),
    "down": (llm.mlp_width, llm.width),
  }
  layer = sum(a * b for a, b in shapes.values())
  lora = sum(llm.lora_rank * sum(shapes[name]) for name in llm.lora_targets)
  feed_forward = 2 * encoder.width * encoder.mlp_width
  return {
    "encoder": encoder.layers * (4 * encoder.width**2 + feed_forward)
    + 3 * (encoder.input_width - encoder.width) * encoder.width,
    "connector": connector.hidden_width * (connector.stack * encoder.width + llm.width),
    "llm": llm.layers * layer,
    "lora": llm.layers * lora,
    "head": llm.width * llm.vocab,
  }


def train_step(config: SpeechLLMConfig, *, rows: int, frames: int, prompt: int, answer: int) -> int:
  """FLOPs that an update needs: 2 N tokens forward, the same for input gradients, no recomputation.

  Frozen weights have no gradient and the encoder no backward pass at all; LoRA and the connector
  have both gradients (the connector's input none). Attention scores count in full, although
  causal. Trained are the connector and LoRA.

  Args:
    config: of the model.
    rows: of the batch.
    frames: encoder steps of a row, padding included.
    prompt: tokens of text around the speech.
    answer: tokens, eos included.
  """
  sizes, llm, (encoder,) = matrix_sizes(config), config.decoder, config.encoders
  speech = frames // config.connector.stack
  length = speech + prompt + answer - 1
  scores = 4 * length * length * llm.heads * llm.head_width * llm.layers
  encoder_scores = 4 * frames * frames * encoder.width * encoder.layers
  row = (
    2 * frames * sizes["encoder"]
    + encoder_scores
    + 2
    * speech
    * (
      3 * sizes["connector"]
      - config.connector.stack * encoder.width * config.connector.hidden_width
    )
    + 2 * length * (2 * sizes["llm"] + 3 * sizes["lora"])
    + 3 * scores
    + 2 * answer * 2 * sizes["head"]
  )
  return rows * row
