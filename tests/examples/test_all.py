"""Each example has a test, says how it is run and what comes out, and stands in the table of examples."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.examples.running import EXAMPLES

FILES = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))


@pytest.mark.parametrize("example", FILES, ids=lambda path: path.name)
def test_it_has_a_test_and_stands_in_the_table(example: Path) -> None:
    assert (Path(__file__).parent / f"test_{example.stem}.py").exists()
    assert f"]({example.name})" in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize("example", [path for path in FILES if path.suffix == ".py"], ids=lambda path: path.name)
def test_it_says_what_a_user_wants_to_know(example: Path) -> None:
    said = ast.get_docstring(ast.parse(example.read_text())) or ""
    assert f"examples/{example.name}" in said  # how it is run
    for part in ("Shows: ", "Needs: ", "Takes: ", "Prints: "):
        assert f"\n{part}" in said, part
