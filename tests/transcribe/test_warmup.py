"""`mooer-jax warmup`: the programs that it compiles are those that transcription runs."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import mooer_jax
from mooer_jax import cli
from mooer_jax.generation import decode_batches
from mooer_jax.transcribe import transcriber as module


def shape_of(batch):
  return batch.features[0].shape


@pytest.mark.parametrize("features", ["host", "device"])
def test_every_shape_that_is_decoded_was_compiled(folder, monkeypatch, features):
  transcriber = mooer_jax.Transcriber.from_checkpoint(folder, features=features)
  compiled, decoded = [], []
  monkeypatch.setattr(
    module, "compile_batch", lambda _, batch, *more, **options: compiled.append(shape_of(batch))
  )

  def decode(params, batches, *more, **options):
    decoded.extend(shape_of(batch) for _, batch in batches if batch is not None)
    return decode_batches(params, [], *more, **options)

  monkeypatch.setattr(module, "decode_batches", decode)
  assert transcriber.warmup(batch_size=3) == len(compiled) == len(set(compiled))
  assert {shape[0] for shape in compiled} == {1, 2, 3}
  speech_N = np.random.default_rng(0).normal(0, 0.1, 6 * 16000).astype(np.float32)
  for seconds in (0.2, 2.1, 2.5, 3.0, 3.5, 4.2, 5.0, 5.97, 6.0):
    for number in range(1, 6):
      transcriber.transcribe([speech_N[: int(16000 * seconds)]] * number, batch_size=3)
  assert set(decoded) == set(compiled)
  everything = set(compiled)
  compiled.clear()
  transcriber.warmup(batch_size=1, max_audio_s=2.0)
  assert 0 < len(compiled) < len(everything) / 3 and set(compiled) < everything


def test_transcription_finds_the_programs_in_the_cache(folder, clips, tmp_path, capsys):
  given = {"jax_compilation_cache_dir": str(tmp_path),
           "jax_persistent_cache_min_compile_time_secs": 0}  # fmt: skip
  before = {name: getattr(jax.config, name) for name in given}
  programs = lambda: {path.name for path in tmp_path.glob("jit__[par]*-cache")}  # noqa: E731
  try:
    for name, value in given.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    options = ["--checkpoint", str(folder), "--batch-size", "1", "--max-new-tokens", "3"]
    assert cli.main(["warmup", *options, "--max-audio-s", "1"]) == 0
    warm = programs()
    assert capsys.readouterr().out == "batch shapes compiled: 1\n"
    assert len(warm) == 3  # prefill, admission, the loop of steps
    jax.clear_caches()
    clip = [str(clips[0].path)]
    assert cli.main(["transcribe", *options, *clip]) == 0
    assert programs() == warm
    assert cli.main(["transcribe", *options[:-1], "4", *clip]) == 0
    assert programs() > warm  # so the names would show a miss
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_bad_arguments_are_refused_by_name(folder, transcriber, capsys):
  with pytest.raises(ValueError, match=r"max_audio_s=7: must be between 0.085 and 6 "):
    transcriber.warmup(max_audio_s=7)
  with pytest.raises(ValueError, match="temperature has no effect"):
    transcriber.warmup(temperature=0.5)
  with pytest.raises(ValueError, match="batch_size=0"):
    transcriber.warmup(batch_size=0)
  assert cli.main(["warmup", "--checkpoint", str(folder), "--task", "ast2"]) == 2
  assert "ast2" in capsys.readouterr().err
