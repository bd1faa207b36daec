"""The CUDA driver API through `cuda-python`, as far as a launcher needs it; `call` is for others too."""

from __future__ import annotations

import functools
from typing import Any

from lynx_trt.errors import TensorRTError
from lynx_trt.plugins.blob import Cubin
from lynx_trt.plugins.launcher import Device, Launch

INSTALL = 'pip install "cuda-python>=12.8"'

# A function may use this much dynamic shared memory without being allowed more.
_SHARED_BY_DEFAULT = 48 * 1024


class CudaError(TensorRTError):
    """The driver refused a call; `name` is CUDA's name for the error."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


@functools.cache
def bindings() -> Any:
    """`cuda.bindings.driver`. Raises TensorRTError: `cuda-python` is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise TensorRTError(
            f"lynx-trt reaches the GPU through cuda-python, which is not installed: {INSTALL}"
        ) from error
    return driver


def call(name: str, *arguments: Any) -> Any:
    """The result of a function of the driver, None if it has none.

    Raises CudaError: CUDA says no. Raises TensorRTError: there is no driver, or no `cuda-python`.
    """
    cuda = bindings()
    try:
        error, *results = getattr(cuda, name)(*arguments)
    except RuntimeError as missing:  # the bindings open libcuda at the first call
        raise TensorRTError(f"the CUDA driver can't be used ({missing}): is an NVIDIA driver installed?") from missing
    if error != cuda.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{name} failed: {error.name} ({int(error)})", error.name)
    return results[0] if results else None


class CudaDriver:
    """Launches on the current context, which is TensorRT's.

    Raises TensorRTError: `cuda-python` is not installed, or CUDA says no; the message has CUDA's name for the error.
    """

    def __init__(self) -> None:
        self._cuda: Any = bindings()
        # By context and cubin. A module lives as long as its context: it is never unloaded.
        self._functions: dict[tuple[int, int], tuple[Cubin, Any]] = {}

    def device(self) -> Device:
        """The GPU of the current context."""
        cuda = self._cuda
        context = call("cuCtxGetCurrent")
        ordinal = call("cuCtxGetDevice")
        kinds = cuda.CUdevice_attribute
        major, minor, count = (
            call("cuDeviceGetAttribute", kind, ordinal)
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        return Device(10 * major + minor, count, int(call("cuCtxGetId", context)))

    def load(self, cubin: Cubin, device: Device) -> int:
        """The handle of a cubin's function in the current context; loaded once in each."""
        key = (device.context, id(cubin))  # the entry keeps the cubin, so its id stays its own
        if key not in self._functions:
            module = call("cuModuleLoadData", cubin.image)
            function = call("cuModuleGetFunction", module, cubin.entry.encode())
            if cubin.shared > _SHARED_BY_DEFAULT:
                kind = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                call("cuFuncSetAttribute", function, kind, cubin.shared)
            self._functions[key] = cubin, function
        return int(self._functions[key][1])

    def launch(self, launch: Launch, stream: int) -> None:
        """Launch on a stream, without waiting."""
        if launch.config is None:
            launch.config = self._config(launch)
        launch.config.hStream = stream
        call("cuLaunchKernelEx", launch.config, launch.function, launch.parameters, 0)

    def _config(self, launch: Launch) -> Any:
        cuda = self._cuda
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared
        attributes = []
        if launch.programmatic:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if launch.cluster:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            sizes = attribute.value.clusterDim
            sizes.x, sizes.y, sizes.z = launch.programs, 1, 1
            attributes.append(attribute)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        return config


@functools.cache
def cuda_driver() -> CudaDriver:
    """The one driver of the process, so that a cubin is loaded once for all nodes."""
    return CudaDriver()
