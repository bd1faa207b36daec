"""The emulated GPU as launchers see it: `lynx_trt.plugins.launcher.Driver`, and as `execute.run` for tests."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emulator.counters import Counters
from emulator.machine import Kernel
from emulator.memory import GlobalMemory
from emulator.program import parse
from lynx_trt.plugins import aot
from lynx_trt.plugins.launcher import Device, Launch, launches_of
from lynx_trt.plugins.plan import Kernel as Source
from lynx_trt.plugins.plan import Plan

if TYPE_CHECKING:
    from lynx_trt.plugins.blob import Cubin


@functools.lru_cache(maxsize=64)
def _kernel(image: bytes) -> Kernel:
    return Kernel(parse(image.decode()))


class EmulatedGpu:
    """A GPU of some SM with `size` bytes of memory. Launches run at once; kernels are PTX, not cubins."""

    def __init__(
        self,
        sm: int,
        *,
        size: int = 1 << 26,
        multiprocessors: int = 4,
        counts: bool = False,
        memory: GlobalMemory | None = None,
    ) -> None:
        self.sm, self.multiprocessors = sm, multiprocessors
        self.memory = memory or GlobalMemory(size)
        self.counts = counts
        self.launched: list[tuple[str, Counters | None]] = []  # each kernel, and what it asked for where that counts
        self.where: dict[str, int] = {}  # the addresses of what `run` ran on
        self._loaded: list[Cubin] = []

    def device(self) -> Device:
        return Device(self.sm, self.multiprocessors, context=1)

    def load(self, cubin: Cubin, device: Device) -> int:
        self._loaded.append(cubin)
        return len(self._loaded)

    def launch(self, launch: Launch, stream: int) -> None:
        """Run it. Raises FaultError: the kernel does what a GPU leaves undefined."""
        self.launch_with(launch, [int(word) for word in launch.words])

    def launch_with(self, launch: Launch, words: Sequence[int]) -> None:
        """Run it with other arguments than those that it has by now."""
        cubin = self._loaded[launch.function - 1]
        counters = Counters(self.memory) if self.counts else None
        self.launched.append((cubin.function, counters))
        _kernel(cubin.image).run(
            self.memory,
            words,
            launch.programs,
            launch.threads,
            launch.shared,
            cluster=launch.cluster,
            counters=counters,
        )

    def put(self, tensor: Tensor) -> int:
        """The address of a copy of a tensor."""
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        address = self.memory.allocate(raw.size)
        self.memory.view(address, raw.size)[:] = raw
        return address

    def get(self, address: int, like: Tensor) -> Tensor:
        """A tensor of that shape and type from an address."""
        raw = self.memory.view(address, like.numel() * like.element_size()).copy()
        return torch.from_numpy(raw).view(like.dtype).reshape(like.shape)

    def run(
        self, plan: Plan[Source], tensors: Mapping[str, Tensor], tokens: int, sequences: int = 0
    ) -> dict[str, Tensor]:
        """What `execute.run` does, here: launch a plan's steps on tensors by name; the regions of its workspace.

        The kernels are compiled for this SM, as an engine would have them.
        """
        self.memory.clear()
        self.launched.clear()
        wanted = dict.fromkeys(step.kernel for step in plan.steps)
        built = aot.compile_each(wanted, self.sm, images="ptx")
        if missing := [kernel for kernel in wanted if kernel not in built]:
            raise RuntimeError(f"this does not compile for SM {self.sm}: {missing[0]}")
        where = {name: self.put(tensor) for name, tensor in tensors.items()}
        size = plan.workspace_bytes(tokens)
        workspace = self.memory.allocate(size)
        self.memory.view(workspace, size)[:] = 255  # NaN, so that a read of what nothing wrote is seen
        offsets = plan.offsets(tokens)
        self.where = addresses = where | {name: workspace + offset for name, offset in offsets.items()}
        ready = plan.with_kernels(built.__getitem__)
        for launch in launches_of(ready, tokens, self.device(), self, addresses, sequences):
            self.launch(launch, 0)
        for name, tensor in tensors.items():
            tensor.copy_(self.get(where[name], tensor))
        return {
            region.name: torch.from_numpy(self.memory.view(addresses[region.name], region.size(tokens)).copy())
            for region in plan.regions
        }
