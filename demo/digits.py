"""`make demo`: synthesize speech, pack shards, train, evaluate and transcribe, without downloads.

Run as `python -m demo.digits` from the clone. Every step is a command that works on other data too;
the commands are printed. `--quick` trains a shorter time and only checks that the loss falls.
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
    folder: output folder, relative to the clone.
    speech: the speech to synthesize.
    steps: optimizer steps, with a schedule of the same length; 0 uses those of configs/tiny.py.
    goal_cer: largest character error rate on held-out voices that counts as success.
  """

  folder: str
  speech: SpeechConfig
  steps: int
  goal_cer: float

  def overrides(self) -> list[str]:
    """Config overrides of configs/tiny.py, for train.py and eval.py."""
    if not self.steps:
      return []
    return [
      f"--config.train.steps={self.steps}",
      f"--config.optimizer.total_steps={self.steps}",
      f"--config.optimizer.warmup_steps={self.steps // 8}",
    ]


FULL = DemoConfig("out/demo", SpeechConfig(), steps=0, goal_cer=0.05)
# Too short to learn digits well. It succeeds if the loss halves and there are transcripts.
QUICK = DemoConfig(
  "out/demo-quick",
  SpeechConfig(train_clips=4000, test_clips=60, max_digits=3),
  steps=500,
  goal_cer=1.0,
)


def run(config: DemoConfig) -> dict:
  """Run all steps and write `report.json`.

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
    raise RuntimeError(
      f"{work}: training stopped before step {steps}; rerun the same command to resume"
    )


def _transcribe(work: Path, clip: Path, folder: Path):
  folder.mkdir(parents=True)
  result = folder / "result.json"
  _call([command(), "transcribe", f"--checkpoint={work}", f"--json={result}", str(clip)])


def command() -> str:
  """Return the path of the installed command `mooer-jax`.

  Raises:
    FileNotFoundError: if the package is not installed in this Python environment.
  """
  path = Path(sys.executable).parent / "mooer-jax"
  if not path.exists():
    raise FileNotFoundError(f"{path}: not installed; run `make demo`, or pip install -e '.[demo]'")
  return str(path)


def _call(arguments: list[str]):
  # Printed as a user would type it in the clone.
  here = f"{ROOT}{os.sep}"
  shown = [a.removeprefix(here) for a in arguments]
  shown[0] = "python" if arguments[0] == sys.executable else Path(arguments[0]).name
  print("\n$ " + " ".join(shown), flush=True)
  call(arguments)


def make_report(config: DemoConfig, seconds: dict[str, float], redone: list[str]) -> dict:
  """Collect the results of all steps from the output folder."""
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
    "optimizer_steps": len(losses),
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
  parser = argparse.ArgumentParser(description="Train and test a small model on spoken digits.")
  parser.add_argument(
    "--quick", action="store_true", help="train a shorter time; only check that the loss falls"
  )
  args = parser.parse_args()
  os.chdir(ROOT)
  config = QUICK if args.quick else FULL
  try:
    report = run(config)
  except subprocess.CalledProcessError as error:
    print(
      f"make demo: {Path(error.cmd[0]).name} {error.cmd[1]} failed with exit status"
      f" {error.returncode}",
      file=sys.stderr,
    )
    return 1
  except RuntimeError as error:
    print(f"make demo: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("make demo: interrupted; rerun the same command to resume", file=sys.stderr)
    return 130
  show(report, config.folder)
  problems = failures(report)
  for problem in problems:
    print(f"make demo: {problem}", file=sys.stderr)
  return bool(problems)


if __name__ == "__main__":
  sys.exit(main())
