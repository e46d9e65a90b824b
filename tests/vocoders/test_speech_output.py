"""Speech output as parts of the composite: config, parameters, checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax import checkpoint, speech_llm, tree, vocoders
from mooer_jax.config import differences, from_json, run_fields, to_json
from mooer_jax.generation.loading import load_model
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.sharding import make_mesh, param_shardings
from mooer_jax.text.tokenizer import Tokenizer
from mooer_jax.training.program import cast_params
from tests import tiny

CONFIG = tiny.model_config().replace(speech_output=tiny.SPEECH)


def test_config_json_holds_speech_output():
  assert "speech_output" not in to_json(tiny.model_config())
  assert from_json(json.loads(json.dumps(to_json(CONFIG)))) == CONFIG
  assert {"speech_output/drop_last", "speech_output/start_token"} < run_fields(CONFIG)
  [found] = differences(CONFIG, CONFIG.replace(speech_output=tiny.speech(drop_last=1)))
  assert found == "speech_output/drop_last"


@pytest.mark.parametrize(
  "section, message",
  [
    ({"vocoder": {"input_width": 3}}, "vocoder.input_width=3, but the LLM's hidden states have 40"),
    ({"vocoder": {"speaker_width": 3}}, "vocoder.speaker_width=3, but speaker.output_width=512"),
    ({"drop_last": -1}, "speech_output.drop_last=-1 must not be negative"),
    ({"start_token": ""}, "speech_output.start_token must not be empty"),
    ({"drop": 1}, "unknown config key 'model.speech_output.drop'; did you mean 'drop_last'?"),
    ([], "model.speech_output=\\[\\] \\(list\\): expected SpeechOutputConfig"),
  ],
)
def test_a_bad_section_is_named(section, message):
  with pytest.raises(ValueError, match=f"config.json: .*{message}"):
    from_json(to_json(CONFIG) | {"speech_output": section})


def test_text_parameters_stay_as_they_are_without_it():
  """Speech output has parameters of its own; those of the others keep their random keys."""
  key = jax.random.key(0)
  plain = jax.jit(lambda: speech_llm.init(key, tiny.model_config()))()
  params = jax.jit(lambda: speech_llm.init(key, CONFIG))()
  assert set(params) - set(plain) == set(vocoders.PARTS)
  for path, leaf in tree.flatten(plain).items():
    np.testing.assert_array_equal(tree.flatten(params)[path], leaf)
  shardings = param_shardings(make_mesh(), speech_llm.param_shapes(CONFIG))
  assert set(shardings) == set(params)
  kept = cast_params(params, (), jnp.bfloat16)
  assert {x.dtype for name in vocoders.PARTS for x in jax.tree.leaves(kept[name])} == {
    jnp.dtype(jnp.float32)
  }
  assert kept["connector"]["linear1"]["kernel"].dtype == jnp.bfloat16


def test_a_model_is_loaded_for_text_without_it(tmp_path):
  tokenizer = Tokenizer.from_characters("ab")
  params = tiny.init(CONFIG)
  checkpoint.save(
    tmp_path / "ckpt",
    params=params,
    config_json=to_json(CONFIG),
    tokenizer=tokenizer.save,
    generation={},
  )
  loaded = load_model(tmp_path / "ckpt", ExecutionConfig(dtype="float32"))
  assert loaded.model.speech_output is None
  assert not set(vocoders.PARTS) & set(loaded.params)


def test_segments_start_at_their_place():
  hidden_BSD = jnp.arange(2 * 9.0).reshape(2, 9, 1)
  states_BSD = vocoders.segment(hidden_BSD, jnp.array([2, 6]), 4)
  assert states_BSD[..., 0].tolist() == [[2, 3, 4, 5], [15, 16, 17, 17]]


def test_states_become_a_waveform_in_a_voice():
  params = tiny.init(CONFIG)
  rng = np.random.default_rng(0)
  states_BSD = rng.normal(size=(2, 5, 40)).astype(np.float32)
  vector_BE = speech_llm.speaker_vector(params, rng.normal(size=(2, 30, 64)), CONFIG)
  waveform_BN = speech_llm.speak(params, states_BSD, jnp.array([5, 3]), vector_BE, CONFIG)
  assert waveform_BN.shape == (2, 5 * 16) and waveform_BN.dtype == jnp.float32
  assert np.any(waveform_BN[1, :48]) and not np.any(waveform_BN[1, 48:])
