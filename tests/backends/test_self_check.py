"""A GPU's kernels check themselves before they serve: here a backend stands in for one, with faults planted in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

import protomem_kernels as pmk
from protomem_kernels.backends import choice, self_check, verdicts
from protomem_kernels.backends.choice import BACKENDS, explain, use_backend
from protomem_kernels.backends.operators import OPERATORS, PROBLEMS
from protomem_kernels.backends.protocol import Backend
from protomem_kernels.ops import problems
from protomem_kernels.rows import accumulation_dtype
from tests.ops.cases import each_dtype, marks_of

CPU = torch.device("cpu")
REFERENCE = BACKENDS["reference"]


class StandIn(Backend):
    """The reference's kernels as a device's own, with a fault in some of them; counts what it is asked for."""

    def __init__(self, faults=None):
        super().__init__("stand-in")
        self.faults, self.calls = faults or {}, 0

    def find(self, operator):
        kernel, fault = REFERENCE.kernel(operator), self.faults.get(operator)

        def run(*args):
            self.calls += 1
            return kernel(*args) if fault is None else fault(kernel, *args)

        return run

    def needs_check(self, tensors):
        return True


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOMEM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PROTOMEM_SELF_CHECK", raising=False)
    self_check.forget()
    yield tmp_path / "cache"
    self_check.forget()


@pytest.fixture
def install(monkeypatch):
    def put_first(**faults):
        backend = StandIn(faults)
        monkeypatch.setitem(BACKENDS, "stand-in", backend)
        for order in ("_IN_ORDER", "_TRITON_FIRST"):
            rest = [name for name in getattr(choice, order) if name != "stand-in"]
            monkeypatch.setattr(choice, order, ("stand-in", *rest))
        return backend

    return put_first


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(50, 8)).to(dtype)
    return torch.randn(6, 8), w, torch.tensor([3, 4, -1, 6, 6, 40])


def changed(place, change):
    def fault(kernel, *args):
        results = list(kernel(*args))
        results[place] = change(results[place])
        return tuple(results)

    return fault


class CompilationError(Exception):
    """What Triton's compiler raises bears this name."""


def broken(error):
    def fault(kernel, *args):
        raise error

    return fault


def hanging(kernel, *args):
    time.sleep(30)


def with_nan(x):
    x = x.clone()
    x[-1] = torch.nan
    return x


# Fault, operator and what is said of it.
FAULTS = {
    "wrong value": (changed(1, lambda n: n * 1.01), "negative_logsumexp", r"result 1 is off by [\d.]+, its largest"),
    "one wrong entry": (changed(3, lambda o: o + 0.01 * (o == o.max())), "negative_logsumexp", "result 3 is off by"),
    "NaN": (changed(0, with_nan), "negative_logsumexp", "result 0 is not finite where it should be"),
    "zero for infinity": (changed(1, lambda n: n.nan_to_num(0, 0, 0)), "negative_logsumexp", "result 1 is not finite"),
    "infinity lost": (changed(1, torch.zeros_like), "negative_logsumexp", "result 1 is"),
    "wrong index": (changed(1, lambda s: s + (s == s.max())), "hardest_negatives", r"result 1 differs in \d+ of \d+"),
    "wrong shape": (changed(0, lambda c: c[:, :1]), "hardest_negatives", r"result 0 is torch.float32 \(1, 1\), not"),
    "exception": (broken(RuntimeError("misaligned address")), "hardest_negatives", "raised RuntimeError: misaligned"),
    "compile error": (broken(CompilationError("at 3:7")), "hardest_negatives", "raised CompilationError: at 3:7"),
    "hang": (hanging, "hardest_negatives", "did not end within 0.5 s"),
}
each_fault = pytest.mark.parametrize(("fault", "operator", "words"), FAULTS.values(), ids=FAULTS)


def call(operator):
    e, w, targets = tensors()
    if operator == "hardest_negatives":
        return pmk.hardest_negatives(e, w, targets, k=4).slots
    return pmk.margin_softmax_loss(e, w, targets)


@each_fault
def test_a_fault_is_found_said_once_and_passed_over(fault, operator, words, install, monkeypatch):
    monkeypatch.setattr(self_check, "SECONDS", 0.5)
    with use_backend("reference"):
        right = call(operator)
    install(**{operator: fault})
    with pytest.warns(UserWarning, match=rf"backend 'stand-in' is passed over for {operator} on cpu: .*{words}"):
        assert torch.allclose(call(operator), right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(call(operator), right)
    _, w, _ = tensors()
    reasons = {line.backend: line for line in explain(operator, w, w)}
    assert words.split()[0] in str(reasons["stand-in"])
    assert not reasons["stand-in"].chosen
    with use_backend("stand-in"), pytest.raises(RuntimeError, match=rf"cannot serve {operator}(.|\n)*{words}"):
        call(operator)


def test_what_computes_right_serves_and_is_checked_once(install):
    backend = install()
    e, w, targets = tensors()
    for _ in range(3):
        pmk.margin_softmax_loss(e.requires_grad_(), w.requires_grad_(), targets).backward()
    with pmk.use_backend("reference"):
        want = pmk.margin_softmax_loss(e, w, targets)
    assert torch.equal(pmk.margin_softmax_loss(e, w, targets), want)
    checks = sum(
        len(list(PROBLEMS[name](torch.float32))) for name in ("negative_logsumexp", "negative_logsumexp_backward_")
    )
    assert backend.calls == checks + 2 * 3 + 1
    assert next(line for line in explain("margin_softmax_loss", w) if line.backend == "stand-in").chosen


def test_a_verdict_outlives_the_process(install, cache, monkeypatch):
    install(hardest_negatives=broken(RuntimeError("once")))
    with pytest.warns(UserWarning, match="once"):
        call("hardest_negatives")
    call("negative_logsumexp")
    self_check.forget()  # as a new process does
    backend = install(hardest_negatives=broken(AssertionError("must not run")))
    with pytest.warns(UserWarning, match="in the self-check it raised RuntimeError: once"):
        call("hardest_negatives")
    call("negative_logsumexp")
    assert backend.calls == 1
    by_name = {(v.backend, v.operator, v.dtype): v.reason for v in verdicts.remembered(CPU)}
    assert by_name["stand-in", "negative_logsumexp", "float32"] is None
    assert "once" in by_name["stand-in", "hardest_negatives", "float32"]
    # Whatever the verdict depends on changes, and it is checked again.
    self_check.forget()
    conditions = dict(verdicts.conditions(CPU))
    monkeypatch.setattr(verdicts, "conditions", lambda device: conditions | {"driver": "another"})
    backend = install()
    call("hardest_negatives")
    assert backend.calls > 1


def test_a_check_that_takes_its_process_along_is_a_verdict(install, cache):
    code = """
import os, torch
from tests.backends import test_self_check as t
from protomem_kernels.backends import self_check, verdicts
with verdicts.noted_as_begun("stand-in", "hardest_negatives", torch.float32, t.CPU):
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ)
    assert done.returncode == -9
    backend = install()
    with pytest.warns(UserWarning, match="ended in the middle of the check"):
        call("hardest_negatives")
    assert backend.calls == 0


def test_a_check_that_another_process_is_at_is_made_here_too(install, cache):
    backend = install()
    with verdicts.noted_as_begun("stand-in", "hardest_negatives", torch.float32, CPU):
        call("hardest_negatives")
    assert backend.calls > 1


@pytest.mark.parametrize("content", ["", "[]", '{"verdicts": 3}', '{"verdicts": {"a": '])
def test_a_file_that_is_not_whole_is_checked_again(content, install, cache):
    install()
    call("hardest_negatives")
    (file,) = (cache / "self_check").glob("*.json")
    file.write_text(content)
    self_check.forget()
    backend = install()
    call("hardest_negatives")
    assert backend.calls > 1
    assert verdicts.remembered(CPU)


def test_where_nothing_can_be_written_verdicts_last_as_long_as_the_process(install, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROTOMEM_CACHE_DIR", str(tmp_path / "file"))
    backend = install()
    call("hardest_negatives")
    calls = backend.calls
    call("hardest_negatives")
    assert backend.calls == calls + 1
    assert verdicts.remembered(CPU) == []


def test_while_a_graph_is_captured_only_what_was_checked_before_serves(install, monkeypatch):
    backend = install()
    call("negative_logsumexp")
    monkeypatch.setattr(self_check, "capturing", lambda device: True)
    calls = backend.calls
    call("negative_logsumexp")
    assert backend.calls == calls + 1
    call("hardest_negatives")
    assert backend.calls == calls + 1
    with use_backend("stand-in"), pytest.raises(RuntimeError, match="cannot serve hardest_negatives"):
        call("hardest_negatives")
    self_check.forget()  # on disk it is known, and reading is no work for the device
    call("negative_logsumexp")
    assert backend.calls == calls + 2


def test_the_switch(install, monkeypatch):
    monkeypatch.setenv("PROTOMEM_SELF_CHECK", "0")
    install(hardest_negatives=changed(1, lambda s: s + 1))
    wrong = call("hardest_negatives")
    with use_backend("reference"):
        assert torch.equal(wrong, call("hardest_negatives") + 1)
    monkeypatch.setenv("PROTOMEM_SELF_CHECK", "fail")
    for _ in range(2):  # not the first time alone
        with pytest.raises(RuntimeError, match="backend 'stand-in' is passed over for hardest_negatives on cpu"):
            call("hardest_negatives")
    self_check.forget()
    monkeypatch.setenv("PROTOMEM_SELF_CHECK", "yes")
    with pytest.raises(ValueError, match="PROTOMEM_SELF_CHECK must be one of 0, 1, fail, got 'yes'"):
        call("hardest_negatives")


def test_every_operator_and_dtype_has_problems():
    for operator in OPERATORS:
        for dtype in self_check.TOLERANCE:
            for args in PROBLEMS[operator](dtype):
                floating = [arg for arg in args if isinstance(arg, torch.Tensor)]
                given = accumulation_dtype(dtype) if operator == "reduce_losses" else dtype  # it never meets a memory
                assert self_check.narrowest(floating) == given


@each_dtype
@pytest.mark.parametrize("seed", [0, 1000])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=marks_of(name)) for name in ("cpu", "triton") if BACKENDS[name].unavailable() is None],
)
def test_no_false_alarm(backend, operator, seed, dtype):
    if backend == "triton" and seed:
        pytest.skip("once is enough for the interpreter")
    if BACKENDS[backend].kernel(operator) is None:
        pytest.skip("has no kernel for it: tests/ops/test_another_operator.py")
    kernels = BACKENDS[backend].kernel(operator), REFERENCE.kernel(operator)
    with problems.drawn(seed):
        assert self_check.check(operator, *kernels, dtype, CPU) is None


def test_each_dtype_has_a_verdict_of_its_own_and_threads_share_it(install):
    backend, made = install(), []
    for dtype in (torch.float32, torch.bfloat16):
        e, w, targets = tensors(dtype)
        pmk.hardest_negatives(e, w, targets, k=2)
    made = {v.dtype for v in verdicts.remembered(CPU)}
    assert made == {"float32", "bfloat16"}
    calls = backend.calls
    thread = threading.Thread(target=lambda: pmk.hardest_negatives(*tensors(), k=2))
    thread.start()
    thread.join()
    assert backend.calls == calls + 1


def test_warm_up_checks_all_that_a_step_needs_and_moves_nothing(install):
    backend = install()
    generator = torch.Generator().manual_seed(3)
    loss_fn = pmk.PrototypeMemoryLoss(
        8, 20, margin=pmk.ElasticFace(generator=generator), mining=pmk.CurricularFace(), prototype_gradient="fresh"
    )
    loss_fn(torch.randn(4, 8), torch.tensor([5, 6, 5, 7]))
    self_check.forget()
    before = {key: value.clone() for key, value in loss_fn.state_dict().items()}
    pmk.warm_up(loss_fn, batch_size=6)
    assert all(torch.equal(before[key], value) for key, value in loss_fn.state_dict().items())
    calls = backend.calls
    e = torch.randn(6, 8, requires_grad=True)
    loss_fn(e, torch.arange(6)).backward()
    assert 0 < backend.calls - calls < 12  # no check among them
    head = pmk.MarginSoftmaxLoss(9, 8)
    pmk.warm_up(head, 3)
    assert head.weight.grad is None
    with pytest.raises(TypeError, match="loss_fn must be a PrototypeMemoryLoss or MarginSoftmaxLoss, got Linear"):
        pmk.warm_up(torch.nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        pmk.warm_up(head, 0)


NOTES = """
import sys, torch
from protomem_kernels.backends import verdicts
device = torch.device("cpu")
for number in range(40):
    with verdicts.noted_as_begun("stand-in", f"{sys.argv[1]}-{number}", torch.float32, device):
        pass
    verdicts.keep("stand-in", f"{sys.argv[1]}-{number}", torch.float32, device, None)
"""


def test_processes_that_write_at_once_lose_no_verdict(cache):
    """As the ranks of one machine do at their first step; a note that a check ended, lost, would read as a crash."""
    at_once = [subprocess.Popen([sys.executable, "-c", NOTES, name]) for name in "abc"]
    assert [process.wait() for process in at_once] == [0, 0, 0]
    assert len(verdicts.remembered(CPU)) == 120
    (file,) = cache.rglob("*.json")
    assert json.loads(file.read_text())["begun"] == {}
