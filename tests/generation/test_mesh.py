"""Decoding on a mesh: the tokens of one device, the cache split by rows and heads."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from mooer_jax import speech_llm
from mooer_jax.generation import GenerationConfig, decode_batches, generate, generate_from
from mooer_jax.sharding import make_mesh, param_shardings
from tests import tiny
from tests.test_pmap import batch_of

GREEDY = GenerationConfig(max_new_tokens=8, eos_token_id=(3,))
BEAMS = dataclasses.replace(GREEDY, num_beams=4)
# Candidates whose scores differ by less than this may change places when sums are rounded in
# another order; of all cases, this may happen in 1 %.
CLOSE, EXCUSED = 2e-5, 0.01
# The tiny LLM has 2 KV heads: split over tensor=2, replicated over tensor=4.
MESHES = {
  "rows": dict(data=8, fsdp=1, tensor=1),
  "fsdp": dict(data=1, fsdp=8, tensor=1),
  "heads": dict(data=2, fsdp=2, tensor=2),
  "replicated_heads": dict(data=1, fsdp=2, tensor=4),
}


def on_mesh(params, sizes):
  """(mesh of 8 faked devices, params on it, with each leaf split as far as the rules allow)."""
  mesh = make_mesh(**sizes)
  return mesh, jax.device_put(params, param_shardings(mesh, params, fsdp_min_size=0))


def gap(params, config, batch, row, *, ours, theirs) -> float:
  """Difference of the scores of two hypotheses of a row; of the next token, where they part."""
  if ours.beams:
    return abs(ours.score - theirs.score)
  first = int(np.argmax(ours.tokens_S != theirs.tokens_S))
  one = jax.tree.map(lambda x: x[row : row + 1], batch)
  labels_BS = np.maximum(theirs.tokens_S, 0)[None]
  logits_V = speech_llm.answer_logits(params, one.replace(labels_BS=labels_BS), config)[0, first]
  return abs(float(logits_V[ours.tokens_S[first]] - logits_V[theirs.tokens_S[first]]))


@dataclasses.dataclass
class Hypothesis:
  tokens_S: np.ndarray
  score: float
  beams: bool


def assert_same_tokens(params, config, batch, *, options, found, expected):
  """Fails for other tokens than on one device, unless candidates are close, which it prints."""
  assert found.tokens_BS.shape == expected.tokens_BS.shape
  excused = []
  for row in range(len(expected.tokens_BS)):
    ours, theirs = (
      Hypothesis(np.asarray(x.tokens_BS[row]), float(x.scores_B[row]), options.num_beams > 1)
      for x in (found, expected)
    )
    if not np.array_equal(ours.tokens_S, theirs.tokens_S):
      difference = gap(params, config, batch, row, ours=ours, theirs=theirs)
      assert difference < CLOSE, f"row {row}: {ours} on the mesh, {theirs} on one device"
      excused.append((row, difference, ours, theirs))
  print(f"excused: {excused}")
  assert len(excused) <= EXCUSED * len(expected.tokens_BS), excused


def test_greedy_tokens_equal_those_of_one_device_and_the_cache_is_split(params, config, batch):
  clips = batch([20, 13, 7, 5, 11], padded_to=28)  # of 8 rows, 3 are padding
  expected = generate(params, clips, config, GREEDY)
  mesh, split = on_mesh(params, MESHES["heads"])
  compiled = generate.lower(split, clips, config, GREEDY, mesh=mesh).compile()
  found = jax.device_get(compiled(split, clips))
  assert_same_tokens(params, config, clips, options=GREEDY, found=found, expected=expected)
  assert len({tuple(row) for row in found.tokens_BS.tolist()}) == 5  # else the test shows little
  # Of 8 rows and 16 channels, a device has 2 and 8.
  text = compiled.as_text()
  slots = config.connector.num_tokens(28) + clips.suffix_BS.shape[1] + GREEDY.max_new_tokens - 1
  assert f"f32[2,{slots},8]" in text
  assert not re.search(rf"f32\[(8,{slots},\d+|\d+,{slots},16)\]", text)


def test_beams_of_padded_batches_equal_those_of_one_device(params, config, batch):
  clips = batch([20, 13, 7, 5, 11], padded_to=28)
  key = jax.random.key(0)
  mesh, split = on_mesh(params, MESHES["replicated_heads"])
  [(_, expected)] = decode_batches(params, [(0, clips)], config, BEAMS, key=key)
  [(name, found)] = decode_batches(split, [("a", clips)], config, BEAMS, key=key, mesh=mesh)
  assert name == "a" and isinstance(found.tokens_BRS, np.ndarray)
  assert_same_tokens(params, config, clips, options=BEAMS, found=found, expected=expected)


@pytest.mark.nightly
@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", ["mooer", "salmonn"])
def test_many_rows_on_every_mesh(model, mesh, options):
  """126 clips; the tokens of each are those of one device."""
  vocab = dataclasses.replace(tiny.LLM_CONFIG, vocab_size=64)
  config = tiny.model_config() if model == "mooer" else tiny.salmonn_config()
  config = config.replace(decoder=vocab)
  frames = 14 if model == "mooer" else 64
  params = tiny.init(config)
  parts = [batch_of(config, frames, seed=seed) for seed in range(16)]
  clips = jax.tree.map(lambda *x: np.concatenate(x)[:126], *parts)
  expected = jax.device_get(generate(params, clips, config, options))
  mesh, split = on_mesh(params, MESHES[mesh])
  found = jax.device_get(generate(split, clips, config, options, mesh=mesh))
  assert_same_tokens(params, config, clips, options=options, found=found, expected=expected)
  assert len({tuple(row) for row in expected.tokens_BS.tolist()}) > 60


def test_rows_and_meshes_that_do_not_fit_are_named(params, config, batch):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  inputs_BSD, valid_BS = np.zeros((5, 3, 32), np.float32), np.ones((5, 3), bool)
  with pytest.raises(ValueError, match=r"5 rows .* mesh\.data x mesh\.fsdp=4"):
    generate_from(params, inputs_BSD, valid_BS, config, GREEDY, mesh=mesh)
  odd = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
  with pytest.raises(ValueError, match=r"must have the axes data, fsdp, tensor .*make_mesh"):
    generate(params, batch([20]), config, GREEDY, mesh=odd)
