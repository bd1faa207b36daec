"""ONNX Runtime: what runs where there is no GPU, with the lynx ops lowered to what is fastest on the CPU.

For comparisons it also runs on CUDA (`device`), where the caches stay on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import ArtifactError, GenerationError
from lynx_trt.machine import cores
from lynx_trt.runtime import ort_graphs
from lynx_trt.runtime.backend import Array, Draws, NextTokens, StepResult, StepSizes, beginning
from lynx_trt.runtime.ort_graphs import Device, Graph, left_to_cpu, open_graphs
from lynx_trt.runtime.sampling import draw

if TYPE_CHECKING:
    from pathlib import Path

    from lynx_trt.runtime.lowering import Form

# Precisions that ONNX Runtime has on the CPU; a lowered graph is float32 whatever it was built in.
ELEMENT = {"fp32": np.float32, "fp16": np.float16}
IDS, BUDGETS, FLOORS = "input_ids", "budgets", "floors"
INPUTS = (IDS, "past_lengths", "lengths")
# Rows that a piece of a decode step has at least: 8 rows of lynx-tiny take 0.65 ms on one core, 4 rows 0.36.
PIECE = 4
BINDINGS = 256  # of decode steps that are kept: one for each batch size, and more where slots in the middle decode


class OrtBackend:
    """The artifact's graph in ONNX Runtime, with buffers for the caches that are both input and output.

    Binding the same memory as past and present lets TensorScatter write in place; otherwise ONNX Runtime copies the
    whole cache at every step.

    Small experts leave every core with little to do between two points where ONNX Runtime's threads wait for each
    other. So a decode step that restricts nothing is cut into pieces of the batch, each on a core of its own: they
    meet once a step and not once a node. Where the selection votes over the batch, there is no such cut. A step of one
    token has one thread: a second has nothing to do in it but to spin.
    """

    def __init__(
        self,
        artifact: Artifact,
        slots: int,
        *,
        threads: int | None = None,
        pieces: int | None = None,
        form: Form | None = None,
        profile: Path | None = None,
        device: Device = "cpu",
    ) -> None:
        """Load the graph and allocate caches for `slots` sequences.

        Args:
            artifact: the artifact.
            slots: sequences.
            threads: of ONNX Runtime; None leaves it the choice.
            pieces: into which a decode step may be cut, at most; None is one a thread.
            form: what the lynx ops become (lowering.py), computed in float32, `auto` for speed; None runs
                `model.onnx` as it is, the functions in it and its own precision: the reference.
            profile: where ONNX Runtime writes the time of each node, up to `end_profile`; the name gets a suffix.
            device: where it runs and the caches are; `notes` says what of the graph runs on the CPU all the same.

        Raises:
            ArtifactError: onnxruntime is missing, can't load the graph or use the device, or the graph's own precision
                is none it has on the CPU.
        """
        from lynx_trt.runtime.routing import Unrestricted, count_active

        model = artifact.manifest.model
        if form in (None, "body") and model.precision not in ELEMENT:
            raise ArtifactError(
                f"{artifact.folder} is built in {model.precision}, in which ONNX Runtime can't compute on the CPU and "
                "NumPy has no caches; build it with --precision fp16 or fp32 to run its graph as it is"
            )
        self.slots, self.rewinds = slots, model.rewinds
        self.sizes = StepSizes(prefill_length=model.chunk, boundary=model.chunk) if model.chunk else StepSizes()
        self._device = device
        self._pieces = 1 if profile or device != "cpu" else pieces or threads or cores()
        self._graphs = open_graphs(artifact, threads, form, profile, device, cut=self._pieces > 1)
        self._helpers = ThreadPoolExecutor(max(1, self._pieces - 1), "lynx-piece")  # starts them when needed
        self.notes = [] if device == "cpu" else left_to_cpu(self._graphs, device)
        element = ELEMENT[model.precision] if form is None else np.float32
        self._unrestricted, self._count = Unrestricted(artifact), count_active
        self._caches: dict[str, Any] = {}  # arrays, OrtValues on a device
        for cache in model.caches:
            # Zeros and not garbage: a masked row times a NaN would still be a NaN.
            rows = cache.rows or model.cache_rows
            buffer = np.zeros((slots, cache.heads, rows, cache.size), dtype=element)
            self._caches[cache.name] = buffer if device == "cpu" else ort_graphs.on_device(buffer, device)
        self._states = {state.name for state in model.states}
        self._whole = self._states | {cache.name for cache in model.caches if cache.ring}
        for state in model.states:
            kind = ELEMENT[state.precision] if form is None else np.float32
            buffer = np.zeros((slots, *state.shape), dtype=kind)
            self._caches[state.name] = buffer if device == "cpu" else ort_graphs.on_device(buffer, device)
        self._rows = model.max_length
        # A decode step's inputs and outputs stay where they are, so that it is bound once: binding some 30 values
        # took as long as the nodes of lynx-tiny at batch 1.
        self._inputs = {name: np.zeros((slots, 1) if name == IDS else slots, np.int64) for name in INPUTS}
        self._inputs[BUDGETS] = np.zeros(len(model.moe_layers), np.int32)
        self._inputs[FLOORS] = np.zeros(len(model.moe_layers), np.float32)
        self._logits = np.zeros((slots, model.vocabulary), np.float32)
        self._active = np.zeros(len(model.moe_layers), np.int32)
        self._experts, self._k = model.moe_layers[0].experts, model.moe_layers[0].experts_per_token
        self._bindings: dict[tuple[int, int, int], tuple[Any, Array]] = {}
        self._selects = form != "baseline"

    def step(
        self, input_ids: Array, past_lengths: Array, lengths: Array, restriction: Restriction, *, first: int = 0
    ) -> StepResult:
        """See Backend.

        Raises:
            GenerationError: a row would run over the end of the cache.
        """
        batch, length = input_ids.shape
        rows = slice(first, first + batch)
        # Padding is written to the cache as well, so the whole width has to fit, not the real tokens alone.
        if int(past_lengths.max()) + length > self._rows:
            raise GenerationError(
                f"a step of {length} tokens at position {past_lengths.max()} exceeds {self._rows} rows"
            )
        self.sizes.check_boundary(past_lengths, length)
        self._begin(beginning(past_lengths, lengths, first))
        budgets, floors = restriction.arrays
        values = {IDS: input_ids, "past_lengths": past_lengths, "lengths": lengths, BUDGETS: budgets, FLOORS: floors}
        cuts = _cuts(first, batch, self._pieces if length == 1 else 1)
        free = not self._selects or self._unrestricted.holds(lengths, length, restriction)
        graph = self._graph(free, len(cuts), input_ids.size)
        if length == 1:
            for name, value in values.items():
                self._inputs[name][rows if name in INPUTS else slice(None)] = value
            bound = [self._bound(graph, piece) for piece in (cuts if graph is self._graphs.apart else [rows])]
        else:
            inputs = {n: np.ascontiguousarray(v, self._inputs[n].dtype) for n, v in values.items()}
            bound = [self._bind(graph, rows, inputs)]
        self._run(graph.session, [binding for binding, _ in bound])
        routers = [logits for _, logits in bound]
        active = self._count(routers, len(self._active), self._k) if graph.routers else self._active.copy()
        return StepResult(self._logits[rows].copy(), active)

    def next_tokens(
        self,
        input_ids: Array,
        past_lengths: Array,
        lengths: Array,
        restriction: Restriction,
        draws: Draws,
        *,
        first: int = 0,
    ) -> NextTokens:
        """See Backend."""
        result = self.step(input_ids, past_lengths, lengths, restriction, first=first)
        return NextTokens(draw(result.logits, draws), result.active)

    def _graph(self, free: bool, pieces: int, tokens: int) -> Graph:
        """What runs a step; `free`: it restricts nothing."""
        if not free:
            return self._graphs.single if tokens == 1 and self._graphs.single is not None else self._graphs.whole
        return self._graphs.apart if (pieces > 1 or tokens == 1) and self._graphs.apart else self._graphs.free

    def _run(self, session: Any, bindings: Sequence[Any]) -> None:
        """Run each binding, the first on this thread and the others beside it; if one fails the others end first."""
        if len(bindings) == 1:
            session.run_with_iobinding(bindings[0])
            return
        beside = [self._helpers.submit(session.run_with_iobinding, binding) for binding in bindings[1:]]
        try:
            session.run_with_iobinding(bindings[0])
        finally:
            errors = [run.exception() for run in beside]
        for error in filter(None, errors):
            raise error

    def _bound(self, graph: Graph, rows: slice) -> tuple[Any, Array]:
        """The binding of a decode step, as `_bind` makes it."""
        key = id(graph.session), rows.start, rows.stop
        if key not in self._bindings:
            if len(self._bindings) >= BINDINGS:
                self._bindings.clear()
            self._bindings[key] = self._bind(graph, rows, self._decode_inputs(rows))
        elif self._device != "cpu":
            # What lies elsewhere than the graph wants it is copied when it is bound, not when it runs: the inputs
            # always, and the cache of a layer whose attention runs on the CPU.
            self._bind_inputs(self._bindings[key][0], graph, rows, self._decode_inputs(rows))
        return self._bindings[key]

    def _decode_inputs(self, rows: slice) -> dict[str, Array]:
        return {name: value[rows] if name in INPUTS else value for name, value in self._inputs.items()}

    def _bind(self, graph: Graph, rows: slice, inputs: dict[str, Array]) -> tuple[Any, Array]:
        """Inputs that live as long as the binding, and outputs of every step in the same memory; routers' logits."""
        binding = graph.session.io_binding()
        self._bind_inputs(binding, graph, rows, inputs)
        for name, cache in self._caches.items():
            _bind_rows(binding.bind_output, f"present_{name}", cache, rows)
        _bind(binding.bind_output, "logits", self._logits[rows])
        routers = np.zeros((len(self._active) * inputs[IDS].size if graph.routers else 0, self._experts), np.float32)
        if graph.routers:
            _bind(binding.bind_output, "router_logits", routers)
        else:
            _bind(binding.bind_output, "active_experts", self._active)
        return binding, routers

    def _bind_inputs(self, binding: Any, graph: Graph, rows: slice, inputs: dict[str, Array]) -> None:
        for name, value in inputs.items():
            if graph.restricts or name not in (BUDGETS, FLOORS):
                _bind(binding.bind_input, name, value)
        for name, cache in self._caches.items():
            _bind_rows(binding.bind_input, f"past_{name}", cache, rows)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See Backend."""
        for name, cache in self._caches.items():
            rows = slice(None) if name in self._whole else slice(length)
            with _writable(cache) as values:
                values[target][:, rows] = values[source][:, rows]

    def clear_slot(self, slot: int) -> None:
        """See Backend."""
        for cache in self._caches.values():
            with _writable(cache) as values:
                values[slot] = 0

    def _begin(self, slots: Array) -> None:
        """Zeros for the states of slots where a sequence begins."""
        for name in self._states if len(slots) else ():
            with _writable(self._caches[name]) as values:
                values[slots] = 0

    def end_profile(self) -> list[str]:
        """Stop profiling; returns the files' paths, one for each graph."""
        return [str(session.end_profiling()) for session in self._graphs.sessions()]


def _cuts(first: int, batch: int, pieces: int) -> list[slice]:
    """Rows `first` to `first + batch - 1` in pieces of equal size, at most so many, each of `PIECE` rows or more."""
    pieces = min(pieces, batch // PIECE)
    if pieces < 2:
        return [slice(first, first + batch)]
    ends = [first + batch * piece // pieces for piece in range(pieces + 1)]
    return [slice(*piece) for piece in pairwise(ends)]


def _bind(bind: Any, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


def _bind_rows(bind: Any, name: str, cache: Any, rows: slice) -> None:
    """Bind rows of a cache where it lies; by address, since an OrtValue has no slices."""
    if isinstance(cache, np.ndarray):
        _bind(bind, name, cache[rows])
        return
    slots, *shape = cache.shape()
    address = cache.data_ptr() + rows.start * (cache.tensor_size_in_bytes() // slots)
    bind(name, cache.device_name(), 0, cache.element_type(), [rows.stop - rows.start, *shape], address)


@contextmanager
def _writable(cache: Any) -> Iterator[Array]:
    """A cache as an array. From a device all of it comes and goes: comparisons, which run there, change no slots."""
    if isinstance(cache, np.ndarray):
        yield cache
        return
    values = cache.numpy()
    yield values
    cache.update_inplace(values)
