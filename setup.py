"""Lists the packages; everything else is in pyproject.toml.

The top-level folders convert/ and configs/ ship as `mooer_jax.convert` and `mooer_jax.configs`, a
mapping that pyproject.toml alone cannot express.
"""

from setuptools import find_namespace_packages, setup


def packages_in(folder: str) -> list[str]:
  return find_namespace_packages(
    include=[folder, f"{folder}.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
  )


TOP_LEVEL = ("convert", "configs")

setup(
  packages=packages_in("mooer_jax")
  + [f"mooer_jax.{name}" for folder in TOP_LEVEL for name in packages_in(folder)],
  package_dir={f"mooer_jax.{folder}": folder for folder in TOP_LEVEL},
)
