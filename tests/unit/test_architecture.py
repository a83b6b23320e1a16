"""Who may import whom, and that the command line loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "turnwise"
ALLOWED = {
    "config": set[str](),
    "kernels": {"config"},
    "containers": {"config"},
    "transport": {"config"},
    "monitor": {"config"},
    "envs": {"config", "containers"},
    "adapters": {"config", "envs"},
    "inference": {"config", "kernels", "transport"},
    "orchestrator": {"config", "envs", "inference", "transport", "monitor"},
    "trainer": {"config", "kernels", "transport", "monitor"},
    "scaffold": {"config", "envs"},
}
HEAVY = ("torch", "transformers", "datasets", "peft", "renderers")
LIGHT_IMPORTS = ["turnwise.cli.rl", "turnwise.cli.turnwise", "turnwise.launch.run", "turnwise.launch.dry_run", "turnwise.envs"]


def imported_packages(tree: ast.AST) -> set[str]:
    """Packages of ours that a module imports anywhere in it."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("turnwise.") and (SOURCE / name.split(".")[1]).is_dir()}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_lies_below_it(package: str):
    offences = {
        str(path.relative_to(SOURCE)): wrong
        for path in sorted((SOURCE / package).rglob("*.py"))
        if (wrong := imported_packages(ast.parse(path.read_text())) - ALLOWED[package] - {package})
    }
    assert offences == {}


def test_relative_imports_are_not_used():
    for path in SOURCE.rglob("*.py"):
        levels = [node.level for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert set(levels) <= {0}, path


def test_an_import_against_the_direction_is_found():
    planted = ast.parse("def f():\n    from turnwise.trainer.loss import policy_loss\nimport turnwise.config.base")
    assert imported_packages(planted) == {"trainer", "config"}


def loaded_after(code: str) -> list[str]:
    """Heavy libraries that a fresh Python has loaded after running `code`."""
    script = f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return done.stderr.split()


@pytest.mark.parametrize("module", LIGHT_IMPORTS)
def test_the_command_line_loads_no_torch(module: str):
    assert loaded_after(f"import {module}") == []


def test_help_loads_no_torch():
    assert loaded_after("from turnwise.cli.rl import run_command\nassert run_command(['--help']) == 0") == []


def test_help_does_not_even_load_what_only_a_run_needs():
    check = "assert not {'gymnasium', 'aiohttp', 'rich', 'numpy'} & set(sys.modules)"
    assert loaded_after(f"from turnwise.cli.rl import run_command\nrun_command(['--help'])\n{check}") == []


def test_a_heavy_import_is_found():
    assert loaded_after("import types; sys.modules['torch'] = types.ModuleType('torch')") == ["torch"]
