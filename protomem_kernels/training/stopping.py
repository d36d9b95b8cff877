"""Signals that ask a run to stop are heard between steps, so that what is saved is whole.

SIGINT is what Ctrl-C sends, SIGTERM what schedulers send before they kill, SIGHUP what a terminal sends that closes.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ASKING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ONCE = 1.0  # second; a terminal and a wrapper such as srun may both hand on one and the same Ctrl-C


class RunStopped(KeyboardInterrupt):
    """A run was asked to stop and did; the message says after which step and how to go on.

    Attributes:
        signal: the one that asked.
    """

    def __init__(self, asked: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.signal = asked

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that such a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal


class StopSignals:
    """Hears the signals of ``ASKING`` within its block, in the main thread alone, as Python has it.

    One that is ignored already (``nohup``, a shell's background job) stays so.

    Attributes:
        heard: the first that came, or None.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self._since = 0.0
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in ASKING:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block a signal is only noted; one more, a second later, breaks off all the same."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.heard is None:
            self.heard, self._since = signal.Signals(number), now
            if not self._held:
                raise RunStopped(self.heard, "")
        elif now - self._since > ONCE:
            raise RunStopped(self.heard, "")


def outlive_stop_signals(worker: int) -> None:
    """Have a process that reads images (``worker_init_fn``) leave signals to the run, which needs it for its last step.

    A terminal and a scheduler send them to all processes. A minute after SIGTERM it goes all the same.
    """
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
