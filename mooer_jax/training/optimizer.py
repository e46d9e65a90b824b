"""Adam as MooER trains with it, as an optax transformation."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import optax

from mooer_jax import tree

WARMUPS = ("log", "linear")


DECAYS = ("linear", "cosine", "cosine_from_start", "constant")


def log_warmup(peak_lr: float, warmup_steps: int) -> optax.Schedule:
  """Warm-up of DeepSpeed's WarmupLR: peak * ln(step) / ln(warmup_steps), then the peak.

  Steps 0 and 1 give 0 (ln 1 = 0), so the first two updates only fill Adam's moments.

  Source: DeepSpeed's default `warmup_type`; MooER's published log (9.2605e-05 at step 600 for a
  peak of 1e-4 and 1000 steps).
  """
  scale = peak_lr / math.log(max(warmup_steps, 2))

  def schedule(step):
    lr = scale * jnp.log(jnp.maximum(step, 1).astype(jnp.float32))
    return jnp.minimum(lr, peak_lr)

  return schedule


def make_schedule(
  *,
  peak_lr: float,
  warmup_steps: int,
  total_steps: int,
  warmup: str = "log",
  decay: str = "linear",
  start_lr: float = 0.0,
  end_lr: float = 0.0,
) -> optax.Schedule:
  """Joins a warm-up and a decay.

  Args:
    peak_lr: reached at `warmup_steps`.
    warmup_steps: updates of warm-up; 0 starts at the peak.
    total_steps: where the decay reaches end_lr (and stays there); "constant" ignores it.
    warmup: "log" (MooER, DeepSpeed) or "linear" (from start_lr).
    decay: "linear", "cosine", "constant", or "cosine_from_start": the cosine counts from step 0, so
      that it is a little below the peak when the warm-up ends (SALMONN).
    start_lr: of the linear warm-up.
    end_lr: of the decay.

  Returns:
    step -> learning rate, where step counts the updates already done (the first update uses 0).
    DeepSpeed's WarmupDecayLR keeps the peak for one more step and so ends one step later.

  Raises:
    ValueError: for an unknown name, a negative length or no room for the decay.
  """
  if warmup not in WARMUPS:
    raise ValueError(f"warmup={warmup!r} is not one of {WARMUPS}")
  if decay not in DECAYS:
    raise ValueError(f"decay={decay!r} is not one of {DECAYS}")
  if warmup_steps < 0 or peak_lr < 0:
    raise ValueError(f"warmup_steps={warmup_steps} and peak_lr={peak_lr} must not be negative")
  if not (0 <= start_lr <= peak_lr and 0 <= end_lr <= peak_lr):
    raise ValueError(f"start_lr={start_lr} and end_lr={end_lr} must lie in 0 to peak_lr={peak_lr}")
  if decay != "constant" and total_steps <= warmup_steps:
    raise ValueError(
      f"total_steps={total_steps} leaves no room for the {decay} decay after "
      f'warmup_steps={warmup_steps}; raise total_steps, shorten the warm-up or set decay="constant"'
    )
  decay_steps = total_steps - warmup_steps
  after = {
    "linear": lambda: optax.linear_schedule(peak_lr, end_lr, decay_steps),
    "cosine": lambda: _cosine(peak_lr, end_lr, decay_steps, 0),
    "cosine_from_start": lambda: _cosine(peak_lr, end_lr, total_steps, warmup_steps),
    "constant": lambda: optax.constant_schedule(peak_lr),
  }[decay]()
  if warmup_steps == 0:
    return after
  before = {
    "log": lambda: log_warmup(peak_lr, warmup_steps),
    "linear": lambda: optax.linear_schedule(start_lr, peak_lr, warmup_steps),
  }[warmup]()
  return optax.join_schedules([before, after], [warmup_steps])


def _cosine(peak_lr: float, end_lr: float, steps: int, done: int) -> optax.Schedule:
  """Half a cosine of so many steps, of which some are done already."""
  schedule = optax.cosine_decay_schedule(peak_lr, steps, alpha=end_lr / peak_lr if peak_lr else 0.0)
  return lambda step: schedule(step + done)


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
    for name in ("eps", "weight_decay", "max_grad_norm"):
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
  if config.max_grad_norm:
    parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
  return optax.chain(*parts)
