"""`verify whisper` and `verify beats` find both sides equal, and fail where a tensor is not."""

import json

import numpy as np
import pytest
import soundfile
import torch

from convert.importing import import_checkpoint
from convert.main import main
from mooer_jax.audio.decode import load_audio
from tests.convert.parts import test_beats, test_whisper
from tests.parity import torch_beats


@pytest.fixture(scope="module")
def recordings(clips, tmp_path_factory):
  """Files as long as test_whisper's small encoder hears (0.4 s), and shorter."""
  files = []
  for clip, seconds in zip(clips, (0.4, 0.31, 0.05)):
    files.append(tmp_path_factory.mktemp("clips") / "a.wav")
    soundfile.write(files[-1], load_audio(clip.path)[2000:][: round(16000 * seconds)], 16000)
  return files


@pytest.fixture
def run(recordings, capsys):
  """Runs `verify`: (exit status, what it printed)."""

  def command(kind, src, folder, *audio):
    capsys.readouterr()
    files = map(str, audio or recordings)
    status = main(["verify", kind, str(src), str(folder), "--audio", *files])
    printed = capsys.readouterr()
    return status, printed.out + printed.err

  return command


def nudged(module, part):
  with torch.no_grad():
    tensor = module.get_parameter(part)
    tensor += 0.05 * torch.randn(tensor.shape)
  return module


def folder_of_hugging_face(path, module):
  module.save_pretrained(path)
  return path


def bare_encoder(path, module):
  """An encoder by itself, under names that transformers does not look for."""
  folder_of_hugging_face(path, module)
  (path / "model.safetensors").unlink()
  torch.save(module.encoder.state_dict(), path / "pytorch_model.bin")
  return path


def file_of_openai(path, module):
  return test_whisper.openai_file(path.with_suffix(".pt"), module)


@pytest.mark.parametrize(
  "write, half",
  [
    (folder_of_hugging_face, False),
    (bare_encoder, False),
    (file_of_openai, False),
    (test_whisper.ctranslate2_folder, True),
  ],
)
def test_whisper_is_what_transformers_hears_whatever_the_files(tmp_path, run, write, half):
  module = test_whisper.model(init_std=0.3)  # so that queries decide what is heard
  module = module.half().float() if half else module
  source = write(tmp_path / "source", module)
  import_checkpoint("whisper", source, tmp_path / "ours")
  status, printed = run("whisper", source, tmp_path / "ours")
  assert status == 0 and "passed" in printed
  assert [line.split()[0] for line in printed.splitlines()[1:3]] == ["features", "encoder"]
  other = write(tmp_path / "other", nudged(module, "encoder.layers.1.self_attn.q_proj.weight"))
  status, printed = run("whisper", other, tmp_path / "ours")
  assert status == 1 and "FAILED, over the bound: encoder\n" in printed


def test_an_encoder_that_hears_less_than_the_original_is_refused(tmp_path, run, clips):
  _, source = test_whisper.hf_folder(tmp_path / "hf")
  import_checkpoint("whisper", source, tmp_path / "ours")
  status, printed = run("whisper", source, tmp_path / "ours", clips[0].path)
  assert status == 2 and "split the clip" in printed and str(clips[0].path) in printed
  file = tmp_path / "ours" / "config.json"
  config = json.loads(file.read_text())
  config["encoders"][0]["trim"] = True
  file.write_text(json.dumps(config))
  status, printed = run("whisper", source, tmp_path / "ours")
  assert status == 2 and "whisper.trim=True" in printed


@pytest.mark.parametrize(
  "name", ["patch_embedding.weight", "encoder.layers.0.self_attn.relative_attention_bias.weight"]
)
def test_beats_is_the_published_structure(tmp_path, run, clips, name):
  module = torch_beats.model(test_beats.SMALL)
  test_beats.write(tmp_path / "a.pt", state=module.state_dict())
  import_checkpoint("beats", tmp_path / "a.pt", tmp_path / "ours")
  files = [clip.path for clip in clips[:2]]
  status, printed = run("beats", tmp_path / "a.pt", tmp_path / "ours", *files)
  assert status == 0 and "passed" in printed
  test_beats.write(tmp_path / "b.pt", state=nudged(module, name).state_dict())
  status, printed = run("beats", tmp_path / "b.pt", tmp_path / "ours", *files)
  assert status == 1 and "FAILED, over the bound: encoder\n" in printed


def test_a_tensor_of_beats_that_does_not_fit_is_named(tmp_path, run, clips):
  state = test_beats.write(tmp_path / "a.pt")
  import_checkpoint("beats", tmp_path / "a.pt", tmp_path / "ours")
  name = "encoder.layers.1.fc2.weight"
  test_beats.write(tmp_path / "b.pt", state={**state, name: state[name][:-1]})
  status, printed = run("beats", tmp_path / "b.pt", tmp_path / "ours", clips[0].path)
  assert status == 2 and f"b.pt: {name} has shape" in printed
  missing = {key: tensor for key, tensor in state.items() if key != name}
  test_beats.write(tmp_path / "b.pt", state=missing)
  status, printed = run("beats", tmp_path / "b.pt", tmp_path / "ours", clips[0].path)
  assert status == 2 and f"{name} is missing" in printed


def test_the_features_of_beats_are_compared(tmp_path, run, clips, monkeypatch):
  test_beats.write(tmp_path / "a.pt")
  monkeypatch.setattr("convert.parts.beats.MEAN", np.float64(15.5))
  import_checkpoint("beats", tmp_path / "a.pt", tmp_path / "ours")
  status, printed = run("beats", tmp_path / "a.pt", tmp_path / "ours", clips[0].path)
  assert status == 1 and "FAILED, over the bound: features" in printed


def test_options_of_other_kinds_and_missing_encoders_are_named(tmp_path, run, capsys, clips):
  test_beats.write(tmp_path / "a.pt")
  import_checkpoint("beats", tmp_path / "a.pt", tmp_path / "ours")
  status, printed = run("whisper", tmp_path / "a.pt", tmp_path / "ours")
  assert status == 2 and "has no encoders/whisper to verify as whisper" in printed
  beats = ["verify", "beats", str(tmp_path / "a.pt"), str(tmp_path / "ours")]
  for more, said in (
    ([], "verify beats needs clips"),
    (["--audio", "a.wav", "--llm", "x"], "--llm has no effect on verify beats"),
  ):
    assert main([*beats, *more]) == 2
    assert said in capsys.readouterr().err
