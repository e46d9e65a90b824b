"""Whisper's encoder from three kinds of files: transformers' output here, the same bits back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert.core.errors import ConversionError
from convert.core.shapes import encoder_shapes
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from convert.main import main
from convert.parts.whisper import PREFIX, features_of, table
from convert.readers import ReadError, open_source
from mooer_jax import checkpoint
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.config import part_from_json
from mooer_jax.encoders.whisper import WhisperConfig, WhisperEncoder
from tests.convert.ctranslate2_files import ctranslate2_bytes, find_whisper
from tests.convert.folders_of import vary
from tests.numerics import assert_within, condition, exceeds_the_bound, rounded_to, rounding

FLOAT8 = jnp.float8_e4m3fn  # smaller than any dtype that the files have
CONFIG = WhisperConfig(
  input_width=6, hidden_size=32, layers=2, heads=4, intermediate_size=40, positions=20, context=20
)


def model(*, head=False, dtype=torch.float32, **changes):
  """A small model of transformers."""
  import transformers

  torch.manual_seed(0)
  config = transformers.WhisperConfig(
    vocab_size=11,
    num_mel_bins=6,
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=40,
    max_source_positions=20,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=8,
    max_target_positions=9,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    decoder_start_token_id=1,
    **changes,
  )
  kind = transformers.WhisperForConditionalGeneration if head else transformers.WhisperModel
  return vary(kind(config).to(dtype))


def hf_folder(folder, **changes):
  module = model(**changes)
  module.save_pretrained(folder)
  return module, folder


OPENAI = (
  ("embed_positions.weight", "positional_embedding"),
  ("self_attn_layer_norm", "attn_ln"),
  ("self_attn.q_proj", "attn.query"),
  ("self_attn.k_proj", "attn.key"),
  ("self_attn.v_proj", "attn.value"),
  ("self_attn.out_proj", "attn.out"),
  ("final_layer_norm", "mlp_ln"),
  ("fc1", "mlp.0"),
  ("fc2", "mlp.2"),
  ("layers.", "blocks."),
)
CTRANSLATE2 = (
  ("embed_positions.weight", "position_encodings/encodings"),
  ("layers.", "layer_"),
  ("self_attn_layer_norm.weight", "self_attention/layer_norm/gamma"),
  ("self_attn_layer_norm.bias", "self_attention/layer_norm/beta"),
  ("self_attn.out_proj.", "self_attention/linear_1/"),
  ("final_layer_norm.weight", "ffn/layer_norm/gamma"),
  ("final_layer_norm.bias", "ffn/layer_norm/beta"),
  ("fc1.", "ffn/linear_0/"),
  ("fc2.", "ffn/linear_1/"),
  (".", "/"),
)


def renamed(name, pairs):
  for old, new in pairs:
    name = name.replace(old, new)
  return name


def openai_file(path, module, **dims):
  """The same encoder as openai-whisper saves it."""
  state = {"decoder.token_embedding.weight": torch.ones(3, 2)}
  for name, tensor in module.encoder.state_dict().items():
    name = name.replace("layer_norm", "ln_post") if name.startswith("layer_norm") else name
    state[f"encoder.{renamed(name, OPENAI)}"] = tensor.clone()
  torch.save({"dims": {"n_mels": 6, "n_audio_head": 4, **dims}, "model_state_dict": state}, path)
  return path


def ctranslate2_folder(folder, module, change=lambda tensors: None):
  """The same encoder as CTranslate2 lays it out, in float16."""
  tensors = {"encoder/num_heads": np.array(4, np.int16), "decoder/pre_norm": np.array(1, np.int8)}
  state = {n: t.numpy().astype(np.float16) for n, t in module.encoder.state_dict().items()}
  for layer in range(2):
    qkv = f"layers.{layer}.self_attn."
    zeros = np.zeros(32, np.float16)
    for leaf in ("weight", "bias"):
      parts = [state.pop(f"{qkv}{part}_proj.{leaf}", zeros) for part in "qkv"]
      tensors[f"encoder/layer_{layer}/self_attention/linear_0/{leaf}"] = np.concatenate(parts)
  for name, array in state.items():
    if name.startswith("layer_norm"):
      name = name.replace("weight", "gamma").replace("bias", "beta")
    tensors[f"encoder/{renamed(name, CTRANSLATE2)}"] = array
  change(tensors)
  folder.mkdir()
  (folder / "model.bin").write_bytes(ctranslate2_bytes(tensors))
  (folder / "config.json").write_text('{"suppress_ids": [1]}')
  return folder


def our_output(folder):
  """(config, function of params and features [B, T, F], the folder's params)."""
  loaded = checkpoint.load(folder, dtype="float32")
  config = part_from_json(loaded.config["encoders"][0], "encoders[0]")

  @jax.jit
  def output(params, x_BTF):
    valid_BT = np.ones(x_BTF.shape[:2], bool)
    return WhisperEncoder(config).apply({"params": params}, x_BTF, valid_BT)[0]

  return config, output, loaded.params["encoders"]["whisper"]


def assert_same_output(folder, module):
  config, ours, params = our_output(folder)
  assert config == CONFIG
  x_BTF = np.random.default_rng(0).normal(size=(2, 40, 6)).astype(np.float32)
  with torch.no_grad():
    theirs = module.float().encoder(torch.tensor(x_BTF).transpose(1, 2)).last_hidden_state
  # The longest sums: over a window of the convolutions, then over the MLP in each of two layers.
  bound = rounding(3 * 32 + 2 * 40, condition(ours, params, x_BTF))
  assert_within(ours(params, x_BTF), theirs.numpy(), bound)
  with exceeds_the_bound():
    assert_within(ours(rounded_to(FLOAT8, params), x_BTF), theirs.numpy(), bound)


def bits(source, prefix=""):
  return {
    name: (t.shape, t.dtype.name, source.read(name).tobytes())
    for name, t in source.tensors.items()
    if name.startswith(prefix)
  }


@pytest.mark.parametrize("head, prefix", [(True, "model.encoder."), (False, "encoder.")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_folder_of_hugging_face_there_and_back(tmp_path, head, prefix, dtype):
  module, source = hf_folder(tmp_path / "hf", head=head, dtype=dtype)
  report = import_checkpoint("whisper", source, tmp_path / "ours")
  assert report.ignored and all("decoder." in name for name in report.ignored)
  assert_same_output(tmp_path / "ours", module.model if head else module)
  export_checkpoint("whisper", tmp_path / "ours", tmp_path / "back", shard_bytes=9000)
  assert bits(open_source(tmp_path / "back")) == bits(open_source(source), prefix)
  before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back"))
  assert after == before
  again = type(module).from_pretrained(tmp_path / "back", dtype=dtype)
  for name, tensor in module.state_dict().items():
    if "encoder." in name and "decoder" not in name:
      assert torch.equal(again.state_dict()[name], tensor.to(dtype)), name


def test_a_torch_file_in_the_folder(tmp_path):
  module, source = hf_folder(tmp_path / "hf", head=True)
  torch.save(module.state_dict(), source / "pytorch_model.bin")
  (source / "model.safetensors").unlink()
  import_checkpoint("whisper", source, tmp_path / "ours")
  assert_same_output(tmp_path / "ours", module.model)


def test_a_file_of_openai_becomes_a_folder_of_hugging_face(tmp_path):
  module = model()
  report = import_checkpoint("whisper", openai_file(tmp_path / "a.pt", module), tmp_path / "ours")
  assert "decoder.token_embedding.weight" in report.ignored
  assert_same_output(tmp_path / "ours", module)
  assert_loads_again(tmp_path, module)


def assert_loads_again(tmp_path, module):
  import transformers

  export_checkpoint("whisper", tmp_path / "ours", tmp_path / "back")
  again = transformers.WhisperModel.from_pretrained(tmp_path / "back", dtype=torch.float32)
  for name, tensor in module.encoder.state_dict().items():
    assert torch.equal(again.encoder.state_dict()[name], tensor), name
  report = import_checkpoint("whisper", tmp_path / "back", tmp_path / "again")
  assert report.ignored == ()
  assert_same_output(tmp_path / "again", module)


def test_a_folder_of_faster_whisper(tmp_path):
  module = model().half().float()
  source = ctranslate2_folder(tmp_path / "fast", module)
  report = import_checkpoint("whisper", source, tmp_path / "ours")
  assert report.ignored == ("decoder/pre_norm",)
  assert {leaf.dtype.name for leaf in report.leaves.values()} == {"float16"}
  assert_same_output(tmp_path / "ours", module)
  assert_loads_again(tmp_path, module)


def test_the_checkpoint_says_which_features_it_takes(tmp_path):
  _, source = hf_folder(tmp_path / "hf")
  import_checkpoint("whisper", source, tmp_path / "ours")
  (frontend,) = checkpoint.describe(tmp_path / "ours").config["frontends"]
  assert frontend.pop("kind") == "logmel"
  assert LogMelConfig(**frontend) == features_of(CONFIG) == LogMelConfig(bins=6, chunk_s=0.4)
  assert features_of(WhisperConfig.SIZES["whisper_large_v3"]) == LogMelConfig(bins=128)


def test_the_table_covers_the_model_in_both_directions():
  styles = ((PREFIX, "hf"), ("", "hf"), ("encoder.", "openai"), ("encoder/", "ctranslate2"))
  for prefix, style in styles:
    rules, paths = table(prefix, style=style), encoder_shapes(CONFIG)
    names = {rules.to_torch(path)[0] for path in paths}
    assert len(names) == len(paths)
    assert {rules.to_jax(name)[0] for name in names} == paths.keys()


def change_config(folder, **changes):
  described = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**described, **changes}))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "bart"}, "model_type='bart'"),
    ({"activation_function": "relu"}, "activation_function='relu'"),
    ({"quantization_config": {"bits": 8}}, "quantization_config"),
    ({"encoder_layers": 3}, "encoder_layers=3, but the weights have 2"),
    ({"encoder_attention_heads": None}, "number of heads is None"),
    ({"encoder_attention_heads": 5}, "whisper.hidden_size=32 .* whisper.heads=5"),
  ],
)
def test_what_the_encoder_cannot_express_is_refused_by_name(tmp_path, change, message):
  _, source = hf_folder(tmp_path / "hf")
  change_config(source, **change)
  with pytest.raises(ConversionError, match=message):
    import_checkpoint("whisper", source, tmp_path / "ours")
  assert not (tmp_path / "ours").exists()


def test_other_features_are_refused_by_name(tmp_path):
  _, source = hf_folder(tmp_path / "hf")
  described = {"feature_size": 6, "hop_length": 160, "n_fft": 400, "chunk_length": 0.4}
  path = source / "preprocessor_config.json"
  path.write_text(json.dumps(described))
  import_checkpoint("whisper", source, tmp_path / "ours")
  export_checkpoint("whisper", tmp_path / "ours", tmp_path / "back")
  assert json.loads((tmp_path / "back" / path.name).read_text()) == described
  path.write_text(json.dumps({**described, "hop_length": 80, "chunk_length": 30}))
  with pytest.raises(ConversionError, match="(?s)2 problems.*hop_length=80.*chunk_length=30"):
    import_checkpoint("whisper", source, tmp_path / "out")


def test_everything_that_does_not_fit_is_told_at_once(tmp_path):
  module, source = hf_folder(tmp_path / "hf")
  state = module.state_dict()
  del state["encoder.layers.1.fc2.weight"]
  state["encoder.layers.0.self_attn.k_proj.bias"] = torch.ones(32)
  state["encoder.conv2.weight"] = torch.ones(32, 32, 5)
  state["encoder.layers.0.self_attn.q_proj.bias"] = torch.ones(31)
  torch.save(state, source / "pytorch_model.bin")
  (source / "model.safetensors").unlink()
  with pytest.raises(ConversionError) as caught:
    import_checkpoint("whisper", source, tmp_path / "ours")
  lines = str(caught.value).splitlines()
  assert "4 problems" in lines[0]
  for part in (
    "encoder.layers.1.fc2.weight [32, 40] is missing",
    "k_proj.bias [32] is unmapped: no rule knows this name",
    "conv2.weight has shape [32, 32, 5], the model needs [32, 32, 3]",
    "q_proj.bias has shape [31], the model needs [32]",
  ):
    assert any(part in line for line in lines), part


@pytest.mark.parametrize(
  "change, error, message",
  [
    (lambda t: t.pop("encoder/num_heads"), ConversionError, "number of heads is None"),
    (lambda t: t.pop("encoder/layer_1/ffn/layer_norm/beta"), ConversionError,
     "encoder/layer_1/ffn/layer_norm/beta .32. is missing"),
    (lambda t: t.update({"encoder/scale": np.array(2, np.float32)}), ConversionError,
     "encoder/scale .* no rule knows"),
    (lambda t: t["encoder/layer_1/self_attention/linear_0/bias"].fill(1), ConversionError,
     "layer_1/self_attention/linear_0/bias has a bias of the keys"),
    (lambda t: t.update({"encoder/layer_0/self_attention/linear_0/bias": np.ones(95, "f2")}),
     ConversionError, "layer_0/self_attention/linear_0/bias .95. is unmapped"),
    (lambda t: t["encoder/layer_1/ffn/linear_0/weight"].fill(np.nan), ReadError,
     "fc1.weight|linear_0/weight.* NaN"),
  ],
)  # fmt: skip
def test_a_folder_of_faster_whisper_that_does_not_fit(tmp_path, change, error, message):
  source = ctranslate2_folder(tmp_path / "fast", model(), change)
  with pytest.raises(error, match=message):
    import_checkpoint("whisper", source, tmp_path / "ours")
  assert not (tmp_path / "ours").exists()


def test_files_without_the_number_of_heads_are_refused(tmp_path):
  module, source = hf_folder(tmp_path / "hf")
  with pytest.raises(ConversionError, match="no config.json"):
    import_checkpoint("whisper", source / "model.safetensors", tmp_path / "ours")
  with pytest.raises(ConversionError, match="no dims with n_audio_head"):
    path = openai_file(tmp_path / "a.pt", module, n_audio_head="six")
    import_checkpoint("whisper", path, tmp_path / "ours")


def test_names_of_openai_in_shards_lack_the_number_of_heads(tmp_path):
  file = openai_file(tmp_path / "a.pt", model())
  state = {name: tensor.numpy() for name, tensor in torch.load(file)["model_state_dict"].items()}
  names = sorted(state)
  shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
  folder = tmp_path / "shards"
  folder.mkdir()
  for shard, held in shards.items():
    save_file({name: state[name] for name in held}, folder / shard)
  weight_map = {name: shard for shard, held in shards.items() for name in held}
  index = json.dumps({"weight_map": weight_map})
  (folder / "model.safetensors.index.json").write_text(index)
  with pytest.raises(ConversionError, match="number of heads is None; no dims with n_audio_head"):
    import_checkpoint("whisper", folder, tmp_path / "ours")


def test_another_kind_is_named(tmp_path):
  _, source = hf_folder(tmp_path / "hf")
  shutil.copy(source / "config.json", tmp_path)
  torch.save({"model.layers.0.weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
  with pytest.raises(ConversionError, match="no Whisper encoder in it"):
    import_checkpoint("whisper", tmp_path, tmp_path / "sub" / "ours")
  import_checkpoint("whisper", source, tmp_path / "ours")
  with pytest.raises(ConversionError, match="no sanm encoder"):
    export_checkpoint("paraformer", tmp_path / "ours", tmp_path / "out")


def test_inspect_knows_all_three(tmp_path, capsys):
  module, source = hf_folder(tmp_path / "hf", head=True)
  for path in (
    source,
    openai_file(tmp_path / "a.pt", module.model),
    ctranslate2_folder(tmp_path / "fast", module.model),
  ):
    assert main(["inspect", str(path), "--short"]) == 0
    assert "kind: whisper\n" in capsys.readouterr().out
  ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
  assert main(["import", "whisper", str(source), ours]) == 0
  assert "leaves, 0.02 M parameters, float32" in capsys.readouterr().out
  assert main(["export", "whisper", ours, back]) == 0


@pytest.mark.slow
def test_the_real_tiny_en_hears_what_transformers_hears(tmp_path, shared_data):
  import transformers

  report = import_checkpoint("whisper", find_whisper(), tmp_path / "ours")
  assert len(report.leaves) == 67 and len(report.ignored) == 93
  export_checkpoint("whisper", tmp_path / "ours", tmp_path / "back")
  module = transformers.WhisperModel.from_pretrained(tmp_path / "back", dtype=torch.float32)
  config, encode, params = our_output(tmp_path / "ours")
  assert config == WhisperConfig.SIZES["whisper_tiny"]
  waveform_N = load_audio(sorted((shared_data / "fsdd").iterdir())[0])

  def ours(params, waveform_N):
    return encode(params, LogMelConfig().features(waveform_N)[None])

  extractor = transformers.WhisperFeatureExtractor()
  heard = extractor(waveform_N, sampling_rate=16000, return_tensors="pt").input_features
  with torch.no_grad():
    theirs = module.encoder(heard).last_hidden_state.numpy()
  # The longest sums: a window's samples, a window of convolutions, the MLP in each of four layers.
  bound = rounding(400 + 3 * 384 + 4 * 1536, condition(ours, params, waveform_N))
  assert_within(ours(params, waveform_N), theirs, bound)
  with exceeds_the_bound():
    assert_within(ours(params, np.roll(waveform_N, 1)), theirs, bound)
