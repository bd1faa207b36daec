"""What a step of an engine takes and gives, on the GPU and in pinned host memory: one copy up, one down."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.runtime.backend import Array, Draws

if TYPE_CHECKING:
    from lynx_trt.runtime.cuda import Gpu

ALIGNMENT = 256


class Buffers:
    """The inputs and outputs of steps of up to `rows` rows and `tokens` tokens; the caches are elsewhere.

    The logits stay on the device: `all_logits` and `logits_of` fetch them where they are asked for.
    """

    def __init__(self, gpu: Gpu, artifact: Artifact, tokens: int, rows: int) -> None:
        model = artifact.manifest.model
        layers = len(model.moe_layers)
        self._gpu, self._rows, self._vocabulary = gpu, rows, model.vocabulary
        up: dict[str, tuple[type[np.generic], int]] = {
            "past_lengths": (np.int64, rows),
            "lengths": (np.int64, rows),
            "budgets": (np.int32, layers),
            "floors": (np.float32, layers),
            "scale": (np.float32, rows),
            "top_p": (np.float64, rows),
            "top_k": (np.int32, rows),
            "uniform": (np.float64, rows),
            "input_ids": (np.int64, tokens),
        }
        self._up = Block(gpu, up)
        self._down = Block(gpu, {"active_experts": (np.int32, layers), "token": (np.int32, rows)})
        logits = gpu.allocate(4 * rows * model.vocabulary, "the logits of a step")
        self._host_logits: Array | None = None
        self.addresses = {**self._up.addresses, **self._down.addresses, "logits": logits}

    def write(
        self, input_ids: Array, past_lengths: Array, lengths: Array, restriction: Restriction, draws: Draws | None
    ) -> None:
        """Queue the inputs."""
        budgets, floors = restriction.arrays
        values = {
            "input_ids": input_ids,
            "past_lengths": past_lengths,
            "lengths": lengths,
            "budgets": budgets,
            "floors": floors,
        }
        if draws is not None:
            values |= {"scale": draws.scale, "top_p": draws.top_p, "top_k": draws.top_k, "uniform": draws.uniform}
        for name, value in values.items():
            self._up.host[name][: value.size] = value.reshape(-1)
        self._up.send(self._gpu, "input_ids", input_ids.size)

    def read(self, rows: int) -> tuple[Array, Array]:
        """Queue active experts i32 [N] and tokens i32 [rows]: there after the next `synchronize`, until the next step.

        The tokens are those that were drawn, if any were.
        """
        self._down.fetch(self._gpu, "token", rows)
        return self._down.host["active_experts"], self._down.host["token"][:rows]

    def all_logits(self, rows: int) -> Array:
        """Queue the logits f32 [rows,V], as `read` does."""
        return self._logits(0, rows)

    def logits_of(self, row: int) -> Array:
        """Fetch the logits f32 [1,V] of one row of the step before."""
        logits = self._logits(row, 1)
        self._gpu.synchronize()
        return logits

    def _logits(self, first: int, rows: int) -> Array:
        if self._host_logits is None:  # decoding has no need of them
            host = self._gpu.pinned(4 * self._rows * self._vocabulary).view(np.float32)
            self._host_logits = host.reshape(self._rows, self._vocabulary)
        target = self._host_logits[:rows]
        self._gpu.download(target, self.addresses["logits"] + 4 * first * self._vocabulary)
        return target


class Block:
    """Arrays one after another in one block of memory, on the device and pinned on the host; the last one is large."""

    def __init__(self, gpu: Gpu, arrays: dict[str, tuple[type[np.generic], int]]) -> None:
        offsets, end = {}, 0
        for name, (dtype, count) in arrays.items():
            offsets[name] = end
            end += math.ceil(max(count, 1) * np.dtype(dtype).itemsize / ALIGNMENT) * ALIGNMENT
        self._bytes = gpu.pinned(end)
        self._bytes[:] = 0
        self._address = gpu.allocate(end, "a step's inputs and outputs")
        self._offsets = offsets
        self.addresses = {name: self._address + offset for name, offset in offsets.items()}
        self.host: dict[str, Array] = {
            name: self._bytes[offsets[name] : offsets[name] + count * np.dtype(dtype).itemsize].view(dtype)
            for name, (dtype, count) in arrays.items()
        }

    def _part(self, last: str, count: int) -> Array:
        """The block up to the first `count` elements of its last array."""
        return self._bytes[: self._offsets[last] + count * self.host[last].itemsize]

    def send(self, gpu: Gpu, last: str, count: int) -> None:
        gpu.upload(self._address, self._part(last, count))

    def fetch(self, gpu: Gpu, last: str, count: int) -> None:
        gpu.download(self._part(last, count), self._address)
