"""Runs of tiny fake processes: they speak the real protocol (health route, stop file, logs) and do nothing else."""

import sys
import textwrap
from pathlib import Path

from turnwise.launch.plan import Plan, ProcessSpec
from turnwise.launch.survivors import RUN_ID
from turnwise.transport import RunDir

ENGINE = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
print("engine serves", flush=True)
http.server.HTTPServer(("127.0.0.1", {port}), Health).serve_forever()
"""
POLITE = """
import pathlib, sys, time
print("{name} works", flush=True)
stop = pathlib.Path({root!r}) / "control" / "stop.json"
end = time.monotonic() + {seconds}
while time.monotonic() < end and not stop.exists():
    time.sleep(0.02)
{then}
"""
STUBBORN = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
print("stubborn", flush=True)
while True: time.sleep(1)
"""
GRANDCHILD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {code!r}], start_new_session=True)
"""


def process(root: Path, name: str, code: str, run_id: str, health_url: str | None = None) -> ProcessSpec:
    """A fake process of a run."""
    argv = (sys.executable, "-c", textwrap.dedent(code))
    env = {RUN_ID: run_id, "PYTHONUNBUFFERED": "1"}
    return ProcessSpec(name, argv, env, root, RunDir(root).logs / f"{name}.stdout", health_url=health_url)


def polite(root: Path, name: str, *, seconds: float, then: str = "") -> str:
    """Code of a process that works for some seconds or until it is asked to stop, and then does `then`."""
    return POLITE.format(root=str(root), name=name, seconds=seconds, then=then)


def checkpoint_then_exit(root: Path) -> str:
    """What a polite trainer does at its end."""
    return f"(pathlib.Path({str(root)!r}) / 'checkpoints' / 'step_3').mkdir(parents=True)"


def plan_of(root: Path, run_id: str, port: int, *, trainer: str, orchestrator: str, engine: str = ENGINE) -> Plan:
    """A plan of one engine, a trainer and an orchestrator with this code."""
    return Plan(
        (
            process(root, "inference", engine.format(port=port), run_id, f"http://127.0.0.1:{port}/health"),
            process(root, "trainer", trainer, run_id),
            process(root, "orchestrator", orchestrator, run_id),
        ),
        RunDir(root),
    )
