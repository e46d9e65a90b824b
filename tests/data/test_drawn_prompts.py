"""Mixed tasks with prompts drawn for each reading: restored exactly, in the shapes announced."""

import json
import string

import jax
import numpy as np
import pytest

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.dataset import train_batches
from mooer_jax.text.tokenizer import Tokenizer

PROMPTS = {"asr": [f"ASK {n}" for n in range(7)], "qa": [f"SAY {{}} {n}" for n in range(5)]}


@pytest.fixture
def dataset(shards, wav, tmp_path):
  """train_batches over two tasks in three shards, by so many workers."""
  for number in range(18):
    if number % 6 == 0:
      members = []
    task, audio = ("asr", "qa")[number % 2], wav(0.3 + 0.05 * number, seed=number)
    about = json.dumps({"task": task, "Q": f"Q{number}"}).encode()
    key = f"utt{number:02d}"
    members += [(f"{key}.wav", audio), (f"{key}.txt", b"A"), (f"{key}.json", about)]
    if number % 6 == 5:
      shards.add_members(members)
  (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
  own = tuple((task, prompts[0]) for task, prompts in PROMPTS.items())
  model = SpeechLLMConfig(chat_template="bare", prompts=own)

  tokenizer = Tokenizer.from_characters(string.digits + string.ascii_uppercase + " ?")

  def dataset(workers):
    config = shards.config(
      task="",
      task_weights={"qa": 1.5},
      prompts=str(tmp_path / "prompts.json"),
      prompt_tokens=12,
      shuffle_buffer_size=8,
      workers=workers,
    )
    return train_batches(config, tokenizer, model)

  return dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_drawn_prompts_are_restored_exactly(dataset, workers):
  iterator = iter(dataset(workers))
  states, hosts = [], []
  for _ in range(12):  # two epochs of some 22 readings
    states.append(json.dumps(iterator.get_state()))
    hosts.append(next(iterator))
  iterator.close()
  said = {row.tobytes() for host in hosts for row in host.batch.suffix_BS}
  assert len(said) > 20  # the same keys were asked in several ways
  for start in (5,) if workers else (0, 5, 9):  # a worker process takes seconds to start
    other = iter(dataset(workers))
    other.set_state(json.loads(states[start]))
    for expected in hosts[start : start + 3]:
      found = next(other)
      assert (found.keys, found.tasks) == (expected.keys, expected.tasks)
      jax.tree.map(np.testing.assert_array_equal, found.batch, expected.batch)
    other.close()


def test_every_batch_has_one_of_the_shapes_announced(dataset):
  made = dataset(0)
  described = lambda batch: jax.tree.map(lambda x: (x.shape, x.dtype), batch)  # noqa: E731
  iterator = iter(made)
  for _ in range(6):
    assert described(next(iterator).batch) in [described(batch) for batch in made.shapes]
  iterator.close()
