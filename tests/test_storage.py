"""Files of object stores: an S3 server on loopback, and connections that break."""

import errno
import os
import sys
from pathlib import Path

import fsspec
import pytest

from mooer_jax import storage
from tests.object_store import BreakingFileSystem

CONTENT = bytes(range(256)) * 400  # several requests


@pytest.fixture
def breaking(monkeypatch):
  """The URL of an object whose requests raise the next of `BreakingFileSystem.errors`."""
  monkeypatch.setattr(storage, "WAITS_S", (0, 0))
  monkeypatch.setattr(BreakingFileSystem, "store", {"store/a.bin": CONTENT})
  monkeypatch.setattr(BreakingFileSystem, "errors", [])
  return "breaking://store/a.bin"


def test_files_of_s3(bucket, tmp_path):
  file, url = tmp_path / "a.bin", f"{bucket}/folder/a[1]*.bin"
  file.write_bytes(CONTENT)
  storage.upload(file, url)
  assert storage.is_file(url) and not storage.is_file(f"{bucket}/folder/b.bin")
  assert not storage.is_file(f"{bucket}/folder")
  assert storage.read_bytes(url) == CONTENT
  absent = f"{bucket}/nowhere/c.bin"
  assert storage.sizes([url, absent, str(file)]) == {url: len(CONTENT), str(file): len(CONTENT)}
  storage.download(url, tmp_path / "new" / "copy.bin")
  assert (tmp_path / "new" / "copy.bin").read_bytes() == CONTENT
  storage.delete(f"{bucket}/folder")
  storage.delete(f"{bucket}/folder")
  assert not storage.is_file(url) and storage.listing(f"{bucket}/folder") == []
  with pytest.raises(FileNotFoundError, match=r"folder/a.*bin: no such file"):
    storage.read_bytes(url)


def test_a_large_file_is_copied_in_parts(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(storage, "BLOCK_BYTES", 5 * 2**20)  # the least that S3 allows
  file, url = tmp_path / "a.bin", f"{bucket}/large.bin"
  file.write_bytes(CONTENT * 120)
  parts = []

  def note(self, method, *given, **options):
    parts.append(method)
    return call(self, method, *given, **options)

  files = fsspec.get_filesystem_class("s3")
  call = files._call_s3
  monkeypatch.setattr(files, "_call_s3", note)
  storage.upload(file, url)
  storage.download(url, tmp_path / "copy.bin")
  assert (tmp_path / "copy.bin").read_bytes() == CONTENT * 120
  assert parts.count("upload_part") == 3 and parts.count("get_object") == 4  # one asks for the size


def test_a_broken_connection_resumes_where_it_broke(breaking, capsys):
  reset = ConnectionResetError("reset by peer")
  BreakingFileSystem.errors[:] = [None, None, reset, None, reset, TimeoutError("slow")]
  assert storage.read_bytes(breaking) == CONTENT
  assert BreakingFileSystem.errors == []
  assert capsys.readouterr().err.count("reset by peer; next attempt in 0 s") == 2


def test_a_connection_that_stays_broken_is_an_error_that_names_the_url(breaking):
  BreakingFileSystem.errors[:] = [None, *[ConnectionError("down")] * 3]
  with pytest.raises(storage.RemoteError, match="a.bin: no connection after 3 attempts.*down"):
    storage.read_bytes(breaking)


def test_what_another_attempt_does_not_change_is_not_attempted_again(breaking):
  BreakingFileSystem.errors[:] = [PermissionError("no"), None]
  with pytest.raises(storage.RemoteError, match="access failed .*credentials"):
    storage.is_file(breaking)
  assert BreakingFileSystem.errors == [None]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_an_error_of_a_local_file_system_is_no_broken_connection(tmp_path, monkeypatch, code):
  """It is raised at once, with its reason, and leaves no part of the file."""
  file, attempts = tmp_path / "a.bin", []
  file.write_bytes(CONTENT)

  def fail(source, to):
    attempts.append(to)
    Path(to).write_bytes(CONTENT[:1000])
    raise OSError(code, os.strerror(code), to)

  monkeypatch.setattr(storage.shutil, "copyfile", fail)
  remedy = "free space" if code in (errno.ENOSPC, errno.EDQUOT) else "check its permissions"
  with pytest.raises(storage.RemoteError) as caught:
    storage.upload(file, f"file://{tmp_path}/mirror/a.bin")
  said = str(caught.value)
  assert os.strerror(code) in said and f"{remedy}, " in said.replace(" and its mount", "")
  assert f"{tmp_path}/mirror/a.bin: the local file system failed" in said
  assert "connection" not in said and "credentials" not in said
  assert len(attempts) == 1 and not list((tmp_path / "mirror").iterdir())


def test_a_full_disk_in_a_download_is_no_broken_connection(breaking, tmp_path, capsys):
  (tmp_path / "copy.bin").symlink_to("/dev/full")
  with pytest.raises(
    storage.RemoteError, match="a.bin: the local file .*No space .*copy.bin.*free"
  ):
    storage.download(breaking, tmp_path / "copy.bin")
  assert "next attempt" not in capsys.readouterr().err


def test_a_file_that_ends_early_is_a_broken_connection(breaking, monkeypatch):
  """Else a tar would look truncated, and the rest of it would be skipped."""
  size = BreakingFileSystem.info

  def longer(self, path, **options):
    return size(self, path) | {"size": len(CONTENT) + 1}

  monkeypatch.setattr(BreakingFileSystem, "info", longer)
  with pytest.raises(storage.RemoteError, match="ends at byte 102400 of 102401"):
    storage.read_bytes(breaking)


def test_schemes_in_capitals_are_those_in_small_letters(bucket, tmp_path):
  file = tmp_path / "a.bin"
  file.write_bytes(CONTENT)
  for url in (f"{bucket}/capitals", f"file://{tmp_path}/capitals"):
    scheme, _, place = url.partition("://")
    shouted = f"{scheme.upper()}://{place}"
    storage.upload(file, f"{shouted}/x/a.bin")
    assert storage.read_bytes(f"{url}/x/a.bin") == storage.read_bytes(f"{shouted}/x/a.bin")
    assert storage.stats([f"{shouted}/x/a.bin"]).keys() == {f"{shouted}/x/a.bin"}
    assert storage.walk(shouted).keys() == {f"{shouted}/x/a.bin"}
    assert storage.file_names(shouted) == ["x"] and storage.is_folder(shouted)
    storage.delete(shouted)
    assert not storage.is_file(f"{url}/x/a.bin")
  with pytest.raises(ValueError, match="three slashes"):
    storage.read_bytes("FILE://tmp/data.list")


@pytest.mark.parametrize(
  "folder, name, joined",
  [
    ("s3://b/x", "./a.tar", "s3://b/x/a.tar"),
    ("s3://b/x", "../a.tar", "s3://b/a.tar"),
    ("s3://b/x", "gs://c/a.tar", "gs://c/a.tar"),
    ("s3://b/x", "/a.tar", "/a.tar"),
    ("x", "./a.tar", "x/a.tar"),
    ("x", "s3://b/a.tar", "s3://b/a.tar"),
  ],
)
def test_join(folder, name, joined):
  assert storage.join(folder, name) == joined


@pytest.mark.parametrize(
  "url, message",
  [
    ("https://host/data.list", "https://host/data.list: is a URL of the web"),
    ("nosuch://b/data.list", "nosuch://b/data.list: .*use s3:// or gs://"),
    ("file://tmp/data.list", "file://tmp/data.list: .*three slashes: file:///FOLDER"),
  ],
)
def test_a_url_that_cannot_be_read_is_refused(url, message):
  with pytest.raises(ValueError, match=message):
    storage.read_bytes(url)


def outputs_to(path):
  """Calls of the functions that write to a path, by name."""
  import numpy as np

  from convert.core.folders import check_target, complete_folder
  from mooer_jax.checkpoint import start_save
  from mooer_jax.data.feature_cache import EncodedCache
  from mooer_jax.data.pack import pack
  from mooer_jax.data.prepare import prepare
  from mooer_jax.data.stats import Stats, draw_lengths
  from mooer_jax.evaluation.report import write_report
  from mooer_jax.evaluation.text_files import write_text
  from mooer_jax.projects.salmonn.suite import run_suite
  from mooer_jax.run.process import check_profile

  saved = {"params": {"w": np.ones(1)}, "config_json": {}, "tokenizer": ".", "generation": {}}
  return {
    "pack": lambda: pack("wav.scp", "text", path),
    "prepare": lambda: prepare("data.list", path),
    "draw_lengths": lambda: draw_lengths(Stats(), [], path, step_s=0.06),
    "cache": lambda: EncodedCache(path, {"beats": 4}),
    "save": lambda: start_save(path, **saved),
    "write_report": lambda: write_report(path, None, name="test"),
    "write_text": lambda: write_text(path, {"a": "b"}),
    "suite": lambda: run_suite(".", path, lambda _: {}),
    "check_profile": lambda: check_profile(path),
    "check_target": lambda: check_target(Path(path), overwrite=True),
    "complete_folder": lambda: complete_folder(Path(path)).__enter__(),
  }


@pytest.mark.parametrize(
  "url, remedy", [("file:///x", "write the local path without"), ("s3://b/x", "name a local path")]
)
def test_a_url_that_results_cannot_be_written_to_is_refused(url, remedy, tmp_path, monkeypatch):
  """`Path` makes a relative path of it, and the results would be in a folder of that name."""
  monkeypatch.chdir(tmp_path)
  for name, write in outputs_to(url).items():
    with pytest.raises(ValueError, match=f"{url.replace('//', '/*')}: is a URL; {remedy}"):
      write()
    assert not list(tmp_path.iterdir()), name


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize(
  "read", [storage.read_bytes, storage.stat_file, lambda path: storage.read_range(path, 0, 1)]
)
def test_only_regular_files_are_read(tmp_path, kind, read):
  """A pipe would block until something writes to it."""
  path = {"pipe": tmp_path / "pipe", "folder": tmp_path, "device": "/dev/zero"}[kind]
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(OSError, match=f"{path}: is not a regular file, but a {kind}"):
    read(str(path))


def test_the_files_below_a_folder(bucket, tmp_path):
  for name in ("b/c/d.txt", "b/a.txt", "a[1].txt", "b-c.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
    storage.upload(tmp_path / name, f"{bucket}/walked/{name}")
  os.mkfifo(tmp_path / "pipe")
  found = storage.walk(f"{bucket}/walked/")
  here = storage.walk(tmp_path)
  assert [*here] == [f"{tmp_path}/{n}" for n in ("a[1].txt", "b/a.txt", "b/c/d.txt", "b-c.txt")]
  assert [name.replace(f"{bucket}/walked", str(tmp_path)) for name in found] == [*here]
  assert [of.size for of in found.values()] == [of.size for of in here.values()]
  assert storage.stats(found) == found and all(of.version for of in found.values())
  assert storage.walk(f"{bucket}/nowhere") == storage.walk(tmp_path / "nowhere") == {}
  assert {*storage.file_names(f"{bucket}/walked/b")} == {"c", "a.txt"}
  assert storage.is_folder(f"{bucket}/walked") and not storage.is_folder(f"{bucket}/walk")
  assert storage.read_range(f"{bucket}/walked/b/a.txt", 2, 4) == b"a."


@pytest.mark.parametrize("package", ["gcsfs", "fsspec"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ValueError, match=r"pip install 'mooer-jax\[remote\]'"):
    storage.read_bytes("gs://b/a")
