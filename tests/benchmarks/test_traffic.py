"""Collectives and HBM traffic of compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import roofline, traffic
from benchmarks.hlo import Program
from benchmarks.traffic import Collective
from mooer_jax import speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.sharding import batch_sharding, make_mesh

LAYERS, ROWS, WIDTH = 5, 64, 256
LAYER_BYTES = WIDTH * WIDTH * 4


def compiled(function, *shapes, shardings=None):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  options = {} if shardings is None else {"in_shardings": shardings}
  return Program(jax.jit(function, **options).lower(*arrays).compile().as_text())


def scanned(x, layers, whole=None):
  """Layers in a loop; each is gathered in it."""

  def layer(x, kernel):
    if whole is not None:
      kernel = jax.lax.with_sharding_constraint(kernel, whole)
    return jnp.tanh(x @ kernel), None

  return jax.lax.scan(layer, x, layers)[0]


def test_a_collective_in_a_loop_counts_once_per_iteration():
  mesh = make_mesh(data=1, fsdp=8)
  rows, columns, whole = (NamedSharding(mesh, P(*p)) for p in (("fsdp",), (None, "fsdp"), ()))

  def function(x, layers):
    return scanned(x, layers, whole).sum()

  program = compiled(function, (ROWS, WIDTH), (LAYERS, WIDTH, WIDTH), shardings=(rows, columns))
  found = {c.kind: c for c in traffic.collectives(program)}
  gather, total = found.pop("all-gather"), found.pop("all-reduce")
  assert not found
  assert (gather.calls, gather.whole_bytes) == (LAYERS, LAYER_BYTES)
  assert roofline.received(gather) == LAYERS * LAYER_BYTES * 7 / 8
  np.testing.assert_array_equal(gather.groups, np.arange(8)[None])
  assert (total.calls, total.whole_bytes) == (1, 4)
  assert roofline.received(total) == 2 * 4 * 7 / 8
  assert traffic.transfers(program) == []


def test_memory_traffic_of_a_loop_is_that_of_its_slices():
  x = ROWS * WIDTH * 4
  assert traffic.hbm_bytes(compiled(lambda x: jnp.tanh(x) * 2 + 1, (ROWS, WIDTH))) == 2 * x
  bytes_of = {
    layers: traffic.hbm_bytes(compiled(scanned, (ROWS, WIDTH), (layers, WIDTH, WIDTH)))
    for layers in (4, 8)
  }
  # A layer is read, and its input and output are read and written a few times by XLA for CPUs; the
  # stack of all layers is not read in every iteration.
  of_layer = (bytes_of[8] - bytes_of[4]) / 4
  assert LAYER_BYTES + 2 * x <= of_layer <= 3 * LAYER_BYTES + 8 * x


def test_the_loss_gathers_the_output_matrix_once_for_all_blocks():
  llm = LLMConfig(
    layers=1,
    hidden_size=64,
    heads=1,
    kv_heads=1,
    head_dim=64,
    intermediate_size=64,
    vocab_size=1024,
  )
  config = SpeechLLMConfig(decoder=llm, compute=ExecutionConfig(remat="full"))
  mesh = make_mesh(data=1, fsdp=8)
  rows = batch_sharding(mesh)

  def summed(hidden, head):
    params, targets = {"decoder": {"head": {"kernel": head}}}, jnp.zeros(hidden.shape[:2], int)
    return speech_llm.token_losses(params, hidden, targets, config, rows=rows)[0].sum()

  program = compiled(
    jax.grad(summed), (8, 160, 64), (64, 1024), shardings=(rows, NamedSharding(mesh, P("fsdp")))
  )
  gathers = [c for c in traffic.collectives(program) if c.kind == "all-gather"]
  assert {c.whole_bytes for c in gathers} == {64 * 1024 * 4}
  assert sum(c.calls for c in gathers) <= 2  # forward and backward; there are 5 blocks


LOOP = """
%condition (state: (u32[], f32[8])) -> pred[] {{
  %state = (u32[], f32[8]{{0}}) parameter(0)
  %counter = u32[] get-tuple-element(%state), index=0
  %end = u32[] constant(9)
  ROOT %less = pred[] compare(%counter, %end), direction=LT
}}

%body (state: (u32[], f32[8])) -> (u32[], f32[8]) {{
  %state = (u32[], f32[8]{{0}}) parameter(0)
  %counter = u32[] get-tuple-element(%state), index=0
  %value = f32[8]{{0:T(256)S(1)}} get-tuple-element(%state), index=1
  %one = u32[] constant(1)
  %step = u32[] constant({step})
  %half = u32[] add(%counter, %one)
  %next = u32[] add(%half, %step)
  {inside}
  ROOT %result = (u32[], f32[8]{{0}}) tuple(%next, %value)
}}

ENTRY %main (value: f32[8]) -> (u32[], f32[8]) {{
  %value = f32[8]{{0}} parameter(0)
  %start = u32[] constant(1)
  %initial = (u32[], f32[8]{{0}}) tuple(%start, %value)
  ROOT %loop = (u32[], f32[8]{{0}}) while(%initial), condition=%condition, body=%body
}}
"""


@pytest.mark.parametrize(("step", "iterations"), [("0", 8), ("1", 4), ("2", 3)])
def test_iterations_of_a_loop_without_annotation(step, iterations):
  program = Program(LOOP.format(step=step, inside=""))
  assert program.runs() == {"main": 1, "body": iterations}


def test_a_loop_of_unknown_length_is_refused_by_name():
  text = LOOP.format(step="0", inside="")
  text = text.replace("constant(9)", "get-tuple-element(%state), index=0")
  with pytest.raises(ValueError, match="the loop %loop has no constant number of iterations"):
    Program(text).runs()
  with pytest.raises(ValueError, match="no line `ENTRY"):
    Program("module @jit_step {}")


def test_exchanges_between_slices_are_those_of_the_runtime():
  received = (
    "%received = (f32[4,8]{1,0}, u32[], token[]) recv(%token), channel_id=1,"
    ' frontend_attributes={_xla_megascale_reduce_operation="SUM",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}'
  )
  program = Program(LOOP.format(step="0", inside=received))
  assert traffic.transfers(program) == [("all-reduce", "SUM", 8, 4 * 8 * 4)]


ASYNCHRONOUS = """
%starting (shard: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %shard = bf16[2,8]{1,0:S(1)} parameter(0)
  %gathered = bf16[8,8]{1,0} all-gather(%shard), channel_id=3, replica_groups=[1,4]<=[4]
  ROOT %begun = (bf16[2,8]{1,0:S(1)}, bf16[8,8]{1,0}) custom-call(%gathered), TARGET
}

%overlapped (shard: bf16[2,8], x: f32[16]) -> f32[16] {
  %shard = bf16[2,8]{1,0:S(1)} parameter(0)
  %x = f32[16]{0} parameter(1)
  %gathered = bf16[8,8]{1,0} all-gather(%shard), channel_id=3, replica_groups=[1,4]<=[4]
  ROOT %sum = f32[16]{0} add(%x, %x)
}

ENTRY %main (shard: bf16[2,8], x: f32[16]) -> f32[16] {
  %shard = bf16[2,8]{1,0:S(1)} parameter(0)
  %x = f32[16]{0} parameter(1)
  %start = (bf16[2,8]{1,0:S(1)}, bf16[8,8]{1,0}) fusion(%shard), kind=kCustom, calls=%starting
  ROOT %during = f32[16]{0} fusion(%shard, %x), kind=kOutput, calls=%overlapped
}
"""


def test_an_asynchronous_collective_counts_once():
  program = Program(ASYNCHRONOUS.replace("TARGET", 'custom_call_target="AsyncCollectiveStart"'))
  [gather] = traffic.collectives(program)
  assert (gather.kind, gather.calls, gather.whole_bytes) == ("all-gather", 1, 8 * 8 * 2)
  # x in and out, and the gathered array; the shard is in VMEM.
  assert traffic.hbm_bytes(program) == 2 * 16 * 4 + 8 * 8 * 2


@pytest.mark.parametrize(
  ("notation", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'b'}", [[0, 2, 4], [1, 3, 5]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
  ],
)
def test_notations_of_groups(notation, groups):
  text = f"), channel_id=1, {notation}, use_global_device_ids=true"
  np.testing.assert_array_equal(traffic.groups_of(text), groups)


def test_unknown_groups_are_refused():
  with pytest.raises(ValueError, match="cannot read the groups of a collective: 'new=3'"):
    traffic.groups_of("), replica_groups=new=3")


def collective(kind, groups, whole_bytes=1000, calls=3):
  return Collective(kind, calls, whole_bytes, np.array(groups), "")


def test_bytes_that_a_chip_must_receive():
  for kind, expected in (("all-gather", 750), ("reduce-scatter", 750), ("all-to-all", 750),
                         ("all-reduce", 1500), ("collective-permute", 1000)):  # fmt: skip
    assert roofline.received(collective(kind, [[0, 1, 2, 3]])) == 3 * expected


def test_links_that_a_group_uses():
  places = np.array([(x, y, 0) for y in range(4) for x in range(4)])
  row, column, all_ = [[0, 1, 2, 3]], [[0, 4, 8, 12]], [list(range(16))]
  for groups, links in ((row, 1), (column, 1), (all_, 2)):  # no ring: a chip at the edge has one
    assert roofline.links_of(collective("all-gather", groups), places, torus=16) == links
    assert roofline.links_of(collective("all-gather", groups), places, torus=4) == 2 * links
  half = collective("all-gather", [[0, 1]])
  assert roofline.links_of(half, places, torus=2) == 1
  assert roofline.links_of(collective("collective-permute", [[0, 1]]), places, torus=16) == 2
