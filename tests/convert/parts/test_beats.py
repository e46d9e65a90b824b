"""BEATs files in and out, bit for bit, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.core.errors import ConversionError
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from convert.main import main
from convert.parts import beats
from convert.readers import ReadError
from mooer_jax import checkpoint
from mooer_jax.config import frontend_from_json, part_from_json
from mooer_jax.encoders.beats import BEATsConfig, BEATsEncoder
from tests.numerics import assert_within, condition, exceeds_the_bound, rounded_to, rounding
from tests.parity import torch_beats

# As the original is: its features are 128 wide.
SMALL = BEATsConfig(
  hidden_size=24,
  layers=3,
  heads=4,
  intermediate_size=40,
  patch_width=20,
  conv_pos=6,
  conv_pos_groups=3,
)
CFG = {
  "encoder_layers": 3,
  "encoder_embed_dim": 24,
  "encoder_ffn_embed_dim": 40,
  "encoder_attention_heads": 4,
  "activation_fn": "gelu",
  "dropout": 0.0,
  "attention_dropout": 0.0,
  "activation_dropout": 0.0,
  "encoder_layerdrop": 0.05,
  "dropout_input": 0.0,
  "layer_norm_first": False,
  "conv_bias": False,
  "conv_pos": 6,
  "conv_pos_groups": 3,
  "relative_position_embedding": True,
  "num_buckets": 320,
  "max_distance": 800,
  "gru_rel_pos": True,
  "deep_norm": True,
  "input_patch_size": 16,
  "layer_wise_gradient_decay_ratio": 0.6,
  "embed_dim": 20,
}
TUNED = {"finetuned_model": True, "predictor_dropout": 0.1, "predictor_class": 5}
COPY = "encoder.layers.{}.self_attn.relative_attention_bias.weight"


def write(path, *, cfg=CFG, state=None, **others):
  state = torch_beats.model(SMALL).state_dict() if state is None else state
  torch.save({"cfg": cfg, "model": state, **others}, path)
  return state


def same(before, after):
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_goes_in_and_comes_out_as_it_was(tmp_path, dtype):
  state = torch_beats.model(SMALL).to(dtype).state_dict()
  write(tmp_path / "beats.pt", state=state)
  report = import_checkpoint("beats", tmp_path / "beats.pt", tmp_path / "ours")
  assert report.ignored == (COPY.format(1), COPY.format(2))
  export_checkpoint("beats", tmp_path / "ours", tmp_path / "back")
  back = torch.load(tmp_path / "back" / "beats.pt", weights_only=True)
  assert back["cfg"] == CFG
  same(state, back["model"])
  tables = {back["model"][COPY.format(n)].data_ptr() for n in range(3)}
  assert len(tables) == 1  # written once


def test_what_comes_in_computes_as_torch_does(tmp_path):
  theirs = torch_beats.model(SMALL)
  write(tmp_path / "beats.pt", state=theirs.state_dict())
  import_checkpoint("beats", tmp_path / "beats.pt", tmp_path / "ours")
  loaded = checkpoint.load(tmp_path / "ours")
  config = part_from_json(loaded.config["encoders"][0], "encoders[0]")
  assert config == SMALL
  assert (
    frontend_from_json(loaded.config["frontends"][0], "frontends[0]") == BEATsConfig().frontend()
  )
  cmvn = loaded.params["frontend"]["beats"]
  raw_BTF = np.random.default_rng(0).normal(12, 6, (1, 50, 128)).astype(np.float32)
  features_BTF = (raw_BTF + cmvn["shift"]) * cmvn["scale"]
  # Each side rounds twice, values of this size.
  scale_BTF = (np.abs(raw_BTF) + 15.41663) / (2 * 6.55582)
  normed_BTF = (raw_BTF - 15.41663) / (2 * 6.55582)
  assert_within(features_BTF, normed_BTF, rounding(4, scale_BTF))
  with exceeds_the_bound():
    assert_within(features_BTF + 1e-4, normed_BTF, rounding(4, scale_BTF))

  @jax.jit
  def ours(params, features_BTF):
    return BEATsEncoder(config).apply({"params": params}, features_BTF, np.ones((1, 50), bool))[0]

  with torch.no_grad():
    expected = theirs(torch.tensor(features_BTF)).numpy()
  params = loaded.params["encoders"]["beats"]
  # The longest sums: over a patch, then over the MLP in each of three layers.
  bound = rounding(16 * 16 + 3 * 40, condition(ours, params, features_BTF))
  assert_within(ours(params, features_BTF), expected, bound)
  with exceeds_the_bound():
    assert_within(ours(rounded_to(jnp.bfloat16, params), features_BTF), expected, bound)


def test_a_fine_tuned_file_loses_its_head_by_name(tmp_path):
  head = {"predictor.weight": torch.ones(5, 24), "predictor.bias": torch.ones(5)}
  state = torch_beats.model(SMALL).state_dict()
  labels = {0: "/m/09x0r", 1: "/m/05zppz"}
  write(tmp_path / "beats.pt", cfg={**CFG, **TUNED}, state={**state, **head}, label_dict=labels)
  report = import_checkpoint("beats", tmp_path / "beats.pt", tmp_path / "ours")
  assert {*head, "label_dict"} < {*report.ignored} and "cfg" not in report.ignored
  export_checkpoint("beats", tmp_path / "ours", tmp_path / "back")
  back = torch.load(tmp_path / "back" / "beats.pt", weights_only=True)
  same(state, back["model"])
  assert back["cfg"] == {**CFG, **TUNED, "finetuned_model": False}  # the original loads strictly


def test_without_a_projection_and_without_copies(tmp_path):
  config = BEATsConfig(
    hidden_size=24,
    layers=2,
    heads=4,
    intermediate_size=40,
    patch_width=24,
    conv_pos=5,
    conv_pos_groups=3,
  )
  state = torch_beats.model(config).state_dict()
  assert not any(name.startswith("post_extract_proj") for name in state)
  given = {name: tensor for name, tensor in state.items() if name != COPY.format(1)}
  write(tmp_path / "beats.pt", cfg=beats.cfg_of(config), state=given)
  assert import_checkpoint("beats", tmp_path / "beats.pt", tmp_path / "ours").ignored == ()
  export_checkpoint("beats", tmp_path / "ours", tmp_path / "back")
  same(state, torch.load(tmp_path / "back" / "beats.pt", weights_only=True)["model"])


@pytest.mark.parametrize(
  "change, message",
  [
    ({"deep_norm": False}, "deep_norm=False"),
    ({"layer_norm_first": True}, "layer_norm_first=True"),
    ({"activation_fn": "glu"}, "activation_fn='glu'"),
    ({"gru_rel_pos": False}, "gru_rel_pos=False"),
    ({"relative_position_embedding": False}, "relative_position_embedding=False"),
    ({"conv_bias": True}, "conv_bias=True"),
    ({"mystery": 3}, "unknown cfg key 'mystery'"),
    ({"encoder_layers": 3.0}, "encoder_layers=3.0"),
    ({"encoder_attention_heads": 5}, "beats.heads=5"),
  ],
)
def test_another_encoder_is_refused_by_name(tmp_path, change, message):
  write(tmp_path / "beats.pt", cfg={**CFG, **change})
  with pytest.raises(ConversionError, match=message):
    import_checkpoint("beats", tmp_path / "beats.pt", tmp_path / "ours")
  assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("key", ["deep_norm", "gru_rel_pos", "input_patch_size"])
def test_a_missing_key_means_what_it_means_to_the_original(key):
  with pytest.raises(ConversionError, match=f"^cfg: cfg {key}="):
    beats.beats_config({k: v for k, v in CFG.items() if k != key})


def test_all_reasons_are_told():
  with pytest.raises(ConversionError, match="3 problems"):
    beats.beats_config({**CFG, "deep_norm": False, "a": 1, "b": 2})


def test_a_copy_of_the_bias_table_that_differs_is_an_error(tmp_path):
  state = {name: tensor.clone() for name, tensor in torch_beats.model(SMALL).state_dict().items()}
  state[COPY.format(2)][7, 1] += 1e-6
  write(tmp_path / "beats.pt", state=state)
  with pytest.raises(ConversionError, match=r"layers\.2\.self_attn.*differs from .*layers\.0"):
    import_checkpoint("beats", tmp_path / "beats.pt", tmp_path / "ours")


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
  state = dict(torch_beats.model(SMALL).state_dict())
  del state["encoder.layers.1.fc1.bias"]
  state["encoder.layers.1.self_attn.grep_a"] = torch.ones(1, 1, 1, 4)
  state["encoder.pos_conv.0.weight"] = torch.ones(2)
  state[COPY.format(3)] = torch.ones(320, 4)
  write(tmp_path / "beats.pt", state=state)
  with pytest.raises(ConversionError) as refused:
    import_checkpoint("beats", tmp_path / "beats.pt", tmp_path / "ours")
  said = str(refused.value)
  assert "4 problems" in said
  assert "encoder.layers.1.fc1.bias [40] is missing" in said
  assert "grep_a has shape [1, 1, 1, 4], the model needs [1, 4, 1, 1]" in said
  assert "encoder.pos_conv.0.weight [2] is unmapped" in said
  assert f"{COPY.format(3)} [320, 4] is unmapped" in said


@pytest.mark.parametrize("content", [{"model": {"a": torch.ones(2)}}, {"cfg": CFG}, torch.ones(2)])
def test_files_of_another_form_are_refused(tmp_path, content):
  torch.save(content, tmp_path / "beats.pt")
  with pytest.raises(ReadError, match="beats.pt: no (dict 'cfg'|part 'model')"):
    import_checkpoint("beats", tmp_path / "beats.pt", tmp_path / "ours")
  with pytest.raises(ReadError, match="is a folder"):
    import_checkpoint("beats", tmp_path, tmp_path / "ours" / "deeper")


def test_export_refuses_what_the_file_cannot_say():
  with pytest.raises(ConversionError, match="input_width=64"):
    beats.cfg_of(BEATsConfig(input_width=64))
  with pytest.raises(ConversionError, match="layers=3"):
    beats.cfg_of(SMALL, {**CFG, "encoder_layers": 2})


def test_the_command_line_knows_the_kind(tmp_path, capsys):
  write(tmp_path / "beats.pt")
  assert main(["inspect", "--short", str(tmp_path / "beats.pt")]) == 0
  assert "kind: beats\n" in capsys.readouterr().out
  ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
  assert main(["import", "beats", str(tmp_path / "beats.pt"), ours]) == 0
  assert "ignored, 2 in all" in capsys.readouterr().out
  assert main(["export", "beats", ours, back]) == 0
  assert main(["export", "paraformer", ours, str(tmp_path / "no")]) == 2
  assert "no sanm encoder" in capsys.readouterr().err
