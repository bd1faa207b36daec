"""Expert weights in the layout that LynxExperts wants, made one expert at a time.

Foreign graphs keep an expert's matrices apart, transposed, sliced out of larger tensors, or quantized. A `Stack` says
how one expert's rows come about; its bytes are made while they are written, so that the memory needed is that of one
expert and not of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.errors import CheckpointError

# Bytes of float32 that a table makes at a time.
_ROWS_BYTES = 1 << 25

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Array = NDArray[Any]


@dataclass(frozen=True)
class Stack:
    """A tensor of `shape` [E, ...] and `dtype` whose part for one expert is made by `expert(e)` when it is written."""

    shape: tuple[int, ...]
    dtype: ir.DataType
    expert: Callable[[int], Array]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        elements = int(np.prod(self.shape, dtype=np.int64))
        return elements * self.dtype.bitwidth // 8

    def pieces(self) -> Iterator[memoryview]:
        """The tensor's bytes, an expert at a time."""
        for number in range(self.shape[0]):
            array = np.ascontiguousarray(convert(self.expert(number), self.dtype))
            if array.shape != self.shape[1:]:
                raise AssertionError(f"expert {number} came out as {array.shape}, not {self.shape[1:]}")
            yield _bytes(array)

    def numpy(self) -> Array:
        """All of it, for small tensors and tests."""
        return np.stack([convert(self.expert(number), self.dtype) for number in range(self.shape[0])])


@dataclass(frozen=True)
class Table:
    """A tensor of `shape` [rows, columns] of which `read(start, stop)` makes some rows when they are written."""

    shape: tuple[int, int]
    dtype: ir.DataType
    read: Callable[[int, int], Array]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape[0] * self.shape[1] * self.dtype.bitwidth // 8

    def pieces(self) -> Iterator[memoryview]:
        """The tensor's bytes, some rows at a time."""
        step = max(1, _ROWS_BYTES // max(4 * self.shape[1], 1))
        for start in range(0, self.shape[0], step):
            array = np.ascontiguousarray(convert(self.read(start, min(start + step, self.shape[0])), self.dtype))
            yield _bytes(array)

    def numpy(self) -> Array:
        """All of it, for small tensors and tests."""
        return convert(self.read(0, self.shape[0]), self.dtype)


def _bytes(array: Array) -> memoryview:
    data: Any = array.view(np.uint8).reshape(-1)
    return memoryview(data)


def sizes_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a stored tensor, which has no open dimensions."""
    return tuple(int(str(size)) for size in tensor.shape)


def convert(array: Array, dtype: ir.DataType) -> Array:
    """`array` as `dtype`; beyond its range is infinite, as it is for a Cast."""
    wanted = dtype.numpy()
    if array.dtype == wanted:
        return array
    with np.errstate(over="ignore"):
        return array.astype(wanted)


@dataclass(frozen=True)
class View:
    """Elements of a stored tensor: their first one and the step (both in elements) along each axis.

    Whatever transposes, slices, splits and reshapes a weight without computing is such a view of it.
    """

    tensor: ir.TensorProtocol
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: ir.TensorProtocol) -> View:
        """The tensor as it is stored, row-major."""
        shape = sizes_of(tensor)
        return cls(tensor, 0, shape, row_major(shape))

    @property
    def is_whole(self) -> bool:
        """Whether it is the stored tensor, element by element."""
        stored = sizes_of(self.tensor)
        return self.offset == 0 and self.shape == stored and self.strides == row_major(stored)

    def transpose(self, permutation: Sequence[int]) -> View:
        """Axes in another order."""
        return View(
            self.tensor,
            self.offset,
            tuple(self.shape[axis] for axis in permutation),
            tuple(self.strides[axis] for axis in permutation),
        )

    def take(self, axis: int, start: int, stop: int, step: int = 1) -> View:
        """`start:stop:step` along an axis; the step is positive, the bounds lie within."""
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + start * strides[axis]
        shape[axis] = max(0, -(-(stop - start) // step))
        strides[axis] *= step
        return View(self.tensor, offset, tuple(shape), tuple(strides))

    def select(self, axis: int, index: int) -> View:
        """One index of an axis, which goes."""
        taken = self.take(axis, index, index + 1)
        return taken.drop(axis)

    def drop(self, axis: int) -> View:
        """Without an axis of size 1."""
        shape, strides = list(self.shape), list(self.strides)
        del shape[axis], strides[axis]
        return View(self.tensor, self.offset, tuple(shape), tuple(strides))

    def insert(self, axis: int) -> View:
        """With a new axis of size 1."""
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(axis, 1)
        strides.insert(axis, 0)
        return View(self.tensor, self.offset, tuple(shape), tuple(strides))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The same elements in another shape, or None where that is no view (it would need a copy)."""
        wanted, strides = tuple(shape), _reshaped_strides(self.shape, self.strides, tuple(shape))
        return None if strides is None else View(self.tensor, self.offset, wanted, strides)

    def read(self) -> Array:
        """The elements, to be read alone. Of a tensor in a data file, only the span they lie in is read."""
        if not all(self.shape):
            return np.empty(self.shape, self.tensor.dtype.numpy())
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        flat = read_elements(self.tensor, self.offset, span)
        itemsize = flat.dtype.itemsize
        strides = tuple(stride * itemsize for stride in self.strides)
        # Not copied: what is stored transposed and wanted so is then moved once, and not twice.
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Steps in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _reshaped_strides(
    old_shape: tuple[int, ...], old_strides: tuple[int, ...], new_shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides for `new_shape`: axes are merged where they follow each other in memory, and split at will."""
    # Runs of old axes that are contiguous among themselves, sizes of 1 left out.
    runs: list[tuple[int, int]] = []  # (elements, step of the innermost)
    for size, stride in zip(old_shape, old_strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    strides: list[int] = []
    run, left = 0, runs[0][0] if runs else 1
    for size in new_shape:
        if size == 1:
            strides.append(0)
            continue
        if left == 1 and run + 1 < len(runs):
            run += 1
            left = runs[run][0]
        if left % size:
            return None
        left //= size
        strides.append(left * runs[run][1])
    return tuple(strides) if left == 1 and run + 1 >= len(runs) else None


def read_elements(tensor: ir.TensorProtocol, start: int, count: int) -> Array:
    """`count` elements of a stored tensor from `start` on; of a data file, nothing else is read.

    Raises:
        CheckpointError: the data file can't be read.
    """
    import onnx_ir as ir

    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
        return np.asarray(tensor.numpy()).reshape(-1)[start : start + count]
    dtype = tensor.dtype.numpy()
    path = Path(tensor.path)
    try:
        with path.open("rb") as stream:
            stream.seek((tensor.offset or 0) + start * dtype.itemsize)
            data = stream.read(count * dtype.itemsize)
    except OSError as error:
        raise CheckpointError(f"can't read the weights in {path}: {error.strerror or error}") from None
    if len(data) < count * dtype.itemsize:
        raise CheckpointError(f"the weights in {path} end before those of {tensor.name!r} do; copy the file again")
    return np.frombuffer(data, dtype)


def read_tensor(tensor: ir.TensorProtocol) -> Array:
    """A stored tensor whole.

    onnx-ir's own reading refuses files that are links, which data files in model caches are.
    """
    shape = sizes_of(tensor)
    return read_elements(tensor, 0, int(np.prod(shape, dtype=np.int64))).reshape(shape)
