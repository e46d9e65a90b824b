"""Cost of bfloat16 for a MooER of real width and for its LLM alone: `convert verify` of both.

    python -m benchmarks.accuracy --llm SmolLM2-135M-Instruct.Q4_1.gguf --dir out/accuracy \
      --json out/accuracy.json *.wav

SAN-M has the sizes of Paraformer-large. Its weights and those of the adapter are random; the output
is scaled to the standard deviation of the LLM's embeddings, as that of a trained adapter is. --llm
has the weights of the LLM. CMVN is that of the clips. The LLM alone continues a text prompt.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from benchmarks.provenance import MODEL, write_result
from convert.core.options import Options
from convert.exporting import export_checkpoint
from convert.families.mooer import ADAPTER_FILE, ENCODER_FILE, ENCODER_FOLDER
from convert.importing import import_checkpoint
from convert.verify.reference.paraformer import sanm_encoder
from convert.verify.report import print_report
from convert.verify.run import verify
from mooer_jax.audio.cmvn import write_mvn
from mooer_jax.audio.decode import load_audio
from mooer_jax.audio.frontend import FrontendConfig
from mooer_jax.checkpoint import load
from mooer_jax.config import part_from_json
from mooer_jax.connectors.linear import LinearConfig
from mooer_jax.encoders.sanm import SANMConfig

SOURCES = (
  *MODEL,
  "benchmarks/accuracy.py",
  "convert/families/mooer.py",
  "convert/parts/language_model.py",
  "convert/verify",
  "mooer_jax/audio",
)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("audio", nargs="+", type=Path)
  parser.add_argument("--llm", required=True, type=Path, help="LLaMA folder or GGUF file")
  parser.add_argument("--dir", required=True, type=Path, help="folder for 2 GB of checkpoints")
  parser.add_argument("--json", type=Path, help="file to write")
  args = parser.parse_args()
  overwrite = Options(overwrite=True)
  import_checkpoint("llama", args.llm, args.dir / "llm", options=overwrite)
  release = args.dir / "release"
  release.mkdir(exist_ok=True)
  export_checkpoint("llama", args.dir / "llm", release / "llm", overwrite=True)
  _write_encoder(release / ENCODER_FOLDER, args.audio)
  (release / "asr").mkdir(exist_ok=True)
  torch.save(_adapter(args.dir / "llm"), release / "asr" / ADAPTER_FILE)
  options = Options(task="asr", lora=False, overwrite=True)
  import_checkpoint("mooer", release, args.dir / "mooer", options=options)
  found = {
    "mooer": verify("mooer", release, args.dir / "mooer", audio=args.audio, max_new_tokens=20),
    "llama": verify("llama", args.llm, args.dir / "llm"),
  }
  for kind, verdict in found.items():
    print(f"\n{kind}")
    print_report(verdict)
  figures = {kind: dataclasses.asdict(verdict) for kind, verdict in found.items()}
  write_result(args.json, figures, SOURCES)


def _write_encoder(folder: Path, audio: list[Path]) -> None:
  folder.mkdir(exist_ok=True)
  config = SANMConfig()
  torch.manual_seed(0)
  sizes = {
    "input_size": config.input_width,
    "output_size": config.hidden_size,
    "linear_units": config.intermediate_size,
    "num_blocks": config.layers,
    "kernel_size": config.memory_kernel,
  }
  torch.save(sanm_encoder(sizes).state_dict(), folder / ENCODER_FILE)
  frontend = FrontendConfig()
  clips = [load_audio(file, sample_rate_hz=frontend.fbank.sample_rate_hz) for file in audio]
  features_TF = np.concatenate([frontend.features(clip) for clip in clips])
  write_mvn(folder / "am.mvn", -features_TF.mean(0), 1 / features_TF.std(0))


def _adapter(llm: Path) -> dict[str, torch.Tensor]:
  about = load(llm, dtype="float32")
  width = part_from_json(about.config["decoder"], "decoder").hidden_size
  spread = float(np.asarray(about.params["decoder"]["embed"]["embedding"]).std())
  joined, hidden = LinearConfig().stack * SANMConfig.hidden_size, LinearConfig.hidden_size
  torch.manual_seed(1)
  # He's initialization keeps the standard deviation of a normed input near 1 up to the last layer.
  return {
    "encoder_projector.linear1.weight": torch.randn(hidden, joined) * (2 / joined) ** 0.5,
    "encoder_projector.linear1.bias": torch.zeros(hidden),
    "encoder_projector.linear2.weight": torch.randn(width, hidden) * spread / hidden**0.5,
    "encoder_projector.linear2.bias": torch.zeros(width),
  }


if __name__ == "__main__":
  main()
