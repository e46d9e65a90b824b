"""Rule tables: the leaf and the layout of every PyTorch tensor, in both directions."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Shape = tuple[int, ...]
_FIELD = re.compile(r"\{(\w+)(?::([^{}]+))?\}")
# Rows copied at a time, so that a cache holds one line of each (1.5 GB/s; all at once: 0.5 GB/s).
_BAND = 128


@dataclasses.dataclass(frozen=True)
class Transform:
  """A reordering of an array's elements and its inverse; both return views."""

  to_jax: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]

  def shape(self, torch_shape: Shape) -> Shape:
    return self.to_jax(_without_data(torch_shape)).shape

  def torch_shape(self, shape: Shape) -> Shape:
    return self.to_torch(_without_data(shape)).shape


def _without_data(shape: Shape) -> np.ndarray:
  return np.broadcast_to(np.float32(0), shape)


def transposed(x_RC: np.ndarray) -> np.ndarray:
  """Returns the transpose of a matrix in C order."""
  out_CR = np.empty(x_RC.shape[::-1], x_RC.dtype)
  for row in range(0, len(x_RC), _BAND):
    out_CR[:, row : row + _BAND] = x_RC[row : row + _BAND].T
  return out_CR


IDENTITY = Transform(lambda x: x, lambda x: x)

# nn.Linear keeps [out, in], our kernels are [in, out]. nn.Conv1d keeps [out, in of a group, taps],
# our kernels are [taps, in, out].
TRANSPOSE = CONVOLUTION = Transform(np.transpose, np.transpose)

# A depthwise nn.Conv1d keeps [channels, 1, taps], our kernel is [taps, channels].
DEPTHWISE = Transform(lambda x_D1K: x_D1K[:, 0].T, lambda x_KD: x_KD.T[:, None])

_BLOCK = 1024


def row_blocks(x: np.ndarray) -> Iterator[np.ndarray]:
  """Yields an array in C order, in blocks of rows, without a copy of all of a transposed matrix."""
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
    torch: name of the tensor; `{n}` matches a number, `{x:a|b}` one of the words.
    jax: path of the leaf, with the same fields as `{n}`, `{x}`.
    transform: layout of the array.
  """

  torch: str
  jax: str
  transform: Transform = IDENTITY


def linear(torch: str, jax: str) -> tuple[Rule, Rule]:
  """Rules of an nn.Linear with a bias."""
  return Rule(f"{torch}.weight", f"{jax}/kernel", TRANSPOSE), Rule(f"{torch}.bias", f"{jax}/bias")


def norm(torch: str, jax: str) -> tuple[Rule, Rule]:
  """Rules of an nn.LayerNorm."""
  return Rule(f"{torch}.weight", f"{jax}/scale"), Rule(f"{torch}.bias", f"{jax}/bias")


class Table:
  """Rules, in both directions.

  Several names may have the same path (a wrapper renames weights); an export then uses the name of
  the first of these rules.

  Raises:
    ValueError: if the fields of a rule's sides differ, or two rules match the same name.
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
        matching = [other.torch for torch, _, _, other in self._rules if torch.fullmatch(name)]
        if len(matching) != 1:
          raise ValueError(f"{len(matching)} rules match {name!r}: {' and '.join(matching)}")

  def to_jax(self, name: str) -> tuple[str, Transform] | None:
    """Returns (path, transform) of a tensor; None if no rule matches."""
    for torch, _, _, rule in self._rules:
      if match := torch.fullmatch(name):
        return rule.jax.format(**match.groupdict()), rule.transform
    return None

  def to_torch(self, path: str) -> tuple[str, Transform] | None:
    """Returns (name, transform) of a leaf; None if no rule matches."""
    for _, plain, jax, rule in self._rules:
      if match := jax.fullmatch(path):
        return plain.format(**match.groupdict()), rule.transform
    return None


def _examples(template: str) -> Iterator[str]:
  """Yields names that a rule matches: each of its words, and 0 for every number."""
  choices = [[(m[1], word) for word in (m[2] or "0").split("|")] for m in _FIELD.finditer(template)]
  for fields in itertools.product(*choices):
    yield _plain(template).format(**dict(fields))


def _plain(template: str) -> str:
  return _FIELD.sub(lambda m: "{" + m[1] + "}", template)


def _regex(template: str, fields: dict[str, str]) -> re.Pattern:
  pieces, end = [], 0
  for match in _FIELD.finditer(template):
    kind = fields[match[1]]
    # No leading zeros: "01" would become "1" on the way back.
    words = r"0|[1-9]\d*" if kind == "number" else "|".join(map(re.escape, kind.split("|")))
    pieces += [re.escape(template[end : match.start()]), f"(?P<{match[1]}>{words})"]
    end = match.end()
  return re.compile("".join(pieces) + re.escape(template[end:]))
