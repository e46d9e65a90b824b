"""`make demo`: synthesize speech, pack shards, train, evaluate and transcribe, without downloads.

Run as `python -m demo.digits` from the clone. All steps after the synthesis are printed commands.
`--quick` trains a shorter time and only checks that the loss falls.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import sys
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.tiny import get_config
from demo.stages import ROOT, Stages, call, imported_sources, one_line_errors, schedule
from demo.synthesize import TEST_VARIANTS, SpeechConfig, plan, write_split
from mooer_jax.evaluation.text_files import read_text

# The installed command.
MOOER_JAX = Path(sys.executable).with_name("mooer-jax")
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class DemoConfig:
  """One size of the demo; steps=0 uses the steps and the schedule of configs/tiny.py."""

  folder: str
  speech: SpeechConfig
  steps: int
  goal_cer: float  # on held-out voices


FULL = DemoConfig("out/demo", SpeechConfig(), steps=0, goal_cer=0.05)
# Too short to learn digits well. It succeeds if the loss halves and there are transcripts.
QUICK = DemoConfig(
  "out/demo-quick",
  SpeechConfig(train_clips=4000, test_clips=60, max_digits=3),
  steps=500,
  goal_cer=1.0,
)


def run(config: DemoConfig) -> dict:
  """Run all steps, write `report.json` and return its content."""
  out = Path(config.folder)
  speech, shards, work, scored = out / "speech", out / "shards", out / "train", out / "eval"
  settings = [
    "--config=configs/tiny.py",
    f"--config.workdir={work}",
    f"--config.data.shards={shards / 'train' / 'data.list'}",
    f"--config.eval.shards={shards / 'test' / 'data.list'}",
    f"--config.eval.out={scored}",
    *(schedule(config.steps, warmup=config.steps // 8) if config.steps else []),
  ]
  stages = Stages(out)
  stages.run(
    "synthesis", lambda: _speak(config.speech, speech), makes=speech,
    inputs=dataclasses.asdict(config.speech), files=imported_sources("demo/synthesize.py"),
  )  # fmt: skip
  stages.run(
    "packing", lambda: _pack(speech, shards), makes=shards,
    files=imported_sources("mooer_jax/data/pack.py"),
  )  # fmt: skip
  stages.run(
    "training", lambda: _train(config, settings, work), makes=work, resumable=True,
    inputs=settings, files=[ROOT / "configs" / "tiny.py", *imported_sources("train.py")],
  )  # fmt: skip
  stages.run(
    "evaluation", lambda: call(sys.executable, "eval.py", *settings, f"--checkpoint={work}"),
    makes=scored, files=imported_sources("eval.py"),
  )  # fmt: skip
  clip = speech / "test" / "wav" / f"{plan(config.speech, 'test')[0].key}.wav"
  result = out / "transcribe" / "result.json"
  stages.run("transcription", lambda: _transcribe(work, clip, result), makes=result.parent)
  shutil.copyfile(work / "loss.png", out / "loss.png")
  report = make_report(config, stages.seconds, stages.redone)
  (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
  return report


def _speak(config: SpeechConfig, folder: Path):
  for split in ("train", "test"):
    write_split(plan(config, split), folder / split)


def _pack(speech: Path, shards: Path):
  for split in ("train", "test"):
    source = speech / split
    call(
      MOOER_JAX, "pack", f"--wav-scp={source / 'wav.scp'}", f"--text={source / 'text'}",
      f"--out={shards / split}", "--per-shard=500",
    )  # fmt: skip


def _train(config: DemoConfig, configured: list[str], work: Path):
  call(sys.executable, "train.py", *configured)
  steps = config.steps or get_config().train.steps
  if not (work / f"step_{steps:08d}").is_dir():
    raise RuntimeError(
      f"{work}: training stopped before step {steps}; rerun the same command to resume"
    )


def _transcribe(work: Path, clip: Path, result: Path):
  result.parent.mkdir(parents=True)
  call(MOOER_JAX, "transcribe", f"--checkpoint={work}", f"--json={result}", clip)


def make_report(config: DemoConfig, seconds: dict[str, float], redone: list[str]) -> dict:
  """Collect the results of all steps from the output folder."""
  out = Path(config.folder)
  scored = json.loads((out / "eval" / "report.json").read_text("utf-8"))
  rows = (out / "train" / "metrics.jsonl").read_text("utf-8").splitlines()
  losses = [json.loads(row)["loss"] for row in rows]
  hypotheses = read_text(out / "eval" / "text")
  utterances = [
    {
      "key": clip.key,
      "voice": clip.manner.voice,
      "reference": clip.digits,
      "hypothesis": hypotheses.get(clip.key),
    }
    for clip in plan(config.speech, "test")
  ]
  result = json.loads((out / "transcribe" / "result.json").read_text("utf-8"))
  return {
    "cer": scored["details"]["rates"]["character"],
    "goal_cer": config.goal_cer,
    "n_utterances": len(utterances),
    "n_wrong": sum(u["reference"] != u["hypothesis"] for u in utterances),
    "train_seconds": round(seconds["training"], 1),
    "total_seconds": round(sum(seconds.values()), 1),
    "seconds": {name: round(value, 1) for name, value in seconds.items()},
    "steps_done_in_this_run": redone,
    "n_train_utterances": config.speech.train_clips,
    "optimizer_steps": len(losses),
    "loss_first": statistics.fmean(losses[:10]),
    "loss_last": statistics.fmean(losses[-10:]),
    "held_out_voices": list(TEST_VARIANTS),
    "machine": {
      "cores": os.cpu_count(),
      "python": platform.python_version(),
      "jax": metadata.version("jax"),
    },
    "transcribed": result[0],
    "utterances": utterances,
  }


def failures(report: dict) -> list[str]:
  """Return the success criteria that a run misses, one message each."""
  first, last, cer = report["loss_first"], report["loss_last"], report["cer"]
  hypotheses = [utterance["hypothesis"] for utterance in report["utterances"]]
  goal = f"it must be at most {_percent(report['goal_cer'])}"
  criteria = {
    f"the loss did not fall by half: {first:.3f} to {last:.3f}": last <= first / 2,
    "some test utterances have no transcript": None not in hypotheses,
    "every transcript is empty": any(hypotheses),
    "`mooer-jax transcribe` returned an empty transcript": report["transcribed"]["text"],
    f"CER is {_percent(cer)}; {goal}": cer is not None and cer <= report["goal_cer"],
  }
  return [message for message, met in criteria.items() if not met]


def _percent(rate: float | None) -> str:
  return "undefined" if rate is None else f"{100 * rate:.2f} %"


def show(report: dict, folder: str):
  """Print the CER and a few transcripts with their references."""
  console = Console(soft_wrap=True)
  table = Table("voice (not in training)", "reference", "transcript")
  # The first utterances, not the best: the strings are random and the voices alternate.
  for row in report["utterances"][:SHOWN]:
    table.add_row(row["voice"], row["reference"], row["hypothesis"])
  console.print(table)
  console.print(
    f"CER {_percent(report['cer'])} on {report['n_utterances']} test utterances; their"
    f" {len(report['held_out_voices'])} voices and their digit strings are not in training"
  )
  console.print(
    f"loss {report['loss_first']:.3f} to {report['loss_last']:.3f}; training"
    f" {report['train_seconds']:.0f} s, all steps {report['total_seconds']:.0f} s"
  )
  console.print(f"{folder}/report.json, {folder}/loss.png", highlight=False)


def main() -> int:
  parser = argparse.ArgumentParser(description="Train and test a small model on spoken digits.")
  parser.add_argument(
    "--quick", action="store_true", help="train a shorter time; only check that the loss falls"
  )
  config = QUICK if parser.parse_args().quick else FULL
  with one_line_errors("make demo"):
    report = run(config)
  show(report, config.folder)
  for problem in failures(report):
    print(f"make demo: {problem}", file=sys.stderr)
  return bool(failures(report))


if __name__ == "__main__":
  sys.exit(main())
