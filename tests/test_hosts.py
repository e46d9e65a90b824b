"""How processes are found; tests/run/test_processes.py has runs of several."""

from types import SimpleNamespace

import numpy as np
import pytest

from mooer_jax import hosts


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("localhost:1", 2, None), "--process_id is missing; give --coordinator, --num_processes"),
    (("localhost:1", 2, 2), "--process_id=2 --num_processes=2: ids are from 0"),
  ],
)
def test_incomplete_flags_are_refused(given, message):
  with pytest.raises(ValueError, match=message):
    hosts.initialize(*given)


def test_a_tensor_axis_over_several_hosts_is_refused():
  of_host = [SimpleNamespace(process_index=host) for host in (0, 0, 1, 1)]

  def mesh(*sizes):
    devices = np.array(of_host, dtype=object).reshape(sizes)
    return SimpleNamespace(devices=devices, local_devices=of_host[:2])

  hosts.check_rows(mesh(2, 1, 2))
  hosts.check_rows(mesh(1, 4, 1))
  with pytest.raises(ValueError, match="mesh.tensor=4 reaches over several hosts.*a divisor of 2"):
    hosts.check_rows(mesh(1, 1, 4))


def test_launchers_are_recognised(monkeypatch):
  assert hosts._detect({"JAX_PLATFORMS": "cpu"}) is None
  step = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}
  assert hosts._detect(step) == ("slurm", 4)
  assert hosts._detect({"OMPI_COMM_WORLD_SIZE": "2"}) == ("ompi", 2)
  assert hosts._detect({"PMI_SIZE": "3"}) == ("mpi4py", 3)
  with pytest.raises(ValueError, match="this process is none of them: start it with srun"):
    hosts._detect({"SLURM_NTASKS": "4"})
  job = {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}
  assert hosts._detect(job) == ("k8s", None)
  monkeypatch.setattr(hosts.glob, "glob", lambda pattern: ["/dev/accel0"])
  monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name)
  assert hosts._detect(job) == ("", None)  # JAX knows a TPU slice in Kubernetes by itself
  assert hosts._detect({**job, "JAX_PLATFORMS": "cpu"}) == ("k8s", None)


def test_one_process_may_be_asked_for_and_a_missing_package_is_named(monkeypatch):
  for name, value in (("KUBERNETES_SERVICE_HOST", "x"), ("JOB_COMPLETION_INDEX", "0")):
    monkeypatch.setenv(name, value)
  hosts.initialize(None, 1, None)
  monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install kubernetes.*--num_processes=1 runs in one"):
    hosts.initialize(None, None, None)


@pytest.mark.parametrize(
  ("coordinator", "message"),
  [
    ("localhost:1", "--coordinator=localhost:1 cannot be reached within 0 s.*start process 0"),
    ("localhost", "--coordinator=localhost: write HOST:PORT"),
    ("localhost:http", "--coordinator=localhost:http: write HOST:PORT"),
  ],
)
def test_a_coordinator_that_does_not_answer_is_named(monkeypatch, coordinator, message):
  monkeypatch.setattr(hosts, "CONNECT_S", 0)
  with pytest.raises(ValueError, match=message):
    hosts.initialize(coordinator, 2, 1)
