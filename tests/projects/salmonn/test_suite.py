"""The suite on made-up annotations, with a decoder that answers what it is told."""

import json

import pytest

from mooer_jax.data.readers.annotation import entry_key
from mooer_jax.evaluation.text_files import read_text
from mooer_jax.projects.salmonn.suite import run_suite
from mooer_jax.projects.salmonn.tasks import ROWS


class Decoder:
  """Answers each entry with its reference, or with what `says` holds for the file."""

  def __init__(self, says=None):
    self.says, self.calls = says or {}, []

  def __call__(self, path):
    self.calls.append(path.name)
    entries = json.loads(path.read_text("utf-8"))["annotation"]
    texts = self.says.get(path.name, [entry["text"] for entry in entries])
    pairs = zip(enumerate(entries), texts)
    return {entry_key(n, entry): text for (n, entry), text in pairs if text is not None}


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "annotations"
  path.mkdir()
  return path


def _write(folder, name, *texts, **more):
  entries = [{"path": f"a clip/{i} x.wav", "text": text, **more} for i, text in enumerate(texts)]
  (folder / name).write_text(json.dumps({"annotation": entries}), "utf-8")


def _read(path):
  return json.loads(path.read_text("utf-8"))


def test_what_is_there_is_scored_and_what_is_not_is_said(folder, tmp_path, capsys):
  _write(folder, "librispeech_test_clean.json", "one two three four", "Five.")
  _write(folder, "iemocap.json", "sad", "happy")
  (folder / "mine.json").write_text("{}")
  decoder = Decoder({"librispeech_test_clean.json": ["one two three", "five"]})
  results = run_suite(folder, tmp_path / "out", decoder, identity="step 7")
  assert results["librispeech_test_clean"].values == (pytest.approx(20.0),)
  assert results["iemocap"].values == (1.0,)
  assert results["sac"] == "no sac.json" and len(results) == len(ROWS)
  assert decoder.calls == ["librispeech_test_clean.json", "iemocap.json"]

  report = _read(tmp_path / "out/suite.json")
  assert report["identity"] == "step 7"
  assert [name.endswith("mine.json") for name in report["unknown_files"]] == [True]
  text = (tmp_path / "out/suite.txt").read_text("utf-8")
  assert "20.0" in text and "no sac.json" in text and "not read: " in text
  assert capsys.readouterr().out == text
  assert read_text(tmp_path / "out/hypotheses/iemocap.text") == {
    "0000000-0_x": "sad",
    "0000001-1_x": "happy",
  }


def test_a_second_run_decodes_only_what_is_lacking(folder, tmp_path):
  _write(folder, "iemocap.json", "sad", "happy", "angry")
  decoder = Decoder({"iemocap.json": ["sad\nor sad", None, "happy"]})  # one clip was not readable
  first = run_suite(folder, tmp_path / "out", decoder)
  _write(folder, "voxceleb1.json", "yes")
  second = run_suite(folder, tmp_path / "out", decoder)
  assert decoder.calls == ["iemocap.json", "voxceleb1.json"]
  assert first["iemocap"] == second["iemocap"]
  assert first["iemocap"].values == (pytest.approx(1 / 3),)


def test_a_run_that_was_cut_off_keeps_what_was_done(folder, tmp_path):
  _write(folder, "iemocap.json", "sad")
  _write(folder, "voxceleb1.json", "yes")

  def cut_off(path):
    if path.name == "voxceleb1.json":
      raise KeyboardInterrupt
    return Decoder()(path)

  with pytest.raises(KeyboardInterrupt):
    run_suite(folder, tmp_path / "out", cut_off)
  assert "not run yet" in (tmp_path / "out/suite.txt").read_text("utf-8")
  decoder = Decoder()
  run_suite(folder, tmp_path / "out", decoder)
  assert decoder.calls == ["voxceleb1.json"]


def test_answers_of_another_model_or_annotation_are_not_mixed(folder, tmp_path):
  _write(folder, "iemocap.json", "sad")
  run_suite(folder, tmp_path / "out", Decoder(), identity="a")
  with pytest.raises(ValueError, match=r"iemocap\.text: .*remove the file"):
    run_suite(folder, tmp_path / "out", Decoder(), identity="b")
  _write(folder, "iemocap.json", "sad", "happy")
  with pytest.raises(ValueError, match=r"iemocap\.text: .*remove the file"):
    run_suite(folder, tmp_path / "out", Decoder(), identity="a")


def test_judgements_and_scores_are_read_beside_the_answers(folder, tmp_path):
  out = tmp_path / "out"
  _write(folder, "sac.json", "a dog", "rain", Q="What is it?")
  _write(folder, "audiocaps.json", "a dog barks")
  decoder = Decoder({"sac.json": ["It is a dog.", "I cannot tell"]})
  first = run_suite(folder, out, decoder)
  assert first["sac"].values == (None,) and first["audiocaps"].values == (None, None)

  sheet = _read(out / "to_judge/sac.json")
  assert [s["answer"] for s in sheet.values()] == ["It is a dog.", "I cannot tell"]
  for key, correct in zip(sheet, (True, False)):
    sheet[key].update(follows=True, correct=correct)
  (out / "sac.judgements.json").write_text(json.dumps(sheet), "utf-8")
  (out / "audiocaps.scores.json").write_text('{"meteor": 0.2, "spider": 0.4}')
  second = run_suite(folder, out, decoder)
  assert (second["sac"].values, second["sac"].following_rate) == ((0.5,), 1.0)
  assert second["audiocaps"].values == (20.0, 40.0)
  assert len(decoder.calls) == 2 and _read(out / "suite.json")["unknown_files"] == []

  (out / "hypotheses/audiocaps.text").unlink()  # the scores are then of answers that are gone
  with pytest.raises(ValueError, match=r"audiocaps\.scores\.json: .*remove the file"):
    run_suite(folder, out, decoder)


def test_a_misplaced_or_misnamed_file_is_named(folder, tmp_path):
  _write(folder, "audiocaps.json", "a dog barks")
  (folder / "audiocaps.scores.json").write_text('{"METEOR": 0.2, "SPIDEr": 0.4}')
  (tmp_path / "out").mkdir()
  (tmp_path / "out/audiocap.scores.json").write_text("{}")
  run_suite(folder, tmp_path / "out", Decoder())
  misplaced, misnamed = _read(tmp_path / "out/suite.json")["unknown_files"]
  assert misplaced.endswith(f"audiocaps.scores.json (belongs in {tmp_path / 'out'})")
  assert misnamed.endswith("out/audiocap.scores.json")


@pytest.mark.parametrize(
  "name, content, says",
  [
    ("sac.json", "{", "not JSON"),
    ("sac.json", "[]", "must hold a JSON object"),
    ("sac.json", '{"annotation": []}', "no entries"),
    ("sac.json", '{"annotation": [{"path": "a.wav"}]}', r"annotation\[0\] has text=None"),
    ("sac.json", '{"annotation": ["a.wav"]}', r"annotation\[0\]"),
    ("iemocap.json", '{"annotation": [{"path": "a.wav", "text": "bored"}]}', "'bored'"),
    ("other.json", "{}", "none of the suite's annotation files: librispeech_test_clean.json, "),
  ],
)
def test_bad_input_is_refused_before_anything_is_decoded(folder, tmp_path, name, content, says):
  if name != "other.json":
    _write(folder, "librispeech_test_clean.json", "one")
  (folder / name).write_text(content, "utf-8")
  decoder = Decoder()
  with pytest.raises(ValueError, match=says):
    run_suite(folder, tmp_path / "out", decoder)
  assert decoder.calls == []


def test_folders_and_keys_that_do_not_fit_are_named(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    run_suite(tmp_path / "nowhere", tmp_path / "out", Decoder())
  _write(folder, "iemocap.json", "sad")
  with pytest.raises(ValueError, match="iemocap.json: 1 answers belong to no entry, first 'me'"):
    run_suite(folder, tmp_path / "out", lambda path: {"me": "sad"})
  assert not (tmp_path / "out/hypotheses").exists()  # the next run decodes again
