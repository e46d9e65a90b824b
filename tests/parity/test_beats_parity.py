"""BEATs against the published structure rebuilt in torch, speechbrain's, and the original's."""

import importlib
import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from convert.parts import beats
from convert.verify.reference import beats as reference
from mooer_jax import checkpoint, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.encoders.beats import BEATsConfig, BEATsEncoder, distance_buckets
from mooer_jax.nn.compute import ExecutionConfig
from tests.numerics import assert_within, exceeds_the_bound, rounding
from tests.parity import torch_beats, torch_models

FULL = BEATsConfig()


@jax.jit
def full(params, features_BTF, valid_BT):
  return BEATsEncoder(FULL).apply({"params": params}, features_BTF, valid_BT)


def make_features(config, frames_B, seed=0):
  shape = len(frames_B), max(frames_B), config.input_width
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
  "config, frames_B, scan",
  [
    (torch_beats.SMALL, [39, 16, 8], False),
    (torch_beats.SMALL, [64, 9, 41], True),
    (BEATsConfig(layers=2), [100, 37, 16], False),
    (BEATsConfig(intermediate_size=768), [113, 48], True),
    pytest.param(FULL, [113, 48], True, marks=pytest.mark.nightly),
  ],
)
def test_equals_the_published_structure(config, frames_B, scan):
  theirs = torch_beats.model(config)
  params = torch_beats.params(theirs)
  encoder = BEATsEncoder(config, ExecutionConfig(scan=scan))
  features_BTF = make_features(config, frames_B)
  params = tree.stack_layers(params) if scan else params
  valid_BT = np.arange(max(frames_B)) < np.array(frames_B)[:, None]
  tokens_BSD, valid_BS = jax.jit(encoder.apply)({"params": params}, features_BTF, valid_BT)
  tokens_B = [frames // config.patch * config.bands for frames in frames_B]
  np.testing.assert_array_equal(valid_BS.sum(1), tokens_B)

  def run(module, dtype):
    return module(torch.tensor(features_BTF, dtype=dtype), torch.tensor(frames_B))[valid]

  valid = np.array(valid_BS)
  torch_models.assert_parity(tokens_BSD[valid], run, theirs, layers=config.layers)


@pytest.mark.parametrize("buckets, reach", [(320, 800), (320, 1280), (16, 20), (32, 32)])
def test_every_distance_falls_into_the_bucket_of_torch(buckets, reach):
  config = BEATsConfig(buckets=buckets, max_distance=reach, hidden_size=16, heads=1)
  attention = torch_beats.SelfAttention(beats.cfg_of(config))
  with torch.no_grad():
    attention.relative_attention_bias.weight[:, 0] = torch.arange(buckets)
    table_TS = attention.bias(1600)[0]
  ours = distance_buckets(1600, buckets=buckets, max_distance=reach)
  np.testing.assert_array_equal(ours, np.concatenate([table_TS[-1].numpy(), table_TS[0, 1:]]))


def test_the_order_of_patches_is_time_then_frequency():
  """Far from the positions' reach, a patch moves the token at step * bands + band most."""
  config = torch_beats.SMALL
  theirs = torch_beats.model(config)
  params = {"params": torch_beats.params(theirs)}
  features_BTF = make_features(config, [64])
  changed = features_BTF.copy()
  changed[0, 5 * 8 : 6 * 8, 2 * 8 : 3 * 8] += 3
  valid_BT = np.ones((1, 64), bool)
  run = jax.jit(lambda x: BEATsEncoder(config).apply(params, x, valid_BT)[0])
  moved = np.abs(np.asarray(run(changed) - run(features_BTF))).sum(-1)[0]
  assert moved.argmax() == 5 * 4 + 2


def stub_torchaudio(monkeypatch):
  """Its filter bank is the one thing that the originals take from it."""
  names = ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi")
  modules = [types.ModuleType(name) for name in names]
  modules[0].__version__ = "2.11.0"
  modules[0].compliance, modules[1].kaldi = modules[1:]
  for name, module in zip(names, modules):
    monkeypatch.setitem(sys.modules, name, module)
  modules[2].fbank = torch_beats.kaldi_fbank


def normed(waveform_N):
  """Our features of a clip, through the leaves that the converter makes."""
  shift, scale = (leaf.read() for leaf in beats.cmvn_leaves(FULL.input_width).values())
  return (BEATsConfig().frontend().features(waveform_N) + shift) * scale


def check_clips(params, waveforms, run, theirs):
  """Raises unless ours of all clips in one batch are `run(theirs, waveform)` of each alone."""
  rows = [normed(waveform_N) for waveform_N in waveforms]
  frames_B = np.array([len(row) for row in rows])
  features_BTF = np.zeros((len(rows), frames_B.max(), FULL.input_width), np.float32)
  for line, row in zip(features_BTF, rows):
    line[: len(row)] = row
  valid_BT = np.arange(frames_B.max()) < frames_B[:, None]
  tokens_BSD, valid_BS = map(np.asarray, full(params, features_BTF, valid_BT))

  def alone(module, dtype):
    return [run(module, torch.tensor(w, dtype=dtype)[None])[0] for w in waveforms]

  ours = [tokens_SD[valid_S] for tokens_SD, valid_S in zip(tokens_BSD, valid_BS)]
  torch_models.assert_parity(ours, alone, theirs, layers=FULL.layers)


def test_the_features_are_what_torchaudio_defines(clips):
  for clip in clips[:3]:
    waveform_N = load_audio(clip.path)
    theirs_TF = reference.features(waveform_N)
    # The logarithm, the shift and the scale of either round; the DFT is in float64.
    largest = np.abs(theirs_TF + beats.MEAN / (2 * beats.DEVIATION)).max()
    bound = rounding(3, largest)
    assert_within(normed(waveform_N), theirs_TF, bound)
    with exceeds_the_bound():
      assert_within(normed(waveform_N * np.float32(1.0001)), theirs_TF, bound)


@pytest.fixture
def speechbrain_leaves_no_trace():
  """Its lazy modules raise whenever somebody looks into sys.modules, as hypothesis does."""
  yield
  for name in [name for name in sys.modules if name.partition(".")[0] == "speechbrain"]:
    del sys.modules[name]


def test_equals_speechbrain(monkeypatch, clips, speechbrain_leaves_no_trace):
  stub_torchaudio(monkeypatch)
  try:
    module = importlib.import_module("speechbrain.lobes.models.beats")
  except ModuleNotFoundError as error:
    pytest.skip(f"no speechbrain: {error}")
  torch.manual_seed(0)
  cfg = module.BEATsConfig(beats.cfg_of(FULL))
  assert beats.beats_config(vars(cfg)) == FULL  # it adds no key that we do not know
  monkeypatch.setattr(module, "BEATsConfig", lambda _: cfg)
  theirs = module.BEATs()
  torch_beats.louder(torch_models.vary_vectors(theirs, 0))
  check_clips(
    torch_beats.params(theirs),
    [load_audio(clip.path) for clip in clips[:3]],
    lambda module, waveform_BN: module.extract_features(waveform_BN, torch.ones(1))[0],
    theirs,
  )


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("tuned", [False, True])
def test_equals_the_original(monkeypatch, clips, shared_data, tmp_path, tuned):
  """A file that the original wrote, imported, run, exported, and loaded by the original again.

  SALMONN_SRC=<clone of bytedance/SALMONN, branch salmonn> pytest … -m nightly
  """
  folder = os.environ.get("SALMONN_SRC")
  if not folder:
    pytest.skip("no clone of SALMONN: set SALMONN_SRC to run the original's code")
  assert (Path(folder) / "models/beats/BEATs.py").is_file(), f"{folder}: not branch salmonn"
  stub_torchaudio(monkeypatch)
  monkeypatch.syspath_prepend(f"{folder}/models")
  module = importlib.import_module("beats.BEATs")
  cfg = {**beats.cfg_of(FULL), "finetuned_model": tuned, "predictor_class": 527, "dropout": 0.0}
  torch.manual_seed(0)
  theirs = module.BEATs(module.BEATsConfig(cfg))
  torch_beats.louder(torch_models.vary_vectors(theirs, 0))
  torch.save({"cfg": cfg, "model": theirs.state_dict()}, tmp_path / "theirs.pt")
  report = import_checkpoint("beats", tmp_path / "theirs.pt", tmp_path / "ours")
  assert ("predictor.weight" in report.ignored) == tuned
  params = checkpoint.load(tmp_path / "ours").params
  params = jax.tree.map(jnp.asarray, params["encoders"]["beats"])

  words = sorted((shared_data / "cmn-words").iterdir())[5::400]
  digits = sorted((shared_data / "fsdd").iterdir())
  waveforms = [load_audio(path) for path in (*(clip.path for clip in clips), *words)]
  waveforms.append(np.concatenate([load_audio(path) for path in digits[::150]])[: 10 * 16000])
  run = lambda module, waveform_BN: module.extract_features(waveform_BN, feature_only=True)[0]  # noqa: E731
  check_clips(params, waveforms, run, theirs)

  export_checkpoint("beats", tmp_path / "ours", tmp_path / "back")
  back = torch.load(tmp_path / "back" / beats.FILE, weights_only=True)
  again = module.BEATs(module.BEATsConfig(back["cfg"]))
  again.load_state_dict(back["model"])  # strictly
  assert all(torch.equal(again.state_dict()[n], theirs.state_dict()[n]) for n in back["model"])
