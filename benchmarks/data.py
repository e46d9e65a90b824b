"""Speed of the data pipeline per core beside a PyTorch DataLoader, and the padding of its batches.

  python -m benchmarks.data --dir /fast/disk --json benchmarks/results/data.json
  python -m benchmarks.data --dir /tmp/data --utterances 40 --rounds 1    # a quick look

Both sides read the same shards (16 kHz wav, 24 kHz mp3), decode, resample to 16 kHz, compute
MooER's features (80 mel bins, 7 frames joined every 6) and pad batches of clips that were sorted
within a buffer. Each side is a process on the same core, and they take turns. The other side is
written as WeNet's pipeline is: an IterableDataset of tarfile, libsndfile, soxr and
kaldi_native_fbank. The padding is that of training batches of lengths like Emilia's.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# One thread each: the figures are per core.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np

from benchmarks import data_input
from benchmarks.provenance import versions, write_result

SOURCES = ("mooer_jax/audio", "mooer_jax/data", "mooer_jax/inputs.py", "benchmarks/data.py",
           "benchmarks/data_input.py")  # fmt: skip
RATE_HZ = 16000
BATCH_SIZE, BUFFER = 16, 128
STEP_S = 0.06  # of MooER's features
MAX_S = data_input.MAX_S


class Case(NamedTuple):
  suffix: str
  rate_hz: int
  goal: int  # times real time on a core


CASES = {"wav, 16 kHz": Case("wav", 16000, 400), "mp3, 24 kHz": Case("mp3", 24000, 150)}


class Totals(NamedTuple):
  """Counts of a pass over a data set."""

  clips: int
  audio_s: float
  frames: int  # without padding


def run_ours(data_list: Path) -> Totals:
  """A pass of `eval_batches`, which does the work of training but for the order."""
  from mooer_jax.config import SpeechLLMConfig
  from mooer_jax.data.config import DataConfig
  from mooer_jax.data.dataset import eval_batches
  from mooer_jax.text.tokenizer import Tokenizer

  model = SpeechLLMConfig(chat_template="bare", prompts=(("asr", "N"),), max_audio_s=MAX_S)
  config = DataConfig(
    shards=str(data_list), batch_size=BATCH_SIZE, shuffle_buffer_size=BUFFER, max_s=MAX_S,
    buckets=(100, 150, 200, 300, 502),
  )  # fmt: skip
  tokenizer = Tokenizer.from_characters("N0123456789 ")
  found = Totals(0, 0.0, 0)
  for host in eval_batches(config, tokenizer, model):
    assert not host.skipped, host.skipped
    frames = int(host.batch.frames[0].sum())
    found = Totals(
      found.clips + len(host.keys), found.audio_s + host.audio_s, found.frames + frames
    )
  return found


def run_theirs(data_list: Path) -> Totals:
  """A pass of a DataLoader without worker processes."""
  import torch

  class Clips(torch.utils.data.IterableDataset):
    def __iter__(self):
      return torch_batches(data_list)

  torch.set_num_threads(1)
  found = Totals(0, 0.0, 0)
  for _, frames_B, seconds_B in torch.utils.data.DataLoader(Clips(), batch_size=None):
    found = Totals(
      found.clips + len(frames_B),
      found.audio_s + float(seconds_B.sum()),
      found.frames + int(frames_B.sum()),
    )
  return found


def torch_batches(data_list: Path) -> Iterator[tuple[Any, Any, Any]]:
  """Yields (features [B, T, 560], frames [B], seconds [B]), sorted by length in buffers."""
  import torch

  buffer: list[tuple[Any, float]] = []

  def batches():
    buffer.sort(key=lambda one: len(one[0]))
    for first in range(0, len(buffer), BATCH_SIZE):
      features, seconds = zip(*buffer[first : first + BATCH_SIZE])
      yield (
        torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
        torch.tensor([len(x_TF) for x_TF in features]),
        torch.tensor(seconds, dtype=torch.float64),
      )
    buffer.clear()

  for clip in torch_clips(data_list):
    buffer.append(clip)
    if len(buffer) == BUFFER:
      yield from batches()
  yield from batches()


def torch_clips(data_list: Path) -> Iterator[tuple[Any, float]]:
  """Yields (features [T, 560], seconds) of each clip in the tars."""
  import io
  import tarfile

  import soundfile
  import soxr

  for name in data_list.read_text("utf-8").split():
    with tarfile.open(data_list.parent / name, "r|") as tar:
      for member in tar:
        if member.name.endswith(("txt", "json")):
          continue
        file = tar.extractfile(member)
        assert file is not None
        samples_N, rate_hz = soundfile.read(io.BytesIO(file.read()), dtype="float32")
        if rate_hz != RATE_HZ:
          samples_N = soxr.resample(samples_N, rate_hz, RATE_HZ, quality="HQ")
        yield torch_features(samples_N), len(samples_N) / RATE_HZ


def torch_features(samples_N: np.ndarray):
  """Log-mel energies by kaldi_native_fbank, 7 frames joined every 6: float32 [T, 560]."""
  import kaldi_native_fbank
  import torch

  options = kaldi_native_fbank.FbankOptions()
  options.frame_opts.samp_freq = RATE_HZ
  options.frame_opts.dither = 0
  options.frame_opts.window_type = "hamming"
  options.frame_opts.snip_edges = True
  options.mel_opts.num_bins = 80
  fbank = kaldi_native_fbank.OnlineFbank(options)
  fbank.accept_waveform(RATE_HZ, samples_N * 32768)
  fbank.input_finished()
  x_TF = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
  count = -(-len(x_TF) // 6)
  last = 6 * (count - 1) + 7 - 3 - len(x_TF)
  padded_TF = np.pad(x_TF, ((3, max(0, last)), (0, 0)), mode="edge")
  stacks = [padded_TF[6 * i : 6 * i + 7].reshape(-1) for i in range(count)]
  return torch.from_numpy(np.stack(stacks))


SIDES: dict[str, Callable[[Path], Totals]] = {"mooer_jax": run_ours, "pytorch": run_theirs}


def serve(side: str, core: int | None, connection) -> None:
  """The process of a side: answers a list of shards with (totals, seconds, seconds of CPU)."""
  if core is not None:
    os.sched_setaffinity(0, {core})
  while (data_list := connection.recv()) is not None:
    start, start_cpu = time.perf_counter(), time.process_time()
    totals = SIDES[side](data_list)
    connection.send((totals, time.perf_counter() - start, time.process_time() - start_cpu))


def measure(folder: Path, *, utterances: int, rounds: int) -> dict[str, Any]:
  """Times real time of both sides for each case, and their ratio."""
  context = multiprocessing.get_context("spawn")
  core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
  pipes, processes = {}, []
  for side in SIDES:
    pipes[side], other = context.Pipe()
    processes.append(context.Process(target=serve, args=(side, core, other), daemon=True))
    processes[-1].start()

  def ask(side, data_list) -> tuple[Totals, float, float]:
    pipes[side].send(data_list)
    return pipes[side].recv()

  found: dict[str, Any] = {}
  for name, case in CASES.items():
    data_list = data_input.write_shards(
      folder / f"{case.suffix}_{utterances}", suffix=case.suffix, rate_hz=case.rate_hz,
      count=utterances, per_shard=max(1, utterances // 8),
    )  # fmt: skip
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    totals = {side: ask(side, data_list)[0] for side in SIDES}  # imports, and fills the page cache
    for _ in range(rounds):
      for side in SIDES:
        _, *seconds = ask(side, data_list)
        times[side].append((seconds[0], seconds[1]))
    audio_s = totals["mooer_jax"].audio_s
    row: dict[str, Any] = {"goal": case.goal, "hours": round(audio_s / 3600, 3)}
    for side in SIDES:
      wall, cpu = (statistics.median(column) for column in zip(*times[side]))
      row[side] = {
        "times_real_time": round(audio_s / wall, 1),
        "times_real_time_of_cpu": round(audio_s / cpu, 1),
        **totals[side]._asdict(),
      }
    ours, theirs = (row[side]["times_real_time_of_cpu"] for side in SIDES)
    row["ratio"] = round(ours / theirs, 2)
    found[name] = row
  for side, process in zip(SIDES, processes, strict=True):
    pipes[side].send(None)
    process.join()
  return found


def padding(counts: tuple[int, ...], *, utterances: int) -> dict[str, float]:
  """Share of padding in the frames of training batches, by number of `data.buckets`.

  The buckets are those that `mooer-jax data stats` suggests for the lengths.
  """
  from mooer_jax.config import SpeechLLMConfig
  from mooer_jax.data.batches import Batcher, TrainIterator
  from mooer_jax.data.config import DataConfig
  from mooer_jax.data.examples import Example
  from mooer_jax.data.stats import Stats, suggest_buckets
  from mooer_jax.data.utterances import Position

  model = SpeechLLMConfig(chat_template="bare", prompts=(("asr", "N"),), max_audio_s=MAX_S)
  frontend, lengths = model.frontends[0], data_input.lengths_s(utterances)
  frames = [frontend.num_frames(round(seconds * RATE_HZ)) for seconds in lengths]
  stats = Stats(shards=1)
  stats.lengths.update(round(100 * seconds) for seconds in lengths)
  none_S = np.zeros(0, np.int32)

  class Stream:
    """The utterances in order, with features that take no memory."""

    position = Position()

    def __init__(self):
      self._at = 0

    def peek(self) -> Example:
      number = self._at % len(frames)
      x_TF = np.broadcast_to(np.float32(0), (frames[number], frontend.width))
      return Example("", "", (x_TF,), "asr", none_S, none_S, none_S, float(lengths[number]))

    def take(self) -> Example:
      example = self.peek()
      self._at += 1
      return example

    def close(self): ...

  found = {}
  for count in counts:
    buckets = suggest_buckets(stats, count=count, step_s=STEP_S, max_s=MAX_S)
    longest = frontend.num_frames(int(MAX_S * RATE_HZ))
    config = DataConfig(
      shards="none", batch_size=32, shuffle_buffer_size=2048, max_s=MAX_S,
      buckets=(*buckets[:-1], max(buckets[-1], longest)), answer_buckets=(8,),
    )  # fmt: skip
    batches = TrainIterator(config, Batcher(config, model, (1, 1)), Stream())  # type: ignore[arg-type]
    real = padded = 0
    for _ in range(utterances // config.batch_size):
      batch = next(batches).batch
      real += int(batch.frames[0].sum())
      padded += batch.features[0].shape[0] * batch.features[0].shape[1]
    found[str(count)] = round(1 - real / padded, 4)
  return found


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dir", type=Path, required=True, help="folder for the shards")
  parser.add_argument("--utterances", type=int, default=800, help="in each data set")
  parser.add_argument("--rounds", type=int, default=5, help="passes of each side")
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  result = {
    "padding": padding((5, 8, 12), utterances=10 * args.utterances),
    "lengths": {
      "distribution": "log-normal, an assumption",
      "min_s": data_input.MIN_S, "max_s": MAX_S, "median_s": data_input.MEDIAN_S,
      "sigma": data_input.SIGMA,
    },
    "cases": measure(args.dir, utterances=args.utterances, rounds=args.rounds),
    "versions": versions(
      "numpy", "soundfile", "soxr", "av", "grain", "torch", "kaldi-native-fbank"
    ),
  }  # fmt: skip
  for name, row in result["cases"].items():
    ours, theirs = (row[side]["times_real_time"] for side in SIDES)
    print(
      f"{name}: {ours} x real time on a core (goal {row['goal']}), PyTorch {theirs}; ratio"
      f" {row['ratio']}"
    )
  for count, share in result["padding"].items():
    print(f"{count} buckets: {share:.1%} padding (goal 10 %)")
  write_result(args.json, result, SOURCES)


if __name__ == "__main__":
  main()
