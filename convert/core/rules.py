"""Rule tables: which PyTorch tensor is which leaf, and how its array is laid out, both ways."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Shape = tuple[int, ...]
_FIELD = re.compile(r"\{(\w+)(?::([^{}]+))?\}")
# Rows that are copied at a time: a cache holds one line of each (1.5 GB/s against 0.5 in one go).
_BAND = 128


@dataclasses.dataclass(frozen=True)
class Transform:
  """A reordering of an array's elements and its inverse.

  Attributes:
    ndim, torch_ndim: axes on our side and on PyTorch's.
    shape, torch_shape: shape on our side from PyTorch's, and back.
    to_jax, to_torch: the same for an array, as views: what writes them copies them anyway.
  """

  ndim: int | None
  torch_ndim: int | None
  shape: Callable[[Shape], Shape]
  torch_shape: Callable[[Shape], Shape]
  to_jax: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


def transposed(x_RC: np.ndarray) -> np.ndarray:
  """The transpose of a matrix, in C order."""
  out_CR = np.empty(x_RC.shape[::-1], x_RC.dtype)
  for row in range(0, len(x_RC), _BAND):
    out_CR[:, row : row + _BAND] = x_RC[row : row + _BAND].T
  return out_CR


IDENTITY = Transform(None, None, tuple, tuple, lambda x: x, lambda x: x)

# nn.Linear keeps [out, in], our kernels are [in, out].
TRANSPOSE = Transform(2, 2, lambda s: s[::-1], lambda s: s[::-1], np.transpose, np.transpose)

# A depthwise nn.Conv1d keeps [channels, 1, taps], our kernel is [taps, channels].
DEPTHWISE = Transform(
  2,
  3,
  lambda s: (s[2], s[0]) if s[1] == 1 else s,
  lambda s: (s[1], 1, s[0]),
  lambda x_D1K: x_D1K[:, 0].T,
  lambda x_KD: x_KD.T[:, None],
)

# nn.Conv1d keeps [out, in, taps], our kernels are [taps, in, out]; in is that of a group.
CONVOLUTION = Transform(
  3, 3, lambda s: s[::-1], lambda s: s[::-1], np.transpose, np.transpose
)  # fmt: skip

_BLOCK = 1024


def row_blocks(x: np.ndarray) -> Iterator[np.ndarray]:
  """An array in C order, in pieces of its rows; of a transposed one, no whole copy is made."""
  if x.flags.c_contiguous:
    yield x
  elif x.ndim == 2:
    for row in range(0, len(x), _BLOCK):
      yield transposed(x[row : row + _BLOCK].T)
  else:
    yield np.ascontiguousarray(x)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a table.

  Attributes:
    torch: name of the tensor; `{n}` is a number, `{x:a|b}` one of the words.
    jax: path of the leaf, with the same fields as `{n}`, `{x}`.
    transform: what happens to the array.
  """

  torch: str
  jax: str
  transform: Transform = IDENTITY


class Table:
  """Rules, in both directions.

  A name has at most one path, since no two rules may take it. Several names may have the same path
  (a wrapper renames weights); it is then written under the name of the first of these rules.

  Raises:
    ValueError: for a rule whose sides have other fields, and for two rules that take one name
      (seen by their words, with 0 for each number).
  """

  def __init__(self, rules: Sequence[Rule]):
    self.rules = tuple(rules)
    self._rules = []
    for rule in rules:
      fields = {m[1]: m[2] or "number" for m in _FIELD.finditer(rule.torch)}
      used = [m[1] for m in _FIELD.finditer(rule.jax)]
      if sorted(used) != sorted(fields):
        raise ValueError(f"the fields of {rule.torch!r} and {rule.jax!r} differ")
      self._rules.append(
        (_regex(rule.torch, fields), _plain(rule.torch), _regex(rule.jax, fields), rule)
      )
    for rule in rules:
      for name in _examples(rule.torch):
        takers = [other.torch for torch, _, _, other in self._rules if torch.fullmatch(name)]
        if len(takers) != 1:
          raise ValueError(f"{name!r} is taken by {len(takers)} rules: {' and '.join(takers)}")

  def to_jax(self, name: str) -> tuple[str, Transform] | None:
    """(path, transform) of a tensor, or None if no rule takes its name."""
    for torch, _, _, rule in self._rules:
      if match := torch.fullmatch(name):
        return rule.jax.format(**match.groupdict()), rule.transform
    return None

  def to_torch(self, path: str) -> tuple[str, Transform] | None:
    """(name, transform) of a leaf, or None if no rule takes its path."""
    for _, plain, jax, rule in self._rules:
      if match := jax.fullmatch(path):
        return plain.format(**match.groupdict()), rule.transform
    return None


def _examples(template: str) -> Iterator[str]:
  """Names that a rule takes: with each of its words, and 0 for every number."""
  choices = [[(m[1], word) for word in (m[2] or "0").split("|")] for m in _FIELD.finditer(template)]
  for fields in itertools.product(*choices):
    yield _plain(template).format(**dict(fields))


def _plain(template: str) -> str:
  return _FIELD.sub(lambda m: "{" + m[1] + "}", template)


def _regex(template: str, fields: dict[str, str]) -> re.Pattern:
  pieces, end = [], 0
  for match in _FIELD.finditer(template):
    kind = fields[match[1]]
    # No leading zeros: "01" could not be told from "1" on the way back.
    words = r"0|[1-9]\d*" if kind == "number" else "|".join(map(re.escape, kind.split("|")))
    pieces += [re.escape(template[end : match.start()]), f"(?P<{match[1]}>{words})"]
    end = match.end()
  return re.compile("".join(pieces) + re.escape(template[end:]))
