"""Results of `convert verify`: the errors of every stage, and the tables."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import log_softmax

from ..core.errors import ConversionError


@dataclasses.dataclass(frozen=True)
class Error:
  """Differences of both sides at a stage.

  Attributes:
    stage: its name, after that of the encoder if there are several.
    largest: the largest difference.
    relative: the largest difference in standard deviations of the original's values.
    share: the largest difference relative to the bound of its row; NaN fails.
  """

  stage: str
  largest: float
  relative: float
  share: float

  @property
  def held(self) -> bool:
    return self.share <= 1


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """A dtype against float32: KL divergence of the logits in nats, and share of equal tokens."""

  name: str
  mean_kl: float
  largest_kl: float
  agreement: float


@dataclasses.dataclass(frozen=True)
class Report:
  """Results of `verify`.

  Attributes:
    errors: a row for each stage.
    agreement: (equal generated tokens, all tokens); None without an LLM.
    accuracy: a row for each dtype.
    notes: sentences for the user, such as parts left out on both sides.
  """

  errors: list[Error]
  agreement: tuple[int, int] | None = None
  accuracy: list[Accuracy] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  @property
  def failed(self) -> list[str]:
    """The stages that are over their bounds, in order; "tokens" if one of them differs."""
    stages = [row.stage for row in self.errors if not row.held]
    if self.agreement is not None and self.agreement[0] != self.agreement[1]:
      stages.append("tokens")
    return stages


def stage_errors(
  ours: Mapping[str, np.ndarray],
  theirs: Mapping[str, np.ndarray],
  bounds: Mapping[str, np.ndarray],
) -> list[Error]:
  """A row for each stage of both sides. Raises ConversionError if the shapes of one differ."""
  rows = []
  assert ours.keys() <= theirs.keys(), ours.keys() - theirs.keys()
  for stage in (stage for stage in theirs if stage in ours):
    array, other = ours[stage], theirs[stage]
    if array.shape != other.shape:
      raise ConversionError(f"{stage}: ours is {array.shape}, theirs {other.shape}")
    error, spread = np.abs(array - other), float(other.std())
    largest = float(error.max())
    # Features of silence are all equal.
    relative = largest / spread if spread else 0.0 if largest == 0 else math.inf
    share = np.where(error == 0, 0, error / np.maximum(bounds[stage], np.finfo(np.float32).tiny))
    rows.append(Error(stage, largest, relative, float(share.max())))
  return rows


def same_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> tuple[int, int]:
  """(equal, all) over positions; a position that only one side has is not equal."""
  pairs = list(zip(ours, theirs, strict=True))
  same = sum(a == b for answers in pairs for a, b in zip(*answers))
  return same, sum(max(map(len, answers)) for answers in pairs)


def accuracy(name: str, exact_AV: np.ndarray, other_AV: np.ndarray) -> Accuracy:
  """Compares logits with those of float32, in float64."""
  log_p, log_q = (log_softmax(x.astype(np.float64), axis=-1) for x in (exact_AV, other_AV))
  kl_A = (np.exp(log_p) * (log_p - log_q)).sum(-1)
  same_A = exact_AV.argmax(-1) == other_AV.argmax(-1)
  return Accuracy(name, float(kl_A.mean()), float(kl_A.max()), float(same_A.mean()))


def print_report(report: Report) -> None:
  """Prints the tables of `verify`, and the stages that exceed their bounds."""
  for note in report.notes:
    print(note)
  print(f"{'stage':18}{'largest error':>16}{'in std':>14}{'of its bound':>14}")
  for row in report.errors:
    over = "" if row.held else "  exceeded"
    print(f"{row.stage:18}{row.largest:16.2e}{row.relative:14.2e}{row.share:14.1%}{over}")
  if report.agreement is not None:
    same, tokens = report.agreement
    print(f"{'tokens':18}{f'{same} of {tokens} the same':>30}  all")
  if report.accuracy:
    print(f"\n{'against float32':18}{'mean KL':>10}{'largest KL':>12}{'same tokens':>13}")
    for line in report.accuracy:
      print(f"{line.name:18}{line.mean_kl:10.1e}{line.largest_kl:12.1e}{line.agreement:12.1%}")
  print(
    "\nA bound is the difference that float32 rounding explains: 8 eps sqrt(terms of the longest"
    " sum)\ntimes the sensitivity of the frame to its inputs and weights."
  )
  over = ", ".join(report.failed)
  print(f"FAILED, over the bound: {over}" if over else "passed: every stage is within its bound")
