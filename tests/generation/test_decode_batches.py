"""The loop over batches: results of `generate`, one batch ahead, and an orderly end."""

import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mooer_jax.generation import GenerationConfig, decode_batches, generate


@pytest.fixture
def fake(monkeypatch):
  """decode_batches with a `generate` that returns its batch; `.generate` may be replaced."""
  fake = SimpleNamespace(generate=lambda batch: batch)
  module = sys.modules[decode_batches.__module__]
  monkeypatch.setattr(module, "generate", lambda params, batch, *rest, **more: fake.generate(batch))
  fake.decode = lambda batches: decode_batches(
    {}, batches, None, GenerationConfig(), key=jax.random.key(0)
  )
  return fake


def _threads():
  return {t for t in threading.enumerate() if t.name.startswith("next batch")}


def test_outputs_are_those_of_generate(params, config, batch):
  clips = batch([20, 13])
  options = GenerationConfig(max_new_tokens=4, do_sample=True)
  key = jax.random.key(3)
  found = list(decode_batches(params, [("a", clips), ("b", clips)], config, options, key=key))
  assert [name for name, _ in found] == ["a", "b"]
  for number, (_, output) in enumerate(found):
    batch_key = jax.random.fold_in(key, number)
    expected = generate(params, clips, config, options, key=batch_key)
    jax.tree.map(np.testing.assert_array_equal, output, expected)
  assert not np.array_equal(found[0][1].tokens_BRS, found[1][1].tokens_BRS)


def test_the_next_batch_is_made_while_the_device_decodes_and_no_further_one(fake):
  started = [threading.Event() for _ in range(6)]
  numbers = iter(range(4))

  def batches():
    for number in numbers:
      started[number].set()
      yield number, number

  def decode(number):  # ends only once the next batch is being made
    assert number == 3 or started[number + 1].wait(60)
    return number

  fake.generate = decode
  for number, output in fake.decode(batches()):
    assert number == output
    assert not started[number + 2].is_set()
  assert number == 3 and not _threads()


def test_an_error_in_a_batch_is_raised_after_the_batches_before_it(fake):
  def batches():
    yield 0, 0
    raise ValueError("bad clip")

  loop = fake.decode(batches())
  assert next(loop) == (0, 0)
  with pytest.raises(ValueError, match="bad clip"):
    next(loop)
  assert not _threads()


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_the_loop(fake, end):
  made = []

  def batches():
    for number in range(100):
      made.append(number)
      yield number, number

  loop = fake.decode(batches())
  assert next(loop) == (0, 0) and _threads()
  if end is None:
    loop.close()
  else:
    with pytest.raises(end):
      loop.throw(end)
  assert not _threads()
  assert len(made) <= 2


def test_an_interrupted_generate_ends_the_thread(fake):
  def interrupted(batch):
    raise KeyboardInterrupt

  fake.generate = interrupted
  with pytest.raises(KeyboardInterrupt):
    next(fake.decode((number, number) for number in range(9)))
  assert not _threads()
