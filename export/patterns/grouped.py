"""Tokens sorted by expert, one product an expert on its stretch of rows (transformers' `grouped_mm`, exported).

The activation runs once for the rows of all experts; the result is put back into order, weighted and summed.
"""

from __future__ import annotations

from lynx_trt.export.patterns.region_rule import RegionRule
from lynx_trt.export.regions.find import Found


class GroupedExperts(RegionRule):
    """Rewrites each block of grouped experts."""

    form = "grouped experts"

    @staticmethod
    def own(found: Found) -> bool:
        """See RegionRule."""
        return found.data_depends and not found.roles.gathered and found.roles.together
