"""Transcriber.stream: order, memory, ends and failures of streams of clips."""

import io
import itertools
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from mooer_jax.generation import continuous


def test_a_stream_gives_each_result_in_order_and_reads_only_some_clips_ahead(transcriber, clips):
  read = []

  def audio():
    for number in range(60):
      read.append(number)
      yield "nowhere.wav" if number % 10 == 3 else clips[number % len(clips)].path

  expected = transcriber.transcribe([clip.path for clip in clips], max_new_tokens=4)
  for number, result in enumerate(transcriber.stream(audio(), batch_size=2, max_new_tokens=4)):
    if number % 10 == 3:
      assert "nowhere.wav" in result.error
    else:
      assert result == expected[number % len(clips)]
    # A window of 8 batches is decoded and waits, another one is read.
    assert number < len(read) <= number + 16 * 3
  assert number == 59


def test_bad_options_of_a_stream_are_refused_before_anything_is_read(transcriber):
  def audio():
    pytest.fail("read")
    yield

  with pytest.raises(ValueError, match="batch_size=0"):
    transcriber.stream(audio(), batch_size=0)
  with pytest.raises(ValueError, match="chunk_length_s=0.1: must be between"):
    transcriber.stream(audio(), chunk_length_s=0.1)
  with pytest.raises(TypeError, match=r"stream\(\) has no argument 'errors': failed clips give"):
    transcriber.stream(audio(), errors="raise")
  for audio in ("a.wav", np.zeros(16000, np.float32), jnp.zeros(16000), io.BytesIO(), None):
    with pytest.raises(ValueError, match="give a list of clips"):
      transcriber.stream(audio)


def test_an_endless_stream_of_unusable_clips_gives_errors_and_can_be_closed(transcriber):
  before = threading.active_count()
  results = transcriber.stream(itertools.repeat("nowhere.wav"), batch_size=1)
  for _ in range(30):
    assert "nowhere.wav" in next(results).error
  results.close()
  assert threading.active_count() == before


def test_a_small_first_window_does_not_bound_the_rows(transcriber, clips, monkeypatch):
  """Of the first 16 files only one can be read; the others are decoded two at a time."""
  sizes = []
  run = continuous._run
  monkeypatch.setattr(
    continuous, "_run", lambda **given: sizes.append(len(given["rows"].prompt_B)) or run(**given)
  )
  audio = [clips[0].path, *["nowhere.wav"] * 15, *[clip.path for clip in clips]]
  found = list(transcriber.stream(audio, batch_size=2, max_new_tokens=4))
  assert [bool(result.error) for result in found] == [False, *[True] * 15, *[False] * len(clips)]
  assert sizes[0] == 1 and sizes[-1] == 2


def test_clips_before_an_exception_of_the_source_are_transcribed(transcriber, clips):
  def audio():
    for clip in clips[:3]:
      yield clip.path
    raise RuntimeError("the microphone is gone")

  heard, found = [], []
  with pytest.raises(RuntimeError, match="microphone"):
    for result in transcriber.stream(audio(), max_new_tokens=4, on_chunk=heard.append):
      found.append(result)
  assert found == transcriber.transcribe([clip.path for clip in clips[:3]], max_new_tokens=4)
  assert sorted(chunk.seconds for chunk in heard) == sorted(result.seconds for result in found)


def test_results_do_not_wait_for_the_next_clips(transcriber, clips):
  """The source ends its first window of 8 clips only after their results are there."""
  finished = threading.Event()

  def audio():
    for number in range(9):
      if number == 8:
        assert finished.wait(60)
      yield clips[0].path

  results = transcriber.stream(audio(), batch_size=1, max_new_tokens=4)
  for _ in range(8):
    next(results)
  finished.set()
  assert len([*results]) == 1


def test_an_interrupt_does_not_wait_for_a_whole_window(transcriber, clips):
  read = []

  def audio():
    for number in range(64):
      read.append(number)
      if number == 5:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
      time.sleep(0.05)
      yield clips[0].path

  with pytest.raises(KeyboardInterrupt):
    list(transcriber.stream(audio(), batch_size=8))
  assert len(read) < 20


def test_a_path_that_raises_costs_only_itself(transcriber, clips):
  class Broken:
    def __fspath__(self):
      raise TypeError("no path")

  bad, good = transcriber.stream([Broken(), clips[0].path], max_new_tokens=4)
  assert bad.error == "audio[0]: no path" and not good.error
