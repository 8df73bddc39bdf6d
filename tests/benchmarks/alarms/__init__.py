"""Alarm engines on labelled runs: ours, the usual thresholds, and other tools, on the same data.

`make bench-alarms RUNS=path/to/labelled/runs`
"""
