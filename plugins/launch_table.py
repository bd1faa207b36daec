"""Measured launches, written by `python -m lynx_trt.plugins.tune`: edit nothing here, run it again.

EXPERTS is keyed by (SM, dtype, E, H, I, tokens per expert bucket), SELECT by (SM, E, K, tokens bucket). Nothing has
been measured yet: every launch is an estimate of `launch.py`.
"""

from __future__ import annotations

from lynx_trt.plugins.launch import ExpertsLaunch, SelectLaunch

EXPERTS: dict[tuple[int, str, int, int, int, int], ExpertsLaunch] = {}
SELECT: dict[tuple[int, int, int, int], SelectLaunch] = {}
