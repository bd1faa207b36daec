"""The model that an artifact was built from: found, checked to be that model, loaded, and hooked into."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lynx_trt.calibration.model import Probed
from lynx_trt.errors import CheckpointError, UsageError
from lynx_trt.export.checkpoint import Checkpoint, empty_model, language_parameters, open_checkpoint
from lynx_trt.export.hf import DTYPES
from lynx_trt.export.weights import WEIGHTS_FILE, CheckpointWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lynx_trt.artifact import Artifact, ModelRecord

# Tensors whose values are compared with the artifact's; the smallest ones, so that it takes no time.
TENSORS_COMPARED = 12


def open_source(artifact: Artifact, folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint in `folder`, if it is the one that `artifact` was built from.

    Raises:
        CheckpointError: it can't be read, or it is another model; the message says in what they differ.
        UnsupportedModelError: transformers doesn't know the model.
    """
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    model = empty_model(checkpoint, DTYPES[artifact.manifest.model.precision])
    weights = CheckpointWeights(checkpoint, model)
    for what, theirs, ours in _differences(artifact.manifest.model, model):
        raise CheckpointError(
            f"{folder} is not the model of {artifact.folder}: its {what} is {theirs}, the artifact's is {ours}; "
            "give the checkpoint that the artifact was built from with --checkpoint"
        )
    changed = _changed_tensor(artifact, weights)
    if changed:
        raise CheckpointError(
            f"{folder} is not the model of {artifact.folder}: both have the same dimensions, but {changed} holds other "
            "values; give the checkpoint that the artifact was built from with --checkpoint"
        )
    return checkpoint


def _differences(record: ModelRecord, model: PreTrainedModel) -> list[tuple[str, Any, Any]]:
    config = model.config.get_text_config()
    pairs = [
        ("architecture", type(model).__name__, record.architecture),
        ("hidden size", int(config.hidden_size), record.hidden),
        ("vocabulary", int(config.vocab_size), record.vocabulary),
        ("number of layers", int(config.num_hidden_layers), record.layers),
        ("number of parameters", language_parameters(model), record.parameters),
    ]
    return [(what, theirs, ours) for what, theirs, ours in pairs if theirs != ours]


def _changed_tensor(artifact: Artifact, weights: CheckpointWeights) -> str | None:
    """Name of a tensor that the artifact has with other values, or None; both are in the artifact's precision."""
    from safetensors import safe_open

    path = artifact.path(WEIGHTS_FILE)
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as stored:
        named = [(name, stored.get_slice(name).get_shape()) for name in stored.keys()]  # noqa: SIM118 - no dict
        common = [(math.prod(shape), name) for name, shape in named if weights.resolve(name) == name]
        for _, name in sorted(common)[:TENSORS_COMPARED]:
            if not _same_bits(stored.get_tensor(name), weights.load(name)):
                return str(name)
    return None


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Not of their values: a NaN, in a checkpoint that has some, equals nothing."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def load(checkpoint: Checkpoint, *, device: str, dtype: torch.dtype) -> Probed:
    """Read the weights, and hook into the model.

    Raises:
        CheckpointError: transformers can't load it, or it doesn't fit into the memory.
        UnsupportedModelError: it has no MoE block that the selection can be applied to.
    """
    from transformers.utils import logging

    from lynx_trt.export.loaded import load_model

    logging.disable_progress_bar()
    try:
        model = load_model(checkpoint, dtype)
        return Probed(model.requires_grad_(False).to(device))
    except (OSError, ValueError, RuntimeError, torch.OutOfMemoryError) as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(f"{checkpoint.folder} can't be loaded: {lines[0] if lines else error!r}") from None


def choose_device(name: str) -> str:
    """`auto` becomes cuda where there is one.

    Raises:
        UsageError: cuda was asked for and isn't there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no GPU here; use --device cpu, or install torch with CUDA")
    return name


def other_bytes(record: ModelRecord, *, tied: bool) -> int:
    """Bytes of the weights that every decode step reads besides the experts'.

    The input embedding is left out where it is a table of its own: of it, a step reads one row a sequence.
    """
    experts = sum(layer.experts * layer.expert_bytes for layer in record.moe_layers)
    element = 4 if record.precision == "fp32" else 2
    table = 0 if tied else record.vocabulary * record.hidden * element
    return max(record.weight_bytes - experts - table, 0)
