"""Parameter trees by path: flatten, partition into trainable and frozen, stack layers for a scan.

A tree is a nested dict; everything that is not a mapping is a leaf (arrays, `ShapeDtypeStruct`,
`PartitionSpec`, numbers). A path joins the keys with "/": `decoder/layers_0/attention/q/kernel`.

Patterns are regular expressions that must match the **whole** path (`re.fullmatch`), such as
`connector/.*` or `.*/lora_[ab]`.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LAYER = re.compile(r"layers_(\d+)")
STACK = "layers"


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Map paths to leaves, in sorted order; empty dicts are dropped.

  Raises ValueError for a key that is empty or contains "/", TypeError for one that is no string.
  """
  flat = {}

  def visit(node, path):
    for key in sorted(node, key=str):
      if not isinstance(key, str):
        raise TypeError(f"key {key!r} under {'/'.join(path) or 'the root'} is not a string")
      if not key or "/" in key:
        raise ValueError(f"key {key!r} under {'/'.join(path) or 'the root'} is empty or contains /")
      if isinstance(node[key], Mapping):
        visit(node[key], (*path, key))
      else:
        flat["/".join((*path, key))] = node[key]

  visit(tree, ())
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`; ValueError for an empty key or a leaf that is also a parent."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    parts = path.split("/")
    if not all(parts):
      raise ValueError(f"path {path!r} has an empty part")
    node = tree
    for n, key in enumerate(parts[:-1], 1):
      if "/".join(parts[:n]) in flat:
        raise ValueError(f"{'/'.join(parts[:n])} is a leaf and also the parent of another path")
      node = node.setdefault(key, {})
    node[parts[-1]] = leaf
  return tree


def partition(tree: Mapping[str, Any], patterns: Iterable[str]) -> tuple[dict, dict]:
  """Partition a tree into (trainable, frozen); leaves whose path matches a pattern are trainable.

  Raises:
    ValueError: if a pattern matches no path, or is not a regular expression.
  """
  flat = flatten(tree)
  compiled = _compile(patterns)
  for pattern in compiled:
    if not any(pattern.fullmatch(path) for path in flat):
      raise ValueError(_unused(pattern.pattern, flat))
  trainable = {p: x for p, x in flat.items() if any(pattern.fullmatch(p) for pattern in compiled)}
  frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
  return unflatten(trainable), unflatten(frozen)


def merge(*trees: Mapping[str, Any]) -> dict[str, Any]:
  """Merge trees; the inverse of `partition`. Raises ValueError if a path is in two of them."""
  joined: dict[str, Any] = {}
  for tree in trees:
    for path, leaf in flatten(tree).items():
      if path in joined:
        raise ValueError(f"{path} is in two of the trees")
      joined[path] = leaf
  return unflatten(joined)


def first_match(
  rules: Iterable[tuple[str, Any]], tree: Mapping[str, Any], *, optional: Iterable[str] = ()
) -> dict[str, Any]:
  """Replace each leaf by the value of the first rule whose pattern matches its path.

  Args:
    rules: (pattern, value) pairs in order of priority.
    tree: nested dict.
    optional: patterns of `rules` that may remain unused.

  Raises:
    ValueError: if a path has no rule, or a rule that is not optional is unused.
  """
  rules = list(rules)
  compiled = _compile(pattern for pattern, _ in rules)
  flat = flatten(tree)
  values, used = {}, set()
  for path in flat:
    n = next((n for n, pattern in enumerate(compiled) if pattern.fullmatch(path)), None)
    if n is None:
      raise ValueError(f"no rule for {path}; the rules are {[pattern for pattern, _ in rules]}")
    values[path] = rules[n][1]
    used.add(n)
  optional = set(optional)
  for n, (pattern, _) in enumerate(rules):
    if n not in used and pattern not in optional:
      raise ValueError(_unused(pattern, flat))
  return unflatten(values)


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """Stack all siblings `layers_0 … layers_{N-1}` to one `layers` with a leading axis N.

  Args:
    params: nested dict; leaves are NumPy or JAX arrays or `jax.ShapeDtypeStruct`s, and stay so.

  Raises:
    ValueError: if a number is missing, the layers differ in their paths, shapes or dtypes, or
      `layers` and `layers_0` are siblings.
  """
  stacked, numbered = {}, {}
  for key, node in params.items():
    node = stack_layers(node) if isinstance(node, Mapping) else node
    match = LAYER.fullmatch(key)
    if match and isinstance(node, Mapping):
      numbered[int(match[1])] = flatten(node)
    else:
      stacked[key] = node
  if not numbered:
    return stacked
  if STACK in stacked:
    raise ValueError(
      f"{STACK} and {STACK}_{min(numbered)} are siblings; stack or unstack all of them"
    )
  if missing := sorted(set(range(max(numbered))) - set(numbered)):
    raise ValueError(f"{STACK}_{missing[0]} is missing, but there is {STACK}_{max(numbered)}")
  layers = [numbered[n] for n in range(len(numbered))]
  for n, layer in enumerate(layers):
    if odd := sorted(layer.keys() ^ layers[0].keys()):
      raise ValueError(f"{STACK}_{n} and {STACK}_0 differ in their paths: {odd[0]}")
  stacked[STACK] = unflatten(
    {path: _stack([layer[path] for layer in layers], path) for path in layers[0]}
  )
  return stacked


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """Split every `layers` with a leading axis N; the inverse of `stack_layers`.

  NumPy leaves become views. Raises ValueError if the leaves differ in their leading axis.
  """
  unstacked: dict[str, Any] = {}
  for key, node in params.items():
    if key != STACK or not isinstance(node, Mapping):
      unstacked[key] = unstack_layers(node) if isinstance(node, Mapping) else node
      continue
    flat = flatten(node)
    sizes = {path: leaf.shape[0] if leaf.shape else 0 for path, leaf in flat.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
      raise ValueError(f"the leaves below {STACK} must have the same leading axis; sizes: {sizes}")
    for n in range(next(iter(sizes.values()))):
      name = f"{STACK}_{n}"
      if name in params:
        raise ValueError(f"{STACK} and {name} are siblings; stack or unstack all of them")
      layer = unflatten({path: _take(leaf, n) for path, leaf in flat.items()})
      unstacked[name] = unstack_layers(layer)
  return unstacked


def digest(params: Mapping[str, Any]) -> str:
  """Hash of the paths and values of all leaves, 16 hex digits."""
  hashed = hashlib.blake2b(digest_size=8)
  for path, x in sorted(flatten(params).items()):
    hashed.update(path.encode())
    hashed.update(np.asarray(x).tobytes())
  return hashed.hexdigest()


def _compile(patterns: Iterable[str]) -> list[re.Pattern]:
  if isinstance(patterns, str):
    raise TypeError(f"patterns must be a sequence of strings, not the string {patterns!r}")
  compiled = []
  for pattern in patterns:
    try:
      compiled.append(re.compile(pattern))
    except re.error as error:
      raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
  return compiled


def _unused(pattern: str, flat: Mapping[str, Any]) -> str:
  partly = [path for path in flat if re.search(pattern, path)]
  hint = f"the tree has {sorted({p.split('/')[0] for p in flat})}"
  if partly:
    hint = f"it matches part of {partly[0]!r}; patterns must match the whole path"
  return f"pattern {pattern!r} matches no path, or only paths of earlier patterns; {hint}"


def _stack(leaves: list, path: str):
  kinds = {(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves}
  if len(kinds) != 1:
    raise ValueError(f"the layers differ in shape or dtype at {path}: {sorted(map(str, kinds))}")
  if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
    return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
  if all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves):
    return np.stack(leaves)
  return jnp.stack(leaves)


def _take(leaf, n: int):
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
  return leaf[n]
