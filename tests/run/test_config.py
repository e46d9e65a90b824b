"""Deprecated names of config keys still work, each with a message; bad flags are refused."""

import math
import types

import pytest

from configs import tiny
from mooer_jax import checkpoint
from mooer_jax.data.augment import AugmentConfig
from mooer_jax.data.config import DataConfig
from mooer_jax.run.config import SECTIONS, Run, renamed_keys
from mooer_jax.run.decoding import eval_data
from tests import forked

OLD = {
  "train.accumulation": 2,
  "train.keep": 5,
  "optimizer.grad_clip": 0.5,
  "data.window": 64,
  "data.cut_longer": True,
  "eval.cut_longer": True,
  "probe.every": 3,
}


@pytest.mark.parametrize("old, value", OLD.items())
def test_an_old_key_sets_the_new_one(old, value, capsys):
  config = tiny.get_config()
  section, name = old.split(".")
  if section not in config:
    config[section] = {}
  config[section][name] = value
  run = Run.read(config)
  assert f"{old.split('.')[0] if section == 'probe' else old}" in capsys.readouterr().err
  new = renamed_keys().get(old, old.replace("probe.", "perplexity."))
  section, name = new.split(".")
  assert getattr(getattr(run, section), name) == value


def test_every_old_name_is_tried():
  others = {key for key in renamed_keys() if "." in key and not key.startswith("model.")}
  assert others == OLD.keys() - {"probe.every"}
  assert DataConfig in SECTIONS.values()


def test_generation_options_of_a_run_go_over_deprecated_names_in_a_checkpoint(monkeypatch):
  config = tiny.get_config()
  config.init_from = "somewhere"
  config.generation.eos_token_id = (10,)
  saved = types.SimpleNamespace(generation={"eos_ids": [11], "num_beams": 2})
  monkeypatch.setattr(checkpoint, "describe", lambda folder: saved)
  options = Run.read(config).decoding_defaults()
  assert options.eos_token_id == (10,) and options.num_beams == 2
  config.generation.eos_ids = (12,)
  with pytest.raises(ValueError, match="both 'eos_token_id' and its deprecated name 'eos_ids'"):
    Run.read(config).decoding_defaults()


def test_evaluation_takes_neither_the_mixture_nor_the_augmentation_of_training():
  config = tiny.get_config()
  config.data.shards, config.data.augment.noise, config.eval.shards = "", "no/such/noise", "a.list"
  config.data.mixture = {"a": {"shards": "b.list", "weight": 2, "filter": "x == 1"}}
  run = Run.read(config)
  assert run.data.mixture["a"].weight == 2.0 and run.data.augment.noise == "no/such/noise"
  data = eval_data(run, run.eval, run.model)
  assert data.shards == "a.list" and not data.mixture and data.augment == AugmentConfig()


def test_blank_as_space_mark_is_read_as_space():
  config = tiny.get_config()
  config.eval.space_mark = "blank"
  assert Run.read(config).eval.space_mark == "space"


@pytest.mark.parametrize(
  "flag, message",
  [
    ("config.train.steps=2", "unexpected argument 'config.train.steps=2'"),
    ("--config.train.keep=0", "train.max_to_keep=0: must be at least 1"),
    ("--config.mesh.fsdp=nan", "--config.mesh.fsdp=nan: must be a whole number"),
    ("--config.optimizer.peak_lr=x", "--config.optimizer.peak_lr=x: must be a number"),
    ("--config.data.augment.speed=(0.9, 3.0)", "data.augment.speed=(0.9, 3.0): must be between"),
    ("--config.model.template=x", "model.chat_template='x': choose one of"),
    ("--config.model.llm.mlp_width=0", "llm.intermediate_size=0 must be positive"),
  ],
)
def test_what_a_flag_sets_is_checked(repo_root, plain_env, tmp_path, flag, message):
  command = ["train.py", "--config=configs/tiny.py", flag]
  done = forked.run(command, cwd=repo_root, env=plain_env, out=tmp_path)
  assert done.returncode == 2
  assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["keep", "max_to_keep"])
def test_a_flag_is_not_overridden_by_an_old_name_in_the_file(repo_root, plain_env, tmp_path, name):
  old = tmp_path / "old.py"
  old.write_text(
    "from configs import tiny\n\ndef get_config():\n  config = tiny.get_config()\n"
    "  with config.unlocked():\n    config.train.keep = 3\n  return config\n"
  )
  command = ["train.py", f"--config={old}", f"--config.train.{name}=5"]
  done = forked.run(command, cwd=repo_root, env=plain_env, out=tmp_path)
  assert done.returncode == 2
  assert "sets train.keep, the deprecated name of train.max_to_keep" in done.stderr


@pytest.mark.parametrize(
  "flags, message",
  [
    (["a.wav"], "unexpected argument 'a.wav'"),
    (["--scales=1"], "--scales has no effect without --mode=perplexity or --mode=lora-sweep"),
    (["--annotations=a"], "--annotations has no effect without --suite"),
    (["--config.mesh.fsdp=3"], "mesh.fsdp=3, mesh.tensor=1: the product must be the number of"),
    (["--config.eval.metric=wer"], "eval.metric='wer': choose one of"),
    (["--config.eval.lora_scale=-1"], "eval.lora_scale=-1: must be at least 0"),
  ],
)
def test_eval_refuses_what_would_have_no_effect(repo_root, plain_env, tmp_path, flags, message):
  folder = tmp_path / "run" / "step_00000001"
  folder.mkdir(parents=True)
  (folder / "config.json").write_text("{}")
  command = ["eval.py", "--config=configs/tiny.py", f"--checkpoint={folder}"]
  command += [f"--config.eval.out={tmp_path}", *flags]
  done = forked.run(command, cwd=repo_root, env=plain_env, out=tmp_path)
  assert done.returncode == 2
  assert message in done.stderr + done.stdout


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("workdir", None, "workdir=None"),
    ("workdir", "", "workdir=''"),
    ("workdir", "~/run", "workdir=~/run: starts with ~, which the shell has not expanded"),
    ("eval.out", "s3://a/b", "eval.out=s3://a/b: is a URL; name a local path"),
    ("data.cache_features", "~/f", "data.cache_features=~/f: starts with ~"),
    ("compute.features", "gpu", "compute.features='gpu': choose one of 'host', 'device'"),
    ("optimizer.peak_lr", 1e300, "optimizer.peak_lr=1e.300: must be finite in float32"),
    ("init_from", 5, "init_from=5"),
    ("optimizer", None, r"optimizer=None \(NoneType\): expected a section"),
    ("generation", 5, "generation=5"),
    ("trainable", "lora", "trainable='lora'"),
    ("seed", -1, "seed=-1: must be between 0 and 2\\*\\*32 - 1"),
    ("seed", 10**20, "seed=100000000000000000000: must be between 0"),
    ("seed", 1.5, "seed=1.5"),
    ("optimizer.max_grad_norm", math.nan, "optimizer.max_grad_norm=nan: must be a finite number"),
    ("optimizer.peak_lr", math.inf, "optimizer.peak_lr=inf: must be a finite number"),
    ("activation.lora_scale", math.nan, "activation.lora_scale=nan: must be a finite number"),
    ("eval.max_s", math.inf, "eval.max_s=inf: must be a finite number"),
  ],
)
def test_a_wrong_type_or_range_is_named(key, value, message):
  config = tiny.get_config().to_dict()
  section, _, name = key.rpartition(".")
  (config[section] if section else config)[name] = value
  with pytest.raises(ValueError, match=message):
    Run.read(config)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("c.train.steps = 2.5", ":5: TypeError: Could not override field 'steps'"),
    ("c.data.buckets = 84", ":5: TypeError: Could not override field 'buckets'"),
    ("c.lock().foo = 1", ":5: no config key 'foo'"),
    ("c.seed = (", ":5: "),
    ("pass\ndel get_config", "c.py: the file must define get_config()"),
  ],
)
def test_an_error_in_a_config_file_is_one_line_with_the_place(
  repo_root, plain_env, tmp_path, line, message
):
  head = "from mooer_jax.run.config import default_config\n\ndef get_config():\n"
  body, _, after = line.partition("\n")
  content = f"{head}  c = default_config()\n  {body}\n  return c\n{after}\n"
  (tmp_path / "c.py").write_text(content)
  command = ["train.py", f"--config={tmp_path}/c.py"]
  done = forked.run(command, cwd=repo_root, env=plain_env, out=tmp_path)
  (text,) = done.stderr.splitlines()
  assert done.returncode == 2 and message in text and "c.py" in text
