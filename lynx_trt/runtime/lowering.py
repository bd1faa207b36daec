"""The lynx ops for ONNX Runtime on the CPU: what measured fastest, made from the artifact's graph as it is loaded.

The function bodies in `model.onnx` say what the ops mean and run anywhere, but a Loop with a copy of each expert's
weights a step is slow. `lower` rewrites the graph in memory and leaves the artifact's files alone: initializers of
the new graph point into the same weights file, so there is no second copy on the disk and no cache to go stale.

What a MoE layer becomes, chosen by the bytes of an expert (onnxruntime 1.32 on 2 shared cores with AVX-512, float32,
median of interleaved runs of one layer, `com.microsoft.MoE` in brackets):

- *grouped*: rows are sorted by expert, split into E parts, and each part goes through its own Gemm with constant
  weights, which ONNX Runtime packs once, at load. A Gemm of no rows returns at once, about a microsecond, so time
  falls with the active experts without an If or a Loop. The fused op packs an expert's weights again at every call
  with more than one row. E=64, K=4, H=1024, I=512, one thread, ms: T=1 1.9 (2.0), T=4 8.9 (10.9), T=16 25 (36) at 44
  active and 16 (26) at 21, T=32 33 (57) at 57 and 18 (35) at 26.
- *fused*: `com.microsoft.MoE`, fed with the logarithm of our weights (and -inf elsewhere), so that its own softmax
  and top-k reproduce them; it skips experts of weight 0. Where experts are small one node beats 2 E of them:
  E=32, H=160, I=48, fastest us: T=1 36 against 82 grouped, T=16 120 and 171, T=32 216 and 265, T=128 659 and 600.
- *masked*: the same where the router is softmax and top-k itself: the op chooses among the experts that the selection
  keeps, so all that is left of the selection is the kept set, some 20 nodes of 96 (selected.py).
- *single*: beside *masked*, for steps of one token, whose experts can only be its own: 7 nodes.
- *unrestricted*: beside *masked* and *fused*, for steps that restrict nothing, without the selection's nodes. An If
  inside the graph was tried: 50 us a layer; more sessions cost nothing but copies of small weights.

Half precision is computed in float32: the CPU has no fp16 matrix product, so ONNX Runtime would convert every
weight at every step. So are quantized weights (dequantize.py). Both become float32 once a session, so where an artifact
has several, which is where experts are small, each has its own; weights that are float32 already are the file's pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from lynx_trt.artifact import Artifact
from lynx_trt.errors import ArtifactError
from lynx_trt.runtime.attention import lower_attention
from lynx_trt.runtime.float32 import widen
from lynx_trt.runtime.fused import Fused, misfit
from lynx_trt.runtime.graph import GraphEdit, drop_dead
from lynx_trt.runtime.grouped import Grouped
from lynx_trt.runtime.moe_layer import Layer, NoFitError

Form = Literal["auto", "grouped", "fused", "masked", "single", "unrestricted", "baseline", "body"]
# Forms that give what tokens choose experts by, for `count_active`, in place of the active experts.
ROUTED = ("masked", "single", "unrestricted")

ONNX_FILE = "model.onnx"
ACTIVE, ROUTER_LOGITS = "active_experts", "router_logits"
LYNX = "lynx"


@dataclass(frozen=True)
class Lowered:
    """A graph to be loaded from memory.

    Attributes:
        model: the graph, its weights in `folder`.
        folder: the artifact's.
        forms: what each MoE layer became.
        small: whether the experts of every layer are small.
        routers: whether it gives, in place of the active experts, what each layer's tokens choose experts by, for
            `count_active`.
    """

    model: onnx.ModelProto
    folder: Path
    forms: tuple[str, ...]
    small: bool
    routers: bool


def lower(artifact: Artifact, *, form: Form = "auto", attention: bool = True) -> Lowered:
    """Rewrite the lynx ops of an artifact's graph, and compute in float32 whatever its precision.

    Args:
        artifact: the artifact; its files are only read.
        form: how every MoE layer is computed. `auto` chooses by shape; `baseline` is what a user would have without
            us, `com.microsoft.MoE` straight from the router's logits and no selection; `unrestricted` is the same
            with the routers' logits for `count_active`, right where `Unrestricted` holds; `single` is right where the
            batch is one token; `body` keeps the functions.
        attention: lower attention and the cache as well. Not for CUDA, whose GroupQueryAttention has no float32: on
            the CPU instead, it would fetch the whole cache at every step.

    Raises:
        ArtifactError: the graph can't be read, or a layer can't be computed in the form that was asked for; the
            message says which and why.
    """
    path = artifact.path(ONNX_FILE)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ArtifactError(f"{path} can't be read as ONNX: {str(error).splitlines()[0]}") from None
    edit = GraphEdit(model, artifact.folder)
    pairs = _pairs(model.graph)
    records = artifact.manifest.model.moe_layers
    if len(pairs) != len(records):
        raise ArtifactError(f"{path} has {len(pairs)} MoE layers, the manifest says {len(records)}; build it again")
    layers = [Layer(edit, *pair, record.experts_per_token) for pair, record in zip(pairs, records, strict=True)]
    if form == "auto" and all(_best(layer) == "fused" for layer in layers):
        # Where the router is no softmax, or layers differ, the selection's nodes stay.
        with suppress(ArtifactError):
            return lower(artifact, form="masked", attention=attention)
    forms, logits = [], []
    for layer, record in zip(layers, records, strict=True):
        forms.append(_best(layer) if form == "auto" else form)
        try:
            logits += _replace(layer, forms[-1])
        except NoFitError as reason:
            raise ArtifactError(f"{record.name} can't be computed as {form}: {reason}") from None
    if routers := form in ROUTED:
        if len({(record.experts, record.experts_per_token) for record in records}) > 1:
            raise ArtifactError(f"{artifact.folder} has layers of different sizes, which have no {form} form")
        _give_router_logits(edit, model.graph, logits)
    if attention:
        lower_attention(edit, model.graph)
    edit.finish()
    drop_dead(model)
    widen(model)
    return Lowered(model, artifact.folder, tuple(forms), all(layer.small for layer in layers), routers)


def _pairs(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Each LynxSelect with the LynxExperts that it feeds, in the graph's order."""
    selects = {node.output[0]: node for node in graph.node if node.domain == LYNX and node.op_type == "LynxSelect"}
    experts = [node for node in graph.node if node.domain == LYNX and node.op_type == "LynxExperts"]
    return [(selects[node.input[1]], node) for node in experts if node.input[1] in selects]


def _best(layer: Layer) -> Form:
    """The form that `auto` takes for a layer on its own."""
    if layer.varying():
        return "body"
    return "fused" if layer.small and misfit(layer) is None else "grouped"


def _replace(layer: Layer, form: Form) -> list[str]:
    """Put a form in the place of a layer's nodes; returns what tokens choose by, where the form has no count.

    Raises:
        NoFitError: this layer has no such form.
    """
    if form == "body":
        return []
    if name := layer.varying():
        raise NoFitError(f"{name} is no constant of the graph")
    edit, routers = layer.edit, []
    with edit.inserting(edit.take(layer.experts), "experts"):
        if form in (*ROUTED, "baseline"):
            fused = Fused(layer)
            selects = form in ("masked", "single")
            output, logits = fused.masked(single=form == "single") if selects else fused.routed()
            routers = [logits]
            edit.take(layer.select)
            unknown = edit.constant(np.array(-1, np.int32))
            edit.add("Identity", [unknown], outputs=[layer.select.output[2]])
        else:
            output = Fused(layer).selected() if form == "fused" else Grouped(layer).output()
        edit.add("Identity", [output], outputs=[layer.experts.output[0]])
    return routers


def _give_router_logits(edit: GraphEdit, graph: onnx.GraphProto, logits: Sequence[str]) -> None:
    """All layers' logits [N T,E] instead of `active_experts`: NumPy counts in less time than eight nodes take."""
    last = edit.producer(ACTIVE)
    assert last is not None
    with edit.inserting(edit.take(last), "experts"):
        edit.add("Concat", list(logits), axis=0, outputs=[ROUTER_LOGITS])
    place = [value.name for value in graph.output].index(ACTIVE)
    graph.output[place].CopyFrom(helper.make_tensor_value_info(ROUTER_LOGITS, TensorProto.FLOAT, None))
