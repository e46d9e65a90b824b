"""The sample that k-means sees, the codebook, and its folder."""

import dataclasses

import numpy as np
import pytest

from mooer_jax.units.codebook import Codebook, UnitsInfo, fit, sample

INFO = UnitsInfo("sanm", "e0", "c0", samples_per_token=4, sample_rate_hz=8, count=3, seed=1)


def _vectors(count, width=4, seed=0):
  return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_sample_does_not_depend_on_how_the_stream_is_cut(size):
  vectors_ND = _vectors(1000)
  blocks = np.split(vectors_ND, range(size, 1000, size))
  found_ND, seen = sample(blocks, 50, seed=3)
  whole_ND, _ = sample([vectors_ND], 50, seed=3)
  assert seen == 1000 and found_ND.shape == (50, 4)
  np.testing.assert_array_equal(found_ND, whole_ND)
  places = [int(np.flatnonzero((vectors_ND == x).all(1))[0]) for x in found_ND]
  assert places == sorted(set(places))  # each vector once, in order
  assert sample(blocks, 50, seed=4)[0].tolist() != found_ND.tolist()


def test_a_sample_is_uniform():
  """Each of 40 vectors is in a sample of 10 with probability 1/4: 5 standard deviations of room."""
  counts_N = np.zeros(40)
  for seed in range(400):
    found_ND, _ = sample(np.split(np.arange(40.0)[:, None], 8), 10, seed=seed)
    counts_N[found_ND[:, 0].astype(int)] += 1
  assert np.abs(counts_N - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize("count", [0, 3, 10])
def test_a_short_stream_is_kept_whole(count):
  found_ND, seen = sample([_vectors(count)] if count else [], 10, seed=0)
  assert len(found_ND) == seen == count


def test_clusters_far_apart_are_found_whatever_the_seed():
  centers_KD = 100 * np.eye(5, 8, dtype=np.float32)
  label_N = np.arange(500) % 5
  vectors_ND = centers_KD[label_N] + _vectors(500, 8)
  for seed in range(3):
    book = Codebook(fit(vectors_ND, 5, seed=seed), INFO)
    code_N = book.encode(vectors_ND)
    assert len({(a, b) for a, b in zip(label_N, code_N, strict=True)}) == 5
    # The noise is 8 of some 8 + 100^2 (1 - 1/5) of the variance.
    assert 0.995 < book.explained(vectors_ND) < 1
  again = fit(vectors_ND, 5, seed=2)
  np.testing.assert_array_equal(again, book.centroids_KD)


def test_each_vector_gets_the_nearest_centroid(monkeypatch):
  monkeypatch.setattr("mooer_jax.units.codebook._AT_A_TIME", 7)
  book = Codebook(_vectors(6, seed=1), INFO)
  vectors_ND = _vectors(40)
  distances_NK = ((vectors_ND[:, None] - book.centroids_KD[None]) ** 2).sum(-1)
  np.testing.assert_array_equal(book.encode(vectors_ND), distances_NK.argmin(1))
  assert book.encode(vectors_ND[:0]).shape == (0,)


def test_too_few_different_vectors_are_refused():
  with pytest.raises(ValueError, match="2 different vectors for 3 tokens; name more data"):
    fit(np.repeat(_vectors(2), 9, axis=0), 3, seed=0)


def test_a_folder_is_read_back_and_damage_is_named(tmp_path):
  book, folder = Codebook(_vectors(3), INFO), tmp_path / "out" / "units"
  book.save(folder)
  again = Codebook.load(folder)
  assert again.info == INFO
  np.testing.assert_array_equal(again.centroids_KD, book.centroids_KD)
  assert [path.name for path in folder.parent.iterdir()] == ["units"]
  (folder / "codebook.npz").write_bytes(b"PK")
  with pytest.raises(ValueError, match=r"codebook\.npz: damaged .*fit the units again"):
    Codebook.load(folder)
  (folder / "units.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"units\.json: not found; make it with mooer-jax"):
    Codebook.load(folder)
  dataclasses.replace(book, info=dataclasses.replace(INFO, count=4)).save(tmp_path / "other")
  with pytest.raises(ValueError, match=r"count=4, but the codebook has the shape \(3, 4\)"):
    Codebook.load(tmp_path / "other")


def test_units_of_another_encoder_are_refused(tmp_path):
  book = Codebook(_vectors(3), INFO)
  book.check_encoder("e0", tmp_path)
  with pytest.raises(ValueError, match="belong to an encoder sanm with the hash e0, but that of"):
    book.check_encoder("e1", tmp_path)
