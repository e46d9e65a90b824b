"""PyTorch checkpoints in and out: the command `python -m convert`, also `mooer-jax convert`."""

import argparse
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from mooer_jax.files import ArgumentParser, discard_stdout, exit_on_sigterm
from mooer_jax.storage import local_path

from .core.options import DESCRIPTIONS, Options, flag
from .kinds import KINDS, USES

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
# Packages of the extras `convert` and `verify`.
_EXTRAS = {"funasr", "gguf", "peft", "safetensors", "torch", "transformers", "yaml"}
_SRC = {"type": local_path, "metavar": "SRC"}
_CKPT = {"type": local_path, "metavar": "CKPT", "help": "checkpoint or run folder"}
_OUT = {"type": local_path, "metavar": "OUT"}
_BASE = {"type": local_path, "metavar": "CKPT", "help": "base of a fine-tune, if it has moved"}
_VERIFIED = ("llm", "whisper", "beats", "lora_config")


def main(argv: Sequence[str] | None = None, prog: str = "python -m convert") -> int:
  """Runs one subcommand. User errors go to stderr, with exit status 2."""
  argv = sys.argv[1:] if argv is None else argv
  args = _parser(prog).parse_args(argv)
  if any(word.partition("=")[0] == "--base" for word in argv):  # argparse takes it as the full name
    print("--base is deprecated; use --base-checkpoint", file=sys.stderr)
  logging.set_verbosity(logging.ERROR)  # Orbax warns about files that are not needed
  try:
    with exit_on_sigterm():
      return args.run(args) or 0
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in _EXTRAS:
      raise
    extras = "convert,verify" if args.command == "verify" else "convert"
    install = f"pip install 'mooer-jax[{extras}]'"
    print(f"{prog}: {error}; install it with: {install}", file=sys.stderr)
    return 2
  except BrokenPipeError:
    return discard_stdout()
  except (ValueError, OSError) as error:
    print(f"{prog} {args.command}: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"{prog} {args.command}: interrupted; nothing was written", file=sys.stderr)
    return 130


def _parser(prog: str) -> argparse.ArgumentParser:
  parser = ArgumentParser(
    prog=prog, description="Converts PyTorch checkpoints to checkpoints of mooer_jax and back."
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  importing = _add_command(commands, "import", "PyTorch files to a checkpoint")
  _add_kind(importing, {kind: (src, options) for kind, (src, options, _) in USES.items()})
  importing.add_argument("src", **_SRC, help="folder or file of weights")
  importing.add_argument("out", **_OUT, help="checkpoint folder to make")
  _add_options(importing, DESCRIPTIONS)
  importing.set_defaults(run=_import)

  exporting = _add_command(commands, "export", "a checkpoint to PyTorch files")
  _add_kind(exporting)
  exporting.add_argument("checkpoint", **_CKPT)
  exporting.add_argument("out", **_OUT, help="folder to make")
  exporting.add_argument("--base-checkpoint", **_BASE)
  exporting.add_argument(
    "--shard-size", type=_size, help="maximum size of a file of a sharded kind (default: 5GB)"
  )
  exporting.add_argument("--overwrite", action="store_true", help="replace an earlier result")
  exporting.set_defaults(run=_export)

  verifying = _add_command(
    commands,
    "verify",
    "compare the original and a checkpoint on the same clips",
    description="Runs the original and a checkpoint in float32. Prints the largest error of every"
    " stage relative to the difference that rounding explains, and whether both generate the same"
    " tokens. Exit status: 0 if every stage is within its bound and all tokens are equal, 1 if not,"
    " 2 if they could not be run.",
  )
  _add_kind(verifying, {k: (src, how) for k, (src, _, how) in USES.items() if how is not None})
  verifying.add_argument("src", **_SRC, help="the imported source")
  verifying.add_argument("checkpoint", **_CKPT)
  verifying.add_argument("--audio", type=local_path, nargs="+", default=(), help="audio files")
  _add_options(verifying, _VERIFIED)
  verifying.add_argument("--base-checkpoint", **_BASE)
  verifying.add_argument(
    "--max-new-tokens", type=_positive, default=40, help="maximum number of tokens (default: 40)"
  )
  verifying.set_defaults(run=_verify)

  joining = _add_command(commands, "join", "encoders and an LLM to one checkpoint, to train on")
  joining.add_argument("out", **_OUT, help="checkpoint folder to make")
  joining.add_argument("parts", type=local_path, nargs="+", metavar="PART", help="imported parts")
  joining.add_argument("--overwrite", action="store_true", help="replace a checkpoint")
  joining.set_defaults(run=_join)

  quantizing = _add_command(
    commands,
    "quantize",
    "round the LLM's matrices to int8, for decoding",
    description="Writes a checkpoint that transcribe, ask and eval read: the matrices of the LLM as"
    " int8 with a scale for each output, half the size of bfloat16; a LoRA is merged first. It can"
    " neither be trained nor exported, so keep the original.",
  )
  quantizing.add_argument("checkpoint", **_CKPT)
  quantizing.add_argument("out", **_OUT, help="checkpoint folder to make")
  quantizing.add_argument(
    "--lora-scale", type=float, help="scale of the merged LoRA (default: that of training)"
  )
  quantizing.add_argument("--base-checkpoint", **_BASE)
  quantizing.add_argument("--overwrite", action="store_true", help="replace a checkpoint")
  quantizing.set_defaults(run=_quantize)

  inspecting = _add_command(commands, "inspect", "list the content of a file or folder")
  inspecting.add_argument(
    "path", type=local_path, metavar="PATH", help="weights, checkpoint or run folder"
  )
  inspecting.add_argument("--short", action="store_true", help="totals only")
  inspecting.add_argument("--base-checkpoint", **_BASE)
  inspecting.set_defaults(run=_inspect)
  return parser


def _add_command(commands, name: str, text: str, *, description: str = ""):
  return commands.add_parser(
    name,
    help=text,
    description=textwrap.fill(description, 80),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def _add_kind(parser, uses: Mapping[str, tuple[str, str]] | None = None) -> None:
  """Adds the argument KIND; the help has a line with SRC and options of each kind in `uses`."""
  parser.add_argument("kind", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
  if uses:
    lines = [f"  {kind:11} {': '.join(filter(None, use))}" for kind, use in uses.items()]
    parser.epilog = "\n".join(["SRC and options of each kind:", *lines])


def _add_options(parser, names: Iterable[str]) -> None:
  for name in names:
    default = getattr(Options, name)
    how: dict[str, Any]
    if isinstance(default, bool):
      how = {"action": "store_false" if default else "store_true"}
    else:
      how = {"type": str} if name == "task" else {"type": local_path, "metavar": "PATH"}
    parser.add_argument(flag(name), dest=name, help=DESCRIPTIONS[name], **how)


def _positive(text: str) -> int:
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"{text!r}: write a whole number above 0")
  return int(text)


def _size(text: str) -> int:
  number, unit = text[:-2], text[-2:].lower()
  try:
    if (size := round(float(number) * _UNITS[unit])) > 0:
      return size
  except (ValueError, KeyError, OverflowError):
    pass
  raise argparse.ArgumentTypeError(f"{text!r}: write a size above 0, such as 500MB or 5GB")


def _import(args) -> None:
  from .importing import import_checkpoint

  options = Options(**{name: getattr(args, name) for name in DESCRIPTIONS})
  report = import_checkpoint(args.kind, args.src, args.out, options=options)
  _print_leaves(args.out, report.leaves)
  if report.ignored:
    print(f"ignored, {len(report.ignored)} in all:", *report.ignored, sep="\n  ")
  for note in report.notes:
    print(note)


def _export(args) -> None:
  from .exporting import export_checkpoint

  print(export_checkpoint(
    args.kind,
    args.checkpoint,
    args.out,
    base=args.base_checkpoint,
    shard_bytes=args.shard_size,
    overwrite=args.overwrite,
  ))  # fmt: skip


def _join(args) -> None:
  from .joining import join

  _print_leaves(args.out, join(args.out, args.parts, overwrite=args.overwrite))


def _quantize(args) -> None:
  from .quantizing import quantize

  leaves = quantize(
    args.checkpoint,
    args.out,
    base=args.base_checkpoint,
    lora_scale=args.lora_scale,
    overwrite=args.overwrite,
  )
  _print_leaves(args.out, leaves)


def _print_leaves(out: Path, leaves: Mapping) -> None:
  count = sum(math.prod(leaf.shape) for leaf in leaves.values())
  dtypes = ", ".join(sorted({leaf.dtype.name for leaf in leaves.values()}))
  print(f"{out}: {len(leaves)} leaves, {count / 1e6:.2f} M parameters, {dtypes}")


def _verify(args) -> int:
  from .verify.report import print_report
  from .verify.run import verify

  report = verify(
    args.kind,
    args.src,
    args.checkpoint,
    audio=args.audio,
    options=Options(**{name: getattr(args, name) for name in _VERIFIED}),
    base=args.base_checkpoint,
    max_new_tokens=args.max_new_tokens,
  )
  print_report(report)
  return 1 if report.failed else 0


def _inspect(args) -> None:
  from .inspection import inspect

  inspect(args.path, names=not args.short, base=args.base_checkpoint)
