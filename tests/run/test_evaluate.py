"""eval.py's work on a small trained model: every utterance decoded, scored and written."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

import mooer_jax.run.decoding
from mooer_jax.data.readers.entries import SkippedUtterance
from mooer_jax.data.readers.shards import read_list
from mooer_jax.evaluation.text_files import read_text
from mooer_jax.run.config import EvalConfig
from mooer_jax.run.decoding import DecodingResults, out_folder
from mooer_jax.text.tokenizer import Tokenizer
from tests.run.programs import evaluate, train


def test_evaluation_decodes_all_and_scores(config, data_list, tmp_path):
  config.train.steps = 12
  train(config)
  config.eval.out = str(tmp_path / "scored")
  scores, bleu = evaluate(config, config.workdir)
  assert bleu is None
  written = read_text(tmp_path / "scored" / "text")
  assert len(written) == 24 == len(scores["character"].utterances)
  report = json.loads((tmp_path / "scored" / "report.json").read_text("utf-8"))
  assert report["config"]["metric"] == "character"
  assert report["reference_tokens"] == 48  # two digits each
  assert (tmp_path / "scored" / "report.txt").exists()

  # The same with references in a file, one of which no clip belongs to.
  references = tmp_path / "text"
  lines = [f"{key}\t31" for key in written] + ["nobody\t31"]
  references.write_text("\n".join(lines) + "\n", "utf-8")
  config.eval.references = str(references)
  again, _ = evaluate(config, config.workdir)
  assert again["character"].missing == ("nobody",)
  assert again["character"].counts.reference == 50


def test_translations_are_scored_with_sacrebleu_and_transcripts_beside_them(
  config, clips, tmp_path, capsys, monkeypatch
):
  config.model.prompts = {"asr": "<|transcribe|>", "asr_ast_mtl": "<|transcribe|>"}
  config.train.steps = 2
  train(config)
  config.eval.task, config.eval.out = "asr_ast_mtl", str(tmp_path / "scored")
  heard = "12\nthe cat sat on the mat"
  monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: heard)
  config.eval.references = str(tmp_path / "text")
  keys = [f"{clip.key}-{copy}" for clip in clips for copy in range(4)]
  text = "13\\nthe cat sat on a mat"
  Path(config.eval.references).write_text("".join(f"{key}\t{text}\n" for key in keys), "utf-8")
  scores, bleu = evaluate(config, config.workdir)
  assert scores["character"].rate == 0.5
  expected = sacrebleu.sentence_bleu("the cat sat on the mat", ["the cat sat on a mat"])
  np.testing.assert_allclose(bleu.score, expected.score, rtol=1e-6)
  assert bleu.signature in capsys.readouterr().out
  report = json.loads((tmp_path / "scored" / "report.json").read_text("utf-8"))
  assert report["details"]["bleu"]["score"] == bleu.score

  Path(config.eval.references).write_text("".join(f"{key}\t13\n" for key in keys), "utf-8")
  with pytest.raises(ValueError, match=r"no translation: .*KEY<TAB>transcript\\ntranslation"):
    evaluate(config, config.workdir)


def test_a_task_of_ones_own_has_bleu_where_its_language_is_given(config, tmp_path):
  config.model.prompts = {"to_klingon": "<|transcribe|>"}
  config.data.task = config.eval.task = "to_klingon"
  config.train.steps = 2
  train(config)
  config.eval.out = str(tmp_path / "scored")
  assert evaluate(config, config.workdir)[1] is None
  config.eval.bleu_tokenize = "char"
  scores, bleu = evaluate(config, config.workdir)
  assert "tok:char" in bleu.signature and bleu.utterances == len(scores["word"].utterances)


def test_what_is_wrong_is_said_before_anything_is_decoded(config, tmp_path, monkeypatch):
  config.train.steps = 2
  folder = train(config)
  monkeypatch.setattr(mooer_jax.run.decoding, "decode_batches", None)  # must not run
  config.eval.references = str(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"eval\.references=.*nowhere"):
    evaluate(config, config.workdir)
  (tmp_path / "text").write_text("somebody\telse\n", "utf-8")
  config.eval.references, config.eval.out = str(tmp_path / "text"), str(tmp_path)
  with pytest.raises(ValueError, match=r"would be overwritten by the hypotheses: set eval\.out"):
    evaluate(config, config.workdir)
  config.eval.references = config.eval.out = ""
  config.eval.bleu_tokenize = "cn"
  with pytest.raises(ValueError, match="tokenize='cn': choose one of"):
    evaluate(config, config.workdir)
  config.eval.bleu_tokenize = "13a"
  with pytest.raises(ValueError, match="bleu_tokenize='13a' has no effect: the task 'asr'"):
    evaluate(config, config.workdir)
  config.eval.task = ""
  with pytest.raises(ValueError, match=r"one task; set eval\.task"):
    evaluate(config, config.workdir)
  config.eval.bleu_tokenize, config.eval.task = "", "asr"
  config.eval.max_s = 60.0
  with pytest.raises(ValueError, match=r"eval\.max_s=60 .*5 s"):
    evaluate(config, config.workdir)
  config.eval.max_s = None
  config.eval.lora_scale = 0.5
  with pytest.raises(ValueError, match="lora_scale=0.5 has no effect: the model has no LoRA"):
    evaluate(config, config.workdir)
  config.eval.lora_scale = None
  shards, config.eval.shards = config.eval.shards, ""
  with pytest.raises(ValueError, match="eval.shards is missing"):
    evaluate(config, config.workdir)
  config.eval.shards = shards
  bare = tmp_path / "model"
  folder.rename(bare)
  with pytest.raises(ValueError, match=r"eval\.out"):
    evaluate(config, str(bare))


def test_texts_that_no_evaluation_wrote_are_not_overwritten(tmp_path):
  packed, other, scored = (tmp_path / name for name in ("packed", "other", "scored"))
  for folder, names in (
    (packed, ("data.list", "text", "report.json")),
    (other, ("text",)),
    (scored, ("text", "report.json")),
  ):
    folder.mkdir()
    for name in names:
      (folder / name).touch()
  for folder in (packed, other):
    with pytest.raises(ValueError, match=rf"eval\.out={folder} holds .*set eval\.out to another"):
      out_folder(EvalConfig(out=str(folder)), tmp_path, "name")
  assert out_folder(EvalConfig(out=str(scored)), tmp_path, "name") == scored


def test_results_are_written_neither_to_a_file_nor_into_a_checkpoint(tmp_path):
  (tmp_path / "checkpoint.json").touch()
  for out in (tmp_path, tmp_path / "new" / "eval"):
    with pytest.raises(ValueError, match="is in the checkpoint .*; set another folder"):
      out_folder(EvalConfig(out=str(out)), tmp_path, "name")
  with pytest.raises(ValueError, match="checkpoint.json: is not a folder; choose another one"):
    out_folder(EvalConfig(out=str(tmp_path / "checkpoint.json")), tmp_path, "name")


def test_utterances_whose_scores_are_not_finite_are_not_decoded(config, monkeypatch):
  config.train.steps = 2
  train(config)
  real = mooer_jax.run.decoding.decode_batches
  broken = slice(0, 1)

  def decode_batches(*arguments, **options):
    for host, output in real(*arguments, **options):
      scores_BR = output.scores_BR.copy()
      scores_BR[broken] = np.nan
      yield host, output.replace(scores_BR=scores_BR)

  monkeypatch.setattr(mooer_jax.run.decoding, "decode_batches", decode_batches)
  scores, _ = evaluate(config, config.workdir)
  scored = Path(config.workdir) / "eval" / Path(config.eval.shards).parent.name
  report = json.loads((scored / "report.json").read_text("utf-8"))
  told = report["details"]["not_decoded"]
  assert 1 <= len(told) < 24 and len(told) == len(scores["word"].missing)
  assert all(line.endswith(": scores not finite") for line in told)
  broken = slice(None)
  with pytest.raises(
    ValueError, match="none of 24 utterances .* the model's scores are not finite"
  ):
    evaluate(config, config.workdir)


def test_a_rate_without_reference_tokens_is_null_and_nothing_is_lost(config, tmp_path):
  config.train.steps = 2
  train(config)
  evaluate(config, config.workdir)
  scored = Path(config.workdir) / "eval" / Path(config.eval.shards).parent.name
  hypotheses = read_text(scored / "text")
  config.eval.references = str(tmp_path / "text")
  lines = "".join(f"{key}\t!\n" for key in hypotheses)
  Path(config.eval.references).write_text(lines, "utf-8")
  evaluate(config, config.workdir)
  report = json.loads((scored / "report.json").read_text("utf-8"))
  assert report["details"]["rates"]["mixed"] is None
  assert read_text(scored / "text") == hypotheses


def test_of_longer_clips_the_beginning_is_heard_where_that_is_asked_for(config, capsys):
  config.train.steps = 2
  train(config)
  config.eval.max_s = 1.0
  for cut, heard in ((False, 16), (True, 24)):
    config.eval.truncate = cut
    evaluate(config, config.workdir)
    scored = Path(config.workdir) / "eval" / Path(config.eval.shards).parent.name
    report = json.loads((scored / "report.json").read_text("utf-8"))
    assert len(report["details"]["not_decoded"]) == 24 - heard
    assert len(read_text(scored / "text")) == heard
    assert (
      "8 clips were truncated to eval.max_s (eval.truncate)" in capsys.readouterr().out
    ) == cut


def test_annotations_of_one_folder_are_scored_apart(config, clips, tmp_path):
  config.train.steps = 2
  train(config)
  for name in ("one", "two"):
    entries = [{"path": str(clip.path), "text": clip.text, "task": "asr"} for clip in clips]
    (tmp_path / f"{name}.json").write_text(json.dumps({"annotation": entries}), "utf-8")
  (tmp_path / "text").write_text("somebody\telse\n", "utf-8")  # not these files' references
  scored = Path(config.workdir) / "eval"
  for name in ("one", "two"):
    config.eval.shards, config.eval.task = str(tmp_path / f"{name}.json"), ""
    scores, _ = evaluate(config, config.workdir)
    assert len(scores["word"].utterances) == len(clips)
    assert (scored / f"{tmp_path.name}-{name}" / "tasks.json").exists()
  config.eval.task = "asr"
  evaluate(config, config.workdir)
  assert not (
    scored / f"{tmp_path.name}-two/tasks.json"
  ).exists()  # the report beside it is another
  assert (scored / f"{tmp_path.name}-one/tasks.json").exists()


def test_a_wrong_checkpoint_is_named(config, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    evaluate(config, str(tmp_path / "nowhere"))
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    evaluate(config, str(tmp_path))


@pytest.mark.all_devices
def test_the_mesh_changes_no_hypothesis(config, tmp_path):
  """On 8 devices as data=8, with a batch of 5 rows that it does not divide, and with tensor=2."""
  config.train.steps = 2
  train(config)
  config.data.buckets = (84,)  # one program for each mesh
  texts = []
  for sizes, rows in (({"data": 8}, 5), ({"data": 2, "fsdp": 2, "tensor": 2}, 8)):
    config.mesh.update(sizes)
    config.eval.batch_size, config.eval.out = rows, str(tmp_path / f"rows_{rows}")
    evaluate(config, config.workdir)
    texts.append(read_text(tmp_path / f"rows_{rows}" / "text"))
  assert texts[0] == texts[1] and len(texts[0]) == 24
  config.mesh.update({"data": 3})
  with pytest.raises(ValueError, match=r"mesh\.data=3, .* the number of devices, 8"):
    evaluate(config, config.workdir)


def test_the_list_is_what_pack_wrote(data_list):
  assert [Path(p).name for p in read_list(data_list)] == [f"shards_{i:09d}.tar" for i in range(4)]


def test_results_are_in_the_same_order_for_any_number_of_processes():
  """Entry n of 8 is read by process n % count; every third cannot be decoded."""

  def joined(count):
    parts = []
    for process in range(count):
      results, places = DecodingResults(), {}
      for number in range(process, 8, count):
        key = f"u{(5 * number) % 8}"  # keys are not in the order of the shards
        results.transcripts[key] = str(number)
        if number % 3:
          results.hypotheses[key], places[key] = str(number), (0, number)
        else:
          results.skipped.append(SkippedUtterance("no audio", key, "a.tar"))
      parts.append((dataclasses.asdict(results), places))
    return mooer_jax.run.decoding._join(parts)

  one = joined(1)
  assert [skip.key for skip in one.skipped] == ["u0", "u6", "u7"]
  for count in (2, 3, 8):
    assert joined(count) == one
    assert [*joined(count).transcripts] == [*one.transcripts]
