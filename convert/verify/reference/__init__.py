"""The original models in PyTorch, one a file, for `convert verify`.

They run from their own files, by their own packages or rebuilt from torch's primitives, with sizes
from tensors and config files. To find mistakes of the import, they share only its file readers.
"""
