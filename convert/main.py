"""PyTorch checkpoints in and out: the command `python -m convert`, also `mooer-jax convert`."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
_KINDS = ("mooer", "qwen2", "llama", "peft", "paraformer", "whisper", "beats", "salmonn")
_MOVED = "where the checkpoint lies that this one was trained from, if it moved"


def main(argv: Sequence[str] | None = None, prog: str = "python -m convert") -> int:
  """Runs one subcommand; what the user did wrong goes to stderr, with exit status 2."""
  args = _parser(prog).parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # Orbax warns of what it does not find and nobody needs
  try:
    return args.run(args)
  except ModuleNotFoundError as error:
    if error.name not in ("torch", "yaml", "transformers", "sentencepiece", "funasr", "peft"):
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
  importing.add_argument("kind", choices=(*_KINDS, "deepspeed"))
  importing.add_argument("src", type=Path, metavar="SRC", help="folder or file of weights")
  importing.add_argument("out", type=Path, metavar="OUT", help="checkpoint folder to make")
  importing.add_argument("--task", help="mooer, deepspeed: asr, ast or asr_ast_mtl")
  importing.add_argument("--llm", type=Path, help="LLM's folder (salmonn; mooer if elsewhere)")
  importing.add_argument(
    "--merge-lora", action="store_true", help="mooer, salmonn: add LoRA to LLM"
  )
  importing.add_argument("--no-lora", action="store_true", help="mooer: there is no LoRA")
  importing.add_argument("--base", type=Path, help="peft, deepspeed: checkpoint it was trained on")
  importing.add_argument(
    "--lora-config",
    type=Path,
    help="deepspeed, salmonn: adapter_config.json of training, or its folder",
  )
  importing.add_argument("--whisper", type=Path, help="salmonn: folder or file of Whisper")
  importing.add_argument("--beats", type=Path, help="salmonn: file of BEATs, if the model has it")
  importing.add_argument("--prompts", type=Path, help="salmonn: JSON with a prompt for each task")
  importing.add_argument("--overwrite", action="store_true")
  importing.set_defaults(run=_import)

  exporting = commands.add_parser("export", help="a checkpoint to PyTorch files")
  exporting.add_argument("kind", choices=_KINDS)
  exporting.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint or run folder")
  exporting.add_argument("out", type=Path, metavar="OUT", help="folder to make")
  exporting.add_argument("--base", type=Path, help=_MOVED)
  exporting.add_argument("--shard-size", type=_size, default="5GB", help="default: 5GB")
  exporting.add_argument("--overwrite", action="store_true")
  exporting.set_defaults(run=_export)

  verifying = commands.add_parser(
    "verify",
    help="the original and a checkpoint on the same clips",
    description="Runs the original and a checkpoint in float32 and prints the largest error of"
    " every stage and whether both generate the same tokens. Exit status: 0 if every stage is"
    " within the bound that is printed beside it and all tokens are the same, 1 if not, 2 if they"
    " could not be run.",
  )
  verifying.add_argument("kind", choices=(*_KINDS, "deepspeed"))
  verifying.add_argument("src", type=Path, metavar="SRC", help="what was imported")
  verifying.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint or run folder")
  verifying.add_argument(
    "--audio", type=Path, nargs="+", default=(), help="recordings, for all that hear"
  )
  verifying.add_argument(
    "--llm", type=Path, help="the LLM's folder (peft, salmonn; mooer if elsewhere)"
  )
  verifying.add_argument("--whisper", type=Path, help="salmonn: folder or file of Whisper")
  verifying.add_argument("--beats", type=Path, help="salmonn: file of BEATs, if the model has it")
  verifying.add_argument(
    "--lora-config", type=Path, help="salmonn: as it was imported with, if it was"
  )
  verifying.add_argument("--base", type=Path, help=_MOVED)
  verifying.add_argument("--max-new-tokens", type=int, default=40)
  verifying.set_defaults(run=_verify)

  joining = commands.add_parser("join", help="encoders and an LLM in one checkpoint, to train on")
  joining.add_argument("out", type=Path, metavar="OUT", help="checkpoint folder to make")
  joining.add_argument("parts", type=Path, nargs="+", metavar="PART", help="imported parts")
  joining.add_argument("--overwrite", action="store_true")
  joining.set_defaults(run=_join)

  inspecting = commands.add_parser("inspect", help="what is in a file or folder")
  inspecting.add_argument("path", type=Path, metavar="PATH")
  inspecting.add_argument("--short", action="store_true", help="totals only")
  inspecting.set_defaults(run=_inspect)
  return parser


def _size(text: str) -> int:
  number, unit = text[:-2], text[-2:].lower()
  try:
    return round(float(number) * _UNITS[unit])
  except (ValueError, KeyError):
    raise argparse.ArgumentTypeError(f"{text!r}: write 500MB or 5GB") from None


def _import(args) -> int:
  from .importing import Options, import_checkpoint

  options = Options(
    task=args.task,
    llm=args.llm,
    lora=not args.no_lora,
    merge_lora=args.merge_lora,
    base=args.base,
    lora_config=args.lora_config,
    whisper=args.whisper,
    beats=args.beats,
    prompts=args.prompts,
    overwrite=args.overwrite,
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
    base=args.base,
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
  from .verify.run import verify
  from .verify.verdict import print_verdict

  verdict = verify(
    args.kind,
    args.src,
    args.checkpoint,
    audio=args.audio,
    llm=args.llm,
    whisper=args.whisper,
    beats=args.beats,
    lora_config=args.lora_config,
    base=args.base,
    max_new_tokens=args.max_new_tokens,
  )
  print_verdict(verdict)
  return 1 if verdict.failed else 0


def _inspect(args) -> int:
  from .inspection import inspect

  inspect(args.path, names=not args.short)
  return 0
