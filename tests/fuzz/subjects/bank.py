"""A batch of embeddings against a bank of prototypes: what the operators that read a memory take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzz.draw import ENDS, Draw, accumulation


@dataclass
class BankCase:
    """Embeddings (B, D), prototypes (M, D), targets (B,), occupied (M,) or None.

    Slots that are neither occupied nor a target hold junk, some of them.
    """

    embeddings: Tensor
    prototypes: Tensor
    targets: Tensor
    occupied: Tensor | None
    normalize: bool

    @property
    def present(self) -> Tensor:
        if self.occupied is None:
            return torch.ones(self.prototypes.shape[0], dtype=torch.bool)
        return self.occupied

    def used(self, targets: Tensor | None) -> Tensor:
        """Return (M,) bool: the slots whose rows are read."""
        mask = self.present.clone()
        if targets is not None:
            mask[targets.long()[targets >= 0]] = True
        return mask

    def clean(self, targets: Tensor | None) -> Tensor:
        """Return the prototypes with zeros where nothing is read."""
        return torch.where(self.used(targets)[:, None], self.prototypes.detach(), 0)


def draw_bank(draw: Draw, small: bool = False) -> BankCase:
    batch = min(draw.batch(), 6 if small else 99)
    slots = min(draw.slots(), 40 if small else 9000)
    columns = min(draw.columns(), 8 if slots > 1000 else 99)
    dtype = draw.dtype()
    kind = dtype if draw.chance(0.6) else draw.dtype()
    normalize = draw.chance(0.4)
    x = draw.rows(batch, columns, dtype)
    sound = torch.where(x.isfinite().all(dim=1, keepdim=True), x, 0).double()
    sound = sound / torch.where(sound.abs().amax(dim=1, keepdim=True) > 0, sound.abs().amax(dim=1, keepdim=True), 1)
    if normalize:
        w = draw.rows(slots, columns, kind, near=sound, broken=False)
        limit = ENDS[torch.float32]
        if kind == torch.float64 and accumulation(dtype) == torch.float32:
            w = torch.where(w.abs() > 1 / limit, w.clamp(-limit, limit), 0)
    else:
        w = draw.unit(slots, columns, kind, near=sound)
    highest = max(slots - 1, -1)
    targets = draw.labels(batch, [draw.integer(0, highest) for _ in range(draw.integer(1, 12))] if slots else [])
    occupied = draw.mask(slots, draw.pick(0.0, 0.5, 0.9, 1.0)) if draw.chance(0.6) else None
    case = BankCase(x, w, targets, occupied, normalize)
    if occupied is not None:
        case.occupied = draw.layout(occupied)
        if draw.chance(0.5):
            junk = draw.pick(float("nan"), float("inf"), torch.finfo(kind).max)
            case.prototypes = torch.where(case.used(targets)[:, None], w, junk)
    case.prototypes = draw.layout(case.prototypes)
    draw.note(B=batch, M=slots, D=columns, dtype=dtype, prototypes=kind, normalize=normalize)
    draw.note(targets=targets.dtype, occupied=None if occupied is None else int(occupied.sum()))
    return case
