"""The PyTorch originals on random weights, and those weights as our parameter trees."""

import re

import jax
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from mooer_jax import tree
from mooer_jax.decoders.llm import LLMConfig
from mooer_jax.encoders.sanm import SANMConfig
from tests import numerics

SANM_NAMES = (
  (r"^encoders0\.0\.", "first_layer."),
  (r"^encoders\.(\d+)\.", r"layers_\1."),
  (r"self_attn\.linear_q_k_v", "attention.qkv"),
  (r"self_attn\.linear_out", "attention.out"),
  (r"self_attn\.fsmn_block", "attention.fsmn"),
  (r"feed_forward\.w_1", "feed_forward.up"),
  (r"feed_forward\.w_2", "feed_forward.down"),
)
QWEN2_NAMES = (
  (r"^base_model\.model\.", ""),
  (r"^model\.", ""),
  (r"^layers\.(\d+)\.", r"layers_\1."),
  (r"\.base_layer", ""),
  (r"self_attn\.([qkvo])_proj", r"attention.\1"),
  (r"mlp\.(gate|up|down)_proj", r"mlp.\1"),
  (r"input_layernorm", "input_norm"),
  (r"post_attention_layernorm", "mlp_norm"),
  (r"^norm\.", "final_norm."),
  (r"^lm_head\.", "head."),
  (r"lora_([AB])\.default\.weight", lambda m: f"lora_{m[1].lower()}"),
)
ADAPTER_NAMES = ((r"^0\.", "linear1."), (r"^2\.", "linear2."))


def vary_vectors(module, seed):
  """Moves norms and biases off their ones and zeros, so that a mix-up shows."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in module.parameters():
      if parameter.ndim == 1:
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
  return module.eval()


def sanm(config: SANMConfig, seed=0):
  """funasr's encoder, set up as in Paraformer-large."""
  from funasr.models.sanm.encoder import SANMEncoder

  torch.manual_seed(seed)
  module = SANMEncoder(
    input_size=config.input_width,
    output_size=config.hidden_size,
    attention_heads=config.heads,
    linear_units=config.intermediate_size,
    num_blocks=config.layers,
    dropout_rate=0.0,
    positional_dropout_rate=0.0,
    attention_dropout_rate=0.0,
    input_layer="pe",
    normalize_before=True,
    positionwise_layer_type="linear",
    kernel_size=config.memory_kernel,
    sanm_shfit=0,
    selfattention_layer_type="sanm",
  )
  return vary_vectors(module, seed)


def llm(config: LLMConfig, seed=0):
  """transformers' Qwen2, or LLaMA if there are no biases, of the same sizes."""
  import transformers

  torch.manual_seed(seed)
  assert config.head_dim * config.heads == config.hidden_size
  name = "Qwen2" if config.qkv_bias else "Llama"
  module = getattr(transformers, f"{name}ForCausalLM")(
    getattr(transformers, f"{name}Config")(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.intermediate_size,
      num_hidden_layers=config.layers,
      num_attention_heads=config.heads,
      num_key_value_heads=config.kv_heads,
      rms_norm_eps=config.norm_eps,
      rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
      tie_word_embeddings=config.tie_word_embeddings,
      attn_implementation="eager",
      use_cache=False,
    )
  )
  assert module.dtype == torch.float32
  return vary_vectors(module, seed)


def with_lora(module, config: LLMConfig, seed=0, *, zero_b=False):
  """peft's LoRA around it; B is random, for at its usual zeros LoRA would not show."""
  from peft import LoraConfig, get_peft_model

  torch.manual_seed(seed)
  targets = [f"{target}_proj" for target in config.lora_targets]
  module = get_peft_model(
    module,
    LoraConfig(
      r=config.lora_rank,
      lora_alpha=config.lora_alpha,
      lora_dropout=0.0,
      target_modules=targets,
      task_type="CAUSAL_LM",
    ),
  )
  if not zero_b:
    with torch.no_grad():
      for name, parameter in module.named_parameters():
        if "lora_B" in name:
          parameter.normal_(0, 0.02)
  return module.eval()


def params(tensors, names) -> dict:
  """A state dict (or {name: gradient}) as a nested dict of float32 arrays in our layout."""
  flat = {}
  for name, tensor in dict(tensors).items():
    for pattern, replacement in names:
      name = re.sub(pattern, replacement, name)
    tensor = tensor.detach()
    *parent, leaf = name.split(".")
    if parent[-1] == "embed_tokens":
      parent, leaf = ["embed"], "embedding"
    elif parent[-1] == "fsmn":
      tensor, leaf = tensor[:, 0].T, "kernel"
    elif leaf == "weight" and tensor.ndim == 1:
      leaf = "scale"
    elif leaf in ("weight", "lora_a", "lora_b"):
      tensor, leaf = tensor.T, leaf.replace("weight", "kernel")
    # A copy, for torch updates its own in place.
    flat["/".join((*parent, leaf))] = tensor.clone(memory_format=torch.contiguous_format).numpy()
  return tree.unflatten(flat)


def sanm_params(module) -> dict:
  return params(module.state_dict(), SANM_NAMES)


def qwen2_params(module, config: LLMConfig) -> dict:
  nested = params(module.state_dict(), QWEN2_NAMES)
  if config.tie_word_embeddings:
    np.testing.assert_array_equal(nested.pop("head")["kernel"].T, nested["embed"]["embedding"])
  return nested


class Float64(TorchFunctionMode):
  """Replaces float32 by float64 where a module names it: in norms, softmax and RoPE's angles."""

  def __torch_function__(self, function, types, args=(), kwargs=None):
    def widened(x):
      return torch.float64 if x is torch.float32 else x

    if function is torch.Tensor.float:
      function = torch.Tensor.double
    kwargs = {name: widened(value) for name, value in (kwargs or {}).items()}
    return function(*map(widened, args), **kwargs)


def assert_parity(ours, run, module, *inputs, layers):
  """Asserts that our error is at most twice that of a module in float32, plus a rounding per layer.

  Args:
    ours: our result, in float32: an array or a tree of them.
    run: function of the module, its dtype (to which it casts inputs) and `inputs`; returns tensors.
    module: in float32. The truth is what it computes in float64.
    inputs: of `run`, beside those that it has.
    layers: number of layers, each of which rounds values of the magnitude of the result.

  Returns:
    the largest difference from theirs of each array.

  Raises:
    BoundExceeded: see `tests.numerics.assert_as_accurate`.
  """
  differences = []
  with torch.no_grad():
    theirs = run(module, torch.float32, *inputs)
    with Float64():
      truth = run(module.double(), torch.float64, *inputs)
    module.float()  # bit for bit what it was, and no second copy meanwhile
  for our, their, exact in zip(*map(jax.tree.leaves, (ours, theirs, truth)), strict=True):
    our, their, exact = np.asarray(our), their.numpy(), exact.numpy()
    assert our.dtype == their.dtype == np.float32 and exact.dtype == np.float64
    floor = numerics.rounding(layers, np.abs(exact).max())
    numerics.assert_as_accurate(our, their, exact, floor=floor)
    differences.append(float(np.abs(our - their).max()))
  return differences
