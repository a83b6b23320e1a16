"""What a machine has and what of it the caller may use, from recorded output of nvidia-smi."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.launch import gpus
from turnwise.launch.gpus import Gpu, Machine, TorchBuild, choose, look, parse_smi, parse_torch_version, torch_build

MIB = 2**20
EIGHT = "\n".join(f"{i}, GPU-{i}{i}aa-77, NVIDIA H200, 143771, {4 + i}" for i in range(8))


def devices(found: list[Gpu]) -> list[str]:
    return [gpu.device for gpu in found]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            "0, GPU-5bb1-9, NVIDIA H200, 143771, 12042\n",
            [Gpu("0", "GPU-5bb1-9", "NVIDIA H200", 143771 * MIB, 12042 * MIB)],
        ),
        ("0, GPU-a, NVIDIA GB10, [N/A], [N/A]\n", [Gpu("0", "GPU-a", "NVIDIA GB10")]),
        ("0, GPU-a, NVIDIA A100, 40960, [Insufficient Permissions]\n", [Gpu("0", "GPU-a", "NVIDIA A100", 40960 * MIB)]),
        (
            "WARNING: infoROM is corrupted at gpu 0000:0A:00.0\n1, GPU-b, Tesla T4, 15360, 3\n",
            [Gpu("1", "GPU-b", "Tesla T4", 15360 * MIB, 3 * MIB)],
        ),
        ("No devices were found\n", []),
        ("", []),
    ],
    ids=["one H200", "memory is not told", "use is not told", "a warning before", "no device", "no output"],
)
def test_the_output_of_nvidia_smi_is_read(output: str, expected: list[Gpu]):
    assert parse_smi(output) == expected


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        ("4,5,6,7", ["4", "5", "6", "7"]),
        (" 2 , 0 ", ["2", "0"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,-1,2", ["1"]),
        ("0,9,1", ["0"]),
        ("3,3", []),
        ("3,GPU-33aa-77", []),
        ("GPU-66aa-77,0", ["GPU-66aa-77", "0"]),
        ("gpu-66", []),
        ("GPU-66", ["GPU-66aa-77"]),
        ("GPU-nowhere,0", []),
        ("MIG-3f5e-1,MIG-GPU-11aa-77/1/0", ["MIG-3f5e-1", "MIG-GPU-11aa-77/1/0"]),
    ],
)
def test_the_visible_gpus_are_those_that_cuda_shows(offered: str, expected: list[str]):
    assert devices(choose(parse_smi(EIGHT), offered)) == expected


def test_a_gpu_chosen_by_uuid_keeps_its_name_and_memory():
    (gpu,) = choose(parse_smi(EIGHT), "GPU-66")
    assert (gpu.uuid, gpu.name, gpu.total, gpu.used) == ("GPU-66aa-77", "NVIDIA H200", 143771 * MIB, 10 * MIB)


def test_the_memory_of_a_mig_slice_is_not_that_of_its_gpu():
    (slice_,) = choose(parse_smi(EIGHT), "MIG-GPU-11aa-77/1/0")
    assert (slice_.name, slice_.total) == ("MIG slice", None)


def test_a_cluster_is_believed_where_the_driver_tells_nothing():
    assert devices(choose([], "4,GPU-abc")) == ["4", "GPU-abc"]
    assert devices(choose([Gpu("0")], "GPU-abc")) == ["GPU-abc"]  # counted in /dev, without UUIDs


@given(st.lists(st.integers(0, 7), unique=True))
def test_gpus_are_offered_in_the_order_of_the_variable(order: list[int]):
    assert devices(choose(parse_smi(EIGHT), ",".join(map(str, order)))) == [str(index) for index in order]


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for nvidia-smi, first in PATH, which prints eight H200."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{EIGHT}\nEND\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return script


@pytest.mark.usefixtures("smi")
def test_a_machine_is_what_nvidia_smi_lists():
    machine = look({})
    assert (len(machine.gpus), machine.offered) == (8, None)
    assert machine.gpu(7) == Gpu("7", "GPU-77aa-77", "NVIDIA H200", 143771 * MIB, 11 * MIB)
    assert (machine.gpu(8), machine.gpu(-1)) == (None, None)


@pytest.mark.usefixtures("smi")
def test_a_machine_is_seen_through_the_callers_cuda_visible_devices():
    machine = look({"CUDA_VISIBLE_DEVICES": "5,GPU-22"})
    assert [machine.device(index) for index in (0, 1, 2)] == ["5", "GPU-22aa-77", "2"]
    assert machine.offered == "5,GPU-22"


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 9\n", "not a program"])
def test_devices_are_counted_where_nvidia_smi_fails(smi: Path, script: str, monkeypatch: pytest.MonkeyPatch):
    smi.write_text(script)
    monkeypatch.setattr(gpus, "_count_devices", lambda: 2)
    assert look({}).gpus == (Gpu("0"), Gpu("1"))


def test_an_nvidia_smi_that_hangs_is_given_up(smi: Path, monkeypatch: pytest.MonkeyPatch):
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(gpus, "SMI_TIMEOUT_S", 0.1)
    monkeypatch.setattr(gpus, "_count_devices", lambda: 1)
    assert look({}) == Machine((Gpu("0"),), None, torch_build())


@pytest.mark.parametrize(
    ("text", "build"),
    [
        (
            "__version__ = '2.11.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
            TorchBuild("2.11.0+cu130", "13.0"),
        ),
        (
            "__all__ = ['__version__', 'cuda']\n__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n",
            TorchBuild("2.13.0+cpu", None),
        ),
        ("", TorchBuild("None", None)),
    ],
)
def test_the_build_of_torch_is_read_from_its_files(text: str, build: TorchBuild):
    assert parse_torch_version(text) == build


def test_the_build_that_is_read_is_the_one_that_is_imported():
    import torch

    assert torch_build() == TorchBuild(torch.__version__, torch.version.cuda)
