"""Part 2: every kernel's results beside the reference evaluated in float64 on the CPU, judged as the contract does.

An error may be twice that of the reference in the same dtype (on the CPU, where float32 is float32), or twice what the
truth moves by when its arguments move by a few roundings (a gradient may be the difference of large numbers, and one
evaluation lucky), plus what the contract allows: tf32 split in three, gradients weighed in 16 bits. Integers are
exact: those of the truth, or where two numbers are equal in the dtype, those of the reference in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomem_kernels.backends import self_check
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.operators import OPERATORS, PROBLEMS
from protomem_kernels.backends.self_check import outcome, placed
from protomem_kernels.gpu_check.device import backends, found, lost, stands_in, synchronize
from protomem_kernels.gpu_check.processes import Task
from protomem_kernels.gpu_check.records import Record
from protomem_kernels.ops.problems import drawn
from protomem_kernels.rows import accumulation_dtype

DTYPES = ("bfloat16", "float32", "float16", "float64")
SEEDS = (0, 1000, 2000)
# Beyond twice the reference's error, relative to 1 and the largest number of the truth: three of tf32 leave 2^-21 of
# each product; results and, in sums over samples or slots, weights are rounded to their dtype.
TINY = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5}
ROUNDINGS = 4  # by which arguments are moved; results are sums of some sixty terms
WEIGHED = {"negative_logsumexp": (3,)}  # results of forward passes that are such sums; all of a backward pass are


class Judgement(NamedTuple):
    """What is said of one result: its largest error, what the reference's was and what is allowed, or what is wrong."""

    error: float
    reference: float
    allowed: float
    wrong: str = ""


def tasks(checkout: Path) -> list[Task]:
    """Return one task per operator, backend and dtype; where a CPU stands in, a few of them."""
    operators = [name for name in OPERATORS if name in PROBLEMS]
    names = backends()
    if stands_in():
        triples = [(op, names[i % len(names)], DTYPES[i % len(DTYPES)]) for i, op in enumerate(operators[::3])]
    else:
        order = [(dtype, backend) for backend in names for dtype in DTYPES]
        triples = [
            (operator, backend, dtype)
            for dtype, backend in order
            for operator in operators
            if not _is_borrowed(backend, operator)
        ]
    return [Task("correctness", " ".join(triple), silence=90) for triple in triples]


def _is_borrowed(backend: str, operator: str) -> bool:
    """Say whether a backend's kernel for an operator is one of those before it, which is looked at as theirs."""
    kernel, before = BACKENDS[backend].kernel(operator), list(BACKENDS)[: list(BACKENDS).index(backend)]
    return kernel is not None and any(BACKENDS[name].kernel(operator) is kernel for name in before)


def run(record: Record, name: str, first: int, checkout: Path) -> None:
    """Judge an operator of a backend in a dtype, with several seeds; then have it check itself as it does in use."""
    operator, backend, kind = name.split()
    dtype, device = getattr(torch, kind), torch.device(found() or "cpu")
    kernel, definition = BACKENDS[backend].kernel(operator), BACKENDS["reference"].kernel(operator)
    if kernel is None or definition is None:
        return record.write(name, None, f"{backend} has no kernel for it")
    worst, problems, wrong = Judgement(0, 0, 0), 0, 0
    for seed in SEEDS[:1] if stands_in() else SEEDS:
        with drawn(seed):
            for number, args in enumerate(PROBLEMS[operator](dtype)):
                what = f"{name}, seed {seed}, problem {number}"
                record.begin(what)
                refused = BACKENDS[backend].refuses(operator, _tensors(placed(args, device)))
                if refused is not None:
                    return record.write(name, None, f"refused: {refused}")
                problems += 1
                try:
                    judgements = judge(kernel, definition, args, dtype, device, operator)
                except Exception as problem:
                    wrong += 1
                    record.write(what, False, f"{type(problem).__name__}: {problem}")
                    if lost():
                        return record.write(name, False, "the device is lost to this process")
                    continue
                bad = [f"result {index}: {j.wrong}" for index, j in enumerate(judgements) if j.wrong]
                wrong += bool(bad)
                worst = max(worst, *judgements, key=lambda j: j.error / max(j.allowed, 1e-300))
                record.write(what, not bad, "; ".join(bad), quiet=not bad, errors=[tuple(j[:3]) for j in judgements])
    said = f"{problems} problems, {wrong} wrong; worst error {worst.error:.2g}, allowed {worst.allowed:.2g}"
    record.write(name, wrong == 0, said, error=worst.error, allowed=worst.allowed, reference=worst.reference)
    if BACKENDS[backend].needs_check([torch.zeros(1, device=device)]):
        _check_itself(record, operator, backend, dtype)


def _check_itself(record: Record, operator: str, backend: str, dtype: torch.dtype) -> None:
    """Have the verdict made that the first call of this operator would wait for."""
    name, device = f"self-check of {operator} {backend} {str(dtype).removeprefix('torch.')}", torch.device("cuda", 0)
    kernel, definition = BACKENDS[backend].kernel(operator), BACKENDS["reference"].kernel(operator)
    assert kernel is not None
    assert definition is not None
    record.begin(name)
    reason = self_check.check(operator, kernel, definition, dtype, device)
    record.write(name, reason is None, reason or "ok", quiet=reason is None)


def judge(
    kernel: Any, definition: Any, args: Sequence[Any], dtype: torch.dtype, device: torch.device, operator: str
) -> list[Judgement]:
    """Run a problem through a kernel on the device, and judge everything that it returns or writes."""
    truth = outcome(definition, [_exact(arg) for arg in args])
    peer = outcome(definition, list(args))
    nudged = outcome(definition, _nudged(args, ROUNDINGS * torch.finfo(accumulation_dtype(dtype)).eps))
    with torch.no_grad():
        ours = outcome(kernel, placed(args, device))
        synchronize()
    if len(ours) != len(truth):
        return [Judgement(0, 0, 0, f"{len(ours)} results, not {len(truth)}")]
    return [
        _judge_one(a.cpu(), b, c, d, _tiny(operator, index, b.dtype, dtype))
        for index, (a, b, c, d) in enumerate(zip(ours, peer, truth, nudged, strict=True))
    ]


def _tiny(operator: str, index: int, kind: torch.dtype, dtype: torch.dtype) -> float:
    """Return what a result may be off by beyond its dtype's share, ``dtype`` being the memory's."""
    tiny = TINY[str(dtype).removeprefix("torch.")]
    if not kind.is_floating_point:
        return tiny
    weighed = operator.removesuffix("_").endswith("_backward") or index in WEIGHED.get(operator, ())
    narrowest = [kind, *([dtype] if weighed else [])]
    return max([tiny, *(2 * torch.finfo(each).eps for each in narrowest if each != torch.float64)])


def _judge_one(ours: Tensor, peer: Tensor, truth: Tensor, nudged: Tensor, tiny: float) -> Judgement:
    if ours.shape != peer.shape or ours.dtype != peer.dtype:
        came, wanted = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (ours, peer))
        return Judgement(0, 0, 0, f"is {came}, not {wanted}")
    if not ours.dtype.is_floating_point:
        off = int(((ours != truth) & (ours != peer)).sum())
        return Judgement(float(off), 0, 0, f"{off} of {ours.numel()} integers differ" if off else "")
    if not ours.numel():
        return Judgement(0, 0, 0)
    error, reference = _error(ours, truth), _error(peer, truth)
    scale = float(torch.where(torch.isfinite(truth), truth.abs(), 0).max())
    allowed = 2 * max(reference, _error(nudged, truth)) + tiny * (1 + scale)
    wrong = "" if error <= allowed else f"is off by {error:.3g}, {allowed:.3g} is allowed (its largest is {scale:.3g})"
    return Judgement(error, reference, allowed, wrong)


def _error(ours: Tensor, truth: Tensor) -> float:
    """Return the largest difference; infinity where one of the two is not finite and the other is another number."""
    a, b = ours.double(), truth.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0, (a - b).abs()).nan_to_num(nan=float("inf")).max())


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


def _nudged(args: Sequence[Any], eps: float) -> list[Any]:
    """Return arguments in float64, each number moved up, down or not at all."""
    generator = torch.Generator().manual_seed(0)
    exact = [_exact(arg) for arg in args]
    return [
        arg * (1 + eps * torch.randint(-1, 2, arg.shape, generator=generator))
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for arg in exact
    ]


def _exact(arg: Any) -> Any:
    return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg
