"""Mean and variance normalisation of features, and Kaldi's text file (`am.mvn`) that holds it.

A shift is added, then a scale multiplied, (x + shift) * scale: shift = -mean, scale = 1 / standard
deviation.
"""

import os
import pathlib
from collections.abc import Iterable

import numpy as np


def read_mvn(path: str | os.PathLike, *, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Reads shift and scale from a Kaldi Nnet text file.

  Args:
    path: `am.mvn`: `<AddShift>` and `<Rescale>`, each followed by its sizes, `<LearnRateCoef> 0`
      and its values in brackets.
    width: values that it must have, `frontend.width`; None takes any number.

  Returns:
    shift_F and scale_F, float32 [F].

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if a part is missing or damaged, lengths differ, a value is not finite, or the
      file is of another width.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file; MooER ships it as am.mvn beside its encoder")
  try:
    text = path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: is not text; a Kaldi Nnet text file (am.mvn) is expected") from error
  words = text.replace("[", " [ ").replace("]", " ] ").split()
  shift_F = _component(words, "<AddShift>", path)
  scale_F = _component(words, "<Rescale>", path)
  if len(shift_F) != len(scale_F):
    raise ValueError(
      f"{path}: <AddShift> has {len(shift_F)} values, <Rescale> {len(scale_F)}; must be as many"
    )
  if width is not None and len(shift_F) != width:
    raise ValueError(
      f"{path}: has {len(shift_F)} values, the features have {width}; take the file of this encoder"
      " (MooER: 560, that is 7 frames of 80 bins)"
    )
  return shift_F, scale_F


def write_mvn(path: str | os.PathLike, shift_F: np.ndarray, scale_F: np.ndarray) -> None:
  """Writes a file that `read_mvn` (and Kaldi, and funasr) reads back to the same float32 values.

  Args:
    path: file to write.
    shift_F: [F], added first.
    scale_F: [F], multiplied second.

  Raises:
    ValueError: if the two are not vectors of one length, or hold a value that is not finite.
  """
  shift_F, scale_F = np.asarray(shift_F, np.float32), np.asarray(scale_F, np.float32)
  if shift_F.ndim != 1 or shift_F.shape != scale_F.shape or not shift_F.size:
    raise ValueError(
      f"{path}: shift {list(shift_F.shape)} and scale {list(scale_F.shape)} must be vectors of one "
      "length"
    )
  if not (np.isfinite(shift_F).all() and np.isfinite(scale_F).all()):
    raise ValueError(f"{path}: shift or scale hold values that are NaN or infinite")
  size = len(shift_F)
  lines = ["<Nnet>", f"<Splice> {size} {size}", "[ 0 ]"]
  for tag, values_F in (("<AddShift>", shift_F), ("<Rescale>", scale_F)):
    # Nine digits tell any two float32 apart.
    values = " ".join(f"{value:.9g}" for value in values_F)
    lines += [f"{tag} {size} {size}", f"<LearnRateCoef> 0 [ {values} ]"]
  pathlib.Path(path).write_text("\n".join([*lines, "</Nnet>", ""]), encoding="utf-8")


def estimate(features: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Shift and scale that bring features to mean 0 and variance 1.

  Args:
    features: any number of [T, F], taken one at a time.

  Returns:
    shift_F and scale_F, float32 [F]. A feature that never changes gets scale 1.

  Raises:
    ValueError: if there is not one frame, widths differ, or a value is not finite.
  """
  frames, mean_F, squares_F = 0, None, None
  for number, x_TF in enumerate(features):
    x_TF = np.asarray(x_TF, np.float64)
    if x_TF.ndim != 2 or (mean_F is not None and x_TF.shape[1] != len(mean_F)):
      wanted = "[T, F]" if mean_F is None else f"[T, {len(mean_F)}]"
      raise ValueError(f"features number {number} are {list(x_TF.shape)}; {wanted} is expected")
    if not np.isfinite(x_TF).all():
      raise ValueError(f"features number {number} hold values that are NaN or infinite")
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
    raise ValueError("cannot estimate mean and variance from 0 frames; give some clips")
  deviation_F = np.sqrt(squares_F / frames)
  # A constant's deviation is rounding error, not spread.
  constant_F = deviation_F <= 1e-10 * np.maximum(1, np.abs(mean_F))
  scale_F = 1 / np.where(constant_F, 1, deviation_F)
  return (-mean_F).astype(np.float32), scale_F.astype(np.float32)


def _component(words: list[str], tag: str, path: pathlib.Path) -> np.ndarray:
  try:
    at = words.index(tag)
    start = words.index("[", at)
    end = words.index("]", start)
  except ValueError as error:
    raise ValueError(
      f"{path}: no {tag} with values in [ ]; a Kaldi Nnet text file (am.mvn) is expected"
    ) from error
  header = words[at + 1 : start]
  if len(header) != 4 or header[2] != "<LearnRateCoef>":
    raise ValueError(
      f"{path}: after {tag} stands {' '.join(header[:6])!r}; expected two sizes, <LearnRateCoef>, "
      "a number"
    )
  try:
    values_F = np.array([float(word) for word in words[start + 1 : end]], np.float32)
  except ValueError as error:
    raise ValueError(f"{path}: {tag}: {error}") from error
  if header[0] != header[1] or header[0] != str(len(values_F)):
    raise ValueError(
      f"{path}: {tag} announces {header[0]} {header[1]} values and has {len(values_F)}; "
      "is the file whole?"
    )
  if not np.isfinite(values_F).all():
    raise ValueError(f"{path}: {tag} holds values that are NaN or infinite")
  return values_F
