"""The model of times: it gives published times, nothing is called measured, and the page is what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import predicted
from benchmarks.inputs import Size
from benchmarks.predicted import ENGINES, LIMIT, published

DOCS = Path(__file__).parents[2] / "docs"


def test_published_times_are_given_before_anything_is_claimed() -> None:
    found = published()
    assert len(found) == 5
    assert {one.what: round(one.off, 2) for one in found if abs(one.off) > LIMIT} == {}


@pytest.mark.parametrize(("name", "factor"), [("CUBLAS", 0.6), ("TRITON", 0.6), ("WARP_SPECIALISED", 1.5)])
def test_a_wrong_rate_is_noticed(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = getattr(predicted, name)
    monkeypatch.setattr(predicted, name, {arch: factor * share for arch, share in shares.items()})
    assert any(abs(one.off) > LIMIT for one in published())


def test_the_page_is_what_the_model_writes(tmp_path: Path) -> None:
    predicted.main(["--output", str(tmp_path)])
    assert (tmp_path / "predicted.md").read_text(encoding="utf-8") == (DOCS / "predicted.md").read_text(
        encoding="utf-8"
    )
    assert (tmp_path / "predicted.png").read_bytes()[:4] == b"\x89PNG"
    assert "Nothing here was measured by this package" in predicted.page()


@pytest.mark.parametrize("name", list(ENGINES))
def test_times_grow_with_every_size(name: str) -> None:
    engine, size = ENGINES[name], Size(512, 100_000, 128)
    wider = [] if name == "Liger" else [size._replace(D=512)]  # whose chunks grow with D
    for larger in (size._replace(B=2048), size._replace(M=1_000_000), *wider):
        assert engine(90, larger) > engine(90, size)


def test_launches_from_python_never_help() -> None:
    for size in predicted.SIZES:
        assert predicted.chunked(90, size, eager=True) >= predicted.chunked(90, size)
