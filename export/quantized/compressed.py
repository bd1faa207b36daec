"""compressed-tensors (llm-compressor): FP8 and int8 weights as they are, int4 and int8 packed into int32; NVFP4.

`config_groups` say how weights are quantized, each group for its `targets`; which weights are is seen by their scales.

- float-quantized, int-quantized, naive-quantized: `NAME` float8_e4m3 or int8 [R,C], `NAME_scale`, `NAME_zero_point`.
- pack-quantized: `NAME_packed` int32 [R,C*bits/32], the first value in the lowest bits, each plus 2^(bits-1);
  `NAME_scale` [R,G]; `NAME_zero_point` int32 [R*bits/32,G], packed down the rows the same way; `NAME_g_idx` [C], the
  group of each column, where columns were reordered.
- nvfp4-pack-quantized: `NAME_packed` uint8, `NAME_scale` float8_e4m3, `NAME_global_scale` float32 (nvfp4.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lynx_trt import int4
from lynx_trt.errors import CheckpointError, UnsupportedModelError
from lynx_trt.export.quantized import nvfp4
from lynx_trt.export.quantized.computed import ANOTHER, ComputedTensor, Index, beside, fields_of, refuse_misfits
from lynx_trt.export.quantized.packed import unpack
from lynx_trt.export.quantized.scaled import FLOATS, FP8, ScaledTensor, block_size, fitting_block, grid_of
from lynx_trt.export.stored import Shards, StoredTensor

_SCALE, _PACKED, _ZEROS, _ORDER, _FACTOR = "_scale", "_packed", "_zero_point", "_g_idx", "_global_scale"
_BITS = (4, 8)
_NVFP4 = "nvfp4-pack-quantized"
# Formats, and the types of values that each may have.
_FORMATS = {
    "float-quantized": (FP8,),
    "int-quantized": ("I8",),
    "naive-quantized": (FP8, "I8"),
    "pack-quantized": ("I32",),
    _NVFP4: ("U8",),
}
_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class _Scheme:
    """How the weights of some modules are quantized."""

    targets: tuple[str, ...]
    format: str
    bits: int
    block: tuple[int, int] | None  # rows and columns that share a scale; None: a row, or all


@dataclass(frozen=True)
class PackedTensor(ScaledTensor):
    """A weight [R,C] whose integers are packed into int32 along its rows."""

    bits: int

    def values(self, shards: Shards, index: Index) -> torch.Tensor:
        """See ScaledTensor."""
        packed = shards.piece(self.parts["values"], index)
        return unpack(packed, self.bits)[:, : self.shape[-1]] - float(1 << (self.bits - 1))

    def zeros(self, shards: Shards) -> torch.Tensor | None:
        """See ScaledTensor."""
        if "zeros" not in self.parts:
            return None
        packed = shards.read(self.parts["zeros"])
        return unpack(packed.T, self.bits).T[: self.shape[-2]] - float(1 << (self.bits - 1))

    def pairs(self, shards: Shards) -> torch.Tensor:
        """Of 4 bits, the values as lynx_trt/int4.py has them, [R,C/2] int8: the stored bytes."""
        return shards.read(self.parts["values"]).view(torch.int8)

    def has_zeros(self, shards: Shards) -> bool:
        """Whether a zero point of those values is another than int4.ZERO."""
        zeros = self.zeros(shards)
        return zeros is not None and bool(zeros.any())

    def zeros_of_rows(self, shards: Shards, each: int) -> torch.Tensor:
        """Their zero points, as scales_of_rows has the scales."""
        zeros = self.zeros(shards)
        if zeros is None:
            return torch.full((self.shape[0], self.shape[1] // each), float(int4.ZERO))
        return self.of_rows(zeros, each) + int4.ZERO


def find(tensors: Mapping[str, StoredTensor], config: dict[str, Any]) -> Iterator[ComputedTensor]:
    """Each weight that has scales beside it.

    Raises:
        CheckpointError: `config` doesn't say how it is quantized, or its parts don't fit together.
        UnsupportedModelError: it is quantized in a form that is not known here.
    """
    schemes = _schemes(config)
    for key in tensors:
        if key.endswith(_PACKED):
            name = key.removesuffix(_PACKED)
            yield _packed(tensors, name, _scheme_of(name, schemes))
        elif key.endswith(f".weight{_SCALE}"):
            name = key.removesuffix(_SCALE)
            if name + _PACKED not in tensors:
                scheme = _scheme_of(name, schemes)
                yield (_packed if scheme.format == _NVFP4 else _plain)(tensors, name, scheme)


def _schemes(config: dict[str, Any]) -> list[_Scheme]:
    sparsity = config.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, dict) else None
    if form not in (None, "dense"):
        raise UnsupportedModelError(
            f"the checkpoint is sparse (compressed-tensors) in the format {form!r}, which this version can't read; "
            + ANOTHER
        )
    groups = config.get("config_groups")
    each: list[Any] = list(groups.values()) if isinstance(groups, dict) else [None]
    if not all(isinstance(group, dict) and isinstance(group.get("weights") or {}, dict) for group in each):
        raise CheckpointError(
            "quantization_config has no config_groups, which say how weights of compressed-tensors are stored; copy "
            "config.json again from where the checkpoint came from"
        )
    # A group without weights is for activations alone.
    return [_scheme(group, group.get("format") or config.get("format")) for group in each if group.get("weights")]


def _scheme(group: dict[str, Any], form: Any) -> _Scheme:
    weights, targets = group["weights"], group.get("targets")
    bits, strategy, size = weights.get("num_bits"), weights.get("strategy") or "tensor", weights.get("group_size")
    formats = tuple(_FORMATS)  # of what json holds, not all has a hash
    if form == _NVFP4:
        known = (bits, weights.get("type"), size) == (4, "float", nvfp4.BLOCK) and weights.get("symmetric", True)
    else:
        known = form in formats and strategy in _STRATEGIES and bits in (_BITS if form == "pack-quantized" else (8,))
    if not known:
        of_so_many = f" of {size}" if size else ""
        raise UnsupportedModelError(
            f"the checkpoint is quantized (compressed-tensors) in the format {form!r}, {bits} bits with a scale a "
            f"{strategy}{of_so_many}, which this version can't read; it can {', '.join(_FORMATS)}, in 4 (packed) or 8 "
            f"bits with a scale a {', '.join(_STRATEGIES)}, in NVFP4 one for {nvfp4.BLOCK} floats of 4 bits; {ANOTHER}"
        )
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"quantization_config has targets {targets!r}, which has to be a list of names")
    block = None
    if strategy == "block":
        block = block_size(weights.get("block_structure"), "block_structure")
    elif strategy == "group" and form != _NVFP4:
        if type(size) is not int or size < 1:
            raise CheckpointError(f"quantization_config has group_size {size!r}, which has to be a number above 0")
        block = (1, size)
    return _Scheme(tuple(targets), form, bits, block)


def _scheme_of(weight: str, schemes: list[_Scheme]) -> _Scheme:
    """The scheme of a module: one that names it, else one whose pattern it matches, else one for linear layers."""
    module = weight.rpartition(".")[0]

    def rank(target: str) -> int:
        if target == module:
            return 0
        if target.startswith("re:"):
            return 1 if _matches(target.removeprefix("re:"), module) else 3
        return 3 if "." in target else 2  # a class: of what a checkpoint holds quantized, linear layers

    ranked = [(rank(target), number) for number, scheme in enumerate(schemes) for target in scheme.targets]
    best = min(ranked, default=(3, 0))
    if best[0] == 3:
        raise CheckpointError(
            f"{weight} has scales beside it, but no group of quantization_config has {module} among its targets; copy "
            "config.json again from where the checkpoint came from"
        )
    return schemes[best[1]]


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise CheckpointError(
            f"quantization_config has the target re:{pattern}, which is no pattern ({error}); copy config.json again"
        ) from None


def _plain(tensors: Mapping[str, StoredTensor], name: str, scheme: _Scheme) -> ComputedTensor:
    values = beside(tensors, name, _FORMATS[scheme.format])
    parts = {"values": values, "scales": beside(tensors, name + _SCALE, FLOATS)}
    if name + _ZEROS in tensors and values.dtype != FP8:
        parts["zeros"] = beside(tensors, name + _ZEROS, ("I8",))
    return ScaledTensor(**fields_of(name, values.shape, parts), block=_block(parts, values.shape, scheme))


def _packed(tensors: Mapping[str, StoredTensor], name: str, scheme: _Scheme) -> ComputedTensor:
    if scheme.format == _NVFP4:
        names = {"values": name + _PACKED, "scales": name + _SCALE, "factor": name + _FACTOR}
        return nvfp4.tensor_of(tensors, name, names, divides=True)
    if scheme.format != "pack-quantized":
        raise CheckpointError(
            f"{name}{_PACKED} is packed, but quantization_config says {scheme.format} for it; copy config.json again "
            "from where the checkpoint came from"
        )
    values = beside(tensors, name + _PACKED, ("I32",))
    if len(values.shape) != 2:
        raise CheckpointError(f"{values.key} is stored as {list(values.shape)}, which is no matrix; copy it again")
    if name + _ORDER in tensors:
        raise UnsupportedModelError(
            f"{name}{_ORDER} reorders the columns of a packed weight (actorder group), which this version can't read; "
            "quantize with actorder weight or without"
        )
    parts = {"values": values, "scales": beside(tensors, name + _SCALE, FLOATS)}
    shape = (*values.shape[:-1], values.shape[-1] * 32 // scheme.bits)
    block = _block(parts, shape, scheme)
    if name + _ZEROS in tensors:
        parts["zeros"] = beside(tensors, name + _ZEROS, ("I32",))
        refuse_misfits(parts, {"zeros": (-(-shape[0] * scheme.bits // 32), grid_of(shape, block)[1])})
    return PackedTensor(**fields_of(name, shape, parts), block=block, bits=scheme.bits)


def _block(parts: dict[str, StoredTensor], shape: tuple[int, ...], scheme: _Scheme) -> tuple[int, int]:
    found = fitting_block(parts["values"], shape, parts["scales"], scheme.block)
    zeros = parts.get("zeros")
    if zeros is not None and zeros.shape != parts["scales"].shape:
        raise CheckpointError(
            f"{zeros.key} is stored as {list(zeros.shape)}, but {parts['scales'].key} as "
            f"{list(parts['scales'].shape)}, and each scale has a zero point; copy the checkpoint again"
        )
    return found
