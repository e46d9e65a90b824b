"""Command-line flags and error lines of train.py and eval.py."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app


def parse_flags(argv: list[str]) -> list[str]:
  """Parses as absl does, for `app.run(main, flags_parser=parse_flags)`.

  A config key that does not exist is one line on stderr and status 1 rather than a traceback.
  """
  for text in argv:
    path = text.partition("--config=")[2].partition(":")[0]
    if path and not Path(path).is_file():
      sys.exit(f"{argv[0]}: --config={path}: no such file")
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:  # ml_collections: the text names key and neighbour
    key = (re.findall(r"\w+", str(error)) or ["?"])[0]
    found = re.search(r'Did you mean "(\w+)"', str(error))
    hint = f"; did you mean {found[1]!r}?" if found else ""
    given = [text for text in argv if text.startswith("--config.") and key in text]
    sys.exit(
      f"{argv[0]}: no config key {key!r} for {' '.join(given)}{hint} Flags change keys that"
      " the config has; those of a model part or of `generation` must stand in its file first"
    )


def one_line_errors(work: Callable[[], object]) -> None:
  """Runs a program; what the user or the system did wrong is one line on stderr and status 1.

  Defects of the program keep their traceback.
  """
  try:
    work()
  except (ValueError, OSError, FloatingPointError) as error:
    sys.exit(f"{sys.argv[0]}: {' '.join(str(error).split())}")
  except KeyboardInterrupt:
    print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
    sys.exit(130)


def prepare_process():
  """Turns on the persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR says where."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mooer_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
