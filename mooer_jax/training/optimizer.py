"""Adam as MooER trains with it, as an optax transformation."""

import dataclasses

import optax

from mooer_jax import tree
from mooer_jax.training.schedule import make_schedule

VECTORS = ("scale", "bias", "shift")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam with warm-up and decay; the defaults are MooER's.

  Attributes:
    peak_lr: learning rate at the end of the warm-up.
    warmup_steps: updates of warm-up.
    warmup: "log" (peak * ln(step) / ln(warmup_steps)) or "linear".
    decay: "linear" or "cosine" to end_lr at total_steps, "cosine_from_start" (SALMONN), "constant".
    total_steps: updates until the learning rate is end_lr.
    start_lr: where a linear warm-up begins.
    end_lr: where the decay ends.
    betas: decay rates of Adam's first and second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled (AdamW); not applied to norms and biases. 0 is plain Adam.
    grad_clip: largest global norm of a gradient; 0 does not clip.
  """

  peak_lr: float = 1e-4
  warmup_steps: int = 1000
  warmup: str = "log"
  decay: str = "linear"
  total_steps: int = 1_000_000
  start_lr: float = 0.0
  end_lr: float = 0.0
  betas: tuple[float, float] = (0.9, 0.999)
  eps: float = 1e-8
  weight_decay: float = 0.0
  grad_clip: float = 0.0

  def __post_init__(self):
    if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
      raise ValueError(f"betas={self.betas} must be two numbers in [0, 1)")
    for name in ("eps", "weight_decay", "grad_clip"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)} must not be negative")
    learning_rate(self)  # unknown names and impossible lengths fail here, not at step 0


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
  """The schedule of a config: number of updates already done -> learning rate."""
  return make_schedule(
    peak_lr=config.peak_lr,
    warmup_steps=config.warmup_steps,
    total_steps=config.total_steps,
    warmup=config.warmup,
    decay=config.decay,
    start_lr=config.start_lr,
    end_lr=config.end_lr,
  )


def decays(params):
  """Says which leaves take weight decay: those that are no norm scale, bias or CMVN shift.

  By name, since a stack of layers gives vectors two axes.
  """
  flat = {path: path.rsplit("/", 1)[-1] not in VECTORS for path in tree.flatten(params)}
  return tree.unflatten(flat)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Builds the optimizer: clip, Adam, weight decay, learning rate; the parts at 0 are left out.

  The update is that of `torch.optim.Adam` (`AdamW` with weight decay): moments corrected for
  their start, eps outside the root.
  """
  b1, b2 = config.betas
  parts = [
    optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps),
    optax.scale_by_learning_rate(learning_rate(config)),
  ]
  if config.weight_decay:
    parts.insert(1, optax.add_decayed_weights(config.weight_decay, mask=decays))
  if config.grad_clip:
    parts.insert(0, optax.clip_by_global_norm(config.grad_clip))
  return optax.chain(*parts)
