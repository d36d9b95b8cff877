"""The GPUs' limits and rates, and what follows from them: how many blocks fit, how long a call must take at least.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Registers are given out per warp
in units of 256, from four register files of 16,384 each; a block's shared memory in units of 128 bytes, and 1 KiB of it
belongs to the system. Tensor memory (sm_100): PTX ISA, "Tensor Memory", 512 columns.

Rates, without sparsity: "NVIDIA A100 Tensor Core GPU" (A100 80GB SXM), "NVIDIA H100 Tensor Core GPU" (H100 SXM) and
"NVIDIA HGX B200" (one of its eight GPUs) data sheets. Exponentials: 16 per clock and multiprocessor ("Throughput of
Native Arithmetic Instructions" in the same guide), at the clock that the data sheet's bfloat16 rate implies.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor of an architecture holds."""

    shared_per_block: int  # bytes that one block may ask for
    shared: int  # bytes
    warps: int = 64
    blocks: int = 32
    registers: int = 65_536
    tensor_columns: int = 0


LIMITS = {
    80: Limits(shared_per_block=163 << 10, shared=164 << 10),
    86: Limits(shared_per_block=99 << 10, shared=100 << 10, warps=48, blocks=16),
    90: Limits(shared_per_block=227 << 10, shared=228 << 10),
    100: Limits(shared_per_block=227 << 10, shared=228 << 10, tensor_columns=512),
}


@dataclass(frozen=True)
class Gpu:
    """The rates of one product, per second."""

    name: str
    bytes: float
    half: float  # operations of the tensor cores in bfloat16 or float16, accumulated in float32
    tf32: float  # operations of the tensor cores in TF32
    float32: float  # operations outside the tensor cores
    half_per_clock: int  # operations per clock and multiprocessor behind ``half``

    @property
    def exponentials(self) -> float:
        return 16 * self.half / self.half_per_clock


GPUS = {
    80: Gpu("A100", bytes=2.039e12, half=312e12, tf32=156e12, float32=19.5e12, half_per_clock=2048),
    90: Gpu("H100", bytes=3.35e12, half=989.5e12, tf32=494.5e12, float32=67e12, half_per_clock=4096),
    100: Gpu("B200", bytes=8.0e12, half=2250e12, tf32=1125e12, float32=75e12, half_per_clock=8192),
}


def occupancy(arch: int, *, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> float:
    """Return the share of a multiprocessor's warps that can be resident; 0 where not even one block fits.

    >>> occupancy(80, registers=128, shared=0, warps=4), occupancy(80, registers=32, shared=82 << 10, warps=8)
    (0.25, 0.125)
    >>> occupancy(90, registers=32, shared=228 << 10, warps=4)
    0.0
    """
    limits = LIMITS[arch]
    if shared > limits.shared_per_block or registers > 255:
        return 0.0
    per_warp = _rounded_up(32 * registers, 256)
    held = 4 * (limits.registers // 4 // per_warp)
    blocks = [limits.blocks, limits.warps // warps, held // warps, limits.shared // (_rounded_up(shared, 128) + 1024)]
    if tensor_columns:
        blocks.append(limits.tensor_columns // tensor_columns)
    return min(blocks) * warps / limits.warps


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def seconds(gpu: Gpu, *, operations: float, rate: float, exponentials: float, moved: float) -> tuple[float, str]:
    """Return the time below which no schedule gets, and what sets it: the slowest of three things done side by side."""
    bounds = {
        "products": operations / rate,
        "exponentials": exponentials / gpu.exponentials,
        "memory": moved / gpu.bytes,
    }
    slowest = max(bounds, key=lambda name: bounds[name])
    return bounds[slowest], slowest
