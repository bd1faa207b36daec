"""A GPU made of NumPy: it runs the PTX that the Triton language's compiler made, thread for thread.

The interpreter of the Triton language runs a kernel's source, and not what the compiler makes of it: how a block's
elements lie in registers and shared memory, instructions written out in a kernel, barriers, copies that have to be
waited for, what is aligned. This runs all of that, for the kernels as an engine carries them, and is strict where a GPU
is undefined: an access outside an allocation or not a multiple of its size, shared memory that one warp writes and
another reads with no barrier between, a copy that is read before it was waited for, a warp of which half is elsewhere.

It says nothing about time. Rounding is that of the instructions, but for sums inside a matrix instruction, whose order
the hardware doesn't tell; approximate instructions are exact here.
"""

from emulator.driver import EmulatedGpu
from emulator.faults import FaultError, UnsupportedError

__all__ = ["EmulatedGpu", "FaultError", "UnsupportedError"]
