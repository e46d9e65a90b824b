"""GGUF: tensors, settings and refusals, against transformers' models and llama.cpp's layout."""

import re
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch

from convert.readers import ReadError, gguf_config, open_source

SIZES = dict(
  vocab_size=64,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  rope_theta=50000.0,
  rms_norm_eps=1e-5,
  attn_implementation="eager",
)
NAMES = {
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
}
OUTER = {
  "model.embed_tokens.weight": "token_embd.weight",
  "model.norm.weight": "output_norm.weight",
  "lm_head.weight": "output.weight",
}


def _gguf_name(name):
  if name in OUTER:
    return OUTER[name]
  layer, inner, suffix = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(\w+)", name).groups()
  return f"blk.{layer}.{NAMES[inner]}.{suffix}"


def _rotated(rows, heads):
  """The order of q's and k's rows in llama.cpp: each head's two halves take turns."""
  order = np.arange(len(rows)).reshape(heads, -1)
  half = order.shape[1] // 2
  turns = np.stack([order[:, :half], order[:, half:]], axis=-1).reshape(-1)
  return rows[turns]


def _model(arch, **changes):
  from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

  torch.manual_seed(3)
  kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
  config_class, model_class = kinds[arch]
  model = model_class(config_class(**{"tie_word_embeddings": False, **SIZES, **changes}))
  for parameter in model.parameters():  # biases and norms too, so that a mix-up shows
    torch.nn.init.normal_(parameter, std=0.3)
  return model.eval()


def _write(path, arch, state, *, kind_of=lambda name: gguf.GGMLQuantizationType.F32, spoil=None):
  """Writes a GGUF file as llama.cpp's converter lays it out."""
  writer = gguf.GGUFWriter(path, arch)
  writer.add_context_length(128)
  writer.add_embedding_length(64)
  writer.add_block_count(2)
  writer.add_feed_forward_length(96)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(50000.0)
  writer.add_vocab_size(64)
  if spoil:
    spoil(writer)
  for name, value in state.items():
    array = value.float().numpy() if isinstance(value, torch.Tensor) else value
    if arch == "llama" and ".q_proj." in name:
      array = _rotated(array, 4)
    if arch == "llama" and ".k_proj." in name:
      array = _rotated(array, 2)
    kind = kind_of(name) if array.ndim > 1 else gguf.GGMLQuantizationType.F32
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in plain:
      writer.add_tensor(_gguf_name(name), array.astype(plain[kind]))
    else:
      writer.add_tensor(_gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize(
  "arch, changes",
  [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
  ],
)
def test_the_model_comes_back_bit_for_bit(tmp_path, arch, changes):
  model = _model(arch, **changes)
  state = {
    n: v
    for n, v in model.state_dict().items()
    if not (changes.get("tie_word_embeddings") and n == "lm_head.weight")
  }
  if changes.get("attention_bias"):  # llama.cpp knows no bias on o
    state = {n: v for n, v in state.items() if "o_proj.bias" not in n}
  path = _write(tmp_path / "a.gguf", arch, state)
  source = open_source(path)
  assert not source.notes and set(source.tensors) == set(state)
  for name, value in state.items():
    assert source.tensors[name].shape == tuple(value.shape)
    np.testing.assert_array_equal(source.read(name), value.numpy(), err_msg=name)

  config, expected = gguf_config(path), model.config.to_dict()
  assert config.pop("architectures") == [type(model).__name__]
  assert config.pop("rope_theta") == expected["rope_parameters"]["rope_theta"] == 50000.0
  head_dim = config.pop("head_dim")
  assert head_dim == 16
  assert config == {name: expected[name] for name in config}


def test_config_and_tensors_make_the_same_model(tmp_path):
  from transformers import LlamaConfig, LlamaForCausalLM

  model = _model("llama")
  path = _write(tmp_path / "a.gguf", "llama", model.state_dict())
  source, config = open_source(path), gguf_config(path)
  again = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).eval()
  again.load_state_dict({n: torch.from_numpy(source.read(n)) for n in source.tensors})
  ids = torch.tensor([[3, 9, 27, 17, 51]])
  with torch.no_grad():
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.filterwarnings("ignore")  # transformers' reader copies read-only arrays
def test_values_are_those_that_transformers_reads(tmp_path, arch, kind):
  from transformers import AutoModelForCausalLM

  kind_of = {".down_proj.weight": "F32"}  # 96 columns do fit, but keep a mix of types

  def choose(name):
    return gguf.GGMLQuantizationType[kind_of.get(name[name.find(".down_") :], kind)]

  state = _model(arch).state_dict()
  _write(tmp_path / "a.gguf", arch, state, kind_of=choose)
  source = open_source(tmp_path / "a.gguf")
  reference = AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="a.gguf", dtype=torch.float32
  ).state_dict()
  plain = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind)
  assert bool(source.notes) is (plain is None)
  for name, tensor in source.tensors.items():
    value = source.read(name)
    expected = plain if plain and value.ndim > 1 and "down" not in name else np.float32
    assert value.dtype == tensor.dtype == expected
    np.testing.assert_array_equal(value.astype(np.float32), reference[name].numpy(), err_msg=name)
    error = np.abs(value.astype(np.float32) - state[name].numpy()).max()
    assert error < 0.2  # of values up to 1.5: a wrong row or scale would show


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_further_types_are_expanded_by_gguf_itself(tmp_path, kind):
  kind = gguf.GGMLQuantizationType[kind]
  block, nbytes = gguf.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(1)
  # Two low bits less keep the half-precision scales among the bytes finite.
  blocks = rng.integers(0, 64, (8, 256 // block * nbytes), np.uint8)
  writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
  _settings(writer)
  writer.add_tensor("token_embd.weight", np.ones((64, 64), np.float32))
  writer.add_tensor("blk.1.ffn_down.weight", blocks, raw_dtype=kind)
  _finish(writer)
  source = open_source(tmp_path / "a.gguf")
  assert f"1 {kind.name}" in source.notes[0]
  found = source.read("model.layers.1.mlp.down_proj.weight")
  assert found.dtype == np.float32 and np.abs(found).max() > 0
  np.testing.assert_array_equal(found, gguf.dequantize(blocks, kind))


def _settings(writer, **changes):
  values = dict(
    context_length=128,
    embedding_length=64,
    block_count=2,
    feed_forward_length=96,
    head_count=4,
    head_count_kv=2,
    layer_norm_rms_eps=1e-5,
    **changes,
  )
  for name, value in values.items():
    if value is not None:
      getattr(writer, f"add_{name}")(value)


def _finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _small(path, *, arch="llama", tensors=None, spoil=None):
  writer = gguf.GGUFWriter(path, arch)
  _settings(writer)
  if spoil:
    spoil(writer)
  embed = {"token_embd.weight": np.ones((8, 64), np.float32)}
  for name, array in (embed if tensors is None else {**embed, **tensors}).items():
    writer.add_tensor(name, array)
  _finish(writer)
  return path


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(arch="mamba"), "architecture 'mamba'; supported are llama, qwen2"),
    (
      dict(tensors={"blk.0.ffn_gate_inp.weight": np.ones((2, 2), np.float32)}),
      "'blk.0.ffn_gate_inp.weight' belongs to no",
    ),
    (dict(tensors={"blk.0.attn_q.weight": np.ones((12, 64), np.float32)}), "into 4 heads"),
    (dict(tensors={"output_norm.weight": np.ones(64, np.float64)}), "has the type F64"),
    (
      dict(tensors={"rope_freqs.weight": np.ones(8, np.float32)}),
      "not supported: rope_freqs.weight",
    ),
    (dict(spoil=lambda w: w.add_expert_count(8)), "not supported: llama.expert_count"),
    (dict(spoil=lambda w: w.add_sliding_window(512)), "llama.attention.sliding_window"),
    (dict(spoil=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)), "scaling.type"),
    (dict(spoil=lambda w: w.add_rope_dimension_count(8)), "rope.dimension_count is 8"),
    (dict(spoil=lambda w: w.add_string("llama.rope.freq_base", "x")), "freq_base' is a str"),
    (dict(spoil=lambda w: w.add_uint16("split.count", 3)), "one of 3 parts"),
    (dict(spoil=lambda w: w.add_uint32("general.alignment", 24)), "alignment is 24"),
  ],
)
def test_what_is_not_supported_is_named(tmp_path, arguments, message):
  with pytest.raises(ReadError, match=rf"a\.gguf: .*{message}"):
    open_source(_small(tmp_path / "a.gguf", **arguments))


def test_missing_settings_and_tables_are_named(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
  _finish(writer)
  with pytest.raises(ReadError, match=r"token_embd\.weight"):
    gguf_config(tmp_path / "a.gguf")
  writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
  writer.add_tensor("token_embd.weight", np.ones((8, 64), np.float32))
  _finish(writer)
  with pytest.raises(ReadError, match="lack 'llama.embedding_length'"):
    gguf_config(tmp_path / "a.gguf")


def test_a_scale_that_is_not_finite_is_named(tmp_path):
  blocks = np.zeros((1, 34), np.uint8)
  blocks[0, 1], blocks[0, 2:] = 0x7C, 1  # half-precision infinity
  writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
  _settings(writer)
  writer.add_tensor("token_embd.weight", np.ones((8, 64), np.float32))
  writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
  _finish(writer)
  with pytest.raises(ReadError, match="'model.layers.0.mlp.up_proj.weight' has 32 of 32"):
    open_source(tmp_path / "a.gguf").read("model.layers.0.mlp.up_proj.weight")


def test_a_count_that_lies_ends_at_the_end_of_the_file(tmp_path):
  head = b"GGUF" + struct.pack("<I", 3)
  entry = struct.pack("<Q", 1) + b"k"
  for content in (
    head + struct.pack("<QQ", 1 << 60, 0),
    head + struct.pack("<QQ", 0, 1 << 60),
    head + struct.pack("<QQQ", 0, 1, 1 << 62) + b"k",
    head + struct.pack("<QQ", 0, 1) + entry + struct.pack("<IIQ", 9, 6, 1 << 61),
    head + struct.pack("<QQ", 0, 1) + entry + struct.pack("<IIQ", 9, 8, 1 << 61) + b"\0" * 64,
    head,
    b"GGUF",
    b"G",
  ):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ReadError, match=r"a\.gguf: "):
      open_source(tmp_path / "a.gguf")
  (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(16))
  with pytest.raises(ReadError, match="big-endian"):
    open_source(tmp_path / "a.gguf")


def test_data_that_end_early_or_overlap(tmp_path):
  tensors = {"output_norm.weight": np.ones(64, np.float32)}
  whole = _small(tmp_path / "a.gguf", tensors=tensors).read_bytes()
  assert len(open_source(tmp_path / "a.gguf").tensors) == 2
  (tmp_path / "a.gguf").write_bytes(whole[:-1])
  with pytest.raises(ReadError, match="'output_norm.weight' should end at byte .* copy it again"):
    open_source(tmp_path / "a.gguf")
  # Name, number of dimensions, one dimension, type, then the offset.
  at = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
  assert struct.unpack_from("<Q", whole, at) == (8 * 64 * 4,)
  for offset, message in [
    (32, "overlaps"),
    (33, "multiple of the alignment 32"),
    (1 << 62, "should end at byte"),
  ]:
    (tmp_path / "a.gguf").write_bytes(whole[:at] + struct.pack("<Q", offset) + whole[at + 8 :])
    with pytest.raises(ReadError, match=f"'output_norm.weight' .*{message}"):
      open_source(tmp_path / "a.gguf")
