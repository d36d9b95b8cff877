"""What the two operators on a batch alone share: ordering its keys, and the length of rows held whole.

Ordering by counting: the position of a key in ascending order is the number of keys that are less, plus the equal ones
before it. That is B^2 comparisons without any dependence between programs, exact for every int64, stable, in one
launch and without scratch: at B = 512 less work than starting a sort, at B = 4096 some 10 us of an H100's integer
units, and it overtakes a radix sort (a dozen launches) only past B of about 30,000.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_keys(keys_ptr, index, stride, size):
    """Return labels (N,) as uint64: negative ones become the greatest keys, and so does what lies past ``size``."""
    keys = tl.load(keys_ptr + index.to(tl.int64) * stride, mask=index < size, other=-1).to(tl.int64)
    return keys.to(tl.uint64, bitcast=True)


@triton.jit
def ranks(keys_ptr, stride, size, rows, BLOCK_KEYS: tl.constexpr):
    """Return of each of ``rows`` (N,) its key and how many keys are less, equal and before it, and equal.

    The key comes back as int64. Less + before is the row's position in the stable ascending order, negative keys last.
    Only for the key -1 does ``equal`` count the padding too.
    """
    key = load_keys(keys_ptr, rows, stride, size)
    less = tl.zeros([rows.shape[0], BLOCK_KEYS], tl.int32)
    before = tl.zeros([rows.shape[0], BLOCK_KEYS], tl.int32)
    equal = tl.zeros([rows.shape[0], BLOCK_KEYS], tl.int32)
    for start in range(0, size, BLOCK_KEYS):
        others = start + tl.arange(0, BLOCK_KEYS)
        keys = load_keys(keys_ptr, others, stride, size)
        same = keys[None, :] == key[:, None]
        less += (keys[None, :] < key[:, None]).to(tl.int32)  # the padding is the greatest key, hence never less
        before += (same & (others[None, :] < rows[:, None])).to(tl.int32)
        equal += same.to(tl.int32)
    return key.to(tl.int64, bitcast=True), tl.sum(less, axis=1), tl.sum(before, axis=1), tl.sum(equal, axis=1)


@triton.jit
def unit_rows(x):
    """Return the rows of ``x`` (N, D) at unit length, and their lengths (N,).

    A zero row stays zero, a non-finite one becomes NaN throughout. The largest entry is divided out first, so that
    squares neither overflow nor underflow.
    """
    largest = tl.max(tl.abs(x), axis=1)
    safe = tl.where(largest > 0, largest, 1.0)
    y = x / safe[:, None]
    norm = tl.sqrt(tl.sum(y * y, axis=1))
    return y / tl.where(norm == 0, 1.0, norm)[:, None], safe * norm
