"""Checks of the trainer: what its processes measured on a batch, judged by pure functions of `ProbeReport`."""

from turnwise.diagnose.trainer_checks.differences import DIFFERENCES
from turnwise.diagnose.trainer_checks.gradient import GRADIENT
from turnwise.diagnose.trainer_checks.logprobs import LOGPROBS
from turnwise.diagnose.trainer_checks.rewarded import REWARDED
from turnwise.diagnose.trainer_checks.update import UPDATE

TRAINER_CHECKS = (LOGPROBS, GRADIENT, DIFFERENCES, UPDATE, REWARDED)

__all__ = ["TRAINER_CHECKS"]
