"""What a release cannot carry is told by name, and nothing is left; what it can comes back."""

import json
import shutil

import pytest

from convert.core.errors import ConversionError
from convert.core.folders import complete_folder
from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from mooer_jax import checkpoint
from mooer_jax.config import from_json
from tests.convert.releases import changed, release

ASR, AST = "Transcribe speech to text. ", "Translate speech to english text. "


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  folder = tmp_path_factory.mktemp("exporting")
  release(folder / "release")
  import_checkpoint("mooer", folder / "release", folder / "ours", options=Options(task="asr"))
  return folder / "ours"


@pytest.fixture
def ours(imported, tmp_path):
  """A checkpoint that a test may change."""
  shutil.copytree(imported, tmp_path / "ours")
  return tmp_path / "ours"


def config_of(folder):
  return from_json(checkpoint.describe(folder).config)


def set_what_files_cannot_say(config):
  config["encoders"][0].update(heads=2, norm_eps=1e-5)
  config["frontends"][0].update(lfr_stride=5)
  config["frontends"][0]["fbank"].update(window="povey", sample_rate_hz=8000)


@pytest.mark.parametrize(
  "change, words",
  [
    (
      lambda c: c.update(prompts={"asr": ASR, "ast": AST}),
      ["one task, .* trained for asr, ast", "leave one in 'prompts' of .*config.json"],
    ),
    (
      lambda c: c.update(prompts={"asr": "<|transcribe|>"}),
      ["{'asr': '<|transcribe|>'}: must be one of a release", "config.model.prompts"],
    ),
    (lambda c: c.update(prompts={"asr": AST}), ["must be one of a release"]),
    (lambda c: c.update(prompts={"s2s_chat": "Answer my question with speech. "}), ["s2s_chat"]),
    (lambda c: c.update(prompts={}), ["prompts={}: must be one of a release"]),
    (lambda c: c.update(chat_template="bare"), ["template='bare'", r"model.chat_template\)$"]),
    (lambda c: c.update(max_audio_s=20.0), ["max_audio_s=20", "config.model.max_audio_s"]),
    (
      lambda c: c.update(chat_template="bare", max_audio_s=5.0, prompts={"asr": "<|transcribe|>"}),
      ["3 problems", "template", "max_audio_s", "prompts"],
    ),
    (
      set_what_files_cannot_say,
      [
        "5 problems",
        "encoders/0/heads is 2 .* read as 4",
        "encoders/0/norm_eps is 1e-05",
        "frontends/0/lfr_stride is 5",
        "fbank/window is 'povey'",
        "fbank/sample_rate_hz is 8000",
      ],
    ),
  ],
)
def test_what_a_release_cannot_carry(ours, tmp_path, change, words):
  changed(ours, change)
  with pytest.raises(ConversionError) as caught:
    export_checkpoint("mooer", ours, tmp_path / "back")
  for word in words:
    assert caught.match(f"(?s){word.replace('|', r'.')}"), word
  assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_the_task_is_the_one_that_was_trained(ours, tmp_path):
  """Whatever the release was for that training began with."""
  changed(ours, lambda c: c.update(prompts={"ast": AST}))
  export_checkpoint("mooer", ours, tmp_path / "back")
  assert (tmp_path / "back" / "ast" / "adapter_project.pt").is_file()
  assert not (tmp_path / "back" / "asr").exists()
  import_checkpoint("mooer", tmp_path / "back", tmp_path / "again", options=Options(task="ast"))
  assert config_of(tmp_path / "again") == config_of(ours)


def test_settings_of_lora_and_llm_are_carried(ours, tmp_path):
  """Also where the files that were imported say otherwise."""
  changed(ours, lambda c: c["decoder"].update(lora_dropout=0.25, rope_theta=3e4, norm_eps=1e-4))
  changed(ours, lambda c: c["encoders"][0].update(dropout=0.1))  # of training alone
  export_checkpoint("mooer", ours, tmp_path / "back")
  import_checkpoint("mooer", tmp_path / "back", tmp_path / "again", options=Options(task="asr"))
  assert config_of(tmp_path / "again").decoder == config_of(ours).decoder
  text = (tmp_path / "back" / "asr" / "lora_weights" / "adapter_config.json").read_text()
  assert json.loads(text)["lora_dropout"] == 0.25


def test_two_writers_of_one_folder_keep_apart(tmp_path):
  """The second to end is told that there is a folder now; neither sees the other's files."""
  with complete_folder(tmp_path / "out") as first:
    with (
      pytest.raises(FileExistsError, match="out exists"),
      complete_folder(tmp_path / "out") as second,
    ):
      (second / "b").touch()
      with complete_folder(tmp_path / "out") as third:
        (third / "c").touch()
    (first / "a").touch()
    shutil.rmtree(tmp_path / "out")
  assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
  (tmp_path / "plain").mkdir()
  with complete_folder(tmp_path / "out"):
    pass
  assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
  with pytest.raises(ZeroDivisionError), complete_folder(tmp_path / "out", overwrite=True) as part:
    (part / "a").touch()
    raise ZeroDivisionError
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "plain"]
