"""The command `mooer-jax`: transcribe (or ask), pack, checkpoint, convert."""

import argparse
import importlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mooer_jax.prompts import QUESTION, SPEECH, TEMPLATES

_GENERATION = {
  "num_beams": (int, "answers followed side by side"),
  "length_penalty": (float, "above 0 favours long answers of several beams"),
  "max_new_tokens": (int, "longest answer"),
  "min_new_tokens": (int, "shortest answer"),
  "repetition_penalty": (float, "above 1 keeps tokens from coming again"),
  "no_repeat_ngram_size": (int, "no so many tokens in a row come twice"),
  "do_sample": (bool, "draw instead of taking the most probable"),
  "temperature": (float, "of drawing"),
  "top_k": (int, "draw from so many tokens; 0 = all"),
  "top_p": (float, "draw from this much probability"),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand.

  What the user did wrong, and what the system refuses (no permission, disk full), is one line on
  stderr and exit status 2.
  """
  parser = argparse.ArgumentParser(prog="mooer-jax", description=__doc__)
  parser.add_argument("--version", action="version", version=metadata.version("mooer-jax"))
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  _add_transcribe(commands)
  _add_pack(commands)
  _add_checkpoint(commands)
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


def _add_transcribe(commands):
  # usage: argparse would show the other name for an alias
  usage = "mooer-jax {transcribe,ask} --checkpoint CKPT [options] audio [audio ...]"
  about = "audio files to text"
  parser = commands.add_parser("transcribe", aliases=["ask"], help=about, usage=usage)
  parser.add_argument("audio", nargs="+", help="wav, flac, ogg, opus, mp3; with [data] m4a, wma")
  parser.add_argument("--checkpoint", required=True, help="checkpoint folder or training workdir")
  parser.add_argument("--base", help="where the base of a fine-tune lies, if it moved")
  parser.add_argument("--task", default=None, help="default: the only one, else asr")
  parser.add_argument(
    "--prompt",
    help=f"what to ask instead of the task's prompt; {SPEECH} in it is where the speech stands, \\n"
    " a line break",
  )
  parser.add_argument(
    "--template",
    choices=sorted(TEMPLATES),
    help="chat format around the prompt; none: as it stands; default: the checkpoint's",
  )
  parser.add_argument("--question", help=f"what stands for {QUESTION} in the prompt")
  parser.add_argument(
    "--chunk-s",
    type=float,
    metavar="SECONDS",
    help="cut longer audio at pauses into pieces of at most so many seconds, and join what is said"
    " of them; so many files as --batch-size says are read, and then printed, at a time; default:"
    " audio longer than the model takes is refused",
  )
  parser.add_argument("--json", type=Path, help="also write the results here")
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default=None,
    help="default: float32 on CPU, else bfloat16",
  )
  parser.add_argument("--batch-size", type=int, default=8, help="clips at a time (default: 8)")
  parser.add_argument("--seed", type=int, default=0, help="of sampling, if the model samples")
  group = parser.add_argument_group("decoding; defaults come from the checkpoint")
  for name, (kind, text) in _GENERATION.items():
    flag = "--beams" if name == "num_beams" else "--" + name.replace("_", "-")
    if kind is bool:
      group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
    else:
      group.add_argument(flag, dest=name, type=kind, help=text)
  parser.set_defaults(run=_transcribe)


def _transcribe(args) -> int:
  from mooer_jax.run.setup import prepare_process
  from mooer_jax.transcribe import Transcriber

  prepare_process()
  if args.json:
    _check_writable(args.json)
  if absent := [path for path in args.audio if not Path(path).is_file()]:
    raise FileNotFoundError(f"no such audio file: {', '.join(absent)}")
  transcriber = Transcriber.from_checkpoint(args.checkpoint, dtype=args.dtype, base=args.base)
  rows = []
  # Of long recordings memory holds only some, and what is done is said.
  size = len(args.audio) if args.chunk_s is None else max(1, args.batch_size)
  for group in (args.audio[i : i + size] for i in range(0, len(args.audio), size)):
    results = transcriber.transcribe(
      group,
      task=args.task,
      prompt=None if args.prompt is None else args.prompt.replace("\\n", "\n"),
      question=args.question,
      template=args.template,
      chunk_s=args.chunk_s,
      batch_size=args.batch_size,
      seed=args.seed,
      progress=sys.stderr.isatty() and (len(args.audio) > 1 or args.chunk_s is not None),
      **{name: getattr(args, name) for name in _GENERATION if getattr(args, name) is not None},
    )
    for result in results:
      print(f"{result.path}\t{result.text}" if len(args.audio) > 1 else result.text, flush=True)
      for complaint in result.complaints():
        print(f"{result.path}: {complaint}", file=sys.stderr)
    rows += [result.to_json() for result in results]
    if args.json:
      text = json.dumps(rows, ensure_ascii=False, indent=2)
      args.json.write_text(text + "\n", encoding="utf-8")
  return 0


def _check_writable(path: Path):
  """What cannot be written should fail before minutes of work, and leave no empty file behind."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.is_dir():
    raise IsADirectoryError(f"{path}: a folder; name a file")
  if path.exists():
    path.open("a").close()
  else:
    with tempfile.TemporaryFile(dir=path.parent):
      pass


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


def _add_checkpoint(commands):
  parser = commands.add_parser("checkpoint", help="check the files of checkpoints")
  actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
  about = "compare all files of a checkpoint with the SHA-256 sums of when it was saved"
  verify = actions.add_parser("verify", help=about, description=about)
  verify.add_argument("path", type=Path, help="checkpoint folder, or training workdir (all steps)")
  verify.add_argument("--base-checkpoint", help="base of a fine-tune, if it has moved")
  verify.set_defaults(run=_verify)


def _verify(args) -> int:
  """Print a line for each checkpoint, or for each fault of it; exit status 1 if there are any."""
  import jax
  from rich.console import Console
  from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

  from mooer_jax import checkpoint
  from mooer_jax.config import from_json
  from mooer_jax.speech_llm import param_shapes

  jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy, and nothing needs it
  steps = [] if (args.path / "checkpoint.json").is_file() else checkpoint.all_steps(args.path)
  todo = [(step, args.base_checkpoint) for step in steps or [checkpoint.find(args.path)]]
  console = Console(stderr=True)
  columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
  damaged = []
  with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
    for folder, base in todo:  # grows by their bases
      bar = progress.add_task(folder.name, total=None)
      faults: list[str] = []
      try:
        faults = checkpoint.find_damage(
          folder, lambda done, total, bar=bar: progress.update(bar, completed=done, total=total)
        )
        about = checkpoint.describe(folder, base=base)
        if about.base and (about.base, None) not in todo:
          todo.append((about.base, None))
        if "connector" in about.config:
          checkpoint.check_leaves(about, param_shapes(from_json(about.config)))
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
