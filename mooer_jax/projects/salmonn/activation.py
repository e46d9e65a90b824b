"""Activation tuning: training on answers that the model generates at a lower LoRA scale.

At a lower LoRA scale, a model that is over-fitted to its training tasks follows diverse
instructions again. A few optimizer steps on a few such answers restore this at the full scale.

The few answers are decoded as `eval.py` does it, on the mesh that training uses; with several
processes, each decodes its share on its own devices.

Source: SALMONN (Tang et al., 2023), sections 3.2 and 5.4.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from mooer_jax import checkpoint, hosts, storage
from mooer_jax.config import from_json
from mooer_jax.data.labels import NO_LABELS
from mooer_jax.data.readers.annotation import entry_key, read_annotation
from mooer_jax.files import lock_folder, read_json_object, write_json
from mooer_jax.prompts import task_prompt
from mooer_jax.run.config import Run
from mooer_jax.run.decoding import decode_set, find_checkpoint, load
from mooer_jax.run.process import prepare_process
from mooer_jax.run.train import restore
from mooer_jax.sharding import make_mesh


def prepare(run: Run) -> Run:
  """The run that trains on the model's own answers, which are generated if they do not exist.

  They are in the run's folder, in `activation.json`. A person may edit that file before training.
  They are the run's data set, with the prompts and template of the checkpoint that generated them.
  Without activation.shards, the run is returned unchanged.

  Raises:
    FileNotFoundError, ValueError: for a bad checkpoint or annotation; if no answer is complete; if
      existing answers were generated with other settings, or edited after training began.
  """
  if not run.activation.shards:
    return run
  prepare_process()
  if run.init_from is None:
    raise ValueError("activation tuning starts from a trained model: set init_from")
  hosts.on_first(lambda: _restore(run))  # with the answers that it was trained on, if they are lost
  settings, answers = _settings(run, run.init_from), answers_file(run)
  if not hosts.on_first(answers.is_file):
    annotation = _generate_answers(run, run.init_from)
    made = {"made_with": settings, "annotation": annotation}
    hosts.on_first(lambda: write_json(answers, made))
    hosts.say(f"answers at LoRA scale {run.activation.lora_scale:g}: {answers}")
  _check_answers(answers, settings, run.workdir)
  of = from_json(checkpoint.describe(run.init_from).config)
  model = run.model.replace(prompts=of.prompts, chat_template=of.chat_template)
  # prompts="": the model's own prompt of the task, and no others
  data = dataclasses.replace(
    run.data,
    shards=str(answers),
    mixture={},
    filter="",
    task=run.activation.task,
    prompts="",
    **NO_LABELS,
  )
  return dataclasses.replace(run, model=model, data=data)


def _restore(run: Run) -> None:
  with lock_folder(run.workdir):
    restore(run)


def answers_file(run: Run) -> Path:
  return run.workdir / "activation.json"


def _check_answers(answers: Path, settings: dict[str, Any], workdir: Path) -> None:
  made_with = read_json_object(answers).get("made_with")
  made_with = made_with if isinstance(made_with, dict) else {}
  other = [
    f"{name}={made_with.get(name)!r}, now {value!r}"
    for name, value in settings.items()
    if made_with.get(name) != value
  ]
  if other:
    raise ValueError(
      f"{answers} was generated with {'; '.join(other)}. Restore these settings, use another"
      " workdir, or move the file away"
    )
  latest = checkpoint.latest(workdir)
  if latest and answers.stat().st_mtime > (latest / "checkpoint.json").stat().st_mtime:
    raise ValueError(
      f"{answers} was edited after training on it began; train in another workdir (copy it there)"
      " or remove the checkpoints"
    )


def _settings(run: Run, init_from: str | Path) -> dict[str, Any]:
  """The settings that determine the answers, besides the clips and the arithmetic.

  generation.max_new_tokens is not among them: longer answers, edited by a person, need a higher
  limit.
  """
  wanted, about = run.activation, checkpoint.describe(init_from)
  if "prompts" not in about.config:
    raise ValueError(
      f"init_from={init_from}: activation tuning starts from a trained model; this checkpoint"
      f" has only {', '.join(about.config)}"
    )
  generation = {**about.generation, **run.generation}
  generation.pop("max_new_tokens", None)
  made = {
    **dataclasses.asdict(dataclasses.replace(wanted, review=False)),
    "weights": about.hash,
    "prompt": task_prompt(wanted.task, about.config["prompts"]),
    "template": from_json(about.config).chat_template,
    "generation": generation,
    "seed": run.seed,
  }
  return json.loads(json.dumps(made))  # as it is read back


def _generate_answers(run: Run, init_from: str | Path) -> list[dict[str, str]]:
  wanted = run.activation
  place = storage.parent(storage.absolute(wanted.shards))
  chosen = [
    {
      **entry,
      "path": storage.join(place, entry["path"]),
      "expand_wav": [storage.join(place, path) for path in entry.get("expand_wav", [])],
      "task": wanted.task,
    }
    for entry in read_annotation(wanted.shards)[: wanted.clips]
  ]
  clips = run.workdir / "activation_clips.json"
  hosts.on_first(lambda: write_json(clips, {"annotation": chosen}))
  options = dataclasses.replace(run.eval, shards=str(clips), task=wanted.task)
  mesh = None
  if jax.process_count() > 1:  # config.mesh arranges the devices of all
    mesh = make_mesh(data=1, fsdp=-1, tensor=run.mesh.tensor, devices=jax.local_devices())
  folder = find_checkpoint(init_from)
  loaded = load(run, folder, mesh=mesh, lora_scale=wanted.lora_scale)
  decoded = decode_set(run, options, loaded)
  entries = []
  by_key = {entry_key(number, entry): entry for number, entry in enumerate(chosen)}
  for key, text in decoded.hypotheses.items():
    of = by_key[key]
    kept = {name: of[name] for name in ("path", "expand_wav", "Q") if of.get(name)}
    if key in decoded.unfinished:  # training on it needs an end
      hosts.say(f"{of['path']}: the answer reached generation.max_new_tokens; left out")
    elif text.strip():
      entries.append({**kept, "text": text.strip(), "task": wanted.task})
    else:
      hosts.say(f"{of['path']}: empty answer; left out")
  for skip in decoded.skipped:
    hosts.say(f"{skip.key}: {skip.cause} {skip.detail}; left out")
  if not entries:
    raise ValueError(
      f"no answer at activation.lora_scale={wanted.lora_scale} is complete and not empty;"
      " try another scale, or a higher generation.max_new_tokens"
    )
  return entries
