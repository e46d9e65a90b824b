"""Safetensors: exact bits, and a header that lies is found out."""

import json
import random
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from convert.readers import ReadError, open_source


def test_reads_every_dtype_bit_for_bit(tmp_path, tensors, write_safetensors, same_bits):
  same_bits(open_source(write_safetensors(tmp_path / "a.safetensors", tensors)), tensors)


def test_reads_what_the_package_writes(tmp_path, tensors, to_torch, same_bits):
  from safetensors.torch import save_file

  save_file(to_torch(tensors), tmp_path / "a.safetensors", metadata={"format": "pt"})
  same_bits(open_source(tmp_path / "a.safetensors"), tensors)


def test_bits_that_no_number_has_are_kept(tmp_path, write_safetensors):
  tensors = {
    "a": np.array([-0.0, 1e-45, 3.4e38], np.float32),
    "b": np.array([0x8000, 0x0001, 0x7F7F], np.uint16).view(ml_dtypes.bfloat16),
  }
  source = open_source(write_safetensors(tmp_path / "a.safetensors", tensors))
  for name, array in tensors.items():
    assert source.read(name).tobytes() == array.tobytes()


def test_reading_holds_one_tensor(tmp_path, write_safetensors):
  arrays = {f"t{i}": np.full((1 << 18,), i, np.float32) for i in range(16)}
  path = write_safetensors(tmp_path / "a.safetensors", arrays)
  size = arrays["t0"].nbytes
  tracemalloc.start()
  source = open_source(path)
  opened = tracemalloc.get_traced_memory()[1]
  for name in source.tensors:
    source.read(name)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert opened < 200_000
  assert peak < 2.5 * size  # the tensor, and the mask of its finite values


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_counted(tmp_path, write_safetensors, dtype, value):
  array = np.ones((7, 3), dtype)
  array[2, 1] = array[6, 2] = value
  path = write_safetensors(tmp_path / "a.safetensors", {"fine": np.ones(2, dtype), "bad": array})
  source = open_source(path)
  source.read("fine")
  with pytest.raises(ReadError, match=r"a\.safetensors: tensor 'bad' has 2 of 21 values"):
    source.read("bad")


def test_an_unknown_name_is_named(tmp_path, tensors, write_safetensors):
  source = open_source(write_safetensors(tmp_path / "a.safetensors", tensors))
  with pytest.raises(KeyError, match="no tensor 'lm_head'"):
    source.read("lm_head")


def _change(name, key, value):
  def header(entries):
    entries[name][key] = value(entries[name][key]) if callable(value) else value
    return entries

  return header


@pytest.mark.parametrize(
  "header, message",
  [
    (_change("proj.weight", "shape", [4, 4]), "'proj.weight' of shape.*takes 32 bytes.*span 24"),
    (_change("proj.weight", "shape", [4, -3]), "'proj.weight'.*none negative"),
    (_change("proj.weight", "shape", [True, 12]), "'proj.weight'.*whole numbers"),
    (_change("proj.weight", "shape", [4.0, 3]), "'proj.weight'.*whole numbers"),
    (_change("none", "shape", [0, 1 << 61, 1 << 61]), "'none'.*impossible shape"),
    (_change("none", "shape", [0] * 40), "'none'.*impossible shape"),
    (_change("proj.weight", "dtype", "F32"), "'proj.weight'.*takes 48 bytes"),
    (_change("proj.weight", "dtype", "F8_E4M3"), "'proj.weight' has dtype 'F8_E4M3'"),
    (_change("proj.weight", "dtype", ["F16"]), "'proj.weight' has dtype"),
    (_change("proj.weight", "data_offsets", lambda o: [o[0] - 2, o[1] - 2]), "overlaps"),
    (_change("proj.weight", "data_offsets", lambda o: [o[0] + 8, o[1] + 8]), "leaves a gap"),
    (_change("proj.weight", "data_offsets", [-24, 0]), "'proj.weight'.*none negative"),
    (_change("proj.weight", "data_offsets", [1 << 70, (1 << 70) + 24]), "leaves a gap"),
    (_change("proj.weight", "data_offsets", [0, 24, 24]), "two offsets"),
    (lambda entries: {**entries, "proj.weight": None}, "'proj.weight' needs dtype"),
    (lambda entries: {**entries, "__metadata__": {"a": 1}}, "__metadata__"),
    (lambda entries: [entries], "must be a JSON object"),
    (lambda entries: b'{"a": {"x": 1, "x": 2}}', "'x' stands in it twice"),
    (
      lambda entries: json.dumps(entries)[:-1].encode() + b',"none":{}}',
      "'none' stands in it twice",
    ),
    (b"{]", "not JSON"),
    (b"\xff\xfe{}", "not JSON"),
    (b"[" * 50_000, "not JSON"),
    (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
  ],
)
def test_a_header_that_lies(tmp_path, tensors, write_safetensors, header, message):
  path = write_safetensors(tmp_path / "bad.safetensors", tensors, header=header)
  with pytest.raises(ReadError, match=rf"bad\.safetensors: .*{message}"):
    open_source(path)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "0 bytes"),
    (b"\x02", "cut short"),
    ((1 << 62).to_bytes(8, "little") + b"{}", "cut short"),
    ((101_000_000).to_bytes(8, "little") + b"{}", "cut short"),
    ((0).to_bytes(8, "little") + b"{}", "cut short"),
  ],
)
def test_a_length_that_lies(tmp_path, content, message):
  (tmp_path / "bad.safetensors").write_bytes(content)
  with pytest.raises(ReadError, match=message):
    open_source(tmp_path / "bad.safetensors")


def test_a_header_over_the_limit_is_not_read(tmp_path):
  path = tmp_path / "bad.safetensors"
  with path.open("wb") as file:
    file.write((100_000_001).to_bytes(8, "little") + b"{")
    file.truncate(101_000_000)  # sparse
  with pytest.raises(ReadError, match="100000001 bytes"):
    open_source(path)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"\0"])
def test_data_of_another_length(tmp_path, tensors, write_safetensors, change):
  path = write_safetensors(tmp_path / "bad.safetensors", tensors)
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(ReadError, match="bytes of data"):
    open_source(path)


def test_a_file_cut_after_it_was_opened(tmp_path, tensors, write_safetensors):
  path = write_safetensors(tmp_path / "a.safetensors", tensors)
  source = open_source(path)
  path.write_bytes(path.read_bytes()[:-60])
  with pytest.raises(ReadError, match="ends after"):
    [source.read(name) for name in source.tensors]


@pytest.mark.parametrize("name", ["mlp.qweight", "mlp.weight"])
def test_integer_weights_are_refused_and_integer_buffers_are_not(tmp_path, write_safetensors, name):
  path = write_safetensors(tmp_path / "a.safetensors", {name: np.ones((2, 2), np.int8)})
  with pytest.raises(ReadError, match=f"'{name}' is a weight of dtype int8.*quantized"):
    open_source(path)
  buffers = {"num_batches_tracked": np.array(3), "position_ids": np.arange(4, dtype=np.int32)}
  open_source(write_safetensors(path, buffers))


def test_damaged_bytes_never_raise_anything_else(tmp_path, tensors, write_safetensors):
  whole = write_safetensors(tmp_path / "a.safetensors", tensors).read_bytes()
  header = 8 + int.from_bytes(whole[:8], "little")
  rng, refused = random.Random(5), 0
  for case in range(300):
    damaged = bytearray(whole)
    if case % 3:
      for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(header)] = rng.randrange(256)
    else:
      del damaged[rng.randrange(len(damaged)) :]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damaged)
    try:
      source = open_source(path)
      for name in source.tensors:
        source.read(name)
    except ReadError as error:
      refused += 1
      assert "bad.safetensors" in str(error)
  assert 200 < refused < 300
