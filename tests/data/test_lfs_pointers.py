"""A Git LFS pointer, left by a clone without LFS, is named wherever a file is read."""

import pytest

from mooer_jax.audio.cmvn import read_mvn
from mooer_jax.data.dataset import train_batches
from mooer_jax.data.labels import LabelFile
from mooer_jax.data.pack import read_clips
from mooer_jax.data.readers.shards import read_list, read_shard
from mooer_jax.data.utterances import BadDataError
from mooer_jax.files import LFS_POINTER, LFS_REMEDY
from mooer_jax.text.tokenizer import Tokenizer

CONTENT = LFS_POINTER + b"v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
  "read", [read_list, LabelFile, read_mvn, lambda path: read_clips(path, path)]
)
def test_a_pointer_in_place_of_a_text_file_is_named(tmp_path, read):
  path = tmp_path / "file"
  path.write_bytes(CONTENT)
  with pytest.raises(ValueError, match=f"{path}: {LFS_REMEDY}"):
    read(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_pointer_in_a_tokenizer_is_named(tmp_path, name):
  (tmp_path / name).write_bytes(CONTENT)
  with pytest.raises(ValueError, match=f"{tmp_path / name}: {LFS_REMEDY}"):
    Tokenizer.from_folder(tmp_path)


def test_a_pointer_in_place_of_a_tar_is_named(shards, model_side):
  path = shards.add(1)
  path.write_bytes(CONTENT)
  [skipped] = read_shard(str(path))
  assert skipped.cause == "bad shard" and LFS_REMEDY in skipped.detail
  with pytest.raises(BadDataError, match=LFS_REMEDY):
    next(iter(train_batches(shards.config(), *model_side)))
