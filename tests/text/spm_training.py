"""Trains small SentencePiece models for tests, on the licence and a few lines of Chinese."""

import random
from pathlib import Path

CHINESE = [
  "今天天气很好，我们去公园散步",
  "你好，世界！",
  "他说：“明天 MONDAY 开会”",
  "１２３ ＡＢＣ",
]
TEXTS = [
  "",
  " ",
  "  ",
  "a",
  " a",
  "a ",
  "  two  blanks  ",
  "line\r\n\n\tbreak",
  "你好，世界",
  "aaaaaaaaaa",
  "it's 1999 o'clock",
  "ＡＢＣ１２３",
  "e\u0301 decomposed",
  "😀👩‍👩‍👧",
  "ไทย हिन्दी العربية",
  "<0x41>▁▁",
  "USER: <Speech></Speech> Describe.\nASSISTANT:",
  "\x00\x1b",
  "the the the License",
]
LLAMA = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)


def lines() -> list[str]:
  licence = Path(__file__).parents[2] / "LICENSE"
  return [line for line in licence.read_text("utf-8").splitlines() if line.strip()] + CHINESE * 8


def texts(count: int = 400) -> list[str]:
  """The texts above, the lines trained on, and some of random characters."""
  rng = random.Random(0)
  letters = "ab  ▁好é\n\t_x-e.,The in，1"
  drawn = ["".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(count)]
  return TEXTS + lines() + drawn


def train(folder: Path, kind: str, **options) -> Path:
  """Writes `tokenizer.model` into `folder`, with byte fallback and, by default, LLaMA's rules."""
  import sentencepiece

  folder.mkdir(parents=True, exist_ok=True)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines()),
    model_prefix=str(folder / "tokenizer"),
    model_type=kind,
    **{"vocab_size": 700, "byte_fallback": True, "minloglevel": 2, **(options or LLAMA)},
  )
  return folder / "tokenizer.model"
