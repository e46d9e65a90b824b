"""Our side of `convert verify`: the stages of a checkpoint on clips, and what they differ in."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import speech_llm, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.logmel import LogMelConfig
from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import SpeechLLMConfig, frontend_from_json, part_from_json
from mooer_jax.generation import GenerationConfig
from mooer_jax.generation.generate import generate
from mooer_jax.inputs import encoder_inputs, extract_features
from mooer_jax.nn.compute import Compute

from ..core.errors import ConversionError
from .torch_models import Stages
from .verdict import Verdict, accuracy, same_tokens, stage_errors

# What a checkpoint is run with: (name, dtype of the weights, dtype of the computation).
DTYPES = (
  ("bfloat16 weights", "bfloat16", "float32"),
  ("bfloat16 compute", "bfloat16", "bfloat16"),
)
Logits = Callable[[dict, Compute], np.ndarray]
Prompt = tuple[Sequence[int], Sequence[int]]


def load_clips(files: Sequence[Path], config: SpeechLLMConfig) -> list[np.ndarray]:
  """The recordings as the model hears them: float32 [N] each.

  Raises:
    ValueError: if one is too short or too long for an encoder, before PyTorch would cut it.
  """
  rate_hz = config.sample_rate_hz
  clips = [load_audio(file, sample_rate_hz=rate_hz, channel=config.channel) for file in files]
  for file, clip_N in zip(files, clips, strict=True):
    extract_features(clip_N, config, name=str(file))
  return clips


def encoder_alone(about: Checkpoint, kind: str) -> SpeechLLMConfig:
  """A model whose only encoder is the checkpoint's one of that kind; its other parts are defaults.

  Raises:
    ConversionError: if the checkpoint has none.
  """
  for number, section in enumerate(about.config.get("encoders", ())):
    if section.get("kind") == kind:
      encoder = part_from_json(section, f"encoders[{number}]")
      frontend = frontend_from_json(about.config["frontends"][number], f"frontends[{number}]")
      usual = SpeechLLMConfig.max_audio_s
      return SpeechLLMConfig(
        encoders=(encoder,),
        frontends=(frontend,),
        max_audio_s=frontend.chunk_s if isinstance(frontend, LogMelConfig) else usual,
      )
  raise ConversionError(f"{about.folder}: no {kind} encoder in it")


def compare_encoder(
  about: Checkpoint,
  config: SpeechLLMConfig,
  waveforms: Sequence[np.ndarray],
  *,
  theirs: Sequence[Stages],
) -> Verdict:
  """Compares features and frames of a model's encoders, all clips in one batch.

  Args:
    about: the checkpoint.
    config: of `encoder_alone`.
    waveforms: clips [N].
    theirs: the stages of each clip.
  """
  stages = _encoder_stages(about.params, _batch(waveforms, config), config)
  return Verdict(stage_errors(_valid(stages), _joined(theirs)))


def compare_speech(
  about: Checkpoint,
  config: SpeechLLMConfig,
  waveforms: Sequence[np.ndarray],
  *,
  theirs: Sequence[Stages],
  prompt: Prompt,
  eos_id: int,
  max_new_tokens: int,
  notes: Sequence[str] = (),
) -> Verdict:
  """Compares all stages of a speech LLM and its greedy answers, all clips in one batch.

  Args:
    about: the checkpoint.
    config: of the model.
    waveforms: clips [N].
    theirs: the stages of each clip, with "tokens" [A].
    prompt: tokens before and after the speech.
    eos_id: token that ends an answer.
    max_new_tokens: the answers' length at most.
    notes: for the verdict.
  """
  batch = _batch(waveforms, config, prompt=prompt, answers=[clip["tokens"] for clip in theirs])
  stages = _speech_stages(about.params, batch, config)
  options = greedy(eos_id, max_new_tokens)
  answers = answers_of(generate(about.params, batch, config, options).tokens_BS)
  same = same_tokens(answers, [clip["tokens"].tolist() for clip in theirs])

  def logits(params, compute: Compute) -> np.ndarray:
    logits_BAV = _answer_logits(params, batch, config.replace(compute=compute))
    return np.asarray(logits_BAV)[batch.answer_BS >= 0]

  return judged(
    about.params, _valid(stages), _joined(theirs), same=same, logits=logits, notes=notes
  )


def greedy(eos_id: int | None, max_new_tokens: int) -> GenerationConfig:
  """As the original is asked: nothing is biased or penalised."""
  eos_token_id = () if eos_id is None else (eos_id,)
  return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)


def answers_of(tokens_BS) -> list[list[int]]:
  return [[int(token) for token in row_S if token >= 0] for row_S in np.asarray(tokens_BS)]


def judged(
  params,
  ours: Mapping[str, Any],
  theirs: Stages,
  *,
  same: tuple[int, int],
  logits: Logits,
  notes: Sequence[str] = (),
) -> Verdict:
  """The verdict on stages, tokens and logits, and what the smaller dtypes cost."""
  exact_AV = logits(params, Compute())
  errors = stage_errors({**ours, "logits": exact_AV}, theirs)
  rows = []
  for name, stored, computed in DTYPES:
    rounded = tree.unflatten(
      {  # as `checkpoint.load` does it
        path: leaf if leaf.ndim < 2 else leaf.astype(stored)
        for path, leaf in tree.flatten(params).items()
      }
    )
    rows.append(accuracy(name, exact_AV, logits(rounded, Compute(dtype=computed))))
  return Verdict(errors, same, rows, list(notes))


def _batch(
  waveforms: Sequence[np.ndarray],
  config: SpeechLLMConfig,
  *,
  prompt: Prompt = ((), ()),
  answers: Sequence[np.ndarray] | None = None,
) -> speech_llm.Batch:
  rows = len(waveforms)
  features, frames = encoder_inputs([extract_features(w_N, config) for w_N in waveforms])
  given = [np.zeros(0, np.int32)] * rows if answers is None else answers
  before_BS, after_BS = (np.tile(np.array(part_S, np.int32), (rows, 1)) for part_S in prompt)
  return speech_llm.Batch(
    features=features,
    frames=frames,
    before_BS=before_BS,
    after_BS=after_BS,
    answer_BS=_padded(given),
  )


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
  """Token rows of different lengths in one array, padded with -1 at the end."""
  out = np.full((len(rows), max(map(len, rows))), -1, np.int32)
  for line, row in zip(out, rows):
    line[: len(row)] = row
  return out


def _joined(clips: Sequence[Stages]) -> Stages:
  return {stage: np.concatenate([clip[stage] for clip in clips]) for stage in clips[0]}


def _valid(stages: Mapping[str, Any]) -> dict[str, np.ndarray]:
  return {name: np.asarray(x)[np.asarray(valid)] for name, (x, valid) in stages.items()}


_answer_logits = jax.jit(speech_llm.answer_logits, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def _encoder_stages(params, batch, config: SpeechLLMConfig) -> dict[str, Any]:
  """Each stage as (values, which of them are no padding)."""
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
    of = stage_prefix(name, len(streams))
    normed_BTF = jnp.asarray(batch.features[number])
    if config.frontends[number].normalised:
      cmvn = params["frontend"][name]
      normed_BTF = (normed_BTF + cmvn["shift"]) * cmvn["scale"]
    valid_BT = jnp.arange(normed_BTF.shape[1]) < jnp.asarray(batch.frames[number])[:, None]
    stages[f"{of}features"] = normed_BTF, valid_BT
    stages[f"{of}encoder"] = stream
  return stages


def stage_prefix(encoder: str, encoders: int) -> str:
  """What stands before the name of an encoder's stage: the encoder's, where there are several."""
  return f"{encoder} " if encoders > 1 else ""
