"""What the Triton language's interpreter lacks for our kernels: bfloat16 operands, instructions written out, clusters.

The interpreter runs the programs of a launch one after another. Those of a cluster become threads, of which one runs at
a time: each up to where it meets the others, then the next.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl  # the interpreter looks for it in the module of what it runs
from triton.runtime import interpreter

from lynx_trt import fp8, int4, mxfp4, nvfp4
from lynx_trt.plugins.cluster import meet
from lynx_trt.plugins.experts_fp4 import dequantize_fp4
from lynx_trt.plugins.experts_fp8 import widen_fp8
from lynx_trt.plugins.experts_int4 import dequantize_int4


def prepare() -> None:
    """Let the interpreter multiply bfloat16: that of triton 3.9 takes the bits of such an operand for numbers."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "lynx_dot", None):
        return
    original = builder.create_dot

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, widen(a), widen(b), *others)

    builder.create_dot = create_dot
    builder.lynx_dot = True


def as_cluster(kernel: Any, programs: int) -> Callable[..., Any]:
    """A kernel's launch as a cluster of so many programs; it takes the kernel's arguments.

    Raises RuntimeError when launched: not all programs meet as often.
    """
    function = kernel.rewrite()
    waiting: list[_Program] = []

    @functools.wraps(function)
    def start(**arguments: Any) -> None:
        waiting.append(_Program(function, arguments))
        if len(waiting) < programs:
            return
        goes_on = [True]
        while any(goes_on):
            goes_on = [each.advance() for each in waiting]
            if len(set(goes_on)) > 1:
                raise RuntimeError("some programs of a cluster meet more often than others")

    # That of a wrapped function would be read from the wrapper's own parameters.
    start.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return interpreter.GridExecutor(start, kernel.arg_names, (programs,))  # type: ignore[no-any-return]


class _Program:
    """A program of a cluster, in a thread that only runs while `advance` waits for it."""

    current: _Program | None = None

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._place = interpreter.interpreter_builder.grid_idx
        self._goes, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self._thread.start()

    def advance(self) -> bool:
        """Run up to the next meeting, or to the end: whether it goes on after that. Raises what the program raises."""
        _Program.current = self
        interpreter.interpreter_builder.set_grid_idx(*self._place)
        self._goes.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return not self._ended

    _ended = False

    def meet(self) -> None:
        """Wait for the next `advance`."""
        self._stopped.release()
        self._goes.acquire()

    def _run(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._goes.acquire()
        try:
            function(**arguments)
        except BaseException as error:  # raised where the launch is
            self._error = error
        self._ended = True
        self._stopped.release()


def _meet() -> None:
    if _Program.current is not None:
        _Program.current.meet()


def _dequantize_fp4(packed: Any, scale: Any, dtype: Any, *_sizes: Any) -> tuple[Any, Any]:
    data = packed.handle.data.view(np.int8)
    if scale.dtype.scalar == tl.int8:
        values = mxfp4.dequantize(data, scale.handle.data.view(np.int8).reshape(len(data), -1))
    else:
        values = nvfp4.dequantize(data, _numbers(scale).reshape(len(data), -1))
    return _rounded(values[:, 0::2], dtype), _rounded(values[:, 1::2], dtype)


def _dequantize_int4(packed: Any, scale: Any, zero: Any, dtype: Any, zeros: Any, *_sizes: Any) -> tuple[Any, Any]:
    data = packed.handle.data.view(np.int8)
    beside = [_numbers(each).reshape(len(data), -1) for each in ((scale, zero) if zeros else (scale,))]
    block = 2 * data.shape[1] // beside[0].shape[1]
    values = int4.dequantize(data, np.concatenate(beside, axis=1), block=block, zeros=bool(zeros))
    return _rounded(values[:, 0::2], dtype), _rounded(values[:, 1::2], dtype)


def _widen_fp8(packed: Any, dtype: Any) -> Any:
    return _rounded(fp8.VALUES[packed.handle.data.view(np.uint8)], dtype)


def _numbers(block: Any) -> Any:
    """A block of a 16-bit type as float32."""
    if block.dtype.scalar == tl.bfloat16:
        return (block.handle.data.astype(np.uint32) << 16).view(np.float32)
    return block.handle.data.astype(np.float32)


def _rounded(values: Any, dtype: Any) -> Any:
    """A block of float32 as one of a 16-bit type, bfloat16 in its bits as the interpreter has it."""
    if dtype == tl.bfloat16:  # to the nearest, of two the even one
        bits = values.astype(np.float32).view(np.uint32)
        data = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    else:
        data = values.astype(np.float16)
    return tl.tensor(interpreter.TensorHandle(data, dtype), tl.block_type(dtype, list(values.shape)))


if isinstance(meet, interpreter.InterpretedFunction):
    # In place of the hardware's instructions.
    interpreter.InterpretedFunction.rewritten_fn[meet.fn] = _meet
    interpreter.InterpretedFunction.rewritten_fn[dequantize_fp4.fn] = _dequantize_fp4
    interpreter.InterpretedFunction.rewritten_fn[dequantize_int4.fn] = _dequantize_int4
    interpreter.InterpretedFunction.rewritten_fn[widen_fp8.fn] = _widen_fp8
