"""Which backend runs an artifact, and what the scheduler has to know of its model."""

from __future__ import annotations

from lynx_trt.artifact import Artifact, Manifest
from lynx_trt.runtime.backend import Backend
from lynx_trt.runtime.sequence import Limits


def limits_of(manifest: Manifest) -> Limits:
    """Length, experts and end tokens of the model."""
    model = manifest.model
    return Limits(model.max_length, tuple(layer.experts for layer in model.moe_layers), frozenset(model.end_tokens))


def open_backend(artifact: Artifact, slots: int, *, threads: int | None = None) -> Backend:
    """The backend for this machine: ONNX Runtime.

    Raises:
        ArtifactError: the artifact can't run here.
    """
    from lynx_trt.runtime.ort import OrtBackend

    return OrtBackend(artifact, slots, threads=threads, form="auto")
