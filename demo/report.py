"""The demo's final report: success criteria and printed table."""

from rich.console import Console
from rich.table import Table

SHOWN = 5


def failures(report: dict) -> list[str]:
  """Return the success criteria that a run misses, one message each."""
  found = []
  if not report["loss_last"] <= report["loss_first"] / 2:
    found.append(
      f"the loss did not fall by half: {report['loss_first']:.3f} to {report['loss_last']:.3f}"
    )
  if any(u["hypothesis"] is None for u in report["utterances"]):
    found.append("some test utterances have no transcript")
  if not any(u["hypothesis"] for u in report["utterances"]):
    found.append("every transcript is empty")
  if not report["transcribed"]["text"]:
    found.append("`mooer-jax transcribe` returned an empty transcript")
  if report["cer"] is None or report["cer"] > report["goal_cer"]:
    found.append(
      f"CER is {_percent(report['cer'])}; it must be at most {_percent(report['goal_cer'])}"
    )
  return found


def _percent(rate: float | None) -> str:
  return "undefined" if rate is None else f"{100 * rate:.2f} %"


def show(report: dict, folder: str):
  """Print the CER and a few transcripts with their references."""
  console = Console()
  table = Table("voice (not in training)", "reference", "transcript")
  # The first utterances, not the best: the strings are random and the voices alternate.
  for row in report["utterances"][:SHOWN]:
    table.add_row(row["voice"], row["reference"], row["hypothesis"])
  console.print(table)
  console.print(
    f"CER {_percent(report['cer'])} on {report['n_utterances']} test utterances; their"
    f" {len(report['held_out_voices'])} voices and their digit strings are not in training",
    soft_wrap=True,
  )
  console.print(
    f"loss {report['loss_first']:.3f} to {report['loss_last']:.3f}; training"
    f" {report['train_seconds']:.0f} s, all steps {report['total_seconds']:.0f} s",
    soft_wrap=True,
  )
  console.print(f"{folder}/report.json, {folder}/loss.png", highlight=False, soft_wrap=True)
