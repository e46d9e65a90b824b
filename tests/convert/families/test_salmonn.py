"""SALMONN's files in and out: the same bits, what is passed over, and what is refused."""

import json
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from convert.core.errors import ConversionError
from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.importing import import_checkpoint
from convert.main import main
from mooer_jax import checkpoint, tree
from mooer_jax.config import from_json
from mooer_jax.text.tokenizer import Tokenizer
from tests.convert.releases import changed
from tests.numerics import assert_within, exceeds_the_bound, rounding
from tests.parity import torch_salmonn
from tests.text.spm_training import train

BIAS = "beats.encoder.layers.{}.self_attn.relative_attention_bias.weight"
LORA = "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default.weight"
BUFFERS = ("position_ids", "inv_freq")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llm")
  return torch_salmonn.write_llm(folder / "vicuna", train(folder / "tokenizer", "bpe"))


@pytest.fixture(scope="module")
def module(llm):
  return torch_salmonn.Salmonn(llm)


@pytest.fixture(scope="module")
def deaf(llm):
  """A model without BEATs."""
  return torch_salmonn.Salmonn(llm, with_beats=False)


def bring(folder, module, llm, *, options=None, **content):
  """Writes the files and imports them: (report, checkpoint)."""
  paths = torch_salmonn.write(folder / "files", module, **content)
  options = Options(**{"llm": llm, **paths, **(options or {})})
  report = import_checkpoint(
    "salmonn", folder / "files" / "salmonn_v1.pth", folder / "ours", options=options
  )
  return report, checkpoint.describe(folder / "ours")


@pytest.fixture(scope="module")
def imported(tmp_path_factory, module, llm):
  """The model as it is: (folder of its checkpoint, report, checkpoint)."""
  folder = tmp_path_factory.mktemp("imported")
  return folder / "ours", *bring(folder, module, llm)


def take_back(folder, ours="ours"):
  export_checkpoint("salmonn", folder / ours, folder / "back")
  return torch.load(folder / "back" / "salmonn_v1.pth", weights_only=True)


def from_back(folder, **others):
  back = folder / "back"
  found = back / "beats.pt"
  return Options(
    whisper=back / "whisper", beats=found if found.exists() else None, llm=back / "llm", **others
  )


def mapped(state):
  return {
    name: tensor
    for name, tensor in state.items()
    if not name.endswith(BUFFERS) and "relative_attention_bias" not in name
  }


def assert_same(before, after):
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@given(
  st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans(), st.integers(0, 99)
)
@settings(max_examples=2)
def test_a_file_goes_in_and_comes_out_as_it_was(module, deaf, llm, dtype, with_beats, seed):
  source = module if with_beats else deaf
  generator = torch.Generator().manual_seed(seed)
  state = {
    name: torch.randn(t.shape, generator=generator).to(dtype)
    if name in mapped(source.saved())
    else t
    for name, t in source.saved().items()
  }
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    report, _ = bring(folder, source, llm, state=state)
    passed_over = {n for n in state if n not in mapped(state)}
    assert passed_over | {"optimizer", "scaler", "epoch", "config"} <= {
      entry.split(" ")[0].removeprefix("model.") for entry in report.ignored
    }
    assert_same(mapped(state), take_back(folder)["model"])
    import_checkpoint(
      "salmonn", folder / "back" / "salmonn_v1.pth", folder / "again", options=from_back(folder)
    )
    first, second = (
      tree.flatten(checkpoint.load(folder / part).params) for part in ("ours", "again")
    )
    assert first.keys() == second.keys()
    for path, leaf in first.items():
      assert leaf.dtype == second[path].dtype and np.array_equal(leaf, second[path]), path


def test_what_travels_in_the_checkpoint(imported):
  _, report, about = imported
  config = from_json(about.config)
  assert [encoder.kind for encoder in config.encoders] == ["whisper", "beats"]
  assert config.encoder_norm and config.chat_template == "vicuna" and config.channel == "first"
  assert (config.max_audio_s, config.min_audio_s) == (torch_salmonn.SECONDS, 1.0)
  q = config.connector
  assert (q.window, q.stride, q.edge, q.queries, q.layers) == (17, 17, "drop", 2, 2)
  decoder = config.decoder
  assert (decoder.lora_rank, decoder.lora_alpha, decoder.lora_dropout) == (4, 16.0, 0.1)
  assert decoder.lora_targets == ("q", "v")
  assert about.generation == {
    "num_beams": 4,
    "max_new_tokens": 200,
    "min_length": 1,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "eos_token_id": [2],
  }
  assert "<Speech><SpeechHere></Speech>" in dict(config.prompts)["asr"]
  assert any("LoRA: rank 4, alpha 16, on q, v" in note for note in report.notes)


def test_merged_lora_is_a_model_without(module, llm, tmp_path):
  _, about = bring(tmp_path, module, llm, options={"merge_lora": True})
  config = from_json(about.config)
  assert config.decoder.lora_rank == 0
  merged = checkpoint.load(tmp_path / "ours").params["decoder"]["layers_1"]["attention"]["q"]
  layer = module.llama_model.base_model.model.model.layers[1].self_attn.q_proj
  expected = layer.base_layer.weight + layer.get_delta_weight("default")
  expected = expected.detach().numpy()
  bound = rounding(5, np.abs(expected).max())  # a weight and a product over rank 4
  assert_within(merged["kernel"].T, expected, bound)
  with exceeds_the_bound():
    assert_within(merged["kernel"].T, layer.base_layer.weight.detach().numpy(), bound)
  back = take_back(tmp_path)
  assert not any("lora" in name for name in back["model"])
  assert back["config"]["model"]["lora"] is False
  options = from_back(tmp_path, prompts=tmp_path / "back" / "test_prompt.json")
  import_checkpoint(
    "salmonn", tmp_path / "back" / "salmonn_v1.pth", tmp_path / "again", options=options
  )
  assert from_json(checkpoint.describe(tmp_path / "again").config) == config


def test_alpha_comes_from_the_file_or_from_the_published_values_or_a_config(module, llm, tmp_path):
  for name in "abc":
    (tmp_path / name).mkdir()
  with pytest.raises(ConversionError, match="LoRA has rank 4, but r is 8.*--lora-config"):
    bring(tmp_path / "a", module, llm, config=None)
  told = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_dropout": 0.0}
  (tmp_path / "adapter_config.json").write_text(json.dumps(told))
  options = {"lora_config": tmp_path}
  report, about = bring(tmp_path / "b", module, llm, config=None, options=options)
  decoder = from_json(about.config).decoder
  assert (decoder.lora_alpha, decoder.lora_dropout) == (6.0, 0.0)
  assert any("has no training configuration" in note for note in report.notes)
  state = module.saved()
  for n in range(2):
    for x in "qv":
      state[LORA.format(n, x, "A")] = torch.ones(8, 40)
      state[LORA.format(n, x, "B")] = torch.ones(40, 8)
  _, about = bring(tmp_path / "c", module, llm, config=None, state=state)
  assert from_json(about.config).decoder.lora_scale == 4.0


def test_names_without_the_adapter_are_taken_too(module, llm, tmp_path):
  state = {name.replace(".default.weight", ".weight"): t for name, t in module.saved().items()}
  bring(tmp_path, module, llm, state=state)
  assert_same(mapped(state), take_back(tmp_path)["model"])


def test_what_was_trained_along_goes_over_the_folders(module, llm, tmp_path):
  wrapped = "llama_model.base_model.model.model.layers.1"
  tuned = {
    "speech_encoder.layers.1.fc1.weight": torch.randn(40, 32),
    "beats.encoder.layers.2.fc1.bias": torch.randn(40),
    f"{wrapped}.self_attn.q_proj.base_layer.weight": torch.randn(40, 40),
    f"{wrapped}.self_attn.v_proj.weight": torch.randn(40, 40),  # peft 0.3
    f"{wrapped}.mlp.up_proj.weight": torch.randn(56, 40),
  }
  state = {**module.saved(), **tuned}
  report, _ = bring(tmp_path, module, llm, state=state)
  assert any("5 tensors of salmonn_v1.pth replace" in note for note in report.notes)
  params = checkpoint.load(tmp_path / "ours").params
  for path, name in (
    ("decoder/layers_1/attention/q/kernel", f"{wrapped}.self_attn.q_proj.base_layer.weight"),
    ("encoders/whisper/layers_1/mlp/up/kernel", "speech_encoder.layers.1.fc1.weight"),
  ):
    assert np.array_equal(tree.flatten(params)[path].T, tuned[name].numpy())
  assert_same(mapped(state), take_back(tmp_path)["model"])


def test_a_tied_head_is_passed_over_if_it_is_the_embedding(tmp_path, llm):
  folder = torch_salmonn.write_llm(
    tmp_path / "tied", llm / "tokenizer.model", tie_word_embeddings=True
  )
  module = torch_salmonn.Salmonn(folder)
  head = "llama_model.base_model.model.lm_head.weight"
  state = module.saved()
  assert head in state  # a second name of a frozen tensor is not among the frozen names
  state[head] = torch.cat([state[head], torch.ones(1, 40)])  # the row of [PAD]
  report, _ = bring(tmp_path, module, folder, state=state)
  assert head in report.ignored
  state[head] = state[head] + 1
  (tmp_path / "other").mkdir()
  with pytest.raises(ConversionError, match="lm_head.weight differs from that tensor"):
    bring(tmp_path / "other", module, folder, state=state)


def _renamed(state, old, new):
  state[new] = state.pop(old)


@pytest.mark.parametrize(
  "change, messages",
  [
    (lambda s: s.pop("ln_audio.bias"), ["ln_audio.bias [24] is missing"]),
    (lambda s: s.update(mystery=torch.ones(2)), ["mystery [2] is unmapped: no rule knows"]),
    (
      lambda s: (s.pop(LORA.format(0, "q", "B")), _renamed(s, "ln_speech.bias", "ln_speech.b")),
      ["3 problems", "q_proj.lora_B.default.weight [40, 4] is missing", "ln_speech.b [32]"],
    ),
    (
      lambda s: s.update({"speech_llama_proj.weight": torch.ones(41, 48)}),
      ["speech_llama_proj.weight has shape [41, 48], the model needs [40, 48]"],
    ),
    (
      lambda s: s.update({BIAS.format(2): torch.ones(320, 4)}),
      [f"{BIAS.format(2)} differs from that tensor in the folders"],
    ),
    (
      lambda s: s.update({"llama_model.base_model.model.lm_head.weight": torch.ones(701, 40)}),
      ["lm_head.weight has shape [701, 40], the model needs [700, 40]"],
    ),
  ],
)
def test_every_tensor_that_does_not_fit_is_named(module, llm, tmp_path, change, messages):
  state = module.saved()
  change(state)
  with pytest.raises(ConversionError) as refused:
    bring(tmp_path, module, llm, state=state)
  for message in messages:
    assert message in str(refused.value)
  assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"window_level_Qformer": False}, "window_level_Qformer=False"),
    ({"prompt_template": "ASK {}"}, "prompt_template='ASK {}'"),
    ({"end_sym": "###"}, "end_sym='###'"),
    ({"lora": False}, "has lora=False"),
    ({"lora_rank": 8}, "LoRA has rank 4"),
    ({"second_stride": 0.5}, "stride"),
  ],
)
def test_another_model_is_refused_by_name(module, llm, tmp_path, change, message):
  config = {"model": {**torch_salmonn.CONFIG["model"], **change}}
  with pytest.raises(ConversionError, match=message):
    bring(tmp_path, module, llm, config=config)


def test_beats_must_be_there_exactly_if_it_was_used(module, deaf, llm, tmp_path):
  with pytest.raises(ConversionError, match="has an ln_audio.* --beats"):
    bring(tmp_path, module, llm, options={"beats": None})
  given = tmp_path / "files" / "beats.pt"
  (tmp_path / "b").mkdir()
  with pytest.raises(ConversionError, match="has no ln_audio, so leave out --beats"):
    bring(tmp_path / "b", deaf, llm, options={"beats": given})


def test_bos_leads_whatever_the_tokenizers_files_say(module, llm, tmp_path):
  source = torch_salmonn.write_llm(tmp_path / "llm", llm / "tokenizer.model", specials={})
  assert Tokenizer.from_folder(source).bos_ids == []
  _, about = bring(tmp_path, module, source)
  tokenizer = Tokenizer.from_folder(about.tokenizer)
  assert tokenizer.bos_ids == [1]
  take_back(tmp_path)
  file = about.tokenizer / "tokenizer_config.json"
  config = json.loads(file.read_text())
  file.write_text(json.dumps({**config, "add_bos_token": False}))
  with pytest.raises(ConversionError, match="do not begin with BOS"):
    export_checkpoint("salmonn", tmp_path / "ours", tmp_path / "other")
  config = json.loads((source / "tokenizer_config.json").read_text())
  del config["bos_token"]
  (source / "tokenizer_config.json").write_text(json.dumps(config))
  (tmp_path / "b").mkdir()
  with pytest.raises(ConversionError, match="no BOS"):
    bring(tmp_path / "b", module, source)


def test_prompts_are_those_of_a_file_and_come_back(module, llm, tmp_path):
  prompts = {"asr": "Hear <SpeechHere> and write.", "QA": "<SpeechHere> {}"}
  (tmp_path / "p.json").write_text(json.dumps(prompts))
  _, about = bring(tmp_path, module, llm, options={"prompts": tmp_path / "p.json"})
  assert about.config["prompts"] == prompts
  take_back(tmp_path)
  assert json.loads((tmp_path / "back" / "test_prompt.json").read_text()) == prompts
  for wrong, message in (({"asr": "no place"}, "0 times"), ({"asr": ["a", "b"]}, "several")):
    (tmp_path / "p.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=message):
      options = Options(
        whisper=tmp_path / "back" / "whisper",
        beats=tmp_path / "back" / "beats.pt",
        llm=llm,
        prompts=tmp_path / "p.json",
      )
      import_checkpoint(
        "salmonn", tmp_path / "back" / "salmonn_v1.pth", tmp_path / "no", options=options
      )


def set_what_files_cannot_say(config):
  config.update(min_audio_s=0.5, channel="mean")
  config["connector"].update(edge="pad", heads=6)
  config["encoders"][0].update(trim=True)


@pytest.mark.parametrize(
  "change, messages",
  [
    (
      set_what_files_cannot_say,
      [
        "5 problems",
        "min_audio_s is 0.5",
        "channel is 'mean'",
        "connector/edge is 'pad'",
        "connector/heads is 6",
        "encoders/0/trim is True",
      ],
    ),
    (lambda c: c.update(encoder_norm=False), ["encoder_norm=False"]),
    (lambda c: c.update(chat_template="mooer"), ["prompt_template"]),
  ],
)
def test_export_refuses_what_the_files_cannot_say(imported, tmp_path, change, messages):
  shutil.copytree(imported[0], tmp_path / "ours")
  changed(tmp_path / "ours", change)
  with pytest.raises(ConversionError) as caught:
    take_back(tmp_path)
  for message in messages:
    assert message in str(caught.value)
  assert not (tmp_path / "back").exists()


def test_a_fine_tune_goes_out_with_its_base(module, imported, tmp_path):
  folder, _, about = imported
  loaded = checkpoint.load(folder)
  trained = {path: leaf for path, leaf in tree.flatten(loaded.params).items() if _is_trained(path)}
  checkpoint.save(
    tmp_path / "tuned",
    params=tree.unflatten({path: leaf + 1 for path, leaf in trained.items()}),
    config_json=about.config,
    generation=about.generation,
    tokenizer=lambda into: [
      (into / f.name).write_bytes(f.read_bytes()) for f in about.tokenizer.iterdir()
    ],
    base=folder,
  )
  back = take_back(tmp_path, "tuned")["model"]
  state = mapped(module.saved())
  assert_same({name: tensor + 1 for name, tensor in state.items()}, back)


def _is_trained(path):
  return path.startswith(("connector/", "encoder_norms/")) or path.endswith(("lora_a", "lora_b"))


def test_the_command_line_knows_the_kind(module, llm, tmp_path, capsys):
  paths = torch_salmonn.write(tmp_path / "files", module)
  file, ours = str(tmp_path / "files" / "salmonn_v1.pth"), str(tmp_path / "ours")
  assert main(["inspect", "--short", file]) == 0
  assert "kind: salmonn\n" in capsys.readouterr().out
  assert main(["import", "salmonn", file, ours]) == 2
  assert "salmonn needs --whisper and --llm" in capsys.readouterr().err
  named = ["--whisper", str(paths["whisper"]), "--beats", str(paths["beats"]), "--llm", str(llm)]
  assert main(["import", "salmonn", file, ours, *named]) == 0
  assert main(["export", "salmonn", ours, str(tmp_path / "back")]) == 0
  assert main(["export", "mooer", ours, str(tmp_path / "no")]) == 2
