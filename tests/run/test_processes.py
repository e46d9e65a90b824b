"""Training in several processes: the run of one process, also where processes come and go."""

import contextlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from mooer_jax import checkpoint
from mooer_jax.run import start as start_of_runs
from tests.run.conftest import CMVN_BATCHES, small_overrides
from tests.run.programs import evaluate, perplexity, train
from tests.run.runs import assert_close_run, assert_same_run, losses, rows

STREAMS = "--config.data.streams=4"
# A model with LoRA, and text after the speech, which perplexity needs.
CHAT = """from configs import tiny

def get_config():
  config = tiny.get_config()
  config.characters = "0123456789USER: AINT\\n"
  config.model.chat_template = "vicuna"
  config.model.prompts.asr = "<SpeechHere>"
  config.model.llm.update(vocab_size=24, lora_rank=2, lora_targets=("q",))
  return config
"""


@pytest.fixture(autouse=True)
def the_cmvn_of_the_processes(little_beside_the_steps, monkeypatch):
  """The run of this process, which they are compared with, measures it as they do."""
  monkeypatch.setattr(start_of_runs, "CMVN_BATCHES", CMVN_BATCHES)


@pytest.fixture
def start(repo_root, as_flags, plain_env, tmp_path):
  """Starts the processes of a run, which together have four devices and print to files.

  `places` are beginnings of their commands, such as the namespaces that they run in.
  """
  started = []

  def begin(
    name, processes, *flags,
    program="train.py", config="configs/tiny.py", address="localhost", places=None,
  ):  # fmt: skip
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    count = "--xla_force_host_platform_device_count="
    xla_flags = re.sub(rf"{count}\d+", f"{count}{4 // processes}", os.environ["XLA_FLAGS"])
    env = {**plain_env, "XLA_FLAGS": xla_flags, "TMPDIR": str(tmp_path)}
    env |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    command = [sys.executable, program, f"--config={config}", *as_flags, STREAMS]
    command += [f"--config.workdir={tmp_path / name}", "--config.train.save_every=2"]
    if processes > 1:
      command += [f"--coordinator={address}:{port}", f"--num_processes={processes}"]
    run = []
    for n in range(processes):
      place = places[n] if places else []
      own = [f"--process_id={n}"] if processes > 1 else []
      log = tmp_path / f"log{len(started)}"
      with log.open("w") as file:
        process = subprocess.Popen(
          [*place, *command, *flags, *own],
          cwd=repo_root, env=env, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
      process.log = log
      started.append(process)
      run.append(process)
    return run

  yield begin
  for process in started:
    process.kill()
    process.wait()


def ended(run, seconds=300):
  """Outputs and exit statuses of processes that end by themselves."""
  deadline = time.monotonic() + seconds
  statuses = [process.wait(timeout=deadline - time.monotonic()) for process in run]
  return [process.log.read_text() for process in run], statuses


def wait_for_step(workdir, step, run):
  deadline = time.monotonic() + 300
  while (newest := checkpoint.latest(workdir)) is None or checkpoint.step_of(newest) < step:
    assert time.monotonic() < deadline and all(process.poll() is None for process in run)
    time.sleep(0.05)


@pytest.mark.all_devices
@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(start, config, bucket, tmp_path, monkeypatch):
  """The second gets SIGTERM. The losses and weights are those of one process with four devices.

  Steps above the mean loss are skipped, and the workdir is restored from its mirror.
  """
  one, two = tmp_path / "one", tmp_path / "two"
  limits = {"max_bad_steps": 1000, "max_loss_ratio": 1.0001}
  mirror = f"{bucket}/runs/two"
  flags = [
    f"--config.train.{name}={value}" for name, value in (limits | {"mirror": mirror}).items()
  ]
  # The losses vary as the batches do, so some of the first six are above their mean.
  run = start("two", 2, "--config.train.steps=1000", "--config.optimizer.peak_lr=1e-6", *flags)
  wait_for_step(two, 6, run)
  run[1].send_signal(signal.SIGTERM)
  outputs, statuses = ended(run)
  assert statuses == [0, 0] and "rerun the same command to resume" in outputs[0], outputs
  assert "saved" not in outputs[1] and "loss" not in outputs[1]
  stopped = checkpoint.step_of(checkpoint.latest(two))
  assert [step for step, _ in losses(two)] == list(range(1, stopped + 1))
  devices = jax.devices()[:4]
  monkeypatch.setattr(jax, "devices", lambda *_: devices)
  shutil.rmtree(two)
  config.train.update(limits)
  config.optimizer.peak_lr = 1e-6
  config.data.streams, config.train.save_every, config.train.steps = 4, 2, stopped + 2
  for workdir, config.train.mirror in ((one, ""), (two, mirror)):
    config.workdir = str(workdir)
    train(config)
  assert_close_run(one, two)
  assert any("bad_steps" in row for row in rows(two)[:6])
  for ours, theirs in zip(rows(one), rows(two), strict=True):
    assert ours["audio_s"] == pytest.approx(theirs["audio_s"], abs=2e-3)  # float32 sums


@pytest.fixture
def annotated(clips, tmp_path):
  """An annotation file of the clips, which name the task."""
  entries = [{"path": str(clip.path), "text": clip.text, "task": "asr"} for clip in clips]
  (tmp_path / "clips.json").write_text(json.dumps({"annotation": entries}), "utf-8")
  return tmp_path / "clips.json"


@pytest.fixture
def trained(data_list, tmp_path):
  """The config CHAT in chat.py, and a run with it, of one process."""
  (tmp_path / "chat.py").write_text(CHAT)
  config = runpy.run_path(str(tmp_path / "chat.py"))["get_config"]()
  config.update(small_overrides(data_list))
  config.workdir = str(tmp_path / "trained")
  train(config)
  return config


@pytest.mark.nightly  # tests/run/test_evaluate.py has the shares of several processes
def test_two_processes_evaluate_as_one(start, trained, tmp_path):
  """They write the same hypotheses and rates."""
  flags = [f"--checkpoint={trained.workdir}", "--config.eval.batch_size=4"]
  run = start(
    "two",
    2,
    *flags,
    f"--config.eval.out={tmp_path / 'two'}",
    program="eval.py",
    config=tmp_path / "chat.py",
  )
  trained.eval.out = str(tmp_path / "one")
  evaluate(trained, trained.workdir)
  outputs, statuses = ended(run)
  assert statuses == [0, 0], outputs
  assert "hypotheses and reports in" in outputs[0] and "hypotheses" not in outputs[1]
  one, two = ((tmp_path / name) for name in ("one", "two"))
  assert (one / "text").read_text() == (two / "text").read_text()
  ours, theirs = (json.loads((path / "report.json").read_text()) for path in (one, two))
  for report in (ours, theirs):
    del report["details"]["decode_seconds_with_compilation"]
  assert ours == theirs


@pytest.mark.nightly
def test_several_processes_measure_the_perplexities_of_one(start, trained, tmp_path, annotated):
  flags = [f"--checkpoint={trained.workdir}", "--mode=perplexity"]
  flags += [f"--config.eval.shards={annotated}"]
  run = start(
    "two",
    2,
    *flags,
    f"--config.eval.out={tmp_path / 'two'}",
    program="eval.py",
    config=tmp_path / "chat.py",
  )
  outputs, statuses = ended(run)
  assert statuses == [0, 0], outputs
  trained.eval.out, trained.eval.shards = str(tmp_path / "one"), str(annotated)
  expected = perplexity(trained, [trained.workdir])
  found = json.loads((tmp_path / "two" / "perplexity.json").read_text())
  assert len(found) == len(expected) > 0
  for row, one in zip(found, expected):
    assert row["perplexity"] == pytest.approx(one.perplexity, rel=1e-4)
    assert row["tokens"] == one.tokens


@pytest.mark.nightly
def test_two_processes_generate_the_answers_of_activation_tuning_as_one(
  start, trained, tmp_path, annotated
):
  flags = [
    f"--config.init_from={checkpoint.latest(trained.workdir)}", "--config.activation.review=True",
    f"--config.activation.shards={annotated}", "--config.activation.task=asr",
    "--config.train.cmvn=", "--config.activation.clips=5",
  ]  # fmt: skip
  answers = []
  for name, processes in ("two", 2), ("one", 1):
    outputs, statuses = ended(start(name, processes, *flags, config=tmp_path / "chat.py"))
    assert not any(statuses), outputs
    assert "edit " in outputs[0] and "edit " not in "".join(outputs[1:])
    answers.append(json.loads((tmp_path / name / "activation.json").read_text())["annotation"])
  assert answers[0] == answers[1] and answers[0]


@pytest.mark.nightly
def test_several_processes_share_the_feature_cache(start, trained, tmp_path, annotated):
  """Fine-tunes with it have the losses of one process, which reads what they have cached.

  So have their evaluators.
  """
  flags = [
    f"--config.init_from={checkpoint.latest(trained.workdir)}", "--config.train.cmvn=",
    "--config.trainable=connector/.*", f"--config.data.cache_features={tmp_path / 'cache'}",
    f"--config.perplexity.shards={annotated}", "--config.perplexity.every=2",
    "--config.train.steps=4",
  ]  # fmt: skip
  for name, processes in ("two", 2), ("one", 1):
    outputs, statuses = ended(start(name, processes, *flags, config=tmp_path / "chat.py"))
    assert not any(statuses), outputs
    assert ("encoded" in outputs[0]) == (name == "two")
  assert [*(tmp_path / "cache").glob("*/process1/index.jsonl")]
  assert_close_run(tmp_path / "one", tmp_path / "two")
  ours, theirs = (
    json.loads((tmp_path / name / "perplexity.json").read_text()) for name in ("one", "two")
  )
  assert [row["perplexity"] for row in ours] == pytest.approx(
    [row["perplexity"] for row in theirs], rel=1e-4
  )


@pytest.mark.nightly
def test_a_run_goes_on_in_other_numbers_of_processes(start, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  for name, processes, steps in (
    ("two", 2, 3), ("two", 4, 5), ("two", 1, 7), ("one", 1, 3), ("one", 4, 7),
  ):  # fmt: skip
    outputs, statuses = ended(start(name, processes, f"--config.train.steps={steps}"))
    assert not any(statuses), outputs
  assert_close_run(one, two)


LOST = ("the connection to another process is lost", "another task died", "was killed")


def workers_of(folder):
  """Processes that were started with this folder of temporary files."""
  found = []
  for process in Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      if f"TMPDIR={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
        found.append(process.name)
  return found


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [0, 1])
def test_after_kills_at_random_moments_the_job_resumes(start, tmp_path, workers):
  """Twenty in all, while it restores, trains and saves; the others end with a message."""
  rng = random.Random(workers)
  flags = ["--config.train.save_every=1", f"--config.data.workers={workers}"]
  flags += ["--config.data.streams=2"] * bool(workers)  # a worker needs a shard of its own
  for _ in range(10):
    run = start("run", 2, *flags, "--config.train.steps=1000")
    while not re.search("are trained|resuming from", run[0].log.read_text()):
      assert all(process.poll() is None for process in run), run[0].log.read_text()
      time.sleep(0.05)
    time.sleep(rng.uniform(0, 8))
    victim = rng.randrange(2)
    run[victim].kill()
    killed = time.monotonic()
    outputs, statuses = ended(run, seconds=60)
    assert statuses[1 - victim] != 0 and time.monotonic() - killed < 60
    assert any(said in outputs[1 - victim] for said in LOST), outputs[1 - victim]
    while left := workers_of(tmp_path):
      assert time.monotonic() - killed < 90, left
      time.sleep(0.1)
  newest = checkpoint.latest(tmp_path / "run")
  steps = (checkpoint.step_of(newest) if newest else 0) + 3
  for name in ("run", "whole"):
    outputs, statuses = ended(start(name, 2, *flags, f"--config.train.steps={steps}"))
    assert statuses == [0, 0], outputs
  assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def two_hosts():
  """(beginnings of commands, address of the first) of two network namespaces, and a link."""
  if os.geteuid() or not shutil.which("ip"):
    pytest.skip("no network namespaces: they need root and iproute2")
  names = [f"mooer-jax-{os.getpid()}-{n}" for n in range(2)]

  def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)

  try:
    for name in names:
      ip("netns", "add", name)
    ip("link", "add", "v0", "netns", names[0], "type", "veth", "peer", "v1", "netns", names[1])
    for n, name in enumerate(names):
      ip("-n", name, "address", "add", f"10.77.0.{n + 1}/24", "dev", f"v{n}")
      for device in (f"v{n}", "lo"):
        ip("-n", name, "link", "set", device, "up")
      hosts_file = Path("/etc/netns") / name / "hosts"  # in the namespace, it is /etc/hosts
      hosts_file.parent.mkdir(parents=True)
      hosts_file.write_text(f"127.0.0.1 localhost\n10.77.0.{n + 1} {socket.gethostname()}\n")
    places = [["ip", "netns", "exec", name] for name in names]
    yield places, "10.77.0.1", lambda: ip("-n", names[1], "link", "set", "v1", "down")
  finally:
    for name in names:
      subprocess.run(["ip", "netns", "delete", name])
      shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


@pytest.mark.nightly
def test_hosts_with_networks_of_their_own_train_as_one_process(start, tmp_path, two_hosts):
  """Then the link between them is cut: both end with a message, and one process goes on."""
  places, address, cut = two_hosts
  run = start("two", 2, "--config.train.steps=1000", address=address, places=places)
  wait_for_step(tmp_path / "two", 2, run)
  cut()
  outputs, statuses = ended(run, seconds=60)
  assert all(statuses)
  for output in outputs:
    assert any(said in output for said in LOST), output
  steps = checkpoint.step_of(checkpoint.latest(tmp_path / "two")) + 2
  for name in ("one", "two"):
    assert ended(start(name, 1, f"--config.train.steps={steps}"))[1] == [0]
  assert_close_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.nightly
def test_data_that_are_bad_for_one_process_stop_all_and_are_recorded(start, tmp_path, data_list):
  folder = tmp_path / "bad"
  folder.mkdir()
  for number, line in enumerate(Path(data_list).read_text().split()):
    content = (Path(data_list).parent / line).read_bytes()
    (folder / f"s{number}.tar").write_bytes(content if number != 2 else content[:1024])
  (folder / "data.list").write_text("".join(f"s{n}.tar\n" for n in range(4)))
  flags = [f"--config.data.shards={folder}/data.list", "--config.train.steps=4"]
  outputs, statuses = ended(start("run", 2, *flags), seconds=120)
  assert all(statuses)
  assert "another process failed" in outputs[0] and "damaged: " in outputs[1], outputs
  lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
  skipped = [json.loads(line) for line in lines]
  assert "bad shard" in {row["cause"] for row in skipped}
  assert {Path(row["shard"]).name for row in skipped} == {"s2.tar"}


FULL_DISK = """import jax
from mooer_jax.checkpoint import writing
from mooer_jax.programs.train import main

def start_write(trees, start=writing.arrays.start_write):
  finish = start(trees)
  fails = jax.process_index() == VICTIM and "00000002" in str([*trees])
  return (lambda: open("/dev/full", "w").write("x" * 2**20)) if fails else finish

writing.arrays.start_write = start_write
main()
"""


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [0, 1])
def test_a_save_that_fails_in_one_process_ends_all_soon(start, tmp_path, victim):
  """With its reason, after all have saved their last state."""
  (tmp_path / "program.py").write_text(FULL_DISK.replace("VICTIM", str(victim)))
  run = start("run", 2, "--config.train.steps=100000", program=str(tmp_path / "program.py"))
  run[0].wait(300)
  outputs, statuses = ended(run, seconds=5)  # less than hosts.HEARTBEAT_S
  assert statuses == [2, 2], outputs
  for n, output in enumerate(outputs):
    assert "No space left on device" in output, output
    assert (f"process {victim} failed: SaveError" in output) == (n != victim), output
  assert checkpoint.step_of(checkpoint.latest(tmp_path / "run")) > 2
