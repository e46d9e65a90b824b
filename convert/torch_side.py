"""The original models in PyTorch, run from their own files by their own packages.

For `convert verify`: nothing here goes through our tables, so that a mistake in them shows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.encoders.sanm import SANMConfig

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
) -> list[Stages]:
  """funasr's front end and encoder: of each clip "features" after CMVN [T, F], "encoder" [T, D]."""
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
  state = _state(weights)
  known = module.state_dict().keys()
  named = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
  module.load_state_dict({name: t.float() for name, t in named.items() if name in known})
  heard = []
  for waveform_N in waveforms:
    with torch.no_grad():
      features_BTF, frames_B = listen(
        torch.tensor(waveform_N)[None], torch.tensor([len(waveform_N)])
      )
      frames_BTD = module(features_BTF, frames_B)[0]
    heard.append({"features": features_BTF[0].numpy(), "encoder": frames_BTD[0].numpy()})
  return heard


def _state(path: Path) -> dict[str, torch.Tensor]:
  state = torch.load(path, map_location="cpu", weights_only=True)
  return state.get("state_dict", state) if isinstance(state.get("state_dict"), dict) else state


def adapt(adapter: Path, frames_TD: np.ndarray, stack: int) -> Stages:
  """MooER's adapter in two lines: "adapter" [S, D of the LLM]."""
  weight = {name: tensor.float() for name, tensor in _state(adapter).items()}
  whole = len(frames_TD) // stack * stack
  x = torch.tensor(frames_TD[:whole]).reshape(whole // stack, -1)
  linear = torch.nn.functional.linear
  at = "encoder_projector.linear"
  x = torch.relu(linear(x, weight[f"{at}1.weight"], weight[f"{at}1.bias"]))
  return {"adapter": linear(x, weight[f"{at}2.weight"], weight[f"{at}2.bias"]).numpy()}


def language_model(folder: Path, lora: Path | None = None) -> Any:
  """transformers' model in float32, with peft's LoRA around it where there is one."""
  from transformers import AutoModelForCausalLM

  named = {"gguf_file": folder.name} if folder.is_file() else {}
  source = folder.parent if named else folder
  module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **named)
  if lora is not None:
    from peft import PeftModel

    return PeftModel.from_pretrained(module, str(lora)).eval()
  return module.eval()


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
    module.generation_config = GenerationConfig()  # the folder's own may sample or penalise
    tokens_BA = module.generate(
      inputs_embeds=inputs_BSD, attention_mask=everywhere_BS, generation_config=options
    )
    given_BSD = torch.cat([inputs_BSD, embed(tokens_BA[:, :-1])], dim=1)
    logits_BSV = module(inputs_embeds=given_BSD).logits
  logits_AV = logits_BSV[0, inputs_BSD.shape[1] - 1 :].float().numpy()
  return {"tokens": tokens_BA[0].numpy(), "logits": logits_AV}
