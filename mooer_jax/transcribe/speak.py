"""The command `mooer-jax speak`: audio files in; a wav and a text file each."""

import argparse
import io
import os
import secrets
import sys
from pathlib import Path

from mooer_jax.files import replace_file
from mooer_jax.storage import local_path
from mooer_jax.transcribe.command import (
  add_generation_options,
  add_numerics_options,
  given_generation,
  shown,
)

_ABOUT = "answer audio files with speech and text"
_DESCRIPTION = """Answer audio files with speech and text. For a/NAME.mp3, DIR/NAME.wav and
DIR/NAME.txt are written, the text last, so that an answer with a text is finished. After an
interruption, the same command resumes: finished files are skipped."""
_RATES_HZ = (8_000, 192_000)
_MEMORY_REMEDY = "lower --num-beams or --max-new-tokens, or use --quantization int8"


def add_parser(commands) -> None:
  """Adds `speak` to the subparsers of `mooer-jax`."""
  parser = commands.add_parser("speak", help=_ABOUT, description=_DESCRIPTION)
  parser.add_argument("audio", nargs="+", help="audio files of any common format")
  parser.add_argument("--checkpoint", required=True, help="folder or URL of a checkpoint or a run")
  parser.add_argument("--base-checkpoint", help="base of a fine-tune, if it has moved")
  parser.add_argument(
    "--task", help="task of the model: s2s_chat, s2s_trans; default: its only one for speech"
  )
  parser.add_argument(
    "--voice",
    metavar="FILE",
    help="recording of the voice to speak in, a few seconds; default: prompt.wav of the checkpoint",
  )
  parser.add_argument(
    "--out", required=True, type=local_path, metavar="DIR", help="folder for wav and text files"
  )
  parser.add_argument(
    "--sample-rate-hz",
    type=int,
    metavar="HZ",
    help="resample the speech to this rate; default: that of the vocoder (MooER: 22050)",
  )
  add_numerics_options(parser)
  parser.add_argument("--seed", type=int, help="seed of sampling (default: 0)")
  add_generation_options(parser)
  parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
  """Answers the files and returns the exit status: 1 if any could not be answered, else 0.

  Raises ValueError or OSError for a bad checkpoint, voice, option or output folder.
  """
  rate_hz = args.sample_rate_hz
  if rate_hz is not None and not _RATES_HZ[0] <= rate_hz <= _RATES_HZ[1]:
    raise ValueError(
      f"--sample-rate-hz {rate_hz}: must be from {_RATES_HZ[0]} to {_RATES_HZ[1]} Hz"
    )
  _check_names(args.audio, args.voice, args.out)
  _check_folder(args.out)
  from mooer_jax.run.process import out_of_memory_as_error

  with out_of_memory_as_error(_MEMORY_REMEDY):
    return _speak(args)


def _speak(args: argparse.Namespace) -> int:
  from rich.console import Console
  from rich.progress import track

  from mooer_jax.run.process import prepare_process
  from mooer_jax.transcribe.responder import SpeechResponder
  from mooer_jax.transcribe.settings import sampling_options

  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")  # file names need not be valid UTF-8
  todo = []
  for name in args.audio:
    if (finished := _target(name, args.out, ".txt")).exists():
      print(f"{shown(name)}: skipped, {finished} exists; delete it to repeat", file=sys.stderr)
    else:
      todo.append(name)
  if not todo:
    return 0
  prepare_process()
  responder = SpeechResponder.from_checkpoint(
    args.checkpoint,
    voice=args.voice,
    dtype=args.dtype,
    base_checkpoint=args.base_checkpoint,
    quantization=args.quantization,
  )
  options = given_generation(args)
  sampling_options(responder.model.options, options, args.seed)
  responder.session(task=args.task)  # so that a bad task or a missing voice is one error
  failed = 0
  console = Console(stderr=True)
  # On a terminal, the printed answers show the progress themselves.
  quiet = not console.is_terminal or sys.stdout.isatty() or len(todo) == 1
  for name in track(todo, description="speaking", console=console, disable=quiet):
    try:
      response = responder(name, task=args.task, seed=args.seed, **options)
    except (ValueError, OSError) as error:
      failed += 1
      print(f"not answered: {' '.join(str(error).split())}", file=sys.stderr)
      continue
    _write(response, name, args.out, args.sample_rate_hz)
    text = " ".join(response.text.split())
    print(f"{shown(name)}\t{text}" if len(args.audio) > 1 else text, flush=True)
    for warning in response.warnings():
      print(f"{shown(name)}: {warning}", file=sys.stderr)
  return 1 if failed else 0


def _write(response, name: str, folder: Path, rate_hz: int | None) -> None:
  """Writes the files of an answer, the text last; without speech, there is no wav."""
  import soundfile

  from mooer_jax.audio.decode import resample

  wav = _target(name, folder, ".wav")
  if response.no_speech is None:
    rate_hz = rate_hz or response.sample_rate_hz
    waveform_N = resample(response.waveform_N, response.sample_rate_hz, rate_hz)
    with replace_file(wav) as beside:
      soundfile.write(beside, waveform_N, rate_hz, format="WAV", subtype="PCM_16")
  else:
    wav.unlink(missing_ok=True)  # of an earlier answer without its text
  with replace_file(_target(name, folder, ".txt")) as beside:
    beside.write_text(response.text + "\n", encoding="utf-8")


def _target(name: str, folder: Path, suffix: str) -> Path:
  return folder / (Path(name).stem + suffix)


def _check_names(audio: list[str], voice: str | None, folder: Path) -> None:
  """Raises ValueError for two inputs with one name, or an output that is an input."""
  first: dict[str, str] = {}
  for name in audio:
    stem = Path(name).stem
    if stem in first:
      raise ValueError(
        f"{first[stem]} and {name} would both become {folder / stem}.wav; rename one, or use two"
        " commands with two folders"
      )
    first[stem] = name
  inputs = [name for name in (*audio, voice) if name is not None and os.path.exists(name)]
  for output in (_target(name, folder, suffix) for name in audio for suffix in (".wav", ".txt")):
    if output.exists() and any(os.path.samefile(name, output) for name in inputs):
      raise ValueError(f"{output} is one of the input files; name another folder with --out")


def _check_folder(folder: Path) -> None:
  """Raises ValueError or OSError for a folder that cannot or must not be written to."""
  from mooer_jax.checkpoint import enclosing

  if folder.exists() and not folder.is_dir():
    raise NotADirectoryError(f"--out {folder}: is a file; name a folder")
  if inside := enclosing(folder):
    raise ValueError(f"--out {folder} is in the checkpoint {inside}; name another folder")
  probe = folder / f".{secrets.token_hex(6)}"
  with replace_file(probe) as beside:  # creates the folder
    beside.touch()
  probe.unlink()
