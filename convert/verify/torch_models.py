"""The original models in PyTorch, run from their own files by their own packages.

For `convert verify`: nothing here goes through our tables, so that a mistake in them shows. Files
are opened by our readers where the originals would not find what is nested in them. Encoders are in
torch_encoders.py.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mooer_jax.connectors.qformer import QFormerConfig

from ..core.errors import ConversionError
from ..readers import Source, open_source
from .reference import qformer as reference_qformer

Stages = dict[str, np.ndarray]
State = Mapping[str, torch.Tensor]
_LLM = "llama_model."
# The original gives its LLM a token [PAD], which ours does not have: one row at the end.
_ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def state_of(source: Source, prefix: str = "") -> dict[str, torch.Tensor]:
  """float32 tensors by what their names have behind the prefix."""
  return {
    name.removeprefix(prefix): torch.from_numpy(source.read(name).astype(np.float32))
    for name in source.tensors
    if name.startswith(prefix)
  }


def load(module, state: State, origin: Path) -> Any:
  """Puts tensors into a module, which takes those that it knows and needs all of them.

  Raises:
    ConversionError: if one is missing or of another shape.
  """
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


def language_model(folder: Path, tuned: State | None = None) -> Any:
  """transformers' model in float32.

  Args:
    folder: of the LLM, or a GGUF file.
    tuned: tensors that were trained along, which replace those of the folder.

  Raises:
    ConversionError: if transformers does not find a tensor where it looks for it.
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
      f"{folder}: transformers does not find {missing[0]} ({len(missing)} such tensors), so there"
      " is nothing to compare with; save the model with its save_pretrained"
    )
  if tuned:
    load(module, {**module.state_dict(), **tuned}, folder)
  module.generation_config = GenerationConfig()  # the folder's own may sample or penalise
  return module.eval()


def lora_of_folder(module, folder: Path) -> Any:
  """peft's LoRA of a folder of its `save_pretrained` around a model."""
  from peft import PeftConfig

  return with_lora(
    module, PeftConfig.from_pretrained(str(folder)), state_of(open_source(folder)), folder
  )


def with_lora(module, config: Any, state: State, origin: Path) -> Any:
  """peft's LoRA around a model.

  Args:
    module: the model.
    config: peft's LoraConfig.
    state: the LoRA's tensors under peft's names, with or without the adapter's name in them.
    origin: what errors name.

  Raises:
    ConversionError: if peft does not find a tensor, or not know one.
  """
  from peft import get_peft_model, set_peft_model_state_dict

  wrapped = get_peft_model(module, config)
  # Some files have the adapter's name in each tensor's; peft puts it there itself.
  plain = {
    re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", name): tensor
    for name, tensor in state.items()
  }
  loaded: Any = set_peft_model_state_dict(wrapped, plain)
  odd = [name for name in loaded.missing_keys if ".lora_" in name] + loaded.unexpected_keys
  if odd:
    raise ConversionError(f"{origin}: peft does not find, or not know, {odd[0]} ({len(odd)} such)")
  return wrapped.eval()


def answer(
  module,
  before_S: Sequence[int],
  after_S: Sequence[int],
  *,
  speech_SD: np.ndarray | None = None,
  eos_id: int | None,
  max_new_tokens: int,
) -> Stages:
  """Greedy decoding by transformers' generate.

  Args:
    module: the language model.
    before_S, after_S: the prompt's tokens before and after the speech; one may be empty.
    speech_SD: embeddings of what was heard.
    eos_id: token that ends an answer.
    max_new_tokens: the answer's length at most.

  Returns:
    "prompt" [S, D], the embeddings; "tokens" [A]; "logits" [A, V] with these tokens given.
  """
  from transformers import GenerationConfig

  embed = module.get_input_embeddings()
  options = GenerationConfig(
    max_new_tokens=max_new_tokens,
    do_sample=False,
    eos_token_id=eos_id,
    pad_token_id=0 if eos_id is None else eos_id,
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
    logits_BSV = module(inputs_embeds=given_BSD).logits
  logits_AV = logits_BSV[0, inputs_BSD.shape[1] - 1 :].float().numpy()
  return {
    "prompt": inputs_BSD[0].numpy(),
    "tokens": tokens_BA[0].numpy(),
    "logits": logits_AV,
  }


def adapt(adapter: Path, clips: Sequence[Stages], stack: int) -> list[Stages]:
  """MooER's adapter in two lines: each clip with "adapter" [S, D of the LLM] besides."""
  weight = state_of(open_source(adapter), "encoder_projector.")
  linear = torch.nn.functional.linear
  adapted = []
  for clip in clips:
    frames_TD = clip["encoder"]
    whole = len(frames_TD) // stack * stack
    x = torch.tensor(frames_TD[:whole]).reshape(whole // stack, -1)
    x = torch.relu(linear(x, weight["linear1.weight"], weight["linear1.bias"]))
    x = linear(x, weight["linear2.weight"], weight["linear2.bias"])
    adapted.append({**clip, "adapter": x.numpy()})
  return adapted


def connect_windows(
  source: Source, heard: Mapping[str, np.ndarray], config: QFormerConfig
) -> np.ndarray:
  """SALMONN's norms, its streams side by side, and the windows of its Q-Former.

  Args:
    source: salmonn_v1.pth.
    heard: name of the norm ("ln_speech", "ln_audio") -> a clip's frames [T, D].
    config: the Q-Former's sizes and windows.

  Returns:
    Speech tokens [S, D of the LLM].
  """
  state = {
    first + name: tensor
    for first in ("ln_", "speech_")
    for name, tensor in state_of(source, first).items()
  }
  normed = [
    F.layer_norm(torch.tensor(x_TD), x_TD.shape[-1:], state[f"{n}.weight"], state[f"{n}.bias"])
    for n, x_TD in heard.items()
  ]
  longest = max(map(len, normed))
  frames_TD = torch.cat([F.pad(x_TD, (0, 0, 0, longest - len(x_TD))) for x_TD in normed], dim=-1)
  widths = frames_TD.shape[-1], len(state["speech_llama_proj.weight"])
  module = load(reference_qformer.QFormer(config, *widths), state, source.path)
  return reference_qformer.tokens(module, frames_TD[None], config)[0].numpy()


def salmonn_llm(source: Source, folder: Path, *, lora: Mapping[str, Any], vocab: int) -> Any:
  """The LLM of a folder with what SALMONN's file holds of it, its LoRA by peft.

  Args:
    source: salmonn_v1.pth.
    folder: of the LLM.
    lora: lora_alpha and use_rslora of training.
    vocab: rows of the LLM's embedding.
  """
  state = state_of(source, _LLM)
  added = {name: tensor for name, tensor in state.items() if ".lora_" in name}
  tuned = {}
  for name in state.keys() - added.keys():
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    tuned[plain] = state[name][:vocab] if plain in _ROWS else state[name]
  tuned = {name: tensor for name, tensor in tuned.items() if not name.endswith(".inv_freq")}
  module = language_model(folder, tuned)
  if not added:
    return module
  from peft import LoraConfig

  config = LoraConfig(
    r=next(len(tensor) for name, tensor in added.items() if ".lora_A." in name),
    lora_alpha=lora["lora_alpha"],
    use_rslora=bool(lora.get("use_rslora")),
    target_modules=sorted({re.split(r"\.lora_[AB]", name)[0].split(".")[-1] for name in added}),
    task_type="CAUSAL_LM",
  )
  return with_lora(module, config, added, source.path)
