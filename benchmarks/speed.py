"""Speed of MooER's pipeline, from waveforms to text, beside PyTorch in the same run.

  python -m benchmarks.speed --dir /fast/disk --json out/speed.json
  python -m benchmarks.speed --dir /fast/disk --cases 3x1 4x4 --against none
  python -m benchmarks.speed --dir /fast/disk --quantization int8 --json out/speed_int8.json

Both sides run the same release with random weights: SAN-M of 50 layers and Qwen2-0.5B with LoRA,
float32. PyTorch's side is funasr's encoder and transformers' `generate` with the LoRA merged. Each
side has a process of its own, and they take turns, so that the ratios hold on a busy machine, too.
A case CLIPSxBEAMS decodes that many clips in one batch. With --quantization int8, our side rounds
the LLM to 8 bits, and its tokens differ; PyTorch's remains float32. The release needs 6 GB of disk;
it is kept in --dir and used again.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import MODEL, ROOT, versions, write_result

SOURCES = (*MODEL, "mooer_jax/audio", "mooer_jax/generation", "mooer_jax/transcribe",
           "benchmarks/speed.py")  # fmt: skip
TASK = "asr"
NEW_TOKENS = 40
CLIP_S = (6.0, 4.5, 5.5, 5.0)
STAGES = ("features", "to the first token", "whole")
Answer = Callable[[list[np.ndarray], int, int], list[list[int]]]  # clips, beams, tokens


class Case(NamedTuple):
  clips: int
  beams: int

  def __str__(self):
    return f"{self.clips}x{self.beams}"


def read_clips(number: int) -> list[np.ndarray]:
  """Recordings of digits, joined and cut to the lengths of CLIP_S in turn."""
  from mooer_jax.audio.decode import load_audio

  files = sorted((ROOT / "tests" / "clips").glob("*.wav"))
  digits = [load_audio(file, sample_rate_hz=16000) for file in files]
  everything_N = np.concatenate(digits * 4)
  lengths = [int(16000 * CLIP_S[i % len(CLIP_S)]) for i in range(number)]
  return [np.roll(everything_N, -16000 * i)[:n] for i, n in enumerate(lengths)]


def make_release(folder: Path, **sizes: Any) -> tuple[Path, Path]:
  """(the release, our checkpoint of it), made unless they are there.

  `sizes` are `encoder` and `sizes` of `full_release.write_release`; default: the full ones.
  """
  from convert.main import main as convert
  from tests.parity import full_release, torch_mooer

  release, ours = folder / "release", folder / "ours"
  if not (ours / "config.json").is_file():
    features = [torch_mooer.stacked(clip_N) for clip_N in read_clips(4)]
    sizes = {"sizes": full_release.QWEN2_0_5B, **sizes}
    full_release.write_release(release, features, tasks=(TASK,), **sizes)
    if convert(["import", "mooer", str(release), str(ours), "--task", TASK]):
      raise RuntimeError("the import failed")
  return release, ours


def load_ours(release: Path, ours: Path, quantization: str) -> tuple[Callable, Answer]:
  from mooer_jax import Transcriber
  from mooer_jax.inputs import extract_features

  # Without a persistent compilation cache, so that the first call compiles.
  transcriber = Transcriber.from_checkpoint(ours, dtype="float32", quantization=quantization)

  def answer(clips, beams, tokens):
    options = dict(num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens)
    results = transcriber.transcribe(clips, batch_size=len(clips), **options)
    return [result.tokens for result in results]

  return lambda clips: [extract_features(x_N, transcriber.config) for x_N in clips], answer


def load_theirs(release: Path, ours: Path, quantization: str) -> tuple[Callable, Answer]:
  from tests.parity import full_release, torch_mooer

  model = torch_mooer.TorchMooer(release, full_release.LLM, TASK)

  def answer(clips, beams, tokens):
    options = dict(max_new_tokens=tokens, min_new_tokens=tokens)
    found = model.answer(model.hear(clips), beams=beams, **options)
    for row in found:
      model.tokenizer.decode(row)
    return found

  return lambda clips: [torch_mooer.stacked(x_N) for x_N in clips], answer


SIDES = {"mooer_jax": load_ours, "pytorch": load_theirs}


def serve(side: str, release: Path, ours: Path, quantization: str, connection) -> None:
  """The process of a side: loads it, then answers (case, stage) with seconds, tokens, memory."""
  features, answer = SIDES[side](release, ours, quantization)
  connection.send("loaded")
  while (asked := connection.recv()) is not None:
    case, stage = asked
    clips = read_clips(case.clips)
    start, tokens = time.perf_counter(), None
    if stage == "features":
      features(clips)
    else:
      tokens = answer(clips, case.beams, NEW_TOKENS if stage == "whole" else 1)
    seconds = time.perf_counter() - start
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    connection.send((seconds, tokens, peak_gb))


def measure(case: Case, sides: dict[str, Any], repeats: int) -> dict[str, Any]:
  """Times of one case, the sides in turns: the first call and the median of the others."""
  first, times, tokens, peak_gb = {}, {}, {}, {}

  def ask(side, stage):
    sides[side].send((case, stage))
    return sides[side].recv()

  for side in sides:
    first[side], tokens[side], _ = ask(side, "whole")
    for stage in STAGES[:-1]:
      ask(side, stage)
  for _ in range(repeats):
    for side in sides:
      for stage in STAGES:
        seconds, _, peak_gb[side] = ask(side, stage)
        times.setdefault((side, stage), []).append(seconds)
  result: dict[str, Any] = {
    side: {
      "first_call_s": round(first[side], 2),
      "compile_s": round(first[side] - statistics.median(times[side, "whole"]), 2),
      **{stage: round(statistics.median(times[side, stage]), 3) for stage in STAGES},
      "peak_gb_so_far": round(peak_gb[side], 2),
    }
    for side in sides
  }
  if len(sides) == 2:
    ours, theirs = sides
    result["ratios"] = {
      stage: round(result[theirs][stage] / result[ours][stage], 2) for stage in STAGES
    }
    result["same_tokens"] = tokens[ours] == tokens[theirs]
  return result


def first_transcript(ours: Path, quantization: str, *, cached: bool) -> float:
  """Seconds of `mooer-jax transcribe` for one clip, with a compilation cache or an empty one."""
  import soundfile

  with tempfile.TemporaryDirectory() as folder:
    wav = Path(folder) / "clip.wav"
    soundfile.write(wav, read_clips(1)[0], 16000)
    run = "import sys; from mooer_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "transcribe", "--checkpoint", str(ours)]
    options = ["--num-beams", "1", "--max-new-tokens", str(NEW_TOKENS), str(wav)]
    if quantization != "none":
      options += ["--quantization", quantization]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": folder}
    for _ in range(2 if cached else 1):
      start = time.perf_counter()
      subprocess.run([*command, *options], env=env, check=True, stdout=subprocess.DEVNULL)
      seconds = time.perf_counter() - start
  return round(seconds, 1)


def table(cases: dict[str, Any]) -> Table:
  rows = Table("case", "stage", *SIDES, "PyTorch / JAX", title="seconds; clips x beams")
  for case, result in cases.items():
    for stage in ("first_call_s", "compile_s", *STAGES, "peak_gb_so_far"):
      times = [str(result.get(side, {}).get(stage, "")) for side in SIDES]
      rows.add_row(case, stage, *times, str(result.get("ratios", {}).get(stage, "")))
  return rows


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dir", type=Path, required=True, help="folder for the release")
  parser.add_argument("--cases", nargs="+", default=["3x1", "4x4", "16x1"], metavar="CLIPSxBEAMS")
  parser.add_argument("--against", choices=("pytorch", "none"), default="pytorch")
  parser.add_argument("--quantization", choices=("none", "int8"), default="none")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  cases = [Case(*map(int, text.split("x"))) for text in args.cases]
  context = multiprocessing.get_context("spawn")
  with context.Pool(1) as pool:  # so that torch is not in this process
    release, ours = pool.apply(make_release, (args.dir,))
  result = {
    "new_tokens": NEW_TOKENS,
    "clip_s": CLIP_S,
    "dtype": "float32",
    "quantization": args.quantization,
    "cases": {},
    "first_transcript_s": {
      "meaning": "the command `mooer-jax transcribe` for one clip: import, load, compile, decode",
      "empty compilation cache": first_transcript(ours, args.quantization, cached=False),
      "warm compilation cache": first_transcript(ours, args.quantization, cached=True),
    },
    "versions": versions("jax", "jaxlib", "flax", "torch", "transformers", "funasr"),
  }
  Console().print(result["first_transcript_s"])
  sides = {}
  for side in SIDES if args.against == "pytorch" else ["mooer_jax"]:
    sides[side], other = context.Pipe()
    arguments = (side, release, ours, args.quantization, other)
    context.Process(target=serve, args=arguments, daemon=True).start()
  for connection in sides.values():
    connection.recv()
  for case in cases:
    result["cases"][str(case)] = measure(case, sides, args.repeats)
    Console().print(table({str(case): result["cases"][str(case)]}))
    write_result(args.json, result, SOURCES)
  for connection in sides.values():
    connection.send(None)


if __name__ == "__main__":
  main()
