"""The README's Python code of the library runs as written."""

import re

import jax
import pytest

from mooer_jax import checkpoint
from mooer_jax.config import to_json
from mooer_jax.text.tokenizer import Tokenizer
from tests import tiny


@pytest.fixture
def folder(tmp_path):
  """A tiny random model with a prompt `asr`."""
  config = tiny.answering_config(
    vocab_size=12, chat_template="bare", max_audio_s=6.0, prompts=(("asr", "<|transcribe|>"),)
  )
  return checkpoint.save(
    tmp_path / "step_00000001",
    params=tiny.answering_params(config),
    config_json=to_json(config),
    tokenizer=Tokenizer.from_characters(
      "0123456789", ("<|transcribe|>", "<|end|>"), eos="<|end|>"
    ).save,
    generation={},
  )


def code_with(page: str, call: str) -> str:
  """The only Python block of a page that contains a call."""
  [block] = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if call in b)
  return block


def test_the_four_functions_run_in_a_row(repo_root, folder, monkeypatch):
  code = code_with((repo_root / "README.md").read_text("utf-8"), "speech_llm.splice(")
  assert code.count('"out/demo/train"') == 1
  monkeypatch.chdir(repo_root)  # for the clip
  names = {}
  prepare, run = code.replace('"out/demo/train"', repr(str(folder))).split("\n\nframes_BTD")
  exec(prepare, names)

  def traced():  # eagerly, each operation would be compiled by itself
    exec(f"frames_BTD{run}", names)
    return names["speech_BSD"], names["hidden_BSD"]

  speech, hidden = jax.eval_shape(traced)
  text = sum(ids.shape[1] for ids in (names["batch"].prefix_BS, names["batch"].suffix_BS))
  assert hidden.shape == (1, speech.shape[1] + text, names["config"].decoder.hidden_size)
