"""The command `mooer-jax`: transcribe, speak, train, eval, data, units, checkpoint, …"""

import importlib
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import metadata

from mooer_jax.files import ArgumentParser, discard_stdout, exit_on_sigterm
from mooer_jax.storage import local_path
from mooer_jax.transcribe import command, speak
from mooer_jax.units import command as units

_SOURCE_HELP = "a data.list, a raw list, an annotation file or a folder, as data.shards in a config"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand and returns its exit status.

  Errors of the user and of the system (no permission, disk full) are one line on stderr and exit
  status 2. SIGTERM raises SystemExit with status 143 after files and processes are cleaned up;
  train has handling of its own.
  """
  about = "Speech LLMs (MooER, SALMONN) in JAX: convert, train, evaluate, transcribe."
  parser = ArgumentParser(prog="mooer-jax", description=about)
  parser.add_argument("--version", action="version", version=metadata.version("mooer-jax"))
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  command.add_parser(commands)
  speak.add_parser(commands)
  _add_pack(commands)
  _add_data(commands)
  units.add_parser(commands, _SOURCE_HELP)
  _add_checkpoint(commands)
  commands.add_parser("train", help="train a speech LLM", add_help=False)
  commands.add_parser("eval", help="decode and score a test set", add_help=False)
  commands.add_parser("convert", help="convert PyTorch checkpoints in and out", add_help=False)
  argv = sys.argv[1:] if argv is None else argv
  if argv[:1] == ["convert"]:  # these have parsers of their own
    return _convert(argv[1:])
  if argv[:1] in (["train"], ["eval"]):
    program = importlib.import_module(f"mooer_jax.programs.{argv[0]}")
    return program.main([f"mooer-jax {argv[0]}", *argv[1:]])
  args = parser.parse_args(argv)
  try:
    with exit_on_sigterm():
      return args.run(args)
  except BrokenPipeError:
    return discard_stdout()
  except (ValueError, OSError) as error:
    print(f"mooer-jax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"mooer-jax {args.command}: interrupted", file=sys.stderr)
    return 130


def _add_pack(commands):
  parser = commands.add_parser("pack", help="pack audio and transcripts into tar shards")
  parser.add_argument(
    "--wav-scp", required=True, type=local_path, help="list with `KEY path` per line"
  )
  parser.add_argument(
    "--text", required=True, type=local_path, help="list with `KEY transcript` per line"
  )
  parser.add_argument(
    "--segments", type=local_path, help="list with `KEY RECORDING start_s end_s` per line"
  )
  parser.add_argument(
    "--out", required=True, type=local_path, help="folder for the shards and data.list"
  )
  parser.add_argument(
    "--per-shard", type=int, default=1000, help="utterances per shard (default: 1000)"
  )
  parser.add_argument("--processes", type=int, help="number of processes (default: CPU cores)")
  about = "keep transcripts as they are"
  parser.add_argument("--no-normalize", dest="normalise_text", action="store_false", help=about)
  parser.add_argument("--shuffle-seed", type=int, help="seed of a random order")
  parser.set_defaults(run=_pack)


def _pack(args) -> int:
  from mooer_jax.data.pack import pack

  names = ("segments", "per_shard", "processes", "normalise_text", "shuffle_seed")
  options = {name: getattr(args, name) for name in names}
  report = pack(args.wav_scp, args.text, args.out, **options)
  print(f"{report.utterances} utterances in {report.shards} shards: {report.data_list}")
  if report.left_out:
    causes = Counter(left.cause for left in report.left_out)
    counts = ", ".join(f"{cause}: {number}" for cause, number in causes.most_common())
    print(f"{len(report.left_out)} not packed ({counts}); see left_out.tsv beside the list")
  if report.joined_words:
    print(
      f"{report.joined_words} transcripts lost spaces between words (MooER's form keeps those"
      " between Latin letters alone); --no-normalize keeps all"
    )
  return 0


def _add_data(commands):
  parser = commands.add_parser("data", help="inspect and prepare data sets")
  actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
  _add_prepare(actions)
  about = "hours, lengths, languages and unusable utterances of a data set, and buckets that fit"
  stats = actions.add_parser("stats", help=about, description=about)
  stats.add_argument(
    "source",
    help=_SOURCE_HELP,
  )
  stats.add_argument("--filter", default="", help="condition, as data.filter in a config")
  stats.add_argument(
    "--labels", default="", metavar="FILE", help="`KEY text` lines, as data.labels in a config"
  )
  stats.add_argument(
    "--labels-mode",
    default="replace",
    metavar="MODE",
    help="replace, concat, concat_r or instruction, as data.labels_mode (default: replace)",
  )
  stats.add_argument(
    "--buckets", type=int, default=5, metavar="N", help="number of buckets to suggest (default: 5)"
  )
  stats.add_argument(
    "--max-s", type=float, default=20.0, help="longest clip to train on, seconds (default: 20)"
  )
  stats.add_argument(
    "--step-ms",
    type=float,
    default=60.0,
    help="length of an encoder input step, ms (default: 60, MooER's)",
  )
  stats.add_argument("--processes", type=int, help="number of processes (default: CPU cores)")
  stats.add_argument(
    "--png", type=local_path, metavar="FILE", help="also draw the lengths into FILE"
  )
  stats.add_argument(
    "--json", type=local_path, metavar="FILE", help="also write the counts to FILE"
  )
  stats.set_defaults(run=_data_stats)


def _add_prepare(actions):
  about = "write a data set as a TensorFlow Datasets (TFDS) dataset, for training in a random order"
  resume = "After an interruption, the same command resumes."
  parser = actions.add_parser("prepare", help=about, description=f"{about}. {resume}")
  parser.add_argument("source", help=_SOURCE_HELP)
  parser.add_argument("--out", required=True, type=local_path, help="folder for the dataset")
  parser.add_argument(
    "--files", type=int, metavar="N", help="number of files (default: one a shard, at most 512)"
  )
  parser.add_argument("--processes", type=int, help="number of processes (default: CPU cores)")
  parser.add_argument(
    "--beam-options",
    type=shlex.split,
    metavar="OPTIONS",
    help="run on Apache Beam with these options: --beam-options='--runner=DirectRunner'",
  )
  parser.set_defaults(run=_data_prepare)


def _data_prepare(args) -> int:
  from mooer_jax.data.prepare import LEFT_OUT, prepare

  names = ("files", "processes", "beam_options")
  report = prepare(args.source, args.out, **{name: getattr(args, name) for name in names})
  print(f"{report.utterances} utterances in {report.files} files: {args.out}")
  if report.left_out:
    counts = ", ".join(f"{cause}: {number}" for cause, number in report.left_out.most_common())
    print(f"{report.left_out.total()} left out ({counts}); see {args.out / LEFT_OUT}")
  return 0


def _data_stats(args) -> int:
  from rich.console import Console

  from mooer_jax.data import stats
  from mooer_jax.data.labels import SEPARATOR, LabelFile, Labels, check_options
  from mooer_jax.files import write_json

  for name in ("buckets", "max_s", "step_ms", "processes"):
    value = getattr(args, name)
    if value is not None and not 0 < value < float("inf"):
      raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
  for name in ("png", "json"):
    if (path := getattr(args, name)) and path.exists():
      raise FileExistsError(f"--{name} {path} exists; name another file")
  check_options(args.labels, args.labels_mode, SEPARATOR, task="", task_weights={})
  found = stats.data_stats(
    args.source,
    condition=args.filter,
    labels=Labels(LabelFile(args.labels), args.labels_mode) if args.labels else None,
    processes=args.processes,
    progress=Console(stderr=True).is_terminal,
  )
  step_s = args.step_ms / 1000
  buckets = stats.suggest_buckets(found, count=args.buckets, step_s=step_s, max_s=args.max_s)
  padding = stats.padding_share(found, buckets, step_s=step_s)
  print("\n".join(stats.describe(found, max_s=args.max_s)))
  if found.utterances:
    print(f"data.buckets = {(*buckets,)}  # {padding:.1%} padding, clips up to {args.max_s:g} s")
  if args.png and found.utterances:
    stats.draw_lengths(found, buckets, args.png, step_s=step_s)
  if args.json:
    write_json(args.json, {**found.to_json(), "buckets": buckets, "padding_share": padding})
  return 0 if found.utterances or found.texts else 1


def _add_checkpoint(commands):
  parser = commands.add_parser("checkpoint", help="check the files of checkpoints")
  actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
  about = "compare all files of a checkpoint with the SHA-256 sums of when it was saved"
  verify = actions.add_parser("verify", help=about, description=about)
  verify.add_argument(
    "path", type=local_path, help="checkpoint folder, or training workdir (all steps)"
  )
  verify.add_argument("--base-checkpoint", help="base of a fine-tune, if it has moved")
  verify.set_defaults(run=_verify)


def _verify(args) -> int:
  """Print a line for each checkpoint, or for each fault of it; exit status 1 if there are any."""
  import jax
  from rich.console import Console
  from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

  from mooer_jax import checkpoint
  from mooer_jax.config import from_json
  from mooer_jax.generation.weights import saved_shapes

  jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy, and nothing needs it
  steps = [] if (args.path / "checkpoint.json").is_file() else checkpoint.all_steps(args.path)
  steps = steps or [checkpoint.find(args.path)]
  if args.base_checkpoint and not any(map(checkpoint.has_base, steps)):
    raise ValueError(f"{args.path} has no base checkpoint; leave out --base-checkpoint")
  todo = [(step, args.base_checkpoint) for step in steps]
  console = Console(stderr=True)
  columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
  damaged = []
  with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
    for folder, base in todo:  # grows by their bases
      bar = progress.add_task(folder.name, total=None)
      faults: list[str] = []
      try:

        def show(done: int, total: int, bar=bar) -> None:
          progress.update(bar, completed=done, total=total)

        faults = checkpoint.find_damage(folder, show)
        about = checkpoint.describe(folder, base=base)
        if about.base and (about.base, None) not in todo:
          todo.append((about.base, None))
        if "connector" in about.config:
          model = from_json(about.config, path=about.folder / "config.json")
          checkpoint.check_leaves(about, saved_shapes(about.params, model))
      except (ValueError, OSError) as error:
        faults.append(" ".join(str(error).split()))
      if faults:
        damaged.append(folder)
        print(*faults, sep="\n", flush=True)
      elif about.files is None:
        print(f"{folder}: no sums recorded; the weights fit their hash, other files are unchecked")
      else:
        size = sum(size for size, _ in about.files.values())
        print(f"{folder}: ok, {len(about.files)} files, {size / 1e6:,.1f} MB", flush=True)
  if damaged:
    print(f"{len(damaged)} of {len(todo)} checkpoints are damaged", file=sys.stderr)
  return 1 if damaged else 0


def _convert(argv: Sequence[str]) -> int:
  try:
    converter = importlib.import_module("mooer_jax.convert.main")
  except ModuleNotFoundError as error:
    if error.name not in ("mooer_jax.convert", "mooer_jax.convert.main"):
      raise
    print(
      "mooer-jax convert: the converters are not in this installation; from a checkout, run"
      " python -m convert in its folder",
      file=sys.stderr,
    )
    return 2
  return converter.main(argv, prog="mooer-jax convert")


if __name__ == "__main__":
  sys.exit(main())
