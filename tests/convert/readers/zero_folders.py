"""Writes DeepSpeed folders in the layout of ZeRO 1, 2 and 3, cut over several ranks."""

import torch


def groups_of(params):
  """Two groups, as with and without weight decay."""
  decayed = {n: p for n, p in params.items() if p.ndim > 1}
  return [decayed, {n: p for n, p in params.items() if n not in decayed}]


def _pad(flat, multiple):
  return torch.cat([flat, torch.zeros(-len(flat) % multiple)])


def _slices(stage, groups, ranks, rank):
  """What the optimizer of one rank keeps of each group."""
  found = []
  for group in groups:
    if stage < 3:
      joined = _pad(torch.cat([p.reshape(-1) for p in group.values()]), 2 * ranks)
      found.append(joined.chunk(ranks)[rank].clone())
    else:
      shares = [_pad(p.reshape(-1), ranks).chunk(ranks)[rank] for p in group.values()]
      found.append(torch.cat(shares))
  return found


def _optimizer_state(stage, groups, ranks, rank, extra):
  key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
  flat = _slices(stage, groups, ranks, rank)
  return {
    "optimizer_state_dict": {
      "zero_stage": extra.get("stage", stage),
      key: flat,
      "partition_count": ranks if stage == 3 else [ranks] * len(groups),
      "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros_like(flat[0])}}},
      **extra.get("optimizer", {}),
    },
    "ds_version": "0.14.2",
  }


def write_zero(folder, stage, ranks, params, *, frozen=None, extra=None, buffer="rotary.inv_freq"):
  """Writes a checkpoint folder; `extra` adds to the files or replaces what is right."""
  groups, extra, frozen = groups_of(params), extra or {}, frozen or {}
  tag = "global_step20"
  at = folder / tag
  at.mkdir(parents=True)
  (folder / "latest").write_text(tag)
  for rank in range(ranks):
    prefix = "bf16_" if stage == 2 else ""
    torch.save(
      _optimizer_state(stage, groups, ranks, rank, extra),
      at / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
    )
  for rank in range(ranks if stage == 3 else 1):
    module = {n: torch.empty(0) if stage == 3 else p.bfloat16() for n, p in params.items()}
    module[buffer] = torch.arange(4.0)
    model = {
      "module": module,
      "buffer_names": [buffer],
      "param_shapes": [{n: p.shape for n, p in group.items()} for group in groups],
      "optimizer": None,
      "lr_scheduler": {"last_batch_iteration": 19},
      "global_steps": 20,
      "dp_world_size": ranks,
      "mp_world_size": 1,
      "ds_version": "0.14.2",
      "frozen_param_shapes": {n: p.shape for n, p in frozen.items()} or None,
      "frozen_param_fragments": {
        n: p
        if stage < 3
        else torch.cat([p.reshape(-1), p.new_zeros(-p.numel() % ranks)]).chunk(ranks)[rank].clone()
        for n, p in frozen.items()
      }
      or None,
      **extra.get("model", {}),
    }
    name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
    torch.save(model, at / f"{name}_model_states.pt")
  return folder
