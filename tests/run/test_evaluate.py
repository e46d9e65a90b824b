"""eval.py's work on a small trained model: every utterance decoded, scored and written."""

import json
from pathlib import Path

import pytest

from mooer_jax.data.shards import read_list
from mooer_jax.evaluation.text_files import read_text
from mooer_jax.run.evaluate import evaluate
from mooer_jax.run.train import train


def test_evaluation_decodes_all_and_scores(config, data_list, tmp_path):
  config.train.steps = 12
  train(config)
  config.eval.out = str(tmp_path / "scored")
  scores = evaluate(config, config.workdir)
  written = read_text(tmp_path / "scored" / "text")
  assert len(written) == 24 == len(scores["character"].utterances)
  report = json.loads((tmp_path / "scored" / "report.json").read_text("utf-8"))
  assert report["config"]["metric"] == "character"
  assert report["reference_tokens"] == 48  # two digits each
  assert (tmp_path / "scored" / "report.txt").exists()

  # The same with references in a file, one of which no clip belongs to.
  references = tmp_path / "text"
  lines = [f"{key}\t31" for key in written] + ["nobody\t31"]
  references.write_text("\n".join(lines) + "\n", "utf-8")
  config.eval.references = str(references)
  again = evaluate(config, config.workdir)
  assert again["character"].missing == ("nobody",)
  assert again["character"].counts.reference == 50


def test_a_wrong_checkpoint_is_named(config, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    evaluate(config, str(tmp_path / "nowhere"))
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    evaluate(config, str(tmp_path))


def test_the_list_is_what_pack_wrote(data_list):
  assert [Path(p).name for p in read_list(data_list)] == [f"shards_{i:09d}.tar" for i in range(4)]
