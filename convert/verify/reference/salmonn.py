"""SALMONN: Whisper, BEATs, the Q-Former and the LLM, from its files."""

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
from .whisper import check_context, run_whisper_encoder

# The model section of the published configuration.
PUBLISHED = {
  "second_per_window": 0.333333,
  "second_stride": 0.333333,
  "lora_alpha": 32,
  "prompt_template": "USER: {}\nASSISTANT:",
}
NORMS = {"whisper": "ln_speech", "beats": "ln_audio"}
MIN_S = 1.0  # to which the original pads clips
_LLM = "llama_model."
# The original adds a row for [PAD] at the end of these, which our LLM does not have.
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
  prompt = next((text for _, text in config.prompts if QUESTION not in text), None)
  if prompt is None:
    raise ConversionError(
      f"{request.about.folder}: verify needs a prompt without {QUESTION} (config.json, prompts)"
    )
  source = open_source(request.src, part="model")
  training = training_options(request.src, options.lora_config)

  shortest = round(MIN_S * config.sample_rate_hz)
  padded = [np.pad(x_N, (0, max(0, shortest - len(x_N)))) for x_N in request.waveforms]
  tuned = state_of(source, "speech_encoder.")
  streams = [run_whisper_encoder(options.whisper, padded, tuned=tuned)]
  if options.beats is not None:
    tuned = state_of(source, "beats.")
    streams.append(run_beats_encoder(options.beats, padded, tuned=tuned))
  before, after = training["prompt_template"].format(prompt).split(SPEECH)
  theirs = encode_prompt(tokenizer, (before, after))
  model = _load_llm(source, options.llm, training)
  clips = []
  for of_clip in zip(*streams, strict=True):
    frames = [(NORMS[kind], stages["encoder"]) for kind, stages in zip(kinds, of_clip)]
    clip: Stages = {}
    for kind, stages in zip(kinds, of_clip):
      prefix = f"{kind} " if len(kinds) > 1 else ""
      clip |= {f"{prefix}{stage}": x for stage, x in stages.items()}
    clip["adapter"] = run_qformer(source, frames, training)
    clip |= generate_greedily(request, model, *theirs, speech_SD=clip["adapter"])
    clips.append(clip)
  return Original(
    clips, prompt=encode_prompt(tokenizer, fill_template(config.chat_template, prompt))
  )


def training_options(file: Path, lora_config: Path | None) -> dict[str, Any]:
  """Returns the training configuration of the file over the published one, and of --lora-config."""
  content = TorchFile(file).content()
  options = {**PUBLISHED, **(content.get("config") or {}).get("model", {})}
  if lora_config is not None:
    path = lora_config / "adapter_config.json" if lora_config.is_dir() else lora_config
    lora = json.loads(path.read_text("utf-8-sig"))
    options |= {name: lora.get(name) for name in ("lora_alpha", "use_rslora")}
  return options


def _load_llm(source: Source, folder: Path, training: Mapping[str, Any]) -> Any:
  """Loads the LLM of a folder, with SALMONN's tensors of it and its LoRA by peft."""
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
    lora_alpha=training["lora_alpha"],
    use_rslora=bool(training.get("use_rslora")),
    target_modules=sorted({re.split(r"\.lora_[AB]", name)[0].split(".")[-1] for name in added}),
    task_type="CAUSAL_LM",
  )
  return with_lora(module, config, added, origin=source.path)
