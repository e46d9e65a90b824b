"""`convert verify KIND SRC CKPT`: both sides on real clips, stage by stage."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mooer_jax import checkpoint, speech_llm
from mooer_jax.checkpoint import Checkpoint
from mooer_jax.config import SpeechLLMConfig, part_from_json
from mooer_jax.generation import GenerationConfig
from mooer_jax.generation.generate import generate_from
from mooer_jax.nn.compute import Compute
from mooer_jax.text.tokenizer import Tokenizer

from ..core.errors import ConversionError
from ..parts.paraformer import CMVN_FILE, FUNASR_FILE
from . import torch_encoders, torch_models
from .ours import answers_of, compare_encoder, encoder_alone, greedy, judged, load_clips
from .speech_llms import verify_mooer, verify_salmonn
from .verdict import Verdict, same_tokens

TEXT = "Transcribe speech to text. "
_SPEECH = ("encoders", "connector", "decoder")
# (parts that the checkpoint must have, options that are needed, options that are taken) of a kind.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
  "mooer": (_SPEECH, ("audio",), ("llm",)),
  "paraformer": (("encoders",), ("audio",), ()),
  "whisper": (("encoders",), ("audio",), ()),
  "beats": (("encoders",), ("audio",), ()),
  "salmonn": (_SPEECH, ("audio", "whisper", "llm"), ("beats", "lora_config")),
  "qwen2": (("decoder",), (), ()),
  "llama": (("decoder",), (), ()),
  "peft": (("decoder",), ("llm",), ()),
}
_ENCODERS = {"paraformer": "sanm", "whisper": "whisper", "beats": "beats"}
_WHAT = {
  "audio": "a clip: --audio FILE",
  "llm": "the folder of its LLM, or of the model it was trained on: --llm FOLDER",
  "whisper": "the folder or file of Whisper: --whisper FOLDER",
}


def verify(
  kind: str,
  src: Path,
  folder: Path,
  *,
  audio: Sequence[Path] = (),
  llm: Path | None = None,
  whisper: Path | None = None,
  beats: Path | None = None,
  lora_config: Path | None = None,
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
    audio: clips for encoders and speech LLMs.
    llm: folder of the LLM: for salmonn, for mooer if it is not in SRC, for peft the model it was
      trained on.
    whisper, beats, lora_config: salmonn: what was imported with it.
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
  if kind not in _KINDS:
    raise ValueError(f"kind={kind!r}: choose one of {sorted(_KINDS)}")
  parts, needed, taken = _KINDS[kind]
  given: dict[str, Any] = {
    "audio": audio,
    "llm": llm,
    "whisper": whisper,
    "beats": beats,
    "lora_config": lora_config,
  }
  for name, value in given.items():
    if name in needed and not value:
      raise ConversionError(f"verify {kind} needs {_WHAT[name]}")
    if value and name not in (*needed, *taken):
      raise ValueError(f"--{name.replace('_', '-')} means nothing for verify {kind}")
  found = checkpoint.find(folder)
  base = None if base is None else checkpoint.find(base)
  config = checkpoint.describe(found, base=base).config
  if missing := [part for part in parts if part not in config]:
    hint = "; import it with --base CKPT" if kind == "peft" else ""
    raise ConversionError(
      f"{found} has no {missing[0]} to verify as {kind}; it holds {', '.join(config)}{hint}"
    )
  for path in (src, llm, whisper, beats, lora_config):
    # transformers would seek a name that is no path on the net.
    if path is not None and not Path(path).exists():
      raise FileNotFoundError(f"{path}: no such file or folder")
  about = checkpoint.load(found, dtype="float32", base=base)
  if kind in _ENCODERS:
    return _encoder(about, kind, src, audio=audio)
  if kind == "mooer":
    return verify_mooer(about, src, audio, llm=llm, max_new_tokens=max_new_tokens)
  if kind == "salmonn":
    assert whisper is not None and llm is not None
    return verify_salmonn(
      about,
      src,
      audio,
      whisper=whisper,
      llm=llm,
      beats=beats,
      lora_config=lora_config,
      max_new_tokens=max_new_tokens,
    )
  model = torch_models.language_model(llm or src)
  if kind == "peft":
    model = torch_models.lora_of_folder(model, src)
  return _language_model(about, model, max_new_tokens)


def _encoder(about: Checkpoint, kind: str, src: Path, *, audio: Sequence[Path]) -> Verdict:
  config = encoder_alone(about, _ENCODERS[kind])
  waveforms = load_clips(audio, config)
  encoder: Any = config.encoders[0]
  frontend: Any = config.frontends[0]
  if kind == "paraformer":
    weights, cmvn = src / FUNASR_FILE, src / CMVN_FILE
    theirs = torch_encoders.hear_sanm(
      weights, cmvn, encoder, frontend=frontend, waveforms=waveforms
    )
  elif kind == "whisper":
    theirs = torch_encoders.hear_whisper(src, encoder, frontend, waveforms=waveforms)
  else:
    theirs = torch_encoders.hear_beats(src, waveforms)
  return compare_encoder(about, config, waveforms, theirs=theirs)


def _language_model(about: Checkpoint, model, max_new_tokens: int) -> Verdict:
  config = SpeechLLMConfig(decoder=part_from_json(about.config["decoder"], "decoder"))
  prompt_S, eos_id = list(range(min(16, config.decoder.vocab))), None
  if (about.tokenizer / "tokenizer_config.json").is_file():
    tokenizer = Tokenizer.from_folder(about.tokenizer)
    prompt_S, eos_id = tokenizer.encode(TEXT), tokenizer.eos_id
  theirs = torch_models.answer(model, prompt_S, (), eos_id=eos_id, max_new_tokens=max_new_tokens)
  options = greedy(eos_id, max_new_tokens)
  answer_BS = _answer_alone(about.params, jnp.array([prompt_S]), config, options)
  same = same_tokens(answers_of(answer_BS), [theirs["tokens"].tolist()])
  given_BS = jnp.array([[*prompt_S, *theirs["tokens"][:-1]]])

  def logits(params: dict, compute: Compute) -> np.ndarray:
    logits_BSV = _logits_alone(params, given_BS, config.replace(compute=compute))
    return np.asarray(logits_BSV)[0, len(prompt_S) - 1 :]

  return judged(about.params, {}, theirs, same=same, logits=logits)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _answer_alone(params, tokens_BS, config: SpeechLLMConfig, options: GenerationConfig):
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  valid_BS = jnp.ones(tokens_BS.shape, bool)
  return generate_from(params, inputs_BSD, valid_BS, config, options).tokens_BS


@functools.partial(jax.jit, static_argnames="config")
def _logits_alone(params, tokens_BS, config: SpeechLLMConfig):
  inputs_BSD = speech_llm.embed(params, tokens_BS, config)
  hidden_BSD, _ = speech_llm.decode(params, inputs_BSD, jnp.ones(tokens_BS.shape, bool), config)
  return speech_llm.logits(params, hidden_BSD, config)
