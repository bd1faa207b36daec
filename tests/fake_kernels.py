"""Kernels that were never compiled, and a GPU that only writes down what is launched, for tests of the launchers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

from lynx_trt.plugins import launch
from lynx_trt.plugins.blob import Cubin, Kernels
from lynx_trt.plugins.launch import SelectLaunch
from lynx_trt.plugins.launcher import Device, Launch
from lynx_trt.plugins.plan import Kernel, Plan
from lynx_trt.plugins.plans import plans
from lynx_trt.plugins.specs import SelectSpec, Spec


def fake_kernels(specs: Iterable[Spec], sms: Sequence[int], max_tokens: int) -> Kernels:
    """Real plans, and for each kernel an image that says its number and how many parameters it has."""
    cubins: dict[tuple[Kernel, int], Cubin] = {}

    def cubin(kernel: Kernel, sm: int) -> Cubin:
        if (kernel, sm) not in cubins:
            number = len(cubins)
            image = f"{number} {len(kernel.parameters) + 2}\0".encode()
            # Shared memory below and above what needs a driver's leave; every third wants scratch memory if it may.
            shared, scratch = (
                (60_000 if number % 2 else 1_000),
                (128 if dict(kernel.constants).get("DESCRIPTORS") else 0),
            )
            entry = f"{kernel.function}_{number}"
            cubins[kernel, sm] = Cubin(sm, kernel.function, entry, 32 * kernel.warps, shared, scratch, 9, 0, image)
        return cubins[kernel, sm]

    def filled(plan: Plan[Kernel], sm: int) -> Plan[Cubin]:
        return plan.with_kernels(lambda kernel: cubin(kernel, sm))

    ops = {spec.key: {sm: tuple(filled(p, sm) for p in plans(spec, sm, max_tokens)) for sm in sms} for spec in specs}
    return Kernels(tuple(cubins.values()), ops, ("0.0", "0.0"))


def clustered_kernels(spec: SelectSpec, max_tokens: int) -> Kernels:
    """The same for SM 90, of a selection whose batches of 9 to 16 tokens are a cluster of four programs."""
    table = {(90, spec.experts, spec.experts_per_token, 16): SelectLaunch(4, 4, 4, 4, "")}
    with mock.patch.object(launch, "_select_table", return_value=table):
        return fake_kernels([spec], (90,), max_tokens)


class FakeDriver:
    """Notes every load and launch, the launches with their arguments as a kernel would find them."""

    def __init__(self, sm: int = 90, multiprocessors: int = 132) -> None:
        self.here = Device(sm, multiprocessors, context=1)
        self.loaded: list[Cubin] = []
        self.launched: list[dict[str, Any]] = []

    def device(self) -> Device:
        return self.here

    def load(self, cubin: Cubin, device: Device) -> int:
        assert device == self.here
        self.loaded.append(cubin)
        return len(self.loaded)

    def launch(self, launch: Launch, stream: int) -> None:
        cubin = self.loaded[launch.function - 1]
        count = int(cubin.image.split()[1].rstrip(b"\0"))
        addresses = ctypes.cast(launch.parameters, ctypes.POINTER(ctypes.c_void_p))
        words = [ctypes.cast(addresses[n], ctypes.POINTER(ctypes.c_uint64))[0] for n in range(count)]
        self.launched.append(
            {
                "entry": cubin.entry,
                "programs": launch.programs,
                "threads": launch.threads,
                "shared": launch.shared,
                "stream": stream,
                "words": words,
                "programmatic": launch.programmatic,
                "cluster": launch.cluster,
            }
        )
