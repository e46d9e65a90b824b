"""A vocoder is trained as a user meets it: beside a checkpoint of its LLM, resumed bit for bit."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from configs import mooer_omni, vocoder
from mooer_jax import checkpoint, speech_llm, tree
from mooer_jax.config import to_json
from mooer_jax.data.utterances import BadDataError
from mooer_jax.generation.loading import load_speech
from mooer_jax.run.config import Run
from mooer_jax.run.start import check_objective, read_tokenizer
from tests import tiny
from tests.run.programs import train

# 256 samples for each audio token, at 16 kHz.
SPEECH = {
  "vocoder": {
    "input_width": 32, "speaker_width": 8, "hidden_size": 8, "stretch": 4, "rates": (8, 8),
    "taps": (16, 16), "block_taps": (3,), "dilations": (1,), "sample_rate_hz": 16000,
  },
  "speaker": {"blocks": (1,), "channels": (4,), "reduction": 2, "output_width": 8},
  "drop_last": 2,
}  # fmt: skip


@pytest.fixture
def config(config, clips, tmp_path):
  """Of the tiny model, a checkpoint of text, and a recording for each answer."""
  config.specials = ("<|transcribe|>", "<|end|>", "<|audio_start|>", "<A_0>")
  config.train.cmvn = ""
  base = Run.read(config)
  checkpoint.save(
    tmp_path / "base",
    params=tiny.random_params(speech_llm.param_shapes(base.model)),
    config_json=to_json(base.model),
    tokenizer=read_tokenizer(base).save,
    generation={},
  )
  targets, labels = [], []
  for clip in clips:
    tokens = -(-soundfile.info(clip.path).frames // 256)
    for copy in range(4):
      targets.append(f"{clip.key}-{copy} {clip.path}\n")
      labels.append(f"{clip.key}-{copy} {clip.text}<|audio_start|>{'<A_0>' * tokens}\n")
  for name, lines in (("wav.scp", targets), ("labels", labels)):
    (tmp_path / name).write_text("".join(lines), "utf-8")
  config.init_from = str(tmp_path / "base")
  config.model.speech_output = SPEECH
  config.trainable = ("vocoder/.*", "speaker/.*")
  config.data.update(
    {
      "labels": str(tmp_path / "labels"), "target_audio": str(tmp_path / "wav.scp"),
      "target_s": 4 * 256 / 16000, "voice_s": 0.2, "answer_buckets": (128,),
    }
  )  # fmt: skip
  config.generation.max_new_tokens = 128
  config.vocoder_training.update(
    {"mel_window": 256, "mel_hop": 64, "mel_bins": 20}
    | {"discriminators": {"width": 1, "periods": (3,), "scales": 0}}
  )
  config.train.update({"objective": "vocoder", "steps": 4, "save_every": 2, "log_every": 1})
  return config


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_beside_its_base(config, tmp_path):
  folders = {}
  for name, stops in (("whole", (4,)), ("broken", (2, 4))):
    config.workdir = str(tmp_path / name)
    for config.train.steps in stops:
      folders[name] = train(config)
  records = [(tmp_path / name / "metrics.jsonl").read_text() for name in folders]
  assert records[0] == records[1]
  rows = [json.loads(line) for line in records[0].splitlines()]
  assert [row["tokens"] for row in rows] == [config.data.batch_size] * 4
  assert all(row["mel_loss"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)

  about = checkpoint.describe(folders["whole"])
  assert about.base == Path(config.init_from)
  assert {path.partition("/")[0] for path in about.trained} == {"vocoder", "speaker"}
  checkpoint.check_leaves(about, speech_llm.param_shapes(Run.read(config).model))
  assert set(load_speech(folders["whole"]).params) == {"vocoder", "speaker"}
  one, other = (tree.flatten(checkpoint.load(folder).params) for folder in folders.values())
  for path, leaf in one.items():
    np.testing.assert_array_equal(leaf, other[path], err_msg=path)
  first = tree.flatten(checkpoint.load(folders["whole"].with_name("step_00000002")).params)
  moved = {path for path, leaf in one.items() if not np.array_equal(leaf, first[path])}
  fixed = {path for path in one if path.endswith(("/mean", "/var"))}
  assert fixed and moved | {"speaker/pool2/bias"} == {*about.trained} - fixed  # softmax: gradient 0

  def discriminators(folder):
    saved = json.loads((folder / "checkpoint.json").read_text())["train_state"]
    return {path for path in saved if path.startswith("trainable/discriminators/")}

  assert discriminators(folders["whole"]) == discriminators(folders["broken"]) != set()

  config.train.steps, config.data.voice_s = 6, 0.3
  with pytest.raises(ValueError, match=r"data.target_audio was .*0.2 s' and is .*0.3 s'"):
    train(config)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"data": {"target_audio": ""}}, "data.target_audio is missing"),
    ({"data": {"target_s": 0.01}}, "segments of 256 samples, fewer than .*mel_window=512"),
    ({"data": {"target_audio": "nowhere.scp"}}, "nowhere.scp"),
    ({"model": {"speech_output": None}}, "the model has none; set model.speech_output"),
    ({"trainable": ("vocoder/.*", "connector/.*")}, "connector/.* does not train"),
    ({"trainable": ("speaker/.*",)}, "no parameter of the vocoder"),
    ({"trainable": ("vocoder/.*",)}, "speaker/.* would be random and frozen"),
    ({"train": {"objective": "answers"}}, "data.target_audio has no effect"),
    ({"train": {"objective": "text"}}, "train.objective='text': choose one of"),
    ({"model": {"speech_output": {"start_token": "<s>"}}}, "start_token: token '<s>' is not in"),
    ({"perplexity": {"shards": "x.json"}}, "perplexity.shards"),
    ({"model": {"speech_output": {"drop_last": 6}}}, "drop_last=6 is for a released vocoder"),
  ],
)
def test_bad_configs_fail_before_training_by_name(config, change, message):
  config.vocoder_training.mel_window = 512
  if change.get("model", {}).get("speech_output", 0) is None:
    config.model.speech_output = None
  else:
    config.update(change)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    train(config)
  assert not list(Path(config.workdir).glob("step_*"))


def test_losses_of_a_vocoder_have_no_effect_on_answers(config):
  config.train.objective, config.data.target_audio = "answers", ""
  config.data.target_s, config.data.voice_s = 0.4, 2.0
  with pytest.raises(ValueError, match="vocoder_training has no effect"):
    check_objective(Run.read(config))


def test_recordings_of_other_lengths_stop_the_run_with_their_cause(config, clips, tmp_path):
  lines = (tmp_path / "labels").read_text().splitlines()
  (tmp_path / "labels").write_text("".join(f"{line}<A_0><A_0>\n" for line in lines))
  with pytest.raises(BadDataError, match=f"bad target {4 * len(clips)}"):
    train(config)
  rows = [json.loads(row) for row in (Path(config.workdir) / "skipped.jsonl").open()]
  assert "audio tokens, but the label has" in rows[0]["detail"]


@pytest.mark.parametrize("base", ["mooer_omni", "mooer_7b", "tiny"])
def test_the_published_config_is_read(base, tmp_path):
  config = vocoder.get_config(base)
  config.data.target_audio = str(tmp_path / "wav.scp")
  run = Run.read(config)
  check_objective(run)
  before = importlib.import_module(f"configs.{base}").get_config()
  assert str(run.init_from) == f"{before.workdir}/step_{before.train.steps:08d}"
  vocoder_config = run.model.speech_output.vocoder
  assert vocoder_config.input_width == run.model.decoder.hidden_size
  shapes = jax.eval_shape(lambda: speech_llm.init(jax.random.key(0), run.model))
  trained, _ = tree.partition(shapes, run.trainable)
  assert set(trained) == {"vocoder", "speaker"}


def test_the_default_config_continues_the_stages_of_a_model_that_speaks():
  """The same model, and of its data those whose answers are recordings."""
  stages, run = (Run.read(module.get_config()) for module in (mooer_omni, vocoder))
  assert run.model.replace(speech_output=None) == stages.model
  source = stages.data.mixture["audio_audio"]
  assert (run.data.shards, run.data.labels) == (source.shards, source.labels)
  assert run.data.task == source.task and not run.data.mixture
  assert run.data.answer_buckets == stages.data.answer_buckets
