"""What SALMONN's training configuration tells of a model, and the published values."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mooer_jax.config import SpeechLLMConfig
from mooer_jax.prompts import SPEECH, TEMPLATES, fill_template
from mooer_jax.text.tokenizer import Tokenizer

from ..core.errors import Problems
from ..core.folders import read_json, write_json
from ..readers.torch_file import TorchFile

# The model section of the published configuration: what holds where a file does not tell.
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
_FRAMES, _SECONDS = 1500, 30.0  # by which the original counts a window's frames, for every Whisper


def read_options(file: Path, problems: Problems, notes: list[str]) -> dict[str, Any]:
  """The model section of the training configuration in the file, over USUAL."""
  content = TorchFile(file).content()
  config = content.get("config") if isinstance(content, dict) else None
  section = config.get("model") if isinstance(config, dict) else None
  if not isinstance(section, dict):
    notes.append(
      f"{file.name} does not hold its training configuration; the published one is taken"
    )
    return dict(USUAL)
  options = {**USUAL, **section}
  for name in ("use_speech_Qformer", "window_level_Qformer"):
    if options[name] is not True:
      problems.add(f"{name}={options[name]!r}: only True can be expressed")
  for name, usual in USUAL.items():
    kind = type(usual) if isinstance(usual, bool | str) else (int, float)
    if not isinstance(options[name], kind):
      problems.add(f"{name}={options[name]!r}: such as {usual!r} is needed")
      options[name] = usual
  return options


def frames_of(seconds: float) -> int:
  """Frames in a window of so many seconds, as the original counts them."""
  return round(_FRAMES * seconds / _SECONDS)


def seconds_of(frames: int) -> float:
  """What the original's configuration says for a window of so many frames."""
  return frames * _SECONDS / _FRAMES


def templates() -> dict[str, str]:
  """{the original's prompt_template: our name of it}."""
  return {
    text.replace("{prompt}", "{}"): name for name, text in TEMPLATES.items() if SPEECH not in text
  }


def find_template(
  options: Mapping[str, Any], prompts: Mapping[str, str], problems: Problems
) -> str:
  """Our name of the original's prompt_template; a prompt that does not fit it is a problem."""
  known = templates()
  template = known.get(options["prompt_template"])
  if template is None:
    problems.add(f"prompt_template={options['prompt_template']!r}: known are {[*known]}")
    return SpeechLLMConfig.template
  for task, prompt in prompts.items():
    try:
      fill_template(template, prompt, question="?")
    except ValueError as error:
      problems.add(f"the prompt of task {task!r}: {error}")
  return template


def led_by_bos(write: Callable[[Path], Any]) -> Callable[[Path], None]:
  """What writes a tokenizer's files, with BOS before every prompt, as the original puts it there.

  A tokenizer without a BOS stays without.
  """

  def write_config(folder: Path) -> None:
    write(folder)
    tokenizer, file = Tokenizer.from_folder(folder), folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    if not tokenizer.bos_ids and config.get("bos_token"):
      write_json(file, {**config, "add_bos_token": True})

  return write_config


def check_tokens(options: Mapping[str, Any], tokenizer: Tokenizer, problems: Problems) -> None:
  """Prompts must begin with BOS, answers end with the token that ends them here."""
  if not tokenizer.bos_ids:
    problems.add("the LLM's tokenizer has no BOS (bos_token), which leads every prompt of SALMONN")
  end = options.get("end_sym")
  if end is not None and tokenizer.vocabulary().get(end) != tokenizer.eos_id:
    problems.add(f"end_sym={end!r} is not the token that ends an answer in the LLM's tokenizer")
