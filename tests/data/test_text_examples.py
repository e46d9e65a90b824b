"""Utterances without audio, in tasks whose prompt takes text in place of the speech."""

import collections
import contextlib
import json
import string

import numpy as np
import pytest

from mooer_jax import cli
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.data.config import SourceConfig
from mooer_jax.data.dataset import eval_batches, train_batches
from mooer_jax.data.examples import PromptSampler
from mooer_jax.data.feature_cache import EncodedCache
from mooer_jax.data.readers import read, shard_names
from mooer_jax.data.stats import data_stats
from mooer_jax.run.fill_feature_cache import cache_misses
from mooer_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_characters(string.digits + string.ascii_uppercase + " <>/")
PROMPTS = (("asr", "ASK <|im_end|>"), ("t2s", "SAY <TextHere><|im_end|>"))
MODEL = SpeechLLMConfig(chat_template="bare", prompts=PROMPTS)


@pytest.fixture
def write(tmp_path, wav):
  """Writes a raw list beside a clip of half a second."""
  (tmp_path / "a.wav").write_bytes(wav(0.5))

  def write(*lines):
    (tmp_path / "data.list").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "data.list")

  return write


AUDIO = {"key": "audio", "wav": "a.wav", "txt": "A", "task": "asr"}
TEXT = {"key": "text", "txt": "B", "task": "t2s", "Q": "WHO"}


def _config(shards, path, **changes):
  values = dict(shards=path, task="", prompt_tokens=12, batch_size=2, shuffle_buffer_size=2)
  return shards.config(**{**values, **changes})


def _take(dataset, count=1):
  with contextlib.closing(iter(dataset)) as batches:
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("features", ["host", "device"])
def test_a_row_without_audio_has_the_text_in_its_prompt_and_no_frame(shards, write, features):
  model = MODEL.with_compute(features=features)
  config = _config(shards, write(AUDIO, TEXT), min_s=0.3)
  (host,) = _take(train_batches(config, TOKENIZER, model))
  assert sorted(host.keys) == ["audio", "text"] and not host.skipped
  assert host.audio_s == 0.5 and host.num_truncated == 0
  row, other = host.keys.index("text"), host.keys.index("audio")
  batch = host.batch
  assert (batch.frames[0][row], host.tasks[row], host.seconds[row]) == (0, "t2s", 0.0)
  assert batch.frames[0][other] > 0 and not np.asarray(batch.features[0][row]).any()
  prompt_S = batch.suffix_BS[row]
  assert TOKENIZER.decode(prompt_S[prompt_S >= 0], skip_special=False) == "SAY WHO<|im_end|>"
  assert (batch.prefix_BS[row] < 0).all()
  assert TOKENIZER.decode(batch.labels_BS[row][:1]) == "B"
  assert batch.task_B[row] == 1


def test_the_prompt_decides_whether_audio_is_read(shards, write):
  """An utterance with both serves tasks of either kind; its text takes the place of its audio."""
  path = write({**AUDIO, "Q": "WHO"}, {**AUDIO, "key": "b", "Q": "WHY"})
  hosts = {
    task: _take(train_batches(_config(shards, path, task=task), TOKENIZER, MODEL))[0]
    for task in ("asr", "t2s")
  }
  assert hosts["asr"].audio_s == 1.0 and hosts["t2s"].audio_s == 0.0
  # So a recording that does not exist is no fault.
  path = write({**TEXT, "wav": "gone.wav"}, TEXT | {"key": "b"})
  assert not _take(train_batches(_config(shards, path), TOKENIZER, MODEL))[0].skipped


def test_an_utterance_that_lacks_what_its_prompt_takes_is_skipped_with_the_cause(shards, write):
  path = write(
    AUDIO,
    TEXT,
    TEXT | {"key": "lacks-audio", "task": "asr"},
    AUDIO | {"key": "lacks-text", "task": "t2s"},
    TEXT | {"key": "long", "Q": "A" * 20},
    TEXT | {"key": "odd", "Q": "é"},
    TEXT | {"key": "no-answer", "txt": ""},
  )
  config = _config(shards, path, max_bad_share=1.0)
  hosts = _take(train_batches(config, TOKENIZER, MODEL), 3)
  skipped = {skip.key: (skip.cause, skip.detail) for host in hosts for skip in host.skipped}
  assert {key: cause for key, (cause, _) in skipped.items()} == {
    "lacks-audio": "no audio",
    "lacks-text": "no question",
    "long": "prompt too long",
    "odd": "bad question",
    "no-answer": "empty transcript",
  }
  assert 'no "wav"' in skipped["lacks-audio"][1] and ":3:" in skipped["lacks-audio"][1]


def test_evaluation_does_not_take_text(shards, write):
  (host,) = eval_batches(_config(shards, write(AUDIO, TEXT)), TOKENIZER, MODEL)
  assert host.keys == ("audio",)
  [skip] = host.skipped
  assert (skip.key, skip.cause) == ("text", "no audio") and "only training" in skip.detail


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ({"key": "a", "txt": "A"}, "no string 'wav'"),
    (TEXT | {"wav": None}, "no string 'wav'"),
    (TEXT | {"Q": 3}, "Q=3"),
    (TEXT | {"start": 1.0}, "start=1.0"),
  ],
)
def test_a_line_without_audio_needs_a_text_and_no_segment(write, line, words):
  [name] = shard_names(write(AUDIO, line))
  _, skip = read(name)
  assert skip.cause == "bad label" and words in skip.detail


@pytest.mark.parametrize(
  "prompt", ["<TextHere> <TextHere>", "<TextHere> <SpeechHere>", "<TextHere> {}"]
)
def test_a_prompt_has_one_place_for_text_and_none_for_speech(shards, write, prompt):
  model = MODEL.replace(prompts=(("t2s", prompt),))
  with pytest.raises(ValueError, match="must contain <TextHere> exactly once, and neither"):
    PromptSampler(_config(shards, write(TEXT)), TOKENIZER, model)


def test_prompts_with_text_need_a_length_and_one_kind_a_task(shards, write, tmp_path):
  path = write(TEXT)
  with pytest.raises(ValueError, match="takes a text: set data.prompt_tokens"):
    PromptSampler(_config(shards, path, prompt_tokens=0), TOKENIZER, MODEL)
  (tmp_path / "prompts.json").write_text(json.dumps({"t2s": ["SAY <TextHere>", "SAY"]}))
  config = _config(shards, path, prompts=str(tmp_path / "prompts.json"))
  with pytest.raises(ValueError, match="'SAY' and the model's.*task 't2s', but one takes text"):
    PromptSampler(config, TOKENIZER, MODEL)


def test_cached_frames_leave_rows_without_audio_empty(shards, write, tmp_path):
  config = _config(shards, write(AUDIO, TEXT))
  width = MODEL.encoders[0].hidden_size
  cache = EncodedCache(tmp_path / "cache", {"sanm": width})
  skipped: collections.Counter = collections.Counter()
  [(_, digests, seconds)] = cache_misses(config, MODEL, known=set(), skipped=skipped)
  assert len(digests) == 1 and not skipped
  cache.write([(digests[0], [np.ones((9, width), np.float32)], seconds[0])])
  (host,) = _take(train_batches(config, TOKENIZER, MODEL, cache=cache))
  frames = dict(zip(host.keys, host.batch.frames[0].tolist(), strict=True))
  assert frames == {"audio": 9, "text": 0} and not host.skipped


def test_stats_count_utterances_without_audio(write, capsys):
  path = write(AUDIO, TEXT, TEXT | {"key": "b"}, TEXT | {"key": "c", "txt": ""})
  stats = data_stats(path, processes=1)
  assert (stats.utterances, stats.seconds, stats.texts) == (1, 0.5, 2)
  assert stats.skipped == {"empty transcript": 1} and stats.to_json()["without_audio"] == 2
  assert cli.main(["data", "stats", write(TEXT), "--processes=1"]) == 0
  assert "without audio: 1 utterances more" in capsys.readouterr().out


def test_a_mixture_takes_text_and_audio_in_shares(shards, write):
  path = write(*({**AUDIO, "key": f"a{n}", "Q": "WHO"} for n in range(4)))
  mixture = {
    "understand": SourceConfig(path, 0.3, task="asr"),
    "read": SourceConfig(path, 0.7, task="t2s"),
  }
  config = _config(shards, "", batch_size=10, shuffle_buffer_size=10, mixture=mixture)
  hosts = _take(train_batches(config, TOKENIZER, MODEL), 4)
  tasks = collections.Counter(task for host in hosts for task in host.tasks)
  assert tasks == {"asr": 12, "t2s": 28}
