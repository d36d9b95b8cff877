"""The kernel of Liger-Kernel's fused linear cross entropy, launched as it launches it on ``CENTRE``.

The kernel is the smaller half: it turns a chunk of logits into the loss and, in place, into the gradient. The matrix
products around it are ``torch.mm``: for every chunk of rows one that reads all of W and writes the chunk's logits to
memory, one that reads both again for the gradient of the embeddings, and one more for that of the weights. With few
samples and many classes the chunks are small: ``chunks`` says how often W is read through.
"""

from __future__ import annotations

import torch

from benchmarks.static.launches import Blank, launched
from protomem_kernels.backends.triton.specimens import CENTRE, Specimen

PACKAGE = "liger_kernel"


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Return the one kernel that the loss and the gradient of its embeddings launch for every chunk."""
    del arch, dim  # the kernel sees logits alone
    import triton
    from liger_kernel.ops import fused_linear_cross_entropy as theirs

    B, M = CENTRE
    block = min(theirs.MAX_FUSED_SIZE, triton.next_power_of_2(M))
    arguments = {
        **{"X_ptr": Blank(dtype), "X_stride": M, "Y_ptr": Blank(torch.int64), "Y_stride": 1, "weight_ptr": None},
        **{"loss_ptr": Blank(torch.float32), "z_loss_ptr": None, "loss_stride": 1, "token_accuracy_ptr": None},
        **{"token_accuracy_stride": 0, "predicted_tokens_ptr": None, "predicted_tokens_stride": 0, "n_cols": M},
        **{"n_non_ignore": B, "sum_non_ignore_weight": B, "weight_sum": 0.0, "ignore_index": -100},
        **{"lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean", "softcap": None},
        **{"RETURN_Z_LOSS": False, "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False},
        **{"BLOCK_SIZE": block, "HAS_WEIGHT": False, "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True},
        "num_warps": 32,
    }
    return [
        Specimen(
            name="cross entropy of given logits",
            **launched(theirs.liger_cross_entropy_kernel, arguments),
            bytes_per_tile=3 * block * dtype.itemsize,  # read for the sum, read and written for the gradient
            tiles=B * -(-M // block),
            least_bytes=2 * B * M * dtype.itemsize,
        )
    ]


def chunks(dim: int) -> int:
    """Return into how many chunks of rows ``CENTRE`` falls; W is read twice for each."""
    import triton
    from liger_kernel.ops import fused_linear_cross_entropy as theirs

    B, M = CENTRE
    parts = triton.cdiv(M, theirs._CHUNK_MEM_CONST * dim)
    return triton.cdiv(B, min(B, triton.next_power_of_2(triton.cdiv(B, parts))))
