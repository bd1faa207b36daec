"""Does an artifact fit this machine? Answered before anything is loaded: sums, versions, plugin, GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lynx_trt.artifact import DRAWS, TOKENIZER, Artifact, check_files
from lynx_trt.errors import ArtifactError
from lynx_trt.machine import weights_problem

PLUGIN = {"namespace": "lynx", "version": "1"}


@dataclass(frozen=True)
class Preflight:
    """One line for each thing that doesn't fit, and for each that is worth knowing."""

    problems: list[str]
    notes: list[str]


def preflight(
    artifact: Artifact, *, verify: bool = True, on_progress: Callable[[float], None] | None = None
) -> Preflight:
    """Look the artifact and this machine through.

    Args:
        artifact: an opened artifact.
        verify: compare the files' sha256 as well (reads all of them once).
        on_progress: see `check_files`.
    """
    problems = check_files(artifact, on_progress) if verify else []
    notes: list[str] = []
    _check_plugin(artifact, problems)
    _check_onnxruntime(artifact, problems, notes)
    _check_engine(artifact, problems, notes)
    _check_tokenizer(artifact, problems, notes)
    return Preflight(problems, notes)


def _check_tokenizer(artifact: Artifact, problems: list[str], notes: list[str]) -> None:
    from lynx_trt.runtime.text import Tokenizer

    if TOKENIZER not in artifact.manifest.files:
        notes.append("no tokenizer: the artifact takes token ids but no text; build with --tokenizer FOLDER to add one")
        return
    if any(TOKENIZER in problem for problem in problems):  # its sum has said what is wrong with it
        return
    try:
        Tokenizer(artifact.path(TOKENIZER))
    except ArtifactError as error:
        problems.append(str(error))


def _check_plugin(artifact: Artifact, problems: list[str]) -> None:
    built = artifact.manifest.plugin
    if built != PLUGIN:
        problems.append(
            f"the engine needs plugin version {built.get('version')} of namespace {built.get('namespace')}; "
            f"this lynx-trt has version {PLUGIN['version']} of {PLUGIN['namespace']}; build the artifact again"
        )


def _check_onnxruntime(artifact: Artifact, problems: list[str], notes: list[str]) -> None:
    from importlib.metadata import PackageNotFoundError, version

    names = ("onnxruntime", "onnxruntime-gpu")
    found = None
    for name in names:
        try:
            found = version(name)
            break
        except PackageNotFoundError:
            continue
    if found is None:
        problems.append('ONNX Runtime is not installed, so nothing here can run the graph; pip install "lynx-trt[cpu]"')
    elif tuple(int(part) for part in found.split(".")[:2]) < (1, 32):
        problems.append(f"ONNX Runtime {found} is too old for opset 24; install 1.32 or later")
    precision = artifact.manifest.model.precision
    if artifact.manifest.foreign is None and (problem := weights_problem(artifact.manifest.model)):
        notes.append(f"ONNX Runtime can't run it here: {problem}")
    elif precision != "fp32":
        notes.append(f"built in {precision}: ONNX Runtime computes it in float32 on the CPU, with float32's memory")


def _check_engine(artifact: Artifact, problems: list[str], notes: list[str]) -> None:
    from lynx_trt.tensorrt.gpu import compute_capabilities

    engine = artifact.manifest.engine
    if engine is None:
        notes.append(f"no engine: {artifact.manifest.engine_absent}")
    elif not compute_capabilities():
        # A graph with inputs of its own is run by whoever exported it, not by our runtime.
        can = artifact.manifest.foreign is None and not weights_problem(artifact.manifest.model)
        notes.append(f"no GPU here, so the engine can't run{'; ONNX Runtime on the CPU can' if can else ''}")
    else:
        problems += engine_problems(artifact)


def engine_problems(artifact: Artifact) -> list[str]:
    """Why this machine can't run the artifact's engine, a sentence each; empty if nothing is known to hinder it."""
    from lynx_trt.plugins.blob import runs_on
    from lynx_trt.tensorrt.gpu import PRODUCTS, compute_capabilities, memory_bytes, unsupported
    from lynx_trt.tensorrt.loader import describe

    engine = artifact.manifest.engine
    if engine is None:
        return [f"there is no engine: {artifact.manifest.engine_absent}"]
    capabilities = compute_capabilities()[:1]  # the runtime takes the first; CUDA_VISIBLE_DEVICES says which that is
    if not capabilities:
        return ["there is no GPU that the CUDA driver reports"]
    # Neither another version nor other kernels would help then.
    if reason := unsupported(engine.flavor, capabilities):
        return [reason]
    problems = []
    product = PRODUCTS[engine.flavor]
    here = describe()[engine.flavor]
    if here is None:
        problems.append(f"the engine needs {product} {engine.tensorrt}, which is not installed")
    elif here != engine.tensorrt:
        problems.append(
            f"the engine was built by {product} {engine.tensorrt}, and {here} is installed; build it again here"
        )
    weights, memory = artifact.manifest.model.weight_bytes, memory_bytes()
    if memory and weights > memory:
        problems.append(
            f"the weights take {weights / 1e9:,.1f} GB, and this GPU has {memory / 1e9:,.1f} GB of memory; "
            "take a larger one"
        )
    if not engine.compute_capabilities:
        problems.append(
            "the engine holds no GPU kernels, so it can't run; build it again with "
            f"--sm {','.join(map(str, capabilities))}"
        )
    has = ", ".join(map(str, engine.compute_capabilities))
    problems += [
        f"the engine has kernels for SM {has}, and this GPU is SM {capability}; build it again for it"
        for capability in capabilities
        if engine.compute_capabilities and not any(runs_on(sm, capability) for sm in engine.compute_capabilities)
    ]
    # A graph that others exported gives its logits to whoever runs it.
    if engine.compute_capabilities and artifact.manifest.foreign is None and DRAWS not in artifact.manifest.files:
        problems.append(
            f"there is no {DRAWS}, which draws tokens on the GPU: an older lynx-trt built this; build it again"
        )
    return problems
