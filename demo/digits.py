"""`make demo`: speech, shards, training, evaluation and transcription from nothing but a seed.

Run it as `python -m demo.digits` from the checkout. Every step is a command that works on any other
data too; what it ran is printed. `--quick` is a shortened run that checks that learning happens.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.tiny import get_config
from demo.report import failures, show
from demo.stages import Stages, call, fingerprint, imported_sources
from demo.synthesize import TEST_VARIANTS, SpeechConfig, plan, write_split

ROOT = Path(__file__).resolve().parents[1]
# Sources of the first step.
SYNTHESIZER = ("espeak", "synthesize")


@dataclasses.dataclass(frozen=True)
class DemoConfig:
  """One size of the demo.

  Attributes:
    folder: where everything goes, relative to the checkout.
    speech: what is synthesized.
    steps: updates, with the schedule shortened to match; 0 leaves configs/tiny.py as it is.
    goal_cer: character error rate on held-out voices that counts as success.
  """

  folder: str
  speech: SpeechConfig
  steps: int
  goal_cer: float

  def overrides(self) -> list[str]:
    """Arguments for train.py and eval.py over configs/tiny.py."""
    if not self.steps:
      return []
    return [
      f"--config.train.steps={self.steps}",
      f"--config.optimizer.total_steps={self.steps}",
      f"--config.optimizer.warmup_steps={self.steps // 8}",
    ]


FULL = DemoConfig("out/demo", SpeechConfig(), steps=0, goal_cer=0.05)
# Too short to learn digits well; that the loss falls by half and answers come is what counts.
QUICK = DemoConfig(
  "out/demo-quick",
  SpeechConfig(train_clips=4000, test_clips=60, max_digits=3),
  steps=500,
  goal_cer=1.0,
)


def run(config: DemoConfig) -> dict:
  """Goes through all steps and writes `report.json`.

  Returns:
    The report.

  Raises:
    subprocess.CalledProcessError: if a step fails.
  """
  out = Path(config.folder)
  speech, shards, work, scored = out / "speech", out / "shards", out / "train", out / "eval"
  stages = Stages(out)
  made_from = fingerprint(
    dataclasses.asdict(config.speech), [ROOT / "demo" / f"{name}.py" for name in SYNTHESIZER]
  )
  seconds = {}
  seconds["synthesis"] = stages.run(
    "synthesis", made_from, lambda: _speak(config.speech, speech), makes=speech
  )
  made_from = fingerprint("", ROOT.glob("mooer_jax/data/*.py"))
  seconds["packing"] = stages.run("packing", made_from, lambda: _pack(speech, shards), makes=shards)
  configured = [
    "--config=configs/tiny.py",
    f"--config.workdir={work}",
    f"--config.data.shards={shards / 'train' / 'data.list'}",
    f"--config.eval.shards={shards / 'test' / 'data.list'}",
    f"--config.eval.out={scored}",
    *config.overrides(),
  ]
  sources = imported_sources(ROOT / "train.py", ROOT)
  made_from = fingerprint(configured, [ROOT / "configs" / "tiny.py", *sources])
  seconds["training"] = stages.run(
    "training", made_from, lambda: _train(config, configured, work), makes=work, resumable=True,
  )  # fmt: skip
  made_from = fingerprint("", imported_sources(ROOT / "eval.py", ROOT))
  seconds["evaluation"] = stages.run(
    "evaluation", made_from,
    lambda: _call([sys.executable, "eval.py", *configured, f"--checkpoint={work}"]), makes=scored,
  )  # fmt: skip
  clip = speech / "test" / "wav" / f"{plan(config.speech, 'test')[0].key}.wav"
  transcribed = out / "transcribe"
  seconds["transcription"] = stages.run(
    "transcription", "", lambda: _transcribe(work, clip, transcribed), makes=transcribed
  )
  shutil.copyfile(work / "loss.png", out / "loss.png")
  report = make_report(config, seconds, stages.redone)
  (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
  return report


def _speak(config: SpeechConfig, folder: Path):
  columns = (TextColumn("speaking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
  with Progress(*columns, console=Console(stderr=True)) as progress:
    bar = progress.add_task("", total=config.train_clips + config.test_clips)
    for split in ("train", "test"):
      done = 0
      for clips, _ in write_split(plan(config, split), folder / split):
        progress.advance(bar, clips - done)
        done = clips


def _pack(speech: Path, shards: Path):
  for split in ("train", "test"):
    source = speech / split
    _call([
      command(), "pack", f"--wav-scp={source / 'wav.scp'}", f"--text={source / 'text'}",
      f"--out={shards / split}", "--per-shard=500",
    ])  # fmt: skip


def _train(config: DemoConfig, configured: list[str], work: Path):
  _call([sys.executable, "train.py", *configured])
  steps = config.steps or get_config().train.steps
  if not (work / f"step_{steps:08d}").is_dir():
    raise RuntimeError(f"{work}: training stopped before step {steps}; the same command goes on")


def _transcribe(work: Path, clip: Path, folder: Path):
  folder.mkdir(parents=True)
  result = folder / "result.json"
  _call([command(), "transcribe", f"--checkpoint={work}", f"--json={result}", str(clip)])


def command() -> str:
  """Path of the installed command `mooer-jax`.

  Raises:
    FileNotFoundError: if the package is not installed beside this Python.
  """
  path = Path(sys.executable).parent / "mooer-jax"
  if not path.exists():
    raise FileNotFoundError(f"{path}: not installed; run `make demo`, or pip install -e '.[demo]'")
  return str(path)


def _call(arguments: list[str]):
  # Shown as a user would type it from the checkout.
  here = f"{ROOT}{os.sep}"
  shown = [a.removeprefix(here) for a in arguments]
  shown[0] = "python" if arguments[0] == sys.executable else Path(arguments[0]).name
  print("\n$ " + " ".join(shown), flush=True)
  call(arguments)


def make_report(config: DemoConfig, seconds: dict[str, float], redone: list[str]) -> dict:
  """Collects what the steps left in the run's folder."""
  out = Path(config.folder)
  scored = json.loads((out / "eval" / "report.json").read_text("utf-8"))
  rows = (out / "train" / "metrics.jsonl").read_text("utf-8").splitlines()
  losses = [json.loads(row)["loss"] for row in rows]
  hypotheses = _read_hypotheses(out / "eval" / "text")
  test = plan(config.speech, "test")
  utterances = [
    {
      "key": utterance.key,
      "voice": utterance.manner.voice,
      "reference": utterance.digits,
      "hypothesis": hypotheses.get(utterance.key),
    }
    for utterance in test
  ]
  # Not `or`: a rate of 0 is a rate.
  cer = scored["details"]["rates"]["character"]
  result = json.loads((out / "transcribe" / "result.json").read_text("utf-8"))
  return {
    "cer": cer,
    "goal_cer": config.goal_cer,
    "n_utterances": len(test),
    "n_wrong": sum(u["reference"] != u["hypothesis"] for u in utterances),
    "train_seconds": round(seconds["training"], 1),
    "total_seconds": round(sum(seconds.values()), 1),
    "seconds": {name: round(value, 1) for name, value in seconds.items()},
    "steps_done_in_this_run": redone,
    "n_train_utterances": config.speech.train_clips,
    "updates": len(losses),
    "loss_first": sum(losses[:10]) / len(losses[:10]),
    "loss_last": sum(losses[-10:]) / len(losses[-10:]),
    "held_out_voices": list(TEST_VARIANTS),
    "machine": {
      "cores": os.cpu_count(),
      "python": platform.python_version(),
      "jax": metadata.version("jax"),
    },
    "transcribed": result[0],
    "utterances": utterances,
  }


def _read_hypotheses(path: Path) -> dict[str, str]:
  rows = (line.partition("\t") for line in path.read_text("utf-8").splitlines())
  return {key: text for key, _, text in rows}


def main() -> int:
  parser = argparse.ArgumentParser(description="Trains and tests a small model on spoken digits.")
  parser.add_argument("--quick", action="store_true", help="shortened; checks that it learns")
  args = parser.parse_args()
  os.chdir(ROOT)
  config = QUICK if args.quick else FULL
  try:
    report = run(config)
  except subprocess.CalledProcessError as error:
    print(
      f"make demo: {Path(error.cmd[0]).name} {error.cmd[1]} failed, status {error.returncode}",
      file=sys.stderr,
    )
    return 1
  except RuntimeError as error:
    print(f"make demo: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("make demo: interrupted; the same command goes on", file=sys.stderr)
    return 130
  show(report, config.folder)
  problems = failures(report)
  for problem in problems:
    print(f"make demo: {problem}", file=sys.stderr)
  return bool(problems)


if __name__ == "__main__":
  sys.exit(main())
