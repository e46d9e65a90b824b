"""Draw docs/architecture.png: python docs/draw_architecture.py"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PARTS = (  # title, the part of MooER, colour, the text below
  ("features", "Kaldi fbank 80\nlow frame rate 7/6\n560 values / 60 ms", "#dbe9f6", ""),
  ("encoder", "SAN-M (Paraformer)\n50 layers × 512\n158 M, frozen", "#cfe8cf", "frozen"),
  ("connector", "stack 2 frames\nlinear, ReLU, linear\n1 token / 120 ms", "#fde7c3", "trained"),
  (
    "splice", "insert speech tokens\ninto the prompt\n(MooER: first)", "#eeeeee",
    "prompt: Transcribe speech to text.",
  ),
  (
    "decoder", "Qwen2 0.5B – 7B\nLoRA, KV cache\ncausal", "#f3d3d3", "LoRA trained, rest frozen",
  ),
)  # fmt: skip
FLOWS = ("waveform\n[B, N]", "[B, T, F]", "[B, T, D]", "[B, S, D]", "[B, S, D]", "tokens")
WIDTH, HEIGHT, GAP = 2.2, 1.7, 0.6


def draw() -> Figure:
  """Draw five parts in a row, the arrays between them, and which parts are trained."""
  figure = Figure(figsize=(12.5, 3.3), layout="constrained")
  axes = figure.add_subplot(
    xlim=(-GAP - 0.3, len(PARTS) * (WIDTH + GAP) + 0.3), ylim=(-0.5, HEIGHT + 0.75)
  )
  axes.axis("off")
  for number, (title, text, colour, below) in enumerate(PARTS):
    left = number * (WIDTH + GAP)
    centre = left + WIDTH / 2
    axes.add_patch(
      FancyBboxPatch((left, 0), WIDTH, HEIGHT, boxstyle="round,pad=0.04", fc=colour, ec="#555555")
    )
    axes.text(centre, HEIGHT - 0.28, title, ha="center", va="center", weight="bold", size=13)
    axes.text(centre, 0.62, text, ha="center", va="center", size=10)
    axes.text(centre, -0.25, below, ha="center", size=9, style="italic")
  for number, flow in enumerate(FLOWS):
    end = number * (WIDTH + GAP) - 0.04
    start = end - GAP + 0.08
    ends = (start, HEIGHT / 2), (end, HEIGHT / 2)
    axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=14, color="#333333"))
    axes.text((start + end) / 2, HEIGHT + 0.12, flow, ha="center", va="bottom", size=9)
  return figure


if __name__ == "__main__":
  draw().savefig(Path(__file__).with_name("architecture.png"), dpi=110)
