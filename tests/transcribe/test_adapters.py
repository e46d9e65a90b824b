"""Adapters beside one checkpoint: each clip is transcribed as with its own adapter merged."""

import dataclasses
import itertools

import numpy as np
import pytest

import mooer_jax
from mooer_jax import checkpoint, tree
from mooer_jax.config import from_json, to_json
from mooer_jax.text.tokenizer import Tokenizer
from tests import tiny

OTHERS = ("medical", "legal")


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
  """{name: fine-tune of `folder` that trained a LoRA alone}."""
  about = checkpoint.describe(folder)
  plain = from_json(about.config)
  decoder = dataclasses.replace(plain.decoder, lora_rank=2, lora_alpha=8.0)
  config = dataclasses.replace(plain, decoder=decoder)
  found = {}
  for seed, name in enumerate(OTHERS, 1):
    leaves = tree.flatten(tiny.init(config, seed))
    found[name] = checkpoint.save(
      tmp_path_factory.mktemp("adapters") / name,
      params=tree.unflatten({path: x for path, x in leaves.items() if "/lora_" in path}),
      config_json=to_json(config),
      tokenizer=Tokenizer.from_folder(about.tokenizer).save,
      generation=about.generation,
      base=folder,
    )
  return found


@pytest.fixture(scope="module")
def several(folder, folders):
  return mooer_jax.Transcriber.from_checkpoint(folder, adapters=folders)


def tokens(results):
  return [result.tokens for result in results]


@pytest.fixture(scope="module")
def alone(folder, folders, clips):
  """{name, or None for the base: the tokens of all clips with this adapter merged}."""
  paths = [clip.path for clip in clips]
  return {
    name: tokens(mooer_jax.Transcriber.from_checkpoint(path).transcribe(paths, batch_size=2))
    for name, path in {None: folder, **folders}.items()
  }


def test_each_clip_has_its_own_adapter_or_all_have_one(several, alone, clips):
  paths = [clip.path for clip in clips]
  names = list(itertools.islice(itertools.cycle([None, *OTHERS]), len(paths)))
  assert all(alone[a] != alone[b] for a, b in itertools.combinations(alone, 2))
  expected = [alone[name][n] for n, name in enumerate(names)]
  assert tokens(several.transcribe(paths, adapter=names, batch_size=2)) == expected
  for name in alone:
    assert tokens(several.transcribe(paths, adapter=name, batch_size=2)) == alone[name]
  endless = several.stream(itertools.cycle(paths), adapter=itertools.cycle(names), batch_size=2)
  assert tokens(itertools.islice(endless, len(paths))) == expected
  endless.close()


def test_the_chunks_of_a_clip_have_its_adapter(several, folders, long_clip):
  given = dict(chunk_length_s=4.0, batch_size=2)
  medical, base = several.transcribe([long_clip] * 2, adapter=["medical", None], **given)
  merged = mooer_jax.Transcriber.from_checkpoint(folders["medical"])
  [expected] = merged.transcribe([long_clip], **given)
  assert medical.tokens == expected.tokens != base.tokens
  assert len(medical.pieces) > 3


def test_a_mesh_changes_no_result(folder, folders, alone, clips):
  mesh = mooer_jax.make_mesh(data=2, tensor=4)
  on_mesh = mooer_jax.Transcriber.from_checkpoint(folder, adapters=folders, mesh=mesh)
  paths = [clip.path for clip in clips[:3]]
  found = tokens(on_mesh.transcribe(paths, adapter=["legal", None, "medical"], batch_size=2))
  assert found == [alone["legal"][0], alone[None][1], alone["medical"][2]]


def test_warmup_compiles_the_programs_of_adapters(several, clips, caplog):
  import jax

  options = dict(batch_size=1, max_new_tokens=2)
  several.warmup(max_audio_s=1.0, **options)
  short_N = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
  with jax.log_compiles(), caplog.at_level("WARNING"):
    several.transcribe([short_N], adapter="legal", **options)
  assert "XLA compilation of jit(_" not in caplog.text


def test_wrong_adapters_are_named(transcriber, several, clips):
  paths = [clips[0].path] * 2
  for call in (several.transcribe, several.stream):
    for wrong, message in (
      ("x", "no adapter 'x'; there are medical, legal"),
      (["legal", "x"], "no adapter 'x'; there are medical, legal"),
      (["legal", 3], r"adapter=3 \(int\): must be the name of an adapter"),
      (3, r"adapter=3 \(int\): must be a name, or a list of one per clip"),
    ):
      with pytest.raises(ValueError, match=message):
        call(paths, adapter=wrong)
  with pytest.raises(ValueError, match="adapter='x' has no effect: no adapter was loaded"):
    transcriber.transcribe(paths, adapter="x")
  for names, message in ((1, "1 names, but more clips"), (3, "2 clips, but more names")):
    with pytest.raises(ValueError, match=f"adapter: {message}; give one name for all clips"):
      several.transcribe(paths, adapter=["legal"] * names)
    with pytest.raises(ValueError, match=f"adapter: {message}"):
      list(several.stream(paths, adapter=iter(["legal"] * names)))
  found = several.stream(paths, adapter=iter(["legal", "x"]), batch_size=1)
  assert next(found).tokens
  with pytest.raises(ValueError, match="no adapter 'x'"):
    next(found)
