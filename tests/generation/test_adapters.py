"""Several LoRA adapters in one batch: each row is as with its own adapter merged."""

import dataclasses

import jax
import numpy as np
import pytest

from convert.quantizing import quantize
from mooer_jax import checkpoint, tree
from mooer_jax.checkpoint import CheckpointError
from mooer_jax.config import to_json
from mooer_jax.generation import GenerationConfig, decode_batches, generate
from mooer_jax.generation.loading import load_model
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.sharding import make_mesh
from mooer_jax.text.tokenizer import Tokenizer
from tests import tiny

GREEDY = GenerationConfig(max_new_tokens=6)
BEAMS = GenerationConfig(max_new_tokens=6, num_beams=2)


def save(folder, config, params, **more):
  tokenizer = Tokenizer.from_characters("0123456789", ("<|transcribe|>", "<|end|>"), eos="<|end|>")
  options = dict(config_json=to_json(config), tokenizer=tokenizer.save, generation={})
  return checkpoint.save(folder, params=params, **options, **more)


def with_lora(config, **changes):
  return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))


@pytest.fixture(
  scope="module",
  params=["plain base", pytest.param("base with a LoRA", marks=pytest.mark.nightly)],
)
def folders(request, tmp_path_factory):
  """A base and two fine-tunes of its LLM; of a base without LoRA, of other ranks and targets."""
  parent = tmp_path_factory.mktemp("adapters")
  plain = tiny.answering_config(vocab_size=40, chat_template="bare", prompts=(("asr", "0"),))
  of_all = with_lora(plain, lora_rank=2, lora_alpha=4.0)
  kinds = {
    "base": plain,
    "q and v": with_lora(plain, lora_rank=3, lora_alpha=9.0, lora_targets=("q", "v")),
    "all": of_all,
  }
  if request.param == "base with a LoRA":
    kinds = dict.fromkeys(kinds, of_all)
  base = save(parent / "base", kinds["base"], tiny.init(kinds["base"]))
  found = {"base": base}
  for seed, name in enumerate(("q and v", "all"), 1):
    leaves = tree.flatten(tiny.init(kinds[name], seed))
    lora = tree.unflatten({path: leaf for path, leaf in leaves.items() if "/lora_" in path})
    found[name] = save(parent / name, kinds[name], lora, base=base)
  return found


@pytest.mark.parametrize("quantization", ["none", pytest.param("int8", marks=pytest.mark.nightly)])
def test_each_row_is_decoded_with_its_own_adapter(folders, batch, quantization):
  compute = ExecutionConfig(quantization=quantization)
  names = ["all", None, "q and v", "all", "q and v"]
  clips = batch([20, 17, 20, 13, 15])
  loaded = load_model(
    folders["base"], compute, adapters={name: folders[name] for name in ("q and v", "all")}
  )
  found = {}
  for options in (GREEDY,) if quantization == "int8" else (GREEDY, BEAMS):
    scale_BR = loaded.adapters.scale(names)
    found[options] = generate(
      loaded.params, clips, loaded.model, options, lora_scale=scale_BR
    ).tokens_BS
  answers = set()
  for name in {*names}:
    alone = load_model(folders[name or "base"], compute, merge_lora=False)
    rows = [row for row, one in enumerate(names) if one == name]
    for options, tokens_BS in found.items():
      expected = generate(alone.params, clips, alone.model, options).tokens_BS
      np.testing.assert_array_equal(np.asarray(tokens_BS)[rows], np.asarray(expected)[rows])
    answers.add(np.asarray(found[GREEDY])[rows[0]].tobytes())
  assert len(answers) == 3


@pytest.mark.parametrize("folders", ["base with a LoRA"], indirect=True)
def test_what_an_adapter_has_not_trained_is_that_of_the_base(folders, batch, tmp_path):
  base = folders["base"]
  config = load_model(base, ExecutionConfig(), merge_lora=False).model
  leaves = tree.flatten(tiny.init(config, 5))
  some = tree.unflatten({p: x for p, x in leaves.items() if p.endswith("lora_b")})
  tuned = save(tmp_path / "some", config, some, base=base)
  loaded = load_model(base, ExecutionConfig(), adapters={"some": tuned})
  alone = load_model(tuned, ExecutionConfig(), merge_lora=False)
  clips = batch([20, 17])
  found = generate(
    loaded.params, clips, loaded.model, GREEDY, lora_scale=loaded.adapters.scale(["some"] * 2)
  )
  expected = generate(alone.params, clips, alone.model, GREEDY)
  np.testing.assert_array_equal(found.tokens_BS, expected.tokens_BS)


def test_rows_are_split_over_a_mesh(folders, batch):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  adapters = {name: folders[name] for name in ("q and v", "all")}
  tokens = []
  for place in ({}, {"mesh": mesh}):
    loaded = load_model(folders["base"], ExecutionConfig(), adapters=adapters, **place)
    scale_BR = loaded.adapters.scale(["all", "q and v", None])
    output = generate(
      loaded.params, batch([20, 17, 20]), loaded.model, GREEDY, lora_scale=scale_BR, **place
    )
    tokens.append(np.asarray(output.tokens_BS))
  np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize("folders", ["plain base"], indirect=True)
@pytest.mark.parametrize(
  ("options", "sizes"),
  [(GREEDY, {}), (BEAMS, {}), (GREEDY, dict(data=2, fsdp=2, tensor=2))],
  ids=["greedy", "beams", "mesh"],
)
def test_a_row_that_takes_the_next_clip_takes_its_adapter(folders, batch, options, sizes):
  options = dataclasses.replace(options, max_new_tokens=8, eos_token_id=(8, 12, 28, 33))
  names = [["all", None, "q and v"], [None, "q and v", "all"], ["q and v", "all", "all"]] * 2
  batches = [(of, batch([20 - n, 17 - n, 9 + n])) for n, of in enumerate(names)]
  place = {"mesh": make_mesh(**sizes)} if sizes else {}

  def decode(loaded, **more):
    found = decode_batches(
      loaded.params, batches, loaded.model, options, key=jax.random.key(0), **place, **more
    )
    return np.concatenate([output.tokens_BS for _, output in found])

  adapters = {name: folders[name] for name in ("q and v", "all")}
  loaded = load_model(folders["base"], ExecutionConfig(), adapters=adapters, **place)
  if place:
    lora_a = loaded.params["decoder"]["layers_0"]["mlp"]["down"]["lora_a"]
    assert len(lora_a.devices()) == 8 and lora_a.addressable_shards[0].data.shape == (24, 5)
  found = decode(loaded, lora_scale=loaded.adapters.scale)
  flat = np.array(names, object).ravel()
  merged = {
    name: decode(load_model(folders[name or "base"], ExecutionConfig(), **place))
    for name in {*flat}
  }
  for name, expected in merged.items():
    np.testing.assert_array_equal(found[flat == name], expected[flat == name])
    for other in merged.keys() - {name}:
      assert (merged[other] != expected)[flat == name].any()
  assert len({*(found >= 0).sum(1)}) > 2  # so that rows end at different times


@pytest.mark.parametrize("folders", ["plain base"], indirect=True)
def test_a_scalar_is_the_scale_of_all_rows(folders, batch):
  loaded = load_model(folders["all"], ExecutionConfig(), merge_lora=False)
  clips = batch([20, 17])
  by_scale = {}
  for scale in (0.5, 2.0):
    expected = generate(loaded.params, clips, loaded.model, GREEDY, lora_scale=scale).tokens_BS
    given = dict(key=jax.random.key(0), lora_scale=scale)
    batches = [(n, clips) for n in range(2)]
    for _, output in decode_batches(loaded.params, batches, loaded.model, GREEDY, **given):
      np.testing.assert_array_equal(output.tokens_BS, expected)
    by_scale[scale] = np.asarray(expected)
  assert (by_scale[0.5] != by_scale[2.0]).any(1).all()


def test_a_scale_of_other_rows_is_refused(folders, batch):
  loaded = load_model(folders["base"], ExecutionConfig(), adapters={"one": folders["all"]})
  scale_BR = loaded.adapters.scale(["one"] * 3)
  with pytest.raises(ValueError, match="lora_scale has 3 rows, but the batch has 2"):
    generate(loaded.params, batch([20, 17]), loaded.model, GREEDY, lora_scale=scale_BR)
  batches = [("a", batch([20, 17]))]
  given = dict(key=jax.random.key(0), lora_scale=lambda name: scale_BR)
  with pytest.raises(ValueError, match="lora_scale has 3 rows, but the batch has 2"):
    next(decode_batches(loaded.params, batches, loaded.model, GREEDY, **given))


def test_a_base_in_int8_is_refused(folders, tmp_path):
  quantize(folders["base"], tmp_path / "int8")
  with pytest.raises(CheckpointError, match="int8 was rounded to int8.* use the checkpoint that"):
    load_model(tmp_path / "int8", ExecutionConfig(), adapters={"one": folders["all"]})


def test_what_is_no_adapter_is_refused(folders, tmp_path):
  def load(**options):
    return load_model(folders["base"], ExecutionConfig(), **options)

  one = {"one": folders["all"]}
  with pytest.raises(ValueError, match="no adapter 'two'; there are one"):
    load(adapters=one).adapters.scale(["one", "two"])
  with pytest.raises(ValueError, match="no effect beside adapters"):
    load(adapters=one, lora_scale=1.0)
  config = with_lora(load().model, lora_rank=1)
  params = jax.tree.map(np.asarray, tiny.init(config))
  tuned = save(tmp_path / "tuned", config, {"connector": params["connector"]}, base=folders["base"])
  with pytest.raises(CheckpointError, match="adapter 'x': .* has trained connector/.* besides"):
    load(adapters={"x": tuned})
  other = save(tmp_path / "other", config, params)
  lora = tree.unflatten({p: x for p, x in tree.flatten(params).items() if "/lora_" in p})
  elsewhere = save(tmp_path / "elsewhere", config, lora, base=other)
  with pytest.raises(CheckpointError, match="adapter 'x': .* is not a fine-tune of .*base .*hash"):
    load(adapters={"x": elsewhere})
