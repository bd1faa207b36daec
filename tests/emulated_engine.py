"""An engine of which the plugins run for real, on an emulated GPU: their objects, their kernels in PTX, their launches.

`host_gpu` gives the backend a GPU of host memory and an engine that is the artifact's graph in ONNX Runtime. Here ONNX
Runtime only has what lies between the lynx nodes, the part of an engine that is TensorRT's own. The nodes are those
that TensorRT would read (`tensorrt.prepare`), made into plugins from their attributes as its parser makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from emulator import EmulatedGpu
from emulator.memory import GlobalMemory
from host_gpu import STREAM, HostContext, HostEngine, HostGpu, tensorrt_for
from onnx import helper, numpy_helper

from lynx_trt.artifact import Artifact
from lynx_trt.export.ops import DOMAIN
from lynx_trt.plugins import python_plugin
from lynx_trt.plugins.aot import compile_for
from lynx_trt.plugins.contract import CONTRACTS
from lynx_trt.plugins.launcher import Launch, spec_of
from lynx_trt.plugins.specs import DrawSpec, Op
from lynx_trt.tensorrt.prepare import hand_over, prepare

if TYPE_CHECKING:
    from lynx_trt.plugins.blob import Cubin

Array = Any
MOST_TOKENS = 64


class EmulatedHost(HostGpu):
    """A host GPU whose memory kernels of an emulated one can reach; its driver runs them in their turn."""

    def __init__(self, sm: int) -> None:
        super().__init__()
        self.memory = GlobalMemory(1 << 28)
        self.emulated = EmulatedGpu(sm, memory=self.memory)
        self.driver = _Queued(self)  # type: ignore[assignment]

    def allocate(self, size: int, what: str) -> int:
        address = self.memory.allocate(size)
        self.memory.view(address, size)[:] = 255
        return address

    def view(self, address: int, size: int) -> Array:
        return self.memory.view(address, size)


class _Queued:
    """`launcher.Driver` for what the backend itself launches: in the order of the stream, or into a graph."""

    vocabulary = 0

    def __init__(self, gpu: EmulatedHost) -> None:
        self.gpu = gpu

    def device(self) -> Any:
        return self.gpu.emulated.device()

    def load(self, cubin: Cubin, device: Any) -> int:
        return self.gpu.emulated.load(cubin, device)

    def launch(self, launch: Launch, stream: int) -> None:
        assert stream == STREAM
        words = [int(word) for word in launch.words]  # the launcher writes others into the same place
        self.gpu.do(lambda: self._launch(launch, words))

    def _launch(self, launch: Launch, words: list[int]) -> None:
        self.gpu.emulated.launch_with(launch, words)
        self.gpu.emulated.synchronize()


def draws_blob(artifact: Artifact, sm: int) -> bytes:
    """The kernels that draw tokens, as PTX."""
    ops = [Op(DrawSpec(artifact.manifest.model.vocabulary, nucleus), ((1, 64),)) for nucleus in (False, True)]
    return compile_for(ops, [sm], images="ptx").to_bytes()


class EmulatedEngine(HostEngine):
    """ICudaEngine: plugins and ONNX Runtime in turn."""

    gpu: EmulatedHost

    def __init__(self, artifact: Artifact, gpu: EmulatedHost, logger: Any, trt: Any) -> None:
        super().__init__(artifact, gpu, logger)
        self.trt, self.path = trt, artifact.path("model.onnx")
        self.original = onnx.load(self.path)
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.original.graph.initializer}
        # And what the copy for TensorRT has beside them.
        added = {tensor.name: tensor for tensor in prepare(self.path).model.graph.initializer}
        self.weights |= {
            name: numpy_helper.to_array(tensor) for name, tensor in added.items() if name not in self.weights
        }
        self.steps: list[Any] = []
        self.stored: dict[str, int] = {}  # where weights of plugins lie

    def create_execution_context(self, how: Any) -> HostContext:
        super().create_execution_context(how)
        self.contexts[-1] = EmulatedContext(self)
        return self.contexts[-1]

    def prepare(self, values: dict[str, Array]) -> None:
        """Make the plugins, with the sizes that a step of these inputs has: TensorRT infers them without one."""
        plain = prepare(self.path)
        shapes: dict[str, list[list[int]]] = {}
        seen = dict(values)
        for step in _steps(self, plain.model, lambda node: _Between(self, [node], list(node.output), functions=True)):
            step.run(seen)
        nodes = [node for node in plain.model.graph.node if node.domain == DOMAIN]
        for node in nodes:
            shapes[node.name] = [list(seen[name].shape) for name in node.input]
        hand_over(plain.model, shapes)
        specs = {}
        for node in nodes:
            attributes = {name: each for name, each in _attributes(node).items() if not name.startswith("plugin_")}
            values_of = CONTRACTS[node.op_type].parse_fields(attributes)
            handed = [[0]] * (len(node.input) - len(shapes[node.name]))
            kind = str(seen[node.input[0]].dtype)
            spec = spec_of(node.op_type, values_of, [*shapes[node.name], *handed], kind)
            specs[spec.key] = Op(spec, ((1, MOST_TOKENS),))
        blob = compile_for(specs.values(), [self.gpu.emulated.sm], images="ptx").to_bytes()
        ready = prepare(self.path, kernels=blob)
        hand_over(ready.model, shapes)
        self.steps = _steps(self, ready.model, lambda node: _Plugin(self, node))


class EmulatedContext(HostContext):
    """IExecutionContext."""

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self.engine
        assert isinstance(engine, EmulatedEngine)
        values = dict(engine.weights)
        layers = len(engine.artifact.manifest.model.moe_layers)
        shapes = {**shapes, "budgets": (layers,), "floors": (layers,)}
        for name in engine.inputs:
            dtype = np.dtype(self._dtype(name))
            size = int(np.prod(shapes[name])) * dtype.itemsize
            values[name] = engine.gpu.view(addresses[name], size).view(dtype).reshape(shapes[name]).copy()
        if not engine.steps:
            engine.prepare(values)
        # What a plugin gets and gives of the engine's own inputs and outputs is where the backend has bound it.
        bound = {name: addresses[name] for name in engine.names if name in addresses}
        for step in engine.steps:
            step.run(values, bound)
        for name in engine.outputs:
            raw = np.ascontiguousarray(values[name]).reshape(-1).view(np.uint8)
            engine.gpu.view(addresses[name], raw.size)[:] = raw


def _attributes(node: Any) -> dict[str, Any]:
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return {name: each.decode() if isinstance(each, bytes) else each for name, each in found.items()}


class _Plugin:
    """A lynx node: a plugin that TensorRT's parser would have made of it."""

    def __init__(self, engine: EmulatedEngine, node: Any) -> None:
        self.engine, self.node = engine, node
        trt = engine.trt
        python_plugin.register(trt)
        creator = next(each for each in python_plugin._CREATORS[trt.__name__] if each.name == node.op_type)
        self._fields = [
            _field(trt, name, value) for name, value in _attributes(node).items() if not name.startswith("plugin_")
        ]
        built = creator.create_plugin(node.name, trt.PluginFieldCollection(self._fields), trt.TensorRTPhase.BUILD)
        # Into an engine and out of it again.
        stored = built.get_fields_to_serialize()
        self.plugin = creator.create_plugin(node.name, stored, trt.TensorRTPhase.RUNTIME).attach_to_context(None)
        self.plugin.driver = lambda: engine.gpu.emulated

    def run(self, values: dict[str, Array], bound: dict[str, int]) -> None:
        engine, trt = self.engine, self.engine.trt
        memory = engine.gpu.memory
        inputs = [np.asarray(values[name], order="C") for name in self.node.input]
        weights = {name: self._weight(name, each) for name, each in zip(self.node.input, inputs, strict=True)}
        held = memory.mark()
        pointers = [
            weights[name] or bound.get(name) or _put(memory, each)
            for name, each in zip(self.node.input, inputs, strict=True)
        ]
        descs = [SimpleNamespace(dims=each.shape, type=_types(trt)[str(each.dtype)]) for each in inputs]
        contract = self.plugin.contract
        types = contract.output_types([str(each.dtype) for each in inputs])
        shapes = contract.output_shapes([each.shape for each in inputs])
        outputs = [np.zeros(shape, kind) for kind, shape in zip(types, shapes, strict=True)]
        places = [
            bound.get(name) or memory.allocate(each.nbytes)
            for name, each in zip(self.node.output, outputs, strict=True)
        ]
        dynamic = [SimpleNamespace(max=desc.dims, desc=desc) for desc in descs]
        workspace = memory.allocate(self.plugin.get_workspace_size(dynamic, []))
        self.plugin.enqueue(descs, [], pointers, places, workspace, STREAM)
        engine.gpu.emulated.synchronize()  # the next node may be ONNX Runtime's
        for name, place, like in zip(self.node.output, places, outputs, strict=True):
            values[name] = memory.view(place, like.nbytes).copy().view(like.dtype).reshape(like.shape)
        memory.release(held)

    def _weight(self, name: str, value: Array) -> int:
        """The address of one of the engine's weights, where it stays; 0: it is none."""
        if name not in self.engine.weights:
            return 0
        if name not in self.engine.stored:
            self.engine.stored[name] = _put(self.engine.gpu.memory, value)
        return self.engine.stored[name]


def _put(memory: GlobalMemory, value: Array) -> int:
    address = memory.allocate(value.nbytes)
    memory.view(address, value.nbytes)[:] = value.reshape(-1).view(np.uint8)
    return address


def _field(trt: Any, name: str, value: Any) -> Any:
    kinds = trt.PluginFieldType
    if isinstance(value, str):
        return trt.PluginField(name, value.encode() + b"\0", kinds.CHAR)
    if isinstance(value, onnx.TensorProto):
        return trt.PluginField(name, numpy_helper.to_array(value), kinds.INT8)
    if isinstance(value, float):
        return trt.PluginField(name, np.array([value], np.float32), kinds.FLOAT32)
    return trt.PluginField(name, np.array([value], np.int32), kinds.INT32)


def _types(trt: Any) -> dict[str, Any]:
    kinds = trt.DataType
    return {
        "float32": kinds.FLOAT,
        "float16": kinds.HALF,
        "int32": kinds.INT32,
        "int64": kinds.INT64,
        "bool": kinds.BOOL,
        "int8": kinds.INT8,
    }


class _Between:
    """Nodes in ONNX Runtime: made when the types of its inputs are known. functions: lynx nodes, by their bodies."""

    def __init__(
        self, engine: EmulatedEngine, nodes: list[Any], outputs: list[str], *, functions: bool = False
    ) -> None:
        self.engine, self.nodes, self.outputs, self.functions = engine, nodes, outputs, functions
        made = {name for node in nodes for name in node.output}
        used = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
        self.inputs = [name for name in used if name not in engine.weights]
        self.constants = [name for name in used if name in engine.weights]
        self.session: Any = None

    def run(self, values: dict[str, Array], bound: dict[str, int] | None = None) -> None:
        if self.session is None:
            self.session = self._session(values)
        found = self.session.run(self.outputs, {name: values[name] for name in self.inputs})
        values |= dict(zip(self.outputs, found, strict=True))

    def _session(self, values: dict[str, Array]) -> Any:
        model = self.engine.original
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(values[name].dtype), [None] * values[name].ndim
            )
            for name in self.inputs
        ]
        constants = [numpy_helper.from_array(self.engine.weights[name], name) for name in self.constants]
        outputs = [onnx.ValueInfoProto(name=name) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "between", inputs, outputs, constants)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        if self.functions:
            made.functions.extend(model.functions)
        return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _steps(engine: EmulatedEngine, model: onnx.ModelProto, plugin: Callable[[Any], Any]) -> list[Any]:
    """The graph in pieces: each lynx node, and what lies between two."""
    graph = model.graph
    pieces: list[list[Any]] = [[]]
    for node in graph.node:
        for attribute in list(node.attribute):
            if attribute.name == "TRT_decomposable":  # for TensorRT alone
                node.attribute.remove(attribute)
        if node.domain == DOMAIN:
            pieces += [[node], []]
        else:
            pieces[-1].append(node)
    steps: list[Any] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            steps.append(plugin(piece[0]))
            continue
        later = {name for other in pieces[number + 1 :] for node in other for name in node.input}
        later |= {each.name for each in graph.output}
        outputs = [name for node in piece for name in node.output if name in later]
        if outputs:
            steps.append(_Between(engine, piece, outputs))
    return steps


def tensorrt_with_plugins(artifact: Artifact, gpu: EmulatedHost, trt: Any) -> Any:
    """What the backend uses of TensorRT's module."""

    def engine(artifact: Artifact, gpu: EmulatedHost, logger: Any) -> EmulatedEngine:
        return EmulatedEngine(artifact, gpu, logger, trt)

    return tensorrt_for(artifact, gpu, engine=engine)
