"""Whatever part of a model, in whatever files, of whatever dtypes: it comes back bit for bit."""

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from convert.core.engine import Outgoing, map_in, map_out, read_out
from convert.core.errors import ConversionError, Problems
from convert.core.folders import save_checkpoint
from convert.core.kind import Opened
from convert.core.rules import (
  CONVOLUTION,
  DEPTHWISE,
  IDENTITY,
  TRANSPOSE,
  Rule,
  Table,
  row_blocks,
  transposed,
)
from convert.core.shapes import encoder_shapes
from convert.core.writers import write_shards
from convert.parts import language_model, lora, paraformer, whisper
from convert.readers import Tensor, open_source
from mooer_jax import checkpoint
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.whisper import WhisperConfig
from tests.tiny import LLM_CONFIG, SANM

DTYPES = [np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32)]
LLM = LLMConfig(
  **{**vars(LLM_CONFIG), "layers": 12, "vocab_size": 9, "hidden_size": 8, "intermediate_size": 6}
)
WHISPER = WhisperConfig(
  input_width=5, hidden_size=8, layers=12, heads=2, intermediate_size=6, positions=9, context=9
)
TABLES = {
  "llm": (language_model.TABLE, language_model.shapes(LLM)),
  "lora": (lora.table("default"), lora.shapes(LLM)),
  "encoder": (paraformer.table("encoder."), encoder_shapes(SANM)),
  "whisper": (whisper.table(), encoder_shapes(WHISPER)),
}
TABLES["llm"] = (TABLES["llm"][0], {p: s for p, s in TABLES["llm"][1].items() if "lora" not in p})


@st.composite
def parts(draw):
  """(table, path -> shape, path -> dtype, bytes in a file, seed) of a random subset of a model."""
  table, shapes = TABLES[draw(st.sampled_from(sorted(TABLES)))]
  chosen = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=30, unique=True))
  dtypes = {path: draw(st.sampled_from(DTYPES)) for path in chosen}
  shard_bytes = draw(st.integers(1, 4000))
  return table, {p: shapes[p] for p in chosen}, dtypes, shard_bytes, draw(st.integers(0, 99))


def outgoing(table, shapes, dtypes):
  made = []
  for path, shape in shapes.items():
    name, transform = table.to_torch(path)
    made.append(Outgoing(name, transform.torch_shape(shape), dtypes[path], path, transform))
  return made


def finite_bits(rng, tensor):
  bits = rng.integers(0, 256, tensor.nbytes, np.uint8)
  values = bits.view(tensor.dtype).reshape(tensor.shape)
  return np.where(np.isfinite(values.astype(np.float32)), values, values.dtype.type(-0.0))


def contents(folder):
  source = open_source(folder)
  return {n: (t.shape, t.dtype, source.read(n).tobytes()) for n, t in source.tensors.items()}


@given(parts())
@settings(max_examples=25)
def test_export_after_import_is_the_identity(part):
  table, shapes, dtypes, shard_bytes, seed = part
  rng = np.random.default_rng(seed)
  with tempfile.TemporaryDirectory() as folder:
    first, ours, second = (Path(folder) / name for name in ("first", "ours", "second"))
    first.mkdir()
    second.mkdir()
    tensors = outgoing(table, shapes, dtypes)
    rng.shuffle(tensors)
    values = [finite_bits(rng, tensor) for tensor in tensors]
    write_shards(first, tensors, values, shard_bytes=shard_bytes)
    problems = Problems()
    mapped = map_in(open_source(first), table, shapes, problems=problems)
    problems.check("source")
    save_checkpoint(ours, Opened(config={}, leaves=mapped.leaves), kind="test")
    about = checkpoint.describe(ours)
    back = map_out(about, table, shapes)
    write_shards(second, back, read_out(about, back), shard_bytes=5000)
    assert contents(first) == contents(second)


@given(parts(), st.data())
def test_every_defect_is_in_the_one_error(part, data):
  """Tensors that are missing, too many or of another shape, in any number and mixture."""
  table, shapes, dtypes, _, _ = part
  tensors = outgoing(table, shapes, dtypes)
  defects = data.draw(
    st.lists(st.sampled_from(["missing", "shape", "dtype", "none"]), min_size=len(tensors),
             max_size=len(tensors))
  )  # fmt: skip
  extra = data.draw(st.lists(st.sampled_from(["a.b", "model.norm.scale", "encoder"]), unique=True))

  class Listed:
    """Stands for a source whose tensors are only described."""

    def __init__(self):
      self.tensors = {}
      for tensor, defect in zip(tensors, defects):
        shape = (*tensor.shape, 2) if defect == "shape" else tensor.shape
        dtype = np.dtype(np.float64) if defect == "dtype" else tensor.dtype
        if defect != "missing":
          self.tensors[tensor.name] = Tensor(tensor.name, shape, dtype, Path("f"))
      for name in extra:
        self.tensors[name] = Tensor(name, (1,), np.dtype(np.float32), Path("f"))

  problems = Problems()
  map_in(Listed(), table, shapes, problems=problems)
  wrong = [tensor.name for tensor, defect in zip(tensors, defects) if defect != "none"] + extra
  assert len(problems.found) == len(wrong)
  for name in wrong:
    assert any(f"{name} " in problem for problem in problems.found), name
  if wrong:
    with pytest.raises(ConversionError):
      problems.check("source")


def test_two_names_of_one_leaf_are_a_duplicate():
  table = Table((Rule("a.{n}", "x/{n}"), Rule("b.{n}", "x/{n}")))

  class Listed:
    tensors = {  # noqa: RUF012
      name: Tensor(name, (1,), np.dtype(np.float32), Path("f")) for name in ("a.3", "b.3")
    }

  problems = Problems()
  map_in(Listed(), table, {"x/3": (1,)}, problems=problems)
  assert problems.found == ["f: b.3 is a duplicate: a.3 is also x/3"]


@pytest.mark.parametrize("other", ["a.{n}.{x:v|w}", "a.0.w", "a.{m}.w", "a.{n}.{x:w|z}"], ids=str)
def test_two_rules_for_one_name_are_refused(other):
  fields = {"a.{n}.{x:v|w}": "y/{n}/{x}", "a.0.w": "y", "a.{m}.w": "y/{m}"}
  with pytest.raises(ValueError, match="2 rules match 'a.0.w'"):
    Table((Rule("a.{n}.{x:u|w}", "x/{n}/{x}"), Rule(other, fields.get(other, "y/{n}/{x}"))))
  Table((Rule("a.{n}.{x:u|w}", "x/{n}/{x}"), Rule("a.{n}.{x:v|z}", "x/{n}/{x}")))


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_table_covers_its_model_in_both_directions(name):
  table, shapes = TABLES[name]
  names = {table.to_torch(path)[0] for path in shapes}
  assert len(names) == len(shapes)
  assert {table.to_jax(name)[0] for name in names} == shapes.keys()


def test_a_number_with_a_leading_zero_is_no_number():
  assert language_model.TABLE.to_jax("model.layers.01.input_layernorm.weight") is None
  assert language_model.TABLE.to_jax("model.layers.1.input_layernorm.weightx") is None


def test_the_fields_of_a_rule_must_agree():
  with pytest.raises(ValueError, match="differ"):
    Table((Rule("a.{n}", "b/{m}"),))


@pytest.mark.parametrize("transform, shape", [(IDENTITY, (3, 1, 4)), (TRANSPOSE, (300, 7)),
                                              (DEPTHWISE, (6, 1, 5)),
                                              (CONVOLUTION, (6, 4, 3))])  # fmt: skip
def test_a_transform_undoes_itself(transform, shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  there = transform.to_jax(x)
  assert there.shape == transform.shape(shape)
  assert transform.torch_shape(there.shape) == shape
  np.testing.assert_array_equal(transform.to_torch(there), x)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1025])
def test_transposing_by_bands_is_transposing(rows):
  x = np.arange(rows * 5, dtype=np.int32).reshape(rows, 5)
  np.testing.assert_array_equal(transposed(x), x.T)
  for view in (x, x.T, x.T.copy().T, x.T[:, None]):
    blocks = list(row_blocks(view))
    assert all(block.flags.c_contiguous for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), view)
