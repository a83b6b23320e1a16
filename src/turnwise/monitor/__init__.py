"""Metrics to JSONL, TensorBoard and Weights & Biases under one set of names, and the conditions that watch them."""

from turnwise.monitor.conditions import Conditions, Verdict
from turnwise.monitor.console import console_line
from turnwise.monitor.expressions import validate_expression
from turnwise.monitor.history import read_metrics
from turnwise.monitor.monitor import Monitor

__all__ = ["Conditions", "Monitor", "Verdict", "console_line", "read_metrics", "validate_expression"]
