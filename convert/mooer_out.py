"""A checkpoint as one of MooER's release folders, in the published layout."""

from pathlib import Path

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import SpeechLLMConfig, from_json

from . import encoder, language_model, lora, lora_out, mooer
from .engine import Outgoing, map_out, read_out
from .errors import Problems
from .folders import kept_json, style_of
from .readback import check_same
from .torch_out import write_torch


def export(about: Checkpoint, folder: Path, *, shard_bytes: int) -> None:
  """Writes a checkpoint as a release folder.

  Args:
    about: of a speech LLM with SAN-M and a linear adapter.
    folder: to write into; it exists.
    shard_bytes: size that a file of the LLM does not exceed unless one tensor does.

  Raises:
    ConversionError, ValueError: if the checkpoint holds something that has no place there, or that
      who reads the release would take for something else.
  """
  config = from_json(about.config)
  style = style_of(about, "mooer")
  task = released_task(about, config)
  encoder_folder, task_folder = folder / mooer.ENCODER_FOLDER, folder / task
  encoder_folder.mkdir()
  task_folder.mkdir()
  encoder.export(about, encoder_folder / mooer.ENCODER_FILE, prefix=style.get("encoder_prefix", ""))
  problems = Problems()
  paths = [path for path in tree.flatten(about.params) if path.startswith("connector/")]
  tensors: list[Outgoing] = map_out(about, mooer.ADAPTER, paths, problems)
  tensors += map_out(
    about, encoder.table(mooer.TUNED_ENCODER), style.get("tuned_encoder", ()), problems
  )
  problems.check(str(about.folder))
  write_torch(task_folder / mooer.ADAPTER_FILE, tensors, read_out(about, tensors))
  if config.decoder.lora_rank:
    (task_folder / mooer.LORA_FOLDER).mkdir()
    lora_out.export(
      about,
      config.decoder,
      task_folder / mooer.LORA_FOLDER,
      style=style_of(about, "peft"),
      original=kept_json(about, "lora", lora.CONFIG_FILE),
    )
  llm_folder = folder / style.get("llm", "llm")
  llm_folder.mkdir()
  language_model.export_folder(about, config.decoder, llm_folder, shard_bytes=shard_bytes)
  # Heads, features, limits: whatever no file tells is seen by reading them again.
  problems = Problems()
  again = mooer.open_release(folder, problems, task=task, with_lora=bool(config.decoder.lora_rank))
  if again is not None:
    check_same(config, again.config, problems)
  problems.check(str(about.folder))


def released_task(about: Checkpoint, config: SpeechLLMConfig) -> str:
  """The task of a model that a release can carry: one, asked with MooER's own words.

  Raises:
    ConversionError: if the model has other prompts, another template or another limit.
  """
  problems = Problems()
  where = about.folder / "config.json"
  known = " or ".join(f"{{{task!r}: {prompt!r}}}" for task, prompt in mooer.TASK_PROMPTS.items())
  tasks = [pair[0] for pair in config.prompts]
  if len(tasks) > 1:
    problems.add(
      f"prompts: a release is for one task, this model was trained for {', '.join(tasks)}; leave"
      f" the one that is meant in 'prompts' of {where}, and export once for each"
    )
  for task, prompt in config.prompts:
    if mooer.TASK_PROMPTS.get(task) != prompt:
      problems.add(
        f"prompts: {{{task!r}: {prompt!r}}} is none that a release knows, which are {known}; train"
        " with one of them (config.model.prompts)"
      )
  if not tasks:
    problems.add(f"prompts: none; train with {known} (config.model.prompts)")
  if config.template != SpeechLLMConfig.template:
    problems.add(
      f"template={config.template!r}: releases are asked in {SpeechLLMConfig.template!r}; train"
      " with that (config.model.template)"
    )
  if config.max_audio_s != SpeechLLMConfig.max_audio_s:
    problems.add(
      f"max_audio_s={config.max_audio_s:g}: a release tells no limit, and is taken for"
      f" {SpeechLLMConfig.max_audio_s:g} s; train with that (config.model.max_audio_s), or set it"
      f" in {where} if the model is good for it"
    )
  problems.check(f"{about.folder} cannot be a release")
  return tasks[0]
