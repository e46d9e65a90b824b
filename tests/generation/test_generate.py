"""Properties of decoding: the cache changes nothing, rows are independent, rows stop alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import speech_llm, tree
from mooer_jax.generation import GenerationConfig, generate

LENGTH_8 = GenerationConfig(max_new_tokens=8)


def greedy_without_cache(params, batch, config, steps):
  """Runs the whole sequence again for every token; those not known yet are zeros."""
  logits = jax.jit(lambda batch: speech_llm.answer_logits(params, batch, config))
  tokens_BS = np.zeros((len(batch.frames[0]), steps), np.int32)
  for n in range(steps):
    tokens_BS[:, n] = logits(batch.replace(labels_BS=tokens_BS))[:, n].argmax(-1)
  return tokens_BS


def test_cached_greedy_decoding_equals_the_full_pass(params, config, batch):
  clips = batch([20, 13, 7])
  found = generate(params, clips, config, LENGTH_8)
  expected = greedy_without_cache(params, clips, config, 8)
  np.testing.assert_array_equal(found.tokens_BS, expected)
  assert len({tuple(row) for row in expected.tolist()}) == 3  # else the test shows little
  assert max(len(set(row)) for row in expected.tolist()) > 2


def test_a_row_stops_at_its_own_eos_and_the_others_go_on(params, config, batch):
  clips = batch([20, 13, 7])
  free = np.asarray(generate(params, clips, config, LENGTH_8).tokens_BS)
  eos = int(free[0, 2])
  found = generate(params, clips, config, GenerationConfig(max_new_tokens=8, eos_token_id=(eos,)))
  for row, tokens in enumerate(free.tolist()):
    length = tokens.index(eos) + 1 if eos in tokens else 8
    np.testing.assert_array_equal(found.tokens_BS[row, :length], tokens[:length])
    assert (found.tokens_BS[row, length:] == -1).all()
    assert found.lengths_B[row] == length
    assert found.finished_B[row] == (eos in tokens)


def test_several_eos_ids_each_end_an_answer(params, config, batch):
  clips = batch([20])
  free = np.asarray(generate(params, clips, config, LENGTH_8).tokens_BS)[0]
  ids = (int(free[3]), int(free[1]))
  found = generate(params, clips, config, GenerationConfig(max_new_tokens=8, eos_token_id=ids))
  assert found.lengths_B[0] == min(free.tolist().index(i) for i in ids) + 1


def test_padding_and_neighbours_change_no_answer(params, config, batch):
  options = LENGTH_8
  together = generate(params, batch([20, 13, 7, 0], padded_to=32), config, options)
  for row, count in enumerate([20, 13, 7]):
    alone = generate(params, batch([count], padded_to=count), config, options)
    np.testing.assert_array_equal(together.tokens_BS[row], alone.tokens_BS[0])
  assert together.lengths_B[3] == 0 and together.finished_B[3]  # a row of padding


def test_sampling_repeats_with_its_key_and_ignores_the_batch_size(params, config, batch):
  options = GenerationConfig(max_new_tokens=8, do_sample=True)
  one = generate(params, batch([20]), config, options, key=jax.random.key(1))
  again = generate(params, batch([20, 13]), config, options, key=jax.random.key(1))
  other = generate(params, batch([20]), config, options, key=jax.random.key(2))
  np.testing.assert_array_equal(one.tokens_BS[0], again.tokens_BS[0])
  assert (np.asarray(one.tokens_BS) != np.asarray(other.tokens_BS)).any()


def test_sampling_from_the_best_token_alone_is_greedy(params, config, batch):
  greedy = generate(params, batch([20, 7]), config, LENGTH_8)
  for options in (
    GenerationConfig(max_new_tokens=8, do_sample=True, top_k=1),
    GenerationConfig(max_new_tokens=8, do_sample=True, top_p=1e-6),
    GenerationConfig(max_new_tokens=8, do_sample=True, temperature=1e-6),
  ):
    sampled = generate(params, batch([20, 7]), config, options, key=jax.random.key(0))
    np.testing.assert_array_equal(sampled.tokens_BS, greedy.tokens_BS)


def test_the_loop_ends_with_the_last_row(params, config, batch):
  """An answer of two tokens costs the same number of decode steps whatever the limit is."""
  clips = batch([20])
  free = np.asarray(generate(params, clips, config, LENGTH_8).tokens_BS)[0]
  options = GenerationConfig(max_new_tokens=8, eos_token_id=(int(free[0]),))
  steps = []

  def count(params, *args, **kwargs):
    jax.debug.callback(lambda: steps.append(1))
    return decode(params, *args, **kwargs)

  decode, speech_llm.decode = speech_llm.decode, count
  try:
    run = jax.jit(lambda params, clips: generate.__wrapped__(params, clips, config, options))
    jax.block_until_ready(run(params, clips))
    jax.effects_barrier()
  finally:
    speech_llm.decode = decode
  assert len(steps) == 1  # the prefill gave the eos; nothing is decoded after it


def test_one_program_for_each_shape(params, config, batch):
  generate.clear_cache()
  for frames in ([20, 13], [7, 5], [16, 1]):
    generate(params, batch(frames), config, GenerationConfig(max_new_tokens=4))
  assert generate._cache_size() == 1


def test_bad_calls_say_what_to_do(params, config, batch):
  with pytest.raises(ValueError, match="key"):
    generate(params, batch([20]), config, GenerationConfig(do_sample=True))
  with pytest.raises(ValueError, match="unstack_layers"):
    generate(params, batch([20]), config.with_compute(scan=True), GenerationConfig())
  with pytest.raises(ValueError, match="unstack_layers"):
    generate(tree.stack_layers(params), batch([20]), config, GenerationConfig())
  for wrong in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      dataclasses.replace(GenerationConfig(), **wrong)


@pytest.mark.parametrize(
  ("name", "wrong"),
  [
    ("max_new_tokens", 2.5),
    ("max_new_tokens", "20"),
    ("num_beams", True),
    ("do_sample", "no"),
    ("temperature", None),
    ("eos_token_id", 2),
    ("early_stopping", "always"),
    ("sequence_bias", ((5,),)),
  ],
)
def test_an_option_of_another_type_is_named(name, wrong):
  with pytest.raises(ValueError, match=rf"generation\.{name}"):
    GenerationConfig(**{name: wrong})


def test_lists_become_tuples_so_that_options_can_be_hashed():
  options = GenerationConfig(eos_token_id=[2, 3], sequence_bias=[[5, 1]])
  assert (options.eos_token_id, options.sequence_bias) == ((2, 3), ((5, 1.0),))
  assert hash(options) == hash(GenerationConfig(eos_token_id=(2, 3), sequence_bias=((5, 1.0),)))


def test_bfloat16_decodes(params, config, batch):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  in_half = config.with_compute(dtype="bfloat16")
  found = generate(half, batch([20]), in_half, GenerationConfig(max_new_tokens=4))
  assert (np.asarray(found.tokens_BS) >= 0).all()
