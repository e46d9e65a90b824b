"""Audio tokens in the tokenizer and the LLM of a checkpoint."""

import dataclasses

import jax
import numpy as np
import pytest

from mooer_jax import checkpoint, cli, speech_llm, tree
from mooer_jax.config import from_json, to_json
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.units.add_tokens import add_tokens
from tests import tiny

TOKENIZER = Tokenizer.from_characters("0123456789 ")
START = "<|audio_start|>"


def _save(folder, *, rows, tied=False, only=None):
  """A checkpoint, or a part of it, whose embedding table has so many rows; (config, params)."""
  config = tiny.model_config()
  sizes = dict(vocab_size=rows, tie_word_embeddings=tied, layers=1, lora_rank=0)
  config = config.replace(decoder=dataclasses.replace(config.decoder, **sizes))
  config = config.replace(encoders=(dataclasses.replace(config.encoders[0], layers=2),))
  params = tiny.init(config)
  if only:
    params = {only: params[only]}
  checkpoint.save(
    folder,
    params=params,
    config_json={n: of for n, of in to_json(config).items() if only in (None, n)},
    tokenizer=TOKENIZER.save,
    generation={"max_new_tokens": 7},
  )
  return config, params


@pytest.mark.parametrize(("rows", "tied"), [(14, False), (17, True), (40, False)])
def test_old_tokens_keep_their_rows_and_new_ones_are_near_the_mean(tmp_path, rows, tied):
  _, params = _save(tmp_path / "in", rows=rows, tied=tied, only="decoder")
  known, count = TOKENIZER.vocab_size, 9
  added = add_tokens(tmp_path / "in", tmp_path / "out", count=count, start_token=START)
  loaded = checkpoint.load(tmp_path / "out")
  tokenizer = Tokenizer.from_folder(loaded.tokenizer)
  size = rows if rows >= known + count + 1 else 128
  assert added == (known, size) and loaded.config["decoder"]["vocab_size"] == size
  assert loaded.generation == {"max_new_tokens": 7}
  before, after = tree.flatten(params), tree.flatten(loaded.params)
  tables = {"decoder/embed/embedding": 0} | ({} if tied else {"decoder/head/kernel": 1})
  for path, x in before.items():
    if path not in tables:
      np.testing.assert_array_equal(after[path], x)
  for path, axis in tables.items():
    old_VD, new_VD = (np.moveaxis(np.asarray(x[path]), axis, 0) for x in (before, after))
    np.testing.assert_array_equal(new_VD[:known], old_VD[:known])
    mean_D, deviation_D = old_VD[:known].mean(0), old_VD[:known].std(0)
    fresh_ND = new_VD[known : known + count + 1]
    # Noise of a tenth of the deviation: six times that is never exceeded.
    assert (np.abs(fresh_ND - mean_D) < 0.6 * deviation_D).all()
    assert len(np.unique(fresh_ND, axis=0)) == count + 1
  assert tokenizer.encode(f"12{START}<A_3><A_8>") == [
    *TOKENIZER.encode("12"), known, known + 4, known + 9
  ]  # fmt: skip
  assert tokenizer.eos_id == TOKENIZER.eos_id


def test_the_same_command_makes_the_same_rows(tmp_path):
  _save(tmp_path / "in", rows=14, only="decoder")
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    add_tokens(tmp_path / "in", tmp_path / name, count=3, start_token=START, seed=seed)
  a, b, c = (checkpoint.describe(tmp_path / name).hash for name in "abc")
  assert a == b != c


def test_a_model_with_the_tokens_has_finite_loss_on_speech(tmp_path):
  _save(tmp_path / "in", rows=TOKENIZER.vocab_size)
  add_tokens(tmp_path / "in", tmp_path / "out", count=3, start_token=START)
  loaded = checkpoint.load(tmp_path / "out")
  model, tokenizer = from_json(loaded.config), Tokenizer.from_folder(loaded.tokenizer)
  answer = tokenizer.encode(f"1{START}<A_0><A_2>")
  features_TF, *sides, _ = tiny.row(0, frames=8, config=model)
  sides = [np.asarray(side) % TOKENIZER.vocab_size for side in sides]
  batch = tiny.batch([(features_TF, *sides, np.array(answer))])
  loss, _ = jax.jit(lambda p: speech_llm.loss(p, batch, model))(loaded.params)
  assert np.isfinite(loss)


def test_a_fine_tune_becomes_a_whole_checkpoint(tmp_path):
  config, params = _save(tmp_path / "in", rows=40)
  trained = tree.partition(params, ("connector/.*",))[0]
  moved = jax.tree.map(lambda x: x + 1, trained)
  checkpoint.save(
    tmp_path / "tuned", params=moved, config_json=to_json(config), tokenizer=TOKENIZER.save,
    generation={}, base=tmp_path / "in",
  )  # fmt: skip
  add_tokens(tmp_path / "tuned", tmp_path / "out", count=3, start_token=START)
  loaded = checkpoint.load(tmp_path / "out")
  assert loaded.base is None
  for path, x in tree.flatten(moved).items():
    np.testing.assert_array_equal(tree.flatten(loaded.params)[path], x)


def test_errors_name_the_checkpoint_and_leave_nothing(tmp_path, capsys):
  _save(tmp_path / "in", rows=40, only="decoder")
  arguments = ["--count", "3", "--out"]
  out = str(tmp_path / "out")
  command = ["units", "add-tokens", "--checkpoint"]
  assert cli.main([*command, str(tmp_path / "in"), *arguments, out]) == 0
  assert "train with --config.model.llm.vocab_size=40" in capsys.readouterr().out
  assert cli.main([*command, str(tmp_path / "in"), *arguments, out]) == 2
  assert "exists; choose another --out" in capsys.readouterr().err
  assert cli.main([*command, out, *arguments, str(tmp_path / "twice")]) == 2
  assert f"{out}: the tokenizer already has the token '{START}'" in capsys.readouterr().err
  assert not (tmp_path / "twice").exists()
