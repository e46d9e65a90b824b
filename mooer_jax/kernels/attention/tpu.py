"""Flash attention for TPU: Pallas kernels that Mosaic compiles, forward and backward.

Scores exist one [block_t, block_s] tile at a time. The forward kernel keeps a running maximum and
sum for each query and stores their log-sum-exp; the backward kernels compute the weights again
from it. Tiles in which no query may attend to a key are neither loaded nor computed.

Source: FlashAttention-2 (Dao, 2023).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_BLOCK = 512
# Below any score; finite, so that the difference of two is a number.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# Axes that are contracted, as of dot_general: a b and a bᵀ.
NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def dot(a, b, dims):
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def start_softmax(max_ref, sum_ref, acc_ref):
  """Sets the running maximum, sum and weighted values of a softmax to those of no keys."""
  max_ref[...] = jnp.full(max_ref.shape, MASKED, jnp.float32)
  sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
  acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)


def add_to_softmax(scores_TS, mask_TS, v_SC, max_ref, sum_ref, acc_ref):
  """Adds a tile of keys to a softmax: maximum and sum fill the lanes of [T, LANES]."""
  scores_TS = jnp.where(mask_TS, scores_TS, MASKED)
  old_T1 = max_ref[:, :1]
  max_T1 = jnp.maximum(old_T1, scores_TS.max(axis=1, keepdims=True))
  weights_TS = jnp.where(mask_TS, jnp.exp(scores_TS - max_T1), 0.0)
  shrink_T1 = jnp.exp(old_T1 - max_T1)
  sum_T1 = sum_ref[:, :1] * shrink_T1 + weights_TS.sum(axis=1, keepdims=True)
  max_ref[...] = jnp.broadcast_to(max_T1, max_ref.shape)
  sum_ref[...] = jnp.broadcast_to(sum_T1, sum_ref.shape)
  acc_ref[...] = acc_ref[...] * shrink_T1 + dot(weights_TS.astype(v_SC.dtype), v_SC, NN)


def _block(size: int) -> int:
  return min(_BLOCK, pl.cdiv(size, LANES) * LANES)


def column(row_1T):
  """[1, T] as [T, 1]."""
  return jnp.broadcast_to(row_1T.astype(jnp.float32), (LANES, row_1T.shape[1])).T[:, :1]


class _Tile:
  """The tile of queries and keys that one step of a kernel's grid works on.

  `is_visible` is whether any of its queries may attend to any of its keys.
  """

  def __init__(self, scalars, refs, b, i, j, *, queries, causal):
    first_ref, end_ref, query_ref = scalars
    block_t, block_s = self._shape = refs["q"].shape[0], refs["k"].shape[0]
    end = end_ref[b]
    key_1S = j * block_s + jax.lax.broadcasted_iota(jnp.int32, (1, block_s), 1)
    self._keys_1S = (refs["valid"][...] != 0) & (key_1S < end)  # refs may reach over the last key
    self._first_query, self._first_key = query_ref[0] + i * block_t, j * block_s
    self._left, self._causal, self._refs = queries - i * block_t, causal, refs
    last = jnp.minimum(end, self._first_query + block_t) if causal else end
    # Entries of the table of biases for the distances in the tile, -block_t + 1 to block_s - 1.
    start = pl.cdiv(queries, block_t) * block_t - (i + 1) * block_t + j * block_s
    self._width = block_t + block_s
    self._part = pl.ds(pl.multiple_of(start, LANES), self._width)
    self.is_visible = (first_ref[b] < (j + 1) * block_s) & (j * block_s < last)

  def mask_TS(self):
    return self._if_causal(jnp.broadcast_to(self._keys_1S, self._shape), t_axis=0)

  def mask_ST(self):
    """The same transposed, but for the validity of keys, and without queries beyond the last."""
    t_ST = jax.lax.broadcasted_iota(jnp.int32, self._shape[::-1], 1)
    return self._if_causal(t_ST < self._left, t_axis=1)

  def _if_causal(self, mask, *, t_axis):
    if not self._causal:
      return mask
    t, s = (jax.lax.broadcasted_iota(jnp.int32, mask.shape, n) for n in (t_axis, 1 - t_axis))
    return mask & (s - t <= self._first_query - self._first_key)

  def scores_TS(self, k_SC, scale):
    scores_TS = dot(self._refs["q"][...], k_SC, NT) * scale
    if "table" in self._refs:
      scores_TS += column(self._refs["gate"][...]) * self.bias_TS()
    return scores_TS

  def bias_TS(self):
    """Bias of each pair by its distance: row t is the tile's part of the table, shifted by t."""
    part = self._refs["table"][:, self._part]
    part = jnp.broadcast_to(part, (self._shape[0], self._width))
    return pltpu.roll(part, 0, 1, stride=1, stride_axis=0)[:, self._shape[0] :]

  def of_keys(self, x_SC):
    """Zeros at keys that are not valid, whose content is undefined: 0 * NaN is NaN."""
    return jnp.where(column(self._keys_1S) != 0, x_SC, 0).astype(x_SC.dtype)

  def of_queries(self, x_TC):
    """Zeros at queries beyond the last."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x_TC.shape, 0) < self._left, x_TC, 0)


def _forward_kernel(*arguments, scale, tile):
  *scalars, refs, out, softmax = arguments
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  tile = tile(scalars, refs, b, i, j)
  pl.when(j == 0)(lambda: start_softmax(*softmax))

  @pl.when(tile.is_visible)
  def _():
    scores_TS = tile.scores_TS(refs["k"][...], scale)
    add_to_softmax(scores_TS, tile.mask_TS(), tile.of_keys(refs["v"][...]), *softmax)

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    max_ref, sum_ref, acc_ref = softmax
    has_no_key_TL = sum_ref[...] == 0  # queries that attend to no key
    sum_TL = jnp.where(has_no_key_TL, 1.0, sum_ref[...])
    out["out"][...] = (acc_ref[...] / sum_TL[:, :1]).astype(out["out"].dtype)
    # exp(score - lse) must be 0 for them.
    lse_TL = jnp.where(has_no_key_TL, -MASKED, max_ref[...] + jnp.log(sum_TL))
    out["lse"][...] = lse_TL.T[:1]


def _dq_kernel(*arguments, scale, tile):
  *scalars, refs, out, [acc_ref] = arguments
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  tile = tile(scalars, refs, b, i, j)

  @pl.when(j == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  @pl.when(tile.is_visible)
  def _():
    k_SC, v_SC = tile.of_keys(refs["k"][...]), tile.of_keys(refs["v"][...])
    scores_TS = tile.scores_TS(k_SC, scale)
    weights_TS = jnp.where(tile.mask_TS(), jnp.exp(scores_TS - column(refs["lse"][...])), 0.0)
    dweights_TS = dot(refs["do"][...], v_SC, NT)
    dscores_TS = weights_TS * (dweights_TS - column(refs["delta"][...]))
    acc_ref[...] += dot(dscores_TS.astype(k_SC.dtype), k_SC, NN)

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    out["dq"][...] = (acc_ref[...] * scale).astype(out["dq"].dtype)


def _dkv_kernel(*arguments, scale, tile):
  *scalars, refs, out, (dk_acc_ref, dv_acc_ref) = arguments
  b, j, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)
  tile = tile(scalars, refs, b, i, j)

  @pl.when((g == 0) & (i == 0))
  def _():
    dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
    dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

  @pl.when(tile.is_visible)
  def _():
    mask_ST = tile.mask_ST()
    q_TC, do_TC = tile.of_queries(refs["q"][...]), tile.of_queries(refs["do"][...])
    scores_ST = dot(refs["k"][...], q_TC, NT) * scale
    if "table" in refs:
      scores_ST += tile.bias_TS().T * refs["gate"][...]
    weights_ST = jnp.where(mask_ST, jnp.exp(scores_ST - refs["lse"][...]), 0.0)
    dv_acc_ref[...] += dot(weights_ST.astype(do_TC.dtype), do_TC, NN)
    dweights_ST = dot(refs["v"][...], do_TC, NT)
    dscores_ST = jnp.where(mask_ST, weights_ST * (dweights_ST - refs["delta"][...]), 0.0)
    dk_acc_ref[...] += dot(dscores_ST.astype(q_TC.dtype), q_TC, NN)

  @pl.when((g == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1))
  def _():
    # What the accumulators hold at other keys is undefined.
    out["dk"][...] = tile.of_keys(dk_acc_ref[...] * scale).astype(out["dk"].dtype)
    out["dv"][...] = tile.of_keys(dv_acc_ref[...]).astype(out["dv"].dtype)


def _call(kernel, name, inputs, outputs, *, scratch, keys, causal, interpret):
  """Runs a kernel over all tiles.

  The grid of a kernel that returns dk walks over the queries of each tile of keys, for all heads
  that share it; the others walk over the keys of each tile of queries. A kernel takes refs of the
  scalars, dicts of refs of inputs and outputs, a list of those of scratch, and `scale` and `tile`.

  Args:
    inputs: q, do [B, H, T, C], k, v [B, K, S, C], valid [B, 1, 1, S], lse, delta, gate
      [B, H, 1, T], table [1, H, 1, R].
    outputs: anything with their shapes and dtypes.
    scratch: returns the shapes of float32 scratch, given the tile's sizes.
  """
  (B, H, T, C), (K, S) = inputs["q"].shape, inputs["k"].shape[1:3]
  over_keys = "dk" in outputs
  bt, bs = _block(T), _block(S)
  tiles_t, tiles_s = pl.cdiv(T, bt), pl.cdiv(S, bs)
  group = H // K

  def tile_of(*arguments):
    """Place of a tile, or of the nearest one with work, which is not loaded a second time."""
    *ids, first_ref, end_ref, query_ref = arguments
    if not over_keys:
      b, h, i, j = ids
      end = end_ref[b]
      if causal:
        end = jnp.minimum(end, query_ref[0] + (i + 1) * bt)
      first = jax.lax.div(first_ref[b], bs)
      j = jnp.clip(j, first, jnp.maximum(first, jax.lax.div(end - 1, bs)))
      return b, h, i, j
    b, k, j, g, i = ids
    if causal:
      least = jax.lax.div(jnp.maximum(j * bs - query_ref[0], 0), bt)
      i = jnp.maximum(i, jnp.minimum(least, tiles_t - 1))
    return b, k * group + g, i, j

  def spec(block, place):
    return pl.BlockSpec((None, None, *block), lambda *arguments: place(*tile_of(*arguments)))

  queries_spec = spec((bt, C), lambda b, h, i, j: (b, h, i, 0))
  keys_spec = spec((bs, C), lambda b, h, i, j: (b, jax.lax.div(h, group), j, 0))
  row = spec((1, bt), lambda b, h, i, j: (b, h, 0, i))
  specs = {
    "q": queries_spec, "do": queries_spec, "out": queries_spec, "dq": queries_spec,
    "k": keys_spec, "v": keys_spec, "dk": keys_spec, "dv": keys_spec,
    "lse": row, "delta": row, "gate": row,
    "valid": spec((1, bs), lambda b, h, i, j: (b, 0, 0, j)),
    "table": spec((1, tiles_t * bt + tiles_s * bs), lambda b, h, i, j: (0, h, 0, 0)),
  }  # fmt: skip
  grid = (B, K, tiles_s, group, tiles_t) if over_keys else (B, H, tiles_t, tiles_s)
  parallel = 3  # the other axes are summed over
  return pl.pallas_call(
    functools.partial(
      kernel, scale=C**-0.5, tile=functools.partial(_Tile, queries=T, causal=causal)
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=grid,
      in_specs=[{x: specs[x] for x in inputs}],
      out_specs={x: specs[x] for x in outputs},
      scratch_shapes=[[pltpu.VMEM(shape, jnp.float32) for shape in scratch(bt, bs)]],
    ),
    out_shape={x: jax.ShapeDtypeStruct(y.shape, y.dtype) for x, y in outputs.items()},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
    ),
    interpret=interpret,
    name=name,
  )(keys.first_B, keys.end_B, keys.query_1, inputs)


def _inputs(q_BTHC, k_BSKC, v_BSKC, bias, keys):
  q, k, v = (x.swapaxes(1, 2) for x in (q_BTHC, k_BSKC, v_BSKC))
  inputs = {"q": q, "k": k, "v": v, "valid": keys.valid_BS[:, None, None]}
  if bias is not None:
    # Tiles beyond the last query and key need entries too, whatever these are.
    left, right = (-x.shape[2] % _block(x.shape[2]) for x in (q, k))
    table_HR = jnp.pad(bias.table_HR, ((0, 0), (left + 1, right)))
    gate_BHT = bias.gate_BTH.swapaxes(1, 2)
    inputs |= {"gate": gate_BHT[:, :, None], "table": table_HR[None, :, None]}
  return inputs


def forward(q_BTHC, k_BSKC, v_BSKC, bias, keys, *, causal, interpret):
  """Returns out [B, T, H, C] and the log-sum-exp of the scores, float32 [B, H, T]."""
  B, T, H, C = q_BTHC.shape
  inputs = _inputs(q_BTHC, k_BSKC, v_BSKC, bias, keys)
  outputs = _call(
    _forward_kernel,
    "flash_attention_forward",
    inputs,
    {"out": inputs["q"], "lse": jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32)},
    scratch=lambda bt, bs: [(bt, LANES), (bt, LANES), (bt, C)],
    keys=keys, causal=causal, interpret=interpret,
  )  # fmt: skip
  return outputs["out"].swapaxes(1, 2), outputs["lse"][:, :, 0]


def backward(
  q_BTHC, k_BSKC, v_BSKC, bias, keys, do_BTHC, lse_BHT, delta_BHT, *, causal, interpret
):  # fmt: skip
  """Returns the gradients of q, k and v; delta is the sum of out * do of each query."""
  C = q_BTHC.shape[-1]
  inputs = _inputs(q_BTHC, k_BSKC, v_BSKC, bias, keys)
  inputs |= {"do": do_BTHC.swapaxes(1, 2), "lse": lse_BHT[:, :, None]}
  inputs |= {"delta": delta_BHT[:, :, None]}
  call = functools.partial(_call, inputs=inputs, keys=keys, causal=causal, interpret=interpret)
  gradients = call(
    _dq_kernel, "flash_attention_dq", outputs={"dq": inputs["q"]},
    scratch=lambda bt, bs: [(bt, C)],
  )  # fmt: skip
  gradients |= call(
    _dkv_kernel, "flash_attention_dkv", outputs={"dk": inputs["k"], "dv": inputs["v"]},
    scratch=lambda bt, bs: [(bs, C), (bs, C)],
  )  # fmt: skip
  return tuple(gradients[x].swapaxes(1, 2) for x in ("dq", "dk", "dv"))
