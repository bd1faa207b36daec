"""Which backend runs an artifact, and what the scheduler has to know of its model."""

from __future__ import annotations

from typing import Literal

from lynx_trt.artifact import Artifact, Manifest
from lynx_trt.errors import ArtifactError
from lynx_trt.runtime.backend import Backend
from lynx_trt.runtime.sequence import Limits

Name = Literal["auto", "onnxruntime", "tensorrt"]


def limits_of(manifest: Manifest) -> Limits:
    """Length, experts and end tokens of the model."""
    model = manifest.model
    experts = tuple(layer.experts for layer in model.moe_layers)
    return Limits(model.max_length, model.vocabulary, experts, frozenset(model.end_tokens))


def backend_available(name: Name) -> bool:
    """Whether this machine can run that backend at all, whatever the artifact; nothing is loaded."""
    if name != "tensorrt":
        return True
    from lynx_trt.tensorrt.loader import describe

    found = describe()
    return bool(found["gpus"] and found["auto"])


def open_backend(
    artifact: Artifact, slots: int, *, threads: int | None = None, pieces: int | None = None, name: Name = "auto"
) -> Backend:
    """A backend with `slots` sequence slots.

    Args:
        artifact: an opened artifact.
        slots: sequences that decode together, at most.
        threads: of ONNX Runtime; None leaves it the choice.
        pieces: of a decode step that ONNX Runtime may compute at once, each with one thread; None is one a thread.
        name: `tensorrt` is the engine, on a GPU; `onnxruntime` the graph, on the CPU; `auto` the engine where it
            fits this machine, else the graph.

    Raises:
        ArtifactError: the artifact can't run here so; the message says why.
        TensorRTError: TensorRT or the GPU refuses.
    """
    from lynx_trt.preflight import engine_problems

    problems = engine_problems(artifact) if name != "onnxruntime" else []
    if name == "tensorrt" and problems:
        raise ArtifactError(f"the engine of {artifact.folder} can't run here: {'; '.join(problems)}")
    if name != "onnxruntime" and not problems:
        from lynx_trt.runtime.trt import TensorRTBackend

        return TensorRTBackend(artifact, slots)
    from lynx_trt.runtime.ort import OrtBackend

    return OrtBackend(artifact, slots, threads=threads, pieces=pieces, form="auto")
