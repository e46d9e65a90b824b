"""The same three workloads with PyTorch: transformers' Qwen2 (SDPA attention) and a plain LoRA."""

from typing import Any

import torch
from torch.nn import functional

from benchmarks.llm_sizes import DRY, FULL, GB, LR, Sizes, median_seconds, with_falling_losses
from convert.parts.hf_config import hf_config
from mooer_jax.decoders.llm import LLMConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(torch.nn.Module):
  """A frozen linear layer and its low-rank update; float32 factors, used in the input's dtype."""

  def __init__(self, base: torch.nn.Linear, rank: int, scale: float):
    super().__init__()
    self.base, self.scale = base, scale
    place = {"device": base.weight.device, "dtype": torch.float32}
    self.lora_A = torch.nn.Parameter(0.02 * torch.randn(rank, base.in_features, **place))
    self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, rank, **place))

  def forward(self, x):
    low = functional.linear(x, self.lora_A.to(x.dtype)) * self.scale
    return self.base(x) + functional.linear(low, self.lora_B.to(x.dtype))


def run(dry_run: bool) -> dict[str, Any]:
  sizes = DRY if dry_run else FULL
  device = "cuda" if torch.cuda.is_available() else "cpu"
  if not dry_run and device == "cpu":
    raise RuntimeError("torch finds no GPU; use --dry-run for the CPU")
  torch.manual_seed(0)
  with torch.device(device):  # not around the workloads, whose calls it would slow down
    model = build(sizes.llm)
    prompt_BSD, inputs_BSD = (
      torch.randn(sizes.rows, tokens, sizes.llm.hidden_size, dtype=torch.bfloat16)
      for tokens in (sizes.prompt, sizes.tokens)
    )
  add_lora(model, sizes)  # in all three workloads, as on the JAX side
  return {
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "decode": decode(model, prompt_BSD, sizes),
    "forward": forward(model, inputs_BSD, sizes),
    "train_step": train_step(model, inputs_BSD, sizes),
  }


def build(llm: LLMConfig):
  from transformers import AutoModelForCausalLM, Qwen2Config

  config = Qwen2Config(**hf_config(llm, "bfloat16"), attn_implementation="sdpa")
  return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def add_lora(model, sizes: Sizes) -> None:
  """Add LoRA to all seven projections."""
  for parent in list(model.modules()):
    for name, child in list(parent.named_children()):
      if name in TARGETS:
        setattr(parent, name, LoRALinear(child, sizes.llm.lora_rank, sizes.llm.lora_scale))


def measured(call, sizes: Sizes) -> dict[str, Any]:
  """Median seconds and peak memory of a call."""
  cuda = torch.cuda.is_available()

  def finished():
    call()
    if cuda:
      torch.cuda.synchronize()

  if cuda:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
  seconds = median_seconds(finished, sizes.repeats)
  peak = torch.cuda.max_memory_allocated() / GB if cuda else None
  return {"seconds": seconds, "memory_gb": peak}


def forward(model, inputs_BSD, sizes: Sizes) -> dict[str, Any]:
  @torch.no_grad()
  def call():
    hidden_BSD = model.model(inputs_embeds=inputs_BSD, use_cache=False).last_hidden_state
    model.lm_head(hidden_BSD[:, -sizes.answer :]).float()

  return measured(call, sizes)


def train_step(model, inputs_BSD, sizes: Sizes) -> dict[str, Any]:
  """With gradient checkpointing, as the JAX side recomputes its layers."""
  model.train()
  model.gradient_checkpointing_enable({"use_reentrant": False})
  trainable = [p for name, p in model.named_parameters() if "lora_" in name]
  for parameter in trainable:
    parameter.requires_grad_(True)
  optimizer = torch.optim.Adam(trainable, lr=LR)
  shape, device = (sizes.rows, sizes.answer), inputs_BSD.device
  target_BA = torch.randint(0, sizes.llm.vocab_size, shape, device=device)
  losses = []

  def call():
    hidden_BSD = model.model(inputs_embeds=inputs_BSD, use_cache=False).last_hidden_state
    logits_BAV = model.lm_head(hidden_BSD[:, -sizes.answer :]).float()
    loss = functional.cross_entropy(logits_BAV.flatten(0, 1), target_BA.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())

  return with_falling_losses(measured(call, sizes), losses)


def decode(model, prompt_BSD, sizes: Sizes) -> dict[str, Any]:
  valid_BS = torch.ones(prompt_BSD.shape[:2], dtype=torch.long, device=prompt_BSD.device)

  @torch.no_grad()
  def call():
    tokens_BS = model.generate(
      inputs_embeds=prompt_BSD,
      attention_mask=valid_BS,
      max_new_tokens=sizes.new,
      min_new_tokens=sizes.new,
      do_sample=False,
      pad_token_id=0,
    )
    assert tokens_BS.shape == (sizes.rows, sizes.new)

  return sizes.with_token_rate(measured(call, sizes))
