"""A speech LLM of a few thousand parameters and random batches for it."""

import dataclasses

import jax
import numpy as np

from mooer_jax import speech_llm, tree
from mooer_jax.audio.fbank import FbankConfig
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.beats import BEATsConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.nn.compute import ExecutionConfig
from mooer_jax.vocoders import HiFiGANConfig, SpeakerConfig, SpeechOutputConfig

SANM = SANMConfig(
  input_width=56, hidden_size=32, layers=3, heads=4, intermediate_size=48, memory_kernel=3
)
# Patches of 8 x 8, four bands; positions reach three patches far.
BEATS = BEATsConfig(
  input_width=32,
  hidden_size=24,
  layers=2,
  heads=4,
  intermediate_size=40,
  patch=8,
  patch_width=20,
  conv_pos=6,
  conv_pos_groups=3,
  buckets=16,
  max_distance=20,
)
LLM_CONFIG = LLMConfig(
  vocab_size=61,
  hidden_size=40,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=10,
  intermediate_size=56,
  lora_rank=4,
)

# 16 samples per state of the tiny LLM.
SPEECH = SpeechOutputConfig(
  vocoder=HiFiGANConfig(
    input_width=40,
    speaker_width=12,
    hidden_size=16,
    stretch=2,
    rates=(4, 2),
    taps=(8, 4),
    block_taps=(3,),
    dilations=(1, 3),
    sample_rate_hz=16000,
  ),
  speaker=SpeakerConfig(blocks=(1, 1), channels=(8, 8), reduction=4, output_width=12),
)


def speech(**changes) -> SpeechOutputConfig:
  """SPEECH with other values of its fields."""
  return dataclasses.replace(SPEECH, **changes)


def model_config(*, llm=LLM_CONFIG, sanm=SANM, **compute) -> SpeechLLMConfig:
  """The config of the tiny model; 8 mel bins, so 56 values a step."""
  return SpeechLLMConfig(
    encoders=(sanm,),
    connector=LinearConfig(hidden_size=24),
    decoder=llm,
    frontends=(FrontendConfig(fbank=FbankConfig(bins=8)),),
    compute=ExecutionConfig(**compute),
  )


def salmonn_config(**compute) -> SpeechLLMConfig:
  """Whisper and BEATs side by side, a Q-Former and the tiny LLM; 0.8 s of audio at most."""
  beats_frontend = FrontendConfig(fbank=FbankConfig(bins=16), lfr_window=1, lfr_stride=1)
  return SpeechLLMConfig(
    encoders=(
      WhisperConfig(
        input_width=8, hidden_size=32, layers=2, heads=4, intermediate_size=48, positions=40,
        context=40,
      ),
      BEATsConfig(
        input_width=16, hidden_size=24, layers=2, heads=4, intermediate_size=40, patch=8,
        patch_width=20, conv_pos=6, conv_pos_groups=3, buckets=16, max_distance=20,
      ),
    ),
    connector=QFormerConfig(
      window=7, stride=7, queries=2, hidden_size=32, heads=4, intermediate_size=48
    ),
    decoder=LLM_CONFIG,
    frontends=(LogMelConfig(bins=8, chunk_s=0.8), beats_frontend),
    encoder_norm=True,
    chat_template="vicuna",
    max_audio_s=0.8,
    compute=ExecutionConfig(**compute),
  )  # fmt: skip


def answering_config(*, vocab_size: int, **changes) -> SpeechLLMConfig:
  """A MooER with features of full width, for `answering_params`."""
  return SpeechLLMConfig(
    encoders=(SANMConfig(hidden_size=32, layers=2, heads=2, intermediate_size=48),),
    connector=LinearConfig(hidden_size=24),
    decoder=LLMConfig(
      vocab_size=vocab_size,
      hidden_size=32,
      layers=2,
      heads=4,
      kv_heads=2,
      head_dim=8,
      intermediate_size=48,
      tie_word_embeddings=True,
    ),
    **changes,
  )


def answering_params(config: SpeechLLMConfig) -> dict:
  """Random parameters whose greedy answers vary and depend on the audio."""
  params = jax.jit(lambda key: speech_llm.init(key, config))(jax.random.key(0))
  # Larger weights than at the start of training: with those every answer is one token repeated.
  params["decoder"] = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params["decoder"])
  return params


def random_params(shapes, seed=0) -> dict:
  """Random leaves for a tree of shapes; zeros (LoRA's B, biases) and ones would hide mistakes."""
  rng = np.random.default_rng(seed)
  flat = {}
  for path, leaf in tree.flatten(shapes).items():
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    name = path.rsplit("/", 1)[-1]
    if name in ("kernel", "lora_a", "lora_b"):
      flat[path] = noise * leaf.shape[-2] ** -0.5
    else:
      flat[path] = noise if name == "embedding" else 0.1 * noise + (name == "scale")
  return tree.unflatten(flat)


def init(config, seed=0) -> dict:
  """Random parameters of the whole model, per layer or stacked; both hold the same numbers."""
  plain = config.with_compute(scan=False)
  shapes = jax.eval_shape(lambda key: speech_llm.init(key, plain), jax.random.key(0))
  params = random_params(shapes, seed)
  return tree.stack_layers(params) if config.compute.scan else params


def row(seed, *, frames, before=0, after=6, answer=5, config=None):
  """One utterance as (features [T, F], before, after, answer), without padding."""
  config = config or model_config()
  rng = np.random.default_rng(seed)
  tokens = (rng.integers(0, config.decoder.vocab_size, n) for n in (before, after, answer))
  features = rng.normal(size=(frames, config.encoders[0].input_width)).astype(np.float32)
  return features, *tokens


def batch(rows, *, frames=None, before=None, after=None, answer=None) -> speech_llm.Batch:
  """Pads rows to the given sizes, by default to the longest: prompts left, answers right."""
  width = lambda n, wanted: max(len(r[n]) for r in rows) if wanted is None else wanted  # noqa: E731

  def tokens(n, wanted, left):
    out = np.full((len(rows), width(n, wanted)), -1, np.int32)
    for line, r in zip(out, rows):
      place = slice(len(line) - len(r[n]), None) if left else slice(len(r[n]))
      line[place] = r[n]
    return out

  features = np.zeros((len(rows), width(0, frames), rows[0][0].shape[1]), np.float32)
  for line, r in zip(features, rows):
    line[: len(r[0])] = r[0]
  return speech_llm.Batch(
    features=(features,),
    frames=(np.array([len(r[0]) for r in rows], np.int32),),
    prefix_BS=tokens(1, before, left=True),
    suffix_BS=tokens(2, after, left=True),
    labels_BS=tokens(3, answer, left=False),
  )
