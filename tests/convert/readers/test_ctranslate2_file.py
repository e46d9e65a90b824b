"""CTranslate2's model.bin: tensors, refusals, and the real whisper-tiny.en."""

import struct

import ml_dtypes
import numpy as np
import pytest

from convert.readers import ReadError, open_source
from tests.convert.ctranslate2_files import ctranslate2_bytes, find_whisper

TENSORS = {
  "encoder/conv1/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
  "encoder/layer_norm/gamma": np.array([1.5, -2], np.float32),
  "encoder/other": np.array([1.5, -2], ml_dtypes.bfloat16),
  "encoder/num_heads": np.int16(6).reshape(()),
  "encoder/none": np.zeros((0, 4), np.float32),
  "decoder/flags": np.array([1, 0], np.int8),
  "decoder/ids": np.array([1, 70000], np.int32),
}


def write(folder, *args, **kwargs):
  path = folder / "model.bin"
  path.write_bytes(ctranslate2_bytes(*args, **kwargs))
  return path


def test_every_tensor_comes_back_bit_for_bit(tmp_path, same_bits):
  path = write(tmp_path, TENSORS, aliases={"decoder/head": "encoder/other"})
  for where in (path, tmp_path):
    source = open_source(where)
    same_bits(source, TENSORS)
    assert source.ignored == ("decoder/head (the same as encoder/other)",)
    assert source.notes == ("model.bin: WhisperSpec, revision 3",)


def test_torch_files_called_bin_are_still_read(tmp_path):
  import torch

  for zipped in (True, False):
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    assert set(open_source(path).tensors) == {"a"}


@pytest.mark.parametrize(
  "change, message",
  [
    ({"version": 5}, "CTranslate2 format 5, supported is 6"),
    ({"aliases": {"a": "b"}}, "'a' cannot be an alias of 'b'"),
    ({"aliases": {"encoder/other": "encoder/other"}}, "cannot be an alias"),
    ({"extra": b"x"}, "1 bytes after its end"),
    ({"count": 6}, "is not a name|after its end|cut short|an alias"),
    ({"count": 8}, "is not a name|cut short|unknown type"),
    ({"count": 1 << 31}, "is not a name|cut short|unknown type"),
    ({"bytes_of": {"encoder/other": 6}}, "'encoder/other' of shape .2. .* takes 4 bytes, not 6"),
    ({"shape_of": {"encoder/other": (3,)}}, "takes 6 bytes, not 4"),
    ({"shape_of": {"encoder/other": (1 << 31,) * 8}}, "impossible shape"),
    ({"shape_of": {"encoder/other": (1,) * 9}}, "9 dimensions, more than 8"),
    ({"type_of": {"encoder/other": 6}}, "'encoder/other' has the unknown type 6"),
  ],
)
def test_what_does_not_add_up_is_named(tmp_path, change, message):
  with pytest.raises(ReadError, match=rf"model\.bin: .*({message})"):
    open_source(write(tmp_path, TENSORS, **change))


def test_names_that_are_none_or_there_twice(tmp_path):
  whole = ctranslate2_bytes(TENSORS)
  for bad in (b"encoder/oth\xffr\0", b"encoder/other!", b"encoder/o\ther\0"):
    (tmp_path / "model.bin").write_bytes(whole.replace(b"encoder/other\0", bad))
    with pytest.raises(ReadError, match="not UTF-8|is not a name"):
      open_source(tmp_path)
  twice = ctranslate2_bytes({"a/b": np.ones(2, np.float32), "a/c": np.ones(2, np.float32)})
  (tmp_path / "model.bin").write_bytes(twice.replace(b"a/c\0", b"a/b\0"))
  with pytest.raises(ReadError, match="'a/b' is there twice"):
    open_source(tmp_path)


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_quantized_files_are_refused_by_name(tmp_path, dtype):
  tensors = {"encoder/layer_0/ffn/linear_0/weight": np.ones((4, 4), dtype)}
  with pytest.raises(ReadError, match="linear_0/weight' .* quantized.* float16"):
    open_source(write(tmp_path, tensors))


def test_a_file_that_ends_within_its_data(tmp_path):
  whole = ctranslate2_bytes({"a/weight": np.ones(9, np.float32)})
  (tmp_path / "model.bin").write_bytes(whole[:-8])
  with pytest.raises(ReadError, match="'a/weight' should end at byte .* copy it again"):
    open_source(tmp_path)
  (tmp_path / "model.bin").write_bytes(struct.pack("<I", 6))
  with pytest.raises(ReadError, match="cut short at byte 4"):
    open_source(tmp_path)


@pytest.mark.slow
def test_the_real_tiny_en():
  source = open_source(find_whisper())
  assert len(source.tensors) == 148
  assert source.ignored == ("decoder/projection/weight (the same as decoder/embeddings/weight)",)
  assert source.read("encoder/num_heads") == 6
  for name, tensor in source.tensors.items():
    assert source.read(name).shape == tensor.shape
  # The first row of positions: sines of 0, cosines of 0.
  np.testing.assert_array_equal(
    source.read("encoder/position_encodings/encodings")[0], [0] * 192 + [1] * 192
  )
