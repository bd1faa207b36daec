"""Rotary embeddings as native ops: only where a probe of the same size of heads says that they are the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.glm4_moe import modeling_glm4_moe as glm
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from lynx_trt.export.native import _equal_rotation


class Rotary(nn.Module):
    """Angles of `size` values a head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = 1.0 / 100 ** (torch.arange(0, self.size, 2) / self.size)
        angles = position_ids[..., None].float() * frequencies
        both = torch.cat([angles, angles], dim=-1)
        return both.cos(), both.sin()


@pytest.mark.parametrize(
    ("original", "size", "head", "native"),
    [
        (qwen.apply_rotary_pos_emb, 16, 16, True),
        (glm.apply_rotary_pos_emb, 8, 16, True),  # half of a head
        (deepseek.apply_rotary_pos_emb_interleave, 8, 8, True),
        # Two values that turn all pairs of a head alike: no RotaryEmbedding does that, and its heads are larger.
        (deepseek.apply_rotary_pos_emb_interleave, 2, 8, False),
        (glm.apply_rotary_pos_emb, 8, 24, False),  # a third of a head: not asked
    ],
)
def test_rotations(original: Any, size: int, head: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = Rotary(size)
    rotate = _equal_rotation(original, embedding)
    assert rotate is not None
    q, k = torch.randn(2, 4, 3, head), torch.randn(2, 1, 3, head)
    cos, sin = embedding(q, torch.tensor([[0, 1, 2], [5, 6, 7]]))
    calls: list[int] = []
    real = torch.onnx.ops.rotary_embedding

    def counted(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(x.shape[-1])
        return real(x, *arguments, **options)

    monkeypatch.setattr(torch.onnx.ops, "rotary_embedding", counted)
    ours, own = rotate(q, k, cos, sin), original(q, k, cos, sin)
    assert bool(calls) == native
    torch.testing.assert_close(ours[0] @ ours[1].mT, own[0] @ own[1].mT, atol=1e-4, rtol=1e-4)
