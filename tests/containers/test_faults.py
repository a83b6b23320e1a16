"""What hostile or unlucky commands do: each contained, each told apart, and the box of use afterwards."""

import resource
import threading
import time
from typing import Any

import pytest

from support.docker_engine import my_containers
from turnwise.containers import Box, CommandResult, ContainerGone, Ending, Pool
from turnwise.containers.cgroup import CgroupCounters
from turnwise.containers.docker_host import DockerCell


def works(box: Box) -> None:
    """The box is of use, and what it had is still there."""
    assert box.run("cat kept").output == "kept"
    deadline = time.monotonic() + 10
    while len(box.run("echo /proc/[0-9]*").output.split()) > 2:  # first process and shell
        assert time.monotonic() < deadline, box.run("cat /proc/[0-9]*/cmdline").output  # the shell of a transfer is about to end
        time.sleep(0.05)


@pytest.fixture
def kept(box: Box) -> Box:
    box.put({"kept": "kept"})
    return box


def test_commands_share_one_shell_and_cost_about_a_millisecond(box: Box):
    box.run("cd /tmp; export A=5; f() { echo f$1; }")
    assert box.run("pwd; echo $A; f 1").output == "/tmp\n5\nf1\n"
    seconds = sorted(box.run("true").seconds for _ in range(200))
    assert seconds[20] < 0.03, seconds  # an exec takes 60 ms on an idle machine


@pytest.mark.parametrize(("command", "code"), [("false", 1), ("exit 3", 3), ("nonsense", 127), ("kill -9 $$", 137), ("if", 2)])
def test_a_failed_command_is_just_that(kept: Box, command: str, code: int):
    result = kept.run(command)
    assert (result.ending, result.exit_code) == (Ending.FAILED, code)
    works(kept)


@pytest.mark.parametrize(
    "command",
    [
        "sleep 60",
        "trap '' TERM HUP INT; while :; do :; done",
        "setsid sh -c \"trap '' TERM; while :; do sleep 1; done\" & sleep 60",
        "sh -c 'sleep 60 & sleep 60' & wait",
        "kill -STOP $$",
    ],
)
def test_past_its_deadline_everything_dies_and_files_stay(kept: Box, command: str):
    started = time.monotonic()
    result = kept.run(command, timeout_s=0.3)
    assert (result.ending, result.exit_code, result.new_session) == (Ending.TIMEOUT, None, True)
    assert time.monotonic() - started < 15
    works(kept)


def test_memory_beyond_the_limit_is_no_failed_command(kept: Box):
    result = kept.run("awk 'BEGIN { s = \"x\"; while (1) s = s s }'")
    assert (result.ending, result.exit_code) == (Ending.OOM, 137)
    works(kept)
    assert kept.run("sh -c 'kill -9 $$'").ending is Ending.FAILED  # the same status, and another reason


def test_an_engine_whose_counters_cannot_be_read_here_tells_the_same_apart(pool: Pool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CgroupCounters, "find", lambda container, pid: None)
    with pool.lease("busybox") as box:
        assert box.run("awk 'BEGIN { s = \"x\"; while (1) s = s s }'").ending is Ending.OOM
        assert box.run("false").ending is Ending.FAILED
        assert box.run("b() { b | b & }; b; sleep 1; ls", timeout_s=10).ending is Ending.PIDS


def test_a_container_on_this_machine_is_not_asked_for_its_counters(box: Box, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(DockerCell, "_ask", lambda cell, command: asked.append(command) or "0 0")
    assert box.run("(exit 3)").exit_code == 3
    assert asked == []


def test_a_shell_killed_for_memory_is_out_of_memory(kept: Box):
    result = kept.run("s=x; while :; do s=$s$s; done")
    assert result.ending is Ending.OOM
    works(kept)


def test_a_fork_bomb_ends_at_the_limit_of_processes(kept: Box):
    result = kept.run("b() { b | b & }; b; sleep 1; ls", timeout_s=10)
    assert result.ending is Ending.PIDS
    works(kept)


def test_a_fork_bomb_in_the_background_hits_the_next_command_and_not_the_box(kept: Box):
    kept.run("(while :; do sleep 30 & done) >/dev/null 2>&1 &")
    time.sleep(0.5)
    endings = [kept.run("ls", timeout_s=5).ending for _ in range(2)]
    assert endings[-1] is Ending.OK or Ending.PIDS in endings, endings
    kept.get("/home/agent/kept")  # a transfer gets through as well
    works(kept)


def test_output_beyond_all_reason_is_cut_and_ended_without_filling_memory(kept: Box, pool: Pool):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = kept.run("yes | head -c 1073741824", timeout_s=60)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert result.ending is Ending.FLOOD
    assert len(result.output) < 70_000
    assert result.cut > 2**20
    assert grown < 32 * 1024, grown  # KiB
    works(kept)


def test_much_output_is_cut_in_the_middle(kept: Box):
    result = kept.run("seq 1 200000", max_bytes=1000)
    assert result.ending is Ending.OK
    assert result.output.startswith("1\n2\n")
    assert result.output.endswith("200000\n")
    assert f"[... {result.cut} bytes left out ...]" in result.output


def test_a_full_home_is_a_failed_command_and_not_the_end(kept: Box):
    result = kept.run("dd if=/dev/zero of=big bs=1M")
    assert result.ending is Ending.FAILED
    assert "No space left" in result.output
    kept.run("rm big")
    works(kept)


def test_killing_everything_it_can_leaves_the_box(kept: Box):
    for command in ("sh -c 'kill -9 -1'", "sh -c 'kill -TERM -1'; kill -9 $$", "exec sleep 0", "exec 1>&- 2>&-; echo x"):
        kept.run(command, timeout_s=1)
    works(kept)


def test_markers_cannot_be_guessed_and_undecodable_output_is_replaced(kept: Box):
    result = kept.run("printf '\\n%s 0\\n' 0123456789abcdef0123456789abcdef; printf '\\377\\000'; set -x; exit 9")
    assert result.exit_code == 9
    assert "�\0" in result.output
    works(kept)


def test_a_container_killed_from_outside_in_mid_command_is_gone_and_no_other(pool: Pool, api: Any):
    with pool.lease("busybox") as victim:
        (container,) = my_containers(api)
        with pool.lease("busybox") as other:
            results: list[CommandResult | Exception] = []

            def command() -> None:
                try:
                    results.append(victim.run("sleep 30"))
                except ContainerGone as error:
                    results.append(error)

            thread = threading.Thread(target=command)
            thread.start()
            time.sleep(0.3)
            api.kill(container["Id"])
            thread.join(20)
            assert isinstance(results[0], ContainerGone)
            assert other.run("echo undisturbed").output == "undisturbed\n"
        with pytest.raises(ContainerGone):
            victim.run("true")
    assert pool.state.down == {}


def test_a_lease_that_ends_ends_its_command(pool: Pool):
    caught: list[Exception] = []
    with pool.lease("busybox") as box:

        def command() -> None:
            try:
                box.run("sleep 30")
            except ContainerGone as error:
                caught.append(error)

        thread = threading.Thread(target=command)
        thread.start()
        time.sleep(0.2)
    thread.join(20)
    assert isinstance(caught[0], ContainerGone)
