"""Second label files: each mode, keys without a line, and runs that resume."""

import collections
import contextlib
import dataclasses
import json
import os
import pickle
import re
import socket
import string
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mooer_jax import cli
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.data.dataset import train_batches
from mooer_jax.data.labels import MODES, LabelFile, Labels
from mooer_jax.data.readers.entries import CAUSES, RawUtterance, SkippedUtterance
from mooer_jax.run import decoding
from mooer_jax.run.config import EvalConfig
from mooer_jax.text.tokenizer import Tokenizer

PROMPTS = (("asr", "WRITE"), ("ast", "TRANSLATE"), ("asr_ast_mtl", "WRITE AND TRANSLATE"))
MODEL = SpeechLLMConfig(chat_template="bare", prompts=PROMPTS)


@pytest.fixture(scope="module")
def letters():
  return Tokenizer.from_characters(string.ascii_uppercase + string.digits + " \n")


@pytest.fixture
def write(tmp_path):
  def write(content):
    file = tmp_path / "labels"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)

  return write


def raw(key, text="SAID", **changes):
  return RawUtterance(key, "a.tar", "wav", b"", text.encode(), **changes)


@pytest.mark.parametrize(
  ("mode", "text"),
  [("replace", "GESAGT"), ("concat", "SAID|GESAGT"), ("concat_r", "GESAGT|SAID")],
)
def test_a_label_replaces_the_transcript_or_joins_it(write, mode, text):
  joined = Labels(LabelFile(write("a GESAGT\nb X\n")), mode, "|").join(raw("a", task="ast"), 0.0)
  assert (joined.transcript(), joined.task) == (text, "ast")


def test_instruction_gives_each_task_its_text(write):
  labels = Labels(LabelFile(write("a GESAGT\n")), "instruction", "<|im_end|>")
  made = [labels.join(raw("a"), uniform) for uniform in (0.0, 0.4, 0.99)]
  assert [(x.task, x.transcript()) for x in made] == [
    ("asr", "SAID"),
    ("ast", "GESAGT"),
    ("asr_ast_mtl", "SAID<|im_end|>GESAGT"),
  ]
  skip = labels.join(raw("a", task="qa"), 0.0)
  assert skip.cause == "bad task" and "'qa', but data.labels_mode" in skip.detail


def test_lines_are_found_whatever_their_white_space(write):
  file = LabelFile(
    write("\ufeff./a  A B \r\n\n\tb\tB\u3000C\r\nc\nd/e ä\n   \nf last")  # Kaldi's and Windows'
  )
  assert [file.find(key) for key in ("a", "./b", "c", "d/e", "f", "", "g")] == [
    [(1, b"A B \r\n")], [(3, "B\u3000C\r\n".encode())], [(4, b"")], [(5, "ä\n".encode())],
    [(7, b"last")], [(2, b""), (6, b"")], [],
  ]  # fmt: skip
  joined = Labels(file).join(raw("a"), 0.0)
  assert joined.transcript() == "A B"


@pytest.mark.parametrize(
  ("content", "mode", "cause", "words"),
  [
    (b"b X\n", "replace", "no label", "labels lacks the key"),
    (b"a X\nb\na X\n", "concat", "no label", "has the key on the lines 1 and 3; remove all but"),
    (b"b\na\n", "replace", "empty transcript", "its label is .*labels:2"),
    (b"a \xff\n", "replace", "transcript not UTF-8", "0xff.*; its label is .*labels:1"),
  ],
)
def test_a_key_without_one_usable_line_is_skipped(write, content, mode, cause, words):
  skip = Labels(LabelFile(write(content)), mode).join(raw("a"), 0.0)
  assert isinstance(skip, SkippedUtterance) and skip.cause == cause and cause in CAUSES
  assert re.search(words, skip.detail), skip.detail


@pytest.mark.parametrize("mode", MODES)
def test_the_transcript_counts_only_where_it_is_used(write, mode):
  labels = Labels(LabelFile(write("a X\n")), mode)
  for text, cause in ((b" ", "empty transcript"), (b"\xff", "transcript not UTF-8")):
    joined = labels.join(dataclasses.replace(raw("a"), text=text), 0.0)
    if mode == "replace":
      assert joined.transcript() == "X"
    else:
      assert joined.cause == cause


def test_keys_with_the_same_hash_are_told_apart(write, monkeypatch):
  monkeypatch.setattr("mooer_jax.data.labels._hash", lambda key: len(key))
  file = LabelFile(write("".join(f"{key} {key.upper()}\n" for key in ("a", "bb", "c", "dd"))))
  assert [file.find(key) for key in ("a", "c", "dd", "e")] == [
    [(1, b"A\n")], [(3, b"C\n")], [(4, b"DD\n")], []
  ]  # fmt: skip


def test_many_lines_are_all_found_and_the_index_is_shared_and_removed(write):
  keys = [f"k{number}" for number in np.random.default_rng(0).permutation(5000)]
  file = LabelFile(write("".join(f"{key} {key[1:]}\n" for key in keys)))
  other = pickle.loads(pickle.dumps(file))
  for found in (file, other):
    assert all(found.find(key) == [(n, f"{key[1:]}\n".encode())] for n, key in enumerate(keys, 1))
  folder = Path(file._folder)
  assert folder.parent == Path(tempfile.gettempdir()) and other._folder == str(folder)
  size = sum(path.stat().st_size for path in folder.iterdir())
  assert size < 20 * (len(keys) + 1) + 500
  del other, found
  assert folder.exists()
  del file
  assert not folder.exists()


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"", "is empty"),
    (b'{"key": "a"}\n', "is JSON; a label file has `KEY text` lines"),
    (b"\x1f\x8b\x08\x00abc", "is compressed"),
  ],
)
def test_a_file_of_another_kind_is_refused(write, content, words):
  with pytest.raises(ValueError, match=words):
    LabelFile(write(content))


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="gone: no such label file"):
    LabelFile(tmp_path / "gone")
  with pytest.raises(OSError, match="is not a regular file, but a folder"):
    LabelFile(tmp_path)
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(OSError, match="pipe: is not a regular file, but a pipe"):
    LabelFile(tmp_path / "pipe")


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"labels_mode": "concat"}, "data.labels_mode='concat' has no effect without data.labels"),
    ({"labels_separator": "|"}, r"data.labels_separator='\|' has no effect without data.labels"),
    ({"labels": "a", "labels_mode": "join"}, "labels_mode='join': choose one of replace, concat"),
    ({"labels": "a", "labels_separator": "|"}, "no effect with data.labels_mode='replace'"),
    ({"labels": "a", "labels_mode": "instruction"}, "set data.task=''"),
    (
      {"labels": "a", "labels_mode": "instruction", "task": "", "task_weights": {"asr": 2.0}},
      "data.task_weights=.* has no effect with",
    ),
  ],
)
def test_options_without_effect_are_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    DataConfig(shards="a", **changes)


@pytest.mark.parametrize(
  ("prompts", "words"),
  [
    (PROMPTS[:2], "needs a prompt for the task 'asr_ast_mtl'; set model.prompts.asr_ast_mtl"),
    ((*PROMPTS[:2], ("asr_ast_mtl", "TRANSLATE")), "'ast' and 'asr_ast_mtl' have the same prompt"),
  ],
)
def test_instruction_needs_prompts_that_differ(shards, write, letters, prompts, words):
  shards.add(4)
  model = MODEL.replace(prompts=prompts)
  config = shards.config(labels=write("a A"), labels_mode="instruction", task="")
  with pytest.raises(ValueError, match=words):
    train_batches(config, letters, model)


def test_training_samples_the_tasks_and_resumes_exactly(shards, write, letters):
  for _ in range(2):
    shards.add(10)
  lines = [f"{key} L{key[3:]}\n" for key in shards.keys if key != "utt0003"]
  config = shards.config(
    labels=write("".join(lines)), labels_mode="instruction", task="", answer_buckets=(8, 16)
  )
  dataset = train_batches(config, letters, MODEL)
  with contextlib.closing(iter(dataset)) as batches:
    states, hosts = [], []
    for _ in range(60):
      states.append(json.dumps(batches.get_state()))
      hosts.append(next(batches))
  counts = collections.Counter(task for host in hosts for task in host.tasks)
  assert set(counts) == {"asr", "ast", "asr_ast_mtl"} and min(counts.values()) > 50
  by_key = collections.defaultdict(set)
  for host in hosts:
    for row, (key, task, text) in enumerate(zip(host.keys, host.tasks, host.texts, strict=True)):
      number = int(key[3:])
      texts = {"asr": f"N{number}", "ast": f"L{number:04d}"}
      assert text == texts.get(task, f"N{number}\nL{number:04d}")
      prompt_S = host.batch.suffix_BS[row]
      assert letters.decode(prompt_S[prompt_S >= 0]) == dict(PROMPTS)[task]
      by_key[key].add(task)
  assert set(by_key) == {*shards.keys} - {"utt0003"} and max(map(len, by_key.values())) == 3
  skipped = {(s.cause, s.key) for host in hosts for s in host.skipped}
  assert skipped == {("no label", "utt0003")}
  for at in (0, 7, 40):
    with contextlib.closing(iter(dataset)) as again:
      again.set_state(json.loads(states[at]))
      assert [next(again).texts for _ in range(3)] == [host.texts for host in hosts[at : at + 3]]
  for other in (
    dataclasses.replace(config, labels="", labels_mode="replace"),
    dataclasses.replace(config, labels_mode="concat"),
    dataclasses.replace(config, labels_separator="|"),
  ):
    with pytest.raises(ValueError, match=r'data.labels was "labels \(.* instruction, .* and is'):
      iter(train_batches(other, letters, MODEL)).set_state(json.loads(states[3]))


def test_workers_share_the_file(shards, write, letters):
  for _ in range(2):
    shards.add(6)
  config = shards.config(
    labels=write("".join(f"{key} L{key[3:]}\n" for key in shards.keys)), workers=2
  )
  with contextlib.closing(iter(train_batches(config, letters, MODEL))) as batches:
    hosts = [next(batches) for _ in range(4)]
  pairs = [pair for host in hosts for pair in zip(host.keys, host.texts, strict=True)]
  assert pairs and all(text == f"L{key[3:]}" for key, text in pairs)


def test_what_the_filter_leaves_out_needs_no_label(shards, write, letters, wav):
  shards.add_members(
    member
    for key in "ab"
    for member in (
      (f"{key}.json", json.dumps({"text": "N", "language": key}).encode()),
      (f"{key}.wav", wav(0.5)),
    )
  )
  config = shards.config(labels=write("a X\n"), filter="language == 'a'", batch_size=1)
  with contextlib.closing(iter(train_batches(config, letters, MODEL))) as batches:
    hosts = [next(batches) for _ in range(3)]
  assert [(host.texts, host.skipped) for host in hosts] == [(("X",), ())] * 3


def test_evaluation_takes_no_labels_of_the_training(shards, write):
  shards.add(4)
  data = shards.config(labels=write("a X"), labels_mode="concat", labels_separator="|")
  made = decoding.eval_data(SimpleNamespace(data=data), EvalConfig(str(shards.list)), MODEL)
  assert (made.labels, made.labels_mode) == ("", "replace")


def test_data_stats_count_utterances_without_a_label(shards, write, capsys):
  shards.add(4)
  labels = write("utt0000 A\nutt0001\nutt0002 A\nutt0002 A\n")
  arguments = ["data", "stats", str(shards.list), "--processes", "1"]
  assert cli.main([*arguments, "--labels", labels, "--labels-mode", "concat"]) == 0
  out = capsys.readouterr().out
  assert "1 utterances" in out and "3 utterances (no label 2, empty transcript 1)" in out
  assert cli.main([*arguments, "--labels-mode", "concat"]) == 2
  assert "no effect without data.labels" in capsys.readouterr().err
  assert cli.main([*arguments, "--labels", "gone"]) == 2
  assert "gone: no such label file" in capsys.readouterr().err


def test_remains_of_killed_processes_are_removed_on_their_own_host_only(
  tmp_path, write, monkeypatch
):
  """Hosts of a cluster may share TMPDIR, but not their process ids."""
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  ended = subprocess.Popen(["true"])
  ended.wait()
  here = socket.gethostname()
  folders = [
    tmp_path / f"mooer-jax-labels-{pid}@{host}@x"
    for pid in (ended.pid, os.getpid())
    for host in (here, f"{here}-2")
  ]
  for folder in folders:
    folder.mkdir()
  labels = LabelFile(write("a B\n"))
  assert [folder.exists() for folder in folders] == [False, True, True, True]
  assert Path(labels._folder).name.startswith(f"mooer-jax-labels-{os.getpid()}@{here}@")
