"""From experts to seconds: what a decode step costs where reading weights is what takes the time.

A step's time is (bytes of the weights it reads) / bandwidth, plus a fixed cost for each MoE layer. OEA measured one
MoE layer of Qwen3-30B-A3B on an H100 at 34 us + 2.9 us an expert, linear to R2 > 0.99 (arXiv 2511.02237): an expert
there has 9.4 MB, so 2.9 us is 97% of the datasheet's bandwidth. Left out, since the selection doesn't change them: the
KV cache's reads, attention's own time, the network between GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lynx_trt.errors import UsageError

# Memory bandwidth by datasheet, bytes/s: H100 SXM5, H200 SXM, A100 80 GB SXM, L40S, B200 (one GPU of a DGX B200).
BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12, "a100": 2.039e12, "l40s": 0.864e12, "b200": 8.0e12}
# What kernels reach of it: a copy reaches 90% on an H200, published MoE kernels 73% to 88% on an H100.
EFFICIENCY = 0.85
LAYER_SECONDS = 34e-6


@dataclass(frozen=True)
class CostModel:
    """A machine and a model. Bytes are bytes, bandwidth is bytes a second, as reached and not as printed."""

    name: str
    bandwidth: float
    layer_seconds: float
    expert_bytes: tuple[int, ...]  # [N], of one expert of each MoE layer
    other_bytes: int  # weights that every step reads, whatever it selects

    def bytes_of_experts(self, active: Sequence[float]) -> float:
        """Bytes of expert weights that a step reads, from the experts active in each MoE layer [N]."""
        return sum(count * size for count, size in zip(active, self.expert_bytes, strict=True))

    def step_seconds(self, active: Sequence[float]) -> float:
        """Predicted seconds of one decode step."""
        read = self.bytes_of_experts(active) + self.other_bytes
        return read / self.bandwidth + self.layer_seconds * len(self.expert_bytes)


def cost_model(
    hardware: str,
    expert_bytes: Sequence[int],
    other_bytes: int,
    *,
    bandwidth: float | None = None,
    layer_seconds: float = LAYER_SECONDS,
) -> CostModel:
    """The cost model of a GPU by name, or of a measured bandwidth in TB/s, which is taken as it is.

    Raises:
        UsageError: no such hardware, or a bandwidth or cost that is no number above 0.
    """
    if not 0 <= layer_seconds < 1:
        raise UsageError(
            f"the fixed cost of a MoE layer is {layer_seconds * 1e6:g} us; give 0 or more with --layer-overhead, and "
            "less than a second"
        )
    if bandwidth is not None:
        if not 0 < bandwidth < 1000:
            raise UsageError(f"--bandwidth is {bandwidth:g} TB/s; it must be above 0 (an H100 has 3.35)")
        name, reached = f"{bandwidth:g} TB/s", bandwidth * 1e12
    elif hardware.lower() in BANDWIDTH:
        name, reached = hardware.upper(), BANDWIDTH[hardware.lower()] * EFFICIENCY
    else:
        known = ", ".join(BANDWIDTH)
        raise UsageError(f"--hardware is {hardware!r}; known are {known}; for another pass --bandwidth in TB/s")
    return CostModel(name, reached, layer_seconds, tuple(expert_bytes), other_bytes)
