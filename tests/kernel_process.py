"""Kernels on whatever this machine has: on its GPU in this process, else interpreted in a process of their own.

With LYNX_EMULATED_SM in the environment they run on an emulated GPU of that SM, as compiled (`emulator`).

The Triton language decides when it is imported whether it interprets, and something else may have imported it. So the
interpreter gets a process, which imports it afresh; functions and tensors travel there and results back.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest import mock

import torch
from emulator import EmulatedGpu

from lynx_trt.plugins import execute
from lynx_trt.plugins.launch import CLUSTER_SM

Result = TypeVar("Result")

EMULATED_SM = int(os.environ.get("LYNX_EMULATED_SM", 0))
# Whether programs can wait for each other where kernels run here.
CLUSTERS = not 0 < EMULATED_SM < CLUSTER_SM
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call a function of a module that imports no kernels by itself, with tensors on the device; results on the CPU."""
    if EMULATED_SM:
        return emulated(EMULATED_SM, function, *arguments, **options)
    if DEVICE == "cuda":
        return _map(function(*_map(arguments, DEVICE), **_map(options, DEVICE)), "cpu")
    return interpreted(function, *arguments, **options)


def interpreted(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call it where kernels are interpreted, whatever this machine has."""
    return _process().submit(function, *arguments, **options).result()


def emulated(sm: int, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call it with an emulated GPU of some SM in place of the interpreter."""
    gpu = _emulated(sm)
    with (
        mock.patch.object(execute, "run", gpu.run),
        mock.patch.object(execute, "sm_of", return_value=sm),
    ):
        return function(*arguments, **options)


@functools.cache
def _emulated(sm: int) -> EmulatedGpu:
    return EmulatedGpu(sm)


@functools.cache
def _process() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)
    atexit.register(pool.shutdown)
    return pool


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    # Two processes share few cores; and what NumPy thinks of exp(-x) overflowing, or of NaN, is not for the reader.
    torch.set_num_threads(1)
    import numpy as np

    np.seterr(all="ignore")


def _map(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(each, device) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(each, device) for each in value)
    if isinstance(value, dict):
        return {name: _map(each, device) for name, each in value.items()}
    return value
