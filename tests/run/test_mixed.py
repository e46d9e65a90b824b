"""A small SALMONN from two joined parts: mixed tasks, cached frames, evaluation of each task."""

import dataclasses
import json
import shutil
import zlib

import jax
import numpy as np
import pytest

import mooer_jax.projects.salmonn.activation
import mooer_jax.run.decoding
from convert.joining import join
from mooer_jax import checkpoint, speech_llm
from mooer_jax.audio.decode import load_audio
from mooer_jax.config import part_to_json
from mooer_jax.evaluation.perplexity import read_perplexities, write
from mooer_jax.evaluation.text_files import read_text
from mooer_jax.prompts import encode_prompt, fill_template
from mooer_jax.run.config import Run, default_config
from mooer_jax.run.decoding import decode_set
from mooer_jax.text.tokenizer import Tokenizer
from tests.numerics import assert_within, exceeds_the_bound, rounding
from tests.run.programs import evaluate, evaluate_suite, load, lora_sweep, perplexity, train

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 ?\n<>/SH"


@pytest.fixture(scope="module")
def settings(clips, tmp_path_factory):
  """A config whose init_from are joined parts, and annotations of the committed clips."""
  folder = tmp_path_factory.mktemp("mixed")
  entries = []
  for clip in clips:
    entries.append({"path": str(clip.path), "text": clip.text, "task": "asr"})
    entries.append({"path": str(clip.path), "text": "yes", "task": "keyword", "Q": clip.text[0]})
  (folder / "train.json").write_text(json.dumps({"annotation": entries}))
  config = default_config()
  config.workdir = str(folder / "run")
  config.init_from = str(folder / "base")
  config.trainable = ("encoder_norms/.*", "connector/.*", "decoder/.*/lora_[ab]")
  config.model.encoders = ("whisper_tiny",)
  config.model.encoder_norm = True
  config.model.connector = "qformer"
  config.model.decoder = "smollm2_135m"
  config.model.chat_template = "chatml"
  config.model.prompts = {
    "asr": "<SpeechHere> write", "keyword": "<SpeechHere> is {} said?",
  }  # fmt: skip
  config.model.max_audio_s = 4.0
  config.model.whisper = dict(
    hidden_size=32, layers=2, heads=2, intermediate_size=48, positions=200, context=200, trim=True
  )
  config.model.qformer = dict(
    window=17, hidden_size=32, layers=1, heads=2, intermediate_size=48, edge="pad"
  )
  config.model.llm = dict(
    vocab_size=48, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48,
    lora_rank=2, lora_targets=("q", "v"),
  )  # fmt: skip
  config.data.shards = str(folder / "train.json")
  config.data.task = ""
  config.data.prompt_tokens = 60
  config.data.batch_size, config.data.shuffle_buffer_size = 8, 8
  config.data.buckets, config.data.answer_buckets = (400,), (6,)
  config.data.max_s = 4.0
  config.optimizer.warmup = "linear"
  config.optimizer.warmup_steps = 1
  config.optimizer.decay = "constant"
  config.train.steps = 3
  config.generation.max_new_tokens = 6
  config.eval.shards = config.data.shards
  config.eval.task, config.eval.batch_size = "", 4
  return folder, config


@pytest.fixture(scope="module")
def base(settings):
  """The joined checkpoint, of random parts."""
  folder, config = settings
  model = Run.read(config).model.with_compute(scan=False)
  params = jax.jit(lambda key: speech_llm.init(key, model))(jax.random.key(0))
  tokenizer = Tokenizer.from_characters(CHARACTERS, SPECIALS, eos="<|im_end|>")
  heard = checkpoint.save(
    folder / "whisper",
    params={"encoders": params["encoders"]},
    config_json={
      "encoders": [part_to_json(e) for e in model.encoders],
      "frontends": [part_to_json(f) for f in model.frontends],
    },
    tokenizer=lambda out: None,
    generation={},
  )
  layers = jax.tree_util.tree_map_with_path(
    lambda path, x: None if "lora" in jax.tree_util.keystr(path) else x, params["decoder"]
  )
  plain = {**part_to_json(model.decoder), "lora_rank": 0}
  llm = checkpoint.save(
    folder / "llm",
    params={"decoder": _without_none(layers)},
    config_json={"decoder": plain},
    tokenizer=tokenizer.save,
    generation={},
  )
  join(folder / "base", [heard, llm])
  return folder / "base"


def _without_none(node):
  if not isinstance(node, dict):
    return node
  return {key: _without_none(value) for key, value in node.items() if value is not None}


@pytest.fixture(scope="module")
def trained(settings, base):
  """A run of two checkpoints."""
  folder, config = settings
  config = config.copy_and_resolve_references()
  config.workdir, config.data.cache_features = str(folder / "trained"), ""
  config.train.steps, config.train.save_every = 2, 1
  return train(config)


def _metrics(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_perplexity(ours, theirs):
  """Compares the nats per token, which are of the logits' size.

  Before them are sums over 80 mel bins or a layer's MLP of 48 in some nine layers.
  """
  nats = np.log(theirs)
  assert_within(np.log(ours), nats, rounding(9 * 80, 1 + nats.max()))


def test_cached_frames_train_alike_and_each_task_is_scored(settings, base, tmp_path, capsys):
  _, config = settings
  rows = {}
  for name, cache in (("plain", ""), ("cached", str(tmp_path / "cache"))):
    config.workdir, config.data.cache_features = str(tmp_path / name), cache
    saved = train(config)
    rows[name] = _metrics(tmp_path / name)
  for plain, cached in zip(rows["plain"], rows["cached"], strict=True):
    # Each frame is rounded to float16, by eps / 2 at most; nothing else differs.
    bound = float(np.finfo(np.float16).eps) * plain["loss"]
    assert_within(cached["loss"], plain["loss"], bound)
    assert cached["tasks"].keys() == plain["tasks"].keys() <= {"asr", "keyword"}
  tokens = sum(task["tokens"] for row in rows["plain"] for task in row["tasks"].values())
  assert tokens == sum(row["tokens"] for row in rows["plain"])

  # The second time nothing is encoded, and a run goes on.
  (index,) = (tmp_path / "cache").glob("*/index.jsonl")
  assert len(index.read_text().splitlines()) == 6  # clips, not utterances
  config.train.steps = 4
  assert checkpoint.step_of(train(config)) == 4
  assert len(index.read_text().splitlines()) == 6

  config.eval.out = str(tmp_path / "scored")
  evaluate(config, str(saved))
  scores = json.loads((tmp_path / "scored/tasks.json").read_text())
  assert {task: s["num_examples"] for task, s in scores.items()} == {"asr": 6, "keyword": 6}
  assert "keyword" in capsys.readouterr().out


def test_perplexities_and_scales_are_tabled_and_drawn(settings, trained, tmp_path, capsys):
  _, config = settings
  config = config.copy_and_resolve_references()
  config.eval.out = str(tmp_path / "probe")
  run = trained.parent
  rows = perplexity(config, [str(run)], instructions=["asr"], scales=[0.0, 8.0])
  assert {(r.step, r.scale) for r in rows} == {(s, x) for s in (1, 2) for x in (0.0, 8.0)}
  assert {r.instruction for r in rows} == {"(none)", "asr"}
  assert {r.task for r in rows} == {"asr", "keyword"} and all(r.perplexity > 1 for r in rows)
  changed = {(r.step, r.instruction, r.task): r.perplexity for r in rows if r.scale == 8.0}
  plain = {(r.step, r.instruction, r.task): r.perplexity for r in rows if r.scale == 0.0}
  assert all((changed[key] != plain[key]) == (key[0] == 2) for key in plain)  # B starts as zeros
  assert (tmp_path / "probe/perplexity.png").stat().st_size > 5000

  points = lora_sweep(config, str(run), scales=[0.0, 8.0])
  assert {(p.scale, p.task, p.score.num_examples) for p in points} == {
    (scale, task, 6) for scale in (0.0, 8.0) for task in ("asr", "keyword")
  }
  assert (tmp_path / "probe/lora_sweep.png").stat().st_size > 5000
  for scale in (-1.0, float("nan")):
    for refused in (lora_sweep, lambda *a, **k: perplexity(a[0], [a[1]], **k)):
      with pytest.raises(ValueError, match=f"--scales={scale:g},8: must be numbers of at least 0"):
        refused(config, str(run), scales=[scale, 8.0])
  assert "(none)" in capsys.readouterr().out


def test_perplexity_is_that_of_the_models_own_logits(settings, trained, tmp_path):
  """Summed by hand, clip by clip, from the logits of one utterance at a time."""
  folder, config = settings
  config = config.copy_and_resolve_references()
  config.eval.out = str(tmp_path / "probe")
  rows = perplexity(config, [str(trained)], instructions=["asr"])
  params, model, tokenizer, *_ = load(config, trained)
  found = next(r for r in rows if (r.instruction, r.task) == ("asr", "asr"))
  logits = jax.jit(lambda params, batch: speech_llm.answer_logits(params, batch, model))
  nats = tokens = 0.0
  for entry in json.loads((folder / "train.json").read_text())["annotation"]:
    if entry["task"] != "asr":
      continue
    x_TF = model.frontends[0].features(load_audio(entry["path"]))
    prompt = fill_template(model.chat_template, dict(model.prompts)["asr"])
    before, after = encode_prompt(tokenizer, prompt)
    answer = [*tokenizer.encode(entry["text"]), tokenizer.eos_id]
    batch = speech_llm.Batch(
      features=(x_TF[None],),
      frames=(np.array([len(x_TF)]),),
      prefix_BS=np.array([before]),
      suffix_BS=np.array([after]),
      labels_BS=np.array([answer]),
    )
    logits_AV = np.asarray(logits(params, batch)[0], np.float64)
    log_p_AV = logits_AV - np.log(np.exp(logits_AV).sum(-1, keepdims=True))
    nats -= log_p_AV[np.arange(len(answer)), answer].sum()
    tokens += len(answer)
  assert found.tokens == tokens
  # answer_logits without lora_scale is the trained one
  assert_same_perplexity(found.perplexity, np.exp(nats / tokens))
  with exceeds_the_bound():
    assert_same_perplexity(found.perplexity, np.exp(1.001 * nats / tokens))


def test_a_run_measures_itself_as_eval_does_and_goes_on_with_it(settings, trained, tmp_path):
  folder, config = settings
  config = config.copy_and_resolve_references()
  config.workdir, config.init_from = str(tmp_path / "run"), str(trained)
  config.data.cache_features = ""
  config.train.steps, config.perplexity.every = 1, 5
  config.perplexity.shards, config.perplexity.instructions = config.eval.shards, ("asr",)
  config.perplexity.batch_size = 8
  train(config)
  probed = tmp_path / "run/perplexity.json"
  measured = read_perplexities(probed)
  write(probed, [*measured, dataclasses.replace(measured[0], step=2)])  # killed before it was saved
  config.train.steps, config.perplexity.every = 3, 2
  last = train(config)
  rows = read_perplexities(probed)
  assert [row.step for row in rows] == [step for step in (0, 1, 2, 3) for _ in range(4)]
  config.eval.out = str(tmp_path / "probe")
  alone = perplexity(config, [str(trained), str(last), str(last)], instructions=["asr"])
  assert [row.step for row in alone] == [2] * 4 + [3] * 4  # each where its own run had come to
  ours = [row.perplexity for row in rows if row.step in (0, 3)]
  assert_same_perplexity(ours, [row.perplexity for row in alone])
  assert ours[:4] != ours[4:]
  assert (tmp_path / "run/perplexity.png").stat().st_size > 5000

  config.train.steps, config.perplexity.instructions = 4, ("keyword",)
  with pytest.raises(ValueError, match=r"measured under \['\(none\)', 'asr'\]; move it away"):
    train(config)
  config.perplexity.shards = "nowhere.json"
  with pytest.raises(FileNotFoundError, match=r"perplexity\.shards=nowhere\.json"):
    train(config)
  config.data.answer_buckets = (1,)
  with pytest.raises(ValueError, match=r"\(none\): no answer could be measured \(no answer that"):
    perplexity(config, [str(last)])
  silent = tmp_path / "silent.json"
  entry = json.loads((folder / "train.json").read_text())["annotation"][0]
  silent.write_text(json.dumps({"annotation": [{**entry, "text": ""}]}))
  config.eval.shards = str(silent)
  with pytest.raises(ValueError, match=r"no answer could be measured \(empty text: 1\)"):
    perplexity(config, [str(last)])


def test_clips_that_cannot_be_decoded_count_in_their_tasks(settings, trained, clips, tmp_path):
  _, config = settings
  config = config.copy_and_resolve_references()
  entries = [
    {"path": path, "text": "one two", "task": task, "Q": "one"}
    for task in ("asr", "keyword")
    for path in (str(clips[0].path), "nowhere.wav")
  ]
  (tmp_path / "test.json").write_text(json.dumps({"annotation": entries}))
  config.eval.shards = str(tmp_path / "test.json")
  config.eval.out = str(tmp_path / "scored")

  def scored():
    evaluate(config, str(trained))
    scores = json.loads((tmp_path / "scored/tasks.json").read_text())
    return {task: (s["count"], s["not_decoded"]) for task, s in scores.items()}

  assert scored() == {"asr": (2, 1), "keyword": (2, 1)}
  config.eval.skip_missing = True
  assert scored() == {"asr": (1, 0), "keyword": (1, 0)}


def test_the_suite_runs_on_a_real_decoder_and_checks_all_files_first(
  settings, trained, clips, tmp_path, monkeypatch
):
  _, config = settings
  config = config.copy_and_resolve_references()
  config.eval.out = ""
  folder = tmp_path / "annotations"
  folder.mkdir()

  def write(name, task, text):
    clip = {"path": str(clips[0].path), "text": text, "Q": "date"}
    lost = {**clip, "path": "nowhere.wav"}
    entries = [{**entry, **({"task": task} if task else {})} for entry in (clip, clip, lost)]
    (folder / name).write_text(json.dumps({"annotation": entries}))

  write("librispeech_test_clean.json", "asr", "one two")
  write("librispeech_test_other.json", "asr", "today")
  with monkeypatch.context() as patch:
    patch.setattr(mooer_jax.run.decoding, "decode_batches", None)  # decoding would fail otherwise
    write("sac.json", "story", "a dog")
    with pytest.raises(ValueError, match=r"sac\.json: tasks \['story'\] have no prompt"):
      evaluate_suite(config, str(trained), str(folder))
    write("sac.json", "", "a dog")
    with pytest.raises(ValueError, match=r"sac\.json: annotation\[0\] and 2 others have no task"):
      evaluate_suite(config, str(trained), str(folder))
  (folder / "sac.json").unlink()
  results = evaluate_suite(config, str(trained), str(folder))
  assert {name: r.count for name, r in results.items() if not isinstance(r, str)} == {
    "librispeech_test_clean": 3, "librispeech_test_other": 3,
  }  # fmt: skip
  out = trained.parent / "eval/salmonn"
  report = json.loads((out / "suite.json").read_text())
  assert report["tasks"][0]["count"] == 3
  answers = read_text(out / "hypotheses/librispeech_test_other.text")
  assert len(answers) == 2  # the lost clip has none
  monkeypatch.setattr(mooer_jax.run.decoding, "decode_batches", None)
  assert evaluate_suite(config, str(trained), str(folder)) == results  # nothing is decoded again


def test_activation_tuning_trains_on_answers_that_a_person_may_edit(
  settings, base, trained, tmp_path, monkeypatch, capsys
):
  folder, config = settings
  config = config.copy_and_resolve_references()
  config.workdir, config.init_from = str(tmp_path / "tuned"), str(trained)
  config.activation.shards = str(folder / "train.json")
  config.activation.task, config.activation.clips = "asr", 4
  config.data.cache_features = ""
  config.train.steps = 1
  config.optimizer.warmup_steps = 0
  own = checkpoint.describe(trained).config["prompts"]
  config.model.prompts = {**own, "asr": "<SpeechHere>another"}  # is not what it answered to
  config.data.prompts = str(tmp_path / "prompts.json")  # nor are these
  (tmp_path / "prompts.json").write_text('{"asr": "<SpeechHere>a"}')

  def decode_some(*given):  # a model that learned nothing has nothing to say
    decoded = decode_set(*given)
    return dataclasses.replace(
      decoded,
      hypotheses=dict.fromkeys(decoded.hypotheses, "a yes"),
      unfinished=[*decoded.hypotheses][1:2],
    )

  config.activation.review = True
  with monkeypatch.context() as patch:
    patch.setattr(mooer_jax.projects.salmonn.activation, "decode_set", decode_some)
    assert checkpoint.latest(train(config)) is None  # stops for the person
  config.activation.review = False
  tuned = train(config)
  assert checkpoint.describe(tuned).config["prompts"] == own
  of = json.loads(next(tuned.glob("train_state/data*.json")).read_text())["of"]
  trained_on = json.dumps([config.model.chat_template, {"asr": [own["asr"]]}], sort_keys=True)
  assert of["checksum of the prompts"] == zlib.crc32(trained_on.encode())
  made = tmp_path / "tuned/activation.json"
  answers = json.loads(made.read_text())["annotation"]
  assert [(entry["text"], entry["task"]) for entry in answers] == [("a yes", "asr")] * 3
  assert "the answer reached generation.max_new_tokens; left out" in capsys.readouterr().out
  assert _metrics(tmp_path / "tuned")[0]["tokens"] == 8 * len("a yes") + 8

  config.train.steps = 2
  assert checkpoint.step_of(train(config)) == 2  # goes on
  content = json.loads(made.read_text())
  for entry in content["annotation"]:
    entry["text"] = "no"
  made.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="edited after training"):
    train(config)
  config.workdir = str(tmp_path / "again")
  (tmp_path / "again").mkdir()
  (tmp_path / "again/activation.json").write_text(json.dumps(content))
  config.train.mirror = f"file://{tmp_path}/mirror"
  train(config)
  shutil.rmtree(config.workdir)  # with the answers, of which the mirror has a copy
  config.train.steps = 3
  assert checkpoint.step_of(train(config)) == 3
  tokens = [row["tokens"] for row in _metrics(tmp_path / "again")]
  assert tokens == [8 * len("no") + 8] * 3
  config.activation.lora_scale = 1.5
  with pytest.raises(ValueError, match=r"was generated with lora_scale=0.0, now 1.5\."):
    train(config)
  config.activation.lora_scale, config.generation.max_new_tokens = 0.0, 7
  train(config)  # longer answers may be written by hand
  config.generation.num_beams = 2
  with pytest.raises(ValueError, match="was generated with generation=.*'num_beams': 2"):
    train(config)
  config.generation.num_beams, config.init_from = 1, str(base)
  with pytest.raises(ValueError, match="trained model; this checkpoint has only encoders"):
    train(config)


def test_a_trained_encoder_cannot_be_cached(settings, base, tmp_path):
  _, config = settings
  config = config.copy_and_resolve_references()
  config.workdir, config.data.cache_features = str(tmp_path / "a"), str(tmp_path / "cache")
  config.trainable = (*config.trainable, "encoders/.*")
  with pytest.raises(ValueError, match="encoders/whisper/.* is trained; leave the encoders out"):
    train(config)


def test_parts_of_another_size_are_refused_by_name(settings, base, tmp_path):
  _, config = settings
  config = config.copy_and_resolve_references()
  config.workdir, config.data.cache_features = str(tmp_path / "a"), ""
  config.model.llm.intermediate_size = 64
  with pytest.raises(ValueError, match="decoder/intermediate_size is 48, in the config 64"):
    train(config)
