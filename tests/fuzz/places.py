"""Where a case is served: each backend that is available, each instruction set, each way into an operator."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import protomem_kernels as pmk
from protomem_kernels.backends import cpu
from tests.fuzz.draw import Draw
from tests.ops.cases import AVAILABLE, interpreted

WANTED = "PROTOMEM_FUZZ_BACKEND"  # what --backend sets, for the processes of a run
SETTINGS = ("TRITON_INTERPRET", "PROTOMEM_CUDA_HOST_BACKEND")  # which make backends available on the CPU


class Watching(TorchDispatchMode):
    """A mode that changes nothing: with it operators go through PyTorch's dispatcher."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}))


def instruction_sets() -> list[str]:
    return [] if cpu.OBJECT is None else list(cpu.OBJECT.capabilities())


@contextlib.contextmanager
def somewhere(draw: Draw) -> Iterator[str]:
    """Have one backend serve, drawn of those available; with it an instruction set, threads and a way in."""
    chance = draw.apart("places")
    name = os.environ.get(WANTED) or chance.choice(AVAILABLE)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pmk.use_backend(name))
        shown = name
        if name == "cpu" and cpu.OBJECT is not None:
            chosen, before = chance.choice(instruction_sets()), cpu.OBJECT.capability()
            cpu.OBJECT.set_capability(chosen)
            stack.callback(cpu.OBJECT.set_capability, before)
            shown = f"cpu with {chosen}"
        threads = torch.get_num_threads()
        torch.set_num_threads(chance.choice((1, 1, 1, 2, 3)))
        stack.callback(torch.set_num_threads, threads)
        if chance.random() < 0.2:
            stack.enter_context(Watching())
            shown += ", by the dispatcher"
        draw.note(backend=shown, threads=torch.get_num_threads())
        yield name


def observing(draw: Draw) -> contextlib.AbstractContextManager[None]:
    """Return a mode in which nothing is differentiated."""
    return draw.pick(torch.no_grad, torch.inference_mode, contextlib.nullcontext)()


def again(subject: str, seed: int) -> str:
    """Return the command that runs a case once more."""
    settings = "".join(f"{name}={os.environ[name]} " for name in SETTINGS if name in os.environ)
    backend = f" --backend {os.environ[WANTED]}" if os.environ.get(WANTED) else ""
    return f"{settings}python -m tests.fuzz --seed {seed} --only {subject}{backend}"


def small(name: str) -> bool:
    """Say whether the backend is slow here, so that a case had better be small."""
    return interpreted(name)
