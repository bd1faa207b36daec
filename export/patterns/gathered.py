"""Weights gathered for each token and slot (transformers' `batched_mm`, onnxruntime-genai's decomposed gpt-oss).

The router's index picks each slot's matrices [T,K,rows,columns] out of stacked ones, a batched product applies them;
the slots are weighted and summed. It reads every expert as often as it is chosen.
"""

from __future__ import annotations

from lynx_trt.export.patterns.region_rule import RegionRule
from lynx_trt.export.regions.find import Found


class GatheredExperts(RegionRule):
    """Rewrites each block of gathered experts."""

    form = "gathered experts"

    @staticmethod
    def own(found: Found) -> bool:
        """See RegionRule."""
        return found.roles.gathered
