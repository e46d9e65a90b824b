"""SALMONN: what it trained, with its Whisper, BEATs and LLM: in and out."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, Lazy
from mooer_jax.config import SpeechLLMConfig, from_json
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.prompts import SALMONN_PROMPTS, TEMPLATES, read_prompts
from mooer_jax.text.tokenizer import Tokenizer

from ..core.engine import map_in, map_out, read_out
from ..core.errors import Problems
from ..core.folders import Release, check_same, style_of, write_json
from ..core.rules import IDENTITY, Rule, Table
from ..core.writers import to_torch
from ..parts import beats, language_model, lora, qformer, whisper
from ..readers import Source, open_source
from . import salmonn_options

FILE, PART = "salmonn_v1.pth", "model"
WHISPER, BEATS, LLM = "speech_encoder.", "beats.", "llama_model."
NORMS = {"whisper": "ln_speech", "beats": "ln_audio"}
# What the model is asked unless a file of prompts says otherwise.
PROMPTS = {task: texts[0] for task, texts in read_prompts(SALMONN_PROMPTS).items()}
MIN_AUDIO_S = 1.0  # as the original reads recordings
DROPOUT = 0.1  # of bert-base, from whose configuration the original makes its Q-Former
_BIAS_TABLE = r"beats\.encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight"
_LLM = r"llama_model\.(base_model\.model\.)?"
BUFFERS = (*qformer.IGNORED, rf"{_LLM}model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
DECODING = {
  "num_beams": 4,
  "max_new_tokens": 200,
  "min_length": 1,
  "length_penalty": 1.0,
  "repetition_penalty": 1.0,
}


def trained_table() -> Table:
  """The rules of all that the file can hold, but for LoRA: `lora.table(adapter, LLM)`."""
  rules = list(qformer.TABLE.rules)
  for kind, name in NORMS.items():
    rules.append(Rule(f"{name}.weight", f"encoder_norms/{kind}/scale", IDENTITY))
    rules.append(Rule(f"{name}.bias", f"encoder_norms/{kind}/bias", IDENTITY))
  # Encoders and LLM are frozen in the published training, and need not be in another.
  rules += whisper.table(WHISPER).rules
  rules += [dataclasses.replace(rule, torch=BEATS + rule.torch) for rule in beats.TABLE.rules]
  return Table((*rules, *language_model.wrapped_table(LLM).rules))


def open_model(
  file: Path,
  problems: Problems,
  *,
  whisper_path: Path,
  llm: Path,
  beats_path: Path | None = None,
  lora_config: Path | None = None,
  merge_lora: bool = False,
  prompts: Mapping[str, str] | None = None,
) -> Release | None:
  """Opens all parts of a model.

  Args:
    file: salmonn_v1.pth, or what the original's training saves.
    problems: gets everything that does not fit.
    whisper_path: folder or file with Whisper's encoder.
    llm: the LLM's folder.
    beats_path: the file of BEATs; None for a model that hears by Whisper alone.
    lora_config: an adapter_config.json with the LoRA's alpha, if the file does not tell it.
    merge_lora: add the LoRA to the LLM's weights instead of keeping it apart.
    prompts: what each task is asked; None: PROMPTS.

  Returns:
    Release, or None if there were problems.

  Raises:
    ReadError: if a file is broken.
  """
  source = open_source(file, part=PART)
  notes: list[str] = []
  options = salmonn_options.read_options(file, problems, notes)
  if (beats_path is not None) != any(name.startswith(NORMS["beats"]) for name in source.tensors):
    why = "has an ln_audio, so BEATs was used: name its file with --beats"
    problems.add(f"{file.name} {'has no ln_audio: leave out --beats' if beats_path else why}")
  heard = whisper.open_encoder(whisper_path, problems)
  audio = None if beats_path is None else beats.open_beats(beats_path, problems)
  model = language_model.open_model(llm, problems)
  connector = connector_of(source, options, problems)
  added = _open_lora(source, options, lora_config, problems, notes)
  if heard is None or model is None or connector is None or (beats_path and audio is None):
    return None
  decoder = model.config if added is None else added.added_to(model.config)
  encoders = (heard.config,) if audio is None else (heard.config, audio.config)
  below = {**heard.leaves, **(audio.leaves if audio else {}), **model.leaves}

  table = trained_table()
  expected = qformer.shapes(connector, sum(c.width for c in encoders), decoder.width)
  for encoder in encoders:
    for name in ("scale", "bias"):
      expected[f"encoder_norms/{encoder.kind}/{name}"] = (encoder.width,)
  if added is not None:
    table = Table((*table.rules, *added.table.rules))
    expected |= lora.shapes(decoder)
  tuned = {}
  for name in source.tensors:
    mapped = table.to_jax(name)
    if mapped and mapped[0] in below:
      tuned[mapped[0]] = name
      expected[mapped[0]] = below[mapped[0]].shape
  copies = dict.fromkeys(_matching(_BIAS_TABLE, source), "encoders/beats/relative_bias/embedding")
  if decoder.tied:
    head = rf"{_LLM}{re.escape(language_model.HEAD)}"
    copies |= dict.fromkeys(_matching(head, source), "decoder/embed/embedding")
  copies = {name: path for name, path in copies.items() if path in below}
  ignored = (*BUFFERS, *map(re.escape, copies))
  mapped_in = map_in(source, table, expected, problems, ignored=ignored)
  leaves = {**below, **mapped_in.leaves}
  for name, path in copies.items():
    _check_copy(source, name, leaves[path], path, problems)
  asked = PROMPTS if prompts is None else dict(prompts)
  template = salmonn_options.find_template(options, asked, problems)
  tokenizer = salmonn_options.led_by_bos(model.tokenizer)
  salmonn_options.check_tokens(options, language_model.read_tokenizer(tokenizer), problems)
  if problems.found:
    return None

  style: dict[str, Any] = {"llm": {"head_present": model.head_present}, "whisper": heard.style}
  if audio is not None:
    style["beats"] = audio.style
  style["salmonn"] = {
    "adapter": "default" if added is None else added.adapter,
    "lora_merged": added is not None and merge_lora,
    "tuned": tuned,
  }
  if added is not None and merge_lora:
    pairs = {path: leaf for path, leaf in leaves.items() if path.endswith(("/lora_a", "/lora_b"))}
    plain = {path: leaf for path, leaf in leaves.items() if path not in pairs}
    leaves, decoder = lora.merge(plain, pairs, added.scale), model.config
  if tuned:
    notes.append(
      f"{len(tuned)} tensors of {file.name} replace those of the folders: {_some(tuned)}"
    )
  parts = [part for part in (heard, audio, model) if part is not None]
  return Release(
    config=SpeechLLMConfig(
      encoders=encoders,
      frontends=(heard.frontend,) if audio is None else (heard.frontend, audio.frontend),
      encoder_norm=True,
      connector=connector,
      decoder=decoder,
      template=template,
      max_audio_s=float(heard.frontend.chunk_s),
      min_audio_s=MIN_AUDIO_S,
      channel="first",
      prompts=tuple(asked.items()),
    ),
    leaves=leaves,
    style=style,
    tokenizer=tokenizer,
    kept={"llm": model.kept, "whisper": heard.kept},
    ignored=(*mapped_in.ignored, *source.ignored, *(n for part in parts for n in part.ignored)),
    notes=(*notes, *source.notes, *(note for part in parts for note in part.notes)),
  )


def decoding(eos_id: int) -> dict[str, Any]:
  """Content of generation.json."""
  return {**DECODING, "eos_token_id": [eos_id]}


def connector_of(
  source: Source, options: Mapping[str, Any], problems: Problems
) -> QFormerConfig | None:
  """The Q-Former of a file with such options; None where something does not fit."""
  return qformer.qformer_config(
    source,
    problems,
    window=salmonn_options.frames_of(options["second_per_window"]),
    stride=salmonn_options.frames_of(options["second_stride"]),
    edge="drop",
    dropout=DROPOUT,
  )


def _open_lora(
  source: Source,
  options: Mapping[str, Any],
  lora_config: Path | None,
  problems: Problems,
  notes: list[str],
) -> lora.Lora | None:
  first = next((t for name, t in source.tensors.items() if ".lora_A." in name), None)
  if first is None:
    if options.get("lora"):
      problems.add("its configuration says lora=True, but there is no LoRA in it")
    if lora_config is not None:
      problems.add("--lora-config: there is no LoRA in the file")
    return None
  if not options.get("lora", True):
    problems.add("its configuration says lora=False, but there is a LoRA in it")
  rank = first.shape[0] if first.shape else 0
  told: Mapping[str, Any] = {**options, "r": options["lora_rank"], "peft_type": "LORA"}
  if lora_config is not None:
    told = lora.read_options(lora.config_file(lora_config), problems) or told
  if told["r"] != rank:
    origin = "--lora-config" if lora_config else "its configuration, or the published one,"
    problems.add(
      f"the LoRA has rank {rank}, {origin} says {told['r']}, so its alpha is not known; pass the"
      " adapter_config.json of training with --lora-config"
    )
  found = lora.from_source(source, {**told, "r": max(rank, 1)}, problems, prefix=LLM)
  if found is not None:
    notes.append(
      f"LoRA: rank {rank}, alpha {found.alpha:g}, on {', '.join(found.targets)}"
      " (--lora-config tells another alpha)"
    )
  return found


def _matching(pattern: str, source: Source) -> list[str]:
  return [name for name in source.tensors if re.fullmatch(pattern, name)]


def _check_copy(source: Source, name: str, leaf: Lazy, path: str, problems: Problems) -> None:
  """PyTorch's state dict repeats a shared tensor, frozen or not; it must be the one that we have.

  The original adds a row for [PAD] to a shared embedding, which is left out.
  """
  copy, ours = source.read(name), leaf.read()
  spare = len(copy) - len(ours) if copy.shape[1:] == ours.shape[1:] else -1
  more = 1 if path.startswith("decoder/") else 0
  if not 0 <= spare <= more or not np.array_equal(copy[: len(ours)], ours.astype(copy.dtype)):
    problems.add(
      f"{name} is not the tensor of that name in the folders: it was trained with others"
    )


def _some(names: Iterable[str]) -> str:
  listed = sorted(names)
  return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")


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
  prefix = style_of(about, "whisper").get("prefix", whisper.PREFIX)
  whisper.export(about, heard, folder / WHISPER_FOLDER, prefix=prefix, shard_bytes=shard_bytes)
  if "beats" in kinds:
    beats.export(about, folder / beats.FILE)
  (folder / LLM_FOLDER).mkdir()
  llm_folder = folder / LLM_FOLDER
  language_model.export_folder(about, config.decoder, llm_folder, shard_bytes=shard_bytes)
  _write_trained(about, config, connector, folder / FILE)
  write_json(folder / PROMPTS_FILE, dict(config.prompts))

  # Whatever no file tells is seen by reading them again.
  problems = Problems()
  again = open_model(
    folder / FILE,
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
  rules = [rule for rule in trained_table().rules if _is_new(rule.jax)]
  rules += lora.table(style.get("adapter", "default"), LLM).rules
  everything = trained_table()
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
  torch.save({PART: model, "config": {"model": _options(about, config, connector)}}, file)


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
