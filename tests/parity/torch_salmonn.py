"""SALMONN put together from transformers, peft and our rebuilt parts, and saved as it saves itself.

Sizes are small, but features, windows, prompts and names of tensors are the published ones.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from convert.parts import beats
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.encoders.beats import BEATsConfig
from tests.audio.test_logmel import transformers_float64
from tests.convert.folders_of import vary
from tests.parity import torch_beats, torch_qformer
from tests.parity.torch_beats import model as beats_model
from tests.parity.torch_models import vary_vectors

SECONDS = 2  # that Whisper takes; the original's is 30
BEATS = BEATsConfig(
  hidden_size=24,
  layers=3,
  heads=4,
  intermediate_size=40,
  patch_width=20,
  conv_pos=6,
  conv_pos_groups=3,
)
QFORMER = QFormerConfig(hidden_size=48, intermediate_size=64, queries=2)
PROMPT = "<Speech><SpeechHere></Speech> Write down what is said."
TEMPLATE = "USER: {}\nASSISTANT:"
TARGETS = ["q_proj", "v_proj"]
RANK, ALPHA = 4, 16
CONFIG = {  # of the file that training saves
  "model": {
    "lora": True,
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.1,
    "second_per_window": 0.333333,
    "second_stride": 0.333333,
    "prompt_template": TEMPLATE,
    "end_sym": "</s>",
    "multi_prompt": True,
  },
  "run": {"seed": 42},
}


def whisper(seed=0, *, seconds=SECONDS) -> transformers.WhisperModel:
  torch.manual_seed(seed)
  tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1)
  config = transformers.WhisperConfig(
    vocab_size=11,
    num_mel_bins=80,
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=40,
    max_source_positions=50 * seconds,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=8,
    max_target_positions=9,
    decoder_start_token_id=1,
    init_std=0.15,
    **tokens,
  )
  return vary(transformers.WhisperModel(config), seed)


def llama(vocab: int, seed=0, **changes) -> transformers.LlamaForCausalLM:
  torch.manual_seed(seed)
  config = transformers.LlamaConfig(
    **{
      "vocab_size": vocab,
      "hidden_size": 40,
      "intermediate_size": 56,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 4,
      "rms_norm_eps": 1e-5,
      "initializer_range": 0.2,  # so that what was heard decides
      "tie_word_embeddings": False,
      **changes,
    }
  )
  return vary(transformers.LlamaForCausalLM(config), seed)


def write_llm(folder: Path, tokenizer_model: Path, *, specials=None, **changes) -> Path:
  """An LLM's folder with LLaMA's tokenizer.model; with `specials`, a tokenizer.json instead."""
  folder.mkdir(parents=True)
  shutil.copyfile(tokenizer_model, folder / "tokenizer.model")
  config = {"legacy": False, "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
  if specials is not None:
    tokenizer.add_special_tokens(specials)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
  llama(len(tokenizer), **changes).save_pretrained(folder)
  return folder


class Salmonn(nn.Module):
  """The original's modules under the original's names; frozen as in its published training."""

  def __init__(self, llm: Path, *, with_beats=True, seed=0):
    from peft import LoraConfig, get_peft_model

    super().__init__()
    self.whole_whisper = [whisper(seed)]  # in a list it is no part of the module
    self.speech_encoder = self.whole_whisper[0].encoder
    width = self.speech_encoder.config.d_model
    self.ln_speech = nn.LayerNorm(width)
    if with_beats:
      self.beats = beats_model(BEATS, seed)
      self.ln_audio = nn.LayerNorm(BEATS.hidden_size)
      width += BEATS.hidden_size
    model = transformers.LlamaForCausalLM.from_pretrained(llm, dtype=torch.float32)
    torch.manual_seed(seed)
    options = LoraConfig(
      r=RANK, lora_alpha=ALPHA, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    self.llama_model = get_peft_model(model, options)
    self.llama_model.generation_config = transformers.GenerationConfig()
    with torch.no_grad():
      for name, parameter in self.llama_model.named_parameters():
        if "lora_B" in name:
          parameter.normal_(0, 0.2)
    connect = torch_qformer.make(torch_qformer.QFormer, QFORMER, width, 40, seed)
    with torch.no_grad():
      for name, parameter in connect.named_parameters():
        if "crossattention.self.value.weight" in name:
          parameter *= 4  # what was heard stands out from the queries
    self.speech_query_tokens = connect.speech_query_tokens
    self.speech_Qformer = connect.speech_Qformer
    self.speech_llama_proj = connect.speech_llama_proj
    self.connect = [connect]
    for module in (self.ln_speech, *([self.ln_audio] if with_beats else [])):
      vary_vectors(module, seed)
    for module in (self.speech_encoder, *([self.beats] if with_beats else [])):
      module.requires_grad_(False)
    self.tokenizer = transformers.LlamaTokenizer.from_pretrained(llm)
    self.listen = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=SECONDS)
    self.eval()

  def saved(self) -> dict[str, torch.Tensor]:
    """What the original saves: all of the state dict but frozen parameters; some buffers too."""
    frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
    state = {name: t for name, t in self.state_dict().items() if name not in frozen}
    # Buffers that the original's versions of its libraries keep.
    state["speech_Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    for n in range(self.llama_model.config.num_hidden_layers):
      name = f"llama_model.base_model.model.model.layers.{n}.self_attn.rotary_emb.inv_freq"
      state[name] = torch.ones(5)
    return state

  @torch.no_grad()
  def frames(self, waveform_N: np.ndarray) -> torch.Tensor:
    """Both encoders' frames side by side, in the dtype of the module: [1, T, D]."""
    waveform_N = np.pad(waveform_N, (0, max(0, 16000 - len(waveform_N))))
    mel_TF = transformers_float64(waveform_N, self.listen)
    mel = torch.tensor(mel_TF.T[None], dtype=self.ln_speech.weight.dtype)
    frames = self.ln_speech(self.speech_encoder(mel).last_hidden_state)
    if hasattr(self, "beats"):
      heard = self.ln_audio(self.beats(torch_beats.features(waveform_N)[None]))
      assert heard.shape[1] < frames.shape[1]
      heard = nn.functional.pad(heard, (0, 0, 0, frames.shape[1] - heard.shape[1]))
      frames = torch.cat([frames, heard], -1)
    return frames

  @torch.no_grad()
  def speech(self, frames_BTD: torch.Tensor) -> torch.Tensor:
    return torch_qformer.tokens(self.connect[0], frames_BTD, QFORMER)

  @torch.no_grad()
  def inputs(self, speech_BSD: torch.Tensor, prompt=PROMPT) -> torch.Tensor:
    """BOS, the prompt's text and the speech in it: [1, S, D]."""
    before, after = TEMPLATE.format(prompt).split("<SpeechHere>")

    def embedded(text):
      ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
      return self.embed(ids)

    bos = self.embed([self.tokenizer.bos_token_id])
    return torch.cat([bos, embedded(before), speech_BSD, embedded(after)], 1)

  def embed(self, ids) -> torch.Tensor:
    return self.llama_model.get_input_embeddings()(torch.tensor(ids)[None])

  @torch.no_grad()
  def logits(self, inputs_BSD: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """Of each token of an answer that is given: [1, A, V]."""
    given_BSD = torch.cat([inputs_BSD, self.embed(answer[:-1])], 1)
    return self.llama_model(inputs_embeds=given_BSD).logits[:, inputs_BSD.shape[1] - 1 :]

  @torch.no_grad()
  def answer(self, inputs_BSD: torch.Tensor, *, beams: int, max_new_tokens: int) -> list[int]:
    eos = self.tokenizer.eos_token_id
    found = self.llama_model.generate(
      inputs_embeds=inputs_BSD,
      attention_mask=torch.ones(inputs_BSD.shape[:2], dtype=torch.long),
      num_beams=beams,
      do_sample=False,
      max_new_tokens=max_new_tokens,
      eos_token_id=eos,
      pad_token_id=0,
    )[0].tolist()
    return found[: found.index(eos) + 1] if eos in found else found


def write(
  folder: Path,
  module: Salmonn,
  *,
  config: Mapping[str, Any] | None = CONFIG,
  state: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Path]:
  """Writes whisper/, beats.pt and salmonn_v1.pth; the arguments of an import, by their names."""
  folder.mkdir()
  module.whole_whisper[0].save_pretrained(folder / "whisper")
  paths = {"whisper": folder / "whisper"}
  if hasattr(module, "beats"):
    paths["beats"] = folder / "beats.pt"
    torch.save({"cfg": beats.cfg_of(BEATS), "model": module.beats.state_dict()}, paths["beats"])
  content: dict[str, Any] = {"model": module.saved() if state is None else dict(state)}
  if config is not None:
    content |= {"optimizer": {"state": {}}, "config": config, "scaler": None, "epoch": 29}
  torch.save(content, folder / "salmonn_v1.pth")
  return paths
