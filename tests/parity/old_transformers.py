"""What stands in for an older transformers under the original's own model files."""

import sys
import types

import torch
import transformers
from transformers import modeling_utils


def stand_in(monkeypatch) -> None:
  """`file_utils`, and three functions that moved out of `modeling_utils` or went."""

  def unused(*args, **kwargs):
    raise AssertionError("not needed here")

  file_utils = types.ModuleType("transformers.file_utils")
  file_utils.ModelOutput = transformers.utils.ModelOutput
  monkeypatch.setitem(sys.modules, "transformers.file_utils", file_utils)
  for name in ("find_pruneable_heads_and_indices", "prune_linear_layer"):
    monkeypatch.setattr(modeling_utils, name, unused, raising=False)
  chunking = transformers.pytorch_utils.apply_chunking_to_forward
  monkeypatch.setattr(modeling_utils, "apply_chunking_to_forward", chunking, raising=False)


def mend_qformer(module) -> None:
  """`get_head_mask` (none is masked), `invert_attention_mask`, `init_weights` without tying."""

  def invert_attention_mask(self, mask_NS):
    return (1 - mask_NS[:, None, None].float()) * torch.finfo(torch.float32).min

  module.BertModel.get_head_mask = lambda self, mask, layers: [None] * layers
  module.BertModel.invert_attention_mask = invert_attention_mask
  module.BertPreTrainedModel.init_weights = lambda self: self.apply(self._init_weights)
