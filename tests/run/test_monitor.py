"""What a run says about the clips that it was given."""

import numpy as np

from mooer_jax.data.batching import HostBatch
from mooer_jax.run.monitor import Monitor


def _run(workdir, seconds, cut_s, first=0):
  with Monitor(workdir, first, first + 1, 1, cut_s=cut_s) as monitor:
    metrics = dict(step=first + 1, loss=1.0, accuracy=0.5, lr=1e-3)
    batch = HostBatch(None, ("a",) * len(seconds), (), (), seconds, ())  # type: ignore[arg-type]
    monitor.record({name: np.asarray(value) for name, value in metrics.items()}, batch)


def test_clips_that_were_cut_are_counted_over_a_runs_parts(tmp_path, capsys):
  _run(tmp_path, (30.0, 2.0, 30.0), 30.0)
  _run(tmp_path, (30.0, 5.0), 30.0, first=1)
  said = capsys.readouterr().err
  assert "  cut 2" in said and "  cut 1" in said
  assert "clips cut to 30 s or just as long (data.cut_longer): 2" in said
  assert "clips cut to 30 s or just as long (data.cut_longer): 3" in said
  _run(tmp_path / "none", (30.0,), None)
  said = capsys.readouterr().err
  assert "clips cut" not in said and "  cut" not in said
