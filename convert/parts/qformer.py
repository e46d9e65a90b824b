"""SALMONN's window-level Q-Former and its projection, from salmonn_v1.pth."""

from typing import Any

import jax.numpy as jnp

from mooer_jax.connectors.qformer import QFormerConfig, WindowedQFormer
from mooer_jax.nn.compute import ExecutionConfig

from ..core.engine import leaf_shapes, under
from ..core.errors import Problems
from ..core.rules import IDENTITY, TRANSPOSE, Rule, Table, Transform
from ..readers import Source

# The original stores its queries as a batch of one.
UNBATCHED = Transform(lambda x_1QD: x_1QD[0], lambda x_QD: x_QD[None])
QUERIES = "speech_query_tokens"
_BERT = "speech_Qformer.bert"
_LAYERS = f"{_BERT}.encoder.layer."
# A buffer of the embedding that the original removes.
IGNORED = (r"speech_Qformer\.bert\.embeddings\.position_ids",)
_DENSE = (
  ("attention.self.query", "attention/q"),
  ("attention.self.key", "attention/k"),
  ("attention.self.value", "attention/v"),
  ("attention.output.dense", "attention/out"),
  ("crossattention.self.query", "cross_attention/q"),
  ("crossattention.self.key", "cross_attention/k"),
  ("crossattention.self.value", "cross_attention/v"),
  ("crossattention.output.dense", "cross_attention/out"),
  ("intermediate_query.dense", "feed_forward/up"),
  ("output_query.dense", "feed_forward/down"),
)
_NORMS = (
  ("attention.output.LayerNorm", "attention_norm"),
  ("crossattention.output.LayerNorm", "cross_attention_norm"),
  ("output_query.LayerNorm", "feed_forward_norm"),
)


def _rules():
  layer, ours = _LAYERS + "{n}", "connector/qformer/layers_{n}"
  dense = [(f"{layer}.{theirs}", f"{ours}/{path}") for theirs, path in _DENSE]
  norms = [(f"{layer}.{theirs}", f"{ours}/{path}") for theirs, path in _NORMS]
  yield Rule(QUERIES, "connector/queries", UNBATCHED)
  for theirs, path in (*dense, ("speech_llama_proj", "connector/project")):
    yield Rule(f"{theirs}.weight", f"{path}/kernel", TRANSPOSE)
    yield Rule(f"{theirs}.bias", f"{path}/bias", IDENTITY)
  for theirs, path in (*norms, (f"{_BERT}.embeddings.LayerNorm", "connector/qformer/norm")):
    yield Rule(f"{theirs}.weight", f"{path}/scale", IDENTITY)
    yield Rule(f"{theirs}.bias", f"{path}/bias", IDENTITY)


TABLE = Table(tuple(_rules()))


def shapes(config: QFormerConfig, input_width: int, output_width: int) -> dict[str, tuple]:
  """connector/… -> shape, between frames and an LLM of these widths."""
  module = WindowedQFormer(config, output_width, ExecutionConfig(scan=True))
  inputs = jnp.zeros((1, config.window, input_width)), jnp.ones((1, config.window), bool)
  return under("connector", leaf_shapes(module, *inputs))


def qformer_config(
  source: Source, problems: Problems, *, heads: int = QFormerConfig.heads, **others: Any
) -> QFormerConfig | None:
  """Derives the sizes from the shapes of the tensors.

  Args:
    source: with the Q-Former's tensors.
    problems: receives the reason for None.
    heads: attention heads.
    others: other fields that the shapes do not show: window, stride, edge, dropout.

  Returns:
    None if a tensor is missing or the sizes are impossible.
  """
  tensors = source.tensors
  up = f"{_LAYERS}0.intermediate_query.dense.weight"
  for name, ndim in ((QUERIES, 3), (up, 2)):
    if name not in tensors:
      problems.add(f"{source.path}: {name} is missing: no Q-Former")
      return None
    if len(tensors[name].shape) != ndim:
      problems.add(f"{name} has shape {list(tensors[name].shape)}; it must have {ndim} axes")
      return None
  numbers = {n.removeprefix(_LAYERS).split(".")[0] for n in tensors if n.startswith(_LAYERS)}
  _, queries, width = tensors[QUERIES].shape
  try:
    return QFormerConfig(
      heads=heads,
      queries=queries,
      hidden_size=width,
      layers=1 + max(int(n) for n in numbers if n.isdigit()),
      intermediate_size=tensors[up].shape[0],
      **others,
    )
  except ValueError as error:
    problems.add(str(error))
    return None
