"""Adam as MooER trains with it, as an optax transformation."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import optax

from mooer_jax import tree

# Names of the leaves that are norms, biases and CMVN.
VECTORS = ("scale", "bias", "shift", "mean", "var")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam with warm-up and decay; the defaults are MooER's.

  Attributes:
    peak_lr: learning rate after `warmup_steps`.
    warmup_steps: optimizer steps of warm-up; 0 starts at the peak.
    warmup: "log" (peak * ln(step) / ln(warmup_steps), DeepSpeed's) or "linear" from start_lr.
    decay: "linear", "cosine" or "exponential" to end_lr at total_steps, "constant", or
      "cosine_from_start": a cosine that counts from step 0, so it starts a little below the peak
      (SALMONN).
    total_steps: step from which on the learning rate is end_lr; "constant" ignores it.
    start_lr, end_lr: first learning rate of a linear warm-up, and last one of the decay.
    betas, eps: decay rates of Adam's moments, and the number added to the root of the second.
    weight_decay: decoupled (AdamW); not applied to norms and biases. 0 is plain Adam.
    max_grad_norm: largest global norm of a gradient; 0 does not clip.
  """

  RENAMED: ClassVar = {"grad_clip": "max_grad_norm"}
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
  max_grad_norm: float = 0.0

  def __post_init__(self):
    if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
      raise ValueError(f"betas={self.betas} must be two numbers in [0, 1)")
    for name in ("eps", "weight_decay", "max_grad_norm", "warmup_steps", "peak_lr"):
      if not 0 <= getattr(self, name) <= np.finfo(np.float32).max:
        raise ValueError(
          f"optimizer.{name}={getattr(self, name)}: must be finite in float32, not negative"
        )
    kinds = ("linear", "cosine", "cosine_from_start", "exponential", "constant")
    for name, allowed in (("warmup", ("log", "linear")), ("decay", kinds)):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name}={getattr(self, name)!r} is not one of {allowed}")
    for name in ("start_lr", "end_lr"):
      if not 0 <= (lr := getattr(self, name)) <= self.peak_lr:
        raise ValueError(f"{name}={lr} must be between 0 and peak_lr={self.peak_lr}")
    if self.decay == "exponential" and not self.end_lr:
      raise ValueError(
        'end_lr=0 is never reached by decay="exponential"; set optimizer.end_lr above 0'
      )
    if self.decay != "constant" and self.total_steps <= self.warmup_steps:
      raise ValueError(
        f"total_steps={self.total_steps} leaves no room for the {self.decay} decay after"
        f" warmup_steps={self.warmup_steps}; raise total_steps, shorten the warm-up or set"
        ' decay="constant"'
      )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
  """The schedule of a config: number of completed steps -> learning rate.

  Steps 0 and 1 of a logarithmic warm-up have rate 0 (ln 1 = 0), so they only fill Adam's moments.
  DeepSpeed's WarmupDecayLR keeps the peak for one more step and so ends one step later.

  Source: DeepSpeed's default `warmup_type`; MooER's published log (9.2605e-05 at step 600 for a
  peak of 1e-4 and 1000 steps).
  """
  c, decay_steps = config, config.total_steps - config.warmup_steps
  alpha = c.end_lr / c.peak_lr if c.peak_lr else 0.0
  whole_cosine = optax.cosine_decay_schedule(c.peak_lr, max(c.total_steps, 1), alpha=alpha)
  after = {
    "linear": lambda: optax.linear_schedule(c.peak_lr, c.end_lr, decay_steps),
    "cosine": lambda: optax.cosine_decay_schedule(c.peak_lr, decay_steps, alpha=alpha),
    "cosine_from_start": lambda: lambda step: whole_cosine(step + c.warmup_steps),
    "exponential": lambda: optax.exponential_decay(
      c.peak_lr, decay_steps, alpha, end_value=c.end_lr
    ),
    "constant": lambda: optax.constant_schedule(c.peak_lr),
  }[c.decay]()
  if c.warmup_steps == 0:
    return after

  def log_warmup(step):
    scale = c.peak_lr / math.log(max(c.warmup_steps, 2))
    return jnp.minimum(scale * jnp.log(jnp.maximum(step, 1.0)), c.peak_lr)

  if c.warmup == "log":
    before = log_warmup
  else:
    before = optax.linear_schedule(c.start_lr, c.peak_lr, c.warmup_steps)
  return optax.join_schedules([before, after], [c.warmup_steps])


def decays(params):
  """True for leaves with weight decay: all but norm scales, biases and CMVN shifts.

  Decided by name, since vectors of stacked layers have two axes.
  """
  flat = {path: path.rsplit("/", 1)[-1] not in VECTORS for path in tree.flatten(params)}
  return tree.unflatten(flat)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Gradient clipping, Adam, weight decay and learning rate; options at 0 are left out.

  The update equals that of `torch.optim.Adam` (`AdamW` with weight decay): bias-corrected moments,
  eps outside the square root.
  """
  b1, b2 = config.betas
  parts = [
    optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps),
    optax.scale_by_learning_rate(learning_rate(config)),
  ]
  if config.weight_decay:
    parts.insert(1, optax.add_decayed_weights(config.weight_decay, mask=decays))
  if config.max_grad_norm:
    parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
  return optax.chain(*parts)
