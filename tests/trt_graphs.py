"""Small hand-made lynx graphs for the TensorRT tests: the inputs of a real export, one attention, MoE layers.

And one of a layer that keeps states.
"""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.export.ops import (
    CAUSAL_CONV,
    DOMAIN,
    EXPERTS,
    LINEAR_ATTENTION,
    OPSET,
    SELECT,
    causal_conv_attributes,
    experts_attributes,
    linear_attention_attributes,
    select_attributes,
)
from lynx_trt.selection import PRESETS

DTYPES = {
    "fp32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
VOCABULARY, HEADS, HEAD_SIZE, CACHE = 32, 2, 16, 64
H, E, K, I = HEADS * HEAD_SIZE, 8, 2, 32  # noqa: E741
# Of a layer with states: heads of keys and of values, their sizes, the convolution's weights a channel.
KEY_HEADS, VALUE_HEADS, KEYS, VALUES, WIDTH = 2, 4, 16, 8, 4


def handed_over(plan: bytes) -> list[int]:
    """The field `dispatch` of every lynx layer in an engine, for each of its profiles: 1 where metadata is handed."""
    return [value[0] for value in re.findall(rb"dispatch\0.{8}(.)\0{3}", plan, re.DOTALL)]


class GraphMaker:
    """Collects nodes and weights; weights from 1 KiB on go to one data file, as an exporter does it."""

    def __init__(self, path: Path, dtype: str, hidden: int = H, intermediate: int = I) -> None:
        self.path = path
        self.elem, self.numpy = DTYPES[dtype]
        self.hidden, self.intermediate = hidden, intermediate
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.data = path.with_suffix(".onnx.data").open("wb")
        self.random = np.random.default_rng(0)

    def node(self, op: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}.{outputs[0]}", domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, values, dtype=np.int64) -> str:
        self.weights.append(numpy_helper.from_array(np.array(values, dtype=dtype), name))
        return name

    def weight(self, name: str, shape: tuple[int, ...], *, inline: bool = False) -> str:
        values = (self.random.standard_normal(size=shape, dtype=np.float32) * 0.02).astype(self.numpy)
        return self._add(TensorProto(name=name, dims=shape, data_type=self.elem), values, inline=inline)

    def quantized(self, name: str, end: str, shape: tuple[int, ...], weights: str) -> list[str]:
        """[...,D] in one of FORMATS: values and scales, as two tensors; no value is NaN."""
        *rows, width = shape
        stored = FORMATS[weights]
        values, scales = (*rows, width // stored.per_byte), (*rows, stored.scales(width))
        kinds = {"int8": TensorProto.INT8, "float32": TensorProto.FLOAT, self.numpy.name: self.elem}
        arrays = {}
        if weights == "mxfp4":  # scales from 2^-9 to 2
            arrays[f"{name}{end}"] = self.random.integers(-128, 128, values).astype(np.int8)
            arrays[f"{name}_scale{end}"] = self.random.integers(118, 129, scales).astype(np.uint8).view(np.int8)
        elif stored.scale_type == "float":
            arrays[f"{name}{end}"] = self.random.integers(-128, 128, values).astype(np.int8)
            beside = self.random.uniform(0, 0.01, scales)
            if stored.zeros:
                beside[..., width // stored.block :] = self.random.integers(0, 17, (*rows, width // stored.block))
            arrays[f"{name}_scale{end}"] = beside.astype(self.numpy)
        else:
            numbers = self.random.uniform(-448, 448, values).astype(ml_dtypes.float8_e4m3fn)
            arrays[f"{name}{end}"] = numbers.view(np.int8)
            arrays[f"{name}_scale{end}"] = self.random.uniform(0, 0.001, scales).astype(np.float32)
        return [
            self._add(TensorProto(name=each, dims=array.shape, data_type=kinds[array.dtype.name]), array)
            for each, array in arrays.items()
        ]

    def _add(self, tensor: onnx.TensorProto, values: np.ndarray, *, inline: bool = False) -> str:
        if inline or values.nbytes < 1024:
            tensor.raw_data = values.tobytes()
        else:
            self.data.write(b"\0" * (-self.data.tell() % 4096))
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": Path(self.data.name).name, "offset": self.data.tell(), "length": values.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self.data.write(values.tobytes())
        self.weights.append(tensor)
        return tensor.name

    def attention(self, x: str) -> str:
        """[B,S,H] -> [B,S,H] through a cache of fixed length, written in place."""
        heads = self.constant("heads", [0, 0, HEADS, HEAD_SIZE])
        for part in "qkv":
            self.node("MatMul", [x, self.weight(f"w{part}", (self.hidden, H))], [f"{part}0"])
            self.node("Reshape", [f"{part}0", heads], [f"{part}1"])
            self.node("Transpose", [f"{part}1"], [part], perm=[0, 2, 1, 3])
        for part, past in (("k", "key"), ("v", "value")):
            inputs = [f"past_key_values.0.{past}", part, "past_lengths"]
            self.node("TensorScatter", inputs, [f"present.0.{past}"], axis=2)
        self.node("Add", ["past_lengths", "lengths"], ["total"])
        inputs = ["q", "present.0.key", "present.0.value", "", "", "", "total"]
        self.node("Attention", inputs, ["attended"], is_causal=1)
        self.node("Transpose", ["attended"], ["attended0"], perm=[0, 2, 1, 3])
        self.node("Reshape", ["attended0", self.constant("merged", [0, 0, H])], ["attended1"])
        return self.node("MatMul", ["attended1", self.weight("wo", (H, self.hidden))], ["attention"])

    def moe(self, layer: int, x: str, *, bias: bool, preset: str = "lynx", form: ExpertsForm | None = None) -> str:
        """[T,H] -> [T,H]"""
        hidden, intermediate = self.hidden, self.intermediate
        n = f".{layer}"
        self.node("MatMul", [x, self.weight(f"router{n}", (hidden, E))], [f"logits{n}"])
        self.node("Cast", [f"logits{n}"], [f"logits32{n}"], to=TensorProto.FLOAT)
        self.node("Softmax", [f"logits32{n}"], [f"scores{n}"], axis=-1)
        self.node("TopK", [f"scores{n}", "experts_per_token"], [f"topk_weight{n}", f"topk_index{n}"], axis=-1)
        self.node("Gather", ["budgets", self.constant(f"layer{n}", layer)], [f"budget{n}"], axis=0)
        self.node("Gather", ["floors", f"layer{n}"], [f"floor{n}"], axis=0)
        self.node(
            SELECT,
            [f"scores{n}", f"scores{n}", f"topk_index{n}", f"topk_weight{n}", f"budget{n}", f"floor{n}", "token_mask"],
            [f"index{n}", f"weight{n}", f"active{n}"],
            domain=DOMAIN,
            **select_attributes(PRESETS[preset], experts_per_token=K, renormalize=True, scale=1.0),
        )
        form = form or ExpertsForm()
        inputs = [x, f"index{n}", f"weight{n}"]
        shapes = {"gate_up": (E, 2 * intermediate, hidden), "down": (E, hidden, intermediate)}
        if form.quantized:
            pairs = (self.quantized(name, n, shape, form.weights) for name, shape in shapes.items())
            values, scales = zip(*pairs, strict=True)
            inputs += [*values, *scales]
        else:
            inputs += [self.weight(f"{name}{n}", shape) for name, shape in shapes.items()]
        if bias:
            inputs += [
                self.weight(f"gate_up_bias{n}", (E, 2 * intermediate)),
                self.weight(f"down_bias{n}", (E, hidden)),
            ]
        self.node(EXPERTS, inputs, [f"experts{n}"], domain=DOMAIN, **experts_attributes(form))
        return self.node("Add", [x, f"experts{n}"], [f"layer_output{n}"])

    def save(self, output: str, layers: int) -> Path:
        def tensor(name, elem, dims):
            return helper.make_tensor_value_info(name, elem, dims)

        cache = [
            tensor(f"past_key_values.0.{p}", self.elem, ["batch", HEADS, CACHE, HEAD_SIZE]) for p in ("key", "value")
        ]
        inputs = [
            tensor("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            tensor("past_lengths", TensorProto.INT64, ["batch"]),
            tensor("lengths", TensorProto.INT64, ["batch"]),
            tensor("budgets", TensorProto.INT32, [layers]),
            tensor("floors", TensorProto.FLOAT, [layers]),
            *cache,
        ]
        present = [tensor(f"present.0.{p}", self.elem, ["batch", HEADS, CACHE, HEAD_SIZE]) for p in ("key", "value")]
        outputs = [tensor(output, self.elem, ["tokens", self.hidden]), *present]
        outputs += [tensor(f"active.{layer}", TensorProto.INT32, []) for layer in range(layers)]
        graph = helper.make_graph(self.nodes, "test", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        self.data.close()
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), self.path)
        return self.path


def make_graph(
    path: Path,
    dtype: str = "fp16",
    *,
    layers: int = 1,
    bias: bool = False,
    hidden: int = H,
    intermediate: int = I,
    form: ExpertsForm | None = None,
) -> Path:
    """Write a lynx graph (no function bodies) and its data file; return the path."""
    maker = GraphMaker(path, dtype, hidden, intermediate)
    maker.constant("experts_per_token", [K])
    maker.node("Gather", [maker.weight("embedding", (VOCABULARY, hidden)), "input_ids"], ["embedded"], axis=0)
    maker.node("Add", ["embedded", maker.attention("embedded")], ["attention_output"])
    x = maker.node("Reshape", ["attention_output", maker.constant("rows", [-1, hidden])], ["rows0"])
    # Padding tokens lie beyond each sequence's length.
    maker.node("Shape", ["input_ids"], ["shape"])
    maker.node("Gather", ["shape", maker.constant("one", 1)], ["s"], axis=0)
    maker.node("Range", [maker.constant("zero", 0), "s", "one"], ["positions"])
    maker.node("Unsqueeze", ["lengths", maker.constant("last", [-1])], ["lengths2"])
    maker.node("Less", ["positions", "lengths2"], ["valid"])
    maker.node("Reshape", ["valid", maker.constant("flat", [-1])], ["token_mask"])
    for layer in range(layers):
        x = maker.moe(layer, x, bias=bias, form=form)
    return maker.save(maker.node("Identity", [x], ["hidden"]), layers)


def make_state_graph(path: Path, dtype: str = "fp16", *, bias: bool = True, per_key: bool = False) -> Path:
    """Write a graph of one convolution and one linear attention, with their states in and out, and no MoE."""
    maker = GraphMaker(path, dtype)
    keys, values = KEY_HEADS * KEYS, VALUE_HEADS * VALUES
    channels = 2 * keys + values
    maker.node("Gather", [maker.weight("embedding", (VOCABULARY, channels)), "input_ids"], ["embedded"], axis=0)
    maker.node("Reshape", ["embedded", maker.constant("rows", [-1, channels])], ["values"])
    inputs = ["values", maker.weight("conv", (channels, WIDTH)), "past_states.0.conv", "lengths"]
    inputs += [maker.weight("conv_bias", (channels,))] if bias else []
    maker.node(CAUSAL_CONV, inputs, ["mixed", "present_states.0.conv"], domain=DOMAIN, **causal_conv_attributes("silu"))
    parts = ["query", "key", "value"]
    maker.node("Split", ["mixed", maker.constant("sizes", [keys, keys, values])], parts, axis=1)
    decays = VALUE_HEADS * KEYS if per_key else VALUE_HEADS
    for name, width in (("decay", decays), ("beta", VALUE_HEADS)):
        maker.node("MatMul", ["values", maker.weight(f"{name}_weight", (channels, width))], [f"{name}0"])
        maker.node("Cast", [f"{name}0"], [name], to=TensorProto.FLOAT)
    attributes = linear_attention_attributes(
        key_heads=KEY_HEADS, value_heads=VALUE_HEADS, update_rule="gated_delta", scale=KEYS**-0.5, epsilon=1e-6
    )
    inputs = [*parts, "decay", "beta", "past_states.0.recurrent", "lengths"]
    maker.node(LINEAR_ATTENTION, inputs, ["attended", "present_states.0.recurrent"], domain=DOMAIN, **attributes)
    maker.node("Identity", ["attended"], ["hidden"])

    def tensor(name, elem, dims):
        return helper.make_tensor_value_info(name, elem, dims)

    states = {
        "conv": (maker.elem, [WIDTH - 1, channels]),
        "recurrent": (TensorProto.FLOAT, [VALUE_HEADS, KEYS, VALUES]),
    }
    inputs = [
        tensor("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        tensor("lengths", TensorProto.INT64, ["batch"]),
    ]
    inputs += [tensor(f"past_states.0.{name}", elem, ["batch", *dims]) for name, (elem, dims) in states.items()]
    outputs = [tensor("hidden", maker.elem, ["tokens", values])]
    outputs += [tensor(f"present_states.0.{name}", elem, ["batch", *dims]) for name, (elem, dims) in states.items()]
    graph = helper.make_graph(maker.nodes, "test", inputs, outputs, maker.weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    maker.data.close()
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return path
