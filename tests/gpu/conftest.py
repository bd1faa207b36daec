"""Tests that need a GPU: where there is none, nothing here is collected."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

# The benchmarks' layers, and how they run compiled kernels, are what is tested here.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
