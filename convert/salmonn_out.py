"""A checkpoint as SALMONN's files: what was trained, Whisper, BEATs and the LLM."""

from pathlib import Path
from typing import Any

import torch

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import SpeechLLMConfig, from_json
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.prompts import TEMPLATES
from mooer_jax.text.tokenizer import Tokenizer

from . import beats, language_model, lora, salmonn, salmonn_options, whisper, whisper_names
from .engine import map_out, read_out
from .errors import Problems
from .folders import style_of, write_json
from .readback import check_same
from .rules import Rule, Table
from .torch_out import to_torch

WHISPER_FOLDER, LLM_FOLDER, PROMPTS_FILE = "whisper", "llm", "test_prompt.json"
_KINDS = (("whisper",), ("whisper", "beats"))


def export(about: Checkpoint, folder: Path, *, shard_bytes: int) -> None:
  """Writes salmonn_v1.pth, whisper/, beats.pt, llm/ and test_prompt.json.

  Args:
    about: of a speech LLM with Whisper, perhaps BEATs, and a Q-Former.
    folder: to write into; it exists.
    shard_bytes: size that a file of Whisper or the LLM does not exceed unless one tensor does.

  Raises:
    ConversionError, ValueError: if the checkpoint holds something that has no place there, or that
      who reads the files would take for something else.
  """
  config = from_json(about.config)
  problems = Problems()
  kinds = tuple(encoder.kind for encoder in config.encoders)
  if kinds not in _KINDS:
    problems.add(f"encoders={list(kinds)}: SALMONN's are whisper, or whisper and beats")
  if not isinstance(config.connector, QFormerConfig):
    problems.add(f"connector={config.connector.kind!r}: SALMONN's is a qformer")
  if not config.encoder_norm:
    problems.add("encoder_norm=False: SALMONN's frames pass a LayerNorm")
  problems.check(f"{about.folder} cannot be SALMONN")
  heard, connector = config.encoders[0], config.connector
  assert isinstance(heard, WhisperConfig) and isinstance(connector, QFormerConfig)

  (folder / WHISPER_FOLDER).mkdir()
  prefix = style_of(about, "whisper").get("prefix", whisper_names.PREFIX)
  whisper.export(about, heard, folder / WHISPER_FOLDER, prefix=prefix, shard_bytes=shard_bytes)
  if "beats" in kinds:
    beats.export(about, folder / beats.FILE)
  (folder / LLM_FOLDER).mkdir()
  llm_folder = folder / LLM_FOLDER
  language_model.export_folder(about, config.decoder, llm_folder, shard_bytes=shard_bytes)
  _write_trained(about, config, connector, folder / salmonn.FILE)
  write_json(folder / PROMPTS_FILE, dict(config.prompts))

  # Whatever no file tells is seen by reading them again.
  problems = Problems()
  again = salmonn.open_model(
    folder / salmonn.FILE,
    problems,
    whisper_path=folder / WHISPER_FOLDER,
    beats_path=folder / beats.FILE if "beats" in kinds else None,
    llm=llm_folder,
    prompts=dict(config.prompts),
  )
  if again is not None:
    check_same(config, again.config, problems)
    if not Tokenizer.from_folder(about.tokenizer).bos_ids:
      problems.add(
        "tokenizer: its prompts are not led by BOS, SALMONN's are; train with add_bos_token true in"
        " tokenizer_config.json"
      )
  problems.check(str(about.folder))


def _write_trained(
  about: Checkpoint, config: SpeechLLMConfig, connector: QFormerConfig, file: Path
) -> None:
  """Writes {"model": tensors, "config": {"model": what the tensors do not tell}}."""
  style = style_of(about, "salmonn")
  tuned = style.get("tuned", {})
  rules = [rule for rule in salmonn.trained_table().rules if _is_new(rule.jax)]
  rules += lora.table(style.get("adapter", "default"), salmonn.LLM).rules
  everything = salmonn.trained_table()
  for path, name in tuned.items():
    mapped = everything.to_jax(name)
    assert mapped is not None, name
    rules.append(Rule(name, path, mapped[1]))
  paths = [path for path in tree.flatten(about.params) if _is_new(path) or path in tuned]
  paths += lora.paths(about)
  problems = Problems()
  tensors = map_out(about, Table(rules), paths, problems)
  problems.check(str(about.folder))
  arrays = read_out(about, tensors)
  model = {t.name: to_torch(array) for t, array in zip(tensors, arrays, strict=True)}
  torch.save({salmonn.PART: model, "config": {"model": _options(about, config, connector)}}, file)


def _is_new(path: str) -> bool:
  return path.startswith(("connector/", "encoder_norms/"))


def _options(
  about: Checkpoint, config: SpeechLLMConfig, connector: QFormerConfig
) -> dict[str, Any]:
  """The model section of the original's configuration, without its paths."""
  decoder = config.decoder
  tokenizer = Tokenizer.from_folder(about.tokenizer)
  [end] = [token for token, i in tokenizer.vocabulary().items() if i == tokenizer.eos_id]
  options: dict[str, Any] = {
    "use_speech_Qformer": True,
    "window_level_Qformer": True,
    "num_speech_query_token": connector.queries,
    "second_per_window": salmonn_options.seconds_of(connector.window),
    "second_stride": salmonn_options.seconds_of(connector.stride),
    "lora": bool(decoder.lora_rank),
    "prompt_template": TEMPLATES[config.template].replace("{prompt}", "{}"),
    "end_sym": end,
  }
  if decoder.lora_rank:
    alpha = decoder.lora_alpha
    options["lora_rank"] = decoder.lora_rank
    options["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
    options["lora_dropout"] = decoder.lora_dropout
  return options
