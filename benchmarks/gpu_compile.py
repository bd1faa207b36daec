"""Compile what all other parts launch, on all cores at once: they find it in the cache. And: does anything spill here?

python benchmarks/gpu_compile.py --output FILE.json [--seconds N] [--dry-run]
"""

from __future__ import annotations

import itertools
import os
from dataclasses import asdict, replace

from gpu_common import benchmark
from gpu_layer import MODELS, ROUTERS, ops_for, specs_of, supported_sm

from lynx_trt.plugins.aot import compile_for, report_table
from lynx_trt.plugins.launch import CLUSTER_SM, SelectLaunch
from lynx_trt.plugins.plan import Kernel, Plan
from lynx_trt.plugins.plans import select_plan
from lynx_trt.plugins.shapes import STATES, ops_of
from lynx_trt.plugins.specs import Op, SelectSpec

# Powers of two cover all plans; 33 is a number of the tests.
TOKENS = (*(1 << power for power in range(15)), 33)
# What the tests run in float16 too.
TOKENS_FLOAT16 = (16, 1024)
# Selections in a cluster that tests/gpu runs, whatever ships: tokens, programs, and a program's tile and block. All
# programs with tokens; some with few or none; bits of an int64; tiles, of which some are empty.
CLUSTERS = ((16, 4, 4, 4), (33, 8, 8, 8), (200, 8, 32, 32), (300, 8, 64, 64), (300, 8, 16, 64), (512, 8, 8, 64))


def cluster_plan(spec: SelectSpec, sm: int, programs: int, tile: int, block: int) -> Plan[Kernel]:
    """One of them, for the batch that its programs hold."""
    return select_plan(spec, sm, programs * block, SelectLaunch(programs, tile, 8, block, ""))


def cluster_plans(sm: int) -> list[Plan[Kernel]]:
    """All of them; none where there are no clusters."""
    if sm < CLUSTER_SM:
        return []
    selects = [replace(specs_of(name, "bfloat16", dry=False)[1], dispatch_taken=True) for name in ROUTERS]
    return [cluster_plan(spec, sm, *launch) for spec, (_, *launch) in itertools.product(selects, CLUSTERS)]


def wanted(models: tuple[str, ...], *, dry: bool) -> list[Op]:
    """The ops of all parts."""
    if dry:
        return ops_for([specs_of(models[0], "bfloat16", dry=True)], (1,))
    found = [
        op
        for dtype, tokens in (("bfloat16", TOKENS), ("float16", TOKENS_FLOAT16))
        for op in ops_for([specs_of(name, dtype, dry=False) for name in models], tokens)
    ]
    return found + [op for name in STATES for op in ops_of(name, "bfloat16")]


def main() -> None:
    """A row a kernel."""
    with benchmark(__doc__, "compile", 120, MODELS) as (chosen, report, _):
        sm = 90 if chosen.dry else supported_sm()
        kernels = compile_for(wanted(chosen.models, dry=chosen.dry), [sm], jobs=os.cpu_count())
        report.extra["versions"] = kernels.versions
        for cubin in kernels.cubins:
            report.rows.append({**asdict(replace(cubin, image=b"")), "image": len(cubin.image)})
        print(report_table(kernels))


if __name__ == "__main__":
    main()
