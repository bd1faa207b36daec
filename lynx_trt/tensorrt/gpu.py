"""The GPUs of this machine, asked of the driver itself: no torch, no CUDA toolkit.

And the GPUs that each of the two products of TensorRT runs on, in one place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

# CUdevice_attribute of the CUDA driver API.
MAJOR, MINOR = 75, 76

PRODUCTS = {"full": "TensorRT", "rtx": "TensorRT for RTX"}
# TensorRT for RTX builds for any GPU without complaint, and refuses to load the engine elsewhere: its 1.7.1 said on an
# H200 "Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0" (2026-11-26). Neither Hopper nor SM 100 is one.
RTX_SMS, RTX_FROM = (80, 86, 89), 120
WAY_OUT = "build on the machine with that GPU, with full TensorRT there: pip install tensorrt"


def unsupported(flavor: str, sms: Sequence[int]) -> str | None:
    """Which of some SMs a product's engines do not run on, and the way out, as a clause; None: they run on all.

    Full TensorRT runs on every GPU that there are kernels for.
    """
    wrong = [sm for sm in sms if not (sm in RTX_SMS or sm >= RTX_FROM)] if flavor == "rtx" else []
    if not wrong:
        return None
    runs = _list((*RTX_SMS, RTX_FROM))
    return f"engines of {PRODUCTS['rtx']} run on SM {runs} and later, not on SM {_list(wrong)}; {WAY_OUT}"


def unbuildable(flavor: str, sms: Sequence[int]) -> str | None:
    """Which of some SMs an engine that a product builds here can't run on, as a clause; None: it can run on all.

    Full TensorRT builds for the GPU that it runs on, the first of the machine.
    """
    here = compute_capabilities()[:1] if flavor == "full" else []
    if here and (wrong := [sm for sm in sms if sm not in here]):
        return f"full TensorRT builds for the GPU it runs on, SM {here[0]} here, not for SM {_list(wrong)}; {WAY_OUT}"
    return unsupported(flavor, sms)


def compute_capabilities() -> list[int]:
    """SM of each GPU, 90 for an H100; empty where there is no GPU or no driver."""
    found = []
    for driver, device in _devices():
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
        found.append(10 * major.value + minor.value)
    return found


def memory_bytes() -> int | None:
    """Bytes of memory of the first GPU, in use or not; None where there is none."""
    for driver, device in _devices():
        size = ctypes.c_size_t()
        if driver.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0:
            return size.value
    return None


def _devices() -> Iterator[tuple[ctypes.CDLL, ctypes.c_int]]:
    """The driver and a handle, for each GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return
    for ordinal in range(count.value):
        device = ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), ordinal) == 0:
            yield driver, device


def _list(sms: Sequence[int]) -> str:
    return ", ".join(map(str, sms))
