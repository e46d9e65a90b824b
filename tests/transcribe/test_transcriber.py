"""The public class and command: the same text in any batch, bad clips and options named."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import soundfile

import mooer_jax
from mooer_jax import checkpoint, cli, speech_llm
from mooer_jax.audio.decode import load_audio
from mooer_jax.config import SpeechLLMConfig, to_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.generation.loading import load_model
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.transcribe.clips import load_clips
from mooer_jax.transcribe.transcript import Transcript, join_transcripts

PROMPTS = (("asr", "<|transcribe|>"), ("ast", "<|end|>"), ("asr_ast_mtl", "0"), ("QA", "{}0"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint of a tiny random model, whose answers depend on what it hears."""
  tokenizer = Tokenizer.from_characters("0123456789", ("<|transcribe|>", "<|end|>"), eos="<|end|>")
  config = SpeechLLMConfig(
    encoders=(SANMConfig(hidden_size=32, layers=2, heads=2, intermediate_size=48),),
    connector=LinearConfig(hidden_size=24),
    decoder=LLMConfig(
      vocab_size=12,
      hidden_size=32,
      layers=2,
      heads=4,
      kv_heads=2,
      head_dim=8,
      intermediate_size=48,
      tie_word_embeddings=True,
    ),
    chat_template="bare",
    max_audio_s=6.0,
    prompts=PROMPTS,
  )
  params = jax.jit(lambda key: speech_llm.init(key, config))(jax.random.key(0))
  params["decoder"] = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params["decoder"])
  return checkpoint.save(
    tmp_path_factory.mktemp("run") / "step_00000001",
    params=params,
    config_json=to_json(config),
    tokenizer=tokenizer.save,
    generation={"max_new_tokens": 6},
  )


@pytest.fixture(scope="module")
def transcriber(folder):
  return mooer_jax.Transcriber.from_checkpoint(folder)


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


@pytest.fixture(scope="module")
def long_clip(clips):
  """18 seconds of speech, 7 of silence, speech again."""
  spoken = np.concatenate([load_audio(clip.path) for clip in clips])
  spoken = np.resize(spoken, 18 * 16000)
  return np.concatenate([spoken, np.zeros(7 * 16000, np.float32), spoken[: 2 * 16000]])


@pytest.mark.parametrize("task", ["asr", "asr_ast_mtl"])
def test_a_long_clip_is_heard_as_its_pieces(transcriber, clips, long_clip, task):
  [pieces] = load_clips([long_clip], transcriber.config, chunk_length_s=4.0)
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
  assert joined.text and joined.score == pytest.approx(expected.score, abs=1e-3)


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
  [error] = load_clips([np.zeros(0, np.float32)], filled)
  assert str(error).startswith("audio[0]: empty")


def test_the_command_reads_line_breaks_and_hands_the_template_over(
  folder, clips, monkeypatch, capsys
):
  given = {}
  result = Transcript("said", [1], 1.0, "prompt")
  monkeypatch.setattr(
    mooer_jax.Transcriber,
    "transcribe",
    lambda self, paths, **options: given.update(options) or [result],
  )
  command = ["ask", "--checkpoint", str(folder), "--prompt", r"1\n<SpeechHere>0"]
  assert cli.main([*command, "--chat-template", "none", str(clips[0].path)]) == 0
  assert given["prompt"] == "1\n<SpeechHere>0" and given["chat_template"] == "none"
  assert capsys.readouterr().err == ""
  # The names of version 0.1 still work.
  old = ["--template", "none", "--chunk-s", "6", "--beams", "2"]
  assert cli.main([*command, *old, str(clips[0].path)]) == 0
  assert (given["chat_template"], given["chunk_length_s"], given["num_beams"]) == ("none", 6.0, 2)
  assert capsys.readouterr().err.count("is deprecated; use --") == 3


def test_the_command_takes_questions_and_long_clips(
  folder, transcriber, long_clip, tmp_path, capsys
):
  path = str(tmp_path / "long.wav")
  soundfile.write(path, long_clip, 16000, subtype="FLOAT")
  command = ["ask", "--checkpoint", str(folder), "--task", "QA", path]
  assert cli.main([*command, "--question", "1", "--chunk-length-s", "6"]) == 0
  [expected] = transcriber.transcribe([path], task="QA", question="1", chunk_length_s=6.0)
  out, err = capsys.readouterr()
  assert out == expected.text + "\n"
  assert err.splitlines() == [f"{path}: {told}" for told in expected.warnings()]
  for more, message, status in (
    ([], "--question", 2),
    (["--question", "1"], "--chunk-length-s 6", 1),
  ):
    assert cli.main([*command, *more]) == status
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("chunked", [[], ["--chunk-length-s", "6", "--batch-size", "1"]])
def test_a_bad_file_costs_only_itself(folder, clips, tmp_path, capsys, chunked):
  good, out = clips[0].path, tmp_path / "out.json"
  (tmp_path / "bad.wav").write_text("no audio")
  bad = [str(tmp_path / name) for name in ("bad.wav", "none.wav", "")]
  command = ["transcribe", "--checkpoint", str(folder), "--task", "asr", *chunked]
  assert cli.main([*command, "--json", str(out), bad[0], str(good), *bad[1:]]) == 1
  said, error = capsys.readouterr()
  assert [line.split("\t")[0] for line in said.splitlines()] == [str(good)]
  told = [line for line in error.splitlines() if line.startswith("not transcribed: ")]
  assert len(told) == 3 and all(name in line for name, line in zip(bad, told, strict=True))
  rows = json.loads(out.read_text("utf-8"))
  assert [row["path"] for row in rows] == [bad[0], str(good), *bad[1:]]
  assert [bool(row["error"]) for row in rows] == [True, False, True, True]


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


def test_results_survive_an_interruption(folder, clips, tmp_path, monkeypatch, capsys):
  out = tmp_path / "out.json"
  calls = []

  def transcribe(self, paths, **options):
    calls.append(paths)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return [Transcript("said", [1], 1.0, "asr", path=path) for path in paths]

  monkeypatch.setattr(mooer_jax.Transcriber, "transcribe", transcribe)
  command = ["transcribe", "--checkpoint", str(folder), "--json", str(out), "--batch-size", "1"]
  assert cli.main([*command, *[str(clips[0].path)] * 20]) == 130
  rows = json.loads(out.read_text("utf-8"))
  assert len(rows) == len(calls[0]) and rows[0]["text"] == "said"
  assert f"{out} holds the {len(rows)} results" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_results_survive_sigterm(folder, clips, tmp_path, monkeypatch):
  out, calls = tmp_path / "out.json", []

  def transcribe(self, paths, **options):
    calls.append(paths)
    if len(calls) == 2:
      signal.raise_signal(signal.SIGTERM)
    return [Transcript("said", [1], 1.0, "asr", path=path) for path in paths]

  monkeypatch.setattr(mooer_jax.Transcriber, "transcribe", transcribe)
  before = signal.getsignal(signal.SIGTERM)
  command = ["transcribe", "--checkpoint", str(folder), "--json", str(out), "--batch-size", "1"]
  with pytest.raises(SystemExit) as ended:
    cli.main([*command, *[str(clips[0].path)] * 20])
  assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
  assert len(json.loads(out.read_text("utf-8"))) == len(calls[0])


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
    with pytest.raises(ValueError, match=f"{type(wrong).__name__}; transcribe takes a list"):
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


def test_odd_file_names_are_escaped(folder, clips, tmp_path, capsys):
  odd = os.fsdecode(bytes(tmp_path) + b"/a\nb\t\xff.wav")
  shutil.copyfile(clips[0].path, odd)
  out = tmp_path / "out.json"
  command = ["transcribe", "--checkpoint", str(folder), "--task", "asr", "--json", str(out)]
  assert cli.main([*command, odd, str(clips[0].path)]) == 0
  assert len(capsys.readouterr().out.splitlines()) == 2
  rows = json.loads(out.read_text("utf-8"))
  assert rows[0]["path"] == odd


def test_audio_is_never_overwritten(folder, clips, tmp_path, capsys):
  copy = tmp_path / "a.wav"
  shutil.copyfile(clips[0].path, copy)
  before = copy.read_bytes()
  command = ["transcribe", "--checkpoint", str(folder), "--json", str(copy)]
  for audio in (str(copy), str(clips[1].path)):
    assert cli.main([*command, audio]) == 2
    assert str(copy) in capsys.readouterr().err
  assert copy.read_bytes() == before


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--repetition-penalty", "nan"], "repetition_penalty=nan"),
    (["--temperature", "nan"], "temperature=nan"),
    (["--temperature", "inf"], "temperature=inf"),
    (["--top-p", "nan"], "top_p=nan"),
    (["--length-penalty", "nan"], "length_penalty=nan"),
    (["--seed", str(2**64)], f"seed={2**64}"),
    (["--seed", "-1"], "seed=-1"),
    (["--min-new-tokens", "300", "--max-new-tokens", "200"], "exceeds max_new_tokens=200"),
  ],
)
def test_options_without_a_meaning_are_refused(folder, clips, capsys, flags, message):
  command = ["transcribe", "--checkpoint", str(folder), "--task", "asr", str(clips[0].path)]
  assert cli.main([*command, *flags]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert message in line


def test_the_command_prints_and_writes_json(folder, clips, tmp_path, capsys, transcriber):
  paths = [str(clip.path) for clip in clips[:2]]
  out = tmp_path / "results" / "out.json"
  status = cli.main(["transcribe", "--checkpoint", str(folder), "--json", str(out), *paths])
  assert status == 0
  rows = json.loads(out.read_text("utf-8"))
  expected = transcriber.transcribe(paths)
  assert rows == [result.to_json() for result in expected]
  assert capsys.readouterr().out == "".join(f"{r.path}\t{r.text}\n" for r in expected)


def test_the_command_fails_with_one_line(folder, clips, tmp_path, plain_env):
  command = [sys.executable, "-m", "mooer_jax.cli", "transcribe", "--checkpoint"]
  for checkpoint_folder, audio, message in (
    (folder, tmp_path / "nowhere.wav", "nowhere.wav"),
    (tmp_path, clips[0].path, "config.json"),
  ):
    done = subprocess.run(
      [*command, str(checkpoint_folder), str(audio)], env=plain_env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
