"""Figures of the comparisons with the originals' own code."""

import os
from pathlib import Path

import pytest

from benchmarks.provenance import MODEL, commit_of, versions, write_result

SOURCES = (
  *MODEL,
  "convert/families",
  "convert/parts",
  "mooer_jax/audio",
  "mooer_jax/generation",
  "mooer_jax/inputs.py",
  "mooer_jax/transcribe",
)


@pytest.fixture
def record(request, repo_root):
  """`record(figures, clone="NAME")` writes $FIGURES/TEST_CASE.json, if FIGURES is set.

  NAME is the environment variable with the folder of the original's clone.
  """

  def write(figures, *, clone: str):
    if not (folder := os.environ.get("FIGURES")):
      return
    name = f"{request.path.stem.removeprefix('test_')}_{request.node.callspec.id}.json"
    test = request.path.relative_to(repo_root).as_posix()
    write_result(
      Path(folder) / name,
      {
        **figures,
        "commit_of_the_original": commit_of(Path(os.environ[clone])),
        "versions": versions("jax", "jaxlib", "flax", "torch", "transformers"),
      },
      (*SOURCES, test),
      command=f"{clone}=CLONE FIGURES={folder} python -m pytest -m nightly {test}",
    )

  return write
