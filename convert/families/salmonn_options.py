"""SALMONN's training configuration, for options that its tensors do not show."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.prompts import SPEECH, TEMPLATES, fill_template
from mooer_jax.text.tokenizer import Tokenizer

from ..core.errors import Problems
from ..core.folders import write_json
from ..core.kind import Writer
from ..readers import read_object
from ..readers.torch_file import read_dict

# The model section of the published configuration.
USUAL = {
  "use_speech_Qformer": True,
  "window_level_Qformer": True,
  "second_per_window": 0.333333,
  "second_stride": 0.333333,
  "lora_rank": 8,
  "lora_alpha": 32,
  "lora_dropout": 0.1,
  "prompt_template": "USER: {}\nASSISTANT:",
}
_FRAMES, _SECONDS = 1500, 30.0  # to which the original refers windows, for every Whisper


def read_options(file: Path, *, problems: Problems, notes: list[str]) -> dict[str, Any]:
  """Returns the model section of the training configuration in the file, over USUAL."""
  section = (read_dict(file, "config") or {}).get("model")
  if not isinstance(section, dict):
    notes.append(f"{file.name} has no training configuration; the published one is used")
    return dict(USUAL)
  options = {**USUAL, **section}
  for name in ("use_speech_Qformer", "window_level_Qformer"):
    if options[name] is not True:
      problems.add(f"{name}={options[name]!r}: only True can be expressed")
  for name, usual in USUAL.items():
    kind = type(usual) if isinstance(usual, bool | str) else (int, float)
    if not isinstance(options[name], kind):
      problems.add(f"{name}={options[name]!r}: must be a value such as {usual!r}")
      options[name] = usual
  return options


def frames_of(seconds: float) -> int:
  """Returns the frames in a window, as the original counts them."""
  return round(_FRAMES * seconds / _SECONDS)


def seconds_of(frames: int) -> float:
  """Inverse of `frames_of`."""
  return frames * _SECONDS / _FRAMES


def find_template(
  options: Mapping[str, Any], prompts: Mapping[str, str], problems: Problems
) -> str:
  """Returns our name of the original's prompt_template, and checks that it fits the prompts."""
  known = {
    text.replace("{prompt}", "{}"): name for name, text in TEMPLATES.items() if SPEECH not in text
  }
  template = known.get(options["prompt_template"])
  if template is None:
    problems.add(f"prompt_template={options['prompt_template']!r}: supported are {[*known]}")
    return SpeechLLMConfig.chat_template
  for task, prompt in prompts.items():
    try:
      fill_template(template, prompt, question="?")
    except ValueError as error:
      problems.add(f"the prompt of task {task!r}: {error}")
  return template


def with_bos(write: Writer) -> Writer:
  """Returns a writer of the tokenizer with BOS, if it has one, at the beginning of prompts."""

  def write_config(folder: Path) -> None:
    write(folder)
    tokenizer, file = Tokenizer.from_folder(folder), folder / "tokenizer_config.json"
    config = read_object(file) if file.is_file() else {}
    if not tokenizer.bos_ids and config.get("bos_token"):
      write_json(file, {**config, "add_bos_token": True})

  return write_config


def check_tokens(options: Mapping[str, Any], tokenizer: Tokenizer, problems: Problems) -> None:
  """Adds a problem if prompts do not begin with BOS, or if end_sym is not the eos token."""
  if not tokenizer.bos_ids:
    problems.add("the LLM's tokenizer has no BOS (bos_token), with which SALMONN's prompts begin")
  end = options.get("end_sym")
  if end is not None and tokenizer.vocabulary().get(end) != tokenizer.eos_id:
    problems.add(f"end_sym={end!r} is not the eos_token of the LLM's tokenizer")
