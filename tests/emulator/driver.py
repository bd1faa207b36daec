"""The emulated GPU as launchers see it: `lynx_trt.plugins.launcher.Driver`, and as `execute.run` for tests."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emulator.counters import Counters
from emulator.faults import UnsupportedError
from emulator.machine import Kernel, Running
from emulator.memory import GlobalMemory
from emulator.program import parse
from lynx_trt.plugins import aot
from lynx_trt.plugins.launch import CLUSTER_SM
from lynx_trt.plugins.launcher import Device, Launch, launches_of
from lynx_trt.plugins.plan import Kernel as Source
from lynx_trt.plugins.plan import Plan

if TYPE_CHECKING:
    from lynx_trt.plugins.blob import Cubin


@functools.lru_cache(maxsize=64)
def _kernel(image: bytes) -> Kernel:
    return Kernel(parse(image.decode()))


class EmulatedGpu:
    """A GPU of some SM with `size` bytes of memory; kernels are PTX, not cubins.

    A launch that may start while the one before it still runs does so as early as a GPU could: it goes on to where it
    waits before any of the other has run (what that one does before it waits itself has been done). So what is read too
    early is what was there before. `synchronize` runs what is left.
    """

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
        self._pending: Running | None = None
        self._row: list[Any] | None = None

    def device(self) -> Device:
        return Device(self.sm, self.multiprocessors, context=1)

    def load(self, cubin: Cubin, device: Device) -> int:
        self._loaded.append(cubin)
        return len(self._loaded)

    def launch(self, launch: Launch, stream: int) -> None:
        """Launch it, with the arguments that it has by now."""
        self.launch_with(launch, [int(word) for word in launch.words])

    def launch_with(self, launch: Launch, words: Sequence[int]) -> None:
        """Launch it with other arguments."""
        cubin = self._loaded[launch.function - 1]
        counters = Counters(self.memory) if self.counts else None
        self.launched.append((cubin.function, counters))
        if not launch.programmatic:
            self.synchronize()
        running = Running(
            _kernel(cubin.image),
            self.memory,
            words,
            launch.programs,
            launch.threads,
            launch.shared,
            cluster=launch.cluster,
            counters=counters,
        )
        if launch.programmatic:
            running.begin()
            self.synchronize()
        self._pending = running

    def synchronize(self) -> None:
        """Run what was launched to its end. Raises FaultError: a kernel does what a GPU leaves undefined."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.finish()

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

        The kernels are compiled for this SM, as an engine would have them. Within `in_a_row` it only notes them.
        """
        if self._row is not None:
            self._row.append((plan, tensors, tokens, sequences))
            return {}
        self._run([(plan, tensors, tokens, sequences)])
        return {
            region.name: torch.from_numpy(self.memory.view(self.where[region.name], region.size(tokens)).copy())
            for region in plan.regions
        }

    @contextlib.contextmanager
    def in_a_row(self) -> Iterator[None]:
        """Ops that are launched one after the other, as in an engine: on one workspace, and none waits for the host."""
        self._row = row = []
        yield
        self._row = None
        self._run(row)

    def _run(self, ops: Sequence[tuple[Plan[Source], Mapping[str, Tensor], int, int]]) -> None:
        self.memory.clear()
        self.launched.clear()
        if self.sm < CLUSTER_SM and any(step.cluster for plan, *_ in ops for step in plan.steps):
            raise UnsupportedError(f"clusters, which begin at SM {CLUSTER_SM}")
        wanted = dict.fromkeys(step.kernel for plan, *_ in ops for step in plan.steps)
        built = aot.compile_each(wanted, self.sm, images="ptx")
        if missing := [kernel for kernel in wanted if kernel not in built]:
            raise RuntimeError(f"this does not compile for SM {self.sm}: {missing[0]}")
        tensors = {name: tensor for _, given, *_ in ops for name, tensor in given.items()}
        where = {name: self.put(tensor) for name, tensor in tensors.items()}
        size = max(plan.workspace_bytes(tokens) for plan, _, tokens, _ in ops)
        workspace = self.memory.allocate(size)
        self.memory.view(workspace, size)[:] = 255  # NaN, so that a read of what nothing wrote is seen
        for plan, _, tokens, sequences in ops:
            self.where = where | {name: workspace + offset for name, offset in plan.offsets(tokens).items()}
            ready = plan.with_kernels(built.__getitem__)
            for launch in launches_of(ready, tokens, self.device(), self, self.where, sequences):
                self.launch(launch, 0)
        self.synchronize()
        for name, tensor in tensors.items():
            tensor.copy_(self.get(where[name], tensor))
