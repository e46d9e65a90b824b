"""Cost of bfloat16 and int8 for a real LLM on text: likelihood, token agreement, error rate.

    python -m benchmarks.accuracy_text --llm SmolLM2-135M-Instruct.Q4_1.gguf --dir out/accuracy \
      --json out/accuracy_text.json

The text is demo/mini/sentences.txt, several sentences in a row. Teacher forcing: the model reads
the text, and its most probable next tokens are compared with those of float32. Free generation: the
model continues the first words of each row greedily; the words are scored against those of float32
as a transcript is scored against its reference.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import MODEL, ROOT, versions, write_result
from convert.core.options import Options
from convert.importing import import_checkpoint
from convert.verify.ours import rounded_to
from convert.verify.report import accuracy, same_tokens
from mooer_jax import checkpoint, speech_llm
from mooer_jax.config import SpeechLLMConfig, part_from_json
from mooer_jax.evaluation.alignment import Counts, align, count
from mooer_jax.evaluation.error_rate import word_tokens
from mooer_jax.generation import GenerationConfig
from mooer_jax.generation.generate import generate_from
from mooer_jax.text.tokenizer import Tokenizer

SOURCES = (
  *MODEL,
  "benchmarks/accuracy_text.py",
  "convert/parts/language_model.py",
  "convert/verify",
  "demo/mini/sentences.txt",
  "mooer_jax/evaluation",
  "mooer_jax/generation",
)
# Rows of the table: (name, dtype of the weights, dtype of the computation).
CASES = (
  ("float32", "float32", "float32"),
  ("bfloat16 weights", "bfloat16", "float32"),
  ("bfloat16 compute", "bfloat16", "bfloat16"),
  ("int8 weights", "int8", "float32"),
  ("int8 weights, bfloat16 compute", "int8", "bfloat16"),
)


class Sizes(NamedTuple):
  """Size of the comparison: rows of text, their tokens, tokens before generation, new tokens."""

  rows: int = 24
  tokens: int = 64
  prompt: int = 16
  new: int = 40


class Outputs(NamedTuple):
  """Logits [rows * (tokens - 1), V] of the next tokens of the text, and generated token ids."""

  logits_AV: np.ndarray
  generated: list[list[int]]


def read_rows(text: str, tokenizer: Tokenizer, sizes: Sizes) -> np.ndarray:
  """Token ids of a text, cut into rows: int32 [rows, tokens]. Raises ValueError if it is short."""
  ids = tokenizer.encode(text)
  needed = sizes.rows * sizes.tokens
  if len(ids) < needed:
    raise ValueError(f"the text has {len(ids)} tokens; {needed} are needed")
  return np.asarray(ids[:needed], np.int32).reshape(sizes.rows, sizes.tokens)


@functools.partial(jax.jit, static_argnames="config")
def _next_logits(params, tokens_BS, config: SpeechLLMConfig) -> jax.Array:
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, jnp.ones(tokens_BS.shape, bool), config)
  return speech_llm.logits(params, hidden_BSD[:, :-1], config)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _continued(params, tokens_BS, config: SpeechLLMConfig, options: GenerationConfig) -> jax.Array:
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  valid_BS = jnp.ones(tokens_BS.shape, bool)
  return generate_from(params, inputs_BSD, valid_BS, config, options).tokens_BS


def run(params: dict, config: SpeechLLMConfig, tokens_BS: np.ndarray, sizes: Sizes) -> Outputs:
  """Teacher forcing and greedy continuations of one model; a few rows at a time, for memory."""
  logits, generated = [], []
  options = GenerationConfig(max_new_tokens=sizes.new, eos_token_id=())
  for rows_BS in np.split(tokens_BS, range(8, len(tokens_BS), 8)):
    of_rows = np.asarray(_next_logits(params, rows_BS, config), np.float32)
    logits.append(of_rows.reshape(-1, of_rows.shape[-1]))
    found = _continued(params, rows_BS[:, : sizes.prompt], config, options)
    generated += np.asarray(found).tolist()
  return Outputs(np.concatenate(logits), generated)


def compare(
  name: str, exact: Outputs, found: Outputs, tokens_BS: np.ndarray, tokenizer: Tokenizer
) -> dict[str, Any]:
  """A case against float32."""
  labels_A = tokens_BS[:, 1:].reshape(-1)
  same, total = same_tokens(found.generated, exact.generated)
  texts = [[tokenizer.decode(row) for row in side.generated] for side in (exact, found)]
  words = [[word_tokens(text) for text in side] for side in texts]
  counts = [count(align(reference, other)) for reference, other in zip(*words, strict=True)]
  return {
    **dataclasses.asdict(accuracy(name, exact.logits_AV, found.logits_AV)),
    "perplexity": perplexity(found.logits_AV, labels_A),
    "generated": {
      "same_tokens": same / total,
      "same_rows": float(np.mean([a == b for a, b in zip(exact.generated, found.generated)])),
      "word_error_rate": sum(counts, Counts()).rate,
    },
  }


def perplexity(logits_AV: np.ndarray, labels_A: np.ndarray) -> float:
  """exp of the mean negative log-likelihood, in float64, a few positions at a time."""
  nats = 0.0
  for part_AV, of_part_A in zip(np.array_split(logits_AV, 16), np.array_split(labels_A, 16)):
    exact_AV = part_AV.astype(np.float64)
    largest_A1 = exact_AV.max(axis=1, keepdims=True)
    total_A = largest_A1[:, 0] + np.log(np.exp(exact_AV - largest_A1).sum(axis=1))
    nats += float((total_A - exact_AV[np.arange(len(of_part_A)), of_part_A]).sum())
  return float(np.exp(nats / len(labels_A)))


def measure(
  params: dict, config: SpeechLLMConfig, tokens_BS: np.ndarray, tokenizer: Tokenizer, sizes: Sizes
) -> list[dict[str, Any]]:
  """A row for each of CASES."""
  rows, exact = [], None
  for name, stored, computed in CASES:
    rounded, model = rounded_to(stored, params, config)
    found = run(rounded, model.with_compute(dtype=computed), tokens_BS, sizes)
    exact = exact or found
    rows.append(compare(name, exact, found, tokens_BS, tokenizer))
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--llm", required=True, type=Path, help="LLaMA folder or GGUF file")
  parser.add_argument("--dir", required=True, type=Path, help="folder for the checkpoint, 0.6 GB")
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  import_checkpoint("llama", args.llm, args.dir / "llm", options=Options(overwrite=True))
  about = checkpoint.load(args.dir / "llm", dtype="float32")
  decoder = part_from_json(about.config["decoder"], "decoder")
  tokenizer, sizes = Tokenizer.from_folder(about.tokenizer), Sizes()
  sentences = (ROOT / "demo" / "mini" / "sentences.txt").read_text("utf-8").splitlines()
  text = " ".join(f"{sentence.capitalize()}." for sentence in sentences)
  tokens_BS = read_rows(text, tokenizer, sizes)
  rows = measure(about.params, SpeechLLMConfig(decoder=decoder), tokens_BS, tokenizer, sizes)
  table = Table("case", "mean KL", "same tokens", "perplexity", "generated", "word errors")
  for row in rows:
    free = row["generated"]
    figures = row["agreement"], row["perplexity"], free["same_tokens"], free["word_error_rate"]
    table.add_row(row["name"], f"{row['mean_kl']:.1e}", *(f"{x:.4g}" for x in figures))
  Console().print(table)
  result = {
    "llm": args.llm.name,
    "sizes": sizes._asdict(),
    "cases": rows,
    "versions": versions("jax", "jaxlib", "numpy"),
  }
  write_result(args.json, result, SOURCES)


if __name__ == "__main__":
  main()
