"""The pages keep up with the code: every metric is documented, and every configuration shown is one."""

import ast
import itertools
import re
import tomllib
from pathlib import Path

import pytest

from turnwise.config import RLConfig
from turnwise.config.sweep import SweepConfig
from turnwise.monitor import validate_expression
from turnwise.monitor.expressions import ALIASES, AREAS

ROOT = Path(__file__).parents[3]
METRIC = re.compile(rf"(?:{'|'.join(AREAS)})/[a-z_/<> ]*[a-z_>]")


def documented() -> set[str]:
    """Names in backticks on the page, with `{a,b}` written out."""
    names: set[str] = set()
    for text in re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "metrics.md").read_text()):
        parts = [part.split(",") for part in re.split(r"[{}]", text)]
        names |= {"".join(choice) for choice in itertools.product(*parts)}
    return names


def emitted() -> set[str]:
    """Metric names that stand in the code of the processes as plain strings."""
    found: set[str] = set()
    for folder in ("orchestrator", "trainer", "monitor"):
        for file in (ROOT / "src" / "turnwise" / folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(file.read_text()))
            texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            found |= {text for text in texts if METRIC.fullmatch(text) and " " not in text}
    return found


def test_every_metric_in_the_code_is_on_the_page() -> None:
    assert {"actor/loss", "critic/reward/mean"} <= emitted()
    assert emitted() - documented() == set()


def test_every_short_name_is_on_the_page_and_leads_to_a_metric_there() -> None:
    assert set(ALIASES) | set(ALIASES.values()) <= documented()


def test_the_sweep_on_its_page_is_valid() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), flags=re.DOTALL)
    sweep = SweepConfig.model_validate(tomllib.loads(block))
    assert [run.id for run in sweep.run] == ["e6a", "e6b"]
    assert sweep.run[1].overrides["inference"]["noise"] == {"sigma_start": 0.02}


@pytest.mark.parametrize("page", ["README.md", "docs/metrics.md", "docs/loss.md", "docs/noise.md"])
def test_configurations_on_the_pages_are_valid(page: str) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        config = RLConfig.model_validate(tomllib.loads(block))
        for condition in (config.stop.success_when, config.stop.abort_when):
            assert condition is None or validate_expression(condition) is None
