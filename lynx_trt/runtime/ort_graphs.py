"""The sessions of ONNX Runtime that run an artifact's steps: which graphs there are, and on which device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.errors import ArtifactError, first_line
from lynx_trt.machine import weights_problem
from lynx_trt.runtime.backend import Array

if TYPE_CHECKING:
    from pathlib import Path

    from lynx_trt.runtime.lowering import Form, Lowered

Device = Literal["cpu", "cuda"]
PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ONNX_FILE = "model.onnx"
# Where a graph that is loaded from memory has its external data.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
# So that weights become float32 at load, not at every step: without these ONNX Runtime leaves a constant that would
# take more than 1 GiB, and every DequantizeLinear, to be computed when it is read.
AT_LOAD = {"optimization.constant_folding_max_output_size_in_bytes": "0", "session.disable_quant_qdq": "1"}


@dataclass(frozen=True)
class Graph:
    """A session of ONNX Runtime.

    Attributes:
        session: the session.
        routers: whether it gives what tokens choose experts by, in place of the active experts.
        restricts: whether it takes a restriction.
    """

    session: Any
    routers: bool = False
    restricts: bool = True


@dataclass(frozen=True)
class Graphs:
    """What runs the steps.

    Attributes:
        whole: any step.
        free: steps that restrict nothing; may be `whole`.
        apart: the same on one thread, for pieces of a decode step and for one token; None where that isn't worth it.
        single: steps of one token that restrict something, on one thread; None where they are no special case.
    """

    whole: Graph
    free: Graph
    apart: Graph | None = None
    single: Graph | None = None

    def sessions(self) -> list[Any]:
        """Each once."""
        graphs = (self.whole, self.single, self.free, self.apart)
        return list(dict.fromkeys(graph.session for graph in graphs if graph))


def open_graphs(
    artifact: Artifact, threads: int | None, form: Form | None, profile: Path | None, device: Device, *, cut: bool
) -> Graphs:
    """The graphs, more than one where that is worth it: small experts.

    There the selection's nodes cost more than the experts, and more copies of the weights are little. With `cut`
    steps may be cut into pieces.

    Raises:
        ArtifactError: onnxruntime is missing or can't load the graph, or this machine has too little memory for it.
    """
    from lynx_trt.runtime.lowering import lower

    if device == "cpu" and (problem := weights_problem(artifact.manifest.model)):
        raise ArtifactError(
            f"{artifact.folder} can't run here: {problem}; run it on a GPU that its engine is for, or on a larger "
            "machine"
        )
    if form is None:
        whole = Graph(_session(artifact, str(artifact.path(ONNX_FILE)), threads, profile, device))
        return Graphs(whole, whole)

    def graph(lowered: Lowered, label: str, *, count: int | None = threads, restricts: bool = True) -> Graph:
        file = profile and profile.with_name(profile.name + label)
        source = lowered.model.SerializeToString()
        return Graph(_session(artifact, source, count, file, device), lowered.routers, restricts)

    def lowered_as(form: Form) -> Lowered:
        return lower(artifact, form=form, attention=device == "cpu")

    def beside(form: Form) -> Lowered | None:
        """None where another routing rule, or other votes, have no such form: then `whole` runs those steps too."""
        try:
            return lowered_as(form)
        except ArtifactError:
            return None

    lowered = lowered_as(form)
    forms = set(lowered.forms)
    whole = free = graph(lowered, "")
    single = plain = None
    if form == "auto" and forms in ({"masked"}, {"fused"}):
        one, plain = beside("single") if forms == {"masked"} else None, beside("unrestricted")
        single = graph(one, "-single", count=1) if one else None
        free = graph(plain, "-free", restricts=False) if plain else whole
    elif form == "baseline" and lowered.small:
        plain = lowered
    if not cut or not plain:
        return Graphs(whole, free, single=single)
    apart = free if threads == 1 else graph(plain, "", count=1, restricts=form == "baseline")
    return Graphs(whole, free, apart, single)


def _session(artifact: Artifact, source: str | bytes, threads: int | None, profile: Path | None, device: Device) -> Any:
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
        for name, value in AT_LOAD.items():
            options.add_session_config_entry(name, value)
    if device != "cpu":
        if problem := device_problem(device):
            raise ArtifactError(f"{artifact.folder} can't run on {device}: {problem}")
        options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    providers = list(dict.fromkeys((PROVIDERS[device], PROVIDERS["cpu"])))
    try:
        session = onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} can't load {artifact.path(ONNX_FILE)}: {first_line(error)}"
        ) from None
    # Without CUDA's libraries it goes on with the CPU and says so in its log only.
    if PROVIDERS[device] not in session.get_providers():
        raise ArtifactError(
            f"{artifact.folder} can't run on {device}: ONNX Runtime could not set up {PROVIDERS[device]}"
        )
    return session


def device_problem(device: Device) -> str | None:
    """Why ONNX Runtime can't run on a device here, a clause; None where it can, as far as one small copy shows."""
    import onnxruntime

    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        return f"this onnxruntime {onnxruntime.__version__} has no {PROVIDERS[device]}"
    try:
        on_device(np.zeros(1, np.float32), device)
    except Exception as error:
        return f"onnxruntime {onnxruntime.__version__} can't use a GPU here: {first_line(error)}"
    return None


def on_device(array: Array, device: Device) -> Any:
    """An OrtValue with a copy of an array."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)


def left_to_cpu(graphs: Graphs, device: Device) -> list[str]:
    """A line for each graph of which a part runs on the CPU, though another device was asked for."""
    kinds = {graphs.free: " without selection", graphs.single: " for one token", graphs.whole: ""}
    lines = []
    for graph, which in kinds.items():
        if graph is None:
            continue
        parts = graph.session.get_provider_graph_assignment_info()
        left = Counter(n.op_type for part in parts if part.ep_name != PROVIDERS[device] for n in part.get_nodes())
        if left:
            count = sum(len(part.get_nodes()) for part in parts)
            names = ", ".join(f"{number} {name}" for name, number in left.most_common())
            lines.append(f"{left.total()} of {count} nodes{which and f' of the graph{which}'} run on the CPU: {names}")
    return lines
