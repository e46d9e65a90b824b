"""The command `mooer-jax units`: audio tokens for models that speak."""

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from mooer_jax.files import replace_file
from mooer_jax.storage import local_path


def add_parser(commands, source_help: str) -> None:
  """Adds the subcommand; `source_help` describes a data set."""
  parser = commands.add_parser("units", help="audio tokens for models that speak")
  actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
  about = "fit a k-means codebook to the encoder frames of a data set"
  command = actions.add_parser("fit", help=about, description=about)
  command.add_argument("source", help=source_help)
  _add_encoder(command)
  command.add_argument("--out", required=True, type=local_path, help="folder for the codebook")
  command.add_argument(
    "--count", type=_positive, default=1000, help="number of tokens (default: 1000)"
  )
  command.add_argument(
    "--vectors", type=_positive, default=100_000, metavar="N",
    help="vectors in the random sample that k-means sees; memory: 18 bytes for each value"
    " (default: 100000)",
  )  # fmt: skip
  command.add_argument("--seed", type=int, default=0, help="seed of the sample and of k-means")
  command.add_argument(
    "--encoder", metavar="KIND", help="encoder of a checkpoint that has several, such as whisper"
  )
  command.add_argument(
    "--samples-per-token", type=_positive, metavar="N",
    help="samples of the vocoder for each token; default: those of the checkpoint's vocoder",
  )  # fmt: skip
  command.add_argument(
    "--sample-rate-hz", type=_positive, metavar="HZ",
    help="sample rate of the vocoder; default: that of the checkpoint's vocoder",
  )  # fmt: skip
  command.set_defaults(run=functools.partial(_with_memory_remedy, _fit))
  about = "write a label file, `KEY<TAB>TEXT<|audio_start|><A_12><A_7>…`, for a data set of speech"
  command = actions.add_parser("encode", help=about, description=about)
  command.add_argument("source", help=source_help)
  _add_encoder(command)
  command.add_argument(
    "--units", required=True, type=local_path, help="folder of a codebook, from units fit"
  )
  command.add_argument("--out", required=True, type=local_path, help="label file to write")
  texts = command.add_mutually_exclusive_group()
  texts.add_argument(
    "--text-labels", metavar="FILE", help="`KEY text` lines in place of the transcripts"
  )
  texts.add_argument("--no-text", action="store_true", help="write audio tokens alone")
  command.set_defaults(run=functools.partial(_with_memory_remedy, _encode))
  about = "add the audio tokens to the tokenizer and the LLM of a checkpoint"
  command = actions.add_parser("add-tokens", help=about, description=about)
  command.add_argument("--checkpoint", required=True, help="folder or URL of a checkpoint or a run")
  command.add_argument("--base-checkpoint", help="base of a fine-tune, if it has moved")
  command.add_argument("--count", required=True, type=_positive, help="number of audio tokens")
  command.add_argument("--out", required=True, type=local_path, help="folder for the checkpoint")
  command.add_argument("--seed", type=int, default=0, help="seed of the new rows")
  command.set_defaults(run=_add_tokens)


def _add_encoder(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--checkpoint", required=True, help="folder or URL of a checkpoint or a run")
  parser.add_argument("--base-checkpoint", help="base of a fine-tune, if it has moved")
  parser.add_argument(
    "--batch-size", type=_positive, default=8, help="clips per batch (default: 8)"
  )


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
  return value


def _with_memory_remedy(run: Callable, args: argparse.Namespace) -> int:
  from mooer_jax.run.process import out_of_memory_as_error, prepare_process

  prepare_process()
  with out_of_memory_as_error("lower --batch-size"):
    return run(args)


def _fit(args: argparse.Namespace) -> int:
  from mooer_jax.units.codebook import Codebook, UnitsInfo, fit, sample
  from mooer_jax.units.token_vectors import UnitEncoder, token_vectors

  if args.out.exists():
    raise FileExistsError(f"--out {args.out} exists; name another folder")
  if args.vectors < args.count:
    raise ValueError(f"--vectors {args.vectors} is less than --count {args.count}; raise it")
  encoder = UnitEncoder.load(args.checkpoint, kind=args.encoder, base=args.base_checkpoint)
  rate = _rate(args, encoder)
  skipped: Counter[str] = Counter()
  utterances = token_vectors(
    args.source, encoder, rate, batch_size=args.batch_size, skipped=skipped
  )
  with contextlib.closing(utterances), _progress("encoding") as shown:
    vectors_ND, seen = sample((x_ND for _, x_ND in shown(utterances)), args.vectors, seed=args.seed)
  _report_skipped(skipped)
  if not seen:
    raise ValueError(f"{args.source}: no usable utterance")
  print(f"k-means: {args.count} centroids of {len(vectors_ND)} vectors", flush=True)
  info = UnitsInfo(
    encoder=encoder.kind,
    encoder_hash=encoder.hash,
    checkpoint_hash=encoder.checkpoint.hash,
    samples_per_token=rate.samples_per_token,
    sample_rate_hz=rate.sample_rate_hz,
    count=args.count,
    seed=args.seed,
  )
  codebook = Codebook(fit(vectors_ND, args.count, seed=args.seed), info)
  codebook.save(args.out)
  print(
    f"{args.out}: {args.count} tokens, {rate.sample_rate_hz / rate.samples_per_token:.2f} a second,"
    f" explain {codebook.explained(vectors_ND):.1%} of the variance of the sample"
    f" ({len(vectors_ND)} of {seen} vectors)"
  )
  return 0


def _rate(args: argparse.Namespace, encoder):
  """The rate of the checkpoint's vocoder, or that of the options."""
  from mooer_jax.units.token_vectors import Rate

  given = args.samples_per_token, args.sample_rate_hz
  speech = encoder.model.speech_output
  if speech is not None:
    if given != (None, None):
      raise ValueError(
        f"{encoder.checkpoint.folder} has a vocoder, which determines the rate"
        f" ({speech.vocoder.samples_per_frame} samples a token at {speech.vocoder.sample_rate_hz}"
        " Hz); leave out --samples-per-token and --sample-rate-hz"
      )
    return Rate(speech.vocoder.samples_per_frame, speech.vocoder.sample_rate_hz)
  if None in given:
    raise ValueError(
      f"{encoder.checkpoint.folder} has no vocoder; give --samples-per-token and --sample-rate-hz"
      " of the one that will be trained (MooER-omni: 1024 and 22050)"
    )
  return Rate(*given)


def _encode(args: argparse.Namespace) -> int:
  from mooer_jax.data.labels import LabelFile, Labels
  from mooer_jax.units.codebook import Codebook
  from mooer_jax.units.token_vectors import Rate, UnitEncoder, token_vectors
  from mooer_jax.vocoders import SpeechOutputConfig

  if args.out.is_dir():
    raise IsADirectoryError(f"--out {args.out}: a folder; name a file")
  codebook = Codebook.load(args.units)
  labels = Labels(LabelFile(args.text_labels)) if args.text_labels else None
  info = codebook.info
  encoder = UnitEncoder.load(args.checkpoint, kind=info.encoder, base=args.base_checkpoint)
  codebook.check_encoder(encoder.hash, encoder.checkpoint.folder)
  start = (encoder.model.speech_output or SpeechOutputConfig()).start_token
  skipped: Counter[str] = Counter()
  utterances = token_vectors(
    args.source,
    encoder,
    Rate(info.samples_per_token, info.sample_rate_hz),
    batch_size=args.batch_size,
    skipped=skipped,
    prepare=functools.partial(_with_text, labels=labels, no_text=args.no_text, start=start),
  )
  lines = tokens = 0
  with (
    replace_file(args.out) as beside,
    open(beside, "w", encoding="utf-8") as file,
    contextlib.closing(utterances),
    _progress("encoding") as shown,
  ):
    for raw, vectors_ND in shown(utterances):
      units_N = codebook.encode(vectors_ND)
      spoken = "".join(f"<A_{unit}>" for unit in units_N)
      file.write(f"{raw.key}\t{raw.transcript()}{start}{spoken}\n")
      lines, tokens = lines + 1, tokens + len(units_N)
    if not lines:
      _report_skipped(skipped)
      raise ValueError(f"{args.source}: no usable utterance; {args.out} was not written")
  print(f"{args.out}: {lines} utterances, {tokens} audio tokens")
  _report_skipped(skipped)
  return 0


def _with_text(raw, *, labels, no_text: bool, start: str):
  """An utterance with the text to write, on one line, or why it is skipped."""
  from mooer_jax.data.readers.entries import SkippedUtterance

  if no_text:
    return dataclasses.replace(raw, text=b"")
  if labels is not None:
    raw = labels.join(raw, 0.0)
    if isinstance(raw, SkippedUtterance):
      return raw
  try:
    text = raw.transcript()
  except UnicodeDecodeError as error:
    return raw.skip("transcript not UTF-8", str(error))
  if not text:
    return raw.skip("empty transcript")
  if start in text:
    return raw.skip("bad label", f"the text contains {start}")
  # The two characters stand for a line break in answers with speech.
  return dataclasses.replace(raw, text=text.replace("\n", "\\n").encode())


def _add_tokens(args: argparse.Namespace) -> int:
  import jax
  from absl import logging

  from mooer_jax.units.add_tokens import add_tokens
  from mooer_jax.vocoders import SpeechOutputConfig

  logging.set_verbosity(logging.ERROR)  # Orbax warns of every leaf
  jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy, and nothing needs it
  start = SpeechOutputConfig().start_token
  added = add_tokens(
    args.checkpoint,
    args.out,
    count=args.count,
    start_token=start,
    seed=args.seed,
    base=args.base_checkpoint,
  )
  print(
    f"{args.out}: {start} has the id {added.first_id}, and <A_0> to <A_{args.count - 1}> the"
    f" next {args.count}; train with --config.model.llm.vocab_size={added.vocab_size}"
  )
  return 0


def _report_skipped(skipped: Counter[str]) -> None:
  if skipped:
    counts = ", ".join(f"{cause}: {number}" for cause, number in skipped.most_common())
    print(f"skipped {skipped.total()} utterances ({counts})", file=sys.stderr)


@contextlib.contextmanager
def _progress(description: str) -> Iterator:
  """Yields a function that passes on utterances and shows their number, on a terminal."""
  from rich.console import Console
  from rich.progress import Progress

  console = Console(stderr=True)
  with Progress(console=console, disable=not console.is_terminal) as progress:
    bar = progress.add_task(description, total=None)

    def shown(utterances: Iterable) -> Iterator:
      for number, utterance in enumerate(utterances, 1):
        yield utterance
        progress.update(bar, completed=number, description=f"{description}: {number} utterances")

    yield shown
