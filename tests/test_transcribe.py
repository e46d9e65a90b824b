"""The class and the command that users call: same answers in any batch, bad clips named."""

import dataclasses
import json
import subprocess
import sys

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
from mooer_jax.text.tokenizer import Tokenizer

PROMPTS = (("asr", "<|transcribe|>"), ("ast", "<|end|>"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint of a tiny random model, whose answers depend on what it hears."""
  tokenizer = Tokenizer.from_characters("0123456789", ("<|transcribe|>", "<|end|>"), eos="<|end|>")
  config = SpeechLLMConfig(
    encoders=(SANMConfig(width=32, layers=2, heads=2, mlp_width=48),),
    connector=LinearConfig(hidden_width=24),
    decoder=LLMConfig(
      vocab=12, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48, tied=True
    ),
    template="bare",
    max_audio_s=6.0,
    prompts=PROMPTS,
  )
  params = speech_llm.init(jax.random.key(0), config)
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
  with pytest.raises(ValueError, match=r"num_return_sequences=2.*one answer"):
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
    (np.full(1, 0.5), "too short"),
    (0.1 * np.ones(7 * 16000), r"7\.0 s.*at most 6 s"),
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
  with pytest.raises(ValueError, match=r"3 of 4 clips .*nowhere.*words\.wav.*audio\[3\]: NoneType"):
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


def test_the_command_prints_and_writes_json(folder, clips, tmp_path, capsys, transcriber):
  paths = [str(clip.path) for clip in clips[:2]]
  out = tmp_path / "results" / "out.json"
  status = cli.main(["transcribe", "--checkpoint", str(folder), "--json", str(out), *paths])
  assert status == 0
  rows = json.loads(out.read_text("utf-8"))
  expected = transcriber.transcribe(paths)
  assert rows == [result.to_json() for result in expected]
  assert capsys.readouterr().out == "".join(f"{r.path}\t{r.text}\n" for r in expected)


def test_the_command_fails_with_one_line(folder, tmp_path, plain_env):
  command = [sys.executable, "-m", "mooer_jax.cli", "transcribe", "--checkpoint"]
  for checkpoint_folder, audio, message in (
    (folder, tmp_path / "nowhere.wav", "nowhere.wav"),
    (tmp_path, tmp_path / "nowhere.wav", "config.json"),
  ):
    done = subprocess.run(
      [*command, str(checkpoint_folder), str(audio)], env=plain_env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
