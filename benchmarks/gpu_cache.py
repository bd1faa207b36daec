"""Compile everything that `make gpu --tune` would, on a machine without a GPU: the time on one is for measuring.

python benchmarks/gpu_cache.py --sm 90 [--model NAME]

It goes into the cache (LYNX_TRT_CACHE), which then travels. A cubin is found again where the same sources meet the same
triton: install the version that the GPU machine has.
"""

from __future__ import annotations

import argparse
import sys

from gpu_common import ROOT

sys.path.insert(0, str(ROOT / "build" / "gpu"))  # where the package is not installed

from gpu_compile import cluster_plans, wanted
from gpu_layer import MODELS

from lynx_trt.console import Progress
from lynx_trt.plugins.aot import compile_each, compile_for
from lynx_trt.plugins.launch import SHARED_MEMORY
from lynx_trt.plugins.tune import TOKENS, compile_candidates


def main() -> None:
    """Into the cache, and how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, choices=SHARED_MEMORY, default=90)
    parser.add_argument("--model", action="append", choices=MODELS, help="one model; repeat for several (all)")
    chosen = parser.parse_args()
    models = tuple(chosen.model or MODELS)
    # The tuner's last: the others can be run without them.
    clusters = [step.kernel for plan in cluster_plans(chosen.sm) for step in plan.steps]
    with Progress() as bars:
        compile_for(wanted(models, dry=False), [chosen.sm], progress=bars.phase("What the parts launch"))
        compile_each(clusters, chosen.sm, progress=bars.phase("Clusters for the tests"))
    compile_candidates(models, "bfloat16", TOKENS, chosen.sm)


if __name__ == "__main__":
    main()
