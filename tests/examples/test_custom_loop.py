"""A few steps of the loop of one's own."""

from __future__ import annotations

import runpy

import pytest

from tests.examples.running import EXAMPLES


def test_it_trains_and_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    scope = runpy.run_path(str(EXAMPLES / "custom_loop.py"))
    assert 0.5 < scope["main"](steps=4) <= 1
    assert "identities in the memory" in capsys.readouterr().out
