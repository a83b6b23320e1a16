"""Servers that a run starts: from a command or an image, ended with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turnwise.adapters.openenv.local import Launch, image_command, local_url, stop_all
from turnwise.adapters.openenv.wire import OpenEnvError, get_json

HEALTHY = """
import http.server, os, pathlib, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"status": "healthy"}')
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(pid)


def asked_until_it_fails(launch: Launch) -> None:
    """The guard sees the end of its command a little later than the test."""
    while True:
        local_url(launch)


def test_a_command_is_started_once_and_a_crash_is_an_error_with_the_end_of_its_log(tmp_path: Path):
    launch = Launch((sys.executable, "-c", HEALTHY, "{port}", str(tmp_path / "pid")), str(tmp_path / "log"))
    try:
        url = local_url(launch)
        assert get_json(f"{url}/health", timeout_s=5) == {"status": "healthy"}
        assert local_url(launch) == url
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        assert ends(pid)
        with pytest.raises(OpenEnvError, match=r"ended with exit code .*its log .*log ends with:\n.*GET /health"):
            asked_until_it_fails(launch)
    finally:
        stop_all()


def test_a_command_ends_with_the_process_that_started_it_even_when_that_is_killed(tmp_path: Path):
    script = (
        "import sys, time; from turnwise.adapters.openenv.local import Launch, local_url\n"
        "local_url(Launch((sys.executable, '-c', sys.argv[1], '{port}', sys.argv[2]), sys.argv[3])); print('up', flush=True)\n"
        "time.sleep(60)"
    )
    words = [sys.executable, "-c", script, HEALTHY, str(tmp_path / "pid"), str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        parent.kill()
    assert ends(int((tmp_path / "pid").read_text()))


def test_a_command_that_ends_at_once_is_an_error_that_quotes_it_and_is_not_tried_again(tmp_path: Path):
    counted = tmp_path / "count"
    launch = Launch(("/bin/sh", "-c", f"echo x >> {counted}; echo no such game; exit 3; {{port}}"), str(tmp_path / "log"))
    for _ in range(2):
        with pytest.raises(OpenEnvError, match=r"ended with exit code 3; its log .*log ends with:\nno such game"):
            local_url(launch)
    assert counted.read_text() == "x\n"
    stop_all()


def test_a_command_that_never_listens_is_ended_after_its_time(tmp_path: Path):
    pid = tmp_path / "pid"
    launch = Launch(("/bin/sh", "-c", f"echo $$ > {pid}; exec sleep 60 # {{port}}"), str(tmp_path / "log"), start_timeout_s=0.3)
    with pytest.raises(OpenEnvError, match=r"was not healthy within args.start_timeout_s = 0.3: .*; its log .* is empty"):
        local_url(launch)
    assert ends(int(pid.read_text()))
    stop_all()


def test_a_program_that_does_not_exist_is_named():
    with pytest.raises(OpenEnvError, match=r"args.command: there is no program 'no-such-server'"):
        local_url(Launch(("no-such-server", "{port}")))
    stop_all()


def test_an_image_is_served_on_the_loopback_interface_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(OpenEnvError, match=r"ended with exit code 1") as caught:
        local_url(Launch(image_command("games/echo:1"), str(tmp_path / "log")))
    words = (tmp_path / "log").read_text().split()
    published = words[words.index("--publish") + 1]
    host, port, inside = published.split(":")
    assert (host, inside) == ("127.0.0.1", "8000")
    assert words == ["run", "--rm", "--init", "--name", f"turnwise-openenv-{port}", "--publish", published, "games/echo:1"]
    assert "docker run" in str(caught.value)
    stop_all()
