"""Clusters in the interpreter: programs see what all wrote before they met, and nothing is hung by one that fails."""

from __future__ import annotations

import pytest
import torch
from kernel_process import interpreted


def pass_around(kernel: str, programs: int) -> torch.Tensor:
    """Launch one of the kernels of `cluster_kernels.py`, interpreted."""
    import cluster_kernels

    from lynx_trt.plugins import interpreter

    values = torch.arange(programs, dtype=torch.int32)
    interpreter.as_cluster(getattr(cluster_kernels, kernel), programs)(values, torch.zeros_like(values), programs)
    return values


def test_what_all_wrote_is_seen_after_they_met() -> None:
    """Each program takes its neighbour's number, twice: two places further, whoever runs first."""
    assert interpreted(pass_around, "rotate_kernel", 5).tolist() == [2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [("uneven_kernel", "some programs of a cluster meet more often than others"), ("failing_kernel", "division")],
)
def test_a_program_that_fails_is_said(kernel: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        interpreted(pass_around, kernel, 3)
    assert interpreted(pass_around, "rotate_kernel", 3).tolist() == [2, 0, 1]
