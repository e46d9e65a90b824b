"""Chips that programs are compiled for."""

import pytest

from benchmarks import chips


def test_an_absent_compiler_is_named_with_the_command_that_installs_it(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"libtpu is not installed.*pip install '\.\[tpu\]'"):
    chips.topology_devices("v5e:2x2")
