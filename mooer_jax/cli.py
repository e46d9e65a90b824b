"""The command `mooer-jax`: transcribe (or ask), pack, convert."""

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mooer_jax.transcribe import command


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand.

  What the user did wrong, and what the system refuses (no permission, disk full), is one line on
  stderr and exit status 2.
  """
  parser = argparse.ArgumentParser(prog="mooer-jax", description=__doc__)
  parser.add_argument("--version", action="version", version=metadata.version("mooer-jax"))
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  command.add_parser(commands)
  _add_pack(commands)
  commands.add_parser("convert", help="PyTorch checkpoints in and out", add_help=False)
  argv = sys.argv[1:] if argv is None else argv
  if argv[:1] == ["convert"]:  # it has a parser of its own
    return _convert(argv[1:])
  args = parser.parse_args(argv)
  try:
    return args.run(args)
  except (ValueError, OSError) as error:
    print(f"mooer-jax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"mooer-jax {args.command}: interrupted", file=sys.stderr)
    return 130


def _add_pack(commands):
  parser = commands.add_parser("pack", help="audio and transcripts to tar shards")
  parser.add_argument("--wav-scp", required=True, type=Path, help="KEY path, a line an utterance")
  parser.add_argument("--text", required=True, type=Path, help="KEY transcript, a line each")
  parser.add_argument("--segments", type=Path, help="KEY RECORDING start_s end_s")
  parser.add_argument("--out", required=True, type=Path, help="folder for the shards and data.list")
  parser.add_argument("--per-shard", type=int, default=1000, help="utterances a shard (1000)")
  parser.add_argument("--processes", type=int, default=None)
  parser.add_argument("--no-normalize", action="store_true", help="keep transcripts as they are")
  parser.add_argument("--shuffle-seed", type=int, default=None, help="pack in a random order")
  parser.set_defaults(run=_pack)


def _pack(args) -> int:
  from mooer_jax.data.pack import pack

  report = pack(
    args.wav_scp,
    args.text,
    args.out,
    segments=args.segments,
    per_shard=args.per_shard,
    processes=args.processes,
    normalise_text=not args.no_normalize,
    shuffle_seed=args.shuffle_seed,
  )
  print(f"{report.utterances} utterances in {report.shards} shards: {report.data_list}")
  if report.left_out:
    causes = Counter(left.cause for left in report.left_out)
    counts = ", ".join(f"{cause}: {number}" for cause, number in causes.most_common())
    print(f"{len(report.left_out)} not packed ({counts}); see left_out.tsv beside the list")
  return 0


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
