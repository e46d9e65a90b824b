"""Each of SALMONN's tasks scored by hand and by independent packages."""

import io
import json

import jiwer
import pytest
import sacrebleu
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer

from mooer_jax.evaluation import translation
from mooer_jax.projects.salmonn.scorers import Scored, error_rate, phone_error_rate
from mooer_jax.projects.salmonn.tasks import ROWS, as_dict, notes, score_task, table
from mooer_jax.prompts import SALMONN_PROMPTS

ROW = {row.stem: row for row in ROWS}


def _entries(*texts, **more):
  return {f"k{i}": {"path": f"{i}.wav", "text": text, **more} for i, text in enumerate(texts)}


def _answers(*texts):
  return {f"k{i}": text for i, text in enumerate(texts) if text is not None}


def test_the_suite_is_the_published_one():
  assert len({row.task for row in ROWS}) == 15 and len(ROWS) == len(ROW) == 17
  assert [sum(row.level == n for row in ROWS) for n in (1, 2, 3)] == [10, 5, 2]
  for row in ROWS:
    assert row.higher_is_better == (row.scorer not in (error_rate, phone_error_rate))
  assert [row.figures for row in ROWS if row.task == "asr"] == [
    (("WER", 2.1, 2.1),),
    (("WER", 4.9, 4.9),),
    (("WER", 9.1, 10.0),),
  ]
  assert ROW["sac"].following == (0.04, 0.73)


def test_the_documentation_names_every_file_task_and_figure(repo_root):
  page = (repo_root / "docs/salmonn.md").read_text("utf-8")
  rows = [line.strip("| \n").split(" | ") for line in page.splitlines() if ".json | " in line]
  documented = [(file, task, metric, published) for file, task, _, metric, published in rows]
  assert documented == [
    (
      row.file,
      row.task,
      "; ".join(row.metrics),
      "; ".join(
        f"{without:.2f}, {tuned:.2f}" if metric in ("accuracy", "diversity")
        else f"{without}, {tuned}"
        for metric, without, tuned in row.figures
      ),
    )
    for row in ROWS
  ]  # fmt: skip


def test_every_task_has_its_prompt():
  prompts = json.loads(SALMONN_PROMPTS.read_text("utf-8"))
  assert {row.task for row in ROWS} <= prompts.keys()


@pytest.mark.parametrize("stem", ["librispeech_test_clean", "librimix"])
def test_word_error_rate_is_of_the_corpus_and_blind_to_case_and_marks(stem):
  entries = _entries("Hello, world! It's me.", "one two three four", "never heard")
  scored = score_task(ROW[stem], entries, _answers("hello world it's I", "one two three", None))
  expected = jiwer.wer(
    ["hello world it's me", "one two three four", "never heard"],
    ["hello world it's i", "one two three", ""],
  )
  assert scored.values == (pytest.approx(100 * expected),)
  assert scored.count == 3 and "1 of 3 entries have no answer, first k2" in scored.notes[0]


def test_phone_error_rate_is_of_phones():
  entries = _entries("HH AH0 L OW1", "W ER1 L D")
  scored = score_task(ROW["librispeech_phones"], entries, _answers("hh ah0 l ow0", "W ER1 D"))
  assert scored.values == (pytest.approx(25.0),)


def test_references_without_tokens_have_no_rate():
  scored = score_task(ROW["librimix"], _entries("..."), _answers("word"))
  assert scored.values == (None,) and "no tokens" in scored.notes[0]


@pytest.mark.parametrize(
  "stem, tokenize, reference, answer",
  [
    ("covost2_en_zh", "zh", "今天天气很好我们去公园", "今天天气很好我们去学校"),
    ("covost2_en_de", "13a", "Das ist ein kleiner Test.", "Das ist ein kleiner Hund."),
  ],
)
def test_translations_are_scored_by_sacrebleu(stem, tokenize, reference, answer):
  scored = score_task(ROW[stem], _entries(reference), _answers(answer))
  expected = sacrebleu.corpus_bleu([answer], [[reference]], tokenize=tokenize).score
  assert 0 < expected < 100 and scored.values == (pytest.approx(expected),)
  assert f"tok:{tokenize}" in scored.notes[-1]


def test_japanese_without_mecab_is_scored_by_characters_and_says_so(monkeypatch):
  monkeypatch.setattr(translation, "has_mecab", lambda: False)
  reference, answer = "今日はとても良い天気です", "今日はとても寒い天気です"
  scored = score_task(ROW["covost2_en_ja"], _entries(reference), _answers(answer))
  expected = sacrebleu.corpus_bleu([answer], [[reference]], tokenize="char").score
  assert scored.values == (pytest.approx(expected),)
  assert "sacrebleu[ja]" in scored.notes[0] and "tok:char" in scored.notes[1]


def test_music_has_bleu_and_rouge():
  references = ["A slow piano ballad with soft strings", "fast drums and loud guitars play"]
  given = ["a slow piano ballad with strings", "fast drums and loud guitars"]
  scored = score_task(ROW["musiccaps"], _entries(*references), _answers(*given))
  scorer = RougeScorer(["rougeL"])
  rouge = [scorer.score(r, h)["rougeL"].fmeasure for r, h in zip(references, given)]
  expected = sacrebleu.corpus_bleu(given, [references]).score
  assert scored.values == (pytest.approx(expected), pytest.approx(50 * sum(rouge)))


def test_captions_need_a_tools_scores():
  row, entries, given = ROW["audiocaps"], _entries("a dog barks"), _answers("a dog")
  scored = score_task(row, entries, given)
  assert scored.values == (None, None) and "write audiocaps.scores.json" in scored.notes[0]
  scored = score_task(row, entries, given, scores={"METEOR": 0.25, "SPIDEr": 0.4})
  assert scored.values == (25.0, 40.0)


def test_emotions_and_yes_or_no():
  entries = _entries("Angry", "happiness", "sad", "Neutral")
  scored = score_task(ROW["iemocap"], entries, _answers("anger", "excited", "no idea", None))
  assert scored.values == (0.5,)
  assert any("1 answers name none or several" in note for note in scored.notes)
  entries = _entries("Yes", "No", "no")
  scored = score_task(
    ROW["voxceleb1"], entries, _answers("Yes, no doubt", "No.", "They are the same: yes")
  )
  assert scored.values == (pytest.approx(2 / 3),)


@pytest.mark.parametrize(
  "stem, text", [("iemocap", "frustrated"), ("voxceleb1", ""), ("inspec", ","), ("slurp", "?")]
)
def test_a_reference_of_another_kind_is_named(stem, text):
  with pytest.raises(ValueError, match=f"{stem}.json: k0"):
    score_task(ROW[stem], _entries(text), _answers("yes"))


def test_keywords_are_averaged_over_entries():
  entries = _entries("a, b, c, d", "x, y, z")
  scored = score_task(ROW["inspec"], entries, _answers("a, b, q", "x, y, z"))
  assert scored.values == (pytest.approx(5 / 6),)


def test_spoken_questions_are_judged_never_guessed():
  row, entries = ROW["wikiqa"], _entries("Shakespeare", "Paris")
  given = _answers("Shakespeare wrote it", "Paris")
  scored = score_task(row, entries, given)
  assert scored.values == (None,) and scored.following_rate is None
  assert all("wikiqa.judgements.json" in note for note in scored.notes)

  judged = {"k0": {"follows": True, "correct": True}, "k1": {"follows": False, "correct": False}}
  scored = score_task(row, entries, given, judgements=judged)
  assert (scored.values, scored.following_rate) == ((0.5,), 0.5)

  heard = _entries("Shakespeare", "Paris", transcript="who wrote hamlet for the king")
  scored = score_task(row, heard, _answers("Who wrote Hamlet for the king?", "It was he"))
  assert (scored.values, scored.following_rate) == ((None,), 0.5)


def test_a_slot_in_the_transcript_is_no_answer():
  row, said = ROW["slurp"], "wake me up at five am tomorrow"
  given = _answers("Five am.", "Wake me up at five am tomorrow", "The time is five am", None)
  plain = score_task(row, _entries(*["five am"] * 4), given)
  assert plain.values == (0.25,) and plain.following_rate is None  # a sentence cannot be told
  heard = score_task(row, _entries(*["five am"] * 4, transcript=said), given)
  assert heard.values == (0.5,) and heard.following_rate == 0.5
  judged = {key: {"follows": True, "correct": True} for key in given}
  scored = score_task(row, _entries(*["five am"] * 4), given, judgements=judged)
  assert scored.values == (0.75,) and scored.following_rate == 0.75


def test_stories_are_counted_by_different_words():
  row, entries = ROW["audiocaps_story"], _entries("", "")
  scored = score_task(row, entries, _answers("A dog barks. The dog barks at a cat!", ""))
  assert scored.values == (3.0,)
  given = _answers("A dog barks.", "a dog and a dog")
  scored = score_task(row, entries, given)
  assert scored.values == (3.0,) and scored.following_rate is None
  judged = {"k0": {"follows": False}, "k1": {"follows": True}}
  assert score_task(row, entries, given, judgements=judged).following_rate == 0.5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.stem)
def test_no_answers_at_all_give_no_figure(row):
  scored = score_task(row, _entries("yes"), {})
  assert scored.values == (None,) * len(row.metrics) and scored.notes == ("no entry has an answer",)
  with pytest.raises(ValueError, match=f"{row.file}: no entries"):
    score_task(row, {}, {})


def test_entries_of_another_task_are_refused():
  with pytest.raises(ValueError, match="sac.json: k0 has task='QA'.*'speech_audio_coreasoning'"):
    score_task(ROW["sac"], _entries("x", task="QA"), _answers("y"))


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
  rows = {row.file: json.loads(json.dumps(as_dict(row, RESULTS[row.stem]))) for row in ROWS}
  assert rows["audiocaps.json"]["metrics"]["SPIDEr"] == {
    "measured": None,
    "published": 47.6,
    "activation_tuned": 40.3,
  }
  assert rows["sac.json"]["not_run"] == "no sac.json"
  assert rows["audiocaps_story.json"]["following_rate"]["measured"] == 0.0
  assert rows["audiocaps.json"]["not_run"] is rows["audiocaps.json"]["following_rate"] is None
