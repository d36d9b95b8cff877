"""The file that a check writes as it goes: a JSON object a line, appended whole by whichever process found it.

Whatever is written is rid of paths and of the names of the machine and its user. In the end the lines become one JSON.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protomem_kernels._files import written_whole

LONGEST = 2000  # characters of a text: the end of it, where errors stand
FORMAT = {"format": "protomem-gpu-check", "version": 2}
# An absolute path: its last part says enough. Not after a letter or a dot, where a slash is a relative path or "per".
_PATH = re.compile(r"(?<![\w.\-/)\]])~?/(?:[^\s/:'\"<>|()\[\],;]+/)+(?=[^\s/:'\"<>|()\[\],;]*)")
_HOME = re.compile(r"/(?:home|Users)/[^\s/:'\"<>|()\[\],;]+")
_COMMON = {"", "root", "user", "localhost", "none"}


def _names() -> list[str]:
    """Return what this machine and its user are called, where that tells them from others."""
    names = [platform.node(), platform.node().split(".")[0]]
    with contextlib.suppress(KeyError, OSError):  # a user may have no name
        names.append(getpass.getuser())
    return [name for name in names if name.lower() not in _COMMON]


def without_names(value: Any) -> Any:
    """Return a value for JSON: texts without paths and names, numbers that JSON has no word for as texts.

    >>> without_names("/home/me/torch/nn/linear.py:3: at 3.2 TB/s, tests/gpu/test_steps.py")
    'linear.py:3: at 3.2 TB/s, tests/gpu/test_steps.py'
    """
    if isinstance(value, dict):
        return {without_names(str(key)): without_names(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_names(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    text = _PATH.sub("", _HOME.sub("", str(value)))[-LONGEST:]
    for name in _names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
    return text


class Record:
    """Where a process writes what a task of a part finds.

    Args:
        file: the lines.
        began: when the check began, in seconds of ``time.time``.
        part: of the check.
        task: of the part; "" for the part itself.
    """

    def __init__(self, file: Path, began: float, part: str, task: str = "") -> None:
        self.file, self.began, self.part, self.task = file, began, part, task

    def begin(self, what: str, case: int = 0) -> None:
        """Note what is at hand, so that it is known if it takes the process along."""
        self._append({"begun": what, "case": case})

    def write(self, what: str, ok: bool | None, said: str = "", *, quiet: bool = False, **figures: Any) -> None:
        """Note a result.

        Args:
            what: was looked at.
            ok: True or False where there is a right and a wrong, None for a figure and for what was left out.
            said: in words.
            quiet: not for the terminal.
            figures: anything else that JSON has a word for.
        """
        self._append({"what": what, "ok": ok, "said": said, **({"quiet": True} if quiet else {}), **figures})

    def _append(self, content: dict[str, Any]) -> None:
        at = round(time.time() - self.began, 2)
        line = without_names({"part": self.part, "task": self.task, "at": at, **content})
        handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:  # one write: lines of several processes stay whole. On disk at once: a GPU may take the machine along.
            os.write(handle, (json.dumps(line) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)


class Lines:
    """The lines of a file as they come.

    Args:
        file: need not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._read = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield what was appended since the last call; a line that is still being written comes the next time."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield json.loads(line)


def shown(line: dict[str, Any]) -> str | None:
    """Return a line for the terminal, or None."""
    if "what" not in line or line.get("quiet"):
        return None
    mark = {True: "ok", False: "WRONG", None: ""}[line["ok"]]
    return f"{line['at']:7.1f} s  {line['part']:<11} {mark:<5} {line['what']}: {' '.join(line['said'].split())[:160]}"


def merged(lines: list[dict[str, Any]], complete: bool) -> dict[str, Any]:
    """Return the one JSON: results by part, what was wrong, whether the check came to its end."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "what" in line:
            kept = {key: value for key, value in line.items() if key not in ("part", "quiet")}
            parts.setdefault(line["part"], []).append(kept)
    wrong = [f"{line['part']}: {line['what']}: {line['said']}" for line in lines if line.get("ok") is False]
    return {**FORMAT, "complete": complete, "seconds": lines[-1]["at"] if lines else 0, "wrong": wrong, "parts": parts}


def write_whole(file: Path, content: dict[str, Any]) -> None:
    """Write JSON so that whoever reads the file finds the old one or the new one."""
    with written_whole(file) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
