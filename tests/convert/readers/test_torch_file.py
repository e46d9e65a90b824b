"""Files of torch.save: exact bits, never executed."""

import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

from convert.readers import ReadError, open_source, torch_file

NEW_AND_OLD = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


class _Runs:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


def _save(content, path, new=True):
  torch.save(content, path, _use_new_zipfile_serialization=new)
  return path


@NEW_AND_OLD
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_reads_every_dtype_bit_for_bit(tmp_path, tensors, to_torch, same_bits, new, suffix):
  source = open_source(_save(to_torch(tensors), tmp_path / f"a{suffix}", new))
  same_bits(source, tensors)
  assert source.ignored == () and bool(source.notes) is not new


def test_views_parameters_and_tied_storages_read_as_they_look(tmp_path):
  base = torch.arange(24.0).reshape(4, 6)
  content = OrderedDict(
    t=base.t(),
    part=base[1:3, ::2],
    tied=base,
    again=base,
    p=torch.nn.Parameter(base.bfloat16()),
    wide=torch.ones(1).expand(5),
  )
  source = open_source(_save(content, tmp_path / "a.pt"))
  for name, value in content.items():
    expected = value.detach()
    assert source.read(name).flags.c_contiguous and source.read(name).flags.writeable
    np.testing.assert_array_equal(source.read(name).astype(np.float32), expected.float().numpy())


def test_the_map_is_renewed_and_reads_the_same(tmp_path, tensors, to_torch, same_bits, monkeypatch):
  monkeypatch.setattr(torch_file, "_RENEW_AFTER_BYTES", 40)
  loads = []
  load = torch_file.load_weights_only
  monkeypatch.setattr(
    torch_file, "load_weights_only", lambda *a, **k: loads.append(1) or load(*a, **k)
  )
  same_bits(open_source(_save(to_torch(tensors), tmp_path / "a.pt")), tensors)
  assert len(loads) > 2


W = torch.ones(2)


@pytest.mark.parametrize(
  "content, part, names, ignored",
  [
    ({"a": {"b": W}, "c": W}, "", ["a.b", "c"], []),
    ({"state_dict": {"x": W}, "epoch": 3}, "state_dict", ["x"], ["epoch"]),
    ({"model": {"x": W}, "optimizer": {"state": {0: {"m": W}}}}, "model", ["x"], ["optimizer"]),
    ({"generator": {"x": W}}, "generator", ["x"], []),
    ({"whatever": {"x": W, "n": 5}}, "whatever", ["x"], ["whatever.n (int)"]),
    (
      {"model": {"state_dict": {"x": W}, "n": 1}, "ema": {"x": W}},
      "model.state_dict",
      ["x"],
      ["ema", "model.n"],
    ),
    ({"x": W, "lr": 0.1, 3: [W]}, "", ["x"], ["lr (float)", "3 (list)"]),
  ],
)
def test_the_part_with_weights_is_found_and_told(tmp_path, content, part, names, ignored):
  source = open_source(_save(content, tmp_path / "a.pt"))
  assert list(source.tensors) == names
  assert sorted(source.ignored) == sorted(ignored)
  assert any(repr(part) in note for note in source.notes) is bool(part)


def test_parts_that_compete_must_be_named(tmp_path):
  content = {"generator": {"x": W}, "model": {"y": W}, "a.b": {"z": W}}
  path = _save(content, tmp_path / "a.pt")
  with pytest.raises(ReadError, match="generator, model; save the one"):
    open_source(path)
  assert list(open_source(path, "model").tensors) == ["y"]
  assert list(open_source(path, "a.b").tensors) == ["z"]
  with pytest.raises(ReadError, match="no part 'ema'.*'generator'"):
    open_source(path, "ema")


@pytest.mark.parametrize(
  "content, message",
  [
    ({}, "no tensors"),
    ({"epoch": 3}, "no tensors.*'epoch' .int"),
    (W, "Tensor, not a dict"),
    ([W], "list, not a dict"),
    ({"a.b": W, "a": {"b": W}}, "'a.b' is there twice"),
    ({"w": W.to(torch.float8_e4m3fn)}, "'w' has dtype torch.float8_e4m3fn"),
    ({"w": W.to(torch.complex64)}, "'w' has dtype torch.complex64"),
    ({"w": torch.ones(3, 3).to_sparse()}, "'w' is torch.sparse_coo"),
    ({"fc.weight": torch.ones(2, 2, dtype=torch.int8)}, "'fc.weight' is a weight of dtype int8"),
    ({"w": torch.ones(1).expand(1 << 40)}, "'w' of shape .* is larger than the file"),
    ({"w": torch.ones(2, device="meta")}, "'w' is .* on meta"),
  ],
)
def test_what_is_no_plain_dict_of_weights(tmp_path, content, message):
  with pytest.raises(ReadError, match=f"a[.]pt: .*{message}"):
    open_source(_save(content, tmp_path / "a.pt"))


@NEW_AND_OLD
def test_a_malicious_pickle_is_named_and_not_run(tmp_path, new):
  path = _save({"x": W, "y": _Runs(tmp_path / "ran")}, tmp_path / "a.bin", new)
  with pytest.raises(ReadError, match=r"a\.bin: needs (posix|nt)\.system"):
    open_source(path)
  assert not (tmp_path / "ran").exists()
  # The payload does run where a pickle is loaded without protection.
  torch.load(path, weights_only=False)
  assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bare_malicious_pickle_is_not_run(tmp_path, protocol):
  path = tmp_path / "a.pt"
  path.write_bytes(pickle.dumps({"y": _Runs(tmp_path / "ran")}, protocol))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of pickle protocols that it seldom meets
    with pytest.raises(ReadError, match=r"a\.pt: (needs (posix|nt)\.system|not a file of torch)"):
      open_source(path)
  assert not (tmp_path / "ran").exists()


def test_every_class_beyond_weights_is_named(tmp_path):
  path = _save({"model": torch.nn.Linear(2, 2), "where": PurePosixPath("x")}, tmp_path / "a.pt")
  with pytest.raises(ReadError, match="pathlib.PurePosixPath, torch.nn.modules.linear.Linear"):
    open_source(path)


@pytest.mark.filterwarnings("ignore")  # torch deprecates what the file is made with
def test_a_quantized_tensor_is_refused(tmp_path):
  path = _save({"w": torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)}, tmp_path / "a.pt")
  with pytest.raises(ReadError, match="'w' is .*qint8"):
    open_source(path)


@pytest.mark.filterwarnings("ignore")
def test_a_program_is_refused(tmp_path):
  torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
  with pytest.raises(ReadError, match="TorchScript"):
    open_source(tmp_path / "a.pt")


def _repack(path, change):
  """Writes the zip file anew, each record as `change(name, data)` returns it."""
  with zipfile.ZipFile(path) as archive:
    records = [(info.filename, archive.read(info)) for info in archive.infolist()]
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in records:
      archive.writestr(name, change(name, data))


def test_a_storage_shorter_than_its_tensor(tmp_path):
  path = _save({"a": torch.ones(64), "b": torch.zeros(512)}, tmp_path / "a.pt")
  _repack(path, lambda name, data: data[:100] if name.endswith("/data/0") else data)
  with pytest.raises(ReadError, match="needs 256 bytes"):
    open_source(path)


def test_a_compressed_record(tmp_path):
  path = _save({"a": torch.ones(64)}, tmp_path / "a.pt")
  with zipfile.ZipFile(path) as archive:
    records = [(info.filename, archive.read(info)) for info in archive.infolist()]
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, data in records:
      archive.writestr(name, data)
  with pytest.raises(ReadError, match="compressed"):
    open_source(path)
