import dataclasses
import json
import math

import pytest
from ml_collections import ConfigDict

from mooer_jax.config import SpeechLLMConfig, build, from_json, model_config, part_kinds, to_json
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.nn.compute import ExecutionConfig


def mooer(**changes) -> ConfigDict:
  base = dict(encoders=("sanm_large",), connector="linear", decoder="qwen2_7b")
  return ConfigDict({**base, **changes})


def test_named_sizes_are_mooer():
  config = model_config(mooer(llm=dict(lora_rank=64)), dict(dtype="bfloat16", remat="full"))
  assert config.encoders == (SANMConfig(),)
  assert config.decoder == LLMConfig(lora_rank=64) and config.decoder.lora_scale == 0.25
  assert config.compute == ExecutionConfig(dtype="bfloat16", remat="full")
  assert dict(config.prompts)["asr"] == "Transcribe speech to text. "


def test_sections_override_single_values():
  config = model_config(
    mooer(
      decoder="qwen2_0.5b",
      sanm=dict(input_width=280, layers=2),
      linear=dict(stack=4),
      llm=dict(lora_targets=["q", "v"], rope_theta=10_000),
      frontends=dict(sanm=dict(fbank=dict(bins=40))),
      prompts=dict(asr="Write it down. "),
      max_audio_s=20,
    )
  )
  assert config.encoders[0] == dataclasses.replace(SANMConfig(), input_width=280, layers=2)
  assert config.decoder.lora_targets == ("q", "v") and config.decoder.hidden_size == 896
  assert config.decoder.rope_theta == 10_000.0 and isinstance(config.decoder.rope_theta, float)
  assert config.frontends[0].fbank.bins == 40 and config.frontends[0].lfr_window == 7
  assert config.prompts == (("asr", "Write it down. "),)
  assert isinstance(config.max_audio_s, float)


def test_plain_dicts_and_locked_configdicts_read_alike():
  section = mooer(llm=dict(lora_rank=8), frontends=dict(sanm=dict(lfr_stride=5)))
  assert model_config(section.lock()) == model_config(section.to_dict())


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(decodr="qwen2_7b"), "'model.decodr'; did you mean 'decoder'"),
    (dict(llm=dict(lora_rnk=8)), "'model.llm.lora_rnk'; did you mean 'lora_rank'"),
    (dict(frontends=dict(sanm=dict(fbank=dict(bin=8)))), "'model.frontends.sanm.fbank.bin'; did"),
    (dict(frontends=dict(samn=dict())), "'model.frontends.samn'; did you mean 'sanm'"),
    (dict(llm=dict(lora_rank="8")), r"model.llm.lora_rank='8' \(str\): expected int"),
    (dict(llm=dict(lora_rank=8.0)), r"model.llm.lora_rank=8.0 \(float\): expected int"),
    (dict(llm=dict(lora_rank=True)), "model.llm.lora_rank=True"),
    (dict(llm=dict(lora_rank=False)), "model.llm.lora_rank=False"),
    (dict(llm=dict(tie_word_embeddings=1)), "model.llm.tie_word_embeddings=1"),
    (dict(llm=dict(lora_rank=None)), "model.llm.lora_rank=None"),
    (dict(llm=dict(lora_targets="q")), "model.llm.lora_targets='q'"),
    (dict(llm=dict(lora_targets=["q", 1])), r"model.llm.lora_targets\[1\]=1"),
    (dict(llm=dict(lora_rank=-1)), "llm.lora_rank=-1"),
    (dict(llm=dict(layers=0)), "llm.layers=0 must be positive"),
    (dict(llm=dict(heads=0)), "llm.heads=0 must be positive"),
    (dict(llm=dict(kv_heads=5)), "llm.heads=28 must be divisible by llm.kv_heads=5"),
    (dict(sanm=dict(hidden_size=510)), "sanm.hidden_size=510 must be divisible by sanm.heads=4"),
    (dict(sanm=dict(heads=0)), "sanm.heads=0 must be positive"),
    (dict(linear=dict(stack=0)), "linear.stack=0 must be positive"),
    (dict(sanm=dict(input_width=80)), "sanm.input_width=80, but its features have 560"),
    (dict(sanm=dict(input_width=81)), "sanm.input_width=81 must be even"),
    (dict(decoder="qwen2_70b"), "model.decoder='qwen2_70b': choose one of .*'qwen2_7b'"),
    (dict(connector=["linear"]), "model.connector=.*choose one of"),
    (dict(encoders="sanm_large"), r"a tuple of names, such as \('sanm_large',\)"),
    (dict(channel="left"), "model.channel='left'"),
    (dict(whisper=dict(layers=2)), "model.whisper has no effect: the model .*linear, llm, sanm"),
    (dict(encoders=()), r"model.encoders=\[\]: give one or more"),
    (dict(encoders=("sanm_large",) * 2), "model.encoders=.*of different kinds"),
    (dict(chat_template="chat"), "model.chat_template='chat': choose one of .*'mooer'"),
    (dict(max_audio_s="30"), "model.max_audio_s='30'"),
    (dict(prompts=dict(asr=3)), "model.prompts.*=3"),
  ],
  ids=str,
)
def test_mistakes_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    model_config(mooer(**changes))


@pytest.mark.parametrize("key", ["encoders", "connector", "decoder"])
def test_a_missing_part_is_named(key):
  section = mooer().to_dict()
  del section[key]
  with pytest.raises(ValueError, match=f"model.{key} is missing"):
    model_config(section)


def test_compute_is_checked_too():
  with pytest.raises(ValueError, match="compute.remat='some'"):
    model_config(mooer(), dict(remat="some"))
  with pytest.raises(ValueError, match="float16 overflows"):
    model_config(mooer(), dict(dtype="float16"))


def test_json_and_back_is_the_identity():
  config = model_config(
    mooer(llm=dict(lora_rank=8, lora_targets=("q",)), prompts=dict(asr="甲乙 ")),
    dict(dtype="bfloat16", remat="dots"),
  )
  text = json.dumps(to_json(config))
  assert "remat" not in text  # how it runs stays out of the checkpoint
  assert from_json(json.loads(text), config.compute) == config
  assert from_json(json.loads(text)).compute == ExecutionConfig()
  assert to_json(from_json(json.loads(text))) == to_json(config)


def test_a_config_of_version_0_1_is_read_as_it_was_meant():
  fields = json.loads(json.dumps(to_json(SpeechLLMConfig())))
  for name in ("encoder_norm", "min_audio_s", "channel"):
    del fields[name]
  del fields["frontends"][0]["kind"]
  assert from_json(fields) == SpeechLLMConfig()


def test_the_old_name_of_the_chat_template_is_deprecated(capsys):
  assert model_config(mooer(template="bare")).chat_template == "bare"
  assert "model.template is deprecated; use model.chat_template" in capsys.readouterr().err


def test_old_names_in_a_saved_config_are_read_silently(capsys):
  llm = dict(vocab_size=96, hidden_size=48, head_dim=8, intermediate_size=56)
  llm["tie_word_embeddings"] = True
  parts = dict(sanm=dict(hidden_size=64, intermediate_size=72), linear=dict(hidden_size=40))
  config = model_config(mooer(chat_template="bare", llm=llm, **parts))
  fields = json.loads(json.dumps(to_json(config)))
  for section in (*fields["encoders"], fields["connector"], fields["decoder"], fields):
    renamed = (
      part_kinds()[section["kind"]].RENAMED if "kind" in section else SpeechLLMConfig.RENAMED
    )
    for old, new in renamed.items():
      section[old] = section.pop(new)
  assert fields["decoder"]["mlp_width"] == 56 and fields["template"] == "bare"
  assert from_json(fields) == config
  assert not capsys.readouterr().err


def test_both_names_of_a_key_in_a_saved_config_are_an_error():
  fields = json.loads(json.dumps(to_json(SpeechLLMConfig())))
  with pytest.raises(ValueError, match="both 'chat_template' and its deprecated name 'template'"):
    from_json({**fields, "template": "bare"})


@pytest.mark.parametrize("kind", part_kinds())
def test_old_names_in_a_config_are_deprecated(kind, capsys):
  encoder = kind if kind in ("whisper", "beats") else "sanm"
  names = {"sanm": "sanm_large", "whisper": "whisper_tiny", "beats": "beats_iter3"}
  connector = "qformer" if kind == "qformer" else "linear"
  for old, new in part_kinds()[kind].RENAMED.items():
    default = getattr(part_kinds()[kind](), new)
    value = not default if isinstance(default, bool) else 2 * default
    sections = [
      mooer(encoders=(names[encoder],), connector=connector, **{kind: {name: value}})
      for name in (old, new)
    ]
    capsys.readouterr()
    assert model_config(sections[0]) == model_config(sections[1])
    assert capsys.readouterr().err == (
      f"model.{kind}.{old} is deprecated; use model.{kind}.{new}\n"
    )


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda f: f.pop("decoder"), "has no 'decoder'"),
    (lambda f: f["decoder"].update(kind="rnn"), "decoder.kind='rnn': this version knows .*'llm'"),
    (lambda f: f["encoders"][0].update(depth=3), "unknown config key 'encoders.0..depth'"),
    (lambda f: f.update(extra=1), "config.json: unknown config key 'model.extra'"),
    (lambda f: f["frontends"][0]["fbank"].update(bins="80"), "bins='80'"),
  ],
)
def test_a_damaged_json_is_refused_by_name(change, message):
  fields = json.loads(json.dumps(to_json(SpeechLLMConfig())))
  change(fields)
  with pytest.raises(ValueError, match=message):
    from_json(fields)


def test_a_window_longer_than_the_audio_is_refused():
  def model(edge, **whisper):
    return dict(
      encoders=("whisper_tiny",),
      connector="qformer",
      decoder="smollm2_135m",
      max_audio_s=0.32,
      whisper=dict(context=16, **whisper),
      qformer=dict(edge=edge),
    )

  for trim in (False, True):  # with and without padding to the context
    with pytest.raises(ValueError, match="makes 16 encoder frames, but model.qformer needs 17"):
      model_config(model("drop", trim=trim))
  assert model_config(model("pad", trim=True)).connector.window == 17
  with pytest.raises(ValueError, match="model.linear needs 99 for one speech token"):
    model_config(mooer(max_audio_s=5.0, linear=dict(stack=99)))


@dataclasses.dataclass(frozen=True)
class Inner:
  a: int = 1
  b: str | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
  needed: int
  inner: Inner = Inner(a=5)
  pair: tuple[int, float] = (1, 2.0)


def test_build_takes_any_dataclass():
  section = dict(needed=3, inner=dict(b="x"), pair=[4, 5])
  assert build(Outer, section, "outer") == Outer(3, Inner(a=5, b="x"), (4, 5.0))
  assert build(Outer, section, "outer", base=Outer(0, Inner(a=9))) == Outer(
    3, Inner(9, "x"), (4, 5.0)
  )
  assert build(Inner, dict(b=None), "inner") == Inner()
  with pytest.raises(ValueError, match="outer: .*'needed'"):
    build(Outer, {}, "outer")
  with pytest.raises(ValueError, match="outer.pair="):
    build(Outer, dict(needed=1, pair=(1, 2.0, 3)), "outer")
  with pytest.raises(ValueError, match="inner.b=3"):
    build(Inner, dict(b=3), "inner")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(encoders=()), "one or more"),
    (dict(frontends=()), "1 encoders, but 0 frontends"),
    (dict(max_audio_s=math.inf), r"max_audio_s=inf: must be a finite"),
    (dict(min_audio_s=1e6), "min_audio_s=1e.06 and .*max_audio_s=30: must"),
    (dict(min_audio_s=-1.0), "min_audio_s=-1 and"),
    (dict(prompts={"asr": 5}), r"prompts\[0\]\[1\]=5"),
  ],
)
def test_a_saved_value_out_of_range_is_named_with_the_file(change, message):
  with pytest.raises(ValueError, match=f"^a/config.json: .*{message}"):
    from_json({**to_json(SpeechLLMConfig()), **change}, path="a/config.json")


@pytest.mark.parametrize("kind", [5, ["sanm"], None])
def test_a_kind_is_a_name(kind):
  fields = to_json(SpeechLLMConfig())
  fields["encoders"] = [{**fields["encoders"][0], "kind": kind}]
  with pytest.raises(ValueError, match=r"encoders\[0\]\.kind="):
    from_json(fields)


def test_an_integer_that_no_float_holds_is_refused():
  fields = {**to_json(SpeechLLMConfig()), "max_audio_s": 10**400}
  with pytest.raises(ValueError, match="max_audio_s=1000.*: must be a finite number"):
    from_json(fields)


@pytest.mark.parametrize("part", list(part_kinds().values()), ids=lambda c: c.__name__)
def test_floats_of_a_part_have_ranges(part):
  for field in dataclasses.fields(part):
    if field.type is float:
      for value in (-0.1, math.nan, math.inf, *[1.0] * field.name.endswith("dropout")):
        with pytest.raises(ValueError, match=f"{part.kind}.{field.name}={value} must be"):
          part(**{field.name: value})


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(encoders=5), "model.encoders=5: a tuple of names"),
    (dict(frontends=5), r"model.frontends=5 \(int\): expected a section"),
    (dict(frontends=dict(sanm=5)), "model.frontends.sanm=5"),
    (dict(llm=None), "model.llm=None"),
    (dict(prompts=5), "model.prompts=5"),
    (dict(max_audio_s=math.inf), "model.max_audio_s=inf: must be a finite number"),
    (dict(llm=dict(rope_theta=0.0)), "llm.rope_theta=0.0 must be positive"),
  ],
)
def test_a_section_of_another_type_or_range_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    model_config({**mooer().to_dict(), **change})
