"""The LoRA training step beside PyTorch, at small size."""

import numpy as np
import pytest

from benchmarks.train_speed import SIDES, STAGES, Case, labels_of, measure, run
from mooer_jax.encoders.sanm import SANMConfig
from tests.parity import full_release


class Side:
  """A process of a side whose stages take known times; the first calls are slow."""

  def __init__(self, seconds: float, peak_gb: float):
    self.seconds, self.peak_gb, self.calls = seconds, peak_gb, []

  def send(self, stage):
    self.calls.append(stage)

  def recv(self):
    stage = self.calls[-1]
    is_first = self.calls.count(stage) == 1
    seconds = 100.0 if is_first else self.seconds * (1 + STAGES.index(stage))
    return seconds, 5.0 - self.calls.count(stage), self.peak_gb


def test_ratios_are_those_of_the_calls_after_the_first():
  ours, theirs = Side(2.0, 4.0), Side(3.0, 2.0)
  result = measure({"mooer_jax": ours, "pytorch": theirs}, repeats=2)
  assert result["ratios"] == {**dict.fromkeys(STAGES, 1.5), "memory": 0.5}
  assert result["pytorch"]["whole step"] == 9.0 and result["pytorch"]["first_calls_s"] == 300.0
  # Three optimizer steps on each side.
  assert result["mooer_jax"]["losses"] == result["pytorch"]["losses"] == [4.0, 3.0, 2.0]


def test_answers_end_with_the_eos():
  labels_BS = labels_of(Case(clips=3, answer=5), 7)
  assert labels_BS.shape == (3, 5) and (labels_BS[:, -1] == 7).all()
  assert len(np.unique(labels_BS)) > 5


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_both_sides_do_the_same_steps(tmp_path):
  sizes = dict(encoder=SANMConfig(layers=2), sizes=full_release.SMALL)
  # It raises if the losses of the two optimizer steps differ.
  result = run(tmp_path, Case(clips=2, answer=5), 1, **sizes)
  assert set(result["ratios"]) == {*STAGES, "memory"}
  for side in SIDES:
    losses = result[side]["losses"]
    assert len(losses) == 2 and losses[1] < losses[0]
