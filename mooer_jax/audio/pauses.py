"""Long audio in pieces, cut where the speaker pauses."""

import numpy as np


def cut_at_pauses(
  waveform_N: np.ndarray, *, longest: int, shortest: int, search: int, window: int
) -> list[np.ndarray]:
  """Cuts a long clip into pieces; joined again they are the clip, sample for sample.

  Each cut lies where the `window` samples around it hold the least energy, among the last `search`
  samples of what a piece may take; of equally quiet places, digital silence say, at the last one.

  Args:
    waveform_N: float [N].
    longest: samples that a piece may have.
    shortest: samples that a piece must have, unless the whole clip is shorter.
    search: samples before a piece's end among which a pause is looked for.
    window: samples over which energy is averaged.

  Returns:
    One view or more into the waveform, in order; the clip itself if it is no longer than `longest`.

  Raises:
    ValueError: if longest < 2 * shortest, for then not every length can be cut.
  """
  if longest < 2 * shortest or shortest < 1:
    raise ValueError(
      f"pieces of {shortest} to {longest} samples: the longest must have twice the shortest's"
    )
  pieces = []
  while len(waveform_N) > longest:
    last = min(longest, len(waveform_N) - shortest)
    first = max(shortest, last - search)
    cut = first + _quietest(waveform_N, first, last, window)
    pieces.append(waveform_N[:cut])
    waveform_N = waveform_N[cut:]
  return [*pieces, waveform_N]


def _quietest(waveform_N: np.ndarray, first: int, last: int, window: int) -> int:
  """The quietest place in first..last, counted from first."""
  half = max(1, window // 2)
  begin = max(0, first - half)
  near_N = waveform_N[begin : last + half].astype(np.float64)
  energy_N = np.concatenate([[0.0], np.cumsum(near_N**2)])
  places = np.arange(first, last + 1) - begin
  left, right = np.maximum(places - half, 0), np.minimum(places + half, len(near_N))
  mean = (energy_N[right] - energy_N[left]) / (right - left)
  return int(len(mean) - 1 - mean[::-1].argmin())
