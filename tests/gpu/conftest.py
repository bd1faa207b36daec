"""Tests that need a GPU: where there is none, nothing here is collected.

With LYNX_GPU_DRY set, and TRITON_INTERPRET=1, they run on a CPU at tiny sizes: do they run at all?
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available() and "LYNX_GPU_DRY" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

# The benchmarks' layers, and how they run compiled kernels, are what is tested here.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
