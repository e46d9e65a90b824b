"""Two processes save one checkpoint, or agree that they have not."""

import socket
import subprocess
import sys

import numpy as np
import pytest

from mooer_jax import checkpoint

PROGRAM = """
import os, resource, sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mooer_jax import checkpoint, hosts

address, process, workdir = sys.argv[1:]
hosts.initialize(address, 2, int(process))
rows = NamedSharding(jax.make_mesh((2,), ("rows",)), PartitionSpec("rows"))
w = hosts.from_all(np.arange(2.0**16, dtype=np.float32).reshape(256, 256), rows)

def start(step):
  return checkpoint.start_save(
    checkpoint.step_folder(workdir, step), params={"w": w}, train_state={"m": w},
    data_state={"of": process}, config_json={}, tokenizer=lambda _: None, generation={},
  )

hosts.wait_for(start(1))
if process == "1":
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
  hosts.wait_for(start(2))
except Exception as error:
  print(f"{type(error).__name__}: {error}", flush=True)
hosts.gather(None)  # the first process, which the others need, ends last
os._exit(0)
"""


@pytest.mark.slow
def test_a_write_that_fails_in_one_process_is_an_error_of_both(tmp_path, plain_env):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  command = [sys.executable, "-c", PROGRAM, address]
  run = [
    subprocess.Popen([*command, str(n), str(tmp_path)], env=plain_env, stdout=-1, text=True)
    for n in range(2)
  ]
  try:
    said = [process.communicate(timeout=120)[0] for process in run]
  finally:
    for process in run:
      process.kill()
  assert [process.returncode for process in run] == [0, 0]
  reason = "step_00000002: the checkpoint was not saved"
  assert f"OtherProcessError: process 1 failed: SaveError: {tmp_path}/{reason}" in said[0]
  assert f"SaveError: {tmp_path}/{reason}" in said[1] and "OtherProcess" not in said[1]
  whole = checkpoint.load(checkpoint.latest(tmp_path))
  assert whole.folder.name == "step_00000001" and not checkpoint.find_damage(whole.folder)
  np.testing.assert_array_equal(whole.params["w"], np.arange(2.0**16).reshape(256, 256))
  assert len(list(whole.folder.glob("train_state/data_*.json"))) == 2
