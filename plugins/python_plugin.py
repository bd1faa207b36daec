"""The plugins as Python `IPluginV3` objects: they build engines, and launch the kernels that an engine carries.

`register` puts their creators into TensorRT's registry, where the ONNX parser and a deserialized engine find them by
name, version and namespace. What they answer comes from `contract.py`, what they launch from `launcher.py`. An engine
built without kernels refuses to run: it is never silently wrong.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from lynx_trt.errors import LynxError, TensorRTError
from lynx_trt.plugins.contract import CONTRACTS, KERNELS, KERNELS_ID, Contract, FieldType, Sources, Value

# TensorRT holds no reference of its own to Python objects: a creator or a plugin that is collected is a crash.
# Keyed by the module: full TensorRT and TensorRT for RTX have a registry each.
_CREATORS: dict[str, list[Any]] = {}
_PLUGINS: list[Any] = []

# Why nodes were refused, one sentence each. TensorRT reports an exception of a plugin only as "could not create".
_REFUSALS: list[str] = []

NO_KERNELS = (
    "{name} holds no GPU kernels, so this engine can't run: build it again with --sm and the number of your GPU "
    "(--sm 89 for an L40S), which needs the Triton language, or run the artifact's model.onnx with ONNX Runtime"
)


def register(trt: Any) -> None:
    """Register the creators of the plugins with a TensorRT (`loader.load().module`); doing so twice is harmless.

    A creator that somebody else has registered under the same name stays (the C++ plugin, once loaded).

    Raises TensorRTError: the registry refuses one.
    """
    if trt.__name__ in _CREATORS:
        return
    plugin_class = type("LynxPlugin", (_Plugin, *_plugin_bases(trt)), {"trt": trt})
    creator_class = type("LynxPluginCreator", (_Creator, trt.IPluginCreatorV3One), {"trt": trt})
    registry = trt.get_plugin_registry()
    creators: list[Any] = []
    for contract in CONTRACTS.values():
        if registry.get_creator(contract.name, contract.version, contract.namespace) is not None:
            continue
        creator = creator_class(contract, plugin_class)
        creators.append(creator)
        if not registry.register_creator(creator, contract.namespace):
            raise TensorRTError(f"TensorRT's plugin registry refuses {contract.name} version {contract.version}")
    _CREATORS[trt.__name__] = creators


def take_refusals() -> list[str]:
    """Why the plugins refused nodes since the last call, each as "node NAME: reason"."""
    refusals = list(dict.fromkeys(_REFUSALS))
    _REFUSALS.clear()
    return refusals


@contextlib.contextmanager
def _refusing(node: str) -> Iterator[None]:
    """Keep the reason of an error that is no defect of ours, then let it go on to TensorRT."""
    try:
        yield
    except (ValueError, LynxError) as error:
        _REFUSALS.append(f"node {node}: {error}")
        raise


def _plugin_bases(trt: Any) -> tuple[Any, ...]:
    return trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime


def _field_type(trt: Any, name: FieldType) -> Any:
    kinds = trt.PluginFieldType
    return {"int32": kinds.INT32, "float32": kinds.FLOAT32, "char": kinds.CHAR, "int8": kinds.INT8}[name]


def type_name(trt: Any, data_type: Any) -> str:
    """A TensorRT DataType under the contract's name; one that the contract doesn't know under TensorRT's own."""
    known = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.BOOL: "bool",
        trt.DataType.INT8: "int8",
    }
    return known.get(data_type, str(data_type))


def _data_type(trt: Any, name: str) -> Any:
    return {
        "float32": trt.DataType.FLOAT,
        "float16": trt.DataType.HALF,
        "bfloat16": trt.DataType.BF16,
        "int32": trt.DataType.INT32,
        "int64": trt.DataType.INT64,
        "bool": trt.DataType.BOOL,
        "int8": trt.DataType.INT8,
    }[name]


class _Plugin:
    """One node of the graph; `contract` is its own (`Contract.of_node`).

    The bases of TensorRT are added by `register`, which has the module at hand.
    """

    trt: Any

    def __init__(
        self,
        contract: Contract,
        values: dict[str, Value],
        node: str,
        kernels_id: str = "",
        blob: bytes = b"",
        *,
        building: bool = False,
    ) -> None:
        for base in _plugin_bases(self.trt):
            base.__init__(self)
        self.contract = contract
        self.values = values
        self.node = node
        self.kernels_id, self.blob = kernels_id, blob
        # A builder may time a plugin on inputs that it makes up: indices of experts that there are not. Until it is
        # attached to an execution context, one that was made for a build launches nothing.
        self.building = building
        self._launcher: Any = None
        self._prepared: Any = None
        self.plugin_name = contract.name
        self.plugin_version = contract.version
        self.plugin_namespace = contract.namespace
        self.num_outputs = len(contract.outputs)
        # A field refers to the bytes of its value, and a collection copies fields without keeping them: TensorRT
        # reads both after `get_fields_to_serialize` has returned, so everything lives as long as the plugin.
        stored: dict[str, Value | bytes] = {**values, KERNELS_ID: kernels_id, KERNELS: blob}
        self._fields = [
            _plugin_field(self.trt, field.name, field.type, stored[field.name])
            for field in contract.stored_fields
            if stored[field.name] not in ("", b"")
        ]
        self._collection = self.trt.PluginFieldCollection(self._fields)
        _PLUGINS.append(self)

    # ---- core

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        return self._copy(building=self.building)

    def _copy(self, *, building: bool) -> Any:
        return type(self)(self.contract, self.values, self.node, self.kernels_id, self.blob, building=building)

    # ---- build

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        names = [type_name(self.trt, kind) for kind in input_types]
        with _refusing(self.node):
            self.contract.check_types(names)
        return [_data_type(self.trt, name) for name in self.contract.output_types(names)]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, builder: Any) -> list[Any]:
        with _refusing(self.node):
            self.contract.check_ranks([len(shape) for shape in inputs])
            self.contract.check_sizes([[_known(size) for size in shape] for shape in inputs])
        outputs = []
        for dims in self.contract.output_sources():
            shape = self.trt.DimsExprs(len(dims))
            for axis, sources in enumerate(dims):
                shape[axis] = _dimension(self.trt, sources, inputs, builder)
            outputs.append(shape)
        return outputs

    def supports_format_combination(self, position: int, tensors: Sequence[Any], n_inputs: int) -> bool:
        types = [type_name(self.trt, tensor.desc.type) for tensor in tensors]
        linear = tensors[position].desc.format == self.trt.TensorFormat.LINEAR
        return self.contract.supports(position, types, n_inputs, linear=linear)

    def configure_plugin(self, inputs: Any, outputs: Any) -> None:
        pass

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Any) -> int:
        if not self.kernels_id:
            return 0
        from lynx_trt.plugins.launcher import published, workspace_bytes

        shapes = [tuple(tensor.max) for tensor in inputs]
        with _refusing(self.node):
            key = self._key(shapes, inputs[0].desc.type)
            return workspace_bytes(published(self.kernels_id), key, shapes[0][0])

    def get_valid_tactics(self) -> list[int]:
        return []

    # ---- run

    def set_tactic(self, tactic: int) -> None:
        pass

    def on_shape_change(self, inputs: Sequence[Any], outputs: Any) -> None:
        if not self.kernels_id:
            return  # TensorRT also calls this where nothing runs; `enqueue` refuses
        shapes = [tuple(tensor.dims) for tensor in inputs]
        with _refusing(self.node):
            self.contract.check_sizes(shapes)
            if self.building:
                return
            if self._launcher is None:
                self._launcher = self._make_launcher(shapes, inputs[0].type)
            self._prepared = self._launcher.prepare(*self.contract.counts(shapes))

    def attach_to_context(self, context: Any) -> Any:
        return self._copy(building=False)

    def get_fields_to_serialize(self) -> Any:
        return self._collection

    def enqueue(
        self,
        input_descs: Sequence[Any],
        output_descs: Any,
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        if self.building:
            return
        with _refusing(self.node):
            if not self.kernels_id:
                raise TensorRTError(NO_KERNELS.format(name=self.contract.name))
            counts = self.contract.counts([desc.dims for desc in input_descs])
            if self._prepared is None or self._prepared.counts != counts:
                self.on_shape_change(input_descs, output_descs)
            self._prepared.run(self.driver(), inputs, outputs, workspace, stream)

    @staticmethod
    def driver() -> Any:
        """CUDA; the tests put a stand-in here."""
        from lynx_trt.plugins.cuda_driver import cuda_driver

        return cuda_driver()

    def _key(self, shapes: Sequence[Sequence[int]], float_type: Any) -> str:
        from lynx_trt.plugins.launcher import spec_of

        return spec_of(self.contract.name, self.values, shapes, type_name(self.trt, float_type)).key

    def _make_launcher(self, shapes: Sequence[Sequence[int]], float_type: Any) -> Any:
        from lynx_trt.plugins.launcher import Launcher, published

        kernels = published(self.kernels_id)
        return Launcher(self.contract, kernels, self._key(shapes, float_type), len(shapes), self.driver())


def _known(size: Any) -> int:
    """A size that is the same in all steps, -1 for others."""
    return int(size.get_constant_value()) if size.is_constant() else -1


def _dimension(trt: Any, sources: Sources, inputs: Sequence[Any], builder: Any) -> Any:
    """A dimension of an output as TensorRT's expression."""

    def joined(operation: Any, parts: Sequence[Any]) -> Any:
        return functools.reduce(lambda first, second: builder.operation(operation, first, second), parts)

    def factor(each: int | tuple[int, int]) -> Any:
        return builder.constant(each) if isinstance(each, int) else inputs[each[0]][each[1]]

    operations = trt.DimensionOperation
    return joined(operations.SUM, [joined(operations.PROD, [factor(each) for each in term]) for term in sources])


class _Creator:
    """What the ONNX parser, and later the deserializing engine, find in the registry."""

    trt: Any

    def __init__(self, contract: Contract, plugin_class: type) -> None:
        self.trt.IPluginCreatorV3One.__init__(self)
        self.contract = contract
        self.plugin_class = plugin_class
        self.name = contract.name
        self.plugin_version = contract.version
        self.plugin_namespace = contract.namespace
        self._fields = [
            self.trt.PluginField(field.name, b"", _field_type(self.trt, field.type)) for field in contract.stored_fields
        ]
        self.field_names = self.trt.PluginFieldCollection(self._fields)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        given = {field.name: _field_value(self.trt, field) for field in fields}
        kernels_id, blob = str(given.pop(KERNELS_ID, "")), given.pop(KERNELS, b"")
        assert isinstance(blob, bytes)
        with _refusing(name):
            values = self.contract.parse_fields(
                {key: each for key, each in given.items() if not isinstance(each, bytes)}
            )
        if blob:
            from lynx_trt.plugins.launcher import publish

            publish(kernels_id, blob)
        building = phase == self.trt.TensorRTPhase.BUILD
        return self.plugin_class(self.contract.of_node(values), values, name, kernels_id, blob, building=building)


def _plugin_field(trt: Any, name: str, kind: FieldType, value: Value | bytes) -> Any:
    import numpy as np

    data: Any
    if isinstance(value, bytes):
        data = np.frombuffer(value, np.int8)
    else:
        data = str(value).encode() if kind == "char" else np.array([value], dtype=kind)
    return trt.PluginField(name, data, _field_type(trt, kind))


def _field_value(trt: Any, field: Any) -> Value | bytes:
    """A field's value as a Python object; a string may arrive with a trailing NUL."""
    import numpy as np

    if field.type == trt.PluginFieldType.INT8:
        return bytes(np.asarray(field.data).tobytes())
    if field.type == trt.PluginFieldType.CHAR:
        return bytes(np.asarray(field.data).tobytes()).rstrip(b"\0").decode()
    value = np.asarray(field.data).reshape(-1)[0].item()
    return float(value) if field.type == trt.PluginFieldType.FLOAT32 else int(value)
