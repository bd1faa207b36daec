"""Compile what all other parts launch, on all cores at once: they find it in the cache. And: does anything spill here?

python benchmarks/gpu_compile.py --output FILE.json [--seconds N] [--dry-run]
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace

from gpu_common import benchmark
from gpu_layer import MODELS, ops_for, specs_of, supported_sm

from lynx_trt.plugins.aot import compile_for, report_table
from lynx_trt.plugins.specs import Op

# Powers of two cover all plans; 33 is a number of the tests.
TOKENS = (*(1 << power for power in range(15)), 33)
# What the tests run in float16 too.
TOKENS_FLOAT16 = (16, 1024)


def wanted(models: tuple[str, ...], *, dry: bool) -> list[Op]:
    """The ops of all parts."""
    if dry:
        return ops_for([specs_of(models[0], "bfloat16", dry=True)], (1,))
    return [
        op
        for dtype, tokens in (("bfloat16", TOKENS), ("float16", TOKENS_FLOAT16))
        for op in ops_for([specs_of(name, dtype, dry=False) for name in models], tokens)
    ]


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
