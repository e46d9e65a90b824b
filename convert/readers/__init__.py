"""Weight files of every format, read lazily and without running anything in them."""

# ruff: noqa: F401  (the names are the interface of the package)
from .gguf_file import gguf_config
from .gguf_tokens import gguf_tokenizer
from .paths import open_source
from .source import ReadError, Source, Tensor, check_file, read_object
from .torch_file import open_torch
