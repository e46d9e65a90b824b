"""The original models in PyTorch, one a file, for `convert verify`.

They run from their own files, by their own packages or rebuilt from torch's primitives. Sizes come
from the shapes of the tensors and from the config files; nothing goes through the rule tables and
configs of the import, so that a mistake in those shows. Only the readers of weights are shared.
"""
