"""Draw docs/architecture.png: python docs/draw_architecture.py"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PARTS = (  # title, the part of MooER, colour
  ("features", "Kaldi fbank 80\nlow frame rate 7/6\n560 values / 60 ms", "#dbe9f6"),
  ("encoder", "SAN-M (Paraformer)\n50 layers × 512\n158 M, frozen", "#cfe8cf"),
  ("connector", "stack 2 frames\nlinear, ReLU, linear\n1 token / 120 ms", "#fde7c3"),
  ("splice", "insert speech tokens\ninto the prompt\n(MooER: first)", "#eeeeee"),
  ("decoder", "Qwen2 0.5B – 7B\nLoRA, KV cache\ncausal", "#f3d3d3"),
)
WIDTH, HEIGHT, GAP = 2.2, 1.7, 0.6


def draw() -> Figure:
  """Draw five parts in a row, the arrays between them, and which parts are trained."""
  figure = Figure(figsize=(12.5, 3.3), layout="constrained")
  axes = figure.add_subplot()
  axes.axis("off")
  flows = ("waveform\n[B, N]", "[B, T, F]", "[B, T, D]", "[B, S, D]", "[B, S, D]", "tokens")
  for number, (title, text, colour) in enumerate(PARTS):
    left = number * (WIDTH + GAP)
    axes.add_patch(
      FancyBboxPatch((left, 0), WIDTH, HEIGHT, boxstyle="round,pad=0.04", fc=colour, ec="#555555")
    )
    centre = left + WIDTH / 2
    axes.text(centre, HEIGHT - 0.28, title, ha="center", va="center", weight="bold", size=13)
    axes.text(centre, 0.62, text, ha="center", va="center", size=10)
  for number, flow in enumerate(flows):
    end = number * (WIDTH + GAP) - 0.04
    start = end - GAP + 0.08
    arrow = FancyArrowPatch(
      (start, HEIGHT / 2), (end, HEIGHT / 2), arrowstyle="-|>", mutation_scale=14, color="#333333"
    )
    axes.add_patch(arrow)
    axes.text((start + end) / 2, HEIGHT + 0.12, flow, ha="center", va="bottom", size=9)
  below = {1: "frozen", 2: "trained", 4: "LoRA trained, rest frozen"}
  for number, text in below.items():
    axes.text(number * (WIDTH + GAP) + WIDTH / 2, -0.25, text, ha="center", size=9, style="italic")
  axes.text(
    3 * (WIDTH + GAP) + WIDTH / 2,
    -0.25,
    "prompt: Transcribe speech to text.",
    ha="center",
    size=9,
    style="italic",
  )
  axes.set_xlim(-GAP - 0.3, len(PARTS) * (WIDTH + GAP) + 0.3)
  axes.set_ylim(-0.5, HEIGHT + 0.75)
  return figure


if __name__ == "__main__":
  draw().savefig(Path(__file__).with_name("architecture.png"), dpi=110)
