"""Errors of a conversion, all reported at once."""


class ConversionError(ValueError):
  """Files that cannot be converted, with every reason."""


class Problems:
  """Collects problems, so that one error lists all of them."""

  def __init__(self):
    self.found: list[str] = []

  def add(self, problem: str) -> None:
    self.found.append(problem)

  def check(self, what: str) -> None:
    """Raises ConversionError if there are problems; the message begins with `what`."""
    if not self.found:
      return
    if len(self.found) == 1:
      raise ConversionError(f"{what}: {self.found[0]}")
    lines = "".join(f"\n  - {problem}" for problem in self.found)
    raise ConversionError(f"{what}: {len(self.found)} problems:{lines}")
