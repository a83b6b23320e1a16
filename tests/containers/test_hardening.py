"""What the model's code cannot do in a container, seen from inside and by the engine's own account."""

from typing import Any

from support.docker_engine import my_containers
from turnwise.containers import Box, Ending


def lines(box: Box, command: str) -> list[str]:
    result = box.run(command)
    assert result.ending is Ending.OK, result
    return result.output.splitlines()


def test_the_engine_says_that_everything_is_dropped(box: Box, api: Any):
    made = api.inspect_container(my_containers(api)[0]["Id"])
    host = made["HostConfig"]
    assert made["Config"]["User"] == "1000:1000"
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["ReadonlyRootfs"]
    assert host["NetworkMode"] == "none"
    assert not host["Privileged"]
    assert host["Memory"] == host["MemorySwap"] == 192 * 2**20
    assert host["PidsLimit"] == 64
    assert host["NanoCpus"] == 10**9
    assert host["Binds"] is None
    assert host["LogConfig"]["Type"] == "none"


def test_no_capabilities_no_new_privileges_and_a_seccomp_filter(box: Box):
    status = dict(line.split(":\t", 1) for line in lines(box, "grep -E 'Cap|NoNew|Seccomp:|^Uid' /proc/self/status"))
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert set(status["Uid"].split("\t")) == {"1000"}


def test_only_the_loopback_device_is_there(box: Box):
    assert lines(box, "ls /sys/class/net") == ["lo"]
    assert box.run("wget -T 2 -q -O- http://1.1.1.1/").ending is Ending.FAILED
    assert box.run("nslookup example.org").ending is Ending.FAILED


def test_the_root_is_read_only_and_devices_cannot_be_made(box: Box):
    for attempt in ("touch /x", "echo x >/etc/passwd", "mknod /tmp/sda b 8 0", "mount -t tmpfs none /mnt", "chroot / true"):
        result = box.run(attempt)
        assert result.ending is Ending.FAILED, attempt
        assert any(word in result.output for word in ("Read-only", "not permitted", "ermission denied")), result.output


def test_nothing_of_the_host_is_seen(box: Box):
    assert len(lines(box, "ls -d /proc/[0-9]*")) <= 3  # the first process, the shell, ls
    assert box.run("ls /var/run/docker.sock").ending is Ending.FAILED
    assert box.run("ls /dev/sda /dev/vda /dev/kmsg /dev/mem").ending is Ending.FAILED


def test_the_first_process_and_the_shell_are_closed_to_what_runs_beside_them(box: Box):
    for attempt in ("ls /proc/1/fd", "echo exit >/proc/1/fd/0", "cat /proc/$$/environ", "ls -l /proc/$$/fd", "cat /proc/1/mem"):
        result = box.run(attempt)
        assert result.ending is Ending.FAILED, attempt
        assert "ermission denied" in result.output
    assert box.run("kill -9 1; kill -STOP 1; sleep 0.1").ending is Ending.OK
    assert box.run("echo alive").output == "alive\n"


def test_no_gpu_is_visible_without_a_lease(box: Box):
    assert lines(box, "echo $NVIDIA_VISIBLE_DEVICES") == ["void"]
