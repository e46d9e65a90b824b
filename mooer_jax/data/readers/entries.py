"""Entries of readers: utterances as they are stored, and skipped ones with the cause."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mooer_jax.audio.decode import CAUSES as AUDIO_CAUSES

TEXT = "a string without NUL and lone surrogates"  # see `is_text`
SPACE = "▁"  # marks the space between two words in Latin letters in transcripts
CAUSES = (
  "bad shard",  # truncated or damaged tar; the rest of it is lost
  "duplicate key",
  "members apart",  # the members of an utterance are not adjacent
  "no audio",
  "no transcript",
  "transcript not UTF-8",
  "empty transcript",
  "bad task",  # the .json beside the audio cannot be read
  "bad label",  # a line of a list or of a file of labels cannot be read
  "bad segment",  # empty, or not inside of its recording
  "no label",  # data.labels has no line of it, or several
  "no target",  # data.target_audio has no line of it, or several, or the file cannot be read
  "bad target",  # a recording that cannot be decoded, or whose length is not that of its label
  "no audio tokens",  # the label has no start token, or nothing after it
  "no such field",  # which data.filter needs
  "unknown task",  # the model has no prompt for it
  "no question",
  "bad question",
  "prompt too long",
  "unknown character",  # the tokenizer has no token for it
  "answer too long",
  *AUDIO_CAUSES,
  "too long",
  "not cached",  # audio that changed after the cache was filled, or could not be decoded then
  "scores not finite",  # of the model, for this utterance
)


@dataclasses.dataclass(frozen=True)
class SkippedUtterance:
  """An utterance that was skipped."""

  cause: str  # one of CAUSES
  key: str  # empty if the shard is damaged between utterances
  shard: str  # path of the tar
  detail: str = ""
  text: str = ""  # the transcript, if known; evaluation scores it as not decoded
  task: str = ""  # the utterance's own task, if known

  def load(self) -> "SkippedUtterance":
    """Itself: there is no audio to load."""
    return self


@dataclasses.dataclass(frozen=True)
class RawUtterance:
  """An utterance of a shard.

  Audio in files of its own is read by `load`, so that a filter or a label file that leaves an
  utterance out costs no reading and no decoding.
  """

  key: str
  shard: str
  suffix: str  # of the audio file, such as "wav"
  audio: bytes  # content of the audio file; empty before `load`
  text: bytes  # reference text in UTF-8, such as the transcript
  task: str = ""  # the utterance's own task, if the shard has it
  question: str = ""  # replaces `{}` in prompts that take a question, `<TextHere>` in others
  more: tuple[bytes, ...] = ()  # further audio files, which follow the first after a pause
  # Fields of the data, such as language, speaker, duration; for data.filter.
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  has_audio: bool = True  # without, `load` skips the utterance; only a prompt of text can use it
  # Returns an utterance with its audio, or why there is none. None: the audio is there.
  loader: "Callable[[RawUtterance], RawUtterance | SkippedUtterance] | None" = dataclasses.field(
    default=None, compare=False, repr=False
  )

  def load(self) -> "RawUtterance | SkippedUtterance":
    """The utterance with its audio, or why there is none."""
    if self.loader is None:
      return self
    return self.loader(dataclasses.replace(self, loader=None))

  def skip(self, cause: str, detail: str = "") -> SkippedUtterance:
    try:
      text = self.transcript()
    except UnicodeDecodeError:
      text = ""
    return SkippedUtterance(cause, self.key, self.shard, detail, text, self.task)

  def transcript(self) -> str:
    """The reference text; raises UnicodeDecodeError if it is not UTF-8."""
    return self.text.decode("utf-8-sig").strip()


def in_order(skipped: Iterable[SkippedUtterance]) -> list[SkippedUtterance]:
  """By shard and key: the order of a report, however many processes have found them."""
  return sorted(skipped, key=lambda one: (one.shard, one.key, one.cause, one.detail))


def as_key(name: str) -> str:
  """A name as a key: a word in UTF-8, since keys are written to files of `KEY text` lines."""
  return re.sub(r"[\s\ufeff]+", "_", name).encode("utf-8", "backslashreplace").decode()


def is_text(value: object) -> bool:
  """Whether it is a string that can be written: JSON may have NUL and lone surrogates."""
  return isinstance(value, str) and not re.search(r"[\0\ud800-\udfff]", value)


def parse_line(line: bytes, strings: tuple[str, ...]) -> tuple[dict[str, Any], str]:
  """The fields of a line of JSON, and what is wrong with it.

  Args:
    strings: names of the fields that it must have, as strings.
  """
  try:
    about = json.loads(line)
  except (ValueError, RecursionError) as error:
    return {}, f"{error}: {line[:60]!r}"
  if not isinstance(about, dict):
    return {}, f"not an object: {line[:60]!r}"
  for name in strings:
    if not isinstance(about.get(name), str):
      return {}, f"no string {name!r}: {line[:60]!r}"
  return about, ""
