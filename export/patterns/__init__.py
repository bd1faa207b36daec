"""The forms in which exporters write MoE blocks, one a file.

`block.py` is what a pattern comes to, `rule.py` what every pattern has; `fused.py` and `region_rule.py` are shared by
the fused ops and by the forms in standard ops.
"""
