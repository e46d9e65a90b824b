"""`convert verify KIND SRC CKPT`: both sides on real clips, stage by stage."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import checkpoint, speech_llm, tree
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.frontend import features
from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import SpeechLLMConfig, from_json, frontend_from_json, part_from_json
from mooer_jax.decoders.llm import LLM, LLMConfig
from mooer_jax.encoders.sanm import SANMEncoder
from mooer_jax.nn.compute import Compute
from mooer_jax.prompts import fill_template, task_prompt
from mooer_jax.text.tokenizer import Tokenizer

from . import mooer, torch_side
from .encoder import CMVN_FILE
from .errors import ConversionError, Problems
from .folders import style_of
from .torch_side import Stages

STAGES = ("features", "encoder", "adapter", "logits")
TEXT = "Transcribe speech to text. "
# What a checkpoint is run with: (name, dtype of the weights, dtype of the computation).
DTYPES = (
  ("bfloat16 weights", "bfloat16", "float32"),
  ("bfloat16 compute", "bfloat16", "bfloat16"),
)


@dataclasses.dataclass(frozen=True)
class Error:
  """How far apart both sides are at a stage: the largest difference, and in spreads of theirs."""

  stage: str
  largest: float
  relative: float


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """What a dtype costs against float32: KL divergence of the logits in nats, and same tokens."""

  name: str
  mean_kl: float
  largest_kl: float
  agreement: float


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What `verify` found.

  Attributes:
    errors: a row for each stage.
    agreement: (tokens that are the same, tokens), None without an LLM.
    accuracy: a row for each dtype.
  """

  errors: list[Error]
  agreement: tuple[int, int] | None
  accuracy: list[Accuracy]


def verify(
  kind: str,
  src: Path,
  folder: Path,
  *,
  audio: Sequence[Path] = (),
  llm: Path | None = None,
  max_new_tokens: int = 40,
) -> Verdict:
  """Runs the original, clip by clip, and the checkpoint, all in one batch, in float32.

  Args:
    kind: as of `import`.
    src: what was imported.
    folder: the checkpoint.
    audio: clips for mooer and paraformer.
    llm: folder of the LLM: for mooer if it is not in SRC, for peft the model it was trained on.
    max_new_tokens: length of the answer that is compared.

  Raises:
    ConversionError, ValueError: if something that is needed is missing.
  """
  about = checkpoint.load(folder, dtype="float32")
  if kind in ("mooer", "paraformer") and not audio:
    raise ConversionError(f"verify {kind} needs a clip: --audio FILE")
  if kind == "peft" and llm is None:
    raise ConversionError("verify peft needs the model it was trained on: --llm FOLDER")
  if kind == "paraformer":
    return _paraformer(about, src, audio)
  if kind == "mooer":
    return _mooer(about, src, audio, llm, max_new_tokens)
  model = torch_side.language_model(llm or src, src if kind == "peft" else None)
  return _language_model(about, model, max_new_tokens)


def _paraformer(about: Checkpoint, src: Path, audio: Sequence[Path]) -> Verdict:
  config = part_from_json(about.config["encoders"][0], "encoders[0]")
  frontend = frontend_from_json(about.config["frontends"][0], "frontends[0]")
  waveforms = [load_audio(file, sample_rate_hz=frontend.fbank.sample_rate_hz) for file in audio]
  theirs = torch_side.hear(src / "model.pt", src / CMVN_FILE, config, frontend, waveforms)
  raw_BTF, frames_B = _padded([features(waveform_N, frontend) for waveform_N in waveforms])
  valid_BT = np.arange(raw_BTF.shape[1]) < frames_B[:, None]
  normed_BTF = _normed(about.params, raw_BTF)
  params = {"params": about.params["encoders"]["sanm"]}
  frames_BTD, _ = jax.jit(SANMEncoder(config).apply)(params, normed_BTF, valid_BT)
  ours = {"features": normed_BTF[valid_BT], "encoder": frames_BTD[valid_BT]}
  return Verdict(_errors(ours, _joined(theirs)), None, [])


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
  config = part_from_json(about.config["decoder"], "decoder")
  prompt_S, eos_id = list(range(min(16, config.vocab))), None
  if (about.tokenizer / "tokenizer_config.json").is_file():
    tokenizer = Tokenizer.from_folder(about.tokenizer)
    prompt_S, eos_id = tokenizer.encode(TEXT), tokenizer.eos_id
  theirs = torch_side.answer(model, prompt_S, eos_id=eos_id, max_new_tokens=max_new_tokens)
  given_S = np.array([*prompt_S, *theirs["tokens"][:-1]])

  def logits(params, compute: Compute) -> np.ndarray:
    return _decoder_logits(params["decoder"], config, compute, given_S)[len(prompt_S) - 1 :]

  return _judged(about.params, {}, theirs, logits)


def _decoder_logits(params, config: LLMConfig, compute: Compute, tokens_S) -> np.ndarray:
  module, tokens_BS = LLM(config, compute), jnp.asarray(tokens_S)[None]

  def logits(params):
    variables = {"params": params}
    inputs_BSD = module.apply(variables, tokens_BS, method=LLM.embed_tokens)
    hidden_BSD, _ = module.apply(variables, inputs_BSD, jnp.ones(tokens_BS.shape, bool))
    return module.apply(variables, hidden_BSD, method=LLM.logits)

  return np.asarray(jax.jit(logits)(params)[0])


def _mooer(
  about: Checkpoint, src: Path, audio: Sequence[Path], llm: Path | None, max_new_tokens: int
) -> Verdict:
  config = from_json(about.config)
  task = style_of(about, "mooer").get("task", config.prompts[0][0])
  frontend, sanm = config.frontends[0], config.encoders[0]
  waveforms = [load_audio(file, sample_rate_hz=frontend.fbank.sample_rate_hz) for file in audio]
  problems = Problems()
  llm = llm or mooer.find_llm(src, problems)
  problems.check(str(src))
  assert llm is not None

  folder = src / mooer.ENCODER_FOLDER
  weights = folder / mooer.ENCODER_FILE
  clips = torch_side.hear(weights, folder / CMVN_FILE, sanm, frontend, waveforms)
  adapter = src / task / mooer.ADAPTER_FILE
  tokenizer = Tokenizer.from_folder(about.tokenizer)
  prompt = fill_template(config.template, task_prompt(config.prompts[0][0], dict(config.prompts)))
  before_S, after_S = (tokenizer.encode(text) for text in prompt)
  if before_S:
    raise ConversionError(f"template {config.template!r}: MooER's speech comes first")
  adapted = mooer.find_lora(src / task)
  model = torch_side.language_model(llm, adapted if adapted.is_dir() else None)
  for clip in clips:
    clip |= torch_side.adapt(adapter, clip["encoder"], config.connector.stack)
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
  stages = jax.jit(lambda params: _speech_stages(params, batch, config))(about.params)
  ours = {name: x[np.asarray(valid)] for name, (x, valid) in stages.items()}

  def logits(params, compute: Compute) -> np.ndarray:
    run = jax.jit(lambda p: speech_llm.answer_logits(p, batch, config.replace(compute=compute)))
    return np.asarray(run(params))[answer_BS >= 0]

  return _judged(about.params, ours, _joined(clips), logits)


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


def _judged(params, ours: dict[str, Any], theirs: Stages, logits) -> Verdict:
  exact_AV = logits(params, Compute())
  ours["logits"] = exact_AV
  same = int((exact_AV.argmax(-1) == theirs["tokens"]).sum())
  accuracy = []
  for name, stored, computed in DTYPES:
    rounded = tree.unflatten(
      {  # as `checkpoint.load` does it
        path: leaf if leaf.ndim < 2 else leaf.astype(stored)
        for path, leaf in tree.flatten(params).items()
      }
    )
    accuracy.append(_accuracy(name, exact_AV, logits(rounded, Compute(dtype=computed))))
  return Verdict(_errors(ours, theirs), (same, len(exact_AV)), accuracy)


def _errors(ours: dict[str, Any], theirs: Stages) -> list[Error]:
  rows = []
  for stage in (stage for stage in STAGES if stage in ours):
    array, other = ours[stage], theirs[stage]
    if np.shape(array) != other.shape:
      raise ConversionError(f"{stage}: ours is {np.shape(array)}, theirs {other.shape}")
    largest = float(np.abs(np.asarray(array) - other).max())
    rows.append(Error(stage, largest, largest / float(other.std())))
  return rows


def _accuracy(name: str, exact_AV: np.ndarray, other_AV: np.ndarray) -> Accuracy:
  log_p, log_q = (jax.nn.log_softmax(x.astype(np.float64)) for x in (exact_AV, other_AV))
  kl_A = np.asarray((jnp.exp(log_p) * (log_p - log_q)).sum(-1))
  same_A = exact_AV.argmax(-1) == other_AV.argmax(-1)
  return Accuracy(name, float(kl_A.mean()), float(kl_A.max()), float(same_A.mean()))


def print_verdict(verdict: Verdict) -> None:
  """Prints the tables of `verify`."""
  print(f"{'stage':12}{'largest error':>16}{'in spreads':>14}")
  for row in verdict.errors:
    print(f"{row.stage:12}{row.largest:16.2e}{row.relative:14.2e}")
  if verdict.agreement is not None:
    same, tokens = verdict.agreement
    print(f"{'tokens':12}{f'{same} of {tokens} the same':>30}")
  if verdict.accuracy:
    print(f"\n{'against float32':18}{'mean KL':>10}{'largest KL':>12}{'same tokens':>13}")
    for line in verdict.accuracy:
      print(f"{line.name:18}{line.mean_kl:10.1e}{line.largest_kl:12.1e}{line.agreement:12.1%}")
