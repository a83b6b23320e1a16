"""Tables that nothing reads yet are refused where a run or an evaluation would start, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest

from turnwise.config import ConfigError, RLConfig
from turnwise.config.rules import broken_rules
from turnwise.launch.evaluation import evaluate
from turnwise.launch.resolve import resolve
from turnwise.launch.unused import refuse_unused

QUANT = {"trainer": {"model": {"quant": {}}}}


def config(**tables: Any) -> RLConfig:
    return RLConfig.model_validate({"max_steps": 1, "orchestrator": {"env": [{"id": "wordle"}]}, **tables})


@pytest.mark.parametrize(
    ("tables", "named"),
    [
        (QUANT, r"\[trainer.model.quant\] is set, and this version would run with unquantised weights. Remove"),
    ],
)
def test_a_run_and_an_evaluation_refuse_them(tables: dict[str, Any], named: str):
    made = config(**tables)
    assert broken_rules(made) == []  # a dry run may look at it
    with pytest.raises(ConfigError, match=named):
        resolve(made)
    with pytest.raises(ConfigError, match=named):
        evaluate(made, Path("nowhere"))


def test_without_them_nothing_is_refused():
    refuse_unused(config())
    refuse_unused(config(inference={"noise": {}}))
