"""What can go wrong in a conversion, told all at once."""


class ConversionError(ValueError):
  """The files cannot be converted; lists every reason that was found."""


class Problems:
  """Collects what is wrong, so that one error tells everything."""

  def __init__(self):
    self.found: list[str] = []

  def add(self, problem: str) -> None:
    self.found.append(problem)

  def check(self, what: str) -> None:
    """Raises ConversionError if there were problems; `what` begins the message."""
    if not self.found:
      return
    if len(self.found) == 1:
      raise ConversionError(f"{what}: {self.found[0]}")
    lines = "".join(f"\n  - {problem}" for problem in self.found)
    raise ConversionError(f"{what}: {len(self.found)} problems:{lines}")
