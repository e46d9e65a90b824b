"""Weight files of every format, read lazily and without running anything in them."""

from .paths import open_source
from .source import ReadError, Source, Tensor

__all__ = ["ReadError", "Source", "Tensor", "open_source"]
