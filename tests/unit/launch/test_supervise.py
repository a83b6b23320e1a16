"""Supervision, for real, over tiny fake processes: how a run ends, and that nothing of it is left."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from support.fake_run import GRANDCHILD, STUBBORN, checkpoint_then_exit, plan_of, polite
from turnwise.launch.child import Child
from turnwise.launch.plan import Plan
from turnwise.launch.ports import free_range
from turnwise.launch.supervise import Deadlines, ExitCode, Outcome, Supervisor
from turnwise.launch.survivors import processes_of
from turnwise.transport import Control

QUICK = Deadlines(startup_s=20, stop_s=20, rescue_s=5, grace_s=1)


class Transcript:
    """Records what a user would have seen."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seen: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def update(self, children: Sequence[Child]) -> None:
        self.seen = [child.name for child in children if child.healthy]


@pytest.fixture
def run_id() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def port() -> int:
    return free_range("127.0.0.1", 1)


def supervise(
    plan: Plan, run_id: str, deadlines: Deadlines = QUICK, meanwhile: Callable[[Supervisor], None] | None = None
) -> Outcome:
    """Supervise a plan while `meanwhile` runs in a thread; fails when a process of the run is left."""
    supervisor = Supervisor(plan, run_id, Transcript(), deadlines=deadlines)
    thread = threading.Thread(target=meanwhile, args=(supervisor,)) if meanwhile else None
    if thread:
        thread.start()
    outcome = supervisor.run()
    if thread:
        thread.join()
    assert processes_of(run_id) == []
    assert all(child.exit_code() is not None for child in supervisor.children)
    return outcome


def once_healthy(act: Callable[[Supervisor], None]) -> Callable[[Supervisor], None]:
    """`act` after all processes run and the engine serves."""

    def wait(supervisor: Supervisor) -> None:
        while len(supervisor.children) < 3 or not all(child.healthy and child.last_lines(1) for child in supervisor.children):
            time.sleep(0.02)
        act(supervisor)

    return wait


def test_a_run_whose_trainer_and_orchestrator_end_well_is_done_and_its_engine_is_stopped(tmp_path: Path, run_id: str, port: int):
    code = polite(tmp_path, "worker", seconds=0.3)
    outcome = supervise(plan_of(tmp_path, run_id, port, trainer=code, orchestrator=code), run_id)
    assert outcome == Outcome(ExitCode.DONE, "all steps done")


@pytest.mark.parametrize("role", ["inference", "trainer", "orchestrator"])
def test_killing_any_process_ends_the_others_and_fails_the_run(tmp_path: Path, run_id: str, port: int, role: str):
    code = polite(tmp_path, "worker", seconds=60)
    plan = plan_of(tmp_path, run_id, port, trainer=code, orchestrator=code)

    def kill(supervisor: Supervisor) -> None:
        child = next(child for child in supervisor.children if child.name == role)
        os.kill(child.pid, signal.SIGKILL)

    outcome = supervise(plan, run_id, meanwhile=once_healthy(kill))
    assert outcome.code == ExitCode.FAILED
    assert outcome.reason.startswith(f"{role} was ended by signal 9; its log is {tmp_path / 'logs' / role}")
    assert outcome.cause == "something killed it, most likely the kernel for want of RAM (`dmesg` tells)."


def test_a_failure_shows_the_last_twenty_lines_of_the_process(tmp_path: Path, run_id: str, port: int):
    talker = "for i in range(50): print('line', i)\nraise SystemExit(7)"
    plan = plan_of(tmp_path, run_id, port, trainer=polite(tmp_path, "t", seconds=60), orchestrator=talker)
    outcome = supervise(plan, run_id)
    assert outcome.code == ExitCode.FAILED
    assert "orchestrator ended with exit code 7" in outcome.reason
    assert outcome.log_tail == tuple(f"line {i}" for i in range(30, 50))


def test_a_failure_is_told_in_the_words_that_the_orchestrator_left(tmp_path: Path, run_id: str, port: int):
    words = "orchestrator: TooManyErrors: 8 of the last 8 rollouts ended with an error"
    leaves = f"""
from pathlib import Path
from turnwise.transport import Control
Control(Path({str(tmp_path)!r})).request_stop("failed", {words!r})
raise SystemExit(1)
"""
    outcome = supervise(plan_of(tmp_path, run_id, port, trainer=polite(tmp_path, "t", seconds=60), orchestrator=leaves), run_id)
    assert outcome.reason == f"{words}; its log is {tmp_path / 'logs' / 'orchestrator.stdout'}"


def test_what_the_orchestrator_left_is_not_said_of_another_process(tmp_path: Path, run_id: str, port: int):
    Control(tmp_path).request_stop("failed", "orchestrator: of a moment ago")
    worker = polite(tmp_path, "w", seconds=60)
    outcome = supervise(plan_of(tmp_path, run_id, port, trainer="raise SystemExit(3)", orchestrator=worker), run_id)
    assert outcome.reason.startswith("trainer ended with exit code 3; its log is")


DYING_ENGINE = """
print("(EngineCore pid=7) ValueError: Free memory on device cuda:0 (30.1/139.8 GiB) on startup is less than desired GPU memory "
      "utilization (0.92, 128.6 GiB).")
for i in range(100): print("  File somewhere", i)
print("(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above.")
raise SystemExit(1)
"""


def test_an_engine_that_dies_on_its_gpu_is_explained_from_far_above_its_last_lines(tmp_path: Path, run_id: str, port: int):
    worker = polite(tmp_path, "w", seconds=60)
    outcome = supervise(plan_of(tmp_path, run_id, port, trainer=worker, orchestrator=worker, engine=DYING_ENGINE), run_id)
    assert outcome.reason.startswith("inference ended with exit code 1")
    assert "Free memory" not in "".join(outcome.log_tail)
    assert outcome.cause is not None
    cause, helps = outcome.cause.splitlines()
    assert cause.startswith("ValueError: Free memory on device cuda:0 (30.1/139.8 GiB) on startup is less than desired")
    assert "gpus.inference_memory" in helps


def test_what_a_model_writes_is_no_cause(tmp_path: Path, run_id: str, port: int):
    says = "print('reply: CUDA out of memory'); raise SystemExit(1)"
    outcome = supervise(plan_of(tmp_path, run_id, port, trainer=polite(tmp_path, "t", seconds=60), orchestrator=says), run_id)
    assert (outcome.reason.split(";")[0], outcome.cause) == ("orchestrator ended with exit code 1", None)


def test_causes_are_looked_for_in_this_start_alone(tmp_path: Path, run_id: str, port: int):
    worker = polite(tmp_path, "w", seconds=60)
    plan = plan_of(tmp_path, run_id, port, trainer=worker, orchestrator=worker, engine="raise SystemExit(1)")
    (tmp_path / "logs").mkdir()
    plan.of_role("inference")[0].log.write_text("torch.OutOfMemoryError: CUDA out of memory.\n")
    assert supervise(plan, run_id).cause is None


def test_of_a_trainer_its_own_words_are_shown_and_not_those_of_torchrun(tmp_path: Path, run_id: str, port: int):
    talker = """
    for i in range(3): print(f"[rank 0] mine {i}")
    for i in range(60): print("  File torchrun.py", i)
    print("    exitcode  : -11 (pid: 5)  (SIGSEGV)")
    print("=====")
    raise SystemExit(1)
    """
    plan = plan_of(tmp_path, run_id, port, trainer=talker, orchestrator=polite(tmp_path, "o", seconds=60))
    outcome = supervise(plan, run_id)
    assert outcome.log_tail == (
        "[rank 0] mine 0",
        "[rank 0] mine 1",
        "[rank 0] mine 2",
        "    exitcode  : -11 (pid: 5)  (SIGSEGV)",
    )


def test_the_trainer_saves_a_checkpoint_when_another_process_fails(tmp_path: Path, run_id: str, port: int):
    trainer = polite(tmp_path, "t", seconds=60, then=checkpoint_then_exit(tmp_path))
    outcome = supervise(plan_of(tmp_path, run_id, port, trainer=trainer, orchestrator="raise SystemExit(1)"), run_id)
    assert outcome.code == ExitCode.FAILED
    assert (tmp_path / "checkpoints" / "step_3").is_dir()
    request = Control(tmp_path).stop_request()
    assert request is not None
    assert request.kind == "failed"


def test_one_interrupt_stops_gracefully_with_a_checkpoint(tmp_path: Path, run_id: str, port: int):
    trainer = polite(tmp_path, "t", seconds=60, then=checkpoint_then_exit(tmp_path))
    plan = plan_of(tmp_path, run_id, port, trainer=trainer, orchestrator=polite(tmp_path, "o", seconds=60))
    outcome = supervise(plan, run_id, meanwhile=once_healthy(lambda _: os.kill(os.getpid(), signal.SIGINT)))
    assert outcome.code == ExitCode.INTERRUPTED
    assert (tmp_path / "checkpoints" / "step_3").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_requests_to_end_are_as_graceful(tmp_path: Path, run_id: str, port: int, number: signal.Signals):
    code = polite(tmp_path, "worker", seconds=60)
    plan = plan_of(tmp_path, run_id, port, trainer=code, orchestrator=code)
    outcome = supervise(plan, run_id, meanwhile=once_healthy(lambda _: os.kill(os.getpid(), number)))
    assert outcome.code == ExitCode.INTERRUPTED


def test_a_terminal_that_hangs_up_twice_asks_once(tmp_path: Path, run_id: str, port: int):
    slow = polite(tmp_path, "t", seconds=60, then="time.sleep(0.5); " + checkpoint_then_exit(tmp_path))
    plan = plan_of(tmp_path, run_id, port, trainer=slow, orchestrator=polite(tmp_path, "o", seconds=60))

    def hang_up(_: Supervisor) -> None:
        for _press in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)

    outcome = supervise(plan, run_id, meanwhile=once_healthy(hang_up))
    assert outcome.code == ExitCode.INTERRUPTED
    assert (tmp_path / "checkpoints" / "step_3").is_dir()


def test_two_interrupts_end_everything_at_once_even_what_ignores_signals(tmp_path: Path, run_id: str, port: int):
    plan = plan_of(tmp_path, run_id, port, trainer=STUBBORN, orchestrator=STUBBORN)

    def interrupt(_: Supervisor) -> None:
        for _press in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    outcome = supervise(plan, run_id, meanwhile=once_healthy(interrupt))
    assert outcome.code == ExitCode.KILLED


def test_one_key_press_that_arrives_twice_counts_once(tmp_path: Path, run_id: str, port: int):
    trainer = polite(tmp_path, "t", seconds=60, then="time.sleep(0.5); " + checkpoint_then_exit(tmp_path))
    plan = plan_of(tmp_path, run_id, port, trainer=trainer, orchestrator=polite(tmp_path, "o", seconds=60))

    def interrupt(_: Supervisor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert supervise(plan, run_id, meanwhile=once_healthy(interrupt)).code == ExitCode.INTERRUPTED


def test_a_grandchild_in_a_session_of_its_own_does_not_survive(tmp_path: Path, run_id: str, port: int):
    trainer = GRANDCHILD.format(code=STUBBORN) + polite(tmp_path, "t", seconds=0.5)
    plan = plan_of(tmp_path, run_id, port, trainer=trainer, orchestrator=polite(tmp_path, "o", seconds=0.5))
    assert supervise(plan, run_id).code == ExitCode.DONE  # supervise() itself looks for survivors


def test_an_engine_that_never_serves_is_given_up_with_its_log_named(tmp_path: Path, run_id: str, port: int):
    code = polite(tmp_path, "worker", seconds=60)
    plan = plan_of(tmp_path, run_id, port, trainer=code, orchestrator=code, engine="import time; time.sleep(60)")
    outcome = supervise(plan, run_id, Deadlines(startup_s=0.5, stop_s=5, rescue_s=1, grace_s=1))
    assert outcome.code == ExitCode.FAILED
    assert "inference did not answer" in outcome.reason
    assert "inference.startup_timeout_s" in outcome.reason


def test_a_trainer_that_never_stops_is_given_up(tmp_path: Path, run_id: str, port: int):
    plan = plan_of(tmp_path, run_id, port, trainer=STUBBORN, orchestrator=polite(tmp_path, "o", seconds=60))
    deadlines = Deadlines(startup_s=20, stop_s=0.5, rescue_s=1, grace_s=0.5)
    outcome = supervise(plan, run_id, deadlines, meanwhile=once_healthy(lambda _: os.kill(os.getpid(), signal.SIGINT)))
    assert outcome.code == ExitCode.FAILED
    assert outcome.reason.startswith("trainer did not end within")


@pytest.mark.parametrize(("kind", "code"), [("success", ExitCode.DONE), ("abort", ExitCode.ABORTED)])
def test_a_condition_that_ended_the_run_decides_its_exit_code(tmp_path: Path, run_id: str, port: int, kind: str, code: ExitCode):
    worker = polite(tmp_path, "worker", seconds=60)
    plan = plan_of(tmp_path, run_id, port, trainer=worker, orchestrator=worker)
    outcome = supervise(plan, run_id, meanwhile=once_healthy(lambda s: s.control.request_stop(kind, "it holds")))
    assert outcome == Outcome(code, "it holds")


def test_the_engine_may_die_once_the_run_was_asked_to_stop(tmp_path: Path, run_id: str, port: int):
    slow = polite(tmp_path, "t", seconds=60, then="time.sleep(1); " + checkpoint_then_exit(tmp_path))
    plan = plan_of(tmp_path, run_id, port, trainer=slow, orchestrator=polite(tmp_path, "o", seconds=60))

    def stop_and_kill_engine(supervisor: Supervisor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(supervisor.children[0].pid, signal.SIGKILL)

    assert supervise(plan, run_id, meanwhile=once_healthy(stop_and_kill_engine)).code == ExitCode.INTERRUPTED
    assert (tmp_path / "checkpoints" / "step_3").is_dir()


def test_stdout_and_stderr_of_each_process_are_in_its_log(tmp_path: Path, run_id: str, port: int):
    code = "import sys\nprint('to stdout')\nprint('to stderr', file=sys.stderr)"
    supervise(plan_of(tmp_path, run_id, port, trainer=code, orchestrator=code), run_id)
    for name in ("trainer", "orchestrator"):
        assert sorted((tmp_path / "logs" / f"{name}.stdout").read_text().splitlines()) == ["to stderr", "to stdout"]


def test_the_signal_handlers_are_as_before_afterwards(tmp_path: Path, run_id: str, port: int):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    supervise(plan_of(tmp_path, run_id, port, trainer="", orchestrator=""), run_id)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


RL = """
import sys
from pathlib import Path
from support.fake_run import STUBBORN, plan_of, polite
from turnwise.launch.supervise import Deadlines, Supervisor
class Silent:
    def say(self, text): pass
    def update(self, children): pass
root, run_id, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
plan = plan_of(root, run_id, port, trainer=STUBBORN, orchestrator=polite(root, "o", seconds=60))
Supervisor(plan, run_id, Silent(), deadlines=Deadlines(grace_s=0.5)).run()
"""


def test_kill_9_of_rl_itself_leaves_nothing_running(tmp_path: Path, run_id: str, port: int):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    rl = subprocess.Popen([sys.executable, "-c", RL, str(tmp_path), run_id, str(port)], env=env)
    assert eventually(lambda: len(processes_of(run_id)) == 3)
    assert eventually(lambda: (tmp_path / "logs" / "trainer.stdout").read_text() == "stubborn\n")
    rl.kill()
    rl.wait()
    assert eventually(lambda: processes_of(run_id) == [])


def test_a_process_that_cannot_be_started_ends_those_that_were(tmp_path: Path, run_id: str, port: int):
    plan = plan_of(tmp_path, run_id, port, trainer="", orchestrator="")
    missing = plan.processes[2].__class__(**{**vars(plan.processes[2]), "argv": ("/no/such/program",)})
    with pytest.raises(FileNotFoundError):
        Supervisor(Plan((*plan.processes[:2], missing), plan.run_dir), run_id, Transcript(), deadlines=QUICK).run()
    assert processes_of(run_id) == []


def test_a_request_to_stop_that_cannot_be_written_ends_the_run_with_the_reason(tmp_path: Path, run_id: str, port: int):
    (tmp_path / "control").write_text("a file where the folder should be, as unwritable as a full disk")
    code = "import time\nprint('works', flush=True)\ntime.sleep(60)"
    plan = plan_of(tmp_path, run_id, port, trainer=code, orchestrator=code)
    outcome = supervise(plan, run_id, meanwhile=once_healthy(lambda _: os.kill(os.getpid(), signal.SIGINT)))
    assert outcome.code == ExitCode.FAILED
    assert outcome.reason.startswith("the request to stop cannot be written")


def test_processes_of_another_run_are_left_alone(tmp_path: Path, run_id: str, port: int):
    from support.fake_run import process

    other = Child(process(tmp_path / "other", "trainer", STUBBORN, uuid.uuid4().hex))
    try:
        supervise(plan_of(tmp_path, run_id, port, trainer="", orchestrator=""), run_id)
        assert other.exit_code() is None
    finally:
        psutil.Process(other.pid).kill()
        other.reap()


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if condition():
                return True
        except OSError:
            pass
        time.sleep(0.05)
    return False
