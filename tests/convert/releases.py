"""A small MooER release in the published layout, from funasr, transformers and peft."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

from convert.verify.reference.vocoder import mel_matrix
from mooer_jax.audio.cmvn import write_mvn
from mooer_jax.text.tokenizer import QWEN2_SPECIALS, Tokenizer
from tests.convert.folders_of import llm, vary, with_lora
from tests.parity import torch_models
from tests.tiny import SANM
from tests.tiny import SPEECH as SPEECH_OUTPUT
from tests.vocoders import torch_vocoder

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ\n.|<>_"
HIDDEN = 24


def encoder(seed=0):
  """funasr's encoder of tests.tiny's size."""
  return torch_models.sanm(SANM, seed)


def adapter(llm_width: int, seed=0):
  """MooER's adapter: two frames, linear, ReLU, linear."""
  torch.manual_seed(seed)
  layers = {
    "linear1": torch.nn.Linear(2 * SANM.hidden_size, HIDDEN),
    "linear2": torch.nn.Linear(HIDDEN, llm_width),
  }
  return vary(torch.nn.ModuleDict(layers), seed)


def write_cmvn(path: Path, seed=0):
  rng = np.random.default_rng(seed)
  shift, scale = rng.normal(size=SANM.input_width), rng.uniform(0.5, 2, SANM.input_width)
  write_mvn(path, shift.astype(np.float32), scale.astype(np.float32))
  return shift, scale


def release(
  folder: Path,
  *,
  task="asr",
  tuned_encoder=False,
  dtype=torch.float32,
  extra=True,
  specials=(),
):
  """Writes a release; the LLM has further special tokens.

  Returns:
    {"encoder", "adapter", "llm" (with LoRA around it)}: the modules.
  """
  (folder / "paraformer_encoder").mkdir(parents=True)
  (folder / task).mkdir()
  heard, joined = encoder(), adapter(40)
  state = {name: tensor.clone() for name, tensor in heard.state_dict().items()}
  if extra:
    state["decoder.embed.0.weight"] = torch.zeros(3, 4)
  torch.save(state, folder / "paraformer_encoder" / "paraformer-encoder.pth")
  write_cmvn(folder / "paraformer_encoder" / "am.mvn")

  tokenizer = Tokenizer.from_characters(CHARACTERS, (*QWEN2_SPECIALS, *specials))
  module = llm("qwen2", dtype=dtype, vocab_size=tokenizer.vocab_size + 3)
  module.save_pretrained(folder / "Qwen2-tiny")
  tokenizer.save(folder / "Qwen2-tiny")
  module = with_lora(module, rank=4, alpha=16, targets=("q", "k", "v", "o", "gate", "up", "down"))
  module.save_pretrained(folder / task / "lora_weights")

  trained = {f"encoder_projector.{name}": t for name, t in joined.state_dict().items()}
  if tuned_encoder:
    heard = encoder(seed=1)
    trained |= {
      f"encoder.model.{name}": t
      for name, t in heard.state_dict().items()
      if re.match(r"encoders\.0\.|after_norm", name)
    }
    state.update(
      {
        k.removeprefix("encoder.model."): t
        for k, t in trained.items()
        if k.startswith("encoder.model.")
      }
    )
    heard.load_state_dict({k: t for k, t in state.items() if not k.startswith("decoder.")})
  torch.save(trained, folder / task / "adapter_project.pt")
  return {"encoder": heard, "adapter": joined, "llm": module}


SPEECH = dataclasses.replace(
  SPEECH_OUTPUT,
  vocoder=dataclasses.replace(
    SPEECH_OUTPUT.vocoder, stretch=4, rates=(4, 2), taps=(8, 4), sample_rate_hz=22050
  ),
)
AUDIO_TOKENS = ("<|audio_start|>", *(f"<A_{n}>" for n in range(5)))


def speech_release(folder: Path):
  """Writes a release with speech output, from `release` and random parts of torch_vocoder.

  Returns:
    The modules of `release`, and the contents {"vocoder", "speaker"} of the two files.
  """
  parts = folder.with_name(f"{folder.name}-parts")
  modules = release(parts, specials=AUDIO_TOKENS)
  folder.mkdir()
  moved = {
    "paraformer_encoder/paraformer-encoder.pth": "paraformer-encoder.pth",
    "paraformer_encoder/am.mvn": "am.mvn",
    "asr/adapter_project.pt": "adapter_project.pt",
    "asr/lora_weights": "lora",
    "Qwen2-tiny": "llm",
  }
  for old, new in moved.items():
    (parts / old).rename(folder / new)
  generator = torch_vocoder.generator_state(SPEECH.vocoder)
  speaker = torch_vocoder.speaker_state(SPEECH.speaker) | {
    "torch_spec.0.filter": torch.tensor([[[-0.97, 1.0]]]),
    "torch_spec.1.spectrogram.window": torch.hamming_window(400),
    "torch_spec.1.mel_scale.fb": mel_matrix().float(),
  }
  torch.save({"generator": generator}, folder / "g_00000012")
  torch.save({"speaker_encoder": speaker}, folder / "spk_00000012")
  soundfile.write(folder / "prompt.wav", np.sin(np.arange(8000) / 9), 16000)
  return {**modules, "vocoder": generator, "speaker": speaker}


def funasr_folder(folder: Path, *, heads=SANM.heads, others=None, **changes):
  """A folder as FunASR's: the whole model in model.pt, of which the encoder is a part.

  Args:
    folder: to make.
    heads: of the encoder.
    others: tensors in model.pt beside the encoder's.
    changes: sections of config.yaml -> values that replace the usual ones; None takes one out.

  Returns:
    (encoder, (shift, scale)).
  """
  folder.mkdir()
  module = torch_models.sanm(dataclasses.replace(SANM, heads=heads), 0)
  state = {f"encoder.{name}": tensor for name, tensor in module.state_dict().items()}
  others = {"decoder.after_norm.weight": torch.ones(3)} if others is None else others
  torch.save({**state, **others}, folder / "model.pt")
  cmvn = write_cmvn(folder / "am.mvn")
  usual = {
    "model": "Paraformer",
    "encoder": "SANMEncoder",
    "encoder_conf": {
      "attention_heads": heads,
      "input_layer": "pe",
      "sanm_shfit": 0,
      "num_blocks": SANM.layers,
      "dropout_rate": 0.1,
    },
    "frontend_conf": {"fs": 16000, "window": "hamming", "n_mels": 8, "lfr_m": 7, "lfr_n": 6},
  }
  conf = {}
  for name, section in usual.items():
    change = changes.pop(name, {})
    merged = {**section, **change} if isinstance(section, dict) else change or section
    if isinstance(merged, dict):
      merged = {key: value for key, value in merged.items() if value is not None}
    conf[name] = merged
  (folder / "config.yaml").write_text(yaml.safe_dump(conf))
  return module, cmvn


def changed(folder: Path, change):
  """Changes a checkpoint's config.json by a function of its content."""
  config = json.loads((folder / "config.json").read_text())
  change(config)
  (folder / "config.json").write_text(json.dumps(config))
