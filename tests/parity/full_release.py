"""A MooER release with its full-width encoder, its tokenizer and an LLM; random weights."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mooer_jax.audio.cmvn import write_mvn
from mooer_jax.encoders.sanm import SANMConfig
from tests.convert.folders_of import vary, with_lora
from tests.parity import torch_models
from tests.text.qwen import write_qwen2_folder

TASKS = ("asr", "ast", "asr_ast_mtl")
TOKENS, EOS, LINE_BREAK = 151646, 151645, 198  # of Qwen2's tokenizer
LLM_WIDTH = 64
LLM = "Qwen2-0.1B-Instruct"
SMALL = dict(
  hidden_size=LLM_WIDTH,
  intermediate_size=128,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  tie_word_embeddings=False,
)
QWEN2_0_5B = dict(
  hidden_size=896,
  intermediate_size=4864,
  num_hidden_layers=24,
  num_attention_heads=14,
  num_key_value_heads=2,
  tie_word_embeddings=True,
)


def write_release(
  folder: Path,
  features: list[torch.Tensor],
  *,
  encoder: SANMConfig = SANMConfig(),
  tasks=TASKS,
  sizes: Mapping = SMALL,
) -> Path:
  """Writes a release whose answers follow the audio, vary, and end early or at the limit.

  Args:
    folder: to make.
    features: [T, 560] each, without CMVN, which is estimated from them.
    encoder: of the published width; the depth may be another.
    tasks: each gets an adapter and LoRA weights of its own.
    sizes: of the LLM, as transformers names them.
  """
  (folder / "paraformer_encoder").mkdir(parents=True)
  state = torch_models.sanm(encoder).state_dict()
  torch.save(state, folder / "paraformer_encoder" / "paraformer-encoder.pth")
  everything_TF = torch.cat(features)
  spread_F, mean_F = torch.std_mean(everything_TF, dim=0)
  write_mvn(
    folder / "paraformer_encoder" / "am.mvn", (-mean_F).numpy(), spread_F.reciprocal().numpy()
  )
  write_qwen2_folder(folder / LLM)
  llm = language_model(sizes)
  llm.save_pretrained(folder / LLM)
  for seed, task in enumerate(tasks, start=1):
    (folder / task).mkdir()
    torch.save(adapter(seed, sizes["hidden_size"]), folder / task / "adapter_project.pt")
    targets = ("q", "k", "v", "o", "gate", "up", "down")
    tuned = with_lora(language_model(sizes), seed=seed, rank=64, alpha=16, targets=targets)
    tuned.save_pretrained(folder / task / "lora_weights")
  return folder


def encoder_of(release: Path) -> SANMConfig:
  """The encoder of a release, whose depth is that of its weights."""
  state = torch.load(release / "paraformer_encoder" / "paraformer-encoder.pth", mmap=True)
  layers = {name.split(".")[1] for name in state if name.startswith("encoders.")}
  return SANMConfig(layers=len(layers) + 1)


def language_model(sizes: Mapping):
  """Qwen2 whose logits spread by about 3, and more for eos and the line break, so they occur."""
  from transformers import Qwen2Config, Qwen2ForCausalLM

  torch.manual_seed(0)
  config = Qwen2Config(
    vocab_size=151936,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    bos_token_id=151643,
    eos_token_id=EOS,
    **sizes,
  )
  module = Qwen2ForCausalLM(config)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      if "embed" in name:
        parameter.normal_(0, 1)
      elif parameter.ndim > 1:
        parameter.normal_(0, (3 if "lm_head" in name else 1.5) * parameter.shape[1] ** -0.5)
    module.lm_head.weight[TOKENS:] = 0  # the tokenizer knows no such tokens
    module.lm_head.weight[EOS] *= 2.2
    module.lm_head.weight[LINE_BREAK] *= 2.2
  return vary(module)


def adapter(seed: int, width: int) -> dict[str, torch.Tensor]:
  """Content of adapter_project.pt."""
  torch.manual_seed(seed)
  layers = {
    "linear1": torch.nn.Linear(1024, 2048),
    "linear2": torch.nn.Linear(2048, width),
  }
  with torch.no_grad():
    for layer in layers.values():
      layer.weight.normal_(0, 1.5 * layer.weight.shape[1] ** -0.5)
  state = vary(torch.nn.ModuleDict(layers), seed).state_dict()
  return {f"encoder_projector.{name}": tensor for name, tensor in state.items()}
