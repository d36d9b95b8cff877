"""Which rank owns an identity: a fixed function of its number, so that nobody keeps a table."""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit number."""
    return number - (1 << 64) if number >= 1 << 63 else number


_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mix(identities: Tensor) -> Tensor:
    """Return 63 well-mixed bits of each identity, int64 >= 0, of any shape.

    The finaliser of splitmix64, without its lowest bit. It never changes: states that were saved depend on it.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.

    >>> mix(torch.tensor([0, 1, 2]))
    tensor([                  0, 3119036373970289394, 7919892530791287365])
    """
    z = identities.long()
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return _shifted(z ^ _shifted(z, 31), 1)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right as an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def owners(identities: Tensor, ranks: int) -> Tensor:
    """Return the rank, in [0, ranks), that owns each identity; of negative ones, which nobody owns, any.

    >>> owners(torch.tensor([0, 1, 2, 3]), 2)
    tensor([0, 0, 1, 0])
    """
    return torch.remainder(mix(identities), ranks)
