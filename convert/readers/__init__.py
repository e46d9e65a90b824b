"""Weight files of every format, read lazily and without running anything in them."""

from .gguf_file import gguf_config
from .gguf_tokens import gguf_tokenizer
from .paths import open_source
from .source import ReadError, Source, Tensor

__all__ = ["ReadError", "Source", "Tensor", "gguf_config", "gguf_tokenizer", "open_source"]
