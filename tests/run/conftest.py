"""A shard list of the committed clips, and a config that learns them in seconds."""

import importlib.util

import jax
import pytest

from mooer_jax.data.pack import pack
from mooer_jax.run import monitor, start


@pytest.fixture(autouse=True)
def one_device(request, monkeypatch):
  """Runs use one of the simulated devices unless a test is marked `all_devices`.

  A program for one device compiles in little more than half the time.
  """
  if "all_devices" not in request.keywords:
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda *backend: devices(*backend)[:1])


CMVN_BATCHES, DRAW_CURVE = start.CMVN_BATCHES, monitor.draw_curve


@pytest.fixture(autouse=True)
def little_beside_the_steps(monkeypatch):
  """Runs measure CMVN on two batches and draw no curve; a test may set what was before."""
  monkeypatch.setattr(start, "CMVN_BATCHES", 2)
  monkeypatch.setattr(monitor, "draw_curve", lambda rows, path: path)


@pytest.fixture(scope="session")
def data_list(clips, tmp_path_factory):
  """Path of a data.list: four shards, each with all clips under other keys in another order.

  In the same order, the processes of a run would have equal data, and none could be exchanged.
  """
  folder = tmp_path_factory.mktemp("packed")
  rows = [(f"{clip.key}-{n}", clip) for n in range(4) for clip in (*clips[n:], *clips[:n])]
  (folder / "wav.scp").write_text("".join(f"{key} {clip.path}\n" for key, clip in rows), "utf-8")
  (folder / "text").write_text("".join(f"{key} {clip.text}\n" for key, clip in rows), "utf-8")
  report = pack(
    folder / "wav.scp", folder / "text", folder / "shards", per_shard=6, processes=1, progress=False
  )
  return str(report.data_list)


@pytest.fixture
def config(repo_root, data_list, tmp_path):
  """configs/tiny.py, smaller still."""
  spec = importlib.util.spec_from_file_location("tiny_config", repo_root / "configs" / "tiny.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.workdir = str(tmp_path / "run")
  config.update(small_overrides(data_list))
  return config


def small_overrides(data_list) -> dict:
  return {
    "model": {
      "sanm": {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64},
      "linear": {"hidden_size": 32},
      "llm": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16,
              "intermediate_size": 64},
    },
    "data": {"shards": data_list, "batch_size": 8, "shuffle_buffer_size": 16, "buckets": (84,)},
    "optimizer": {"total_steps": 1000, "decay": "constant", "warmup_steps": 2, "peak_lr": 5e-3},
    "train": {"steps": 8, "save_every": 4, "log_every": 4},
    "eval": {"shards": data_list, "batch_size": 8},
  }  # fmt: skip


@pytest.fixture
def as_flags(data_list):
  """The same as arguments of train.py."""

  def flatten(tree, prefix="--config"):
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from flatten(value, f"{prefix}.{key}")
      else:
        yield f"{prefix}.{key}={value}"

  return list(flatten(small_overrides(data_list)))
