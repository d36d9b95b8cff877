"""The device checks itself: a kernel's first use on a GPU runs small fixed problems beside the reference.

No silent wrong number: a kernel that differs from the definition, breaks, does not compile or does not end is not used;
the next backend serves, after one warning. A verdict holds for a backend, an operator, a dtype and a device, is kept
for the process and on disk (``verdicts``), and costs a look-up of a dictionary afterwards.

``PROTOMEM_SELF_CHECK``: "1" (default), "0" switches the check off, "fail" raises instead of passing a backend over.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from protomem_kernels._switches import value_of
from protomem_kernels._warnings import warn_caller
from protomem_kernels.backends import verdicts
from protomem_kernels.backends.operators import PROBLEMS
from protomem_kernels.backends.precision import HIGHEST, matmul_precision
from protomem_kernels.backends.protocol import Backend, Kernel
from protomem_kernels.backends.verdicts import Verdict

SECONDS = 600.0  # for all problems of one verdict: compilers are slow, hanging kernels take for ever
# How far results may lie from the reference's, relative to the largest number of theirs. Kernels sum in other orders,
# split float32 products into three of tf32, and weigh gradients in 16 bits beside a memory of 16 bits.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
NOT_YET = "it has not been checked on this device, and a CUDA graph is being captured: call pmk.warm_up before"

# (backend, operator, device, dtypes of the call's tensors) -> why the kernel must not serve such calls, or None.
_settled: dict[tuple[Any, ...], str | None] = {}
_known: dict[tuple[str, str, torch.dtype, torch.device], Verdict] = {}
_dtype = attrgetter("dtype")


def objection(
    backend: Backend, operator: str, kernel: Kernel, reference: Kernel, tensors: Sequence[Tensor]
) -> str | None:
    """Return why a kernel must not serve these tensors, or None. Its first such call checks it."""
    key = (backend.name, operator, tensors[0].device, *map(_dtype, tensors))
    try:
        return _settled[key]
    except KeyError:
        pass
    mode = value_of("PROTOMEM_SELF_CHECK")
    if mode == "0" or operator not in PROBLEMS:
        return None
    dtype, device = narrowest(tensors), tensors[0].device
    verdict = _known.get((backend.name, operator, dtype, device))
    if verdict is None:
        verdict = verdicts.recall(backend.name, operator, dtype, device)
        if verdict is None:
            if capturing(device):
                return NOT_YET
            with verdicts.noted_as_begun(backend.name, operator, dtype, device):
                reason = check(operator, kernel, reference, dtype, device)
            verdict = verdicts.keep(backend.name, operator, dtype, device, reason)
        _known[backend.name, operator, dtype, device] = verdict
        if verdict.reason is not None and mode != "fail":
            warn_caller(_passed_over(verdict))
    if verdict.reason is not None and mode == "fail":
        raise RuntimeError(_passed_over(verdict))
    _settled[key] = verdict.reason
    return verdict.reason


def _passed_over(verdict: Verdict) -> str:
    return f"backend {verdict.backend!r} is passed over for {verdict.operator} on {verdict.device}: {verdict.reason}"


def known_objection(backend: Backend, operator: str, tensors: Sequence[Tensor]) -> str | None:
    """Return what is known against a kernel for such tensors, or None; checks nothing."""
    if not tensors or not backend.needs_check(tensors):
        return None
    dtype, device = narrowest(tensors), tensors[0].device
    verdict = _known.get((backend.name, operator, dtype, device))
    verdict = verdict or verdicts.recall(backend.name, operator, dtype, device)
    return None if verdict is None else verdict.reason


def forget() -> None:
    """Forget what this process knows; what is on disk stays."""
    _settled.clear()
    _known.clear()


def narrowest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that decides how a kernel computes: the narrowest of the floating tensors."""
    dtypes = [tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point]
    return min(dtypes, key=lambda dtype: dtype.itemsize) if dtypes else torch.float32


def capturing(device: torch.device) -> bool:
    """Say whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check(operator: str, kernel: Kernel, reference: Kernel, dtype: torch.dtype, device: torch.device) -> str | None:
    """Run the operator's problems through both kernels; return what is wrong with the first one, or None.

    Whatever the kernel does is a verdict: wrong numbers, an exception (of a compiler too), or not to end.
    """
    said: list[str | None] = []

    def run() -> None:
        try:
            with torch.no_grad(), matmul_precision(HIGHEST), _on(device):
                for number, args in enumerate(PROBLEMS[operator](dtype)):
                    there = placed(args, device)
                    wanted, got = outcome(reference, there), outcome(kernel, there)
                    wrong = difference(got, wanted, dtype)
                    if wrong is not None:
                        said.append(f"in problem {number} of the self-check {wrong}")
                        return
            said.append(None)
        except Exception as problem:
            said.append(f"in the self-check it raised {type(problem).__name__}: {str(problem)[:500]}")

    thread = threading.Thread(target=run, name="protomem self-check", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return said[0] if said else f"in the self-check it did not end within {SECONDS:g} s"


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Return how results differ from the wanted ones beyond the rounding of ``dtype``, or None."""
    for place, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"result {place} is {ours.dtype} {tuple(ours.shape)}, not {theirs.dtype} {tuple(theirs.shape)}"
        if not ours.dtype.is_floating_point:
            if not torch.equal(ours, theirs):
                return f"result {place} differs in {int((ours != theirs).sum())} of {ours.numel()} integers"
            continue
        a, b = ours.double(), theirs.double()
        finite = torch.isfinite(b)
        alike = torch.where(finite, torch.isfinite(a), (a == b) | (a.isnan() & b.isnan()))
        if not bool(alike.all()):
            return f"result {place} is not finite where it should be, or the other way round"
        if bool(finite.any()):
            error, scale = float((a - b)[finite].abs().max()), float(b[finite].abs().max())
            if error > TOLERANCE[dtype] * max(scale, 1e-3):
                return f"result {place} is off by {error:.3g}, its largest number being {scale:.3g}"
    return None


def placed(args: Sequence[Any], device: torch.device) -> list[Any]:
    """Return a problem's arguments on the device."""
    return [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]


def outcome(kernel: Kernel, args: Sequence[Any]) -> list[Tensor]:
    """Return what a kernel returns and what it leaves in its arguments, copies of them."""
    copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    results = kernel(*copies)
    results = () if results is None else (results,) if isinstance(results, Tensor) else results
    return [*results, *(copy for copy in copies if isinstance(copy, Tensor))]


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Run on the device, and wait for it; it may be waited for, whatever the caller's debug mode says."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        with torch.cuda.device(device):
            yield
            torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
