"""Make the corpus of the mini speech-to-speech model from real recordings.

    python -m demo.mini_s2s.corpus --debian out/mini-s2s/debian --out out/mini-s2s/data [--quick]

The recordings are the prompts of Debian's asterisk-core-sounds (see demo/asterisk.py), which are
downloaded into --debian first: one professional speaker for each of five languages. Prompts with a
transcript that has words:

    en 553 clips, 24.3 minutes, 891 words; es 478, 28.9, 793; fr 509, 23.9, 952; it 582, 22.6, 1009;
    ru 556, 23.5, 1126; 444 prompts have the same name in all five languages

These are too few sentences for a model that translates new ones. New *combinations* of known words
are a fair test of a small model, and the prompts have all numbers from 0 to 99, "plus" and "minus"
in all languages. So most of the corpus is composed of them, as Asterisk itself says numbers:

    trans      two numbers in es, fr, it or ru -> the same numbers in English
    sums       "three plus eight" in any of the five languages -> the result in English
    english    the English answers of both, which are the target speech
    prompts    all prompts, for recognition
    parallel   prompts that all languages have, in es, fr, it and ru -> the English prompt

Each is a folder with `train` and `test`, and each of these has these lists, by KEY:

    wav.scp    path of the speech
    text       its words, in its own language
    labels     the English answer (trans, sums and parallel)
    targets    path of the English waveform of the answer (trans, sums and parallel)
    say.jsonl  the words as text to say: a raw list without audio (english)

A tenth of the combinations is in `test` only; no language and no target of `train` has them. The
results of sums are numbers that `train` has too, since other sums have them. Of the prompts, a
tenth of the names is in `test`, the same in all languages. Training inputs vary in vocal tract,
pauses, room, noise and level; test inputs are the unchanged recordings. Words of the target start
at multiples of TOKEN_SAMPLES, so that a word has about the same audio tokens wherever it occurs.

After an interruption, the same command resumes.
"""

import argparse
import dataclasses
import functools
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
from rich.progress import track

from demo.asterisk import LANGUAGES, MIRROR, download, read_prompts, shared_names
from demo.mini.speech import write_flac
from demo.mini.voices import without_edges
from demo.mini_s2s.numbers import Utterance, sequences, sums
from demo.real_speech import join, join_varied
from demo.synthesize import silence
from mooer_jax.files import replace_file

SPLITS = ("train", "test")
TARGET = "en"
TOKEN_SAMPLES = 640  # of the target speech: 40 ms
# Silence in the target speech, in tokens: at both ends, and between numbers.
EDGE_TOKENS, PAUSE_TOKENS = 3, 7
WITHIN_S, BETWEEN_S = 0.02, 0.15  # least silence of the input, between words and between numbers
HELD_OUT = 10  # one of this many names of prompts is for the test


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
  """Size and seed of the corpus.

  Attributes:
    sequences, test_sequences: number of different sequences of numbers.
    versions: training inputs of a sum in each language.
    seed: of the sequences and of the variation.
  """

  sequences: int = 1200
  test_sequences: int = 40
  versions: int = 3
  seed: int = 0

  def quick(self) -> "CorpusConfig":
    """Return a config of a small corpus, for a smoke test."""
    return dataclasses.replace(self, sequences=150, test_sequences=4, versions=1)


@dataclasses.dataclass(frozen=True)
class Clip:
  """An input of a task: an utterance in a language, and its English answer."""

  key: str
  language: str
  utterance: Utterance
  answer: Utterance
  seed: tuple[int, ...]


def plan(config: CorpusConfig, task: str, split: str) -> list[Clip]:
  """List the inputs of a task ("trans" or "sums") in a split ("train" or "test")."""
  test = split == "test"
  if task == "trans":
    count = config.test_sequences if test else config.sequences
    drawn = sequences(count, held_out=test, seed=config.seed)
    pairs, versions = {u: u for u in drawn}, 1
    languages = tuple(language for language in LANGUAGES if language != TARGET)
  else:
    pairs = {u: answer for u, answer in sums().items() if u.held_out == test}
    languages, versions = LANGUAGES, 1 if test else config.versions
  clips = []
  for utterance, answer in pairs.items():
    for number, language in enumerate(languages):
      for version in range(versions):
        key = f"{task}-{language}-{utterance.name}" + (f"-{version}" if versions > 1 else "")
        seed = (config.seed, zlib.crc32(utterance.name.encode()), number, version)
        clips.append(Clip(key, language, utterance, answer, seed))
  return clips


class Voice:
  """The recorded words of a language."""

  def __init__(self, debian: Path, language: str):
    """Read the prompts of a language from the downloaded packages."""
    self.language = language
    self._prompts = read_prompts(debian, language)
    self._texts = {name: prompt.text for name, prompt in self._prompts.items()}
    self._word = functools.cache(lambda name: without_edges(self._prompts[name].samples()))

  def text(self, utterance: Utterance) -> str:
    return utterance.text(self.language, self._texts)

  def _groups(self, utterance: Utterance) -> list[list[np.ndarray]]:
    names = utterance.groups(self.language, self._prompts.__contains__)
    return [[self._word(name) for name in group] for group in names]

  def input(self, utterance: Utterance, rng: np.random.Generator, *, vary: bool) -> np.ndarray:
    """Join the words of an input, with `vary` as for training: float32 [samples] at 16 kHz."""
    spoken = {}
    for place, words in enumerate(self._groups(utterance)):
      pieces = [piece for word in words for piece in (word, silence(WITHIN_S))]
      spoken[str(place)] = [np.concatenate([*pieces, silence(BETWEEN_S)])]
    return (join_varied if vary else join)(spoken, [*spoken], rng)

  def target(self, utterance: Utterance) -> np.ndarray:
    """Join the words of an answer on the grid of tokens: float32 [samples] at 16 kHz."""
    edge, pause = (np.zeros(n * TOKEN_SAMPLES, np.float32) for n in (EDGE_TOKENS, PAUSE_TOKENS))
    pieces = [edge]
    for place, words in enumerate(self._groups(utterance)):
      pieces += [pause] if place else []
      pieces += [np.pad(word, (0, -len(word) % TOKEN_SAMPLES)) for word in words]
    return np.concatenate([*pieces, edge])


def write_list(path: Path, rows: Iterable[tuple[str, object]]) -> None:
  """Write lines of `KEY<TAB>value`."""
  with replace_file(path) as beside:
    beside.write_text("".join(f"{key}\t{value}\n" for key, value in rows), encoding="utf-8")


def write_speech(path: Path, make) -> Path:
  """Write the waveform that `make` returns, unless the file exists; returns the absolute path."""
  if not path.exists():
    write_flac(path, make())
  return path.resolve()


def write_combinations(config: CorpusConfig, debian: Path, out: Path) -> None:
  """Write `trans`, `sums` and `english`."""
  voices = {language: Voice(debian, language) for language in LANGUAGES}
  english = voices[TARGET]
  answers: dict[str, dict[Utterance, Path]] = {split: {} for split in SPLITS}
  for task in ("trans", "sums"):
    for split in SPLITS:
      clips, inputs, targets = plan(config, task, split), [], []
      for clip in track(clips, f"joining {task}, {split}"):
        voice, rng = voices[clip.language], np.random.default_rng(clip.seed)
        inputs.append(
          write_speech(
            out / task / split / "wav" / f"{clip.key}.flac",
            functools.partial(voice.input, clip.utterance, rng, vary=split == "train"),
          )
        )
        name = f"en-{clip.answer.name}"
        target = write_speech(
          out / "english" / split / "wav" / f"{name}.flac",
          functools.partial(english.target, clip.answer),
        )
        answers[split][clip.answer] = target
        targets.append(target)
      keys = [clip.key for clip in clips]
      lists: dict[str, list] = {
        "wav.scp": inputs,
        "text": [voices[clip.language].text(clip.utterance) for clip in clips],
        "labels": [english.text(clip.answer) for clip in clips],
        "targets": targets,
      }
      for name, values in lists.items():
        write_list(out / task / split / name, zip(keys, values, strict=True))
  for split, said in answers.items():
    rows = {path.stem: (path, english.text(answer)) for answer, path in said.items()}
    folder = out / "english" / split
    write_list(folder / "wav.scp", ((key, path) for key, (path, _) in rows.items()))
    write_list(folder / "text", ((key, text) for key, (_, text) in rows.items()))
    said_texts = [{"key": key, "Q": text, "txt": text} for key, (_, text) in rows.items()]
    with replace_file(folder / "say.jsonl") as beside:
      beside.write_text("".join(f"{json.dumps(line)}\n" for line in said_texts), encoding="utf-8")


def is_held_out(prompt: str) -> bool:
  """Return whether a prompt is for the test; those that numbers are composed of are not."""
  return "/" not in prompt and zlib.crc32(prompt.encode()) % HELD_OUT == 0


def write_prompts(debian: Path, out: Path) -> None:
  """Write `prompts` and `parallel`."""
  shared = shared_names(debian)
  speech: dict[str, dict[str, tuple[str, Path, str]]] = {}
  for language in LANGUAGES:
    prompts = read_prompts(debian, language)
    speech[language] = {}
    for name, prompt in track(prompts.items(), f"decoding the prompts, {language}"):
      key = f"{language}-{name.replace('/', '-')}"
      split = SPLITS[is_held_out(name)]
      path = write_speech(out / "prompts" / split / "wav" / f"{key}.flac", prompt.samples)
      speech[language][name] = key, path, prompt.text
    minutes = sum(soundfile.info(path).duration for _, path, _ in speech[language].values()) / 60
    words = {word for prompt in prompts.values() for word in prompt.text.lower().split()}
    print(f"{language}: {len(prompts)} clips, {minutes:.1f} minutes, {len(words)} words")
  print(f"{len(shared)} prompts have the same name in all languages")
  english = speech[TARGET]
  for split in SPLITS:
    test = split == "test"
    own = [x for said in speech.values() for n, x in said.items() if is_held_out(n) == test]
    pairs = [
      (speech[language][name], english[name])
      for language in LANGUAGES
      if language != TARGET
      for name in shared
      if is_held_out(name) == test
    ]
    folder = out / "prompts" / split
    write_list(folder / "wav.scp", ((key, path) for key, path, _ in own))
    write_list(folder / "text", ((key, text) for key, _, text in own))
    folder = out / "parallel" / split
    write_list(folder / "wav.scp", ((key, path) for (key, path, _), _ in pairs))
    write_list(folder / "text", ((key, text) for (key, _, text), _ in pairs))
    write_list(folder / "labels", ((key, text) for (key, _, _), (_, _, text) in pairs))
    write_list(folder / "targets", ((key, path) for (key, _, _), (_, path, _) in pairs))


def make_corpus(config: CorpusConfig, debian: Path, out: Path, *, mirror: str = "") -> None:
  """Download the recordings and write all lists, and the clips that do not exist yet."""
  record, settings = out / "corpus.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n"
  if record.exists() and record.read_text("utf-8") != settings:
    raise ValueError(f"{record} has other settings; remove {out}, or choose another --out")
  download(debian, mirror)
  out.mkdir(parents=True, exist_ok=True)
  record.write_text(settings, encoding="utf-8")
  write_combinations(config, debian, out)
  write_prompts(debian, out)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--debian", type=Path, required=True, help="folder for the packages")
  parser.add_argument("--out", type=Path, required=True, help="output folder")
  parser.add_argument("--quick", action="store_true", help="a small corpus")
  parser.add_argument(
    "--mirror", default="", help=f"Debian mirror (default: that of apt-get, else {MIRROR})"
  )
  args = parser.parse_args()
  config = CorpusConfig()
  try:
    make_corpus(config.quick() if args.quick else config, args.debian, args.out, mirror=args.mirror)
  except (OSError, ValueError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    sys.exit(130)
