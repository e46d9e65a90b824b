"""The Q-Former of salmonn_v1.pth: names, sizes and bits."""

import dataclasses

import numpy as np
import pytest
import torch

from convert.core.engine import map_in, map_out, read_out
from convert.core.errors import Problems
from convert.core.folders import save_checkpoint
from convert.core.kind import Opened
from convert.core.shapes import connector_shapes
from convert.parts import qformer
from convert.readers import open_source
from mooer_jax import checkpoint
from mooer_jax.connectors.qformer import QFormerConfig
from tests.parity import torch_qformer

CONFIG = QFormerConfig(
  window=5, stride=3, edge="pad", queries=2, hidden_size=24, layers=3, heads=3, intermediate_size=40
)
INPUT, OUTPUT = 16, 10
SHAPES = connector_shapes(CONFIG, INPUT, OUTPUT)
BERT = "speech_Qformer.bert"


@pytest.fixture
def tensors():
  """A state dict as the original saves it."""
  made = torch_qformer.make(torch_qformer.QFormer, CONFIG, INPUT, OUTPUT).state_dict()
  return made | {f"{BERT}.embeddings.position_ids": torch.arange(512)[None]}


@pytest.fixture
def source(tensors, tmp_path):
  torch.save({"model": tensors, "epoch": 3}, tmp_path / "salmonn_v1.pth")

  def open_changed(**changes):
    torch.save({"model": {**tensors, **changes}, "epoch": 3}, tmp_path / "salmonn_v1.pth")
    return open_source(tmp_path / "salmonn_v1.pth")

  return open_changed


def test_the_table_covers_the_module_in_both_directions(tensors):
  names = {qformer.TABLE.to_torch(path)[0] for path in SHAPES}
  assert len(names) == len(SHAPES)
  assert {qformer.TABLE.to_jax(name)[0] for name in names} == SHAPES.keys()
  assert names == tensors.keys() - {f"{BERT}.embeddings.position_ids"}


def test_names_and_shapes_are_the_published_ones():
  published = {
    "speech_query_tokens": (1, 1, 768),
    f"{BERT}.embeddings.LayerNorm.weight": (768,),
    f"{BERT}.encoder.layer.1.attention.self.key.weight": (768, 768),
    f"{BERT}.encoder.layer.0.attention.output.LayerNorm.bias": (768,),
    f"{BERT}.encoder.layer.1.crossattention.self.value.weight": (768, 2048),
    f"{BERT}.encoder.layer.0.crossattention.self.query.weight": (768, 768),
    f"{BERT}.encoder.layer.1.crossattention.output.dense.bias": (768,),
    f"{BERT}.encoder.layer.0.intermediate_query.dense.weight": (3072, 768),
    f"{BERT}.encoder.layer.1.output_query.dense.weight": (768, 3072),
    f"{BERT}.encoder.layer.1.output_query.LayerNorm.weight": (768,),
    "speech_llama_proj.weight": (5120, 768),
    "speech_llama_proj.bias": (5120,),
  }
  shapes = connector_shapes(QFormerConfig(), 2048, 5120)
  # Two layers of 2 x 4 + 2 linear layers and 3 norms, the queries, a norm and the projection.
  assert len(shapes) == 2 * 2 * (2 * 4 + 2 + 3) + 1 + 2 + 2
  for name, shape in published.items():
    path, transform = qformer.TABLE.to_jax(name)
    assert transform.torch_shape(shapes[path]) == shape, name


def test_sizes_are_read_off_the_tensors(source):
  untold = dict(window=5, stride=3, edge="pad")
  assert qformer.qformer_config(source(), heads=3, **untold) == CONFIG
  told = qformer.qformer_config(source())  # the original's: 12 heads, windows of 17
  assert told == dataclasses.replace(CONFIG, window=17, stride=17, edge="drop", heads=12)


@pytest.mark.parametrize(
  "change, heads, message",
  [
    ({"speech_query_tokens": None}, 3, "speech_query_tokens is missing"),
    ({"speech_query_tokens": torch.zeros(2, 24)}, 3, r"has shape \[2, 24\]; it must have 3 axes"),
    (
      {f"{BERT}.encoder.layer.0.intermediate_query.dense.weight": None},
      3,
      "intermediate_query.dense.weight is missing",
    ),
    ({}, 7, "qformer.hidden_size=24 .* qformer.heads=7"),
  ],
)
def test_what_hides_the_sizes_is_named(tensors, tmp_path, change, heads, message):
  changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
  torch.save(changed, tmp_path / "a.pth")
  with pytest.raises(ValueError, match=message):
    qformer.qformer_config(open_source(tmp_path / "a.pth"), heads=heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_bit_for_bit(source, tensors, tmp_path, dtype):
  given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
  opened = source(**given)
  problems = Problems()
  mapped = map_in(opened, qformer.TABLE, SHAPES, problems=problems, ignored=qformer.IGNORED)
  problems.check("source")
  assert mapped.ignored == (f"{BERT}.embeddings.position_ids",)
  save_checkpoint(tmp_path / "ours", Opened(config={}, leaves=mapped.leaves), kind="test")
  about = checkpoint.describe(tmp_path / "ours")
  back = map_out(about, qformer.TABLE, SHAPES)
  assert {t.name for t in back} == given.keys() - set(mapped.ignored)
  for tensor, array in zip(back, read_out(about, back)):
    expected = given[tensor.name]
    assert array.shape == tuple(expected.shape)
    bits = expected.contiguous().view(torch.uint8).numpy()
    np.testing.assert_array_equal(np.ascontiguousarray(array).view(np.uint8), bits)


def test_queries_that_are_no_batch_of_one_are_refused(source):
  opened = source(speech_query_tokens=torch.zeros(3, 2, 24))
  problems = Problems()
  map_in(opened, qformer.TABLE, SHAPES, problems=problems, ignored=qformer.IGNORED)
  assert len(problems.found) == 1 and "[1, 2, 24]" in problems.found[0]
