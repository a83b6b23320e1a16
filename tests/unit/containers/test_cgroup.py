"""The kernel's counters: found by path, of this very container and no other, or not at all."""

from pathlib import Path

import pytest

from turnwise.containers.cgroup import CgroupCounters
from turnwise.containers.spec import Counters

ID, PID = "3f" * 32, 77


def lay_out(root: Path, membership: str, files: dict[str, str]) -> CgroupCounters | None:
    """A machine's files, and what is found there."""
    process = root / "proc" / str(PID)
    process.mkdir(parents=True)
    (process / "cgroup").write_text(membership)
    for name, text in files.items():
        file = root / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return CgroupCounters.find(ID, PID, proc=root / "proc", cgroups=root / "cgroup")


SLICE = f"system.slice/docker-{ID}.scope"
UNIFIED = {f"{SLICE}/memory.events": "low 0\noom 5\noom_kill 3\n", f"{SLICE}/pids.events": "max 2\n"}
LEGACY = {
    f"memory/docker/{ID}/memory.oom_control": "oom_kill_disable 0\nunder_oom 1\noom_kill 3\n",
    f"pids/docker/{ID}/pids.events": "max 2\n",
}
LEGACY_LINES = (
    f"9:name=systemd:/docker/{ID}\n8:pids:/docker/{ID}\n4:memory:/docker/{ID}\n1:cpu,cpuacct:/docker/{ID}\n0::/docker/{ID}\n"
)


@pytest.mark.parametrize(("lines", "files"), [(f"0::/{SLICE}\n", UNIFIED), (LEGACY_LINES, LEGACY)], ids=["v2", "v1"])
def test_both_counters_are_read_from_either_kind_of_cgroups(tmp_path: Path, lines: str, files: dict[str, str]):
    found = lay_out(tmp_path, lines, files)
    assert found is not None
    assert found.read() == Counters(oom=3, pids=2)


def test_an_old_kernel_that_does_not_count_kills_has_counted_none(tmp_path: Path):
    old = {**LEGACY, f"memory/docker/{ID}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}
    found = lay_out(tmp_path, LEGACY_LINES, old)
    assert found is not None
    assert found.read() == Counters(oom=0, pids=2)


def test_a_process_number_of_another_namespace_is_not_taken_for_the_container(tmp_path: Path):
    other = "4a" * 32
    lines, files = LEGACY_LINES.replace(ID, other), {name.replace(ID, other): text for name, text in LEGACY.items()}
    assert lay_out(tmp_path, lines, files) is None


@pytest.mark.parametrize("missing", list(LEGACY))
def test_without_both_files_nothing_is_found(tmp_path: Path, missing: str):
    assert lay_out(tmp_path, LEGACY_LINES, {name: text for name, text in LEGACY.items() if name != missing}) is None


def test_a_process_that_is_not_here_has_none(tmp_path: Path):
    assert CgroupCounters.find(ID, PID, proc=tmp_path, cgroups=tmp_path) is None


def test_after_the_end_of_the_container_there_is_nothing_to_read(tmp_path: Path):
    found = lay_out(tmp_path, LEGACY_LINES, LEGACY)
    assert found is not None
    (tmp_path / "cgroup" / f"pids/docker/{ID}/pids.events").unlink()
    assert found.read() is None
