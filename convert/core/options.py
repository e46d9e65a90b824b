"""Options of `import` and `verify`. Imports neither torch nor JAX, so that `--help` is quick."""

import dataclasses
from pathlib import Path
from typing import Any


def _option(description: str, default: Any = None) -> Any:
  return dataclasses.field(default=default, metadata={"help": description})


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `import` and `verify` beyond the kind, the source and the target."""

  task: str | None = _option("task of the model, such as asr or s2s_chat")
  llm: Path | None = _option("folder of the LLM, or of the model that a LoRA was trained on")
  lora: bool = _option("leave the LoRA out", True)  # the flag is --no-lora
  merge_lora: bool = _option("add the LoRA to the weights of the LLM", False)
  base_checkpoint: Path | None = _option("checkpoint of the model that SRC was trained on")
  lora_config: Path | None = _option("adapter_config.json of training, or its folder")
  whisper: Path | None = _option("folder or file of Whisper")
  beats: Path | None = _option("file of BEATs, if the model has it")
  prompts: Path | None = _option("JSON file with one prompt per task")
  overwrite: bool = _option("replace a checkpoint", False)

  def given(self) -> list[str]:
    """Lists the options that differ from their defaults."""
    return [name for name, value in vars(self).items() if value != getattr(Options, name)]

  def paths(self) -> list[Path]:
    """Lists the files and folders."""
    return [value for value in vars(self).values() if isinstance(value, Path)]


DESCRIPTIONS = {field.name: field.metadata["help"] for field in dataclasses.fields(Options)}


def flag(option: str) -> str:
  """Returns the command-line flag of a field of `Options`."""
  return "--no-lora" if option == "lora" else f"--{option.replace('_', '-')}"
