"""Qwen2 and LLaMA of Hugging Face: folders in and out."""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mooer_jax import tree
from mooer_jax.checkpoint import Checkpoint, Lazy
from mooer_jax.decoders.llm import LLM, LLMConfig
from mooer_jax.nn.compute import Compute
from mooer_jax.text.tokenizer import Tokenizer

from ..core.engine import leaf_shapes, map_in, map_out, read_out, under
from ..core.errors import Problems
from ..core.folders import copier, kept_files, kept_json, read_json, style_of, write_json
from ..core.rules import TRANSPOSE, Rule, Table
from ..core.writers import write_shards
from ..readers import Source, gguf_config, gguf_tokenizer, open_source
from .hf_config import hf_config, llm_config

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
# What peft's get_peft_model puts before the names of the model that it wraps.
WRAPPED = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# A buffer that old versions of transformers saved; it follows from the config.
BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
)
KEPT_FILES = ("config.json", "generation_config.json")


def wrapped_table(prefix: str) -> Table:
  """The rules where the LLM is part of a model, below `prefix`, with peft around it or without."""
  rules = []
  for rule in TABLE.rules:
    # peft moves a weight that it changes into `base_layer`.
    moved = rule.torch.replace("_proj.", "_proj.base_layer.")
    names = [prefix + rule.torch, prefix + WRAPPED + rule.torch]
    names += [prefix + WRAPPED + moved] if moved != rule.torch else []
    rules += [dataclasses.replace(rule, torch=name) for name in names]
  return Table(rules)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A folder that was opened; no tensor is read.

  Attributes:
    config: the model, without LoRA.
    leaves: decoder/… -> leaf.
    tokenizer: writes the tokenizer's files into a folder.
    kept: files for the checkpoint's source/.
    head_present: whether a tied head stands in the files all the same.
    ignored, notes: what a user should know.
  """

  config: LLMConfig
  leaves: dict[str, Lazy]
  tokenizer: Callable[[Path], Any]
  kept: tuple[Path, ...]
  head_present: bool
  ignored: tuple[str, ...]
  notes: tuple[str, ...]


def shapes(config: LLMConfig) -> dict[str, tuple[int, ...]]:
  """decoder/… -> shape, LoRA included if the config has any."""
  module = LLM(config, Compute(scan=True))
  inputs = jnp.zeros((1, 1, config.width)), jnp.ones((1, 1), bool)
  return under("decoder", leaf_shapes(module, *inputs, method=LLM.everything))


def open_model(
  folder: Path, problems: Problems, *, kind: str | None = None
) -> LanguageModel | None:
  """Opens a Hugging Face folder or a GGUF file.

  Args:
    folder: with config.json and weights in any format that is read; or a .gguf file.
    problems: gets what cannot be converted.
    kind: "qwen2" or "llama" if it must be that; None takes either.

  Returns:
    LanguageModel, or None if its config was not understood.
  """
  is_gguf = folder.is_file() and folder.suffix == ".gguf"
  if not is_gguf and not (folder / "config.json").is_file():
    problems.add(f"{folder}: no config.json; give a folder of Hugging Face or a GGUF file")
    return None
  hf = gguf_config(folder) if is_gguf else read_json(folder / "config.json")
  if kind is not None and hf.get("model_type") != kind:
    problems.add(f"{folder}: model_type={hf.get('model_type')!r} is not the kind {kind!r}")
    return None
  config = llm_config(hf, problems)
  if config is None:
    return None
  source = open_source(folder)
  if is_gguf:
    made = functools.partial(_write_tokenizer, *gguf_tokenizer(folder))
    return from_source(source, config, problems, tokenizer=made)
  files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
  kept = tuple(folder / name for name in KEPT_FILES if (folder / name).is_file())
  return from_source(source, config, problems, tokenizer=copier(files), kept=kept)


def _write_tokenizer(tokenizer, config: Mapping[str, Any], folder: Path) -> None:
  tokenizer.save(str(folder / "tokenizer.json"))
  write_json(folder / "tokenizer_config.json", config)


def from_source(
  source: Source,
  config: LLMConfig,
  problems: Problems,
  *,
  tokenizer: Callable[[Path], Any],
  kept: tuple[Path, ...] = (),
) -> LanguageModel:
  """Maps the tensors of a language model; they bear Hugging Face's names."""
  ignored = list(BUFFERS)
  head_present = config.tied and HEAD in source.tensors
  if head_present:
    ignored.append(HEAD.replace(".", r"\."))
    if EMBEDDING in source.tensors and not equal(source, EMBEDDING, HEAD):
      problems.add(
        f"{HEAD} differs from {EMBEDDING} although tie_word_embeddings is true; set it to false "
        "if the head is meant"
      )
  mapped = map_in(source, TABLE, shapes(config), problems, ignored=ignored)
  return LanguageModel(
    config=config,
    leaves=mapped.leaves,
    tokenizer=tokenizer,
    kept=kept,
    head_present=head_present,
    ignored=(*(name for name in mapped.ignored if name != HEAD), *source.ignored),
    notes=source.notes,
  )


def read_tokenizer(write: Callable[[Path], Any]) -> Tokenizer:
  """The tokenizer of a model that was opened; `write` is its `LanguageModel.tokenizer`.

  Raises:
    FileNotFoundError, ValueError: if the model's folder has none that could be read.
  """
  with tempfile.TemporaryDirectory() as folder:
    write(Path(folder))
    if not any(Path(folder).iterdir()):
      raise FileNotFoundError("the LLM's folder has no tokenizer.json; download it as well")
    try:
      return Tokenizer.from_folder(folder)
    except (ValueError, OSError) as error:
      raise ValueError(f"the LLM's folder: {str(error).replace(f'{folder}/', '')}") from error


def equal(source: Source, a: str, b: str) -> bool:
  """Whether two tensors are the same in shape, dtype and values."""
  of_a, of_b = source.tensors[a], source.tensors[b]
  if (of_a.shape, of_a.dtype) != (of_b.shape, of_b.dtype):
    return False
  return np.array_equal(source.read(a), source.read(b))


def base_paths(about: Checkpoint) -> list[str]:
  """The decoder's leaves without LoRA."""
  paths = [path for path in tree.flatten(about.params) if path.startswith("decoder/")]
  return [path for path in paths if path.rsplit("/", 1)[-1] not in ("lora_a", "lora_b")]


def export(
  about: Checkpoint,
  config: LLMConfig,
  folder: Path,
  *,
  head_present: bool = False,
  original: Mapping[str, Any] | None = None,
  shard_bytes: int,
) -> list[str]:
  """Writes config.json and sharded safetensors of the decoder, without its LoRA.

  Args:
    about: the checkpoint.
    config: its decoder.
    folder: to write into; it exists.
    head_present: write a tied head out as well.
    original: config.json that the model was imported from.
    shard_bytes: size that a file of weights does not exceed unless one tensor does.

  Returns:
    Names of the weight files.
  """
  problems = Problems()
  tensors = map_out(about, TABLE, base_paths(about), problems)
  problems.check(str(about.folder))
  embedding = next(tensor for tensor in tensors if tensor.name == EMBEDDING)
  if config.tied and head_present:
    tensors.append(dataclasses.replace(embedding, name=HEAD))
  described = hf_config(config, embedding.dtype, original, eos_id=_eos_id(about))
  write_json(folder / "config.json", described)
  return write_shards(folder, tensors, read_out(about, tensors), shard_bytes=shard_bytes)


def export_folder(about: Checkpoint, config: LLMConfig, folder: Path, *, shard_bytes: int) -> None:
  """Writes the whole Hugging Face folder: `export`, the tokenizer and what else was kept."""
  export(
    about,
    config,
    folder,
    head_present=style_of(about, "llm").get("head_present", False),
    original=kept_json(about, "llm", "config.json"),
    shard_bytes=shard_bytes,
  )
  for file in about.tokenizer.iterdir():
    shutil.copyfile(file, folder / file.name)
  for file in kept_files(about, "llm"):
    if file.name != "config.json":
      shutil.copyfile(file, folder / file.name)


def _eos_id(about: Checkpoint) -> int | None:
  if not (about.tokenizer / "tokenizer.json").is_file():
    return None
  return Tokenizer.from_folder(about.tokenizer).eos_id
