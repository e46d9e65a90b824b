"""Qwen2 and LLaMA by transformers, LoRA by peft; and helpers of all references."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import ConversionError
from ...core.kind import Original, Request, Stages
from ...readers import Source, open_source

State = Mapping[str, torch.Tensor]
PROMPT = "Transcribe speech to text. "


def run(request: Request) -> Original:
  """Runs an LLM after a short prompt: that of a folder or GGUF file, or --llm with a LoRA."""
  if request.options.llm is None:
    module = load_llm(request.src)
  else:
    module = with_lora_of(load_llm(request.options.llm), request.src)
  if request.tokenizer is None:  # in a checkpoint of version 0.1
    prompt_S = list(range(min(16, request.config.decoder.vocab_size)))
  else:
    prompt_S = request.tokenizer.encode(PROMPT)
  return Original([generate_greedily(request, module, prompt_S, ())], prompt=(prompt_S, ()))


def state_of(source: Source, prefix: str = "") -> dict[str, torch.Tensor]:
  """Reads the tensors whose names begin with the prefix, in float32, without the prefix."""
  return {
    name.removeprefix(prefix): torch.from_numpy(source.read(name).astype(np.float32))
    for name in source.tensors
    if name.startswith(prefix)
  }


def load_state(module, state: State, origin: Path) -> Any:
  """Loads a module's part of `state`. Raises ConversionError for missing tensors, other shapes."""
  known = module.state_dict()
  if missing := sorted(known.keys() - state.keys()):
    raise ConversionError(f"{origin}: {missing[0]} is missing ({len(missing)} such tensors)")
  for name, tensor in known.items():
    if tensor.shape != state[name].shape:
      raise ConversionError(
        f"{origin}: {name} has shape {list(state[name].shape)}, the original {list(tensor.shape)}"
      )
  module.load_state_dict({name: state[name] for name in known})
  return module.eval()


def load_llm(folder: Path) -> Any:
  """Loads transformers' model of a folder or GGUF file in float32.

  Raises ConversionError if transformers misses a tensor, which it would initialize at random.
  """
  from transformers import AutoModelForCausalLM, GenerationConfig

  loader: Any = AutoModelForCausalLM
  named = {"gguf_file": folder.name} if folder.is_file() else {}
  source = folder.parent if named else folder
  module, found = loader.from_pretrained(
    source, dtype=torch.float32, output_loading_info=True, **named
  )
  if missing := sorted(found["missing_keys"]):
    raise ConversionError(
      f"{folder}: transformers does not find {missing[0]} ({len(missing)} such tensors), so it"
      " cannot be compared; save the model with its save_pretrained"
    )
  module.generation_config = GenerationConfig()  # the folder's own may sample or penalize
  return module.eval()


def with_lora_of(module, folder: Path) -> Any:
  """Wraps a model in the LoRA of a folder that peft's `save_pretrained` wrote."""
  from peft import PeftConfig

  config = PeftConfig.from_pretrained(str(folder))
  return with_lora(module, config, state_of(open_source(folder)), origin=folder)


def with_lora(module, config: Any, state: State, *, origin: Path) -> Any:
  """Wraps a model in peft's LoRA. Raises ConversionError if a tensor is missing or unknown."""
  from peft import get_peft_model, set_peft_model_state_dict

  wrapped = get_peft_model(module, config)
  # peft adds the adapter's name, which some files already have.
  plain = {
    re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", name): tensor
    for name, tensor in state.items()
  }
  loaded: Any = set_peft_model_state_dict(wrapped, plain)
  odd = [name for name in loaded.missing_keys if ".lora_" in name] + loaded.unexpected_keys
  if odd:
    raise ConversionError(
      f"{origin}: {odd[0]} is missing in peft or unknown to it ({len(odd)} such)"
    )
  return wrapped.eval()


def generate_greedily(
  request: Request,
  module,
  before_S: Sequence[int],
  after_S: Sequence[int],
  *,
  speech_SD: np.ndarray | None = None,
) -> Stages:
  """Decodes greedily by transformers' generate, after a prompt around embeddings of speech.

  Returns:
    "prompt" [S, D], embeddings; "tokens" [A]; with these tokens as input, "logits" [A, V], and
    "hidden" [A, D], the last hidden states after the final norm.
  """
  from transformers import GenerationConfig

  embed = module.get_input_embeddings()
  options = GenerationConfig(
    max_new_tokens=request.max_new_tokens,
    do_sample=False,
    eos_token_id=request.eos_id,
    pad_token_id=request.eos_id or 0,
  )
  with torch.no_grad():
    parts = [
      embed(torch.tensor([list(part_S)], dtype=torch.long)) for part_S in (before_S, after_S)
    ]
    if speech_SD is not None:
      parts.insert(1, torch.tensor(speech_SD)[None])
    inputs_BSD = torch.cat(parts, dim=1)
    everywhere_BS = torch.ones(inputs_BSD.shape[:2], dtype=torch.long)
    tokens_BA = module.generate(
      inputs_embeds=inputs_BSD, attention_mask=everywhere_BS, generation_config=options
    )
    given_BSD = torch.cat([inputs_BSD, embed(tokens_BA[:, :-1])], dim=1)
    found = module(inputs_embeds=given_BSD, output_hidden_states=True)
  logits_AV, hidden_AD = (
    x_BSD[0, inputs_BSD.shape[1] - 1 :].float().numpy()
    for x_BSD in (found.logits, found.hidden_states[-1])
  )
  return {
    "prompt": inputs_BSD[0].numpy(),
    "tokens": tokens_BA[0].numpy(),
    "logits": logits_AV,
    "hidden": hidden_AD,
  }
