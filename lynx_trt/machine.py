"""What this machine has, and whether what was asked for fits it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lynx_trt import int4
from lynx_trt.errors import UsageError

if TYPE_CHECKING:
    from lynx_trt.artifact import ModelRecord

# What a container may have, as it sees it itself: control groups of version 2 and 1.
_GROUPS = Path("/sys/fs/cgroup")
LIMITS = (_GROUPS / "memory.max", _GROUPS / "memory" / "memory.limit_in_bytes")

# Bytes that ONNX Runtime takes for each byte of quantized weights while it loads them, beyond their float32
# (runtime/dequantize.py): of 32 values of MXFP4, 17 bytes, 32 of places, 64 of small values and 8 of scales; of NVFP4,
# 20 bytes, 16 of scales. Of int4 as measured there, with zero points more, as its values become int8.
_LOADING: dict[str | None, float] = {
    "mxfp4": 104 / 17,
    "nvfp4": 112 / 20,
    "fp8": 1.0,
    **{int4.name_of(block, zeros=zeros): 3.5 if zeros else 1.0 for block in int4.BLOCKS for zeros in (False, True)},
}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory that this process may have, in use or not: the machine's, or what a container is given of it."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in LIMITS:
        try:
            sizes.append(int(file.read_text(encoding="ascii")))
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
    return min(sizes)


def check_threads(threads: int | None) -> None:
    """Refuse more threads than cores: each takes memory, and together they are slower than fewer.

    Raises:
        UsageError: there are more.
    """
    if threads is not None and threads > cores():
        raise UsageError(f"--threads is {threads}, and this process may use {cores()} CPU cores; give that or less")


def slots_problem(slots: int, bytes_each: int) -> str | None:
    """Why the caches of `slots` sequences don't fit this machine's memory, a clause; None if they may."""
    most = memory_bytes() // max(bytes_each, 1)
    if slots <= most:
        return None
    return (
        f"{slots} sequences need {slots * bytes_each / 1e9:,.1f} GB of cache, and this machine has "
        f"{memory_bytes() / 1e9:,.1f} GB of memory, enough for {most}"
    )


def weights_problem(model: ModelRecord) -> str | None:
    """Why ONNX Runtime can't hold a model's weights in float32 on the CPU, a clause; None if it may."""
    packed = sum(layer.experts * layer.expert_bytes * _LOADING.get(layer.quantized, 0.0) for layer in model.moe_layers)
    need = 4 * model.parameters + int(packed)
    if need <= memory_bytes():
        return None
    return (
        f"its weights take {need / 1e9:,.1f} GB {'while they become' if packed else 'in'} float32, in which ONNX "
        f"Runtime computes on the CPU, and this machine has {memory_bytes() / 1e9:,.1f} GB of memory"
    )
