"""The processes of a run: how they find each other, and how they exchange values.

All processes must call these functions in the same order. With one process, `gather`, `on_first`,
`from_all` and `from_processes` exchange nothing.
"""

import concurrent.futures
import functools
import glob
import importlib.util
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# A process that stops answering is noticed after this; the others then end.
HEARTBEAT_S = 25
CONNECT_S = 300  # how long a process waits for the coordinator
# JAX's name of a launcher, and the variable with the number of processes that it has started.
_LAUNCHERS = {"slurm": "SLURM_STEP_NUM_TASKS", "ompi": "OMPI_COMM_WORLD_SIZE", "mpi4py": "PMI_SIZE"}
# Packages that JAX needs to find the processes of a launcher.
_PACKAGES = {"k8s": "kubernetes", "mpi4py": "mpi4py"}
_connected = False  # whether `initialize` has connected several processes
# Parts of the errors of a collective whose other processes are gone.
_LOST = (
  r"Gloo [\w ]+ failed|[Hh]eartbeat timeout|Connection (closed|reset) by peer|coordination service"
)


class OtherProcessError(ValueError):
  """Another process of the run failed."""


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Connects the processes of a run; must be called before JAX is used.

  Without arguments, the processes are those that Slurm (srun), Open MPI, another MPI (with mpi4py)
  or Kubernetes has started, or the hosts of a TPU slice; else there is one.

  Args:
    coordinator: "HOST:PORT" of process 0, reachable from all processes.
    num_processes: their number; with 1 alone, nothing is connected, whatever has started it.
    process_id: of this one, from 0.

  Raises:
    ValueError: if only some of the arguments are given, or the processes cannot reach each other.
  """
  global _connected
  if num_processes == 1 and coordinator is None:
    return
  given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  if missing := [name for name, value in given.items() if value is None]:
    if len(missing) < len(given):
      raise ValueError(f"--{missing[0]} is missing; give --{', --'.join(given)} together, or none")
    found = _detect(os.environ)
    if found is None:
      return
    method, expected = found
    if (package := _PACKAGES.get(method)) and importlib.util.find_spec(package) is None:
      raise ValueError(
        f"the processes of {method} are found with the package {package}: pip install {package},"
        " or give --coordinator, --num_processes and --process_id; --num_processes=1 runs in one"
      )
    options: dict[str, Any] = {"cluster_detection_method": method} if method else {}
  else:
    assert num_processes is not None and process_id is not None
    if num_processes < 1 or not 0 <= process_id < num_processes:
      raise ValueError(
        f"--process_id={process_id} --num_processes={num_processes}: ids are from 0 to one less"
        " than the number"
      )
    assert coordinator is not None
    _reach(coordinator, starts_it=process_id == 0)
    options = {"coordinator_address": coordinator, "cluster_detection_method": "deactivate"}
    options |= {"num_processes": num_processes, "process_id": process_id}
    expected = num_processes
  # JAX would catch SIGTERM until training begins, which then handles it.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(**options, heartbeat_timeout_seconds=HEARTBEAT_S)
  except Exception as error:  # of each launcher's own package, too
    cause = " ".join(str(error).split())[:300]
    raise ValueError(
      f"the processes of this run cannot connect ({type(error).__name__}: {cause}); check that all"
      " were started and reach the coordinator, or give --num_processes=1 to run in one process"
    ) from error
  _connected = True
  if expected and jax.process_count() != expected:
    raise ValueError(
      f"{expected} processes were started, but JAX sees {jax.process_count()}; give --coordinator,"
      " --num_processes and --process_id"
    )


def _reach(coordinator: str, *, starts_it: bool) -> None:
  """Waits until process 0 listens; JAX would abort this process instead of raising an error."""
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"--coordinator={coordinator}: write HOST:PORT")
  deadline = time.monotonic() + CONNECT_S
  while not starts_it:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except (OSError, OverflowError) as error:
      if time.monotonic() > deadline:
        raise ValueError(
          f"--coordinator={coordinator} cannot be reached within {CONNECT_S} s ({error}); start"
          " process 0 on that host, and open the port"
        ) from error
      time.sleep(0.5)


def _detect(env: Mapping[str, str]) -> tuple[str, int | None] | None:
  """(JAX's name of what has started the processes, "" for a TPU slice; their number, if known).

  None for a process that was started alone.
  """
  tasks = int(env.get("SLURM_NTASKS") or 1)
  if tasks > 1 and not env.get("SLURM_STEP_NUM_TASKS"):
    raise ValueError(
      f"the Slurm job has {tasks} tasks, but this process is none of them: start it with srun, or"
      " give --num_processes=1 to run in one process"
    )
  for name, variable in _LAUNCHERS.items():
    if int(env.get(variable) or 1) > 1:
      return name, int(env[variable])
  # The hosts of a TPU slice, also in Kubernetes. JAX reads who they are.
  platforms = (env.get("JAX_PLATFORMS") or "tpu").split(",")
  has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  if "tpu" in platforms and has_tpu and importlib.util.find_spec("libtpu"):
    return "", None
  if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
    return "k8s", None
  return None


def are_several() -> bool:
  """Whether there are several processes; unlike `jax.process_count`, starts no backend."""
  return _connected and jax.process_count() > 1


def check_rows(mesh: Mesh) -> None:
  """Checks that the rows of a batch on a mesh can come from the processes of the devices.

  Raises:
    ValueError: if `tensor`, which does not split them, reaches over several processes.
  """
  *_, tensor = mesh.devices.shape
  for devices in mesh.devices.reshape(-1, tensor):
    if len({device.process_index for device in devices}) > 1:
      raise ValueError(
        f"mesh.tensor={tensor} reaches over several hosts, whose batches differ; lower it to a"
        f" divisor of {len(mesh.local_devices)}, the devices of a host, and raise mesh.fsdp instead"
      )


def lost_process(error: BaseException) -> str:
  """The message for an error that comes from the loss of another process; "" for any other."""
  chain: BaseException | None = error
  while chain is not None and are_several():
    if found := re.search(_LOST, str(chain)):
      return (
        f"the connection to another process is lost ({found[0]}); see its output for the reason."
        " All processes end; rerun the same command to resume from the latest checkpoint"
      )
    chain = chain.__cause__ or chain.__context__
  return ""


def is_first() -> bool:
  """Whether this is the process that writes the records of the run."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line, of the first process alone."""
  if is_first():
    print(text, flush=True)


def gather(value: Any) -> list[Any]:
  """The JSON values that the processes give, in their order."""
  if jax.process_count() == 1:
    return [value]
  from jax.experimental.multihost_utils import process_allgather

  data_N = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = process_allgather(np.array([len(data_N)], np.int32)).ravel()
  padded_N = np.pad(data_N, (0, sizes.max() - len(data_N)))
  rows = process_allgather(padded_N).reshape(len(sizes), -1)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def on_first(function: Callable[[], T]) -> T:
  """Calls a function in the first process; all return its result, a JSON value.

  Raises:
    Exception: what the function raises; in the other processes, `OtherProcessError`.
  """
  if jax.process_count() == 1:
    return function()
  result, problem, error = None, None, None
  if is_first():
    try:
      result = function()
    except Exception as raised:
      problem, error = f"{type(raised).__name__}: {raised}", raised
  result, problem = gather([result, problem])[0]
  if error is not None:
    raise error
  if problem is not None:
    raise OtherProcessError(f"process 0 failed: {problem}")
  return result  # type: ignore[return-value]


def wait_for(future: concurrent.futures.Future[T]) -> T:
  """The result of a thread of this process, once the threads of all processes have theirs.

  Raises:
    Exception: of the thread; in the other processes, `OtherProcessError`, without waiting for
      threads that may wait for the one that has failed.
  """
  while True:
    concurrent.futures.wait([future], timeout=1)
    error = future.exception() if future.done() else None
    problem = None if error is None else f"{type(error).__name__}: {error}"
    told = gather([future.done(), problem])
    if error is not None:
      raise error
    for number, (_, problem) in enumerate(told):
      if problem is not None:
        raise OtherProcessError(f"process {number} failed: {problem}")
    if all(done for done, _ in told):
      return future.result()


class Agreement:
  """The largest values and sums of small vectors of all processes.

  The reduction runs on the devices, behind what is queued there, and `result` waits for it. Started
  before a step, it does not delay the devices.
  """

  def __init__(self, mesh: Mesh):
    self._rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())
    self._of_process = len(mesh.local_devices)
    # The devices of a process hold the same vector, or zeros, so that a sum counts it once.
    self._reduce = jax.jit(lambda x, y: (x.max(0), y.sum(0)), out_shardings=(whole, whole))
    self._found: Any = None

  def start(self, largest: Sequence[int], sums: Sequence[float]) -> None:
    """Starts the reduction of this process's values, int32 and float32."""
    highest = np.tile(np.asarray(largest, np.int32), (self._of_process, 1))
    added = np.zeros((self._of_process, len(sums)), np.float32)
    added[0] = sums
    place = functools.partial(jax.make_array_from_process_local_data, self._rows)
    self._found = self._reduce(place(highest), place(added))

  def result(self) -> tuple[list[int], list[float]]:
    """The largest values and the sums that the last `start` asked for."""
    largest, sums = (np.asarray(x).tolist() for x in jax.device_get(self._found))
    return largest, sums


def whole(arrays: T) -> T:
  """NumPy copies of arrays whose parts are in several processes; with one, the arrays."""
  if jax.process_count() == 1:
    return arrays
  from jax.experimental.multihost_utils import process_allgather

  return process_allgather(arrays, tiled=True)


def from_all(arrays: T, sharding: NamedSharding) -> T:
  """Puts arrays that all processes have alike on the devices of all."""
  if jax.process_count() == 1:
    return jax.device_put(arrays, sharding)

  def place(x):
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

  return jax.tree.map(place, arrays)


def from_processes(arrays: T, sharding: NamedSharding) -> T:
  """Puts the rows that each process has on the devices, as arrays of the rows of all processes."""
  if jax.process_count() == 1:
    return jax.device_put(arrays, sharding)
  place = functools.partial(jax.make_array_from_process_local_data, sharding)
  return jax.tree.map(place, arrays)
