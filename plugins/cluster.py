"""The barrier of a cluster: programs of one launch that run at the same time and wait for each other. Needs SM 90."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def meet():
    """Wait for all programs of the cluster: what each of them wrote before can be read by all after it."""
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // dummy $0",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
