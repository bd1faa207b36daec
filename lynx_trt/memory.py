"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def resident_bytes(which: Literal["now", "peak"]) -> int:
    """Bytes resident now, or at most so far; 0 where there is no /proc.

    Not getrusage: its peak begins with the memory of whatever started the process.
    """
    key = {"now": "VmRSS:", "peak": "VmHWM:"}[which]
    try:
        with Path("/proc/self/status").open(encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)
    except OSError:
        return 0
