"""The process of a run: the compilation cache, and memory that is exceeded."""

from types import SimpleNamespace

import jax
import pytest

from mooer_jax.projects.salmonn import activation
from mooer_jax.projects.salmonn.lora_sweep import lora_sweep
from mooer_jax.projects.salmonn.suite import evaluate_suite
from mooer_jax.run import process
from mooer_jax.run.config import Run
from mooer_jax.run.evaluate import evaluate
from mooer_jax.run.perplexity import perplexity
from mooer_jax.run.process import out_of_memory_as_error
from mooer_jax.run.train import train
from mooer_jax.storage import RemoteError


@pytest.mark.parametrize(
  "error",
  [
    MemoryError(),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
  ],
  ids=lambda error: type(error).__name__,
)
def test_exceeded_memory_is_an_error_with_a_remedy(error):
  with pytest.raises(ValueError, match=r"^out of memory \([^\n]+\); lower the batch size$"):
    with out_of_memory_as_error("lower the batch size"):
      raise error


def test_other_errors_of_the_device_keep_their_traceback():
  error = jax.errors.JaxRuntimeError("INTERNAL: a defect")
  with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory_as_error("lower it"):
    raise error


@pytest.mark.parametrize(
  "call",
  [
    train,
    activation.prepare,
    lambda run: evaluate(run, "nowhere"),
    lambda run: perplexity(run, ["nowhere"]),
    lambda run: lora_sweep(run, "nowhere", scales=()),
    lambda run: evaluate_suite(run, "nowhere", "annotations"),
  ],
  ids=["train", "activation", "evaluate", "perplexity", "lora_sweep", "suite"],
)
def test_callers_in_python_have_the_compilation_cache(config, tmp_path, monkeypatch, call):
  config.train.gradient_accumulation_steps = 3  # each call ends with an error
  config.activation.update({"shards": "clips.json", "task": "asr"})
  run = Run.read(config)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  before = jax.config.jax_compilation_cache_dir
  try:
    with pytest.raises((ValueError, FileNotFoundError)):
      call(run)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mooer_jax" / "xla")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (RuntimeError("Gloo AllReduce failed: Connection reset by peer"), "another process is lost"),
    (RuntimeError("Gloo context initialization failed: timed out"), "another process is lost"),
    (RemoteError("s3://b/a.tar: no connection (Connection reset by peer)"), "s3://b/a.tar: no"),
  ],
)
def test_a_lost_store_is_not_taken_for_a_lost_process(monkeypatch, error, said):
  def work():
    raise error

  def end(message, status):
    raise SystemExit(message)

  options = SimpleNamespace(coordinator=None, num_processes=1, process_id=None)
  names = ("mark_flags_as_required", "DEFINE_string", "DEFINE_integer")
  ignored = dict.fromkeys(names, lambda *arguments: None)
  monkeypatch.setattr(process, "flags", SimpleNamespace(FLAGS=options, **ignored))
  monkeypatch.setattr(process.app, "run", lambda main, argv, flags_parser: main(["train.py"]))
  monkeypatch.setattr(process, "_end", end)
  monkeypatch.setattr(process.hosts, "are_several", lambda: True)
  with pytest.raises(SystemExit, match=said):
    process.run_program(work)


@pytest.mark.parametrize("given", [None, "3"])
def test_small_programs_are_kept_in_the_compilation_cache(monkeypatch, given):
  name = "jax_persistent_cache_min_compile_time_secs"
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
  monkeypatch.delenv(name.upper(), raising=False)
  if given:
    monkeypatch.setenv(name.upper(), given)
  before = getattr(jax.config, name)
  jax.config.update(name, 3.0)
  try:
    process.prepare_process()
    assert getattr(jax.config, name) == (3.0 if given else 0)
  finally:
    jax.config.update(name, before)
