"""Measured launches, written by `python -m lynx_trt.plugins.tune`: edit nothing here, run it again.

EXPERTS is keyed by (SM, E, K, H, I), then by tokens; SELECT by (SM, E, K, tokens). Nothing has been measured yet:
every launch is an estimate of `launch.py`.
"""

from __future__ import annotations

from lynx_trt.plugins.launch import ExpertsKey, ExpertsLaunch, SelectKey, SelectLaunch

EXPERTS: dict[ExpertsKey, dict[int, ExpertsLaunch]] = {}
SELECT: dict[SelectKey, SelectLaunch] = {}
