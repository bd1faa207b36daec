"""Weights of somebody else's ONNX file that are no numbers, looked for before anything is written.

By the bits of the exponent, which are all set in NaN and the infinities alone: as fast as the file is read (10 GB/s of
what is in memory, whatever the type), where NumPy's extremes of fp16 come at 0.1 GB/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.errors import CheckpointError
from lynx_trt.export.relayout import read_elements, sizes_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# Types of weights and scales, with an integer of their size and the bits of the exponent. Integers are always numbers.
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "BFLOAT16": (np.uint16, 0x7F80),
    "FLOAT16": (np.uint16, 0x7C00),
    "FLOAT": (np.uint32, 0x7F80_0000),
    "DOUBLE": (np.uint64, 0x7FF0_0000_0000_0000),
}
# Elements looked at together: they stay in the processor's cache, and memory for them is all that is needed.
_PIECE = 1 << 18


def stored_tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    """What the file holds as numbers, in the graph and its subgraphs: initializers and `Constant` nodes."""
    found = [
        value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    for node in model.graph.all_nodes():
        constant = node.attributes.get("value") if node.op_type == "Constant" else None
        if constant is not None and constant.type.name == "TENSOR":
            found.append(constant.value)
    return found


def refuse_not_finite(
    tensors: list[ir.TensorProtocol], path: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Raise if a weight holds NaN or an infinity; a single number is a constant and no weight.

    Minus infinity is a value like others where it masks: in vectors (biases, sinks), and where all else is one value.

    Args:
        tensors: of the ONNX file `path`; each is read once, a piece at a time.
        path: for the message.
        on_progress: called with bytes done and bytes of all.

    Raises:
        CheckpointError: with the tensor, the first such value, its coordinates, and the file. Or a file can't be read.
    """
    weights = [tensor for tensor in tensors if tensor.dtype.name in _EXPONENTS and tensor.size > 1]
    total, done = sum(tensor.nbytes for tensor in weights), 0
    for tensor in weights:
        if any(_suspect(piece, tensor).any() for _, piece in _pieces(tensor)):
            _refuse(tensor, path)
        done += tensor.nbytes
        if on_progress:
            on_progress(done, total)


def _pieces(tensor: ir.TensorProtocol) -> Iterator[tuple[int, NDArray[Any]]]:
    """Some elements at a time, and the number of the first of them."""
    import onnx_ir as ir

    # Inside the .onnx file the values are in memory already; asked for once, since some forms are made anew each time.
    whole = None if isinstance(tensor, ir.ExternalTensor) else tensor.numpy().reshape(-1)
    for start in range(0, tensor.size, _PIECE):
        count = min(_PIECE, tensor.size - start)
        yield start, read_elements(tensor, start, count) if whole is None else whole[start : start + count]


def _suspect(piece: NDArray[Any], tensor: ir.TensorProtocol) -> NDArray[np.bool_]:
    """Which elements are NaN or an infinity."""
    integer, exponent = _EXPONENTS[tensor.dtype.name]
    bits = piece.view(integer) & integer(exponent)
    # The extreme first: comparing each takes twice the time, and nearly always there is none.
    return bits == exponent if bits.max() == exponent else np.zeros(0, np.bool_)


def _refuse(tensor: ir.TensorProtocol, path: Path) -> None:
    import onnx_ir as ir

    masks = tensor.shape.rank() == 1 or _is_mask(tensor)
    for start, piece in _pieces(tensor):
        wrong = _suspect(piece, tensor)
        if masks and wrong.size:
            wrong = wrong & (piece != -np.inf)
        if not wrong.any():
            continue
        first = int(wrong.argmax())
        at = [int(place) for place in np.unravel_index(start + first, sizes_of(tensor))]
        where = f" in {path.parent / tensor.location}" if isinstance(tensor, ir.ExternalTensor) else ""
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r}{where} holds {float(piece[first]):.6g} at {at}, so its weights are "
            "broken; export it again, or copy it again from where it came from"
        )


def _is_mask(tensor: ir.TensorProtocol) -> bool:
    """Whether its numbers are all the same, as in the mask of a causal attention."""
    others: set[float] = set()
    for _, piece in _pieces(tensor):
        others.update(np.unique(piece[np.isfinite(piece)].astype(np.float64))[:2].tolist())
        if len(others) > 1:
            return False
    return True
