"""`mooer-jax units fit`, `encode` and `add-tokens` on a tiny checkpoint and the committed clips."""

import dataclasses
import json
import re
from collections import Counter

import jax
import numpy as np
import pytest
import soundfile

from mooer_jax import checkpoint, cli, speech_llm, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.config import to_json
from mooer_jax.data.labels import LabelFile
from mooer_jax.encoders.beats import BEATsConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.inputs import encoder_inputs, extract_features
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.units.token_vectors import Rate, UnitEncoder, resample_frames, token_vectors
from tests import tiny
from tests.numerics import assert_within, rounding

TOKENIZER = Tokenizer.from_characters("0123456789 <>|/_AaioudstrSpech")
SAMPLES, RATE_HZ = 1024, 22050  # of MooER-omni


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """(folder, config, params) of a checkpoint without speech output."""
  config = tiny.answering_config(vocab_size=TOKENIZER.vocab_size, max_audio_s=2.0)
  params = tiny.init(config)
  folder = tmp_path_factory.mktemp("units") / "base"
  checkpoint.save(
    folder, params=params, config_json=to_json(config), tokenizer=TOKENIZER.save, generation={}
  )
  return folder, config, params


@pytest.fixture(scope="module")
def source(clips, tmp_path_factory):
  """A raw list: the clips, and lines that cannot be used."""
  folder = tmp_path_factory.mktemp("clips")
  lines = [{"key": c.key, "wav": str(c.path), "txt": c.text} for c in clips]
  lines[1]["txt"] = "1\n2"
  soundfile.write(folder / "long.wav", np.full(3 * 16000, 0.1, np.float32), 16000)
  lines += [
    lines[0],
    {"key": "gone", "wav": "gone.wav", "txt": "1"},
    {"key": "long", "wav": "long.wav", "txt": "1"},
    {"key": "text", "Q": "1", "txt": "1"},
    {"key": "empty", "wav": lines[0]["wav"], "txt": ""},
  ]
  (folder / "data.list").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(folder / "data.list")


def _units(*arguments):
  return cli.main(["units", *map(str, arguments)])


@pytest.fixture(scope="module")
def units(base, source, tmp_path_factory):
  out = tmp_path_factory.mktemp("fit") / "units"
  assert not _units(
    "fit", source, "--checkpoint", base[0], "--out", out, "--count", 8,
    "--samples-per-token", SAMPLES, "--sample-rate-hz", RATE_HZ,
  )  # fmt: skip
  return out


@pytest.fixture(scope="module")
def labels(base, source, units, tmp_path_factory):
  out = tmp_path_factory.mktemp("encode") / "labels"
  assert not _units("encode", source, "--checkpoint", base[0], "--units", units, "--out", out)
  return out


def _error(capsys, *arguments):
  capsys.readouterr()
  assert _units(*arguments) == 2
  return capsys.readouterr().err


def test_labels_have_a_token_for_each_step_of_the_vocoder(labels, clips):
  lines = dict(line.split("\t") for line in labels.read_text().splitlines())
  assert [*lines] == [clip.key for clip in clips]
  texts = [clip.text for clip in clips]
  texts[1] = "1\\n2"
  for clip, text, line in zip(clips, texts, lines.values(), strict=True):
    said, _, spoken = line.partition("<|audio_start|>")
    assert said == text
    tokens = [int(n) for n in re.findall(r"<A_(\d+)>", spoken)]
    assert spoken == "".join(f"<A_{n}>" for n in tokens) and max(tokens) < 8
    waveform_N = load_audio(clip.path, sample_rate_hz=RATE_HZ)
    assert len(tokens) == -(-len(waveform_N) // SAMPLES)
  assert len({*re.findall(r"<A_\d+>", labels.read_text())}) > 1
  [(_, text)] = LabelFile(labels).find(clips[0].key)  # as training reads it
  assert text.decode().strip() == lines[clips[0].key]


def test_unusable_utterances_are_counted_by_cause(base, source, units, tmp_path, capsys):
  capsys.readouterr()
  _units("encode", source, "--checkpoint", base[0], "--units", units, "--out", tmp_path / "labels")
  found = capsys.readouterr()
  assert "6 utterances" in found.out
  said = found.err
  for cause in ("duplicate key: 1", "no audio: 2", "too long: 1", "empty transcript: 1"):
    assert cause in said, said
  assert "skipped 5 utterances" in said


def test_the_same_command_writes_the_same_files(base, source, units, labels, tmp_path):
  again = tmp_path / "units"
  _units(
    "fit", source, "--checkpoint", base[0], "--out", again, "--count", 8, "--samples-per-token",
    SAMPLES, "--sample-rate-hz", RATE_HZ,
  )  # fmt: skip
  for name in ("units.json", "codebook.npz"):
    one, other = (folder / name for folder in (units, again))
    if name == "units.json":
      assert one.read_text() == other.read_text()
    else:
      np.testing.assert_array_equal(np.load(one)["centroids"], np.load(other)["centroids"])
  _units("encode", source, "--checkpoint", base[0], "--units", again, "--out", tmp_path / "labels")
  assert (tmp_path / "labels").read_text() == labels.read_text()


def test_texts_come_from_a_label_file_or_are_left_out(base, source, units, clips, tmp_path):
  (tmp_path / "answers").write_text(f"{clips[0].key} {'9'}\n{clips[2].key} 8 7\n")
  common = ("encode", source, "--checkpoint", base[0], "--units", units, "--out", tmp_path / "out")
  _units(*common, "--text-labels", tmp_path / "answers")
  lines = (tmp_path / "out").read_text().splitlines()
  assert [line.partition("<|")[0] for line in lines] == [
    f"{clips[0].key}\t9",
    f"{clips[2].key}\t8 7",
  ]
  _units(*common, "--no-text")
  lines = (tmp_path / "out").read_text().splitlines()
  assert all(re.match(r"\S+\t<\|audio_start\|><A_", line) for line in lines)
  assert len(lines) == len(clips) + 1  # the one with an empty transcript, too


def test_another_encoder_is_refused_and_no_file_is_written(base, source, units, tmp_path, capsys):
  folder, config, params = base
  flat = tree.flatten(params)
  path = next(p for p in flat if p.startswith("encoders/") and p.endswith("kernel"))
  changed = tree.unflatten({**flat, path: flat[path] * 1.001})
  checkpoint.save(
    tmp_path / "other", params=changed, config_json=to_json(config), tokenizer=TOKENIZER.save,
    generation={},
  )  # fmt: skip
  out = tmp_path / "labels"
  said = _error(
    capsys, "encode", source, "--checkpoint", tmp_path / "other", "--units", units, "--out", out
  )
  assert "belong to an encoder sanm with the hash" in said and not out.exists()
  # The language model is no part of it: stages after the first keep the units.
  flat = {p: x * 2 if p.startswith("decoder/") else x for p, x in flat.items()}
  checkpoint.save(
    tmp_path / "later", params=tree.unflatten(flat), config_json=to_json(config),
    tokenizer=TOKENIZER.save, generation={},
  )  # fmt: skip
  assert UnitEncoder.load(tmp_path / "later").hash == UnitEncoder.load(folder).hash


def test_the_rate_is_that_of_the_vocoder_or_given(base, source, tmp_path, capsys):
  folder, config, _ = base
  common = ("fit", source, "--out", tmp_path / "units", "--count", 4, "--checkpoint")
  assert "no vocoder; give --samples-per-token" in _error(capsys, *common, folder)
  speech = tiny.speech(vocoder=dataclasses.replace(tiny.SPEECH.vocoder, input_width=32))
  speaking = config.replace(speech_output=speech)
  checkpoint.save(
    tmp_path / "speaking", params=tiny.init(speaking), config_json=to_json(speaking),
    tokenizer=TOKENIZER.save, generation={},
  )  # fmt: skip
  given = ("--samples-per-token", 16, "--sample-rate-hz", 16000)
  assert "leave out --samples-per-token" in _error(capsys, *common, tmp_path / "speaking", *given)
  assert not _units(*common, tmp_path / "speaking")
  info = json.loads((tmp_path / "units" / "units.json").read_text())
  assert (info["samples_per_token"], info["sample_rate_hz"], info["count"]) == (16, 16000, 4)
  assert "exists; name another folder" in _error(capsys, *common, tmp_path / "speaking")


def test_a_source_without_usable_audio_writes_nothing(base, units, tmp_path, capsys):
  (tmp_path / "data.list").write_text('{"key": "a", "wav": "gone.wav", "txt": "1"}\n')
  out = tmp_path / "labels"
  said = _error(
    capsys, "encode", tmp_path / "data.list", "--checkpoint", base[0], "--units", units,
    "--out", out,
  )  # fmt: skip
  assert "no usable utterance" in said and "no audio: 1" in said and not out.exists()
  assert [*tmp_path.iterdir()] == [tmp_path / "data.list"]


def test_vectors_do_not_depend_on_the_batch(base, source, clips):
  _, config, params = base
  encoder, rate = UnitEncoder.load(base[0]), Rate(SAMPLES, RATE_HZ)
  assert encoder.frame_s == pytest.approx(0.06)
  found = {}
  for size in (1, 4):
    vectors = token_vectors(source, encoder, rate, batch_size=size, skipped=Counter())
    found[size] = {raw.key: x_ND for raw, x_ND in vectors}
  waveform_N = load_audio(clips[2].path)
  features, frames = encoder_inputs([extract_features(waveform_N, config)])
  none_BS = np.zeros((1, 0), np.int32)
  batch = speech_llm.Batch(features, frames, none_BS, none_BS, none_BS)
  ((x_BTD, _),) = jax.jit(lambda p: speech_llm.encode_each(p, batch, config))(params).values()
  middle_N = (np.arange(len(found[1][clips[2].key])) + 0.5) * SAMPLES / RATE_HZ
  direct_ND = resample_frames(np.asarray(x_BTD[0]), middle_N / 0.06)
  scale = np.abs(direct_ND).max()
  for of in found.values():
    # Normalized values after two layers of 48 and features of 560.
    assert_within(of[clips[2].key], direct_ND, rounding(3 * 560, 4 * scale))


@pytest.mark.parametrize(
  ("encoder", "frame_s"),
  [
    (SANMConfig(), 0.06),
    (WhisperConfig(), 0.02),
    (WhisperConfig(context=500, trim=True), 0.02),
    (BEATsConfig(), 0.02),
  ],
)
def test_the_time_of_a_frame_follows_from_the_configs(encoder, frame_s):
  model = tiny.model_config().replace(
    encoders=(encoder,), frontends=(encoder.frontend(),), max_audio_s=9.0
  )
  assert UnitEncoder(model, {}, "", None).frame_s == pytest.approx(frame_s)


def test_resampled_frames_are_exact_for_linear_ones_and_hold_at_the_ends():
  slope_D = np.array([1.0, -2.0], np.float32)
  frames_TD = np.arange(5, dtype=np.float32)[:, None] * slope_D
  times_N = np.array([-1.0, 0.0, 0.25, 3.5, 4.0, 9.0])
  expected_ND = np.clip(times_N, 0, 4)[:, None] * slope_D
  np.testing.assert_allclose(resample_frames(frames_TD, times_N), expected_ND, rtol=1e-6)
  one_ND = resample_frames(frames_TD[2:3], times_N)
  np.testing.assert_array_equal(one_ND, np.repeat(frames_TD[2:3], 6, axis=0))
