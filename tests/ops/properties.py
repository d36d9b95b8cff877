"""Hypothesis; where it is not installed, stand-ins by which the tests that need it are skipped, and no others.

A bare machine with a GPU runs these suites too (``protomem gpu-check``).
"""

from __future__ import annotations

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
except ImportError:
    import unittest
    from typing import Any

    import pytest

    REASON = "needs hypothesis, which is not installed"

    class Anything:
        """A strategy, and whatever is made of it."""

        def __getattr__(self, name: str) -> Anything:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Anything:
            return self

    def unchanged(*args: Any, **kwargs: Any) -> Any:
        return lambda function: function

    def given(*args: Any, **kwargs: Any) -> Any:
        return pytest.mark.skip(reason=REASON)

    class RuleBasedStateMachine:  # type: ignore[no-redef]
        """Every machine has a test case of its own, which is skipped."""

        def __init_subclass__(cls) -> None:
            cls.TestCase = type("TestCase", (unittest.TestCase,), {"runTest": lambda case: case.skipTest(REASON)})

    st = Anything()
    settings = initialize = invariant = precondition = rule = unchanged

__all__ = ["RuleBasedStateMachine", "given", "initialize", "invariant", "precondition", "rule", "settings", "st"]
