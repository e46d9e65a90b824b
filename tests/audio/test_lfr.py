"""Low frame rate equals funasr's to the last bit; rows of a padded batch equal the row alone."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mooer_jax.audio.frontend import num_stacks, stack_frames, stack_frames_jax

stack = jax.jit(stack_frames_jax, static_argnames=("window", "stride"))


def frames(count, bins=3):
  return np.random.default_rng(count).normal(size=(count, bins)).astype(np.float32)


@pytest.mark.parametrize(("window", "stride"), [(7, 6), (1, 1), (5, 3), (4, 4)])
def test_equals_funasr(window, stride):
  from funasr.frontends import wav_frontend

  for count in range(1, 40):
    theirs = wav_frontend.apply_lfr(torch.from_numpy(frames(count)), window, stride).numpy()
    np.testing.assert_array_equal(stack_frames(frames(count), window=window, stride=stride), theirs)


def test_by_hand():
  counted = np.arange(8, dtype=np.float32)[:, None]
  np.testing.assert_array_equal(
    stack_frames(counted), [[0, 0, 0, 0, 1, 2, 3], [3, 4, 5, 6, 7, 7, 7]]
  )


# One shape, so that JAX compiles once for each setting.
@given(
  st.lists(st.integers(0, 31), min_size=6, max_size=6), st.sampled_from([(7, 6), (1, 1), (4, 2)])
)
def test_rows_of_a_batch_equal_the_row_alone(counts, window_and_stride):
  window, stride = window_and_stride
  fbank_BTF = np.full((6, 31, 3), np.nan, np.float32)
  for row, count in zip(fbank_BTF, counts):
    row[:count] = frames(count)
  stacked_BTF, steps_B = stack(fbank_BTF, np.array(counts), window=window, stride=stride)
  assert stacked_BTF.shape == (6, num_stacks(31, stride), 3 * window)
  for row, steps, count in zip(np.asarray(stacked_BTF), np.asarray(steps_B), counts):
    assert steps == num_stacks(count, stride)
    if count:
      alone = stack_frames(frames(count), window=window, stride=stride)
      np.testing.assert_array_equal(row[:steps], alone)
    assert not row[steps:].any()


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7])
def test_the_padded_length_may_be_anything(count):
  fbank_BTF = np.full((2, count, 2), 5.0, np.float32)
  stacked_BTF, steps_B = stack(fbank_BTF, np.array([count, min(count, 1)]))
  assert stacked_BTF.shape == (2, num_stacks(count, 6), 14)
  np.testing.assert_array_equal(steps_B, [num_stacks(count, 6), min(count, 1)])
  valid_BT = np.arange(num_stacks(count, 6)) < np.asarray(steps_B)[:, None]
  np.testing.assert_array_equal(stacked_BTF, 5.0 * valid_BT[..., None] * np.ones(14))


def test_no_frames_are_refused():
  with pytest.raises(ValueError, match="0 frames"):
    stack_frames(np.zeros((0, 80), np.float32))


@pytest.mark.parametrize(("window", "stride"), [(3, 4), (7, 0)])
def test_stacking_that_would_lose_frames_is_refused(window, stride):
  with pytest.raises(ValueError, match=f"window is {window}, stride {stride}"):
    stack_frames(frames(10), window=window, stride=stride)
  with pytest.raises(ValueError, match=f"window is {window}, stride {stride}"):
    stack_frames_jax(frames(10)[None], np.array([10]), window=window, stride=stride)
