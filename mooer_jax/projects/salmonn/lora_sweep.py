"""Scores of every task by LoRA scale."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from mooer_jax import hosts
from mooer_jax.evaluation.answer_matching import score_by_task
from mooer_jax.evaluation.perplexity import SweepPoint, draw_sweep, sweep_table, write
from mooer_jax.run.config import Run
from mooer_jax.run.decoding import decode_set, find_checkpoint, load, out_folder
from mooer_jax.run.perplexity import check_scales
from mooer_jax.run.process import prepare_process


def lora_sweep(
  run: Run, path: str, *, scales: Sequence[float], base: str | None = None
) -> list[SweepPoint]:
  """Run `eval.py --mode=lora-sweep`: write lora_sweep.json and lora_sweep.png, return the points.

  Args and errors as in `run.evaluate.evaluate`; each utterance is prompted for its own task. The
  default of `scales` is nine LoRA scales from 0 to that of training.
  """
  prepare_process()
  check_scales(scales)
  options = dataclasses.replace(run.eval, task="")
  folder = find_checkpoint(path, options)
  out = out_folder(options, folder, "lora_sweep")
  loaded = load(run, folder, base, merge_lora=False)
  trained = loaded.model.decoder.lora_scale
  if not trained:
    raise ValueError(f"{path}: the model has no LoRA, so there is no scale to vary")
  points: list[SweepPoint] = []
  for scale in scales or [trained * eighths / 8 for eighths in range(9)]:
    decoded = decode_set(run, options, loaded, lora_scale=scale)
    if not points:
      for s in decoded.skipped:
        hosts.say(f"not decoded: {s.key}: {s.cause} {s.detail}")
    scores = score_by_task(decoded.tasks, decoded.transcripts, decoded.hypotheses)
    points += [SweepPoint(scale, task, s) for task, s in scores.items()]
    if hosts.is_first():
      write(out / "lora_sweep.json", points)
  if hosts.is_first():
    Console().print(sweep_table(points))
    print(draw_sweep(points, trained, out / "lora_sweep.png"))
  return points
