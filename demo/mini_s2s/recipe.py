"""`make mini-s2s`: train a small speech-to-speech model on real recordings, and score its speech.

    python -m demo.mini_s2s.recipe [--quick] [--mirror URL]

Spanish, French, Italian or Russian numbers in, the same numbers in English speech out; spoken sums
in five languages in, spoken results out. Every step is a command that works on other data too. The
commands are printed, and an interrupted run resumes.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import soundfile
from ml_collections import ConfigDict

from configs import mini_s2s
from demo.digits import MOOER_JAX
from demo.mini.recipe import WHISPER
from demo.mini_s2s.corpus import TARGET, TOKEN_SAMPLES
from demo.mini_s2s.pictures import draw_pair
from demo.stages import Stages, call, imported_sources, one_line_errors, packaged, schedule
from mooer_jax import checkpoint
from mooer_jax.audio.decode import load_audio
from mooer_jax.evaluation.text_files import read_text, write_text

TASKS = {"trans": "s2s_trans", "sums": "s2s_chat"}
VOICE = "agent-alreadyon"  # the English prompt whose voice the model speaks in: 5 s
SAMPLES = 5  # of each task, with pictures
GOAL_WER = 0.15


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One size of the recipe; steps=0 uses the steps of configs/mini_s2s.py."""

  out: Path
  corpus: tuple[str, ...] = ()
  steps: int = 0

  def path(self, stage: str) -> Path:
    """Return the folder of a training stage."""
    return self.out / stage

  def settings(self, stage: str) -> list[str]:
    """Return the arguments of train.py and eval.py for a training stage."""
    settings = [f"--config=configs/mini_s2s.py:{stage}"]
    if self.out != FULL.out:
      settings += _moved(mini_s2s.get_config(stage), FULL.out, self.out, "--config")
    return settings + (schedule(self.steps, warmup=self.steps // 10) if self.steps else [])


def _moved(section: ConfigDict, before: Path, after: Path, name: str) -> list[str]:
  """Overrides for the paths of a config that are in the folder `before`, except init_from."""
  settings = []
  for key, value in section.items():
    if isinstance(value, ConfigDict):
      settings += _moved(value, before, after, f"{name}.{key}")
    elif isinstance(value, str) and Path(value).is_relative_to(before) and key != "init_from":
      settings.append(f"{name}.{key}={after / Path(value).relative_to(before)}")
  return settings


FULL = Recipe(Path("out/mini-s2s"))
QUICK = Recipe(Path("out/mini-s2s-quick"), ("--quick",), steps=40)


def run(recipe: Recipe, *, mirror: str = "") -> dict[str, Any]:
  """Run all steps; returns the content of report.json."""
  whisper = packaged(*WHISPER)
  out = recipe.out
  data, shards, units, labels = (out / name for name in ("data", "shards", "units", "labels"))
  stages = Stages(out)
  corpus = ("--debian", out / "debian", "--out", data, *recipe.corpus)
  mirrors = ("--mirror", mirror) if mirror else ()
  stages.run(
    "corpus", lambda: _module("demo.mini_s2s.corpus", *corpus, *mirrors), makes=data,
    inputs=[*map(str, corpus)], files=imported_sources("demo/mini_s2s/corpus.py"), resumable=True,
  )  # fmt: skip
  stages.run(
    "packing", lambda: _pack(data, shards), makes=shards,
    files=imported_sources("mooer_jax/data/pack.py"),
  )  # fmt: skip
  _train(stages, recipe, "asr")
  asr, english = checkpoint.find(recipe.path("asr")), shards / "english-train" / "data.list"
  stages.run(
    "units", lambda: call(
      MOOER_JAX, "units", "fit", english, f"--checkpoint={asr}", f"--out={units}",
      f"--count={mini_s2s.UNITS}", f"--samples-per-token={TOKEN_SAMPLES}",
      "--sample-rate-hz=16000",
    ), makes=units,
  )  # fmt: skip
  stages.run("labels", lambda: _label(data, shards, asr, units, labels), makes=labels)
  _train(stages, recipe, "speech")
  _train(stages, recipe, "vocoder")
  ideal = out / "real-tokens"
  voice = data / "prompts" / "train" / "wav" / f"{TARGET}-{VOICE}.flac"
  spoken = out / "spoken"
  stages.run("speaking", lambda: _speak(recipe, data, voice, spoken), makes=spoken, resumable=True)
  stages.run(
    "real tokens", lambda: _resynthesize(recipe, data, labels, voice, ideal), makes=ideal,
    after="training, vocoder",
  )  # fmt: skip
  scores = {}
  for task in TASKS:
    real = out / "real" / task
    _copy_targets(data / task / "test" / "targets", real)
    for name, folder in (
      (task, spoken / task),
      (f"{task}, real tokens through the vocoder", ideal / task),
      (f"{task}, real speech", real),
    ):
      scores[name] = _score(recipe, folder, data / task / "test" / "labels", voice, whisper)
    _show_samples(data / task / "test", spoken / task, real, out / "samples")
  report = {"goal_wer": GOAL_WER, "scores": scores, "other_voices": _other_voices(data, voice)}
  report["seconds"] = {name: round(seconds, 1) for name, seconds in stages.seconds.items()}
  (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
  return report


def _pack(data: Path, shards: Path) -> None:
  for name in ("trans-train", "sums-train", "english-train", "english-test"):
    source = data / Path(*name.split("-"))
    call(
      MOOER_JAX, "pack", f"--wav-scp={source / 'wav.scp'}", f"--text={source / 'text'}",
      f"--out={shards / name}", "--per-shard=300", "--no-normalize",
    )  # fmt: skip


def _train(stages: Stages, recipe: Recipe, stage: str) -> None:
  settings = recipe.settings(stage)
  if before := mini_s2s.INIT_FROM.get(stage):
    settings.append(f"--config.init_from={checkpoint.find(recipe.path(before))}")
  config = json.loads(mini_s2s.get_config(stage).to_json())
  for scoring in ("eval", "speech"):
    del config[scoring]
  stages.run(
    f"training, {stage}", lambda: call(sys.executable, "train.py", *settings),
    makes=recipe.path(stage), inputs=[settings, config], resumable=True,
  )  # fmt: skip


def _label(data: Path, shards: Path, asr: Path, units: Path, labels: Path) -> None:
  """Write the answers with audio tokens: those of the English waveforms, then of the inputs."""
  for split, folder in (("train", labels), ("test", labels / "test")):
    folder.mkdir(parents=True)
    call(MOOER_JAX, "units", "encode", shards / f"english-{split}" / "data.list",
         f"--checkpoint={asr}", f"--units={units}", f"--out={folder / 'english'}")  # fmt: skip
    answers = read_text(folder / "english")
    waveforms: dict[str, str] = {}
    for task in TASKS:
      targets = read_text(data / task / split / "targets")
      if lacking := [path for path in targets.values() if Path(path).stem not in answers]:
        raise RuntimeError(
          f"{folder / 'english'} has no audio tokens of {lacking[0]} and {len(lacking) - 1} others,"
          " which `units encode` has skipped; see its output"
        )
      write_text(folder / task, {key: answers[Path(path).stem] for key, path in targets.items()})
      waveforms |= targets  # keys begin with the task
    write_text(folder / "targets", waveforms)


def _resynthesize(recipe: Recipe, data: Path, labels: Path, voice: Path, ideal: Path) -> None:
  for task, name in TASKS.items():
    _module(
      "demo.mini_s2s.resynthesize", f"--checkpoint={recipe.path('vocoder')}", f"--task={name}",
      f"--wav-scp={data / task / 'test' / 'wav.scp'}", f"--labels={labels / 'test' / task}",
      f"--voice={voice}", f"--out={ideal / task}",
    )  # fmt: skip


def _speak(recipe: Recipe, data: Path, voice: Path, spoken: Path) -> None:
  for task, name in TASKS.items():
    clips = read_text(data / task / "test" / "wav.scp").values()
    call(MOOER_JAX, "speak", f"--checkpoint={recipe.path('vocoder')}", f"--task={name}",
         f"--voice={voice}", f"--out={spoken / task}", *clips)  # fmt: skip


def _copy_targets(targets: Path, folder: Path) -> None:
  """Write the real speech of the answers as KEY.wav, for scoring."""
  folder.mkdir(parents=True, exist_ok=True)
  for key, path in read_text(targets).items():
    if not (wav := folder / f"{key}.wav").exists():
      soundfile.write(wav, *soundfile.read(path, dtype="int16"))


def _score(recipe: Recipe, folder: Path, references: Path, voice: Path, whisper: Path) -> dict:
  call(
    sys.executable, "eval.py", *recipe.settings("asr"), "--mode=speech",
    f"--config.speech.folder={folder}", f"--config.eval.references={references}",
    f"--config.speech.recogniser={whisper}", f"--config.speech.voice={voice}",
  )  # fmt: skip
  report = json.loads((folder / "scores" / "report.json").read_text("utf-8"))
  names = ("error_rate", "text_error_rate", "asr_bleu", "speaker_similarity")
  return {name: report[name] for name in names}


def _show_samples(test: Path, spoken: Path, real: Path, samples: Path) -> None:
  """Copy the first answers, not the best, beside their inputs and the real speech, and draw them.

  The test has all languages of an utterance in a row.
  """
  samples.mkdir(parents=True, exist_ok=True)
  inputs = read_text(test / "wav.scp")
  for key in [*inputs][:: max(1, len(inputs) // SAMPLES)][:SAMPLES]:
    shutil.copyfile(inputs[key], samples / f"{key}-input.flac")
    shutil.copyfile(real / f"{key}.wav", samples / f"{key}-real.wav")
    if (answer := spoken / f"{key}.wav").exists():
      shutil.copyfile(answer, samples / f"{key}.wav")
      draw_pair(real / f"{key}.wav", answer, samples / f"{key}.png")


def _other_voices(data: Path, voice: Path) -> dict[str, float]:
  """Mean similarity of the prompts of each language to the voice, for comparison."""
  from mooer_jax.run.speech_scoring import RATE_HZ, speaker_vector

  wanted = speaker_vector(load_audio(voice, sample_rate_hz=RATE_HZ))
  found: dict[str, list[float]] = {}
  for key, path in read_text(data / "prompts" / "test" / "wav.scp").items():
    vector = speaker_vector(load_audio(path, sample_rate_hz=RATE_HZ))
    found.setdefault(key.partition("-")[0], []).append(float(vector @ wanted))
  return {language: sum(values) / len(values) for language, values in found.items()}


def _module(name: str, *arguments) -> None:
  call(sys.executable, "-m", name, *arguments)


def failures(report: dict[str, Any]) -> list[str]:
  """Return the goals that a run misses, one message each."""
  return [
    f"{task}: WER of the speech is {100 * rate:.1f} %; the goal is at most {100 * GOAL_WER:.0f} %"
    for task in TASKS
    if (rate := report["scores"][task]["error_rate"]) > report["goal_wer"]
  ]


def main() -> int:
  parser = argparse.ArgumentParser(description="Train and test a small speech-to-speech model.")
  parser.add_argument("--quick", action="store_true", help="short smoke test of all steps")
  parser.add_argument("--mirror", default="", help="Debian mirror (default: that of apt-get)")
  args = parser.parse_args()
  recipe = QUICK if args.quick else FULL
  with one_line_errors("make mini-s2s"):
    report = run(recipe, mirror=args.mirror)
  print(json.dumps(report, indent=2))
  print(f"{recipe.out}/report.json, {recipe.out}/samples")
  missed = [] if args.quick else failures(report)
  for problem in missed:
    print(f"make mini-s2s: {problem}", file=sys.stderr)
  return bool(missed)


if __name__ == "__main__":
  sys.exit(main())
