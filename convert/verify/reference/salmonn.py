"""SALMONN: Whisper, BEATs, the Q-Former and the LLM, put together from its files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mooer_jax.prompts import QUESTION, SPEECH, encode_prompt, fill_template

from ...core.errors import ConversionError
from ...core.kind import Original, Request, Stages
from ...readers import Source, open_source
from ...readers.torch_file import TorchFile
from .beats import run_beats_encoder
from .language_model import generate_greedily, load_llm, load_state, state_of, with_lora
from .qformer import run_qformer
from .whisper import RATE_HZ, check_context, run_whisper_encoder

# The model section of the published configuration.
PUBLISHED = {
  "second_per_window": 0.333333,
  "second_stride": 0.333333,
  "lora_alpha": 32,
  "prompt_template": "USER: {}\nASSISTANT:",
}
NORMS = {"whisper": "ln_speech", "beats": "ln_audio"}
MIN_SAMPLES = RATE_HZ  # the original pads clips to one second
_LLM = "llama_model."
# The original adds a token [PAD] to its LLM, which ours does not have: one row at the end.
_ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def run(request: Request) -> Original:
  """Runs salmonn_v1.pth with the files of --whisper, --llm and, if it has them, --beats."""
  config, options, tokenizer = request.config, request.options, request.tokenizer
  assert options.whisper is not None and options.llm is not None and tokenizer is not None
  kinds = [encoder.kind for encoder in config.encoders]
  if kinds not in (["whisper"], ["whisper", "beats"]) or not config.encoder_norm:
    raise ConversionError(f"{request.about.folder}: its encoders are {kinds}, not SALMONN's")
  if (options.beats is not None) != ("beats" in kinds):
    hint = "leave out --beats" if options.beats else "name the file with --beats"
    raise ConversionError(f"{request.about.folder}: its encoders are {', '.join(kinds)}; {hint}")
  check_context(request)
  asked = next((text for _, text in config.prompts if QUESTION not in text), None)
  if asked is None:
    raise ConversionError(
      f"{request.about.folder}: all of its prompts take a question; verify needs one that does not"
    )
  source = open_source(request.src, part="model")
  told = training_options(request.src, options.lora_config)

  padded = [np.pad(x_N, (0, max(0, MIN_SAMPLES - len(x_N)))) for x_N in request.waveforms]
  tuned = state_of(source, "speech_encoder.")
  streams = [run_whisper_encoder(options.whisper, padded, tuned=tuned)]
  if options.beats is not None:
    tuned = state_of(source, "beats.")
    streams.append(run_beats_encoder(options.beats, padded, tuned=tuned))
  before, after = told["prompt_template"].format(asked).split(SPEECH)
  theirs = encode_prompt(tokenizer, (before, after))
  model = _load_llm(source, options.llm, told)
  clips = []
  for of_clip in zip(*streams, strict=True):
    frames = [(NORMS[kind], stages["encoder"]) for kind, stages in zip(kinds, of_clip)]
    clip: Stages = {}
    for kind, stages in zip(kinds, of_clip):
      prefix = f"{kind} " if len(kinds) > 1 else ""
      clip |= {f"{prefix}{stage}": x for stage, x in stages.items()}
    clip["adapter"] = run_qformer(source, frames, told)
    clip |= generate_greedily(
      model,
      *theirs,
      speech_SD=clip["adapter"],
      eos_id=request.eos_id,
      max_new_tokens=request.max_new_tokens,
    )
    clips.append(clip)
  return Original(
    clips, prompt=encode_prompt(tokenizer, fill_template(config.chat_template, asked))
  )


def training_options(file: Path, lora_config: Path | None) -> dict[str, Any]:
  """The configuration of training in the file, else the published one; LoRA's of --lora-config."""
  content = TorchFile(file).content()
  options = {**PUBLISHED, **(content.get("config") or {}).get("model", {})}
  if lora_config is not None:
    path = lora_config / "adapter_config.json" if lora_config.is_dir() else lora_config
    told = json.loads(path.read_text("utf-8-sig"))
    options |= {name: told.get(name) for name in ("lora_alpha", "use_rslora")}
  return options


def _load_llm(source: Source, folder: Path, told: Mapping[str, Any]) -> Any:
  """The LLM of a folder with the tensors that SALMONN's file has of it, its LoRA by peft."""
  state = state_of(source, _LLM)
  added = {name: tensor for name, tensor in state.items() if ".lora_" in name}
  module = load_llm(folder)
  tuned = dict(module.state_dict())
  for name in state.keys() - added.keys():
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if plain in tuned:
      tuned[plain] = state[name][: len(tuned[plain])] if plain in _ROWS else state[name]
  load_state(module, tuned, folder)
  if not added:
    return module
  from peft import LoraConfig

  config = LoraConfig(
    r=next(len(tensor) for name, tensor in added.items() if ".lora_A." in name),
    lora_alpha=told["lora_alpha"],
    use_rslora=bool(told.get("use_rslora")),
    target_modules=sorted({re.split(r"\.lora_[AB]", name)[0].split(".")[-1] for name in added}),
    task_type="CAUSAL_LM",
  )
  return with_lora(module, config, added, source.path)
