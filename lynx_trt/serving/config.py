"""The configuration of a repository's model, as protobuf text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lynx_trt.artifact import Manifest
from lynx_trt.serving.schema import INPUTS, OUTPUTS, Tensor
from lynx_trt.serving.settings import Settings

LAYER_LABELS = "moe_layers.txt"
WARM_UP_TEXT = "warm-up"


class Name(str):
    """A word that protobuf text has without quotes: an enum's value."""


def text_config(name: str, manifest: Manifest, settings: Settings, sampling: Mapping[str, float]) -> str:
    """The model that takes text: Python backend, decoupled, its warm-up and its settings.

    `sampling` is what its checkpoint recommends; here it is for clients to read.
    """
    warm_up = {
        "text_input": {"data_type": Name("TYPE_STRING"), "dims": [1], "input_data_file": "text"},
        "max_tokens": {"data_type": Name("TYPE_INT32"), "dims": [1], "input_data_file": "max_tokens"},
    }
    about = {
        "lynx_model": manifest.model.name,
        "lynx_precision": manifest.model.precision,
        "lynx_max_length": str(manifest.model.max_length),
        "lynx_sampling": json.dumps(dict(sampling)),
    }
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
