"""DeepSpeed folders in the layout of ZeRO 1, 2 and 3, cut here over several ranks."""

import os
import sys
import types

import numpy as np
import pytest
import torch

from convert.readers import ReadError, open_source
from tests.convert.readers.zero_folders import groups_of, write_zero

STAGES = pytest.mark.parametrize("stage", [1, 2, 3])
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 8])


def _model(seed=0):
  generator = torch.Generator().manual_seed(seed)
  sizes = {
    "embed.weight": (7, 5),
    "norm.weight": (5,),
    "norm.bias": (5,),
    "proj.weight": (3, 5),
    "big.weight": (11, 13),
    "scale": (1,),
  }
  return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


@STAGES
@RANKS
def test_weights_come_back_whole_and_in_float32(tmp_path, stage, ranks):
  params = _model()
  source = open_source(write_zero(tmp_path, stage, ranks, params))
  assert set(source.tensors) == {*params, "rotary.inv_freq"}
  for name, value in params.items():
    assert source.tensors[name].shape == tuple(value.shape)
    np.testing.assert_array_equal(source.read(name), value.numpy(), err_msg=name)
  np.testing.assert_array_equal(source.read("rotary.inv_freq"), np.arange(4, dtype=np.float32))
  assert f"ZeRO stage {stage} of {ranks} ranks" in source.notes[0]
  again = open_source(tmp_path / "global_step20")
  assert set(again.tensors) == set(source.tensors)


@STAGES
def test_frozen_weights_keep_their_dtype(tmp_path, stage):
  frozen = {"llm.weight": torch.randn(5, 3).bfloat16(), "llm.bias": torch.randn(4).half()}
  source = open_source(write_zero(tmp_path, stage, 2, _model(), frozen=frozen))
  for name, value in frozen.items():
    found = source.read(name)
    assert found.shape == tuple(value.shape) and found.itemsize == 2
    np.testing.assert_array_equal(found.astype(np.float32), value.float().numpy())


def test_a_second_name_reads_the_same_weight_and_other_entries_are_listed(tmp_path):
  params = _model()
  module = {n: p.bfloat16() for n, p in params.items()}
  module.update({"head.weight": module["embed.weight"], "lost.weight": torch.ones(2)})
  model = {"module": module, "buffer_names": [], "shared_params": {"head.weight": "embed.weight"}}
  source = open_source(write_zero(tmp_path, 2, 2, params, extra={"model": model}))
  np.testing.assert_array_equal(source.read("head.weight"), params["embed.weight"].numpy())
  assert source.ignored == ("module.lost.weight",)


@pytest.fixture
def deepspeed_classes(monkeypatch):
  """Classes under DeepSpeed's names, as a training program has them; gone while files are read."""
  made = {}
  for path in (
    "runtime.fp16.loss_scaler.LossScaler",
    "utils.tensor_fragment.fragment_address",
    "runtime.zero.config.ZeroStageEnum",
    "runtime.config.DeepSpeedConfig",
  ):
    module, name = f"deepspeed.{path}".rsplit(".", 1)
    bases = (int,) if name == "ZeroStageEnum" else ()
    body = {"__module__": module, "__qualname__": name}
    if bases:
      body["__reduce__"] = lambda self: (type(self), (int(self),))
    made[name] = type(name, bases, body)
    found = types.ModuleType(module)
    setattr(found, name, made[name])
    monkeypatch.setitem(sys.modules, module, found)
  parents = {module.rpartition(".")[0] for module in sys.modules if module.startswith("deepspeed.")}
  for name in sorted({".".join(p.split(".")[:i]) for p in parents for i in range(1, 5)}):
    if name not in sys.modules:
      monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  return made


@STAGES
def test_objects_of_deepspeed_do_not_need_it(tmp_path, deepspeed_classes, monkeypatch, stage):
  scaler = deepspeed_classes["LossScaler"]()
  scaler.cur_scale = 65536.0
  fragment = deepspeed_classes["fragment_address"]()
  fragment.numel, fragment.start = 4, 0
  extra = {
    "stage": deepspeed_classes["ZeroStageEnum"](stage),
    "optimizer": {"loss_scaler": scaler, "param_slice_mappings": [{"a": fragment}]},
  }
  params = _model()
  write_zero(tmp_path, stage, 2, params, extra=extra)
  for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
    monkeypatch.delitem(sys.modules, name)
  source = open_source(tmp_path)
  for name, value in params.items():
    np.testing.assert_array_equal(source.read(name), value.numpy())
  assert not any(name.split(".")[0] == "deepspeed" for name in sys.modules)


def test_other_classes_are_named_with_the_remedy(tmp_path, deepspeed_classes):
  extra = {"model": {"ds_config": deepspeed_classes["DeepSpeedConfig"]()}}
  write_zero(tmp_path, 2, 2, _model(), extra=extra)
  with pytest.raises(
    ReadError,
    match=r"model_states\.pt: needs deepspeed.runtime.config"
    r"\.DeepSpeedConfig; only .*zero_to_fp32\.py",
  ):
    open_source(tmp_path)


class _Runs:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


def test_a_malicious_rank_is_not_run(tmp_path):
  extra = {"optimizer": {"loss_scaler": _Runs(tmp_path / "ran")}}
  write_zero(tmp_path, 2, 1, _model(), extra=extra)
  with pytest.raises(ReadError, match="needs (posix|nt).system"):
    open_source(tmp_path)
  assert not (tmp_path / "ran").exists()


def test_the_model_file_of_stage_2_can_be_read_by_itself(tmp_path):
  params = _model()
  write_zero(tmp_path, 2, 2, params)
  source = open_source(tmp_path / "global_step20" / "mp_rank_00_model_states.pt")
  assert "opened the part 'module'" in source.notes[0]
  assert source.read("scale").itemsize == 2


def _remove(name):
  return lambda folder: (folder / "global_step20" / name).unlink()


def _latest(text):
  return lambda folder: (folder / "latest").write_text(text)


def _rename(old, new):
  return lambda folder: (folder / "global_step20" / old).rename(folder / "global_step20" / new)


RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
  "spoil, message",
  [
    (_remove(RANK_1), "rank 1 is missing"),
    (
      _remove("zero_pp_rank_2_mp_rank_00_optim_states.pt"),
      "2 files .*, but partition_count is 3",
    ),
    (_remove("zero_pp_rank_0_mp_rank_00_model_states.pt"), "model_states.pt: missing"),
    (_remove("zero_pp_rank_2_mp_rank_00_model_states.pt"), "model_states.pt: missing"),
    (_rename(RANK_1, "zero_pp_rank_1_mp_rank_01_optim_states.pt"), "tensor and expert parallelism"),
    (_rename(RANK_1, "expp_rank_1_mp_rank_00_optim_states.pt"), "tensor and expert parallelism"),
    (
      _latest("../../elsewhere"),
      "latest: names '../../elsewhere', which is not a folder beside it",
    ),
    (_latest(""), "not a folder beside it"),
    (_latest("global_step30"), "names 'global_step30', which is not a ZeRO checkpoint"),
  ],
)
def test_folders_that_are_not_whole(tmp_path, spoil, message):
  spoil(write_zero(tmp_path, 3, 3, _model()))
  with pytest.raises(ReadError, match=message):
    open_source(tmp_path)


SHAPES = [{n: p.shape for n, p in group.items()} for group in groups_of(_model())]


@STAGES
@pytest.mark.parametrize(
  "extra, message",
  [
    (
      {"model": {"param_shapes": [{**SHAPES[0], "more": torch.Size([500])}, SHAPES[1]]}},
      "values by .* in",
    ),
    (
      {"model": {"param_shapes": [{"embed.weight": torch.Size([7, 5])}, SHAPES[1]]}},
      "values by .* in",
    ),
    ({"model": {"param_shapes": [{**SHAPES[0], "more": (-3, 5)}, SHAPES[1]]}}, "'more' .*shape"),
    (
      {"model": {"param_shapes": [{**SHAPES[0], "more": "x"}, SHAPES[1]]}},
      "'more' has the shape 'x'",
    ),
    ({"model": {"param_shapes": None}}, "no param_shapes"),
    ({"model": {"module": None}}, "no dict 'module'"),
    ({"model": {"buffer_names": 3}}, "not a layout of DeepSpeed"),
    ({"model": {"frozen_param_shapes": {"f": torch.Size([3])}}}, "frozen_param_fragments|'f'"),
    (
      {
        "model": {
          "frozen_param_shapes": {"f": torch.Size([9])},
          "frozen_param_fragments": {"f": torch.ones(2)},
        }
      },
      "'f' of shape .9. has",
    ),
    ({"stage": 4}, "ZeRO stage 4"),
    ({"stage": "x"}, "ZeRO stage 'x'"),
    ({"optimizer": {"partition_count": 7}}, "partition_count is 7"),
    (
      {"optimizer": {"single_partition_of_fp32_groups": 3, "fp32_flat_groups": [torch.ones(2, 2)]}},
      "not a list of flat float32",
    ),
  ],
)
def test_files_that_contradict_each_other(tmp_path, stage, extra, message):
  write_zero(tmp_path, stage, 2, _model(), extra=extra)
  with pytest.raises(ReadError, match=message):
    open_source(tmp_path)
