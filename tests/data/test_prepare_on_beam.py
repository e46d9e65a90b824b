"""Preparation on Apache Beam, with its runner for one machine; `make beam` installs it."""

import pytest

from mooer_jax import cli
from mooer_jax.data import prepare as module
from tests.data.test_prepare import entries, run

pytestmark = pytest.mark.nightly
pytest.importorskip("apache_beam", reason="no apache_beam: `make beam` installs it and runs this")

OPTIONS = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode="


def command(shards, out, mode):
  options = f"--beam-options={OPTIONS}{mode}"
  return ["data", "prepare", str(shards.list), f"--out={out}", options]


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading", "multi_processing"])
def test_a_pipeline_prepares_the_same(tmp_path, shards, mode, capsys):
  for count in (2, 0, 3):
    shards.add(count)
  shards.add_members([("a.wav", b"")])
  assert cli.main(command(shards, tmp_path / "out", mode)) == 0
  said = capsys.readouterr().out
  assert "5 utterances in 4 files" in said and "1 left out (no transcript: 1)" in said
  run(shards.list, tmp_path / "same")
  assert entries(tmp_path / "out") == entries(tmp_path / "same")


def test_a_pipeline_resumes_after_an_error(tmp_path, shards, monkeypatch):
  for count in (2, 3, 2):
    shards.add(count)
  whole = module.read
  with monkeypatch.context() as patched:
    patched.setattr(module, "read", lambda name: whole(name) if "2.tar" not in name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
      run(shards.list, tmp_path / "out")
  kept = {
    path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("speech*")
  }
  assert len(kept) == 2
  assert cli.main(command(shards, tmp_path / "out", "in_memory")) == 0
  assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
  assert entries(tmp_path / "out") == entries(shards.list)
