"""Work that is given to other processes ends when this one is told to."""

import multiprocessing
import time

import pytest

from demo.synthesize import worker_processes


@pytest.mark.parametrize("wait_s", [0.0, 0.05, 0.3])
def test_work_that_waits_in_the_queue_is_not_begun_after_an_interruption(wait_s):
  """A worker that is done is followed by another, which must not be waited for."""
  with pytest.raises(KeyboardInterrupt), worker_processes(1) as pool:
    first, *_ = [pool.submit(time.sleep, seconds) for seconds in (0.0, 30.0, 30.0, 30.0)]
    first.result()
    time.sleep(wait_s)
    start = time.monotonic()
    raise KeyboardInterrupt
  assert time.monotonic() - start < 25
  assert not multiprocessing.active_children()
