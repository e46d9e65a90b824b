"""Qwen2 and LLaMA of Hugging Face: folders in and out."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import part_from_json
from mooer_jax.decoders.llm import LLM, LLMConfig
from mooer_jax.text.tokenizer import Tokenizer

from ..core.engine import map_in, map_out, paths_of, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import copier, kept_files, kept_json, style_of, write_json
from ..core.kind import Kind, Part, Writer
from ..core.rules import TRANSPOSE, Rule, Table
from ..core.shapes import SCAN, leaf_shapes
from ..core.writers import write_shards
from ..readers import gguf_config, gguf_tokenizer, open_source, read_object
from ..verify.reference import language_model as reference
from .hf_config import hf_config, llm_config
from .tokenizer_files import check_tokenizer, open_tokenizer

TABLE = Table((
  Rule("model.embed_tokens.weight", "decoder/embed/embedding"),
  Rule("model.layers.{n}.input_layernorm.weight", "decoder/layers_{n}/input_norm/scale"),
  Rule("model.layers.{n}.post_attention_layernorm.weight", "decoder/layers_{n}/mlp_norm/scale"),
  Rule(
    "model.layers.{n}.self_attn.{x:q|k|v|o}_proj.weight",
    "decoder/layers_{n}/attention/{x}/kernel",
    TRANSPOSE,
  ),
  Rule("model.layers.{n}.self_attn.{x:q|k|v}_proj.bias", "decoder/layers_{n}/attention/{x}/bias"),
  Rule(
    "model.layers.{n}.mlp.{x:gate|up|down}_proj.weight",
    "decoder/layers_{n}/mlp/{x}/kernel",
    TRANSPOSE,
  ),
  Rule("model.norm.weight", "decoder/final_norm/scale"),
  Rule("lm_head.weight", "decoder/head/kernel", TRANSPOSE),
))  # fmt: skip
# The prefix that peft adds to the names of a wrapped model.
WRAPPED = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# A buffer of old versions of transformers; it follows from the config.
BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

KEPT_FILES = ("config.json", "generation_config.json")


def wrapped_table(prefix: str) -> Table:
  """Rules of an LLM that is part of a model, below `prefix`, wrapped by peft or plain."""
  rules = []
  for rule in TABLE.rules:
    # peft moves a weight that it changes into `base_layer`.
    moved = rule.torch.replace("_proj.", "_proj.base_layer.")
    names = [prefix + rule.torch, prefix + WRAPPED + rule.torch]
    names += [prefix + WRAPPED + moved] if moved != rule.torch else []
    rules += [dataclasses.replace(rule, torch=name) for name in names]
  return Table(rules)


def shapes(config: LLMConfig) -> dict[str, tuple[int, ...]]:
  """decoder/… -> shape, LoRA included if the config has any."""
  module, width = LLM(config, SCAN), config.hidden_size
  return leaf_shapes("decoder", module, frames=1, width=width, method=LLM.init_all_params)


def open_model(folder: Path, problems: Problems, *, kind: str | None = None) -> Part:
  """Opens a Hugging Face folder or a GGUF file; reads the tokenizer, but no tensors.

  Args:
    folder: config.json, a tokenizer, and weights in any supported format; or a .gguf file.
    kind: "qwen2" or "llama"; None accepts both.
  """
  is_gguf = folder.is_file() and folder.suffix == ".gguf"
  if not is_gguf and not (folder / "config.json").is_file():
    raise ConversionError(f"{folder}: no config.json; give a Hugging Face folder or a GGUF file")
  hf = gguf_config(folder) if is_gguf else read_object(folder / "config.json")
  if kind is not None and hf.get("model_type") != kind:
    raise ConversionError(f"{folder}: model_type={hf.get('model_type')!r} is not the kind {kind!r}")
  config = llm_config(hf)
  source = open_source(folder)
  kept: tuple[Path, ...] = ()
  if is_gguf:
    tokenizer: Writer | None = functools.partial(_write_tokenizer, *gguf_tokenizer(folder))
  else:
    tokenizer = problems.attempt(open_tokenizer, folder, model_type=hf["model_type"])
    kept = tuple(folder / name for name in KEPT_FILES if (folder / name).is_file())
  if tokenizer is not None:
    problems.attempt(check_tokenizer, tokenizer, config.vocab_size)
  ignored = list(BUFFERS)
  head_present = config.tie_word_embeddings and HEAD in source.tensors
  if head_present:
    ignored.append(HEAD.replace(".", r"\."))
    if EMBEDDING in source.tensors and not source.equal(EMBEDDING, HEAD):
      problems.add(
        f"{HEAD} differs from {EMBEDDING}; set tie_word_embeddings to false to keep the head"
      )
  mapped = map_in(source, TABLE, shapes(config), problems=problems, ignored=ignored)
  return Part(
    config=config,
    leaves=mapped.leaves,
    style={"llm": {"head_present": head_present}},
    tokenizer=tokenizer or copier(()),
    kept={"llm": kept},
    ignored=(*(name for name in mapped.ignored if name != HEAD), *source.ignored),
    notes=source.notes,
  )


def _write_tokenizer(tokenizer, config: Mapping[str, Any], folder: Path) -> None:
  tokenizer.save(str(folder / "tokenizer.json"))
  write_json(folder / "tokenizer_config.json", config)


def export_folder(about: Checkpoint, config: LLMConfig, folder: Path, *, shard_bytes: int) -> None:
  """Writes a Hugging Face folder of the decoder, without LoRA, into an existing folder."""
  plain = [
    path for path in paths_of(about, "decoder/") if not path.endswith(("/lora_a", "/lora_b"))
  ]
  tensors = map_out(about, TABLE, plain)
  embedding = next(tensor for tensor in tensors if tensor.name == EMBEDDING)
  if config.tie_word_embeddings and style_of(about, "llm").get("head_present", False):
    tensors.append(dataclasses.replace(embedding, name=HEAD))
  tokenizer = sorted(about.tokenizer.iterdir())
  copier([*tokenizer, *kept_files(about, "llm")])(folder)
  eos_id = Tokenizer.from_folder(about.tokenizer).eos_id if tokenizer else None
  original = kept_json(about, "llm", "config.json")
  write_json(folder / "config.json", hf_config(config, embedding.dtype, original, eos_id=eos_id))
  write_shards(folder, tensors, read_out(about, tensors), shard_bytes=shard_bytes)


def decoder_of(about: Checkpoint) -> LLMConfig:
  """Returns the config of the language model. Raises ConversionError if there is none."""
  if "decoder" not in about.config:
    raise ConversionError(f"{about.folder} has no LLM; it holds {', '.join(about.config)}")
  return part_from_json(about.config["decoder"], "decoder")


def _kind(name: str) -> Kind:
  def export_alone(about: Checkpoint, folder: Path, shard_bytes: int) -> None:
    config = decoder_of(about)
    if config.qkv_bias != (name == "qwen2"):
      other = "qwen2" if config.qkv_bias else "llama"
      raise ConversionError(f"{about.folder}: this LLM is of the kind {other}, not {name}")
    if config.lora_rank:
      raise ConversionError(
        f"{about.folder}: a plain {name} folder cannot hold its LoRA; export it with the kind peft"
        " (its base with this one), or import with --merge-lora"
      )
    export_folder(about, config, folder, shard_bytes=shard_bytes)

  def recognises(path: Path, names: Collection[str]) -> str | None:
    if not any(TABLE.to_jax(tensor) for tensor in names):
      return None
    biased = any(tensor.endswith("q_proj.bias") for tensor in names)
    return name if biased == (name == "qwen2") else None

  return Kind(
    name=name,
    open=lambda src, options, problems: open_model(src, problems, kind=name).alone(),
    export=export_alone,
    sharded=True,
    recognises=recognises,
    parts=("decoder/",),
    reference=reference.run,
  )


QWEN2, LLAMA = _kind("qwen2"), _kind("llama")
