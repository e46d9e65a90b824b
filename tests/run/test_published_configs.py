"""The configs of SALMONN's published stages hold together, at their full sizes."""

import pytest

from configs import salmonn, salmonn_activation
from mooer_jax.run.config import Run

STAGES = [(salmonn, ",1"), (salmonn, ",2"), (salmonn_activation, "")]


@pytest.mark.parametrize("module, stage", STAGES)
@pytest.mark.parametrize("size, width", [("7b", 4096), ("13b", 5120)])
def test_a_stage_is_read(module, stage, size, width, tmp_path):
  config = module.get_config(size + stage)
  config.data.shards = str(tmp_path / "train.json")
  run = Run.read(config)
  assert run.model.decoder.width == width
  assert run.model.decoder.lora_scale == 4.0
  if module is salmonn_activation:
    assert config.activation.task in dict(run.model.prompts)
    assert run.train.steps == config.activation.clips
    assert run.probe.every == 1 and run.probe.instructions == (config.activation.task,)
