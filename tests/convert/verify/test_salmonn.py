"""`verify salmonn` finds both sides equal, and fails from the stage on where a tensor is not."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.core.options import Options
from convert.importing import import_checkpoint
from convert.main import main
from tests.convert.verify.test_run import fine_tune
from tests.parity import torch_salmonn
from tests.text.spm_training import train

STAGES = ["whisper features", "whisper encoder", "beats features", "beats encoder"]
STAGES += ["adapter", "prompt", "logits"]
NAME = "salmonn_v1.pth"


@dataclasses.dataclass(frozen=True)
class Sides:
  """A model's files and its checkpoint."""

  file: Path
  ours: Path
  options: dict[str, Path]


def bring(folder, llm, *, with_beats=True, change=None, **options) -> Sides:
  module = torch_salmonn.Salmonn(llm, with_beats=with_beats)
  state = module.saved()
  state.update(change(state) if change else {})
  paths = {**torch_salmonn.write(folder / "files", module, state=state), "llm": llm, **options}
  import_checkpoint("salmonn", folder / "files" / NAME, folder / "ours", options=Options(**paths))
  return Sides(folder / "files" / NAME, folder / "ours", paths)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llm")
  return torch_salmonn.write_llm(folder / "vicuna", train(folder / "tokenizer", "bpe"))


@pytest.fixture(scope="module")
def sides(tmp_path_factory, llm):
  return bring(tmp_path_factory.mktemp("verify"), llm)


@pytest.fixture
def run(clips, capsys):
  """Runs `verify salmonn` on two clips: (exit status, stages over their bounds, all it said)."""

  def command(sides, **changes):
    paths = {**sides.options, **changes}
    named = [
      word
      for name, path in paths.items()
      if path is not None
      for word in (f"--{name.replace('_', '-')}", str(path))
    ]
    audio = [str(clip.path) for clip in clips[:2]]
    capsys.readouterr()
    status = main(["verify", "salmonn", str(sides.file), str(sides.ours), *named,
                   "--audio", *audio, "--max-new-tokens", "4"])  # fmt: skip
    printed = capsys.readouterr()
    said = printed.out + printed.err
    failed = said.partition("FAILED, over the bound: ")[2].partition("\n")[0].split(", ")
    return status, [stage for stage in failed if stage not in ("", "tokens")], said

  return command


def test_a_model_and_its_checkpoint_agree_on_clips(sides, run):
  status, failed, said = run(sides)
  assert status == 0 and not failed and "8 of 8 the same" in said and "bfloat16 compute" in said
  rows = [line[:18].strip() for line in said.splitlines()]
  assert [row for row in rows if row in STAGES] == STAGES


@pytest.mark.parametrize(
  "path, value, stage",
  [
    ("frontend/beats/shift", 0.5, "beats features"),
    ("encoders/whisper/layers_1/mlp/up/bias", 0.1, "whisper encoder"),
    ("encoder_norms/beats/bias", 0.1, "adapter"),
    ("decoder/layers_1/attention/q/lora_b", 0.05, "logits"),
  ],
)
def test_an_altered_leaf_of_the_checkpoint_is_found(sides, run, tmp_path, path, value, stage):
  shape = 1 if "lora" not in path else np.arange(40) % 2
  fine_tune(tmp_path / "wrong", sides.ours, {path: value * shape})
  status, failed, _ = run(dataclasses.replace(sides, ours=tmp_path / "wrong"))
  heard_by_the_other = {s for s in STAGES if s.split()[0] != stage.split()[0] and " " in s}
  expected = STAGES[STAGES.index(stage) :]
  if " " in stage:
    expected = [s for s in expected if s not in heard_by_the_other]
  assert status == 1 and failed == expected


def test_an_altered_tensor_of_each_file_is_found(sides, run, tmp_path, llm):
  def other(name, change):
    content = torch.load(sides.file.parent / name)
    change(content["model"])
    torch.save(content, tmp_path / name)
    return tmp_path / name

  beats = other("beats.pt", lambda m: m["encoder.layers.2.fc1.bias"].add_(0.1))
  status, failed, _ = run(sides, beats=beats)
  assert status == 1 and failed[:2] == ["beats encoder", "adapter"]
  file = other(NAME, lambda m: m["speech_llama_proj.bias"].add_(0.1 * torch.randn(40)))
  status, failed, _ = run(dataclasses.replace(sides, file=file))
  assert status == 1 and failed == ["adapter", "prompt", "logits"]


@pytest.mark.nightly
def test_whisper_alone_with_what_was_trained_along_and_merged(run, tmp_path, llm):
  wrapped = "llama_model.base_model.model.model.layers.1"
  torch.manual_seed(1)
  tuned = {
    "speech_encoder.layers.1.fc1.weight": 0.2 * torch.randn(40, 32),
    f"{wrapped}.self_attn.q_proj.base_layer.weight": 0.2 * torch.randn(40, 40),
    f"{wrapped}.mlp.up_proj.weight": 0.2 * torch.randn(56, 40),
    "llama_model.base_model.model.lm_head.weight": 0.2 * torch.randn(700, 40),
  }
  sides = bring(tmp_path, llm, with_beats=False, change=lambda _: tuned)
  status, failed, said = run(sides)
  assert status == 0 and not failed and "whisper features" not in said
  # Without one of them, the original is another.
  content = torch.load(sides.file)
  for name, first in zip(tuned, ("encoder", "logits")):
    model = {other: tensor for other, tensor in content["model"].items() if other != name}
    torch.save({**content, "model": model}, sides.file)
    status, failed, _ = run(sides)
    assert status == 1 and failed[:1] == [first]


@pytest.mark.nightly
def test_the_lora_is_scaled_as_in_training(sides, run, tmp_path, llm):
  told = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_dropout": 0.0}
  (tmp_path / "adapter_config.json").write_text(json.dumps(told))
  merged, options = tmp_path / "merged", dict(lora_config=tmp_path, merge_lora=True)
  import_checkpoint("salmonn", sides.file, merged, options=Options(**sides.options, **options))
  other = dataclasses.replace(sides, ours=merged)
  assert run(other, lora_config=tmp_path)[0] == 0
  assert run(other)[:2] == (1, ["logits"])


def test_what_is_needed_is_named(sides, run):
  for changes, said in (
    ({"beats": None}, "name the file with --beats"),
    ({"whisper": None}, "needs --whisper: folder or file of Whisper"),
    ({"llm": None}, "needs --llm: folder of the LLM"),
  ):
    status, _, printed = run(sides, **changes)
    assert status == 2 and said in printed
