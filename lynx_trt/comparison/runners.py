"""What is compared: baselines and candidates behind one interface, or why one of them isn't there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.errors import CheckpointError, LynxError
from lynx_trt.runtime.backend import Array

if TYPE_CHECKING:
    from lynx_trt.runtime.lowering import Form

MOE, PLAIN, HF, TENSORRT = "ort-moe", "ort-plain", "hf-eager", "tensorrt"
BASELINES = (MOE, PLAIN, HF)
PREFIX = "lynx@"


class Runner(Protocol):
    """A model that decodes one batch of equally long sequences."""

    def prefill(self, ids: Array) -> Array:
        """Forget all sequences, take the prompts [B,S] i64 and return the logits [B,V] of their last tokens."""
        ...

    def decode(self, tokens: Array) -> Array:
        """One token [B] i64 for each sequence; returns logits [B,V]."""
        ...

    @property
    def active(self) -> Array | None:
        """Active experts [N] of the last step, None where they aren't known."""
        ...


@dataclass(frozen=True)
class Spec:
    """One row of the comparison. `budgets` [N] for ONNX Runtime; `form` as in runtime/lowering.py."""

    name: str
    what: str
    baseline: bool
    kind: str
    budgets: tuple[int, ...] = ()
    form: str | None = None
    source: Path | None = None
    absent: str | None = None


@dataclass
class Opened:
    """A runner, or the reason why there is none. Seconds are those of loading."""

    spec: Spec
    runner: Runner | None
    absent: str | None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class OrtRunner:
    """The artifact's graph in ONNX Runtime on the CPU."""

    def __init__(
        self, artifact: Artifact, spec: Spec, slots: int, threads: int | None, profile: Path | None = None
    ) -> None:
        from lynx_trt.runtime.ort import OrtBackend

        form: Form | None = spec.form  # type: ignore[assignment]  # a Spec also describes what is no graph
        self.backend = OrtBackend(artifact, slots, threads=threads, form=form, profile=profile)
        self._budgets = np.array(spec.budgets, np.int32)
        self._everything = np.array([layer.experts for layer in artifact.manifest.model.moe_layers], np.int32)
        self._past = np.zeros(0, np.int64)
        self._active: Array | None = None

    def prefill(self, ids: Array) -> Array:
        """See Runner."""
        lengths = np.full(len(ids), ids.shape[1], np.int64)
        result = self.backend.step(ids, np.zeros_like(lengths), lengths, self._everything)
        self._past = lengths
        return result.logits

    def decode(self, tokens: Array) -> Array:
        """See Runner."""
        result = self.backend.step(tokens[:, None], self._past, np.ones_like(self._past), self._budgets)
        self._past = self._past + 1
        self._active = result.active
        return result.logits

    @property
    def active(self) -> Array | None:
        """See Runner; the fused baseline has no count."""
        return None if self._active is None or self._active.min() < 0 else self._active


class HuggingFaceRunner:
    """The checkpoint in transformers, eager, float32."""

    def __init__(self, checkpoint: Path, threads: int | None) -> None:
        import torch
        import transformers

        if threads:
            torch.set_num_threads(threads)
        try:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            ).eval()
        except Exception as error:
            raise CheckpointError(f"transformers can't load {checkpoint}: {str(error).splitlines()[0]}") from None
        self._cache: Any = None

    def prefill(self, ids: Array) -> Array:
        """See Runner."""
        self._cache = None
        return self._forward(ids)

    def decode(self, tokens: Array) -> Array:
        """See Runner."""
        return self._forward(tokens[:, None])

    def _forward(self, ids: Array) -> Array:
        import torch

        with torch.no_grad():
            out = self._model(
                input_ids=torch.from_numpy(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self._cache = out.past_key_values
        logits: Array = out.logits[:, -1].float().numpy()
        return logits

    @property
    def active(self) -> Array | None:
        """See Runner."""
        return None


def specs(
    artifact: Artifact, *, baselines: Sequence[str], budgets: Sequence[str], checkpoint: Path | None
) -> list[Spec]:
    """Everything that is to be compared, baselines first, also what can't be.

    Raises:
        UsageError: a budget is out of its range.
    """
    everything = tuple(layer.experts for layer in artifact.manifest.model.moe_layers)
    known = {
        MOE: Spec(MOE, "ONNX Runtime, com.microsoft.MoE, no selection", True, "ort", everything, "baseline"),
        PLAIN: Spec(PLAIN, "ONNX Runtime, model.onnx as it is, selection off", True, "ort", everything),
        HF: Spec(
            HF,
            "Hugging Face eager, float32",
            True,
            "hf",
            source=checkpoint,
            absent=None if checkpoint else "no checkpoint: pass its folder with --checkpoint",
        ),
    }
    found = [known[name] for name in baselines]
    for budget in budgets:
        chosen = _budgets(artifact, budget)
        name = "ONNX Runtime, lowered, " + ("selection off" if budget == "off" else f"budget {budget}")
        found.append(Spec(f"{PREFIX}{budget}", name, False, "ort", chosen, "auto"))
    found = list(dict.fromkeys(found))
    return [*found, Spec(TENSORRT, "TensorRT engine", False, "tensorrt", absent=_no_tensorrt(artifact))]


def _budgets(artifact: Artifact, budget: str) -> tuple[int, ...]:
    from lynx_trt.generate import budgets_for

    if budget == "off":
        return tuple(layer.experts for layer in artifact.manifest.model.moe_layers)
    return tuple(budgets_for(artifact.manifest, None if budget == "own" else budget))


def _no_tensorrt(artifact: Artifact) -> str:
    from lynx_trt.tensorrt.gpu import compute_capabilities

    if artifact.manifest.engine is None:
        return f"the artifact has no engine ({artifact.manifest.engine_absent})"
    if not compute_capabilities():
        return "no GPU on this machine"
    return "this version of lynx-trt can't run engines in a comparison yet"


def open_runner(artifact: Artifact, spec: Spec, slots: int, threads: int | None) -> Opened:
    """Load one; what goes wrong is noted, and the rest of the comparison goes on."""
    if spec.absent:
        return Opened(spec, None, spec.absent)
    start = time.perf_counter()
    try:
        runner = _make(artifact, spec, slots, threads)()
    except LynxError as error:
        return Opened(spec, None, str(error))
    return Opened(spec, runner, None, time.perf_counter() - start)


def _make(artifact: Artifact, spec: Spec, slots: int, threads: int | None) -> Callable[[], Runner]:
    if spec.kind == "hf":
        assert spec.source is not None
        source = spec.source
        return lambda: HuggingFaceRunner(source, threads)
    return lambda: OrtRunner(artifact, spec, slots, threads)
