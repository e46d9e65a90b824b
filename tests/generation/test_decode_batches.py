"""The loop over batches: results of `generate`, one batch ahead, and an orderly end."""

import itertools
import re
import threading

import jax
import numpy as np
import pytest

from mooer_jax.generation import GenerationConfig, continuous, decode_batches, generate
from mooer_jax.sharding import make_mesh, param_shardings

KEY = jax.random.key(3)
ENDS = tuple(range(0, 40, 5))
OPTIONS = {
  "greedy": GenerationConfig(max_new_tokens=7, eos_token_id=ENDS),
  "beams": GenerationConfig(
    max_new_tokens=6, eos_token_id=ENDS, num_beams=3, num_return_sequences=2, early_stopping=True
  ),
  "samples": GenerationConfig(
    max_new_tokens=9, eos_token_id=ENDS, do_sample=True, num_return_sequences=2,
    repetition_penalty=1.2,
  ),
  "one token": GenerationConfig(max_new_tokens=1),
}  # fmt: skip


def _threads():
  return {t for t in threading.enumerate() if t.name.startswith("next batch")}


# Longer prompts, and more rows, than those before; or slots for all of them.
@pytest.mark.parametrize(
  ("name", "prompt_slots"), [*((name, 0) for name in OPTIONS), ("samples", 64)]
)
def test_outputs_are_those_of_generate(params, config, batch, name, prompt_slots):
  options = OPTIONS[name]
  batches = [("a", [20, 13]), ("b", [30, 8, 0, 11]), ("c", [12, 19, 17, 18, 30])]
  batches = [(letter, batch(frames, padded_to=max(frames))) for letter, frames in batches]
  given = dict(key=KEY, prompt_slots=prompt_slots)
  found = list(decode_batches(params, batches, config, options, **given))
  assert [letter for letter, _ in found] == list("abc")
  ended = set()
  for number, (_, output) in enumerate(found):
    of_batch = jax.random.fold_in(KEY, number)
    expected = generate(params, batches[number][1], config, options, key=of_batch)
    for field in ("tokens_BRS", "lengths_BR", "finished_BR"):
      np.testing.assert_array_equal(getattr(output, field), getattr(expected, field))
    np.testing.assert_allclose(output.scores_BR, expected.scores_BR, rtol=1e-4)
    ended |= {*output.lengths_BR.ravel().tolist()}
  assert len(ended) > 2 or name == "one token"  # so that rows end at different times


def test_a_row_that_ends_takes_the_next_utterance(params, config, batch, monkeypatch):
  options = OPTIONS["samples"]
  batches = [(n, batch([20, 13])) for n in range(6)]
  steps = []
  run = continuous._run

  def recorded(**arguments):
    result = run(**arguments)
    steps.append(int(result[0].clock))
    return result

  monkeypatch.setattr(continuous, "_run", recorded)
  found = list(decode_batches(params, batches, config, options, key=KEY))
  # One after the other, each batch needs the steps of its longest answer, but for the last token.
  apart = sum(int(output.lengths_BR.max()) - 1 for _, output in found)
  at_least = sum(int(output.lengths_BR.max(1).sum()) - 2 for _, output in found) / 2
  # The clock counts modulo the ring from its second round on.
  ring = options.max_new_tokens - 1
  rounds = sum(after < before for before, after in itertools.pairwise(steps))
  assert at_least <= steps[-1] + rounds * ring < apart


def test_what_a_diverged_utterance_leaves_behind_does_not_matter(params, config, batch):
  # The token of scores that are all NaN is 0, which does not end it: NaN fills its slots.
  options = GenerationConfig(max_new_tokens=7, eos_token_id=(39,))
  good, bad = batch([20]), batch([20])
  bad = bad.replace(features=tuple(x * np.nan for x in bad.features))
  one, broken, other = decode_batches(
    params, [(0, good), (1, bad), (2, good)], config, options, key=KEY
  )
  assert not np.isfinite(broken[1].scores_BR).all() and broken[1].lengths_BR.max() == 7
  np.testing.assert_array_equal(one[1].tokens_BRS, other[1].tokens_BRS)


def test_the_next_batch_is_made_while_the_device_decodes_and_only_few_more(params, config, batch):
  made, clips = [], batch([20, 13])

  def batches():
    for number in range(6):
      made.append(number)
      yield number, clips

  for number, _ in decode_batches(params, batches(), config, OPTIONS["greedy"], key=KEY):
    # One more waits, one is made.
    assert number < len(made) <= number + 3
  assert number == 5 and not _threads()


def test_an_error_in_a_batch_is_raised_after_the_batches_before_it(params, config, batch):
  def batches():
    yield 0, batch([20])
    yield 1, batch([13])
    raise ValueError("bad clip")

  loop = decode_batches(params, batches(), config, OPTIONS["greedy"], key=KEY)
  assert [next(loop)[0], next(loop)[0]] == [0, 1]
  with pytest.raises(ValueError, match="bad clip"):
    next(loop)
  assert not _threads()


@pytest.mark.parametrize("devices", [1, 2])
def test_each_program_is_compiled_once(params, config, batch, devices, caplog):
  mesh = None
  if devices > 1:
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    params = jax.device_put(params, param_shardings(mesh, params))
  else:
    params = jax.device_put(params, jax.devices()[0])  # as a checkpoint's
  jax.clear_caches()
  batches = [(n, batch([20, 13])) for n in range(4)]
  with jax.log_compiles(), caplog.at_level("WARNING"):
    list(decode_batches(params, batches, config, OPTIONS["samples"], key=KEY, mesh=mesh))
  compiled = re.findall(r"Finished XLA compilation of jit\((_\w+)\)", caplog.text)
  assert sorted(name for name in compiled if name in ("_prefill", "_empty", "_admit", "_run")) == [
    "_admit", "_empty", "_prefill", "_run"
  ]  # fmt: skip


def test_results_without_a_batch_keep_their_place(params, config, batch):
  batches = [("a", None), ("b", batch([20, 13])), ("c", None), ("d", batch([8])), ("e", None)]
  found = list(decode_batches(params, batches, config, OPTIONS["greedy"], key=KEY))
  assert [name for name, _ in found] == list("abcde")
  assert [output is None for _, output in found] == [True, False, True, False, True]


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_the_loop(params, config, batch, end):
  made, clips = [], batch([20])

  def batches():
    for number in range(100):
      made.append(number)
      yield number, clips

  loop = decode_batches(params, batches(), config, OPTIONS["greedy"], key=KEY)
  assert next(loop)[0] == 0 and _threads()
  if end is None:
    loop.close()
  else:
    with pytest.raises(end):
      loop.throw(end)
  assert not _threads()
  assert len(made) <= 4


def test_no_batches_and_batches_without_audio_give_what_they_have(params, config, batch):
  assert not list(decode_batches(params, [], config, OPTIONS["greedy"], key=KEY))
  empty = batch([0, 0])
  [(name, output)] = decode_batches(params, [("a", empty)], config, OPTIONS["greedy"], key=KEY)
  assert name == "a" and not output.lengths_BR.any() and output.finished_BR.all()
  with pytest.raises(ValueError, match="return_hidden=True is only for mooer_jax.generate"):
    next(decode_batches(params, [], config, GenerationConfig(return_hidden=True), key=KEY))
