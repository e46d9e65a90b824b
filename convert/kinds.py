"""All kinds. A new kind is one file that defines its `Kind`, one line in KINDS and one in USES."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from .core.kind import Kind

# Name -> record. Records are imported on use, so that `--help` needs neither torch nor JAX.
KINDS = {
  "mooer": f"{__package__}.families.mooer:KIND",
  "mooer-speech": f"{__package__}.families.mooer_speech:KIND",
  "deepspeed": f"{__package__}.families.mooer_training:KIND",
  "salmonn": f"{__package__}.families.salmonn:KIND",
  "peft": f"{__package__}.parts.peft:KIND",
  "paraformer": f"{__package__}.parts.paraformer:KIND",
  "whisper": f"{__package__}.parts.whisper:KIND",
  "beats": f"{__package__}.parts.beats:KIND",
  "qwen2": f"{__package__}.parts.language_model:QWEN2",
  "llama": f"{__package__}.parts.language_model:LLAMA",
}

# Kind -> its SRC, options of `import`, options of `verify` (None: it cannot); for `--help`, which
# does not import the records. A test compares them.
USES: dict[str, tuple[str, str, str | None]] = {
  "mooer": (
    "release folder",
    "--task {asr,ast,asr_ast_mtl} [--llm --merge-lora --no-lora]",
    "--audio [--llm]",
  ),
  "mooer-speech": (
    "release folder with a vocoder",
    "--task {s2s_trans,s2s_chat} [--merge-lora --no-lora]",
    "--audio",
  ),
  "deepspeed": ("folder of MooER's training", "--base-checkpoint [--lora-config --task]", None),
  "salmonn": (
    "salmonn_v1.pth",
    "--whisper --llm [--beats --lora-config --merge-lora --prompts]",
    "--audio --whisper --llm [--beats --lora-config]",
  ),
  "peft": ("LoRA folder", "[--base-checkpoint]", "--llm"),
  "paraformer": ("FunASR folder", "", "--audio"),
  "whisper": ("Hugging Face or faster-whisper folder, openai-whisper's .pt", "", "--audio"),
  "beats": (".pt file", "", "--audio"),
  "qwen2": ("Hugging Face folder or GGUF file", "", ""),
  "llama": ("Hugging Face folder or GGUF file", "", ""),
}


def find_kind(name: str) -> Kind:
  """Raises ValueError for an unknown name."""
  if name not in KINDS:
    raise ValueError(f"kind={name!r}: choose one of {', '.join(KINDS)}")
  return pkgutil.resolve_name(KINDS[name])
