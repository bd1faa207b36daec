"""What a TensorRT plugin does at run time, with no TensorRT and no GPU in it: from kernels and a plan to launches.

A node's fields and shapes give its spec, whose key finds its plans among the engine's kernels. `Launcher.prepare`
resolves a plan for T tokens: functions, grids, and where each argument comes from. `Prepared.run` then only fills
in pointers and launches. The C++ plugin (`cpp/`) does the same in the same order.

Kernels are shared in a process: the one node of an engine that carries them (`contract.KERNELS`) publishes them under
their id, whenever it is made; every node looks its own up when it first needs them, so no order matters.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lynx_trt.errors import ArtifactError
from lynx_trt.experts import values_an_element
from lynx_trt.export.ops import CAUSAL_CONV, LINEAR_ATTENTION, SELECT
from lynx_trt.plugins.blob import Cubin, Kernels, lookup
from lynx_trt.plugins.contract import DISPATCH, WEIGHTS_FIELD, Contract
from lynx_trt.plugins.plan import Plan, Step, find_plan
from lynx_trt.plugins.specs import CausalConvSpec, ExpertsSpec, LinearAttentionSpec, SelectSpec, Spec, Value

# Pointers are multiples of these, of tensors, of single values and of the workspace: the kernels are compiled for the
# former and would fault on others, and the descriptors in the workspace want it.
TENSOR_ALIGNMENT, VALUE_ALIGNMENT, WORKSPACE_ALIGNMENT = 16, 4, 64

_LOCK = threading.Lock()
_BLOBS: dict[str, bytes] = {}
_PARSED: dict[str, Kernels] = {}


def publish(kernels_id: str, blob: bytes) -> None:
    """Make an engine's kernels known to the nodes of this process, for its lifetime; twice is once."""
    with _LOCK:
        _BLOBS.setdefault(kernels_id, blob)


def published(kernels_id: str) -> Kernels:
    """The kernels of an id, read at the first call. Raises ArtifactError: no node has brought them, or damaged."""
    with _LOCK:
        if kernels_id not in _PARSED:
            if kernels_id not in _BLOBS:
                raise ArtifactError(
                    f"the GPU kernels {kernels_id[:12]} are in none of the engines loaded here: the engine is not "
                    "whole, or another program made it; build it again"
                )
            _PARSED[kernels_id] = Kernels.from_bytes(_BLOBS[kernels_id])
        return _PARSED[kernels_id]


def spec_of(op: str, values: Mapping[str, Value], shapes: Sequence[Sequence[int]], float_type: str) -> Spec:
    """A node's spec from its fields and its inputs' shapes (T and B may be anything).

    `float_type` is the graph's own precision. Raises UsageError: no kernel is made for such a node.
    """
    if op == CAUSAL_CONV:
        channels, width = shapes[1]
        bias = len(shapes) > 4
        return CausalConvSpec.from_attributes(values, channels=channels, width=width, dtype=float_type, bias=bias)
    if op == LINEAR_ATTENTION:
        state = shapes[5]
        return LinearAttentionSpec.from_attributes(
            values, keys=state[2], values=state[3], dtype=float_type, decays=shapes[3][1]
        )
    handed = bool(values[DISPATCH])
    if op == SELECT:
        return SelectSpec.from_attributes(
            values, experts=shapes[0][1], experts_per_token=shapes[2][1], dispatch_taken=handed
        )
    down = shapes[4]
    weights = str(values[WEIGHTS_FIELD])
    inner = down[1] if values["transposed"] else down[2] * values_an_element(weights)
    return ExpertsSpec.from_attributes(
        values,
        experts=down[0],
        experts_per_token=shapes[1][1],
        hidden=shapes[0][1],
        inner=inner,
        dtype=float_type,
        bias=len(shapes) - handed > (5 if weights == "float" else 7),
        dispatch_given=handed,
    )


def workspace_bytes(kernels: Kernels, key: str, max_tokens: int) -> int:
    """The workspace of an op for up to `max_tokens` tokens, on any SM that there are kernels for.

    Raises ArtifactError: there are no kernels for that op.
    """
    if key not in kernels.ops:
        raise ArtifactError(f"this engine has no kernels for {key}: build it again")
    return max(
        (plan.most_workspace(max_tokens) for options in kernels.ops[key].values() for plan in options), default=0
    )


@dataclass(frozen=True)
class Device:
    """The GPU of the current CUDA context, and the context's id, which no other context of the process gets."""

    sm: int
    multiprocessors: int
    context: int


class Launch:
    """A kernel launch: function handle, programs, threads of each, dynamic shared memory in bytes, arguments.

    programmatic: it may start while the launch before it runs; cluster: its programs are one. Each argument lies in a
    word of 8 bytes: pointers, null pointers, and T and B, an int32 in the lower half.
    """

    def __init__(self, function: int, step: Step[Cubin], programs: int, arguments: Sequence[int]) -> None:
        self.function, self.programs = function, programs
        self.threads, self.shared = step.kernel.threads, step.kernel.shared
        self.programmatic, self.cluster = step.programmatic, step.cluster
        self.words = (ctypes.c_uint64 * len(arguments))(*arguments)
        start = ctypes.addressof(self.words)
        self._addresses = (ctypes.c_void_p * len(arguments))(*(start + 8 * n for n in range(len(arguments))))
        # What CUDA takes: the address of an array of the arguments' addresses.
        self.parameters = ctypes.addressof(self._addresses)
        self.config: Any = None  # what a driver has made of all but the arguments, and keeps here


class Driver(Protocol):
    """The few things wanted from CUDA; `cuda_driver.CudaDriver`, or a stand-in of the tests."""

    def device(self) -> Device:
        """The GPU of the current context."""

    def load(self, cubin: Cubin, device: Device) -> int:
        """The handle of a cubin's function in the current context; loaded once in each."""

    def launch(self, launch: Launch, stream: int) -> None:
        """Launch on a stream, without waiting."""


@dataclass(frozen=True)
class _Pointer:
    """A word to fill in: of an input or output by number, or workspace plus offset."""

    launch: Launch
    word: int
    source: str
    number: int
    alignment: int


@dataclass(frozen=True)
class Prepared:
    """The launches for one number of tokens and one of sequences."""

    counts: tuple[int, int]
    launches: tuple[Launch, ...]
    pointers: tuple[_Pointer, ...]

    def run(self, driver: Driver, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> None:
        """Launch everything on a stream: no allocation, no waiting. Raises ArtifactError: a misaligned pointer."""
        for pointer in self.pointers:
            if pointer.source == "workspace":
                value = workspace + pointer.number
            else:
                value = (inputs if pointer.source == "input" else outputs)[pointer.number]
            if value % pointer.alignment:
                raise ArtifactError(
                    f"{pointer.source} {pointer.number} lies at {value:#x}; the kernels want multiples of "
                    f"{pointer.alignment}: bind buffers as CUDA allocates them"
                )
            pointer.launch.words[pointer.word] = value
        for launch in self.launches:
            driver.launch(launch, stream)


def launches_of(
    plan: Plan[Cubin], tokens: int, device: Device, driver: Driver, addresses: Mapping[str, int], sequences: int = 0
) -> list[Launch]:
    """A plan's launches for T tokens of B sequences, of tensors and regions that lie at fixed addresses."""
    found = {**addresses, "T": tokens, "B": sequences, "null": 0}
    launches = []
    for step in plan.steps:
        if programs := step.grid.programs(tokens, device.multiprocessors, sequences):
            cubin = step.kernel
            names = [*step.arguments, "scratch" if cubin.scratch else "null", "null"]
            words = [found[name] for name in names]
            launches.append(Launch(driver.load(cubin, device), step, programs, words))
    return launches


class Launcher:
    """One node's launches on one driver; `contract` is that of the node (`Contract.of_node`)."""

    def __init__(self, contract: Contract, kernels: Kernels, key: str, n_inputs: int, driver: Driver) -> None:
        self._kernels, self._key, self._driver = kernels, key, driver
        self._places = {
            tensor.name: (source, number, TENSOR_ALIGNMENT if tensor.shape else VALUE_ALIGNMENT)
            for source, tensors in (("input", contract.inputs_of(n_inputs)), ("output", contract.outputs))
            for number, tensor in enumerate(tensors)
        }

    def prepare(self, tokens: int, sequences: int = 0) -> Prepared:
        """Resolve the plan for T tokens of B sequences on the current context's GPU, loading what is not there yet.

        Raises ArtifactError: no kernels for this GPU (the message names both SMs), this op or this many tokens.
        """
        device = self._driver.device()
        options = lookup(self._kernels, device.sm, self._key)
        try:
            plan = find_plan(options, tokens, sequences)
        except ValueError as error:
            raise ArtifactError(f"{error}: build the engine again with larger profiles") from None
        launches: list[Launch] = []
        pointers: list[_Pointer] = []
        for step in plan.steps:
            programs = step.grid.programs(tokens, device.multiprocessors, sequences)
            if programs:
                self._add(step, programs, plan, (tokens, sequences), device, launches, pointers)
        return Prepared((tokens, sequences), tuple(launches), tuple(pointers))

    def _add(
        self,
        step: Step[Cubin],
        programs: int,
        plan: Plan[Cubin],
        counts: tuple[int, int],
        device: Device,
        launches: list[Launch],
        pointers: list[_Pointer],
    ) -> None:
        cubin = step.kernel
        names = [*step.arguments, "scratch" if cubin.scratch else "null", "null"]
        numbers = {"T": counts[0], "B": counts[1], "null": 0}
        words = [numbers.get(name, 0) for name in names]
        launch = Launch(self._driver.load(cubin, device), step, programs, words)
        launches.append(launch)
        offsets = plan.offsets(counts[0])
        for word, name in enumerate(names):
            if name in numbers:
                continue
            if name in offsets:
                pointers.append(_Pointer(launch, word, "workspace", offsets[name], WORKSPACE_ALIGNMENT))
            else:
                pointers.append(_Pointer(launch, word, *self._places[name]))
