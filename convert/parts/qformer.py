"""SALMONN's window-level Q-Former and its projection, from salmonn_v1.pth."""

from collections.abc import Iterator
from typing import Any

from mooer_jax.connectors.qformer import QFormerConfig

from ..core.rules import Rule, Table, Transform, linear, norm
from ..core.shapes import count_layers, shape_of
from ..readers import Source

# The original stores its queries as a batch of one.
UNBATCHED = Transform(lambda x_1QD: x_1QD[0], lambda x_QD: x_QD[None])
QUERIES = "speech_query_tokens"
_BERT = "speech_Qformer.bert"
_LAYER = f"{_BERT}.encoder.layer"
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


def _rules() -> Iterator[Rule]:
  yield Rule(QUERIES, "connector/queries", UNBATCHED)
  yield from linear("speech_llama_proj", "connector/project")
  yield from norm(f"{_BERT}.embeddings.LayerNorm", "connector/qformer/norm")
  for make, names in ((linear, _DENSE), (norm, _NORMS)):
    for theirs, path in names:
      yield from make(f"{_LAYER}.{{n}}.{theirs}", f"connector/qformer/layers_{{n}}/{path}")


TABLE = Table(tuple(_rules()))


def qformer_config(source: Source, **others: Any) -> QFormerConfig:
  """Derives the sizes from tensors; `others` are other fields. Raises ValueError if that fails."""
  _, queries, width = shape_of(source, QUERIES, 3)
  return QFormerConfig(
    queries=queries,
    hidden_size=width,
    layers=count_layers(source, TABLE),
    intermediate_size=shape_of(source, f"{_LAYER}.0.intermediate_query.dense.weight", 2)[0],
    **others,
  )
