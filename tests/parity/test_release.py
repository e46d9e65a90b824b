"""From a release folder to text: the tokens of funasr, peft and transformers put together.

Both sides read the same files. The encoder has its full width; nightly its full depth, too, for
which the checkpoints are large: each is removed with the module's folder. `make test` takes three
layers and two clips through every step, and two clips through fifty layers with narrow MLPs.
"""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from convert.main import main as convert
from mooer_jax import Transcriber, cli
from mooer_jax.checkpoint import describe
from mooer_jax.config import from_json
from mooer_jax.encoders.sanm import SANMConfig
from tests.parity import torch_mooer
from tests.parity.full_release import LLM, TASKS, write_release

pytestmark = pytest.mark.filterwarnings("ignore:Passing")  # that penalties skip the prompt: meant
NIGHTLY = (pytest.mark.nightly, pytest.mark.timeout(3600))
SHALLOW, DEEP, FULL = SANMConfig(layers=3), SANMConfig(intermediate_size=128), SANMConfig()
BEAMS = (1, 4)
OPTIONS = dict(max_new_tokens=40)


class Sides:
  """The release, its checkpoints and the PyTorch models, each made once."""

  def __init__(self, folder: Path, clips, encoder: SANMConfig, tasks=TASKS):
    features = [torch_mooer.stacked(torch_mooer.read(clip.path)) for clip in clips]
    self.folder, self.encoder, self.tasks = folder, encoder, tasks
    # Caches of this object, not of its class: they would outlive it, models and all.
    self.ours, self.theirs = map(functools.cache, (self._ours, self._theirs))
    self.release = write_release(folder / "release", features, encoder=encoder, tasks=tasks)

  @functools.cached_property
  def checkpoints(self) -> dict[str, Path]:
    found = {task: self.folder / task for task in self.tasks}
    for task, folder in found.items():
      assert convert(["import", "mooer", str(self.release), str(folder), "--task", task]) == 0
    return found

  def _ours(self, task: str) -> Transcriber:
    return Transcriber.from_checkpoint(self.checkpoints[task], dtype="float32")

  def _theirs(self, task: str) -> torch_mooer.TorchMooer:
    return torch_mooer.TorchMooer(self.release, LLM, task, self.encoder)

  def mismatches(self, transcriber: Transcriber, task: str, paths, *, beams, batch_size):
    """(clips whose tokens differ and not by rounding, clips excused by it)."""
    theirs = self.theirs(task)
    waveforms = [torch_mooer.read(path) for path in paths]
    chunks = [waveforms[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    expected = [a for chunk in chunks for a in theirs.answer(theirs.hear(chunk), beams=beams)]
    results = transcriber.transcribe(
      paths, task=task, batch_size=batch_size, num_beams=beams, **OPTIONS
    )
    wrong, excused = [], []
    for path, waveform_N, result, answer in zip(paths, waveforms, results, expected, strict=True):
      if result.tokens != answer:
        by_rounding = theirs.hangs_on_rounding(
          theirs.hear([waveform_N]), result.tokens, beams=beams
        )
        (excused if by_rounding else wrong).append((task, beams, batch_size, Path(path).name))
      else:
        assert result.text == theirs.tokenizer.decode(answer, skip_special_tokens=True)
        assert result.finished == (theirs.tokenizer.eos_token_id in answer)
    assert len({tuple(answer) for answer in expected}) > 0.5 * len(expected)  # they heard something
    return wrong, excused


# First, while the process is small.
def test_the_tokens_of_two_clips_at_full_depth(clips, tmp_path):
  sides = Sides(tmp_path, clips[:2], DEEP, tasks=("asr",))
  paths = [clip.path for clip in clips[:2]]
  assert sides.mismatches(sides.ours("asr"), "asr", paths, beams=4, batch_size=2) == ([], [])
  shutil.rmtree(tmp_path)


@pytest.fixture(
  scope="module",
  params=[pytest.param(SHALLOW, id="3-layers"), pytest.param(FULL, id="50-layers", marks=NIGHTLY)],
)
def sides(request, tmp_path_factory, clips):
  folder = tmp_path_factory.mktemp("release")
  tasks = TASKS if request.param == FULL else ("asr",)
  yield Sides(folder, clips, request.param, tasks)
  shutil.rmtree(folder)


@pytest.fixture(scope="module")
def few(sides, clips):
  """The committed clips; of a shallow encoder, which is no proof of its own, two."""
  return clips if sides.encoder == FULL else clips[:2]


@pytest.fixture(scope="module", params=["committed", pytest.param("real", marks=NIGHTLY)])
def recordings(request, few, tmp_path_factory) -> list[Path]:
  """Paths: the committed clips, or wav at 8 kHz, mp3, and digits in a row of 3 s."""
  if request.param == "committed":
    return [clip.path for clip in few]
  folder = request.getfixturevalue("shared_data")
  digits = sorted((folder / "fsdd").iterdir())
  chosen = np.random.default_rng(0).choice(len(digits), 7, replace=False)
  row = tmp_path_factory.mktemp("row") / "row.wav"
  samples = [soundfile.read(digits[i], dtype="float32")[0] for i in chosen]
  soundfile.write(row, np.concatenate(samples), 8000)
  return [*digits[7::397], *sorted((folder / "cmn-words").iterdir())[5::300], row]


def test_the_tokens_are_those_of_pytorch(sides, recordings):
  ways = [(task, beams, n) for task in ("asr", "ast") for beams in BEAMS for n in (1, 16)]
  if sides.encoder == SHALLOW:  # each way compiles a program
    ways = [("asr", 4, 1), ("asr", 1, 16)]
  cases, wrong, excused = len(ways) * len(recordings), [], []
  for task, beams, batch_size in ways:
    found = sides.mismatches(sides.ours(task), task, recordings, beams=beams, batch_size=batch_size)
    wrong += found[0]
    excused += found[1]
  print(f"{cases} answers, {len(wrong)} differ, excused by rounding: {excused}")
  assert not wrong
  assert len(excused) <= cases // 100, excused


@pytest.mark.parametrize(
  "merged",
  [pytest.param(False, id="lora-apart"), pytest.param(True, id="lora-merged", marks=NIGHTLY)],
)
def test_there_and_back_and_merged(sides, few, tmp_path, merged):
  paths = [clip.path for clip in few]
  back, again = tmp_path / "back", tmp_path / "again"
  if merged:
    first = tmp_path / "first"
    command = ["import", "mooer", str(sides.release), str(first), "--task", "asr", "--merge-lora"]
    assert convert(command) == 0
    compared = [first, again]
  else:  # the test above compares the tokens of the first
    first, compared = sides.checkpoints["asr"], [again]
  assert convert(["export", "mooer", str(first), str(back)]) == 0
  without = ["--no-lora"] if merged else []
  assert convert(["import", "mooer", str(back), str(again), "--task", "asr", *without]) == 0
  for folder in compared:
    assert bool(from_json(describe(folder).config).decoder.lora_rank) != merged
    transcriber = Transcriber.from_checkpoint(folder, dtype="float32")
    assert sides.mismatches(transcriber, "asr", paths, beams=4, batch_size=8) == ([], [])
  for folder in (back, *compared):
    shutil.rmtree(folder)


def test_the_command_gives_what_the_class_gives(sides, clips, tmp_path, capsys):
  paths = [str(clip.path) for clip in clips[:2]]
  base = ["transcribe", "--checkpoint", str(sides.checkpoints["asr"]), "--dtype", "float32"]
  out = tmp_path / "out.json"
  told = ["--task", "asr", "--num-beams", "4", "--length-penalty", "0.8", "--max-new-tokens", "40"]
  assert cli.main([*base, *told, "--json", str(out), *paths]) == 0
  rows = json.loads(out.read_text("utf-8"))
  theirs = sides.theirs("asr")
  expected = theirs.answer(theirs.hear([torch_mooer.read(p) for p in paths]), beams=4)
  results = sides.ours("asr").transcribe(paths, num_beams=4, **OPTIONS)
  for row, path, tokens, result in zip(rows, paths, expected, results, strict=True):
    assert row["path"] == path and row["task"] == "asr" and row["tokens"] == tokens
    assert row["text"] == theirs.tokenizer.decode(tokens, skip_special_tokens=True)
    assert row["seconds"] == pytest.approx(soundfile.info(path).duration, abs=1e-3)
    assert row == result.to_json()  # the same program on the same machine

  if sides.encoder == FULL:  # more programs to compile
    assert cli.main([*base, "--json", str(out), *paths]) == 0
    defaults = json.loads(out.read_text("utf-8"))
    asked = sides.ours("asr").transcribe(
      paths, task="asr", num_beams=4, length_penalty=0.8, max_new_tokens=200
    )
    greedy = sides.ours("asr").transcribe(paths, task="asr", num_beams=1)
    assert [row["tokens"] for row in defaults] == [result.tokens for result in asked]
    assert [row["tokens"] for row in defaults] != [result.tokens for result in greedy]
  # transformers writes lines of its own when it loads the other side.
  told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(tuple(paths))]
  assert all("max_new_tokens=" in line for line in told), told


@pytest.mark.parametrize("sides", [pytest.param(FULL, id="50-layers")], indirect=True)
@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_multitask_model_gives_transcript_and_translation(sides, few):
  paths = [clip.path for clip in few]
  task = "asr_ast_mtl"
  assert sides.mismatches(sides.ours(task), task, paths, beams=1, batch_size=8) == ([], [])
  transcriber = sides.ours(task)
  [line_break] = transcriber.tokenizer.encode("\n")
  # Random weights seldom break a line: here it is likely, and no token comes twice.
  coaxed = {"sequence_bias": ((line_break, 8.0),), "no_repeat_ngram_size": 1, "num_beams": 1}
  results = transcriber.transcribe(paths, batch_size=8, **coaxed, **OPTIONS)
  assert {result.task for result in results} == {task}
  two_lines = [result for result in results if result.text.count("\n") == 1]
  assert two_lines
  for result in two_lines:  # as the original's inference reads them
    assert [result.transcript, result.translation] == [
      line.strip() for line in result.text.split("\n")
    ]
