"""What is compared: baselines and candidates behind one interface, or why one of them isn't there."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import CheckpointError, LynxError, first_line
from lynx_trt.preflight import engine_problems
from lynx_trt.runtime.backend import Array, Backend
from lynx_trt.runtime.open import backend_available, open_backend
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.runtime.ort_graphs import Device

if TYPE_CHECKING:
    from lynx_trt.runtime.lowering import Form

MOE, PLAIN, HF, TENSORRT = "ort-moe", "ort-plain", "hf-eager", "tensorrt"
BASELINES = (MOE, PLAIN, HF)
PREFIX = "lynx@"
CUDA = "/cuda"  # behind the name of a runner of ONNX Runtime that is on a GPU


class Runner(Protocol):
    """A model that decodes one batch of equally long sequences."""

    def prefill(self, ids: Array) -> Array:
        """Forget all sequences, take the prompts [B,S] i64 and return the logits [B,V] of their last tokens."""
        ...

    def decode(self, tokens: Array) -> Array:
        """One token [B] i64 for each sequence; returns logits [B,V]."""
        ...

    def close(self) -> None:
        """The runner is not used any more."""
        ...

    @property
    def active(self) -> Array | None:
        """Active experts [N] of the last step, None where they aren't known."""
        ...


NOTHING_ASKED = Restriction(())


@dataclass(frozen=True)
class Spec:
    """One row of the comparison. `restriction` of decode steps; `form` and `provider` as in runtime."""

    name: str
    what: str
    baseline: bool
    kind: str
    restriction: Restriction = NOTHING_ASKED
    form: str | None = None
    source: Path | None = None
    absent: str | None = None
    provider: Device = "cpu"


@dataclass
class Opened:
    """A runner and what is worth knowing of it, or the reason why there is none. Seconds are those of loading."""

    spec: Spec
    runner: Runner | None
    absent: str | None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class BackendRunner:
    """The artifact on one of our own backends, in steps that it is prepared for."""

    def __init__(self, backend: Backend, artifact: Artifact, restriction: Restriction) -> None:
        """`restriction` is that of decode steps; a prefill has all experts."""
        self.backend = backend
        self._restriction = restriction
        self._everything = _restriction(artifact, "off")
        self._past = np.zeros(0, np.int64)
        self._active: Array | None = None

    def prefill(self, ids: Array) -> Array:
        """See Runner."""
        sizes, logits = self.backend.sizes, []
        for first in range(0, len(ids), sizes.prefill_rows):
            rows = ids[first : first + sizes.prefill_rows]
            for start in range(0, ids.shape[1], sizes.prefill_length):
                chunk = np.ascontiguousarray(rows[:, start : start + sizes.prefill_length])
                past, lengths = (np.full(len(rows), value, np.int64) for value in (start, chunk.shape[1]))
                result = self.backend.step(chunk, past, lengths, self._everything, first=first)
            logits.append(np.array(result.logits))
        self._past = np.full(len(ids), ids.shape[1], np.int64)
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def decode(self, tokens: Array) -> Array:
        """See Runner; a batch between two sizes that the backend is prepared for is filled up with idle rows."""
        batch = len(tokens)
        idle = next((rows for rows in self.backend.sizes.decode_rows if rows >= batch), batch) - batch
        lengths = np.ones(batch, np.int64)
        past = self._past
        if idle:
            tokens, past, lengths = (np.pad(values, (0, idle)) for values in (tokens, past, lengths))
        result = self.backend.step(tokens[:, None], past, lengths, self._restriction)
        self._past = self._past + 1
        self._active = result.active
        return result.logits[:batch]

    @property
    def notes(self) -> list[str]:
        """What the backend has to say of itself."""
        return list(getattr(self.backend, "notes", ()))

    def close(self) -> None:
        """Give back what the backend holds beyond this process's own memory."""
        close = getattr(self.backend, "close", None)
        if close:
            close()

    @property
    def active(self) -> Array | None:
        """See Runner; the fused baseline has no count."""
        return None if self._active is None or self._active.min() < 0 else self._active


class HuggingFaceRunner:
    """The checkpoint in transformers, eager, float32."""

    def __init__(self, checkpoint: Path, threads: int | None) -> None:
        import torch
        from transformers.utils import logging

        from lynx_trt.export.checkpoint import open_checkpoint
        from lynx_trt.export.loaded import load_model

        logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        try:
            model = load_model(open_checkpoint(checkpoint), torch.float32, attn_implementation="eager")
            self._model = model.eval()
        except LynxError:
            raise
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

    def close(self) -> None:
        """See Runner."""
        del self._model, self._cache

    @property
    def active(self) -> Array | None:
        """See Runner."""
        return None


def specs(
    artifact: Artifact,
    *,
    baselines: Sequence[str],
    budgets: Sequence[str],
    checkpoint: Path | None,
    providers: Sequence[Device] = ("cpu",),
) -> list[Spec]:
    """Everything that is to be compared, baselines first, also what can't be; ONNX Runtime's on each of `providers`.

    Raises:
        UsageError: a budget is out of its range.
    """
    everything = _restriction(artifact, "off")
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
    found = [spec for name in baselines for spec in _on(providers, known[name])]
    chosen = {budget: _restriction(artifact, budget) for budget in dict.fromkeys(budgets)}
    for budget, values in chosen.items():
        what = f"ONNX Runtime, lowered, {_say(budget)}"
        found += _on(providers, Spec(f"{PREFIX}{budget}", what, False, "ort", values, "auto"))
    absent = _no_tensorrt(artifact)
    if absent:
        return [*found, Spec(TENSORRT, "TensorRT engine", False, "tensorrt", absent=absent)]
    for budget, values in chosen.items():
        found.append(Spec(f"{TENSORRT}@{budget}", f"TensorRT engine, {_say(budget)}", False, "tensorrt", values))
    return found


def _on(providers: Sequence[Device], spec: Spec) -> list[Spec]:
    if spec.kind != "ort":
        return [spec]
    return [
        spec if one == "cpu" else replace(spec, name=f"{spec.name}{CUDA}", what=f"{spec.what}, on CUDA", provider=one)
        for one in providers
    ]


def baseline_of(runner: str, baseline: str | None, there: Container[str]) -> str | None:
    """Of which runner a runner's ratios are, None if it isn't there: `baseline` on the same kind of device.

    So a ratio says what the experts cost, not what a GPU is worth. TensorRT without a CUDA baseline has the CPU's.
    """
    on_cuda = f"{baseline}{CUDA}"
    gpu = runner.endswith(CUDA) or (runner.startswith(TENSORRT) and on_cuda in there)
    name = on_cuda if gpu else baseline
    return name if name in there else None


def _say(budget: str) -> str:
    return "selection off" if budget == "off" else f"budget {budget}"


def _restriction(artifact: Artifact, budget: str) -> Restriction:
    from lynx_trt.generate import restriction_for

    if budget == "off":
        return Restriction(tuple(layer.experts for layer in artifact.manifest.model.moe_layers))
    return restriction_for(artifact.manifest, None if budget == "own" else budget)


def _no_tensorrt(artifact: Artifact) -> str | None:
    """Why the artifact's engine can't be a candidate here; None if nothing is known to hinder it."""
    if artifact.manifest.engine is None:
        return f"the artifact has no engine ({artifact.manifest.engine_absent})"
    if not backend_available("tensorrt"):
        return "no GPU on this machine, or no TensorRT"
    return "; ".join(engine_problems(artifact)) or None


def open_runner(artifact: Artifact, spec: Spec, slots: int, threads: int | None) -> Opened:
    """Load one; what goes wrong is noted, and the rest of the comparison goes on."""
    if spec.absent:
        return Opened(spec, None, spec.absent)
    start = time.perf_counter()
    try:
        runner = _make(artifact, spec, slots, threads)
    except LynxError as error:
        return Opened(spec, None, str(error))
    seconds = time.perf_counter() - start
    return Opened(spec, runner, None, seconds, runner.notes if isinstance(runner, BackendRunner) else [])


def try_out(opened: Opened, prompts: Array) -> None:
    """One prefill [B,S] i64 and one decode step; a runner that fails in it, in whatever way, is absent from there on.

    For CUDA, where a kernel may refuse a shape, or the GPU's memory end, no sooner than in a step.
    """
    if opened.runner is None or opened.spec.provider == "cpu":
        return
    try:
        opened.runner.prefill(np.ascontiguousarray(prompts))
        opened.runner.decode(np.ascontiguousarray(prompts[:, 0]))
    except Exception as error:
        opened.absent = f"a step fails: {first_line(error)}"
        opened.runner = None


def open_ort(
    artifact: Artifact, spec: Spec, slots: int, threads: int | None, profile: Path | None = None
) -> OrtBackend:
    """The backend of a Spec of kind `ort`."""
    form: Form | None = spec.form  # type: ignore[assignment]  # a Spec also describes what is no graph
    return OrtBackend(artifact, slots, threads=threads, form=form, profile=profile, device=spec.provider)


def _make(artifact: Artifact, spec: Spec, slots: int, threads: int | None) -> Runner:
    if spec.kind == "hf":
        assert spec.source is not None
        return HuggingFaceRunner(spec.source, threads)
    if spec.kind == "tensorrt":
        return BackendRunner(open_backend(artifact, slots, name="tensorrt"), artifact, spec.restriction)
    return BackendRunner(open_ort(artifact, spec, slots, threads), artifact, spec.restriction)
