"""The public class: the same text in any batch, bad clips and arguments are named."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import soundfile

import mooer_jax
from mooer_jax import checkpoint
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.generation.loading import load_model
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.transcribe.clips import read_windows
from mooer_jax.transcribe.transcript import join_transcripts
from tests.numerics import assert_within, exceeds_the_bound, score_rounding


def test_results_follow_the_clips_whatever_the_batch(transcriber, clips):
  paths = [clip.path for clip in clips]
  one_by_one = [transcriber.transcribe([path])[0] for path in paths]
  assert transcriber.transcribe(paths, batch_size=4) == one_by_one
  assert transcriber.transcribe(paths[::-1], batch_size=3) == one_by_one[::-1]
  assert len({tuple(result.tokens) for result in one_by_one}) > 1
  for clip, result in zip(clips, one_by_one, strict=True):
    info = soundfile.info(clip.path)
    assert result.seconds == pytest.approx(info.frames / info.samplerate, abs=1e-3)
    assert result.path == str(clip.path) and result.task == "asr"
    assert result.text == transcriber.tokenizer.decode(result.tokens)
    assert result.finished == (transcriber.tokenizer.eos_id in result.tokens)


def test_an_array_is_transcribed_like_its_file(transcriber, clips):
  from_file, from_array = transcriber.transcribe([clips[0].path, load_audio(clips[0].path)])
  assert from_array.tokens == from_file.tokens and from_array.path is None


def test_the_device_computes_the_features_of_the_same_texts(
  folder, transcriber, clips, monkeypatch
):
  waveforms = [load_audio(clip.path) for clip in clips]
  expected = transcriber.transcribe(waveforms, batch_size=4)
  on_device = mooer_jax.Transcriber.from_checkpoint(folder, features="device")
  monkeypatch.delattr(FrontendConfig, "features")  # nothing is computed in NumPy any more
  results = on_device.transcribe(waveforms, batch_size=4)
  assert [r.tokens for r in results] == [r.tokens for r in expected]
  score, late = (
    sum(r.score for r in on_device.transcribe([np.roll(w, by) for w in waveforms], batch_size=4))
    for by in (0, 1)
  )
  bound = score_rounding(on_device, waveforms)
  assert_within(score, sum(r.score for r in expected), bound)
  with exceeds_the_bound():
    assert_within(late, sum(r.score for r in expected), bound)
  with pytest.raises(ValueError, match="features='gpu': use 'host' or 'device'"):
    mooer_jax.Transcriber.from_checkpoint(folder, features="gpu")


def test_tasks_change_the_prompt(transcriber, clips):
  asr, ast = (transcriber.transcribe([clips[0].path], task=task)[0] for task in ("asr", "ast"))
  assert asr.tokens != ast.tokens
  with pytest.raises(ValueError, match=r"'sing'.*asr.*ast"):
    transcriber.transcribe([clips[0].path], task="sing")


def test_a_checkpoint_that_samples_can_be_transcribed_and_its_seed_decides(transcriber, clips):
  options = dataclasses.replace(transcriber.options, do_sample=True, temperature=3.0)
  sampler = mooer_jax.Transcriber(
    transcriber.params, transcriber.config, transcriber.tokenizer, options
  )
  paths = [clip.path for clip in clips]
  once, again, other = (sampler.transcribe(paths, seed=seed) for seed in (0, 0, 1))
  assert once == again
  assert [result.tokens for result in once] != [result.tokens for result in other]


def test_decoding_options_go_over_those_of_the_checkpoint(transcriber, clips):
  paths = [clip.path for clip in clips]
  greedy = transcriber.transcribe(paths)
  beams = transcriber.transcribe(paths, num_beams=4, length_penalty=2.0)
  assert [b.tokens for b in beams] != [g.tokens for g in greedy]
  with pytest.raises(ValueError, match=r"generation\.num_beems.*num_beams"):
    transcriber.transcribe(paths, num_beems=4)
  with pytest.raises(ValueError, match=r"num_return_sequences=2.*one result"):
    transcriber.transcribe(paths, num_beams=2, num_return_sequences=2)


def test_the_answer_is_cut_off_and_says_so(transcriber, clips):
  whole = transcriber.transcribe([clips[0].path])[0]
  cut = transcriber.transcribe([clips[0].path], max_new_tokens=2)[0]
  assert cut.tokens == whole.tokens[:2] and not cut.finished


def test_a_workdir_stands_for_its_newest_checkpoint(folder, transcriber, clips):
  from_workdir = mooer_jax.Transcriber.from_checkpoint(folder.parent)
  path = [clips[0].path]
  assert from_workdir.transcribe(path) == transcriber.transcribe(path)


@pytest.mark.parametrize(
  "samples, message",
  [
    (np.zeros(16000), "silent"),
    (np.zeros(0), "empty"),
    (np.full(1, 0.5), r"too short to hold speech; this model needs 0\.\d+ s"),
    (0.1 * np.ones(7 * 16000), r"7\.0 s.*at most 6 s; --chunk-length-s 6 \(chunk_length_s=6\)"),
  ],
)
def test_bad_clips_are_refused_by_name(transcriber, tmp_path, samples, message):
  path = tmp_path / "bad clip.wav"
  soundfile.write(path, samples.astype(np.float32), 16000, subtype="FLOAT")
  with pytest.raises(ValueError, match=rf"bad clip\.wav.*{message}"):
    transcriber.transcribe([path])


def test_other_bad_input_is_refused_by_name(transcriber, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere\.wav"):
    transcriber.transcribe([tmp_path / "nowhere.wav"])
  (tmp_path / "noise.wav").write_bytes(b"RIFF of some other kind")
  with pytest.raises(ValueError, match=r"noise\.wav"):
    transcriber.transcribe([tmp_path / "noise.wav"])
  with pytest.raises(ValueError, match=r"audio\[0\].*NaN"):
    transcriber.transcribe([np.full(16000, np.nan, np.float32)])
  with pytest.raises(ValueError, match=r"audio\[0\].*shape"):
    transcriber.transcribe([np.zeros((2, 16000), np.float32)])
  with pytest.raises(ValueError, match="list"):
    transcriber.transcribe("a.wav")


def test_all_bad_clips_are_named_at_once(transcriber, clips, tmp_path):
  (tmp_path / "words.wav").write_text("no audio")
  audio = [clips[0].path, tmp_path / "nowhere.wav", tmp_path / "words.wav", None]
  with pytest.raises(ValueError, match=r"3 of 4 audio .*nowhere.*words\.wav.*audio\[3\]: NoneType"):
    transcriber.transcribe(audio)
  with pytest.raises(ValueError, match=r"audio\[0\]: samples up to 30000; .*\[-1, 1\]"):
    transcriber.transcribe([np.full(16000, 3e4, np.float32)])


@pytest.mark.parametrize("missing", ["config.json", "tokenizer", "weights"])
def test_a_damaged_checkpoint_says_what_is_missing(folder, tmp_path, missing):
  import shutil

  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  target = copy / missing
  shutil.rmtree(target) if target.is_dir() else target.unlink()
  with pytest.raises((ValueError, FileNotFoundError), match=missing):
    mooer_jax.Transcriber.from_checkpoint(copy)


@pytest.mark.parametrize("task", ["asr", "asr_ast_mtl"])
def test_a_long_clip_is_heard_as_its_pieces(transcriber, clips, long_clip, task):
  given = dict(size=1, task="asr", chunk_length_s=4.0)
  [[clip]] = read_windows([(long_clip, None)], transcriber.config, **given)
  pieces = clip.chunks
  np.testing.assert_array_equal(np.concatenate(pieces), long_clip)
  assert all(16000 <= len(piece) <= 4 * 16000 for piece in pieces)
  heard = [piece for piece in pieces if piece.any()]
  assert len(pieces) > len(heard) > 4
  alone = transcriber.transcribe(heard, task=task)
  short, joined = transcriber.transcribe(
    [clips[0].path, long_clip], task=task, chunk_length_s=4.0, batch_size=3
  )
  [unchanged] = transcriber.transcribe([clips[0].path], task=task)
  assert short == unchanged
  expected = join_transcripts(alone)
  whole = {"seconds": len(long_clip) / 16000, "pieces": joined.pieces}
  assert joined == dataclasses.replace(expected, **whole)
  assert [piece for piece in joined.pieces if piece.tokens] == alone
  assert [piece.seconds for piece in joined.pieces] == [len(piece) / 16000 for piece in pieces]
  assert [row["text"] for row in joined.to_json()["pieces"]] == [p.text for p in joined.pieces]
  assert joined.text
  bound = score_rounding(transcriber, heard, same_features=True, task=task)
  assert_within(joined.score, expected.score, bound)
  with exceeds_the_bound():  # a chunk is lost
    assert_within(joined.score - alone[0].score, expected.score, bound)


def test_what_chunk_s_may_be_is_said_before_any_audio_is_read(transcriber):
  for chunk_s in (0.0, -1.0, 1.9, 6.1, float("nan"), float("inf")):
    with pytest.raises(ValueError, match=r"chunk_length_s=.*between 2 and 6 "):
      transcriber.transcribe(["nowhere.wav"], chunk_length_s=chunk_s)


@pytest.mark.parametrize("samples", [np.zeros(9 * 16000), np.full(1, 0.5)])
def test_bad_clips_stay_bad_in_pieces(transcriber, samples):
  with pytest.raises(ValueError, match=r"audio\[0\].*(silent|too short)"):
    transcriber.transcribe([samples], chunk_length_s=6.0)


def test_a_question_is_part_of_what_is_asked(transcriber, clips):
  path = [clips[0].path]
  one, other = (transcriber.transcribe(path, task="QA", question=q)[0] for q in ("1", "777"))
  assert one.tokens != other.tokens and one.task == "QA"
  [free] = transcriber.transcribe(path, prompt="{}0", question="1")
  assert free.tokens == one.tokens
  assert transcriber.transcribe(path, prompt="10")[0].tokens == one.tokens
  for wrong, message in (
    ({"task": "QA"}, "'QA'.*--question"),
    ({"task": "QA", "question": ""}, "empty"),
    ({"task": "asr", "question": "1"}, "'asr'.*leave it out"),
    ({"prompt": "{}"}, "needs a question"),
  ):
    with pytest.raises(ValueError, match=message):
      transcriber.transcribe(path, **wrong)


def test_without_a_template_the_prompt_stands_as_it_is(transcriber, clips):
  path = [clips[0].path]
  [templated] = transcriber.transcribe(path, prompt="10")
  [same] = transcriber.transcribe(path, prompt="<SpeechHere>10", chat_template="none")
  [turned] = transcriber.transcribe(path, prompt="1<SpeechHere>0", chat_template="none")
  assert same.tokens == templated.tokens != turned.tokens
  with pytest.raises(ValueError, match="'10<SpeechHere>' ends with the speech in template 'none'"):
    transcriber.transcribe(path, prompt="10<SpeechHere>", chat_template="none")


def test_an_empty_clip_is_refused_by_name_where_short_ones_are_filled_up(transcriber):
  filled = transcriber.config.replace(min_audio_s=1.0)
  [[clip]] = read_windows([(np.zeros(0, np.float32), None)], filled, size=1, task="asr")
  error = clip.failure
  assert str(error).startswith("audio[0]: empty")


def test_stdin_and_pipes_are_read(folder, clips, tmp_path, plain_env, transcriber):
  [expected] = transcriber.transcribe([clips[0].path], task="asr")
  command = [sys.executable, "-m", "mooer_jax.cli", "transcribe", "--checkpoint", str(folder)]
  content = clips[0].path.read_bytes()
  done = subprocess.run(
    [*command, "--task", "asr", "-"], env=plain_env, input=content, capture_output=True
  )
  assert done.stdout.decode() == expected.text + "\n"
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  writer = threading.Thread(target=lambda: pipe.write_bytes(content))
  writer.start()
  assert transcriber.transcribe([pipe], task="asr")[0].tokens == expected.tokens
  writer.join()


def test_scores_that_are_not_finite_are_errors_of_their_clips(transcriber, clips, monkeypatch):
  params = jax.tree.map(lambda x: np.full_like(x, np.nan), transcriber.params)
  broken = mooer_jax.Transcriber(params, transcriber.config, transcriber.tokenizer)
  path = clips[0].path
  with pytest.raises(ValueError, match=f"{path.name}: the model's scores are not finite"):
    broken.transcribe([path], max_new_tokens=2)
  audio = [path, load_audio(path)]
  for beams in (1, 2):
    results = broken.transcribe(audio, max_new_tokens=2, num_beams=beams, errors="return")
    for name, result in zip((str(path), r"audio\[1\]"), results, strict=True):
      assert re.match(f"{name}: .*not finite", result.error) and result.text == ""
      json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(temperature=1.0), "temperature has no effect without sampling"),
    (dict(top_k=5), "top_k has no effect"),
    (dict(top_p=0.5, do_sample=False), "top_p has no effect"),
    (dict(seed=0), "seed has no effect"),
    (dict(min_length=3, min_new_tokens=1), "min_length has no effect beside min_new_tokens"),
    (dict(max_new_tokens=10**7), "max_new_tokens=10000000: must be at most 131072"),
    (dict(eos_token_id=(-1,)), "eos_token_id=.*at least 0"),
    (dict(length_penalty=1.0), "length_penalty has no effect with one beam"),
    (dict(return_hidden=True), "return_hidden=True has no effect"),
    (dict(do_sample=True, temperature=1e-320), "temperature=1e-320: must be a number from 1.2e-38"),
    (dict(errors="retrun"), "errors='retrun': must be 'raise' or 'return'"),
    (dict(batch_size=1.5), r"batch_size=1.5 \(float\): must be an int"),
    (dict(batch_size="8"), "batch_size='8'"),
    (dict(batch_size=None), "batch_size=None"),
    (dict(seed=1.5), r"seed=1.5 \(float\)"),
    (dict(chunk_length_s="2"), r"chunk_length_s='2' \(str\)"),
    (dict(prompt=5), r"prompt=5 \(int\): must be a str"),
    (dict(chat_template=""), "''"),
  ],
  ids=str,
)
def test_arguments_of_a_wrong_type_or_without_effect_are_refused(transcriber, given, message):
  with pytest.raises(ValueError, match=message):
    transcriber.transcribe(["nowhere.wav"], **given)


def test_an_option_has_an_effect_where_the_checkpoint_samples_or_has_beams(transcriber, clips):
  for own, given in (
    (dict(do_sample=True), dict(temperature=2.0, seed=1)),
    (dict(num_beams=2), dict(length_penalty=2.0)),
  ):
    options = dataclasses.replace(transcriber.options, **own)
    other = mooer_jax.Transcriber(
      transcriber.params, transcriber.config, transcriber.tokenizer, options
    )
    other.transcribe([clips[0].path], max_new_tokens=2, **given)


def test_any_iterable_of_clips_is_transcribed(transcriber, clips):
  path = clips[0].path
  assert transcriber.transcribe(iter([path])) == transcriber.transcribe([path])
  for wrong in (None, 5):
    with pytest.raises(ValueError, match=f"{type(wrong).__name__}; give a list"):
      transcriber.transcribe(wrong)
  with pytest.raises(ValueError, match="checkpoint=None .*path of a folder"):
    mooer_jax.Transcriber.from_checkpoint(None)


def test_given_options_go_over_deprecated_names_in_a_checkpoint(folder, tmp_path, monkeypatch):
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  original = checkpoint.load

  def load(*arguments, **options):
    loaded = original(*arguments, **options)
    return dataclasses.replace(loaded, generation={"eos_ids": [11], "max_new_tokens": 6})

  monkeypatch.setattr(checkpoint, "load", load)
  compute = ExecutionConfig()
  assert load_model(copy, compute).generation.eos_token_id == (11,)
  for name in ("eos_token_id", "eos_ids"):
    given = load_model(copy, compute, generation={name: (10,)})
    assert given.generation.eos_token_id == (10,)
  with pytest.raises(ValueError, match="temperature has no effect"):
    load_model(copy, compute, generation={"temperature": 2.0})
  for more in ({}, {"merge_lora": False}):
    with pytest.raises(ValueError, match="lora_scale=2 has no effect"):
      load_model(copy, compute, lora_scale=2.0, **more)


def test_a_mesh_changes_no_result_and_no_device_holds_all_weights(folder, transcriber, clips):
  mesh = mooer_jax.make_mesh(data=2, tensor=4)
  on_mesh = mooer_jax.Transcriber.from_checkpoint(folder, mesh=mesh)
  weight = on_mesh.params["decoder"]["layers_0"]["mlp"]["up"]["weight"]  # [out, in] on CPUs
  assert weight.shape == (48, 32) and len(weight.devices()) == 8
  assert weight.addressable_shards[0].data.shape == (12, 32)
  paths = [clip.path for clip in clips[:3]]
  found, expected = (t.transcribe(paths, batch_size=3) for t in (on_mesh, transcriber))
  assert [result.tokens for result in found] == [result.tokens for result in expected]


def test_a_mesh_that_does_not_divide_the_weights_is_named(folder):
  with pytest.raises(ValueError, match=r"embed/embedding: an axis of 12 .* mesh\.tensor=8"):
    mooer_jax.Transcriber.from_checkpoint(folder, mesh=mooer_jax.make_mesh(tensor=8))
