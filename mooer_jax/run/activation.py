"""Activation tuning: a model is trained on answers that it gave itself at a discounted LoRA scale.

With the LoRA scale lowered, a model that is bound to its training tasks answers diverse
instructions again; a few updates on a few such answers, at the full scale, let it do so there too.

The answers are decoded as `eval.py` does it, on one device; they are few. Training takes all.

Source: SALMONN (Tang et al., 2023), sections 3.2 and 5.4.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mooer_jax import checkpoint
from mooer_jax.data.annotation import entry_key, read_annotation
from mooer_jax.prompts import task_prompt
from mooer_jax.run.config import ActivationConfig, EvalConfig, section
from mooer_jax.run.decoding import decode_set, load

ANSWERS = "activation.json"


def with_own_answers(config: ConfigDict) -> ConfigDict | None:
  """The config of a run that trains on the answers, which are made if they are not there.

  They stand in the run's folder, in `activation.json`, and may be read and edited by a person: what
  is there is taken as it is.

  Args:
    config: with section `activation`; without activation.shards it comes back as it is.

  Returns:
    The config, with the prompts and the template under which the model answered, which are those
    of the checkpoint; None where activation.review asks to stop first.

  Raises:
    FileNotFoundError, ValueError: for a bad checkpoint or annotation; if no answer has a text that
      ends; if answers are there that were made with other settings, or edited after training began.
  """
  wanted = section(config, "activation", ActivationConfig)
  if not wanted.shards:
    return config
  if not config.get("init_from"):
    raise ValueError("activation tuning begins with a trained model: set init_from")
  settings = _settings(config, wanted)
  answers = Path(config["workdir"]) / ANSWERS
  if not answers.is_file():
    answers.parent.mkdir(parents=True, exist_ok=True)
    entries = _answers(config, wanted)
    beside = answers.with_suffix(".tmp")
    content = {"made_with": settings, "annotation": entries}
    text = json.dumps(content, ensure_ascii=False, indent=2)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(answers)
    print(f"answers at LoRA scale {wanted.lora_scale:g}: {answers}")
    if wanted.review:
      print("edit them, then run the same command with --config.activation.review=False")
      return None
  made_with = json.loads(answers.read_text(encoding="utf-8")).get("made_with")
  made_with = made_with if isinstance(made_with, dict) else {}
  other = [
    f"{name}={made_with.get(name)!r}, now {value!r}"
    for name, value in settings.items()
    if made_with.get(name) != value
  ]
  if other:
    raise ValueError(
      f"{answers} was made with {'; '.join(other)}. Set it as it was, or use another workdir, or"
      " move the file away"
    )
  latest = checkpoint.latest(config["workdir"])
  if latest and answers.stat().st_mtime > (latest / "checkpoint.json").stat().st_mtime:
    raise ValueError(
      f"{answers} was edited after training on it began; train in another workdir (copy it there)"
      " or remove the checkpoints"
    )
  of = checkpoint.describe(config["init_from"]).config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.prompts, config.model.template = dict(of["prompts"]), of["template"]
    config.data.prompts = ""  # no others are drawn
    config.data.shards = str(answers)
    config.data.task = wanted.task
  return config


def _settings(config: Mapping[str, Any], wanted: ActivationConfig) -> dict[str, Any]:
  """What the answers follow from, besides the clips and how they are computed.

  The longest answer is not among it: longer ones, edited by a person, need a higher limit.
  """
  about = checkpoint.describe(config["init_from"])
  if "prompts" not in about.config:
    raise ValueError(
      f"init_from={config['init_from']}: activation tuning begins with a trained model; this holds"
      f" {', '.join(about.config)}"
    )
  generation = {**about.generation, **dict(config.get("generation", {}))}
  generation.pop("max_new_tokens", None)
  made = {
    **dataclasses.asdict(dataclasses.replace(wanted, review=False)),
    "weights": about.hash,
    "prompt": task_prompt(wanted.task, about.config["prompts"]),
    "template": about.config["template"],
    "generation": generation,
    "seed": config.get("seed", 0),
  }
  return json.loads(json.dumps(made))  # as it is read back


def _answers(config: Mapping[str, Any], wanted: ActivationConfig) -> list[dict[str, str]]:
  folder = Path(wanted.shards).parent
  chosen = [
    {**entry, "path": str((folder / entry["path"]).absolute()), "task": wanted.task}
    for entry in read_annotation(wanted.shards)[: wanted.clips]
  ]
  for entry in chosen:
    entry["expand_wav"] = [str((folder / p).absolute()) for p in entry.get("expand_wav", [])]
  clips = Path(config["workdir"]) / "activation_clips.json"
  clips.write_text(json.dumps({"annotation": chosen}, ensure_ascii=False), encoding="utf-8")
  options = dataclasses.replace(
    section(config, "eval", EvalConfig, shards=str(clips)),
    task=wanted.task,
    lora_scale=wanted.lora_scale,
  )
  decoded = decode_set(config, options, load(config, checkpoint.find(config["init_from"])))
  entries = []
  by_key = {entry_key(number, entry): entry for number, entry in enumerate(chosen)}
  for key, text in decoded.hypotheses.items():
    of = by_key[key]
    kept = {name: of[name] for name in ("path", "expand_wav", "Q") if of.get(name)}
    if key in decoded.cut:  # to be trained on, it would need an end
      print(f"{of['path']}: the answer was cut off by generation.max_new_tokens, left out")
    elif text.strip():
      entries.append({**kept, "text": text.strip(), "task": wanted.task})
    else:
      print(f"{of['path']}: an empty answer, left out")
  for skip in decoded.skipped:
    print(f"{skip.key}: {skip.cause} {skip.detail}, left out")
  if not entries:
    raise ValueError(
      f"no answer at activation.lora_scale={wanted.lora_scale} has a text that ends; try another"
      " scale, or a higher generation.max_new_tokens"
    )
  return entries
