"""The router of Phi-3.5-MoE: the two best experts, each weighed among those that score nearly as well.

For the first, experts further than 2 * jitter from the best (relative to the larger of |score| and the best) are left
out of a softmax, and the best one's share is its weight; then the same without it. What any other expert would have
been weighed by is not defined, so tokens can lose experts here but not be sent to others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lynx_trt.export.patterns.block import Routing

JITTER = 0.01


def sparse_mixer(op: Any, *, logits: ir.Value) -> Routing:
    """Index and weight [T,2] from logits [T,E]."""
    scores = op.Cast(logits, to=int(ir.DataType.FLOAT))
    one = op.Constant(value=ir.tensor(np.array([1], np.int64)))
    never = op.Constant(value=ir.tensor(np.array(-np.inf, np.float32)))
    first_best, first = op.TopK(scores, one, axis=-1, _outputs=2)
    first_weight = _share(op, scores, scores, first_best, first, never)
    without = op.ScatterElements(scores, first, op.Expand(never, op.Shape(first)), axis=-1)
    second_best, second = op.TopK(without, one, axis=-1, _outputs=2)
    second_weight = _share(op, scores, without, second_best, second, never)
    index = op.Concat(first, second, axis=-1)
    return Routing(index, op.Concat(first_weight, second_weight, axis=-1))


def _share(op: Any, scores: ir.Value, allowed: ir.Value, best: ir.Value, index: ir.Value, never: ir.Value) -> ir.Value:
    """The share of expert `index` in the softmax over the allowed experts that are close to the best one."""
    span = op.Constant(value=ir.tensor(np.array(2 * JITTER, np.float32)))
    factor = op.Max(op.Abs(scores), best)
    far = op.Greater(op.Sub(best, scores), op.Mul(factor, span))
    close = op.Where(far, never, allowed)
    share: ir.Value = op.GatherElements(op.Softmax(close, axis=-1), index, axis=-1)
    return share
