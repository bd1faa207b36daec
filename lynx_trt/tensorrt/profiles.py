"""Optimization profiles: the ranges of the dynamic dimensions that an engine is built for.

One engine has two: `decode` (one token a sequence) and `prefill` (many), the weights stored once for both. In the
lynx graph the dynamic dimensions are named "batch" (sequences, B) and "sequence" (tokens a sequence in this step,
S); everything else, the cache's maximum length too, is static.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lynx_trt.errors import TensorRTError, UsageError

BATCH = "batch"
SEQUENCE = "sequence"
LARGEST = 999_999_999  # of a range: no machine comes near, and a product of two still fits 64 bits

Shape = tuple[int, ...]
Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest size of one dimension; TensorRT tunes its kernels for `opt`.

    Raises UsageError unless 1 <= min <= opt <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(f"the range {self} is not valid: it is MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX")

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read "1:8:64", or "8" for 8:8:8. Raises UsageError."""
        if not re.fullmatch(r"\s*\d+\s*(:\s*\d+\s*:\s*\d+\s*)?", text, re.ASCII):
            raise UsageError(f"the range {text!r} can't be read: write MIN:OPT:MAX, say 1:8:64, or one number")
        if re.search(rf"\d{{{len(str(LARGEST)) + 1}}}", text):
            raise UsageError(f"the range {text!r} is too large: its numbers are at most {LARGEST}")
        numbers = [int(part) for part in text.split(":")]
        return cls(*(numbers * 3 if len(numbers) == 1 else numbers))

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class Profile:
    """One optimization profile: for each dynamic input its smallest, best and largest shape."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


def decode_and_prefill(
    inputs: Mapping[str, Dims], *, decode_batch: Range, prefill_batch: Range, prefill_length: Range
) -> tuple[Profile, Profile]:
    """The two profiles of a lynx graph.

    `inputs` gives the dimensions of each graph input, as `prepare.input_dims` reads them: ints, or the names of
    dynamic ones ("batch", "sequence").

    Raises UsageError (a prefill longer than the cache) and TensorRTError (a dynamic dimension that is neither).
    """
    cache = min((dims[2] for name, dims in inputs.items() if _is_cache(name, dims)), default=None)
    if isinstance(cache, int) and prefill_length.max > cache:
        raise UsageError(
            f"a prefill of {prefill_length.max} tokens (the prefill length is {prefill_length}) does not fit into "
            f"the cache of {cache}: lower the prefill length to {cache} or less, or export with a larger maximum length"
        )
    decode = {BATCH: decode_batch, SEQUENCE: Range(1, 1, 1)}
    prefill = {BATCH: prefill_batch, SEQUENCE: prefill_length}
    return _profile("decode", inputs, decode), _profile("prefill", inputs, prefill)


def check(profiles: Sequence[Profile], inputs: Mapping[str, Dims]) -> None:
    """Each profile gives each dynamic input of the graph shapes that fit it.

    Raises UsageError, naming the profile, the input, what was given and what the graph has.
    """
    dynamic = {name: dims for name, dims in inputs.items() if any(isinstance(dim, str) for dim in dims)}
    if dynamic and not profiles:
        raise UsageError(f"the inputs {', '.join(dynamic)} are dynamic, and no optimization profile was given")
    for profile in profiles:
        for name, dims in dynamic.items():
            if name not in profile.shapes:
                raise UsageError(f"profile {profile.name} lacks the dynamic input {name} {_show(dims)}")
        for name, shapes in profile.shapes.items():
            if name not in inputs:
                raise UsageError(
                    f"profile {profile.name} names the input {name}, which the graph lacks; it has {', '.join(inputs)}"
                )
            _check_shapes(profile.name, name, shapes, inputs[name])


def _check_shapes(profile: str, name: str, shapes: tuple[Shape, Shape, Shape], dims: Dims) -> None:
    what = f"profile {profile}, input {name} {_show(dims)}"
    for shape in shapes:
        if len(shape) != len(dims) or any(
            isinstance(dim, int) and dim != size for dim, size in zip(dims, shape, strict=True)
        ):
            raise UsageError(f"{what}: the shape {_show(shape)} does not fit")
    for smallest, best, largest in zip(*shapes, strict=True):
        if not 0 <= smallest <= best <= largest:
            minimum, optimum, maximum = map(_show, shapes)
            raise UsageError(f"{what}: min {minimum}, opt {optimum}, max {maximum}; it has to be min <= opt <= max")


def _is_cache(name: str, dims: Dims) -> bool:
    return name.startswith("past_key_values.") and len(dims) == 4 and isinstance(dims[2], int)


def _profile(name: str, inputs: Mapping[str, Dims], ranges: Mapping[str, Range]) -> Profile:
    shapes: dict[str, tuple[Shape, Shape, Shape]] = {}
    for tensor, dims in inputs.items():
        if all(isinstance(dim, int) for dim in dims):
            continue
        sizes = [_range(tensor, dims, dim, ranges) for dim in dims]
        shapes[tensor] = (
            tuple(size.min for size in sizes),
            tuple(size.opt for size in sizes),
            tuple(size.max for size in sizes),
        )
    return Profile(name, shapes)


def _range(tensor: str, dims: Dims, dim: int | str, ranges: Mapping[str, Range]) -> Range:
    if isinstance(dim, int):
        return Range(dim, dim, dim)
    if dim not in ranges:
        raise TensorRTError(
            f"input {tensor} {_show(dims)} has the dynamic dimension {dim!r}; a lynx graph has {' and '.join(ranges)} "
            "only: export it with this version of lynx-trt"
        )
    return ranges[dim]


def _show(dims: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, dims))}]"
