"""Inert classes for the few that DeepSpeed saves beside its weights.

torch.load builds only what it is told of. DeepSpeed's files name classes of that package for things
that a converter has no use for; these are built in their place, so that DeepSpeed need not be
installed and nothing of it runs.
"""


class Inert:
  """Takes any arguments and any state and does nothing with them."""

  def __init__(self, *args):
    pass

  def __setstate__(self, state):
    pass


class Stage(int):
  """The number that DeepSpeed's enumeration of ZeRO's stages stands for."""


STAND_INS: tuple[tuple[type, str], ...] = (
  (Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
  (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
  (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScalerBase"),
  (Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
  (Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
)
