"""The original's own program, `inference.py`, against ours: opt-in, for it needs a clone.

    MOOER_SRC=<clone of MooreThreads/MooER> pytest tests/parity/test_original_mooer.py -m nightly

FIGURES=FOLDER writes what was compared to FOLDER/original_mooer_TASK.json.

Its script runs as it is, with its own features, models, prompts, batches and decoding options, in
float32 on the CPU. What stands in for something else:
- torchaudio: `load` by soundfile, `compliance.kaldi.fbank` by kaldi-native-fbank; no resampling,
  for the clips are given at 16 kHz;
- `asr_config.ModelConfig`: the width of our small LLM, float32;
- `AutoModelForCausalLM.from_pretrained`: without `use_cache=None`, which transformers 5 refuses;
- `MooerModel.generate` and the tokenizer's `batch_decode` also note what they return.
"""

import os
import runpy
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM

from convert.main import main as convert
from mooer_jax import Transcriber
from tests.generation.reference import cut
from tests.parity import torch_mooer
from tests.parity.full_release import EOS, LLM, LLM_WIDTH, write_release

pytestmark = [
  pytest.mark.nightly,
  pytest.mark.timeout(3600),  # compiling 50 layers for each shape
  pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
CLIPS = 24


@pytest.fixture(scope="module")
def original() -> Path:
  folder = os.environ.get("MOOER_SRC")
  if not folder:
    pytest.skip("no clone of MooER: set MOOER_SRC to run the original's code")
  assert (Path(folder) / "inference.py").is_file(), f"MOOER_SRC={folder} is no clone of MooER"
  return Path(folder).resolve()


@pytest.fixture(scope="module")
def recordings(original, clips, shared_data, tmp_path_factory) -> list[Path]:
  """wav files at 16 kHz: the committed clips, digits, Mandarin words, digits in a row."""
  digits = sorted((shared_data / "fsdd").iterdir())
  words = sorted((shared_data / "cmn-words").iterdir())
  read = torch_mooer.read
  waveforms = [read(path) for path in (*digits[3::250], *words[2::190])]
  for seed in range(2):
    chosen = np.random.default_rng(seed).choice(len(digits), 8, replace=False)
    waveforms.append(np.concatenate([read(digits[i]) for i in chosen]))
  folder = tmp_path_factory.mktemp("wav")
  paths = [clip.path for clip in clips]
  for i, waveform_N in enumerate(waveforms):
    paths.append(folder / f"{i}.wav")
    soundfile.write(paths[-1], waveform_N, 16000)
  assert len(paths) == CLIPS
  return paths


@pytest.fixture(scope="module")
def release(original, clips, tmp_path_factory):
  folder = tmp_path_factory.mktemp("original")
  features = [torch_mooer.stacked(torch_mooer.read(clip.path)) for clip in clips]
  yield write_release(folder / "release", features)
  shutil.rmtree(folder)


def fbank(waveform, *, energy_floor, frame_length, frame_shift, num_mel_bins, **options):
  """torchaudio.compliance.kaldi.fbank, as the original calls it."""
  asked = dict(dither=0.0, sample_frequency=16000, window_type="hamming", snip_edges=True)
  assert options == asked and energy_floor == 0 and waveform.shape[0] == 1
  assert (frame_length, frame_shift, num_mel_bins) == (25, 10, 80)
  return torch.tensor(torch_mooer.kaldi_fbank(waveform[0].numpy()))


class _Resample:
  def __init__(self, **_):
    raise AssertionError("the clips should be at 16 kHz")


def stand_in_torchaudio() -> dict[str, types.ModuleType]:
  names = ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi",
           "torchaudio.transforms")  # fmt: skip
  modules = {name: types.ModuleType(name) for name in names}
  for name, module in modules.items():
    parent, _, child = name.rpartition(".")
    if parent:
      setattr(modules[parent], child, module)

  def load(path):
    samples_NC, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.tensor(samples_NC.T), rate_hz

  modules["torchaudio"].load = load
  modules["torchaudio.compliance.kaldi"].fbank = fbank
  modules["torchaudio.transforms"].Resample = _Resample
  return modules


def run_original(source, release, task, arguments, monkeypatch):
  """(generated tokens, texts) of `python inference.py --task TASK …`."""
  tokens, texts = [], []
  with monkeypatch.context() as patch:
    for name, module in stand_in_torchaudio().items():
      patch.setitem(sys.modules, name, module)
    patch.syspath_prepend(str(source / "src"))
    from mooer.configs import asr_config
    from mooer.models import mooer_model

    class Config(asr_config.ModelConfig):
      def __init__(self):
        super().__init__()
        self.llm_dim, self.load_dtype = LLM_WIDTH, "float32"

    generate, init_model = mooer_model.MooerModel.generate, mooer_model.init_model

    def noting_generate(self, **batch):
      found = generate(self, **batch)
      tokens.extend(cut(row, (EOS,)) for row in found.tolist())
      return found

    def noting_init_model(*args, **kwargs):
      model, tokenizer = init_model(*args, **kwargs)
      batch_decode = tokenizer.batch_decode

      def noting_batch_decode(*args, **kwargs):
        found = batch_decode(*args, **kwargs)
        texts.extend(found)
        return found

      tokenizer.batch_decode = noting_batch_decode
      return model, tokenizer

    class AutoModel:
      @staticmethod
      def from_pretrained(path, *, use_cache, torch_dtype):
        assert use_cache is None
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype)

    patch.setattr(asr_config, "ModelConfig", Config)
    patch.setattr(mooer_model, "AutoModelForCausalLM", AutoModel)
    patch.setattr(mooer_model.MooerModel, "generate", noting_generate)
    patch.setattr(mooer_model, "init_model", noting_init_model)
    paths = {
      "cmvn_path": "paraformer_encoder/am.mvn",
      "encoder_path": "paraformer_encoder/paraformer-encoder.pth",
      "llm_path": LLM,
      "adapter_path": f"{task}/adapter_project.pt",
      "lora_dir": f"{task}/lora_weights",
    }
    given = [f"--{name}={release / path}" for name, path in paths.items()]
    patch.setattr(sys, "argv", ["inference.py", f"--task={task}", *given, *arguments])
    runpy.run_path(str(source / "inference.py"), run_name="__main__")
  return tokens, texts


@pytest.mark.parametrize("task", ["asr", "ast"])
def test_the_original_program_gives_the_same_tokens_and_texts(
  original, release, recordings, task, tmp_path, monkeypatch, record
):
  ours = tmp_path / "ours"
  assert convert(["import", "mooer", str(release), str(ours), "--task", task]) == 0
  transcriber = Transcriber.from_checkpoint(ours, dtype="float32")
  scp = tmp_path / "wav.scp"
  scp.write_text("".join(f"clip{i} {path}\n" for i, path in enumerate(recordings)), "utf-8")
  wrong, compared = [], 0
  for size in (1, 10):
    arguments = [f"--wav_scp={scp}", f"--batch_size={size}"]
    tokens, texts = run_original(original, release, task, arguments, monkeypatch)
    # The checkpoint's options. Theirs are batches of 10 in the list's order; ours is a single one,
    # for each further shape of batch is compiled anew.
    results = transcriber.transcribe(recordings, batch_size=1 if size == 1 else CLIPS)
    assert len(tokens) == len(texts) == len(results)
    assert len({tuple(answer) for answer in tokens}) > 0.5 * len(tokens)
    compared += sum(map(len, tokens))
    wrong += [
      (size, Path(result.path).name, len(result.tokens))
      for result, answer, text in zip(results, tokens, texts)
      if (result.tokens, result.text) != (answer, text)
    ]
  print(f"{task}: {2 * CLIPS} answers, {compared} tokens compared, mismatches: {wrong}")
  shutil.rmtree(ours)
  assert not wrong

  single = run_original(original, release, task, [f"--wav_path={recordings[0]}"], monkeypatch)
  [first] = transcriber.transcribe(recordings[:1])
  assert single == ([first.tokens], [first.text])
  figures = {"answers": 2 * CLIPS + 1, "tokens": compared + len(first.tokens), "mismatches": 0}
  record(figures, clone="MOOER_SRC")
