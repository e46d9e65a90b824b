import io
import json

from rich.console import Console

from mooer_jax.evaluation.salmonn_suite import ROWS
from mooer_jax.evaluation.suite_report import as_dict, notes, table
from mooer_jax.evaluation.task_scorers import Scored

RESULTS = {row.stem: f"no {row.file}" for row in ROWS} | {
  "librispeech_test_clean": Scored((2.345,), None, 2620, ("lower [case]",)),
  "audiocaps": Scored((25.0, None), None, 10, ()),
  "slurp": Scored((0.4,), None, 7, ()),
  "audiocaps_story": Scored((80.0,), 0.0, 7, ()),
}


def _printed():
  text = io.StringIO()
  Console(file=text, width=200).print(table(ROWS, RESULTS))
  return [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]


def test_measured_stands_beside_published():
  lines = _printed()
  assert "1 ASR, LibriSpeech test-clean WER ↓ 2,620 2.3 2.1 2.1" in lines
  assert "1 audio captioning, AudioCaps METEOR ↑ 10 25.0 25.6 24.0" in lines
  assert "SPIDEr ↑ 10 – 47.6 40.3" in lines
  assert "2 slot filling, SLURP accuracy ↑ (following) 7 0.40 (–) 0.33 (0.77) 0.41 (0.99)" in lines
  story = "diversity ↑ (following) 7 80.00 (0.00) 7.77 (0.00) 82.57 (1.00)"
  assert f"3 storytelling, AudioCaps {story}" in lines
  assert any("– no sac.json 0.02 (0.04) 0.50 (0.73)" in line for line in lines)


def test_notes_and_json_hold_the_reasons():
  assert notes(ROWS, RESULTS) == ["ASR, LibriSpeech test-clean: lower [case]"]
  rows = {row["file"]: row for row in json.loads(json.dumps(as_dict(ROWS, RESULTS)))}
  assert rows["audiocaps.json"]["metrics"]["SPIDEr"] == {
    "measured": None,
    "published": 47.6,
    "activation_tuned": 40.3,
  }
  assert rows["sac.json"]["not_run"] == "no sac.json"
  assert rows["audiocaps_story.json"]["following_rate"]["measured"] == 0.0
  assert rows["audiocaps.json"]["not_run"] is rows["audiocaps.json"]["following_rate"] is None
