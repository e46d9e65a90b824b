"""Cases of the contract suite: the faults and fillers of each encoder."""

import pytest

pytest.register_assert_rewrite("tests.encoders.contract")


def pytest_generate_tests(metafunc):
  for argument, attribute in (("fault", "faults"), ("filler", "fillers")):
    if argument in metafunc.fixturenames:
      values = getattr(metafunc.cls, attribute)
      metafunc.parametrize(argument, values, ids=lambda x: getattr(x, "__name__", str(x)))
