"""The vocoder of MooER-omni and its speaker encoder: their released files, in and out."""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mooer_jax import tree
from mooer_jax.audio import speaker_mel
from mooer_jax.checkpoint import Checkpoint, LazyArray
from mooer_jax.config import build
from mooer_jax.vocoders import HiFiGANConfig, SpeakerConfig

from ..core.engine import map_in, map_out, paths_of, read_out
from ..core.errors import ConversionError, Problems
from ..core.folders import kept_files
from ..core.kind import Writer
from ..core.rules import CONVOLUTION, Rule, Table, Transform, linear
from ..core.shapes import shape_of
from ..core.writers import state_dict, to_torch
from ..readers import Source, open_torch

# weight_norm keeps its norms [channels, 1, 1]; ours are [channels].
_NORMS = Transform(lambda x: x[:, 0, 0], lambda x: x[:, None, None])
# nn.ConvTranspose1d keeps [in, out, taps], our kernels are [taps, in, out].
_TRANSPOSED = Transform(lambda x: np.moveaxis(x, 2, 0), lambda x: np.moveaxis(x, 0, 2))
# nn.Conv1d with one tap keeps [out, in, 1], our dense kernels are [in, out].
_ONE_TAP = Transform(lambda x: x[..., 0].T, lambda x: x.T[..., None])
# nn.Conv2d keeps [out, in, frequency, time], our kernels are [frequency, time, in, out].
_PLANE = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def _normalised(theirs: str, ours: str, layout: Transform) -> tuple[Rule, ...]:
  return (
    Rule(f"{theirs}.weight_v", f"{ours}/v", layout),
    Rule(f"{theirs}.weight_g", f"{ours}/g", _NORMS),
    Rule(f"{theirs}.bias", f"{ours}/bias"),
  )


def _one_tap(theirs: str, ours: str) -> tuple[Rule, ...]:
  kernel = Rule(f"{theirs}.weight", f"{ours}/kernel", _ONE_TAP)
  return kernel, Rule(f"{theirs}.bias", f"{ours}/bias")


def _batch_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
  names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
  return tuple(Rule(f"{theirs}.{a}", f"{ours}/{b}") for a, b in names.items())


GENERATOR = Table((
  *_normalised("conv_pre", "vocoder/first", CONVOLUTION),
  *_normalised("ups.{n}", "vocoder/up_{n}", _TRANSPOSED),
  *_normalised("resblocks.{n}.convs1.{m}", "vocoder/block_{n}/dilated_{m}", CONVOLUTION),
  *_normalised("resblocks.{n}.convs2.{m}", "vocoder/block_{n}/plain_{m}", CONVOLUTION),
  *_normalised("conv_post", "vocoder/last", CONVOLUTION),
  *_one_tap("cond_layer", "vocoder/speaker"),
  *_one_tap("conds.{n}", "vocoder/speaker_{n}"),
))  # fmt: skip

_BLOCK, _OURS = "layer{s}.{n}", "speaker/block_{s}_{n}"
SPEAKER = Table((
  Rule("conv1.weight", "speaker/conv1/kernel", _PLANE),
  Rule("conv1.bias", "speaker/conv1/bias"),
  *_batch_norm("bn1", "speaker/norm1"),
  Rule(f"{_BLOCK}.conv{{c:1|2}}.weight", f"{_OURS}/conv{{c}}/kernel", _PLANE),
  *_batch_norm(f"{_BLOCK}.bn{{c:1|2}}", f"{_OURS}/norm{{c}}"),
  *linear(f"{_BLOCK}.se.fc.0", f"{_OURS}/squeeze"),
  *linear(f"{_BLOCK}.se.fc.2", f"{_OURS}/excite"),
  Rule(f"{_BLOCK}.downsample.0.weight", f"{_OURS}/shortcut/kernel", _PLANE),
  *_batch_norm(f"{_BLOCK}.downsample.1", f"{_OURS}/shortcut_norm"),
  *_one_tap("attention.0", "speaker/pool1"),
  *_batch_norm("attention.2", "speaker/pool_norm"),
  *_one_tap("attention.3", "speaker/pool2"),
  *linear("fc", "speaker/output"),
))  # fmt: skip

# Of the speaker encoder: the constants of its features, and counters of training.
BUFFERS = (r"torch_spec\..*", r".*\.num_batches_tracked")
GENERATOR_KEY, SPEAKER_KEY = "generator", "speaker_encoder"  # of the dicts in the files
BUFFER_FILE = "buffers.npz"


def open_generator(path: Path, problems: Problems) -> tuple[HiFiGANConfig, dict[str, LazyArray]]:
  """Opens a file `g_*`: (config, leaves). Raises ValueError if it is not a generator."""
  source = open_torch(path, GENERATOR_KEY)
  config = generator_config(source)
  return config, map_in(source, GENERATOR, _generator_shapes(config), problems=problems).leaves


def open_speaker(
  path: Path, problems: Problems
) -> tuple[SpeakerConfig, dict[str, LazyArray], Writer]:
  """Opens a file `spk_*`: (config, leaves, writer of its buffers into a folder of source/).

  Raises ValueError if it is not a speaker encoder, or has features of another kind.
  """
  source = open_torch(path, SPEAKER_KEY)
  config = speaker_config(source)
  mapped = map_in(source, SPEAKER, _speaker_shapes(config), problems=problems, ignored=BUFFERS)
  buffers = {name: source.read(name) for name in mapped.ignored}
  for name, ours in _constants().items():
    if name in buffers and not (
      buffers[name].shape == ours.shape and np.allclose(buffers[name], ours, atol=1e-4)
    ):
      problems.add(f"{path.name}: {name} is of other features than audio.speaker_mel computes")
  return config, mapped.leaves, lambda folder: _write_buffers(folder, buffers)


def _write_buffers(folder: Path, buffers: dict[str, np.ndarray]) -> None:
  np.savez(folder / BUFFER_FILE, **buffers)  # type: ignore[arg-type]


def generator_config(source: Source) -> HiFiGANConfig:
  """Derives the sizes from the shapes of the tensors.

  The shapes do not have rates and dilations: a rate is half of its taps, dilations are 1, 3, 5, …
  """
  hidden_size, input_width, _ = shape_of(source, "conv_pre.weight_v", 3)
  taps = [shape_of(source, f"ups.{n}.weight_v", 3)[2] for n in range(_count(source, r"ups\.(\d+)"))]
  blocks = _count(source, r"resblocks\.(\d+)")
  if not taps or blocks % len(taps):
    raise ConversionError(f"{source.path}: {blocks} residual blocks for {len(taps)} stages")
  pairs = _count(source, r"resblocks\.0\.convs1\.(\d+)")
  sizes = {
    "input_width": input_width,
    "speaker_width": shape_of(source, "cond_layer.weight", 3)[1],
    "hidden_size": hidden_size,
    "rates": tuple(n // 2 for n in taps),
    "taps": tuple(taps),
    "block_taps": tuple(
      shape_of(source, f"resblocks.{n}.convs1.0.weight_v", 3)[2] for n in range(blocks // len(taps))
    ),
    "dilations": tuple(2 * n + 1 for n in range(pairs)),
  }
  return build(HiFiGANConfig, sizes, "vocoder")


def speaker_config(source: Source) -> SpeakerConfig:
  """Derives the sizes from the shapes of the tensors."""
  stages = range(1, 1 + _count(source, r"layer(\d+)", first=1))
  channels = tuple(shape_of(source, f"layer{n}.0.conv1.weight", 4)[0] for n in stages)
  if not channels:
    raise ConversionError(f"{source.path}: layer1.0.conv1.weight is missing")
  pooled = shape_of(source, "attention.0.weight", 3)[1]
  sizes = {
    "bins": pooled // channels[-1] << (len(stages) - 1),
    "blocks": tuple(_count(source, rf"layer{n}\.(\d+)") for n in stages),
    "channels": channels,
    "reduction": channels[0] // shape_of(source, "layer1.0.se.fc.0.weight", 2)[0],
    "output_width": shape_of(source, "fc.weight", 2)[0],
  }
  return build(SpeakerConfig, sizes, "speaker")


def _count(source: Source, pattern: str, *, first: int = 0) -> int:
  """The largest number that a pattern finds at the start of a name, plus one, minus `first`."""
  found = (re.match(pattern + r"\.", name) for name in source.tensors)
  return max((int(match[1]) + 1 - first for match in found if match), default=0)


@functools.cache
def _generator_shapes(config: HiFiGANConfig) -> dict[str, tuple[int, ...]]:
  states_BSD = jnp.zeros((1, 1, config.input_width))
  speaker_BE = jnp.zeros((1, config.speaker_width))
  return _shapes("vocoder", config.module(), states_BSD, jnp.ones(1, jnp.int32), speaker_BE)


@functools.cache
def _speaker_shapes(config: SpeakerConfig) -> dict[str, tuple[int, ...]]:
  return _shapes("speaker", config.module(), jnp.zeros((1, 16, config.bins)))


def _shapes(root: str, module, *inputs) -> dict[str, tuple[int, ...]]:
  variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  leaves = tree.flatten(variables["params"])
  return {f"{root}/{path}": tuple(leaf.shape) for path, leaf in leaves.items()}


def _constants() -> dict[str, np.ndarray]:
  """The constants of `audio.speaker_mel`, as buffers of the speaker encoder."""
  window_N = torch.hamming_window(speaker_mel.WINDOW, dtype=torch.float32).numpy()
  return {
    "torch_spec.0.filter": np.array([[[-speaker_mel.PREEMPHASIS, 1.0]]], np.float32),
    "torch_spec.1.spectrogram.window": window_N,
    "torch_spec.1.mel_scale.fb": speaker_mel.mel_matrix().astype(np.float32),
  }


def export_generator(about: Checkpoint, path: Path) -> None:
  """Writes a file `g_*`, with weight norm kept apart."""
  tensors = map_out(about, GENERATOR, paths_of(about, "vocoder/"))
  torch.save({GENERATOR_KEY: state_dict(tensors, read_out(about, tensors))}, path)


def export_speaker(about: Checkpoint, path: Path) -> None:
  """Writes a file `spk_*`, with the buffers of the imported one or else our own."""
  tensors = map_out(about, SPEAKER, paths_of(about, "speaker/"))
  state = state_dict(tensors, read_out(about, tensors))
  buffers = dict(_kept_buffers(about)) or _new_buffers(state)
  state |= {name: to_torch(value) for name, value in buffers.items()}
  torch.save({SPEAKER_KEY: state}, path)


def _kept_buffers(about: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
  for file in kept_files(about, "speaker"):
    with np.load(file) as kept:
      yield from kept.items()


def _new_buffers(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
  norms = [name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean")]
  counters = {f"{name}.num_batches_tracked": np.zeros((), np.int64) for name in norms}
  return _constants() | counters
