"""`lynx_trt.runtime.cuda` through the real cuda-python, on a driver whose device memory is the host's (host_cuda.c)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "cpp" / "host_cuda.c"

SCRIPT = """
import sys
import numpy as np
from lynx_trt.errors import TensorRTError
from lynx_trt.plugins.cuda_driver import CudaError
from lynx_trt.runtime.cuda import Cuda

gpu = Cuda()
assert gpu.stream == 0x57
pinned = gpu.pinned(64)
pinned[:] = np.arange(64)
address = gpu.allocate(64, "a test")
assert address % 256 == 0

def held():
    back = np.zeros(64, np.uint8)
    gpu.download(back, address)
    gpu.synchronize()
    return back

gpu.upload(address, pinned)
assert (held() == np.arange(64)).all()
# Three rows of 4 bytes, 16 apart, to where the fourth byte of each row's end is: what is between stays.
gpu.copy_rows(address + 8, address, 4, 16, 3)
expected = np.arange(64)
for row in range(3):
    expected[row * 16 + 8 : row * 16 + 12] = expected[row * 16 : row * 16 + 4]
assert (held() == expected).all()
gpu.zero(address + 60, 4)
expected[60:] = 0
assert (held() == expected).all()

def work():
    gpu.zero(address, 4)
    gpu.copy_rows(address + 4, address, 4, 16, 1)

graph = gpu.capture(work)
assert (held() == expected).all(), "capturing does nothing yet"
gpu.launch(graph)
expected[:8] = 0
assert (held() == expected).all()
assert gpu.timed(work) == 0.25

def failing():
    raise ZeroDivisionError

try:
    gpu.capture(failing)
    raise AssertionError("nothing raised")
except ZeroDivisionError:
    gpu.synchronize()  # the capture has ended

import ctypes
ctypes.CDLL(None).setenv(b"FAKE_REFUSE_CAPTURE", b"1", 1)
try:
    gpu.capture(work)
    raise AssertionError("nothing raised")
except CudaError as error:
    assert str(error).startswith("cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)"), error
gpu.synchronize()
try:
    gpu.capture(failing)  # the driver has no graph then
    raise AssertionError("nothing raised")
except ZeroDivisionError:
    gpu.synchronize()

try:
    gpu.allocate(2 << 30, "the caches of 9 sequences")
    raise AssertionError("nothing raised")
except TensorRTError as error:
    assert "no room for the caches of 9 sequences: 2.15 GB are wanted and 1.07 GB are free" in str(error), error
gpu.close()
"""


def test_memory_copies_graphs_and_errors(tmp_path: Path) -> None:
    """Every call that the backend makes; at the end everything that was made has been given back, but for the graphs
    of the captures that the driver refused, which are its own."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip('cuda-python is not installed: pip install "cuda-python>=12.8"')
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    library = tmp_path / "libcuda.so.1"
    compiled = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", str(SOURCE), "-ldl", "-o", str(library)]
    subprocess.run(compiled, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "live 2\n"
