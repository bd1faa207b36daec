"""Kernels for test_cluster.py, which interprets them."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from lynx_trt.plugins.cluster import meet


@triton.jit
def rotate_kernel(values, others, number):
    """Each program's value moves two places on."""
    here = tl.program_id(0)
    beside = (here + 1) % number
    tl.store(others + here, tl.load(values + beside))
    meet()
    tl.store(values + here, tl.load(others + beside))
    meet()


@triton.jit
def uneven_kernel(values, others, number):
    """The first program meets alone."""
    if tl.program_id(0) == 0:
        meet()


@triton.jit
def failing_kernel(values, others, number):
    """The second program fails between two meetings."""
    meet()
    tl.static_assert(tl.program_id(0) != 1, "division")
    meet()
