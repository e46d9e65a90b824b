"""`convert verify KIND SRC CKPT`: both sides on real clips, stage by stage."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import checkpoint, speech_llm, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.frontend import features
from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import SpeechLLMConfig, from_json, part_from_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.encoders.sanm import SANMEncoder
from mooer_jax.generation import GenerationOptions
from mooer_jax.generation.generate import generate, generate_from
from mooer_jax.nn.compute import Compute
from mooer_jax.prompts import fill_template, task_prompt
from mooer_jax.text.tokenizer import Tokenizer

from . import mooer, torch_side
from .encoder import CMVN_FILE, sanm_of
from .errors import ConversionError, Problems
from .folders import style_of
from .torch_side import Stages
from .verdict import Verdict, accuracy, same_tokens, stage_errors

TEXT = "Transcribe speech to text. "
# What a checkpoint is run with: (name, dtype of the weights, dtype of the computation).
DTYPES = (
  ("bfloat16 weights", "bfloat16", "float32"),
  ("bfloat16 compute", "bfloat16", "bfloat16"),
)
# What the kinds need that a checkpoint may not have.
_PARTS = {
  "mooer": ("encoders", "connector", "decoder"),
  "paraformer": ("encoders",),
  "qwen2": ("decoder",),
  "llama": ("decoder",),
  "peft": ("decoder",),
}
Logits = Callable[[dict, Compute], np.ndarray]


def verify(
  kind: str,
  src: Path,
  folder: Path,
  *,
  audio: Sequence[Path] = (),
  llm: Path | None = None,
  base: Path | None = None,
  max_new_tokens: int = 40,
) -> Verdict:
  """Runs the original, clip by clip, and the checkpoint, all in one batch, in float32.

  Up to the logits, which both sides compute with the original's answer given, numbers are compared;
  then the answers that each side generates by itself, greedily.

  Args:
    kind: as of `import`.
    src: what was imported.
    folder: the checkpoint, or the folder of a run, whose newest is taken.
    audio: clips for mooer and paraformer.
    llm: folder of the LLM: for mooer if it is not in SRC, for peft the model it was trained on.
    base: where the base of a fine-tune lies, if it moved.
    max_new_tokens: length of the answers that are compared, at most.

  Raises:
    ConversionError, ValueError: if something that is needed is missing.
  """
  if kind == "deepspeed":
    raise ConversionError(
      "verify cannot run deepspeed, whose folder is no whole model; import it, export that with the"
      " kind mooer, and verify mooer with the exported folder"
    )
  if kind not in _PARTS:
    raise ValueError(f"kind={kind!r}: choose one of {sorted(_PARTS)}")
  if kind in ("mooer", "paraformer") and not audio:
    raise ConversionError(f"verify {kind} needs a clip: --audio FILE")
  if kind == "peft" and llm is None:
    raise ConversionError("verify peft needs the model it was trained on: --llm FOLDER")
  found = checkpoint.find(folder)
  base = None if base is None else checkpoint.find(base)
  config = checkpoint.describe(found, base=base).config
  if missing := [part for part in _PARTS[kind] if part not in config]:
    hint = "; import it with --base CKPT" if kind == "peft" else ""
    raise ConversionError(
      f"{found} has no {missing[0]} to verify as {kind}; it holds {', '.join(config)}{hint}"
    )
  about = checkpoint.load(found, dtype="float32", base=base)
  if kind == "paraformer":
    return _paraformer(about, src, audio)
  if kind == "mooer":
    return _mooer(about, src, audio, llm, max_new_tokens)
  model = torch_side.language_model(llm or src, src if kind == "peft" else None)
  return _language_model(about, model, max_new_tokens)


def _paraformer(about: Checkpoint, src: Path, audio: Sequence[Path]) -> Verdict:
  config, frontend = sanm_of(about)
  waveforms = [load_audio(file, sample_rate_hz=frontend.fbank.sample_rate_hz) for file in audio]
  theirs = torch_side.hear(src / "model.pt", src / CMVN_FILE, config, frontend, waveforms)
  raw_BTF, frames_B = _padded([features(waveform_N, frontend) for waveform_N in waveforms])
  valid_BT = np.arange(raw_BTF.shape[1]) < frames_B[:, None]
  normed_BTF = _normed(about.params, raw_BTF)
  params = {"params": about.params["encoders"]["sanm"]}
  frames_BTD, _ = jax.jit(SANMEncoder(config).apply)(params, normed_BTF, valid_BT)
  ours = {"features": normed_BTF[valid_BT], "encoder": frames_BTD[valid_BT]}
  return Verdict(stage_errors(ours, _joined(theirs)))


def _padded(rows: Sequence[np.ndarray], fill: float = 0) -> tuple[np.ndarray, np.ndarray]:
  """Arrays of other lengths in one, filled up at the end, and their lengths."""
  lengths = np.array([len(row) for row in rows], np.int32)
  out = np.full((len(rows), lengths.max(), *rows[0].shape[1:]), fill, rows[0].dtype)
  for line, row in zip(out, rows):
    line[: len(row)] = row
  return out, lengths


def _joined(clips: Sequence[Stages]) -> Stages:
  return {stage: np.concatenate([clip[stage] for clip in clips]) for stage in clips[0]}


def _normed(params, features_BTF) -> jax.Array:
  cmvn = params["frontend"]["sanm"]
  return (features_BTF + cmvn["shift"]) * cmvn["scale"]


def _language_model(about: Checkpoint, model, max_new_tokens: int) -> Verdict:
  config = SpeechLLMConfig(decoder=part_from_json(about.config["decoder"], "decoder"))
  prompt_S, eos_id = list(range(min(16, config.decoder.vocab))), None
  if (about.tokenizer / "tokenizer_config.json").is_file():
    tokenizer = Tokenizer.from_folder(about.tokenizer)
    prompt_S, eos_id = tokenizer.encode(TEXT), tokenizer.eos_id
  theirs = torch_side.answer(model, prompt_S, eos_id=eos_id, max_new_tokens=max_new_tokens)
  options = _greedy(eos_id, max_new_tokens)
  answer_BS = _answer_alone(about.params, jnp.array([prompt_S]), config, options)
  same = same_tokens(_answers(answer_BS), [theirs["tokens"].tolist()])
  given_BS = jnp.array([[*prompt_S, *theirs["tokens"][:-1]]])

  def logits(params: dict, compute: Compute) -> np.ndarray:
    logits_BSV = _logits_alone(params, given_BS, config.replace(compute=compute))
    return np.asarray(logits_BSV)[0, len(prompt_S) - 1 :]

  return _judged(about.params, {}, theirs, same, logits)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _answer_alone(params, tokens_BS, config: SpeechLLMConfig, options: GenerationOptions):
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  valid_BS = jnp.ones(tokens_BS.shape, bool)
  return generate_from(params, inputs_BSD, valid_BS, config, options).tokens_BS


@functools.partial(jax.jit, static_argnames="config")
def _logits_alone(params, tokens_BS, config: SpeechLLMConfig):
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, jnp.ones(tokens_BS.shape, bool), config)
  return speech_llm.logits(params, hidden_BSD, config)


def _greedy(eos_id: int | None, max_new_tokens: int) -> GenerationOptions:
  """As the original is asked: nothing is biased or penalised."""
  eos_ids = () if eos_id is None else (eos_id,)
  return GenerationOptions(max_new_tokens=max_new_tokens, eos_ids=eos_ids)


def _answers(tokens_BS) -> list[list[int]]:
  return [[int(token) for token in row_S if token >= 0] for row_S in np.asarray(tokens_BS)]


def _mooer(
  about: Checkpoint, src: Path, audio: Sequence[Path], llm: Path | None, max_new_tokens: int
) -> Verdict:
  config = from_json(about.config)
  task = _task(config, src)
  lora, notes = _lora(about, config, src / task)
  sanm, frontend = sanm_of(about)
  if not isinstance(config.connector, LinearConfig):
    raise ConversionError(f"{about.folder}: its connector is {config.connector.kind}, not MooER's")
  waveforms = [load_audio(file, sample_rate_hz=frontend.fbank.sample_rate_hz) for file in audio]
  problems = Problems()
  llm = llm or mooer.find_llm(src, problems)
  problems.check(str(src))
  assert llm is not None

  folder, adapter = src / mooer.ENCODER_FOLDER, src / task / mooer.ADAPTER_FILE
  weights = folder / mooer.ENCODER_FILE
  tokenizer = Tokenizer.from_folder(about.tokenizer)
  prompt = fill_template(config.template, task_prompt(task, dict(config.prompts)))
  before_S, after_S = (tokenizer.encode(text) for text in prompt)
  if before_S:
    raise ConversionError(f"template {config.template!r}: MooER's speech comes first")
  clips = torch_side.hear(weights, folder / CMVN_FILE, sanm, frontend, waveforms, tuned=adapter)
  clips = torch_side.adapt(adapter, clips, config.connector.stack)
  model = torch_side.language_model(llm, lora)
  for clip in clips:
    clip |= torch_side.answer(
      model,
      after_S,
      speech_SD=clip["adapter"],
      eos_id=tokenizer.eos_id,
      max_new_tokens=max_new_tokens,
    )
  del model

  raw_BTF, frames_B = _padded([features(waveform_N, frontend) for waveform_N in waveforms])
  answer_BS, _ = _padded([clip["tokens"].astype(np.int32) for clip in clips], fill=-1)
  batch = speech_llm.Batch(
    features=(raw_BTF,),
    frames=(frames_B,),
    before_BS=np.zeros((len(clips), 0), np.int32),
    after_BS=np.tile(np.array(after_S, np.int32), (len(clips), 1)),
    answer_BS=answer_BS,
  )
  stages = _speech_stages(about.params, batch, config)
  ours = {name: x[np.asarray(valid)] for name, (x, valid) in stages.items()}
  options = _greedy(tokenizer.eos_id, max_new_tokens)
  answers = _answers(generate(about.params, batch, config, options).tokens_BS)
  same = same_tokens(answers, [clip["tokens"].tolist() for clip in clips])

  def logits(params, compute: Compute) -> np.ndarray:
    logits_BAV = _answer_logits(params, batch, config.replace(compute=compute))
    return np.asarray(logits_BAV)[answer_BS >= 0]

  return _judged(about.params, ours, _joined(clips), same, logits, notes)


def _task(config: SpeechLLMConfig, src: Path) -> str:
  """The task of the checkpoint that the release has a folder of."""
  tasks = [task for task, _ in config.prompts]
  there = [task for task in tasks if (src / task / mooer.ADAPTER_FILE).is_file()]
  if len(there) != 1:
    named = ", ".join(there or tasks)
    what = "several folders" if there else f"no folder with {mooer.ADAPTER_FILE}"
    raise ConversionError(
      f"{src}: {what} for what the checkpoint is asked ({named}); one must be there"
    )
  return there[0]


def _lora(
  about: Checkpoint, config: SpeechLLMConfig, folder: Path
) -> tuple[Path | None, list[str]]:
  """(LoRA of a task's folder if it is in the checkpoint, apart or merged, else None; notes).

  Raises:
    ConversionError: if the checkpoint has one and the folder has not.
  """
  found = mooer.find_lora(folder)
  if found.is_dir():
    if config.decoder.lora_rank or style_of(about, "mooer").get("lora_merged"):
      return found, []
    return None, [f"{found} is not used: the checkpoint was made without it (--no-lora)"]
  if config.decoder.lora_rank:
    raise ConversionError(f"{found}: not found, but the checkpoint has a LoRA")
  return None, []


_answer_logits = jax.jit(speech_llm.answer_logits, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def _speech_stages(params, batch, config: SpeechLLMConfig) -> dict[str, Any]:
  """Each stage as (values, which of them are no padding)."""
  frames_BTD, valid_BT = speech_llm.encode(params, batch, config)
  speech_BSD, valid_BS = speech_llm.connect(params, frames_BTD, valid_BT, config)
  normed_BTF = _normed(params, batch.features[0])
  return {
    "features": (normed_BTF, valid_BT),
    "encoder": (frames_BTD, valid_BT),
    "adapter": (speech_BSD, valid_BS),
  }


def _judged(
  params,
  ours: dict[str, Any],
  theirs: Stages,
  same: tuple[int, int],
  logits: Logits,
  notes: Sequence[str] = (),
) -> Verdict:
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
