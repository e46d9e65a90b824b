"""Errors of a conversion, all reported at once."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..readers import ReadError

Result = TypeVar("Result")


class ConversionError(ValueError):
  """Files that cannot be converted, with every reason."""

  def __init__(self, message: str, reasons: Sequence[str] = ()):
    super().__init__(message)
    self.reasons = tuple(reasons) or (message,)


class Problems:
  """Collects problems, so that one error lists all of them.

  Functions that take one add to it what does not fit, and raise ValueError where they cannot go on.
  """

  def __init__(self):
    self.found: list[str] = []

  def add(self, problem: str) -> None:
    self.found.append(problem)

  def attempt(self, function: Callable[..., Result], *args: Any, **options: Any) -> Result | None:
    """Calls a function; None, with its reasons added, for a ValueError that is not a ReadError."""
    try:
      return function(*args, **options)
    except ReadError:
      raise
    except ValueError as error:  # also of configs and readers of mooer_jax, about the files
      reasons = getattr(error, "reasons", [str(error)])
      self.found += [reason for reason in reasons if reason not in self.found]
      return None

  def check(self, what: str) -> None:
    """Raises ConversionError if there are problems; the message begins with `what`."""
    if len(self.found) == 1:
      raise ConversionError(f"{what}: {self.found[0]}", self.found)
    if self.found:
      lines = "".join(f"\n  - {problem}" for problem in self.found)
      raise ConversionError(f"{what}: {len(self.found)} problems:{lines}", self.found)
