"""Decodes a test set, writes the hypotheses, scores them."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from mooer_jax import checkpoint
from mooer_jax.audio.frontend import num_frames
from mooer_jax.config import build
from mooer_jax.data.config import DataConfig
from mooer_jax.data.pipeline import eval_batches
from mooer_jax.data.shards import Skip
from mooer_jax.evaluation import report
from mooer_jax.evaluation.by_task import score_by_task
from mooer_jax.evaluation.by_task import table as task_table
from mooer_jax.evaluation.by_task import write as write_by_task
from mooer_jax.evaluation.score import Score, ScoreConfig, score
from mooer_jax.evaluation.text_files import read_text, write_text
from mooer_jax.evaluation.tokens import METRICS
from mooer_jax.evaluation.translation import Bleu, bleu
from mooer_jax.generation import generate
from mooer_jax.nn.compute import Compute
from mooer_jax.prompts import split_answer
from mooer_jax.run.setup import prepare_process, section
from mooer_jax.speech_llm import shortest_s
from mooer_jax.transcribe import load_model

_SHORT = {"mixed": "MooER", "character": "CER", "word": "WER"}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What is decoded and how it is scored; batch buckets are those of `data`, and one for max_s.

  Attributes:
    shards: `data.list` of the test set.
    references: a `text` file (key, transcript); "" takes the one beside the data.list, as in
      MooER's test sets, else the transcripts in the shards.
    task: the prompt; "": each utterance's own task, and each is scored by itself.
    batch_size: utterances decoded together.
    out: folder for `text` and the reports; "" is `eval/NAME` in the run's folder, NAME being that
      of the folder of the test set.
    metric: the one that report.json is about: "mixed" (MooER's), "character" or "word".
    space_mark: what `▁` in a transcript is; "blank", which models are trained to write for it, or
      "keep", as MooER's script does.
    skip_missing: leave utterances without a hypothesis out, as MooER's script does.
    max_s: longest clip, 0 for what the model takes; longer ones are reported, and scored as not
      decoded.
    lora_scale: of LoRA, -1 for that of training.
    bleu_tokenize: sacrebleu's tokenizer where the task translates, by the target language: "13a",
      "zh", "char", …
  """

  shards: str
  references: str = ""
  task: str = "asr"
  batch_size: int = 16
  out: str = ""
  metric: str = "mixed"
  space_mark: str = "blank"
  skip_missing: bool = False
  max_s: float = 0.0
  lora_scale: float = -1.0
  bleu_tokenize: str = "13a"


def evaluate(
  config: Mapping[str, Any], path: str, *, base: str | None = None
) -> tuple[dict[str, Score], Bleu | None]:
  """Runs `eval.py`: leaves `text`, report.json, report.txt.

  Args:
    config: with sections `eval`, `data`, and what overrides the checkpoint's `generation`.
    path: checkpoint folder, or training workdir.
    base: where the base of a fine-tune lies, if it moved.

  Returns:
    (error rates by metric, BLEU where the task translates). A multitask answer, and its reference,
    have two lines: error rates are of the transcripts, BLEU is of the translations.

  Raises:
    FileNotFoundError, ValueError: for a bad config, checkpoint, test set or reference file.
  """
  prepare_process()
  options = section(config, "eval", EvalConfig)
  if options.metric not in METRICS:
    raise ValueError(f"eval.metric={options.metric!r}: choose one of {sorted(METRICS)}")
  folder = checkpoint.find(path)
  out = _out_folder(options, folder)
  references = _given_references(options)  # before minutes of work, for it may be wrong
  start = time.perf_counter()
  decoded = decode_set(config, options, folder, base)
  seconds = time.perf_counter() - start
  write_text(out / "text", decoded.hypotheses)

  if references is None:
    lost = {s.key: s.text for s in decoded.skipped if s.text}
    references = {**lost, **decoded.transcripts}
  by_task = score_by_task(decoded.tasks, references, decoded.hypotheses) if decoded.tasks else {}
  translated = bleu_of(options, references, decoded.hypotheses)
  missing = "skip" if options.skip_missing else "count"
  scores = {
    metric: score(
      _to_score(options.task, references),
      _to_score(options.task, decoded.hypotheses),
      ScoreConfig(metric=metric, missing=missing, space_mark=options.space_mark),
    )
    for metric in METRICS
  }
  details = {
    "checkpoint": str(folder),
    "audio_seconds": round(decoded.audio_s, 2),
    "decode_seconds_with_compilation": round(seconds, 2),
    "rates": {m: s.rate if math.isfinite(s.rate) else None for m, s in scores.items()},
    "cut_off": decoded.cut,
    "not_decoded": [f"{s.key}: {s.cause}" for s in decoded.skipped],
    **({"bleu": dataclasses.asdict(translated)} if translated else {}),
  }
  report.write_report(out, scores[options.metric], name=options.shards, details=details)
  console = Console()
  if by_task:
    write_by_task(out / "tasks.json", by_task)
    console.print(task_table(by_task))
  console.print(report.table({_SHORT[metric]: s for metric, s in scores.items()}))
  if translated:
    console.print(f"{translated.details}\n{translated.signature}", markup=False, soft_wrap=True)
  for note in scores[options.metric].notes:
    console.print(f"note: {note}", markup=False)
  if decoded.cut:
    console.print(f"note: {decoded.cut} answers were cut off by generation.max_new_tokens")
  for s in decoded.skipped:
    console.print(f"not decoded: {s.key}: {s.cause} {s.detail}", markup=False)
  console.print(f"hypotheses and reports in {out}", markup=False, soft_wrap=True)
  return scores, translated


@dataclasses.dataclass
class Decoded:
  """Hypotheses and transcripts by key, what could not be decoded, and the audio that could."""

  hypotheses: dict[str, str]
  transcripts: dict[str, str]
  tasks: dict[str, str]  # where each utterance has its own
  skipped: list[Skip]
  audio_s: float = 0.0
  cut: int = 0  # answers that max_new_tokens cut off


def decode_set(
  config: Mapping[str, Any], options: EvalConfig, folder: Path, base: str | None
) -> Decoded:
  """Decodes every utterance of a test set that can be read, in the order of its shards."""
  compute = build(Compute, {**dict(config.get("compute", {})), "scan": False}, "compute")
  params, model, tokenizer, generation = load_model(
    folder, compute, base=base, generation=config.get("generation", {})
  )
  longest_s = options.max_s or model.max_audio_s
  if longest_s > model.max_audio_s:
    raise ValueError(
      f"eval.max_s={longest_s:g} is longer than the model takes ({model.max_audio_s:g} s)"
    )
  frontend = model.frontends[0]
  longest_s = max(longest_s, model.min_audio_s)
  longest = num_frames(int(longest_s * frontend.sample_rate_hz), frontend)
  buckets = section(config, "data", DataConfig).buckets
  data = section(
    config,
    "data",
    DataConfig,
    shards=options.shards,
    batch_size=options.batch_size,
    window=options.batch_size,
    min_s=0.0 if model.min_audio_s else shortest_s(model),
    task=options.task,
    task_weights={},
    prompts="",
    cache_features="",
    max_bad_share=1.0,
    max_s=longest_s,
    **({"buckets": (*buckets, longest)} if longest > buckets[-1] else {}),
  )
  lora_scale = None if options.lora_scale < 0 else options.lora_scale
  key = jax.random.key(config.get("seed", 0))
  decoded = Decoded({}, {}, {}, [])
  batches = eval_batches(data, tokenizer, model)
  with Progress(console=Console(stderr=True)) as progress:
    bar = progress.add_task("decoding", total=None)
    for number, host_batch in enumerate(batches):
      batch_key = jax.random.fold_in(key, number)
      generated = jax.device_get(
        generate(params, host_batch.batch, model, generation, key=batch_key, lora_scale=lora_scale)
      )
      for row, name in enumerate(host_batch.keys):
        tokens = generated.tokens_BS[row, : generated.lengths_B[row]]
        decoded.cut += not generated.finished_B[row]
        decoded.hypotheses[name] = tokenizer.decode(tokens)
        decoded.transcripts[name] = host_batch.texts[row]
        if not options.task:
          decoded.tasks[name] = host_batch.tasks[row]
      decoded.skipped += host_batch.skipped
      decoded.audio_s += host_batch.audio_s
      done = len(decoded.hypotheses)
      progress.update(bar, completed=done, description=f"decoded {done} utterances")
  return decoded


def _to_score(task: str, texts: Mapping[str, str]) -> dict[str, str]:
  """The transcripts of answers; whole answers where the task asks for no transcript."""
  parts = {key: split_answer(task, text).transcript for key, text in texts.items()}
  return {key: texts[key] if part is None else part for key, part in parts.items()}


def bleu_of(
  options: EvalConfig, references: Mapping[str, str], hypotheses: Mapping[str, str]
) -> Bleu | None:
  """BLEU of the translations, None where the task asks for none.

  Raises:
    ValueError: if a reference lacks the translation that the task asks for.
  """
  if options.task not in ("ast", "asr_ast_mtl"):
    return None
  parts = {key: split_answer(options.task, text).translation for key, text in references.items()}
  if lacking := [key for key, text in parts.items() if text is None]:
    raise ValueError(
      f"{lacking[0]} and {len(lacking) - 1} other references have no translation: for eval.task="
      f"{options.task!r} a line of `text` is KEY<TAB>transcript\\ntranslation"
    )
  given = {
    key: split_answer(options.task, text).translation or "" for key, text in hypotheses.items()
  }
  wanted = {
    key: text
    for key, text in parts.items()
    if text is not None and (key in given or not options.skip_missing)
  }
  return bleu(wanted, given, tokenize=options.bleu_tokenize)


def _given_references(options: EvalConfig) -> dict[str, str] | None:
  """References in a file; None where those in the shards count."""
  if options.references:
    if not Path(options.references).is_file():
      raise FileNotFoundError(f"eval.references={options.references}: no such file")
    return read_text(options.references)
  beside = Path(options.shards).with_name("text")
  return read_text(beside) if beside.is_file() else None


def _out_folder(options: EvalConfig, folder: Path) -> Path:
  if options.out:
    return Path(options.out)
  if checkpoint.latest(folder.parent) is None:
    raise ValueError(f"{folder} is not in the folder of a run; say where to write with eval.out")
  return folder.parent / "eval" / Path(options.shards).absolute().parent.name
