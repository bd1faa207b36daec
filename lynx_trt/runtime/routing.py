"""What a step's routing says without the selection's nodes: what restricts nothing, and how many experts are active."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.runtime.backend import Array

LOWEST = np.finfo(np.float32).min


class Unrestricted:
    """Tells the steps that are the model's own routing: no padding, and a restriction that all of its experts pass.

    T tokens have at most T K experts. (An expert of weight exactly 0 has no vote and could still lose its place;
    what it adds is 0 either way.) Where votes go to all experts, a token's own can lose against others.
    """

    def __init__(self, artifact: Artifact) -> None:
        """For the steps of one artifact."""
        model = artifact.manifest.model
        self._longest_decode = model.decode_max_length
        self._experts = np.array([layer.experts for layer in model.moe_layers])
        self._k = np.array([layer.experts_per_token for layer in model.moe_layers])
        self._votes_for_own = artifact.manifest.selection.parameters["vote"] != "score"

    def holds(self, lengths: Array, width: int, restriction: Restriction) -> bool:
        """Whether a step of rows of `width` tokens, `lengths` [B] of them real, is one under this restriction."""
        if not (lengths == width).all():
            return False
        if width > self._longest_decode:
            return True
        own = np.minimum(self._experts, len(lengths) * width * self._k) if self._votes_for_own else self._experts
        budgets, floors = restriction.arrays
        return bool(((budgets >= own) & (floors == 0)).all())


def count_active(pieces: Sequence[Array], layers: int, k: int) -> Array:
    """Experts [N] i32 that at least one token has among its K best; where several tie for the last place, all of them.

    Args:
        pieces: what a token's experts are chosen by, [N T,E] f32, for each piece of the batch; -inf and NaN are never
            chosen.
        layers: N.
        k: K, experts a token.
    """
    if len(pieces) == 1 and len(pieces[0]) == layers:
        return np.asarray(np.minimum(np.isfinite(pieces[0]).sum(1, dtype=np.int32), k), np.int32)
    values = np.concatenate([piece.reshape(layers, -1, piece.shape[1]) for piece in pieces], axis=1)
    last = np.partition(values, -k, axis=2)[:, :, -k, None]
    chosen = values >= np.maximum(last, LOWEST)
    return np.asarray(chosen.any(1).sum(1), np.int32)
