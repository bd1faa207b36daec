"""ONNX Runtime on the CPU: the reference backend, and what runs where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.errors import ArtifactError, GenerationError
from lynx_trt.runtime.backend import Array, StepResult

ELEMENT = {"fp32": np.float32, "fp16": np.float16}
ONNX_FILE = "model.onnx"


class OrtBackend:
    """The artifact's graph in ONNX Runtime, with one cache buffer a layer that is both input and output.

    Binding the same memory as past and present lets TensorScatter write in place; otherwise ONNX Runtime copies the
    whole cache at every step.
    """

    def __init__(self, artifact: Artifact, slots: int, *, threads: int | None = None) -> None:
        """Load the graph and allocate caches for `slots` sequences.

        Raises:
            ArtifactError: onnxruntime is missing, can't load the graph, or the precision is none it has on the CPU.
        """
        model = artifact.manifest.model
        if model.precision not in ELEMENT:
            raise ArtifactError(
                f"{artifact.folder} is built in {model.precision}, which ONNX Runtime can't compute on the CPU; "
                "build it with --precision fp16 or fp32 to run it here"
            )
        self.slots = slots
        self._session = _session(artifact, threads)
        element = ELEMENT[model.precision]
        self._caches: dict[str, Array] = {}
        for layer, cache in enumerate(model.caches):
            shapes = {"key": (cache.key_heads, cache.key_size), "value": (cache.value_heads, cache.value_size)}
            for part, (heads, size) in shapes.items():
                # Zeros and not garbage: a masked row times a NaN would still be a NaN.
                buffer = np.zeros((slots, heads, model.cache_rows, size), dtype=element)
                self._caches[f"key_values.{layer}.{part}"] = buffer
        self._rows = model.max_length

    def step(self, input_ids: Array, past_lengths: Array, lengths: Array, budgets: Array) -> StepResult:
        """See Backend. Rows 0 to B-1 of the caches are used and updated.

        Raises:
            GenerationError: a row would run over the end of the cache.
        """
        batch, length = input_ids.shape
        # Padding is written to the cache as well, so the whole width has to fit, not the real tokens alone.
        if int(past_lengths.max()) + length > self._rows:
            raise GenerationError(
                f"a step of {length} tokens at position {past_lengths.max()} exceeds {self._rows} rows"
            )
        binding = self._session.io_binding()
        feeds = {"input_ids": input_ids, "past_lengths": past_lengths, "lengths": lengths, "budgets": budgets}
        dtypes = {"budgets": np.int32}
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value, dtype=dtypes.get(name, np.int64)))
        for name, cache in self._caches.items():
            _bind(binding.bind_input, f"past_{name}", cache[:batch])
            _bind(binding.bind_output, f"present_{name}", cache[:batch])
        binding.bind_output("logits", "cpu")
        binding.bind_output("active_experts", "cpu")
        self._session.run_with_iobinding(binding)
        outputs = dict(zip(self._output_names(), binding.get_outputs(), strict=True))
        return StepResult(outputs["logits"].numpy(), outputs["active_experts"].numpy())

    def _output_names(self) -> list[str]:
        """Names in the order in which `step` binds them."""
        return [*(f"present_{name}" for name in self._caches), "logits", "active_experts"]


def _bind(bind: Any, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


def _session(artifact: Artifact, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ArtifactError('onnxruntime is not installed; install it with: pip install "lynx-trt[cpu]"') from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(artifact.path(ONNX_FILE)), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} can't load {artifact.path(ONNX_FILE)}: {first}"
        ) from None
