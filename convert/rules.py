"""Tables that say which PyTorch tensor is which leaf of ours, read in both directions."""

import dataclasses
import re
from collections.abc import Sequence

from .transforms import IDENTITY, Transform

_FIELD = re.compile(r"\{(\w+)(?::([^{}]+))?\}")


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
  """Rules, in both directions; each name and each path has at most one counterpart."""

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
