"""The voice prompts of Debian's asterisk-core-sounds: one professional speaker for each language.

English, Spanish, French, Italian and Russian, 16 kHz, with transcripts; CC BY-SA 3.0 (Russian: CC
BY 3.0). English and Spanish are spoken by the same woman. The packages are downloaded, not part of
this project. Nothing is unpacked: clips are read from the packages and decoded in memory.
"""

import collections
import dataclasses
import functools
import gzip
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

from mooer_jax.files import replace_file

LANGUAGES = ("en", "es", "fr", "it", "ru")
SAMPLE_RATE_HZ = 16000
MIRROR = "https://deb.debian.org"
POOL = "debian/pool/main/a/asterisk-core-sounds"
VERSION = "1.6.1-1"
# SHA-256 of PREFIX + NAME + "_VERSION_all.deb".
PREFIX = "asterisk-core-sounds-"
PACKAGES = {
  "en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
  "en-g722": "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
  "es": "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
  "es-g722": "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
  "fr": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
  "fr-g722": "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
  "it": "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
  "it-g722": "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016",
  "ru": "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
  "ru-g722": "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
}  # fmt: skip
# The Spanish list has the name of "cero" twice, the second time for "diez".
CORRECTIONS = {"es": {"digits/0": "cero", "digits/10": "diez"}}
# Remarks in the transcripts, such as "plus [+]"; some are all there is, such as "[tones]".
_REMARK = re.compile(r"\[.*?\]|\(.*?\)")


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A recorded prompt: its name, such as "digits/7", transcript and raw G.722."""

  name: str
  text: str
  g722: bytes = dataclasses.field(repr=False)

  def samples(self) -> np.ndarray:
    """Decode to float32 [samples] in [-1, 1] at 16 kHz."""
    return decode_g722(self.g722)


def download(folder: Path, mirror: str = "") -> None:
  """Download the packages that are missing in a folder, and check the sums of all.

  Args:
    folder: gets one .deb for each of PACKAGES.
    mirror: URL of a Debian mirror; "": `apt-get download` where there is one, else MIRROR.

  Raises:
    OSError: if a package cannot be downloaded.
    ValueError: if a file is not the package of that name and version.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for name, expected in PACKAGES.items():
    path = _package(folder, name)
    if not path.exists():
      print(f"downloading {path.name}", flush=True)
      if not mirror and shutil.which("apt-get"):
        _apt_download(PREFIX + name, path)
      else:
        _url_download(f"{(mirror or MIRROR).rstrip('/')}/{POOL}/{path.name}", path)
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
      raise ValueError(
        f"{path}: SHA-256 {found}, but {PREFIX}{name} {VERSION} has {expected};"
        " remove the file and rerun"
      )


def _package(folder: Path, name: str) -> Path:
  return folder / f"{PREFIX}{name}_{VERSION}_all.deb"


def _apt_download(name: str, path: Path) -> None:
  with tempfile.TemporaryDirectory(dir=path.parent) as work:
    command = ["apt-get", "download", "-qq", f"{name}={VERSION}"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    found = [*Path(work).glob("*.deb")]
    if done.returncode or not found:
      raise OSError(
        f"{' '.join(command)}: {' '.join(done.stderr.split())}; run `apt-get update` and repeat, or"
        f" choose a Debian mirror by --mirror {MIRROR}"
      )
    found[0].rename(path)


def _url_download(url: str, path: Path) -> None:
  try:
    with replace_file(path) as beside, urllib.request.urlopen(url, timeout=60) as response:
      with open(beside, "wb") as file:
        shutil.copyfileobj(response, file)
  except OSError as error:
    raise OSError(f"{url}: {error}; choose another Debian mirror by --mirror URL") from error


def read_deb(path: Path) -> dict[str, bytes]:
  """Return the files in a Debian package, by their paths without the leading "./"."""
  for name, content in _members(path.read_bytes(), path):
    if name.startswith("data.tar"):
      with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        return {name.removeprefix("./"): file.read() for name, file in files.items() if file}
  raise ValueError(f"{path}: not a Debian package: it has no data.tar")


def _members(content: bytes, path: Path):
  """The (name, content) pairs of an archive of `ar`, as a .deb is."""
  if not content.startswith(b"!<arch>\n"):
    raise ValueError(f"{path}: not a Debian package; remove the file and rerun")
  start = 8
  while start + 60 <= len(content):
    name, size = content[start : start + 16], int(content[start + 48 : start + 58])
    yield name.decode().rstrip(" /"), content[start + 60 : start + 60 + size]
    start += 60 + size + size % 2


def decode_g722(content: bytes) -> np.ndarray:
  """Decode raw G.722 of 64 kbit/s: float32 [samples] in [-1, 1] at 16 kHz."""
  import av

  with av.open(io.BytesIO(content), "r", format="g722") as container:
    frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
  return np.concatenate(frames).astype(np.float32) / 32768


def parse_transcripts(content: str, language: str) -> dict[str, str]:
  """Read lines `name: text`, without remarks in brackets; prompts without words are left out."""
  texts: dict[str, str] = {}
  for line in content.removeprefix("\ufeff").splitlines():
    name, colon, text = line.partition(":")
    if colon and not line.startswith(";"):
      texts.setdefault(name.strip(), " ".join(_REMARK.sub(" ", text).split()))
  texts |= CORRECTIONS.get(language, {})
  return {name: text for name, text in texts.items() if any(map(str.isalnum, text))}


@functools.cache
def read_prompts(folder: Path, language: str) -> dict[str, Prompt]:
  """Return the prompts of a language that have a transcript with words, by name."""
  listing = f"usr/share/doc/{PREFIX}{language}/core-sounds-{language}.txt.gz"
  content = read_deb(_package(folder, language))[listing]
  texts = parse_transcripts(gzip.decompress(content).decode("utf-8"), language)
  prompts = {}
  for path, content in sorted(read_deb(_package(folder, f"{language}-g722")).items()):
    # usr/share/asterisk/sounds/VOICE/NAME.g722
    clip = path.partition("/sounds/")[2].partition("/")[2].removesuffix(".g722")
    if path.endswith(".g722") and clip in texts:
      prompts[clip] = Prompt(clip, texts[clip], content)
  return prompts


def shared_names(folder: Path) -> list[str]:
  """Return the names of the prompts that all languages have."""
  counts = collections.Counter(n for language in LANGUAGES for n in read_prompts(folder, language))
  return sorted(name for name, count in counts.items() if count == len(LANGUAGES))
