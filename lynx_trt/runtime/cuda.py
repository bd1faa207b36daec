"""A GPU for the TensorRT backend: memory, copies, one stream, and graphs of what runs on it.

Everything runs on the device's primary context, which TensorRT uses too, and in the order of one stream. Addresses are
ints, sizes bytes. `Cuda` is the driver's; the tests have a stand-in with the host's memory (`tests/host_gpu.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from lynx_trt.errors import TensorRTError
from lynx_trt.plugins.cuda_driver import CudaError, bindings, call, cuda_driver
from lynx_trt.plugins.launcher import Driver
from lynx_trt.runtime.backend import Array


class Gpu(Protocol):
    """What the backend wants of a GPU; every copy is queued on the stream and done at the next `synchronize`."""

    stream: int

    @property
    def driver(self) -> Driver:
        """What launches kernels of our own on it."""

    def use(self) -> None:
        """Make the GPU that of the calling thread."""

    def allocate(self, size: int, what: str) -> int:
        """Device memory; `what` is for the message if there is none."""

    def pinned(self, size: int) -> Array:
        """Host memory u8 [size] that copies need not stage."""

    def upload(self, target: int, source: Array) -> None:
        """Queue a copy to the device."""

    def download(self, target: Array, source: int) -> None:
        """Queue a copy to the host."""

    def copy_rows(self, target: int, source: int, width: int, pitch: int, rows: int) -> None:
        """Queue a copy of `rows` pieces of `width` bytes, each `pitch` after the one before, within the device."""

    def zero(self, target: int, size: int) -> None:
        """Queue setting device memory to zeros."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def timed(self, work: Callable[[], None]) -> float:
        """Seconds that the stream takes for what `work` queues, which is done at the end."""

    def capture(self, work: Callable[[], None]) -> object:
        """What `work` queues, as a graph, not run yet."""

    def launch(self, graph: Any) -> None:
        """Queue a graph."""

    def close(self) -> None:
        """Give everything back."""


class Cuda:
    """The GPU `ordinal` through the CUDA driver.

    Raises TensorRTError: no driver, no such GPU, no `cuda-python`, or CUDA refuses a call; the message names it.
    """

    def __init__(self, ordinal: int = 0) -> None:
        driver = bindings()
        call("cuInit", 0)
        self._device = call("cuDeviceGet", ordinal)
        self._context = call("cuDevicePrimaryCtxRetain", self._device)
        self.use()
        self._driver = driver
        self._stream = call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []

    @property
    def driver(self) -> Driver:
        """See Gpu."""
        return cuda_driver()

    def use(self) -> None:
        """See Gpu."""
        call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int, what: str) -> int:
        """See Gpu. Raises TensorRTError: there is not so much; the message says what for, and how much is free."""
        try:
            address = int(call("cuMemAlloc", max(size, 1)))
        except CudaError as error:
            if error.name != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            free = int(bindings().cuMemGetInfo()[1])
            raise TensorRTError(
                f"the GPU has no room for {what}: {size / 1e9:.2f} GB are wanted and {free / 1e9:.2f} GB are free; use "
                "fewer sequences at a time, or build with a smaller --max-length"
            ) from None
        self._memory.append(address)
        return address

    def pinned(self, size: int) -> Array:
        """See Gpu."""
        address = int(call("cuMemHostAlloc", max(size, 1), 0))
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def upload(self, target: int, source: Array) -> None:
        """See Gpu."""
        assert source.flags.c_contiguous
        call("cuMemcpyHtoDAsync", target, source.ctypes.data, source.nbytes, self._stream)

    def download(self, target: Array, source: int) -> None:
        """See Gpu."""
        assert target.flags.c_contiguous
        call("cuMemcpyDtoHAsync", target.ctypes.data, source, target.nbytes, self._stream)

    def copy_rows(self, target: int, source: int, width: int, pitch: int, rows: int) -> None:
        """See Gpu."""
        device = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy = self._driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = device
        copy.srcDevice, copy.dstDevice = source, target
        copy.srcPitch = copy.dstPitch = pitch
        copy.WidthInBytes, copy.Height = width, rows
        call("cuMemcpy2DAsync", copy, self._stream)

    def zero(self, target: int, size: int) -> None:
        """See Gpu."""
        call("cuMemsetD8Async", target, 0, size, self._stream)

    def synchronize(self) -> None:
        """See Gpu."""
        call("cuStreamSynchronize", self._stream)

    def timed(self, work: Callable[[], None]) -> float:
        """See Gpu."""
        begin, end = (call("cuEventCreate", 0) for _ in range(2))
        try:
            call("cuEventRecord", begin, self._stream)
            work()
            call("cuEventRecord", end, self._stream)
            self.synchronize()
            return float(call("cuEventElapsedTime", begin, end)) / 1e3
        finally:
            call("cuEventDestroy", begin)
            call("cuEventDestroy", end)

    def capture(self, work: Callable[[], None]) -> object:
        """See Gpu. Raises whatever `work` raises, and CudaError: what it queued can't be captured."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            _, graph = self._driver.cuStreamEndCapture(self._stream)  # whatever it answers, the capture has ended
            if graph is not None and int(graph):  # None: the capture was no longer valid
                self._driver.cuGraphDestroy(graph)
            raise
        graph = call("cuStreamEndCapture", self._stream)
        try:
            executable = call("cuGraphInstantiate", graph, 0)
        finally:
            call("cuGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """See Gpu."""
        call("cuGraphLaunch", graph, self._stream)

    def close(self) -> None:
        """See Gpu."""
        self.use()
        self.synchronize()
        for graph in self._graphs:
            call("cuGraphExecDestroy", graph)
        for address in self._memory:
            call("cuMemFree", address)
        for address in self._pinned:
            call("cuMemFreeHost", address)
        call("cuStreamDestroy", self._stream)
        call("cuDevicePrimaryCtxRelease", self._device)
        self._graphs, self._memory, self._pinned = [], [], []
