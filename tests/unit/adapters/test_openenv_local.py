"""Servers that a run starts: from a command or an image, ended with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from turnwise.adapters.openenv.local import Launch, image_launch, local_url, stop_all
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
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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


def test_a_command_ends_with_the_process_that_started_it_even_when_its_whole_group_is_killed(tmp_path: Path):
    script = (
        "import sys, time; from turnwise.adapters.openenv.local import Launch, local_url\n"
        "local_url(Launch((sys.executable, '-c', sys.argv[1], '{port}', sys.argv[2]), sys.argv[3])); print('up', flush=True)\n"
        "time.sleep(60)"
    )
    words = [sys.executable, "-c", script, HEALTHY, str(tmp_path / "pid"), str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        os.killpg(parent.pid, signal.SIGKILL)
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


def fake_docker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    docker = folder / "docker"
    docker.write_text(f"#!/bin/sh\n{script}\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_an_image_is_served_on_the_loopback_interface_and_its_container_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = tmp_path / "calls"
    fake_docker(tmp_path, monkeypatch, f'echo "$@" >> {calls}; [ "$1" = rm ]')
    launch = image_launch("games/echo:1", str(tmp_path / "log"))
    assert launch == image_launch("games/echo:1", str(tmp_path / "log"))  # which is how environments share a server
    with pytest.raises(OpenEnvError, match=r"docker run .* ended with exit code 1; its log .* is empty"):
        local_url(launch)
    run, removal = (line.split() for line in calls.read_text().splitlines())
    name, published = run[run.index("--name") + 1], run[run.index("--publish") + 1]
    host, port, inside = published.split(":")
    assert (host, inside) == ("127.0.0.1", "8000")
    assert name.endswith(f"-{port}")
    assert run == ["run", "--rm", "--init", "--name", name, "--publish", published, "games/echo:1"]
    assert removal == ["rm", "--force", "--volumes", name]
    stop_all()


def test_a_container_that_cannot_be_removed_is_named_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_docker(tmp_path, monkeypatch, 'echo "no engine" >&2; exit 125')
    with pytest.raises(OpenEnvError, match=r"no engine\ndocker rm --force --volumes turnwise-openenv-\S+: no engine"):
        local_url(image_launch("games/echo:1", str(tmp_path / "log")))
    stop_all()


def test_an_image_without_docker_is_told_what_an_id_without_a_command_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        OpenEnvError, match=r"an id without args.command that is no URL is an image: there is no program 'docker'"
    ):
        local_url(image_launch("mine"))
    stop_all()
