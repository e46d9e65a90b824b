"""Decodes a test set, writes the hypotheses, scores them."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from mooer_jax import checkpoint
from mooer_jax.config import build, from_json
from mooer_jax.data.config import DataConfig
from mooer_jax.data.pipeline import eval_batches
from mooer_jax.data.shards import Skip
from mooer_jax.evaluation import report
from mooer_jax.evaluation.score import Score, ScoreConfig, score
from mooer_jax.evaluation.text_files import read_text, write_text
from mooer_jax.evaluation.tokens import METRICS
from mooer_jax.generation import GenerationOptions, generate
from mooer_jax.nn.compute import Compute
from mooer_jax.run.setup import prepare_process, prompt_for, section
from mooer_jax.text.tokenizer import Tokenizer

_SHORT = {"mixed": "MooER's CER", "character": "CER", "word": "WER"}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What is decoded and how it is scored; batch buckets are those of the `data` section.

  Attributes:
    shards: `data.list` of the test set.
    references: a `text` file (key, transcript); "" takes the one beside the data.list, as in
      MooER's test sets, else the transcripts in the shards.
    task: the prompt.
    batch_size: utterances decoded together.
    out: folder for `text` and the reports; "" is `eval/` beside the checkpoints.
    metric: the one that report.json is about: "mixed" (MooER's), "character" or "word".
    skip_missing: leave utterances without a hypothesis out, as MooER's script does.
    max_s: longest clip, 0 for data.max_s; longer ones are reported, and scored as not decoded.
  """

  shards: str
  references: str = ""
  task: str = "asr"
  batch_size: int = 16
  out: str = ""
  metric: str = "mixed"
  skip_missing: bool = False
  max_s: float = 0.0


def evaluate(config: Mapping[str, Any], path: str) -> dict[str, Score]:
  """Runs `eval.py`: returns the scores by metric, and leaves `text`, report.json, report.txt.

  Raises:
    FileNotFoundError, ValueError: for a bad config, checkpoint, test set or reference file.
  """
  prepare_process()
  options = section(config, "eval", EvalConfig)
  if options.metric not in METRICS:
    raise ValueError(f"eval.metric={options.metric!r}: choose one of {sorted(METRICS)}")
  folder = checkpoint.find(path)
  start = time.perf_counter()
  decoded = decode_set(config, options, folder)
  seconds = time.perf_counter() - start

  references = _references(options, decoded)
  missing = "skip" if options.skip_missing else "count"
  scores = {
    metric: score(
      references,
      decoded.hypotheses,
      ScoreConfig(metric=metric, missing=missing),
    )
    for metric in METRICS
  }
  out = Path(options.out) if options.out else folder.parent / "eval"
  write_text(out / "text", decoded.hypotheses)
  details = {
    "checkpoint": str(folder),
    "audio_seconds": round(decoded.audio_s, 2),
    "decode_seconds_with_compilation": round(seconds, 2),
    "rates": {metric: s.rate for metric, s in scores.items()},
    "not_decoded": [f"{s.key}: {s.cause}" for s in decoded.skipped],
  }
  report.write_report(out, scores[options.metric], name=options.shards, details=details)
  console = Console()
  console.print(report.table({_SHORT[metric]: s for metric, s in scores.items()}))
  for note in scores[options.metric].notes:
    console.print(f"note: {note}", markup=False)
  for s in decoded.skipped:
    console.print(f"not decoded: {s.key}: {s.cause} {s.detail}", markup=False)
  console.print(f"hypotheses and reports in {out}", markup=False, soft_wrap=True)
  return scores


@dataclasses.dataclass
class Decoded:
  """Hypotheses and transcripts by key, what could not be decoded, and the audio that could."""

  hypotheses: dict[str, str]
  transcripts: dict[str, str]
  skipped: list[Skip]
  audio_s: float = 0.0


def decode_set(config: Mapping[str, Any], options: EvalConfig, folder: Path) -> Decoded:
  """Decodes every utterance of a test set that can be read, in the order of its shards."""
  compute = build(Compute, {**dict(config.get("compute", {})), "scan": False}, "compute")
  loaded = checkpoint.load(folder, dtype=compute.dtype)
  model = from_json(loaded.config, compute)
  tokenizer = Tokenizer.from_folder(loaded.tokenizer)
  asked = {**loaded.generation, **dict(config.get("generation", {}))}
  sampling = build(GenerationOptions, asked, "generation")
  sampling = dataclasses.replace(sampling, eos_ids=sampling.eos_ids or (tokenizer.eos_id,))
  data = section(
    config,
    "data",
    DataConfig,
    shards=options.shards,
    batch_size=options.batch_size,
    window=options.batch_size,
    min_s=0.0,
    max_bad_share=1.0,
    **({"max_s": options.max_s} if options.max_s else {}),
  )
  key = jax.random.key(config.get("seed", 0))
  decoded = Decoded({}, {}, [])
  batches = eval_batches(data, tokenizer, prompt_for(model, options.task), model.frontends)
  with Progress(console=Console(stderr=True)) as progress:
    bar = progress.add_task("decoding", total=None)
    for number, host_batch in enumerate(batches):
      batch_key = jax.random.fold_in(key, number)
      generated = jax.device_get(
        generate(loaded.params, host_batch.batch, model, sampling, key=batch_key)
      )
      for row, name in enumerate(host_batch.keys):
        tokens = generated.tokens_BS[row, : generated.lengths_B[row]]
        decoded.hypotheses[name] = tokenizer.decode(tokens)
        decoded.transcripts[name] = host_batch.texts[row]
      decoded.skipped += host_batch.skipped
      decoded.audio_s += host_batch.audio_s
      done = len(decoded.hypotheses)
      progress.update(bar, completed=done, description=f"decoded {done} utterances")
  return decoded


def _references(options: EvalConfig, decoded: Decoded) -> dict[str, str]:
  if options.references:
    return read_text(options.references)
  beside = Path(options.shards).with_name("text")
  if beside.is_file():
    return read_text(beside)
  lost = {s.key: s.text for s in decoded.skipped if s.text}
  return {**lost, **decoded.transcripts}
