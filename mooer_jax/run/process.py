"""The process that trains or evaluates: flags, error messages, signals, compilation cache."""

import contextlib
import functools
import importlib
import logging as stdlib_logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from mooer_jax import hosts, storage
from mooer_jax.files import cache_folder
from mooer_jax.run.config import renamed_keys
from mooer_jax.storage import RemoteError


def run_program(
  work: Callable[[], object],
  argv: Sequence[str] | None = None,
  *,
  needs: Sequence[str] = (),
  doc: str | None = None,
  remedy: str = "",
) -> None:
  """Parses absl flags, connects the processes, runs a program and exits.

  Errors of the user or the system are one line on stderr and status 2 (130 on Ctrl-C); other
  exceptions keep their traceback.

  Args:
    work: the program.
    argv: program name and arguments; default: sys.argv.
    needs, doc: names of required flags, and the text above the list of flags in --help.
    remedy: what to do if the memory is exceeded.
  """
  logging.set_verbosity(logging.WARNING)  # Orbax logs every file; --verbosity=0 shows that again
  # A figure needs none of the fonts that it misses.
  stdlib_logging.getLogger("matplotlib.font_manager").setLevel("ERROR")
  if doc:
    sys.modules["__main__"].__doc__ = doc
  flags.mark_flags_as_required(needs)
  flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, if a launcher does not connect the processes"
  )
  flags.DEFINE_integer("num_processes", None, "number of processes, with --coordinator")
  flags.DEFINE_integer("process_id", None, "id of this process from 0, with --coordinator")

  def main(arguments):
    program, *unexpected = arguments
    if unexpected:
      _exit(
        f"{program}: unexpected argument {unexpected[0]!r}; config keys are set with"
        " --config.key=value, and values with spaces need quotes"
      )
    given = flags.FLAGS
    try:
      hosts.initialize(given.coordinator, given.num_processes, given.process_id)
      with out_of_memory_as_error(remedy):
        work()
    except KeyboardInterrupt:
      _end(f"{program}: interrupted", 130)
    except Exception as error:
      # A store's connection is not that of a process.
      if not isinstance(error, RemoteError) and (lost := hosts.lost_process(error)):
        _end(f"{program}: {lost}", 1)
      if not isinstance(error, ValueError | OSError | FloatingPointError):
        if not hosts.are_several():
          raise
        traceback.print_exc()
      _end(f"{program}: {' '.join(str(error).split())}", 2)

  parse = functools.partial(_parse_flags, module=work.__module__)
  app.run(main, None if argv is None else list(argv), flags_parser=parse)


def _parse_flags(argv: list[str], *, module: str) -> list[str]:
  """Parses as absl does, but errors are one line; --help shows the flags that `module` defines."""
  if {"--help", "-h"} & {*argv}:  # absl's lists no flag of a program that a function defines
    print(f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.module_help(module)}\n")
    print(f"{flags.FLAGS.module_help(__name__)}\n")
    print("--helpfull lists the flags of other packages too; docs/training.md has the config keys")
    sys.exit()
  argv = [_with_new_name(_with_config_file(text, argv[0])) for text in argv]
  sys.argv[1:] = argv[1:]  # where ml_collections looks for overrides
  try:
    rest = flags.FLAGS(argv)
    _check_overrides(argv)
    return rest
  except SyntaxError as error:
    _exit(f"{argv[0]}: {error.filename}:{error.lineno}: {error.msg}")
  except (AttributeError, KeyError, flags.Error) as error:
    _exit(f"{argv[0]}: {_flag_error(argv, error)}")


def _end(message: str, status: int) -> NoReturn:
  """Exits; of several processes, without waiting for the others, which may wait for this one."""
  print(message, file=sys.stderr, flush=True)
  if hosts.are_several():
    sys.stdout.flush()
    os._exit(status)
  sys.exit(status)


def _exit(message: str) -> NoReturn:
  """Exits with the status that errors have in all commands of mooer-jax."""
  print(message, file=sys.stderr)
  sys.exit(2)


def _flag_error(argv: Sequence[str], error: Exception) -> str:
  """One line about an error of a flag, or of the config file with its name and line."""
  values = [text.removeprefix("--config=") for text in argv if text.startswith("--config=")]
  path = values[-1].partition(":")[0] if values else ""
  if "has no attribute 'get_config'" in str(error):
    return f"{path}: the file must define get_config(), which returns a ConfigDict"
  # ml_collections copies the traceback of some errors into the message of another.
  trace = "".join(traceback.format_exception(error))
  lines = re.findall(rf'File ".*{re.escape(Path(path).name)}", line (\d+)', trace) if path else []
  where = f"{path}:{lines[-1]}: " if lines else ""
  if missing := re.search(r"Flag (--\w+) must have a value other than None", str(error)):
    return f"{missing[1]} is missing"
  if isinstance(error, flags.Error):
    text = str(error).splitlines()[-1] if lines else " ".join(str(error).split())
    text = re.sub(r"invalid literal for int\(\) with base \d+: .*", "must be a whole number", text)
    return where + re.sub(r"could not convert string to float: .*", "must be a number", text)
  # ml_collections: the text names the key and its neighbour.
  key = (re.findall(r'(?<=Key ")\w+', str(error)) or re.findall(r"\w+", str(error)) or ["?"])[0]
  found = re.search(r'Did you mean "(\w+)"', str(error))
  hint = f"; did you mean {found[1]!r}?" if found else ""
  if lines:
    return f"{where}no config key {key!r}{hint}"
  given = [text for text in argv if text.startswith("--config.") and key in text]
  return (
    f"no config key {key!r} for {' '.join(given)}{hint or '.'} Flags override keys that the"
    " config file sets; set other keys of a model part, of a data set of `data.mixture` or of"
    " `generation` in the file first"
  )


def _with_config_file(text: str, program: str) -> str:
  """--config=NAME as the path of a shipped config, unless it is a file; exits if it is neither."""
  flag, equals, value = text.partition("=")
  path, colon, parameters = value.partition(":")
  if flag != "--config" or Path(path).is_file():
    return text
  package = Path(__file__).parents[1]
  # In a wheel the folder configs/ is in the package, in a checkout beside it.
  folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
  shipped = folder / f"{Path(path).stem}.py"
  if path not in (shipped.stem, f"configs/{shipped.name}") or not shipped.is_file():
    names = ", ".join(sorted(file.stem for file in folder.glob("[a-z]*.py")))
    _exit(f"{program}: --config={path}: no such file, and no shipped config ({names})")
  if folder.parent == package:  # some configs import others, as `configs`
    sys.modules.setdefault("configs", importlib.import_module("mooer_jax.configs"))
  return f"{flag}{equals}{shipped}{colon}{parameters}"


def _with_new_name(text: str) -> str:
  """An argument whose config key, if it is deprecated, is replaced by its new name."""
  flag, equals, value = text.partition("=")
  for old, new in renamed_keys().items():
    if flag == f"--config.{old}" or flag.startswith(f"--config.{old}."):
      print(f"config.{old} is deprecated; use config.{new}", file=sys.stderr)
      return f"--config.{new}{flag.removeprefix(f'--config.{old}')}{equals}{value}"
  return text


def _check_overrides(argv: Sequence[str]) -> None:
  """Exits if a flag sets a key whose deprecated name is in the config file and would win."""
  if "config" not in flags.FLAGS or not (config := flags.FLAGS["config"].value):
    return
  for old, new in renamed_keys().items():
    if any(text.partition("=")[0] == f"--config.{new}" for text in argv):
      section: Any = config
      *parents, name = old.split(".")
      for parent in parents:
        section = section.get(parent, {})
      if name in section:
        _exit(
          f"{argv[0]}: the config file sets {old}, the deprecated name of {new}, which a flag sets"
          f" too; rename it in the file to {new}"
        )


@contextlib.contextmanager
def out_of_memory_as_error(remedy: str) -> Iterator[None]:
  """Raises a ValueError with a remedy if the block exceeds the memory of the host or a device."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    detail = "".join(str(error).splitlines()[:1]) or "of the host"
    raise ValueError(f"out of memory ({detail[:200]}); {remedy}") from error


def prepare_process():
  """Enables the persistent compilation cache of JAX, for small programs too.

  Environment variables of JAX, such as JAX_COMPILATION_CACHE_DIR, win over its place and limits.
  """
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
  # JAX keeps programs that took a second. Laying out the weights compiles some twenty in less.
  if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def check_profile(folder: str | os.PathLike | None) -> None:
  """Creates the folder of --trace; raises OSError (ValueError for a URL or ~) if it cannot be."""
  if folder is None:
    return
  try:
    storage.local(folder, "--trace").mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OSError(f"--trace {os.fspath(folder)}: {error.strerror}; name a folder") from error


@contextlib.contextmanager
def profile(folder: str | os.PathLike | None) -> Iterator[None]:
  """Writes a profile of the block into a folder, for XProf and Perfetto; None writes nothing."""
  if folder is None:
    yield
    return
  check_profile(folder)
  with jax.profiler.trace(os.fspath(folder), create_perfetto_trace=True):
    yield
  newest = max(Path(folder).rglob("perfetto_trace.json.gz"), key=os.path.getmtime)
  print(
    f"profile in {os.fspath(folder)}: run `xprof --logdir` on it, or open {newest} at"
    " https://ui.perfetto.dev",
    file=sys.stderr,
  )


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
  """Yields an event that the first SIGINT or SIGTERM sets; a second one ends the process."""
  requested = threading.Event()

  def handle(number, frame):
    requested.set()
    print("stopping after this step; repeat to stop at once", file=sys.stderr)
    handlers.close()

  with contextlib.ExitStack() as handlers:  # restores those from before
    for number in (signal.SIGINT, signal.SIGTERM):
      handlers.callback(signal.signal, number, signal.signal(number, handle))
    yield requested
