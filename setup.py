"""Lists the packages; everything else stands in pyproject.toml.

The converters live in the top-level folder convert/ (`python -m convert` from a checkout) and ship
as `mooer_jax.convert`, which needs a mapping that pyproject.toml alone cannot discover.
"""

from setuptools import find_namespace_packages, setup


def packages_in(folder: str) -> list[str]:
  return find_namespace_packages(
    include=[folder, f"{folder}.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
  )


setup(
  packages=packages_in("mooer_jax") + [f"mooer_jax.{name}" for name in packages_in("convert")],
  package_dir={"mooer_jax.convert": "convert"},
)
