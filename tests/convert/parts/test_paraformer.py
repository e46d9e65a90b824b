"""FunASR's folders: the encoder with what its config.yaml says, here and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml

from convert.core.errors import ConversionError
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from mooer_jax import checkpoint
from mooer_jax.config import frontend_from_json, part_from_json
from mooer_jax.encoders.sanm import SANMEncoder
from tests.convert.releases import changed, funasr_folder
from tests.numerics import assert_within, condition, exceeds_the_bound, rounded_to, rounding
from tests.tiny import SANM


def configs(folder):
  """(encoder, features) of a checkpoint."""
  config = checkpoint.describe(folder).config
  frontend = frontend_from_json(config["frontends"][0], "frontends[0]")
  return part_from_json(config["encoders"][0], "encoders[0]"), frontend


@pytest.mark.parametrize("heads", [4, 2])
def test_the_encoder_is_funasrs_and_comes_back(tmp_path, heads):
  module, cmvn = funasr_folder(tmp_path / "funasr", heads=heads)
  report = import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "ours")
  assert report.ignored == ("decoder.after_norm.weight",)
  loaded = checkpoint.load(tmp_path / "ours")
  config, _ = configs(tmp_path / "ours")
  assert config == dataclasses.replace(SANM, heads=heads)
  np.testing.assert_array_equal(loaded.params["frontend"]["sanm"]["shift"], np.float32(cmvn[0]))
  x_BTF = np.random.default_rng(0).normal(size=(1, 9, SANM.input_width)).astype(np.float32)

  @jax.jit
  def ours(params, x_BTF):
    return SANMEncoder(config).apply({"params": params}, x_BTF, np.ones((1, 9), bool))[0]

  with torch.no_grad():
    theirs = module(torch.tensor(x_BTF), torch.tensor([9]))[0].numpy()
  params = loaded.params["encoders"]["sanm"]
  # The longest sums, over a frame's features or the MLP, in each of three layers.
  bound = rounding(56 * 3, condition(ours, params, x_BTF))
  assert_within(ours(params, x_BTF), theirs, bound)
  with exceeds_the_bound():
    assert_within(ours(rounded_to(jnp.bfloat16, params), x_BTF), theirs, bound)

  export_checkpoint("paraformer", tmp_path / "ours", tmp_path / "back")
  before = torch.load(tmp_path / "funasr" / "model.pt")
  after = torch.load(tmp_path / "back" / "model.pt")
  assert before.keys() - after.keys() == {"decoder.after_norm.weight"}
  assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
  file = "config.yaml"
  assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "funasr" / file).read_bytes()
  assert import_checkpoint("paraformer", tmp_path / "back", tmp_path / "again").ignored == ()
  assert configs(tmp_path / "again") == configs(tmp_path / "ours")


FEATURES = [
  {"lfr_m": 8, "lfr_n": 3, "n_mels": 7},
  {"lfr_m": None, "lfr_n": None, "n_mels": 56},
  {"lfr_m": 4, "lfr_n": None, "n_mels": 14, "window": "povey"},
  {"window": None, "frame_length": 32, "frame_shift": 16},
  {"window": "hanning", "fs": 8000},
]


@pytest.mark.parametrize("said", FEATURES, ids=str)
def test_features_are_those_that_funasr_makes_of_the_same_section(tmp_path, said):
  """Other values than Paraformer's, and FunASR's own where one is absent."""
  from funasr.frontends.wav_frontend import WavFrontend

  funasr_folder(tmp_path / "funasr", frontend_conf={**said, "dither": 0.0})
  import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "ours")
  _, frontend = configs(tmp_path / "ours")
  conf = yaml.safe_load((tmp_path / "funasr" / "config.yaml").read_text())["frontend_conf"]
  wave_N = np.random.default_rng(0).normal(size=9000).astype(np.float32) * 0.1
  ours_TF = frontend.features(wave_N)
  theirs, _ = WavFrontend(**conf)(torch.tensor(wave_N)[None], torch.tensor([len(wave_N)]))
  assert ours_TF.shape == theirs[0].shape and ours_TF.shape[1] == SANM.input_width
  # Logarithms of sums over a window's samples: of noise, so that none is near the floor.
  bound = rounding(512, condition(lambda wave_N: frontend.features(wave_N), wave_N))
  assert_within(ours_TF, theirs[0].numpy(), bound)
  with exceeds_the_bound():
    assert_within(frontend.features(np.roll(wave_N, 1)), theirs[0].numpy(), bound)

  (tmp_path / "ours" / "source" / "encoder" / "config.yaml").unlink()  # so that one is written
  export_checkpoint("paraformer", tmp_path / "ours", tmp_path / "back")
  import_checkpoint("paraformer", tmp_path / "back", tmp_path / "again")
  assert configs(tmp_path / "again") == configs(tmp_path / "ours")


def test_a_folder_without_config_is_paraformers_and_one_is_written(tmp_path):
  funasr_folder(tmp_path / "funasr")
  (tmp_path / "funasr" / "config.yaml").unlink()
  import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "ours")
  encoder, frontend = configs(tmp_path / "ours")
  assert (encoder, frontend.lfr_window, frontend.lfr_stride) == (SANM, 7, 6)
  changed(tmp_path / "ours", lambda c: c["encoders"][0].update(heads=8))
  export_checkpoint("paraformer", tmp_path / "ours", tmp_path / "back")
  conf = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())
  assert conf["encoder_conf"]["attention_heads"] == 8
  import_checkpoint("paraformer", tmp_path / "back", tmp_path / "again")
  assert configs(tmp_path / "again") == configs(tmp_path / "ours")


@pytest.mark.parametrize(
  "change, path",
  [
    (lambda c: c["encoders"][0].update(norm_eps=1e-5), "encoders/0/norm_eps is 1e-05"),
    (lambda c: c["frontends"][0]["fbank"].update(low_hz=40.0), "frontends/0/fbank/low_hz is 40.0"),
  ],
)
def test_what_a_config_yaml_cannot_say_is_told_and_nothing_is_left(tmp_path, change, path):
  funasr_folder(tmp_path / "funasr")
  import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "ours")
  changed(tmp_path / "ours", change)
  with pytest.raises(ConversionError, match=path):
    export_checkpoint("paraformer", tmp_path / "ours", tmp_path / "back")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["funasr", "ours"]


def test_a_kept_config_yaml_that_no_longer_holds_is_written_anew(tmp_path):
  funasr_folder(tmp_path / "funasr")
  import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "ours")
  changed(tmp_path / "ours", lambda c: c["frontends"][0].update(lfr_stride=4))
  export_checkpoint("paraformer", tmp_path / "ours", tmp_path / "back")
  conf = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())
  assert conf["frontend_conf"]["lfr_n"] == 4


@pytest.mark.parametrize(
  "section, change, message",
  [
    ("encoder_conf", {"sanm_shfit": 5}, "encoder_conf.sanm_shfit=5"),
    ("encoder_conf", {"input_layer": "conv2d"}, "encoder_conf.input_layer='conv2d'"),
    ("encoder_conf", {"input_layer": None}, "input_layer='conv2d' .FunASR's default."),
    ("encoder_conf", {"num_blocks": 4}, "num_blocks=4; the tensors .* need 3"),
    ("encoder_conf", {"attention_heads": 5}, "heads=5"),
    ("encoder_conf", {"attention_heads": "four"}, "heads='four'"),
    ("encoder", "ConformerEncoder", "only SANMEncoder"),
    ("frontend_conf", {"n_mels": None}, "takes 56 values a step, its features have 560"),
    ("frontend_conf", {"window": "blackman"}, "blackman"),
    ("frontend_conf", {"lfr_n": 8}, "lfr_stride=8"),
    ("frontend_conf", {"snip_edges": False}, "frontend_conf.snip_edges=False"),
  ],
)
def test_another_paraformer_is_refused_by_name(tmp_path, section, change, message):
  funasr_folder(tmp_path / "funasr", **{section: change})
  with pytest.raises(ConversionError, match=message):
    import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "ours")
  assert not (tmp_path / "ours").exists()


def test_dither_that_we_do_not_add_is_told(tmp_path):
  funasr_folder(tmp_path / "funasr")
  notes = import_checkpoint("paraformer", tmp_path / "funasr", tmp_path / "ours").notes
  assert notes == (
    "config.yaml: dither=1.0: FunASR adds that noise to a clip, this library adds none",
  )


def test_a_folder_that_is_not_funasrs_is_told_what_it_is(tmp_path):
  (tmp_path / "paraformer-encoder.pth").touch()
  with pytest.raises(FileNotFoundError, match="FunASR's folder .*; this is the encoder of a MooER"):
    import_checkpoint("paraformer", tmp_path, tmp_path / "out")
