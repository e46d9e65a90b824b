"""Options of `import` and `verify`. Imports neither torch nor JAX, so that `--help` is quick."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `import` and `verify` beyond the kind, the source and the target.

  Attributes:
    task: task of the model: asr, ast or asr_ast_mtl.
    llm: folder of the LLM.
    lora: False for a release without LoRA.
    merge_lora: add the LoRA to the weights of the LLM.
    base_checkpoint: checkpoint of the model that the source was trained on.
    lora_config: adapter_config.json of training, or its folder.
    whisper: folder or file of Whisper.
    beats: file of BEATs.
    prompts: JSON file with one prompt per task.
    overwrite: replace an existing checkpoint.
  """

  task: str | None = None
  llm: Path | None = None
  lora: bool = True
  merge_lora: bool = False
  base_checkpoint: Path | None = None
  lora_config: Path | None = None
  whisper: Path | None = None
  beats: Path | None = None
  prompts: Path | None = None
  overwrite: bool = False

  def given(self) -> list[str]:
    """Lists the options that differ from their defaults."""
    return [name for name, value in vars(self).items() if value != getattr(Options, name)]

  def paths(self) -> list[Path]:
    """Lists the files and folders."""
    return [value for value in vars(self).values() if isinstance(value, Path)]


# For `--help` and for errors.
DESCRIPTIONS = {
  "llm": "folder of the LLM, or of the model that a LoRA was trained on",
  "lora_config": "adapter_config.json of training, or its folder",
  "whisper": "folder or file of Whisper",
  "beats": "file of BEATs, if the model has it",
  "prompts": "JSON file with one prompt per task",
}


def flag(option: str) -> str:
  """Returns the command-line flag of a field of `Options`."""
  return "--no-lora" if option == "lora" else f"--{option.replace('_', '-')}"
