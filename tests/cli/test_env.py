"""``protomem env`` shows what is here, and notices an operator that computes something else."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import protomem_kernels as pmk
import protomem_kernels.cli as cli
from protomem_kernels.backends import reference
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.protocol import Backend
from protomem_kernels.cli import env
from protomem_kernels.cli.app import app
from protomem_kernels.cli.env import CHECKS

PUBLIC = ["aggregate_prototypes", "enqueue_", "hardest_negatives", "margin_softmax_logits", "margin_softmax_loss"]


def run(backend: str | None = None) -> Any:
    with contextlib.nullcontext() if backend is None else pmk.use_backend(backend):
        return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["env"])


def test_shows_versions_backends_and_checks_every_operator() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert sorted(CHECKS) == PUBLIC
    for word in (pmk.__version__, torch.__version__, *PUBLIC, *BACKENDS):
        assert word in result.output
    assert result.output.count("ok") >= len(PUBLIC)
    for name, backend in BACKENDS.items():
        reason = backend.unavailable()
        assert reason is None or reason[:20] in result.output, name


def test_a_narrow_terminal_and_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "a reason that is long " * 8 + "and has an end"
    monkeypatch.setattr(Backend, "unavailable", lambda self: reason)
    monkeypatch.setattr(env, "_self_check", lambda: ([("an_operator", "cpu", "reference", "0.1", "ok")], 0))
    narrow = CliRunner(env={"COLUMNS": "60"}).invoke(app, ["env"]).stdout
    assert max(map(len, narrow.splitlines())) <= 60
    assert reason in " ".join(narrow.split())
    monkeypatch.delenv("COLUMNS", raising=False)
    assert reason in CliRunner().invoke(app, ["env"]).stdout


@pytest.mark.parametrize("operator", ["negative_logsumexp", "enqueue_", "hardest_negatives"])
def test_a_wrong_operator_ends_with_exit_code_1(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Any:
        first, *rest = reference.BACKEND.kernels[operator](*args)
        if operator == "enqueue_":
            args[0].neg_()
        return (first * 0.9 if first.is_floating_point() else first, *rest)

    monkeypatch.setitem(BACKENDS, "reference", Backend("reference", {**reference.BACKEND.kernels, operator: wrong}))
    result = run("reference")
    assert result.exit_code == 1
    assert "wrong by" in result.output


def test_the_same_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert told["versions"]["torch"] == torch.__version__
    reasons = {name: backend.unavailable() for name, backend in BACKENDS.items()}
    assert {row["backend"]: row["available"] for row in told["backends"]} == {n: not why for n, why in reasons.items()}
    assert all(row["ms"] > 0 for row in told["self_check"])
    assert [row["result"] for row in told["self_check"] if row["device"] == "cpu"] == ["ok"] * len(CHECKS)
    assert told["failed"] == 0
    monkeypatch.setattr(cli, "find_spec", lambda name: None)  # nothing but torch
    monkeypatch.setattr(sys, "argv", ["protomem", "env", "--json"])
    cli.main()
    assert json.loads(capsys.readouterr().out).keys() == told.keys()


def test_an_operator_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ArithmeticError("no luck today")

    kernels = {**reference.BACKEND.kernels, "aggregate_prototypes": broken}
    monkeypatch.setitem(BACKENDS, "reference", Backend("reference", kernels))
    result = run("reference")
    assert result.exit_code == 1
    assert "no luck today" in result.output
