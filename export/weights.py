"""Weights in a stream: from a checkpoint's shards to one safetensors file that the ONNX graph points into.

Checkpoints come in two layouts: the merged one (a tensor holds all experts of a layer), and the hub's (one
tensor an expert). transformers owns the rules that turn one into the other; they are applied here to one parameter at a
time, and in the hub's layout to some experts at a time, so that the memory needed is that of the largest stored tensor
and not that of the model.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lynx_trt.errors import CheckpointError
from lynx_trt.export.checkpoint import language_tensors
from lynx_trt.export.quantized.methods import DEQUANTIZE
from lynx_trt.export.sources import Source, disagrees
from lynx_trt.export.stored import Shards

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from transformers import PreTrainedModel

    from lynx_trt.export.checkpoint import Checkpoint
    from lynx_trt.export.parts import Part
    from lynx_trt.export.stored import StoredTensor

WEIGHTS_FILE = "weights.safetensors"
# What a parameter may be stored in; any other type is a quantization's, whose scales are missing.
FLOATS = ("F64", "F32", "F16", "BF16")
# Initializers below this stay inside the .onnx file; it keeps shape constants readable in a viewer.
EXTERNAL_BYTES = 1024
# Bytes of experts that are converted at a time, if one is not more.
_EXPERTS_BYTES = 1 << 28
SAFETENSORS_DTYPE = {
    "FLOAT": "F32",
    "FLOAT16": "F16",
    "BFLOAT16": "BF16",
    "DOUBLE": "F64",
    "INT64": "I64",
    "INT32": "I32",
    "INT8": "I8",
    "UINT8": "U8",
    "BOOL": "BOOL",
}


class CheckpointWeights:
    """Parameters of `model` by name, each read and converted only when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        """Plan where every parameter and stored buffer comes from.

        Raises:
            CheckpointError: tensors are missing, their shapes are not what the config says, or they are quantized.
        """
        self._model = model
        self._wanted = dict(model.state_dict(keep_vars=True))
        self._language = language_tensors(model)
        self._kept: dict[str, Part] = {}  # what stands in the place of parameters, by names of its own
        self._stray: dict[str, str] = {}  # stored tensors that the model has no place for, and what they would be in it
        self._sources, self._targets = self._plan(checkpoint)
        self._check(checkpoint)
        of_text = [source for name, source in self._sources.items() if name in self._language]
        # Bytes of what the checkpoint has for the language model.
        self.stored_bytes = sum(tensor.nbytes for source in of_text for tensor in source.tensors())

    def _plan(self, checkpoint: Checkpoint) -> tuple[dict[str, Source], dict[str, str]]:
        """Sources by the name of their first target, and each parameter's first target."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self._model.base_model_prefix
        sources: dict[str, Source] = {}
        targets: dict[str, str] = {}
        for key in sorted(checkpoint.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._wanted)
            if name not in self._wanted and key in self._wanted:
                name, pattern = rename_source_key(key, [], [], prefix, self._wanted)
            if name not in self._wanted:
                self._stray[key] = name
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            source = sources.setdefault(name, Source(converter))
            source.stored.setdefault(pattern or name, []).append(checkpoint.tensors[key])
            for other in self._all_targets(name, converter):
                targets[other] = name
        for name, source in sources.items():
            sources[name] = source.turned_while_read(name, tuple(self._wanted[name].shape))
        return sources, targets

    @staticmethod
    def _all_targets(name: str, converter: Any) -> list[str]:
        if converter is None:
            return [name]
        first = converter.target_patterns[0]
        return [name.replace(first, pattern, 1) for pattern in converter.target_patterns]

    def _check(self, checkpoint: Checkpoint) -> None:
        tied = set(self._tied())
        missing = sorted(set(self._wanted) - set(self._targets) - tied)
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} of the {len(self._wanted)} tensors that its config asks for, "
                f"first {missing[0]!r}; config.json and the weights in {checkpoint.folder} don't belong together"
            )
        for name, source in self._sources.items():
            if self._wanted[name].is_floating_point():
                _refuse_quantized(source)
            wanted = tuple(self._wanted[name].shape)
            if source.converter is None:
                stored = source.stored[name][0].shape
                if stored != wanted:
                    raise CheckpointError(disagrees(name, stored, wanted))
            else:
                self._check_merged(name, source, wanted)

    def _check_merged(self, name: str, source: Source, wanted: tuple[int, ...]) -> None:
        """One stored tensor an expert: their number and shapes must add up, which needs no data to see."""
        for pattern, tensors in source.stored.items():
            if "*" in pattern:  # what is stacked
                _refuse_odd_one(tensors)
        stored = source.tensors()
        elements = sum(math.prod(tensor.shape) for tensor in stored)
        expected = sum(self._wanted[t].numel() for t, first in self._targets.items() if first == name)
        if elements != expected:
            shapes = f"{len(stored)} tensors of {stored[0].shape}"
            raise CheckpointError(disagrees(name, shapes, wanted))

    def _tied(self) -> Iterator[str]:
        """Names of parameters that share another one's storage (an output embedding tied to the input's)."""
        yield from getattr(self._model, "all_tied_weights_keys", None) or {}

    def source(self, name: str) -> Source:
        """What parameter `name` is made of."""
        return self._sources[self._targets[name]]

    def keep(self, name: str, parts: Mapping[str, Part]) -> None:
        """From now on have `parts`, by their names, in the place of parameter `name`: its bytes as they are stored."""
        del self._wanted[name], self._language[name], self._sources[name], self._targets[name]
        self._kept.update(parts)

    def resolve(self, name: str) -> str | None:
        """The stored parameter behind `name`, following ties; None if the checkpoint has nothing for it."""
        if name in self._kept:
            return name
        tied = dict(getattr(self._model, "all_tied_weights_keys", None) or {})
        if name not in self._targets and name in tied:
            return self.resolve(tied[name])
        return name if name in self._targets else None

    @property
    def unused(self) -> list[str]:
        """Stored tensors that the model has no place for, in the order of layers.

        Not among them is what it leaves out on purpose: by transformers' own list, frequencies of rotary embeddings,
        which are computed, scales of quantized activations and caches, and layers that predict the tokens after the
        next (in DeepSeek's layout, by `eh_proj`).
        """
        computed = (r"rotary_emb\.inv_freq", r"\.(input|output|[qkv])_scale$")
        patterns = [*(self._model._keys_to_ignore_on_load_unexpected or ()), *computed]
        heads = {found[0] for key in self._stray if (found := re.match(r".*layers\.\d+\.(?=eh_proj\.)", key))}
        patterns += [re.escape(head) for head in heads]
        left_out = re.compile("|".join(f"({pattern})" for pattern in patterns))
        return [key for key, name in self._stray.items() if not left_out.search(key) and not left_out.search(name)]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters and stored buffers in the model's dtype or as they are kept, ties counted once."""
        full = {id(tensor): tensor.nbytes for name, tensor in self._language.items() if name in self._targets}
        return sum(full.values()) + sum(part.nbytes for part in self._kept.values())

    def load(self, name: str) -> torch.Tensor:
        """Parameter `name`, in the model's dtype, or what is kept by that name.

        Raises:
            CheckpointError: its shape, after conversion, is not the model's, or a value is no number or is beyond what
                the dtype holds; the message names the stored tensor.
        """
        with Shards() as shards:
            if kept := self._kept.get(name):
                return kept.experts(shards, 0, kept.shape[0])
            return self._loaded(name, self.source(name), self._wanted[name].shape, shards)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The same in pieces along its first dimension: some experts each, where each is kept or stored for itself.

        Raises:
            CheckpointError: see load.
        """
        if kept := self._kept.get(name):
            for first, last in _steps(kept.shape[0], kept.nbytes):
                with Shards() as shards:
                    yield kept.experts(shards, first, last)
            return
        source, wanted = self.source(name), self._wanted[name]
        experts = source.experts()
        if not experts or wanted.shape[0] != experts:
            yield self.load(name)
            return
        for first, last in _steps(experts, wanted.nbytes):
            with Shards() as shards:
                yield self._loaded(name, source.part(first, last), (last - first, *wanted.shape[1:]), shards)

    def _loaded(self, name: str, source: Source, shape: tuple[int, ...], shards: Shards) -> torch.Tensor:
        """What `source` gives of parameter `name`, which has to be of that shape."""
        import torch

        from lynx_trt.export.finite import all_finite, refuse_not_finite

        wanted = self._wanted[name]
        tensor = source.merged(name, self._targets[name], lambda stored: stored.read(shards, wanted.dtype), self._model)
        if tensor.shape != shape:
            raise CheckpointError(disagrees(name, tuple(tensor.shape), tuple(shape)))
        result: torch.Tensor = tensor.to(wanted.dtype)
        if not all_finite(result):
            masks = tensor.dim() == 1 or not isinstance(wanted, torch.nn.Parameter)  # biases, sinks; buffers
            for stored in source.tensors():
                stored.refuse_faults(shards)
                refuse_not_finite(stored.key, stored.read(shards, torch.float32), wanted.dtype, masks=masks)
            refuse_not_finite(name, tensor, wanted.dtype, masks=masks)
        return result


def _steps(experts: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the experts that are read at a time, of so many that have so many bytes in all."""
    step = max(_EXPERTS_BYTES * experts // max(nbytes, 1), 1)
    for first in range(0, experts, step):
        yield first, min(first + step, experts)


def _refuse_quantized(source: Source) -> None:
    for stored in source.tensors():
        if stored.dtype not in FLOATS:
            raise CheckpointError(
                f"{stored.key} is stored as {stored.dtype}, so it is quantized, but has no scales beside it, or "
                "config.json no quantization_config that says how to read it; copy the checkpoint again, or "
                + DEQUANTIZE
            )


def _refuse_odd_one(tensors: list[StoredTensor]) -> None:
    """Tensors that will be one, an expert each, have one shape."""
    usual = Counter(tensor.shape for tensor in tensors).most_common(1)[0][0]
    for tensor in tensors:
        if tensor.shape != usual:
            other = next(item for item in tensors if item.shape == usual)
            raise CheckpointError(
                f"{tensor.key} is stored as {list(tensor.shape)}, but {other.key} as {list(usual)}, and experts are of "
                "one shape; convert or copy the checkpoint again"
            )


@dataclass(frozen=True)
class _Large:
    """An initializer that goes to the weights file, and where in its data."""

    value: ir.Value
    tensor: ir.TensorProtocol
    name: str
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.tensor.nbytes


def write_weights(
    model: ir.Model,
    folder: Path,
    load: Callable[[ir.Value], Iterable[Any]] | None,
    *,
    file_name: str = WEIGHTS_FILE,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write every large initializer of `model` to one safetensors file and point the graph into it.

    `load(value)` gives an initializer's data in pieces, bytes-like; it is called once for each, in file order, and no
    piece is kept when the next one is asked for. None leaves the data a hole of the right size, which takes no room on
    disk. Returns the bytes of data.
    """
    import onnx_ir as ir

    entries = _large_initializers(model)
    total = entries[-1].end if entries else 0
    header = _header(entries)
    with (folder / file_name).open("wb") as stream:
        stream.write(header)
        if load is None:
            stream.truncate(len(header) + total)
        else:
            written = 0
            for entry in entries:
                for piece in load(entry.value):
                    written += stream.write(piece)
                    if on_progress:
                        on_progress(written, total)
                assert written == entry.end, f"{entry.name}: {written} bytes written, {entry.end} planned"
        stream.flush()
        os.fsync(stream.fileno())
    for entry in entries:
        entry.value.const_value = ir.ExternalTensor(
            file_name,
            len(header) + entry.begin,
            entry.tensor.nbytes,
            entry.tensor.dtype,
            shape=ir.Shape(entry.shape),
            name=entry.name,
            base_dir=folder,
        )
    return total


def _large_initializers(model: ir.Model) -> list[_Large]:
    """In file order: wider types first, so that every tensor starts at a multiple of its element's size."""
    found = [(value, value.const_value) for value in model.graph.initializers.values()]
    large = [(value, tensor) for value, tensor in found if tensor is not None and tensor.nbytes >= EXTERNAL_BYTES]
    large.sort(key=lambda pair: -pair[1].dtype.itemsize)
    entries: list[_Large] = []
    for value, tensor in large:
        assert value.name is not None
        shape = tuple(int(str(size)) for size in tensor.shape)
        entries.append(_Large(value, tensor, value.name, shape, entries[-1].end if entries else 0))
    return entries


def _header(entries: list[_Large]) -> bytes:
    """Safetensors' header: its length in 8 bytes, then JSON, padded so that the data begins aligned."""
    fields = {
        entry.name: {
            "dtype": SAFETENSORS_DTYPE[entry.tensor.dtype.name],
            "shape": entry.shape,
            "data_offsets": [entry.begin, entry.end],
        }
        for entry in entries
    }
    encoded = json.dumps(fields, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)
    return struct.pack("<Q", len(encoded)) + encoded
