"""The command `mooer-jax transcribe`: audio files in, a line of text each, optionally JSON."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mooer_jax.files import replace_file, write_errors_name
from mooer_jax.prompts import QUESTION, SPEECH, TEMPLATES
from mooer_jax.storage import local_path

STDIN = "-"
_WARMUP = """Compile what `mooer-jax transcribe` needs, so that its first calls do not wait. Give
the options that transcribe will get. The programs are kept in ~/.cache/mooer_jax/xla, or in
$JAX_COMPILATION_CACHE_DIR."""
_MEMORY_REMEDY = (
  "lower --batch-size, --num-beams or --max-new-tokens, use --quantization int8, or more devices"
  " (--mesh)"
)
_DEPRECATED: dict[str, dict[str, Any]] = {
  "--base": {"dest": "base_checkpoint"},
  "--beams": {"dest": "num_beams", "type": int},
  "--chunk-s": {"dest": "chunk_length_s", "type": float},
  "--template": {"dest": "chat_template", "choices": sorted(TEMPLATES)},
}
_GENERATION = {
  "num_beams": (int, "number of beams (1: greedy decoding)"),
  "length_penalty": (float, "exponent of the length in beam scores; above 0 favours long text"),
  "max_new_tokens": (int, "maximum number of generated tokens"),
  "min_new_tokens": (int, "minimum number of generated tokens"),
  "repetition_penalty": (float, "penalty on repeated tokens; 1 is none"),
  "no_repeat_ngram_size": (int, "forbid repeating any n-gram of this size; 0 allows all"),
  "do_sample": (bool, "sample instead of greedy decoding"),
  "temperature": (float, "sampling temperature"),
  "top_k": (int, "sample from the k most probable tokens; 0 is all"),
  "top_p": (float, "nucleus (top-p) sampling threshold"),
}


def add_parser(commands) -> None:
  """Adds `transcribe` (alias `ask`) to the subparsers of `mooer-jax`."""
  # usage: argparse would show the other name for an alias
  usage = "mooer-jax {transcribe,ask} --checkpoint CKPT [options] audio [audio ...]"
  about = "transcribe audio files"
  parser = commands.add_parser("transcribe", aliases=["ask"], help=about, usage=usage)
  parser.add_argument("audio", nargs="+", help="audio files of any common format; - reads stdin")
  _add_options(parser)
  parser.add_argument(
    "--chunk-length-s",
    type=float,
    metavar="SECONDS",
    help="split longer audio at pauses into chunks of at most SECONDS and join the transcripts;"
    " default: audio longer than the model's limit is an error",
  )
  parser.add_argument(
    "--json", type=local_path, metavar="FILE", help="also write the results to FILE"
  )
  parser.add_argument("--seed", type=int, help="seed of sampling (default: 0)")
  parser.add_argument(
    "--trace", metavar="DIR", help="write a profile of the transcription, for XProf or Perfetto"
  )
  for old, how in _DEPRECATED.items():
    parser.add_argument(old, action=_StoreDeprecated, help=argparse.SUPPRESS, **how)
  parser.set_defaults(run=run)
  about = "compile the programs of transcribe into the compilation cache"
  parser = commands.add_parser("warmup", help=about, description=_WARMUP)
  _add_options(parser)
  parser.add_argument(
    "--max-audio-s",
    "--chunk-length-s",
    type=float,
    metavar="SECONDS",
    help="longest audio, or --chunk-length-s of transcribe; default: the model's limit",
  )
  parser.set_defaults(run=warmup)


def _add_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options on which the compiled programs depend."""
  parser.add_argument("--checkpoint", required=True, help="folder or URL of a checkpoint or a run")
  parser.add_argument("--base-checkpoint", help="base of a fine-tune, if it has moved")
  parser.add_argument("--task", help="task of the model; default: its only one, else asr")
  parser.add_argument(
    "--prompt",
    help=f"prompt instead of the task's; {SPEECH} marks the place of the speech, \\n a line break",
  )
  parser.add_argument(
    "--chat-template",
    choices=sorted(TEMPLATES),
    help="chat template around the prompt (none: the prompt alone); default: the checkpoint's",
  )
  parser.add_argument("--question", help=f"text that replaces {QUESTION} in the prompt")
  add_numerics_options(parser)
  parser.add_argument(
    "--features",
    choices=("host", "device"),
    default="host",
    help="where features are computed: host (NumPy) or device (the compiled program);"
    " default: host",
  )
  parser.add_argument(
    "--mesh",
    metavar="SIZES",
    help="decode on all devices, arranged as in data=2,fsdp=1,tensor=4: data and fsdp split the"
    " batch, fsdp and tensor the model; one size may be -1, for the remaining devices (data: the"
    " default). Default: one device",
  )
  parser.add_argument("--batch-size", type=int, default=8, help="clips per batch (default: 8)")
  add_generation_options(parser)


def add_numerics_options(parser: argparse.ArgumentParser) -> None:
  """Adds `--dtype` and `--quantization`."""
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    help="dtype of the computation; default: float32 on CPU, bfloat16 on accelerators",
  )
  parser.add_argument(
    "--quantization",
    choices=("none", "int8"),
    default="none",
    help="int8: matrices of the LLM in 8 bits, half the memory of bfloat16 (default: none)",
  )


def add_generation_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `_GENERATION`; see `given_generation`."""
  group = parser.add_argument_group("generation options; defaults come from the checkpoint")
  for name, (kind, text) in _GENERATION.items():
    flag = "--" + name.replace("_", "-")
    if kind is bool:
      group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
      group.add_argument(flag, type=kind, help=text)


class _StoreDeprecated(argparse.Action):
  """Stores the value as the new flag does, with a message."""

  def __call__(self, parser, namespace, values, option_string=None):
    new = f"--{self.dest.replace('_', '-')}"
    print(f"{self.option_strings[0]} is deprecated; use {new}", file=sys.stderr)
    setattr(namespace, self.dest, values)


def run(args: argparse.Namespace) -> int:
  """Transcribes and returns the exit status: 1 if any clip could not be transcribed, else 0.

  Raises ValueError or OSError for a bad checkpoint, option or output file.
  """
  if STDIN in args.audio and sys.stdin is None:
    raise ValueError("- (stdin) is closed; pipe audio into the command or name a file")
  if args.audio.count(STDIN) > 1:
    raise ValueError("- (stdin) is given twice; it can be read once")
  if args.json:
    _check_json_target(args.json, args.audio)
  if len(args.audio) == 1 and args.audio[0] != STDIN and not os.path.exists(args.audio[0]):
    raise FileNotFoundError(f"no such audio file: {args.audio[0]}")  # before the model loads
  from mooer_jax.run.process import check_profile, out_of_memory_as_error

  check_profile(args.trace)
  with out_of_memory_as_error(_MEMORY_REMEDY):
    return _transcribe(args)


def _transcribe(args: argparse.Namespace) -> int:
  from mooer_jax.run.process import profile
  from mooer_jax.transcribe.transcriber import progress_bar

  transcriber = _load(args)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")  # file names need not be valid UTF-8
  audio = [_read_stdin() if name == STDIN else name for name in args.audio]
  several = len(args.audio) > 1
  # On a terminal, the results of several files show the progress themselves.
  shows = sys.stderr.isatty() and (
    not sys.stdout.isatty() if several else args.chunk_length_s is not None
  )
  failed = []
  with (
    progress_bar(shows) as on_chunk,
    contextlib.closing(
      transcriber.stream(audio, on_chunk=on_chunk, **_given(args, "chunk_length_s", "seed"))
    ) as results,
    _json_writer(args.json) as write,
    profile(args.trace),
  ):
    for name, result in zip(args.audio, results, strict=True):
      write({**result.to_json(), "path": name})
      if result.error:
        failed.append(f"- (stdin): {result.error}" if name == STDIN else result.error)
        continue
      print(f"{shown(name)}\t{result.text}" if several else result.text, flush=True)
      for warning in result.warnings():
        print(f"{shown(name)}: {warning}", file=sys.stderr)
  for error in failed:
    print(f"not transcribed: {' '.join(error.split())}", file=sys.stderr)
  return 1 if failed else 0


def _read_stdin() -> bytes:
  with write_errors_name("- (stdin)"):
    return sys.stdin.buffer.read()


def warmup(args: argparse.Namespace) -> int:
  """Compiles the programs of `run`; raises ValueError or OSError for a bad checkpoint or option."""
  from mooer_jax.run.process import out_of_memory_as_error

  with out_of_memory_as_error(_MEMORY_REMEDY):
    transcriber = _load(args)
    number = transcriber.warmup(progress=sys.stderr.isatty(), **_given(args, "max_audio_s"))
  print(f"batch shapes compiled: {number}")
  return 0


def _load(args: argparse.Namespace):
  from mooer_jax.run.process import prepare_process
  from mooer_jax.sharding import MeshConfig, make_mesh
  from mooer_jax.transcribe.transcriber import Transcriber

  prepare_process()
  mesh = None
  if args.mesh is not None:
    mesh = make_mesh(**dataclasses.asdict(MeshConfig.parse(args.mesh)))
  return Transcriber.from_checkpoint(
    args.checkpoint,
    dtype=args.dtype,
    base_checkpoint=args.base_checkpoint,
    quantization=args.quantization,
    features=args.features,
    mesh=mesh,
  )


def given_generation(args: argparse.Namespace) -> dict[str, Any]:
  """The generation options that were given."""
  return {name: value for name in _GENERATION if (value := getattr(args, name)) is not None}


def _given(args: argparse.Namespace, *more: str) -> dict[str, Any]:
  """The options that were given, as keyword arguments of a Transcriber's method."""
  names = ("task", "prompt", "question", "chat_template", "batch_size", *more)
  options = {name: value for name in names if (value := getattr(args, name)) is not None}
  options |= given_generation(args)
  if args.prompt is not None:
    options["prompt"] = args.prompt.replace("\\n", "\n")
  return options


def shown(name: str) -> str:
  """A file name on one line and in one column."""
  return name.translate({9: "\\t", 10: "\\n", 13: "\\r"})


def _check_json_target(path: Path, audio: list[str]) -> None:
  """Raises OSError or ValueError for a file that cannot or must not be written."""
  from mooer_jax.checkpoint import enclosing

  if str(path) == STDIN:
    raise ValueError("--json -: name a file, such as /dev/stdout")
  if path.is_dir():
    raise IsADirectoryError(f"--json {path}: a folder; name a file")
  if inside := enclosing(path):
    raise ValueError(f"--json {path} is in the checkpoint {inside}; name another folder")
  if path.exists():
    if any(os.path.exists(name) and os.path.samefile(name, path) for name in audio):
      raise ValueError(f"--json {path} is one of the audio files; name another file")
    if not stat.S_ISREG(path.stat().st_mode):
      return  # such as /dev/stdout
    if not _is_replaceable(path):
      raise ValueError(
        f"--json {path} exists and holds no results of transcribe; name another file"
      )
    path.open("a").close()
  else:
    with replace_file(path) as beside:  # the folder must exist or be creatable, and be writable
      beside.touch()
    path.unlink()


def _is_replaceable(path: Path) -> bool:
  """Whether a file is empty or holds earlier results."""
  text = path.read_bytes()
  try:
    rows = json.loads(text) if text.strip() else []
  except (ValueError, RecursionError):
    return False
  names = {"text", "tokens", "path"}
  return isinstance(rows, list) and all(isinstance(r, dict) and names <= r.keys() for r in rows)


@contextlib.contextmanager
def _json_writer(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Yields a function that appends a row; the file is written when the block ends.

  After an error or an interruption, it has the rows up to there; without rows it is unchanged.
  """
  rows: list[dict[str, Any]] = []
  complete = False
  try:
    yield rows.append
    complete = True
  finally:
    if path is not None and (rows or complete):
      replaceable = not path.exists() or path.is_file()  # not /dev/stdout
      with (
        write_errors_name(path),
        replace_file(path) if replaceable else contextlib.nullcontext(path) as target,
        # A lone surrogate of a file name becomes an escape, which JSON has as well.
        open(target, "w", encoding="utf-8", errors="backslashreplace") as file,
      ):
        file.write(json.dumps(rows, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
      if not complete:
        print(f"{path} holds the {len(rows)} results up to here", file=sys.stderr)
