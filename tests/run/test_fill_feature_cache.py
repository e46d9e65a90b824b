"""Frames of two frozen encoders, cached by the code that training calls."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from mooer_jax import checkpoint, speech_llm, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.config import to_json
from mooer_jax.data.feature_cache import digest
from mooer_jax.data.readers.entries import RawUtterance
from mooer_jax.files import lock_folder
from mooer_jax.run import fill_feature_cache
from mooer_jax.run.config import Run, default_config
from mooer_jax.sharding import make_mesh
from mooer_jax.text.tokenizer import Tokenizer
from tests import tiny
from tests.numerics import assert_within, exceeds_the_bound, rounded_to, rounding


@pytest.fixture
def prepared(clips, tmp_path):
  """(Run, its params, mesh): Whisper and BEATs of a few channels and copies of three clips."""
  for clip in clips[:3]:
    shutil.copy(clip.path, tmp_path / clip.path.name)
  entries = [{"path": clip.path.name, "text": clip.text, "task": "asr"} for clip in clips[:3]]
  (tmp_path / "train.json").write_text(json.dumps({"annotation": [*entries, entries[0]]}))
  config = default_config()
  config.workdir, config.init_from = str(tmp_path / "run"), ""
  config.trainable = ("connector/.*",)
  config.model.encoders = ("whisper_tiny", "beats_iter3")
  config.model.connector, config.model.decoder = "qformer", "smollm2_135m"
  config.model.chat_template, config.model.prompts = "chatml", {"asr": "<SpeechHere> write"}
  config.model.max_audio_s = 2.0
  config.model.whisper = dict(
    hidden_size=16, layers=1, heads=2, intermediate_size=16, positions=100, context=100, trim=True
  )
  config.model.beats = dict(
    hidden_size=16, layers=1, heads=2, intermediate_size=16, conv_pos_groups=1, patch_width=8
  )
  config.model.qformer = dict(hidden_size=16, layers=1, heads=2, intermediate_size=16, edge="pad")
  config.model.llm = dict(
    vocab_size=48, hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16
  )
  config.data.shards, config.data.task = str(tmp_path / "train.json"), ""
  config.data.cache_features = str(tmp_path / "cache")
  config.data.batch_size = config.data.shuffle_buffer_size = 2
  config.data.buckets, config.data.max_s = (60, 200), 2.0
  config.data.answer_buckets = (6,)
  plain = Run.read(config).model.with_compute(scan=False)
  params = tiny.init(plain)
  checkpoint.save(
    tmp_path / "base",
    params=params,
    config_json=to_json(plain),
    tokenizer=Tokenizer.from_characters("abc").save,
    generation={},
  )
  config.init_from = str(tmp_path / "base")
  run = Run.read(config)
  return run, tree.stack_layers(params), make_mesh(data=1, devices=jax.devices()[:1])


def _expected(run, params, path):
  """Frames of a clip that is alone, without a cache."""
  made = [frontend.features(load_audio(path)) for frontend in run.model.frontends]
  none_BS = np.zeros((1, 0), np.int32)
  batch = speech_llm.Batch(
    features=tuple(x_TF[None] for x_TF in made),
    frames=tuple(np.array([len(x_TF)]) for x_TF in made),
    prefix_BS=none_BS,
    suffix_BS=none_BS,
    labels_BS=none_BS,
  )
  encode = jax.jit(  # a list, because jit would sort a dict
    lambda params, batch: [*speech_llm.encode_each(params, batch, run.model).values()]
  )
  return [np.asarray(x_BTD[0][valid_BT[0]]) for x_BTD, valid_BT in encode(params, batch)]


def _digest(path):
  return digest(RawUtterance("", "", "wav", path.read_bytes(), b""))


def test_frames_are_those_of_each_clip_alone_and_changed_audio_is_encoded_anew(
  prepared, monkeypatch
):
  run, params, mesh = prepared
  cache = fill_feature_cache.fill_cache(run, params, mesh)
  folder = run.init_from.parent
  paths = sorted(folder.glob("*.wav"))
  assert sorted(cache.clips) == sorted(map(_digest, paths))
  for path in paths:
    frames, _ = cache.get(_digest(path))
    for kept_TD, expected_TD in zip(frames, _expected(run, params, path), strict=True):
      # Frames are kept in float16. A batch pads, and adds in another order: over the features, and
      # the MLP of each layer, before the last norm.
      half = float(np.finfo(np.float16).eps) * np.abs(expected_TD)
      bound = half + rounding(1000, np.abs(expected_TD).max())
      assert_within(kept_TD, expected_TD, bound)
      with exceeds_the_bound():
        assert_within(rounded_to(jnp.bfloat16, kept_TD), expected_TD, bound)

  with monkeypatch.context() as patch:  # nothing is read again where nothing changed
    patch.setattr(fill_feature_cache, "cache_misses", None)
    assert len(fill_feature_cache.fill_cache(run, params, mesh).clips) == 3
  part = cache.folder / "process1"  # of a run with more processes
  part.mkdir()
  for file in cache.folder.glob("*.*"):
    (part / file.name).write_bytes(file.read_bytes())
  frames = next(part.glob("*.float16"))
  frames.write_bytes(frames.read_bytes()[:-1])
  assert not type(cache)(cache.folder, cache.widths).whole
  again = fill_feature_cache.fill_cache(run, params, mesh)
  assert again.whole and len(again.known) == 3
  with monkeypatch.context() as patch:  # and that is kept
    patch.setattr(fill_feature_cache, "cache_misses", None)
    assert len(fill_feature_cache.fill_cache(run, params, mesh).known) == 3
  before = paths[0].stat()
  paths[0].write_bytes(paths[1].read_bytes()[:-2000])
  os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
  changed = fill_feature_cache.fill_cache(run, params, mesh)
  assert changed.folder == cache.folder and len(changed.clips) == 4
  assert changed.get(_digest(paths[0])) is not None

  monkeypatch.setattr(fill_feature_cache, "FRAMES_VERSION", fill_feature_cache.FRAMES_VERSION + 1)
  assert fill_feature_cache.fill_cache(run, params, mesh).folder != cache.folder


def test_of_a_clip_that_is_cut_the_whole_length_is_kept_for_training_to_count(prepared):
  run, params, mesh = prepared
  run = dataclasses.replace(run, data=dataclasses.replace(run.data, max_s=0.5, truncate=True))
  cache = fill_feature_cache.fill_cache(run, params, mesh)
  streams = zip(run.model.encoders, run.model.frontends, strict=True)
  heard = [encoder.num_outputs(frontend.num_frames(8000)) for encoder, frontend in streams]
  for path in sorted(run.init_from.parent.glob("*.wav")):
    frames, seconds = cache.get(_digest(path))
    assert seconds == soundfile.info(path).duration > 0.5
    assert [len(x_TD) for x_TD in frames] == heard


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_next_stage_shares_the_frames_and_other_encoders_do_not(prepared, dtype):
  run, params, mesh = prepared
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  first = fill_feature_cache.fill_cache(run, params, mesh)
  tuned = {**params, "connector": jax.tree.map(lambda x: x + 1, params["connector"])}
  assert fill_feature_cache.fill_cache(run, tuned, mesh).folder == first.folder
  others = {**params, "encoders": jax.tree.map(lambda x: x * 2, params["encoders"])}
  assert fill_feature_cache.fill_cache(run, others, mesh).folder != first.folder


def test_two_processes_do_not_fill_the_same_folder(prepared):
  run, params, mesh = prepared
  folder = fill_feature_cache.fill_cache(run, params, mesh).folder
  (folder / "complete").unlink()
  with lock_folder(folder), pytest.raises(ValueError, match="is in use by process"):
    fill_feature_cache.fill_cache(run, params, mesh)
  assert len(fill_feature_cache.fill_cache(run, params, mesh).clips) == 3
