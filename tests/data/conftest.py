"""Small shards made on the spot."""

import contextlib
import io
import json
import string
import tarfile

import numpy as np
import pytest
import soundfile

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import train_batches
from mooer_jax.text.tokenizer import Tokenizer


def make_wav(seconds, *, seed=0, rate_hz=16000, channels=1, subtype="PCM_16"):
  rng = np.random.default_rng(seed)
  samples = rng.uniform(-0.3, 0.3, (round(seconds * rate_hz), channels)).astype(np.float32)
  return encode(samples, rate_hz, subtype)


def encode(samples, rate_hz=16000, subtype="PCM_16"):
  file = io.BytesIO()
  soundfile.write(file, samples, rate_hz, format="WAV", subtype=subtype)
  return file.getvalue()


def make_tar(path, members):
  with tarfile.open(path, "w") as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


class Shards:
  """A folder with a data.list that grows shard by shard."""

  def __init__(self, folder, prefix="utt"):
    self.folder, self.prefix = folder, prefix
    self.list = folder / "data.list"
    self.keys = []

  def add_members(self, members):
    number = len(list(self.folder.glob("*.tar")))
    path = make_tar(self.folder / f"shards_{number:09d}.tar", members)
    with open(self.list, "a") as file:
      file.write(path.name + "\n")
    return path

  def add(self, count, *, seconds=(0.3, 1.2)):
    """A shard of good utterances of random lengths."""
    rng = np.random.default_rng(len(self.keys))
    members = []
    for _ in range(count):
      key = f"{self.prefix}{len(self.keys):04d}"
      wav = make_wav(rng.uniform(*seconds), seed=len(self.keys))
      members += [(f"{key}.txt", f"N{len(self.keys)}".encode()), (f"{key}.wav", wav)]
      self.keys.append(key)
    return self.add_members(members)

  def config(self, **changes):
    values = {
      "shards": str(self.list),
      "batch_size": 4,
      "shuffle_buffer_size": 12,
      "buckets": (10, 20, 40),
      "answer_buckets": (4, 8),
      "max_s": 2.0,
    }
    return DataConfig(**{**values, **changes})


@pytest.fixture
def shards(tmp_path):
  folder = tmp_path / "shards"
  folder.mkdir()
  return Shards(folder)


@pytest.fixture(scope="session")
def wav():
  return make_wav


@pytest.fixture(scope="session")
def encode_wav():
  return encode


@pytest.fixture(scope="session")
def tokenizer():
  return Tokenizer.from_characters(string.digits + string.ascii_uppercase + " ")


@pytest.fixture(scope="session")
def model_side(tokenizer):
  """What the pipeline needs to know of the model."""
  return tokenizer, SpeechLLMConfig(chat_template="bare", prompts=(("asr", "ASK <|im_end|>"),))


def take_batches(config, model_side, count, **options):
  """The first training batches."""
  with contextlib.closing(iter(train_batches(config, *model_side, **options))) as batches:
    return [next(batches) for _ in range(count)]


def take_with_states(dataset, count):
  """The states before the first batches, as JSON, and the batches."""
  with contextlib.closing(iter(dataset)) as batches:
    states, hosts = [], []
    for _ in range(count):
      states.append(json.dumps(batches.get_state()))
      hosts.append(next(batches))
  return states, hosts


def assert_resumes(dataset, states, hosts, *, at, count):
  """An iterator that is set to a state goes on with the batches after it."""
  with contextlib.closing(iter(dataset)) as again:
    for place in at:
      again.set_state(json.loads(states[place]))
      for host in hosts[place : place + count]:
        found = next(again)
        assert (found.keys, found.skipped) == (host.keys, host.skipped)
        np.testing.assert_array_equal(found.batch.features[0], host.batch.features[0])
