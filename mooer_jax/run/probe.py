"""How strongly a model is bound to the tasks that it was trained on, and at which LoRA scale.

Trained on short, certain answers, a speech LLM comes to give them whatever it is asked: its P(Y|X),
the probability of an answer without any instruction, outweighs what the instruction says. The
perplexity of reference answers under P(Y|X) and P(Y|X,I) shows it, and so do the scores of every
task as the LoRA scale goes down.

Source: SALMONN (Tang et al., 2023), section 5.4 and figure 4.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from mooer_jax import checkpoint, speech_llm
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.evaluation import probe_report
from mooer_jax.evaluation.by_task import score_by_task
from mooer_jax.evaluation.probe_report import Perplexity, SweepPoint
from mooer_jax.prompts import SPEECH, TEMPLATES, task_prompt
from mooer_jax.run.decoding import EvalConfig, Loaded, batches_of, decode_set, load, out_folder
from mooer_jax.run.setup import prepare_process, section

NONE = "(none)"  # what the absence of an instruction is called


def perplexity(
  config: Mapping[str, Any],
  path: str,
  *,
  instructions: Sequence[str] = (),
  scales: Sequence[float] = (),
  base: str | None = None,
) -> list[Perplexity]:
  """Runs `eval.py --mode=perplexity`: leaves perplexity.json and perplexity.png.

  Args:
    config: with section `eval`; each utterance has its own task.
    path: checkpoint folder, or the folder of a run, of which every checkpoint is taken.
    instructions: tasks of the model whose prompts are given as I; no instruction always is.
    scales: LoRA scales; none: that of training.
    base: where the base of a fine-tune lies, if it moved.

  Returns:
    A row for each checkpoint, scale, instruction and task.

  Raises:
    FileNotFoundError, ValueError: for a bad config, checkpoint, test set or instruction.
  """
  prepare_process()
  options = dataclasses.replace(section(config, "eval", EvalConfig), task="")
  out = out_folder(options, checkpoint.find(path), "perplexity")
  rows: list[Perplexity] = []
  for step, folder in track(_steps(path, base), "perplexities", console=Console(stderr=True)):
    loaded = load(config, folder, base if checkpoint.has_base(folder) else None)
    for instruction in instructions:  # all of them before minutes of work
      task_prompt(instruction, dict(loaded.model.prompts))
    for instruction in (NONE, *instructions):
      rows += [
        Perplexity(str(folder), step, scale, instruction, task, math.exp(nats / tokens), tokens)
        for scale, sums in _sums(config, options, loaded, instruction, scales).items()
        for task, (nats, tokens) in sums.items()
      ]
      probe_report.write(out / "perplexity.json", rows)
  Console().print(probe_report.perplexity_table(rows))
  print(probe_report.draw_perplexities(rows, out / "perplexity.png"))
  return rows


def _steps(path: str, base: str | None) -> list[tuple[int, Path]]:
  """The checkpoints of a run, after the model that it began with; or the one that is named."""
  folders = checkpoint.all_steps(path)
  if not folders:
    return [(0, checkpoint.find(path))]
  first = checkpoint.describe(folders[0], base=base)
  steps = [(checkpoint.step_of(folder), folder) for folder in folders]
  whole = first.base is not None and "connector" in checkpoint.describe(first.base).config
  return [(0, first.base), *steps] if whole and first.base else steps


def _sums(
  config, options: EvalConfig, loaded: Loaded, instruction: str, scales: Sequence[float]
) -> dict[float, dict[str, tuple[float, int]]]:
  """By scale and task: nats of the reference answers, and their tokens."""
  model = loaded.model
  asked = bare_prompt(model) if instruction == NONE else task_prompt(
    instruction, dict(model.prompts)
  )  # fmt: skip
  tasks = [task for task, _ in model.prompts]
  model = model.replace(prompts=tuple((task, asked) for task in tasks))
  wanted = list(scales) or [model.decoder.lora_scale]
  totals = {scale: np.zeros((len(tasks), 3)) for scale in wanted}
  left_out: Counter[str] = Counter()
  for host in batches_of(config, options, loaded._replace(model=model)):
    left_out.update(skip.cause for skip in host.skipped)
    left_out["no answer that fits data.answer_buckets"] += sum(
      int(row_S[0] < 0) for row_S in host.batch.answer_BS[: len(host.keys)]
    )
    for scale in wanted:
      totals[scale] += jax.device_get(_task_sums(loaded.params, host.batch, model, scale))
  if said := ", ".join(f"{cause}: {n}" for cause, n in left_out.items() if n):
    print(f"instruction {instruction}: utterances left out: {said}")
  return {
    scale: {
      task: (nats, int(tokens))
      for task, (nats, tokens, _) in zip(tasks, sums, strict=True)
      if tokens
    }
    for scale, sums in totals.items()
  }


@functools.partial(jax.jit, static_argnames="model")
def _task_sums(params, batch, model: SpeechLLMConfig, scale):
  return speech_llm.loss(params, batch, model, lora_scale=scale)[1]["task_sums"]


def bare_prompt(model: SpeechLLMConfig) -> str:
  """A prompt of the speech and no instruction; in tags if all of the model's prompts have them."""
  if SPEECH in TEMPLATES[model.template]:
    return ""
  tagged = f"<Speech>{SPEECH}</Speech>"
  return tagged if all(tagged in prompt for _, prompt in model.prompts) else SPEECH


def lora_sweep(
  config: Mapping[str, Any], path: str, *, scales: Sequence[float], base: str | None = None
) -> list[SweepPoint]:
  """Runs `eval.py --mode=lora-sweep`: leaves lora_sweep.json and lora_sweep.png.

  Args:
    config: with section `eval`; each utterance has its own task.
    path: checkpoint folder, or training workdir.
    scales: LoRA scales; none: eight from 0 to that of training.
    base: where the base of a fine-tune lies, if it moved.

  Returns:
    The scores of each task at each scale.

  Raises:
    FileNotFoundError, ValueError: for a bad config, checkpoint or test set.
  """
  prepare_process()
  if any(scale < 0 for scale in scales):
    raise ValueError(f"--scales={','.join(f'{s:g}' for s in scales)}: must be at least 0")
  options = dataclasses.replace(section(config, "eval", EvalConfig), task="")
  folder = checkpoint.find(path)
  out = out_folder(options, folder, "lora_sweep")
  loaded = load(config, folder, base)
  trained = loaded.model.decoder.lora_scale
  if not trained:
    raise ValueError(f"{path} has no LoRA whose scale could be changed")
  points = []
  for scale in scales or [trained * eighths / 8 for eighths in range(9)]:
    decoded = decode_set(config, dataclasses.replace(options, lora_scale=scale), loaded)
    scores = score_by_task(decoded.tasks, decoded.transcripts, decoded.hypotheses)
    points += [SweepPoint(scale, task, **dataclasses.asdict(s)) for task, s in scores.items()]
    probe_report.write(out / "lora_sweep.json", points)
  Console().print(probe_report.sweep_table(points))
  print(probe_report.draw_sweep(points, trained, out / "lora_sweep.png"))
  return points
