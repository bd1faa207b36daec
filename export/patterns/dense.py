"""All experts computed for all tokens, then masked (Optimum's gpt-oss, older torch exports, OpenVINO's tiled form).

One batched product over the experts' axis, or one product an expert, whose results are multiplied with weights that are
0 for all but the chosen.
"""

from __future__ import annotations

from lynx_trt.export.patterns.region_rule import RegionRule
from lynx_trt.export.regions.find import Found


class DenseExperts(RegionRule):
    """Rewrites each block of dense experts."""

    form = "dense experts"

    @staticmethod
    def own(found: Found) -> bool:
        """See RegionRule."""
        return not found.roles.gathered and not found.data_depends
