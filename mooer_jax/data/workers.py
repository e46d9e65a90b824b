"""Work of several processes, shown in a progress bar."""

import concurrent.futures.process
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


def run_in_processes(
  function: Callable[..., T],
  jobs: Sequence[Sequence[Any]],
  *,
  processes: int | None,
  progress: str = "",
  sizes: Sequence[int] | None = None,
) -> Iterator[T]:
  """Yields the results of a function for each job, in order.

  Args:
    function: must be importable by name; its arguments and result must be picklable.
    jobs: the arguments of each call.
    processes: number of processes; default: that of the CPUs. More than one are spawned, not
      forked, since this process may run JAX's threads.
    progress: text beside the progress bar; "" shows none.
    sizes: of the jobs, for the bar; default: 1 each.

  Raises:
    OSError: if a process was killed; and what the function raises.
  """
  processes = min(processes or os.cpu_count() or 1, len(jobs))
  sizes = sizes or [1] * len(jobs)
  with contextlib.ExitStack() as stack:
    bar = stack.enter_context(Progress(console=Console(stderr=True), disable=not progress))
    task = bar.add_task(progress, total=sum(sizes))
    results: Iterator[T] = (function(*job) for job in jobs)
    if processes > 1:
      pool = concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
      )
      stack.callback(pool.shutdown, cancel_futures=True)
      results = pool.map(function, *zip(*jobs))
    try:
      for size, result in zip(sizes, results, strict=True):
        yield result
        bar.advance(task, size)
    except concurrent.futures.process.BrokenProcessPool as error:
      raise OSError(
        f"one of {processes} worker processes was killed, probably because memory ran out; lower"
        " the number of processes (--processes)"
      ) from error


def _start_worker():
  # Only the parent handles Ctrl-C; it then waits for the jobs that are running.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  end_with_parent()


def end_with_parent() -> None:
  """Makes this process end when its parent does, even if that is killed."""

  def wait():
    multiprocessing.parent_process().join()
    os._exit(1)  # nobody reads the results

  threading.Thread(target=wait, daemon=True).start()
