"""What this machine has, and whether what was asked for fits it."""

from __future__ import annotations

import os

from lynx_trt.errors import UsageError


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory that this machine has, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
