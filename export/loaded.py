"""A checkpoint as transformers' own model, all of it in memory: what compare and calibrate run beside an artifact."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from lynx_trt.errors import CheckpointError
from lynx_trt.export.checkpoint import Checkpoint, auto_class, empty_model
from lynx_trt.export.stored import Shards
from lynx_trt.machine import memory_bytes

if TYPE_CHECKING:
    from lynx_trt.export.stored import StoredTensor


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model in `dtype`, loaded by transformers; `options` are those of its from_pretrained.

    Quantized weights are handed to it dequantized: its own dequantization wants packages that nothing else here needs,
    refuses weights whose last block is partial (DeepSeek-V3 has some), and knows fewer methods.

    Raises:
        CheckpointError: it is larger than this machine's memory.
        Exception: whatever transformers raises.
    """
    need = sum(math.prod(stored.shape) for stored in checkpoint.tensors.values()) * dtype.itemsize
    if need > memory_bytes():
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{checkpoint.folder} takes {need / 1e9:,.1f} GB as {name}, all of which has to be in memory, and this "
            f"machine has {memory_bytes() / 1e9:,.1f} GB; take a larger one"
        )
    if not checkpoint.quantization:
        options.update(use_safetensors=True, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code)
        return auto_class(checkpoint.config).from_pretrained(checkpoint.folder, dtype=dtype, **options)
    weights = {key: _Readable(stored, dtype) for key, stored in checkpoint.tensors.items()}
    kind = type(empty_model(checkpoint, dtype))
    return kind.from_pretrained(None, config=checkpoint.config, state_dict=weights, dtype=dtype, **options)


class _Readable:
    """A stored tensor in the form of safetensors' slices, the one in which transformers takes what it has not read."""

    def __init__(self, stored: StoredTensor, dtype: torch.dtype) -> None:
        self._stored = stored
        self._dtype = dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        with Shards() as shards:
            return self._stored.read(shards, self._dtype)[index]
