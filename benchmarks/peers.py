"""Whom we are measured against: every peer is the same function of the same inputs.

``loss(embeddings (B, D), weight, targets (B,)) -> mean loss``, ArcFace with m = 0.5 and s = 64 where the peer knows a
margin. Prototypes are unit rows already; peers that normalise them again do so because that is what they are. A peer
that is not installed, or cannot serve a size, says so in one line: ``Peer.refusal``.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import protomem_kernels as pmk
from benchmarks.inputs import Problem, Size
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.mining import MiningRule

MARGIN, SCALE = 0.5, 64.0
TILES = {"cpu": 1024, "cuda": 16_384}  # slots per product in G: what stays in cache, and what fills a GPU
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
WHATS = ("forward", "embeddings' gradient", "prototypes' gradient")  # each includes the ones before it


def tiled_product(x: Tensor, w: Tensor) -> None:
    """Run G, the unit: the matrix product (B, M) of the inputs, tile by tile into one small buffer."""
    tile = TILES.get(x.device.type, TILES["cuda"])
    out = x.new_empty(x.shape[0], tile)
    for rows in w.split(tile):
        torch.mm(x, rows.T, out=out[:, : rows.shape[0]])
    synchronize(x)


def synchronize(tensor: Tensor) -> None:
    """Wait until everything before this call is done; a CPU is never ahead."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


# --- The peers' losses -----------------------------------------------------------------------------------------------


def add_margin(cosine: Tensor) -> Tensor:
    """Return ArcFace's cos(theta + m), or c - m sin m where theta + m would pass pi."""
    sine = (1 - cosine**2).clamp(min=1e-12).sqrt()
    shifted = cosine * math.cos(MARGIN) - sine * math.sin(MARGIN)
    return torch.where(cosine > -math.cos(MARGIN), shifted, cosine - MARGIN * math.sin(MARGIN))


def eager(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """ArcFace as one writes it in PyTorch: the (B, M) cosines, the margin scattered in, cross_entropy."""
    cosine = functional.normalize(x) @ w.T
    target = cosine.gather(1, targets[:, None])
    return functional.cross_entropy(SCALE * cosine.scatter(1, targets[:, None], add_margin(target)), targets)


@functools.cache
def _compiled() -> Loss:
    return torch.compile(eager, dynamic=False)


def compiled(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """The same code through torch.compile, compiled for each size (call ``torch.compiler.reset`` between them)."""
    return _compiled()(x, w, targets)


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own linear + cross-entropy as it comes; it knows no margin: plain scaled softmax.

    Its chunked mode (``options=LinearCrossEntropyOptions()``) takes little memory, and on a CPU ten times as long.
    """
    return functional.linear_cross_entropy(SCALE * functional.normalize(x), w, targets)


def metric_learning(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """ArcFaceLoss of pytorch-metric-learning, with ``w`` (D, M) as its weights."""
    head = _arcface_loss(w.shape[0])
    head.W, head.num_classes = w, w.shape[1]
    return head(x, targets)


@functools.cache
def _arcface_loss(dim: int) -> Any:
    losses = import_module("pytorch_metric_learning.losses")
    head = losses.ArcFaceLoss(num_classes=1, embedding_size=dim, margin=math.degrees(MARGIN), scale=SCALE)
    del head.W  # ours take its place without a copy
    return head


def cut_cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """cut-cross-entropy; no margin: plain scaled softmax. Its own kernels take 16-bit tensors on a GPU; elsewhere it is
    ``impl="torch_compile"``, which runs everywhere.

    It asks for triton (a gigabyte on disk, never used on a CPU), so it is no dependency of the ``bench`` extra:
    ``pip install --no-deps cut-cross-entropy triton``.
    """
    function = import_module("cut_cross_entropy").linear_cross_entropy
    impl = "cce" if x.is_cuda and x.dtype.itemsize == 2 else "torch_compile"
    return function(SCALE * functional.normalize(x), w, targets, impl=impl)


def partial_fc(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """The form of insightface's PartialFC with sample_rate 1 on one rank: weights normalised in every step, linear,
    clamp, the margin on the target through arccos and cos, cross-entropy.
    """
    cosine = functional.linear(functional.normalize(x), functional.normalize(w)).clamp(-1, 1)
    rows = torch.arange(len(targets), device=x.device)
    target = cosine[rows, targets]
    shifted = torch.where(
        target > -math.cos(MARGIN), (target.acos() + MARGIN).cos(), target - MARGIN * math.sin(MARGIN)
    )
    return functional.cross_entropy(SCALE * cosine.index_put((rows, targets), shifted), targets)


def ours(x: Tensor, w: Tensor, targets: Tensor, mining: MiningRule | None = None) -> Tensor:
    """``pmk.margin_softmax_loss``."""
    loss = pmk.margin_softmax_loss(x, w, targets, margin=pmk.ArcFace(MARGIN), scale=SCALE, mining=mining)
    assert isinstance(loss, Tensor)
    return loss


# --- The list of peers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A loss, and what has to be known to run it."""

    name: str
    loss: Loss
    has_margin: bool = True
    transposed: bool = False  # takes its weight as (D, M)
    matrices: int = 0  # how many (B, M) float32 matrices it holds at its peak
    package: str = ""  # what must be importable
    install: str = ""  # how to get it
    backend: str = ""  # ours only: served by this one

    @property
    def label(self) -> str:
        """The name for tables and plots: it says where less is computed."""
        return self.name if self.has_margin else f"{self.name} (no margin)"

    def refusal(self, size: Size, device: str = "cpu") -> str | None:
        """Return why this peer cannot serve the size here, or None."""
        if self.backend and (reason := BACKENDS[self.backend].unavailable()):
            return reason
        if self.package:
            try:
                import_module(self.package)
            except ImportError as error:
                return f"not installed ({error}; {self.install})"
        if self.name == "linear_cross_entropy" and not hasattr(functional, self.name):
            return f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"
        needed = 4 * self.matrices * size.B * size.M
        if needed > (free := free_memory(device)):
            return f"needs about {needed / 2**30:.0f} GiB at {size}, {free / 2**30:.0f} GiB are free"
        return None

    def mining(self, rule: MiningRule | None) -> Peer:
        """Return ours with this mining rule."""
        return replace(self, loss=functools.partial(ours, mining=rule))

    def within(self) -> AbstractContextManager[None]:
        """Return the context in which it runs."""
        return pmk.use_backend(self.backend) if self.backend else contextlib.nullcontext()

    def step(self, problem: Problem, what: str) -> Callable[[], tuple[Tensor, ...]]:
        """Return a function that runs one step and returns the loss and the gradients that ``what`` asks for."""
        x, w, targets = problem
        weight = w.T.contiguous() if self.transposed else w.detach()
        weight.requires_grad_(what == "prototypes' gradient")

        def run() -> tuple[Tensor, ...]:
            leaf = x.detach().requires_grad_(what != "forward")
            leaves = [tensor for tensor in (leaf, weight) if tensor.requires_grad]
            with self.within(), torch.set_grad_enabled(bool(leaves)):
                loss = self.loss(leaf, weight, targets)
                gradients = torch.autograd.grad(loss, leaves) if leaves else ()
            synchronize(x)
            return (loss.detach(), *gradients)

        return run


def free_memory(device: str) -> int:
    """Return the bytes that are free on the device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])


OURS = [Peer(f"protomem-{backend}", ours, backend=backend) for backend in reversed(BACKENDS)]
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in [
        Peer("eager", eager, matrices=5),
        Peer("torch.compile", compiled, matrices=4),
        Peer("linear_cross_entropy", linear_cross_entropy, has_margin=False, matrices=4),
        Peer(
            "pytorch-metric-learning",
            metric_learning,
            transposed=True,
            matrices=5,
            package="pytorch_metric_learning.losses",
            install="pip install 'protomem-kernels[bench]'",
        ),
        Peer(
            "cut-cross-entropy",
            cut_cross_entropy,
            has_margin=False,
            matrices=2,
            package="cut_cross_entropy",
            install="pip install --no-deps cut-cross-entropy triton",
        ),
        Peer("partial-fc", partial_fc, matrices=5),
        *OURS,
    ]
}


def our_peer(backend: str) -> Peer:
    """Return ours, served by this backend, or by whatever dispatch chooses if it is empty."""
    return PEERS[f"protomem-{backend}"] if backend else Peer("protomem", ours)


# --- The other operators in vectorised eager PyTorch -----------------------------------------------------------------


def eager_logits(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """``margin_softmax_logits``: what ``eager`` hands to cross_entropy."""
    cosine = functional.normalize(x) @ w.T
    target = cosine.gather(1, targets[:, None])
    return cosine.scatter_(1, targets[:, None], add_margin(target)).mul_(SCALE)


def eager_hardest(x: Tensor, w: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``hardest_negatives``: the (B, M) cosines without the targets, topk."""
    cosine = functional.normalize(x) @ w.T
    values, slots = cosine.scatter_(1, targets[:, None], float("-inf")).topk(k, dim=1)
    return values, slots


def eager_aggregate(x: Tensor, labels: Tensor) -> pmk.AggregatedPrototypes:
    """``aggregate_prototypes`` itself: all four outputs, samples without a label, rows that are antipodal or broken."""
    labelled = labels >= 0
    identities, row = labels[labelled].unique(return_inverse=True)
    index = torch.full_like(labels, -1)
    index[labelled] = row
    rows = functional.normalize(x[labelled])
    mass = rows.new_zeros(len(identities)).index_add_(0, row, rows.new_ones(len(rows)))
    total = rows.new_zeros(len(identities), rows.shape[1]).index_add_(0, row, rows)
    length = torch.linalg.vector_norm(total, dim=1)
    exists = (length > 1e-6 * mass) & torch.isfinite(length)
    prototypes = torch.where(exists[:, None], total / length[:, None], 0)
    return pmk.AggregatedPrototypes(prototypes, identities, index, mass)


def eager_aggregate_without_rules(x: Tensor, labels: Tensor) -> Tensor:
    """The prototypes alone, as short as it gets: every sample labelled, none antipodal or broken."""
    identities, index = labels.unique(return_inverse=True)
    total = x.new_zeros(len(identities), x.shape[1]).index_add_(0, index, functional.normalize(x))
    return functional.normalize(total)


def eager_enqueue_(
    state: pmk.MemoryState, prototypes: Tensor, identities: Tensor, refresh_ratio: float = 0.5
) -> tuple[Tensor, Tensor]:
    """``enqueue_`` (fifo; usable rows, distinct identities): the slots (P,) and the evicted identities (P,).

    The memory's identities are searched in the batch's sorted ones, which is faster than ``torch.isin`` and needs no
    index that a user would have to keep beside the memory.
    """
    M, P = len(state.identities), len(identities)
    p = functional.normalize(prototypes)
    ordered, order = identities.sort()
    place = torch.searchsorted(ordered, state.identities).clamp_(max=P - 1)
    hit = (ordered[place] == state.identities).nonzero()[:, 0]
    slots = torch.full_like(identities, -1)
    slots[order[place[hit]]] = hit

    known = slots >= 0
    window = (state.cursor + torch.arange(min(M, 2 * P), device=slots.device)) % M
    free = window[~torch.isin(window, hit)]
    slots[~known] = victims = free[: P - len(hit)]
    evicted = torch.full_like(identities, -1)
    evicted[~known] = state.identities[victims]

    p[known] = functional.normalize(torch.lerp(state.prototypes[slots[known]], p[known], refresh_ratio))
    state.prototypes[slots] = p
    state.identities[slots] = identities
    state.clock.add_(1)
    state.stamps[slots] = state.clock
    if len(victims):
        state.cursor.copy_((victims[-1] + 1) % M)
    return slots, evicted
