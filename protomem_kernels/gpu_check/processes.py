"""Tasks as processes of their own: several at a time, each with a limit, and none that can stop the next."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from protomem_kernels.gpu_check.records import Lines, Record

GO_ON_IN_A_NEW_ONE = 75  # exit code of a process that has written why it cannot go on: the rest needs another one
KNOWS_THE_USERS = "environment"  # the part that tells of the verdicts on the machine itself
TICK = 0.05  # seconds between two looks
PATIENCE = 10.0  # seconds to wait for a process that was killed; one that a driver holds may never end


class Task(NamedTuple):
    """What one process does.

    Attributes:
        part: the module of this folder that does it.
        name: what it is given.
        silence: seconds for which it may write nothing.
        resumes: whether a process that ends early leaves the cases after the one at hand to another one.
        first: the case to begin with.
    """

    part: str
    name: str
    silence: float
    resumes: bool = False
    first: int = 0


class Setting(NamedTuple):
    """What all processes of a check have in common.

    Attributes:
        lines: the file that they write to.
        began: when the check began (``time.time``).
        checkout: where the tests are.
        folder: a temporary one, where other processes run and what they print is kept.
        environment: of the processes.
        show: is called with each new line.
        module: what the processes run.
    """

    lines: Path
    began: float
    checkout: Path
    folder: Path
    environment: Mapping[str, str]
    show: Callable[[dict[str, Any]], None]
    module: str = __package__


class _Running:
    """A process at its task."""

    def __init__(self, task: Task, setting: Setting, number: int, cache: str | None) -> None:
        self.task, self.printed = task, setting.folder / f"{task.part}-{number}.log"
        self.heard, self.at_hand, self.case = time.monotonic(), "", task.first - 1
        given = {
            **task._asdict(),
            "lines": str(setting.lines),
            "began": setting.began,
            "checkout": str(setting.checkout),
            "parent": os.getpid(),
        }
        # What this process imports is what that one does; the tests are imported from where they are.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**setting.environment, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        if cache is not None:
            environment["PROTOMEM_CACHE_DIR"] = str(setting.folder / cache)
        with self.printed.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", setting.module, json.dumps(given)],
                cwd=setting.checkout if task.part == "suite" else setting.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End it and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)

    def last_words(self) -> str:
        return self.printed.read_text(encoding="utf-8", errors="replace").strip()


class Runner:
    """Runs tasks, and shows and counts the lines that come of them.

    Args:
        setting: of the check.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.lines = setting, Lines(setting.lines)
        self.running: list[_Running] = []
        self.seen: list[dict[str, Any]] = []
        self._started = 0

    def run(self, part: str, tasks: list[Task], at_once: int, seconds: float) -> None:
        """Run the tasks of a part, or as many as there is time for; what was left out is written."""
        record, end = Record(self.setting.lines, self.setting.began, part), time.monotonic() + seconds
        waiting = deque(tasks)
        while (waiting or self.running) and time.monotonic() < end:
            while waiting and len(self.running) < at_once:
                self._started += 1
                # Verdicts of kernels' own checks are made anew, and nothing of a check stays on the machine: tasks one
                # after another share theirs, those side by side would only wait for one another.
                cache = None if part == KNOWS_THE_USERS else part if at_once == 1 else f"{part}-{self._started}"
                self.running.append(_Running(waiting.popleft(), self.setting, self._started, cache))
            time.sleep(TICK)
            self.listen()
            for running in list(self.running):
                rest = self._look_after(running)
                if rest is not None:
                    waiting.appendleft(rest)
        unfinished = [f"{running.task.name} ({running.at_hand or 'just begun'})" for running in self.running]
        self.stop()
        left = [*unfinished, *(task.name for task in waiting)]
        if left:
            record.write("left out", None, f"no time for {len(left)} of {len(tasks)} tasks", tasks=left)
        self.listen()

    def stop(self) -> None:
        """End whatever runs."""
        for running in self.running:
            running.kill()
        self.running.clear()

    def listen(self) -> None:
        """Take in new lines."""
        for line in self.lines.new():
            self.seen.append(line)
            self.setting.show(line)
            for running in self.running:
                if (running.task.part, running.task.name) == (line["part"], line["task"]):
                    running.heard = time.monotonic()
                    if "begun" in line:
                        running.at_hand, running.case = line["begun"], line["case"]

    def _look_after(self, running: _Running) -> Task | None:
        """Return what is left for another process, if this one has ended or was silent for too long."""
        code, task = running.process.poll(), running.task
        if code is None and time.monotonic() < running.heard + task.silence:
            return None
        if code is None:
            running.kill()
        self.listen()  # what it wrote last
        self.running.remove(running)
        if code not in (0, GO_ON_IN_A_NEW_ONE):
            record = Record(self.setting.lines, self.setting.began, task.part, task.name)
            reason = f"nothing came for {task.silence:g} s: ended" if code is None else how_it_ended(code)
            record.write(running.at_hand or task.name, False, reason, printed=running.last_words())
        if code == 0 or not task.resumes or running.case < task.first:
            return None
        return task._replace(first=running.case + 1)


def how_it_ended(code: int) -> str:
    """Say what an exit code that is not 0 means.

    >>> how_it_ended(-11)
    'the process was ended by SIGSEGV'
    """
    if code < 0:
        known = -code in set(signal.Signals)
        return f"the process was ended by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"the process ended with exit code {code}"


def die_with(parent: int) -> None:
    """Have the kernel end this process when ``parent``, which has started it, ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended before
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def started(command: list[str], environment: Mapping[str, str]) -> Iterator[IO[str]]:
    """Start a program that does not outlive this process, and yield what it prints."""
    parent = os.getpid()
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=lambda: die_with(parent),
    ) as process:
        assert process.stdout is not None
        yield process.stdout
