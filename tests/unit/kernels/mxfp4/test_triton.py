"""The Triton kernels, on a machine without a GPU: their values in Triton's interpreter, their machine code from its compiler.

kernel_checks.py runs in a process of its own, where it also serves as a test of the compiled kernels if there is a GPU.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parents[3]
CHECKS = Path(__file__).with_name("kernel_checks.py")
NAMES = [
    node.name
    for node in ast.parse(CHECKS.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton (Linux only; `pip install 'triton>=3.6,<3.8'` where torch has not brought it)",
)


def environment(**variables: str) -> dict[str, str]:
    return (
        os.environ
        | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
        | variables
    )


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What failed, by the name of the check."""
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={TESTS.parent}",
        f"--junitxml={report}",
        str(CHECKS),
    ]
    variables = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=280)
    assert report.exists(), done.stdout + done.stderr
    results: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        texts = [f"{case.get('name')}\n{problem.text}" for problem in case if problem.tag in ("failure", "error", "skipped")]
        results.setdefault(case.get("name", "").partition("[")[0], []).extend(texts)
    return results


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_agree_with_the_reference(failures: dict[str, list[str]], name: str):
    assert failures[name] == []


@pytest.fixture(scope="module")
def machine_code() -> dict[str, dict[str, Any]]:
    script = TESTS / "support" / "compile_kernels.py"
    done = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    report: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return report


FEW, MORE = ["product8", "product16", "product16_large"], ["product32", "product64", "product32_large"]
KERNELS = ["dequantize", "quantize", "reduce", *FEW, *MORE]


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_keeps_values_in_local_memory(machine_code: dict[str, dict[str, Any]], kernel: str):
    code = machine_code[kernel]
    assert (code["STACK"], code["LOCAL"]) == (0, 0)


def test_dequantise_writes_sixteen_bytes_at_a_time(machine_code: dict[str, dict[str, Any]]):
    instructions = machine_code["dequantize"]["instructions"]
    stores = {name: count for name, count in instructions.items() if name.startswith("STG")}
    assert list(stores) == ["STG.E.128"]
    assert machine_code["dequantize"]["shared"] == 0


@pytest.mark.parametrize("kernel", [*FEW, *MORE])
def test_weights_go_from_memory_to_registers_to_tensor_cores(machine_code: dict[str, dict[str, Any]], kernel: str):
    code = machine_code[kernel]
    instructions = code["instructions"]
    used, other = ("HMMA", "HGMMA") if kernel in FEW else ("HGMMA", "HMMA")
    assert any(name.startswith(used) for name in instructions)
    assert not any(name.startswith(("SHFL", other)) for name in instructions)
    loads = sum(count for name, count in instructions.items() if name.startswith("LDG") and name.endswith(("EF.128", "NA.128")))
    assert loads * 32 >= code["weights_per_thread"]  # 16 bytes of codes are 32 weights


@pytest.mark.parametrize("kernel", FEW)
def test_few_tokens_have_one_piece_of_shared_memory_and_one_barrier(machine_code: dict[str, dict[str, Any]], kernel: str):
    assert machine_code[kernel]["shared"] == 48 * 1024 + 1024  # with what the driver keeps for itself
    assert machine_code[kernel]["instructions"]["BAR.SYNC.DEFER_BLOCKING"] == 1
    assert not any(name.startswith("LDL") for name in machine_code[kernel]["instructions"])


@pytest.mark.parametrize("kernel", FEW)
def test_only_weights_are_read_before_the_kernel_that_made_the_tokens_has_ended(
    machine_code: dict[str, dict[str, Any]], kernel: str
):
    before = [name for name in machine_code[kernel]["before_waiting"] if name.startswith(("LDG", "STG"))]
    assert sorted(before) == 4 * ["LDG.E"] + 2 * ["LDG.E.NA.128"]  # scales, four bytes at a time, and the first codes
    assert any(name.startswith("STG") for name in machine_code[kernel]["instructions"])


def test_parts_are_neither_read_nor_added_before_they_are_complete(machine_code: dict[str, dict[str, Any]]):
    before = machine_code["reduce"]["before_waiting"]
    assert "PREEXIT" in before  # the next kernel may begin
    assert not any(name.startswith(("LDG", "STG")) for name in before)


@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("product8", 3.2),
        ("product16", 3.5),
        ("product16_large", 4.1),
        ("product32", 4.5),
        ("product64", 5.0),
        ("product32_large", 5.2),
    ],
)
def test_a_weight_costs_few_instructions(machine_code: dict[str, dict[str, Any]], kernel: str, most: float):
    """At 4 a multiprocessor issues those of 67 M weights in 8.4 us, about the time in which an H200's memory delivers them."""
    code = machine_code[kernel]
    assert sum(code["instructions"].values()) / code["weights_per_thread"] <= most


@pytest.mark.parametrize("kernel", ["product8", "product16", "product32", "product64"])
def test_as_many_programs_fit_on_a_multiprocessor_as_planned(machine_code: dict[str, dict[str, Any]], kernel: str):
    assert machine_code[kernel]["resident"] >= machine_code[kernel]["resident_planned"]
