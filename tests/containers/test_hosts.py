"""Engines elsewhere: over TLS and over ssh, and several at once."""

import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.docker_engine import census
from turnwise.config.containers import ContainersConfig
from turnwise.containers import EngineDown, make_pool

SSH = """#!{python}
# Stands in for ssh: forwards the socket that -L names, as OpenSSH does.
import socket, sys, threading
sys.argv.index("BatchMode=yes"), sys.argv.index("-N")
assert sys.argv[-2:] == ["--", "me@far"] and sys.argv[sys.argv.index("-p") + 1] == "2222", sys.argv
here, there = sys.argv[sys.argv.index("-L") + 1].split(":")
server = socket.socket(socket.AF_UNIX)
server.bind(here)
server.listen(64)
def pump(a, b):
    while data := a.recv(65536):
        b.sendall(data)
    b.shutdown(socket.SHUT_WR)
while True:
    near, _ = server.accept()
    far = socket.socket(socket.AF_UNIX)
    far.connect(there)
    for ends in ((near, far), (far, near)):
        threading.Thread(target=pump, args=ends, daemon=True).start()
"""


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)


def make_certificates(folder: Path) -> None:
    """An authority, and certificates of a server at 127.0.0.1 and of a client, signed by it."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    for who in ("server", "client"):
        openssl("req", *new, "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{who}.csr", "-out", f"{who}.pem", *signed)


@pytest.fixture
def tls_port(engine_url: str, tmp_path: Path) -> Iterator[int]:
    """A port that speaks TLS with clients that have a certificate, in front of the engine."""
    make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    context.load_verify_locations(tmp_path / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                plain, _ = listener.accept()
                with suppress(ssl.SSLError):
                    front = context.wrap_socket(plain, server_side=True)
                    back = socket.socket(socket.AF_UNIX)
                    back.connect(engine_url.removeprefix("unix://"))
                    for ends in ((front, back), (back, front)):
                        threading.Thread(target=pump, args=ends, daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


def over(config: ContainersConfig, host: dict[str, object], **changes: object) -> ContainersConfig:
    return ContainersConfig.model_validate({**config.model_dump(), "hosts": [host], **changes})


def plays(config: ContainersConfig) -> None:
    with make_pool(config, run="far") as pool, pool.lease("busybox", files={"f": b"x" * 300_000}) as box:
        assert box.run("cd /tmp; wc -c <~/f").output == "300000\n"
        assert box.run("pwd; sleep 9", timeout_s=0.2).output == "/tmp\n"
        assert len(box.read("/home/agent/f")) == 300_000


def test_an_engine_behind_tls(config: ContainersConfig, tls_port: int, tmp_path: Path):
    files = {"tls_ca": tmp_path / "ca.pem", "tls_cert": tmp_path / "client.pem", "tls_key": tmp_path / "client.key"}
    plays(over(config, {"url": f"tcp://127.0.0.1:{tls_port}", **files}))


def test_a_client_without_the_right_authority_is_refused(config: ContainersConfig, tls_port: int, tmp_path: Path):
    (tmp_path / "other").mkdir()
    make_certificates(tmp_path / "other")
    files = {"tls_ca": tmp_path / "other/ca.pem", "tls_cert": tmp_path / "client.pem", "tls_key": tmp_path / "client.key"}
    refused = over(config, {"url": f"tcp://127.0.0.1:{tls_port}", **files}, wait_s=0.5)
    with make_pool(refused, run="far") as pool, pytest.raises(EngineDown, match="certificate"), pool.lease("busybox"):
        pass


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    script = tmp_path / "ssh"
    script.write_text(SSH.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_an_engine_behind_ssh_over_one_connection_that_ends_with_the_pool(
    config: ContainersConfig, engine_url: str, fake_ssh: None
):
    before = census()
    plays(over(config, {"url": f"ssh://me@far:2222{engine_url.removeprefix('unix://')}"}))
    assert census()["sockets"] == before["sockets"]


def test_what_ssh_complains_about_is_said(config: ContainersConfig, fake_ssh: None):
    wrong = over(config, {"url": "ssh://nobody@far:2222"}, wait_s=0.5)
    with make_pool(wrong, run="far") as pool, pytest.raises(EngineDown, match="nobody@far"), pool.lease("busybox"):
        pass


def test_while_one_engine_is_down_the_others_are_used(config: ContainersConfig):
    hosts = [{"url": "unix:///nowhere/docker.sock"}, config.hosts[0].model_dump()]
    both = ContainersConfig.model_validate({**config.model_dump(), "hosts": hosts})
    with make_pool(both, run="two") as pool:
        for _ in range(4):
            with pool.lease("busybox") as box:
                assert box.run("echo up").output == "up\n"
        assert list(pool.state.down) == ["unix:///nowhere/docker.sock"]
