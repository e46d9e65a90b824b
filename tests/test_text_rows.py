"""Rows without audio, as in training on text: the model is then a plain language model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import speech_llm, tree
from tests import tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

CONFIGS = {"sanm, linear": tiny.model_config(), "whisper, beats, qformer": tiny.salmonn_config()}
TERMS = 5 * 56  # as of tests/test_speech_llm.py
PROMPT, ANSWER = 6, 4


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
  """(config, params, a function of params and batch: (summed loss, its gradient))."""
  config = CONFIGS[request.param]

  def summed(params, batch):
    return speech_llm.loss(params, batch, config)[1]["loss_sum"]

  return config, tiny.init(config), jax.jit(jax.value_and_grad(summed))


def _batch(config, *rows):
  """Two rows, "audio" or "text", in one shape; features behind a row's end are not zero."""
  lengths = [
    frontend.num_frames(round(0.4 * frontend.sample_rate_hz)) for frontend in config.frontends
  ]
  rng = np.random.default_rng(0)
  features = tuple(
    rng.normal(size=(len(rows), n, e.input_width)).astype(np.float32)
    for n, e in zip(lengths, config.encoders, strict=True)
  )
  tokens = [
    np.random.default_rng(9 + number).integers(0, config.decoder.vocab_size, PROMPT + ANSWER)
    for number in range(len(rows))
  ]
  prompt_BS = np.array([t[:PROMPT] for t in tokens], np.int32)
  for row, kind in enumerate(rows):
    if kind == "text":
      prompt_BS[row, 0] = -1  # padding on the left
  return speech_llm.Batch(
    features=features,
    frames=tuple(np.array([n * (kind == "audio") for kind in rows], np.int32) for n in lengths),
    prefix_BS=np.full((len(rows), 2), -1, np.int32),
    suffix_BS=prompt_BS,
    labels_BS=np.array([t[PROMPT:] for t in tokens], np.int32),
  )


def test_a_text_row_has_the_loss_of_the_language_model_alone(model):
  config, params, loss_and_grad = model
  batch = _batch(config, "text", "text")

  def of_llm(params, suffix_BS):
    tokens_BS = jnp.concatenate([suffix_BS, batch.labels_BS[:, :-1]], axis=1)
    hidden_BSD, _ = speech_llm.decode(
      params, speech_llm.embed(params, tokens_BS, config), tokens_BS >= 0, config
    )
    logits = speech_llm.logits(params, hidden_BSD[:, PROMPT - 1 :], config)
    return -jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch.labels_BS[..., None], axis=-1
    ).sum()

  alone = jax.jit(of_llm)
  bound = rounding(TERMS, condition(alone, params, batch.suffix_BS))
  loss, _ = loss_and_grad(params, batch)
  assert_within(loss, alone(params, batch.suffix_BS), bound)
  with exceeds_the_bound():
    assert_within(loss, alone(params, np.roll(batch.suffix_BS, 1)), bound)


def test_a_text_row_trains_the_language_model_and_nothing_else(model):
  config, params, loss_and_grad = model
  _, grads = loss_and_grad(params, _batch(config, "text", "text"))
  of = {path: np.abs(np.asarray(x)).max() for path, x in tree.flatten(grads).items()}
  assert np.isfinite([*of.values()]).all()
  for path, largest in of.items():
    if path.startswith(("encoders/", "connector/", "frontend/", "encoder_norms/")):
      assert largest == 0, path
  assert of["decoder/embed/embedding"] > 0


def test_text_beside_audio_changes_no_gradient_of_the_audio(model):
  config, params, loss_and_grad = model
  both = _batch(config, "audio", "text")
  loss, grads = loss_and_grad(params, both)

  def only(kept):
    labels_BS = np.where(np.arange(2)[:, None] == kept, both.labels_BS, -1)
    return loss_and_grad(params, both.replace(labels_BS=labels_BS))

  (loss_audio, of_audio), (loss_text, of_text) = only(0), only(1)
  assert loss_audio > 0 and loss_text > 0
  terms = 2 * TERMS
  assert_within(loss, loss_audio + loss_text, rounding(terms, abs(loss)))
  for part in ("encoders", "connector"):
    for path, x in tree.flatten(grads[part]).items():
      expected = tree.flatten(of_audio[part])[path]
      assert not np.asarray(tree.flatten(of_text[part])[path]).any(), path
      assert np.isfinite(x).all()
      # The rows are independent: only the order of sums over rows differs.
      assert_within(x, expected, rounding(terms, np.abs(expected).max() + 1e-6))
