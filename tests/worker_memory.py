"""Keeps each test process small, reports its peak memory, and fails a run that exceeds the limit.

Compiled programs are what grows: JAX keeps each one while its function is cached, and the suite
compiles thousands. They are dropped between modules, where hardly any is used again, and within a
module that makes the process large.
"""

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

# The goal is 3 GB, and a whole run stays below it; the rest is room for other allocators.
LIMIT_GB = 3.5
# Caches are cleared after a module that leaves the process larger than this. The imports alone
# (torch, transformers, jax) take about 0.8 GB.
CLEAR_ABOVE_GB = 1.2
# Within a module, caches are cleared above this size, if the process has grown by a quarter since
# the last time: the rest may be fixtures.
CLEAR_WITHIN_ABOVE_GB = 1.8


class Peak(NamedTuple):
  """Largest memory in GB (10^9 bytes) of a test process and of any one of its subprocesses."""

  process_gb: float
  subprocess_gb: float
  limited: bool  # nightly tests hold models of full size, and are exempt


# glibc serves blocks above this size from mappings of their own, which are returned when they are
# freed. By itself it raises the size to 32 MB, and a long run of tests fragments the heap.
MMAP_ABOVE_BYTES = 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h

PEAKS = pytest.StashKey[dict[str, Peak]]()
RAN_NIGHTLY = pytest.StashKey[bool]()
CLEARED_GB = pytest.StashKey[float]()  # size after caches were last cleared
ON_LINUX = sys.platform == "linux"


def clear_caches():
  """Drops compiled programs and garbage, and returns freed memory to the system."""
  if jax := sys.modules.get("jax"):
    jax.clear_caches()
  gc.collect()
  if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory otherwise
    libc.malloc_trim(0)


def exceeds(peak: Peak) -> bool:
  return peak.limited and peak.process_gb > LIMIT_GB


def _resident_gb() -> float:
  with open("/proc/self/statm", encoding="ascii") as stream:
    return int(stream.read().split()[1]) * resource.getpagesize() / 1e9


def _peak(config) -> Peak:
  # Not ru_maxrss: a process inherits that of the one that started it. The figure of the
  # subprocesses has this flaw; it is only reported.
  status = Path("/proc/self/status").read_text(encoding="ascii")
  process_gb = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9
  subprocess_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
  return Peak(process_gb, subprocess_gb, limited=not config.stash[RAN_NIGHTLY])


def pytest_configure(config):
  config.stash[PEAKS] = {}
  if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(_M_MMAP_THRESHOLD, MMAP_ABOVE_BYTES)
  config.stash[RAN_NIGHTLY] = False
  config.stash[CLEARED_GB] = 0.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
  result = yield  # fixtures of a module that ends are torn down here
  item.config.stash[RAN_NIGHTLY] |= item.get_closest_marker("nightly") is not None
  ends_module = nextitem is None or nextitem.path != item.path
  stash = item.config.stash
  limit = CLEAR_ABOVE_GB if ends_module else max(CLEAR_WITHIN_ABOVE_GB, 1.25 * stash[CLEARED_GB])
  if ON_LINUX and _resident_gb() > limit:
    clear_caches()
    stash[CLEARED_GB] = _resident_gb()
  return result


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
  """Takes over the peak of an xdist worker that has finished."""
  if found := getattr(node, "workeroutput", {}).get("peak"):
    node.config.stash[PEAKS][node.gateway.id] = Peak(*found)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
  config = session.config
  if not ON_LINUX:  # elsewhere ru_maxrss has other units
    return
  if hasattr(config, "workerinput"):
    config.workeroutput["peak"] = list(_peak(config))
    return
  peaks = config.stash[PEAKS]
  if not peaks:
    peaks["main"] = _peak(config)
  if exitstatus == pytest.ExitCode.OK and any(map(exceeds, peaks.values())):
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
  if not (peaks := config.stash[PEAKS]):
    return
  terminalreporter.section("peak memory")
  for name, peak in sorted(peaks.items()):
    terminalreporter.line(
      f"{name}: {peak.process_gb:.2f} GB, its largest subprocess {peak.subprocess_gb:.2f} GB",
      red=exceeds(peak),
    )
  if any(map(exceeds, peaks.values())):
    terminalreporter.line(
      f"A test process of more than {LIMIT_GB} GB fails the run: see tests/worker_memory.py. "
      "`pytest -n 0` on one module after the other finds the one that grows.",
      red=True,
    )
