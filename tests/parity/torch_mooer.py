"""MooER put together from funasr, peft and transformers, on a release folder."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kaldi_native_fbank as knf
import numpy as np
import soundfile
import soxr
import torch

from mooer_jax.encoders.sanm import SANMConfig
from tests.generation.reference import cut
from tests.parity import torch_models

PROMPTS = {
  "asr": "Transcribe speech to text. ",
  "ast": "Translate speech to english text. ",
  "asr_ast_mtl": "Translate speech to english text. ",
}
TEMPLATE = (
  "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
  "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def read(path: Path) -> np.ndarray:
  """float32 [samples] at 16 kHz, the mean of the channels."""
  samples_NC, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
  samples_N = samples_NC.mean(axis=1)
  return samples_N if rate_hz == 16000 else soxr.resample(samples_N, rate_hz, 16000, quality="HQ")


def kaldi_fbank(samples_N: np.ndarray) -> np.ndarray:
  """Kaldi's filter bank as MooER asks for it: [T, 80] from samples of 16 bits' size."""
  options = knf.FbankOptions()
  options.frame_opts.dither = 0.0
  options.frame_opts.window_type = "hamming"
  options.mel_opts.num_bins = 80
  options.energy_floor = 0.0
  fbank = knf.OnlineFbank(options)
  fbank.accept_waveform(16000, samples_N.tolist())
  fbank.input_finished()
  return np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])


def stacked(waveform_N: np.ndarray) -> torch.Tensor:
  """Its frames in funasr's stacks of 7 every 6: [T, 560]."""
  from funasr.frontends.wav_frontend import apply_lfr

  return apply_lfr(torch.tensor(kaldi_fbank(waveform_N * 32768)), 7, 6)


@dataclasses.dataclass(frozen=True)
class Heard:
  """Left-padded prompts: embeddings [B, S, D] and their mask [B, S]."""

  inputs_embeds: torch.Tensor
  attention_mask: torch.Tensor


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path):
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(folder)


class TorchMooer:
  """The model of one task."""

  def __init__(self, release: Path, llm: str, task: str, encoder: SANMConfig = SANMConfig()):
    from funasr.frontends.wav_frontend import load_cmvn
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = release / "paraformer_encoder"
    self.cmvn = load_cmvn(str(folder / "am.mvn"))
    self.encoder = torch_models.sanm(encoder)
    self.encoder.load_state_dict(torch.load(folder / "paraformer-encoder.pth"))
    self.adapter = torch.load(release / task / "adapter_project.pt")
    module = AutoModelForCausalLM.from_pretrained(release / llm, dtype=torch.float32)
    module = PeftModel.from_pretrained(module, str(release / task / "lora_weights"))
    self.llm = module.merge_and_unload().eval()
    self.llm.generation_config = GenerationConfig()
    self.tokenizer = _tokenizer(release / llm)
    self.prompt_S = self.tokenizer.encode(TEMPLATE.format(PROMPTS[task]))

  @torch.no_grad()
  def hear(self, waveforms: Sequence[np.ndarray]) -> Heard:
    features_BTF, frames = self.padded_features(waveforms)
    return self.prompts(self.encoder(features_BTF, frames)[0], frames)

  def padded_features(self, waveforms: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """(features [B, T, 560] after CMVN, frames [B])."""
    from funasr.frontends.wav_frontend import apply_cmvn

    features = [apply_cmvn(stacked(waveform_N), self.cmvn) for waveform_N in waveforms]
    frames = torch.tensor([len(x_TF) for x_TF in features])
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True), frames

  def prompts(self, heard_BTD: torch.Tensor, frames: torch.Tensor) -> Heard:
    """The embedded prompts around the encoder's frames."""
    words_SD = self.llm.get_input_embeddings()(torch.tensor(self.prompt_S))
    rows = [
      torch.cat([self.adapt(x_TD[: n // 2 * 2]), words_SD])
      for x_TD, n in zip(heard_BTD, frames.tolist())
    ]
    longest = max(map(len, rows))
    left = [torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows]
    mask = [torch.arange(longest) >= longest - len(row) for row in rows]
    return Heard(torch.stack(left), torch.stack(mask).long())

  def adapt(self, x_TD: torch.Tensor) -> torch.Tensor:
    w1, b1, w2, b2 = (
      self.adapter[f"encoder_projector.linear{i}.{name}"]
      for i in (1, 2)
      for name in ("weight", "bias")
    )
    return torch.relu(x_TD.reshape(-1, 1024) @ w1.T + b1) @ w2.T + b2

  @torch.no_grad()
  def answer(
    self, heard: Heard, *, beams: int, noise: Any = None, **options: Any
  ) -> list[list[int]]:
    """Generated tokens, the first eos included, decoded as MooER's inference does it."""
    eos = self.tokenizer.eos_token_id
    options = {"max_new_tokens": 40, **options}
    if beams > 1:
      options["length_penalty"] = 0.8
    found = self.llm.generate(
      inputs_embeds=heard.inputs_embeds,
      attention_mask=heard.attention_mask,
      num_beams=beams,
      do_sample=False,
      min_length=1,
      repetition_penalty=1.0,
      sequence_bias={(eos,): -0.2},
      eos_token_id=eos,
      pad_token_id=self.tokenizer.pad_token_id,
      logits_processor=[] if noise is None else [noise],
      **options,
    )
    return [cut(row, (eos,)) for row in found.tolist()]

  def hangs_on_rounding(self, heard: Heard, answer: list[int], *, beams: int) -> bool:
    """Whether one utterance gets this answer too once its scores differ by less than 2e-5."""
    generator = torch.Generator().manual_seed(0)

    def noise(_, scores):
      return scores + (torch.rand(scores.shape, generator=generator) - 0.5) * 2e-5 / 40

    return any(self.answer(heard, beams=beams, noise=noise) == [answer] for _ in range(40))
