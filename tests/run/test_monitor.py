"""What a run says about the clips that it was given."""

import numpy as np

from mooer_jax.data.batches import HostBatch
from mooer_jax.run.monitor import Monitor


def _run(workdir, cut, first=0):
  with Monitor(workdir, first, first + 1, 1) as monitor:
    metrics = dict(step=first + 1, loss=1.0, accuracy=0.5, lr=1e-3)
    batch = HostBatch(None, ("a",), (), (), (30.0,), (), cut)  # type: ignore[arg-type]
    monitor.record({name: np.asarray(value) for name, value in metrics.items()}, batch)


def test_clips_that_were_cut_are_counted_over_a_runs_parts(tmp_path, capsys):
  _run(tmp_path, cut=2)
  _run(tmp_path, cut=1, first=1)
  said = capsys.readouterr().err
  assert "  cut 2" in said and "  cut 1" in said
  assert "clips cut to data.max_s, their texts whole: 2" in said
  assert "clips cut to data.max_s, their texts whole: 3" in said
  _run(tmp_path / "none", cut=0)
  said = capsys.readouterr().err
  assert "clips cut" not in said and "  cut" not in said
