"""The original models in PyTorch, run from their own files by their own packages.

For `convert verify`: nothing here goes through our tables, so that a mistake in them shows. Files
are opened by our readers where the originals would not find what is nested in them.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.encoders.sanm import SANMConfig

from .encoder import find_prefix
from .errors import ConversionError
from .mooer import TUNED_ENCODER
from .readers import Source, open_source

Stages = dict[str, np.ndarray]


def sanm_encoder(config: SANMConfig):
  """funasr's encoder of the same sizes, with random weights."""
  from funasr.models.sanm.encoder import SANMEncoder

  return SANMEncoder(
    input_size=config.input_width,
    output_size=config.width,
    attention_heads=config.heads,
    linear_units=config.mlp_width,
    num_blocks=config.layers,
    input_layer="pe",
    normalize_before=True,
    kernel_size=config.memory_kernel,
    sanm_shfit=0,
    selfattention_layer_type="sanm",
  )


def hear(
  weights: Path,
  cmvn: Path,
  config: SANMConfig,
  frontend: FrontendConfig,
  waveforms: Sequence[np.ndarray],
  *,
  tuned: Path | None = None,
) -> list[Stages]:
  """funasr's front end and encoder: of each clip "features" after CMVN [T, F], "encoder" [T, D].

  Args:
    weights: file with the encoder.
    cmvn: am.mvn.
    config, frontend: sizes, as the original's are.
    waveforms: clips [N].
    tuned: MooER's adapter file; the encoder's tensors in it, if it was trained along, go over those
      in `weights`, as the original loads one file after the other.
  """
  from funasr.frontends.wav_frontend import WavFrontend

  listen = WavFrontend(
    cmvn_file=str(cmvn),
    fs=frontend.fbank.sample_rate_hz,
    n_mels=frontend.fbank.bins,
    lfr_m=frontend.lfr_window,
    lfr_n=frontend.lfr_stride,
    dither=0.0,
  )
  module = sanm_encoder(config).eval()
  source = open_source(weights)
  state = _state(source, find_prefix(source) or "")
  if tuned is not None:
    state |= _state(open_source(tuned), TUNED_ENCODER)
  known = module.state_dict().keys()
  if missing := sorted(known - state.keys()):
    raise ConversionError(f"{weights}: {missing[0]} is missing ({len(missing)} such tensors)")
  module.load_state_dict({name: tensor for name, tensor in state.items() if name in known})
  heard = []
  for waveform_N in waveforms:
    with torch.no_grad():
      features_BTF, frames_B = listen(
        torch.tensor(waveform_N)[None], torch.tensor([len(waveform_N)])
      )
      frames_BTD = module(features_BTF, frames_B)[0]
    heard.append({"features": features_BTF[0].numpy(), "encoder": frames_BTD[0].numpy()})
  return heard


def _state(source: Source, prefix: str = "") -> dict[str, torch.Tensor]:
  """float32 tensors by what their names have behind the prefix."""
  return {
    name.removeprefix(prefix): torch.from_numpy(source.read(name).astype(np.float32))
    for name in source.tensors
    if name.startswith(prefix)
  }


def adapt(adapter: Path, clips: Sequence[Stages], stack: int) -> list[Stages]:
  """MooER's adapter in two lines: each clip with "adapter" [S, D of the LLM] besides."""
  weight = _state(open_source(adapter), "encoder_projector.")
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


def language_model(folder: Path, lora: Path | None = None) -> Any:
  """transformers' model in float32, with peft's LoRA around it where there is one.

  Raises:
    ConversionError: if transformers or peft does not find a tensor where it looks for it.
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
  module.generation_config = GenerationConfig()  # the folder's own may sample or penalise
  return (module if lora is None else _with_lora(module, lora)).eval()


def _with_lora(module, folder: Path) -> Any:
  from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

  wrapped = get_peft_model(module, PeftConfig.from_pretrained(str(folder)))
  # Some files have the adapter's name in each tensor's; peft puts it there itself.
  state = {
    re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", name): tensor
    for name, tensor in _state(open_source(folder)).items()
  }
  loaded: Any = set_peft_model_state_dict(wrapped, state)
  odd = [name for name in loaded.missing_keys if ".lora_" in name] + loaded.unexpected_keys
  if odd:
    raise ConversionError(f"{folder}: peft does not find, or not know, {odd[0]} ({len(odd)} such)")
  return wrapped


def answer(
  module,
  prompt_S: Sequence[int],
  *,
  speech_SD: np.ndarray | None = None,
  eos_id: int | None,
  max_new_tokens: int,
) -> Stages:
  """Greedy decoding by transformers' generate.

  Returns:
    "tokens" [A], and "logits" [A, V] with these tokens given.
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
    inputs_BSD = embed(torch.tensor([list(prompt_S)]))
    if speech_SD is not None:
      inputs_BSD = torch.cat([torch.tensor(speech_SD)[None], inputs_BSD], dim=1)
    everywhere_BS = torch.ones(inputs_BSD.shape[:2], dtype=torch.long)
    tokens_BA = module.generate(
      inputs_embeds=inputs_BSD, attention_mask=everywhere_BS, generation_config=options
    )
    given_BSD = torch.cat([inputs_BSD, embed(tokens_BA[:, :-1])], dim=1)
    logits_BSV = module(inputs_embeds=given_BSD).logits
  logits_AV = logits_BSV[0, inputs_BSD.shape[1] - 1 :].float().numpy()
  return {"tokens": tokens_BA[0].numpy(), "logits": logits_AV}
