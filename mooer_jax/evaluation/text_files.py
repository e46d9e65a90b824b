"""Files `text`: one transcript per line, `key<TAB>transcript`."""

import re
from collections.abc import Mapping
from pathlib import Path

from mooer_jax import storage
from mooer_jax.files import replace_file

_BREAKS_KEY = re.compile(r"[ \t\r\n]")
_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def read_text(path: str | Path) -> dict[str, str]:
  """Reads transcripts by key, in the order of the file.

  The key ends at the first tab or space. After a tab the transcript is unchanged, after a space it
  is stripped. It may be empty. The two characters `\\n` in it are a line break, as `write_text`
  writes them. Blank lines are skipped; a byte order mark is removed.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not UTF-8, a line has no key, or a key comes twice.
  """
  try:
    content = storage.read_bytes(path).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    number = error.object.count(b"\n", 0, error.start) + 1
    raise ValueError(f"{path}:{number}: not UTF-8; convert the file to UTF-8") from error
  texts: dict[str, str] = {}
  lines: dict[str, int] = {}
  for number, line in enumerate(content.split("\n"), start=1):
    line = line.removesuffix("\r")
    if not line.strip():
      continue
    key, separator, text = re.split(r"([ \t]|$)", line, maxsplit=1)
    if not key:
      raise ValueError(f"{path}:{number}: the line starts with white space, so it has no key")
    if key in texts:
      where = f"{path}:{number}: duplicate key {key!r} (first on line {lines[key]})"
      raise ValueError(f"{where}; remove one of the two lines")
    text = text if separator == "\t" else text.strip(" \t")
    texts[key] = text.replace("\\n", "\n")
    lines[key] = number
  return texts


def write_text(path: str | Path, texts: Mapping[str, str]) -> None:
  """Writes transcripts by key for `read_text`; the folder is created, the file replaced.

  Raises:
    ValueError: if a key is empty or contains white space, or the path is a URL.
  """
  path = storage.local(path, "path")
  lines = []
  for key, text in texts.items():
    if not key.strip() or _BREAKS_KEY.search(key) or key.startswith("\ufeff"):
      raise ValueError(
        f"key {key!r}: must be a word without white space, since it ends at the first"
      )
    lines.append(key + "\t" + _LINE_BREAK.sub(r"\\n", text) + "\n")
  with replace_file(path) as beside:
    beside.write_text("".join(lines), encoding="utf-8", newline="")
