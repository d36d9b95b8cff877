"""Findings that wait to be mended. Empty when a branch is merged; a test says so."""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """A reason why findings do not count: those whose rule holds ``rule`` and whose text holds ``words``."""

    rule: str
    words: str
    reason: str


KNOWN: list[Known] = []


def why_known(rule: str, message: str) -> str | None:
    """Return the reason for which a finding is known, or None."""
    for known in KNOWN:
        if known.rule in rule and known.words in message:
            return known.reason
    return None
