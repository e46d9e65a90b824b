"""Our side of `convert verify`: the stages of a checkpoint on clips, and their errors."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import speech_llm, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.config import SpeechLLMConfig
from mooer_jax.generation import GenerationConfig
from mooer_jax.generation.generate import generate, generate_from
from mooer_jax.inputs import encoder_inputs, extract_features
from mooer_jax.nn.compute import ExecutionConfig

from ..core.kind import Original, Request
from .report import Accuracy, Report, accuracy, same_tokens, stage_errors

# What a checkpoint is run with besides: (name, dtype of the weights, dtype of the computation).
DTYPES = (
  ("bfloat16 weights", "bfloat16", "float32"),
  ("bfloat16 compute", "bfloat16", "bfloat16"),
)
Logits = Callable[[dict, ExecutionConfig], np.ndarray]


def load_clips(files: Sequence[Path], config: SpeechLLMConfig) -> list[np.ndarray]:
  """Decodes audio files at the model's sample rate: float32 [N] each.

  Raises:
    ValueError: if one is too short or too long for an encoder, before PyTorch would cut it.
  """
  rate_hz = config.sample_rate_hz
  clips = [load_audio(file, sample_rate_hz=rate_hz, channel=config.channel) for file in files]
  for file, clip_N in zip(files, clips, strict=True):
    extract_features(clip_N, config, name=str(file))
  return clips


def compare(request: Request, original: Original) -> Report:
  """Compares all stages that both sides have, and what each generates.

  Args:
    request: the checkpoint and the clips, which are computed in one batch.
    original: the results of the original.
  """
  params, config = request.about.params, request.config
  theirs = {
    stage: np.concatenate([clip[stage] for clip in original.clips]) for stage in original.clips[0]
  }
  notes = list(original.notes)
  if "tokens" not in theirs:
    batch = _batch(request, original)
    stages = _encoder_stages(params, batch, config)
    return Report(stage_errors(_valid(stages), theirs), notes=notes)
  eos_token_id = () if request.eos_id is None else (request.eos_id,)
  options = GenerationConfig(max_new_tokens=request.max_new_tokens, eos_token_id=eos_token_id)
  if request.waveforms:
    batch = _batch(request, original)
    ours = _valid(_speech_stages(params, batch, config))
    tokens_BS = generate(params, batch, config, options).tokens_BS

    def logits(params: dict, compute: ExecutionConfig) -> np.ndarray:
      logits_BAV = _answer_logits(params, batch, config.replace(compute=compute))
      return np.asarray(logits_BAV)[batch.labels_BS >= 0]
  else:
    prompt_S, ours = original.prompt[0], {}
    tokens_BS = _generate_text(params, jnp.array([prompt_S]), config, options)
    given_BS = jnp.array([[*prompt_S, *theirs["tokens"][:-1]]])

    def logits(params: dict, compute: ExecutionConfig) -> np.ndarray:
      logits_BSV = _text_logits(params, given_BS, config.replace(compute=compute))
      return np.asarray(logits_BSV)[0, len(prompt_S) - 1 :]

  generated = [[int(token) for token in row_S if token >= 0] for row_S in np.asarray(tokens_BS)]
  same = same_tokens(generated, [clip["tokens"].tolist() for clip in original.clips])
  exact_AV = logits(params, ExecutionConfig())
  errors = stage_errors({**ours, "logits": exact_AV}, theirs)
  return Report(errors, same, _cost_of_dtypes(params, exact_AV, logits), notes)


def _cost_of_dtypes(params, exact_AV: np.ndarray, logits: Logits) -> list[Accuracy]:
  rows = []
  for name, stored, computed in DTYPES:
    rounded = tree.unflatten(
      {  # as `checkpoint.load` does it
        path: leaf if leaf.ndim < 2 else leaf.astype(stored)
        for path, leaf in tree.flatten(params).items()
      }
    )
    rows.append(accuracy(name, exact_AV, logits(rounded, ExecutionConfig(dtype=computed))))
  return rows


def _batch(request: Request, original: Original) -> speech_llm.Batch:
  config, rows = request.config, len(request.waveforms)
  features, frames = encoder_inputs([extract_features(x_N, config) for x_N in request.waveforms])
  outputs = [clip.get("tokens", np.zeros(0)).astype(np.int32) for clip in original.clips]
  prefix_BS, suffix_BS = (
    np.tile(np.array(part_S, np.int32), (rows, 1)) for part_S in original.prompt
  )
  return speech_llm.Batch(
    features=features,
    frames=frames,
    prefix_BS=prefix_BS,
    suffix_BS=suffix_BS,
    labels_BS=_padded(outputs),
  )


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
  """Token rows of different lengths in one array, padded with -1 at the end."""
  out = np.full((len(rows), max(map(len, rows))), -1, np.int32)
  for line, row in zip(out, rows):
    line[: len(row)] = row
  return out


def _valid(stages: Mapping[str, Any]) -> dict[str, np.ndarray]:
  return {name: np.asarray(x)[np.asarray(valid)] for name, (x, valid) in stages.items()}


_answer_logits = jax.jit(speech_llm.answer_logits, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def _encoder_stages(params, batch, config: SpeechLLMConfig) -> dict[str, Any]:
  """Each stage as (values, which of them are not padding)."""
  return _of_streams(params, speech_llm.encode_each(params, batch, config), batch, config)


@functools.partial(jax.jit, static_argnames="config")
def _speech_stages(params, batch, config: SpeechLLMConfig) -> dict[str, Any]:
  streams = speech_llm.encode_each(params, batch, config)
  frames_BTD, valid_BT = speech_llm.join(params, streams, config)
  speech_BSD, valid_BS = speech_llm.connect(params, frames_BTD, valid_BT, config)
  return {
    **_of_streams(params, streams, batch, config),
    "adapter": (speech_BSD, valid_BS),
    "prompt": speech_llm.splice(params, batch, speech_BSD, valid_BS, config),
  }


def _of_streams(params, streams, batch, config: SpeechLLMConfig) -> dict[str, Any]:
  stages = {}
  for number, (name, stream) in enumerate(streams.items()):
    of = f"{name} " if len(streams) > 1 else ""
    normed_BTF = jnp.asarray(batch.features[number])
    if config.frontends[number].normalised:
      cmvn = params["frontend"][name]
      normed_BTF = (normed_BTF + cmvn["shift"]) * cmvn["scale"]
    valid_BT = jnp.arange(normed_BTF.shape[1]) < jnp.asarray(batch.frames[number])[:, None]
    stages[f"{of}features"] = normed_BTF, valid_BT
    stages[f"{of}encoder"] = stream
  return stages


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _generate_text(params, tokens_BS, config: SpeechLLMConfig, options: GenerationConfig):
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  valid_BS = jnp.ones(tokens_BS.shape, bool)
  return generate_from(params, inputs_BSD, valid_BS, config, options).tokens_BS


@functools.partial(jax.jit, static_argnames="config")
def _text_logits(params, tokens_BS, config: SpeechLLMConfig):
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, jnp.ones(tokens_BS.shape, bool), config)
  return speech_llm.logits(params, hidden_BSD, config)
