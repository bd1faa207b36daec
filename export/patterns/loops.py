"""A loop over the experts, unrolled: one MatMul triple an expert on its tokens (older exports, Optimum's qwen3_moe).

Each expert's tokens are looked up in a one-hot of the router's choice, gathered, computed, weighted, and added to the
result by ScatterElements, ScatterND or an Add.
"""

from __future__ import annotations

from lynx_trt.export.patterns.region_rule import RegionRule
from lynx_trt.export.regions.find import Found


class LoopedExperts(RegionRule):
    """Rewrites each block of per-expert loop."""

    form = "per-expert loop"

    @staticmethod
    def own(found: Found) -> bool:
        """See RegionRule."""
        return found.data_depends and not found.roles.gathered and not found.roles.together
