"""`turnwise eval` before its engine starts, and what it says of rollouts that failed."""

import sys
from pathlib import Path

import pytest

from turnwise.config import ConfigError, RLConfig
from turnwise.inference.launcher import VLLM_PYTHON
from turnwise.launch.evaluation import evaluate, failures


def test_an_evaluation_whose_gpu_is_not_there_is_refused(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(VLLM_PYTHON, sys.executable)
    config = RLConfig.model_validate(
        {
            "max_steps": 1,
            "output_dir": tmp_path,
            "model": {"name": str(tiny_model)},
            "gpus": {"inference": [3]},
            "orchestrator": {"env": [{"id": "wordle"}]},
        }
    )
    with pytest.raises(ConfigError, match=r"gpus\.inference = \[3\] but CUDA_VISIBLE_DEVICES = '' in the environment hides all"):
        evaluate(config, None)


def test_rollouts_that_count_in_no_mean_are_told_with_their_reasons():
    rollouts = [{"error": error} for error in (None, "b", "a", "a", "c", "d", "b", "a", "c")]
    assert failures(rollouts) == "8 of 9 rollouts ended with an error and count in no mean. Reasons: a | b | c"
    assert failures(rollouts[:1]) is None
