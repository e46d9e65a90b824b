"""Small models of transformers and peft with random weights, saved as their users save them."""

from pathlib import Path

import torch

from mooer_jax.text.tokenizer import Tokenizer

CHARACTERS = "abcdefghijklmnopqrstuvwxyzT. "
SIZES = dict(
  vocab_size=61,
  hidden_size=40,
  intermediate_size=56,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
)


def vary(module, seed=0):
  """Moves norms and biases off their ones and zeros, so that a mix-up shows."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in module.parameters():
      if parameter.ndim == 1:
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
  return module.eval()


def llm(kind: str, *, dtype=torch.float32, seed=0, **changes):
  """Qwen2ForCausalLM or LlamaForCausalLM."""
  import transformers

  name = {"qwen2": "Qwen2", "llama": "Llama"}[kind]
  torch.manual_seed(seed)
  rope = {"rope_type": "default", "rope_theta": 5e4}
  config = getattr(transformers, f"{name}Config")(
    **{**SIZES, "rope_parameters": rope, "rms_norm_eps": 1e-5, **changes}
  )
  module = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
  return vary(module, seed)


def saved_llm(folder: Path, kind: str, *, shard="10GB", dtype=torch.float32, seed=0, **changes):
  """(module, folder) of a model that was saved with save_pretrained, and a tokenizer."""
  module = llm(kind, dtype=dtype, seed=seed, **changes)
  module.save_pretrained(folder, max_shard_size=shard)
  Tokenizer.from_characters(CHARACTERS).save(folder)
  return module, folder


def with_lora(module, *, seed=0, rank=3, alpha=7, targets=("q", "v", "down"), **options):
  """peft's LoRA around a model; B is random, for at its usual zeros LoRA would not show."""
  from peft import LoraConfig, get_peft_model

  torch.manual_seed(seed)
  names = [f"{target}_proj" for target in targets]
  config = LoraConfig(
    r=rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM", **options
  )
  module = get_peft_model(module, config)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      if "lora_B" in name:
        parameter.normal_(0, 0.05)
  return module.eval()
