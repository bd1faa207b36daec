"""ONNX Runtime on the CPU: what runs where there is no GPU, with the lynx ops lowered to what is fastest there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.errors import ArtifactError, GenerationError
from lynx_trt.runtime.backend import Array, StepResult, StepSizes

if TYPE_CHECKING:
    from pathlib import Path

    from lynx_trt.runtime.lowering import Form

# Precisions that ONNX Runtime has on the CPU; a lowered graph is float32 whatever it was built in.
ELEMENT = {"fp32": np.float32, "fp16": np.float16}
ONNX_FILE = "model.onnx"
# Where a graph that is loaded from memory has its external data.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OrtBackend:
    """The artifact's graph in ONNX Runtime, with one cache buffer a layer that is both input and output.

    Binding the same memory as past and present lets TensorScatter write in place; otherwise ONNX Runtime copies the
    whole cache at every step.
    """

    def __init__(
        self,
        artifact: Artifact,
        slots: int,
        *,
        threads: int | None = None,
        form: Form | None = None,
        profile: Path | None = None,
    ) -> None:
        """Load the graph and allocate caches for `slots` sequences.

        Args:
            artifact: the artifact.
            slots: sequences.
            threads: of ONNX Runtime; None leaves it the choice.
            form: what the lynx ops become (lowering.py), computed in float32, `auto` for speed; None runs
                `model.onnx` as it is, the functions in it and its own precision: the reference.
            profile: where ONNX Runtime writes the time of each node, up to `end_profile`; the name gets a suffix.

        Raises:
            ArtifactError: onnxruntime is missing, can't load the graph, or its own precision is none it has on the CPU.
        """
        model = artifact.manifest.model
        if form in (None, "body") and model.precision not in ELEMENT:
            raise ArtifactError(
                f"{artifact.folder} is built in {model.precision}, which ONNX Runtime can't compute on the CPU; "
                "build it with --precision fp16 or fp32 to run its graph as it is"
            )
        self.slots, self.sizes = slots, StepSizes()
        self._artifact = artifact
        self._session, self._free = _sessions(artifact, threads, form, profile)
        element = ELEMENT[model.precision] if form is None else np.float32
        self._caches: dict[str, Array] = {}
        for layer, cache in enumerate(model.caches):
            shapes = {"key": (cache.key_heads, cache.key_size), "value": (cache.value_heads, cache.value_size)}
            for part, (heads, size) in shapes.items():
                # Zeros and not garbage: a masked row times a NaN would still be a NaN.
                buffer = np.zeros((slots, heads, model.cache_rows, size), dtype=element)
                self._caches[f"key_values.{layer}.{part}"] = buffer
        self._rows = model.max_length

    def step(
        self, input_ids: Array, past_lengths: Array, lengths: Array, budgets: Array, *, first: int = 0
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
        session = self._session
        if self._free is not session:
            from lynx_trt.runtime.lowering import restricts_nothing

            if restricts_nothing(self._artifact, lengths, length, budgets):
                session = self._free
        binding = session.io_binding()
        feeds = {"input_ids": input_ids, "past_lengths": past_lengths, "lengths": lengths}
        dtypes = {"budgets": np.int32}
        if session is not self._free or session is self._session:
            feeds["budgets"] = budgets
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value, dtype=dtypes.get(name, np.int64)))
        for name, cache in self._caches.items():
            _bind(binding.bind_input, f"past_{name}", cache[rows])
            _bind(binding.bind_output, f"present_{name}", cache[rows])
        binding.bind_output("logits", "cpu")
        binding.bind_output("active_experts", "cpu")
        session.run_with_iobinding(binding)
        outputs = dict(zip(self._output_names(), binding.get_outputs(), strict=True))
        return StepResult(outputs["logits"].numpy(), outputs["active_experts"].numpy())

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See Backend."""
        for cache in self._caches.values():
            cache[target, :, :length] = cache[source, :, :length]

    def clear_slot(self, slot: int) -> None:
        """See Backend."""
        for cache in self._caches.values():
            cache[slot] = 0

    def end_profile(self) -> list[str]:
        """Stop profiling; returns the files' paths, one for each graph."""
        return [str(session.end_profiling()) for session in dict.fromkeys((self._session, self._free))]

    def _output_names(self) -> list[str]:
        """Names in the order in which `step` binds them."""
        return [*(f"present_{name}" for name in self._caches), "logits", "active_experts"]


def _bind(bind: Any, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


def _sessions(artifact: Artifact, threads: int | None, form: Form | None, profile: Path | None) -> tuple[Any, Any]:
    """The session, and one for steps that restrict nothing where that is worth it: small experts, fused.

    There the selection's nodes cost more than the experts, and a second copy of the weights is little.
    """
    if form is None:
        session = _session(artifact, str(artifact.path(ONNX_FILE)), threads, profile)
        return session, session
    from lynx_trt.runtime.lowering import lower

    lowered = lower(artifact, form=form)
    session = _session(artifact, lowered.model.SerializeToString(), threads, profile)
    if form != "auto" or set(lowered.forms) != {"fused"}:
        return session, session
    try:
        free = lower(artifact, form="unrestricted").model.SerializeToString()
    except ArtifactError:  # another routing rule: the selection stays in every step
        return session, session
    return session, _session(artifact, free, threads, profile and profile.with_name(f"{profile.name}-free"))


def _session(artifact: Artifact, source: str | bytes, threads: int | None, profile: Path | None) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ArtifactError('onnxruntime is not installed; install it with: pip install "lynx-trt[cpu]"') from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if isinstance(source, bytes):
        options.add_session_config_entry(WEIGHTS_FOLDER, str(artifact.folder.resolve()))
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} can't load {artifact.path(ONNX_FILE)}: {first}"
        ) from None
