"""Safetensors: exact bits, and a header that lies is found out."""

import json
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
  "header",
  [
    _change("proj.weight", "shape", [4, 4]),
    _change("proj.weight", "shape", [4, -3]),
    _change("proj.weight", "shape", [True, 12]),
    _change("proj.weight", "shape", [4.0, 3]),
    _change("none", "shape", [0, 1 << 61, 1 << 61]),
    _change("none", "shape", [0] * 40),
    _change("proj.weight", "dtype", "F32"),
    _change("proj.weight", "dtype", ["F16"]),
    _change("proj.weight", "data_offsets", lambda o: [o[0] - 2, o[1] - 2]),
    _change("proj.weight", "data_offsets", lambda o: [o[0] + 8, o[1] + 8]),
    _change("proj.weight", "data_offsets", [-24, 0]),
    _change("proj.weight", "data_offsets", [1 << 63, (1 << 63) + 24]),
    _change("proj.weight", "data_offsets", [1 << 70, (1 << 70) + 24]),
    _change("proj.weight", "data_offsets", [0, 24, 24]),
    lambda entries: {**entries, "proj.weight": None},
    lambda entries: {**entries, "__metadata__": {"a": 1}},
    lambda entries: [entries],
    lambda entries: json.dumps(entries)[:-1].encode() + b',"none":{}}',
    lambda entries: json.dumps({**entries, "again": entries["proj.weight"]}).encode(),
    b"{]",
    b"\xff\xfe{}",
    b"[" * 50_000,
    b'{"a":' + b"9" * 5000 + b"}",
  ],
)
def test_a_header_that_lies(tmp_path, tensors, write_safetensors, header):
  path = write_safetensors(tmp_path / "bad.safetensors", tensors, header=header)
  message = r"bad\.safetensors: (not a safetensors file, or cut short|tensor 'none'.* impossible)"
  with pytest.raises(ReadError, match=message):
    open_source(path)


def test_a_dtype_without_counterpart_is_named(tmp_path, write_safetensors):
  header = {"a": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}
  path = write_safetensors(tmp_path / "a.safetensors", {}, header=header, data=b"abc")
  with pytest.raises(ReadError, match=r"a\.safetensors: tensor 'a' has dtype F8_E4M3; supported"):
    open_source(path)


@pytest.mark.parametrize("length", [1 << 62, 101_000_000, 0])
def test_a_length_that_lies(tmp_path, length):
  (tmp_path / "bad.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
  with pytest.raises(ReadError, match="cut short"):
    open_source(tmp_path / "bad.safetensors")


def test_a_header_over_the_limit_is_not_read(tmp_path):
  path = tmp_path / "bad.safetensors"
  with path.open("wb") as file:
    file.write((100_000_001).to_bytes(8, "little") + b"{")
    file.truncate(101_000_000)  # sparse
  with pytest.raises(ReadError, match="header too large"):
    open_source(path)


def test_data_behind_the_last_tensor(tmp_path, tensors, write_safetensors):
  path = write_safetensors(tmp_path / "bad.safetensors", tensors)
  path.write_bytes(path.read_bytes() + b"\0")
  with pytest.raises(ReadError, match="not fully covered"):
    open_source(path)


@pytest.mark.parametrize("size", [9, 4 << 20])
def test_a_file_cut_after_it_was_opened(tmp_path, write_safetensors, size):
  path = write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(size, np.float32)})
  source = open_source(path)
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(ReadError, match="cut short within tensor 'a'"):
    source.read("a")


def test_large_tensors_are_mapped_and_writing_to_them_leaves_the_file(tmp_path, write_safetensors):
  array = np.arange(3 << 20, dtype=np.float32)
  path = write_safetensors(tmp_path / "a.safetensors", {"a": array})
  found = open_source(path).read("a")
  found += 1
  np.testing.assert_array_equal(open_source(path).read("a"), array)


def test_integer_buffers_are_read(tmp_path, write_safetensors):
  buffers = {"num_batches_tracked": np.array(3), "position_ids": np.arange(4, dtype=np.int32)}
  assert len(open_source(write_safetensors(tmp_path / "a.safetensors", buffers)).tensors) == 2
