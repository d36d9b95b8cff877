"""What a backend may know of an operator that it has never heard of: its name, its file, and what it works through.

``ops.register`` fills the tables; nobody keeps a list by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

# What an operator works through: the batch alone, which is small; prototypes chosen for each sample; the whole memory.
BATCH, CHOSEN, MEMORY = "batch", "chosen", "memory"

# Name of a registered operator -> what it works through, in the order of registration.
OPERATORS: dict[str, str] = {}
# Name of a registered operator -> small fixed problems of it, for a dtype: the arguments of each, on the CPU. A GPU's
# kernels have to solve them as the reference does before they serve (``self_check``).
PROBLEMS: dict[str, Callable[[torch.dtype], Iterable[Sequence[Any]]]] = {}
# Name of a public function that is a few vector operations around one operator -> that operator.
FUNCTIONS: dict[str, str] = {}


def is_backward(operator: str) -> bool:
    """Say whether an operator is another one's backward pass.

    >>> is_backward("enqueue_"), is_backward("negative_logsumexp_backward_")
    (False, True)
    """
    return operator.removesuffix("_").endswith("_backward")


def file_of(operator: str) -> str:
    """Return the name of the file that holds an operator in every layer: its own, without what marks its variants.

    >>> file_of("enqueue_"), file_of("negative_logsumexp_backward_")
    ('enqueue', 'negative_logsumexp')
    """
    return operator.removesuffix("_").removesuffix("_backward")
