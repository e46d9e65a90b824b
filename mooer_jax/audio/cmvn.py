"""Mean and variance normalization (CMVN) of features, and its Kaldi text file (`am.mvn`).

Normalized features are (x + shift) * scale, with shift = -mean and scale = 1 / standard deviation.
"""

import os
import pathlib
import re
from collections.abc import Iterable

import numpy as np


def read_mvn(path: str | os.PathLike, *, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Read shift and scale from a Kaldi Nnet text file.

  Args:
    path: `am.mvn`: `<AddShift>` and `<Rescale>`, each followed by its sizes, `<LearnRateCoef> 0`
      and its values in brackets.
    width: required number of values, `frontend.width`; default: any.

  Returns:
    shift_F and scale_F, float32 [F].

  Raises:
    FileNotFoundError, ValueError: for a file that is missing or damaged, or of another width.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file; MooER ships it as am.mvn beside its encoder")
  if not path.is_file():
    raise ValueError(f"{path}: is not a regular file; a Kaldi Nnet text file (am.mvn) is expected")
  if path.read_bytes().startswith(b"version https://git-lfs.github.com/spec/"):
    raise ValueError(f"{path}: a Git LFS pointer: run git lfs pull")
  try:
    text = path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: is not text; a Kaldi Nnet text file (am.mvn) is expected") from error
  shift_F, scale_F = (_component(text, tag, path) for tag in ("<AddShift>", "<Rescale>"))
  if len(shift_F) != len(scale_F):
    raise ValueError(
      f"{path}: {len(shift_F)} values of <AddShift>, {len(scale_F)} of <Rescale>; must be equal"
    )
  if width is not None and len(shift_F) != width:
    raise ValueError(
      f"{path}: has {len(shift_F)} values, the features have {width}; use the file of this encoder"
      " (MooER: 560, 7 frames of 80 bins)"
    )
  return shift_F, scale_F


def write_mvn(path: str | os.PathLike, shift_F: np.ndarray, scale_F: np.ndarray) -> None:
  """Write a file from which `read_mvn`, Kaldi and funasr read the same float32 values.

  Raises:
    ValueError: if shift_F and scale_F are not vectors [F] of one length, or a value is not finite.
  """
  shift_F, scale_F = np.asarray(shift_F, np.float32), np.asarray(scale_F, np.float32)
  if shift_F.ndim != 1 or shift_F.shape != scale_F.shape or not shift_F.size:
    shapes = f"{list(shift_F.shape)} and scale {list(scale_F.shape)}"
    raise ValueError(f"{path}: shift {shapes} must be vectors of one length")
  if not (np.isfinite(shift_F).all() and np.isfinite(scale_F).all()):
    raise ValueError(f"{path}: shift or scale has values that are NaN or infinite")
  size = len(shift_F)
  lines = ["<Nnet>", f"<Splice> {size} {size}", "[ 0 ]"]
  for tag, values_F in (("<AddShift>", shift_F), ("<Rescale>", scale_F)):
    values = " ".join(f"{value:.9g}" for value in values_F)  # any float32 exactly
    lines += [f"{tag} {size} {size}", f"<LearnRateCoef> 0 [ {values} ]"]
  pathlib.Path(path).write_text("\n".join([*lines, "</Nnet>", ""]), encoding="utf-8")


def estimate(features: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Estimate shift and scale, so that features have mean 0 and variance 1.

  Args:
    features: arrays [T, F], consumed one by one.

  Returns:
    shift_F and scale_F, float32 [F]. The scale of a constant feature is 1.

  Raises:
    ValueError: if there is no frame, widths differ, or a value is not finite.
  """
  frames, mean_F, squares_F = 0, None, None
  for number, x_TF in enumerate(features):
    x_TF = np.asarray(x_TF, np.float64)
    if x_TF.ndim != 2 or (mean_F is not None and x_TF.shape[1] != len(mean_F)):
      wanted = "[T, F]" if mean_F is None else f"[T, {len(mean_F)}]"
      raise ValueError(f"features number {number} are {list(x_TF.shape)}; must be {wanted}")
    if not np.isfinite(x_TF).all():
      raise ValueError(f"features number {number} have values that are NaN or infinite")
    if not len(x_TF):
      continue
    here_F = x_TF.mean(axis=0)
    if mean_F is None:
      mean_F, squares_F = np.zeros_like(here_F), np.zeros_like(here_F)
    # Chan, Golub and LeVeque's update (1983): no difference of two large sums.
    step_F, total = here_F - mean_F, frames + len(x_TF)
    squares_F += ((x_TF - here_F) ** 2).sum(axis=0) + step_F**2 * (frames * len(x_TF) / total)
    mean_F += step_F * (len(x_TF) / total)
    frames = total
  if mean_F is None or squares_F is None:
    raise ValueError("cannot estimate mean and variance from 0 frames; give longer clips")
  deviation_F = np.sqrt(squares_F / frames)
  # A constant's deviation is rounding error, not spread.
  constant_F = deviation_F <= 1e-10 * np.maximum(1, np.abs(mean_F))
  scale_F = 1 / np.where(constant_F, 1, deviation_F)
  return (-mean_F).astype(np.float32), scale_F.astype(np.float32)


def _component(text: str, tag: str, path: pathlib.Path) -> np.ndarray:
  found = re.search(rf"(?<![^\s\]]){tag}\s([^\[\]]*)\[([^\[\]]*)\]", text)
  if not found:
    raise ValueError(
      f"{path}: no {tag} with values in [ ]; a Kaldi Nnet text file (am.mvn) is expected"
    )
  header, words = (part.split() for part in found.groups())
  if len(header) != 4 or header[2] != "<LearnRateCoef>":
    raise ValueError(
      f"{path}: {tag} is followed by {' '.join(header[:6])!r}; must be two sizes, <LearnRateCoef>"
      " and a number"
    )
  try:
    values_F = np.array([float(word) for word in words], np.float32)
  except ValueError as error:
    raise ValueError(f"{path}: {tag}: {error}") from error
  if header[0] != header[1] or header[0] != str(len(values_F)):
    raise ValueError(
      f"{path}: {tag} has {len(values_F)} values, but its sizes are {header[0]} {header[1]}; the"
      " file may be truncated"
    )
  if not np.isfinite(values_F).all():
    raise ValueError(f"{path}: {tag} has values that are NaN or infinite")
  return values_F
