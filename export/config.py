"""What a checkpoint's config.json says, looked at before anything believes it: the key and its value are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lynx_trt.errors import CheckpointError, first_line

# Under which names models keep how many experts a layer has, and how many of them a token uses.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def check_experts(raw: dict[str, Any], path: Path) -> None:
    """Refuse numbers of experts that no model can have; `raw` is what config.json at `path` holds.

    A number may be missing or null, where a model has none, or a list of one for each layer.

    Raises:
        CheckpointError: one that is no whole number, no experts at all, or a token that uses none or more than there
            are.
    """
    for part in (raw, raw.get("text_config")):
        if not isinstance(part, dict):
            continue
        experts = _largest(part, EXPERTS, path)
        if experts and experts[1] < 1:
            raise CheckpointError(f"{path} has {experts[0]} {experts[1]}, but a model to build has 1 expert or more")
        used = _largest(part, EXPERTS_PER_TOKEN, path)
        if not experts or not used:
            continue
        if not 1 <= used[1] <= experts[1]:
            raise CheckpointError(
                f"{path} has {used[0]} {used[1]} and {experts[0]} {experts[1]}, but a token uses 1 to {experts[1]} of "
                f"{experts[1]} experts"
            )


def _largest(part: dict[str, Any], keys: tuple[str, ...], path: Path) -> tuple[str, int] | None:
    """The largest value under any of the keys, with its key: a model may leave one that it doesn't use at 0."""
    found = []
    for key in keys:
        value = part.get(key)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(number, int) or isinstance(number, bool):
                raise CheckpointError(f"{path} has {key} {value!r}, which has to be a whole number")
            found.append((key, number))
    return max(found, key=lambda item: item[1], default=None)


def check_activation(config: Any, path: Path) -> None:
    """Refuse an activation that transformers doesn't know; `config` is transformers' own.

    Raises:
        CheckpointError: with the key and the value.
    """
    from transformers.activations import ACT2FN

    for key in ACTIVATIONS:
        value = getattr(config.get_text_config(), key, None)
        if isinstance(value, str) and value not in ACT2FN:
            raise CheckpointError(
                f"{path} has {key} {value!r}, an activation that transformers doesn't know; it has to be one such as "
                "silu or gelu"
            )


def check_rope(config: Any, path: Path) -> None:
    """Refuse a kind of rotary embedding that transformers doesn't know; `config` is transformers' own.

    To be called when the model couldn't be built: a model may have kinds of its own.

    Raises:
        CheckpointError: with the key and the value.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config.get_text_config(), "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    for part in (rope, *rope.values()):  # of all layers, or one for each kind of layer
        kind = part.get("rope_type", "default") if isinstance(part, dict) else "default"
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            known = sorted({"default", *ROPE_INIT_FUNCTIONS} - {"dynamic"})  # which no graph can follow
            raise CheckpointError(
                f"{path} has rope_type {kind!r} (in rope_parameters or rope_scaling), which transformers doesn't know; "
                f"it has to be one of {', '.join(known)}"
            )


def end_tokens(value: Any, path: Path) -> list[int]:
    """Token ids of `eos_token_id` in the file `path`: none, one or several.

    Raises:
        CheckpointError: it is something else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{path} has eos_token_id {value!r}, which has to be a token's id, or a list of some")
    return ids


def refusal(error: Exception) -> str:
    """One line of what transformers says of a config; of a field that it checked, the field, the value and the type."""
    lines = " ".join(str(error).split())
    if found := re.search(r"Field '(\w+)' with value (.+) doesn't match any type in \((.+?)\)\. Errors", lines):
        key, value, types = found.groups()
        types = re.sub(r"<class '(\w+)'>", r"\1", types).replace("NoneType", "null")
        return f"{key} is {value}, which has to be one of {types}"
    if found := re.search(r"Field '(\w+)' expected (.+), got \w+ \(value: (.+)\)", lines):
        key, wanted, value = found.groups()
        return f"{key} is {value}, which has to be {wanted}"
    first = first_line(error)
    return lines if first.endswith(":") else first
