"""PyTorch checkpoints in and out: the command `python -m convert`, also `mooer-jax convert`."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from .core.options import DESCRIPTIONS, Options, flag
from .kinds import KINDS

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
# Packages of the extras `convert` and `verify`.
_EXTRAS = {"funasr", "gguf", "peft", "safetensors", "torch", "transformers", "yaml"}
_MOVED = "base checkpoint of a fine-tune, if it has moved"


def main(argv: Sequence[str] | None = None, prog: str = "python -m convert") -> int:
  """Runs one subcommand. User errors go to stderr, with exit status 2."""
  args = _parser(prog).parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # Orbax warns about files that are not needed
  try:
    return args.run(args)
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in _EXTRAS:
      raise
    install = "pip install 'mooer-jax[convert,verify]'"
    print(f"{prog}: {error}; install it with: {install}", file=sys.stderr)
    return 2
  except (ValueError, OSError) as error:
    print(f"{prog} {args.command}: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"{prog} {args.command}: interrupted; nothing was written", file=sys.stderr)
    return 130


def _parser(prog: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog=prog, description=__doc__)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  importing = commands.add_parser("import", help="PyTorch files to a checkpoint")
  importing.add_argument("kind", choices=KINDS)
  importing.add_argument("src", type=Path, metavar="SRC", help="folder or file of weights")
  importing.add_argument("out", type=Path, metavar="OUT", help="checkpoint folder to make")
  importing.add_argument("--task", help="mooer, deepspeed: asr, ast or asr_ast_mtl")
  importing.add_argument("--merge-lora", action="store_true", help="add the LoRA to the LLM")
  importing.add_argument("--no-lora", action="store_true", help="mooer: there is no LoRA")
  _add_files(
    importing,
    llm="salmonn; mooer, if it is not in SRC",
    whisper="salmonn",
    beats="salmonn",
    lora_config="deepspeed, salmonn",
    prompts="salmonn",
  )
  _add_base(importing, "peft, deepspeed: checkpoint that it was trained on")
  importing.add_argument("--overwrite", action="store_true", help="replace a checkpoint")
  importing.set_defaults(run=_import)

  exporting = commands.add_parser("export", help="a checkpoint to PyTorch files")
  exporting.add_argument("kind", choices=KINDS)
  exporting.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint or run folder")
  exporting.add_argument("out", type=Path, metavar="OUT", help="folder to make")
  _add_base(exporting, _MOVED)
  exporting.add_argument(
    "--shard-size", type=_size, default="5GB", help="maximum size of a file (default: 5GB)"
  )
  exporting.add_argument("--overwrite", action="store_true", help="replace an earlier result")
  exporting.set_defaults(run=_export)

  verifying = commands.add_parser(
    "verify",
    help="compare the original and a checkpoint on the same clips",
    description="Runs the original and a checkpoint in float32. Prints the largest error of every"
    " stage relative to the difference that rounding explains, and whether both generate the same"
    " tokens. Exit status: 0 if every stage is within its"
    " bound and all tokens are equal, 1 if not, 2 if they could not be run.",
  )
  verifying.add_argument("kind", choices=KINDS)
  verifying.add_argument("src", type=Path, metavar="SRC", help="the imported source")
  verifying.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint or run folder")
  verifying.add_argument(
    "--audio", type=Path, nargs="+", default=(), help="audio files, for kinds with an encoder"
  )
  _add_files(
    verifying,
    llm="peft, salmonn; mooer, if it is not in SRC",
    whisper="salmonn",
    beats="salmonn",
    lora_config="salmonn, if it was imported with it",
  )
  _add_base(verifying, _MOVED)
  verifying.add_argument(
    "--max-new-tokens", type=int, default=40, help="maximum number of tokens (default: 40)"
  )
  verifying.set_defaults(run=_verify)

  joining = commands.add_parser("join", help="encoders and an LLM to one checkpoint, to train on")
  joining.add_argument("out", type=Path, metavar="OUT", help="checkpoint folder to make")
  joining.add_argument("parts", type=Path, nargs="+", metavar="PART", help="imported parts")
  joining.add_argument("--overwrite", action="store_true", help="replace a checkpoint")
  joining.set_defaults(run=_join)

  inspecting = commands.add_parser("inspect", help="list the content of a file or folder")
  inspecting.add_argument(
    "path", type=Path, metavar="PATH", help="weights, checkpoint or run folder"
  )
  inspecting.add_argument("--short", action="store_true", help="totals only")
  _add_base(inspecting, _MOVED)
  inspecting.set_defaults(run=_inspect)
  return parser


def _add_files(parser, **kinds: str) -> None:
  for name, users in kinds.items():
    parser.add_argument(flag(name), type=Path, help=f"{DESCRIPTIONS[name]} ({users})")


class _Base(argparse.Action):
  """--base-checkpoint; its old name --base is deprecated."""

  def __call__(self, parser, namespace, values, option_string=None):
    if option_string == "--base":
      print("--base is deprecated; use --base-checkpoint", file=sys.stderr)
    namespace.base_checkpoint = values


def _add_base(parser, text: str) -> None:
  options: dict = {"dest": "base_checkpoint", "action": _Base, "type": Path, "metavar": "CKPT"}
  parser.add_argument("--base-checkpoint", help=text, **options)
  parser.add_argument("--base", help=argparse.SUPPRESS, **options)


def _size(text: str) -> int:
  number, unit = text[:-2], text[-2:].lower()
  try:
    if (size := round(float(number) * _UNITS[unit])) > 0:
      return size
  except (ValueError, KeyError, OverflowError):
    pass
  raise argparse.ArgumentTypeError(f"{text!r}: write a size above 0, such as 500MB or 5GB")


def _import(args) -> int:
  from .importing import import_checkpoint

  options = Options(
    task=args.task,
    lora=not args.no_lora,
    merge_lora=args.merge_lora,
    base_checkpoint=args.base_checkpoint,
    prompts=args.prompts,
    overwrite=args.overwrite,
    **_files(args),
  )
  report = import_checkpoint(args.kind, args.src, args.out, options)
  count = sum(math.prod(leaf.shape) for leaf in report.leaves.values())
  dtypes = sorted({leaf.dtype.name for leaf in report.leaves.values()})
  print(
    f"{report.folder}: {len(report.leaves)} leaves, {count / 1e6:.2f} M parameters,"
    f" {', '.join(dtypes)}"
  )
  if report.ignored:
    print(f"ignored, {len(report.ignored)} in all:", *report.ignored, sep="\n  ")
  for note in report.notes:
    print(note)
  return 0


def _export(args) -> int:
  from .exporting import export_checkpoint

  print(export_checkpoint(
    args.kind,
    args.checkpoint,
    args.out,
    base=args.base_checkpoint,
    shard_bytes=args.shard_size,
    overwrite=args.overwrite,
  ))  # fmt: skip
  return 0


def _join(args) -> int:
  from .joining import join

  leaves = join(args.out, args.parts, overwrite=args.overwrite)
  count = sum(math.prod(leaf.shape) for leaf in leaves.values())
  print(f"{args.out}: {len(leaves)} leaves, {count / 1e6:.2f} M parameters")
  return 0


def _verify(args) -> int:
  from .verify.report import print_report
  from .verify.run import verify

  report = verify(
    args.kind,
    args.src,
    args.checkpoint,
    audio=args.audio,
    options=Options(**_files(args)),
    base=args.base_checkpoint,
    max_new_tokens=args.max_new_tokens,
  )
  print_report(report)
  return 1 if report.failed else 0


def _files(args) -> dict[str, Any]:
  return {name: getattr(args, name) for name in ("llm", "whisper", "beats", "lora_config")}


def _inspect(args) -> int:
  from .inspection import inspect

  inspect(args.path, names=not args.short, base=args.base_checkpoint)
  return 0
