"""`mooer-jax transcribe`: what it prints and writes, bad input, interruptions."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import soundfile

import mooer_jax
from mooer_jax import cli
from mooer_jax.transcribe.transcript import Transcript


def test_the_command_reads_line_breaks_and_hands_the_template_over(
  folder, clips, tmp_path, monkeypatch, capsys
):
  given = {}
  result = Transcript("said", [1], 1.0, "prompt")
  monkeypatch.setattr(
    mooer_jax.Transcriber,
    "stream",
    lambda self, paths, **options: given.update(options) or (one for one in [result]),
  )
  command = ["ask", "--checkpoint", str(folder), "--prompt", r"1\n<SpeechHere>0"]
  assert cli.main([*command, "--chat-template", "none", str(clips[0].path)]) == 0
  assert given["prompt"] == "1\n<SpeechHere>0" and given["chat_template"] == "none"
  assert capsys.readouterr().err == ""
  # The names of version 0.1 still work.
  old = ["--template", "none", "--chunk-s", "6", "--beams", "2"]
  assert cli.main([*command, *old, str(clips[0].path)]) == 0
  assert (given["chat_template"], given["chunk_length_s"], given["num_beams"]) == ("none", 6.0, 2)
  assert capsys.readouterr().err.count("is deprecated; use --") == 3
  assert cli.main([*command, "--beam", "4", str(clips[0].path)]) == 0  # argparse completes a flag
  assert given["num_beams"] == 4
  capsys.readouterr()
  with pytest.raises(SystemExit):
    cli.main(["pack", "--base", "x"])
  assert "deprecated" not in capsys.readouterr().err
  monkeypatch.chdir(tmp_path)
  (tmp_path / "--beams").touch()
  assert cli.main([*command, "--", "--beams"]) == 0
  assert capsys.readouterr().err == ""


def test_the_command_takes_questions_and_long_clips(
  folder, transcriber, long_clip, tmp_path, capsys
):
  path = str(tmp_path / "long.wav")
  soundfile.write(path, long_clip, 16000, subtype="FLOAT")
  command = ["ask", "--checkpoint", str(folder), "--task", "QA", path]
  assert cli.main([*command, "--question", "1", "--chunk-length-s", "6"]) == 0
  [expected] = transcriber.transcribe([path], task="QA", question="1", chunk_length_s=6.0)
  out, err = capsys.readouterr()
  assert out == expected.text + "\n"
  assert err.splitlines() == [f"{path}: {told}" for told in expected.warnings()]
  for more, message, status in (
    ([], "--question", 2),
    (["--question", "1"], "--chunk-length-s 6", 1),
  ):
    assert cli.main([*command, *more]) == status
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("chunked", [[], ["--chunk-length-s", "6", "--batch-size", "1"]])
def test_a_bad_file_costs_only_itself(folder, clips, tmp_path, capsys, chunked):
  good, out = clips[0].path, tmp_path / "out.json"
  (tmp_path / "bad.wav").write_text("no audio")
  bad = [str(tmp_path / name) for name in ("bad.wav", "none.wav", "")]
  command = ["transcribe", "--checkpoint", str(folder), "--task", "asr", *chunked]
  assert cli.main([*command, "--json", str(out), bad[0], str(good), *bad[1:]]) == 1
  said, error = capsys.readouterr()
  assert [line.split("\t")[0] for line in said.splitlines()] == [str(good)]
  told = [line for line in error.splitlines() if line.startswith("not transcribed: ")]
  assert len(told) == 3 and all(name in line for name, line in zip(bad, told, strict=True))
  rows = json.loads(out.read_text("utf-8"))
  assert [row["path"] for row in rows] == [bad[0], str(good), *bad[1:]]
  assert [bool(row["error"]) for row in rows] == [True, False, True, True]


def test_results_survive_an_interruption(folder, clips, tmp_path, monkeypatch, capsys):
  out = tmp_path / "out.json"

  def stream(self, paths, **options):
    for path in itertools.islice(paths, 8):
      yield Transcript("said", [1], 1.0, "asr", path=path)
    raise KeyboardInterrupt

  monkeypatch.setattr(mooer_jax.Transcriber, "stream", stream)
  command = ["transcribe", "--checkpoint", str(folder), "--json", str(out), "--batch-size", "1"]
  assert cli.main([*command, *[str(clips[0].path)] * 20]) == 130
  rows = json.loads(out.read_text("utf-8"))
  assert len(rows) == 8 and rows[0]["text"] == "said"
  assert f"{out} holds the {len(rows)} results" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_results_survive_sigterm(folder, clips, tmp_path, monkeypatch):
  out = tmp_path / "out.json"

  def stream(self, paths, **options):
    for number, path in enumerate(paths):
      if number == 8:
        signal.raise_signal(signal.SIGTERM)
      yield Transcript("said", [1], 1.0, "asr", path=path)

  monkeypatch.setattr(mooer_jax.Transcriber, "stream", stream)
  before = signal.getsignal(signal.SIGTERM)
  command = ["transcribe", "--checkpoint", str(folder), "--json", str(out), "--batch-size", "1"]
  with pytest.raises(SystemExit) as ended:
    cli.main([*command, *[str(clips[0].path)] * 20])
  assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
  assert len(json.loads(out.read_text("utf-8"))) == 8


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no Linux: no /dev/full")
def test_a_full_device_is_one_line_that_names_the_file(folder, clips, capsys):
  command = ["transcribe", "--checkpoint", str(folder), "--task", "asr", "--json", "/dev/full"]
  assert cli.main([*command, str(clips[0].path)]) == 2
  error = capsys.readouterr().err
  (line,) = (line for line in error.splitlines() if "No space left on device" in line)
  assert "/dev/full" in line and "Traceback" not in error


def test_odd_file_names_are_escaped(folder, clips, tmp_path, capsys):
  odd = os.fsdecode(bytes(tmp_path) + b"/a\nb\t\xff.wav")
  shutil.copyfile(clips[0].path, odd)
  out = tmp_path / "out.json"
  command = ["transcribe", "--checkpoint", str(folder), "--task", "asr", "--json", str(out)]
  assert cli.main([*command, odd, str(clips[0].path)]) == 0
  assert len(capsys.readouterr().out.splitlines()) == 2
  rows = json.loads(out.read_text("utf-8"))
  assert rows[0]["path"] == odd


def test_audio_is_never_overwritten(folder, clips, tmp_path, capsys):
  copy = tmp_path / "a.wav"
  shutil.copyfile(clips[0].path, copy)
  before = copy.read_bytes()
  command = ["transcribe", "--checkpoint", str(folder), "--json", str(copy)]
  for audio in (str(copy), str(clips[1].path)):
    assert cli.main([*command, audio]) == 2
    assert str(copy) in capsys.readouterr().err
  assert copy.read_bytes() == before


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--repetition-penalty", "nan"], "repetition_penalty=nan"),
    (["--temperature", "nan"], "temperature=nan"),
    (["--temperature", "inf"], "temperature=inf"),
    (["--top-p", "nan"], "top_p=nan"),
    (["--length-penalty", "nan"], "length_penalty=nan"),
    (["--length-penalty", "1e308", "--num-beams", "2"], "length_penalty=1e+308: must be from -"),
    (["--seed", str(2**64)], f"seed={2**64}"),
    (["--seed", "-1"], "seed=-1"),
    (["--min-new-tokens", "300", "--max-new-tokens", "200"], "must be at most max_new_tokens=200"),
  ],
)
def test_options_without_a_meaning_are_refused(folder, clips, capsys, flags, message):
  command = ["transcribe", "--checkpoint", str(folder), "--task", "asr", str(clips[0].path)]
  assert cli.main([*command, *flags]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert message in line


def test_the_command_prints_and_writes_json(folder, clips, tmp_path, capsys, transcriber):
  paths = [str(clip.path) for clip in clips[:2]]
  out = tmp_path / "results" / "out.json"
  status = cli.main(["transcribe", "--checkpoint", str(folder), "--json", str(out), *paths])
  assert status == 0
  rows = json.loads(out.read_text("utf-8"))
  expected = transcriber.transcribe(paths)
  assert rows == [result.to_json() for result in expected]
  assert capsys.readouterr().out == "".join(f"{r.path}\t{r.text}\n" for r in expected)


def test_the_command_fails_with_one_line(folder, clips, tmp_path, plain_env):
  command = [sys.executable, "-m", "mooer_jax.cli", "transcribe", "--checkpoint"]
  for checkpoint_folder, audio, message in (
    (folder, tmp_path / "nowhere.wav", "nowhere.wav"),
    (tmp_path, clips[0].path, "config.json"),
  ):
    done = subprocess.run(
      [*command, str(checkpoint_folder), str(audio)], env=plain_env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_mesh_of_the_command_is_that_of_the_transcriber(folder, clips, monkeypatch, capsys):
  given = {}

  def from_checkpoint(path, **options):
    given.update(options)
    raise ValueError("loaded")

  monkeypatch.setattr(mooer_jax.Transcriber, "from_checkpoint", from_checkpoint)
  command = ["transcribe", "--checkpoint", str(folder), str(clips[0].path)]
  assert cli.main([*command, "--mesh", "data=2,fsdp=1,tensor=4"]) == 2
  assert dict(given["mesh"].shape) == {"data": 2, "fsdp": 1, "tensor": 4}
  assert cli.main(command) == 2 and given["mesh"] is None
  capsys.readouterr()
  for mesh, message in (
    ("data=2,model=4", "cannot read 'model=4'; give AXIS=SIZE"),
    ("data=2,tensor=2", "the product must be the number of devices, 8"),
    ("", "give AXIS=SIZE"),
  ):
    given.clear()
    assert cli.main([*command, "--mesh", mesh]) == 2 and not given
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_trace_is_a_profile_with_the_stages_by_name(folder, clips, tmp_path, capsys):
  out = tmp_path / "trace"
  command = ["transcribe", "--checkpoint", str(folder), "--task", "asr", "--trace", str(out)]
  assert cli.main([*command, str(clips[0].path)]) == 0
  assert f"profile in {out}" in capsys.readouterr().err
  assert [*out.rglob("perfetto_trace.json.gz")]


def test_results_are_on_stdout_also_beside_a_progress_bar(folder, clips, monkeypatch, capsys):
  monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes every stream for a terminal
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  names = [str(clip.path) for clip in clips]
  assert cli.main(["transcribe", "--checkpoint", str(folder), "--task", "asr", *names]) == 0
  said, shown = capsys.readouterr()
  assert [line.split("\t")[0] for line in said.splitlines()] == names
  assert "min of audio" in shown


def test_a_trace_that_cannot_be_written_is_refused_before_the_model_loads(clips, tmp_path, capsys):
  (tmp_path / "file").touch()
  command = ["transcribe", "--checkpoint", "nowhere", "--trace", str(tmp_path / "file")]
  assert cli.main([*command, str(clips[0].path)]) == 2
  assert f"--trace {tmp_path / 'file'}: File exists; name a folder" in capsys.readouterr().err


def test_a_closed_pipe_ends_the_command_silently(folder, clips, plain_env):
  command = [sys.executable, "-m", "mooer_jax.cli", "transcribe", "--checkpoint", str(folder)]
  names = [str(clip.path) for clip in clips]
  process = subprocess.Popen(
    [*command, "--task", "asr", "--max-new-tokens", "2", *names],
    env=plain_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  process.stdout.close()
  assert process.wait(300) == 141
  assert "Broken pipe" not in process.stderr.read()
