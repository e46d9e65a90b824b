"""Number of floating-point operations of a traced program."""

import math


def traced(jaxpr) -> int:
  """FLOPs of the matrix products and convolutions in a jaxpr; a loop counts once per iteration.

  XLA's own cost analysis counts the body of a loop once, so it is wrong for scanned layers. A
  matrix product in a loop of unknown length is a ValueError.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS:
      total += _PRODUCTS[name](equation)
      continue
    inner = [traced(sub) for value in params.values() for sub in _jaxprs(value)]
    if name == "while" and sum(inner):
      raise ValueError("a while loop contains a matrix product; its FLOPs depend on the data")
    repeats = params["length"] if name == "scan" else 1
    total += repeats * (max(inner, default=0) if name == "cond" else sum(inner))
  return total


def _dot(equation) -> int:
  ((contracted, _), _) = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  depth = math.prod(left[axis] for axis in contracted)
  return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation) -> int:
  """Products with the zeros of the padding count too."""
  kernel, outputs = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}


def _jaxprs(value):
  if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
    yield value
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from _jaxprs(item)
