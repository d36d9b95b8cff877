"""In what precision an encoder computes: autocast, and a scaled loss where its gradients would vanish otherwise."""

from __future__ import annotations

import torch

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """What an encoder is run under, and how its loss is brought back.

    Args:
        name: "float32", "bfloat16", "float16", or "auto": on a GPU bfloat16 where it has that, else float16; float32
            anywhere else.
        device: where the encoder is.

    Attributes:
        dtype: of the encoder's products.
        scaler: scales the loss for float16; does nothing for the others.

    >>> Precision("auto", torch.device("cpu")).dtype
    torch.float32
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            on_gpu = device.type == "cuda"
            brain = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bfloat16" if brain else "float16" if on_gpu else "float32"
        self.device, self.dtype = device, HALF.get(name, torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        """Return the context for the encoder's forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
