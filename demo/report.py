"""What the demo says at its end, and whether that is what it promised."""

from rich.console import Console
from rich.table import Table

SHOWN = 5


def failures(report: dict) -> list[str]:
  """What a run should have reached and did not."""
  found = []
  if not report["loss_last"] <= report["loss_first"] / 2:
    found.append(
      f"the loss went from {report['loss_first']:.3f} to {report['loss_last']:.3f},"
      " not down by half"
    )
  if any(u["hypothesis"] is None for u in report["utterances"]):
    found.append("some test utterances have no transcript")
  if not any(u["hypothesis"] for u in report["utterances"]):
    found.append("every transcript is empty")
  if not report["transcribed"]["text"]:
    found.append("the command `mooer-jax transcribe` heard nothing")
  if report["cer"] is None or report["cer"] > report["goal_cer"]:
    found.append(f"CER is {_percent(report['cer'])}, the goal {_percent(report['goal_cer'])}")
  return found


def _percent(rate: float | None) -> str:
  return "undefined" if rate is None else f"{100 * rate:.2f} %"


def show(report: dict, folder: str):
  """Prints the score and a few transcripts beside their references."""
  console = Console()
  table = Table("voice (never trained on)", "reference", "transcript")
  # The first ones, not the best ones: the strings are random and the voices take turns.
  for row in report["utterances"][:SHOWN]:
    table.add_row(row["voice"], row["reference"], row["hypothesis"])
  console.print(table)
  console.print(
    f"CER {_percent(report['cer'])} on {report['n_utterances']} utterances of"
    f" {len(report['held_out_voices'])} voices and of strings that were never trained on",
    soft_wrap=True,
  )
  console.print(
    f"loss {report['loss_first']:.3f} to {report['loss_last']:.3f}; training"
    f" {report['train_seconds']:.0f} s, all steps {report['total_seconds']:.0f} s",
    soft_wrap=True,
  )
  console.print(f"{folder}/report.json, {folder}/loss.png", highlight=False, soft_wrap=True)
