"""What a launch asks of the hardware, counted: sectors of global memory, wavefronts of shared memory, instructions.

A warp's access of global memory goes in sectors of 32 bytes. One of shared memory goes in wavefronts: 128 bytes at a
time from 32 banks of 4 bytes, a wavefront more for each further word that is wanted of the same bank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emulator.memory import GlobalMemory, Indices, Mask

Array = Any

SECTOR, BANKS, WORD = 32, 32, 4


# A line of a kernel's source, and the instruction.
Where = tuple[str, str]


@dataclass
class Use:
    """How much of the hardware's units an instruction of a kernel took, and how few would do for what it moved."""

    taken: int = 0
    least: int = 0


@dataclass
class Counters:
    """Of one launch: how often each sector of the GPU's memory was read, and what instructions were executed by warps.

    prefetches: of each sector, those that threads asked for.
    sectors and wavefronts: of each instruction, those of a warp's access that are not in the L1 cache counted again.
    """

    memory: GlobalMemory
    reads: Array = None
    writes: Array = None
    prefetches: Array = None
    instructions: Counter[str] = field(default_factory=Counter)
    sectors: dict[Where, Use] = field(default_factory=dict)
    wavefronts: dict[Where, Use] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sectors = self.memory.bytes.size // SECTOR
        self.reads, self.writes, self.prefetches = (np.zeros(sectors, np.int32) for _ in range(3))

    def read(self, address: int, size: int, *, ahead: bool = False) -> Array:
        """How often each sector of an allocation was read, or (ahead) prefetched."""
        first = (address - self.memory.base) // SECTOR
        return (self.prefetches if ahead else self.reads)[first : first + -(-size // SECTOR)]

    def count_prefetch(self, places: Indices, mask: Mask | None) -> None:
        np.add.at(self.prefetches, (places if mask is None else places[mask]) // SECTOR, 1)

    def count_global(
        self, where: Where, places: Indices, size: int, warp: Array, mask: Mask | None, *, write: bool
    ) -> None:
        """A warp's sectors count once each; the fewest are those of as many bytes side by side."""
        if mask is not None:
            places, warp = places[mask], warp[mask]
        each = places[:, None] + np.arange(0, size, SECTOR) if size > SECTOR else places[:, None]
        sectors = each // SECTOR
        keys = np.unique(warp[:, None].astype(np.int64) * (self.memory.bytes.size // SECTOR) + sectors)
        np.add.at(self.writes if write else self.reads, keys % (self.memory.bytes.size // SECTOR), 1)
        # Lanes that ask for the same get it at once.
        asked = np.unique(warp.astype(np.int64) * self.memory.bytes.size + places) // self.memory.bytes.size
        use = self.sectors.setdefault(where, Use())
        use.taken += len(keys)
        use.least += int((-(-np.unique(asked, return_counts=True)[1] * size // SECTOR)).sum())

    def count_shared(
        self, where: Where, places: Indices, size: int, warp: Array, lane: Array, mask: Mask | None
    ) -> None:
        """Lanes go together as far as they ask for 128 bytes at most."""
        if mask is not None:
            places, warp, lane = places[mask], warp[mask], lane[mask]
        together = min(32, 128 // max(size, WORD))
        phase = warp.astype(np.int64) * 32 + lane // together
        words = (places[:, None] + np.arange(0, max(size, 1), WORD)) // WORD
        keys = np.unique(phase[:, None] * (1 << 40) + words)
        phases, banks = keys >> 40, (keys & ((1 << 40) - 1)) % BANKS
        by_bank, counts = np.unique(phases * BANKS + banks, return_counts=True)
        firsts = np.flatnonzero(np.diff(by_bank // BANKS, prepend=-1))
        use = self.wavefronts.setdefault(where, Use())
        use.taken += int(np.maximum.reduceat(counts, firsts).sum()) if len(firsts) else 0
        use.least += len(firsts)
