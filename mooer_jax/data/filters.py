"""Filters of utterances by what the data say about them: `language == 'zh' and dnsmos >= 3`."""

import ast
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance

_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
  ast.Eq: operator.eq,
  ast.NotEq: operator.ne,
  ast.Lt: operator.lt,
  ast.LtE: operator.le,
  ast.Gt: operator.gt,
  ast.GtE: operator.ge,
  ast.In: lambda a, b: a in b,
  ast.NotIn: lambda a, b: a not in b,
}
_ALLOWED = (
  "fields of the data, strings, numbers and lists of them, compared by == != < <= > >= in, and"
  " joined by and, or, not"
)


class FieldError(ValueError):
  """An utterance lacks a field of the filter, or has it in another type."""


@dataclasses.dataclass(frozen=True)
class Filter:
  """A condition on the fields of an utterance; "" accepts all.

  The text has the syntax of Python, of which comparisons, `and`, `or`, `not` and lists are allowed.
  It is parsed, never evaluated; `option` is its name in errors.

  Raises:
    ValueError: for another syntax, with the place.
  """

  text: str
  option: str = "data.filter"

  def __post_init__(self):
    if self.text.strip():
      _check(self._tree, self)

  @functools.cached_property
  def _tree(self) -> ast.expr:
    try:
      return ast.parse(self.text.strip(), mode="eval").body
    except SyntaxError as error:
      raise ValueError(f"{self}: {error.msg}; write {_ALLOWED}") from error
    except (ValueError, RecursionError, MemoryError) as error:
      raise ValueError(f"{self}: {error}; write {_ALLOWED}") from error

  def __str__(self) -> str:
    return f"{self.option}={self.text!r}"

  def accepts(self, fields: Mapping[str, Any]) -> bool:
    """Whether an utterance passes.

    Raises:
      FieldError: if it lacks a field that decides, or a field cannot be compared.
    """
    return not self.text.strip() or _holds(self._tree, fields)

  def select(
    self, entry: RawUtterance | SkippedUtterance
  ) -> RawUtterance | SkippedUtterance | None:
    """An entry of a reader; None if it is not accepted, skipped if a field of it is missing."""
    if isinstance(entry, SkippedUtterance):
      return entry
    try:
      return entry if self.accepts(entry.about) else None
    except FieldError as error:
      return entry.skip("no such field", f"{self}: {error}")


def _check(node: ast.expr, condition: Filter) -> None:
  match node:
    case ast.BoolOp(values=values):
      parts = values
    case ast.UnaryOp(op=ast.Not(), operand=operand):
      parts = [operand]
    case ast.Compare() if all(type(op) in _COMPARISONS for op in node.ops):
      for value in (node.left, *node.comparators):
        _check_value(value, condition)
      parts = []
    case _:
      raise _refused(node, condition)
  for part in parts:
    _check(part, condition)


def _check_value(node: ast.expr, condition: Filter) -> None:
  match node:
    case ast.Name() | ast.Constant(value=str() | int() | float()):
      return
    case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
      return
    case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
      for item in items:
        if isinstance(item, ast.Name | ast.List | ast.Tuple | ast.Set):
          raise _refused(item, condition)
        _check_value(item, condition)
    case _:
      raise _refused(node, condition)


def _refused(node: ast.expr, condition: Filter) -> ValueError:
  part = ast.unparse(node)
  return ValueError(f"{condition}: {part!r} is not a condition; write {_ALLOWED}")


def _holds(node: ast.expr, fields: Mapping[str, Any]) -> bool:
  if isinstance(node, ast.BoolOp):
    found = (_holds(value, fields) for value in node.values)
    return all(found) if isinstance(node.op, ast.And) else any(found)
  if isinstance(node, ast.UnaryOp):
    return not _holds(node.operand, fields)
  assert isinstance(node, ast.Compare)
  left = _value(node.left, fields)
  for op, part in zip(node.ops, node.comparators):
    right = _value(part, fields)
    try:
      if not _COMPARISONS[type(op)](left, right):
        return False
    except TypeError as error:
      raise FieldError(f"{ast.unparse(node)}: {error}") from error
    left = right
  return True


def _value(node: ast.expr, fields: Mapping[str, Any]) -> Any:
  if isinstance(node, ast.Name):
    if fields.get(node.id) is None:
      raise FieldError(f"no field {node.id!r}; there are {', '.join(sorted(fields)) or 'none'}")
    return fields[node.id]
  return ast.literal_eval(node)
