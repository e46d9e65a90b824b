"""The demo's driver: it redoes what changed, keeps what did not, and says when it did not learn."""

import pytest

from demo.digits import failures
from demo.stages import Stages, fingerprint


def _steps(folder, inputs, log, fail=None):
  def work(name):
    def run():
      (folder / name).mkdir(exist_ok=True)
      log.append((name, sorted(path.name for path in (folder / name).iterdir())))
      (folder / name / "partial").touch()
      if name == fail:
        raise RuntimeError(name)

    return run

  stages = Stages(folder)
  for name in ("a", "b", "c"):
    stages.run(name, work(name), makes=folder / name, inputs=inputs[name], resumable=name == "b")
  return stages


@pytest.fixture
def inputs():
  return {"a": "1", "b": "1", "c": "1"}


def test_finished_steps_are_not_run_again(tmp_path, inputs):
  log = []
  assert _steps(tmp_path, inputs, log).redone == ["a", "b", "c"]
  assert _steps(tmp_path, inputs, log).redone == []
  assert len(log) == 3


def test_a_changed_input_redoes_the_step_and_all_after_it(tmp_path, inputs):
  log = []
  _steps(tmp_path, inputs, log)
  assert _steps(tmp_path, {**inputs, "b": "2"}, log).redone == ["b", "c"]
  assert log[-2:] == [("b", []), ("c", [])]  # and they start from empty folders


def test_a_missing_result_redoes_the_step(tmp_path, inputs):
  _steps(tmp_path, inputs, [])
  (tmp_path / "c" / "partial").unlink()
  (tmp_path / "c").rmdir()
  assert _steps(tmp_path, inputs, []).redone == ["c"]


@pytest.mark.parametrize("failed, found", [("b", ["partial"]), ("c", [])])
def test_only_a_resumable_step_goes_on_from_an_interrupted_run(tmp_path, inputs, failed, found):
  with pytest.raises(RuntimeError, match=failed):
    _steps(tmp_path, inputs, [], fail=failed)
  log = []
  _steps(tmp_path, inputs, log)
  assert log[0] == (failed, found)


def test_a_fingerprint_follows_values_and_contents(tmp_path):
  file = tmp_path / "file"
  file.write_text("1")
  before = fingerprint({"a": 1}, [file])
  assert fingerprint({"a": 1}, [file]) == before
  assert fingerprint({"a": 2}, [file]) != before
  file.write_text("2")
  assert fingerprint({"a": 1}, [file]) != before


def _report(**changes):
  utterances = [{"hypothesis": "12"}, {"hypothesis": ""}]
  report = {
    "loss_first": 2.0, "loss_last": 0.5, "cer": 0.04, "goal_cer": 0.05, "utterances": utterances,
    "transcribed": {"text": "12"},
  }  # fmt: skip
  return {**report, **changes}


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"loss_last": 1.01}, "did not fall by half"),
    ({"loss_last": float("nan")}, "did not fall by half"),
    ({"cer": 0.06}, "CER is 6.00 %"),
    ({"cer": None}, "CER is undefined"),
    ({"utterances": [{"hypothesis": "1"}, {"hypothesis": None}]}, "no transcript"),
    ({"utterances": [{"hypothesis": ""}]}, "every transcript is empty"),
    ({"transcribed": {"text": ""}}, "empty transcript"),
  ],
)
def test_a_run_that_did_not_learn_is_a_failure(changes, message):
  [found] = failures(_report(**changes))
  assert message in found


def test_a_run_that_learned_is_none():
  assert failures(_report(cer=0.0)) == []
