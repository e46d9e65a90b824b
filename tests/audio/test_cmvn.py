"""`am.mvn` reads as funasr reads it, round trips exactly, and says what is wrong with a bad one."""

import os

import numpy as np
import pytest
import torch

from mooer_jax.audio.cmvn import estimate, read_mvn, write_mvn
from tests.numerics import assert_within, exceeds_the_bound, rounding

# The layout of the released files, at width 3.
KALDI = """<Nnet>
<Splice> 3 3
[ 0 ]
<AddShift> 3 3
<LearnRateCoef> 0 [ -8.311879 -8.600912 9.615928e-01 ]
<Rescale> 3 3
<LearnRateCoef> 0 [ 0.155775 0.154484 0.1527379 ]
</Nnet>
"""


@pytest.fixture
def mvn(tmp_path):
  path = tmp_path / "am.mvn"
  path.write_text(KALDI)
  return path


def test_reads_kaldi_text(mvn):
  shift_F, scale_F = read_mvn(mvn)
  assert shift_F.dtype == scale_F.dtype == np.float32
  np.testing.assert_array_equal(shift_F, np.float32([-8.311879, -8.600912, 0.9615928]))
  np.testing.assert_array_equal(scale_F, np.float32([0.155775, 0.154484, 0.1527379]))


def test_reading_and_applying_equal_funasr(tmp_path):
  from funasr.frontends import wav_frontend

  rng = np.random.default_rng(0)
  path = tmp_path / "am.mvn"
  write_mvn(path, rng.normal(-8, 3, 560), rng.uniform(0.1, 0.3, 560))
  theirs = wav_frontend.load_cmvn(str(path))
  shift_F, scale_F = read_mvn(path)
  np.testing.assert_array_equal(np.stack([shift_F, scale_F]), theirs.numpy())

  x_TF = rng.normal(12, 5, (50, 560)).astype(np.float32)
  expected = wav_frontend.apply_cmvn(torch.from_numpy(x_TF.copy()), theirs).numpy()
  # Equal on every processor: one sum and one product, each rounded by itself.
  np.testing.assert_array_equal((x_TF + shift_F) * scale_F, expected)


def test_components_of_different_lengths_are_refused(mvn):
  mvn.write_text(KALDI.replace("<AddShift> 3 3", "<AddShift> 2 2").replace("-8.600912 ", ""))
  with pytest.raises(ValueError, match="2 values of <AddShift>, 3 of <Rescale>; must be equal"):
    read_mvn(mvn)


def test_brackets_may_touch_words(mvn):
  expected = read_mvn(mvn)
  mvn.write_text(KALDI.replace("[ ", "[").replace(" ]\n<", "]<"))
  np.testing.assert_array_equal(read_mvn(mvn), expected)


def test_a_file_of_another_width_is_refused(mvn):
  assert len(read_mvn(mvn, width=3)[0]) == 3
  with pytest.raises(ValueError, match="am.mvn: has 3 values, the features have 560"):
    read_mvn(mvn, width=560)


def test_round_trip_keeps_every_bit(tmp_path):
  rng = np.random.default_rng(1)
  shift_F = (rng.normal(size=400) * 10.0 ** rng.integers(-30, 30, 400)).astype(np.float32)
  scale_F = rng.uniform(1e-3, 1e3, 400).astype(np.float32)
  write_mvn(tmp_path / "x.mvn", shift_F, scale_F)
  for read, written in zip(read_mvn(tmp_path / "x.mvn"), (shift_F, scale_F)):
    np.testing.assert_array_equal(read, written)


@pytest.mark.parametrize(
  ("old", "new", "word"),
  [
    ("<Rescale>", "<Scale>", "no <Rescale>"),
    ("0.1527379 ]", "0.1527379", "no <Rescale>"),
    ("-8.600912 ", "", "has 2 values, but its sizes are 3 3"),
    ("-8.600912", "minus8", "minus8"),
    ("-8.600912", "nan", "NaN"),
    ("<LearnRateCoef>", "<Momentum>", "<LearnRateCoef>"),
    ("<LearnRateCoef> 0 [ -8", "<LearnRateCoef> 0] [ -8", "no <AddShift>"),
    ("<LearnRateCoef> 0 [ 0.155775", "<LearnRateCoef> [ 0 ] 0 [ 0.155775", "<Rescale>"),
    ("<AddShift>", "x<AddShift>", "no <AddShift>"),
    ("0.154484 ", "0.154484 [ ", "no <Rescale>"),
    ("<AddShift> 3 3\n<LearnRateCoef> 0 [ -8.311879 ", "<AddShift> 2 2\n<LearnRateCoef> 0 [ ", "2"),
  ],
)
def test_damaged_files_are_named(mvn, old, new, word):
  assert old in KALDI
  mvn.write_text(KALDI.replace(old, new))
  with pytest.raises(ValueError, match=word) as caught:
    read_mvn(mvn)
  assert "am.mvn" in str(caught.value)


def test_files_that_are_no_text_or_not_there(tmp_path):
  os.mkfifo(tmp_path / "pipe")  # it would block until something writes to it
  for path in (tmp_path, tmp_path / "pipe"):
    with pytest.raises(ValueError, match=f"{path}: is not a regular file"):
      read_mvn(path)
  with pytest.raises(FileNotFoundError, match="gone.mvn"):
    read_mvn(tmp_path / "gone.mvn")
  (tmp_path / "am.mvn").write_bytes(b"\xff\xfe\x00\x80" * 10)
  with pytest.raises(ValueError, match="not text"):
    read_mvn(tmp_path / "am.mvn")


@pytest.mark.parametrize(
  ("shift", "scale"), [([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]]), ([np.nan], [1.0]), ([], [])]
)
def test_writing_nonsense_is_refused(tmp_path, shift, scale):
  with pytest.raises(ValueError, match="am.mvn"):
    write_mvn(tmp_path / "am.mvn", np.array(shift), np.array(scale))
  assert not (tmp_path / "am.mvn").exists()


def test_estimate_normalises_its_own_data():
  rng = np.random.default_rng(2)
  # A large mean and a small spread, the case in which sums of squares cancel.
  parts = [rng.normal([1000, -5, 3], [0.01, 2, 0], (n, 3)) for n in (1, 0, 700, 40)]
  shift_F, scale_F = estimate(iter(parts))
  together = np.concatenate(parts)
  # Sums in float64, stored as float32.
  shift, scale = -together.mean(axis=0), 1 / together.std(axis=0)[:2]
  assert_within(shift_F, shift, rounding(1, np.abs(shift)))
  assert_within(scale_F[:2], scale, rounding(1, scale))
  with exceeds_the_bound():  # a deviation with n - 1
    assert_within(scale_F[:2], 1 / together.std(axis=0, ddof=1)[:2], rounding(1, scale))
  assert scale_F[2] == 1


@pytest.mark.parametrize(
  ("features", "word"),
  [
    ([], "0 frames"),
    ([np.zeros((0, 3))], "0 frames"),
    ([np.zeros((2, 3)), np.zeros((2, 4))], "number 1"),
    ([np.zeros(3)], "number 0"),
    ([np.full((2, 3), np.inf)], "infinite"),
  ],
)
def test_estimating_from_nonsense_is_refused(features, word):
  with pytest.raises(ValueError, match=word):
    estimate(features)
