"""Second label files: `KEY text` lines that replace transcripts or join them, such as translations.

Source: the options replace_text_path and replace_type of MooER's training.
"""

import dataclasses
import hashlib
import os
import shutil
import socket
import tempfile
import weakref
from array import array
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mooer_jax import storage
from mooer_jax.data.readers.entries import RawUtterance, SkippedUtterance
from mooer_jax.files import LFS_REMEDY, is_lfs_pointer, write_errors_name

SEPARATOR = "\n"
# Of "instruction": the text is the transcript, the label, or both.
INSTRUCTION_TASKS = ("asr", "ast", "asr_ast_mtl")
_PREFIX = "mooer-jax-labels-"
_BOM = b"\xef\xbb\xbf"
# The texts that are joined, in order.
_PARTS = {
  "replace": ("label",),
  "concat": ("transcript", "label"),
  "concat_r": ("label", "transcript"),
  "instruction": ("transcript", "label"),
}
MODES = tuple(_PARTS)
# The options of data that are used with their own texts.
NO_LABELS: dict[str, Any] = {"labels": "", "labels_mode": MODES[0], "labels_separator": SEPARATOR}


class LabelOptions(NamedTuple):
  """The options `labels`, `labels_mode` and `labels_separator` of a data set."""

  file: str = ""
  mode: str = MODES[0]
  separator: str = SEPARATOR


def check_options(
  labels: str,
  mode: str,
  separator: str,
  *,
  task: str,
  task_weights: Mapping[str, float],
  option: str = "data",
) -> None:
  """Raises ValueError for an unknown mode, or an option that has no effect beside the others.

  Args:
    labels, mode, separator: as in `LabelOptions`.
    task: of all utterances of the data set; "": their own.
    task_weights: data.task_weights.
    option: what the options begin with, in errors.
  """
  if mode not in MODES:
    raise ValueError(f"{option}.labels_mode={mode!r}: choose one of {', '.join(MODES)}")
  if not labels and (mode, separator) != (MODES[0], SEPARATOR):
    name, value = ("mode", mode) if mode != MODES[0] else ("separator", separator)
    raise ValueError(
      f"{option}.labels_{name}={value!r} has no effect without {option}.labels; set it"
    )
  if mode == "replace" and separator != SEPARATOR:
    raise ValueError(
      f"{option}.labels_separator={separator!r} has no effect with {option}.labels_mode='replace';"
      " leave it out, or set the mode 'concat' or 'concat_r'"
    )
  if mode == "instruction" and task:
    raise ValueError(
      f"{option}.task={task!r} gives all utterances one prompt, but"
      f" {option}.labels_mode='instruction' samples one of the tasks"
      f" {', '.join(INSTRUCTION_TASKS)}; set {option}.task=''"
    )
  if mode == "instruction" and task_weights:
    raise ValueError(
      f"data.task_weights={dict(task_weights)} has no effect with"
      f" {option}.labels_mode='instruction', which samples each task equally often; leave it out"
    )


def check_prompts(prompts: Mapping[str, Collection[str]]) -> None:
  """Raises ValueError unless each of INSTRUCTION_TASKS has prompts that no other of them has."""
  for number, task in enumerate(INSTRUCTION_TASKS):
    if task not in prompts:
      raise ValueError(
        f"data.labels_mode='instruction' needs a prompt for the task {task!r}; set"
        f" model.prompts.{task}"
      )
    for other in INSTRUCTION_TASKS[:number]:
      if both := {*prompts[task]} & {*prompts[other]}:
        raise ValueError(
          f"the tasks {other!r} and {task!r} have the same prompt, {both.pop()!r}, but"
          " data.labels_mode='instruction' trains them on different texts; change"
          f" model.prompts.{task}"
        )


def describe(labels: str, mode: str, separator: str) -> str:
  """The label file as it is now, and what is done with it; "" without one."""
  if not labels:
    return ""
  if (size := storage.sizes([labels]).get(labels)) is None:
    return mode  # `LabelFile` refuses it
  name = f"{os.path.basename(labels)} ({size} bytes), {mode}"
  return name if mode == "replace" else f"{name}, {separator!r}"


class LabelFile:
  """Lines of `KEY text`, found by their keys without being in memory.

  The index has 20 bytes for each line, in a temporary folder that is removed with the object. It
  is mapped, so the workers of a process share it: pickling passes its path. Keys are found by a
  hash and then compared. The file of a URL is copied to that folder, once by each process.
  """

  def __init__(self, path: str | Path):
    """Reads the file once.

    Raises:
      FileNotFoundError, OSError: if there is no such file, or it is not a regular one.
      ValueError: if it is empty, compressed, a Git LFS pointer, or has lines of JSON.
      RemoteError: if a URL cannot be read.
    """
    self.path = str(path)
    _remove_leftovers()
    folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}@{socket.gethostname()}@")
    weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
    try:
      storage.stat_file(self.path)
    except FileNotFoundError as error:
      raise FileNotFoundError(f"{path}: no such label file; it has `KEY text` lines") from error
    if storage.is_url(self.path):
      storage.download(self.path, _copy_in(folder))
    here = self._file_in(folder)
    if is_lfs_pointer(here):
      raise ValueError(f"{path}: {LFS_REMEDY}")
    self._open(folder, _index(here, self.path))

  def __getstate__(self) -> tuple[str, str]:
    return self.path, self._folder

  def __setstate__(self, state: tuple[str, str]) -> None:
    self.path, folder = state
    self._open(folder, None)

  def _open(self, folder: str, index: tuple[np.ndarray, ...] | None) -> None:
    self._folder = folder
    files = [Path(folder) / f"{name}.npy" for name in ("hashes", "lines", "starts")]
    for file, values in zip(files, index or ()):
      with write_errors_name(file):
        np.save(file, values)
    self._hashes, self._lines, self._starts = (np.load(file, mmap_mode="r") for file in files)
    self._file = open(self._file_in(folder), "rb", buffering=0)  # closed with the object

  def _file_in(self, folder: str) -> Path:
    """The file on this machine."""
    return _copy_in(folder) if storage.is_url(self.path) else Path(self.path)

  def find(self, key: str) -> list[tuple[int, bytes]]:
    """(line number, text) of the lines that have a key."""
    wanted = key.removeprefix("./").encode("utf-8", "surrogatepass")
    hashed = np.uint64(_hash(wanted))
    first, last = (int(np.searchsorted(self._hashes, hashed, side)) for side in ("left", "right"))
    found = []
    for line in self._lines[first:last].tolist():
      start, end = map(int, self._starts[line : line + 2])
      content = os.pread(self._file.fileno(), end - start, start)
      stored, text = _split(content)
      if stored == wanted:
        found.append((line + 1, text))
    return found


@dataclasses.dataclass(frozen=True)
class Labels:
  """Replaces or joins transcripts by the lines of a label file.

  Attributes:
    mode: "replace": the label is the text. "concat": transcript, separator, label. "concat_r":
      label, separator, transcript. "instruction": one of INSTRUCTION_TASKS is sampled for each
      reading; its text is the transcript, the label, or both as of "concat".
    separator: between transcript and label.
  """

  file: LabelFile
  mode: str = MODES[0]
  separator: str = SEPARATOR

  def join(self, raw: RawUtterance, uniform: float) -> RawUtterance | SkippedUtterance:
    """The utterance with the text to train on, or why there is none.

    Args:
      uniform: in [0, 1); determines the task of "instruction".
    """
    path, found = self.file.path, self.file.find(raw.key)
    if len(found) != 1:
      lines = " and ".join(str(number) for number, _ in found)
      detail = f"has the key on the lines {lines}; remove all but one" if lines else "lacks the key"
      return raw.skip("no label", f"{path} {detail}")
    [(number, label)] = found
    try:
      texts = [
        raw.transcript() if part == "transcript" else label.decode().strip()
        for part in _PARTS[self.mode]
      ]
    except UnicodeDecodeError as error:
      return raw.skip("transcript not UTF-8", f"{error}; its label is {path}:{number}")
    if not all(texts):
      return raw.skip("empty transcript", f"its label is {path}:{number}")
    task = raw.task
    if self.mode == "instruction":
      if task not in ("", "asr"):
        return raw.skip("bad task", f"{task!r}, but data.labels_mode='instruction' samples one")
      task = INSTRUCTION_TASKS[int(len(INSTRUCTION_TASKS) * uniform)]
      texts = {"asr": texts[:1], "ast": texts[1:]}.get(task, texts)
    return dataclasses.replace(raw, text=self.separator.join(texts).encode(), task=task)


def _remove_leftovers() -> None:
  """Removes the folders of processes of this host that were killed; hosts may share TMPDIR."""
  for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*@{socket.gethostname()}@*"):
    pid = folder.name.removeprefix(_PREFIX).partition("@")[0]
    try:
      os.kill(int(pid), 0)
    except ProcessLookupError:
      shutil.rmtree(folder, ignore_errors=True)
    except (PermissionError, ValueError):  # of another user; no folder of ours
      pass


def _split(line: bytes) -> tuple[bytes, bytes]:
  """The key of a line, without a leading "./", and its text."""
  parts = line.removeprefix(_BOM).split(None, 1)
  key = parts[0].removeprefix(b"./") if parts else b""
  return key, parts[1] if len(parts) == 2 else b""


def _hash(key: bytes) -> int:
  return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def _copy_in(folder: str) -> Path:
  """The copy of a URL in the folder of the index."""
  return Path(folder) / "labels"


def _index(file: Path, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Ascending hashes of the keys, the lines (from 0) that have them, starts of all lines.

  Errors name the file `path`.
  """
  hashes, starts = array("Q"), array("Q", [0])
  with open(file, "rb") as stored:
    for line in stored:
      key, _ = _split(line)
      if len(starts) == 1 and key.startswith((b"{", b"\x1f\x8b", b"\xfd7zXZ")):
        kind = "JSON" if key.startswith(b"{") else "compressed"
        raise ValueError(f"{path}: is {kind}; a label file has `KEY text` lines")
      hashes.append(_hash(key))
      starts.append(starts[-1] + len(line))
  if len(starts) == 1:
    raise ValueError(f"{path}: is empty; a label file has `KEY text` lines")
  of_line = np.frombuffer(hashes, np.uint64)
  lines = np.argsort(of_line, kind="stable")
  return of_line[lines], lines.astype(np.uint32), np.frombuffer(starts, np.uint64)
