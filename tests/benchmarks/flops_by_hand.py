"""FLOPs of a training step by formula."""

from collections.abc import Callable
from typing import Any

from mooer_jax.audio.fbank import num_fbank_frames
from mooer_jax.audio.frontend import Frontend
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.connectors.qformer import QFormerConfig
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.beats import BEATsConfig
from mooer_jax.encoders.sanm import SANMConfig
from mooer_jax.encoders.whisper import WhisperConfig
from mooer_jax.speech_llm import Batch


def _transformer(c: SANMConfig | WhisperConfig | BEATsConfig, tokens: int) -> int:
  """The layers of an encoder over one row: four projections, feed-forward, scores."""
  weights = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
  return c.layers * (2 * tokens * weights + 4 * tokens**2 * c.hidden_size)


def _sanm(c: SANMConfig, frames: int) -> int:
  widening = 3 * (c.input_width - c.hidden_size) * c.hidden_size  # q, k, v of the first layer
  return _transformer(c, frames) + 2 * frames * widening


def _whisper(c: WhisperConfig, frames: int) -> int:
  """The whole context is computed, for any length of the features."""
  del frames
  taps = 3
  convolutions = (
    2 * taps * (c.max_frames * c.input_width * c.hidden_size + c.context * c.hidden_size**2)
  )
  return _transformer(c, c.context) + convolutions


def _beats(c: BEATsConfig, frames: int) -> int:
  tokens = c.num_outputs(frames)
  patches = (
    c.patch**2 * c.patch_width + (c.patch_width != c.hidden_size) * c.patch_width * c.hidden_size
  )
  positions = c.conv_pos * c.hidden_size**2 // c.conv_pos_groups
  gates = c.layers * c.hidden_size * 8
  return _transformer(c, tokens) + 2 * tokens * (patches + positions + gates)


def _linear(c: LinearConfig, frames: int, width: int, output_width: int) -> tuple[int, int]:
  reading = 2 * c.num_tokens(frames) * c.stack * width * c.hidden_size
  return reading, reading + 2 * c.num_tokens(frames) * c.hidden_size * output_width


def _qformer(c: QFormerConfig, frames: int, width: int, output_width: int) -> tuple[int, int]:
  tokens = c.num_tokens(frames)
  reading = c.layers * 2 * (tokens // c.queries * c.window) * 2 * width * c.hidden_size
  # Among the queries q, k, v, out; to the window q, out; feed-forward.
  weights = 6 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
  scores = 4 * tokens * (c.queries + c.window) * c.hidden_size
  layers = c.layers * (2 * tokens * weights + scores)
  return reading, reading + layers + 2 * tokens * c.hidden_size * output_width


_ENCODERS: dict[type, Callable[[Any, int], int]] = {
  SANMConfig: _sanm,
  WhisperConfig: _whisper,
  BEATsConfig: _beats,
}
_CONNECTORS: dict[type, Callable[[Any, int, int, int], tuple[int, int]]] = {
  LinearConfig: _linear,
  QFormerConfig: _qformer,
}


def _decoder(c: LLMConfig, length: int, answer: int) -> int:
  """Forward, and backward to inputs and LoRA, of one row."""
  q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
  shapes = {
    "q": (c.hidden_size, q),
    "k": (c.hidden_size, kv),
    "v": (c.hidden_size, kv),
    "o": (q, c.hidden_size),
    "gate": (c.hidden_size, c.intermediate_size),
    "up": (c.hidden_size, c.intermediate_size),
    "down": (c.intermediate_size, c.hidden_size),
  }
  weights = sum(a * b for a, b in shapes.values())
  lora = sum(c.lora_rank * sum(shapes[name]) for name in c.lora_targets)
  scores = 4 * length**2 * q
  layers = c.layers * (2 * length * (2 * weights + 3 * lora) + 3 * scores)
  return layers + 2 * answer * 2 * c.hidden_size * c.vocab_size


def features(frontend: Frontend, batch: Batch) -> int:
  """FLOPs of the features of waveforms for one encoder: the DFT as a matrix, the mel bank."""
  (waveforms,) = batch.features
  rows, samples = waveforms.shape
  if isinstance(frontend, LogMelConfig):
    length, frequencies, bins = frontend.frame_length, frontend.frame_length // 2 + 1, frontend.bins
    frames, products = frontend.num_frames(samples), 1
  else:
    fbank = frontend.fbank
    length, frequencies, bins = fbank.frame_length, fbank.fft_length // 2, fbank.bins
    frames, products = num_fbank_frames(samples, fbank), 3  # of 9 bits and of the rests
  return 2 * rows * frames * (products * length * 2 * frequencies + frequencies * bins)


def train_step(config: SpeechLLMConfig, batch: Batch) -> int:
  """FLOPs of a training step without recomputation.

  The connector, LoRA and the norms after the encoders are trained. Frozen weights have no gradient,
  and the encoders no backward pass; the input of the connector has a gradient only after norms. All
  attention scores count, although the mask is causal.

  Args:
    config: the model config.
    batch: arrays or their shapes; padding counts in full.
  """
  lengths = [x.shape[1] for x in batch.features]
  encoding = 0
  if not batch.encoded:
    pairs = list(zip(config.encoders, lengths, strict=True))
    encoding = sum(_ENCODERS[type(encoder)](encoder, frames) for encoder, frames in pairs)
    lengths = [encoder.num_outputs(frames) for encoder, frames in pairs]
  frames, width = max(lengths), sum(encoder.hidden_size for encoder in config.encoders)
  connector = config.connector
  reading, connecting = _CONNECTORS[type(connector)](
    connector, frames, width, config.decoder.hidden_size
  )
  connecting = 3 * connecting - (0 if config.encoder_norm else reading)
  rows, answer = batch.labels_BS.shape
  prompt = batch.prefix_BS.shape[1] + connector.num_tokens(frames) + batch.suffix_BS.shape[1]
  return rows * (encoding + connecting + _decoder(config.decoder, prompt + answer - 1, answer))
