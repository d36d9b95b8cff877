"""What every training head keeps to: how it shares a batch with the heads of other ranks, and what it loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from protomem_kernels._checks import check_int
from protomem_kernels._torch import active_ddp
from protomem_kernels.distributed.agreement import Agreement, described
from protomem_kernels.distributed.batch import ONE_RANK, Batch, SharedRows, batch_options, gather_batch
from protomem_kernels.distributed.data_parallel import OwnedByRank, refuse_unprepared
from protomem_kernels.distributed.ranks import Ranks, hand_ranks
from protomem_kernels.margins import AnyMargin
from protomem_kernels.mining import MiningRule
from protomem_kernels.objective import Bank, Banks
from protomem_kernels.rows import accumulation_dtype, widened_for_loss
from protomem_kernels.shards import ShardedBanks
from protomem_kernels.state import check_parts


class Head(nn.Module, OwnedByRank):
    """A training head: what its parts cannot load is refused before the first of them has changed.

    Over several ranks it agrees with the other ranks' heads on each batch, and brings the parts of it together.
    """

    ranks: Ranks
    margin: AnyMargin
    scale: float
    mining: MiningRule | None
    reduction: str

    def _share(self, ranks: Ranks, average_gradients: bool | int, equal_batches: bool, *parts: object) -> None:
        """Set up how batches are shared: with whom, what gradients are multiplied by, and whether sizes are told."""
        if not isinstance(average_gradients, bool):
            check_int("average_gradients", average_gradients, at_least=1)
        if not isinstance(equal_batches, bool):
            raise TypeError(f"equal_batches must be a bool, got {type(equal_batches).__name__}")
        self.ranks = ranks
        self.average_gradients, self.equal_batches = average_gradients, equal_batches
        self._agree = Agreement(ranks, equal_batches)
        hand_ranks(ranks, *parts)

    def owned_by_rank(self) -> Iterator[str]:
        """Return the names of what no other rank may overwrite: with a process group, all buffers and parameters."""
        if not self.ranks.alone:
            yield from (name for name, _ in self.named_buffers())
            yield from self._sharded_parameters()

    def _sharded_parameters(self) -> Iterator[str]:
        raise NotImplementedError

    def _device(self) -> torch.device:
        raise NotImplementedError

    def _slots(self) -> int:
        """Return how many prototypes all ranks have together."""
        raise NotImplementedError

    def _checked(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Check this rank's arguments and return labels as a tensor."""
        raise NotImplementedError

    def _settings(self) -> dict[str, object]:
        """Return what has to be alike on all ranks, by name."""
        return {
            "the call": type(self).__name__,
            "margin": described(self.margin),
            "scale": self.scale,
            "mining": described(self.mining),
            "reduction": self.reduction,
            "average_gradients": self.average_gradients,
            "training": self.training,
        }

    def _gathered(
        self, embeddings: Tensor, labels: Tensor, weights: Tensor | None, return_stats: bool
    ) -> tuple[Batch, Callable[[Tensor], Tensor]]:
        """Check a batch, on several ranks together with the others, and bring it together.

        Returns:
            the batch, and the function that the loss passes through (``widened_for_loss``).
        """
        if active_ddp() is not None:
            refuse_unprepared(self)
        if self.ranks.alone:
            labels = self._checked(embeddings, labels, weights)
            embeddings, passed = widened_for_loss(embeddings)
            return Batch(embeddings, labels, weights, ONE_RANK), passed
        labels, sizes = self._agree(
            self._device(),
            lambda: self._checked(embeddings, labels, weights),
            len,
            lambda _: self._settings() | batch_options(embeddings, weights) | {"return_stats": return_stats},
        )
        wire = embeddings.dtype
        embeddings, passed = widened_for_loss(embeddings)
        batch = gather_batch(
            SharedRows(self.ranks, sizes),
            embeddings.to(accumulation_dtype(wire)),  # so that gradients add up in it
            labels,
            weights,
            wire=wire,
            factor=float(self.ranks.size if self.average_gradients is True else self.average_gradients or 1),
        )
        return batch, passed

    def _banks(self, banks: list[Bank], batch: Batch, normalize_prototypes: bool = False) -> Banks:
        """Return banks of this rank's prototypes as what the loss runs over."""
        if self.ranks.alone:
            return Banks(banks, normalize_prototypes)
        return ShardedBanks(banks, batch.rows, batch.labels >= 0, self._slots(), normalize_prototypes)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_parts(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
