"""What a calibration works on: everything read and checked, the cheap things first, so that a mistake costs no time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lynx_trt.artifact import TOKENIZER, Artifact, open_artifact
from lynx_trt.budgets import Restriction, check_leaves_experts
from lynx_trt.calibration import options as option
from lynx_trt.calibration import source
from lynx_trt.calibration.company import MORE
from lynx_trt.calibration.cost import LAYER_SECONDS, CostModel, cost_model
from lynx_trt.calibration.model import Probed
from lynx_trt.calibration.options import CalibrateOptions
from lynx_trt.calibration.promise import Promise
from lynx_trt.calibration.text import Sequences, Text, cut, split
from lynx_trt.console import Progress, note
from lynx_trt.errors import ArtifactError, UsageError
from lynx_trt.export.hf import DTYPES
from lynx_trt.runtime.text import Tokenizer
from lynx_trt.selection import Selection


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Attributes:
        parts: the sequences by the part's name: `choose`, `check` (held out) and `more` (text of neither) for a search,
            `all` where something is only measured.
        given: what is only measured; None: floors or budgets are searched for.
    """

    artifact: Artifact
    probed: Probed
    selection: Selection
    text: Text
    validation: Text | None
    parts: dict[str, Sequences]
    batches: list[int]
    length: int
    cost: CostModel
    promise: Promise | None
    dial: option.DialName
    given: Restriction | None


def read(options: CalibrateOptions, progress: Progress) -> Inputs:
    """Read and check everything.

    Raises:
        LynxError: what is wrong with the options, the artifact, the checkpoint or the text, in a sentence.
    """
    batches, promise = option.batch_sizes(options), option.promised(options)
    artifact = open_artifact(options.artifact, on_progress=progress.sums())
    _check_artifact(options, artifact)
    manifest = artifact.manifest
    length = option.sequence_length(options, artifact)
    given = option.given_restriction(options, [layer.experts for layer in manifest.model.moe_layers])
    selection = Selection(**manifest.selection.parameters)  # type: ignore[arg-type]
    width = min(layer.experts_per_token for layer in manifest.model.moe_layers)
    dial = option.dial_name(options, guaranteed=selection.guaranteed(width))
    if given is not None:
        check_leaves_experts(given, selection, width)
        option.note_other_parameters(options, selection)
    folder, text = option.checkpoint_folder(options, artifact), option.text_of(options, artifact)
    validation = option.validation_of(options, artifact, text)
    device = source.choose_device(options.device)
    update = progress.phase("Text and model")
    checkpoint = source.open_source(artifact, folder, trust_remote_code=options.trust_remote_code)
    config = checkpoint.config.get_text_config()
    update(0.2)
    parts = _parts(options, text, validation, artifact, config, length)
    _note_left_over(parts, batches)
    update(0.5)
    cost = _cost(options, artifact, tied=bool(getattr(config, "tie_word_embeddings", False)))
    # On the CPU everything is computed in float32: the halves are slow there, and nobody serves with it.
    dtype = DTYPES["fp32" if device == "cpu" else manifest.model.precision]
    probed = source.load(checkpoint, device=device, dtype=dtype)
    update(1.0)
    return Inputs(artifact, probed, selection, text, validation, parts, batches, length, cost, promise, dial, given)


def _check_artifact(options: CalibrateOptions, artifact: Artifact) -> None:
    folder = artifact.folder
    if artifact.manifest.selection.preset == "off":
        raise UsageError(
            f"{folder} was built with --preset off, which uses all experts: there is nothing to calibrate; "
            "build it with another preset"
        )
    if not artifact.path(TOKENIZER).is_file():
        raise ArtifactError(f"{folder} has no tokenizer; build it with --tokenizer FOLDER to calibrate it")
    if options.write and not option.only_measures(options) and not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} can't be written, so it can't get what is found; pass --no-write to search only")


def _parts(
    options: CalibrateOptions, text: Text, validation: Text | None, artifact: Artifact, config: Any, length: int
) -> dict[str, Sequences]:
    tokenizer = Tokenizer(artifact.path(TOKENIZER))._tokenizer
    separator = _first_token(config, artifact)
    if option.only_measures(options):
        drawn = cut(text, tokenizer, separator=separator, count=options.sequences, length=length, seed=options.seed)
        parts = {"all": drawn}
    else:
        half = options.sequences // 2
        parts = split(
            text, validation, tokenizer, separator=separator, half=half, length=length, seed=options.seed, more=MORE
        )
    largest, known = max(int(part.ids.max(initial=0)) for part in parts.values()), artifact.manifest.model.vocabulary
    if largest >= known:
        raise ArtifactError(
            f"the tokenizer of {artifact.folder} gives the token {largest}, but the model knows {known} tokens; "
            "build it again with the model's own tokenizer (--tokenizer)"
        )
    return parts


def _first_token(config: Any, artifact: Artifact) -> int | None:
    """What stands before each text: the model's own token for it, or the one that ends texts."""
    token = getattr(config, "bos_token_id", None)
    if isinstance(token, int):
        return token
    ends = artifact.manifest.model.end_tokens
    return ends[0] if ends else None


def _note_left_over(parts: dict[str, Sequences], batches: list[int]) -> None:
    count = len(parts.get("check", parts.get("all", ())))
    for batch in batches:
        if left := count % batch:
            of_what = "in each half" if "check" in parts else "in all"
            note(
                f"at a batch of {batch}, {left} of the {count} sequences {of_what} are left out, since they fill no "
                "batch; give a multiple with --sequences"
            )


def _cost(options: CalibrateOptions, artifact: Artifact, *, tied: bool) -> CostModel:
    model = artifact.manifest.model
    return cost_model(
        options.hardware,
        [layer.expert_bytes for layer in model.moe_layers],
        source.other_bytes(model, tied=tied),
        bandwidth=options.bandwidth,
        layer_seconds=LAYER_SECONDS if options.layer_overhead is None else options.layer_overhead / 1e6,
    )
