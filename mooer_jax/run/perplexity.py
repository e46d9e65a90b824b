"""Perplexity evaluation: how strongly a model is bound to its training tasks, by LoRA scale.

Trained on short, certain answers, a speech LLM gives them for every prompt: its P(Y|X), the
probability of an answer without an instruction I, outweighs the instruction. The perplexities of
reference answers under P(Y|X) and P(Y|X,I) measure this.

Source: SALMONN (Tang et al., 2023), section 5.4 and figure 4.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from mooer_jax import checkpoint, hosts, speech_llm, storage
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.batches import HostBatch, lengths_of
from mooer_jax.data.dataset import Batches
from mooer_jax.evaluation.perplexity import (
  NONE,
  Perplexity,
  draw_perplexities,
  exp_of,
  perplexity_table,
  read_perplexities,
  write,
)
from mooer_jax.generation.loading import Loaded
from mooer_jax.prompts import SPEECH, TEMPLATES, fill_template, task_prompt
from mooer_jax.run.config import EvalConfig, Run
from mooer_jax.run.decoding import batches_of, find_checkpoint, load, out_folder
from mooer_jax.run.process import prepare_process
from mooer_jax.sharding import batch_sharding, make_mesh, row_parts
from mooer_jax.speech_llm import pad_rows
from mooer_jax.text.tokenizer import Tokenizer


def perplexity(
  run: Run,
  paths: Sequence[str],
  *,
  instructions: Sequence[str] = (),
  scales: Sequence[float] = (),
  base: str | None = None,
) -> list[Perplexity]:
  """Runs `eval.py --mode=perplexity`: writes perplexity.json and perplexity.png, returns the rows.

  Args:
    run, base: as in `run.evaluate.evaluate`; each utterance has its own task.
    paths: checkpoint folders; the folder of a run stands for all its checkpoints.
    instructions: tasks of the model whose prompts are measured, besides no instruction.
    scales: LoRA scales; none: that of training. A checkpoint without LoRA is measured once.

  Raises:
    FileNotFoundError, ValueError: for a bad config, checkpoint, test set, instruction or scale.
  """
  prepare_process()
  check_scales(scales)
  options = dataclasses.replace(run.eval, task="")
  out = out_folder(options, find_checkpoint(paths[0], options), "perplexity")
  rows: list[Perplexity] = []
  found = hosts.on_first(
    lambda: [(step, str(place)) for path in paths for step, place in _steps(path, base)]
  )
  local = [(step, checkpoint.local_folder(place)) for step, place in found]
  by_folder = {folder.resolve(): (step, folder) for step, folder in reversed(local)}
  steps = list(by_folder.values())
  for step, folder in track(steps[::-1], "perplexities", console=Console(stderr=True)):
    mesh = make_mesh(**dataclasses.asdict(run.mesh))
    its_base = base if checkpoint.has_base(folder) else None
    loaded = load(run, folder, its_base, mesh=mesh, merge_lora=False)
    _check(instructions, loaded.model)
    able = scales if loaded.model.decoder.lora_scale else ()
    measure = functools.partial(_measure, run, options, loaded, folder=folder, step=step)
    for instruction in (NONE, *instructions):
      new, left_out = measure(instruction=instruction, scales=able)
      rows += new
      if hosts.is_first():
        print(left_out, end="")
        write(out / "perplexity.json", rows)
  if hosts.is_first():
    Console().print(perplexity_table(rows))
    print(draw_perplexities(rows, out / "perplexity.png"))
  return rows


class PerplexityEvaluator:
  """Evaluator of a training run; writes perplexity.json and perplexity.png in its folder."""

  def __init__(self, run: Run, tokenizer: Tokenizer, *, first: int):
    """Reads the measurements up to step `first`, where training starts or resumes.

    Raises:
      FileNotFoundError, ValueError: for a bad test set, or prompts that do not fit the template.
    """
    self._run, self._tokenizer = run, tokenizer
    self.every = run.perplexity.every
    shards, batch_size = run.perplexity.shards, run.perplexity.batch_size
    self._options = EvalConfig(shards, task="", batch_size=batch_size, truncate=run.data.truncate)
    self._file = run.workdir / "perplexity.json"

    def earlier() -> list[dict[str, Any]]:
      rows = read_perplexities(self._file) if first and self._file.is_file() else []
      return [dataclasses.asdict(row) for row in rows if row.step <= first]

    self._rows = [Perplexity(**row) for row in hosts.on_first(earlier)]
    measured = {row.instruction for row in self._rows}
    if measured and measured != {NONE, *run.perplexity.instructions}:
      raise ValueError(
        f"{self._file} was measured under {sorted(measured)}; move it away, or set"
        " perplexity.instructions to the same"
      )
    self._reported = False
    _check(run.perplexity.instructions, run.model)
    batches_of(run, self._options, self._loaded({}))  # checks its list and tasks

  def lacks(self, step: int) -> bool:
    return all(row.step != step for row in self._rows)

  def __call__(self, step: int, params: dict) -> tuple[dict[str, float], str]:
    """Measures at the LoRA scale of training; ValueError if no answer can be measured."""
    loaded = self._loaded(params)
    rows: list[Perplexity] = []
    folder = self._run.workdir
    measure = functools.partial(_measure, self._run, self._options, loaded, folder=folder)
    for instruction in (NONE, *self._run.perplexity.instructions):
      new, left_out = measure(instruction=instruction, step=step)
      rows += new
      if not self._reported and hosts.is_first():
        print(left_out, end="")
    self._reported = True
    self._rows += rows
    if hosts.is_first():
      write(self._file, self._rows)
      draw_perplexities(self._rows, self._file.with_suffix(".png"))
    scalars = {f"perplexity/{r.instruction.strip('()')}/{r.task}": r.perplexity for r in rows}
    values: dict[str, list[str]] = {}
    for row in rows:
      values.setdefault(row.instruction, []).append(f"{row.task} {row.perplexity:.3f}")
    shown = ("  ".join((f"under {name}:", *of_name)) for name, of_name in values.items())
    return scalars, f"perplexities {'; '.join(shown)}"

  def _loaded(self, params: dict) -> Loaded:
    options = self._run.decoding_defaults()
    return Loaded(params, self._run.model, self._tokenizer, options)


def _check(instructions: Sequence[str], model: SpeechLLMConfig) -> None:
  for instruction in instructions:
    task_prompt(instruction, dict(model.prompts))
  if not fill_template(model.chat_template, bare_prompt(model))[1]:
    raise ValueError(
      f"model.chat_template={model.chat_template!r} has no token after the speech without an"
      " instruction, which would predict the answer: P(Y|X) cannot be measured"
    )


def check_scales(scales: Sequence[float]) -> None:
  if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
    raise ValueError(
      f"--scales={','.join(f'{s:g}' for s in scales)}: must be numbers of at least 0"
    )


def _steps(path: str, base: str | None) -> list[tuple[int, str | Path]]:
  """(step, folder) of all checkpoints of a run, after its first model; or of the named one."""
  folders = checkpoint.all_steps(path)
  if not folders:
    place = checkpoint.locate(path)
    if storage.is_url(path) and place != path.rstrip("/"):
      raise ValueError(f"{path}: is the URL of a run; name its checkpoints, such as {place}")
    folder = checkpoint.local_folder(place)
    of_run = folder in checkpoint.all_steps(folder.parent)
    return [(checkpoint.step_of(folder) if of_run else 0, place)]
  origin = checkpoint.describe(folders[0], base=base).origin
  steps: list[tuple[int, str | Path]] = [(checkpoint.step_of(f), f) for f in folders]
  return [(0, origin.folder), *steps] if origin and "connector" in origin.config else steps


def _measure(
  run: Run,
  options: EvalConfig,
  loaded: Loaded,
  *,
  instruction: str,
  folder: Path,
  step: int,
  scales: Sequence[float] = (),
) -> tuple[list[Perplexity], str]:
  """Measures a test set with one prompt: (rows, a line about left-out or truncated clips, or "").

  `folder` and `step` are those of the model.
  """
  model, prompts = loaded.model, dict(loaded.model.prompts)
  prompt = bare_prompt(model) if instruction == NONE else task_prompt(instruction, prompts)
  tasks = list(prompts)
  model = model.replace(prompts=tuple((task, prompt) for task in tasks))
  # The compiled program has no prompts, so that all of one length share it.
  program = model.replace(prompts=tuple((task, "") for task in tasks))
  scales = list(scales) or [model.decoder.lora_scale]
  totals = {scale: np.zeros((len(tasks), 3)) for scale in scales}
  assert loaded.mesh is not None
  sharding = batch_sharding(loaded.mesh)
  left_out: Counter[str] = Counter()
  num_truncated = 0
  for host in _alike(batches_of(run, options, loaded._replace(model=model))):
    left_out.update(skip.cause for skip in host.skipped)
    num_truncated += host.num_truncated
    for row_S, text in zip(host.batch.labels_BS, host.texts, strict=False):  # the rest is padding
      if row_S[0] < 0:
        left_out["no answer that fits data.answer_buckets" if text else "empty text"] += 1
    batch = hosts.from_all(pad_rows(host.batch, row_parts(loaded.mesh)), sharding)
    for scale in scales:
      sums = _task_sums(loaded.params, batch, scale, model=program, sharding=sharding)
      totals[scale] += jax.device_get(sums)
  causes = ", ".join(f"{cause}: {n}" for cause, n in left_out.items() if n)
  rows = [
    Perplexity(str(folder), step, scale, instruction, task, exp_of(nats / tokens), int(tokens))
    for scale, sums in totals.items()
    for task, (nats, tokens, _) in zip(tasks, sums, strict=True)
    if tokens
  ]
  if not rows:
    raise ValueError(
      f"{options.shards}, instruction {instruction}: no answer could be measured ({causes})"
    )
  notes = [f"utterances left out: {causes}"] * bool(causes)
  if num_truncated:
    notes.append(f"{num_truncated} clips were truncated to eval.max_s (eval.truncate)")
  return rows, f"instruction {instruction}: {', '.join(notes)}\n" if notes else ""


def _alike(batches: Batches) -> Iterator[HostBatch]:
  """The batches, which all processes must read alike, as they compute together.

  Raises:
    ValueError: if they differ, as when one of them cannot read a shard.
  """
  for host in itertools.chain(batches, [None]):
    about = repr(host and (host.keys, lengths_of(host.batch)))
    found = hosts.gather(hashlib.blake2b(about.encode(), digest_size=16).hexdigest())
    if differing := [n for n, of_process in enumerate(found) if of_process != found[0]]:
      raise ValueError(
        f"processes 0 and {differing[0]} read other utterances from the same shards; make the same"
        " files readable on all hosts"
      )
    if host is not None:
      yield host


@functools.partial(jax.jit, static_argnames=("model", "sharding"))
def _task_sums(params, batch, scale, *, model: SpeechLLMConfig, sharding):
  sums = speech_llm.loss(params, batch, model, lora_scale=scale, rows=sharding)[1]["task_sums"]
  everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.lax.with_sharding_constraint(sums, everywhere)


def bare_prompt(model: SpeechLLMConfig) -> str:
  """A prompt with the speech only; in tags if all of the model's prompts have them."""
  if SPEECH in TEMPLATES[model.chat_template]:
    return ""
  tagged = f"<Speech>{SPEECH}</Speech>"
  return tagged if all(tagged in prompt for _, prompt in model.prompts) else SPEECH
