"""The comparison of runs notices deliberate faults."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mooer_jax import hosts
from tests.numerics import exceeds_the_bound
from tests.run.programs import train
from tests.run.runs import assert_close_run, assert_same_run, losses


@pytest.mark.all_devices
def test_wrong_data_of_one_process_are_noticed_in_losses_and_in_moments(config, monkeypatch):
  """The second half of the rows, which would be those of another process, repeats the first."""
  devices = jax.devices()[:4]
  monkeypatch.setattr(jax, "devices", lambda *_: devices)
  config.data.streams, config.train.steps = 4, 2
  right = train(config).parent
  assert_same_run(right, right)
  assert_close_run(right, right)
  place = hosts.from_processes

  def first_half_twice(arrays, sharding):
    return place(jax.tree.map(lambda x: np.concatenate([x[: len(x) // 2]] * 2), arrays), sharding)

  monkeypatch.setattr(hosts, "from_processes", first_half_twice)
  config.workdir += "-wrong"
  wrong = train(config).parent
  for compare in (assert_close_run, assert_same_run):
    with pytest.raises(AssertionError):
      compare(right, wrong)
  with exceeds_the_bound():
    assert_close_run(right, wrong)
  shutil.copy(Path(right) / "metrics.jsonl", wrong)
  assert losses(right) == losses(wrong)
  with exceeds_the_bound():
    assert_close_run(right, wrong)
