"""Which kernels an engine needs: its plugin layers as TensorRT sees them, and the numbers of tokens of its profiles.

Beside it lie those that draw tokens from its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.plugins.contract import COMPUTED, CONTRACTS
from lynx_trt.plugins.launcher import spec_of
from lynx_trt.plugins.specs import DrawSpec, Op, StateSpec
from lynx_trt.tensorrt.profiles import Profile

# More than any profile decodes or prefills at a time.
MOST_ROWS = 1 << 16
# The inputs with an entry for each token: their names in lynx graphs and in those of other exporters.
TOKEN_INPUTS = ("input_ids", "token_ids", "decoder_input_ids", "tokens", "ids")


def ops_of(layers: Sequence[Mapping[str, Any]], profiles: Sequence[Profile]) -> list[Op]:
    """The ops to compile for: of each layer as `worker.py` describes it, once if several are equal.

    Raises TensorRTError (a size that the graph leaves open) and UsageError (a size that no kernel is made for).
    """
    ranges, of_a_sequence = (
        tuple(dict.fromkeys(_tokens(profile, only=only) for profile in profiles)) for only in (False, True)
    )
    specs = {}
    for layer in layers:
        values = CONTRACTS[layer["op"]].parse_fields(layer["attributes"])
        shapes = layer["shapes"]
        for tensor, shape in zip(CONTRACTS[layer["op"]].of_node(values).inputs_of(len(shapes)), shapes, strict=True):
            for symbol, size in zip(tensor.shape, shape, strict=True):
                if symbol not in ("T", "B") and symbol not in COMPUTED and size < 0:
                    raise TensorRTError(
                        f"{symbol} of {tensor.name} of node {layer['name']} is not known before the engine runs, and "
                        "kernels are compiled for one size: export the graph with fixed sizes"
                    )
        spec = spec_of(layer["op"], values, shapes, layer["type"])
        specs[spec.key] = spec
    return [Op(spec, of_a_sequence if isinstance(spec, StateSpec) else ranges) for spec in specs.values()]


def write_draws(path: Path, vocabulary: int, sms: Sequence[int], progress: Callable[[float], None]) -> None:
    """Compile the draws of next tokens for some SMs into the file `path`.

    Raises UsageError: a vocabulary that no kernel is made for.
    """
    from lynx_trt.plugins.aot import compile_for

    # The plans are the same for any number of rows.
    ops = [Op(DrawSpec(vocabulary, nucleus), ((1, MOST_ROWS),)) for nucleus in (False, True)]
    path.write_bytes(compile_for(ops, sms, progress=progress).to_bytes())


def _tokens(profile: Profile, *, only: bool) -> tuple[int, int]:
    """The least and the most tokens in a step of a profile; `only` those of one sequence, of inputs by sequences."""
    for name in TOKEN_INPUTS:
        if name in profile.shapes:
            smallest, _, largest = profile.shapes[name]
            return (smallest[-1], largest[-1]) if only else (math.prod(smallest), math.prod(largest))
    raise UsageError(
        f"profile {profile.name} has none of the inputs {', '.join(TOKEN_INPUTS)}, so its number of tokens, which "
        "kernels are compiled for, is unknown"
    )
