"""Perplexity evaluation on a mesh: rows that pad a batch are not measured."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from mooer_jax import checkpoint, speech_llm, tree
from mooer_jax.config import to_json
from mooer_jax.run.config import Run
from mooer_jax.run.decoding import load
from mooer_jax.run.perplexity import _measure
from mooer_jax.run.start import read_tokenizer


@pytest.mark.all_devices
def test_padding_rows_are_not_measured(config, clips, tmp_path):
  """The 6 clips in one batch of 6, and as 5 and 1; both are padded to the 8 devices."""
  entries = [{"path": str(clip.path), "text": clip.text, "task": "asr"} for clip in clips]
  (tmp_path / "clips.json").write_text(json.dumps({"annotation": entries}), "utf-8")
  config.eval.shards, config.eval.task = str(tmp_path / "clips.json"), ""
  config.data.buckets, config.data.answer_buckets = (84,), (8,)
  run = Run.read(config)
  folder = checkpoint.save(
    Path(config.workdir) / "step_00000001",
    params=tree.unstack_layers(
      jax.jit(lambda key: speech_llm.init(key, run.model))(jax.random.key(0))
    ),
    config_json=to_json(run.model),
    tokenizer=read_tokenizer(run).save,
    generation={"max_new_tokens": 6},
  )
  measured = []
  for rows in (6, 5):
    config.eval.batch_size = rows
    run = Run.read(config)
    [row], _ = _measure(run, run.eval, load(run, folder), instruction="asr", folder=folder, step=1)
    measured.append(row)
  one, two = measured
  assert one.tokens == two.tokens == sum(len(clip.text) + 1 for clip in clips)
  # The tokens have the same losses in both; their float32 sums differ in order.
  bound = 2 * one.tokens * np.finfo(np.float32).eps * math.log(one.perplexity)
  assert abs(math.log(one.perplexity / two.perplexity)) < bound
