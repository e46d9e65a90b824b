"""The k-means codebook of audio tokens, and its folder."""

import dataclasses
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mooer_jax.checkpoint import put_in_place
from mooer_jax.config import build
from mooer_jax.files import read_json_object, write_errors_name, write_json

_INFO, _VECTORS = "units.json", "codebook.npz"
_AT_A_TIME = 4096  # vectors whose distances to all centroids are in memory


@dataclasses.dataclass(frozen=True)
class UnitsInfo:
  """What a codebook was made for.

  Attributes:
    encoder: kind of the encoder.
    encoder_hash: of the encoder's config and weights, see `token_vectors.UnitEncoder`.
    checkpoint_hash: of the checkpoint from which the encoder was read; for information.
    samples_per_token, sample_rate_hz: samples of a waveform at this rate that a token stands for.
    count: number of tokens.
    seed: of the sample of vectors and of k-means.
  """

  encoder: str
  encoder_hash: str
  checkpoint_hash: str
  samples_per_token: int
  sample_rate_hz: int
  count: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Codebook:
  """Centroids float32 [K, D], and what they were made for."""

  centroids_KD: np.ndarray
  info: UnitsInfo

  def encode(self, vectors_ND: np.ndarray) -> np.ndarray:
    """Indices of the nearest centroids, int64 [N]."""
    squares_K = (self.centroids_KD**2).sum(axis=1)
    parts = [
      (squares_K - 2 * vectors_ND[start : start + _AT_A_TIME] @ self.centroids_KD.T).argmin(axis=1)
      for start in range(0, len(vectors_ND), _AT_A_TIME)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])

  def check_encoder(self, encoder_hash: str, where: Path) -> None:
    """Raises ValueError if the encoder of the checkpoint `where` is another one."""
    if encoder_hash != self.info.encoder_hash:
      raise ValueError(
        f"the units belong to an encoder {self.info.encoder} with the hash"
        f" {self.info.encoder_hash}, but that of {where} has {encoder_hash}: its weights or its"
        " config differ. Name the checkpoint that they were fitted to (hash"
        f" {self.info.checkpoint_hash[:12]}), or fit units for this one"
      )

  def explained(self, vectors_ND: np.ndarray) -> float:
    """Share of the variance of vectors that their centroids explain; 1: all of it."""
    error = ((vectors_ND - self.centroids_KD[self.encode(vectors_ND)]) ** 2).sum(dtype=np.float64)
    spread = ((vectors_ND - vectors_ND.mean(axis=0)) ** 2).sum(dtype=np.float64)
    return float(1 - error / spread) if spread else 1.0

  def save(self, folder: Path) -> None:
    """Writes the folder, completely or not at all; it must not exist."""
    part = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
      part.mkdir(parents=True)
      with write_errors_name(part / _VECTORS):
        np.savez(part / _VECTORS, centroids=self.centroids_KD)
      write_json(part / _INFO, dataclasses.asdict(self.info))
      put_in_place(part, folder)
    finally:
      shutil.rmtree(part, ignore_errors=True)

  @classmethod
  def load(cls, folder: Path) -> "Codebook":
    """Reads a folder; raises FileNotFoundError, or ValueError if it is not one of `save`."""
    for name in (_INFO, _VECTORS):
      if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / name}: not found; make it with mooer-jax units fit")
    info = build(UnitsInfo, read_json_object(folder / _INFO), str(folder / _INFO))
    try:
      with np.load(folder / _VECTORS) as stored:
        centroids_KD = stored["centroids"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
      raise ValueError(f"{folder / _VECTORS}: damaged ({error}); fit the units again") from error
    if centroids_KD.ndim != 2 or len(centroids_KD) != info.count:
      raise ValueError(
        f"{folder}: {_INFO} has count={info.count}, but the codebook has the shape"
        f" {centroids_KD.shape}; fit the units again"
      )
    return cls(centroids_KD, info)


def sample(blocks: Iterable[np.ndarray], count: int, *, seed: int) -> tuple[np.ndarray, int]:
  """Draws vectors uniformly from a stream, in the memory of some four times `count`.

  Args:
    blocks: float32 [N, D], consumed one by one.
    count: number of vectors.
    seed: determines the sample, together with the order of the vectors.

  Returns:
    float32 [min(count, all), D] in the order of the stream, and the number of all vectors.
  """
  rng = np.random.default_rng(seed)
  kept: list[np.ndarray] = []
  keys: list[np.ndarray] = []
  held, seen, limit = 0, 0, np.inf

  def reduce():
    keys_N = np.concatenate(keys)
    chosen = np.sort(np.argpartition(keys_N, count - 1)[:count])
    kept[:], keys[:] = [np.concatenate(kept)[chosen]], [keys_N[chosen]]
    return count, keys[0].max()

  for block_ND in blocks:
    keys_N = rng.random(len(block_ND))
    chosen = keys_N < limit  # the vectors with the smallest keys are the sample
    kept.append(block_ND[chosen])
    keys.append(keys_N[chosen])
    held, seen = held + int(chosen.sum()), seen + len(block_ND)
    if held >= 1.25 * count:
      held, limit = reduce()
  if held > count:
    reduce()
  return (np.concatenate(kept) if kept else np.zeros((0, 0), np.float32)), seen


def fit(vectors_ND: np.ndarray, count: int, *, seed: int) -> np.ndarray:
  """Centroids float32 [count, D] of mini-batch k-means (Sculley, 2010).

  Raises:
    ValueError: for fewer distinct vectors than centroids.
  """
  from sklearn.cluster import MiniBatchKMeans

  distinct = len(np.unique(vectors_ND, axis=0)) if len(vectors_ND) < 10 * count else len(vectors_ND)
  if distinct < count:
    raise ValueError(
      f"{distinct} different vectors for {count} tokens; name more data, or lower --count"
    )
  means = MiniBatchKMeans(
    count, random_state=seed, batch_size=max(1024, 4 * count), n_init=1, max_iter=100
  )
  return np.asarray(means.fit(vectors_ND).cluster_centers_, np.float32)
