"""The opset of a foreign graph, raised to the one that the function bodies of the lynx ops need.

onnx's own converter wants every op to be one of ONNX, and loads the weights; so the few ops that changed their form
between opset 13 and 24 are converted here, and those that only learned new types or options pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lynx_trt.errors import UnsupportedModelError
from lynx_trt.export.ops import OPSET

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST = 13

# Ops whose later versions (up to 24) accept whatever an earlier one (from 13) accepted, and mean the same by it.
_UNCHANGED_NAMES = """
    Acos Acosh Add Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Bernoulli Cast CastLike Constant
    ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DequantizeLinear Det Div Dropout Elu Equal EyeLike
    Flatten GlobalAveragePool GlobalLpPool GlobalMaxPool GreaterOrEqual GRU HardSigmoid HardSwish Identity If
    InstanceNormalization IsInf IsNaN LeakyRelu LessOrEqual Loop LpNormalization LpPool LSTM MaxPool MaxRoiPool
    MaxUnpool Mish Mul Multinomial NegativeLogLikelihoodLoss OptionalGetElement OptionalHasElement Pad Pow PRelu
    QLinearMatMul QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Relu Reshape Resize RNN
    Round Scan ScatterElements ScatterND Selu Shape Sin Sinh Size Softplus Softsign SplitToSequence Squeeze Sub Tan
    ThresholdedRelu TopK Transpose Unsqueeze Where
"""
_UNCHANGED = frozenset(_UNCHANGED_NAMES.split())


def raise_opset(model: ir.Model, path: Path) -> int:
    """Make `model` one of opset 24, in place; returns the opset that it had.

    Raises:
        UnsupportedModelError: the opset is older than 13, or an op changed in a way that isn't converted here.
    """
    imports = model.graph.opset_imports
    if "ai.onnx" in imports:
        imports[""] = imports.pop("ai.onnx")
    had = imports[""]
    if had < OLDEST:
        raise UnsupportedModelError(
            f"{path} has opset {had}, and {OLDEST} is the oldest that can be read; "
            "convert it with onnx.version_converter.convert_version, or export it again"
        )
    for node in list(model.graph.all_nodes()):
        if node.domain == "ai.onnx":
            node.domain = ""
        if node.domain == "" and had != OPSET:
            _convert(node, had, path)
    imports[""] = OPSET
    for subgraph in model.graph.subgraphs():
        subgraph.opset_imports.pop("ai.onnx", None)
    return had


def _convert(node: ir.Node, had: int, path: Path) -> None:
    before, after = _since(node.op_type, had), _since(node.op_type, OPSET)
    if before == after or (before < after and node.op_type in _UNCHANGED):
        return
    adapter = _ADAPTERS.get(node.op_type)
    if before > after or adapter is None:
        raise UnsupportedModelError(
            f"{path} has opset {had}, and node {node.name!r} is a {node.op_type} of version {before}, which opset "
            f"{OPSET} has otherwise (version {after}); export it with opset 18 to {OPSET}"
        )
    adapter(node)


def _since(op_type: str, opset: int) -> int:
    """The version of an op in an opset; 0 for one that ONNX doesn't have (some exporters put theirs in its domain)."""
    import onnx

    try:
        return int(onnx.defs.get_schema(op_type, max_inclusive_version=opset, domain="").since_version)
    except onnx.defs.SchemaError:
        return 0


def _axes_to_input(node: ir.Node) -> None:
    """Reduce ops: the attribute `axes` became an input with opset 18 (13 for ReduceSum)."""
    import numpy as np
    import onnx_ir as ir

    axes = node.attributes.pop("axes", None)
    if axes is None:
        return
    constant = ir.node("Constant", [], {"value": ir.tensor(np.array(axes.as_ints(), np.int64))})
    assert node.graph is not None
    node.graph.insert_before(node, constant)
    node.resize_inputs(2)
    node.replace_input_with(1, constant.outputs[0])


def _count_outputs(node: ir.Node) -> None:
    """Split: with opset 18, equal parts need `num_outputs`."""
    import onnx_ir as ir

    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _rename_modes(node: ir.Node) -> None:
    """GridSample: bilinear and bicubic became linear and cubic with opset 20."""
    import onnx_ir as ir

    mode = node.attributes.get_string("mode", "bilinear")
    node.attributes["mode"] = ir.AttrString(
        "mode", {"bilinear": "linear", "bicubic": "cubic"}.get(str(mode), str(mode))
    )


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_ADAPTERS: dict[str, Callable[[ir.Node], None]] = {
    **{f"Reduce{name}": _axes_to_input for name in _REDUCTIONS},
    "Split": _count_outputs,
    "GridSample": _rename_modes,
}
