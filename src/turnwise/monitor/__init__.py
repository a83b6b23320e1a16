"""Metrics to JSONL, TensorBoard, W&B and MLflow under one set of names, and the conditions that watch them."""

from turnwise.monitor.conditions import Conditions, Verdict
from turnwise.monitor.console import console_line
from turnwise.monitor.expressions import validate_expression
from turnwise.monitor.history import read_metrics
from turnwise.monitor.learning import Learning, LearningWatch, State, judge_metrics
from turnwise.monitor.monitor import Monitor

__all__ = [
    "Conditions",
    "Learning",
    "LearningWatch",
    "Monitor",
    "State",
    "Verdict",
    "console_line",
    "judge_metrics",
    "read_metrics",
    "validate_expression",
]
