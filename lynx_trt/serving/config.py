"""The two model configurations of a repository, as protobuf text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lynx_trt.artifact import Manifest
from lynx_trt.errors import ServingError
from lynx_trt.serving.schema import INPUTS, OUTPUTS, Tensor
from lynx_trt.serving.settings import Settings

TYPES = {
    "bool": "TYPE_BOOL",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "bfloat16": "TYPE_BF16",
}
LAYER_LABELS = "moe_layers.txt"
TOKEN_LABELS = "tokens.txt"  # noqa: S105  (a file's name)
WARM_UP_TEXT = "warm-up"


class Name(str):
    """A word that protobuf text has without quotes: an enum's value."""


def text_config(name: str, manifest: Manifest, settings: Settings) -> str:
    """The model that takes text: Python backend, decoupled, its warm-up and its settings."""
    warm_up = {
        "text_input": {"data_type": Name("TYPE_STRING"), "dims": [1], "input_data_file": "text"},
        "max_tokens": {"data_type": Name("TYPE_INT32"), "dims": [1], "input_data_file": "max_tokens"},
    }
    about = {"lynx_model": manifest.model.name, "lynx_precision": manifest.model.precision}
    return protobuf_text(
        {
            "name": name,
            "backend": "python",
            "max_batch_size": 0,  # the scheduler makes its batches itself, of sequences in flight
            "model_transaction_policy": {"decoupled": True},
            "version_policy": {"latest": {"num_versions": 1}},
            "input": [_tensor(tensor, "optional") for tensor in INPUTS],
            "output": [_labelled(tensor) for tensor in OUTPUTS],
            # One instance: a second one would hold the weights and the caches twice.
            "instance_group": [{"name": name, "count": 1, "kind": Name("KIND_CPU")}],
            "parameters": _map(
                {key: {"string_value": value} for key, value in {**about, **settings.parameters()}.items()}
            ),
            "model_warmup": [{"name": "one_prompt", "batch_size": 1, "inputs": _map(warm_up)}],
        }
    )


def engine_config(name: str, manifest: Manifest) -> str:
    """The engine itself, for those who drive it: every tensor with its batch dimension, both profiles.

    Raises:
        ServingError: the artifact has no engine, or a tensor of a type that the server doesn't know.
    """
    engine = manifest.engine
    if engine is None:
        raise ServingError(f"there is no engine: {manifest.engine_absent}")
    inputs = [_engine_tensor(tensor) for tensor in engine.tensors if tensor["mode"] == "input"]
    outputs = [_engine_tensor(tensor) for tensor in engine.tensors if tensor["mode"] == "output"]
    labels = {"active_experts": LAYER_LABELS, "logits": TOKEN_LABELS}
    for tensor in outputs:
        if tensor["name"] in labels:
            tensor["label_filename"] = labels[tensor["name"]]
    profiles = [str(number) for number in range(len(engine.profiles))]
    names = ", ".join(f"{number} is {profile['name']}" for number, profile in enumerate(engine.profiles))
    chosen = manifest.selection
    about = {
        "lynx_profiles": names,
        "lynx_budgets": json.dumps(chosen.budgets),
        "lynx_floors": json.dumps(chosen.floors),
    }
    return protobuf_text(
        {
            "name": name,
            "platform": "tensorrt_plan",
            "max_batch_size": 0,  # budgets, floors and active_experts have no batch dimension
            "version_policy": {"latest": {"num_versions": 1}},
            "input": inputs,
            "output": outputs,
            # Both profiles in one instance: the backend takes the one that fits a request's shapes.
            "instance_group": [{"name": name, "count": 1, "kind": Name("KIND_GPU"), "profile": profiles}],
            "optimization": {"cuda": {"graphs": False}, "input_pinned_memory": {"enable": True}},
            "parameters": _map({key: {"string_value": value} for key, value in about.items()}),
            # Expert weights that are inputs would be gigabytes of zeros.
            "model_warmup": [] if engine.external else [_engine_warm_up(p, inputs) for p in engine.profiles],
        }
    )


def _engine_warm_up(profile: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Zeros of a profile's smallest shapes: lengths of 0 are idle rows, so no expert is loaded."""
    values = {}
    for tensor in inputs:
        smallest = profile["shapes"].get(tensor["name"])
        dims = list(smallest[0]) if smallest else tensor["dims"]
        values[tensor["name"]] = {"data_type": tensor["data_type"], "dims": dims, "zero_data": True}
    return {"name": profile["name"], "batch_size": 1, "inputs": _map(values)}


def _engine_tensor(tensor: Mapping[str, Any]) -> dict[str, Any]:
    if tensor["dtype"] not in TYPES:
        raise ServingError(f"the engine's tensor {tensor['name']} is {tensor['dtype']}, which the server doesn't know")
    return {"name": tensor["name"], "data_type": Name(TYPES[tensor["dtype"]]), "dims": list(tensor["shape"])}


def _tensor(tensor: Tensor, *flags: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": tensor.name, "data_type": Name(tensor.type), "dims": list(tensor.dims)}
    if "optional" in flags and tensor.optional:
        entry["optional"] = True
    return entry


def _labelled(tensor: Tensor) -> dict[str, Any]:
    entry = _tensor(tensor)
    if tensor.name == "active_experts":
        entry["label_filename"] = LAYER_LABELS
    return entry


def _map(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A protobuf map field."""
    return [{"key": key, "value": value} for key, value in values.items()]


def protobuf_text(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format: mappings are messages, lists of them repeat the field."""
    lines = []
    for field, value in message.items():
        if value == []:
            continue
        repeated = value if isinstance(value, list) and isinstance(value[0], Mapping) else [value]
        for item in repeated:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{field} {{\n{protobuf_text(item, indent + '  ')}{indent}}}\n")
            elif isinstance(item, list):
                lines.append(f"{indent}{field}: [{', '.join(_scalar(value) for value in item)}]\n")
            else:
                lines.append(f"{indent}{field}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, Name):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes what protobuf does, but for characters beyond ASCII, which protobuf takes as they are.
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
