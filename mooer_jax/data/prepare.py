"""Preparation of a data set for random access: `mooer-jax data prepare`.

TFDS's own `download_and_prepare` writes in one process and starts again after an interruption. So
the ArrayRecord files are written here, a job each, and TFDS adds its description at the end. Jobs
run in processes of this machine or on Apache Beam.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from mooer_jax import storage
from mooer_jax.data.readers import file_of, prepared, read, shard_names
from mooer_jax.data.readers.entries import SkippedUtterance
from mooer_jax.data.workers import run_in_processes
from mooer_jax.files import LOCK_FILE, exit_on_sigterm, lock_folder, replace_file, write_json

MAX_FILES = 512  # unless more are named: each reader holds all of them open
_NAME, _SUFFIX = "speech", "array_record"  # of the dataset and its files, in TFDS's form
_PROGRESS = ".progress"  # folder of the plan and of a report for each complete file
LEFT_OUT = "left_out.tsv"


@dataclasses.dataclass(frozen=True)
class PrepareReport:
  """Result of `prepare`."""

  files: int
  utterances: int
  left_out: collections.Counter[str]  # number of utterances by cause; LEFT_OUT has all of them


def prepare(
  source: str | Path,
  out: str | Path,
  *,
  files: int | None = None,
  processes: int | None = None,
  beam_options: Sequence[str] | None = None,
  progress: bool = True,
) -> PrepareReport:
  """Writes a data set as a TFDS dataset, which `tfds.builder_from_directory` opens.

  The encoded audio is stored unchanged and is not decoded. Utterances that the source lacks parts
  of are left out and listed in LEFT_OUT. The folder appears at the end, complete. After an
  interruption, the same call resumes: complete files are kept in `.NAME.partial` beside `out`.

  Args:
    source: as `data.shards`, which may be a URL.
    out: the folder, which is local; must not exist, or be empty.
    files: number of files, each a job, at most one for each shard; default: one, but at most
      MAX_FILES.
    processes: jobs at a time; default: the number of CPUs. More than one are spawned, so a script
      that calls this needs its `if __name__ == "__main__":`.
    beam_options: options of an Apache Beam pipeline that runs the jobs, such as
      ["--runner=DirectRunner"]. All its workers must see `source` and `out` under the same paths.
    progress: whether to show a bar; there is none of a pipeline.

  Raises:
    FileExistsError: if `out` has something in it.
    FileNotFoundError, ValueError: for a source without data, options that exclude each other,
      another source than that of the interrupted run, an `out` that is a URL, or if another
      process prepares it.
  """
  source, out = storage.absolute(source), Path(os.path.abspath(storage.local(out, "out")))
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise FileExistsError(f"{out}: exists already; remove it or choose another --out")
  for name, value in (("files", files), ("processes", processes)):
    if value is not None and value < 1:
      raise ValueError(f"{name}={value}: must be at least 1")
  if beam_options is not None and processes is not None:
    raise ValueError(
      f"processes={processes} has no effect on Apache Beam; name the number in its options"
    )
  names = shard_names(source)
  if files is not None and files > len(names):
    raise ValueError(f"files={files}: must be at most {len(names)}, the number of shards or blocks")
  count = files or min(MAX_FILES, len(names))
  beside = out.with_name(f".{out.name}.partial")
  with lock_folder(beside), exit_on_sigterm():
    _check_plan(beside / _PROGRESS / "plan.json", names, count)
    for left in beside.glob(".*.tmp"):  # by a process that was killed
      left.unlink()
    paths = [str(beside / f"{_NAME}-{prepared.SPLIT}.{_SUFFIX}-{i:05d}-of-{count:05d}")
             for i in range(count)]  # fmt: skip
    parts = [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]
    todo = [job for job in zip(paths, parts, strict=True) if not _report(job[0]).exists()]
    if beam_options is not None:
      _run_on_beam(todo, beam_options)
    else:
      known = storage.sizes({*map(file_of, names)})
      sizes = [sum(known[name] for name in {*map(file_of, of)}) for _, of in todo]
      written = run_in_processes(
        write_file, todo, processes=processes, progress="preparing" if progress else "", sizes=sizes
      )
      with contextlib.closing(written):  # type: ignore[type-var]
        collections.deque(written, maxlen=0)
    report = _finish(beside, paths)
    (beside / LOCK_FILE).unlink()
    os.replace(beside, out)
    shutil.rmtree(out / _PROGRESS)
  return report


def write_file(path: str, names: Sequence[str]) -> None:
  """Writes the utterances of some shards into an ArrayRecord file, and then a report of it.

  A file with a report is complete. Several may write the same file at the same time.
  """
  from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

  features = prepared.features()
  sizes: list[int] = []
  left_out: list[SkippedUtterance] = []

  def examples() -> Iterator[tuple[int, bytes]]:
    for entry in (e.load() for e in itertools.chain.from_iterable(map(read, names))):
      if isinstance(entry, SkippedUtterance):
        left_out.append(entry)
        continue
      example = features.serialize_example(features.encode_example(prepared.to_example(entry)))
      sizes.append(len(example))
      yield len(sizes), example

  with replace_file(path) as beside:
    try:
      ArrayRecordFileAdapter.write_examples(beside, examples())
    except RuntimeError as error:  # of ArrayRecord, as of a full disk
      raise OSError(f"{path}: {error}") from error
  lines = [[entry.cause, entry.key, entry.shard, entry.detail] for entry in left_out]
  write_json(_report(path), {"utterances": len(sizes), "bytes": sum(sizes), "left_out": lines})


def _report(path: str) -> Path:
  return Path(path).parent / _PROGRESS / f"{Path(path).name}.json"


def _check_plan(path: Path, names: Sequence[str], count: int) -> None:
  """Raises ValueError if files of another source or number were written before."""
  state = [(name, *found) for name, found in sorted(storage.stats({*map(file_of, names)}).items())]
  plan = {"files": count, "source": zlib.crc32(json.dumps([[*names], state]).encode())}
  if path.exists() and (before := json.loads(path.read_text("utf-8"))) != plan:
    remedy = f"remove {path.parents[1]} to start again, or choose another --out"
    if before["files"] != count:
      raise ValueError(
        f"an interrupted preparation has {before['files']} files, this one {count}; {remedy}"
      )
    raise ValueError(f"the data have changed since the preparation was interrupted; {remedy}")
  write_json(path, plan)


def _run_on_beam(jobs: Sequence[tuple[str, Sequence[str]]], options: Sequence[str]) -> None:
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ModuleNotFoundError as error:
    raise ValueError(
      f"Apache Beam is not installed ({error}); install mooer-jax[beam] into an environment of its"
      " own, since Beam needs older versions of other packages"
    ) from error
  if not jobs:
    return
  with beam.Pipeline(options=PipelineOptions([*options])) as pipeline:
    # Reshuffle: or a runner may fuse the steps, and one worker would run all jobs.
    _ = pipeline | beam.Create([*jobs]) | beam.Reshuffle() | beam.MapTuple(write_file)


def _finish(folder: Path, paths: Sequence[str]) -> PrepareReport:
  """Writes TFDS's description of the files and the list of utterances that they lack."""
  if missing := [path for path in paths if not (_report(path).exists() and os.path.exists(path))]:
    raise FileNotFoundError(
      f"{len(missing)} of {len(paths)} files were not written, first {missing[0]}; all workers must"
      " see the folder under the same path"
    )
  reports = [json.loads(_report(path).read_text("utf-8")) for path in paths]
  utterances = sum(report["utterances"] for report in reports)
  left_out = [line for report in reports for line in report["left_out"]]
  if not utterances:
    shutil.rmtree(folder)
    first = "; ".join(" ".join(line) for line in left_out[:3])
    raise ValueError(f"nothing to prepare; {len(left_out)} utterances left out ({first} …)")
  if left_out:
    text = "".join("\t".join(" ".join(field.split()) for field in line) + "\n" for line in left_out)
    with replace_file(folder / LEFT_OUT) as beside:
      beside.write_text(text, "utf-8", errors="backslashreplace")
  import tensorflow_datasets as tfds

  split = tfds.core.SplitInfo(
    name=prepared.SPLIT,
    shard_lengths=[report["utterances"] for report in reports],
    num_bytes=sum(report["bytes"] for report in reports),
    filename_template=None,
  )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=prepared.features(),
    split_infos=[split],
    check_data=False,  # reads through TensorFlow
    description="Utterances: encoded audio, text, and further fields in JSON (`about`).",
  )
  return PrepareReport(len(paths), utterances, collections.Counter(line[0] for line in left_out))
