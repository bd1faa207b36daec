"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs, and waits itself.

A kernel that is compiled with PROGRAMMATIC calls `wait_for_earlier` before it reads or writes what another launch has
to do with, and only then `let_next_start`. So whatever is launched two before has ended, and can be seen, when a kernel
begins: of that it may read before it waits. The first launch of an op begins when everything before it has ended, but
for LynxExperts behind its LynxSelect (`plans.py`). Needs SM 90 or later.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_earlier(PROGRAMMATIC: tl.constexpr):
    """Wait until the launch before this one has ended; what it wrote can be seen then."""
    if PROGRAMMATIC:
        gdc_wait()


@triton.jit
def let_next_start(PROGRAMMATIC: tl.constexpr):
    """The next launch may start as soon as all programs of this one have come here or ended."""
    if PROGRAMMATIC:
        gdc_launch_dependents()


@triton.jit
def prefetch_lines(at):
    """Have the 128 bytes at each of some pointers, multiples of 16, brought to L2; nothing waits for them."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 128; mov.u32 $0, 0;",
        "=r,l",
        [at.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
