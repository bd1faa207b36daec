"""Somebody else's ONNX to lynx ONNX: every MoE block found, rewritten to LynxSelect + LynxExperts, and counted.

The graph keeps its inputs, its outputs and the way it keeps its cache. It gains the inputs `budgets` and `floors`,
where it has to `token_mask`, and the output `active_experts`. Weights stay in their data files unless a block needs
them in another layout; those are streamed, an expert at a time (`foreign_files`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lynx_trt.errors import ExportError, UnsupportedModelError
from lynx_trt.experts import values_an_element
from lynx_trt.export import ops
from lynx_trt.export.foreign_finite import stored_tensors
from lynx_trt.export.onnx_file import open_onnx
from lynx_trt.export.opset import raise_opset

if TYPE_CHECKING:
    import onnx_ir as ir

    from lynx_trt.export.patterns.block import Block
    from lynx_trt.export.patterns.rule import BlockRule, Refusal
    from lynx_trt.export.relayout import Stack, Table
    from lynx_trt.export.step_inputs import AddedInput
    from lynx_trt.selection import Selection


@dataclass(frozen=True)
class LynxBlock:
    """A block that is already ours: the names of its two nodes, and its sizes."""

    select: str
    experts_node: str
    experts: int
    experts_per_token: int
    hidden_size: int
    intermediate: int
    expert_bytes: int
    form: dict[str, str | int | float]
    remap: bool


@dataclass
class Foreign:
    """A foreign model after the patterns were applied.

    Attributes:
        path: of the original file.
        model: the graph; rewritten, unless nothing was found.
        opset: that the original had.
        blocks: what was rewritten, in the order of the graph.
        ours: blocks that were LynxSelect + LynxExperts already.
        selects: every LynxSelect with its K, in the order of the budgets.
        refused: what looks like a block and isn't rewritten.
        counts: rewritten blocks by pattern.
        stacks: weights that have yet to be laid out, by initializer name.
        added: graph inputs that the original doesn't have.
        notes: what a user should know.
        stored: the numbers that the file holds, before the rewrite, for `foreign_finite`.
    """

    path: Path
    model: ir.Model
    opset: int
    blocks: list[Block] = field(default_factory=list)
    ours: list[LynxBlock] = field(default_factory=list)
    selects: list[tuple[ir.Node, int]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    stacks: dict[str, Stack | Table] = field(default_factory=dict)
    added: list[AddedInput] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stored: list[ir.TensorProtocol] = field(default_factory=list)

    @property
    def experts(self) -> list[int]:
        """Experts of each MoE block, in the order of the budgets."""
        return [block.experts for block in self.blocks] or [block.experts for block in self.ours]

    def select(self, selection: Selection) -> int:
        """Give every LynxSelect these parameters; one that only drops goes on doing so. Returns how many there are."""
        from onnx_ir import convenience

        for node, count in self.selects:
            own = {name: attribute.value for name, attribute in node.attributes.items()}
            attributes = ops.select_attributes(
                replace(selection, remap=selection.remap and bool(own["remap"])),
                experts_per_token=count,
                renormalize=bool(own["renormalize"]),
                scale=float(own["scale"]),
            )
            if not count:  # of a block that is ours already, whose K isn't recorded
                attributes["guarantee"] = own["guarantee"]
            for attribute in convenience.convert_attributes(attributes):
                node.attributes[attribute.name] = attribute
        return len(self.selects)


def read_foreign(path: Path, selection: Selection, *, dequantize: bool = False) -> Foreign:
    """Open `path` and rewrite every MoE block that is recognised; whether that is enough, `require_all` says.

    Args:
        path: an .onnx file; its data files are not read.
        selection: parameters of every LynxSelect.
        dequantize: also weights that could stay in int4.

    Raises:
        CheckpointError: the file or its data can't be read.
        UnsupportedModelError: its opset can't be raised.
    """
    from onnx_ir.passes import common

    from lynx_trt.export.standard import standardize

    model = open_onnx(path)
    _inline(model)
    common.RemoveUnusedNodesPass()(model)  # a block whose result nobody reads is none
    stored = stored_tensors(model)
    foreign = Foreign(path, model, raise_opset(model, path), stored=stored)
    find_ours(foreign)
    standardize(model, simple=True)
    infer_shapes(model)
    _rewrite(foreign, selection, dequantize=dequantize)
    return foreign


def require_all(foreign: Foreign, *, allow_partial: bool) -> list[str]:
    """Warnings about what stays as it was, where that is allowed.

    Raises:
        UnsupportedModelError: no block was found, or one that is not recognised and `allow_partial` is not given.
        ExportError: the file is lynx ONNX in part, and holds other blocks as well.
    """
    if foreign.ours and foreign.blocks:
        raise ExportError(
            f"{foreign.path} holds {len(foreign.ours)} lynx blocks and {len(foreign.blocks)} others: rewrite the "
            "original file instead"
        )
    refused = [f"node {refusal.node} looks like an MoE block, but {refusal.reason}" for refusal in foreign.refused]
    if not foreign.blocks and not foreign.ours:
        if refused:
            raise UnsupportedModelError(f"{foreign.path}: none of its MoE blocks can be rewritten: {_some(refused)}")
        raise UnsupportedModelError(
            f"{foreign.path} holds no MoE block that is known here, so there is nothing to select"
        )
    if refused and not allow_partial:
        raise UnsupportedModelError(
            f"{foreign.path}: {_some(refused)}; pass --allow-partial to leave "
            f"{'it as it is' if len(refused) == 1 else 'them as they are'}"
        )
    total = len(foreign.blocks) + len(foreign.ours) + len(refused)
    return [f"{len(refused)} of {total} MoE blocks stay as they are: {_some(refused)}"] if refused else []


def _some(lines: list[str]) -> str:
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _inline(model: ir.Model) -> None:
    """Local functions become nodes; ours are the meaning of our own ops, and made anew at the end."""
    from onnx_ir.passes import common

    for key in [key for key in model.functions if key[0] == ops.DOMAIN]:
        del model.functions[key]
    for node in model.graph.all_nodes():
        if node.domain == ops.DOMAIN:
            node.overload = ""
    if model.functions:
        common.InlinePass()(model)


def infer_shapes(model: ir.Model) -> None:
    """Ranks and types, as far as ONNX can tell them; ops that it doesn't know end what it can tell."""
    import contextlib

    from onnx_ir.passes import common

    with contextlib.suppress(Exception):
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def _rewrite(foreign: Foreign, selection: Selection, *, dequantize: bool) -> None:
    """Apply the patterns: the fused ops first, then what is written in standard ops."""
    from onnx_ir.passes import common

    from lynx_trt.export.patterns.block import Emitter
    from lynx_trt.export.patterns.dense import DenseExperts
    from lynx_trt.export.patterns.gathered import GatheredExperts
    from lynx_trt.export.patterns.grouped import GroupedExperts
    from lynx_trt.export.patterns.loops import LoopedExperts
    from lynx_trt.export.patterns.moe_op import MoeOp
    from lynx_trt.export.patterns.qmoe_op import QMoeOp
    from lynx_trt.export.patterns.trt_moe import TrtMoe
    from lynx_trt.export.regions.find import Finder

    graph = foreign.model.graph
    emitter = Emitter(graph, selection, dequantize=dequantize)
    _apply(foreign, [MoeOp(emitter), QMoeOp(emitter), TrtMoe(emitter)])
    finder = Finder(graph)
    foreign.refused += finder.refused
    for form in (DenseExperts, LoopedExperts, GatheredExperts, GroupedExperts):
        _apply(foreign, form.rules(emitter, finder))
    foreign.refused += unknown_ops(graph)
    foreign.blocks = emitter.blocks
    foreign.selects = [*foreign.selects, *emitter.selects]
    foreign.stacks = dict(emitter.stacks)
    if emitter.blocks:
        emitter.step.finish([block.experts for block in emitter.blocks])
        foreign.added = emitter.step.added
        foreign.notes += emitter.step.notes
        foreign.notes += dict.fromkeys(note for block in emitter.blocks for note in block.notes)
    common.RemoveUnusedNodesPass()(foreign.model)
    common.NameFixPass()(foreign.model)
    left = sum(node.domain == ops.DOMAIN and node.op_type == ops.SELECT for node in graph)
    if left != len(foreign.selects):
        raise ExportError(f"{foreign.path}: {len(foreign.selects)} MoE blocks were rewritten, {left} are in the graph")


def _apply(foreign: Foreign, rules: Sequence[BlockRule]) -> None:
    """Apply rules together; what each found and refused goes to `foreign`."""
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

    if not rules:
        return
    made = [RewriteRule(rule.pattern, rule.rewrite, rule.check, name=rule.form, remove_nodes=False) for rule in rules]
    RewriteRuleSet(made).apply_to_model(foreign.model)
    for rule in rules:
        foreign.counts[rule.form] += len(rule.found)
        foreign.refused += rule.refused
    foreign.counts += Counter()  # drops the zeros


def unknown_ops(graph: ir.Graph) -> list[Refusal]:
    """Ops of other domains that are MoE blocks by their name, which no pattern here knows."""
    from lynx_trt.export.patterns.rule import Refusal, label

    known = {("com.microsoft", "MoE"), ("com.microsoft", "QMoE"), ("", "TRT_MoE"), ("trt", "TRT_MoE")}
    found = []
    for node in graph.all_nodes():
        named_so = "moe" in node.op_type.lower() or "expert" in node.op_type.lower()
        if named_so and node.domain != ops.DOMAIN and (node.domain, node.op_type) not in known:
            found.append(Refusal(label(node), "its op is none that is known here"))
    return found


def find_ours(foreign: Foreign) -> None:
    """Blocks that are LynxSelect + LynxExperts already; they stay as they are, so a second rewrite changes nothing.

    Raises:
        ExportError: one of the two ops without the other, or without stored weights.
    """
    import onnx_ir as ir

    for node in foreign.model.graph.all_nodes():
        if node.domain != ops.DOMAIN or node.op_type != ops.EXPERTS:
            continue
        select = node.inputs[1].producer() if node.inputs[1] is not None else None
        down = node.inputs[4] if len(node.inputs) > 4 else None
        known = select is not None and select.op_type == ops.SELECT and down is not None
        if not known or select is None or down is None or down.shape is None or len(down.shape) != 3:
            raise ExportError(
                f"node {node.name!r} is a {ops.EXPERTS} without its {ops.SELECT} or weights; export it again"
            )
        if "weights" not in node.attributes:  # a file from before there were quantized ones
            node.attributes.add(ir.AttrString("weights", "float"))
        block = _our_block(node, select, down)
        foreign.ours.append(block)
        foreign.selects.append((select, block.experts_per_token))


def _our_block(node: ir.Node, select: ir.Node, down: ir.Value) -> LynxBlock:
    assert down.shape is not None
    experts, *sizes = (int(str(size)) for size in down.shape)
    form = {name: attribute.value for name, attribute in node.attributes.items() if name not in ops.PLUGIN}
    inner, width = sizes if form["transposed"] else reversed(sizes)
    inner *= values_an_element(form["weights"])
    index = select.inputs[2].shape if select.inputs[2] is not None else None
    count = index[-1] if index is not None and len(index) else None
    values = (value for value in node.inputs[3:] if value is not None and value.const_value is not None)
    return LynxBlock(
        select=str(select.name),
        experts_node=str(node.name),
        experts=experts,
        experts_per_token=count if isinstance(count, int) else 0,
        hidden_size=width,
        intermediate=inner,
        expert_bytes=sum(value.const_value.nbytes for value in values if value.const_value is not None) // experts,
        form=form,
        remap=bool(select.attributes.get_int("remap", 0)),
    )
