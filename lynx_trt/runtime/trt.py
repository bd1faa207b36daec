"""TensorRT on a GPU: the artifact's engine, its caches in place, and a CUDA graph for each size of decode step.

One engine holds the weights once; it has execution contexts for prefill, for decode, and one more for each captured
size of decode step (TensorRT's advice: a graph belongs to the state of its context). They share one block of scratch
memory, since they run one after another on one stream. A cache is bound as input and output at the same address:
TensorRT's KV cache update demands that, and writes in place. So are states, which our plugins read before they write.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.artifact import ENGINE, Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import ArtifactError, GenerationError, TensorRTError
from lynx_trt.runtime.backend import Array, Draws, NextTokens, StepResult, StepSizes, beginning
from lynx_trt.runtime.buffers import Buffers
from lynx_trt.runtime.draws import DeviceDraws
from lynx_trt.tensorrt.gpu import unsupported

if TYPE_CHECKING:
    from lynx_trt.runtime.cuda import Gpu

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# A size of decode step is captured the third time that it comes: the first run loads its kernels, and one that comes
# once or twice is not worth a capture.
RUNS_BEFORE_CAPTURE = 2
UPLOAD_BYTES = 64 << 20


@dataclass(frozen=True)
class _Cache:
    """One of the caches, [slots, heads, rows, size]: its name, address, and bytes of a row and of a head.

    Or a layer's state, which has no rows: `row` is 0, and all of it is one head. A ring has no first rows.
    """

    name: str
    address: int
    row: int
    head: int
    heads: int
    ring: bool = False

    @property
    def slot(self) -> int:
        """Bytes of a slot."""
        return self.head * self.heads

    def used(self, length: int) -> int:
        """Bytes of a head that have what is of the first `length` tokens."""
        return length * self.row if self.row and not self.ring else self.head


class TensorRTBackend:
    """The artifact's engine on a GPU. It must be closed, or the process end, for its memory to come back."""

    def __init__(
        self, artifact: Artifact, slots: int, *, gpu: Gpu | None = None, tensorrt: Any = None, graphs: bool = True
    ) -> None:
        """Load the engine and allocate caches for `slots` sequences.

        Args:
            artifact: an opened artifact with an engine.
            slots: sequences; no more than the decode profile has.
            gpu: where it runs; None: GPU 0.
            tensorrt: TensorRT's module, with our plugins registered; None: the one that the engine was built by.
            graphs: capture decode steps in CUDA graphs.

        Raises:
            ArtifactError: there is no engine, it doesn't take this many sequences, it is of a TensorRT that does not
                run on this GPU, or TensorRT refuses it.
            TensorRTError: TensorRT or the GPU is missing, or has no room.
        """
        engine = artifact.manifest.engine
        if engine is None:
            raise ArtifactError(f"{artifact.folder} has no engine: {artifact.manifest.engine_absent}")
        self._artifact, self._graphs_wanted = artifact, graphs
        self.rewinds = artifact.manifest.model.rewinds
        decode, prefill = (_Limits.of(artifact, name) for name in ("decode", "prefill"))
        self._prefill_least, self._decode_least = prefill.length[0], decode.batch[0]
        self._check_slots(slots, decode, prefill)
        # An engine that takes no fewer rows gets idle ones.
        self.slots = max(slots, decode.batch[0])
        chunk = artifact.manifest.model.chunk
        length = min(prefill.length[1], chunk or prefill.length[1])
        self.sizes = StepSizes(_buckets(decode.batch[0], self.slots), prefill.batch[1], length, chunk)
        if gpu is None:
            from lynx_trt.runtime.cuda import Cuda

            gpu = Cuda()
        self._gpu = gpu
        # Asked first: TensorRT reads the whole engine before it says so, in words of its own.
        if reason := unsupported(engine.flavor, [gpu.driver.device().sm]):
            raise ArtifactError(f"the engine of {artifact.folder} can't run here: {reason}")
        self._rt = _Runtime(artifact, tensorrt or _tensorrt(engine.flavor))
        self._rows = artifact.manifest.model.cache_rows
        self._caches = self._allocate_caches()
        self._states = [cache for cache in self._caches if not cache.row]
        self._load_experts()
        most = max(self.slots, prefill.batch[1] * prefill.length[1])
        rows = max(self.slots, prefill.batch[1])
        self._io = Buffers(gpu, artifact, most, rows)
        self._draws = DeviceDraws(artifact, gpu, self._io, rows)
        self._scratch_bytes = int(self._rt.engine.device_memory_size_v2)  # the largest step of any profile
        self._scratch = gpu.allocate(self._scratch_bytes, "the engine's scratch memory")
        self._prefill = self._context("prefill")
        self._decode = self._context("decode")
        self._captured: dict[int, tuple[_Context, Any]] = {}
        self._seen: dict[int, int] = {}
        self.graphs_refused: str | None = None
        gpu.synchronize()

    # --- Setting up.

    def _check_slots(self, slots: int, decode: _Limits, prefill: _Limits) -> None:
        folder = self._artifact.folder
        if slots > decode.batch[1]:
            raise ArtifactError(
                f"{slots} sequences at a time, and the engine of {folder} decodes {decode.batch[1]} at most: ask for "
                f"fewer, or build with --decode-batch 1:8:{slots}"
            )
        if prefill.batch[0] > 1:
            raise ArtifactError(
                f"the engine of {folder} prefills no fewer than {prefill.batch[0]} sequences at a time, and prompts "
                f"come one by one: build with --prefill-batch 1:1:{prefill.batch[1]}"
            )

    def _allocate_caches(self) -> list[_Cache]:
        model = self._artifact.manifest.model
        element = BYTES[model.precision]
        caches = []
        for number, shape in enumerate(model.caches, 1):
            row, head = shape.size * element, shape.size * element * (shape.rows or self._rows)
            bytes_ = self.slots * shape.heads * head
            what = f"the caches of {self.slots} sequences of {self._rows} tokens ({number} of {len(model.caches)})"
            address = self._gpu.allocate(bytes_, what)
            # Zeros and not garbage: a masked row times a NaN would still be a NaN.
            self._gpu.zero(address, bytes_)
            caches.append(_Cache(shape.name, address, row, head, shape.heads, shape.ring > 0))
        for number, state in enumerate(model.states, 1):
            size = math.prod(state.shape) * BYTES[state.precision]
            what = f"the states of {self.slots} sequences ({number} of {len(model.states)})"
            address = self._gpu.allocate(self.slots * size, what)
            self._gpu.zero(address, self.slots * size)
            caches.append(_Cache(state.name, address, 0, size, 1))
        return caches

    def _load_experts(self) -> None:
        """Expert weights that are not in the engine, from their file to the GPU, once for all contexts."""
        engine = self._artifact.manifest.engine
        assert engine is not None
        self._experts: dict[str, int] = {}
        for item in engine.external:
            address = self._gpu.allocate(item["length"], f"the expert weights {item['name']}")
            self._experts[item["name"]] = address
            self._fill(address, item)

    def _fill(self, address: int, item: dict[str, Any]) -> None:
        path = self._artifact.path(item["file"])
        try:
            data = np.memmap(path, np.uint8, "r", item["offset"], item["length"])
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} can't be read ({error}): copy or build the artifact again") from None
        for start in range(0, item["length"], UPLOAD_BYTES):
            piece = np.array(data[start : start + UPLOAD_BYTES])
            self._gpu.upload(address + start, piece)
            self._gpu.synchronize()  # the piece has to live until it is copied

    def _context(self, profile: str, *, captured: bool = False) -> _Context:
        scratch = self._scratch, self._scratch_bytes
        context = _Context(self._rt, profile, self._gpu, scratch, captured=captured)
        for name, address in self._experts.items():
            context.bind(name, address)
        return context

    # --- Steps.

    def step(
        self, input_ids: Array, past_lengths: Array, lengths: Array, restriction: Restriction, *, first: int = 0
    ) -> StepResult:
        """See Backend.

        Raises:
            GenerationError: a row would run over the end of the cache, or the step is larger than the profile.
            TensorRTError: TensorRT or the GPU fails.
        """
        batch, length = self._take(input_ids, past_lengths, lengths, restriction, first=first)
        self._queue(batch, length, first)
        logits, (active, _) = self._io.all_logits(batch), self._io.read(batch)
        self._gpu.synchronize()
        return StepResult(logits, active)

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
        """See Backend; raises what `step` does."""
        batch, length = self._take(input_ids, past_lengths, lengths, restriction, draws, first=first)
        self._queue(batch, length, first)
        if draws.wanted.any():
            self._draws.queue(draws, batch)
        active, tokens = self._io.read(batch)
        self._gpu.synchronize()
        return NextTokens(self._draws.finish(tokens, draws), active)

    def device_seconds(
        self, input_ids: Array, past_lengths: Array, lengths: Array, restriction: Restriction, *, first: int = 0
    ) -> float:
        """Do a step and say how long the GPU took, the copies from and to the host aside; for benchmarks."""
        batch, length = self._take(input_ids, past_lengths, lengths, restriction, first=first)
        return self._gpu.timed(lambda: self._queue(batch, length, first))

    def _take(
        self,
        input_ids: Array,
        past_lengths: Array,
        lengths: Array,
        restriction: Restriction,
        draws: Draws | None = None,
        *,
        first: int,
    ) -> tuple[int, int]:
        """Queue what a step needs: its inputs, and zeros where a sequence begins; its batch and length."""
        batch, length = input_ids.shape
        self.sizes.check_boundary(past_lengths, length)
        # One token of a prompt is no decode step where those have more rows.
        if 1 < length < self._prefill_least or (length == 1 and batch < self._decode_least):
            wider = max(self._prefill_least, 2)
            input_ids = np.pad(input_ids, ((0, 0), (0, wider - length)))
            length = wider
        # Padding is written to the cache as well, so the whole width has to fit, not the real tokens alone.
        if int(past_lengths.max()) + length > self._rows:
            raise GenerationError(
                f"a step of {length} tokens at position {past_lengths.max()} exceeds {self._rows} rows"
            )
        self._gpu.use()
        for slot in beginning(past_lengths, lengths, first) if self._states else ():
            for state in self._states:
                self._gpu.zero(state.address + int(slot) * state.slot, state.slot)
        self._io.write(input_ids, past_lengths, lengths, restriction, draws)
        return batch, length

    def _queue(self, batch: int, length: int, first: int) -> None:
        if length > 1:
            self._run(self._prefill, batch, length, first)
        elif first == 0 and batch in self.sizes.decode_rows:
            self._run_prepared(batch)
        else:
            self._run(self._decode, batch, 1, first)

    def _run(self, context: _Context, batch: int, length: int, first: int) -> None:
        context.shape(self._io, batch, length)
        for cache in self._caches:
            for prefix in ("past", "present"):
                context.bind(f"{prefix}_{cache.name}", cache.address + first * cache.slot)
        context.run()

    def _run_prepared(self, batch: int) -> None:
        """A decode step of a size that comes again and again, from the first slot."""
        if batch in self._captured:
            self._gpu.launch(self._captured[batch][1])
            return
        seen = self._seen[batch] = self._seen.get(batch, 0) + 1
        if not self._graphs_wanted or self.graphs_refused or seen <= RUNS_BEFORE_CAPTURE:
            self._run(self._decode, batch, 1, 0)
            return
        context = self._context("decode", captured=True)
        # TensorRT wants one run with the shapes before it is captured; it does the step itself.
        self._run(context, batch, 1, 0)
        self._gpu.synchronize()
        try:
            self._captured[batch] = context, self._gpu.capture(context.run)
        except TensorRTError as error:
            self.graphs_refused = str(error)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See Backend."""
        self._gpu.use()
        for cache in self._caches:
            to, from_ = cache.address + target * cache.slot, cache.address + source * cache.slot
            self._gpu.copy_rows(to, from_, cache.used(length), cache.head, cache.heads)

    def clear_slot(self, slot: int) -> None:
        """See Backend."""
        self._gpu.use()
        for cache in self._caches:
            self._gpu.zero(cache.address + slot * cache.slot, cache.slot)

    def close(self) -> None:
        """Give the GPU's memory back; the backend can't be used any more."""
        self._gpu.use()
        self._gpu.synchronize()
        self._captured.clear()
        del self._prefill, self._decode
        self._rt.close()
        self._gpu.close()


@dataclass(frozen=True)
class _Limits:
    """A profile's smallest and largest batch and length."""

    batch: tuple[int, int]
    length: tuple[int, int]

    @classmethod
    def of(cls, artifact: Artifact, name: str) -> _Limits:
        engine = artifact.manifest.engine
        assert engine is not None
        for profile in engine.profiles:
            if profile["name"] == name:
                least, _, most = profile["shapes"]["input_ids"]
                return cls((least[0], most[0]), (least[1], most[1]))
        raise ArtifactError(f"the engine of {artifact.folder} has no profile {name}: build it again")


def _buckets(least: int, slots: int) -> tuple[int, ...]:
    """Powers of two between, and both ends."""
    powers = (1 << bit for bit in range(slots.bit_length()))
    return tuple(sorted({least, slots, *(size for size in powers if least < size < slots)}))


class _Runtime:
    """TensorRT's runtime and engine, and what its log said."""

    def __init__(self, artifact: Artifact, trt: Any) -> None:
        manifest = artifact.manifest
        assert manifest.engine is not None
        self.trt = trt
        self.errors: list[str] = []
        self._logger = _logger(trt, self.errors)
        self._runtime = trt.Runtime(self._logger)
        path = artifact.path(ENGINE)
        try:
            plan = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} can't be read ({error}): copy or build the artifact again") from None
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise ArtifactError(f"TensorRT can't load {path}: {self.reasons()}; python -m lynx_trt.inspect says more")
        self.profiles = {profile["name"]: number for number, profile in enumerate(manifest.engine.profiles)}
        names = (self.engine.get_tensor_name(number) for number in range(self.engine.num_io_tensors))
        self.tensors = frozenset(names)

    def reasons(self) -> str:
        """What TensorRT and our plugins complained of last."""
        from lynx_trt.plugins.python_plugin import take_refusals

        said = [*take_refusals(), *self.errors[-3:]]
        self.errors.clear()
        return "; ".join(said) or "it gave no reason"

    def close(self) -> None:
        del self.engine, self._runtime


class _Context:
    """An execution context on one profile, its scratch memory given by us."""

    def __init__(
        self, runtime: _Runtime, profile: str, gpu: Gpu, scratch: tuple[int, int], *, captured: bool = False
    ) -> None:
        how = runtime.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        kernels = getattr(runtime.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if captured and kernels is not None:
            # TensorRT for RTX runs a shape with fallback kernels while it compiles better ones, in the background: a
            # graph would keep the fallback. Here it compiles them in the run before the capture.
            config = runtime.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(how)
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
            how = config
        context = runtime.engine.create_execution_context(how)
        if context is None:
            raise TensorRTError(f"TensorRT makes no execution context: {runtime.reasons()}")
        self._runtime, self._context, self._gpu = runtime, context, gpu
        if not context.set_optimization_profile_async(runtime.profiles[profile], gpu.stream):
            raise TensorRTError(f"TensorRT can't use the profile {profile}: {runtime.reasons()}")
        context.set_device_memory(*scratch)
        self._bound: dict[str, int] = {}
        self._shaped: tuple[int, int] | None = None

    def bind(self, name: str, address: int) -> None:
        """Give a tensor its memory; an engine may lack one that it has no use for."""
        if name in self._runtime.tensors and self._bound.get(name) != address:
            self._check(self._context.set_tensor_address(name, address), f"the address of {name}")
            self._bound[name] = address

    def shape(self, io: Buffers, batch: int, length: int) -> None:
        """Give the inputs their shapes, and inputs and outputs their memory."""
        for name, address in io.addresses.items():
            self.bind(name, address)
        if self._shaped == (batch, length):
            return
        shapes = {"input_ids": (batch, length), "past_lengths": (batch,), "lengths": (batch,)}
        engine = self._runtime.engine
        for name in sorted(self._runtime.tensors):
            if name.startswith(("past_key_values.", "past_states.")):
                shapes[name] = (batch, *tuple(engine.get_tensor_shape(name))[1:])
        for name, shape in shapes.items():
            if name in self._runtime.tensors and not self._context.set_input_shape(name, shape):
                raise GenerationError(
                    f"a step of {batch} sequences of {length} tokens is outside the engine's profiles: "
                    f"{self._runtime.reasons()}"
                )
        self._shaped = batch, length

    def run(self) -> None:
        """Queue the step."""
        self._check(self._context.execute_async_v3(self._gpu.stream), "the step")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise TensorRTError(f"TensorRT refuses {what}: {self._runtime.reasons()}")


def _tensorrt(flavor: Any) -> Any:
    """TensorRT's module, our plugins registered."""
    from lynx_trt.plugins import python_plugin
    from lynx_trt.tensorrt import loader

    module = loader.load(flavor).module
    python_plugin.register(module)
    return module


def _logger(trt: Any, errors: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.append(" ".join(text.split()))

    return Logger()
