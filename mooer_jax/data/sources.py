"""The data sets that a config names, and their shards."""

from collections.abc import Collection
from typing import NamedTuple

from mooer_jax.data.config import DataConfig
from mooer_jax.data.filters import Filter
from mooer_jax.data.labels import LabelOptions
from mooer_jax.data.readers import annotation, shard_names


class Source(NamedTuple):
  """A data set."""

  name: str  # in errors, such as "data.mixture.zh"; "" if there is only one
  shards: str  # path, as data.shards
  filter: Filter
  task: str = ""  # of all utterances, in place of their own
  weight: float = 1.0
  labels: LabelOptions = LabelOptions()


def list_sources(config: DataConfig) -> list[Source]:
  """The data sets of the mixture, in the order of their names, or the one of `data.shards`.

  Raises:
    ValueError: if there is none.
  """
  own = Filter(config.filter)
  if config.mixture:
    found = []
    for name, of in sorted(config.mixture.items()):
      name = f"data.mixture.{name}"
      wanted = Filter(of.filter, f"{name}.filter") if of.filter else own
      labels = LabelOptions(of.labels, of.labels_mode, of.labels_separator)
      found.append(Source(name, of.shards, wanted, of.task, of.weight, labels))
    return found
  if not config.shards:
    raise ValueError(
      "data.shards is missing: name a data.list, an annotation file or a folder, or several data"
      " sets in data.mixture"
    )
  labels = LabelOptions(config.labels, config.labels_mode, config.labels_separator)
  return [Source("", config.shards, own, labels=labels)]


def find_shards(config: DataConfig, tasks: Collection[str]) -> dict[Source, list[str]]:
  """Shards, or parts of an annotation file, of each data set.

  Args:
    config: the data sets, and the weights of tasks.
    tasks: those that have a prompt.

  Raises:
    FileNotFoundError, ValueError: for data that do not exist, or tasks that do not fit.
  """
  sources = list_sources(config)
  found = {source: shard_names(source.shards) for source in sources}
  named = [_named_tasks(source) for source in sources]
  for source, of in zip(sources, named, strict=True):
    if config.task and (other := sorted((of or set()) - {config.task})):
      raise ValueError(
        f"{source.shards} has the tasks {other}, but data.task={config.task!r} would prompt all"
        " alike; set data.task='' (eval.task='') for each utterance's own task"
      )
    if not config.task and (unknown := sorted((of or set()) - set(tasks))):
      raise ValueError(
        f"{source.shards}: tasks {unknown} have no prompt; the model has {sorted(tasks)}. It gets"
        " its prompts in training, from model.prompts and data.prompts"
      )
  known = set().union(*(of or set() for of in named))
  if None not in named and (unused := sorted(set(config.task_weights) - known)):
    where = ", ".join(source.shards for source in sources)
    raise ValueError(f"data.task_weights names {unused}, but {where} has {sorted(known)}")
  return found


def _named_tasks(source: Source) -> set[str] | None:
  """The tasks of a data set; None if only its shards have them."""
  if source.task:
    return {source.task}
  return annotation.tasks(source.shards) if annotation.is_annotation(source.shards) else None
