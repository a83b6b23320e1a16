"""The same boxes where there is no engine; what is weaker is in the docs and not asserted here."""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.docker_engine import census
from turnwise.config.containers import ContainersConfig
from turnwise.containers import DATA, Box, ContainerError, Ending, Pool, TransferRefused, make_pool
from turnwise.containers.bubblewrap import OWNER_FILE, PREFIX
from turnwise.containers.owner import Owner

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
CONFIG = ContainersConfig(backend="bubblewrap", warm=0, wait_s=20)


def boxes() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


@pytest.fixture
def pool() -> Iterator[Pool]:
    with make_pool(CONFIG, run="tests") as pool:
        yield pool


@pytest.fixture(params=["busybox", "host"])
def box(pool: Pool, request: pytest.FixtureRequest) -> Iterator[Box]:
    with pool.lease(request.param) as box:
        yield box


def test_commands_share_a_shell_and_files_stay_past_a_deadline(box: Box):
    box.put({"kept": "kept"})
    assert box.run("cd /tmp; x=1; false").exit_code == 1
    assert box.run('echo "$PWD $x"').output == "/tmp 1\n"
    late = box.run("setsid sh -c \"trap '' TERM; sleep 60\" & sleep 60", timeout_s=0.3)
    assert (late.ending, late.new_session) == (Ending.TIMEOUT, True)
    assert box.run("cat kept; ps | grep -c '[s]leep'").output == "kept0\n"


def test_network_root_and_host_are_out_of_reach(box: Box):
    assert box.run("touch /x").ending is Ending.FAILED
    assert box.run("cat /etc/shadow").ending is Ending.FAILED
    assert box.run("grep -v -E 'lo:|\\|' /proc/net/dev").output == ""
    assert "CapEff:\t" + "0" * 16 in box.run("cat /proc/self/status").output
    assert len(box.run("ls -d /proc/[0-9]*").output.split()) <= 4


def test_floods_and_hunger_are_ended(box: Box):
    assert box.run("yes").ending is Ending.FLOOD
    assert box.run("awk 'BEGIN { s = \"x\"; while (1) s = s s }'").ending is Ending.FAILED
    assert box.run("echo fine").output == "fine\n"


def test_transfers_and_their_tricks(box: Box):
    box.put({"train": "1"}, DATA, protected=True)
    assert box.run("cat /data/train; echo 2 >/data/train").ending is Ending.FAILED
    box.run("ln -s /etc/hostname link")
    with pytest.raises(TransferRefused, match="a link"):
        box.read("/home/agent/link")
    assert box.read("/data/train") == b"1"


def test_nothing_is_left_behind(pool: Pool):
    def play() -> None:
        with pool.lease("busybox") as box:
            box.run("sleep 60 & sleep 60", timeout_s=0.05)

    play()
    before = census()
    threads = [threading.Thread(target=play) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert census() == before
    assert not [path for path in boxes() if Owner.parse((path / OWNER_FILE).read_text()) == Owner.me()]


def test_folders_of_the_dead_are_removed_and_no_others():
    left = [Path(tempfile.mkdtemp(prefix=PREFIX)) for _ in range(2)]
    dead = Owner.me().label().replace(f'"pid": {os.getpid()}', f'"pid": {2**22 + 1}')
    (left[0] / OWNER_FILE).write_text(dead)
    (left[1] / OWNER_FILE).write_text(Owner.me().label())
    with make_pool(CONFIG, run="next"):
        assert [path.exists() for path in left] == [False, True]
    shutil.rmtree(left[1])


def test_a_network_is_refused_and_not_forgotten():
    with pytest.raises(ContainerError, match="needs an engine"):
        make_pool(CONFIG.model_copy(update={"network": "bridge"}), run="x")
