"""The experts' form (activation and weight layout) and the NumPy reference of `LynxExperts`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertsForm:
    """How an expert turns its input into its output; the same for all experts of a layer.

    gate, up = x @ gate_up; both clamped to `limit` (0: not at all); act(gate) * (up + up_offset) @ down.
    Ungated experts have no gate: act(up) @ down.
    """

    activation: str = "silu"  # silu: z * sigmoid(alpha * z) | gelu | gelu_tanh | relu | relu2 (relu squared)
    gated: bool = True
    transposed: bool = False  # gate_up is [E,H,2I], not [E,2I,H]; down is [E,I,H], not [E,H,I]
    interleaved: bool = False  # gate and up alternate along 2I instead of one half each
    alpha: float = 1.0
    limit: float = 0.0
    up_offset: float = 0.0
