"""SALMONN: its own file, with its Whisper, BEATs and LLM, in and out."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mooer_jax.checkpoint import Checkpoint, LazyArray
from mooer_jax.config import SpeechLLMConfig, from_json, to_json
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.prompts import SALMONN_PROMPTS, TEMPLATES, read_prompts
from mooer_jax.text.tokenizer import Tokenizer

from ..core.engine import Mapped, map_in, map_out, paths_of, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import check_roundtrip, style_of, write_json
from ..core.kind import Kind, Opened, combine
from ..core.options import Options
from ..core.rules import Rule, Table, norm
from ..core.shapes import connector_shapes
from ..core.writers import state_dict
from ..parts import beats, language_model, lora, qformer, whisper
from ..parts.tokenizer_files import read_tokenizer
from ..readers import Source, check_file, open_source
from ..verify.reference import salmonn as reference
from . import salmonn_options

FILE, PART = "salmonn_v1.pth", "model"
WHISPER, BEATS, LLM = "speech_encoder.", "beats.", "llama_model."
NORMS = {"whisper": "ln_speech", "beats": "ln_audio"}
# Default prompts.
PROMPTS = {task: texts[0] for task, texts in read_prompts(SALMONN_PROMPTS).items()}
MIN_AUDIO_S = 1.0  # to which the original pads
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


def trained_table(more: Sequence[Rule] = ()) -> Table:
  """Rules of the file; `more` are those of its LoRA (`lora.table`)."""
  rules = list(qformer.TABLE.rules)
  for kind, name in NORMS.items():
    rules += norm(name, f"encoder_norms/{kind}")
  # The published training freezes encoders and LLM; others may train them.
  rules += whisper.table(WHISPER).rules
  rules += [dataclasses.replace(rule, torch=BEATS + rule.torch) for rule in beats.TABLE.rules]
  return Table((*rules, *language_model.wrapped_table(LLM).rules, *more))


def open_model(file: Path, options: Options, problems: Problems) -> Opened:
  """Opens all parts of a model.

  Args:
    file: salmonn_v1.pth, or a checkpoint of the original's training.
    options: whisper and llm; beats, if the model has it; lora_config with the LoRA's alpha, if the
      file does not have it; merge_lora; prompts (default: PROMPTS).
  """
  if options.whisper is None or options.llm is None:
    raise ValueError("salmonn needs --whisper and --llm: its file has only the trained parts")
  prompts = PROMPTS if options.prompts is None else _read_prompts(options.prompts)
  source = open_source(file, part=PART)
  notes: list[str] = []
  training = salmonn_options.read_options(file, problems=problems, notes=notes)
  parts = _open_parts(source, options, problems)
  connector = problems.attempt(
    qformer.qformer_config,
    source,
    window=salmonn_options.frames_of(training["second_per_window"]),
    stride=salmonn_options.frames_of(training["second_stride"]),
    edge="drop",
    dropout=DROPOUT,
  )
  added = problems.attempt(_open_lora, source, training, options.lora_config, notes=notes)
  if None in parts or connector is None:
    problems.check(str(file))
  assert connector is not None
  *streams, model = parts
  decoder = model.config if added is None else added.added_to(model.config)
  below = {path: leaf for part in parts for path, leaf in part.leaves.items()}
  frame_width = sum(stream.config.hidden_size for stream in streams)
  expected = connector_shapes(connector, frame_width, decoder.hidden_size)
  for stream in streams:
    for name in ("scale", "bias"):
      expected[f"encoder_norms/{stream.config.kind}/{name}"] = (stream.config.hidden_size,)
  if added is not None:
    expected |= lora.shapes(decoder)
  mapped, tuned = _map_trained(
    source,
    below,
    expected,
    problems=problems,
    table=trained_table(() if added is None else added.table.rules),
    tied=decoder.tie_word_embeddings,
  )
  leaves = below | mapped.leaves
  chat_template = salmonn_options.find_template(training, prompts, problems)
  problems.check(str(file))
  write_tokenizer = salmonn_options.with_bos(model.tokenizer)
  tokenizer = read_tokenizer(write_tokenizer)
  salmonn_options.check_tokens(training, tokenizer, problems)

  if added is not None and options.merge_lora:
    leaves, decoder = lora.merge(leaves, added.scale), model.config
  if tuned:
    listed = ", ".join(sorted(tuned)[:3]) + (", …" if len(tuned) > 3 else "")
    notes.append(f"{len(tuned)} tensors of {file.name} replace those of the folders: {listed}")
  shared = combine(parts, source)
  shared["style"]["salmonn"] = {
    "adapter": "default" if added is None else added.adapter,
    "lora_merged": added is not None and options.merge_lora,
    "tuned": tuned,
  }
  shared["ignored"] = (*mapped.ignored, *shared["ignored"])
  shared["notes"] = (*notes, *shared["notes"])
  config = SpeechLLMConfig(
    encoders=tuple(stream.config for stream in streams),
    frontends=tuple(stream.frontend for stream in streams),
    encoder_norm=True,
    connector=connector,
    decoder=decoder,
    chat_template=chat_template,
    max_audio_s=float(streams[0].frontend.chunk_s),
    min_audio_s=MIN_AUDIO_S,
    channel="first",
    prompts=tuple(prompts.items()),
  )
  return Opened(
    config=to_json(config),
    leaves=leaves,
    tokenizer=write_tokenizer,
    generation={**DECODING, "eos_token_id": [tokenizer.eos_id]},
    **shared,
  )


def _open_parts(source: Source, options: Options, problems: Problems) -> list[Any]:
  """Opens Whisper, perhaps BEATs, and the LLM; None for one that cannot be expressed."""
  normed = any(name.startswith(NORMS["beats"]) for name in source.tensors)
  if normed != (options.beats is not None):
    hint = "an ln_audio, so pass --beats FILE" if normed else "no ln_audio, so leave out --beats"
    problems.add(f"{source.path.name} has {hint}")
  openers = (
    (whisper.open_encoder, options.whisper),
    (beats.open_beats, options.beats),
    (language_model.open_model, options.llm),
  )
  return [problems.attempt(opener, path, problems) for opener, path in openers if path is not None]


def _map_trained(
  source: Source,
  below: Mapping[str, LazyArray],
  expected: dict[str, tuple[int, ...]],
  *,
  problems: Problems,
  table: Table,
  tied: bool,
) -> tuple[Mapped, dict[str, str]]:
  """Maps the tensors of SALMONN's own file: its leaves, and path -> name of those in `below`.

  Args:
    below: leaves of the encoders and the LLM, which the file may replace.
    expected: path -> shape of the leaves that only the file has.
    tied: whether the LLM's head is its embedding.
  """
  tuned = {}
  for name in source.tensors:
    found = table.to_jax(name)
    if found and found[0] in below:
      tuned[found[0]] = name
      expected |= {found[0]: below[found[0]].shape}
  second_names = {_BIAS_TABLE: "encoders/beats/relative_bias/embedding"}
  if tied:
    second_names[_LLM + re.escape(language_model.HEAD)] = "decoder/embed/embedding"
  copies = {
    name: path
    for pattern, path in second_names.items()
    for name in source.tensors
    if path in below and re.fullmatch(pattern, name)
  }
  ignored = (*BUFFERS, *map(re.escape, copies))
  mapped = map_in(source, table, expected, problems=problems, ignored=ignored)
  for name, path in copies.items():
    leaf = mapped.leaves.get(path, below[path])
    _check_copy(source, name, leaf, path=path, problems=problems)
  return mapped, tuned


def _read_prompts(file: Path) -> dict[str, str]:
  check_file(file)
  listed = read_prompts(file)
  if several := [task for task, texts in listed.items() if len(texts) > 1]:
    raise ValueError(f"{file}: several prompts for {several[0]!r}; leave one of them")
  return {task: text for task, [text] in listed.items()}


def _open_lora(
  source: Source,
  training: Mapping[str, Any],
  lora_config: Path | None,
  *,
  notes: list[str],
) -> lora.Lora | None:
  has_lora = any(".lora_A." in name for name in source.tensors)
  if bool(training.get("lora", has_lora)) != has_lora:
    has = "a" if has_lora else "no"
    raise ConversionError(
      f"its configuration has lora={training['lora']}, but there is {has} LoRA in it"
    )
  if not has_lora:
    if lora_config is not None:
      raise ConversionError("--lora-config: there is no LoRA in the file")
    return None
  usual = {**training, "r": training["lora_rank"]}
  origin = "its training configuration, or the published one"
  added, note = lora.from_training(source, lora_config, usual=usual, origin=origin, prefix=LLM)
  notes.append(note)
  return added


def _check_copy(
  source: Source, name: str, leaf: LazyArray, *, path: str, problems: Problems
) -> None:
  """Compares the second name of a shared tensor, but for the row of [PAD] in an embedding."""
  copy, ours = source.read(name), leaf.read()
  spare = len(copy) - len(ours) if copy.shape[1:] == ours.shape[1:] else -1
  more = 1 if path.startswith("decoder/") else 0
  if not 0 <= spare <= more or not np.array_equal(copy[: len(ours)], ours.astype(copy.dtype)):
    problems.add(
      f"{name} differs from that tensor in the folders; pass the files of the model's training"
    )


WHISPER_FOLDER, LLM_FOLDER, PROMPTS_FILE = "whisper", "llm", "test_prompt.json"
_NEW = ("connector/", "encoder_norms/")  # parts that only SALMONN's file has
_KINDS = (("whisper",), ("whisper", "beats"))


def export(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
  """Writes salmonn_v1.pth, whisper/, beats.pt, llm/ and test_prompt.json.

  Raises ValueError if these files cannot express the checkpoint.
  """
  config = from_json(about.config)
  problems = Problems()
  kinds = tuple(encoder.kind for encoder in config.encoders)
  if kinds not in _KINDS:
    problems.add(f"encoders={list(kinds)}: SALMONN's are whisper, or whisper and beats")
  if not isinstance(config.connector, QFormerConfig):
    problems.add(f"connector={config.connector.kind!r}: SALMONN's is a qformer")
  if not config.encoder_norm:
    problems.add("encoder_norm=False: SALMONN applies a LayerNorm to the frames of each encoder")
  if not Tokenizer.from_folder(about.tokenizer).bos_ids:
    problems.add(
      "tokenizer: its prompts do not begin with BOS, SALMONN's do; train with add_bos_token true in"
      " tokenizer_config.json"
    )
  problems.check(f"{about.folder} cannot be SALMONN")

  (folder / WHISPER_FOLDER).mkdir()
  whisper.export(about, folder / WHISPER_FOLDER, shard_bytes)
  if "beats" in kinds:
    beats.export(about, folder / beats.FILE)
  (folder / LLM_FOLDER).mkdir()
  llm_folder = folder / LLM_FOLDER
  language_model.export_folder(about, config.decoder, llm_folder, shard_bytes=shard_bytes)
  _write_trained(about, config, folder / FILE)
  write_json(folder / PROMPTS_FILE, dict(config.prompts))
  options = Options(
    whisper=folder / WHISPER_FOLDER,
    beats=folder / beats.FILE if "beats" in kinds else None,
    llm=llm_folder,
    prompts=folder / PROMPTS_FILE if config.prompts else None,
  )
  check_roundtrip(about, config, lambda p: from_json(open_model(folder / FILE, options, p).config))


def _write_trained(about: Checkpoint, config: SpeechLLMConfig, file: Path) -> None:
  """Writes {"model": tensors, "config": {"model": training options}}."""
  style = style_of(about, "salmonn")
  tuned = style.get("tuned", {})
  everything = trained_table()
  rules = [rule for rule in everything.rules if rule.jax.startswith(_NEW)]
  rules += lora.table(style.get("adapter", "default"), LLM).rules
  for path, name in tuned.items():
    mapped = everything.to_jax(name)
    assert mapped is not None, name
    rules.append(Rule(name, path, mapped[1]))
  paths = [*paths_of(about, *_NEW), *tuned, *lora.paths(about)]
  tensors = map_out(about, Table(rules), paths)
  model = state_dict(tensors, read_out(about, tensors))
  torch.save({PART: model, "config": {"model": _options(about, config)}}, file)


def _options(about: Checkpoint, config: SpeechLLMConfig) -> dict[str, Any]:
  """Returns the model section of the original's configuration, without paths."""
  connector, decoder = config.connector, config.decoder
  assert isinstance(connector, QFormerConfig)
  tokenizer = Tokenizer.from_folder(about.tokenizer)
  [end] = [token for token, i in tokenizer.vocabulary().items() if i == tokenizer.eos_id]
  options: dict[str, Any] = {
    "use_speech_Qformer": True,
    "window_level_Qformer": True,
    "num_speech_query_token": connector.queries,
    "second_per_window": salmonn_options.seconds_of(connector.window),
    "second_stride": salmonn_options.seconds_of(connector.stride),
    "lora": bool(decoder.lora_rank),
    "prompt_template": TEMPLATES[config.chat_template].replace("{prompt}", "{}"),
    "end_sym": end,
  }
  if decoder.lora_rank:
    alpha = decoder.lora_alpha
    options["lora_rank"] = decoder.lora_rank
    options["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
    options["lora_dropout"] = decoder.lora_dropout
  return options


KIND = Kind(
  name="salmonn",
  open=open_model,
  export=export,
  sharded=True,
  recognises=lambda path, names: "salmonn" if qformer.QUERIES in names else None,
  options=("whisper", "beats", "llm", "lora_config", "merge_lora", "prompts"),
  parts=("encoders/whisper/", "connector/", "decoder/"),
  reference=reference.run,
  needs=("whisper", "llm"),
  takes=("beats", "lora_config"),
)
