"""Memory: one arena for the whole GPU, and the shared memory of programs with what is known of each byte."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emulator.faults import FaultError

Array = NDArray[np.generic]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Shared memory begins here, so that null is not in it; a multiple of what swizzled layouts want.
SHARED_BASE = 1024
# Who wrote or read a byte of shared memory: a warp's number, or
NOBODY, SEVERAL, GROUP_OF_WARPS = -1, -2, -3

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _Memory:
    """Bytes, read and written at places that are multiples of what is there."""

    bytes: NDArray[np.uint8]

    def load(self, places: Indices, size: int) -> Array:
        """[lanes] elements of `size` bytes, at places that are multiples of it."""
        return self.bytes.view(_UNSIGNED[size])[places // size]

    def store(self, places: Indices, values: Array, mask: Mask | None) -> None:
        """Put elements there; of two lanes at one place the later one wins."""
        each = self.bytes.view(values.dtype)
        where = places // values.dtype.itemsize
        if mask is None:
            each[where] = values
        else:
            each[where[mask]] = values[mask]


class GlobalMemory(_Memory):
    """Memory of a fixed size, at real addresses; allocations lie apart, with bytes between that nobody may touch."""

    GAP = 256

    def __init__(self, size: int) -> None:
        self._held = np.empty(size + 256, np.uint8)
        start = -self._held.ctypes.data % 256
        self.bytes = self._held[start : start + size]
        self.base = self.bytes.ctypes.data
        self._allowed = np.zeros(size, np.bool_)
        self._next = 0

    def allocate(self, size: int) -> int:
        """The address of so many bytes, a multiple of 256. Raises MemoryError."""
        start = -(-self._next // 256) * 256 + self.GAP
        if start + size > self.bytes.size:
            raise MemoryError(f"the emulated GPU has {self.bytes.size} bytes: {size} more don't fit")
        size = max(size, 1)
        self.bytes[start : start + size] = 0xA5  # nothing that a kernel should take for its data
        self._allowed[start : start + size] = True
        self._next = start + size
        return self.base + start

    def clear(self) -> None:
        """Take everything back that was allocated."""
        self.release(0)

    def mark(self) -> int:
        """For `release`."""
        return self._next

    def release(self, mark: int) -> None:
        """Take back what was allocated since."""
        self._allowed[mark : self._next] = False
        self._next = mark

    def view(self, address: int, size: int) -> Array:
        """Bytes of one allocation, to read and to write."""
        start = address - self.base
        if not (start >= 0 and start + size <= self.bytes.size and self._allowed[start : start + size].all()):
            raise FaultError(f"{size} bytes at {address:#x} are in no allocation")
        return self.bytes[start : start + size]

    def places(self, addresses: Array, size: int, mask: Mask | None, what: str) -> Indices:
        """Where addresses lie in `bytes`, of others 0. Raises FaultError: not allowed, or not a multiple."""
        places = (addresses.astype(np.uint64) - np.uint64(self.base)).astype(np.int64)
        if mask is not None:
            places = np.where(mask, places, self.GAP)
        wrong = (places < 0) | (places + size > self.bytes.size)
        inside = np.where(wrong, 0, places)
        wrong |= ~(self._allowed[inside] & self._allowed[inside + size - 1])
        if mask is not None:
            wrong &= mask
        if wrong.any():
            lane = int(np.argmax(wrong))
            raise FaultError(
                f"{what} of {size} bytes at {int(addresses[lane]):#x}, which are in no allocation (lane {lane})"
            )
        if ((places % size != 0) if mask is None else (places % size != 0) & mask).any():
            raise FaultError(f"{what} of {size} bytes at an address that is not a multiple of {size}")
        return inside


class SharedMemory(_Memory):
    """That of some programs, `size` bytes each, and for each byte who used it since the last barrier.

    Reads and writes of lanes are at `places`: the program's number times size, plus the offset.
    """

    def __init__(self, programs: int, size: int) -> None:
        self.size = size
        self.padded = -(-size // 16) * 16
        self.bytes = np.full(programs * self.padded, 0xA5, np.uint8)
        self._writer = np.full(self.bytes.size, NOBODY, np.int32)
        self._reader = np.full(self.bytes.size, NOBODY, np.int32)
        self._written = np.full(self.bytes.size, -1, np.int32)
        self._read = np.full(self.bytes.size, -1, np.int32)
        self._copying = np.zeros(self.bytes.size, np.bool_)

    def places(self, program: Indices, addresses: Array, size: int, mask: Mask | None, what: str) -> Indices:
        """Where addresses lie in `bytes`. Raises FaultError: not what the launch asked for, or not a multiple."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        wrong = (offsets < 0) | (offsets + size > self.size)
        uneven = offsets % size != 0
        if mask is not None:
            wrong, uneven = wrong & mask, uneven & mask
        if wrong.any():
            at = int(offsets[np.argmax(wrong)])
            raise FaultError(
                f"{what} of {size} bytes at {at} in shared memory, of which the launch asked for {self.size}"
            )
        if uneven.any():
            raise FaultError(
                f"{what} of {size} bytes at {int(offsets[np.argmax(uneven)])}, not a multiple, in shared memory"
            )
        places: Indices = np.clip(offsets, 0, max(self.padded - size, 0)) // size * size + program * self.padded
        return places

    def reading(self, places: Indices, size: int, warp: Array, epoch: Array, mask: Mask | None, what: str) -> None:
        """Note a read of lanes of some warps. Raises FaultError: another warp wrote it, and no barrier is between."""
        each, warps, epochs = self._bytes_of(places, size, warp, epoch, mask)
        if self._copying[each].any():
            raise FaultError(f"{what} reads shared memory into which a copy goes that was not waited for")
        others = (self._written[each] == epochs) & (self._writer[each] != warps)
        if others.any():
            raise FaultError(
                f"{what} reads what warp {int(self._writer[each][others][0])} wrote, with no barrier between"
            )
        again = (self._read[each] == epochs) & (self._reader[each] != warps)
        self._reader[each] = np.where(again, SEVERAL, warps)
        self._read[each] = epochs
        # Of two warps in one instruction the later has overwritten the other.
        lost = (self._reader[each] != warps) & ~again
        self._reader[each[lost]] = SEVERAL

    def writing(
        self,
        places: Indices,
        size: int,
        warp: Array,
        epoch: Array,
        mask: Mask | None,
        what: str,
        values: Array | None = None,
    ) -> None:
        """Note a write, of values as bytes [lanes, size]; the same bytes twice do no harm.

        Raises FaultError: another warp read or wrote it, and no barrier is between.
        """
        each, warps, epochs = self._bytes_of(places, size, warp, epoch, mask)
        read = (self._read[each] == epochs) & (self._reader[each] != warps)
        written = (self._written[each] == epochs) & (self._writer[each] != warps)
        wrong = read | written
        if values is not None and wrong.any():
            new = (values if mask is None else values[mask]).reshape(-1)
            wrong &= self.bytes[each] != new
        if wrong.any():
            how, who = ("read", self._reader) if (read & wrong).any() else ("wrote", self._writer)
            which = int(who[each][wrong][0])
            by = {SEVERAL: "several warps", GROUP_OF_WARPS: "a group of warps"}.get(which, f"warp {which}")
            raise FaultError(f"{what} overwrites what {by} {how}, with no barrier between")
        self._writer[each] = warps
        self._written[each] = epochs

    def copying(self, places: Indices, size: int, mask: Mask | None, goes_on: bool) -> None:
        """A copy into these places has begun, or was waited for."""
        each = (places if mask is None else places[mask])[:, None] + np.arange(size)
        self._copying[each] = goes_on

    def forget(self, places: Indices) -> None:
        """Bytes that something other than a warp wrote, and that whoever reads them waits for otherwise."""
        self._written[places] = -1

    @staticmethod
    def _bytes_of(
        places: Indices, size: int, warp: Array, epoch: Array, mask: Mask | None
    ) -> tuple[Indices, Array, Array]:
        if mask is not None:
            places, warp, epoch = places[mask], warp[mask], epoch[mask]
        each = (places[:, None] + np.arange(size)).reshape(-1)
        return each, np.repeat(warp, size), np.repeat(epoch, size)
