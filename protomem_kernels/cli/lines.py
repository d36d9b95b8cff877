"""How a run goes on where nobody looks at a terminal: a line now and then, written at once, through ``logging``."""

from __future__ import annotations

import logging
import time
from typing import IO

from protomem_kernels.training.steps import Step

LOG = logging.getLogger(__name__)
SHARE, SECONDS = 20, 30.0  # a line after every twentieth of the steps, and after so much time


class AtOnce(logging.StreamHandler):  # type: ignore[type-arg]  # generic from Python 3.11 on
    """Writes every record as it comes; an output that is closed is the run's to know, not logging's to complain of."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Raise the error that is being handled."""
        raise


class Lines:
    """Tells of steps in lines like ``12:04:31 step 40 of 800, loss 3.214, memory 100%``.

    Args:
        stream: where they go.

    """

    def __init__(self, stream: IO[str]) -> None:
        self._handler = AtOnce(stream)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        self._last = 0.0

    def start(self, first_step: int, steps: int) -> None:
        """Begin after so many steps of all of them."""
        self._first, self._steps, self._last = first_step + 1, steps, time.monotonic()
        LOG.addHandler(self._handler)
        LOG.setLevel(logging.INFO)

    def show(self, step: Step, loss: float) -> None:
        """Write a line if it is time for one; ``loss`` is the smoothed one."""
        now = time.monotonic()
        due = step.number in (self._first, self._steps) or step.number % -(-self._steps // SHARE) == 0
        if due or now - self._last >= SECONDS:
            self._last = now
            LOG.info("step %d of %d, loss %.3f, memory %.0f%%", step.number, self._steps, loss, 100 * step.occupancy)

    def stop(self) -> None:
        """Write no more."""
        LOG.removeHandler(self._handler)
