"""Pieces of a long clip lose nothing, keep their bounds, and are cut where it is quiet."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooer_jax.transcribe.clips import split_at_pauses


def noise(samples, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, samples).astype(np.float32)


@given(
  samples=st.integers(0, 600),
  shortest=st.integers(1, 50),
  spare=st.integers(0, 100),
  search=st.integers(0, 200),
  window=st.integers(0, 40),
  silent=st.booleans(),
)
def test_pieces_are_the_clip_and_keep_their_bounds(
  samples, shortest, spare, search, window, silent
):
  longest = 2 * shortest + spare
  clip = noise(samples) * (not silent)
  chunks = split_at_pauses(clip, longest=longest, shortest=shortest, search=search, window=window)
  np.testing.assert_array_equal(np.concatenate(chunks), clip)
  assert all(len(piece) <= longest for piece in chunks)
  if samples > longest:
    assert len(chunks) > 1 and all(len(piece) >= shortest for piece in chunks)
  else:
    assert len(chunks) == 1


def test_cuts_lie_in_the_pauses():
  clip = noise(1000)
  for pause in (260, 520, 890):
    clip[pause - 10 : pause + 10] *= 1e-3
  chunks = split_at_pauses(clip, longest=300, shortest=40, search=100, window=20)
  np.testing.assert_allclose(
    np.cumsum([len(piece) for piece in chunks])[[0, 1]], [260, 520], atol=1
  )
  # The next pause is farther away than a piece is long.
  assert 720 <= sum(len(piece) for piece in chunks[:3]) <= 820


def test_a_long_pause_beats_a_single_quiet_sample():
  clip = np.ones(400, np.float32)
  clip[280] = 0  # quieter than the pause, and later
  clip[220:240] = 0.1
  cut = len(split_at_pauses(clip, longest=300, shortest=40, search=100, window=20)[0])
  assert cut == 230


def test_in_silence_a_piece_is_as_long_as_it_may_be():
  chunks = split_at_pauses(np.zeros(700), longest=300, shortest=40, search=100, window=20)
  assert [len(piece) for piece in chunks] == [300, 300, 100]


@pytest.mark.parametrize(("longest", "shortest"), [(79, 40), (10, 0)])
def test_bounds_that_not_every_length_can_keep_are_refused(longest, shortest):
  with pytest.raises(AssertionError, match=f"{shortest} to {longest} samples"):
    split_at_pauses(np.zeros(100), longest=longest, shortest=shortest, search=5, window=5)
