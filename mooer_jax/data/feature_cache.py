"""Cache of the frames of frozen encoders on disk, so that each clip is encoded once."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mooer_jax import storage
from mooer_jax.data.readers.entries import RawUtterance

DTYPE = np.float16
_BYTES = np.dtype(DTYPE).itemsize
_INDEX, _DONE = "index.jsonl", "complete"


def digest(raw: RawUtterance) -> str:
  """Identifies the audio of an utterance, in any shard."""
  made = hashlib.blake2b(digest_size=16)
  for part in (raw.audio, *raw.more):
    made.update(len(part).to_bytes(8, "little") + part)
  return made.hexdigest()


class EncodedCache:
  """A folder with a file of frames for each encoder, and an index of clips.

  Its subfolders `process1`, ... are the caches that other processes have written, which `get` and
  `known` include. Writing appends, so an interrupted run resumes; an incomplete end is ignored, and
  removed by `repair` or the next write. Readers see what was complete when they opened the folder.
  Picklable, for data workers.
  """

  def __init__(self, folder: str | Path, widths: Mapping[str, int]):
    """Opens a folder for these encoders only, which need not exist.

    `widths` are the values per frame by name of the encoder.
    """
    self.folder, self.widths = storage.local(folder, "folder"), dict(widths)
    # By digest: the first frames and numbers of frames of the encoders, and the length in seconds.
    self.clips: dict[str, tuple[Sequence[int], Sequence[int], float]] = {}
    self._ends = (0,) * len(self.widths)
    self._index_end = 0
    self._frames: list[np.ndarray] | None = None
    self._whole = self._read_index()
    self._others = [EncodedCache(part, widths) for part in sorted(self.folder.glob("process*"))]

  def __reduce__(self):
    return EncodedCache, (self.folder, self.widths)

  def get(self, name: str) -> tuple[tuple[np.ndarray, ...], float] | None:
    """Frames float16 [T, D] of a clip for each encoder, and its length in seconds, by digest."""
    if name not in self.clips:
      found = (other.get(name) for other in self._others)
      return next((clip for clip in found if clip is not None), None)
    if self._frames is None:
      self._frames = [
        np.memmap(self._file(encoder), DTYPE, "r", shape=(end, width))
        if end
        else np.zeros((0, width), DTYPE)  # an empty file cannot be mapped
        for (encoder, width), end in zip(self.widths.items(), self._ends, strict=True)
      ]
    starts, lengths, seconds = self.clips[name]
    parts = zip(self._frames, starts, lengths, strict=True)
    return tuple(frames_TD[start : start + n] for frames_TD, start, n in parts), seconds

  @property
  def known(self) -> set[str]:
    """The digests of all clips."""
    return {*self.clips}.union(*(other.clips for other in self._others))

  def write(self, clips: Sequence[tuple[str, Sequence[np.ndarray], float]]) -> None:
    """Appends (digest, frames [T, D] of each encoder, seconds) of clips that are not cached.

    Raises:
      ValueError: if a value is not finite in float16.
    """
    self._cut_torn_ends()
    for number, (encoder, width) in enumerate(self.widths.items()):
      with self._file(encoder).open("ab") as file:
        for _, frames, _ in clips:
          x_TD = np.asarray(frames[number], np.float32)
          assert x_TD.shape[1] == width, (encoder, x_TD.shape)
          if not (np.abs(x_TD) <= np.finfo(DTYPE).max).all():
            raise ValueError(
              f"the {encoder} encoder has outputs beyond the range of float16 (largest"
              f" {np.abs(x_TD).max()}); train without data.cache_features"
            )
          file.write(x_TD.astype(DTYPE).tobytes())
    with (self.folder / _INDEX).open("ab") as index:
      for name, frames, seconds in clips:
        self._add(name, (self._ends, [len(x_TD) for x_TD in frames], seconds))
        index.write(json.dumps((name, *self.clips[name])).encode() + b"\n")
      self._index_end = index.tell()
    self._frames = None

  @property
  def whole(self) -> bool:
    """Whether no file of the folder or of its subfolders has an incomplete end."""
    return self._whole and all(other.whole for other in self._others)

  def repair(self) -> None:
    """Removes incomplete ends, after which no data set is complete; nothing may be writing."""
    if not self.whole:
      (self.folder / _DONE).unlink(missing_ok=True)
    for part in (self, *self._others):
      if not part._whole:
        part._cut_torn_ends()
        part._whole = True

  def complete(self, dataset: str) -> bool:
    """Whether all clips of a data set, identified by a string, were processed and are there."""
    done = self.folder / _DONE
    marks = done.read_text(encoding="utf-8").split("\n") if done.is_file() else []
    return self.whole and dataset in marks

  def mark_complete(self, dataset: str) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    with (self.folder / _DONE).open("a", encoding="utf-8") as file:
      file.write(dataset + "\n")

  def _file(self, encoder: str) -> Path:
    return self.folder / f"{encoder}.float16"

  def _read_index(self) -> bool:
    """Adds the clips whose frames are complete; returns whether the files have nothing else."""
    index = self.folder / _INDEX
    lines = index.read_bytes().splitlines(keepends=True) if index.is_file() else []
    files = [(self._file(encoder), width * _BYTES) for encoder, width in self.widths.items()]
    sizes = [(file.stat().st_size if file.is_file() else 0, of_frame) for file, of_frame in files]
    for line in lines:
      if not line.endswith(b"\n"):
        return False
      name, starts, lengths, seconds = json.loads(line)
      ends = [start + n for start, n in zip(starts, lengths, strict=True)]
      if any(end * of_frame > size for end, (size, of_frame) in zip(ends, sizes, strict=True)):
        return False
      self._add(name, (starts, lengths, seconds))
      self._index_end += len(line)
    # More frames than the index knows are those of an index that was truncated, or not yet written.
    return all(end * frame == size for end, (size, frame) in zip(self._ends, sizes, strict=True))

  def _add(self, name: str, clip: tuple[Sequence[int], Sequence[int], float]):
    self.clips[name] = clip
    starts, lengths, _ = clip
    self._ends = tuple(start + n for start, n in zip(starts, lengths, strict=True))

  def _cut_torn_ends(self):
    self.folder.mkdir(parents=True, exist_ok=True)
    for (encoder, width), end in zip(self.widths.items(), self._ends, strict=True):
      with self._file(encoder).open("ab") as file:
        if file.tell() != (size := end * width * _BYTES):
          os.truncate(self._file(encoder), size)
    index = self.folder / _INDEX
    if index.is_file():
      os.truncate(index, self._index_end)
