"""SALMONN's annotation files as a data set: tasks, questions, joined clips, weights."""

import collections
import contextlib
import itertools
import json
import string

import numpy as np
import pytest

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import eval_batches, train_batches
from mooer_jax.data.examples import num_copies
from mooer_jax.data.readers.annotation import read_annotation
from mooer_jax.data.utterances import BadDataError
from mooer_jax.text.tokenizer import Tokenizer

PROMPTS = (
  ("asr", "<SpeechHere>WRITE"),
  ("qa", "<SpeechHere>{}"),
  ("count", "HOW MANY<SpeechHere>WORDS"),
)
MODEL = SpeechLLMConfig(chat_template="none", prompts=PROMPTS)


@pytest.fixture(scope="module")
def letters():
  return Tokenizer.from_characters(string.ascii_uppercase + string.digits + " ?")


@pytest.fixture
def annotate(tmp_path, wav):
  """Writes clips and an annotation file; gives the config of a data set of it."""

  def write(entries, **changes):
    for number, entry in enumerate(entries):
      for name in (entry["path"], *entry.get("expand_wav", ())):
        if not name.startswith("missing"):
          (tmp_path / name).write_bytes(wav(0.5, seed=number))
    (tmp_path / "a.json").write_text(json.dumps({"annotation": entries}))
    values = dict(
      shards=str(tmp_path / "a.json"),
      task="",
      batch_size=2,
      shuffle_buffer_size=2,
      buckets=(20, 40),
      answer_buckets=(8,),
      max_s=2.0,
      prompt_tokens=12,
      max_bad_share=1.0,
    )
    return DataConfig(**{**values, **changes})

  return write


def entries(*tasks):
  return [{"path": f"{n}.wav", "text": f"N{n}", "task": task} for n, task in enumerate(tasks)]


def decoded(tokenizer, row_S):
  return tokenizer.decode(row_S[row_S >= 0])


def test_each_utterance_is_asked_its_own_task(annotate, letters):
  listed = entries("asr", "qa", "count")
  listed[1]["Q"] = "WHO?"
  listed[2]["expand_wav"] = ["more.wav", "again.wav"]
  hosts = list(eval_batches(annotate(listed), letters, MODEL))
  assert [task for host in hosts for task in host.tasks] == ["asr", "qa", "count"]
  before, after, ids, seconds = [], [], [], []
  for host in hosts:
    for row in range(len(host.keys)):
      before.append(decoded(letters, host.batch.prefix_BS[row]))
      after.append(decoded(letters, host.batch.suffix_BS[row]))
      ids.append(int(host.batch.task_B[row]))
    seconds += host.seconds
  assert before == ["", "", "HOW MANY"] and after == ["WRITE", "WHO?", "WORDS"]
  assert ids == [0, 1, 2] and hosts[-1].batch.task_B.tolist() == [2, -1]
  assert seconds == pytest.approx([0.5, 0.5, 1.7])  # three clips and two pauses


def test_what_cannot_be_used_is_named(annotate, letters):
  listed = [
    *entries("asr", "qa"),
    {"path": "missing.wav", "text": "N", "task": "asr"},
    {"path": "c.wav", "text": "", "task": "asr"},
    {"path": "d.wav", "text": "N"},
    {"path": "e.wav", "text": "N", "task": "qa", "Q": "A VERY LONG QUESTION?"},
  ]
  config = annotate(listed, batch_size=1, shuffle_buffer_size=1)
  with contextlib.closing(iter(train_batches(config, letters, MODEL))) as batches:
    hosts = list(itertools.islice(batches, 2))
  causes = {skip.cause: skip.detail for host in hosts for skip in host.skipped}
  assert set(causes) == {
    "no question", "no audio", "empty transcript", "unknown task", "prompt too long",
  }  # fmt: skip
  assert "missing.wav" in causes["no audio"] and "no task" in causes["unknown task"]


def test_unknown_tasks_and_weights_stop_before_anything_is_read(annotate, letters):
  with pytest.raises(ValueError, match=r"tasks \['sing'\] have no prompt; the model has \['asr'"):
    train_batches(annotate(entries("asr", "sing")), letters, MODEL)
  config = annotate(entries("asr"), task_weights={"count": 2.0})
  with pytest.raises(ValueError, match=r"task_weights names \['count'\], but .*\['asr'\]"):
    train_batches(config, letters, MODEL)
  with pytest.raises(ValueError, match="takes a question: set data.prompt_tokens"):
    train_batches(annotate(entries("asr"), prompt_tokens=0), letters, MODEL)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("{", "not JSON"),
    ("[]", "must hold a JSON object"),
    ("[" * 100_000, "not JSON"),
    ('{"annotation": []}', "no entries"),
    ('{"annotation": [{"text": "a"}]}', r"annotation\[0\] has path=None"),
    ('{"annotation": [{"path": "a", "text": 3}]}', r"annotation\[0\] has text=3"),
    ('{"annotation": [{"path": "a", "text": "", "Q": 1}]}', r"\[0\] has Q=1"),
    ('{"annotation": [{"path": "a", "text": "", "expand_wav": "b"}]}', "expand_wav='b'"),
    (r'{"annotation": [{"path": "a", "text": "\ud800"}]}', r"\[0\] has text='\\ud800'"),
    (r'{"annotation": [{"path": "a\u0000", "text": ""}]}', r"\[0\] has path='a\\x00'"),
  ],
)
def test_a_malformed_file_is_refused_by_entry(tmp_path, content, words):
  file = tmp_path / "a.json"
  file.write_text(content)
  with pytest.raises(ValueError, match=words):
    read_annotation(str(file))


def test_a_byte_order_mark_is_passed_over(tmp_path):
  text = json.dumps({"annotation": [{"path": "a.wav", "text": "ä"}]}, ensure_ascii=False)
  (tmp_path / "a.json").write_text(text, "utf-8-sig")
  assert read_annotation(str(tmp_path / "a.json")) == [{"path": "a.wav", "text": "ä"}]


def test_weights_say_how_often_a_task_comes(annotate, letters):
  config = annotate(entries(*["asr", "count"] * 40), task_weights={"asr": 2.5, "count": 0.5})
  epochs, counts = 6, collections.Counter()
  with contextlib.closing(iter(train_batches(config, letters, MODEL))) as batches:
    for host in batches:
      state = batches.get_state()["streams"]["0"]
      if _epoch(state) >= epochs:
        break
      counts.update(host.tasks)
  assert counts["asr"] / epochs == pytest.approx(100, rel=0.05)
  assert counts["count"] / epochs == pytest.approx(20, rel=0.15)


def test_no_utterance_is_starved_by_a_weight_or_a_draw():
  """Each reading is decided by itself: neither keys nor epochs move together."""
  keys, epochs, weight = [f"{n:07d}-clip" for n in range(1000)], 20, 0.25
  read = np.array(
    [
      [num_copies("a", {"a": weight}, seed=0, epoch=e, key=key) for key in keys]
      for e in range(epochs)
    ]
  )
  assert read.mean() == pytest.approx(weight, rel=0.1)
  for axis in (0, 1):  # spread over the keys, and over the epochs, as of independent draws
    n = read.shape[axis]
    assert read.sum(axis).var() == pytest.approx(n * weight * (1 - weight), rel=0.75)
  assert (read.sum(0) == 0).mean() == pytest.approx((1 - weight) ** epochs, abs=0.01)
  other = np.array([num_copies("a", {"a": weight}, seed=1, epoch=0, key=key) for key in keys])
  assert 0 < (other * read[0]).sum() < 0.5 * read[0].sum()


def test_an_epoch_that_a_weight_leaves_empty_is_passed_over(annotate, letters):
  config = annotate(entries("asr"), task_weights={"asr": 0.1}, batch_size=1)
  with contextlib.closing(iter(train_batches(config, letters, MODEL))) as batches:
    assert [next(batches).keys for _ in range(3)] == 3 * [("0000000-0",)]
    assert _epoch(batches.get_state()["streams"]["0"]) > 3
  config = annotate(entries("asr"), task_weights={"asr": 0.0})
  with contextlib.closing(iter(train_batches(config, letters, MODEL))) as batches:
    with pytest.raises(BadDataError, match=r"task_weights=\{'asr': 0.0\} leaves nothing"):
      next(batches)


def test_weights_do_not_hide_that_nothing_is_usable(annotate, letters):
  config = annotate(entries(*["asr"] * 40), task_weights={"asr": 0.4}, max_s=0.4)
  with contextlib.closing(iter(train_batches(config, letters, MODEL))) as batches:
    with pytest.raises(BadDataError, match="no usable utterance"):
      next(batches)


def _epoch(state):
  found = [value for key, value in _items(state) if key == "epoch"]
  return min(found)


def _items(node):
  if isinstance(node, dict):
    for key, value in node.items():
      yield key, value
      yield from _items(value)


def test_weighted_epochs_are_restored_exactly(annotate, letters):
  config = annotate(entries(*["asr", "count"] * 8), task_weights={"asr": 1.6}, prefetch=1)
  dataset = train_batches(config, letters, MODEL)
  with contextlib.closing(iter(dataset)) as batches:
    states, hosts = [], []
    for host in itertools.islice(batches, 24):
      hosts.append(host)
      states.append(json.loads(json.dumps(batches.get_state())))
  for at in (3, 10, 17):
    with contextlib.closing(iter(dataset)) as again:
      again.set_state(states[at])
      for host in hosts[at + 1 : at + 5]:
        found = next(again)
        assert found.keys == host.keys
        np.testing.assert_array_equal(found.batch.suffix_BS, host.batch.suffix_BS)


def test_training_draws_from_several_prompts_and_evaluation_takes_the_models(
  annotate, letters, tmp_path
):
  file = tmp_path / "prompts.json"
  file.write_text('{"asr": ["<SpeechHere>A", "<SpeechHere>B", "<SpeechHere>C"]}')
  config = annotate(entries(*["asr"] * 12), prompts=str(file))
  with contextlib.closing(iter(train_batches(config, letters, MODEL))) as batches:
    drawn = [
      decoded(letters, row_S)
      for host in itertools.islice(batches, 30)
      for row_S in host.batch.suffix_BS
    ]
  counts = collections.Counter(drawn)
  assert set(counts) == {"A", "B", "C"} and min(counts.values()) > 8
  assert drawn[:12] != drawn[12:24]  # another epoch, other prompts


def test_the_models_tasks_are_not_asked_alike_without_saying_so(annotate, letters):
  with pytest.raises(ValueError, match=r"has the tasks \['count'\], but data.task='asr'"):
    train_batches(annotate(entries("asr", "count"), task="asr"), letters, MODEL)
  with pytest.raises(ValueError, match="ends with the speech in template 'none'"):
    model = MODEL.replace(prompts=(("asr", "WRITE<SpeechHere>"),))
    train_batches(annotate(entries("asr")), letters, model)


def test_a_question_has_room_on_its_own_side_of_the_speech(annotate, letters):
  listed = [{"path": "a.wav", "text": "N", "task": "qa", "Q": "WHO IS IT?"}]
  for template, prompt, before, after in (
    ("bare", "{}", 0, 12), ("none", "{}<SpeechHere>A", 12, 1), ("none", "B<SpeechHere>{}", 1, 12),
  ):  # fmt: skip
    model = MODEL.replace(chat_template=template, prompts=(("qa", prompt),))
    (host,) = eval_batches(annotate(listed), letters, model)
    assert (host.batch.prefix_BS.shape[1], host.batch.suffix_BS.shape[1]) == (before, after)
    sides = decoded(letters, host.batch.prefix_BS[0]) + decoded(letters, host.batch.suffix_BS[0])
    assert "WHO IS IT?" in sides
