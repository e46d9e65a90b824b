"""Recordings of noise and of rooms that are mixed into training data."""

import collections
import concurrent.futures
import posixpath
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mooer_jax import storage
from mooer_jax.audio.decode import SILENCE, AudioError, load_audio
from mooer_jax.data.readers.shards import read_lines
from mooer_jax.data.readers.tars import AUDIO_SUFFIXES, IGNORED

_CACHED_BYTES = 1 << 28
_CHECKED_AT_A_TIME = 8


class Recordings:
  """Audio files that are mixed into clips.

  A file is decoded when it is needed, its first channel only. The last used ones stay in memory, up
  to 256 MiB in each process. Picklable, for data workers.
  """

  def __init__(self, source: str, *, option: str, sample_rate_hz: int):
    """Decodes each file once, to check it.

    Args:
      source: folder, in which audio files are found at any depth; or a list of paths, one a line,
        relative to the list. Each may be a URL.
      option: name of the option in errors.
      sample_rate_hz: rate of the result.

    Raises:
      FileNotFoundError, ValueError: if the source or a file of a list does not exist; if there is
        none, or some cannot be decoded or are silent.
    """
    self._where, self._rate_hz = f"{option}={source}", sample_rate_hz
    self.files = _find(source, self._where)
    self._open()
    with concurrent.futures.ThreadPoolExecutor(_CHECKED_AT_A_TIME) as pool:
      problems = [problem for problem in pool.map(self._problem, self.files) if problem]
    if problems:
      raise ValueError(
        f"{self._where}: {len(problems)} of {len(self.files)} recordings cannot be used, first"
        f" {problems[0]}; repair or remove them"
      )

  def __getstate__(self) -> dict[str, Any]:
    return {name: self.__dict__[name] for name in ("_where", "_rate_hz", "files")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def _open(self) -> None:
    self._lock = threading.Lock()  # streams of a process read in threads
    self._cached: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
    self._free = _CACHED_BYTES

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, number: int) -> np.ndarray:
    """The waveform of a file, float32 [N]; raises ValueError if it has become unusable."""
    with self._lock:
      if number in self._cached:
        self._cached.move_to_end(number)
        return self._cached[number]
    try:
      waveform_N = self._load(self.files[number])
    except (AudioError, OSError) as error:
      raise ValueError(
        f"{self._where}: a recording cannot be read any more: {error}; restore it and resume"
      ) from error
    with self._lock:
      if number not in self._cached:  # by another thread
        self._cached[number] = waveform_N
        self._free -= waveform_N.nbytes
      while self._free < 0:
        self._free += self._cached.popitem(last=False)[1].nbytes
    return waveform_N

  def _load(self, file: str) -> np.ndarray:
    content = storage.read_bytes(file)
    return load_audio(content, sample_rate_hz=self._rate_hz, channel="first", name=file)

  def _problem(self, file: str) -> str:
    try:
      return "" if np.abs(self._load(file)).max() >= SILENCE else f"{file}: is silent"
    except (AudioError, OSError) as error:
      return str(error)

  def description(self) -> list[int]:
    """Number of the files, their bytes, and a checksum of their names, wherever they are."""
    names = "\n".join(map(posixpath.basename, self.files)).encode("utf-8", "surrogateescape")
    return [len(self.files), sum(storage.sizes({*self.files}).values()), zlib.crc32(names)]


def _find(source: str, where: str) -> list[str]:
  if storage.is_folder(source):
    found = [
      file
      for file in storage.walk(source)
      if _is_audio(file) and not posixpath.basename(file).startswith(IGNORED)
    ]
    if not found:
      raise FileNotFoundError(
        f"{where}: no audio file in the folder; name a folder with recordings"
        f" ({', '.join(AUDIO_SUFFIXES[:4])}, …)"
      )
    return found
  if storage.is_file(source) and _is_audio(source):
    raise ValueError(f"{where}: is a recording; name its folder, or a list of paths, one a line")
  try:
    lines = read_lines(source)
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{where}: no such folder or list of recordings") from error
  folder = storage.parent(source)
  found = [storage.join(folder, line) for line in map(str.strip, lines) if line]
  if not found:
    raise ValueError(f"{where}: the list is empty; write the path of one recording a line")
  present = storage.sizes({*found})
  if missing := [file for file in found if file not in present]:
    raise FileNotFoundError(
      f"{where}: {len(missing)} of {len(found)} recordings do not exist, first {missing[0]}"
    )
  return found


def _is_audio(file: str) -> bool:
  return Path(file).suffix[1:].lower() in AUDIO_SUFFIXES
