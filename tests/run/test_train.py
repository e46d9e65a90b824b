"""Training as a user meets it: resumed after a kill, stopped by hand, stopped by a NaN."""

import gzip
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mooer_jax import checkpoint, sharding, storage, tree
from mooer_jax.audio.cmvn import write_mvn
from mooer_jax.data.utterances import BadDataError
from mooer_jax.run import monitor
from mooer_jax.training.step import BadStepError
from tests import forked
from tests.numerics import assert_within, exceeds_the_bound, rounding
from tests.run.conftest import DRAW_CURVE
from tests.run.programs import evaluate, train


def losses(workdir) -> list[tuple[int, float]]:
  rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  return [(row["step"], row["loss"]) for row in rows]


def command(repo_root, workdir, as_flags, *more):
  return [
    str(repo_root / "train.py"), "--config=" + str(repo_root / "configs/tiny.py"),
    f"--config.workdir={workdir}", *as_flags, *more,
  ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(repo_root, as_flags, plain_env, tmp_path):
  """Killed, resumed and stopped by SIGTERM, it is where a run is that nothing has stopped."""
  where = dict(cwd=repo_root, env=plain_env, out=tmp_path)
  broken = tmp_path / "broken"
  saved = 0
  for how in (signal.SIGKILL, signal.SIGTERM):
    # Long enough that the signal finds it at work.
    program = forked.Program(
      command(repo_root, broken, as_flags, "--config.train.steps=100000"), **where
    )
    deadline = time.monotonic() + 300
    while checkpoint.latest(broken) is None or _step(broken) < saved + 4:
      assert program.process.is_alive(), program.wait().stderr
      assert time.monotonic() < deadline
      time.sleep(0.02)
    os.kill(program.process.pid, how)
    done = program.wait()
    saved = _step(broken)
    if how == signal.SIGTERM:
      assert done.returncode == 0 and "rerun the same command to resume" in done.stdout
    else:
      assert done.returncode == -signal.SIGKILL
  flags = command(repo_root, tmp_path / "whole", as_flags, f"--config.train.steps={saved}")
  assert forked.run(flags, **where).returncode == 0
  assert losses(broken) == losses(tmp_path / "whole")
  assert [step for step, _ in losses(broken)] == list(range(1, saved + 1))
  ours, theirs = (
    tree.flatten(checkpoint.load(checkpoint.latest(tmp_path / name)).params)
    for name in ("broken", "whole")
  )
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def _step(workdir) -> int:
  return int(checkpoint.latest(workdir).name.removeprefix("step_"))


@pytest.mark.all_devices
def test_training_learns_and_leaves_what_it_promises(config, monkeypatch):
  monkeypatch.setattr(monitor, "draw_curve", DRAW_CURVE)
  config.train.steps = 60
  config.train.save_every = 30
  folder = train(config)
  curve = [loss for _, loss in losses(config.workdir)]
  assert len(curve) == 60
  assert np.mean(curve[-5:]) < 0.5 * np.mean(curve[:5])
  work = Path(config.workdir)
  assert folder.name == "step_00000060"
  assert (work / "loss.png").stat().st_size > 5000
  assert list((work / "tensorboard").glob("events*"))
  assert {f.name for f in folder.iterdir()} >= {
    "config.json", "generation.json", "tokenizer", "weights", "train_state"
  }  # fmt: skip
  cmvn = checkpoint.load(folder).params["frontend"]["sanm"]
  assert np.abs(np.asarray(cmvn["shift"])).min() > 1  # measured, not the identity


def test_only_the_trainable_part_moves_and_is_saved_beside_a_pointer(config, tmp_path):
  config.train.steps = 4
  base = train(config)
  config.init_from = str(base)
  config.workdir = str(tmp_path / "tuned")
  config.trainable = ("connector/.*",)
  config.train.cmvn = ""
  folder = train(config)
  assert not (folder / "weights").exists() and (folder / "trainable").exists()
  before, after = (tree.flatten(checkpoint.load(f).params) for f in (base, folder))
  moved = {path for path in after if not np.array_equal(before[path], after[path])}
  assert moved == {path for path in after if path.startswith("connector/")}


@pytest.mark.slow
def test_augmented_mixtures_resume_and_leave_the_cmvn_as_it_is(config, clips, tmp_path):
  (tmp_path / "noise.txt").write_text("".join(f"{clip.path}\n" for clip in clips), "utf-8")
  shards = config.data.shards
  config.data.shards = ""
  config.data.mixture = {"all": {"shards": shards, "weight": 2.0}, "twice": {"shards": shards}}
  config.train.steps, config.train.save_every = 2, 2
  plain = checkpoint.load(train(config)).params["frontend"]
  config.data.augment.update(
    {"speed": (0.9, 1.1), "noise": str(tmp_path / "noise.txt"), "time_masks": 1, "freq_masks": 1}
  )
  for name, stops in (("broken", (2, 4)), ("whole", (4,))):
    config.workdir = str(tmp_path / name)
    for config.train.steps in stops:
      folder = train(config)
  assert losses(tmp_path / "broken") == losses(tmp_path / "whole") != losses(tmp_path / "run")
  for path, leaf in tree.flatten(checkpoint.load(folder).params["frontend"]).items():
    np.testing.assert_array_equal(leaf, tree.flatten(plain)[path])


def test_a_run_that_is_done_says_so_and_does_nothing(config, capsys):
  config.train.steps = 4
  folder = train(config)
  capsys.readouterr()
  assert train(config) == folder
  said = capsys.readouterr()
  assert "all train.steps=4 are done" in said.out and "compiled" not in said.err


def test_a_fine_tune_that_trains_everything_stands_alone(config, tmp_path):
  config.train.steps = 4
  base = train(config)
  config.init_from, config.train.cmvn = str(base), ""
  config.workdir = str(tmp_path / "tuned")
  folder = train(config)
  assert checkpoint.describe(folder).base is None
  base.rename(tmp_path / "gone")
  config.init_from, config.train.cmvn, config.train.steps = "", "estimate", 6
  assert train(config).name == "step_00000006"


def test_an_utterance_that_cannot_be_used_is_counted_once(config):
  config.train.steps = 12  # four epochs
  config.characters = "012345678"
  config.model.llm.vocab_size = 11
  train(config)
  rows = (Path(config.workdir) / "skipped.jsonl").read_text().splitlines()
  assert rows and len(rows) == len({json.loads(row)["key"] for row in rows})


@pytest.mark.parametrize("cmvn", ["estimate", "file"])
def test_a_run_that_stops_for_bad_data_records_the_utterances(config, clips, tmp_path, cmvn):
  if cmvn == "file":  # the first batches are read by the training loop
    config.train.cmvn = str(tmp_path / "am.mvn")
    write_mvn(config.train.cmvn, np.zeros(560, np.float32), np.ones(560, np.float32))
  config.characters = "0"
  config.model.llm.vocab_size = 3
  with pytest.raises(BadDataError, match=f"unknown character {4 * len(clips)}"):
    train(config)
  with (Path(config.workdir) / "skipped.jsonl").open() as file:
    rows = [json.loads(line) for line in file]
  assert len({row["key"] for row in rows}) == len(rows) == 4 * len(clips)
  assert {row["cause"] for row in rows} == {"unknown character"}


@pytest.mark.parametrize("skipped", [0, 2])
def test_a_nan_stops_the_run_and_names_the_step(config, skipped, capsys):
  config.train.max_bad_steps = skipped
  config.optimizer.peak_lr = 1e30
  config.optimizer.warmup_steps = 0
  config.optimizer.max_grad_norm = 0.0
  with pytest.raises(BadStepError, match=r"peak_lr") as error:
    train(config)
  finite = np.isfinite([loss for _, loss in losses(config.workdir)])
  assert error.value.step == len(finite) + 1
  assert finite[: len(finite) - skipped].all() and not finite[len(finite) - skipped :].any()
  assert capsys.readouterr().err.count(" skipped: loss") == skipped


def test_a_run_that_skips_steps_resumes_bit_for_bit_from_its_mirror(config, bucket, tmp_path):
  """Its workdir is lost. A loss above the running mean is skipped, so all follows from the mean."""
  config.train.update({"max_bad_steps": 8, "max_loss_ratio": 1.0001})
  config.optimizer.peak_lr = 1e-6  # the losses vary as the batches do
  config.train.mirror = f"{bucket}/runs/mirrored"
  folders, records = [], []
  for stops, name in (((8,), "whole"), ((4, 8), "lost")):
    config.workdir = str(tmp_path / name)
    for config.train.steps in stops:
      shutil.rmtree(config.workdir, ignore_errors=True)
      folders.append(train(config))
    records.append((Path(config.workdir) / "metrics.jsonl").read_text())
    storage.delete(config.train.mirror)
  assert records[0] == records[1]
  rows = [json.loads(line) for line in records[0].splitlines()]
  assert [row["step"] for row in rows] == [*range(1, 9)] and "mean_loss" in rows[0]
  assert any("bad_steps" in row for row in rows[4:])
  train(config)  # it is complete, but its last copy is not
  assert storage.is_file(f"{config.train.mirror}/{folders[-1].name}/checkpoint.json")
  one, *_, other = (checkpoint.load(folder).params for folder in folders)
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
  "option, value, message",
  [
    ("mirror", "runs/mirrored", "train.mirror=runs/mirrored: must be a URL"),
    ("max_bad_steps", -1, "train.max_bad_steps=-1: must be at least 0"),
    ("max_loss_ratio", 1.0, "train.max_loss_ratio=1: must be above 1"),
  ],
)
def test_a_value_that_makes_no_sense_is_refused(config, option, value, message):
  config.train[option] = value
  with pytest.raises(ValueError, match=message):
    train(config)


@pytest.mark.nightly  # tests/training/test_composite.py compares steps on a mesh
@pytest.mark.all_devices
def test_the_mesh_changes_no_loss(config, monkeypatch):
  """The whole program, data to metrics: 2 x 2 x 2 devices against one, the first 5 losses.

  A third run, with a learning rate that is too high by a tenth, must differ.
  """
  assert len(jax.devices()) == 8
  monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 0)  # else none of these small leaves is split
  config.train.steps = 5
  curves = []
  peak_lr = config.optimizer.peak_lr
  for sizes, devices, lr in (
    ({"data": 1}, jax.devices()[:1], peak_lr),
    ({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices(), peak_lr),
    ({"data": 1}, jax.devices()[:1], 1.1 * peak_lr),
  ):
    monkeypatch.setattr(jax, "devices", lambda *_, devices=devices: devices)
    config.mesh.update({"fsdp": 1, "tensor": 1, **sizes})
    config.optimizer.peak_lr = lr
    config.workdir += "x"
    train(config)
    curves.append([loss for _, loss in losses(config.workdir)])
  # The longest sums, over the features, in each of three layers and five steps. Where Adam turns a
  # rounding into a share of the learning rate, the gradient is near 0, and so is its effect.
  bound = rounding(560 * 3 * 5, max(curves[0]))
  assert_within(curves[1], curves[0], bound)
  with exceeds_the_bound():
    assert_within(curves[2], curves[0], bound)


@pytest.mark.all_devices
@pytest.mark.parametrize(
  "change, message",
  [
    ({"train": {"gradient_accumulation_steps": 3}}, "train.gradient_accumulation_steps=3"),
    ({"model": {"llm": {"vocab_size": 5}}}, "llm.vocab_size"),
    ({"model": {"sanm": {"heads": 3}}}, "sanm.heads"),
    ({"data": {"max_s": 11.0}}, "max_s"),
    ({"data": {"shards": "nowhere/data.list"}}, "nowhere"),
    ({"trainable": ("conector/.*",)}, "conector"),
    ({"data": {"task": "ast"}}, "ast"),
    ({"compute": {"dtype": "float16"}}, "float16"),
    ({"compute": {"quantization": "int8"}}, "quantization='int8' is for decoding"),
    ({"train": {"steps": 1001}, "optimizer": {"decay": "cosine"}}, "total_steps=1000"),
    (
      {"mesh": {"data": 1, "fsdp": 8}, "data": {"batch_size": 12, "shuffle_buffer_size": 24}},
      "multiple of 8",
    ),
    ({"trainable": ("connector/.*",)}, "random and frozen"),
    ({"train": {"cmvn": ""}}, r"train\.cmvn=''.*'estimate'"),
    ({"generation": {"max_new_tokens": 7}}, r"max_new_tokens=7 would truncate .* 8"),
    ({"perplexity": {"instructions": ("asrr",)}}, "asrr"),
  ],
)
def test_bad_configs_fail_before_training_by_name(config, change, message):
  config.update(change)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    train(config)
  assert not list(Path(config.workdir).glob("step_*"))


def test_bad_shards_are_found_before_the_weights_are_loaded(config, monkeypatch):
  config.data.shards = "nowhere/data.list"
  monkeypatch.setattr("mooer_jax.run.train.initial_params", lambda *_, **__: pytest.fail("loaded"))
  with pytest.raises(FileNotFoundError, match="nowhere"):
    train(config)


def test_there_is_one_seed(config):
  with config.unlocked():
    config.data.seed = 3
  with pytest.raises(ValueError, match=r"set config\.seed"):
    train(config)


def test_a_flag_for_a_key_that_does_not_exist_is_one_line(repo_root, plain_env, tmp_path):
  flags = command(repo_root, tmp_path / "run", ["--config.data.wrkers=2"])
  process = forked.run(flags, cwd=repo_root, env=plain_env, out=tmp_path)
  assert process.returncode == 2
  (line,) = process.stderr.splitlines()
  assert "no config key 'wrkers' for --config.data.wrkers=2; did you mean 'workers'?" in line


def test_a_flag_sets_what_the_file_leaves_at_its_default(repo_root, plain_env, as_flags, tmp_path):
  flags = command(repo_root, tmp_path / "run", as_flags, "--config.optimizer.weight_decay=-1.0")
  process = forked.run(flags, cwd=repo_root, env=plain_env, out=tmp_path)
  assert "optimizer.weight_decay=-1.0: must be finite in float32, not negative" in process.stderr


def test_a_fine_tune_starts_from_a_checkpoint_not_from_a_run(config, tmp_path):
  config.train.steps = 4
  folder = train(config)
  config.init_from, config.workdir = config.workdir, str(tmp_path / "tuned")
  config.train.cmvn = ""
  with pytest.raises(ValueError, match=f"name the checkpoint: {folder}"):
    train(config)


def test_the_config_cannot_name_other_characters_than_the_checkpoint_has(config, tmp_path):
  config.train.steps = 4
  config.init_from = str(train(config))
  config.train.cmvn = ""
  config.workdir = str(tmp_path / "tuned")
  config.characters = "ABC"
  with pytest.raises(ValueError, match=r"config\.characters.*another tokenizer"):
    train(config)
  config.characters = ""
  assert train(config).is_dir()


def test_a_fine_tune_of_a_url_is_resumed_and_evaluated_without_its_base_here(
  config, bucket, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  config.train.steps = 4
  base = train(config)
  url = f"{bucket}/runs/base/{base.name}"
  for file in filter(Path.is_file, base.rglob("*")):
    storage.upload(file, f"{url}/{file.relative_to(base)}")
  shutil.rmtree(base.parent)
  config.init_from, config.train.cmvn = url, ""
  config.workdir, config.trainable = str(tmp_path / "tuned"), ("connector/.*",)
  train(config)
  config.train.steps = 8
  shutil.rmtree(tmp_path / "cache")
  assert train(config).name == "step_00000008"
  shutil.rmtree(tmp_path / "cache")
  scores, _ = evaluate(config, config.workdir)
  assert scores["character"].utterances
  shutil.rmtree(tmp_path / "cache")
  config.eval.out = ""
  with pytest.raises(ValueError, match=f"{url} is a URL; set the output folder"):
    evaluate(config, url)
  assert not (tmp_path / "cache").exists()
  config.init_from = f"{bucket}/runs/base"
  with pytest.raises(ValueError, match=f"runs/base is the folder of a run; .*: {url}"):
    train(config)


def test_a_fine_tune_whose_base_moved_is_resumed_and_evaluated_from_where_it_is(config, tmp_path):
  config.train.steps = 4
  base = train(config)
  config.init_from = str(base)
  config.train.cmvn = ""
  config.workdir = str(tmp_path / "tuned")
  config.trainable = ("connector/.*",)
  train(config)
  moved = tmp_path / "elsewhere"
  base.rename(moved)
  config.train.steps = 8
  config.init_from = ""
  config.train.cmvn = "estimate"
  with pytest.raises(FileNotFoundError, match="init_from"):
    train(config)
  config.train.cmvn, config.init_from = "", str(moved)
  folder = train(config)
  assert folder.name == "step_00000008"
  evaluate(config, str(folder))  # it points to where the base is now; the older one does not
  older = str(folder.with_name("step_00000004"))
  with pytest.raises(FileNotFoundError, match="--base"):
    evaluate(config, older)
  assert evaluate(config, older, base=str(moved))[0]["character"].utterances


def test_unknown_keys_and_sections_are_named_with_their_neighbours(config):
  with config.unlocked():
    config.optimiser = {"peak_lr": 1.0}
  with pytest.raises(ValueError, match=r"'optimiser'.*'optimizer'"):
    train(config)
  with config.unlocked():
    del config.optimiser
    config.optimizer.peak_lrr = 1.0
  with pytest.raises(ValueError, match=r"optimizer\.peak_lrr.*peak_lr"):
    train(config)


def test_a_checkpoint_of_another_model_is_refused(config, tmp_path):
  config.train.steps = 4
  config.init_from = str(train(config))
  config.train.cmvn = ""
  config.workdir = str(tmp_path / "other")
  config.model.sanm.layers = 3
  with pytest.raises(ValueError, match=r"layers is 2, in the config 3"):
    train(config)


def test_what_a_fine_tune_may_change_and_what_not(config, tmp_path):
  config.train.steps = 4
  config.init_from = str(train(config))
  config.train.cmvn = ""
  config.workdir = str(tmp_path / "tuned")
  config.model.llm.lora_rank = 4
  config.model.llm.lora_alpha = 4.0
  config.model.max_audio_s = 8.0
  config.trainable = ("decoder/.*/lora_[ab]",)
  folder = train(config)
  trained = checkpoint.describe(folder).trained
  assert trained and all("lora_" in path for path in trained)
  config.train.cmvn = "estimate"
  with pytest.raises(ValueError, match=r"train\.cmvn='estimate'.*init_from"):
    train(config)


def test_a_torn_last_line_of_the_metrics_does_not_stop_a_resume(config):
  config.train.steps = 4
  train(config)
  with (Path(config.workdir) / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')
  config.train.steps = 8
  train(config)
  assert [step for step, _ in losses(config.workdir)] == list(range(1, 9))


def test_a_trace_is_a_profile_of_three_steps(config, tmp_path):
  folder = tmp_path / "trace"
  config.train.steps = 4
  with pytest.raises(ValueError, match=r"profiles steps 3 to 5, but 4 are left; raise train"):
    train(config, trace=str(folder))
  config.train.steps = 6
  train(config, trace=str(folder))
  [profile] = folder.rglob("perfetto_trace.json.gz")
  assert json.loads(gzip.decompress(profile.read_bytes()))["traceEvents"]
  assert [*folder.rglob("*.xplane.pb")]
