"""The original's own Q-Former, `models/Qformer.py`, against ours: opt-in, for it needs a clone.

    SALMONN_SRC=<clone of bytedance/SALMONN> pytest tests/parity/test_original_qformer.py -m nightly

The clone's branch is `salmonn`. Their file runs as it is, in float32 on the CPU, set up and cut
into windows as in their `models/salmonn.py`; our weights are theirs by the converter's table. What
stands in for an older transformers: its `file_utils`, three functions that moved out of
`modeling_utils` or went, the methods `get_head_mask` (no head is masked) and
`invert_attention_mask`, and `init_weights` without the tying of weights.
"""

import importlib.util
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from convert.core.shapes import connector_shapes
from mooer_jax.connectors.qformer import QFormerConfig, WindowedQFormer
from tests.parity import old_transformers, torch_models, torch_qformer
from tests.parity.torch_models import vary_vectors

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore::FutureWarning")]
POSITIONS = "speech_Qformer.bert.embeddings.position_ids"


@pytest.fixture
def original(monkeypatch):
  """Their module."""
  folder = os.environ.get("SALMONN_SRC")
  if not folder:
    pytest.skip("no clone of SALMONN: set SALMONN_SRC to run the original's code")
  path = Path(folder) / "models" / "Qformer.py"
  assert path.is_file(), f"SALMONN_SRC={folder} is no clone of SALMONN's branch salmonn"

  old_transformers.stand_in(monkeypatch)
  spec = importlib.util.spec_from_file_location("salmonn_qformer", path)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, "salmonn_qformer", module)
  spec.loader.exec_module(module)
  old_transformers.mend_qformer(module)
  return module


class Original(torch.nn.Module):
  """What their SALMONN holds of it, stripped as they strip it."""

  def __init__(self, module, c: QFormerConfig, input_width: int, output_width: int):
    super().__init__()
    config = transformers.BertConfig(  # of bert-base-uncased, but for the sizes
      hidden_size=c.hidden_size,
      num_hidden_layers=c.layers,
      num_attention_heads=c.heads,
      intermediate_size=c.intermediate_size,
    )
    config.encoder_width = input_width
    config.add_cross_attention = True
    config.cross_attention_freq = 1
    config.query_length = c.queries
    self.speech_Qformer = module.BertLMHeadModel(config)
    self.speech_query_tokens = torch.nn.Parameter(0.02 * torch.randn(1, c.queries, c.hidden_size))
    self.speech_llama_proj = torch.nn.Linear(c.hidden_size, output_width)
    bert = self.speech_Qformer.bert
    bert.embeddings.word_embeddings = bert.embeddings.position_embeddings = None
    for layer in bert.encoder.layer:
      layer.output = layer.intermediate = None
    self.speech_Qformer.cls = None

  def tokens(self, frames_BTD, c: QFormerConfig):
    """Their `_encode_auditory_feature` after the encoders."""
    B, _, D = frames_BTD.shape
    columns = torch.nn.functional.unfold(
      frames_BTD.transpose(1, 2).unsqueeze(2), (1, c.window), stride=(1, c.stride)
    )
    windows = columns.view(B, D, c.window, -1).permute(0, 3, 2, 1).reshape(-1, c.window, D)
    with torch.no_grad():
      out = self.speech_Qformer.bert(
        query_embeds=self.speech_query_tokens.expand(len(windows), -1, -1),
        encoder_hidden_states=windows,
        encoder_attention_mask=torch.ones(windows.shape[:-1], dtype=torch.long),
        return_dict=True,
      )
      projected = self.speech_llama_proj(out.last_hidden_state)
    return projected.view(B, -1, projected.shape[-1])


@pytest.mark.parametrize(
  "changes, input_width, frames",
  [
    ({}, 2048, 1500),
    ({}, 1280, 90),  # without BEATs
    (
      {"queries": 4, "stride": 9, "layers": 3, "hidden_size": 96, "intermediate_size": 200},
      80,
      100,
    ),
  ],
)
def test_the_original_gives_the_same_tokens(original, changes, input_width, frames):
  config = QFormerConfig(**changes)
  torch.manual_seed(0)
  theirs = vary_vectors(Original(original, config, input_width, 512), 0)
  tensors = theirs.state_dict()
  # Everything that they save has a leaf, but for the numbers that are passed over by name.
  params = torch_qformer.params({n: t for n, t in tensors.items() if n != POSITIONS})
  shapes = connector_shapes(config, input_width, 512)
  assert POSITIONS in tensors and len(tensors) == 1 + len(shapes)
  frames_BTD = np.random.default_rng(0).normal(size=(2, frames, input_width)).astype(np.float32)
  tokens, valid = jax.jit(WindowedQFormer(config, 512).apply)(
    {"params": params}, frames_BTD, np.ones((2, frames), bool)
  )
  assert np.asarray(valid).all()

  def run(module, dtype):
    return module.tokens(torch.tensor(frames_BTD, dtype=dtype), config)

  torch_models.assert_parity(tokens, run, theirs, layers=config.layers)
