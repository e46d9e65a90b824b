"""Mixtures of data sets: shares, epochs, positions, tasks, filters and errors of each."""

import collections
import itertools
import json
import types

import jax
import numpy as np
import pytest

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig, SourceConfig
from mooer_jax.data.dataset import eval_batches, merge_states, train_batches
from mooer_jax.data.examples import Example
from mooer_jax.data.feature_cache import digest
from mooer_jax.data.mixture import MixedStream
from mooer_jax.data.readers.shards import read_shard
from mooer_jax.data.utterances import BadDataError
from mooer_jax.run.fill_feature_cache import cache_misses, dataset_name
from tests.data.conftest import assert_resumes, take_batches, take_with_states


@pytest.fixture
def sets(shards):
  """Two data sets: a (three shards, 11 utterances) and b (two shards, 4 utterances)."""
  made = {}
  for name, counts in (("a", (4, 4, 3)), ("b", (2, 2))):
    (shards.folder / name).mkdir()
    made[name] = type(shards)(shards.folder / name, prefix=name)
    for count in counts:
      made[name].add(count)
  return made


def _mixture(sets, weights=(3.0, 1.0), **of_b):
  a, b = sets.values()
  return {
    "a": SourceConfig(str(a.list), weights[0]),
    "b": SourceConfig(str(b.list), weights[1], **of_b),
  }


@pytest.fixture
def config(shards, sets):
  """A config of the mixture; keyword arguments change it."""

  def config(**changes):
    return shards.config(**{"shards": "", "mixture": _mixture(sets), **changes})

  return config


def _keys(hosts):
  return [key for host in hosts for key in host.keys]


@pytest.mark.parametrize("weights", [(3, 1), (1, 1, 1), (5, 2, 1.5), (0.01, 9, 4, 4)])
def test_shares_are_those_of_the_weights_at_any_time(weights):
  """Between n p - k + 1 and n p + 1 of n utterances, as the docstring derives."""
  example = Example("", "", (), "asr", None, None, None, 1.0)
  stream = types.SimpleNamespace(take=lambda: example)
  mixed = MixedStream([stream] * len(weights), weights)
  shares = np.array(weights) / sum(weights)
  for total in range(1, 2001):
    mixed.take()
    ahead = np.array(mixed._taken) - total * shares
    assert sum(mixed._taken) == total
    assert ahead.max() < 1 + 1e-9 and ahead.min() > 1 - len(weights) - 1e-9


def test_batches_have_the_shares_and_each_data_set_its_own_epochs(config, model_side, sets):
  hosts = take_batches(config(), model_side, 30)  # ten windows of 12 utterances
  counts = collections.Counter(_keys(hosts))
  of = {name: [counts[key] for key in sets[name].keys] for name in sets}
  assert (sum(of["a"]), sum(of["b"])) == (90, 30)
  for name, each in of.items():  # 90 of 11 utterances, 30 of 4: none is read twice in an epoch
    assert max(each) - min(each) <= 1, name
  for n in range(3, 31, 3):
    a = sum(key.startswith("a") for key in _keys(hosts[:n]))
    assert abs(a - 0.75 * 4 * n) < 1
  # Equal weights are another mixture.
  even = _keys(take_batches(config(mixture=_mixture(sets, (1, 1))), model_side, 15))
  assert sum(key.startswith("a") for key in even) == 30


def _same(one, other):
  assert one.keys == other.keys and one.skipped == other.skipped
  jax.tree.map(np.testing.assert_array_equal, one.batch, other.batch)


def test_a_mixture_resumes_exactly_in_any_number_of_processes(config, model_side, sets, wav):
  sets["b"].add_members([("short.wav", wav(0.1)), ("short.txt", b"A"), ("lone.txt", b"A")])
  config = config(streams=2)
  whole, *parts = (
    iter(train_batches(config, *model_side, process=process))
    for process in ((0, 1), (0, 2), (1, 2))
  )
  states, hosts = [], []
  for _ in range(16):
    states.append(json.dumps(merge_states([part.get_state() for part in parts])))
    state = json.loads(states[-1])
    assert state == json.loads(json.dumps(whole.get_state()))
    # Three batches of 2 a window, whatever the epochs.
    assert state["streams"]["0"]["window"] == len(hosts) // 3
    hosts.append(next(whole))
    assert hosts[-1].keys == tuple(key for part in parts for key in next(part).keys)
  assert sum(skip.key == "short" for host in hosts for skip in host.skipped) >= 2
  for start in (0, 1, 5, 11, 2):
    whole.set_state(json.loads(states[start]))
    for expected in hosts[start : start + 4]:
      _same(next(whole), expected)
  for iterator in (whole, *parts):
    iterator.close()


def test_workers_mix_and_resume(config, model_side, sets):
  iterator = iter(train_batches(config(workers=2, shuffle_buffer_size=8, prefetch=1), *model_side))
  states, hosts = [], []
  for _ in range(12):
    states.append(json.dumps(iterator.get_state()))
    hosts.append(next(iterator))
  iterator.set_state(json.loads(states[5]))
  for expected in hosts[5:9]:
    _same(next(iterator), expected)
  iterator.close()
  assert not set(_keys(hosts[::2])) & set(_keys(hosts[1::2]))  # each worker has shards of its own
  # A window of 8 in each worker has 6 of a, and every worker has given three.
  assert sum(key.startswith("a") for key in _keys(hosts)) == 36


def test_a_position_belongs_to_its_mixture(config, model_side, shards, sets):
  state = iter(train_batches(config(), *model_side)).get_state()
  others = {
    "'data.mixture.b': {'weight': 2.0": _mixture(sets, (3.0, 2.0)),
    "'data.mixture.b'.*'filter': 'x == 1'": _mixture(sets, filter="x == 1"),
    "'data.mixture.c'": {"c": _mixture(sets)["b"], **_mixture(sets)},
  }
  for message, mixture in others.items():
    with pytest.raises(ValueError, match=f"data.mixture was .* and is .*{message}"):
      iter(train_batches(config(mixture=mixture), *model_side)).set_state(state)
  plain = shards.config(shards=str(sets["a"].list))
  iterator = iter(train_batches(plain, *model_side))
  early = iterator.get_state()
  del early["of"]["data.mixture"]
  iterator.set_state(json.loads(json.dumps(early)))
  with pytest.raises(ValueError, match="data.mixture was {} and is {'data.mixture.a'"):
    iter(train_batches(config(), *model_side)).set_state(early)


def test_each_data_set_has_its_task_and_filter(shards, sets, tokenizer, wav):
  model = SpeechLLMConfig(chat_template="bare", prompts=(("asr", "ASK"), ("ast", "SAY")))
  for number in range(2):
    for key, about in (("own", b'{"task": "ast", "n": 1}'), ("more", b'{"task": "asr", "n": 2}')):
      parts = {"wav": wav(0.4), "txt": b"A", "json": about}
      sets["a"].add_members([(f"{key}{number}.{suffix}", x) for suffix, x in parts.items()])
  mixture = {
    "a": SourceConfig(str(sets["a"].list), 1.0, filter="n <= 2"),
    "b": SourceConfig(str(sets["b"].list), 1.0, task="ast"),
  }
  config = shards.config(shards="", mixture=mixture, task="", max_bad_share=1.0)
  hosts = take_batches(config, (tokenizer, model), 9)
  tasks = {key: task for host in hosts for key, task in zip(host.keys, host.tasks)}
  of_b = dict.fromkeys(sets["b"].keys, "ast")
  assert tasks == {"own0": "ast", "own1": "ast", "more0": "asr", "more1": "asr"} | of_b
  skipped = {skip.key: skip for host in hosts for skip in host.skipped}
  assert set(skipped) == set(sets["a"].keys)
  assert skipped["a0000"].detail.startswith("data.mixture.a.filter='n <= 2': no field 'n'")
  # data.filter is for data sets without a filter of their own.
  both = shards.config(
    shards="",
    mixture=mixture,
    task="",
    filter="n > 5",
    max_bad_share=1.0,
    task_weights={"ast": 2.0},
  )
  with pytest.raises(
    BadDataError, match="data.mixture.b: no usable utterance in 2 .*no such field"
  ):
    take_batches(both, (tokenizer, model), 9)


def test_the_task_of_a_data_set_is_that_of_its_weight(shards, sets, tokenizer):
  model = SpeechLLMConfig(chat_template="bare", prompts=(("asr", "ASK"), ("ast", "SAY")))
  mixture = {
    name: SourceConfig(str(sets[name].list), 1.0, task=task)
    for name, task in (("a", "asr"), ("b", "ast"))
  }
  config = shards.config(shards="", mixture=mixture, task="", task_weights={"asr": 0.5, "ast": 3.0})
  keys = _keys(take_batches(config, (tokenizer, model), 6))
  assert all(keys.count(key) == 3 for key in sets["b"].keys)  # an epoch has three readings of each
  with pytest.raises(ValueError, match=r"data.task_weights names \['qa'\], but .*, .* has"):
    take_batches(shards.config(shards="", mixture=mixture, task="", task_weights={"qa": 1.0}),
          (tokenizer, model), 1)  # fmt: skip
  other = {"a": SourceConfig(str(sets["a"].list), task="qa")}
  with pytest.raises(ValueError, match=r"tasks \['qa'\] have no prompt; the model has"):
    take_batches(shards.config(shards="", mixture=other, task=""), (tokenizer, model), 1)


def test_limits_of_bad_data_count_for_each_data_set(config, model_side, sets, wav):
  """b has few utterances, all of them bad; of the whole mixture they are a small share."""
  sets["b"].list.unlink()
  for number in range(2):
    sets["b"].add_members([(f"short{number}.wav", wav(0.1)), (f"short{number}.txt", b"A")])
  with pytest.raises(BadDataError, match="^data.mixture.b: no usable utterance .*too short 2"):
    take_batches(config(max_bad_share=1.0), model_side, 9)
  cut = sets["a"].folder / "shards_000000001.tar"
  cut.write_bytes(cut.read_bytes()[:3000])
  only_a = {"a": _mixture(sets)["a"]}
  with pytest.raises(
    BadDataError, match="^data.mixture.a: 1 of [23] shards read are .*damaged: .*1"
  ):
    take_batches(config(mixture=only_a, max_bad_share=0.3), model_side, 9)


def test_a_mixture_of_one_is_its_data_set(config, model_side, shards, sets):
  only_a = {"a": _mixture(sets)["a"]}
  mixed = config(mixture=only_a, batch_size=1, shuffle_buffer_size=1)
  one = take_batches(mixed, model_side, 22)
  plain = take_batches(
    shards.config(shards=str(sets["a"].list), batch_size=1, shuffle_buffer_size=1), model_side, 22
  )
  for host, other in zip(one, plain):
    _same(host, other)


def test_what_reads_the_data_once_reads_each_data_set_once(config, model_side, sets):
  """Such as the cache of encoder frames."""
  found = cache_misses(config(), model_side[1], known=set(), skipped=collections.Counter())
  digests = list(itertools.chain.from_iterable(digests for _, digests, _ in found))
  tars = (str(path) for of in sets.values() for path in of.folder.glob("*.tar"))
  assert set(digests) == {digest(raw) for tar in tars for raw in read_shard(tar)}
  assert len(digests) == len(set(digests))
  names = [
    dataset_name(config(mixture=_mixture(sets, weights, filter=condition)))
    for weights, condition in (((3, 1), ""), ((1, 1), ""), ((3, 1), "x == 1"))
  ]
  assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"shards": "x"}, r"data.shards='x' and data.mixture \(a\) are both set; set data.shards=''"),
    ({"weight": 0.0}, "data.mixture.a.weight=0.0: must be above 0, or remove the data set"),
    ({"of": ""}, "data.mixture.a.shards='': name a data.list"),
    ({"task": "ast"}, "data.mixture.a.task='ast' has no effect.*data.task='asr'; set data.task=''"),
    ({"all": "y == 1", "filter": "x == 1"}, "data.filter='y == 1' has no effect, .*; remove it"),
    (
      {"labels": "ast"},
      "data.labels='ast' is for one data set, not for data.mix.*mixture.a.",
    ),
    (
      {"labels_mode": "concat"},
      "data.mixture.a.labels_mode='concat' has no effect without",
    ),
    (
      {"own_labels": "ast", "labels_mode": "instruction"},
      "data.task='asr' gives all .*data.mixture.a.labels_mode='instruction' samples",
    ),
    ({"filter": "x ="}, "data.mixture.a.filter='x =': "),
    ({"filter": "f(x)"}, r"data.mixture.a.filter='f\(x\)': .* is not a condition"),
  ],
)
def test_a_bad_mixture_is_refused_by_name(values, words):
  values = {"of": "data.list", **values}
  whole = {"shards": values.pop("shards", ""), "filter": values.pop("all", "")}
  whole["labels"] = values.pop("labels", "")
  values = {name.removeprefix("own_"): value for name, value in values.items()}
  with pytest.raises(ValueError, match=words):
    DataConfig(**whole, mixture={"a": SourceConfig(values.pop("of"), **values)})


def test_a_data_set_has_labels_of_its_own(config, model_side, sets, tmp_path):
  (tmp_path / "labels").write_text("".join(f"{key} L{key[1:]}\n" for key in sets["b"].keys[1:]))
  mixture = _mixture(sets, labels=str(tmp_path / "labels"), labels_mode="concat",
                     labels_separator=" ")  # fmt: skip
  of_b = config(mixture=mixture, answer_buckets=(16,))
  dataset = train_batches(of_b, *model_side)
  states, hosts = take_with_states(dataset, 12)
  texts = {pair for host in hosts for pair in zip(host.keys, host.texts, strict=True)}
  b, lost = sets["b"].keys[1:], sets["b"].keys[0]
  expected = {(key, f"N{number} L{key[1:]}") for number, key in enumerate(b, 1)}
  assert texts == expected | {(key, f"N{number}") for number, key in enumerate(sets["a"].keys)}
  assert {(s.cause, s.key) for host in hosts for s in host.skipped} == {("no label", lost)}
  assert_resumes(dataset, states, hosts, at=(1, 7), count=3)
  with pytest.raises(ValueError, match=r"data.mixture was .*labels \(.*, concat, ' '"):
    iter(train_batches(config(answer_buckets=(16,)), *model_side)).set_state(json.loads(states[3]))


def test_errors_before_training_name_the_data_set(config, model_side, sets):
  with pytest.raises(ValueError, match="data.shards is missing: .*data.mixture"):
    train_batches(config(mixture={}), *model_side)
  with pytest.raises(
    ValueError, match=f"{sets['b'].list}: 2 shards for 1 streams .*data.workers=3"
  ):
    train_batches(config(workers=3), *model_side)
  with pytest.raises(ValueError, match=r"data.mixture \(a, b\) is for training; to evaluate"):
    eval_batches(config(), *model_side)
