"""Releases with speech output: in and out bit for bit, and what is wrong with a folder."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import torch

import mooer_jax
from convert.core.errors import ConversionError
from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from convert.inspection import inspect
from convert.verify.reference import vocoder as reference
from convert.verify.run import verify
from mooer_jax import checkpoint, speech_llm
from mooer_jax.config import from_json, to_json
from mooer_jax.prompts import SPEECH_TASKS
from tests import tiny
from tests.convert.parts.test_language_model import assert_same_tensors
from tests.convert.releases import SPEECH, speech_release
from tests.numerics import assert_within, condition, exceeds_the_bound, rounding
from tests.vocoders import torch_vocoder

TASK = Options(task="s2s_chat")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  """(folder of a release, its modules and states, folder of its checkpoint)."""
  folder = tmp_path_factory.mktemp("speech")
  modules = speech_release(folder / "release")
  import_checkpoint("mooer-speech", folder / "release", folder / "ckpt", options=TASK)
  return folder / "release", modules, folder / "ckpt"


@pytest.fixture
def copied(released, tmp_path):
  """A copy of the release, to damage."""
  return shutil.copytree(released[0], tmp_path / "release")


def test_a_release_becomes_one_checkpoint(released):
  _, _, folder = released
  about = checkpoint.describe(folder)
  config = from_json(about.config)
  assert config.speech_output == dataclasses.replace(SPEECH, drop_last=6)
  assert dict(config.prompts) == {"s2s_chat": SPEECH_TASKS["s2s_chat"]}
  options = {"num_beams": 4, "do_sample": True, "top_p": 0.85, "top_k": 50}
  assert options.items() <= about.generation.items() and "sequence_bias" not in about.generation
  assert [file.name for file in (folder / "source" / "voice").iterdir()] == ["prompt.wav"]


def test_an_imported_release_speaks_in_its_voice(released, clips):
  release, _, folder = released
  responder = mooer_jax.SpeechResponder.from_checkpoint(folder)
  own_BE, given_BE = (responder.speaker_vector(x) for x in (None, release / "prompt.wav"))
  np.testing.assert_array_equal(own_BE, given_BE)
  bias = ((responder.model.start_id, 1e4),)  # every token is the start token
  found = responder(clips[0].path, max_new_tokens=12, sequence_bias=bias)
  speech = responder.model.speech
  assert found.waveform_N.shape == ((12 - 6) * speech.vocoder.samples_per_frame,)
  assert found.waveform_N.std() > 0


def test_the_voice_and_the_waveform_are_those_of_pytorch(released):
  _, states, folder = released
  loaded = checkpoint.load(folder)
  config = from_json(loaded.config)
  rng = np.random.default_rng(0)
  states_BSD = rng.normal(size=(1, 6, 40)).astype(np.float32)
  mel_BTF = rng.normal(size=(1, 20, 64)).astype(np.float32)

  @jax.jit
  def speak(params, inputs):
    states_BSD, mel_BTF = inputs
    vector_BE = speech_llm.speaker_vector(params, mel_BTF, config)
    return speech_llm.speak(params, states_BSD, np.array([6]), vector_BE, config)

  with torch.inference_mode():
    mel = torch.tensor(mel_BTF).mT
    voice = reference.speaker_vector(states["speaker"], mel)
    expected = reference.generate(states["vocoder"], torch.tensor(states_BSD), voice)
  params = {name: loaded.params[name] for name in ("vocoder", "speaker")}
  bound = rounding(40 * 7 * 20, condition(speak, params, (states_BSD, mel_BTF)))
  assert_within(speak(params, (states_BSD, mel_BTF)), expected.numpy(), bound)
  with exceeds_the_bound():
    other_BTF = np.roll(mel_BTF, 1, axis=2)
    assert_within(speak(params, (states_BSD, other_BTF)), expected.numpy(), bound)


def test_a_checkpoint_becomes_the_same_release(released, tmp_path):
  folder, _, imported = released
  export_checkpoint("mooer-speech", imported, tmp_path / "back")
  assert {f.name for f in (tmp_path / "back").iterdir()} == {f.name for f in folder.iterdir()}
  for name, key in (("g_00000012", "generator"), ("spk_00000012", "speaker_encoder")):
    assert list(torch.load(tmp_path / "back" / name)) == [key]
  for name in ("g_00000012", "spk_00000012", "adapter_project.pt", "llm", "lora"):
    assert_same_tensors(tmp_path / "back" / name, folder / name)
  for name in ("am.mvn", "prompt.wav"):
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


def test_a_trained_model_is_exported_without_an_imported_one(released, tmp_path):
  """The constants of the features, which a trained model does not keep, are then our own."""
  about = checkpoint.load(released[2])
  config = from_json(about.config)
  checkpoint.save(
    tmp_path / "own",
    params=about.params,
    config_json=to_json(config),
    tokenizer=lambda folder: shutil.copytree(about.tokenizer, folder, dirs_exist_ok=True),
    generation=about.generation,
  )
  export_checkpoint("mooer-speech", tmp_path / "own", tmp_path / "back")
  ours = torch.load(tmp_path / "back" / "spk_00000000")["speaker_encoder"]
  theirs = torch.load(released[0] / "spk_00000012")["speaker_encoder"]
  assert ours.keys() == theirs.keys()
  triangles = "torch_spec.1.mel_scale.fb"
  np.testing.assert_allclose(ours[triangles], theirs[triangles], atol=1e-5)


def test_inspect_lists_all_files(released, capsys):
  inspect(released[0])
  printed = capsys.readouterr().out
  assert "kind: mooer-speech" in printed
  assert all(name in printed for name in ("g_00000012", "spk_00000012", "lora", "conv_pre.bias"))


def edit(path, key, change):
  content = torch.load(path)
  change(content[key])
  torch.save(content, path)


def rename_start_token(folder):
  for file in (folder / "llm").glob("tokenizer*.json"):
    file.write_text(file.read_text("utf-8").replace("<|audio_start|>", "<|begin|>"), "utf-8")


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda f: (f / "g_00000012").unlink(), "must have one file g_NUMBER, has none"),
    (
      lambda f: shutil.copy(f / "spk_00000012", f / "spk_00000013"),
      "must have one file spk_NUMBER, has spk_00000012, spk_00000013",
    ),
    (lambda f: (f / "am.mvn").unlink(), "am.mvn"),
    (lambda f: shutil.rmtree(f / "lora"), "lora: not found; pass --no-lora"),
    (rename_start_token, "its tokenizer has no <|audio_start|>"),
    (
      lambda f: edit(f / "g_00000012", "generator", lambda s: s.pop("conv_post.bias")),
      "conv_post.bias \\[1\\] is missing",
    ),
    (
      lambda f: edit(f / "spk_00000012", "speaker_encoder", lambda s: s.update(x=torch.ones(2))),
      "x \\[2\\] is unmapped",
    ),
    (
      lambda f: edit(
        f / "spk_00000012",
        "speaker_encoder",
        lambda s: s.update({"torch_spec.0.filter": torch.tensor([[[-0.9, 1.0]]])}),
      ),
      "torch_spec.0.filter is of other features",
    ),
    (
      lambda f: torch.save({"model": {}}, f / "g_00000012"),
      "g_00000012: .*generator",
    ),
    (
      lambda f: torch.save(
        {
          "generator": torch_vocoder.generator_state(
            dataclasses.replace(SPEECH.vocoder, input_width=24)
          )
        },
        f / "g_00000012",
      ),
      "speech_output.vocoder.input_width=24, but the LLM's hidden states have 40",
    ),
  ],
  ids=lambda value: None if callable(value) else value[:30],
)
def test_what_is_wrong_with_a_folder(copied, damage, message, tmp_path):
  damage(copied)
  with pytest.raises(ValueError, match=message):
    import_checkpoint("mooer-speech", copied, tmp_path / "ckpt", options=TASK)
  assert not (tmp_path / "ckpt").exists()


def test_the_task_must_be_one_of_speech(released, tmp_path):
  with pytest.raises(ValueError, match="--task asr: choose one of s2s_trans, s2s_chat"):
    import_checkpoint("mooer-speech", released[0], tmp_path / "c", options=Options(task="asr"))


def test_each_layout_has_its_own_kind(released, tmp_path):
  with pytest.raises(ConversionError, match="must be one of a release"):
    export_checkpoint("mooer", released[2], tmp_path / "back")
  with pytest.raises(ConversionError, match="has no speech output; export it with the kind mooer"):
    checkpoint.save(
      tmp_path / "text",
      params=tiny.init(tiny.model_config()),
      config_json=to_json(tiny.model_config()),
      tokenizer=lambda folder: None,
      generation={},
    )
    export_checkpoint("mooer-speech", tmp_path / "text", tmp_path / "back")


def test_verify_runs_both_to_the_waveform(released, clips, tmp_path):
  folder, _, imported = released
  audio = [clips[0].path, clips[1].path]
  report = verify("mooer-speech", folder, imported, audio=audio, max_new_tokens=4)
  stages = [row.stage for row in report.errors]
  assert stages == ["features", "encoder", "adapter", "prompt", "logits", "voice", "waveform"]
  assert report.failed == []
  damaged = shutil.copytree(folder, tmp_path / "damaged")
  edit(damaged / "g_00000012", "generator", lambda s: s["conds.1.bias"].add_(1e-3))
  report = verify("mooer-speech", damaged, imported, audio=audio, max_new_tokens=4)
  assert report.failed == ["waveform"]
