import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mooer_jax import speech_llm, tree
from mooer_jax.config import SpeechLLMConfig, model_config
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.generation import GenerationConfig, generate
from mooer_jax.inputs import encoder_inputs, extract_features, padded_lengths
from tests import jaxprs, tiny
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding

CONFIG = tiny.model_config()
TRAINABLE = ("connector/.*", "decoder/.*/lora_[ab]")
ROWS = [
  tiny.row(0, frames=13, answer=5),
  tiny.row(1, frames=6, before=2, after=3, answer=2),
  tiny.row(2, frames=1, after=1, answer=7),  # too short for a speech token
]
SIZES = dict(frames=13, before=2, after=6, answer=7)  # those of ROWS
TERMS = 5 * 56  # the longest sums, over the MLP or a frame's features, in each of five layers


@pytest.fixture(scope="module")
def params():
  return tiny.init(CONFIG)


@pytest.fixture(scope="module")
def answer_logits():
  return jax.jit(lambda params, batch: speech_llm.answer_logits(params, batch, CONFIG))


@pytest.fixture(scope="module")
def loss():
  return jax.jit(lambda params, batch: speech_llm.loss(params, batch, CONFIG))


@pytest.fixture(scope="module")
def logit_bound(params, answer_logits):
  """Bound on what rounding changes of the logits of ROWS."""
  return rounding(TERMS, condition(answer_logits, params, tiny.batch(ROWS)))


@pytest.fixture(scope="module")
def loss_bound(params, loss):
  """Bound on what rounding changes of the summed loss of ROWS, and of the loss per token."""

  def losses(params, batch):
    value, sums = loss(params, batch)
    return {"sum": sums["loss_sum"], "mean": value}

  return rounding(TERMS, condition(losses, params, tiny.batch(ROWS, **SIZES)))


@pytest.mark.parametrize(
  "fault",
  [
    {"rope_theta": 1.1e6},
    {"lora_alpha": 1.001 * CONFIG.decoder.lora_alpha},
  ],
  ids=str,
)
def test_another_setting_of_the_llm_is_no_rounding(
  params, answer_logits, loss, logit_bound, loss_bound, fault
):
  other = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, **fault))
  batch = tiny.batch(ROWS)
  logits, other_loss = jax.jit(
    lambda params: (
      speech_llm.answer_logits(params, batch, other),
      speech_llm.loss(params, batch, other)[0],
    )
  )(params)
  with exceeds_the_bound():
    assert_within(logits, answer_logits(params, batch), logit_bound)
  with exceeds_the_bound():
    assert_within(other_loss, loss(params, batch)[0], loss_bound["mean"])


def test_frames_or_tokens_one_place_further_are_no_rounding(params, answer_logits, logit_bound):
  batch = tiny.batch(ROWS)
  later = batch.replace(features=(np.roll(batch.features[0], 1, axis=1),))
  more = batch.replace(frames=(batch.frames[0] + [0, 1, 1],))
  for other in (later, more):
    with exceeds_the_bound():
      assert_within(answer_logits(params, other), answer_logits(params, batch), logit_bound)


def test_padding_and_batch_size_change_nothing(params, answer_logits, logit_bound):
  wide = tiny.batch(ROWS, frames=19, before=4, after=9, answer=8)
  together = answer_logits(params, wide)
  assert together.shape == (3, 8, CONFIG.decoder.vocab_size) and together.dtype == jnp.float32
  for n in (1, 2):  # row 2 has no speech token at all
    alone = answer_logits(params, tiny.batch([ROWS[n]]))
    assert_within(together[n, : len(ROWS[n][3])], alone[0], logit_bound)
  tight = answer_logits(params, tiny.batch(ROWS, **SIZES))
  for n, row in enumerate(ROWS):
    assert_within(together[n, : len(row[3])], tight[n, : len(row[3])], logit_bound)


def test_a_padding_row_changes_nothing_and_stays_finite(params, loss, loss_bound):
  nothing = (np.zeros((0, 56), np.float32), *[np.zeros(0, int)] * 3)
  _, sums = loss(params, tiny.batch(ROWS, **SIZES))
  parts = [
    loss(params, tiny.batch(rows, **SIZES))[1]
    for rows in ([*ROWS[:2], nothing], [nothing, ROWS[2], nothing])
  ]
  together = jax.tree.map(jnp.add, *parts)
  assert_within(together["loss_sum"], sums["loss_sum"], loss_bound["sum"])
  assert together["tokens"] == sums["tokens"] and together["correct"] == sums["correct"]
  value, sums = loss(params, tiny.batch([nothing] * 3, **SIZES))
  assert value == 0 and sums["tokens"] == 0


def test_loss_is_the_cross_entropy_of_answer_and_eos_in_float64(
  params, answer_logits, loss, loss_bound
):
  batch = tiny.batch(ROWS)
  logits = np.asarray(answer_logits(params, batch), np.float64)
  nats, correct = [], 0
  for n, (*_, answer) in enumerate(ROWS):
    for t, token in enumerate(answer):
      row = logits[n, t] - logits[n, t].max()
      nats.append(np.log(np.exp(row).sum()) - row[token])
      correct += row.argmax() == token
  value, sums = loss(params, batch)
  assert sums["tokens"] == len(nats) == 14 and sums["correct"] == correct
  assert_within(sums["loss_sum"], sum(nats), loss_bound["sum"])
  assert_within(value, np.mean(nats), loss_bound["mean"])


def test_correct_counts_hits_on_answers_only(params, answer_logits, loss):
  # Greedy answers token by token, so that every one of them is a hit.
  features, before, after, _ = ROWS[0]
  answer = np.zeros(4, int)
  for t in range(4):
    batch = tiny.batch([(features, before, after, answer)] * 3, **SIZES)
    answer[t] = answer_logits(params, batch)[0, t].argmax()
  right = (features, before, after, answer)
  _, sums = loss(params, tiny.batch([right] * 3, **SIZES))
  assert sums["correct"] == sums["tokens"] == 3 * 4
  wrong = (features, before, after, np.append(answer[:3], (answer[3] + 1) % 61))
  assert loss(params, tiny.batch([wrong, right, right], **SIZES))[1]["correct"] == 11


def test_waveforms_give_what_their_features_give(params, answer_logits):
  rng = np.random.default_rng(0)
  waveforms = [0.1 * rng.normal(size=n).astype(np.float32) for n in (9000, 5000)]
  rows = [
    (CONFIG.frontends[0].features(w), *row[1:]) for w, row in zip(waveforms, ROWS, strict=False)
  ]
  batch = tiny.batch(rows)
  expected = answer_logits(params, batch)
  padded = np.zeros((2, 9600), np.float32)
  for line, waveform in zip(padded, waveforms, strict=True):
    line[: len(waveform)] = waveform
  samples = np.array([9000, 5000], np.int32)
  heard = batch.replace(features=(padded,), frames=(samples,))
  # Before the model's sums there are those over a window's 400 samples.
  bound = rounding(400 + TERMS, condition(answer_logits, params, heard))
  assert_within(answer_logits(params, heard), expected, bound)
  with exceeds_the_bound():
    one_late = heard.replace(features=(np.roll(padded, 1, axis=1),))
    assert_within(answer_logits(params, one_late), expected, bound)


def test_two_encoders_share_one_waveform():
  rng = np.random.default_rng(0)
  clips = [0.1 * rng.normal(size=n).astype(np.float32) for n in (12800, 7000)]
  batches = []
  for place in ("host", "device"):
    config = tiny.salmonn_config(features=place)
    inputs = [extract_features(clip_N, config) for clip_N in clips]
    buckets = padded_lengths((60, 80), config)
    features, frames = encoder_inputs(inputs, rows=3, buckets=buckets)  # one row is padding
    rows = [tiny.row(seed, frames=1, answer=4, config=config) for seed in range(3)]
    batches.append(tiny.batch(rows).replace(features=features, frames=frames))
  of_features, of_waveforms = batches
  assert not of_features.has_waveforms and of_waveforms.has_waveforms
  params = tiny.init(config)
  logits = jax.jit(lambda params, batch: speech_llm.answer_logits(params, batch, config))
  expected = logits(params, of_features)
  bound = rounding(400 + TERMS, condition(logits, params, of_waveforms))
  assert_within(logits(params, of_waveforms), expected, bound)
  (waveform_BN,) = of_waveforms.features
  with exceeds_the_bound():
    one_late = of_waveforms.replace(features=(np.roll(waveform_BN, 1, axis=1),))
    assert_within(logits(params, one_late), expected, bound)


def test_cmvn_is_the_first_step(params, answer_logits, logit_bound):
  shift, scale = (params["frontend"]["sanm"][name] for name in ("shift", "scale"))
  assert shift.any() and (scale != 1).any()
  identity = {"shift": jnp.zeros_like(shift), "scale": jnp.ones_like(scale)}
  normed = [((row[0] + shift) * scale, *row[1:]) for row in ROWS]
  expected = answer_logits(params | {"frontend": {"sanm": identity}}, tiny.batch(normed))
  assert_within(answer_logits(params, tiny.batch(ROWS)), expected, logit_bound)


def test_speech_stands_between_before_and_after(params):
  batch = tiny.batch(ROWS)
  inputs, valid = jax.jit(lambda p, b: speech_llm.prompt(p, b, CONFIG))(params, batch)
  assert inputs.shape == (3, 2 + 6 + 6, CONFIG.decoder.hidden_size)
  np.testing.assert_array_equal(valid.sum(1), [0 + 6 + 6, 2 + 3 + 3, 0 + 0 + 1])
  table = params["decoder"]["embed"]["embedding"]
  np.testing.assert_array_equal(inputs[1, :2], table[ROWS[1][1]])
  np.testing.assert_array_equal(inputs[0, 8:], table[ROWS[0][2]])


def test_a_prompt_that_ends_in_speech_is_refused(params):
  rows = [tiny.row(n, frames=8, after=0) for n in range(2)]
  with pytest.raises(ValueError, match="ends with the speech; at least one token must follow"):
    speech_llm.answer_logits(params, tiny.batch(rows), CONFIG)


def trace_training(config, batch, patterns=TRAINABLE):
  """The jaxpr of the loss and the gradient of the trainable part."""
  shapes = jax.eval_shape(lambda key: speech_llm.init(key, config), jax.random.key(0))
  trainable, frozen = tree.partition(shapes, patterns)

  def value(trainable, frozen, batch):
    return speech_llm.loss(tree.merge(trainable, frozen), batch, config)

  step = jax.value_and_grad(value, has_aux=True)
  return jax.make_jaxpr(step)(trainable, frozen, batch)


def test_no_gradient_is_computed_for_frozen_parts():
  batch = tiny.batch(ROWS)
  everything = trace_training(CONFIG, batch, (".*",))
  trained = trace_training(CONFIG, batch)
  forward = jax.make_jaxpr(lambda p, b: speech_llm.loss(p, b, CONFIG))(tiny.init(CONFIG), batch)
  count = [len(jaxprs.dots(program)) for program in (forward, trained, everything)]
  encoder_layers, llm_layers = CONFIG.encoders[0].layers, CONFIG.decoder.layers
  # A layer of the encoder has 6 products and the backward pass of each takes two.
  assert count[2] - count[1] >= 2 * 6 * encoder_layers - 1
  # What is left: one for the input of each product of the LLM (7 dense, 14 LoRA, 2 attention, for
  # which it takes 2) and one for each weight that learns (14 LoRA a layer, 2 of the connector).
  assert count[1] - count[0] <= llm_layers * (7 + 14 + 4 + 14) + 4 + 1


@pytest.mark.parametrize("scan", [False, True])
def test_logits_exist_at_answer_positions_only(scan):
  vocab, answers = 1009, 5  # sizes that no other axis has
  llm = dataclasses.replace(tiny.LLM_CONFIG, vocab_size=vocab)
  config = tiny.model_config(llm=llm, scan=scan, remat="full" if scan else "none")
  batch = tiny.batch([tiny.row(n, frames=40, config=config) for n in range(3)])
  program = trace_training(config, batch)
  with_vocab = {shape for shape in jaxprs.shapes(program) if vocab in shape}
  assert (3, answers, vocab) in with_vocab
  positions = {int(np.prod(shape)) // vocab for shape in with_vocab}
  # 3 x 5 answers, never the 3 x 30 positions of the whole sequence; width: the head and the table.
  assert positions <= {1, 3 * answers, config.decoder.hidden_size}


@pytest.mark.parametrize("scan", [False, True])
def test_float32_asks_for_the_highest_precision_everywhere(scan):
  config = CONFIG.with_compute(scan=scan)
  program = trace_training(config, tiny.batch(ROWS))
  dots = jaxprs.dots(program)
  assert len(dots) > 40
  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert all(dot.params["precision"] == highest for dot in dots)


def test_bfloat16_computes_its_products_in_bfloat16():
  # Float32 cotangents meet bfloat16 weights only behind the float32 logits and scores.
  forward = jax.make_jaxpr(
    lambda p, b: speech_llm.loss(p, b, CONFIG.with_compute(dtype="bfloat16"))
  )(tiny.init(CONFIG), tiny.batch(ROWS))
  assert {v.aval.dtype.name for dot in jaxprs.dots(forward) for v in dot.invars} == {"bfloat16"}


def test_bfloat16_with_bfloat16_frozen_weights_is_close(params, loss):
  batch = tiny.batch(ROWS)
  trainable, frozen = tree.partition(params, (*TRAINABLE, "frontend/.*"))
  stored = tree.merge(trainable, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), frozen))
  config = CONFIG.with_compute(dtype="bfloat16")
  value, _ = jax.jit(lambda p, b: speech_llm.loss(p, b, config))(stored, batch)
  assert value.dtype == jnp.float32
  # Some 30 products in five layers round their result by eps / 2 = 0.4 %: 2 % of the logits, which
  # are of size 3, for each of 14 tokens. That is 0.3 % of a loss of about 6, with room of 16.
  np.testing.assert_allclose(value, loss(params, batch)[0], rtol=0.05)


def test_dropout_acts_with_a_key_only(params, loss):
  llm = dataclasses.replace(tiny.LLM_CONFIG, lora_dropout=0.3)
  config = tiny.model_config(llm=llm)
  batch = tiny.batch(ROWS)
  plain, _ = loss(params, batch)
  assert jax.jit(lambda p, b: speech_llm.loss(p, b, config)[0])(params, batch) == plain
  draw = jax.jit(lambda key: speech_llm.loss(params, batch, config, dropout_key=key)[0])
  one, again, two = (draw(jax.random.key(n)) for n in (1, 1, 2))
  assert one == again and one != two and one != plain


def test_lora_scale_reaches_the_llm(params, logit_bound):
  batch = tiny.batch(ROWS)
  scales = np.array([0.0, 1.0, 4.0], np.float32)
  call = jax.jit(lambda s: speech_llm.answer_logits(params, batch, CONFIG, lora_scale=s))
  per_row = call(scales)
  for n, scale in enumerate(scales):
    assert_within(per_row[n], call(np.full(3, scale))[n], logit_bound)
  for other in (1.0, 0.01):
    with exceeds_the_bound():
      assert_within(per_row[0], call(np.full(3, other, np.float32))[0], logit_bound)


def test_init_gives_one_model_in_two_layouts():
  key = jax.random.key(0)
  shapes = {
    scan: jax.eval_shape(lambda k, c=CONFIG.with_compute(scan=scan): speech_llm.init(k, c), key)
    for scan in (False, True)
  }
  assert tree.stack_layers(shapes[False]) == shapes[True]
  quick = jax.random.key(0, impl="rbg")  # compiles in half the time
  params = jax.jit(lambda k: speech_llm.init(k, CONFIG.with_compute(scan=True)))(quick)
  layers = params["decoder"]["layers"]
  kernel, lora_b = layers["attention"]["q"]["kernel"], layers["attention"]["q"]["lora_b"]
  assert not np.array_equal(kernel[0], kernel[1]) and not lora_b.any()
  assert (params["frontend"]["sanm"]["scale"] == 1).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_mooer_7b_at_full_size_by_shape():
  config = SpeechLLMConfig(decoder=LLMConfig(lora_rank=64))
  shapes = {
    scan: jax.eval_shape(
      lambda k, c=config.with_compute(scan=scan): speech_llm.init(k, c), jax.random.key(0)
    )
    for scan in (False, True)
  }
  assert tree.stack_layers(shapes[False]) == shapes[True]
  trainable, frozen = tree.partition(shapes[True], TRAINABLE)
  count = lambda part: sum(leaf.size for leaf in jax.tree.leaves(part))  # noqa: E731
  assert count(frozen["encoders"]) == 157_975_648
  assert count(frozen["decoder"]) == 7_615_616_512
  assert count(trainable) == 9_442_816 + 161_480_704  # adapter, LoRA
  batch = tiny.batch([tiny.row(0, frames=334, after=30, answer=100, config=config)] * 2)
  value, sums = jax.eval_shape(
    lambda p, b: speech_llm.loss(p, b, config.with_compute(scan=True, dtype="bfloat16")),
    shapes[True],
    batch,
  )
  assert value.shape == sums["tokens"].shape == ()


def test_a_new_model_is_a_new_configuration():
  """SAN-M, a Q-Former and Qwen2: no code knows of the three together."""
  section = ConfigDict(
    dict(
      encoders=("sanm_large",),
      connector="qformer",
      decoder="qwen2_0.5b",
      sanm=dict(input_width=56, hidden_size=32, layers=2, heads=4, intermediate_size=48),
      qformer=dict(
        window=5, stride=5, queries=2, hidden_size=32, heads=4, intermediate_size=48, edge="pad"
      ),
      llm=dataclasses.asdict(tiny.LLM_CONFIG),
      frontends=dict(sanm=dict(fbank=dict(bins=8))),
    )
  )
  config = model_config(section)
  params = tiny.init(config)
  rows = [tiny.row(n, frames=frames, config=config) for n, frames in enumerate((13, 6))]
  logits = jax.jit(lambda params, batch: speech_llm.answer_logits(params, batch, config))
  together = logits(params, tiny.batch(rows))
  bound = rounding(TERMS, condition(logits, params, tiny.batch(rows)))
  for n, row in enumerate(rows):
    assert_within(together[n], logits(params, tiny.batch([row]))[0], bound)
  speech_BSD, valid_BS = jax.jit(
    lambda params, batch: speech_llm.connect(
      params, *speech_llm.encode(params, batch, config), config
    )
  )(params, tiny.batch(rows))
  assert speech_BSD.shape == (2, 6, 40)  # 13 frames are three windows of two queries
  assert valid_BS.sum(1).tolist() == [6, 4]


def test_logits_of_a_few_positions_at_a_time_give_the_same_loss(monkeypatch, params, loss_bound):
  batch = tiny.batch(ROWS, **SIZES)  # seven positions
  config = CONFIG.with_compute(remat="full")

  def losses(params):
    value, sums = speech_llm.loss(params, batch, config)
    return value, sums

  run = jax.value_and_grad(losses, has_aux=True)
  (value, sums), gradients = jax.jit(run)(params)
  bound = rounding(TERMS, condition(jax.jit(lambda p: run(p)[1]), params))
  monkeypatch.setattr(speech_llm, "_LOGITS", 3)
  run = jax.value_and_grad(lambda p: losses(p), has_aux=True)  # traced anew
  (blocks_value, blocks_sums), blocks_gradients = jax.jit(run)(params)
  assert_within(blocks_value, value, loss_bound["mean"])
  assert blocks_sums["correct"] == sums["correct"] and blocks_sums["tokens"] == sums["tokens"]
  assert_within(blocks_gradients, gradients, bound)
  vocab = CONFIG.decoder.vocab_size
  shapes = jaxprs.shapes(jax.make_jaxpr(run)(params))
  assert (len(ROWS), 3, vocab) in shapes and (len(ROWS), 7, vocab) not in shapes


def test_the_stages_have_names_in_profiles():
  config = tiny.answering_config(vocab_size=40).with_compute(features="device")
  params = tiny.answering_params(config)
  batch = speech_llm.Batch(
    features=(jnp.zeros((1, 16000)),),
    frames=(jnp.array([16000]),),
    prefix_BS=jnp.zeros((1, 0), jnp.int32),
    suffix_BS=jnp.zeros((1, 2), jnp.int32),
    labels_BS=jnp.full((1, 1), -1, jnp.int32),
  )
  options = GenerationConfig(max_new_tokens=2)
  text = generate.lower(params, batch, config, options).as_text(debug_info=True)
  for stage in ("encode/features", "connect", "splice", "decode", "logits", "search"):
    assert f"/{stage}/" in text
