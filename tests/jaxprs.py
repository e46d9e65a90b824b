"""Looks into traced programs."""

import jax


def equations(jaxpr):
  """Every equation of a jaxpr, those inside of scans, remats and calls included."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        yield from equations(value)


def dots(jaxpr):
  """The matrix products of a jaxpr."""
  return [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]


def shapes(jaxpr) -> set[tuple[int, ...]]:
  """Shapes of everything that the program computes."""
  return {tuple(v.aval.shape) for e in equations(jaxpr) for v in e.outvars}
