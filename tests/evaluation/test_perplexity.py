"""Figures of perplexity evaluation: the panel of each perplexity."""

import math

import pytest
from matplotlib.figure import Figure

from mooer_jax.evaluation.answer_matching import score_by_task
from mooer_jax.evaluation.perplexity import (
  NONE,
  Perplexity,
  SweepPoint,
  draw_perplexities,
  draw_sweep,
  exp_of,
  perplexity_table,
  read_perplexities,
  sweep_table,
  write,
)


def _rows(checkpoints, instructions, scales=(4.0,)):
  return [
    Perplexity(folder, step, scale, instruction, task, 2.0 + number, 10)
    for folder, step in checkpoints
    for scale in scales
    for instruction in instructions
    for number, task in enumerate(("asr", "story", "reply"))
  ]


@pytest.fixture
def panels(monkeypatch, tmp_path):
  """Draws rows; gives {title: (x label, {label: x})}."""

  def draw(rows):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    draw_perplexities(rows, tmp_path / "a.png")
    return {
      axes.get_title(): (
        [tick.get_text() for tick in axes.get_xticklabels()],
        {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()},
      )
      for axes in drawn[0].axes
    }

  return draw


def test_the_papers_four_panels_over_the_steps_of_a_run(panels):
  run = [("out/run", step) for step in (0, 1, 2)]
  found = panels(_rows(run, (NONE, "story", "reply")))
  assert {title: list(lines) for title, (_, lines) in found.items()} == {
    "(a) P(Y|X)": ["asr", "story"],
    "(b) P(Y|X)": ["asr", "reply"],
    "(c) P(Y|X, I), I of story": ["asr", "story"],
    "(d) P(Y|X, I), I of reply": ["asr", "reply"],
  }
  assert all(x == [0, 1, 2] for _, lines in found.values() for x in lines.values())


def test_one_checkpoint_is_drawn_over_its_scales_and_without_instructions_in_one_panel(panels):
  ((title, (_, lines)),) = panels(_rows([("out/run", 7)], (NONE,), (0.0, 2.0, 4.0))).items()
  assert title == "P(Y|X)"
  assert lines == {task: [0.0, 2.0, 4.0] for task in ("asr", "story", "reply")}
  found = panels(_rows([("out/run", 7)], (NONE, "story", "reply"), (4.0, 0.0)))
  assert list(found["(b) P(Y|X)"][1]) == ["asr", "reply"]  # no entry for what is not drawn


def test_checkpoints_of_several_runs_stand_in_the_order_given(panels):
  folders = [("out/b/step_00000400", 400), ("out/a/step_00000400", 400)]
  ((_, (ticks, lines)),) = panels(_rows(folders, (NONE,), (2.0, 4.0))).items()
  assert ticks == ["b/step_00000400", "a/step_00000400"]
  assert lines["asr, 2"] == [0, 1] and len(lines) == 6


@pytest.mark.parametrize("translates", [False, True])
def test_a_task_that_translates_is_swept_by_bleu(monkeypatch, tmp_path, translates):
  task = "translation_en2de" if translates else "count"
  texts = {"a": "one dog barks loudly here", "b": "two cats sleep over there"}
  scores = score_by_task(dict.fromkeys(texts, task), texts, texts)
  points = [SweepPoint(scale, task, scores[task]) for scale in (0.0, 4.0)]
  drawn = []
  monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
  draw_sweep(points, 4.0, tmp_path / "a.png")
  labels = [axes.get_ylabel() for axes in drawn[0].axes]
  assert ("BLEU" in labels) == translates and len(labels) == 2 + translates
  if translates:
    assert list(drawn[0].axes[2].get_lines()[0].get_ydata()) == pytest.approx([100, 100])
  cells = list(sweep_table(points).columns[1].cells)
  assert cells == ["BLEU 100.0" if translates else "100.0 (0.0)"] * 2


def test_losses_beyond_the_range_of_perplexities_are_recorded_and_drawn(tmp_path):
  """As at an extreme LoRA scale, or after training has diverged."""
  values = [exp_of(nats) for nats in (math.log(2), 710.0, math.inf, math.nan)]
  assert values[:3] == [pytest.approx(2), math.inf, math.inf] and math.isnan(values[3])
  rows = [Perplexity("run", step, 1.0, NONE, "asr", value, 1) for step, value in enumerate(values)]
  write(tmp_path / "a.json", rows)
  assert str(read_perplexities(tmp_path / "a.json")) == str(rows)
  assert perplexity_table(rows).row_count == 4
  assert draw_perplexities(rows[1:], tmp_path / "a.png").stat().st_size
