"""Recordings of answers: segments in their place, causes of skipped ones, runs that resume."""

import contextlib
import json

import jax
import numpy as np
import pytest
import soundfile

from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import eval_batches, train_batches
from mooer_jax.data.readers.entries import CAUSES, RawUtterance, SkippedUtterance
from mooer_jax.data.targets import Targets
from mooer_jax.text.tokenizer import Tokenizer
from tests import tiny

SPECIALS = ("<|im_end|>", "<|audio_start|>", "<A_0>", "<A_1>")
TOKENIZER = Tokenizer.from_characters("0123456789N ASK", SPECIALS, eos="<|im_end|>")
MODEL = tiny.model_config().replace(
  speech_output=tiny.SPEECH, chat_template="bare", prompts=(("asr", "ASK <|im_end|>"),)
)
PER_FRAME = tiny.SPEECH.vocoder.samples_per_frame  # at 16 kHz
FRAMES = 5
LENGTHS = {"target_s": FRAMES * PER_FRAME / 16000, "voice_s": 0.04}


def write(path, frames, *, extra=0, rate_hz=16000):
  """A recording whose samples are the number of their frame, in thousandths."""
  samples_N = np.arange(frames * PER_FRAME + extra) // PER_FRAME / 1000
  soundfile.write(path, samples_N.astype(np.float32), rate_hz, format="WAV", subtype="FLOAT")


def labels(audio_tokens, *, text=3):
  start, audio, eos = (
    TOKENIZER.token_id(name) for name in ("<|audio_start|>", "<A_1>", "<|im_end|>")
  )
  return np.array([1] * text + [start] + [audio] * audio_tokens + [eos], np.int32)


RAW = RawUtterance("a", "a.tar", "wav", b"", b"N1")


@pytest.fixture
def load(tmp_path):
  def load(content=None, **changes):
    (tmp_path / "target.scp").write_text(content or f"a {tmp_path / 'a.wav'}\n", "utf-8")
    config = DataConfig(target_audio=str(tmp_path / "target.scp"), **{**LENGTHS, **changes})
    return Targets.load(config, TOKENIZER, MODEL)

  return load


@pytest.mark.parametrize("extra", [0, 7])  # the last audio token may be of a part of a frame
@pytest.mark.parametrize("text", [0, 3])
def test_a_segment_is_that_of_its_tokens(load, tmp_path, extra, text):
  write(tmp_path / "a.wav", 20, extra=extra)
  targets = load()
  firsts = set()
  for place in (0.0, 0.37, 0.999):
    made = targets(RAW, labels(20 + bool(extra), text=text), place=place, voice_place=place)
    first = made.first - text - 1  # the number of its first frame
    expected_SP = np.repeat(first + np.arange(FRAMES)[:, None], PER_FRAME, axis=1) / 1000
    if first + FRAMES > 20:  # beyond the end
      expected_SP[-1, extra:] = 0
    found_SP = made.waveform_N.reshape(FRAMES, PER_FRAME)
    np.testing.assert_allclose(found_SP, expected_SP, rtol=1e-6)
    assert made.frames == FRAMES and made.voice_TF.shape == (5, 64)
    firsts.add(first)
  assert min(firsts) == 0 and max(firsts) == 20 + bool(extra) - FRAMES and len(firsts) == 3


def test_a_short_recording_is_padded(load, tmp_path):
  write(tmp_path / "a.wav", 3)
  made = load()(RAW, labels(3), place=0.9, voice_place=0.9)
  assert (made.first, made.frames) == (4, 3)
  assert made.waveform_N[2 * PER_FRAME] and not made.waveform_N[3 * PER_FRAME :].any()
  assert made.voice_TF.shape == (5, 64)  # it is repeated


def test_a_recording_is_resampled(load, tmp_path):
  rate_hz = 48000
  samples_N = 0.5 * np.sin(2 * np.pi * 440 * np.arange(30 * 3 * PER_FRAME) / rate_hz)
  soundfile.write(tmp_path / "a.wav", samples_N, rate_hz)
  made = load()(RAW, labels(30), place=0.5, voice_place=0)
  start = (made.first - 4) * PER_FRAME
  expected_N = samples_N[::3][start : start + FRAMES * PER_FRAME]
  np.testing.assert_allclose(made.waveform_N, expected_N, atol=5e-3)  # soxr's passband


@pytest.mark.parametrize(
  "tokens, cause, detail",
  [
    (20, None, ""),
    (19, None, ""),
    (21, None, ""),
    (18, "bad target", "320 samples at 16000 Hz are 20 audio tokens, but the label has 18"),
    (22, "bad target", "the label has 22"),
    (0, "no audio tokens", "1 start tokens"),
  ],
)
def test_a_recording_has_the_length_of_its_label(load, tmp_path, tokens, cause, detail):
  write(tmp_path / "a.wav", 20)
  made = load()(RAW, labels(tokens), place=0.0, voice_place=0.0)
  if cause is None:
    assert made.frames == FRAMES
  else:
    assert isinstance(made, SkippedUtterance) and made.cause == cause in CAUSES
    assert detail in made.detail


def test_a_label_without_audio_tokens_is_skipped(load):
  made = load()(RAW, labels(20)[:3], place=0.0, voice_place=0.0)
  assert made.cause == "no audio tokens" and "0 start tokens" in made.detail


@pytest.mark.parametrize(
  "content, cause, detail",
  [
    ("b x.wav\n", "no target", "lacks the key"),
    ("a x.wav\na y.wav\n", "no target", "on the lines 1 and 2"),
    ("a\n", "no target", "target.scp:1 has no path"),
    ("a nowhere.wav\n", "no target", "nowhere.wav: No such file"),
    ("a {}/target.scp\n", "bad target", "target.scp"),
  ],
)
def test_a_recording_that_cannot_be_used_is_skipped(load, tmp_path, content, cause, detail):
  made = load(content.format(tmp_path))(RAW, labels(20), place=0.0, voice_place=0.0)
  assert isinstance(made, SkippedUtterance) and made.cause == cause in CAUSES
  assert detail in made.detail


def test_what_cannot_be_spoken_is_an_error(tmp_path):
  (tmp_path / "target.scp").write_text("a a.wav\n")
  config = DataConfig(target_audio=str(tmp_path / "target.scp"))
  with pytest.raises(ValueError, match="the model has none; set model.speech_output"):
    Targets.load(config, TOKENIZER, tiny.model_config())
  plain = Tokenizer.from_characters("AB")
  with pytest.raises(ValueError, match="start_token: token '<.audio_start.>' is not in the voc"):
    Targets.load(config, plain, MODEL)
  with pytest.raises(FileNotFoundError, match="nowhere.scp"):
    Targets.load(DataConfig(target_audio=str(tmp_path / "nowhere.scp")), TOKENIZER, MODEL)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"target_s": 0.0}, "data.target_s=0: must be above 0 seconds"),
    ({"voice_s": 0.01}, "data.voice_s=0.01: must be at least 0.032 seconds"),
  ],
)
def test_lengths_that_make_no_sense_are_errors(options, message):
  with pytest.raises(ValueError, match=message):
    DataConfig(**options)


def test_batches_have_new_segments_each_epoch_and_resume(shards, tmp_path):
  shards.add(4)
  for name in ("scp", "text"):
    (tmp_path / name).touch()
  for number, key in enumerate(shards.keys):
    write(tmp_path / f"{key}.wav", 12 + number)
    with open(tmp_path / "scp", "a") as scp, open(tmp_path / "text", "a") as text:
      scp.write(f"{key} {tmp_path / key}.wav\n")
      text.write(f"{key} N{number}<|audio_start|>{'<A_1>' * (12 + number)}\n")
  config = shards.config(
    target_audio=str(tmp_path / "scp"), labels=str(tmp_path / "text"), shuffle_buffer_size=4,
    answer_buckets=(32,), **LENGTHS,
  )  # fmt: skip
  dataset = train_batches(config, TOKENIZER, MODEL)
  with contextlib.closing(iter(dataset)) as batches:
    states, hosts = [], []
    for _ in range(3):
      states.append(json.dumps(batches.get_state()))
      hosts.append(next(batches))
  for shape in dataset.shapes:
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shape.target) == jax.tree.map(
      lambda x: (x.shape, x.dtype), hosts[0].batch.target
    )
  by_key = [dict(zip(h.keys, h.batch.target.first_B.tolist(), strict=True)) for h in hosts]
  assert by_key[0].keys() == by_key[1].keys() and by_key[0] != by_key[1]
  for host in hosts:  # samples are the number of their frame
    target = host.batch.target
    frame_B = np.rint(1000 * target.waveform_BN[:, 0])
    np.testing.assert_array_equal(frame_B, target.first_B - 3)
  with contextlib.closing(iter(dataset)) as again:
    again.set_state(json.loads(states[1]))
    for host in hosts[1:]:
      jax.tree.map(np.testing.assert_array_equal, next(again).batch, host.batch)
  with contextlib.closing(iter(eval_batches(config, TOKENIZER, MODEL))) as batches:
    assert next(batches).batch.target is None
