"""Weight files of every format, read lazily and without running anything in them."""

from .gguf_file import gguf_config
from .gguf_tokens import gguf_tokenizer
from .paths import open_source
from .source import ReadError, Source, Tensor, check_file, read_object

__all__ = [
  "ReadError",
  "Source",
  "Tensor",
  "check_file",
  "gguf_config",
  "gguf_tokenizer",
  "open_source",
  "read_object",
]
