"""The notebook runs, and says what it says in the checkout."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from tests.examples.running import EXAMPLES, ROOT

EXACT = ("identities", "occupancy", "pixels")
# Sums of float32 come out otherwise on another processor, and training carries that on.
NEAR = {"accuracy": 0.05, "auc": 0.04, "first loss": 0.05, "largest loss": 2.0, "last loss": 0.1}


def figures(notebook: Any) -> dict[str, float]:
    """Return the figures of the cell that has that tag."""
    (cell,) = (cell for cell in notebook.cells if "figures" in cell.metadata.get("tags", []))
    (output,) = cell.outputs
    return json.loads(output.text)


def test_it_runs_to_the_figures_that_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's own
        nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
        pytest.importorskip("ipykernel")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        shown = nbformat.read(EXAMPLES / "quick_start.ipynb", as_version=4)
        again = nbformat.from_dict(shown)
        nbclient.NotebookClient(again, timeout=600, startup_timeout=300, kernel_name="python3").execute()
    expected, found = figures(shown), figures(again)
    assert expected.keys() == found.keys() == {*EXACT, *NEAR}
    assert {name: found[name] for name in EXACT} == {name: expected[name] for name in EXACT}
    for name, tolerance in NEAR.items():
        assert found[name] == pytest.approx(expected[name], abs=tolerance), name


def test_the_outputs_in_the_checkout_are_small_and_whole() -> None:
    written = (EXAMPLES / "quick_start.ipynb").read_text()
    cells = [cell for cell in json.loads(written)["cells"] if cell["cell_type"] == "code"]
    assert len(written) < 150_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # run once, from the top
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) == 3
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert "/home/" not in written
    assert "/tmp/" not in written
