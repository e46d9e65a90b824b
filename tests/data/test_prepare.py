"""Preparation of data sets: complete, resumable, and readable by TFDS alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from mooer_jax import cli
from mooer_jax.data import prepare as module
from mooer_jax.data.prepare import PrepareReport, prepare
from mooer_jax.data.readers import read, shard_names
from mooer_jax.data.readers.entries import RawUtterance
from tests.data.test_readers import FORMATS


def entries(source):
  """The utterances of a source, without the names of their shards."""
  found = [entry.load() for name in shard_names(str(source)) for entry in read(name)]
  return [{**vars(entry), "shard": ""} for entry in found]


def run(source, out, **options):
  return prepare(source, out, **{"processes": 1, "progress": False, **options})


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_prepared_byte_for_byte(kind, tmp_path):
  (tmp_path / "source").mkdir()
  source = FORMATS[kind](tmp_path / "source")
  report = run(source, tmp_path / "out")
  assert report.utterances == 8 and not report.left_out
  assert entries(tmp_path / "out") == entries(source)


def test_any_content_of_an_utterance_returns(tmp_path, shards, monkeypatch):
  odd = RawUtterance(
    "k\ud800", "s", "wav", b"\0a\0", b"\xff\0", "asr", "Q?", (b"\0", b""),
    {"x": float("inf"), "\ud800": [{"y": None}]},
  )  # fmt: skip
  shards.add(1)
  monkeypatch.setattr(module, "read", lambda name: iter([odd]))
  run(shards.list, tmp_path / "out")
  assert entries(tmp_path / "out") == [{**vars(odd), "shard": ""}]


def test_tfds_reads_the_result_without_this_library_and_without_tensorflow(
  tmp_path, shards, plain_env
):
  shards.add(3)
  code = f"""
import builtins, json, sys
found, refused = builtins.__import__, {{"tensorflow", "importlib_resources"}}
def refuse(name, *args, **kwargs):
  if name.split(".")[0] in refused:
    raise ModuleNotFoundError(name, name=name)
  return found(name, *args, **kwargs)
builtins.__import__ = refuse
from mooer_jax.data.prepare import prepare
prepare({str(shards.list)!r}, {str(tmp_path / "out")!r}, processes=1, progress=False)
for name in [name for name in sys.modules if name.split(".")[0] == "mooer_jax"]:
  del sys.modules[name]
refused.add("mooer_jax")
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(tmp_path / "out")!r}).as_data_source(split="train")
assert "tensorflow" not in sys.modules and not any(n.startswith("mooer_jax") for n in sys.modules)
print(json.dumps([len(source), source[2]["key"].decode(), source[2]["audio"][:4].decode()]))
"""
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, env=plain_env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1]) == [3, "utt0002", "RIFF"]


def test_what_is_left_out_is_counted_and_listed(tmp_path, shards, wav):
  shards.add(2)
  lone = [("lone.wav", wav(0.3)), ("twice.txt", b"A"), ("twice.wav", wav(0.3))] * 2
  path = shards.add_members([*lone, ("silent.txt", b"B\n")])
  shards.add(2).write_bytes(b"no tar")
  report = run(shards.list, tmp_path / "out")
  causes = {"no transcript": 1, "members apart": 1, "duplicate key": 1, "no audio": 1}
  assert report == PrepareReport(3, 3, Counter({**causes, "bad shard": 1}))
  lines = (tmp_path / "out" / "left_out.tsv").read_text().splitlines()
  assert len(lines) == report.left_out.total()
  assert lines[0].split("\t")[:3] == ["no transcript", "lone", str(path)]


@pytest.mark.parametrize("files, lengths", [(None, [2, 3, 1, 1]), (3, [2, 3, 2]), (1, [7])])
def test_shards_share_files(tmp_path, shards, files, lengths):
  for count in (2, 3, 1, 1):
    shards.add(count)
  assert run(shards.list, tmp_path / "out", files=files).files == len(lengths)
  [split] = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["splits"]
  assert list(map(int, split["shardLengths"])) == lengths
  assert [entry["key"] for entry in entries(tmp_path / "out")] == shards.keys


def test_several_processes_write_the_same(tmp_path, shards):
  for count in (2, 0, 3):
    shards.add(count)
  run(shards.list, tmp_path / "out", processes=2)
  assert entries(tmp_path / "out") == entries(shards.list)


def test_an_interrupted_preparation_keeps_complete_files(tmp_path, shards, monkeypatch):
  for count in (2, 3, 2):
    shards.add(count)
  whole = module.read
  monkeypatch.setattr(module, "read", lambda name: whole(name) if "2.tar" not in name else 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run(shards.list, tmp_path / "out")
  assert not (tmp_path / "out").exists()
  partial = tmp_path / ".out.partial"
  assert not list(partial.glob(".*.tmp"))
  kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("speech-*")}
  assert len(kept) == 2
  (partial / ".speech-train.tmp").write_bytes(b"of a process that was killed")
  monkeypatch.setattr(module, "read", lambda name: whole(name) if "2.tar" in name else 1 / 0)
  assert run(shards.list, tmp_path / "out").utterances == 7
  assert entries(tmp_path / "out") == entries(shards.list)
  assert not partial.exists()
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert len(names) == 5 and {*kept, "dataset_info.json", "features.json"} < names
  assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept


def test_a_killed_command_resumes(tmp_path, shards, plain_env):
  for _ in range(40):
    shards.add(3)
  command = [sys.executable, "-m", "mooer_jax.cli", "data", "prepare", shards.list]
  command += ["--out", tmp_path / "out", "--processes", "1"]
  process = subprocess.Popen(command, env=plain_env, stderr=subprocess.DEVNULL)
  reports = tmp_path / ".out.partial" / ".progress"
  while not list(reports.glob("speech-*.json")) and process.poll() is None:
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  if not (tmp_path / "out").exists():  # it may have been quicker
    assert cli.main(list(map(str, command[3:]))) == 0
  assert entries(tmp_path / "out") == entries(shards.list)


def test_another_source_or_number_of_files_does_not_mix(tmp_path, shards, monkeypatch):
  shards.add(2)
  shards.add(2)
  with monkeypatch.context() as patched:
    patched.setattr(module, "read", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      run(shards.list, tmp_path / "out")
  with pytest.raises(ValueError, match="has 2 files, this one 1; remove .*/.out.partial to start"):
    run(shards.list, tmp_path / "out", files=1)
  [path, _] = sorted(shards.folder.glob("*.tar"))
  os.utime(path, ns=(0, 0))
  with pytest.raises(ValueError, match="the data have changed since"):
    run(shards.list, tmp_path / "out")


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, shards, plain_env):
  shards.add(4)
  code = f"""
import resource, signal
from mooer_jax.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
raise SystemExit(main(["data", "prepare", {str(shards.list)!r}, "--out", {str(tmp_path / "out")!r},
                       "--processes", "1"]))
"""
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, env=plain_env, capture_output=True, text=True)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert "speech-train.array_record-00000-of-00001: " in done.stderr
  assert "File too large" in done.stderr
  assert run(shards.list, tmp_path / "out").utterances == 4


@pytest.mark.parametrize(
  "options, error, message",
  [
    ({"out": "taken"}, FileExistsError, "taken: exists already"),
    ({"files": 0}, ValueError, "files=0: must be at least 1"),
    ({"files": 2}, ValueError, "files=2: must be at most 1, the number of shards"),
    ({"processes": 0}, ValueError, "processes=0: must be at least 1"),
    ({"beam_options": []}, ValueError, "processes=1 has no effect on Apache Beam"),
    ({"source": "nowhere"}, FileNotFoundError, "nowhere: no such list"),
  ],
)
def test_wrong_arguments_are_refused(tmp_path, shards, options, error, message):
  shards.add(1)
  (tmp_path / "taken").mkdir()
  (tmp_path / "taken" / "file").touch()
  paths = {"source": shards.list, "out": tmp_path / options.get("out", "out")}
  with pytest.raises(error, match=message):
    run(**{**paths, **options, "out": paths["out"]})
  assert not (tmp_path / "out").exists()


def test_a_source_without_a_usable_utterance_is_refused(tmp_path, shards):
  shards.add_members([("a.wav", b"")])
  with pytest.raises(ValueError, match="nothing to prepare; 1 utterances left out"):
    run(shards.list, tmp_path / "out")
  shards.add(1)
  assert run(shards.list, tmp_path / "out").utterances == 1


def test_only_one_process_prepares_a_folder(tmp_path, shards):
  shards.add(1)
  with (
    module.lock_folder(tmp_path / ".out.partial"),
    pytest.raises(ValueError, match="is in use by process"),
  ):
    run(shards.list, tmp_path / "out")


def test_without_beam_its_options_are_an_error(tmp_path, shards, monkeypatch):
  shards.add(1)
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(ValueError, match=r"install mooer-jax\[beam\] into an environment of its own"):
    run(shards.list, tmp_path / "out", processes=None, beam_options=[])


def test_the_command_prints_the_counts(tmp_path, shards, capsys):
  shards.add(3)
  shards.add_members([("a.wav", b"")])
  out = tmp_path / "out"
  assert cli.main(["data", "prepare", str(shards.list), f"--out={out}", "--processes=1"]) == 0
  said = capsys.readouterr().out
  assert f"3 utterances in 2 files: {out}" in said
  assert f"1 left out (no transcript: 1); see {out / 'left_out.tsv'}" in said
  assert cli.main(["data", "prepare", str(shards.list), f"--out={out}"]) == 2
  assert "exists already; remove it or choose another --out" in capsys.readouterr().err
