import pytest

from mooer_jax.nn.compute import ExecutionConfig


def test_float16_is_refused_with_the_reason():
  with pytest.raises(ValueError, match="float16 overflows"):
    ExecutionConfig(dtype="float16")


@pytest.mark.parametrize(
  "field", ["dtype", "remat", "attention", "features", "quantization", "platform"]
)
def test_unknown_names_are_refused_by_name(field):
  with pytest.raises(ValueError, match=f"{field}='fastest'"):
    ExecutionConfig(**{field: "fastest"})
