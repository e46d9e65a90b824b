"""The original's vocoder and speaker encoder, its own classes, against ours: opt-in.

    MOOER_SRC=<clone of MooreThreads/MooER> pytest tests/parity/test_original_vocoder.py -m nightly

`torchaudio.transforms.MelSpectrogram` is stood in for by `reference.mel_spectrogram`, its
definition on torch.stft. Weights are random, since none are released with the code.
"""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from convert.verify.reference import vocoder as reference
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.speaker_mel import speaker_mel
from mooer_jax.vocoders.hifigan import HiFiGANConfig, fold
from mooer_jax.vocoders.speaker import SpeakerConfig
from tests.vocoders import test_hifigan, test_speaker, torch_vocoder

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def folder() -> Path:
  clone = os.environ.get("MOOER_SRC")
  if not clone:
    pytest.skip("no clone of MooER: set MOOER_SRC to run the original's code")
  return Path(clone).resolve() / "src" / "mooer" / "models" / "hifigan"


def module_of(path: Path) -> types.ModuleType:
  spec = importlib.util.spec_from_file_location(f"original_{path.stem}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_waveform_is_that_of_the_original(folder):
  settings = json.loads((folder / "hifigan_config.json").read_text("utf-8"))
  config = HiFiGANConfig()
  assert settings["input_num_mels"] == config.input_width
  assert settings["sampling_rate"] == config.sample_rate_hz
  generator = module_of(folder / "hifigan.py").Generator(types.SimpleNamespace(**settings))
  state = torch_vocoder.generator_state(config)
  generator.load_state_dict(state, strict=True)
  generator.eval().remove_weight_norm()
  states_BTD, frames_B, speaker_BE = test_hifigan.inputs(config, rows=1, frames=20)
  with torch.inference_mode():
    latents, voice = torch.tensor(states_BTD).mT, torch.tensor(speaker_BE)[..., None]
    expected_BN = generator(latents, g=voice)[:, 0].numpy()
  params = fold(test_hifigan.params_of(state))
  waveform_BN = test_hifigan.run(config, params, states_BTD, frames_B, speaker_BE)
  assert 0.05 < np.abs(expected_BN).mean() < 0.8
  assert np.abs(waveform_BN - expected_BN).max() <= 1e-4


class _MelSpectrogram(torch.nn.Module):
  """torchaudio's, with its buffers."""

  def __init__(self, **options):
    super().__init__()
    self.spectrogram, self.mel_scale = torch.nn.Module(), torch.nn.Module()
    self.spectrogram.register_buffer("window", options["window_fn"](options["win_length"]))
    self.mel_scale.register_buffer("fb", reference.mel_matrix().float())
    self.options = options

  def forward(self, waveform_BN):
    assert self.options["n_fft"] == 512 and self.options["hop_length"] == 160
    return reference.mel_spectrogram(waveform_BN)


def test_the_voice_is_that_of_the_original(folder, monkeypatch, clips):
  torchaudio = types.ModuleType("torchaudio")
  torchaudio.transforms = types.SimpleNamespace(MelSpectrogram=_MelSpectrogram)  # type: ignore[attr-defined]
  monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)
  audio = dict(fft_size=512, win_length=400, hop_length=160, sample_rate=16000, preemphasis=0.97)
  encoder = module_of(folder / "speaker_encoder.py").ResNetSpeakerEncoder(
    input_dim=64,
    proj_dim=512,
    log_input=True,
    use_torch_spec=True,
    audio_config={**audio, "num_mels": 64},
  )
  config = SpeakerConfig()
  state = torch_vocoder.speaker_state(config)
  lacking = encoder.load_state_dict(state, strict=False)
  assert not lacking.unexpected_keys
  assert all(name.startswith("torch_spec.") for name in lacking.missing_keys)
  encoder.eval()
  params = test_speaker.params_of(state)
  run = jax.jit(lambda mel_BTF: config.module().apply({"params": params}, mel_BTF))
  for clip in clips[:3]:
    waveform_N = load_audio(clip.path, sample_rate_hz=16000)
    with torch.inference_mode():
      expected_BE = encoder(torch.tensor(waveform_N)[None], l2_norm=True).numpy()
    vector_BE = run(speaker_mel(waveform_N)[None])
    assert (vector_BE * expected_BE).sum() >= 0.99999
