"""Speed of a LoRA training step of MooER beside PyTorch and peft in the same run.

  python -m benchmarks.train_speed --dir /fast/disk --json out/train_speed.json

Both sides train the same release with random weights: SAN-M of 50 layers (frozen), the adapter and
a LoRA of rank 64 on all matrices of Qwen2-0.5B, float32, Adam. PyTorch's side is funasr's encoder
without gradients, transformers' Qwen2 with SDPA attention, and peft. Both compute the logits of the
answers alone. Each side has a process of its own, and they take turns, so that the ratios hold on a
busy machine, too. The release (6 GB of disk) is that of `benchmarks.speed`; it is kept in --dir.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import MODEL, versions, write_result
from benchmarks.speed import TASK, make_release, read_clips

SOURCES = (*MODEL, "mooer_jax/training", "benchmarks/train_speed.py")
STAGES = ("forward", "forward and backward", "whole step")
TRAINABLE = ("connector/.*", "decoder/.*/lora_[ab]")
LR = 1e-4
LABELS_SEED = 0


class Case(NamedTuple):
  """Size of the batch: clips of 4.5 to 6 s, and tokens of each answer with its eos."""

  clips: int = 4
  answer: int = 32


Losses = Callable[[], float]  # runs a stage and returns the loss


def labels_of(case: Case, eos: int) -> np.ndarray:
  """Random answers, int64 [clips, answer], each with an eos at the end."""
  rng = np.random.default_rng(LABELS_SEED)
  labels_BS = rng.integers(0, 1000, (case.clips, case.answer))
  labels_BS[:, -1] = eos
  return labels_BS


def load_ours(release: Path, ours: Path, case: Case) -> dict[str, Losses]:
  import jax

  from mooer_jax import checkpoint, speech_llm, tree
  from mooer_jax.config import from_json
  from mooer_jax.inputs import encoder_inputs, extract_features
  from mooer_jax.nn.compute import ExecutionConfig
  from mooer_jax.sharding import batch_sharding, make_mesh
  from mooer_jax.text.tokenizer import Tokenizer
  from mooer_jax.training.optimizer import OptimizerConfig, make_optimizer
  from mooer_jax.training.program import abstract_state, jitted_step
  from mooer_jax.training.step import create
  from tests.parity import torch_mooer

  about = checkpoint.load(ours, dtype="float32")
  model = from_json(about.config, ExecutionConfig(scan=True))
  tokenizer = Tokenizer.from_folder(about.tokenizer)
  prompt_S = tokenizer.encode(torch_mooer.TEMPLATE.format(torch_mooer.PROMPTS[TASK]))
  features, frames = encoder_inputs([extract_features(x, model) for x in read_clips(case.clips)])
  labels_BS = labels_of(case, tokenizer.eos_id)
  batch = speech_llm.Batch(
    features=features,
    frames=frames,
    prefix_BS=np.zeros((case.clips, 0), np.int32),
    suffix_BS=np.tile(np.int32(prompt_S), (case.clips, 1)),
    labels_BS=labels_BS.astype(np.int32),
  )
  optimizer = OptimizerConfig(peak_lr=LR, warmup_steps=0, decay="constant")
  mesh = make_mesh(data=1, devices=jax.devices()[:1])
  _, shardings = abstract_state(model, optimizer, trainable=TRAINABLE, mesh=mesh)
  trainable, frozen = tree.partition(tree.stack_layers(about.params), TRAINABLE)
  state = create(trainable, make_optimizer(optimizer), jax.random.key(0))
  state, frozen = jax.device_put((state, frozen), shardings)
  batch = jax.device_put(batch, batch_sharding(mesh))
  step = jitted_step(model, optimizer, trainable=TRAINABLE, accumulation=1, mesh=mesh)

  def loss(trainable, frozen, batch):
    return speech_llm.loss(tree.merge(trainable, frozen), batch, model)[0]

  forward, gradient = jax.jit(loss), jax.jit(jax.value_and_grad(loss))

  def whole() -> float:
    nonlocal state
    state, metrics = step(state, frozen, batch)
    jax.block_until_ready(state)
    return float(metrics["loss"])

  return {
    "forward": lambda: float(forward(state.trainable, frozen, batch)),
    "forward and backward": lambda: float(
      jax.block_until_ready(gradient(state.trainable, frozen, batch))[0]
    ),
    "whole step": whole,
  }


def load_theirs(release: Path, ours: Path, case: Case) -> dict[str, Losses]:
  import torch
  from peft import PeftModel
  from transformers import AutoModelForCausalLM

  from tests.parity import full_release, torch_mooer

  # Its encoder, CMVN, adapter and tokenizer are used; its LLM has the LoRA merged, so not that.
  mooer = torch_mooer.TorchMooer(release, full_release.LLM, TASK, full_release.encoder_of(release))
  llm: Any = AutoModelForCausalLM.from_pretrained(
    release / full_release.LLM, dtype=torch.float32, attn_implementation="sdpa"
  )
  mooer.llm = PeftModel.from_pretrained(
    llm, str(release / TASK / "lora_weights"), is_trainable=True
  )
  for tensor in mooer.adapter.values():
    tensor.requires_grad_(True)
  trained = [p for p in mooer.llm.parameters() if p.requires_grad] + [*mooer.adapter.values()]
  adam = torch.optim.Adam(trained, lr=LR)
  labels_BS = torch.tensor(labels_of(case, mooer.tokenizer.eos_token_id))
  clips = read_clips(case.clips)
  features, frames = mooer.padded_features(clips)

  def loss():
    with torch.no_grad():
      encoded_BTD = mooer.encoder(features, frames)[0]
    prompts = mooer.prompts(encoded_BTD, frames)
    answer_BSD = mooer.llm.get_input_embeddings()(labels_BS)
    mask_BS = torch.cat([prompts.attention_mask, torch.ones_like(labels_BS)], dim=1)
    logits_BSV = mooer.llm(
      inputs_embeds=torch.cat([prompts.inputs_embeds, answer_BSD], dim=1),
      attention_mask=mask_BS,
      position_ids=(mask_BS.cumsum(dim=1) - 1).clamp(min=0),
      logits_to_keep=case.answer + 1,
      use_cache=False,
    ).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())

  def forward() -> float:
    with torch.no_grad():
      return loss().item()

  def gradient() -> float:
    value = loss()
    value.backward()
    adam.zero_grad(set_to_none=True)
    return value.item()

  def whole() -> float:
    value = loss()
    value.backward()
    adam.step()
    adam.zero_grad(set_to_none=True)
    return value.item()

  return dict(zip(STAGES, (forward, gradient, whole), strict=True))


SIDES = {"mooer_jax": load_ours, "pytorch": load_theirs}


def serve(side: str, release: Path, ours: Path, case: Case, connection) -> None:
  """The process of a side: loads it, then runs the stages that are asked for."""
  stages = SIDES[side](release, ours, case)
  connection.send("loaded")
  while (stage := connection.recv()) is not None:
    start = time.perf_counter()
    loss = stages[stage]()
    seconds = time.perf_counter() - start
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    connection.send((seconds, loss, peak_gb))


def measure(sides: dict[str, Any], repeats: int) -> dict[str, Any]:
  """Medians of each stage, the sides in turns; the first call of each is not counted."""
  times: dict[Any, list[float]] = {}
  losses: dict[str, list[float]] = {side: [] for side in sides}
  first, peak_gb = {}, {}
  for number in range(repeats + 1):
    for stage in STAGES:
      for side, connection in sides.items():
        connection.send(stage)
        seconds, loss, peak_gb[side] = connection.recv()
        if number:
          times.setdefault((side, stage), []).append(seconds)
        else:
          first[side, stage] = seconds
        if stage == "whole step":
          losses[side].append(loss)
  result: dict[str, Any] = {
    side: {
      **{stage: statistics.median(times[side, stage]) for stage in STAGES},
      "first_calls_s": sum(first[side, stage] for stage in STAGES),
      "peak_gb": peak_gb[side],
      "losses": losses[side],
    }
    for side in sides
  }
  ours, theirs = (result[side] for side in SIDES)
  result["ratios"] = {stage: theirs[stage] / ours[stage] for stage in STAGES}
  result["ratios"]["memory"] = theirs["peak_gb"] / ours["peak_gb"]
  return result


def run(folder: Path, case: Case, repeats: int, **sizes: Any) -> dict[str, Any]:
  """Makes the release unless it is there, and measures both sides on it.

  Args:
    sizes: arguments of `make_release`.

  Raises:
    RuntimeError: if the losses of both sides differ: they would not do the same work.
  """
  context = multiprocessing.get_context("spawn")
  with context.Pool(1) as pool:  # so that torch is not in this process
    release, ours = pool.apply(make_release, (folder,), sizes)
  connections, processes = {}, []
  for side in SIDES:
    connections[side], other = context.Pipe()
    arguments = (side, release, ours, case, other)
    processes.append(context.Process(target=serve, args=arguments, daemon=True))
    processes[-1].start()
    other.close()  # so that the end of the process ends the wait for it
  for connection in connections.values():
    connection.recv()
  result = measure(connections, repeats)
  for connection, process in zip(connections.values(), processes, strict=True):
    connection.send(None)
    process.join()
  losses = [result[side]["losses"] for side in SIDES]
  if not np.allclose(*losses, rtol=1e-3):
    raise RuntimeError(f"the losses of both sides differ: {losses}")
  return result


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dir", type=Path, required=True, help="folder for the release")
  parser.add_argument("--clips", type=int, default=Case().clips, help="clips in the batch")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  case = Case(clips=args.clips)
  result = run(args.dir, case, args.repeats)
  table = Table("stage", *SIDES, "PyTorch / JAX", title="medians, seconds")
  for stage in STAGES:
    times = [f"{result[side][stage]:.2f}" for side in SIDES]
    table.add_row(stage, *times, f"{result['ratios'][stage]:.2f}")
  memory = [f"{result[side]['peak_gb']:.2f} GB" for side in SIDES]
  table.add_row("memory", *memory, f"{result['ratios']['memory']:.2f}")
  Console().print(table)
  about = {"case": case._asdict(), "dtype": "float32"}
  packages = versions("jax", "jaxlib", "flax", "torch", "transformers", "peft", "funasr")
  write_result(args.json, {**about, **result, "versions": packages}, SOURCES)


if __name__ == "__main__":
  main()
