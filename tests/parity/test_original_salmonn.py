"""The original's own model, `models/salmonn.py`, against ours: opt-in, for it needs a clone.

    SALMONN_SRC=<clone of bytedance/SALMONN> pytest tests/parity/test_original_salmonn.py -m nightly

FIGURES=FOLDER writes what was compared to FOLDER/original_salmonn_CASE.json.
The clone's branch is `salmonn`. Their class runs as it is, in float32 on the CPU, with their own
Whisper, BEATs, Q-Former (of its full size), LLaMA, prompts, loss and options of `generate`; their
`utils.prepare_one_sample` reads the clips. Its state dict, stripped as their training strips it,
is what we import. What stands in for something else:
- an older transformers: see `old_transformers`; attention "eager" for Whisper and LLaMA; in
  `generate` the whole sequence anew at each step, for their cache is of another form;
- `from_pretrained` of Whisper and LLaMA: small random models; of `BertConfig`: bert-base's values;
- `LlamaTokenizer` holds [PAD] already, so that no random row is added to the embeddings;
- torchaudio's filter bank; `Tensor.cuda`, which does nothing;
- their stopping criterion never fires: it looks at the first beam, which never ends in </s> in the
  transformers of their requirements and may in today's. The end token ends answers in either.
"""

import importlib
import json
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
import torch
import transformers
from transformers.generation import GenerationMixin

from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from convert.parts import beats
from mooer_jax import Transcriber, speech_llm
from mooer_jax.audio.decode import load_audio
from mooer_jax.checkpoint import describe
from mooer_jax.config import from_json
from tests.audio.test_logmel import transformers_float64
from tests.generation.reference import cut
from tests.parity import old_transformers, torch_beats, torch_models, torch_mooer, torch_salmonn
from tests.parity.test_beats_parity import stub_torchaudio
from tests.parity.test_salmonn_parity import batch_of
from tests.text.spm_training import train

pytestmark = [
  pytest.mark.nightly,
  pytest.mark.timeout(3600),
  pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
LAYERS = 3 + 2 + 2  # of BEATs, the Q-Former and the LLM, each of which rounds
MAX_NEW_TOKENS = 20
PROMPT = "<Speech><SpeechHere></Speech> Write down what is said."
TEXTS = ["the License", "eighty two", "a copy of the work", "31"]


@pytest.fixture
def original(monkeypatch):
  """Their modules: (models.salmonn, utils)."""
  folder = os.environ.get("SALMONN_SRC")
  if not folder:
    pytest.skip("no clone of SALMONN: set SALMONN_SRC to run the original's code")
  assert (Path(folder) / "models/salmonn.py").is_file(), f"{folder}: not branch salmonn"
  stub_torchaudio(monkeypatch)
  old_transformers.stand_in(monkeypatch)
  # Not their `models/__init__.py`: nothing of it is needed.
  package = types.ModuleType("models")
  package.__path__ = [str(Path(folder) / "models")]
  monkeypatch.setitem(sys.modules, "models", package)
  monkeypatch.syspath_prepend(folder)
  monkeypatch.syspath_prepend(str(Path(folder) / "models" / "beats"))
  before = {*sys.modules}
  module = importlib.import_module("models.salmonn")
  old_transformers.mend_qformer(importlib.import_module("models.Qformer"))
  yield module, importlib.import_module("utils")
  for name in {*sys.modules} - before:
    if name.partition(".")[0] in ("models", "utils", "dist_utils"):
      del sys.modules[name]


def small_parts(module, monkeypatch):
  """Makes their constructor take small random models instead of published ones."""

  class Llama(module.LlamaForCausalLM, GenerationMixin):
    @classmethod
    def from_pretrained(cls, path, torch_dtype):
      assert torch_dtype == torch.float16
      theirs = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
      theirs.config._attn_implementation = "eager"
      model = cls(theirs.config)
      lost = model.load_state_dict(theirs.state_dict(), strict=False)
      assert all(name.endswith("inv_freq") for name in lost.missing_keys), lost
      assert not lost.unexpected_keys
      model.generation_config.eos_token_id = 2
      return model

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds, attention_mask, **_):
      said = self.get_input_embeddings()(input_ids)
      return {
        "inputs_embeds": torch.cat([inputs_embeds, said], 1),
        "attention_mask": attention_mask,
        "use_cache": False,
      }

    @staticmethod
    def _reorder_cache(cache, beams):
      return cache  # empty

  class Whisper:
    @staticmethod
    def from_pretrained(path):
      theirs = transformers.WhisperModel.from_pretrained(path, attn_implementation="eager")
      encoder = whisper.WhisperEncoder(theirs.config)
      encoder.load_state_dict(theirs.encoder.state_dict())
      return types.SimpleNamespace(encoder=encoder)

  class Bert:
    @staticmethod
    def from_pretrained(name):
      assert name == "bert-base-uncased"
      return transformers.BertConfig()

  whisper = importlib.import_module("models.modeling_whisper")
  monkeypatch.setattr(module, "LlamaForCausalLM", Llama)
  monkeypatch.setattr(module, "WhisperModel", Whisper)
  monkeypatch.setattr(module, "BertConfig", Bert)
  monkeypatch.setattr(module.StoppingCriteriaSub, "__call__", lambda self, ids, scores: False)
  monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


def write_parts(folder: Path) -> dict[str, Path]:
  """Whisper for 30 s, a file of BEATs, and an LLM whose tokenizer has [PAD]."""
  torch_salmonn.whisper(seconds=30).save_pretrained(folder / "whisper")
  heard = torch_beats.model(torch_salmonn.BEATS)
  content = {"cfg": beats.cfg_of(torch_salmonn.BEATS), "model": heard.state_dict()}
  torch.save(content, folder / "beats.pt")
  llm = torch_salmonn.write_llm(
    folder / "vicuna",
    train(folder / "tokenizer", "bpe"),
    specials={"pad_token": "[PAD]"},
    initializer_range=0.35,
  )
  return {"whisper": folder / "whisper", "beats": folder / "beats.pt", "llm": llm}


def louder(model):
  """Makes what starts at zeros or ones show, and what was heard stand out from the queries."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if not parameter.requires_grad:
        continue
      noise = torch.randn(parameter.shape, generator=generator)
      if "lora_B" in name:
        parameter += 0.2 * noise
      elif parameter.ndim == 1:
        parameter += 0.1 * noise
      elif "crossattention.self.value" in name or "speech_llama_proj" in name:
        parameter *= 8


def stripped(model) -> dict[str, torch.Tensor]:
  """As `save_checkpoint` of their runner: all but the parameters that are frozen."""
  learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
  return {name: t for name, t in model.state_dict().items() if learns.get(name, True)}


@pytest.fixture
def recordings(clips, shared_data, tmp_path) -> list[Path]:
  """wav files at 16 kHz: the committed clips, a Mandarin word, digits in a row."""
  words, digits = (sorted((shared_data / name).iterdir()) for name in ("cmn-words", "fsdd"))
  waveforms = [torch_mooer.read(path) for path in words[5::700]]
  waveforms.append(np.concatenate([torch_mooer.read(path) for path in digits[::300]]))
  paths = [clip.path for clip in clips]
  for i, waveform_N in enumerate(waveforms):
    paths.append(tmp_path / f"{i}.wav")
    soundfile.write(paths[-1], waveform_N, 16000)
  return paths


@pytest.mark.parametrize("with_beats", [True, False], ids=["beats", "speech-only"])
def test_the_original_gives_the_same_tokens_and_loss(
  original, recordings, tmp_path, monkeypatch, with_beats, record
):
  module, utils = original
  small_parts(module, monkeypatch)
  parts = write_parts(tmp_path)
  prompts = tmp_path / "prompts.json"
  prompts.write_text(json.dumps({"asr": [PROMPT]}))
  torch.manual_seed(0)
  theirs = module.SALMONN(
    llama_path=str(parts["llm"]),
    whisper_path=str(parts["whisper"]),
    beats_path=str(parts["beats"]) if with_beats else "",
    prompt_path=str(prompts),
    prompt_template=torch_salmonn.TEMPLATE,
    multi_prompt=True,
    max_txt_len=300,
  )
  louder(theirs)
  theirs.eval()
  file = tmp_path / "checkpoint_best.pth"
  torch.save({"model": stripped(theirs), "scaler": None, "epoch": 3}, file)

  kept = {name: path for name, path in parts.items() if with_beats or name != "beats"}
  report = import_checkpoint(
    "salmonn", file, tmp_path / "ours", options=Options(prompts=prompts, **kept)
  )
  passed_over = [name for name in report.ignored if name in stripped(theirs)]
  print(f"{len(stripped(theirs))} tensors saved, passed over: {len(passed_over)}")
  transcriber = Transcriber.from_checkpoint(tmp_path / "ours", dtype="float32")
  saved = from_json(describe(tmp_path / "ours").config)
  assert saved.decoder.lora_scale == 4.0 and transcriber.config.decoder.lora_rank == 0

  listen = transformers.WhisperFeatureExtractor(feature_size=80)
  samples = [utils.prepare_one_sample(str(path), listen, cuda_enabled=False) for path in recordings]
  prompt = [torch_salmonn.TEMPLATE.format(PROMPT)]
  # Their loss of each clip, and of several of one length in a batch.
  waveforms = [load_audio(path, channel="first") for path in recordings[: len(TEXTS)]]
  second = [np.pad(w, (0, 16000))[:16000] for w in waveforms]
  cases = [([w], [t]) for w, t in zip(waveforms, TEXTS)] + [(second, TEXTS)]
  config, tokenizer = transcriber.config, transcriber.tokenizer
  loss = jax.jit(lambda params, batch: speech_llm.loss(params, batch, config)[0])
  logits = jax.jit(lambda params, batch: speech_llm.prompt(params, batch, config)[0])

  def run(module, dtype, sounds, texts):
    mels = np.stack([transformers_float64(w, listen).T for w in sounds])
    spectrogram, raw = (torch.tensor(x, dtype=dtype) for x in (mels, np.stack(sounds)))
    sample = {
      "spectrogram": spectrogram,
      "raw_wav": raw,
      "padding_mask": torch.zeros(raw.shape, dtype=torch.bool),
      "text": texts,
      "task": ["asr"] * len(texts),
    }
    found = module(sample, verbose=True)["loss"]
    speech, mask = module.encode_speech(spectrogram, raw, sample["padding_mask"])
    return found, module.prompt_wrap(speech, mask, prompt * len(texts), multi_prompt=True)[0]

  errors = []
  for sounds, texts in cases:
    sounds = [config.pad_to_min_duration(w) for w in sounds]
    answers = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    batch = batch_of(sounds, answers, config, tokenizer)
    ours = (
      loss(transcriber.params, batch),
      logits(transcriber.params, batch)[:, 1:],  # theirs adds BOS later
    )
    errors.append(torch_models.assert_parity(ours, run, theirs, sounds, texts, layers=LAYERS))

  said: list[list[int]] = []
  generate = theirs.llama_model.generate

  def noting_generate(**options):
    found = generate(**options)
    said.append(cut(found[0].tolist(), (2,)))
    return found

  monkeypatch.setattr(theirs.llama_model, "generate", noting_generate)
  monkeypatch.setattr(theirs.llama_tokenizer, "batch_decode", lambda *_, **__: None)
  compared = {}
  for beams in (1, 4):
    said.clear()
    with torch.no_grad():
      for sample in samples:
        options = {"num_beams": beams, "max_new_tokens": MAX_NEW_TOKENS}
        theirs.generate(sample, options, prompts=prompt)
    results = transcriber.transcribe(
      recordings, num_beams=beams, max_new_tokens=MAX_NEW_TOKENS, batch_size=len(recordings)
    )
    different = len({tuple(answer) for answer in said})
    assert different > 3  # they heard something
    wrong = [i for i, r in enumerate(results) if r.tokens != said[i]]
    print(f"beams {beams}: {len(said)} answers, {different} different, mismatches {wrong}")
    assert not wrong
    tokens = sum(map(len, said))
    compared[f"{beams} beams"] = {"answers": len(said), "tokens": tokens, "mismatches": 0}

  export_checkpoint("salmonn", tmp_path / "ours", tmp_path / "back")
  back = torch.load(tmp_path / "back" / "salmonn_v1.pth", weights_only=True)["model"]
  found = theirs.load_state_dict(back, strict=False)  # as theirs loads it
  assert not found.unexpected_keys
  for name, tensor in stripped(theirs).items():
    assert (name in back) == (name not in passed_over)
    assert name in passed_over or torch.equal(tensor, back[name]), name
  loss_error, prompt_error = map(max, zip(*errors))
  figures = {**compared, "loss_error_nats": loss_error, "prompt_error": prompt_error}
  record(figures, clone="SALMONN_SRC")
