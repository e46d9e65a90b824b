"""MooER's release folders, in the published layout: in and out."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, Lazy
from mooer_jax.config import SpeechLLMConfig, from_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.prompts import task_prompt

from . import encoder, language_model, lora
from .engine import Outgoing, map_in, map_out, read_out
from .errors import Problems
from .folders import kept_json, style_of
from .readers import Source, open_source
from .rules import Rule, Table
from .torch_out import write_torch
from .transforms import TRANSPOSE

# Which prompt each of the released models is asked with; the multitask one answers it in two lines.
TASK_PROMPTS = {
  "asr": task_prompt("asr"),
  "ast": task_prompt("ast"),
  "asr_ast_mtl": task_prompt("ast"),
}
ENCODER_FOLDER, ENCODER_FILE = "paraformer_encoder", "paraformer-encoder.pth"
ADAPTER_FILE, LORA_FOLDER = "adapter_project.pt", "lora_weights"
# An encoder that was trained along is saved with the adapter, under this name.
TUNED_ENCODER = "encoder.model."

ADAPTER = Table((
  Rule("encoder_projector.{x:linear1|linear2}.weight", "connector/{x}/kernel", TRANSPOSE),
  Rule("encoder_projector.{x:linear1|linear2}.bias", "connector/{x}/bias"),
))  # fmt: skip

# The original's decoding options; eos is biased, and alone ends an answer.
DECODING = {
  "num_beams": 4,
  "length_penalty": 0.8,
  "max_new_tokens": 200,
  "min_length": 1,
  "repetition_penalty": 1.0,
}
EOS_BIAS = -0.2


def decoding(eos_id: int) -> dict[str, Any]:
  """Content of generation.json."""
  return {**DECODING, "eos_ids": [eos_id], "sequence_bias": [[eos_id, EOS_BIAS]]}


@dataclasses.dataclass(frozen=True)
class Release:
  """A release folder that was opened; no tensor is read."""

  config: SpeechLLMConfig
  leaves: dict[str, Lazy]
  style: dict[str, Any]
  tokenizer: tuple[Path, ...]
  kept: dict[str, tuple[Path, ...]]
  ignored: tuple[str, ...]
  notes: tuple[str, ...]


def open_release(
  folder: Path,
  problems: Problems,
  *,
  task: str,
  llm: Path | None = None,
  with_lora: bool = True,
  merge_lora: bool = False,
) -> Release | None:
  """Opens all parts of a release.

  Args:
    folder: with paraformer_encoder/, a folder per task, and the LLM's folder.
    problems: gets everything that does not fit.
    task: "asr", "ast" or "asr_ast_mtl".
    llm: folder of the LLM, if it is elsewhere.
    with_lora: False for a release without lora_weights/, whose LLM is taken as it is.
    merge_lora: add the LoRA to the LLM's weights instead of keeping it apart.

  Returns:
    Release, or None if a part is missing.
  """
  encoder_file = folder / ENCODER_FOLDER / ENCODER_FILE
  adapter_file = folder / task / ADAPTER_FILE
  lora_folder = folder / task / LORA_FOLDER
  for path in (encoder_file, adapter_file, *([lora_folder] if with_lora else [])):
    if not path.exists():
      hint = "; pass --no-lora for a model without" if path == lora_folder else ""
      problems.add(f"{path}: not found{hint}")
  llm_folder = llm or _find_llm(folder, problems)
  if problems.found or llm_folder is None:
    return None
  heard = encoder.open_encoder(
    open_source(encoder_file), encoder_file.with_name(encoder.CMVN_FILE), problems
  )
  model = language_model.open_model(llm_folder, problems)
  added = lora.open_folder(lora_folder, problems) if with_lora else None
  if heard is None or model is None or (with_lora and added is None):
    return None
  adapter_source = open_source(adapter_file)
  leaves = {**heard.leaves, **model.leaves}
  tuned = _tuned_encoder(adapter_source, encoder.shapes(heard.config), problems)
  leaves |= tuned
  connector = _connector_config(adapter_source, heard.config.width, problems)
  if connector is None:
    return None
  joined = connector.stack * heard.config.width
  wanted = {
    "connector/linear1/kernel": (joined, connector.hidden_width),
    "connector/linear1/bias": (connector.hidden_width,),
    "connector/linear2/kernel": (connector.hidden_width, model.config.width),
    "connector/linear2/bias": (model.config.width,),
  }
  rest = [name for name in adapter_source.tensors if not name.startswith(TUNED_ENCODER)]
  leaves |= map_in(adapter_source, ADAPTER, wanted, problems, names=rest).leaves
  decoder = model.config
  style: dict[str, Any] = {"llm": {"head_present": model.head_present}}
  kept = {"llm": model.kept}
  if added is not None:
    tuned_llm = added.added_to(decoder)
    lora_leaves = lora.map_lora(added, tuned_llm, problems).leaves
    if merge_lora and not problems.found:
      leaves = lora.merge(leaves, lora_leaves, added.scale)
    elif not merge_lora:
      leaves |= lora_leaves
      decoder, style["peft"] = tuned_llm, added.style
      kept["lora"] = (lora_folder / lora.CONFIG_FILE,)
  style["mooer"] = {
    "task": task,
    "llm": llm_folder.name,
    "encoder_prefix": heard.prefix,
    "tuned_encoder": sorted(tuned),
  }
  shadowed = [f"{ENCODER_FILE}: {path} (replaced by {ADAPTER_FILE})" for path in tuned]
  return Release(
    config=SpeechLLMConfig(
      encoders=(heard.config,),
      frontends=(heard.frontend,),
      connector=connector,
      decoder=decoder,
      prompts=((task, TASK_PROMPTS[task]),),
    ),
    leaves=leaves,
    style=style,
    tokenizer=model.tokenizer,
    kept=kept,
    ignored=(*heard.ignored, *model.ignored, *adapter_source.ignored, *shadowed),
    notes=model.notes,
  )


def _find_llm(folder: Path, problems: Problems) -> Path | None:
  found = sorted({
    path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json")
  })
  if len(found) == 1:
    return found[0]
  what = "no folder with a config.json" if not found else f"several: {', '.join(map(str, found))}"
  problems.add(f"{folder}: {what}; name the LLM's folder with --llm")
  return None


def _tuned_encoder(
  source: Source, shapes: Mapping[str, tuple[int, ...]], problems: Problems
) -> dict[str, Lazy]:
  """The encoder's leaves that stand in the adapter's file; there may be some or none."""
  rules = encoder.table(TUNED_ENCODER)
  names = [name for name in source.tensors if name.startswith(TUNED_ENCODER)]
  mapped = [found[0] for name in names if (found := rules.to_jax(name))]
  expected = {path: shapes[path] for path in mapped if path in shapes}
  return map_in(source, rules, expected, problems, names=names).leaves


def _connector_config(source: Source, width: int, problems: Problems) -> LinearConfig | None:
  name = "encoder_projector.linear1.weight"
  if name not in source.tensors or len(source.tensors[name].shape) != 2:
    problems.add(f"{source.path}: {name} is missing or no matrix")
    return None
  hidden, joined = source.tensors[name].shape
  if joined % width:
    problems.add(f"{name} takes {joined} values, which are no whole frames of {width}")
    return None
  return LinearConfig(stack=joined // width, hidden_width=hidden)


def export(about: Checkpoint, folder: Path, *, shard_bytes: int) -> None:
  """Writes a checkpoint as a release folder.

  Args:
    about: of a speech LLM with SAN-M and a linear adapter.
    folder: to write into; it exists.
    shard_bytes: size that a file of the LLM does not exceed unless one tensor does.

  Raises:
    ConversionError, ValueError: if the checkpoint holds something that has no place there.
  """
  config = from_json(about.config)
  style = style_of(about, "mooer")
  task = style.get("task", config.prompts[0][0])
  encoder_folder, task_folder = folder / ENCODER_FOLDER, folder / task
  encoder_folder.mkdir()
  task_folder.mkdir()
  encoder.export(about, encoder_folder / ENCODER_FILE, prefix=style.get("encoder_prefix", ""))
  problems = Problems()
  paths = [path for path in tree.flatten(about.params) if path.startswith("connector/")]
  tensors: list[Outgoing] = map_out(about, ADAPTER, paths, problems)
  tensors += map_out(
    about, encoder.table(TUNED_ENCODER), style.get("tuned_encoder", ()), problems
  )
  problems.check(str(about.folder))
  write_torch(task_folder / ADAPTER_FILE, tensors, read_out(about, tensors))
  if config.decoder.lora_rank:
    (task_folder / LORA_FOLDER).mkdir()
    lora.export(
      about,
      config.decoder,
      task_folder / LORA_FOLDER,
      style=style_of(about, "peft"),
      original=kept_json(about, "lora", lora.CONFIG_FILE),
    )
  llm_folder = folder / style.get("llm", "llm")
  llm_folder.mkdir()
  language_model.export_folder(about, config.decoder, llm_folder, shard_bytes=shard_bytes)


