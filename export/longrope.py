"""LongRoPE (two sets of rotary frequencies, chosen by length) as a graph can hold it: a choice a row, not an `if`.

Models choose by the longest sequence of the batch, in Python, which no graph can follow and which would make a
row's numbers depend on its neighbours. Here each row chooses for itself: a sequence alone gives the same numbers.
What a model makes of the two sets differs (some switch the frequencies, PhiMoE the magnitude alone), so the
model's own module is asked, on short and on long positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lynx_trt.errors import UnsupportedModelError

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def use_traceable_longrope(model: nn.Module) -> int:
    """Replace the forward of every LongRoPE embedding; how many it were.

    Raises:
        UnsupportedModelError: none of the known readings gives what the module gives, or the rope is `dynamic`.
    """
    replaced = 0
    for name, module in model.named_modules():
        kind = getattr(module, "rope_type", None)
        if kind == "dynamic":
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) has rope_type 'dynamic', whose frequencies change with every "
                "length; a graph can't follow that (default, linear, yarn, llama3 and longrope work)"
            )
        if kind != "longrope":
            continue
        native = next((rotary for rotary in _candidates(module) if _agrees(rotary, module)), None)
        if native is None:
            raise UnsupportedModelError(f"{name} ({type(module).__name__}) uses LongRoPE in a way that is not known")
        module.forward = native
        replaced += 1
    return replaced


def _candidates(module: Any) -> Iterator[Rotary]:
    config = module.config
    limit = int(config.rope_parameters["original_max_position_embeddings"])
    init = ROPE_INIT_FUNCTIONS["longrope"]
    short, scaling = init(config, torch.device("cpu"), seq_len=1)
    long, _ = init(config, torch.device("cpu"), seq_len=limit + 1)
    short_scale = config.rope_parameters.get("short_mscale", scaling)
    long_scale = config.rope_parameters.get("long_mscale", scaling)
    for frequencies in ((short, long), (short, short)):
        for scales in ((scaling, scaling), (short_scale, long_scale)):
            yield _rotary(limit, frequencies, scales)


def _rotary(limit: int, frequencies: tuple[torch.Tensor, torch.Tensor], scales: tuple[float, float]) -> Rotary:
    def forward(x: torch.Tensor, position_ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        is_long = (position_ids.amax(dim=-1) >= limit)[:, None, None]
        short, long = (f.float() for f in frequencies)
        angles = position_ids[..., None].float() * torch.where(is_long, long, short)
        angles = torch.cat((angles, angles), dim=-1)
        scale = torch.where(is_long, scales[1], scales[0])
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)

    return forward


def _agrees(rotary: Rotary, module: Any) -> bool:
    limit = int(module.config.rope_parameters["original_max_position_embeddings"])
    x = torch.zeros(1, 2, 8)
    with torch.no_grad(), suppress(Exception):
        for positions in ((0, limit - 1), (3, limit), (7, limit + 5)):
            ids = torch.tensor([positions])
            own, ours = module(x, position_ids=ids), rotary(x, ids)
            if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(own, ours, strict=True)):
                return False
        return True
    return False
