"""Results of `convert verify`: the errors of every stage, their bounds, the tables."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax

from ..core.errors import ConversionError

# Bounds of features are absolute: float32 logarithms of small energies set their error, and Kaldi's
# own float32 FFT is off by up to this (tests/audio/test_fbank.py). The others are in standard
# deviations of the original's values: float32 sums in another order cost up to 1e-4 (4e-4 in single
# frames of Whisper's silence); the logits of weights that were rounded to bfloat16 are off by 2e-2.
BOUNDS = {"features": 2e-3, "encoder": 1e-3, "adapter": 1e-3, "prompt": 1e-3, "logits": 1e-3}


@dataclasses.dataclass(frozen=True)
class Error:
  """Difference of both sides at a stage: the largest, and in standard deviations of theirs.

  A stage is a name in BOUNDS, after that of the encoder if there are several.
  """

  stage: str
  largest: float
  relative: float

  @property
  def absolute(self) -> bool:
    """Whether the difference itself is bounded, not the one in standard deviations."""
    return self.stage.endswith("features")

  @property
  def bound(self) -> float:
    return BOUNDS[self.stage.split()[-1]]

  @property
  def held(self) -> bool:
    """Whether it is within the stage's bound; NaN is not."""
    return (self.largest if self.absolute else self.relative) <= self.bound


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


def stage_errors(ours: Mapping[str, Any], theirs: Mapping[str, np.ndarray]) -> list[Error]:
  """A row for each stage that both sides have, in the order of theirs.

  Raises:
    ConversionError: if the shapes of a stage differ.
  """
  rows = []
  assert ours.keys() <= theirs.keys(), ours.keys() - theirs.keys()
  for stage in (stage for stage in theirs if stage in ours):
    array, other = np.asarray(ours[stage]), theirs[stage]
    if array.shape != other.shape:
      raise ConversionError(f"{stage}: ours is {array.shape}, theirs {other.shape}")
    largest, spread = float(np.abs(array - other).max()), float(other.std())
    # Features of silence are all equal.
    relative = largest / spread if spread else 0.0 if largest == 0 else math.inf
    rows.append(Error(stage, largest, relative))
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
  print(f"{'stage':18}{'largest error':>16}{'in std':>14}  bound")
  for row in report.errors:
    unit = "" if row.absolute else " std"
    bound = f"{row.bound:.0e}{unit}{'' if row.held else ', exceeded'}"
    print(f"{row.stage:18}{row.largest:16.2e}{row.relative:14.2e}  {bound}")
  if report.agreement is not None:
    same, tokens = report.agreement
    print(f"{'tokens':18}{f'{same} of {tokens} the same':>30}  all")
  if report.accuracy:
    print(f"\n{'against float32':18}{'mean KL':>10}{'largest KL':>12}{'same tokens':>13}")
    for line in report.accuracy:
      print(f"{line.name:18}{line.mean_kl:10.1e}{line.largest_kl:12.1e}{line.agreement:12.1%}")
  over = ", ".join(report.failed)
  print(
    f"\nFAILED, over the bound: {over}" if over else "\npassed: every stage is within its bound"
  )
