"""Optimization profiles for graphs with inputs of their own: what each dynamic dimension is, told by where it stands.

Sequences, tokens of the step, tokens in the cache before it, and both together: exporters name these dimensions as they
like, so an input's own name and axis come first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lynx_trt.errors import UsageError
from lynx_trt.tensorrt.profiles import Dims, Profile, Range, Shape

_SEQUENCES, _TOKENS, _PAST, _TOTAL = "batch", "sequence", "past", "total"
# (input's name, axis) -> what it is; the first that matches counts.
_BY_PLACE = (
    (r"(input_ids|position_ids|token_mask|inputs_embeds)$", {0: _SEQUENCES, 1: _TOKENS}),
    (r"attention_mask$", {0: _SEQUENCES, 1: _TOTAL}),
    (r"^past.*(key|value)", {0: _SEQUENCES, 2: _PAST}),
    (r"^past", {0: _SEQUENCES}),
)
_BY_NAME = (
    (r"total|\+|kv_len|past.*seq.*seq", _TOTAL),
    (r"past|cache|history", _PAST),
    (r"batch", _SEQUENCES),
    (r"seq|length|token|^s$", _TOKENS),
)


def profiles(
    inputs: Mapping[str, Dims], *, decode_batch: Range, prefill_batch: Range, prefill_length: Range, max_length: int
) -> tuple[Profile, Profile]:
    """The decode and prefill profiles of a graph with these inputs.

    Raises:
        UsageError: a dynamic dimension that is none of the known ones; its input is named.
    """
    past = Range(1, max(max_length // 2, 1), max(max_length - 1, 1))
    decode = {
        _SEQUENCES: decode_batch,
        _TOKENS: Range(1, 1, 1),
        _PAST: past,
        _TOTAL: Range(2, past.opt + 1, max(max_length, 2)),
    }
    prefill = {
        _SEQUENCES: prefill_batch,
        _TOKENS: prefill_length,
        _TOTAL: Range(prefill_length.min, prefill_length.opt, max(max_length, prefill_length.max)),
    }
    if not any(name.startswith("past") for name in inputs):  # without a cache, a mask is of the step's tokens
        decode[_TOTAL], prefill[_TOTAL] = decode[_TOKENS], prefill[_TOKENS]
    return _profile("decode", inputs, decode, max_length), _profile("prefill", inputs, prefill, max_length)


def _profile(name: str, inputs: Mapping[str, Dims], ranges: Mapping[str, Range], max_length: int) -> Profile:
    shapes: dict[str, tuple[Shape, Shape, Shape]] = {}
    for tensor, dims in inputs.items():
        if all(isinstance(dim, int) for dim in dims):
            continue
        sizes = [_sizes(tensor, dims, axis, ranges, max_length) for axis in range(len(dims))]
        smallest, best, largest = (tuple(size[at] for size in sizes) for at in range(3))
        shapes[tensor] = (smallest, best, largest)
    return Profile(name, shapes)


def _sizes(tensor: str, dims: Dims, axis: int, ranges: Mapping[str, Range], max_length: int) -> Shape:
    dim = dims[axis]
    if isinstance(dim, int):
        return dim, dim, dim
    what = _meaning(tensor, axis, dim)
    if what is None:
        listed = ", ".join(map(str, dims))
        raise UsageError(
            f"input {tensor} [{listed}] has the dynamic dimension {dim!r}, which is neither "
            "sequences nor tokens nor a cache's length: build with --tensorrt none, or export it with that dimension "
            "fixed"
        )
    if what == _PAST and _PAST not in ranges:  # a prompt begins with an empty cache, or goes on with a filled one
        return 0, 0, max_length
    chosen = ranges[what]
    return chosen.min, chosen.opt, chosen.max


def _meaning(tensor: str, axis: int, dim: str) -> str | None:
    for pattern, axes in _BY_PLACE:
        if re.search(pattern, tensor) and axis in axes:
            return axes[axis]
    return next((what for pattern, what in _BY_NAME if re.search(pattern, dim.lower())), None)
