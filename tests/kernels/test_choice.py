"""Which implementation runs; a named one runs or is refused."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernels
from mooer_jax.kernels import choice
from mooer_jax.kernels.choice import Call, check_backend, choose

CALL = Call("attention", jnp.bfloat16, queries=500, keys=500, heads=8, kv_heads=4, channels=128)


def row(platform="gpu", call=CALL, **seconds):
  values = call._replace(dtype="bfloat16")._asdict()
  return {**values, "extras": [*call.extras], "platform": platform, "seconds": seconds}


@pytest.fixture
def measured(monkeypatch):
  """Sets the rows of the table of measurements."""
  return lambda *rows: monkeypatch.setattr(choice, "measurements", lambda: rows)


def test_without_a_measurement_auto_is_mosaic_on_tpus_and_xla_elsewhere(measured):
  measured(row("gpu", CALL._replace(operation="decode_attention"), cudnn=1, xla=2))
  names = [choose("auto", CALL, platform=platform) for platform in ("cpu", "gpu", "tpu", None)]
  assert names == ["xla", "xla", "mosaic", "xla"]


def test_auto_is_the_fastest_of_the_nearest_measurement(measured):
  short, long = CALL._replace(queries=64, keys=64), CALL._replace(queries=2000, keys=2000)
  measured(row(call=short, xla=1, triton=2), row(call=long, xla=3, triton=1, cudnn=2))
  assert choose("auto", short._replace(queries=70), platform="gpu") == "xla"
  assert choose("auto", CALL, platform="gpu") == "triton"
  assert choose("auto", CALL, platform="tpu") == "mosaic"
  for other in ({"dtype": jnp.dtype("float32")}, {"channels": 64}, {"extras": ("bias",)}):
    assert choose("auto", CALL._replace(**other), platform="gpu") == "xla"


def test_auto_passes_over_what_does_not_support_the_call(measured):
  measured(row("gpu", triton=1, cudnn=2, xla=3), row("tpu", mosaic=1, xla=3))
  four = jax.sharding.AbstractMesh((1, 1, 8), ("data", "fsdp", "tensor"))
  with jax.sharding.use_abstract_mesh(four):
    assert choose("auto", CALL, platform="gpu") == "cudnn"
    assert choose("auto", CALL, platform="tpu") == "xla"
  assert choose("auto", CALL, platform="tpu", unsupported={"mosaic": "is too small"}) == "xla"
  windows = Call("window_attention", jnp.bfloat16, 1, 17, 12, 12, 64, extras=("dropout",))
  assert choose("auto", windows, platform="tpu") == "xla"


@pytest.mark.parametrize(
  "name, changes, message",
  [
    ("flash", {}, "'flash': choose one of .*'auto', 'xla'"),
    ("cudnn", {"extras": ("bias",)}, "does not support a bias.*attention='auto'"),
    ("cudnn", {"dtype": jnp.dtype("float32")}, "runs in bfloat16; got float32"),
    ("mosaic", {}, "runs on tpu; the program is for gpu"),
    ("triton", {"channels": 48}, "a power of 2; got 48.*attention='auto'"),
    ("triton", {"extras": ("dropout",)}, "does not support dropout; use attention='auto'"),
  ],
)
def test_a_named_implementation_that_does_not_support_a_call_is_refused(name, changes, message):
  with pytest.raises(ValueError, match=message):
    choose(name, CALL._replace(**changes), platform="gpu")


def test_an_unknown_platform_is_refused_by_name():
  with pytest.raises(ValueError, match="platform='cuda': use 'cpu', 'gpu' or 'tpu'"):
    choose("auto", CALL, platform="cuda")


@pytest.mark.parametrize("name", ["cudnn", "mosaic", "triton"])
def test_an_implementation_that_does_not_run_here_is_refused(name):
  check_backend("auto")
  with pytest.raises(ValueError, match=f"{name}' runs on .pu; JAX runs on cpu here.*'auto'"):
    check_backend(name)


def test_auto_reads_what_the_benchmark_writes(measured, tmp_path):
  spec = kernels.SPECS["decode qwen2_0.5b"]
  row = json.loads(json.dumps(kernels.measure(spec)))
  assert row["seconds"]["xla"] > 0 and not row["refused"]
  row["seconds"] = {"triton": 1, "xla": 2}
  measured({**row, "platform": "gpu"})
  assert choose("auto", spec.call, platform="gpu") == "triton"
  for committed in json.loads(kernels.PATH.read_text("utf-8"))["rows"]:
    assert committed.keys() == row.keys()


def test_new_measurements_replace_only_the_same_ones():
  old = [{**row(), "device": "A", "rows": rows, "causal": False} for rows in (1, 2)]
  new = [{**old[0], "seconds": {"xla": 5}}]
  assert kernels.merged(old, new) == [old[1], *new]
  other = [{**new[0], "device": "B"}]
  assert kernels.merged(old, other) == [*old, *other]
