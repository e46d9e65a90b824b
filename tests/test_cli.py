"""The command's errors: one line, exit status 2, and before any work that they would undo."""

import functools
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import mooer_jax.transcribe.transcriber
from mooer_jax import checkpoint, cli

ROWS = '[{"text": "earlier", "tokens": [1], "path": "a.wav"}]'


class Model:
  """Stands for a Transcriber; loading it fails in the way that it is told."""

  def __init__(self, error):
    self.error, self.loads, self.options = error, 0, {}

  def from_checkpoint(self, folder, **options):
    del folder
    self.loads += 1
    self.options = options
    raise self.error


def transcribe(monkeypatch, error, *arguments):
  model = Model(error)
  monkeypatch.setattr(mooer_jax.transcribe.transcriber, "Transcriber", model)
  return cli.main(["transcribe", "--checkpoint", "c", *arguments, __file__]), model.loads


@pytest.mark.parametrize(
  "error",
  [
    FileNotFoundError("c: no such checkpoint folder"),
    PermissionError(13, "Permission denied", "c/config.json"),
    IsADirectoryError(21, "Is a directory", "a.wav"),
    OSError(28, "No space left on device"),
    ValueError("c: cannot be read:\n  many\n  lines"),
  ],
  ids=lambda error: type(error).__name__,
)
def test_an_error_is_one_line_and_status_2(monkeypatch, capsys, error):
  assert transcribe(monkeypatch, error)[0] == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("mooer-jax transcribe: ")
  assert all(word in line for word in str(error).split())


def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch):
  with pytest.raises(ZeroDivisionError):
    transcribe(monkeypatch, ZeroDivisionError())


@pytest.mark.parametrize("flags, place", [([], "host"), (["--features", "device"], "device")])
def test_a_flag_says_where_features_are_computed(monkeypatch, flags, place):
  model = Model(ValueError("loaded"))
  monkeypatch.setattr(mooer_jax.transcribe.transcriber, "Transcriber", model)
  cli.main(["transcribe", "--checkpoint", "c", *flags, __file__])
  assert model.options["features"] == place


@pytest.mark.parametrize(
  "target, word", [("folder", "folder"), ("file/out.json", "file")], ids=["a-folder", "in-a-file"]
)
def test_a_json_target_that_cannot_be_written_fails_before_the_model_loads(
  monkeypatch, capsys, tmp_path, target, word
):
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").touch()
  status, loads = transcribe(monkeypatch, ValueError("loaded"), "--json", str(tmp_path / target))
  assert (status, loads) == (2, 0)
  (line,) = capsys.readouterr().err.splitlines()
  assert str(tmp_path / word) in line


def test_earlier_results_survive_a_failure(monkeypatch, tmp_path):
  target = tmp_path / "out.json"
  target.write_text(ROWS)
  assert transcribe(monkeypatch, ValueError("bad"), "--json", str(target)) == (2, 1)
  assert target.read_text() == ROWS


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"text": "a"}]', "[", "\xff"])
def test_a_file_that_holds_no_results_is_never_overwritten(monkeypatch, capsys, tmp_path, content):
  target = tmp_path / "config.json"
  target.write_text(content, "latin-1")
  assert transcribe(monkeypatch, ValueError("loaded"), "--json", str(target)) == (2, 0)
  assert "holds no results of transcribe" in capsys.readouterr().err
  assert target.read_text("latin-1") == content


def test_nothing_is_written_into_a_checkpoint(monkeypatch, capsys, tmp_path):
  (tmp_path / "checkpoint.json").touch()
  for name in ("new.json", "weights/new.json"):
    given = ["--json", str(tmp_path / name)]
    assert transcribe(monkeypatch, ValueError("loaded"), *given) == (2, 0)
    assert f"is in the checkpoint {tmp_path.resolve()}" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]


def test_a_closed_stdin_is_an_error_before_the_model_loads(monkeypatch, capsys):
  monkeypatch.setattr(sys, "stdin", None)
  assert transcribe(monkeypatch, ValueError("loaded"), "-") == (2, 0)
  assert "stdin) is closed" in capsys.readouterr().err


def test_a_json_target_is_not_left_behind_empty_when_the_run_fails(monkeypatch, tmp_path):
  target = tmp_path / "new" / "out.json"
  assert transcribe(monkeypatch, ValueError("no model"), "--json", str(target)) == (2, 1)
  assert not target.exists()


def test_convert_is_passed_on_to_the_converters(tmp_path, plain_env, repo_root):
  """In a wheel convert/ lies inside mooer_jax/; here a copy of both stands for it."""
  shutil.copytree(repo_root / "mooer_jax", tmp_path / "lib" / "mooer_jax")
  shutil.copytree(repo_root / "convert", tmp_path / "lib" / "mooer_jax" / "convert")
  save_file({"model.norm.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
  run = functools.partial(
    subprocess.run,
    env={**plain_env, "PYTHONPATH": str(tmp_path / "lib")},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  command = [sys.executable, "-m", "mooer_jax.cli", "convert"]
  done = run([*command, "inspect", "model.safetensors"])
  assert done.returncode == 0, done.stderr
  assert "model.norm.weight" in done.stdout and "kind: llama" in done.stdout
  done = run([*command, "inspect", "nowhere"])
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "mooer-jax convert inspect: nowhere: no such file or folder\n"


def test_an_installation_without_the_converters_says_so(monkeypatch, capsys):
  def absent(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name="mooer_jax.convert")

  monkeypatch.setattr(cli.importlib, "import_module", absent)
  assert cli.main(["convert", "inspect", "x"]) == 2
  assert "python -m convert" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("path", "fault"),
  [("s3://bucket/x", "is a URL; name a local path"), ("~/x", "starts with ~, which the shell has")],
)
@pytest.mark.parametrize(
  "command",
  [
    "transcribe --checkpoint c --json URL a.wav",
    "pack --wav-scp URL --text text --out out",
    "pack --wav-scp wav.scp --text text --out URL",
    "data prepare data.list --out URL",
    "data stats data.list --json URL",
    "checkpoint verify URL",
  ],
)
def test_a_url_where_a_path_is_needed_is_refused(
  command, path, fault, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match="2"):
    cli.main(command.replace("URL", path).split())
  assert f"{path}: {fault}" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())  # such as a folder "s3:"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["transcribe", "--checkpoint=x", "--num_beams", "3", "a"], "did you mean --num-beams?"),
    (
      ["data", "stats", "x", "--jsn=y"],
      "mooer-jax data stats: error: unrecognized arguments",
    ),
    (["convert", "inspect", "x", "--shrt"], "--shrt; did you mean --short?"),
  ],
)
def test_an_unknown_flag_is_refused_with_the_name_of_a_similar_one(capsys, arguments, message):
  from convert.main import main as convert

  with pytest.raises(SystemExit) as exit_:
    convert(arguments[1:]) if arguments[0] == "convert" else cli.main(arguments)
  assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_base_of_a_checkpoint_without_one_is_refused(tmp_path, capsys):
  folder = checkpoint.save(
    tmp_path / "step_00000001", params={"a": np.zeros(3)}, config_json={}, generation={},
    tokenizer=lambda out: None,
  )  # fmt: skip
  assert cli.main(["checkpoint", "verify", str(folder), "--base-checkpoint", "b"]) == 2
  assert "has no base checkpoint; leave out --base-checkpoint" in capsys.readouterr().err
