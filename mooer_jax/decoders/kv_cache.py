"""The decoder's memory of what it has read."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
  """Keys and values of every layer, in slots that fill from the left.

  Attributes:
    layers: one (keys, values) pair a layer, each [B, S, K, C], S slots.
    valid_BS: bool, True where a filled slot may be attended to.
    filled: int32 scalar, slots filled so far, the same for all rows.
    positions_B: int32, rotary position of each row's next token.
  """

  layers: tuple[tuple[jax.Array, jax.Array], ...]
  valid_BS: jax.Array
  filled: jax.Array
  positions_B: jax.Array

  @classmethod
  def create(cls, *, layers: int, batch: int, slots: int, kv_heads: int, channels: int, dtype):
    """An empty cache; `slots` bounds prompt plus generated tokens."""
    shape = (batch, slots, kv_heads, channels)
    return cls(
      layers=tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)),
      valid_BS=jnp.zeros((batch, slots), bool),
      filled=jnp.zeros((), jnp.int32),
      positions_B=jnp.zeros((batch,), jnp.int32),
    )

  def grow(self, slots: int) -> "KVCache":
    """The same with room for `slots` more; a prompt read before it attends to no empty slots."""

    def longer(x):
      return jnp.pad(x, [(0, 0), (0, slots), *[(0, 0)] * (x.ndim - 2)])

    return self.replace(  # type: ignore[attr-defined]
      layers=jax.tree.map(longer, self.layers), valid_BS=longer(self.valid_BS)
    )


def write(slots_BSKC: jax.Array, new_BTKC: jax.Array, filled: jax.Array) -> jax.Array:
  """Writes T new entries behind the filled slots; XLA does it in place inside a loop."""
  return jax.lax.dynamic_update_slice_in_dim(
    slots_BSKC, new_BTKC.astype(slots_BSKC.dtype), filled, axis=1
  )
