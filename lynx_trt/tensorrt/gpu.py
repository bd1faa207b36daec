"""The GPUs of this machine, asked of the driver itself: no torch, no CUDA toolkit."""

from __future__ import annotations

import ctypes

# CUdevice_attribute of the CUDA driver API.
MAJOR, MINOR = 75, 76


def compute_capabilities() -> list[int]:
    """SM of each GPU, 90 for an H100; empty where there is no GPU or no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
            continue
        driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
        found.append(10 * major.value + minor.value)
    return found
